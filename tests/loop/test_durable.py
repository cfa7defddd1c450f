"""Records under the real gateway: what clients hear of them, what readers see meanwhile, what goes after its days."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cowest_cli.counting import Counting
from cowest_serving.contract import TRACE_COLUMNS
from cowest_serving.spool import LogFile, Pace, read_frames
from cowest_serving.traces import CONTENT_COLUMNS, SpooledTraces, read_new, read_traces
from cowest_training.contract import Evaluator
from tests.loop.test_gateway import ASKED, world


# ---------------------------------------------------------------- the client's word
class Slow(LogFile):
    """A disk that takes its time, and what it has synced by now: the ids of records."""

    synced: set[str]

    def __init__(self, path: Path, synced: set[str]) -> None:
        super().__init__(path)
        self._synced, self._path = synced, path

    def sync(self) -> None:
        covered = self._path.read_bytes()  # what comes later is not of this sync
        super().sync()
        time.sleep(0.01)
        self._synced |= {json.loads(payload[1:])["trace_id"] for payload in read_frames(covered).payloads}


@pytest.mark.parametrize("percent", [100, 0], ids=["with texts", "without"])
async def test_whoever_hears_that_a_record_is_durable_hears_it_after_the_sync_that_covers_it(
    tmp_path: Path, percent: int
) -> None:
    """Over HTTP, whole answers and streams side by side: each is compared with the disk as its word arrives."""
    synced: set[str] = set()
    sink = SpooledTraces(str(tmp_path), "w", tmp_path / "spool", open_file=lambda path: Slow(path, synced))
    told: Counter[str] = Counter()
    async with world(tmp_path, traces=sink, content_sample_percent=percent) as (_, _, door):
        url = door.url + "/v1/chat/completions"

        async def user(number: int) -> None:
            is_stream = number % 2 == 1
            for _ in range(4):
                async with door.http.post(url, json={"messages": ASKED, "stream": is_stream}) as response:
                    name = response.headers["x-request-id"]
                    if not is_stream and response.headers.get("x-cowest-trace") == "durable":
                        assert name in synced
                        told["whole"] += 1
                    async for line in response.content:
                        if line == b": trace durable\n":
                            assert name in synced
                            told["stream"] += 1

        await asyncio.gather(*(user(number) for number in range(12)))
    assert told["whole"] > 12 and told["stream"] > 12
    assert read_traces(str(tmp_path)).num_rows == 48


# ---------------------------------------------------------------- readers
async def test_readers_fail_never_and_see_each_row_once_while_many_are_written(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    sink = SpooledTraces(store, "w", tmp_path / "spool", pace=Pace(max_rows=20, soon=0.01, late=0.02))
    await sink.start()
    given, seen, mark = 0, [], {}

    async def user(number: int) -> None:
        nonlocal given
        while given < 1500:
            given += 1
            kept = sink.keep({"trace_id": f"t{given}", "time": datetime.now(UTC), "answer": "a" * 500}, others=20)
            assert kept is not None and await kept

    users = asyncio.gather(*(user(number) for number in range(20)))
    looks = before = 0
    while not users.done() or looks < 3:
        names = (await asyncio.to_thread(read_traces, store))["trace_id"].to_pylist()
        assert len(set(names)) == len(names) >= before
        table, mark = await asyncio.to_thread(read_new, store, "traces", mark, since=0)
        seen += table["trace_id"].to_pylist()
        before, looks = len(names), looks + 1
    await users
    await sink.aclose()
    table, _ = read_new(store, "traces", mark, since=0)
    seen += table["trace_id"].to_pylist()
    assert len(seen) == len(set(seen)) == given == read_traces(store).num_rows


# ---------------------------------------------------------------- sampling and retention
async def test_an_answer_outside_the_sample_lacks_its_texts_and_nothing_else(tmp_path: Path) -> None:
    async with world(tmp_path, content_sample_percent=0) as (_, _, door):
        await door.ask(user="u")
        bare = await door.row()
    async with world(tmp_path / "all") as (_, _, door):
        await door.ask(user="u")
        full = await door.row()
    texts = {*CONTENT_COLUMNS} - {"placeholders", "tool_calls"}  # there is nothing to hide, and no tool
    assert {name for name in TRACE_COLUMNS if bare[name] is None and full[name] is not None} == texts
    assert all(bare[name] for name in ("trace_id", "pair_digest", "weak_digest", "prompts_digest", "user_hash"))
    assert (bare["weight_percent"], bare["strong_output_tokens"]) == (100, full["strong_output_tokens"])


async def test_of_an_error_outside_the_sample_its_kind_alone_is_kept(tmp_path: Path) -> None:
    """An endpoint's words may quote what it was asked."""
    failing = {"strong": {"faults": [500] * 9, "answers": "no"}, "when_strong_fails": "WeakAlone"}
    async with world(tmp_path, content_sample_percent=0, **failing) as (_, _, door):
        await door.ask()
        bare = await door.row()
    async with world(tmp_path / "all", **failing) as (_, _, door):
        await door.ask()
        full = await door.row()
    assert full["error"].startswith(f"{bare['error']}: ") and bare["error"].isidentifier()
    assert bare["status"] == full["status"] == "strong_failed"


def test_the_engine_on_one_machine_takes_away_what_is_older_than_its_days(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    folders = [tmp_path / "traces" / f"{now - timedelta(days=days):%Y-%m-%d}" for days in (40, 31, 29, 0)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "120000-w-0.parquet").write_bytes(b"not read: what is old goes before it is counted")
    (tmp_path / "held_out.jsonl").write_text('{"id": "h", "query": "q", "reference": "1"}\n')
    counting = Counting(tmp_path.as_uri(), 30, Evaluator("ExactMatch"), (tmp_path / "held_out.jsonl").as_uri())
    end = time.monotonic() + 20
    while folders[1].exists():
        counting.look(0.0)
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [folder.exists() for folder in folders] == [False, False, True, True]
