"""The evaluate step over tiny weak models and a strong model on loopback: what its report says, when it has none."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cowest_serving.contract import Pair
from cowest_serving.model_files import ModelFolderError, model_digest
from cowest_training import evaluate
from cowest_training.contract import EXIT_INTERRUPTED, EXIT_RETRY, EvaluationReport, Row, load_report
from cowest_training.data import read_rows
from cowest_training.steps import Progress, load_settings, read_manifest
from tests.fakes import Call, ScriptedModel
from tests.loop import asking_world as world


@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


class Step:
    def __init__(self, folder: Path, strong: ScriptedModel, **sections: Any) -> None:
        self.folder = folder
        self.candidate = world.make_pair(folder / "weak", strong)
        self.job = world.write_job(folder / "job.json", strong.url, **sections)
        self.data = world.write_rows(folder / "held_out.jsonl", world.rows())

    def flags(self, control: Pair | None, out: str = "out", calls: str = "calls") -> list[str]:
        flags = {
            "--job": self.job,
            "--candidate": world.write_pair(self.folder / "candidate.json", self.candidate),
            "--control": world.write_pair(self.folder / "control.json", control) if control else "solo",
            "--held-out": self.data,
            "--calls": self.folder / calls,
            "--out": self.folder / out,
        }
        return [str(part) for flag in flags.items() for part in flag]

    def run(self, control: Pair | None = None, out: str = "out") -> EvaluationReport:
        evaluate.main(self.flags(control, out))
        assert read_manifest(str(self.folder / out))
        return load_report(json.loads((self.folder / out / "report.json").read_text()))

    def items(self, out: str = "out") -> list[dict[str, Any]]:
        return pq.read_table(self.folder / out / "items.parquet").to_pylist()  # type: ignore[no-any-return]


def mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def test_against_the_strong_alone_the_control_is_solo_and_paid_once(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    report = step.run()
    items = step.items()
    assert (report.candidate, report.control) == (step.candidate.digest, "solo")
    assert [arm.name for arm in report.arms] == ["candidate", "control", "solo", "weak"]
    assert report.arm("solo").score == 1 / 8
    assert report.arm("control").score == 1 / 8
    assert (report.arm("control").strong_calls, report.arm("solo").strong_calls) == (0, 8)
    assert report.arm("candidate").strong_calls == 8 == len(strong.paid) - 8
    right = [world.likes(item["query"] + item["candidate_draft"].strip()) for item in items]
    assert [item["candidate_score"] for item in items] == [float(value) for value in right]
    assert report.arm("candidate").score == mean(right)
    assert report.against_control == report.against_solo
    assert report.against_solo.difference == pytest.approx(mean(right) - 1 / 8)
    assert report.arm("candidate").hurt_rate == float(not right[0]) / 8
    assert (report.arm("solo").hurt_rate, report.strong_version) == (0.0, "fp_1")
    assert [(part.group, part.n) for part in report.slices] == [("even", 4), ("odd", 4)]


def spoil(folder: Path) -> str:
    """One layer more than there are weights for; the digest that the folder has then."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return model_digest(folder)


@pytest.mark.parametrize("whose", ["candidate", "control"])
def test_a_weak_model_that_cannot_be_loaded_ends_the_step_before_anything_is_paid(
    tmp_path: Path, strong: ScriptedModel, whose: str
) -> None:
    step = Step(tmp_path, strong)
    other = world.make_pair(tmp_path / "other", strong, seed=1)
    broken = replace(other, weak_digest=spoil(tmp_path / "other"))
    control = broken
    if whose == "candidate":
        step.candidate, control = broken, step.candidate
    with pytest.raises(ModelFolderError, match=f"{tmp_path}/other: wanted all weights of LlamaForCausalLM"):
        step.run(control)
    assert strong.paid == []


def test_queries_that_the_chat_template_refuses_are_counted_with_the_reason(
    tmp_path: Path, strong: ScriptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step(tmp_path, strong)
    refusing = "{% if 'alpha' in messages[0].content %}{{ raise_exception('no alpha') }}{% endif %}<user> "
    (tmp_path / "weak/chat_template.jinja").write_text(refusing + "{{ messages[0].content }} <end>")
    step.candidate = replace(step.candidate, weak_digest=model_digest(tmp_path / "weak"))
    step.run()
    note = "Note: the weak model of the candidate drafts nothing for 1 of 8 queries: the model's chat template refuses"
    assert note in (said := capsys.readouterr().err) and "no alpha" in said
    assert [item["candidate_draft"] is None for item in step.items()].count(True) == 1
    (tmp_path / "out/manifest.json").unlink()
    step.run(out="again")
    assert note in capsys.readouterr().err, "the reason is kept with the drafts"


def test_progress_counts_answers_of_the_strong_model_and_says_which_calls_are_paid_now(
    tmp_path: Path, strong: ScriptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers are those that `cowest plan` bounds: a draft that is taken as the answer is no call."""
    step = Step(tmp_path, strong)
    step.run()
    assert capsys.readouterr().err.splitlines()[-1].endswith(" 16 calls paid now")
    step.run(out="again")  # all is known by now
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "evaluate: 16 of 16 answers; 0 calls paid now"


def test_drafts_and_answers_are_shown_apart(tmp_path: Path, strong: ScriptedModel) -> None:
    """In one sum the answers of the strong model alone, which come first and fast, gave a wrong time left."""
    step = Step(tmp_path, strong)
    seen: list[tuple[float, float | None, str]] = []

    class Watched(Progress):
        def update(self, done: float, total: float | None, unit: str, message: str = "") -> None:
            seen.append((done, total, unit))
            super().update(done, total, unit, message)

    rows = read_rows(step.data)
    job = evaluate._Job(
        load_settings(step.job), step.candidate, world.make_pair(tmp_path / "stable", strong, seed=5),
        str(tmp_path / "calls"), None, "evaluate:test",
    )  # fmt: skip
    asyncio.run(evaluate._ask_all(job, rows, Watched(None, "evaluate")))
    units = [unit for _, _, unit in seen]
    assert list(dict.fromkeys(units)) == ["drafts of the candidate", "drafts of the control", "answers"]
    assert units == sorted(units, key=["drafts of the candidate", "drafts of the control", "answers"].index)
    assert {(unit, total) for _, total, unit in seen} == {
        ("drafts of the candidate", 8), ("drafts of the control", 8), ("answers", 24),
    }  # fmt: skip
    assert seen[-1] == (24, 24, "answers")


def test_when_all_arms_score_nothing_what_to_look_at_is_said(
    tmp_path: Path, strong: ScriptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    strong.answers = "The number is 1, I think."
    Step(tmp_path, strong, feedback={"evaluator": {"type": "ExactMatch"}}).run()
    assert "spec.feedback.evaluator.extract" in capsys.readouterr().err


def test_the_report_counts_the_versions_of_the_strong_model_by_arm(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    assert step.run().strong_versions == {"candidate": {"fp_1": 8}, "control": {"fp_1": 8}, "solo": {"fp_1": 8}}
    strong.version = "fp_2"
    step.candidate = world.make_pair(tmp_path / "other", strong, seed=5)  # solo answers come from the book
    report = step.run(out="again")
    assert report.strong_versions["solo"] == report.strong_versions["control"] == {"fp_1": 8}
    assert report.strong_versions["candidate"].get("fp_2", 0) > 0
    assert report.strong_version == "mixed: fp_1, fp_2"


def chat(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param([chat("one"), chat("two")], None, id="questions of their own"),
        pytest.param([chat("One?"), chat("one"), chat("two")], [0, 0, 1], id="the same question twice"),
        pytest.param(
            [chat("hi", "hello", "a"), chat("hi", "hello", "a", "b", "c"), chat("hi")],
            [0, 0, 1],
            id="turns of one chat",
        ),
        pytest.param([chat("hi", "hello", "a"), chat("hi", "yes?", "a")], None, id="chats that only begin alike"),
    ],
)
def test_rows_that_belong_together_are_a_cluster(asked: Any, expected: list[int] | None) -> None:
    found = evaluate.clusters([Row(str(i), "", messages, "x") for i, messages in enumerate(asked)])
    numbers = {name: number for number, name in enumerate(dict.fromkeys(found or ()))}
    assert (found and [numbers[name] for name in found]) == expected


def test_turns_of_one_conversation_are_resampled_together(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    alone = step.run().arm("candidate")
    opening = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chats = [
        {**row, "query": None, "messages": [*opening, {"role": "user", "content": row["query"]}]}
        for row in world.rows()
    ]
    step.data = world.write_rows(tmp_path / "chats.jsonl", [{k: v for k, v in row.items() if v} for row in chats])
    together = step.run(out="chats").arm("candidate")
    assert 0 < alone.low < alone.high < 1
    assert (together.low, together.high) == (0, 1), "one conversation says nothing about others"


def test_the_weak_alone_is_scored_by_its_draft(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong, feedback={"evaluator": {"type": "TokenF1"}})
    report = step.run()
    drafts = [(item["candidate_draft"].split(), item["reference"]) for item in step.items()]
    hit = [reference in draft for draft, reference in drafts]
    assert [item["weak_score"] > 0 for item in step.items()] == hit
    assert report.arm("weak").strong_calls == 0


def test_two_pairs_are_compared_on_the_same_queries(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    control = world.make_pair(tmp_path / "stable", strong, seed=5)
    report = step.run(control)
    items = step.items()
    assert report.control == control.digest
    differences = [item["candidate_score"] - item["control_score"] for item in items]
    assert any(item["candidate_draft"] != item["control_draft"] for item in items)
    assert report.against_control.difference == pytest.approx(mean(differences))
    assert report.against_control.better == sum(value > 0 for value in differences)
    assert report.against_control.worse == sum(value < 0 for value in differences)


def test_pairs_that_share_weak_model_and_prompts_share_drafts_and_calls(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    twin = replace(step.candidate, weak_uri=(tmp_path / "gone").as_uri())  # never loaded: the drafts are there
    report = step.run(twin)
    assert report.against_control.difference == 0
    assert report.against_control.better == report.against_control.worse == 0
    assert len(strong.paid) == 16


def test_a_second_evaluation_pays_nothing_for_what_is_known(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    first = step.run()
    paid = len(strong.paid)
    again = step.run(out="again")
    assert len(strong.calls) == paid
    assert again == first


def test_a_refused_query_scores_nothing_and_is_counted(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    original = strong._answer  # faults of ScriptedModel go by order, this one goes by query

    async def refusing(request: Any, call: Call, fault: Any) -> Any:
        return await original(request, call, 400 if call.last.startswith("what is gamma ? DRAFT") else fault)

    strong._answer = refusing  # type: ignore[method-assign]
    report = step.run()
    assert report.arm("candidate").errors == 1
    assert report.arm("candidate").n == 8
    (item,) = [item for item in step.items() if "gamma" in item["query"]]
    assert item["candidate_score"] == 0
    assert "400" in item["candidate_error"]
    assert report.arm("solo").errors == 0


def test_a_change_of_the_strong_models_version_shows_in_the_report(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    step.run()
    strong.version = "fp_2"
    other = world.make_pair(tmp_path / "other", strong, seed=5)
    step.candidate = other
    assert step.run(out="again").strong_version == "mixed: fp_1, fp_2"


def test_macro_f1_is_given_for_choices(tmp_path: Path, strong: ScriptedModel) -> None:
    choices = list(world.NUMBERS.values())
    step = Step(tmp_path, strong, feedback={"evaluator": {"type": "Choice", "choices": choices}})
    report = step.run()
    assert report.arm("solo").score == 1 / 8
    assert report.arm("solo").macro_f1 == pytest.approx(1 / 8)  # one label of eight is right, and never wrong


def right_is_short(call: Call) -> str:
    """A judge with a rule of its own: what is one word is right."""
    answer = call.last.partition("<answer>")[2].partition("</answer>")[0]
    return "ACCEPT" if len(answer.split()) == 1 else "REJECT"


def doubting(call: Call) -> str:
    """A judge that likes what it reads last: of a right answer it says one thing in one order, another in the other."""
    is_last = call.last.index("<answer>") > call.last.index("<reference>")
    return "REJECT" if "no idea" in call.last or not is_last else "ACCEPT"


def test_where_a_judge_doubts_itself_stands_beside_each_answer_also_when_it_is_not_asked_again(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    with ScriptedModel(doubting).in_thread() as judge:
        evaluator = {"type": "Judge", "endpoint": judge.url, "model": "judge"}
        step = Step(tmp_path, strong, feedback={"evaluator": evaluator})
        step.run()
        asked = len(judge.calls)
        (tmp_path / "out/manifest.json").unlink()
        step.run(out="again")
        assert len(judge.calls) == asked
    for out in ("out", "again"):
        for item in step.items(out):
            assert item["candidate_doubt"] == ("" if item["candidate_answer"] == "no idea" else "ordersDiffer")
            assert json.loads(item["messages"]) == [{"role": "user", "content": item["query"]}]
    plain = Step(tmp_path, strong)
    plain.run(out="plain")
    assert not [name for name in plain.items("plain")[0] if name == "messages" or name.endswith("_doubt")]


def labelled(answers: Sequence[str], label: str, n: int) -> list[dict[str, Any]]:
    answer = {"answers": list(answers)} if len(answers) == 2 else {"answer": answers[0]}
    return [{"query": f"{label} {number}?", **answer, "label": label} for number in range(n)]


def test_the_evaluator_is_held_against_people_and_what_it_scored_before_costs_nothing(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    with ScriptedModel(right_is_short).in_thread() as judge:
        lines = [*labelled(["42", "no idea"], "left", 30), *labelled(["so so", "42"], "right", 20)]
        labels = Path(world.write_rows(tmp_path / "labels.jsonl", lines))
        evaluator: dict[str, Any] = {"type": "Judge", "endpoint": judge.url, "model": "judge"}
        step = Step(tmp_path, strong, feedback={"evaluator": evaluator})
        before = step.run()
        assert before.calibration is None
        paid = len(judge.paid)
        evaluator["calibration"] = {"labels": labels.as_uri(), "minKappa": "0.5"}
        step.job = world.write_job(tmp_path / "beside.json", strong.url, feedback={"evaluator": evaluator})
        beside = step.run(out="beside")
        assert beside.against_control == before.against_control, "people change no score"
        assert [(arm.name, arm.score) for arm in beside.arms] == [(arm.name, arm.score) for arm in before.arms]
        seen = beside.calibration
        assert seen is not None and (seen.labels, seen.agreement, seen.kappa, seen.opposite) == (50, 1.0, 1.0, 0)
        assert len(judge.paid) == paid + 2 * 100, "each answer in both orders"
        with labels.open("a") as file:
            file.write(json.dumps({"query": "left 0?", "answers": ["no idea", "42"], "label": "left"}) + "\n")
        again = step.run(out="again").calibration
        assert again is not None and (again.labels, again.opposite) == (50, 1), "the last word counts"
        assert len(judge.paid) == paid + 2 * 100


def forget_calls(folder: Path) -> None:
    """The answers but not the drafts, so that a command need not load torch."""
    for file in folder.glob("calls*"):
        if file.is_file():
            file.unlink()


def test_an_interruption_in_the_middle_of_calls_ends_cleanly(tmp_path: Path) -> None:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        step = Step(tmp_path, server)
        step.run(out="before")
        forget_calls(tmp_path)
        server.calls.clear()
        server.gate.clear()
        command = [sys.executable, "-m", "cowest_training.evaluate", *step.flags(None)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while len(server.calls) < 4:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == EXIT_INTERRUPTED
        assert errors.strip().splitlines()[-1].startswith("interrupted")
        assert "Traceback" not in errors
        assert len(server.calls) == 4, "nothing new is begun on the way out"
        assert not (tmp_path / "out").exists()


def test_a_strong_model_that_is_away_ends_the_command_with_retry_and_no_output(tmp_path: Path) -> None:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        step = Step(tmp_path, server)
        step.run(out="before")
        forget_calls(tmp_path)
        server.calls.clear()
        server.faults = [None] * 4 + [503] * 1000
        command = [sys.executable, "-m", "cowest_training.evaluate", *step.flags(None)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == EXIT_RETRY, ended.stderr
        assert f"{server.url} answered 503" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "out").exists()
        server.faults = []
        server.calls.clear()
        step.run()
        assert len(server.calls) == 16 - 4, "what came before the fault is not asked again"
