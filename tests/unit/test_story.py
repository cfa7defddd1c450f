"""Status to what kubectl shows and back: one write holds both, and the heart goes on from it."""

from __future__ import annotations

from dataclasses import replace

from cowest_operator import api, reconcile, story
from tests import world
from tests.world import CANDIDATE, PREPARED, on_trial

STATUS = replace(
    on_trial(stage="Canary", done=PREPARED),
    conditions=(api.Condition("Ready", "True", "Answering", "the pair answers.", 3, 1_700_000_000.0),),
    rounds=(api.Outcome(0, "Baseline", "Promoted", "Better", "well", CANDIDATE.digest, 1.0, 2.0, p_value=1e-9),),
    vetoed=("sha256:no",),
    proposals=(api.Proposal("s3://b/m", "ann", "because"),),
)


def written(status: api.Status = STATUS) -> dict[str, object]:
    plan = replace(reconcile.plan(world.world()), status=status)
    return story.written(status, plan, api.TraceCounts(5, 3, "two have no reference"), 3)


def test_what_is_written_is_what_is_read() -> None:
    assert story.read(written()) == STATUS


def test_a_job_without_a_status_begins_anew() -> None:
    assert story.read(None) == story.read({}) == story.read({"conditions": []}) == api.Status()


def test_people_see_pair_candidate_traffic_and_rounds() -> None:
    seen = written()
    assert seen["stable"]["digest"] == STATUS.stable.digest  # type: ignore[index, union-attr]
    assert seen["candidate"]["stage"] == "Canary"  # type: ignore[index]
    assert seen["rounds"][0]["pValue"] == "1e-09"  # type: ignore[index]
    assert seen["traces"] == {"all": 5, "usable": 3, "reason": "two have no reference"}


def test_a_new_sentence_alone_is_no_transition_but_a_new_reason_is() -> None:
    before = written()
    condition = STATUS.conditions[0]
    other_words = written(replace(STATUS, conditions=(replace(condition, message="it answers still."),)))
    other_reason = written(replace(STATUS, conditions=(replace(condition, reason="Starting"),)))
    assert story.transition(before) == story.transition(other_words)
    assert story.transition(before) != story.transition(other_reason)


def test_money_spent_alone_is_no_transition() -> None:
    spent = written(replace(STATUS, budget=api.Budget(10, 100, 0.5)))
    assert story.transition(written()) == story.transition(spent)


def test_what_an_evaluation_showed_besides_stands_with_its_round() -> None:
    noted = replace(STATUS, rounds=(replace(STATUS.rounds[0], note="the weak model alone is better."),))
    assert written(noted)["rounds"][0]["note"] == "the weak model alone is better."  # type: ignore[index]
    assert "note" not in written()["rounds"][0]  # type: ignore[index]
