"""Prometheus metrics of the operator, in the text format; no library: a dozen numbers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cowest_operator import api

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Ended(NamedTuple):
    """Of the trials in `status.rounds`, the last ten, those that ended alike."""

    decision: str
    reason: str
    trials: int
    newest: float  # when the last of them ended


class _Stage(NamedTuple):
    """Where the running trial is."""

    number: int
    origin: str
    name: str
    since: float


class _Job(NamedTuple):
    """Of a job only what is shown: a thousand whole statuses would be 9 MB."""

    conditions: tuple[tuple[str, str, int], ...]  # (type, reason, is it True)
    rounds: int | None = None  # None: they were not counted yet
    calls: int | None = None
    ended: tuple[_Ended, ...] = ()
    took: float | None = None  # seconds of the last trial
    promoted: float | None = None  # when a candidate was, the last time
    stage: _Stage | None = None


# Name, type and help of what is said of each job.
_OF_JOBS = {
    "cowest_job_condition": ("gauge", "Whether a condition of a job is True."),
    "cowest_job_rounds_total": ("counter", "Rounds tuned so far."),
    "cowest_job_strong_calls_total": ("counter", "Calls of the strong model that steps have paid for."),
    "cowest_job_last_rounds": ("gauge", "Of the last ten trials, which status.rounds holds, those that ended so."),
    "cowest_job_last_rounds_age_seconds": ("gauge", "Time since the newest of them ended."),
    "cowest_job_last_round_seconds": ("gauge", "Time from the begin of the last trial that ended to its decision."),
    "cowest_job_last_promotion_age_seconds": (
        "gauge",
        "Time since a candidate was promoted; none where none of the last ten trials was.",
    ),
    "cowest_job_trial_stage_age_seconds": (
        "gauge",
        "Time that the running trial is in this stage, in a canary in this step; none where no trial runs.",
    ),
}


class Metrics:
    """Kept by the keeper, read by `/metrics`."""

    def __init__(self) -> None:
        self._seconds: Counter[float] = Counter()
        self._count, self._sum = 0, 0.0
        self._failures: Counter[str] = Counter()
        self._jobs: dict[tuple[str, str], _Job] = {}
        self.leader = False

    def reconciled(self, key: tuple[str, str], seconds: float, status: api.Status) -> None:
        self._count += 1
        self._sum += seconds
        for bound in BUCKETS:
            if seconds <= bound:
                self._seconds[bound] += 1
        self._jobs[key] = _job(status)

    def held(self, key: tuple[str, str], conditions: Iterable[api.Condition]) -> None:
        """A look that decided nothing, and why."""
        self._jobs[key] = self._jobs.get(key, _Job(()))._replace(conditions=_shown(conditions))

    def failed(self, why: str) -> None:
        self._failures[why] += 1

    def forget(self, key: tuple[str, str]) -> None:
        self._jobs.pop(key, None)

    def text(self, now: float | None = None) -> str:
        lines = [
            "# HELP cowest_operator_leader Whether this replica writes.",
            "# TYPE cowest_operator_leader gauge",
            f"cowest_operator_leader {int(self.leader)}",
            "# HELP cowest_operator_reconcile_seconds Time of one look at a job and what it asked for.",
            "# TYPE cowest_operator_reconcile_seconds histogram",
            *(f'cowest_operator_reconcile_seconds_bucket{{le="{bound}"}} {self._seconds[bound]}' for bound in BUCKETS),
            f'cowest_operator_reconcile_seconds_bucket{{le="+Inf"}} {self._count}',
            f"cowest_operator_reconcile_seconds_sum {self._sum:.6f}",
            f"cowest_operator_reconcile_seconds_count {self._count}",
            "# HELP cowest_operator_reconcile_failures_total Looks that ended early, by cause.",
            "# TYPE cowest_operator_reconcile_failures_total counter",
            *(
                f'cowest_operator_reconcile_failures_total{{cause="{c}"}} {n}'
                for c, n in sorted(self._failures.items())
            ),
            *self._of_jobs(time.time() if now is None else now),
        ]
        return "\n".join(lines) + "\n"

    def _of_jobs(self, now: float) -> Iterator[str]:
        values: dict[str, list[str]] = {name: [] for name in _OF_JOBS}
        for (namespace, name), job in sorted(self._jobs.items()):
            of = f'namespace="{namespace}",job="{name}"'
            for metric, labels, value in _values(job, now):
                values[metric].append(f"{metric}{{{of}{labels}}} {value}")
        for metric, (kind, help_text) in _OF_JOBS.items():
            yield from (f"# HELP {metric} {help_text}", f"# TYPE {metric} {kind}", *values[metric])


def _values(job: _Job, now: float) -> Iterator[tuple[str, str, int | str]]:
    """(metric, labels besides the job's, value)."""
    for kind, reason, value in job.conditions:
        yield "cowest_job_condition", f',type="{kind}",reason="{reason}"', value
    if job.rounds is not None and job.calls is not None:
        yield "cowest_job_rounds_total", "", job.rounds
        yield "cowest_job_strong_calls_total", "", job.calls
    for ended in job.ended:
        labels = f',decision="{ended.decision}",reason="{ended.reason}"'
        yield "cowest_job_last_rounds", labels, ended.trials
        yield "cowest_job_last_rounds_age_seconds", labels, _age(ended.newest, now)
    if job.took is not None:
        yield "cowest_job_last_round_seconds", "", f"{job.took:.0f}"
    if job.promoted is not None:
        yield "cowest_job_last_promotion_age_seconds", "", _age(job.promoted, now)
    if (stage := job.stage) is not None:
        labels = f',round="{stage.number}",origin="{stage.origin}",stage="{stage.name}"'
        yield "cowest_job_trial_stage_age_seconds", labels, _age(stage.since, now)


def _age(since: float, now: float) -> str:
    return f"{max(0.0, now - since):.0f}"


def _job(status: api.Status) -> _Job:
    rows, trial = status.rounds, status.candidate
    # A revalidation measures what is stable already; its row says Promoted where that goes on to be served.
    promoted = [row.ended_at for row in rows if row.decision == "Promoted" and row.origin != "Revalidation"]
    return _Job(
        _shown(status.conditions),
        status.tuned_rounds,
        status.budget.calls,
        tuple(_ended(rows)),
        rows[-1].ended_at - rows[-1].started_at if rows else None,
        max(promoted, default=None),
        _Stage(trial.number, trial.origin, trial.stage, max(trial.stage_since, trial.step_since)) if trial else None,
    )


def _ended(rows: Iterable[api.Outcome]) -> Iterator[_Ended]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.decision, row.reason), []).append(row.ended_at)
    return (_Ended(*how, len(times), max(times)) for how, times in sorted(found.items()))


def _shown(conditions: Iterable[api.Condition]) -> tuple[tuple[str, str, int], ...]:
    return tuple((c.type, c.reason, int(c.status == "True")) for c in conditions)
