"""The feedback step over a tiny weak model and a strong model on loopback: ledger, pairs, money, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cowest_serving.collaborate import draft_messages
from cowest_serving.models import ModelError
from cowest_training import feedback
from cowest_training.contract import EXIT_BAD_INPUT, LEDGER_COLUMNS, Manifest, StepError
from cowest_training.steps import leaves, read_manifest
from tests.fakes import ScriptedModel
from tests.loop import asking_world as world


@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


class Step:
    """One feedback step in a folder of its own."""

    def __init__(self, folder: Path, strong: ScriptedModel, rows: Any = None, **sections: Any) -> None:
        self.folder = folder
        self.pair = world.make_pair(folder / "weak", strong)
        self.data = world.write_rows(folder / "train.jsonl", world.rows() if rows is None else rows)
        self.job = world.write_job(folder / "job.json", strong.url, **sections)
        self.pair_file = world.write_pair(folder / "pair.json", self.pair)

    def run(self, out: str = "out", round_number: int = 1, calls: str = "calls") -> Manifest:
        flags = {
            "--job": self.job,
            "--pair": self.pair_file,
            "--dataset": self.data,
            "--calls": self.folder / calls,
            "--round": round_number,
            "--out": self.folder / out,
            "--progress": self.folder / "progress.json",
        }
        feedback.main([str(part) for flag in flags.items() for part in flag])
        manifest = read_manifest(str(self.folder / out))
        assert manifest
        return manifest

    def ledger(self, out: str = "out") -> list[dict[str, Any]]:
        return pq.read_table(self.folder / out / "ledger.parquet").to_pylist()  # type: ignore[no-any-return]

    def pairs(self, out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / out / "pairs.jsonl").read_text().splitlines()]


def test_the_ledger_says_of_each_draft_what_it_was_worth(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    manifest = step.run()
    ledger = step.ledger()
    assert list(ledger[0]) == list(LEDGER_COLUMNS)
    assert len(ledger) == 8 * 4
    for line in ledger:
        right = world.likes(line["query"] + line["draft"].strip())
        assert line["answer_score"] == float(right), line
        assert line["solo_score"] == float("alpha" in line["query"])
        assert line["gain"] == line["answer_score"] - line["solo_score"]
        assert line["weak_digest"] == step.pair.weak_digest
        assert (line["strong_model"], line["strong_version"]) == ("scripted", "fp_1")
    assert len({line["draft"] for line in ledger}) > 8, "drafts of one query differ"
    metrics = manifest.metrics
    distinct = {(line["query_id"], line["draft"].strip()) for line in ledger}
    assert metrics["strong_calls"] == len(strong.paid) == len(distinct) + 8
    assert metrics["pairs"] == len(step.pairs())
    assert 0 < metrics["pairs"] <= 8
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 8


def test_a_pair_holds_what_the_weak_model_saw_and_two_drafts_that_differ(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.run()
    scores = {(line["query_id"], line["draft"]): line["answer_score"] for line in step.ledger()}
    queries = {row.id: row for row in world.parsed(world.rows())}
    for pair in step.pairs():
        assert pair["prompt"] == draft_messages(queries[pair["query_id"]].messages, world.PROMPTS)
        assert scores[pair["query_id"], pair["chosen"]] == pair["chosen_score"] == 1.0
        assert scores[pair["query_id"], pair["rejected"]] == pair["rejected_score"] == 0.0


def test_the_same_inputs_give_the_same_ledger_and_no_second_bill(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    first = step.run()
    paid = len(strong.paid)
    second = step.run(out="again")
    assert step.ledger() == step.ledger("again")
    assert first.digest == second.digest
    assert len(strong.calls) == paid
    assert second.metrics["strong_calls"] == first.metrics["strong_calls"], "paid for by this very work, though before"
    step.run()  # finished already: nothing is loaded, nothing asked
    assert len(strong.calls) == paid


def test_another_round_draws_other_drafts_but_pays_solo_answers_once(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.run()
    solo_before = sum("DRAFT" not in call.last for call in strong.calls)
    step.run(out="round2", round_number=2)
    drafts = [{(x["query_id"], x["draft"]) for x in step.ledger(out) if x["draft_index"]} for out in ("out", "round2")]
    assert drafts[0] != drafts[1]
    assert sum("DRAFT" not in call.last for call in strong.calls) == solo_before == 8


def test_a_step_that_was_cut_off_goes_on_without_drawing_or_paying_again(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.run(out="undisturbed", calls="other")
    wanted = step.ledger("undisturbed")
    asked = len(strong.paid)

    strong.faults = [None] * 10 + [500] * 1000
    with pytest.raises(ExceptionGroup) as cut:
        step.run()
    assert all(isinstance(error, ModelError) and error.retryable for error in leaves(cut.value))
    assert not (tmp_path / "out").exists(), "nothing half-written"
    assert list((tmp_path / "calls.drafts").iterdir()), "drafts are kept for the next run"

    strong.faults = []
    (tmp_path / "weak" / "model.safetensors").unlink()  # not needed any more: all drafts are on disk
    step.run()
    assert step.ledger() == wanted
    assert len(strong.paid) == asked, "the scripted model honours keys: both books together paid each call once"
    assert not list((tmp_path / "calls.drafts").iterdir())


def test_a_query_that_the_strong_model_refuses_is_left_out(tmp_path: Path, strong: ScriptedModel) -> None:
    strong.faults = [400]
    manifest = Step(tmp_path, strong).run()
    assert (manifest.metrics["queries"], manifest.metrics["skipped"]) == (7, 1)


def test_a_strong_model_that_refuses_everything_is_bad_input(tmp_path: Path, strong: ScriptedModel) -> None:
    strong.faults = [404] * 1000
    with pytest.raises(StepError, match=r"None of the 8 queries.*404") as error:
        Step(tmp_path, strong).run()
    assert error.value.code == EXIT_BAD_INPUT


def test_a_weak_model_that_is_not_the_pairs_is_refused(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    world.make_model(tmp_path / "weak", world.TEXTS, seed=9)
    with pytest.raises(ExceptionGroup) as error:
        step.run()
    assert "wanted the weak model sha256:" in str(next(leaves(error.value)))


def test_the_papers_rule_is_a_setting(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback={"rule": "SignOfGain", "maxQueries": 5})
    manifest = step.run()
    assert manifest.metrics["queries"] == 5
    gains = {(line["query_id"], line["draft"]): line["gain"] for line in step.ledger()}
    for pair in step.pairs():
        assert gains[pair["query_id"], pair["chosen"]] > 0 >= gains[pair["query_id"], pair["rejected"]]
