"""World in, plan out: the loop as a table of moves."""

from dataclasses import replace

import pytest

from cowest_operator import api, reconcile, rounds
from cowest_serving.contract import RouteLimits, Shortcuts
from cowest_training.contract import (
    ArmReport,
    Calibration,
    CalibrationReport,
    Evaluator,
    SliceReport,
    evaluator_digest,
)
from tests import world as w


def settle(world, most=10):
    """Plan until nothing more moves by itself; the last plan."""
    for _ in range(most):
        plan = reconcile.plan(world)
        if plan.status == world.status:
            return plan
        world = replace(world, status=plan.status)
    raise AssertionError("it never settles")


def condition(plan, type_):
    return next(c for c in plan.status.conditions if c.type == type_)


def steps(plan):
    return [step.name for step in plan.steps]


FRESH = w.world(status=api.Status())


def test_a_new_job_answers_by_the_strong_alone_and_starts_the_baseline_with_sft():
    plan = settle(FRESH)
    assert steps(plan) == ["r0-sft"]
    assert [(a.name, a.weight_percent, a.mode) for a in plan.routing.arms] == [("stable", 100, "StrongAlone")]
    assert condition(plan, api.READY).status == "True"


@pytest.mark.parametrize(
    ("world", "first"),
    [
        pytest.param(replace(FRESH, has_explanations=False), "r0-publish", id="no explanations: the base as it is"),
        pytest.param(replace(FRESH, job=w.job(training={"sft": "Never"})), "r0-publish", id="sft Never"),
        pytest.param(
            replace(FRESH, job=w.job(training={"sft": "Always"}), has_explanations=False), "r0-sft", id="sft Always"
        ),
    ],
)
def test_the_first_step_of_the_baseline(world, first):
    assert steps(settle(world)) == [first]


def test_what_was_edited_and_holds_from_the_next_trial_on_is_named_while_one_runs():
    begun = settle(FRESH)
    plan = settle(replace(FRESH, status=begun.status, waiting=("gate.significance", "training.seed")))
    message = condition(plan, api.ROUND_PROGRESSING).message
    assert message.endswith(
        "Edited since round 0 began, in force from the next trial on: gate.significance, training.seed;"
        " `cowest rollback` ends this one and `cowest resume` begins it anew at once."
    )
    assert condition(begun, api.ROUND_PROGRESSING).reason == condition(plan, api.ROUND_PROGRESSING).reason
    many = settle(replace(CANARY_WORLD, waiting=tuple(f"gate.f{i}" for i in range(9))))
    message = condition(many, api.ROUND_PROGRESSING).message
    assert message.endswith("gate.f4, gate.f5 and 3 more; `cowest rollback` ends this one.")


def test_without_a_trial_no_edit_waits():
    idle = w.world(job=w.job(rounds={"max": 0}), waiting=("gate.significance",))
    assert "gate.significance" not in condition(settle(idle), api.ROUND_PROGRESSING).message


def done(metrics, digest="sha256:out"):
    return api.StepState("Succeeded", 0, 1, "", metrics, digest)


def test_after_the_model_the_baseline_is_evaluated_against_solo():
    world = replace(FRESH, steps={"r0-sft": done({}, "sha256:candidate")})
    plan = settle(world)
    assert steps(plan) == ["r0-evaluate"]
    assert ("--control", "solo") in plan.steps[0].args
    assert plan.status.candidate.pair == replace(w.CANDIDATE, weak_uri="file:///store/runs/r0/sft")


def test_the_reason_says_which_step_a_round_is_at_and_each_finished_step_changes_it():
    fresh = settle(FRESH)
    evaluating = settle(replace(FRESH, status=fresh.status, steps={"r0-sft": done({}, "sha256:candidate")}))
    over = {"r0-evaluate": done({})}
    judging = settle(replace(FRESH, status=evaluating.status, steps=over))
    seen = [condition(plan, api.ROUND_PROGRESSING).reason for plan in (fresh, evaluating, judging)]
    assert seen == ["SupervisedTuning", "Evaluating", "Judging"]


def test_every_step_has_a_reason_of_its_own():
    trials = (w.trial(origin=origin) for origin in ("Baseline", "Round", "Proposal", "Edit", "Revalidation"))
    routed = w.job(collaboration={"shortcuts": Shortcuts(strong_alone=RouteLimits(0.01, 10))})
    chains = [rounds.chain(replace(FRESH, job=routed, status=w.on_trial()), trial) for trial in trials]
    unchecked = rounds.chain(FRESH, w.trial(origin="Baseline", number=1))
    names = {step.name.partition("-")[2] for chain in (*chains, unchecked) for step in chain}
    assert names - {"check"} == api.REASONS_OF_STEPS.keys() - {"check"}
    assert len(set(api.REASONS_OF_STEPS.values())) == len(api.REASONS_OF_STEPS)


def evaluated(origin="Round", **changes):
    parts = {"Round": w.PREPARED, "Baseline": {"sft": {}, "evaluate": {}}, "Proposal": {"publish": {}, "evaluate": {}}}
    parts["Edit"] = parts["Revalidation"] = {"evaluate": {}}
    return w.on_trial(origin=origin, done=parts[origin], **changes)


BASELINE = replace(evaluated("Baseline", number=0), stable=None, serving="StrongAlone", evaluator=None)


def test_a_baseline_below_the_gate_becomes_stable_while_the_strong_answers_alone():
    seen = w.report(control="solo", against_control=w.comparison(-0.1, 1.0))
    plan = reconcile.plan(w.world(status=BASELINE, report=seen))
    assert plan.status.stable == w.CANDIDATE
    assert plan.status.serving == "StrongAlone"
    assert plan.status.rounds[-1].decision == "Refused"
    assert condition(plan, api.READY).status == "True"
    assert condition(plan, api.DRAFTS_HELP).status == "False"


def test_when_drafts_hurt_serve_serves_the_refused_baseline():
    seen = w.report(control="solo", against_control=w.comparison(-0.1, 1.0))
    job = w.job(collaboration={"when_drafts_hurt": "Serve"})
    assert reconcile.plan(w.world(status=BASELINE, report=seen, job=job)).status.serving == "Pair"


def test_a_baseline_that_passes_goes_to_canary_against_the_strong_alone():
    server = {w.CANDIDATE.weak_digest: api.ServerState(True, "http://weak/v1")}
    plan = settle(w.world(status=BASELINE, report=w.report(control="solo"), servers=server))
    assert [(a.name, a.weight_percent, a.mode) for a in plan.routing.arms] == [
        ("stable", 90, "StrongAlone"),
        ("candidate", 10, "Pair"),
    ]
    assert steps(plan) == ["r0-live-0"]
    assert ("--control", "solo") in plan.steps[0].args


def test_a_round_runs_its_steps_in_order_from_the_stable_model():
    seen = []
    world = w.world()
    for name, metrics in (("collect", {}), ("feedback", {"pairs": 300}), ("dpo", {})):
        plan = settle(world)
        seen += steps(plan)
        world = replace(world, status=plan.status, steps={f"r1-{name}": done(metrics, "sha256:candidate")})
    plan = settle(world)
    assert [*seen, *steps(plan)] == ["r1-collect", "r1-feedback", "r1-dpo", "r1-evaluate"]
    assert plan.status.candidate.pair.weak_digest == "sha256:candidate"
    assert plan.steps[0].calls_strong


def test_the_reference_of_a_round_is_the_model_at_its_start():
    world = w.world(status=w.on_trial(pair=None, done={"collect": {"digest": "d"}, "feedback": {"pairs": 99}}))
    dpo = settle(world).steps[0]
    assert ("--model", w.STABLE.weak_uri) in dpo.args


@pytest.mark.parametrize(("percent", "given"), [(20, ["runs/r2/feedback"]), (0, [])])
def test_what_earlier_rounds_learnt_from_is_given_where_it_is_to_be_learnt_again(percent: int, given: list[str]):
    origins = enumerate(("Baseline", "Edit", "Round"))
    past = tuple(api.Outcome(n, origin, "Refused", "", "", "sha256:x", 0.0, 1.0) for n, origin in origins)
    status = replace(w.on_trial(pair=None, done={"collect": {}, "feedback": {"pairs": 99}}), rounds=past)
    job = w.job(training={"preference": replace(w.SPEC.training.preference, replay_percent=percent)})
    world = w.world(job=job, status=status)
    dpo = settle(world).steps[0]
    assert [uri for flag, uri in dpo.args if flag == "--replay"] == [f"{world.store}/{path}" for path in given]


def test_too_few_pairs_end_the_round():
    world = w.world(
        status=w.on_trial(pair=None, done={"collect": {"digest": "d"}}), steps={"r1-feedback": done({"pairs": 49})}
    )
    outcome = reconcile.plan(world).status.rounds[-1]
    assert (outcome.decision, outcome.reason) == ("Refused", api.REASON_TOO_FEW_PAIRS)


def test_too_few_pairs_are_explained_by_where_the_queries_went():
    metrics = {"pairs": 3, "queries": 60, "equal_drafts": 7, "ties": 40, "below_margin": 0}
    world = w.world(
        status=w.on_trial(pair=None, done={"collect": {"digest": "d"}}), steps={"r1-feedback": done(metrics)}
    )
    said = reconcile.plan(world).status.rounds[-1].message
    assert "3 usable pairs" in said
    assert "of 60 queries 7 drew the same draft each time, 40 have drafts whose answers score alike" in said


def test_a_tuning_that_left_out_most_pairs_ends_the_round_too():
    steps_ = {"r1-dpo": done({"pairs": 5, "dropped": {"longer than maxLength": 95}})}
    status = w.on_trial(pair=None, done={"collect": {"digest": "d"}, "feedback": {"pairs": 100}})
    outcome = reconcile.plan(w.world(status=status, steps=steps_)).status.rounds[-1]
    assert (outcome.decision, outcome.reason) == ("Refused", api.REASON_TOO_FEW_PAIRS)
    assert "5 usable pairs" in outcome.message and "95 longer than maxLength" in outcome.message


def test_what_the_tuning_gave_alarm_for_stands_in_the_rounds_note():
    alarm = "Chosen drafts are 2.00 times as long as rejected ones."
    steps_ = {"r1-dpo": done({"pairs": 100, "alarms": [alarm]})}
    begun = w.on_trial(pair=None, done={"collect": {"digest": "d"}, "feedback": {"pairs": 100}})
    tuned = reconcile.plan(w.world(status=begun, steps=steps_)).status.candidate
    judged = evaluated()
    judged = replace(judged, candidate=replace(judged.candidate, done={**judged.candidate.done, **tuned.done}))
    assert alarm in settle(w.world(status=judged, report=w.report())).status.candidate.note


HELD_BACK = "250 of 625 traces are quarantined: 250 beyond one user's share; `cowest quarantine` shows them."


def test_traces_in_quarantine_are_told_as_soon_as_the_data_are_frozen():
    steps_ = {"r1-collect": done({"rows": 400, "alarms": [HELD_BACK]})}
    plan = reconcile.plan(w.world(status=w.on_trial(pair=None, done={}), steps=steps_))
    assert api.Event("Warning", api.REASON_QUARANTINED, f"round 1: {HELD_BACK}") in plan.events
    judged = evaluated()
    judged = replace(
        judged, candidate=replace(judged.candidate, done={**judged.candidate.done, **plan.status.candidate.done})
    )
    assert HELD_BACK in settle(w.world(status=judged, report=w.report())).status.candidate.note


def test_a_round_without_enough_pairs_says_what_lies_in_quarantine():
    collected = {"collect": {"digest": "d", "alarms": [HELD_BACK]}}
    status = w.on_trial(pair=None, done=collected)
    outcome = reconcile.plan(w.world(status=status, steps={"r1-feedback": done({"pairs": 49})})).status.rounds[-1]
    assert outcome.reason == api.REASON_TOO_FEW_PAIRS and outcome.message.endswith(HELD_BACK)


ONE, OTHER = {"first": ["fp_1"], "last": ["fp_1"], "change": ""}, {"first": ["fp_2"], "last": ["fp_2"], "change": ""}
SWAPPED = {"first": ["fp_1"], "last": ["fp_2"], "change": "fp_1 for 40 answers, then fp_2"}


def test_a_strong_model_that_changes_while_it_is_asked_ends_the_round_and_is_measured_anew():
    status = w.on_trial(pair=None, done={"collect": {"digest": "d"}})
    plan = reconcile.plan(w.world(status=status, steps={"r1-feedback": done({"pairs": 99, "strong": SWAPPED})}))
    outcome = plan.status.rounds[-1]
    assert (outcome.decision, outcome.reason) == ("Refused", api.REASON_STRONG_CHANGED)
    assert "in the middle of the round (fp_1 for 40 answers, then fp_2)" in outcome.message
    assert [event.type for event in plan.events if event.reason == api.REASON_STRONG_CHANGED] == ["Warning"]
    anew = settle(w.world(status=plan.status))
    assert anew.status.candidate.origin == "Revalidation"
    assert ("--generation", "1") in anew.steps[0].args, "what it answered before is not taken for its answer"


def test_a_strong_model_that_changes_between_two_steps_is_noticed_too():
    begun = {
        "collect": {"digest": "d"},
        "feedback": {"pairs": 99, "strong": ONE},
        "dpo": {"digest": "sha256:candidate"},
    }
    world = w.world(status=w.on_trial(done=begun), steps={"r1-evaluate": done({"strong": OTHER})}, report=w.report())
    outcome = settle(world).status.rounds[-1]
    assert (outcome.decision, outcome.reason) == ("Refused", api.REASON_STRONG_CHANGED)
    assert "between two steps of the round (fp_1 before, fp_2 now)" in outcome.message


def test_a_strong_model_that_stays_ends_no_round():
    begun = {
        "collect": {"digest": "d"},
        "feedback": {"pairs": 99, "strong": ONE},
        "dpo": {"digest": "sha256:candidate"},
    }
    world = w.world(status=w.on_trial(done=begun), steps={"r1-evaluate": done({"strong": ONE})}, report=w.report())
    assert settle(world).status.candidate.stage == "Canary"


def test_answers_of_before_that_a_gate_finds_are_asked_again():
    seen = w.report(strong_versions={"candidate": {"fp_2": 100}, "control": {"fp_1": 100}})
    plan = reconcile.plan(w.world(status=evaluated(), report=seen))
    assert plan.status.rounds[-1].reason == api.REASON_STRONG_CHANGED
    assert (plan.status.strong_generation, plan.status.evaluator) == (1, None)


def test_a_candidate_that_gains_goes_to_canary_with_its_server():
    plan = settle(w.world(status=evaluated(), report=w.report()))
    assert plan.status.candidate.stage == "Canary"
    assert {s.digest for s in plan.servers} == {w.STABLE.weak_digest, w.CANDIDATE.weak_digest}
    assert [a.weight_percent for a in plan.routing.arms] == [100], "no weight before the server answers"


def test_a_candidate_without_gain_is_refused_and_counts_as_a_look():
    plan = reconcile.plan(w.world(status=evaluated(), report=w.report(against_control=w.comparison(0.0, 0.6))))
    assert plan.status.rounds[-1].reason == api.REASON_NO_GAIN_OFFLINE
    assert plan.status.stable == w.STABLE
    assert (plan.status.looks, plan.status.without_gain, plan.status.tuned_rounds) == (1, 1, 1)


UP = {p.weak_digest: api.ServerState(True, "http://weak/v1") for p in (w.STABLE, w.CANDIDATE)}
NO_CANARY = w.job(canary={"steps": ()}, rounds={"max": 0})


def test_without_canary_steps_the_gate_promotes_once_the_server_answers():
    held = settle(w.world(status=evaluated(), report=w.report(), job=NO_CANARY))
    assert (held.status.stable, steps(held)) == (w.STABLE, [])
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_WAITING_FOR_SERVER
    assert {s.digest for s in held.servers} == {w.STABLE.weak_digest, w.CANDIDATE.weak_digest}
    promoted = settle(w.world(status=held.status, job=NO_CANARY, servers=UP)).status
    assert promoted.stable == w.CANDIDATE
    assert promoted.rounds[-1].reason == api.REASON_PROMOTED_OFFLINE


def test_without_canary_steps_a_server_that_never_comes_ends_the_trial():
    held = settle(w.world(status=evaluated(), report=w.report(), job=NO_CANARY))
    late = w.world(status=held.status, job=NO_CANARY, now=w.NOW + 3601)
    assert reconcile.plan(late).status.rounds[-1].reason == api.REASON_SERVER_NOT_READY


def test_without_canary_steps_a_declared_watch_is_kept_all_the_same():
    job = w.job(canary={"steps": (), "watch_seconds": 60})
    plan = settle(w.world(status=evaluated(), report=w.report(), job=job, servers=UP))
    assert plan.status.candidate.stage == "Watch"
    assert [a.weight_percent for a in plan.routing.arms] == [0, 100]


CANARY_WORLD = w.world(
    status=w.on_trial(stage="Canary", done=w.PREPARED),
    servers={p.weak_digest: api.ServerState(True, "http://weak/v1") for p in (w.STABLE, w.CANDIDATE)},
)


def test_a_passed_canary_step_raises_the_weight():
    plan = settle(replace(CANARY_WORLD, live=w.live()))
    assert plan.status.candidate.step == 1
    assert [a.weight_percent for a in plan.routing.arms] == [50, 50]
    assert steps(plan) == ["r1-live-1"]


LAST = replace(CANARY_WORLD, status=w.on_trial(stage="Canary", done=w.PREPARED, step=1), live=w.live(120, 120, step=1))


def test_the_last_step_promotes_and_remembers_the_pair_before():
    plan = reconcile.plan(LAST)
    assert (plan.status.stable, plan.status.previous, plan.status.serving) == (w.CANDIDATE, w.STABLE, "Pair")
    assert plan.status.rounds[-1].decision == "Promoted"
    assert [s.digest for s in plan.servers] == [w.CANDIDATE.weak_digest]


def test_manual_approval_holds_the_last_step_until_a_person_says_so():
    manual = replace(LAST, job=w.job(canary={"approval": "Manual"}))
    held = reconcile.plan(manual)
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_AWAITING_APPROVAL
    assert held.status.candidate is not None
    first = reconcile.plan(replace(manual, actions=(action("approve"),)))
    second = reconcile.plan(replace(manual, status=first.status))
    assert second.status.stable == w.CANDIDATE


def test_the_watch_gives_all_the_traffic_and_keeps_the_old_pair_warm():
    plan = settle(replace(LAST, job=w.job(canary={"watch_seconds": 60})))
    assert plan.status.candidate.stage == "Watch"
    assert [a.weight_percent for a in plan.routing.arms] == [0, 100]
    assert len(plan.servers) == 2


def test_the_watch_reads_on_where_the_control_still_answered():
    plan = settle(replace(LAST, job=w.job(canary={"watch_seconds": 60})))
    trial = plan.status.candidate
    assert trial.entered == {"answers": 120, "errors": 0, "scored": 120}
    assert dict(plan.steps[0].args)["--since"] == repr(LAST.status.candidate.step_since)
    replayed = settle(replace(LAST, job=w.job(canary={"watch_seconds": 60, "signal": "ShadowReplay"})))
    assert dict(replayed.steps[0].args)["--since"] == repr(w.NOW), "both arms are asked in the watch itself"


def test_a_loss_that_only_the_watch_shows_is_rolled_back_and_each_look_is_counted():
    job = w.job(canary={"watch_seconds": 600})
    watch = replace(LAST, job=job, status=settle(replace(LAST, job=job)).status)
    looked = settle(replace(watch, live=w.live(220, 120, step=2)))
    assert looked.status.candidate.looks == 1
    lost = w.live(330, 120, step=2, comparison=w.comparison(-0.2, 1.0, 1e-4))
    plan = reconcile.plan(replace(watch, status=looked.status, live=lost))
    row = plan.status.rounds[-1]
    assert (row.decision, row.reason, row.live_answers) == ("RolledBack", api.REASON_WORSE_LIVE, 330)
    assert plan.status.stable == w.STABLE


def test_time_that_a_person_holds_a_canary_is_no_part_of_its_deadline():
    paused = reconcile.plan(replace(CANARY_WORLD, actions=(action("pause"),))).status
    again = replace(CANARY_WORLD, status=paused, now=w.NOW + 9000)
    twice = reconcile.plan(replace(again, actions=(action("pause", "2"),))).status
    resumed = reconcile.plan(replace(again, status=twice, actions=(action("resume", "3"),))).status
    assert resumed.candidate.away == 9000
    on_time = replace(CANARY_WORLD, status=resumed, now=w.NOW + 9000 + 3549)
    assert reconcile.plan(on_time).status.candidate is not None
    late = reconcile.plan(replace(on_time, now=w.NOW + 9000 + 3551)).status
    assert late.rounds[-1].reason == api.REASON_TOO_FEW_ANSWERS


def test_a_bad_canary_is_rolled_back_and_the_stable_pair_goes_on():
    plan = reconcile.plan(replace(CANARY_WORLD, live=w.live(comparison=w.comparison(-0.4, 1.0, 1e-5))))
    assert plan.status.rounds[-1].decision == "RolledBack"
    assert plan.status.stable == w.STABLE
    assert [(a.name, a.weight_percent) for a in plan.routing.arms] == [("stable", 100)]


def action(verb, id_="1", model=None):
    return api.Action(id_, verb, "ada", "because", w.NOW, model)


def test_a_persons_rollback_is_never_undone_by_the_automatic_actor():
    plan = reconcile.plan(replace(CANARY_WORLD, actions=(action("rollback"),)))
    assert plan.status.rounds[-1].reason == api.REASON_ROLLED_BACK_BY_PERSON
    assert plan.status.rounds[-1].by == "ada"
    again = replace(plan.status, candidate=w.trial(done=w.PREPARED))
    refused = reconcile.plan(w.world(status=again, report=w.report()))
    assert refused.status.rounds[-1].reason == api.REASON_VETOED


def test_a_person_promotes_a_candidate_in_canary():
    plan = reconcile.plan(replace(CANARY_WORLD, actions=(action("promote"),)))
    assert plan.status.stable == w.CANDIDATE
    assert plan.status.rounds[-1].reason == api.REASON_PROMOTED_BY_PERSON


PROMOTED = replace(
    w.SERVED, stable=w.CANDIDATE, stable_round=1, previous=w.STABLE, previous_serving="Pair", previous_round=0,
    rounds=(api.Outcome(1, "Round", "Promoted", api.REASON_PROMOTED, "better", w.CANDIDATE.digest, 1.0, 2.0),),
)  # fmt: skip


def test_a_rollback_without_a_trial_goes_back_to_the_pair_before():
    plan = reconcile.plan(w.world(status=PROMOTED, actions=(action("rollback"),), servers=UP))
    assert plan.status.stable == w.STABLE
    assert w.CANDIDATE.digest in plan.status.vetoed
    row = plan.status.rounds[-1]
    assert (row.decision, row.reason, row.by) == ("RolledBack", api.REASON_ROLLED_BACK_BY_PERSON, "ada")
    assert row.message == "because; before that Promoted (BetterOfflineAndLive): better"


def test_a_rollback_waits_for_the_server_of_the_pair_before():
    job = w.job(rounds={"max": 0})
    down = {w.CANDIDATE.weak_digest: UP[w.CANDIDATE.weak_digest]}
    held = settle(w.world(status=PROMOTED, actions=(action("rollback"),), servers=down, job=job))
    assert [(arm.weight_percent, arm.mode) for arm in held.routing.arms] == [(100, "StrongAlone")], (
        "nor answers it more"
    )
    assert "the strong model answers alone" in condition(held, api.READY).message
    assert condition(held, api.READY).reason == api.REASON_STRONG_ALONE
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_WAITING_FOR_SERVER
    assert {s.digest for s in held.servers} == {w.STABLE.weak_digest, w.CANDIDATE.weak_digest}
    back = settle(w.world(status=held.status, servers=UP, job=job))
    assert (back.status.stable, back.status.going_back) == (w.STABLE, None)
    assert back.status.rounds[-1].by == "ada"


def test_a_pause_holds_canary_and_rounds_until_resume():
    paused = reconcile.plan(replace(CANARY_WORLD, actions=(action("pause"),), live=w.live()))
    held = reconcile.plan(replace(CANARY_WORLD, status=paused.status, live=w.live()))
    assert held.status.candidate.step == 0
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_PAUSED
    resumed = reconcile.plan(replace(CANARY_WORLD, status=paused.status, actions=(action("resume", "2"),)))
    assert resumed.status.paused_by is None


def test_an_action_is_taken_in_once():
    first = reconcile.plan(w.world(actions=(action("pause"),)))
    second = reconcile.plan(w.world(status=replace(first.status, paused_by=None), actions=(action("pause"),)))
    assert second.status.paused_by is None


def test_a_proposal_is_imported_and_gated_before_the_next_round():
    plan = settle(w.world(actions=(action("propose", model="file:///other"),)), most=20)
    assert steps(plan) == ["r1-publish"]
    assert ("--model", "file:///other") in plan.steps[0].args
    assert plan.status.candidate.by == "ada"


@pytest.mark.parametrize(
    ("job", "first"),
    [
        pytest.param(
            w.job(collaboration={"prompts": replace(w.PROMPTS, solo="Q: {query}")}), "r1-evaluate", id="prompts"
        ),
        pytest.param(w.job(collaboration={"draft": "Answer"}), "r1-evaluate", id="draft form"),
        pytest.param(w.job(strong={"model": "strong-2"}), "r1-evaluate", id="strong model"),
        pytest.param(w.job(weak={"model": "file:///other"}), "r1-sft", id="base model"),
    ],
)
def test_an_edit_of_the_pair_is_a_candidate_and_the_old_values_serve(job, first):
    plan = settle(w.world(job=job))
    assert steps(plan) == [first]
    assert plan.status.candidate.origin == "Edit"
    assert plan.routing.arms[0].pair == w.STABLE


def test_a_refused_edit_is_not_tried_again():
    job = w.job(collaboration={"draft": "Answer"}, rounds={"max": 0})
    edited = replace(w.STABLE, draft="Answer")
    status = evaluated("Edit", pair=edited)
    seen = w.report(candidate=edited.digest, against_control=w.comparison(0.0, 0.5))
    plan = reconcile.plan(w.world(job=job, status=status, report=seen))
    after = settle(w.world(job=job, status=plan.status, servers=UP))
    assert after.status.candidate is None
    assert (
        "not served: it was tried and not promoted (round 1, NoMeasurableGain)" in condition(after, api.READY).message
    )
    withdrawn = replace(plan.status.rounds[-1], number=2, reason=api.REASON_EDIT_WITHDRAWN)  # of another edit since
    later = replace(plan.status, rounds=(*plan.status.rounds, withdrawn))
    assert (
        "(round 1, NoMeasurableGain)"
        in condition(settle(w.world(job=job, status=later, servers=UP)), api.READY).message
    )
    back = settle(w.world(job=w.job(rounds={"max": 0}), status=plan.status, servers=UP))
    assert condition(back, api.READY).message == "the pair of round 0 answers."


@pytest.mark.parametrize(
    ("difference", "reason"), [(0.02, api.REASON_PROMOTED), (-0.014, api.REASON_PROMOTED_NOT_WORSE)]
)
def test_a_candidate_that_is_only_not_worse_live_is_not_called_better(difference, reason):
    seen = w.live(120, 120, step=1, comparison=w.comparison(difference, 0.6, 0.4, n=120))
    ended = settle(replace(LAST, live=seen)).status.rounds[-1]
    assert (ended.decision, ended.reason) == ("Promoted", reason)
    job = w.job(canary={"watch_seconds": 60})
    watched = settle(replace(LAST, job=job, live=seen)).status
    ended = settle(replace(LAST, job=job, status=watched, live=None, now=w.NOW + 61)).status.rounds[-1]
    assert (ended.decision, ended.reason) == ("Promoted", reason), "after a watch as well"


def test_another_address_of_the_same_strong_model_applies_at_once():
    plan = settle(w.world(job=w.job(strong={"endpoint": "http://elsewhere/v1"}, rounds={"max": 0})))
    assert plan.status.candidate is None
    assert plan.routing.arms[0].pair.strong_endpoint == "http://elsewhere/v1"


def test_a_pair_that_has_moved_is_asked_there_also_once_the_manifest_names_another_strong_model():
    moved = {"endpoint": "http://elsewhere/v1"}
    status = settle(w.world(job=w.job(strong=moved, rounds={"max": 0}))).status
    plan = settle(w.world(status=status, job=w.job(strong={**moved, "model": "strong-2"}), servers=UP))
    (evaluation,) = plan.steps
    files = dict(evaluation.files)
    assert [files[arm]["strongModel"] for arm in ("--candidate", "--control")] == ["strong-2", "strong-1"]
    assert {files[arm]["strongEndpoint"] for arm in files} == {"http://elsewhere/v1"}
    assert plan.routing.arms[0].pair.strong_endpoint == "http://elsewhere/v1"


def test_a_changed_evaluator_measures_the_stable_pair_again():
    plan = settle(w.world(evaluator="sha256:new"))
    assert (plan.status.candidate.origin, steps(plan)) == ("Revalidation", ["r1-evaluate"])
    status = evaluated("Revalidation", pair=w.STABLE)
    worse = w.report(candidate=w.STABLE.digest, control="solo", against_solo=w.comparison(-0.1, 1.0, 1e-4))
    after = reconcile.plan(w.world(status=status, report=worse, evaluator="sha256:new")).status
    assert (after.serving, after.evaluator, after.stable) == ("StrongAlone", "sha256:new", w.STABLE)


BESIDE_PEOPLE = w.job(feedback={"evaluator": Evaluator("Judge", calibration=Calibration("file:///labels", 0.5))})


def beside_people(low):
    return CalibrationReport(200, 0.9, 0.8, 0.95, 0.7, low, 0.9, 3, 0, 0.0, "sha256:labels")


@pytest.mark.parametrize(("low", "stage"), [(0.5, "Canary"), (0.4, None)])
def test_an_evaluator_that_does_not_agree_with_people_promotes_nothing_and_its_numbers_stand(low, stage):
    seen = w.report(calibration=beside_people(low))
    status = reconcile.plan(w.world(status=evaluated(), report=seen, job=BESIDE_PEOPLE)).status
    assert (status.candidate and status.candidate.stage) == stage
    if stage is None:
        outcome = status.rounds[-1]
        assert (outcome.reason, outcome.difference, outcome.score) == (api.REASON_NOT_CALIBRATED, 0.1, 0.7)


@pytest.mark.parametrize(("low", "serving"), [(0.5, "StrongAlone"), (0.4, "Pair")])
def test_an_evaluator_that_does_not_agree_with_people_stops_nothing_that_is_served(low, serving):
    status = evaluated("Revalidation", pair=w.STABLE)
    worse = w.report(candidate=w.STABLE.digest, control="solo", against_solo=w.comparison(-0.1, 1.0, 1e-4))
    seen = replace(worse, calibration=beside_people(low))
    after = reconcile.plan(w.world(status=status, report=seen, job=BESIDE_PEOPLE, evaluator="sha256:new")).status
    assert after.serving == serving
    assert ("That stops nothing" in after.rounds[-1].message) == (serving == "Pair")


@pytest.mark.parametrize(
    ("world", "reason", "final"),
    [
        pytest.param(w.world(job=w.job(rounds={"max": 0})), api.REASON_MAX_ROUNDS, True, id="all rounds over"),
        pytest.param(w.world(status=replace(w.SERVED, without_gain=2)), api.REASON_NO_GAIN, True, id="no gain twice"),
        pytest.param(w.world(job=w.job(suspend=True)), api.REASON_SUSPENDED, True, id="suspended"),
        pytest.param(
            w.world(job=w.job(rounds={"trigger": api.Trigger(10)}), traces=api.TraceCounts(50, 9)),
            api.REASON_WAITING_FOR_TRACES,
            False,
            id="one usable trace short",
        ),
        pytest.param(
            w.world(
                job=w.job(rounds={"cooldown_seconds": 60}),
                status=replace(w.SERVED, tuned_rounds=1, last_round_ended=w.NOW - 59),
            ),
            api.REASON_COOLDOWN,
            False,
            id="cooldown",
        ),
    ],
)
def test_no_round_is_due(world, reason, final):
    plan = settle(world)
    assert plan.status.candidate is None
    assert condition(plan, api.ROUND_PROGRESSING).reason == reason
    assert (plan.finished is not None) == final


@pytest.mark.parametrize(
    ("state", "fails"),
    [
        pytest.param(api.StepState("Failed", 75, 1, "endpoint down"), False, id="worth a retry"),
        pytest.param(api.StepState("Failed", 75, 3, "endpoint down"), True, id="retried enough"),
        pytest.param(api.StepState("Failed", 2, 1, "bad row"), True, id="bad input"),
        pytest.param(api.StepState("Failed", 76, 1, "budget"), True, id="budget spent"),
    ],
)
def test_a_failed_step(state, fails):
    world = w.world(status=w.on_trial(pair=None), steps={"r1-collect": state})
    plan = reconcile.plan(world)
    assert (plan.failure is not None) == fails
    assert plan.status.candidate is not None, "the round goes on from here after a rerun"


def test_nothing_is_written_when_nothing_changed():
    first = settle(w.world(job=w.job(rounds={"max": 0})))
    again = reconcile.plan(w.world(job=w.job(rounds={"max": 0}), status=first.status, now=w.NOW + 500))
    assert again.status == first.status


# ---------------------------------------------------------------- whether users are answered
@pytest.mark.parametrize(
    ("status", "fails", "ready"),
    [
        pytest.param(w.SERVED, "Fail", "False", id="the pair, and a draft may not stand in"),
        pytest.param(w.SERVED, "WeakAlone", "True", id="the draft stands in"),
        pytest.param(replace(w.SERVED, serving="StrongAlone"), "WeakAlone", "False", id="there is no draft"),
        pytest.param(api.Status(), "WeakAlone", "False", id="there is no weak model yet"),
    ],
)
def test_ready_is_false_while_every_answer_is_an_error(status, fails, ready):
    trouble = api.Trouble(api.REASON_STRONG_FAILS, "the strong endpoint has failed for users.", of_all_answers=True)
    job = w.job(collaboration={"when_strong_fails": fails})
    seen = condition(reconcile.plan(w.world(status=status, job=job, servers=UP, troubles=(trouble,))), api.READY)
    assert seen.status == ready
    assert (seen.reason, seen.message) == (trouble.reason, trouble.message) or ready == "True"


# ---------------------------------------------------------------- pauses
def test_a_pause_holds_after_the_running_step():
    status = replace(w.on_trial(pair=None), paused_by="ada")
    plan = reconcile.plan(w.world(status=status, steps={"r1-collect": done({})}))
    assert (list(plan.status.candidate.done), steps(plan)) == (["collect"], [])
    assert condition(settle(w.world(status=plan.status)), api.ROUND_PROGRESSING).reason == api.REASON_PAUSED


def test_a_running_step_goes_on_while_paused():
    status = replace(w.on_trial(pair=None), paused_by="ada")
    plan = reconcile.plan(w.world(status=status, steps={"r1-collect": api.StepState("Running")}))
    assert steps(plan) == ["r1-collect"]


def test_a_pause_that_is_to_act_now_stops_the_step_and_resume_begins_it_again():
    world = w.world(status=w.on_trial(pair=None), steps={"r1-collect": api.StepState("Running")})
    now = replace(action("pause"), now=True)
    stopped = reconcile.plan(replace(world, actions=(now,)))
    assert steps(stopped) == []
    held = reconcile.plan(replace(world, status=stopped.status, steps={}))
    seen = condition(held, api.ROUND_PROGRESSING)
    assert (steps(held), seen.reason) == ([], api.REASON_PAUSED)
    assert seen.message == "paused by ada; step r1-collect does not run until `cowest resume`."
    again = reconcile.plan(replace(world, status=held.status, steps={}, actions=(action("resume", "2"),)))
    assert steps(again) == ["r1-collect"]


def test_what_a_step_has_done_before_it_is_stopped_counts():
    status = replace(w.on_trial(pair=None), paused_by="ada", paused_now=True)
    plan = reconcile.plan(w.world(status=status, steps={"r1-collect": done({})}))
    assert (list(plan.status.candidate.done), steps(plan)) == (["collect"], [])


def test_a_pause_that_is_to_act_now_stops_the_watcher_of_a_canary_and_no_server():
    plan = reconcile.plan(replace(CANARY_WORLD, actions=(replace(action("pause"), now=True),)))
    assert steps(plan) == []
    assert {server.digest for server in plan.servers} == {w.STABLE.weak_digest, w.CANDIDATE.weak_digest}


def test_a_pause_now_after_a_pause_stops_what_that_one_let_run():
    status = replace(w.on_trial(pair=None), paused_by="ada")
    world = w.world(status=status, steps={"r1-collect": api.StepState("Running")})
    assert steps(reconcile.plan(replace(world, actions=(replace(action("pause"), now=True),)))) == []


@pytest.mark.parametrize("steps_", [w.SPEC.canary.steps, ()], ids=["canary", "no canary"])
def test_a_pause_holds_the_gate(steps_):
    job = w.job(canary={"steps": steps_})
    plan = settle(w.world(status=replace(evaluated(), paused_by="ada"), report=w.report(), job=job))
    assert plan.status.candidate.stage == "Preparing"
    assert condition(plan, api.ROUND_PROGRESSING).reason == api.REASON_PAUSED


def test_a_suspended_job_prepares_nothing_and_begins_no_canary():
    job = w.job(suspend=True)
    waiting = settle(w.world(job=job, status=w.on_trial(pair=None)))
    assert (steps(waiting), waiting.finished is not None) == ([], True)
    assert settle(w.world(job=job, status=evaluated(), report=w.report())).status.candidate.stage == "Preparing"


def test_manual_approval_holds_also_without_canary_steps():
    job = w.job(canary={"steps": (), "approval": "Manual"})
    held = settle(w.world(status=evaluated(), report=w.report(), job=job))
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_AWAITING_APPROVAL
    assert held.status.looks == 0
    job = w.job(canary={"steps": (), "approval": "Manual"}, rounds={"max": 0})
    told = (action("approve"),)
    approved = settle(w.world(status=held.status, report=w.report(), job=job, actions=told, servers=UP))
    assert approved.status.stable == w.CANDIDATE


# ---------------------------------------------------------------- a manifest that is edited while a trial runs
def test_a_base_model_that_was_wrong_can_be_mended_in_the_manifest():
    started = settle(replace(FRESH, job=w.job(weak={"model": "file:///typo"})))
    mended = settle(replace(FRESH, status=started.status))
    assert ("--model", "file:///base") in mended.steps[0].args


def test_a_base_edited_while_the_baseline_runs_is_an_edit_afterwards():
    status = replace(BASELINE, candidate=replace(BASELINE.candidate, model="file:///base"), base=None)
    seen = w.report(control="solo", against_control=w.comparison(-0.1, 1.0))
    job = w.job(weak={"model": "file:///other"})
    ended = reconcile.plan(w.world(status=status, report=seen, job=job))
    assert ended.status.base == "file:///base"
    following = settle(w.world(status=ended.status, job=job)).status.candidate
    assert (following.origin, following.model) == ("Edit", "file:///other")


EDITED = replace(w.STABLE, draft="Answer")


@pytest.mark.parametrize(
    ("stage", "decision"), [("Preparing", "Refused"), ("Canary", "RolledBack"), ("Watch", "RolledBack")]
)
def test_an_edit_that_the_manifest_takes_back_ends(stage, decision):
    plan = reconcile.plan(w.world(status=w.on_trial(origin="Edit", stage=stage, pair=EDITED)))
    outcome = plan.status.rounds[-1]
    assert (outcome.decision, outcome.reason) == (decision, api.REASON_EDIT_WITHDRAWN)
    again = settle(w.world(status=plan.status, job=w.job(collaboration={"draft": "Answer"})))
    assert again.status.candidate.origin == "Edit", "it may be declared again"


def test_a_refused_edit_does_not_refuse_the_next_one():
    seen = w.report(candidate=EDITED.digest, against_control=w.comparison(0.0, 0.5))
    first = w.job(collaboration={"draft": "Answer"})
    refused = reconcile.plan(w.world(job=first, status=evaluated("Edit", pair=EDITED), report=seen))
    second = settle(w.world(job=w.job(collaboration={"draft": "Knowledge"}), status=refused.status))
    assert second.status.candidate.pair.draft == "Knowledge"


def test_an_edit_of_the_base_keeps_its_chain_when_the_model_is_there():
    job = w.job(weak={"model": "file:///other"})
    plan = settle(w.world(job=job))
    plan = reconcile.plan(w.world(job=job, status=plan.status, steps={"r1-sft": done({}, "sha256:candidate")}))
    assert (steps(plan), plan.status.candidate.pair.weak_digest) == (["r1-evaluate"], "sha256:candidate")
    assert steps(settle(w.world(job=job, status=plan.status))) == ["r1-evaluate"]


def test_an_edit_of_gate_and_canary_is_for_the_next_trial():
    lax = w.job(canary={"steps": (api.CanaryStep(10, 1),), "max_loss_points": 90.0}, gate={"significance": 0.5})
    status = w.on_trial(stage="Canary", done=w.PREPARED, step=1)
    world = replace(CANARY_WORLD, status=status, job=lax, frozen=w.JOB, live=w.live(2, 2, step=1))
    plan = settle(world)
    assert plan.status.candidate.step == 1
    assert plan.routing.arms[1].weight_percent == 50
    judged = w.world(status=evaluated(), report=w.report(against_control=w.comparison(0.1, 0.2)), job=lax, frozen=w.JOB)
    outcome = reconcile.plan(judged).status.rounds[-1]
    assert outcome.reason == api.REASON_NO_GAIN_OFFLINE
    assert "the same score with and without the draft on 860 of 1000 queries." in outcome.message


def test_too_few_pairs_are_too_few_by_the_manifest_that_the_round_began_with():
    status = w.on_trial(pair=None, done={"collect": {"digest": "d"}})
    told = {"r1-feedback": done({"pairs": 40})}
    plan = reconcile.plan(w.world(status=status, steps=told, job=w.job(feedback={"min_pairs": 1}), frozen=w.JOB))
    assert plan.status.rounds[-1].reason == api.REASON_TOO_FEW_PAIRS


def test_fewer_canary_steps_are_no_data_and_never_a_pass():
    status = w.on_trial(stage="Canary", done=w.PREPARED, step=1)
    plan = settle(replace(CANARY_WORLD, status=status, job=w.job(canary={"steps": (api.CanaryStep(10, 50),)})))
    assert plan.status.candidate.step == 1
    assert condition(plan, api.ROUND_PROGRESSING).reason == api.REASON_WAITING_FOR_ANSWERS


def test_who_wants_to_be_asked_is_asked_in_a_canary_that_runs_already():
    held = reconcile.plan(replace(LAST, job=w.job(canary={"approval": "Manual"}), frozen=w.JOB))
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_AWAITING_APPROVAL


def test_looks_count_for_the_held_out_set_that_the_trial_was_measured_on():
    moved = w.job(data={"held_out": "file:///new.jsonl"})
    plan = reconcile.plan(w.world(status=evaluated(), report=w.report(), job=moved, frozen=w.JOB))
    assert plan.status.held_out == "file:///held_out.jsonl"


def test_an_evaluator_edited_in_mid_round_is_measured_afterwards():
    frozen, now = w.JOB, evaluator_digest(Evaluator("TokenF1"))
    job = w.job(feedback={"evaluator": Evaluator("TokenF1")}, canary={"steps": ()})
    status = w.on_trial(done={name: {"digest": "x"} for name in ("collect", "feedback", "dpo")})
    world = w.world(job=job, frozen=frozen, evaluator=now, status=status, servers=UP, report=w.report())
    plan = reconcile.plan(replace(world, steps={"r1-evaluate": done({})}))
    assert plan.status.candidate.evaluator == evaluator_digest(Evaluator("ExactMatch"))
    frozen = w.job(canary={"steps": ()})
    for _ in range(3):
        plan = reconcile.plan(replace(world, status=plan.status, frozen=frozen if plan.status.candidate else None))
    assert plan.status.stable == w.CANDIDATE
    assert settle(w.world(status=plan.status, job=job, evaluator=now)).status.candidate.origin == "Revalidation"


def test_a_gate_keeps_what_its_held_out_set_can_show():
    part = SliceReport("rare", 29, 0.1, 0.0, 0.2)
    plan = reconcile.plan(w.world(status=evaluated(), report=w.report(slices=(part,))))
    assert plan.status.sight == api.Sight(1000, 0.14, {"rare": 29})


def looked_at(status, rows, held_out="file:///held_out.jsonl"):
    """The status after a candidate was judged on these rows at that address."""
    now = w.job(data={"held_out": held_out})
    judged = replace(evaluated(), looks=status.looks, held_out=status.held_out, looked=status.looked)
    return reconcile.plan(w.world(status=judged, job=now, report=w.report(held_out_digest=rows))).status


def test_other_held_out_rows_start_the_count_of_looks_anew():
    status = looked_at(looked_at(w.SERVED, "sha256:a"), "sha256:a")
    assert status.looks == 2
    assert looked_at(status, "sha256:b").looks == 1, "also at the same address"


def test_the_same_held_out_rows_are_looked_at_once_more_wherever_they_lie():
    first = looked_at(w.SERVED, "sha256:a")
    assert looked_at(first, "sha256:a", "file:///copy.jsonl").looks == 2
    elsewhere = looked_at(first, "sha256:b", "file:///b.jsonl")
    assert looked_at(elsewhere, "sha256:a").looks == 2
    assert looked_at(elsewhere, "sha256:a").looked == (api.Looked("sha256:b", 1), api.Looked("sha256:a", 2))


def test_a_status_that_counted_looks_by_address_goes_on_with_them():
    before = replace(w.SERVED, looks=7)
    assert looked_at(before, "sha256:a").looks == 8
    assert looked_at(replace(before, held_out="file:///old.jsonl"), "sha256:a").looks == 1


def test_no_more_held_out_sets_are_remembered_than_a_status_can_hold():
    many = tuple(api.Looked(f"sha256:{i}", 1) for i in range(api.KEEP_LOOKED))
    assert len(looked_at(replace(w.SERVED, looked=many), "sha256:a").looked) == api.KEEP_LOOKED


def test_an_evaluator_edited_in_a_canary_is_measured_afterwards():
    promoted = reconcile.plan(
        replace(
            LAST,
            status=w.on_trial(stage="Canary", done=w.PREPARED, step=1, evaluator="sha256:evaluator"),
            evaluator="sha256:new",
        )
    )
    assert promoted.status.stable == w.CANDIDATE
    assert settle(w.world(status=promoted.status, evaluator="sha256:new")).status.candidate.origin == "Revalidation"


# ---------------------------------------------------------------- people
def test_a_baseline_that_a_person_rolled_back_does_not_serve():
    job = w.job(collaboration={"when_drafts_hurt": "Serve"})
    plan = reconcile.plan(w.world(status=BASELINE, job=job, actions=(action("rollback"),)))
    assert (plan.status.serving, plan.status.stable) == ("StrongAlone", w.CANDIDATE)


def test_a_rollback_of_the_only_pair_goes_back_to_the_strong_alone():
    plan = reconcile.plan(w.world(actions=(action("rollback"),)))
    assert (plan.status.serving, plan.status.vetoed) == ("StrongAlone", (w.STABLE.digest,))
    assert plan.routing.arms[0].mode == "StrongAlone"


def test_a_rollback_of_an_edit_restores_round_and_base_and_does_not_try_it_again():
    job = w.job(weak={"model": "file:///other"}, canary={"steps": ()}, rounds={"max": 0})
    trial = w.trial(origin="Edit", number=4, model="file:///other", done={"sft": {}, "evaluate": {}})
    begun = replace(w.SERVED, candidate=trial, trials=5)
    promoted = settle(w.world(status=begun, report=w.report(), job=job, servers=UP))
    assert (promoted.status.stable_round, promoted.status.base) == (4, "file:///other")
    back = settle(w.world(status=promoted.status, job=job, actions=(action("rollback"),), servers=UP))
    assert (back.status.stable, back.status.stable_round, back.status.base) == (w.STABLE, 0, "file:///base")
    assert back.status.candidate is None
    assert settle(w.world(status=back.status, job=w.job(rounds={"max": 0}))).status.candidate is None


def test_a_person_promotes_a_candidate_that_was_not_judged_yet_when_its_server_answers():
    preparing = w.world(status=w.on_trial(done=w.PREPARED), job=w.job(rounds={"max": 0}))
    held = settle(replace(preparing, actions=(action("promote"),)))
    assert (held.status.stable, steps(held), len(held.servers)) == (w.STABLE, [], 2)
    assert condition(held, api.ROUND_PROGRESSING).reason == api.REASON_WAITING_FOR_SERVER
    row = settle(replace(preparing, status=held.status, servers=UP)).status.rounds[-1]
    assert (row.decision, row.reason, row.by) == ("Promoted", api.REASON_PROMOTED_BY_PERSON, "ada")


def test_a_person_takes_back_a_promotion_that_still_waits():
    preparing = w.world(status=w.on_trial(done=w.PREPARED), job=w.job(rounds={"max": 0}))
    held = settle(replace(preparing, actions=(action("promote"),)))
    back = settle(replace(preparing, status=held.status, actions=(action("rollback", "2"),)))
    assert (back.status.candidate, back.status.rounds[-1].decision) == (None, "RolledBack")


@pytest.mark.parametrize("changed", [{"strong": {"model": "strong-2"}}, {"collaboration": {"draft": "Answer"}}])
def test_a_person_promotes_the_declared_edit_that_was_refused(changed):
    job = w.job(rounds={"max": 0}, **changed)
    edited = rounds.declared_pair(w.world(job=job), w.STABLE.weak_digest, w.STABLE.weak_uri)
    seen = w.report(candidate=edited.digest, against_control=w.comparison(0.0, 0.5))
    world = w.world(job=job, status=evaluated("Edit", pair=edited), report=seen, servers=UP)
    refused = settle(world).status
    assert refused.rounds[-1].decision == "Refused"
    after = settle(replace(world, status=refused, actions=(action("promote"),))).status
    assert (after.stable, after.candidate, after.refused_edit) == (edited, None, None)
    row = after.rounds[-1]
    assert (row.number, row.reason, row.by, row.message) == (2, api.REASON_PROMOTED_BY_PERSON, "ada", "because")


def test_a_refused_edit_that_is_no_longer_declared_cannot_be_promoted():
    refused = replace(w.SERVED, refused_trial=w.trial(origin="Edit", pair=EDITED))
    plan = reconcile.plan(w.world(status=refused, actions=(action("promote"),), servers=UP))
    assert (plan.status.stable, plan.events[0].reason) == (w.STABLE, "PersonIgnored")


HELD = settle(replace(FRESH, status=settle(FRESH).status, actions=(action("rollback"),)))


def test_a_baseline_that_a_person_rolled_back_in_preparation_waits_until_told():
    assert (steps(HELD), HELD.status.candidate) == ([], None)
    assert condition(HELD, api.ROUND_PROGRESSING).reason == api.REASON_ROLLED_BACK_BY_PERSON
    resumed = settle(replace(FRESH, status=HELD.status, actions=(action("resume", "2"),)))
    assert steps(resumed) == ["r1-sft"]
    edited = settle(replace(FRESH, status=HELD.status, job=w.job(weak={"model": "file:///other"})))
    assert edited.status.candidate.origin == "Baseline"


def test_instead_of_such_a_baseline_a_proposal_may_become_the_first_pair():
    job = w.job(canary={"steps": ()}, rounds={"max": 0})
    proposed = (action("propose", "2", model="file:///mine"),)
    plan = settle(replace(FRESH, status=HELD.status, actions=proposed, job=job))
    assert steps(plan) == ["r1-publish"]
    world = replace(FRESH, status=plan.status, servers=UP, job=job, report=w.report(control="solo"))
    pair = replace(w.CANDIDATE, weak_uri="file:///store/runs/r1/publish")
    told = {"r1-publish": done({}, w.CANDIDATE.weak_digest), "r1-evaluate": done({})}
    plan = settle(replace(world, steps=told, report=w.report(candidate=pair.digest, control="solo")))
    assert (plan.status.stable, plan.status.base, plan.status.candidate) == (pair, "file:///base", None)


# ---------------------------------------------------------------- when a round is due
TEN_NEW = w.job(rounds={"trigger": api.Trigger(10)})


@pytest.mark.parametrize(
    ("traces", "seen", "due"),
    [
        pytest.param(api.TraceCounts(900, 500, "", 10), 500, True, id="as many old ones were deleted as came in"),
        pytest.param(api.TraceCounts(900, 900, "", 9), 500, False, id="old ones became usable late"),
        pytest.param(api.TraceCounts(900, 510), 500, True, id="nobody counts them apart, and ten more are there"),
        pytest.param(api.TraceCounts(900, 509), 500, False, id="nine more"),
    ],
)
def test_new_traces_are_those_since_the_last_round(traces, seen, due):
    status = replace(w.SERVED, traces_seen=seen)
    plan = settle(w.world(job=TEN_NEW, status=status, traces=traces))
    assert (plan.status.candidate is not None) == due


def test_deleted_traces_do_not_hide_new_ones():
    fewer = settle(w.world(job=TEN_NEW, status=replace(w.SERVED, traces_seen=500), traces=api.TraceCounts(90, 80)))
    assert fewer.status.traces_seen == 80
    assert settle(w.world(job=TEN_NEW, status=fewer.status, traces=api.TraceCounts(100, 90))).status.candidate


def test_traces_that_were_not_counted_yet_are_not_gone():
    plan = settle(w.world(job=TEN_NEW, status=replace(w.SERVED, traces_seen=500)))
    assert plan.status.traces_seen == 500


def test_a_round_notes_from_when_new_traces_count_and_from_what_it_learns():
    begun = settle(w.world(traces=api.TraceCounts(90, 80))).status
    assert (begun.traces_seen, begun.traces_since, begun.train) == (80, w.NOW, "file:///train.jsonl")


OTHER_ROWS = w.job(data={"train": "file:///more.jsonl"}, rounds={"trigger": api.Trigger(10)})
LEARNT = replace(w.SERVED, train="file:///train.jsonl", without_gain=2, tuned_rounds=1)


def test_an_edit_of_the_training_rows_makes_a_round_due():
    assert settle(w.world(job=w.job(rounds={"max": 3}), status=LEARNT)).status.candidate is None
    begun = settle(w.world(job=OTHER_ROWS, status=LEARNT)).status
    assert (begun.candidate.origin, begun.without_gain, begun.train) == ("Round", 0, "file:///more.jsonl")


def test_all_rounds_over_says_that_the_edited_rows_wait_for_more_of_them():
    plan = settle(w.world(job=OTHER_ROWS, status=replace(LEARNT, tuned_rounds=2)))
    assert plan.finished is not None and "data.train was edited since" in plan.finished


def test_a_status_of_before_takes_the_declared_rows_for_those_that_it_learnt_from():
    assert settle(w.world(status=replace(LEARNT, train=None))).status.train == "file:///train.jsonl"


def test_a_new_base_begins_its_rounds_anew():
    job = w.job(weak={"model": "file:///other"})
    trial = w.trial("Canary", origin="Edit", step=1, model="file:///other", done={"sft": {}, "evaluate": {}})
    tired = replace(w.SERVED, candidate=trial, tuned_rounds=2, without_gain=2, traces_seen=70, last_round_ended=5.0)
    after = reconcile.plan(replace(LAST, job=job, status=tired)).status
    assert (after.stable, after.base) == (w.CANDIDATE, "file:///other")
    assert (after.tuned_rounds, after.without_gain, after.traces_seen, after.last_round_ended) == (0, 0, 0, w.NOW)
    assert settle(w.world(job=job, status=after)).status.candidate.origin == "Round"


# ---------------------------------------------------------------- what answers, and why
@pytest.mark.parametrize(
    ("when_weak_fails", "ready", "words"),
    [("StrongAlone", "True", "the strong model answers alone while the server of round 0 is not ready: no memory"),
     ("Fail", "False", "requests fail, as collaboration.whenWeakFails says, while the server of round 0 is not ready")],
)  # fmt: skip
def test_ready_looks_at_the_server_of_the_pair(when_weak_fails, ready, words):
    job = w.job(collaboration={"when_weak_fails": when_weak_fails}, rounds={"max": 0})
    down = {w.STABLE.weak_digest: api.ServerState(False, "http://weak/v1", message="no memory")}
    seen = condition(settle(w.world(job=job, servers=down)), api.READY)
    assert seen.status == ready and seen.message.startswith(words)
    assert seen.reason != api.REASON_ANSWERING, "or it would be written as slowly as what only says something else"
    assert condition(settle(w.world(job=job, servers=UP)), api.READY).message == "the pair of round 0 answers."
    unknown = condition(settle(w.world(job=job)), api.READY)
    assert unknown.status == "True", "without an address the gateway asks the strong model alone"


def test_in_the_watch_the_candidate_answers():
    plan = settle(replace(LAST, job=w.job(canary={"watch_seconds": 60})))
    assert condition(plan, api.READY).message == "the pair of round 1 answers and is watched."


ALONE = replace(w.SERVED, serving="StrongAlone", standing="NotPassed")
SERVE = {"collaboration": {"when_drafts_hurt": "Serve"}, "rounds": {"max": 0}}


@pytest.mark.parametrize(
    ("status", "mode"),
    [
        pytest.param(ALONE, "Pair", id="not measured to be better"),
        pytest.param(replace(ALONE, vetoed=(w.STABLE.digest,)), "StrongAlone", id="rolled back by a person"),
        pytest.param(replace(ALONE, standing=None), "StrongAlone", id="a status of before, which does not know"),
    ],
)
def test_when_drafts_hurt_edited_by_hand_acts_at_once(status, mode):
    served = settle(w.world(status=status, job=w.job(**SERVE), servers=UP)).status
    assert served.serving == mode
    assert settle(w.world(status=served, job=w.job(rounds={"max": 0}), servers=UP)).status.serving == "StrongAlone"


def test_a_pair_served_in_spite_of_the_gate_is_not_called_a_help():
    plan = settle(w.world(status=ALONE, job=w.job(**SERVE), servers=UP))
    assert condition(plan, api.DRAFTS_HELP).status == "False"


FIRST = replace(
    w.on_trial(origin="Baseline", number=0, stage="Canary", done={"sft": {}, "evaluate": {}}, difference=0.644),
    stable=None,
    serving="StrongAlone",
    evaluator=None,
)


@pytest.mark.parametrize("stage", ["Canary", "Watch"])
def test_a_first_pair_that_passed_the_gate_is_called_measured_while_its_trial_goes_on(stage):
    status = replace(FIRST, candidate=replace(FIRST.candidate, stage=stage))
    job = w.job(canary={"watch_seconds": 600})
    said = condition(reconcile.plan(replace(CANARY_WORLD, status=status, job=job)), api.DRAFTS_HELP)
    assert (said.status, said.reason) == ("Unknown", api.REASON_PROGRESSING)
    assert said.message == (
        f"the pair of round 0 passed the gate with +64.4 points against the strong model alone; its {stage.lower()}"
        " decides."
    )


@pytest.mark.parametrize("serves", [False, True], ids=["the strong model answers alone", "whenDraftsHurt: Serve"])
def test_a_first_pair_that_was_rolled_back_after_the_gate_says_why_and_not_that_the_gate_refused_it(serves):
    live = replace(w.live(84, 200, errors=8), control="solo")
    job = w.job(**SERVE) if serves else w.job(rounds={"max": 0})
    plan = settle(replace(CANARY_WORLD, status=FIRST, live=live, job=job))
    assert (plan.status.stable, plan.status.rounds[-1].decision) == (w.CANDIDATE, "RolledBack")
    said, ready = condition(plan, api.DRAFTS_HELP), condition(plan, api.READY)
    assert (said.status, said.reason) == ("False", api.REASON_TOO_MANY_ERRORS)
    assert "passed the gate, and its trial (round 0) was rolled back: 8 of the candidate's 84" in said.message
    assert ("collaboration.whenDraftsHurt" in said.message) is serves
    assert ("was rolled back: 8 of" in ready.message) is not serves


def test_a_first_pair_that_a_person_rolled_back_is_not_called_no_better():
    plan = reconcile.plan(replace(CANARY_WORLD, status=FIRST, actions=(action("rollback"),)))
    assert condition(plan, api.DRAFTS_HELP).reason == api.REASON_ROLLED_BACK_BY_PERSON


def test_a_pair_that_no_trial_rolled_back_has_not_passed_the_gate():
    row = api.Outcome(0, "Baseline", "Promoted", api.REASON_PROMOTED, "better.", w.STABLE.digest, 0.0, 1.0)
    again = replace(row, number=1, origin="Revalidation", decision="Refused", reason=api.REASON_REVALIDATED)
    for rows in ((row, again), (row,), ()):
        plan = reconcile.plan(w.world(status=replace(ALONE, rounds=rows), job=w.job(rounds={"max": 0})))
        assert condition(plan, api.DRAFTS_HELP).reason == api.REASON_NOT_BETTER_THAN_SOLO


def test_what_answers_stays_while_a_candidate_is_measured_against_it():
    status = replace(ALONE, candidate=w.trial(done={"collect": {}, "feedback": {}, "dpo": {}}), trials=2)
    running = {"r1-evaluate": api.StepState("Running")}
    assert settle(w.world(status=status, job=w.job(**SERVE), steps=running)).status.serving == "StrongAlone"
    assert settle(w.world(status=status, job=w.job(**SERVE))).status.serving == "Pair"


def test_promotions_say_whether_the_gates_or_a_person_chose():
    assert reconcile.plan(LAST).status.standing == "Passed"
    chosen = reconcile.plan(replace(CANARY_WORLD, actions=(action("promote"),)))
    assert chosen.status.standing == "Chosen"
    assert condition(chosen, api.DRAFTS_HELP).reason == api.REASON_PROMOTED_BY_PERSON


def test_a_new_evaluator_does_not_stop_a_pair_that_a_person_chose():
    worse = w.report(candidate=w.STABLE.digest, control="solo", against_solo=w.comparison(-0.1, 1.0, 1e-4))
    for standing, mode in (("Passed", "StrongAlone"), ("Chosen", "Pair")):
        status = replace(evaluated("Revalidation", pair=w.STABLE), standing=standing)
        assert reconcile.plan(w.world(status=status, report=worse)).status.serving == mode


STRONGER = w.job(strong={"model": "strong-2"}, rounds={"max": 0})
BETTER_ALONE = replace(w.STABLE, strong_model="strong-2")


def edit_while_alone(**report):
    seen = w.report(candidate=BETTER_ALONE.digest, control="solo", **report)
    status = replace(ALONE, candidate=w.trial(origin="Edit", pair=BETTER_ALONE, done={"evaluate": {}}), trials=2)
    return w.world(job=STRONGER, status=status, report=seen)


def test_an_edit_of_the_strong_model_holds_while_it_answers_alone_though_drafts_do_not_help_it():
    plan = settle(edit_while_alone(against_control=w.comparison(-0.1, 1.0)))
    assert (plan.status.stable, plan.status.serving) == (BETTER_ALONE, "StrongAlone")
    assert plan.status.rounds[-1].reason == api.REASON_NO_GAIN_OFFLINE
    assert plan.routing.arms[0].pair.strong_model == "strong-2"


def test_drafts_that_help_the_new_strong_model_are_canaried_against_it_alone():
    plan = settle(edit_while_alone())
    assert (plan.status.candidate.stage, plan.routing.arms[0].pair.strong_model) == ("Canary", "strong-2")


def test_a_strong_model_that_does_not_answer_is_not_followed():
    arms = tuple(replace(arm, errors=51) if arm.name == "solo" else arm for arm in w.report().arms)
    plan = settle(edit_while_alone(arms=arms, against_control=w.comparison(-0.1, 1.0)))
    assert plan.status.stable == w.STABLE


def test_an_edit_of_the_strong_model_that_a_served_pair_asks_stays_a_candidate():
    world = edit_while_alone(against_control=w.comparison(-0.1, 1.0))
    served = replace(world.status, serving="Pair", standing="Passed")
    seen = replace(world.report, control=w.STABLE.digest)
    assert settle(replace(world, status=served, report=seen)).status.stable == w.STABLE


def test_an_edit_of_the_solo_prompt_alone_answers_nobody_before_it_has_passed():
    other = replace(w.STABLE, prompts=replace(w.STABLE.prompts, solo="{query} Be brief."))
    job = w.job(rounds={"max": 0}, collaboration={"prompts": other.prompts})
    status = replace(ALONE, candidate=w.trial(origin="Edit", pair=other, done={"evaluate": {}}), trials=2)
    worse = w.report(candidate=other.digest, control="solo", against_control=w.comparison(-0.1, 1.0))
    plan = settle(w.world(job=job, status=status, report=worse))
    assert (plan.status.stable, plan.status.rounds[-1].reason) == (w.STABLE, api.REASON_NO_GAIN_OFFLINE)


def test_who_proposed_did_not_decide():
    status = evaluated("Proposal", by="ada")
    refused = reconcile.plan(w.world(status=status, report=w.report(against_control=w.comparison(0.0, 0.6))))
    assert refused.status.rounds[-1].by is None


@pytest.mark.parametrize(("code", "ends"), [(75, False), (1, True)], ids=["tried again", "for good"])
def test_a_step_that_failed_for_a_reason_of_its_own_says_that_one(code, ends):
    state = api.StepState("Failed", code, 1, "it ran for too long", reason=api.REASON_STEP_DEADLINE)
    plan = reconcile.plan(w.world(status=w.on_trial(), steps={"r1-collect": state}))
    assert condition(plan, api.ROUND_PROGRESSING).reason == api.REASON_STEP_DEADLINE
    assert (plan.failure is not None) == ends and bool(plan.steps) != ends


def test_a_proposal_that_is_no_usable_model_is_refused_and_the_loop_goes_on():
    status = w.on_trial(origin="Proposal", pair=None, model="file:///pickles", by="ada")
    plan = reconcile.plan(
        w.world(status=status, steps={"r1-publish": api.StepState("Failed", 2, 1, "pickled weights")})
    )
    outcome = plan.status.rounds[-1]
    assert (plan.failure, outcome.decision, outcome.reason) == (None, "Refused", api.REASON_STEP_FAILED)
    assert "pickled weights" in outcome.message


@pytest.mark.parametrize(
    ("origin", "step", "is_of_proposal"), [("Proposal", "r1-publish", True), ("Round", "r1-collect", False)]
)
def test_a_step_that_fails_for_good_says_whether_its_trial_can_be_taken_back(origin, step, is_of_proposal):
    status = w.on_trial(origin=origin, pair=None, model="file:///mine")
    failure = reconcile.plan(w.world(status=status, steps={step: api.StepState("Failed", 76, 1, "budget")})).failure
    assert failure is not None and failure.is_of_proposal is is_of_proposal


def test_what_a_person_proposes_again_is_judged_in_spite_of_a_veto():
    status = replace(evaluated("Proposal"), vetoed=(w.CANDIDATE.digest,))
    assert reconcile.plan(w.world(status=status, report=w.report())).status.candidate.stage == "Canary"


def test_a_revalidation_that_a_person_ends_says_nothing_of_the_stable_pair():
    status = evaluated("Revalidation", pair=w.STABLE)
    plan = reconcile.plan(w.world(status=status, evaluator="sha256:new", actions=(action("rollback"),)))
    assert (plan.status.vetoed, plan.status.evaluator) == ((), "sha256:new")


def test_a_revalidation_never_begins_to_serve_a_pair():
    status = replace(evaluated("Revalidation", pair=w.STABLE), serving="StrongAlone")
    seen = w.report(candidate=w.STABLE.digest, control="solo", against_solo=w.comparison(0.0, 0.5, 0.5))
    assert reconcile.plan(w.world(status=status, report=seen)).status.serving == "StrongAlone"


# ---------------------------------------------------------------- the watcher of a canary
@pytest.mark.parametrize(
    ("state", "fails"),
    [
        pytest.param(api.StepState("Failed", 2, 1, "no such signal"), True, id="bad input"),
        pytest.param(api.StepState("Failed", 1, 1, "a bug"), False, id="started again"),
        pytest.param(api.StepState("Failed", 1, 3, "a bug"), True, id="a bug again and again"),
        pytest.param(api.StepState("Failed", 75, 9, "disk full"), False, id="better times may come"),
    ],
)
def test_a_watcher_that_fails_is_named(state, fails):
    plan = reconcile.plan(replace(CANARY_WORLD, steps={"r1-live-0": state}))
    assert (plan.failure is not None) == fails
    assert state.message in condition(plan, api.ROUND_PROGRESSING).message


def test_an_edit_of_the_pair_ends_a_running_round_and_is_tried_next() -> None:
    before = rounds.declared_edit(w.world())
    edited = w.job(collaboration={"draft": "Knowledge"})
    seen = w.world(job=edited, status=w.on_trial(declared=before))
    first = reconcile.plan(seen)
    assert (first.status.rounds[-1].decision, first.status.rounds[-1].reason) == ("Refused", api.REASON_SPEC_CHANGED)
    assert first.status.tuned_rounds == 0 and first.status.without_gain == 0
    following = reconcile.plan(replace(seen, status=first.status)).status.candidate
    assert following is not None and following.origin == "Edit"


def test_an_edit_of_something_else_lets_the_round_go_on_with_its_own_data() -> None:
    before = w.world()
    edited = w.job(data={"train": "file:///new.jsonl"})
    status = w.on_trial(declared=rounds.declared_edit(before), pair=None)
    plan = reconcile.plan(w.world(job=edited, frozen=before.job, status=status))
    assert ("--train", "file:///train.jsonl") in plan.steps[0].args


def test_where_nobody_has_looked_at_the_data_a_check_comes_first_and_decides_about_sft() -> None:
    seen = w.world(status=api.Status(), has_explanations=None)
    trial = w.trial(origin="Baseline", pair=None, number=0)
    assert [rounds.key(trial, s) for s in rounds.chain(seen, trial)] == ["check", "publish", "evaluate"]
    checked = replace(trial, done={"check": {"has_explanations": True}})
    assert [rounds.key(trial, s) for s in rounds.chain(seen, checked)] == ["check", "sft", "evaluate"]


def test_an_edit_of_the_data_does_not_change_the_way_of_a_first_model_that_is_being_made() -> None:
    begun = reconcile.plan(w.world(status=api.Status(), has_explanations=False)).status
    after_the_edit = w.world(status=begun, has_explanations=True)
    steps = rounds.chain(after_the_edit, begun.candidate)
    assert [rounds.key(begun.candidate, step) for step in steps] == ["publish", "evaluate"]
    unknown = reconcile.plan(w.world(status=api.Status(), has_explanations=None)).status
    assert unknown.candidate.done == {}, "its check step looks"


def test_a_manifest_that_cannot_be_followed_starts_nothing_and_says_why() -> None:
    trouble = api.Trouble(api.REASON_NOT_ON_KUBERNETES, "spec.weak.model: wanted s3://, saw file://.")
    plan = reconcile.plan(w.world(blocked=trouble, troubles=(trouble,)))
    conditions = {c.type: c for c in plan.status.conditions}
    assert plan.steps == () and plan.status.candidate is None
    assert (conditions[api.DEGRADED].status, conditions[api.DEGRADED].message) == ("True", trouble.message)
    assert conditions[api.ROUND_PROGRESSING].status == "False"


# ---------------------------------------------------------------- what a person should hear
def test_a_weak_model_that_is_better_alone_is_said_with_the_round_and_of_the_stable_pair():
    scores = {"candidate": 0.5, "control": 0.5, "solo": 0.5, "weak": 0.8}
    arms = tuple(ArmReport(name, 500, score, score - 0.02, score + 0.02, 0.0) for name, score in scores.items())
    no_gain = w.comparison(0.0, 0.5, 0.5)
    seen = w.report(control="solo", arms=arms, against_control=no_gain, against_solo=no_gain)
    plan = reconcile.plan(w.world(status=BASELINE, report=seen))
    assert plan.status.rounds[-1].decision == "Refused"
    assert "the weak model alone scores 80.0 %" in plan.status.rounds[-1].note
    assert condition(plan, api.DRAFTS_HELP).message.endswith(plan.status.rounds[-1].note)
    later = reconcile.plan(w.world(status=replace(plan.status, stable=w.STABLE)))
    assert "80.0 %" not in condition(later, api.DRAFTS_HELP).message, "it was said of another pair"


def test_a_canary_without_answers_says_how_to_get_some_unless_a_server_was_missing():
    late = replace(CANARY_WORLD, now=w.NOW + 9000)
    row = reconcile.plan(late).status.rounds[-1]
    assert row.reason == api.REASON_TOO_FEW_ANSWERS
    assert all(remedy in row.message for remedy in ("`cowest send`", "canary.deadlineSeconds", "canary.steps: []"))
    row = reconcile.plan(replace(late, servers={})).status.rounds[-1]
    assert "server is not ready" in row.message and "cowest send" not in row.message


@pytest.mark.parametrize(("stage", "decision"), [("Preparing", "Refused"), ("Canary", "RolledBack")])
def test_a_proposal_that_an_edit_ended_is_tried_again_after_the_edit(stage, decision):
    before = rounds.declared_edit(w.world())
    edited = w.job(collaboration={"draft": "Knowledge"})
    status = w.on_trial(stage=stage, origin="Proposal", model="s3://b/m", by="ann", why="better", declared=before)
    other = api.Proposal("s3://b/other", "bob", "")
    seen = w.world(job=edited, status=replace(status, proposals=(other,)))
    ended = reconcile.plan(seen).status
    row = ended.rounds[-1]
    assert (row.decision, row.reason) == (decision, api.REASON_SPEC_CHANGED)
    assert row.message.endswith("that one is tried next, then this model again.")
    assert ended.proposals == (api.Proposal("s3://b/m", "ann", "better"), other)
    row = ended.rounds[-1]
    assert (row.by, row.proposed_by, row.proposed_why) == (None, "ann", "better")
    edit = reconcile.plan(replace(seen, status=ended)).status
    assert edit.candidate is not None and edit.candidate.origin == "Edit"
    tried = replace(edit, candidate=None, refused_edit=rounds.declared_edit(seen))
    again = reconcile.plan(replace(seen, status=tried)).status.candidate
    assert again is not None and (again.origin, again.model, again.by) == ("Proposal", "s3://b/m", "ann")
