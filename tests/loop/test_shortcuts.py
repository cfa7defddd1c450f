"""Shortcuts over real HTTP: what is asked, what is answered, what the record and the metrics say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.book import PaidCalls
from cowest_serving.contract import Budget, DraftCacheLimits, Fallback, HedgeLimits, Routing, Shortcuts
from tests.fakes import Fault, ScriptedModel
from tests.loop.test_gateway import FixedRouting, arm_of, gateway, settings_of, streamed, world
from tests.loop.test_live_budget import budgeted
from tests.patience import IN_TIME

CACHE = Shortcuts(draft_cache=DraftCacheLimits(max_entries=100, ttl_seconds=60))
OTHER: Any = [{"role": "user", "content": "how?"}]


def by_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["time"])


# ---------------------------------------------------------------- cached drafts
async def test_without_shortcuts_each_request_has_its_own_draft(tmp_path: Path) -> None:
    async with world(tmp_path) as (weak, _, door):
        await door.ask()
        await door.ask()
        rows, metrics = await door.rows(), await door.metrics()
    assert len(weak.calls) == 2
    assert {row["shortcut"] for row in rows} == {""}
    assert "cowest_draft_cache" not in metrics


async def test_an_equal_conversation_gets_the_draft_that_is_there(tmp_path: Path) -> None:
    async with world(tmp_path, shortcuts=CACHE) as (weak, strong, door):
        first, _ = await door.ask(temperature=0.1)
        again, headers = await door.ask(user="somebody else", temperature=0.9)
        await door.ask(messages=OTHER)
        rows, metrics = by_time(await door.rows()), await door.metrics()
    assert [call.last for call in weak.calls] == ["DRAFT why?", "DRAFT how?"]
    assert [call.last for call in strong.calls] == ["why? | a hint", "why? | a hint", "how? | a hint"]
    assert [row["shortcut"] for row in rows] == ["", "draftCache", ""]
    assert [row["weak_output_tokens"] for row in rows] == [2, 0, 2], "what no model was asked for cost nothing"
    assert {row["draft"] for row in rows} == {"a hint"} and {row["mode"] for row in rows} == {"Pair"}
    assert first.usage.model_extra["cowest"]["weak"]["completion_tokens"] == 2
    assert again.usage.model_extra["cowest"]["weak"] is None
    assert headers["x-cowest-weak"] == rows[1]["weak_digest"] == "sha256:weak"
    assert 'cowest_draft_cache_total{source="made"} 2' in metrics
    assert 'cowest_draft_cache_total{source="cached"} 1' in metrics
    assert "cowest_draft_cache_entries 2" in metrics
    calls = [line for line in metrics.splitlines() if "duration_seconds_count" in line and '"cowest"' in line]
    assert calls[0].endswith(" 2"), "a draft that was at hand is no call of a model"


async def test_equal_requests_at_once_ask_the_weak_model_once(tmp_path: Path) -> None:
    async with world(tmp_path, shortcuts=CACHE) as (weak, strong, door):
        weak.gate.clear()
        asking = [asyncio.create_task(door.ask()) for _ in range(4)]
        async with asyncio.timeout(IN_TIME):
            while "cowest_requests_in_flight 4" not in await door.metrics():
                await asyncio.sleep(0.01)
            await weak.arrived.wait()
        weak.gate.set()
        await asyncio.gather(*asking)
        rows = await door.rows()
    assert (len(weak.calls), len(strong.calls)) == (1, 4)
    assert sorted(row["shortcut"] for row in rows) == ["", *["draftCache"] * 3]


async def test_streams_and_whole_answers_share_drafts(tmp_path: Path) -> None:
    async with world(tmp_path, shortcuts=CACHE) as (weak, _, door):
        await door.ask()
        text, _, _ = await streamed(door)
    assert text == "the answer" and len(weak.calls) == 1


async def test_a_draft_of_a_foreign_model_is_not_kept(tmp_path: Path) -> None:
    foreign = {"headers": {"x-cowest-model-digest": "sha256:other"}}
    async with world(tmp_path, shortcuts=CACHE, weak=foreign) as (weak, _, door):
        await door.ask()
        asked = len(weak.calls)
        weak.headers = {"x-cowest-model-digest": "sha256:weak"}
        _, headers = await door.ask()
    assert len(weak.calls) == asked + 1 and headers["x-cowest-mode"] == "Pair"


async def test_a_pair_of_another_weak_model_gets_no_draft_of_the_first(tmp_path: Path) -> None:
    async with (
        ScriptedModel("first", headers={"x-cowest-model-digest": "sha256:one"}) as one,
        ScriptedModel("second", headers={"x-cowest-model-digest": "sha256:two"}) as two,
        ScriptedModel() as strong,
    ):
        arms = {
            url: arm_of(url, strong, digest=digest)
            for url, digest in ((one.url, "sha256:one"), (two.url, "sha256:two"))
        }
        routing = FixedRouting(Routing(1, "salt", (arms[one.url],)))
        async with gateway(tmp_path, settings_of(strong, shortcuts=CACHE), routing) as door:
            await door.ask()
            routing.current = Routing(2, "salt", (arms[two.url],))
            await door.ask()
    assert [call.last for call in strong.calls] == ["why? | first", "why? | second"]


@pytest.mark.parametrize("failing", ["StrongAlone", "Fail"])
async def test_a_weak_model_that_is_away_is_asked_anew_by_the_next_request(tmp_path: Path, failing: str) -> None:
    async with world(tmp_path, shortcuts=CACHE, weak={"faults": [500, 500]}, when_weak_fails=failing) as (
        weak,
        _,
        door,
    ):
        body = {"messages": [{"role": "user", "content": "why?"}]}
        first = (await door.post("/v1/chat/completions", body))[0]
        second, _, headers = await door.post("/v1/chat/completions", body)
    assert (first, second) == (200 if failing == "StrongAlone" else 502, 200)
    assert headers["x-cowest-mode"] == "Pair" and len(weak.calls) == 3


# ---------------------------------------------------------------- a second call when the first is slow
HEDGE = Shortcuts(hedge=HedgeLimits(after_milliseconds=20, max_percent=100))
LATER = Shortcuts(hedge=HedgeLimits(after_milliseconds=2_000, max_percent=100))  # than a fault is answered
NEVER = Shortcuts(hedge=HedgeLimits(after_milliseconds=60_000, max_percent=100))


async def test_a_slow_call_is_overtaken_by_a_second_one_with_a_key_of_its_own(tmp_path: Path) -> None:
    async with world(tmp_path, shortcuts=HEDGE, strong={"faults": ["hang"]}) as (_, strong, door):
        completion, headers = await door.ask(extra_headers={"Idempotency-Key": "mine"})
        row, metrics = await door.row(), await door.metrics()
    assert completion.choices[0].message.content == "the answer"
    first, second = strong.calls
    assert first.key == "mine" and second.key not in (None, "mine", headers["x-request-id"])
    assert first.body == second.body
    assert strong.broken_off == 1, "the call that lost is ended"
    assert (row["shortcut"], row["status"], row["strong_output_tokens"]) == ("hedge", "ok", 2)
    assert 'cowest_hedged_calls{result="won"} 1' in metrics
    counted = [line for line in metrics.splitlines() if "duration_seconds_count" in line and '"openai"' in line]
    assert len(counted) == 2 and any('error_type="hedge_lost"' in line for line in counted), "both are calls"


async def test_a_stream_whose_first_chunk_is_late_is_begun_anew(tmp_path: Path) -> None:
    async with world(tmp_path, shortcuts=HEDGE, strong={"faults": ["hang"]}) as (_, strong, door):
        text, _, _ = await streamed(door)
        row = await door.row()
    assert text == row["answer"] == "the answer"
    assert len(strong.calls) == 2 and row["shortcut"] == "hedge"


async def test_a_quick_endpoint_is_asked_once(tmp_path: Path) -> None:
    relaxed = Shortcuts(draft_cache=CACHE.draft_cache, hedge=NEVER.hedge)
    async with world(tmp_path, shortcuts=relaxed) as (_, strong, door):
        await door.ask()
        await streamed(door)
        rows = by_time(await door.rows())
    assert len(strong.calls) == 2
    assert [row["shortcut"] for row in rows] == ["", "draftCache"]


@pytest.mark.parametrize(
    ("limits", "faults"),
    [
        pytest.param({"max_concurrency": 1}, [], id="no place is free"),
        pytest.param({"max_retries": 1}, [Fault(429, {"retry-after": "0"})], id="a 429 is not made up for"),
        pytest.param({"max_retries": 1}, [Fault(500, {"retry-after": "0"})], id="the last attempt failed"),
    ],
)
async def test_no_second_call_goes_where_it_would_harm(
    tmp_path: Path, limits: dict[str, Any], faults: list[Fault]
) -> None:
    async with world(tmp_path, shortcuts=LATER if faults else HEDGE, strong={"faults": faults}, **limits) as (
        _,
        strong,
        door,
    ):
        strong.gate.clear()
        asking = asyncio.create_task(door.ask())
        async with asyncio.timeout(IN_TIME):
            while 'cowest_hedged_calls{result="held_back"} 1' not in await door.metrics():
                await asyncio.sleep(0.01)
        strong.gate.set()
        await asking
        row = await door.row()
    assert len(strong.calls) == 1 + len(faults) and row["shortcut"] == ""


async def test_a_second_call_never_goes_to_a_fallback(tmp_path: Path) -> None:
    async with ScriptedModel("of the fallback") as other:
        fallbacks = (Fallback(other.url, "big"),)
        async with world(tmp_path, shortcuts=HEDGE, strong={"faults": ["hang"]}, fallbacks=fallbacks) as (
            _,
            strong,
            door,
        ):
            completion, _ = await door.ask()
    assert completion.choices[0].message.content == "the answer"
    assert len(strong.calls) == 2 and not other.calls


async def test_where_the_pairs_endpoint_fails_a_fallback_answers_as_ever(tmp_path: Path) -> None:
    async with ScriptedModel("of the fallback") as other:
        fallbacks = (Fallback(other.url, "big"),)
        async with world(tmp_path, shortcuts=NEVER, strong={"faults": [500]}, fallbacks=fallbacks) as (_, _, door):
            completion, _ = await door.ask()
            row = await door.row()
    assert completion.choices[0].message.content == "of the fallback" and row["status"] == "fell_back"


@pytest.mark.parametrize("stream", [False, True])
async def test_both_calls_count_in_the_days_budget(tmp_path: Path, stream: bool) -> None:
    budget = Budget(tokens_per_day=10_000)
    async with budgeted(tmp_path, budget, shortcuts=HEDGE, strong={"faults": ["hang"]}) as (strong, door):
        asked = await door.client.chat.completions.create(model="m", messages=OTHER, stream=stream, max_tokens=50)
        if stream:
            async for _ in asked:
                pass
    async with PaidCalls(tmp_path / "calls.sqlite", budget=budget) as book:
        _, spent, _ = book.live_spent()
    assert len(strong.calls) == 2
    assert spent.calls == 2 and spent.output_tokens == 50 + 2, (
        "the one that was ended may have cost all that it asked for"
    )


async def test_without_room_in_the_budget_there_is_no_second_call(tmp_path: Path) -> None:
    async with budgeted(tmp_path, Budget(tokens_per_day=90), shortcuts=HEDGE) as (strong, door):
        strong.gate.clear()
        asking = asyncio.create_task(door.ask(max_tokens=50))
        async with asyncio.timeout(IN_TIME):
            while "cowest_budget_refused_calls 1" not in await door.metrics():
                await asyncio.sleep(0.01)
        strong.gate.set()
        completion, _ = await asking
        row = await door.row()
    assert completion.choices[0].message.content == "the answer"
    assert len(strong.calls) == 1 and row["shortcut"] == ""
