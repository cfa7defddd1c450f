"""Outputs that exist only when finished, progress, and how a step ends, also when it is killed."""

import asyncio
import errno
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import SettingsError, dump
from cowest_serving.model_files import ModelFolderError
from cowest_serving.models import RateLimited, Unauthorized
from cowest_serving.store import StoreError
from cowest_training import steps
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RETRY,
    Manifest,
    StepError,
    StepSettings,
)
from tests.world import SPEC


def begin(uri: Path | str, **inputs: Any) -> steps.Output:
    output = steps.open_output(str(uri), step="sft", inputs=inputs)
    assert isinstance(output, steps.Output)
    return output


def finish(uri: Path | str, content: str = "x", **inputs: Any) -> Manifest:
    output = begin(uri, **inputs)
    (output.folder / "sub").mkdir()
    (output.folder / "sub" / "a.txt").write_text(content)
    return output.finish(kind="Model", metrics={"loss": 0.25, "rows": 3})


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- settings
def spec() -> dict[str, Any]:
    sections = StepSettings(SPEC.strong, SPEC.collaboration, SPEC.data, SPEC.feedback, SPEC.training)
    return dict(dump(sections))


@pytest.mark.parametrize("bare", [True, False])
def test_settings_come_from_a_job_or_a_bare_spec(tmp_path: Path, bare: bool) -> None:
    job = {"apiVersion": "cowest.dev/v1alpha1", "kind": "CollaborationJob", "spec": spec()}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(spec() if bare else job))
    assert steps.load_settings(path).training == SPEC.training


def test_a_config_map_in_the_same_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: ConfigMap\ndata: {}\n---\nkind: CollaborationJob\nspec: " + json.dumps(spec()))
    assert steps.load_settings(path).data == SPEC.data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "wanted a readable file", id="no file"),
        pytest.param("a: [", "wanted YAML or JSON", id="no YAML"),
        pytest.param("kind: ConfigMap", "wanted one CollaborationJob, saw 0", id="another kind"),
        pytest.param("spec: 3", "wanted an object under `spec`, saw int", id="no object"),
    ],
)
def test_a_job_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StepError) as raised:
        steps.load_settings(path)
    assert f"--job {path}: {reason}" in str(raised.value)


# ---------------------------------------------------------------- outputs
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_nothing_shows_before_the_output_is_finished(tmp_path: Path, scheme: str) -> None:
    target = tmp_path / "out folder"
    uri = target.as_uri() if scheme else str(target)
    output = begin(uri, data="d1")
    (output.folder / "model.txt").write_text("x")
    assert not target.exists()
    assert steps.read_manifest(uri) is None
    manifest = output.finish(kind="Model", metrics={"loss": 0.25})
    assert files(tmp_path) == {"out folder/model.txt", "out folder/manifest.json"}
    assert steps.read_manifest(uri) == manifest
    assert manifest.metrics == {"loss": 0.25}
    assert (manifest.kind, manifest.step, manifest.inputs) == ("Model", "sft", {"data": "d1"})


def test_finished_work_is_not_done_again(tmp_path: Path) -> None:
    manifest = finish(tmp_path / "out", data="d1")
    assert steps.open_output(str(tmp_path / "out"), step="sft", inputs={"data": "d1"}) == manifest


@pytest.mark.parametrize("change", ["other inputs", "another step", "a file is gone"])
def test_other_work_is_done_and_replaces_the_old(tmp_path: Path, change: str) -> None:
    finish(tmp_path / "out", data="d1")
    if change == "a file is gone":
        (tmp_path / "out" / "sub" / "a.txt").unlink()
    step = "dpo" if change == "another step" else "sft"
    inputs = {"data": "d2" if change == "other inputs" else "d1"}
    output = steps.open_output(str(tmp_path / "out"), step=step, inputs=inputs)
    assert isinstance(output, steps.Output)
    (output.folder / "b.txt").write_text("new")
    output.finish(kind="Model", metrics={})
    assert files(tmp_path) == {"out/b.txt", "out/manifest.json"}


def test_the_digest_is_of_the_content_or_as_given(tmp_path: Path) -> None:
    one, same, other = finish(tmp_path / "1"), finish(tmp_path / "2", seed=2), finish(tmp_path / "3", "y")
    assert one.digest == same.digest != other.digest
    assert one.inputs_digest != same.inputs_digest
    assert begin(tmp_path / "4").finish(kind="Model", metrics={}, digest="sha256:m").digest == "sha256:m"


def test_what_a_killed_step_left_is_cleared(tmp_path: Path) -> None:
    stale = begin(tmp_path / "out")
    (stale.folder / "half.bin").write_text("half")
    output = begin(tmp_path / "out")
    output.finish(kind="Model", metrics={})
    assert files(tmp_path) == {"out/manifest.json"}


def test_a_manifest_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(StepError, match="wanted the manifest of a step"):
        steps.read_manifest(str(tmp_path))


# ---------------------------------------------------------------- progress
def test_progress_gives_rate_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    progress = steps.Progress(tmp_path / "p" / "progress.json", "feedback", clock=lambda: now[0])

    def state() -> dict[str, Any]:
        return dict(json.loads((tmp_path / "p" / "progress.json").read_text()))

    progress.update(20, 100, "calls")  # 20 were remembered from before
    assert (state()["rate"], state()["eta_seconds"]) == (None, None)
    now[0] = 100.1
    progress.update(25, 100, "calls")
    assert state()["done"] == 20, "at most five times a second"
    now[0] = 110.0
    progress.update(60, 100, "calls", "drawing drafts")
    assert state() == {
        "step": "feedback",
        "done": 60,
        "total": 100,
        "unit": "calls",
        "rate": 4.0,
        "eta_seconds": 10.0,
        "message": "drawing drafts",
        "updated": 110.0,
    }
    now[0] = 110.01
    progress.update(100, 100, "calls")
    assert state()["done"] == 100, "the last one is always written"
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "feedback: 60 of 100 calls, 4 calls/s, 10 s left; drawing drafts"
    assert len(lines) == 3


def test_each_phase_has_a_rate_of_its_own_and_batches_do_not_make_the_time_left_jump(tmp_path: Path) -> None:
    now = [100.0]
    progress = steps.Progress(tmp_path / "progress.json", "evaluate", clock=lambda: now[0])

    def shown(done: float, total: float, unit: str, at: float) -> dict[str, Any]:
        now[0] = 100.0 + at
        progress.update(done, total, unit, "as it goes")
        return dict(json.loads((tmp_path / "progress.json").read_text()))

    assert shown(0, 256, "drafts", at=0)["eta_seconds"] is None
    assert shown(64, 256, "drafts", at=60)["eta_seconds"] == pytest.approx(180)
    assert shown(64, 256, "drafts", at=100)["eta_seconds"] == pytest.approx(140), "a batch is being drawn"
    assert shown(64, 256, "drafts", at=180)["eta_seconds"] == pytest.approx(540), (
        "this one takes longer than any before"
    )
    assert shown(10, 50, "answers", at=200)["rate"] is None, "answers say nothing of how fast drafts are drawn"
    assert shown(20, 50, "answers", at=210)["eta_seconds"] == pytest.approx(30)


def test_progress_without_a_file_or_a_total_only_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    steps.Progress(None, "collect").update(3, None, "rows")
    assert capsys.readouterr().err == "collect: 3 rows\n"


# ---------------------------------------------------------------- how a step ends
def ending(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main() -> int | None:
        if error:
            raise error
        return None

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as raised:
            steps.run(main)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert isinstance(raised.value.code, int)
    return raised.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(None, EXIT_OK, id="done"),
        pytest.param(StepError("the file is empty"), EXIT_BAD_INPUT, id="bad input"),
        pytest.param(StepError("no budget", EXIT_BUDGET), EXIT_BUDGET, id="budget"),
        pytest.param(SettingsError("spec.x: wanted a value"), EXIT_BAD_INPUT, id="settings"),
        pytest.param(ModelFolderError("pickle weights"), EXIT_BAD_INPUT, id="model folder"),
        pytest.param(Unauthorized("check the key"), EXIT_BAD_INPUT, id="401"),
        pytest.param(RateLimited("too many"), EXIT_RETRY, id="429"),
        pytest.param(StoreError("bucket away", retryable=True), EXIT_RETRY, id="store away"),
        pytest.param(StoreError("no bucket"), EXIT_BAD_INPUT, id="no store"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), EXIT_RETRY, id="disk full"),
        pytest.param(sqlite3.OperationalError("database or disk is full"), EXIT_RETRY, id="disk full under SQLite"),
        pytest.param(RuntimeError("I/O: No space left on device (os error 28)"), EXIT_RETRY, id="under safetensors"),
        pytest.param(ExceptionGroup("tasks", [StepError("inner")]), EXIT_BAD_INPUT, id="in a task group"),
        pytest.param(KeyboardInterrupt(), EXIT_INTERRUPTED, id="Ctrl-C"),
        pytest.param(asyncio.CancelledError(), EXIT_INTERRUPTED, id="Ctrl-C as an event loop began"),
    ],
)
def test_a_foreseen_end_is_one_message_and_its_code(
    error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, text = ending(error, capsys)
    assert seen == code
    assert "Traceback" not in text
    assert len(text.splitlines()) == (1 if error else 0)


def test_a_bug_keeps_its_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ending(ZeroDivisionError("division by zero"), capsys)
    assert code == EXIT_FAILED
    assert "Traceback" in text and text.endswith("failed: ZeroDivisionError: division by zero\n")


def test_a_step_that_begins_anew_keeps_its_folder_when_the_failed_one_is_collected(tmp_path: Path) -> None:
    failed = steps.open_output(str(tmp_path / "out"), step="sft", inputs={})
    again = steps.open_output(str(tmp_path / "out"), step="sft", inputs={})
    assert isinstance(again, steps.Output)
    del failed
    gc.collect()
    assert again.folder.is_dir()


SLOW_STEP = """
    import asyncio, sys, threading
    from cowest_training import steps

    def main():
        output = steps.open_output(sys.argv[1], step="sft", inputs={})
        (output.folder / "half.bin").write_bytes(b"half")
        print("ready", flush=True)
        WAIT

    steps.run(main)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("wait", ["threading.Event().wait()", "asyncio.run(asyncio.Event().wait())"])
def test_an_interrupted_step_leaves_nothing_half_written(tmp_path: Path, sent: signal.Signals, wait: str) -> None:
    code = textwrap.dedent(SLOW_STEP).replace("WAIT", wait)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert (tmp_path / ".out.partial" / "half.bin").exists()
        process.send_signal(sent)
        _, text = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED
    assert text.startswith("interrupted") and len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
