"""The gateway's side of a connection: uvicorn's protocol with limits on what a client may send, and how slowly.

    fresh, or the first byte of a request --head, 15 s--> body --60 s in all--> answer, read within 60 s a piece

A head that is too large, bytes that are no HTTP, and a request that does not end are refused in the form of OpenAI's
errors, and the connection is closed: what follows on it may be anything. A request that comes whole costs no timer.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cowest_serving.answering import Refusal
from cowest_serving.contract import HEADER_REQUEST_ID

MAX_HEAD = 32 * 1024  # bytes of address and headers together
MAX_HEADERS = 100
HEAD_SECONDS, REQUEST_SECONDS, READ_SECONDS = 15.0, 60.0, 60.0

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


class FrontDoor(HttpToolsProtocol):
    head_seconds, request_seconds, read_seconds = HEAD_SECONDS, REQUEST_SECONDS, READ_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._begun = 0  # requests
        self._is_open = True  # the last of them has not come whole, or none has begun
        self._is_in_head = True
        self._head_bytes = 0  # of its head, beyond the piece that it began in
        self._since = 0.0  # when it began
        self._refusal = _NOT_HTTP  # of bytes that the parser does not take
        self._too_slow: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ a connection
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(self.timeout_keep_alive)  # uvicorn would wait for ever for the first byte

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        begun = self._begun
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._is_open:
            self._unwatch()
            self._keep_idle_limit()
        elif self._begun != begun:
            self._watch(self.head_seconds)
        elif self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(_TOO_LARGE)

    def pause_writing(self) -> None:
        super().pause_writing()
        # A client that does not read its answer would hold the call of the strong model open.
        self._unread = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # ------------------------------------------------------------ a request, as the parser tells of it
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun += 1
        self._is_open = self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            self._refusal = _TOO_LARGE
            raise ValueError("too large a head")  # ends the parsing: `send_400_response` comes next
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_open = False

    # ------------------------------------------------------------ limits of time
    def _watch(self, seconds: float) -> None:
        self._unwatch()
        self._since = self.loop.time()
        self._too_slow = self.loop.call_later(seconds, self._look)

    def _unwatch(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def _look(self) -> None:
        left = self._since + self.request_seconds - self.loop.time()
        if not self._begun:
            self.transport.close()
        elif not self._is_in_head and left > 0:
            self._too_slow = self.loop.call_later(left, self._look)
        else:
            self._refuse(_TOO_SLOW)

    def _keep_idle_limit(self) -> None:
        """After an empty line between requests, which uvicorn takes for the begin of one."""
        is_idle = self.cycle is not None and self.cycle.response_complete
        if is_idle and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # ------------------------------------------------------------ refusals
    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, refusal: Refusal) -> None:
        """Close the connection; say why, unless that would get between the bytes of an answer."""
        cycle = self.cycle
        if self._is_in_head:  # then it is the cycle of the request before
            is_quiet = cycle is not None and not cycle.response_complete
        else:
            is_quiet = cycle is not None and cycle.response_started
        if not is_quiet:
            self.transport.write(_response(refusal))
        self.transport.close()


def _response(refusal: Refusal) -> bytes:
    body = orjson.dumps(refusal.body())
    head = b"content-type: application/json\r\n%s: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (
        HEADER_REQUEST_ID.encode(),
        uuid.uuid4().hex.encode(),
        len(body),
    )
    return STATUS_LINE[refusal.status] + head + body
