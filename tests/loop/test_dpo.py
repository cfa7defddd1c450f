"""Preference tuning: the reference is the model of the round's start, the loss is by the book, no output is partial."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cowest_serving.model_files import model_digest
from cowest_training import dpo, methods, tuning
from cowest_training.contract import EXIT_OK, Manifest, StepError
from cowest_training.steps import manifest_json
from tests.loop import tuning_world as world
from tests.loop.tiny_models import make_model

PAIRS = world.PAIRS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), world.TEXTS)


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the round's start: tuned by `sft` with LoRA, in a process of its own."""
    folder = tmp_path_factory.mktemp("start")
    data = folder / "train.jsonl"
    lines = [
        {"id": str(i), "query": query, "reference": "x", "explanation": text}
        for i, (query, text) in enumerate(zip(world.QUERIES, world.GOOD, strict=True))
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = world.write_job(folder, supervised={"tuning": "LoRA", "epochs": 10})
    command = [sys.executable, "-m", "cowest_training.sft", "--job", job, "--data", data, "--model", base]
    done = subprocess.run(
        [*map(str, command), "--out", str(folder / "sft")], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return folder / "sft"


def trainer_at(start: Path, folder: Path, **preference: Any) -> Any:
    settings = world.training(preference=preference)
    weak = tuning.load_weak(start, tuning=settings.preference.tuning, max_length=48, seed=settings.seed)
    examples, _ = dpo.encode(weak, PAIRS)
    return methods.build_trainer(weak, examples, settings, world.work(folder))


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_the_reference_is_the_model_of_the_rounds_start(base: Path, start: Path, tmp_path: Path, kind: str) -> None:
    rows = trainer_at(start, tmp_path, tuning=kind).train_dataset.with_format(None)
    assert len(rows) == len(PAIRS)
    for side in ("chosen", "rejected"):
        expected, of_base = (
            [world.logp(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
            for model in (world.load(start), world.load(base))
        )
        assert rows[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(expected, of_base, strict=True)) > 0.5, "the test must tell them apart"


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_the_loss_is_dpo_plus_the_weighted_nll_of_the_chosen(start: Path, tmp_path: Path, kind: str) -> None:
    """By hand on one batch, with a policy that has moved away from the reference."""
    beta, nll_weight = 0.3, 0.25
    trainer = trainer_at(start, tmp_path, tuning=kind, beta=str(beta), nllWeight=str(nll_weight))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in (weight for weight in trainer.model.parameters() if weight.requires_grad):
            weight.add_(0.05 * torch.randn_like(weight))
    rows = list(trainer.train_dataset.with_format(None))
    loss = float(trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)))

    policy, reference = tuning.plain(trainer).eval(), world.load(start)
    terms, nll, tokens = [], 0.0, 0
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        gain = world.logp(policy, prompt, chosen) - world.logp(reference, prompt, chosen)
        loss_of_rejected = world.logp(policy, prompt, rejected) - world.logp(reference, prompt, rejected)
        terms.append(math.log1p(math.exp(-beta * (gain - loss_of_rejected))))
        nll -= world.logp(policy, prompt, chosen)
        tokens += len(chosen)
    assert abs(sum(terms) / len(terms) - math.log(2)) > 1e-3, "the policy must have moved"
    assert loss == pytest.approx(sum(terms) / len(terms) + nll_weight * nll / tokens, abs=1e-4)


def test_the_first_step_starts_where_policy_and_reference_agree(start: Path, tmp_path: Path) -> None:
    settings = world.training(preference={"batchSize": 6})
    metrics = dpo.align(start, PAIRS, settings, world.work(tmp_path))
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=0)
    examples, _ = dpo.encode(weak, PAIRS)
    model = world.load(start)
    nll = -sum(world.logp(model, e["prompt_ids"], e["chosen_ids"]) for e in examples)
    tokens = sum(len(e["chosen_ids"]) for e in examples)
    assert metrics["loss_first"] == pytest.approx(math.log(2) + 0.2 * nll / tokens, abs=1e-3)


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_the_chosen_drafts_get_likelier_and_the_starting_model_stays(start: Path, tmp_path: Path, kind: str) -> None:
    before = model_digest(start)
    rate = {"Full": "0.001", "LoRA": "0.01"}[kind]
    settings = world.training(preference={"tuning": kind, "epochs": 6, "learningRate": rate})
    metrics = dpo.align(start, PAIRS, settings, world.work(tmp_path))
    assert model_digest(start) == before
    assert metrics["accuracy_last"] == 1.0 and metrics["margin_last"] > 0
    world.assert_chosen_got_likelier(start, tmp_path / "model")
    assert not any("adapter" in path.name for path in (tmp_path / "model").iterdir())


def test_the_measured_log_probability_is_that_of_the_written_model(start: Path, tmp_path: Path) -> None:
    metrics = dpo.align(start, PAIRS, world.training(preference={"tuning": "LoRA"}), world.work(tmp_path))
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=0)
    for key, folder in (("logp_chosen_before", start), ("logp_chosen_after", tmp_path / "model")):
        model = world.load(folder)
        values = [world.logp(model, e["prompt_ids"], e["chosen_ids"]) for e in dpo.encode(weak, PAIRS)[0]]
        assert metrics[key] == pytest.approx(sum(values) / len(values), abs=1e-3)


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_an_interrupted_tuning_goes_on_to_the_same_weights(start: Path, tmp_path: Path, kind: str) -> None:
    settings = world.training(preference={"tuning": kind, "epochs": 3})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dpo.align(start, PAIRS, settings, world.work(whole))
    with pytest.raises(KeyboardInterrupt):
        dpo.align(start, PAIRS, settings, world.work(broken, world.Interrupting(4), checkpoint_seconds=0))
    resumed = world.Recording()
    dpo.align(start, PAIRS, settings, world.work(broken, resumed))
    assert resumed.steps == [4, 5, 6], "it goes on, and does not start again"
    assert world.equal(world.weights(whole / "model"), world.weights(broken / "model"))


def test_pairs_that_teach_nothing_or_do_not_fit_are_left_out_and_counted(base: Path) -> None:
    weak = tuning.load_weak(base, tuning="Full", max_length=48, seed=0)
    asked = PAIRS[0].prompt
    others = [("one", "one"), ("one ", "one"), ("one", "two " * 60)]
    pairs = [PAIRS[0], *(dpo.Pair(asked, chosen, rejected) for chosen, rejected in others)]
    examples, dropped = dpo.encode(weak, pairs)
    assert (len(examples), dropped) == (1, {dpo.SAME: 2, tuning.TOO_LONG: 1})


def test_a_draft_that_was_cut_off_is_taught_no_end(base: Path) -> None:
    weak = tuning.load_weak(base, tuning="Full", max_length=48, seed=0)
    (example,), _ = dpo.encode(weak, [replace(PAIRS[0], chosen_ends=False)])
    end = weak.tokenizer.eos_token_id
    assert (end in example["chosen_ids"], example["rejected_ids"][-1] == end) == (False, True)


def test_pairs_are_read_line_by_line_whatever_stands_in_their_texts(tmp_path: Path) -> None:
    odd = replace(PAIRS[0], chosen="one\u2028two\u2029three\u0085four", rejected_ends=False)
    line = {"prompt": list(odd.prompt), "chosen": odd.chosen, "rejected": odd.rejected}
    text = json.dumps(line | {"rejected_finish_reason": "length"}, ensure_ascii=False)
    (tmp_path / "pairs.jsonl").write_text(f"{text}\n{json.dumps(line)}\n", "utf-8")
    first, second = dpo.read_pairs(str(tmp_path / "pairs.jsonl"))
    assert (first, second) == (odd, replace(odd, rejected_ends=True))
    assert "chosen_ends" not in second.record(), "pairs of older days keep their digest"


@pytest.mark.parametrize(
    ("pairs", "seen"),
    [
        pytest.param([], "saw none among 0", id="no pairs at all"),
        pytest.param([dpo.Pair(PAIRS[0].prompt, "one", "two " * 60)], "1 longer than maxLength", id="no pair fits"),
    ],
)
def test_no_usable_pair_ends_with_the_reason(base: Path, tmp_path: Path, pairs: list[dpo.Pair], seen: str) -> None:
    with pytest.raises(StepError, match=seen):
        dpo.align(base, pairs, world.training(), world.work(tmp_path))


def test_a_diverging_tuning_ends_the_step_and_writes_nothing(start: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    with pytest.raises(StepError, match="learningRate"):
        run(start, tmp_path, preference={"learningRate": "1e30", "epochs": 3})
    assert not (tmp_path / "dpo").exists()


def write_pairs(folder: Path) -> None:
    lines = [{"query_id": "q", "prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(start: Path, folder: Path, **changes: Any) -> int:
    job = world.write_job(folder, **changes)
    flags = {"job": job, "feedback": folder / "pairs.jsonl", "model": start, "out": folder / "dpo"}
    return dpo.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])


def test_the_model_names_the_feedback_that_its_pairs_come_from(tmp_path: Path) -> None:
    """From its digest `cowest lineage` goes on to the data; the digest of the pairs alone is no artifact's."""
    made = Manifest("Feedback", "sha256:f", "sha256:i", {}, {}, {}, "feedback", "0", "2026-01-01", 1.0)
    (tmp_path / "manifest.json").write_bytes(manifest_json(made))
    assert dpo.made_by(tmp_path.as_uri()) == {"feedback": "sha256:f"}
    assert dpo.made_by("of/a/person/pairs.jsonl") == {}


def test_the_step_writes_a_model_with_card_and_manifest_once(start: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    assert run(start, tmp_path) == EXIT_OK
    manifest = json.loads((tmp_path / "dpo/manifest.json").read_text())
    assert (manifest["kind"], manifest["digest"]) == ("Model", model_digest(tmp_path / "dpo"))
    assert manifest["inputs"]["model"] == model_digest(start) != manifest["digest"]
    assert manifest["metrics"]["pairs"] == len(PAIRS)
    assert "nll_weight" in (tmp_path / "dpo/README.md").read_text()
    written = (tmp_path / "dpo/manifest.json").stat().st_mtime_ns
    assert run(start, tmp_path) == EXIT_OK
    assert (tmp_path / "dpo/manifest.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("{", id="no JSON"),
        pytest.param('{"prompt": [], "chosen": "a"}', id="a side is missing"),
        pytest.param('{"prompt": [], "chosen": "a", "rejected": 1}', id="a draft that is no text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": [], "chosen": "a", "rejected": "b"}\n\n' + line)
    with pytest.raises(StepError, match=r"line 3"):
        dpo.read_pairs(str(tmp_path / "pairs.jsonl"))


HEALTHY = {"logp_chosen_before": -10.0, "logp_chosen_after": -9.0, "length_ratio": 1.0, "margin_last": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, [], id="a healthy tuning is silent"),
        pytest.param({"logp_chosen_after": -12.1}, ["fell by 21%"], id="the chosen drafts got less likely"),
        pytest.param({"logp_chosen_after": -11.9}, [], id="a small drop is usual"),
        pytest.param({"length_ratio": 1.3}, ["1.30 times as long"], id="chosen drafts are longer"),
        pytest.param({"length_ratio": 0.7}, ["0.70 times as long"], id="chosen drafts are shorter"),
        pytest.param({"margin_last": 0.0}, ["no likelier"], id="nothing was learnt"),
    ],
)
def test_alarms(change: dict[str, float], words: list[str]) -> None:
    rung = dpo.alarms({**HEALTHY, **change})
    assert len(rung) == len(words) and all(word in sentence for word, sentence in zip(words, rung, strict=True))
