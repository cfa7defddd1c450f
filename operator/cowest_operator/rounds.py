"""Is a round due, what are its steps, and what will it cost? Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cowest_operator import api
from cowest_operator.promotion import SOLO, at_the_last_look, control_of, last_least, looks_at_every_user, most_answers
from cowest_operator.schedule import next_after
from cowest_serving.contract import UNKNOWN_OUTPUT_TOKENS, Pair, dump
from cowest_training.contract import calls_of

STEPS = "cowest_training"


# ---------------------------------------------------------------- what comes next
@dataclass(frozen=True)
class Next:
    """The trial to start, or why none is started. `final`: none will be without a change from outside."""

    trial: api.Trial | None
    reason: str = ""
    message: str = ""
    final: bool = False


def next_trial(world: api.World) -> Next:
    """In order: the baseline, an edit of the manifest, what a person proposed, a new evaluator, a tuned round."""
    status, job = world.status, world.job
    if job.spec.suspend:
        return Next(None, api.REASON_SUSPENDED, "spec.suspend is true: the gateway answers, nothing is tuned.", True)
    if status.paused_by:
        return Next(None, api.REASON_PAUSED, f"paused by {status.paused_by}; `cowest resume` goes on.")
    held = status.stable is None and status.refused_edit == declared_edit(world)
    if status.stable is None and not held:
        return Next(_trial(world, "Baseline"))
    if status.stable is not None and (edit := _edit(world)):
        return Next(edit)
    if status.proposals:
        first = status.proposals[0]
        return Next(_trial(world, "Proposal", model=first.model, by=first.by, why=first.why))
    if held:
        hint = "`cowest resume` or an edit begins it again, `cowest propose` tries another model."
        return Next(None, api.REASON_ROLLED_BACK_BY_PERSON, f"a person rolled the baseline back; {hint}")
    if status.evaluator != world.evaluator:
        return Next(_trial(world, "Revalidation", pair=status.stable))
    return _tuned_round(world)


def _trial(world: api.World, origin: api.Origin, **values: Any) -> api.Trial:
    declared = declared_edit(world)
    return api.Trial(world.status.trials, origin, "Preparing", world.now, world.now, declared=declared, **values)


def declared_edit(world: api.World) -> str:
    """Digest of what the manifest declares of the pair, the tuned weights left aside."""
    return api.edit_digest(world.job.spec.weak.model, declared_pair(world, "", ""))


def is_served(world: api.World, stable: Pair) -> bool:
    """Whether the manifest declares what is served, the tuned weights left aside."""
    return declared_edit(world) == api.edit_digest(world.status.base, stable)


def tried_edit(world: api.World, trial: api.Trial) -> str:
    """The same of what an Edit tries: the manifest may declare something else since it began."""
    return api.edit_digest(trial.model or world.status.base, trial.pair or declared_pair(world, "", ""))


def _edit(world: api.World) -> api.Trial | None:
    """Prompts, draft form, strong model or base model were edited: a candidate like a tuned one."""
    status, spec = world.status, world.job.spec
    stable = status.stable
    assert stable is not None
    if is_served(world, stable) or declared_edit(world) == status.refused_edit:
        return None
    if spec.weak.model != status.base:
        return _trial(world, "Edit", model=spec.weak.model)
    return _trial(world, "Edit", pair=declared_pair(world, stable.weak_digest, stable.weak_uri))


def declared_pair(world: api.World, weak_digest: str, weak_uri: str) -> Pair:
    spec = world.job.spec
    return Pair(
        weak_digest,
        weak_uri,
        world.job.prompts,
        spec.collaboration.draft,
        spec.strong.endpoint,
        spec.strong.model,
    )


def tuned_pair(world: api.World, weak_digest: str, weak_uri: str) -> Pair:
    """A tuned or proposed weak model beside the prompts and the strong model that are served now."""
    stable = world.status.stable
    if stable is None:
        return declared_pair(world, weak_digest, weak_uri)
    return Pair(weak_digest, weak_uri, stable.prompts, stable.draft, stable.strong_endpoint, stable.strong_model)


def _tuned_round(world: api.World) -> Next:
    status, rounds = world.status, world.job.spec.rounds
    other_rows = learns_from_other_rows(world)
    if status.tuned_rounds >= rounds.max:
        hint = " data.train was edited since: a higher rounds.max learns from it." if other_rows else ""
        return Next(None, api.REASON_MAX_ROUNDS, f"all {rounds.max} rounds of rounds.max are over.{hint}", True)
    if status.without_gain >= rounds.stop_after_rounds_without_gain > 0 and not other_rows:
        return Next(None, api.REASON_NO_GAIN, f"{status.without_gain} rounds in a row brought no gain.", True)
    if (left := status.last_round_ended + rounds.cooldown_seconds - world.now) > 0 and status.tuned_rounds:
        when = _clock(world.now + left)
        return Next(None, api.REASON_COOLDOWN, f"the next round may start at {when} (rounds.cooldownSeconds).")
    if rounds.trigger.schedule and (wait := _before_schedule(world, rounds.trigger.schedule)):
        return Next(None, api.REASON_WAITING_FOR_SCHEDULE, wait)
    new = new_traces(world)
    if new < rounds.trigger.new_traces and not other_rows:
        note = f"; {world.traces.reason}" if world.traces.reason else ""
        return Next(
            None,
            api.REASON_WAITING_FOR_TRACES,
            f"{new} of {rounds.trigger.new_traces} new usable traces ({world.traces.all} traces in all{note}).",
        )
    return Next(_trial(world, "Round"))


def learns_from_other_rows(world: api.World) -> bool:
    """`data.train` was edited since the last round: one is due, and rounds without gain say nothing of it."""
    return world.status.train is not None and world.status.train != world.job.spec.data.train


def new_traces(world: api.World) -> int:
    """Usable traces since the last round froze its data, as they were counted, or else as they became more.

    Old ones are deleted (traces.retentionDays) as new ones come in, so the difference alone may stay 0 for ever.
    """
    if world.traces.since_last is not None:
        return world.traces.since_last
    return world.traces.usable - world.status.traces_seen


def _before_schedule(world: api.World, expression: str) -> str:
    """Why no round is due by `rounds.trigger.schedule`; "" when one is, and stays so until it starts.

    Due is the first time after the round before (or the baseline) ended: times that pass while a round runs are
    skipped, times that pass while the job is paused or waits for traces are made up for, once.
    """
    status = world.status
    since = status.last_round_ended or min((o.ended_at for o in status.rounds), default=0.0)
    try:
        due = next_after(expression, since)
    except ValueError as error:  # an API server cannot tell: its rules know no calendar
        return f"rounds.trigger.schedule: wanted a cron expression, saw {expression!r}: {error}. Change it."
    if due is None:
        return f"rounds.trigger.schedule = {expression!r} never comes. Change it."
    if due <= world.now:
        return ""
    return f"the next round starts at {_clock(due)} (rounds.trigger.schedule = {expression!r})."


def _clock(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---------------------------------------------------------------- the steps of a trial
def chain(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    """All steps that prepare this candidate, in order; the last one is always the evaluation."""
    prepare = {
        "Baseline": _first_model,
        "Round": _tune,
        "Proposal": _import,
        "Edit": _first_model if trial.pair is None or "sft" in trial.done or "publish" in trial.done else _nothing,
        "Revalidation": _nothing,
    }[trial.origin]
    return (*prepare(world, trial), *_evaluation(world, trial))


def run_uri(world: api.World, trial: api.Trial, part: str) -> str:
    return f"{world.store}/runs/r{trial.number}/{part}"


def model_step(trial: api.Trial, steps: tuple[api.StepSpec, ...]) -> str | None:
    """Name of the step whose output is the candidate's weak model."""
    names = [key(trial, step) for step in steps]
    return next((name for name in ("dpo", "sft", "publish") if name in names), None)


def key(trial: api.Trial, step: api.StepSpec) -> str:
    return step.name.removeprefix(f"r{trial.number}-")


def overran(seconds: float, look: str) -> str:
    """Why an attempt was ended that ran for as long as it may; `look`: how its log is read."""
    return (
        f"it ran for {seconds:.0f} seconds, the longest that training.stepDeadlineSeconds allows, and was ended. See"
        f" where it hangs ({look}); if it only needs longer, raise training.stepDeadlineSeconds."
    )


def _step(world: api.World, trial: api.Trial, name: str, *args: tuple[str, str], **rest: Any) -> api.StepSpec:
    out = rest.pop("out", None) or run_uri(world, trial, name)
    return api.StepSpec(f"r{trial.number}-{name}", f"{STEPS}.{name}", out, args, **rest)


def _first_model(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    """SFT when the rows carry explanations (`training.sft: Auto`), otherwise the base model as it is."""
    spec = world.trial_job.spec
    sft, model = spec.training.sft, ("--model", trial.model or spec.weak.model)
    check = () if world.has_explanations is not None else (_step(world, trial, "check"),)
    explained = trial.done.get("check", {}).get("has_explanations", world.has_explanations)
    if sft == "Always" or (sft == "Auto" and explained):
        return (*check, _step(world, trial, "sft", ("--data", spec.data.train), model))
    return (*check, _step(world, trial, "publish", model))


def _import(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    return (_step(world, trial, "publish", ("--model", trial.model or "")),)


def _nothing(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    return ()


def _tune(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    """Freeze the data, ask the pair, turn answers into preferences, tune; the reference is the stable model."""
    stable, data = world.status.stable, world.trial_job.spec.data
    assert stable is not None
    number = ("--round", str(trial.number))
    dataset, feedback = run_uri(world, trial, "collect"), run_uri(world, trial, "feedback")
    learns = (("--feedback", feedback), ("--dataset", dataset), ("--calls", world.calls), number)
    predictor = (_step(world, trial, "predictor", *learns, calls_strong=True),) if _has_routes(world) else ()
    return (
        _step(
            world,
            trial,
            "collect",
            ("--train", data.train),
            ("--held-out", data.held_out),
            ("--store", world.store),
            number,
        ),
        _step(
            world,
            trial,
            "feedback",
            ("--dataset", dataset),
            ("--calls", world.calls),
            number,
            *_generation(world),
            files=(("--pair", dump(stable)),),
            calls_strong=True,
        ),
        *predictor,
        _step(world, trial, "dpo", ("--model", stable.weak_uri), ("--feedback", feedback), *_replay(world)),
    )


def _replay(world: api.World) -> Iterator[tuple[str, str]]:
    """What earlier rounds learnt from; the step takes of it what was judged as this round's."""
    if world.trial_job.spec.training.preference.replay_percent:
        for outcome in world.status.rounds:
            if outcome.origin == "Round":
                yield "--replay", f"{world.store}/runs/r{outcome.number}/feedback"


def _has_routes(world: api.World) -> bool:
    """The manifest lets a predictor choose the way of a query, once it is measured."""
    shortcuts = world.trial_job.spec.collaboration.shortcuts
    return shortcuts is not None and bool(shortcuts.routed)


def _learns_routes(world: api.World, trial: api.Trial) -> bool:
    """Only a tuned round has a gain ledger to learn from."""
    return trial.origin == "Round" and _has_routes(world)


def _evaluation(world: api.World, trial: api.Trial) -> tuple[api.StepSpec, ...]:
    pair = trial.pair or _placeholder(world)
    control = control_of(world.status) if trial.origin != "Revalidation" else SOLO
    served = world.status.stable if control != SOLO else None
    return (
        _step(
            world,
            trial,
            "evaluate",
            ("--held-out", world.trial_job.spec.data.held_out),
            ("--calls", world.calls),
            ("--round", str(trial.number)),
            *(() if served else (("--control", SOLO),)),
            *((("--predictor", run_uri(world, trial, "predictor")),) if _learns_routes(world, trial) else ()),
            *_generation(world),
            files=(
                ("--candidate", dump(pair)),
                *((("--control", dump(served)),) if served else ()),
            ),
            calls_strong=True,
        ),
    )


def _generation(world: api.World) -> tuple[tuple[str, str], ...]:
    """What the strong model answered before it became another one is asked again."""
    generation = world.status.strong_generation
    return (("--generation", str(generation)),) if generation else ()


def _placeholder(world: api.World) -> Pair:
    """Stands in a chain that is only shown: the evaluation never starts before the candidate's model is known."""
    return declared_pair(world, "", "")


def live_name(trial: api.Trial) -> str:
    return f"r{trial.number}-live-{trial.step}"


def live_score(world: api.World, trial: api.Trial, control: Pair | None) -> api.StepSpec:
    """The watcher that scores live answers in a canary, one report a step; without `control` against solo."""
    candidate, canary = trial.pair, world.trial_job.spec.canary
    assert candidate is not None
    goes_on = trial.stage == "Watch" and trial.since  # with the records of the last step
    return api.StepSpec(
        live_name(trial),
        f"{STEPS}.score_live",
        run_uri(world, trial, f"live-{trial.step}.json"),
        (
            ("--store", world.store),
            ("--step", str(trial.step)),
            ("--since", repr(trial.since if goes_on else trial.step_since)),
            ("--calls", world.calls),
            ("--round", str(trial.number)),
            ("--most", str(most_answers(canary, trial))),
            *((("--watched", repr(trial.step_since)),) if goes_on else ()),
            *((("--beyond", "first-of-user"),) if looks_at_every_user(canary, trial) else ()),
            *(() if control else (("--control", SOLO),)),
            *_generation(world),
        ),
        files=(
            ("--candidate", dump(candidate)),
            *((("--control", dump(control)),) if control else ()),
        ),
        calls_strong=True,
        keeps_running=True,
    )


# ---------------------------------------------------------------- what it will cost
@dataclass(frozen=True)
class Estimate:
    """Upper bounds for one trial; tokens by four characters a token."""

    name: str
    calls: int
    tokens: int
    money: float | None
    currency: str | None


JUDGE_TOKENS = 200  # of what a judge is told and says around a request, its reference and its answer


def estimate(job: api.Job, rows: int, held_out: int, query_chars: float, baseline: bool, labelled: int = 0) -> Estimate:
    """Paid calls of the baseline or of one tuned round: all drafts distinct and asked, no call cached but solo ones.

    `rows`: of training; a round may learn from traces too, of which nobody knows how many will come. What its canary
    asks is in it. `labelled`: answers of people's labels, which a judge scores once.
    """
    spec = job.spec
    queries = 0 if baseline else min(rows, spec.feedback.max_queries)
    explored = queries if is_whole(spec) else most_of(queries, spec.feedback.explore_percent / 100)
    drafted = queries * spec.feedback.drafts_per_query
    solo = queries if spec.feedback.rule == "SignOfGain" else explored
    with_draft, alone = drafted + held_out, solo + (held_out if baseline else 0)
    # Each judge is asked in both orders, and of the weak model's own drafts on the held-out queries too; where a draft
    # may be the answer, on all queries. Listwise it is asked once of what came since it was asked last.
    shortcuts = spec.collaboration.shortcuts
    as_answers = held_out + (queries if shortcuts and shortcuts.weak_alone else 0)
    judges = len(spec.feedback.evaluator.judges)
    verdicts = 2 * judges  # of an answer
    judged = verdicts * (with_draft + alone + as_answers + (labelled if baseline else 0))
    graded = 0  # answers beyond the two that a verdict is of
    if spec.feedback.judging == "Listwise":
        graded = judges * (drafted + solo)
        lists = 1 if is_whole(spec) else 2 if spec.feedback.rule == "SignOfGain" else spec.feedback.drafts_per_query - 1
        judged += judges * queries * lists - verdicts * (drafted + solo)
    replayed, live = live_answers(spec.canary)
    with_draft += replayed
    judged += verdicts * live
    question = query_chars / 4 + len(job.prompts.refine) / 4
    draft = spec.collaboration.draft_max_tokens
    answer = spec.strong.max_tokens or UNKNOWN_OUTPUT_TOKENS
    inputs = with_draft * (question + draft) + alone * question + judged * (question + 2 * answer + JUDGE_TOKENS)
    inputs += graded * answer
    outputs = (with_draft + alone) * answer + judged * JUDGE_TOKENS
    prices = spec.strong.prices
    money = prices.of(inputs, outputs) if prices else None
    name = "baseline" if baseline else "tuned round"
    return Estimate(
        name, with_draft + alone + judged, int(inputs + outputs), money, prices.currency if prices else None
    )


def most_of(n: int, share: float) -> int:
    """Of so many that chance takes with this share each; hardly ever more."""
    return min(n, math.ceil(n * share + 3 * math.sqrt(n * share * (1 - share))))


def is_whole(spec: api.Spec) -> bool:
    """Whether a round asks all of every query."""
    return calls_of(spec) == "All"


def live_answers(canary: api.Canary) -> tuple[int, int]:
    """At most (asked again of the strong model, scored) in the steps and the watch of a canary."""
    least = [step.min_answers for step in canary.steps] + [last_least(canary)] * (canary.watch_seconds > 0)
    both_arms = 2 * sum(map(at_the_last_look, least))
    return (both_arms if canary.signal == "ShadowReplay" else 0), both_arms


def needed_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a step's metrics that later decisions and the status need."""
    wanted = ("pairs", "rows", "from_traces", "traces_usable", "strong_calls", "money", "has_explanations", "alarms",
              "strong")  # fmt: skip
    return {name: metrics[name] for name in wanted if name in metrics}
