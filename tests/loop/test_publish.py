"""Importing a model as a candidate, and the cards that go with artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from cowest_serving.model_files import ModelFolderError, model_digest
from cowest_training import cards, publish
from cowest_training.contract import EXIT_OK
from tests.loop import tuning_world as world
from tests.loop.tiny_models import make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), world.TEXTS)


def adapter_of(base: Path, folder: Path) -> torch.Tensor:
    """Saves an adapter that changes the model; returns the logits of base and adapter together."""
    torch.manual_seed(3)
    model = get_peft_model(world.load(base), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.tensor([[2, 8, 9, 10]])).logits
    return logits


def test_a_model_goes_below_the_root_under_its_digest(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish.main(["--model", str(base), "--models", str(tmp_path / "models")]) == EXIT_OK
    said = json.loads(capsys.readouterr().out)
    out = tmp_path / "models" / said["digest"].removeprefix("sha256:")
    assert said == {"digest": model_digest(base), "uri": str(out)}
    assert model_digest(out) == said["digest"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["digest"], manifest["step"]) == ("Model", said["digest"], "publish")
    written = (out / "manifest.json").stat().st_mtime_ns
    assert publish.main(["--model", str(base), "--models", str(tmp_path / "models")]) == EXIT_OK
    assert (out / "manifest.json").stat().st_mtime_ns == written


def test_a_model_that_is_whole_waits_for_no_tuning_library(base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cowest_training import publish; "
        f"publish.main(['--model', {str(base)!r}, '--out', {str(tmp_path / 'out')!r}]); "
        "print(*sorted({'peft', 'trl'} & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert ended.stderr.splitlines()[-1:] in ([], [""])


def test_an_adapter_is_merged_into_its_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = adapter_of(base, tmp_path / "adapter")
    assert publish.main(["--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == EXIT_OK
    out = tmp_path / "out"
    assert not list(out.glob("adapter*"))
    with torch.no_grad():
        logits = world.load(out)(torch.tensor([[2, 8, 9, 10]])).logits
        of_base = world.load(base)(torch.tensor([[2, 8, 9, 10]])).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (of_base - expected).abs().max() > 0.01
    assert json.loads(capsys.readouterr().out)["digest"] == model_digest(out) != model_digest(base)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_an_adapter_whose_base_has_a_generation_configuration_that_cannot_be_written_is_merged(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", world.TEXTS)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    adapter_of(base, tmp_path / "adapter")
    assert publish.main(["--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == EXIT_OK
    assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.6, "top_p": 0.9}'


def test_what_is_no_part_of_a_model_stays_behind(base: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", world.TEXTS)
    (source / "train.py").write_text("import os")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    assert publish.main(["--model", str(source), "--out", str(tmp_path / "out")]) == EXIT_OK
    assert not (tmp_path / "out/train.py").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "apache-2.0, inherited" in card and "# The base" in card


def test_pickled_weights_are_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", world.TEXTS)
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(ModelFolderError):
        publish.main(["--model", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--out", "a", "--models", "b"]], ids=["no place", "two places"])
def test_one_place_is_wanted(base: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        publish.main(["--model", str(base), *flags])


# ---------------------------------------------------------------- cards
CARD = cards.ModelCard(
    step="dpo",
    digest="sha256:aa",
    base="hf://org/name@v1",
    base_digest="sha256:bb",
    data_digest="sha256:cc",
    seed=3,
    parameters={"lora": {"rank": 4}, "beta": 0.1},
    metrics={"alarms": ["a | b"]},
)


def test_a_model_card_says_where_the_model_comes_from() -> None:
    text = cards.model_card(CARD)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "org/name" and front["license"] == "unknown" and "dpo" in front["tags"]
    for line in ("| base digest | `sha256:bb` |", "| data digest | `sha256:cc` |", "| seed | 3 |", "| beta | 0.1 |"):
        assert line in text
    assert "| lora | rank: 4 |" in text and "a \\| b" in text


def test_a_data_set_card_says_what_was_left_out() -> None:
    card = cards.DatasetCard(
        "collect", "sha256:dd", 1500, ["dataset.jsonl"], "Rows.", {"train": "sha256:ee"}, {"near held-out": 2}
    )
    text = cards.dataset_card(card)
    assert yaml.safe_load(text.split("---\n")[1])["size_categories"] == ["1K<n<10K"]
    assert "| near held-out | 2 |" in text and "| train | sha256:ee |" in text


@pytest.mark.parametrize(
    ("readme", "license_"),
    [
        pytest.param("---\nlicense: mit\n---\ntext", "mit", id="declared"),
        pytest.param("---\ntags: [a]\n---\n", "unknown", id="not declared"),
        pytest.param("# no front matter", "unknown", id="no front matter"),
        pytest.param("---\n: [\n---\n", "unknown", id="broken front matter"),
        pytest.param("---\n- a\n---\n", "unknown", id="a list"),
    ],
)
def test_the_licence_is_read_from_the_bases_card(readme: str, license_: str) -> None:
    assert cards.license_of(readme) == license_
