"""The strong-model proxy: the one door to the strong model for everything in a job's cluster but its gateway.

    python -m cowest_serving.proxy --job job.json --book /var/lib/cowest/calls.sqlite --port 8080

It alone holds the keys, the budget and the book of paid calls; where the budget limits a day, gateways take slices of
it for live answers. A request with an `Idempotency-Key` is paid for once,
whoever asks and however often; one without is passed on, streams included, and counts in the budget all the same.
Beside the declared model it asks those of --other-model, at the same endpoint, by the same keys and prices: a pair that
is served keeps its model while the manifest names another one already.
Below /judge/v1 it asks the judges of spec.feedback.evaluator, each by its name: their answers cost money too.

Keys come from the files below the folder COWEST_STRONG_API_KEYS_FOLDER (a mounted Secret; read for every call, so that
a rotation needs no restart), and from COWEST_STRONG_API_KEYS, one a line; the judge's likewise from
COWEST_EVALUATOR_API_KEY_FOLDER and COWEST_EVALUATOR_API_KEY. Who may ask is said by COWEST_CLIENT_API_KEYS_FOLDER and
COWEST_CLIENT_API_KEYS as it is to the gateway; with neither everybody may. What was spent is told to everybody.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cowest_serving.answering import Refusal, kind_of, parse_chat, parse_object, retry_hints, wrong_key
from cowest_serving.book import (
    CODE_BUDGET_SPENT,
    HEADER_PURPOSE,
    HEADER_REPLAYED,
    HEADER_ROUND,
    Answer,
    BookError,
    BudgetSpent,
    Call,
    KeyReused,
    Meter,
    PaidCalls,
    new_call_key,
)
from cowest_serving.certificates import trust
from cowest_serving.contract import (
    HEADER_IDEMPOTENCY,
    JUDGE_PATH,
    KEEP_ALIVE_SECONDS,
    SettingsError,
    Strong,
    digest_of,
    dump,
    evaluator_key,
    parse,
)
from cowest_serving.error_bodies import CODE_KEY_REFUSED, OutspokenModel, body_of
from cowest_serving.foreign_json import read_part
from cowest_serving.health import Watched
from cowest_serving.key_files import CLIENT_KEYS, Keys, ReadKeys, keys_of
from cowest_serving.leases import LEASE_PATH, Ask, Room, Spent
from cowest_serving.logs import log_to_stderr
from cowest_serving.metrics import GEN_AI, Labels, Metrics, ModelCall
from cowest_serving.models import (
    ChatResult,
    DeadlineExceeded,
    ModelError,
    RateLimited,
    Unauthorized,
    as_chunks,
    content_text,
    count,
)
from cowest_serving.open_files import allow_many_connections
from cowest_serving.stopping import heed_signals
from cowest_serving.wire import WireError

log = logging.getLogger(__name__)
MAX_BODY = 16 * 1024 * 1024
DEADLINE_OVER_TIMEOUT = 3  # no user waits here: a rate limit may be waited out for longer than in the gateway
STRONG_KEYS = "COWEST_STRONG_API_KEYS"
MODELS_SECONDS = 5.0  # how long the upstream may take to list its models

PAID = "cowest_proxy_calls_paid_total"
REPLAYED = "cowest_proxy_calls_replayed_total"
REFUSED_BY_BUDGET = "cowest_proxy_calls_refused_by_budget_total"
FAILED = "cowest_proxy_calls_failed_total"
IN_FLIGHT = "cowest_proxy_calls_in_flight"
SPENT_CALLS, SPENT_TOKENS, SPENT_MONEY = (f"cowest_proxy_spent_{what}" for what in ("calls", "tokens", "money"))
LIVE_CALLS, LIVE_TOKENS, LIVE_MONEY = (f"cowest_proxy_live_{what}_today" for what in ("calls", "tokens", "money"))
LEFT = "cowest_proxy_budget_left_today"
METRICS = {
    **GEN_AI,
    PAID: "Calls that were sent and paid, by purpose.",
    REPLAYED: "Answers that cost nothing: from the book, or shared with a call on its way.",
    REFUSED_BY_BUDGET: "Calls that were not made since the budget has no room.",
    FAILED: "Calls without an answer, by the status that the caller got.",
    IN_FLIGHT: "Calls that wait for a place, for room in the budget, or for their answer.",
    SPENT_CALLS: "Calls in the book of paid calls.",
    SPENT_TOKENS: "Tokens in the book of paid calls, by direction.",
    SPENT_MONEY: "Money in the book of paid calls, in the currency of spec.strong.prices.",
    LIVE_CALLS: "Calls of today's live answers, as gateways told; where the budget limits a day.",
    LIVE_TOKENS: "Tokens of today's live answers, as gateways told.",
    LIVE_MONEY: "Money of today's live answers, as gateways told.",
    LEFT: "What is left of the day's budget, by unit, beside the slices that gateways have in hand.",
}


@dataclass(frozen=True)
class JurorSettings:
    endpoint: str
    model: str


@dataclass(frozen=True)
class EvaluatorSettings:
    """What of an evaluator is a model that can be asked."""

    type: str
    endpoint: str | None = None
    model: str | None = None
    timeout_seconds: int | None = None
    jury: tuple[JurorSettings, ...] | None = None


@dataclass(frozen=True)
class FeedbackSettings:
    evaluator: EvaluatorSettings


@dataclass(frozen=True)
class ProxySettings:
    """The sections of a defaulted spec that the proxy reads."""

    strong: Strong
    feedback: FeedbackSettings | None = None

    @property
    def judges(self) -> tuple[Strong, ...]:
        """Each as another strong model, with the same budget, prices and limits; the first one first."""
        if self.feedback is None or self.feedback.evaluator.type != "Judge":
            return ()
        asked = self.feedback.evaluator
        seconds = asked.timeout_seconds or self.strong.timeout_seconds
        alike = replace(self.strong, timeout_seconds=seconds, api_key_secret_refs=(), fallbacks=())
        first = JurorSettings(asked.endpoint or "", asked.model or "")
        return tuple(replace(alike, endpoint=each.endpoint, model=each.model) for each in (first, *(asked.jury or ())))


def build_app(
    strong: Strong,
    book: PaidCalls,
    read_keys: ReadKeys,
    judges: Sequence[tuple[Strong, ReadKeys]] = (),
    clients: Keys | None = None,
    other_models: Sequence[str] = (),
) -> Starlette:
    proxy = Proxy(strong, book, read_keys, judges, clients or Keys(), other_models)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await book.aclose()  # first: answers in flight are paid for
            await proxy.aclose()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", proxy.chat, methods=["POST"]),
            Route(f"{JUDGE_PATH}/chat/completions", proxy.judged, methods=["POST"]),
            Route("/v1/models", proxy.models, methods=["GET"]),
            Route("/v1/spent", proxy.spent, methods=["GET"]),
            Route(LEASE_PATH, proxy.lease, methods=["POST"]),
            Route("/healthz", proxy.healthz, methods=["GET"]),
            Route("/readyz", proxy.readyz, methods=["GET"]),
            Route("/metrics", proxy.metrics, methods=["GET"]),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _refused_by_router, Exception: _failed},
        lifespan=lifespan,
    )


# ---------------------------------------------------------------- upstream
class Upstream(Watched, OutspokenModel):
    """The strong model. What each call took goes into the metrics."""

    def __init__(self, strong: Strong, read_keys: ReadKeys, metrics: Metrics) -> None:
        super().__init__(
            strong.endpoint,
            strong.model,
            read_keys=read_keys,
            timeout_seconds=strong.timeout_seconds,
            deadline_seconds=DEADLINE_OVER_TIMEOUT * strong.timeout_seconds,
            max_concurrency=strong.max_concurrency,
            max_retries=strong.max_retries,
        )
        self.strong, self._metrics = strong, metrics

    async def __call__(self, messages: Any, **options: Any) -> ChatResult:
        started = time.monotonic()
        try:
            result = await super().__call__(messages, **options)
        except ModelError as error:
            self.observe(started, error=type(error).__name__)
            raise
        self.observe(started, result.model, (result.input_tokens, result.output_tokens))
        return result

    def observe(self, started: float, answered_by: str = "", tokens: tuple[int, int] = (0, 0), error: str = "") -> None:
        seconds = time.monotonic() - started
        self._metrics.observe_call(
            ModelCall("openai", self.endpoint, self.model, answered_by, seconds, *tokens, error=error)
        )

    async def listed(self) -> Mapping[str, Any] | None:
        """How the endpoint lists this model; None where it does not."""
        self.renew_keys()
        try:
            response = await self._connected().ask("GET", "/models", self._headers(""), b"", MODELS_SECONDS)
            entries = orjson.loads(response.body)["data"]
            return next((entry for entry in entries if entry["id"] == self.model), None)
        except (WireError, TimeoutError, ValueError, KeyError, TypeError):
            return None

    def _headers(self, key: str) -> dict[str, str]:
        headers = super()._headers(key)
        return headers if key else {name: value for name, value in headers.items() if name != HEADER_IDEMPOTENCY}


# ---------------------------------------------------------------- requests
@dataclass(frozen=True)
class Asked:
    """A request as far as the proxy reads it; `extra` goes on to the strong model as it came."""

    call: Call
    key: str  # "" where the client gave none
    stream: bool
    wants_usage: bool
    extra: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        return self.call.params


_DELIVERY = frozenset({"model", "messages", "stream", "stream_options"})  # the rest decides the answer
_KEY = re.compile(r"[\x21-\x7e]{1,256}")


def parse_request(data: bytes, headers: Mapping[str, str], strong: Strong, section: str = "spec.strong") -> Asked:
    """Raises `Refusal` that names the field."""
    body = parse_object(data)
    request = parse_chat(data, "")
    if request.model not in ("", strong.model):
        message = f"model: wanted {strong.model} ({section}.model), saw {request.model}: this job asks no such model."
        raise Refusal(404, message, param="model", code="model_not_found")
    extra = {name: value for name, value in body.items() if name not in _DELIVERY}
    key = headers.get(HEADER_IDEMPOTENCY, "").strip()
    if key and not _KEY.fullmatch(key):
        wanted = "Idempotency-Key: wanted at most 256 visible ASCII characters, saw others or more."
        raise Refusal(400, wanted, code="invalid_idempotency_key")
    call = Call(
        key=key or new_call_key(),
        endpoint=strong.endpoint,
        name=strong.model,
        purpose=" ".join(headers.get(HEADER_PURPOSE, "").split())[:200] or "other",
        messages=request.messages,
        params={"extra": extra, "max_tokens": body.get("max_tokens")},
        round=_round(headers.get(HEADER_ROUND, "").strip(), HEADER_ROUND),
        request=digest_of([list(request.messages), extra]) if key else "",
    )
    return Asked(call, key, request.stream, request.wants_usage, extra)


def _round(text: str, name: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refusal(
            400, f"{name}: wanted the number of a round, saw {text[:40]!r}.", param=name, code="invalid_round"
        )
    return int(text)


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY:
                raise Refusal(413, f"The body is larger than {MAX_BODY // 1024 // 1024} MiB.", code="body_too_large")
            parts.append(part)
    except ClientDisconnect:
        raise Refusal(400, "The client left in the middle of its request.", code="client_gone") from None
    return b"".join(parts)


# ---------------------------------------------------------------- the proxy
class Proxy:
    """What all endpoints share: the book, the upstream and the metrics."""

    def __init__(
        self,
        strong: Strong,
        book: PaidCalls,
        read_keys: ReadKeys,
        judges: Sequence[tuple[Strong, ReadKeys]],
        clients: Keys,
        other_models: Sequence[str],
    ) -> None:
        self._strong, self._book, self._read_keys, self._clients = strong, book, read_keys, clients
        self._count = Metrics(METRICS)
        self.upstream = Upstream(strong, read_keys, self._count)
        others = [Upstream(replace(strong, model=name), read_keys, self._count) for name in other_models]
        for each in others:
            each.health = self.upstream.health  # of their one endpoint
        self._upstreams = (self.upstream, *others)
        self._judges = {judge.model: Upstream(judge, read, self._count) for judge, read in judges}

    async def aclose(self) -> None:
        for each in (*self._upstreams, *self._judges.values()):
            await each.aclose()

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, self._upstreams, "spec.strong")

    async def judged(self, request: Request) -> Response:
        if not self._judges:
            raise Refusal(404, "spec.feedback.evaluator: wanted a Judge, saw none.", code="model_not_found")
        return await self._answered(request, tuple(self._judges.values()), "spec.feedback.evaluator")

    async def _answered(self, request: Request, upstreams: Sequence[Upstream], section: str) -> Response:
        """By the one whose model is named, or else by the first, which refuses another's name."""
        try:
            self._check_client(request)
            body = await _body(request)
            named = parse_object(body).get("model") if len(upstreams) > 1 else None
            upstream = next((each for each in upstreams if each.model == named), upstreams[0])
            asked = parse_request(body, request.headers, upstream.strong, section)
            if upstream in self._upstreams and (missing := self._missing_key()):
                raise _unavailable(503, missing)
            if asked.call.round is not None:
                await self._book.see_round(asked.call.round)
            if asked.key:
                return self._delivered(asked, await self._book.answer(upstream, asked.call))
            if asked.stream:
                return await self._streamed(asked, upstream)
            return await self._passed_on(asked, upstream)
        except Exception as error:
            if (refusal := _refusal_of(error)) is None:
                raise
            self._note_refusal(refusal)
            raise refusal from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this request was cancelled, but the call that it wanted: the proxy is about to end.
            raise _unavailable(503, "The proxy is being replaced. Ask again.", retry_after=1) from None

    # ------------------------------------------------------------ with a key: through the book
    def _delivered(self, asked: Asked, answer: Answer) -> Response:
        self._count_answer(asked.call, answer.is_free)
        headers = {HEADER_ROUND: str(answer.round), HEADER_PURPOSE: _header_text(answer.purpose)}
        if answer.is_free:
            headers[HEADER_REPLAYED] = "true"
        completion = answer.result.raw or _completion(asked.call.key, answer)
        if not asked.stream:
            return _json(completion, headers=headers)
        events = b"".join(_event(chunk) for chunk in as_chunks(completion, asked.wants_usage)) + _DONE
        return Response(events, headers=headers, media_type="text/event-stream")

    # ------------------------------------------------------------ without: passed on
    async def _passed_on(self, asked: Asked, upstream: Upstream) -> Response:
        async with self._book.metered(asked.call) as meter:
            result = await upstream(asked.call.messages, **asked.options)
            _read_result(meter, result)
        self._count_answer(asked.call, is_free=False)
        return _json(result.raw)

    async def _streamed(self, asked: Asked, upstream: Upstream) -> EventStream:
        """Answers once the first chunk is there: until then a failure has a status of its own."""
        events = self._events(asked, upstream)
        try:
            first = await anext(events, b"")
        except BaseException:
            await events.aclose()
            raise
        return EventStream(first, events)

    async def _events(self, asked: Asked, upstream: Upstream) -> AsyncGenerator[bytes, None]:
        # The usage is always asked for, since it is what counts.
        extra = {**asked.extra, "stream_options": {"include_usage": True}}
        async with self._book.metered(asked.call) as meter:
            started = time.monotonic()
            chunks = upstream.stream(asked.call.messages, extra=extra)
            with_error = ""
            try:
                async with aclosing(chunks):
                    async for payload in chunks:
                        if _read_chunk(meter, payload) or asked.wants_usage:
                            yield b"data: " + payload + b"\n\n"
                yield _DONE
            except ModelError as error:
                with_error = type(error).__name__
                if not meter.has_begun:
                    raise
                refusal = _refusal_of(error)
                assert refusal is not None
                self._note_refusal(refusal)
                yield _event(refusal.body())
            finally:
                tokens = (meter.input_tokens or 0, meter.output_tokens or 0)
                upstream.observe(started, meter.model, tokens, with_error)
                if meter.has_begun:
                    self._count_answer(asked.call, is_free=False)

    # ------------------------------------------------------------ the small endpoints
    async def models(self, request: Request) -> Response:
        self._check_client(request)
        by_us = {"object": "model", "created": 0, "owned_by": "strong"}
        found = [await each.listed() or {"id": each.model, **by_us} for each in self._upstreams]
        return _json({"object": "list", "data": found})

    async def spent(self, request: Request) -> Response:
        asked = _round(request.query_params.get("round", ""), "round")
        number = self._book.round if asked is None else asked
        of_round = self._book.spent(round_number=number)
        whole = _spent(self._book.spent())
        word: dict[str, Any] = {"round": _spent(of_round), "strong": self.upstream.health.word()}
        if self._book.limits_a_day:
            day, live, room = self._book.live_spent()
            word["live"] = {**_spent(live), "day": day, "left": _left(room)}
        return _json({**whole, **word})

    async def lease(self, request: Request) -> Response:
        """A slice of the day's budget for a gateway's live answers."""
        self._check_client(request)
        try:
            ask = parse(Ask, parse_object(await _body(request)), "lease")
            return _json(dump(await self._book.lend(ask)))
        except SettingsError as error:
            raise Refusal(400, f"{error}.", code="invalid_lease") from None
        except BookError as error:
            refusal = _refusal_of(error)
            assert refusal is not None
            raise refusal from error

    async def healthz(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        if missing := self._missing_key():
            return _json({"ready": False, "reason": missing}, status=503)
        if self._clients.are_wanted and not self._clients.read():
            reason = f"no client keys: wanted files with one key a line in {self._clients.folder}"
            return _json({"ready": False, "reason": reason}, status=503)
        try:
            await self._book.check()
        except BookError as error:
            return _json({"ready": False, "reason": str(error)}, status=503)
        return _json({"ready": True})

    async def metrics(self, _: Request) -> Response:
        spent = self._book.spent()
        tokens: dict[Labels, float] = {
            (("gen_ai_token_type", "input"),): float(spent.input_tokens),
            (("gen_ai_token_type", "output"),): float(spent.output_tokens),
        }
        gauges: dict[str, Mapping[Labels, float]] = {
            IN_FLIGHT: {(): float(self._book.in_flight)},
            SPENT_CALLS: {(): float(spent.calls)},
            SPENT_TOKENS: tokens,
            SPENT_MONEY: {(): spent.money},
            **self._of_live_answers(),
        }
        return PlainTextResponse(self._count.text(gauges), media_type="text/plain; version=0.0.4")

    def _of_live_answers(self) -> dict[str, Mapping[Labels, float]]:
        if not self._book.limits_a_day:
            return {}
        _, live, room = self._book.live_spent()
        left = {"tokens": room.tokens, "money": room.money}
        return {
            LIVE_CALLS: {(): float(live.calls)},
            LIVE_TOKENS: {(): float(live.tokens)},
            LIVE_MONEY: {(): live.money},
            LEFT: {(("unit", unit),): float(value) for unit, value in left.items() if value is not None},
        }

    # ------------------------------------------------------------ shared
    def _check_client(self, request: Request) -> None:
        if self._clients.are_wanted:
            self._clients.load()
            if self._clients.shown(request.headers.get("authorization", "")) is None:
                raise wrong_key("proxy")

    def _missing_key(self) -> str:
        if not self._strong.api_key_secret_refs or any(self._read_keys()):
            return ""
        return (
            "spec.strong.apiKeySecretRefs: wanted a key of the strong model, saw none in the folder "
            "COWEST_STRONG_API_KEYS_FOLDER or in COWEST_STRONG_API_KEYS. Check that the Secret has a value."
        )

    def _count_answer(self, call: Call, is_free: bool) -> None:
        self._count.count(REPLAYED if is_free else PAID, purpose=_kind(call.purpose))

    def _note_refusal(self, refusal: Refusal) -> None:
        if refusal.code == CODE_BUDGET_SPENT:
            self._count.count(REFUSED_BY_BUDGET)
        else:
            self._count.count(FAILED, status=str(refusal.status))
            log.warning("%d %s", refusal.status, refusal.code)  # a message may quote content


class EventStream(StreamingResponse):
    """Ends the call behind it as soon as its client has gone."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self._first, self._events = first, events
        super().__init__(self._all(), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def _all(self) -> AsyncIterator[bytes]:
        yield self._first
        async for event in self._events:
            yield event


def _kind(purpose: str) -> str:
    """A label with few values: `feedback:3fa4...:solo` counts as feedback."""
    head = purpose.partition(":")[0]
    return head if re.fullmatch(r"[A-Za-z_-]{1,32}", head) else "other"


def _header_text(text: str) -> str:
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")


# ---------------------------------------------------------------- refusals
def _unavailable(status: int, message: str, retry_after: float | None = None, is_in_vain: bool = False) -> Refusal:
    return Refusal(
        status, message, "api_error", code="strong_unavailable", retry_after=retry_after, is_in_vain=is_in_vain
    )


def _refusal_of(error: Exception) -> Refusal | None:
    """What the client is told; None for a bug."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, BudgetSpent):
        return Refusal(402, str(error), "insufficient_quota", code=CODE_BUDGET_SPENT)
    if isinstance(error, KeyReused):
        return Refusal(409, str(error), code="idempotency_key_reused", is_in_vain=True)
    if isinstance(error, BookError):
        return Refusal(503, str(error), "api_error", code="book_unavailable", retry_after=5)
    if not isinstance(error, ModelError):
        return None
    if isinstance(error, Unauthorized):
        message = f"{error} A mended Secret reaches the proxy within two minutes: wait for it before you try again."
        return Refusal(502, message, "api_error", code=CODE_KEY_REFUSED, is_in_vain=True)
    said = body_of(error)
    if said is not None and said.status < 500:
        return Declined(said.status, said.error, error.retry_after, is_in_vain=not error.retryable)
    if isinstance(error, RateLimited):  # so for all keys: the endpoint was not asked again
        return Refusal(429, str(error), "rate_limit_error", code="rate_limited", retry_after=error.retry_after)
    status = 504 if isinstance(error, DeadlineExceeded) else 502
    return _unavailable(status, str(error), error.retry_after, is_in_vain=not error.retryable)


class Declined(Refusal):
    """The strong model's own refusal, handed on in its words."""

    def __init__(self, status: int, error: Mapping[str, Any], retry_after: float | None, is_in_vain: bool) -> None:
        code = error.get("code")
        super().__init__(status, str(error["message"]), code=None if code is None else str(code))
        self.retry_after, self.is_in_vain = retry_after, is_in_vain
        self._error = error

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.type, "param": None, "code": None} | dict(self._error)}


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _json(error.body(), error.status, retry_hints(error))


async def _refused_by_router(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}.", code="unknown_url")
    return _json(refusal.body(), error.status_code, error.headers)


async def _failed(_: Request, __: Exception) -> Response:
    refusal = Refusal(500, "A fault of the proxy; its log has more.", "api_error", code="internal")
    return _json(refusal.body(), refusal.status)


# ---------------------------------------------------------------- reading and writing answers
_DONE = b"data: [DONE]\n\n"


def _read_result(meter: Meter, result: ChatResult) -> None:
    meter.has_begun = True
    meter.model, meter.version, meter.finish_reason = result.model, result.version, result.finish_reason
    meter.characters = len(result.text)
    _read_usage(meter, result.raw.get("usage"))


def _read_usage(meter: Meter, usage: Any) -> None:
    if isinstance(usage, dict):
        meter.input_tokens = count(usage.get("prompt_tokens"))
        meter.output_tokens = count(usage.get("completion_tokens"))


def _read_chunk(meter: Meter, payload: bytes) -> bool:
    """Note what a chunk says. True if it is for every client: one of usage alone is for those who asked."""
    meter.has_begun = True
    try:
        chunk = read_part(payload)
        meter.characters += sum(
            len(content_text((choice.get("delta") or {}).get("content"))) for choice in chunk["choices"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # no chunk of a completion: its client may know what it is
    meter.model = str(chunk.get("model") or meter.model)
    meter.version = str(chunk.get("system_fingerprint") or meter.version)
    _read_usage(meter, chunk.get("usage"))
    return bool(chunk.get("choices")) or not chunk.get("usage")


def _completion(key: str, answer: Answer) -> Mapping[str, Any]:
    """Of an answer that was not kept whole: one that a step on one machine paid for."""
    result = answer.result
    message = {"role": "assistant", "content": result.text}
    tokens = {"prompt_tokens": result.input_tokens, "completion_tokens": result.output_tokens}
    return {
        "id": f"chatcmpl-{key[:24]}",
        "object": "chat.completion",
        "created": int(answer.time),
        "model": result.model,
        **({"system_fingerprint": result.version} if result.version else {}),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish_reason}],
        "usage": {**tokens, "total_tokens": sum(tokens.values())},
    }


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def _spent(spent: Spent) -> dict[str, Any]:
    return {"calls": spent.calls, "tokens": spent.tokens, "money": decimal_text(spent.money)}


def _left(room: Room) -> dict[str, Any]:
    return {"tokens": room.tokens, "money": None if room.money is None else decimal_text(room.money)}


def decimal_text(money: float) -> str:
    """Without the noise of binary fractions: prices of single tokens need nine digits."""
    return f"{money:.9f}".rstrip("0").rstrip(".")


# ---------------------------------------------------------------- the process
class Server(uvicorn.Server):
    """Begins no call once it was told to stop; those on their way are paid for and come home."""

    def __init__(self, config: uvicorn.Config, book: PaidCalls) -> None:
        super().__init__(config)
        self._book = book

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._book.stop_beginning()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_stderr(options.log_level)
    allow_many_connections()
    try:
        settings = load_settings(options.job)
        if more := os.environ.get("COWEST_MORE_CA"):
            trust(Path(more), Path(tempfile.mkdtemp(prefix="cowest-ca-")))
        listener = socket.create_server((options.host, options.port), backlog=2048)
    except (SettingsError, BookError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(
            f"{options.host}:{options.port} cannot be listened on ({error.strerror}). "
            "Stop what uses the port, or give another with --port.\n"
        )
        return 2
    try:
        asyncio.run(_serve(settings, options.other_model, options.book, listener))
    except (SettingsError, BookError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


async def _serve(settings: ProxySettings, other_models: Sequence[str], path: Path, listener: socket.socket) -> None:
    strong, judges = settings.strong, settings.judges
    longest = DEADLINE_OVER_TIMEOUT * max(each.timeout_seconds for each in (strong, *judges))
    book = PaidCalls(
        path,
        budget=strong.budget,
        prices=strong.prices,
        max_concurrency=strong.max_concurrency,
        drain_seconds=longest,
    )
    config = uvicorn.Config(
        _app_of(strong, judges, book, other_models),
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=longest,
    )
    server = Server(config, book)
    heed_signals(server)
    log.info("The proxy listens on http://%s:%d", *listener.getsockname()[:2])
    await server.serve(sockets=[listener])


def _app_of(strong: Strong, judges: Sequence[Strong], book: PaidCalls, other_models: Sequence[str] = ()) -> Starlette:
    read_keys = keys_of(os.environ, STRONG_KEYS, below=True).read
    read = [keys_of(os.environ, evaluator_key(number), below=True).read for number in range(len(judges))]
    asked = list(zip(judges, read, strict=True))
    return build_app(strong, book, read_keys, asked, keys_of(os.environ, CLIENT_KEYS), other_models)


def load_settings(path: Path) -> ProxySettings:
    """From a defaulted CollaborationJob, or its bare spec, as JSON or YAML. Raises `SettingsError`."""
    try:
        job = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: wanted a CollaborationJob as JSON or YAML, saw: {error}") from None
    spec = job.get("spec", job) if isinstance(job, dict) else job
    if not isinstance(spec, dict):
        raise SettingsError(f"{path}: wanted an object, saw {kind_of(spec)}")
    return parse(ProxySettings, spec)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cowest_serving.proxy", description="The strong-model proxy.")
    parser.add_argument("--job", type=Path, required=True, help="defaulted CollaborationJob, JSON or YAML")
    parser.add_argument(
        "--other-model",
        action="append",
        default=[],
        metavar="NAME",
        help="a strong model that a pair of the job has beside the declared one; as often as needed",
    )
    parser.add_argument("--book", type=Path, required=True, help="the book of paid calls (SQLite, on a kept volume)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
