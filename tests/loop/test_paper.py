"""The paper's manifests are valid and can be planned offline, on records written by hand and a strong stand-in."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowest_cli import manifest_verbs
from cowest_cli import run as run_verbs
from cowest_training.data import read_rows
from tests.benchmarks import paper, paper_steps
from tests.fakes import Call, ScriptedModel
from tests.loop.tiny_models import make_model
from tests.paper_data import HELD_OUT, convert, make_job


@pytest.mark.parametrize("dataset", tuple(convert.SOURCES))
def test_a_manifest_of_the_paper_is_valid_and_planned_without_a_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    with ScriptedModel("Answer: B").in_thread() as strong:
        job = make_job(dataset, tmp_path, **{"strong.endpoint": strong.url})
        capsys.readouterr()
        manifest_verbs.validate(job)
        said = capsys.readouterr()
        assert f"60 training rows, {HELD_OUT} held-out rows, 60 explained training rows" in said.out
        assert "finds nothing" not in said.err
        run_verbs.plan(job, output="json")
        baseline, tuned = json.loads(capsys.readouterr().out)["parts"]
        assert not strong.calls
    assert (baseline["calls"], tuned["calls"]) == (2 * HELD_OUT, 60 * 4 + 60 + HELD_OUT)
    assert tuned["money"] > baseline["money"] > 0


@pytest.mark.parametrize("form", ["Knowledge", "Answer"])
@pytest.mark.parametrize("dataset", tuple(convert.SOURCES))
def test_the_other_draft_forms_are_valid_with_their_own_rows(tmp_path: Path, dataset: str, form: str) -> None:
    train = f"file://data/{dataset}/{convert.FORMS[form]}"
    manifest_verbs.validate(make_job(dataset, tmp_path, **{"collaboration.draft": form, "data.train": train}))


# ---------------------------------------------------------------- the tables
class InProcess(paper.PaperStudy):
    """The same study whose steps run in this process: each would begin by loading torch."""

    def _call(self, command: list[Any], name: str) -> None:
        words = [str(word) for word in command]
        if "-m" in words:
            place = words.index("-m") + 1
            assert importlib.import_module(words[place]).main(words[place + 1 :]) == 0
        else:
            assert paper_steps.main(words[2:]) == 0


def follow(call: Call) -> str:
    """A strong model that knows nothing and takes over the last letter that a draft or a small model names."""
    asked = call.body["messages"][-1]["content"]
    said = re.findall(r"<draft>.*Answer: ([A-D])|small model .* says: Answer: ([A-D])", asked, re.DOTALL)
    return f"Answer: {''.join(said[-1])}" if said else "Answer: A"


@pytest.fixture(scope="module")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MedMCQA by hand, with a weak model that is tuned within seconds."""
    folder = tmp_path_factory.mktemp("paper")
    tuning = {"tuning": "Full", "learningRate": "0.01", "batchSize": 8, "epochs": 4}
    with ScriptedModel(follow).in_thread() as strong:
        job = make_job("medmcqa", folder, **{
            "weak.model": "file://weak", "strong.endpoint": strong.url, "strong.apiKeySecretRefs": [],
            "collaboration.draftMaxTokens": 12, "feedback.maxQueries": 16, "training.maxLength": 200,
            "training.supervised": tuning, "training.preference": {**tuning, "beta": "0.1"},
        })  # fmt: skip
        rows = read_rows((folder / "data/medmcqa/train.jsonl").as_uri())
        texts = [text for row in rows for text in (row.query, row.explanation or "", "Answer: A B C D")]
        make_model(folder / "weak", texts, max_position_embeddings=256)
        yield job


def test_a_table_is_planned_without_a_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job("ifqa", tmp_path, **{"feedback.maxQueries": 20, "feedback.minPairs": 5})
    capsys.readouterr()
    assert paper.main(["main", "-f", str(job), "--work", str(tmp_path / "work"), "--plan"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["calls"] == 4 * 20 + 20 + 8 * HELD_OUT and seen["money"] > 0 and seen["currency"] == "USD"
    assert not (tmp_path / "work").exists()


def test_the_main_table_has_a_row_for_each_arm(tiny_job: Path, tmp_path: Path) -> None:
    study = InProcess(tiny_job, tmp_path)
    rows = {row.arm: row for row in study.main()}
    assert list(rows) == [
        "strong alone",
        "weak alone, SFT",
        "collaboration, SFT draft",
        "SuperICL",
        "SFT on positives",
        "RLWF",
        "CoWest, the paper's rule and loss",
        "CoWest, best versus worst with NLL",
    ]
    assert {row.n for row in rows.values()} == {HELD_OUT}
    assert rows["strong alone"].score == 0.25 and rows["strong alone"].second == pytest.approx(0.1)
    assert rows["SuperICL"].strong_calls == HELD_OUT
    assert rows["RLWF"].pairs and rows["CoWest, the paper's rule and loss"].pairs
    again = {row.arm: row for row in InProcess(tiny_job, tmp_path).main()}
    assert again == rows
