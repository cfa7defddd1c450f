"""Weak models on KServe: one InferenceService a model, named by its digest. Pure.

Traffic is split by the gateway, not by KServe: `canaryTrafficPercent` does nothing without Knative, and 0.20's
`spec.canary` splits only behind a Gateway API controller (kserve: pkg/controller/v1beta1/inferenceservice).
"""

from __future__ import annotations

from typing import Any

from cowest_operator import api
from cowest_operator.objects import common
from cowest_operator.objects.common import Child, Context
from cowest_serving.contract import digest_of

KSERVE = "serving.kserve.io/v1beta1"
DIGEST_ANNOTATION = "cowest.dev/model-digest"
MODEL_FOLDER = "/mnt/models"
NO_THOUGHTS = '{"enable_thinking": false}'  # as in training: a draft would be the beginning of them
NAME = "weak"  # of the model in the OpenAI API
# The image knows no user of our number: what /etc/passwd would say is said here, and all that is written goes to /tmp.
VLLM_ENV = {
    "HOME": "/tmp",
    "USER": "cowest",
    "XDG_CACHE_HOME": "/tmp/cache",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/cache/torchinductor",
    "VLLM_NO_USAGE_STATS": "1",
}


ASKED = {"cpu": "100m", "memory": "512Mi"}  # where the manifest says nothing
NO_LIMIT = {"cpu": "256", "memory": "4Ti"}  # more than a node has


def server_name(context: Context, digest: str) -> str:
    """KServe makes a label `isvc.<name>-predictor` of it, and the first part of a host, `<name>-predictor-<namespace>`:
    63 characters each at most. Where the job's name is too long for that, its beginning and a hash stand for it."""
    job, room = context.job.name, min(48, 63 - len(f"-predictor-{context.namespace}"))
    name = f"{job}-{common.hex_of(digest, 7)}"
    if len(name) <= room:
        return name
    short = common.hex_of(digest_of([job, digest]), 10)
    return f"{job[: max(1, room - len(short) - 1)].rstrip('-')}-{short}"


def endpoint(context: Context, digest: str) -> str:
    return f"http://{server_name(context, digest)}-predictor.{context.namespace}.svc/v1"


def inference_service(context: Context, server: api.ServerSpec) -> Child:
    weak = context.job.spec.weak
    volumes, mounts = common.store_volumes(context)
    tmp_volume, tmp_mount = common.tmp()
    fetch = common.container(
        context, "fetch", context.images.serving, "cowest_serving.fetch",
        ["--model", server.model, "--digest", server.digest, "--out", MODEL_FOLDER],
        env=common.store_env(context),
        resources={"requests": {"cpu": "50m", "memory": "128Mi"}},
        volumeMounts=[{"name": "model", "mountPath": MODEL_FOLDER}, tmp_mount, *mounts],
    )  # fmt: skip
    base = common.pod(
        context,
        initContainers=[fetch],
        containers=[_server(context, server, weak, tmp_mount)],
        volumes=[{"name": "model", "emptyDir": {}}, tmp_volume, *volumes],
        terminationGracePeriodSeconds=60,
    )
    pod = common.template(context, "weak-model", base, weak.pod_template)
    predictor = {
        "minReplicas": weak.replicas,
        "labels": pod["metadata"]["labels"],
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        **pod["spec"],
    }
    built = common.child(
        context, KSERVE, "InferenceService", server_name(context, server.digest), "weak-model",
        spec={"predictor": predictor},
    )  # fmt: skip
    built["metadata"]["labels"]["networking.kserve.io/visibility"] = "cluster-local"
    # What KServe has made of it is said back: a webhook of 0.16 and later refuses another word than the status has,
    # and since 0.17 one rewrites the annotation itself.
    mode = context.kserve_modes.get(built["metadata"]["name"], context.kserve_mode)
    built["metadata"]["annotations"] = {
        "serving.kserve.io/deploymentMode": mode,
        "serving.kserve.io/autoscalerClass": "none",
        DIGEST_ANNOTATION: server.digest,
        **pod["metadata"].get("annotations", {}),
    }
    return built


def _server(context: Context, server: api.ServerSpec, weak: api.Weak, tmp_mount: dict[str, Any]) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "ports": [{"name": "http1", "containerPort": common.PORT, "protocol": "TCP"}],
        "resources": _resources(weak.resources),
        "volumeMounts": [{"name": "model", "mountPath": MODEL_FOLDER, "readOnly": True}, tmp_mount],
    }
    if weak.engine == "vLLM":
        built = common.container(
            context, "kserve-container", context.images.vllm, "", 
            ["serve", MODEL_FOLDER, "--port", str(common.PORT), "--served-model-name", NAME, server.digest,
             "--generation-config", "vllm", "--default-chat-template-kwargs", NO_THOUGHTS],
            env=[*(common.env(name, value) for name, value in VLLM_ENV.items())], **shared,
            **_probes("/health"),
        )  # fmt: skip
        return {**built, "command": ["vllm"]}
    return common.container(
        context, "kserve-container", context.images.training, "cowest_serving.weak_server",
        ["--model", MODEL_FOLDER, "--port", str(common.PORT), "--host", "0.0.0.0", "--name", NAME],
        env=[common.env("COWEST_CACHE", "/tmp/cache")], **shared, **_probes("/readyz"),
    )  # fmt: skip


def _resources(said: api.Resources | None) -> dict[str, Any]:
    """CPU and memory are all said: what is not, KServe fills in, limits too (1 CPU and 2Gi as it comes), and refuses
    them where a request is above that. It has no word for no limit."""
    requests, limits = (said.requests, said.limits) if said else ({}, {})
    as_limited = {name: limits[name] for name in ASKED if name in limits}
    return {"requests": {**ASKED, **as_limited, **requests}, "limits": {**NO_LIMIT, **limits}}


def _probes(path: str) -> dict[str, Any]:
    """By number, not by name: KServe renames ports."""
    asked = {"httpGet": {"path": path, "port": common.PORT}}
    return {
        "startupProbe": {**asked, "periodSeconds": 1, "failureThreshold": 1800},
        "readinessProbe": {**asked, "periodSeconds": 3, "timeoutSeconds": 3},
        "livenessProbe": {"tcpSocket": {"port": common.PORT}, "periodSeconds": 10, "failureThreshold": 6},
    }
