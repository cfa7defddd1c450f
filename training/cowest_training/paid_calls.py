"""The book of paid calls: no answer of the strong model that was received is ever paid for twice.

Used by `feedback`, `evaluate` and `score_live`. A call is known by its content; its key is also the `Idempotency-Key`
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
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from cowest_serving.contract import Budget, Messages, Prices, Strong, digest_of
from cowest_serving.models import ChatModel, ChatResult

from .contract import EXIT_BUDGET, EXIT_RETRY, StepError

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]

DRAIN_SECONDS = 2.0  # calls in flight when a step ends early get this long to bring home what is paid for
UNKNOWN_OUTPUT_TOKENS = 1024  # reserved for an answer when nothing bounds it and none has been seen

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls(
  key TEXT PRIMARY KEY, endpoint TEXT NOT NULL, asked_model TEXT NOT NULL, purpose TEXT NOT NULL,
  round INTEGER NOT NULL, time REAL NOT NULL, day TEXT NOT NULL,
  input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, money REAL NOT NULL,
  text TEXT NOT NULL, finish_reason TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS calls_by_round ON calls(round);
CREATE INDEX IF NOT EXISTS calls_by_day ON calls(day);
CREATE TABLE IF NOT EXISTS reserved(
  key TEXT PRIMARY KEY, round INTEGER NOT NULL, day TEXT NOT NULL, tokens INTEGER NOT NULL, money REAL NOT NULL);
CREATE TABLE IF NOT EXISTS scores(key TEXT PRIMARY KEY, score REAL NOT NULL);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Spent:
    """What was paid."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Asked:
    """What this process did at the book: calls paid now and answers that cost nothing, by purpose."""

    paid: Mapping[str, int]
    cached: Mapping[str, int]


class _OverBudget(Exception):
    """Says which limit a call would pass. Becomes a StepError unless calls in flight may still give room."""


class PaidCalls:
    """A SQLite book of the answers of black-box models, with single flight and a budget.

    One process and one event loop per object; several processes may share the file. `round_number=None` goes on with
    the round that the book saw last. Leave it by `async with` (or `aclose`), which commits what has come in.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        round_number: int | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        max_concurrency: int = 16,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if budget and prices is None and (budget.money_per_round is not None or budget.money_per_day is not None):
            raise StepError(
                "spec.strong.budget: wanted prices to keep a budget in money, saw none; set spec.strong.prices"
            )
        self._budget = budget if budget and any(limit is not None for limit in vars(budget).values()) else None
        self._prices = prices
        self._clock = clock
        self._slots = asyncio.Semaphore(max_concurrency)
        self._reader = _open(path)
        self._writer = _open(path)
        self._round = _settle_round(self._writer, round_number)
        self._flying: dict[str, asyncio.Task[ChatResult]] = {}
        self._judging: dict[str, asyncio.Future[float]] = {}
        self._sent = 0  # calls on the wire: they may still give back part of what they reserved
        self._landings = 0
        self._landed = asyncio.Event()  # of the next call to land
        self._work: list[tuple[Work, asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._closing = False
        self._largest_output = 0
        self._paid: Counter[str] = Counter()
        self._cached: Counter[str] = Counter()

    @classmethod
    def for_strong(cls, path: str | Path, strong: Strong, round_number: int | None = None) -> PaidCalls:
        """The book with the budget, prices and concurrency that the manifest sets for the strong model."""
        return cls(
            path,
            round_number=round_number,
            budget=strong.budget,
            prices=strong.prices,
            max_concurrency=strong.max_concurrency,
        )

    @staticmethod
    def key(endpoint: str, model: str, messages: Messages, params: Mapping[str, Any], sample: int = 0) -> str:
        """64 hex digits over everything that decides the answer. `sample` tells repeats of one request apart."""
        given = {name: value for name, value in params.items() if value is not None}
        return digest_of([endpoint.rstrip("/"), model, list(messages), given, sample]).removeprefix("sha256:")

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
        seed, stop). Raises ModelError as `model` does, StepError(EXIT_BUDGET) when the budget has no room.
        """
        key = self.key(endpoint, name, messages, params, sample)
        if (known := self._answer(key)) is not None:
            self._cached[purpose] += 1
            return known, key, True
        flight = self._flying.get(key)
        first = flight is None
        if flight is None:
            call = _Call(key, endpoint, name, purpose, list(messages), dict(params))
            flight = asyncio.create_task(self._pay(model, call))
            self._flying[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        # Shielded: one impatient caller must not throw away an answer that is being paid for.
        result = await asyncio.shield(flight)
        if not first:
            self._cached[purpose] += 1
        return result, key, not first

    async def remember_score(self, key: str, score: Callable[[], Awaitable[float]]) -> float:
        """A score that costs money or time (a judge's), looked up by `key` first, kept once it is there."""
        row = self._reader.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
        if row is not None:
            return float(row[0])
        # Answers of several arms are often the same text: they wait for one verdict.
        if (judging := self._judging.get(key)) is None:
            judging = self._judging[key] = asyncio.ensure_future(self._judge(key, score))
        return await asyncio.shield(judging)

    async def _judge(self, key: str, score: Callable[[], Awaitable[float]]) -> float:
        try:
            value = await score()
            await self._commit(lambda db: db.execute("INSERT OR REPLACE INTO scores VALUES(?, ?)", (key, value)))
            return value
        finally:
            del self._judging[key]

    def spent(self, *, round_number: int | None = None, day: str | None = None, purpose: str = "") -> Spent:
        """What was paid: all of it, or of one round, one day (`YYYY-MM-DD`, UTC), purposes that begin so."""
        return _spent(self._reader, round_number, day, purpose)

    # ------------------------------------------------------------ one call
    def _answer(self, key: str) -> ChatResult | None:
        row = self._reader.execute(
            "SELECT text, finish_reason, input_tokens, output_tokens, model, version FROM calls WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        text, finish_reason, input_tokens, output_tokens, model, version = row
        return ChatResult(
            text=text,
            finish_reason=finish_reason,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            model=model,
            version=version,
            raw={},
        )

    async def _pay(self, model: ChatModel, call: _Call) -> ChatResult:
        async with self._slots:
            if self._closing:  # what waits for a place while the step ends is not begun
                raise asyncio.CancelledError
            await self._reserve(call)
            self._sent += 1
            try:
                result = await model(call.messages, **call.params, idempotency_key=call.key)
                if not await self._commit(lambda db: self._write(db, call, result)):
                    result = self._answer(call.key) or result  # another process asked the same and was first
            except BaseException:
                # An answer that never came holds no budget. (After a kill the reservation stays until the call is
                # asked again: it may have been paid.)
                if self._budget:
                    await self._commit(lambda db: db.execute("DELETE FROM reserved WHERE key = ?", (call.key,)))
                raise
            finally:
                self._sent -= 1
                self._landings += 1
                self._landed.set()
                self._landed = asyncio.Event()
        self._largest_output = max(self._largest_output, result.output_tokens)
        self._paid[call.purpose] += 1
        return result

    def _land(self, key: str, done: asyncio.Task[ChatResult]) -> None:
        self._flying.pop(key, None)
        if not done.cancelled():
            done.exception()  # looked at, so that a call nobody waits for any more does not complain

    def _write(self, db: sqlite3.Connection, call: _Call, result: ChatResult) -> bool:
        """False: the book has an answer to this call already, and that one stays."""
        now = self._clock()
        row = (
            call.key, call.endpoint, call.name, call.purpose, self._round, now, _day(now),
            result.input_tokens, result.output_tokens, self._money(result.input_tokens, result.output_tokens),
            result.text, result.finish_reason, result.model, result.version or "",
        )  # fmt: skip
        written = db.execute(f"INSERT OR IGNORE INTO calls VALUES({', '.join('?' * len(row))})", row).rowcount
        db.execute("DELETE FROM reserved WHERE key = ?", (call.key,))
        return written == 1

    # ------------------------------------------------------------ budget
    async def _reserve(self, call: _Call) -> None:
        if self._budget is None:
            return
        budget = self._budget
        while True:
            landings, landed = self._landings, self._landed
            try:
                await self._commit(lambda db: self._try_reserve(db, call, budget))
                return
            except _OverBudget as full:
                if self._landings != landings:
                    continue
                if self._sent == 0:
                    raise StepError(
                        f"{full}; what is paid is kept. Raise spec.strong.budget or wait, then run again: "
                        "it goes on from here.",
                        EXIT_BUDGET,
                    ) from None
            await landed.wait()

    def _try_reserve(self, db: sqlite3.Connection, call: _Call, budget: Budget) -> None:
        day = _day(self._clock())
        input_tokens = _likely_tokens(call.messages)
        output_tokens = call.params.get("max_tokens") or self._largest_output or UNKNOWN_OUTPUT_TOKENS
        tokens, money = input_tokens + output_tokens, self._money(input_tokens, output_tokens)
        db.execute("DELETE FROM reserved WHERE key = ?", (call.key,))  # left by a process that was killed
        in_round, on_day = _spent(db, self._round, None), _spent(db, None, day)
        held_round = db.execute(
            "SELECT count(*), total(money) FROM reserved WHERE round = ?", (self._round,)
        ).fetchone()
        held_day = db.execute("SELECT total(tokens), total(money) FROM reserved WHERE day = ?", (day,)).fetchone()
        currency = self._prices.currency if self._prices else ""
        for limit, used, more, words in (
            (budget.calls_per_round, in_round.calls + held_round[0], 1, f"calls in round {self._round}"),
            (budget.tokens_per_day, on_day.tokens + held_day[0], tokens, f"tokens on {day}"),
            (budget.money_per_round, in_round.money + held_round[1], money, f"{currency} in round {self._round}"),
            (budget.money_per_day, on_day.money + held_day[1], money, f"{currency} on {day}"),
        ):
            if limit is not None and used + more > limit:
                raise _OverBudget(
                    f"The budget of the strong model is spent: wanted at most {limit:g} {words}, "
                    f"saw {used:g} used and a call that needs about {more:g}"
                )
        db.execute("INSERT INTO reserved VALUES(?, ?, ?, ?, ?)", (call.key, self._round, day, tokens, money))

    def _money(self, input_tokens: int, output_tokens: int) -> float:
        if self._prices is None:
            return 0.0
        prices = self._prices
        return (input_tokens * prices.input_per_million_tokens + output_tokens * prices.output_per_million_tokens) / 1e6

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
            _, late = await asyncio.wait(self._flying.values(), timeout=DRAIN_SECONDS)
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


@dataclass(frozen=True)
class _Call:
    key: str
    endpoint: str
    name: str
    purpose: str
    messages: list[Mapping[str, Any]]
    params: dict[str, Any]


def read_spent(path: str | Path, *, round_number: int | None = None, day: str | None = None) -> Spent:
    """What a book says was paid, for a status line. Nothing when there is no book yet."""
    if not Path(path).exists():
        return Spent()
    db = _open(path)
    try:
        return _spent(db, round_number, day)
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


def _transaction(db: sqlite3.Connection, work: Sequence[Work]) -> list[Any]:
    """Results (or the exception) of each piece of work, all committed at once; a refused piece leaves no trace."""
    results: list[Any] = []
    try:
        db.execute("BEGIN IMMEDIATE")
        for piece in work:
            db.execute("SAVEPOINT piece")
            try:
                results.append(piece(db))
            except _OverBudget as refusal:
                db.execute("ROLLBACK TO piece")
                results.append(refusal)
            db.execute("RELEASE piece")
        db.execute("COMMIT")
    except sqlite3.Error as error:
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


def _book_error(error: Exception, place: str = "") -> StepError:
    return StepError(
        f"{place}The book of paid calls cannot be used: {error}. Wanted a writable SQLite file (--calls) on a disk "
        "with room; nothing that was written is lost, run again once it is.",
        EXIT_RETRY,
    )


def _likely_tokens(messages: Messages) -> int:
    """A generous guess for the reservation; the bill is settled with what the endpoint counts."""
    return sum(4 + len(json.dumps(message.get("content"), ensure_ascii=False)) // 3 for message in messages)


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
