"""What is looked at before anything is started: rows, split, references, the weak model's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import dump
from cowest_serving.store import StoreError
from cowest_training import check
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK, Manifest, StepError, StepSettings
from cowest_training.steps import read_manifest
from tests.loop.tiny_models import make_model
from tests.world import SPEC

UNKNOWN = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}'


class Desk:
    """A job with its data and the files of a weak model, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows("train", 3, explanation="because")
        self.rows("held_out", 2)
        known = [f"{name} {i}? because" for name in ("train", "held_out") for i in range(4)]
        make_model(folder / "weak", known, max_position_embeddings=2048)
        self.declare()

    def file(self, name: str, text: str = "{}") -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def change(self, name: str, **values: Any) -> None:
        self.file(name, json.dumps({**json.loads((self.folder / name).read_text()), **values}))

    def rows(self, name: str, count: int, **more: Any) -> None:
        rows = [{"id": f"{name}{i}", "query": f"{name} {i}?", "reference": "12", **more} for i in range(count)]
        self.file(f"{name}.jsonl", "\n".join(map(json.dumps, rows)))

    def declare(self, **evaluator: Any) -> None:
        spec = dump(StepSettings(SPEC.strong, SPEC.collaboration, SPEC.data, SPEC.feedback, SPEC.training))
        spec["data"] = {
            name: str(self.folder / f"{file}.jsonl") for name, file in (("train", "train"), ("heldOut", "held_out"))
        }
        spec["weak"] = {"model": str(self.folder / "weak")}
        spec["feedback"]["evaluator"] = {"type": "ExactMatch", **evaluator}
        self.spec(spec)

    def labels(self, label: str, count: int = 1) -> Any:
        lines = [{"query": f"q{i}?", "answer": "12", "reference": "12", "label": label} for i in range(count)]
        self.file("labels.jsonl", "\n".join(map(json.dumps, lines)))
        return {"labels": str(self.folder / "labels.jsonl"), "minKappa": "0.5"}

    def spec(self, spec: Any) -> None:
        self.file("job.json", json.dumps({"kind": "CollaborationJob", "spec": spec}))

    def model(self, uri: str | None) -> None:
        job = json.loads((self.folder / "job.json").read_text())
        self.spec({**job["spec"], "weak": {"model": uri} if uri else {}})

    def check(self) -> Manifest:
        out = str(self.folder / "out")
        assert check.main(["--job", str(self.folder / "job.json"), "--out", out]) == EXIT_OK
        manifest = read_manifest(out)
        assert manifest is not None and manifest.kind == "Check"
        return manifest


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_it_says_what_the_loop_has_to_know(desk: Desk) -> None:
    assert desk.check().metrics == {
        "rows": 3,
        "held_out": 2,
        "has_explanations": True,
        "query_chars": len("held_out 0?"),
        "max_reference_chars": 2,
    }


def test_rows_without_explanations_are_said_to_be(desk: Desk) -> None:
    desk.rows("train", 3)
    assert desk.check().metrics["has_explanations"] is False


@pytest.mark.parametrize("changed", ["train", "held_out", "weak", "evaluator"])
def test_a_change_of_any_file_is_looked_at_anew(desk: Desk, changed: str) -> None:
    first = desk.check()
    assert desk.check() == first, "unchanged: nothing is done again"
    if changed == "evaluator":
        desk.declare(type="TokenF1")
    elif changed == "weak":
        desk.change("weak/config.json", bos_token_id=1)
    else:
        desk.rows(changed, 4)
    second = desk.check()
    assert second.inputs_digest != first.inputs_digest


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        pytest.param(lambda d: d.file("train.jsonl", "no row"), r"train.jsonl:1: wanted a JSON object", id="no rows"),
        pytest.param(lambda d: (d.folder / "held_out.jsonl").unlink(), "held_out.jsonl: wanted", id="no file"),
        pytest.param(
            lambda d: d.file("held_out.jsonl", (d.folder / "train.jsonl").read_text()), "are the same", id="no split"
        ),
        pytest.param(
            lambda d: d.declare(type="Choice", choices=["a", "b"]), "wanted one of the choices a, b", id="reference"
        ),
        pytest.param(lambda d: d.declare(extract="aisle ("), r"evaluator.extract: wanted a regular", id="extract"),
        pytest.param(lambda d: d.declare(extract="a{9999999999}"), "repetition number is too large", id="repetition"),
        pytest.param(lambda d: d.declare(calibration=d.labels("good")), "labels.jsonl:1: label", id="no such label"),
        pytest.param(
            lambda d: d.declare(calibration={"labels": str(d.folder / "none"), "minKappa": "0.5"}),
            "evaluator.calibration.labels",
            id="no labels there",
        ),
        pytest.param(lambda d: d.model(None), r"spec.weak.model: wanted a URI", id="no model named"),
        pytest.param(lambda d: d.model(str(d.folder / "none")), "saw nothing there", id="no model there"),
        pytest.param(
            lambda d: (d.folder / "weak/model.safetensors").unlink(), r"wanted weights as \*.safetensors", id="weights"
        ),
        pytest.param(lambda d: (d.folder / "weak/config.json").unlink(), "wanted config.json or", id="configuration"),
        pytest.param(
            lambda d: d.change("weak/config.json", hidden_size=32), r"weak: wanted weights of the shapes", id="shapes"
        ),
        pytest.param(
            lambda d: d.file("weak/chat_template.jinja", "{{ raise_exception('no system') }}"),
            "refuses all 3 that were looked at: .*no system",
            id="a template that takes nothing",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(desk: Desk, breakage: Any, message: str) -> None:
    breakage(desk)
    with pytest.raises(StepError, match=message) as error:
        desk.check()
    assert error.value.code == EXIT_BAD_INPUT
    assert not (desk.folder / "out").exists()


@pytest.mark.parametrize(("count", "says"), [(49, True), (50, False)])
def test_labels_that_are_too_few_are_said(desk: Desk, count: int, says: bool, capsys: Any) -> None:
    desk.declare(calibration=desk.labels("accept", count))
    desk.check()
    assert ("has 49 labels" in capsys.readouterr().err) is says


def test_a_tokenizer_that_loses_the_text_of_the_rows_is_refused(desk: Desk) -> None:
    desk.file("weak/tokenizer.json", UNKNOWN)
    with pytest.raises(StepError, match="loses most characters of 3 of 3 rows"):
        desk.check()


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(desk: Desk) -> None:
    desk.file("weak/tokenizer.json", UNKNOWN.replace('"?": 0', '"?": 0, "more": 77'))
    with pytest.raises(StepError, match=r"for ids up to 77. Too many: 'more' \(77\)"):
        desk.check()


def test_an_extract_that_finds_nothing_is_said(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.declare(extract="So: (.*)")
    desk.check()
    assert "note: feedback.evaluator.extract = 'So: (.*)' finds nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "said", "message"),
    [
        pytest.param("training", {"sft": "Always"}, "Always wanted training rows with an `explanation`", id="sft"),
        pytest.param("feedback", {"minPairs": 9, "maxQueries": 8}, "maxQueries queries give 8 at most", id="queries"),
        pytest.param("gate", {"minHeldOut": 3}, "gate.minHeldOut = 3 rows, saw 2", id="held-out rows"),
    ],
)
def test_rows_that_are_not_enough_are_refused_as_on_the_command_line(
    desk: Desk, section: str, said: dict[str, Any], message: str
) -> None:
    desk.rows("train", 3)
    assert desk.check().metrics["rows"] == 3
    spec = json.loads((desk.folder / "job.json").read_text())["spec"]
    rule = {"feedback": {"rule": "BestVersusWorst"}}.get(section, {})
    desk.spec({**spec, section: {**spec.get(section, {}), **rule, **said}})
    with pytest.raises(StepError, match=message) as error:
        desk.check()
    assert error.value.code == EXIT_BAD_INPUT


def test_rows_of_which_a_round_makes_too_few_pairs_without_traces_are_said(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.loads((desk.folder / "job.json").read_text())["spec"]
    desk.spec({**spec, "feedback": {**spec["feedback"], "rule": "BestVersusWorst", "minPairs": 4}})
    desk.check()
    assert "note: feedback.minPairs = 4, and 3 training rows give 3 pairs at most" in capsys.readouterr().err


def test_weights_in_a_folder_below_are_not_the_models(desk: Desk) -> None:
    (desk.folder / "weak/model.safetensors").unlink()
    desk.file("weak/checkpoint-1/model.safetensors")
    with pytest.raises(StepError, match="safetensors"):
        desk.check()


def test_a_model_of_the_hub_is_left_to_the_step_that_takes_it(desk: Desk) -> None:
    desk.model("hf://org/name@main")
    assert desk.check().inputs["model"] == "hf://org/name@main"


def test_a_store_that_is_no_store_is_said(desk: Desk) -> None:
    desk.model("ftp://host/model")
    with pytest.raises(StoreError, match="s3://"):
        desk.check()
