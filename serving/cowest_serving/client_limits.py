"""What one client key may ask of this gateway: spec.gateway.limits. Each gateway counts for itself, all its workers
together (shared_counts.py); without keys all clients are one.

Buckets that fill up over a minute: a client that was silent may ask a minute's worth at once. Tokens are those of the
answer's usage, both models; a likely number is taken before the answer and settled after it, and a bucket that went
below nothing fills up again first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cowest_serving.answering import ChatRequest, Refusal
from cowest_serving.estimates import likely_input_tokens, likely_tokens


@dataclass(frozen=True)
class ClientLimits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


class Bucket:
    """So many a minute. `content`: what was in it at the time `at`."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self.content, self.at = per_minute, float(per_minute), now

    def left(self, now: float) -> float:
        self.content = min(float(self.per_minute), self.content + (now - self.at) * self.per_minute / 60)
        self.at = now
        return self.content

    def take(self, amount: float) -> None:
        self.content -= amount

    def seconds_until(self, amount: float, now: float) -> float:
        return max(0.0, (amount - self.left(now)) * 60 / self.per_minute)


class Client:
    """The holder of one key."""

    def __init__(self, limits: ClientLimits, now: float, slot: int | None = None) -> None:
        self.requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None
        self.under_way = 0
        self.elsewhere = 0  # under way at other workers
        self.slot = slot  # where it is in the counts of several workers

    def take(self, tokens: int) -> None:
        """A request of so many."""
        if self.requests is not None:
            self.requests.take(1)
        if self.tokens is not None:
            self.tokens.take(tokens)

    def is_at_rest(self, now: float) -> bool:
        """One that is new is no different."""
        buckets = [each for each in (self.requests, self.tokens) if each is not None]
        return not self.under_way + self.elsewhere and all(each.left(now) >= each.per_minute for each in buckets)


class Counts(Protocol):
    """Where clients are between their requests. Who borrows one gives it back before anything else is done."""

    def borrow(self, key: str, slot: int | None, now: float) -> Client:
        """`slot`: that of the client while a request of it is under way; None: look for it."""
        ...

    def give_back(self, client: Client) -> None: ...

    def keep(self, keys: Sequence[str]) -> None:
        """Others are not valid any more."""
        ...


class OwnCounts:
    """Of one process."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._clients: dict[str, Client] = {}

    def borrow(self, key: str, slot: int | None, now: float) -> Client:
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = Client(self._limits, now)
        return client

    def give_back(self, client: Client) -> None:
        """It is here all the time."""

    def keep(self, keys: Sequence[str]) -> None:
        """Those with something under way are forgotten the next time."""
        for key in [k for k, client in self._clients.items() if k not in keys and not client.under_way]:
            del self._clients[key]


class Ticket:
    """One request that was let in."""

    def __init__(self, gate: Gate, key: str, slot: int | None, tokens: int, headers: Mapping[str, str]) -> None:
        self._gate, self._key, self._slot, self._tokens = gate, key, slot, tokens
        self.headers = headers  # in OpenAI's form
        self._is_over = False

    def close(self, tokens: int) -> None:
        """The request is over, and took so many tokens."""
        if not self._is_over:
            self._is_over = True
            self._gate.leave(self._key, self._slot, tokens - self._tokens)


class Gate:
    """For all client keys."""

    def __init__(
        self, limits: ClientLimits, clock: Callable[[], float] = time.monotonic, counts: Counts | None = None
    ) -> None:
        self.limits, self._clock = limits, clock
        self.counts = counts or OwnCounts(limits)

    def enter(self, key: str, request: ChatRequest) -> Ticket:
        """Raises `Refusal` 429 that says which limit, and when to come again."""
        now, tokens, most = self._clock(), 0, self.limits.tokens_per_minute
        if most is not None:  # one that alone asks for more than a minute's worth is let in with a full bucket
            tokens = min(likely_input_tokens(request.messages, request.parameters), most)
        client = self.counts.borrow(key, None, now)
        try:
            headers = self._let_in(client, tokens, now)
        finally:
            self.counts.give_back(client)
        return Ticket(self, key, client.slot, tokens, headers)

    def hear(self, key: str, size: int) -> None:
        """Let in a word of feedback of so many bytes: all may be kept. A request like others, but over at once."""
        now, most = self._clock(), self.limits.tokens_per_minute
        tokens = likely_tokens(size)
        client = self.counts.borrow(key, None, now)
        try:
            _check_rates(client, min(tokens, most or 0), now)
            client.take(tokens)
        finally:
            self.counts.give_back(client)

    def leave(self, key: str, slot: int | None, more_tokens: int) -> None:
        """A request that was let in is over, and took so many more tokens than were set aside for it."""
        client = self.counts.borrow(key, slot, self._clock())
        try:
            client.under_way -= 1
            if client.tokens is not None:
                client.tokens.take(more_tokens)
        finally:
            self.counts.give_back(client)

    def _let_in(self, client: Client, tokens: int, now: float) -> Mapping[str, str]:
        self._check(client, tokens, now)
        client.under_way += 1
        client.take(tokens)
        return _headers(client, now)

    def _check(self, client: Client, tokens: int, now: float) -> None:
        most = self.limits.max_concurrency
        if most is not None and client.under_way + client.elsewhere >= most:
            raise _refusal(client, now, "concurrency", f"{most} requests at once", 1.0)
        _check_rates(client, tokens, now)


def _check_rates(client: Client, tokens: int, now: float) -> None:
    if client.requests is not None and (wait := client.requests.seconds_until(1, now)) > 0:
        raise _refusal(client, now, "requests", f"{client.requests.per_minute} requests per minute", wait)
    if client.tokens is not None and (wait := client.tokens.seconds_until(tokens, now)) > 0:
        raise _refusal(client, now, "tokens", f"{client.tokens.per_minute} tokens per minute", wait)


class LimitReached(Refusal):
    """`kind`: which limit, requests, tokens or concurrency."""

    def __init__(self, kind: str, message: str, wait: float, headers: Mapping[str, str]) -> None:
        super().__init__(429, message, kind, code="rate_limit_exceeded", retry_after=wait)
        self.kind, self.headers = kind, headers


def _refusal(client: Client, now: float, kind: str, limit: str, wait: float) -> LimitReached:
    message = (
        f"This key's limit of {limit} at this gateway is reached. "
        f"Ask again in {max(wait, 0.1):.1f} s, or have spec.gateway.limits raised."
    )
    return LimitReached(kind, message, wait, _headers(client, now))


def _headers(client: Client, now: float) -> dict[str, str]:
    found = {}
    for kind, bucket in (("requests", client.requests), ("tokens", client.tokens)):
        if bucket is not None:
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.left(now))))
            found[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_until(bucket.per_minute, now))
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1s, 1m3.5s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return (f"{minutes:.0f}m" if minutes else "") + f"{rest:.10g}s"
