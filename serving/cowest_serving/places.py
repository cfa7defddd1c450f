"""How many calls may be under way at an endpoint: at most what the manifest says, fewer while it answers 429.

Multiplicative decrease as TCP does it: each 429 halves the number, once for all the calls that met the same limit.
Those of them that were not refused say how many are taken: so far each answer gives a place back at once. The next one
is tried for only in `PROBE` rounds of answers, and each time in vain in twice as many, for it costs a refused call and
the pause that the endpoint asks for; beyond that a whole round of answers gives one back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

PROBE, LONGEST_PROBE = 8, 256


class Places:
    """A semaphore whose number is learned. First come, first served.

    Who waits for a place as long as may be is sent away with what `crowded` makes of the seconds.
    """

    def __init__(self, most: int, crowded: Callable[[float], Exception] = TimeoutError) -> None:
        self.most, self._crowded = most, crowded
        self.limit = float(most)
        self.taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._attempts = self._lowered_at = 0  # attempts that began before the last decrease met the old limit
        self._held = 0  # of the calls under way at the last decrease, those that were not refused
        self._probe = PROBE

    async def enter(self, until: float | None = None) -> None:
        """`until`: when the call has to be over, by the monotonic clock. It waits for a place for half of that time at
        most, for one that came with no time left would be paid in vain. None: without an end."""
        if self._waiting or self.taken >= self._whole:
            patience = None if until is None else max(0.0, (until - time.monotonic()) / 2)
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout(patience):
                    await self._wait(turn)
            except TimeoutError:
                raise self._crowded(patience or 0.0) from None
        else:
            self.taken += 1

    async def _wait(self, turn: asyncio.Future[None]) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a place while it was cancelled
                self.leave()
            elif turn in self._waiting:  # else one who left at that moment has struck it out
                self._waiting.remove(turn)
            raise

    @property
    def are_at_ease(self) -> bool:
        """One is free, and no refusal has lowered their number or not yet been made up for."""
        return self.limit >= self.most and not self._waiting and self.taken < self.most

    def attempt(self) -> int:
        """The number of an attempt that begins now."""
        self._attempts += 1
        return self._attempts

    def refused(self, attempt: int) -> None:
        """The endpoint has said to this attempt that there are too many."""
        if attempt > self._lowered_at:
            was_in_vain = int(self.limit) == self._held + 1
            self._probe = min(LONGEST_PROBE, 2 * self._probe) if was_in_vain else PROBE
            self._held = self.taken
            self.limit = max(1.0, min(self.limit, self.taken) / 2)
            self._lowered_at = self._attempts
        self._held -= 1

    def answered(self) -> None:
        if self.limit < self.most and self.taken >= self._whole:
            self.limit = min(float(self.most), self.limit + self._step)
            self._admit()

    @property
    def _step(self) -> float:
        """What one answer gives back."""
        if self.limit + 1 <= self._held:
            return 1.0
        return 1 / self.limit / (self._probe if self.limit <= self._held + 1 else 1)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def _whole(self) -> int:
        return int(self.limit)

    def leave(self) -> None:
        self.taken -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.taken < self._whole:
            turn = self._waiting.popleft()
            if not turn.done():
                self.taken += 1
                turn.set_result(None)
