"""Ports for servers that a test starts a moment later.

The kernel gives these to nobody who does not name them: it takes those of `bind(0)` and of connections from 32768 on
(net.ipv4.ip_local_port_range). Each worker of pytest-xdist has a range of its own, and goes through it from a random
place, since another run may be under way.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

FIRST, END, WORKERS = 10_000, 32_768, 16
_SIZE = (END - FIRST) // WORKERS
_RANGE = FIRST + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS * _SIZE
_next = itertools.count(random.SystemRandom().randrange(_SIZE))


def free_port() -> int:
    """One that nobody listens on, and that this process is given only once."""
    for _ in range(_SIZE):
        port = _RANGE + next(_next) % _SIZE
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise OSError(f"wanted a free port from {_RANGE} to {_RANGE + _SIZE - 1}, saw none")
