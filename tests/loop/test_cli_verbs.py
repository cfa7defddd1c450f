"""What people ask and say at the command line, over a home folder as an engine leaves it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cowest_cli import jobs, review
from cowest_cli import main as cli
from cowest_operator import api, manifest
from cowest_operator.schema import check
from cowest_serving.answering import user_hash
from cowest_serving.contract import Arm, Routing, dump
from cowest_serving.leases import Amount, Ask, Spent
from cowest_serving.models import HttpChatModel
from cowest_serving.traces import TraceWriter, read_feedback, read_traces
from cowest_training import forget, quarantine
from cowest_training.asking import score_key
from cowest_training.calibration import read_labels
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    EXIT_RETRY,
    ArmReport,
    CalibrationReport,
    Evaluator,
    Manifest,
    Row,
    SliceReport,
    evaluator_digest,
)
from cowest_training.paid_calls import PaidCalls
from cowest_training.steps import manifest_json
from tests import world as w
from tests.fakes import Fault, ScriptedModel
from tests.loop.tiny_models import make_model
from tests.manifests import edited
from tests.ports import free_port

# What a model, a log or a person may say: steers a terminal, breaks console markup, is markup in a page.
NASTY = "\x1b[2Jgone [/red] [bold]loud <script>alert(1)</script> \x07 & 'so' \"on\" on http://evil.example/x.js"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cowest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the entry point in this process; nothing it prints may steer a terminal."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["cowest", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = Said(int(ended.value.code or 0), *capsys.readouterr())
        assert not CONTROL.search(said.out + said.err)
        return said

    return call


# ---------------------------------------------------------------- a home as an engine leaves it
def outcome(number: int, origin: api.Origin, decision: api.Decision, **changes: Any) -> api.Outcome:
    message = f"round {number} was decided: {NASTY}"
    built = api.Outcome(number, origin, decision, "SomeReason", message, f"sha256:p{number}", 10.0, 20.0)
    return replace(built, **changes)


STATUS = replace(
    w.SERVED,
    stable=w.CANDIDATE,
    stable_round=1,
    conditions=(api.Condition(api.READY, "True", "Answering", f"the pair answers. {NASTY}", 1, 5.0),),
    rounds=(
        outcome(0, "Baseline", "Promoted", score=0.6),
        outcome(1, "Round", "Promoted", pairs=321, difference=0.1, p_value=1e-6, live_difference=0.12, live_answers=60),
        outcome(2, "Proposal", "RolledBack", by=f"ann {NASTY}"),
    ),
    vetoed=("sha256:bad",),
    trials=3,
    budget=api.Budget(1200, 34567, 1.5, api.Spent(200, 4567, 0.25)),
)


def write_artifact(place: jobs.Home, name: str, kind: str, digest: str, inputs: Any, metrics: Any = None) -> None:
    made = Manifest(kind, digest, "sha256:in", inputs, {}, metrics or {}, name.split("/")[1], "0", "2026-01-01", 1.0)
    folder = place.store / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest_json(made))


def write_evaluation(place: jobs.Home, number: int, score: float, drafts: str, **changes: Any) -> None:
    folder = place.store / "runs" / f"r{number}" / "evaluate"
    arms = tuple(
        ArmReport(name, 500, mean, mean - 0.03, mean + 0.03, 0.05, 0, 500)
        for name, mean in (("candidate", score), ("control", 0.5), ("solo", 0.3), ("weak", 0.2))
    )
    jobs.write_json(folder / "report.json", asdict(w.report(**{"arms": arms, **changes})))
    rows = [
        {
            "id": f"q{i}", "query": f"query {i} {NASTY}", "reference": "r", "group": "g",
            "candidate_draft": f"{drafts} {i} {NASTY}", "candidate_answer": f"answer {NASTY}",
            "candidate_score": float(number > 0 if i < 8 else number == 0), "solo_answer": "no idea", "solo_score": 0.0,
        }
        for i in range(10)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")


def trace(id_: str, **changes: Any) -> dict[str, Any]:
    return {"trace_id": id_, "time": datetime.now(UTC), "arm": "stable", "mode": "Pair", "status": "ok",
            "pair_digest": w.CANDIDATE.digest, "weak_digest": "sha256:tuned", "strong_model": "strong-1",
            "query": "what?", "draft": NASTY, "answer": NASTY, "shadow": False, **changes}  # fmt: skip


def record(place: jobs.Home, *rows: dict[str, Any]) -> None:
    async def write() -> None:
        writer = TraceWriter(place.store.as_uri(), "gw")
        for row in rows:
            writer.add(row)
        await writer.aclose()

    asyncio.run(write())


def give(place: jobs.Home, *words: dict[str, Any]) -> None:
    async def write() -> None:
        writer = TraceWriter(place.store.as_uri(), "gw")
        for number, word in enumerate(words):
            writer.add_feedback({"feedback_id": f"f{number}", "time": datetime.now(UTC), **word})
        await writer.aclose()

    asyncio.run(write())


@pytest.fixture
def place(tmp_path: Path) -> jobs.Home:
    home = jobs.Home(tmp_path / "a home")
    prices = {"inputPerMillionTokens": "1", "outputPerMillionTokens": "10", "currency": "EUR"}
    job = manifest.load(write_manifest(tmp_path, **{"strong.prices": prices})).job
    jobs.write_json(home.job, {**job, "metadata": {"name": "desk", "generation": 1}})
    jobs.write_status(home, STATUS)
    jobs.write_json(home.run, {"pid": 1, "gateway": "http://127.0.0.1:8080/v1"})
    for number, kind in enumerate(("Normal", "Warning")):
        jobs.append_event(home, api.Event(kind, "Reason", f"event {number} {NASTY}"), 100.0 + number)
    write_artifact(home, "r0/sft", "Model", "sha256:first", {"data": "sha256:rows", "model": "file:///base"})
    write_artifact(home, "r1/collect", "Dataset", "sha256:frozen", {"train": "sha256:rows"})
    write_artifact(home, "r1/feedback", "Feedback", "sha256:ledger", {"dataset": "sha256:frozen"}, {"pairs": 321})
    inputs = {"model": "sha256:first", "feedback": {"digest": "sha256:ledger"}}
    write_artifact(home, "r1/dpo", "Model", "sha256:tuned", inputs)
    write_evaluation(home, 0, 0.6, "plain")
    write_evaluation(home, 1, 0.7, "better")
    return home


def write_manifest(folder: Path, **edits: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(edited(edits)))
    return path


# ---------------------------------------------------------------- status, explain
def test_status_shows_what_answers_and_each_round(cowest: Any, place: jobs.Home) -> None:
    said = cowest("status", "--home", place.root)
    assert said.code == EXIT_OK
    assert "Ready" in said.out and "Answering: the pair answers." in said.out
    assert "[/red] [bold]loud" in said.out, "text that looks like markup is shown as it is"
    assert said.out.splitlines()[2].split(maxsplit=1) == [
        "Spent", "1200 calls, 34567 tokens, 1.50 EUR; the current round 200 calls, 4567 tokens, 0.25 EUR"
        " (by steps, without live answers)",
    ]  # fmt: skip
    rows = [line.split() for line in said.out.splitlines()[4:]]
    assert [row[:3] for row in rows] == [
        ["0", "Baseline", "Promoted"],
        ["1", "Round", "Promoted"],
        ["2", "Proposal", "RolledBack"],
    ]
    assert rows[1][3:7] == ["+10.0", "1e-06", "+12.0", "321"]


def test_status_as_json_has_the_fields_and_forms_of_the_crd(cowest: Any, place: jobs.Home) -> None:
    trial = w.trial("Canary", number=3, origin="Proposal", step=1)
    live = api.Live("2026-11-26", 9, 900, 0.01)
    spent = api.Budget(1200, 34567, 0.030557499999999963, api.Spent(200, 4567, 0.25), live)
    jobs.write_status(place, replace(STATUS, candidate=trial, budget=spent))
    arms = (Arm("stable", 80, "Pair", w.STABLE), Arm("candidate", 20, "Pair", w.CANDIDATE))
    jobs.write_json(place.routing, dump(Routing(4, "s", arms)))
    jobs.write_json(place.traces, {"all": 5, "usable": 3, "reason": ""})
    seen = json.loads(cowest("status", "--home", place.root, "-o", "json").out)
    told = seen["status"]
    assert list(check(manifest.field_schema("status"), told)) == []
    assert told["budget"]["money"] == "0.0306" and told["budget"]["round"]["money"] == "0.2500"
    assert told["budget"]["live"] == {"day": "2026-11-26", "calls": 9, "tokens": 900, "money": "0.0100"}
    assert told["conditions"][0]["lastTransitionTime"] == "1970-01-01T00:00:05Z"
    assert told["rounds"][1]["startedAt"] == "1970-01-01T00:00:10Z" and told["rounds"][1]["difference"] == "0.1"
    assert told["candidate"]["stage"] == "Canary" and told["traffic"] == {"candidatePercent": 20, "step": 1}
    assert "state" not in told and seen["gateway"] == "http://127.0.0.1:8080/v1"


def test_status_says_what_the_held_out_set_can_show_once_it_was_gone_through(cowest: Any, place: jobs.Home) -> None:
    assert "Held out" not in cowest("status", "--home", place.root).out
    jobs.write_status(place, replace(STATUS, looks=1, sight=api.Sight(500, 0.1, {"rare": 29})))
    said = cowest("status", "--home", place.root).out
    assert "Held out           With 500 held-out queries a gain under 4." in said
    assert "10 % in the last evaluation" in said and "'rare' (29)" in said


def test_status_shows_how_many_traces_a_round_could_learn_from_and_why_not_more(cowest: Any, place: jobs.Home) -> None:
    assert "Traces" not in cowest("status", "--home", place.root).out, "nothing was counted yet"
    counted = {"all": 5, "usable": 3, "reason": f"Not usable: 2 asked again later. {NASTY}"}
    jobs.write_json(place.traces, counted)
    said = cowest("status", "--home", place.root)
    assert said.out.splitlines()[3].startswith(
        "Traces             5 in all, 3 of them a round could learn from (Not usable: 2 asked again later."
    )
    assert json.loads(cowest("status", "--home", place.root, "-o", "json").out)["traces"] == counted


def test_what_was_paid_before_a_kill_is_shown_though_the_status_was_not_written_any_more(
    cowest: Any, place: jobs.Home
) -> None:
    async def pay() -> None:
        async with (
            ScriptedModel("yes") as strong,
            HttpChatModel(strong.url, "m") as model,
            PaidCalls(place.calls, round_number=2) as calls,
        ):
            asked = [{"role": "user", "content": "?"}]
            await calls.ask(model, asked, endpoint=strong.url, name="m", purpose="p", params={})

            await calls.lend(Ask("gateway", 1, spent=Spent(3, 20, 10), wanted=Amount(40)))

    asyncio.run(pay())
    budget = json.loads(cowest("status", "--home", place.root, "-o", "json").out)["status"]["budget"]
    assert budget["calls"] == budget["round"]["calls"] == 1, "the last trial is number 2"
    assert (budget["live"]["calls"], budget["live"]["tokens"]) == (3, 30)
    assert f"live answers on {budget['live']['day']} 3 calls, 30 tokens" in cowest("status", "--home", place.root).out


def test_status_says_whether_a_run_is_alive(cowest: Any, place: jobs.Home) -> None:
    said = cowest("status", "--home", place.root)
    assert said.out.startswith("Nothing runs now, so nothing answers") and said.err == ""
    with jobs.locked(place):
        said = cowest("status", "--home", place.root)
        assert said.code == EXIT_OK and said.err == "" and "Nothing runs now" not in said.out
        assert json.loads(cowest("status", "--home", place.root, "-o", "json").out)["running"] is True


@pytest.mark.parametrize("verb", ["status", "explain"])
@pytest.mark.parametrize(
    ("reason", "by", "shown"),
    [
        pytest.param("Evaluating", f"ann {NASTY}", True, id="while a step runs"),
        pytest.param("Evaluating", None, False, id="nobody paused"),
        pytest.param(api.REASON_PAUSED, "ann", False, id="the loop says so itself"),
    ],
)
def test_a_pause_shows_while_the_step_before_it_goes_on(
    cowest: Any, place: jobs.Home, verb: str, reason: str, by: str | None, shown: bool
) -> None:
    doing = api.Condition(api.ROUND_PROGRESSING, "True", reason, "step r2-evaluate runs.", 1, 5.0)
    jobs.write_status(place, replace(STATUS, conditions=(*STATUS.conditions, doing), paused_by=by))
    (line,) = (each for each in cowest(verb, "--home", place.root).out.splitlines() if "step r2-evaluate" in each)
    assert ("step r2-evaluate runs. Paused by ann" in line) == ("what runs goes on to its end" in line) == shown


def test_status_says_what_waits_to_be_taken_in(cowest: Any, place: jobs.Home) -> None:
    assert "not taken in" not in cowest("status", "--home", place.root).out
    cowest("pause", "--home", place.root, "--by", "ann")
    assert "pause by ann is recorded and not taken in yet." in cowest("status", "--home", place.root).out


def test_a_pause_may_stop_what_runs(cowest: Any, place: jobs.Home) -> None:
    said = json.loads(cowest("pause", "--home", place.root, "--now", "-o", "json").out)
    assert said["now"] is True and jobs.read_actions(place, "")[-1].now is True
    cowest("pause", "--home", place.root)
    assert "now" not in json.loads(max(place.actions.glob("*.json")).read_text())
    doing = api.Condition(api.ROUND_PROGRESSING, "True", "Evaluating", "step r2-evaluate runs.", 1, 5.0)
    jobs.write_status(place, replace(STATUS, conditions=(doing,), paused_by="ann", paused_now=True))
    assert "Paused by ann: nothing runs." in cowest("status", "--home", place.root).out


def test_the_home_is_found_beside_the_manifest(cowest: Any, tmp_path: Path) -> None:
    job = write_manifest(tmp_path)
    said = cowest("status", "-f", job)
    assert said.code == EXIT_BAD_INPUT and "cowest run -f" in said.err
    jobs.write_status(jobs.Home(tmp_path / ".cowest" / "desk"), STATUS)
    assert cowest("status", "-f", job).code == EXIT_OK


@pytest.mark.parametrize("verb", ["status", "explain", "lineage", "report", "replay", "pause"])
def test_without_a_manifest_or_a_home_each_verb_says_what_it_wants(cowest: Any, verb: str) -> None:
    said = cowest(verb, *(["x"] if verb == "lineage" else []))
    assert said.code == EXIT_BAD_INPUT and "wanted -f MANIFEST or --home FOLDER" in said.err


def test_explain_says_each_decision_in_a_sentence(cowest: Any, place: jobs.Home) -> None:
    said = cowest("explain", "--home", place.root)
    lines = said.out.splitlines()
    assert lines[0].startswith("Ready is True (Answering): the pair answers.")
    assert lines[2].startswith("Round 1 (Round): Promoted, SomeReason: round 1 was decided")
    assert lines[3].startswith("Round 2 (Proposal): RolledBack by ann")
    assert "1 pair(s) rolled back by a person" in lines[4]
    assert len(lines) == 7 and lines[5][2] == "-"  # the last events, with their time


def test_explain_as_json_has_the_events_and_leaves_out_a_torn_line(cowest: Any, place: jobs.Home) -> None:
    with place.events.open("a") as file:
        file.write('{"time": 3, "mess')
    seen = json.loads(cowest("explain", "--home", place.root, "-o", "json").out)
    assert [event["reason"] for event in seen["events"]] == ["Reason", "Reason"]
    status = json.loads(cowest("status", "--home", place.root, "-o", "json").out)["status"]
    assert (seen["rounds"], seen["conditions"]) == (status["rounds"], status["conditions"])


# ---------------------------------------------------------------- what people say
@pytest.mark.parametrize("verb", ["pause", "resume", "approve", "promote", "rollback"])
def test_what_a_person_says_is_recorded_with_who_and_why(cowest: Any, place: jobs.Home, verb: str) -> None:
    jobs.write_status(place, replace(STATUS, candidate=w.trial("Canary")))
    said = cowest(verb, "--home", place.root, "--why", "because", "--by", "ann", "-o", "json")
    assert said.code == EXIT_OK
    (action,) = jobs.read_actions(place, "")
    assert (action.verb, action.by, action.why, action.model) == (verb, "ann", "because", None)
    assert json.loads(said.out)["id"] == action.id
    assert jobs.read_actions(place, action.id) == (), "taken in once"


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        pytest.param("approve", "there is no candidate to approve", id="nothing to approve"),
        pytest.param("promote", "there is no candidate and no refused edit", id="nothing to promote"),
        pytest.param("rollback", "there is no earlier pair to go back to", id="nothing to go back to"),
    ],
)
def test_what_would_change_nothing_is_refused_and_not_recorded(
    cowest: Any, place: jobs.Home, verb: str, says: str
) -> None:
    jobs.write_status(place, replace(STATUS, previous=None, serving="StrongAlone"))
    said = cowest(verb, "--home", place.root)
    assert said.code == EXIT_BAD_INPUT and says in said.err and said.out == ""
    assert jobs.read_actions(place, "") == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"candidate": w.trial("Preparing", number=3, origin="Proposal"), "previous": w.STABLE},
            "It ends the trial of round 3 (Proposal), which is being prepared and evaluated.",
            id="a trial goes before a promotion",
        ),
        pytest.param({"previous": w.STABLE}, "It undoes the promotion of round 1.", id="the last promotion"),
        pytest.param({}, "It takes back the only pair, of round 1", id="the only pair"),
    ],
)
def test_a_rollback_says_what_it_ends(cowest: Any, place: jobs.Home, changes: Any, says: str) -> None:
    jobs.write_status(place, replace(STATUS, **changes))
    assert says in cowest("rollback", "--home", place.root).out
    assert "It " not in cowest("rollback", "--home", place.root).out, "the first one is not taken in yet"


@pytest.mark.parametrize("verb", ["pause", "propose", "rollback"])
def test_a_mistyped_home_makes_no_folder(cowest: Any, tmp_path: Path, verb: str) -> None:
    more = ("--model", "hf://org/name@main") if verb == "propose" else ()
    said = cowest(verb, "--home", tmp_path / "typo", *more)
    assert said.code == EXIT_BAD_INPUT and "wanted the state of a job, saw none" in said.err
    assert not (tmp_path / "typo").exists()


def test_a_job_can_be_paused_before_its_first_run(cowest: Any, tmp_path: Path) -> None:
    assert cowest("pause", "-f", write_manifest(tmp_path)).code == EXIT_OK
    assert [a.verb for a in jobs.read_actions(jobs.Home(tmp_path / ".cowest" / "desk"), "")] == ["pause"]


def test_actions_are_in_the_order_in_which_they_were_said(cowest: Any, place: jobs.Home) -> None:
    for verb in ("rollback", "pause", "approve"):
        cowest(verb, "--home", place.root, "--by", NASTY)
    assert [action.verb for action in jobs.read_actions(place, "")] == ["rollback", "pause", "approve"]


def test_a_user_without_a_name_can_say_something_too(
    cowest: Any, place: jobs.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.delenv("COWEST_USER", raising=False)
    assert cowest("pause", "--home", place.root).code == EXIT_OK
    assert jobs.read_actions(place, "")[0].by == f"user {os.getuid()}"


def write_model(folder: Path) -> Path:
    """One that knows no word of the rows."""
    return make_model(folder, ["gamma"], max_position_embeddings=2048)


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def train_on(place: jobs.Home, folder: Path) -> None:
    """The job of this home has training rows here."""
    rows = [{"id": str(i), "query": f"alpha beta {i}", "reference": "1"} for i in range(2)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "held_out.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    data = {"train": (folder / "train.jsonl").as_uri(), "heldOut": (folder / "held_out.jsonl").as_uri()}
    job = manifest.load(write_manifest(folder, **{f"data.{name}": uri for name, uri in data.items()})).job
    jobs.write_json(place.job, {**job, "metadata": {"name": "desk", "generation": 1}})


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        pytest.param(lambda m: (m / "tokenizer.json").unlink(), "--model: ", id="no tokenizer"),
        pytest.param(lambda m: (m / "old.bin").touch(), "saw the pickle file old.bin", id="pickle"),
        pytest.param(
            lambda m: change_json(m / "tokenizer.json", lambda t: t["model"]["vocab"].update(more=9)),
            "Too many: 'more' (9)",
            id="an id without an embedding",
        ),
        pytest.param(
            lambda m: change_json(m / "config.json", lambda c: c.update(num_hidden_layers=3)),
            "mine: wanted all weights of LlamaForCausalLM, saw 9 missing",
            id="too few weights",
        ),
        pytest.param(lambda m: None, "loses most characters of 2 of 2 rows", id="it cannot read the rows"),
    ],
)
def test_propose_refuses_at_once_what_validate_refuses_of_a_base(
    cowest: Any, place: jobs.Home, tmp_path: Path, breakage: Any, message: str
) -> None:
    train_on(place, tmp_path)
    folder = write_model(tmp_path / "mine")
    breakage(folder)
    said = cowest("propose", "--home", place.root, "--model", folder)
    assert said.code == EXIT_BAD_INPUT and message in said.err
    assert jobs.read_actions(place, "") == (), "nothing is recorded"


@pytest.mark.parametrize("given", ["relative", "absolute", "uri", "relative uri"])
def test_propose_takes_a_folder_however_it_is_written(
    cowest: Any, place: jobs.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    folder = write_model(tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    written = {
        "relative": "my model",
        "absolute": str(folder),
        "uri": folder.as_uri(),
        "relative uri": "file://my model",
    }
    assert cowest("propose", "--home", place.root, "--model", written[given]).code == EXIT_OK
    assert jobs.read_actions(place, "")[0].model == folder.as_uri()


def test_propose_refuses_what_is_not_there_and_leaves_other_stores_alone(cowest: Any, place: jobs.Home) -> None:
    said = cowest("propose", "--home", place.root, "--model", "file:///nowhere")
    assert said.code == EXIT_BAD_INPUT and "wanted a model folder" in said.err
    assert jobs.read_actions(place, "") == ()
    cowest("propose", "--home", place.root, "--model", "hf://org/name@main")
    assert jobs.read_actions(place, "")[0].model == "hf://org/name@main"


# ---------------------------------------------------------------- quarantine, erase
def hold_back(place: jobs.Home, *trace_ids: str, reason: str = "Trigger") -> None:
    records = [
        {"id": f"trace-{each}", "trace_id": each, "user": "f" * 64, "application": "", "said_by": "", "reason": reason,
         "why": f"because {NASTY}", "row": {"id": f"trace-{each}", "query": f"what {NASTY}?", "reference": "7"}}
        for each in trace_ids
    ]  # fmt: skip
    path = place.store / "runs" / "r1" / "collect" / "quarantine.jsonl"
    with path.open("ab") as file:
        file.write(quarantine.lines(records))


def test_quarantine_shows_each_trace_and_why(cowest: Any, place: jobs.Home) -> None:
    hold_back(place, "t1", "t2")
    hold_back(place, "t3", reason="UserShare")
    said = cowest("quarantine", "--home", place.root)
    assert said.code == EXIT_OK
    assert said.out.startswith("round 1: 3 traces in quarantine: 2 with a phrase that train does not know")
    assert [line.split()[:2] for line in said.out.splitlines() if "because" in line] == [
        ["t1", "Trigger:"], ["t2", "Trigger:"], ["t3", "UserShare:"],
    ]  # fmt: skip
    assert "1 of 3 are shown" in cowest("quarantine", "--home", place.root, "--limit", "1").out
    few = json.loads(cowest("quarantine", "--home", place.root, "--reason", "UserShare", "-o", "json").out)
    assert [each["trace_id"] for each in few["quarantined"]] == ["t3"]


def test_what_is_released_is_recorded_with_who_and_why(cowest: Any, place: jobs.Home) -> None:
    hold_back(place, "t1", "t2", "t3")
    root = place.store.as_uri()
    said = cowest("quarantine", "--home", place.root, "--release", "t2", "--why", "ours", "--by", "ann")
    assert said.code == EXIT_OK and said.out.startswith("1 traces are released")
    assert quarantine.released(root) == {"t2"}
    (word,) = (place.store / "trust" / "released").iterdir()
    assert {"by": "ann", "why": "ours", "trace_ids": ["t2"]}.items() <= json.loads(word.read_text()).items()
    assert "t2 (released)  Trigger" in cowest("quarantine", "--home", place.root).out
    cowest("quarantine", "--home", place.root, "--release", "all", "--why", "all ours")
    assert quarantine.released(root) == {"t1", "t2", "t3"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--release", "t9", "--why", "x"], "saw none of that id", id="not there"),
        pytest.param(["--release", "t1"], "wanted --why with it", id="no reason"),
        pytest.param(["--round", "7"], "wanted a round that has frozen its data, saw 1", id="no such round"),
        pytest.param(["--reason", "Mood"], "wanted one of Trigger, NearCopies", id="no such reason"),
    ],
)
def test_quarantine_refuses_what_makes_no_sense(
    cowest: Any, place: jobs.Home, arguments: list[str], words: str
) -> None:
    hold_back(place, "t1")
    said = cowest("quarantine", "--home", place.root, *arguments)
    assert said.code == EXIT_BAD_INPUT and words in said.err
    assert quarantine.released(place.store.as_uri()) == frozenset()


def test_erase_takes_a_users_texts_out_and_says_what_saw_them(cowest: Any, place: jobs.Home) -> None:
    ann = user_hash("ann")
    record(place, trace("of-ann", user_hash=ann, messages="[]"), trace("of-bob", user_hash=user_hash("bob")))
    give(place, {"trace_id": "of-ann", "comment": "mine", "score": 1.0, "source": ann})
    dry = cowest("erase", "--home", place.root, "--user", "ann", "--dry-run")
    assert "the texts of 1 traces and 1 words of feedback would go" in dry.out and "No model saw it." in dry.out
    said = json.loads(cowest("erase", "--home", place.root, "--user", "ann", "--why", "asked", "-o", "json").out)
    assert (said["user"], said["traces"], said["models"]) == (ann, 1, [])
    assert any("exported" in each for each in said["not_reached"])
    rows = {row["trace_id"]: row for row in read_traces(place.store.as_uri()).to_pylist()}
    assert (rows["of-ann"]["answer"], rows["of-ann"]["user_hash"], rows["of-bob"]["answer"]) == (None, "", NASTY)
    assert read_feedback(place.store.as_uri()).to_pylist()[0]["comment"] is None


@pytest.mark.parametrize("arguments", [[], ["--user", "ann", "--user-hash", "ab"], ["--user", ""]])
def test_erase_wants_to_know_whose(cowest: Any, place: jobs.Home, arguments: list[str]) -> None:
    assert cowest("erase", "--home", place.root, *arguments).code == EXIT_BAD_INPUT


def test_erase_waits_for_a_job_that_runs(cowest: Any, place: jobs.Home) -> None:
    with place.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = cowest("erase", "--home", place.root, "--user", "ann")
        assert said.code == EXIT_BAD_INPUT and "Stop `cowest run` first" in said.err
        assert cowest("erase", "--home", place.root, "--user", "ann", "--dry-run").code == EXIT_OK


def test_no_run_begins_while_a_users_data_are_erased(
    cowest: Any, place: jobs.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, really = list[bool](), forget.erase

    def erase(*told: Any, **named: Any) -> str:
        seen.append(jobs.runs(place))
        return really(*told, **named)

    monkeypatch.setattr(forget, "erase", erase)
    assert cowest("erase", "--home", place.root, "--user", "ann").code == EXIT_OK
    assert seen == [True] and not jobs.runs(place)


# ---------------------------------------------------------------- lineage
def test_lineage_goes_from_an_answer_back_to_the_data(cowest: Any, place: jobs.Home) -> None:
    record(place, trace("answer-1"))
    said = cowest("lineage", "answer-1", "--home", place.root)
    assert said.code == EXIT_OK
    assert "trace_id        answer-1" in said.out and "[/red] [bold]loud" in said.out
    steps = [line.split()[:2] for line in said.out.splitlines() if " <- " in line]
    assert steps == [["dpo", "sha256:tuned"], ["feedback", "sha256:ledger"], ["sft", "sha256:first"],
                     ["collect", "sha256:frozen"]]  # fmt: skip


def test_lineage_knows_a_model_by_the_start_of_its_digest(cowest: Any, place: jobs.Home) -> None:
    seen = json.loads(cowest("lineage", "fir", "--home", place.root, "-o", "json").out)
    assert seen["answer"] is None and [part["step"] for part in seen["models"]] == ["sft"]


def test_lineage_of_an_answer_without_a_draft_has_no_models(cowest: Any, place: jobs.Home) -> None:
    record(place, trace("alone", weak_digest="", mode="StrongAlone"))
    seen = json.loads(cowest("lineage", "alone", "--home", place.root, "-o", "json").out)
    assert seen["answer"]["mode"] == "StrongAlone" and seen["models"] == [] and seen["feedback"] == []


def test_lineage_of_an_answer_without_a_draft_says_so_and_shows_no_empty_lines(cowest: Any, place: jobs.Home) -> None:
    record(place, trace("alone", weak_digest="", draft="", prompts_digest=None, mode="StrongAlone"))
    lines = cowest("lineage", "alone", "--home", place.root).out.splitlines()
    assert "draft           none: the strong model answered alone" in lines
    assert all(len(line.split()) > 1 for line in lines) and not any("None" in line for line in lines)


def test_lineage_of_an_answer_shows_what_its_users_said(cowest: Any, place: jobs.Home) -> None:
    record(place, trace("answer-1"), trace("answer-2"))
    late = {"trace_id": "answer-1", "reference": f"the right one {NASTY}"}
    give(place, {"trace_id": "answer-1", "score": 0.0}, late, {"trace_id": "answer-2", "score": 1.0})
    lines = cowest("lineage", "answer-1", "--home", place.root).out.splitlines()
    words = [line.split("+00:00 ")[1] for line in lines if line.startswith("feedback  ")]
    assert words[0] == "score 0.0" and words[1].startswith("reference the right one") and len(words) == 2
    seen = json.loads(cowest("lineage", "answer-1", "--home", place.root, "-o", "json").out)["feedback"]
    assert [word["score"] for word in seen] == [0.0, None]


def evaluated(place: jobs.Home) -> None:
    """The baseline alone, then the tuned pair, which got as far as the second step of its canary."""
    write_evaluation(place, 0, 0.6, "plain", candidate=w.STABLE.digest, control="solo", evaluator_digest="sha256:old")
    write_evaluation(place, 1, 0.7, "better", strong_version="fp_1")
    for step, scored in ((0, 20), (1, 60)):
        live = w.live(scored, 200, step=step, pending=("answer-9",), answers={"candidate": 70, "control": 250})
        jobs.write_json(place.store / "runs" / "r1" / f"live-{step}.json", asdict(live))
    jobs.write_json(place.store / "runs" / "r1" / "live-1.decided.json", {"report": asdict(live)})


def test_lineage_of_an_answer_says_by_what_its_pair_was_measured(cowest: Any, place: jobs.Home) -> None:
    evaluated(place)
    record(place, trace("answer-1"))
    lines = cowest("lineage", "answer-1", "--home", place.root).out.splitlines()
    assert [line for line in lines if line.startswith("measured")] == [
        f"measured        round 1: 70.0 % on 500 held-out queries, control {w.STABLE.digest} 50.0 %,"
        " strong model alone 30.0 %",
        "measured_by     round 1: evaluator sha256:evaluator, held-out rows sha256:held, strong model strong-1,"
        " version fp_1",
        "measured_live   round 1, canary step 1: +10.0 points; scored are 20 of 70 answers, of control"
        f" {w.STABLE.digest} 200 of 250",
        "measured_live   round 1, canary step 2: +10.0 points; scored are 60 of 70 answers, of control"
        f" {w.STABLE.digest} 200 of 250",
    ]
    seen = json.loads(cowest("lineage", "answer-1", "--home", place.root, "-o", "json").out)["measured"]
    (evaluation,) = seen["evaluations"]
    assert (evaluation["round"], evaluation["evaluator_digest"]) == (1, "sha256:evaluator")
    assert (evaluation["held_out_digest"], evaluation["strong_version"]) == ("sha256:held", "fp_1")
    assert evaluation["uri"] == (place.store / "runs" / "r1" / "evaluate" / "report.json").as_uri()
    assert [(live["step"], live["scored"]["candidate"]) for live in seen["live"]] == [(0, 20), (1, 60)]
    assert "pending" not in seen["live"][0], "what only a replay wants"


def test_lineage_of_an_answer_by_the_first_pair_names_its_own_evaluation(cowest: Any, place: jobs.Home) -> None:
    evaluated(place)
    record(place, trace("answer-1", pair_digest=w.STABLE.digest, weak_digest="sha256:first"))
    lines = cowest("lineage", "answer-1", "--home", place.root).out.splitlines()
    assert [line for line in lines if line.startswith("measured")] == [
        "measured        round 0: 60.0 % on 500 held-out queries, strong model alone 30.0 %",
        "measured_by     round 0: evaluator sha256:old, held-out rows sha256:held, strong model strong-1, which named"
        " no version",
    ]


def test_lineage_of_a_pair_that_no_round_has_evaluated_says_so(cowest: Any, place: jobs.Home) -> None:
    record(place, trace("early", pair_digest="sha256:declared", weak_digest="", mode="StrongAlone"))
    lines = cowest("lineage", "early", "--home", place.root).out.splitlines()
    assert "measured        not yet: no round has evaluated this pair on held-out rows" in lines
    seen = json.loads(cowest("lineage", "early", "--home", place.root, "-o", "json").out)
    assert seen["measured"] == {"evaluations": [], "live": []}


def test_lineage_of_nothing_known_says_so(cowest: Any, place: jobs.Home) -> None:
    said = cowest("lineage", "nothing", "--home", place.root)
    assert said.code == EXIT_BAD_INPUT and "wanted a request id" in said.err


# ---------------------------------------------------------------- report
class Page(HTMLParser):
    """Tags, and all that a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data") or name[:2] == "on"
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_loads_nothing_and_runs_nothing(cowest: Any, place: jobs.Home) -> None:
    page = place.root / "out" / "report.html"
    said = cowest("report", "--home", place.root, "--html", page, "--domain", f"desk {NASTY}")
    assert said.code == EXIT_OK, said.err
    text = page.read_text("utf-8")
    seen = Page()
    seen.feed(text)
    assert "script" not in seen.tags and "link" not in seen.tags and "img" not in seen.tags
    assert seen.loads == [] and "url(" not in text and "@import" not in text
    assert "<script>alert(1)</script>" in seen.text, "the text is shown, not left out"
    assert "better 0" in seen.text and "plain 0" in seen.text and "70.0 %" in seen.text
    assert not CONTROL.search(text)


def test_the_figures_have_arms_rounds_and_what_is_stable(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    flags = ("--html", tmp_path / "r.html", "--json", tmp_path / "r.json", "--seconds", "12.4")
    said = cowest("report", "--home", place.root, *flags, "-o", "json")
    figures = json.loads(said.out)
    assert figures == json.loads((tmp_path / "r.json").read_text())
    assert (figures["domain"], figures["seconds"]) == ("desk", 12)
    assert {name: arm["accuracy"] for name, arm in figures["arms"].items()} == {
        "solo": 0.3, "weak": 0.2, "sft": 0.6, "final": 0.7, "weak_final": 0.2,
    }  # fmt: skip
    assert figures["arms"]["final"]["n"] == figures["arms"]["final"]["strong_calls"] == 500
    assert [(r["number"], r["decision"], r["pairs"]) for r in figures["rounds"]] == [
        (0, "Promoted", None), (1, "Promoted", 321), (2, "RolledBack", None),
    ]  # fmt: skip
    assert figures["stable"] == {"digest": w.CANDIDATE.digest, "round": 1}


def test_what_feedback_saw_stands_in_the_order_of_its_steps_and_a_chat_is_shown_whole(
    cowest: Any, place: jobs.Home, tmp_path: Path
) -> None:
    figures = {"own": 1, "pairs": 321, "queries": 9, "drafts": 18}
    write_artifact(place, "r1/feedback", "Feedback", "sha256:ledger", {}, figures)
    for number in (0, 1):
        items = place.store / "runs" / f"r{number}" / "evaluate" / "items.parquet"
        rows = [row | {"conversation": f"user:\n{row['query']} before"} for row in pq.read_table(items).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), items)
    cowest("report", "--home", place.root, "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    words = ("queries that were asked", "drafts of the weak model", "preference pairs", "own")
    at = [page.index(f"<td>{text}</td>") for text in words]
    assert at == sorted(at)
    assert "<pre>user:\nquery 0" in page


def test_the_longest_label_of_a_bar_begins_inside_of_the_picture(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    jobs.write_status(place, replace(STATUS, standing="Chosen"))
    cowest("report", "--home", place.root, "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    labels = re.findall(r'<text x="(\d+)" y="\d+" text-anchor="end">([^<]+)<', page)
    assert "pair, promoted by a person" in [text for _, text in labels]
    assert all(int(right) >= 7 * len(text) for right, text in labels), "13 px letters are 7 wide at most"


def table_row(page: str, name: str) -> list[str]:
    """The cells of the row of a table that begins with this text."""
    (row,) = (r for r in page.split("<tr>") if re.match(rf"<td[^>]*>{re.escape(name)}<", r))
    return re.findall(r"<td[^>]*>([^<]*)</td>", row)


@pytest.mark.parametrize(
    ("standing", "name"),
    [("Passed", "pair, last promoted"), ("Chosen", "pair, promoted by a person"), ("NotPassed", "pair, not promoted")],
)
def test_the_stable_pair_is_called_what_it_is(
    cowest: Any, place: jobs.Home, tmp_path: Path, standing: Any, name: str
) -> None:
    jobs.write_status(place, replace(STATUS, standing=standing))
    assert cowest("report", "--home", place.root, "--html", tmp_path / "r.html").code == EXIT_OK
    page = (tmp_path / "r.html").read_text()
    assert table_row(page, name)[1] == "70.0 %" and table_row(page, "pair, first weak model")[1] == "60.0 %"


def test_a_refused_baseline_has_one_row_and_is_not_called_promoted(
    cowest: Any, place: jobs.Home, tmp_path: Path
) -> None:
    jobs.write_status(place, replace(STATUS, stable_round=0, standing="NotPassed", rounds=()))
    cowest("report", "--home", place.root, "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert table_row(page, "pair, first weak model, not promoted")[1] == "60.0 %"
    assert "last promoted" not in page.partition("<h2>Rounds")[0]


def test_scores_by_another_evaluator_are_not_shown_beside_others_without_a_word(
    cowest: Any, place: jobs.Home, tmp_path: Path
) -> None:
    cowest("report", "--home", place.root, "--html", tmp_path / "r.html")
    assert "different scales" not in (tmp_path / "r.html").read_text()
    write_evaluation(place, 3, 0.7, "better", evaluator_digest="sha256:new")
    cowest("report", "--home", place.root, "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Scores of rounds 0, 1 were measured with another evaluator than those of round 3" in page


def test_groups_of_the_held_out_rows_are_slices_of_the_report(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    flags = ("--home", place.root, "--html", tmp_path / "r.html", "-o", "json")
    assert json.loads(cowest("report", *flags).out)["slices"] == []
    assert "Slices" not in (tmp_path / "r.html").read_text()
    write_evaluation(place, 0, 0.6, "plain", control="solo", slices=(SliceReport("first", 40, 0.5, 0.4, 0.6),))
    write_evaluation(place, 1, 0.7, "better", slices=(SliceReport(f"of 1 {NASTY}", 40, 0.125, 0.05, 0.2),))
    write_evaluation(place, 2, 0.5, "worse", slices=(SliceReport("of 2", 31, -0.25, -0.5, -0.01),))
    told = json.loads(cowest("report", *flags).out)["slices"]
    assert [(part["round"], part["control"]) for part in told] == [
        (0, "solo"), (1, w.STABLE.digest), (2, w.STABLE.digest),
    ]  # fmt: skip
    assert told[2]["groups"] == [{"group": "of 2", "n": 31, "difference": -0.25, "low": -0.5, "high": -0.01}]
    page = (tmp_path / "r.html").read_text()
    slices = page.partition("<h2>Slices")[2].partition("<h2>Rounds")[0]
    assert "Round 1, Promoted" in slices and "Round 2, RolledBack" in slices and "Round 0" not in slices
    assert table_row(slices, "of 2") == ["of 2", "31", "-25.0", "-50.0 to -1.0"]
    assert "of 1" in slices and "<script>" not in slices


def test_how_the_evaluator_agrees_with_people_stands_in_the_report(
    cowest: Any, place: jobs.Home, tmp_path: Path
) -> None:
    flags = ("--home", place.root, "--html", tmp_path / "r.html", "-o", "json")
    assert "calibration" not in json.loads(cowest("report", *flags).out)
    beside = CalibrationReport(200, 0.9, 0.85, 0.94, 0.7, 0.6, 0.8, 3, 10, 0.4, "sha256:labels")
    write_evaluation(place, 1, 0.7, "better", calibration=beside)
    (told,) = json.loads(cowest("report", *flags).out)["calibration"]
    assert (told["round"], told["kappa"], told["kappa_low"]) == (1, 0.7, 0.6)
    people = (tmp_path / "r.html").read_text().partition("<h2>The evaluator beside people")[2]
    assert table_row(people.partition("<h2>Rounds")[0], "1") == [
        "1", "200", "90.0 %", "85.0 to 94.0 %", "0.70", "0.60 to 0.80", "3", "40.0 % of 10",
    ]  # fmt: skip


def test_live_answers_stand_beside_the_steps_in_calls_and_money(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    metrics = {"strong_calls": 7, "input_tokens": 70, "output_tokens": 7, "money": 0.125, "cut_answers": 3}
    write_artifact(place, "r1/feedback", "Feedback", "sha256:ledger", {}, metrics)
    answered = {"answer_ms": 5.0, "strong_input_tokens": 200_000, "strong_output_tokens": 30_000}
    record(place, trace("a", **answered), trace("b", **answered), trace("c", mode="WeakAlone", strong_input_tokens=0))
    flags = ("--home", place.root, "--html", tmp_path / "r.html", "-o", "json")
    live = json.loads(cowest("report", *flags).out)["live"]
    assert live == {"calls": 2, "input_tokens": 400_000, "output_tokens": 60_000, "money": pytest.approx(1.0)}
    page = (tmp_path / "r.html").read_text()
    assert table_row(page, "live answers")[1:] == ["2", "400000", "60000", "1.00 EUR"]
    assert table_row(page, "all steps")[1:] == ["0", "0", "0", "0.00 EUR"], "the book is empty"
    assert table_row(page, "of these, feedback of round 1")[1:] == ["7", "70", "7", "0.12 EUR"]
    assert table_row(page, "answers cut off at spec.strong.maxTokens")[1:] == ["3"]


def test_no_money_is_shown_without_prices(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    job = manifest.load(write_manifest(tmp_path)).job
    jobs.write_json(place.job, {**job, "metadata": {"name": "desk", "generation": 1}})
    record(place, trace("a", answer_ms=5.0, strong_input_tokens=9, strong_output_tokens=None))
    assert cowest("report", "--home", place.root, "--html", tmp_path / "r.html").code == EXIT_OK
    assert table_row((tmp_path / "r.html").read_text(), "live answers")[1:] == ["1", "9", "0"]


def test_macro_f1_is_shown_where_labels_were_scored(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    flags = ("--home", place.root, "--html", tmp_path / "r.html", "-o", "json")
    assert "macro_f1" not in cowest("report", *flags).out and "macro-F1" not in (tmp_path / "r.html").read_text()
    means = {"candidate": 0.6, "control": 0.5, "solo": 0.3, "weak": 0.2}
    arms = tuple(ArmReport(n, 500, m, m - 0.03, m + 0.03, 0.05, macro_f1=m - 0.1) for n, m in means.items())
    write_evaluation(place, 0, 0.6, "plain", arms=arms)
    figures = json.loads(cowest("report", *flags).out)
    assert figures["arms"]["solo"]["macro_f1"] == pytest.approx(0.2)
    page = (tmp_path / "r.html").read_text()
    assert table_row(page, "pair, first weak model")[3] == "50.0 %" and table_row(page, "pair, last promoted")[3] == ""


def test_a_report_before_the_first_evaluation_says_what_there_is(cowest: Any, tmp_path: Path) -> None:
    home = jobs.Home(tmp_path / "home")
    said = cowest("report", "--home", home.root, "--html", tmp_path / "r.html")
    assert said.code == EXIT_BAD_INPUT and "Run it first" in said.err
    jobs.write_json(home.job, manifest.load(write_manifest(tmp_path)).job)
    said = cowest("report", "--home", home.root, "--html", tmp_path / "r.html", "-o", "json")
    assert said.code == EXIT_OK and json.loads(said.out)["arms"] == {}
    assert "No candidate was promoted" in (tmp_path / "r.html").read_text()


def test_a_refused_pair_is_shown_by_its_drafts_and_answers(cowest: Any, tmp_path: Path) -> None:
    home = jobs.Home(tmp_path / "home")
    jobs.write_json(home.job, manifest.load(write_manifest(tmp_path)).job)
    write_evaluation(home, 0, 0.3, "plain")
    assert cowest("report", "--home", home.root, "--html", tmp_path / "r.html").code == EXIT_OK
    page = (tmp_path / "r.html").read_text()
    assert "No candidate was promoted" in page
    assert "another answer than alone on 10 of 10 queries, and one of another score on 2." in page
    shown = [re.findall(r"<pre>([^<]*)</pre>", row) for row in page.split("<tr>") if "<pre>" in row]
    assert [cells[0][:7] for cells in shown] == ["query 8", "query 9", "query 0", "query 1"]
    assert shown[0][2].startswith("plain 8") and shown[0][3] == "no idea" and shown[0][4].startswith("answer")
    assert page.count(">+1</td>") == 2 and page.count(">+0</td>") == 2


# ---------------------------------------------------------------- plan, run
def write_rows(path: Path, prefix: str, count: int) -> None:
    rows = [{"id": f"{prefix}{i}", "query": f"{prefix} question {i * 7919}", "reference": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_weak_model(folder: Path) -> None:
    known = ["train held question", *(str(i * 7919) for i in range(200))]
    make_model(folder, known, max_position_embeddings=2048)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", "train", 50)
    write_rows(tmp_path / "held_out.jsonl", "held", 200)
    prices = {"inputPerMillionTokens": "1", "outputPerMillionTokens": "10"}
    write_weak_model(tmp_path / "weak")
    return write_manifest(tmp_path, **{
        "weak.model": "file://weak",
        "data.train": "file://train.jsonl", "data.heldOut": "file://held_out.jsonl", "strong.prices": prices,
        "rounds.max": 1000, "feedback.draftsPerQuery": 4, "feedback.minPairs": 1, "gateway.port": free_port(),
    })  # fmt: skip


def test_plan_bounds_calls_tokens_and_money(cowest: Any, job: Path) -> None:
    seen = json.loads(cowest("plan", "-f", job, "-o", "json").out)
    baseline, tuned = seen["parts"]
    assert (baseline["calls"], tuned["calls"]) == (200 + 200, 50 * 4 + 4 + 200)
    assert baseline["money"] > 0 and seen["maxRounds"] == 1000
    said = cowest("plan", "-f", job)
    assert "50 training rows, 200 held-out rows" in said.out and "404 calls" in said.out
    assert "upper bounds of what is paid:" in said.out and "Steps count answers" in said.out
    assert "(at most 1000 times)" in said.out and baseline["currency"] in said.out


def test_plan_says_what_the_held_out_rows_can_show(cowest: Any, job: Path) -> None:
    said = cowest("plan", "-f", job).out
    assert "With 200 held-out queries a gain under 8.7 points will most likely not be seen (look 1" in said
    assert "20 % assumed" in said
    seen = json.loads(cowest("plan", "-f", job, "-o", "json").out)
    assert seen["smallestGainPoints"] == pytest.approx(8.7, abs=0.03)
    assert (seen["discordantAssumed"], seen["smallSlices"]) == (True, {})
    rows = [json.loads(line) for line in (job.parent / "held_out.jsonl").read_text().splitlines()]
    named = [{**row, "group": "rare" if i < 40 else "bulk_y"} for i, row in enumerate(rows)]
    (job.parent / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    assert "maxSliceLossPoints = 10: 'rare' (40); 150 queries each would do" in cowest("plan", "-f", job).out


def test_plan_goes_by_what_the_last_evaluation_of_these_rows_showed(cowest: Any, job: Path) -> None:
    declared = jobs.load(job).job
    home = jobs.home_of(job, None)
    sight = api.Sight(200, 0.05, {"bulk_y": 160})
    seen = replace(w.SERVED, held_out=declared.spec.data.held_out, looks=1, sight=sight)
    jobs.write_status(home, seen)
    assert jobs.read_status(home).sight == sight, "names of slices stay as they are"
    said = cowest("plan", "-f", job).out
    assert "a gain under 5.0 points" in said and "5 % in the last evaluation" in said and "look 2" in said
    jobs.write_status(home, replace(seen, held_out="file:///others.jsonl"))
    assert "20 % assumed" in cowest("plan", "-f", job).out, "other rows, other discordance"


def test_plan_counts_the_looks_of_the_home_that_is_named(cowest: Any, job: Path, tmp_path: Path) -> None:
    declared, home = jobs.load(job), jobs.Home(tmp_path / "elsewhere")
    jobs.write_status(home, replace(w.SERVED, held_out=declared.job.spec.data.held_out, looks=4))
    assert "(look 1 " in cowest("plan", "-f", job).out
    assert "(look 5 " in cowest("plan", "-f", job, "--home", home.root).out
    jobs.write_json(home.job, {**declared.document, "metadata": {"name": "other"}})
    said = cowest("plan", "-f", job, "--home", home.root)
    assert said.code == EXIT_BAD_INPUT and f"wanted the job other, whose state is in {home.root}" in said.err


def test_plan_says_what_the_steps_of_the_last_round_took(cowest: Any, job: Path) -> None:
    assert json.loads(cowest("plan", "-f", job, "-o", "json").out)["lastSteps"] is None
    assert "The steps of round" not in cowest("plan", "-f", job).out
    for name in ("collect", "evaluate"):
        write_artifact(jobs.home_of(job, None), f"r1/{name}", "Dataset", "sha256:x", {})
    assert "The steps of round 1 took: collect 1 s, evaluate 1 s.\n" in cowest("plan", "-f", job).out
    seen = json.loads(cowest("plan", "-f", job, "-o", "json").out)["lastSteps"]
    assert seen == {"round": 1, "seconds": {"collect": 1.0, "evaluate": 1.0}}


def test_run_asks_before_it_spends_much_and_nobody_there_is_no(cowest: Any, job: Path) -> None:
    said = cowest("run", "-f", job)
    assert said.code == EXIT_BAD_INPUT and "wanted --yes" in said.err
    assert not (job.parent / ".cowest" / "desk" / "status.json").exists()


def test_run_says_as_json_why_it_ended(cowest: Any, job: Path) -> None:
    said = cowest("run", "-f", job, "-o", "json")
    ended = json.loads(said.out)
    assert ended["code"] == said.code == EXIT_BAD_INPUT and "wanted --yes" in ended["error"]


def test_run_refuses_a_port_that_there_is_none_of(cowest: Any, job: Path) -> None:
    said = cowest("run", "-f", job, "--port", "70000")
    assert said.code == EXIT_BAD_INPUT and "less than or equal to 65535" in said.err


def test_run_asks_above_an_amount_of_money_too(cowest: Any, job: Path) -> None:
    edits = {"strong.prices.outputPerMillionTokens": "1000", "rounds.max": 1}
    job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))
    said = cowest("run", "-f", job)
    assert said.code == EXIT_BAD_INPUT and "USD: wanted --yes" in said.err


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        pytest.param(401, EXIT_BAD_INPUT, "No API key was sent. Declare strong.apiKeySecretRefs.", id="no key"),
        pytest.param(404, EXIT_BAD_INPUT, "and the name of the model.", id="no model"),
        pytest.param(Fault(429, {"retry-after": "600"}), EXIT_RETRY, "Wait 600 s", id="too many requests"),
        pytest.param(500, EXIT_RETRY, "a fault on its side. Try again", id="a fault"),
        pytest.param("garbage", EXIT_BAD_INPUT, "instead of a chat completion", id="no chat endpoint"),
        pytest.param("hang", EXIT_RETRY, "gave no answer within 1.0 s", id="it hangs"),
        pytest.param("drop", EXIT_RETRY, "cannot be reached or broke off", id="it breaks off"),
    ],
)
def test_a_strong_endpoint_that_fails_is_told_before_anything_is_started(
    cowest: Any, job: Path, fault: Any, code: int, says: str
) -> None:
    with ScriptedModel("yes", faults=[fault] * 9).in_thread() as strong:
        seconds = 1 if fault == "hang" else 60
        edits = {"strong.endpoint": strong.url, "strong.timeoutSeconds": seconds, "strong.maxRetries": 0}
        job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))
        said = cowest("run", "-f", job, "--yes")
        assert said.code == code and says in said.err
        assert [call.body["max_tokens"] for call in strong.calls] == [1]
    assert not (job.parent / ".cowest" / "desk" / "status.json").exists()


def test_plan_says_which_limit_would_stop_the_round_and_how_long_calls_may_take(cowest: Any, job: Path) -> None:
    edits = {"strong.budget": {"callsPerRound": 202, "moneyPerDay": "1000"}, "strong.maxConcurrency": 10}
    job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))
    said = cowest("plan", "-f", job).out
    assert "budget.callsPerRound = 202 stops the tuned round at 50 % of its bound of 404" in said
    assert "moneyPerDay" not in said
    seen = json.loads(cowest("plan", "-f", job, "-o", "json").out)
    assert len(seen["limits"]) == 2 and seen["longestHours"][0] == pytest.approx(40 * 60 / 3600)


def test_plan_refuses_what_validate_refuses(cowest: Any, job: Path) -> None:
    job.write_text(yaml.safe_dump(edited({"gate.minHeldOut": 201}, yaml.safe_load(job.read_text()))))
    for verb in ("validate", "plan", "run"):
        said = cowest(verb, "-f", job)
        assert said.code == EXIT_BAD_INPUT and "gate.minHeldOut = 201 rows, saw 200" in said.err


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_rows_are_read_from_the_store_of_the_manifest(
    cowest: Any, job: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COWEST_S3_ENDPOINT", "COWEST_S3_PATH_STYLE", "AWS_REGION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and again when this is over
    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = {"bucket": "models", "endpoint": f"http://127.0.0.1:{server.server_port}", "pathStyle": True}
        edits = {"objectStore": place, "data.train": "s3://rows/train.jsonl"}
        job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))
        said = cowest(verb, "-f", job)
        server.shutdown()
    assert said.code != 0 and asked and all(path.startswith("/rows") for path in asked), said


def test_all_problems_of_the_rows_are_listed_for_who_asks(cowest: Any, job: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    again = [{**row, "id": f"again-{row['id']}"} for row in rows[:8]]
    train.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    few = cowest("validate", "-f", job)
    assert few.code == EXIT_BAD_INPUT and "and 3 more" in few.err and "--all-problems" in few.err
    whole = cowest("validate", "-f", job, "--all-problems")
    assert whole.code == EXIT_BAD_INPUT and whole.err.count("the query is that of") == 8
    said = cowest("validate", "-f", job, "-o", "json")
    assert said.code == EXIT_BAD_INPUT and len(json.loads(said.out)["problems"]) == 8


@pytest.mark.parametrize(
    ("field", "sizes"),
    [
        pytest.param("train", "job.yaml: valid, 200 held-out rows.", id="training rows in a store"),
        pytest.param("heldOut", "job.yaml: valid, 50 training rows.", id="held-out rows in a store"),
    ],
)
def test_validate_says_what_it_has_not_read_and_reads_the_rest(
    cowest: Any, job: Path, tmp_path: Path, field: str, sizes: str
) -> None:
    def edit(**edits: Any) -> None:
        job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))

    edit(**{f"data.{field}": "s3://bucket/rows.jsonl"})
    said = cowest("validate", "-f", job)
    assert said.code == EXIT_OK and said.out.endswith(f"{sizes}\n")
    note = f"note: spec.data.{field} was not read here (s3://bucket/rows.jsonl): `cowest plan` reads it.\n"
    assert said.err == note
    edit(**{"weak.model": "hf://org/name@main"})
    assert "spec.weak.model was not looked at here (hf://org/name@main)" in cowest("validate", "-f", job).err
    assert cowest("validate", "-f", job, "--no-data").err == "", "who wants no data read knows it"
    local = "held_out" if field == "train" else "train"
    (tmp_path / f"{local}.jsonl").write_text("{}\n{}\n")
    said = cowest("validate", "-f", job)
    assert said.code == EXIT_BAD_INPUT and f"rows of file://{tmp_path}/{local}.jsonl" in said.err


def test_supervised_tuning_without_anything_to_learn_from_is_refused(cowest: Any, job: Path) -> None:
    job.write_text(yaml.safe_dump(edited({"training.sft": "Always"}, yaml.safe_load(job.read_text()))))
    for verb in ("validate", "plan", "run"):
        said = cowest(verb, "-f", job)
        assert said.code == EXIT_BAD_INPUT
        assert "spec.training.sft: Always wanted training rows with an `explanation`, saw none in 50 rows" in said.err
    elsewhere = edited({"data.train": "s3://bucket/rows.jsonl"}, yaml.safe_load(job.read_text()))
    job.write_text(yaml.safe_dump(elsewhere))
    assert cowest("validate", "-f", job).code == EXIT_OK, "nothing is known of rows that are not read"


@pytest.mark.parametrize(
    ("edits", "code", "says"),
    [
        pytest.param({"feedback.minPairs": 50}, EXIT_OK, "", id="a pair of each row is enough"),
        pytest.param({"feedback.minPairs": 51}, EXIT_OK, "50 training rows give 50 pairs at most", id="one too many"),
        pytest.param({"feedback.minPairs": 51, "rounds.max": 0}, EXIT_OK, "", id="no round at all"),
        pytest.param({"feedback.minPairs": 51, "rounds.trigger.newTraces": 1}, EXIT_OK, "", id="traces are waited for"),
        pytest.param(
            {"feedback.minPairs": 52, "rounds.trigger.newTraces": 1},
            EXIT_OK,
            "50 training rows and 1 new traces give 51 pairs at most",
            id="too few traces are waited for",
        ),
        pytest.param({"feedback.minPairs": 100, "feedback.rule": "SignOfGain"}, EXIT_OK, "", id="two pairs of a row"),
        pytest.param(
            {"feedback.minPairs": 101, "feedback.rule": "SignOfGain"},
            EXIT_OK,
            "50 training rows give 100 pairs at most (SignOfGain)",
            id="three pairs of a row",
        ),
        pytest.param(
            {"feedback.minPairs": 51, "traces.contentSamplePercent": 0, "canary.signal": "Feedback"},
            EXIT_BAD_INPUT,
            "spec.feedback.minPairs: wanted 51 pairs, saw that 50 training rows and no texts of traces",
            id="no trace can be learnt from",
        ),
        pytest.param(
            {"feedback.minPairs": 99, "feedback.maxQueries": 49, "feedback.rule": "SignOfGain"},
            EXIT_BAD_INPUT,
            "saw that feedback.maxQueries queries give 98 at most",
            id="more than the queries of a round give",
        ),
    ],
)
def test_rounds_that_can_find_too_few_pairs_are_told_before_they_are_paid(
    cowest: Any, job: Path, edits: dict[str, Any], code: int, says: str
) -> None:
    job.write_text(yaml.safe_dump(edited(edits, yaml.safe_load(job.read_text()))))
    for verb in ("validate", "plan"):
        said = cowest(verb, "-f", job)
        told = said.out + said.err
        assert said.code == code and says in told and ("TooFewPairs" in told) == bool(says)


def test_braces_that_nothing_fills_are_noted(cowest: Any, job: Path) -> None:
    prompts = {"refine": '{Query} {query} {unknown} {"a": {draft}}', "solo": "{{query}}"}
    job.write_text(yaml.safe_dump(edited({"collaboration.prompts": prompts}, yaml.safe_load(job.read_text()))))
    for verb in ("validate", "plan"):
        said = cowest(verb, "-f", job)
        told = said.out + said.err
        assert said.code == EXIT_OK and told.count("the template ") == 3
        assert "note: the template refine has {Query}, which nothing fills" in told and "Is {query} meant?" in told
        assert "note: the template refine has {unknown}, which nothing fills: the model sees it as it is.\n" in told
        assert "note: the template solo has {{query}}, of which a pair of braces stays: write {query}." in told


def test_points_in_references_that_may_part_thousands_are_noted(cowest: Any, job: Path, tmp_path: Path) -> None:
    for name in ("train", "held_out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | {"reference": "1.234"}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    job.write_text(yaml.safe_dump(edited({"feedback.evaluator.type": "Numeric"}, yaml.safe_load(job.read_text()))))
    for verb in ("validate", "plan"):
        said = cowest(verb, "-f", job)
        assert "note: 250 of 250 references look like '1.234', which is read with a" in said.out + said.err


_BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("pyarrow", "numpy", "torch", "transformers")))  # as if they were not installed
sys.argv = ["cowest", *sys.argv[1:]]
runpy.run_module("cowest_cli", run_name="__main__")
"""


def bare(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", _BARE, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_the_packages_that_read_data_and_load_models_a_manifest_is_checked(job: Path) -> None:
    said = bare("validate", "-f", job)
    assert said.returncode == EXIT_OK, said.stderr
    assert "the data were not read here: the package pyarrow is not installed" in said.stderr


def test_without_these_packages_the_files_of_a_proposed_model_are_looked_at(place: jobs.Home, tmp_path: Path) -> None:
    model = write_model(tmp_path / "mine")
    said = bare("propose", "--home", place.root, "--model", model)
    assert said.returncode == EXIT_OK, said.stderr
    (model / "tokenizer.json").unlink()
    said = bare("propose", "--home", place.root, "--model", model)
    assert said.returncode == EXIT_BAD_INPUT and "--model: " in said.stderr


def test_a_slip_in_a_row_s_key_is_noted(cowest: Any, job: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row | {"Groups": "g"}) + "\n" for row in rows))
    said = cowest("validate", "-f", job)
    assert said.code == EXIT_OK
    assert f"train.jsonl: nothing reads the keys `Groups` ({len(rows)} rows; is `group` meant?)." in said.err


def test_a_folder_given_as_data_is_refused_by_its_field(cowest: Any, job: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    job.write_text(yaml.safe_dump(edited({"data.heldOut": "file://rows"}, yaml.safe_load(job.read_text()))))
    said = cowest("validate", "-f", job)
    assert (
        said.code == EXIT_BAD_INPUT and "spec.data.heldOut: wanted a JSONL or Parquet file, saw the folder" in said.err
    )


# ---------------------------------------------------------------- send
@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real gateway process; its strong model answers alone."""
    port, store = free_port(), tmp_path / "store"
    with ScriptedModel("42").in_thread() as strong:
        pair = replace(w.STABLE, strong_endpoint=strong.url)
        jobs.write_json(tmp_path / "routing.json", dump(Routing(1, "s", (Arm("stable", 100, "StrongAlone", pair),))))
        spec = manifest.load(write_manifest(tmp_path, **{"strong.endpoint": strong.url})).job
        jobs.write_json(tmp_path / "gateway.json", spec)
        command = [sys.executable, "-m", "cowest_serving.app", "--routing", tmp_path / "routing.json",
                   "--job", tmp_path / "gateway.json", "--store", store, "--port", port]  # fmt: skip
        with (tmp_path / "gateway.log").open("wb") as log:
            process = subprocess.Popen([str(part) for part in command], stderr=log)
        try:
            until_ready(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}/v1", store
        finally:
            process.terminate()
            process.wait(30)


def until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            continue
    raise AssertionError("the gateway has ended")


def test_send_asks_each_question_as_a_user_of_its_own_and_gives_the_reference(
    cowest: Any, gateway: tuple[str, Path], tmp_path: Path
) -> None:
    url, store = gateway
    write_rows(tmp_path / "questions.jsonl", "q", 3)
    flags = ("--data", tmp_path / "questions.jsonl", "--url", url, "--rate", 200)
    said = cowest("send", *flags, "-o", "json")
    assert said.code == EXIT_OK and json.loads(said.out) == {"answered stable": 3, "feedback": 3}
    said = cowest("send", *flags, "--repeat", "--limit", 5, "--feedback", "none")
    assert said.out.strip() == "answered stable 5"

    def recorded() -> tuple[list[Any], list[Any]]:
        return read_traces(str(store)).to_pylist(), read_feedback(str(store)).to_pylist()

    while len((found := recorded())[0]) < 8 or len(found[1]) < 3:
        continue  # the gateway writes in batches; the test's own time limit ends this
    traces, words = found
    # A repeated question comes from another user: a canary draws its arm anew.
    assert len({trace["user_hash"] for trace in traces}) == 5
    assert sorted(word["reference"] for word in words) == ["0", "1", "2"]
    assert {word["trace_id"] for word in words} <= {trace["trace_id"] for trace in traces}


def test_send_to_nobody_is_worth_a_retry_and_says_what_came(cowest: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "questions.jsonl", "q", 2)
    url = f"http://127.0.0.1:{free_port()}/v1"
    said = cowest("send", "--data", tmp_path / "questions.jsonl", "--url", url, "--rate", 100)
    assert said.code == EXIT_RETRY and "failed ClientConnectorError 2" in said.err


@pytest.fixture
def keyed_gateway(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a gateway as a job with `clientKeysSecretRef` starts it."""
    monkeypatch.setenv("COWEST_CLIENT_API_KEYS", "of-our-own")
    url: str = request.getfixturevalue("gateway")[0]
    return url


def test_send_takes_its_key_from_the_environment_and_stops_where_it_is_refused(
    cowest: Any, keyed_gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "questions.jsonl", "q", 400)
    flags = ("--data", tmp_path / "questions.jsonl", "--url", keyed_gateway, "--rate", 50, "-o", "json")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    without = cowest("send", *flags)
    assert without.code == EXIT_BAD_INPUT, "the same command would fail again"
    assert "Wrong or missing API key" in without.err and "OPENAI_API_KEY is not set" in without.err
    assert 0 < json.loads(without.out)["status 401"] < 400, "what is refused once is not asked 400 times"
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-house")
    wrong = cowest("send", *flags)
    assert wrong.code == EXIT_BAD_INPUT and "The key came from OPENAI_API_KEY" in wrong.err
    assert "of-another-house" not in wrong.err + wrong.out
    monkeypatch.setenv("DESK_KEY", "of-our-own")
    named = cowest("send", *flags, "--limit", 3, "--key-env", "DESK_KEY")
    assert named.code == EXIT_OK and json.loads(named.out) == {"answered stable": 3, "feedback": 3}
    unset = cowest("send", *flags, "--key-env", "NO_SUCH_KEY")
    assert unset.code == EXIT_BAD_INPUT and "NO_SUCH_KEY" in unset.err


@pytest.mark.parametrize("flags", [["--rate", "0"], ["--limit", "0"], ["--feedback", "some"], ["-o", "yaml"]])
def test_send_refuses_flags_that_make_no_sense(cowest: Any, tmp_path: Path, flags: list[str]) -> None:
    write_rows(tmp_path / "questions.jsonl", "q", 1)
    said = cowest("send", "--data", tmp_path / "questions.jsonl", *flags)
    assert said.code == EXIT_BAD_INPUT and flags[0] in said.err


# ---------------------------------------------------------------- review
def write_differing(place: jobs.Home, number: int, queries: int) -> None:
    """Items of an evaluation whose arms answer each query differently."""
    folder = place.store / "runs" / f"r{number}" / "evaluate"
    rows = [{"id": f"q{i}", "query": f"query {i} {NASTY}", "reference": "r", "conversation": None,
             "candidate_answer": f"new {i}", "control_answer": f"old {i}"} for i in range(queries)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")


def at_page(url: str, path: str, body: Any = None) -> Any:
    with urllib.request.urlopen(url.replace("/?", f"{path}?"), body and json.dumps(body).encode(), timeout=10) as reply:
        return json.load(reply)


def test_a_person_labels_at_the_page_and_goes_on_later(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    write_differing(place, 1, 3)
    labels, command = tmp_path / "labels.jsonl", [sys.executable, "-m", "cowest_cli", "review"]
    flags = ["--home", str(place.root), "--labels", str(labels), "--by", "ann", "--round", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("3 of 3 questions of round 1; ann answers at http://127.0.0.1:")
            url = re.search(r"http://\S+", line)[0]  # type: ignore[index]
            for said in ("left", "right"):
                at_page(url, "/label", {"id": at_page(url, "/next")["question"]["id"], "said": said})
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0 and rest.startswith("1 questions are left.") and labels.as_uri() in rest
    assert [label.label for label in read_labels(labels.as_uri(), Evaluator("Judge"))] == [2, 0]
    third = {**json.loads(labels.read_text().splitlines()[0]), "label": "tie"}
    for i in range(3):  # the one that is left, in whatever order it would have been shown
        answers = [f"new {i}", f"old {i}"]
        with labels.open("a") as file:
            file.write(json.dumps({**third, "query": f"query {i} {NASTY}", "answers": answers}) + "\n")
    assert cowest("review", *flags).out.startswith("all 3 questions of round 1 have a label of ann")


def test_a_review_without_an_evaluation_or_a_difference_says_so(cowest: Any, place: jobs.Home) -> None:
    none = cowest("review", "--home", place.root, "--round", 7)
    assert none.code == EXIT_BAD_INPUT and "wanted the evaluation of round 7, saw 0, 1" in none.err
    write_differing(place, 1, 0)
    alike = cowest("review", "--home", place.root, "--round", 1)
    assert alike.code == EXIT_BAD_INPUT and "answer differently, saw none" in alike.err


def test_live_answers_of_which_users_said_the_opposite_of_the_judge_are_asked(place: jobs.Home) -> None:
    judge = {"type": "Judge", "endpoint": "http://judge/v1", "model": "judge"}
    document = jobs.read_json(place.job)
    document["spec"]["feedback"]["evaluator"] = judge
    settings = Evaluator("Judge", endpoint=judge["endpoint"], model=judge["model"])
    record(place, trace("liked", query="one?", answer="first"), trace("too", query="two?", answer="second"))
    give(place, {"trace_id": "liked", "score": 1.0}, {"trace_id": "too", "score": 1.0})

    async def judged() -> None:
        async with PaidCalls(place.calls) as book:
            for query, answer, score in (("one?", "first", 0.0), ("two?", "second", 1.0)):
                row = Row("t", query, ({"role": "user", "content": query},), "")
                known = asyncio.sleep(0, score)
                await book.remember_score(score_key(evaluator_digest(settings), row, answer), lambda known=known: known)

    asyncio.run(judged())
    source = review.Source(place.store.as_uri(), document, place.calls)
    assert [(q.answers, q.why) for q in review._of_users(source)] == [(("first",), "userDisagrees")]
    assert not list(review._of_users(replace(source, calls=None))), "in a cluster the book is not at hand"
