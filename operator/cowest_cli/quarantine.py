"""`cowest quarantine`: the traces that rounds held back and why, and a person's word that lets some through."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cowest_cli import jobs
from cowest_cli.ledger import store_of
from cowest_cli.options import By, Output, Where, Why, spread
from cowest_cli.view import printable
from cowest_serving import store
from cowest_training.contract import StepError
from cowest_training.quarantine import QUARANTINE, collected, read_lines, release, released
from cowest_training.screen import MEANING

SHOWN = 20
WIDTH = 100  # characters of a query


@dataclass(frozen=True)
class Word:
    """What a person says of traces that were held back."""

    release: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACE", help="Let this trace through from the next round on; may be repeated, or `all`."),
    ] = None
    why: Why = ""
    by: By = None


@spread
def quarantine(
    where: Where,
    word: Word,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="Number of a round (default: the last that froze its data).")
    ] = None,
    reason: Annotated[str | None, typer.Option(help=f"Only these: {', '.join(MEANING)}.")] = None,
    store_uri: Annotated[
        str | None,
        typer.Option("--store", metavar="URI", help="Read this store of a job (s3://bucket/prefix), without the job."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Traces to show, 0: all.")] = SHOWN,
    output: Output = "text",
) -> None:
    """What a round did not learn from, and why; --release lets traces through.

    A round freezes its data without traces that look as if somebody wanted the pair to learn them (spec.trust): too
    much of one user, near copies, phrases that go with one answer. They are kept with the round, and this shows them.

    --release records who lets traces through and why; rounds that freeze their data from then on learn from them. With
    `all` those that the other options choose. What a round has frozen does not change. docs/trust.md has more.
    """
    root = store_of(where, store_uri)
    told, records = _records(root, number)
    if reason is not None and reason not in MEANING:
        raise StepError(f"--reason {reason}: wanted one of {', '.join(MEANING)}.")
    chosen = [record for record in records if reason in (None, record["reason"])]
    if word.release:
        _release(root, told, chosen, word, output)
        return
    free = released(root)
    if output == "json":
        typer.echo(json.dumps({"round": told, "quarantined": [_shown(record, free) for record in chosen]}))
        return
    counts = Counter(record["reason"] for record in chosen)
    listed = ", ".join(f"{count} {MEANING[name]}" for name, count in counts.most_common())
    typer.echo(f"round {told}: {len(chosen)} traces in quarantine{': ' if listed else ''}{listed}.")
    for record in chosen[: limit or None]:
        mark = " (released)" if record["trace_id"] in free else ""
        typer.echo(printable(f"{record['trace_id']}{mark}  {record['reason']}: {record['why']}"))
        typer.echo(printable(f"    {_query(record)[:WIDTH]}  -> {record['row']['reference'][:WIDTH]}"))
    if limit and len(chosen) > limit:
        typer.echo(f"{limit} of {len(chosen)} are shown; --limit 0 shows all.")


def _records(root: str, number: int | None) -> tuple[int, list[dict[str, Any]]]:
    """Number of the round, and what it held back."""
    there = collected(root)
    if not there:
        raise StepError(f"{root}: wanted a round that has frozen its data, saw none yet.")
    chosen = max(there) if number is None else number
    if chosen not in there:
        raise StepError(f"--round {number}: wanted a round that has frozen its data, saw {', '.join(map(str, there))}.")
    return chosen, read_lines(store.join(there[chosen], QUARANTINE))


def _release(root: str, number: int, chosen: Sequence[dict[str, Any]], word: Word, output: str) -> None:
    asked = word.release or []
    there = [record["trace_id"] for record in chosen]
    wanted = there if asked == ["all"] else list(dict.fromkeys(asked))
    if unknown := [trace_id for trace_id in wanted if trace_id not in there]:
        raise StepError(
            f"--release {unknown[0]}: wanted a trace in the quarantine of round {number}, saw none of that id."
        )
    if not wanted:
        raise StepError(f"--release: round {number} holds back no such trace.")
    if not word.why.strip():
        raise StepError("--release: wanted --why with it, saw none: the next person will ask.")
    place = release(root, wanted, by=jobs.who(word.by), why=word.why)
    if output == "json":
        typer.echo(json.dumps({"released": wanted, "uri": place}))
    else:
        typer.echo(f"{len(wanted)} traces are released: rounds that begin from now on may learn from them.")


def _query(record: dict[str, Any]) -> str:
    row = record["row"]
    return str(row.get("query") or row["messages"][-1]["content"])


def _shown(record: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    return {**record, "released": record["trace_id"] in free}
