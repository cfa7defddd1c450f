"""Ids of requests, calls and feedback."""

from __future__ import annotations

import hashlib
import itertools
import os

_SECRET, _NUMBERS = os.urandom(32), itertools.count()


def new_id() -> str:
    """As hard to guess, and as unlikely to come twice, as a random one; but the kernel is not asked for each."""
    return hashlib.blake2b(next(_NUMBERS).to_bytes(8, "big"), key=_SECRET, digest_size=16).hexdigest()
