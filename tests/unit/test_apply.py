"""What is written, over an API server in memory. No cluster."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from cowest_operator import api, reconcile
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


# ---------------------------------------------------------------- what is not wanted any more
def reports(desk: Desk, server: KubeInMemory, part: str, replicas: int, updated: int, available: int) -> None:
    """What its controller says of a Deployment of the job."""
    counts = {"replicas": replicas, "updatedReplicas": updated, "availableReplicas": available}
    body = server.objects["Deployment", "desks", f"claims-{part}"]
    desk.family.children["Deployment", f"claims-{part}"] = see("Deployment", {**body, "status": counts})


def test_the_manifest_of_pods_of_before_stays_until_none_of_them_is_left() -> None:
    """One that is evicted comes back by the ReplicaSet of before, and mounts it."""
    desk = Desk(w.SERVED)
    server = server_of(desk)
    applied(desk, server)
    (before,) = manifests(server)
    assert desk.family.job is not None
    desk.declare(**{"strong.timeoutSeconds": 77})
    desk.family.job = server.keep(desk.family.job)
    applied(desk, server)
    for part in ("proxy", "observer"):
        reports(desk, server, part, 1, 1, 1)
    for counts in ((2, 1, 1), (2, 2, 1)):
        reports(desk, server, "gateway", *counts)
        applied(desk, server)
        assert len(manifests(server)) == 2 and before in manifests(server), counts
    reports(desk, server, "gateway", 1, 1, 1)
    applied(desk, server)
    assert len(manifests(server)) == 1 and before not in manifests(server)


def manifests(server: KubeInMemory) -> list[str]:
    """Of servers, by name."""
    return [name for name in server.of("ConfigMap") if name.startswith("claims-job-")]


def ended(
    desk: Desk, server: KubeInMemory, step: str, attempt: int, phase: str = "Failed", at: str = "2026-01-01T00:00:00Z"
) -> str:
    """A Workflow that is over."""
    labels = {"cowest.dev/job": "claims", "cowest.dev/step": step, "cowest.dev/attempt": str(attempt),
              "cowest.dev/generation": "1"}  # fmt: skip
    status = {"phase": phase, "finishedAt": at,
              "nodes": {"a": {"type": "Pod", "outputs": {"exitCode": "2"}}}}  # fmt: skip
    name = f"claims-{step}-{attempt}"
    kept = server.keep({"kind": "Workflow", "metadata": {"name": name, "namespace": "desks", "labels": labels},
                        "status": status})  # fmt: skip
    desk.family.children["Workflow", name] = see("Workflow", kept)
    return name


def test_of_a_step_that_failed_the_last_attempts_are_kept_and_argo_is_not_to_forget_them() -> None:
    desk = Desk(replace(w.on_trial(number=4), trials=5))
    server = server_of(desk)
    past = ended(desk, server, "r2-sft", 1)
    done = ended(desk, server, "r2-publish", 1, "Succeeded")
    names = [ended(desk, server, "r4-collect", attempt) for attempt in range(1, 8)]
    applied(desk, server)
    kept = set(server.of("Workflow"))
    assert past not in kept and done in kept
    assert kept >= set(names[2:]) and kept.isdisjoint(names[:2])
    (template,) = [body for (kind, _, _), body in server.objects.items() if kind == "WorkflowTemplate"]
    assert template["spec"]["ttlStrategy"] == {"secondsAfterSuccess": 86400}


def test_a_step_that_failed_is_kept_for_a_day_after_its_trial() -> None:
    desk = Desk(replace(w.on_trial(number=4), trials=5))
    server = server_of(desk)
    forgotten, of_now = ended(desk, server, "r3-sft", 1), ended(desk, server, "r4-collect", 1)
    of_today = ended(desk, server, "r3-sft", 2, at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    applied(desk, server)
    kept = server.of("Workflow")
    assert forgotten not in kept and of_now in kept and of_today in kept


# ---------------------------------------------------------------- Argo looks at once
def running(desk: Desk, server: KubeInMemory) -> str:
    """The Workflow of a step under way."""
    name = ended(desk, server, "r4-collect", 1, "Running")
    server.objects["Workflow", "desks", name]["status"].pop("finishedAt")
    return name


def its_pod(desk: Desk, server: KubeInMemory, workflow: str, name: str, finished: str) -> None:
    """A pod of it, over at `finished`, or still at work."""
    state = {"terminated": {"finishedAt": finished}} if finished else {"running": {}}
    labels = {"cowest.dev/job": "claims", "workflows.argoproj.io/workflow": workflow}
    status = {"phase": "Succeeded" if finished else "Running", "containerStatuses": [{"state": state}]}
    body = {"kind": "Pod", "metadata": {"name": name, "namespace": "desks", "labels": labels}, "status": status}
    desk.family.children["Pod", name] = see("Pod", server.keep(body))


def notes(server: KubeInMemory, workflow: str) -> list[str]:
    return list(server.objects["Workflow", "desks", workflow]["metadata"].get("annotations", {}).values())


def test_argo_is_told_once_that_the_pods_of_a_step_are_over_and_again_after_a_retry() -> None:
    desk = Desk(replace(w.on_trial(number=4), trials=5))
    server = server_of(desk)
    step = running(desk, server)
    its_pod(desk, server, step, "shard-0", "2026-01-01T00:00:05Z")
    its_pod(desk, server, step, "shard-1", "")
    applied(desk, server)
    assert notes(server, step) == []
    its_pod(desk, server, step, "shard-1", "2026-01-01T00:00:09Z")
    for _ in range(3):
        applied(desk, server)
    assert notes(server, step) == ["2026-01-01T00:00:09Z"]
    assert server.writes.count(("patch", "Workflow", step)) == 1
    its_pod(desk, server, step, "shard-1, again", "")
    applied(desk, server)
    its_pod(desk, server, step, "shard-1, again", "2026-01-01T00:00:30Z")
    applied(desk, server)
    assert notes(server, step) == ["2026-01-01T00:00:30Z"]
    assert server.writes.count(("patch", "Workflow", step)) == 2


def test_a_workflow_that_may_not_be_patched_is_left_to_argo() -> None:
    desk = Desk(replace(w.on_trial(number=4), trials=5))
    server = server_of(desk)
    step = running(desk, server)
    its_pod(desk, server, step, "pod", "2026-01-01T00:00:05Z")
    server.refuses["patch", "Workflow", ""] = KubeError(403, "workflows is forbidden")
    applied(desk, server)
    assert desk.memory.apply_troubles == () and notes(server, step) == []


# ---------------------------------------------------------------- what a step that waits or runs goes by
@pytest.mark.parametrize("how", ["deleted", "edited"])
def test_the_orders_of_a_step_that_a_hand_took_away_are_put_back_though_its_workflow_is_there(how: str) -> None:
    desk = Desk(w.on_trial(number=1))
    server = server_of(desk)
    applied(desk, server)
    key = ("ConfigMap", "desks", "claims-r1-collect")
    orders = server.objects[key]["data"]
    if how == "deleted":
        del server.objects[key], desk.family.children["ConfigMap", "claims-r1-collect"]
    else:
        edited = server.keep({**server.objects[key], "data": {"step.json": "{}"}})
        desk.family.children["ConfigMap", "claims-r1-collect"] = see("ConfigMap", edited)
    applied(desk, server)
    assert server.objects[key]["data"] == orders
    assert server.of("Workflow") == ["claims-r1-collect"]


def test_the_orders_of_a_step_that_runs_do_not_follow_an_edit() -> None:
    desk = Desk(w.on_trial(number=1))
    server = server_of(desk)
    applied(desk, server)
    desk.declare(**{"strong.timeoutSeconds": 77})
    assert desk.family.job is not None
    desk.family.job = server.keep(desk.family.job)
    applied(desk, server)
    assert server.writes.count(("apply", "ConfigMap", "claims-r1-collect")) == 1


# ---------------------------------------------------------------- refused in the middle of a trial
@pytest.mark.parametrize("kind", ["Workflow", "ConfigMap"])
def test_a_webhook_that_is_away_for_what_a_step_needs_is_said_and_nothing_is_written_twice(kind: str) -> None:
    desk = Desk(w.on_trial(number=1))
    server = server_of(desk)
    words = 'Internal error occurred: failed calling webhook "policy": connection refused'
    applied(desk, server)
    for name in [each for each in server.of(kind) if each.startswith("claims-r1-collect")]:
        del server.objects[kind, "desks", name]
        desk.family.children.pop((kind, name))
    desk.family.children.pop(("Workflow", "claims-r1-collect"), None)
    server.refuses["create" if kind == "Workflow" else "apply", kind, "desks"] = KubeError(500, words)
    for _ in range(3):
        with pytest.raises(KubeError):
            applied(desk, server)
        desk.family.job = server.objects["CollaborationJob", "desks", "claims"]
    conditions = {each["type"]: each for each in desk.family.job["status"]["conditions"]}
    assert conditions["Degraded"]["reason"] == "ApiServerRefused"
    assert conditions["Degraded"]["message"].startswith(f"{kind}: the API server refuses: {words}.")
    assert sum(write == ("status", "CollaborationJob", "claims") for write in server.writes) <= 3
    server.refuses.clear()
    applied(desk, server)
    applied(desk, server)
    conditions = {each["type"]: each for each in desk.family.job["status"]["conditions"]}
    assert "refuses" not in conditions["Degraded"]["message"]


def test_an_api_server_that_is_away_is_no_refusal() -> None:
    desk = Desk(w.on_trial(number=1))
    server = server_of(desk)
    server.refuses["create", "Workflow", "desks"] = KubeError(0, "nobody is there")
    with pytest.raises(KubeError):
        applied(desk, server)
    assert desk.memory.apply_troubles == ()


# ---------------------------------------------------------------- events
def says(desk: Desk, server: KubeInMemory, verb: str, number: int, **more: str) -> None:
    """A word of a person, and what the operator makes of it."""
    job = server.objects["CollaborationJob", "desks", "claims"]
    told = json.dumps({"verb": verb, "by": "ann", "why": "holidays", "at": 1.0, **more})
    annotations = {f"cowest.dev/action.{number:020d}-{verb}": told}
    desk.family.job = server.keep({**job, "metadata": {**job["metadata"], "annotations": annotations}})
    applied(desk, server)


def said(server: KubeInMemory, reason: str) -> list[str]:
    events = (body for (kind, _, _), body in server.objects.items() if kind == "Event")
    return [event["message"] for event in events if event["reason"] == reason]


def test_what_people_say_again_in_the_same_words_is_an_event_of_its_own_each_time() -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    for number in (1, 2):
        says(desk, server, "pause", 10 * number + 1)
        says(desk, server, "propose", 10 * number + 2, model="s3://models/mine")
        says(desk, server, "resume", 10 * number + 3)
    for reason in ("PersonPause", "PersonPropose", "PersonResume"):
        assert len(said(server, reason)) == 2 and len(set(said(server, reason))) == 1, reason


def follows(model: str) -> api.Plan:
    """A transition of which no person spoke."""
    event = api.Event("Normal", api.REASON_STRONG_FOLLOWS, f"{model} answers alone from now on")
    plan = reconcile.plan(w.world(status=w.SERVED))
    return replace(plan, events=(event,), status=replace(plan.status, looks=plan.status.looks + 1))


def test_a_transition_that_comes_again_is_an_event_again_and_the_same_one_after_a_kill_is_not() -> None:
    desk = Desk(w.SERVED)
    server, seen = server_of(desk), desk.look()
    before = server.objects["CollaborationJob", "desks", "claims"]
    applier = Applier(cast(Kube, server))
    for memory in (desk.memory, replace(desk.memory)):  # killed before it knew that it was written, and so once again
        server.objects["CollaborationJob", "desks", "claims"] = before
        asyncio.run(applier.apply(seen, follows("strong-2"), desk.family, memory))
        assert len(said(server, api.REASON_STRONG_FOLLOWS)) == 1
    desk.family.job = server.objects["CollaborationJob", "desks", "claims"]
    asyncio.run(applier.apply(desk.look(), follows("strong-2"), desk.family, desk.memory))
    assert len(said(server, api.REASON_STRONG_FOLLOWS)) == 2


def warned(server: KubeInMemory, reason: str) -> int:
    events = (body for (kind, _, _), body in server.objects.items() if kind == "Event")
    return sum(event["type"] == "Warning" and event["reason"] == reason for event in events)


def test_what_goes_wrong_is_an_event_once_and_again_when_it_comes_again() -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    applied(desk, server)
    for times in (1, 2):
        desk.doors.shut, desk.memory.asked = {"proxy"}, {}
        for _ in range(3):
            applied(desk, server)
        assert warned(server, api.REASON_PROXY_AWAY) == times
        desk.doors.shut, desk.memory.asked = set(), {}
        applied(desk, server)


def test_a_step_that_waits_for_a_person_is_one_event_and_makes_the_job_degraded() -> None:
    desk = Desk(replace(w.on_trial(number=1, done={name: {} for name in ("collect", "feedback")}), trials=2))
    server = server_of(desk)
    name = ended(desk, server, "r1-dpo", 1)
    server.objects["Workflow", "desks", name]["status"]["finishedAt"] = "1970-01-01T02:46:39Z"
    desk.family.children["Workflow", name] = see("Workflow", server.objects["Workflow", "desks", name])
    for _ in range(3):
        applied(desk, server)
    assert name in server.of("Workflow") and warned(server, api.REASON_STEP_FAILED) == 1
    assert desk.family.job is not None
    conditions = {each["type"]: each for each in desk.family.job["status"]["conditions"]}
    assert conditions["Degraded"]["status"] == "True" and "step r1-dpo: " in conditions["Degraded"]["message"]


@pytest.mark.parametrize("reason", [api.REASON_API_REFUSED, api.REASON_PODS_FAIL])
def test_a_trouble_of_children_is_an_event_though_the_transition_stands_still(reason: str) -> None:
    desk = Desk(w.SERVED)
    server = server_of(desk)
    if reason == api.REASON_API_REFUSED:
        server.refuses["apply", "ConfigMap", "desks"] = KubeError(403, "a policy refuses it")
    else:
        condition = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
        desk.has("Deployment", "observer", status={"availableReplicas": 1, "conditions": [condition]})
    for _ in range(3):
        with suppress(KubeError):
            applied(desk, server)
        desk.family.job = server.objects["CollaborationJob", "desks", "claims"]
        if reason == api.REASON_PODS_FAIL:
            desk.has("Deployment", "observer", status={"availableReplicas": 1, "conditions": [condition]})
    assert warned(server, reason) == 1
