"""Live scoring over recorded traces and feedback: what counts, for whom, and what the report says about the rest."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

import pytest

from cowest_operator import api, promotion, rounds
from cowest_serving.contract import Pair
from cowest_serving.traces import TraceWriter
from cowest_training import score_live, steps
from cowest_training.asking import GreedyDrafts
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, LiveReport, Row, StepError, load_live_report
from tests import world as w
from tests.fakes import Call, ScriptedModel
from tests.loop import asking_world as world

SINCE = 1_790_000_000.0


def pair(weak: str) -> Pair:
    return Pair(f"sha256:{weak}", "file:///nowhere", world.PROMPTS, "Explanation", "http://127.0.0.1:9/v1", "strong")


CANDIDATE, STABLE = pair("candidate"), pair("stable")


def trace(id_: str, arm: str, answer: str | None = "1", **changes: Any) -> dict[str, Any]:
    """An answer to "what is alpha ?", whose reference is 1; `id_` ends in a number of seconds."""
    query = "what is alpha ?"
    return {
        "trace_id": id_,
        "time": datetime.fromtimestamp(SINCE + int(id_[1:]), UTC),
        "arm": arm,
        "mode": "Pair",
        "status": "ok",
        "pair_digest": (CANDIDATE if arm == "candidate" else STABLE).digest,
        "user_hash": f"user of {id_}",
        "query": query,
        "messages": json.dumps([{"role": "user", "content": query}]),
        "answer": answer,
        "shadow": False,
        **changes,
    }


def word(trace_id: str, n: int = 0, **says: Any) -> dict[str, Any]:
    at = datetime.fromtimestamp(SINCE + 100 + n, UTC)
    return {"feedback_id": f"f{trace_id}-{n}", "trace_id": trace_id, "time": at, **says}


class Live:
    """A store with records, and the step over it."""

    def __init__(self, folder: Path, strong_url: str = "http://127.0.0.1:9/v1", **sections: Any) -> None:
        self.folder = folder
        self.job = world.write_job(folder / "job.json", strong_url, **sections)
        self.segments = 0

    def record(self, traces: Sequence[dict[str, Any]] = (), words: Sequence[dict[str, Any]] = ()) -> None:
        async def write() -> None:
            self.segments += 1
            writer = TraceWriter(str(self.folder / "store"), f"gw{self.segments}")
            for row in traces:
                writer.add(row)
            for row in words:
                writer.add_feedback(row)
            await writer.aclose()

        asyncio.run(write())

    def flags(self, candidate: Pair = CANDIDATE, control: Pair | None = STABLE) -> list[str]:
        flags = {
            "--job": self.job,
            "--store": self.folder / "store",
            "--candidate": world.write_pair(self.folder / "candidate.json", candidate),
            "--control": world.write_pair(self.folder / "control.json", control) if control else "solo",
            "--step": 1,
            "--since": SINCE,
            "--calls": self.folder / "calls",
            "--out": self.folder / "live.json",
        }
        return [str(part) for flag in flags.items() for part in flag]

    def report(self) -> LiveReport:
        return load_live_report(json.loads((self.folder / "live.json").read_text()))

    def once(self, candidate: Pair = CANDIDATE, control: Pair | None = STABLE) -> LiveReport:
        score_live.main([*self.flags(candidate, control), "--once"])
        return self.report()


def test_late_references_score_the_answers_of_each_arm(tmp_path: Path) -> None:
    live = Live(tmp_path)
    traces = [trace(f"c{i}", "candidate", "1" if i < 3 else "2") for i in range(4)]
    traces += [trace(f"s{i}", "stable", "2") for i in range(6)]
    live.record(traces, [word(t["trace_id"], reference="1") for t in traces if t["trace_id"] != "s5"])
    report = live.once()
    assert (report.candidate, report.control, report.step) == (CANDIDATE.digest, STABLE.digest, 1)
    assert report.answers == {"candidate": 4, "control": 6}
    assert report.scored == {"candidate": 4, "control": 5}
    assert report.errors == {"candidate": 0, "control": 0}
    assert [(arm.name, arm.n, arm.score) for arm in report.arms] == [("candidate", 4, 0.75), ("control", 5, 0.0)]
    assert report.comparison is not None
    assert (report.comparison.difference, report.comparison.test) == (0.75, "FisherExact")
    assert report.unscored_reason == "Of 10 answers 1 have no late reference yet."


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pair_digest": "sha256:older"}, id="another pair's"),
        pytest.param({"shadow": True}, id="a replay"),
        pytest.param({"propensity": 0.9}, id="a predictor could choose its way"),
        pytest.param({"status": "client_gone"}, id="the user left"),
        pytest.param({"status": "fell_back"}, id="another strong model's"),
        pytest.param({"time": datetime.fromtimestamp(SINCE - 1, UTC)}, id="before the step began"),
    ],
)
def test_records_that_say_nothing_about_the_arms_do_not_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    live = Live(tmp_path)
    live.record([trace("c1", "candidate", **changes), trace("c2", "candidate")], [word("c1", reference="1")])
    assert live.once().answers == {"candidate": 1, "control": 0}


def test_the_control_may_be_the_strong_model_alone(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.record([trace("s1", "stable", mode="StrongAlone", pair_digest="sha256:any")], [word("s1", reference="1")])
    report = live.once(control=None)
    assert (report.control, report.scored) == ("solo", {"candidate": 0, "control": 1})
    assert report.comparison is None, "no data of one arm is no comparison"


def test_a_failure_is_an_error_and_what_the_user_got_instead_is_scored(tmp_path: Path) -> None:
    live = Live(tmp_path)
    traces = [
        trace("c1", "candidate", "1", status="weak_failed", mode="StrongAlone"),
        trace("c2", "candidate", "", status="strong_failed"),
        trace("c3", "candidate", "1"),
    ]
    live.record(traces, [word(t["trace_id"], reference="1") for t in traces])
    report = live.once()
    assert (report.errors["candidate"], report.scored["candidate"]) == (2, 2)
    assert "1 have no answer in their trace" in report.unscored_reason


def test_the_latest_word_counts_and_a_score_is_taken_as_it_is(tmp_path: Path) -> None:
    live = Live(tmp_path, canary={"signal": "Feedback"})
    live.record([trace("c1", "candidate", None), trace("s1", "stable")])
    live.record(words=[word("c1", 2, score=1.0), word("c1", 1, score=0.0), word("c1", 3, comment="thanks")])
    live.record(words=[word("s1", 1, score=0.25)])
    report = live.once()
    assert [(arm.name, arm.score) for arm in report.arms] == [("candidate", 1.0), ("control", 0.25)]


def test_a_reference_that_the_evaluator_cannot_use_is_named(tmp_path: Path) -> None:
    live = Live(tmp_path, feedback={"evaluator": {"type": "Numeric"}})
    live.record([trace("c1", "candidate")], [word("c1", reference="one")])
    report = live.once()
    assert report.scored["candidate"] == 0
    assert "wanted a number with a decimal point (1234.5 or 1,234.5), saw 'one'" in report.unscored_reason


# ---------------------------------------------------------------- a judge
@pytest.fixture
def judge() -> Iterator[ScriptedModel]:
    def verdict(call: Call) -> str:
        return "ACCEPT" if "good answer here" in call.last else "REJECT"

    with ScriptedModel(verdict).in_thread() as server:
        yield server


def judged(folder: Path, judge: ScriptedModel) -> Live:
    evaluator = {"type": "Judge", "endpoint": judge.url, "model": "judge", "timeoutSeconds": 2}
    return Live(folder, feedback={"evaluator": evaluator}, canary={"signal": "Judge"})


def test_a_judge_scores_without_references_and_never_twice(tmp_path: Path, judge: ScriptedModel) -> None:
    live = judged(tmp_path, judge)
    live.record([trace("c1", "candidate", "good answer here"), trace("s1", "stable", "bad")])
    assert live.once().scored == {"candidate": 1, "control": 1}
    asked = len(judge.calls)
    assert [(arm.name, arm.score) for arm in live.once().arms] == [("candidate", 1.0), ("control", 0.0)]
    assert len(judge.calls) == asked > 0


def test_a_judge_that_is_away_is_named_and_scoring_goes_on_when_it_is_back(
    tmp_path: Path, judge: ScriptedModel
) -> None:
    live = judged(tmp_path, judge)
    live.record([trace("c1", "candidate", "good answer here")])
    judge.faults = [500] * 100
    report = live.once()
    assert (report.answers["candidate"], report.scored["candidate"]) == (1, 0)
    assert f"{judge.url} answered 500" in report.unscored_reason
    judge.faults = []
    assert live.once().scored["candidate"] == 1


def test_a_judge_with_a_wrong_key_ends_the_step(tmp_path: Path, judge: ScriptedModel) -> None:
    live = judged(tmp_path, judge)
    live.record([trace("c1", "candidate")])
    judge.faults = [401] * 100
    with pytest.raises(Exception, match="answered 401"):
        live.once()


def test_the_signal_judge_needs_an_evaluator_that_can_do_without_references(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"spec\.canary\.signal") as error:
        Live(tmp_path, canary={"signal": "Judge"}).once()
    assert error.value.code == EXIT_BAD_INPUT


# ---------------------------------------------------------------- shadow replay
@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


def replayed_queries(folder: Path, strong: ScriptedModel, n: int = len(world.WORDS)) -> tuple[Live, Pair]:
    """Live queries with their references, and the candidate that half of them were answered by."""
    live = Live(folder, strong.url, canary={"signal": "ShadowReplay"})
    candidate = world.make_pair(folder / "weak", strong)
    traces, words = [], []
    for i, row in enumerate(world.rows(n)):
        messages = json.dumps([{"role": "user", "content": row["query"]}])
        arm, digest = ("candidate", candidate.digest) if i % 2 else ("stable", STABLE.digest)
        content = {"query": row["query"], "messages": messages, "pair_digest": digest, "user_hash": ""}
        traces.append(trace(f"t{i}", arm, **content))
        words.append(word(f"t{i}", reference=row["reference"]))
    live.record(traces, words)
    return live, candidate


def test_shadow_replay_compares_both_arms_on_each_live_query(tmp_path: Path, strong: ScriptedModel) -> None:
    live, candidate = replayed_queries(tmp_path, strong)
    report = live.once(candidate, control=None)
    assert report.answers == {"candidate": 4, "control": 4}
    assert report.scored == {"candidate": 8, "control": 8}
    scores = {arm.name: arm.score for arm in report.arms}
    assert scores["control"] == 1 / 8
    assert report.comparison is not None
    assert (report.comparison.n, report.comparison.test) == (8, "McNemar")
    assert report.comparison.difference == pytest.approx(scores["candidate"] - 1 / 8)
    assert sum(value * users for value, users in report.differences) == pytest.approx(8 * report.comparison.difference)
    assert load_live_report(json.loads(json.dumps(asdict(report)))) == report
    paid = len(strong.paid)
    again = live.once(candidate, control=None)
    assert (again.comparison, len(strong.calls)) == (report.comparison, paid)


def test_a_strong_model_that_became_another_one_answers_both_arms_anew(tmp_path: Path, strong: ScriptedModel) -> None:
    live, candidate = replayed_queries(tmp_path, strong)
    before = live.once(candidate, control=None)
    strong.answers = neither
    score_live.main([*live.flags(candidate, None), "--once", "--generation", "0"])
    assert live.report().comparison == before.comparison, "the book answers"
    score_live.main([*live.flags(candidate, None), "--once", "--generation", "1"])
    assert {arm.name: arm.score for arm in live.report().arms} == {"candidate": 0.0, "control": 0.0}


def test_a_disk_that_takes_no_draft_is_named_and_scoring_goes_on_when_it_does(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    live, candidate = replayed_queries(tmp_path, strong, 3)
    (tmp_path / "calls.drafts").write_text("no folder can be here")
    report = live.once(candidate, control=None)
    assert report.scored == {"candidate": 0, "control": 0}
    assert "calls.drafts" in report.unscored_reason and "run again" in report.unscored_reason
    (tmp_path / "calls.drafts").unlink()
    assert live.once(candidate, control=None).scored == {"candidate": 3, "control": 3}


def test_a_watcher_goes_on_with_a_draft_that_no_disk_took(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("no folder can be here")
    loaded = []
    drafts = GreedyDrafts(CANDIDATE, 8, tmp_path / "full" / "drafts", lambda: cast("Any", loaded.append(1)))
    image = Row("r", "", ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},), "1")
    with pytest.raises(StepError, match="no draft can be kept") as error:
        drafts.draw(image)
    assert error.value.code == EXIT_RETRY
    assert drafts.draw(image) is None and len(loaded) == 1, "no text, so no draft: known by now"


def test_a_watcher_that_begins_again_draws_no_draft_anew(tmp_path: Path, strong: ScriptedModel) -> None:
    live, candidate = replayed_queries(tmp_path, strong, 3)
    report = live.once(candidate, control=None)
    (kept,) = (tmp_path / "calls.drafts").iterdir()
    kept.write_bytes(kept.read_bytes() + b'\n{"query": "torn')
    rmtree(tmp_path / "weak")  # what would draw
    live.record(words=[word("t0", 1, score=1.0), word("t1", 1, reference="no idea")])
    again = live.once(candidate, control=None)
    assert (again.scored, again.pending) == (report.scored, ())
    assert [arm.score for arm in again.arms if arm.name == "control"] == [2 / 3], "by the later reference"


def test_a_watcher_goes_on_in_the_order_of_a_report_of_its_own_step_alone(tmp_path: Path) -> None:
    canary, out = canary_of(tmp_path), tmp_path / "live.json"
    assert score_live.read_begun(str(out), canary) == ()
    score_live.write_report(str(out), score_live.make_report(canary, {}, {}, {}, 0.0, begun=["c2", "c1"]))
    assert score_live.read_begun(str(out), canary) == ("c2", "c1")
    assert score_live.read_begun(str(out), replace(canary, step=2)) == ()
    assert score_live.read_begun(str(out), replace(canary, control=None)) == ()
    out.write_text("something else")
    assert score_live.read_begun(str(out), canary) == ()


class Counting:
    """Stands for the models behind `Asking`, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def score_text(self, row: Row, answer: str) -> float:
        self.asked += 1
        return float(answer == row.reference)


async def test_only_the_word_that_the_signal_goes_by_makes_a_score_anew(tmp_path: Path) -> None:
    settings = steps.load_settings(Live(tmp_path).job)
    canary = score_live.Canary(settings, CANDIDATE, STABLE, 1, SINCE)
    asking = Counting()
    scorer = score_live.Scorer(canary, cast(Any, asking), tmp_path)
    answers = {"c1": score_live.live_answer(trace("c1", "candidate"), "candidate")}
    for score, reference, asked, scored in (
        (None, "1", 1, 1.0), (0.0, "1", 1, 1.0), (1.0, "1", 1, 1.0), (1.0, "2", 2, 0.0)
    ):  # fmt: skip
        said = {"c1": score_live.Verdict(score, reference)}
        scorer.begin(list(answers.values()), said)
        await scorer.settle(None)
        assert (scorer.scores(said), asking.asked) == ({"c1": (scored,)}, asked)


def live_answers(*rows: dict[str, Any]) -> dict[str, score_live.LiveAnswer]:
    return {row["trace_id"]: score_live.live_answer(row, canary_arm(row)) for row in rows}


def canary_arm(row: dict[str, Any]) -> str:
    return score_live.CANDIDATE if row["arm"] == "candidate" else score_live.CONTROL


def canary_of(
    folder: Path, most: int | None = None, watched: float | None = None, **settings: Any
) -> score_live.Canary:
    sections = {
        "canary": {"signal": settings.get("signal", "Judge")},
        "feedback": {
            "evaluator": {"type": settings.get("evaluator", "Judge"), "endpoint": "http://j/v1", "model": "j"}
        },
    }
    bound = score_live.Bound(most, watched, every_user=settings.get("every_user", False))
    job = steps.load_settings(Live(folder, **sections).job)
    until = score_live.Until(pending=frozenset(settings.get("pending", ())))
    return score_live.Canary(job, CANDIDATE, STABLE, 1, SINCE, until, bound)


def test_of_a_user_counts_what_could_be_scored_first_and_no_other_before_it_is(tmp_path: Path) -> None:
    canary = canary_of(tmp_path, signal="ShadowReplay", evaluator="ExactMatch")
    users = ["ann", "ann", "ann", "bob", "bob", "", ""]
    answers = live_answers(*(trace(f"t{i}", "candidate", user_hash=user) for i, user in enumerate(users)))

    def differences(references: dict[str, int], **scores: float) -> tuple[tuple[float, int], ...]:
        said = score_live.verdicts([word(id_, n, reference="1", score=None) for id_, n in references.items()])
        ready = score_live.in_order(canary, answers, said)
        return score_live.first_differences(ready, {id_: (score, 0.25) for id_, score in scores.items()})

    early = {"t1": 1, "t3": 2, "t4": 3, "t5": 4, "t6": 5}
    assert differences(early, t1=1.0, t3=0.0, t4=1.0, t5=1.0, t6=1.0) == ((-0.25, 1), (0.75, 3))
    assert differences(early, t1=1.0, t4=1.0) == ((0.75, 1),), "bob's first is under way: his second does not stand in"
    assert differences({**early, "t0": 9}, t0=0.0, t1=1.0) == ((0.75, 1),), "a late reference changes no look"


def test_what_was_begun_first_of_a_user_counts_though_an_older_record_comes_to_light(tmp_path: Path) -> None:
    canary = canary_of(tmp_path, 2, signal="ShadowReplay", every_user=True)
    rows = [trace(f"t{i}", "candidate", user_hash=user) for i, user in enumerate("abcc")]
    early, late = live_answers(*rows[:2], rows[3]), live_answers(*rows)
    begun = [answer.id for answer in score_live.next_to_score(canary, score_live.in_order(canary, early, {}), ())]
    assert begun == ["t0", "t1", "t3"]
    ready = score_live.in_order(canary, late, {}, begun)
    assert score_live.next_to_score(canary, ready, begun) == []
    report = score_live.make_report(canary, late, {}, dict.fromkeys(begun, (1.0, 0.0)), 0.0, begun=begun)
    assert (report.differences, report.pending, report.begun) == (((1.0, 3),), (), ("t0", "t1", "t3"))


# ---------------------------------------------------------------- what is paid for
def chosen(canary: score_live.Canary, answers: dict[str, score_live.LiveAnswer], begun: Sequence[str] = ()) -> set[str]:
    ready = score_live.in_order(canary, answers, {})
    return {answer.id for answer in score_live.next_to_score(canary, ready, begun)}


def test_no_more_answers_are_paid_for_than_the_gate_looks_at(tmp_path: Path) -> None:
    rows = [trace(f"c{i}", "candidate") for i in range(5)] + [trace(f"s{i}", "stable") for i in range(5)]
    answers = live_answers(*rows)
    assert chosen(canary_of(tmp_path, 2), answers) == {"c0", "c1", "s0", "s1"}
    assert chosen(canary_of(tmp_path, 2), answers, ["c4"]) == {"c0", "s0", "s1"}, "what is under way counts"
    assert chosen(canary_of(tmp_path, 2), answers, ["c0", "c4", "s3", "s4"]) == set()
    assert len(chosen(canary_of(tmp_path), answers)) == 10, "nobody told it a bound"
    assert len(chosen(canary_of(tmp_path, 2, signal="LateReference", evaluator="Numeric"), answers)) == 0, (
        "no reference"
    )
    free = canary_of(tmp_path, 2, signal="Feedback")
    said = {id_: score_live.Verdict(1.0) for id_ in answers}
    assert len(score_live.next_to_score(free, score_live.in_order(free, answers, said), ())) == 10, "costs nothing"


def test_the_watch_has_as_many_again_and_leaves_over_what_the_step_did(tmp_path: Path) -> None:
    answers = live_answers(*(trace(f"c{i}", "candidate") for i in range(9)))
    assert chosen(canary_of(tmp_path, 2, watched=SINCE + 5), answers, ["c0", "c1"]) == {"c5", "c6"}


def test_a_replayed_query_is_of_both_arms_and_a_test_that_may_be_looked_at_goes_on_by_users(tmp_path: Path) -> None:
    rows = [trace(f"t{i}", "stable" if i % 2 else "candidate", user_hash="ab"[i // 3]) for i in range(6)]
    replayed = canary_of(tmp_path, 2, signal="ShadowReplay")
    assert chosen(replayed, live_answers(*rows)) == {"t0", "t1"}
    assert chosen(canary_of(tmp_path, 2, signal="ShadowReplay", every_user=True), live_answers(*rows)) == {
        "t0", "t1", "t3"
    }  # fmt: skip


def test_of_a_control_with_most_of_the_traffic_answers_of_the_whole_step_are_paid_for(tmp_path: Path) -> None:
    rows = [trace(f"s{i}", "stable", weight_percent=90) for i in range(900)]
    found = chosen(canary_of(tmp_path, 1000), live_answers(*rows))
    assert 150 < len(found) < 250, "twice the candidate's 100"
    assert any(int(id_[1:]) > 850 for id_ in found)


def test_a_replay_scores_what_was_scored_though_more_came_to_light(tmp_path: Path) -> None:
    answers = live_answers(*(trace(f"c{i}", "candidate") for i in range(9)))
    begun, scored = ["c4", "c1"], {"c4": (1.0,)}  # c0, c2 and c3 came late, c1 failed for a while
    report = score_live.make_report(canary_of(tmp_path, 2), answers, {}, scored, 0.0, begun=begun)
    assert (report.pending, report.begun) == (("c1",), ("c4", "c1"))
    assert report.unscored_reason == "Of 9 answers 7 are more than the gate looks at, 1 are being scored."
    assert chosen(canary_of(tmp_path, 2, pending=report.pending), answers, begun) == set()


# ---------------------------------------------------------------- refusals
def test_refused_requests_are_no_answers_and_are_compared_by_users(tmp_path: Path) -> None:
    live = Live(tmp_path)
    rows = [trace(f"c{i}", "candidate", status="refused" if i < 4 else "ok", answer=None) for i in range(20)]
    rows += [trace(f"s{i}", "stable", status="refused" if i == 0 else "ok") for i in range(100)]
    live.record(rows)
    report = live.once()
    assert (report.answers, report.errors) == ({"candidate": 16, "control": 99}, {"candidate": 0, "control": 0})
    assert report.refused == {"candidate": 4, "control": 1}
    assert report.p_refused == pytest.approx(0.0025, abs=0.001)
    assert "5 were refused by the strong model" in report.unscored_reason


def test_one_client_that_asks_in_vain_again_and_again_is_one_user() -> None:
    vain = live_answers(*(trace(f"c{i}", "candidate", status="refused", user_hash="bot") for i in range(50)))
    others = live_answers(*(trace(f"c{i}", "candidate") for i in range(50, 60)))
    control = live_answers(*(trace(f"s{i}", "stable") for i in range(60)))
    assert score_live.p_refused([*vain.values(), *others.values()], list(control.values())) > 0.1
    assert score_live.p_refused(list(vain.values()), []) == 1.0, "nothing to compare with"


def test_a_refused_query_is_replayed_and_lost_where_the_draft_made_it_impossible(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    live, candidate = replayed_queries(tmp_path, strong, 0)
    live.record([trace("t9", "candidate", None, status="refused", pair_digest=candidate.digest)])
    live.record(words=[word("t9", reference="1")])
    strong.faults = [400]  # with the draft; alone it answers
    report = live.once(candidate, control=None)
    assert (report.answers["candidate"], report.refused["candidate"]) == (0, 1)
    assert report.differences == ((-1.0, 1),)


# ---------------------------------------------------------------- a test that may be looked at
BY_GAIN = {
    "steps": (api.CanaryStep(10, 2), api.CanaryStep(50, 5)), "signal": "ShadowReplay", "test": "AnytimeValid"
}  # fmt: skip


def asked_of(call: Call) -> str:
    return next(word for word in call.last.replace("?", " ").split() if word in world.NUMBERS)


def of_draft(call: Call) -> str:
    """Knows every answer with a draft, whichever it is; alone it knows none but alpha's."""
    word = asked_of(call)
    return world.NUMBERS[word] if "DRAFT" in call.last or word == "alpha" else "no idea"


def alone(call: Call) -> str:
    """Drafts make it forget what it knows."""
    return "no idea" if "DRAFT" in call.last else world.NUMBERS[asked_of(call)]


def neither(call: Call) -> str:
    return "no idea"


@pytest.mark.parametrize(
    ("answers", "late", "action", "reason", "differences"),
    [
        pytest.param(of_draft, False, "Advance", api.REASON_PROGRESSING, ((0.0, 1), (1.0, 7)), id="a gain"),
        pytest.param(alone, False, "RollBack", api.REASON_GAIN_NOT_SHOWN, ((-1.0, 8),), id="a loss"),
        pytest.param(neither, False, "Wait", api.REASON_WAITING_FOR_ANSWERS, ((0.0, 8),), id="nothing yet"),
        pytest.param(neither, True, "RollBack", api.REASON_GAIN_NOT_SHOWN, ((0.0, 8),), id="nothing by the deadline"),
    ],
)
def test_replayed_queries_promote_a_gain_and_roll_back_what_shows_none(
    tmp_path: Path,
    strong: ScriptedModel,
    answers: Callable[[Call], str],
    late: bool,
    action: str,
    reason: str,
    differences: tuple[tuple[float, int], ...],
) -> None:
    strong.answers = answers
    live, candidate = replayed_queries(tmp_path, strong)
    job = w.job(canary=BY_GAIN, gate={"minimum_effect_points": 50.0})
    trial = w.trial("Canary", step=1, step_since=SINCE, pair=candidate, discordant=0.6)
    started = rounds.live_score(w.world(job=job), trial, None)
    flags = [part for flag, value in started.args if flag in ("--most", "--beyond") for part in (flag, value)]
    assert flags == ["--most", "20", "--beyond", "first-of-user"]
    score_live.main([*live.flags(candidate, None), "--once", *flags])
    report = live.report()
    now = report.updated + (job.spec.canary.deadline_seconds if late else 0)
    trial = replace(trial, step_since=report.updated - 1)
    verdict = promotion.judge(job.spec.canary, job.spec.gate, trial, report, now)
    assert (verdict.action, verdict.reason, report.differences) == (action, reason, differences), verdict.message


# ---------------------------------------------------------------- the watch
def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_watch_takes_up_what_is_recorded_meanwhile_and_ends_on_sigterm(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.record([trace("c1", "candidate")])
    command = [sys.executable, "-m", "cowest_training.score_live", *live.flags()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
        try:
            wait_for((tmp_path / "live.json").exists, watch)
            assert live.report().scored["candidate"] == 0
            live.record([trace("s1", "stable")], [word("c1", reference="1"), word("s1", reference="1")])
            wait_for(lambda: live.report().scored == {"candidate": 1, "control": 1}, watch)
            watch.send_signal(signal.SIGTERM)
            _, errors = watch.communicate(timeout=30)
            assert watch.returncode == 0, errors
        finally:
            watch.kill()
    assert live.report().comparison is not None


def test_an_older_record_that_comes_late_changes_no_look_no_restart_and_no_replay(
    tmp_path: Path, strong: ScriptedModel
) -> None:
    live = Live(tmp_path, strong.url, canary={"signal": "ShadowReplay"})
    candidate = world.make_pair(tmp_path / "weak", strong)
    contents = world.rows()

    def record(**users: str) -> None:
        rows, words = [], []
        for id_, user in users.items():
            asked = contents[int(id_[1:])]
            content = {"query": asked["query"], "messages": json.dumps([{"role": "user", "content": asked["query"]}])}
            rows.append(trace(id_, "candidate", pair_digest=candidate.digest, user_hash=user, **content))
            words.append(word(id_, int(id_[1:]) - 100, reference=asked["reference"]))
        live.record(rows, words)

    def scored() -> int:
        return live.report().scored["candidate"] if (tmp_path / "live.json").exists() else 0

    flags = [*live.flags(candidate, None), "--most", "2", "--beyond", "first-of-user"]
    record(t3="ann", t5="ann")
    command = [sys.executable, "-m", "cowest_training.score_live", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
        try:
            wait_for(lambda: scored() == 2, watch)
            record(t1="bob", t2="ann", t7="cleo")  # t1 and t2 from a gateway that could not reach the store
            wait_for(lambda: live.report().answers["candidate"] == 5 and scored() >= 4, watch)
            watch.send_signal(signal.SIGTERM)
            _, errors = watch.communicate(timeout=30)
            assert watch.returncode == 0, errors
        finally:
            watch.kill()
    decided = live.report()
    assert (decided.scored["candidate"], sum(users for _, users in decided.differences)) == (4, 3)
    assert decided.begun == ("t3", "t5", "t1", "t7")
    (tmp_path / "decided.json").write_text(json.dumps(asdict(decided)))
    score_live.main([*flags, "--once"])
    assert replace(live.report(), updated=decided.updated) == decided, "it began again"
    record(t0="bob", t4="dan")
    score_live.main([*flags, "--once", "--until", str(tmp_path / "decided.json")])
    assert replace(live.report(), updated=decided.updated) == decided, "a replay"
