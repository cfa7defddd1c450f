"""Traces are counted beside the engine's loop: a look never waits, and a failure is said and tried again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cowest_cli.counting import Counting
from cowest_operator import api
from cowest_training.contract import Evaluator

SECONDS = 20.0


@pytest.fixture
def store(tmp_path):
    rows = [{"id": f"h{i}", "query": f"another {i}", "reference": "1"} for i in range(2)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(store, clock=time.monotonic) -> Counting:
    return Counting(store.as_uri(), 30, Evaluator("ExactMatch"), (store / "held_out.jsonl").as_uri(), clock)


def add(store, number: int) -> None:
    day = datetime.now(UTC).date().isoformat()
    common = {"trace_id": str(number), "time": datetime.now(UTC)}
    rows = {
        "traces": {**common, "status": "ok", "shadow": False,
                   "messages": f'[{{"role": "user", "content": "question {number}"}}]'},
        "feedback": {**common, "reference": "1"},
    }  # fmt: skip
    for prefix, row in rows.items():
        folder = store / prefix / day
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), folder / f"w-{number}.parquet")


def until(counting: Counting, wanted) -> None:
    deadline = time.monotonic() + SECONDS
    while not wanted(counting.look(0.0)):
        assert time.monotonic() < deadline, counting.counts
        time.sleep(0.01)


def test_what_comes_in_is_counted_by_a_later_look(store):
    add(store, 1)
    counting = make(store)
    assert counting.look(0.0) == api.TraceCounts() and not counting.counted, "the first look waits for nothing"
    until(counting, lambda seen: seen.usable == 1)
    assert counting.counted
    add(store, 2)
    until(counting, lambda seen: (seen.all, seen.usable) == (2, 2))


def test_those_given_since_a_time_are_counted_apart(store):
    add(store, 1)
    between = time.time()
    add(store, 2)
    counting = make(store)
    until(counting, lambda seen: seen.usable == 2)
    assert [counting.look(60.0, since).since_last for since in (0.0, 1.0, between, time.time())] == [None, 2, 1, 0]


def test_between_two_counts_nothing_is_read(store):
    now = 1.0
    counting = make(store, lambda: now)
    until(counting, lambda _: counting.counted)
    add(store, 1)
    for _ in range(3):
        assert counting.look(60.0).all == 0
    now += 61
    counting.look(60.0)
    until(counting, lambda seen: seen.all == 1)


def test_what_cannot_be_counted_is_said_and_tried_again(store):
    rows = (store / "held_out.jsonl").read_text()
    (store / "held_out.jsonl").unlink()
    counting = make(store)
    until(counting, lambda seen: "cannot be counted" in seen.reason)
    (store / "held_out.jsonl").write_text(rows)
    add(store, 1)
    until(counting, lambda seen: (seen.usable, seen.reason) == (1, ""))


def test_a_count_that_hangs_keeps_no_process_from_ending() -> None:
    code = "import time; from cowest_cli.beside import beside; beside(lambda: time.sleep(600), 'count'); print('over')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "over\n"
