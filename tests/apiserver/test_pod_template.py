"""What a manifest says of pods, as far as it can be followed without a node: to the pod that an API server takes.

Argo's own part is played: it makes a pod of a template and lays `podSpecPatch` over it by a strategic merge, which is
here kubectl's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.apiserver.conftest import ApiServer
from tests.apiserver.playground import SERVING, TEMPLATES, WORKFLOWS, Playground, apply, manifest_of

CLASSES, SPACE = "/apis/node.k8s.io/v1/runtimeclasses", "restricted"
GPU = "nvidia.com/gpu"
RESOURCES = {"requests": {"cpu": "2", "memory": "8Gi", GPU: "1"}, "limits": {GPU: "1"}}
TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
CACHE = {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}}
MOUNT = {"name": "cache", "mountPath": "/models"}
IN_MAIN = {"volumeMounts": [MOUNT], "env": [{"name": "HF_HOME", "value": "/models"}]}


def over(container: str) -> dict[str, Any]:
    spec = {
        "runtimeClassName": "sandboxed",
        "nodeSelector": {"pool": "gpus"},
        "tolerations": [TOLERATION],
        "volumes": [CACHE],
        "containers": [{"name": container, **IN_MAIN}],
    }
    return {"metadata": {"labels": {"team": "claims"}, "annotations": {"example.com/note": "x"}}, "spec": spec}


EDITS: Mapping[str, Any] = {
    "feedback.shards": 2,
    "training.podTemplate": over("main"),
    "training.resources": RESOURCES,
    "weak.podTemplate": over("kserve-container"),
    "weak.resources": RESOURCES,
}


@pytest.fixture
def strict(cluster: ApiServer) -> Iterator[ApiServer]:
    """With the runtime class of the manifest, and a namespace of the strictest Pod Security."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made = cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": SPACE, "labels": labels}})
    assert made[0] in (201, 409), made
    made = cluster.request("POST", CLASSES, {"metadata": {"name": "sandboxed"}, "handler": "runsc"})
    assert made[0] == 201, made
    yield cluster
    cluster.request("DELETE", f"{CLASSES}/sandboxed")


def made_by_argo(workflow_spec: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """A pod as Argo would ask for it: its own containers know nothing of the restricted profile."""
    container = {"name": "main", **template["container"]}
    spec = {
        "serviceAccountName": workflow_spec["serviceAccountName"],
        "securityContext": workflow_spec["securityContext"],
        "restartPolicy": "Never",
        "initContainers": [{"name": "init", "image": "argoexec"}],
        "containers": [{"name": "wait", "image": "argoexec"}, container],
        "volumes": template["volumes"],
    }
    metadata = {"name": "a-step", "namespace": SPACE, **template["metadata"]}
    text = json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    text = text.replace("{{workflow.parameters.step}}", "claims-r0-x").replace("{{inputs.parameters.shard}}", "0")
    patch = json.dumps({"spec": json.loads(template["podSpecPatch"])})
    command = ["kubectl", "patch", "--local", "--type=strategic", "-f", "-", "-o", "json", "-p", patch]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | {"KUBECONFIG": ""})
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def assert_as_the_manifest_says(spec: Mapping[str, Any], container: str) -> dict[str, Any]:
    """The container of that name."""
    assert (spec["runtimeClassName"], spec["nodeSelector"]) == ("sandboxed", {"pool": "gpus"})
    assert TOLERATION in spec["tolerations"] and CACHE in spec["volumes"]
    (found,) = (each for each in spec["containers"] if each["name"] == container)
    assert MOUNT in found["volumeMounts"] and len(found["volumeMounts"]) > 1, "ours beside it"
    assert IN_MAIN["env"][0] in found["env"] and len(found["env"]) > 1
    return dict(found)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH: nothing merges as Argo does")
def test_what_a_manifest_says_of_pods_is_on_each_pod_of_steps_and_weak_models_and_the_api_server_takes_it(
    playground: Playground, strict: ApiServer
) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", rounds={"max": 1, "trigger": {"newTraces": 5}}, **EDITS))
        playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-r0-sft") is not None, "a step with a model", 120)
        playground.wait(lambda: playground.items(SERVING) != [], "a weak model", 120)
        (template,) = playground.items(TEMPLATES)
        steps = {name: playground.get(f"{WORKFLOWS}/claims-r0-{name}")["spec"] for name in ("check", "sft")}
        (served,) = playground.items(SERVING)
    assert {each["workflowTemplateRef"]["name"] for each in steps.values()} == {template["metadata"]["name"]}
    assert [spec.get("entrypoint", template["spec"]["entrypoint"]) for spec in steps.values()] == ["light", "step"]
    with_gpu = set()
    pods = [each for each in template["spec"]["templates"] if "container" in each]
    for each in pods:
        wanted = made_by_argo(template["spec"], each)
        status, pod = strict.request("POST", f"/api/v1/namespaces/{SPACE}/pods?dryRun=All", wanted)
        assert status == 201, (each["name"], pod)
        main = assert_as_the_manifest_says(pod["spec"], "main")
        assert pod["metadata"]["labels"]["team"] == "claims"
        assert pod["metadata"]["annotations"]["example.com/note"] == "x"
        assert (main["resources"]["requests"]["cpu"], main["resources"]["requests"]["memory"]) == ("2", "8Gi")
        if main["resources"].get("limits", {}).get(GPU) == "1":
            with_gpu.add(each["name"])
    assert {each["name"] for each in pods} == {"step", "light", "shard", "merge"}
    assert with_gpu == {"step", "shard"}, "what loads no model holds no accelerator"
    server = assert_as_the_manifest_says(served["spec"]["predictor"], "kserve-container")
    assert server["resources"]["limits"][GPU] == server["resources"]["requests"][GPU] == "1"
    assert served["spec"]["predictor"]["labels"]["team"] == "claims"
