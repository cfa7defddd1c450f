"""A log on the gateway's disk: a record is called durable when it is synced, and stays until its file is shipped.

    <folder>/<writer>/lock         held (flock) by the process that writes here, or that ships what a dead one left
    <folder>/<writer>/<number>.log frames: length, CRC-32, time in microseconds, payload

One thread commits in groups: all that queued up during one fdatasync share the next. A second thread ships closed
files, in order. Knows nothing of rows or of the object store: `traces` gives payloads and a function that ships.
See docs/decisions/0007-durable-traces.md.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from cowest_serving.store import sync

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds that an answer waits for its record
PROBE_EVERY = 1.0  # seconds between tries while the disk is in trouble
RATE_OVER = 0.25  # seconds over which the rate of records is measured
ADOPT_EVERY = 30.0  # seconds between looks for what processes left that died meanwhile
MAX_REMEMBERED = 2  # closed files whose records stay in memory too, so that they need not be read again
MAX_BACKOFF = 5.0  # seconds between tries while the store is away
MAX_QUEUED = 64 * 1024 * 1024  # bytes in memory on their way to the disk
STEP = 1024 * 1024  # bytes by which a file grows before they are written
PROBE = b"N"  # the payload of a frame that is nobody's record

_HEAD = struct.Struct("<IIq")
_TIME = struct.Struct("<q")


# ---------------------------------------------------------------- frames (pure)
@dataclass(frozen=True)
class Frames:
    """What a file of the log holds. The same file gives the same frames, whoever reads it and whenever."""

    payloads: tuple[bytes, ...]
    last_us: int  # the latest time of a frame
    torn_bytes: int  # behind the last whole frame: a write that was cut off, never called durable


def frame(payload: bytes, time_us: int) -> bytes:
    return head(payload, time_us) + payload


def head(payload: bytes, time_us: int) -> bytes:
    return _HEAD.pack(len(payload), _checksum(payload, time_us), time_us)


def read_frames(data: bytes) -> Frames:
    payloads, last_us, at = [], 0, 0
    while at + _HEAD.size <= len(data):
        length, checksum, time_us = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + length]
        # Zeros are what a file system may leave after a power cut, so a frame without a payload is none.
        if not length or len(payload) < length or checksum != _checksum(payload, time_us):
            break
        payloads.append(payload)
        last_us = max(last_us, time_us)
        at += _HEAD.size + length
    return Frames(tuple(payloads), last_us, len(data) - at)


def _checksum(payload: bytes, time_us: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_TIME.pack(time_us)))


@dataclass(frozen=True)
class Groups:
    """How long a record waits for others to share its commit: under load commits cost more CPU than their rows."""

    rows: int = 10  # that one commit should have
    longest: float = 0.02  # seconds between commits
    worth: int = 4  # rows that must be expected in that time
    others: int = 5  # answers under way that must be left to wait for

    def gap(self, rate: float) -> float:
        """Seconds from one commit to the next while so many rows a second come."""
        return min(self.longest, self.rows / rate) if rate * self.longest >= self.worth else 0.0


@dataclass(frozen=True)
class Pace:
    """When a file is closed, so that it can be shipped: soon while little comes, full while much does."""

    max_bytes: int = 8 * 1024 * 1024
    max_rows: int = 2000
    soon: float = 2.0  # seconds, for whoever watches live answers; each file costs a segment, a put and some syncs
    late: float = 5.0
    busy_rate: int = 100  # rows a second: above it, a put for every `soon` would be too many
    groups: Groups = Groups()

    def is_due(self, size: int, rows: int, age: float, idle: float, waiting: int = 0) -> bool:
        """`waiting`: files before it that are not shipped. The slower the store takes them, the fewer they must be."""
        if size >= self.max_bytes or rows >= self.max_rows or age >= self.late * max(1, waiting):
            return True
        if waiting > 1:
            return False
        return age >= self.soon and (rows <= self.busy_rate * age or idle >= self.soon / 2)


# ---------------------------------------------------------------- files
class File(Protocol):
    """One file of the log: the seam at which a test sees the order of things, or lets a disk fail."""

    def write(self, data: bytes) -> None: ...
    def sync(self) -> None: ...
    def cut(self, size: int) -> None: ...
    def close(self) -> None: ...


class LogFile:
    """A new file; its name is on the disk before its first byte.

    It grows in steps: to sync bytes alone takes half the time of bytes and a new length. Behind its end lie zeros
    until it is closed.
    """

    def __init__(self, path: Path) -> None:
        self._end = self._room = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            sync(path.parent)
        except OSError:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        if self._end + len(data) > self._room:
            self._make_room(len(data))
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._handle, rest, self._end)
            self._end += done
            rest = rest[done:]

    def _make_room(self, size: int) -> None:
        step = max(STEP, size)
        with suppress(OSError):  # a disk that has no room for so much may have enough for the bytes
            os.posix_fallocate(self._handle, self._end, step)
            self._room = self._end + step

    def sync(self) -> None:
        os.fdatasync(self._handle)

    def cut(self, size: int) -> None:
        """Take back what was written behind `size`."""
        os.ftruncate(self._handle, size)
        os.fsync(self._handle)
        self._end = self._room = size

    def close(self) -> None:
        try:
            if self._room > self._end:
                os.ftruncate(self._handle, self._end)
        finally:
            os.close(self._handle)


class Home:
    """The folder of one writer, held by its lock. Closing gives it free, empty it is removed."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock

    @staticmethod
    def create(root: Path, writer: str) -> Home:
        """It shows under its name only when it is locked: nobody takes it for a dead process's."""
        fresh = root / f".{writer}.new"
        fresh.mkdir(parents=True, exist_ok=True)
        lock = os.open(fresh / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh.rename(root / writer)
            sync(root)
        except OSError:
            os.close(lock)
            raise
        return Home(root / writer, lock)

    @staticmethod
    def take(path: Path) -> Home | None:
        """The folder of a process that is dead; `None` while somebody holds it."""
        try:
            lock = os.open(path / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        except FileNotFoundError:  # removed by who took it before
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return Home(path, lock)

    def logs(self) -> list[Path]:
        return _logs(self.path)

    def close(self) -> None:
        with suppress(OSError):
            if not self.logs():
                (self.path / "lock").unlink(missing_ok=True)
                self.path.rmdir()
        os.close(self._lock)


def left_in(root: Path) -> list[Path]:
    """Folders of writers, dead or alive; whatever else lies there is nobody's to take."""
    with suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if not path.name.startswith(".") and (path / "lock").exists())
    return []


def _logs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.log") if path.stem.isdigit())


# ---------------------------------------------------------------- the log
Ship = Callable[[str, int, Frames], None]
Lost = Callable[[list[bytes]], None]


class _Entry(NamedTuple):
    head: bytes  # made at once, while the payload is in the processor's cache
    payload: bytes
    time_us: int
    synced: asyncio.Future[bool] | None

    @staticmethod
    def of(payload: bytes, synced: asyncio.Future[bool] | None) -> _Entry:
        now = time.time_ns() // 1000
        return _Entry(head(payload, now), payload, now, synced)

    @property
    def size(self) -> int:
        return _HEAD.size + len(self.payload)


@dataclass
class _Active:
    """The file that is written now."""

    file: File
    path: Path
    opened: float
    appended: float
    size: int = 0  # bytes that are synced
    rows: int = 0
    entries: list[_Entry] = field(default_factory=list)  # that are synced


class Spool:
    """Appends payloads from one event loop, commits and ships them in two threads of its own.

    `ship(writer, number, frames)` is called for each closed file, in order, until it does not raise: it may be called
    again for the same file after a crash. `lost(payloads)` is called on the loop with what is certainly not in the log.
    """

    def __init__(
        self,
        folder: Path,
        writer: str,
        ship: Ship,
        lost: Lost,
        *,
        limit_bytes: int | None = None,
        pace: Pace | None = None,
        patience: float = PATIENCE,
        open_file: Callable[[Path], File] = LogFile,
    ) -> None:
        self._root, self._writer, self._limit, self._patience = folder, writer, limit_bytes, patience
        self._lost, self._pace, self._open_file = lost, pace or Pace(), open_file
        self._shipper = _Shipper(folder, writer, ship)
        self._queue: SimpleQueue[list[_Entry] | None] = SimpleQueue()
        self._waiting: list[_Entry] = []  # for the next commit
        self._is_committing = False
        self._others = 0  # answers under way whose records are not on their way to the disk
        self._next: asyncio.Handle | None = None  # commit, now or at its time
        self._is_next_now = False
        self._begun = float("-inf")  # when the last commit was handed over
        self._rate = self._gap = 0.0  # rows a second; seconds between commits at that rate
        self._unsure: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._queued_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_stalled = False
        self._refused = 0  # bytes of the last record, where there was no room for it
        self._home: Home | None = None
        self._active: _Active | None = None
        self._number = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.trouble = ""  # why the disk does not take records now
        self.acknowledged = self.unacknowledged = self.unsure_lost = 0

    # ------------------------------------------------------------ on the event loop
    async def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._keep_committing, name="cowest-spool", daemon=True)
            self._thread.start()
            self._shipper.start()

    async def aclose(self) -> None:
        """Commit what waits and try once to ship it. What the store does not take stays for the next process."""
        if self._thread is None:
            return
        if self._next is not None:
            self._next.cancel()
        self._queue.put(self._waiting)
        self._waiting = []
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, 30)
        await self._shipper.aclose()
        if self._home is not None and not self._thread.is_alive():
            if left := len(self._home.logs()):
                log.warning("%d files of records stay in %s: the store did not take them.", left, self._home.path)
            self._home.close()
        self._thread = None

    def append(self, payload: bytes, others: int = 0) -> asyncio.Future[bool] | None:
        """True: synced. False: not known to be, in time. None: there is no room for it.

        `others`: answers under way, this one not counted. Where few are left to wait for, the commit begins at once.
        """
        assert self._loop is not None, "start() comes first"
        entry = _Entry.of(payload, self._loop.create_future())
        if not self._has_room(entry.size):
            self.unacknowledged += 1
            return None
        self._queued_bytes += entry.size
        self._waiting.append(entry)
        self._others = others + 1 - len(self._waiting)
        self._plan()
        assert entry.synced is not None
        if self._is_stalled:
            self._resolve(entry.synced, False)  # one answer has waited for nothing: not all of them should
        else:
            self._unsure.append((self._loop.time(), entry.synced))
            if self._timer is None:
                self._timer = self._loop.call_later(self._patience, self._give_up)
        return entry.synced

    def _plan(self) -> None:
        """Hand over what waits: now, or when the time between two commits is up."""
        if self._is_committing or self._is_next_now:
            return
        assert self._loop is not None
        rest = self._begun + self._gap - self._loop.time() if self._others >= self._pace.groups.others else 0.0
        if rest > 0:
            self._next = self._next or self._loop.call_later(rest, self._hand_over)
            return
        if self._next is not None:
            self._next.cancel()
        self._next, self._is_next_now = self._loop.call_soon(self._hand_over), True

    def _hand_over(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        if (since := now - self._begun) < RATE_OVER:
            self._rate += len(self._waiting) / RATE_OVER - self._rate * since / RATE_OVER
        else:
            self._rate = len(self._waiting) / since
        self._begun, self._gap = now, self._pace.groups.gap(self._rate)
        self._next, self._is_next_now, self._is_committing = None, False, True
        self._queue.put(self._waiting)
        self._waiting = []

    @property
    def is_full(self) -> bool:
        """The next record could not be made durable."""
        return bool(self.trouble) or self._lacks_room(self._refused)

    @property
    def bytes(self) -> int:
        return self._shipper.bytes + self._queued_bytes

    @property
    def rows(self) -> int:
        """Not shipped yet, of this process."""
        return len(self._waiting) + self._shipper.rows

    @property
    def failed_ships(self) -> int:
        return self._shipper.failures

    def _lacks_room(self, size: int) -> bool:
        is_over = self._limit is not None and self.bytes + size > self._limit
        return is_over or self._queued_bytes + size > MAX_QUEUED

    def _has_room(self, size: int) -> bool:
        if not self._lacks_room(size):
            self._refused = 0
            return True
        if not self._refused:
            log.warning("The spool %s is full (%d bytes): records are not durable now.", self._root, self.bytes)
        most = MAX_QUEUED if self._limit is None else min(MAX_QUEUED, self._limit)
        self._refused = min(size, most)  # one that never fits does not keep an empty spool full
        return False

    def _give_up(self) -> None:
        """Answers have waited long enough; their records may still be written."""
        assert self._loop is not None
        now, self._timer = self._loop.time(), None
        while self._unsure and (self._unsure[0][1].done() or now - self._unsure[0][0] >= self._patience):
            future = self._unsure.popleft()[1]
            if not future.done():
                self._is_stalled = True
                self._resolve(future, False)
        if self._unsure:
            self._timer = self._loop.call_at(self._unsure[0][0] + self._patience, self._give_up)

    def _settle(self, group: list[_Entry], is_synced: bool, is_lost: bool) -> None:
        if group[0].synced is not None:  # no probe
            self._is_committing = False
            self._others = max(0, self._others - len(group))
            if self._waiting:
                self._plan()
        for entry in group:
            if entry.synced is not None:
                self._queued_bytes -= entry.size
                self._resolve(entry.synced, is_synced)
        self._is_stalled = self._is_stalled and not is_synced
        if payloads := [entry.payload for entry in group if entry.synced is not None and not is_synced]:
            if is_lost:
                self._lost(payloads)
            else:
                self.unsure_lost += len(payloads)

    def _resolve(self, future: asyncio.Future[bool], is_synced: bool) -> None:
        if future.done():  # the client left, or its answer did not wait any longer
            return
        future.set_result(is_synced)
        if is_synced:
            self.acknowledged += 1
        else:
            self.unacknowledged += 1

    # ------------------------------------------------------------ in the committing thread
    def _keep_committing(self) -> None:
        ended = False
        while not ended:
            group, ended = self._next_group()
            if group:
                self._commit(group)
            active, now = self._active, time.monotonic()
            if active and (ended or self._is_due(active, now)):
                self._close_active()

    def _is_due(self, active: _Active, now: float) -> bool:
        age, idle = now - active.opened, now - active.appended
        return self._pace.is_due(active.size, active.rows, age, idle, self._shipper.waiting)

    def _next_group(self) -> tuple[list[_Entry], bool]:
        """What was handed over, and whether nothing comes after it."""
        patience = PROBE_EVERY if self.trouble else self._pace.soon / 5 if self._active else None
        try:
            group = self._queue.get(timeout=patience)
        except Empty:
            return [_Entry.of(PROBE, None)] if self.trouble else [], False
        return group or [], group is None

    def _commit(self, group: list[_Entry]) -> None:
        data = b"".join([part for entry in group for part in (entry.head, entry.payload)])
        try:
            active = self._active = self._active or self._open()
            active.file.write(data)
            active.file.sync()
        except Exception as error:  # whatever it is, it must not reach an answer
            self._fail(group, error)
            return
        rows = sum(entry.synced is not None for entry in group)
        active.size += len(data)
        active.rows += rows
        active.entries += group
        active.appended = time.monotonic()
        self._shipper.grow(len(data), rows)
        if self.trouble:
            log.warning("Records are durable in %s again.", self._root)
            self.trouble = ""
        self._tell(group, is_synced=True, is_lost=False)

    def _open(self) -> _Active:
        self._home = self._home or Home.create(self._root, self._writer)
        path = self._home.path / f"{self._number:010d}.log"
        self._number += 1  # whatever comes of it: a number never names two contents
        now = time.monotonic()
        return _Active(self._open_file(path), path, now, now)

    def _fail(self, group: list[_Entry], error: Exception) -> None:
        """Take back what may be half written. A sync that failed once may lie the next time: the file is closed."""
        if not self.trouble:
            log.warning("Records cannot be made durable in %s (%s).", self._root, error)
        self.trouble = str(error) or type(error).__name__
        is_lost = True
        if self._active is not None:
            try:
                self._active.file.cut(self._active.size)
            except Exception:
                is_lost = False  # it may be in the file, and then it will be shipped: not in memory too
            self._close_active(is_sure=is_lost)
        self._tell(group, is_synced=False, is_lost=is_lost)

    def _close_active(self, is_sure: bool = True) -> None:
        assert self._active is not None
        active, self._active = self._active, None
        with suppress(Exception):
            active.file.close()
        if active.size or not is_sure:
            self._shipper.add(_Closed(active.path, active.size, active.rows, _frames(active) if is_sure else None))
        else:
            with suppress(OSError):
                active.path.unlink()

    def _tell(self, group: list[_Entry], *, is_synced: bool, is_lost: bool) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, group, is_synced, is_lost)


def _frames(active: _Active) -> Frames:
    """As they would be read from its file."""
    return Frames(tuple(each.payload for each in active.entries), max(each.time_us for each in active.entries), 0)


# ---------------------------------------------------------------- shipping
@dataclass
class _Closed:
    path: Path
    size: int
    rows: int
    frames: Frames | None  # None: to be read


class _Shipper:
    """Ships closed files, oldest first, then what dead processes left; a file is deleted after it is shipped.

    What cannot be shipped holds up its own writer's files alone.
    """

    def __init__(self, root: Path, writer: str, ship: Ship) -> None:
        self._root, self._writer, self._ship = root, writer, ship
        self._closed: deque[_Closed] = deque()
        self._adopted: list[Home] = []
        self._wake = threading.Event()
        self._counting = threading.Lock()
        self._is_stopping = self._is_failing = False
        self._looked = float("-inf")
        self._thread: threading.Thread | None = None
        self.bytes = self.rows = self.failures = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._keep_shipping, name="cowest-ship", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        if self._thread is not None:
            self._is_stopping = True
            self._wake.set()
            await asyncio.to_thread(self._thread.join, 60)

    def grow(self, size: int, rows: int) -> None:
        with self._counting:
            self.bytes += size
            self.rows += rows

    @property
    def waiting(self) -> int:
        """Files, the one that is on its way included."""
        return len(self._closed)

    def add(self, closed: _Closed) -> None:
        if len(self._closed) > MAX_REMEMBERED:
            closed.frames = None  # the store is slow or away: the disk remembers
        self._closed.append(closed)
        self._wake.set()

    def _keep_shipping(self) -> None:
        pause = MAX_BACKOFF / 10
        while True:
            self._wake.clear()
            last = self._is_stopping  # read before the round: what was closed by then is in it
            try:
                self._round()
            except Exception as error:
                self.failures += 1
                if not self._is_failing:
                    log.warning("Records in %s cannot be shipped now (%s); they wait there.", self._root, error)
                self._is_failing = True
                if last:
                    break
                self._pause(pause)
                pause = min(2 * pause, MAX_BACKOFF)
                continue
            if self._is_failing:
                log.warning("Records in %s are shipped again.", self._root)
            self._is_failing, pause = False, MAX_BACKOFF / 10
            if last:
                break
            self._wake.wait(ADOPT_EVERY)
        for home in self._adopted:
            home.close()

    def _pause(self, seconds: float) -> None:
        """Files that are closed meanwhile do not end it."""
        until = time.monotonic() + seconds
        while not self._is_stopping and (rest := until - time.monotonic()) > 0:
            self._wake.wait(rest)
            self._wake.clear()

    def _round(self) -> None:
        self._adopt()
        while self._closed:
            self._ship_closed(self._closed[0])
            self._closed.popleft()
        trouble: Exception | None = None
        for home in tuple(self._adopted):
            try:
                for path in home.logs():
                    self._ship_left(home.path.name, path)
            except Exception as error:
                trouble = error
            else:
                self._adopted.remove(home)
                home.close()
        if trouble is not None:
            raise trouble

    def _adopt(self) -> None:
        if time.monotonic() - self._looked < ADOPT_EVERY:
            return
        self._looked = time.monotonic()
        held = {home.path for home in self._adopted}
        for path in left_in(self._root):
            if path.name != self._writer and path not in held and (home := Home.take(path)):
                self._adopted.append(home)
                self.grow(sum(file.stat().st_size for file in home.logs()), 0)

    def _ship_closed(self, closed: _Closed) -> None:
        frames = closed.frames or _read(closed.path)
        if frames is not None:
            self._ship(self._writer, int(closed.path.stem), frames)
            closed.path.unlink(missing_ok=True)
        self.grow(-closed.size, -closed.rows)

    def _ship_left(self, writer: str, path: Path) -> None:
        size = path.stat().st_size
        frames = _read(path)
        if frames is not None:
            self._ship(writer, int(path.stem), frames)
            path.unlink(missing_ok=True)
        self.grow(-size, 0)


def _read(path: Path) -> Frames | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        log.warning("%s was taken away before it was shipped.", path)
        return None
    frames = read_frames(data)
    if data[len(data) - frames.torn_bytes :].strip(b"\0"):  # zeros are room that was not used
        log.warning("%s: the last %d bytes are no whole record.", path, frames.torn_bytes)
    return frames
