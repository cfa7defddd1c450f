"""The farewell of a job that is to be erased. No cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import pytest

from cowest_operator import farewell
from cowest_operator.apply import Applier
from cowest_operator.keeper import Keeper
from cowest_operator.kube import Kube, KubeError
from cowest_operator.metrics import Metrics
from cowest_operator.watched import Watched
from tests.kube_in_memory import KubeInMemory
from tests.unit.test_look import Desk


def leaving(seconds: float = 5.0, **edits: Any) -> Desk:
    """A job that was deleted so many seconds ago."""
    desk = Desk(**{"deletionPolicy": {"models": "Delete", "traces": "Delete"}, **edits})
    assert desk.family.job is not None
    deleted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    desk.family.job["metadata"] |= {"deletionTimestamp": deleted, "finalizers": [farewell.FINALIZER]}
    return desk


def looked(desk: Desk, *others: dict[str, Any]) -> KubeInMemory:
    server = KubeInMemory(cast(Any, desk.family.job), *others)
    keeper = Keeper(Watched(), desk.observer(), Applier(cast(Kube, server)), Metrics())
    asyncio.run(keeper._goodbye(desk.family, desk.memory))
    return server


def is_let_go(server: KubeInMemory) -> bool:
    return "finalizers" not in server.objects["CollaborationJob", "desks", "claims"]["metadata"]


def test_the_erasing_begins_though_no_door_of_the_job_answers() -> None:
    desk = leaving()
    desk.has("Deployment", "gateway", status={"availableReplicas": 1})
    server = looked(desk)
    assert ("delete", "Deployment", "claims-gateway") in server.writes and server.of("Workflow") == ["claims-erase"]
    assert desk.doors.asked == [], "pods that may be gone are not asked"


@pytest.mark.parametrize("refused", [False, True], ids=["written", "refused"])
def test_that_artifacts_are_erased_is_said_once_and_holds_up_nothing(refused: bool) -> None:
    desk = leaving()
    server = KubeInMemory(cast(Any, desk.family.job))
    if refused:
        server.refuses["status", "CollaborationJob", "desks"] = KubeError(403, "a policy refuses it")
    keeper = Keeper(Watched(), desk.observer(), Applier(cast(Kube, server)), Metrics())
    for _ in range(3):
        asyncio.run(keeper._goodbye(desk.family, desk.memory))
        desk.family.job = server.objects["CollaborationJob", "desks", "claims"]
    assert server.of("Workflow") == ["claims-erase"]
    conditions = desk.family.job.get("status", {}).get("conditions", [])
    reasons = [each["reason"] for each in conditions if each["type"] == "RoundProgressing"]
    assert reasons == ([] if refused else ["ErasingArtifacts"])
    assert sum(write[0] == "status" for write in server.writes) == (0 if refused else 1)


def test_after_the_limit_a_job_goes_whatever_its_manifest_says() -> None:
    words = {"collaboration.promptsConfigMapRef": {"name": "words"}}
    desk = leaving(farewell.LIMIT + 5, **words)

    async def refused(*_: str) -> None:
        raise KubeError(403, "no right to read ConfigMaps")

    desk.maps.get = refused  # type: ignore[method-assign, assignment]
    assert is_let_go(looked(desk))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ServiceAccount", "claims-steps"),
        ("Role", "claims-steps"),
        ("RoleBinding", "claims-steps"),
        ("ConfigMap", "claims-erase"),
        ("Workflow", "claims-erase"),
    ],
)
def test_what_is_somebody_elses_is_left_as_it_is_and_the_job_let_go(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = {"name": name, "namespace": "desks", "uid": "theirs", "resourceVersion": "3"}
    theirs = {"kind": kind, "metadata": metadata, "data": {"theirs": "1"}}
    desk = leaving()
    with caplog.at_level(logging.WARNING):
        server = looked(desk, theirs)
    assert server.objects[kind, "desks", name] == theirs
    assert is_let_go(server)
    assert f"artifacts were not erased: {kind} {name} exists and is not this job's" in caplog.text


@pytest.mark.parametrize(
    ("timeout", "seconds", "erases"),
    [
        pytest.param(30, 119, False, id="two minutes at least"),
        pytest.param(30, 121, True, id="and no longer where an answer ends sooner"),
        pytest.param(300, 349, False, id="a long answer may be under way"),
        pytest.param(300, 351, True, id="its gateway has been killed by now"),
        pytest.param(3600, 421, True, id="the erasing needs its time too"),
    ],
)
def test_a_gateway_that_still_answers_is_waited_for(timeout: int, seconds: float, erases: bool) -> None:
    desk = leaving(seconds, **{"strong.timeoutSeconds": timeout})
    labels = {"cowest.dev/job": "claims", "app.kubernetes.io/component": "gateway"}
    desk.has("Pod", "gateway-x", metadata={"labels": labels}, status={"phase": "Running"})
    assert looked(desk).of("Workflow") == (["claims-erase"] if erases else [])
