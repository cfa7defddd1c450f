"""What the last attempts at an endpoint came to, and whether it is asked at all.

    closed --5 failures in a row, over 5 s--> open --2 s, 4 s, .. 30 s--> one call tries --it answers--> closed
                                               ^-----------it fails----------|

Used by the gateway, whose users should not wait for a model that is away, and by the proxy, which only tells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from cowest_serving.models import HttpChatModel, ModelError, RateLimited, is_clients_fault

MANY_FAILURES = 5  # in a row ...
LONG_SECONDS = 5.0  # ... and over so long: calls that fail together may have met one short fault
OPEN_SECONDS, LONGEST_OPEN_SECONDS = 2.0, 30.0
METRICS = {
    "cowest_endpoint_open_circuit": "1 while a strong endpoint is not asked, but for one call now and then.",
    "cowest_endpoint_failures": "Failed attempts in a row at a strong endpoint.",
    "cowest_endpoint_places": "Calls that a strong endpoint takes at once, as learned from its 429s.",
    "cowest_endpoint_calls": "Calls under way at a strong endpoint.",
    "cowest_endpoint_waiting": "Calls that wait for a place at a strong endpoint.",
    "cowest_endpoint_keys_away": "Keys of a strong endpoint that rest (429) or are parked (401, 403).",
}


class CircuitOpen(ModelError):
    """The endpoint was not asked: it has failed for a while."""

    default_retryable = True
    max_retries = 0


class Health:
    """Failures in a row, and when an answer came last. Times are epoch seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.failures = 0
        self.since: float | None = None  # when the first of the failures ended
        self.last: float | None = None  # when the last one did
        self.answered: float | None = None
        self.error = ""  # kind of the last failure: what it says may quote content of its own client
        self.status: int | None = None  # that came with it

    @property
    def is_failing(self) -> bool:
        if self.since is None or self.last is None:
            return False
        return self.failures >= MANY_FAILURES and self.last - self.since >= LONG_SECONDS

    def succeeded(self) -> None:
        self.answered = self._clock()
        self.failures, self.since, self.last, self.error, self.status = 0, None, None, "", None

    def failed(self, error: ModelError) -> None:
        if is_clients_fault(error):  # the endpoint is well
            self.succeeded()
            return
        self.last = self._clock()
        self.since = self.last if self.since is None else self.since
        self.failures += 1
        self.error, self.status = type(error).__name__, error.status

    def word(self) -> Mapping[str, Any]:
        """For those who ask: null where nothing was seen yet."""
        return {
            "failing": self.is_failing,
            "failures": self.failures,
            "since": self.since,
            "error": self.error or None,
            "last_failure": self.last,
            "last_answer": self.answered,
        }


class Circuit:
    """Lets attempts through while the endpoint is well, and one at a time, now and then, while it is not."""

    def __init__(
        self,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
        longest_seconds: float = LONGEST_OPEN_SECONDS,
    ) -> None:
        self._health, self._clock, self._longest = health, clock, longest_seconds
        self._until, self._seconds = 0.0, 0.0  # not asked until then; length of that rest, 0 while closed
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        return self._seconds > 0

    def check(self, endpoint: str) -> None:
        """Raises `CircuitOpen` where no attempt would be let through now."""
        if self.is_open and (self._is_tried or self._clock() < self._until):
            raise self._open(endpoint)

    @contextmanager
    def attempt(self, endpoint: str, is_whole: bool = True) -> Iterator[None]:
        """Around one attempt; of a stream around its beginning, and `streamed` has its end. Raises `CircuitOpen`."""
        self.check(endpoint)
        self._is_tried = is_open = self.is_open
        try:
            yield
        except ModelError as error:
            self._failed(error)
            raise
        else:
            if is_whole:
                self._health.succeeded()
            self._seconds = 0.0
        finally:
            if is_open:
                self._is_tried = False

    def streamed(self, broke: ModelError | None) -> None:
        """A stream that had begun is over. One that its client left was well until then."""
        if broke is None:
            self._health.succeeded()
        else:
            self._failed(broke)

    def _failed(self, error: ModelError) -> None:
        self._health.failed(error)
        # A refusal of any kind is an answer, and a quick one: nobody waits for it.
        if isinstance(error, RateLimited) or not error.retryable:
            self._seconds = 0.0
        elif self._health.is_failing and self._clock() >= self._until:
            self._seconds = min(self._longest, self._seconds * 2 or OPEN_SECONDS)
            self._until = self._clock() + self._seconds

    def _open(self, endpoint: str) -> CircuitOpen:
        health = self._health
        last = health.error + (f", status {health.status}" if health.status else "")
        wait = max(1.0, math.ceil(self._until - self._clock()))
        return CircuitOpen(
            f"{endpoint} is not asked for now: its last {health.failures} attempts failed, the last with {last}.",
            retry_after=wait,
        )


class Watched(HttpChatModel):
    """A model that notes what its attempts come to."""

    def __init__(self, endpoint: str, model: str, **limits: Any) -> None:
        super().__init__(endpoint, model, **limits)
        self.health = Health()

    async def _once(self, *attempt: Any) -> Any:
        try:
            answered = await super()._once(*attempt)
        except ModelError as error:
            self.health.failed(error)
            raise
        self.health.succeeded()
        return answered


class Guarded(HttpChatModel):
    """A model that is not asked while its circuit is open: its callers then hear so at once."""

    longest_rest: ClassVar[float] = LONGEST_OPEN_SECONDS

    def __init__(self, endpoint: str, model: str, **limits: Any) -> None:
        super().__init__(endpoint, model, **limits)
        self.health = Health()
        self._circuit = Circuit(self.health, longest_seconds=self.longest_rest)

    @property
    def is_at_ease(self) -> bool:
        """It can do with a call that need not be: its last attempt was answered, and calls have places to spare."""
        return not self.health.failures and self._places.are_at_ease

    def gauges(self) -> dict[str, float]:
        """Of this endpoint, by the metric's name."""
        return {
            "cowest_endpoint_open_circuit": float(self._circuit.is_open),
            "cowest_endpoint_failures": float(self.health.failures),
            "cowest_endpoint_places": float(int(self._places.limit)),
            "cowest_endpoint_calls": float(self._places.taken),
            "cowest_endpoint_waiting": float(self._places.waiting),
            "cowest_endpoint_keys_away": float(self.keys.away),
        }

    def _check(self) -> None:
        self._circuit.check(self.endpoint)

    async def _once(self, data: bytes, key: str, read: bool, give_up_at: float, has_several: bool) -> Any:
        with self._circuit.attempt(self.endpoint, is_whole=read):
            return await super()._once(data, key, read, give_up_at, has_several)

    def _streamed(self, broke: ModelError | None) -> None:
        self._circuit.streamed(broke)
