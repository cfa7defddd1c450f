"""The collaboration gateway: an OpenAI-compatible endpoint for the pair.

    python -m cowest_serving.app --routing routing.json --job job.json --store file:///data --port 8080

Which arm answers is said by the routing file that it follows; the gateway itself never decides. Keys come from
the environment alone: COWEST_STRONG_API_KEYS for the strong model, COWEST_CLIENT_API_KEYS for who may ask (separated
by newlines; none given: everybody).
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message as Event
from starlette.types import Receive, Scope, Send

from cowest_serving.answering import (
    Answering,
    ChatRequest,
    Models,
    Record,
    Refusal,
    bad_field,
    optional,
    parse_chat,
    parse_object,
    seconds_to_wait,
    user_hash,
)
from cowest_serving.contract import (
    HEADER_ARM,
    HEADER_IDEMPOTENCY,
    HEADER_MODE,
    HEADER_PAIR,
    HEADER_REQUEST_ID,
    HEADER_SESSION,
    HEADER_STRONG,
    HEADER_WEAK,
    Collaboration,
    SettingsError,
    Strong,
    parse,
)
from cowest_serving.metrics import Metrics
from cowest_serving.routing import FileRouting, RoutingSource, choose_arm
from cowest_serving.store import StoreError
from cowest_serving.traces import TraceSink, TraceWriter, sampled

log = logging.getLogger(__name__)
MAX_BODY = 4 * 1024 * 1024
METRICS = {
    "cowest_answers_total": "Answers by arm, mode and status.",
    "cowest_answer_seconds": "Time from the request to the end of its answer.",
    "cowest_draft_seconds": "Time of the draft.",
    "cowest_feedback_total": "Feedback taken or refused.",
    "cowest_refused_requests_total": "Requests refused before any model was asked, by status.",
    "cowest_trace_rows": "Records by what became of them.",
    "cowest_requests_in_flight": "Answers being made now.",
    "cowest_routing_version": "Version of the routing that holds.",
    "cowest_routing_errors": "Routings that could not be read.",
    "cowest_arm_weight_percent": "Share of the traffic by arm.",
}


@dataclass(frozen=True)
class TraceSettings:
    content_sample_percent: int


@dataclass(frozen=True)
class GatewaySettings:
    """The sections of a defaulted spec that the gateway reads."""

    strong: Strong
    collaboration: Collaboration
    traces: TraceSettings | None = None


def build_app(
    settings: GatewaySettings,
    routing: RoutingSource,
    traces: TraceSink,
    *,
    strong_keys: Sequence[str] = (),
    client_keys: Sequence[str] = (),
) -> Starlette:
    models = Models(settings.strong, strong_keys)
    gateway = Gateway(settings, routing, traces, models, client_keys)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(routing.watch())
        await traces.start()
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await models.aclose()
            await traces.aclose()  # last, after every answer has its record

    return Starlette(
        routes=[
            Route("/v1/chat/completions", Chat(gateway), methods=["POST"]),
            Route("/v1/models", gateway.models, methods=["GET"]),
            Route("/v1/feedback", gateway.feedback, methods=["POST"]),
            Route("/healthz", gateway.healthz, methods=["GET"]),
            Route("/readyz", gateway.readyz, methods=["GET"]),
            Route("/metrics", gateway.metrics, methods=["GET"]),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _refused_by_router},
        lifespan=lifespan,
    )


class Gateway:
    """What all endpoints share: settings, routing, records and metrics."""

    def __init__(
        self,
        settings: GatewaySettings,
        routing: RoutingSource,
        traces: TraceSink,
        models: Models,
        client_keys: Sequence[str],
    ) -> None:
        self.routing, self.traces = routing, traces
        self.answering = Answering(settings.strong, settings.collaboration, models)
        self.count = Metrics(METRICS)
        self.in_flight = 0
        self._client_keys = tuple(key.encode() for key in client_keys if key)
        self._sample_percent = settings.traces.content_sample_percent if settings.traces else 100

    def check_key(self, authorization: str) -> None:
        if not self._client_keys:
            return
        given = authorization.removeprefix("Bearer ").encode()
        # All are compared, each in constant time, so that timing tells nothing.
        if not any([hmac.compare_digest(given, key) for key in self._client_keys]):
            message = "Wrong or missing API key: send `Authorization: Bearer <key>` with a key of this gateway."
            raise Refusal(401, message, "authentication_error", code="invalid_api_key")

    def begin(self, request: ChatRequest) -> Record:
        """Choose the arm that answers. A client has no say in it."""
        routing = self.routing.current
        if routing is None:
            raise Refusal(503, "The gateway has no routing yet.", "api_error", code="not_ready", retry_after=1)
        arm = choose_arm(routing, request.sticky_key)
        return Record(request, arm, routing.version, arm.mode)

    def finish(self, record: Record) -> None:
        """Everything that remains of an answer. A fault here must not spoil it."""
        self.traces.add(sampled(record.row(), self._sample_percent))
        labels: dict[str, str] = {"arm": record.arm.name, "mode": record.mode}
        self.count.count("cowest_answers_total", **labels, status=record.status)
        seconds = time.monotonic() - record.started
        self.count.observe("cowest_answer_seconds", seconds, **labels)
        if record.draft_ms is not None:
            self.count.observe("cowest_draft_seconds", record.draft_ms / 1000, arm=record.arm.name)
        level = logging.DEBUG if record.status == "ok" else logging.WARNING
        kinds = ", ".join(error.partition(":")[0] for error in record.errors)  # a message may quote content
        log.log(
            level,
            "%s %s %s %s %.3f s %s",
            record.request.id,
            record.arm.name,
            record.mode,
            record.status,
            seconds,
            kinds,
        )

    # ------------------------------------------------------------ the small endpoints
    async def models(self, request: Request) -> Response:
        self.check_key(request.headers.get("authorization", ""))
        model = {"id": "cowest", "object": "model", "created": 0, "owned_by": "cowest"}
        return _json({"object": "list", "data": [model]})

    async def feedback(self, request: Request) -> Response:
        """A score or a late reference for an answer, by its request id (its record may come later)."""
        self.check_key(request.headers.get("authorization", ""))
        try:
            row = feedback_row(await _body(request.scope, request.receive), request.headers.get(HEADER_SESSION))
        except Refusal:
            self.count.count("cowest_feedback_total", result="refused")
            raise
        if not self.traces.add_feedback(row):
            raise Refusal(503, "Feedback cannot be kept now.", "api_error", code="store_full", retry_after=5)
        self.count.count("cowest_feedback_total", result="taken")
        return _json({"id": row["feedback_id"]})

    async def healthz(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        routing = self.routing.current
        if routing is None:
            return _json({"ready": False, "reason": "no routing yet"}, status=503)
        return _json({"ready": True, "routing_version": routing.version})

    async def metrics(self, _: Request) -> Response:
        routing = self.routing.current
        weights = {arm.name: float(arm.weight_percent) for arm in routing.arms} if routing else {}
        rows = self.traces.counts()
        text = self.count.text(
            {
                "cowest_trace_rows": {(("state", state),): float(n) for state, n in rows.items()},
                "cowest_requests_in_flight": {(): float(self.in_flight)},
                "cowest_routing_version": {(): float(routing.version if routing else 0)},
                "cowest_routing_errors": {(): float(self.routing.errors)},
                "cowest_arm_weight_percent": {(("arm", name),): weight for name, weight in weights.items()},
            }
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def feedback_row(data: bytes, session: str | None) -> dict[str, Any]:
    """By FEEDBACK_COLUMNS. Raises `Refusal` 400 that names the field."""
    body = parse_object(data)
    trace_id = body.get("request_id")
    if not isinstance(trace_id, str) or not trace_id.strip() or len(trace_id) > 200:
        raise bad_field("request_id", "the x-request-id of an answer", trace_id)
    score = body.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and 0 <= score <= 1):
        raise bad_field("score", "a number from 0 to 1", score)
    reference = optional(body, "reference", str, "text")
    comment = optional(body, "comment", str, "text")
    if score is None and not reference and not comment:
        raise Refusal(400, "Wanted at least one of score, reference and comment, saw none.", code="no_feedback")
    return {
        "feedback_id": uuid.uuid4().hex,
        "trace_id": trace_id.strip(),
        "time": datetime.now(UTC),
        "score": None if score is None else float(score),
        "reference": reference,
        "comment": comment,
        "source": user_hash(optional(body, "user", str, "text") or session),
    }


# ---------------------------------------------------------------- chat
class Chat:
    """`POST /v1/chat/completions`, straight on ASGI: chunks pass at once, a client that leaves is seen."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = uuid.uuid4().hex
        headers = _headers(scope)
        try:
            self._gateway.check_key(headers.get("authorization", ""))
            request = parse_chat(
                await _body(scope, receive),
                request_id,
                session=headers.get(HEADER_SESSION),
                idempotency_key=headers.get(HEADER_IDEMPOTENCY),
            )
            record = self._gateway.begin(request)
        except Refusal as refusal:
            self._gateway.count.count("cowest_refused_requests_total", status=str(refusal.status))
            await _refusal(refusal, request_id)(scope, receive, send)
            return
        self._gateway.in_flight += 1
        try:
            await _unless_gone(self._respond(record, send), receive)
        finally:
            self._gateway.in_flight -= 1

    async def _respond(self, record: Record, send: Send) -> None:
        """Answer, and keep the record whatever happens."""
        response = Reply(send, record, self._gateway)
        try:
            if record.request.stream:
                await self._stream(record, response)
            else:
                body = orjson.dumps(await self._gateway.answering.answer(record))
                await response.whole(200, body)
        except Refusal as refusal:
            await response.refuse(refusal)
        except asyncio.CancelledError:
            record.failed("client_gone", "the client left before its answer was complete")
            raise
        except Exception as error:
            log.exception("%s failed by a fault of the gateway", record.request.id)
            record.failed("strong_failed", f"internal: {type(error).__name__}")
            fault = Refusal(500, "A fault of the gateway; its log has more.", "api_error", code="internal")
            await response.refuse(fault)
        finally:
            response.keep_record()

    async def _stream(self, record: Record, response: Reply) -> None:
        events = self._gateway.answering.stream(record)
        async with aclosing(events):
            async for event in events:
                await response.part(event)
        await response.end()


class Reply:
    """One response. Its record is kept before its last byte goes out: a sink may make it durable by then."""

    def __init__(self, send: Send, record: Record, gateway: Gateway) -> None:
        self._send, self._record, self._gateway = send, record, gateway
        self._is_begun = self._is_kept = False

    async def refuse(self, refusal: Refusal) -> None:
        body = orjson.dumps(refusal.body())
        if self._is_begun:  # in the middle of a stream
            await self.part(b"data: " + body + b"\n\n")
            await self.end()
        else:
            await self.whole(refusal.status, body, seconds_to_wait(refusal))

    async def whole(self, status: int, body: bytes, retry_after: str | None = None) -> None:
        more = [(b"retry-after", retry_after.encode())] if retry_after else []
        length = (b"content-length", str(len(body)).encode())
        await self._begin(status, [(b"content-type", b"application/json"), length, *more])
        await self._finish(body)

    async def part(self, data: bytes) -> None:
        if not self._is_begun:
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            await self._begin(200, [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._finish(b"")

    def keep_record(self) -> None:
        if not self._is_kept:
            self._is_kept = True
            self._gateway.finish(self._record)

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._is_begun = True
        headers = [*headers, *_own_headers(self._record)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _finish(self, body: bytes) -> None:
        self.keep_record()
        await self._send({"type": "http.response.body", "body": body})


def _own_headers(record: Record) -> list[tuple[bytes, bytes]]:
    values = {
        HEADER_REQUEST_ID: record.request.id,
        HEADER_ARM: record.arm.name,
        HEADER_MODE: record.mode,
        HEADER_PAIR: record.arm.pair.digest,
        HEADER_WEAK: record.weak_digest,
        HEADER_STRONG: record.strong_model,
    }
    # A model name comes from outside: it must not break out of its header.
    return [
        (name.encode(), " ".join(value.split()).encode("latin-1", "replace")) for name, value in values.items() if value
    ]


async def _unless_gone(answering: Any, receive: Receive) -> None:
    """Do the work, but stop it as soon as the client has left."""
    work = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not work.done():
            work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    if not work.cancelled() and (error := work.exception()) is not None:
        raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- requests and responses
def _headers(scope: Scope) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises `Refusal` 413 as soon as it is known to be too large."""
    declared = _headers(scope).get("content-length", "")
    too_large = Refusal(413, f"The body is larger than {MAX_BODY // 1024 // 1024} MiB.", code="body_too_large")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    while True:
        event: Event = await receive()
        if event["type"] == "http.disconnect":
            raise Refusal(400, "The client left in the middle of its request.", code="client_gone")
        size += len(event.get("body", b""))
        if size > MAX_BODY:
            raise too_large
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def _refusal(refusal: Refusal, request_id: str) -> Response:
    headers = {HEADER_REQUEST_ID: request_id}
    if wait := seconds_to_wait(refusal):
        headers["retry-after"] = wait
    return _json(refusal.body(), refusal.status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refusal(error, uuid.uuid4().hex)


async def _refused_by_router(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    response = _refusal(Refusal(error.status_code, message, code="unknown_url"), uuid.uuid4().hex)
    response.headers.update(error.headers or {})
    return response


# ---------------------------------------------------------------- the process
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        settings = load_settings(options.job)
        writer = TraceWriter(options.store, f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
        listener = socket.create_server((options.host, options.port), backlog=2048)
    except (SettingsError, StoreError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(
            f"{options.host}:{options.port} cannot be listened on ({error.strerror}). "
            "Stop what uses the port, or give another with --port.\n"
        )
        return 2
    app = build_app(
        settings,
        FileRouting(options.routing),
        writer,
        strong_keys=_keys("COWEST_STRONG_API_KEYS"),
        client_keys=_keys("COWEST_CLIENT_API_KEYS"),
    )
    if options.die_with_parent:
        threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    # uvicorn raises the signal again after its shutdown; asked to stop and stopped is a success.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=30,
    )
    log.info("The gateway listens on http://%s:%d", *listener.getsockname()[:2])
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def load_settings(path: Path) -> GatewaySettings:
    """From a defaulted CollaborationJob, or its bare spec, as YAML or JSON. Raises `SettingsError`."""
    try:
        job = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: wanted a CollaborationJob as YAML or JSON, saw: {error}") from None
    if not isinstance(job, dict):
        raise SettingsError(f"{path}: wanted an object, saw {type(job).__name__}")
    return parse(GatewaySettings, job.get("spec", job))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cowest_serving.app", description="The collaboration gateway.")
    parser.add_argument("--routing", type=Path, required=True, help="JSON file of the routing, followed while it runs")
    parser.add_argument("--job", type=Path, required=True, help="defaulted CollaborationJob, YAML or JSON")
    parser.add_argument("--store", required=True, help="URI of the object store for traces and feedback")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--die-with-parent", action="store_true", help="stop when the process that started it ends")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _keys(name: str) -> list[str]:
    return [key.strip() for key in os.environ.get(name, "").splitlines() if key.strip()]


def _follow_parent(parent: int) -> None:
    """Not PR_SET_PDEATHSIG: that fires when the parent's *thread* ends."""
    while os.getppid() == parent:
        time.sleep(0.25)
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
