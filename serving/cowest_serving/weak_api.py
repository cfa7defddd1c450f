"""The OpenAI requests that a weak-model server understands, and its answers. Pure: needs neither torch nor HTTP.

A field that would change the answer and is not supported is refused by name; one that would not is ignored.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cowest_serving.answering import Refusal, bad_field, checked_messages, kind_of, optional
from cowest_serving.contract import Messages

if TYPE_CHECKING:
    from cowest_serving.generate import Generation, Piece, TokenLogprob

MAX_ROWS = 128  # prompts times n of one request
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat answer may fill the context
_SEED_STEP = 0x9E3779B97F4A7C15  # far apart, so that seeds 1 and 2 share no sample when n > 1
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # fields that are fine only with one of these values
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}

Prompt = Messages | str | Sequence[int]


@dataclass(frozen=True)
class Asked:
    """A request, checked. `seeds` has one for each row: the n answers of the first prompt, then of the next."""

    kind: Literal["chat", "completion"]
    model: str
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    seeds: tuple[int, ...]
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool


# ---------------------------------------------------------------- requests
def parse_chat(body: Mapping[str, Any]) -> Asked:
    """Raises `Refusal` 400 that names the field."""
    wants = optional(body, "logprobs", bool, "true or false")
    top = _number(body, "top_logprobs", int, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants:
        raise Refusal(400, "top_logprobs: wanted logprobs: true beside it, saw none.", param="top_logprobs")
    longest = _number(body, "max_completion_tokens", int, 1, None)
    longest = longest if longest is not None else _number(body, "max_tokens", int, 1, None)
    prompts = (checked_messages(body.get("messages"), _check_content),)
    return _asked("chat", body, prompts, longest, (top or 0) if wants else None)


def parse_completion(body: Mapping[str, Any]) -> Asked:
    """Raises `Refusal` 400 that names the field."""
    top = _number(body, "logprobs", int, 0, MAX_TOP_LOGPROBS)
    longest = _number(body, "max_tokens", int, 1, None) or COMPLETION_TOKENS
    return _asked("completion", body, _prompts(body.get("prompt")), longest, top)


def _asked(
    kind: Literal["chat", "completion"],
    body: Mapping[str, Any],
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    top_logprobs: int | None,
) -> Asked:
    _refuse_unsupported(body)
    n = _number(body, "n", int, 1, MAX_ROWS) or 1
    if n * len(prompts) > MAX_ROWS:
        raise bad_value("n", f"at most {MAX_ROWS} answers in one request", f"{n * len(prompts)}")
    seed = _number(body, "seed", int, None, None)
    seed = secrets.randbits(62) if seed is None else seed
    options = optional(body, "stream_options", dict, "an object") or {}
    temperature = _number(body, "temperature", float, 0, 2)
    top_p = _number(body, "top_p", float, 0, 1)
    return Asked(
        kind=kind,
        model=_model(body.get("model")),
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seeds=tuple(_row_seed(seed, row) for row in range(n * len(prompts))),
        stop=_stop(body.get("stop")),
        top_logprobs=top_logprobs,
        stream=bool(optional(body, "stream", bool, "true or false")),
        include_usage=bool(options.get("include_usage")),
    )


def _row_seed(seed: int, row: int) -> int:
    """The first row draws by the very seed of the request."""
    return (seed + row * _SEED_STEP) % 2**63


def bad_value(name: str, wanted: str, seen: str) -> Refusal:
    return Refusal(400, f"{name}: wanted {wanted}, saw {seen}.", param=name, code="invalid_value")


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in neutral:
            raise Refusal(
                400,
                f"{name}: not supported by this server, and the answer would not be what it asks for; leave it out.",
                param=name,
                code="unsupported_parameter",
            )


def _model(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_field("model", "the name of the model (GET /v1/models)", value)
    return value


def _number(body: Mapping[str, Any], name: str, kind: type, low: float | None, high: float | None) -> Any:
    value = body.get(name)
    if value is None:
        return None
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise bad_field(name, what, value)
    if not (-math.inf if low is None else low) <= value <= (math.inf if high is None else high):
        limits = f" of at least {low}" if high is None else f" from {low} to {high}"
        raise bad_value(name, what + limits, str(value))
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_field("stop", "text or a list of texts, none of them empty", value)
    if len(stops) > MAX_STOPS:
        raise bad_value("stop", f"at most {MAX_STOPS} texts", str(len(stops)))
    return tuple(stops)


def _check_content(name: str, content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise bad_field(name, "text or a list of parts", content)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise bad_value(f"{name}[{i}].type", "text (this model reads nothing else)", kind_of(part))
        if not isinstance(part.get("text"), str):
            raise bad_field(f"{name}[{i}].text", "text", part.get("text"))


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _are_token_ids(value):
            return (tuple(value),)
        if all(isinstance(item, str) or (isinstance(item, list) and item and _are_token_ids(item)) for item in value):
            return tuple(item if isinstance(item, str) else tuple(item) for item in value)
    raise bad_field("prompt", "text, token ids, or a list of one of them", value)


def _are_token_ids(items: Iterable[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


# ---------------------------------------------------------------- answers
@dataclass(frozen=True)
class Reply:
    """Makes the JSON of one request's answers."""

    asked: Asked
    digest: str
    token_text: Callable[[int], str]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, rows: Sequence[Generation]) -> dict[str, Any]:
        choices = [self._choice(index, row) for index, row in enumerate(rows)]
        return {**self._head(""), "choices": choices, "usage": self.usage(rows)}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Chat streams begin by saying whose turn it is."""
        if self.asked.kind == "completion":
            return []
        rows = range(len(self.asked.seeds))
        return [self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}}, None) for i in rows]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What one token adds to a stream: nothing, its text, or its text and the end."""
        if not piece.text and piece.finish_reason is None:
            return []
        if self.asked.kind == "completion":
            choice = {"index": index, "text": piece.text, "logprobs": self._logprobs(piece.logprobs)}
            return [self._chunk(choice, piece.finish_reason)]
        out = []
        if piece.text:
            choice = {"index": index, "delta": {"content": piece.text}, "logprobs": self._logprobs(piece.logprobs)}
            out.append(self._chunk(choice, None))
        if piece.finish_reason:
            rest = self._logprobs(piece.logprobs) if piece.logprobs and not piece.text else None
            out.append(self._chunk({"index": index, "delta": {}, "logprobs": rest}, piece.finish_reason))
        return out

    def usage_chunk(self, rows: Sequence[Generation]) -> dict[str, Any]:
        return {**self._head(".chunk"), "choices": [], "usage": self.usage(rows)}

    def usage(self, rows: Sequence[Generation]) -> dict[str, int]:
        """A prompt counts once, however many answers it got."""
        taken_in = sum(row.prompt_tokens for row in rows[:: self.asked.n])
        given_out = sum(len(row.token_ids) for row in rows)
        return {"prompt_tokens": taken_in, "completion_tokens": given_out, "total_tokens": taken_in + given_out}

    def _head(self, suffix: str) -> dict[str, Any]:
        chat = self.asked.kind == "chat"
        return {
            "id": ("chatcmpl-" if chat else "cmpl-") + self.id,
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": "fp_" + self.digest.removeprefix("sha256:")[:12],
        }

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head(".chunk"), "choices": [{**choice, "finish_reason": finish_reason}], **usage}

    def _choice(self, index: int, row: Generation) -> dict[str, Any]:
        text: dict[str, Any] = {"text": row.text}
        if self.asked.kind == "chat":
            text = {"message": {"role": "assistant", "content": row.text, "refusal": None}}
        logprobs = self._logprobs(row.logprobs or ())
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": row.finish_reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None:
            return None
        if self.asked.kind == "chat":
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        texts = [self.token_text(token.token_id) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.token_text(i): value for i, value in token.top} for token in tokens],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._scored(i, value) for i, value in token.top]
        return {**self._scored(token.token_id, token.logprob), "top_logprobs": top}

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
