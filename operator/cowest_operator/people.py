"""What a person says goes before what the automatic actor decides, and is never undone by it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from cowest_operator import api
from cowest_operator.api import Event, Status

IGNORED = "PersonIgnored"


def pending(world: api.World) -> tuple[api.Action, ...]:
    return tuple(sorted((a for a in world.actions if a.id > world.status.last_action), key=lambda a: a.id))


def next_id(known: Iterable[str], verb: api.Verb, now: int) -> str:
    """After every known one, also where the clock was ahead: what sorts before is never looked at. `now` in ns."""
    heads = (each.partition("-")[0] for each in known)
    after = max((int(head) + 1 for head in heads if head.isdigit()), default=0)
    return f"{max(now, after):020d}-{verb}"


def refusal(status: Status, verb: api.Verb) -> str | None:
    """Why this verb would change nothing now, said before it is recorded; None when there is something to act on."""
    trial = status.candidate
    match verb:
        case "approve" if trial is None or trial.pair is None:
            return "there is no candidate to approve; see `cowest status`."
        case "promote" if promotable(status) is None:
            return _why_not_promotable(trial)
        case "rollback" if trial is None and status.going_back:
            return f"{status.going_back.by} has rolled back already; the server of the earlier pair starts."
        case "rollback" if trial is None and not _can_go_back(status):
            return "there is no earlier pair to go back to; see `cowest status`."
    return None


def promotable(status: Status) -> api.Trial | None:
    """What `promote` acts on: the candidate once its model is there, or else the declared edit that was refused."""
    trial = status.candidate or status.refused_trial
    return trial if trial is not None and trial.pair is not None and trial.origin != "Revalidation" else None


def _why_not_promotable(trial: api.Trial | None) -> str:
    if trial is None:
        return "there is no candidate and no refused edit; `cowest propose` a model."
    if trial.origin == "Revalidation":
        return (
            "the stable pair is measured again and there is no candidate; `cowest propose` its model to judge it anew."
        )
    return "the candidate has no model yet; wait for its training to end."


def _can_go_back(status: Status) -> bool:
    return status.stable is not None and (status.previous is not None or status.serving == "Pair")


def take_in(status: Status, action: api.Action) -> tuple[Status, Event]:
    """Actions that need no more than the status: pause, resume, approve, propose, and rollback of a finished trial."""
    if no := refusal(status, action.verb):
        return replace(status, last_action=action.id), _no(action, no)
    status, event = _TAKERS[action.verb](status, action)
    return replace(status, last_action=action.id), event


def said(action: api.Action, message: str) -> Event:
    why = f" ({action.why})" if action.why else ""
    return Event("Normal", f"Person{action.verb.capitalize()}", f"{action.by}: {message}{why}")


def _no(action: api.Action, message: str) -> Event:
    return Event("Warning", IGNORED, f"{action.verb} by {action.by}: {message}")


def _pause(status: Status, action: api.Action) -> tuple[Status, Event]:
    """A second pause may stop what the first one let run; only `resume` lets it run again."""
    now = action.now or status.paused_now
    runs = "; the step that runs is stopped" if now else ""
    status = replace(status, paused_by=action.by, paused_now=now)
    return status, said(action, f"paused; no round starts and no canary step is taken{runs}")


def _resume(status: Status, action: api.Action) -> tuple[Status, Event]:
    """Also what a person has held by rolling the baseline back before there was a model."""
    held = status.refused_edit if status.stable else None
    return replace(status, paused_by=None, paused_now=False, refused_edit=held), said(action, "resumed")


def _approve(status: Status, action: api.Action) -> tuple[Status, Event]:
    assert status.candidate is not None
    trial = status.candidate
    return replace(status, candidate=replace(trial, approved_by=action.by)), said(action, "approved the candidate")


def _propose(status: Status, action: api.Action) -> tuple[Status, Event]:
    proposal = api.Proposal(action.model or "", action.by, action.why)
    return replace(status, proposals=(*status.proposals, proposal)), said(action, f"proposed {action.model}")


def _rollback(status: Status, action: api.Action) -> tuple[Status, Event]:
    """With a candidate on its way `reconcile` ends the trial; here the last promotion is undone."""
    word = api.Word(action.by, action.why)
    if status.previous is None:
        return undone(status, word), said(action, "rolled the only pair back: the strong model answers alone")
    message = "rolls the stable pair back to the one before as soon as its server answers"
    return replace(status, going_back=word), said(action, message)


def undone(status: Status, word: api.Word) -> Status:
    """The last promotion taken back: the pair before is stable again, or the strong model answers alone."""
    stable, previous = status.stable, status.previous
    assert stable is not None
    rounds = tuple(_taken_back(row, word) if row.number == status.stable_round else row for row in status.rounds)
    status = replace(status, vetoed=(*status.vetoed, stable.digest), rounds=rounds, going_back=None)
    if previous is None:
        return replace(status, serving="StrongAlone")
    base = status.previous_base or status.base
    edited = api.edit_digest(status.base, stable)
    was_edit = edited != api.edit_digest(base, previous)
    return replace(
        status,
        stable=previous,
        stable_round=status.previous_round,
        serving=status.previous_serving,
        standing=status.previous_standing,
        base=base,
        previous=None,
        refused_edit=edited if was_edit else status.refused_edit,
        refused_trial=None if was_edit else status.refused_trial,
    )


def _taken_back(row: api.Outcome, word: api.Word) -> api.Outcome:
    """The row says who took the promotion back, and why it had been promoted."""
    why = word.why or "no reason given"
    before = f"{row.decision} ({row.reason}): {row.message}"
    return replace(row, decision="RolledBack", reason=api.REASON_ROLLED_BACK_BY_PERSON, by=word.by,
                   message=f"{why}; before that {before}")  # fmt: skip


_TAKERS: dict[api.Verb, Callable[[Status, api.Action], tuple[Status, Event]]] = {
    "pause": _pause,
    "resume": _resume,
    "approve": _approve,
    "propose": _propose,
    "rollback": _rollback,
}
