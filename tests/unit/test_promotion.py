"""The gates, one refusal at a time: each row differs from a passing case in one thing."""

from dataclasses import replace

import pytest

from cowest_operator import api, promotion
from cowest_training.contract import ArmReport, Calibration, CalibrationReport, SliceReport
from tests import world as w


def case(report=w.report(), status=w.SERVED, gate=w.SPEC.gate):  # noqa: B008
    return promotion.Offline(gate, 5.0, status, w.CANDIDATE.digest, report)


def calibrated(low=0.5, labels=200, **changes):
    seen = CalibrationReport(labels, 0.9, 0.85, 0.94, 0.7, low, 0.8, 3, 0, 0.0, "sha256:labels")
    passing = case(w.report(calibration=replace(seen, **changes)))
    return replace(passing, calibration=Calibration("file:///labels.jsonl", 0.5))


def candidate_arm(**changes):
    arms = tuple(replace(arm, **changes) if arm.name == "candidate" else arm for arm in w.report().arms)
    return w.report(arms=arms)


def test_a_candidate_that_gains_passes_every_offline_gate():
    assert promotion.first_refusal(case()) is None


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        pytest.param(case(report=None), api.REASON_FOREIGN_REPORT, id="no report yet"),
        pytest.param(case(w.report(candidate="sha256:other")), api.REASON_FOREIGN_REPORT, id="report of another pair"),
        pytest.param(
            case(w.report(control="solo")), api.REASON_FOREIGN_REPORT, id="judged against solo while a pair is served"
        ),
        pytest.param(
            case(status=replace(w.SERVED, serving="StrongAlone")),
            api.REASON_FOREIGN_REPORT,
            id="judged against the pair while solo is served",
        ),
        pytest.param(
            case(status=replace(w.SERVED, vetoed=(w.CANDIDATE.digest,))), api.REASON_VETOED, id="vetoed by a person"
        ),
        pytest.param(
            case(w.report(against_control=w.comparison(n=99))), api.REASON_TOO_FEW_HELD_OUT, id="one query short"
        ),
        pytest.param(
            case(w.report(against_control=w.comparison(n=0))), api.REASON_TOO_FEW_HELD_OUT, id="no data is never a pass"
        ),
        pytest.param(
            case(w.report(strong_version="mixed: a, b")), api.REASON_STRONG_CHANGED, id="arms of two strong versions"
        ),
        pytest.param(case(candidate_arm(errors=51)), api.REASON_TOO_MANY_ERRORS, id="51 of 1000 queries failed"),
        pytest.param(
            case(w.report(against_control=w.comparison(0.0, 0.5))), api.REASON_NO_GAIN_OFFLINE, id="a tie is no gain"
        ),
        pytest.param(
            case(w.report(against_control=w.comparison(0.01, 0.026))),
            api.REASON_NO_GAIN_OFFLINE,
            id="p = .026 is not enough at the first look",
        ),
        pytest.param(
            case(w.report(against_control=w.comparison(0.01, 0.01)), status=replace(w.SERVED, looks=1)),
            api.REASON_NO_GAIN_OFFLINE,
            id="p = .01 is not enough at the second look",
        ),
        pytest.param(
            case(gate=replace(w.SPEC.gate, minimum_effect_points=11.0)),
            api.REASON_EFFECT_TOO_SMALL,
            id="10 of 11 points",
        ),
        pytest.param(
            case(w.report(against_solo=w.comparison(-0.1, 0.99, 0.001))),
            api.REASON_WORSE_THAN_SOLO,
            id="the strong model alone is better",
        ),
        pytest.param(case(candidate_arm(hurt_rate=0.26)), api.REASON_HURTS, id="hurts 26 % of the queries"),
        pytest.param(
            case(w.report(slices=(SliceReport("rare", 30, -0.11, -0.2, -0.01),))),
            api.REASON_SLICE_LOSS,
            id="a slice loses 11 points",
        ),
        pytest.param(calibrated(low=0.49), api.REASON_NOT_CALIBRATED, id="the judge may agree with people too seldom"),
        pytest.param(calibrated(labels=49), api.REASON_NOT_CALIBRATED, id="49 labels, however well they agree"),
        pytest.param(
            replace(calibrated(), report=w.report()),
            api.REASON_NOT_CALIBRATED,
            id="nobody held the judge beside people",
        ),
    ],
)
def test_refuses(refused, reason):
    refusal = promotion.first_refusal(refused)
    assert refusal is not None
    assert refusal.reason == reason
    assert refusal.message


def test_a_judge_that_agrees_with_people_decides():
    assert promotion.first_refusal(calibrated()) is None


def test_a_judge_that_may_not_decide_still_informs_and_it_is_said_what_to_do():
    refusal = promotion.first_refusal(calibrated(low=0.3))
    assert refusal is not None
    assert refusal.message.startswith(
        "the evaluator agrees with people on 90 % of 200 labels, kappa 0.70 [0.30, 0.80];"
        " evaluator.calibration.minKappa = 0.5 wants the whole interval above it. What it measured, candidate"
        " minus control +10.0 points [+8.0, +12.0]"
    )
    assert "`cowest review`" in refusal.message and "`cowest propose`" in refusal.message


def test_a_measurable_loss_is_called_one_though_the_reason_is_the_same():
    lost, unclear = (
        promotion.first_refusal(case(w.report(against_control=w.comparison(-0.25, 1.0, p_worse=p))))
        for p in (1e-9, 0.2)
    )
    assert lost is not None and lost.reason == api.REASON_NO_GAIN_OFFLINE
    assert lost.message.endswith("wants a gain with p < 0.025; it is measurably worse (p = 1e-09).")
    assert unclear is not None and "worse" not in unclear.message


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(SliceReport("rare", 29, -0.5, -0.9, -0.1), id="too few queries to say"),
        pytest.param(SliceReport("rare", 30, -0.5, -1.0, 0.01), id="interval reaches zero"),
        pytest.param(SliceReport("rare", 300, -0.09, -0.1, -0.08), id="within the limit"),
    ],
)
def test_a_slice_without_proof_of_loss_does_not_decide(part):
    assert promotion.first_refusal(case(w.report(slices=(part,)))) is None


@pytest.mark.parametrize(
    "versions",
    [
        pytest.param({"candidate": {"a": 900, "b": 100}, "control": {"b": 1000}}, id="a rotation that both arms saw"),
        pytest.param({"candidate": {"a": 900, "": 100}, "control": {"a": 1000}}, id="left out now and then"),
        pytest.param({"candidate": {"a": 1000}, "control": {"": 1000}}, id="one arm was told none"),
        pytest.param({}, id="the report counts none"),
    ],
)
def test_versions_of_the_strong_model_that_arms_share_decide_nothing(versions):
    seen = w.report(strong_version="mixed: a, b" if versions else "a", strong_versions=versions)
    assert promotion.first_refusal(case(seen)) is None


@pytest.mark.parametrize("other", ["control", "solo"])
def test_arms_that_share_no_version_of_the_strong_model_are_not_compared(other):
    seen = w.report(strong_versions={"candidate": {"a": 999, "": 1}, other: {"b": 1000}})
    refusal = promotion.first_refusal(case(seen))
    assert refusal is not None and refusal.reason == api.REASON_STRONG_CHANGED
    assert f"candidate: a; {other}: b" in refusal.message


def test_an_edit_of_the_strong_model_is_not_refused_for_the_versions_of_the_one_before():
    served = replace(w.SERVED, stable=replace(w.STABLE, strong_model="strong-0"))
    of_edit = {"control": served.stable.digest}
    seen = w.report(strong_versions={"candidate": {"a": 1000}, "control": {"b": 1000}, "solo": {"a": 1000}}, **of_edit)
    assert promotion.first_refusal(case(seen, served)) is None
    alone = w.report(strong_versions={"candidate": {"a": 1000}, "solo": {"b": 1000}}, **of_edit)
    refusal = promotion.first_refusal(case(alone, served))
    assert refusal is not None and refusal.reason == api.REASON_STRONG_CHANGED
    revoked = replace(served, serving="StrongAlone")
    seen = w.report(strong_versions={"candidate": {"a": 1000}, "control": {"b": 1000}}, control="solo")
    refusal = promotion.first_refusal(case(seen, revoked))
    assert refusal is not None and "control: b" in refusal.message, "the control is the same model alone"


def test_several_versions_are_mentioned_where_the_candidate_passes():
    assert promotion.versions_note(w.report(strong_versions={"candidate": {"a": 1, "b": 2}})).endswith(
        "2 versions: a, b"
    )
    assert promotion.versions_note(w.report(strong_versions={"candidate": {"a": 1, "": 2}})) == ""


def test_the_level_of_all_looks_together_stays_below_alpha():
    assert sum(promotion.significance(0.05, k) for k in range(1, 10_000)) < 0.05


CANARY = w.SPEC.canary
GATE = replace(w.SPEC.gate, significance=0.05, minimum_effect_points=4.0)


def judge(live, trial=w.trial("Canary"), now=w.NOW, canary=CANARY):  # noqa: B008
    return promotion.judge_live(canary, GATE, trial, live, now)


def test_enough_good_answers_advance():
    assert judge(w.live()).action == "Advance"


@pytest.mark.parametrize(
    ("live", "trial", "action", "reason"),
    [
        pytest.param(None, w.trial("Canary"), "Wait", api.REASON_WAITING_FOR_ANSWERS, id="no report yet"),
        pytest.param(w.live(step=1), w.trial("Canary"), "Wait", api.REASON_WAITING_FOR_ANSWERS,
                     id="another step's report"),
        pytest.param(w.live(49), w.trial("Canary"), "Wait", api.REASON_WAITING_FOR_ANSWERS, id="one answer short"),
        pytest.param(w.live(60, 29), w.trial("Canary"), "Wait", api.REASON_WAITING_FOR_ANSWERS, id="control one short"),
        pytest.param(
            w.live(comparison=w.comparison(-0.3, 1.0, 0.008)),
            w.trial("Canary"),
            "RollBack",
            api.REASON_WORSE_LIVE,
            id="worse at the corrected level",
        ),
        pytest.param(
            w.live(comparison=w.comparison(-0.06, 0.9, 0.02)),
            w.trial("Canary"),
            "LookAgain",
            api.REASON_WAITING_FOR_ANSWERS,
            id="a loss that is not excluded asks for more answers",
        ),
        pytest.param(
            w.live(200, comparison=w.comparison(-0.06, 0.9, 0.02)),
            w.trial("Canary", looks=2),
            "RollBack",
            api.REASON_LOSS_NOT_EXCLUDED,
            id="a loss not excluded at the third look",
        ),
        pytest.param(w.live(99), w.trial("Canary", looks=1), "Wait",
                     api.REASON_WAITING_FOR_ANSWERS, id="the second look wants twice as many"),
        pytest.param(w.live(60, errors=4), w.trial("Canary"), "RollBack", api.REASON_TOO_MANY_ERRORS, id="errors"),
        pytest.param(w.live(19, errors=19), w.trial("Canary"), "Wait", api.REASON_WAITING_FOR_ANSWERS,
                     id="errors of too few answers"),
    ],
)  # fmt: skip
def test_live(live, trial, action, reason):
    verdict = judge(live, trial)
    assert (verdict.action, verdict.reason) == (action, reason)


@pytest.mark.parametrize("live", [None, w.live(49), w.live(60, 0)])
def test_too_few_answers_at_the_deadline_roll_back(live):
    verdict = judge(live, now=w.NOW + CANARY.deadline_seconds)
    assert (verdict.action, verdict.reason) == ("RollBack", api.REASON_TOO_FEW_ANSWERS)


def test_each_step_has_the_whole_deadline_and_time_without_an_engine_is_no_part_of_it():
    later = w.trial("Canary", step=1, stage_since=w.NOW - CANARY.deadline_seconds)
    assert judge(None, later).action == "Wait"
    late = w.trial("Canary", step_since=w.NOW - CANARY.deadline_seconds - 100)
    assert judge(None, late).action == "RollBack"
    assert judge(None, replace(late, away=101.0)).action == "Wait"


def refused(candidate, control, p):
    return w.live(60, 300, refused={"candidate": candidate, "control": control}, p_refused=p)


@pytest.mark.parametrize(
    ("live", "action"),
    [
        pytest.param(refused(6, 0, 0.0001), "RollBack", id="drafts make requests impossible"),
        pytest.param(refused(6, 0, 0.01), "Advance", id="or it is by chance"),
        pytest.param(refused(3, 0, 0.0001), "Advance", id="fewer than maxErrorPercent"),
        pytest.param(replace(refused(3, 0, 0.0001), errors={"candidate": 2}), "RollBack", id="with failures more"),
        pytest.param(refused(6, 30, 0.001), "Advance", id="clients ask the control in vain as often"),
        pytest.param(replace(refused(9, 0, 0.0001), answers={"control": 300}), "RollBack", id="no answer at all"),
    ],
)
def test_what_the_strong_model_refuses_more_of_the_candidates_requests_is_the_drafts_fault(live, action):
    verdict = judge(live)
    assert verdict.action == action, verdict.message
    if action == "RollBack":
        assert verdict.reason == api.REASON_TOO_MANY_ERRORS
        assert "more than of the control's" in verdict.message
    watched = replace(WATCH, entered={})
    assert judge_watch(replace(live, step=2, comparison=None), watched).action == (
        "RollBack" if action == "RollBack" else "Wait"
    )


def test_so_many_answers_are_scored_as_all_looks_come_to():
    assert [promotion.most_answers(CANARY, w.trial("Canary", step=step)) for step in (0, 1)] == [200, 400]
    assert promotion.most_answers(CANARY, w.trial("Watch", step=2)) == 400
    assert promotion.most_answers(replace(CANARY, steps=()), w.trial("Watch")) == 120
    assert promotion.looks_at_every_user(BY_GAIN, LAST_STEP)
    assert not promotion.looks_at_every_user(BY_GAIN, w.trial("Canary"))
    assert not promotion.looks_at_every_user(CANARY, LAST_STEP)
    assert not promotion.looks_at_every_user(BY_GAIN, w.trial("Watch", step=1))


def test_a_report_from_before_the_step_is_no_data():
    stale = w.live(updated=w.NOW - 51)
    assert judge(stale).action == "Wait"
    watch = w.trial("Watch", step=2)
    canary = replace(CANARY, watch_seconds=100)
    errors = w.live(20, errors=9, step=2)
    assert judge_watch(replace(errors, updated=w.NOW - 51), watch, canary=canary).action == "Wait"
    assert judge_watch(replace(errors, candidate="sha256:x"), watch, canary=canary).action == "Wait"


BY_GAIN = replace(CANARY, signal="ShadowReplay", test="AnytimeValid")
LAST_STEP = w.trial("Canary", step=len(CANARY.steps) - 1, discordant=0.2)


def replayed(better, worse, same=100, n=500):
    return w.live(n, n, step=LAST_STEP.step, differences=((-1.0, worse), (0.0, same), (1.0, better)))


@pytest.mark.parametrize(
    ("live", "late", "action", "reason"),
    [
        pytest.param(replayed(100, 50), 0, "Advance", api.REASON_PROGRESSING, id="a gain is shown"),
        pytest.param(replayed(60, 40), 0, "Wait", api.REASON_WAITING_FOR_ANSWERS, id="ahead, and not sure"),
        pytest.param(replayed(60, 40), 1, "RollBack", api.REASON_GAIN_NOT_SHOWN, id="not sure at the deadline"),
        pytest.param(replayed(150, 150), 0, "RollBack", api.REASON_GAIN_NOT_SHOWN, id="as often won as lost"),
        pytest.param(replayed(20, 60), 0, "RollBack", api.REASON_GAIN_NOT_SHOWN, id="worse"),
        pytest.param(replayed(100, 50, n=99), 0, "Wait", api.REASON_WAITING_FOR_ANSWERS, id="one short of minAnswers"),
        pytest.param(replayed(0, 0), 0, "Wait", api.REASON_WAITING_FOR_ANSWERS, id="no data is never a pass"),
        pytest.param(replayed(0, 0), 1, "RollBack", api.REASON_GAIN_NOT_SHOWN, id="nor at the deadline"),
    ],
)
def test_the_last_step_by_a_test_that_may_be_looked_at_wants_a_gain(live, late, action, reason):
    verdict = judge(live, LAST_STEP, w.NOW + late * CANARY.deadline_seconds, BY_GAIN)
    assert (verdict.action, verdict.reason) == (action, reason), verdict.message
    assert judge(live, LAST_STEP, canary=CANARY).reason != api.REASON_GAIN_NOT_SHOWN


def test_the_steps_before_the_last_are_judged_by_harm_and_the_level_is_the_gates():
    first = replayed(1, 1)
    assert judge(replace(first, step=0), w.trial("Canary"), canary=BY_GAIN).action == "Advance"
    strict = replace(GATE, significance=0.0001)
    seen = promotion.judge_live(BY_GAIN, strict, LAST_STEP, replayed(100, 50), w.NOW)
    assert seen.action == "Wait" and "9.23e+03 is wanted" in seen.message


WATCHED = replace(CANARY, watch_seconds=100)
WATCH = w.trial("Watch", step=2, entered={"answers": 100, "errors": 0, "scored": 100})


def judge_watch(live, trial=WATCH, now=w.NOW, canary=WATCHED):
    return promotion.judge_watch(canary, 0.05, trial, live, now)


def test_the_watch_ends_by_time_and_is_cut_short_by_its_own_errors():
    assert judge_watch(None).action == "Wait"
    assert judge_watch(None, now=w.NOW + 50).action == "Advance"
    assert judge_watch(w.live(120, errors=2, step=2)).reason == api.REASON_TOO_MANY_ERRORS
    assert judge_watch(w.live(119, errors=2, step=2)).action == "Wait", "of too few answers"
    late = replace(WATCH, entered={"answers": 100, "errors": 9, "scored": 100})
    assert judge_watch(w.live(120, errors=9, step=2), late).action == "Wait", "those of the canary were judged there"


LOSS = w.comparison(-0.2, 1.0, 0.005)


@pytest.mark.parametrize(
    ("live", "looks", "now", "action"),
    [
        pytest.param(w.live(200, comparison=LOSS, step=2), 0, w.NOW, "RollBack", id="enough new answers show a loss"),
        pytest.param(w.live(199, comparison=LOSS, step=2), 0, w.NOW, "Wait", id="too few new answers for a look"),
        pytest.param(w.live(199, comparison=LOSS, step=2), 0, w.NOW + 50, "RollBack", id="a look at the end"),
        pytest.param(w.live(200, step=2), 0, w.NOW, "LookAgain", id="no loss, and a look is spent"),
        pytest.param(w.live(299, comparison=LOSS, step=2), 1, w.NOW, "Wait", id="the next wants twice as many"),
        pytest.param(w.live(999, comparison=LOSS, step=2), 3, w.NOW + 50, "Advance", id="no look is left"),
        pytest.param(w.live(200, comparison=w.comparison(-0.2, 1.0, 0.0056), step=2), 0, w.NOW, "LookAgain",
                     id="the watch shares the level with the steps"),
    ],
)  # fmt: skip
def test_a_loss_in_the_watch_rolls_back(live, looks, now, action):
    verdict = judge_watch(live, replace(WATCH, looks=looks), now)
    assert verdict.action == action
    assert verdict.reason == api.REASON_WORSE_LIVE or action != "RollBack"


# ---------------------------------------------------------------- a control that does not answer
def dead_control(answers=60, failed=51, of=100, errors=0, scored=0):
    seen = w.live(answers, errors=errors, comparison=None)
    return replace(
        seen,
        answers={"candidate": answers, "control": of},
        scored={"candidate": answers, "control": scored},
        errors={"candidate": errors, "control": failed},
    )


@pytest.mark.parametrize(
    ("live", "action"),
    [
        pytest.param(dead_control(), "Advance", id="most fail"),
        pytest.param(dead_control(failed=50), "Wait", id="half fail"),
        pytest.param(dead_control(failed=19, of=19), "Wait", id="too few answers to say"),
        pytest.param(dead_control(answers=49), "Wait", id="too few of the candidate"),
        pytest.param(dead_control(errors=4), "RollBack", id="the candidate fails too"),
    ],
)
def test_where_the_control_fails_the_candidates_own_failures_decide(live, action):
    verdict = judge(live)
    assert verdict.action == action
    assert "control's 100 live answers failed" in verdict.message or action != "Advance"


def test_a_control_that_fails_often_but_is_scored_enough_is_compared_all_the_same():
    worse = replace(dead_control(scored=30), comparison=w.comparison(-0.3, 1.0, 1e-4))
    assert judge(worse).reason == api.REASON_WORSE_LIVE


def test_what_is_short_is_said_of_the_arm_that_is_short():
    assert "60 of 50 scored live answers of the candidate, 0 of 30 of the control" in judge(w.live(60, 0)).message


# ---------------------------------------------------------------- the weak model alone
def arms(candidate: float, solo: float, weak: float) -> tuple[ArmReport, ...]:
    scores = {"candidate": candidate, "control": solo, "solo": solo, "weak": weak}
    return tuple(ArmReport(name, 500, score, score - 0.02, score + 0.02, 0.0) for name, score in scores.items())


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        pytest.param((0.7, 0.3, 0.4), "", id="the pair is far above it"),
        pytest.param((0.5, 0.5, 0.3), "", id="it is below both"),
        pytest.param((0.5, 0.5, 0.53), "", id="it may be above by chance"),
        pytest.param((0.5, 0.6, 0.7), "better answers than the pair's", id="it is far above the pair"),
        pytest.param((0.7, 0.3, 0.69), "adds nothing that is seen", id="it is far above solo and as good as the pair"),
    ],
)
def test_it_is_said_where_the_weak_model_alone_may_be_all_that_is_needed(scores, says):
    said = promotion.weak_alone(w.report(arms=arms(*scores)))
    assert says in said and bool(said) == bool(says)
    assert not said or f"weak model alone scores {100 * scores[2]:.1f} %, the pair {100 * scores[0]:.1f} %" in said


@pytest.mark.parametrize(
    ("candidate", "control", "gain", "says"),
    [
        pytest.param(0.4, 0.5, 0.1, True, id="rare labels lose what frequent ones gain"),
        pytest.param(0.6, 0.5, 0.1, False, id="both grow"),
        pytest.param(0.4, 0.5, -0.1, False, id="the score itself falls, which is said elsewhere"),
        pytest.param(None, None, 0.1, False, id="no labels"),
    ],
)
def test_a_gain_at_the_cost_of_rare_labels_is_told(candidate, control, gain, says):
    seen = [replace(a, macro_f1={"candidate": candidate, "control": control}.get(a.name)) for a in arms(0.6, 0.5, 0.2)]
    said = promotion.rare_labels(w.report(arms=tuple(seen), against_control=replace(w.comparison(), difference=gain)))
    assert said.startswith("Macro-F1 falls from 50.0 to 40.0 % while the score grows") if says else said == ""


def test_it_is_said_on_how_many_queries_the_drafts_made_no_difference():
    def said(better, worse):
        return promotion.drafts_unused(w.report(against_solo=replace(w.comparison(n=400), better=better, worse=worse)))

    assert "with and without the draft on 400 of 400 queries; does the prompt" in said(0, 0)
    assert said(100, 20).endswith("with and without the draft on 280 of 400 queries.")
