"""Applications at the gateway's door: their names, their limits, and what they are told."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from cowest_cli import jobs
from cowest_serving.app import GatewayLimits, Keys
from cowest_serving.client_limits import ClientLimits
from cowest_training.contract import StepError
from tests import world as manifests
from tests.fakes import ScriptedModel
from tests.loop.test_gateway import ASKED, Gateway, arm_of, gateway, settings_of
from tests.patience import IN_TIME

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def door_with(
    tmp_path: Path, keys: Keys | None = None, model: ScriptedModel | None = None, places: int = 16, **limits: int
) -> AsyncIterator[tuple[ScriptedModel, Gateway]]:
    """A strong model that takes so many calls at once, and a gateway whose clients have these keys and limits each."""
    async with ScriptedModel("one two") as weak, model or ScriptedModel("three four") as strong:
        settings = settings_of(strong, max_concurrency=places)
        if limits:
            settings = replace(settings, gateway=GatewayLimits(ClientLimits(**limits)))
        async with gateway(tmp_path, settings, arm_of(weak, strong), client_keys=keys) as door:
            yield strong, door


async def shows(door: Gateway, metric: str) -> None:
    async with asyncio.timeout(IN_TIME):
        while not re.search(f"^{metric}$", await door.metrics(), re.MULTILINE):
            pass


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def secret(tmp_path: Path) -> Path:
    """As Kubernetes mounts it: a file each application, a key a line."""
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "desk").write_text("desk-old\ndesk-new\n")
    (folder / "night").write_text("night-1")
    return folder


async def test_each_applications_requests_are_counted_and_recorded_by_its_name_and_never_by_its_key(
    tmp_path: Path,
) -> None:
    async with door_with(tmp_path, Keys(["k", "given"], secret(tmp_path), ["desk"])) as (_, door):
        for key in ("desk-old", "desk-new", "night-1", "given", "wrong"):
            await door.post(CHAT, {"messages": ASKED}, **bearer(key))
        await door.ask()
        names = [row["application"] for row in await door.rows()]
        metrics = await door.metrics()
    assert names == ["desk", "desk", "night", "", "desk"]
    assert 'cowest_client_requests_total{application="desk"} 3' in metrics
    assert not [key for key in ("desk-old", "night-1", "given") if key in metrics]


async def test_a_key_above_its_limit_is_told_in_openais_form_and_others_are_not_disturbed(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 2, "tokens_per_minute": 10_000}
    async with door_with(tmp_path, Keys([], secret(tmp_path)), **limits) as (strong, door):
        found = [await door.post(CHAT, {"messages": ASKED}, **bearer("night-1")) for _ in range(3)]
        other, _, _ = await door.post(CHAT, {"messages": ASKED}, **bearer("desk-old"))
        sdk = door.client.with_options(api_key="night-1")
        with pytest.raises(openai.RateLimitError, match="limit of 2 requests per minute"):
            await sdk.chat.completions.create(model="m", messages=ASKED)
        metrics = await door.metrics()
    assert [status for status, _, _ in found] == [200, 200, 429] and other == 200
    headers, error = found[2][2], found[2][1]["error"]
    assert (error["type"], error["code"], headers["retry-after"]) == ("requests", "rate_limit_exceeded", "30")
    assert found[0][2]["x-ratelimit-remaining-requests"] == "1" and "x-ratelimit-reset-tokens" in found[0][2]
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert len(strong.calls) == 3, "who is refused costs nothing"
    assert 'cowest_client_requests_limited_total{application="night",limit="requests"} 2' in metrics


async def test_feedback_of_a_key_above_its_limit_is_not_kept(tmp_path: Path) -> None:
    word = {"request_id": "r1", "comment": "x" * 3000}
    async with door_with(tmp_path, Keys([], secret(tmp_path)), tokens_per_minute=1500) as (_, door):
        found = [await door.post("/v1/feedback", word, **bearer("night-1")) for _ in range(3)]
        other, _, _ = await door.post("/v1/feedback", word, **bearer("desk-old"))
        metrics = await door.metrics()
    assert [status for status, _, _ in found] == [200, 429, 429] and other == 200
    assert found[1][1]["error"]["type"] == "tokens" and int(found[1][2]["retry-after"]) > 10
    assert 'cowest_client_requests_limited_total{application="night",limit="tokens"} 2' in metrics
    assert 'cowest_feedback_total{result="taken"} 2' in metrics


async def test_tokens_of_both_models_count_streams_included(tmp_path: Path) -> None:
    async with door_with(tmp_path, tokens_per_minute=60) as (_, door):
        async for _ in await door.client.chat.completions.create(model="m", messages=ASKED, stream=True):
            pass
        (row,) = await door.rows()
        _, headers = await door.ask()
    took = sum(row[f"{model}_{side}_tokens"] for model in ("weak", "strong") for side in ("input", "output"))
    likely = 6  # of the second one, by its bytes
    assert took > 8 and int(headers["x-ratelimit-remaining-tokens"]) - (60 - took - likely) in (0, 1)


async def test_so_many_of_a_keys_chats_are_under_way_at_once_and_one_that_ends_makes_room(tmp_path: Path) -> None:
    async with door_with(tmp_path, max_concurrency=1) as (strong, door):
        strong.gate.clear()
        first = asyncio.create_task(door.post(CHAT, {"messages": ASKED}))
        await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
        status, body, headers = await door.post(CHAT, {"messages": ASKED})
        assert (status, body["error"]["type"], headers["retry-after"]) == (429, "concurrency", "1")
        first.cancel()
        await shows(door, "cowest_requests_in_flight 0")
        strong.gate.set()
        assert (await door.post(CHAT, {"messages": ASKED}))[0] == 200, "a client that left makes room too"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_its_turn_gets_back_the_tokens_that_were_not_used(
    tmp_path: Path, streamed: bool
) -> None:
    long = [{"role": "user", "content": "why? " * 300}]  # reserves more than all that is used here
    async with door_with(tmp_path, places=1, tokens_per_minute=2_000) as (strong, door):
        strong.gate.clear()
        first = asyncio.create_task(door.post(CHAT, {"messages": ASKED}))
        await asyncio.wait_for(strong.arrived.wait(), IN_TIME)
        waiting = asyncio.create_task(door.post(CHAT, {"messages": long, "stream": streamed}))
        await shows(door, r"cowest_endpoint_waiting{.*} 1")
        waiting.cancel()
        await shows(door, "cowest_requests_in_flight 1")
        strong.gate.set()
        await first
        _, headers = await door.ask()
        gone = next(row for row in await door.rows() if row["status"] == "client_gone")
    assert len(strong.calls) == 2, "the one that left was never sent"
    drafted = gone["weak_input_tokens"] + gone["weak_output_tokens"]
    others = 30  # at most, of the two that were answered
    assert int(headers["x-ratelimit-remaining-tokens"]) > 2_000 - drafted - others


async def test_what_came_of_a_stream_counts_though_its_client_left_before_the_usage(tmp_path: Path) -> None:
    stalls = ScriptedModel("w" * 3_000 + " end", faults=["stall"])  # after the first word
    async with door_with(tmp_path, model=stalls, tokens_per_minute=2_000) as (_, door):
        async with door.http.post(door.url + CHAT, json={"messages": ASKED, "stream": True}) as response:
            while b"www" not in await response.content.readany():
                pass
            response.close()
        await shows(door, "cowest_requests_in_flight 0")
        _, headers = await door.ask()
    assert 900 < int(headers["x-ratelimit-remaining-tokens"]) < 1_500, "a token for three letters, and so many a minute"


async def test_without_limits_no_answer_speaks_of_any(tmp_path: Path) -> None:
    async with door_with(tmp_path) as (_, door):
        _, headers = await door.ask()
        assert "cowest_client_requests" not in await door.metrics()
    assert not [name for name in headers if name.startswith("x-ratelimit")]


def test_on_one_machine_the_files_of_the_secrets_folder_name_the_applications(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = manifests.job(gateway={"client_keys_secret_ref": jobs.api.NameRef("keys")})
    with pytest.raises(StepError, match="saw none"):
        jobs.client_names(job, tmp_path)
    secret(tmp_path)
    monkeypatch.setenv("COWEST_SECRET_KEYS", "of-nobody")
    assert jobs.client_keys(job, tmp_path) == "of-nobody\ndesk-old\ndesk-new\nnight-1"
    assert jobs.client_names(job, tmp_path) == "\ndesk\ndesk\nnight"
