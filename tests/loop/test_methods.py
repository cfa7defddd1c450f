"""Every method of preference tuning: its loss is by the book, drafts that helped get likelier, a kill costs nothing."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl.experimental.cpo import CPOTrainer

from cowest_training import dpo, methods, rated, tuning
from cowest_training.contract import OF_DRAFTS, StepError
from cowest_training.steps import read_manifest
from tests.loop import ledger_world
from tests.loop import tuning_world as world
from tests.loop.tiny_models import make_model

PAIRS = world.PAIRS
METHODS = ("IPO", "SimPO", "KTO", "GRPO")
GROUPS = [
    rated.Group(
        pair.prompt, tuple(rated.Rated(text, gain) for text, gain in zip(texts, (0.9, 0.2, 0.9, 0.4), strict=True))
    )
    for pair, number in zip(PAIRS, world.NUMBERS, strict=True)
    if (texts := (pair.chosen, pair.rejected, pair.chosen, f"maybe {number}"))
]
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("start"), world.TEXTS)


def moved(start: Path, folder: Path, method: str, **preference: Any) -> Any:
    """A trainer whose policy has left the reference behind."""
    settings = world.training(method=method, preference=preference)
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=settings.seed)
    encode: Any = rated.encode if method in OF_DRAFTS else dpo.encode
    examples, _ = encode(weak, learnt(method))
    trainer = methods.build_trainer(weak, examples, settings, world.work(folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return trainer


def loss_of(trainer: Any) -> float:
    rows = list(trainer.train_dataset.with_format(None))
    return float(trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)))


def learnt(method: str) -> Any:
    return GROUPS if method in OF_DRAFTS else PAIRS


def logps(model: Any, trainer: Any) -> list[tuple[float, float]]:
    """Of the chosen and of the rejected draft of each pair, with nothing of the steps' code."""
    rows = trainer.train_dataset.with_format(None)
    one, other = ([world.logp(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows] for side in SIDES)
    return list(zip(one, other, strict=True))


def lengths(trainer: Any) -> list[tuple[int, int]]:
    return [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset.with_format(None)]


def gains(start: Path, trainer: Any) -> list[tuple[float, float]]:
    """Log-ratios of policy to reference."""
    found = zip(logps(tuning.plain(trainer).eval(), trainer), logps(world.load(start), trainer), strict=True)
    return [(now[0] - then[0], now[1] - then[1]) for now, then in found]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_flip_rate_gives_on_average_the_loss_without_wrong_pairs(start: Path, tmp_path: Path) -> None:
    rate, beta = 0.2, 0.3
    trainer = moved(start, tmp_path, "DPO", beta=str(beta), nllWeight="0", labelFlipRate=str(rate))
    margins = [beta * (chosen - rejected) for chosen, rejected in gains(start, trainer)]
    right, flipped = (mean([math.log1p(math.exp(-sign * margin)) for margin in margins]) for sign in (1, -1))
    robust, turned = (((1 - rate) * a - rate * b) / (1 - 2 * rate) for a, b in ((right, flipped), (flipped, right)))
    assert loss_of(trainer) == pytest.approx(robust, abs=1e-4)
    assert abs(robust - right) > 1e-3, "the test must tell them apart"
    assert (1 - rate) * robust + rate * turned == pytest.approx(right), "with that share of pairs turned round"


def test_ipo_wants_a_margin_per_token_and_no_more(start: Path, tmp_path: Path) -> None:
    beta = 0.3
    trainer = moved(start, tmp_path, "IPO", beta=str(beta), nllWeight="0")
    terms = [
        (gain[0] / length[0] - gain[1] / length[1] - 1 / (2 * beta)) ** 2
        for gain, length in zip(gains(start, trainer), lengths(trainer), strict=True)
    ]
    assert loss_of(trainer) == pytest.approx(mean(terms), abs=1e-4)


def test_simpo_is_the_loss_of_trls_own_trainer_for_it(start: Path, tmp_path: Path) -> None:
    beta, gamma, weight = 2.5, 1.4, 0.3
    trainer = moved(start, tmp_path, "SimPO", beta=str(beta), gamma=str(gamma), nllWeight=str(weight))
    found, sizes = logps(tuning.plain(trainer).eval(), trainer), lengths(trainer)
    theirs = CPOTrainer.__new__(CPOTrainer)  # for its loss alone
    theirs.beta, theirs.simpo_gamma, theirs.label_smoothing, theirs.alpha = beta, gamma, 0.0, 0.0
    theirs.loss_type, theirs.accelerator = "simpo", trainer.accelerator
    means = [torch.tensor([logp[i] / size[i] for logp, size in zip(found, sizes, strict=True)]) for i in (0, 1)]
    likelihood = -sum(logp for logp, _ in found) / sum(size for size, _ in sizes)
    assert loss_of(trainer) == pytest.approx(float(theirs.cpo_loss(*means)[0].mean()) + weight * likelihood, abs=1e-4)


def test_kto_lifts_what_is_above_its_query_and_sinks_what_is_below(start: Path, tmp_path: Path) -> None:
    beta = 0.3
    trainer = moved(start, tmp_path, "KTO", beta=str(beta), batchSize=len(GROUPS) * 3)
    rows = list(trainer.train_dataset.with_format(None))
    policy, reference = tuning.plain(trainer).eval(), world.load(start)

    def gain(row: Any, ids: str) -> float:
        return world.logp(policy, row["prompt_ids"], row[ids]) - world.logp(reference, row["prompt_ids"], row[ids])

    kl = max(0.0, mean([gain(row, "KL_completion_ids") for row in rows]))
    signs = [1 if row["label"] else -1 for row in rows]
    terms = [
        1 - 1 / (1 + math.exp(-beta * sign * (gain(row, "completion_ids") - kl)))
        for row, sign in zip(rows, signs, strict=True)
    ]
    # One draft above and two below: the rarer kind counts twice.
    weighed = [term * (2 if sign > 0 else 1) for term, sign in zip(terms, signs, strict=True)]
    assert (signs.count(1), signs.count(-1)) == (len(GROUPS), 2 * len(GROUPS))
    assert loss_of(trainer) == pytest.approx(mean(weighed), abs=1e-4)


def test_grpo_weighs_each_draft_by_its_gain_against_its_query(start: Path, tmp_path: Path) -> None:
    beta = 0.3
    trainer = moved(start, tmp_path, "GRPO", beta=str(beta))
    policy, reference = tuning.plain(trainer).eval(), world.load(start)
    spread, losses, clipped = statistics.stdev((0.9, 0.2, 0.9, 0.4)) + 1e-4, [], 0
    for row, worth in zip(trainer.train_dataset.with_format(None), (0.9, 0.2, 0.9, 0.4) * len(GROUPS), strict=True):
        advantage, terms = (worth - 0.6) / spread, []
        ids = row["completion_ids"]
        for end in range(1, len(ids) + 1):
            now, then = (
                world.logp(model, [*row["prompt_ids"], *ids[: end - 1]], ids[end - 1 : end])
                for model in (policy, reference)
            )
            ratio, kl = math.exp(now - then), math.exp(then - now) - (then - now) - 1
            terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) + beta * ratio * kl)
            clipped += not 0.8 <= ratio <= 1.2
        losses.append(mean(terms))
    assert clipped, "the policy must have left the region that counts"
    trainer.current_gradient_accumulation_steps = 1
    assert loss_of(trainer) == pytest.approx(mean(losses), abs=1e-4)


def test_a_draft_with_a_gain_may_still_be_below_its_query(start: Path) -> None:
    """The sign of the gain is a poor label: where the strong model fails alone, nearly every draft has one."""
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=0)
    texts = {"fact alpha is one": 1.0, "maybe alpha was never": 0.1, "one": 0.4, "two": 0.5}
    group = rated.Group(PAIRS[0].prompt, tuple(rated.Rated(*item) for item in texts.items()))
    examples, dropped = rated.encode(weak, [group])
    labels = {weak.tokenizer.decode(r["completion_ids"][:-1]): r["label"] for r in methods.labelled(examples, 0)}
    assert labels == {"fact alpha is one": True, "maybe alpha was never": False, "one": False}, "two is at the mean"
    assert not dropped


def test_drafts_that_do_not_fit_are_left_out_and_a_query_with_them(start: Path) -> None:
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=0)
    long = rated.Rated("two " * 60, 0.0)
    one, other = GROUPS[0], rated.Group(GROUPS[1].prompt, (rated.Rated("one", 1.0), long))
    examples, dropped = rated.encode(weak, [replace(one, drafts=(*one.drafts, long)), other])
    assert (len(examples), len(examples[0]["drafts"]), dropped) == (1, 4, {tuning.TOO_LONG: 1})


def test_no_query_meets_itself_in_the_term_for_the_kl() -> None:
    drafts = [{"ids": [n], "above": above} for n, above in enumerate((1.0, -1.0, 0.5, -0.5))]
    examples = [
        {"prompt_ids": [query], "drafts": [{**d, "ids": [query, *d["ids"]]} for d in drafts]} for query in range(9)
    ]
    rows = methods.with_neighbours(methods.labelled(examples, 3), 6)
    assert len(rows) == 36
    assert all(row["KL_completion_ids"][0] != row["prompt_ids"][0] for row in rows)
    for start in range(0, 36, 6):
        batch = rows[start : start + 6]
        assert sorted(r["KL_completion_ids"] for r in batch) == sorted(r["completion_ids"] for r in batch)


def test_every_draft_is_read_from_the_ledger_of_the_queries_that_gave_a_pair(tmp_path: Path) -> None:
    made = [*ledger_world.entries("a", 0.5, 0.5, 0.5), *ledger_world.entries("b", 0.5, 0.0, 1.0)]
    ledger_world.write_round(str(tmp_path), 1, made)
    (group,) = rated.read_groups(f"{tmp_path}/runs/r1/feedback")
    assert [draft.gain for draft in group.drafts] == [-0.5, 0.5]
    assert [draft.text for draft in group.drafts] == [entry.draft.text for entry in made[2:]]
    with pytest.raises(StepError, match="learns from every draft"):
        rated.read_groups(str(tmp_path / "pairs.jsonl"))


def test_what_was_not_asked_is_neither_learnt_from_nor_told_apart(tmp_path: Path) -> None:
    asked = ledger_world.entries("a", 0.5, 0.0, 1.0)
    ledger_world.write_round(str(tmp_path), 1, asked)
    silent = ledger_world.spared(ledger_world.entries("c", 0.5, 0.0, 1.0), 0, solo=False)
    no_gain = ledger_world.spared(ledger_world.entries("b", 0.5, 0.0, 1.0), 2, solo=False)
    ledger_world.write_round(str(tmp_path), 2, [*asked, *no_gain, *silent])
    one, two = (f"{tmp_path}/runs/r{number}/feedback" for number in (1, 2))
    assert rated.read_groups(one) == rated.read_groups(two) != []
    assert rated.judged_by(one) == rated.judged_by(two)


@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_pairs_of_earlier_rounds_are_learnt_again_where_they_were_judged_alike(tmp_path: Path, method: str) -> None:
    for number, count in ((1, 9), (2, 9), (3, 10)):
        made = [entry for i in range(count) for entry in ledger_world.entries(f"r{number}q{i}", 0.5, 0.0, 1.0)]
        judged = [replace(e, answer=replace(e.answer, version="another")) for e in made] if number == 2 else made
        ledger_world.write_round(str(tmp_path), number, judged)
    uris = [f"{tmp_path}/runs/r{number}/feedback" for number in (1, 2, 3, 4)]
    args = argparse.Namespace(feedback=uris[2], replay=[uris[0], uris[1], uris[3]])
    training = world.training(method=method, preference={"replayPercent": 40})
    found, sources = dpo.replayed(args, training, 10)
    old = dpo.read_learnt(uris[0], training)
    assert len(found) == 4 and all(each in old for each in found), "none of round 2, whose answers are another model's"
    first = read_manifest(uris[0])
    assert first is not None and sources == {"replayed": [first.digest]}
    assert dpo.replayed(args, training, 10)[0] == found, "by the seed"
    assert dpo.replayed(args, world.training(method=method), 10) == ([], {})


@pytest.mark.parametrize("method", METHODS)
def test_the_drafts_that_helped_get_likelier(start: Path, tmp_path: Path, method: str) -> None:
    settings = world.training(method=method, preference={"epochs": 6})
    metrics = dpo.align(start, learnt(method), settings, world.work(tmp_path))
    assert metrics["accuracy_last"] == 1.0 and metrics["margin_last"] > 0
    world.assert_chosen_got_likelier(start, tmp_path / "model")


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_tuning_goes_on_to_the_same_weights(start: Path, tmp_path: Path, method: str) -> None:
    settings = world.training(method=method, preference={"epochs": 3})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dpo.align(start, learnt(method), settings, world.work(whole))
    with pytest.raises(KeyboardInterrupt):
        dpo.align(start, learnt(method), settings, world.work(broken, world.Interrupting(4), checkpoint_seconds=0))
    resumed = world.Recording()
    dpo.align(start, learnt(method), settings, world.work(broken, resumed))
    assert resumed.steps[0] == 4, "it goes on, and does not start again"
    assert world.equal(world.weights(whole / "model"), world.weights(broken / "model"))


@pytest.mark.parametrize(
    ("method", "said", "beta", "gamma"),
    [
        pytest.param("DPO", {}, 0.1, None, id="DPO"),
        pytest.param("SimPO", {}, 2.0, 1.0, id="SimPO has others"),
        pytest.param("SimPO", {"beta": 5.0, "gamma": 0.0}, 5.0, 0.0, id="what is said counts, 0 too"),
    ],
)
def test_what_the_manifest_leaves_open_is_the_methods_own(
    method: Any, said: dict[str, float], beta: float, gamma: float | None
) -> None:
    training = world.training(method=method)
    stage = methods.hyper_parameters(
        replace(training, preference=replace(training.preference, **{"beta": None, **said}))
    )
    assert (stage.beta, stage.gamma) == (beta, gamma)


# ---------------------------------------------------------------- the early stop
EAGER = {"validationPercent": 40, "epochs": 20, "batchSize": 2, "learningRate": "0.01", "beta": "1"}


def test_whole_queries_are_looked_at_and_not_learnt_from() -> None:
    examples = [{"prompt_ids": [n // 2], "chosen_ids": [n]} for n in range(20)]
    learnt, seen = methods.apart(examples, 30, seed=1)
    assert (len(learnt), len(seen)) == (14, 6) and sorted([*learnt, *seen], key=str) == sorted(examples, key=str)
    assert not {e["prompt_ids"][0] for e in learnt} & {e["prompt_ids"][0] for e in seen}
    assert methods.apart(examples, 30, seed=1)[1] == seen != methods.apart(examples, 30, seed=2)[1]
    assert methods.apart(examples, 0, seed=1) == (examples, [])
    assert methods.apart(examples[:2], 30, seed=1) == (examples[:2], []), "one query alone is learnt from"


@pytest.mark.parametrize("method", ["DPO", "SimPO", "KTO", "GRPO"])
def test_tuning_ends_when_what_is_not_learnt_from_gets_worse(start: Path, tmp_path: Path, method: str) -> None:
    settings = world.training(method=method, preference=EAGER)
    progress = world.Recording()
    metrics = dpo.align(start, learnt(method), settings, world.work(tmp_path, progress))
    assert metrics["looked_at"] == 2 and metrics["pairs"] == len(PAIRS)
    assert metrics["best_step"] < metrics["steps"] == progress.steps[-1]
    assert metrics["steps"] < progress.total or method == "GRPO", "whose clipped loss rises little and falls again"
    # What was written is the model of the best step: a tuning of the same rows that is cut off there has its weights.
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=settings.seed)
    encode: Any = rated.encode if method in OF_DRAFTS else dpo.encode
    examples, _ = encode(weak, learnt(method))
    rows, _ = methods.apart(examples, 40, settings.seed)
    other = methods.build_trainer(weak, rows, settings, world.work(tmp_path / "other"))
    other.add_callback(StopAt(metrics["best_step"]))
    tuning.train(other, world.work(tmp_path / "other"))
    written = world.weights(tmp_path / "model")
    for name, weight in tuning.plain(other).state_dict().items():
        assert torch.allclose(weight, written[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_a_kill_does_not_forget_how_often_the_loss_has_not_fallen(start: Path, tmp_path: Path, kind: str) -> None:
    settings = world.training(preference={**EAGER, "tuning": kind})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = dpo.align(start, PAIRS, settings, world.work(whole))
    with pytest.raises(KeyboardInterrupt):
        dpo.align(start, PAIRS, settings, world.work(broken, world.Interrupting(first["steps"]), checkpoint_seconds=0))
    second = dpo.align(start, PAIRS, settings, world.work(broken))
    assert (second["steps"], second["best_step"]) == (first["steps"], first["best_step"])
    assert world.equal(world.weights(whole / "model"), world.weights(broken / "model"))
