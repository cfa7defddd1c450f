"""Small facts out of a job's object store over HTTP, so that the operator needs neither its keys nor its records.

    GET /v1/artifact?uri=...   a manifest, report, decision or live score below --store, as it lies there
    GET /v1/traces             {"all", "usable", "reason", "counted_at"}: how many traces a round could learn from;
                               with ?since=EPOCH also "since_last": how many of the usable ones were given after that
    GET /healthz /readyz /metrics

404: no such artifact. 403: nothing that is given out. 503: the store is away, or hangs, with its words; or the rows are
not there (`reason` DataMissing), or cannot be read as such (DataInvalid).

    python -m cowest_training.observer --store s3://bucket/desk --job job.json --port 8080
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import re
import signal
import socket
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatch
from io import BytesIO
from typing import Any, TypeVar

import pyarrow.parquet as pq
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cowest_serving import logs, store
from cowest_serving.contract import FEEDBACK_PREFIX, KEEP_ALIVE_SECONDS, TRACES_PREFIX, Redaction, SettingsError, parse
from cowest_serving.metrics import Metrics
from cowest_serving.redaction import joined_reference
from cowest_training.collect import (
    DUPLICATE,
    NO_REFERENCE,
    WRONG_REFERENCE,
    TraceCounts,
    as_row,
    held_out_keys,
    reason_of,
)
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK, Evaluator, Retention, Row, StepError
from cowest_training.data import Known, NoFileError, conversation_key
from cowest_training.evaluator import needs_reference, reference_problem
from cowest_training.retention import expire
from cowest_training.steps import load_spec

log = logging.getLogger(__name__)
T = TypeVar("T")
Record = Mapping[str, Any]

NAMES = ("manifest.json", "report.json", "failure.json", "live-*.json", "decision*.json")
MAX_BYTES = 4 * 1024 * 1024
STORE_SECONDS = 4.0  # the longest wait for the store; what asks us waits five
THREADS = 8
COUNT_SECONDS = 5.0
RECOUNT_SECONDS = 3600.0  # retention, ours or the bucket's, takes segments away
_BELOW = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")

HELP = {
    "cowest_observer_requests_total": "Requests by path and status.",
    "cowest_observer_store_errors_total": "Failures of the object store by what was wanted of it.",
    "cowest_observer_count_seconds": "Time of a count of the traces.",
    "cowest_observer_traces": "Traces as last counted: all, and those that a round could learn from.",
    "cowest_observer_counted_timestamp_seconds": "When the traces were last counted.",
}


@dataclass(frozen=True)
class HeldOut:
    held_out: str


@dataclass(frozen=True)
class Evaluated:
    evaluator: Evaluator


@dataclass(frozen=True)
class Hidden:
    redaction: Redaction | None = None


@dataclass(frozen=True)
class ObserverSettings:
    """The part of a defaulted spec that is read here. An edit of any other leaves the observer running."""

    data: HeldOut
    feedback: Evaluated
    collaboration: Hidden = Hidden()
    traces: Retention | None = None


# ---------------------------------------------------------------- counting traces
class TraceCounter:
    """What `collect.count_usable` counts, kept up to date by reading each segment once.

    Of a trace only what its reference may still change is kept: its id, its time and a digest of what was asked.
    Blocks; for one thread at a time.
    """

    def __init__(
        self, store_uri: str, evaluator: Evaluator, held_out_uri: str, redaction: Redaction | None = None
    ) -> None:
        self._store = store_uri
        self._evaluator = evaluator
        self._held_out_uri, self._redaction = held_out_uri, redaction
        self._restart(held_out_keys(held_out_uri, redaction))

    def _restart(self, held_out: Known) -> None:
        self._held_out = held_out
        self._since: date | None = None  # the day of the last look; None: nothing was looked at
        self._seen: dict[str, set[str]] = {}  # the segments that were read, by folder of a day
        self._excluded: Counter[str] = Counter()  # by a reason that no reference changes
        self._asked: dict[str, list[tuple[bytes, float]]] = defaultdict(list)  # trace id -> what was asked, when
        self._said: dict[str, tuple[datetime, str | None]] = {}  # trace id -> latest reference: time, what is wrong
        self._counts: TraceCounts | None = None  # None: something came in since

    def count(self, today: date | None = None) -> TraceCounts:
        """Raises `StoreError` or `StepError`; what was read by then is kept."""
        if (held_out := held_out_keys(self._held_out_uri, self._redaction)) is not self._held_out:
            self._restart(held_out)
        today = today or datetime.now(UTC).date()
        self._read(TRACES_PREFIX, ["trace_id", "time", "status", "shadow", "messages"], self._take, today)
        self._read(FEEDBACK_PREFIX, ["trace_id", "reference", "time", "placeholders"], self._hear, today)
        self._since = today
        still = {place for prefix in (TRACES_PREFIX, FEEDBACK_PREFIX) for place in self._places(prefix, today)}
        self._seen = {place: seen for place, seen in self._seen.items() if place in still}
        self._counts = self._counts or self._count()
        return self._counts

    def _read(self, prefix: str, columns: Sequence[str], take: Callable[[Record], None], today: date) -> None:
        for place in self._places(prefix, today):
            for uri in store.list_files(place):
                seen = self._seen.setdefault(uri.rpartition("/")[0], set())
                if not uri.endswith(".parquet") or uri in seen:
                    continue
                for row in _segment(uri, columns):
                    take(row)
                seen.add(uri)
                self._counts = None

    def _places(self, prefix: str, today: date) -> list[str]:
        """All at first; then the days in which a segment may have come since. Their names are of the writer's clock."""
        folder = store.join(self._store, prefix)
        if self._since is None:
            return [folder]
        first = self._since - timedelta(days=1)
        days = [first + timedelta(days=n) for n in range((today - first).days + 2)]
        return [store.join(folder, day.isoformat()) for day in days]

    def _take(self, trace: Record) -> None:
        row = as_row(trace, "", _NO_REFERENCE_NEEDED, self._held_out)
        if isinstance(row, Row):
            key = "\n".join(conversation_key(row.messages)).encode()
            when = trace["time"].timestamp() if trace["time"] else 0.0
            self._asked[trace["trace_id"]].append((hashlib.blake2b(key, digest_size=16).digest(), when))
        else:
            self._excluded[row] += 1

    def _hear(self, word: Record) -> None:
        """A bare score takes nothing back."""
        if not (word["reference"] or "").strip():
            return
        reference = joined_reference(word, {}) or ""  # whatever the record has: that changes nothing here
        before = self._said.get(word["trace_id"])
        if before is None or word["time"] >= before[0]:
            self._said[word["trace_id"]] = (word["time"], reference_problem(self._evaluator, reference))

    def _count(self) -> TraceCounts:
        excluded = self._excluded.copy()
        needed, ok = needs_reference(self._evaluator), 0
        usable: dict[bytes, float] = {}  # what was asked -> when it was asked last
        for trace_id, asked in self._asked.items():
            said = self._said.get(trace_id)
            if needed and (said is None or said[1]):
                excluded[WRONG_REFERENCE if said else NO_REFERENCE] += len(asked)
            else:
                usable.update((query, max(when, usable.get(query, when))) for query, when in asked)
                ok += len(asked)
        excluded[DUPLICATE] += ok - len(usable)
        left_out = {reason: count for reason, count in excluded.items() if count}
        times = array("d", sorted(usable.values()))
        reason = reason_of(left_out, self._evaluator)
        return TraceCounts(len(usable) + sum(left_out.values()), len(usable), reason, times)


_NO_REFERENCE_NEEDED = Evaluator("Judge")  # with it `as_row` says only what no reference changes


def _segment(uri: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with these columns; one that the segment lacks is None."""
    try:
        data = store.get(uri)
    except store.StoreError:
        if store.exists(uri):
            raise
        return []  # deleted by retention since it was listed
    file = pq.ParquetFile(BytesIO(data))
    rows = file.read(columns=[name for name in columns if name in file.schema_arrow.names]).to_pylist()
    return [dict.fromkeys(columns) | row for row in rows]


# ---------------------------------------------------------------- asking the store
class Away(Exception):
    """The store could not be asked; says why."""


class Refused(Exception):
    """Not given out; says why."""


class Desk:
    """The store of one job, asked in threads: one question at a time about each thing, none longer than its limit."""

    def __init__(self, store_uri: str, metrics: Metrics, *, seconds: float = STORE_SECONDS) -> None:
        self._root = store_uri.rstrip("/")
        self._metrics = metrics
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self._flights: dict[str, asyncio.Future[Any]] = {}

    async def artifact(self, uri: str) -> bytes | None:
        """None where there is none. Raises `Refused` or `Away`."""
        self._check(uri)
        data = await self._ask("artifact", uri, lambda: _get(uri))
        if data is not None and len(data) > MAX_BYTES:
            raise Refused(f"{uri}: wanted at most {MAX_BYTES} bytes, saw {len(data)}.")
        return data

    async def reach(self) -> None:
        """Raises `Away`."""
        await self._ask("ready", "", lambda: store.exists(store.join(self._root, ".ready")))

    def _check(self, uri: str) -> None:
        below = uri.removeprefix(self._root + "/")
        names = below.split("/")
        if below == uri or not _BELOW.fullmatch(below) or {".", ".."} & set(names):
            raise Refused(f"wanted a URI below {self._root}, saw {uri!r}.")
        if not any(fnmatch(names[-1], name) for name in NAMES):
            raise Refused(f"wanted one of {', '.join(NAMES)}, saw {names[-1]!r}.")

    async def _ask(self, what: str, key: str, question: Callable[[], T]) -> T:
        """A question that hangs is not asked again before it ends: others wait for it, each up to the limit."""
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().run_in_executor(self._threads, question)
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(what, key, done))
        try:
            answer: T = await asyncio.wait_for(asyncio.shield(flight), self._seconds)
            return answer
        except TimeoutError:
            self._metrics.count("cowest_observer_store_errors_total", operation=what)
            raise Away(f"the object store gave no answer within {self._seconds:g} s.") from None
        except (store.StoreError, OSError) as error:
            raise Away(str(error)) from error

    def _land(self, what: str, key: str, done: asyncio.Future[Any]) -> None:
        self._flights.pop(key, None)
        if not done.cancelled() and done.exception() is not None:
            self._metrics.count("cowest_observer_store_errors_total", operation=what)


def _get(uri: str) -> bytes | None:
    try:
        return store.get(uri)
    except store.StoreError as error:
        if error.retryable or store.exists(uri):
            raise
        return None


# ---------------------------------------------------------------- the service
class Observer:
    """What the routes share."""

    def __init__(
        self, desk: Desk, metrics: Metrics, make_counter: Callable[[], TraceCounter], *, every: float = COUNT_SECONDS
    ) -> None:
        self.desk = desk
        self.metrics = metrics
        self.counted: tuple[TraceCounts, float] | None = None  # and when, in epoch seconds
        self.trouble, self._reason = "the first count is under way.", ""
        self._make_counter = make_counter
        self._every = every
        self._thread = ThreadPoolExecutor(1, "count")

    async def keep_counting(self) -> None:
        counter: TraceCounter | None = None
        fresh = 0.0

        def count() -> TraceCounts:
            nonlocal counter, fresh
            if counter is None or time.monotonic() - fresh > RECOUNT_SECONDS:
                counter, fresh = self._make_counter(), time.monotonic()
            return counter.count()

        while True:
            began, at = time.monotonic(), time.time()
            try:
                seen = await asyncio.get_running_loop().run_in_executor(self._thread, count)
            except Exception as error:  # whatever it is, the next count may succeed
                self._metrics_of_failure(error)
            else:
                self.counted, self.trouble, self._reason = (seen, at), "", ""
            self.metrics.observe("cowest_observer_count_seconds", time.monotonic() - began)
            await asyncio.sleep(self._every)

    def _metrics_of_failure(self, error: Exception) -> None:
        self.metrics.count("cowest_observer_store_errors_total", operation="count")
        message = str(error) or type(error).__name__
        if message != self.trouble:
            log.warning("The traces cannot be counted: %s", message, extra={"reason": "TracesNotCounted"})
        self.trouble, self._reason = message, _reason_of(error)

    # ------------------------------------------------------------ routes
    async def artifact(self, request: Request) -> Response:
        uri = request.query_params.get("uri", "")
        try:
            data = await self.desk.artifact(uri)
        except Refused as error:
            return _error(403, str(error))
        except Away as error:
            return _error(503, str(error))
        if data is None:
            return _error(404, f"there is nothing at {uri}.")
        return Response(data, media_type="application/json")

    async def traces(self, request: Request) -> Response:
        if self.counted is None:
            return _error(503, f"the traces were not counted yet: {self.trouble}", self._reason)
        if self.trouble:  # who asks has the last counts, and must hear why there are no newer ones
            return _error(503, f"the traces cannot be counted: {self.trouble}", self._reason)
        seen, at = self.counted
        answer = {"all": seen.all, "usable": seen.usable, "reason": seen.reason, "counted_at": at}
        if (since := request.query_params.get("since")) is not None:
            try:
                answer["since_last"] = seen.since(float(since))
            except ValueError:
                return _error(400, f"since: wanted seconds since 1970, saw {since!r}.")
        return JSONResponse(answer)

    async def healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        try:
            await self.desk.reach()
        except Away as error:
            return _error(503, str(error))
        return PlainTextResponse("ok\n")

    async def metrics_page(self, _: Request) -> Response:
        gauges: dict[str, Mapping[tuple[tuple[str, str], ...], float]] = {}
        if self.counted:
            gauges["cowest_observer_traces"] = {
                (("kind", "all"),): self.counted[0].all,
                (("kind", "usable"),): self.counted[0].usable,
            }
            gauges["cowest_observer_counted_timestamp_seconds"] = {(): self.counted[1]}
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")


def take_away(store_uri: str, days: int) -> None:
    """Old traces, before they are counted. Keys that may not delete leave it to the bucket's own lifecycle."""
    try:
        if gone := expire(store_uri, days):
            text = "%d folders of traces and feedback older than %d days were deleted."
            log.info(text, gone, days, extra={"reason": "TracesExpired"})
    except store.StoreError as error:
        text = "Traces older than %d days are still there: %s"
        log.warning(text, days, error, extra={"reason": "TracesNotExpired"})


def _reason_of(error: Exception) -> str:
    """What the fault is, where it is the rows' and not the store's."""
    if isinstance(error, NoFileError):
        return "DataMissing"
    return "DataInvalid" if isinstance(error, StepError) else ""


def _error(status: int, message: str, reason: str = "") -> Response:
    return JSONResponse({"error": {"message": message, **({"reason": reason} if reason else {})}}, status)


def build_app(observer: Observer) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        counting = asyncio.create_task(observer.keep_counting())
        yield
        counting.cancel()

    def counted(path: str, handler: Callable[[Request], Any]) -> Route:
        async def answer(request: Request) -> Response:
            response: Response = await handler(request)
            observer.metrics.count("cowest_observer_requests_total", path=path, status=str(response.status_code))
            return response

        return Route(path, answer)

    return Starlette(
        routes=[
            counted("/v1/artifact", observer.artifact),
            counted("/v1/traces", observer.traces),
            Route("/healthz", observer.healthz),
            Route("/readyz", observer.readyz),
            Route("/metrics", observer.metrics_page),
        ],
        lifespan=lifespan,
    )


# ---------------------------------------------------------------- the process
def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    logs.log_to_stderr("info")
    try:
        settings = parse(ObserverSettings, load_spec(args.job))
        listener = socket.create_server((args.host, args.port))
    except (StepError, SettingsError) as error:
        logs.complain(str(error), logs.REASON_BAD_START)
        return EXIT_BAD_INPUT
    except OSError as error:
        logs.complain(
            f"{args.host}:{args.port} cannot be listened on ({error.strerror}). "
            "Stop what uses the port, or give another with --port.",
            logs.REASON_BAD_START,
        )
        return EXIT_BAD_INPUT
    metrics = Metrics(HELP)

    def make_counter() -> TraceCounter:
        if settings.traces is not None:
            take_away(args.store, settings.traces.retention_days)
        return TraceCounter(
            args.store, settings.feedback.evaluator, settings.data.held_out, settings.collaboration.redaction
        )

    app = build_app(Observer(Desk(args.store, metrics), metrics, make_counter, every=args.count_seconds))
    # uvicorn raises the signal again after its shutdown; asked to stop and stopped is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    log.info("The observer listens on http://%s:%d", *listener.getsockname()[:2])
    uvicorn.Server(config).run(sockets=[listener])
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--store", required=True, metavar="URI", help="the job's prefix in the object store")
    flags.add_argument("--job", required=True, metavar="FILE", help="defaulted CollaborationJob or its spec")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", default=8080, type=int)
    flags.add_argument("--count-seconds", default=COUNT_SECONDS, type=float, metavar="S", help="between counts")
    return flags.parse_args(argv)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread may hang at a store that gives no answer: nothing is waited for, nothing is to be kept
