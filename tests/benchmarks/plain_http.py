"""A cheap stub of a model and a cheap client, for benchmarks that share two processors with what they load.

    python tests/benchmarks/plain_http.py --port 9000 --delay 0.04 [--digest sha256:weak]     # a stub

A question carries `<id>`; the stub answers `answer to <id>` under the id `chatcmpl-<id>`, so that an answer which
belongs to another question, lacks a part or came twice is seen. Streams come in as many frames as there are words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import uvloop

ID = re.compile(rb"<([0-9a-z-]+)>")
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
DONE = b"data: [DONE]\n\n"


def answer_to(call: str) -> str:
    return f"an answer to {call} that goes on for a while, as answers of models do"


def question(call: str, size: int = 0) -> str:
    return f"<{call}> why is the freight late? ".ljust(size, "x")


# ---------------------------------------------------------------- the stub
class Stub(asyncio.Protocol):
    """One connection. Understands what HTTP clients send here and nothing more."""

    def __init__(self, delay: float, digest: str) -> None:
        self._delay, self._digest = delay, digest
        self._seen = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        while (end := self._seen.find(b"\r\n\r\n")) >= 0:
            found = LENGTH.search(self._seen, 0, end)
            size = end + 4 + (int(found[1]) if found else 0)
            if len(self._seen) < size:
                return
            request, self._seen = self._seen[:size], self._seen[size:]
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        found = ID.search(request)
        call = found[1].decode() if found else "nobody"
        if b'"stream":true' in request.replace(b" ", b""):
            parts = [*_frames(call), b"0\r\n\r\n"]
            for number, part in enumerate(parts):
                loop.call_later(self._delay * (number + 1) / len(parts), self._write, part)
        else:
            loop.call_later(self._delay, self._write, _whole(call, self._digest))

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def _whole(call: str, digest: str) -> bytes:
    message = {"role": "assistant", "content": answer_to(call)}
    body: bytes = json.dumps(
        _head(call, "chat.completion")
        | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        | {"usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}}
    ).encode()
    more = f"x-cowest-model-digest: {digest}\r\n" if digest else ""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def _frames(call: str) -> list[bytes]:
    """The head with the first event, then one chunk an event."""
    words = answer_to(call).split(" ")
    deltas = [{"content": word if not number else f" {word}"} for number, word in enumerate(words)]
    choices: list[Any] = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
    choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    head = _head(call, "chat.completion.chunk")
    events = [b"data: " + json.dumps(head | {"choices": each}).encode() + b"\n\n" for each in choices]
    chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in [*events, DONE]]
    start = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [start + chunks[0], *chunks[1:]]


def _head(call: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call}", "object": kind, "created": 1, "model": "stub", "system_fingerprint": "fp_1"}


async def serve(port: int, delay: float, digest: str) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Stub(delay, digest), "127.0.0.1", port, backlog=2048
    )
    await server.serve_forever()


# ---------------------------------------------------------------- the client
@dataclass(frozen=True)
class Reply:
    """What came of one request, to its end or to where the connection broke."""

    status: int  # 0: not even a head
    headers: Mapping[str, str]
    body: bytes
    is_whole: bool


class Client:
    """Keeps connections to one address; each carries one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes, seconds: float) -> Reply:
        """Never raises: a connection that breaks, or an answer that takes too long, is a reply that is not whole."""
        seen, connection = bytearray(), None
        try:
            async with asyncio.timeout(seconds):
                connection = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer = connection
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                while not _is_whole(seen):
                    if not (data := await reader.read(65536)):
                        raise ConnectionResetError
                    seen += data
        except (OSError, TimeoutError):
            if connection is not None:
                connection[1].close()
            return _reply(bytes(seen), is_whole=False)
        self._free.append(connection)
        return _reply(bytes(seen), is_whole=True)

    def forget(self) -> None:
        """The server of these connections is gone."""
        for _, writer in self._free:
            writer.close()
        self._free.clear()


def _is_whole(seen: bytearray) -> bool:
    end = seen.find(b"\r\n\r\n")
    if end < 0:
        return False
    found = LENGTH.search(seen, 0, end)
    return len(seen) >= end + 4 + int(found[1]) if found else seen.endswith(b"\r\n0\r\n\r\n")


def _reply(seen: bytes, is_whole: bool) -> Reply:
    head, found, body = seen.partition(b"\r\n\r\n")
    if not found:
        return Reply(0, {}, b"", False)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Reply(int(first.split(" ")[1]), headers, body, is_whole)


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        parts.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(parts)


def text_of(reply: Reply) -> str:
    """What the model said; raises `ValueError` for what is no answer."""
    if reply.headers.get("content-type", "").startswith("application/json"):
        return str(json.loads(reply.body)["choices"][0]["message"]["content"])
    events = [
        event[6:] for event in reply.body.split(b"\n\n") if event.startswith(b"data: ") and event != DONE.rstrip()
    ]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--delay", type=float, default=0.0, help="seconds until the whole answer is there")
    flags.add_argument("--digest", default="", help="of the model that a weak server says it serves")
    options = flags.parse_args()
    uvloop.run(serve(options.port, options.delay, options.digest))


if __name__ == "__main__":
    main()
