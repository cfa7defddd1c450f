"""When an endpoint counts as failing, and when it is asked again. No endpoint here: attempts end as the test says."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from cowest_serving.health import Circuit, CircuitOpen, Guarded, Health
from cowest_serving.models import BadRequest, EndpointUnreachable, ModelError, RateLimited, ServerFault, Unauthorized
from tests.patience import IN_TIME

AWAY = EndpointUnreachable("http://s/v1 cannot be reached")


class World:
    """A circuit on a clock of the test's."""

    def __init__(self, longest_rest: float = 30) -> None:
        self.now = 1000.0
        self.health = Health(lambda: self.now)
        self.circuit = Circuit(self.health, lambda: self.now, longest_rest)

    def attempt(self, ends: ModelError | None = AWAY) -> bool:
        """False: it was not let through."""
        with suppress(ModelError), self.circuit.attempt("http://s/v1"):
            self.was_asked = True
            if ends is not None:
                raise ends
        found, self.was_asked = self.was_asked, False
        return found

    was_asked = False

    def stream(self, breaks: ModelError | None = AWAY) -> bool:
        """One that begins. False: it was not let through."""
        with suppress(CircuitOpen), self.circuit.attempt("http://s/v1", is_whole=False):
            self.was_asked = True
        if self.was_asked:
            self.circuit.streamed(breaks)
        found, self.was_asked = self.was_asked, False
        return found

    def fail(self, times: int = 5, every: float = 2.0) -> World:
        for number in range(times):
            self.now += every if number else 0
            self.attempt()
        return self


def test_failures_in_a_row_over_some_seconds_end_the_asking_for_a_while() -> None:
    world = World().fail(4)
    assert world.attempt(), "the fifth"
    assert world.health.is_failing and not world.attempt(None)
    world.now += 1.9
    assert not world.attempt(None)


def test_streams_that_begin_and_break_off_end_the_asking_too() -> None:
    world = World()
    for _ in range(5):
        world.now += 2
        assert world.stream()
    assert world.health.is_failing and not world.stream()
    world.now += 2
    assert world.stream() and not world.stream(), "one tries, and breaks off too"


def test_streams_that_come_to_their_end_make_up_for_those_that_broke_off() -> None:
    world = World()
    for breaks in [AWAY, AWAY, AWAY, AWAY, None] * 3:
        world.now += 2
        assert world.stream(breaks)
    assert (world.health.failures, world.health.answered) == (0, world.now)


def test_calls_that_fail_together_leave_it_open_to_the_next() -> None:
    world = World().fail(50, every=0.01)
    assert not world.health.is_failing and world.attempt(None)


def test_who_is_not_let_through_hears_what_the_endpoint_failed_with_and_when_to_come_back() -> None:
    world = World().fail()
    said = r"5 attempts failed, the last with EndpointUnreachable\."
    with pytest.raises(CircuitOpen, match=said) as caught, world.circuit.attempt("http://s/v1"):
        pytest.fail("it was asked")
    assert caught.value.retry_after == 2 and caught.value.retryable


def test_who_is_not_let_through_hears_nothing_of_what_the_endpoint_said_to_others() -> None:
    world = World().fail(4)
    world.now += 2
    world.attempt(ServerFault("http://s/v1 answered 500 (cannot read: my salary is 5)", status=500))
    with pytest.raises(CircuitOpen, match="the last with ServerFault, status 500") as caught:
        world.circuit.check("http://s/v1")
    assert "salary" not in str(caught.value)


def test_one_call_tries_and_its_answer_opens_the_door_for_all() -> None:
    world = World().fail()
    world.now += 2
    with world.circuit.attempt("http://s/v1"):
        assert not world.attempt(None), "one at a time"
    assert world.attempt(None) and world.attempt(None)
    assert (world.health.failures, world.health.is_failing, world.health.answered) == (0, False, world.now)


def test_each_failed_try_is_followed_by_a_longer_rest_up_to_a_limit() -> None:
    world = World().fail()
    rests = []
    for _ in range(6):
        began = world.now
        while not world.attempt():
            world.now += 0.5
        rests.append(world.now - began)
    assert rests == [2, 4, 8, 16, 30, 30]


def test_a_shorter_limit_of_the_rest_holds() -> None:
    world = World(longest_rest=3).fail()
    world.now += 2
    assert world.attempt()
    world.now += 3
    assert world.attempt()


def test_a_try_whose_client_leaves_makes_room_for_the_next() -> None:
    world = World().fail()
    world.now += 2
    with suppress(asyncio.CancelledError), world.circuit.attempt("http://s/v1"):
        raise asyncio.CancelledError
    assert world.attempt(None)


async def test_nobody_waits_for_a_place_at_an_endpoint_that_is_not_asked() -> None:
    async with Guarded("http://s/v1", "m", max_concurrency=1) as model:
        model.health.failures, model.health.since = 9, 0.0
        with suppress(ModelError), model._circuit.attempt(model.endpoint):
            raise AWAY
        await model._places.enter()
        async with asyncio.timeout(IN_TIME):
            with pytest.raises(CircuitOpen):
                await model([])


@pytest.mark.parametrize(
    ("error", "fails"),
    [
        pytest.param(RateLimited("429", status=429), True, id="a rate limit fails, but answers quickly"),
        pytest.param(Unauthorized("401", status=401), True, id="a refused key too"),
        pytest.param(BadRequest("404", status=404), True, id="an unknown model too"),
        pytest.param(BadRequest("400", status=400), False, id="a wrong request is its caller's fault"),
    ],
)
def test_a_refusal_is_an_answer_and_closes_no_door(error: ModelError, fails: bool) -> None:
    world = World()
    for _ in range(9):
        assert world.attempt(error)
        world.now += 2
    assert world.health.is_failing is fails and world.attempt(None)


def test_the_word_says_since_when_and_with_what() -> None:
    world = World()
    assert world.health.word() == {
        "failing": False, "failures": 0, "since": None, "error": None, "last_failure": None, "last_answer": None
    }  # fmt: skip
    world.attempt(None)
    world.now += 1
    world.fail(4)
    world.attempt(ServerFault("500"))
    assert world.health.word() == {
        "failing": True, "failures": 5, "since": 1001.0, "error": "ServerFault", "last_failure": 1007.0,
        "last_answer": 1000.0,
    }  # fmt: skip
