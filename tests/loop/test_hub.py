"""Weak models of a hub (`hf://`), fetched by the Hub's own client from a stand-in that speaks its HTTP interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from cowest_serving.model_files import model_digest
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK, EXIT_RETRY
from tests.loop import tuning_world as world
from tests.loop.hub import COMMIT
from tests.loop.tiny_models import make_model

SERVER = Path(__file__).with_name("hub.py")


@dataclass(frozen=True)
class Hub:
    root: Path
    process: subprocess.Popen[str]
    url: str
    log: Path

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()[1:]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root, log = tmp_path / "hub", tmp_path / "hub.log"
    make_model(root / "acme" / "tiny", world.TEXTS)
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, SERVER, root], stdout=out, text=True)
    try:
        while not (said := log.read_text()).endswith("\n"):
            assert process.poll() is None, said
        yield Hub(root, process, f"http://127.0.0.1:{said.split()[0]}", log)
    finally:
        process.kill()
        process.wait()


def publish(hub: Hub, tmp_path: Path, model: str, out: str = "out") -> subprocess.CompletedProcess[str]:
    """As a step does it: a process of its own, which learns of the hub by its environment."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-m", "cowest_training.publish", "--model", model, "--out", str(tmp_path / out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_of_the_hub_is_the_same_model_here_and_only_what_may_be_loaded_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    theirs = hub.root / "acme" / "tiny"
    digest = model_digest(theirs)
    (theirs / "pytorch_model.bin").write_bytes(b"a pickle")
    (theirs / "modeling_tiny.py").write_text("raise SystemExit")
    (theirs / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    ended = publish(hub, tmp_path, "hf://acme/tiny@main")
    assert ended.returncode == EXIT_OK, ended.stderr
    assert json.loads(ended.stdout)["digest"] == digest == model_digest(tmp_path / "out")
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    files = {line.split()[1].rpartition("/")[2] for line in hub.asked() if "/resolve/" in line}
    assert "model.safetensors" in files
    assert not files & {"pytorch_model.bin", "modeling_tiny.py"}


def test_what_was_fetched_once_is_not_fetched_again_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    assert publish(hub, tmp_path, f"hf://acme/tiny@{COMMIT}").returncode == EXIT_OK
    before = len(hub.asked())
    assert publish(hub, tmp_path, f"hf://acme/tiny@{COMMIT}", "again").returncode == EXIT_OK
    assert not [line for line in hub.asked()[before:] if line.startswith("GET") and "safetensors" in line]


def test_an_adapter_of_the_hub_goes_on_its_base_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    base, adapter = hub.root / "acme" / "tiny", hub.root / "acme" / "tuned"
    get_peft_model(
        world.load(base), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).save_pretrained(adapter)
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "acme/tiny"}))
    ended = publish(hub, tmp_path, "hf://acme/tuned@main")
    assert ended.returncode == EXIT_OK, ended.stderr
    assert not list((tmp_path / "out").glob("adapter*"))
    assert model_digest(tmp_path / "out") != model_digest(base)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param("hf://acme/none", "the Hub knows none such", id="no such repository"),
        pytest.param("hf://acme/tiny@v9", "the Hub knows none such", id="no such revision"),
        pytest.param("hf://acme/secret", "set HF_TOKEN", id="terms that nobody accepted"),
        pytest.param("hf://acme/old", "the Hub has none of it", id="pickles only"),
    ],
)
def test_what_the_hub_cannot_give_is_said_and_nothing_is_written(
    hub: Hub, tmp_path: Path, model: str, words: str
) -> None:
    for name in ("secret", "old"):
        shutil.copytree(hub.root / "acme" / "tiny", hub.root / "acme" / name)
    (hub.root / "acme" / "secret" / "gated.txt").touch()
    (hub.root / "acme" / "old" / "model.safetensors").rename(hub.root / "acme" / "old" / "pytorch_model.bin")
    ended = publish(hub, tmp_path, model)
    assert ended.returncode == EXIT_BAD_INPUT, ended.stderr
    assert f"{model}: " in ended.stderr and words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_away_is_worth_another_try(hub: Hub, tmp_path: Path) -> None:
    hub.process.kill()
    hub.process.wait()
    ended = publish(hub, tmp_path, "hf://acme/tiny")
    assert ended.returncode == EXIT_RETRY, ended.stderr
    assert "check the network (HF_ENDPOINT)" in ended.stderr
    assert not (tmp_path / "out").exists()
