"""A chat model behind an OpenAI-compatible HTTP endpoint, with the one retry loop of the platform.

Used by the gateway (weak and strong), the steps (strong) and judges. All failures are a `ModelError` that
says which endpoint, what was seen and what to do:

    ModelError
      EndpointUnreachable   no connection, or it broke            (retryable)
      DeadlineExceeded      no answer within the deadline         (retryable)
      RateLimited           429                                   (retryable, unless the account has no quota left)
      ServerFault           408, 409, 5xx                         (retryable)
      Crowded               no free place in time, where waiting has an end  (another endpoint may have one)
      BadAnswer             2xx, but not a chat completion        (retryable, at most twice: it may cost)
      Unauthorized          401, 403 with every key
      BadRequest            any other 4xx, a redirect, a bad address

Models differ in the parameters that they take (some no temperature, some only `max_completion_tokens`). One that the
endpoint says it does not take is left out, or called by its other name, and the call goes on; see `parameters`.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import re
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import orjson

from cowest_serving.contract import HEADER_IDEMPOTENCY, Messages
from cowest_serving.foreign_json import read_json, read_part
from cowest_serving.ids import new_id
from cowest_serving.key_pool import Key, KeyPool
from cowest_serving.parameters import NotTaken, refused_parameter, without
from cowest_serving.places import Places
from cowest_serving.wire import MAX_BODY, NoAddress, Response, TooMuch, Unconnected, Untrusted, Wire, WireError

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- what comes back
@dataclass(frozen=True)
class ChatResult:
    """One answer. `version` is the endpoint's `system_fingerprint` ("" when it gives none)."""

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    model: str
    version: str
    raw: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # of the response, names in lower case


class Payer(Protocol):
    """Who pays for a call, and so hears of each of its attempts."""

    async def begin(self) -> None:
        """One is to be sent now. Raises `ModelError` where there is no room for it beside those before."""
        ...

    def unpaid(self) -> None:
        """The one that was sent last is not billed."""
        ...


class ChatModel(Protocol):
    """Anything that answers a chat. Raises `ModelError`."""

    async def __call__(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        idempotency_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ChatResult: ...


class ModelError(Exception):
    """No usable answer from a model. `retryable`: the same call may succeed later."""

    default_retryable: ClassVar[bool] = False
    may_be_billed = False  # it was sent, and what came does not say that nothing was written
    max_retries: ClassVar[int | None] = None  # a tighter limit than the model's own

    def __init__(
        self,
        message: str,
        retryable: bool | None = None,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        parameter: str = "",
        error: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = self.default_retryable if retryable is None else retryable
        self.status = status  # HTTP status that the endpoint gave, None when it gave none
        self.retry_after = retry_after  # seconds that the endpoint asked to wait
        self.parameter = parameter  # of the call, that the endpoint says it does not take
        self.error = error or {}  # the endpoint's own error object, where it finds the request itself wrong


class EndpointUnreachable(ModelError):
    default_retryable = True


class DeadlineExceeded(ModelError):
    default_retryable = True
    may_be_billed = True


class RateLimited(ModelError):
    default_retryable = True


class ServerFault(ModelError):
    default_retryable = True


class Crowded(ModelError):
    """All places were taken for as long as a call may wait for one: it was not sent."""

    default_retryable = True
    max_retries = 0


class BadAnswer(ModelError):
    default_retryable = True
    may_be_billed = True
    max_retries = 2
    is_foreign = False  # not even an error object: what answers may be no chat endpoint at all


class Unauthorized(ModelError):
    pass


class BadRequest(ModelError):
    pass


_CLIENTS_FAULT = (400, 413, 422)


def is_clients_fault(error: ModelError) -> bool:
    """Whether this very request is to blame (too long, filtered), and the next may be answered."""
    return isinstance(error, BadRequest) and error.status in _CLIENTS_FAULT


# ---------------------------------------------------------------- the model
class HttpChatModel:
    """`POST <endpoint>/chat/completions`. Safe for concurrent calls; at most `max_concurrency` at a time.

    `timeout_seconds` limits a call as a whole, its retries and the waits between them included (not the wait
    for a free place); `deadline_seconds` lifts that limit above the time of one attempt. `until`, by the monotonic
    clock, is when a call has to be over with all that (a stream: its answer has begun), however long it waited.
    Retries carry the same Idempotency-Key.
    """

    when_crowded: ClassVar[str] = "Raise strong.maxConcurrency where the endpoint takes more."

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_keys: Sequence[str] = (),
        timeout_seconds: float = 60,
        max_concurrency: int = 16,
        max_retries: int = 6,
        deadline_seconds: float | None = None,
        backoff_seconds: float = 0.5,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.model = model
        self.max_retries = max_retries
        self.keys = KeyPool(api_keys)
        self._timeout = timeout_seconds
        self._deadline = max(timeout_seconds, deadline_seconds or 0)
        self._backoff = backoff_seconds
        self._places = Places(max_concurrency, self._crowded)  # how many calls may be under way: learned from 429s
        self._wire: Wire | None = None
        self._not_taken = NotTaken()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Calls under way fail with `EndpointUnreachable`."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.aclose()

    def expect_call(self) -> None:
        """One comes soon: its connection may be made meanwhile."""
        with suppress(WireError):
            self._connected().warm()

    async def __call__(  # noqa: PLR0913  # those of `ChatModel`, who pays, and until when
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        idempotency_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        payer: Payer | None = None,
        until: float | None = None,
    ) -> ChatResult:
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
        body = self._body(messages, options, extra)
        self._check()
        await self._places.enter(until)
        try:
            key, give_up_at = idempotency_key or new_key(), self._give_up_at(until)
            response, payload = await self._with_retries(body, key, True, give_up_at, payer)
            self._places.answered()
            return _result(self.endpoint, response, payload)
        finally:
            self._places.leave()

    async def stream(  # noqa: PLR0913  # as any call
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        idempotency_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        payer: Payer | None = None,
        until: float | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The answer's chunks as the endpoint wrote them: the JSON of each `data:` event, without `[DONE]`.

        Tried again only until the answer begins; a fault later raises: text has gone out.
        Each chunk must come within `timeout_seconds` of the one before; comments between them are no chunks.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
        body = self._body(messages, options, extra) | {"stream": True}
        self._check()
        await self._places.enter(until)
        try:
            key, give_up_at = idempotency_key or new_key(), self._give_up_at(until)
            response, (begun, rest) = await self._with_retries(body, key, False, give_up_at, payer)
            self._places.answered()
            broke: ModelError | None = None
            try:
                for chunk in begun:
                    yield chunk
                async for chunk in rest:
                    yield chunk
                response.finish()
            except ModelError as error:
                broke = error
                raise
            finally:
                response.close()
                self._streamed(broke)
        finally:
            self._places.leave()

    def _body(self, messages: Messages, options: Mapping[str, Any], extra: Mapping[str, Any] | None) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        return {**(extra or {}), **given, "model": self.model, "messages": list(messages)}

    def _check(self) -> None:
        """Before a call waits for a place. Raises what would end it in any case."""

    def _streamed(self, broke: ModelError | None) -> None:
        """A stream that had begun is over: it broke off, or all came that somebody wanted."""

    # ------------------------------------------------------------ the one retry loop
    def _give_up_at(self, until: float | None) -> float:
        now = time.monotonic()
        if until is not None and now >= until:
            raise self._late(0.0)
        return now + self._deadline if until is None else min(now + self._deadline, until)

    async def _with_retries(
        self, body: Mapping[str, Any], key: str, read: bool, give_up_at: float, payer: Payer | None
    ) -> tuple[Response, Any]:
        """A response with status 2xx and its parsed body, or what `_begun` gives where it is not to be `read`; tried
        again while that may help."""
        attempt, keys_left = 0, len(self.keys) - 1
        refused: dict[str, str] = {}  # parameters that this call does without
        has_several = (body.get("n") or 1) != 1  # choices
        while True:
            used, number = await self._key(give_up_at), self._places.attempt()
            not_taken = {**self._not_taken.known(), **refused}
            sent = without(body, not_taken) if not_taken else body
            if payer is not None:
                await payer.begin()
                used = self.keys.take()  # another one, where that took a while
            try:
                answer = await self._once(orjson.dumps(sent), key, read, give_up_at, has_several)
                self.keys.answered(used)
                return answer
            except ModelError as error:
                if payer is not None and not error.may_be_billed:
                    payer.unpaid()
                # A limit that was called by its other name stays: without it answers cost.
                if error.parameter in sent and error.parameter not in not_taken.values():
                    refused[error.parameter] = self._do_without(error.parameter, body)
                    continue  # at once, and no more than once a parameter: the next call does not have it
                if isinstance(error, Unauthorized | RateLimited) and self._has_another_key(used, error, keys_left):
                    keys_left -= 1
                    continue  # nothing to wait for
                if isinstance(error, RateLimited):
                    self._places.refused(number)
                wait = next_wait(error, attempt, self.max_retries, self._backoff)
                if wait is not None and isinstance(error, RateLimited) and len(self.keys) > 1:
                    wait = min(wait, max(self.keys.rest, self._backoff))  # another key may be free before
                if wait is None or time.monotonic() + wait >= give_up_at:
                    raise
            attempt += 1
            await asyncio.sleep(wait)

    async def _key(self, give_up_at: float) -> Key:
        """The key of the next attempt. Waits while the endpoint has said so for all keys, unless it is in vain."""
        while (rest := self.keys.rest) > 0:
            if time.monotonic() + rest >= give_up_at:
                raise RateLimited(
                    f"{self.endpoint} has answered 429 to every key, and wants to be left alone for {rest:.0f} s more. "
                    f"Wait {rest:.0f} s, lower maxConcurrency, or give more keys.",
                    status=429,
                    retry_after=rest,
                )
            await asyncio.sleep(rest)
        return self.keys.take()

    def _has_another_key(self, used: Key, error: ModelError, keys_left: int) -> bool:
        if isinstance(error, RateLimited) and error.retryable:
            self.keys.limited(used, error.retry_after)
        else:
            self.keys.refused(used)
        return keys_left > 0 and self.keys.rest <= 0

    def _crowded(self, seconds: float) -> Crowded:
        return Crowded(
            f"{self.endpoint} was not asked: no place was free within {seconds:.1f} s, with "
            f"{self._places.limit:.0f} calls at once. {self.when_crowded}",
            retry_after=1,
        )

    def _do_without(self, name: str, body: Mapping[str, Any]) -> str:
        """Note that the endpoint does not take a parameter. Its other name, "" where it has none."""
        other, is_news = self._not_taken.learn(name, body)
        if is_news:
            instead = f"is sent as `{other}`" if other else "is left out, which may change its answers"
            log.warning("%s does not take `%s` for %s: from now on it %s.", self.endpoint, name, self.model, instead)
        return other

    async def _once(
        self, data: bytes, key: str, read: bool, give_up_at: float, has_several: bool
    ) -> tuple[Response, Any]:
        left = min(self._timeout, give_up_at - time.monotonic())
        try:
            asked = self._connected().ask("POST", "/chat/completions", self._headers(key), data, left, is_whole=read)
            response = await asked
        except TimeoutError as error:
            late = self._late(left)
            late.may_be_billed = not isinstance(error, Unconnected)
            raise late from None
        except WireError as error:
            raise _unreachable(self.endpoint, error) from error
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        if read:
            return response, _parsed(self.endpoint, response.body)
        return response, await _begun(self.endpoint, response, self._timeout, give_up_at, has_several)

    def _late(self, seconds: float) -> DeadlineExceeded:
        late = DeadlineExceeded(
            f"{self.endpoint} gave no answer within {seconds:.1f} s. "
            "Check that the model is not overloaded, or raise its timeout."
        )
        late.may_be_billed = False
        return late

    def _refusal(self, response: Response) -> ModelError:
        """What a status other than 2xx means."""
        error = {} if response.status < 400 else error_object(response.body)
        wait = retry_after(response.headers, time.time())
        if wait is None and response.status == 429:
            wait = limit_reset(response.headers)
        return fault(self.endpoint, response.status, error, wait, keyless=not self.keys.current.value)

    def _headers(self, key: str) -> dict[str, str]:
        headers = {"content-type": "application/json", HEADER_IDEMPOTENCY: key}
        if key_in_use := self.keys.current.value:
            headers["authorization"] = f"Bearer {key_in_use}"
        return headers

    def _connected(self) -> Wire:
        if self._wire is None:
            self._wire = Wire(self.endpoint)
        return self._wire


def is_same_origin(one: str, other: str) -> bool:
    """Whether two endpoints are of one scheme, host and port. Keys go to the origin that they were given for, alone."""
    return _origin(one) == _origin(other)


def _origin(endpoint: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(endpoint)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None  # no number: nothing can be sent there
    return parts.scheme, parts.hostname or "", port


def new_key() -> str:
    return new_id()


# ---------------------------------------------------------------- when to try again
def next_wait(error: ModelError, attempt: int, max_retries: int, backoff: float = 0.5) -> float | None:
    """Seconds to wait before the next attempt; `None`: give up. `attempt` counts from 0."""
    limit = max_retries if error.max_retries is None else min(max_retries, error.max_retries)
    if not error.retryable or attempt >= limit:
        return None
    if error.retry_after is not None:
        return error.retry_after
    # Jitter, since calls that failed together would otherwise come back together.
    return min(8.0, backoff * 2.0**attempt) * random.uniform(0.5, 1.0)


_LONGEST_WAIT = 86_400.0  # seconds: whoever asks for more, or for a number without an end, is asked once a day


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by `retry-after-ms`, or `Retry-After` in seconds or as a date. `now`: epoch seconds."""
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d+(\.\d+)?", milliseconds):
        return min(float(milliseconds) / 1000, _LONGEST_WAIT)
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return min(float(value), _LONGEST_WAIT)
    try:
        at: float = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):  # no date, or one of no year that there is
        return None
    return min(max(0.0, at - now), _LONGEST_WAIT)


_RESETS = ("requests", "tokens")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}


def limit_reset(headers: Mapping[str, str]) -> float | None:
    """Seconds until what is used up is given anew, by OpenAI's `x-ratelimit-*` ("1s", "6m0s", "120ms"), without a
    Retry-After. Of what is not used up the reset is no wait: it says when the whole is there again."""
    used_up = [kind for kind in _RESETS if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"]
    resets = [_duration(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in used_up]
    return max((seconds for seconds in resets if seconds is not None), default=None)


def _duration(text: str) -> float | None:
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|)", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return min(sum(float(number) * _UNITS[unit] for number, unit in parts), _LONGEST_WAIT)


# ---------------------------------------------------------------- reading answers
def fault(
    endpoint: str, status: int, error: Mapping[str, Any], wait: float | None = None, *, keyless: bool = False
) -> ModelError:
    """What a status other than 2xx means. `error`: the endpoint's own error object. `keyless`: no key was sent."""
    said = said_by(error)
    seen = f"{endpoint} answered {status}" + (f" ({said})" if said else "")
    if status in (401, 403):
        remedy = "No API key was sent." if keyless else "Check that the API key given for this endpoint is right."
        return Unauthorized(f"{seen}. {remedy}", status=status)
    if status == 429 and "insufficient_quota" in (error.get("code"), error.get("type")):
        remedy = "Its account has no money or quota left: top it up, then run again."
        return RateLimited(f"{seen}. {remedy}", retryable=False, status=status, retry_after=wait)
    if status == 429:
        after = f"Wait {wait:.0f} s" if wait is not None else "Wait"
        remedy = f"{after}, lower maxConcurrency, or give more keys."
        return RateLimited(f"{seen}: too many requests. {remedy}", status=status, retry_after=wait)
    if status in (408, 409) or status >= 500:
        return ServerFault(f"{seen}: a fault on its side. Try again later.", status=status, retry_after=wait)
    if status == 402:
        remedy = "Its account has no money left: top it up, then run again."
    elif status in (404, 405, 410):
        remedy = "Check the endpoint (it normally ends in /v1) and the name of the model."
    elif status < 400:
        remedy = "It points elsewhere: give the endpoint's final address."
    else:
        remedy = "Check the name of the model and the parameters of the call."
    parameter = refused_parameter(status, error)
    return BadRequest(f"{seen}. {remedy}", status=status, parameter=parameter, error=error)


def error_object(data: bytes) -> Mapping[str, Any]:
    """OpenAI's error object in a body; of any other body the head, as its message."""
    try:
        payload = read_json(data)
    except ValueError:
        payload = data.decode("utf-8", "replace")
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    if isinstance(error, dict):
        return {**error, "message": str(error.get("message") or error.get("detail") or error)}
    return {"message": str(error)[:500]}


def is_error(payload: Mapping[str, Any]) -> bool:
    """Whether it came in place of a completion, or of a chunk: OpenAI's form, or that of older vLLMs."""
    return bool(payload.get("error")) or payload.get("object") == "error"


def said_by(error: Mapping[str, Any]) -> str:
    """The message of an error object, on one short line."""
    return " ".join(str(error.get("message") or "").split())[:200]


def _parsed(endpoint: str, data: bytes) -> Mapping[str, Any]:
    """The body of a chat completion, checked as far as `_result` reads it."""
    try:
        payload = read_json(data)
        if not payload.get("choices") and is_error(payload):
            raise _own_error(endpoint, data)
        content_text(payload["choices"][0]["message"].get("content"))
        if not isinstance(payload.get("usage") or {}, dict):
            raise TypeError("usage is not an object")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _garbage(endpoint, data) from None
    assert isinstance(payload, dict)
    return payload


def content_text(content: Any) -> str:
    """The text of a message's content, which some endpoints give in parts. Raises TypeError for what is neither."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if content is not None and not isinstance(content, str):
        raise TypeError("content is not text")
    return content or ""


def _own_error(endpoint: str, data: bytes) -> BadAnswer:
    return BadAnswer(f"{endpoint} answered 200, but with an error of its own ({said_by(error_object(data))}).")


def _garbage(endpoint: str, data: bytes) -> BadAnswer:
    kind = "nothing" if not data else f"{len(data)} bytes that start with {data[:40]!r}"
    garbage = BadAnswer(
        f"{endpoint} answered 200, but with {kind} instead of a chat completion. "
        "Check that the endpoint is an OpenAI-compatible API (its address normally ends in /v1)."
    )
    garbage.is_foreign = True
    garbage.may_be_billed = not data.lstrip().startswith(b"<")  # a page is of no model
    return garbage


def _result(endpoint: str, response: Response, payload: Mapping[str, Any]) -> ChatResult:
    choice, usage = payload["choices"][0], payload.get("usage") or {}
    return ChatResult(
        text=content_text(choice["message"].get("content")),
        finish_reason=str(choice.get("finish_reason") or ""),
        input_tokens=count(usage.get("prompt_tokens")),
        output_tokens=count(usage.get("completion_tokens")),
        model=str(payload.get("model") or ""),
        version=str(payload.get("system_fingerprint") or ""),
        raw=payload,
        headers=response.headers,
    )


_MOST_TOKENS = 2**53


def count(value: Any) -> int:
    """A token count as an endpoint may give it; 0 where it is no number, below 0, or too large for a book to add up."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value < _MOST_TOKENS else 0


_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"[^"]')  # some servers say "" until then
_MAX_UNREAD = 8 * 1024  # bytes of a body that is no event stream, kept to say what it is


async def _begun(
    endpoint: str, response: Response, timeout: float, give_up_at: float, has_several: bool
) -> tuple[list[bytes], AsyncIterator[bytes]]:
    """A stream up to the answer's first chunk, and its rest: an error in that chunk's place is one of the call."""
    read: list[bytes] = []
    left = min(timeout, give_up_at - time.monotonic())
    if response.headers.get("content-type", "").startswith("application/json"):  # it does not stream
        payloads = _in_chunks(endpoint, response, left)
    else:
        payloads = _events(endpoint, response, timeout, left, has_several)
    try:
        read.append(await anext(payloads))
        if not _is_of_the_answer(endpoint, read[0]):
            async with asyncio.timeout(give_up_at - time.monotonic()):  # else each had a patience of its own
                async for payload in payloads:
                    read.append(payload)
                    if _is_of_the_answer(endpoint, payload):
                        break
    except TimeoutError:
        response.close()
        raise _stopped(endpoint, left) from None
    except BaseException:
        response.close()
        raise
    return read, payloads


def _is_of_the_answer(endpoint: str, payload: bytes) -> bool:
    """False for what some endpoints say before (filters, say). Raises for an error, and for what is no chunk."""
    try:
        chunk = read_part(payload)
        if is_error(chunk):
            raise _own_error(endpoint, payload)
        return bool(chunk.get("choices"))
    except (ValueError, AttributeError):
        raise _garbage(endpoint, payload) from None


class _Ends:
    """Whether each choice of a stream that has begun has its end. Several come in any order, and are told apart."""

    def __init__(self, has_several: bool) -> None:
        self._has_several, self.are_all_there = has_several, False
        self._begun: set[Any] = set()
        self._ended: set[Any] = set()

    def note(self, payload: bytes) -> None:
        if not self._has_several:
            self.are_all_there = self.are_all_there or _FINISHED.search(payload) is not None
            return
        with suppress(ValueError, AttributeError, TypeError):  # no chunk: its reader says so
            for choice in read_part(payload).get("choices") or ():
                (self._ended if choice.get("finish_reason") else self._begun).add(choice.get("index", 0))
        self.are_all_there = bool(self._ended) and self._begun <= self._ended


async def _events(
    endpoint: str, response: Response, timeout: float, first: float, has_several: bool
) -> AsyncIterator[bytes]:
    """Payloads of the `data:` lines of an event stream. Raises when it ends, by `[DONE]` or not, before each choice
    does, and when none comes for `timeout` seconds (the first: `first`): comments, by which proxies keep a connection
    open, are none."""
    ends, seen, buffered, unread = _Ends(has_several), 0, b"", b""
    clock = asyncio.get_running_loop().time
    renewed, until = 0, clock() + first
    while True:
        if seen > renewed:
            renewed, first, until = seen, timeout, clock() + timeout
        data = await _some(endpoint, response, first, until)
        if not seen and len(unread) < _MAX_UNREAD:
            unread += data
        payloads, buffered = _payloads(buffered + data, is_end=not data)
        for payload in payloads:
            if payload == b"[DONE]":
                break
            yield payload
            seen += 1  # when the client has it already, as what follows
            ends.note(payload)
        else:
            if data:
                continue
        if not seen:
            raise _no_stream(endpoint, unread)
        if not ends.are_all_there:
            raise _broken_off(endpoint)
        return


def _payloads(text: bytes, is_end: bool) -> tuple[list[bytes], bytes]:
    """Of the lines that are whole, and the beginning of the next one."""
    lines = text.splitlines()  # bytes: at CR and LF alone
    rest = b"" if is_end or text.endswith((b"\n", b"\r")) else lines.pop()
    return [payload for line in lines if line.startswith(b"data:") and (payload := line[5:].strip())], rest


async def _in_chunks(endpoint: str, response: Response, timeout: float) -> AsyncIterator[bytes]:
    """Of an answer that comes whole, though a stream was asked for: it is paid, and would be again."""
    until, parts, size = asyncio.get_running_loop().time() + timeout, [], 0
    while data := await _some(endpoint, response, timeout, until):
        parts.append(data)
        size += len(data)
        if size > MAX_BODY:
            raise _unreachable(endpoint, TooMuch(f"its answer is longer than {MAX_BODY} bytes"))
    completion = _parsed(endpoint, b"".join(parts))
    try:
        chunks = [orjson.dumps(chunk) for chunk in as_chunks(completion, bool(completion.get("usage")))]
    except (KeyError, TypeError, ValueError, AttributeError):  # its first choice is one, another is not
        raise _garbage(endpoint, b"".join(parts)) from None
    for chunk in chunks:
        yield chunk


def as_chunks(completion: Mapping[str, Any], has_usage: bool) -> Iterator[Mapping[str, Any]]:
    """A whole completion as the chunks of a stream, with its usage as the last one or without."""
    head = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    for choice in completion["choices"]:
        delta = dict(choice["message"])
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        at = {"index": choice.get("index", 0)}
        yield head | {"choices": [{**at, "delta": delta, "finish_reason": None}]}
        yield head | {"choices": [{**at, "delta": {}, "finish_reason": choice.get("finish_reason")}]}
    if has_usage:
        yield head | {"choices": [], "usage": completion.get("usage")}


async def _some(endpoint: str, response: Response, timeout: float, until: float) -> bytes:
    try:
        return await response.some(until)
    except TimeoutError:
        raise _stopped(endpoint, timeout) from None
    except WireError as error:
        raise _unreachable(endpoint, error) from error


def _stopped(endpoint: str, seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{endpoint} stopped in the middle of an answer for {seconds:.1f} s. "
        "Check that the model is not overloaded, or raise its timeout."
    )


def _broken_off(endpoint: str) -> EndpointUnreachable:
    error = EndpointUnreachable(f"{endpoint} broke off in the middle of an answer. Ask again.")
    error.may_be_billed = True
    return error


def _no_stream(endpoint: str, data: bytes) -> BadAnswer:
    """An endpoint that does not stream its errors, or nothing at all."""
    with suppress(ValueError, AttributeError):
        if is_error(read_json(data)):
            return _own_error(endpoint, data)
    return _garbage(endpoint, data)


# ---------------------------------------------------------------- connections
def _unreachable(endpoint: str, error: WireError) -> ModelError:
    if isinstance(error, NoAddress):
        return BadRequest(f"{endpoint} is not an address. Give one such as https://host/v1.")
    if isinstance(error, Untrusted):
        return EndpointUnreachable(
            f"{endpoint} has a TLS certificate that is not trusted ({error}). "
            "Give its CA in SSL_CERT_FILE, or check the address.",
            retryable=False,
        )
    if isinstance(error, TooMuch):
        return BadAnswer(f"{endpoint} answered more than is read: {error}. Lower max_tokens.", retryable=False)
    away = EndpointUnreachable(
        f"{endpoint} cannot be reached or broke off ({error}). Check that it runs and its address is right."
    )
    away.may_be_billed = error.is_sent
    return away
