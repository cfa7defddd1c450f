"""When the embedded engine writes its status: at once for a transition, within a second for a sentence."""

from __future__ import annotations

from dataclasses import replace

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_operator import api
from tests import world as w


def make(tmp_path) -> engines.Engine:
    document = {"metadata": {"name": "desk"}, "spec": {}}
    declared = jobs.Declared(document, w.JOB, tmp_path)
    return engines.Engine(declared, jobs.Home(tmp_path / "home"), engines.Facts(1, 1, True, 1.0), None)


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
