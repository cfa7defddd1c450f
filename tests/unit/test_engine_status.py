"""What the embedded engine keeps: its status at once for a transition, and each trial's own manifest."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_cli.preflight import Facts
from cowest_operator import api, reconcile
from cowest_operator.manifest import loads, resolve_prompts
from cowest_serving.contract import Fallback, SecretRef
from cowest_training.contract import StepError
from tests import world as w
from tests.manifests import edited

PROMPTS = {"draft": "{query}", "refine": "{query} {draft}", "solo": "{query}"}


def make(tmp_path) -> engines.Engine:
    document = {"metadata": {"name": "desk"}, "spec": {}}
    declared = jobs.Declared(document, w.JOB, tmp_path)
    return engines.Engine(engines.Order(declared, Facts(1, 1, True, 1.0)), jobs.Home(tmp_path / "home"))


def saying(message: str, **changes) -> api.Status:
    condition = api.Condition("Ready", "True", "Answering", message, 1, 0.0)
    return replace(w.SERVED, conditions=(condition,), **changes)


def test_a_sentence_that_had_to_wait_is_written_though_nothing_changes_any_more(tmp_path, monkeypatch):
    engine = make(tmp_path)
    engine._apply_status(saying("one"))
    engine._apply_status(saying("two"))
    assert jobs.read_status(engine.home).conditions[0].message == "one"
    monkeypatch.setattr(engines, "STATUS_EVERY", 0.0)
    engine._apply_status(saying("two"))
    assert jobs.read_status(engine.home).conditions[0].message == "two"


def test_a_transition_is_written_at_once(tmp_path):
    engine = make(tmp_path)
    engine._apply_status(saying("one"))
    engine._apply_status(saying("two", trials=7))
    assert jobs.read_status(engine.home).trials == 7


def test_counted_traces_are_kept_for_whoever_asks_and_nothing_is_said_before_the_first_count(tmp_path):
    engine = make(tmp_path)
    engine._apply_counts()
    assert jobs.read_json(engine.home.traces) is None
    engine.counting.counts, engine.counting.counted = api.TraceCounts(), True
    engine._apply_counts()
    assert jobs.read_json(engine.home.traces) == {"all": 0, "usable": 0}
    engine.counting.counts = api.TraceCounts(5, 3, "Not usable: 2 asked again later.")
    engine._apply_counts()
    said = {"all": 5, "usable": 3, "reason": "Not usable: 2 asked again later."}
    assert jobs.read_json(engine.home.traces) == said


def test_the_progress_of_an_earlier_start_of_a_step_is_not_told_as_that_of_this_one(tmp_path):
    engine = make(tmp_path)
    engine._start = lambda *_, **__: None
    left = engine.home.progress / "r0-sft.json"
    said = {"done": 40, "total": 50, "unit": "steps", "rate": 2.0, "eta_seconds": 5.0, "message": "loss 0.1"}
    jobs.write_json(left, said)
    assert engine.progress("r0-sft") == "40 of 50 steps, 2 steps/s, 5 s left; loss 0.1"
    engine._start_step(api.StepSpec("r0-sft", "cowest_training.sft", "file:///out"))
    assert engine.progress("r0-sft") == ""


def test_a_strong_endpoint_that_fails_is_said_as_in_a_cluster_until_it_answers(tmp_path):
    engine = make(tmp_path)
    engine.gateway = engines._Server(None, 1, ready=True)  # type: ignore[arg-type]
    words = {"failing": True, "since": 10.0, "error": "EndpointUnreachable", "last_failure": 20.0, "last_answer": None}
    with answering({"ready": True, "strong": words}) as (port, body):
        engine.gateway.port = port
        engine._look_at_strong()
        (trouble,) = engine._troubles()
        assert trouble.reason == api.REASON_STRONG_FAILS
        assert "http://strong/v1 has failed for users since" in trouble.message and "pods" not in trouble.message
        body["strong"] = {**words, "failing": False, "last_answer": 30.0}
        engine._look_at_strong()
        assert len(tuple(engine._troubles())) == 1, "the gateway is not asked at each look"
        engine._strong_at -= engines.READINESS_EVERY
        engine._look_at_strong()
        assert tuple(engine._troubles()) == ()


def test_a_trouble_is_said_when_it_comes_and_when_it_is_over_and_not_in_between(tmp_path):
    engine = make(tmp_path)
    trouble = api.Trouble(api.REASON_STRONG_FAILS, "the strong endpoint has failed since 12:00.")

    def said(*troubles: api.Trouble) -> list[tuple[str, str, str]]:
        world = w.world(status=w.SERVED, troubles=troubles)
        plan = engine._with_news(world, replace(reconcile.plan(world), events=()))
        return [(event.type, event.reason, event.message) for event in plan.events]

    assert said(trouble) == [("Warning", trouble.reason, trouble.message)]
    assert said(trouble) == []
    assert said() == [("Normal", api.REASON_AS_EXPECTED, f"over: {trouble.message}")]
    assert said() == []


@contextmanager
def answering(body: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """An HTTP server on loopback that gives `body`, as it stands then, to whoever asks."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], body
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---------------------------------------------------------------- a trial's own manifest
def started(home, **edits) -> engines.Engine:
    loaded = loads(json.dumps(edited({"collaboration.prompts": PROMPTS, **edits})))
    document = resolve_prompts(loaded.job, {}, PROMPTS)
    declared = jobs.Declared(document, api.parse_job(document), home.root)
    return engines.Engine(engines.Order(declared, Facts(1, 1, True, 1.0)), home)


def begin(engine: engines.Engine, number: int) -> None:
    trial = w.trial(number=number, pair=None)
    engine._freeze(trial)
    engine._apply_status(replace(w.SERVED, candidate=trial))


def test_after_an_edit_and_a_restart_a_trial_goes_on_by_the_manifest_that_it_began_with(tmp_path):
    home = jobs.Home(tmp_path)
    begin(started(home, **{"gate.minHeldOut": 100}), 1)
    again = started(home, **{"gate.minHeldOut": 7, "rounds.max": 9})
    again._freeze(again.status.candidate)
    number, path, document, job = again._frozen
    assert (number, job.spec.gate.min_held_out, job.spec.rounds.max) == (1, 100, 9)
    assert jobs.read_json(path) == document, "its steps read the same"
    begin(again, 2)
    assert again._frozen[3].spec.gate.min_held_out == 7


def test_a_number_that_was_given_before_is_no_reason_to_go_by_an_old_manifest(tmp_path):
    home = jobs.Home(tmp_path)
    started(home, **{"gate.minHeldOut": 100})._freeze(w.trial(number=1))  # and killed before the status was written
    again = started(home, **{"gate.minHeldOut": 7})
    again._freeze(w.trial(number=1))
    assert again._frozen[3].spec.gate.min_held_out == 7


def test_keys_of_fallbacks_are_a_line_each_and_reach_the_gateway_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("COWEST_SECRET_SPARE_TOKEN", "s3cret")
    fallbacks = (Fallback("https://a/v1", "a"), Fallback("https://b/v1", "b", SecretRef("spare", "token")))
    strong = replace(w.JOB.spec.strong, fallbacks=fallbacks)
    job = replace(w.JOB, spec=replace(w.JOB.spec, strong=strong))
    assert jobs.fallback_keys(job, None) == "\ns3cret"
    assert jobs.fallback_keys(w.JOB, None) is None
    monkeypatch.setenv(engines.FALLBACK_KEYS, "of an outer shell")
    environment = make(tmp_path)._environment()
    assert engines.FALLBACK_KEYS not in environment and "s3cret" not in environment.values()
    monkeypatch.delenv("COWEST_SECRET_SPARE_TOKEN")
    with pytest.raises(StepError, match="COWEST_SECRET_SPARE_TOKEN"):
        jobs.fallback_keys(job, None)
