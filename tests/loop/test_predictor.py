"""The predictor's way: learnt from a gain ledger, measured on held-out queries, gone by at the gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cowest_serving.contract import PREDICTOR_FILE, PredictorRef, RouteLimits, Shortcuts, digest_of
from cowest_serving.predictor import BUCKETS, Head, Predictor, dump_predictor, features, load_predictor
from cowest_serving.traces import TraceWriter
from cowest_training import evaluate, predictor, steps
from cowest_training.asking import Draft, Reply
from cowest_training.collect import usable_traces
from cowest_training.contract import LEDGER, Evaluator, Manifest, Row, StepError, load_report
from cowest_training.data import Known
from cowest_training.feedback import Entry, write_ledger
from tests.fakes import ScriptedModel
from tests.loop import asking_world as world
from tests.loop.test_gateway import Gateway, streamed
from tests.loop.test_gateway import world as gateway_world

LIMITS = {"maxLoss": "0.05", "explorePercent": 10}
BOTH = {"strongAlone": LIMITS, "weakAlone": LIMITS}
TALK, DOMAIN = ("hello", "thanks", "bye"), ("freight", "customs", "tariff")


@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


def texts(n: int) -> list[str]:
    return [f"{(TALK if i % 2 else DOMAIN)[i % 3]} {i % 17} {(TALK if i % 2 else DOMAIN)[i % 2]}" for i in range(n)]


class Step:
    """A ledger in which drafts help with all questions of the domain, and the strong model with none of the talk."""

    def __init__(self, folder: Path, strong: ScriptedModel, n: int = 120, shortcuts: Any = BOTH) -> None:
        self.folder, self.strong = folder, strong
        rows = [
            {"id": f"q{i}", "query": text, "reference": "7" if i % 2 == 0 else "ok"} for i, text in enumerate(texts(n))
        ]
        self.data = world.write_rows(folder / "train.jsonl", rows)
        collaboration = {"shortcuts": shortcuts} if shortcuts else {}
        self.job = world.write_job(folder / "job.json", strong.url, collaboration=collaboration)
        self.pair = world.make_pair(folder / "weak", strong)
        output = steps.open_output(str(folder / "feedback"), step="feedback", inputs={"n": n})
        assert not isinstance(output, Manifest)
        entries = [entry for row in world.parsed(rows) for entry in self._entries(row)]
        write_ledger(output.folder / LEDGER, entries, self.pair, "sha256:e")
        output.finish(kind="Feedback", metrics={})

    def _entries(self, row: Row) -> list[Entry]:
        is_talk = row.reference == "ok"
        draft, helps = ("ok", 1.0) if is_talk else ("it is 7, I think", 1.0)
        alone = Reply(row.reference if is_talk else "no idea", "c", "fp_1", "big")
        reply = Reply(row.reference, "c", "fp_1", "big")
        return [
            Entry(row, Draft(row.id, k, k, draft, 3), reply, helps, alone, 1.0 if is_talk else 0.0) for k in range(2)
        ]

    def run(self, out: str = "predictor") -> Manifest:
        flags = {"--job": self.job, "--feedback": self.folder / "feedback", "--dataset": self.data,
                 "--calls": self.folder / "calls", "--round": 1, "--out": self.folder / out}  # fmt: skip
        predictor.main([str(part) for flag in flags.items() for part in flag])
        manifest = steps.read_manifest(str(self.folder / out))
        assert manifest
        return manifest

    def learnt(self, out: str = "predictor") -> Predictor:
        return load_predictor((self.folder / out / PREDICTOR_FILE).read_bytes())


def test_both_shortcuts_are_learnt_from_what_drafts_were_worth(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    manifest = step.run()
    assert (manifest.kind, manifest.metrics["queries"]) == ("Predictor", 120)
    data = (tmp_path / "predictor" / PREDICTOR_FILE).read_bytes()
    assert manifest.digest == digest_of(data) and "freight" not in data.decode()
    learnt = step.learnt()
    for name in ("strongAlone", "weakAlone"):
        assert [learnt.route(text, [name]) for text in ("hello 4 thanks", "customs 4 freight")] == [name, None]
    assert 0.3 < manifest.metrics["strongAlone"]["routed"] <= 0.55
    card = (tmp_path / "predictor" / "README.md").read_text()
    assert manifest.digest in card and "weakAlone" in card
    assert not strong.calls, "an evaluator that goes by rules costs no call"


def test_the_same_work_is_not_done_again_and_gives_the_same_bytes(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    first, again, other = step.run(), step.run(), step.run(out="other")
    assert first.started == again.started and first.digest == other.digest


def test_a_query_that_was_not_asked_whole_is_not_learnt_from(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    ledger = tmp_path / "feedback" / LEDGER
    records = pq.read_table(ledger).to_pylist()
    rows = {record["query_id"]: Row(record["query_id"], record["query"], (), "7") for record in records}
    records[1] |= {"answer": None, "answer_score": None, "gain": None}
    assert [query.row.id for query in predictor.by_query(records, rows)] == list(rows)[1:]
    assert step.run().metrics["queries"] == len(rows)


def test_only_what_is_declared_is_learnt(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, shortcuts={"strongAlone": BOTH["strongAlone"]})
    assert set(step.run().metrics) == {"queries", "strongAlone"}
    assert set(step.learnt().heads) == {"strongAlone"}
    (none := tmp_path / "none").mkdir()
    with pytest.raises(StepError, match="wanted strongAlone or weakAlone"):
        Step(none, strong, shortcuts=None).run()


def test_a_small_ledger_routes_nothing_and_says_so(
    tmp_path: Path, strong: ScriptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step(tmp_path, strong, n=20)
    step.run()
    assert not step.learnt().heads
    assert "nothing will be routed" in capsys.readouterr().err


# ---------------------------------------------------------------- measured
def words(*routed: str) -> Head:
    weights = [0.0] * BUCKETS
    for word in routed:
        weights[features(word)[0]] = -40.0
    return Head(weights, 4.0, 0.5)


def evaluated(folder: Path, strong: ScriptedModel, heads: dict[str, Head], control: bool = False) -> Any:
    pair = world.make_pair(folder / "weak", strong)
    output = steps.open_output(str(folder / "predictor"), step="predictor", inputs={})
    assert not isinstance(output, Manifest)
    (output.folder / PREDICTOR_FILE).write_bytes(dump_predictor(Predictor(heads)))
    output.finish(kind="Predictor", metrics={})
    flags = {
        "--job": world.write_job(folder / "job.json", strong.url),
        "--candidate": world.write_pair(folder / "candidate.json", pair),
        "--control": world.write_pair(folder / "control.json", pair) if control else "solo",
        "--held-out": world.write_rows(folder / "held_out.jsonl", world.rows()),
        "--calls": folder / "calls", "--out": folder / "out", "--predictor": folder / "predictor",
    }  # fmt: skip
    evaluate.main([str(part) for flag in flags.items() for part in flag])
    return load_report(json.loads((folder / "out" / "report.json").read_text()))


def test_the_loss_is_that_of_the_queries_that_would_be_routed(tmp_path: Path, strong: ScriptedModel) -> None:
    report = evaluated(tmp_path, strong, {"strongAlone": words("beta", "gamma", "delta", "theta")})
    items = evaluate.pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    routed = [item for item in items if any(word in item["query"] for word in ("beta", "gamma", "delta", "theta"))]
    lost = sum(item["candidate_score"] - item["solo_score"] for item in routed) / len(items)
    (seen,) = report.routes
    assert (seen.arm, seen.shortcut, seen.n, seen.routed) == ("candidate", "strongAlone", 8, 4)
    assert lost > 0 and seen.loss == pytest.approx(lost)
    assert seen.low <= seen.loss <= seen.high
    assert report.predictor == digest_of((tmp_path / "predictor" / PREDICTOR_FILE).read_bytes())


def test_nothing_lost_in_few_queries_is_no_proof(tmp_path: Path, strong: ScriptedModel) -> None:
    report = evaluated(tmp_path, strong, {"strongAlone": words("nothing")})
    assert [(seen.routed, seen.loss, seen.high) for seen in report.routes] == [(0, 0.0, 3 / 8)]


def test_a_draft_as_the_answer_is_measured_for_the_candidate_alone(tmp_path: Path, strong: ScriptedModel) -> None:
    heads = {"weakAlone": words("beta"), "strongAlone": words("beta")}
    report = evaluated(tmp_path, strong, heads, control=True)
    assert {(seen.arm, seen.shortcut) for seen in report.routes} == {
        ("candidate", "weakAlone"), ("candidate", "strongAlone"), ("control", "strongAlone"),
    }  # fmt: skip


# ---------------------------------------------------------------- gone by
def gone_by(folder: Path, *shortcuts: str, explore: int = 10, **heads: Head) -> dict[str, Any]:
    """What `gateway_world` needs for an arm with this predictor."""
    data = dump_predictor(Predictor(heads))
    (folder / PREDICTOR_FILE).write_bytes(data)
    ref = PredictorRef((folder / PREDICTOR_FILE).as_uri(), digest_of(data), shortcuts)
    limits = RouteLimits(0.05, explore)
    return {"arm": {"predictor": ref}, "shortcuts": Shortcuts(strong_alone=limits, weak_alone=limits)}


async def ask(door: Gateway, text: str, **options: Any) -> Any:
    completion, headers = await door.ask(messages=[{"role": "user", "content": text}], **options)
    return completion.choices[0].message.content, headers["x-cowest-mode"]


async def until_routed(door: Gateway) -> None:
    async with asyncio.timeout(10):
        while "cowest_routed_total" not in await door.metrics():
            await ask(door, "hello")


async def test_a_query_that_needs_no_draft_gets_the_strong_model_alone(tmp_path: Path) -> None:
    options = gone_by(tmp_path, "strongAlone", strongAlone=words("hello"), explore=1)
    async with gateway_world(tmp_path, **options) as (weak, strong, door):
        await until_routed(door)
        weak.calls.clear()
        answers = [await ask(door, "hello") for _ in range(20)]
        drafts = len(weak.calls)
        assert await ask(door, "customs") == ("the answer", "Pair")
        rows = await door.rows()
    routed = [row for row in rows if row["shortcut"] == "strongAlone"]
    assert len(routed) >= 15 and drafts == 20 - sum(mode == "StrongAlone" for _, mode in answers)
    assert {row["mode"] for row in routed} == {"StrongAlone"} and {row["propensity"] for row in routed} == {0.99}
    assert {row["propensity"] for row in rows if "customs" in row["query"]} == {1.0}
    alone = [call.last for call in strong.calls if call.last.startswith("SOLO")]
    assert len(alone) == len(routed) and set(alone) == {"SOLO hello"}


async def test_a_query_that_needs_no_strong_model_gets_the_draft_whole_and_streamed(tmp_path: Path) -> None:
    options = gone_by(tmp_path, "weakAlone", weakAlone=words("hello"), explore=1)
    async with gateway_world(tmp_path, **options) as (_, strong, door):
        await until_routed(door)
        found = [await ask(door, "hello") for _ in range(20)]
        text, _, headers = await streamed(door, messages=[{"role": "user", "content": "hello"}])
        asked = len(strong.calls)
        with_form = await ask(door, "hello", response_format={"type": "json_object"})
        row = next(row for row in await door.rows() if row["shortcut"] == "weakAlone")
    assert ("a hint", "WeakAlone") in found
    assert (text, headers["x-cowest-mode"]) in (("a hint", "WeakAlone"), ("the answer", "Pair"))
    assert with_form == ("the answer", "Pair") and len(strong.calls) == asked + 1
    assert (row["answer"], row["mode"], row["status"], row["strong_output_tokens"]) == ("a hint", "WeakAlone", "ok", 0)


async def test_a_weak_model_that_fails_leaves_the_question_to_the_strong_one(tmp_path: Path) -> None:
    options = gone_by(tmp_path, "weakAlone", weakAlone=words("hello"), explore=1)
    async with gateway_world(tmp_path, **options) as (weak, _, door):
        await until_routed(door)
        weak.faults = [500] * 8
        found = [await ask(door, "hello") for _ in range(3)]
    assert found == [("the answer", "StrongAlone")] * 3


async def test_what_is_routed_by_chance_goes_the_usual_way_as_often_as_it_is_said(tmp_path: Path) -> None:
    options = gone_by(tmp_path, "strongAlone", strongAlone=words("hello"), explore=50)
    async with gateway_world(tmp_path, **options) as (_, _, door):
        await until_routed(door)
        for _ in range(60):
            await ask(door, "hello")
        rows = [row for row in await door.rows() if row["propensity"] < 1]
        metrics = await door.metrics()
    usual = [row for row in rows if row["shortcut"] == ""]
    assert {row["propensity"] for row in rows} == {0.5}
    assert 0.2 < len(usual) / len(rows) < 0.8, "in 60 draws a share beyond these is one in a million"
    assert {row["mode"] for row in usual} == {"Pair"}
    assert f'cowest_routed_total{{shortcut="strongAlone",went="usual"}} {len(usual)}' in metrics


async def test_an_arm_without_a_predictor_draws_no_lot(tmp_path: Path) -> None:
    options = gone_by(tmp_path, "strongAlone", strongAlone=words("hello"))
    async with gateway_world(tmp_path, **options | {"arm": {}}) as (weak, _, door):
        assert await ask(door, "hello") == ("the answer", "Pair")
        row = await door.row()
    assert (row["propensity"], row["shortcut"], len(weak.calls)) == (1.0, "", 1)


# ---------------------------------------------------------------- learnt from
async def test_rounds_learn_from_all_queries_alike_whatever_way_they_went(tmp_path: Path) -> None:
    """What a round takes from a trace is the question and its late reference: not the way in which it was answered."""
    ways: Sequence[dict[str, Any]] = (
        {"mode": "Pair", "shortcut": "", "propensity": 1.0},
        {"mode": "Pair", "shortcut": "", "propensity": 0.1},
        {"mode": "StrongAlone", "shortcut": "strongAlone", "propensity": 0.9},
        {"mode": "WeakAlone", "shortcut": "weakAlone", "propensity": 0.9},
        {"mode": "Pair", "shortcut": "draftCache,hedge", "propensity": 1.0},
        {"mode": "Pair", "shortcut": None, "propensity": None},
    )
    now = datetime.now(UTC)
    writer = TraceWriter(str(tmp_path), "w")
    for i, way in enumerate(ways):
        messages = json.dumps([{"role": "user", "content": f"question {i}"}])
        writer.add({"trace_id": f"t{i}", "time": now, "status": "ok", "shadow": False, "messages": messages, **way})
    await writer.aclose()
    usable = usable_traces(str(tmp_path), Evaluator("Judge", endpoint="http://j/v1", model="j"), Known(()))
    assert [row.query for row in usable.rows] == [f"question {i}" for i in range(len(ways))]
    assert not usable.excluded
