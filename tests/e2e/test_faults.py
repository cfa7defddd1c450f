"""Parts of the cluster break under a job that answers all the time: what it says of it, and how it heals.

The desk is left standing between runs, and a fault that ended well on this commit is not tried again: an interrupted
run goes on. `kubectl delete namespace cowest-e2e` starts anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import (
    COWEST,
    JOB,
    NAMESPACE,
    ROOT,
    SYSTEM,
    Desk,
    kubectl,
    reached,
    run,
    wait_for,
)
from tests.e2e.test_loop import bad_model, gateway_address, propose, values

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.timeout(1200)]
AWAY = float(os.environ.get("COWEST_E2E_AWAY", "120"))  # seconds that a part stays away
RATE = 3


@pytest.fixture(scope="module")
def standing(
    operator: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """The freight desk after its baseline; one that stands already is taken as it is."""
    os.environ["COWEST_E2E_KEEP"] = "1"
    if kubectl("get", "collaborationjob", JOB, "-o", "name", check=False):
        with reached(tmp_path_factory.mktemp("desk")) as desk:
            yield _after_baseline(desk)
    else:
        desk = request.getfixturevalue("desk")
        text = yaml.safe_dump(values())
        run("helm", "upgrade", "--install", JOB, str(ROOT / "charts" / "cowest-domain"), "--namespace", NAMESPACE,
            "-f", "-", stdin=text)  # fmt: skip
        yield _after_baseline(desk)


def _after_baseline(desk: Desk) -> Desk:
    """No candidate on trial, and the pair answers."""
    desk.begun = time.monotonic()
    with traffic(desk):
        wait_for(lambda: desk.status().get("stable", {}).get("serving") == "Pair", "a pair that answers", 900)
        wait_for(lambda: not on_trial(desk), "the end of what is on trial", 900)
    bad_model(desk)
    return desk


@pytest.fixture(autouse=True)
def once_a_commit(request: pytest.FixtureRequest) -> Iterator[None]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    done = f"cowest/faults/{commit.strip()}/{request.node.name}"
    cache = request.config.cache
    assert cache is not None
    if cache.get(done, False):
        pytest.skip(f"ended well before, on {commit.strip()}")
    failed = request.session.testsfailed
    yield
    cache.set(done, request.session.testsfailed == failed)


@dataclass
class Counted:
    """What a steady sender saw."""

    failed: int = 0
    answered: int = 0


@contextmanager
def traffic(desk: Desk) -> Iterator[Counted]:
    """Questions all through the block; the counts are there after it."""
    data, url = desk.folder / "data" / "live.jsonl", f"http://{gateway_address()}/v1"
    command = [*COWEST, "send", "--data", str(data), "--url", url, "--rate", str(RATE), "--repeat", "-o", "json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    counted = Counted()
    try:
        yield counted
    finally:
        child.terminate()
        said = child.communicate(timeout=60)[0].strip().splitlines()
    counts: dict[str, int] = json.loads(said[-1]) if said else {}
    counted.failed = sum(n for name, n in counts.items() if name.startswith(("status", "failed")))
    counted.answered = sum(n for name, n in counts.items() if name.startswith("answered"))


def on_trial(desk: Desk) -> dict[str, Any]:
    return dict(desk.status().get("candidate") or {})


def ends(desk: Desk, after: int, seconds: float = 600) -> dict[str, Any]:
    """The outcome of the trial that follows the `after` last ones."""
    wait_for(lambda: len(desk.rounds()) > after and not on_trial(desk), "the end of the trial", seconds)
    return desk.rounds()[-1]


def says(desk: Desk, *words: str) -> Callable[[], bool]:
    """Does a condition say one of these?"""
    return lambda: any(word in json.dumps(desk.status().get("conditions", [])) for word in words)


@contextmanager
def scaled_away(namespace: str, name: str, replicas: int = 1) -> Iterator[None]:
    run("kubectl", "-n", namespace, "scale", f"deployment/{name}", "--replicas=0")
    run("kubectl", "-n", namespace, "wait", "--for=jsonpath={.spec.replicas}=0", f"deployment/{name}")
    try:
        yield
    finally:
        run("kubectl", "-n", namespace, "scale", f"deployment/{name}", f"--replicas={replicas}")
        run("kubectl", "-n", namespace, "rollout", "status", f"deployment/{name}", "--timeout=180s")


@contextmanager
def unreachable(service: str) -> Iterator[None]:
    """Nobody stands behind the Service; what it held is kept."""
    before = json.loads(kubectl("get", "service", service, "-o", "json"))["spec"]["selector"]
    kubectl("patch", "service", service, "--type=merge", "-p", json.dumps({"spec": {"selector": {"app": "nobody"}}}))
    try:
        yield
    finally:
        kubectl("patch", "service", service, "--type=merge", "-p", json.dumps({"spec": {"selector": before}}))


def worse_model(desk: Desk) -> str:
    """What the gate must refuse: the base that nobody tuned."""
    return "s3://cowest/data/base"


def test_the_workflow_controller_is_away_for_longer_than_a_step(standing: Desk) -> None:
    before = len(standing.rounds())
    with traffic(standing) as seen:
        with scaled_away("argo", "workflow-controller"):
            propose(standing, worse_model(standing))
            wait_for(lambda: bool(on_trial(standing)), "the trial", 60)
            wait_for(says(standing, "waits for the controller of Argo Workflows"), "the reason", 120)
            time.sleep(AWAY / 2)
            assert standing.condition("Ready")["status"] == "True"
        assert ends(standing, before)["decision"] == "Refused"
    assert seen.answered and not seen.failed


def test_a_step_whose_pod_is_taken_away_runs_again(standing: Desk) -> None:
    before = len(standing.rounds())
    with traffic(standing) as seen:
        propose(standing, worse_model(standing))
        pods = ("get", "pods", "-l", "workflows.argoproj.io/completed=false", "--field-selector=status.phase=Running",
                "-o", "name")  # fmt: skip
        wait_for(lambda: "evaluate" in kubectl(*pods), "a running step", 180)
        for pod in kubectl(*pods).split():
            kubectl("delete", pod, "--grace-period=0", "--force")
        assert ends(standing, before)["decision"] == "Refused"
    assert seen.answered and not seen.failed


def test_a_step_that_needs_more_memory_than_it_may_have_is_named_and_heals_by_an_edit(standing: Desk) -> None:
    before = len(standing.rounds())
    little = {"limits": {"memory": "96Mi"}, "requests": {"memory": "64Mi"}}
    pods = {"spec": {"training": {"resources": little}}}
    with traffic(standing) as seen:
        kubectl("patch", "collaborationjob", JOB, "--type=merge", "-p", json.dumps(pods))
        propose(standing, worse_model(standing))
        wait_for(says(standing, "OOMKilled", "memory", "137"), "the reason", 300)
        kubectl("patch", "collaborationjob", JOB, "--type=merge", "-p", '{"spec":{"training":{"resources":null}}}')
        assert ends(standing, before)["decision"] == "Refused"
    assert seen.answered and not seen.failed


def test_the_object_store_is_away_while_it_serves_and_trains(standing: Desk) -> None:
    before = len(standing.rounds())
    with traffic(standing) as seen:
        propose(standing, worse_model(standing))
        wait_for(lambda: bool(on_trial(standing)), "the trial", 60)
        with unreachable("minio"):
            begun = time.monotonic()
            wait_for(says(standing, "object store", "minio"), "the reason", 120)
            assert standing.condition("Ready")["status"] == "True"
            time.sleep(max(0.0, AWAY - (time.monotonic() - begun)))
        assert ends(standing, before)["decision"] == "Refused"
        wait_for(lambda: standing.condition("Degraded")["status"] == "False", "health", 180)
    assert seen.answered and not seen.failed


def test_the_strong_endpoint_is_away(standing: Desk) -> None:
    with traffic(standing) as seen, scaled_away(NAMESPACE, "strong"):
        time.sleep(10)
    assert seen.failed, "`whenStrongFails: Fail` says that the caller hears of it"
    with traffic(standing) as after:
        time.sleep(10)
    assert after.answered and not after.failed
    assert standing.condition("Ready")["status"] == "True"


def test_a_key_that_is_rotated_reaches_the_pods_without_a_restart(standing: Desk) -> None:
    pod = kubectl("get", "pods", "-l", "app.kubernetes.io/component=gateway", "-o", "name").split()[0]
    restarts = kubectl("get", pod, "-o", "jsonpath={.status.containerStatuses[*].restartCount}")
    key = f"key-{time.time_ns()}"
    with traffic(standing) as seen:
        kubectl("patch", "secret", "strong", "--type=merge", "-p", json.dumps({"stringData": {"api-key": key}}))
        shown = "grep -rh . /etc/cowest/strong-keys/"
        wait_for(
            lambda: key in kubectl("exec", pod, "-c", "gateway", "--", "sh", "-c", shown, check=False), "the key", 180
        )
    assert seen.answered and not seen.failed
    assert kubectl("get", pod, "-o", "jsonpath={.status.containerStatuses[*].restartCount}") == restarts


def test_the_stable_server_is_deleted_by_hand(standing: Desk) -> None:
    name = kubectl("get", "inferenceservices", "-o", "name").split()[0]
    uid = kubectl("get", name, "-o", "jsonpath={.metadata.uid}")
    ready = "jsonpath={.metadata.uid} {.status.conditions[?(@.type=='Ready')].status}"

    def another() -> bool:
        now = kubectl("get", name, "-o", ready, check=False).split()
        return len(now) == 2 and now[0] != uid and now[1] == "True"

    with traffic(standing) as seen:
        kubectl("delete", name, "--wait=false")
        wait_for(another, "another server", 180)
    assert seen.answered and not seen.failed, "meanwhile the strong model answers alone, as `whenWeakFails` says"


def test_the_operator_that_writes_is_killed_and_the_other_takes_over(standing: Desk) -> None:
    lease = kubectl("-n", SYSTEM, "get", "lease", "-o", "jsonpath={.items[0].spec.holderIdentity}")
    holder = lease.split("_")[0]
    with traffic(standing) as seen:
        run("kubectl", "-n", SYSTEM, "delete", "pod", holder, "--grace-period=0", "--force")
        kubectl("patch", "collaborationjob", JOB, "--type=merge", "-p", '{"spec":{"gateway":{"replicas":2}}}')
        replicas = ("get", "deployment", f"{JOB}-gateway", "-o", "jsonpath={.status.availableReplicas}")
        wait_for(lambda: kubectl(*replicas) == "2", "the second gateway", 120)
        kubectl("patch", "collaborationjob", JOB, "--type=merge", "-p", '{"spec":{"gateway":{"replicas":1}}}')
        wait_for(lambda: kubectl(*replicas) == "1", "one gateway again", 120)
    assert seen.answered and not seen.failed


def test_a_job_can_be_deleted_while_the_operator_is_away(standing: Desk) -> None:
    job = standing.job()
    other = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": {"name": "passing"},
             "spec": {**job["spec"], "suspend": True}}  # fmt: skip
    kubectl("apply", "-f", "-", stdin=json.dumps(other))
    made = ("get", "deployment", "passing-gateway", "-o", "name")
    wait_for(lambda: bool(kubectl(*made, check=False)), "its gateway", 60)
    with scaled_away(SYSTEM, "cowest-operator", 2):
        kubectl("delete", "collaborationjob", "passing", "--timeout=20s")
        wait_for(lambda: not kubectl(*made, check=False), "the garbage collector", 60)
    assert standing.condition("Ready")["status"] == "True", "the job beside it is not touched"


def test_kserve_is_away_when_a_candidate_is_due(standing: Desk) -> None:
    before = len(standing.rounds())
    with traffic(standing) as seen:
        with scaled_away("kserve", "kserve-controller-manager"):
            propose(standing, "s3://cowest/proposed/live-bad")
            wait_for(lambda: on_trial(standing).get("stage") == "Canary", "the canary", 300)
            wait_for(says(standing, "waits for the controller of KServe"), "the reason", 120)
            time.sleep(AWAY / 4)
            assert standing.condition("Ready")["status"] == "True"
        assert ends(standing, before)["decision"] == "RolledBack"
    assert seen.answered and not seen.failed
