"""What the tests of `sft`, `dpo` and `publish` share: settings, an interruption, independent log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cowest_serving.contract import parse
from cowest_training import dpo, tuning
from cowest_training.contract import Row, Training
from cowest_training.steps import Progress

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
QUERIES = tuple(f"what is {word} ?" for word in WORDS)
NUMBERS = ("one", "two", "three", "four", "five", "six")
GOOD = tuple(f"fact {word} is {number}" for word, number in zip(WORDS, NUMBERS, strict=True))
BAD = tuple(f"maybe {word} was never" for word in WORDS)
TEXTS = (*QUERIES, *GOOD, *BAD)
PAIRS = [
    dpo.Pair(({"role": "user", "content": query},), good, bad)
    for query, good, bad in zip(QUERIES, GOOD, BAD, strict=True)
]
PROMPTS = {"draft": "{query}", "refine": "{query} {draft}", "solo": "{query}"}


def training(**changes: Any) -> Training:
    """`supervised={...}` and `preference={...}` change single fields of a stage."""
    return parse(Training, training_spec(**changes), "spec.training")


def training_spec(
    supervised: dict[str, Any] | None = None, preference: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    return {
        "sft": "Auto",
        "method": "DPO",
        "seed": 7,
        "maxLength": 48,
        "lora": {"rank": 4, "alpha": 8, "dropout": "0.1"},
        "supervised": {"tuning": "Full", "epochs": 2, "learningRate": "0.01", "batchSize": 4, **(supervised or {})},
        "preference": {
            "tuning": "Full",
            "epochs": 2,
            "learningRate": "0.001",
            "batchSize": 4,
            "beta": "0.1",
            "nllWeight": "0.2",
            **(preference or {}),
        },
        **changes,
    }


def rows(explanations: tuple[str | None, ...] = GOOD) -> list[Row]:
    return [
        Row(f"q{i}", query, ({"role": "user", "content": query},), "x", explanation)
        for i, (query, explanation) in enumerate(zip(QUERIES, explanations, strict=True))
    ]


def write_job(folder: Path, **changes: Any) -> Path:
    """A defaulted spec with what steps read."""
    spec = {
        "strong": {
            "endpoint": "http://127.0.0.1:9/v1",
            "model": "strong",
            "apiKeySecretRefs": [],
            "timeoutSeconds": 5,
            "maxConcurrency": 1,
            "maxRetries": 0,
        },
        "collaboration": {
            "draft": "Explanation",
            "whenWeakFails": "Fail",
            "whenStrongFails": "Fail",
            "whenDraftsHurt": "Serve",
            "draftMaxTokens": 16,
            "prompts": PROMPTS,
        },
        "data": {"train": "file://train.jsonl", "heldOut": "file://held_out.jsonl"},
        "feedback": {
            "evaluator": {"type": "ExactMatch"},
            "draftsPerQuery": 2,
            "temperature": "1",
            "rule": "BestVersusWorst",
            "minMargin": "0.5",
            "maxQueries": 10,
            "minPairs": 1,
        },
        "training": training_spec(**changes),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(spec))
    return path


class Interrupting(Progress):
    """As Ctrl-C pressed after `step` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(None, "test")
        self.step = step

    def update(self, done: float, total: float | None, unit: str, message: str = "") -> None:
        if done == self.step:
            raise KeyboardInterrupt


class Recording(Progress):
    """Remembers which steps were done."""

    def __init__(self) -> None:
        super().__init__(None, "test")
        self.steps: list[float] = []
        self.total = 0.0

    def update(self, done: float, total: float | None, unit: str, message: str = "") -> None:
        self.steps.append(done)
        self.total = total or 0.0


def work(folder: Path, progress: Progress | None = None, *, checkpoint_seconds: float = 1e9) -> tuning.Work:
    return tuning.Work(folder / "model", folder / "checkpoints", progress or Progress(None, "test"), checkpoint_seconds)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """log pi(completion | prompt), token by token, with nothing of the steps' code."""
    total = 0.0
    for position, token in enumerate(completion):
        context = torch.tensor([[*prompt, *completion[:position]]])
        total += float(torch.log_softmax(model(context).logits[0, -1].double(), -1)[token])
    return total


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_chosen_got_likelier(start: Path, tuned: Path) -> None:
    """Against the rejected ones, for each pair."""
    reference, policy = load(start), load(tuned)
    weak = tuning.load_weak(start, tuning="Full", max_length=48, seed=0)
    for example in dpo.encode(weak, PAIRS)[0]:
        sides = (example["chosen_ids"], example["rejected_ids"])
        now, then = ([logp(m, example["prompt_ids"], side) for side in sides] for m in (policy, reference))
        assert now[0] - now[1] > then[0] - then[1]
