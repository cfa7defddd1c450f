"""The gateway over real HTTP: model servers on loopback, the `openai` SDK as client, records in a real folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import uvicorn

from cowest_serving.answering import Refusal, parse_chat, user_hash
from cowest_serving.app import (
    GatewayLimits,
    GatewaySettings,
    Keys,
    TraceSettings,
    WeakSettings,
    build_app,
    fallback_keys_of,
)
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import (
    KEEP_ALIVE_SECONDS,
    TRACE_COLUMNS,
    Arm,
    Collaboration,
    Fallback,
    Pair,
    Routing,
    SecretRef,
    SettingsError,
    Strong,
    dump,
)
from cowest_serving.front_door import FrontDoor
from cowest_serving.ray_app import OneRequestId, ray_settings
from cowest_serving.routing import FileRouting
from cowest_serving.spool import LogFile
from cowest_serving.traces import SpooledTraces, TraceWriter, read_feedback, read_traces
from tests.fakes import ONLY_DEFAULT, Fault, ScriptedModel
from tests.loop.stopping import told_at_the_start
from tests.loop.test_fetch import minio_server, needs_minio, s3_environment
from tests.patience import IN_TIME
from tests.ports import free_port

PROMPTS = replace(
    DEFAULT_PROMPTS["Explanation"], draft="DRAFT {query}", refine="{query} | {draft}", solo="SOLO {query}"
)
DIGEST = "sha256:weak"
ASKED: Any = [{"role": "user", "content": "why?"}]


# ---------------------------------------------------------------- the world of a test
def strong_settings(url: str, **changes: Any) -> Strong:
    built = Strong(url, "big", (), timeout_seconds=60, max_concurrency=16, max_retries=0)
    return replace(built, **changes)


def settings_of(strong: ScriptedModel, **changes: Any) -> GatewaySettings:
    collaboration = Collaboration("Explanation", "StrongAlone", "Fail", "StrongAlone", draft_max_tokens=99)
    of_strong = {name: changes.pop(name) for name in list(changes) if name in Strong.__dataclass_fields__}
    percent = changes.pop("content_sample_percent", 100)
    when_full = changes.pop("when_spool_full", "Answer")
    of_gateway = {
        "max_body_bytes": changes.pop("max_body_bytes", None),
        "max_concurrency": changes.pop("at_once", None),
    }
    return GatewaySettings(
        strong_settings(strong.url, **of_strong),
        replace(collaboration, **changes),
        TraceSettings(percent, None, when_full),
        GatewayLimits(**{name: value for name, value in of_gateway.items() if value}),
    )


def arm_of(weak: ScriptedModel | str, strong: ScriptedModel, **changes: Any) -> Arm:
    pair = Pair(changes.pop("digest", DIGEST), "file:///m", PROMPTS, "Explanation", strong.url, "big")
    built = Arm("stable", 100, "Pair", pair, weak if isinstance(weak, str) else weak.url)
    return replace(built, **changes)


@dataclass
class FixedRouting:
    current: Routing | None
    errors: int = 0
    trouble: str = ""

    async def watch(self) -> None:
        await asyncio.Event().wait()


@dataclass
class Gateway:
    url: str
    store: Path
    writer: TraceWriter
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession

    async def ask(self, **options: Any) -> tuple[Any, Mapping[str, str]]:
        """The SDK's completion and the response's headers."""
        given = {"model": "mine", "messages": ASKED} | options
        response = await self.client.chat.completions.with_raw_response.create(**given)
        return response.parse(), response.headers

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Mapping[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, **options) as response:
            return response.status, await response.json(), response.headers

    async def rows(self) -> list[dict[str, Any]]:
        await self.writer.flush()
        rows: list[dict[str, Any]] = read_traces(str(self.store)).to_pylist()
        return rows

    async def row(self) -> dict[str, Any]:
        (row,) = await self.rows()
        return row

    async def metrics(self) -> str:
        async with self.http.get(self.url + "/metrics") as response:
            return await response.text()


@asynccontextmanager
async def gateway(tmp_path: Path, settings: GatewaySettings, routing: Any, **options: Any) -> AsyncIterator[Gateway]:
    """A gateway in the test's loop, under uvicorn, on a port of its own."""
    if isinstance(routing, Arm):
        routing = Routing(7, "salt", (routing,))
    if isinstance(routing, Routing):
        routing = FixedRouting(routing)
    writer = TraceWriter(str(tmp_path), "test")
    app = build_app(settings, routing, options.pop("traces", writer), **options)
    limits: Any = {"timeout_graceful_shutdown": 2, "timeout_keep_alive": KEEP_ALIVE_SECONDS}
    server = uvicorn.Server(uvicorn.Config(app, http=FrontDoor, log_config=None, **limits))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))  # without its signal handlers
        while not server.started:
            await asyncio.sleep(0.005)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0)
        async with client, aiohttp.ClientSession() as http:
            yield Gateway(url, tmp_path, writer, client, http)
        server.should_exit = True
        await serving


@asynccontextmanager
async def world(tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[ScriptedModel, ScriptedModel, Gateway]]:
    """Weak and strong model and a gateway with one stable arm of both."""
    weak_options, strong_options = changes.pop("weak", {}), changes.pop("strong", {})
    options = {name: Keys(changes.pop(name)) for name in ("client_keys", "strong_keys") if name in changes}
    options |= {name: changes.pop(name) for name in ("traces",) if name in changes}
    arm = changes.pop("arm", {})
    async with (
        ScriptedModel(**({"answers": "a hint", "headers": {"x-cowest-model-digest": DIGEST}} | weak_options)) as weak,
        ScriptedModel(**({"answers": "the answer", "name": "big-2026"} | strong_options)) as strong,
        gateway(tmp_path, settings_of(strong, **changes), arm_of(weak, strong, **arm), **options) as door,
    ):
        yield weak, strong, door


# ---------------------------------------------------------------- the pair's answer
async def test_so_many_drafts_are_under_way_at_once_as_the_manifest_says(tmp_path: Path) -> None:
    weak_options: Any = {"answers": "a hint", "headers": {"x-cowest-model-digest": DIGEST}}
    async with ScriptedModel(**weak_options) as weak, ScriptedModel("the answer") as strong:
        settings = replace(settings_of(strong), weak=WeakSettings(max_concurrency=70))
        async with gateway(tmp_path, settings, arm_of(weak, strong)) as door:
            weak.gate.clear()
            asks = [asyncio.create_task(door.post("/v1/chat/completions", {"messages": ASKED})) for _ in range(80)]
            async with asyncio.timeout(IN_TIME):
                while len(weak.calls) < 70:
                    await asyncio.sleep(0.01)
            weak.gate.set()
            answers = await asyncio.gather(*asks)
            rows = await door.rows()
    assert {status for status, _, _ in answers} == {200} and {row["mode"] for row in rows} == {"Pair"}


async def test_the_draft_of_the_weak_model_goes_to_the_strong_one(tmp_path: Path) -> None:
    async with world(tmp_path) as (weak, strong, door):
        completion, headers = await door.ask(temperature=0.3, seed=4, extra_body={"top_k": 3})
    assert completion.choices[0].message.content == "the answer"
    assert weak.calls[0].body["messages"] == [{"role": "user", "content": "DRAFT why?"}]
    assert (weak.calls[0].body["temperature"], weak.calls[0].body["max_tokens"]) == (0, 99)
    assert strong.calls[0].body == {
        "model": "big",
        "messages": [{"role": "user", "content": "why? | a hint"}],
        "temperature": 0.3,
        "seed": 4,
        "top_k": 3,
    }
    assert headers["x-cowest-mode"] == "Pair"
    assert headers["x-cowest-arm"] == "stable"
    assert headers["x-cowest-weak"] == DIGEST
    assert headers["x-cowest-strong"] == "big-2026"
    assert headers["x-cowest-pair"] == arm_of(weak, strong).pair.digest


async def test_the_client_gets_the_model_name_that_it_asked_for_and_the_strong_usage(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        completion, _ = await door.ask(model="anything")
    assert completion.model == "anything"
    assert completion.usage.completion_tokens == 2
    assert completion.system_fingerprint == "fp_1"


async def test_the_record_of_an_answer_says_everything(tmp_path: Path) -> None:
    async with world(tmp_path) as (weak, strong, door):
        _, headers = await door.ask(user="ann")
        row = await door.row()
    pair = arm_of(weak, strong).pair
    assert set(row) == set(TRACE_COLUMNS)
    assert row.pop("draft_ms") > 0 and row.pop("answer_ms") > 0
    assert abs(row.pop("time").timestamp() - time.time()) < 60
    assert row == {
        "trace_id": headers["x-request-id"],
        "routing_version": 7,
        "arm": "stable",
        "weight_percent": 100,
        "mode": "Pair",
        "status": "ok",
        "error": "",
        "pair_digest": pair.digest,
        "weak_digest": DIGEST,
        "prompts_digest": PROMPTS.digest,
        "draft_form": "Explanation",
        "strong_model": "big-2026",
        "strong_version": "fp_1",
        "user_hash": user_hash("ann"),
        "query": "why?",
        "messages": '[{"role":"user","content":"why?"}]',
        "draft": "a hint",
        "answer": "the answer",
        "tool_calls": None,
        "weak_input_tokens": 2,
        "weak_output_tokens": 2,
        "strong_input_tokens": 4,
        "strong_output_tokens": 2,
        "shadow": False,
        "shortcut": "",
        "application": "",
        "propensity": 1.0,
        "placeholders": None,
    }


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}


@pytest.mark.parametrize("said", [None, "I look it up."], ids=["calls alone", "beside text"])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_record_of_an_answer_has_the_calls_of_tools_that_it_consists_of(
    tmp_path: Path, stream: bool, said: str | None
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": said, "tool_calls": [CALL]}}
    body = json.dumps({"object": "chat.completion", "choices": [choice | {"finish_reason": "tool_calls"}]})
    whole = Fault(200, {"content-type": "application/json"}, body)
    async with world(tmp_path, strong={"faults": [whole]}) as (weak, _, door):
        if stream:
            assert (await streamed(door, tools=[WEATHER]))[0] == (said or "")
        else:
            completion, _ = await door.ask(tools=[WEATHER])
            assert completion.choices[0].message.tool_calls[0].function.name == "weather"
        row = await door.row()
    assert json.loads(row["tool_calls"]) == [CALL]
    assert (row["answer"], row["mode"], row["status"], weak.calls) == (said or "", "StrongAlone", "ok", [])


async def test_outside_the_sample_a_record_has_no_calls_of_tools_either(tmp_path: Path) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [CALL]}, "finish_reason": "tool_calls"}
    body = json.dumps({"object": "chat.completion", "choices": [choice]})
    async with world(tmp_path, strong={"faults": [Fault(200, body=body)]}, content_sample_percent=0) as (_, _, door):
        await door.ask(tools=[WEATHER])
        row = await door.row()
    assert row["tool_calls"] is None and row["status"] == "ok"


async def test_the_strong_model_sees_its_own_key_and_never_the_clients_or_its_user(tmp_path: Path) -> None:
    async with world(tmp_path, strong_keys=["s3cret"]) as (weak, strong, door):
        await door.ask(user="ann")
    assert strong.calls[0].headers["authorization"] == "Bearer s3cret"
    assert "authorization" not in weak.calls[0].headers
    assert "user" not in strong.calls[0].body


async def test_a_key_is_never_sent_to_another_endpoint_than_the_manifests(tmp_path: Path) -> None:
    async with ScriptedModel() as weak, ScriptedModel() as old, ScriptedModel() as new:
        arm = arm_of(weak, old)
        async with gateway(tmp_path, settings_of(new), arm, strong_keys=Keys(["of-the-new"])) as door:
            await door.ask()
    assert "authorization" not in old.calls[0].headers and not new.calls


async def test_a_pair_of_the_old_endpoint_is_asked_with_the_key_of_the_fallback_that_names_it(tmp_path: Path) -> None:
    async with ScriptedModel() as weak, ScriptedModel() as old, ScriptedModel() as new:
        settings = settings_of(new, fallbacks=(Fallback(old.url, "big"),))
        keys = {"strong_keys": Keys(["of-the-new"]), "fallback_keys": [Keys(["of-the-old"])]}
        async with gateway(tmp_path, settings, arm_of(weak, old), **keys) as door:
            await door.ask()
    assert old.calls[0].headers["authorization"] == "Bearer of-the-old" and not new.calls


@pytest.mark.parametrize("given", ["mine-1", None])
async def test_the_idempotency_key_is_the_clients_or_the_request_id(tmp_path: Path, given: str | None) -> None:
    async with world(tmp_path) as (_, strong, door):
        _, headers = await door.ask(extra_headers={"Idempotency-Key": given} if given else {})
    assert strong.calls[0].key == (given or headers["x-request-id"])


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        pytest.param({}, 50, id="the manifest's"),
        pytest.param({"max_tokens": 7}, 7, id="the client's"),
        pytest.param({"max_tokens": 70}, 50, id="the manifest's, where the client's is larger"),
        pytest.param({"max_tokens": None}, 50, id="the manifest's, where the client's is null"),
    ],
)
async def test_an_answer_is_no_longer_than_the_manifest_allows(
    tmp_path: Path, options: dict[str, int | None], sent: int
) -> None:
    async with world(tmp_path, max_tokens=50) as (_, strong, door):
        await door.post("/v1/chat/completions", {"messages": ASKED} | options)
    assert strong.calls[0].body["max_tokens"] == sent


@pytest.mark.parametrize(("given", "sent"), [(7, 7), (70, 50)])
async def test_a_limit_by_its_new_name_keeps_it(tmp_path: Path, given: int, sent: int) -> None:
    async with world(tmp_path, max_tokens=50) as (_, strong, door):
        await door.ask(max_completion_tokens=given)
    body = strong.calls[0].body
    assert body["max_completion_tokens"] == sent and "max_tokens" not in body


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9", 10_000_001, 5_000_000_000_000_000_000, 10**30])
def test_a_limit_that_no_answer_has_is_refused(name: str, value: Any) -> None:
    with pytest.raises(Refusal) as refused:
        parse_chat(json.dumps({"messages": ASKED, name: value}).encode(), "1")
    assert (refused.value.status, refused.value.param) == (400, name)
    assert refused.value.message.startswith(f"{name}: wanted a whole number from 1 to 10000000, saw ")


# ---------------------------------------------------------------- streams
async def streamed(door: Gateway, **options: Any) -> tuple[str, list[Any], Mapping[str, str]]:
    given = {"model": "mine", "messages": ASKED, "stream": True} | options
    response = await door.client.chat.completions.with_raw_response.create(**given)
    chunks = [chunk async for chunk in response.parse()]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, chunks, response.headers


async def test_a_stream_passes_the_strong_chunks_through(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, strong, door):
        text, chunks, headers = await streamed(door)
        row = await door.row()
    assert text == "the answer"
    assert all(chunk.choices for chunk in chunks), "a chunk of usage that nobody asked for"
    assert chunks[0].model == "big-2026"
    assert (headers["x-cowest-mode"], headers["x-cowest-strong"]) == ("Pair", "big-2026")
    assert strong.calls[0].body["messages"][0]["content"] == "why? | a hint"
    assert (row["answer"], row["strong_output_tokens"], row["status"]) == ("the answer", 2, "ok")
    assert row["strong_version"] == "fp_1"


IN_THE_LAST_CHUNK = (
    'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    '{"content":"the answer"},"finish_reason":null}]}\n\n'
    'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},'
    '"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6}}\n\n'
    "data: [DONE]\n\n"
)


async def test_usage_in_the_last_chunk_of_the_text_is_of_both_models_and_for_who_asks(tmp_path: Path) -> None:
    answers = [Fault(200, {"content-type": "text/event-stream"}, IN_THE_LAST_CHUNK)] * 2
    async with world(tmp_path, strong={"faults": answers}) as (_, _, door):
        text, chunks, _ = await streamed(door, stream_options={"include_usage": True})
        same, unasked, _ = await streamed(door)
        rows = await door.rows()
    assert text == same == "the answer" and unasked[-1].choices[0].finish_reason == "stop"
    assert [chunk.usage.cowest["strong"]["total_tokens"] for chunk in chunks if chunk.usage] == [6]
    assert chunks[-1].usage.cowest["weak"]["completion_tokens"] == 2
    assert not [chunk for chunk in unasked if chunk.usage]
    assert [row["strong_output_tokens"] for row in rows] == [2, 2]


async def test_a_stream_gives_the_usage_to_who_asks(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, chunks, _ = await streamed(door, stream_options={"include_usage": True})
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [2]


async def test_chunks_reach_the_client_before_the_answer_is_complete(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": ["stall"]}) as (_, strong, door):
        body = {"messages": ASKED, "stream": True}
        async with door.http.post(door.url + "/v1/chat/completions", json=body) as response:
            async with asyncio.timeout(30):
                seen = b""
                while b'"the"' not in seen:
                    seen += await response.content.readany()
    assert len(strong.calls) == 1


async def test_a_stream_that_breaks_off_ends_with_an_error_event(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": ["truncate"]}) as (_, _, door):
        with pytest.raises(openai.APIError, match="no answer"):
            await streamed(door)
        row = await door.row()
    assert (row["status"], row["answer"]) == ("strong_failed", "the")


async def test_a_strong_model_that_fails_before_the_first_chunk_gives_a_status(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [500]}) as (_, _, door):
        with pytest.raises(openai.InternalServerError) as caught:
            await streamed(door)
    assert caught.value.status_code == 502


async def test_the_draft_can_be_streamed_in_place_of_the_answer(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [500]}, when_strong_fails="WeakAlone") as (_, _, door):
        text, chunks, headers = await streamed(door, stream_options={"include_usage": True})
        row = await door.row()
    assert text == "a hint"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, "stop"]
    assert chunks[-1].usage.completion_tokens == 2
    assert headers["x-cowest-mode"] == "WeakAlone"
    assert (row["mode"], row["status"], row["answer"]) == ("WeakAlone", "strong_failed", "a hint")


async def test_a_character_that_comes_in_halves_is_whole_in_the_record(tmp_path: Path) -> None:
    deltas = (r"\ud83d", r"\ude00 and \ud83d")
    chunks = ['{"choices": [{"delta": {"content": "' + delta + '"}}]}' for delta in deltas]
    chunks.append('{"choices": [{"delta": {}, "logprobs": NaN, "finish_reason": "stop"}]}')
    fault = Fault(200, body="".join(f"data: {chunk}\n\n" for chunk in chunks) + "data: [DONE]\n\n")
    body = {"messages": ASKED, "stream": True}
    async with world(tmp_path, strong={"faults": [fault]}) as (_, strong, door):
        async with door.http.post(door.url + "/v1/chat/completions", json=body) as raw:
            assert [line for line in (await raw.text()).split("\n\n") if deltas[1] in line], "as it came"
        row = await door.row()
    assert (row["status"], row["answer"], len(strong.calls)) == ("ok", "\U0001f600 and \ufffd", 1)


async def test_an_error_in_the_form_of_older_vllms_ends_a_stream_in_its_words(tmp_path: Path) -> None:
    chunk, error = '{"choices": [{"delta": {"content": "the"}}]}', '{"object": "error", "message": "out of memory"}'
    fault = Fault(200, body=f"data: {chunk}\n\ndata: {error}\n\ndata: [DONE]\n\n")
    async with world(tmp_path, strong={"faults": [fault]}) as (_, _, door):
        with pytest.raises(openai.APIError, match="out of memory"):
            await streamed(door)
        row = await door.row()
    assert (row["status"], row["answer"]) == ("strong_failed", "the")


# ---------------------------------------------------------------- the strong model alone
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "http://x/i.png"}}]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tools": [TOOL]}, id="tools"),
        pytest.param({"messages": [{"role": "user", "content": IMAGE}]}, id="an image"),
        pytest.param({"messages": [{"role": "system", "content": "x"}]}, id="no query"),
    ],
)
async def test_what_the_weak_model_cannot_draft_goes_to_the_strong_alone(tmp_path: Path, options: Any) -> None:
    async with world(tmp_path) as (weak, strong, door):
        completion, headers = await door.ask(**options)
        row = await door.row()
    assert completion.choices[0].message.content == "the answer"
    assert (len(weak.calls), len(strong.calls)) == (0, 1)
    assert headers["x-cowest-mode"] == "StrongAlone"
    assert "x-cowest-weak" not in headers
    assert (row["mode"], row["status"], row["weak_digest"], row["draft_ms"]) == ("StrongAlone", "ok", "", None)


async def test_an_arm_of_the_strong_alone_asks_no_weak_model(tmp_path: Path) -> None:
    async with world(tmp_path, arm={"mode": "StrongAlone", "weak_endpoint": None}) as (weak, strong, door):
        _, headers = await door.ask()
    assert not weak.calls
    assert strong.calls[0].body["messages"][0]["content"] == "SOLO why?"
    assert headers["x-cowest-mode"] == "StrongAlone"


async def test_an_arm_of_the_weak_alone_asks_no_strong_model(tmp_path: Path) -> None:
    async with world(tmp_path, arm={"mode": "WeakAlone"}) as (_, strong, door):
        completion, headers = await door.ask()
        text, _, _ = await streamed(door)
    assert completion.choices[0].message.content == text == "a hint"
    assert not strong.calls
    assert headers["x-cowest-mode"] == "WeakAlone"


# ---------------------------------------------------------------- failures
@pytest.mark.parametrize("fault", [500, 401, "drop", "garbage"])
async def test_a_weak_model_that_fails_leaves_the_strong_alone(tmp_path: Path, fault: int | str) -> None:
    async with world(tmp_path, weak={"faults": [fault] * 9}) as (_, strong, door):
        completion, headers = await door.ask()
        row = await door.row()
    assert completion.choices[0].message.content == "the answer"
    assert strong.calls[0].body["messages"][0]["content"] == "SOLO why?"
    assert headers["x-cowest-mode"] == "StrongAlone"
    assert (row["status"], row["mode"], row["answer"]) == ("weak_failed", "StrongAlone", "the answer")
    assert row["error"]


async def test_a_weak_model_that_fails_ends_the_answer_where_the_manifest_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, weak={"faults": [500] * 9}, when_weak_fails="Fail") as (_, strong, door):
        with pytest.raises(openai.InternalServerError, match="weak model") as caught:
            await door.ask()
        row = await door.row()
    assert caught.value.status_code == 502
    assert not strong.calls
    assert (row["status"], row["answer"]) == ("weak_failed", "")


def refusal(status: int, **error: Any) -> Fault:
    return Fault(status, body=json.dumps({"error": error}))


OWN = {"message": "messages: the model's chat template refuses these messages", "code": "invalid_value"}
OF_VLLM = {"message": "This model's maximum context length is 512 tokens. However, ...", "code": 400}
TEMPLATE = refusal(400, message="System role not supported", type="BadRequestError", code=400)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(refusal(400, message="shorten it", code="context_length_exceeded"), id="too long for it"),
        pytest.param(refusal(400, **OF_VLLM), id="too long for it, in vLLM's words"),
        pytest.param(refusal(400, **OWN), id="messages that our own server cannot render"),
        pytest.param(Fault(413), id="more bytes than it reads"),
    ],
)
@pytest.mark.parametrize("when_weak_fails", ["StrongAlone", "Fail"])
async def test_a_query_that_the_weak_model_cannot_be_asked_is_no_fault_of_it(
    tmp_path: Path, fault: Fault, when_weak_fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The live gate must not count that against a candidate; but where it is so for all, somebody should see it."""
    async with world(tmp_path, weak={"faults": [fault] * 2}, when_weak_fails=when_weak_fails) as (weak, strong, door):
        _, headers = await door.ask()
        await door.ask()
        rows, metrics = await door.rows(), await door.metrics()
    assert strong.calls[0].body["messages"][0]["content"] == "SOLO why?"
    assert {(row["status"], row["mode"]) for row in rows} == {("ok", "StrongAlone")}
    assert headers["x-cowest-mode"] == "StrongAlone"
    assert all(row["error"].startswith("BadRequest: ") for row in rows)
    assert 'error_type="BadRequest"' in metrics and "client_gone" not in metrics
    said = [record.message for record in caplog.records if "refuses to draft" in record.message]
    assert len(said) == 1 and weak.url in said[0] and "why?" not in said[0]


async def test_a_weak_server_that_refuses_what_is_not_too_long_fails(tmp_path: Path) -> None:
    async with world(tmp_path, weak={"faults": [TEMPLATE]}) as (_, _, door):
        await door.ask()
        row = await door.row()
    assert (row["status"], row["mode"]) == ("weak_failed", "StrongAlone") and "System role" in row["error"]


async def test_a_weak_server_with_another_model_drafts_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, weak={"headers": {"x-cowest-model-digest": "sha256:other"}}) as (_, strong, door):
        await door.ask()
        row = await door.row()
    assert strong.calls[0].body["messages"][0]["content"] == "SOLO why?"
    assert row["status"] == "weak_failed" and "serves the model sha256:other" in row["error"]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        pytest.param(500, 502, "api_error", id="500"),
        pytest.param(503, 503, "api_error", id="503"),
        pytest.param(401, 502, "api_error", id="our key is refused, which is not the client's fault"),
        pytest.param(404, 502, "api_error", id="a wrong endpoint"),
        pytest.param("drop", 502, "api_error", id="a connection that breaks"),
        pytest.param("garbage", 502, "api_error", id="garbage"),
        pytest.param("hang", 504, "api_error", id="no answer in time"),
        pytest.param(Fault(429, {"retry-after": "17"}), 429, "rate_limit_error", id="429"),
    ],
)
async def test_a_strong_model_that_fails_ends_the_answer(
    tmp_path: Path, fault: int | str | Fault, status: int, kind: str
) -> None:
    settings = {"timeout_seconds": 5 if fault == "hang" else 60, "max_retries": 0}
    async with world(tmp_path, strong={"faults": [fault] * 9}, **settings) as (_, _, door):
        seen, body, headers = await door.post("/v1/chat/completions", {"messages": ASKED})
        row = await door.row()
    assert (seen, body["error"]["type"]) == (status, kind)
    assert headers.get("retry-after") == ("17" if status == 429 else None)
    assert headers["x-request-id"] == row["trace_id"]
    assert (row["status"], row["draft"], row["answer"]) == ("strong_failed", "a hint", "")


async def test_the_draft_stands_in_for_the_answer_where_the_manifest_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [500]}, when_strong_fails="WeakAlone") as (_, _, door):
        completion, headers = await door.ask()
        row = await door.row()
    assert completion.choices[0].message.content == "a hint"
    assert completion.model == "mine"
    assert headers["x-cowest-mode"] == "WeakAlone"
    assert (row["mode"], row["status"], row["answer"]) == ("WeakAlone", "strong_failed", "a hint")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        pytest.param({"response_format": {"type": "json_object"}}, "a hint", id="a form"),
        pytest.param({"n": 2}, "a hint", id="several answers"),
        pytest.param({"stop": ["."]}, "a hint", id="stop words"),
        pytest.param({"max_tokens": 1}, "a hint", id="fewer tokens than the draft has"),
        pytest.param({}, " ", id="a draft without a word"),
    ],
)
async def test_a_draft_that_is_no_answer_to_the_request_does_not_stand_in(
    tmp_path: Path, options: dict[str, Any], hint: str
) -> None:
    both: dict[str, Any] = {"strong": {"faults": [500]}, "weak": {"answers": hint}}
    async with world(tmp_path, when_strong_fails="WeakAlone", **both) as (_, _, door):
        status, body, _ = await door.post("/v1/chat/completions", {"messages": ASKED, **options})
        row = await door.row()
    assert (status, body["error"]["code"]) == (502, "strong_failed")
    assert (row["mode"], row["status"], row["answer"]) == ("Pair", "strong_failed", "")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_asks_for_nothing_more_gets_the_draft_and_hears_that_it_was_cut(
    tmp_path: Path, stream: bool
) -> None:
    cut = {
        "choices": [{"message": {"content": "a hint"}, "finish_reason": "length"}],
        "usage": {"completion_tokens": 2},
    }
    both: dict[str, Any] = {"strong": {"faults": [500]}, "weak": {"faults": [Fault(200, body=json.dumps(cut))]}}
    options: dict[str, Any] = {"n": 1, "max_tokens": 2, "temperature": 0.5, "response_format": {"type": "text"}}
    options |= {"logprobs": False, "tool_choice": "none", "modalities": ["text"], "parallel_tool_calls": True}
    async with world(tmp_path, when_strong_fails="WeakAlone", **both) as (_, _, door):
        if stream:
            text, chunks, _ = await streamed(door, **options)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = (await door.ask(**options))[0].choices[0]
            text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == ("a hint", "length")


async def test_with_both_models_down_the_record_names_both(tmp_path: Path) -> None:
    faults = {"faults": [500] * 9}
    async with world(tmp_path, weak=faults, strong=faults, when_strong_fails="WeakAlone") as (_, _, door):
        with pytest.raises(openai.InternalServerError):
            await door.ask()
        row = await door.row()
    assert row["status"] == "strong_failed"
    assert row["error"].count("ServerFault") == 2


async def test_a_request_that_the_strong_model_refuses_is_the_clients_fault(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [400]}, when_strong_fails="WeakAlone") as (_, _, door):
        with pytest.raises(openai.BadRequestError, match="scripted 400"):
            await door.ask()
        row = await door.row()
    assert row["status"] == "refused"


# ---------------------------------------------------------------- fallbacks of the strong model
@asynccontextmanager
async def with_fallbacks(
    tmp_path: Path, *fallbacks: ScriptedModel, fallback_keys: tuple[Keys, ...] = (), **changes: Any
) -> AsyncIterator[tuple[ScriptedModel, Gateway]]:
    """The strong model, as its script says, and a gateway that knows where else to ask."""
    strong_options = changes.pop("strong", {})
    declared = tuple(Fallback(other.url, "equal") for other in fallbacks)
    async with (
        ScriptedModel("a hint") as weak,
        ScriptedModel(**({"answers": "the answer", "name": "big-2026"} | strong_options)) as strong,
        gateway(
            tmp_path,
            settings_of(strong, fallbacks=declared, **changes),
            arm_of(weak, strong),
            fallback_keys=fallback_keys,
        ) as door,
    ):
        yield strong, door


@pytest.mark.parametrize("fault", [503, 429, 401, "drop", "garbage"])
async def test_a_fallback_answers_for_a_strong_model_that_fails_and_the_record_says_so(
    tmp_path: Path, fault: int | str
) -> None:
    options: dict[str, Any] = {"strong": {"faults": [fault] * 9}, "max_retries": 1, "timeout_seconds": 20}
    async with (
        ScriptedModel("another answer", name="equal-1", keys=["k2"]) as other,
        with_fallbacks(tmp_path, other, fallback_keys=(Keys(["k2"]),), **options) as (strong, door),
    ):
        completion, headers = await door.ask()
        row = await door.row()
    assert completion.choices[0].message.content == "another answer"
    assert headers["x-cowest-strong"] == "equal-1" == row["strong_model"]
    assert (row["status"], row["mode"], row["answer"]) == ("fell_back", "Pair", "another answer")
    assert row["error"].partition(":")[0] in (
        "ServerFault", "RateLimited", "Unauthorized", "EndpointUnreachable", "BadAnswer"
    )  # fmt: skip
    assert len(strong.calls) == (1 if fault == 401 else 2), "its own retries come first"
    assert other.calls[0].body["model"] == "equal" and other.calls[0].last == "why? | a hint"


async def test_an_account_without_quota_gives_way_to_a_fallback_and_is_said_to_be_in_vain_without_one(
    tmp_path: Path,
) -> None:
    error = json.dumps({"error": {"message": "You exceeded your current quota", "type": "insufficient_quota"}})
    options: dict[str, Any] = {"strong": {"faults": [Fault(429, {}, error)]}, "max_retries": 3}
    async with ScriptedModel("another answer") as other, with_fallbacks(tmp_path, other, **options) as (strong, door):
        completion, _ = await door.ask()
        assert completion.choices[0].message.content == "another answer" and len(strong.calls) == 1
    async with world(tmp_path / "alone", **options) as (_, strong, door):
        status, body, headers = await door.post("/v1/chat/completions", {"messages": ASKED})
    assert (status, headers["x-should-retry"], len(strong.calls)) == (429, "false", 1)
    assert "top it up" in body["error"]["message"]


async def test_a_stream_falls_back_before_its_first_chunk_and_never_after(tmp_path: Path) -> None:
    async with (
        ScriptedModel("another answer", name="equal-1") as other,
        with_fallbacks(tmp_path, other, strong={"faults": [503, "truncate"]}) as (_, door),
    ):
        text, _, headers = await streamed(door)
        with pytest.raises(openai.APIError, match="no answer"):
            await streamed(door)
        rows = {row["status"]: row for row in await door.rows()}
    assert (text, headers["x-cowest-strong"]) == ("another answer", "equal-1")
    assert rows["fell_back"]["answer"] == "another answer"
    assert rows["strong_failed"]["answer"] == "the", "text has gone out"
    assert len(other.calls) == 1


async def test_a_stream_that_begins_with_an_error_falls_back_and_one_that_ends_with_it_tells_it(tmp_path: Path) -> None:
    error, chunk = '{"error": {"message": "too much"}}', '{"choices": [{"delta": {"content": "the"}}], "error": null}'
    faults = [Fault(200, body=f"data: {error}\n\n"), Fault(200, body=f"data: {chunk}\n\ndata: {error}\n\n")]
    async with (
        ScriptedModel("another answer", name="equal-1") as other,
        with_fallbacks(tmp_path, other, strong={"faults": faults}) as (_, door),
    ):
        assert (await streamed(door))[0] == "another answer"
        with pytest.raises(openai.APIError, match="too much"):
            await streamed(door)
        rows = {row["status"]: row for row in await door.rows()}
    assert "too much" in rows["fell_back"]["error"] and "too much" in rows["strong_failed"]["error"]
    assert rows["strong_failed"]["answer"] == "the"


async def test_fallbacks_are_asked_in_their_order_and_the_first_fault_is_told_when_none_answers(tmp_path: Path) -> None:
    async with (
        ScriptedModel(faults=[401, 500]) as second,
        ScriptedModel("third", faults=[None, 500]) as third,
        with_fallbacks(tmp_path, second, third, strong={"faults": [503] * 9}) as (strong, door),
    ):
        assert (await door.ask())[0].choices[0].message.content == "third"
        status, body, _ = await door.post("/v1/chat/completions", {"messages": ASKED})
        last = (await door.rows())[-1]
    assert (status, body["error"]["code"]) == (503, "strong_failed")
    assert strong.url in body["error"]["message"] and last["status"] == "strong_failed"


async def test_what_the_strong_model_finds_wrong_is_asked_of_no_other(tmp_path: Path) -> None:
    async with (
        ScriptedModel("another answer") as other,
        with_fallbacks(tmp_path, other, strong={"faults": [Fault(400)]}) as (_, door),
    ):
        status, _, _ = await door.post("/v1/chat/completions", {"messages": ASKED})
    assert (status, other.calls) == (400, [])


async def test_readiness_tells_how_the_strong_endpoint_does(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [None, 500]}) as (_, _, door):
        seen = []
        for _ in range(3):
            async with door.http.get(door.url + "/readyz") as response:
                seen.append((await response.json())["strong"])
            await door.post("/v1/chat/completions", {"messages": ASKED})
    assert seen[0] is None
    assert (seen[1]["failures"], seen[1]["error"]) == (0, None) and seen[1]["last_answer"] is not None
    assert (seen[2]["failures"], seen[2]["error"], seen[2]["failing"]) == (1, "ServerFault", False)


async def test_metrics_tell_how_each_strong_endpoint_does(tmp_path: Path) -> None:
    async with ScriptedModel("a hint") as weak, ScriptedModel(faults=[500]) as strong, ScriptedModel() as other:
        settings = settings_of(strong, fallbacks=(Fallback(other.url, "b"),))
        async with gateway(tmp_path, settings, arm_of(weak, strong)) as door:
            await door.ask()
            metrics = await door.metrics()
    own, fallback = (f'{{endpoint="{model.url}",model="{name}"}}' for model, name in ((strong, "big"), (other, "b")))
    assert f"cowest_endpoint_failures{own} 1" in metrics and f"cowest_endpoint_failures{fallback} 0" in metrics
    for name, value in (("open_circuit", 0), ("places", 16), ("calls", 0), ("waiting", 0), ("keys_away", 0)):
        assert f"cowest_endpoint_{name}{own} {value}" in metrics


async def test_a_request_waits_for_a_place_no_longer_than_for_an_answer(tmp_path: Path) -> None:
    async with world(tmp_path, max_concurrency=1, timeout_seconds=1) as (_, strong, door):
        strong.gate.clear()
        asks = [door.post("/v1/chat/completions", {"messages": ASKED}) for _ in range(3)]
        found = await asyncio.gather(*asks)
        assert sorted({status for status, _, _ in found}) == [503, 504]
        told = next(body["error"]["message"] for status, body, _ in found if status == 503)
    assert "no place was free within 0.5 s, with 1 calls at once" in told


@pytest.mark.parametrize(("stream", "fault"), [(False, "hang"), (True, "hang"), (True, "filters")])
async def test_draft_place_call_and_fallbacks_together_take_no_longer_than_an_answer_may(
    tmp_path: Path, stream: bool, fault: str
) -> None:
    """Each of them would hold the deadline by itself: all models hang, and each takes one call at a time."""
    async with (
        ScriptedModel(faults=["hang"] * 9) as weak,
        ScriptedModel(faults=[fault] * 9) as strong,
        ScriptedModel(faults=[fault] * 9) as second,
        ScriptedModel(faults=[fault] * 9) as third,
    ):
        others = (Fallback(second.url, "b"), Fallback(third.url, "c"))
        settings = settings_of(strong, fallbacks=others, timeout_seconds=2, max_retries=3, max_concurrency=1)
        settings = replace(settings, weak=WeakSettings(max_concurrency=1))
        async with gateway(tmp_path, settings, arm_of(weak, strong)) as door:
            began = time.monotonic()
            bodies = [{"messages": ASKED, "stream": stream}] * 3
            found = await asyncio.gather(*(door.post("/v1/chat/completions", body) for body in bodies))
            took = time.monotonic() - began
            rows = await door.rows()
    assert {status for status, _, _ in found} <= {503, 504}, "and none is a stream that has begun"
    assert 1 < took < 3.5, "2 s, and not 2 s for each of the four"
    assert all(row["draft_ms"] < 1900 for row in rows), "half of the time is left for the answer"
    assert third.calls


@pytest.mark.parametrize("stream", [False, True])
async def test_a_strong_endpoint_that_hangs_leaves_half_of_the_time_to_its_fallback(
    tmp_path: Path, stream: bool
) -> None:
    options: dict[str, Any] = {"strong": {"faults": ["hang"]}, "timeout_seconds": 2}
    async with ScriptedModel("another answer") as other, with_fallbacks(tmp_path, other, **options) as (_, door):
        began = time.monotonic()
        said = (await streamed(door))[0] if stream else (await door.ask())[0].choices[0].message.content
        assert said == "another answer" and 0.9 < time.monotonic() - began < 2


@pytest.mark.parametrize("as_files", [False, True], ids=["in the environment", "as files"])
def test_the_keys_of_fallbacks_are_told_apart_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_files: bool
) -> None:
    reference = SecretRef("s", "k")
    fallbacks = tuple(Fallback(f"http://{n}/v1", n, None if n == "b" else reference) for n in "abc")
    if as_files:
        for name, key in (("00", "ka"), ("02", "kc")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "key").write_text(key + "\n")
        monkeypatch.setenv("COWEST_STRONG_FALLBACK_API_KEYS_FOLDER", str(tmp_path))
    else:
        monkeypatch.setenv("COWEST_STRONG_FALLBACK_API_KEYS", "ka\n\nkc")
    assert [keys.current for keys in fallback_keys_of(strong_settings("http://s/v1", fallbacks=fallbacks))] == [
        ("ka",), (), ("kc",)
    ]  # fmt: skip


async def test_the_manifests_retries_hold_for_the_strong_model(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [500]}, max_retries=1) as (_, strong, door):
        completion, _ = await door.ask()
    assert completion.choices[0].message.content == "the answer"
    assert len({call.key for call in strong.calls}) == 1


async def test_a_client_that_leaves_frees_the_models_and_leaves_a_record(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, strong, door):
        strong.gate.clear()
        asking = asyncio.create_task(door.post("/v1/chat/completions", {"messages": ASKED}))
        await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
        asking.cancel()
        async with asyncio.timeout(IN_TIME):
            while not (rows := await door.rows()) or not strong.broken_off:
                await asyncio.sleep(0.01)
    assert (rows[0]["status"], rows[0]["draft"]) == ("client_gone", "a hint")


async def test_a_client_that_leaves_a_stream_leaves_a_record(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": ["stall"]}) as (_, _, door):
        body = {"messages": ASKED, "stream": True}
        async with door.http.post(door.url + "/v1/chat/completions", json=body) as response:
            await response.content.readany()
            response.close()
        async with asyncio.timeout(IN_TIME):
            while not (rows := await door.rows()):
                await asyncio.sleep(0.01)
    assert rows[0]["status"] == "client_gone"


async def test_a_store_in_trouble_breaks_no_answer(tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be")
    async with world(blocked) as (_, _, door):
        completion, _ = await door.ask()
        await door.writer.flush()
        metrics = await door.metrics()
    assert completion.choices[0].message.content == "the answer"
    assert 'cowest_trace_rows{state="failed_writes"} 1' in metrics


async def test_content_outside_the_sample_is_not_kept(tmp_path: Path) -> None:
    async with world(tmp_path, content_sample_percent=0) as (_, _, door):
        await door.ask()
        row = await door.row()
    assert (row["query"], row["messages"], row["draft"], row["answer"]) == (None,) * 4
    assert row["strong_output_tokens"] == 2


# ---------------------------------------------------------------- bad requests
@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param(b"{", None, id="no JSON"),
        pytest.param(b"\xff", None, id="no UTF-8"),
        pytest.param([], None, id="a list"),
        pytest.param({}, "messages", id="no messages"),
        pytest.param({"messages": []}, "messages", id="empty messages"),
        pytest.param({"messages": "hi"}, "messages", id="messages as text"),
        pytest.param({"messages": ["hi"]}, "messages[0]", id="a message as text"),
        pytest.param({"messages": [{"content": "hi"}]}, "messages[0].role", id="no role"),
        pytest.param({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", id="content a number"),
        pytest.param({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", id="a part as text"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            id="a part without its text",
        ),
        pytest.param({"messages": ASKED, "stream": "yes"}, "stream", id="stream as text"),
        pytest.param({"messages": ASKED, "user": 3}, "user", id="user as a number"),
        pytest.param({"messages": ASKED, "model": 3}, "model", id="model as a number"),
    ],
)
async def test_a_bad_request_names_the_field(tmp_path: Path, body: Any, param: str | None) -> None:
    async with world(tmp_path) as (weak, strong, door):
        status, answer, headers = await door.post("/v1/chat/completions", body)
    assert status == 400
    assert (answer["error"]["param"], answer["error"]["type"]) == (param, "invalid_request_error")
    assert headers["x-request-id"]
    assert not weak.calls and not strong.calls


@pytest.mark.parametrize("limit", [4 * 1024 * 1024, 2_000], ids=["default", "declared"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/feedback"])
async def test_a_body_above_the_limit_is_refused(tmp_path: Path, path: str, chunked: bool, limit: int) -> None:
    async with world(tmp_path, max_body_bytes=limit) as (_, _, door):
        body = b" " * (limit + 1)

        async def pieces() -> AsyncIterator[bytes]:
            yield body

        data: Any = pieces() if chunked else body
        async with door.http.post(door.url + path, data=data) as response:
            assert response.status == 413
            error = (await response.json())["error"]
    assert error["code"] == "body_too_large" and "spec.gateway.maxBodyBytes" in error["message"]
    saw = r"\d+ so far" if chunked else f"{limit + 1} by its Content-Length"
    assert re.search(f"wanted at most {limit} bytes, saw {saw}", error["message"])


async def test_a_body_as_large_as_a_raised_limit_is_answered(tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5_000_000}}
    asked = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}]
    async with world(tmp_path, max_body_bytes=5_100_000) as (_, strong, door):
        assert (await door.post("/v1/chat/completions", {"messages": asked}))[0] == 200
        row = await door.row()
    sent, kept = strong.calls[0].body["messages"], json.loads(row["messages"])
    assert all(messages[0]["content"][1] == picture for messages in (sent, kept))


async def test_more_requests_at_once_than_the_process_may_have_are_to_come_again_and_the_platform_is_still_answered(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, at_once=2) as (weak, strong, door):
        strong.gate.clear()
        asks = [asyncio.create_task(door.post("/v1/chat/completions", {"messages": ASKED})) for _ in range(2)]
        async with asyncio.timeout(IN_TIME):
            while len(strong.calls) < 2:
                await asyncio.sleep(0.01)
        for path in ("/v1/chat/completions", "/v1/feedback"):
            status, body, headers = await door.post(path, {"messages": ASKED, "request_id": "r", "thumb": "up"})
            assert (status, body["error"]["code"], body["error"]["type"]) == (503, "too_busy", "api_error")
            assert headers["retry-after"] == "1" and headers["x-request-id"] and "x-should-retry" not in headers
        async with door.http.get(door.url + "/healthz") as response:
            assert response.status == 200
        assert 'cowest_crowded_requests_total{limit="requests"} 2' in await door.metrics()
        strong.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*asks)] == [200, 200]
        for _ in range(3):
            assert (await door.post("/v1/chat/completions", b"{}"))[0] == 400
            assert (await door.post("/v1/feedback", b"{}"))[0] == 400
        assert (await door.post("/v1/chat/completions", {"messages": ASKED}))[0] == 200, "each has left"
    assert len(weak.calls) == len(strong.calls) == 3


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nope", 404), ("GET", "/v1/feedback", 405)])
async def test_unknown_addresses_answer_in_openai_form(tmp_path: Path, method: str, path: str, status: int) -> None:
    async with world(tmp_path) as (_, _, door), door.http.request(method, door.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]
        assert response.headers["x-request-id"]


async def test_a_wrong_method_is_told_the_right_one_and_head_is_as_good_as_get(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        for method, path, wanted in [("GET", "chat/completions", "POST"), ("DELETE", "models", "GET")]:
            async with door.http.request(method, f"{door.url}/v1/{path}") as response:
                assert (response.status, response.headers["allow"]) == (405, wanted)
        async with door.http.head(door.url + "/healthz") as response:
            assert (response.status, await response.read()) == (200, b"")


async def test_with_client_keys_only_their_owners_may_ask(tmp_path: Path) -> None:
    async with world(tmp_path, client_keys=["k", "other"]) as (_, strong, door):
        await door.ask()  # the SDK's key is "k"
        assert [model.id async for model in door.client.models.list()] == ["cowest"]
        for path in ("/v1/chat/completions", "/v1/feedback"):
            status, body, _ = await door.post(path, {"messages": ASKED}, headers={"Authorization": "Bearer no"})
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert (await door.post(path, {"messages": ASKED}))[0] == 401
    assert len(strong.calls) == 1


# ---------------------------------------------------------------- the split
def split_of(weak: ScriptedModel, strong: ScriptedModel, candidate_percent: int) -> Routing:
    stable = arm_of(weak, strong, weight_percent=100 - candidate_percent)
    candidate = arm_of(weak, strong, name="candidate", weight_percent=candidate_percent)
    return Routing(candidate_percent, "salt", (stable, candidate))


async def arms_by_user(door: Gateway, users: list[str]) -> dict[str, str]:
    async def arm(user: str) -> str:
        _, headers = await door.ask(user=user)
        return headers["x-cowest-arm"]

    return dict(zip(users, await asyncio.gather(*map(arm, users)), strict=True))


async def test_users_are_split_by_weight_keep_their_arm_and_stay_when_it_grows(tmp_path: Path) -> None:
    users = [f"user-{i}" for i in range(150)]
    async with ScriptedModel() as weak, ScriptedModel() as strong:
        routing = FixedRouting(split_of(weak, strong, 30))
        async with gateway(tmp_path, settings_of(strong), routing) as door:
            first = await arms_by_user(door, users)
            assert await arms_by_user(door, users[:30]) == {user: first[user] for user in users[:30]}
            routing.current = split_of(weak, strong, 60)
            later = await arms_by_user(door, users)
    share = sum(arm == "candidate" for arm in first.values()) / len(users)
    assert 0.18 < share < 0.42
    assert {user for user, arm in first.items() if arm == "candidate"} < {
        user for user, arm in later.items() if arm == "candidate"
    }


async def test_the_session_header_sticks_without_a_user_and_nobody_can_choose(tmp_path: Path) -> None:
    async with (
        ScriptedModel() as weak,
        ScriptedModel() as strong,
        gateway(tmp_path, settings_of(strong), split_of(weak, strong, 50)) as door,
    ):
        arms = [
            (await door.ask(extra_headers={"x-session-id": "s", "x-cowest-arm": wish}))[1]["x-cowest-arm"]
            for wish in ("stable", "candidate") * 5
        ]
        by_user = await arms_by_user(door, ["s"])
        rows = await door.rows()
    assert set(arms) == {by_user["s"]}
    assert {row["user_hash"] for row in rows} == {user_hash("s")}


async def test_without_a_routing_nothing_is_answered_but_health(tmp_path: Path) -> None:
    async with ScriptedModel() as strong, gateway(tmp_path, settings_of(strong), FixedRouting(None)) as door:
        status, body, headers = await door.post("/v1/chat/completions", {"messages": ASKED})
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "not_ready", "1")
        async with door.http.get(door.url + "/readyz") as ready, door.http.get(door.url + "/healthz") as health:
            assert (ready.status, health.status) == (503, 200)


async def test_weights_change_as_they_come_without_a_failed_request(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"

    def write(routing: Routing) -> None:
        file.with_suffix(".new").write_text(json.dumps(dump(routing)))
        os.replace(file.with_suffix(".new"), file)

    async with ScriptedModel() as weak, ScriptedModel() as strong:
        write(split_of(weak, strong, 0))
        async with gateway(tmp_path, settings_of(strong), FileRouting(file, every_seconds=3600)) as door:
            assert (await door.ask())[1]["x-cowest-arm"] == "stable"
            write(split_of(weak, strong, 100))
            async with asyncio.timeout(30):  # each answer on the way is good, or `ask` raises
                while (await door.ask())[1]["x-cowest-arm"] == "stable":
                    pass
            file.write_text("{ half a routing")
            async with asyncio.timeout(IN_TIME):
                while "cowest_routing_errors 1" not in await door.metrics():
                    await asyncio.sleep(0.02)
            assert (await door.ask())[1]["x-cowest-arm"] == "candidate"
            write(split_of(weak, strong, 0))
            async with asyncio.timeout(IN_TIME):
                while (await door.ask())[1]["x-cowest-arm"] == "candidate":
                    pass


async def readiness(door: Gateway) -> tuple[int, str]:
    async with door.http.get(door.url + "/readyz") as response:
        return response.status, (await response.json()).get("reason", "")


async def test_a_routing_that_is_not_there_at_the_start_is_taken_up_when_it_comes(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    async with (
        ScriptedModel() as weak,
        ScriptedModel("the answer") as strong,
        gateway(tmp_path, settings_of(strong), FileRouting(file)) as door,
    ):
        assert await readiness(door) == (503, f"no routing yet: {file}: is not there")
        file.write_text("{ half")
        async with asyncio.timeout(IN_TIME):
            while "unexpected" not in (await readiness(door))[1]:
                await asyncio.sleep(0.02)
        file.write_text(json.dumps(dump(Routing(1, "s", (arm_of(weak, strong),)))))
        async with asyncio.timeout(IN_TIME):
            while await readiness(door) != (200, ""):
                await asyncio.sleep(0.02)
        assert (await door.ask())[0].choices[0].message.content == "the answer"


# ---------------------------------------------------------------- keys in a folder
def mount(folder: Path, files: Mapping[str, str]) -> Path:
    """A Secret as the kubelet mounts it: links to a link to a folder of its own, which is replaced at once."""
    folder.mkdir(exist_ok=True)
    inner = folder / f"..{uuid.uuid4().hex}"
    inner.mkdir()
    for name, text in files.items():
        (inner / name).write_text(text)
    (folder / "..new").symlink_to(inner.name)
    os.replace(folder / "..new", folder / "..data")
    for link in folder.iterdir():
        if not link.name.startswith("..") and link.name not in files:
            link.unlink()
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    return folder


def test_keys_of_a_folder_are_one_a_line_in_the_order_of_its_files_after_those_given(tmp_path: Path) -> None:
    folder = mount(tmp_path / "keys", {"b": "three", "a": " one \n\ntwo\n"})
    keys = Keys(["given", "one"], folder)
    assert keys.current == ("given", "one", "two", "three")
    assert not keys.load()
    mount(folder, {"b": "four"})
    assert keys.load()
    assert keys.current == ("given", "one", "four")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="the folder is gone"),
        pytest.param(lambda folder: (folder / "..data").unlink(), id="a link leads nowhere"),
        pytest.param(lambda folder: (folder / "a").resolve().write_bytes(b"\xff"), id="no text"),
    ],
)
def test_a_folder_that_cannot_be_read_leaves_the_keys_and_says_so_once(
    tmp_path: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mount(tmp_path / "keys", {"a": "one"})
    keys = Keys((), folder)
    spoil(folder)
    assert not keys.load() and not keys.load()
    assert keys.current == ("one",)
    assert len(caplog.records) == 1 and "those read before go on" in caplog.text


async def test_client_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    folder = mount(tmp_path / "keys", {"old": "old"})
    async with ScriptedModel() as weak, ScriptedModel() as strong:
        routing = arm_of(weak, strong)
        async with gateway(tmp_path, settings_of(strong), routing, client_keys=Keys((), folder)) as door:

            async def status(key: str) -> int:
                answered, _, _ = await door.post(
                    "/v1/chat/completions", {"messages": ASKED}, headers={"authorization": f"Bearer {key}"}
                )
                return answered

            assert (await status("old"), await status("new")) == (200, 401)
            mount(folder, {"new": "new"})
            async with asyncio.timeout(30):
                while await status("new") != 200:
                    await asyncio.sleep(0.02)
            assert await status("old") == 401


async def test_a_folder_without_keys_lets_nobody_in_and_is_not_ready(tmp_path: Path) -> None:
    folder = mount(tmp_path / "keys", {})
    async with ScriptedModel() as weak, ScriptedModel() as strong:
        routing = arm_of(weak, strong)
        async with gateway(tmp_path, settings_of(strong), routing, client_keys=Keys((), folder)) as door:
            for headers in ({}, {"authorization": "Bearer "}):
                assert (await door.post("/v1/chat/completions", {"messages": ASKED}, headers=headers))[0] == 401
            status, reason = await readiness(door)
            assert status == 503 and f"one key a line in {folder}" in reason
            mount(folder, {"k": "k"})
            async with asyncio.timeout(30):
                while await readiness(door) != (200, ""):
                    await asyncio.sleep(0.02)
            await door.ask()
    assert len(strong.calls) == 1


async def test_strong_keys_are_rotated_while_an_answer_is_under_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cowest_serving.app")
    folder = mount(tmp_path / "keys", {"key": "old"})
    async with ScriptedModel() as weak, ScriptedModel("the answer", keys=["old"]) as strong:
        routing = arm_of(weak, strong)
        async with gateway(tmp_path, settings_of(strong), routing, strong_keys=Keys((), folder)) as door:
            strong.gate.clear()
            early = asyncio.create_task(door.ask())
            await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
            strong.keys = ("new",)
            mount(folder, {"key": "new"})
            async with asyncio.timeout(IN_TIME):
                while "keys of the strong model are read anew" not in caplog.text:
                    await asyncio.sleep(0.02)
            strong.gate.set()
            assert (await door.ask())[0].choices[0].message.content == "the answer"
            assert (await early)[0].choices[0].message.content == "the answer"
    assert [call.headers["authorization"] for call in strong.calls] == ["Bearer old", "Bearer new"]


async def test_what_is_known_of_an_endpoint_outlives_a_rotation_of_its_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cowest_serving.app")
    folder = mount(tmp_path / "keys", {"key": "old"})
    async with ScriptedModel() as weak, ScriptedModel(refuses={"temperature": ONLY_DEFAULT}) as strong:
        routing = arm_of(weak, strong)
        async with gateway(tmp_path, settings_of(strong), routing, strong_keys=Keys((), folder)) as door:
            await door.ask(temperature=0.3)
            strong.faults = [500]
            assert (await door.post("/v1/chat/completions", {"messages": ASKED}))[0] == 502
            mount(folder, {"key": "new"})
            async with asyncio.timeout(IN_TIME):
                while "keys of the strong model are read anew" not in caplog.text:
                    await asyncio.sleep(0.02)
            metrics = await door.metrics()
            await door.ask(temperature=0.3)
    assert re.search(r"cowest_endpoint_failures{.*} 1\b", metrics)
    assert ["temperature" in call.body for call in strong.calls] == [True, False, False, False]
    assert strong.calls[-1].headers["authorization"] == "Bearer new"


# ---------------------------------------------------------------- feedback
async def test_feedback_joins_its_answer_by_the_request_id(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        body = {"request_id": headers["x-request-id"], "score": 1, "reference": "42", "comment": "good"}
        status, answer, _ = await door.post("/v1/feedback", body | {"user": "ann"})
        row = await door.row()
    assert status == 200
    (kept,) = read_feedback(str(tmp_path)).to_pylist()
    assert kept.pop("time") >= row["time"]
    assert kept == {
        "feedback_id": answer["id"],
        "trace_id": row["trace_id"],
        "score": 1.0,
        "reference": "42",
        "comment": "good",
        "thumb": None,
        "correction": None,
        "accepted": None,
        "source": user_hash("ann"),
        "placeholders": None,
    }


async def test_feedback_for_an_unknown_answer_is_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        assert (await door.post("/v1/feedback", {"request_id": "later", "reference": "x"}))[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"score": 1}, "request_id", id="no id"),
        pytest.param({"request_id": 3, "score": 1}, "request_id", id="an id that is a number"),
        pytest.param({"request_id": " ", "score": 1}, "request_id", id="a blank id"),
        pytest.param({"request_id": "r"}, None, id="nothing said"),
        pytest.param({"request_id": "r", "score": "1"}, "score", id="a score as text"),
        pytest.param({"request_id": "r", "score": True}, "score", id="a score as true"),
        pytest.param({"request_id": "r", "score": 1.01}, "score", id="a score above 1"),
        pytest.param({"request_id": "r", "score": -0.1}, "score", id="a score below 0"),
        pytest.param({"request_id": "r", "reference": {"a": 3}}, "reference", id="a reference that is an object"),
        pytest.param({"request_id": "r", "comment": []}, "comment", id="a comment that is a list"),
        pytest.param({"request_id": "r", "thumb": "sideways"}, "thumb", id="a thumb that is neither"),
        pytest.param({"request_id": "r", "thumb": True}, "thumb", id="a thumb as true"),
        pytest.param({"request_id": "r", "correction": 3}, "correction", id="a correction that is a number"),
        pytest.param({"request_id": "r", "accepted": ["x"]}, "accepted", id="accepted text as a list"),
        pytest.param({"request_id": "r", "correction": "", "comment": ""}, None, id="empty texts"),
        pytest.param(b"nothing", None, id="no JSON"),
    ],
)
async def test_bad_feedback_names_the_field_and_is_not_kept(tmp_path: Path, body: Any, param: str | None) -> None:
    async with world(tmp_path) as (_, _, door):
        status, answer, _ = await door.post("/v1/feedback", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert read_feedback(str(tmp_path)).num_rows == 0


@pytest.mark.parametrize(
    ("given", "kept"), [(3, "3"), (2.5, "2.5"), (["a", "b"], '["a", "b"]')], ids=["a number", "a fraction", "a list"]
)
async def test_a_late_reference_may_be_all_that_a_data_file_may_hold(tmp_path: Path, given: Any, kept: str) -> None:
    async with world(tmp_path) as (_, _, door):
        status, _, _ = await door.post("/v1/feedback", {"request_id": "r", "reference": given})
    assert status == 200
    assert read_feedback(str(tmp_path))["reference"].to_pylist() == [kept]


# ---------------------------------------------------------------- durable records
class Watched(LogFile):
    """A file that notes in `done`, which others note in too, what is done to it; or fails."""

    def __init__(self, path: Path, done: list[str], fails: bool = False) -> None:
        super().__init__(path)
        self._done, self._fails = done, fails

    def write(self, data: bytes) -> None:
        if self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(data)
        self._done.append("written")

    def sync(self) -> None:
        super().sync()
        self._done.append("synced")


def spooled(tmp_path: Path, done: list[str] | None = None, **options: Any) -> SpooledTraces:
    fails = options.pop("fails", False)
    options.setdefault("patience", IN_TIME)
    return SpooledTraces(
        str(tmp_path),
        "spooled",
        tmp_path / "spool",
        open_file=lambda path: Watched(path, done if done is not None else [], fails),
        **options,
    )


async def ask_by_hand(app: Any, body: Any, done: list[str]) -> None:
    """One request, noting what is sent and when, as the server would see it."""
    parts = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(event: Any) -> None:
        headers = dict(event.get("headers", []))
        said = "durable" if headers.get(b"x-cowest-trace") == b"durable" else ""
        said += event.get("body", b"").decode()[:80]
        done.append(f"{event['type'].rpartition('.')[2]} {said}".strip())

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    await app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_hears_that_its_record_is_durable_only_after_the_sync(tmp_path: Path, stream: bool) -> None:
    done: list[str] = []
    sink = spooled(tmp_path, done)
    done.append("asked")
    async with (
        ScriptedModel("a hint", headers={"x-cowest-model-digest": DIGEST}) as weak,
        ScriptedModel("yes") as strong,
    ):
        app = build_app(settings_of(strong), FixedRouting(Routing(1, "s", (arm_of(weak, strong),))), sink)
        await sink.start()
        await ask_by_hand(app, {"messages": ASKED, "stream": stream}, done)
        await sink.aclose()
    assert done[0] == "asked"
    if stream:
        assert [event.partition(" ")[0] for event in done[1:3]] == ["start", "body"]
        assert "durable" not in "".join(done[:-3])
        assert done[-3:] == ["written", "synced", "body : trace durable\n\ndata: [DONE]"]
    else:
        assert [event[:13] for event in done[1:]] == ["written", "synced", "start durable", done[-1][:13]]
        assert done[-1].startswith("body {")


async def test_a_durable_answer_says_so_and_its_record_comes_to_the_store(tmp_path: Path) -> None:
    async with world(tmp_path, traces=spooled(tmp_path)) as (_, _, door):
        _, headers = await door.ask()
        said = {"request_id": headers["x-request-id"], "score": 1}
        status, _, of_feedback = await door.post("/v1/feedback", said)
        metrics = await door.metrics()
    assert (headers["x-cowest-trace"], status, of_feedback["x-cowest-trace"]) == ("durable", 200, "durable")
    assert read_traces(str(tmp_path))["trace_id"].to_pylist() == [headers["x-request-id"]]
    assert read_feedback(str(tmp_path))["trace_id"].to_pylist() == [headers["x-request-id"]]
    assert 'cowest_trace_rows{state="acknowledged"} 2' in metrics
    assert "cowest_trace_spool_trouble 0" in metrics


async def test_the_sdk_reads_past_the_word_in_a_stream_and_the_record_is_complete(tmp_path: Path) -> None:
    async with world(tmp_path, traces=spooled(tmp_path)) as (_, _, door):
        chunks = [chunk async for chunk in await door.client.chat.completions.create(
            model="m", messages=ASKED, stream=True
        )]  # fmt: skip
        async with door.http.post(door.url + "/v1/chat/completions", json={"messages": ASKED, "stream": True}) as raw:
            text = await raw.text()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the answer"
    assert text.endswith("\n\n: trace durable\n\ndata: [DONE]\n\n")
    rows = read_traces(str(tmp_path)).to_pylist()
    assert [row["answer"] for row in rows] == ["the answer"] * 2
    assert all(row["answer_ms"] > 0 for row in rows)


@pytest.mark.parametrize("said", [{"system_fingerprint": 7}, {"model": 5}, {"model": {"id": "big"}}], ids=str)
async def test_what_a_stream_says_of_itself_in_another_type_spoils_neither_it_nor_its_record(
    tmp_path: Path, said: Mapping[str, Any]
) -> None:
    chunk = said | {"choices": [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    options = {"faults": [Fault(200, body=body)]}
    async with (
        world(tmp_path, traces=spooled(tmp_path), strong=options) as (_, _, door),
        door.http.post(door.url + "/v1/chat/completions", json={"messages": ASKED, "stream": True}) as raw,
    ):
        assert (await raw.text()).endswith("\n\n: trace durable\n\ndata: [DONE]\n\n")
    (row,) = read_traces(str(tmp_path)).to_pylist()
    (value,) = said.values()
    assert (row["answer"], row["strong_model"] or row["strong_version"]) == ("yes", str(value))


async def test_without_a_spool_nothing_is_called_durable(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        async with door.http.post(door.url + "/v1/chat/completions", json={"messages": ASKED, "stream": True}) as raw:
            assert "durable" not in await raw.text()
    assert "x-cowest-trace" not in headers


@pytest.mark.parametrize("options", [{"fails": True}, {"limit_bytes": 10}], ids=["a full disk", "a full spool"])
async def test_a_full_disk_breaks_no_answer_and_is_counted(tmp_path: Path, options: Mapping[str, Any]) -> None:
    async with world(tmp_path, traces=spooled(tmp_path, **options)) as (_, _, door):
        completion, headers = await door.ask()
        async with door.http.post(door.url + "/v1/chat/completions", json={"messages": ASKED, "stream": True}) as raw:
            text = await raw.text()
        metrics = await door.metrics()
    assert completion.choices[0].message.content == "the answer"
    assert "x-cowest-trace" not in headers
    assert text.endswith("data: [DONE]\n\n") and "durable" not in text
    assert 'cowest_trace_rows{state="unacknowledged"} 2' in metrics
    assert read_traces(str(tmp_path)).num_rows == 2  # by way of memory, as the store is well


async def test_where_no_answer_may_go_without_its_record_a_full_disk_refuses_before_any_model(tmp_path: Path) -> None:
    sink = spooled(tmp_path, fails=True)
    async with world(tmp_path, traces=sink, when_spool_full="Refuse") as (weak, strong, door):
        await door.ask()  # is how the trouble is found out
        status, answer, headers = await door.post("/v1/chat/completions", {"messages": ASKED})
        of_feedback, _, _ = await door.post("/v1/feedback", {"request_id": "r", "score": 1})
        assert "cowest_trace_spool_trouble 1" in await door.metrics()
    assert (status, answer["error"]["code"], of_feedback) == (503, "spool_full", 503)
    assert int(headers["retry-after"]) > 0
    assert len(weak.calls) == len(strong.calls) == 1


async def test_a_gateway_that_is_killed_loses_no_durable_record(tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be: the store is away")
    flags = ("--spool", str(tmp_path / "spool"))
    async with started(tmp_path, *flags) as (url, process), aiohttp.ClientSession() as http:
        said, request_id = "", ""
        async with asyncio.timeout(IN_TIME):
            while said != "durable":  # a slow disk leaves an answer without the word
                async with http.post(url + "/v1/chat/completions", json={"messages": ASKED}) as response:
                    said, request_id = response.headers.get("x-cowest-trace", ""), response.headers["x-request-id"]
        process.kill()
    blocked.unlink()
    async with started(tmp_path, *flags), asyncio.timeout(IN_TIME):
        while read_traces(str(blocked))["trace_id"].to_pylist().count(request_id) != 1:
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- metrics
async def test_metrics_count_answers_by_arm_mode_and_status(tmp_path: Path) -> None:
    async with world(tmp_path, weak={"faults": [None, 401]}) as (_, _, door):
        await door.ask()
        await door.ask()
        text = await door.metrics()
    assert 'cowest_answers_total{arm="stable",mode="Pair",status="ok"} 1\n' in text
    assert 'cowest_answers_total{arm="stable",mode="StrongAlone",status="weak_failed"} 1\n' in text
    assert 'cowest_answer_seconds_count{arm="stable",mode="Pair"} 1\n' in text
    assert 'cowest_arm_weight_percent{arm="stable"} 100\n' in text
    assert "cowest_requests_in_flight 0\n" in text
    assert re.search(r"^cowest_tasks [1-9]", text, re.M)


# ---------------------------------------------------------------- the process
async def test_metrics_of_calls_have_the_names_of_the_semantic_conventions(tmp_path: Path) -> None:
    async with world(tmp_path, strong={"faults": [None, 503]}) as (_, _, door):
        await door.ask()
        await door.post("/v1/chat/completions", {"messages": ASKED})
        text = await door.metrics()
    weak = (
        'gen_ai_operation_name="chat",gen_ai_provider_name="cowest",gen_ai_request_model="weak",'
        f'gen_ai_response_model="{DIGEST}"'
    )
    strong = 'gen_ai_operation_name="chat",gen_ai_provider_name="openai",gen_ai_request_model="big"'
    answered, here = f'{strong},gen_ai_response_model="big-2026"', 'server_address="127.0.0.1"'
    duration, tokens = "gen_ai_client_operation_duration_seconds", "gen_ai_client_token_usage"
    assert f"{duration}_count{{{weak},{here}}} 2\n" in text
    assert f"{duration}_count{{{answered},{here}}} 1\n" in text
    assert f'{duration}_count{{error_type="ServerFault",{strong},{here}}} 1\n' in text
    assert f'{tokens}_sum{{{answered},gen_ai_token_type="output",{here}}} 2\n' in text
    assert f'{tokens}_bucket{{{answered},gen_ai_token_type="output",{here},le="4"}} 1\n' in text


def spec_of(strong: ScriptedModel) -> dict[str, Any]:
    settings = settings_of(strong)
    return {
        "strong": dump(settings.strong),
        "collaboration": dump(settings.collaboration),
        "traces": {"contentSamplePercent": 100},
    }


def command(tmp_path: Path, port: int, *more: str) -> list[str]:
    files = ["--routing", tmp_path / "routing.json", "--job", tmp_path / "job.yaml", "--store", tmp_path / "store"]
    return [sys.executable, "-m", "cowest_serving.app", *map(str, files), "--port", str(port), *more]


async def ready(url: str, process: subprocess.Popen[Any]) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(120):
        while True:
            assert process.poll() is None, "the gateway has ended"
            try:
                async with http.get(url + "/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)


async def test_the_process_finishes_its_answers_and_writes_its_records_when_told_to_stop(tmp_path: Path) -> None:
    async with ScriptedModel("a hint") as weak, ScriptedModel("the answer", keys=["s3cret"]) as strong:
        (tmp_path / "job.yaml").write_text(json.dumps({"kind": "CollaborationJob", "spec": spec_of(strong)}))
        (tmp_path / "routing.json").write_text(json.dumps(dump(Routing(1, "s", (arm_of(weak, strong),)))))
        port = free_port()
        environment = os.environ | {"COWEST_STRONG_API_KEYS": "s3cret\n"}
        process = subprocess.Popen(command(tmp_path, port, "--log-level", "debug"), env=environment, stderr=-1)
        try:
            await ready(f"http://127.0.0.1:{port}", process)
            strong.gate.clear()
            async with aiohttp.ClientSession() as http:
                body = {"messages": [{"role": "user", "content": "the secret plan"}]}
                asking = asyncio.create_task(http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body))
                await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
                process.send_signal(signal.SIGTERM)
                strong.gate.set()
                async with await asking as response:
                    assert response.status == 200
            assert await asyncio.to_thread(process.wait, 120) == 0
        finally:
            process.kill()
            log = (await asyncio.to_thread(process.communicate))[1].decode()
    assert read_traces(str(tmp_path / "store"))["status"].to_pylist() == ["ok"]
    assert "the secret plan" not in log and "the answer" not in log and "s3cret" not in log


async def test_told_to_stop_it_is_unready_at_once_and_answers_new_requests_until_the_drain_ends(tmp_path: Path) -> None:
    async with started(tmp_path, "--drain-seconds", "20") as (url, process):
        async with aiohttp.ClientSession() as http:
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            async with asyncio.timeout(15):
                while True:
                    async with http.get(url + "/readyz") as response:
                        if response.status == 503:
                            assert "told to stop" in await response.text()
                            break
            async with asyncio.timeout(15):
                while True:  # `Connection: close` sends clients elsewhere; each answer until then is good
                    async with http.post(url + "/v1/chat/completions", json={"messages": ASKED}) as response:
                        assert response.status == 200
                        if response.headers.get("connection") == "close":
                            break
            assert time.monotonic() - told < 20
        assert await asyncio.to_thread(process.wait, 120) == 0
        assert time.monotonic() - told >= 20


async def test_told_to_stop_before_it_serves_it_does_not_stay(tmp_path: Path) -> None:
    async with ScriptedModel() as weak, ScriptedModel() as strong:
        (tmp_path / "job.yaml").write_text(json.dumps(spec_of(strong)))
        (tmp_path / "routing.json").write_text(json.dumps(dump(Routing(1, "s", (arm_of(weak, strong),)))))
        words = command(tmp_path, free_port(), "--drain-seconds", "0", "--log-level", "warning")
        assert await asyncio.to_thread(told_at_the_start, words) == 0


async def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    async with started(tmp_path, "--drain-seconds", "600") as (url, process):
        process.send_signal(signal.SIGTERM)
        async with aiohttp.ClientSession() as http, asyncio.timeout(IN_TIME):
            while True:
                async with http.get(url + "/readyz") as response:
                    if response.status == 503:
                        break
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 120) == 0


@needs_minio
@pytest.mark.parametrize("keeps", ["in memory", "on the disk"])
async def test_a_store_that_is_away_at_the_start_gets_all_records_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: str
) -> None:
    address = f"127.0.0.1:{free_port()}"
    for name, value in s3_environment(address).items():
        monkeypatch.setenv(name, value)
    store = "s3://models/shop/desk"
    spool = ("--spool", str(tmp_path / "spool")) if keeps == "on the disk" else ()
    async with (
        started(tmp_path, "--host", "0.0.0.0", *spool, store=store) as (url, process),
        aiohttp.ClientSession() as http,
    ):

        async def metrics() -> str:
            async with http.get(url + "/metrics") as response:
                return await response.text()

        async with http.post(url + "/v1/chat/completions", json={"messages": ASKED}) as response:
            assert response.status == 200
            feedback = {"request_id": response.headers["x-request-id"], "score": 1}
        async with http.post(url + "/v1/feedback", json=feedback) as response:
            assert response.status == 200
        async with asyncio.timeout(120):  # the store was tried in vain
            while 'cowest_trace_rows{state="failed_writes"} 0\n' in await metrics():
                await asyncio.sleep(0.05)
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, minio_server(address, tmp_path / "data"))
            async with asyncio.timeout(120):
                while 'cowest_trace_rows{state="written"} 2\n' not in await metrics():
                    await asyncio.sleep(0.05)
            assert read_traces(store)["status"].to_pylist() == ["ok"]
            assert read_feedback(store)["trace_id"].to_pylist() == [feedback["request_id"]]
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 120) == 0


@asynccontextmanager
async def started(
    tmp_path: Path, *flags: str, store: str | None = None, **sections: Any
) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """A gateway process that is ready, and the models that it asks; `sections`: of the spec, beside those it needs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with ScriptedModel("a hint") as weak, ScriptedModel("the answer") as strong:
        spec = spec_of(strong) | sections
        (tmp_path / "job.yaml").write_text(json.dumps({"kind": "CollaborationJob", "spec": spec}))
        (tmp_path / "routing.json").write_text(json.dumps(dump(Routing(1, "s", (arm_of(weak, strong),)))))
        more = ["--store", store] if store else []
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command(tmp_path, port, *flags, *more), stderr=log)
        try:
            await ready(url, process)
            yield url, process
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)


async def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    async with ScriptedModel() as strong:
        (tmp_path / "job.yaml").write_text(json.dumps(spec_of(strong)))
        port = free_port()
        script = (
            "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL);"
            "print(p.pid, flush=True); sys.stdin.read()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", script, *command(tmp_path, port, "--die-with-parent")], stdin=-1, stdout=-1
        )
        assert parent.stdout is not None
        child = int(await asyncio.to_thread(parent.stdout.readline))
        try:
            async with aiohttp.ClientSession() as http, asyncio.timeout(120):
                while not await listens(http, port):
                    await asyncio.sleep(0.05)
                parent.kill()
                while await listens(http, port):
                    await asyncio.sleep(0.05)
        finally:
            parent.kill()
            parent.communicate()
            if is_running(child):
                os.kill(child, signal.SIGKILL)


async def listens(http: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with http.get(f"http://127.0.0.1:{port}/healthz") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


def is_running(pid: int) -> bool:
    try:
        return "cowest_serving.app" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("wrong", ["port", "job", "spec", "spool"])
def test_a_bad_start_ends_with_one_message(tmp_path: Path, wrong: str) -> None:
    spec = spec_of(ScriptedModel())
    if wrong == "spec":
        del spec["strong"]["model"]
    if wrong != "job":
        (tmp_path / "job.yaml").write_text(json.dumps(spec))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if wrong == "port" else free_port()
        more = ["--spool", str(tmp_path / "job.yaml")] if wrong == "spool" else []
        ended = subprocess.run(command(tmp_path, port, *more), capture_output=True, text=True, timeout=120, check=False)
    words = {"port": "give another with --port", "job": "wanted a CollaborationJob", "spec": "spec.strong.model",
             "spool": "wanted a folder to write in"}  # fmt: skip
    assert ended.returncode == 2
    assert words[wrong] in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- on Ray Serve
@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed here")
async def test_without_ray_its_gateway_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(spec_of(ScriptedModel())))
    on_ray = [part.replace("cowest_serving.app", "cowest_serving.ray_app") for part in command(tmp_path, free_port())]
    ended = await asyncio.to_thread(subprocess.run, on_ray, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "install the extra cowest[ray]" in ended.stderr and len(ended.stderr.strip().splitlines()) == 1


async def test_the_id_that_rays_proxy_appends_to_the_request_id_is_taken_out() -> None:
    seen: list[Any] = []
    ours, others = (b"x-request-id", b"ours"), [(b"content-type", b"text/plain"), (b"x-cowest-mode", b"Pair")]

    async def proxy(_: Any, __: Any, send: Any) -> None:
        headers = [others[0], ours, others[1], (b"x-request-id", b"its own")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    async def keep(event: Any) -> None:
        seen.append(event)

    await OneRequestId(proxy)({"type": "http"}, None, keep)
    start, body = seen
    assert (start["status"], start["headers"], body["body"]) == (200, [others[0], ours, others[1]], b"x")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"store": ""}, "args.store: wanted a value, saw none", id="a flag that is missing"),
        pytest.param({"replica": 2}, "wanted some of .*replicas.*, saw replica", id="a flag that nobody knows"),
        pytest.param(
            {"replicas": "2"}, "args.replicas: wanted a whole number of at least 1, saw '2'", id="a number as text"
        ),
    ],
)
def test_arguments_of_a_ray_service_are_checked_by_name(changes: Mapping[str, Any], says: str) -> None:
    given = {"routing": "/r.json", "job": "/j.json", "store": "s3://b/desk"}
    assert ray_settings(given | {"replicas": 3}).replicas == 3
    with pytest.raises(SettingsError, match=says):
        ray_settings(given | changes)
