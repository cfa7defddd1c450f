"""The study's page and the pairs that its controls are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cowest_operator import manifest
from tests.benchmarks import study

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_the_rows_of_its_json_and_its_notes_as_they_stand() -> None:
    rows = json.loads((DOCS / "study.json").read_text("utf-8"))
    assert (DOCS / "study.md").read_text("utf-8") == study.page(rows, DOCS / "study.md"), (
        "python tests/benchmarks/study.py --page-only"
    )


@pytest.fixture
def case(tmp_path: Path) -> study.Study:
    """A feedback step of each rule: 40 pairs of the paper's, 30 of best-versus-worst."""
    made = study.Study("freight", 3, tmp_path)
    for rule, count in (("SignOfGain", 40), ("BestVersusWorst", 30)):
        folder = made.work / f"standard-{rule}-abc-feedback"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"digest": f"sha256:{rule}"}))
        pairs = [{"query_id": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return made


def pairs_of(uri: str) -> tuple[str, list[dict[str, str]]]:
    folder = Path(uri.removeprefix("file://"))
    return json.loads((folder / "manifest.json").read_text())["digest"], list(study._jsonl(folder / "pairs.jsonl"))


def test_the_papers_rule_is_given_as_many_pairs_as_the_other_made(case: study.Study) -> None:
    source = (case.work / "standard-SignOfGain-abc-feedback").as_uri()
    digest, kept = pairs_of(case._fewer(source, "fewer"))
    numbers = [int(pair["query_id"][1:]) for pair in kept]
    assert len(kept) == 30 and numbers == sorted(set(numbers)) and numbers != list(range(30))
    assert digest == "sha256:fewer-SignOfGain"
    assert pairs_of(case._fewer(source, "again"))[1] == kept, "by the seed"


def test_a_coin_turns_about_half_of_the_pairs_and_loses_none(case: study.Study) -> None:
    digest, pairs = pairs_of(case._shuffled((case.work / "standard-SignOfGain-abc-feedback").as_uri(), "shuffled"))
    turned = [pair for pair in pairs if pair["chosen"].startswith("bad")]
    assert len(pairs) == 40 and 10 <= len(turned) <= 30
    assert all({pair["chosen"], pair["rejected"]} == {f"good {i}", f"bad {i}"} for i, pair in enumerate(pairs))
    assert digest == "sha256:shuffled-SignOfGain"


def test_a_share_of_the_pairs_is_turned_and_the_same_ones_for_each_loss(case: study.Study) -> None:
    source = (case.work / "standard-SignOfGain-abc-feedback").as_uri()
    digest, pairs = pairs_of(case._flipped(source, "flipped", 0.2))
    assert [pair["chosen"].startswith("bad") for pair in pairs].count(True) == 8 and len(pairs) == 40
    assert digest == "sha256:flipped-0.2-SignOfGain"
    assert pairs_of(case._flipped(source, "robust", 0.2))[1] == pairs


def test_every_arm_is_a_manifest_that_is_valid_and_has_files_of_its_own(case: study.Study) -> None:
    case.endpoints = dict.fromkeys(study.TASTES, "http://127.0.0.1:9/v1")
    (case.work / "job.yaml").write_text((case.example / "job.yaml").read_text("utf-8"), "utf-8")
    for arm in study.ARMS.values():
        assert manifest.validate(case.job_of(arm)) == []
    assert len({study.name_of(arm) for arm in study.ARMS}) == len(study.ARMS)


@pytest.mark.parametrize(("arm", "name"), [("paper's rule (sign of gain)", "papers-rule-sign-of-gain"),
                                           ("paper's rule, as many pairs", "papers-rule-as-many-pairs")])  # fmt: skip
def test_files_are_named_after_their_arm(arm: str, name: str) -> None:
    assert study.name_of(arm) == name
