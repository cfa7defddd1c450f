"""What the tests of `feedback`, `evaluate` and `score_live` share: a tiny pair, rows, a strong model with a taste."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_serving.contract import Pair, Prompts, dump, query_text
from cowest_serving.model_files import model_digest
from cowest_training.contract import Row
from tests.fakes import Call, ScriptedModel
from tests.loop.tiny_models import make_model

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
NUMBERS = {word: str(number) for number, word in enumerate(WORDS, 1)}
PROMPTS = Prompts(draft="explain {query}", refine="{query} DRAFT {draft}", solo="{query}")
TEXTS = (*(f"explain what is {word} ?" for word in WORDS), *NUMBERS.values())


def rows(n: int = len(WORDS)) -> list[dict[str, Any]]:
    """Queries about words; the reference is the word's number."""
    return [
        {"id": f"r{i}", "query": f"what is {word} ?", "reference": NUMBERS[word], "group": "even" if i % 2 else "odd"}
        for i, word in enumerate(WORDS[:n])
    ]


def write_rows(path: Path, values: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def parsed(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [Row(v["id"], v["query"], ({"role": "user", "content": v["query"]},), v["reference"]) for v in values]


def likes(text: str) -> bool:
    """The taste of this strong model: half of all drafts, by no reason that a weak model could guess."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def strong_answer(call: Call) -> str:
    """Right with a draft to its taste; alone it knows only alpha."""
    text = query_text(call.body["messages"])
    word = next(word for word in text.replace("?", " ").split() if word in NUMBERS)
    query, separator, draft = text.partition(" DRAFT")
    knows = likes(query + draft.strip()) if separator else word == "alpha"
    return NUMBERS[word] if knows else "no idea"


def make_pair(folder: Path, strong: ScriptedModel, *, seed: int = 0) -> Pair:
    make_model(folder, TEXTS, seed=seed, tie_word_embeddings=False)  # tied, an untrained model repeats its prompt
    return Pair(model_digest(folder), folder.as_uri(), PROMPTS, "Explanation", strong.url, "strong")


def write_pair(path: Path, pair: Pair) -> str:
    path.write_text(json.dumps(dump(pair)), encoding="utf-8")
    return str(path)


def write_job(path: Path, strong_url: str, **sections: Mapping[str, Any]) -> str:
    """A defaulted spec; `feedback={...}` changes single fields of a section."""
    stage = {"tuning": "LoRA", "epochs": 1, "learningRate": "0.001", "batchSize": 4, "beta": "0.1", "nllWeight": "0"}
    spec: dict[str, dict[str, Any]] = {
        "strong": {
            "endpoint": strong_url,
            "model": "strong",
            "apiKeySecretRefs": [],
            "timeoutSeconds": 60,
            "maxConcurrency": 4,
            "maxRetries": 1,
        },
        "collaboration": {
            "draft": "Explanation",
            "whenWeakFails": "StrongAlone",
            "whenStrongFails": "Fail",
            "whenDraftsHurt": "StrongAlone",
            "draftMaxTokens": 6,
        },
        "data": {"train": "unused", "heldOut": "unused"},
        "feedback": {
            "evaluator": {"type": "ExactMatch"},
            "draftsPerQuery": 4,
            "temperature": "1",
            "rule": "BestVersusWorst",
            "minMargin": "0.5",
            "maxQueries": 100,
            "minPairs": 1,
        },
        "training": {
            "sft": "Never",
            "method": "DPO",
            "seed": 7,
            "maxLength": 64,
            "lora": {"rank": 4, "alpha": 8, "dropout": "0"},
            "supervised": stage,
            "preference": stage,
        },
        "canary": {"signal": "LateReference"},
    }
    merged = {name: {**section, **sections.get(name, {})} for name, section in spec.items()}
    path.write_text(json.dumps(merged), encoding="utf-8")
    return str(path)
