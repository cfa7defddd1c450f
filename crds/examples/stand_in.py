"""The HTTP shell of a strong stand-in: a function `answer(messages) -> str` behind an OpenAI-compatible endpoint.

A stand-in takes the place of a commercial model where none can be had: in the demo, in tests and in studies. It is a
process of its own, knows only what its source file says, and names the digest of that source as `system_fingerprint`,
so that a report shows which stand-in was asked. The domain's `strong.py` ends with

    if __name__ == "__main__":
        stand_in.main(tastes, model="...", sources=(__file__,))

Routes: POST /v1/chat/completions (also streamed), GET /v1/models, GET /healthz, GET /stats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Answer = Callable[[Sequence[Mapping[str, Any]]], str]

# What does not change the answer is no part of a call's content.
NOT_CONTENT = frozenset({"stream", "stream_options", "user", "metadata", "store"})
# A key that is a digest says "this content, once": whoever sends the same content under two such keys has lost its
# books. Any other key names one request of one user, and two users may ask the same.
CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
EXIT_PORT_IN_USE = 2


class BadRequest(Exception):
    """The request cannot be answered; ends as HTTP 400 with this sentence."""


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...]  # the names it answers to
    digest: str
    latency_seconds: float = 0.0
    honour_idempotency: bool = True


@dataclass
class Book:
    """Who asked what: the counts behind GET /stats, and the stored answers behind `Idempotency-Key`."""

    calls: int = 0  # answered and charged
    repeated_idempotent: int = 0  # came with a key seen before
    repeated_paid_calls: int = 0  # the same content charged again at temperature 0, under another content key
    keys_of: dict[str, set[str]] = field(default_factory=dict)  # content -> content keys it was charged under
    answers: dict[str, asyncio.Future[str]] = field(default_factory=dict)  # key -> completion as JSON

    def charge(self, content: str, key: str | None, temperature: float) -> None:
        """Count one paid call."""
        seen = self.keys_of.setdefault(content, set())
        self.calls += 1
        if key is not None and CONTENT_KEY.fullmatch(key):
            self.repeated_paid_calls += bool(seen - {key}) and temperature == 0
            seen.add(key)

    def stats(self, digest: str) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "distinct_calls": len(self.keys_of),
            "repeated_idempotent": self.repeated_idempotent,
            "repeated_paid_calls": self.repeated_paid_calls,
            "digest": digest,
        }


class Desk:
    """Answers requests, charges them in its book and honours their keys."""

    def __init__(self, answer: Answer, options: Options) -> None:
        self.answer = answer
        self.options = options
        self.book = Book()

    async def reply(self, body: Mapping[str, Any], key: str | None) -> tuple[str, bool]:
        """(the completion as JSON, whether it is a stored one)."""
        stored = self.book.answers.get(key) if key is not None else None
        self.book.repeated_idempotent += stored is not None
        if stored is not None and self.options.honour_idempotency:
            return await asyncio.shield(stored), True
        # Charged and promised before the first await: a twin that arrives meanwhile waits for this answer.
        self.book.charge(content_of(body), key, float(body.get("temperature") or 0))
        promise: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if key is not None:
            self.book.answers[key] = promise
        try:
            promise.set_result(await self._completion(body))
        except Exception:
            self.book.answers.pop(key or "", None)
            promise.cancel()  # a waiting twin is not left waiting
            raise
        return promise.result(), False

    async def _completion(self, body: Mapping[str, Any]) -> str:
        completion = json.dumps(complete(self.answer, body, self.options))
        await asyncio.sleep(self.options.latency_seconds)
        return completion


def source_digest(paths: Sequence[str], *extra: str) -> str:
    """`sha256:<64 hex>` over this file, the given source files and what else decides the answers (a taste)."""
    digest = hashlib.sha256()
    for path in (__file__, *paths):
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    digest.update("\0".join(extra).encode())
    return "sha256:" + digest.hexdigest()


def build_app(answer: Answer, options: Options) -> Starlette:
    """The endpoint around `answer`. All its state lies in memory."""
    desk = Desk(answer, options)

    async def chat(request: Request) -> Response:
        try:
            body = read_body(await request.body(), options.models)
        except BadRequest as error:
            return error_response(400, str(error))
        completion, stored = await desk.reply(body, request.headers.get("idempotency-key"))
        headers = {"idempotent-replayed": "true"} if stored else {}
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(
                stream(json.loads(completion), usage), media_type="text/event-stream", headers=headers
            )
        return Response(completion, media_type="application/json", headers=headers)

    async def models(_: Request) -> Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "stand-in"} for name in options.models]
        return JSONResponse({"object": "list", "data": cards})

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def stats(_: Request) -> Response:
        return JSONResponse(desk.book.stats(options.digest))

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/healthz", healthz),
            Route("/stats", stats),
        ]
    )


def read_body(data: bytes, models: Sequence[str]) -> dict[str, Any]:
    """The request's JSON. Raises `BadRequest` with what is wrong."""
    try:
        body = json.loads(data)
    except ValueError:
        raise BadRequest("wanted a JSON object as body, saw something that is no JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("wanted `messages`, a list with at least one message")
    if body.get("model") not in models:
        raise BadRequest(f"wanted model {' or '.join(models)}, saw {body.get('model')!r}; GET /v1/models lists them")
    return body


def content_of(body: Mapping[str, Any]) -> str:
    """Digest of what decides the answer."""
    content = {name: value for name, value in body.items() if name not in NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def complete(answer: Answer, body: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """One chat completion. Tokens are words here; `max_tokens` cuts as a real endpoint does."""
    words = answer(body["messages"]).split(" ")
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    text = " ".join(words[:limit])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if limit and len(words) > limit else "stop",
        "logprobs": None,
    }
    prompt_tokens = sum(len(str(message.get("content", "")).split()) for message in body["messages"])
    answer_tokens = len(text.split())
    return {
        "id": "chatcmpl-" + content_of(body)[:24],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": options.digest,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer_tokens,
            "total_tokens": prompt_tokens + answer_tokens,
        },
    }


async def stream(completion: Mapping[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """The same completion as server-sent events, a word a chunk."""
    choice = completion["choices"][0]
    head = {name: completion[name] for name in ("id", "created", "model", "system_fingerprint")}
    head["object"] = "chat.completion.chunk"

    def event(delta: Mapping[str, str], finish_reason: str | None = None) -> str:
        piece = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({**head, 'choices': [piece]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    for i, word in enumerate(choice["message"]["content"].split(" ")):
        yield event({"content": word if i == 0 else " " + word})
        await asyncio.sleep(0)
    yield event({}, choice["finish_reason"])
    if include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': completion['usage']})}\n\n"
    yield "data: [DONE]\n\n"


def error_response(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


async def _serve(app: Starlette, listener: socket.socket, die_with_parent: bool) -> None:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))

    async def follow_parent() -> None:
        # Asked every half second rather than by PR_SET_PDEATHSIG, which follows the parent's *thread*.
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(0.5)
        server.should_exit = True

    watch = asyncio.create_task(follow_parent()) if die_with_parent else None
    await server.serve(sockets=[listener])
    if watch:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


def main(tastes: Mapping[str, Answer], *, model: str, sources: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """Serve one of the `tastes` (name -> answer function; the first is the default) until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=f"A strong stand-in: {model} behind an OpenAI-compatible endpoint.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (it is told on standard output)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--taste", choices=tuple(tastes), default=next(iter(tastes)), help="what it makes of drafts")
    parser.add_argument("--latency-ms", type=float, default=0, help="wait this long before each paid answer")
    parser.add_argument("--ignore-idempotency", action="store_true", help="charge repeated Idempotency-Keys again")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the process that started it ends")
    args = parser.parse_args(argv)
    options = Options(
        models=(model, f"{model}-{args.taste}"),  # the second lets a study tell its tastes apart
        digest=source_digest(sources, args.taste),
        latency_seconds=args.latency_ms / 1000,
        honour_idempotency=not args.ignore_idempotency,
    )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        sys.stderr.write(
            f"Wanted to listen on {args.host}:{args.port}, saw: {error.strerror}. Choose another --port.\n"
        )
        return EXIT_PORT_IN_USE
    host, port = listener.getsockname()[:2]
    sys.stdout.write(json.dumps({"url": f"http://{host}:{port}/v1", "model": model, "digest": options.digest}) + "\n")
    sys.stdout.flush()
    asyncio.run(_serve(build_app(tastes[args.taste], options), listener, args.die_with_parent))
    return 0
