"""Whether a candidate may go on: the offline gates, then the live gate of the canary. Pure.

What is judged is always the pair's answer. No data is never a pass, and each refusal is a reason and a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal

from cowest_operator import anytime, api
from cowest_training.contract import LEAST_LABELS, Calibration, Comparison, EvaluationReport, LiveReport

SOLO = "solo"
LOOKS_PER_STEP = 3  # the live answers are judged at 1, 2 and 4 times `minAnswers`
MIN_CONTROL_ANSWERS = 30  # the control of a step may be the smaller arm, but never smaller than this (or minAnswers)
ASKING = ("feedback", "evaluate")  # the steps that ask the strong model, in order
MIN_SLICE = 30  # smaller slices are reported and never decide

UNUSED = 0.95  # share of queries with the same score with and without a draft: the drafts may not be used at all


@dataclass(frozen=True)
class Refusal:
    reason: str
    message: str


def control_of(status: api.Status) -> str:
    """Digest of what is served now: the stable pair, or `solo` while the strong model answers alone."""
    return status.stable.digest if status.stable and status.serving == "Pair" else SOLO


def significance(alpha: float, look: int) -> float:
    """The level for the `look`-th (from 1) candidate judged on the same held-out set.

    alpha / (k (k + 1)) sums to alpha over all k, however many candidates come: a union bound that needs no horizon.
    """
    return alpha / (look * (look + 1))


# ---------------------------------------------------------------- offline
@dataclass(frozen=True)
class Offline:
    """What the offline gates see."""

    gate: api.Gate
    max_error_percent: float
    status: api.Status
    pair: str
    report: EvaluationReport | None
    calibration: Calibration | None = None  # of the evaluator, where people's labels are declared

    @property
    def judged(self) -> EvaluationReport:
        """Only for gates after the first, which makes sure that there is a report."""
        assert self.report is not None
        return self.report


def report_is_of_the_candidate(case: Offline) -> Refusal | None:
    """First, because no number of another pair may decide about this one."""
    control = control_of(case.status)
    if case.report is None:
        return Refusal(api.REASON_FOREIGN_REPORT, "wanted an evaluation report of the candidate, saw none.")
    seen = (case.report.candidate, case.report.control)
    if seen != (case.pair, control):
        wanted = f"{_short(case.pair)} against {_short(control)}"
        return Refusal(
            api.REASON_FOREIGN_REPORT,
            f"wanted a report of {wanted}, saw one of {_short(seen[0])} against {_short(seen[1])}.",
        )
    return None


def not_vetoed_by_a_person(case: Offline) -> Refusal | None:
    if case.pair in case.status.vetoed:
        return Refusal(
            api.REASON_VETOED, "a person rolled this very pair back; `cowest propose` its model to take that back."
        )
    return None


def looks_before(status: api.Status, held_out: str, rows: str) -> int:
    """Offline gates on these rows so far. A status of before these were counted by digest has them by address."""
    if not status.looked:
        return status.looks if status.held_out == held_out else 0
    return next((seen.looks for seen in status.looked if seen.held_out == rows), 0)


def enough_held_out_queries(case: Offline) -> Refusal | None:
    n = case.judged.against_control.n
    if n < case.gate.min_held_out:
        return Refusal(
            api.REASON_TOO_FEW_HELD_OUT,
            f"the gate wants {case.gate.min_held_out} held-out queries (gate.minHeldOut), saw {n}.",
        )
    return None


def one_strong_version(case: Offline) -> Refusal | None:
    """Arms that asked different versions of the strong model cannot be compared.

    Endpoints rotate between several versions and leave the name out now and then: arms that share one are compared.
    A control that was asked of another model, as what is served is when strong.model is edited, shares none with it.
    """
    versions = case.judged.strong_versions
    if not versions and case.judged.strong_version.startswith("mixed"):
        return _another_version(case.judged.strong_version)
    named = {arm: {version for version in seen if version} for arm, seen in versions.items()}
    mine = named.get("candidate", set())
    for arm in (SOLO,) if _asks_another_model(case) else ("control", SOLO):
        if mine and named.get(arm) and not mine & named[arm]:
            return _another_version(f"candidate: {', '.join(sorted(mine))}; {arm}: {', '.join(sorted(named[arm]))}")
    return None


def _asks_another_model(case: Offline) -> bool:
    """The control. Where the strong model alone is the control, it is the candidate's."""
    served = case.status.stable if case.judged.control != SOLO else None
    return served is not None and served.strong_model != case.judged.strong_model


def strong_change(trial: api.Trial) -> str:
    """That the strong model became another one in the middle of this trial, within a step or between two; else ""."""
    seen: list[Mapping[str, Any]] = [found for name in ASKING if (found := trial.done.get(name, {}).get("strong"))]
    if changed := next((found["change"] for found in seen if found.get("change")), ""):
        return f"the strong model became another one in the middle of the round ({changed})."
    for before, after in pairwise([found for found in seen if found.get("first")]):
        if not set(before["last"]) & set(after["first"]):
            names = f"{', '.join(before['last'])} before, {', '.join(after['first'])} now"
            return f"the strong model became another one between two steps of the round ({names})."
    return ""


def _another_version(seen: str) -> Refusal:
    return Refusal(
        api.REASON_STRONG_CHANGED,
        f"the strong model changed its version between the arms' calls ({seen}); propose the candidate again,"
        " and what was answered before is asked anew.",
    )


def versions_note(report: EvaluationReport) -> str:
    """Said of a candidate that passed although the strong model answered in several versions; else ""."""
    seen = sorted({version for arm in report.strong_versions.values() for version in arm if version})
    return f"; the strong model answered in {len(seen)} versions: {', '.join(seen)}" if len(seen) > 1 else ""


def drafts_unused(report: EvaluationReport) -> str:
    """Said of a candidate that shows no gain: on how many queries its drafts made any difference to the score."""
    seen = report.against_solo
    same = seen.n - seen.better - seen.worse
    if not seen.n:
        return ""
    asked = "; does the prompt (collaboration.prompts.refine) use the draft?" if same >= UNUSED * seen.n else "."
    return f" The strong model gave the same score with and without the draft on {same} of {seen.n} queries{asked}"


def weak_alone(report: EvaluationReport) -> str:
    """Said where the weak model without the strong one may be all that is needed, whatever the gate decides; else "".

    Scores are far apart when their 95 % intervals do not meet.
    """
    arms = {arm.name: arm for arm in report.arms}
    weak, pair, solo = arms.get("weak"), arms.get("candidate"), arms.get(SOLO)
    if weak is None or pair is None or solo is None:
        return ""
    others = f"the pair {100 * pair.score:.1f} %, the strong model alone {100 * solo.score:.1f} %"
    shown = f"On the held-out queries the weak model alone scores {100 * weak.score:.1f} %, {others}"
    if weak.low > pair.high:
        return f"{shown}: its drafts are better answers than the pair's, and cost no call of the strong model."
    if weak.low > solo.high and pair.low <= weak.high:
        return f"{shown}: the strong model adds nothing that is seen to what the weak one answers by itself."
    return ""


def rare_labels(report: EvaluationReport) -> str:
    """Said where labels that are rare lose what frequent ones gain: the score grows, its macro-F1 falls; else ""."""
    arms = {arm.name: arm.macro_f1 for arm in report.arms}
    pair, control = arms.get("candidate"), arms.get("control")
    if pair is None or control is None or report.against_control.difference <= 0 or pair >= control:
        return ""
    return (
        f"Macro-F1 falls from {100 * control:.1f} to {100 * pair:.1f} % while the score grows: some labels lose what"
        " others gain. Rows with a `group` by label are held to gate.maxSliceLossPoints each."
    )


def few_enough_errors(case: Offline) -> Refusal | None:
    arm = case.judged.arm("candidate")
    percent = 100 * arm.errors / max(1, arm.n)
    if percent > case.max_error_percent:
        return Refusal(
            api.REASON_TOO_MANY_ERRORS,
            f"{arm.errors} of {arm.n} held-out queries got no answer, more than {case.max_error_percent:g} %.",
        )
    return None


def evaluator_agrees_with_people(case: Offline) -> Refusal | None:
    """Before all that goes by its scores: an evaluator of which that is not shown informs, and promotes nothing."""
    why = not_calibrated(case.calibration, case.judged)
    if not why:
        return None
    return Refusal(
        api.REASON_NOT_CALIBRATED,
        f"{why} What it measured, candidate minus control {points(case.judged.against_control)}, informs and does not"
        " promote. `cowest review` asks people for more labels; a clearer rubric or another judge may agree better."
        " Then `cowest propose` the model again: no answer is paid for twice.",
    )


def not_calibrated(wanted: Calibration | None, report: EvaluationReport) -> str:
    """Why this report's evaluator may decide nothing, as a sentence; "" where it may."""
    if wanted is None:
        return ""
    seen, bar = report.calibration, f"evaluator.calibration.minKappa = {wanted.min_kappa:g}"
    if seen is None:
        return f"the evaluator was not held against people's labels, as {bar} wants."
    agrees = (
        f"the evaluator agrees with people on {100 * seen.agreement:.0f} % of {seen.labels} labels, kappa"
        f" {seen.kappa:.2f} [{seen.kappa_low:.2f}, {seen.kappa_high:.2f}]"
    )
    if seen.labels < LEAST_LABELS:
        return f"{agrees}; fewer than {LEAST_LABELS} labels show nothing."
    if seen.kappa_low < wanted.min_kappa:
        return f"{agrees}; {bar} wants the whole interval above it."
    return ""


def candidate_gains(case: Offline) -> Refusal | None:
    """The round must have bought something: significant at a level that pays for all the looks before."""
    look = case.status.looks + 1
    level = significance(case.gate.significance, look)
    seen = case.judged.against_control
    if seen.difference <= 0 or seen.p_better >= level:
        worse = f"; it is measurably worse (p = {seen.p_worse:.2g})" if seen.p_worse < level else ""
        return Refusal(
            api.REASON_NO_GAIN_OFFLINE,
            f"candidate minus control is {points(seen)} with p = {seen.p_better:.2g}; look {look} at this held-out set"
            f" wants a gain with p < {level:.2g}{worse}.",
        )
    return None


def effect_is_large_enough(case: Offline) -> Refusal | None:
    gain = 100 * case.judged.against_control.difference
    if gain < case.gate.minimum_effect_points:
        return Refusal(
            api.REASON_EFFECT_TOO_SMALL,
            f"a gain of {gain:.1f} points is below gate.minimumEffectPoints = {case.gate.minimum_effect_points:g}.",
        )
    return None


def not_worse_than_the_strong_alone(case: Offline) -> Refusal | None:
    seen = case.judged.against_solo
    if seen.p_worse < case.gate.significance:
        return Refusal(
            api.REASON_WORSE_THAN_SOLO,
            f"the strong model alone is better: candidate minus solo is {points(seen)} (p = {seen.p_worse:.2g}).",
        )
    return None


def hurts_rarely(case: Offline) -> Refusal | None:
    percent = 100 * case.judged.arm("candidate").hurt_rate
    if percent > case.gate.max_hurt_percent:
        return Refusal(
            api.REASON_HURTS,
            f"in {percent:.1f} % of the queries the strong model alone does better,"
            f" more than gate.maxHurtPercent = {case.gate.max_hurt_percent:g}.",
        )
    return None


def no_slice_loses(case: Offline) -> Refusal | None:
    limit = case.gate.max_slice_loss_points
    for part in case.judged.slices:
        if part.n >= MIN_SLICE and part.high < 0 and -100 * part.difference > limit:
            return Refusal(
                api.REASON_SLICE_LOSS,
                f"slice {part.group!r} ({part.n} queries) loses {-100 * part.difference:.1f} points,"
                f" more than gate.maxSliceLossPoints = {limit:g}.",
            )
    return None


OFFLINE_GATES: tuple[Callable[[Offline], Refusal | None], ...] = (
    report_is_of_the_candidate,
    not_vetoed_by_a_person,
    enough_held_out_queries,
    one_strong_version,
    few_enough_errors,
    evaluator_agrees_with_people,
    candidate_gains,
    effect_is_large_enough,
    not_worse_than_the_strong_alone,
    hurts_rarely,
    no_slice_loses,
)


def first_refusal(case: Offline) -> Refusal | None:
    return next((refusal for gate in OFFLINE_GATES if (refusal := gate(case))), None)


# ---------------------------------------------------------------- live
@dataclass(frozen=True)
class Verdict:
    """Of one look at a canary step: wait, take one more look later, go on, or roll back."""

    action: Literal["Wait", "LookAgain", "Advance", "RollBack"]
    reason: str
    message: str


def judge(canary: api.Canary, gate: api.Gate, trial: api.Trial, live: LiveReport | None, now: float) -> Verdict:
    """One look at a trial in canary or watch."""
    if trial.promoted or (trial.stage == "Canary" and not canary.steps):
        return Verdict("Wait", api.REASON_WAITING_FOR_SERVER, "no live answer decides: it waits for its server.")
    if trial.stage == "Watch":
        return judge_watch(canary, gate.significance, trial, live, now)
    return judge_live(canary, gate, trial, live, now)


def judge_live(canary: api.Canary, gate: api.Gate, trial: api.Trial, live: LiveReport | None, now: float) -> Verdict:
    """A pure function of the recorded live report; replaying the report gives the same verdict.

    A step is judged when `minAnswers` of the candidate are scored, then at twice and four times as many while a loss
    above `maxLossPoints` is not excluded: the level is shared by all these looks. The last step of a canary whose
    `test` is AnytimeValid is judged by the gain, at every look from `minAnswers` on.
    """
    step = step_of(canary, trial)
    if step is None:
        return Verdict("Wait", api.REASON_WAITING_FOR_ANSWERS, "no canary steps are declared.")
    wanted = answers_of_look(step, trial)
    late = now - trial.step_since - trial.away > canary.deadline_seconds
    undecided = _too_few if late else _wait
    if live is None or not _is_of(live, trial):
        return undecided(f"0 of {wanted} scored live answers", "", canary)
    at_least = min(20, step.min_answers)
    answers, errors = live.answers.get("candidate", 0), live.errors.get("candidate", 0)
    if verdict := _too_many_errors(canary, gate.significance, live, (answers, errors), at_least):
        return verdict
    scored, control = live.scored.get("candidate", 0), live.scored.get("control", 0)
    of_control = min(wanted, MIN_CONTROL_ANSWERS)
    if scored < wanted:
        return undecided(f"{scored} of {wanted} scored live answers", live.unscored_reason, canary)
    if control < of_control and (verdict := _control_fails(trial, live, at_least)):
        return verdict
    if control < of_control or live.comparison is None:
        short = f"{scored} of {wanted} scored live answers of the candidate, {control} of {of_control} of the control"
        return undecided(short, live.unscored_reason, canary)
    if looks_at_every_user(canary, trial):
        return _judge_gain(canary, gate, trial, live, late)
    return _judge_loss(canary, gate, trial, live)


def _judge_loss(canary: api.Canary, gate: api.Gate, trial: api.Trial, live: LiveReport) -> Verdict:
    """A step is passed unless a loss is shown, or is still possible at the last look."""
    seen, level = live.comparison, _level(canary, gate.significance)
    assert seen is not None
    if seen.p_worse < level:
        return _worse(live, level)
    scored, control = live.scored.get("candidate", 0), live.scored.get("control", 0)
    if 100 * seen.difference >= -canary.max_loss_points:
        return Verdict(
            "Advance",
            api.REASON_PROGRESSING,
            f"candidate minus control is {points(seen)} live ({scored} against {control} answers).",
        )
    if trial.looks + 1 >= LOOKS_PER_STEP:
        return Verdict(
            "RollBack",
            api.REASON_LOSS_NOT_EXCLUDED,
            f"after {scored} answers candidate minus control is still {points(seen)} live,"
            f" below -{canary.max_loss_points:g} (canary.maxLossPoints).",
        )
    return Verdict("LookAgain", api.REASON_WAITING_FOR_ANSWERS, f"{points(seen)} live is not yet clear.")


def _judge_gain(canary: api.Canary, gate: api.Gate, trial: api.Trial, live: LiveReport, late: bool) -> Verdict:
    """Promoted once the replayed queries show a gain, rolled back once the least gain worth seeing is unlikely.

    See docs/decisions/0013-a-test-that-may-be-looked-at.md.
    """
    assert live.comparison is not None
    effect = gate.minimum_effect_points / 100
    discordant = anytime.ASSUMED if trial.discordant is None else trial.discordant
    seen = anytime.look(anytime.Design(effect, max(effect, discordant), gate.significance), live.differences)
    users = sum(number for _, number in live.differences)
    shown = (
        f"candidate minus control is {points(live.comparison)} on {live.comparison.n} replayed queries; the first of"
        f" each of {users} users give evidence of a gain of {_evidence(seen.log_wealth)}, and"
        f" {_evidence(seen.promote)} is wanted"
    )
    if seen.said == "Better":
        return Verdict("Advance", api.REASON_PROGRESSING, f"{shown}.")
    least = f"gate.minimumEffectPoints = {gate.minimum_effect_points:g}"
    if seen.said == "Futile":
        return Verdict("RollBack", api.REASON_GAIN_NOT_SHOWN, f"{shown}: a gain of {least} is unlikely by now.")
    if late:
        over = f"when canary.deadlineSeconds = {canary.deadline_seconds} was over"
        return Verdict("RollBack", api.REASON_GAIN_NOT_SHOWN, f"{shown}: no gain was shown {over} ({least}).")
    return Verdict("Wait", api.REASON_WAITING_FOR_ANSWERS, f"{shown}.")


def _evidence(log_wealth: float) -> str:
    return f"{math.exp(min(log_wealth, 300.0)):.3g}"


def answers_of_look(step: api.CanaryStep, trial: api.Trial) -> int:
    """Scored answers of the candidate that the next look at this step wants."""
    return step.min_answers << trial.looks


def most_answers(canary: api.Canary, trial: api.Trial) -> int:
    """Scored answers of an arm that all looks at this step, or at the watch, come to."""
    step = step_of(canary, trial)
    return at_the_last_look(last_least(canary) if step is None or trial.stage == "Watch" else step.min_answers)


def at_the_last_look(least: int) -> int:
    """Answers where the first look wants `least`: each look wants twice as many as the one before."""
    return least << LOOKS_PER_STEP - 1


def last_least(canary: api.Canary) -> int:
    """Answers that the first look of a watch wants: those of the last step's."""
    return canary.steps[-1].min_answers if canary.steps else MIN_CONTROL_ANSWERS


def looks_at_every_user(canary: api.Canary, trial: api.Trial) -> bool:
    """A test that may be looked at goes on until a gain is shown or unlikely: no number of answers ends it."""
    return trial.stage == "Canary" and canary.test == "AnytimeValid" and step_of(canary, trial) == canary.steps[-1]


def step_of(canary: api.Canary, trial: api.Trial) -> api.CanaryStep | None:
    """The step that the trial is in. Where fewer are declared by now the last of them: no data is never a pass."""
    return canary.steps[min(trial.step, len(canary.steps) - 1)] if canary.steps else None


def judge_watch(canary: api.Canary, alpha: float, trial: api.Trial, live: LiveReport | None, now: float) -> Verdict:
    """After the last step the candidate has all the traffic; the old pair stays warm for `watchSeconds`.

    A loss is looked for as in a step. The control has no traffic any more: its answers are those of the last step,
    which the report of the watch begins with. Errors are those of the watch alone.
    """
    ends = trial.step_since + trial.away + canary.watch_seconds
    if live is not None and _is_of(live, trial):
        counts = (live.answers.get("candidate", 0), live.errors.get("candidate", 0))
        answers, errors = counts[0] - trial.entered.get("answers", 0), counts[1] - trial.entered.get("errors", 0)
        if verdict := _too_many_errors(canary, alpha, live, (answers, errors), 20):
            return verdict
        if verdict := _look_in_watch(canary, alpha, trial, live, over=now >= ends):
            return verdict
    if now < ends:
        until = datetime.fromtimestamp(ends, UTC).strftime("%H:%M:%S UTC")
        return Verdict("Wait", api.REASON_PROGRESSING, f"watching the promoted pair until {until}.")
    return Verdict("Advance", api.REASON_PROMOTED, "the watch ended without trouble.")


def _look_in_watch(canary: api.Canary, alpha: float, trial: api.Trial, live: LiveReport, over: bool) -> Verdict | None:
    """One of the looks of the watch, when it is due: after 1, 2 and 4 times the last `minAnswers`, or at its end."""
    last = last_least(canary)
    new = live.scored.get("candidate", 0) - trial.entered.get("scored", 0)
    if live.comparison is None or trial.looks >= LOOKS_PER_STEP or not (over or new >= last * 2**trial.looks):
        return None
    if live.comparison.p_worse < _level(canary, alpha):
        return _worse(live, _level(canary, alpha))
    return None if over else Verdict("LookAgain", api.REASON_PROGRESSING, "no loss is shown so far in the watch.")


def _level(canary: api.Canary, alpha: float) -> float:
    """Of one look at live answers: all looks of all steps, and of the watch where there is one, share the level."""
    return alpha / (LOOKS_PER_STEP * max(1, len(canary.steps) + (canary.watch_seconds > 0)))


def _worse(live: LiveReport, level: float) -> Verdict:
    seen, scored = live.comparison, live.scored
    assert seen is not None
    return Verdict(
        "RollBack",
        api.REASON_WORSE_LIVE,
        f"on live traffic candidate minus control is {points(seen)} (p = {seen.p_worse:.2g} < {level:.2g},"
        f" {scored.get('candidate', 0)} against {scored.get('control', 0)} answers).",
    )


def _control_fails(trial: api.Trial, live: LiveReport, at_least: int) -> Verdict | None:
    """What answers now does not: an edit that mends it cannot wait for answers to compare with.

    Only asked when too few answers of the control are scored; the candidate has as many as the step wants.
    """
    answers, errors = live.answers.get("control", 0), live.errors.get("control", 0)
    if answers < at_least or 2 * errors <= answers:
        return None
    mine = f"{live.errors.get('candidate', 0)} of {live.answers.get('candidate', 0)}"
    offline = "" if trial.difference is None else f" ({100 * trial.difference:+.1f} points)"
    return Verdict(
        "Advance",
        api.REASON_PROGRESSING,
        f"{errors} of the control's {answers} live answers failed, so there is nothing to compare with: judged by the"
        f" candidate's own failures ({mine}) and the offline report{offline}.",
    )


def _is_of(live: LiveReport, trial: api.Trial) -> bool:
    """A report of another candidate or step, or one that was there before this step began, says nothing."""
    candidate = trial.pair.digest if trial.pair else None
    return (live.candidate, live.step) == (candidate, trial.step) and live.updated >= trial.step_since


def _too_many_errors(
    canary: api.Canary, alpha: float, live: LiveReport, counts: tuple[int, int], at_least: int
) -> Verdict | None:
    """`counts`: of the candidate's answers and of those that failed.

    A request that the strong model refuses is the client's fault in either arm; what more the candidate's are refused
    is its drafts' (too long, filtered), and counts as failed once it is not by chance.
    """
    answers, errors = counts
    failed = errors / answers if answers >= at_least else 0.0
    refused = live.refused.get("candidate", 0)
    more = max(0.0, _refused(live, "candidate") - _refused(live, "control"))
    if live.p_refused >= _level(canary, alpha):
        more = 0.0
    if 100 * (failed + more) <= canary.max_error_percent:
        return None
    also = (
        f" and {refused} of its requests were refused by the strong model, {100 * more:.1f} % more than of the"
        f" control's (p = {live.p_refused:.2g})"
    ) if more else ""  # fmt: skip
    return Verdict(
        "RollBack",
        api.REASON_TOO_MANY_ERRORS,
        f"{errors} of the candidate's {answers} live answers failed{also}, more than canary.maxErrorPercent ="
        f" {canary.max_error_percent:g}.",
    )


def _refused(live: LiveReport, arm: str) -> float:
    """Share of the arm's requests that the strong model refused."""
    refused = live.refused.get(arm, 0)
    return refused / max(1, refused + live.answers.get(arm, 0))


def _wait(said: str, why: str, canary: api.Canary) -> Verdict:
    note = f" ({why})" if why else ""
    return Verdict("Wait", api.REASON_WAITING_FOR_ANSWERS, f"{said}{note}.")


def _too_few(said: str, why: str, canary: api.Canary) -> Verdict:
    note = f"; {why}" if why else ""
    return Verdict(
        "RollBack",
        api.REASON_TOO_FEW_ANSWERS,
        f"{said} when canary.deadlineSeconds = {canary.deadline_seconds} was over{note}.",
    )


def points(seen: Comparison) -> str:
    return f"{100 * seen.difference:+.1f} points [{100 * seen.low:+.1f}, {100 * seen.high:+.1f}]"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
