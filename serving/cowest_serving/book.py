"""The book of paid calls: no answer of the strong model that was received is ever paid for twice.

Used by the steps that ask the strong model (on one machine: a file that they share; in a cluster: one in each pod) and
by the proxy, which keeps the book for all pods. A call is known by its content; its key is also the `Idempotency-Key`
on the wire, so a call in flight at a crash is sent again under the same key.

    asked before? -> the answer in the book
    being asked?  -> wait for that one
    otherwise     -> reserve (budget) -> send -> commit the answer -> release the reservation -> return
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from cowest_serving.contract import UNKNOWN_OUTPUT_TOKENS, Budget, Messages, Prices, SettingsError, Strong, digest_of
from cowest_serving.estimates import likely_input_tokens, likely_tokens, most_output_tokens
from cowest_serving.leases import SCHEMA as LEASES_SCHEMA
from cowest_serving.leases import Amount, Ask, Lease, Limits, Room, Spent, day_of, lend, live_spent, shares
from cowest_serving.models import ChatModel, ChatResult

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]

# Between steps and proxy: in a request whose budget pays, in a response whose budget paid.
HEADER_ROUND = "x-cowest-round"
HEADER_PURPOSE = "x-cowest-purpose"
HEADER_REPLAYED = "x-cowest-replayed"  # "true": this answer cost nothing
CODE_BUDGET_SPENT = "budget_spent"  # of the error that comes with a 402

KEYS_AT_ONCE = 500  # in one query; some builds of SQLite take no more than 999
DRAIN_SECONDS = 2.0  # calls in flight at the end get this long to bring home what is paid for

_SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS calls(
  key TEXT PRIMARY KEY, endpoint TEXT NOT NULL, asked_model TEXT NOT NULL, purpose TEXT NOT NULL,
  round INTEGER NOT NULL, time REAL NOT NULL, day TEXT NOT NULL,
  input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, money REAL NOT NULL,
  text TEXT NOT NULL, finish_reason TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS calls_by_round ON calls(round);
CREATE INDEX IF NOT EXISTS calls_by_day ON calls(day);
CREATE TABLE IF NOT EXISTS reserved(
  key TEXT PRIMARY KEY, round INTEGER NOT NULL, day TEXT NOT NULL, tokens INTEGER NOT NULL, money REAL NOT NULL);
CREATE TABLE IF NOT EXISTS completions(key TEXT PRIMARY KEY, request TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores(key TEXT PRIMARY KEY, score REAL NOT NULL);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
    + LEASES_SCHEMA
)


@dataclass(frozen=True)
class Asked:
    """What this process did at the book: calls paid now and answers that cost nothing, by purpose."""

    paid: Mapping[str, int]
    cached: Mapping[str, int]


@dataclass(frozen=True)
class Call:
    """One call and who pays for it. `params`: keyword arguments of the `ChatModel`."""

    key: str
    endpoint: str
    name: str  # of the model at `endpoint`
    purpose: str
    messages: Messages
    params: Mapping[str, Any] = field(default_factory=dict)
    round: int | None = None  # the book's latest when None
    request: str = ""  # digest of the whole request, where the key is not of its content; its answer is kept whole

    @property
    def most_output_tokens(self) -> int | None:
        """By what the call asks for; None where nothing bounds it."""
        return most_output_tokens(self.params.get("max_tokens"), self.params.get("extra"))

    @property
    def likely_input_tokens(self) -> int:
        """A generous guess for the reservation; the bill is settled with what the endpoint counts."""
        return likely_input_tokens(self.messages, self.params.get("extra"))


@dataclass(frozen=True)
class Answer:
    """An answer that is on disk, and whose budget paid for it."""

    result: ChatResult
    purpose: str
    round: int
    time: float  # when it was written down, epoch seconds
    is_free: bool  # it cost this caller nothing


@dataclass
class Meter:
    """What a call that is not remembered turns out to cost; nothing as long as no answer has begun."""

    has_begun: bool = False
    input_tokens: int | None = None  # as the endpoint counts; None: it said nothing
    output_tokens: int | None = None
    characters: int = 0  # of the answer so far, for an estimate
    model: str = ""
    version: str = ""
    finish_reason: str = ""


class BookError(Exception):
    """The book cannot be used now; nothing that was written is lost."""


class BudgetSpent(Exception):
    """Says which limit a call would pass."""


class KeyReused(Exception):
    """A key stands for one request, and another came with it."""


class PaidCalls:
    """A SQLite book of the answers of black-box models, with single flight and a budget.

    One process and one event loop per object; several processes may share the file. `round_number=None` goes on with
    the round that the book saw last. `behind_proxy`: the models that are asked say in headers whose budget paid. Leave
    it by `async with` (or `aclose`), which commits what has come in.

    Raises `BookError` where the file cannot be used, `SettingsError` for a budget that cannot be kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        round_number: int | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        max_concurrency: int = 16,
        behind_proxy: bool = False,
        drain_seconds: float = DRAIN_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.check_budget(budget, prices)
        self._budget = budget if budget and any(limit is not None for limit in vars(budget).values()) else None
        self._prices = prices
        self._behind_proxy = behind_proxy
        self._drain = drain_seconds
        self._clock = clock
        self._slots = asyncio.Semaphore(max_concurrency)
        self._reader = _open(path)
        self._writer = _open(path)
        self._round = _settle_round(self._writer, round_number)
        self._flying: dict[str, tuple[str, asyncio.Task[Answer]]] = {}  # by key: digest of the request, flight
        self._judging: dict[str, asyncio.Future[float | None]] = {}
        self._sent = 0  # calls on the wire: they may still give back part of what they reserved
        self._metered = 0
        self._landings = 0
        self._landed = asyncio.Event()  # of the next call to land
        self._work: list[tuple[Work, asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._closing = False
        self._largest_output = 0
        self._paid: Counter[str] = Counter()
        self._cached: Counter[str] = Counter()

    @staticmethod
    def check_budget(budget: Budget | None, prices: Prices | None) -> None:
        if budget and prices is None and (budget.money_per_round is not None or budget.money_per_day is not None):
            raise SettingsError(
                "spec.strong.budget: wanted prices to keep a budget in money, saw none; set spec.strong.prices"
            )

    @classmethod
    def for_strong(
        cls, path: str | Path, strong: Strong, round_number: int | None = None, *, behind_proxy: bool = False
    ) -> Self:
        """The book with what the manifest sets for the strong model; behind the proxy the proxy holds the budget."""
        return cls(
            path,
            round_number=round_number,
            budget=None if behind_proxy else strong.budget,
            prices=strong.prices,
            max_concurrency=strong.max_concurrency,
            behind_proxy=behind_proxy,
        )

    @staticmethod
    def key(endpoint: str, model: str, messages: Messages, params: Mapping[str, Any], sample: int = 0) -> str:
        """64 hex digits over everything that decides the answer. `sample` tells repeats of one request apart."""
        given = {name: value for name, value in params.items() if value is not None}
        return digest_of([endpoint.rstrip("/"), model, list(messages), given, sample]).removeprefix("sha256:")

    @property
    def limits_a_day(self) -> bool:
        return self._budget is not None and self._budget.limits_a_day

    @property
    def round(self) -> int:
        """The latest that the book knows of."""
        return self._round

    @property
    def in_flight(self) -> int:
        """Calls that wait for a place, for room in the budget, or for their answer."""
        return len(self._flying) + self._metered

    @property
    def asked(self) -> Asked:
        return Asked(dict(self._paid), dict(self._cached))

    async def ask(
        self,
        model: ChatModel,
        messages: Messages,
        *,
        endpoint: str,
        name: str,
        purpose: str,
        params: Mapping[str, Any],
        sample: int = 0,
    ) -> tuple[ChatResult, str, bool]:
        """(answer, key, was it free of charge). The answer is on disk before it is returned.

        `name` is the model's name at `endpoint`; `params` are keyword arguments of `model` (max_tokens, temperature,
        seed, stop). Raises ModelError as `model` does, `BudgetSpent` when the budget has no room, `BookError`.
        """
        key = self.key(endpoint, name, messages, params, sample)
        answer = await self.answer(model, Call(key, endpoint, name, purpose, list(messages), dict(params)))
        return answer.result, key, answer.is_free

    async def answer(self, model: ChatModel, call: Call) -> Answer:
        """As `ask`, for a call whose key is given. Raises `KeyReused` when the key stands for another request."""
        if (known := self._known(call)) is not None:
            self._cached[call.purpose] += 1
            return known
        request, flight = self._flying.get(call.key, (call.request, None))
        _refuse_reuse(call, request)
        if flight is not None:
            answer = replace(await asyncio.shield(flight), is_free=True)
        else:
            flight = asyncio.create_task(self._pay(model, call))
            self._flying[call.key] = call.request, flight
            flight.add_done_callback(lambda done: self._land(call.key, done))
            # Shielded: one impatient caller must not throw away an answer that is being paid for.
            answer = await asyncio.shield(flight)
            if not answer.is_free:
                return answer
        self._cached[call.purpose] += 1
        return answer

    @asynccontextmanager
    async def metered(self, call: Call) -> AsyncIterator[Meter]:
        """Room in the budget for a call that is not remembered (a stream); what the meter says at the end is booked.

        An answer that broke off is paid for too: where the endpoint named no numbers, they are estimated.
        """
        meter = Meter()
        self._metered += 1
        try:
            async with self._sending(call):
                try:
                    yield meter
                finally:
                    await self._settle(call, meter)
            self._paid[call.purpose] += 1
        finally:
            self._metered -= 1

    async def see_round(self, number: int) -> None:
        """A later round than the book knew of has begun."""
        if number > self._round:
            self._round = number
            await self._commit(lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES('round', ?)", (str(number),)))

    async def check(self) -> None:
        """Raises `BookError` unless something can be written now."""
        now = str(self._clock())
        await self._commit(lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES('checked', ?)", (now,)))

    def stop_beginning(self) -> None:
        """From now on what is not on its way is not begun: its callers see a CancelledError."""
        self._closing = True

    async def remember_score(self, key: str, score: Callable[[], Awaitable[float | None]]) -> float | None:
        """A score that costs money or time (a judge's), looked up by `key` first; kept once it is there, None never."""
        if (known := self.known_score(key)) is not None:
            return known
        # Answers of several arms are often the same text: they wait for one verdict.
        if (judging := self._judging.get(key)) is None:
            judging = self._judging[key] = asyncio.ensure_future(self._judge(key, score))
            judging.add_done_callback(_looked_at)
        return await asyncio.shield(judging)

    def known_score(self, key: str) -> float | None:
        row = self._reader.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else float(row[0])

    async def _judge(self, key: str, score: Callable[[], Awaitable[float | None]]) -> float | None:
        try:
            value = await score()
            if value is not None:
                await self._commit(lambda db: db.execute("INSERT OR REPLACE INTO scores VALUES(?, ?)", (key, value)))
            return value
        finally:
            del self._judging[key]

    def spent(self, *, round_number: int | None = None, day: str | None = None, purpose: str = "") -> Spent:
        """What was paid: all of it, or of one round, one day (`YYYY-MM-DD`, UTC), purposes that begin so."""
        return _spent(self._reader, round_number, day, purpose)

    async def lend(self, ask: Ask) -> Lease:
        """A gateway's slice of the day's budget, for live answers. What is granted is on disk before it is returned."""
        lease: Lease = await self._commit(lambda db: lend(db, ask, self._limits(db, ask.day), self._clock()))
        return lease

    def live_spent(self) -> tuple[str, Spent, Room]:
        """(today, what gateways say that live answers cost, what is left of the day's budget for everybody)."""
        day = day_of(self._clock())
        room = self._limits(self._reader, day).room(shares(self._reader, day))
        return day, live_spent(self._reader, day), room

    def _limits(self, db: sqlite3.Connection, day: str | None) -> Limits:
        budget, on_day = self._budget or Budget(), day or day_of(self._clock())
        paid, held = _spent(db, None, on_day).amount, _reserved(db, on_day)
        return Limits(Room(budget.tokens_per_day, budget.money_per_day), paid + held)

    # ------------------------------------------------------------ one call
    def _known(self, call: Call) -> Answer | None:
        row = self._reader.execute(
            "SELECT text, finish_reason, input_tokens, output_tokens, model, version, purpose, round, time,"
            " request, body FROM calls LEFT JOIN completions USING (key) WHERE key = ?",
            (call.key,),
        ).fetchone()
        if row is None:
            return None
        text, finish_reason, input_tokens, output_tokens, model, version, purpose, number, at, request, body = row
        _refuse_reuse(call, request)
        raw = json.loads(body) if body else {}
        result = ChatResult(text, finish_reason, input_tokens, output_tokens, model, version, raw)
        return Answer(result, purpose, number, at, is_free=True)

    @asynccontextmanager
    async def _sending(self, call: Call) -> AsyncIterator[None]:
        """A place on the wire and room in the budget; leaving it wakes those who wait for room."""
        async with self._slots:
            if self._closing:  # what waits for a place at the end is not begun
                raise asyncio.CancelledError
            await self._reserve(call)
            self._sent += 1
            try:
                yield
            finally:
                self._sent -= 1
                self._landings += 1
                self._landed.set()
                self._landed = asyncio.Event()

    async def _pay(self, model: ChatModel, call: Call) -> Answer:
        async with self._sending(call):
            try:
                result = _counted(call, await model(call.messages, **call.params, idempotency_key=call.key))
                answer = self._booked(call, result)
                if not await self._commit(lambda db: self._write(db, call, answer)):
                    # Another process asked the same and was first.
                    answer = replace(self._known(call) or answer, is_free=answer.is_free)
            except BaseException:
                await self._release(call)
                raise
        self._largest_output = max(self._largest_output, result.output_tokens)
        if not answer.is_free:
            self._paid[call.purpose] += 1
        return answer

    def _booked(self, call: Call, result: ChatResult) -> Answer:
        """Who pays. A proxy may have had the answer from long ago, paid by another step or by this one before."""
        headers = result.headers if self._behind_proxy else {}
        number = headers.get(HEADER_ROUND, "")
        return Answer(
            result,
            purpose=headers.get(HEADER_PURPOSE) or call.purpose,
            round=int(number) if number.isdecimal() else self._round_of(call),
            time=self._clock(),
            is_free=headers.get(HEADER_REPLAYED) == "true",
        )

    async def _settle(self, call: Call, meter: Meter) -> None:
        if not meter.has_begun:
            await self._release(call)
            return
        taken_in = meter.input_tokens or call.likely_input_tokens
        given_out = meter.output_tokens or likely_tokens(meter.characters)
        self._largest_output = max(self._largest_output, given_out)
        result = ChatResult("", meter.finish_reason, taken_in, given_out, meter.model, meter.version, {})
        answer = Answer(result, call.purpose, self._round_of(call), self._clock(), is_free=False)
        await self._commit(lambda db: self._write(db, call, answer))

    async def _release(self, call: Call) -> None:
        """An answer that never came holds no budget.

        (After a kill the reservation stays until the call is asked again: it may have been paid.)
        """
        if self._budget:
            await self._commit(lambda db: db.execute("DELETE FROM reserved WHERE key = ?", (call.key,)))

    def _land(self, key: str, done: asyncio.Task[Answer]) -> None:
        self._flying.pop(key, None)
        _looked_at(done)

    def _write(self, db: sqlite3.Connection, call: Call, answer: Answer) -> bool:
        """False: the book has an answer to this call already, and that one stays."""
        result = answer.result
        row = (
            call.key, call.endpoint, call.name, answer.purpose, answer.round, answer.time, day_of(answer.time),
            result.input_tokens, result.output_tokens, self._money(result.input_tokens, result.output_tokens),
            result.text, result.finish_reason, result.model, result.version or "",
        )  # fmt: skip
        written = db.execute(f"INSERT OR IGNORE INTO calls VALUES({', '.join('?' * len(row))})", row).rowcount
        if written and call.request and result.raw:
            body = json.dumps(result.raw, ensure_ascii=False)
            db.execute("INSERT OR REPLACE INTO completions VALUES(?, ?, ?)", (call.key, call.request, body))
        db.execute("DELETE FROM reserved WHERE key = ?", (call.key,))
        return written == 1

    def _round_of(self, call: Call) -> int:
        return self._round if call.round is None else call.round

    # ------------------------------------------------------------ budget
    async def _reserve(self, call: Call) -> None:
        if self._budget is None:
            return
        budget = self._budget
        while True:
            landings, landed = self._landings, self._landed
            try:
                await self._commit(lambda db: self._try_reserve(db, call, budget))
                return
            except BudgetSpent:
                if self._landings != landings:
                    continue
                if self._sent == 0:  # nothing in flight that could give back a part of what it reserved
                    raise
            await landed.wait()

    def _try_reserve(self, db: sqlite3.Connection, call: Call, budget: Budget) -> None:
        day = day_of(self._clock())
        number = self._round_of(call)
        input_tokens = call.likely_input_tokens
        output_tokens = call.most_output_tokens or self._largest_output or UNKNOWN_OUTPUT_TOKENS
        tokens, money = input_tokens + output_tokens, self._money(input_tokens, output_tokens)
        db.execute("DELETE FROM reserved WHERE key = ?", (call.key,))  # left by a process that was killed
        in_round = _spent(db, number, None)
        held_round = db.execute("SELECT count(*), total(money) FROM reserved WHERE round = ?", (number,)).fetchone()
        live = shares(db, day)
        on_day = _spent(db, None, day).amount + _reserved(db, day) + live
        currency = self._prices.currency if self._prices else ""
        for limit, used, more, words, of_live in (
            (budget.calls_per_round, in_round.calls + held_round[0], 1, f"calls in round {number}", 0),
            (budget.tokens_per_day, on_day.tokens, tokens, f"tokens on {day}", live.tokens),
            (budget.money_per_round, in_round.money + held_round[1], money, f"{currency} in round {number}", 0),
            (budget.money_per_day, on_day.money, money, f"{currency} on {day}", live.money),
        ):
            if limit is not None and used + more > limit:
                wait = "" if "in round" in words else " or wait"
                raise BudgetSpent(
                    f"The budget of the strong model is spent: wanted at most {limit:g} {words}, "
                    f"saw {used:g} used{_of_it(of_live)} and a call that needs about {more:g}; what is paid is kept. "
                    f"Raise spec.strong.budget{wait}, then run again: it goes on from here."
                )
        db.execute("INSERT INTO reserved VALUES(?, ?, ?, ?, ?)", (call.key, number, day, tokens, money))

    def _money(self, input_tokens: int, output_tokens: int) -> float:
        return self._prices.of(input_tokens, output_tokens) if self._prices else 0.0

    # ------------------------------------------------------------ group commit
    async def _commit(self, work: Work) -> Any:
        """Run `work` in the next transaction and return when it is on disk. Many callers share one fsync."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._work.append((work, future))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_all())
        return await future

    async def _commit_all(self) -> None:
        while self._work:
            batch, self._work = self._work, []
            _deliver(batch, await asyncio.to_thread(_transaction, self._writer, [work for work, _ in batch]))

    async def aclose(self) -> None:
        """Give calls in flight a moment to come home, commit everything, close."""
        self._closing = True
        judging = list(self._judging.values())
        for verdict in judging:
            verdict.cancel()
        await asyncio.gather(*judging, return_exceptions=True)
        if self._flying:
            flights = [flight for _, flight in self._flying.values()]
            _, late = await asyncio.wait(flights, timeout=self._drain)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)
        if self._work:
            batch, self._work = self._work, []
            _deliver(batch, _transaction(self._writer, [work for work, _ in batch]))
        self._reader.close()
        self._writer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _looked_at(done: asyncio.Future[Any]) -> None:
    """So that a failure that nobody waits for any more does not complain, after the one message of its step."""
    if not done.cancelled():
        done.exception()


def _counted(call: Call, result: ChatResult) -> ChatResult:
    """With estimates where the endpoint counted nothing: an answer that is booked as free would spend no budget."""
    return replace(
        result,
        input_tokens=result.input_tokens or call.likely_input_tokens,
        output_tokens=result.output_tokens or likely_tokens(len(result.text)),
    )


def new_call_key() -> str:
    """For a call that is not remembered: nobody can ask for its answer."""
    return f"once-{uuid.uuid4().hex}"


def read_spent(path: str | Path, *, round_number: int | None = None, day: str | None = None) -> Spent:
    """What a book says was paid, for a status line. Nothing when there is no book yet."""
    if not Path(path).exists():
        return Spent()
    db = _open(path)
    try:
        return _spent(db, round_number, day)
    finally:
        db.close()


def read_scores(path: str | Path, keys: Iterable[str]) -> dict[str, float]:
    """Scores that are remembered, by key. One that the book does not know is left out."""
    return dict(_rows(path, "SELECT key, score FROM scores", keys))


def read_prices(path: str | Path, keys: Iterable[str]) -> dict[str, Spent]:
    """What each of these calls cost when it was paid, by key. A call that the book does not know is left out."""
    rows = _rows(path, "SELECT key, input_tokens, output_tokens, money FROM calls", keys)
    return {key: Spent(1, taken, given, money) for key, taken, given, money in rows}


def _rows(path: str | Path, select: str, keys: Iterable[str]) -> list[tuple[Any, ...]]:
    """Those of these keys that the book knows. None where there is no book yet."""
    if not Path(path).exists():
        return []
    wanted, found, db = sorted(set(keys)), list[tuple[Any, ...]](), _open(path)
    try:
        for start in range(0, len(wanted), KEYS_AT_ONCE):
            part = wanted[start : start + KEYS_AT_ONCE]
            found += db.execute(f"{select} WHERE key IN ({', '.join('?' * len(part))})", part)
        return found
    finally:
        db.close()


def read_live_spent(path: str | Path) -> tuple[str, Spent]:
    """(today, what gateways told the book of today's live answers), for a status line."""
    day, db = day_of(time.time()), _open(path)
    try:
        return day, live_spent(db, day)
    finally:
        db.close()


def _open(path: str | Path) -> sqlite3.Connection:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: transactions are begun by hand. Writes happen in one thread at a time (`_commit_all`).
        db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # an answer that was returned survives a power cut
        db.executescript(_SCHEMA)
    except (sqlite3.Error, OSError) as error:
        raise _book_error(error, f"{path}: ") from error
    return db


def _settle_round(db: sqlite3.Connection, round_number: int | None) -> int:
    if round_number is None:
        row = db.execute("SELECT value FROM facts WHERE name = 'round'").fetchone()
        return int(row[0]) if row else 0
    db.execute("INSERT OR REPLACE INTO facts VALUES('round', ?)", (str(round_number),))
    return round_number


def _spent(db: sqlite3.Connection, round_number: int | None, day: str | None, purpose: str = "") -> Spent:
    row = db.execute(
        "SELECT count(*), total(input_tokens), total(output_tokens), total(money) FROM calls"
        " WHERE (:round IS NULL OR round = :round) AND (:day IS NULL OR day = :day)"
        " AND substr(purpose, 1, length(:purpose)) = :purpose",
        {"round": round_number, "day": day, "purpose": purpose},
    ).fetchone()
    return Spent(int(row[0]), int(row[1]), int(row[2]), float(row[3]))


def _reserved(db: sqlite3.Connection, day: str) -> Amount:
    tokens, money = db.execute("SELECT total(tokens), total(money) FROM reserved WHERE day = ?", (day,)).fetchone()
    return Amount(int(tokens), float(money))


def _of_it(live: float) -> str:
    return f" ({live:g} of it by live answers)" if live else ""


def _transaction(db: sqlite3.Connection, work: Sequence[Work]) -> list[Any]:
    """Results (or the exception) of each piece of work, all committed at once; one that fails leaves no trace.

    Never raises: each piece has somebody who waits for its result.
    """
    results: list[Any] = []
    try:
        db.execute("BEGIN IMMEDIATE")
        for piece in work:
            db.execute("SAVEPOINT piece")
            try:
                results.append(piece(db))
            except sqlite3.Error:  # of the file, which is amiss for all
                raise
            except Exception as error:  # of this piece: a budget that is spent, a figure that SQLite cannot hold
                db.execute("ROLLBACK TO piece")
                results.append(error)
            db.execute("RELEASE piece")
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        return [_book_error(error)] * len(work)
    return results


def _deliver(batch: Sequence[tuple[Work, asyncio.Future[Any]]], results: Sequence[Any]) -> None:
    for (_, future), result in zip(batch, results, strict=True):
        if future.done():  # its caller was cancelled; what it wanted is written all the same
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _refuse_reuse(call: Call, request: str | None) -> None:
    if call.request and request and call.request != request:
        raise KeyReused(
            f"Idempotency-Key {call.key}: wanted the request that it was first sent with, saw one that differs. "
            "Send another key with another request."
        )


def _book_error(error: Exception, place: str = "") -> BookError:
    return BookError(
        f"{place}The book of paid calls cannot be used: {error}. Wanted a writable SQLite file on a disk with room; "
        "nothing that was written is lost, run again once it is."
    )
