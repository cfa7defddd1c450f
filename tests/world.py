"""Builders of worlds for the tests of decisions: a small valid job, and one value changed at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cowest_operator import api
from cowest_serving.contract import Collaboration, Pair, Prompts, Strong
from cowest_training.contract import (
    ArmReport,
    Comparison,
    Data,
    EvaluationReport,
    Evaluator,
    Feedback,
    LiveReport,
    Lora,
    Stage,
    Training,
)

PROMPTS = Prompts("{query}", "{query} {draft}", "{query}")
NOW = 1_000.0


def pair(weak: str = "stable", **changes: Any) -> Pair:
    built = Pair(f"sha256:{weak}", f"file:///store/{weak}", PROMPTS, "Explanation", "http://strong/v1", "strong-1")
    return replace(built, **changes)


STABLE = pair("stable")
CANDIDATE = pair("candidate")

SPEC = api.Spec(
    suspend=False,
    weak=api.Weak("file:///base", "Transformers", 1),
    strong=Strong("http://strong/v1", "strong-1", (), 60, 16, 6),
    collaboration=Collaboration("Explanation", "StrongAlone", "Fail", "StrongAlone", 64, PROMPTS),
    data=Data("file:///train.jsonl", "file:///held_out.jsonl"),
    feedback=Feedback(Evaluator("ExactMatch"), 4, 1.0, "BestVersusWorst", 0.5, 1000, 50),
    training=Training(
        "Auto", "DPO", 0, 1024, Lora(16, 32, 0.05), Stage("LoRA", 3, 2e-4, 16), Stage("LoRA", 1, 1e-5, 16, 0.1, 0.2)
    ),
    rounds=api.Rounds(2, api.Trigger(0), 0, 2),
    gate=api.Gate(100, 0.05, 0.0, 25.0, 10.0),
    canary=api.Canary(
        (api.CanaryStep(10, 50), api.CanaryStep(50, 100)), 3600, 5.0, 5.0, "Automatic", "LateReference", 0
    ),
    gateway=api.Gateway("ASGI", 8080, 1),
)
JOB = api.Job("desk", 1, SPEC)


def job(**sections: Any) -> api.Job:
    """`job(rounds={"max": 3})`: the sections' fields that differ."""
    spec = SPEC
    for name, changes in sections.items():
        section = getattr(spec, name)
        changed = replace(section, **changes) if isinstance(changes, dict) else changes
        spec = replace(spec, **{name: changed})
    return replace(JOB, spec=spec)


SERVED = api.Status(
    stable=STABLE, stable_round=0, serving="Pair", base="file:///base", evaluator="sha256:evaluator", trials=1,
    held_out="file:///held_out.jsonl",
)  # fmt: skip


def world(**changes: Any) -> api.World:
    built = api.World(
        now=NOW,
        job=JOB,
        status=SERVED,
        store="file:///store",
        calls="/calls.sqlite",
        has_explanations=True,
        evaluator="sha256:evaluator",
        gateway=api.ServerState(True, "http://gateway/v1"),
    )
    return replace(built, **changes)


def comparison(difference: float = 0.1, p_better: float = 1e-6, p_worse: float = 0.999, n: int = 1000) -> Comparison:
    return Comparison(n, difference, difference - 0.02, difference + 0.02, p_better, p_worse, 120, 20, "McNemar")


def report(candidate: str = CANDIDATE.digest, control: str = STABLE.digest, **changes: Any) -> EvaluationReport:
    arms = tuple(
        ArmReport(name, 1000, score, score - 0.02, score + 0.02, hurt)
        for name, score, hurt in (
            ("candidate", 0.7, 0.05),
            ("control", 0.6, 0.1),
            ("solo", 0.3, 0.0),
            ("weak", 0.4, 0.1),
        )
    )
    built = EvaluationReport(
        candidate, control, "sha256:held", "sha256:evaluator", "strong-1", "", arms, comparison(), comparison(0.4)
    )
    return replace(built, **changes)


def trial(stage: api.Stage = "Preparing", **changes: Any) -> api.Trial:
    built = api.Trial(1, "Round", stage, NOW - 100, NOW - 50, pair=CANDIDATE, step_since=NOW - 50)
    return replace(built, **changes)


PREPARED = {name: {"digest": "sha256:x"} for name in ("collect", "feedback", "dpo", "evaluate")}


def on_trial(**changes: Any) -> api.Status:
    return replace(SERVED, candidate=trial(**changes), trials=2)


def live(candidate: int = 60, control: int = 200, errors: int = 0, step: int = 0, **changes: Any) -> LiveReport:
    built = LiveReport(
        CANDIDATE.digest,
        STABLE.digest,
        step,
        {"candidate": candidate, "control": control},
        {"candidate": candidate, "control": control},
        {"candidate": errors, "control": 0},
        (),
        comparison(0.1, 0.01, 0.9, n=candidate),
        "",
        NOW,
    )
    return replace(built, **changes)
