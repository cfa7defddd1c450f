"""docs/openapi.yaml against the gateway's process: whatever is sent, what comes is as described, and never a 5xx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import openai
import pytest
import yaml

from cowest_serving.description import FILE
from tests.contracts.openai_world import KEYS, OpenAIWorld, openai_world

ROOT = Path(__file__).parents[2]
DESCRIPTION = ROOT / "docs" / "openapi.yaml"
EXAMPLES = os.environ.get("COWEST_FUZZ_EXAMPLES", "40")  # of each address


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIWorld]:
    with openai_world(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing_that_the_description_does_not_say(world: OpenAIWorld, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("schemathesis")
    ended = subprocess.run(
        [
            *(str(script), "run", str(DESCRIPTION), "--url", world.url, "--header", f"Authorization: Bearer {KEYS[0]}"),
            *("--seed", "1", "--max-examples", EXAMPLES, "--no-color", "--request-timeout", "30"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert "8 selected / 8 total" in ended.stdout
    assert "A fault of the gateway" not in ended.stdout and "Traceback" not in world.log.read_text()


NESTED = "[" * 600 + "]" * 600
MESSAGES = '"messages": [{"role": "user", "content": "why?"}]'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(f'{{{MESSAGES}, "x": {NESTED}}}', 400, id="deep lists in a parameter"),
        pytest.param(f'{{"messages": [{{"role": "user", "content": "a", "x": {NESTED}}}]}}', 400, id="in a message"),
        pytest.param(f'{{{MESSAGES}, "x": {"[" * 100000}}}', 400, id="deeper than any parser goes"),
        pytest.param(f'{{{MESSAGES}, "x": {"[" * 240 + "]" * 240}}}', 200, id="deep, but not too deep"),
        pytest.param(f'{{{MESSAGES}, "x": [{"[], " * 1000}[]]}}', 200, id="many lists side by side"),
        pytest.param(f'{{{MESSAGES}, "seed": {"9" * 400}}}', 400, id="a number beyond all bounds"),
        pytest.param(f'{{{MESSAGES}, "seed": {"9" * 40}}}', 200, id="a number of 40 digits"),
        pytest.param(f'{{{MESSAGES}, "temperature": NaN}}', 400, id="NaN"),
        pytest.param('{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, id="half a surrogate pair"),
        pytest.param(f"{{{MESSAGES}, {MESSAGES}}}", 200, id="a key twice"),
        pytest.param(f"\ufeff{{{MESSAGES}}}", 400, id="a byte order mark"),
        pytest.param('{"messages": [' + '{"role": "user", "content": "a"}, ' * 50_000 + "{}]}", 400, id="long"),
        pytest.param(f'{{{MESSAGES}, "model": "a\\r\\nx-evil: 1"}}', 200, id="line ends in the model's name"),
        pytest.param(f'{{{MESSAGES}, "n": "many"}}', 400, id="what the strong model finds wrong"),
    ],
)
def test_no_body_is_a_fault_of_the_gateway(world: OpenAIWorld, body: str, status: int) -> None:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        answer = client._client.post(
            f"{world.url}/v1/chat/completions", content=body.encode(), headers={"authorization": f"Bearer {KEYS[0]}"}
        )
    assert answer.status_code == status
    assert "x-evil" not in answer.headers


def test_the_gateway_gives_its_description_to_everybody(world: OpenAIWorld) -> None:
    with urllib.request.urlopen(f"{world.url}/openapi.json", timeout=10) as answer:
        given, headers = json.load(answer), answer.headers
    assert given == yaml.safe_load(DESCRIPTION.read_text())
    assert (headers["content-type"], headers["cache-control"]) == ("application/json", "public, max-age=300")
    assert urljoin(f"{world.url}/openapi.json", given["servers"][0]["url"]) == f"{world.url}/"


def test_the_description_is_installed_beside_the_gateway() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert packed["force-include"]["docs/openapi.yaml"] == f"cowest_serving/{FILE}"
    copied = (ROOT / "serving" / "Dockerfile").read_text()
    assert "COPY docs/openapi.yaml /opt/cowest/cowest_serving/\n" in copied


def test_the_description_names_every_address_of_the_gateway(world: OpenAIWorld) -> None:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        told = client._client.get(f"{world.url}/nowhere").json()["error"]["message"]
    described: Any = yaml.safe_load(DESCRIPTION.read_text())["paths"]
    for path in ("/v1/chat/completions", "/v1/feedback", "/v1/models"):
        assert path in told and path in described
