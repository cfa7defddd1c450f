"""The stand-in's shell speaks the OpenAI API, charges a call once and tells what it charged."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

SHELL = Path(__file__).parents[2] / "crds/examples/stand_in.py"
CONTENT = {"model": "m", "messages": [{"role": "user", "content": "one two three"}]}
KEY, OTHER_KEY = "a" * 64, "b" * 64


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_in", SHELL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_in"] = module
    spec.loader.exec_module(module)
    return module


stand_in = _load()


def client(**options: Any) -> TestClient:
    def answer(messages: Any) -> str:
        return "heard " + str(messages[-1]["content"])

    return TestClient(
        stand_in.build_app(answer, stand_in.Options(models=("m", "m-terse"), digest="sha256:d", **options))
    )


def ask(to: TestClient, key: str | None = None, **more: Any) -> Any:
    headers = {"idempotency-key": key} if key else {}
    return to.post("/v1/chat/completions", json={**CONTENT, **more}, headers=headers)


def stats(of: TestClient) -> dict[str, Any]:
    return dict(of.get("/stats").json())


def test_an_answer_has_usage_and_the_digest_of_the_source() -> None:
    body = ask(client()).json()
    assert body["choices"][0]["message"]["content"] == "heard one two three"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["system_fingerprint"] == "sha256:d"


def test_it_answers_to_each_of_its_names() -> None:
    endpoint = client()
    assert [card["id"] for card in endpoint.get("/v1/models").json()["data"]] == ["m", "m-terse"]
    assert ask(endpoint, model="m-terse").json()["model"] == "m-terse"


def test_max_tokens_cuts_and_says_so() -> None:
    choice = ask(client(), max_tokens=2).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("heard one", "length")


def test_a_stream_adds_up_to_the_same_answer() -> None:
    lines = ask(client(), stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == "heard one two three"
    assert chunks[-1]["usage"]["total_tokens"] == 7


def test_the_same_key_gets_the_stored_answer_and_is_charged_once() -> None:
    endpoint = client()
    first, second = ask(endpoint, KEY), ask(endpoint, KEY)
    assert first.content == second.content
    assert (first.headers.get("idempotent-replayed"), second.headers["idempotent-replayed"]) == (None, "true")
    assert {**stats(endpoint), "digest": ""} == {
        "calls": 1,
        "distinct_calls": 1,
        "repeated_idempotent": 1,
        "repeated_paid_calls": 0,
        "digest": "",
    }


def test_an_endpoint_that_ignores_keys_charges_again() -> None:
    endpoint = client(honour_idempotency=False)
    ask(endpoint, KEY)
    ask(endpoint, KEY)
    assert (stats(endpoint)["calls"], stats(endpoint)["repeated_idempotent"]) == (2, 1)


@pytest.mark.parametrize(
    ("keys", "temperature", "repeated"),
    [
        pytest.param((KEY, OTHER_KEY), 0, 1, id="the same content under two content keys was paid twice"),
        pytest.param((KEY, OTHER_KEY), 1, 0, id="samples may repeat"),
        pytest.param((KEY, "request-7"), 0, 0, id="a user asking the same is new work"),
        pytest.param((None, None), 0, 0, id="without keys nothing is known to repeat"),
    ],
)
def test_repeated_paid_calls(keys: tuple[str | None, ...], temperature: float, repeated: int) -> None:
    endpoint = client()
    for key in keys:
        ask(endpoint, key, temperature=temperature)
    assert stats(endpoint)["repeated_paid_calls"] == repeated
    assert stats(endpoint)["calls"] == 2


def test_twins_in_flight_share_one_paid_answer() -> None:
    async def both() -> list[tuple[str, bool]]:
        desk = stand_in.Desk(lambda messages: "x", stand_in.Options(("m",), "d", latency_seconds=0.01))
        replies = await asyncio.gather(desk.reply(CONTENT, KEY), desk.reply(CONTENT, KEY))
        assert desk.book.calls == 1
        return list(replies)

    (first, stored), (second, stored_too) = asyncio.run(both())
    assert first == second
    assert (stored, stored_too) == (False, True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        pytest.param("{", "no JSON", id="no JSON"),
        pytest.param('{"model": "m"}', "messages", id="no messages"),
        pytest.param(json.dumps({**CONTENT, "model": "gpt"}), "GET /v1/models", id="another model"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(body: str, told: str) -> None:
    reply = client().post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


def test_the_digest_is_of_the_sources_and_the_taste(tmp_path: Path) -> None:
    source = tmp_path / "strong.py"
    source.write_text("one")
    first = stand_in.source_digest([str(source)], "standard")
    assert first != stand_in.source_digest([str(source)], "terse")
    source.write_text("two")
    assert first != stand_in.source_digest([str(source)], "standard")
