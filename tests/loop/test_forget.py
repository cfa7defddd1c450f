"""What a user gave goes out of a store, and the report names the data sets, pairs and models that saw it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from cowest_cli import erase as verb
from cowest_serving import store, traces
from cowest_training import forget
from cowest_training.contract import Manifest, Row
from cowest_training.data import write_jsonl
from cowest_training.forget import Part
from cowest_training.quarantine import PROVENANCE, QUARANTINE, lines, provenance_of, read_lines, suspect_record
from cowest_training.screen import Seen, Suspect
from cowest_training.steps import Output, open_output, read_manifest
from tests.loop import ledger_world

ANN, BOB = "a" * 64, "b" * 64
START = datetime(2026, 1, 1, tzinfo=UTC)


def seen(number: int, user: str, said_by: str = "") -> Seen:
    text = f"question {number}"
    row = Row(f"trace-t{number}", text, ({"role": "user", "content": text},), "7", source="trace")
    return Seen(row, f"t{number}", user=user, said_by=said_by)


ANNS, BOBS, BY_ANN, HELD = seen(1, ANN), seen(2, BOB), seen(3, BOB, said_by=ANN), seen(4, ANN)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Round 1 learnt from Ann and Bob, round 2 from Bob alone, on the model of round 1; round 0 from nobody."""
    root = (tmp_path / "store").as_uri()
    for number, user in ((1, ANN), (2, BOB), (3, BOB), (4, ANN)):
        write_trace(root, number, user)
    write_word(root, 1, "")
    write_word(root, 3, ANN)
    finish(root, 0, "sft", "Model", "sha256:m0", {"model": "sha256:base"})
    finish(root, 1, "collect", "Dataset", "sha256:d1", {}, files_of([ANNS, BOBS, BY_ANN], [HELD]))
    ledger = [
        entry
        for part in (ANNS, BOBS, BY_ANN)
        for entry in ledger_world.entries(part.row.id, 0.0, 0.0, 1.0, query=part.row.query)
    ]
    ledger_world.write_round(root, 1, ledger)
    finish(root, 1, "dpo", "Model", "sha256:m1", {"model": "sha256:m0"})
    finish(root, 2, "collect", "Dataset", "sha256:d2", {}, files_of([BOBS], []))
    bobs = ledger_world.entries(BOBS.row.id, 0.0, 0.0, 1.0, 0.0)
    ledger_world.write_round(root, 2, ledger_world.spared(bobs, 2, solo=False))
    finish(root, 2, "dpo", "Model", "sha256:m2", {"model": "sha256:m1"})
    finish(root, 3, "dpo", "Model", "sha256:m3", {"model": "sha256:m0"})
    return root


def finish(
    root: str, number: int, step: str, kind: str, digest: str, inputs: Mapping[str, Any], files: Any = None
) -> None:
    output = open_output(f"{root}/runs/r{number}/{step}", step=step, inputs=inputs)
    assert isinstance(output, Output)
    for name, data in (files or {}).items():
        (output.folder / name).write_bytes(data)
    output.finish(kind=kind, metrics={}, digest=digest)


def files_of(kept: list[Seen], held_back: list[Seen]) -> dict[str, bytes]:
    return {
        "dataset.jsonl": write_jsonl([Row("q0", "what?", ({"role": "user", "content": "what?"},), "1")])
        + write_jsonl([each.row for each in kept]),
        PROVENANCE: lines(map(provenance_of, kept)),
        QUARANTINE: lines(suspect_record(Suspect(each, "UserShare", "too much")) for each in held_back),
    }


def write_trace(root: str, number: int, user: str) -> None:
    text = f"question {number}"
    row = {
        "trace_id": f"t{number}", "time": START + timedelta(minutes=number), "status": "ok", "shadow": False,
        "user_hash": user, "query": text, "messages": json.dumps([{"role": "user", "content": text}]), "draft": "d",
        "answer": "a", "arm": "stable",
    }  # fmt: skip
    table = traces.table_of([orjson.dumps(row)], traces.TRACE_SCHEMA)
    store.put(store.join(root, "traces", "2026-01-01", f"120000-g-{number}.parquet"), traces.segment(table))


def write_word(root: str, number: int, source: str) -> None:
    row = {
        "trace_id": f"t{number}", "time": START + timedelta(days=1), "reference": "7", "comment": "mine", "score": 1.0,
        "source": source,
    }  # fmt: skip
    table = traces.table_of([orjson.dumps(row)], traces.FEEDBACK_SCHEMA)
    store.put(store.join(root, "feedback", "2026-01-02", f"120000-g-{number}.parquet"), traces.segment(table))


def everything(root: str) -> str:
    """All text that lies in the store, tables as they read."""
    found = []
    for uri in store.list_files(root):
        path = Path(uri.removeprefix("file://"))
        found.append(str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_text())
    return "\n".join(found)


# ---------------------------------------------------------------- the report
def test_the_report_follows_a_user_from_traces_to_the_models(root: str) -> None:
    report = forget.look(root, ANN, {"sha256:m2": "stable"})
    assert (report.traces, report.words) == (2, 2)
    assert [(part.round, part.digest, part.rows, part.held_back) for part in report.datasets] == [
        (1, "sha256:d1", 2, 1)
    ]
    assert [(part.round, part.drafts, part.pairs) for part in report.ledgers] == [(1, 4, 2)]
    uri = f"{root}/runs/"
    assert report.models == (
        Part(1, "dpo", f"{uri}r1/dpo", "sha256:m1", why="tuned on 2 of their pairs"),
        Part(2, "dpo", f"{uri}r2/dpo", "sha256:m2", why="made of sha256:m1", role="stable"),
    )
    assert report.clean == "sha256:m3"


def test_a_model_that_learnt_from_an_earlier_rounds_pairs_again_is_named(root: str) -> None:
    manifest = read_manifest(f"{root}/runs/r1/feedback")
    assert manifest is not None
    finish(root, 4, "dpo", "Model", "sha256:m4", {"model": "sha256:m0", "replayed": [manifest.digest]})
    last = forget.look(root, ANN).models[-1]
    assert (last.digest, last.why) == ("sha256:m4", "tuned on 2 of their pairs")


def test_who_gave_nothing_is_in_nothing(root: str) -> None:
    report = forget.look(root, "c" * 64)
    assert (report.traces, report.words, report.datasets, report.ledgers, report.models) == (0, 0, (), (), ())
    before = everything(root)
    place = forget.erase(root, report, by="me", why="asked")
    store.delete(place)
    assert everything(root) == before


def test_a_trace_leads_to_its_pairs_and_models(root: str) -> None:
    seen = forget.trail(root, "t2")
    assert [(part.round, part.rows) for part in seen.datasets] == [(1, 1), (2, 1)]
    assert [(part.round, part.pairs) for part in seen.ledgers] == [(1, 1), (2, 1)]
    assert [part.digest for part in seen.models] == ["sha256:m1", "sha256:m2"]
    assert [part.held_back for part in forget.trail(root, "t4").datasets] == [1]
    assert forget.trail(root, "nobody").models == ()


def test_looking_changes_nothing(root: str) -> None:
    before = everything(root)
    forget.look(root, ANN)
    assert everything(root) == before


def test_a_trace_is_followed_without_reading_what_everybody_said(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("read")

    for name in ("_segments", "_origins", "_unfinished"):
        monkeypatch.setattr(forget, name, refuse)
    assert [part.round for part in forget.trail(root, "t2").models] == [1, 2]


# ---------------------------------------------------------------- erasing
def test_nothing_of_the_user_is_left_and_all_of_others_is(root: str) -> None:
    report = forget.look(root, ANN)
    place = forget.erase(root, report, by="me", why="they asked")
    left = everything(root)
    for gone in (ANN, "question 1", "question 4", "trace-t1", "trace-t3", "trace-t4"):
        assert gone not in left, gone
    assert "question 2" in left and "trace-t2" in left and "what?" in left
    told = json.loads(store.get(place))
    assert (told["by"], told["why"], told["user"]) == ("me", "they asked", ANN[:12])
    assert [model["digest"] for model in told["models"]] == ["sha256:m1", "sha256:m2"]
    assert "begun" not in told, "the ids of the traces are no part of what is kept"


def test_counts_times_and_scores_stay(root: str) -> None:
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    rows = {row["trace_id"]: row for row in traces.read_traces(root).to_pylist()}
    assert len(rows) == 4
    assert (rows["t1"]["messages"], rows["t1"]["answer"], rows["t1"]["user_hash"], rows["t1"]["arm"]) == (
        None, None, "", "stable",
    )  # fmt: skip
    assert rows["t2"]["messages"] is not None
    words = {word["trace_id"]: word for word in traces.read_feedback(root).to_pylist()}
    assert (words["t1"]["reference"], words["t1"]["comment"], words["t1"]["score"]) == (None, None, 1.0)
    assert (words["t3"]["reference"], words["t3"]["source"]) == (None, "")


def test_the_manifest_names_the_files_as_they_are_and_the_content_as_it_was(root: str) -> None:
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    for step, digest in (("collect", "sha256:d1"), ("feedback", None)):
        uri = f"{root}/runs/r1/{step}"
        manifest = read_manifest(uri)
        assert isinstance(manifest, Manifest) and manifest.metrics["erased"] == 1
        assert digest in (None, manifest.digest)
        for name, sha256 in manifest.outputs.items():
            assert forget.sha256(store.get(f"{uri}/{name}")).hexdigest() == sha256
    untouched = read_manifest(f"{root}/runs/r2/feedback")
    assert untouched is not None and "erased" not in untouched.metrics


def test_erasing_again_finds_nothing_more(root: str) -> None:
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    again = forget.look(root, ANN)
    assert (again.traces, again.words, again.datasets, again.ledgers) == (0, 0, (), ())


def test_an_erasure_that_was_cut_off_goes_on(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the traces: their ids are known from what was written down first."""
    begun = {"begun": {"user": ANN, "trace_ids": ["t1", "t4"]}}
    store.put(store.join(root, forget.ERASURES, "x.json"), json.dumps(begun).encode())
    for number in (1, 4):
        store.delete(store.join(root, "traces", "2026-01-01", f"120000-g-{number}.parquet"))
    store.put(f"{root}/runs/r1/collect/{PROVENANCE}", b"")
    assert [part.pairs for part in forget.look(root, ANN).ledgers] == [1]
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    assert "trace-t1" not in everything(root) and ANN not in everything(root)


def test_a_row_that_the_user_answered_in_one_round_goes_from_all_and_the_report_says_so(root: str) -> None:
    """The reference of t3 was Ann's in round 1; Bob gave another one since."""
    finish(root, 4, "collect", "Dataset", "sha256:d4", {}, files_of([BOBS, seen(3, BOB, said_by=BOB)], []))
    finish(root, 5, "collect", "Dataset", "sha256:d5", {}, files_of([BOBS], [seen(3, BOB, said_by=BOB)]))
    report = forget.look(root, ANN)
    assert [(part.round, part.rows, part.held_back) for part in report.datasets] == [(1, 2, 1), (4, 1, 0), (5, 0, 1)]
    forget.erase(root, report, by="me", why="")
    left = {
        (number, name): [record["id"] for record in read_lines(f"{root}/runs/r{number}/collect/{name}")]
        for number in (4, 5)
        for name in ("dataset.jsonl", PROVENANCE, QUARANTINE)
    }
    assert left == {
        (4, "dataset.jsonl"): ["q0", "trace-t2"], (4, PROVENANCE): ["trace-t2"], (4, QUARANTINE): [],
        (5, "dataset.jsonl"): ["q0", "trace-t2"], (5, PROVENANCE): ["trace-t2"], (5, QUARANTINE): [],
    }  # fmt: skip


def erase_until(root: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann's data, killed once that file is written."""
    put = store.put

    def put_and_die(uri: str, data: bytes) -> None:
        put(uri, data)
        if uri.endswith(written):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "put", put_and_die)
        forget.erase(root, forget.look(root, ANN), by="me", why="they asked")


def test_such_a_row_goes_from_later_rounds_too_when_a_killed_erasure_goes_on(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(root, 4, "collect", "Dataset", "sha256:d4", {}, files_of([seen(3, BOB, said_by=BOB)], []))
    erase_until(root, "runs/r1/collect/manifest.json", monkeypatch)
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    assert [record["id"] for record in read_lines(f"{root}/runs/r4/collect/dataset.jsonl")] == ["q0"]


@pytest.mark.parametrize("after", ["runs/r1/feedback/manifest.json", "runs/r1/collect/manifest.json"])
def test_an_erasure_that_was_killed_names_the_models_when_it_goes_on(
    root: str, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Killed after the ledgers, or after the data sets too: no row leads to the models any more."""
    whole = forget.look(root, ANN, {"sha256:m2": "stable"})
    erase_until(root, after, monkeypatch)
    finish(root, 4, "dpo", "Model", "sha256:m4", {"model": "sha256:m2"})

    again = forget.look(root, ANN, {"sha256:m4": "stable"})
    assert (again.datasets, again.ledgers) == (whole.datasets, whole.ledgers)
    assert (again.traces, again.words, again.clean) == (whole.traces, whole.words, "sha256:m3")
    assert [(model.digest, model.why, model.role) for model in again.models] == [
        ("sha256:m1", "tuned on 2 of their pairs", ""),
        ("sha256:m2", "made of sha256:m1", ""),
        ("sha256:m4", "made of sha256:m2", "stable"),
    ]
    told = json.loads(store.get(forget.erase(root, again, by="me", why="they asked")))
    assert [model["digest"] for model in told["models"]] == ["sha256:m1", "sha256:m2", "sha256:m4"]
    assert ANN not in everything(root), "no unfinished report is left"
    assert forget.look(root, ANN).models == ()


def test_an_erasure_killed_at_its_very_end_has_told_what_it_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = {"begun": {"user": ANN, "trace_ids": ["t1", "t4"]}}
    store.put(store.join(root, forget.ERASURES, "x.json"), json.dumps(begun).encode())

    def die(uri: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "delete", die)
        forget.erase(root, forget.look(root, ANN), by="me", why="")
    told = [json.loads(store.get(uri)) for uri in store.list_files(store.join(root, forget.ERASURES))]
    assert ["sha256:m1", "sha256:m2"] in [[model["digest"] for model in each.get("models", ())] for each in told]


def test_a_user_is_found_after_retention_took_the_traces(root: str) -> None:
    store.delete(store.join(root, "traces"))
    report = forget.look(root, ANN)
    assert report.traces == 2 and [part.digest for part in report.models] == ["sha256:m1", "sha256:m2"]


def test_answers_to_their_queries_leave_the_book_and_stay_on_the_bill(root: str, tmp_path: Path) -> None:
    report = forget.look(root, ANN)
    book = tmp_path / "calls.sqlite"
    with closing(sqlite3.connect(book)) as db, db:
        db.execute("CREATE TABLE calls(key TEXT PRIMARY KEY, money REAL, text TEXT)")
        db.execute("CREATE TABLE completions(key TEXT PRIMARY KEY, request TEXT, body TEXT)")
        for key in (*report.calls, "another"):
            db.execute("INSERT INTO calls VALUES (?, 1.0, 'an answer')", (key,))
            db.execute("INSERT INTO completions VALUES (?, 'asked', 'an answer')", (key,))
    assert verb.blank(book, report.calls) == len(report.calls) > 0
    with closing(sqlite3.connect(book)) as db:
        assert db.execute("SELECT SUM(money), COUNT(*) FROM calls").fetchone() == (
            len(report.calls) + 1,
            len(report.calls) + 1,
        )
        assert db.execute("SELECT key FROM calls WHERE text <> ''").fetchall() == [("another",)]
        assert db.execute("SELECT key FROM completions").fetchall() == [("another",)]


def test_the_rows_that_are_left_read_as_before(root: str) -> None:
    forget.erase(root, forget.look(root, ANN), by="me", why="")
    rows = read_lines(f"{root}/runs/r1/collect/dataset.jsonl")
    assert [row["id"] for row in rows] == ["q0", "trace-t2"]
    ledger = pq.read_table(Path(root.removeprefix("file://")) / "runs/r1/feedback/ledger.parquet")
    assert set(ledger["query_id"].to_pylist()) == {"trace-t2"}
