"""Says when something in a folder has changed: a file that is followed is read at once, and nobody has to look for it.

Used by `routing`. Python has no inotify of its own, so it is asked of libc.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CLOSE_WRITE, _MOVED_TO = 0x8, 0x80  # <sys/inotify.h>; a creation is none: the file is still empty then
Wait = Callable[[float], Awaitable[None]]


@contextmanager
def changes_in(folder: Path) -> Iterator[Wait]:
    """Gives a wait for the next change, for at most so many seconds; where changes are not told, one for the time."""
    handle = _notified(folder)
    if handle is None:
        yield asyncio.sleep
        return
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def take() -> None:
        with suppress(BlockingIOError):
            os.read(handle, 65536)
        changed.set()

    async def wait(seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()
        changed.clear()

    loop.add_reader(handle, take)
    try:
        yield wait
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _notified(folder: Path) -> int | None:
    """A handle that is readable after a change. `None`: no such kernel, no such folder, or too many of them."""
    try:
        libc = ctypes.CDLL(None)
        handle = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if handle < 0:
            return None
        if libc.inotify_add_watch(handle, os.fsencode(folder), _CLOSE_WRITE | _MOVED_TO) < 0:
            os.close(handle)
            return None
    except (OSError, AttributeError):
        return None
    return handle
