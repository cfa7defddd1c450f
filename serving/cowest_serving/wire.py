"""HTTP/1.1 to one endpoint over kept connections: what a call of a model needs of a client, and nothing else.

`models` asks through it. A call is one write, an answer is read as its bytes arrive; a connection serves one call at a
time and is kept for the next. Redirects are not followed, nothing is tried again here, and no compression is asked for.
See docs/decisions/0009-gateway-hot-path.md.

    WireError      no connection, it broke, or what came is no HTTP
      NoAddress    the endpoint is no http:// or https:// URL
      Untrusted    its TLS certificate is not that of a known authority, or of another host
      TooMuch      more than MAX_HEAD or MAX_BODY
    TimeoutError   not within the seconds that the caller gave
      Unconnected  of these there was not even a connection
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import aiohappyeyeballs
import httptools

from cowest_serving.outward import proxy_of

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024  # of an answer that is read whole
MAX_REFUSAL = 8 * 1024  # of the body that comes with another status than 2xx; the rest is not read
MAX_AHEAD = 256 * 1024  # bytes of a stream that nobody has taken yet: then its connection is not read from
END_SECONDS = 1.0  # for the end of an answer of which all that is wanted has come
IDLE_SECONDS = 4.0  # after an answer: uvicorn, and so vLLM, and Node close after 5; none is sent into as it closes
UNASKED_SECONDS = 15.0  # before the first question, for which servers wait longer: a draft may take so long
CONNECT_SECONDS = 10.0
NEXT_ADDRESS_SECONDS = 0.25  # where a host has several: the next one is tried beside one that is silent
_OWN_HEADERS = b"accept: */*\r\naccept-encoding: identity\r\nuser-agent: cowest\r\n"


class WireError(Exception):
    is_sent = False  # the request was, and may have been heard


class Unconnected(TimeoutError):
    pass


class NoAddress(WireError):
    pass


class Untrusted(WireError):
    pass


class TooMuch(WireError):
    pass


# ---------------------------------------------------------------- where to
@dataclass(frozen=True)
class Address:
    """What of a URL says whom to connect to, and what to ask for there."""

    is_tls: bool
    host: str
    port: int
    path: str  # of the endpoint; that of a method is appended
    query: str  # with its question mark, "" without one; behind every path
    credentials: str | None  # user:password

    @property
    def authority(self) -> str:
        return self._host if self.port == (443 if self.is_tls else 80) else self.target

    @property
    def target(self) -> str:
        """What a forward proxy is asked to connect to: always with the port."""
        return f"{self._host}:{self.port}"

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def address_of(url: str) -> Address:
    """Raises `NoAddress`."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):  # no port, no host name, another scheme
        raise NoAddress(url) from None
    if not host or any(character <= " " for character in url):
        raise NoAddress(url)
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~")
    query = "?" + urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~") if parts.query else ""
    credentials = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}") if parts.username else None
    return Address(parts.scheme == "https", host, port, path, query, credentials)


@cache
def _trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    """The system's authorities, or those that SSL_CERT_FILE and SSL_CERT_DIR name; given to tell contexts apart."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


# ---------------------------------------------------------------- an answer
class Response:
    """An answer. `body` is there where it was asked for whole, and with a status other than 2xx; else take `some`."""

    __slots__ = (
        *("_chunks", "_connection", "_error", "_is_complete", "_is_whole", "_size", "_waiter"),
        *("headers", "is_finished", "status"),
    )

    def __init__(self, connection: _Connection, is_whole: bool) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case
        self._connection: _Connection | None = connection  # while it has more to say
        self._is_whole, self._is_complete = is_whole, False
        self.is_finished = False  # what still comes is for nobody
        self._chunks: list[bytes] = []
        self._size = 0  # of the chunks
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def body(self) -> bytes:
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    async def some(self, until: float) -> bytes:
        """What has come since the last time, at least a byte; nothing at the end. `until`: by the loop's clock."""
        if not self._chunks and not self._is_complete and self._error is None and self._connection is not None:
            await self._connection.wait(self, until)
        if self._chunks:
            data, self._size = self.body, 0
            self._chunks.clear()
            if self._connection is not None:
                self._connection.go_on()
            return data
        if self._error is not None:
            raise self._error
        return b""

    def finish(self) -> None:
        """All that is wanted has come: its connection is kept if the answer ends soon and shortly."""
        if self._connection is not None:
            self.is_finished, self._size = True, 0
            self._connection.let_end()

    def close(self) -> None:
        """Nothing more is wanted of it. Its connection is kept only where it was complete."""
        if self._connection is not None and not self.is_finished:
            self._connection.abort()


# ---------------------------------------------------------------- a connection
class _Connection(asyncio.Protocol):
    """Kept in its wire's pool between calls."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._loop = wire, asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None  # of the call under way
        self._is_begun = self._may_stay = self._is_paused = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._until = 0.0  # when it fires, and when the call under way has waited too long
        self.is_unasked = True
        self.idle_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # ------------------------------------------------------------ a call
    def ask(self, data: bytes, is_whole: bool) -> Response:
        if self._transport is None:
            raise WireError("it closed the connection before it was asked")
        self._is_begun = self._may_stay = self.is_unasked = False
        self._head_bytes = 0
        response = self._response = Response(self, is_whole)
        self._transport.write(data)
        return response

    async def wait(self, response: Response, until: float) -> None:
        """For more of it. Raises its error; on any error the connection is no more."""
        response._waiter = self._loop.create_future()
        self._wake_at(until)
        try:
            await response._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            response._waiter = None

    def let_end(self) -> None:
        self._wake_at(self._loop.time() + END_SECONDS)
        self.go_on()

    def go_on(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response._connection = None
        if self._transport is not None:
            self._transport.abort()

    def _wake_at(self, until: float) -> None:
        """One timer serves many calls: it looks what holds when it fires, and is not set anew for each."""
        self._until = until
        if self._timer is not None and self._timer_at <= until:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(until, self._look), until

    def _look(self) -> None:
        self._timer = None
        response = self._response
        waiter = response._waiter if response is not None else None
        if response is None or not (response.is_finished or (waiter is not None and not waiter.done())):
            return
        if self._loop.time() < self._until:
            self._wake_at(self._until)
        elif waiter is None:
            self.abort()
        else:
            waiter.set_exception(TimeoutError())

    # ------------------------------------------------------------ what the transport says
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._response is None:  # nobody has asked: a server that says why it hangs up
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._response is not None:
                self._fail(WireError(f"what came is no HTTP: {error}"))
            self.abort()
            return
        if self._response is None:
            return
        if self._response._is_complete:
            self._release()
        elif not self._is_begun:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._fail(TooMuch(f"the head of its answer is longer than {MAX_HEAD} bytes"))

    def connection_lost(self, error: Exception | None) -> None:
        self._wire.forget(self)
        response, self._response, self._transport = self._response, None, None
        if self._timer is not None:
            self._timer.cancel()
        if response is None:
            return
        response._connection = None
        framed = "content-length" in response.headers or "chunked" in response.headers.get("transfer-encoding", "")
        if self._is_begun and not framed and error is None:  # such a body ends with its connection
            response._is_complete = True
        else:
            when = "in the middle of its answer" if self._is_begun else "before it answered"
            response._error = _sent(WireError(f"it closed the connection {when}" + (f": {error}" if error else "")))
        self._wake(response)

    def _release(self) -> None:
        """The answer is complete; who asked may not have taken all of it yet."""
        response, self._response = self._response, None
        assert response is not None
        response._connection = None
        self.go_on()
        if self._may_stay and self.is_open:
            self._wire.keep(self)
        else:
            self.abort()
        self._wake(response)

    def _fail(self, error: WireError) -> None:
        response = self._response
        assert response is not None
        response._error = _sent(error)
        self.abort()
        self._wake(response)

    def _wake(self, response: Response) -> None:
        waiter = response._waiter
        if waiter is None or waiter.done():
            return
        if response._error is not None and (response._is_whole or not response._chunks):
            waiter.set_exception(response._error)
        else:
            waiter.set_result(None)

    # ------------------------------------------------------------ what the parser says
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is not None:
            headers, key, text = self._response.headers, name.decode("latin-1").lower(), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text

    def on_headers_complete(self) -> None:
        response = self._response
        if response is None:
            return
        response.status = self._parser.get_status_code()
        if response.status >= 200:
            self._is_begun = True
            response._is_whole = response._is_whole or response.status >= 300
            if not response._is_whole:
                self._wake(response)

    def on_body(self, data: bytes) -> None:
        response = self._response
        if response is None or response._is_complete:
            return
        response._size += len(data)
        if response.is_finished:
            if response._size > MAX_REFUSAL:
                self.abort()
            return
        response._chunks.append(data)
        if not response._is_whole:
            if response._size > MAX_AHEAD and not self._is_paused and self._transport is not None:
                self._is_paused = True
                self._transport.pause_reading()
            self._wake(response)
        elif response.status >= 300 and response._size > MAX_REFUSAL:
            response._is_complete = True  # and the connection is not kept, since the rest may come for long
        elif response._size > MAX_BODY:
            self._fail(TooMuch(f"its answer is longer than {MAX_BODY} bytes"))

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or response._is_complete:  # a second answer to one question: nobody goes by it
            self._may_stay = False
        elif response.status < 200:  # 100, 103: the answer is still to come
            response.headers.clear()
        else:
            response._is_complete = True
            self._may_stay = self._parser.should_keep_alive()

    def on_message_begin(self) -> None:
        if self._response is not None and self._response._is_complete:
            self._may_stay = False


# ---------------------------------------------------------------- the connections to an endpoint
class Wire:
    """For one event loop. Its callers limit how many calls are under way, and so how many connections there are."""

    def __init__(self, endpoint: str) -> None:
        """Raises `NoAddress`. The environment names the proxies, if it wants any."""
        self._address = address_of(endpoint)
        proxy = proxy_of(endpoint)
        self._proxy = address_of(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        self._is_tunnel = self._proxy is not None and self._address.is_tls
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []  # the last one used is the next one asked
        self._sweeper: asyncio.TimerHandle | None = None
        self._warming: asyncio.Task[None] | None = None
        self._heads: dict[tuple[str, str], bytes] = {}
        self._credentials = _authorization("authorization", self._address)

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, seconds: float, *, is_whole: bool = True
    ) -> Response:
        """The answer, or its beginning where it is not wanted whole. `seconds` limit the wait for that, connecting
        included. Raises `WireError` and `TimeoutError`."""
        given = _lines(headers) if "authorization" in headers else _lines(headers) + self._credentials
        data = b"".join((self._head(method, path), given, b"content-length: %d\r\n\r\n" % len(body), body))
        until = asyncio.get_running_loop().time() + seconds
        connection = self._kept() or await self._connected(seconds)
        response = connection.ask(data, is_whole)
        await connection.wait(response, until)
        return response

    def warm(self) -> None:
        """See to it that a connection is there for a call that comes soon. Trouble is for that call to meet."""
        loop = asyncio.get_running_loop()
        lasts = bool(self._idle) and self._idle[-1].idle_until > loop.time() + IDLE_SECONDS / 2
        if not lasts and self._warming is None:
            self._warming = loop.create_task(self._warm())

    async def aclose(self) -> None:
        """Calls under way fail."""
        if self._warming is not None:
            self._warming.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in tuple(self._open):
            if connection._response is not None:
                connection._fail(WireError("the connection was closed by its own side"))
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def connections(self) -> int:
        return len(self._open)

    # ------------------------------------------------------------ requests
    def _head(self, method: str, path: str) -> bytes:
        """Of all requests for a path the same, but for what `ask` adds."""
        if (method, path) not in self._heads:
            self._heads[method, path] = self._built_head(method, path)
        return self._heads[method, path]

    def _built_head(self, method: str, path: str) -> bytes:
        at, lines = self._address, b""
        target = at.path.rstrip("/") + path + at.query
        if self._proxy is not None and not self._is_tunnel:
            target = f"http://{at.authority}{target}"
            lines += _authorization("proxy-authorization", self._proxy)
        return f"{method} {target} HTTP/1.1\r\nhost: {at.authority}\r\n".encode() + _OWN_HEADERS + lines

    # ------------------------------------------------------------ connections
    def _kept(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now < connection.idle_until:
                return connection
            connection.abort()
        return None

    async def _warm(self) -> None:
        try:
            self.keep(await self._connected(CONNECT_SECONDS))
        except (WireError, TimeoutError):
            pass
        finally:
            self._warming = None

    def keep(self, connection: _Connection) -> None:
        seconds = UNASKED_SECONDS if connection.is_unasked else IDLE_SECONDS
        connection.idle_until = asyncio.get_running_loop().time() + seconds
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_SECONDS / 3, self._sweep)

    def forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close what nobody has used for a while."""
        loop, self._sweeper = asyncio.get_running_loop(), None
        now = loop.time()
        for connection in [each for each in self._idle if each.idle_until <= now]:
            self._idle.remove(connection)
            connection.abort()
        if self._idle:
            self._sweeper = loop.call_later(IDLE_SECONDS / 3, self._sweep)

    async def _connected(self, seconds: float) -> _Connection:
        try:
            async with asyncio.timeout(min(seconds, CONNECT_SECONDS)):
                return await self._tried()
        except TimeoutError:
            raise Unconnected from None

    async def _tried(self) -> _Connection:
        try:
            return await self._connect()
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(str(error)) from error
        except OSError as error:
            if isinstance(error, TimeoutError):  # the system's own, which is no limit of the caller
                raise WireError(str(error) or "it does not answer") from error
            raise WireError(_what(error)) from error

    async def _connect(self) -> _Connection:
        loop, first = asyncio.get_running_loop(), self._proxy or self._address
        found = await loop.getaddrinfo(first.host, first.port, type=socket.SOCK_STREAM)
        sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, loop=loop)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._is_tunnel:
                await self._tunnel(sock)
            tls = self._address if self._is_tunnel or self._proxy is None else self._proxy
            context = _trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")) if tls.is_tls else None
            _, connection = await loop.create_connection(
                lambda: _Connection(self), sock=sock, ssl=context, server_hostname=tls.host if context else None
            )
        except BaseException:
            sock.close()
            raise
        self._open.add(connection)
        return connection

    async def _tunnel(self, sock: socket.socket) -> None:
        """Through a forward proxy. It says nothing behind its head: TLS begins with us."""
        assert self._proxy is not None
        if self._proxy.is_tls:
            raise WireError("a proxy that wants TLS itself cannot carry TLS here: name it as http://")
        loop, target = asyncio.get_running_loop(), self._address.target
        ask = f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n".encode()
        await loop.sock_sendall(sock, ask + _authorization("proxy-authorization", self._proxy) + b"\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := await loop.sock_recv(sock, 4096)) or len(head) > MAX_HEAD:
                raise WireError("the proxy gave no answer to CONNECT")
            head += more
        if not head.split(b"\r\n")[0].split(b" ")[1:2][0].startswith(b"2"):
            raise WireError(f"the proxy refused the connection: {head.splitlines()[0][:100].decode('latin-1')}")


def _lines(headers: Mapping[str, str]) -> bytes:
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\r") + text.count("\n") + text.count("\0") != 2 * len(headers):
        raise ValueError("headers: wanted one line each, saw more")  # it could be another request
    return text.encode()


def _authorization(name: str, address: Address) -> bytes:
    if address.credentials is None:
        return b""
    return f"{name}: Basic {base64.b64encode(address.credentials.encode()).decode()}\r\n".encode()


def _sent(error: WireError) -> WireError:
    error.is_sent = True
    return error


def _what(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
