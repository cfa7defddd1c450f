"""`cowest erase`: what a user gave goes out of a job, and a report says what saw it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cowest_cli import jobs
from cowest_cli.actions import in_cluster, known
from cowest_cli.options import By, Output, Where, Why, spread
from cowest_cli.view import printable
from cowest_operator import api
from cowest_serving.answering import user_hash
from cowest_training import forget
from cowest_training.contract import StepError

NOT_REACHED = (
    "copies that people exported (`cowest ledger --dataset`), backups, and what endpoints kept of their calls",
    "rows of data.train and data.heldOut, which are yours, and the file of labels that `cowest review` writes",
    "answers that canary.signal: ShadowReplay got to live queries, in the book, and drafts beside it (<calls>.drafts/)",
    "shards of a round that was given up before they were merged",
    "records of a killed run that are still in the spool: erase again once a run has shipped them",
)
IN_CLUSTER = "the book of the job's strong-model proxy, which keeps answers without their questions, until the job goes"


@dataclass(frozen=True)
class User:
    """Whose data are meant."""

    user: Annotated[str | None, typer.Option(help="The user as clients name them (`user`, or the session).")] = None
    hashed: Annotated[
        str | None, typer.Option("--user-hash", metavar="HEX", help="Their hash, as traces have it (`user_hash`).")
    ] = None


@spread
def erase(
    where: Where,
    whose: User,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what saw it.")] = False,
    why: Why = "",
    by: By = None,
    output: Output = "text",
) -> None:
    """Take what a user gave out of a job, and say which models saw it.

    Their texts go from traces and feedback, their rows from frozen data sets, quarantines, ledgers and pairs, and the
    answers to their queries from the book of paid calls (of a job on this machine). Counts, digests and decisions stay.
    A model cannot forget: the report lists those that were tuned on their pairs or made of one that was, which of them
    are in use, and the newest that never saw them. It is kept in the store, below trust/erasures/.

    A job on this machine must not run meanwhile. Of a job in a cluster the store is read and written with your own keys
    as by `lineage`; suspend it first, so that no round freezes data meanwhile.
    """
    user = _hash_of(whose)
    job = in_cluster(where)
    with ExitStack() as held:
        if job:
            seen = job.known()
            root, status, book = job.open_store(seen), seen.status, None
        else:
            place = known(where)
            if not dry_run:
                held.enter_context(_at_rest(place))
            root, status, book = place.store.as_uri(), jobs.read_status(place), place.calls
        report = forget.look(root, user, _roles(status))
        uri = ""
        if not dry_run:
            if book is not None:
                blank(book, report.calls)
            uri = forget.erase(root, report, by=jobs.who(by), why=why)
    left = [*NOT_REACHED, *([IN_CLUSTER] if job else [])]
    if output == "json":
        typer.echo(json.dumps({**report.for_programs(), "uri": uri or None, "not_reached": left}))
        return
    for line in _lines(report, dry_run, uri):
        typer.echo(printable(line))
    typer.echo(f"Not reached: {'; '.join(left)}.")


@contextmanager
def _at_rest(place: jobs.Home) -> Iterator[None]:
    """No `cowest run` of the job is alive, and none begins meanwhile. Raises `StepError`."""
    if jobs.runs(place):
        raise StepError(f"{place.root}: wanted a job that does not run, saw one that does. Stop `cowest run` first.")
    with jobs.locked(place):
        yield


def _hash_of(whose: User) -> str:
    if (whose.user is None) == (whose.hashed is None):
        raise StepError("wanted --user or --user-hash, saw neither or both.")
    found = whose.hashed or user_hash(whose.user)
    if not found:
        raise StepError("--user: wanted the name of a user, saw an empty one.")
    return found


def _roles(status: api.Status) -> dict[str, str]:
    """Weak models that are in use; the last word wins."""
    trial = status.candidate.pair if status.candidate else None
    pairs = (("previous", status.previous), ("candidate", trial), ("stable", status.stable))
    return {pair.weak_digest: role for role, pair in pairs if pair is not None}


def _lines(report: forget.Report, dry_run: bool, uri: str) -> Iterator[str]:
    done = "would go" if dry_run else "are gone"
    yield f"user {report.user[:12]}: the texts of {report.traces} traces and {report.words} words of feedback {done}."
    for part in report.datasets:
        yield f"round {part.round}: data set {part.digest}: {part.rows} rows, and {part.held_back} in its quarantine."
    for part in report.ledgers:
        yield f"round {part.round}: ledger {part.digest}: {part.drafts} drafts, {part.pairs} pairs."
    for part in report.models:
        used = f", {part.role} now" if part.role else ""
        yield f"round {part.round}: model {part.digest} ({part.step}{used}): {part.why}; it must be made anew."
    if not report.models:
        yield "No model saw it."
    elif report.clean:
        yield f"The newest model that never saw it is {report.clean}; `cowest propose` brings it back."
    else:
        yield "No model of this job is free of it: begin from weak.model."
    if uri:
        yield f"The report is kept: {uri}"


def blank(book: Path, keys: Sequence[str]) -> int:
    """Answers to these calls out of a book of paid calls: what was paid stays on the bill. How many there were."""
    if not book.exists():
        return 0
    with closing(sqlite3.connect(book, timeout=30)) as db, db:
        gone = 0
        for key in keys:
            changed = db.execute(
                "UPDATE calls SET key = 'erased-' || hex(randomblob(8)), text = '' WHERE key = ?", (key,)
            )
            gone += changed.rowcount
            db.execute("DELETE FROM completions WHERE key = ?", (key,))
        return gone
