"""The API keys of one endpoint: which one the next attempt takes, and which ones rest.

    taken  --429-->         rests for its Retry-After while others serve; all rest: the shortest rest is waited for
    taken  --401, 403-->    parked, tried again after 1 min, 2 min, .. 10 min, or when no other is left
    taken  --an answer-->   stays the one in use: endpoints remember prompts by key

A 429 without Retry-After is no promise: its key only stands back behind others for a moment, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FIRST_PARK, LONGEST_PARK = 60.0, 600.0
STAND_BACK = 1.0
LOOK_SECONDS = 60.0  # a limit may be raised before its Retry-After is over: so often a call looks


@dataclass(eq=False)
class Key:
    """An API key and until when it is left alone. "": the endpoint wants none."""

    value: str
    rests_until: float = 0.0  # as the endpoint said
    limited_at: float = 0.0  # when it said so
    parked_until: float = 0.0
    park: float = 0.0  # seconds of the last one; 0: the key was not refused
    back_until: float = 0.0  # by our own guess: others are taken first

    def rest(self, now: float) -> float:
        return 0.0 if now >= self.limited_at + LOOK_SECONDS else max(0.0, self.rests_until - now)

    def is_parked(self, now: float) -> bool:
        return now < self.parked_until

    def is_ready(self, now: float) -> bool:
        return not self.rest(now) and now >= max(self.parked_until, self.back_until)


class KeyPool:
    """For one process. Values of keys are in no message."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self.current = Key("")
        self.renew(keys)

    def renew(self, keys: Sequence[str]) -> None:
        """Other keys are given, as after a rotation; what is known of those that stay is kept."""
        wanted = tuple(dict.fromkeys(key for key in keys if key)) or ("",)
        if wanted == tuple(key.value for key in self._keys):
            return
        known = {key.value: key for key in self._keys}
        self._keys = tuple(known.get(value) or Key(value) for value in wanted)
        if self.current not in self._keys:
            self.current = self._keys[0]

    def __len__(self) -> int:
        return len(self._keys)

    def take(self) -> Key:
        """The one in use as long as it is ready, else the next one that is; without any, the one that will be first."""
        now = self._clock()
        if not self.current.is_ready(now):
            at = self._keys.index(self.current)
            in_turn = (*self._keys[at + 1 :], *self._keys[: at + 1])
            ready = (key for key in in_turn if key.is_ready(now))
            self.current = next(ready, None) or min(in_turn, key=lambda key: (key.parked_until, key.rests_until))
        return self.current

    @property
    def rest(self) -> float:
        """Seconds that a call has to wait, whichever key it takes, since the endpoint says so; 0 as a rule."""
        now = self._clock()
        return min((key.rest(now) for key in self._keys if not key.is_parked(now)), default=0.0)

    @property
    def away(self) -> int:
        """How many keys rest or are parked."""
        now = self._clock()
        return sum(bool(key.rest(now)) or key.is_parked(now) for key in self._keys)

    def limited(self, key: Key, seconds: float | None) -> None:
        """The endpoint says that there are too many calls with this key. `seconds`: its Retry-After."""
        now = self._clock()
        if seconds is None:
            key.back_until = now + STAND_BACK
        else:
            key.rests_until, key.limited_at = max(key.rests_until, now + seconds), now

    def refused(self, key: Key) -> None:
        """The endpoint does not take this key: it is wrong, or has no money left."""
        now = self._clock()
        if not key.is_parked(now):  # else another call was told so already
            key.park = min(LONGEST_PARK, key.park * 2 or FIRST_PARK)
            key.parked_until = now + key.park

    def answered(self, key: Key) -> None:
        key.park = key.parked_until = key.back_until = 0.0
