"""What a round's `collect` did not learn from and why, and what people let through all the same.

    <data set>/quarantine.jsonl   the traces that `screen` held back: reason, sentence, where they came from, the row
    <data set>/provenance.jsonl   of each row that was a trace: its trace, user, application, and who gave the reference
    <store>/trust/released/       a file a word: ids of traces that rounds from now on may learn from, who said so, why

Users are hashes, as in the traces. Both files outlive the traces, so that what a user gave is found after
`traces.retentionDays` too.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cowest_serving import store
from cowest_training.data import row_record
from cowest_training.screen import Seen, Suspect

QUARANTINE, PROVENANCE = "quarantine.jsonl", "provenance.jsonl"
TRUST_PREFIX, RELEASED = "trust", "trust/released"
COLLECTED = re.compile(r"/runs/r(\d+)/collect/manifest\.json$")


def provenance_of(seen: Seen) -> dict[str, str]:
    return {
        "id": seen.row.id,
        "trace_id": seen.trace_id,
        "user": seen.user,
        "application": seen.application,
        "said_by": seen.said_by,
    }


def suspect_record(suspect: Suspect) -> dict[str, Any]:
    told = {"reason": suspect.reason, "why": suspect.why, "row": row_record(suspect.seen.row)}
    return {**provenance_of(suspect.seen), **told}


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read_lines(uri: str) -> list[dict[str, Any]]:
    """None where there is no such file."""
    return parse_lines(store.get(uri)) if store.exists(uri) else []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


def collected(root: str) -> dict[int, str]:
    """Number of each round whose data are frozen -> its data set, in order."""
    found = {
        int(match[1]): uri for uri in store.list_files(store.join(root, "runs")) if (match := COLLECTED.search(uri))
    }
    return {number: found[number].removesuffix(f"/{store.LAST}") for number in sorted(found)}


def release(root: str, trace_ids: Sequence[str], *, by: str, why: str) -> str:
    """Where the word lies by which rounds that begin from now on learn from these traces."""
    now = datetime.now(UTC)
    word = {"trace_ids": list(trace_ids), "by": by, "why": why, "at": now.isoformat(timespec="seconds")}
    place = store.join(root, RELEASED, f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.json")
    store.put(place, json.dumps(word, ensure_ascii=False).encode())
    return place


def released(root: str) -> frozenset[str]:
    places = [uri for uri in store.list_files(store.join(root, RELEASED)) if uri.endswith(".json")]
    return frozenset(trace_id for uri in places for trace_id in json.loads(store.get(uri))["trace_ids"])
