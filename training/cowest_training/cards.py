"""Model and data set cards: the README.md of an artifact, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

UNKNOWN_LICENSE = "unknown"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_STEPS = {
    "sft": "supervised fine-tuning on the domain's explanations",
    "dpo": "preference optimization on drafts that helped or hurt the strong model's answer",
    "publish": "imported as it is",
}


@dataclass(frozen=True)
class ModelCard:
    """What a person must know about a weak model. Digests are `sha256:...`; `data_digest` is None for an import."""

    step: str  # sft | dpo | publish
    digest: str
    base: str  # URI that it was made from
    base_digest: str
    data_digest: str | None = None
    seed: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    license: str = UNKNOWN_LICENSE
    version: str = ""


@dataclass(frozen=True)
class DatasetCard:
    """What a person must know about a data set: what it holds, where it came from, what was left out and why."""

    step: str  # collect | feedback
    digest: str
    rows: int
    files: Sequence[str]
    description: str
    sources: Mapping[str, str] = field(default_factory=dict)  # name -> digest or URI
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    columns: Mapping[str, str] = field(default_factory=dict)  # name -> meaning
    license: str = UNKNOWN_LICENSE
    version: str = ""


def model_card(card: ModelCard) -> str:
    """The README.md of a model folder."""
    front = {
        "license": card.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(card.base),
        "tags": ["cowest", "weak-model", card.step],
    }
    made = {
        "made by": f"`{card.step}`: {_STEPS.get(card.step, card.step)}",
        "digest": f"`{card.digest}`",
        "base": f"`{card.base}`",
        "base digest": f"`{card.base_digest}`",
        "data digest": f"`{card.data_digest}`" if card.data_digest else "none",
        "seed": "none" if card.seed is None else card.seed,
        "CoWest": card.version or "unknown",
        "licence": _license_line(card.license, "base model"),
    }
    return _document(
        front,
        "Weak model of a weak-strong pair",
        "This model writes drafts for a strong model to answer from. It is tuned for the pair's answers; alone "
        "it may answer worse than its base. The method: Jiao et al., arXiv 2504.15188.",
        {"Where it comes from": made, "Hyper-parameters": card.parameters, "Measured while tuning": card.metrics},
    )


def dataset_card(card: DatasetCard) -> str:
    """The README.md of a data set folder."""
    front = {
        "license": card.license,
        "tags": ["cowest", card.step],
        "size_categories": [_size(card.rows)],
    }
    made = {
        "made by": f"`{card.step}`",
        "digest": f"`{card.digest}`",
        "rows": card.rows,
        "files": ", ".join(f"`{name}`" for name in card.files),
        "CoWest": card.version or "unknown",
        "licence": _license_line(card.license, "sources"),
    }
    return _document(
        front,
        "Data set of a weak-strong pair",
        card.description,
        {
            "Where it comes from": made,
            "Sources": card.sources,
            "Left out": card.left_out,
            "Columns": card.columns,
        },
    )


def predictor_card(digest: str, inputs: Mapping[str, Any], metrics: Mapping[str, Any], version: str) -> str:
    """The README.md of what says which queries need no draft or no strong model."""
    learnt = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    made = {"made by": "`predictor`", "digest": f"`{digest}`", "CoWest": version or "unknown", **inputs}
    return _document(
        {"tags": ["cowest", "predictor"]},
        "Which queries need no draft, or no strong model",
        "Logistic regression over hashed words of the query, learnt from what the drafts of the training queries were"
        " worth. It holds no text. The figures below are of training queries that were held back while fitting; what"
        " counts is the loss on the held-out queries, in report.json of the round's `evaluate`.",
        {"Where it comes from": made, "On training queries": {"queries": metrics["queries"], **learnt}},
    )


def license_of(readme: str) -> str:
    """The licence that a card declares in its front matter, `unknown` when it declares none."""
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return UNKNOWN_LICENSE
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return UNKNOWN_LICENSE
    value = front.get("license") if isinstance(front, Mapping) else None
    return value if isinstance(value, str) and value else UNKNOWN_LICENSE


def _license_line(license_: str, source: str) -> str:
    if license_ == UNKNOWN_LICENSE:
        return f"unknown: the {source} came without one; find out before this is passed on"
    return f"{license_}, inherited from the {source}"


def _hub_name(uri: str) -> str:
    """The front matter knows Hub names alone; any other address is given as it is."""
    return uri.removeprefix("hf://").partition("@")[0]


def _size(rows: int) -> str:
    for most, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < most:
            return name
    return "n>1M"


def _document(front: Mapping[str, Any], title: str, text: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    body = [f"---\n{head}---\n", f"# {title}\n", f"{text}\n"]
    for heading, values in tables.items():
        if values:
            lines = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())
            body.append(f"## {heading}\n\n| | |\n|---|---|\n{lines}\n")
    return "\n".join(body)


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(_text(item) for item in value) or "none"
    return str(value)
