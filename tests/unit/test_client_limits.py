"""What a client key may ask, of one process and of several workers together, on a clock of the test's."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowest_serving.answering import ChatRequest, parse_chat
from cowest_serving.client_limits import ClientLimits, Gate, LimitReached, OwnCounts, duration
from cowest_serving.shared_counts import NEAR, SLOTS, SharedCounts, _digest, shared_memory

REQUEST = b'{"messages": [{"role": "user", "content": "%s"}]}'  # "x" * 24: 12 tokens, likely


def request(letters: int = 24) -> ChatRequest:
    return parse_chat(REQUEST % (b"x" * letters), "id")


class World:
    """Clients whose requests come to each worker in turn."""

    def __init__(self, memory: int | None, limits: ClientLimits, workers: int) -> None:
        self.now, self.memory, self.limits, self.workers = 1000.0, memory, limits, workers
        self._turn = itertools.cycle([self.worker(number) for number in range(workers)])

    def worker(self, number: int) -> Gate:
        """One that starts now."""
        counts = SharedCounts(self.memory, self.limits, number, self.workers) if self.memory else None
        return Gate(self.limits, lambda: self.now, counts)

    @property
    def gate(self) -> Gate:
        return next(self._turn)

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


WorldOf = Callable[..., World]


@pytest.fixture
def memory() -> Iterator[int]:
    handle = shared_memory(2)
    yield handle
    os.close(handle)


@pytest.fixture(params=["one process", "two workers"])
def world_of(request: pytest.FixtureRequest, memory: int) -> WorldOf:
    if request.param == "one process":
        return lambda **limits: World(None, ClientLimits(**limits), 1)
    return lambda **limits: World(memory, ClientLimits(**limits), 2)


def test_a_minutes_worth_may_come_at_once_and_then_so_many_a_minute(world_of: WorldOf) -> None:
    world = world_of(requests_per_minute=30)
    assert world.let_in(50) == 30
    world.now += 10
    assert world.let_in(50) == 5
    world.now += 3600
    assert world.let_in(50) == 30, "what is not asked for is not saved up"


def test_each_key_has_its_own(world_of: WorldOf) -> None:
    world = world_of(requests_per_minute=1)
    assert (world.let_in(2, "a"), world.let_in(2, "b")) == (1, 1)


def test_a_refusal_says_which_limit_and_when_to_come_again_in_openais_form(world_of: WorldOf) -> None:
    world = world_of(requests_per_minute=30, tokens_per_minute=1_000)
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


def test_tokens_are_settled_with_what_the_answer_took(world_of: WorldOf) -> None:
    world = world_of(tokens_per_minute=600)
    ticket = world.gate.enter("a", request())
    assert ticket.headers["x-ratelimit-remaining-tokens"] == "588"
    ticket.close(1_200)
    ticket.close(1_200)
    refusal = world.refusal()
    assert refusal.kind == "tokens" and refusal.retry_after == pytest.approx(61.2)
    world.now += 61.3
    world.gate.enter("a", request())


def test_a_request_of_more_than_a_minutes_worth_is_let_in_alone(world_of: WorldOf) -> None:
    world = world_of(tokens_per_minute=60)
    world.gate.enter("a", request(900)).close(0)
    assert world.let_in(1) == 1
    with pytest.raises(LimitReached):
        world.gate.enter("a", request(900))


def test_so_many_are_under_way_at_once(world_of: WorldOf) -> None:
    world = world_of(max_concurrency=2)
    first, _ = world.gate.enter("a", request()), world.gate.enter("a", request())
    refusal = world.refusal()
    assert refusal.kind == "concurrency" and refusal.retry_after == 1 and refusal.headers == {}
    first.close(0)
    world.gate.enter("a", request())


def test_a_key_that_is_no_longer_valid_is_forgotten_once_nothing_of_it_is_under_way() -> None:
    counts = OwnCounts(limits := ClientLimits(requests_per_minute=1))
    gate = Gate(limits, lambda: 1000.0, counts)
    for key in ("old", "kept"):
        gate.enter(key, request()).close(0)
    gate.enter("busy", request())
    counts.keep(["kept"])
    assert sorted(counts._clients) == ["busy", "kept"]


# ---------------------------------------------------------------- several workers
def test_what_a_worker_that_was_killed_had_under_way_is_forgotten_and_no_others(memory: int) -> None:
    world = World(memory, ClientLimits(max_concurrency=3), 2)
    killed, other = world.worker(0), world.worker(1)
    killed.enter("a", request())
    killed.enter("a", request())
    kept = other.enter("a", request())
    assert world.refusal().kind == "concurrency"
    world.worker(0)
    other.enter("a", request())
    other.enter("a", request())
    assert world.refusal().kind == "concurrency"
    kept.close(0)
    other.enter("a", request())


def test_a_key_at_rest_gives_way_to_one_that_asks_and_one_in_use_does_not(memory: int) -> None:
    """Keys that all want the same slots."""
    world = World(memory, ClientLimits(requests_per_minute=1), 2)
    place = int.from_bytes(_digest("")[:4], "little") % SLOTS
    digests = ((f"{n}", _digest(f"{n}")) for n in itertools.count())
    same = (key for key, digest in digests if int.from_bytes(digest[:4], "little") % SLOTS == place)
    first = list(itertools.islice(same, NEAR))
    assert [world.let_in(2, key) for key in first] == [1] * NEAR
    world.now += 60
    assert [world.let_in(2, key) for key in first[1:]] == [1] * (NEAR - 1)
    assert world.let_in(2, next(same)) == 1, "in place of the one that asked no more"
    assert [world.let_in(1, key) for key in first[1:]] == [0] * (NEAR - 1)
    assert world.let_in(1, next(same)) == 0, "with all in use it shares one"


ASK_AT_ONCE = """
import sys
from cowest_serving.client_limits import ClientLimits, Gate, LimitReached
from cowest_serving.shared_counts import SharedCounts
from tests.unit.test_client_limits import request
limits = ClientLimits(requests_per_minute=500, max_concurrency=10**6)
gate = Gate(limits, lambda: 0.0, SharedCounts(int(sys.argv[1]), limits, int(sys.argv[2]), 4))
print("ready", flush=True)
sys.stdin.readline()
count, asked = 0, request()
for _ in range(1_000):
    try:
        gate.enter("a", asked).close(0)
        count += 1
    except LimitReached:
        pass
print(count)
"""


def test_processes_that_ask_at_once_get_what_the_limit_says_and_no_more() -> None:
    memory = shared_memory(4)
    command = [sys.executable, "-c", ASK_AT_ONCE, str(memory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[2], "text": True}
    processes = [subprocess.Popen([*command, str(n)], pass_fds=[memory], **pipes) for n in range(4)]  # type: ignore
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        os.close(memory)
    assert sum(counts) == 500


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (59.5, "59.5s"), (60, "1m0s"), (63.5, "1m3.5s")]
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_feedback_counts_with_its_length_all_of_it(world_of: WorldOf) -> None:
    world = world_of(tokens_per_minute=300)
    world.gate.hear("a", 1200)  # 400 tokens: with a full bucket it is let in
    world.now += 20
    with pytest.raises(LimitReached, match="300 tokens per minute"):
        world.gate.hear("a", 3)
    world.now += 1
    world.gate.hear("a", 3)
    assert world.let_in(1) == 0, "chats are of the same bucket"


def test_feedback_has_room_beside_as_many_chats_as_may_be_under_way(world_of: WorldOf) -> None:
    world = world_of(max_concurrency=1, requests_per_minute=2)
    world.gate.enter("a", request())
    world.gate.hear("a", 1_000_000)
    with pytest.raises(LimitReached, match="2 requests per minute"):
        world.gate.hear("a", 3)
