"""Every method of preference tuning: its loss is by the book, drafts that helped get likelier, a kill costs nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.cpo import CPOTrainer

from cowest_training import dpo, methods, tuning
from tests.loop import tuning_world as world
from tests.loop.tiny_models import make_model

PAIRS = world.PAIRS
METHODS = ("IPO", "SimPO")
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("start"), world.TEXTS)


def moved(start: Path, folder: Path, method: str, **preference: Any) -> Any:
    """A trainer whose policy has left the reference behind."""
    settings = world.training(method=method, preference=preference)
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=settings.seed)
    examples, _ = dpo.encode(weak, PAIRS)
    trainer = methods.build_trainer(weak, examples, settings, world.work(folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return trainer


def loss_of(trainer: Any) -> float:
    rows = list(trainer.train_dataset.with_format(None))
    return float(trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)))


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


@pytest.mark.parametrize("method", METHODS)
def test_the_drafts_that_helped_get_likelier(start: Path, tmp_path: Path, method: str) -> None:
    settings = world.training(method=method, preference={"epochs": 6})
    metrics = dpo.align(start, PAIRS, settings, world.work(tmp_path))
    assert metrics["accuracy_last"] == 1.0 and metrics["margin_last"] > 0
    world.assert_chosen_got_likelier(start, tmp_path / "model")


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_tuning_goes_on_to_the_same_weights(start: Path, tmp_path: Path, method: str) -> None:
    settings = world.training(method=method, preference={"epochs": 3})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dpo.align(start, PAIRS, settings, world.work(whole))
    with pytest.raises(KeyboardInterrupt):
        dpo.align(start, PAIRS, settings, world.work(broken, world.Interrupting(4), checkpoint_seconds=0))
    resumed = world.Recording()
    dpo.align(start, PAIRS, settings, world.work(broken, resumed))
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
