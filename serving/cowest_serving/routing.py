"""Which arm answers a request: the routing file that the gateway follows, and the sticky split by weight."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import orjson

from cowest_serving.changes import changes_in
from cowest_serving.contract import Arm, Routing, SettingsError, parse

log = logging.getLogger(__name__)
BUCKETS = 10_000


class RoutingSource(Protocol):
    """Where the gateway finds the routing that holds now; `None` until there is one."""

    @property
    def current(self) -> Routing | None: ...

    @property
    def errors(self) -> int:
        """How often a new routing could not be read."""
        ...

    @property
    def trouble(self) -> str:
        """Why the latest routing could not be taken up, "" when it was."""
        ...

    async def watch(self) -> None:
        """Keep `current` up to date until cancelled."""
        ...


class FileRouting:
    """Follows a JSON file of `dump(Routing)` that is replaced atomically; a bad file changes nothing.

    It is taken up as soon as its folder tells of a change; some file systems do not, so it is looked at now and then.
    """

    def __init__(self, path: Path, *, every_seconds: float = 0.5) -> None:
        self.path, self.every_seconds = path, every_seconds
        self.current: Routing | None = None
        self.errors = 0
        self.trouble = ""
        self._seen: tuple[int, int, int] | None = None
        self._data = b""
        self.load()

    async def watch(self) -> None:
        with changes_in(self.path.parent) as changed:
            self.load()  # what came before the folder was listened to
            while True:
                await changed(self.every_seconds)
                self.load()

    def load(self) -> None:
        """Take up the file if it has changed."""
        try:
            stat = os.stat(self.path)
            # The inode changes with an atomic replacement even when the clock's grain hides the new time.
            mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if mark == self._seen:
                return
            data = self.path.read_bytes()
            if data != self._data:
                self._take(parse_routing(data))
            self._data, self._seen, self.trouble = data, mark, ""
        except FileNotFoundError:
            self._complain("is not there")
        except (OSError, ValueError, TypeError) as error:
            self.errors += self._complain(str(error))

    def _take(self, routing: Routing) -> None:
        weights = ", ".join(f"{arm.name} {arm.weight_percent} % {arm.mode}" for arm in routing.arms)
        log.info("Routing %d: %s", routing.version, weights)
        self.current = routing

    def _complain(self, trouble: str) -> bool:
        """Once for each trouble, not ten times a second."""
        saw = f"{self.path}: {trouble}"
        is_new, self.trouble = saw != self.trouble, saw
        if is_new:
            until = "the last good one goes on" if self.current else "nothing is answered until there is one"
            log.warning("Routing file %s; %s.", saw, until)
        return is_new


def parse_routing(data: bytes) -> Routing:
    """Raises `SettingsError` (or `ValueError` for no JSON)."""
    value = orjson.loads(data)
    if not isinstance(value, dict):
        raise SettingsError(f"routing: wanted an object, saw {type(value).__name__}")
    routing = parse(Routing, value, "routing")
    if not routing.arms:
        raise SettingsError("routing.arms: wanted at least one arm, saw none")
    for i, arm in enumerate(routing.arms):
        if not 0 <= arm.weight_percent <= 100:
            raise SettingsError(f"routing.arms[{i}].weightPercent: wanted 0 to 100, saw {arm.weight_percent}")
        if arm.mode != "StrongAlone" and not arm.weak_endpoint:
            raise SettingsError(f"routing.arms[{i}].weakEndpoint: wanted an address for mode {arm.mode}, saw none")
    return routing


def choose_arm(routing: Routing, sticky_key: str | None, draw: Callable[[int], int] = random.randrange) -> Arm:
    """The arm of this user. The candidate has the low buckets, so a growing weight keeps whom it has."""
    bucket = bucket_of(routing.salt, sticky_key) if sticky_key else draw(BUCKETS)
    limit = 0
    arms = sorted(routing.arms, key=lambda arm: arm.name != "candidate")
    for arm in arms:
        limit += arm.weight_percent * (BUCKETS // 100)
        if bucket < limit:
            return arm
    return arms[-1]


def bucket_of(salt: str, sticky_key: str) -> int:
    return int.from_bytes(hashlib.sha256((salt + sticky_key).encode()).digest(), "big") % BUCKETS
