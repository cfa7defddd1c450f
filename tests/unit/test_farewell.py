"""The farewell of a job that is to be erased. No cluster."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from cowest_operator import farewell
from cowest_operator.apply import Applier
from cowest_operator.keeper import Keeper
from cowest_operator.kube import Kube, KubeError
from cowest_operator.metrics import Metrics
from cowest_operator.objects.common import key_of
from cowest_operator.watched import Watched
from tests.unit.test_look import Desk


class Server:
    """Takes everything, and notes it."""

    def __init__(self) -> None:
        self.applied: list[dict[str, Any]] = []
        self.made: dict[tuple[str, str], dict[str, Any]] = {}
        self.deleted: list[tuple[str, str]] = []

    async def apply(self, child: dict[str, Any], manager: str = "") -> dict[str, Any]:
        self.applied.append(child)
        return self._taken(child)

    async def create(self, child: dict[str, Any]) -> bool:
        self.made[key_of(child)] = self._taken(child)
        return True

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.made.get((kind, name))

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        self.deleted.append((kind, name))

    def _taken(self, child: dict[str, Any]) -> dict[str, Any]:
        return {**child, "metadata": {**child["metadata"], "uid": "x", "resourceVersion": "9"}}

    @property
    def has_let_go(self) -> bool:
        return any(c["kind"] == "CollaborationJob" and "finalizers" not in c["metadata"] for c in self.applied)


def leaving(seconds: float = 5.0, **edits: Any) -> Desk:
    """A job that was deleted so many seconds ago."""
    desk = Desk(**{"deletionPolicy": {"models": "Delete", "traces": "Delete"}, **edits})
    assert desk.family.job is not None
    deleted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    desk.family.job["metadata"] |= {"deletionTimestamp": deleted, "finalizers": [farewell.FINALIZER]}
    return desk


def looked(desk: Desk) -> Server:
    server = Server()
    keeper = Keeper(Watched(), desk.observer(), Applier(cast(Kube, server)), Metrics())
    asyncio.run(keeper._goodbye(desk.family, desk.memory))
    return server


def test_the_erasing_begins_though_no_door_of_the_job_answers() -> None:
    desk = leaving()
    desk.has("Deployment", "gateway", status={"availableReplicas": 1})
    server = looked(desk)
    assert server.deleted == [("Deployment", "claims-gateway")] and set(server.made) == {("Workflow", "claims-erase")}
    assert desk.doors.asked == [], "pods that may be gone are not asked"


def test_after_the_limit_a_job_goes_whatever_its_manifest_says() -> None:
    words = {"collaboration.promptsConfigMapRef": {"name": "words"}}
    desk = leaving(farewell.LIMIT + 5, **words)

    async def refused(*_: str) -> None:
        raise KubeError(403, "no right to read ConfigMaps")

    desk.maps.get = refused  # type: ignore[method-assign, assignment]
    assert looked(desk).has_let_go
