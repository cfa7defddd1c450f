"""A step as its container runs it: a process of its own, a read-only folder, an exit code, last words."""

from __future__ import annotations

import argparse
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import dump
from cowest_training import pod
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK, EXIT_RETRY, StepError
from cowest_training.steps import read_manifest
from tests.fakes import ScriptedModel
from tests.loop import asking_world
from tests.loop.test_check import Desk


class Container:
    """A step's folder as it is mounted, and what is left when the step is over."""

    def __init__(self, folder: Path) -> None:
        self.desk = Desk(folder)
        self.folder, self.work, self.log = folder / "step", folder / "work", folder / "termination-log"
        self.folder.mkdir()
        self.log.touch()
        (self.folder / "job.json").write_bytes((folder / "job.json").read_bytes())
        self.out = str(folder / "out")

    def step(self, module: str, out: str | None = "", args: Any = (), files: Any = None) -> None:
        content = {"module": module, "out": self.out if out == "" else out, "args": args, "files": files or {}}
        (self.folder / "step.json").write_text(json.dumps(content))

    @property
    def command(self) -> list[str]:
        flags = {"--step": self.folder, "--work": self.work, "--termination-log": self.log}
        return [
            sys.executable,
            "-P",
            "-m",
            "cowest_training.pod",
            *(str(part) for flag in flags.items() for part in flag),
        ]

    def run(self, *more: str) -> int:
        return subprocess.run([*self.command, *more], check=False, timeout=120).returncode

    @property
    def last_words(self) -> str:
        return self.log.read_text()


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


def test_a_step_writes_its_output_and_says_nothing_at_the_end(container: Container) -> None:
    container.step("cowest_training.check")
    container.folder.chmod(0o555)
    assert container.run() == EXIT_OK
    manifest = read_manifest(container.out)
    assert manifest is not None and manifest.metrics["rows"] == 3
    assert container.last_words == ""
    assert json.loads((container.work / "progress.json").read_text())["step"] == "check"


def test_bad_input_is_said_in_the_termination_log(container: Container) -> None:
    (container.desk.folder / "train.jsonl").write_text("no row")
    container.step("cowest_training.check")
    assert container.run() == EXIT_BAD_INPUT
    assert "train.jsonl:1: wanted a JSON object" in container.last_words


def test_a_step_uses_as_many_threads_as_its_pod_has_cores(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would start one for each core of the node."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "0")  # is put back
    monkeypatch.delenv("OMP_NUM_THREADS")
    (container.folder / "cpu.max").write_text("50000 100000")
    container.step("cowest_training.of_tomorrow")
    with pytest.raises(StepError, match="this image has no"):
        pod.run_step(argparse.Namespace(step=container.folder), container.folder)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def json_lines(container: Container) -> list[dict[str, Any]]:
    """All that a step says where a collector reads it."""
    told = {"COWEST_LOG_FORMAT": "json", "COWEST_JOB": "law/claims", "COWEST_STEP": "claims-r1-check"}
    done = subprocess.run(
        container.command, check=False, timeout=120, stderr=subprocess.PIPE, env={**os.environ, **told}
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_for_a_collector_every_line_of_a_step_says_job_round_and_reason(container: Container) -> None:
    container.step("cowest_training.check")
    lines = json_lines(container)
    assert {(line["job"], line["round"], line["step"]) for line in lines} == {("law/claims", 1, "r1-check")}
    assert [line["reason"] for line in lines][-2:] == ["StepProgress", "StepDone"]
    (container.desk.folder / "train.jsonl").write_text("no row")
    last = json_lines(container)[-1]
    assert last["reason"] == "StepFailed" and last["level"] == "error"
    assert last["message"] == container.last_words
    (container.desk.folder / "train.jsonl").unlink()
    (container.folder / "job.json").write_text("{}")
    assert json_lines(container)[-1]["reason"] == "StepFailed"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (
            ["cowest_serving.fetch", "--model", "MISSING", "--digest", f"sha256:{64 * 'a'}", "--out", "OUT"],
            "ModelRefused",
        ),
        (["cowest_serving.weak_server", "--model", "MISSING", "--port", "0"], "ModelRefused"),
        (["cowest_serving.routing_sync", "--namespace", "n", "--configmap", "c", "--out", "OUT"], "CannotStart"),
        (["cowest_training.observer", "--store", "s3://b/j", "--job", "MISSING"], "CannotStart"),
    ],
    ids=lambda each: each[0].rpartition(".")[2] if isinstance(each, list) else each,
)
def test_for_a_collector_the_last_words_of_a_server_are_a_line_like_the_others(
    tmp_path: Path, command: list[str], reason: str
) -> None:
    places = {"MISSING": str(tmp_path / "missing"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *(places.get(word, word) for word in command)],
        check=False, timeout=120, stderr=subprocess.PIPE,
        env={**os.environ, "COWEST_LOG_FORMAT": "json", "COWEST_JOB": "law/claims", "KUBERNETES_SERVICE_HOST": ""},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == EXIT_BAD_INPUT
    assert {line["job"] for line in lines} == {"law/claims"}
    assert (lines[-1]["level"], lines[-1]["reason"]) == ("error", reason)


def test_a_step_that_needs_no_output_gets_none(container: Container) -> None:
    store = container.desk.folder / "store" / "desk"
    (store / "runs").mkdir(parents=True)
    (store / "runs" / "x").touch()
    container.step("cowest_training.erase", out=None, args=[["--store", store.as_uri()], ["--what", "all"]])
    assert container.run() == EXIT_OK
    assert not (store / "runs").exists()


@pytest.mark.parametrize(
    "module",
    ["os", "cowest_serving.store", "cowest_training.pod", "cowest_training", "cowest_training.cards", None, ""],
)
def test_only_steps_are_run(module: Any) -> None:
    with pytest.raises(StepError, match=r"step\.json: wanted a"):
        pod.load(module)


def test_another_version_of_the_image_is_said(container: Container) -> None:
    container.step("cowest_training.check", args=[["--not-known", "1"]])
    assert container.run() == EXIT_BAD_INPUT
    assert "does not know these arguments" in container.last_words and "--not-known=1" in container.last_words
    container.step("cowest_training.of_tomorrow")
    assert container.run() == EXIT_BAD_INPUT
    assert "this image has no cowest_training.of_tomorrow" in container.last_words


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="nothing"),
        pytest.param("[]", id="no object"),
        pytest.param('{"out": "x"}', id="no module"),
        pytest.param('{"module": "m", "args": [["--a"]]}', id="no value"),
        pytest.param('{"module": "m", "files": {"--../pair": {}}}', id="a path as a flag"),
        pytest.param('{"module": "m", "args": [["pair", "x"]]}', id="no flag"),
    ],
)
def test_a_step_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "step.json").write_text(content)
    with pytest.raises(StepError, match=r"step\.json: wanted"):
        pod.read_step(tmp_path / "step.json")


def test_files_and_the_folder_of_the_book_are_made(tmp_path: Path) -> None:
    step = pod.Step(
        "m", "s3://b/out", (("--calls", str(tmp_path / "a/b/calls")), ("--since", "-1")), {"--pair": {"a": 1}}
    )
    argv = pod.command_line(step, Path("/step/job.json"), tmp_path / "work")
    pair = tmp_path / "work" / "pair.json"
    assert argv == [
        "--job=/step/job.json",
        "--out=s3://b/out",
        f"--calls={tmp_path}/a/b/calls",
        "--since=-1",
        f"--pair={pair}",
        f"--progress={tmp_path}/work/progress.json",
    ]
    assert json.loads(pair.read_text()) == {"a": 1}
    assert (tmp_path / "a/b").is_dir()


def test_last_words_are_cut_at_a_whole_character(tmp_path: Path) -> None:
    pod.write_last_words(tmp_path / "log", "x" + "é" * 2000)
    assert (tmp_path / "log").read_text() == "x" + "é" * 999
    pod.write_last_words(tmp_path / "none" / "log", "no such folder: nothing happens")


def test_a_node_that_goes_away_asks_for_another_run(container: Container) -> None:
    with ScriptedModel("42", faults=["hang"] * 100).in_thread() as strong:
        pair = asking_world.make_pair(container.desk.folder / "tiny", strong)
        asking_world.write_job(container.folder / "job.json", strong.url)
        data = asking_world.write_rows(container.desk.folder / "rows.jsonl", asking_world.rows())
        container.step(
            "cowest_training.feedback",
            args=[["--dataset", data], ["--calls", str(container.work / "calls/book")], ["--round", "1"]],
            files={"--pair": dump(pair)},
        )
        with subprocess.Popen([*container.command, "--shard", "0/1"]) as process:
            try:
                end = time.monotonic() + 100
                while not strong.calls:
                    assert process.poll() is None and time.monotonic() < end
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == EXIT_RETRY
            finally:
                process.kill()
    assert container.last_words.startswith("interrupted: nothing half-written is left")
    assert read_manifest(f"{container.out}/shard-0-of-1") is None


# ---------------------------------------------------------------- certificates
def test_certificates_of_ones_own_stand_beside_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, "/nowhere")
    pod.trust(make_certificate(tmp_path, "own"), tmp_path / "work")
    assert os.environ["SSL_CERT_FILE"] == os.environ["REQUESTS_CA_BUNDLE"] == str(tmp_path / "work" / "ca.pem")
    only = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    only.load_default_certs()
    known = {dict(pair[0] for pair in each["subject"]).get("commonName") for each in only.get_ca_certs()}
    assert "own" in known and len(known) > 1


def make_certificate(folder: Path, name: str) -> Path:
    path = folder / f"{name}.pem"
    made = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout key -out"
    subprocess.run([*made.split(), str(path)], check=True, capture_output=True, cwd=folder)
    return path


def test_what_are_no_certificates_is_said_before_anything_is_paid(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container.desk.folder / "ca.crt").write_text("none")
    monkeypatch.setenv("COWEST_MORE_CA", str(container.desk.folder / "ca.crt"))
    container.step("cowest_training.check")
    assert container.run() == EXIT_BAD_INPUT
    assert "strong.caBundleRef" in container.last_words and read_manifest(container.out) is None
