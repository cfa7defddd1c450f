"""What `cowest run` prints where there is no terminal, and its live view where there is one."""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_cli.preflight import Facts
from cowest_cli.view import View
from cowest_operator import api, reconcile
from cowest_operator.manifest import loads, resolve_prompts
from cowest_serving.cores import Cores
from tests import world as w
from tests.manifests import edited

PROMPTS = {"draft": "{query}", "refine": "{query} {draft}", "solo": "{query}"}
PRICES = {"currency": "EUR", "inputPerMillionTokens": "1", "outputPerMillionTokens": "2"}


# ---------------------------------------------------------------- lines
def test_an_event_is_printed_once_though_it_is_also_what_the_loop_is_at():
    out = io.StringIO()
    view = View(Console(file=out, width=200))
    begins = reconcile.plan(w.world())
    (event,) = begins.events
    for _ in range(3):
        view(None, begins)  # without a terminal the engine is not looked at
        begins = replace(begins, events=())
    assert out.getvalue().count(event.message) == 1


def test_what_is_awaited_is_said_without_an_event():
    out = io.StringIO()
    view = View(Console(file=out, width=200))
    waits = reconcile.plan(w.world(job=w.job(rounds={"trigger": api.Trigger(100)})))
    assert not waits.events
    view(None, waits)
    assert "... 0 of 100 new usable traces" in out.getvalue()


# ---------------------------------------------------------------- on a terminal
class Running:
    """A child that has not ended."""

    log = "x.log"

    def code(self) -> None:
        return None


@pytest.fixture
def engine(tmp_path: Path) -> engines.Engine:
    steps = [{"weightPercent": 10, "minAnswers": 60}, {"weightPercent": 50, "minAnswers": 100}]
    edits = {"collaboration.prompts": PROMPTS, "strong.prices": PRICES, "canary.steps": steps}
    document = resolve_prompts(loads(json.dumps(edited(edits))).job, {}, PROMPTS)
    order = engines.Order(jobs.Declared(document, api.parse_job(document), tmp_path), Facts(1, 1, True, 1.0))
    engine = engines.Engine(order, jobs.Home(tmp_path / "home"), port=8123, cores=Cores(2, 2, 0.0))
    engine.gateway = server_of(engine, "")
    engine._strong_at = time.monotonic()  # it was just asked how the strong model does
    return engine


def server_of(engine: engines.Engine, digest: str) -> engines._Server:
    """One that answers."""
    child: Any = Running()
    return engines._Server(child, engine.port, ready=True, digest=digest, message="")


def watched(engine: engines.Engine, name: str, keeps_running: bool, **progress: Any) -> None:
    """A step runs and has written how far it is."""
    child: Any = Running()
    spec = api.StepSpec(name, "cowest_training.x", "file:///x", keeps_running=keeps_running)
    engine.steps[name] = engines._Step(spec, child, 60)
    said = {"total": None, "unit": "rows", "rate": None, "eta_seconds": None, "message": "", **progress}
    jobs.write_json(engine.home.progress / f"{name}.json", said)


def in_canary(engine: engines.Engine) -> None:
    """Round 3, at 34 of 60 answers of its first step, after two rounds that ended."""
    engine.status = replace(
        w.on_trial(stage="Canary", number=3, score=0.72, difference=0.031, live_difference=0.1, step_since=time.time()),
        rounds=(
            outcome(1, "Refused", "NoMeasurableGain", score=0.61, difference=-0.012, p_value=0.31, pairs=120),
            outcome(2, "Promoted", "BetterOfflineAndLive", score=0.69, difference=0.08, p_value=2e-5, by="eve"),
        ),
        budget=api.Budget(900, 45_000, 1.25, api.Spent(30, 1_500, 0.05), api.Live("2026-11-27", 7, 80, 0.5)),
    )
    for pair in (w.STABLE, w.CANDIDATE):
        engine.servers[pair.weak_digest] = server_of(engine, pair.weak_digest)
    report = asdict(w.live(34, 100, updated=time.time() + 1))
    jobs.write_json(engine.home.store / "runs" / "r3" / "live-0.json", report)
    engine.counting.counts = api.TraceCounts(412, 390, "Not usable: 22 without a reference.")


def outcome(number: int, decision: api.Decision, reason: str, **changes: Any) -> api.Outcome:
    return api.Outcome(number, "Round", decision, reason, "why", "sha256:pair", 0.0, 1.0, **changes)


def seen(engine: engines.Engine, width: int = 200) -> str:
    """The last picture of the live view, without colours, as a terminal of this width has it."""
    plan = reconcile.plan(engine.observe())
    out = io.StringIO()
    view = View(Console(file=out, width=width, height=60, force_terminal=True, highlight=False, markup=False))
    try:
        view(engine, replace(plan, events=()))
    finally:
        view.close()
    return Text.from_ansi(out.getvalue()).plain


def line(text: str, begins: str) -> str:
    found = [each.rstrip() for each in text.splitlines() if each.lstrip().startswith(begins)]
    assert found, f"no line {begins} in:\n{text}"
    return found[-1]


def cells(text: str, begins: str) -> str:
    """A row of the table, its cells with one space between."""
    return " ".join(line(text, begins).split())


def test_a_canary_is_shown_with_its_rounds_weights_spending_traces_and_pace(engine):
    in_canary(engine)
    watched(engine, "r3-live-0", keeps_running=True, done=34, unit="scored answers of the candidate", rate=0.5)
    text = seen(engine)
    assert "desk  http://127.0.0.1:8123/v1  Answering: " in text
    assert cells(text, "round") == "round origin decision pair gain p live gain pairs reason"
    assert cells(text, "1 ") == "1 Round Refused 61.0 % -1.2 0.3 120 NoMeasurableGain"
    assert cells(text, "2 ") == "2 Round Promoted 69.0 % +8.0 2e-05 BetterOfflineAndLive (eve)"
    assert cells(text, "3 ") == "3 Round Canary 72.0 % +3.1 +10.0"
    assert line(text, "traffic") == "traffic  stable 90 %, candidate 10 % (stable answers by Pair)"
    assert "900 calls, 45000 tokens, 1.25 EUR; the current round 30 calls, 1500 tokens, 0.05 EUR" in text
    assert "; live answers on 2026-11-27 7 calls, 80 tokens, 0.50 EUR" in line(text, "spent")
    traces = "traces   412 in all, 390 of them a round could learn from (Not usable: 22 without a reference.)"
    assert line(text, "traces") == traces
    now = "canary step 1 of 2 (10 % of the traffic): 34 of 60 scored live answers, 0.5 answers/s, 52 s left."
    assert now in line(text, "now")


@pytest.mark.parametrize(
    ("done", "looks", "rate", "said"),
    [
        pytest.param(34, 0, None, "34 of 60 scored live answers.", id="no rate is known yet"),
        pytest.param(34, 1, 0.5, "34 of 120 scored live answers, 0.5 answers/s, 172 s left.", id="a later look"),
        pytest.param(60, 0, 2.0, "34 of 60 scored live answers, 2 answers/s.", id="the report is about to say it"),
    ],
)
def test_the_time_left_in_a_canary_is_that_until_the_next_look(engine, done, looks, rate, said):
    in_canary(engine)
    engine.status = replace(engine.status, candidate=replace(engine.status.candidate, looks=looks))
    watched(engine, "r3-live-0", keeps_running=True, done=done, rate=rate)
    assert said in line(seen(engine), "now")


def test_a_step_is_shown_with_how_far_it_is(engine):
    engine.status = w.on_trial(stage="Preparing", number=1, pair=None)
    name = next(spec.name for spec in reconcile.plan(engine.observe()).steps)
    watched(engine, name, keeps_running=False, done=40, total=50, rate=2.0, eta_seconds=5.0, message="loss 0.1")
    assert line(seen(engine), "now") == f"now      step {name} runs: 40 of 50 rows, 2 rows/s, 5 s left; loss 0.1."


def test_a_job_that_has_just_begun_shows_no_rounds_and_the_strong_model_alone(engine):
    text = seen(engine)
    assert cells(text, "0 ") == "0 Baseline Preparing"
    assert line(text, "traffic") == "traffic  stable 100 % (stable answers by StrongAlone)"
    assert "0 calls, 0 tokens, 0.00 EUR; the current round 0 calls" in line(text, "spent")
    assert line(text, "traces") == "traces   0 in all, 0 of them a round could learn from"


@pytest.mark.parametrize("width", [30, 60, 80])
def test_on_a_narrow_terminal_sentences_wrap_within_it(engine, width):
    """A line that wrapped by itself would be left behind when the view is drawn anew."""
    in_canary(engine)
    text = seen(engine, width)
    assert max(cell_len(each) for each in text.splitlines()) <= width
    read = " ".join(text.split())
    assert "stable 90 %, candidate 10 % (stable answers by Pair)" in read
    assert "canary step 1 of 2 (10 % of the traffic): 34 of 60 scored live answers." in read


@pytest.mark.parametrize("text", ["[red]eve[/red]", "[/]", "[link=file:///etc]x", ":bug:"])
def test_what_looks_like_markup_is_shown_as_it_is(engine, text):
    in_canary(engine)
    engine.counting.counts = api.TraceCounts(1, 0, text)
    first, second = engine.status.rounds
    engine.status = replace(engine.status, rounds=(first, replace(second, by=text)), paused_by=text)
    shown = seen(engine)
    assert f"({text})" in line(shown, "2 ")
    assert f"({text})" in line(shown, "traces")
    assert f"paused by {text} at canary step 1." in line(shown, "now")


def test_what_a_model_or_an_endpoint_said_does_not_steer_the_terminal(engine):
    in_canary(engine)
    status = reconcile.plan(engine.observe()).status
    hostile = "no\x1b[2J\x1b]0;title\x07\rmore\nlines"
    conditions = tuple(replace(each, message=hostile) for each in status.conditions)
    plan = replace(reconcile.plan(engine.observe()), status=replace(status, conditions=conditions), events=())
    out = io.StringIO()
    view = View(Console(file=out, width=200, height=60, force_terminal=True, highlight=False, markup=False))
    view(engine, plan)
    view.close()
    assert "\x1b[2J" not in out.getvalue() and "\x1b]0" not in out.getvalue() and "\x07" not in out.getvalue()
    assert out.getvalue().count("no [2J ]0;title  more lines") >= 2, "in the head and as what is done now"


def test_an_event_stands_above_the_live_view_once(engine):
    out = io.StringIO()
    view = View(Console(file=out, width=200, height=60, force_terminal=True, highlight=False, markup=False))
    in_canary(engine)
    plan = reconcile.plan(engine.observe())
    event = api.Event("Warning", "StrongEndpointFails", "the strong endpoint [has] failed since 12:00.")
    view(engine, replace(plan, events=(event,)))
    view(engine, replace(plan, events=()))
    view.close()
    assert Text.from_ansi(out.getvalue()).plain.count(event.message) == 1
