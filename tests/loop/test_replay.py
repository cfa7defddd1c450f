"""The live decision is a function of the recorded canary log: replayed, it is the same, whatever came later."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cowest_cli import jobs
from cowest_cli import main as cli
from cowest_cli.replay import decision_of
from cowest_operator import api, reconcile
from cowest_serving.traces import TraceWriter
from cowest_training import score_live
from cowest_training.contract import LiveReport, load_live_report
from tests import world as w
from tests.fakes import Call, ScriptedModel
from tests.loop import asking_world

SINCE = 1_790_000_000.0
CANARY = {"steps": (api.CanaryStep(10, 20), api.CanaryStep(50, 20))}


class Desk:
    """A job's home with a canary under way."""

    def __init__(self, folder: Path, strong_url: str = "http://127.0.0.1:9/v1", **sections: Any) -> None:
        self.folder, self.home = folder, jobs.Home(folder / "home")
        self.spec = json.loads(Path(asking_world.write_job(folder / "spec.json", strong_url, **sections)).read_text())
        self.segments = 0

    def answers(self, arm: str, right: int, wrong: int, start: int) -> None:
        """Answers with a late reference, one user each, in a segment of their own."""
        pair = w.CANDIDATE if arm == "candidate" else w.STABLE
        rows = [self.answer(f"{arm}-{start + i}", arm, pair.digest, "1" if i < right else "2", start + i)
                for i in range(right + wrong)]  # fmt: skip
        self.record(rows, [self.word(row["trace_id"]) for row in rows])

    def answer(self, id_: str, arm: str, digest: str, text: str, second: int) -> dict[str, Any]:
        content = {"query": "what is alpha ?", "messages": json.dumps([{"role": "user", "content": "what is alpha ?"}])}
        at = datetime.fromtimestamp(SINCE + second, UTC)
        return {"trace_id": id_, "time": at, "arm": arm, "mode": "Pair", "status": "ok", "pair_digest": digest,
                "user_hash": id_, "answer": text, "shadow": False, **content}  # fmt: skip

    def word(self, trace_id: str, reference: str = "1", second: int = 900) -> dict[str, Any]:
        at = datetime.fromtimestamp(SINCE + second, UTC)
        return {"feedback_id": f"{trace_id}/{second}", "trace_id": trace_id, "time": at, "reference": reference}

    def record(self, rows: Sequence[dict[str, Any]], words: Sequence[dict[str, Any]] = ()) -> None:
        async def write() -> None:
            self.segments += 1
            writer = TraceWriter(self.home.store.as_uri(), f"gateway.{self.segments}")
            for row in rows:
                writer.add(row)
            for row in words:
                writer.add_feedback(row)
            await writer.aclose()

        asyncio.run(write())

    def score(self, *flags: str) -> LiveReport:
        """What the watcher of the canary's first step reports now."""
        out = self.folder / "live.json"
        pairs = [("--candidate", w.CANDIDATE), ("--control", w.STABLE)]
        files = [f"{flag}={asking_world.write_pair(self.folder / flag[2:], pair)}" for flag, pair in pairs]
        score_live.main([
            "--job", str(self.folder / "spec.json"), "--store", self.home.store.as_uri(), *files, "--step", "0",
            "--since", repr(SINCE), "--calls", str(self.home.calls), "--out", str(out), "--once", *flags,
        ])  # fmt: skip
        return load_live_report(json.loads(out.read_text()))

    def world(self, live: LiveReport | None, **changes: Any) -> api.World:
        trial = w.trial("Canary", step_since=SINCE, stage_since=SINCE, **changes.pop("trial", {}))
        status = replace(w.SERVED, candidate=trial, trials=2)
        server = {w.CANDIDATE.weak_digest: api.ServerState(True, "http://weak/v1")}
        job = w.job(canary=CANARY)
        return w.world(
            **{"now": SINCE + 1000, "status": status, "live": live, "job": job, "servers": server, **changes}
        )

    def decide(self, live: LiveReport | None, **changes: Any) -> str | None:
        """As the engine keeps it: the file's name."""
        world = self.world(live, **changes)
        decision = decision_of(world, reconcile.plan(world), self.spec)
        if decision is None:
            return None
        jobs.write_json(self.home.store / "runs" / decision[0], decision[1])
        return decision[0]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(desk: Desk, *flags: str) -> tuple[int, str]:
        capsys.readouterr()  # what the scoring before it said
        monkeypatch.setattr(sys, "argv", ["cowest", "replay", "--home", str(desk.home.root), *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    return call


def test_a_decision_is_the_same_again_though_later_records_say_otherwise(tmp_path: Path, replay: Any) -> None:
    desk = Desk(tmp_path)
    desk.answers("candidate", right=0, wrong=20, start=0)
    desk.answers("stable", right=30, wrong=0, start=0)
    assert desk.decide(desk.score()) == "r1/live-0.decided.json"
    desk.answers("candidate", right=400, wrong=0, start=100)
    desk.record([], [desk.word(f"candidate-{i}", "2", second=950) for i in range(20)])  # second thoughts
    assert reconcile.plan(desk.world(desk.score())).status.candidate.step == 1, "now the gate would let it go on"

    code, said = replay(desk)
    assert code == 0, said
    assert said.startswith("round 1, canary step 1: RollBack (WorseOnLiveTraffic), the same again: ")
    assert "20 against 30 answers" in said
    code, said = replay(desk, "-o", "json")
    assert [(each["same"], each["same_report"]) for each in json.loads(said)] == [(True, True)]


def test_a_log_that_was_changed_gives_another_decision_and_exit_code_1(tmp_path: Path, replay: Any) -> None:
    desk = Desk(tmp_path)
    desk.answers("candidate", right=0, wrong=20, start=0)
    desk.answers("stable", right=30, wrong=0, start=0)
    desk.decide(desk.score())
    (first,) = (desk.home.store / "feedback").rglob("*gateway.1-0.parquet")
    first.unlink()
    code, said = replay(desk)
    assert code == 1
    assert "DIFFERS: now Wait (WaitingForAnswers)" in said and "20 have no late reference yet" in said


def test_a_deadline_without_any_report_is_replayed_too(tmp_path: Path, replay: Any) -> None:
    desk = Desk(tmp_path)
    desk.decide(None, now=SINCE + 4000)
    assert replay(desk) == (0, "round 1, canary step 1: RollBack (TooFewAnswers), the same again: 0 of 20 scored live"
                               " answers when canary.deadlineSeconds = 3600 was over.\n")  # fmt: skip


def test_a_decision_that_was_kept_before_its_gate_was_is_replayed_too(tmp_path: Path, replay: Any) -> None:
    desk = Desk(tmp_path)
    name = desk.decide(None, now=SINCE + 4000)
    assert name is not None
    path = desk.home.store / "runs" / name
    kept = jobs.read_json(path)
    jobs.write_json(path, {**kept, "significance": kept.pop("gate")["significance"]})
    code, said = replay(desk)
    assert (code, "the same again" in said) == (0, True), said


def test_each_look_at_a_step_is_kept_and_replayed(tmp_path: Path, replay: Any) -> None:
    desk = Desk(tmp_path)
    desk.answers("candidate", right=16, wrong=4, start=0)
    desk.answers("stable", right=28, wrong=2, start=0)
    assert desk.decide(desk.score()) == "r1/live-0-look-0.decided.json"
    desk.answers("candidate", right=20, wrong=0, start=100)
    assert desk.decide(desk.score(), trial={"looks": 1}, now=SINCE + 1001) == "r1/live-0.decided.json"
    code, said = replay(desk)
    assert code == 0, said
    assert [line.split(": ")[1].split()[0] for line in said.splitlines()] == ["LookAgain", "Advance"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="too few answers yet"),
        pytest.param({"actions": (api.Action("1", "rollback", "ann", "", 0.0),)}, id="a person ended it"),
        pytest.param({"actions": (api.Action("1", "pause", "ann", "", 0.0),)}, id="a person paused it"),
    ],
)
def test_only_what_the_gate_decided_is_kept(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert Desk(tmp_path).decide(w.live(candidate=5), **changes) is None


def test_nothing_decided_is_said_so(tmp_path: Path, replay: Any) -> None:
    assert replay(Desk(tmp_path)) == (0, "no canary step was decided by the live gate yet.\n")


# ---------------------------------------------------------------- what a report was made of
def test_until_a_time_counts_what_was_recorded_by_then(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.answers("candidate", right=1, wrong=0, start=0)
    desk.answers("candidate", right=1, wrong=0, start=100)
    first, second = (sorted((desk.home.store / lane).rglob("*.parquet")) for lane in ("traces", "feedback"))
    for path in (first[0], second[0]):
        rest = path.name.split("-", 1)[1]
        early = path.parents[1] / "2026-10-01"
        early.mkdir()
        os.rename(path, early / f"120000-{rest}")
    noon = datetime(2026, 10, 1, 12, tzinfo=UTC).timestamp()
    assert [desk.score("--until", str(t)).answers["candidate"] for t in (noon - 1, noon, noon + 10**9)] == [0, 1, 2]


def test_until_needs_a_report_or_a_time_and_a_single_pass(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(Exception, match="wanted epoch seconds or a report"):
        desk.score("--until", str(tmp_path / "spec.json"))


@pytest.fixture
def judge() -> Iterator[ScriptedModel]:
    def verdict(call: Call) -> str:
        return "ACCEPT"

    with ScriptedModel(verdict).in_thread() as server:
        yield server


def test_what_was_not_scored_yet_is_not_scored_in_the_replay_either(tmp_path: Path, judge: ScriptedModel) -> None:
    evaluator = {"type": "Judge", "endpoint": judge.url, "model": "judge", "timeoutSeconds": 2}
    desk = Desk(tmp_path, feedback={"evaluator": evaluator}, canary={"signal": "Judge"})
    row = desk.answer("candidate-1", "candidate", w.CANDIDATE.digest, "fine", 1)
    desk.record([row])
    judge.faults = [500] * 100
    early = desk.score()
    assert (early.scored["candidate"], early.pending) == (0, ("candidate-1",))
    judge.faults = []
    assert desk.score().scored["candidate"] == 1
    (tmp_path / "early.json").write_text(json.dumps({**vars(early), "arms": [], "comparison": None}))
    asked = len(judge.calls)
    again = desk.score("--until", str(tmp_path / "early.json"))
    assert (again.answers, again.scored, again.pending) == (early.answers, early.scored, early.pending)
    assert len(judge.calls) == asked
