"""The paper's manifests are valid and can be planned offline, on records written by hand and a strong stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cowest_cli import manifest_verbs
from cowest_cli import run as run_verbs
from tests.fakes import ScriptedModel
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
