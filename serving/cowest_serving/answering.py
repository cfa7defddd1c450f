"""One answer of the pair, from request to record: draft, refine, and what the manifest says about failures.

Knows models and routing, but no HTTP server: `app` turns what comes back (or a `Refusal`) into responses.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar, cast

import orjson

from cowest_serving.allowance import Allowance, BudgetUnknown, NoBudget
from cowest_serving.collaborate import draft_messages, is_draftable, refine_messages, solo_messages
from cowest_serving.contract import (
    HEADER_MODEL_DIGEST,
    KEY_MARK,
    Arm,
    Collaboration,
    Messages,
    Mode,
    Strong,
    query_text,
)
from cowest_serving.door import StrongDoor
from cowest_serving.drafts import Draft, DraftCache, Source, draft_key
from cowest_serving.estimates import likely_input_tokens, likely_tokens
from cowest_serving.foreign_json import read_json, read_part, whole_characters
from cowest_serving.health import CircuitOpen, Guarded, Health
from cowest_serving.hedging import Hedging
from cowest_serving.ids import new_id
from cowest_serving.metrics import ModelCall
from cowest_serving.models import (
    BadAnswer,
    ChatResult,
    Crowded,
    DeadlineExceeded,
    ModelError,
    RateLimited,
    content_text,
    count,
    error_object,
    is_clients_fault,
    is_error,
    is_same_origin,
    said_by,
)
from cowest_serving.redaction import Redacted, Redactor, RestoredStream
from cowest_serving.routes import MODES, USUAL, Routes, Way, is_for_a_draft
from cowest_serving.tool_calls import ToolCalls

log = logging.getLogger(__name__)
WEAK_MODEL = "weak"  # the name that every weak server answers to
_OWN_FIELDS = frozenset({"model", "messages", "stream", "stream_options", "user"})  # not passed on as they are
OVER_BUDGET = "over_budget"  # status of an answer for which the strong model was not asked: the budget has no room
FELL_BACK = "fell_back"  # status of an answer that is not of the pair's own strong model
DRAFT_CACHE, HEDGE = "draftCache", "hedge"  # shortcuts, as the manifest names them
_MAX_MODELS = 32
MOST_DRAFTS = 64  # under way at once at a weak endpoint, where no manifest says it
_MAX_IDEMPOTENCY_KEY = 255
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")
_MOST_OUTPUT = 10_000_000  # tokens, or answers: what is set aside for a call has to be a sum that a book can hold
_MAX_DEPTH = 250  # orjson writes some levels more
_BEYOND = frozenset({"context_length_exceeded", "invalid_value"})  # codes of our own weak server
_TOO_LONG = re.compile(r"(context|model|input|prompt) length|max_model_len|too long", re.IGNORECASE)  # as vLLM says it
LARGE = 32 * 1024  # bytes of a body in which identifiers are looked for beside the event loop
_MANNERS = frozenset({"reasoning_effort", "verbosity"})  # how the strong model is to go about it
NO_QUOTA = "insufficient_quota"  # OpenAI's word for money that is spent


# ---------------------------------------------------------------- requests and refusals
@dataclass(eq=False)
class Refusal(Exception):
    """No answer, in the words of OpenAI's error object."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    is_in_vain: bool = False  # to ask again; OpenAI's SDKs would, by the status alone

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion as a client asked for it. `parameters`: all that goes on to the strong model."""

    id: str
    model: str
    messages: Messages
    parameters: Mapping[str, Any]
    stream: bool
    wants_usage: bool  # a last chunk with the usage of a stream
    sticky_key: str | None
    idempotency_key: str
    size: int = 0  # bytes of its body

    @property
    def is_draftable(self) -> bool:
        """Tools and parts that are not text are beyond the weak model."""
        asks_for_tools = self.parameters.get("tools") or self.parameters.get("functions")
        return not asks_for_tools and is_draftable(self.messages)


def parse_chat(
    data: bytes, request_id: str, *, session: str | None = None, idempotency_key: str | None = None
) -> ChatRequest:
    """Raises `Refusal` 400 that names the field."""
    body = parse_object(data)
    for name in (*_OUTPUT_LIMITS, "n"):
        _check_whole(body, name)
    user = optional(body, "user", str, "text")
    options = optional(body, "stream_options", dict, "an object") or {}
    return ChatRequest(
        id=request_id,
        model=optional(body, "model", str, "text") or "",
        messages=checked_messages(body.get("messages"), _check_content),
        parameters={name: value for name, value in body.items() if name not in _OWN_FIELDS},
        stream=bool(optional(body, "stream", bool, "true or false")),
        wants_usage=_wants_usage(options),
        sticky_key=user or session,
        idempotency_key=idempotency_key or request_id,
        size=len(data),
    )


def _check_whole(body: Mapping[str, Any], name: str) -> None:
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_OUTPUT):
        return
    raise bad_field(name, f"a whole number from 1 to {_MOST_OUTPUT}", value)


def own_key(given: str, client_key: str) -> str | None:
    """An Idempotency-Key as the strong endpoint gets it: what one client paid for is never another's answer."""
    if not given:
        return None
    if len(given) > _MAX_IDEMPOTENCY_KEY or not (given.isascii() and given.isprintable()):
        wanted = f"at most {_MAX_IDEMPOTENCY_KEY} printable ASCII characters"
        message = f"Idempotency-Key: wanted {wanted}, saw {len(given)} characters."
        raise Refusal(400, message, param="Idempotency-Key", code="invalid_header")
    return hashlib.sha256(f"{client_key}\n{given}".encode()).hexdigest() if client_key else given


def _wants_usage(options: Mapping[str, Any]) -> bool:
    wants = options.get("include_usage")
    if wants is None or isinstance(wants, bool):
        return bool(wants)
    raise bad_field("stream_options.include_usage", "true or false", wants)


def parse_object(data: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"The body: wanted an object, saw {kind_of(body)}.", code="invalid_json")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        _check_depth(body)
    return body


def _check_depth(body: Mapping[str, Any]) -> None:
    """More is read than can be written again, to the strong model and into the record."""
    try:
        orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise Refusal(400, "The body: wanted less nesting, saw too many levels.", code="invalid_json") from None


def optional(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    value = body.get(name)
    if value is None or isinstance(value, kind):
        return value
    raise bad_field(name, wanted, value)


def bad_field(name: str, wanted: str, value: Any) -> Refusal:
    return Refusal(400, f"{name}: wanted {wanted}, saw {kind_of(value)}.", param=name, code="invalid_type")


def kind_of(value: Any) -> str:
    """What a JSON value is, without its content."""
    if value == []:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"the number {value}" if isinstance(value, int | float) else "something else")


def checked_messages(value: Any, check_content: Callable[[str, Any], None]) -> Messages:
    if not isinstance(value, list) or not value:
        raise bad_field("messages", "a list of at least one message", value)
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise bad_field(f"messages[{i}]", "an object", message)
        if not isinstance(message.get("role"), str):
            raise bad_field(f"messages[{i}].role", "text", message.get("role"))
        check_content(f"messages[{i}].content", message.get("content"))
    return value


def _check_content(name: str, content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise bad_field(name, "text or a list of parts", content)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_field(f"{name}[{i}]", "an object with a type", part)
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise bad_field(f"{name}[{i}].text", "text", part.get("text"))


def refusal_of(error: ModelError, who: str) -> Refusal:
    """What a client is told when a model fails; who = "weak model" or "strong model"."""
    message = f"The {who} gave no answer. {error}"
    if isinstance(error, BudgetUnknown):
        return Refusal(503, str(error), "api_error", code="budget_unknown", retry_after=error.retry_after)
    if isinstance(error, NoBudget):
        # In vain within seconds, as the SDKs would try it: the wait is until midnight.
        return Refusal(429, str(error), NO_QUOTA, code=NO_QUOTA, retry_after=error.retry_after, is_in_vain=True)
    if isinstance(error, RateLimited):
        wait, in_vain = error.retry_after, not error.retryable
        return Refusal(429, message, "rate_limit_error", code="rate_limited", retry_after=wait, is_in_vain=in_vain)
    if is_clients_fault(error):
        return _refused_by_model(error, who)
    status = 502
    if isinstance(error, DeadlineExceeded):
        status = 504
    elif error.status == 503 or isinstance(error, CircuitOpen | Crowded):
        status = 503
    code = f"{who.split()[0]}_failed"
    in_vain = not error.retryable
    return Refusal(status, message, "api_error", code=code, retry_after=error.retry_after, is_in_vain=in_vain)


def _refused_by_model(error: ModelError, who: str) -> Refusal:
    """In the endpoint's own words, since applications go by its code (context_length_exceeded, content_filter)."""
    said = {name: str(value) for name in ("message", "type", "param", "code") if (value := error.error.get(name))}
    return Refusal(
        error.status or 400,
        f"The {who} refuses the request: {said['message']}" if "message" in said else str(error),
        said.get("type", "invalid_request_error"),
        param=said.get("param"),
        code=said.get("code", "refused_by_model"),
    )


# ---------------------------------------------------------------- the record of an answer
@dataclass
class Record:
    """What becomes the trace row, filled in while the answer is made."""

    request: ChatRequest
    arm: Arm
    routing_version: int
    mode: Mode
    arrived: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: float = field(default_factory=time.monotonic)
    status: str = "ok"
    errors: list[str] = field(default_factory=list)
    weak_digest: str = ""
    strong_model: str = ""
    strong_version: str = ""
    draft: str = ""
    answer: str = ""
    tool_calls: str | None = None  # JSON
    draft_ms: float | None = None
    answer_ms: float | None = None
    weak_tokens: tuple[int, int] = (0, 0)  # input, output
    strong_tokens: tuple[int, int] = (0, 0)
    redacted: Redacted | None = None  # where the manifest hides identifiers
    shown: Messages | None = None  # the messages as the strong model and the trace may have them
    shortcuts: list[str] = field(default_factory=list)  # taken, by their names in the manifest
    draft_source: Source | None = None  # with a draft cache
    application: str = ""  # whose client key it was
    way: Way = USUAL

    def failed(self, status: str, error: object) -> None:
        self.status = status
        self.noted(error)

    def noted(self, error: object) -> None:
        self.errors.append(str(error) if isinstance(error, str) else f"{type(error).__name__}: {error}")

    @property
    def kinds(self) -> list[str]:
        """Of the errors: what they say beside it may quote content."""
        return [error.partition(":")[0] for error in self.errors]

    @property
    def tokens(self) -> int:
        """Of both models; where no usage came, as its client left a stream, say, as its text is long."""
        weak, strong = sum(self.weak_tokens), sum(self.strong_tokens)
        said = len(self.answer) + len(self.tool_calls or "")
        if not strong and said and self.mode != "WeakAlone":
            read = likely_input_tokens(self.request.messages, self.request.parameters)
            strong = read + likely_tokens(said)
        return weak + strong

    def model_calls(self) -> Iterator[ModelCall]:
        """The calls behind this answer, for metrics."""
        kinds = self.kinds
        if self.draft_ms is not None and self.arm.weak_endpoint is not None and DRAFT_CACHE not in self.shortcuts:
            error = "" if self.weak_digest else next(iter(kinds), "client_gone")
            served, endpoint = self.weak_digest, self.arm.weak_endpoint
            yield ModelCall(
                "cowest", endpoint, WEAK_MODEL, served, self.draft_ms / 1000, *self.weak_tokens, error=error
            )
        if self.answer_ms is not None and self.status != OVER_BUDGET:
            pair, error = self.arm.pair, ""
            if self.status in ("strong_failed", "refused"):
                error = kinds[-1]
            elif self.status == "client_gone":
                error = self.status
            yield ModelCall(
                "openai",
                pair.strong_endpoint,
                pair.strong_model,
                self.strong_model,
                self.answer_ms / 1000,
                *self.strong_tokens,
                error=error,
            )
            if HEDGE in self.shortcuts:
                endpoint, seconds = pair.strong_endpoint, self.answer_ms / 1000
                yield ModelCall("openai", endpoint, pair.strong_model, "", seconds, error="hedge_lost")

    def row(self) -> dict[str, Any]:
        """By TRACE_COLUMNS."""
        hidden = self.redacted.text if self.redacted else str
        messages = (self.shown or ()) if self.redacted else self.request.messages
        return {
            **self.bare_row(),
            "error": hidden("; ".join(self.errors)),
            "query": query_text(messages),
            "messages": orjson.dumps(messages).decode(),
            "draft": hidden(self.draft),
            "answer": hidden(self.answer),
            "tool_calls": hidden(self.tool_calls) if self.tool_calls else None,
            "placeholders": digests_text(self.redacted),  # last, when every text has its placeholders
        }

    def bare_row(self, *trouble: str) -> dict[str, Any]:
        """Without content: digests, times, counts, and the errors' kinds. `trouble`: more of these."""
        request, pair = self.request, self.arm.pair
        return {
            "trace_id": request.id,
            "time": self.arrived,
            "routing_version": self.routing_version,
            "arm": self.arm.name,
            "weight_percent": self.arm.weight_percent,
            "mode": self.mode,
            "status": self.status,
            "error": "; ".join([*self.kinds, *trouble]),
            "pair_digest": pair.digest,
            "weak_digest": self.weak_digest,
            "prompts_digest": pair.prompts.digest,
            "draft_form": pair.draft,
            "strong_model": self.strong_model,
            "strong_version": self.strong_version,
            "user_hash": user_hash(request.sticky_key),
            "draft_ms": self.draft_ms,
            "answer_ms": self.answer_ms,
            "weak_input_tokens": self.weak_tokens[0],
            "weak_output_tokens": self.weak_tokens[1],
            "strong_input_tokens": self.strong_tokens[0],
            "strong_output_tokens": self.strong_tokens[1],
            "shadow": False,
            "shortcut": ",".join(self.shortcuts),
            "application": self.application,
            "propensity": self.way.propensity,
        }

    @property
    def told_id(self) -> str:
        """What the client is told as the request id; with it comes the key for its late words (`redaction.joined`)."""
        return f"{self.request.id}{KEY_MARK}{self.redacted.key}" if self.redacted else self.request.id


def digests_text(redacted: Redacted | None) -> str | None:
    return orjson.dumps(redacted.digests).decode() if redacted and redacted.digests else None


def user_hash(sticky_key: str | None) -> str:
    return hashlib.sha256(sticky_key.encode()).hexdigest() if sticky_key else ""


# ---------------------------------------------------------------- the models
_Model = TypeVar("_Model", "WeakModel", StrongDoor)


class WeakModel(Guarded):
    """A weak model's server as it is asked for drafts. One that hangs or fails is soon not asked, but now and then."""

    when_crowded = "Raise weak.maxConcurrency where the servers take more, else give it more replicas (weak.replicas)."
    longest_rest = 10.0  # it is ours, and drafts are missed when it is back


def draft_seconds(timeout_seconds: float, draft_max_tokens: int) -> float:
    """How long a draft is waited for: a slow CPU writes some ten tokens a second. Half of the answer's time is left."""
    return min(timeout_seconds / 2, max(15.0, draft_max_tokens / 10))


class Models:
    """The HTTP clients of the endpoints in use, one an endpoint: its limits hold for all arms together.

    `fallback_keys`: those of each of the strong model's fallbacks, in their order.
    """

    def __init__(
        self,
        strong: Strong,
        strong_keys: Sequence[str],
        fallback_keys: Sequence[Sequence[str]] = (),
        allowance: Allowance | None = None,
        hedging: Hedging | None = None,
        *,
        draft_max_tokens: int = 0,
        most_drafts: int = MOST_DRAFTS,
    ) -> None:
        self._settings, self._keys = strong, tuple(strong_keys)
        self._draft_seconds = draft_seconds(strong.timeout_seconds, draft_max_tokens)
        self._most_drafts = most_drafts
        self._allowance, self._hedging = allowance, hedging
        self._fallback_keys = self._filled(fallback_keys)
        self._open: OrderedDict[tuple[str, str], WeakModel | StrongDoor] = OrderedDict()
        self._retired: list[WeakModel | StrongDoor] = []

    def renew_keys(self, strong_keys: Sequence[str], fallback_keys: Sequence[Sequence[str]]) -> None:
        """Others are given. What is known of the endpoints stays, of the keys of those that stay too."""
        self._keys, self._fallback_keys = tuple(strong_keys), self._filled(fallback_keys)
        for door in (model for model in self._open.values() if isinstance(model, StrongDoor)):
            own, *fallbacks = door.models
            own.keys.renew(self._keys_for(own.endpoint))
            for model, keys in zip(fallbacks, self._fallback_keys, strict=False):
                model.keys.renew(keys)

    def _filled(self, fallback_keys: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        return (*fallback_keys, *[()] * len(self._settings.fallbacks))

    def weak(self, arm: Arm) -> WeakModel:
        assert arm.weak_endpoint is not None, "routing without weakEndpoint is refused when it is read"
        return self._get(arm.weak_endpoint, WEAK_MODEL, self._weak)

    def strong(self, arm: Arm) -> StrongDoor:
        return self._get(arm.pair.strong_endpoint, arm.pair.strong_model, self._door)

    @property
    def strong_health(self) -> Health | None:
        """Of the strong endpoint that was asked last."""
        doors = (model for model in reversed(self._open.values()) if isinstance(model, StrongDoor))
        return next((door.own.health for door in doors), None)

    def gauges(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Of the strong endpoints, by name of the metric and labels."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for door in (model for model in self._open.values() if isinstance(model, StrongDoor)):
            for model in door.models:
                labels = (("endpoint", model.endpoint), ("model", model.model))
                for name, value in model.gauges().items():
                    found.setdefault(name, {})[labels] = value
        return found

    def _weak(self, endpoint: str, model: str) -> WeakModel:
        # One quick second try: a request should not wait long for a draft that it can do without.
        return WeakModel(
            endpoint,
            model,
            timeout_seconds=self._draft_seconds,
            max_concurrency=self._most_drafts,
            max_retries=1,
            backoff_seconds=0.1,
        )

    def _door(self, endpoint: str, model: str) -> StrongDoor:
        fallbacks = zip(self._settings.fallbacks, self._fallback_keys, strict=False)
        return StrongDoor(
            [
                self._guarded(endpoint, model, self._keys_for(endpoint)),
                *(self._guarded(other.endpoint, other.model, keys) for other, keys in fallbacks),
            ],
            self._allowance,
            self._hedging,
        )

    def _keys_for(self, endpoint: str) -> Sequence[str]:
        """Those that the manifest gives for its origin: as the strong model's, or as a fallback's.

        After an edit the pair of the old endpoint answers for a while, and the keys are of the new one.
        """
        if is_same_origin(endpoint, self._settings.endpoint):
            return self._keys
        others = zip(self._settings.fallbacks, self._fallback_keys, strict=False)
        return next((keys for other, keys in others if is_same_origin(endpoint, other.endpoint)), ())

    def _guarded(self, endpoint: str, model: str, keys: Sequence[str]) -> Guarded:
        return Guarded(
            endpoint,
            model,
            api_keys=keys,
            timeout_seconds=self._settings.timeout_seconds,
            max_concurrency=self._settings.max_concurrency,
            max_retries=self._settings.max_retries,
        )

    def _get(self, endpoint: str, model: str, build: Callable[[str, str], _Model]) -> _Model:
        key = (endpoint, model)
        if key not in self._open:
            self._open[key] = build(endpoint, model)
            if len(self._open) > _MAX_MODELS:  # endpoints of long ago; answers may still be under way
                self._retired.append(self._open.popitem(last=False)[1])
        self._open.move_to_end(key)
        return cast(_Model, self._open[key])

    async def aclose(self) -> None:
        for model in (*self._open.values(), *self._retired):
            await model.aclose()


# ---------------------------------------------------------------- answering
class Answering:
    """The collaboration at request time. Raises `Refusal`; whatever happens, `record` says so."""

    def __init__(
        self,
        strong: Strong,
        collaboration: Collaboration,
        models: Models,
        drafts: DraftCache | None = None,
        routes: Routes | None = None,
    ) -> None:
        self._strong, self._collaboration, self._models = strong, collaboration, models
        self._drafts, self._routes = drafts, routes
        self._redactor = Redactor(collaboration.redaction) if collaboration.redaction else None
        self._refusing: set[str] = set()  # weak endpoints of which the log has said so

    async def answer(self, record: Record) -> Mapping[str, Any]:
        """The body of a chat completion."""
        await self._hide(record)
        draft = await self._draft(record)
        if draft is not None and record.mode == "WeakAlone":
            return _completion(record, draft)
        started = time.monotonic()
        try:
            result = await self._models.strong(record.arm)(
                _strong_messages(record, draft),
                idempotency_key=record.request.idempotency_key,
                extra=self._parameters(record),
                until=record.started + self._strong.timeout_seconds,
                fell_back=partial(record.failed, FELL_BACK),
                hedged=partial(record.shortcuts.append, HEDGE),
            )
        except ModelError as error:
            return _completion(record, self._stand_in(record, draft, error))
        finally:
            record.answer_ms = _ms_since(started)
        record.answer, record.strong_tokens = result.text, (result.input_tokens, result.output_tokens)
        if calls := result.raw["choices"][0]["message"].get("tool_calls"):
            record.tool_calls = orjson.dumps(calls).decode()
        record.strong_model, record.strong_version = result.model, result.version
        usage = of_both_models(record, result.raw.get("usage"))
        body = {**result.raw, "model": record.request.model or result.model, "usage": usage}
        return record.redacted.restored_body(body) if record.redacted and record.redacted.restores else body

    async def stream(self, record: Record) -> AsyncGenerator[bytes, None]:
        """The body of an event stream, event by event. Refuses only before the first."""
        await self._hide(record)
        draft = await self._draft(record)
        if draft is not None and record.mode == "WeakAlone":
            for event in _events(record, draft):
                yield event
            return
        started, begun = time.monotonic(), False
        try:
            messages, parameters = _strong_messages(record, draft), self._parameters(record)
            # Only now it is known whether anything was hidden: drafts and metadata have identifiers of their own.
            restored = RestoredStream(record.redacted) if record.redacted and record.redacted.restores else None
            chunks = self._models.strong(record.arm).stream(
                messages,
                idempotency_key=record.request.idempotency_key,
                # The usage is always asked for, since the record needs it.
                extra={**parameters, "stream_options": {"include_usage": True}},
                until=record.started + self._strong.timeout_seconds,
                fell_back=partial(record.failed, FELL_BACK),
                hedged=partial(record.shortcuts.append, HEDGE),
            )
            async with aclosing(_passed_on(record, chunks, restored)) as events:
                async for event in events:
                    begun = True
                    yield event
            yield b"data: [DONE]\n\n"
        except ModelError as error:
            if begun:
                record.failed("strong_failed", error)
                yield _event(refusal_of(error, "strong model").body())
                return
            for event in _events(record, self._stand_in(record, draft, error)):
                yield event
        finally:
            record.answer_ms = _ms_since(started)

    def hidden(self, said: Mapping[str, str | None], key: str) -> Mapping[str, str | None]:
        """What users write of an answer, as it may be stored. `key`: the one that came with the answer's id, or ""."""
        if self._redactor is None:
            return said
        redacted = self._redactor.begin(key=key)
        try:
            return {**redacted.texts(said), "placeholders": digests_text(redacted)}
        except Exception as error:
            message = "What must be hidden in these words could not be found: nothing was stored."
            raise Refusal(503, message, "api_error", code="redaction_failed") from error

    async def _hide(self, record: Record) -> None:
        """Before anything is sent or stored; where it fails, nothing is."""
        if self._redactor is None:
            return
        record.redacted = self._redactor.begin(record.request.parameters, new_id())
        hide = partial(record.redacted.messages, record.request.messages)
        try:
            record.shown = await asyncio.to_thread(hide) if record.request.size > LARGE else hide()
        except Exception as error:
            record.failed("refused", f"redaction: {type(error).__name__}")
            message = (
                "What must be hidden from the strong model could not be found: nothing was sent and nothing stored."
            )
            raise Refusal(503, message, "api_error", code="redaction_failed") from error

    async def _draft(self, record: Record) -> Draft | None:
        """The weak model's draft; `None`: the strong model answers alone."""
        if record.arm.mode == "StrongAlone" or not record.request.is_draftable:
            record.mode = "StrongAlone"
            return None
        if self._routes is not None and record.arm.predictor is not None and self._route(self._routes, record):
            return None
        if record.mode == "Pair":
            self._models.strong(record.arm).expect_call()
        started = time.monotonic()
        try:
            draft = await self._at_hand(record)
        except ModelError as error:
            if is_clients_fault(error):
                self._note_refusal(record.arm, error)
            if _is_beyond_the_weak(error):  # in the steps too the strong model answers alone then
                record.noted(error)
                record.mode = "StrongAlone"
                return None
            record.failed("weak_failed", error)
            if self._collaboration.when_weak_fails == "Fail":
                raise refusal_of(error, "weak model") from error
            record.mode = "StrongAlone"
            return None
        finally:
            record.draft_ms = _ms_since(started)
        record.draft, record.weak_digest = draft.text, draft.weak_digest
        if DRAFT_CACHE not in record.shortcuts:
            record.weak_tokens = (draft.input_tokens, draft.output_tokens)
        return draft

    def _note_refusal(self, arm: Arm, error: ModelError) -> None:
        """Once an endpoint: it may refuse every request, by its chat template or a context that is too short."""
        if arm.weak_endpoint is None or arm.weak_endpoint in self._refusing:
            return
        self._refusing.add(arm.weak_endpoint)
        # Not the message: it may quote content.
        log.warning(
            "%s refuses to draft for a request (%s %s): there the strong model answers alone. What it says stands in "
            "the traces' column `error`.",
            arm.weak_endpoint,
            error.status,
            error.error.get("code") or "",
        )

    def _route(self, routes: Routes, record: Record) -> bool:
        """Take the shortcut that the predictor finds for this request, if any. True: there is no draft to make."""
        request = record.request
        record.way = routes.way(record.arm.predictor, query_text(request.messages), request.parameters)
        if record.way.taken is None:
            return False
        record.mode = MODES[record.way.taken]
        record.shortcuts.append(record.way.taken)
        return record.mode == "StrongAlone"

    async def _at_hand(self, record: Record) -> Draft:
        """A draft, made for this request only where an equal one has none."""
        pair, limit = record.arm.pair, self._collaboration.draft_max_tokens
        asked = draft_messages(record.request.messages, pair.prompts)

        async def make() -> Draft:
            until = record.started + self._strong.timeout_seconds / 2
            result = await self._models.weak(record.arm)(asked, max_tokens=limit, temperature=0, until=until)
            digest, reason = _served_digest(record.arm, result), result.finish_reason or "stop"
            return Draft(result.text, digest, result.input_tokens, result.output_tokens, reason)

        if self._drafts is None:
            return await make()
        draft, record.draft_source = await self._drafts.get(draft_key(pair, asked, limit), make)
        if record.draft_source != "made":
            record.shortcuts.append(DRAFT_CACHE)
        return draft

    def _stand_in(self, record: Record, draft: Draft | None, error: ModelError) -> Draft:
        """What is answered when the strong model fails: the draft, if the manifest says so and it is an answer."""
        if is_clients_fault(error):
            record.failed("refused", error)
            raise refusal_of(error, "strong model") from error
        record.failed(OVER_BUDGET if isinstance(error, NoBudget) else "strong_failed", error)
        may_stand_in = draft is not None and _is_an_answer(draft, record.request.parameters)
        if draft is None or not may_stand_in or self._collaboration.when_strong_fails == "Fail":
            raise refusal_of(error, "strong model") from error
        record.mode = "WeakAlone"
        return draft

    def _parameters(self, record: Record) -> Mapping[str, Any]:
        given = record.request.parameters
        if record.redacted:
            given = record.redacted.parameters(given)
        most = self._strong.max_tokens
        if most is None:
            return given
        limits = {name: min(given[name], most) for name in _OUTPUT_LIMITS if given.get(name) is not None}
        return {**given, **(limits or {"max_tokens": most})}


def _is_beyond_the_weak(error: ModelError) -> bool:
    """Whether this very request is too much for the weak model, which is no fault of it or of its server."""
    said = f"{error.error.get('code')} {error.error.get('message')}"
    is_said = error.error.get("code") in _BEYOND or _TOO_LONG.search(said) is not None
    return is_clients_fault(error) and (error.status == 413 or is_said)


def _is_an_answer(draft: Draft, parameters: Mapping[str, Any]) -> bool:
    """It says something, asks for no more than text, and is within the request's own limit of tokens."""
    others = {name: value for name, value in parameters.items() if name not in (*_OUTPUT_LIMITS, *_MANNERS)}
    limits = [parameters[name] for name in _OUTPUT_LIMITS if parameters.get(name) is not None]
    is_within = all(isinstance(limit, int) and 0 < draft.output_tokens <= limit for limit in limits)
    return bool(draft.text.strip()) and is_within and is_for_a_draft(others)


def _strong_messages(record: Record, draft: Draft | None) -> Messages:
    messages, prompts = record.shown or record.request.messages, record.arm.pair.prompts
    if draft is None:
        return solo_messages(messages, prompts)
    return refine_messages(messages, record.redacted.text(draft.text) if record.redacted else draft.text, prompts)


def _served_digest(arm: Arm, result: ChatResult) -> str:
    """The digest of the model that drafted. One that is not the pair's would spoil every comparison."""
    served = result.headers.get(HEADER_MODEL_DIGEST, arm.pair.weak_digest)
    if served != arm.pair.weak_digest:
        raise BadAnswer(
            f"{arm.weak_endpoint} serves the model {served}, but the pair is of {arm.pair.weak_digest}. "
            "Start its server with the pair's model, or correct the routing."
        )
    return served


async def _passed_on(
    record: Record, chunks: AsyncGenerator[bytes, None], restored: RestoredStream | None
) -> AsyncGenerator[bytes, None]:
    """The strong model's chunks as events for this client. The first is read before, since the headers tell of it; of
    the others those that can be nothing else go to the client first, and to the record then."""
    parts: list[str] = []  # of the answer's text
    calls = ToolCalls()
    take = partial(_take_with_calls, calls) if record.request.parameters.get("tools") else _take
    begun = False
    try:
        async with aclosing(chunks):
            async for payload in chunks:
                if begun and restored is None and _is_plain(payload):
                    yield b"data: %b\n\n" % payload
                    take(record, payload, parts)
                    continue
                has_choices, has_usage = take(record, payload, parts)
                if has_usage:
                    if not record.request.wants_usage and not has_choices:
                        continue
                    payload = _with_usage_as_asked(record, payload)
                begun = True
                yield b"data: %b\n\n" % (restored.chunk(payload) if restored else payload)
        for rest in restored.rest() if restored else ():
            yield b"data: %b\n\n" % rest
    finally:
        record.answer = whole_characters("".join(parts))
        record.tool_calls = calls.text


def _is_plain(payload: bytes) -> bool:
    """A chunk that goes to every client as it is: neither an error nor usage, as far as its bytes can tell."""
    return b'"error"' not in payload and (b'"usage"' not in payload or b'"usage":null' in payload)


def _take_with_calls(calls: ToolCalls, record: Record, payload: bytes, parts: list[str]) -> tuple[bool, bool]:
    calls.note(payload)
    return _take(record, payload, parts)


def _take(record: Record, payload: bytes, parts: list[str]) -> tuple[bool, bool]:
    """Note what a chunk says. Whether it has choices, and usage, which is for those who asked."""
    try:
        chunk = read_part(payload)
        if is_error(chunk):
            said = said_by(error_object(payload))
            raise BadAnswer(f"The strong model broke off its answer with an error of its own ({said}).")
        record.strong_model = str(chunk.get("model") or record.strong_model)
        record.strong_version = str(chunk.get("system_fingerprint") or record.strong_version)
        if usage := chunk.get("usage"):
            record.strong_tokens = (count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")))
        choices = chunk.get("choices") or []
        for choice in choices:
            if choice.get("index", 0) == 0:
                parts.append(content_text((choice.get("delta") or {}).get("content")))
    except (ValueError, AttributeError, KeyError, TypeError):
        raise BadAnswer("The strong model sent a chunk that is no chat completion chunk.") from None
    return bool(choices), bool(usage)


# ---------------------------------------------------------------- answers of the weak model alone
def _completion(record: Record, draft: Draft) -> dict[str, Any]:
    record.answer = draft.text
    taken_in, given_out = record.weak_tokens
    return {
        "id": f"chatcmpl-{record.request.id}",
        "object": "chat.completion",
        "created": int(record.arrived.timestamp()),
        "model": record.request.model or WEAK_MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": draft.text},
                "logprobs": None,
                "finish_reason": draft.finish_reason,
            }
        ],
        "usage": of_both_models(record, _usage(taken_in, given_out)),
    }


def _events(record: Record, draft: Draft) -> list[bytes]:
    """A complete draft as an event stream."""
    whole = _completion(record, draft)
    head = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": draft.text}, None),
        ({}, draft.finish_reason),
    ]
    events = [
        _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}) for delta, reason in deltas
    ]
    if record.request.wants_usage:
        events.append(_event(head | {"choices": [], "usage": whole["usage"]}))
    return [*events, b"data: [DONE]\n\n"]


def of_both_models(record: Record, usage: Any) -> Any:
    """The usage of who wrote the answer, whose prices applications know, and beside it each model's that was asked.

    Not their sum: a prompt that both read would count twice, and look longer than the context is.
    """
    if not isinstance(usage, dict):
        return usage  # the strong model gives none
    weak = _usage(*record.weak_tokens) if any(record.weak_tokens) else None
    strong = _usage(*record.strong_tokens) if any(record.strong_tokens) else None
    both = sum(each["total_tokens"] for each in (weak, strong) if each)
    return {**usage, "cowest": {"weak": weak, "strong": strong, "total_tokens": both}}


def _with_usage_as_asked(record: Record, payload: bytes) -> bytes:
    """A chunk of usage alone, or the last of the text, where some endpoints put it."""
    chunk = read_json(payload)
    usage = chunk.pop("usage")
    return orjson.dumps({**chunk, "usage": of_both_models(record, usage)} if record.request.wants_usage else chunk)


def _usage(taken_in: int, given_out: int) -> dict[str, int]:
    return {"prompt_tokens": taken_in, "completion_tokens": given_out, "total_tokens": taken_in + given_out}


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1000


def wrong_key(whose: str) -> Refusal:
    message = f"Wrong or missing API key: send `Authorization: Bearer <key>` with a key of this {whose}."
    return Refusal(401, message, "authentication_error", code="invalid_api_key")


def retry_hints(refusal: Refusal) -> dict[str, str]:
    """Headers that tell a client whether and when to ask again."""
    hints = {"x-should-retry": "false"} if refusal.is_in_vain else {}
    wait = refusal.retry_after
    if wait is None:
        return hints
    exactly = {} if float(wait).is_integer() else {"retry-after-ms": str(math.ceil(wait * 1000))}
    return {"retry-after": str(math.ceil(wait)), **exactly, **hints}
