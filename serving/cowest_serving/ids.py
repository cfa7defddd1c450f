"""Ids of requests, calls and feedback."""

from __future__ import annotations

import hashlib
import itertools
import os

_secret, _numbers = os.urandom(32), itertools.count()


def _renew() -> None:
    """A forked process would go on with its parent's secret and numbers, and so would its siblings."""
    global _secret
    _secret = os.urandom(32)


os.register_at_fork(after_in_child=_renew)


def new_id() -> str:
    """As hard to guess, and as unlikely to come twice, as a random one; but the kernel is not asked for each."""
    return hashlib.blake2b(next(_numbers).to_bytes(8, "big"), key=_secret, digest_size=16).hexdigest()
