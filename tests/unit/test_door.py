"""Which faults of the pair's own endpoint another endpoint is asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from cowest_serving.door import StrongDoor
from cowest_serving.health import Guarded
from cowest_serving.models import (
    BadAnswer,
    BadRequest,
    ChatResult,
    DeadlineExceeded,
    EndpointUnreachable,
    ModelError,
    RateLimited,
    Unauthorized,
)

ASKED = [{"role": "user", "content": "why?"}]
ANSWER = ChatResult("fine", "stop", 1, 1, "m", "", {})


class Model:
    """Raises `error`, or answers."""

    def __init__(self, error: ModelError | None = None) -> None:
        self.error, self.calls = error, 0
        self.endpoint = self.model = "m"

    async def __call__(self, *_: Any, **__: Any) -> ChatResult:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return ANSWER

    async def stream(self, *_: Any, **__: Any) -> AsyncGenerator[bytes, None]:
        await self()
        yield b"fine"


async def text_of(door: StrongDoor, is_stream: bool, told: list[ModelError]) -> str:
    if not is_stream:
        return (await door(ASKED, fell_back=told.append)).text
    return b"".join([chunk async for chunk in door.stream(ASKED, fell_back=told.append)]).decode()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(DeadlineExceeded("late"), id="a passing fault"),
        pytest.param(EndpointUnreachable("expired", retryable=False), id="a certificate that is not trusted"),
        pytest.param(BadRequest("no money", status=402), id="an account without money"),
        pytest.param(BadRequest("unknown", status=404), id="a model that is not there"),
        pytest.param(BadRequest("retired", status=410), id="one that is no more"),
        pytest.param(BadRequest("elsewhere", status=308), id="a redirect"),
        pytest.param(BadRequest("no address"), id="an address that is none"),
        pytest.param(Unauthorized("refused", status=401), id="a refused key"),
        pytest.param(RateLimited("no quota", retryable=False, status=429), id="an account without quota"),
    ],
)
async def test_a_fault_of_the_endpoint_is_mended_by_another(error: ModelError, is_stream: bool) -> None:
    own, other, told = Model(error), Model(), []
    door = StrongDoor([cast(Guarded, own), cast(Guarded, other)])
    assert await text_of(door, is_stream, told) == "fine"
    assert (own.calls, other.calls, told) == (1, 1, [error])


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        *(pytest.param(BadRequest("wrong", status=status), id=f"{status}") for status in (400, 413, 422)),
        pytest.param(BadAnswer("more than is read", retryable=False), id="an answer longer than is read"),
    ],
)
async def test_what_another_endpoint_would_say_too_is_asked_of_none(error: ModelError, is_stream: bool) -> None:
    other = Model()
    door = StrongDoor([cast(Guarded, Model(error)), cast(Guarded, other)])
    with pytest.raises(type(error)):
        await text_of(door, is_stream, [])
    assert not other.calls
