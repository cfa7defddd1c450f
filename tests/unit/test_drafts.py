"""Drafts that are at hand: which requests share one, and for how long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import DraftCacheLimits, Pair
from cowest_serving.drafts import Draft, DraftCache, draft_key

PROMPTS = DEFAULT_PROMPTS["Answer"]
PAIR = Pair("sha256:w", "file:///w", PROMPTS, "Answer", "http://strong/v1", "big")
ASKED = [{"role": "user", "content": "why?"}]


@dataclass
class Weak:
    """Makes drafts when it is let; the next one fails where `fails` says so."""

    made: int = 0
    fails: bool = False
    ended: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> Draft:
        self.made += 1
        try:
            await self.go.wait()
        finally:
            self.ended += 1
        if self.fails:
            raise ValueError("it failed")
        return Draft(f"draft {self.made}", "sha256:w", 1, 1)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def ready() -> Weak:
    weak = Weak()
    weak.go.set()
    return weak


async def begun(cache: DraftCache, weak: Weak, count: int, key: bytes = b"k") -> list[asyncio.Task[object]]:
    tasks: list[asyncio.Task[object]] = [asyncio.create_task(cache.get(key, weak)) for _ in range(count)]
    for _ in range(3):  # the requests begin, then the draft that they wait for
        await asyncio.sleep(0)
    return tasks


async def test_an_equal_request_gets_the_draft_that_was_made() -> None:
    cache, weak = DraftCache(DraftCacheLimits(10, 60)), ready()
    first, again = await cache.get(b"k", weak), await cache.get(b"k", weak)
    other = await cache.get(b"other", weak)
    assert [source for _, source in (first, again, other)] == ["made", "cached", "made"]
    assert first[0] is again[0] and weak.made == 2


async def test_a_draft_is_forgotten_when_its_time_is_over_however_often_it_was_used() -> None:
    clock = Clock()
    cache, weak = DraftCache(DraftCacheLimits(10, 60), clock), ready()
    await cache.get(b"k", weak)
    clock.now += 59.9
    assert (await cache.get(b"k", weak))[1] == "cached"
    clock.now += 0.1
    assert (await cache.get(b"k", weak))[1] == "made"


async def test_of_too_many_those_that_were_used_last_stay() -> None:
    cache, weak = DraftCache(DraftCacheLimits(2, 60)), ready()
    for key in (b"a", b"b", b"a", b"c"):
        await cache.get(key, weak)
    assert len(cache) == 2
    assert [(await cache.get(key, weak))[1] for key in (b"a", b"c", b"b")] == ["cached", "cached", "made"]


async def test_equal_requests_at_once_share_one_draft() -> None:
    cache, weak = DraftCache(DraftCacheLimits(10, 60)), Weak()
    tasks = await begun(cache, weak, 5)
    weak.go.set()
    found = await asyncio.gather(*tasks)
    assert weak.made == 1
    assert sorted(source for _, source in found) == ["made", *["shared"] * 4]  # type: ignore[misc]


async def test_the_draft_is_made_on_when_who_began_it_leaves() -> None:
    cache, weak = DraftCache(DraftCacheLimits(10, 60)), Weak()
    first, second = await begun(cache, weak, 2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    weak.go.set()
    assert await second == (Draft("draft 1", "sha256:w", 1, 1), "shared")


async def test_the_draft_ends_when_nobody_waits_for_it_and_the_next_request_begins_its_own() -> None:
    cache, weak = DraftCache(DraftCacheLimits(10, 60)), Weak()
    tasks = await begun(cache, weak, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    (later,) = await begun(cache, weak, 1)
    assert (weak.made, weak.ended) == (2, 1)
    weak.go.set()
    assert await later == (Draft("draft 2", "sha256:w", 1, 1), "made")


async def test_a_failure_is_told_to_all_who_waited_and_is_not_kept() -> None:
    cache, weak = DraftCache(DraftCacheLimits(10, 60)), Weak(fails=True)
    tasks = await begun(cache, weak, 3)
    weak.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in found] == ["it failed"] * 3 and weak.made == 1
    weak.fails = False
    assert (await cache.get(b"k", weak))[1] == "made"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(draft_key(replace(PAIR, weak_digest="sha256:x"), ASKED, 9), id="another weak model"),
        pytest.param(draft_key(replace(PAIR, prompts=replace(PROMPTS, draft="Say {query}")), ASKED, 9), id="prompts"),
        pytest.param(draft_key(PAIR, ASKED, 10), id="another limit of tokens"),
        pytest.param(draft_key(PAIR, [{"role": "user", "content": "why? "}], 9), id="a space more"),
        pytest.param(draft_key(PAIR, [{"role": "system", "content": "why?"}], 9), id="another role"),
        pytest.param(draft_key(PAIR, [{"role": "user", "content": "hm"}, *ASKED], 9), id="an earlier turn"),
    ],
)
def test_what_decides_a_draft_is_in_its_key(other: bytes) -> None:
    assert other != draft_key(PAIR, ASKED, 9)


def test_the_order_of_a_messages_fields_and_the_strong_model_are_not_in_the_key() -> None:
    turned = [{"content": "why?", "role": "user"}]
    assert draft_key(replace(PAIR, strong_model="other"), turned, 9) == draft_key(PAIR, ASKED, 9)
