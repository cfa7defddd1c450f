"""Live scoring over recorded traces and feedback: what counts, for whom, and what the report says about the rest."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

import pytest

from cowest_serving.contract import Pair
from cowest_serving.traces import TraceWriter
from cowest_training import score_live, steps
from cowest_training.contract import EXIT_BAD_INPUT, LiveReport, Row, StepError, load_live_report
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
        pytest.param({"status": "refused"}, id="a request that no model takes"),
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
    assert "wanted a number, saw 'one'" in report.unscored_reason


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
        scorer.begin(answers, said)
        await scorer.settle(None)
        assert (scorer.scores(said), asking.asked) == ({"c1": (scored,)}, asked)


def test_of_a_users_many_replayed_queries_the_first_scored_one_is_a_difference() -> None:
    answers = {}
    for second, (user, score) in enumerate(
        [("ann", None), ("ann", 1.0), ("ann", 0.0), ("bob", 0.0), ("", 1.0), ("", 1.0)]
    ):
        row = trace(f"t{second}", "candidate", user_hash=user)
        answers[row["trace_id"]] = (score_live.live_answer(row, "candidate"), score)
    scores = {id_: (score, 0.25) for id_, (_, score) in answers.items() if score is not None}
    found = score_live.first_differences({id_: answer for id_, (answer, _) in answers.items()}, scores)
    assert found == ((-0.25, 1), (0.75, 3)), "bob's, ann's, and of those who are not known each"


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
