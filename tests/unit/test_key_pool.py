"""Which key an attempt takes, on a clock of the test's."""

from __future__ import annotations

import pytest

from cowest_serving.key_pool import Key, KeyPool


class World:
    def __init__(self, *keys: str) -> None:
        self.now = 1000.0
        self.pool = KeyPool(keys, lambda: self.now)

    def take(self) -> str:
        return self.pool.take().value

    def limited(self, seconds: float | None = None) -> None:
        self.pool.limited(self.pool.take(), seconds)

    def refused(self) -> None:
        self.pool.refused(self.pool.take())


def test_a_key_stays_in_use_until_something_is_wrong_with_it() -> None:
    world = World("a", "b")
    assert [world.take() for _ in range(3)] == ["a"] * 3
    world.limited(5)
    assert world.take() == "b"
    world.now += 6
    assert world.take() == "b", "nothing is wrong with it"


def test_a_key_rests_for_its_retry_after_while_others_serve() -> None:
    world = World("a", "b")
    world.limited(5)
    assert (world.take(), world.pool.rest, world.pool.away) == ("b", 0, 1)
    world.limited(2)
    assert world.pool.rest == 2, "all rest: the shortest"
    world.now += 2
    assert (world.pool.rest, world.take()) == (0, "b")
    world.limited(60)
    world.now += 3
    assert world.take() == "a"


def test_a_lone_key_rests_too_but_not_without_a_word_of_how_long() -> None:
    world = World("a")
    world.limited()
    assert (world.pool.rest, world.take()) == (0, "a")
    world.limited(3)
    assert (world.pool.rest, world.pool.away) == (3, 1)


def test_without_a_retry_after_others_are_taken_first_for_a_moment() -> None:
    world = World("a", "b")
    world.limited()
    assert world.take() == "b"
    world.limited()
    assert world.pool.rest == 0 and world.take() in "ab", "nobody waits"


def test_a_long_rest_is_looked_at_once_a_minute_since_limits_are_raised() -> None:
    world = World("a")
    world.limited(24 * 3600)
    world.now += 59
    assert world.pool.rest > 80_000
    world.now += 1
    assert world.pool.rest == 0
    world.limited(24 * 3600)
    assert world.pool.rest > 80_000


def test_a_refused_key_is_parked_and_tried_again_ever_later() -> None:
    world = World("a", "b")
    parks = []
    for _ in range(6):
        world.pool.refused(world.pool._keys[0])
        world.pool.refused(world.pool._keys[0])  # another call with it ended so too
        began = world.now
        while world.pool._keys[0].is_parked(world.now):
            assert world.take() == "b"
            world.now += 1
        parks.append(world.now - began)
    assert parks == [60, 120, 240, 480, 600, 600]
    world.pool.answered(world.pool._keys[0])
    world.pool.refused(world.pool._keys[0])
    assert world.pool._keys[0].parked_until == world.now + 60


def test_with_every_key_refused_the_one_that_was_refused_first_is_asked_all_the_same() -> None:
    world = World("a", "b")
    world.refused()
    world.now += 1
    world.refused()
    assert (world.take(), world.pool.rest) == ("a", 0)


def test_a_parked_key_is_no_reason_to_disturb_one_that_rests() -> None:
    world = World("a", "b")
    world.refused()
    world.limited(9)
    assert world.pool.rest == 9


def test_after_a_rotation_what_is_known_of_keys_that_stay_is_kept() -> None:
    world = World("a", "b")
    world.limited(5)
    world.pool.renew(["c", "a"])
    assert (world.take(), world.pool.away, len(world.pool)) == ("c", 1, 2)


@pytest.mark.parametrize("keys", [[], [""]])
def test_an_endpoint_may_want_no_key(keys: list[str]) -> None:
    pool = KeyPool(keys)
    assert isinstance(pool.take(), Key) and pool.take().value == "" and len(pool) == 1
