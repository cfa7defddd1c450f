"""The strong-model proxy over real HTTP, before a strong model on loopback that counts what is paid."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import uvicorn
from starlette.applications import Starlette

from cowest_serving.book import PaidCalls
from cowest_serving.contract import Budget, Pair, Prices, Prompts, SecretRef, Strong, dump
from cowest_serving.key_files import Keys
from cowest_serving.models import HttpChatModel, Unauthorized
from cowest_serving.proxy import (
    EvaluatorSettings,
    FeedbackSettings,
    JurorSettings,
    ProxySettings,
    Server,
    _app_of,
    build_app,
    decimal_text,
)
from cowest_training.asking import Asking, open_asking
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_BUDGET, Evaluator, Juror, Row, StepError
from tests.fakes import Call, Fault, ScriptedModel, unused_port
from tests.loop.stopping import told_at_the_start
from tests.ports import free_port

PRICES = Prices(input_per_million_tokens=1e6, output_per_million_tokens=2e6, currency="USD")  # 1 and 2 USD a token
HINTS = ("retry-after", "retry-after-ms", "x-should-retry")
PROMPTS = Prompts(draft="DRAFT {query}", refine="{query} | {draft}", solo="{query}")


# ---------------------------------------------------------------- the world of a test
def strong_settings(url: str, **changes: Any) -> Strong:
    return replace(Strong(url, "big", (), timeout_seconds=5, max_concurrency=8, max_retries=0), **changes)


def question(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": text}], "temperature": 0.0} | more


@dataclass
class Response:
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"]["content"])

    @property
    def error(self) -> Mapping[str, Any]:
        error: Mapping[str, Any] = self.body["error"]
        return error


@dataclass
class Door:
    """A proxy as its clients see it."""

    url: str
    http: aiohttp.ClientSession
    book: PaidCalls | None = None

    async def ask(self, text: str, key: str = "", headers: Mapping[str, str] | None = None, **more: Any) -> Response:
        given = dict(headers or {}) | ({"Idempotency-Key": key} if key else {})
        async with self.http.post(self.url + "/v1/chat/completions", json=question(text, **more), headers=given) as got:
            return Response(got.status, got.headers, await got.json(content_type=None))

    async def get(self, path: str) -> Response:
        async with self.http.get(self.url + path) as got:
            is_json = got.content_type == "application/json"
            return Response(got.status, got.headers, await got.json() if is_json else await got.text())


@asynccontextmanager
async def proxy(
    tmp_path: Path,
    strong: Strong,
    keys: Callable[[], Sequence[str]] = tuple,
    judge: Strong | None = None,
    clients: Keys | None = None,
    other_models: Sequence[str] = (),
) -> AsyncIterator[Door]:
    """A proxy in the test's loop, under uvicorn, on a port of its own. The judge's key is `j`."""
    book = PaidCalls(
        tmp_path / "book.sqlite", budget=strong.budget, prices=strong.prices, max_concurrency=strong.max_concurrency
    )
    judges = [(judge, lambda: ["j"])] if judge else []
    async with serving(build_app(strong, book, keys, judges, clients, other_models), book) as door:
        yield door


@asynccontextmanager
async def serving(app: Starlette, book: PaidCalls) -> AsyncIterator[Door]:
    server = Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5), book)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))  # without its signal handlers
        while not server.started:
            await asyncio.sleep(0.005)
        async with aiohttp.ClientSession() as http:
            yield Door(f"http://127.0.0.1:{listener.getsockname()[1]}", http, book)
        server.should_exit = True
        await serving


async def arrivals(strong: ScriptedModel, n: int) -> None:
    async with asyncio.timeout(30):
        while len(strong.calls) < n:
            strong.arrived.clear()
            await strong.arrived.wait()


# ---------------------------------------------------------------- with an Idempotency-Key
async def test_an_answer_is_paid_once_and_replayed_as_it_was(tmp_path: Path) -> None:
    async with ScriptedModel("forty two") as strong:
        async with proxy(tmp_path, strong_settings(strong.url)) as door:
            first = await door.ask("x", "k1")
        async with proxy(tmp_path, strong_settings(strong.url)) as door:
            again = await door.ask("x", "k1")
    assert (first.status, first.text, "x-cowest-replayed" in first.headers) == (200, "forty two", False)
    assert again.headers["x-cowest-replayed"] == "true"
    assert again.body == first.body
    assert [call.key for call in strong.calls] == ["k1"]
    assert strong.calls[0].body == question("x")


async def test_clients_who_send_the_same_key_at_once_share_one_call(tmp_path: Path) -> None:
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        strong.gate.clear()
        asking = [asyncio.create_task(door.ask("x", "k")) for _ in range(4)]
        await arrivals(strong, 1)
        strong.gate.set()
        answers = await asyncio.gather(*asking)
    assert len(strong.calls) == 1
    assert len({json.dumps(answer.body) for answer in answers}) == 1
    assert sorted("x-cowest-replayed" in answer.headers for answer in answers) == [False, True, True, True]


async def test_a_client_that_leaves_does_not_throw_away_what_is_being_paid(tmp_path: Path) -> None:
    async with ScriptedModel("late") as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        strong.gate.clear()
        asking = asyncio.create_task(door.ask("x", "k"))
        await arrivals(strong, 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        strong.gate.set()
        assert (await door.ask("x", "k")).text == "late"
    assert len(strong.calls) == 1


@pytest.mark.parametrize("while_asking", [False, True], ids=["when it is answered", "while it is being asked"])
async def test_a_key_with_another_body_is_refused(tmp_path: Path, while_asking: bool) -> None:
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        if while_asking:
            strong.gate.clear()
        first = asyncio.create_task(door.ask("x", "k"))
        await arrivals(strong, 1) if while_asking else await first
        other = await door.ask("y", "k")
        strong.gate.set()
        assert (await first).status == 200
        assert (await door.ask("x", "k", model="")).status == 200  # the same: an empty model is the declared one
    assert (other.status, other.error["code"]) == (409, "idempotency_key_reused")
    assert "another key" in other.error["message"]
    assert len(strong.calls) == 1


async def test_an_answer_from_the_book_can_be_had_as_a_stream(tmp_path: Path) -> None:
    async with ScriptedModel("two words") as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        await door.ask("x", "k")
        client = openai.AsyncOpenAI(base_url=door.url + "/v1", api_key="none", max_retries=0)
        async with client:
            given: dict[str, Any] = question("x") | {"stream": True, "stream_options": {"include_usage": True}}
            chunks = [
                chunk
                async for chunk in await client.chat.completions.create(**given, extra_headers={"Idempotency-Key": "k"})
            ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "two words"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 2
    assert len(strong.calls) == 1


async def test_an_answer_that_a_step_paid_for_without_a_proxy_is_a_completion_too(tmp_path: Path) -> None:
    async with ScriptedModel("old") as strong:
        async with HttpChatModel(strong.url, "big") as model, PaidCalls(tmp_path / "book.sqlite") as book:
            messages = question("x")["messages"]
            asked = {"endpoint": strong.url, "name": "big", "purpose": "feedback:1", "params": {"temperature": 0.0}}
            _, key, _ = await book.ask(model, messages, **asked)
        async with proxy(tmp_path, strong_settings(strong.url)) as door:
            answer = await door.ask("x", key)
    assert (answer.text, answer.body["model"], answer.body["system_fingerprint"]) == ("old", "scripted", "fp_1")
    assert answer.body["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    assert answer.headers["x-cowest-purpose"] == "feedback:1"
    assert len(strong.calls) == 1


# ---------------------------------------------------------------- without a key
async def test_without_a_key_a_call_is_passed_on_and_counted_but_not_remembered(tmp_path: Path) -> None:
    async with (
        ScriptedModel("two words") as strong,
        proxy(tmp_path, strong_settings(strong.url, prices=PRICES)) as door,
    ):
        for _ in range(2):
            answer = await door.ask("x y z", seed=3)
            assert (answer.status, answer.text) == (200, "two words")
        spent = await door.get("/v1/spent")
    assert [call.body for call in strong.calls] == [question("x y z", seed=3)] * 2
    assert spent.body.pop("strong")["failures"] == 0
    assert spent.body == {"calls": 2, "tokens": 10, "money": "14", "round": {"calls": 2, "tokens": 10, "money": "14"}}


async def test_a_stream_passes_chunk_by_chunk_and_is_counted(tmp_path: Path) -> None:
    async with ScriptedModel("one two three") as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        body = question("x", stream=True)
        async with door.http.post(door.url + "/v1/chat/completions", json=body) as response:
            events = [line async for line in response.content if line.startswith(b"data:")]
        spent = await door.get("/v1/spent")
    chunks = [json.loads(event[5:]) for event in events[:-1]]
    assert response.content_type == "text/event-stream"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "one", " two", " three", None]
    assert events[-1].strip() == b"data: [DONE]"
    assert (spent.body["calls"], spent.body["tokens"]) == (1, 4)


async def test_a_stream_that_its_client_leaves_ends_upstream_and_is_counted(tmp_path: Path) -> None:
    async with (
        ScriptedModel("one two", faults=["stall"]) as strong,
        proxy(tmp_path, strong_settings(strong.url)) as door,
    ):
        async with door.http.post(door.url + "/v1/chat/completions", json=question("x", stream=True)) as response:
            await response.content.readuntil(b"one")
            response.close()
        async with asyncio.timeout(20):
            while (await door.get("/v1/spent")).body["calls"] == 0:
                await asyncio.sleep(0.02)
            while strong.broken_off == 0:
                await asyncio.sleep(0.02)
        assert "cowest_proxy_calls_in_flight 0\n" in (await door.get("/metrics")).body


async def test_a_stream_that_cannot_begin_has_a_status_of_its_own(tmp_path: Path) -> None:
    async with ScriptedModel(faults=[500, 400]) as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        assert (await door.ask("x", stream=True)).status == 502
        assert (await door.ask("x", stream=True)).status == 400
        assert (await door.get("/v1/spent")).body["calls"] == 0


# ---------------------------------------------------------------- budget
@pytest.mark.parametrize("with_key", [True, False], ids=["with keys", "without keys"])
async def test_many_calls_at_once_never_pass_the_budget(tmp_path: Path, with_key: bool) -> None:
    budget = Budget(calls_per_round=3)
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url, budget=budget)) as door:
        answers = await asyncio.gather(*(door.ask(f"q{i}", f"k{i}" if with_key else "") for i in range(10)))
        refused = [answer for answer in answers if answer.status == 402]
        metrics = (await door.get("/metrics")).body
    assert len(strong.paid) == 3
    assert len(refused) == 7
    assert refused[0].error["code"] == "budget_spent"
    assert "at most 3 calls in round 0, saw 3 used" in refused[0].error["message"]
    assert "retry-after" not in refused[0].headers
    assert "cowest_proxy_calls_refused_by_budget_total 7\n" in metrics


async def test_the_budget_holds_over_restarts_and_an_answer_in_the_book_needs_none(tmp_path: Path) -> None:
    settings = {"budget": Budget(money_per_round=3), "prices": PRICES}
    async with ScriptedModel("one") as strong:
        async with proxy(tmp_path, strong_settings(strong.url, **settings)) as door:
            assert (await door.ask("x", "k", max_tokens=1)).status == 402  # a guess of its tokens is too much
        settings["budget"] = Budget(money_per_round=20)
        async with proxy(tmp_path, strong_settings(strong.url, **settings)) as door:
            assert (await door.ask("x", "k", max_tokens=1)).status == 200
        settings["budget"] = Budget(money_per_round=3)
        async with proxy(tmp_path, strong_settings(strong.url, **settings)) as door:
            assert (await door.ask("y", "k2", max_tokens=1)).status == 402
            assert (await door.ask("x", "k", max_tokens=1)).status == 200
    assert len(strong.calls) == 1


async def test_each_round_has_a_budget_of_its_own_and_who_names_none_pays_from_the_latest(tmp_path: Path) -> None:
    settings = {"budget": Budget(calls_per_round=1)}
    async with ScriptedModel() as strong:
        async with proxy(tmp_path, strong_settings(strong.url, **settings)) as door:
            first = await door.ask("a", "a", {"x-cowest-round": "1", "x-cowest-purpose": "feedback:1:solo"})
            assert (await door.ask("b", "b", {"x-cowest-round": "1"})).status == 402
            assert (await door.ask("b", "b", {"x-cowest-round": "2"})).status == 200
            replayed = await door.ask("a", "a", {"x-cowest-round": "2"})
        async with proxy(tmp_path, strong_settings(strong.url, **settings)) as door:
            assert (await door.ask("c", "c")).status == 402
            spent = [(await door.get(f"/v1/spent{query}")).body for query in ("?round=1", "?round=9", "")]
    for answer in (first, replayed):
        assert (answer.headers["x-cowest-round"], answer.headers["x-cowest-purpose"]) == ("1", "feedback:1:solo")
    assert [(each["calls"], each["round"]["calls"]) for each in spent] == [(2, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("money", "text"),
    [(0.0, "0"), (0.1 + 0.2, "0.3"), (12.0, "12"), (0.000000125, "0.000000125"), (1234567.5, "1234567.5")],
)
def test_money_is_written_as_a_decimal_number(money: float, text: str) -> None:
    assert decimal_text(money) == text


# ---------------------------------------------------------------- what is refused
async def test_the_upstreams_own_refusal_comes_back_in_its_words(tmp_path: Path) -> None:
    error = {"message": "too long " * 100, "type": "invalid_request_error", "param": "messages", "code": "too_long"}
    faults = [Fault(400, body=json.dumps({"error": error})), Fault(429, {"retry-after": "7"})]
    async with ScriptedModel(faults=faults) as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        refused = await door.ask("x", "k")
        limited = await door.ask("x", "k")
        answered = await door.ask("x", "k")
    assert (refused.status, refused.error) == (400, error)
    assert (limited.status, limited.headers["retry-after"], limited.error["message"]) == (429, "7", "scripted 429")
    assert answered.status == 200


async def test_while_the_upstream_wants_to_be_left_alone_each_client_is_told_for_how_long(tmp_path: Path) -> None:
    limited = Fault(429, {"retry-after": "3600"})
    async with ScriptedModel(faults=[limited]) as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        first, second = await door.ask("x", "k1"), await door.ask("y", "k2")
    assert len(strong.calls) == 1
    assert (first.status, first.headers["retry-after"]) == (429, "3600")
    assert (second.status, second.error["code"]) == (429, "rate_limited")
    assert 3590 < int(second.headers["retry-after"]) <= 3600


QUOTA = json.dumps({"error": {"message": "no money left", "code": "insufficient_quota"}})


@pytest.mark.parametrize(
    ("fault", "hints"),
    [
        pytest.param(Fault(429, {"retry-after-ms": "1500"}), {"retry-after": "2", "retry-after-ms": "1500"}, id="soon"),
        pytest.param(Fault(429, body=QUOTA), {"x-should-retry": "false"}, id="an account without money"),
        pytest.param(500, {}, id="a fault that may pass"),
        pytest.param("garbage", {}, id="no answer in the form of one"),
    ],
)
async def test_a_client_is_told_whether_and_when_to_ask_again(
    tmp_path: Path, fault: Any, hints: Mapping[str, str]
) -> None:
    async with ScriptedModel(faults=[fault]) as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        refused = await door.ask("x", "k")
    assert refused.status >= 400
    assert {name: refused.headers[name] for name in HINTS if name in refused.headers} == hints


async def test_a_key_of_another_call_is_not_worth_asking_again_as_the_sdks_would(tmp_path: Path) -> None:
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        await door.ask("x", "k")
        refused = await door.ask("y", "k")
    assert (refused.status, refused.headers["x-should-retry"]) == (409, "false")


async def test_a_strong_model_that_is_away_is_a_502_and_one_that_hangs_a_504(tmp_path: Path) -> None:
    async with unused_port() as port, proxy(tmp_path, strong_settings(f"http://127.0.0.1:{port}/v1")) as door:
        away = await door.ask("x", "k")
    settings = {"timeout_seconds": 1, "max_retries": 0}
    async with (
        ScriptedModel(faults=["hang", 500]) as strong,
        proxy(tmp_path, strong_settings(strong.url, **settings)) as door,
    ):
        hanging = await door.ask("x", "k")
        broken = await door.ask("x", "k")
    assert [(each.status, each.error["code"]) for each in (away, hanging, broken)] == [
        (502, "strong_unavailable"),
        (504, "strong_unavailable"),
        (502, "strong_unavailable"),
    ]


async def test_what_was_spent_comes_with_how_the_strong_endpoint_does(tmp_path: Path) -> None:
    async with ScriptedModel(faults=[None, 500, 401]) as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        seen = []
        for text in ("one", "two", "three"):
            await door.ask(text)
            told = (await door.get("/v1/spent")).body["strong"]
            seen.append((told["failures"], told["error"], told["last_answer"] is not None))
    assert seen == [(0, None, True), (1, "ServerFault", True), (2, "Unauthorized", True)]


async def test_a_fault_that_passes_is_tried_again_under_the_same_key(tmp_path: Path) -> None:
    settings = {"max_retries": 1}
    async with (
        ScriptedModel(faults=["lost"]) as strong,
        proxy(tmp_path, strong_settings(strong.url, **settings)) as door,
    ):
        assert (await door.ask("x", "k")).status == 200
    assert ([call.key for call in strong.calls], len(strong.paid)) == (["k", "k"], 1)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        pytest.param({"model": "small"}, 404, "model", id="another model"),
        pytest.param({"messages": []}, 400, "messages", id="no messages"),
        pytest.param({"max_tokens": "9"}, 400, "max_tokens", id="a limit that is no number"),
        pytest.param({"headers": {"x-cowest-round": "two"}}, 400, "x-cowest-round", id="a round that is no number"),
        pytest.param({"key": "k" * 257}, 400, None, id="a key without end"),
    ],
)
async def test_a_wrong_request_is_refused_before_anything_is_paid(
    tmp_path: Path, changes: dict[str, Any], status: int, param: str | None
) -> None:
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        refused = await door.ask(**({"text": "x", "key": "k"} | changes))
    assert (refused.status, refused.error["param"]) == (status, param)
    assert strong.calls == []


# ---------------------------------------------------------------- keys
def mount(folder: Path, version: str, keys: Mapping[str, str]) -> None:
    """As the kubelet does: files in a hidden folder, a link to it that is swapped, links to the files."""
    (folder / f"..{version}").mkdir(parents=True)
    for name, key in keys.items():
        (folder / f"..{version}" / name).write_text(key)
    (folder / "..new").symlink_to(f"..{version}")
    (folder / "..new").rename(folder / "..data")
    for name in keys:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


async def test_a_rotated_key_arrives_without_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    mount(folder, "1", {"00": "old\n"})
    declared = (SecretRef("s", "k"),)
    async with (
        ScriptedModel(keys=["old"]) as strong,
        proxy(tmp_path, strong_settings(strong.url, api_key_secret_refs=declared), Keys((), folder).read) as door,
    ):
        assert (await door.ask("x", "x")).status == 200
        strong.keys = ("new",)
        refused = await door.ask("y", "y")
        mount(folder, "2", {"00": "new\n"})
        answered = await door.ask("y", "y")
    assert (refused.status, answered.status) == (502, 200)


def test_keys_are_read_in_order_of_their_files_once_each_and_from_folders_below(tmp_path: Path) -> None:
    mount(tmp_path, "1", {"b": "two", "a": "one\n", "c": " \n"})
    (tmp_path / "..data" / "more").mkdir()
    (tmp_path / "..data" / "more" / "d").write_text("three")
    (tmp_path / "more").symlink_to("..data/more")
    assert Keys((), tmp_path, below=True).read() == ("one", "two", "three")


async def test_without_a_key_that_the_manifest_declares_the_proxy_is_not_ready(tmp_path: Path) -> None:
    declared = strong_settings("http://127.0.0.1:9/v1", api_key_secret_refs=(SecretRef("s", "k"),))
    async with proxy(tmp_path, declared, Keys((), tmp_path / "none").read) as door:
        ready, asked = await door.get("/readyz"), await door.ask("x", "k")
    assert (ready.status, asked.status) == (503, 503)
    assert "spec.strong.apiKeySecretRefs" in ready.body["reason"]
    assert asked.error["message"] == ready.body["reason"]


# ---------------------------------------------------------------- who may ask
def shown(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_with_client_keys_only_their_owners_reach_model_judge_and_budget(tmp_path: Path) -> None:
    async with ScriptedModel() as model, ScriptedModel() as judge:
        strong = strong_settings(model.url, budget=Budget(tokens_per_day=1_000_000))
        judging = strong_settings(judge.url, model="judge")
        async with proxy(tmp_path, strong, judge=judging, clients=Keys(["k", "other"])) as door:

            async def statuses(headers: Mapping[str, str]) -> list[int]:
                bodies = {
                    "/v1/chat/completions": question("x"),
                    "/judge/v1/chat/completions": question("x", model="judge"),
                    "/v1/lease": {"holder": "g", "number": 1},
                }
                found = []
                for path, body in bodies.items():
                    async with door.http.post(door.url + path, json=body, headers=headers) as got:
                        found.append(got.status)
                async with door.http.get(door.url + "/v1/models", headers=headers) as got:
                    return [*found, got.status]

            assert [await statuses(headers) for headers in ({}, shown("no"), shown(""))] == [[401] * 4] * 3
            assert (model.calls, judge.calls) == ([], [])
            assert await statuses(shown("other")) == [200] * 4
            refused = await door.ask("x", "k1")
            free = [(await door.get(path)).status for path in ("/healthz", "/readyz", "/metrics", "/v1/spent")]
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert free == [200] * 4, "the kubelet, Prometheus and the operator have no key"


async def test_a_secret_of_clients_that_was_emptied_lets_nobody_in_and_the_proxy_is_not_ready(tmp_path: Path) -> None:
    mount(tmp_path / "keys", "1", {})
    clients = Keys((), tmp_path / "keys")
    async with ScriptedModel() as model, proxy(tmp_path, strong_settings(model.url), clients=clients) as door:
        ready, asked = await door.get("/readyz"), await door.ask("x", headers=shown(""))
        assert (ready.status, asked.status) == (503, 401) and "no client keys" in ready.body["reason"]
        mount(tmp_path / "keys", "2", {"notebook": "n"})
        assert (await door.ask("x", headers=shown("n"))).status == 200
        assert (await door.get("/readyz")).status == 200


# ---------------------------------------------------------------- the small endpoints
async def test_the_declared_model_is_listed_as_upstream_lists_it_or_by_the_manifest(tmp_path: Path) -> None:
    async with ScriptedModel(name="big") as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        listed = (await door.get("/v1/models")).body["data"]
        assert listed == [{"id": "big", "object": "model"}]
    async with proxy(tmp_path, strong_settings("http://127.0.0.1:9/v1")) as door:
        (entry,) = (await door.get("/v1/models")).body["data"]
        assert (entry["id"], entry["owned_by"]) == ("big", "strong")


async def test_each_model_of_the_jobs_pairs_is_listed(tmp_path: Path) -> None:
    async with (
        ScriptedModel(name="big") as strong,
        proxy(tmp_path, strong_settings(strong.url), other_models=("older",)) as door,
    ):
        listed = (await door.get("/v1/models")).body["data"]
    assert [(entry["id"], entry.get("owned_by")) for entry in listed] == [("big", None), ("older", "strong")]


async def test_metrics_tell_paid_from_replayed_calls_and_what_was_spent(tmp_path: Path) -> None:
    faults = [None, 500]
    async with (
        ScriptedModel("two words", faults=faults) as strong,
        proxy(tmp_path, strong_settings(strong.url)) as door,
    ):
        for _ in range(2):
            await door.ask("x", "k", {"x-cowest-purpose": "feedback:3fa4:solo"})
            await door.ask("y", "l")
        text = (await door.get("/metrics")).body
    assert 'cowest_proxy_calls_paid_total{purpose="feedback"} 1\n' in text
    assert 'cowest_proxy_calls_replayed_total{purpose="feedback"} 1\n' in text
    assert 'cowest_proxy_calls_failed_total{status="502"} 1\n' in text
    assert "cowest_proxy_calls_in_flight 0\n" in text
    assert 'cowest_proxy_spent_tokens{gen_ai_token_type="output"} 4\n' in text
    call = 'gen_ai_operation_name="chat",gen_ai_provider_name="openai",gen_ai_request_model="big"'
    failed = f'error_type="ServerFault",{call},server_address="127.0.0.1"'
    assert f"gen_ai_client_operation_duration_seconds_count{{{failed}}} 1\n" in text
    answered = f'{call},gen_ai_response_model="scripted"'
    assert (
        f'gen_ai_client_token_usage_sum{{{answered},gen_ai_token_type="output",server_address="127.0.0.1"}} 4\n' in text
    )


async def test_a_book_that_cannot_be_written_makes_the_proxy_unready(tmp_path: Path) -> None:
    async with ScriptedModel() as strong, proxy(tmp_path, strong_settings(strong.url)) as door:
        assert (await door.get("/readyz")).body == {"ready": True}
        assert door.book is not None
        door.book._writer.execute("PRAGMA query_only = ON")  # as on a volume that was mounted read-only again
        ready, asked = await door.get("/readyz"), await door.ask("x", "k")
        assert (ready.status, asked.status, asked.error["code"]) == (503, 503, "book_unavailable")
        assert (await door.get("/healthz")).status == 200


# ---------------------------------------------------------------- the process
def command(tmp_path: Path, strong: Strong, port: int, *more: str) -> list[str]:
    (tmp_path / "job.json").write_text(json.dumps({"kind": "CollaborationJob", "spec": {"strong": dump(strong)}}))
    files = ["--job", str(tmp_path / "job.json"), "--book", str(tmp_path / "book.sqlite")]
    return [sys.executable, "-m", "cowest_serving.proxy", *files, "--port", str(port), *more]


@asynccontextmanager
async def process(tmp_path: Path, strong: Strong, *more: str) -> AsyncIterator[tuple[Door, subprocess.Popen[Any]]]:
    port = free_port()
    environment = os.environ | {"COWEST_STRONG_API_KEYS": "s3cret\n"}
    running = subprocess.Popen(command(tmp_path, strong, port, *more), env=environment, stderr=subprocess.PIPE)
    try:
        async with aiohttp.ClientSession() as http:
            door = Door(f"http://127.0.0.1:{port}", http)
            async with asyncio.timeout(60):
                while not await is_ready(door):
                    assert running.poll() is None, "the proxy has ended"
                    await asyncio.sleep(0.05)
            yield door, running
    finally:
        running.kill()
        await asyncio.to_thread(running.communicate)


async def is_ready(door: Door) -> bool:
    try:
        return (await door.get("/readyz")).status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_told_to_stop_before_it_serves_it_does_not_stay(tmp_path: Path) -> None:
    async with unused_port() as strong:
        words = command(tmp_path, strong_settings(f"http://127.0.0.1:{strong}/v1"), free_port())
        assert await asyncio.to_thread(told_at_the_start, words) == 0


async def test_after_a_kill_what_was_answered_is_replayed_and_what_was_in_flight_keeps_its_key(tmp_path: Path) -> None:
    async with ScriptedModel("the answer", keys=["s3cret"]) as strong:
        settings = strong_settings(strong.url, budget=Budget(calls_per_round=2))
        async with process(tmp_path, settings) as (door, running):
            first = await door.ask("x", "k1")
            strong.gate.clear()
            in_flight = asyncio.create_task(door.ask("y", "k2"))
            await arrivals(strong, 2)
            running.kill()
            running.wait()
            with pytest.raises(aiohttp.ClientError):
                await in_flight
        strong.gate.set()
        async with process(tmp_path, settings, "--other-model=older") as (door, _):
            assert (await door.ask("z", "k3")).status == 402  # the call in flight may have been paid
            assert [each["id"] for each in (await door.get("/v1/models")).body["data"]] == ["big", "older"]
            replayed, resent = await door.ask("x", "k1"), await door.ask("y", "k2")
            spent = await door.get("/v1/spent")
    assert replayed.body == first.body
    assert replayed.headers["x-cowest-replayed"] == "true"
    assert (resent.status, "x-cowest-replayed" in resent.headers) == (200, False)
    assert [call.key for call in strong.calls] == ["k1", "k2", "k2"]
    assert spent.body["calls"] == 2


async def test_told_to_stop_the_process_brings_home_what_is_paid_and_begins_nothing_more(tmp_path: Path) -> None:
    async with ScriptedModel("late", keys=["s3cret"]) as strong:
        settings = strong_settings(strong.url, max_concurrency=1)
        async with process(tmp_path, settings) as (door, running):
            strong.gate.clear()
            in_flight = asyncio.create_task(door.ask("x", "k1"))
            await arrivals(strong, 1)
            left = asyncio.create_task(door.ask("y", "k2"))
            async with asyncio.timeout(20):
                while "cowest_proxy_calls_in_flight 2\n" not in (await door.get("/metrics")).body:
                    await asyncio.sleep(0.02)
            running.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                while await is_ready(door):
                    await asyncio.sleep(0.02)
            strong.gate.set()
            assert (await in_flight).text == "late"
            refused = await left
            assert await asyncio.to_thread(running.wait, 30) == 0
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        async with process(tmp_path, settings) as (door, _):
            assert (await door.ask("x", "k1")).headers["x-cowest-replayed"] == "true"
    assert [call.key for call in strong.calls] == ["k1"]


@pytest.mark.parametrize("wrong", ["port", "job", "spec", "book"])
def test_a_bad_start_ends_with_one_message(tmp_path: Path, wrong: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if wrong == "port" else free_port()
        arguments = command(tmp_path, strong_settings("http://127.0.0.1:9/v1"), port)
        if wrong == "job":
            (tmp_path / "job.json").unlink()
        if wrong == "spec":
            (tmp_path / "job.json").write_text("{}")
        if wrong == "book":
            (tmp_path / "book.sqlite").mkdir()
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    words = {
        "port": "give another with --port",
        "job": "wanted a CollaborationJob",
        "spec": "spec.strong",
        "book": "book",
    }
    assert ended.returncode == 2
    assert words[wrong] in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- steps behind the proxy
def row(text: str) -> Row:
    return Row(text, text, ({"role": "user", "content": text},), "1")


def pair(strong: Strong, **changes: Any) -> Pair:
    return replace(Pair("sha256:w", "file:///w", PROMPTS, "Explanation", strong.endpoint, strong.model), **changes)


@asynccontextmanager
async def step(strong: Strong, calls: Path, round_number: int = 3) -> AsyncIterator[Asking]:
    async with open_asking(
        strong, Evaluator("ExactMatch"), str(calls), purpose="feedback:f00d", round_number=round_number
    ) as asking:
        yield asking


async def test_steps_in_two_pods_pay_once_through_the_proxy_and_count_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(call: Call) -> str:
        return f"to {call.last}"

    async with ScriptedModel(answer) as model:
        strong = strong_settings(model.url, prices=PRICES)
        async with step(strong, tmp_path / "alone.sqlite") as asking:  # on one machine, without a proxy
            alone = await asking.solo(row("q"), pair(strong))
            cost = asking.calls.spent(purpose="feedback:f00d")
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            replies, seen = [], []
            for pod in ("a", "b"):
                async with step(strong, tmp_path / f"{pod}.sqlite") as asking:
                    replies.append(await asking.solo(row("q"), pair(strong)))
                    seen.append((asking.calls.spent(purpose="feedback:f00d"), dict(asking.calls.asked.cached)))
            of_round = (await door.get("/v1/spent?round=3")).body["round"]
    assert replies == [alone, alone]
    assert seen == [(cost, {}), (cost, {"feedback:f00d:solo": 1})]
    assert of_round["calls"] == 1
    assert [call.key for call in model.calls] == [alone.call] * 2  # once alone, once through the proxy


async def test_an_answer_that_another_step_paid_for_costs_this_one_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model:
        strong = strong_settings(model.url)
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                await asking.solo(row("q"), pair(strong))
            async with open_asking(
                strong, Evaluator("ExactMatch"), str(tmp_path / "b.sqlite"), purpose="evaluate:1", round_number=4
            ) as asking:
                await asking.solo(row("q"), pair(strong))
                assert asking.calls.spent(purpose="evaluate:1").calls == 0


async def test_a_budget_that_is_spent_ends_a_step_in_the_proxys_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model:
        strong = strong_settings(model.url, budget=Budget(calls_per_round=1), max_retries=3)
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                await asking.solo(row("q"), pair(strong))
            async with step(strong, tmp_path / "b.sqlite") as asking:  # its own book knows of no call
                with pytest.raises(StepError, match="at most 1 calls in round 3, saw 1 used") as refusal:
                    await asking.solo(row("other"), pair(strong))
                assert (await asking.solo(row("q"), pair(strong))).text == "an answer"
    assert refusal.value.code == EXIT_BUDGET
    assert len(model.calls) == 1


async def test_a_model_that_the_proxy_does_not_serve_ends_a_step_rather_than_scoring_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model:
        strong = strong_settings(model.url)
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                with pytest.raises(StepError, match=r"wanted big .*, saw older") as refusal:
                    await asking.solo(row("q"), pair(strong, strong_model="older"))
    assert refusal.value.code == EXIT_BAD_INPUT


@pytest.mark.parametrize("of", ["the strong model", "a judge"])
async def test_a_key_that_the_endpoint_refuses_is_not_said_of_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    async with ScriptedModel(keys=["valid"]) as model:
        strong = strong_settings(model.url, max_retries=2)
        async with proxy(tmp_path, strong, lambda: ["wrong"], judge=strong_settings(model.url, model="judge")) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            asked = await door.ask("x", "k")
            before = len(model.calls)
            async with judging(strong, model.url, tmp_path / "a.sqlite") as asking:
                with pytest.raises(Unauthorized) as refusal:
                    if of == "a judge":
                        await asking.score_text(row("q"), "an answer")
                    else:
                        await asking.solo(row("q"), pair(strong))
    assert (asked.status, asked.headers["x-should-retry"]) == (502, "false"), "a client's own key was not refused"
    assert str(refusal.value).startswith(f"{model.url} answered 401"), "the endpoint, not the proxy"
    assert "No API key was sent" not in str(refusal.value)
    assert "two minutes" in str(refusal.value)
    assert not refusal.value.retryable
    assert len(model.calls) - before <= 2, "a judge is asked in both orders, and nobody again"


async def test_an_edited_model_is_measured_against_the_one_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is asked and paid for by its own name, at one endpoint, by one key and from one budget."""
    async with ScriptedModel() as model:
        budget = Budget(calls_per_round=2)
        declared = (SecretRef("s", "k"),)
        strong = strong_settings(model.url, budget=budget, prices=PRICES, api_key_secret_refs=declared)
        async with proxy(tmp_path, strong, lambda: ["key"], other_models=("older",)) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                for name in ("big", "older", "big", "older"):
                    await asking.solo(row("q"), pair(strong, strong_model=name))
                with pytest.raises(StepError, match="at most 2 calls in round 3, saw 2 used"):
                    await asking.solo(row("other"), pair(strong, strong_model="older"))
                with pytest.raises(StepError, match="saw oldest: this job asks no such model"):
                    await asking.solo(row("q"), pair(strong, strong_model="oldest"))
            spent = (await door.get("/v1/spent?round=3")).body
    assert [call.body["model"] for call in model.calls] == ["big", "older"]
    assert {call.headers["authorization"] for call in model.calls} == {"Bearer key"}
    assert (spent["round"]["calls"], float(spent["round"]["money"]) > 0) == (2, True)


async def test_how_the_endpoint_does_is_told_whichever_model_of_it_is_asked(tmp_path: Path) -> None:
    async with (
        ScriptedModel(faults=[500]) as model,
        proxy(tmp_path, strong_settings(model.url), other_models=("older",)) as door,
    ):
        assert (await door.ask("x", "k", model="older")).status == 502
        word = (await door.get("/v1/spent")).body["strong"]
    assert (word["failures"], word["error"]) == (1, "ServerFault")


async def test_a_request_that_the_strong_model_refuses_is_an_answer_worth_nothing_behind_the_proxy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel(faults=[400]) as model:
        strong = strong_settings(model.url)
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                reply = await asking.solo(row("q"), pair(strong))
    assert "scripted 400" in reply.error


async def test_a_step_shows_the_proxy_its_own_key_also_while_that_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(tmp_path / "of-the-proxy", "1", {"cowest": "old", "notebook": "n"})
    mount(tmp_path / "of-the-step", "1", {"cowest": "old"})
    monkeypatch.setenv("COWEST_PROXY_KEYS_FOLDER", str(tmp_path / "of-the-step"))
    async with ScriptedModel() as model, ScriptedModel("ACCEPT") as judge:
        strong, judging_model = strong_settings(model.url), strong_settings(judge.url, model="judge")
        clients = Keys((), tmp_path / "of-the-proxy")
        async with proxy(tmp_path, strong, judge=judging_model, clients=clients) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with judging(strong, judge.url, tmp_path / "a.sqlite") as asking:

                async def answers(query: str) -> bool:
                    return (await asking.solo(row(query), pair(strong))).error == ""

                assert await answers("before")
                assert await asking.score_text(row("q"), "an answer") == 1.0
                # Both are given for a while; the kubelet is at the step's node first, and at the proxy's last.
                mount(tmp_path / "of-the-step", "2", {"cowest": "old\nnew"})
                assert await answers("both here")
                mount(tmp_path / "of-the-proxy", "2", {"cowest": "old\nnew", "notebook": "n"})
                assert await answers("both there")
                mount(tmp_path / "of-the-proxy", "3", {"cowest": "new", "notebook": "n"})
                assert await answers("one is no longer known")
                mount(tmp_path / "of-the-step", "3", {"cowest": "new"})
                assert await answers("one")
    assert all(call.headers.get("authorization") is None for call in model.calls), "a client's key goes no further"


async def test_a_step_without_its_key_ends_with_a_word_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedModel() as model:
        strong = strong_settings(model.url)
        async with proxy(tmp_path, strong, clients=Keys(["k"])) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                with pytest.raises(Unauthorized, match="Wrong or missing API key") as refusal:
                    await asking.solo(row("q"), pair(strong))
    assert not refusal.value.retryable, "the step ends as with bad input"
    assert model.calls == []


async def test_an_endpoint_of_older_days_is_asked_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedModel() as model, ScriptedModel("from the old one") as old:
        strong = strong_settings(model.url)
        async with proxy(tmp_path, strong) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with step(strong, tmp_path / "a.sqlite") as asking:
                reply = await asking.solo(row("q"), pair(strong, strong_endpoint=old.url))
    assert reply.text == "from the old one"
    assert "x-cowest-purpose" not in old.calls[0].headers
    assert model.calls == []


# ---------------------------------------------------------------- judges
@asynccontextmanager
async def judging(strong: Strong, judge: str, book: Path, model: str = "judge") -> AsyncIterator[Asking]:
    evaluator = Evaluator("Judge", endpoint=judge, model=model)
    async with open_asking(strong, evaluator, str(book), purpose="evaluate:f00d", round_number=3) as asking:
        yield asking


async def test_a_judge_is_asked_by_the_proxy_which_holds_its_key_its_bill_and_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model, ScriptedModel("ACCEPT") as judge:
        strong = strong_settings(model.url, prices=PRICES)
        async with proxy(tmp_path, strong, judge=strong_settings(judge.url, model="judge")) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            for pod in ("a", "b"):  # the second finds all in the proxy's book
                async with judging(strong, judge.url, tmp_path / f"{pod}.sqlite") as asking:
                    assert await asking.score_text(row("q"), "an answer") == 1.0
            of_round = (await door.get("/v1/spent?round=3")).body["round"]
    assert of_round["calls"] == len(judge.calls) == 2, "in both orders, once"
    assert float(of_round["money"]) > 0
    assert {call.headers["authorization"] for call in judge.calls} == {"Bearer j"}
    assert model.calls == []


async def test_each_judge_of_a_jury_is_asked_by_the_proxy_with_its_own_key_and_remembered_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model, ScriptedModel("ACCEPT") as judge, ScriptedModel("REJECT") as other:
        strong = strong_settings(model.url, prices=PRICES)
        settings = proxy_settings(strong, judge.url, other.url)
        monkeypatch.setenv("COWEST_EVALUATOR_API_KEY", "first")
        monkeypatch.setenv("COWEST_JURY_API_KEY_1", "second")
        book = PaidCalls(tmp_path / "book.sqlite", prices=strong.prices)
        async with serving(_app_of(strong, settings.judges, book), book) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            alone = Evaluator("Judge", endpoint=judge.url, model="judge")
            jury = replace(alone, jury=(Juror(other.url, "other"),))
            for evaluator, score in ((alone, 1.0), (jury, 0.5), (replace(jury, jury_rule="Mean"), 0.5)):
                path = str(tmp_path / "a.sqlite")
                async with open_asking(strong, evaluator, path, purpose="evaluate:f00d", round_number=3) as asking:
                    assert await asking.score_text(row("q"), "an answer") == score
                    doubt = asking.doubt(row("q"), "an answer")
            calls = (await door.get("/v1/spent?round=3")).body["round"]["calls"]
    assert doubt == "jurorsSplit" and calls == len(judge.calls) + len(other.calls) == 4, "each in both orders, once"
    keys = [{call.headers["authorization"] for call in server.calls} for server in (judge, other)]
    assert keys == [{"Bearer first"}, {"Bearer second"}]


def proxy_settings(strong: Strong, judge: str, other: str) -> ProxySettings:
    jury = (JurorSettings(other, "other"),)
    return ProxySettings(strong, FeedbackSettings(EvaluatorSettings("Judge", judge, "judge", jury=jury)))


async def test_a_budget_that_is_spent_ends_a_step_that_judges_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedModel() as model, ScriptedModel("ACCEPT") as judge:
        strong = strong_settings(model.url, budget=Budget(calls_per_round=1))
        async with proxy(tmp_path, strong, judge=strong_settings(judge.url, model="judge")) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with judging(strong, judge.url, tmp_path / "a.sqlite") as asking:
                with pytest.raises(StepError, match="at most 1 calls in round 3") as refusal:
                    await asking.score_text(row("q"), "an answer")
    assert refusal.value.code == EXIT_BUDGET
    assert len(judge.calls) == 1


@pytest.mark.parametrize("declared", ["another judge", None], ids=["another judge", "no judge"])
async def test_a_trial_whose_judge_is_not_declared_any_more_asks_it_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str | None
) -> None:
    monkeypatch.setenv("COWEST_EVALUATOR_API_KEY", "own")
    async with ScriptedModel() as model, ScriptedModel("ACCEPT") as judge:
        strong = strong_settings(model.url)
        now = strong_settings("http://elsewhere/v1", model=declared) if declared else None
        async with proxy(tmp_path, strong, judge=now) as door:
            monkeypatch.setenv("COWEST_STRONG_URL", door.url + "/v1")
            async with judging(strong, judge.url, tmp_path / "a.sqlite") as asking:
                assert await asking.score_text(row("q"), "an answer") == 1.0
    assert {call.headers["authorization"] for call in judge.calls} == {"Bearer own"}
