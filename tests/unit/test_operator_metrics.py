"""What the operator counts and shows of its jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cowest_operator import api
from cowest_operator.metrics import Metrics
from tests import world as w

KEY, OF = ("desks", "claims"), 'namespace="desks",job="claims"'
ROLLED_BACK: tuple[api.Decision, str] = ("RolledBack", api.REASON_WORSE_LIVE)
REFUSED: tuple[api.Decision, str] = ("Refused", api.REASON_NO_GAIN_OFFLINE)
PROMOTED: tuple[api.Decision, str] = ("Promoted", api.REASON_PROMOTED)


def row(number: int, decision: api.Decision, reason: str, ended: float, origin: api.Origin = "Round") -> api.Outcome:
    return api.Outcome(number, origin, decision, reason, "", "sha256:x", ended - 70, ended)


def told(status: api.Status, now: float = 1000.0) -> dict[str, str]:
    """Each value after an operator's first look at the job, by its metric and what sets it apart."""
    metrics = Metrics()
    metrics.reconciled(KEY, 0.1, status)
    lines = (line.rsplit(" ", 1) for line in metrics.text(now).splitlines() if OF in line)
    return {name.replace(OF, "").replace("{,", "{").replace("{}", ""): value for name, value in lines}


def of(metric: str, status: api.Status, **more: Any) -> dict[str, str]:
    return {name.removeprefix(metric): value for name, value in told(status, **more).items() if name.startswith(metric)}


def test_rounds_are_counted_by_decision_and_reason_out_of_what_the_status_holds() -> None:
    rows = (row(0, *PROMOTED, ended=100), row(1, *REFUSED, ended=200), row(2, *ROLLED_BACK, ended=300),
            row(3, *REFUSED, ended=400))  # fmt: skip
    status = replace(w.SERVED, rounds=rows)
    labels = [f'{{decision="{decision}",reason="{reason}"}}' for decision, reason in (PROMOTED, REFUSED, ROLLED_BACK)]
    assert of("cowest_job_last_rounds{", status) == {label[1:]: n for label, n in zip(labels, "121", strict=True)}
    ages = dict(zip(labels, ("900", "600", "700"), strict=True))
    assert of("cowest_job_last_rounds_age_seconds", status) == ages, "of the newest that ended so"
    assert told(status)["cowest_job_last_round_seconds"] == "70"
    assert told(status)["cowest_job_last_promotion_age_seconds"] == "900"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((), id="no round has ended"),
        pytest.param((row(3, *REFUSED, ended=400),), id="none of them was"),
        pytest.param(
            (row(3, "Promoted", api.REASON_REVALIDATED, 400, "Revalidation"),), id="it was only measured anew"
        ),
    ],
)
def test_no_time_since_a_promotion_is_said_where_nothing_was_promoted(rows: tuple[api.Outcome, ...]) -> None:
    assert "cowest_job_last_promotion_age_seconds" not in told(replace(w.SERVED, rounds=rows))


@pytest.mark.parametrize(
    ("trial", "label", "age"),
    [
        pytest.param({"stage_since": 400.0, "step_since": 0.0}, "Preparing", "600",
                     id="its training, all of it one stage"),
        pytest.param({"stage": "Canary", "stage_since": 500.0, "step": 1, "step_since": 900.0}, "Canary", "100",
                     id="the second step of a canary"),
    ],
)  # fmt: skip
def test_how_long_the_running_trial_is_where_it_is_stands_beside_its_stage(
    trial: dict[str, Any], label: str, age: str
) -> None:
    status = w.on_trial(number=3, **trial)
    metric = "cowest_job_trial_stage_age_seconds"
    assert of(metric, status) == {f'{{round="3",origin="Round",stage="{label}"}}': age}
    assert of(metric, replace(status, candidate=None)) == {}


def test_a_job_that_is_held_keeps_what_was_known_of_its_rounds_and_one_that_is_gone_nothing() -> None:
    metrics = Metrics()
    metrics.reconciled(KEY, 0.1, replace(w.SERVED, rounds=(row(1, *REFUSED, ended=200),)))
    metrics.held(KEY, (api.Condition(api.DEGRADED, "True", api.REASON_OPERATOR_FAILS, "", 1, 0.0),))
    assert f'cowest_job_condition{{{OF},type="Degraded",reason="OperatorFails"}} 1' in metrics.text()
    assert f"cowest_job_last_rounds{{{OF}," in metrics.text()
    metrics.forget(KEY)
    assert OF not in metrics.text()
