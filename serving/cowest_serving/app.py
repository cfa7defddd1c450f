"""The collaboration gateway: an OpenAI-compatible endpoint for the pair.

    python -m cowest_serving.app --routing routing.json --job job.json --store file:///data --port 8080

Which arm answers is said by the routing file that it follows; the gateway itself never decides. Keys come from the
environment, separated by newlines, or as files in a folder that is followed, so that a Secret may be rotated:
COWEST_STRONG_API_KEYS and COWEST_STRONG_API_KEYS_FOLDER for the strong model, COWEST_CLIENT_API_KEYS and
COWEST_CLIENT_API_KEYS_FOLDER for who may ask (neither given: everybody); the name of a key's file, or its line of
COWEST_CLIENT_APPLICATIONS, is its application's. COWEST_STRONG_FALLBACK_API_KEYS has a line
for each of spec.strong.fallbacks, empty for one without a key; its _FOLDER has a folder for each: 00, 01, ...

With --spool a record is on this machine's disk before its answer is complete, and the answer says so: header
x-cowest-trace: durable, or the comment `: trace durable` before the end of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import orjson
import uvicorn
import yaml

from cowest_serving.allowance import METRICS as ALLOWANCE_METRICS
from cowest_serving.allowance import Allowance, allowance_of
from cowest_serving.answering import (
    MOST_DRAFTS,
    Answering,
    ChatRequest,
    Models,
    Record,
    Refusal,
    own_key,
    parse_chat,
    retry_hints,
    wrong_key,
)
from cowest_serving.client_limits import ClientLimits, Gate, LimitReached, Ticket
from cowest_serving.contract import (
    HEADER_ARM,
    HEADER_IDEMPOTENCY,
    HEADER_MODE,
    HEADER_PAIR,
    HEADER_REQUEST_ID,
    HEADER_SESSION,
    HEADER_STRONG,
    HEADER_TRACE,
    HEADER_WEAK,
    KEEP_ALIVE_SECONDS,
    Collaboration,
    SettingsError,
    Shortcuts,
    Strong,
    parse,
)
from cowest_serving.description import description
from cowest_serving.drafts import DraftCache
from cowest_serving.front_door import CROWDED, WHEN_GONE, FrontDoor
from cowest_serving.health import METRICS as ENDPOINT_METRICS
from cowest_serving.hedging import Hedging
from cowest_serving.ids import new_id
from cowest_serving.key_files import CLIENT_KEYS, Keys, keys_of
from cowest_serving.logs import log_to_stderr, traced
from cowest_serving.metrics import GEN_AI, Metrics
from cowest_serving.open_files import allow_many_connections, connections_within
from cowest_serving.routes import Routes
from cowest_serving.routing import FileRouting, RoutingSource, choose_arm
from cowest_serving.shared_counts import SharedCounts
from cowest_serving.stopping import heed_signals
from cowest_serving.store import StoreError, prepare
from cowest_serving.traces import SpooledTraces, TraceSink, TraceWriter, is_sampled
from cowest_serving.words import TEXTS, Repeats, feedback_row, word_key
from cowest_serving.workers import OWN_METRICS, Place, Siblings, add_flags, listeners_beside, supervise

log = logging.getLogger(__name__)
MAX_BODY, MAX_CONCURRENCY = 4 * 1024 * 1024, 2048  # bytes, and requests under way, where no manifest says them
CONNECTIONS = 4  # of clients for each request that may be under way: many are idle
KEYS_EVERY_SECONDS = 1.0
DURABLE = "durable"
DONE = b"data: [DONE]\n\n"
CHAT, MODELS, FEEDBACK = "/v1/chat/completions", "/v1/models", "/v1/feedback"
MODEL = {"id": "cowest", "object": "model", "created": 0, "owned_by": "cowest"}
ENDPOINTS = "POST /v1/chat/completions, POST /v1/feedback and GET /v1/models; GET /openapi.json describes them"
Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
METRICS = {
    **GEN_AI,
    "cowest_answers_total": "Answers by arm, mode and status.",
    "cowest_answer_seconds": "Time from the request to the end of its answer.",
    "cowest_draft_seconds": "Time of the draft.",
    "cowest_draft_cache_total": "Drafts by where they came from: made, cached, or shared with an equal request.",
    "cowest_draft_cache_entries": "Drafts that are kept.",
    "cowest_routed_total": "Requests for which a predictor found a shortcut, and how they went: shortcut or usual.",
    "cowest_hedged_calls": "Second calls of the strong model: won or lost; held_back were due and not made.",
    "cowest_feedback_total": "Feedback taken or refused.",
    "cowest_client_requests_total": "Chats by the application whose key they came with.",
    "cowest_client_requests_limited_total": "Chats and feedback refused by spec.gateway.limits, by limit.",
    "cowest_refused_requests_total": "Requests refused before any model was asked, by status.",
    "cowest_crowded_requests_total": "Requests refused as a process had as many of them, or of connections, as it may.",
    "cowest_trace_rows": "Records by what became of them.",
    "cowest_trace_spool_bytes": "Records on this machine's disk that the store has not taken yet.",
    "cowest_trace_spool_trouble": "1 while answers go out without a durable record: the spool is full or fails.",
    "cowest_requests_in_flight": "Answers being made now.",
    "cowest_tasks": "Tasks of the event loop: a number that only grows is a leak.",
    "cowest_routing_version": "Version of the routing that holds.",
    "cowest_routing_errors": "Routings that could not be read.",
    "cowest_arm_weight_percent": "Share of the traffic by arm.",
    **ALLOWANCE_METRICS,
    **ENDPOINT_METRICS,
}


@dataclass(frozen=True)
class TraceSettings:
    content_sample_percent: int
    spool_bytes: int | None = None  # no limit
    when_spool_full: Literal["Answer", "Refuse"] = "Answer"


@dataclass(frozen=True)
class GatewayLimits:
    limits: ClientLimits | None = None  # of each client key
    max_body_bytes: int = MAX_BODY
    max_concurrency: int = MAX_CONCURRENCY


@dataclass(frozen=True)
class WeakSettings:
    max_concurrency: int = MOST_DRAFTS


@dataclass(frozen=True)
class GatewaySettings:
    """The sections of a defaulted spec that the gateway reads."""

    strong: Strong
    collaboration: Collaboration
    traces: TraceSettings | None = None
    gateway: GatewayLimits | None = None
    weak: WeakSettings | None = None


@dataclass(frozen=True)
class AllKeys:
    """Whose keys are which: the strong model's, those of each of its fallbacks, the clients'."""

    strong: Keys
    fallbacks: tuple[Keys, ...]
    clients: Keys


@dataclass
class Stop:
    """Whether the process was told to stop; it may still be answering."""

    is_asked: bool = False


def build_app(
    settings: GatewaySettings,
    routing: RoutingSource,
    traces: TraceSink,
    *,
    strong_keys: Keys | None = None,
    fallback_keys: Sequence[Keys] = (),
    client_keys: Keys | None = None,
    allowance: Allowance | None = None,
    stop: Stop | None = None,
) -> App:
    """The gateway as an ASGI application."""
    keys = AllKeys(strong_keys or Keys(), tuple(fallback_keys), client_keys or Keys())
    return App(Gateway(settings, routing, traces, keys, stop or Stop(), allowance))


class App:
    """Dispatch by path, and the life of what runs beside the requests. No object of a framework for a request."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self._chat = gateway, Chat(gateway)
        self._small: Mapping[str, tuple[str, Small]] = {
            MODELS: ("GET", gateway.models),
            FEEDBACK: ("POST", gateway.feedback),
            "/openapi.json": ("GET", gateway.openapi),
            "/healthz": ("GET", gateway.healthz),
            "/readyz": ("GET", gateway.readyz),
            "/metrics": ("GET", gateway.metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path == CHAT and scope["method"] == "POST":
                await self._chat(scope, receive, send)
            else:
                await (await self._answer(path, scope, receive)).send(send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> Whole:
        try:
            if path in self._small:
                wanted, endpoint = self._small[path]
            elif path.startswith(f"{MODELS}/"):
                wanted, endpoint = "GET", self.gateway.model
            elif path == CHAT:
                return _unknown(scope, 405, "Method Not Allowed", {"allow": "POST"})
            else:
                return _unknown(scope, 404, "Not Found")
            if scope["method"] != wanted and (scope["method"], wanted) != ("HEAD", "GET"):
                return _unknown(scope, 405, "Method Not Allowed", {"allow": wanted})
            return await endpoint(scope, receive)
        except Refusal as refusal:
            return _refusal(refusal, new_id())

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            watching = await self.gateway.start()
        except BaseException as error:
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.gateway.end(watching)
        await send({"type": "lifespan.shutdown.complete"})


class Gateway:
    """What all endpoints share: settings, routing, records and metrics."""

    def __init__(
        self,
        settings: GatewaySettings,
        routing: RoutingSource,
        traces: TraceSink,
        keys: AllKeys,
        stop: Stop,
        allowance: Allowance | None = None,
    ) -> None:
        self.routing, self.traces = routing, traces
        self.count = Metrics(METRICS)
        self.in_flight = 0  # answers
        self._under_way = 0  # requests, whose body may still be on its way
        self.siblings: Siblings | None = None  # where several workers share the port
        self._settings, self._stop, self._allowance = settings, stop, allowance
        self._keys, self._client_keys = keys, keys.clients
        limits = settings.gateway or GatewayLimits()
        self._gate = Gate(limits.limits) if limits.limits else None
        self.max_body, self.max_concurrency = limits.max_body_bytes, limits.max_concurrency
        self._sample_percent = settings.traces.content_sample_percent if settings.traces else 100
        self._refuses_when_full = settings.traces is not None and settings.traces.when_spool_full == "Refuse"
        shortcuts = settings.collaboration.shortcuts or Shortcuts()
        self._drafts = DraftCache(shortcuts.draft_cache) if shortcuts.draft_cache else None
        self._hedging = Hedging(shortcuts.hedge) if shortcuts.hedge else None
        self._repeats = Repeats()
        routes = Routes(shortcuts) if shortcuts.routed else None
        self._models = Models(
            settings.strong,
            keys.strong.current,
            [fallback.current for fallback in keys.fallbacks],
            allowance,
            self._hedging,
            draft_max_tokens=settings.collaboration.draft_max_tokens,
            most_drafts=(settings.weak or WeakSettings()).max_concurrency,
        )
        self.answering = Answering(settings.strong, settings.collaboration, self._models, self._drafts, routes)

    def join(self, place: Place) -> None:
        """As one of several workers: counters are told together, and the limits of a client hold for all of them."""
        self.siblings = place.siblings
        if self._gate is not None:
            number, workers = place.siblings.number, len(place.siblings.ports)
            self._gate.counts = SharedCounts(place.counts, self._gate.limits, number, workers)

    async def watch_keys(self) -> None:
        """Take up rotated keys until cancelled."""
        while True:
            await asyncio.sleep(KEYS_EVERY_SECONDS)
            if self._client_keys.load():
                log.info("%d client keys are read anew.", len(self._client_keys.current))
                if self._gate is not None:
                    self._gate.counts.keep(self._client_keys.current)
            changed = [keys for keys in (self._keys.strong, *self._keys.fallbacks) if keys.load()]
            if changed:
                log.info("%d keys of the strong model are read anew.", sum(len(keys.current) for keys in changed))
                fallbacks = [fallback.current for fallback in self._keys.fallbacks]
                self._models.renew_keys(self._keys.strong.current, fallbacks)

    async def start(self) -> list[asyncio.Task[None]]:
        watching = [asyncio.create_task(self.routing.watch()), asyncio.create_task(self.watch_keys())]
        await self.traces.start()
        if self._allowance is not None:
            await self._allowance.start()
        return watching

    async def end(self, watching: list[asyncio.Task[None]]) -> None:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await self._models.aclose()
        if self._allowance is not None:
            await self._allowance.aclose()  # after all answers: what was not spent is given back
        await self.traces.aclose()  # last, after every answer has its record

    def enter(self, scope: Scope) -> None:
        """Take a request in, unless the process has as much to do as it may. Who has entered leaves."""
        if self._under_way >= self.max_concurrency:
            limit = "requests"
        elif CROWDED in scope.get("extensions", ()):
            limit = "connections"
        else:
            self._under_way += 1
            return
        self.count.count("cowest_crowded_requests_total", limit=limit)
        message = (
            f"This gateway has as many {limit} as it may, with spec.gateway.maxConcurrency {self.max_concurrency}. "
            "Ask again in a second, or have that or spec.gateway.replicas raised."
        )
        raise Refusal(503, message, "api_error", code="too_busy", retry_after=1)

    def leave(self) -> None:
        self._under_way -= 1

    def check_key(self, authorization: str) -> str:
        """The client's key; "" where everybody may ask."""
        if not self._client_keys.are_wanted:
            return ""
        given = self._client_keys.shown(authorization)
        if given is None:
            raise wrong_key("gateway")
        return given

    def admit(self, key: str, record: Record) -> Ticket | None:
        """Count a request of this key, which may have come too often. None: nothing is limited."""
        if key:
            record.application = self._client_keys.names.get(key, "")
            self.count.count("cowest_client_requests_total", application=record.application)
        if self._gate is None:
            return None
        try:
            return self._gate.enter(key, record.request)
        except LimitReached as refusal:
            self._note_limit(record.application, refusal)
            raise

    def _admit_word(self, key: str, size: int) -> None:
        """Count a word of feedback of this key, of so many bytes. No model is asked."""
        if self._gate is None:
            return
        try:
            self._gate.hear(key, size)
        except LimitReached as refusal:
            self._note_limit(self._client_keys.names.get(key, ""), refusal)
            raise

    def _note_limit(self, application: str, refusal: LimitReached) -> None:
        self.count.count("cowest_client_requests_limited_total", application=application, limit=refusal.kind)

    def begin(self, request: ChatRequest) -> Record:
        """Choose the arm that answers. A client has no say in it."""
        routing = self.routing.current
        if routing is None:
            raise Refusal(503, "The gateway has no routing yet.", "api_error", code="not_ready", retry_after=1)
        self._check_spool()
        arm = choose_arm(routing, request.sticky_key)
        return Record(request, arm, routing.version, arm.mode)

    def _check_spool(self) -> None:
        """Where the manifest wants no answer without its record."""
        if self._refuses_when_full and self.traces.is_full:
            message = "The gateway cannot keep records now, and traces.whenSpoolFull is Refuse."
            raise Refusal(503, message, "api_error", code="spool_full", retry_after=5)

    def finish(self, record: Record) -> asyncio.Future[bool] | None:
        """Everything that remains of an answer. A fault here must not spoil it. Await it to know if it is durable."""
        kept = self.traces.keep(self._row(record), others=self.in_flight - 1)
        labels: dict[str, str] = {"arm": record.arm.name, "mode": record.mode}
        self.count.count("cowest_answers_total", **labels, status=record.status)
        seconds = time.monotonic() - record.started
        self.count.observe("cowest_answer_seconds", seconds, **labels)
        if record.draft_ms is not None:
            self.count.observe("cowest_draft_seconds", record.draft_ms / 1000, arm=record.arm.name)
        if record.way.found is not None:
            went = "shortcut" if record.way.taken else "usual"
            self.count.count("cowest_routed_total", shortcut=record.way.found, went=went)
        if record.draft_source is not None:
            self.count.count("cowest_draft_cache_total", source=record.draft_source)
        for call in record.model_calls():
            self.count.observe_call(call)
        level = logging.DEBUG if record.status == "ok" else logging.WARNING
        if log.isEnabledFor(level):
            said = (record.request.id, record.arm.name, record.mode, record.status, seconds, ", ".join(record.kinds))
            log.log(level, "%s %s %s %s %.3f s %s", *said)
        return kept

    def _row(self, record: Record) -> dict[str, Any]:
        """Without its texts where it is not in the sample; and where what they hold cannot be hidden."""
        if not is_sampled(record.request.id, self._sample_percent):
            return record.bare_row()
        try:
            return record.row()
        except Exception as error:
            log.error(
                "%s has a record without its texts, by a fault of the gateway: %s", record.request.id, traced(error)
            )
            return record.bare_row(f"record: {type(error).__name__}")

    # ------------------------------------------------------------ the small endpoints
    async def models(self, scope: Scope, _: Receive) -> Whole:
        self.check_key(_header(scope, b"authorization"))
        return _json({"object": "list", "data": [MODEL]})

    async def model(self, scope: Scope, _: Receive) -> Whole:
        self.check_key(_header(scope, b"authorization"))
        if not scope["path"].endswith(f"{MODELS}/{MODEL['id']}"):
            message = f"Listed is the model {MODEL['id']} alone; a chat may name any, since the pair answers them all."
            raise Refusal(404, message, param="model", code="model_not_found")
        return _json(MODEL)

    async def feedback(self, scope: Scope, receive: Receive) -> Whole:
        """A score or a late reference for an answer, by its request id.

        An unknown id is no error: the answer's record may come later, or by another gateway. Nor is a reference that
        the evaluator cannot go by: the gateway knows none, and the counts of traces say so.
        """
        self.enter(scope)
        try:
            return await self._heard(scope, receive)
        finally:
            self.leave()

    async def _heard(self, scope: Scope, receive: Receive) -> Whole:
        client_key = self.check_key(_header(scope, b"authorization"))
        try:
            self._check_spool()
            data, key = await _body(scope, receive, self.max_body), word_key(_header(scope, _IDEMPOTENCY), client_key)
            self._admit_word(client_key, len(data))
            row, records_key = feedback_row(data, _header(scope, _SESSION) or None, key)
            is_durable = self._repeats.again(key, data)
            if is_durable is None:
                is_durable = await self._keep_word(row, records_key)
                self._repeats.remember(key, data, is_durable)
        except Refusal:
            self.count.count("cowest_feedback_total", result="refused")
            raise
        self.count.count("cowest_feedback_total", result="taken")
        return _json({"id": row["feedback_id"]}, headers={HEADER_TRACE: DURABLE} if is_durable else {})

    async def _keep_word(self, row: dict[str, Any], records_key: str) -> bool:
        hidden = self.answering.hidden({name: row[name] for name in TEXTS}, records_key)
        kept = self.traces.keep_feedback({**row, **hidden})
        if kept is None:
            raise Refusal(503, "Feedback cannot be kept now.", "api_error", code="store_full", retry_after=5)
        return await kept

    async def openapi(self, _: Scope, __: Receive) -> Whole:
        """For generators of clients. It is the same for everybody, so no key is asked for."""
        return Whole(await asyncio.to_thread(description), headers=((b"cache-control", b"public, max-age=300"),))

    async def healthz(self, _: Scope, __: Receive) -> Whole:
        return _json({"status": "ok"})

    async def readyz(self, _: Scope, __: Receive) -> Whole:
        routing = self.routing.current
        if self._stop.is_asked:
            return _not_ready("the gateway was told to stop")
        if routing is None:
            return _not_ready(f"no routing yet: {self.routing.trouble}")
        if self._client_keys.are_wanted and not self._client_keys.current:
            return _not_ready(f"no client keys: wanted files with one key a line in {self._client_keys.folder}")
        health = self._models.strong_health
        word = {"ready": True, "routing_version": routing.version, "strong": health.word() if health else None}
        return _json(word | ({"budget": self._allowance.word()} if self._allowance else {}))

    async def metrics(self, scope: Scope, _: Receive) -> Whole:
        routing = self.routing.current
        weights = {arm.name: float(arm.weight_percent) for arm in routing.arms} if routing else {}
        rows = self.traces.counts()
        text = self.count.text(
            {
                "cowest_trace_rows": {(("state", state),): float(n) for state, n in rows.items()},
                "cowest_trace_spool_bytes": {(): float(self.traces.spool_bytes)},
                "cowest_trace_spool_trouble": {(): float(self.traces.is_full)},
                "cowest_requests_in_flight": {(): float(self.in_flight)},
                "cowest_tasks": {(): float(len(asyncio.all_tasks()))},
                "cowest_routing_version": {(): float(routing.version if routing else 0)},
                "cowest_routing_errors": {(): float(self.routing.errors)},
                **({"cowest_draft_cache_entries": {(): float(len(self._drafts))}} if self._drafts is not None else {}),
                "cowest_arm_weight_percent": {(("arm", name),): weight for name, weight in weights.items()},
                **(self._allowance.gauges() if self._allowance else {}),
                **(self._hedging.gauges() if self._hedging else {}),
                **self._models.gauges(),
            }
        )
        if self.siblings is not None and scope.get("query_string") != OWN_METRICS.encode():
            text = await self.siblings.metrics(text)
        return Whole(text.encode(), kind=b"text/plain; version=0.0.4; charset=utf-8")


# ---------------------------------------------------------------- chat
class Chat:
    """`POST /v1/chat/completions`, straight on ASGI: chunks pass at once, a client that leaves is seen."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, gateway = new_id(), self._gateway
        try:
            gateway.enter(scope)
            try:
                record, ticket = await self._let_in(scope, receive, request_id)
            except BaseException:
                gateway.leave()
                raise
        except Refusal as refusal:
            gateway.count.count("cowest_refused_requests_total", status=str(refusal.status))
            await _refusal(refusal, request_id).send(send)
            return
        gateway.in_flight += 1
        reply = Reply(send, record, gateway, _encoded(ticket.headers) if ticket else [])
        try:
            await _unless_gone(self._respond(record, reply), reply, scope, receive)
        finally:
            gateway.in_flight -= 1
            gateway.leave()
            if ticket is not None:
                ticket.close(record.tokens)

    async def _let_in(self, scope: Scope, receive: Receive, request_id: str) -> tuple[Record, Ticket | None]:
        client_key = self._gateway.check_key(_header(scope, b"authorization"))
        request = parse_chat(
            await _body(scope, receive, self._gateway.max_body),
            request_id,
            session=_header(scope, _SESSION) or None,
            idempotency_key=own_key(_header(scope, _IDEMPOTENCY), client_key),
        )
        record = self._gateway.begin(request)
        return record, self._gateway.admit(client_key, record)

    async def _respond(self, record: Record, response: Reply) -> None:
        """Answer, and keep the record whatever happens."""
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
            log.error("%s failed by a fault of the gateway: %s", record.request.id, traced(error))
            record.failed("strong_failed", f"internal: {type(error).__name__}")
            fault = Refusal(500, "A fault of the gateway; its log has more.", "api_error", code="internal")
            await response.refuse(fault)
        finally:
            response.keep_record()

    async def _stream(self, record: Record, response: Reply) -> None:
        events = self._gateway.answering.stream(record)
        last = b""
        async with aclosing(events):
            async for event in events:
                if event == DONE:  # nothing comes after it: the record is complete, and is kept first
                    last = event
                else:
                    await response.part(event)
        await response.end(last)


class Reply:
    """One response. Its record is kept before its last byte goes out; a client is told where it is durable by then."""

    def __init__(
        self, send: Send, record: Record, gateway: Gateway, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        self._send, self._record, self._gateway, self._headers = send, record, gateway, headers
        self._is_begun = self._is_kept = False
        self.is_over = False  # the last byte is on its way: nobody can leave any more
        self.is_deserted = False

    async def refuse(self, refusal: Refusal) -> None:
        body = orjson.dumps(refusal.body())
        if self._is_begun:  # in the middle of a stream
            await self.part(b"data: " + body + b"\n\n")
            await self.end()
        else:
            await self.whole(refusal.status, body, retry_hints(refusal))

    async def whole(self, status: int, body: bytes, hints: Mapping[str, str] | None = None) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if hints:
            headers += _encoded(hints)
        if await self._durable():
            headers.append(_IS_DURABLE)
        await self._begin(status, headers)
        self.is_over = True
        await self._send({"type": "http.response.body", "body": body})

    async def part(self, data: bytes) -> None:
        await self._begin_stream()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, last: bytes = b"") -> None:
        await self._begin_stream()
        if await self._durable():
            last = f": trace {DURABLE}\n\n".encode() + last
        self.is_over = True
        await self._send({"type": "http.response.body", "body": last})

    def keep_record(self) -> asyncio.Future[bool] | None:
        if self._is_kept:
            return None
        self._is_kept = True
        return self._gateway.finish(self._record)

    async def _durable(self) -> bool:
        kept = self.keep_record()
        return kept is not None and await kept

    async def _begin_stream(self) -> None:
        if not self._is_begun:
            await self._begin(200, list(_OF_STREAMS))

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._is_begun = True
        record = self._record
        headers += [(_REQUEST_ID, record.told_id.encode()), *self._headers]
        pair = record.arm.pair.digest
        headers += _own_headers(record.arm.name, record.mode, pair, record.weak_digest, record.strong_model)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


@lru_cache(1024)
def _own_headers(arm: str, mode: str, pair: str, weak: str, strong: str) -> list[tuple[bytes, bytes]]:
    """Few combinations, and many answers of each."""
    values = {HEADER_ARM: arm, HEADER_MODE: mode, HEADER_PAIR: pair, HEADER_WEAK: weak, HEADER_STRONG: strong}
    # A model name comes from outside: it must not break out of its header.
    lines = {name: "".join(each if each.isprintable() else " " for each in value) for name, value in values.items()}
    return [(name.encode(), value.strip().encode("latin-1", "replace")) for name, value in lines.items() if value]


async def _unless_gone(answering: Coroutine[Any, Any, None], reply: Reply, scope: Scope, receive: Receive) -> None:
    """Do the work, but stop it as soon as the client has left."""
    work, watch = asyncio.current_task(), None
    assert work is not None

    def stop() -> None:
        if not reply.is_over:
            reply.is_deserted = True
            work.cancel()

    if when_gone := scope.get("extensions", {}).get(WHEN_GONE):
        when_gone(stop)
    else:  # another server than our own
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda watch: None if watch.cancelled() else stop())
    try:
        await answering
    except asyncio.CancelledError:
        if not reply.is_deserted or work.uncancel():  # it was not the client who left
            raise
    finally:
        if watch is not None:
            watch.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- requests and responses
@dataclass(frozen=True)
class Whole:
    """A small response."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    kind: bytes = b"application/json"

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.kind), (b"content-length", b"%d" % len(self.body)), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


Small = Callable[[Scope, Receive], Awaitable[Whole]]
_SESSION, _IDEMPOTENCY, _REQUEST_ID = HEADER_SESSION.encode(), HEADER_IDEMPOTENCY.encode(), HEADER_REQUEST_ID.encode()
_IS_DURABLE = (HEADER_TRACE.encode(), DURABLE.encode())
_OF_STREAMS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def _header(scope: Scope, name: bytes) -> str:
    """ "" where there is none; of several the last."""
    found = ""
    for given, value in scope["headers"]:
        if given == name:
            found = value.decode("latin-1")
    return found


def _encoded(headers: Mapping[str, str]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.encode(), value.encode()) for name, value in headers.items())


async def _body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body. Raises `Refusal` 413 as soon as it is known to be too large."""
    declared = _header(scope, b"content-length")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most, f"{int(declared)} by its Content-Length")
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise Refusal(400, "The client left in the middle of its request.", code="client_gone")
        part: bytes = event.get("body", b"")
        size += len(part)
        if size > most:
            raise _too_large(most, f"{size} so far")
        if not event.get("more_body"):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)


def _too_large(most: int, saw: str) -> Refusal:
    message = (
        f"The body: wanted at most {most} bytes, saw {saw}. "
        "Send fewer turns or smaller pictures, or have spec.gateway.maxBodyBytes raised."
    )
    return Refusal(413, message, code="body_too_large")


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Whole:
    return Whole(orjson.dumps(value), status, _encoded(headers or {}))


def _not_ready(reason: str) -> Whole:
    return _json({"ready": False, "reason": reason}, status=503)


def _refusal(refusal: Refusal, request_id: str) -> Whole:
    headers = {HEADER_REQUEST_ID: request_id, **retry_hints(refusal)}
    if isinstance(refusal, LimitReached):
        headers |= refusal.headers
    return _json(refusal.body(), refusal.status, headers)


def _unknown(scope: Scope, status: int, what: str, more: Mapping[str, str] | None = None) -> Whole:
    message = f"{scope['method']} {scope['path']}: {what}. The gateway has {ENDPOINTS}."
    refusal = Refusal(status, message, code="unknown_url")
    return _json(refusal.body(), status, {HEADER_REQUEST_ID: new_id(), **(more or {})})


# ---------------------------------------------------------------- the process
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    log_to_stderr(options.log_level)
    allow_many_connections()
    stop = Stop()
    try:
        if options.worker is None:
            listener = listen(options.host, options.port)
            if options.workers > 1:
                return _keep_workers(options, listener, arguments)
        listening = [listener] if options.worker is None else list(options.worker.sockets)
        app = app_of(
            options.routing, options.job, options.store, stop, options.spool, options.book, place=options.worker
        )
    except (SettingsError, StoreError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{port_trouble(options, error)}\n")
        return 2
    _follow_parent(options)
    config = uvicorn.Config(
        app,
        http=FrontDoor,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nobody here goes by a client's address
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=connections_within(CONNECTIONS * app.gateway.max_concurrency),
        timeout_graceful_shutdown=options.finish_seconds,
    )
    server = DrainingServer(config, stop, options.drain_seconds)
    heed_signals(server)
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it again and again
    log.info("The gateway listens on http://%s:%d", *listening[0].getsockname()[:2])
    server.run(sockets=listening)
    return 0


def _keep_workers(options: argparse.Namespace, listener: socket.socket, arguments: Sequence[str] | None) -> int:
    load_settings(options.job)  # said once, and not by each
    _follow_parent(options)
    given = sys.argv[1:] if arguments is None else arguments
    return supervise(listeners_beside(listener, options.workers), given, options.drain_seconds)


def _follow_parent(options: argparse.Namespace) -> None:
    if options.die_with_parent or options.worker is not None:
        # A worker's keeper may have ended before the worker came this far.
        parent = options.worker.keeper if options.worker is not None else os.getppid()
        threading.Thread(target=follow_parent, args=(parent,), daemon=True).start()


def app_of(
    routing: Path,
    job: Path,
    store: str,
    stop: Stop | None = None,
    spool: Path | None = None,
    book: str | None = None,
    *,
    place: Place | None = None,
) -> App:
    """The gateway that the files and the environment say, or a worker's part of it. Raises `SettingsError`."""
    workers = len(place.siblings.ports) if place else 1
    settings = shared_by(workers, load_settings(job))
    traces = _sink(store, spool, settings.traces)
    app = build_app(
        settings,
        FileRouting(routing),
        traces,
        strong_keys=keys_of(os.environ, "COWEST_STRONG_API_KEYS"),
        fallback_keys=fallback_keys_of(settings.strong),
        client_keys=keys_of(os.environ, CLIENT_KEYS, os.environ.get("COWEST_CLIENT_APPLICATIONS", "")),
        allowance=allowance_of(settings.strong, book),
        stop=stop,
    )
    if place is not None:
        app.gateway.join(place)
    return app


def shared_by(workers: int, settings: GatewaySettings) -> GatewaySettings:
    """Of what is limited for a gateway as a whole, each of its workers has an equal part.

    The limits of a client hold for all workers together, as OpenAI's SDKs keep their connections, each to one worker.
    """
    strong, traces = settings.strong, settings.traces
    if traces is not None and traces.spool_bytes is not None:
        traces = replace(traces, spool_bytes=traces.spool_bytes // workers)
    calls = max(1, strong.max_concurrency // workers)
    return replace(settings, strong=replace(strong, max_concurrency=calls), traces=traces)


def _sink(store: str, spool: Path | None, settings: TraceSettings | None) -> TraceSink:
    prepare(store)
    writer_id = f"{socket.gethostname()}.{os.getpid()}.{new_id()[:6]}"
    if spool is None:
        return TraceWriter(store, writer_id)
    try:
        spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a disk that is full now answers like one that fills up
            raise SettingsError(f"--spool {spool}: wanted a folder to write in, saw: {error.strerror}") from None
    return SpooledTraces(store, writer_id, spool, limit_bytes=settings.spool_bytes if settings else None)


class DrainingServer(uvicorn.Server):
    """Told to stop, it still answers for `drain_seconds`: a pod that ends gets requests until its Service forgets it.

    Meanwhile each answer closes its connection, so that clients go elsewhere. A second signal ends the wait.
    """

    def __init__(self, config: uvicorn.Config, stop: Stop, drain_seconds: float) -> None:
        super().__init__(config)
        self._stop, self._drain_seconds = stop, drain_seconds
        self._exit_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop.is_asked or not self._drain_seconds:
            self._stop.is_asked = True
            super().handle_exit(sig, frame)
            return
        self._stop.is_asked, self._exit_at = True, time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._stop.is_asked and time.monotonic() >= self._exit_at:
            self.should_exit = True
        is_over = await super().on_tick(counter)
        close = (b"connection", b"close")
        if self._stop.is_asked and close not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, close]
        return is_over


def port_trouble(options: argparse.Namespace, error: OSError) -> str:
    return (
        f"{options.host}:{options.port} cannot be listened on ({error.strerror}). "
        "Stop what uses the port, or give another with --port."
    )


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")


def load_settings(path: Path) -> GatewaySettings:
    """From a defaulted CollaborationJob, or its bare spec, as YAML or JSON. Raises `SettingsError`."""
    try:
        job = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: wanted a CollaborationJob as YAML or JSON, saw: {error}") from None
    if not isinstance(job, dict):
        raise SettingsError(f"{path}: wanted an object, saw {type(job).__name__}")
    return parse(GatewaySettings, job.get("spec", job))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m cowest_serving.app", description="The collaboration gateway.")
    flags.add_argument("--routing", type=Path, required=True, help="JSON file of the routing, followed while it runs")
    flags.add_argument("--job", type=Path, required=True, help="defaulted CollaborationJob, YAML or JSON")
    flags.add_argument("--store", required=True, help="URI of the object store for traces and feedback")
    flags.add_argument(
        "--spool", type=Path, metavar="FOLDER",
        help="where records are made durable before the store has them (default: they wait in memory)",
    )  # fmt: skip
    flags.add_argument(
        "--book", metavar="FILE|URL",
        help="the book of paid calls, or the address of the proxy that keeps it; wanted where spec.strong.budget limits"
        " a day",
    )  # fmt: skip
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--host", default="127.0.0.1", help="0.0.0.0 or :: in a pod (default: %(default)s)")
    flags.add_argument(
        "--drain-seconds", type=float, default=0, metavar="N",
        help="told to stop, answer new requests for so long, with /readyz false (default: %(default)s)",
    )  # fmt: skip
    flags.add_argument(
        "--finish-seconds", type=int, default=30, metavar="N",
        help="then let the answers under way finish for at most so long (default: %(default)s)",
    )  # fmt: skip
    add_flags(flags)
    flags.add_argument("--die-with-parent", action="store_true", help="stop when the process that started it ends")
    flags.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return flags


def fallback_keys_of(strong: Strong) -> list[Keys]:
    name = "COWEST_STRONG_FALLBACK_API_KEYS"
    folder, given = os.environ.get(f"{name}_FOLDER"), os.environ.get(name, "").split("\n")
    found = []
    for number, fallback in enumerate(strong.fallbacks):
        key = given[number].strip() if number < len(given) else ""
        place = Path(folder, f"{number:02d}") if folder and fallback.api_key_secret_ref else None
        found.append(Keys([key] if key else [], place))
    return found


def follow_parent(parent: int) -> None:
    """Not PR_SET_PDEATHSIG: that fires when the parent's *thread* ends."""
    while os.getppid() == parent:
        time.sleep(0.25)
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
