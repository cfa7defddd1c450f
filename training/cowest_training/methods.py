"""The methods of preference tuning, each by a trainer and a loss of TRL's own (decision 18).

    DPO    -log sigmoid(beta * (r+ - r-)), with r = log pi(y|x)/ref(y|x)
           labelFlipRate e: ((1 - e) * loss(+, -) - e * loss(-, +)) / (1 - 2e), on average that of right labels alone
    IPO    (r+/|y+| - r-/|y-| - 1 / (2 beta))^2
    SimPO  -log sigmoid(beta * (log pi(y+|x)/|y+| - log pi(y-|x)/|y-|) - gamma), without a reference

and to each of them nllWeight times the negative log-likelihood of a chosen token. Used by `dpo`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl import DPOConfig

from cowest_training import tuning
from cowest_training.contract import Stage, Training
from cowest_training.shared_prompt import SharedPromptDPOTrainer

WARMUP = 0.1
BETA = {"DPO": 0.1, "IPO": 0.1, "SimPO": 2.0}
GAMMA = 1.0
LOSS = {"DPO": "sigmoid", "IPO": "ipo", "SimPO": "sigmoid_norm"}

Example = Mapping[str, Any]  # prompt_ids, chosen_ids, rejected_ids


def hyper_parameters(training: Training) -> Stage:
    """What the method goes by: its own values where the manifest is silent."""
    stage, method = training.preference, training.method
    return dataclasses.replace(
        stage,
        beta=BETA[method] if stage.beta is None else stage.beta,
        nll_weight=stage.nll_weight or 0.0,
        gamma=(GAMMA if stage.gamma is None else stage.gamma) if method == "SimPO" else None,
    )


def build_trainer(weak: tuning.Weak, examples: Sequence[Example], training: Training, work: tuning.Work) -> Any:
    """A trainer of the method, with what it wants of the reference already in its `train_dataset`."""
    stage = hyper_parameters(training)
    nll_weight = stage.nll_weight
    loss = "robust" if stage.label_flip_rate else LOSS[training.method]
    config = DPOConfig(
        **tuning.common_arguments(
            stage,
            work,
            rows=len(examples),
            longest=max(len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples),
            sequences=2,
            warmup=WARMUP,
            seed=training.seed,
            device=weak.device,
        ),
        beta=stage.beta,
        label_smoothing=stage.label_flip_rate or 0.0,
        loss_type=[loss, "sft"] if nll_weight else [loss],
        loss_weights=[1.0, nll_weight] if nll_weight else [1.0],
        # The live model before its first step is the reference. Without this TRL loads one again from wherever the
        # model's configuration says that it once came from.
        precompute_ref_log_probs=True,
    )
    trainer = SimPOTrainer if training.method == "SimPO" else TokenisedDPOTrainer
    return trainer(
        **({"gamma": stage.gamma} if training.method == "SimPO" else {}),
        model=weak.model,
        args=config,
        train_dataset=Dataset.from_list(list(examples)),
        processing_class=weak.tokenizer,
        peft_config=tuning.lora_config(training.lora, stage.tuning),
        callbacks=[tuning.Watch(work)],
    )


class TokenisedDPOTrainer(SharedPromptDPOTrainer):
    """DPOTrainer on token ids. TRL 1.16 tokenises texts itself, which may double the beginning-of-sequence token and
    move the border of the prompt; here both are as the server sees them."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class SimPOTrainer(TokenisedDPOTrainer):
    """SimPO as DPO of log-probabilities per token (`sigmoid_norm`) against a reference that gives each token of a
    chosen draft gamma / beta nats and each of a rejected one 0: `CPOTrainer`'s loss, in a row a pair."""

    def __init__(self, *, gamma: float, **rest: Any) -> None:
        self.gamma = gamma
        super().__init__(**rest)

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        margins = [self.gamma / self.beta * len(ids) for ids in dataset["chosen_ids"]]
        return dataset.add_column("ref_chosen_logps", margins).add_column("ref_rejected_logps", [0.0] * len(margins))
