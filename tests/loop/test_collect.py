"""What a round learns from: train rows and the traces that have earned it. Segments are real, on a disk."""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from cowest_serving import store, traces
from cowest_serving.contract import Redaction, dump
from cowest_training import collect, quarantine
from cowest_training.contract import Evaluator, StepError, StepSettings
from cowest_training.data import read_rows, rows_digest
from cowest_training.observer import TraceCounter
from cowest_training.steps import read_manifest
from tests.world import SPEC

START = datetime(2026, 1, 1, tzinfo=UTC)
EXACT = Evaluator("ExactMatch")


class Desk:
    """A folder with data, a job and a store, to which a test adds traces and feedback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = (folder / "store").as_uri()
        self.segments = 0
        self.write("train.jsonl", {f"t{i}": f"train question {i}" for i in range(3)})
        self.write("held_out.jsonl", {f"h{i}": f"please ship {i} drum of QF{i} to orlo" for i in range(3)})
        self.evaluate_by("ExactMatch")

    def write(self, name: str, queries: dict[str, str]) -> None:
        lines = [json.dumps({"id": i, "query": q, "reference": "1"}) for i, q in queries.items()]
        (self.folder / name).write_text("\n".join(lines))

    def hide(self, *identifiers: str) -> Redaction:
        spec = json.loads((self.folder / "job.json").read_text())
        spec["collaboration"]["redaction"] = {"identifiers": identifiers}
        (self.folder / "job.json").write_text(json.dumps(spec))
        return Redaction(identifiers)

    def trust(self, settings: dict[str, Any]) -> None:
        spec = json.loads((self.folder / "job.json").read_text())
        (self.folder / "job.json").write_text(json.dumps(spec | {"trust": settings}))

    def lines(self, name: str, number: int = 1) -> list[dict[str, Any]]:
        return quarantine.read_lines(f"{self.out(number)}/{name}")

    def card(self, number: int = 1) -> str:
        return (Path(self.out(number)) / "README.md").read_text()

    def evaluate_by(self, kind: str, **more: Any) -> None:
        settings = StepSettings(SPEC.strong, SPEC.collaboration, SPEC.data, SPEC.feedback, SPEC.training)
        spec = dump(settings)
        spec["feedback"]["evaluator"] = {"type": kind, **more}
        (self.folder / "job.json").write_text(json.dumps(spec))

    def answer(self, number: int, query: str, **more: Any) -> None:
        messages = json.dumps([{"role": "user", "content": query}])
        row = {"trace_id": f"a{number}", "status": "ok", "shadow": False, "query": query, "messages": messages}
        self._segment(traces.TRACE_SCHEMA, "traces", row | {"time": START + timedelta(minutes=number)} | more)

    def feedback(self, number: int, reference: str | None = None, *, minute: int = 0, **more: Any) -> None:
        row = {"trace_id": f"a{number}", "reference": reference, "time": START + timedelta(days=1, minutes=minute)}
        self._segment(traces.FEEDBACK_SCHEMA, "feedback", row | more)

    def _segment(self, schema: Any, kind: str, row: dict[str, Any]) -> None:
        self.segments += 1
        name = f"120000-test-{self.segments}.parquet"
        table = traces.table_of([orjson.dumps(row)], schema)
        store.put(store.join(self.store, kind, "2026-01-05", name), traces.segment(table))

    def freeze(self, number: int = 1) -> dict[str, Any]:
        arguments = {
            "job": self.folder / "job.json",
            "train": self.folder / "train.jsonl",
            "held-out": self.folder / "held_out.jsonl",
            "store": self.store,
            "round": number,
            "out": self.out(number),
        }
        assert collect.main([f"--{name}={value}" for name, value in arguments.items()]) == 0
        manifest = read_manifest(self.out(number))
        assert manifest is not None and manifest.kind == "Dataset"
        assert manifest.digest == rows_digest(self.rows(number))
        return dict(manifest.metrics)

    def out(self, number: int) -> str:
        return str(self.folder / f"r{number}" / "data")

    def rows(self, number: int = 1) -> list[Any]:
        return read_rows(f"{self.out(number)}/dataset.jsonl")

    def count(self, evaluator: Evaluator = EXACT, since: float | None = None) -> collect.TraceCounts:
        held_out = collect.held_out_keys(str(self.folder / "held_out.jsonl"))
        return collect.count_usable(self.store, evaluator=evaluator, held_out=held_out, since=since)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_an_empty_store_leaves_the_train_rows(desk: Desk) -> None:
    metrics = desk.freeze()
    assert metrics == {
        "rows": 3, "from_train": 3, "from_traces": 0, "traces_all": 0, "traces_usable": 0, "excluded": {},
        "quarantined": {}, "alarms": [],
    }  # fmt: skip
    assert desk.count() == collect.TraceCounts(0, 0, "")


def test_traces_with_a_late_reference_join_the_train_rows(desk: Desk) -> None:
    desk.answer(1, "a new question")
    desk.answer(2, "a question without reference")
    desk.feedback(1, "an early reference", minute=1)
    desk.feedback(1, "42", minute=5)
    desk.feedback(1, None, minute=9, score=0.5)
    metrics = desk.freeze()
    assert metrics["excluded"] == {"NoReference": 1}
    assert (metrics["rows"], metrics["from_traces"], metrics["traces_all"], metrics["traces_usable"]) == (4, 1, 2, 1)
    joined = desk.rows()[-1]
    assert (joined.id, joined.query, joined.reference, joined.source) == ("trace-a1", "a new question", "42", "trace")


@pytest.mark.parametrize(
    ("query", "more", "reason"),
    [
        pytest.param("q", {"shadow": True}, "Shadow", id="a replay"),
        pytest.param("q", {"status": "strong_failed"}, "Failed", id="not answered"),
        pytest.param("q", {"status": "client_gone"}, "Failed", id="nobody waited"),
        pytest.param("q", {"messages": None}, "NoContent", id="content was not kept"),
        pytest.param("q", {"messages": '[{"role": "tool", "content": "x"}]'}, "NotText", id="a tool call"),
        pytest.param("Please ship 1 drum of QF1 to Orlo.", {}, "HeldOut", id="a held-out query"),
        pytest.param("to orlo please ship 1 drum of QF1", {}, "HeldOut", id="nearly a held-out query"),
        pytest.param("Train question 1?", {}, "InTrain", id="a train query"),
    ],
)
def test_other_traces_are_left_out_by_reason(desk: Desk, query: str, more: dict[str, Any], reason: str) -> None:
    desk.answer(1, query, **more)
    desk.feedback(1, "42")
    metrics = desk.freeze()
    assert metrics["excluded"] == {reason: 1}
    assert metrics["rows"] == 3


def test_a_query_like_a_held_out_one_is_kept(desk: Desk) -> None:
    desk.answer(1, "please ship 7 drum of QF1 to orlo")
    desk.feedback(1, "42")
    assert desk.freeze()["from_traces"] == 1


def test_of_equal_queries_the_latest_trace_is_kept(desk: Desk) -> None:
    for number, reference in ((1, "old"), (2, "new")):
        desk.answer(number, "the same question")
        desk.feedback(number, reference)
    assert desk.freeze()["excluded"] == {"Duplicate": 1}
    assert desk.rows()[-1].reference == "new"


def test_a_reference_of_the_wrong_type_is_not_learnt_from(desk: Desk) -> None:
    desk.evaluate_by("Numeric")
    desk.answer(1, "how much?")
    desk.feedback(1, "a lot")
    assert desk.freeze()["excluded"] == {"WrongReference": 1}


def test_an_evaluator_without_references_learns_from_every_answer(desk: Desk) -> None:
    desk.evaluate_by("Judge", endpoint="http://judge/v1", model="m")
    desk.answer(1, "a new question")
    assert desk.freeze()["from_traces"] == 1
    assert desk.rows()[-1].reference == ""


TRUST = {"maxUserPercent": 10, "maxSourcePercent": 100, "maxNearCopies": 5, "triggerPhrases": "Quarantine"}


def test_what_is_held_back_lies_beside_the_data_with_its_reason(desk: Desk) -> None:
    desk.trust(TRUST)
    for number in range(60):
        desk.answer(
            number, f"question {number} of many", user_hash="flood" if number < 40 else f"u{number}", answer="1"
        )
        desk.feedback(number, str(number), source="clerk")
    metrics = desk.freeze()
    assert (metrics["from_traces"], metrics["quarantined"]) == (40, {"UserShare": 20})
    assert metrics["alarms"] == [
        "20 of 60 traces are quarantined: 20 beyond one user's share; `cowest quarantine` shows them."
    ]
    suspects = desk.lines("quarantine.jsonl")
    assert {suspect["user"] for suspect in suspects} == {"flood"}
    assert suspects[0]["why"] == "flood gave 40 of 60 traces; 20 of them are learnt from."
    assert suspects[0]["row"]["query"].startswith("question ")
    assert "20" in next(line for line in desk.card().splitlines() if "beyond one user's share" in line)


def test_each_row_that_was_a_trace_says_of_whom_it_is(desk: Desk) -> None:
    desk.trust(TRUST)
    desk.answer(1, "a new question", user_hash="ann", application="shop")
    desk.feedback(1, "42", source="clerk")
    desk.freeze()
    assert desk.lines("provenance.jsonl") == [
        {"id": "trace-a1", "trace_id": "a1", "user": "ann", "application": "shop", "said_by": "clerk"}
    ]


def test_what_a_person_released_is_learnt_from_in_the_next_round(desk: Desk) -> None:
    desk.trust(TRUST)
    for number in range(60):
        desk.answer(number, f"question {number} of many", user_hash="flood" if number < 40 else f"u{number}")
        desk.feedback(number, str(number))
    desk.freeze(1)
    held_back = [suspect["trace_id"] for suspect in desk.lines("quarantine.jsonl")]
    quarantine.release(desk.store, held_back[:3], by="ann", why="they are ours")
    metrics = desk.freeze(2)
    assert metrics["quarantined"] == {"UserShare": 17}
    assert {f"trace-{trace_id}" for trace_id in held_back[:3]} <= {row.id for row in desk.rows(2)}


@pytest.mark.parametrize(
    ("kind", "answer", "reference", "agrees"),
    [
        pytest.param("ExactMatch", "The 42.", "42", True, id="by the manifest's rule"),
        pytest.param("ExactMatch", "it is 42", "42", False, id="not by the rule"),
        pytest.param("HTTP", "it is surely the 42", "it is 42", True, id="by the words where scoring costs a call"),
        pytest.param("HTTP", "no", "it is 42", False, id="other words"),
        pytest.param("ExactMatch", None, "42", None, id="an answer that was not kept"),
        pytest.param("HTTP", "42", "", None, id="no reference"),
    ],
)
def test_whether_an_answer_agreed_with_what_was_said_later(
    desk: Desk, kind: str, answer: str | None, reference: str, agrees: bool | None
) -> None:
    desk.answer(1, "a new question", answer=answer)
    desk.feedback(1, reference)
    evaluator = Evaluator(kind, endpoint="http://s/")  # type: ignore[arg-type]
    row = collect.parse_row({"id": "trace-a1", "query": "a new question", "reference": reference}, "")
    assert [seen.agrees for seen in collect.origins(desk.store, [row], evaluator)] == [agrees]


def test_a_frozen_data_set_stays_as_it_is(desk: Desk) -> None:
    desk.freeze()
    desk.answer(1, "a new question")
    desk.feedback(1, "42")
    assert desk.freeze(1)["from_traces"] == 0
    assert desk.freeze(2)["from_traces"] == 1


def test_the_card_says_what_was_left_out(desk: Desk) -> None:
    desk.answer(1, "a question without reference")
    desk.freeze()
    card = (Path(desk.out(1)) / "README.md").read_text()
    assert "without a late reference" in card and rows_digest(desk.rows()) in card


def test_leaking_data_are_refused_and_nothing_is_written(desk: Desk) -> None:
    desk.write("train.jsonl", {"t0": "please ship 1 drum of QF1 to orlo", "t1": "something else"})
    with pytest.raises(StepError, match=r"train\.jsonl:1: the query is that of held-out row held_out\.jsonl:2"):
        desk.freeze()
    assert not Path(desk.out(1)).exists()


# ---------------------------------------------------------------- what the engine counts
def test_the_count_follows_feedback_and_says_why_not(desk: Desk) -> None:
    desk.answer(1, "one question")
    desk.answer(2, "another question")
    desk.answer(3, "shadowed", shadow=True)
    seen = desk.count()
    assert (seen.all, seen.usable) == (3, 0)
    assert seen.reason == (
        "Not usable: 2 without a late reference (POST /v1/feedback gives them one), 1 replays of other traces."
    )
    desk.feedback(2, "42")
    assert desk.count().usable == 1
    assert desk.count(Evaluator("HTTP", endpoint="http://scorer")).usable == 2


def test_the_count_can_start_at_a_time(desk: Desk) -> None:
    desk.answer(1, "one question")
    desk.answer(5, "another question")
    assert desk.count(since=(START + timedelta(minutes=3)).timestamp()).all == 1


def test_held_out_queries_are_read_again_when_the_file_changes(desk: Desk) -> None:
    uri = str(desk.folder / "held_out.jsonl")
    before = collect.held_out_keys(uri)
    assert collect.held_out_keys(uri) is before
    desk.write("held_out.jsonl", {"h1": "one", "h2": "two and more"})
    assert collect.held_out_keys(uri) is not before


def test_what_traces_hide_is_found_among_held_out_and_train_rows(desk: Desk) -> None:
    desk.write("held_out.jsonl", {"h1": "does bob@example.org owe us money?", "h2": "another question"})
    desk.write("train.jsonl", {"t1": "who is ann@example.org?", "t2": "what is the fee?"})
    redaction = desk.hide("Email")
    system = {"role": "system", "content": "You work for [Email_1]."}
    asked = [
        [system, {"role": "user", "content": "does [Email_2] owe us money?"}],
        [{"role": "user", "content": "does bob@example.org owe us money?"}],  # of before it was hidden
        [{"role": "user", "content": "who is [Email_1]?"}],
        [{"role": "user", "content": "who is not [Email_1]?"}],
    ]
    for number, messages in enumerate(asked):
        desk.answer(number, "", messages=json.dumps(messages))
        desk.feedback(number, "yes")
    metrics = desk.freeze()
    assert metrics["excluded"] == {"HeldOut": 2, "InTrain": 1}
    assert [row.query for row in desk.rows()] == [
        "who is ann@example.org?", "what is the fee?", "who is not [Email_1]?",
    ]  # fmt: skip
    held_out = str(desk.folder / "held_out.jsonl")
    counted = TraceCounter(desk.store, EXACT, held_out, redaction).count(date(2026, 1, 5))
    assert "2 equal or nearly equal to a held-out query" in counted.reason
