"""What `cowest run` and `cowest status` show: one table of rounds, the running step, canary weights. No model text.

On a terminal it is a live view; elsewhere each event is one line, and a line a while says what is awaited.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cowest_operator import api
from cowest_operator.power import Power, sentences
from cowest_serving.contract import parse

if TYPE_CHECKING:
    from cowest_cli.engine import Engine

HEARTBEAT = 15.0  # seconds between lines that only say that it goes on

_COLOURS = {"Promoted": "green", "Refused": "yellow", "RolledBack": "red"}


def rounds_table(status: api.Status) -> Table:
    table = Table(title=None, expand=False, pad_edge=False, box=None, header_style="bold", collapse_padding=True)
    for name in ("round", "origin", "decision", "pair", "gain", "p", "live gain", "pairs", "reason"):
        table.add_column(name, justify="left" if name in ("origin", "decision", "reason") else "right")
    for outcome in status.rounds:
        table.add_row(
            str(outcome.number),
            outcome.origin,
            Text(outcome.decision, style=_COLOURS[outcome.decision]),
            _percent(outcome.score),
            _points(outcome.difference),
            f"{outcome.p_value:.1g}" if outcome.p_value is not None else "",
            _points(outcome.live_difference),
            str(outcome.pairs) if outcome.pairs is not None else "",
            Text(outcome.reason + (f" ({printable(outcome.by)})" if outcome.by else "")),
        )
    if (trial := status.candidate) is not None:
        table.add_row(str(trial.number), trial.origin, Text(trial.stage, style="cyan"), _percent(trial.score),
                      _points(trial.difference), "", _points(trial.live_difference), "", "")  # fmt: skip
    return table


def printable(value: object) -> str:
    """On one line and without control characters: a model's text must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def traffic(status: api.Status, arms: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {weight} %" for name, weight in arms.items()) + f" (stable answers by {status.serving})"


def spent(status: api.Status, job: Mapping[str, Any] | None = None) -> str:
    """What the steps have paid for; `job` is the manifest that names the currency."""
    prices = ((job or {}).get("spec") or {}).get("strong", {}).get("prices")

    def words(seen: api.Spent | api.Budget | api.Live) -> str:
        money = f", {seen.money:.2f} {prices['currency']}" if prices else ""
        return f"{seen.calls} calls, {seen.tokens} tokens{money}"

    live = f"; live answers on {seen.day} {words(seen)}" if (seen := status.budget.live) else ""
    part = words(status.budget.round)
    return f"{words(status.budget)}; the current round {part} (by steps, without live answers){live}"


def held_out(status: api.Status, job: Mapping[str, Any] | None) -> list[str]:
    """What the held-out queries can show the next candidate, in sentences; none before they were gone through."""
    gate = ((job or {}).get("spec") or {}).get("gate")
    if (seen := status.sight) is None or not gate:
        return []
    known = Power(seen.queries, parse(api.Gate, gate, "spec.gate"), seen.discordant, seen.slices)
    return sentences(known, status.looks + 1)


def traces(counts: api.TraceCounts) -> str:
    why = f" ({counts.reason})" if counts.reason else ""
    return f"{counts.all} in all, {counts.usable} of them a round could learn from{why}"


class View:
    """Called after each look at the world."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._message = ""
        self._at = 0.0
        if self._live:
            self._live.start()

    def __call__(self, engine: Engine, plan: api.Plan) -> None:
        for event in plan.events:
            style = "red" if event.type == "Warning" else ""
            self._console.print(
                Text(f"{time.strftime('%H:%M:%S')}  {printable(event.message)}", style=style), soft_wrap=True
            )
        progressing = next(c for c in plan.status.conditions if c.type == api.ROUND_PROGRESSING)
        if self._live:
            self._live.update(self._picture(engine, plan, progressing))
        elif progressing.message in (event.message for event in plan.events):
            self._message = progressing.message  # it has its line already
        elif progressing.message != self._message and time.monotonic() - self._at > HEARTBEAT:
            self._console.print(
                Text(f"{time.strftime('%H:%M:%S')}  ... {printable(progressing.message)}"), soft_wrap=True
            )
            self._message, self._at = progressing.message, time.monotonic()

    def _picture(self, engine: Engine, plan: api.Plan, progressing: api.Condition) -> Group:
        ready = next(c for c in plan.status.conditions if c.type == api.READY)
        head = f"{engine.job.name}  http://127.0.0.1:{engine.port}/v1  {ready.reason}: {ready.message}"
        arms: dict[str, int] = {arm.name: arm.weight_percent for arm in plan.routing.arms}
        return Group(
            Text(f"\n{printable(head)}", style="bold"),
            rounds_table(plan.status),
            Text(f"traffic  {traffic(plan.status, arms)}"),
            Text(f"spent    {spent(plan.status, engine.document)}"),
            Text(f"traces   {printable(traces(engine.counting.counts))}"),
            Text(f"now      {printable(progressing.message)}", style="cyan"),
        )

    def close(self) -> None:
        if self._live:
            self._live.stop()
