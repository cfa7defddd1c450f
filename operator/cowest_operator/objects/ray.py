"""The gateway on KubeRay: one RayService, where `gateway.engine: RayServe` is asked for and KubeRay is there. Pure.

    head      keeps the cluster together; in no Service, because it must be ready before anything answers on it
    workers   gateway.replicas; ready when the gateway answers there, and then in the Service `J-gateway`

The Service is the one that a Deployment would have, with the same selector: while the engine is switched, both are in
it, and each pod that is ready gets requests. KubeRay's own `-serve-svc` is made beside it and used by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowest_operator.objects import common
from cowest_operator.objects.common import Child, Context

HEAD = "gateway-head"  # app.kubernetes.io/component of its pod
OBJECT_STORE_BYTES = 100 * 1024 * 1024  # near Ray's least: nothing is kept there
AGENT, DASHBOARD, METRICS = 52365, 8265, 8090  # ports of Ray; KubeRay's own choice for the last is 8080, which is ours
# By name. KubeRay makes a Service of those of the head; where one is named at all it adds none, but `metrics` at 8080.
NODE_PORTS = {"serve": common.PORT, "metrics": METRICS}
HEAD_PORTS = {**NODE_PORTS, "gcs-server": 6379, "dashboard": DASHBOARD, "client": 10001}
ENVIRONMENT = {
    "HOME": "/tmp",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cowest_serving.ray_app:middlewares",  # its PROXY
}
STARTED_WITH = {"object-store-memory": str(OBJECT_STORE_BYTES), "metrics-export-port": str(METRICS)}


def is_wanted(context: Context) -> bool:
    return context.has_kuberay and context.job.spec.gateway.engine == "RayServe"


def name(context: Context) -> str:
    """At most 47 characters: KubeRay makes names of six more of it."""
    return context.name("ray")


def kept_in(context: Context, other: bool = False) -> tuple[str, str]:
    """(kind, name) of what runs the gateway; the `other` is what ran it before its engine was switched."""
    if is_wanted(context) is not other:
        return "RayService", name(context)
    return "Deployment", context.name("gateway")


def gateway(context: Context, pod: dict[str, Any], drain_seconds: int) -> Child:
    """`pod` is what a Deployment would run: its first container becomes a node of Ray."""
    replicas, finish = context.job.spec.gateway.replicas, context.job.spec.strong.timeout_seconds
    workers = {
        "groupName": "gateway",
        "replicas": replicas,
        "minReplicas": replicas,
        "maxReplicas": replicas,
        "rayStartParams": {**STARTED_WITH, "num-cpus": "1"},
        "template": common.template(context, "gateway", _node(pod, drain_seconds + finish, NODE_PORTS, _answers())),
    }
    head = {
        "rayStartParams": {**STARTED_WITH, "num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": common.template(context, HEAD, _node(pod, drain_seconds + finish, HEAD_PORTS, _leads())),
    }
    spec = {
        "serveConfigV2": common.canonical(_serve(context, replicas + 1, finish)),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": {"headGroupSpec": head, "workerGroupSpecs": [workers]},
    }
    return common.child(context, "ray.io/v1", "RayService", name(context), "gateway", spec=spec)


def _serve(context: Context, nodes: int, finish_seconds: int) -> dict[str, Any]:
    """JSON is YAML. One replica on each node, the head's too: a node without one has no proxy either."""
    args: dict[str, Any] = {
        "routing": common.ROUTING_FILE,
        "job": f"{common.JOB_FOLDER}/job.json",
        "store": context.store,
        "spool": common.SPOOL,
        "replicas": nodes,
        "finish_seconds": finish_seconds,
    }
    if address := common.book_of(context):
        args["book"] = address
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": common.PORT},
        "applications": [
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "cowest_serving.ray_app:app",
                "args": args,
                "deployments": [{"name": "gateway", "max_replicas_per_node": 1}],
            }
        ],
    }


def _node(pod: dict[str, Any], drain_seconds: int, ports: Mapping[str, int], probes: dict[str, Any]) -> dict[str, Any]:
    """KubeRay writes the command. Ray ends at SIGTERM, so answers under way are waited for before it."""
    answering, *others = pod["containers"]
    kept = {key: value for key, value in answering.items() if key not in ("command", "args") and "Probe" not in key}
    ray = {
        **kept,
        # The names that KubeRay looks for. One port has one name, so `http`, the Service's, stands at the sidecar.
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [*answering["env"], *(common.env(name, value) for name, value in ENVIRONMENT.items())],
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-c", f"import time; time.sleep({drain_seconds})"]}}},
        **probes,
    }
    routing, *more = others
    named = {**routing, "ports": [{"name": "http", "containerPort": common.PORT}]}
    return {**pod, "containers": [ray, named, *more]}


def _answers() -> dict[str, Any]:
    return {"readinessProbe": _asked("/readyz", common.PORT, periodSeconds=2, timeoutSeconds=3), **_lives()}


def _leads() -> dict[str, Any]:
    """Not of the gateway: KubeRay starts it when the head is ready."""
    return {"readinessProbe": _asked("/api/gcs_healthz", DASHBOARD, periodSeconds=5, timeoutSeconds=5), **_lives()}


def _lives() -> dict[str, Any]:
    """KubeRay's own probes call wget, which the image does not have."""
    return {
        "startupProbe": _asked("/api/local_raylet_healthz", AGENT, periodSeconds=5, timeoutSeconds=5,
                               failureThreshold=60),
        "livenessProbe": _asked("/api/local_raylet_healthz", AGENT, periodSeconds=10, timeoutSeconds=5,
                                failureThreshold=6),
    }  # fmt: skip


def _asked(path: str, port: int, **more: Any) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}, **more}
