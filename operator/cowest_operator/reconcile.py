"""World -> Plan, in the order of the loop. Pure: no I/O, no clock. Both engines run this.

Preparing --gate--> Canary --steps--> Watch --> Promoted
    |           (no steps: when its server answers)  |
    +--> Refused      +--> RolledBack <--------------+
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cowest_operator import anytime, api, people, promotion, rounds, routes
from cowest_operator.api import Event, Plan, Status, Trial, World
from cowest_serving.contract import Arm, Mode, Pair, Routing
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_RETRY,
    Comparison,
    EvaluationReport,
    LiveReport,
)

SHOWN_EDITS = 6  # by name, in a sentence
RETRIES = 3  # of a step that ended with EXIT_RETRY, before the embedded run gives up


def plan(world: World) -> Plan:
    """All that is wanted now. At most one transition of the trial per plan, so one write per transition."""
    before = world.status
    world = replace(world, status=_at_declared_address(world))
    world = replace(world, status=_in_force(world))
    world = replace(world, status=_data_seen(world))
    move = _decide(world)
    moved = move.status != before
    world = replace(world, status=move.status)
    return Plan(
        servers=_servers(world),
        steps=_steps(world, move),
        routing=_routing(world),
        status=_with_conditions(world, move),
        events=move.events,
        again_after=0.0 if moved else 1.0,
        finished=move.finished,
        failure=move.failure,
    )


@dataclass(frozen=True)
class Move:
    """What this plan changes, and the sentence that explains the hold or the progress."""

    status: Status
    reason: str = api.REASON_PROGRESSING
    message: str = ""
    events: tuple[Event, ...] = ()
    finished: str | None = None
    failure: api.Failure | None = None


# ---------------------------------------------------------------- decisions
def _at_declared_address(world: World) -> Status:
    """Another address of the same strong model applies at once, and is no edit of the pair.

    It is kept, so that what is served stays there once the manifest names another model.
    """
    status, strong = world.status, world.job.spec.strong

    def moved(pair: Pair | None) -> Pair | None:
        same = pair is not None and pair.strong_model == strong.model
        return replace(pair, strong_endpoint=strong.endpoint) if pair and same else pair

    trial = replace(status.candidate, pair=moved(status.candidate.pair)) if status.candidate else None
    return replace(status, stable=moved(status.stable), previous=moved(status.previous), candidate=trial)


def _in_force(world: World) -> Status:
    """An edit of `whenDraftsHurt` acts at once, save while a candidate is measured against what answers now."""
    status, trial = world.status, world.status.candidate
    if status.stable is None or status.standing is None:
        return status
    if trial is not None and (trial.stage != "Preparing" or "evaluate" in trial.done
                              or f"r{trial.number}-evaluate" in world.steps):  # fmt: skip
        return status
    return replace(status, serving=_mode(world, status.stable, status.standing))


def _data_seen(world: World) -> Status:
    """Never more traces than there still are, and of a status of before the rows that it must have learnt from."""
    status, traces = world.status, world.traces
    seen = min(status.traces_seen, traces.usable) if traces.all else status.traces_seen  # not counted yet is not none
    train = world.trial_job.spec.data.train if status.train is None and status.stable else status.train
    return replace(status, traces_seen=seen, train=train)


def _mode(world: World, pair: Pair, standing: api.Standing) -> Mode:
    """What answers while this pair is stable: a measured fact, a person's word and the manifest in force."""
    if pair.digest in world.status.vetoed:
        return "StrongAlone"
    serves = world.job.spec.collaboration.when_drafts_hurt != "StrongAlone"
    return "Pair" if standing != "NotPassed" or serves else "StrongAlone"


def _decide(world: World) -> Move:
    actions = people.pending(world)
    if actions:
        return _person(world, actions[0])
    trial = world.status.candidate
    if world.blocked:
        return Move(world.status, world.blocked.reason, world.blocked.message)
    if trial is None:
        return _go_back(world) if world.status.going_back else _start(world)
    if trial.stage != "Watch" and _is_of_another_spec(world, trial):
        again = ", then this model again" if trial.origin == "Proposal" else ""
        return _end(world, trial, "Refused" if trial.stage == "Preparing" else "RolledBack", api.REASON_SPEC_CHANGED,
                    f"the manifest declares another pair since it began; that one is tried next{again}.")  # fmt: skip
    if trial.origin == "Edit" and rounds.tried_edit(world, trial) != rounds.declared_edit(world):
        return _end(world, trial, "Refused" if trial.stage == "Preparing" else "RolledBack",
                    api.REASON_EDIT_WITHDRAWN, "the manifest declares something else by now.")  # fmt: skip
    if trial.promoted:
        return _promote(world, trial)
    return {"Preparing": _prepare, "Canary": _canary, "Watch": _watch}[trial.stage](world, trial)


def _is_of_another_spec(world: World, trial: Trial) -> bool:
    """Never a mixture: the manifest's pair was edited after the trial began. (An Edit has its own check.)"""
    return bool(trial.origin != "Edit" and trial.declared and trial.declared != rounds.declared_edit(world))


def _person(world: World, action: api.Action) -> Move:
    status = replace(world.status, last_action=action.id)
    trial = status.candidate
    if action.verb == "rollback" and trial is not None:
        return _end(replace(world, status=status), trial, "RolledBack", api.REASON_ROLLED_BACK_BY_PERSON,
                    action.why or "no reason given", by=action.by)  # fmt: skip
    if action.verb == "promote" and (chosen := people.promotable(status)) is not None:
        return _chosen(replace(world, status=status), chosen, action)
    status, event = people.take_in(world.status, action)
    if action.verb in ("pause", "resume") and status.candidate and status.candidate.stage != "Preparing":
        status = replace(status, candidate=_clock(status.candidate, world.now, runs=action.verb == "resume"))
    if status.going_back and not _missing(world, status.previous):
        status = people.undone(status, status.going_back)
        event = people.said(action, "rolled the stable pair back to the one before")
    return Move(status, message=event.message, events=(event,))


def _clock(trial: Trial, now: float, runs: bool) -> Trial:
    """Time in which a person holds a canary or a watch is no part of its deadline."""
    if runs:
        return trial if trial.ran is None else replace(trial, away=now - trial.step_since - trial.ran, ran=None)
    return trial if trial.ran is not None else replace(trial, ran=now - trial.step_since - trial.away)


def _chosen(world: World, trial: Trial, action: api.Action) -> Move:
    """A person promotes the candidate, or the declared edit that was refused; nothing begins to answer unserved."""
    status = world.status
    if trial.origin == "Edit" and rounds.tried_edit(world, trial) != rounds.declared_edit(world):
        message = f"promote by {action.by}: the manifest declares another pair than the edit that was refused."
        return Move(status, message=message, events=(Event("Warning", people.IGNORED, message),))
    if status.candidate is None:
        trial = replace(trial, number=status.trials, started_at=world.now)
        status = replace(status, trials=status.trials + 1, going_back=None)
    if trial.stage == "Preparing":
        trial = replace(trial, stage="Canary", stage_since=world.now, step_since=world.now)
    trial = replace(trial, promoted=api.Word(action.by, action.why))
    world = replace(world, status=replace(status, candidate=trial))
    if not _missing(world, trial.pair):
        return _promote(world, trial)
    message = f"{action.by}: promotes the candidate as soon as its server answers"
    return Move(world.status, message=message, events=(Event("Normal", "PersonPromote", message),))


def _promote(world: World, trial: Trial) -> Move:
    """What a person said, once the server is there: an answer that fails until then would be nobody's wish."""
    assert trial.promoted is not None
    if missing := _missing(world, trial.pair):
        message = f"promoted by {trial.promoted.by}; it waits for the candidate's server: {missing}"
        return Move(world.status, api.REASON_WAITING_FOR_SERVER, message)
    why = trial.promoted.why or "no reason given"
    return _end(world, trial, "Promoted", api.REASON_PROMOTED_BY_PERSON, why, by=trial.promoted.by)


def _go_back(world: World) -> Move:
    """A person's rollback of a finished promotion, which waits only for the old pair's server."""
    status = world.status
    assert status.going_back is not None
    if missing := _missing(world, status.previous):
        message = f"rolled back by {status.going_back.by}; it waits for the server of the pair before: {missing}"
        return Move(status, api.REASON_WAITING_FOR_SERVER, message)
    message = f"the pair of round {status.previous_round} answers again"
    back = people.undone(status, status.going_back)
    return Move(back, message=message, events=(Event("Normal", api.REASON_ROLLED_BACK_BY_PERSON, message),))


def _missing(world: World, pair: Pair | None) -> str | None:
    """Why the pair's weak model cannot draft yet; None when it can."""
    server = world.servers.get(pair.weak_digest) if pair else None
    if server is not None and server.ready:
        return None
    return (server.message if server else "") or "it starts."


def _start(world: World) -> Move:
    following = rounds.next_trial(world)
    if following.trial is None:
        finished = following.message if following.final else None
        return Move(world.status, following.reason, following.message, finished=finished)
    trial = _by_these_rows(world, following.trial)
    proposals = world.status.proposals[1:] if trial.origin == "Proposal" else world.status.proposals
    status = replace(world.status, candidate=trial, trials=trial.number + 1, proposals=proposals)
    if trial.origin in ("Baseline", "Round"):
        status = replace(status, train=world.job.spec.data.train)
    if trial.origin == "Round":
        gone_by = 0 if rounds.learns_from_other_rows(world) else status.without_gain
        status = replace(status, traces_seen=world.traces.usable, traces_since=world.now, without_gain=gone_by)
    message = f"round {trial.number} ({trial.origin.lower()}) begins"
    return Move(status, message=message, events=(Event("Normal", "RoundStarted", message),))


def _by_these_rows(world: World, trial: Trial) -> Trial:
    """Whether a first model is tuned on explanations is settled as it begins: data.train may be edited while it runs.

    Where nobody has looked yet, its `check` step does.
    """
    makes_first_model = trial.origin == "Baseline" or (trial.origin == "Edit" and trial.pair is None)
    if world.has_explanations is None or not makes_first_model:
        return trial
    return replace(trial, done={"check": {"has_explanations": world.has_explanations}})


def _prepare(world: World, trial: Trial) -> Move:
    """Run the first step that is not done; after the evaluation ask the gates."""
    steps = rounds.chain(world, trial)
    step = next((s for s in steps if rounds.key(trial, s) not in trial.done), None)
    state = world.steps.get(step.name) if step else None
    stops = world.status.paused_now and (state is None or state.phase == "Running")
    if (_rests(state) or stops) and (hold := _hold(world, f"step {step.name}" if step else "the gate")):
        return hold
    if step is None:
        return _gate(world, trial)
    if state is not None and state.phase == "Running" and state.reason:
        return Move(world.status, state.reason, f"step {step.name}: {state.message}")
    if state is None or state.phase == "Running":
        message = state.message if state else ""
        return Move(world.status, message=f"step {step.name} runs{': ' + message.rstrip('.') if message else ''}.")
    if state.phase == "Failed":
        return _step_failed(world, trial, step, state)
    return _step_done(world, trial, steps, step, state)


def _rests(state: api.StepState | None) -> bool:
    """Nothing of it runs: it has not begun, or it waits for what is not there yet."""
    return state is None or (state.phase == "Failed" and state.reason == api.REASON_DATA_MISSING)


def _hold(world: World, before: str) -> Move | None:
    """Why a trial in preparation goes no further, when the manifest or a person says so.

    A running step is finished, unless the person wants it stopped.
    """
    if world.job.spec.suspend:
        message = f"spec.suspend is true: {before} waits."
        return Move(world.status, api.REASON_SUSPENDED, message, finished=message)
    if by := world.status.paused_by:
        where = f"; {before} does not run until `cowest resume`" if world.status.paused_now else f" before {before}"
        return Move(world.status, api.REASON_PAUSED, f"paused by {by}{where}.")
    return None


def _step_failed(world: World, trial: Trial, step: api.StepSpec, state: api.StepState) -> Move:
    message = f"step {step.name}: {state.message}"
    if trial.origin == "Proposal" and trial.pair is None and state.code == EXIT_BAD_INPUT:
        return _end(world, trial, "Refused", api.REASON_STEP_FAILED, message)  # what was proposed is no usable model
    if state.code == EXIT_RETRY and state.attempts < RETRIES:
        return Move(world.status, state.reason or api.REASON_STEP_RETRY, message)
    reason = state.reason or (api.REASON_BUDGET if state.code == EXIT_BUDGET else api.REASON_STEP_FAILED)
    message = f"{message} {state.again}".rstrip()
    return Move(world.status, reason, message, failure=_failure(trial, state.code or 1, message))


def _failure(trial: Trial, code: int, message: str) -> api.Failure:
    return api.Failure(code, message, is_of_proposal=trial.origin == "Proposal")


def _step_done(
    world: World, trial: Trial, steps: tuple[api.StepSpec, ...], step: api.StepSpec, state: api.StepState
) -> Move:
    name = rounds.key(trial, step)
    facts = {**rounds.needed_of(state.metrics), "digest": state.digest}
    trial = replace(trial, done={**trial.done, name: facts})
    if name == "evaluate":
        trial = replace(trial, evaluator=world.trial_evaluator)
    if name == rounds.model_step(trial, steps):
        make = rounds.declared_pair if trial.origin in ("Baseline", "Edit") else rounds.tuned_pair
        trial = replace(trial, pair=make(world, state.digest, step.out))
        if trial.origin == "Baseline":
            trial = replace(trial, model=world.trial_job.spec.weak.model)
    status = replace(world.status, candidate=trial)
    least = world.trial_job.spec.feedback.min_pairs
    if name in ("feedback", "dpo") and int(state.metrics.get("pairs", least)) < least:
        usable = f"{state.metrics['pairs']} usable pairs"
        message = f"{usable}, feedback.minPairs wants {least}{_lost(state.metrics)}{_left_out(state.metrics)}."
        message = " ".join((message, *_alarms(trial, "collect")))
        return _end(replace(world, status=status), trial, "Refused", api.REASON_TOO_FEW_PAIRS, message)
    if trial.origin != "Revalidation" and (changed := promotion.strong_change(trial)):
        return _strong_changed(replace(world, status=status), trial, changed)
    message = f"step {step.name} is done"
    held_back = _alarms(trial, "collect") if name == "collect" else ()
    events = [Event("Warning", api.REASON_QUARANTINED, f"round {trial.number}: {each}") for each in held_back]
    return Move(status, message=message, events=(Event("Normal", "StepDone", message), *events))


def _alarms(trial: Trial, step: str) -> tuple[str, ...]:
    """What a step found that a person should look at, in sentences."""
    return tuple(trial.done.get(step, {}).get("alarms", ()))


def _lost(metrics: Mapping[str, Any]) -> str:
    """Where the other queries went; "" for a step that does not say."""
    whys = {
        "equal_drafts": "drew the same draft each time",
        "ties": "have drafts whose answers score alike",
        "below_margin": "differ by less than feedback.minMargin",
    }
    found = [f"{metrics[name]} {words}" for name, words in whys.items() if metrics.get(name)]
    return f" (of {metrics['queries']} queries {', '.join(found)})" if found and "queries" in metrics else ""


def _left_out(metrics: Mapping[str, Any]) -> str:
    """Which pairs were not tuned on; "" for a step that tunes on none or on all."""
    dropped: Mapping[str, int] = metrics.get("dropped") or {}
    found = [f"{count} {reason}" for reason, count in dropped.items() if count]
    return f" ({', '.join(found)}; training.maxLength and the prompts decide what fits)" if found else ""


def _gate(world: World, trial: Trial) -> Move:
    if trial.pair is None:
        raise AssertionError("the evaluation is the last step and needs a pair")
    if world.report is None:
        return Move(world.status, message="reading the evaluation report")
    if trial.origin == "Revalidation":
        return _revalidated(world, trial)
    spec, status, seen = world.trial_job.spec, world.status, world.report.against_control
    held_out, rows = spec.data.held_out, world.report.held_out_digest
    looks = promotion.looks_before(status, held_out, rows)
    status = replace(status, looks=looks, held_out=held_out)
    # The later word of a person goes before an earlier one: what somebody proposes is judged in spite of a veto.
    judged = replace(status, vetoed=()) if trial.origin == "Proposal" else status
    calibration = spec.feedback.evaluator.calibration
    case = promotion.Offline(
        spec.gate, spec.canary.max_error_percent, judged, trial.pair.digest, world.report, calibration
    )
    refusal = promotion.first_refusal(case)
    if not refusal and not spec.canary.steps and _awaits_approval(world, trial):
        message = f"the gate is passed with {promotion.points(seen)}; `cowest approve` or `cowest rollback` decides."
        return Move(world.status, api.REASON_AWAITING_APPROVAL, message)
    trial = _measured(world, trial, world.report)
    of_control = _routes(world, trial, world.report, "control")
    looked = (*(seen for seen in status.looked if seen.held_out != rows), api.Looked(rows, looks + 1))
    status = replace(status, looks=looks + 1, looked=looked[-api.KEEP_LOOKED :], candidate=trial)
    status = replace(status, routes=of_control or status.routes)
    status = replace(status, sight=_sight(world.report))
    status, followed = _strong_follows(world, status, trial, case)
    world = replace(world, status=status)
    if refusal and refusal.reason == api.REASON_STRONG_CHANGED:
        move = _strong_changed(world, trial, refusal.message)
        return replace(move, events=(*followed, *move.events))
    if refusal:
        is_no_gain = refusal.reason == api.REASON_NO_GAIN_OFFLINE
        why = refusal.message + (promotion.drafts_unused(case.judged) if is_no_gain else "")
        move = _end(world, trial, "Refused", refusal.reason, why)
        return replace(move, events=(*followed, *move.events))
    message = f"round {trial.number} passed the gate with {promotion.points(seen)} (p = {seen.p_better:.2g})"
    message += promotion.versions_note(case.judged)
    passed = Event("Normal", "GatePassed", message)
    trial = replace(trial, stage="Canary", stage_since=world.now, step=0, step_since=world.now, looks=0, away=0.0)
    return Move(replace(status, candidate=trial), message=message, events=(*followed, passed))


def _strong_changed(world: World, trial: Trial, what: str) -> Move:
    """Nothing is promoted by answers of two models: the stable pair is measured anew first, with new answers."""
    message = f"{what} The stable pair is measured anew before the next round."
    move = _end(world, trial, "Refused", api.REASON_STRONG_CHANGED, message)
    generation = move.status.strong_generation + 1
    return replace(move, status=replace(move.status, strong_generation=generation, evaluator=None))


def _strong_follows(
    world: World, status: Status, trial: Trial, case: promotion.Offline
) -> tuple[Status, tuple[Event, ...]]:
    """While the strong model answers alone, an edit of it is no question of drafts: it holds once it has answered.

    Otherwise the old one would go on, and be tuned for, until drafts beat the new one. Its solo prompt comes with it;
    an edit of prompts alone has to pass as any candidate.
    """
    old, pair = status.stable, trial.pair
    if trial.origin != "Edit" or status.serving != "StrongAlone" or old is None or pair is None:
        return status, ()
    if case.judged.candidate != pair.digest:
        return status, ()
    new = replace(
        old,
        strong_endpoint=pair.strong_endpoint,
        strong_model=pair.strong_model,
        prompts=replace(old.prompts, solo=pair.prompts.solo),
    )
    solo = case.judged.arm("solo")
    same_model = (new.strong_endpoint, new.strong_model) == (old.strong_endpoint, old.strong_model)
    if same_model or 100 * solo.errors > case.max_error_percent * solo.n:
        return status, ()
    message = f"{new.strong_model} answers alone from now on, as the manifest declares"
    vetoed = (*status.vetoed, new.digest) if old.digest in status.vetoed else status.vetoed
    return replace(status, stable=new, vetoed=vetoed), (Event("Normal", api.REASON_STRONG_FOLLOWS, message),)


def _awaits_approval(world: World, trial: Trial) -> bool:
    """As declared now: whom to ask measures nothing, and who wants to be asked is asked at once."""
    return world.job.spec.canary.approval == "Manual" and trial.approved_by is None


def _measured(world: World, trial: Trial, report: EvaluationReport) -> Trial:
    seen = report.against_control
    alarms = (*_alarms(trial, "collect"), *_alarms(trial, "dpo"))
    shortcuts = world.trial_job.spec.collaboration.shortcuts
    notes = (promotion.weak_alone(report), promotion.rare_labels(report), routes.note(report, shortcuts), *alarms)
    return replace(
        trial,
        difference=seen.difference,
        p_value=seen.p_better,
        discordant=anytime.share_of(_discordant(seen), seen.n),
        score=report.arm("candidate").score,
        note=" ".join(filter(None, notes)),
        routes=_routes(world, trial, report, "candidate"),
    )


def _routes(world: World, trial: Trial, report: EvaluationReport, arm: str) -> api.Routes | None:
    """What going by a predictor costs that arm. None too where the evaluator may decide nothing."""
    if promotion.not_calibrated(world.trial_job.spec.feedback.evaluator.calibration, report):
        return None
    return routes.measured(report, arm, rounds.run_uri(world, trial, "predictor"))


def _discordant(seen: Comparison) -> float:
    """Share of the queries that the arms score differently."""
    return (seen.better + seen.worse) / max(1, seen.n)


def _sight(report: EvaluationReport) -> api.Sight:
    seen = report.against_control
    smallest = sorted(report.slices, key=lambda part: (part.n, part.group))[: api.KEEP_SLICES]
    return api.Sight(seen.n, _discordant(seen), {part.group: part.n for part in smallest})


def _revalidated(world: World, trial: Trial) -> Move:
    """The stable pair by a new evaluator. It is stopped when it hurts; only gate and canary begin to serve a pair.

    A pair that a person chose goes on: that it hurts is said, and is for a person to undo.
    """
    assert world.report is not None and world.status.stable is not None
    status, report, seen = world.status, world.report, world.report.against_solo
    why = promotion.not_calibrated(world.trial_job.spec.feedback.evaluator.calibration, report)
    hurts = seen.p_worse < world.trial_job.spec.gate.significance and not why
    if hurts and status.serving == "Pair" and status.standing != "Chosen":
        mode = _mode(world, world.status.stable, "NotPassed")
        world = replace(world, status=replace(status, standing="NotPassed", serving=mode))
    serving = world.status.serving
    message = f"the stable pair against the strong model alone: {promotion.points(seen)}; answers come from {serving}."
    message = f"{message} That stops nothing: {why}" if why else message
    trial = _measured(world, trial, report)
    decision: api.Decision = "Promoted" if serving == "Pair" else "Refused"
    closed = _closed(world, trial, decision, api.REASON_REVALIDATED, message, None)
    closed = replace(closed, evaluator=trial.evaluator or world.trial_evaluator)
    return Move(closed, message=message, events=(Event("Normal", api.REASON_REVALIDATED, message),))


def _canary(world: World, trial: Trial) -> Move:
    assert trial.pair is not None
    spec = world.trial_job.spec
    if world.status.paused_by:
        return Move(
            world.status, api.REASON_PAUSED, f"paused by {world.status.paused_by} at canary step {trial.step + 1}."
        )
    if not spec.canary.steps:
        return _without_canary(world, trial)
    verdict = promotion.judge_live(spec.canary, spec.gate, trial, world.live, world.now)
    trial = _seen_live(trial, world.live)
    if verdict.action == "RollBack":
        message = verdict.message
        if verdict.reason == api.REASON_TOO_FEW_ANSWERS:
            message = f"{message.rstrip('.')}{_for_want_of(world, trial)}"
        return _end(replace(world, status=replace(world.status, candidate=trial)), trial, "RolledBack",
                    verdict.reason, message)  # fmt: skip
    where = f"canary step {min(trial.step + 1, len(spec.canary.steps))} of {len(spec.canary.steps)}"
    if verdict.action == "Wait":
        if trouble := _watcher_failed(world, trial):
            return trouble
        if missing := _missing(world, trial.pair):
            message = f"{where} waits for the candidate's server: {missing}"
            return Move(world.status, api.REASON_WAITING_FOR_SERVER, message)
        weight = _weight(world, trial)
        watcher = world.steps.get(rounds.live_name(trial))
        said = f"{verdict.message.rstrip('.')}{watcher.message if watcher else ''}."
        return Move(world.status, verdict.reason, f"{where} ({weight} % of the traffic): {said}")
    if verdict.action == "LookAgain":
        trial = replace(trial, looks=trial.looks + 1)
        return Move(replace(world.status, candidate=trial), verdict.reason, f"{where}: {verdict.message}")
    return _next_step(world, trial, where, verdict)


def _for_want_of(world: World, trial: Trial) -> str:
    """What a canary that saw too few answers lacked: a server, or else more questions or time."""
    if missing := _missing(world, trial.pair):
        return f"; the candidate's server is not ready: {missing}"
    return (
        ". More users, or `cowest send`, bring more answers with feedback; canary.deadlineSeconds waits longer;"
        " canary.steps: [] does without."
    )


def _seen_live(trial: Trial, live: LiveReport | None) -> Trial:
    if live is None or live.comparison is None:
        return trial
    return replace(trial, live_difference=live.comparison.difference, live_answers=live.scored.get("candidate", 0))


def _without_canary(world: World, trial: Trial) -> Move:
    """It passed offline and no canary steps are declared: it is promoted when its server answers, not before."""
    canary = world.trial_job.spec.canary
    shown = f"{100 * (trial.difference or 0.0):+.1f} points on the held-out queries; no canary steps are declared."
    if missing := _missing(world, trial.pair):
        if world.now - trial.step_since - trial.away > canary.deadline_seconds:
            message = f"no server after canary.deadlineSeconds = {canary.deadline_seconds}: {missing}"
            return _end(world, trial, "RolledBack", api.REASON_SERVER_NOT_READY, message)
        message = f"{shown} It waits for the candidate's server: {missing}"
        return Move(world.status, api.REASON_WAITING_FOR_SERVER, message)
    if canary.watch_seconds:
        return _into_watch(world, trial, Event("Normal", "WatchBegins", f"round {trial.number}: {shown}"))
    return _end(world, trial, "Promoted", api.REASON_PROMOTED_OFFLINE, shown)


def _into_watch(world: World, trial: Trial, passed: Event) -> Move:
    """The watch goes on with the records of the last step, in which the control still answered."""
    canary, now, live = world.trial_job.spec.canary, world.now, world.live
    goes_on = live is not None and canary.steps and canary.signal != "ShadowReplay"  # which asks both in the watch
    entered = {
        name: counts.get("candidate", 0)
        for name, counts in (("answers", live.answers), ("errors", live.errors), ("scored", live.scored))
    } if live is not None and goes_on else {}  # fmt: skip
    trial = replace(
        trial, stage="Watch", step=len(canary.steps), stage_since=now, step_since=now, looks=0, away=0.0,
        since=trial.step_since if goes_on else now, entered=entered,
    )  # fmt: skip
    return Move(replace(world.status, candidate=trial), message=passed.message, events=(passed,))


def _watcher_failed(world: World, trial: Trial) -> Move | None:
    """Without its watcher a canary would wait for nothing; the engine starts it again unless that is of no use."""
    state = world.steps.get(rounds.live_name(trial))
    if state is None or state.phase != "Failed":
        return None
    message = f"step {rounds.live_name(trial)}: {state.message}"
    if state.code == EXIT_BAD_INPUT or (state.code == EXIT_FAILED and state.attempts >= RETRIES):
        return Move(world.status, api.REASON_STEP_FAILED, message, failure=_failure(trial, state.code, message))
    return Move(world.status, api.REASON_STEP_RETRY, message)


def _next_step(world: World, trial: Trial, where: str, verdict: promotion.Verdict) -> Move:
    canary = world.trial_job.spec.canary
    last = trial.step + 1 >= len(canary.steps)
    if last and _awaits_approval(world, trial):
        return Move(world.status, api.REASON_AWAITING_APPROVAL,
                    f"{where} is passed; `cowest approve` or `cowest rollback` decides. {verdict.message}")  # fmt: skip
    passed = Event("Normal", "CanaryStepPassed", f"round {trial.number}, {where} passed: {verdict.message}")
    if not last:
        trial = replace(trial, step=trial.step + 1, step_since=world.now, looks=0, away=0.0)
        return Move(replace(world.status, candidate=trial), message=passed.message, events=(passed,))
    if canary.watch_seconds:
        return _into_watch(world, trial, passed)
    move = _promoted(world, trial, verdict)
    return replace(move, events=(passed, *move.events))


def _promoted(world: World, trial: Trial, verdict: promotion.Verdict) -> Move:
    """By live answers; a candidate at which they showed no more than no loss is not called better live."""
    if (trial.live_difference or 0.0) >= 0:
        return _end(world, trial, "Promoted", api.REASON_PROMOTED, verdict.message)
    message = f"offline it is better, and no loss is shown live: {verdict.message}"
    return _end(world, trial, "Promoted", api.REASON_PROMOTED_NOT_WORSE, message)


def _watch(world: World, trial: Trial) -> Move:
    if world.status.paused_by:
        return Move(world.status, api.REASON_PAUSED, f"paused by {world.status.paused_by} in the watch.")
    spec = world.trial_job.spec
    verdict = promotion.judge_watch(spec.canary, spec.gate.significance, trial, world.live, world.now)
    trial = _seen_live(trial, world.live)
    if verdict.action == "Wait":
        return Move(world.status, verdict.reason, verdict.message)
    if verdict.action == "LookAgain":
        trial = replace(trial, looks=trial.looks + 1)
        return Move(replace(world.status, candidate=trial), verdict.reason, verdict.message)
    if verdict.action == "RollBack":
        return _end(world, trial, "RolledBack", verdict.reason, verdict.message)
    return _promoted(world, trial, verdict)


# ---------------------------------------------------------------- the end of a trial
def _end(world: World, trial: Trial, decision: api.Decision, reason: str, message: str, by: str | None = None) -> Move:
    status = _closed(world, trial, decision, reason, message, by)
    base = trial.model if trial.model and trial.origin in ("Baseline", "Edit") else status.base
    if decision == "Promoted":
        assert trial.pair is not None
        status = replace(
            status,
            stable=trial.pair,
            stable_round=trial.number,
            serving="Pair",
            standing="Chosen" if by else "Passed",
            routes=trial.routes,
            previous=world.status.stable,
            previous_serving=world.status.serving,
            previous_standing=world.status.standing,
            previous_round=world.status.stable_round,
            previous_base=world.status.base,
            base=base or world.trial_job.spec.weak.model,
            evaluator=trial.evaluator or world.trial_evaluator,
            refused_edit=None if trial.origin == "Edit" else status.refused_edit,
            refused_trial=None if trial.origin == "Edit" else status.refused_trial,
            vetoed=tuple(d for d in status.vetoed if d != trial.pair.digest),
        )
        if trial.origin == "Edit" and trial.model:
            status = _of_another_base(status, world.now)
    elif trial.origin == "Baseline" and trial.pair is not None and reason != api.REASON_SPEC_CHANGED:
        # The first model is the stable one all the same: rounds tune it, and the gateway says what it answers by.
        status = replace(
            status,
            stable=trial.pair,
            stable_round=trial.number,
            serving="StrongAlone" if by else _mode(world, trial.pair, "NotPassed"),
            standing="NotPassed",
            base=base,
            evaluator=trial.evaluator or world.trial_evaluator,
        )
    elif trial.origin == "Edit" and reason != api.REASON_EDIT_WITHDRAWN:
        known = trial if trial.pair is not None and not by else None
        status = replace(status, refused_edit=rounds.tried_edit(world, trial), refused_trial=known)
    elif trial.origin == "Baseline" and by:  # it would begin again at once
        status = replace(status, refused_edit=rounds.declared_edit(world))
    elif trial.origin == "Proposal" and reason == api.REASON_SPEC_CHANGED:  # no word of a person is lost by an edit
        again = api.Proposal(trial.model or "", trial.by or "", trial.why or "")
        status = replace(status, proposals=(again, *status.proposals))
    elif trial.origin == "Revalidation":  # a person ended it
        status = replace(status, evaluator=world.trial_evaluator)
    if by and decision == "RolledBack" and trial.pair is not None and trial.origin != "Revalidation":
        status = replace(status, vetoed=(*status.vetoed, trial.pair.digest))
    kind: Literal["Normal", "Warning"] = "Normal" if decision == "Promoted" else "Warning"
    sentence = f"round {trial.number} {decision}: {message}"
    return Move(status, reason, sentence, events=(Event(kind, reason, sentence),))


def _of_another_base(status: Status, now: float) -> Status:
    """What was tuned, gained and learnt was of the old base: the rounds of the new one begin."""
    return replace(status, tuned_rounds=0, without_gain=0, traces_seen=0, traces_since=0.0, last_round_ended=now)


def _closed(world: World, trial: Trial, decision: api.Decision, reason: str, message: str, by: str | None) -> Status:
    status = world.status
    tuned = trial.origin == "Round" and reason != api.REASON_SPEC_CHANGED
    outcome = api.Outcome(
        number=trial.number,
        origin=trial.origin,
        decision=decision,
        reason=reason,
        message=message,
        pair=trial.pair.digest if trial.pair else "",
        started_at=trial.started_at,
        ended_at=world.now,
        by=by,
        pairs=_fact(trial, "feedback", "pairs"),
        difference=trial.difference,
        p_value=trial.p_value,
        score=trial.score,
        live_difference=trial.live_difference,
        live_answers=trial.live_answers,
        dataset=trial.done["collect"]["digest"] if "collect" in trial.done else None,
        note=trial.note,
        proposed_by=trial.by,
        proposed_why=trial.why,
    )
    return replace(
        status,
        candidate=None,
        rounds=(*status.rounds, outcome)[-api.KEEP_ROUNDS :],
        tuned_rounds=status.tuned_rounds + tuned,
        without_gain=(0 if decision == "Promoted" else status.without_gain + 1) if tuned else status.without_gain,
        last_round_ended=world.now if tuned else status.last_round_ended,
    )


def _fact(trial: Trial, step: str, name: str) -> int | None:
    facts: Mapping[str, object] = trial.done.get(step, {})
    value = facts.get(name)
    return int(str(value)) if value is not None else None


# ---------------------------------------------------------------- what is wanted of the world
def _servers(world: World) -> tuple[api.ServerSpec, ...]:
    """Stable stays warm through canary and watch; the candidate is served only while it is on trial."""
    pairs = [world.status.stable]
    if (trial := world.status.candidate) is not None and trial.stage in ("Canary", "Watch"):
        pairs.append(trial.pair)
    if world.status.going_back:
        pairs.append(world.status.previous)
    return tuple({p.weak_digest: api.ServerSpec(p.weak_digest, p.weak_uri) for p in pairs if p}.values())


def _steps(world: World, move: Move) -> tuple[api.StepSpec, ...]:
    trial = world.status.candidate
    if trial is None or move.failure or world.status.paused_now:
        return ()
    if trial.stage == "Preparing":
        chain = rounds.chain(world, trial)
        following = next((s for s in chain if rounds.key(trial, s) not in trial.done), None)
        if following is None or (_rests(world.steps.get(following.name)) and _hold(world, following.name)):
            return ()
        return (following,)
    if trial.promoted or (trial.stage == "Canary" and not world.trial_job.spec.canary.steps):
        return ()  # no live answer decides
    served = world.status.stable if world.status.serving == "Pair" else None
    return (rounds.live_score(world, trial, served),)


def _routing(world: World) -> Routing:
    """Weights that the gateway follows; a candidate gets traffic only once its server answers with its digest."""
    status, trial = world.status, world.status.candidate
    pair = status.stable or rounds.declared_pair(world, "", "")
    # What a person takes back answers no more, also while the server of the pair before is still on its way.
    alone = status.stable is None or status.going_back is not None
    arms: tuple[Arm, ...] = (_arm(world, "stable", 100, "StrongAlone" if alone else status.serving, pair),)
    salt = f"{world.job.name}-stable"
    if trial is not None and trial.pair is not None and trial.stage in ("Canary", "Watch"):
        salt = f"{world.job.name}-r{trial.number}"
        server = world.servers.get(trial.pair.weak_digest)
        if server is not None and server.ready:
            weight = _weight(world, trial)
            arms = (
                replace(arms[0], weight_percent=100 - weight),
                _arm(world, "candidate", weight, "Pair", trial.pair),
            )
    if arms[0].mode == "Pair" and (by := routes.in_force(world)):
        arms = (replace(arms[0], predictor=by), *arms[1:])
    return Routing(0, salt, arms)


def _weight(world: World, trial: Trial) -> int:
    """The candidate's share of the traffic, once its server answers."""
    if trial.stage == "Watch":
        return 100
    step = promotion.step_of(world.trial_job.spec.canary, trial)
    return step.weight_percent if step else 0


def _arm(world: World, name: Literal["stable", "candidate"], weight: int, mode: str, pair: Pair) -> Arm:
    """A server that is not ready keeps its address: the gateway then does what `whenWeakFails` says."""
    server = world.servers.get(pair.weak_digest)
    endpoint = server.endpoint if server is not None and mode == "Pair" else None
    mode_now: Mode = "Pair" if endpoint else "StrongAlone"
    return Arm(name, weight, mode_now, pair, endpoint)


# ---------------------------------------------------------------- the story
def _with_conditions(world: World, move: Move) -> Status:
    status = world.status
    wanted = (
        (api.READY, *_ready(world)),
        (api.DRAFTS_HELP, *_with_note(status, *_drafts_help(status))),
        (api.ROUND_PROGRESSING, "False" if move.failure or move.finished or world.blocked else "True",
         _doing(world) if move.reason == api.REASON_PROGRESSING else move.reason, _with_waiting(world, move.message)),
        *_degraded(world, move),
    )  # fmt: skip
    before = {c.type: c for c in status.conditions}
    conditions = tuple(_condition(world, before.get(row[0]), *row) for row in wanted)
    last = move.events[-1].message if move.events else status.last_transition
    return replace(status, conditions=conditions, last_transition=last, budget=world.budget)


def _with_waiting(world: World, message: str) -> str:
    """And which edits the running trial does not go by, so that nobody waits for them in vain."""
    return f"{message} {said}" if (said := edits_that_wait(world)) else message


def edits_that_wait(world: World) -> str:
    """A sentence on what was edited since the running trial began and is for the next one; "" when there is none."""
    trial = world.status.candidate
    if trial is None or not world.waiting:
        return ""
    names = ", ".join(world.waiting[:SHOWN_EDITS])
    more = f" and {len(world.waiting) - SHOWN_EDITS} more" if len(world.waiting) > SHOWN_EDITS else ""
    anew = " and `cowest resume` begins it anew at once" if trial.origin == "Baseline" and trial.pair is None else ""
    return (
        f"Edited since round {trial.number} began, in force from the next trial on: {names}{more};"
        f" `cowest rollback` ends this one{anew}."
    )


def _doing(world: World) -> str:
    """What a trial in preparation is at, so that each finished step is a change that a watch of conditions shows."""
    trial = world.status.candidate
    if trial is None or trial.stage != "Preparing":
        return api.REASON_PROGRESSING
    names = (rounds.key(trial, step) for step in rounds.chain(world, trial))
    following = next((name for name in names if name not in trial.done), None)
    return api.REASONS_OF_STEPS[following] if following else api.REASON_JUDGING


def _condition(
    world: World, before: api.Condition | None, type_: str, value: str, reason: str, message: str
) -> api.Condition:
    same = before is not None and before.status == value
    since = before.last_transition if before is not None and same else world.now
    as_status: Literal["True", "False", "Unknown"] = (
        "True" if value == "True" else "False" if value == "False" else "Unknown"
    )
    return api.Condition(type_, as_status, reason, message, world.job.generation, since)


def _degraded(world: World, move: Move) -> tuple[tuple[str, str, str, str], ...]:
    """A step that waits for a person is something to mend too; a limit that a person has set is none."""
    if world.troubles is None:
        return ()
    fails = move.failure is not None and move.reason == api.REASON_STEP_FAILED
    troubles = (*world.troubles, *((api.Trouble(move.reason, move.message),) if fails else ()))
    if not troubles:
        return ((api.DEGRADED, "False", api.REASON_AS_EXPECTED, "all that the job needs is there."),)
    return ((api.DEGRADED, "True", troubles[0].reason, " ".join(trouble.message for trouble in troubles)),)


def _ready(world: World) -> tuple[str, str, str]:
    """Whether a request is answered now, and by what."""
    status, trial = world.status, world.status.candidate
    if not world.gateway.ready:
        return "False", api.REASON_STARTING, world.gateway.message or "the gateway starts."
    if (trouble := _no_answers(world)) is not None:
        return "False", trouble.reason, trouble.message
    if trial is not None and trial.stage == "Watch" and not _missing(world, trial.pair):
        return "True", api.REASON_ANSWERING, f"the pair of round {trial.number} answers and is watched."
    if status.stable is None:
        return "True", api.REASON_STRONG_ALONE, "the strong model answers alone until there is a weak model."
    if status.serving == "StrongAlone":
        return (
            "True",
            api.REASON_STRONG_ALONE,
            f"the strong model answers alone: {_not_served(status, status.stable)[1]}",
        )
    if status.going_back:
        waits = f"the server of round {status.previous_round}, to which {status.going_back.by} rolled back, starts."
        return "True", api.REASON_STRONG_ALONE, f"the strong model answers alone while {waits}"
    missing, of = _missing(world, status.stable), f"the server of round {status.stable_round}"
    if missing is None:
        message = f"the pair of round {status.stable_round} answers.{_not_as_declared(world, status.stable)}"
        return "True", api.REASON_ANSWERING, message
    fails = world.job.spec.collaboration.when_weak_fails == "Fail"
    if fails and status.stable.weak_digest in world.servers:  # else the routing has no address to fail at
        message = f"requests fail, as collaboration.whenWeakFails says, while {of} is not ready: {missing}"
        return "False", api.REASON_WAITING_FOR_SERVER, message
    return "True", api.REASON_STRONG_ALONE, f"the strong model answers alone while {of} is not ready: {missing}"


def _not_as_declared(world: World, stable: Pair) -> str:
    """A sentence where the manifest declares a pair that was tried and not promoted."""
    status = world.status
    if status.refused_edit is None or rounds.is_served(world, stable):
        return ""
    if rounds.declared_edit(world) != status.refused_edit:
        return ""
    edits = (row for row in reversed(status.rounds) if row.origin == "Edit")
    tried = next((row for row in edits if row.reason != api.REASON_EDIT_WITHDRAWN), None)
    how = f" (round {tried.number}, {tried.reason})" if tried else ""
    words = f"What the manifest declares of the pair is not served: it was tried and not promoted{how}."
    return f" {words} Edit it again, or put back what is served."


def _no_answers(world: World) -> api.Trouble | None:
    """What makes every answer an error: the strong endpoint fails, and no draft may stand in for it."""
    drafts = world.status.stable is not None and world.status.serving == "Pair" and not world.status.going_back
    if drafts and world.job.spec.collaboration.when_strong_fails == "WeakAlone":
        return None
    return next((trouble for trouble in world.troubles or () if trouble.of_all_answers), None)


def _drafts_help(status: Status) -> tuple[str, str, str]:
    trial = status.candidate
    if status.stable is None and trial and trial.stage != "Preparing" and trial.difference is not None:
        gain = f"{100 * trial.difference:+.1f} points against the strong model alone"
        message = f"the pair of round {trial.number} passed the gate with {gain}; its {trial.stage.lower()} decides."
        return "Unknown", api.REASON_PROGRESSING, message
    if status.stable is None:
        return "Unknown", api.REASON_NOT_MEASURED, "no pair was measured yet."
    if status.serving == "StrongAlone":
        return "False", *_not_served(status, status.stable)
    if status.standing == "NotPassed":
        reason, why = _not_served(status, status.stable)
        return "False", reason, f"{why} It is served as collaboration.whenDraftsHurt says."
    if status.standing == "Chosen":
        return "Unknown", api.REASON_PROMOTED_BY_PERSON, "a person promoted the stable pair."
    return "True", api.REASON_MEASURED_BETTER, "the stable pair passed the gate."


def _with_note(status: Status, value: str, reason: str, message: str) -> tuple[str, str, str]:
    """And what the last evaluation of the stable pair showed besides."""
    rows = (row for row in reversed(status.rounds) if status.stable and row.pair == status.stable.digest)
    note = next((row.note for row in rows if row.score is not None), "")
    return value, reason, f"{message} {note}".rstrip()


def _not_served(status: Status, stable: Pair) -> tuple[str, str]:
    """Why the stable pair does not answer, or would not by itself."""
    if stable.digest in status.vetoed:
        return api.REASON_ROLLED_BACK_BY_PERSON, "a person rolled the stable pair back."
    trials = (row for row in reversed(status.rounds) if row.origin != "Revalidation" and row.pair == stable.digest)
    trial = next(trials, None)
    if trial is not None and trial.decision == "RolledBack":
        why = f"the stable pair passed the gate, and its trial (round {trial.number}) was rolled back: {trial.message}"
        return trial.reason, why
    return api.REASON_NOT_BETTER_THAN_SOLO, "the stable pair has not passed the gate against the strong model alone."
