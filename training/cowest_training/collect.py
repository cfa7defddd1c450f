"""Freeze a round's data set: the train rows and the traces that can be learnt from.

A trace can be learnt from when it was answered in full, is no replay, asks no held-out query again (equal or nearly),
and has a late reference that the evaluator can go by, or the evaluator needs none. The latest reference wins, and of
equal queries the latest trace. What looks as if somebody wanted the pair to learn it is held back, with its reason
(`screen`). Once written the data set of a round does not change, whatever traces come in.

    python -m cowest_training.collect --job job.yaml --train /d/train.jsonl --held-out /d/held_out.jsonl \\
        --store file:///d/store --round 1 --out file:///d/store/r1/data

Writes dataset.jsonl, provenance.jsonl (the trace and the user of each row that was one), quarantine.jsonl (what is held
back), README.md (the card) and manifest.json. The engine counts usable traces with `count_usable`.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cowest_serving import store
from cowest_serving.contract import FEEDBACK_PREFIX, TRACES_PREFIX, Redaction
from cowest_serving.redaction import Redactor, digests_of, joined_reference
from cowest_serving.traces import read_columns, read_feedback
from cowest_training import quarantine, screen
from cowest_training.cards import DatasetCard, dataset_card
from cowest_training.contract import DATASET, EXIT_OK, Evaluator, Manifest, Row, evaluator_digest
from cowest_training.data import (
    TRACE_ID,
    Known,
    check_split,
    conversation_key,
    parse_row,
    read_rows,
    rows_digest,
    write_jsonl,
)
from cowest_training.evaluator import (
    RuleScorer,
    check_references,
    needs_reference,
    reference_problem,
    token_f1,
    wanted_reference,
)
from cowest_training.steps import Output, Progress, code_version, load_settings, open_output, parser, run, say

AGREES = 0.5  # score from which an answer agrees with a reference

# Why a trace is left out.
SHADOW = "Shadow"
FAILED = "Failed"
NO_CONTENT = "NoContent"
NOT_TEXT = "NotText"
HELD_OUT = "HeldOut"
NO_REFERENCE = "NoReference"
WRONG_REFERENCE = "WrongReference"
DUPLICATE = "Duplicate"
IN_TRAIN = "InTrain"
MEANING: Mapping[str, str] = {
    SHADOW: "replays of other traces",
    FAILED: "not answered in full",
    NO_CONTENT: "kept without their content (traces.contentSamplePercent)",
    NOT_TEXT: "conversations that are not text alone",
    HELD_OUT: "equal or nearly equal to a held-out query",
    NO_REFERENCE: "without a late reference (POST /v1/feedback gives them one)",
    WRONG_REFERENCE: "with a late reference that the evaluator cannot go by",
    DUPLICATE: "asked again later (the last one counts)",
    IN_TRAIN: "asked by a train row already",
}


@dataclass(frozen=True)
class TraceCounts:
    all: int
    usable: int
    reason: str  # why the others are not usable, as a sentence; "" when all are
    times: Sequence[float] = field(default=(), compare=False, repr=False)  # when the usable ones were given, in order

    def since(self, epoch: float) -> int:
        """How many of the usable ones were given after that."""
        return len(self.times) - bisect_right(self.times, epoch)


@dataclass(frozen=True)
class Usable:
    """Traces as rows, oldest first, and how many were left out by reason."""

    rows: tuple[Row, ...]
    excluded: Mapping[str, int]

    @property
    def all(self) -> int:
        return len(self.rows) + sum(self.excluded.values())


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    settings = load_settings(args.job)
    evaluator, redaction = settings.feedback.evaluator, settings.collaboration.redaction
    train, held_out = read_rows(args.train), read_rows(args.held_out)
    check_split(train, held_out)
    for rows in (train, held_out):
        check_references(rows, evaluator)
    inputs = {
        "train": rows_digest(train),
        "held_out": rows_digest(held_out),
        "evaluator": evaluator_digest(evaluator),
        "store": args.store,
        "round": args.round,
    }
    output = open_output(args.out, step="collect", inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    progress = Progress(args.progress, "collect")
    progress.update(0, None, "rows", "reading traces")
    redactor = Redactor(redaction) if redaction else None
    traces = usable_traces(args.store, evaluator, Known(tuple(held_out), redactor)) if args.store else Usable((), {})
    rows, in_train = merged(train, traces.rows, redactor)
    new = origins(args.store, rows[len(train) :], evaluator) if args.store else []
    progress.update(0, None, "rows", f"screening {len(new)} traces")
    let_through = quarantine.released(args.store) if args.store else frozenset()
    screened = (
        screen.screen(train, new, settings.trust, let_through) if settings.trust else screen.Screened(tuple(new), ())
    )
    rows = [*train, *(seen.row for seen in screened.kept)]
    alarm = screen.sentence(screened.counts, len(new))
    excluded = {**traces.excluded, **({IN_TRAIN: in_train} if in_train else {})}
    metrics = {
        "rows": len(rows),
        "from_train": len(train),
        "from_traces": len(rows) - len(train),
        "traces_all": traces.all,
        "traces_usable": len(traces.rows),
        "excluded": excluded,
        "quarantined": screened.counts,
        "alarms": [f"{alarm}; `cowest quarantine` shows them."] if alarm else [],
    }
    write(output, rows, screened, metrics)
    if alarm:
        say(f"{alarm}.")
    progress.update(len(rows), len(rows), "rows", "; ".join(filter(None, ("data set frozen", alarm))))
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> Any:
    flags = parser(__doc__)
    flags.add_argument("--train", required=True, metavar="URI", help="rows to learn from, JSONL or Parquet")
    flags.add_argument("--held-out", required=True, metavar="URI", help="rows that must not be learnt from")
    flags.add_argument("--store", metavar="URI", help="object store with traces and feedback; none: train rows only")
    flags.add_argument("--round", required=True, type=int, metavar="N")
    return flags.parse_args(argv)


def write(output: Output, rows: Sequence[Row], screened: screen.Screened, metrics: Mapping[str, Any]) -> None:
    digest = rows_digest(rows)
    held_back = {screen.MEANING[reason]: count for reason, count in screened.counts.items()}
    card = DatasetCard(
        step="collect",
        digest=digest,
        rows=len(rows),
        files=(DATASET, quarantine.PROVENANCE, quarantine.QUARANTINE),
        description=f"Queries and references that round {output.inputs['round']} learns from.",
        sources={name: str(output.inputs[name]) for name in ("train", "held_out", "store") if output.inputs[name]},
        left_out={MEANING[reason]: count for reason, count in metrics["excluded"].items()} | held_back,
        columns={
            "id": "of the train row, or `trace-` and the request's id",
            "query": "what was asked; `messages` in its place where it was a conversation",
            "reference": "the right answer, empty where the evaluator needs none",
            "explanation": "what supervised tuning learns as the draft, where there is one",
            "group": "slice that is reported by itself, where there is one",
            "source": "`trace` for rows from live traffic",
        },
        version=code_version(),
    )
    (output.folder / DATASET).write_bytes(write_jsonl(rows))
    origin = quarantine.lines(map(quarantine.provenance_of, screened.kept))
    (output.folder / quarantine.PROVENANCE).write_bytes(origin)
    suspects = quarantine.lines(map(quarantine.suspect_record, screened.suspects))
    (output.folder / quarantine.QUARANTINE).write_bytes(suspects)
    (output.folder / "README.md").write_text(dataset_card(card), encoding="utf-8")
    output.finish(kind="Dataset", metrics=metrics, digest=digest)


def merged(train: Sequence[Row], traces: Sequence[Row], redactor: Redactor | None = None) -> tuple[list[Row], int]:
    """Train rows, then the traces that ask something else; and how many traces do not."""

    def key(row: Row) -> tuple[str, ...]:
        return conversation_key(redactor.comparable(row.messages) if redactor else row.messages)

    known = {key(row) for row in train}
    new = [row for row in traces if key(row) not in known]
    return [*train, *new], len(traces) - len(new)


# ---------------------------------------------------------------- traces
def usable_traces(store_uri: str, evaluator: Evaluator, held_out: Known, since: float | None = None) -> Usable:
    """The traces (since an epoch time) that can be learnt from."""
    late = late_words(read_feedback(store_uri).select(["trace_id", "reference", "placeholders"]).to_pylist())
    traces = read_columns(store_uri, ["trace_id", "status", "shadow", "messages", "placeholders"], since).to_pylist()
    excluded: Counter[str] = Counter()
    latest: dict[Any, Row] = {}
    for trace in traces:
        word = late.get(trace["trace_id"])
        row = as_row(trace, joined_reference(word, digests_of(trace)) if word else "", evaluator, held_out)
        if isinstance(row, str):
            excluded[row] += 1
            continue
        key = conversation_key(row.messages)
        excluded[DUPLICATE] += key in latest
        latest.pop(key, None)  # so that the later one also takes the later place
        latest[key] = row
    return Usable(tuple(latest.values()), {reason: count for reason, count in excluded.items() if count})


def late_words(feedback: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Trace id -> the word with its latest reference; `feedback` is oldest first. A bare score takes nothing back."""
    return {item["trace_id"]: item for item in feedback if (item["reference"] or "").strip()}


def as_row(trace: Mapping[str, Any], reference: str | None, evaluator: Evaluator, held_out: Known) -> Row | str:
    """The trace as a row to learn from, or the reason why it is left out. `reference`: None where it says of whom
    nobody can tell (`redaction.joined`)."""
    if trace["shadow"]:
        return SHADOW
    if trace["status"] != "ok":
        return FAILED
    if not trace["messages"]:
        return NO_CONTENT
    record = {"id": f"{TRACE_ID}{trace['trace_id']}", "reference": reference or "", "source": "trace"}
    try:
        row = parse_row({**record, "messages": json.loads(trace["messages"])}, "")
    except ValueError:  # tool calls, images, a conversation that the assistant ends
        return NOT_TEXT
    if held_out.find(row.messages):
        return HELD_OUT
    if needs_reference(evaluator) and reference == "":
        return NO_REFERENCE
    return WRONG_REFERENCE if reference_problem(evaluator, row.reference) else row


# ---------------------------------------------------------------- where they came from
def origins(store_uri: str, rows: Sequence[Row], evaluator: Evaluator) -> list[screen.Seen]:
    """Of rows that were traces who asked, who gave the reference, and whether what was answered agrees with it."""
    if not rows:
        return []
    said_by = late_words(read_feedback(store_uri).select(["trace_id", "reference", "source"]).to_pylist())
    traces = read_columns(store_uri, ["trace_id", "user_hash", "application", "answer"]).to_pylist()
    by_id = {trace["trace_id"]: trace for trace in traces}
    found = [(row, by_id.get(row.id.removeprefix(TRACE_ID), {})) for row in rows]
    agreed = asyncio.run(_agree(evaluator, [(row, trace.get("answer") or "") for row, trace in found]))
    return [
        screen.Seen(
            row,
            trace_id := row.id.removeprefix(TRACE_ID),
            user=trace.get("user_hash") or "",
            application=trace.get("application") or "",
            said_by=said_by.get(trace_id, {}).get("source") or "",
            answer=trace.get("answer") or "",
            agrees=agree,
        )
        for (row, trace), agree in zip(found, agreed, strict=True)
    ]


async def _agree(evaluator: Evaluator, answered: Sequence[tuple[Row, str]]) -> list[bool | None]:
    """By the manifest's rule, or by the words where scoring would cost a call; None where it cannot be told."""
    rule = RuleScorer(evaluator) if needs_reference(evaluator) else None
    found: list[bool | None] = []
    for row, answer in answered:
        if not answer.strip() or not row.reference.strip() or (rule and reference_problem(evaluator, row.reference)):
            found.append(None)
        else:
            found.append((await rule(row, answer) if rule else token_f1(answer, row.reference)) >= AGREES)
    return found


# ---------------------------------------------------------------- what the engine asks
def count_usable(store_uri: str, *, evaluator: Evaluator, held_out: Known, since: float | None = None) -> TraceCounts:
    """How many traces could be learnt from now. Cheap to ask again while no trace or feedback has come in."""
    seen = "".join(store.fingerprint(store.join(store_uri, prefix)) for prefix in (TRACES_PREFIX, FEEDBACK_PREFIX))
    return _counted(seen, store_uri, evaluator, held_out, since)


def held_out_keys(uri: str, redaction: Redaction | None = None) -> Known:
    """The held-out queries, ready to be asked for; read again only when the file changes."""
    return _known(store.fingerprint(uri), uri, redaction)


@lru_cache(maxsize=4)
def _counted(
    _fingerprint: str, store_uri: str, evaluator: Evaluator, held_out: Known, since: float | None
) -> TraceCounts:
    usable = usable_traces(store_uri, evaluator, held_out, since)
    return TraceCounts(usable.all, len(usable.rows), reason_of(usable.excluded, evaluator))


@lru_cache(maxsize=4)
def _known(_fingerprint: str, uri: str, redaction: Redaction | None) -> Known:
    return Known(tuple(read_rows(uri)), Redactor(redaction) if redaction else None)


def reason_of(excluded: Mapping[str, int], evaluator: Evaluator) -> str:
    """`Not usable: 3 without a late reference (...), 1 replays of other traces.`"""
    most_first = sorted(excluded.items(), key=lambda item: (-item[1], item[0]))
    meaning = {**MEANING, WRONG_REFERENCE: f"{MEANING[WRONG_REFERENCE]} (wanted {wanted_reference(evaluator)})"}
    listed = ", ".join(f"{count} {meaning[reason]}" for reason, count in most_first)
    return f"Not usable: {listed}." if listed else ""


if __name__ == "__main__":
    run(main)
