"""What a deleted job gives up is gone, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowest_serving import store
from cowest_training import erase
from cowest_training.contract import EXIT_BAD_INPUT, StepError

FILES = (
    "runs/r0/sft/manifest.json",
    "runs/r0/sft/model.safetensors",
    "runs/r0/live-0.json",
    "traces/2026-01-05/120000-g-0.parquet",
    "feedback/2026-01-05/120000-g-0.parquet",
    "elsewhere/notes.txt",
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    uri = (tmp_path / "my store" / "desk").as_uri()
    for name in FILES:
        store.put(store.join(uri, name), b"x")
    store.put((tmp_path / "my store" / "desk-2" / "runs" / "r0" / "x").as_uri(), b"x")
    return uri


def left(root: str) -> set[str]:
    return {file.removeprefix(root + "/").partition("/")[0] for file in store.list_files(root)}


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("models", {"traces", "feedback", "elsewhere"}),
        ("traces", {"runs", "elsewhere"}),
        ("all", {"elsewhere"}),
    ],
)
def test_only_what_was_named_goes(root: str, what: str, kept: set[str], tmp_path: Path) -> None:
    assert erase.main(["--store", root, "--what", what, "--progress", str(tmp_path / "progress.json")]) == 0
    assert left(root) == kept
    assert (tmp_path / "my store" / "desk-2" / "runs" / "r0" / "x").exists(), "another job's"
    assert (tmp_path / "progress.json").exists()


def test_a_slash_at_the_end_changes_nothing(root: str) -> None:
    erase.main(["--store", root + "/", "--what", "all"])
    assert left(root) == {"elsewhere"}


def test_to_erase_again_is_fine(root: str) -> None:
    for _ in range(2):
        assert erase.main(["--store", root, "--what", "all"]) == 0
    assert left(root) == {"elsewhere"}
    store.delete(store.join(root, "elsewhere"))
    assert erase.main(["--store", root, "--what", "all"]) == 0


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket//", "/", "file:///", "file://"])
def test_a_whole_store_is_refused(uri: str) -> None:
    with pytest.raises(StepError, match="prefix of one job, saw a whole store") as error:
        erase.main(["--store", uri, "--what", "all"])
    assert error.value.code == EXIT_BAD_INPUT


def test_a_prefix_that_is_not_a_jobs_is_said_and_left(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    above = (tmp_path / "my store").as_uri()
    assert erase.main(["--store", above, "--what", "all"]) == 0
    said = capsys.readouterr().err
    assert "wanted runs, traces, feedback, trust of a job, saw desk, desk-2. Nothing was deleted." in said
    assert len(left(root)) == 4


def test_more_files_than_one_batch_go(root: str) -> None:
    for number in range(erase.BATCH + 1):
        store.put(store.join(root, f"traces/2026-01-06/{number}.parquet"), b"")
    erase.main(["--store", root, "--what", "traces"])
    assert left(root) == {"runs", "elsewhere"}
