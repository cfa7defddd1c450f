"""`rounds.trigger.schedule`: when a round is due, what is said until then, and which expressions are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cowest_operator import api, manifest, rounds, schedule
from tests import world as w
from tests.manifests import edited

DAY = 86_400.0
MIDNIGHT = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
THREE = MIDNIGHT + 3 * 3600


@pytest.mark.parametrize(
    ("expression", "after", "wanted"),
    [
        ("0 3 * * *", MIDNIGHT, THREE),
        ("0 3 * * *", THREE, THREE + DAY),
        ("0 3 * * *", THREE + 0.5, THREE + DAY),
        ("*/15 * * * *", MIDNIGHT + 1, MIDNIGHT + 900),
        ("0 0 1 1 *", MIDNIGHT, datetime(2027, 1, 1, tzinfo=UTC).timestamp()),
        ("0 0 * * SUN", MIDNIGHT, datetime(2026, 11, 29, tzinfo=UTC).timestamp()),
        ("0 0 29 2 *", MIDNIGHT, datetime(2028, 2, 29, tzinfo=UTC).timestamp()),
    ],
)
def test_the_next_time_is_after_the_moment_in_utc(expression: str, after: float, wanted: float) -> None:
    assert schedule.next_after(expression, after) == wanted


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("0 25 * * *", "bad hour"),
        ("61 * * * *", "bad minute"),
        ("0 0 31 2 *", "bad day-of-month"),
        ("0 0 * * FUNDAY", "bad day-of-week"),
        ("*/0 * * * *", "bad minute"),
        ("a b c d e", "bad minute"),
    ],
)
def test_a_manifest_with_an_impossible_schedule_is_refused_with_the_reason(expression: str, says: str) -> None:
    problems = manifest.validate(edited_job(expression))
    assert [problem.field for problem in problems] == ["spec.rounds.trigger.schedule"]
    assert says in str(problems[0]) and '"0 3 * * *"' in str(problems[0])


def test_six_fields_are_refused_before_they_mean_seconds() -> None:
    (problem,) = manifest.validate(edited_job("0 0 3 * * *"))
    assert "five fields" in str(problem)
    assert "saw 6" in schedule.problem("0 0 3 * * *")


def edited_job(expression: str) -> dict:
    text = manifest.yaml.safe_dump(edited({"rounds.trigger.schedule": "0 3 * * *"}))
    job = manifest.loads(text).job
    job["spec"]["rounds"]["trigger"]["schedule"] = expression
    return job


# ---------------------------------------------------------------- is a round due?
def ended(number: int, at: float, origin: api.Origin = "Round") -> api.Outcome:
    return api.Outcome(number, origin, "Promoted", "", "", "sha256:p", at - 10, at)


AFTER_BASELINE = replace(w.SERVED, rounds=(ended(0, MIDNIGHT, "Baseline"),))
AFTER_ROUND = replace(
    AFTER_BASELINE, rounds=(*AFTER_BASELINE.rounds, ended(1, THREE + 60)), tuned_rounds=1, last_round_ended=THREE + 60
)


def following(status: api.Status, now: float, expression: str = "0 3 * * *", new_traces: int = 0) -> rounds.Next:
    job = w.job(rounds={"trigger": api.Trigger(new_traces, expression), "max": 5})
    return rounds.next_trial(w.world(job=job, status=status, now=now))


def test_until_it_is_due_the_next_time_is_named_and_the_loop_is_not_over() -> None:
    seen = following(AFTER_BASELINE, THREE - 1)
    assert (seen.trial, seen.reason, seen.final) == (None, api.REASON_WAITING_FOR_SCHEDULE, False)
    assert seen.message == "the next round starts at 2026-11-23 03:00:00 UTC (rounds.trigger.schedule = '0 3 * * *')."


@pytest.mark.parametrize(
    ("status", "now", "due"),
    [
        pytest.param(AFTER_BASELINE, THREE, True, id="on time"),
        pytest.param(AFTER_BASELINE, THREE + 5 * DAY, True, id="late: made up for"),
        pytest.param(AFTER_ROUND, THREE + 120, False, id="a time that passed during the round is skipped"),
        pytest.param(AFTER_ROUND, THREE + DAY, True, id="the next day"),
    ],
)
def test_when_a_round_is_due(status: api.Status, now: float, due: bool) -> None:
    assert (following(status, now).trial is not None) == due


def test_new_traces_are_waited_for_besides() -> None:
    assert following(AFTER_BASELINE, THREE, new_traces=10).reason == api.REASON_WAITING_FOR_TRACES
    assert following(AFTER_BASELINE, THREE - 1, new_traces=10).reason == api.REASON_WAITING_FOR_SCHEDULE


def test_a_proposal_does_not_wait_for_the_schedule() -> None:
    status = replace(AFTER_BASELINE, proposals=(api.Proposal("file:///m", "ann", ""),))
    assert following(status, THREE - 1).trial is not None


def test_an_expression_that_only_a_calendar_refuses_is_a_hold_and_no_crash() -> None:
    seen = following(AFTER_BASELINE, THREE, "0 25 * * *")
    assert seen.trial is None and "bad hour" in seen.message and "Change it" in seen.message
