"""Rounds with a ledger as the feedback step leaves them, wherever a store lies: written by the step's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cowest_serving.contract import Pair, Prompts
from cowest_training import steps
from cowest_training.asking import Draft, Reply
from cowest_training.contract import LEDGER, PAIRS, Evaluator, Feedback, Manifest, Row
from cowest_training.feedback import Entry, make_pairs, write_ledger, write_pairs

PROMPTS = Prompts(draft="explain {query}", refine="{query} DRAFT {draft}", solo="{query}")
PAIR = Pair("sha256:weak", "file:///weak", PROMPTS, "Explanation", "http://strong/v1", "strong")
SETTINGS = Feedback(Evaluator("ExactMatch"), 4, 1.0, "BestVersusWorst", 0.5, 100, 1)
SYSTEM = {"role": "system", "content": "You are brief."}


def entries(
    query_id: str, solo: float, *scores: float, drafts: Sequence[str] = (), query: str = "", group: str | None = "g"
) -> list[Entry]:
    """One query whose drafts' answers score so; equal drafts share the call of their answer."""
    text = query or f"what is {query_id}?"
    row = Row(query_id, text, (SYSTEM, {"role": "user", "content": text}), "7", group=group)
    texts = drafts or [f"draft {index} of {query_id}" for index in range(len(scores))]
    alone = Reply(f"solo {query_id}", f"call-{query_id}-solo", "fp_1", "strong-1")
    return [
        Entry(
            row,
            Draft(query_id, index, index, draft, 3),
            Reply(f"answer to {draft}", f"call-{query_id}-{draft}", "fp_1", "strong-1"),
            score,
            alone,
            solo,
        )
        for index, (draft, score) in enumerate(zip(texts, scores, strict=True))
    ]


# A query that gave a pair, one whose drafts hurt, and one that drew the same draft twice.
ROUND = (
    *entries("q1", 0.0, 0.0, 1.0, 0.2, query="what is a drum?"),
    *entries("q2", 1.0, 1.0, 0.0, query="what is a skid?", group="rare"),
    *entries("q3", 0.5, 0.75, 0.75, drafts=("same", "same"), group=None),
)


def spared(entries: Sequence[Entry], asked: int, *, solo: bool) -> list[Entry]:
    """As a round leaves them that asks no more than these drafts, and solo or not."""
    unasked: dict[str, Any] = {"answer": None, "answer_score": None}
    alone: dict[str, Any] = {} if solo else {"solo": None, "solo_score": None}
    return [replace(entry, **(unasked if i >= asked else {}), **alone) for i, entry in enumerate(entries)]


# A query that was decided early, one whose answers are alike, and one whose drafts were.
SPARED = (
    *spared(entries("q1", 0.0, 0.0, 1.0, 0.0, 0.0), 2, solo=True),
    *spared(entries("q2", 1.0, 1.0, 1.0), 2, solo=False),
    *spared(entries("q3", 0.5, 0.75, 0.75, drafts=("same", "same")), 0, solo=False),
)


def write_round(root: str, number: int = 1, ledger: Sequence[Entry] = ROUND, **inputs: Any) -> Manifest:
    """Below `root` as below the store of a job."""
    told = {"round": number, "pair": PAIR.digest, "feedback": {"rule": SETTINGS.rule}, **inputs}
    uri = f"{root.rstrip('/')}/runs/r{number}/feedback"
    output = steps.open_output(uri, step="feedback", inputs=told)
    assert not isinstance(output, Manifest)
    write_ledger(output.folder / LEDGER, ledger, PAIR, "sha256:evaluator")
    write_pairs(output.folder / PAIRS, make_pairs(ledger, SETTINGS), PAIR)
    return output.finish(kind="Feedback", metrics={})
