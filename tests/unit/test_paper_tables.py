"""The pure parts of the paper's tables: what baselines are told, which drafts make a pair, the metrics, the bounds."""

from __future__ import annotations

import pytest

from cowest_training.asking import Draft
from cowest_training.contract import Evaluator, Row
from tests.benchmarks import paper, paper_steps
from tests.benchmarks.paper_steps import Prediction


def row(id_: str, query: str, reference: str) -> Row:
    return Row(id_, query, ({"role": "user", "content": query},), reference)


def draft(index: int, text: str = "") -> Draft:
    return Draft("q", index, 0, text or f"draft {index}", 2)


# ---------------------------------------------------------------- SuperICL
def test_supericl_shows_examples_with_prediction_confidence_and_answer_before_the_question() -> None:
    solved = [(row("1", "Which vessel?", "B"), Prediction("Answer: C", 0.5))]
    said = paper_steps.superior_prompt("Which nerve?", Prediction("Answer: D\n", 0.875), solved)
    example, asked = said.split("\n\n---\n\n")
    assert example == (
        "Which vessel?\nA small model that was tuned for such questions says: Answer: C (confidence 0.50)\nAnswer: B"
    )
    assert asked.startswith("Which nerve?\n") and "says: Answer: D (confidence 0.88)\nWhere you do not follow" in asked


def test_supericl_says_none_where_the_small_model_cannot_be_asked() -> None:
    assert "says: none\n" in paper_steps.superior_prompt("Which nerve?", Prediction("", 0.0), [])


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        pytest.param("1906", "1906", id="one answer"),
        pytest.param('["1906", "in 1906"]', "1906", id="the first of several"),
        pytest.param("[unknown", "[unknown", id="text that only looks like a list"),
    ],
)
def test_supericl_shows_one_right_answer(reference: str, shown: str) -> None:
    assert paper_steps.shown_reference(row("1", "?", reference)) == shown


def test_confidence_is_the_mean_probability_of_a_token() -> None:
    assert paper_steps.confidence_of([0.0, -2.0]) == pytest.approx(0.3679, abs=1e-4)
    assert paper_steps.confidence_of([]) == 0.0


# ---------------------------------------------------------------- RLWF
@pytest.mark.parametrize(
    ("worth", "wanted"),
    [
        pytest.param([0.1, 0.9, 0.4], (1, 0), id="most against least"),
        pytest.param([0.5, 0.5, 0.1], (0, 2), id="the earlier of two that are worth most"),
        pytest.param([0.9, 0.1, 0.1], (0, 1), id="the earlier of two that are worth least"),
        pytest.param([0.5, 0.5, 0.5], None, id="a tie is no pair"),
        pytest.param([], None, id="no drafts, no pair"),
    ],
)
def test_drafts_are_paired_by_what_the_weak_side_makes_of_them(
    worth: list[float], wanted: tuple[int, int] | None
) -> None:
    found = paper_steps.preference([draft(i) for i in range(len(worth))], worth)
    assert (found and tuple(each.index for each in found)) == wanted


def test_the_judge_of_rlwf_never_ranks_what_it_learnt_from() -> None:
    rows = [row(str(i), f"question {i}", "A") for i in range(9)]
    learnt, judged = paper_steps.labelled(rows)
    assert [*learnt, *judged] == rows and learnt and judged


# ---------------------------------------------------------------- metrics
CHOICE = Evaluator("Choice", extract=r"(?is).*answer:\W*([A-D])\b", choices=("A", "B", "C", "D"))


@pytest.mark.parametrize(
    ("evaluator", "answers", "references", "seen"),
    [
        pytest.param(Evaluator("TokenF1"), ["the 1906", "in 1906"], ["1906", "1906"], 0.5, id="exact match"),
        pytest.param(CHOICE, ["Answer: A", "Answer: A"], ["A", "B"], 1 / 3, id="macro-F1 over the labels that occur"),
        pytest.param(CHOICE, ["Answer: A", None], ["A", "B"], 0.5, id="no answer is a miss"),
        pytest.param(Evaluator("Numeric"), ["1"], ["1"], None, id="none where the paper shows none"),
    ],
)
def test_the_second_metric_is_made_of_the_same_answers(
    evaluator: Evaluator, answers: list[str], references: list[str], seen: float | None
) -> None:
    assert paper.second_metric(evaluator, answers, references) == (seen if seen is None else pytest.approx(seen))


# ---------------------------------------------------------------- what it may cost
@pytest.mark.parametrize(
    ("table", "calls"),
    [
        pytest.param("main", 4 * 10 + 10 + 8 * 100, id="main"),
        pytest.param("drafts", 100 + 10 + 3 * (4 * 10 + 2 * 100), id="drafts"),
        pytest.param("pairs", 4 * 10 + 10 + 7 * 100, id="pairs"),
        pytest.param("models", 3 * (100 + 10) + 6 * (4 * 10 + 2 * 100), id="models"),
    ],
)
def test_a_table_is_bounded_before_it_is_run(table: str, calls: int) -> None:
    assert paper.bound(table, queries=10, held_out=100, drafts=4, weak=2, strong=3) == calls


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        pytest.param("hf://meta-llama/Meta-Llama-3-8B-Instruct@abc", "Meta-Llama-3-8B-Instruct", id="of the Hub"),
        pytest.param("file:///models/weak/", "weak", id="a folder"),
        pytest.param("s3://bucket/models/tiny", "tiny", id="of a store"),
    ],
)
def test_a_model_is_named_by_the_last_part_of_its_address(uri: str, name: str) -> None:
    assert paper._short(uri) == name
