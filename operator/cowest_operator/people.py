"""What a person says goes before what the automatic actor decides, and is never undone by it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cowest_operator import api
from cowest_operator.api import Event, Status


def pending(world: api.World) -> tuple[api.Action, ...]:
    return tuple(sorted((a for a in world.actions if a.id > world.status.last_action), key=lambda a: a.id))


def refusal(status: Status, verb: api.Verb) -> str | None:
    """Why this verb would change nothing now, said before it is recorded; None when there is something to act on."""
    trial = status.candidate
    match verb:
        case "approve" if trial is None or trial.pair is None:
            return "there is no candidate to approve; see `cowest status`."
        case "promote" if trial is None or trial.pair is None or trial.stage == "Preparing":
            return "no candidate is in canary; wait for it, or `cowest propose` one."
        case "rollback" if trial is None and not _can_go_back(status):
            return "there is no earlier pair to go back to; see `cowest status`."
    return None


def _can_go_back(status: Status) -> bool:
    return status.stable is not None and (status.previous is not None or status.serving == "Pair")


def take_in(status: Status, action: api.Action) -> tuple[Status, Event]:
    """Actions that need no more than the status: pause, resume, approve, propose, and rollback of a finished trial."""
    if no := refusal(status, action.verb):
        return replace(status, last_action=action.id), _no(action, no)
    status, event = _TAKERS[action.verb](status, action)
    return replace(status, last_action=action.id), event


def _said(action: api.Action, message: str) -> Event:
    why = f" ({action.why})" if action.why else ""
    return Event("Normal", f"Person{action.verb.capitalize()}", f"{action.by}: {message}{why}")


def _no(action: api.Action, message: str) -> Event:
    return Event("Warning", "PersonIgnored", f"{action.verb} by {action.by}: {message}")


def _pause(status: Status, action: api.Action) -> tuple[Status, Event]:
    return replace(status, paused_by=action.by), _said(action, "paused; no round starts and no canary step is taken")


def _resume(status: Status, action: api.Action) -> tuple[Status, Event]:
    return replace(status, paused_by=None), _said(action, "resumed")


def _approve(status: Status, action: api.Action) -> tuple[Status, Event]:
    assert status.candidate is not None
    trial = status.candidate
    return replace(status, candidate=replace(trial, approved_by=action.by)), _said(action, "approved the candidate")


def _propose(status: Status, action: api.Action) -> tuple[Status, Event]:
    proposal = api.Proposal(action.model or "", action.by, action.why)
    return replace(status, proposals=(*status.proposals, proposal)), _said(action, f"proposed {action.model}")


def _rollback(status: Status, action: api.Action) -> tuple[Status, Event]:
    """With a candidate on its way `reconcile` ends the trial; here the last promotion is undone."""
    stable, previous = status.stable, status.previous
    assert stable is not None
    status = replace(status, vetoed=(*status.vetoed, stable.digest))
    if previous is None:
        back = replace(status, serving="StrongAlone")
        return back, _said(action, "rolled the only pair back: the strong model answers alone")
    base = status.previous_base or status.base
    edited = api.edit_digest(status.base, stable)
    was_edit = edited != api.edit_digest(base, previous)
    back = replace(
        status,
        stable=previous,
        stable_round=status.previous_round,
        serving=status.previous_serving,
        base=base,
        previous=None,
        refused_edit=edited if was_edit else status.refused_edit,
    )
    return back, _said(action, "rolled the stable pair back to the one before")


_TAKERS: dict[api.Verb, Callable[[Status, api.Action], tuple[Status, Event]]] = {
    "pause": _pause,
    "resume": _resume,
    "approve": _approve,
    "propose": _propose,
    "rollback": _rollback,
}
