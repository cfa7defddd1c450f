"""The methods of preference tuning, each by a trainer and a loss of TRL's own (decision 18). Of pairs

    DPO    -log sigmoid(beta * (r+ - r-)), with r = log pi(y|x)/ref(y|x)
           labelFlipRate e: ((1 - e) * loss(+, -) - e * loss(-, +)) / (1 - 2e), on average that of right labels alone
    IPO    (r+/|y+| - r-/|y-| - 1 / (2 beta))^2
    SimPO  -log sigmoid(beta * (log pi(y+|x)/|y+| - log pi(y-|x)/|y-|) - gamma), without a reference

and to each of them nllWeight times the negative log-likelihood of a chosen token; of all drafts of a query

    KTO    1 - sigmoid(beta * (r - kl)) of a draft above the query's mean, 1 - sigmoid(beta * (kl - r)) of one below
    GRPO   -min(q * a, clip(q, 0.8, 1.2) * a) + beta * KL to ref, a token; q = pi/ref, a = (gain - mean) / deviation

Used by `dpo`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import pad

from cowest_training import tuning
from cowest_training.contract import OF_DRAFTS, Stage, Training
from cowest_training.rated import LEAST
from cowest_training.shared_prompt import SharedPromptDPOTrainer

WARMUP = 0.1
BETA = {"DPO": 0.1, "IPO": 1.0, "SimPO": 2.0, "KTO": 0.1, "GRPO": 0.04}
GAMMA = 1.0
LOSS = {"DPO": "sigmoid", "IPO": "ipo", "SimPO": "sigmoid_norm"}

# prompt_ids, chosen_ids, rejected_ids, and `drafts` of each where the method learns from all of them
Example = Mapping[str, Any]


def hyper_parameters(training: Training) -> Stage:
    """What the method goes by: its own values where the manifest is silent, none that it does not look at."""
    stage, method = training.preference, training.method
    return dataclasses.replace(
        stage,
        beta=BETA[method] if stage.beta is None else stage.beta,
        nll_weight=None if method in OF_DRAFTS else stage.nll_weight or 0.0,
        gamma=(GAMMA if stage.gamma is None else stage.gamma) if method == "SimPO" else None,
        validation_percent=stage.validation_percent or None,
        replay_percent=stage.replay_percent or None,
    )


def apart(examples: Sequence[Example], percent: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn from, to look at on the way), whole queries by chance."""

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/{example['prompt_ids']}".encode()).digest()

    places = sorted({place(example) for example in examples})
    seen = set(places[: max(1, len(places) * percent // 100)]) if percent and len(places) > 1 else set()
    return [e for e in examples if place(e) not in seen], [e for e in examples if place(e) in seen]


def build_trainer(
    weak: tuning.Weak,
    examples: Sequence[Example],
    training: Training,
    work: tuning.Work,
    looked_at: Sequence[Example] = (),
) -> Any:
    """A trainer of the method, with what it wants of the reference already in its `train_dataset`."""
    build = {"KTO": _kto, "GRPO": _grpo}.get(training.method, _pairs)
    return build(_Setting(weak, training, work), examples, looked_at)


@dataclasses.dataclass(frozen=True)
class _Setting:
    weak: tuning.Weak
    training: Training
    work: tuning.Work

    @property
    def stage(self) -> Stage:
        return hyper_parameters(self.training)

    def arguments(self, lengths: Sequence[int], *, looks: bool, sequences: int, least: int = 1) -> dict[str, Any]:
        """What every trainer is told. `lengths`: tokens of prompt and draft of each row."""
        arguments = tuning.common_arguments(
            self.stage,
            self.work,
            lengths=lengths,
            sequences=sequences,
            least=least,
            warmup=WARMUP,
            seed=self.training.seed,
            device=self.weak.device,
        )
        steps = self.stage.epochs * math.ceil(len(lengths) / self.stage.batch_size)
        return arguments | (tuning.early_stop_arguments(arguments, steps) if looks else {})

    def shared(self, rows: Iterable[Example], looked_at: Sequence[Example]) -> dict[str, Any]:
        return {
            "model": self.weak.model,
            "processing_class": self.weak.tokenizer,
            "train_dataset": Dataset.from_list(list(rows)),
            "eval_dataset": Dataset.from_list(list(looked_at)) if looked_at else None,
            "peft_config": tuning.lora_config(self.training.lora, self.stage.tuning),
            "callbacks": [tuning.Watch(self.work), *(tuning.early_stop() if looked_at else ())],
        }


def _lengths(rows: Iterable[Example]) -> list[int]:
    return [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]


# ---------------------------------------------------------------- pairs
def _pairs(setting: _Setting, examples: Sequence[Example], looked_at: Sequence[Example]) -> DPOTrainer:
    method, stage = setting.training.method, setting.stage
    lengths = [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]
    loss, nll_weight = "robust" if stage.label_flip_rate else LOSS[method], stage.nll_weight
    config = DPOConfig(
        **setting.arguments(lengths, looks=bool(looked_at), sequences=2),
        beta=stage.beta,
        label_smoothing=stage.label_flip_rate or 0.0,
        loss_type=[loss, "sft"] if nll_weight else [loss],
        loss_weights=[1.0, nll_weight] if nll_weight else [1.0],
        # The live model before its first step is the reference. Without this TRL loads one again from wherever the
        # model's configuration says that it once came from.
        precompute_ref_log_probs=True,
    )
    if method == "SimPO":
        return SimPOTrainer(gamma=stage.gamma or 0.0, args=config, **setting.shared(examples, looked_at))
    return TokenisedDPOTrainer(args=config, **setting.shared(examples, looked_at))


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


# ---------------------------------------------------------------- KTO
def _kto(setting: _Setting, examples: Sequence[Example], looked_at: Sequence[Example]) -> KTOTrainer:
    stage, seed = setting.stage, setting.training.seed
    rows, seen = labelled(examples, seed), labelled(looked_at, seed)
    arguments = setting.arguments(_lengths(rows), looks=bool(seen), sequences=2, least=2)
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    config = KTOConfig(
        **arguments,
        beta=stage.beta,
        desirable_weight=max(1.0, bad / good),  # the rarer kind weighs as much as the other (Eq. 8 of the paper)
        undesirable_weight=max(1.0, good / bad),
        precompute_ref_log_probs=True,  # as for pairs
    )
    mismatched = (with_neighbours(each, arguments["per_device_train_batch_size"]) for each in (rows, seen))
    return TokenisedKTOTrainer(args=config, **setting.shared(*mismatched))


class TokenisedKTOTrainer(KTOTrainer):  # type: ignore[misc]
    """KTOTrainer on token ids, for the reasons of `TokenisedDPOTrainer`."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def labelled(examples: Iterable[Example], seed: int) -> list[dict[str, Any]]:
    """A row for each different draft that has a label. Those of one query stand apart: see `with_neighbours`."""
    chance, queries = random.Random(seed), []
    for example in examples:
        rows = {
            tuple(draft["ids"]): {
                "prompt_ids": example["prompt_ids"],
                "completion_ids": draft["ids"],
                "label": draft["above"] > 0,
            }
            for draft in example["drafts"]
            if abs(draft["above"]) >= LEAST
        }
        queries.append(chance.sample(list(rows.values()), len(rows)))
    chance.shuffle(queries)
    return [row for turn in zip_longest(*queries) for row in turn if row]


def with_neighbours(rows: Sequence[Mapping[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """With the draft of the row before in the same batch: of such TRL's trainer makes its KL term."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        before = [batch[-1], *batch[:-1]]
        found.extend(
            {**row, "KL_completion_ids": other["completion_ids"]} for row, other in zip(batch, before, strict=True)
        )
    return found


# ---------------------------------------------------------------- GRPO
def _grpo(setting: _Setting, examples: Sequence[Example], looked_at: Sequence[Example]) -> GRPOTrainer:
    rows, seen = (
        [
            {"prompt_ids": e["prompt_ids"], "completion_ids": draft["ids"], "advantage": draft["advantage"]}
            for e in each
            for draft in e["drafts"]
        ]
        for each in (examples, looked_at)
    )
    arguments = setting.arguments(_lengths(rows), looks=bool(seen), sequences=1)
    del arguments["max_length"]
    config = GRPOConfig(
        **arguments,
        loss_type="grpo",
        beta=0.0,  # a second model would be loaded as the reference; `LedgerGRPOTrainer` sets the KL's weight
        disable_dropout=True,
        num_generations=2,  # of a sampling that does not happen, so that the configuration is a valid one
        num_generations_eval=1,
        generation_batch_size=2 * arguments["per_device_train_batch_size"],
    )
    return LedgerGRPOTrainer(beta=setting.stage.beta, args=config, **setting.shared(rows, seen))


class LedgerGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer's loss on drafts that were drawn before, by the model it begins with, in place of its own sampling.

    That model is what the ratio and the KL term are against: its log-probabilities are computed once.
    """

    def __init__(
        self, *, beta: float | None, train_dataset: Dataset, eval_dataset: Dataset | None, **rest: Any
    ) -> None:
        super().__init__(reward_funcs=_no_reward, train_dataset=train_dataset, eval_dataset=eval_dataset, **rest)
        self.beta = beta
        self.data_collator = self._collate
        self.train_dataset = self._with_logps(train_dataset)
        self.eval_dataset = eval_dataset and self._with_logps(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "advantage", "logps"]

    # What TRL has of its own around the sampling is that of any trainer again.
    def get_train_dataloader(self) -> Any:
        return super(GRPOTrainer, self).get_train_dataloader()

    def _get_train_sampler(self, *args: Any) -> Any:
        return super(GRPOTrainer, self)._get_train_sampler(*args)

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Any:
        return super(GRPOTrainer, self)._prepare_inputs(inputs)

    @torch.no_grad()
    def _with_logps(self, dataset: Dataset) -> Dataset:
        self.model.eval()
        rows, at_once = list(dataset), self.args.per_device_train_batch_size
        found: list[list[float]] = []
        for start in range(0, len(rows), at_once):
            batch = self._prepare_inputs(self._collate(rows[start : start + at_once]))
            ids, mask = (torch.cat((batch[f"prompt_{k}"], batch[f"completion_{k}"]), dim=1) for k in ("ids", "mask"))
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1])
            lengths = batch["completion_mask"].sum(1)
            found.extend(line[:length].tolist() for line, length in zip(logps, lengths, strict=True))
        return dataset.add_column("logps", found)

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch as TRL's sampling leaves it."""
        batch = {"advantages": torch.tensor([row["advantage"] for row in rows])}
        for part, side in (("prompt", "left"), ("completion", "right")):
            ids = [torch.tensor(row[f"{part}_ids"]) for row in rows]
            batch[f"{part}_ids"] = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side=side)
            batch[f"{part}_mask"] = pad([torch.ones_like(each) for each in ids], padding_value=0, padding_side=side)
        if "logps" in rows[0]:
            logps = pad([torch.tensor(row["logps"]) for row in rows], padding_value=0.0, padding_side="right")
            batch["old_per_token_logps"] = batch["ref_per_token_logps"] = logps
        return batch


def _no_reward(**_: Any) -> list[float]:
    raise AssertionError("the gains are in the ledger: nothing is sampled")
