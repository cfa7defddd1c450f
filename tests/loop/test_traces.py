"""Trace and feedback segments, written to and read from a real folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from cowest_serving.contract import FEEDBACK_COLUMNS, TRACE_COLUMNS
from cowest_serving.spool import Pace
from cowest_serving.traces import (
    SpooledTraces,
    TraceWriter,
    is_sampled,
    read_columns,
    read_feedback,
    read_new,
    read_traces,
)
from tests.benchmarks.torture_spool import torture
from tests.patience import IN_TIME

NOW = datetime.now(UTC)


def row(i: int, **changes: Any) -> dict[str, Any]:
    given = {"trace_id": f"t{i}", "time": NOW + timedelta(milliseconds=i), "arm": "stable", "status": "ok"}
    content = {"query": f"q{i}", "messages": "[]", "draft": "d", "answer": "a", "draft_ms": 1.5, "shadow": False}
    return given | content | changes


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


async def until(condition: Any) -> None:
    async with asyncio.timeout(IN_TIME):
        while not condition():
            await asyncio.sleep(0.01)


async def test_rows_come_back_typed_and_in_order(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "gw-1")
    for i in (2, 0, 1):
        assert writer.add(row(i, strong_input_tokens=7))
    await writer.aclose()
    table = read_traces(str(tmp_path))
    assert table.column_names == list(TRACE_COLUMNS)
    assert table["trace_id"].to_pylist() == ["t0", "t1", "t2"]
    assert table["time"][0].as_py() == NOW
    assert table["strong_input_tokens"].to_pylist() == [7, 7, 7]
    assert table["weak_digest"].null_count == 3


async def test_columns_are_read_alone(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "gw-1")
    for i in (1, 0):
        writer.add(row(i, strong_input_tokens=i))
    await writer.aclose()
    table = read_columns(str(tmp_path), ("strong_input_tokens",))
    assert table.column_names == ["time", "strong_input_tokens"]
    assert table["strong_input_tokens"].to_pylist() == [0, 1]
    assert read_columns(str(tmp_path / "not-there"), ("query",)).num_rows == 0


async def test_a_segment_lies_under_its_day_and_is_compressed(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "host/with:odd-name")
    writer.add(row(0))
    await writer.aclose()
    (path,) = segments(tmp_path)
    day, name = path.relative_to(tmp_path / "traces").parts
    assert datetime.strptime(day, "%Y-%m-%d")
    assert name[6:] == "-host.with.odd.name-0.parquet"
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


async def test_feedback_is_kept_apart(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w")
    writer.add_feedback({"feedback_id": "f", "trace_id": "t", "time": NOW, "score": 0.25, "reference": None})
    await writer.aclose()
    table = read_feedback(str(tmp_path))
    assert table.column_names == list(FEEDBACK_COLUMNS)
    assert table["score"].to_pylist() == [0.25]
    assert read_traces(str(tmp_path)).num_rows == 0


@pytest.mark.parametrize("folder", ["", "not-there"])
def test_an_empty_store_gives_an_empty_table(tmp_path: Path, folder: str) -> None:
    assert read_traces(str(tmp_path / folder)).num_rows == 0
    assert read_feedback(str(tmp_path / folder)).column_names == list(FEEDBACK_COLUMNS)


async def test_rows_are_written_after_a_short_time_by_themselves(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w", flush_seconds=0.05)
    await writer.start()
    writer.add(row(0))
    await until(lambda: segments(tmp_path))
    writer.add(row(1))
    await until(lambda: len(segments(tmp_path)) == 2)
    await writer.aclose()
    assert read_traces(str(tmp_path)).num_rows == 2


async def test_many_rows_are_written_before_the_time_is_up(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w", flush_seconds=600, flush_rows=10)
    await writer.start()
    for i in range(10):
        writer.add(row(i))
    await until(lambda: segments(tmp_path))
    writer.add(row(10))
    await writer.aclose()  # ends at once, though the time is not up
    assert read_traces(str(tmp_path)).num_rows == 11


async def test_while_the_store_is_away_rows_wait_and_none_is_written_twice(tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be")
    writer = TraceWriter(str(blocked), "w", flush_seconds=0.02)
    await writer.start()
    for i in range(3):
        assert writer.add(row(i))
    await until(lambda: writer.counts()["failed_writes"] >= 2)
    assert writer.add(row(3))
    assert writer.counts()["waiting"] == 4
    blocked.unlink()
    await until(lambda: writer.counts()["waiting"] == 0 and writer.counts()["written"] == 4)
    await writer.aclose()
    assert read_traces(str(blocked))["trace_id"].to_pylist() == ["t0", "t1", "t2", "t3"]
    # What was tried in vain may be in the store all the same: it is tried under the same name.
    assert [name.name[6:] for name in segments(blocked)] == ["-w-0.parquet", "-w-1.parquet"]


async def test_a_store_away_for_too_long_costs_the_oldest_rows_and_they_are_counted(tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("")
    writer = TraceWriter(str(blocked), "w", max_waiting=3)
    assert [writer.add(row(i)) for i in range(2)] == [True, True]
    await writer.flush()
    assert [writer.add(row(i)) for i in range(2, 5)] == [True, False, False]
    blocked.unlink()
    await writer.aclose()
    assert writer.counts() == {"written": 3, "dropped": 2, "waiting": 0, "failed_writes": 1}
    assert read_traces(str(blocked))["trace_id"].to_pylist() == ["t2", "t3", "t4"]


async def test_a_row_that_no_segment_can_hold_costs_no_other(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w")
    writer.add(row(0))
    writer.add(row(1, strong_input_tokens="many"))
    writer.add(row(2))
    await writer.aclose()
    assert read_traces(str(tmp_path))["trace_id"].to_pylist() == ["t0", "t2"]
    assert writer.counts()["dropped"] == 1


async def test_two_writers_share_a_store(tmp_path: Path) -> None:
    writers = [TraceWriter(str(tmp_path), name) for name in ("a", "b")]
    for i, writer in enumerate(writers):
        writer.add(row(i))
        await writer.aclose()
    assert read_traces(str(tmp_path)).num_rows == 2


# ---------------------------------------------------------------- through the disk
@asynccontextmanager
async def spooled(tmp_path: Path, writer: str = "w", **options: Any) -> AsyncIterator[SpooledTraces]:
    given: dict[str, Any] = {"pace": Pace(soon=0.02), "patience": IN_TIME} | options
    sink = SpooledTraces(str(tmp_path / "store"), writer, tmp_path / "spool", **given)
    await sink.start()
    try:
        yield sink
    finally:
        await sink.aclose()


async def kept(sink: SpooledTraces, row: dict[str, Any]) -> bool:
    future = sink.keep(row)
    assert future is not None
    return await future


async def test_a_durable_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    async with spooled(tmp_path, "host:1") as sink:
        assert await kept(sink, row(0, strong_input_tokens=7))
        said = sink.keep_feedback({"feedback_id": "f", "trace_id": "t0", "time": NOW, "score": 0.25})
        assert said is not None and await said
        assert sink.counts()["acknowledged"] == 2
    (trace,) = read_traces(str(tmp_path / "store")).to_pylist()
    assert {name: value for name, value in trace.items() if value is not None} == row(0, strong_input_tokens=7)
    assert read_feedback(str(tmp_path / "store"))["score"].to_pylist() == [0.25]
    assert sink.counts()["written"] == 2 and sink.spool_bytes == 0


async def test_a_durable_row_is_seen_by_readers_soon_while_its_writer_runs(tmp_path: Path) -> None:
    async with spooled(tmp_path) as sink:
        for i in range(3):
            await kept(sink, row(i))
            await until(lambda seen=i + 1: read_traces(str(tmp_path / "store")).num_rows == seen)


async def test_a_mark_of_what_was_seen_holds_across_segments(tmp_path: Path) -> None:
    since, mark, seen = NOW.timestamp() - 1, {}, []
    async with spooled(tmp_path, pace=Pace(max_rows=1)) as sink:
        for i in range(5):
            await kept(sink, row(i))
            await until(lambda: sink.counts()["waiting"] == 0)
            table, mark = read_new(str(tmp_path / "store"), "traces", mark, since=since)
            seen += table["trace_id"].to_pylist()
    assert seen == [f"t{i}" for i in range(5)]


async def test_a_segment_is_never_named_before_the_time_of_its_rows(tmp_path: Path) -> None:
    """As when the clock was set back after a request came."""
    ahead = datetime.now(UTC) + timedelta(days=2)
    async with spooled(tmp_path) as sink:
        await kept(sink, row(0, time=ahead))
    assert read_traces(str(tmp_path / "store"), ahead).num_rows == 1


async def test_a_segment_shipped_again_after_a_crash_is_the_same_object(tmp_path: Path) -> None:
    """The process died after the put and before it deleted its file."""
    (tmp_path / "store").write_text("a file where the folder should be")
    async with spooled(tmp_path, pace=Pace(soon=600, late=600)) as sink:  # one file, however slow the disk
        for i in range(3):
            assert await kept(sink, row(i))
    shutil.copytree(tmp_path / "spool", tmp_path / "as-it-was")
    (tmp_path / "store").unlink()
    for _ in range(2):
        async with spooled(tmp_path, "next") as sink:
            await until(lambda: sink.counts()["written"] == 3)
        (name,) = segments(tmp_path / "store")
        assert name.name[6:] == "-w-0.parquet"
        shutil.rmtree(tmp_path / "spool")
        shutil.copytree(tmp_path / "as-it-was", tmp_path / "spool")
    assert read_traces(str(tmp_path / "store"))["trace_id"].to_pylist() == ["t0", "t1", "t2"]


async def test_what_the_disk_does_not_take_waits_in_memory(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    async with spooled(tmp_path) as sink:
        assert not await kept(sink, row(0))
        assert sink.is_full
        assert sink.counts()["unacknowledged"] == 1
    assert read_traces(str(tmp_path / "store"))["trace_id"].to_pylist() == ["t0"]


async def test_what_a_full_spool_has_no_room_for_waits_in_memory(tmp_path: Path) -> None:
    async with spooled(tmp_path, limit_bytes=10) as sink:
        assert not await kept(sink, row(0))
    assert read_traces(str(tmp_path / "store"))["trace_id"].to_pylist() == ["t0"]


async def test_a_durable_row_that_no_segment_can_hold_costs_no_other(tmp_path: Path) -> None:
    async with spooled(tmp_path) as sink:
        await kept(sink, row(0))
        await kept(sink, row(1, strong_input_tokens="many"))
        await kept(sink, row(2, draft="\udc00"))  # half a character: no JSON can hold it
    assert read_traces(str(tmp_path / "store"))["trace_id"].to_pylist() == ["t0"]
    assert sink.counts()["dropped"] == 2


def test_shipping_loads_no_pandas(tmp_path: Path) -> None:
    """Arrow imports it where rows are Python objects: more than a second, in the middle of answers."""
    script = (
        "import sys; from cowest_serving.traces import TRACE_SCHEMA, segment, table_of;"
        f"segment(table_of([{orjson.dumps(row(0))!r}], TRACE_SCHEMA)); print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


async def test_under_load_a_thousand_rows_cost_at_most_two_puts(tmp_path: Path) -> None:
    async with spooled(tmp_path, pace=Pace()) as sink:
        for start in range(0, 6000, 500):
            await asyncio.gather(*(kept(sink, row(i)) for i in range(start, start + 500)))
    assert read_traces(str(tmp_path / "store")).num_rows == 6000
    assert len(segments(tmp_path / "store")) <= 12


def test_kill_9_loses_nothing_that_was_called_durable_and_writes_nothing_twice(tmp_path: Path) -> None:
    seen = torture(tmp_path, kills=20, seed=1)
    assert seen.acknowledged >= 20
    assert (seen.lost, seen.duplicated) == (0, 0)


# ---------------------------------------------------------------- since
def rename(path: Path, written: datetime) -> None:
    """As if the segment had been written at another time."""
    folder = path.parent.parent / f"{written:%Y-%m-%d}"
    folder.mkdir(exist_ok=True)
    os.rename(path, folder / f"{written:%H%M%S}{path.name[6:]}")


async def test_since_takes_rows_from_that_time_on(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w")
    for i in range(3):
        writer.add(row(i))
    await writer.aclose()
    since = NOW + timedelta(milliseconds=1)
    assert read_traces(str(tmp_path), since)["trace_id"].to_pylist() == ["t1", "t2"]
    assert read_traces(str(tmp_path), since.timestamp())["trace_id"].to_pylist() == ["t1", "t2"]


async def test_segments_written_before_are_not_even_opened(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w")
    writer.add(row(0))
    await writer.aclose()
    (old,) = segments(tmp_path)
    old.write_bytes(b"not Parquet: reading it would raise")
    rename(old, NOW - timedelta(days=1))
    assert read_traces(str(tmp_path), NOW).num_rows == 0
    with pytest.raises(Exception, match="Parquet"):
        read_traces(str(tmp_path))


async def test_a_segment_of_another_version_is_read_by_its_columns(tmp_path: Path) -> None:
    writer = TraceWriter(str(tmp_path), "w")
    writer.add(row(0))
    await writer.aclose()
    (path,) = segments(tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["shadow"]).append_column("new", table["query"]), path)
    assert read_traces(str(tmp_path)).column_names == list(TRACE_COLUMNS)


# ---------------------------------------------------------------- sampling
def test_a_trace_is_in_the_sample_by_its_id_alone() -> None:
    kept = [is_sampled(f"t{i}", 30) for i in range(1000)]
    assert 230 <= sum(kept) <= 370
    assert kept == [is_sampled(f"t{i}", 30) for i in range(1000)]


@pytest.mark.parametrize(("percent", "kept"), [(0, 0), (100, 200)])
def test_the_ends_of_the_sample_are_nothing_and_all(percent: int, kept: int) -> None:
    assert sum(is_sampled(f"t{i}", percent) for i in range(200)) == kept
