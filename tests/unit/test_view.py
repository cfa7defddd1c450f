"""What `cowest run` prints where there is no terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cowest_cli.view import View
from cowest_operator import api, reconcile
from tests import world as w


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
