"""As many open files as this process may have: each connection is one, and many systems begin with 1,024 of them."""

from __future__ import annotations

import resource
from contextlib import suppress

MOST = 65_536
OWN = 200  # that are no connection of a call: code, logs, the spool


def allow_many_connections() -> None:
    """The soft limit up to the hard one, which is the administrator's. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connections_within(most: int) -> int:
    """How many clients may be connected: at most so many, and each call has two more connections, to its models."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST if soft == resource.RLIM_INFINITY else soft
    return max(1, min(most, (files - OWN) // 3))
