"""Small working OpenAI-compatible servers on loopback with scripted faults, for tests of a model over HTTP.

    async with ScriptedModel("42") as server:            # in the test's own event loop
        model = HttpChatModel(server.url, "any")
    with ScriptedModel(["a", "b"], faults=[429, "drop"]).in_thread() as server:   # for code that blocks
        subprocess.run([..., server.url])
    python tests/fakes.py --port 9000 --answer 42        # a process of its own

A fault is used up by one call, in order; `None` is a call that goes well:
  500, 401, ...   that status            Fault(429, {"retry-after": "1"})   with headers or a body
  "hang"          no answer at all       "drop"      connection closed before an answer
  "lost"          answered and counted, but the connection breaks before the answer is sent
  "garbage"       200 with HTML          "truncate"  (stream) breaks off after the first word
  "stall"         (stream) hangs after the first word; "comments": and goes on in comments
  "mute"          (stream) says nothing after its head
  "filters"       (stream) begins with events without choices, and never comes to an end of them
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

# What OpenAI says of a parameter that a model does not take.
ONLY_DEFAULT = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
OTHER_LIMIT = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


@dataclass(frozen=True)
class Fault:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None


@dataclass(frozen=True)
class Call:
    """One request as it arrived; header names in lower case."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def key(self) -> str | None:
        return self.headers.get("idempotency-key")

    @property
    def last(self) -> str:
        """Text of the last message."""
        return str(self.body["messages"][-1]["content"])


Answers = str | Sequence[str] | Callable[[Call], str]


class ScriptedModel:
    """Answers with `answers`: one text, texts in turn, or a function of the call.

    `calls` has every request, `paid` the answers counted: an Idempotency-Key seen before gives the same answer
    for nothing.
    `keys`: API keys that are taken (none: everybody). `refuses`: parameters that are not, and what is said of them.
    `gate`: answers wait while it is cleared.
    """

    def __init__(
        self,
        answers: Answers = "an answer",
        *,
        faults: Sequence[int | str | Fault | None] = (),
        name: str = "scripted",
        version: str = "fp_1",
        headers: Mapping[str, str] | None = None,
        keys: Sequence[str] = (),
        refuses: Mapping[str, str] | None = None,
    ) -> None:
        self.refuses = dict(refuses or {})
        self.answers, self.faults, self.name, self.version = answers, list(faults), name, version
        self.headers, self.keys = dict(headers or {}), tuple(keys)
        self.calls: list[Call] = []
        self.paid: list[Call] = []
        self.broken_off = 0  # requests whose client left before the answer
        self.url = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()  # set by each request
        self._remembered: dict[str, str] = {}
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None

    # ------------------------------------------------------------ running
    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/readyz", self._healthy)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        self._closing.set()
        self.gate.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @contextmanager
    def in_thread(self) -> Iterator[Self]:
        """The same server in an event loop of its own, for tests that are not async."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), loop).result(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self.stop(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    # ------------------------------------------------------------ answering
    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = Call(await request.json(), {name.lower(): value for name, value in request.headers.items()})
        self.calls.append(call)
        self.arrived.set()
        fault = self.faults.pop(0) if self.faults else None
        if self.keys and call.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            fault = 401
        if refused := next((name for name in self.refuses if name in call.body), None):
            error = {"message": self.refuses[refused], "param": refused, "code": "unsupported_value"}
            fault = Fault(400, body=json.dumps({"error": error}))
        try:
            return await self._answer(request, call, fault)
        except (asyncio.CancelledError, ConnectionResetError):
            self.broken_off += 1
            raise

    async def _answer(self, request: web.Request, call: Call, fault: int | str | Fault | None) -> web.StreamResponse:
        if isinstance(fault, int):
            fault = Fault(fault)
        if isinstance(fault, Fault):
            body = json.dumps({"error": {"message": f"scripted {fault.status}"}}) if fault.body is None else fault.body
            return web.Response(status=fault.status, text=body, headers=fault.headers)
        if fault == "hang":
            await self._closing.wait()
        if fault in ("drop", "hang"):
            return _broken(request)
        if fault == "garbage":
            return web.Response(text="<html>welcome</html>", content_type="text/html")
        await self.gate.wait()
        text = self._text(call)
        if fault == "lost":
            return _broken(request)
        if call.body.get("stream"):
            return await self._stream(request, call, text, fault)
        return web.json_response(self._completion(call, text), headers=self.headers)

    def _text(self, call: Call) -> str:
        if call.key is not None and call.key in self._remembered:
            return self._remembered[call.key]
        if isinstance(self.answers, str):
            text = self.answers
        elif callable(self.answers):
            text = self.answers(call)
        else:
            text = self.answers[len(self.paid) % len(self.answers)]
        self.paid.append(call)
        if call.key is not None:
            self._remembered[call.key] = text
        return text

    def _completion(self, call: Call, text: str) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for i in range(call.body.get("n") or 1)
        ]
        head = self._head(call, "chat.completion")
        return head | {"choices": choices, "usage": _usage(call, text)}

    def _head(self, call: Call, kind: str) -> dict[str, Any]:
        number = hashlib.sha256(json.dumps(call.body, sort_keys=True).encode()).hexdigest()[:12]
        head = {"id": f"chatcmpl-{number}", "object": kind, "created": 1, "model": self.name}
        return head | ({"system_fingerprint": self.version} if self.version else {})

    async def _stream(self, request: web.Request, call: Call, text: str, fault: object) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **self.headers})
        await response.prepare(request)
        head = self._head(call, "chat.completion.chunk")
        if fault == "mute":
            await self._closing.wait()
            return _broken(request, response)
        while fault == "filters":
            await response.write(_event(head | {"choices": []}))
            await asyncio.sleep(0.02)
        for i, delta in enumerate(_deltas(text)):
            if i == 2 and fault == "truncate":
                return _broken(request, response)
            if i == 2 and fault == "stall":
                await self._closing.wait()
                return _broken(request, response)
            while i == 2 and fault == "comments":
                await response.write(b": still there\n\n")
                await asyncio.sleep(0.02)
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            await response.write(_event(head | {"choices": [choice]}))
        if (call.body.get("stream_options") or {}).get("include_usage"):
            await response.write(_event(head | {"choices": [], "usage": _usage(call, text)}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def _deltas(text: str) -> list[dict[str, str]]:
    """Role, words, and an empty one at the end."""
    words = [word if i == 0 else " " + word for i, word in enumerate(text.split(" "))]
    return [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]


def _usage(call: Call, text: str) -> dict[str, int]:
    taken_in, given_out = (
        sum(len(str(m.get("content")).split()) for m in call.body["messages"]),
        len(text.split()),
    )
    return {"prompt_tokens": taken_in, "completion_tokens": given_out, "total_tokens": taken_in + given_out}


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _broken(request: web.Request, begun: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection without another byte."""
    if request.transport is not None:
        request.transport.abort()
    return begun or web.Response()


@asynccontextmanager
async def unused_port() -> AsyncIterator[int]:
    """A port on which nobody listens, held so that nobody else takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        yield held.getsockname()[1]


async def _serve(port: int, answer: str) -> None:
    server = ScriptedModel(answer)
    await server.start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible model.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer", default="an answer")
    options = parser.parse_args()
    asyncio.run(_serve(options.port, options.answer))
