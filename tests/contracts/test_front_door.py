"""What does not come from a well-behaved client: bytes on a socket, to the gateway's process and to its protocol."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cowest_serving.front_door import MAX_HEAD, FrontDoor
from tests.contracts.openai_world import KEYS, RUN, OpenAIWorld, get_json, openai_world

BODY = b'{"messages": [{"role": "user", "content": "why?"}]}'
KEY = b"Authorization: Bearer " + KEYS[0].encode() + b"\r\n"
HOST = b"Host: gateway\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + KEY
SMUGGLED = b"GET /v1/models HTTP/1.1\r\n" + HOST + KEY + b"\r\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIWorld]:
    with openai_world(tmp_path_factory.mktemp("door")) as world:
        yield world


@pytest.fixture
def world(running: OpenAIWorld) -> OpenAIWorld:
    running.strong.forget()
    return running


def told(port: int, *pieces: bytes, seconds: float = 10) -> bytes:
    """All that comes back until the gateway closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as wire:
        for piece in pieces:
            wire.sendall(piece)
        seen = b""
        while data := received(wire):
            seen += data
        return seen


def received(wire: socket.socket) -> bytes:
    try:
        return wire.recv(65536)
    except ConnectionResetError:  # what it did not read when it closed
        return b""


def statuses(answers: bytes) -> list[int]:
    """Of each response in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def error_of(answer: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


# ---------------------------------------------------------------- one request is one request
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="a length and chunks"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n0\r\n\r\n", id="chunks and a length"),
        pytest.param(POST + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY, id="two lengths"),
        pytest.param(POST + b"Content-Length: 5, 51\r\n\r\n" + BODY, id="a list of lengths"),
        pytest.param(POST + b"Content-Length: +51\r\n\r\n" + BODY, id="a length with a sign"),
        pytest.param(POST + b"Content-Length: -1\r\n\r\n", id="a negative length"),
        pytest.param(POST + b"Content-Length: 0x33\r\n\r\n" + BODY, id="a hexadecimal length"),
        pytest.param(POST + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY, id="a length beyond 64 bits"),
        pytest.param(POST + b"Content-Length:\r\n\r\n" + BODY, id="an empty length"),
        pytest.param(POST + b"Content-Length : 51\r\n\r\n" + BODY, id="a blank before the colon"),
        pytest.param(POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="a blank before the colon of chunks"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="an unknown coding"),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="a coding after chunks"),
        pytest.param(POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", id="a folded coding"),
        pytest.param(POST + b"X-Note: one\r\n Content-Length: 5\r\n\r\n", id="a folded header"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", id="a chunk size that is no number"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", id="a negative chunk size"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", id="a chunk size with 0x"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n1ffffffffffffffff\r\n", id="a chunk beyond 64 bits"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n", id="a chunk longer than it says"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n", id="a chunk line without its CR"),
        pytest.param(POST + b"X-Note: a\x00b\r\n\r\n", id="a zero in a header"),
        pytest.param(POST + b"X-Note: a\rb\r\n\r\n", id="a bare CR in a header"),
        pytest.param(POST + b"X(Note): a\r\n\r\n", id="a header's name with brackets"),
        pytest.param(POST + b": nameless\r\n\r\n", id="a header without a name"),
        pytest.param(b"GET /v1/models HTTP/9.9\r\n\r\n", id="a version that is not"),
        pytest.param(b"GET /v1/mod\xc3\xa9ls HTTP/1.1\r\n" + HOST + b"\r\n", id="an address beyond ASCII"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"BREW /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", id="a method that is not"),
    ],
)
def test_a_request_that_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_heard(
    world: OpenAIWorld, request_bytes: bytes
) -> None:
    seen = told(world.port, request_bytes + SMUGGLED)
    assert statuses(seen) == [400]
    assert error_of(seen)["code"] == "invalid_http" and b"\r\nx-request-id: " in seen
    assert not world.strong.calls()


def test_nothing_is_heard_after_a_request_that_closes_its_connection(world: OpenAIWorld) -> None:
    seen = told(world.port, POST + LENGTH + b"Connection: close\r\n\r\n" + BODY + SMUGGLED)
    assert statuses(seen) == [200]


def test_a_body_is_as_long_as_it_says_and_what_follows_is_the_next_request(world: OpenAIWorld) -> None:
    second = POST.replace(KEY, b"") + LENGTH + b"Connection: close\r\n\r\n" + BODY
    seen = told(world.port, POST + LENGTH + b"\r\n" + BODY + second)
    assert statuses(seen) == [200, 401], "each has its own key"


def test_chunks_make_one_body(world: OpenAIWorld) -> None:
    chunks = b"".join(b"%x;note=1\r\n%s\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\nX-T: t\r\n\r\n"
    seen = told(world.port, POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert statuses(seen) == [200]
    assert world.strong.bodies()[0]["messages"][0]["content"].startswith("why?")


SEEDS = (
    POST + LENGTH + b"\r\n" + BODY,
    POST + LENGTH + b"Expect: 100-continue\r\n\r\n" + BODY,
    POST + LENGTH + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + BODY,
    POST + b"Transfer-Encoding: chunked\r\n\r\n10\r\n" + BODY[:16] + b"\r\n23\r\n" + BODY[16:] + b"\r\n0\r\n\r\n",
    b"GET http://elsewhere/v1/models HTTP/1.1\r\n" + HOST + KEY + b"\r\n",
    b"HEAD /v1/models HTTP/1.0\r\n" + KEY + b"\r\n",
    b"CONNECT elsewhere:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
)
BITS = (
    *(b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b";", b"\xff", b"%00", b"0\r\n\r\n", b"ffffffff\r\n", b"HTTP/1.1"),
    *(
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
    ),
)


def spoilt(chance: random.Random) -> bytes:
    """A request with some bytes changed, put in, left out, repeated or cut off, or with another one behind it."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, kind = chance.randrange(len(data) + 1), chance.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[at:at] = chance.choice(BITS)
        elif kind == 2:
            del data[at : at + chance.choice([1, 2, 8, 40])]
        elif kind == 3:
            data[at:at] = data[: chance.choice([1, 10, 60])]
        elif kind == 4:
            data += chance.choice(SEEDS)
        else:
            del data[max(at, 1) :]
    return bytes(data)


def test_whatever_bytes_come_nothing_breaks(world: OpenAIWorld) -> None:
    chance, seen = random.Random(1), set()
    for _ in range(int(os.environ.get("COWEST_FUZZ_EXAMPLES", "40")) * 4):
        data = spoilt(chance)
        cut = chance.randrange(len(data) + 1)
        with socket.create_connection(("127.0.0.1", world.port), timeout=10) as wire:
            wire.sendall(data[:cut])
            wire.settimeout(0.05)  # what waits for more says nothing
            with suppress(OSError):
                wire.sendall(data[cut:])
                while answer := wire.recv(65536):
                    seen |= set(statuses(answer))
    assert {200, 400} <= seen <= {100, *range(200, 500)}
    assert statuses(told(world.port, POST + LENGTH + b"Connection: close\r\n\r\n" + BODY)) == [200]
    assert "Traceback" not in world.log.read_text()


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(POST + b"X-Long: " + b"x" * MAX_HEAD + b"\r\n\r\n", id="one long header"),
        pytest.param(POST + b"".join(b"X-%d: 1\r\n" % n for n in range(101)) + b"\r\n", id="many headers"),
        pytest.param(b"GET /v1/" + b"m" * MAX_HEAD + b" HTTP/1.1\r\n" + HOST + b"\r\n", id="a long address"),
    ],
)
def test_a_head_that_is_too_large_is_refused(world: OpenAIWorld, head: bytes) -> None:
    seen = told(world.port, head)
    assert (statuses(seen), error_of(seen)["code"]) == ([431], "head_too_large")


def test_a_head_that_never_ends_is_refused_while_it_comes(world: OpenAIWorld) -> None:
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as wire:
        wire.sendall(POST + b"X-Long: ")
        sent, seen = 0, b""
        wire.setblocking(False)
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            try:
                sent += wire.send(b"x" * 1024)
                seen = wire.recv(65536)
            except BlockingIOError:
                pass
            except (ConnectionResetError, BrokenPipeError):
                break
        assert sent < 16 * 1024 * 1024 and time.monotonic() < deadline
        assert not seen or statuses(seen) == [431]


@pytest.mark.parametrize("how", ["by its length", "in chunks"])
def test_a_body_that_is_too_large_is_refused_before_it_has_come(world: OpenAIWorld, how: str) -> None:
    size = 4 * 1024 * 1024 + 1
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as wire:
        if how == "by its length":
            wire.sendall(POST + b"Content-Length: %d\r\n\r\n{" % size)
        else:
            wire.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (2 * size) + b" " * size)
        answer = b""
        while b"body_too_large" not in answer and (data := received(wire)):
            answer += data
    assert statuses(answer) == [413] and b"body_too_large" in answer


# ---------------------------------------------------------------- slowness
class Impatient(FrontDoor):
    head_seconds, request_seconds, read_seconds = 0.3, 0.8, 0.5


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reads a body, then answers with as many bytes as the address says."""
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        more = event.get("more_body", False)
    size = int(scope["path"].strip("/") or 2)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while size > 0:
        await send({"type": "http.response.body", "body": b"x" * min(size, 65536), "more_body": True})
        size -= 65536
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def impatient(keep_alive: int = 1) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    config = uvicorn.Config(echo, http=Impatient, log_config=None, timeout_keep_alive=keep_alive, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        yield listener.getsockname()[1], server
        server.should_exit = server.force_exit = True
        await serving


PLAIN = b"POST / HTTP/1.1\r\nHost: x\r\n"
WHOLE = PLAIN + b"Content-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("pieces", "answered"),
    [
        pytest.param([], [], id="nothing at all"),
        pytest.param([b"POST / HTTP/1.1\r\nHos"], [408], id="half a head"),
        pytest.param([PLAIN + b"Content-Length: 9\r\n\r\nhalf"], [408], id="half a body"),
        pytest.param([PLAIN + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"], [408], id="chunks without an end"),
        pytest.param([WHOLE], [200], id="nothing more on an idle connection"),
        pytest.param([WHOLE, b"\r\n"], [200], id="an empty line on an idle connection"),
        pytest.param([WHOLE, b"POST /"], [200, 408], id="half a head, the second time"),
    ],
)  # fmt: skip
async def test_a_connection_on_which_nothing_more_comes_is_closed(pieces: list[bytes], answered: list[int]) -> None:
    async with impatient() as (port, _):
        seen = await asyncio.to_thread(told, port, *pieces)
    assert statuses(seen) == answered
    if answered[-1:] == [408]:
        assert error_of(seen.rpartition(b"HTTP/1.1 ")[2])["code"] == "request_timeout"


@pytest.mark.parametrize("part", ["head", "body"])
async def test_a_byte_now_and_then_does_not_keep_a_connection_open(part: str) -> None:
    """Slow loris."""
    async with impatient() as (port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PLAIN + (b"" if part == "head" else b"Content-Length: 99999\r\n\r\n"))
        began, seen = time.monotonic(), b""
        while not seen and time.monotonic() - began < 10:
            writer.write(b"x")
            with_timeout = asyncio.wait_for(reader.read(65536), 0.1)
            try:
                seen = await with_timeout
            except TimeoutError:
                continue
        assert statuses(seen) == [408]
        assert time.monotonic() - began < 5
        writer.close()
        async with asyncio.timeout(5):
            while server.server_state.connections:
                await asyncio.sleep(0.02)


async def test_a_hundred_slow_clients_hold_no_one_up() -> None:
    async with impatient(keep_alive=60) as (port, _):
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for _, writer in slow:
            writer.write(b"POST / HTTP/1.1\r\nX-")
        request = PLAIN + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
        assert statuses(await asyncio.to_thread(told, port, request)) == [200]
        ended = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in slow)), 10)
        for _, writer in slow:
            writer.close()
    assert {tuple(statuses(answer)) for answer in ended} == {(408,)}


async def test_a_client_that_does_not_read_its_answer_is_left() -> None:
    async with impatient() as (port, server):
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.connect(("127.0.0.1", port))
            wire.sendall(PLAIN.replace(b"/ ", b"/90000000 ") + b"Content-Length: 2\r\n\r\n{}")
            async with asyncio.timeout(10):
                while not server.server_state.connections:
                    await asyncio.sleep(0.01)
                while server.server_state.connections:
                    await asyncio.sleep(0.02)


async def test_a_client_that_reads_slowly_gets_its_whole_answer() -> None:
    size = 3_000_000
    async with impatient() as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(PLAIN.replace(b"/ ", b"/%d " % size) + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
        seen = 0
        while data := await reader.read(200_000):
            seen += data.count(b"x")
            await asyncio.sleep(0.05)
        writer.close()
    assert size <= seen <= size + 1000


# ---------------------------------------------------------------- who asks, and what is believed
@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER "])
def test_the_scheme_of_a_key_is_written_as_one_likes(world: OpenAIWorld, scheme: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + HOST
    assert statuses(told(world.port, head + b"Authorization: " + scheme + KEYS[1].encode() + b"\r\n\r\n")) == [200]
    assert statuses(told(world.port, head + b"Authorization: " + scheme + b"alpha\r\n\r\n")) == [401]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(b"", id="empty"),
        pytest.param(KEYS[0].encode() + b" ", id="with more"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param((KEYS[0] + "," + KEYS[1]).encode(), id="two keys"),
    ],
)
def test_what_is_no_key_opens_nothing(world: OpenAIWorld, key: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + HOST
    seen = told(world.port, head + b"Authorization: Bearer " + key + b"x\r\n\r\n")
    assert statuses(seen) == [401] and error_of(seen)["code"] == "invalid_api_key"


def test_headers_of_ours_in_a_request_change_nothing_and_go_nowhere(world: OpenAIWorld) -> None:
    world.weak.forget()
    names = ("arm", "mode", "pair", "weak", "strong", "model-digest", "trace", "anything")
    forged = b"".join(b"X-CoWest-%s: forged\r\n" % name.encode() for name in names)
    forged += b"X-Request-Id: forged\r\nX-Forwarded-For: forged\r\nForwarded: forged\r\n"
    seen = told(world.port, POST + forged + LENGTH + b"Connection: close\r\n\r\n" + BODY)
    assert statuses(seen) == [200] and b"forged" not in seen
    assert b"\r\nx-cowest-mode: Pair\r\n" in seen and b"\r\nx-cowest-arm: stable\r\n" in seen
    for call in (*world.weak.calls(), *world.strong.calls()):
        assert "forged" not in json.dumps(call)


# ---------------------------------------------------------------- a burst
def test_more_connections_than_it_has_files_for_are_told_to_come_again_and_it_goes_on(tmp_path: Path) -> None:
    few_files = ("sh", "-c", 'ulimit -n 290; exec "$0" "$@"', *RUN)
    asked = POST + LENGTH + b"\r\n" + BODY
    with openai_world(tmp_path, run=few_files) as world, ExitStack() as stack:
        wires = [stack.enter_context(socket.create_connection(("127.0.0.1", world.port), 60)) for _ in range(60)]
        answers = []
        for wire in wires:
            wire.sendall(asked)
        for wire in wires:
            answers.append(wire.recv(65536))
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
        assert statuses(b"".join(answers)).count(200) == 30 and len(refused) == 30
        assert {error_of(answer)["code"] for answer in refused} == {"too_busy"}
        assert all(b"\r\nretry-after: 1\r\n" in answer and b"\r\nconnection: close\r\n" in answer for answer in refused)
        assert get_json(f"{world.url}/healthz") == {"status": "ok"}, "of whom the platform asks"
        wires[0].sendall(asked)
        assert statuses(wires[0].recv(65536)) == [200], "who was there before stays"
        for wire in wires:
            wire.close()
        deadline = time.monotonic() + 10
        while statuses(told(world.port, POST + LENGTH + b"Connection: close\r\n\r\n" + BODY)) != [200]:
            assert time.monotonic() < deadline, "there is room again"
        with urllib.request.urlopen(f"{world.url}/metrics", timeout=10) as response:
            assert re.search(rb'cowest_crowded_requests_total{limit="connections"} 3\d', response.read())


# ---------------------------------------------------------------- what the log never says
SECRET = "the merger of Nordlicht"


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_content_and_no_key_gets_into_the_log(tmp_path: Path, level: str) -> None:
    with openai_world(tmp_path, flags=("--log-level", level), strong={"timeout_seconds": 2}) as world:
        error = json.dumps({"message": SECRET, "code": SECRET, "param": SECRET})
        scripts: list[dict[str, str]] = [
            {},
            {"say": SECRET},
            *({"fail": status, "id": status, "error": error} for status in ("400", "401", "404", "429", "500")),
            {"say": f"{SECRET} and more words", "cut": "2"},
            {"seconds": "9"},
            {"refuse": SECRET},
        ]
        for stream in (False, True):
            for number, script in enumerate(scripts):
                script = {name: f"{value}-{stream}" if name == "id" else value for name, value in script.items()}
                message = {"role": "user", "content": f"{SECRET} {number}", "name": SECRET}
                send(world, {"messages": [message], "stream": stream, "metadata": script, "user": SECRET})
        send(world, {"messages": SECRET})
        send(world, {"messages": [{"role": SECRET, "content": {}}]})
        send(world, SECRET)
        send(world, {"request_id": "r", "comment": SECRET, "reference": SECRET, "user": SECRET}, "/v1/feedback")
        send(world, {"request_id": SECRET * 20, "comment": SECRET}, "/v1/feedback")
        told(world.port, POST + b"Content-Length: 5\r\nTransfer-Encoding: " + SECRET.encode() + b"\r\n\r\n")
        told(world.port, POST.replace(KEYS[0].encode(), b"wrong-key") + b"Connection: close\r\n\r\n")
        world.process.terminate()
        world.process.wait(30)
        log = world.log.read_text()
    assert "strong_failed" in log, "the log tells what failed"
    for word in (SECRET, "Nordlicht", *KEYS, "wrong-key", "strong-key"):
        assert word not in log


def send(world: OpenAIWorld, body: Any, path: str = "/v1/chat/completions") -> bytes:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = POST.replace(b"/v1/chat/completions", path.encode()) + b"Connection: close\r\n"
    return told(world.port, head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
