"""The gateway's side of a connection, in place of uvicorn's protocol: little between a request and the application,
and limits on what a client may send, and how slowly.

    fresh, or the address of a request --head, 15 s--> body --60 s in all--> answer, read within 60 s a piece

A head that is too large, bytes that are no HTTP, and a request that does not end are refused in the form of OpenAI's
errors, and the connection is closed: what follows on it may be anything. A request that comes whole costs no timer.

uvicorn keeps the listening socket, the signals, the life of the application and a shutdown that lets answers finish.
The application is any of ASGI; the extension `cowest.when_gone` takes a function to call when its client leaves in
the middle, which spares a task per request. `cowest.crowded` is there where uvicorn's `limit_concurrency`, of
connections, is reached: such a request's connection is closed behind its answer. See
docs/decisions/0009-gateway-hot-path.md.
"""

from __future__ import annotations

import asyncio
import http
import logging
import sys
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import httptools
import orjson
from uvicorn.config import Config
from uvicorn.server import ServerState

from cowest_serving.answering import Refusal
from cowest_serving.contract import HEADER_REQUEST_ID
from cowest_serving.ids import new_id
from cowest_serving.logs import traced

log = logging.getLogger(__name__)
Event = MutableMapping[str, Any]
MAX_HEAD = 32 * 1024  # bytes of address and headers together
MAX_HEADERS = 100
MAX_AHEAD = 64 * 1024  # bytes of a body that the application has not taken yet: then the connection is not read from
HEAD_SECONDS, REQUEST_SECONDS, READ_SECONDS = 15.0, 60.0, 60.0
WHEN_GONE, CROWDED = "cowest.when_gone", "cowest.crowded"
SURPLUS = 100  # connections above the limit whose requests still reach the application, which says so; more are closed
SURPLUS_SECONDS = 5.0  # that one of these may wait with its request
_OF_UPGRADES = (b"connection", b"upgrade", b"http2-settings")
_ASGI = {"version": "3.0", "spec_version": "2.3"}
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


_NOT_HTTP = Refusal(
    400, "What came is no request of HTTP/1.1, or one that could be read in two ways.", code="invalid_http"
)
_TOO_LARGE = Refusal(
    431, f"The head of a request may have {MAX_HEAD // 1024} KiB and {MAX_HEADERS} headers.", code="head_too_large"
)
_TOO_SLOW = Refusal(
    408,
    f"The request did not end: its head may take {HEAD_SECONDS:.0f} s, all of it {REQUEST_SECONDS:.0f} s.",
    code="request_timeout",
)


class FrontDoor(asyncio.Protocol):
    """One connection of a client. Its requests are answered one after the other."""

    head_seconds, request_seconds, read_seconds = HEAD_SECONDS, REQUEST_SECONDS, READ_SECONDS
    surplus, surplus_seconds = SURPLUS, SURPLUS_SECONDS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.loop = _loop or asyncio.get_running_loop()
        self.state = server_state
        self.app: Callable[..., Awaitable[None]] = config.loaded_app
        self.can_write: asyncio.Future[None] | None = None  # while the client does not read
        self.transport: asyncio.Transport | None = None
        self._idle_seconds, self._app_state, self._root_path = config.timeout_keep_alive, app_state, config.root_path
        self._most = config.limit_concurrency or sys.maxsize
        self._is_surplus = False
        self._parser = httptools.HttpRequestParser(self)
        self._coming: _Request | None = None  # whose head or body is being read
        self._answered: _Request | None = None
        self._waiting: deque[_Request] = deque()  # sent before the one before them was answered
        self._is_paused = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0  # of a head that has begun
        self._is_behind = False  # in one read with the end of the request before it
        self._beside_bytes = 0  # that came since the last ones of a body: trailers, and what stands beside chunk sizes
        self._began = 0.0  # when it did
        self._until = self._timer_at = 0.0  # when whatever is awaited of the client is late; 0: nothing is
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ what the transport says
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.state.connections.add(self)  # type: ignore[arg-type]  # uvicorn names its own protocols
        self._is_surplus = len(self.state.connections) > self._most
        if len(self.state.connections) > self._most + self.surplus:
            self.transport.abort()
        else:
            self.expect(self.surplus_seconds if self._is_surplus else self._idle_seconds)

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._coming is not None:
            self._beside_bytes += len(data)
        self._is_behind = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(_TOO_LARGE if self._head_bytes > MAX_HEAD else _NOT_HTTP)
            return
        if self._head_bytes and not self._is_behind:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(_TOO_LARGE)
        elif self._coming is not None and self._beside_bytes > MAX_HEAD:
            self._refuse(_TOO_LARGE)

    def connection_lost(self, error: Exception | None) -> None:
        self.state.connections.discard(self)
        self.transport = None
        self.resume_writing()
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        if self._answered is not None:
            self._answered.leave()

    def pause_writing(self) -> None:
        self.can_write = self.loop.create_future()
        self.expect(self.read_seconds)

    def resume_writing(self) -> None:
        paused, self.can_write = self.can_write, None
        if paused is not None and not paused.done():
            paused.set_result(None)
        if self._answered is not None:
            self._until = 0.0
        elif self.transport is not None:
            self.expect(self._idle_seconds)

    def shutdown(self) -> None:
        """uvicorn: end as soon as no answer is under way."""
        if self._answered is not None:
            self._answered.may_stay = False
        elif self.transport is not None:
            self.transport.close()

    # ------------------------------------------------------------ what the parser says
    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        self._url += url
        if not self._head_bytes:  # not earlier: an empty line between two requests begins none
            self._head_bytes, self._began = 1, self.loop.time()
            self.expect(self.head_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._coming is None:  # else a trailer: it stands for no header, and whoever is before us did not look at it
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        size = len(self._url) + sum(len(name) + len(value) for name, value in self._headers)
        if size > MAX_HEAD or len(self._headers) > MAX_HEADERS:
            self._head_bytes = MAX_HEAD + 1
            raise ValueError("too large a head")  # ends the parsing
        self._head_bytes = self._beside_bytes = 0
        if self._parser.should_upgrade():
            return
        request = self._coming = _Request(self, self._scope(), self._parser.should_keep_alive())
        if self._is_surplus and len(self.state.connections) > self._most:
            request.may_stay = False
            request.scope["extensions"][CROWDED] = {}
        self.expect(self._began + self.request_seconds - self.loop.time())
        if self._answered is None:
            self._start(request)
        else:
            self._waiting.append(request)
            self.pause()

    def on_body(self, data: bytes) -> None:
        if self._coming is not None:
            self._beside_bytes = 0
            self._coming.take(data)

    def on_message_complete(self) -> None:
        request, self._coming = self._coming, None
        self._is_behind = True
        if request is not None:
            self._until = 0.0
            request.take_end()
            if request is not self._answered and not self._waiting:  # it was answered before it was sent whole
                self.expect(self._idle_seconds)

    def _scope(self) -> dict[str, Any]:
        url = httptools.parse_url(self._url)
        path = (url.path or b"/").decode("latin-1")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": self._parser.get_http_version(),
            "method": self._parser.get_method().decode("latin-1"),
            "scheme": "http",
            "path": self._root_path + (urllib.parse.unquote(path) if "%" in path else path),
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": self._root_path,
            "headers": self._headers,
            "server": None,
            "client": None,
            "state": self._app_state,
        }

    def _decline(self, rest: bytes) -> None:
        """An offer of HTTP/2, as some clients make with each request: read it again, body and all, as if without."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(_NOT_HTTP)
            return
        lines = [b"%b: %b\r\n" % header for header in self._headers if header[0] not in _OF_UPGRADES]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, self._url, b"".join(lines), rest))

    # ------------------------------------------------------------ requests
    def _start(self, request: _Request) -> None:
        self._answered = request
        task = self.loop.create_task(request.run())
        self.state.tasks.add(task)
        task.add_done_callback(self.state.tasks.discard)

    def answered(self, may_stay: bool) -> None:
        """The answer is complete; its request may still be on its way."""
        self.state.total_requests += 1
        self._answered = None
        if self.transport is None:
            return
        if not may_stay:
            self.transport.close()
        elif self._waiting:
            self._start(self._waiting.popleft())
        elif self._coming is None and not self._head_bytes:
            self.expect(self._idle_seconds)
        self.resume()

    def pause(self) -> None:
        if not self._is_paused and self.transport is not None:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and self.transport is not None and not self._waiting:
            self._is_paused = False
            self.transport.resume_reading()

    def _refuse(self, refusal: Refusal) -> None:
        """Close the connection, and say why where no answer has begun. What was asked before is still answered."""
        request = self._answered
        if request is not None and request is not self._coming:
            if self._waiting and self._waiting[-1] is self._coming:
                self._waiting.pop()  # it is the one that is refused
            last = self._waiting[-1] if self._waiting else request
            last.may_stay = False
            self.pause()
        elif self.transport is not None:
            asked = request or self._coming  # which may have its answer, a 413 say, though it still comes
            if asked is None or not asked.is_begun:
                self.transport.write(_response(refusal))
            self.transport.close()

    # ------------------------------------------------------------ clients that are late
    def expect(self, seconds: float) -> None:
        """One timer serves a connection: it looks what holds when it fires, and is not set anew for each request."""
        self._until = until = self.loop.time() + seconds
        if self._timer is not None and self._timer_at > until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer, self._timer_at = self.loop.call_at(until, self._look), until

    def _look(self) -> None:
        self._timer = None
        if self.transport is None or not self._until:
            return
        if self.loop.time() < self._until:
            self.expect(self._until - self.loop.time())
        elif self.can_write is not None:
            self.transport.abort()
        elif self._coming is None and not self._head_bytes:
            self.transport.close()  # nobody has asked for a while
        elif self._is_paused:
            self.expect(self.request_seconds)  # it is not the client that is late
        else:
            self._refuse(_TOO_SLOW)


class _Request:
    """One request, and its answer: the application's `receive` and `send`."""

    __slots__ = (
        *("_chunked", "_connection", "_gone", "_head", "_is_over", "_is_sent", "_is_told", "_left", "_parts", "_size"),
        *("_waiter", "_wants_100", "is_begun", "may_stay", "scope"),
    )

    def __init__(self, connection: FrontDoor, scope: dict[str, Any], may_stay: bool) -> None:
        self.scope, self.may_stay = scope, may_stay
        scope["extensions"] = {WHEN_GONE: self._when_gone}
        self.is_begun = False
        self._connection, self._left = connection, False
        self._parts: list[bytes] = []  # of the body, that nobody has taken yet
        self._size = 0
        self._is_sent = self._is_told = self._is_over = False  # whole body here, application has it, answer complete
        self._wants_100 = any(name == b"expect" and said.lower() == b"100-continue" for name, said in scope["headers"])
        self._head = b""  # of the answer, until it goes out with the first bytes of the body
        self._chunked = False
        self._waiter: asyncio.Future[None] | None = None
        self._gone: Callable[[], object] | None = None

    # ------------------------------------------------------------ what the connection says
    def take(self, data: bytes) -> None:
        if not self._is_over:
            self._parts.append(data)
            self._size += len(data)
            if self._size > MAX_AHEAD:
                self._connection.pause()
            self._wake()

    def take_end(self) -> None:
        self._is_sent = True
        self._wake()

    def leave(self) -> None:
        """The client has gone."""
        self._left = True
        if self._gone is not None and not self._is_over:
            self._gone()
        self._wake()

    def _when_gone(self, call: Callable[[], object]) -> None:
        self._gone = call
        if self._left:
            call()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ------------------------------------------------------------ the application
    async def run(self) -> None:
        try:
            await self._connection.app(self.scope, self.receive, self.send)
            if not self._is_over and not self._left:
                log.error("The application ended without a whole answer.")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.error("The application failed: %s", traced(error))
            if not self.is_begun and not self._head:
                await self.send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"0")]})
                await self.send({"type": "http.response.body"})
        finally:
            if not self._is_over and self._connection.transport is not None:
                self._connection.transport.close()

    async def receive(self) -> Event:
        if self._wants_100 and self._connection.transport is not None and not self._is_over:
            self._wants_100 = False
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._left or self._is_over or self._parts or (self._is_sent and not self._is_told)):
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        if self._left or self._is_over:
            return {"type": "http.disconnect"}
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size, self._is_told = 0, self._is_sent
        self._connection.resume()
        return {"type": "http.request", "body": body, "more_body": not self._is_sent}

    async def send(self, event: Event) -> None:
        if self._connection.can_write is not None:
            await asyncio.shield(self._connection.can_write)
        if event["type"] == "http.response.start":
            self._head = self._built_head(event["status"], event.get("headers", ()))
            return
        transport, data, is_last = self._connection.transport, event.get("body", b""), not event.get("more_body", False)
        if self._chunked:
            data = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + (b"0\r\n\r\n" if is_last else b"")
        elif self.scope["method"] == "HEAD":
            data = b""
        if transport is not None and not transport.is_closing() and (data or self._head):
            transport.write(self._head + data if self._head else data)
        self.is_begun, self._head = True, b""
        if is_last and not self._is_over:
            self._is_over = True
            self._wake()
            self._connection.answered(self.may_stay)

    def _built_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        has_length, lines = False, [_STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in (*self._connection.state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                has_length = True
            elif name == b"connection" and value == b"close":
                self.may_stay = False
        if not self.may_stay and b"connection: close\r\n" not in b"".join(lines):
            lines.append(b"connection: close\r\n")
        is_old = self.scope["http_version"] == "1.0"
        self._chunked = not has_length and not is_old and self.scope["method"] != "HEAD"
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif not has_length:
            self.may_stay = False  # such a body ends with its connection
        elif is_old and self.may_stay:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)


def _response(refusal: Refusal) -> bytes:
    body = orjson.dumps(refusal.body())
    head = f"content-type: application/json\r\n{HEADER_REQUEST_ID}: {new_id()}\r\ncontent-length: {len(body)}\r\n"
    return _STATUS[refusal.status] + head.encode() + b"connection: close\r\n\r\n" + body
