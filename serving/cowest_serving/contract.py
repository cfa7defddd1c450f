"""What the gateway, the weak-model server, the steps and the operator agree on: headers, routing, records, settings.

Pure values, no I/O. Settings are parsed from the *defaulted* spec of a CollaborationJob (defaults are said once, in
crds/collaborationjob.yaml), so the dataclasses here give no defaults except `None` for what may be absent.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, TypeVar

# ---------------------------------------------------------------- headers
HEADER_REQUEST_ID = "x-request-id"
KEY_MARK = "."  # in it, before the key of late words, where identifiers are hidden
HEADER_ARM = "x-cowest-arm"  # stable | candidate
HEADER_MODE = "x-cowest-mode"  # Pair | StrongAlone | WeakAlone: what really made this answer
HEADER_PAIR = "x-cowest-pair"  # digest of the pair
HEADER_WEAK = "x-cowest-weak"  # digest of the weak model that drafted, absent when none did
HEADER_STRONG = "x-cowest-strong"  # model name that the strong endpoint gave back
HEADER_MODEL_DIGEST = "x-cowest-model-digest"  # the weak server: what it serves
HEADER_TRACE = "x-cowest-trace"  # "durable": the record of this answer survives the gateway
HEADER_SESSION = "x-session-id"  # sticky routing when the body has no `user`
HEADER_IDEMPOTENCY = "idempotency-key"
JUDGE_PATH = "/judge/v1"  # of the proxy: the judge of spec.feedback.evaluator, as /v1 is the strong model
EVALUATOR_KEY = "COWEST_EVALUATOR_API_KEY"  # environment variable: of a scorer, or of the first judge
JURY_KEYS = "COWEST_JURY_API_KEY_"  # and a number: of further judges
UNKNOWN_OUTPUT_TOKENS = 1024  # of an answer that nothing bounds, when none has been seen
KEEP_ALIVE_SECONDS = 75  # longer than clients and ingresses keep an idle connection: none is sent into as it closes

Mode = Literal["Pair", "StrongAlone", "WeakAlone"]
DraftForm = Literal["Explanation", "Knowledge", "Answer"]
Message = Mapping[str, Any]  # one OpenAI chat message
Messages = Sequence[Message]


# ---------------------------------------------------------------- keys of evaluators
def evaluator_key(number: int = 0) -> str:
    """The environment variable with the key of a judge: 0 is the first, and no juror's."""
    return f"{JURY_KEYS}{number}" if number else EVALUATOR_KEY


def is_evaluator_key(variable: str) -> bool:
    return variable == EVALUATOR_KEY or variable.startswith(JURY_KEYS)


# ---------------------------------------------------------------- parsing
class SettingsError(ValueError):
    """A setting is missing or of the wrong type. The message names the field by its path in the manifest."""


T = TypeVar("T")
_hints = functools.cache(typing.get_type_hints)  # reading them takes longer than a whole manifest


@functools.cache
def camel(name: str) -> str:
    """`api_key_secret_refs` -> `apiKeySecretRefs`; a trailing underscore (`http_`) is dropped."""
    head, *tail = name.rstrip("_").split("_")
    return head + "".join(part.capitalize() for part in tail)


def parse(kind: type[T], data: Mapping[str, Any], path: str = "spec") -> T:
    """Build the frozen dataclass `kind` from a camelCase mapping. Unknown keys are ignored (the schema refuses them).

    Decimal strings become `float` where the field says float. Raises `SettingsError`.
    """
    hints = _hints(kind)  # type: ignore[arg-type]  # for mypy no type[T] is hashable
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = camel(field.name)
        if not field.init:
            continue
        if data.get(key) is None:
            if _optional(hints[field.name]):
                values[field.name] = None
                continue
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
                continue
            raise SettingsError(f"{path}.{key}: wanted a value, saw none")
        values[field.name] = _convert(hints[field.name], data[key], f"{path}.{key}")
    return kind(**values)


def dump(value: Any) -> Any:
    """The inverse of `parse`: dataclasses to camelCase mappings, floats to decimal strings, `None` left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            camel(f.name): dump(item) for f in dataclasses.fields(value) if (item := getattr(value, f.name)) is not None
        }
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    return repr(value) if isinstance(value, float) else value


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if _optional(hint):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{path}: wanted an object, saw {type(value).__name__}")
        return parse(typing.cast(Any, hint), value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise SettingsError(f"{path}: wanted one of {', '.join(typing.get_args(hint))}, saw {value!r}")
        return value
    return _plain(hint, value, path)


def _plain(hint: Any, value: Any, path: str) -> Any:
    if hint is float:
        try:
            return float(Decimal(str(value)))
        except InvalidOperation:
            raise SettingsError(f"{path}: wanted a decimal number as a string, saw {value!r}") from None
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise SettingsError(f"{path}: wanted a whole number, saw {value!r}")
    if hint is str and not isinstance(value, str):
        raise SettingsError(f"{path}: wanted text, saw {value!r}")
    return value


# ---------------------------------------------------------------- digests
def digest_of(value: Any) -> str:
    """`sha256:<64 hex>` of the canonical JSON of a value (or of the bytes given)."""
    data = value if isinstance(value, bytes) else canonical_json(value)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# ---------------------------------------------------------------- settings (sections of the manifest)
@dataclass(frozen=True)
class SecretRef:
    name: str
    key: str


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in `currency`."""

    input_per_million_tokens: float
    output_per_million_tokens: float
    currency: str

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """Money."""
        return (input_tokens * self.input_per_million_tokens + output_tokens * self.output_per_million_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """Hard limits on the strong model; `None` is no limit. Those of a day hold for live answers too."""

    calls_per_round: int | None = None
    tokens_per_day: int | None = None
    money_per_round: float | None = None
    money_per_day: float | None = None

    @property
    def limits_a_day(self) -> bool:
        return self.tokens_per_day is not None or self.money_per_day is not None


@dataclass(frozen=True)
class Fallback:
    """Another endpoint of an equivalent model, for live answers while the pair's own fails."""

    endpoint: str
    model: str
    api_key_secret_ref: SecretRef | None = None


@dataclass(frozen=True)
class Strong:
    """The black-box strong model behind an OpenAI-compatible endpoint (`.../v1`)."""

    endpoint: str
    model: str
    api_key_secret_refs: tuple[SecretRef, ...]
    timeout_seconds: int
    max_concurrency: int
    max_retries: int
    max_tokens: int | None = None
    prices: Prices | None = None
    budget: Budget | None = None
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def limits_live_answers(self) -> bool:
        return self.budget is not None and self.budget.limits_a_day


@dataclass(frozen=True)
class Prompts:
    """Templates with {query} and {draft}. `draft` goes to the weak model, `refine` and `solo` to the strong one."""

    draft: str
    refine: str
    solo: str

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(dataclasses.asdict(self))


@dataclass(frozen=True)
class RedactionPattern:
    name: str
    regex: str  # RE2


@dataclass(frozen=True)
class Redaction:
    """What neither the strong model nor a trace may see. An edit acts at once: it is no part of the pair."""

    identifiers: tuple[str, ...] = ()  # `redaction.KINDS`
    patterns: tuple[RedactionPattern, ...] = ()
    in_answers: Literal["Restore", "Keep"] = "Restore"


@dataclass(frozen=True)
class DraftCacheLimits:
    max_entries: int
    ttl_seconds: int


@dataclass(frozen=True)
class HedgeLimits:
    after_milliseconds: int
    max_percent: int


@dataclass(frozen=True)
class RouteLimits:
    """How far a predictor may be gone by."""

    max_loss: float  # of the mean score on the held-out queries: the upper end of its 95 % interval
    explore_percent: int  # of what it would route goes the usual way all the same


@dataclass(frozen=True)
class Shortcuts:
    """Ways to answer sooner or for less; None is off. No part of the pair: an edit acts at once."""

    draft_cache: DraftCacheLimits | None = None
    hedge: HedgeLimits | None = None
    strong_alone: RouteLimits | None = None
    weak_alone: RouteLimits | None = None

    @property
    def routed(self) -> dict[str, RouteLimits]:
        """Those that go by a predictor, by their names in the manifest."""
        named = {"weakAlone": self.weak_alone, "strongAlone": self.strong_alone}
        return {name: limits for name, limits in named.items() if limits is not None}


@dataclass(frozen=True)
class Collaboration:
    draft: DraftForm
    when_weak_fails: Literal["StrongAlone", "Fail"]
    when_strong_fails: Literal["WeakAlone", "Fail"]
    when_drafts_hurt: Literal["StrongAlone", "Serve"]
    draft_max_tokens: int
    prompts: Prompts | None = None  # resolved: inline, from the ConfigMap, or the built-in ones of the draft form
    redaction: Redaction | None = None
    shortcuts: Shortcuts | None = None


# ---------------------------------------------------------------- pairs and routing
@dataclass(frozen=True)
class Pair:
    """The unit that is measured, gated and promoted: never the weak model alone."""

    weak_digest: str
    weak_uri: str
    prompts: Prompts
    draft: DraftForm
    strong_endpoint: str
    strong_model: str

    @functools.cached_property
    def digest(self) -> str:
        """Of what decides the answer; where the files lie and at which address the strong model is does not."""
        return digest_of([self.weak_digest, self.prompts.digest, self.draft, self.strong_model])


@dataclass(frozen=True)
class PredictorRef:
    """Where a predictor lies, the digest of its file, and for which shortcuts its loss was measured to be small."""

    uri: str
    digest: str
    shortcuts: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One way to answer, with its share of the live traffic in percent."""

    name: Literal["stable", "candidate"]
    weight_percent: int
    mode: Mode
    pair: Pair
    weak_endpoint: str | None = None  # http://host:port/v1; None while mode is StrongAlone
    predictor: PredictorRef | None = None  # None: every query goes the usual way


@dataclass(frozen=True)
class Routing:
    """What the gateway does with the next request. Read from a file that is replaced atomically; taken up in < 1 s."""

    version: int  # grows with every change
    salt: str  # of the sticky split: a new rollout draws its users anew
    arms: tuple[Arm, ...]


# ---------------------------------------------------------------- records
# Columns of a trace segment (Parquet, zstd): name -> arrow type name. One row an answer.
TRACE_COLUMNS: dict[str, str] = {
    "trace_id": "string",  # = x-request-id, where identifiers are hidden what stands before its dot
    "time": "timestamp[us, UTC]",
    "routing_version": "int64",
    "arm": "string",
    "weight_percent": "int32",
    "mode": "string",
    # ok | weak_failed | strong_failed | fell_back (a fallback of the strong model answered) | client_gone
    # | refused (the strong model finds the request itself wrong) | over_budget (it was not asked)
    "status": "string",
    "error": "string",
    "pair_digest": "string",
    "weak_digest": "string",
    "prompts_digest": "string",
    "draft_form": "string",
    "strong_model": "string",  # as the endpoint named it
    "strong_version": "string",  # system_fingerprint, "" when the endpoint gives none
    "user_hash": "string",  # sha256 of the sticky key, "" when there was none
    "query": "string",  # text of the last user message
    "messages": "string",  # JSON of all messages
    "draft": "string",
    "answer": "string",
    # JSON of the calls of tools that the answer consists of, alone or beside its text, as the strong model wrote them;
    # null where it calls none, and in old segments
    "tool_calls": "string",
    "draft_ms": "double",
    "answer_ms": "double",
    "weak_input_tokens": "int64",
    "weak_output_tokens": "int64",
    "strong_input_tokens": "int64",
    "strong_output_tokens": "int64",
    "shadow": "bool",  # a replay: never collected for training
    "shortcut": "string",  # those of collaboration.shortcuts that were taken, separated by commas; null in old segments
    "application": "string",  # whose client key it was: the name of its file in the Secret; "" or null: not known
    "propensity": "double",  # chance of the way it was answered, given the query; null in old segments: 1
    "placeholders": "string",  # JSON: placeholder -> digest of its value by a key that only the client has; or null
}
FEEDBACK_COLUMNS: dict[str, str] = {
    "feedback_id": "string",
    "trace_id": "string",
    "time": "timestamp[us, UTC]",
    "score": "double",  # in [0, 1] or null; of a thumb 1 or 0
    "reference": "string",  # a late reference or null; of words without one the correction, or the accepted text
    "comment": "string",
    "thumb": "string",  # up | down or null
    "correction": "string",  # what the answer should have been, as a user wrote it
    "accepted": "string",  # the text that a user went on with
    "source": "string",  # user hash or application
    "placeholders": "string",  # as in traces, of the texts of this row; "": the word came without the key
}
PREDICTOR_FILE = "predictor.json"  # of the step `predictor`
TRACES_PREFIX = "traces"  # <store>/traces/<YYYY-MM-DD>/<HHMMSS>-<writer>-<n>.parquet
FEEDBACK_PREFIX = "feedback"  # same layout


def query_text(messages: Messages) -> str:
    """Text of the last user message; parts that are not text are left out."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return message_text(message)
    return ""


def message_text(message: Message) -> str:
    """Parts that are not text are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content if part.get("type") == "text")


def reference_text(value: Any) -> str | None:
    """A right answer as data and feedback may give it: text; a number becomes its text, a list of texts its JSON,
    none (rows for a judge) "". `None`: it is none of these."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return str(int(value) if whole else value)  # tables make floats of whole numbers where some are missing
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return json.dumps(value, ensure_ascii=False)
    return None
