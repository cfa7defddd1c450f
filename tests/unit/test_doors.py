"""The doors of a job's pods when nobody is behind them. Loopback, no cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cowest_operator.doors import DoorError, Doors
from tests.fakes import unused_port

Question = Callable[[Doors, str], Awaitable[Any]]
EVERY_DOOR = [
    pytest.param(lambda doors, base: doors.artifact(base, "s3://b/x"), "observer", "the observer", id="an artifact"),
    pytest.param(lambda doors, base: doors.traces(base), "observer", "the observer", id="the traces"),
    pytest.param(lambda doors, base: doors.spent(base, 1), "proxy", "the strong-model proxy", id="what was spent"),
    pytest.param(lambda doors, base: doors.readiness(base), "gateway", "the gateway", id="the gateway's readiness"),
    pytest.param(lambda doors, base: doors.served(base), "weak-model", "the weak-model server", id="what is served"),
]


@asynccontextmanager
async def asking() -> AsyncIterator[Doors]:
    doors = Doors()
    try:
        yield doors
    finally:
        await doors.close()


@pytest.mark.parametrize(("question", "part", "who"), EVERY_DOOR)
async def test_a_port_that_is_closed_is_a_door_that_is_shut(question: Question, part: str, who: str) -> None:
    async with unused_port() as port, asking() as doors:
        with pytest.raises(DoorError, match=f"^{who} does not answer") as caught:
            await question(doors, f"http://127.0.0.1:{port}")
    assert caught.value.part == part


@pytest.mark.parametrize(("question", "part", "who"), EVERY_DOOR)
async def test_a_pod_that_is_not_ready_says_why(question: Question, part: str, who: str) -> None:
    async def away(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no routing yet.", "reason": "Early"}}, status=503)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", away)
    async with TestServer(app) as server, asking() as doors:
        with pytest.raises(DoorError, match=f"^{who} answers 503: no routing yet.") as caught:
            await question(doors, f"http://127.0.0.1:{server.port}")
    assert (caught.value.part, caught.value.answered, caught.value.reason) == (part, True, "Early")
