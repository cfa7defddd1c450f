"""A second call of the strong model when the first is slow: spec.collaboration.shortcuts.hedge.

    first call --`afterMilliseconds` without an answer (a stream: without a chunk)--> second call, with a key of its own
    whichever is there first goes to the client, the other is ended; both may be paid

Always at the same endpoint: what a fallback answers is no answer of the pair. None is made while that endpoint fails,
has answered 429 lately or has no place free, nor beyond `maxPercent` of the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cowest_serving.contract import HedgeLimits

MOST_AT_ONCE = 10  # second calls that may be made in a row after calls that needed none
Result = TypeVar("Result")


class Endpoint(Protocol):
    @property
    def is_at_ease(self) -> bool:
        """Whether it can do with a call that need not be."""
        ...


class Hedging:
    """For one process: how many second calls may be made, and what became of them."""

    def __init__(self, limits: HedgeLimits) -> None:
        self._after, self._share = limits.after_milliseconds / 1000, limits.max_percent / 100
        self._credit = 0.0  # second calls that the first ones so far allow
        self.won = self.lost = self.held_back = 0

    async def first(
        self,
        model: Endpoint,
        call: Callable[[bool], Coroutine[Any, Any, Result]],
        discard: Callable[[Result], Coroutine[Any, Any, None]] | None = None,
    ) -> Result:
        """What the call that is done first gives; `call` is told whether it is the second. Where both fail, the
        first one's error. `discard`: what is to be done with a result that came too late."""
        self._credit = min(self._credit + self._share, float(MOST_AT_ONCE))
        calls = [asyncio.create_task(call(False))]
        best, given = calls[0], None
        try:
            await asyncio.wait(calls, timeout=self._after)
            if not calls[0].done() and self._may(model):
                calls.append(asyncio.create_task(call(True)))
                best = await _first_good(calls)
                self.won += best is calls[1]
                self.lost += best is calls[0]
            given = best
            return await best  # who is cancelled here ends it too
        finally:
            await _end([each for each in calls if each is not given], discard)

    async def stream(
        self, model: Endpoint, begin: Callable[[bool], AsyncGenerator[bytes, None]]
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of the call whose first one is there first."""
        begun = await self.first(model, lambda is_second: _begun(begin(is_second)), _Begun.aclose)
        async with aclosing(begun.rest):
            if begun.chunk is not None:
                yield begun.chunk
            async for chunk in begun.rest:
                yield chunk

    def gauges(self) -> Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]:
        results = {"won": self.won, "lost": self.lost, "held_back": self.held_back}
        return {"cowest_hedged_calls": {(("result", name),): float(count) for name, count in results.items()}}

    def _may(self, model: Endpoint) -> bool:
        if self._credit < 1 or not model.is_at_ease:
            self.held_back += 1
            return False
        self._credit -= 1
        return True


@dataclass(frozen=True)
class _Begun:
    """A stream whose first chunk is there, or that was over without one."""

    chunk: bytes | None
    rest: AsyncGenerator[bytes, None]

    async def aclose(self) -> None:
        await self.rest.aclose()


async def _begun(chunks: AsyncGenerator[bytes, None]) -> _Begun:
    try:
        return _Begun(await anext(chunks, None), chunks)
    except BaseException:
        await chunks.aclose()
        raise


async def _first_good(calls: Sequence[asyncio.Task[Result]]) -> asyncio.Task[Result]:
    """The first that gives a result; the first of all when none does."""
    waiting = set(calls)
    while waiting:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if good := next((each for each in calls if _is_good(each)), None):
            return good
    return calls[0]


def _is_good(call: asyncio.Task[Any]) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


async def _end(
    calls: Sequence[asyncio.Task[Result]], discard: Callable[[Result], Coroutine[Any, Any, None]] | None
) -> None:
    for each in calls:
        each.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for each in calls:
        if discard is not None and _is_good(each):
            await discard(each.result())
