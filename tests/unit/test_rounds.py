"""What a round is said to cost before it begins."""

from dataclasses import replace

import pytest

from cowest_cli import run
from cowest_operator import rounds
from cowest_serving.contract import RouteLimits, Shortcuts
from cowest_training.contract import Evaluator, Juror
from tests import world as w


def judged_by(evaluator):
    job = w.job()
    feedback = replace(job.spec.feedback, evaluator=evaluator, drafts_per_query=4, max_queries=10)
    return replace(job, spec=replace(job.spec, feedback=feedback))


def test_a_judge_is_paid_for_both_orders_of_every_answer_and_of_the_weak_models_own():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}
    by_rule = rounds.estimate(judged_by(Evaluator("ExactMatch")), **sizes)
    by_judge = rounds.estimate(judged_by(Evaluator("Judge", endpoint="http://judge/v1", model="m")), **sizes)
    answers = 10 * 4 + 10 + 5
    live = 2 * 4 * (50 + 100)  # both arms of two steps, at the last look
    assert by_rule.calls == answers
    assert by_judge.calls == answers + 2 * (answers + 5) + 2 * live
    assert by_judge.tokens > by_rule.tokens


def test_each_judge_of_a_jury_is_paid():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}
    one = Evaluator("Judge", endpoint="http://judge/v1", model="m")
    three = replace(one, jury=(Juror("http://b/v1", "b"), Juror("http://c/v1", "c")))
    rule, alone, jury = (
        rounds.estimate(judged_by(each), **sizes).calls for each in (Evaluator("ExactMatch"), one, three)
    )
    assert jury - rule == 3 * (alone - rule)


def test_a_judge_is_paid_once_for_what_people_labelled():
    judged = judged_by(Evaluator("Judge", endpoint="http://judge/v1", model="m"))
    for baseline, more in ((True, 2 * 7), (False, 0)):
        sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": baseline}
        assert rounds.estimate(judged, **sizes, labelled=7).calls == rounds.estimate(judged, **sizes).calls + more


def test_a_judge_is_paid_for_the_drafts_of_all_queries_where_they_may_be_answers():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}
    plain = judged_by(Evaluator("Judge", endpoint="http://judge/v1", model="m"))
    shortcuts = Shortcuts(weak_alone=RouteLimits(0.01, 10))
    collaboration = replace(plain.spec.collaboration, shortcuts=shortcuts)
    routed = replace(plain, spec=replace(plain.spec, collaboration=collaboration))
    assert rounds.estimate(routed, **sizes).calls == rounds.estimate(plain, **sizes).calls + 2 * 10


def test_a_round_that_asks_what_decides_is_bound_to_fewer_solo_answers_and_a_list_to_fewer_verdicts():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}

    def calls(job, **feedback):
        spec = replace(job.spec, feedback=replace(job.spec.feedback, **feedback))
        return rounds.estimate(replace(job, spec=spec), **sizes)

    by_rule = judged_by(Evaluator("ExactMatch"))
    by_judge = judged_by(Evaluator("Judge", endpoint="http://judge/v1", model="m"))
    all_of_it, listed = calls(by_rule).calls, {"judging": "Listwise"}
    assert calls(by_rule, calls="Deciding").calls == all_of_it - 10
    assert calls(by_rule, calls="Deciding", rule="SignOfGain").calls == all_of_it, "solo decides there"
    assert calls(by_rule, calls="Deciding", explore_percent=50).calls == all_of_it, "up to ten of ten by chance"
    assert calls(by_rule, **listed) == calls(by_rule), "nobody judges"
    verdicts = 2 * (10 * 4 + 10)
    assert calls(by_judge, **listed).calls == calls(by_judge).calls - verdicts + 10
    few, some = calls(by_judge, calls="Deciding", **listed), calls(by_judge, calls="Deciding")
    assert few.calls == some.calls - 2 * 10 * 4 + 10 * 3
    assert few.tokens < some.tokens


def test_a_canary_by_replays_asks_both_arms_at_every_look_and_in_the_watch():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}
    plain, steps = w.job(feedback={"max_queries": 10}), 2 * 4 * (50 + 100)
    replayed = w.job(feedback={"max_queries": 10}, canary={"signal": "ShadowReplay", "watch_seconds": 60})
    assert rounds.estimate(replayed, **sizes).calls == rounds.estimate(plain, **sizes).calls + steps + 2 * 4 * 100


def test_where_a_plan_is_no_bound_it_says_so():
    spec = w.job(strong={"max_tokens": 100}).spec
    assert not list(run.no_bounds(spec, 1000))
    (traces,) = run.no_bounds(spec, 999)
    assert "feedback.maxQueries = 1000" in traces
    assert not list(run.no_bounds(w.job(strong={"max_tokens": 100}, traces={"content_sample_percent": 0}).spec, 9))
    (guess,) = run.no_bounds(w.SPEC, 1000)
    assert "a guess, not a bound" in guess
    replays = {"signal": "ShadowReplay", "test": "AnytimeValid"}
    assert "until a gain is shown" in list(run.no_bounds(w.job(canary=replays).spec, 1000))[-1]


@pytest.mark.parametrize(
    ("stage", "step", "canary", "flags"),
    [
        pytest.param("Canary", 0, {}, {"--most": "200"}, id="a step"),
        pytest.param("Watch", 2, {}, {"--most": "400", "--watched": "2000.5"}, id="a watch goes on with the last step"),
        pytest.param("Canary", 0, {"test": "AnytimeValid"}, {"--most": "200"}, id="not the last step"),
        pytest.param("Canary", 1, {"test": "AnytimeValid"}, {"--most": "400", "--beyond": "first-of-user"},
                     id="no number of answers ends the last step"),
    ],
)  # fmt: skip
def test_the_watcher_is_told_how_many_answers_the_gate_looks_at(stage, step, canary, flags):
    trial = w.trial(stage, step=step, step_since=2000.5, since=1000.5 if stage == "Watch" else 0.0)
    args = dict(rounds.live_score(w.world(job=w.job(canary=canary)), trial, None).args)
    assert {flag: args[flag] for flag in ("--most", "--watched", "--beyond") if flag in args} == flags
    assert args["--since"] == ("1000.5" if stage == "Watch" else "2000.5")


@pytest.mark.parametrize(("generation", "flags"), [(0, {}), (2, {"--generation": "2"})])
def test_the_watcher_takes_no_answer_of_what_the_strong_model_was_before(generation, flags):
    status = replace(w.SERVED, strong_generation=generation)
    args = dict(rounds.live_score(w.world(status=status, job=w.job(canary={})), w.trial("Canary"), None).args)
    assert {flag: value for flag, value in args.items() if flag == "--generation"} == flags
