"""By what the pair of an answer was measured, for `cowest lineage`: the reports of the rounds that judged it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cowest_serving import store
from cowest_training.contract import EvaluationReport, LiveReport, load_live_report, load_report

_EVALUATION = re.compile(r"/runs/r(?P<round>\d+)/evaluate/report\.json$")
_LIVE = re.compile(r"/runs/r(?P<round>\d+)/live-(?P<step>\d+)\.json$")
_BOOKKEEPING = ("seen", "pending", "begun", "differences")  # of a live report: what replaying it wants


@dataclass(frozen=True)
class Evaluation:
    """Of a candidate on the held-out rows, in one round."""

    round: int
    uri: str
    report: EvaluationReport

    def for_programs(self) -> dict[str, Any]:
        return {"round": self.round, "uri": self.uri, **asdict(self.report)}

    def lines(self) -> Iterator[tuple[str, str]]:
        seen = self.report
        arms = {arm.name: arm for arm in seen.arms}
        control = "" if seen.control == "solo" else f"control {seen.control} {_percent(arms['control'].score)}, "
        yield (
            "measured",
            f"round {self.round}: {_percent(arms['candidate'].score)} on {arms['candidate'].n} held-out queries,"
            f" {control}strong model alone {_percent(arms['solo'].score)}",
        )
        version = f"version {seen.strong_version}" if seen.strong_version else "which named no version"
        yield (
            "measured_by",
            f"round {self.round}: evaluator {seen.evaluator_digest}, held-out rows {seen.held_out_digest},"
            f" strong model {seen.strong_model}, {version}",
        )
        if beside := seen.calibration:
            yield (
                "calibrated",
                f"round {self.round}: the evaluator agrees with people on {_percent(beside.agreement)} of"
                f" {beside.labels} labels, kappa {beside.kappa:.2f} [{beside.kappa_low:.2f}, {beside.kappa_high:.2f}]",
            )


@dataclass(frozen=True)
class Live:
    """Of a candidate by live answers, in one step of its canary."""

    round: int
    step: int
    uri: str
    report: LiveReport

    def for_programs(self) -> dict[str, Any]:
        told = {name: value for name, value in asdict(self.report).items() if name not in _BOOKKEEPING}
        return {"round": self.round, "uri": self.uri, **told}

    def lines(self) -> Iterator[tuple[str, str]]:
        seen = self.report
        scored = {arm: f"{seen.scored.get(arm, 0)} of {seen.answers.get(arm, 0)}" for arm in ("candidate", "control")}
        control = "the strong model alone" if seen.control == "solo" else f"control {seen.control}"
        found = f"{100 * seen.comparison.difference:+.1f} points" if seen.comparison else "not compared yet"
        yield (
            "measured_live",
            f"round {self.round}, canary step {self.step + 1}: {found}; scored are {scored['candidate']} answers,"
            f" of {control} {scored['control']}",
        )


@dataclass(frozen=True)
class Measured:
    """Of one pair, oldest round first."""

    evaluations: tuple[Evaluation, ...] = ()
    live: tuple[Live, ...] = ()

    def for_programs(self) -> dict[str, Any]:
        return {
            "evaluations": [each.for_programs() for each in self.evaluations],
            "live": [each.for_programs() for each in self.live],
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, what there is to say) as people read it."""
        if not self.evaluations:
            yield "measured", "not yet: no round has evaluated this pair on held-out rows"
        for evaluation in self.evaluations:
            yield from evaluation.lines()
        for live in self.live:
            yield from live.lines()


def measured(root: str, pair_digest: str) -> Measured:
    """All that the rounds of this store measured of a pair as their candidate. Raises `StoreError`."""
    files = store.list_files(store.join(root, "runs"))
    evaluations = [
        Evaluation(int(found["round"]), uri, load_report(_read(uri)))
        for uri in files
        if (found := _EVALUATION.search(uri))
    ]
    live = [
        Live(int(found["round"]), int(found["step"]), uri, load_live_report(_read(uri)))
        for uri in files
        if (found := _LIVE.search(uri))
    ]
    return Measured(
        tuple(sorted((e for e in evaluations if e.report.candidate == pair_digest), key=lambda e: e.round)),
        tuple(sorted((e for e in live if e.report.candidate == pair_digest), key=lambda e: (e.round, e.step))),
    )


def _read(uri: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(store.get(uri))
    return found


def _percent(score: float) -> str:
    return f"{100 * score:.1f} %"
