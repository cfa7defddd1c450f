"""Which shortcuts the gateway may take: what was measured, of which pair, and what the manifest allows now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cowest_operator import api, reconcile, rounds, routes
from cowest_serving.contract import PredictorRef, RouteLimits, Routing, Shortcuts, dump, parse
from cowest_serving.routes import is_for_a_draft
from cowest_training.contract import Calibration, RouteReport
from tests import world as w

NEUTRAL: dict[str, Any] = {
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": False,
    "response_format": {"type": "text"},
    "stop": [],
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}
SHORTCUTS = Shortcuts(strong_alone=RouteLimits(0.02, 10))
SEEN = RouteReport("control", "strongAlone", 1000, 340, 0.004, -0.002, 0.011)
URI = "file:///store/runs/r1/predictor/predictor.json"
MEASURED = api.Routes(w.STABLE.digest, URI, "sha256:p", (SEEN,))
READY = {w.STABLE.weak_digest: api.ServerState(True, "http://weak/v1", w.STABLE.weak_digest)}


def world(shortcuts: Shortcuts | None = SHORTCUTS, seen: api.Routes | None = MEASURED, **status: Any) -> api.World:
    job = w.job(collaboration={"shortcuts": shortcuts}, rounds={"max": 1}, canary={"steps": ()})
    return w.world(job=job, status=replace(w.SERVED, routes=seen, **status), servers=READY)


def stable_arm(seen: api.World) -> Any:
    return reconcile.plan(seen).routing.arms[0]


def test_the_stable_arm_goes_by_the_predictor_that_was_measured_with_it() -> None:
    arm = stable_arm(world())
    assert arm.predictor == PredictorRef(URI, "sha256:p", ("strongAlone",))
    routing = Routing(1, "salt", (arm,))
    assert parse(Routing, dump(routing), "routing") == routing, "the gateway reads what was written"


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(world(shortcuts=None), id="no shortcut is declared"),
        pytest.param(world(shortcuts=Shortcuts(weak_alone=RouteLimits(0.5, 10))), id="another one is declared"),
        pytest.param(
            world(shortcuts=Shortcuts(strong_alone=RouteLimits(0.01, 10))), id="the loss may be above the limit"
        ),
        pytest.param(world(seen=None), id="nothing was measured"),
        pytest.param(world(seen=replace(MEASURED, pair="sha256:older")), id="another pair was measured"),
        pytest.param(world(seen=replace(MEASURED, reports=(replace(SEEN, routed=0),))), id="nothing would be routed"),
        pytest.param(world(serving="StrongAlone", standing="NotPassed"), id="the strong model answers alone"),
        pytest.param(world(candidate=w.trial("Canary")), id="a canary runs"),
        pytest.param(world(candidate=w.trial("Watch", step=2)), id="a watch runs"),
    ],
)
def test_otherwise_every_query_goes_the_usual_way(seen: api.World) -> None:
    assert stable_arm(seen).predictor is None


def test_while_a_candidate_is_prepared_the_predictor_is_gone_by() -> None:
    assert stable_arm(world(candidate=w.trial("Preparing"))).predictor is not None


def test_a_tighter_limit_acts_at_once_on_what_was_measured_before() -> None:
    assert stable_arm(world(Shortcuts(strong_alone=RouteLimits(0.011, 10)))).predictor is not None
    assert stable_arm(world(Shortcuts(strong_alone=RouteLimits(0.0109, 10)))).predictor is None


# ---------------------------------------------------------------- the round that learns it
def names(seen: api.World, trial: api.Trial) -> list[str]:
    return [rounds.key(trial, step) for step in rounds.chain(seen, trial)]


def test_a_tuned_round_learns_a_predictor_where_one_is_declared() -> None:
    trial = w.trial(pair=None)
    declared, plain = world(), world(shortcuts=None)
    assert names(declared, trial) == ["collect", "feedback", "predictor", "dpo", "evaluate"]
    assert names(plain, trial) == ["collect", "feedback", "dpo", "evaluate"]
    steps = {rounds.key(trial, step): dict(step.args) for step in rounds.chain(declared, trial)}
    assert steps["predictor"]["--feedback"].endswith("/runs/r1/feedback")
    assert steps["predictor"]["--dataset"].endswith("/runs/r1/collect")
    assert steps["evaluate"]["--predictor"].endswith("/runs/r1/predictor")


def test_other_trials_have_no_ledger_to_learn_from() -> None:
    trial = w.trial(origin="Proposal", model="file:///m")
    assert "predictor" not in names(world(), trial)
    (*_, evaluate) = rounds.chain(world(), trial)
    assert "--predictor" not in dict(evaluate.args)


def judged(passes: bool) -> api.Status:
    """The status after a gate whose report has routes of both arms."""
    mine = replace(SEEN, arm="candidate", loss=0.001, high=0.009)
    report = w.report(routes=(mine, SEEN), predictor="sha256:p")
    if not passes:
        report = replace(report, against_control=w.comparison(0.0, p_better=0.5))
    seen = world(seen=None, candidate=w.trial(done={**w.PREPARED, "predictor": {"digest": "sha256:p"}}))
    servers = READY | {w.CANDIDATE.weak_digest: api.ServerState(True, "http://c/v1", w.CANDIDATE.weak_digest)}
    first = reconcile.plan(replace(seen, report=report, servers=servers))
    if not passes:
        return first.status
    return reconcile.plan(replace(seen, report=report, servers=servers, status=first.status)).status


def test_a_promoted_pair_goes_by_what_was_measured_with_it() -> None:
    status = judged(passes=True)
    assert status.stable == w.CANDIDATE and status.routes is not None
    assert (status.routes.pair, status.routes.uri) == (w.CANDIDATE.digest, URI)
    assert [each.high for each in status.routes.reports] == [0.009]
    assert "34 % of the held-out queries would go without a draft" in status.rounds[-1].note
    assert "is within strongAlone.maxLoss." in status.rounds[-1].note


def test_a_refused_candidate_leaves_what_was_measured_with_the_pair_that_stays() -> None:
    status = judged(passes=False)
    assert status.stable == w.STABLE and status.candidate is None
    assert status.routes == MEASURED


def test_what_an_evaluator_measured_that_people_do_not_agree_with_routes_nothing() -> None:
    report = w.report(routes=(SEEN,), predictor="sha256:p")
    calibrated = replace(world().job.spec.feedback.evaluator, calibration=Calibration("file:///labels", 0.5))
    trusted = world(seen=None, candidate=w.trial(done={**w.PREPARED, "predictor": {"digest": "sha256:p"}}))
    feedback = replace(trusted.job.spec.feedback, evaluator=calibrated)
    doubted = replace(trusted, job=replace(trusted.job, spec=replace(trusted.job.spec, feedback=feedback)))
    seen = [reconcile.plan(replace(each, report=report)).status.routes for each in (trusted, doubted)]
    assert seen[0] is not None and seen[1] is None


def test_a_loss_above_the_limit_is_said() -> None:
    report = w.report(routes=(replace(SEEN, arm="candidate", high=0.05),))
    assert routes.note(report, SHORTCUTS).endswith(
        "at a loss of 0.4 points (-0.2 to 5.0), which may be above strongAlone.maxLoss, so none goes that way."
    )
    assert "finds no held-out query" in routes.note(
        w.report(routes=(replace(SEEN, arm="candidate", routed=0),)), SHORTCUTS
    )
    assert routes.note(w.report(), SHORTCUTS) == ""


def test_a_status_with_routes_is_read_as_it_was_written() -> None:
    status = replace(w.SERVED, routes=MEASURED, candidate=w.trial(routes=MEASURED))
    assert parse(api.Status, dump(status), "status") == status


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_parameter_that_asks_for_nothing_keeps_no_draft_from_being_the_answer(name: str) -> None:
    assert is_for_a_draft({name: NEUTRAL[name]})
    assert not is_for_a_draft({name: "else"})
