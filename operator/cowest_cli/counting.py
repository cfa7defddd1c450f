"""How many traces a round could learn from, counted beside the engine's loop, which must not wait for it.

Each segment is read once; the counter is the one that a job in a cluster has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from cowest_cli.beside import beside
from cowest_operator import api
from cowest_serving.contract import Redaction
from cowest_training.contract import Evaluator

AGAIN_FROM_SCRATCH = 3600.0  # seconds: retention takes segments away, and a count forgets none by itself

Clock = Callable[[], float]
_Counted = tuple[api.TraceCounts, Callable[[float], int]]  # and how many were given since a time


class Counting:
    """The last count, and the one under way."""

    def __init__(self, store: str, days: int, evaluator: Evaluator, held_out: str, clock: Clock = time.monotonic,
                 redaction: Redaction | None = None):  # fmt: skip
        self.what = (store, days, evaluator, held_out, redaction)  # what is counted, and by what
        self.counts = api.TraceCounts()
        self.counted = False  # `counts` is a count; before the first one nothing is known
        self._clock = clock
        self._flight: Future[_Counted] | None = None
        self._ended = 0.0
        self._count: Callable[[], _Counted] | None = None
        self._since: Callable[[float], int] = lambda _: 0
        self._fresh = 0.0

    def look(self, every: float, since: float = 0.0) -> api.TraceCounts:
        """At most `every` seconds old, plus the time that a count takes. Never waits.

        `since`: of the usable ones, those given after that are counted apart.
        """
        if self._flight is not None and self._flight.done():
            self._land(self._flight)
            self._flight = None
        if self._flight is None and (not self._ended or self._clock() - self._ended >= every):
            self._flight = beside(self._now, "count")
        return replace(self.counts, since_last=self._since(since) if since and self.counted else None)

    def _land(self, flight: Future[_Counted]) -> None:
        self._ended = self._clock()
        if (error := flight.exception()) is None:
            (self.counts, self._since), self.counted = flight.result(), True
        else:  # whatever it is, the next count may succeed
            self.counts = api.TraceCounts(
                self.counts.all, self.counts.usable, f"they cannot be counted: {error or type(error).__name__}"
            )

    def _now(self) -> _Counted:
        if self._count is None or self._clock() - self._fresh > AGAIN_FROM_SCRATCH:
            self._count, self._fresh = _counter(*self.what), self._clock()
        return self._count()


def _counter(
    store: str, days: int, evaluator: Evaluator, held_out: str, redaction: Redaction | None
) -> Callable[[], _Counted]:
    """Old traces go first, so that they are not counted."""
    from cowest_training.observer import TraceCounter
    from cowest_training.retention import expire

    expire(store, days)
    counter = TraceCounter(store, evaluator, held_out, redaction)

    def count() -> _Counted:
        seen = counter.count()
        return api.TraceCounts(seen.all, seen.usable, seen.reason), seen.since

    return count
