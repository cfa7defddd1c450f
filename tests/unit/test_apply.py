"""What is written, over an API server in memory. No cluster."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, cast

import pytest

from cowest_operator import reconcile
from cowest_operator.apply import Applier
from cowest_operator.kube import Kube
from cowest_operator.watched import see
from tests import world as w
from tests.kube_in_memory import KubeInMemory
from tests.unit.test_look import Desk


def server_of(desk: Desk) -> KubeInMemory:
    """With the job, and with what its family has."""
    assert desk.family.job is not None
    return KubeInMemory(desk.family.job)


def applied(desk: Desk, server: KubeInMemory) -> None:
    """A look, and what it asks for; then the watch shows the job as it is."""
    seen = desk.look()
    plan = reconcile.plan(seen.world)
    asyncio.run(Applier(cast(Kube, server)).apply(seen, plan, desk.family, desk.memory))
    desk.family.job = server.objects["CollaborationJob", "desks", "claims"]


def routing(server: KubeInMemory) -> Any:
    return json.loads(server.objects["ConfigMap", "desks", "claims-routing"]["data"]["routing.json"])


# ---------------------------------------------------------------- the routing
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("stable: 100", id="no JSON"),
        pytest.param("[1, 2]", id="a list"),
        pytest.param("{}", id="no version"),
        pytest.param('{"version": "seven"}', id="a version that is no number"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_routing_that_a_hand_made_into_none_is_put_back_and_newer_than_any(text: str) -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    metadata = {"name": "claims-routing", "namespace": "desks"}
    edited = server.keep({"kind": "ConfigMap", "metadata": metadata, "data": {"routing.json": text}})
    desk.family.children["ConfigMap", "claims-routing"] = see("ConfigMap", edited)
    applied(desk, server)
    assert [arm["name"] for arm in routing(server)["arms"]] == ["stable"]
    assert routing(server)["version"] > time.time() - 60, "it counted from 1, so the clock is ahead of it"
