"""`cowest run` and `cowest plan`: the loop on one machine, and what it will cost before anything is spent."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_cli.following import Following
from cowest_cli.options import File, HomeFolder, Output
from cowest_cli.preflight import Facts, facts_of
from cowest_cli.processes import port_is_free
from cowest_cli.view import View, rounds_table
from cowest_operator import rounds
from cowest_serving.contract import dump
from cowest_training.contract import EXIT_INTERRUPTED, EXIT_RETRY, StepError

ASK_ABOVE_CALLS = 20_000


def run(
    file: File,
    home: HomeFolder = None,
    secrets: Annotated[Path | None, typer.Option(help="Folder of secrets: <name>/<key> files.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway instead of gateway.port.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Go on serving when no round is left, until Ctrl-C.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, whatever the plan says it may cost.")] = False,
    output: Output = "text",
) -> None:
    """Run the whole loop of one job on this machine. Interrupt it at any point; the same command goes on.

    An edit of the manifest is taken up while it runs; a wrong one is said, and the manifest before it holds. A step
    that fails for good ends the run; with --serve the gateway answers on and the step is tried again, after 30 seconds
    at first and ten minutes at most, after an edit, or when a person says `cowest resume`.
    """
    following = Following(file, lambda: _another_order(file, place, secrets, port))
    jobs.load(file)  # what is wrong with the manifest is said first
    place = jobs.home_of(file, home)
    console = Console(stderr=True, highlight=False, markup=False)
    with jobs.locked(place):
        order = engines.read_order(file, secrets)
        order = replace(order, declared=jobs.with_generation(order.declared, place))
        for path in jobs.without_effect_here(order.declared.document):
            console.print(f"note: {path} has no effect on one machine", soft_wrap=True)
        if not yes and not place.status.exists():
            _ask(order.declared, order.facts, console)
        if not jobs.read_status(place).rounds:
            _reach_strong(order.declared, order.keys)
        stopped: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: stopped.append(received))
        view = View(console)
        engine = engines.Engine(order, place, port, following=following)
        try:
            plan = engine.run(view, serve, lambda: bool(stopped))
        finally:
            view.close()
    console.print(rounds_table(plan.status))
    if stopped:
        console.print("interrupted: all that is finished is kept; run the same command again to go on.")
        raise typer.Exit(EXIT_INTERRUPTED)
    if plan.failure:
        raise StepError(f"{plan.failure.message}\nRun the same command again to go on from here.", plan.failure.code)
    if output == "json":
        typer.echo(json.dumps({"finished": plan.finished, "home": str(place.root), "status": dump(plan.status)}))
    console.print(f"the loop is over: {plan.finished} State and models: {place.root}", soft_wrap=True)


def _another_order(file: Path, place: jobs.Home, secrets: Path | None, port: int | None) -> engines.Order:
    """An edit of the manifest while it runs, checked as at the start. Raises `ManifestError` or `StepError`."""
    order = engines.read_order(file, secrets)
    known = jobs.read_json(place.job)
    name, wanted = order.declared.job.name, known["metadata"]["name"]
    if name != wanted:
        raise StepError(f"{file}: wanted the job {wanted}, saw {name}. Another job is another `cowest run`.")
    new = order.declared.job.spec.gateway.port
    if port is None and new != known["spec"]["gateway"]["port"] and not port_is_free(new):
        raise StepError(f"spec.gateway.port: port {new} is in use. Give another.")
    return order


def _reach_strong(declared: jobs.Declared, keys: Mapping[str, str]) -> None:
    """Before the first minutes of tuning: is the endpoint there, and does it take the key? Costs no tokens.

    Only a refused connection or a refused key ends the run: not every endpoint lists its models.
    """
    strong = declared.job.spec.strong
    key = keys.get("COWEST_STRONG_API_KEYS", "").partition("\n")[0]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(strong.endpoint.rstrip("/") + "/models", headers=headers)
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            wanted = "another key" if key else "a key: declare strong.apiKeySecretRefs"
            raise StepError(f"{strong.endpoint} answers {error.code} to GET /models: it wants {wanted}.") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError | socket.gaierror):
            raise StepError(
                f"{strong.endpoint} cannot be reached ({error.reason}). Check that it runs and its address is right,"
                " then run the same command again.",
                EXIT_RETRY,
            ) from None
    except (OSError, ValueError, http.client.HTTPException):
        return  # slow or odd: the first real call will tell, with its own retries


def _ask(declared: jobs.Declared, facts: Facts, console: Console) -> None:
    """Above a limit a person says yes, before the first paid call."""
    costs = engines.estimates(declared.job, facts)
    calls = costs[0].calls + costs[1].calls * declared.job.spec.rounds.max
    if calls <= ASK_ABOVE_CALLS:
        return
    console.print(f"The whole job may ask the strong model up to {calls} times (`cowest plan` has the parts).")
    if not console.is_terminal:
        raise StepError(f"up to {calls} strong-model calls: wanted --yes to go on without a question, saw none.")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)


def plan(file: File, output: Output = "text") -> None:
    """Say what the job may cost at most: strong-model calls, tokens and money. Spends and starts nothing."""
    declared = jobs.load(file)
    facts = facts_of(declared.document, str(file))
    costs = engines.estimates(declared.job, facts)
    spec = declared.job.spec
    smallest = rounds.smallest_gain_points(min(facts.held_out, 10**9))
    if output == "json":
        typer.echo(json.dumps({"data": asdict(facts), "smallestGainPoints": smallest,
                               "parts": [asdict(c) for c in costs], "maxRounds": spec.rounds.max}))  # fmt: skip
        return
    typer.echo(f"{facts.rows} training rows, {facts.held_out} held-out rows; upper bounds:")
    for cost in costs:
        money = f", {cost.money:.2f} {cost.currency}" if cost.money is not None else ""
        times = f" (at most {spec.rounds.max} times)" if cost is costs[1] else ""
        typer.echo(f"  {cost.name:12} {cost.calls:8} calls, {cost.tokens:10} tokens{money}{times}")
    typer.echo(
        f"With {facts.held_out} held-out queries a gain under {smallest:.1f} points will most likely not be seen."
    )
    if spec.strong.prices is None:
        typer.echo("No money is shown: declare strong.prices to see it.")
