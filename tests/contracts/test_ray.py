"""The gateway's own application in Ray Serve, whose proxy stands before it: the pair's answers, streams, new weights.

Runs where Ray is, or where `make bench-gateway` has made its environment with Ray.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest

from cowest_serving.contract import dump
from cowest_serving.routing import parse_routing
from tests.benchmarks.gateway import tools
from tests.contracts.openai_world import KEYS, OpenAIWorld, openai_world

BENCH = tools.CACHE / f"ray-{tools.RAY}"
PYTHON = sys.executable if find_spec("ray") else f"{BENCH}/bin/python" if (BENCH / ".made-of").exists() else None
ASKED: Any = [{"role": "user", "content": "why is the sky blue?"}]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIWorld]:
    monkeypatch.setenv("PYTHONPATH", str(tools.ROOT / "serving"))  # of Ray's own processes, too
    for check in ("READY", "HEALTH"):  # Ray gives up a proxy that takes 5 s to start, as on a busy machine
        monkeypatch.setenv(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "60")
    assert PYTHON is not None
    with openai_world(tmp_path, run=(PYTHON, "-m", "cowest_serving.ray_app")) as running:
        yield running
        running.process.terminate()  # so that Ray's processes end with it
        running.process.wait(60)


@pytest.fixture
def client(world: OpenAIWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0, timeout=30) as client:
        yield client


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def give_all_to_a_candidate(file: Path) -> None:
    routing = parse_routing(file.read_bytes())
    (stable,) = routing.arms
    arms = (replace(stable, weight_percent=0), replace(stable, name="candidate", weight_percent=100))
    new = file.with_suffix(".new")
    new.write_text(json.dumps(dump(replace(routing, version=2, arms=arms))))
    new.replace(file)


@pytest.mark.skipif(PYTHON is None, reason="needs Ray: the extra cowest[ray], or what `make bench-gateway` makes")
@pytest.mark.timeout(180)
def test_in_ray_serve_the_pair_answers_and_streams_and_goes_by_new_weights(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.with_raw_response.create(model="pair", messages=ASKED, **options)

    plain = ask()
    assert plain.parse().choices[0].message.content.startswith("echo: why is the sky blue?")
    assert (plain.headers["x-cowest-mode"], plain.headers["x-cowest-arm"]) == ("Pair", "stable")
    assert "<draft>\necho: why is the sky blue?" in world.strong.bodies()[0]["messages"][0]["content"]
    assert world.trace_of(plain.headers["x-request-id"])["mode"] == "Pair"

    stream = ask(stream=True, metadata={"say": "one two", "pause": "60", "pause_at": "2"}).parse()
    assert next(text for chunk in stream if (text := chunk.choices[0].delta.content)) == "one", "as it is made"
    stream.close()
    until(lambda: world.strong_broken_off() == 1)
    chunks = list(ask(stream=True, metadata={"say": "one two"}).parse())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"

    give_all_to_a_candidate(world.log.with_name("routing.json"))
    until(lambda: ask().headers["x-cowest-arm"] == "candidate")
