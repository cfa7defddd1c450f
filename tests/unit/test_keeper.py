"""One task a job: what it remembers, and when it ends. No cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from cowest_operator import api
from cowest_operator.apply import JobGoneError
from cowest_operator.keeper import Keeper
from cowest_operator.metrics import Metrics
from cowest_operator.observe import Memory
from cowest_operator.watched import Key, Watched

KEY = ("desks", "claims")


def job(uid: str, version: str) -> dict[str, Any]:
    metadata = {"namespace": KEY[0], "name": KEY[1], "uid": uid, "resourceVersion": version}
    return {"metadata": metadata, "spec": {}}


class Noting(Keeper):
    """Notes with which memory it looks; leaves a state in it."""

    def __init__(self, gone: bool = False) -> None:
        super().__init__(Watched(), cast(Any, None), cast(Any, None), Metrics())
        self.gone, self.looks = gone, list[tuple[str, bool]]()

    async def turn(self, key: Key, memory: Memory) -> float:
        self.looks.append((memory.uid, memory.state is None))
        memory.state = api.Status(trials=7)
        if self.gone:
            raise JobGoneError("desks/claims")
        return 60.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def kept(keeper: Noting, story: Callable[[Noting], Awaitable[None]]) -> list[tuple[str, bool]]:
    async def told() -> None:
        keeper.watched.job(None, job("first", "1"))
        keeper.wake(KEY)
        await until(lambda: len(keeper.looks) == 1)
        await story(keeper)
        await keeper.close()

    asyncio.run(told())
    return keeper.looks


def test_a_job_that_is_made_again_under_its_name_knows_nothing_of_the_one_before() -> None:
    async def made_again(keeper: Noting) -> None:
        for looks, (uid, version) in ((2, ("first", "2")), (3, ("second", "3"))):  # no watch has shown a delete
            keeper.watched.job("MODIFIED", job(uid, version))
            keeper.wake(KEY)
            await until(lambda looks=looks: len(keeper.looks) == looks)  # type: ignore[misc]

    assert kept(Noting(), made_again) == [("first", True), ("first", False), ("second", True)]


def test_a_job_that_its_own_status_write_does_not_find_is_forgotten_until_it_is_made_again() -> None:
    async def gone(keeper: Noting) -> None:
        await until(lambda: KEY not in keeper.watched.families)
        keeper.wake(KEY)
        keeper.watched.job("ADDED", job("second", "9"))
        keeper.wake(KEY)
        await until(lambda: len(keeper.looks) == 2)

    assert kept(Noting(gone=True), gone) == [("first", True), ("second", True)]


def test_after_its_end_a_keeper_looks_at_nothing() -> None:
    async def closed(keeper: Noting) -> None:
        await keeper.close()
        keeper.wake(KEY)
        await asyncio.sleep(0)

    assert len(kept(Noting(), closed)) == 1
