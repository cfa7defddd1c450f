"""The files of a job on one machine."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cowest_cli import jobs
from cowest_operator import api
from cowest_training.contract import StepError
from cowest_training.steps import write_atomically
from tests import world as w


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


# ---------------------------------------------------------------- what people say
AHEAD = 99_999_999_999_999_999_999  # ns: no clock is there yet


@pytest.mark.parametrize("taken_in", [True, False])
def test_a_word_that_is_said_after_the_clock_stepped_back_is_not_lost(tmp_path: Path, taken_in: bool) -> None:
    home = jobs.Home(tmp_path)
    last = f"{AHEAD - 9:020d}-pause"
    if taken_in:
        jobs.write_status(home, replace(api.Status(), last_action=last))
    else:
        jobs.write_json(home.actions / f"{last}.json", {"id": last, "verb": "pause", "by": "a", "why": "", "at": 1.0})
    said = jobs.record_action(home, "resume", "")
    assert jobs.read_actions(home, last) == (said,)


# ---------------------------------------------------------------- events
def event(message: str) -> api.Event:
    return api.Event("Normal", "Reason", message)


def test_an_event_is_one_line_whatever_its_message_holds(tmp_path: Path) -> None:
    home, message = jobs.Home(tmp_path), "a\u2028b\u2029c\u0085d\ne"
    jobs.append_event(home, event(message), 1.0)
    assert [seen["message"] for seen in jobs.read_events(home)] == [message]


@pytest.mark.parametrize("torn", [b'{"time": 1, "message": "half', '{"message": "\u00e4'.encode()[:-1]])
def test_a_torn_line_takes_no_other_event_with_it(tmp_path: Path, torn: bytes) -> None:
    home = jobs.Home(tmp_path)
    jobs.append_event(home, event("one"), 1.0)
    with home.events.open("ab") as file:
        file.write(torn)
    assert [seen["message"] for seen in jobs.read_events(home)] == ["one"]
    jobs.append_event(home, event("two"), 2.0)
    assert [seen["message"] for seen in jobs.read_events(home)] == ["one", "two"]


# ---------------------------------------------------------------- files of people
def test_a_manifest_in_another_encoding_is_said(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: CollaborationJob", "utf-16")
    with pytest.raises(StepError, match=r"job\.yaml: cannot be read as YAML in UTF-8"):
        jobs.home_of(path, None)


def job_with_client_keys() -> api.Job:
    return w.job(gateway={"client_keys_secret_ref": api.NameRef("clients")})


def test_the_mark_that_windows_puts_before_a_key_is_no_part_of_it(tmp_path: Path) -> None:
    for name in ("strong", "clients"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "api-key").write_text("k1\r\n", "utf-8-sig")
    assert jobs.secret("strong", "api-key", tmp_path) == "k1"
    assert jobs.client_keys(job_with_client_keys(), tmp_path) == "k1"


def test_a_key_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    path = tmp_path / "clients" / "desk"
    path.write_text("k1", "utf-16")
    said = f"secret clients/desk: wanted UTF-8 text in {path}, saw another encoding"
    with pytest.raises(StepError, match=said):
        jobs.secret("clients", "desk", tmp_path)
    with pytest.raises(StepError, match=said):
        jobs.client_keys(job_with_client_keys(), tmp_path)
