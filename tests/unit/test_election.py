"""When a writer that cannot renew its lease ends, and when another begins: on a clock that only waiting moves."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes.aio import client
from kubernetes.aio.leaderelection.electionconfig import Config

from cowest_operator.main import EVERY, FREE, HELD, Election, Lock

A_REQUEST = 0.5  # seconds


class Clock(selectors.SelectSelector):
    """What an event loop waits for is over at once, and has lasted."""

    now = 1000.125  # the library cannot read a whole second

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)

    def __call__(self) -> float:
        return self.now


@dataclass
class ApiServer:
    """Has the one lease."""

    lease: Any
    version: int = 0


@dataclass
class Way:
    """One replica's to the API server, which from `cut` on refuses or is silent."""

    server: ApiServer
    clock: Clock
    silent: bool = False
    cut: float = float("inf")
    renewed: float = 0.0
    told: Callable[[], object] | None = None  # as a renewal comes back

    async def _request(self) -> None:
        await asyncio.sleep(A_REQUEST)
        if self.clock() >= self.cut:
            if self.silent:
                await asyncio.Event().wait()
            raise ConnectionRefusedError("nobody listens")

    async def read_namespaced_lease(self, name: str, namespace: str) -> Any:
        await self._request()
        return copy.deepcopy(self.server.lease)

    async def replace_namespaced_lease(self, name: str, namespace: str, body: Any) -> None:
        await self._request()
        if int(body.metadata.resource_version) != self.server.version:
            raise client.ApiException(status=409)
        self.server.version += 1
        body.metadata.resource_version = str(self.server.version)
        self.server.lease, self.renewed = copy.deepcopy(body), self.clock()
        if self.told:
            self.told()


@dataclass
class Replica:
    name: str
    way: Way
    began: float = 0.0
    ended: float = 0.0

    async def run(self) -> None:
        lock = Lock("lease", "operators", self.name, client.ApiClient(client.Configuration()))
        lock.api_instance = self.way

        async def lead() -> None:
            self.began = self.way.clock()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended = self.way.clock()

        async def stopped() -> None:
            pass

        await Election(Config(lock, FREE, HELD, EVERY, lead, stopped)).run()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", clock)
        patched.setattr(time, "time", clock)
        yield clock


@pytest.fixture
def server() -> ApiServer:
    return ApiServer(client.V1Lease(metadata=client.V1ObjectMeta(name="lease", resource_version="0")))


def live(clock: Clock, life: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as loop:
        loop.run(life)


@pytest.mark.parametrize("silent", [pytest.param(False, id="that refuses"), pytest.param(True, id="that is silent")])
@pytest.mark.parametrize("after", [60.0 + EVERY * part / 4 for part in range(8)])
def test_before_an_api_server_the_writer_ends_before_the_standby_begins(
    clock: Clock, server: ApiServer, silent: bool, after: float
) -> None:
    writer = Replica("one", Way(server, clock, silent, cut=clock() + after))
    standby = Replica("two", Way(server, clock))

    async def life() -> None:
        leading = asyncio.create_task(writer.run())
        while not writer.began:
            await asyncio.sleep(EVERY)
        waiting = asyncio.create_task(standby.run())
        await leading
        await asyncio.wait((waiting,), timeout=10 * FREE)
        waiting.cancel()
        await asyncio.wait((waiting,))

    live(clock, life())
    assert writer.began < writer.way.cut <= writer.ended, "it is the one that was cut off"
    assert writer.ended - writer.way.renewed <= HELD + EVERY
    assert writer.ended < standby.began


def test_a_writer_that_is_told_to_end_as_a_renewal_comes_back_ends(clock: Clock, server: ApiServer) -> None:
    writer = Replica("one", Way(server, clock))

    async def life() -> None:
        leading = asyncio.create_task(writer.run())
        while not writer.began:
            await asyncio.sleep(EVERY)
        writer.way.told = leading.cancel
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(leading, FREE)
        assert leading.cancelled()

    live(clock, life())
