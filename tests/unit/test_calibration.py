"""People's labels: how they are read, what an evaluator's scores stand for, and how far both agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cowest_training import calibration
from cowest_training.calibration import Label, calibrate, few_note, make_report, read_labels, said_by
from cowest_training.contract import Evaluator, Row, StepError

JUDGE = Evaluator("Judge", endpoint="https://judge/v1", model="judge")


def line(**changes: Any) -> dict[str, Any]:
    return {"query": "what?", "answer": "41", "label": "accept", **changes}


def two(**changes: Any) -> dict[str, Any]:
    return {"query": "what?", "answers": ["41", "42"], "label": "left", **changes}


def written(folder: Path, *lines: Any) -> str:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path.as_uri()


def test_labels_of_one_answer_and_of_two_are_read(tmp_path: Path) -> None:
    uri = written(tmp_path, line(reference="41", by="ann"), two(label="tie", why="ordersDiffer"))
    one, other = read_labels(uri, JUDGE)
    assert (one.answers, one.label, one.by, one.row.reference, one.is_sample) == (("41",), 2, "ann", "41", True)
    assert (other.answers, other.label, other.is_sample) == (("41", "42"), 1, False)


def test_the_last_word_of_a_person_counts_in_whatever_order_the_answers_stood(tmp_path: Path) -> None:
    again = two(answers=["42", "41"], label="tie", by="ann")
    uri = written(tmp_path, two(by="ann"), two(by="bob"), again, line(), line(label="skip"))
    assert [(label.by, label.label) for label in read_labels(uri, JUDGE)] == [("bob", 2), ("ann", 1)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        pytest.param(line(label="left"), "label: wanted one of reject, partial, accept, skip, saw 'left'", id="of two"),
        pytest.param(two(label="good"), "wanted one of right, tie, left, skip", id="an unknown word"),
        pytest.param(two(answers=["one"]), "answers: wanted a list of two texts", id="one of two"),
        pytest.param(two(answer="41"), "wanted `answer`, or `answers`", id="both forms"),
        pytest.param({"query": "what?", "label": "tie"}, "wanted `answer`, or `answers`", id="neither form"),
        pytest.param(line(answer=41), "wanted answers that are text", id="a number"),
        pytest.param(line(query=" "), "query: wanted text", id="no question"),
        pytest.param(["accept"], "wanted a JSON object", id="a list"),
    ],
)
def test_a_label_that_is_none_is_named_by_its_line(tmp_path: Path, wrong: Any, says: str) -> None:
    with pytest.raises(StepError, match=r"labels\.jsonl:2") as raised:
        read_labels(written(tmp_path, line(), wrong), JUDGE)
    assert says in str(raised.value)


def test_labels_without_a_reference_are_no_use_to_an_evaluator_that_needs_one(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="wanted a reference, saw none"):
        read_labels(written(tmp_path, line()), Evaluator("ExactMatch"))


def test_no_file_and_no_label_name_the_field_or_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"evaluator\.calibration\.labels"):
        read_labels((tmp_path / "none.jsonl").as_uri(), JUDGE)
    with pytest.raises(StepError, match="cowest review"):
        read_labels(written(tmp_path, line(label="skip")), JUDGE)


@pytest.mark.parametrize(
    ("scores", "label"),
    [([0.5, 0.0], 2), ([0.0, 0.5], 0), ([0.1 + 0.2, 0.3], 1), ([1.0], 2), ([0.5], 1), ([0.2], 0), ([0.8], 2)],
)
def test_scores_stand_for_labels(scores: list[float], label: int) -> None:
    assert said_by(scores) == label


def label(number: int, said: int, why: str = calibration.SAMPLE) -> Label:
    row = Row(str(number), f"q{number}", ({"role": "user", "content": f"q{number}"},), "")
    return Label(row, ("a",), said, why=why)


def test_picked_disagreements_are_told_and_do_not_count() -> None:
    """The evaluator is right on all that was drawn; of what was picked as doubtful it is wrong on all."""
    drawn = [label(n, 2 * (n % 2)) for n in range(60)]
    picked = [label(100 + n, 2, "ordersDiffer") for n in range(40)]
    report = make_report([*drawn, *picked], [each.label for each in drawn] + [0] * 40, 0)
    assert (report.labels, report.agreement, report.kappa, report.opposite) == (60, 1.0, 1.0, 0)
    assert (report.picked, report.picked_agreement) == (40, 0.0)


async def test_each_answer_is_scored_as_any_other() -> None:
    async def score(row: Row, answer: str) -> float:
        return float(answer == row.reference)

    row = Row("r", "what?", ({"role": "user", "content": "what?"},), "41")
    found = await calibrate(score, [Label(row, ("41", "42"), 2), Label(row, ("42",), 0), Label(row, ("41",), 0)])
    assert (found.labels, found.agreement, found.opposite) == (3, pytest.approx(2 / 3), 1)


def test_too_few_labels_are_said_before_anything_is_paid() -> None:
    few = [label(n, 2) for n in range(49)]
    assert "49 labels" in few_note([*few, label(99, 2, "jurorsSplit")])
    assert few_note([*few, label(99, 2)]) == ""
