"""A second call beside a slow first one: when it is made, which one counts, and what becomes of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from cowest_serving.contract import HedgeLimits
from cowest_serving.hedging import MOST_AT_ONCE, Hedging
from tests.patience import IN_TIME

SLOW = 60_000


@dataclass
class Endpoint:
    is_at_ease: bool = True


@dataclass
class Calls:
    """The first and the second call; each waits until it is let go, and gives its name or fails."""

    go: tuple[asyncio.Event, asyncio.Event] = field(default_factory=lambda: (asyncio.Event(), asyncio.Event()))
    fails: tuple[bool, bool] = (False, False)
    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    is_second: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, is_second: bool) -> str:
        name = ("first", "second")[is_second]
        self.begun.append(name)
        if is_second:
            self.is_second.set()
        try:
            await self.go[is_second].wait()
        except asyncio.CancelledError:
            self.ended.append(name)
            raise
        if self.fails[is_second]:
            raise ValueError(f"the {name} call failed")
        return name

    async def stream(self, is_second: bool) -> AsyncGenerator[bytes, None]:
        name = await self(is_second)
        try:
            for i in range(3):
                yield f"{name} {i}".encode()
        finally:
            self.ended.append(f"stream of the {name}")


def hedging(after: int = 1, percent: int = 100) -> Hedging:
    return Hedging(HedgeLimits(after, percent))


async def test_a_quick_answer_needs_no_second_call() -> None:
    calls, hedge = Calls(), hedging(SLOW)
    calls.go[0].set()
    assert await hedge.first(Endpoint(), calls) == "first"
    assert calls.begun == ["first"]


@pytest.mark.parametrize("winner", [0, 1])
async def test_the_call_that_is_done_first_counts_and_the_other_is_ended(winner: int) -> None:
    calls, hedge = Calls(), hedging()
    asking = asyncio.create_task(hedge.first(Endpoint(), calls))
    await calls.is_second.wait()
    calls.go[winner].set()
    assert await asking == ("first", "second")[winner]
    assert calls.ended == [("second", "first")[winner]]
    assert (hedge.won, hedge.lost) == (winner, 1 - winner)


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_call_that_fails_leaves_the_other_one_to_answer(failing: int) -> None:
    calls, hedge = Calls(fails=(failing == 0, failing == 1)), hedging()
    asking = asyncio.create_task(hedge.first(Endpoint(), calls))
    await calls.is_second.wait()
    calls.go[failing].set()
    await asyncio.sleep(0)
    assert not asking.done()
    calls.go[1 - failing].set()
    assert await asking == ("second", "first")[failing]


async def test_where_both_fail_the_first_ones_error_is_told() -> None:
    calls, hedge = Calls(fails=(True, True)), hedging()
    asking = asyncio.create_task(hedge.first(Endpoint(), calls))
    await calls.is_second.wait()
    calls.go[1].set()
    calls.go[0].set()
    with pytest.raises(ValueError, match="the first call failed"):
        await asking


async def test_a_first_call_that_fails_in_time_is_not_made_again() -> None:
    calls, hedge = Calls(fails=(True, False)), hedging(SLOW)
    calls.go[0].set()
    with pytest.raises(ValueError, match="first"):
        await hedge.first(Endpoint(), calls)
    assert calls.begun == ["first"]


async def test_none_is_made_at_an_endpoint_that_is_not_at_ease() -> None:
    calls, hedge = Calls(), hedging()
    asking = asyncio.create_task(hedge.first(Endpoint(is_at_ease=False), calls))
    async with asyncio.timeout(IN_TIME):
        while not hedge.held_back:
            await asyncio.sleep(0.001)
    calls.go[0].set()
    assert await asking == "first" and calls.begun == ["first"]


async def test_second_calls_stay_within_their_share_however_slow_the_endpoint_is() -> None:
    hedge, seconds = hedging(percent=5), 0

    async def call(is_second: bool) -> str:
        nonlocal seconds
        if is_second:
            seconds += 1
            return "second"
        while hedge.held_back + seconds <= number:  # slow: until it was decided whether there is a second
            await asyncio.sleep(0.001)
        return "first"

    for number in range(60):
        await hedge.first(Endpoint(), call)
        assert seconds <= 0.05 * (number + 1)
    assert (seconds, hedge.held_back) == (3, 57)


async def test_calls_that_needed_no_second_save_up_for_a_few_only() -> None:
    hedge, held_up = hedging(percent=5), asyncio.Event()

    async def quick(_: bool) -> str:
        return "first"

    async def slow(is_second: bool) -> str:
        if not is_second:
            await held_up.wait()
        return "first"

    for _ in range(1000):
        await hedge.first(Endpoint(), quick)
    asking = [asyncio.create_task(hedge.first(Endpoint(), slow)) for _ in range(MOST_AT_ONCE + 5)]
    async with asyncio.timeout(IN_TIME):
        while hedge.held_back + hedge.won < len(asking):
            await asyncio.sleep(0.001)
    held_up.set()
    await asyncio.gather(*asking)
    assert (hedge.won, hedge.held_back) == (MOST_AT_ONCE, 5)


async def test_both_calls_end_with_a_client_that_leaves() -> None:
    calls, hedge = Calls(), hedging()
    asking = asyncio.create_task(hedge.first(Endpoint(), calls))
    await calls.is_second.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert sorted(calls.ended) == ["first", "second"]


@pytest.mark.parametrize("winner", [0, 1])
async def test_a_stream_is_that_of_the_call_whose_chunk_comes_first(winner: int) -> None:
    calls, hedge = Calls(), hedging()
    name = ("first", "second")[winner]

    async def chunks() -> list[bytes]:
        return [chunk async for chunk in hedge.stream(Endpoint(), calls.stream)]

    reading = asyncio.create_task(chunks())
    await calls.is_second.wait()
    calls.go[winner].set()
    assert await reading == [f"{name} {i}".encode() for i in range(3)]
    assert calls.ended == [("second", "first")[winner], f"stream of the {name}"]


async def test_a_stream_that_comes_too_late_is_closed_too() -> None:
    calls, hedge = Calls(), hedging()
    reading = asyncio.create_task(anext(stream := hedge.stream(Endpoint(), calls.stream)))
    await calls.is_second.wait()
    for event in calls.go:  # both have their first chunk at once
        event.set()
    assert await reading == b"first 0"
    assert calls.ended == ["stream of the second"]
    await stream.aclose()
    assert calls.ended == ["stream of the second", "stream of the first"]


async def test_an_empty_stream_is_an_empty_stream() -> None:
    async def nothing(_: bool) -> AsyncGenerator[bytes, None]:
        return
        yield b""

    async with aclosing(hedging(SLOW).stream(Endpoint(), nothing)) as chunks:
        assert [chunk async for chunk in chunks] == []
