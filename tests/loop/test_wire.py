"""`Wire` against servers on loopback that say exactly what a test has them say."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cowest_serving.wire import (
    MAX_AHEAD,
    MAX_HEAD,
    Address,
    NoAddress,
    Response,
    TooMuch,
    Untrusted,
    Wire,
    WireError,
    address_of,
)
from tests.fakes import unused_port
from tests.patience import IN_TIME

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name: a\r\nx-name: b\r\n\r\nhello"
Talk = Callable[["Talker"], Awaitable[None]]


class Talker:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def heard(self) -> bytes:
        """One request as it came."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        return head + await self._reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)

    async def has_gone(self) -> bool:
        """Waits until the other end has closed."""
        try:
            return await self._reader.read(1) == b""
        except ConnectionError:
            return True

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self, *parts: bytes) -> bytes:
        request = await self.heard()
        await self.say(*parts)
        return request


@asynccontextmanager
async def server(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Its endpoint; `talk` is called for each connection, which ends with it."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(Talker(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client has left
        finally:
            writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    async with listener:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"


@asynccontextmanager
async def wire_to(talk: Talk) -> AsyncIterator[Wire]:
    async with server(talk) as endpoint:
        wire = Wire(endpoint)
        try:
            yield wire
        finally:
            await wire.aclose()


async def ask(wire: Wire, *, is_whole: bool = True, seconds: float = IN_TIME, **headers: str) -> Response:
    return await wire.ask("POST", "/chat", headers, b"question", seconds, is_whole=is_whole)


def within(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def rest_of(response: Response) -> bytes:
    data = b""
    while more := await response.some(within(IN_TIME)):
        data += more
    return data


# ---------------------------------------------------------------- requests
async def test_a_request_is_one_head_and_its_body() -> None:
    seen: list[bytes] = []

    async def talk(talker: Talker) -> None:
        seen.append(await talker.answer(ANSWER))

    async with wire_to(talk) as wire:
        response = await ask(wire, authorization="Bearer k")
    assert (response.status, response.body, response.headers["x-name"]) == (200, b"hello", "a, b")
    lines = seen[0].split(b"\r\n")
    assert lines[0] == b"POST /v1/chat HTTP/1.1"
    assert lines[1].startswith(b"host: 127.0.0.1:")
    assert {b"authorization: Bearer k", b"accept-encoding: identity", b"content-length: 8"} < set(lines)
    assert lines[-2:] == [b"", b"question"]


async def test_the_query_of_an_endpoint_stands_behind_the_path_of_each_method() -> None:
    seen: list[bytes] = []

    async def talk(talker: Talker) -> None:
        seen.append(await talker.answer(ANSWER))

    async with server(talk) as endpoint:
        wire = Wire(endpoint + "/?api-version=2024-10-21")
        await ask(wire)
        await wire.aclose()
    assert seen[0].startswith(b"POST /v1/chat?api-version=2024-10-21 HTTP/1.1\r\n")


async def test_a_header_that_would_be_two_is_not_sent() -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(ANSWER)

    async with wire_to(talk) as wire:
        with pytest.raises(ValueError, match="one line each"):
            await ask(wire, key="a\r\ntransfer-encoding: chunked")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("http://h/v1", Address(False, "h", 80, "/v1", "", None), id="plain"),
        pytest.param("https://h/d/gpt?v=1&k=é", Address(True, "h", 443, "/d/gpt", "?v=1&k=%C3%A9", None), id="a query"),
        pytest.param("https://h:8443/a b", None, id="a blank"),
        pytest.param("https://u:p%40@h/v1", Address(True, "h", 443, "/v1", "", "u:p@"), id="with credentials"),
        pytest.param("http://[::1]:9/v1", Address(False, "::1", 9, "/v1", "", None), id="an IPv6 address"),
        pytest.param(
            "http://bücher.example/v1", Address(False, "xn--bcher-kva.example", 80, "/v1", "", None), id="a name"
        ),
        pytest.param("nonsense", None, id="no scheme"),
        pytest.param("ftp://h/v1", None, id="another scheme"),
        pytest.param("http://h:99999/v1", None, id="no port"),
        pytest.param("http:///v1", None, id="no host"),
        pytest.param("http://h/v1\r\nx: y", None, id="another line"),
    ],
)
def test_an_address_is_what_its_url_says_or_none(url: str, expected: Address | None) -> None:
    if expected is None:
        with pytest.raises(NoAddress):
            address_of(url)
    else:
        assert address_of(url) == expected


def test_the_default_port_is_not_told_to_the_host_and_others_are() -> None:
    urls = ["http://h/", "https://h/", "https://h:80/", "http://[::1]:8/"]
    assert [address_of(url).authority for url in urls] == ["h", "h", "h:80", "[::1]:8"]


# ---------------------------------------------------------------- answers
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(ANSWER, id="with a length"),
        pytest.param(CHUNKED, id="in chunks"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhello", id="until the connection ends"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nhello", id="by HTTP/1.0"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ANSWER, id="after hints"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED, id="after 100"),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "as it comes"])
@pytest.mark.parametrize("by_bytes", [False, True], ids=["at once", "byte by byte"])
async def test_a_body_is_read_in_each_form(answer: bytes, is_whole: bool, by_bytes: bool) -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(*([answer[i : i + 1] for i in range(len(answer))] if by_bytes else [answer]))

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=is_whole)
        assert response.status == 200 and "link" not in response.headers
        assert (response.body if is_whole else await rest_of(response)) == b"hello"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(b"", "before it answered", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nConte", "before it answered", id="half a head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "in the middle", id="less than its length"),
        pytest.param(CHUNKED.partition(b"0\r\n")[0], "in the middle", id="chunks without their end"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", "no HTTP", id="another protocol"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
            "no HTTP",
            id="two lengths",
        ),
        pytest.param(
            b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "no HTTP", id="an upgrade"
        ),
    ],
)
async def test_an_answer_that_is_cut_or_none_is_an_error(answer: bytes, words: str) -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(answer)

    async with wire_to(talk) as wire:
        with pytest.raises(WireError, match=words):
            await ask(wire)


async def test_a_stream_that_is_cut_gives_what_has_come_first() -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(CHUNKED.partition(b"0\r\n")[0])

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=False)
        data = b""
        with pytest.raises(WireError, match="in the middle"):
            while more := await response.some(within(IN_TIME)):
                data += more
    assert data == b"hello"


async def test_a_head_without_end_is_not_read_for_ever() -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(b"HTTP/1.1 200 OK\r\n", *([b"x: " + b"y" * 1000 + b"\r\n"] * (MAX_HEAD // 1000 + 1)))
        await talker.has_gone()

    async with wire_to(talk) as wire:
        with pytest.raises(TooMuch, match="head"):
            await ask(wire)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "as it comes"])
async def test_of_a_refusal_without_end_the_beginning_is_read(is_whole: bool) -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(b"HTTP/1.1 500 Oops\r\n\r\n", *([b"x" * 1000] * 9))
        await talker.has_gone()

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=is_whole)
    assert response.status == 500 and response.body.startswith(b"xxx")


async def test_a_stream_that_nobody_takes_is_not_read_on() -> None:
    sent, stopped = 0, asyncio.Event()

    async def talk(talker: Talker) -> None:
        nonlocal sent
        talker.writer.transport.set_write_buffer_limits(0)
        await talker.answer(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(2000):
            try:
                async with asyncio.timeout(1):
                    await talker.say(b"x" * 50_000)
            except TimeoutError:
                stopped.set()
                await talker.writer.drain()
            sent += 50_000

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=False)
        await asyncio.wait_for(stopped.wait(), IN_TIME)
        assert MAX_AHEAD < sent < 50_000_000, "the kernel's buffers hold some megabytes"
        assert len(await rest_of(response)) == 100_000_000


# ---------------------------------------------------------------- time
async def never_answer(talker: Talker) -> None:
    await talker.heard()
    await talker.has_gone()


async def test_an_answer_that_does_not_come_ends_in_time() -> None:
    async with wire_to(never_answer) as wire:
        with pytest.raises(TimeoutError):
            await ask(wire, seconds=0.05)


async def test_a_stream_may_take_long_but_not_between_two_parts() -> None:
    go_on = asyncio.Event()

    async def talk(talker: Talker) -> None:
        await talker.answer(b"HTTP/1.1 200 OK\r\n\r\none")
        await go_on.wait()
        await talker.say(b"two")
        await talker.has_gone()

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=False, seconds=2)
        assert await response.some(within(IN_TIME)) == b"one"
        asyncio.get_running_loop().call_later(2.5, go_on.set)  # later than the limit for the beginning
        assert await response.some(within(IN_TIME)) == b"two"
        with pytest.raises(TimeoutError):
            await response.some(within(0.05))


# ---------------------------------------------------------------- connections
async def test_a_connection_is_used_again_and_one_that_ends_is_not() -> None:
    connections = 0

    async def talk(talker: Talker) -> None:
        nonlocal connections
        connections += 1
        await talker.answer(ANSWER)
        await talker.answer(CHUNKED)
        await talker.answer(ANSWER.replace(b"200 OK", b"200 OK\r\nConnection: close"))
        await talker.has_gone()

    async with wire_to(talk) as wire:
        for expected in (1, 1, 1, 2):
            assert (await ask(wire)).body == b"hello"
            assert connections == expected


@pytest.mark.parametrize("more", [b"", b"HTTP/1.1 408 Timeout\r\n\r\n", ANSWER], ids=["nothing", "why", "an answer"])
async def test_a_connection_that_its_server_closes_or_speaks_on_unasked_is_not_used(more: bytes) -> None:
    ended = asyncio.Event()

    async def talk(talker: Talker) -> None:
        await talker.answer(ANSWER)
        await talker.say(*([more] if more else []))
        if not more:
            talker.writer.close()
        await talker.has_gone()
        ended.set()

    async with wire_to(talk) as wire:
        await ask(wire)
        await asyncio.wait_for(ended.wait(), IN_TIME)
        assert (await ask(wire)).body == b"hello"


async def test_a_connection_that_servers_may_be_about_to_close_is_not_used() -> None:
    ports: list[object] = []

    async def talk(talker: Talker) -> None:
        ports.append(talker)
        while True:
            await talker.answer(ANSWER)

    async with wire_to(talk) as wire:
        await ask(wire)
        wire._idle[0].idle_until -= 3.5
        await ask(wire)
        assert len(ports) == 1
        wire._idle[0].idle_until -= 4.1  # and nobody has swept since
        await ask(wire)
        assert (len(ports), wire.connections) == (2, 1)


async def test_two_answers_to_one_question_are_one_and_the_connection_goes() -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(ANSWER + ANSWER.replace(b"hello", b"other"))
        assert await talker.has_gone()

    async with wire_to(talk) as wire:
        assert [(await ask(wire)).body for _ in range(3)] == [b"hello"] * 3


async def test_calls_beside_each_other_have_connections_of_their_own() -> None:
    waiting: list[Talker] = []
    all_there = asyncio.Event()

    async def talk(talker: Talker) -> None:
        name = (await talker.heard()).partition(b"name: ")[2][:1]
        waiting.append(talker)
        if len(waiting) == 3:
            all_there.set()
        await all_there.wait()
        await talker.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + name)
        await talker.has_gone()

    async with wire_to(talk) as wire:
        answers = await asyncio.gather(*(ask(wire, name=name) for name in "abc"))
    assert [answer.body for answer in answers] == [b"a", b"b", b"c"]


async def test_a_connection_that_is_expected_to_be_used_is_made_meanwhile() -> None:
    connections: list[Talker] = []
    arrived = asyncio.Event()

    async def talk(talker: Talker) -> None:
        connections.append(talker)
        arrived.set()
        await talker.answer(ANSWER)
        await talker.has_gone()

    async with wire_to(talk) as wire:
        wire.warm()
        wire.warm()
        await asyncio.wait_for(arrived.wait(), IN_TIME)
        assert (await ask(wire)).body == b"hello"
        wire.warm()
        await asyncio.sleep(0)
        assert len(connections) == 1, "one that is idle is enough"


async def test_one_that_is_made_for_a_call_waits_for_its_draft_and_one_that_is_soon_too_old_is_not_relied_on() -> None:
    connections: list[Talker] = []

    async def talk(talker: Talker) -> None:
        connections.append(talker)
        while True:
            await talker.answer(ANSWER)

    async def idle(number: int) -> None:
        async with asyncio.timeout(IN_TIME):
            while (wire.idle, len(connections)) != (number, number):
                await asyncio.sleep(0.005)

    async with wire_to(talk) as wire:
        wire.warm()
        await idle(1)
        wire._idle[0].idle_until -= 14
        await ask(wire)
        assert len(connections) == 1
        wire._idle[0].idle_until -= 2.5
        wire.warm()
        await idle(2)


async def test_trouble_with_a_connection_is_met_by_the_call_that_needs_it() -> None:
    async with unused_port() as port:
        wire = Wire(f"http://127.0.0.1:{port}/v1")
        wire.warm()
        with pytest.raises(WireError):
            await ask(wire)
        await wire.aclose()


@pytest.mark.parametrize("ends", [True, False], ids=["and ends", "and goes on"])
async def test_of_a_stream_that_has_said_all_the_connection_is_kept_if_it_ends(ends: bool) -> None:
    connections: list[Talker] = []
    said = asyncio.Event()

    async def talk(talker: Talker) -> None:
        connections.append(talker)
        await talker.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nDONE\r\n")
        await said.wait()
        await talker.say(*([b"0\r\n\r\n"] if ends else [b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 20))
        await talker.answer(ANSWER)
        await talker.has_gone()

    async with wire_to(talk) as wire:
        response = await ask(wire, is_whole=False)
        assert await response.some(within(IN_TIME)) == b"DONE"
        response.finish()
        response.close()
        said.set()
        async with asyncio.timeout(IN_TIME):
            while wire.idle != (1 if ends else 0) or (not ends and wire.connections):
                await asyncio.sleep(0.005)
        assert (await ask(wire, is_whole=False)).status == 200
    assert len(connections) == (1 if ends else 2)


@pytest.mark.parametrize("leave", ["cancelled", "closed"])
async def test_who_leaves_in_the_middle_hangs_up(leave: str) -> None:
    heard, gone = asyncio.Event(), asyncio.Event()

    async def talk(talker: Talker) -> None:
        await talker.answer(b"HTTP/1.1 200 OK\r\n\r\none" if leave == "closed" else b"")
        heard.set()
        await talker.has_gone()
        gone.set()

    async with wire_to(talk) as wire:
        asking = asyncio.create_task(ask(wire, is_whole=False))
        await asyncio.wait_for(heard.wait(), IN_TIME)
        if leave == "closed":
            (await asking).close()
        else:
            asking.cancel()
        await asyncio.wait_for(gone.wait(), IN_TIME)


async def test_closing_ends_the_calls_under_way() -> None:
    async with wire_to(never_answer) as wire:
        asking = asyncio.create_task(ask(wire))
        async with asyncio.timeout(IN_TIME):
            while not wire.connections:
                await asyncio.sleep(0)
        await wire.aclose()
        with pytest.raises(WireError):
            await asking


# ---------------------------------------------------------------- TLS and proxies
def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Of 127.0.0.1, by its own authority."""
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout key -out ca.pem"
    made += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(made.split(), check=True, capture_output=True, cwd=folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "ca.pem", folder / "key")
    return context, folder / "ca.pem"


async def answer_all(talker: Talker) -> None:
    while True:
        await talker.answer(ANSWER)


async def test_an_authority_that_is_given_is_trusted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, authority = certificate(tmp_path)
    async with server(answer_all, context) as endpoint:
        unknown = Wire(endpoint)
        with pytest.raises(Untrusted, match="certificate"):
            await ask(unknown)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        known = Wire(endpoint)
        assert [(await ask(known)).body for _ in range(2)] == [b"hello"] * 2
        await known.aclose()
        other_name = Wire(endpoint.replace("127.0.0.1", "localhost"))
        with pytest.raises(Untrusted):
            await ask(other_name)


async def test_trouble_with_tls_that_is_not_of_the_certificate_may_pass() -> None:
    async def talk(talker: Talker) -> None:
        await talker.say(b"\x15\x03\x03\x00\x02\x02\x50")  # an alert: internal error
        await talker.has_gone()

    async with server(talk) as endpoint:
        with pytest.raises(WireError, match="internal") as caught:
            await ask(Wire(endpoint.replace("http:", "https:")))
    assert not isinstance(caught.value, Untrusted)


async def through(talker: Talker, port: int, seen: list[bytes]) -> None:
    """A forward proxy that connects everybody to one port."""
    seen.append(await talker.heard())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await talker.say(b"HTTP/1.1 200 Connection established\r\nVia: us\r\n\r\n")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            sink.write(data)
        sink.close()

    await asyncio.gather(pump(talker._reader, writer), pump(reader, talker.writer))


async def test_tls_goes_through_a_proxy_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, authority = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    seen: list[bytes] = []
    async with server(answer_all, context) as endpoint:
        port = int(endpoint.removesuffix("/v1").rpartition(":")[2])
        async with server(lambda talker: through(talker, port, seen)) as proxy:
            monkeypatch.setenv("https_proxy", proxy.removesuffix("/v1").replace("//", "//me:pw@"))
            far = Wire("https://strong.test/v1")
            with pytest.raises(Untrusted, match=r"strong\.test"):  # it is the far end whose name counts
                await ask(far)
            monkeypatch.setenv("https_proxy", "")
            await far.aclose()
    assert seen[0].startswith(b"CONNECT strong.test:443 HTTP/1.1\r\nhost: strong.test:443\r\n")
    assert b"proxy-authorization: Basic bWU6cHc=\r\n" in seen[0]


async def test_a_proxy_is_asked_for_an_ipv6_address_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    async def talk(talker: Talker) -> None:
        seen.append(await talker.heard())
        await talker.say(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    async with server(talk) as proxy:
        monkeypatch.setenv("https_proxy", proxy.removesuffix("/v1"))
        with pytest.raises(WireError, match="502"):
            await ask(Wire("https://[fd00::7]:8443/v1"))
    assert seen[0].startswith(b"CONNECT [fd00::7]:8443 HTTP/1.1\r\nhost: [fd00::7]:8443\r\n")


async def test_a_proxy_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(talker: Talker) -> None:
        await talker.answer(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    async with server(talk) as proxy:
        monkeypatch.setenv("https_proxy", proxy.removesuffix("/v1"))
        with pytest.raises(WireError, match="407"):
            await ask(Wire("https://strong.test/v1"))
