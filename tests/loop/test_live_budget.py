"""The day's budget and live answers: gateways over real HTTP, with the book as a file and behind the proxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from cowest_serving.allowance import Allowance, allowance_of, lender_of
from cowest_serving.book import PaidCalls
from cowest_serving.contract import Budget, Fallback, Prices, Routing, dump
from cowest_serving.key_files import Keys
from cowest_serving.leases import Amount, Ask, day_of, live_spent, shares
from tests.fakes import Fault, ScriptedModel, _usage
from tests.loop.test_client_keys import shows
from tests.loop.test_gateway import (
    ASKED,
    Gateway,
    arm_of,
    command,
    gateway,
    ready,
    settings_of,
    spec_of,
    strong_settings,
    world,
)
from tests.loop.test_proxy import proxy
from tests.loop.test_workers import workers_of
from tests.patience import IN_TIME
from tests.ports import free_port

PRICES = Prices(1_000_000.0, 1_000_000.0, "EUR")
DRAFTING: Any = {"headers": {"x-cowest-model-digest": "sha256:weak"}, "answers": "a hint"}


@asynccontextmanager
async def budgeted(
    tmp_path: Path, budget: Budget, *, book: str | None = None, prices: Prices | None = None, **changes: Any
) -> AsyncIterator[tuple[ScriptedModel, Gateway]]:
    """A strong model and a gateway whose live answers have this budget, in the file that steps use or in `book`."""
    given = {name: changes.pop(name) for name in ("strong", "weak") if name in changes}
    async with ScriptedModel(**(DRAFTING | given.get("weak", {}))) as weak, ScriptedModel(
        **({"answers": "the answer"} | given.get("strong", {}))
    ) as strong:  # fmt: skip
        settings = settings_of(strong, budget=budget, prices=prices, **changes)
        lender = lender_of(book or str(tmp_path / "calls.sqlite"), settings.strong, IN_TIME)
        allowance = Allowance(lender, prices, book_seconds=IN_TIME)  # a disk may be slow for some seconds
        async with gateway(tmp_path, settings, arm_of(weak, strong), allowance=allowance) as door:
            yield strong, door


async def test_live_answers_count_in_the_days_budget_as_the_endpoint_counts_them(tmp_path: Path) -> None:
    async with budgeted(tmp_path, Budget(tokens_per_day=10_000), prices=PRICES) as (_, door):
        await door.ask(max_tokens=5)
        async for _ in await door.client.chat.completions.create(model="m", messages=ASKED, stream=True, max_tokens=5):
            pass
    async with PaidCalls(tmp_path / "calls.sqlite", budget=Budget(tokens_per_day=10_000), prices=PRICES) as book:
        _, spent, room = book.live_spent()
        assert (spent.calls, spent.tokens, spent.money) == (2, 12, 12.0)
        assert room.tokens == 10_000 - 12, "a gateway that ends gives back the rest of its slice"
        assert book.spent().calls == 0, "which is what the steps paid"


async def test_a_budget_that_is_spent_is_said_in_openais_words_and_until_when(tmp_path: Path) -> None:
    async with budgeted(tmp_path, Budget(tokens_per_day=40)) as (strong, door):
        await door.ask(max_tokens=5)
        with pytest.raises(openai.RateLimitError, match="budget of the strong model") as refused:
            await door.ask(max_tokens=40)
        status, body, headers = await door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 40})
        records = await door.rows()
        metrics = await door.metrics()
        async with door.http.get(door.url + "/readyz") as ready:
            word = (await ready.json())["budget"]
    assert len(strong.calls) == 1, "what has no room is not sent"
    assert (status, body["error"]["type"], body["error"]["code"]) == (429, *["insufficient_quota"] * 2)
    assert refused.value.type == "insufficient_quota"
    assert 0 < int(headers["retry-after"]) <= 24 * 3600 and headers["x-should-retry"] == "false"
    assert [(row["status"], row["strong_output_tokens"]) for row in records] == [("ok", 2), *[("over_budget", 0)] * 2]
    assert "cowest_budget_refused_calls 2" in metrics and 'cowest_budget_left_today{unit="tokens"}' in metrics
    assert word["refused"] == 2 and word["trouble"] is None


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_a_call_whose_client_left_before_it_was_sent_costs_nothing_of_the_budget(
    tmp_path: Path, streamed: bool
) -> None:
    async with budgeted(tmp_path, Budget(tokens_per_day=10_000), max_concurrency=1) as (strong, door):
        strong.gate.clear()
        first = asyncio.create_task(door.ask(max_tokens=5))
        await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
        body = {"messages": ASKED, "max_tokens": 500, "stream": streamed}
        waiting = asyncio.create_task(door.post("/v1/chat/completions", body))
        await shows(door, "cowest_endpoint_waiting{.*} 1")
        waiting.cancel()
        await shows(door, "cowest_requests_in_flight 1")
        strong.gate.set()
        await first
    async with PaidCalls(tmp_path / "calls.sqlite", budget=Budget(tokens_per_day=10_000)) as book:
        _, spent, _ = book.live_spent()
    assert len(strong.calls) == 1 and (spent.calls, spent.tokens) == (1, 6)


async def test_a_call_whose_client_left_while_it_was_to_be_made_again_costs_nothing(tmp_path: Path) -> None:
    busy = {"faults": [Fault(429, {"retry-after": "3"})]}
    async with budgeted(tmp_path, Budget(tokens_per_day=10_000), strong=busy, max_retries=2) as (strong, door):
        waiting = asyncio.create_task(door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 500}))
        await shows(door, "cowest_endpoint_failures{.*} 1")
        waiting.cancel()
        await shows(door, "cowest_requests_in_flight 0")
    async with PaidCalls(tmp_path / "calls.sqlite", budget=Budget(tokens_per_day=10_000)) as book:
        assert len(strong.calls) == 1 and book.live_spent()[1].tokens == 0


NOTHING = Fault(200, body='{"choices": []}')
CUT = Fault(200, {"content-type": "text/event-stream"}, 'data: {"choices": []}\n\n')


@pytest.mark.parametrize(
    ("faults", "streamed", "unknown"),
    [
        pytest.param([NOTHING], False, 1, id="an answer without content"),
        pytest.param(["lost", "lost"], False, 2, id="connections that were cut"),
        pytest.param([CUT], True, 1, id="a stream that was cut before its first word"),
        pytest.param(["garbage", 500], False, 0, id="errors, and a page of no model"),
    ],
)
async def test_each_attempt_that_may_be_billed_counts(
    tmp_path: Path, faults: list[Any], streamed: bool, unknown: int
) -> None:
    budget = Budget(tokens_per_day=10_000)
    async with budgeted(tmp_path, budget, strong={"faults": faults}, max_retries=3) as (strong, door):
        body = {"messages": ASKED, "max_tokens": 500, "stream": streamed}
        async with door.http.post(door.url + "/v1/chat/completions", json=body) as answer:
            assert (answer.status, b"answer" in await answer.read()) == (200, True)
    async with PaidCalls(tmp_path / "calls.sqlite", budget=budget) as book:
        _, spent, _ = book.live_spent()
    assert len(strong.calls) == len(faults) + 1
    assert (spent.calls, spent.output_tokens) == (unknown + 1, unknown * 500 + 2)


async def test_the_fallbacks_answer_does_not_pay_for_what_hung_at_the_pairs_own_endpoint(tmp_path: Path) -> None:
    budget = Budget(tokens_per_day=10_000)
    async with ScriptedModel("in its place") as other:
        fallbacks = (Fallback(other.url, "other"),)
        hangs = {"strong": {"faults": ["hang"]}, "fallbacks": fallbacks, "timeout_seconds": 1, "max_retries": 0}
        async with budgeted(tmp_path, budget, **hangs) as (strong, door):
            await door.ask(max_tokens=500)
    async with PaidCalls(tmp_path / "calls.sqlite", budget=budget) as book:
        _, spent, _ = book.live_spent()
    assert (len(strong.calls), len(other.calls)) == (1, 1)
    assert (spent.calls, spent.output_tokens) == (2, 503)


async def test_the_draft_stands_in_for_a_budget_that_is_spent_where_the_manifest_says_so(tmp_path: Path) -> None:
    async with budgeted(tmp_path, Budget(tokens_per_day=4), when_strong_fails="WeakAlone") as (strong, door):
        completion, headers = await door.ask()
        stream = await door.client.chat.completions.create(model="m", messages=ASKED, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        row, _ = await door.rows()
    assert (completion.choices[0].message.content, text, headers["x-cowest-mode"]) == ("a hint", "a hint", "WeakAlone")
    assert (row["mode"], row["status"]) == ("WeakAlone", "over_budget") and not strong.calls


async def test_money_is_limited_too(tmp_path: Path) -> None:
    async with budgeted(tmp_path, Budget(money_per_day=30.0), prices=PRICES) as (strong, door):
        await door.ask(max_tokens=5)
        with pytest.raises(openai.RateLimitError, match="EUR"):
            await door.ask(max_tokens=100)
    assert len(strong.calls) == 1


async def test_gateways_that_share_a_budget_never_send_more_than_it_allows(tmp_path: Path) -> None:
    limit = 40 * 14  # tokens; a call takes 6 and reserves at most 14
    strong_of_proxy = strong_settings("http://127.0.0.1:9/v1", budget=Budget(tokens_per_day=limit))
    async with proxy(tmp_path, strong_of_proxy) as keeper:
        one = budgeted(tmp_path / "one", Budget(tokens_per_day=limit), book=keeper.url)
        two = budgeted(tmp_path / "two", Budget(tokens_per_day=limit), book=keeper.url)
        async with one as (first, first_door), two as (second, second_door):
            asks = [door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5})
                    for door in (first_door, second_door) for _ in range(80)]  # fmt: skip
            statuses = [status for status, _, _ in await asyncio.gather(*asks)]
            sent = len(first.paid) + len(second.paid)
            while statuses[-1] == 200:
                statuses.append(
                    (await second_door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5}))[0]
                )
        assert set(statuses) == {200, 429} and first.paid and second.paid
        assert 6 * sent <= limit
        answer = await keeper.get("/v1/spent")
        metrics = await keeper.get("/metrics")
    live = answer.body["live"]
    assert live["tokens"] == 6 * (len(first.paid) + len(second.paid)) <= limit
    assert live["left"]["tokens"] == limit - live["tokens"] and live["day"]
    assert f"cowest_proxy_live_tokens_today {live['tokens']}" in metrics.body


async def test_steps_and_live_answers_share_the_days_budget(tmp_path: Path) -> None:
    budget = Budget(tokens_per_day=600)
    async with budgeted(tmp_path, budget) as (strong, door):
        await door.ask(max_tokens=5)
        async with proxy(tmp_path / "steps", strong_settings(strong.url, budget=budget)) as keeper:
            assert keeper.book is not None
            await keeper.book.lend(Ask("g", 1, needed=Amount(560), wanted=Amount(560)))
            refused = await keeper.ask("x" * 90, "k1", max_tokens=20)
    assert refused.status == 402 and "(560 of it by live answers)" in refused.error["message"]


async def test_a_gateway_shows_the_proxy_its_keys_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, own = Budget(tokens_per_day=1_000), tmp_path / "own"
    own.mkdir()
    (own / "cowest").write_text("new\nold\n")
    monkeypatch.setenv("COWEST_PROXY_KEYS_FOLDER", str(own))
    strong = strong_settings("http://127.0.0.1:9/v1", budget=budget)
    for known, passes in ((["old"], True), (["another"], False)):
        async with (
            proxy(tmp_path / known[0], strong, clients=Keys(known)) as keeper,
            budgeted(tmp_path, budget, book=keeper.url) as (_, door),
        ):
            status, body, _ = await door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5})
        assert (status == 200) is passes
    assert body["error"]["code"] == "budget_unknown"


async def test_a_book_that_is_away_ends_no_answer_before_the_slice_is_used_up(tmp_path: Path) -> None:
    budget = Budget(tokens_per_day=100_000)
    async with proxy(tmp_path, strong_settings("http://127.0.0.1:9/v1", budget=budget)) as keeper:
        allowing = budgeted(tmp_path, budget, book=keeper.url)
        strong, door = await allowing.__aenter__()
        await door.ask(max_tokens=5)
    try:
        statuses = [200]
        while statuses[-1] == 200:
            status, body, headers = await door.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5})
            statuses.append(status)
        assert len(strong.paid) > 2
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "budget_unknown", "5")
    finally:
        await allowing.__aexit__(None, None, None)


async def test_what_was_spent_survives_a_restart_and_a_killed_gateways_slice_is_not_spent_again(tmp_path: Path) -> None:
    budget, path = Budget(tokens_per_day=2_000), tmp_path / "calls.sqlite"
    settings = strong_settings("http://127.0.0.1:9/v1", budget=budget)
    killed = allowance_of(settings, str(path))
    assert killed is not None
    async with killed.paid(ASKED, {}, 100):
        pass
    async with PaidCalls(path, budget=budget) as book:
        before = book.live_spent()[2]
    await killed._lender.aclose()  # a kill: nothing more is said
    next_one = allowance_of(settings, str(path))
    assert next_one is not None
    await _use_up(next_one)
    await next_one.aclose()
    async with PaidCalls(path, budget=budget) as book:
        day = day_of(book._clock())
        assert shares(book._reader, day).tokens <= 2_000
        assert before.tokens is not None and live_spent(book._reader, day).tokens <= before.tokens


async def test_workers_that_are_killed_under_load_never_send_more_than_the_budget_allows(tmp_path: Path) -> None:
    limit, port = 1_500, free_port()
    async with ScriptedModel(**DRAFTING) as weak, ScriptedModel("the answer") as strong:
        spec = spec_of(strong)
        spec = spec | {"strong": spec["strong"] | {"budget": {"tokensPerDay": limit}}}
        (tmp_path / "job.yaml").write_text(json.dumps({"spec": spec}))
        (tmp_path / "routing.json").write_text(json.dumps(dump(Routing(1, "s", (arm_of(weak, strong),)))))
        flags = ("--workers", "2", "--book", str(tmp_path / "calls.sqlite"))
        process = subprocess.Popen(command(tmp_path, port, *flags), stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            await ready(url, process)
            kills, seen = 0, {200}
            while seen != {429}:
                asking = asyncio.gather(*(_status(url) for _ in range(20)))
                if kills < 2:
                    strong.arrived.clear()
                    await asyncio.wait_for(strong.arrived.wait(), 60)
                    os.kill(workers_of(process)[str(kills % 2)], signal.SIGKILL)
                    kills += 1
                seen = set(await asking)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 30)
    tokens = sum(usage["total_tokens"] for usage in (_usage(call, "the answer") for call in strong.paid))
    assert kills == 2 and limit / 4 < tokens <= limit
    async with PaidCalls(tmp_path / "calls.sqlite", budget=Budget(tokens_per_day=limit)) as book:
        day, told, _ = book.live_spent()
        assert told.tokens <= tokens <= shares(book._reader, day).tokens <= limit


async def test_a_wrong_ask_for_a_lease_names_the_field(tmp_path: Path) -> None:
    async with (
        proxy(tmp_path, strong_settings("http://127.0.0.1:9/v1")) as keeper,
        keeper.http.post(keeper.url + "/v1/lease", json={"holder": "g"}) as got,
    ):
        assert got.status == 400 and "lease.number" in (await got.json())["error"]["message"]


async def test_without_a_limit_of_a_day_a_gateway_counts_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, budget=Budget(calls_per_round=1)) as (_, _, door):
        await door.ask()
        await door.ask()
        assert "cowest_budget" not in await door.metrics()
    assert not (tmp_path / "calls.sqlite").exists()


async def _status(url: str) -> int:
    """0: its worker was killed."""
    body = {"messages": ASKED, "max_tokens": 20}
    try:
        async with aiohttp.ClientSession() as http, http.post(url + "/v1/chat/completions", json=body) as response:
            return response.status
    except aiohttp.ClientError:
        return 0


async def _use_up(allowance: Allowance) -> None:
    with pytest.raises(Exception, match="is spent"):
        while True:
            async with allowance.paid(ASKED, {}, 100) as bill:
                bill.has_begun, bill.output_tokens = True, 100
