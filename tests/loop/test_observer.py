"""The observer over a folder and over a store that hangs; its own count of traces against that of `collect`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import orjson
import pytest
from starlette.requests import Request

from cowest_serving import store, traces
from cowest_training import observer
from cowest_training.collect import TraceCounts
from cowest_training.contract import Evaluator
from tests.loop.test_collect import START, Desk
from tests.ports import free_port

EXACT = Evaluator("ExactMatch")
AWAY = {"COWEST_S3_PATH_STYLE": "true", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "x"}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# ---------------------------------------------------------------- counting
def counter(desk: Desk, evaluator: Evaluator = EXACT) -> observer.TraceCounter:
    return observer.TraceCounter(desk.store, evaluator, str(desk.folder / "held_out.jsonl"))


@pytest.mark.parametrize("kind", ["ExactMatch", "Numeric", "Judge"])
def test_it_counts_as_collect_does_whatever_comes_in_which_order(desk: Desk, kind: str) -> None:
    evaluator = Evaluator(kind)  # type: ignore[arg-type]
    counts, draw = counter(desk, evaluator), random.Random(7)
    for number in range(40):
        query = draw.choice(
            ["a question", "another question", "please ship 1 drum of QF1 to orlo", f"question {number}"]
        )
        more = draw.choice([{}, {}, {}, {"shadow": True}, {"status": "strong_failed"}, {"messages": None}])
        desk.answer(number, query, **more)
        if draw.random() < 0.7:
            about, words = draw.randrange(40), draw.choice(["42", "a lot", " ", None])
            desk.feedback(about, words, minute=draw.randrange(10**6))
        if number % 5 == 0:
            assert counts.count(date(2026, 1, 5)) == desk.count(evaluator)
    final = counts.count(date(2026, 1, 5))
    assert final == desk.count(evaluator)
    assert 0 < final.usable < final.all == 40


def test_what_is_usable_is_counted_since_any_time_by_when_it_was_asked_last(desk: Desk) -> None:
    for number, query in enumerate(["a question", "another question", "a question"]):
        desk.answer(number, query)
    counted = counter(desk, Evaluator("Judge")).count(date(2026, 1, 5))
    times = [(START + timedelta(minutes=number)).timestamp() for number in range(3)]
    assert counted.usable == 2
    assert [counted.since(at) for at in (0.0, *times)] == [2, 2, 1, 0]


def test_a_late_reference_that_is_no_choice_is_counted_with_what_was_wanted(desk: Desk) -> None:
    """The gateway takes it: it knows no evaluator."""
    choice = Evaluator("Choice", choices=("allow", "deny"))
    for number, reference in ((1, "allow"), (2, "maybe")):
        desk.answer(number, f"question number {number}")
        desk.feedback(number, reference)
    counted = counter(desk, choice).count(date(2026, 1, 5))
    wanted = "1 with a late reference that the evaluator cannot go by (wanted one of the choices allow, deny)."
    assert (counted.all, counted.usable, counted.reason) == (2, 1, f"Not usable: {wanted}")
    assert counted.reason == desk.count(choice).reason, "as the round itself would say"


def test_a_segment_is_read_once(desk: Desk) -> None:
    desk.answer(1, "a question")
    desk.feedback(1, "42")
    counts = counter(desk)
    assert counts.count(date(2026, 1, 5)).usable == 1
    for segment in store.list_files(desk.store):
        Path(segment.removeprefix("file://")).write_bytes(b"no segment")
    desk.answer(2, "another question")
    desk.feedback(2, "43")
    assert counts.count(date(2026, 1, 6)).usable == 2


def test_days_without_a_look_are_caught_up_with_and_old_ones_not_listed_again(desk: Desk) -> None:
    counts = counter(desk)
    counts.count(date(2026, 1, 2))
    desk.answer(1, "a question")
    assert counts.count(date(2026, 1, 9)).all == 1
    desk.answer(2, "of a day long over")
    assert counts.count(date(2026, 1, 9)).all == 1


def test_a_segment_that_cannot_be_read_now_is_counted_later(desk: Desk) -> None:
    desk.answer(1, "a question")
    desk.answer(2, "another question")
    broken = Path(store.list_files(desk.store)[1].removeprefix("file://"))
    data = broken.read_bytes()
    broken.write_bytes(b"no segment")
    counts = counter(desk)
    with pytest.raises(Exception, match="Parquet"):
        counts.count(date(2026, 1, 5))
    broken.write_bytes(data)
    assert counts.count(date(2026, 1, 5)).all == 2


def test_other_held_out_queries_count_anew(desk: Desk) -> None:
    desk.answer(1, "a question that is asked here and nowhere else")
    counts = counter(desk)
    assert "late reference" in counts.count(date(2026, 1, 5)).reason
    desk.write("held_out.jsonl", {"h1": "a question that is asked here and nowhere else", "h2": "something else"})
    assert "held-out" in counts.count(date(2026, 1, 5)).reason


# ---------------------------------------------------------------- over HTTP
@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urlopen(self.url + path, timeout=20) as response:
                return response.status, response.read()
        except HTTPError as error:
            return error.code, error.read()

    def artifact(self, uri: str) -> tuple[int, Any]:
        status, body = self.get(f"/v1/artifact?uri={quote(uri, safe='')}")
        return status, json.loads(body)

    def counts(self, *, all_: int) -> dict[str, Any]:
        """Once so many traces were counted."""
        end = time.monotonic() + 20
        while True:
            status, body = self.get("/v1/traces")
            if status == 200 and json.loads(body)["all"] == all_:
                return json.loads(body)  # type: ignore[no-any-return]
            assert time.monotonic() < end, body
            time.sleep(0.05)


@contextmanager
def running(desk: Desk, store_uri: str, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    job = json.loads((desk.folder / "job.json").read_text())
    job["data"]["heldOut"] = str(desk.folder / "held_out.jsonl")
    (desk.folder / "job.json").write_text(json.dumps(job))
    port = free_port()
    command = [sys.executable, "-P", "-m", "cowest_training.observer", "--store", store_uri, "--port", str(port)]
    command += ["--job", str(desk.folder / "job.json"), "--count-seconds", "0.1"]
    with subprocess.Popen(command, env={**os.environ, **(env or {})}) as process:
        try:
            served = Running(f"http://127.0.0.1:{port}", process)
            end = time.monotonic() + 60
            while not answers(served):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            yield served
        finally:
            process.kill()


def answers(served: Running) -> bool:
    try:
        return served.get("/healthz")[0] == 200
    except OSError:
        return False


def test_it_gives_out_small_facts_of_the_job_and_nothing_else(desk: Desk) -> None:
    root, big = desk.store, b'"' + b"x" * observer.MAX_BYTES + b'"'
    for name in ("manifest.json", "report.json", "ledger.parquet", "dataset.jsonl"):
        store.put(store.join(root, "runs/r0/evaluate", name), b'{"a": 1}')
    for name in ("live-0.json", "live-0.decided.json", "decision-1.json", "failure.json"):
        store.put(store.join(root, "runs/r0", name), b'{"a": 1}')
    store.put(store.join(root, "runs/r1/manifest.json"), big)
    (desk.folder / "manifest.json").write_text("{}")
    with running(desk, root) as served:
        for name in ("evaluate/manifest.json", "evaluate/report.json", "live-0.json", "live-0.decided.json",
                     "decision-1.json", "failure.json"):  # fmt: skip
            assert served.artifact(f"{root}/runs/r0/{name}") == (200, {"a": 1}), name
        status, body = served.artifact(f"{root}/runs/r9/manifest.json")
        assert status == 404 and "r9" in body["error"]["message"]
        for uri in (
            f"{root}/runs/r0/evaluate/ledger.parquet",
            f"{root}/runs/r0/evaluate/dataset.jsonl",
            f"{root}/runs/r1/manifest.json",
            f"{root}/../manifest.json",
            f"{root}/%2e%2e/manifest.json",
            f"{root}-other/manifest.json",
            "s3://other/manifest.json",
            "/etc/passwd",
            root,
            "",
        ):
            status, body = served.artifact(uri)
            assert status == 403 and body["error"]["message"].startswith(("wanted", uri)), uri


def answer_now(desk: Desk, number: int, query: str) -> None:
    """In the folder of today, where a gateway writes."""
    messages = json.dumps([{"role": "user", "content": query}])
    now = datetime.now(UTC)
    row = {"trace_id": f"n{number}", "status": "ok", "shadow": False, "messages": messages, "time": now}
    data = traces.segment(traces.table_of([orjson.dumps(row)], traces.TRACE_SCHEMA))
    store.put(store.join(desk.store, "traces", f"{now:%Y-%m-%d}", f"{now:%H%M%S}-gateway-{number}.parquet"), data)


def test_traces_are_counted_while_it_runs_and_shown_in_the_metrics(desk: Desk) -> None:
    with running(desk, desk.store) as served:
        before = time.time()
        counts = served.counts(all_=0)
        assert (counts["usable"], counts["reason"]) == (0, "")
        answer_now(desk, 1, "a question")
        answer_now(desk, 2, "another question")
        counts = served.counts(all_=2)
        assert counts["usable"] == 0 and "without a late reference" in counts["reason"]
        assert "since_last" not in counts
        assert json.loads(served.get(f"/v1/traces?since={before}")[1])["since_last"] == 0
        assert served.get("/v1/traces?since=yesterday")[0] == 400
        assert before - 60 < counts["counted_at"] <= time.time()
        assert served.get("/readyz")[0] == 200
        text = served.get("/metrics")[1].decode()
        assert 'cowest_observer_traces{kind="all"} 2' in text
        assert 'cowest_observer_requests_total{path="/v1/traces",status="200"}' in text
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


def test_it_takes_traces_away_that_are_older_than_the_manifest_wants(desk: Desk) -> None:
    job = json.loads((desk.folder / "job.json").read_text())
    (desk.folder / "job.json").write_text(json.dumps(job | {"traces": {"retentionDays": 3}}))
    days = [f"{datetime.now(UTC) - timedelta(days=back):%Y-%m-%d}" for back in (5, 1)]
    old, young = (store.join(desk.store, "traces", day, "120000-w-0.parquet") for day in days)
    for uri in (old, young):
        store.put(uri, traces.segment(traces.TRACE_SCHEMA.empty_table()))
    with running(desk, desk.store):
        end = time.monotonic() + 30
        while store.exists(old):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert store.exists(young)


def test_a_store_that_hangs_is_503_soon_and_asked_once(desk: Desk) -> None:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        env = {**AWAY, "COWEST_S3_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with running(desk, "s3://bucket/desk", env) as served:
            for _ in range(2):
                began = time.monotonic()
                status, body = served.artifact("s3://bucket/desk/runs/r0/live-0.json")
                assert status == 503 and "within 4 s" in body["error"]["message"]
                assert time.monotonic() - began < 30
            assert served.get("/readyz")[0] == 503
            status, _ = served.get("/v1/traces")
            assert status == 503
            assert served.get("/healthz")[0] == 200, "it lives: to start it again would help nobody"
            silent.setblocking(False)
            asked = questions(silent)
            assert sum("live-0.json" in line for line in asked) == 1, asked
            assert 'store_errors_total{operation="artifact"} 2' in served.get("/metrics")[1].decode()
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(20) == 0, "it does not wait for the store to end"


def questions(server: socket.socket) -> list[str]:
    """The first lines of all requests that wait at a server that takes none. None is hung up on before all are
    counted: the client would ask again at once, and be counted twice."""
    with ExitStack() as held:
        lines = []
        while True:
            try:
                connection, _ = server.accept()
            except BlockingIOError:
                return lines
            held.enter_context(connection)
            connection.settimeout(5)
            lines.append(connection.recv(4096).decode().partition("\r\n")[0])


def test_a_store_that_is_away_is_said_and_counted(desk: Desk) -> None:
    env = {**AWAY, "COWEST_S3_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with running(desk, "s3://bucket/desk", env) as served:
        status, body = served.artifact("s3://bucket/desk/runs/r0/manifest.json")
        assert status == 503 and "COWEST_S3_ENDPOINT" in body["error"]["message"]
        status, body = served.get("/v1/traces")
        assert status == 503 and b"not counted yet" in body
        assert 'store_errors_total{operation="artifact"} 1' in served.get("/metrics")[1].decode()


async def test_a_count_that_fails_after_good_ones_is_said_until_the_next_good_one() -> None:
    outcomes = iter([TraceCounts(3, 2, ""), OSError("minio is away"), TraceCounts(4, 2, ""), OSError("over")])
    more = threading.Semaphore(0)

    class Scripted:
        def count(self) -> TraceCounts:
            assert more.acquire(timeout=60)
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    watching = observer.Observer(Any, observer.Metrics(observer.HELP), Scripted, every=0.01)  # type: ignore[arg-type]
    counting = asyncio.create_task(watching.keep_counting())
    request = Request({"type": "http", "query_string": b"", "headers": []})
    seen = []
    try:
        for _ in range(3):
            more.release()
            before = watching.counted, watching.trouble
            async with asyncio.timeout(60):
                while (watching.counted, watching.trouble) == before:
                    await asyncio.sleep(0.01)
            answer = await watching.traces(request)
            seen.append((answer.status_code, json.loads(answer.body)))
    finally:
        counting.cancel()
        more.release()
    assert [status for status, _ in seen] == [200, 503, 200]
    assert "minio is away" in seen[1][1]["error"]["message"] and seen[2][1]["all"] == 4


@pytest.mark.parametrize(("text", "reason"), [(None, "DataMissing"), ("{}", "DataInvalid")], ids=["none", "no rows"])
async def test_held_out_rows_that_are_not_there_or_are_none_are_no_fault_of_the_store(
    desk: Desk, text: str | None, reason: str
) -> None:
    file = desk.folder / "held_out.jsonl"
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_text(text)
    watching = observer.Observer(Any, observer.Metrics(observer.HELP), lambda: counter(desk), every=0.01)  # type: ignore[arg-type]
    before = watching.trouble
    counting = asyncio.create_task(watching.keep_counting())
    try:
        async with asyncio.timeout(60):
            while watching.trouble == before:
                await asyncio.sleep(0.01)
        answer = await watching.traces(Request({"type": "http", "query_string": b"", "headers": []}))
    finally:
        counting.cancel()
    assert answer.status_code == 503 and json.loads(answer.body)["error"]["reason"] == reason


def test_it_needs_no_torch() -> None:
    code = "import sys, cowest_training.observer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
