"""Supervised fine-tuning: what is learnt, what is left out, and that a kill costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cowest_serving.contract import Prompts
from cowest_serving.generate import Generator
from cowest_serving.model_files import ModelFolderError, model_digest
from cowest_training import sft, tuning
from cowest_training.contract import EXIT_OK, Row, StepError
from cowest_training.weak_folders import copy_tokenizer
from tests.loop import tuning_world as world
from tests.loop.tiny_models import make_model
from tests.loop.tuning_world import rows

PROMPTS = Prompts(**world.PROMPTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), world.TEXTS)


def weak(folder: Path, max_length: int = 48) -> tuning.Weak:
    return tuning.load_weak(folder, tuning="Full", max_length=max_length, seed=0)


def test_the_loss_is_on_the_draft_and_its_end_alone_given_the_prompt_that_the_server_renders(base: Path) -> None:
    model = weak(base)
    (example, *_), _ = sft.encode(model, rows(), PROMPTS)
    words = model.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["<s>", "<user>", *world.QUERIES[0].split(), "<end>", "<assistant>", *world.GOOD[0].split(), "</s>"]
    assert example["labels"] == [-100] * 8 + example["input_ids"][8:]


def test_a_tuned_model_writes_the_explanations_and_ends(base: Path, tmp_path: Path) -> None:
    settings = world.training(supervised={"epochs": 100, "learningRate": "0.003"})
    metrics = sft.fine_tune(base, rows(), PROMPTS, settings, world.work(tmp_path))
    assert metrics["loss_last"] < 0.1 < metrics["loss_first"]
    made = Generator.load(tmp_path / "model").generate(
        [[{"role": "user", "content": query}] for query in world.QUERIES],
        max_tokens=16,
        temperature=0,
        seeds=[0] * len(world.QUERIES),
    )
    assert tuple(one.text.strip() for one in made) == world.GOOD
    assert {one.finish_reason for one in made} == {"stop"}


def test_lora_is_merged_into_a_whole_folder_and_the_base_stays(base: Path, tmp_path: Path) -> None:
    before = model_digest(base)
    settings = world.training(supervised={"tuning": "LoRA", "epochs": 4})
    sft.fine_tune(base, rows(), PROMPTS, settings, world.work(tmp_path))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any("adapter" in name for name in names)
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert model_digest(base) == before
    assert not world.equal(world.weights(base), world.weights(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_an_interrupted_tuning_goes_on_to_the_same_weights(base: Path, tmp_path: Path, kind: str) -> None:
    settings = world.training(supervised={"tuning": kind, "epochs": 3})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sft.fine_tune(base, rows(), PROMPTS, settings, world.work(whole))
    with pytest.raises(KeyboardInterrupt):  # in the middle of the second epoch
        sft.fine_tune(base, rows(), PROMPTS, settings, world.work(broken, world.Interrupting(4), checkpoint_seconds=0))
    assert tuning.last_checkpoint(broken / "checkpoints") == str(broken / "checkpoints/checkpoint-3")
    resumed = world.Recording()
    sft.fine_tune(base, rows(), PROMPTS, settings, world.work(broken, resumed))
    assert resumed.steps == [4, 5, 6], "it goes on, and does not start again"
    assert world.equal(world.weights(whole / "model"), world.weights(broken / "model"))


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(base: Path, tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((1, 1, 2)):
        settings = world.training(supervised={"tuning": "LoRA", "epochs": 1}, seed=seed)
        sft.fine_tune(base, rows(), PROMPTS, settings, world.work(tmp_path / str(number)))
        digests.append(model_digest(tmp_path / str(number) / "model"))
    assert digests[0] == digests[1] != digests[2]


def test_rows_without_explanation_or_too_long_are_left_out_and_counted(base: Path) -> None:
    data = rows((*world.GOOD[:4], None, "one " * 60))
    examples, dropped = sft.encode(weak(base), data, PROMPTS)
    assert (len(examples), dropped) == (4, {sft.NO_EXPLANATION: 1, tuning.TOO_LONG: 1})


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        pytest.param(rows((None,) * 6), "6 without explanation", id="no row has an explanation"),
        pytest.param(rows(("one " * 60,) * 6), "6 longer than maxLength", id="no row fits"),
    ],
)
def test_nothing_to_learn_from_ends_with_the_reason(base: Path, tmp_path: Path, data: list[Row], seen: str) -> None:
    with pytest.raises(StepError, match=seen):
        sft.fine_tune(base, data, PROMPTS, world.training(), world.work(tmp_path))


def test_a_tokenizer_that_loses_the_text_of_the_rows_is_refused_before_tuning(tmp_path: Path) -> None:
    foreign = make_model(tmp_path / "foreign", ["что такое альфа"])
    with pytest.raises(StepError, match="loses most characters of 6 of 6 rows: 'what is alpha"):
        sft.fine_tune(foreign, rows(), PROMPTS, world.training(), world.work(tmp_path))


def test_the_models_own_places_limit_the_length(base: Path) -> None:
    assert (weak(base, 4096).limit, weak(base, 48).limit) == (64, 48)


def test_a_loss_that_is_not_a_number_ends_the_step_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    model = world.load(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    copy_tokenizer(base, broken)
    with pytest.raises(StepError, match="learningRate"):
        sft.fine_tune(broken, rows(), PROMPTS, world.training(), world.work(tmp_path))
    assert not (tmp_path / "model").exists()


def run(base: Path, folder: Path, **changes: Any) -> int:
    data = folder / "train.jsonl"
    lines = [
        {"id": row.id, "query": row.query, "reference": row.reference, "explanation": row.explanation} for row in rows()
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = world.write_job(folder, **changes)
    flags = {"job": job, "data": data, "model": base, "out": folder / "out" / "sft", "progress": folder / "p.json"}
    return sft.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])


def test_the_step_writes_a_model_with_card_and_manifest_once(base: Path, tmp_path: Path) -> None:
    assert run(base, tmp_path, supervised={"epochs": 1}) == EXIT_OK
    out = tmp_path / "out" / "sft"
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["digest"]) == ("Model", model_digest(out))
    assert manifest["metrics"]["rows"] == 6
    card = (out / "README.md").read_text()
    assert manifest["inputs"]["data"] in card and model_digest(base) in card and "licence | unknown" in card
    assert json.loads((tmp_path / "p.json").read_text())["done"] == 2
    assert [path.name for path in out.parent.iterdir()] == ["sft"], "checkpoints and scratch are gone"

    written = (out / "manifest.json").stat().st_mtime_ns
    assert run(base, tmp_path, supervised={"epochs": 1}) == EXIT_OK
    assert (out / "manifest.json").stat().st_mtime_ns == written, "the same work is not done again"
    assert run(base, tmp_path, supervised={"epochs": 2}) == EXIT_OK
    assert json.loads((out / "manifest.json").read_text())["metrics"]["steps"] == 4, "other settings are other work"


UNWRITABLE = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}  # transformers reads it and refuses to write it


@pytest.mark.parametrize("stage", [{"tuning": "Full"}, {"tuning": "LoRA"}])
def test_the_bases_generation_configuration_goes_along_byte_for_byte(tmp_path: Path, stage: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base", world.TEXTS)
    (base / "generation_config.json").write_text(json.dumps(UNWRITABLE))
    settings = world.training(supervised={"epochs": 1, **stage})
    sft.fine_tune(base, rows(), PROMPTS, settings, world.work(tmp_path, checkpoint_seconds=0))
    written = (tmp_path / "model" / "generation_config.json").read_bytes()
    assert written == (base / "generation_config.json").read_bytes()


def test_a_base_with_missing_weights_is_not_tuned(base: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base", world.TEXTS)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"1 missing .*up_proj"):
        weak(folder)


def test_pickled_weights_are_refused(base: Path, tmp_path: Path) -> None:
    torch.save(world.load(base).state_dict(), tmp_path / "pytorch_model.bin")
    copy_tokenizer(base, tmp_path)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ModelFolderError):
        run(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("batch", "longest", "sequences", "split"),
    [
        pytest.param(16, 100, 1, (16, 1), id="everything fits at once"),
        pytest.param(16, 1024, 1, (4, 4), id="four rows fill the pass"),
        pytest.param(16, 1024, 2, (2, 8), id="a pair is two sequences"),
        pytest.param(7, 1024, 1, (1, 7), id="a prime batch goes row by row"),
        pytest.param(2, 99999, 1, (1, 2), id="one row is the least"),
    ],
)
def test_a_batch_is_split_to_bound_the_tokens_at_once(
    batch: int, longest: int, sequences: int, split: tuple[int, int]
) -> None:
    assert tuning.split_batch(batch, longest, "cpu", sequences) == split


def test_a_checkpoint_that_was_not_written_to_its_end_is_removed(tmp_path: Path) -> None:
    for name, text in (("checkpoint-2", '{"global_step": 2}'), ("checkpoint-10", None), ("checkpoint-9", '{"glo')):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "trainer_state.json").write_text(text)
    assert tuning.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_checkpoints_outlive_a_kill_and_go_with_the_work_or_with_other_inputs(tmp_path: Path) -> None:
    out = str(tmp_path / "sft")
    with pytest.raises(KeyboardInterrupt), tuning.checkpoint_folder(out, "sft", {"seed": 1}) as folder:
        (folder / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    with tuning.checkpoint_folder(out, "sft", {"seed": 1}) as again:
        assert (again / "checkpoint-1").is_dir()
    assert not (tmp_path / ".checkpoints").exists()

    with pytest.raises(StepError), tuning.checkpoint_folder(out, "sft", {"seed": 1}) as folder:
        (folder / "checkpoint-1").mkdir()
        raise StepError("stop")
    with tuning.checkpoint_folder(out, "sft", {"seed": 2}) as other:
        assert list(other.parent.iterdir()) == [other] and not list(other.iterdir())
    with pytest.raises(StepError), tuning.checkpoint_folder(out, "sft", {"seed": 2}):
        raise StepError("before the first checkpoint")
    assert not (tmp_path / ".checkpoints").exists()


def test_a_model_without_an_end_of_sequence_token_is_refused(base: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", world.TEXTS)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(StepError, match="eos_token"):
        weak(folder)


def test_without_a_chat_template_the_tokenizers_own_special_tokens_come_first(base: Path, tmp_path: Path) -> None:
    model = weak(make_model(tmp_path / "plain", world.TEXTS, chat=False))
    (example, *_), _ = sft.encode(replace(model, limit=32), rows(), PROMPTS)
    words = model.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["what", "is", "alpha", "?", "fact", "alpha", "is", "one", "</s>"]
