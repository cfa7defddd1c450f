"""What each client has used of its limits, in memory that all workers of a gateway share: the limits hold for them all.

A table with a slot for each key that asked lately: its buckets, and how many of its requests are under way at each
worker, so that those of one that was killed can be forgotten. Keys stand in it as digests. One lock is held around
each look, for microseconds; the kernel frees it where its holder is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from functools import lru_cache

from cowest_serving.client_limits import Client, ClientLimits

SLOTS = 4096
NEAR = 16  # slots in which a key may be; only with all of them in use at once would it share one with another key
_WHO = struct.Struct("=16s")  # a slot begins with it
_BUCKETS = struct.Struct("=4d")  # content and time: of requests, of tokens
_HEAD = _WHO.size + _BUCKETS.size
_NOBODY = bytes(_WHO.size)


def shared_memory(workers: int) -> int:
    """An open file in memory for the table of so many workers, which inherit it. It begins as zeros."""
    handle = os.memfd_create("cowest-client-counts")
    os.ftruncate(handle, SLOTS * (_HEAD + 4 * workers))
    return handle


class SharedCounts:
    """`handle`: what `shared_memory` gave. Times are of a clock that all workers have, such as `time.monotonic`."""

    def __init__(self, handle: int, limits: ClientLimits, worker: int, workers: int) -> None:
        self._handle, self._limits, self._worker = handle, limits, worker
        self._under_way = struct.Struct(f"={workers}I")
        self._size = _HEAD + self._under_way.size
        self._table = mmap.mmap(handle, SLOTS * self._size)
        self._forget_the_one_before()

    def borrow(self, key: str, slot: int | None, now: float) -> Client:
        fcntl.lockf(self._handle, fcntl.LOCK_EX)
        try:
            return self._client(self._slot_of(_digest(key), now) if slot is None else slot)
        except BaseException:
            fcntl.lockf(self._handle, fcntl.LOCK_UN)
            raise

    def give_back(self, client: Client) -> None:
        try:
            self._write(client)
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN)

    def keep(self, keys: Sequence[str]) -> None:
        """One that asks no more gives way to others by itself."""

    def _slot_of(self, who: bytes, now: float) -> int:
        """Where it is; else the nearest slot of nobody, or of a client at rest, made its own."""
        first = int.from_bytes(who[:4], "little")
        near = [(first + step) % SLOTS for step in range(NEAR)]
        for slot in near:
            if (found := self._who(slot)) == who:
                return slot
            if found == _NOBODY:
                break  # no slot is emptied again: it is not behind one that is empty
        for slot in near:
            if self._who(slot) == _NOBODY or self._client(slot).is_at_rest(now):
                _WHO.pack_into(self._table, slot * self._size, who)
                self._write(Client(self._limits, now, slot))
                return slot
        return first % SLOTS

    def _who(self, slot: int) -> bytes:
        at = slot * self._size
        return self._table[at : at + _WHO.size]

    def _client(self, slot: int) -> Client:
        at = slot * self._size + _WHO.size
        client = Client(self._limits, 0.0, slot)
        figures = _BUCKETS.unpack_from(self._table, at)
        for bucket, content, then in ((client.requests, *figures[:2]), (client.tokens, *figures[2:])):
            if bucket is not None:
                bucket.content, bucket.at = content, then
        under_way = self._under_way.unpack_from(self._table, at + _BUCKETS.size)
        client.under_way = under_way[self._worker]
        client.elsewhere = sum(under_way) - client.under_way
        return client

    def _write(self, client: Client) -> None:
        assert client.slot is not None, "only what was borrowed here is given back"
        at = client.slot * self._size + _WHO.size
        figures = [(each.content, each.at) if each else (0.0, 0.0) for each in (client.requests, client.tokens)]
        _BUCKETS.pack_into(self._table, at, *figures[0], *figures[1])
        self._write_own(client.slot, client.under_way)

    def _write_own(self, slot: int, under_way: int) -> None:
        struct.pack_into("=I", self._table, slot * self._size + _HEAD + 4 * self._worker, max(0, under_way))

    def _forget_the_one_before(self) -> None:
        """What the process in this worker's place had under way ended with it."""
        fcntl.lockf(self._handle, fcntl.LOCK_EX)
        try:
            for slot in range(SLOTS):
                self._write_own(slot, 0)
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN)


@lru_cache(4096)
def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_WHO.size).digest()
