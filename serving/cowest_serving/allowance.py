"""What this gateway may spend on live answers: a slice of the day's budget, taken in advance and renewed in time.

    take (in memory) -> the call -> settle with what it cost
          |  less than half a slice is left: renewed meanwhile
          '- too little is left: this call waits for the book

Only where spec.strong.budget limits a day. What is taken but not settled when the process is killed counts as spent
(see leases.py), so slices are small: what goes in some seconds. With the book away the slice is used up, then there is
no call. At midnight UTC begins another day.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson

from cowest_serving.book import BookError, PaidCalls
from cowest_serving.contract import UNKNOWN_OUTPUT_TOKENS, Messages, Prices, SettingsError, Strong, dump, parse
from cowest_serving.estimates import likely_input_tokens, likely_tokens, most_output_tokens
from cowest_serving.key_files import PROXY_KEYS, ReadKeys, keys_of
from cowest_serving.leases import LEASE_PATH, Amount, Ask, Lease, Room, Spent
from cowest_serving.models import ChatResult, ModelError, count

log = logging.getLogger(__name__)
NOTHING = Amount()
METRICS = {
    "cowest_budget_in_hand": "What this gateway may spend on live answers before it asks the book again, by unit.",
    "cowest_budget_left_today": "What is left of the day's budget beside such slices, as the book said last, by unit.",
    "cowest_budget_refused_calls": "Calls of the strong model that were not made: the budget had no room.",
    "cowest_budget_trouble": "1 while the book of paid calls does not answer.",
}
REPORT_SECONDS = 5.0  # between words to the book, where there is something to say
AHEAD = 4  # a slice is what went in so many reports, and at least so many calls
AGAIN_SECONDS = 1.0  # a book that is away, or has no room, is not asked more often by calls that wait
BOOK_SECONDS = 3.0  # that a call waits for the book
ASKS_FOR_A_CALL = 3  # while one waits for the book, smaller ones go on and may take of what it gets


class NoBudget(ModelError):
    """The day's budget has no room for this call; `retry_after` is until midnight UTC."""


class BudgetUnknown(NoBudget):
    """The slice is used up, and the book does not answer."""


class Lender(Protocol):
    """Whoever keeps the book. Raises `BookError`."""

    async def lend(self, ask: Ask) -> Lease: ...

    async def aclose(self) -> None: ...


class FileLender:
    """The book as a file of this machine, which the steps use too. Opened when it is asked: it may be away before."""

    def __init__(self, path: Path, strong: Strong) -> None:
        self._path, self._strong = path, strong
        self._book: PaidCalls | None = None

    async def lend(self, ask: Ask) -> Lease:
        if self._book is None:
            self._book = await asyncio.to_thread(PaidCalls.for_strong, self._path, self._strong)
        return await self._book.lend(ask)

    async def aclose(self) -> None:
        if self._book is not None:
            await self._book.aclose()


class HttpLender:
    """The book of the job's proxy. Of several keys each is shown in turn: while they are rotated one is not known."""

    def __init__(self, address: str, read_keys: ReadKeys = tuple, seconds: float = BOOK_SECONDS) -> None:
        self._url, self._read_keys, self._seconds = address.rstrip("/") + LEASE_PATH, read_keys, seconds
        self._session: aiohttp.ClientSession | None = None

    async def lend(self, ask: Ask) -> Lease:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._seconds))
        saw = ""
        try:
            data = orjson.dumps(dump(ask))
            for key in self._read_keys() or ("",):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                async with self._session.post(self._url, data=data, headers=headers) as answer:
                    body = orjson.loads(await answer.read())
                    if answer.status == 200:
                        return parse(Lease, body, "lease")
                    saw = f"{answer.status} {body['error']['message']}"
                    if answer.status != 401:
                        break
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            saw = str(error) or type(error).__name__
        raise BookError(f"{self._url}: wanted a lease of the day's budget, saw: {saw}")

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


def lender_of(book: str, strong: Strong, seconds: float = BOOK_SECONDS) -> Lender:
    """`book`: a file, or the address of the proxy that keeps it, which has so many seconds to answer."""
    if "://" in book:
        return HttpLender(book, keys_of(os.environ, PROXY_KEYS).read, seconds)
    return FileLender(Path(book), strong)


@dataclass(eq=False)
class Share:
    """This process' part of one day."""

    day: str = ""  # until the book has said it
    until: float = 0.0  # when the day ends, by the clock of the allowance
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)
    granted: Amount = NOTHING
    held: Amount = NOTHING
    calls: int = 0  # on the wire
    spent: Spent = field(default_factory=Spent)
    told: Spent = field(default_factory=Spent)  # what the book knows

    @property
    def used(self) -> Amount:
        return self.spent.amount + self.held

    @property
    def left(self) -> Amount:
        return self.granted - self.used


@dataclass(eq=False)
class Bill:
    """One call: what was taken for it, and what it turns out to cost. `models.Payer` of its attempts."""

    share: Share
    taken: Amount
    input_tokens: int  # likely; as the endpoint counts, once it has
    most_output: int
    take_again: Callable[[Bill], Awaitable[None]] | None = None
    until: float | None = None  # when its call has to be over
    output_tokens: int | None = None
    has_begun: bool = False
    is_out: bool = False  # an attempt is sent, and maybe answered: it may be billed
    _chunks: int = 0
    _bytes: int = 0
    _shortest: int = 400  # bytes of a chunk without text, at most

    async def begin(self) -> None:
        """What only waits for its turn costs nothing. Raises `NoBudget`."""
        if self.is_out and self.take_again is not None:
            await self.take_again(self)
        self.is_out = True

    def unpaid(self) -> None:
        self.is_out = False

    def read_result(self, result: ChatResult) -> None:
        self.has_begun = True
        self._count(result.input_tokens, result.output_tokens or likely_tokens(len(result.text)))

    def read_chunk(self, chunk: bytes) -> None:
        """Without parsing what has no usage."""
        self.has_begun = True
        self._chunks += 1
        self._bytes += len(chunk)
        self._shortest = min(self._shortest, len(chunk))
        if b'"prompt_tokens"' in chunk:
            with suppress(ValueError, AttributeError):
                usage = orjson.loads(chunk).get("usage") or {}
                self._count(count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")))

    def _count(self, input_tokens: int, output_tokens: int) -> None:
        self.input_tokens = input_tokens or self.input_tokens
        self.output_tokens = output_tokens or self.output_tokens

    @property
    def likely_output(self) -> int:
        """Of an answer that broke off, what came; of one of which nothing came and that may be paid, all.

        Bytes above those of the shortest chunk are text, three a token; a chunk is one at least.
        """
        if self.output_tokens is not None:
            return self.output_tokens
        return self._chunks + (self._bytes - self._chunks * self._shortest) // 3 if self.has_begun else self.most_output


class Allowance:
    """In memory, for one process and one event loop."""

    def __init__(
        self,
        lender: Lender,
        prices: Prices | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        report_seconds: float = REPORT_SECONDS,
        book_seconds: float = BOOK_SECONDS,
    ) -> None:
        self._lender, self._prices, self._clock = lender, prices, clock
        self._every, self._patience = report_seconds, book_seconds
        self._number = 0
        self._share: Share | None = None
        self._ending: list[Share] = []  # of days that are over, until all their calls are settled
        self._one = asyncio.Lock()  # asks are made one after the other
        self._waiting = 0  # calls
        self._slice = Amount()
        self._calls = [(0, NOTHING), (0, NOTHING)]  # how many, and what was taken for them: in this period, in the last
        self._refused: tuple[Amount, float, NoBudget] | None = None  # from so large on, not again until then
        self._refuses = ""  # how the last call was refused, until one has room
        self._short_until = 0.0  # the book had less than was wanted: what goes on beside calls waits so long
        self._renewing: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._largest_output = 0
        self._trouble = ""
        self.room = Room()  # of the day for everybody, as the book said last
        self.refused = 0  # calls that were not made

    # ------------------------------------------------------------ a call
    @asynccontextmanager
    async def paid(
        self, messages: Messages, extra: Any = None, max_tokens: int | None = None, until: float | None = None
    ) -> AsyncIterator[Bill]:
        """Room for one call, taken before it and settled after it. Raises `NoBudget` before anything is sent.

        `until`: when the call has to be over, by the monotonic clock.
        """
        taken_in = likely_input_tokens(messages, extra)
        most = most_output_tokens(max_tokens, extra) or self._largest_output or UNKNOWN_OUTPUT_TOKENS
        amount = Amount(taken_in + most, self._money(taken_in, most))
        bill = Bill(await self._room(amount, until), amount, taken_in, most, self._take_again, until)
        try:
            yield bill
        finally:
            self._settle(bill)

    async def _room(self, amount: Amount, until: float | None) -> Share:
        return self._take(amount) or await self._wait_for(amount, until)

    async def _take_again(self, bill: Bill) -> None:
        """Room for one more attempt. The one before may be billed, and keeps what was taken for it until then."""
        share = await self._room(bill.taken, bill.until)
        self._settle(bill)
        bill.share = share

    def _take(self, amount: Amount) -> Share | None:
        share = self._share
        if share is None or self._clock() >= share.until or not share.left.covers(amount):
            return None
        self._refuses = ""
        share.held += amount
        share.calls += 1
        number, taken = self._calls[0]
        self._calls[0] = number + 1, taken + amount
        if self._clock() >= self._short_until and not share.left.covers(self._half_a_slice):
            self._renew()
        return share

    def _settle(self, bill: Bill) -> None:
        share, output = bill.share, bill.likely_output
        share.calls -= 1
        share.held = share.held - bill.taken if share.calls else Amount()  # sums of fractions leave crumbs
        if not (bill.has_begun or bill.is_out):
            return
        self._largest_output = max(self._largest_output, bill.output_tokens or 0)
        before, money = share.spent, self._money(bill.input_tokens, output)
        share.spent = Spent(
            before.calls + 1,
            before.input_tokens + bill.input_tokens,
            before.output_tokens + output,
            before.money + money,
        )

    def _money(self, input_tokens: int, output_tokens: int) -> float:
        return self._prices.of(input_tokens, output_tokens) if self._prices else 0.0

    # ------------------------------------------------------------ the book
    async def _wait_for(self, amount: Amount, until: float | None) -> Share:
        self._waiting += 1
        try:
            async with asyncio.timeout(None if until is None else until - time.monotonic()), self._one:
                for _ in range(ASKS_FOR_A_CALL):
                    if (share := self._take(amount)) is not None:
                        return share
                    self._refuse_again(amount)
                    if not await self._ask(amount):
                        break
                if (share := self._take(amount)) is not None:
                    return share
                raise self._note_refusal(amount, self._spent_error(amount))
        except BookError as error:
            raise self._note_refusal(Amount(), _unknown(error)) from None
        except TimeoutError:
            raise _unknown("The book of paid calls gives no answer in the time of this call.") from None
        finally:
            self._waiting -= 1

    def _refuse_again(self, amount: Amount) -> None:
        if self._refused is None:
            return
        smallest, until, error = self._refused
        if self._clock() < until and amount.covers(smallest):
            self.refused += 1
            raise type(error)(str(error), retry_after=error.retry_after)

    def _note_refusal(self, amount: Amount, error: NoBudget) -> NoBudget:
        self.refused += 1
        self._refuses = type(error).__name__
        self._refused = (amount, self._clock() + AGAIN_SECONDS, error)
        return error

    def _spent_error(self, amount: Amount) -> NoBudget:
        assert self._share is not None
        room = {"tokens": self.room.tokens, self._prices.currency if self._prices else "money": self.room.money}
        left = " and ".join(f"{max(0, value):g} {what}" for what, value in room.items() if value is not None)
        money = f", {amount.money:g} {self._prices.currency}" if self._prices else ""
        return NoBudget(
            f"The budget of the strong model for {self._share.day} is spent: wanted room for about {amount.tokens} "
            f"tokens{money}, saw {left} left for everybody. Ask again after midnight UTC, or raise spec.strong.budget.",
            retry_after=max(1, math.ceil(self._share.until - self._clock())),
        )

    async def _ask(self, needed: Amount = NOTHING) -> bool:
        """Report, and have the slice that the pace of now wants. Under `_one`. Raises `BookError`.

        True: the book gave what is needed, of which smaller calls may have taken meanwhile; or the share's day is over
        by the book's clock, as after a suspend, and the next ask is of another.
        """
        share = self._share
        if share is not None and self._clock() >= share.until:
            self._ending.append(share)
            share = self._share = None
        share = share or Share()
        needed_in_all, slice_of_now = share.used + needed, self._slice_of_now(needed)
        await self._exchange(share, needed_in_all, needed_in_all + slice_of_now)
        self._share = share
        return share.granted.covers(needed_in_all) or self._clock() >= share.until

    async def _exchange(self, share: Share, needed: Amount, wanted: Amount) -> None:
        share.granted = share.granted.at_most(wanted)  # what is given back is not spent meanwhile
        self._number += 1
        began, told = self._clock(), share.spent
        ask = Ask(share.holder, self._number, share.day or None, told, needed, wanted)
        try:
            async with asyncio.timeout(self._patience):
                lease = await self._lender.lend(ask)
        except TimeoutError:
            raise BookError(f"The book of paid calls gives no answer within {self._patience:g} s.") from None
        share.day, share.until = lease.day, began + lease.seconds_left
        share.granted, share.told = lease.granted, told
        if not lease.granted.covers(wanted):
            self._short_until = self._clock() + AGAIN_SECONDS
        self.room, self._trouble = lease.room, ""

    def _slice_of_now(self, first: Amount = NOTHING) -> Amount:
        """So many calls of the usual size, and those that wait, or what went in so many reports: the larger; at rest
        nothing. `first`: the size of a call of which there was none before.

        Usual is what was taken, of calls that had room: one that asks for more than there is changes nothing.
        """
        (new, of_new), (old, of_old) = self._calls
        usual = (of_new + of_old).part(new + old) if new + old else first
        pace = self._share.spent.amount - self._share.told.amount if self._share else NOTHING
        self._slice = pace.times(AHEAD).at_least(usual.times(max(AHEAD, self._waiting)))
        return self._slice

    @property
    def _half_a_slice(self) -> Amount:
        return Amount(self._slice.tokens // 2, self._slice.money / 2)

    # ------------------------------------------------------------ beside the calls
    def _renew(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renewed())

    async def _renewed(self) -> None:
        async with self._one:
            await self._tell(self._ask())

    async def start(self) -> None:
        self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self._tell(self.report())

    async def report(self) -> None:
        """Say what was spent, give back what rest does not need, and end the days that are over."""
        async with self._one:
            share = self._share
            if share is not None and (share.spent != share.told or not self._slice_of_now().covers(share.left)):
                await self._tell(self._ask())
            self._calls = [(0, NOTHING), self._calls[0]]
            for over in list(self._ending):
                await self._tell(self._exchange(over, over.used, over.used))
                if not over.calls and over.spent == over.told:
                    self._ending.remove(over)

    async def _tell(self, asking: Any) -> None:
        """A book that is away is told once, and asked again. What else goes wrong too: nobody else would ask again."""
        try:
            await asking
        except Exception as error:
            if not self._trouble:
                is_a_bug = not isinstance(error, BookError)
                log.warning("%s Live answers go on until what was set aside is used up.", error, exc_info=is_a_bug)
            self._trouble = str(error) or type(error).__name__

    async def aclose(self) -> None:
        """Give back what was not spent."""
        for task in (self._reporting, self._renewing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        async with self._one:
            for share in (*self._ending, *([self._share] if self._share else [])):
                await self._tell(self._exchange(share, share.used, share.used))
        await self._lender.aclose()

    # ------------------------------------------------------------ what it says
    @property
    def in_hand(self) -> Amount:
        """Of the slice, what is free."""
        return self._share.left if self._share and self._clock() < self._share.until else Amount()

    def gauges(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        hand, left = self.in_hand, {"tokens": self.room.tokens, "money": self.room.money}
        known = {unit: float(value) for unit, value in left.items() if value is not None}
        return {
            "cowest_budget_in_hand": {(("unit", unit),): float(getattr(hand, unit)) for unit in known},
            "cowest_budget_left_today": {(("unit", unit),): value for unit, value in known.items()},
            "cowest_budget_refused_calls": {(): float(self.refused)},
            "cowest_budget_trouble": {(): float(bool(self._trouble))},
        }

    def word(self) -> dict[str, Any]:
        """For those who ask."""
        share = self._share
        is_over = share is not None and self._clock() >= share.until
        return {
            "day": share.day if share else None,
            "left_tokens": self.room.tokens,
            "left_money": self.room.money,
            "refused": self.refused,
            "refuses": None if is_over else self._refuses or None,
            "trouble": self._trouble or None,
        }


def _unknown(why: object) -> BudgetUnknown:
    message = f"The day's budget of the strong model cannot be looked up, and what was set aside is used up. {why}"
    return BudgetUnknown(message, retry_after=5)


def allowance_of(strong: Strong, book: str | None) -> Allowance | None:
    """None where no limit of a day is declared: nothing is counted then. Raises `SettingsError`."""
    if not strong.limits_live_answers:
        return None
    PaidCalls.check_budget(strong.budget, strong.prices)
    if book is None:
        raise SettingsError("spec.strong.budget limits a day: wanted --book, where what is spent is written, saw none")
    return Allowance(lender_of(book, strong), strong.prices)
