"""What a round is said to cost before it begins."""

from dataclasses import replace

from cowest_operator import rounds
from cowest_serving.contract import RouteLimits, Shortcuts
from cowest_training.contract import Evaluator
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
    assert by_rule.calls == answers
    assert by_judge.calls == answers + 2 * (answers + 5)
    assert by_judge.tokens > by_rule.tokens


def test_a_judge_is_paid_for_the_drafts_of_all_queries_where_they_may_be_answers():
    sizes = {"rows": 10, "held_out": 5, "query_chars": 40.0, "baseline": False}
    plain = judged_by(Evaluator("Judge", endpoint="http://judge/v1", model="m"))
    shortcuts = Shortcuts(weak_alone=RouteLimits(0.01, 10))
    collaboration = replace(plain.spec.collaboration, shortcuts=shortcuts)
    routed = replace(plain, spec=replace(plain.spec, collaboration=collaboration))
    assert rounds.estimate(routed, **sizes).calls == rounds.estimate(plain, **sizes).calls + 2 * 10
