"""A weak model behind the OpenAI HTTP API: chat and plain completions, streamed or whole, batched.

    python -m cowest_serving.weak_server --model file:///models/weak --port 8101

Any causal-LM folder (safetensors), base or base + LoRA, on CPU or GPU. /readyz and /healthz are 200 only once the model
has really written a token; every answer names the digest of what is served. SIGTERM answers what was begun, then exits
0. Other exit codes: 2 the port or the model folder is no good, 75 the store is away, 1 a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from cowest_serving.answering import WEAK_MODEL, Refusal, parse_object, retry_hints
from cowest_serving.contract import HEADER_MODEL_DIGEST, KEEP_ALIVE_SECONDS
from cowest_serving.cores import free_threads
from cowest_serving.logs import (
    REASON_BAD_START,
    REASON_MODEL_FAILED,
    REASON_MODEL_REFUSED,
    REASON_STORE_AWAY,
    complain,
    log_to_stderr,
)
from cowest_serving.metrics import Metrics
from cowest_serving.model_files import ModelFolderError, check_model_folder, resolve_model
from cowest_serving.open_files import allow_many_connections
from cowest_serving.stopping import heed_signals
from cowest_serving.store import StoreError
from cowest_serving.weak_api import Asked, Prompt, Reply, parse_chat, parse_completion
from cowest_serving.weak_worker import Job, Worker

if TYPE_CHECKING:
    from cowest_serving.generate import Ask, Generation, Generator

log = logging.getLogger(__name__)
MAX_BODY = 8 * 1024 * 1024
DRAIN_SECONDS = 30
NOT_BEGUN = 499  # counted where a client left before there was an answer
EXIT_BAD_INPUT = 2
EXIT_RETRY = 75
METRICS = {
    "cowest_weak_requests_total": "Requests by path and status.",
    "cowest_weak_request_seconds": "Time from a request to the end of its answer.",
    "cowest_weak_ready": "1 when the model answers.",
    "cowest_weak_waiting_rows": "Answers that wait for a batch.",
    "cowest_weak_batches": "Batches since the start.",
    "cowest_weak_rows": "Answers since the start; divided by batches: the mean batch.",
    "cowest_weak_cancelled_rows": "Answers that nobody waited for any more.",
    "cowest_weak_prompt_tokens": "Tokens read since the start.",
    "cowest_weak_output_tokens": "Tokens written since the start.",
    "cowest_weak_busy_seconds": "Seconds in which a batch ran.",
}


# ---------------------------------------------------------------- the app
def build_app(worker: Worker, name: str) -> Starlette:
    """The HTTP face of a started `Worker`."""
    server = _Server(worker, name)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completion, methods=["POST"]),
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/models/{name:path}", server.model, methods=["GET"]),
            Route("/healthz", server.is_answering, methods=["GET"]),
            Route("/readyz", server.is_answering, methods=["GET"]),
            Route("/metrics", server.metrics, methods=["GET"]),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _http_error},
    )
    app.add_middleware(_Frame, server=server)
    return app


class _Server:
    def __init__(self, worker: Worker, name: str) -> None:
        self.worker = worker
        self.name = name
        self.counted = Metrics(METRICS)
        self.started = int(time.time())
        self._tokenizer: Any = None

    @property
    def digest(self) -> str:
        return self.worker.generator.digest if self.worker.generator else ""

    # ------------------------------------------------------------ answers
    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat(parse_object(await _body(request))))

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, parse_completion(parse_object(await _body(request))))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        self._refuse_other_models(asked.model)
        generator = self._generator()
        asks = await asyncio.to_thread(self._asks, generator, asked)
        job = Job(asks, streamed=asked.stream)
        reply = Reply(asked, self.digest, self._token_text)
        self.worker.submit(job)
        if asked.stream:
            return StreamingResponse(_events(job, reply), media_type="text/event-stream", headers=_NO_CACHE)
        rows = await _unless_gone(request, job)
        return _json(reply.whole(rows))

    def _generator(self) -> Generator:
        if not self.worker.ready or self.worker.generator is None:
            message = "The model is still being loaded; ask again when /readyz says so."
            raise Refusal(503, message, "api_error", code="not_ready", retry_after=1)
        return self.worker.generator

    def _refuse_other_models(self, model: str) -> None:
        if model not in (self.name, WEAK_MODEL, self.digest):
            message = f"model: wanted {self.name}, saw {model}. GET /v1/models lists what is served."
            raise Refusal(404, message, param="model", code="model_not_found")

    def _asks(self, generator: Generator, asked: Asked) -> list[Ask]:
        """The rows of a request. Raises `Refusal` for a prompt that the model cannot be asked."""
        from cowest_serving.generate import Ask, PromptError

        field = "messages" if asked.kind == "chat" else "prompt"
        try:
            prompts = [self._encoded(prompt) for prompt in asked.prompts]
            rooms = [generator.room(ids) for ids in prompts]
        except PromptError as error:
            code = "context_length_exceeded" if "context is" in str(error) else "invalid_value"
            raise Refusal(400, f"{field}: {error}.", param=field, code=code) from error
        return [
            Ask(
                prompt_ids=ids,
                max_tokens=asked.max_tokens or room or 1024,
                temperature=asked.temperature,
                seed=asked.seeds[i * asked.n + j],
                top_p=asked.top_p,
                stop=asked.stop,
                top_logprobs=asked.top_logprobs,
            )
            for i, (ids, room) in enumerate(zip(prompts, rooms, strict=True))
            for j in range(asked.n)
        ]

    def _encoded(self, prompt: Prompt) -> list[int]:
        from cowest_serving.generate import prompt_ids, render_prompt

        tokenizer = self._own_tokenizer()
        if isinstance(prompt, str):  # /v1/completions: raw text, which no template has given special tokens
            return prompt_ids(tokenizer, prompt, special_tokens=True)
        if isinstance(prompt, tuple):
            return list(prompt)
        return prompt_ids(tokenizer, render_prompt(tokenizer, prompt))  # type: ignore[arg-type]

    def _token_text(self, token_id: int) -> str:
        return str(self._own_tokenizer().decode([token_id]))

    def _own_tokenizer(self) -> Any:
        """A copy: the worker's thread decodes with the original at the same time."""
        if self._tokenizer is None:
            import copy

            self._tokenizer = copy.deepcopy(self._generator().tokenizer)
        return self._tokenizer

    # ------------------------------------------------------------ what is served, and is it
    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()] if self.worker.generator else []})

    async def model(self, request: Request) -> Response:
        self._refuse_other_models(request.path_params["name"])
        self._generator()
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        generator = self._generator()
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "cowest",
            "digest": generator.digest,
            "max_model_len": generator.context,
        }

    async def is_answering(self, _: Request) -> Response:
        ready = self.worker.ready and self.worker.alive
        return _json({"ready": ready, "digest": self.digest}, status=200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        values = {name: float(value) for name, value in vars(self.worker.counts).items()}
        values |= {"ready": float(self.worker.ready), "waiting_rows": float(self.worker.waiting)}
        gauges: dict[str, Mapping[tuple[tuple[str, str], ...], float]] = {
            f"cowest_weak_{name}": {(): value} for name, value in values.items()
        }
        return PlainTextResponse(self.counted.text(gauges))


_NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise Refusal(413, f"The body: wanted at most {MAX_BODY} bytes, saw more.", code="request_too_large")
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(request: Request, job: Job) -> list[Generation]:
    """All rows; a client that goes away before takes its rows out of the queue."""
    rows = asyncio.create_task(_all_rows(job))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({rows, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not rows.done():
            raise ClientDisconnect
        return rows.result()
    finally:
        job.cancel()
        rows.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all_rows(job: Job) -> list[Generation]:
    finished: dict[int, Any] = {}
    while len(finished) < len(job.asks):
        row, event = await job.next()
        finished[row] = event
    return [finished[row] for row in range(len(job.asks))]


async def _events(job: Job, reply: Reply) -> AsyncIterator[bytes]:
    """The server-sent events of a streamed answer; an error after the first byte becomes an event too."""
    from cowest_serving.generate import Piece

    finished: dict[int, Generation] = {}
    try:
        for chunk in reply.first_chunks():
            yield _event(chunk)
        while len(finished) < len(job.asks):
            row, event = await job.next()
            if isinstance(event, Piece):
                for chunk in reply.chunks(row, event):
                    yield _event(chunk)
            else:
                finished[row] = event
        if reply.asked.include_usage:
            yield _event(reply.usage_chunk([finished[row] for row in range(len(job.asks))]))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _event(_fault_refusal(error).body())
    finally:
        job.cancel()


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


# ---------------------------------------------------------------- refusals
def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _json(error.body(), error.status, retry_hints(error))


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, f"{error.detail}.", code="unknown_url" if error.status_code == 404 else None)
    return _json(refusal.body(), error.status_code, error.headers)


def _fault_refusal(error: Exception) -> Refusal:
    """The person at the other end gets the sentence; the stack trace is in the log."""
    return Refusal(500, f"The model failed: {type(error).__name__}: {error}", "api_error", code="weak_model_failed")


class _Frame:
    """Around every request: the digest's header, the counts, 500 for a fault, silence for a client that has gone."""

    def __init__(self, app: ASGIApp, server: _Server) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = NOT_BEGUN, time.monotonic()

        async def send_with_digest(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                digest = (HEADER_MODEL_DIGEST.encode(), self.server.digest.encode())
                message = {**message, "headers": [*message.get("headers", []), *([digest] if digest[1] else [])]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_digest)
        except ClientDisconnect:
            pass
        except Exception as error:
            # Here, since a handler of Starlette's for all exceptions would answer outside of this frame.
            if status == NOT_BEGUN:
                await _json(_fault_refusal(error).body(), 500)(scope, receive, send_with_digest)
            raise  # for the log
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.server.counted.count("cowest_weak_requests_total", path=path, status=str(status))
            if path.endswith("completions"):
                self.server.counted.observe("cowest_weak_request_seconds", time.monotonic() - started, path=path)


# ---------------------------------------------------------------- the process
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.die_with_parent is not None:
        _die_with_parent(args.die_with_parent)
    log_to_stderr("info")
    allow_many_connections()
    # Threads that wait for work must sleep: other processes share these cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        listening = _listen(args.host, args.port)
    except OSError as error:
        return _complain(_port_trouble(args.host, args.port, error), EXIT_BAD_INPUT, REASON_BAD_START)
    return _serve(args, listening)


def _serve(args: argparse.Namespace, listening: socket.socket) -> int:
    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    worker = Worker(lambda: _load(args), on_failure, args.max_batch, args.max_waiting)
    app = build_app(worker, args.name)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)
    heed_signals(server)
    worker.start()
    server.run(sockets=[listening])
    ended = worker.close(timeout=5)
    code = _failure_code(failures[0]) if failures else 0
    if not ended:  # in the middle of loading or of a batch that nobody waits for; torch cannot be interrupted otherwise
        logging.shutdown()
        os._exit(code)
    return code


def _load(args: argparse.Namespace) -> Generator:
    folder = resolve_model(args.model)
    check_model_folder(folder)  # before the seconds that importing torch takes
    from cowest_serving.generate import Generator

    threads = free_threads() if args.threads == "auto" else int(args.threads)
    generator = Generator.load(folder, args.device, threads)
    loaded = (args.model, generator.digest, generator.model.device, threads)
    log.info("%s: %s on %s, %d threads", *loaded, extra={"reason": "ModelLoaded"})
    return generator


def _failure_code(error: Exception) -> int:
    if isinstance(error, ModelFolderError):
        return _complain(str(error), EXIT_BAD_INPUT, REASON_MODEL_REFUSED)
    if isinstance(error, StoreError) and error.retryable:
        return _complain(str(error), EXIT_RETRY, REASON_STORE_AWAY)
    if isinstance(error, StoreError):
        return _complain(str(error), EXIT_BAD_INPUT, REASON_MODEL_REFUSED)
    log.error("the model cannot be served", exc_info=error, extra={"reason": REASON_MODEL_FAILED})
    return _complain(f"the model cannot be served: {type(error).__name__}: {error}", 1, REASON_MODEL_FAILED)


def _complain(message: str, code: int, reason: str) -> int:
    complain(f"weak_server: {message}", reason)
    return code


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at once, so that of two servers for one port the second one is told."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except BaseException:
        listening.close()
        raise
    return listening


def _port_trouble(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"wanted to listen on {host}:{port}, saw that another process does; stop it or choose another --port"
    return f"wanted to listen on {host}:{port}, saw: {error.strerror or error}; choose another --host or --port"


def _die_with_parent(parent: int) -> None:
    """Linux kills this process when the thread that started it ends. `parent`: its process id, 0 if not told."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent and os.getppid() != parent:  # it was gone before the line above
        os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cowest_serving.weak_server", description="Serve a weak model over the OpenAI HTTP API."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="URI", help="a folder, file://, s3:// or hf://org/name[@revision]")
    add("--port", required=True, type=_at_least(0), help="0 takes any free one")
    add("--host", default="127.0.0.1")
    add("--name", default=WEAK_MODEL, help="the model's name in the API (default: %(default)s)")
    add("--threads", default="auto", type=_threads, help="auto: what is free on this machine now")
    add("--max-batch", default=32, type=_at_least(1), help="answers computed together (default: %(default)s)")
    add(
        "--max-waiting",
        default=1024,
        type=_at_least(1),
        help="answers that may wait; beyond, 429 (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add(
        "--die-with-parent", nargs="?", const=0, type=int, metavar="PID",
        help="end when the process (Linux: the thread) that started this one ends; with its PID also if it already has",
    )  # fmt: skip
    return parser


def _threads(text: str) -> str:
    if text != "auto":
        _at_least(1)(text)
    return text


def _at_least(least: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at least {least}, saw {text!r}")
        return int(text)

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
