"""What people say and ask: status, explain, pause, resume, approve, promote, rollback, propose, lineage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cowest_cli import jobs
from cowest_cli.options import By, FileOrNone, HomeFolder, Output, Why
from cowest_cli.view import printable, rounds_table, spent
from cowest_operator import api
from cowest_operator.manifest import FILE, absolute_uri, local_path
from cowest_serving.contract import dump
from cowest_training.contract import StepError

SHOWN_EVENTS = 10


def _known(file: Path | None, home: Path | None) -> jobs.Home:
    place = jobs.home_of(file, home)
    if not place.status.exists():
        raise StepError(f"{place.root}: wanted the state of a job, saw none. Start it with `cowest run -f ...`.")
    return place


# ---------------------------------------------------------------- asking
def status(file: FileOrNone = None, home: HomeFolder = None, output: Output = "text") -> None:
    """One table of rounds, what answers now and what is awaited."""
    place = _known(file, home)
    seen = jobs.read_status(place)
    if output == "json":
        run = jobs.read_json(place.run) or {}
        routing = jobs.read_json(place.routing) or {}
        shown = {"status": dump(seen), "gateway": run.get("gateway"), "routing": routing, "running": jobs.runs(place)}
        typer.echo(json.dumps(shown))
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=max(console.width, 120))  # a pipe has no edge
    for condition in seen.conditions:
        line = f"{condition.type:18} {condition.status:8} {condition.reason}: {condition.message}"
        console.print(printable(line), soft_wrap=True)
    console.print(f"{'Spent':18} {spent(seen, jobs.read_json(place.job))}", soft_wrap=True)
    console.print(rounds_table(seen))
    _say_when_stopped(place)


def explain(file: FileOrNone = None, home: HomeFolder = None, output: Output = "text") -> None:
    """What holds the loop now and how each round was decided, in sentences, with the last events."""
    place = _known(file, home)
    seen = jobs.read_status(place)
    events = jobs.read_events(place)
    if output == "json":
        typer.echo(
            json.dumps({"conditions": dump(seen.conditions), "rounds": dump(seen.rounds), "events": events[-50:]})
        )
        return
    for condition in seen.conditions:
        typer.echo(printable(f"{condition.type} is {condition.status} ({condition.reason}): {condition.message}"))
    for outcome in seen.rounds:
        by = f" by {outcome.by}" if outcome.by else ""
        head = f"Round {outcome.number} ({outcome.origin}): {outcome.decision}{by}, {outcome.reason}"
        typer.echo(printable(f"{head}: {outcome.message}"))
    if seen.vetoed:
        typer.echo(f"{len(seen.vetoed)} pair(s) rolled back by a person are never promoted automatically.")
    for event in events[-SHOWN_EVENTS:]:
        typer.echo(printable(f"{time.strftime('%m-%d %H:%M:%S', time.localtime(event['time']))}  {event['message']}"))
    _say_when_stopped(place)


def _say_when_stopped(place: jobs.Home) -> None:
    if not jobs.runs(place):
        typer.echo("Nothing runs now, so nothing answers: this is how the last `cowest run` left it.", err=True)


# ---------------------------------------------------------------- saying
def _say(
    verb: api.Verb,
    file: Path | None,
    home: Path | None,
    why: str,
    by: str | None,
    output: str,
    model: str | None = None,
) -> None:
    """Recorded whether or not an engine runs."""
    place = jobs.home_of(file, home)
    action = jobs.record_action(place, verb, why, by, model)
    if output == "json":
        typer.echo(json.dumps(asdict(action)))
        return
    typer.echo(
        f"{verb} by {printable(action.by)} is recorded; the running or next `cowest run` of this job takes it in."
    )


def pause(
    file: FileOrNone = None, home: HomeFolder = None, why: Why = "", by: By = None, output: Output = "text"
) -> None:
    """Start no round and take no canary step until `resume`; answers go on."""
    _say("pause", file, home, why, by, output)


def resume(
    file: FileOrNone = None, home: HomeFolder = None, why: Why = "", by: By = None, output: Output = "text"
) -> None:
    """Take a pause back."""
    _say("resume", file, home, why, by, output)


def approve(
    file: FileOrNone = None, home: HomeFolder = None, why: Why = "", by: By = None, output: Output = "text"
) -> None:
    """Let a candidate that waits for approval (canary.approval: Manual) be promoted."""
    _say("approve", file, home, why, by, output)


def promote(
    file: FileOrNone = None, home: HomeFolder = None, why: Why = "", by: By = None, output: Output = "text"
) -> None:
    """Promote the candidate in canary now, whatever the live gate would say."""
    _say("promote", file, home, why, by, output)


def rollback(
    file: FileOrNone = None, home: HomeFolder = None, why: Why = "", by: By = None, output: Output = "text"
) -> None:
    """End the running trial, or undo the last promotion; the pair is never promoted automatically again."""
    _say("rollback", file, home, why, by, output)


def propose(
    model: Annotated[str, typer.Option(help="Model to gate as a candidate: a folder, file://, s3:// or hf://.")],
    file: FileOrNone = None,
    home: HomeFolder = None,
    why: Why = "",
    by: By = None,
    output: Output = "text",
) -> None:
    """Gate any model as a candidate: same gate, same canary as a tuned one."""
    uri = absolute_uri(model if "://" in model else Path(model).resolve().as_uri(), Path.cwd())
    if uri.startswith(FILE) and not local_path(uri).is_dir():
        raise StepError(f"--model {model}: wanted a model folder, saw none there.")
    _say("propose", file, home, why, by, output, uri)


# ---------------------------------------------------------------- lineage
def lineage(
    what: Annotated[str, typer.Argument(help="Request id of an answer, or (the start of) a model digest.")],
    file: FileOrNone = None,
    home: HomeFolder = None,
    output: Output = "text",
) -> None:
    """From an answer to its draft, pair, models and data; from a model to all that went into it."""
    place = _known(file, home)
    answer = _trace(place, what)
    digest = answer["weak_digest"] if answer else what
    chain = list(_ancestry(place, digest)) if digest else []
    if answer is None and not chain:
        raise StepError(f"{what}: wanted a request id from x-request-id or a model digest of this job, saw neither.")
    if output == "json":
        typer.echo(json.dumps({"answer": answer, "models": chain}, default=str))
        return
    if answer:
        for name in ("trace_id", "time", "arm", "mode", "pair_digest", "weak_digest", "prompts_digest", "draft_form",
                     "strong_model", "strong_version", "query", "draft", "answer"):  # fmt: skip
            typer.echo(f"{name:15} {printable(answer[name])}")
    for depth, part in enumerate(chain):
        typer.echo(f"{'  ' * depth}{part['step']} {part['digest']} <- {json.dumps(part['inputs'], default=str)}")


def _trace(place: jobs.Home, trace_id: str) -> dict[str, Any] | None:
    import pyarrow.compute as pc

    from cowest_serving.traces import read_traces

    table = read_traces(place.store.as_uri())
    rows = table.filter(pc.equal(table["trace_id"], trace_id)).to_pylist()
    return rows[0] if rows else None


def _manifests(place: jobs.Home) -> list[dict[str, Any]]:
    found = sorted(place.store.glob("runs/*/*/manifest.json"))
    return [{**jobs.read_json(path), "uri": path.parent.as_uri()} for path in found]


def _ancestry(place: jobs.Home, digest: str) -> Iterator[dict[str, Any]]:
    """Artifacts back from a model, nearest first: each artifact names the digests of its inputs."""
    manifests = _manifests(place)
    wanted = [digest if digest.startswith("sha256:") else f"sha256:{digest}"]
    seen: set[str] = set()
    while wanted:
        looked = wanted.pop(0)
        for manifest in manifests:
            if manifest["uri"] in seen or not manifest["digest"].startswith(looked):
                continue
            seen.add(manifest["uri"])
            yield manifest
            wanted += [v for v in _strings(manifest["inputs"]) if v.startswith("sha256:")]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
