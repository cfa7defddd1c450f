"""Prometheus metrics of the operator, in the text format; no library: a dozen numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cowest_operator import api

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Job(NamedTuple):
    """Of a job only what is shown: a thousand whole statuses would be 9 MB."""

    conditions: tuple[tuple[str, str, int], ...]  # (type, reason, is it True)
    rounds: int | None = None  # None: they were not counted yet
    calls: int | None = None


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
        self._jobs[key] = _Job(_shown(status.conditions), status.tuned_rounds, status.budget.calls)

    def held(self, key: tuple[str, str], conditions: Iterable[api.Condition]) -> None:
        """A look that decided nothing, and why."""
        self._jobs[key] = self._jobs.get(key, _Job(()))._replace(conditions=_shown(conditions))

    def failed(self, why: str) -> None:
        self._failures[why] += 1

    def forget(self, key: tuple[str, str]) -> None:
        self._jobs.pop(key, None)

    def text(self) -> str:
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
            *self._of_jobs(),
        ]
        return "\n".join(lines) + "\n"

    def _of_jobs(self) -> list[str]:
        lines = [
            "# HELP cowest_job_condition Whether a condition of a job is True.",
            "# TYPE cowest_job_condition gauge",
        ]
        for (namespace, name), job in sorted(self._jobs.items()):
            for kind, reason, value in job.conditions:
                labels = f'namespace="{namespace}",job="{name}",type="{kind}",reason="{reason}"'
                lines.append(f"cowest_job_condition{{{labels}}} {value}")
        lines += [
            "# HELP cowest_job_rounds_total Rounds tuned so far.",
            "# TYPE cowest_job_rounds_total counter",
            *(f'cowest_job_rounds_total{{namespace="{n}",job="{j}"}} {s.rounds}' for (n, j), s in
              sorted(self._jobs.items()) if s.rounds is not None),
            "# HELP cowest_job_strong_calls_total Calls of the strong model that steps have paid for.",
            "# TYPE cowest_job_strong_calls_total counter",
            *(f'cowest_job_strong_calls_total{{namespace="{n}",job="{j}"}} {s.calls}' for (n, j), s in
              sorted(self._jobs.items()) if s.calls is not None),
        ]  # fmt: skip
        return lines


def _shown(conditions: Iterable[api.Condition]) -> tuple[tuple[str, str, int], ...]:
    return tuple((c.type, c.reason, int(c.status == "True")) for c in conditions)
