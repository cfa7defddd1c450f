"""A kopf operator of the CollaborationJob as a tutorial has it: what our own is measured against.

    KUBECONFIG=... python tests/benchmarks/naive_operator.py --namespace naive

It follows kopf's documentation: handlers for create, resume and update, a timer that looks again, the `kubernetes`
client called as it is, children adopted and put in place by "create, else patch", the result written to the status
each time. It keeps the gateway only: ConfigMap, Deployment and Service. It tunes nothing and decides nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import kopf
from kubernetes import client, config

from cowest_operator import api

JOB = (api.GROUP, api.VERSION, api.PLURAL)
INTERVAL = 30.0  # seconds between two looks of the timer
IMAGE = "serving:bench"
ALREADY_EXISTS = 409


@kopf.on.create(*JOB)
@kopf.on.resume(*JOB)
@kopf.on.update(*JOB)
def keep(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
    """The job is new or was edited, or this operator has just started."""
    reconcile(body, patch)


@kopf.timer(*JOB, interval=INTERVAL, initial_delay=INTERVAL)
def look_again(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
    """Heals what was edited by hand, and keeps the status true."""
    reconcile(body, patch)


def reconcile(body: kopf.Body, patch: kopf.Patch) -> None:
    job, namespace = str(body["metadata"]["name"]), str(body["metadata"]["namespace"])
    config_map, deployment, service = children(job, body["spec"])
    for child in (config_map, deployment, service):
        kopf.adopt(child, owner=body)
    core, apps = client.CoreV1Api(), client.AppsV1Api()
    put(core.create_namespaced_config_map, core.patch_namespaced_config_map, namespace, config_map)
    seen = put(apps.create_namespaced_deployment, apps.patch_namespaced_deployment, namespace, deployment)
    put(core.create_namespaced_service, core.patch_namespaced_service, namespace, service)
    patch.status["observedGeneration"] = body["metadata"]["generation"]
    patch.status["conditions"] = [ready(body, seen)]


def put(create: Callable[..., Any], patch: Callable[..., Any], namespace: str, child: dict[str, Any]) -> Any:
    """The object as the API server has it now."""
    try:
        return create(namespace, child)
    except client.ApiException as error:
        if error.status != ALREADY_EXISTS:
            raise
        return patch(child["metadata"]["name"], namespace, child)


def ready(body: Mapping[str, Any], deployment: Any) -> dict[str, Any]:
    """The condition, its time kept while its value stays."""
    available = deployment.status.available_replicas or 0
    status, reason = ("True", "Available") if available else ("False", "Starting")
    before: Mapping[str, Any] = next(iter((body.get("status") or {}).get("conditions") or []), {})
    since = before.get("lastTransitionTime") if before.get("status") == status else None
    return {
        "type": "Ready",
        "status": status,
        "reason": reason,
        "message": f"{available} gateways are available.",
        "lastTransitionTime": since or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def children(job: str, spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """ConfigMap, Deployment and Service of the gateway."""
    name, labels = f"{job}-gateway", {"app": "gateway", "job": job}
    container = {
        "name": "gateway",
        "image": IMAGE,
        "args": ["--job", "/etc/cowest/job.json"],
        "ports": [{"name": "http", "containerPort": 8080}],
        "volumeMounts": [{"name": "job", "mountPath": "/etc/cowest"}],
    }
    pod = {"containers": [container], "volumes": [{"name": "job", "configMap": {"name": name}}]}
    return (
        {"metadata": {"name": name, "labels": labels}, "data": {"job.json": json.dumps(dict(spec))}},
        {
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": spec["gateway"]["replicas"],
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "metadata": {"name": name, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", required=True)
    options = parser.parse_args()
    config.load_kube_config()  # type: ignore[no-untyped-call]
    kopf.run(standalone=True, namespaces=[options.namespace])
    return 0


if __name__ == "__main__":
    sys.exit(main())
