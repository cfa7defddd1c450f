"""Status to what kubectl shows and back: one write holds both, and the heart goes on from it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cowest_operator import api, manifest, reconcile, schema, story
from cowest_serving.contract import SettingsError
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


LONG = "x" * 40_000


def test_no_text_is_too_long_for_the_api_server_however_long_it_was_said() -> None:
    outcome = replace(STATUS.rounds[0], reason=LONG, message=LONG, pair=LONG, by=LONG, note=LONG, proposed_by=LONG,
                      proposed_why=LONG, dataset=LONG, p_value=1e300, score=-1e300)  # fmt: skip
    pair = replace(CANDIDATE, weak_digest=LONG, weak_uri=LONG, strong_model=LONG)
    assert STATUS.candidate is not None
    huge = replace(
        STATUS,
        conditions=(replace(STATUS.conditions[0], message=LONG),),
        rounds=(outcome,) * 10,
        stable=pair,
        candidate=replace(STATUS.candidate, pair=pair, model=LONG),
        last_transition=LONG,
        budget=api.Budget(1, 1, 1e300, api.Spent(1, 1, 1e300), api.Live("2026-11-26", 1, 1, 1e300)),
    )
    plan = replace(reconcile.plan(world.world()), status=huge)
    seen = story.written(huge, plan, api.TraceCounts(5, 3, LONG), 3)
    assert list(schema.check(manifest.field_schema("status"), seen)) == []
    assert len(seen["traces"]["reason"]) == 1024 and seen["traces"]["reason"].endswith("x…")
    assert story.read(seen).rounds[0].by == LONG, "what is decided from is whole"


@pytest.mark.parametrize(
    ("state", "word"),
    [
        pytest.param({"trials": "two"}, "status.state.trials: wanted a whole number, saw 'two'", id="edited by hand"),
        pytest.param({"serving": "Both"}, "status.state.serving: wanted one of", id="of a later version"),
        pytest.param({"rounds": 7}, "status.state: ", id="no list"),
        pytest.param("nothing", "status.state: ", id="no mapping"),
    ],
)
def test_a_state_that_cannot_be_read_is_told_by_its_place_with_what_to_do(state: object, word: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(word)) as caught:
        story.read({**written(), "state": state})
    assert "Put it back as it was" in str(caught.value)
