"""Take what a user gave out of a job's store, and say what saw it: trace -> data set -> pairs -> models.

`cowest erase --user` calls it. A user is known by the hash that traces hold. Of traces and words the texts and the user
go; digests, times and counts stay. From frozen data sets, quarantines, ledgers and pairs the rows go; the manifest
beside them then names the files as they are, and its `digest` still what models were made of. A model cannot forget:
the report lists those that must be made anew.

Safe to run again after a kill: what is to go is written down first, below trust/erasures/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.contract import FEEDBACK_PREFIX, TRACES_PREFIX
from cowest_serving.traces import CONTENT_COLUMNS, segment
from cowest_training.contract import DATASET, LEDGER, PAIRS, Manifest
from cowest_training.data import TRACE_ID
from cowest_training.quarantine import PROVENANCE, QUARANTINE, TRUST_PREFIX, lines, parse_lines, read_lines
from cowest_training.steps import manifest_json, read_manifest

ERASURES = f"{TRUST_PREFIX}/erasures"
COUNTS = ("rows", "held_back", "drafts", "pairs")  # of a part
WORDS = ("reference", "comment", "correction", "accepted", "placeholders")  # of feedback


@dataclass(frozen=True)
class Part:
    """An artifact that saw what the user gave."""

    round: int
    step: str
    uri: str
    digest: str
    rows: int = 0  # of a data set
    held_back: int = 0  # of its quarantine
    drafts: int = 0  # of a ledger
    pairs: int = 0
    why: str = ""  # of a model
    role: str = ""  # of a model that is in use: stable, previous, candidate


@dataclass(frozen=True)
class Report:
    """What saw the user's data. `clean`: the newest model that did not, `None` where each did."""

    user: str  # hash
    traces: int
    words: int  # of feedback, theirs or of their traces
    datasets: tuple[Part, ...]
    ledgers: tuple[Part, ...]
    models: tuple[Part, ...]
    clean: str | None
    calls: tuple[str, ...]  # keys of paid calls whose answers are to their queries

    def for_programs(self) -> dict[str, Any]:
        told = asdict(self)
        calls = told.pop("calls")
        return {**told, "paid_answers": len(calls)}


def look(root: str, user: str, roles: Mapping[str, str] | None = None) -> Report:
    """All that saw what the user gave. `roles`: digest of a weak model that is in use -> as what."""
    return _report(root, user, _trace_ids(root, user), roles or {})


def trail(root: str, trace_id: str) -> Report:
    """All that saw one trace."""
    return _report(root, None, {trace_id}, {})


def _report(root: str, user: str | None, ids: set[str], roles: Mapping[str, str]) -> Report:
    before = list(_unfinished(root, user).values()) if user else []
    words = [each.get("words", 0) for each in before]
    if user:
        said = (_of_user(each, "source", user, ids) for _, each in _segments(root, FEEDBACK_PREFIX))
        words.append(sum(pc.sum(mine).as_py() or 0 for mine in said))
    manifests = list(_manifests(root))
    rows = _row_ids(root, ids, user)
    datasets = [part for each in manifests if each[1] == "collect" and (part := _dataset(*each, rows))]
    ledgers, calls = [], set[str]()
    for number, step, uri, manifest in manifests:
        if step == "feedback" and (part := _ledger(number, uri, manifest, rows, calls)):
            ledgers.append(part)
    ledgers = _joined(ledgers, _parts(before, "ledgers"))
    models = _joined(_models(manifests, ledgers, roles), _parts(before, "models"))
    affected = {model.digest for model in models}
    clean = [m.digest for _, _, _, m in manifests if m.kind == "Model" and m.digest not in affected]
    return Report(
        user or "",
        len(ids),
        max(words, default=0),
        tuple(_joined(datasets, _parts(before, "datasets"))),
        tuple(ledgers),
        tuple(models),
        clean[-1] if clean else None,
        tuple(sorted(calls)),
    )


def erase(root: str, report: Report, *, by: str, why: str) -> str:
    """Take it out; where the report of it lies then."""
    ids = _trace_ids(root, report.user)
    rows = _row_ids(root, ids, report.user)
    now = datetime.now(UTC)
    place = store.join(root, ERASURES, f"{now:%Y%m%dT%H%M%S}-{report.user[:12]}.json")
    told = {**report.for_programs(), "user": report.user[:12], "by": by, "why": why}
    told["at"] = now.isoformat(timespec="seconds")
    begun = {**told, "begun": {"user": report.user, "trace_ids": sorted(ids), "rows": sorted(rows)}}
    store.put(place, json.dumps(begun, ensure_ascii=False).encode())
    for uri, table in _segments(root, TRACES_PREFIX):
        _put(uri, _redacted(table, _of_user(table, "user_hash", report.user, ids), CONTENT_COLUMNS, "user_hash"))
    for uri, table in _segments(root, FEEDBACK_PREFIX):
        _put(uri, _redacted(table, _of_user(table, "source", report.user, ids), WORDS, "source"))
    frozen = [(step, uri, manifest) for _, step, uri, manifest in _manifests(root)]
    for step, uri, manifest in frozen:
        if step == "feedback":
            _rewrite(uri, manifest, {LEDGER: _without_queries(rows), PAIRS: _without_lines("query_id", rows)})
    for step, uri, manifest in frozen:
        if step == "collect":
            _rewrite(uri, manifest, dict.fromkeys((DATASET, PROVENANCE, QUARANTINE), _without_lines("id", rows)))
    store.put(place, json.dumps(told, ensure_ascii=False, indent=1).encode())
    for old in _unfinished(root, report.user):
        store.delete(old)
    return place


# ---------------------------------------------------------------- what is of the user
def _trace_ids(root: str, user: str) -> set[str]:
    """Of the user's traces: those in the store, those that rounds froze, and those of an erasure that was cut off."""
    ids = {record["trace_id"] for record in _origins(root) if record["user"] == user}
    for _, table in _segments(root, TRACES_PREFIX):
        ids.update(table.filter(_of_user(table, "user_hash", user, set()))["trace_id"].to_pylist())
    for before in _unfinished(root, user).values():
        ids.update(before["begun"]["trace_ids"])
    return ids


def _row_ids(root: str, ids: set[str], user: str | None) -> set[str]:
    """Of the rows that these traces became, and of those whose reference the user gave in any round."""
    rows = {f"{TRACE_ID}{trace_id}" for trace_id in ids}
    if user:
        rows.update(record["id"] for record in _origins(root) if record["said_by"] == user)
        for before in _unfinished(root, user).values():
            rows.update(before["begun"].get("rows", ()))
    return rows


def _origins(root: str) -> Iterator[dict[str, Any]]:
    for _, step, uri, _ in _manifests(root):
        if step == "collect":
            for name in (PROVENANCE, QUARANTINE):
                yield from read_lines(store.join(uri, name))


def _unfinished(root: str, user: str) -> dict[str, dict[str, Any]]:
    """URI -> report of each erasure of theirs that was cut off: what it took out is seen nowhere else any more."""
    found = [uri for uri in store.list_files(store.join(root, ERASURES)) if uri.endswith(".json")]
    reports = {uri: json.loads(store.get(uri)) for uri in found}
    return {uri: report for uri, report in reports.items() if report.get("begun", {}).get("user") == user}


def _of_user(table: pa.Table, column: str, user: str | None, ids: set[str]) -> pa.ChunkedArray:
    mine = pc.is_in(table["trace_id"], value_set=pa.array(sorted(ids), pa.string()))
    if not user or column not in table.column_names:  # of another version
        return mine
    return pc.or_(mine, pc.fill_null(pc.equal(table[column], user), False))


# ---------------------------------------------------------------- what saw it
def _manifests(root: str) -> Iterator[tuple[int, str, str, Manifest]]:
    """(round, step, URI, manifest) of all artifacts, oldest round first."""
    runs = store.join(root, "runs")
    found = []
    for file in store.list_files(runs):
        parts = file.removeprefix(runs).strip("/").split("/")
        if len(parts) == 3 and parts[2] == store.LAST and parts[0][1:].isdecimal():
            found.append((int(parts[0][1:]), parts[1], file.removesuffix(f"/{store.LAST}")))
    for number, step, uri in sorted(found):
        if (manifest := read_manifest(uri)) is not None:
            yield number, step, uri, manifest


def _parts(reports: Iterable[Mapping[str, Any]], name: str) -> Iterator[Part]:
    return (Part(**part) for report in reports for part in report.get(name, ()))


def _joined(seen: Iterable[Part], before: Iterable[Part]) -> list[Part]:
    """What is seen now and what was seen before a part of it was taken out: the larger counts."""
    found = {(part.round, part.step): part for part in seen}
    for old in before:
        new = found.setdefault((old.round, old.step), old)
        counts = {name: max(getattr(old, name), getattr(new, name)) for name in COUNTS}
        found[old.round, old.step] = replace(new, **counts)
    return [found[key] for key in sorted(found)]


def _dataset(number: int, step: str, uri: str, manifest: Manifest, rows: set[str]) -> Part | None:
    kept, held_back = (
        sum(record["id"] in rows for record in read_lines(store.join(uri, name))) for name in (DATASET, QUARANTINE)
    )
    return Part(number, step, uri, manifest.digest, kept, held_back) if kept or held_back else None


def _ledger(number: int, uri: str, manifest: Manifest, rows: set[str], calls: set[str]) -> Part | None:
    """`calls` takes in the keys of the paid calls."""
    if LEDGER not in manifest.outputs:
        return None
    columns = ["query_id", "answer_call", "solo_call"]
    records = pq.ParquetFile(BytesIO(store.get(store.join(uri, LEDGER)))).read(columns=columns).to_pylist()
    mine = [record for record in records if record["query_id"] in rows]
    calls.update(record[side] for record in mine for side in ("answer_call", "solo_call") if record[side])
    pairs = sum(record["query_id"] in rows for record in read_lines(store.join(uri, PAIRS)))
    return Part(number, "feedback", uri, manifest.digest, drafts=len(mine), pairs=pairs) if mine else None


def _models(
    manifests: Iterable[tuple[int, str, str, Manifest]], ledgers: Iterable[Part], roles: Mapping[str, str]
) -> Iterator[Part]:
    """Tuned on a pair of the user's, learnt from their part of a ledger, or made of a model that was."""
    saw = {ledger.round: ledger for ledger in ledgers}
    affected: set[str] = set()
    for number, step, uri, manifest in manifests:
        ledger, base = saw.get(number), str(manifest.inputs.get("model", ""))
        why, again = "", manifest.inputs.get("replayed", ())
        pairs = sum(each.pairs for each in saw.values() if each is ledger or each.digest in again)
        if step == "dpo" and pairs:
            why = f"tuned on {pairs} of their pairs"
        elif step == "predictor" and ledger is not None:
            why = f"learnt from {ledger.drafts} of their drafts"
        elif base in affected:
            why = f"made of {base}"
        if why:
            affected.add(manifest.digest)
            yield Part(number, step, uri, manifest.digest, why=why, role=roles.get(manifest.digest, ""))


# ---------------------------------------------------------------- taking it out
Rewrite = Callable[[bytes], bytes]


def _segments(root: str, prefix: str) -> Iterator[tuple[str, pa.Table]]:
    for uri in store.list_files(store.join(root, prefix)):
        if uri.endswith(".parquet"):
            yield uri, pq.ParquetFile(BytesIO(store.get(uri))).read()


def _redacted(table: pa.Table, rows: pa.ChunkedArray, texts: Iterable[str], who: str) -> pa.Table | None:
    """Texts and user of these rows gone; `None` where there is none."""
    if not pc.any(rows).as_py():
        return None
    for name in texts:
        if name in table.column_names:
            table = _replaced(
                table, name, pc.if_else(rows, pa.scalar(None, table.schema.field(name).type), table[name])
            )
    if who not in table.column_names:
        return table
    return _replaced(table, who, pc.if_else(rows, pa.scalar("", pa.string()), table[who]))


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def _put(uri: str, table: pa.Table | None) -> None:
    if table is not None:
        store.put(uri, segment(table))


def _rewrite(uri: str, manifest: Manifest, changes: Mapping[str, Rewrite]) -> None:
    """The files, then the manifest that names them."""
    outputs, changed = dict(manifest.outputs), False
    for name, change in changes.items():
        if name not in outputs:
            continue
        before = store.get(store.join(uri, name))
        after = change(before)
        if after != before:
            store.put(store.join(uri, name), after)
        digest = sha256(after).hexdigest()
        changed = changed or digest != outputs[name]
        outputs[name] = digest
    if changed:
        metrics = {**manifest.metrics, "erased": int(manifest.metrics.get("erased", 0)) + 1}
        store.put(store.join(uri, store.LAST), manifest_json(replace(manifest, outputs=outputs, metrics=metrics)))


def _without(is_gone: Callable[[Mapping[str, Any]], bool]) -> Rewrite:
    def rewrite(data: bytes) -> bytes:
        records = parse_lines(data)
        left = [record for record in records if not is_gone(record)]
        return data if len(left) == len(records) else lines(left)

    return rewrite


def _without_lines(key: str, gone: set[str]) -> Rewrite:
    return _without(lambda record: record[key] in gone)


def _without_queries(gone: set[str]) -> Rewrite:
    def rewrite(data: bytes) -> bytes:
        table = pq.ParquetFile(BytesIO(data)).read()
        mine = pc.is_in(table["query_id"], value_set=pa.array(sorted(gone), pa.string()))
        if not pc.any(mine).as_py():
            return data
        sink = pa.BufferOutputStream()
        pq.write_table(table.filter(pc.invert(mine)), sink, compression="zstd")
        return bytes(sink.getvalue())

    return rewrite
