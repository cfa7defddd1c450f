"""What is written, over an API server in memory. No cluster."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any, cast

import pytest

from cowest_operator import reconcile
from cowest_operator.apply import Applier, OvertakenError
from cowest_operator.kube import Kube, KubeError
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


# ---------------------------------------------------------------- what is somebody else's
FOREIGN = [("Deployment", "claims-gateway"), ("Service", "claims-proxy"), ("ConfigMap", "claims-routing"),
           ("ConfigMap", "claims-r1"), ("Workflow", "claims-r1-collect"), ("ConfigMap", "claims-r1-collect"),
           ("PersistentVolumeClaim", "claims-proxy")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FOREIGN)
@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({}, id="of nobody"),
        pytest.param({"labels": {"cowest.dev/job": "other"}}, id="with another job's label"),
        pytest.param({"ownerReferences": [{"kind": "Chart", "name": "claims", "uid": "c", "controller": True}],
                      "labels": {"cowest.dev/job": "claims"}}, id="of another controller"),
    ],
)  # fmt: skip
def test_what_is_somebody_elses_is_neither_written_nor_deleted_and_said(
    kind: str, name: str, metadata: dict[str, Any]
) -> None:
    desk = Desk(w.on_trial(number=1))
    server = server_of(desk)
    foreign = server.keep({"kind": kind, "metadata": {"name": name, "namespace": "desks", **metadata}, "spec": 1})
    server.immutable = {"Deployment"}
    for _ in range(3):
        with suppress(KubeError):
            applied(desk, server)
        desk.family.job = server.objects["CollaborationJob", "desks", "claims"]
    assert server.objects[kind, "desks", name] is foreign
    conditions = {each["type"]: each for each in desk.family.job["status"]["conditions"]}
    assert conditions["Degraded"]["reason"] == "NameTaken"
    assert f"{kind} {name} exists and is not this job's" in conditions["Degraded"]["message"]


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({"ownerReferences": [{"kind": "CollaborationJob", "name": "claims", "uid": "of before",
                                           "controller": True}]}, id="of a job of this name that is gone"),
        pytest.param({"labels": {"cowest.dev/job": "claims"}}, id="whose owner was taken away"),
    ],
)  # fmt: skip
def test_what_was_left_of_the_job_is_taken_and_what_cannot_be_changed_is_made_anew(metadata: dict[str, Any]) -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    server.keep({"kind": "Deployment", "metadata": {"name": "claims-gateway", "namespace": "desks", **metadata}})
    server.immutable = {"Deployment"}
    applied(desk, server)
    assert ("delete", "Deployment", "claims-gateway") in server.writes
    owners = server.objects["Deployment", "desks", "claims-gateway"]["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == ["u"]


# ---------------------------------------------------------------- an edit between the look and its status
def edit_seed(desk: Desk, server: KubeInMemory, seed: int) -> None:
    """The job with another seed, as its watch shows it."""
    desk.declare(**{"training.seed": seed})
    assert desk.family.job is not None
    version = server.objects["CollaborationJob", "desks", "claims"]["metadata"]["resourceVersion"]
    desk.family.job["metadata"]["resourceVersion"] = version


def test_a_trial_that_an_edit_made_begin_anew_is_frozen_on_the_edited_manifest() -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    assert desk.family.job is not None
    server.keep(desk.family.job)  # edited, and not seen yet
    with pytest.raises(OvertakenError):
        applied(desk, server)
    first = server.objects["ConfigMap", "desks", "claims-r1"]
    edit_seed(desk, server, 77)
    applied(desk, server)
    frozen = json.loads(server.objects["ConfigMap", "desks", "claims-r1"]["data"]["job.json"])
    assert frozen["spec"]["training"]["seed"] == 77 != json.loads(first["data"]["job.json"])["spec"]["training"]["seed"]
    edit_seed(desk, server, 78)
    applied(desk, server)
    kept = json.loads(server.objects["ConfigMap", "desks", "claims-r1"]["data"]["job.json"])
    assert kept == frozen, "a trial that has begun goes by its own"
