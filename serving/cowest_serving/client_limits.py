"""What one client key may ask of this gateway: spec.gateway.limits. Each gateway counts for itself, and each of its
workers has an equal part; without keys all clients are one.

Buckets that fill up over a minute: a client that was silent may ask a minute's worth at once. Tokens are those of the
answer's usage, both models; a likely number is taken before the answer and settled after it, and a bucket that went
below nothing fills up again first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cowest_serving.answering import ChatRequest, Refusal
from cowest_serving.estimates import likely_input_tokens


@dataclass(frozen=True)
class ClientLimits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


def part_of(limits: ClientLimits | None, workers: int) -> ClientLimits | None:
    """An equal part for each of several processes of a gateway, which share no counts; one at least."""
    if limits is None:
        return None
    return ClientLimits(*(value and max(1, value // workers) for value in vars(limits).values()))


class Bucket:
    """So many a minute."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self._left, self._at = per_minute, float(per_minute), now

    def left(self, now: float) -> float:
        self._left = min(float(self.per_minute), self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._left

    def take(self, amount: float) -> None:
        self._left -= amount

    def seconds_until(self, amount: float, now: float) -> float:
        return max(0.0, (amount - self.left(now)) * 60 / self.per_minute)


class Client:
    """The holder of one key."""

    def __init__(self, limits: ClientLimits, now: float) -> None:
        self.limits = limits
        self.requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None
        self.under_way = 0


class Ticket:
    """One request that was let in."""

    def __init__(self, client: Client, tokens: int, headers: Mapping[str, str]) -> None:
        self._client, self._tokens = client, tokens
        self.headers = headers  # in OpenAI's form
        self._is_over = False

    def close(self, tokens: int) -> None:
        """The request is over, and took so many tokens."""
        if self._is_over:
            return
        self._is_over = True
        self._client.under_way -= 1
        if self._client.tokens is not None:
            self._client.tokens.take(tokens - self._tokens)


class Gate:
    """For all client keys of one process."""

    def __init__(self, limits: ClientLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._clients: dict[str, Client] = {}

    def keep(self, keys: Sequence[str]) -> None:
        """After a rotation, those that are not valid any more are forgotten, once nothing of theirs is under way."""
        for key in [k for k, client in self._clients.items() if k not in keys and not client.under_way]:
            del self._clients[key]

    def enter(self, key: str, request: ChatRequest) -> Ticket:
        """Raises `Refusal` 429 that says which limit, and when to come again."""
        now = self._clock()
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = Client(self._limits, now)
        tokens = 0
        if client.tokens is not None:  # one that alone asks for more than a minute's worth is let in with a full bucket
            tokens = min(likely_input_tokens(request.messages, request.parameters), client.tokens.per_minute)
        self._check(client, tokens, now)
        client.under_way += 1
        if client.requests is not None:
            client.requests.take(1)
        if client.tokens is not None:
            client.tokens.take(tokens)
        return Ticket(client, tokens, _headers(client, now))

    def _check(self, client: Client, tokens: int, now: float) -> None:
        most = self._limits.max_concurrency
        if most is not None and client.under_way >= most:
            raise _refusal(client, now, "concurrency", f"{most} requests at once", 1.0)
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
