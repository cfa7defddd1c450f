"""How many calls are let through, as the endpoint takes or refuses them."""

from __future__ import annotations

import asyncio
import time

import pytest

from cowest_serving.places import Places


async def enter(places: Places, calls: int) -> list[asyncio.Task[None]]:
    """Calls that want in; those that are let in stay until they are cancelled."""

    async def stay() -> None:
        await places.enter()
        try:
            await asyncio.Event().wait()
        finally:
            places.leave()

    tasks = [asyncio.create_task(stay()) for _ in range(calls)]
    await asyncio.sleep(0)
    return tasks


async def leave(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_refusal_halves_what_was_under_way_once_for_all_that_met_the_limit() -> None:
    places = Places(16)
    tasks = await enter(places, 12)
    together = [places.attempt() for _ in range(12)]
    for attempt in together:
        places.refused(attempt)
    assert places.limit == 6
    places.refused(places.attempt())
    assert places.limit == 3, "an attempt that began later met the lower limit"
    await leave(*tasks)


async def test_it_never_falls_below_one() -> None:
    places = Places(4)
    for _ in range(9):
        places.refused(places.attempt())
    assert places.limit == 1
    tasks = await enter(places, 2)
    assert places.taken == 1
    await leave(*tasks)
    assert places.taken == 0


async def refused(places: Places, under_way: int, of_them: int) -> list[asyncio.Task[None]]:
    """So many calls, of which some are refused: as many stay as there are places for then."""
    tasks = await enter(places, under_way)
    together = [places.attempt() for _ in range(under_way)]
    for attempt in together[:of_them]:
        places.refused(attempt)
    return tasks


async def test_answers_give_back_at_once_what_was_not_refused() -> None:
    places = Places(32)
    tasks = await refused(places, 16, 3)
    await leave(*tasks[8:])
    waiting = await enter(places, 9)
    assert (places.limit, places.taken) == (8, 8)
    for _ in range(5):
        places.answered()
    await asyncio.sleep(0)
    assert (places.limit, places.taken) == (13, 13), "as many as were not refused"
    await leave(*tasks, *waiting)


async def test_one_more_than_was_taken_is_tried_for_in_eight_rounds_of_answers_and_then_one_in_each() -> None:
    places = Places(32)
    tasks = await refused(places, 16, 12)
    assert places.limit == 8, "more than were taken: no place comes back at once"
    await leave(*tasks[8:])
    places = Places(32)
    tasks = await refused(places, 8, 1)
    waiting = await enter(places, 9)
    await leave(*tasks[4:])
    for _ in range(3):
        places.answered()
    rounds = 0
    while places.limit < 8:
        for _ in range(7):
            places.answered()
        rounds += 1
    assert rounds in (8, 9)
    for _ in range(8):
        places.answered()
    assert places.limit > 8.8, "the endpoint takes more than it did"
    await leave(*tasks, *waiting)


async def test_who_tried_in_vain_waits_twice_as_long_with_the_next_try() -> None:
    places = Places(32)
    tasks = await refused(places, 8, 1)
    waiting = await enter(places, 9)
    await leave(*tasks[4:])
    answers = []
    for _ in range(3):
        count = 0
        while places.limit < 8:
            places.answered()
            count += 1
        answers.append(count)
        await asyncio.sleep(0)
        assert places.taken == 8
        places.refused(places.attempt())
    assert 1.7 < answers[1] / answers[0] < 2.3 and 1.7 < answers[2] / answers[1] < 2.3
    await leave(*tasks, *waiting)


async def test_answers_with_places_to_spare_prove_nothing_and_the_manifests_number_is_the_most() -> None:
    places = Places(4)
    for _ in range(2):
        tasks = await enter(places, 4)
        places.refused(places.attempt())
        await leave(*tasks)
        places.answered()
        assert places.limit == 2, "nobody needed more"
        tasks = await enter(places, 4)
        for _ in range(99):
            places.answered()
        assert (places.limit, places.taken) == (4, 4)
        await leave(*tasks)


async def test_who_leaves_the_line_takes_no_place_and_the_others_keep_their_turn() -> None:
    places = Places(1)
    first, second, third = await enter(places, 3)
    await leave(second)
    await leave(first)
    await asyncio.sleep(0)
    assert (places.taken, third.done()) == (1, False)
    await leave(third)
    assert places.taken == 0


async def test_a_place_that_was_given_to_one_who_left_at_that_moment_goes_on_to_the_next() -> None:
    places = Places(1)
    first, second, third = await enter(places, 3)
    first.cancel()
    await asyncio.wait([first])  # gives its place to the second ...
    second.cancel()  # ... which leaves before it knows
    await asyncio.wait([second])
    await asyncio.sleep(0)
    assert places.taken == 1 and not third.done()
    await leave(third)
    assert places.taken == 0


async def test_who_waits_for_half_of_its_time_is_sent_away_and_leaves_the_line() -> None:
    places = Places(1, lambda seconds: RuntimeError(f"crowded for {seconds:.1f} s"))
    tasks, began = await enter(places, 1), time.monotonic()
    with pytest.raises(RuntimeError, match=r"crowded for 0\.2 s"):
        await places.enter(began + 0.4)
    assert 0.19 < time.monotonic() - began < 0.4
    assert (places.taken, places.waiting) == (1, 0)
    with pytest.raises(RuntimeError, match=r"crowded for 0\.0 s"):
        await places.enter(began)
    await leave(*tasks)
    await places.enter(began)
    assert places.taken == 1


async def test_the_holder_and_all_who_wait_may_leave_at_one_moment() -> None:
    places = Places(1)
    tasks = await enter(places, 4)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in ended)
    assert (places.taken, places.waiting) == (0, 0)
