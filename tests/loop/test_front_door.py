"""`FrontDoor` under uvicorn: what is HTTP/1.1. What is none, and what is slow: tests/contracts/test_front_door.py."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from cowest_serving.front_door import CROWDED, MAX_HEAD, WHEN_GONE, FrontDoor
from tests.patience import IN_TIME

App = Callable[[Any, Any, Any], Awaitable[None]]
POST = b"POST /a%20b?q=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Method, path and body."""
    body, more = b"", True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        body, more = body + event["body"], event["more_body"]
    said = f"{scope['method']} {scope['path']} ".encode() + body
    headers = [(b"content-length", b"%d" % len(said))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": said})


async def stream(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def refuse_unread(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: uvicorn.Server) -> None:
        self.reader, self.writer, self.server = reader, writer, server

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self) -> tuple[bytes, bytes]:
        """Status line and headers, and the body by its length."""
        async with asyncio.timeout(IN_TIME):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
            return head, await self.reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)

    async def rest(self) -> bytes:
        """Until the server closes."""
        async with asyncio.timeout(IN_TIME):
            return await self.reader.read()


@asynccontextmanager
async def served(app: App, protocol: type[FrontDoor] = FrontDoor, **options: Any) -> AsyncIterator[Client]:
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, server_header=False, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))  # without its signal handlers
        while not server.started:
            await asyncio.sleep(0.005)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            yield Client(reader, writer, server)
        finally:
            writer.close()
            server.should_exit = True
            await serving


async def test_requests_on_one_connection_are_answered_in_turn() -> None:
    async with served(echo) as client:
        for _ in range(3):
            await client.say(POST)
            head, body = await client.answer()
            assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"connection: close" not in head
            assert body == b"POST /a b hello"


async def test_requests_that_are_sent_ahead_are_answered_in_their_order() -> None:
    chunked = b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    async with served(echo) as client:
        await client.say(POST + chunked + b"GET /g HTTP/1.1\r\n\r\n" + POST[:-2])
        bodies = [(await client.answer())[1] for _ in range(3)]
        await client.say(POST[-2:])
        bodies.append((await client.answer())[1])
    assert bodies == [b"POST /a b hello", b"POST /c abc", b"GET /g ", b"POST /a b hello"]


async def test_a_request_may_come_byte_by_byte() -> None:
    async with served(echo) as client:
        await client.say(*(POST[i : i + 1] for i in range(len(POST))))
        assert (await client.answer())[1] == b"POST /a b hello"


async def test_however_many_requests_are_sent_ahead_each_is_answered() -> None:
    """They may come in one read that ends in the middle of a head, which is not as large as they are together."""
    large = b"GET /g HTTP/1.1\r\nX-Large: " + b"x" * 2200 + b"\r\n\r\n"
    async with served(echo) as client:
        await client.say(large * 31 + POST[:20])
        bodies = [(await client.answer())[1] for _ in range(31)]
        await client.say(POST[20:])
        bodies.append((await client.answer())[1])
    assert bodies == [b"GET /g "] * 31 + [b"POST /a b hello"]


async def test_a_head_behind_another_request_has_its_limit_too() -> None:
    async with served(echo) as client:
        await client.say(POST + b"GET / HTTP/1.1\r\nX-Large: ")
        await client.answer()
        await client.say(b"x" * (MAX_HEAD + 1))
        assert (await client.rest()).startswith(b"HTTP/1.1 431")


CHUNKED = b"POST / HTTP/1.1\r\nX-Session-Id: ann\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"


async def test_a_trailer_is_no_header() -> None:
    """It could name another user, or hand in a key, behind whoever looked at the headers."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        seen.append(scope["headers"])

    async with served(note) as client:
        for _ in range(2):
            await client.say(CHUNKED + b"0\r\nX-Session-Id: bob\r\nAuthorization: Bearer key\r\n\r\n")
            assert (await client.answer())[1] == b"POST / ab"
    assert seen == [[(b"x-session-id", b"ann"), (b"transfer-encoding", b"chunked")]] * 2


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"0\r\n" + b"X: y\r\n" * (MAX_HEAD // 6 + 1), id="many trailers"),
        pytest.param(b"0\r\nX-Long: " + b"x" * MAX_HEAD, id="one trailer without an end"),
        pytest.param(b"1;" + b"x" * MAX_HEAD, id="a chunk's extension without an end"),
    ],
)
async def test_what_comes_beside_a_body_has_the_limit_of_a_head(rest: bytes) -> None:
    has_begun = asyncio.Event()

    async def begun(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        has_begun.set()
        await echo(scope, receive, send)

    async with served(begun) as client:
        await client.say(CHUNKED)
        await has_begun.wait()
        await client.say(rest)
        said = await client.rest()
    assert said.startswith(b"HTTP/1.1 431") and b"head_too_large" in said


async def test_an_answer_without_a_length_goes_out_in_chunks() -> None:
    async with served(stream) as client:
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        head, _ = await client.answer()
        async with asyncio.timeout(IN_TIME):
            assert await client.reader.readuntil(b"0\r\n\r\n") == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        assert b"transfer-encoding: chunked\r\n" in head
        await client.say(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"], ids=["once", "to be kept"])
async def test_http_1_0_is_answered_in_its_own_way(more: bytes) -> None:
    async with served(echo) as client:
        await client.say(b"GET /old HTTP/1.0\r\n" + more + b"\r\n")
        head, body = await client.answer()
        assert body == b"GET /old "
        assert (b"connection: keep-alive" if more else b"connection: close") in head
        if more:
            await client.say(b"GET /again HTTP/1.0\r\n\r\n")
            assert (await client.answer())[1] == b"GET /again "
        assert await client.rest() == b""


@pytest.mark.parametrize("wish", [b"100-continue", b"100-Continue"])
async def test_who_expects_100_is_told_to_go_on(wish: bytes) -> None:
    async with served(echo) as client:
        await client.say(b"POST /e HTTP/1.1\r\nExpect: " + wish + b"\r\nContent-Length: 2\r\n\r\n")
        assert (await client.answer())[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.say(b"ok")
        assert (await client.answer())[1] == b"POST /e ok"


async def test_an_offer_of_http_2_is_not_taken_up_and_the_connection_goes_on() -> None:
    offer = b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    async with served(echo) as client:
        for _ in range(2):
            await client.say(POST.replace(b"Host: x\r\n", offer))
            assert (await client.answer())[1] == b"POST /a b hello"
        await client.say(b"GET /g HTTP/1.1\r\n" + offer + b"\r\n" + POST)
        assert [(await client.answer())[1] for _ in range(2)] == [b"GET /g ", b"POST /a b hello"]


# ---------------------------------------------------------------- what is refused
async def test_it_is_no_proxy() -> None:
    async with served(echo) as client:
        await client.say(b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n")
        said = await client.rest()
    assert said.startswith(b"HTTP/1.1 400") and b"connection: close" in said


async def test_what_was_asked_before_nonsense_is_answered() -> None:
    async with served(echo) as client:
        await client.say(POST + b"nonsense\r\n\r\n")
        said = await client.rest()
    assert said.endswith(b"POST /a b hello") and said.count(b"HTTP/1.1") == 1


class Hasty(FrontDoor):
    head_seconds = request_seconds = read_seconds = 0.1


async def test_all_that_was_asked_before_nonsense_is_answered_and_not_what_it_is_in() -> None:
    async with served(echo) as client:
        await client.say(POST * 3 + CHUNKED + b"nonsense\r\n")
        said = await client.rest()
    assert said.count(b"POST /a b hello") == said.count(b"HTTP/1.1 200") == said.count(b"HTTP/1.1") == 3
    assert said.count(b"connection: close") == 1


@pytest.mark.parametrize("begun", [POST[:20], POST[:-2]], ids=["head", "body"])
async def test_a_client_that_is_slow_with_its_request_is_told(begun: bytes) -> None:
    async with served(echo, Hasty) as client:
        await client.say(begun)
        assert (await client.rest()).startswith(b"HTTP/1.1 408")


async def test_a_client_that_has_its_answer_and_is_slow_with_the_rest_is_left_without_a_second_one() -> None:
    async with served(refuse_unread, Hasty) as client:
        await client.say(POST[:-2])
        said = await client.rest()
    assert said.startswith(b"HTTP/1.1 413") and said.count(b"HTTP/1.1") == 1


async def test_a_slow_application_is_not_taken_for_a_slow_client() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)  # three times what a client may take
        await echo(scope, receive, send)

    async with served(slow, Hasty) as client:
        await client.say(POST)
        assert (await client.answer())[1] == b"POST /a b hello"


async def test_a_connection_on_which_nothing_is_asked_is_closed_after_a_while() -> None:
    async with served(echo, timeout_keep_alive=1) as client:
        await client.say(POST)
        await client.answer()
        assert await client.rest() == b""


async def test_a_client_that_does_not_read_is_left() -> None:
    ended = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        left = asyncio.Event()
        scope["extensions"][WHEN_GONE](left.set)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not left.is_set():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        ended.set()

    async with served(endless, Hasty) as client:
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.wait_for(ended.wait(), IN_TIME)


# ---------------------------------------------------------------- the application
async def test_the_application_hears_that_its_client_has_gone() -> None:
    heard: list[str] = []
    waiting, done = asyncio.Event(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"][WHEN_GONE](lambda: heard.append("called"))
        await receive()
        waiting.set()
        heard.append((await receive())["type"])
        done.set()

    async with served(wait) as client:
        await client.say(POST)
        await waiting.wait()
        client.writer.close()
        await asyncio.wait_for(done.wait(), IN_TIME)
    assert heard == ["called", "http.disconnect"]


async def test_an_application_that_fails_before_its_answer_gives_500_and_in_the_middle_cuts_it() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/later":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise RuntimeError("oops")

    async with served(fail) as client:
        await client.say(POST)
        assert (await client.answer())[0].startswith(b"HTTP/1.1 500")
        await client.say(b"GET /later HTTP/1.1\r\n\r\n")
        said = await client.rest()
    assert said.endswith(b"3\r\none\r\n"), "without the chunk that ends an answer"


async def test_a_body_that_is_refused_unread_does_not_spoil_the_next_request() -> None:
    async with served(refuse_unread) as client:
        for _ in range(2):
            await client.say(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n", *[b"x" * 100_000] * 10)
            assert (await client.answer())[0].startswith(b"HTTP/1.1 413")


async def test_told_to_stop_it_lets_an_answer_finish_and_closes() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await go_on.wait()
        await echo(scope, receive, send)

    async with served(wait) as client:
        await client.say(POST)
        await begun.wait()
        client.server.should_exit = True
        async with asyncio.timeout(IN_TIME):
            while not all(each._answered and not each._answered.may_stay for each in connections(client)):
                await asyncio.sleep(0.01)
        go_on.set()
        said = await client.rest()
    assert said.endswith(b"POST /a b hello") and b"connection: close" in said


def connections(client: Client) -> list[Any]:
    return list(client.server.server_state.connections)


# ---------------------------------------------------------------- more connections than may be
async def crowded(scope: Any, receive: Any, send: Any) -> None:
    said = b"crowded" if CROWDED in scope["extensions"] else b"room"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


class Narrow(FrontDoor):
    surplus, surplus_seconds = 1, 0.2


@asynccontextmanager
async def another(client: Client) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(*client.writer.get_extra_info("peername"))
    try:
        yield Client(reader, writer, client.server)
    finally:
        writer.close()


async def test_a_connection_above_the_limit_is_told_so_to_the_application_and_closed_behind_its_answer() -> None:
    async with served(crowded, limit_concurrency=1) as first, another(first) as second:
        await second.say(POST)
        head, body = await second.answer()
        assert body == b"crowded" and b"\r\nconnection: close\r\n" in head and await second.rest() == b""
        await first.say(POST)
        assert (await first.answer())[1] == b"room", "who was there before stays"
        async with another(first) as third:
            first.writer.close()
            while len(first.server.server_state.connections) > 1:
                await asyncio.sleep(0.005)
            await third.say(POST)
            assert (await third.answer())[1] == b"room", "as others have left"


async def test_a_connection_above_the_limit_that_asks_nothing_is_soon_closed_and_one_far_above_it_at_once() -> None:
    async with served(crowded, Narrow, limit_concurrency=1) as first, another(first) as second:
        async with another(first) as third:
            assert await third.rest() == b"" and len(first.server.server_state.connections) == 2
        assert await second.rest() == b""
        await first.say(POST)
        assert (await first.answer())[1] == b"room"
