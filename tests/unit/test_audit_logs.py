"""What the suites on a real cluster leave of its audit log. No cluster."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.e2e import audit

ROOT = Path(__file__).parents[2]
BEGUN = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
OPERATOR = "system:serviceaccount:cowest-system:cowest"


def line(name: str, minutes: int = 1, user: str = OPERATOR) -> str:
    at = (BEGUN + timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")
    return json.dumps({"user": {"username": user}, "requestReceivedTimestamp": at, "requestURI": name}) + "\n"


def names(left: Path) -> list[str]:
    return [json.loads(each)["requestURI"] for each in left.read_text().splitlines()]


def write(path: Path, lines: Iterable[str], minutes: int = 5) -> None:
    text = "".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    when = (BEGUN + timedelta(minutes=minutes)).timestamp()
    os.utime(path, (when, when))


def test_what_service_accounts_asked_since_the_suite_began_is_left_and_nothing_else(tmp_path: Path) -> None:
    log, left = tmp_path / "audit.log", tmp_path / "build" / "audit" / "e2e.log"
    half = line("half")[:-20]
    write(log, [line("before", -1), line("ours"), line("theirs", user="kubernetes-admin"), half])
    audit.leave(log, BEGUN, left)
    assert names(left) == ["ours"]


def test_a_suite_that_goes_on_keeps_what_it_left_before(tmp_path: Path) -> None:
    log, left = tmp_path / "audit.log", tmp_path / "faults.log"
    write(log, [line("first")])
    audit.leave(log, BEGUN, left)
    write(log, [line("first"), line("second", 3)])
    audit.leave(log, BEGUN + timedelta(minutes=2), left)
    assert names(left) == ["first", "second"]


def test_the_parts_of_a_log_that_has_rotated_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "audit-2026-11-27T11-59-00.000.log", [line("so old that it is not opened", 1)], minutes=-1)
    write(tmp_path / "audit-2026-11-27T12-02-00.000.log.gz", [line("one", 1)])
    write(tmp_path / "audit-2026-11-27T12-03-00.000.log", [line("two", 2)])
    write(tmp_path / "audit.log", [line("three", 3)])
    os.link(tmp_path / "audit.log", tmp_path / "audit-2026-11-27T12-04-00.000.log")  # as if it rotated just now
    audit.leave(tmp_path / "audit.log", BEGUN, tmp_path / "left.log")
    assert names(tmp_path / "left.log") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("is_faults", "anew", "left"),
    [
        pytest.param(False, False, {"faults.log"}, id="the loop begins anew each time"),
        pytest.param(True, False, {"e2e.log", "faults.log"}, id="the faults go on"),
        pytest.param(True, True, {"e2e.log"}, id="the faults anew"),
    ],
)
def test_a_suite_that_begins_anew_takes_its_own_file_away_and_no_others(
    tmp_path: Path, is_faults: bool, anew: bool, left: set[str]
) -> None:
    for name in ("e2e.log", "faults.log"):
        (tmp_path / name).write_text("of before\n")
    assert audit.begin(is_faults, anew, tmp_path).name == ("faults.log" if is_faults else "e2e.log")
    assert {each.name for each in tmp_path.iterdir()} == left


def test_it_is_left_where_make_rbac_looks() -> None:
    assert "$(wildcard build/audit/*.log)" in (ROOT / "Makefile").read_text()
    assert audit.FOLDER == ROOT / "build" / "audit"
