"""What a client key may ask, on a clock of the test's."""

from __future__ import annotations

import pytest

from cowest_serving.answering import ChatRequest, parse_chat
from cowest_serving.client_limits import ClientLimits, Gate, LimitReached, duration

REQUEST = b'{"messages": [{"role": "user", "content": "%s"}]}'  # "x" * 24: 12 tokens, likely


def request(letters: int = 24) -> ChatRequest:
    return parse_chat(REQUEST % (b"x" * letters), "id")


class World:
    def __init__(self, **limits: int) -> None:
        self.now = 1000.0
        self.gate = Gate(ClientLimits(**limits), lambda: self.now)

    def let_in(self, times: int, key: str = "a") -> int:
        """How many of so many requests, each over at once, are let in."""
        count = 0
        for _ in range(times):
            try:
                self.gate.enter(key, request()).close(12)
            except LimitReached:
                continue
            count += 1
        return count

    def refusal(self, key: str = "a") -> LimitReached:
        with pytest.raises(LimitReached) as caught:
            self.gate.enter(key, request())
        return caught.value


def test_a_minutes_worth_may_come_at_once_and_then_so_many_a_minute() -> None:
    world = World(requests_per_minute=30)
    assert world.let_in(50) == 30
    world.now += 10
    assert world.let_in(50) == 5
    world.now += 3600
    assert world.let_in(50) == 30, "what is not asked for is not saved up"


def test_each_key_has_its_own() -> None:
    world = World(requests_per_minute=1)
    assert (world.let_in(2, "a"), world.let_in(2, "b")) == (1, 1)


def test_a_refusal_says_which_limit_and_when_to_come_again_in_openais_form() -> None:
    world = World(requests_per_minute=30, tokens_per_minute=1_000)
    world.let_in(30)
    refusal = world.refusal()
    assert refusal.body()["error"] == {
        "message": "This key's limit of 30 requests per minute at this gateway is reached. Ask again in 2.0 s, or have "
        "spec.gateway.limits raised.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert (refusal.status, refusal.retry_after) == (429, 2)
    assert refusal.headers == {
        "x-ratelimit-limit-requests": "30",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "640",
        "x-ratelimit-reset-tokens": "21.6s",
    }


def test_tokens_are_settled_with_what_the_answer_took() -> None:
    world = World(tokens_per_minute=600)
    ticket = world.gate.enter("a", request())
    assert ticket.headers["x-ratelimit-remaining-tokens"] == "588"
    ticket.close(1_200)
    ticket.close(1_200)
    refusal = world.refusal()
    assert refusal.kind == "tokens" and refusal.retry_after == pytest.approx(61.2)
    world.now += 61.3
    world.gate.enter("a", request())


def test_a_request_of_more_than_a_minutes_worth_is_let_in_alone() -> None:
    world = World(tokens_per_minute=60)
    world.gate.enter("a", request(900)).close(0)
    assert world.let_in(1) == 1
    with pytest.raises(LimitReached):
        world.gate.enter("a", request(900))


def test_so_many_are_under_way_at_once() -> None:
    world = World(max_concurrency=2)
    first, _ = world.gate.enter("a", request()), world.gate.enter("a", request())
    refusal = world.refusal()
    assert refusal.kind == "concurrency" and refusal.retry_after == 1 and refusal.headers == {}
    first.close(0)
    world.gate.enter("a", request())


def test_a_key_that_is_no_longer_valid_is_forgotten_once_nothing_of_it_is_under_way() -> None:
    world = World(requests_per_minute=1)
    world.let_in(1, "old")
    world.let_in(1, "kept")
    world.gate.enter("busy", request())
    world.gate.keep(["kept"])
    assert sorted(world.gate._clients) == ["busy", "kept"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (59.5, "59.5s"), (60, "1m0s"), (63.5, "1m3.5s")]
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
