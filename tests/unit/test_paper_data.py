"""The paper's data sets become rows: real columns, records written by hand, every label and draft form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cowest_cli import jobs
from cowest_training.contract import Evaluator
from cowest_training.data import read_rows
from cowest_training.evaluator import RuleScorer
from tests.paper_data import BIKE, BRIDGE, EXAMPLE, LATER, VESSEL, convert


def converted(dataset: str, records: Sequence[Mapping[str, Any]], **settings: Any) -> list[Any]:
    source = convert.SOURCES[dataset]
    return list(source.convert(convert.complete(records, source.columns), "train", convert.Settings(**settings)))


def run(*arguments: object) -> int:
    return int(convert.main([str(argument) for argument in arguments]))


# ---------------------------------------------------------------- one record
def test_an_ifqa_question_comes_with_its_passages_and_the_sentence_that_bears_on_it() -> None:
    (example,) = converted("ifqa", [BRIDGE])
    assert example.id == "train-7" and json.loads(example.reference) == ["1906", "in 1906"]
    assert example.query.startswith("Passages:\n[1] Alder is a town.") and "[2] The river" in example.query
    assert example.draft("Explanation") == "The Alder bridge opened in 1904.\nAnswer: 1906"
    assert (
        example.draft("Knowledge") == "The Alder bridge opened in 1904." and example.draft("Answer") == "Answer: 1906"
    )


def test_an_ifqa_question_can_be_asked_without_passages() -> None:
    (example,) = converted("ifqa", [BRIDGE], passages=False)
    assert example.query.startswith("If the Alder bridge") and "Passages" not in example.query
    assert example.draft("Knowledge") == "The Alder bridge opened in 1904."


@pytest.mark.parametrize(
    ("answers", "reference"),
    [
        pytest.param(["1906"], "1906", id="one answer stands as it is"),
        pytest.param(["[redacted]"], '["[redacted]"]', id="one that looks like a list is put into one"),
        pytest.param([], "", id="no answer is no label"),
    ],
)
def test_ifqa_answers_become_a_reference(answers: list[str], reference: str) -> None:
    assert convert.references(answers) == reference


def test_a_medmcqa_question_shows_its_options_and_is_answered_by_a_letter() -> None:
    (example,) = converted("medmcqa", [VESSEL], first_option=0)
    assert example.id == "train-ab-1" and example.reference == "B" and example.group == "Anatomy"
    assert "\nA. Aorta\nB. Pulmonary artery\nC. Portal vein\nD. Renal artery\n" in example.query
    assert example.draft("Explanation") == "It leaves the right ventricle.\nAnswer: B"


def test_a_medmcqa_question_without_explanation_teaches_its_answer_alone() -> None:
    (example,) = converted("medmcqa", [{**VESSEL, "exp": None}], first_option=0)
    assert "explanation" not in example.row("Explanation") and "explanation" not in example.row("Knowledge")
    assert example.row("Answer")["explanation"] == "Answer: B"


@pytest.mark.parametrize(
    ("cops", "letters"),
    [
        pytest.param([0, 3, -1], ["A", "D", ""], id="the Hub counts from 0, and -1 is no label"),
        pytest.param([1, 4, None], ["A", "D", ""], id="the authors' archive counts from 1"),
    ],
)
def test_medmcqa_options_are_counted_as_the_data_show(cops: list[int | None], letters: list[str]) -> None:
    assert [example.answer for example in converted("medmcqa", [{**VESSEL, "cop": cop} for cop in cops])] == letters


@pytest.mark.parametrize("cops", [pytest.param([1, 2], id="neither 0 nor 4"), pytest.param([0, 4], id="both")])
def test_medmcqa_options_that_do_not_show_how_they_count_are_refused(cops: list[int]) -> None:
    with pytest.raises(convert.ConversionError, match="--first-option"):
        converted("medmcqa", [{**VESSEL, "cop": cop} for cop in cops])


def test_a_prosocial_turn_stands_below_the_turns_before_it_whatever_the_order_of_the_file() -> None:
    first, second = converted("prosocial", [LATER, BIKE])
    assert (first.id, second.id) == ("train-3-0", "train-3-1")
    assert (first.reference, second.reference) == ("needs caution", "casual")
    dialogue = "A: I will keep the bike that I found.\nB: Would you tell its owner?\nA: Fine, I will put up a note.\n"
    assert dialogue in second.query and "Would you" not in first.query and "Good." not in second.query


def test_a_prosocial_explanation_is_made_of_reasons_and_rules_of_thumb_each_once() -> None:
    first, second = converted("prosocial", [BIKE, LATER])
    rules = "It's wrong to keep what is not yours. You should look for an owner."
    assert first.draft("Knowledge") == rules
    assert first.draft("Explanation") == f"The speaker keeps what another lost. {rules}\nAnswer: needs caution"
    assert second.draft("Explanation") == "" and second.draft("Answer") == "Answer: casual"


def test_an_unknown_safety_label_is_refused() -> None:
    with pytest.raises(convert.ConversionError, match="saw '__fine__'"):
        converted("prosocial", [{**BIKE, "safety_label": "__fine__"}])


# ---------------------------------------------------------------- whole files
def vessels(prefix: str, count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {**VESSEL, "id": f"{prefix}{i}", "question": f"{prefix}: which vessel is number {i}?", "cop": i % 4, **changes}
        for i in range(count)
    ]


def test_json_arrays_json_lines_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    records = vessels("train", 8)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    held_out = tmp_path / "held.json"
    held_out.write_text(json.dumps(vessels("held", 8)))
    written = []
    for name in ("a.json", "l.jsonl", "p.parquet"):
        out = tmp_path / f"of-{name}"
        assert run("medmcqa", "--train", tmp_path / name, "--held-out", held_out, "--out", out) == 0
        written.append((out / "train.jsonl").read_text())
    assert written[0] == written[1] == written[2] != ""


def test_what_cannot_be_learnt_from_fairly_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = vessels("held", 6)
    again = {**held_out[2], "id": "again"}
    train = [*vessels("train", 6), {**vessels("train", 1)[0], "id": "twice"}, again, *vessels("blank", 1, cop=-1)]
    (tmp_path / "t.json").write_text(json.dumps(train))
    (tmp_path / "h.json").write_text(json.dumps(held_out))
    assert run("medmcqa", "--train", tmp_path / "t.json", "--held-out", tmp_path / "h.json", "--out", tmp_path) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["train"], said["heldOut"]) == (6, 6)
    wanted = {"repeated question": 1, "nearly a held-out question": 1, "without a label": 1}
    assert said["leftOut"] == {"train": wanted, "heldOut": {}}
    rows = {name: read_rows((tmp_path / name).as_uri()) for name in (*convert.FORMS.values(), "held_out.jsonl")}
    assert [row.id for row in rows["train.jsonl"]] == [row.id for row in rows["train-answer.jsonl"]]
    assert not any(row.explanation for row in rows["held_out.jsonl"])


def test_a_sample_is_decided_by_the_seed_and_not_by_the_order_of_the_file() -> None:
    examples = converted("medmcqa", vessels("train", 40))

    def ids(found: Sequence[Any], seed: int) -> list[str]:
        return [example.id for example in convert.take(found, 10, seed).examples]

    assert len(ids(examples, 0)) == 10 and ids(examples, 0) == ids(examples[::-1], 0) != ids(examples, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["medmcqa"], "saw neither", id="no files"),
        pytest.param(["ifqa", "--hub"], "published as files", id="a set that the Hub has in no known form"),
        pytest.param(["ifqa", "--train", "r.json", "--held-out", "r.json"], "Is it another data set?", id="foreign"),
        pytest.param(["ifqa", "--train", "no.json", "--held-out", "r.json"], "Check the path", id="no such file"),
        pytest.param(["ifqa", "--train", "bad.json", "--held-out", "r.json"], "wanted a JSON array", id="no JSON"),
        pytest.param(["ifqa", "--train", "none.json", "--held-out", "r.json"], "saw none", id="an empty file"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(json.dumps([VESSEL]))
    Path("bad.json").write_text("{question: ")
    Path("none.json").write_text("")
    assert run(*arguments, "--out", "out") == 2
    assert says in capsys.readouterr().err and not Path("out").exists()


# ---------------------------------------------------------------- the paper's metrics
@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        pytest.param("ifqa", "It opened in 1904.\nAnswer: the year 1906", '["1906", "in 1906"]', 2 / 3, id="token F1"),
        pytest.param("ifqa", "Answer: 1904? No.\nAnswer: 1906", "1906", 1.0, id="the last answer counts"),
        pytest.param("ifqa", "1906", "1906", 0.0, id="no line with an answer"),
        pytest.param("medmcqa", "A is the aorta.\n**Answer:** B.", "B", 1.0, id="a letter in bold"),
        pytest.param("medmcqa", "Answer: A", "B", 0.0, id="another option"),
        pytest.param("medmcqa", "Answer: Because", "B", 0.0, id="a word that begins with a letter is none"),
        pytest.param("prosocial", "Answer: Needs caution.", "needs caution", 1.0, id="a label"),
        pytest.param("prosocial", "Answer: probably needs caution", "needs caution", 0.0, id="a longer label"),
    ],
)
async def test_the_manifests_score_as_the_paper_does(name: str, answer: str, reference: str, score: float) -> None:
    scorer = RuleScorer(evaluator_of(name))
    (row,) = convert.rows_of([convert.Example("1", "?", "x", reference)])
    assert await scorer(row, answer) == pytest.approx(score)


def evaluator_of(name: str) -> Evaluator:
    return jobs.load(EXAMPLE / f"{name}.yaml").job.spec.feedback.evaluator
