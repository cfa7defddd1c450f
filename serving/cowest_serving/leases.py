"""Slices of a day's budget that gateways take in advance: what is asked, what is granted, and the book's side of it.

A row of the book is one gateway's share of one day. What it counts for against the day's limits is the larger of what
was granted and what is known to be spent: a gateway that is killed has spent its whole slice, as far as anybody knows.

    used on a day = paid by steps and judge + reserved for their calls + the shares of all gateways

Asks are cumulative and numbered, so that one that is repeated, or comes late, counts for nothing twice.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cowest_serving.contract import SettingsError

LEASE_PATH = "/v1/lease"  # of the proxy
ONE_GATEWAY = 8  # takes at most this part of the room in advance: others want some too
_MOST = 2**63  # no file of SQLite holds a whole number so large
_CRUMB = 1e-9  # of money: sums of binary fractions are not exact

SCHEMA = """
CREATE TABLE IF NOT EXISTS leases(
  holder TEXT NOT NULL, day TEXT NOT NULL, number INTEGER NOT NULL,
  granted_tokens INTEGER NOT NULL, granted_money REAL NOT NULL,
  calls INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, money REAL NOT NULL,
  PRIMARY KEY(day, holder));
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

    @property
    def amount(self) -> Amount:
        return Amount(self.tokens, self.money)


@dataclass(frozen=True)
class Amount:
    """What a day's budget limits."""

    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.tokens - other.tokens, self.money - other.money)

    def times(self, factor: int) -> Amount:
        return Amount(self.tokens * factor, self.money * factor)

    def part(self, of: int) -> Amount:
        """One of so many equal ones, in whole tokens."""
        return Amount(-(-self.tokens // of), self.money / of)

    def covers(self, other: Amount) -> bool:
        return self.tokens >= other.tokens and self.money >= other.money - _CRUMB

    def at_least(self, other: Amount) -> Amount:
        return Amount(max(self.tokens, other.tokens), max(self.money, other.money))

    def at_most(self, other: Amount) -> Amount:
        return Amount(min(self.tokens, other.tokens), min(self.money, other.money))


@dataclass(frozen=True)
class Room:
    """What is left for everybody; None: without a limit."""

    tokens: int | None = None
    money: float | None = None

    def covers(self, needed: Amount) -> bool:
        has_tokens = self.tokens is None or self.tokens >= needed.tokens
        return has_tokens and (self.money is None or self.money >= needed.money - _CRUMB)


@dataclass(frozen=True)
class Ask:
    """A gateway's word of one day. All amounts are of the whole day, so that a repeated ask changes nothing."""

    holder: str  # one gateway process: a name that no other has
    number: int  # grows with each ask; one that comes after a later one is not heard
    day: str | None = None  # None: today, by the book's clock
    spent: Spent = field(default_factory=Spent)
    needed: Amount = field(default_factory=Amount)  # all that is spent, on the wire and waiting
    wanted: Amount = field(default_factory=Amount)  # the same with what is to be in hand; less than before gives back

    def __post_init__(self) -> None:
        figures = (*vars(self.spent).values(), *vars(self.needed).values(), *vars(self.wanted).values(), self.number)
        if not self.holder or min(figures) < 0 or max(figures) >= _MOST:
            raise SettingsError("a lease: wanted the name of a holder and figures from 0 to 2^63 - 1, saw others")


@dataclass(frozen=True)
class Lease:
    """What a gateway may spend on a day, all that it has spent included."""

    day: str
    seconds_left: float  # of the day: the lease ends with it
    granted: Amount
    room: Room  # beside it


@dataclass(frozen=True)
class Limits:
    """A day's, and what others than gateways have used of them."""

    most: Room
    used: Amount

    def room(self, shares: Amount) -> Room:
        left = self.used + shares
        return Room(
            None if self.most.tokens is None else self.most.tokens - left.tokens,
            None if self.most.money is None else self.most.money - left.money,
        )


def lend(db: sqlite3.Connection, ask: Ask, limits: Limits, now: float) -> Lease:
    """In a transaction: note what is spent, and grant as much of what is wanted as there is room for."""
    today = day_of(now)
    day = ask.day or today
    row = db.execute(
        "SELECT number, granted_tokens, granted_money, calls, input_tokens, output_tokens, money FROM leases"
        " WHERE day = ? AND holder = ?",
        (day, ask.holder),
    ).fetchone()
    before = Amount(row[1], row[2]) if row else Amount()
    is_late = row is not None and row[0] >= ask.number
    spent = Spent(*row[3:]) if is_late else ask.spent
    room = limits.room(shares(db, day, other_than=ask.holder) + before.at_least(spent.amount))
    granted = before
    if not is_late:
        granted = _granted(ask, before, room) if day == today else before.at_most(ask.wanted)
        figures = (ask.number, granted.tokens, granted.money, *vars(spent).values())
        db.execute("INSERT OR REPLACE INTO leases VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", (ask.holder, day, *figures))
    left = limits.room(shares(db, day))
    return Lease(day, seconds_left(day, now), granted, left)


def _granted(ask: Ask, before: Amount, room: Room) -> Amount:
    base = before.at_least(ask.spent.amount)
    wanted, needed = ask.wanted - base, ask.needed - base
    # Where the room is too small for what is needed, of one or the other, nobody could use more of either.
    has_room = room.covers(needed)
    more_tokens = _more(wanted.tokens, needed.tokens, room.tokens) if has_room else 0
    more_money = _more(wanted.money, needed.money, room.money) if has_room else 0
    return Amount(
        int(base.tokens + more_tokens) if more_tokens else min(before.tokens, ask.wanted.tokens),
        base.money + more_money if more_money else min(before.money, ask.wanted.money),
    )


def _more(wanted: float, needed: float, room: float | None) -> float:
    if wanted <= 0:
        return 0
    if room is None:
        return wanted
    return max(0, min(wanted, room, max(needed, room / ONE_GATEWAY)))


def shares(db: sqlite3.Connection, day: str, other_than: str = "") -> Amount:
    """What gateways have of a day's budget."""
    tokens, money = db.execute(
        "SELECT total(max(granted_tokens, input_tokens + output_tokens)), total(max(granted_money, money)) FROM leases"
        " WHERE day = ? AND holder != ?",
        (day, other_than),
    ).fetchone()
    return Amount(int(tokens), float(money))


def live_spent(db: sqlite3.Connection, day: str) -> Spent:
    """What live answers are known to have cost."""
    row = db.execute(
        "SELECT total(calls), total(input_tokens), total(output_tokens), total(money) FROM leases WHERE day = ?", (day,)
    ).fetchone()
    return Spent(int(row[0]), int(row[1]), int(row[2]), float(row[3]))


def day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


def seconds_left(day: str, now: float) -> float:
    end = datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    return max(0.0, end.timestamp() - now)
