"""The files of a job on one machine."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowest_cli import jobs
from cowest_training.steps import write_atomically


@contextmanager
def small_files() -> Iterator[None]:
    """As on a full disk: no file of this process may grow beyond some bytes, a log of the tests' own output neither."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: jobs.write_json(path, "x" * 100_000), id="state"),
        pytest.param(lambda path: write_atomically(path, b"x" * 100_000), id="an artifact's file"),
    ],
)
def test_where_there_is_no_room_the_old_file_stays_and_nothing_half_written(tmp_path: Path, write) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with pytest.raises(OSError, match="File too large"), small_files():
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "old"
