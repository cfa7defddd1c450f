"""Old traces go, what a round froze stays."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from cowest_serving import store
from cowest_training.retention import expire

FILES = (
    "traces/2026-01-01/120000-a-1.parquet",
    "traces/2026-01-08/120000-a-2.parquet",
    "traces/2026-01-09/120000-a-3.parquet",
    "feedback/2026-01-01/120000-a-1.parquet",
    "traces/old/x.parquet",
    "runs/r1/collect/data.parquet",
)


def test_only_days_older_than_the_limit_are_taken_away(tmp_path: Path) -> None:
    uri = (tmp_path / "desk").as_uri()
    for name in FILES:
        store.put(store.join(uri, name), b"x")
    assert expire(uri, 1, date(2026, 1, 9)) == 2
    left = {file.removeprefix(uri + "/") for file in store.list_files(uri)}
    assert left == {FILES[1], FILES[2], FILES[4], FILES[5]}
    assert expire(uri, 1, date(2026, 1, 9)) == 0


def test_a_store_without_traces_has_nothing_to_lose(tmp_path: Path) -> None:
    assert expire((tmp_path / "desk").as_uri(), 1) == 0
