"""Records of answers and feedback, kept as typed zstd Parquet segments in the object store.

The gateway writes through a `TraceSink`: `TraceWriter` keeps rows in memory until the store has them, `SpooledTraces`
on the gateway's disk. `collect` and `score_live` read. A segment lies at
`<store>/traces/<YYYY-MM-DD>/<HHMMSS>-<writer>-<n>.parquet` and is never changed. Its name is the time of
writing, never before the time of any of its rows: a reader of rows since a time skips older segments unread. Of the
same lane a writer's numbers appear in order, with gaps: a reader's mark is the last number of each writer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.contract import FEEDBACK_COLUMNS, FEEDBACK_PREFIX, TRACE_COLUMNS, TRACES_PREFIX
from cowest_serving.spool import PATIENCE, File, Frames, LogFile, Pace, Spool

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
CONTENT_COLUMNS = ("query", "messages", "draft", "answer", "tool_calls", "placeholders")
UNIQUE_COLUMNS = {*CONTENT_COLUMNS, "trace_id", "feedback_id", "time", "draft_ms", "answer_ms", "reference", "comment"}

_TYPES: Mapping[str, pa.DataType] = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "timestamp[us, UTC]": pa.timestamp("us", tz="UTC"),
}


def schema(columns: Mapping[str, str]) -> pa.Schema:
    return pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])


TRACE_SCHEMA = schema(TRACE_COLUMNS)
FEEDBACK_SCHEMA = schema(FEEDBACK_COLUMNS)


# ---------------------------------------------------------------- writing
class TraceSink(Protocol):
    """Where the gateway puts its records.

    `keep*` never raise, and begin before they are awaited. True: the record is durable, whatever happens to this
    process. False: it waits in memory, or was not on the disk in time. None: a row was dropped.
    """

    def keep(self, row: Row, others: int = 0) -> asyncio.Future[bool] | None:
        """`others`: answers under way besides this one, which may share its commit."""
        ...

    def keep_feedback(self, row: Row) -> asyncio.Future[bool] | None: ...

    @property
    def is_full(self) -> bool:
        """The next record could not be made durable."""
        ...

    @property
    def spool_bytes(self) -> int:
        """On this machine's disk, for the store to take."""
        ...

    def counts(self) -> Mapping[str, int]:
        """Rows by what became of them (written, failed_writes, dropped, waiting, ...), for the metrics."""
        ...

    async def start(self) -> None: ...

    async def aclose(self) -> None:
        """Write what is waiting."""
        ...


class TraceWriter:
    """Writes rows in batches: every `flush_seconds`, or as soon as `flush_rows` are waiting.

    While the store is in trouble rows wait in memory (at most `max_waiting` of each kind), then the oldest
    are dropped and counted: an answer never waits for its record.
    """

    def __init__(
        self,
        store_uri: str,
        writer_id: str,
        *,
        flush_seconds: float = 0.5,
        flush_rows: int = 500,
        max_waiting: int = 20_000,
    ) -> None:
        self._traces = _Lane(store.join(store_uri, TRACES_PREFIX), writer_id, TRACE_SCHEMA, max_waiting)
        self._feedback = _Lane(store.join(store_uri, FEEDBACK_PREFIX), writer_id, FEEDBACK_SCHEMA, max_waiting)
        self._flush_seconds, self._flush_rows = flush_seconds, flush_rows
        self._full = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def add(self, row: Row) -> bool:
        return self._put(self._traces, row)

    def add_feedback(self, row: Row) -> bool:
        return self._put(self._feedback, row)

    def keep(self, row: Row, others: int = 0) -> asyncio.Future[bool] | None:
        return _not_durable() if self.add(row) else None

    def keep_feedback(self, row: Row) -> asyncio.Future[bool] | None:
        return _not_durable() if self.add_feedback(row) else None

    @property
    def is_full(self) -> bool:
        return False

    @property
    def spool_bytes(self) -> int:
        return 0

    def _put(self, lane: _Lane, row: Row) -> bool:
        kept = lane.put(row)
        if len(lane.waiting) >= self._flush_rows:
            self._full.set()
        return kept

    def counts(self) -> Mapping[str, int]:
        lanes = (self._traces, self._feedback)
        return {
            "written": sum(lane.written for lane in lanes),
            "dropped": sum(lane.dropped for lane in lanes),
            "waiting": sum(len(lane.waiting) + len(lane.trying) for lane in lanes),
            "failed_writes": sum(lane.failed_writes for lane in lanes),
        }

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._keep_flushing())

    async def aclose(self) -> None:
        if self._task is not None:
            # Not cancelled: a batch half handed over must be counted as written or taken back.
            self._stopping = True
            self._full.set()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self.flush()

    async def flush(self) -> None:
        """Write what is waiting now. Trouble is counted and logged, the rows go on waiting."""
        async with self._flushing:
            for lane in (self._traces, self._feedback):
                await lane.flush()

    async def _keep_flushing(self) -> None:
        while not self._stopping:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._flush_seconds):
                    await self._full.wait()
            self._full.clear()
            await self.flush()
            if (self._traces.failing or self._feedback.failing) and not self._stopping:
                await asyncio.sleep(self._flush_seconds)  # a full batch that fails must not spin


class _Lane:
    """The rows of one kind on their way to the store."""

    def __init__(self, folder: str, writer_id: str, schema: pa.Schema, max_waiting: int) -> None:
        self.folder, self.schema, self.max_waiting = folder, schema, max_waiting
        self.writer_id = _safe(writer_id)
        self.waiting: deque[Row] = deque()
        self.trying: deque[Row] = deque()  # of a segment that may be in the store or not
        self.began = datetime.min
        self.written = self.dropped = self.failed_writes = self.segments = 0
        self.failing = False

    def put(self, row: Row) -> bool:
        self.waiting.append(row)
        if len(self.waiting) + len(self.trying) <= self.max_waiting:
            return True
        (self.trying or self.waiting).popleft()
        self.dropped += 1
        return False

    async def flush(self) -> None:
        while self.trying or self.waiting:
            if not await self._flush_one():
                return

    async def _flush_one(self) -> bool:
        if not self.trying:
            self.trying, self.waiting = self.waiting, deque()
            self.began = datetime.now(UTC)
            self.segments += 1
        batch = list(self.trying)
        try:
            written = await asyncio.to_thread(self._write, batch)
        except Exception as error:  # whatever it is, it must not reach an answer
            self.failed_writes += 1
            if not self.failing:
                log.warning("Records cannot be written to %s (%s); they wait in memory.", self.folder, error)
            self.failing = True
            return False
        if self.failing:
            log.warning("Records are written to %s again.", self.folder)
        self.failing = False
        self.written += written
        self.dropped += len(self.trying) - written  # without those that were dropped, and counted, meanwhile
        self.trying.clear()
        return True

    def _write(self, batch: list[Row]) -> int:
        """Under the same name as often as it is tried: a store that did not answer may have it all the same."""
        rows = [data for row in batch if (data := _json(row)) is not None]
        return _put_segment(self.folder, self.schema, rows, self.began, f"{self.writer_id}-{self.segments - 1}")


def _put_segment(folder: str, schema: pa.Schema, rows: Sequence[bytes], written: datetime, name: str) -> int:
    """How many rows (JSON) were written. One that the schema cannot hold would fail for ever: it is left out."""
    try:
        table = table_of(rows, schema)
    except ValueError:  # Arrow's errors are of this kind
        rows = [row for row in rows if _fits(row, schema)]
        table = table_of(rows, schema)
    if rows:
        written = max(written, _latest(table))
        store.put(store.join(folder, f"{written:%Y-%m-%d}", f"{written:%H%M%S}-{name}.parquet"), segment(table))
    return len(rows)


def _json(row: Row) -> bytes | None:
    try:
        return orjson.dumps(row)
    except TypeError as error:  # half a character, say
        log.warning("A record cannot be written as JSON and is dropped: %s.", type(error).__name__)
        return None


def _safe(writer_id: str) -> str:
    """As it may stand between the hyphens of a name."""
    return re.sub(r"[^A-Za-z0-9.]+", ".", writer_id).strip(".")


def _not_durable() -> asyncio.Future[bool]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(False)
    return future


def _fits(row: bytes, schema: pa.Schema) -> bool:
    try:
        table_of([row], schema)
    except ValueError as error:
        log.warning("A record does not fit its columns and is dropped: %s.", type(error).__name__)
        return False
    return True


def table_of(rows: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """Rows as JSON made columns. A column that a row lacks is null; a key that is no column is left out.

    Read by Arrow's own reader: while it works the event loop does too, and Arrow does not import pandas for it.
    """
    if not rows:
        return schema.empty_table()
    data = b"\n".join(rows)
    table = pa_json.read_json(
        pa.BufferReader(data),
        read_options=pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if table.num_rows != len(rows) or table["time"].null_count:
        raise ValueError("a row without a time, or more than one in a line")
    return table


def segment(table: pa.Table) -> bytes:
    """A Parquet file. To look for repeated texts and ids would cost more than it saves."""
    sink = pa.BufferOutputStream()
    repetitive = [name for name in table.column_names if name not in UNIQUE_COLUMNS]
    pq.write_table(table, sink, compression="zstd", use_dictionary=repetitive)
    return bytes(sink.getvalue())


def _latest(table: pa.Table) -> datetime:
    """A segment is never named before the time of a row of it, though a clock may be set back."""
    latest: int = pc.max(table["time"].cast(pa.int64())).as_py()
    return datetime.fromtimestamp(latest / 1_000_000, UTC)


# ---------------------------------------------------------------- through the gateway's disk
_TRACE, _FEEDBACK = b"T", b"F"  # the first byte of a payload in the log


class SpooledTraces:
    """Makes each row durable on this machine's disk, and ships the log to the store file by file.

    What the disk does not take waits in memory as with `TraceWriter`, under a writer of its own. Segments are named
    after their file of the log alone, so that one shipped again after a crash is the same object.
    """

    def __init__(
        self,
        store_uri: str,
        writer_id: str,
        folder: Path,
        *,
        limit_bytes: int | None = None,
        pace: Pace | None = None,
        patience: float = PATIENCE,
        open_file: Callable[[Path], File] = LogFile,
    ) -> None:
        writer = _safe(writer_id)
        self._memory = TraceWriter(store_uri, f"{writer}.memory")
        self._lanes = {
            _TRACE: (store.join(store_uri, TRACES_PREFIX), TRACE_SCHEMA),
            _FEEDBACK: (store.join(store_uri, FEEDBACK_PREFIX), FEEDBACK_SCHEMA),
        }
        self._spool = Spool(
            folder,
            writer,
            self._ship,
            self._fall_back,
            limit_bytes=limit_bytes,
            pace=pace,
            patience=patience,
            open_file=open_file,
        )
        self._written = self._dropped = 0

    def keep(self, row: Row, others: int = 0) -> asyncio.Future[bool] | None:
        return self._keep(_TRACE, row, others) or self._memory.keep(row)

    def keep_feedback(self, row: Row) -> asyncio.Future[bool] | None:
        return self._keep(_FEEDBACK, row) or self._memory.keep_feedback(row)

    def _keep(self, kind: bytes, row: Row, others: int = 0) -> asyncio.Future[bool] | None:
        if (data := _json(row)) is None:
            return None
        return self._spool.append(kind + data, others)

    @property
    def is_full(self) -> bool:
        return self._spool.is_full

    @property
    def spool_bytes(self) -> int:
        return self._spool.bytes

    def counts(self) -> Mapping[str, int]:
        memory = self._memory.counts()
        return {
            "acknowledged": self._spool.acknowledged,
            "unacknowledged": self._spool.unacknowledged,
            "written": self._written + memory["written"],
            "dropped": self._dropped + self._spool.unsure_lost + memory["dropped"],
            "waiting": self._spool.rows + memory["waiting"],
            "failed_writes": self._spool.failed_ships + memory["failed_writes"],
        }

    async def start(self) -> None:
        await self._spool.start()
        await self._memory.start()

    async def aclose(self) -> None:
        await self._spool.aclose()
        await asyncio.sleep(0)  # what the last group has lost falls back first
        await self._memory.aclose()

    def _fall_back(self, payloads: list[bytes]) -> None:
        for payload in payloads:
            add = self._memory.add if payload[:1] == _TRACE else self._memory.add_feedback
            add(_row(payload))

    def _ship(self, writer: str, number: int, frames: Frames) -> None:
        """In the shipping thread. Counts at the end: a file that is not shipped whole is shipped again whole."""
        written = datetime.fromtimestamp(frames.last_us / 1_000_000, UTC)
        done = records = 0
        for kind, (folder, schema) in self._lanes.items():
            if rows := [payload[1:] for payload in frames.payloads if payload[:1] == kind]:
                done += _put_segment(folder, schema, rows, written, f"{writer}-{number}")
                records += len(rows)
        self._written += done
        self._dropped += records - done


def _row(payload: bytes) -> Row:
    row: dict[str, Any] = orjson.loads(payload[1:])
    row["time"] = datetime.fromisoformat(row["time"])
    return row


def is_sampled(trace_id: str, percent: int) -> bool:
    """Whether the content of a trace is kept, by its id: the same ones in a replay."""
    return int.from_bytes(hashlib.sha256(trace_id.encode()).digest()[:8], "big") % 100 < percent


# ---------------------------------------------------------------- reading
def read_traces(store_uri: str, since: float | datetime | None = None) -> pa.Table:
    """Rows by TRACE_COLUMNS, oldest first; with `since` (epoch seconds or a time) only those not older."""
    return _read(store.join(store_uri, TRACES_PREFIX), TRACE_SCHEMA, since)


def read_columns(store_uri: str, columns: Sequence[str], since: float | datetime | None = None) -> pa.Table:
    """These columns of the traces and their time, oldest first: texts that nobody asks for fill no memory."""
    fields = [TRACE_SCHEMA.field(name) for name in dict.fromkeys(("time", *columns))]
    return _read(store.join(store_uri, TRACES_PREFIX), pa.schema(fields), since)


def read_feedback(store_uri: str, since: float | datetime | None = None) -> pa.Table:
    """All rows by FEEDBACK_COLUMNS, oldest first; a word that came twice by the same Idempotency-Key once."""
    table = _read(store.join(store_uri, FEEDBACK_PREFIX), FEEDBACK_SCHEMA, since)
    first: dict[Any, int] = {}
    for row, word in enumerate(table["feedback_id"].to_pylist()):
        first.setdefault(word or row, row)
    return table if len(first) == table.num_rows else table.take(pa.array(list(first.values()), pa.int64()))


def _read(folder: str, schema: pa.Schema, since: float | datetime | None) -> pa.Table:
    start = datetime.fromtimestamp(since, UTC) if isinstance(since, int | float) else since
    names = [name for name in _names(folder) if start is None or name.may_hold(start)]
    return _rows(names, schema, start)


Mark = Mapping[str, int]  # writer -> number of its last segment
Lane = Literal["traces", "feedback"]


def read_new(
    store_uri: str, lane: Lane, after: Mark, *, since: float, until: Mark | float | None = None
) -> tuple[pa.Table, Mark]:
    """Rows not older than `since` of the segments beyond the mark `after`, oldest first, and the mark behind them.

    A writer numbers its segments in the order in which they appear, so that a mark says exactly what was seen and
    the same mark as `until` gives it again. `until` in epoch seconds: what was written by the end of that second.
    """
    folder, rows = (TRACES_PREFIX, TRACE_SCHEMA) if lane == "traces" else (FEEDBACK_PREFIX, FEEDBACK_SCHEMA)
    start = datetime.fromtimestamp(since, UTC)
    names = [
        name
        for name in _names(store.join(store_uri, folder))
        if name.may_hold(start) and name.number > after.get(name.writer, -1) and name.is_within(until)
    ]
    mark = dict(after)
    for name in names:
        mark[name.writer] = max(name.number, mark.get(name.writer, -1))
    return _rows(names, rows, start), mark


def _rows(names: list[_Name], schema: pa.Schema, start: datetime | None) -> pa.Table:
    with ThreadPoolExecutor(store.AT_ONCE) as pool:  # small objects: what takes time is to wait for each
        tables = [table for table in pool.map(lambda name: _segment(name.uri, schema), names) if table is not None]
    table = pa.concat_tables([schema.empty_table(), *tables]).sort_by("time")
    if start is None:
        return table
    return table.filter(pc.greater_equal(table["time"], pa.scalar(start, schema.field("time").type)))


def _segment(uri: str, schema: pa.Schema) -> pa.Table | None:
    try:
        data = store.get(uri)
    except store.StoreError:
        if store.exists(uri):
            raise
        return None  # deleted by retention since it was listed
    file = pq.ParquetFile(BytesIO(data))
    written = set(file.schema_arrow.names)
    table = file.read(columns=[name for name in schema.names if name in written])
    if table.schema.equals(schema):
        return table
    # A segment written by another version may lack a column or have one more.
    columns = [
        table[name].cast(kind) if name in written else pa.nulls(table.num_rows, kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(columns, schema=schema)


_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})/(\d{6})-([^/]*)-(\d+)\.parquet$")


@dataclass(frozen=True)
class _Name:
    """What the name of a segment says."""

    uri: str
    written: datetime  # to the second
    writer: str
    number: int

    def may_hold(self, since: datetime) -> bool:
        return self.written >= since.astimezone(UTC).replace(microsecond=0)

    def is_within(self, until: Mark | float | None) -> bool:
        if until is None:
            return True
        if isinstance(until, Mapping):
            return self.number <= until.get(self.writer, -1)
        return self.written.timestamp() <= until


def _names(folder: str) -> list[_Name]:
    """Of the segments in a folder; whatever else lies there is none."""
    found = []
    for uri in store.list_files(folder):
        if match := _NAME.search(uri):
            written = datetime.strptime(f"{match[1]} {match[2]}", "%Y-%m-%d %H%M%S").replace(tzinfo=UTC)
            found.append(_Name(uri, written, match[3], int(match[4])))
    return found
