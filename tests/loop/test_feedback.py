"""The feedback step over a tiny weak model and a strong model on loopback: ledger, pairs, money, resuming."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cowest_serving.book import read_prices
from cowest_serving.collaborate import draft_messages
from cowest_serving.models import ModelError
from cowest_training import feedback
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_BUDGET, LEDGER_COLUMNS, Manifest, StepError
from cowest_training.steps import leaves, read_manifest
from tests.fakes import Call, Fault, ScriptedModel
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

    def run(self, out: str = "out", round_number: int = 1, calls: str = "calls", merge: int | None = None) -> Manifest:
        self.start(out, round_number, calls, merge=merge)
        return self.manifest(out)

    def shard(self, number: int, of: int, *, out: str = "out") -> Manifest:
        """As a machine of its own does it: with its own book and drafts."""
        self.start(out, calls=f"calls-{number}", shard=f"{number}/{of}")
        return self.manifest(f"{out}/shard-{number}-of-{of}")

    def start(self, out: str, round_number: int = 1, calls: str = "calls", **parts: Any) -> None:
        flags = {
            "--job": self.job,
            "--pair": self.pair_file,
            "--dataset": self.data,
            "--calls": self.folder / calls,
            "--round": round_number,
            "--out": self.folder / out,
            "--progress": self.folder / "progress.json",
            **{f"--{name}": value for name, value in parts.items() if value is not None},
        }
        feedback.main([str(part) for flag in flags.items() for part in flag])

    def manifest(self, out: str) -> Manifest:
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


def test_the_ledger_says_what_each_call_took_and_cost_as_the_book_has_it(tmp_path: Path, strong: ScriptedModel) -> None:
    prices = {"inputPerMillionTokens": "1000", "outputPerMillionTokens": "3000", "currency": "EUR"}
    step = Step(tmp_path, strong)
    step.job = world.write_job(tmp_path / "job.json", strong.url, strong={"prices": prices})
    step.run()
    ledger = step.ledger()
    for side in ("answer", "solo"):
        paid = read_prices(tmp_path / "calls", {line[f"{side}_call"] for line in ledger})
        for line in ledger:
            noted = tuple(line[f"{side}_{name}"] for name in ("input_tokens", "output_tokens", "money"))
            call = paid[line[f"{side}_call"]]
            assert noted == pytest.approx((call.input_tokens, call.output_tokens, call.money)) and call.money > 0
    step.run(out="again")
    assert step.ledger("again") == ledger, "an answer from the book costs in the ledger what it cost then"


def test_a_pair_holds_what_the_weak_model_saw_and_two_drafts_that_differ(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.run()
    scores = {(line["query_id"], line["draft"]): line["answer_score"] for line in step.ledger()}
    queries = {row.id: row for row in world.parsed(world.rows())}
    for pair in step.pairs():
        assert pair["prompt"] == draft_messages(queries[pair["query_id"]].messages, world.PROMPTS)
        assert scores[pair["query_id"], pair["chosen"]] == pair["chosen_score"] == 1.0
        assert scores[pair["query_id"], pair["rejected"]] == pair["rejected_score"] == 0.0


def test_a_card_stands_beside_the_pairs_and_names_their_digest(tmp_path: Path, strong: ScriptedModel) -> None:
    manifest = Step(tmp_path, strong).run()
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["cowest", "feedback"] and front["size_categories"] == ["n<1K"]
    assert f"| digest | `{manifest.digest}` |" in card and f"| rows | {manifest.metrics['pairs']} |" in card
    assert f"| pair | {manifest.inputs['pair']} |" in card and "| rule of the pairs | BestVersusWorst |" in card
    assert f"| queries that drew the same draft each time | {manifest.metrics['equal_drafts']} |" in card
    assert all(
        f"| {column} |" in card for column in json.loads((tmp_path / "out/pairs.jsonl").read_text().split("\n")[0])
    )


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
    strong.faults = [400] * 1000
    with pytest.raises(StepError, match=r"None of the 8 queries.*400") as error:
        Step(tmp_path, strong).run()
    assert error.value.code == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        pytest.param(404, EXIT_BAD_INPUT, "ends in /v1", id="no such page or model"),
        pytest.param(405, EXIT_BAD_INPUT, "ends in /v1", id="not a place to post to"),
        pytest.param(402, EXIT_BUDGET, "no money left", id="an account without money"),
        pytest.param(Fault(307, {"location": "http://elsewhere/"}), EXIT_BAD_INPUT, "final address", id="a redirect"),
    ],
)
def test_a_refusal_that_is_not_of_the_query_ends_the_step(
    tmp_path: Path, strong: ScriptedModel, fault: int | Fault, code: int, words: str
) -> None:
    strong.faults = [None, None, fault]
    with pytest.raises(ExceptionGroup) as error:
        Step(tmp_path, strong).run()
    told = next(leaves(error.value))
    assert isinstance(told, StepError) and words in str(told)
    assert told.code == code


def test_calls_of_a_judge_are_in_the_book_in_the_bill_and_in_the_budget(tmp_path: Path, strong: ScriptedModel) -> None:
    with ScriptedModel("ACCEPT").in_thread() as judge:
        evaluator = {"type": "Judge", "endpoint": judge.url, "model": "judge"}
        strong_calls = 8 + 8  # solo, and one answer for the one draft of each query
        step = Step(tmp_path, strong, feedback={"evaluator": evaluator, "draftsPerQuery": 1})
        metrics = step.run().metrics
        assert metrics["judge_calls"] == len(judge.paid) > 0
        assert metrics["strong_calls"] == strong_calls + metrics["judge_calls"]
        assert metrics["input_tokens"] > sum(len(call.last.split()) for call in judge.calls)
        asked = len(judge.calls)
        step.run(out="again")
        assert len(judge.calls) == asked, "a verdict is remembered"

        budget = {"budget": {"callsPerRound": strong_calls + 2}}
        sections: dict[str, Any] = {"feedback": {"evaluator": evaluator, "draftsPerQuery": 1}, "strong": budget}
        step.job = world.write_job(tmp_path / "poor.json", strong.url, **sections)
        with pytest.raises(ExceptionGroup) as error:
            step.run(out="poor", calls="poor")
        told = next(leaves(error.value))
        assert isinstance(told, StepError) and told.code == EXIT_BUDGET
        assert len(judge.calls) + len(strong.calls) - asked - strong_calls <= strong_calls + 2


def test_why_answers_and_pairs_are_worth_little_is_counted_and_said(
    tmp_path: Path, strong: ScriptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def answered(content: str | None, finish_reason: str) -> Fault:
        return Fault(
            200, body=json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]})
        )

    strong.answers = "no idea"
    strong.faults = [answered("the answ", "length"), answered(None, "content_filter"), answered(None, "stop")]
    metrics = Step(tmp_path, strong).run().metrics
    assert (metrics["cut_answers"], metrics["filtered_answers"], metrics["empty_answers"]) == (1, 1, 1)
    assert (metrics["pairs"], metrics["ties"], metrics["below_margin"]) == (0, 8, 0)
    said = capsys.readouterr().err
    assert "1 answers of the strong model were cut off" in said and "spec.strong.maxTokens" in said
    assert "every answer scored 0" in said and "evaluator.extract" in said


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


# ---------------------------------------------------------------- only the calls that decide
DECIDING = {"calls": "Deciding"}


@pytest.mark.parametrize("rule", ["BestVersusWorst", "SignOfGain"])
def test_the_pairs_of_the_calls_that_decide_are_those_of_all(tmp_path: Path, strong: ScriptedModel, rule: str) -> None:
    step = Step(tmp_path, strong, feedback={"rule": rule})
    paid_for_all = step.run("all").metrics["strong_calls"]
    step.job = world.write_job(tmp_path / "job.json", strong.url, feedback={"rule": rule, **DECIDING})
    seen = step.run("some", calls="other").metrics
    told = {} if rule == "SignOfGain" else {"solo_score": None}
    assert step.pairs("some") == [{**pair, **told} for pair in step.pairs("all")] != []
    assert seen["strong_calls"] < paid_for_all
    assert len(step.ledger("some")) == len(step.ledger("all")), "each draft has its row"


def test_what_no_pair_hangs_on_is_not_asked_and_null_in_the_ledger(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback=DECIDING)
    metrics = step.run().metrics
    ledger = step.ledger()
    assert {line["solo_call"] for line in ledger} == {line["gain"] for line in ledger} == {None}, "solo cancels"
    for line in ledger:
        answered = {line[name] is None for name in ("answer", "answer_score", "answer_call", "answer_money")}
        assert len(answered) == 1, "all of it or nothing"
    assert {pair["solo_score"] for pair in step.pairs()} == {None}
    asked = {line["answer_call"] for line in ledger}
    assert metrics["strong_calls"] == len(strong.paid) == len(asked - {None})
    assert metrics["asked_drafts"] < metrics["distinct_drafts"]
    for name in ("answer_score", "solo_score", "mean_gain", "hurt_rate"):
        assert metrics[name] is None, "those that were asked are no sample"
    (tmp_path / "out").rename(tmp_path / "first")
    step.run()
    assert len(strong.paid) == metrics["strong_calls"] and step.ledger() == ledger


def test_a_query_whose_drafts_are_equal_costs_nothing(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback={**DECIDING, "temperature": "0.0001"})
    metrics = step.run().metrics
    assert (metrics["equal_drafts"], metrics["ties"], metrics["strong_calls"]) == (8, 8, 0)
    assert {line["strong_model"] for line in step.ledger()} == {None}


def test_by_the_papers_rule_no_draft_is_asked_where_the_strong_model_is_right_alone(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    step = Step(tmp_path, strong, feedback={**DECIDING, "rule": "SignOfGain"})
    step.run()
    for line in step.ledger():
        assert (line["answer"] is None) == (line["solo_score"] == 1.0)


def test_all_is_asked_where_shortcuts_are_learnt_from_it(tmp_path: Path, strong: ScriptedModel) -> None:
    learnt = {"shortcuts": {"strongAlone": {"maxLoss": "0.05", "explorePercent": 10}}}
    step = Step(tmp_path, strong, feedback=DECIDING, collaboration=learnt)
    step.run()
    assert None not in {line["gain"] for line in step.ledger()}


def test_a_strong_model_that_refuses_all_that_it_is_asked_is_bad_input(tmp_path: Path, strong: ScriptedModel) -> None:
    rows = [*world.rows(), {"id": "equal", "query": "what is beta ?", "reference": "2"}]
    step = Step(tmp_path, strong, rows, feedback={**DECIDING, "draftsPerQuery": 2})
    step.run("before", calls="before")
    spared = {line["query_id"] for line in step.ledger("before") if line["answer"] is None}
    strong.faults = [400] * 1000
    with pytest.raises(StepError, match=rf"None of the {9 - len(spared)} queries.*400"):
        step.run()


def test_a_step_that_spares_calls_goes_on_where_it_was_cut_off(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback=DECIDING)
    step.run(out="undisturbed", calls="other")
    asked = len(strong.paid)
    strong.faults = [None] * 7 + [500] * 1000
    with pytest.raises(ExceptionGroup):
        step.run()
    strong.faults = []
    step.run()
    assert step.ledger() == step.ledger("undisturbed")
    assert len(strong.paid) == asked, "each call once in both books together"


# ---------------------------------------------------------------- judged in a list
def judgement(call: Call) -> str:
    """Of one answer or of several: right is what is the reference."""
    reference = call.last.split("<reference>\n")[1].split("\n</reference>")[0]
    answers = re.findall(r'<answer(?: number="(\d+)")?>\n(.*?)\n</answer>', call.last, re.DOTALL)
    return "\n".join(f"{number}: {'ACCEPT' if text == reference else 'REJECT'}" for number, text in answers)


@pytest.fixture
def judge() -> Iterator[ScriptedModel]:
    with ScriptedModel(judgement).in_thread() as server:
        yield server


def judged(judge: ScriptedModel, **more: Any) -> dict[str, Any]:
    return {"evaluator": {"type": "Judge", "endpoint": judge.url, "model": "judge"}, **more}


def test_a_judge_is_asked_once_of_answers_that_differ_and_never_of_those_alike(
    tmp_path: Path, strong: ScriptedModel, judge: ScriptedModel
) -> None:
    step = Step(tmp_path, strong, feedback=judged(judge))
    step.run("each", calls="each")
    one_by_one = len(judge.paid)
    step.job = world.write_job(
        tmp_path / "job.json", strong.url, feedback=judged(judge, judging="Listwise", **DECIDING)
    )
    metrics = step.run().metrics
    assert step.pairs() == [{**pair, "solo_score": None} for pair in step.pairs("each")] != []
    lists = judge.paid[one_by_one:]
    assert metrics["judge_calls"] == len(lists) < one_by_one / 3
    assert all("You grade 2 answers" in call.last for call in lists), "a third answer is one of the two"
    unscored = {line["query_id"] for line in step.ledger() if line["answer"] and line["answer_score"] is None}
    assert unscored and not unscored & {pair["query_id"] for pair in step.pairs()}
    step.run("again")
    assert len(judge.paid) == one_by_one + len(lists), "a list is paid once"


def test_where_all_is_asked_one_list_has_the_solo_answer_too(
    tmp_path: Path, strong: ScriptedModel, judge: ScriptedModel
) -> None:
    step = Step(tmp_path, strong, feedback=judged(judge, judging="Listwise"))
    assert step.run().metrics["judge_calls"] == len(judge.paid) == 8
    for line in step.ledger():
        assert line["answer_score"] == float(line["answer"] == line["reference"])
        assert line["solo_score"] == float(line["solo"] == line["reference"])


def test_answers_that_a_judge_does_not_grade_in_a_list_are_graded_by_themselves(
    tmp_path: Path, strong: ScriptedModel, judge: ScriptedModel
) -> None:
    judge.answers = lambda call: "I cannot say" if "You grade one" not in call.last else judgement(call)
    step = Step(tmp_path, strong, world.rows(2), feedback=judged(judge, judging="Listwise"))
    step.run()
    for line in step.ledger():
        assert line["answer_score"] == float(line["answer"] == line["reference"])


# ---------------------------------------------------------------- as few calls as there can be
SAYS = r"^\s*(\S+)"  # what counts of answers and drafts: the first word


def fewest(judge: ScriptedModel | None = None, **more: Any) -> dict[str, Any]:
    of = judged(judge, judging="Listwise")["evaluator"] if judge else {"type": "ExactMatch"}
    return {
        "evaluator": {**of, "extract": SAYS},
        "calls": "Fewest",
        **({"judging": "Listwise"} if judge else {}),
        **more,
    }


def test_of_drafts_that_say_the_same_one_is_asked(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback=fewest(draftsPerQuery=22, calls="All"))
    step.run("all", calls="all")
    wanted = {(line["query_id"], line["draft"]): line["answer_score"] for line in step.ledger("all")}
    step.job = world.write_job(tmp_path / "job.json", strong.url, feedback=fewest(draftsPerQuery=22))
    step.run()
    said: dict[str, list[str]] = {}
    for line in step.ledger():
        if line["answer"]:
            said.setdefault(line["query_id"], []).append(line["draft"])
    words = {id_: [draft.split()[0] for draft in set(drafts) if draft.split()] for id_, drafts in said.items()}
    assert all(len(found) == len(set(found)) for found in words.values())
    assert sum(map(len, words.values())) > len(words)
    pairs = step.pairs()
    assert pairs
    for pair in pairs:
        assert wanted[pair["query_id"], pair["chosen"]] > wanted[pair["query_id"], pair["rejected"]]


def test_a_judge_is_not_asked_of_an_answer_that_is_the_reference(
    tmp_path: Path, strong: ScriptedModel, judge: ScriptedModel
) -> None:
    step = Step(tmp_path, strong, feedback=fewest(judge))
    metrics = step.run().metrics
    assert 0 < metrics["judge_calls"] == len(judge.paid) <= 8
    for call in judge.paid:
        reference = call.last.split("<reference>\n")[1].split("\n</reference>")[0]
        assert f">\n{reference}\n</answer>" not in call.last
    scores = {(pair["chosen_score"], pair["rejected_score"]) for pair in step.pairs()}
    assert scores == {(1.0, 0.0)}
    assert step.run("again").metrics["judge_calls"] == metrics["judge_calls"] == len(judge.paid)


def test_without_a_part_that_counts_answers_are_judged_as_they_come(
    tmp_path: Path, strong: ScriptedModel, judge: ScriptedModel
) -> None:
    evaluator = judged(judge)["evaluator"]
    step = Step(tmp_path, strong, feedback=fewest(judge, evaluator=evaluator))
    step.run()
    asked = {(line["query_id"], line["answer"]) for line in step.ledger() if line["answer_score"] is not None}
    assert judge.paid and len(asked) == 2 * len(judge.paid), "the first two that differ"


# ---------------------------------------------------------------- a share is asked all the same
def test_of_a_share_of_the_queries_all_is_asked_so_that_it_stands_for_the_rest(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    rows = [{**row, "id": f"{row['id']}-{n}"} for n in range(12) for row in world.rows()]
    step = Step(tmp_path, strong, rows, feedback={**DECIDING, "explorePercent": 30})
    metrics = step.run().metrics
    explored = [line for line in step.ledger() if line["propensity"] is not None]
    assert {line["propensity"] for line in explored} == {0.3}
    assert 0.15 * 96 < metrics["explored"] == len(explored) / 4 < 0.45 * 96
    gains = [line["gain"] for line in explored]
    assert metrics["mean_gain"] == pytest.approx(sum(gains) / len(gains)), "those and no others"
    assert any(line["gain"] is None for line in step.ledger())


# ---------------------------------------------------------------- shards
PAIRS_OF_QUERIES = {"draftsPerQuery": 22}  # few queries a batch: eight of them are four batches


@pytest.mark.parametrize(("of", "calls"), [(1, "All"), (3, "All"), (5, "All"), (3, "Deciding")])
def test_merged_shards_are_the_very_output_of_one_run(
    tmp_path: Path, strong: ScriptedModel, of: int, calls: str
) -> None:
    step = Step(tmp_path, strong, feedback={**PAIRS_OF_QUERIES, "calls": calls})
    whole = step.run("whole")
    parts = [step.shard(number, of) for number in reversed(range(of))]
    assert {part.kind for part in parts} == {"FeedbackShard"}
    assert max(part.metrics["queries"] for part in parts) <= -(-4 // of) * 2, "the work is shared"
    merged = step.run(merge=of)
    assert (merged.kind, merged.digest, merged.outputs) == (whole.kind, whole.digest, whole.outputs)
    assert merged.inputs_digest == whole.inputs_digest
    assert merged.metrics == whole.metrics
    assert merged.metrics["strong_calls"] == sum(part.metrics["strong_calls"] for part in parts) == len(strong.paid)


def test_what_is_merged_is_done_and_its_shards_are_gone(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    for number in range(2):
        step.shard(number, 2)
    step.run(merge=2)
    asked = len(strong.calls)
    assert not list((tmp_path / "out").glob("shard-*"))
    for number in range(2):  # a workflow that runs again begins with its shards
        step.start("out", calls="new", shard=f"{number}/2")
    step.run(merge=2)
    assert not list((tmp_path / "out").glob("shard-*"))
    assert len(strong.calls) == asked


def test_a_shard_that_is_missing_or_of_other_inputs_is_not_merged(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.shard(0, 2)
    with pytest.raises(StepError, match=r"shard 1 of 2 .*wanted a finished artifact"):
        step.run(merge=2)
    step.start("out", round_number=2, shard="1/2")
    with pytest.raises(StepError, match=r"shard-1-of-2: wanted the shard of these inputs"):
        step.run(merge=2)
    assert (tmp_path / "out" / "shard-0-of-2" / "manifest.json").exists(), "what is paid for stays"


def test_one_shard_that_is_refused_is_no_verdict(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback=PAIRS_OF_QUERIES)
    strong.faults = [400] * 1000
    assert "400" in step.shard(0, 2).metrics["refusal"]
    strong.faults = []
    assert step.shard(1, 2).metrics["refusal"] == ""
    merged = step.run(merge=2)
    assert (merged.metrics["queries"], merged.metrics["skipped"]) == (4, 4)


def test_when_all_shards_are_refused_the_merge_says_so(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback=PAIRS_OF_QUERIES)
    strong.faults = [400] * 1000
    for number in range(2):
        step.shard(number, 2)
    with pytest.raises(StepError, match="None of the 4 queries") as error:
        step.run(merge=2)
    assert error.value.code == EXIT_BAD_INPUT


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(
    tmp_path: Path, strong: ScriptedModel, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step(tmp_path, strong)
    with pytest.raises(SystemExit):
        step.start("out", shard=text)
    assert "--shard" in capsys.readouterr().err
