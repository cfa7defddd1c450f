"""`cowest replay`: what the live gate decided, computed again from the kept records.

When a canary step is decided the engine keeps the very report that was decided on, with all else that the decision
saw, as `store/runs/rN/live-K.decided.json` (`live-K-look-L.decided.json` where the answers were looked at and the step
went on). A replay scores the same traces and feedback anew and asks the same gate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from cowest_cli import jobs
from cowest_cli.options import FileOrNone, HomeFolder, Output
from cowest_cli.view import printable
from cowest_operator import api, promotion, rounds
from cowest_serving.contract import dump, is_evaluator_key, parse
from cowest_training.contract import LiveReport, StepError, load_live_report

MEASURED = ("answers", "scored", "errors", "refused", "p_refused", "arms", "comparison", "differences")  # of a report


# ---------------------------------------------------------------- keeping
def decision_of(world: api.World, plan: api.Plan, spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(file under `runs/`, content) when this plan is a decision of the live gate; None when it is not. Pure.

    `spec` is the defaulted one of the manifest that the trial goes by, as the steps read it.
    """
    trial, after = world.status.candidate, plan.status.candidate
    if trial is None or trial.stage == "Preparing" or plan.status.last_action != world.status.last_action:
        return None
    place = (trial.number, trial.stage, trial.step)
    looked_again = after is not None and place == (after.number, after.stage, after.step)
    if looked_again and after is not None and after.looks == trial.looks:
        return None
    served = world.status.stable if world.status.serving == "Pair" else None
    step = rounds.live_score(world, trial, served)
    gate, canary = world.trial_job.spec.gate, world.trial_job.spec.canary
    verdict = promotion.judge(canary, gate, trial, world.live, world.now)
    if verdict.action == "Wait":  # the trial ended for another reason: its edit was withdrawn
        return None
    look = f"-look-{trial.looks}" if looked_again else ""
    return f"r{trial.number}/live-{trial.step}{look}.decided.json", {
        "verdict": asdict(verdict),
        "now": world.now,
        "updated": world.live.updated if world.live else None,
        "gate": dump(gate),
        "canary": dump(canary),
        "trial": dump(trial),
        "args": dict(step.args),
        "files": dict(step.files),
        "spec": spec,
        "report": asdict(world.live) if world.live else None,
    }


# ---------------------------------------------------------------- replaying
@dataclass(frozen=True)
class Replayed:
    """One decision, then and now."""

    round: int
    stage: api.Stage
    step: int
    decided: promotion.Verdict
    again: promotion.Verdict
    same_report: bool

    @property
    def same(self) -> bool:
        return (self.decided.action, self.decided.reason) == (self.again.action, self.again.reason)

    def __str__(self) -> str:
        where = "watch" if self.stage == "Watch" else f"canary step {self.step + 1}"
        then = f"round {self.round}, {where}: {self.decided.action} ({self.decided.reason})"
        if not self.same:
            return (
                f"{then} DIFFERS: now {self.again.action} ({self.again.reason}). Then: {self.decided.message}"
                f" Now: {self.again.message}"
            )
        report = "" if self.same_report else "; its report differs, see -o json"
        return f"{then}, the same again{report}: {self.again.message}"


def replay(file: FileOrNone = None, home: HomeFolder = None, output: Output = "text") -> None:
    """Compute every live decision again from recorded traces and feedback; exit code 1 when one differs."""
    place = jobs.home_of(file, home)
    found = []
    for kept in decided(place):
        seen = replayed(place, kept)
        found.append(seen)
        if output == "text":
            typer.echo(printable(str(seen)))
    if output == "json":
        typer.echo(json.dumps([{**asdict(seen), "same": seen.same} for seen in found]))
    elif not found:
        typer.echo("no canary step was decided by the live gate yet.")
    if not all(seen.same for seen in found):
        raise typer.Exit(1)


def decided(place: jobs.Home) -> Iterator[Mapping[str, Any]]:
    """All decisions that were kept, oldest first."""
    kept = [jobs.read_json(path) for path in (place.store / "runs").glob("r*/live-*.decided.json")]
    yield from sorted(kept, key=lambda decision: float(decision["now"]))


def replayed(place: jobs.Home, kept: Mapping[str, Any]) -> Replayed:
    """Score the records again and judge. Raises `StepError` when the records cannot be scored."""
    trial = parse(api.Trial, kept["trial"], "trial")
    canary = parse(api.Canary, kept["canary"], "canary")
    gate = parse(api.Gate, kept["gate"] if "gate" in kept else kept["spec"]["gate"], "gate")  # once it was not kept
    then = load_live_report(kept["report"]) if kept["report"] else None
    live = score_again(place, kept) if then else None
    again = promotion.judge(canary, gate, trial, live, float(kept["now"]))
    return Replayed(
        trial.number, trial.stage, trial.step, promotion.Verdict(**kept["verdict"]), again, _measured(live, then)
    )


def _measured(live: LiveReport | None, then: LiveReport | None) -> bool:
    """Whether two reports say the same of the answers; when they were written and what was in the way is no part."""
    if live is None or then is None:
        return live is then
    return all(getattr(live, name) == getattr(then, name) for name in MEASURED)


def score_again(place: jobs.Home, kept: Mapping[str, Any]) -> LiveReport:
    """The report of the records that the decided one was made of, by the same step in a process of its own.

    What cost money is in the book of paid calls; with a budget of nothing and no keys, nothing is asked anew.
    """
    with tempfile.TemporaryDirectory(prefix="cowest-replay-") as name:
        folder = Path(name)
        strong = {**kept["spec"]["strong"], "budget": {"callsPerRound": 0}}
        jobs.write_json(folder / "job.json", {**kept["spec"], "strong": strong})
        jobs.write_json(folder / "until.json", kept["report"])
        # Without --round, which the book would take as the round that pays from now on.
        args = {flag: value for flag, value in kept["args"].items() if flag != "--round"}
        flags = {**args, "--store": place.store.as_uri(), "--calls": str(place.calls)}
        for flag, content in kept["files"].items():
            flags[flag] = str(folder / f"{flag.strip('-')}.json")
            jobs.write_json(Path(flags[flag]), content)
        flags |= {"--job": str(folder / "job.json"), "--until": str(folder / "until.json")}
        out = folder / "live.json"
        _run([*(part for flag in flags.items() for part in flag), "--out", str(out), "--once"])
        return load_live_report(jobs.read_json(out))


def _run(flags: list[str]) -> None:
    secret = ("COWEST_STRONG_API_KEYS", "COWEST_SECRET_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(secret) and not is_evaluator_key(k)}
    command = [sys.executable, "-m", "cowest_training.score_live", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise StepError(f"the records cannot be scored again: {words[-1] if words else 'no message'}", done.returncode)
