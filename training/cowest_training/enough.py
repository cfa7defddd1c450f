"""Whether the rows are enough for what the manifest asks of them: if not, rounds are paid in vain.

Asked before anything runs, by `cowest validate`, `plan` and `run` and by the step `check`. Bounds that a manifest does
not say, as one whose defaults are not filled in, bind nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cowest_training.contract import Row


@dataclass(frozen=True)
class Lack:
    """What is too little, in which field a person would change it, and how."""

    field: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}. {self.remedy}."


@dataclass(frozen=True)
class Asked:
    """All of a manifest that says how much is enough."""

    held_out: int
    sft: str
    rounds: int
    rule: str
    drafts: int
    queries: int
    pairs: int
    awaited: int  # new traces, before each round
    texts_of_traces: bool

    def pairs_of(self, queries: int) -> int:
        """That a round of so many queries can give: one a query, or by SignOfGain as many as it has two drafts for."""
        each = 1 if self.rule == "BestVersusWorst" else self.drafts // 2
        return each * min(queries, self.queries)


def asked(spec: Mapping[str, Any]) -> Asked:
    feedback, rounds = spec["feedback"], spec.get("rounds", {})
    return Asked(
        spec.get("gate", {}).get("minHeldOut", 0),
        spec["training"]["sft"],
        rounds.get("max", 1),
        feedback["rule"],
        feedback["draftsPerQuery"],
        feedback["maxQueries"],
        feedback["minPairs"],
        rounds.get("trigger", {}).get("newTraces", 0),
        spec.get("traces", {}).get("contentSamplePercent", 100) > 0,
    )


def bounds(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Other ones are another question."""
    return asdict(asked(spec))


def lacks_of_held_out(spec: Mapping[str, Any], rows: int) -> Iterator[Lack]:
    if rows < (least := asked(spec).held_out):
        yield Lack(
            "spec.data.heldOut",
            f"wanted at least gate.minHeldOut = {least} rows, saw {rows}",
            "No candidate could ever pass. Add held-out rows, or lower gate.minHeldOut",
        )


def lacks_of_train(spec: Mapping[str, Any], train: Sequence[Row]) -> Iterator[Lack]:
    """What ends a step or every round, whatever the models say."""
    wants = asked(spec)
    if wants.sft == "Always" and not any(row.explanation for row in train):
        yield Lack(
            "spec.training.sft",
            f"Always wanted training rows with an `explanation`, saw none in {len(train)} rows",
            "The sft step would have nothing to learn from. Give rows an `explanation`, or choose Auto or Never",
        )
    # Traces without their texts are not learnt from.
    most = wants.pairs_of(wants.queries if wants.texts_of_traces else len(train))
    if wants.rounds and most < wants.pairs:
        seen = f"{len(train)} training rows and no texts of traces (traces.contentSamplePercent 0)"
        yield Lack(
            "spec.feedback.minPairs",
            f"wanted {wants.pairs} pairs, saw that {'feedback.maxQueries queries' if wants.texts_of_traces else seen}"
            f" give {most} at most ({wants.rule})",
            "Every round would end with TooFewPairs after all its calls are paid. Lower minPairs, or give more queries",
        )


def pairs_notes(spec: Mapping[str, Any], rows: int) -> Iterator[str]:
    """Where the training rows alone are too few for a round, and traces have to make up for it."""
    wants = asked(spec)
    most = wants.pairs_of(rows + wants.awaited)
    if wants.rounds and most < wants.pairs:
        seen = f"{rows} training rows" + (f" and {wants.awaited} new traces" if wants.awaited else "")
        yield (
            f"feedback.minPairs = {wants.pairs}, and {seen} give {most} pairs at most ({wants.rule}): a round that"
            " finds no more usable traces ends with TooFewPairs after all its calls are paid. Lower minPairs, add rows,"
            " or let rounds wait by rounds.trigger.newTraces."
        )
