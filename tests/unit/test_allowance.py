"""Slices of a day's budget: whatever is killed, lost or late, what was sent never passes the limit; none is stuck."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from dataclasses import dataclass, field, replace

import pytest

from cowest_serving.allowance import Allowance, Bill, BudgetUnknown, NoBudget, Share, allowance_of
from cowest_serving.book import BookError
from cowest_serving.contract import Budget, Prices, SettingsError, Strong, dump, parse
from cowest_serving.leases import (
    SCHEMA,
    Amount,
    Ask,
    Lease,
    Limits,
    Room,
    Spent,
    lend,
    live_spent,
    seconds_left,
    shares,
)
from cowest_serving.models import ChatResult
from tests.patience import IN_TIME

NOON = 1_800_014_400.0  # 2027-01-15, 12:00 UTC
TODAY = "2027-01-15"
PRICES = Prices(1_000_000.0, 2_000_000.0, "EUR")  # 1 and 2 a token
ASKED = [{"role": "user", "content": "x" * 24}]  # 4 + 26 // 3 = 12 tokens


@dataclass
class Book:
    """The book in memory, at the end of a line that loses asks and answers, and lets asks come late."""

    most: Room
    now: float = NOON
    paid_by_steps: Amount = field(default_factory=Amount)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    faults: float = 0.0
    asks: list[Ask] = field(default_factory=list)
    late: list[Ask] = field(default_factory=list)
    is_away: bool = False
    slow: asyncio.Event | None = None  # set: it answers again
    bug: Exception | None = None
    db: sqlite3.Connection = field(default_factory=lambda: sqlite3.connect(":memory:"))

    def __post_init__(self) -> None:
        self.db.executescript(SCHEMA)

    async def lend(self, ask: Ask) -> Lease:
        self.asks.append(ask)
        await asyncio.sleep(0)
        if self.slow is not None:
            await self.slow.wait()
        if self.bug is not None:
            raise self.bug
        if self.is_away:
            raise BookError("away")
        fate = self.chance.random()
        if fate < self.faults / 3:
            self.late.append(ask)
            raise BookError("the ask is under way")
        lease = self.write(ask)
        while self.late and self.chance.random() < 0.5:
            self.write(self.late.pop(self.chance.randrange(len(self.late))))
        if fate < self.faults:
            raise BookError("the answer was lost")
        return lease

    def write(self, ask: Ask) -> Lease:
        return lend(self.db, parse(Ask, dump(ask)), Limits(self.most, self.paid_by_steps), self.now)

    async def aclose(self) -> None:
        pass

    def pay(self, amount: Amount) -> bool:
        """A step's call, as the book lets it through."""
        used = self.paid_by_steps + shares(self.db, TODAY) + amount
        if not Amount(self.most.tokens or 0, self.most.money or 0.0).covers(used):
            return False
        self.paid_by_steps += amount
        return True


def allowance(book: Book, prices: Prices | None = PRICES, **seconds: float) -> Allowance:
    return Allowance(book, prices, clock=lambda: book.now, **seconds)


async def call(door: Allowance, output: int = 10, most: int = 10) -> None:
    """A call that takes its 12 tokens in and `output` of the `most` that it asked for."""
    async with door.paid(ASKED, {}, most) as bill:
        bill.read_result(ChatResult("", "stop", 12, output, "m", "", {}))


async def calls_until_refused(door: Allowance, limit: int = 1000, **options: int) -> int:
    for number in range(limit):
        try:
            await call(door, **options)
        except NoBudget:
            return number
    return limit


# ---------------------------------------------------------------- what holds
@pytest.mark.parametrize("seed", range(40))
async def test_what_was_sent_never_passes_the_limit_whatever_is_killed_lost_or_late(seed: int) -> None:
    chance = random.Random(seed)
    most = Room(chance.choice([500, 3_000, 20_000]), chance.choice([900.0, 5_000.0, 30_000.0]))
    book = Book(most, chance=chance, faults=chance.choice([0.0, 0.2, 0.5]))
    sent = Amount()

    async def worker() -> None:
        nonlocal sent
        door = allowance(book)
        for _ in range(chance.randrange(1, 120)):
            most_output = chance.choice([3, 30, 200])
            taken_in, given_out = chance.randrange(1, 13), chance.randrange(1, most_output + 1)
            try:
                async with door.paid(ASKED, {}, most_output) as bill:
                    await bill.begin()
                    spent = Amount(taken_in + given_out, taken_in + 2.0 * given_out)
                    sent += spent  # from here on the endpoint may bill it
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                    if chance.random() < 0.02:
                        return  # killed with a call on the wire: nothing more is said to the book
                    bill.read_result(ChatResult("", "stop", taken_in, given_out, "m", "", {}))
            except NoBudget:
                book.now += 0.7
            for _ in range(chance.choice([0] * 8 + [1, 3])):  # three without a call between them give everything back
                await door.report()
            if chance.random() < 0.05 and book.pay(paid := Amount(7, 9.0)):
                sent += paid
            assert Amount(most.tokens or 0, most.money or 0.0).covers(sent)
        if chance.random() < 0.5:
            await door.aclose()

    for _ in range(6):
        await asyncio.gather(*(worker() for _ in range(5)))
    assert sent != Amount()


async def test_a_lone_gateway_can_spend_all_but_less_than_one_call() -> None:
    book = Book(Room(10_000, None))
    assert await calls_until_refused(allowance(book)) == 10_000 // 22


async def test_what_one_gateway_gives_back_another_can_spend() -> None:
    book = Book(Room(2_200, None))
    first, second = allowance(book), allowance(book)
    await call(first)
    assert await calls_until_refused(second) < 99
    await first.report()
    await first.report()
    await first.report()  # two periods without a call
    book.now += 2
    assert shares(book.db, TODAY).tokens - second._share.granted.tokens == 22  # type: ignore[union-attr]
    await calls_until_refused(second)
    assert live_spent(book.db, TODAY).tokens <= 2_200 and (await second.report(), live_spent(book.db, TODAY).calls) == (
        None,
        100,
    )


async def test_the_slice_of_a_gateway_that_was_killed_counts_as_spent_and_a_closed_one_gives_back_the_rest() -> None:
    book = Book(Room(100_000, None))
    killed, closed = allowance(book), allowance(book)
    await call(killed)
    taken = shares(book.db, TODAY).tokens
    assert taken > 22
    await call(closed)
    await closed.aclose()
    assert shares(book.db, TODAY).tokens == taken + 22


async def test_what_is_given_back_is_not_spent_though_the_answer_was_lost() -> None:
    book = Book(Room(100_000, None))
    door = allowance(book)
    await call(door)
    await door.report()
    await door.report()
    book.faults = 1.0
    book.chance = random.Random(0)  # the ask arrives, its answer does not
    await door.report()
    assert shares(book.db, TODAY).tokens == 22
    book.is_away = True
    assert await calls_until_refused(door) == 0


async def test_under_load_the_book_is_asked_seldom() -> None:
    book = Book(Room(100_000_000, None))
    door = allowance(book)
    for _ in range(50):
        await asyncio.gather(*(call(door) for _ in range(100)))
    assert len(book.asks) < 40, "5,000 calls"


async def test_calls_of_mixed_sizes_are_not_refused_while_there_is_room_and_the_book_is_asked_seldom() -> None:
    book, chance = Book(Room(100_000_000, None)), random.Random(1)
    door = allowance(book)
    for _ in range(50):
        await asyncio.gather(*(call(door, most=10_000 if chance.random() < 0.01 else 10) for _ in range(100)))
    assert len(book.asks) < 60, "5,000 calls, 50 of them large"


async def test_calls_that_are_refused_take_nothing_from_others() -> None:
    book = Book(Room(100_000, 100_000.0))
    door = allowance(book)
    for number in range(1, 20):
        with pytest.raises(NoBudget):
            await call(door, most=10_000_000)
        await call(door)
        book.now += 1.5
        taken, all_calls = shares(book.db, TODAY), 22 * number
        assert taken.tokens <= all_calls + 5 * 22 and taken.money <= 32.0 * number + 5 * 32, "a slice beside the calls"


async def test_a_call_that_has_no_room_in_tokens_holds_no_money() -> None:
    book = Book(Room(1_000, 100_000.0))
    for _ in range(3):
        with pytest.raises(NoBudget):
            await call(allowance(book), most=2_000)
    assert shares(book.db, TODAY) == Amount()


async def test_one_large_call_that_took_little_makes_no_large_slice() -> None:
    book = Book(Room(1_000_000, None))
    door = allowance(book)
    for _ in range(99):
        await call(door)
    await call(door, most=50_000)
    await door.report()
    assert shares(book.db, TODAY).tokens < 100 * 22 + 100 * 22 + 5 * 600, "what went, and calls of the mean size"


async def test_a_call_within_the_slice_does_not_wait_for_the_book() -> None:
    book = Book(Room(100_000, None))
    door = allowance(book)
    await call(door)
    book.is_away = True
    await asyncio.wait_for(call(door), IN_TIME)


# ---------------------------------------------------------------- with the book away
async def test_with_the_book_away_the_slice_is_used_up_and_then_there_is_no_call() -> None:
    book = Book(Room(100_000, None))
    door = allowance(book)
    await call(door)
    in_hand = door.in_hand.tokens
    book.is_away = True
    assert await calls_until_refused(door) == in_hand // 22 > 0
    with pytest.raises(BudgetUnknown, match=r"cannot be looked up, and what was set aside is used up\. away"):
        await call(door)
    assert door.gauges()["cowest_budget_trouble"] == {(): 1.0}
    book.is_away = False
    book.now += 1.5
    await call(door)


async def test_calls_that_wait_for_a_book_that_is_away_ask_it_once_a_second() -> None:
    book = Book(Room(100_000, None), is_away=True)
    door = allowance(book)
    found = await asyncio.gather(*(call(door) for _ in range(50)), return_exceptions=True)
    assert [type(error) for error in found] == [BudgetUnknown] * 50 and len(book.asks) == 1
    assert door.refused == 50


async def test_a_book_that_is_slow_is_one_that_does_not_answer() -> None:
    book = Book(Room(100_000, None), slow=asyncio.Event())
    door = allowance(book, book_seconds=0.01)
    with pytest.raises(BudgetUnknown, match=r"used up\. The book of paid calls gives no answer within 0\.01 s\."):
        await call(door)
    assert book.slow is not None
    book.slow.set()
    book.now += 1.5
    await call(door)


async def test_a_call_waits_for_the_book_no_longer_than_it_may_take_itself_and_the_next_one_asks_again() -> None:
    book = Book(Room(100_000, None), slow=asyncio.Event())
    door, began = allowance(book), time.monotonic()
    with pytest.raises(BudgetUnknown, match="in the time of this call"):
        async with door.paid(ASKED, {}, 10, began + 0.1):
            raise AssertionError("there is no room")
    assert time.monotonic() - began < 2, "the book's own patience is 3 s"
    assert book.slow is not None
    book.slow.set()
    await call(door)
    assert len(book.asks) == 2


@pytest.mark.parametrize("trouble", ["slow", "bug"])
async def test_reports_go_on_whatever_the_book_does(trouble: str) -> None:
    book = Book(Room(100_000, None))
    door = allowance(book, report_seconds=0.001, book_seconds=0.01)
    await call(door)
    wait = asyncio.Event()
    book.slow, book.bug = (wait, None) if trouble == "slow" else (None, ValueError("unheard of"))
    await door.start()
    async with asyncio.timeout(IN_TIME):
        while not door.word()["trouble"]:
            await asyncio.sleep(0.001)
        book.slow = book.bug = None
        while live_spent(book.db, TODAY).calls == 0:
            await asyncio.sleep(0.001)
    assert door.word()["trouble"] is None
    await door.aclose()


# ---------------------------------------------------------------- the end of a budget, and of a day
async def test_a_budget_that_is_spent_says_so_and_until_when() -> None:
    book = Book(Room(30, 1_000.0))
    door = allowance(book)
    await call(door)
    with pytest.raises(NoBudget, match=rf"for {TODAY} is spent: wanted room for about 22 tokens, 32 EUR, saw 8 ") as no:
        await call(door)
    assert no.value.retry_after == 12 * 3600
    assert door.word()["left_tokens"] == 8 and door.word()["refused"] == 1
    assert door.word()["refuses"] == "NoBudget"
    book.now += seconds_left(TODAY, book.now)
    assert door.word()["refuses"] is None, "another day begins"


async def test_a_smaller_call_may_still_have_room() -> None:
    book = Book(Room(40, None))
    door = allowance(book)
    await call(door)
    with pytest.raises(NoBudget):
        await call(door, most=11)
    await call(door, output=1, most=6)
    assert door.word()["refuses"] is None


async def test_at_midnight_another_days_budget_begins_and_calls_on_the_wire_are_of_the_old_one() -> None:
    book = Book(Room(100, None))
    door = allowance(book)
    async with door.paid(ASKED, {}, 10) as bill:
        book.now += seconds_left(TODAY, book.now)
        await calls_until_refused(door)
        bill.read_result(ChatResult("", "stop", 12, 3, "m", "", {}))
    await door.report()
    assert live_spent(book.db, TODAY) == Spent(1, 12, 3, 18.0)
    assert shares(book.db, TODAY).tokens == 15, "what was not needed of the old day is given back"
    assert live_spent(book.db, "2027-01-16").calls == 4


async def test_a_day_that_ends_earlier_here_than_at_the_book_loses_nothing() -> None:
    book = Book(Room(100, None))
    door = Allowance(book, None, clock=lambda: book.now * 2)
    await call(door)
    book.now += 11 * 3600  # 22 hours by the clock here: over; 23:00 at the book
    assert await calls_until_refused(door) == 3
    await door.report()
    assert live_spent(book.db, TODAY).calls == 4


async def test_a_day_that_ends_earlier_at_the_book_than_here_is_over_at_once() -> None:
    """As after a suspend, in which the clock here stands still, or when the time of day is set."""
    book = Book(Room(100, None))
    clock = book.now
    door = Allowance(book, None, clock=lambda: clock)
    assert await calls_until_refused(door) == 4
    book.now += 13 * 3600
    clock += 2
    assert await calls_until_refused(door) == 4
    await door.report()
    assert live_spent(book.db, TODAY).calls == 4
    assert live_spent(book.db, "2027-01-16").calls == 4


# ---------------------------------------------------------------- what a call turns out to cost
@pytest.mark.parametrize(
    ("is_sent", "is_refused", "tokens"),
    [
        pytest.param(False, False, 0, id="what only waited for its turn is not billed"),
        pytest.param(True, True, 0, id="what the endpoint refused is not"),
        pytest.param(True, False, 22, id="what was sent, and nobody knows the end of, may be"),
    ],
)
async def test_a_call_without_an_answer_counts_where_it_may_be_billed(
    is_sent: bool, is_refused: bool, tokens: int
) -> None:
    door = allowance(Book(Room(100_000, None)))
    with pytest.raises(asyncio.CancelledError):
        async with door.paid(ASKED, {}, 10) as bill:
            if is_sent:
                await bill.begin()
            if is_refused:
                bill.unpaid()
            raise asyncio.CancelledError
    assert door._share is not None and door._share.used.tokens == tokens


async def test_each_attempt_that_may_be_billed_counts() -> None:
    door = allowance(Book(Room(100_000, None)))
    async with door.paid(ASKED, {}, 10) as bill:
        await bill.begin()  # hangs
        await bill.begin()  # is refused
        bill.unpaid()
        await bill.begin()  # hangs
        await bill.begin()
        bill.read_result(ChatResult("", "stop", 12, 3, "m", "", {}))
    assert door._share is not None
    assert (door._share.spent.calls, door._share.used.tokens) == (3, 2 * 22 + 15)


async def test_an_attempt_beside_others_that_may_be_billed_is_made_only_where_there_is_room_for_it() -> None:
    book = Book(Room(50, None))
    door = allowance(book)
    with pytest.raises(NoBudget):
        async with door.paid(ASKED, {}, 10) as bill:
            for _ in range(3):
                await bill.begin()
    await door.report()
    assert live_spent(book.db, TODAY) == Spent(2, 24, 20, 64.0)


def bill(**changes: int) -> Bill:
    return replace(Bill(Share(), Amount(), 12, 500), **changes)


def test_a_stream_counts_what_the_endpoint_counts() -> None:
    seen = bill()
    for chunk in (b'{"choices":[{"delta":{"content":"hi"}}]}', b'{"usage":{"prompt_tokens":9,"completion_tokens":4}}'):
        seen.read_chunk(chunk)
    assert (seen.input_tokens, seen.likely_output) == (9, 4)


def test_a_stream_that_breaks_off_counts_what_came_of_it() -> None:
    seen, empty = bill(), b'{"choices":[{"delta":{"content":""}}]}'
    for _ in range(10):
        seen.read_chunk(empty)
    assert seen.likely_output == 10, "a chunk is a token at least"
    seen.read_chunk(empty.replace(b'""', b'"' + b"x" * 300 + b'"'))
    assert seen.likely_output == 111


async def test_an_answer_that_takes_more_than_was_set_aside_is_booked_in_full() -> None:
    book = Book(Room(200, None))
    door = allowance(book)
    await call(door, output=300, most=10)
    with pytest.raises(NoBudget):
        await call(door)
    assert shares(book.db, TODAY).tokens == 312


# ---------------------------------------------------------------- the book's side
ASK = Ask("one", 1, TODAY, needed=Amount(10), wanted=Amount(80))


def test_a_gateway_takes_at_most_a_part_of_the_room_but_what_it_needs() -> None:
    book = Book(Room(800, None))
    assert book.write(replace(ASK, wanted=Amount(800))).granted.tokens == 100
    book = Book(Room(800, None))
    assert book.write(replace(ASK, needed=Amount(300), wanted=Amount(800))).granted.tokens == 300
    assert book.write(replace(ASK, holder="two", needed=Amount(501), wanted=Amount(501))).granted.tokens == 0


def test_an_ask_that_comes_again_or_late_changes_nothing() -> None:
    book = Book(Room(8_000, None))
    first = book.write(ASK)
    later = book.write(replace(ASK, number=3, spent=Spent(1, 5, 5), wanted=Amount(40)))
    assert (first.granted.tokens, later.granted.tokens) == (80, 40)
    for again in (ASK, replace(ASK, number=3, spent=Spent(9, 9, 9)), replace(ASK, number=2, wanted=Amount(500))):
        assert book.write(again).granted.tokens == 40
    assert live_spent(book.db, TODAY) == Spent(1, 5, 5)


def test_yesterdays_share_can_only_be_given_back() -> None:
    book = Book(Room(8_000, None))
    book.write(ASK)
    book.now += 24 * 3600
    assert book.write(replace(ASK, number=2, wanted=Amount(500))).granted.tokens == 80
    assert book.write(replace(ASK, number=3, wanted=Amount(30))).granted.tokens == 30


@pytest.mark.parametrize(
    "wrong", [{"holder": ""}, {"number": -1}, {"wanted": Amount(-5)}, {"wanted": Amount(2**63)}, {"spent": Spent(-1)}]
)
def test_a_senseless_ask_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="a lease: wanted the name of a holder"):
        replace(ASK, **wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the manifest
STRONG = Strong("http://s/v1", "m", (), timeout_seconds=5, max_concurrency=1, max_retries=0)


@pytest.mark.parametrize("budget", [None, Budget(), Budget(calls_per_round=3, money_per_round=1.0)])
def test_without_a_limit_of_a_day_nothing_is_counted(budget: Budget | None) -> None:
    assert allowance_of(replace(STRONG, budget=budget), None) is None


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        pytest.param(Budget(tokens_per_day=5), "wanted --book", id="no book"),
        pytest.param(Budget(money_per_day=5.0), "wanted prices", id="no prices"),
    ],
)
def test_a_limit_of_a_day_that_cannot_be_kept_is_refused(budget: Budget, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        allowance_of(replace(STRONG, budget=budget), None)
