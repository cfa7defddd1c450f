"""What KTO and GRPO learn from: each draft that the gain ledger holds of a query, against the query's other drafts.

In a query the solo answer cancels: gains differ as the scores of the answers do. A draft at the mean has no label, and
a query whose drafts are all worth the same teaches nothing. Used by `dpo`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import pyarrow.parquet as pq

from cowest_serving import store
from cowest_training import tuning
from cowest_training.contract import LEDGER, PAIRS, StepError
from cowest_training.quarantine import read_lines
from cowest_training.steps import need_manifest

COLUMNS = ["query_id", "draft", "gain", "draft_finish_reason"]
LEAST = 1e-6  # gains that differ by less are the same


@dataclass(frozen=True)
class Rated:
    """A draft, and what it was worth. One that was cut off has no end."""

    text: str
    gain: float
    ends: bool = True


@dataclass(frozen=True)
class Group:
    """The drafts of one query; `prompt` is what the weak model was asked."""

    prompt: tuple[Mapping[str, Any], ...]
    drafts: tuple[Rated, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def read_groups(uri: str) -> list[Group]:
    """Of the queries that gave a pair: the pair has the prompt, the ledger all drafts whose gain was asked for."""
    if uri.endswith(".jsonl"):
        raise StepError(
            f"--feedback: wanted the output of the feedback step, since training.method learns from every draft; saw"
            f" the pairs {uri} alone. Give the folder, or take a method that learns from pairs: DPO, IPO or SimPO"
        )
    need_manifest(uri, what="--feedback")
    prompts = {pair["query_id"]: tuple(pair["prompt"]) for pair in read_lines(store.join(uri, PAIRS))}
    drafts: dict[str, list[Rated]] = {query: [] for query in prompts}
    for row in _ledger(uri, COLUMNS):
        if row["query_id"] in drafts and row["gain"] is not None:
            drafts[row["query_id"]].append(Rated(row["draft"], row["gain"], row["draft_finish_reason"] != "length"))
    return [Group(prompts[query], tuple(found)) for query, found in drafts.items() if found]


def _ledger(uri: str, columns: list[str]) -> list[dict[str, Any]]:
    table = pq.ParquetFile(BytesIO(store.get(store.join(uri, LEDGER)))).read(columns=columns)
    return list(table.to_pylist())


def judged_by(uri: str) -> set[tuple[str, ...]]:
    """Under which prompts, by which strong model and evaluator a feedback step's drafts were worth what they were."""
    columns = ["prompts_digest", "strong_model", "strong_version", "evaluator_digest"]
    rows = _ledger(uri, columns)
    return {tuple(row.values()) for row in rows if row["strong_model"] is not None}  # null where nobody was asked


def encode(weak: tuning.Weak, groups: Iterable[Group]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Token ids of each query's best and worst draft and of all that fit, and which queries were dropped by reason.

    `above`: the gain less the mean of the query's drafts. `advantage`: that in deviations, as GRPO has it.
    """
    examples: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        if (asked := tuning.encode_prompt(weak, group.prompt)) is None:
            dropped[tuning.REFUSED] += 1
            continue
        text, prompt = asked
        encoded = [
            (tuning.completion_ids(weak.tokenizer, text, draft.text, ends=draft.ends), draft.gain)
            for draft in group.drafts
        ]
        fitting = [(ids, gain) for ids, gain in encoded if len(prompt) + len(ids) <= weak.limit]
        gains = [gain for _, gain in fitting]
        if not gains or max(gains) - min(gains) < LEAST:
            dropped[tuning.TOO_LONG] += 1
            continue
        mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
        drafts = [
            {"ids": ids, "above": gain - mean, "advantage": (gain - mean) / (deviation + 1e-4)} for ids, gain in fitting
        ]
        best, worst = (fitting[gains.index(most(gains))][0] for most in (max, min))
        examples.append({"prompt_ids": prompt, "chosen_ids": best, "rejected_ids": worst, "drafts": drafts})
    return examples, dropped
