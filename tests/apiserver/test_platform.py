"""What is found of the cluster, against a real API server, and what the operator makes of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cowest_operator.kube import Kube, KubeError
from cowest_operator.platform import Discovery, Platform, mode_of, troubles
from cowest_serving.app import parser as gateway_flags
from tests import world
from tests.apiserver.conftest import CRDS, JOBS, ApiServer, wait_until
from tests.apiserver.playground import (
    DEPLOYMENTS,
    NAMESPACE,
    SERVING,
    Playground,
    apply,
    foreign_crd,
    manifest_of,
    through_kube,
)

T = TypeVar("T")
RAY = ("ray.io", "v1", "RayService", "rayservices", True)
LOCAL_QUEUE = ("kueue.x-k8s.io", "v1beta1", "LocalQueue", "localqueues", True)
LLM = ("serving.kserve.io", "v1alpha1", "LLMInferenceService", "llminferenceservices", True)
WHOLE = Platform(has_kserve=True, has_argo=True, has_kuberay=True, has_kueue=True)
FORBIDDEN = replace(WHOLE, has_kuberay=False, ray_is_forbidden=True)


@contextmanager
def installed(server: ApiServer, kind: tuple[str, str, str, str, bool]) -> Iterator[None]:
    """The CRD of a kind, for as long as a test wants it."""
    group, version, _, plural, _ = kind
    path = f"/apis/{group}/{version}/namespaces/{NAMESPACE}/{plural}"
    status, answer = server.request("POST", CRDS, foreign_crd(*kind))
    assert status == 201, answer
    try:
        wait_until(lambda: server.request("GET", path)[0] == 200, f"{plural} to be served")
        yield
    finally:
        server.request("DELETE", f"{CRDS}/{plural}.{group}")
        wait_until(lambda: server.request("GET", path)[0] == 404, f"{plural} to be gone")


def found(server: ApiServer, folder: Path, **told: Any) -> Platform:
    return through_kube(server, folder, lambda kube: Discovery(kube, **told).look())


def test_a_list_that_comes_in_chunks_is_whole(server: ApiServer, tmp_path: Path) -> None:
    path, names = f"/api/v1/namespaces/{NAMESPACE}/configmaps", {f"chunk-{n}" for n in range(5)}
    for name in names:
        body = {"metadata": {"name": name, "labels": {"chunked": "yes"}}}
        assert server.request("POST", path, body)[0] == 201

    async def all_of_them(kube: Kube) -> list[str]:
        found = kube.list("ConfigMap", NAMESPACE, chunk=2, labelSelector="chunked=yes")
        return [each["metadata"]["name"] async for each in found]

    try:
        assert through_kube(server, tmp_path, all_of_them) == sorted(names)
    finally:
        for name in names:
            server.request("DELETE", f"{path}/{name}")


# ---------------------------------------------------------------- what is found
def test_what_is_installed_is_found_and_what_is_not_is_not(cluster: ApiServer, tmp_path: Path) -> None:
    without = Platform(has_kserve=True, has_argo=True)
    wait_until(lambda: found(cluster, tmp_path) == without, "what other tests installed to be gone", 60)
    with installed(cluster, RAY), installed(cluster, LOCAL_QUEUE):
        wait_until(lambda: found(cluster, tmp_path) == WHOLE, "KubeRay and Kueue to be found", 60)
        assert not found(cluster, tmp_path, rayservices=False).has_kuberay, "without the right it is as if not there"
    wait_until(lambda: found(cluster, tmp_path) == without, "both to be gone", 60)


def test_kserve_of_0_16_and_later_is_known_by_the_kind_that_came_with_it(cluster: ApiServer, tmp_path: Path) -> None:
    assert found(cluster, tmp_path).kserve_mode == "RawDeployment"
    with installed(cluster, LLM):
        wait_until(lambda: found(cluster, tmp_path).kserve_mode == "Standard", "the kind to be discovered", 60)
        assert found(cluster, tmp_path, mode="RawDeployment").kserve_mode == "RawDeployment", "the override wins"


def crd(**predictor: Any) -> dict[str, Any]:
    spec = {"properties": {"predictor": {"properties": predictor}}}
    return {"spec": {"versions": [{"schema": {"openAPIV3Schema": {"properties": {"spec": spec}}}}]}}


@pytest.mark.parametrize(
    ("seen", "mode"),
    [
        pytest.param(crd(model={}, containers={}), "RawDeployment", id="the fields of 0.15"),
        pytest.param(crd(model={}, storageUris={}), "Standard", id="a field that came with 0.16"),
        pytest.param(foreign_crd(*RAY), "RawDeployment", id="a minimal CRD shows no fields"),
        pytest.param({}, "RawDeployment", id="a CRD that may not be read"),
    ],
)
def test_the_name_of_kserves_mode_is_told_by_its_crd(seen: dict[str, Any], mode: str) -> None:
    assert mode_of(seen) == mode


class Answers:
    """An API server that serves KServe, and says `code` to whoever asks for its CRD."""

    def __init__(self, code: int) -> None:
        self.code = code

    async def read(self, path: str) -> dict[str, Any] | None:
        version = "serving.kserve.io/v1beta1"
        if path == "/apis":
            return {"groups": [{"name": "serving.kserve.io", "versions": [{"groupVersion": version}]}]}
        if path == f"/apis/{version}":
            return {"resources": [{"kind": "InferenceService"}]}
        raise KubeError(self.code, path)


def test_without_the_right_to_read_crds_the_mode_is_the_one_that_all_versions_take() -> None:
    found = asyncio.run(Discovery(Answers(403)).look())  # type: ignore[arg-type]
    assert found == Platform(has_kserve=True, kserve_mode="RawDeployment")
    with pytest.raises(KubeError):
        asyncio.run(Discovery(Answers(500)).look())  # type: ignore[arg-type]


def test_what_has_gone_is_believed_when_it_is_seen_twice() -> None:
    discovery = Discovery(kube=None)  # type: ignore[arg-type]
    assert discovery.take(WHOLE)
    assert not discovery.take(WHOLE)
    less = replace(WHOLE, has_kuberay=False)
    assert not discovery.take(less), "an API server that starts says less than there is"
    assert not discovery.take(WHOLE)
    assert not discovery.take(less), "the doubt began anew"
    assert discovery.take(less)
    assert discovery.now == less
    assert discovery.take(WHOLE), "what has come is believed at once"


# ---------------------------------------------------------------- what cannot be had
QUEUED = {"podTemplate": {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}}}
ON_RAY = {"engine": "RayServe", "replicas": 2, "max_replicas": 5}


@pytest.mark.parametrize(
    ("platform", "gateway", "training", "reasons"),
    [
        pytest.param(WHOLE, {}, {}, [], id="all is there"),
        pytest.param(Platform(), {}, {}, ["KServeMissing", "ArgoWorkflowsMissing"], id="nothing is there"),
        pytest.param(WHOLE, {}, QUEUED, [], id="a queue with Kueue"),
        pytest.param(replace(WHOLE, has_kueue=False), {}, QUEUED, ["KueueMissing"], id="a queue without Kueue"),
        pytest.param(WHOLE, ON_RAY, {}, ["NotOnRay"], id="a RayService that is to grow"),
        pytest.param(replace(WHOLE, has_kuberay=False), ON_RAY, {}, [], id="Ray in a Deployment grows"),
        pytest.param(FORBIDDEN, ON_RAY, {}, ["RightMissing"], id="a RayService without the right to one"),
        pytest.param(FORBIDDEN, {}, {}, [], id="nobody wants a RayService"),
    ],
)
def test_what_cannot_be_had_is_said_with_a_remedy(
    platform: Platform, gateway: dict[str, Any], training: dict[str, Any], reasons: list[str]
) -> None:
    said = list(troubles(platform, world.job(gateway=gateway), training))
    assert [each.reason for each in said] == reasons
    assert all(re.search("Install it|Raise|Upgrade", each.message) for each in said)


# ---------------------------------------------------------------- what the operator makes of it
RAY_SERVICES = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices"
RESTING = {"rounds": {"max": 1, "trigger": {"newTraces": 5}}}


def ready(playground: Playground) -> bool:
    return bool(playground.condition("claims", "Ready").get("status") == "True")


def engine(playground: Playground, name: str) -> None:
    status, answer = playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"gateway": {"engine": name}}})
    assert status == 200, answer


def look(playground: Playground) -> None:
    """The operator looks; what it had begun before is done."""
    address = f"{DEPLOYMENTS}/claims-observer"
    playground.server.request("DELETE", address)
    playground.wait(lambda: playground.get(address) is not None, "a look")


def say(playground: Playground, service: str, endpoints: int) -> None:
    """What KubeRay says of a RayService on which so many pods answer."""
    ready = {"type": "Ready", "status": "False", "reason": "Initializing", "message": "it starts"}
    if endpoints:
        ready |= {"status": "True", "reason": "NonZeroServeEndpoints"}
    generation = playground.get(service)["metadata"]["generation"]
    status = {"observedGeneration": generation, "numServeEndpoints": endpoints, "conditions": [ready]}
    playground.server.request("PATCH", f"{service}/status", {"status": status})


def test_an_engine_that_is_switched_leaves_the_old_gateway_until_the_new_one_answers(playground: Playground) -> None:
    old, new = f"{DEPLOYMENTS}/claims-gateway", f"{RAY_SERVICES}/claims-ray"
    with installed(playground.server, RAY), playground.operator():
        apply(playground, manifest_of("claims", **RESTING, gateway={"replicas": 2}))
        playground.wait(lambda: ready(playground) and playground.get(old) is not None, "a gateway")
        engine(playground, "RayServe")
        playground.wait(lambda: playground.get(new) is not None, "the RayService")
        say(playground, new, endpoints=0)
        look(playground)
        assert playground.get(old) is not None and ready(playground), "nothing else answers yet"
        say(playground, new, endpoints=1)
        look(playground)
        assert playground.get(old) is not None, "one of two would have all the requests"
        say(playground, new, endpoints=2)
        playground.wait(lambda: playground.get(old) is None, "the Deployment to go")
        assert ready(playground)
        engine(playground, "ASGI")
        playground.wait(lambda: playground.get(new) is None, "the RayService to go")
        assert playground.get(old)["status"]["availableReplicas"] == 2, "its successor answers"


@pytest.mark.timeout(600)
def test_without_kuberay_a_ray_of_one_node_runs_in_each_pod_of_a_deployment_until_kuberay_comes(
    playground: Playground,
) -> None:
    old, new = f"{DEPLOYMENTS}/claims-gateway", f"{RAY_SERVICES}/claims-ray"
    with playground.operator():
        apply(playground, manifest_of("claims", **RESTING, gateway={"engine": "RayServe", "replicas": 2}))
        playground.wait(lambda: ready(playground) and playground.get(old) is not None, "a gateway")
        spec = playground.get(old)["spec"]
        service = playground.get(f"/api/v1/namespaces/{NAMESPACE}/services/claims-gateway")["spec"]
        playground.wait(lambda: playground.condition("claims", "Degraded").get("status") == "False", "no trouble", 120)
        pod = spec["template"]["spec"]
        answering, routing = pod["containers"]
        assert (spec["replicas"], answering["image"], routing["image"]) == (2, "serving:test-ray", "serving:test")
        assert answering["command"] == ["python", "-P", "-m", "cowest_serving.ray_app"]
        options = gateway_flags().parse_args(answering["args"])
        mounted = {each["mountPath"] for each in answering["volumeMounts"]}
        assert {str(options.routing.parent), str(options.job.parent), str(options.spool), "/tmp"} <= mounted
        assert options.store == "s3://cowest/default/claims" and options.workers == 1
        assert pod["terminationGracePeriodSeconds"] > options.drain_seconds + options.finish_seconds
        assert answering["resources"]["requests"] == {"cpu": "500m", "memory": "1Gi"}, "Ray's own processes are many"
        probed = {answering[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
        assert probed == {"/healthz", "/readyz"}
        assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items()
        with installed(playground.server, RAY):
            playground.wait(lambda: playground.get(new) is not None, "the RayService", 120)
            say(playground, new, endpoints=0)
            look(playground)
            assert playground.get(old)["spec"] == spec and ready(playground), "nothing else answers yet"
            say(playground, new, endpoints=2)
            playground.wait(lambda: playground.get(old) is None, "the Deployment to go")
        playground.wait(lambda: playground.get(old) is not None, "the Deployment, without KubeRay", 120)
        assert playground.get(old)["spec"] == spec


def test_a_mode_that_kserve_writes_anew_is_not_written_back_by_the_next_operator(playground: Playground) -> None:
    key = "serving.kserve.io/deploymentMode"

    def mode() -> str:
        (server,) = playground.items(SERVING)
        return str(server["metadata"]["annotations"][key])

    with playground.operator():
        apply(playground, manifest_of("claims", **RESTING))
        playground.wait(lambda: len(playground.items(SERVING)) == 1, "a weak model", 120)
        assert mode() == "RawDeployment", "all that a minimal CRD tells"
        playground.wait(
            lambda: playground.condition("claims", "RoundProgressing").get("reason") == "WaitingForTraces", "rest", 120
        )
    (server,) = playground.items(SERVING)
    address = f"{SERVING}/{server['metadata']['name']}"
    playground.server.request("PATCH", address, {"metadata": {"annotations": {key: "Standard"}}})
    playground.server.request("PATCH", f"{address}/status", {"status": {"deploymentMode": "Standard"}})
    with playground.operator():
        look(playground)
        look(playground)
        before = playground.get(address)["metadata"]["resourceVersion"]
        look(playground)
        look(playground)
        assert playground.get(address)["metadata"]["resourceVersion"] == before, "rest means no writes"
    assert mode() == "Standard"
