"""The manifest in its file, followed while `cowest run` runs: read beside the engine's loop when the file changes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from cowest_cli.beside import beside

EVERY = 1.0  # seconds between looks at the file

T = TypeVar("T")
Clock = Callable[[], float]


class Following(Generic[T]):
    """`read` makes something of the file and raises an exception whose text says what is wrong with it."""

    def __init__(self, file: Path, read: Callable[[], T], clock: Clock = time.monotonic) -> None:
        self.problem = ""  # of the last edit, while it stands there
        self._file, self._read, self._clock = file, read, clock
        self._stamp, self._digest = _stamp(file), _digest(file)
        self._looked = 0.0
        self._flight: Future[T] | None = None

    def look(self) -> T | None:
        """What an edit since the last look made of it; None when there was none, or not a good one. Never waits."""
        if self._flight is not None:
            return self._landed(self._flight) if self._flight.done() else None
        if self._clock() - self._looked < EVERY:
            return None
        self._looked, stamp = self._clock(), _stamp(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            if (digest := _digest(self._file)) != self._digest:
                self._digest = digest
                self._flight = beside(self._read, "manifest")
        return None

    def _landed(self, flight: Future[T]) -> T | None:
        self._flight = None
        error = flight.exception()
        self.problem = "" if error is None else str(error) or type(error).__name__
        return flight.result() if error is None else None


def _stamp(file: Path) -> tuple[int, ...]:
    """Changes with every write, and with a rename over the file as editors do it; () while there is none."""
    try:
        seen = file.stat()
    except OSError:
        return ()
    return seen.st_mtime_ns, seen.st_size, seen.st_ino


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
