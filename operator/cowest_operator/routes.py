"""Which shortcuts the gateway may take by a predictor: what was measured against what the manifest allows. Pure."""

from __future__ import annotations

from cowest_operator import api
from cowest_serving.contract import PREDICTOR_FILE, PredictorRef, RouteLimits, Shortcuts
from cowest_training.contract import EvaluationReport, RouteReport

_SAVES = {"strongAlone": "would go without a draft", "weakAlone": "would be answered by the draft"}


def measured(report: EvaluationReport, arm: str, folder: str) -> api.Routes | None:
    """What the report says of an arm; `folder`: URI of the predictor. None: no predictor was measured with it."""
    found = tuple(each for each in report.routes if each.arm == arm)
    pair = report.candidate if arm == "candidate" else report.control
    return api.Routes(pair, f"{folder}/{PREDICTOR_FILE}", report.predictor, found) if found else None


def in_force(world: api.World) -> PredictorRef | None:
    """What the stable arm goes by. Never while a candidate is on live traffic: the live gate compares pairs alone."""
    status, trial = world.status, world.status.candidate
    if status.routes is None or status.stable is None or status.routes.pair != status.stable.digest:
        return None
    if status.serving != "Pair" or status.going_back or (trial is not None and trial.stage != "Preparing"):
        return None
    shortcuts = world.job.spec.collaboration.shortcuts
    allowed = tuple(each.shortcut for each in status.routes.reports if _is_allowed(each, shortcuts))
    return PredictorRef(status.routes.uri, status.routes.digest, allowed) if allowed else None


def note(report: EvaluationReport, shortcuts: Shortcuts | None) -> str:
    """A sentence on each shortcut of the candidate; "" where none was measured."""
    said = [_sentence(each, shortcuts) for each in report.routes if each.arm == "candidate"]
    return " ".join(said)


def _is_allowed(seen: RouteReport, shortcuts: Shortcuts | None) -> bool:
    limits = _limits(seen, shortcuts)
    return limits is not None and seen.routed > 0 and seen.high <= limits.max_loss


def _limits(seen: RouteReport, shortcuts: Shortcuts | None) -> RouteLimits | None:
    return shortcuts.routed.get(seen.shortcut) if shortcuts else None


def _sentence(seen: RouteReport, shortcuts: Shortcuts | None) -> str:
    limits = _limits(seen, shortcuts)
    if limits is None or not seen.routed:
        return f"The predictor finds no held-out query that {_SAVES[seen.shortcut]}."
    verdict = "is within" if seen.high <= limits.max_loss else "may be above"
    end = "" if seen.high <= limits.max_loss else ", so none goes that way"
    loss, low, high = (100 * value for value in (seen.loss, seen.low, seen.high))
    share = f"{100 * seen.routed / seen.n:.0f} % of the held-out queries {_SAVES[seen.shortcut]}"
    return (
        f"By the predictor {share}, at a loss"
        f" of {loss:.1f} points ({low:.1f} to {high:.1f}), which {verdict} {seen.shortcut}.maxLoss{end}."
    )
