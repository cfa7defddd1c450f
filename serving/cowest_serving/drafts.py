"""Drafts that are at hand already: spec.collaboration.shortcuts.draftCache, in the memory of one gateway process.

A draft is greedy, so the same weak model gives the same one for the same messages and limit: exactly these, and the
prompts, are the key. Equal requests that come while a draft is made wait for that one.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from cowest_serving.contract import DraftCacheLimits, Messages, Pair

Source = Literal["made", "cached", "shared"]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a weak model wrote, and which one by its digest."""

    text: str
    weak_digest: str
    input_tokens: int
    output_tokens: int
    finish_reason: str = "stop"


Make = Callable[[], Coroutine[Any, Any, Draft]]


def draft_key(pair: Pair, asked: Messages, max_tokens: int) -> bytes:
    """Of all that decides a greedy draft; `asked`: the messages as the weak model gets them."""
    whole = [pair.weak_digest, pair.prompts.digest, max_tokens, asked]
    return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).digest()


class DraftCache:
    """The latest drafts by key. What fails is not kept, and is told to all who waited for it."""

    def __init__(self, limits: DraftCacheLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._kept: OrderedDict[bytes, tuple[float, Draft]] = OrderedDict()  # with the time until which it holds
        self._making: dict[bytes, _Making] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: bytes, make: Make) -> tuple[Draft, Source]:
        if (draft := self._fresh(key)) is not None:
            return draft, "cached"
        making = self._making.get(key)
        source: Source = "made" if making is None else "shared"
        if making is None:
            making = self._making[key] = _Making(asyncio.create_task(self._make(key, make)))
        making.wanted_by += 1
        try:
            return await asyncio.shield(making.task), source
        finally:
            making.wanted_by -= 1
            self._give_up(key, making)

    def _fresh(self, key: bytes) -> Draft | None:
        until, draft = self._kept.get(key, (0.0, None))
        if draft is None:
            return None
        if self._clock() >= until:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return draft

    async def _make(self, key: bytes, make: Make) -> Draft:
        draft = await make()
        self._kept[key] = (self._clock() + self._limits.ttl_seconds, draft)
        self._kept.move_to_end(key)
        while len(self._kept) > self._limits.max_entries:
            self._kept.popitem(last=False)
        return draft

    def _give_up(self, key: bytes, making: _Making) -> None:
        """Whoever came first may leave: the draft is made on for the others, and ends with the last of them."""
        if making.task.done() or not making.wanted_by:
            making.task.cancel()
            if self._making.get(key) is making:
                del self._making[key]


@dataclass
class _Making:
    """A draft that is being made, and how many requests wait for it."""

    task: asyncio.Task[Draft]
    wanted_by: int = 0
