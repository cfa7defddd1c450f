"""A real cluster for tests: the current kubeconfig, and only if its context is named as a test cluster's.

What a user would have is made by the public means only: charts, `cowest upload`, `kubectl`. The strong model is the
freight desk's stand-in, running in a pod. Images: `$COWEST_IMAGE_REGISTRY/cowest/*:$COWEST_IMAGE_TAG` (docker.io, dev).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import audit

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "crds" / "examples" / "freight"
SYSTEM, NAMESPACE, JOB = "cowest-system", "cowest-e2e", "freight"
REGISTRY = os.environ.get("COWEST_IMAGE_REGISTRY", "docker.io")
TAG = os.environ.get("COWEST_IMAGE_TAG", "dev")
KEYS = {"AWS_ACCESS_KEY_ID": "e2e-user", "AWS_SECRET_ACCESS_KEY": "e2e-password"}
LAST_WORDS: list[str] = []  # printed at the very end, below the test runner's own summary
ANEW = bool(os.environ.get("COWEST_E2E_ANEW"))  # the faults begin anew; the loop does each time
COWEST = [sys.executable, "-P", "-m", "cowest_cli"]


def pytest_unconfigure() -> None:
    for line in LAST_WORDS:
        print(line, flush=True)


def run(*command: str, stdin: str | None = None, check: bool = True, **environment: str) -> str:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True, namespace: str = NAMESPACE) -> str:
    return run("kubectl", "--namespace", namespace, *arguments, stdin=stdin, check=check)


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> float:
    """Seconds that it took; fails with the job's story after the deadline."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            story = kubectl("describe", "collaborationjob", check=False)[-5000:]
            pods = kubectl("get", "pods,workflows,inferenceservices", "-o", "wide", check=False)
            pytest.fail(f"waited {seconds:.0f} s for {what}\n{story}\n{pods}")
        time.sleep(0.5)
    return time.monotonic() - begun


@dataclass
class Desk:
    """The freight desk in the cluster."""

    folder: Path
    store: dict[str, str]  # environment that reaches the object store from here
    timeline: list[tuple[float, str]] = field(default_factory=list)
    begun: float = 0.0

    def mark(self, what: str, ago: float = 0.0) -> float:
        at = time.monotonic() - self.begun - ago
        self.timeline.append((at, what))
        print(f"{at:7.1f} s  {what}", flush=True)
        return at

    def job(self) -> dict[str, Any]:
        text = kubectl("get", "collaborationjob", JOB, "-o", "json", check=False)
        return dict(json.loads(text)) if text else {}

    def status(self) -> dict[str, Any]:
        return dict(self.job().get("status") or {})

    def condition(self, kind: str) -> dict[str, Any]:
        return next((dict(c) for c in self.status().get("conditions", ()) if c["type"] == kind), {})

    def has_traces(self) -> bool:
        return self.has(f"desks/{NAMESPACE}/{JOB}/traces/", ".parquet")

    def has(self, prefix: str, ending: str = "") -> bool:
        """Is there such an object in the store?"""
        found = _minio(self.store).list_objects("cowest", prefix, recursive=True)
        return any(each.object_name.endswith(ending) for each in found)

    def rounds(self) -> list[dict[str, Any]]:
        return list(self.status().get("rounds", ()))


@pytest.fixture(scope="session")
def cluster() -> None:
    for tool in ("kubectl", "helm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH: the cluster tests need it")
    context = run("kubectl", "config", "current-context", check=False).strip()
    if not context:
        pytest.skip("no current context in the kubeconfig: the cluster tests need a cluster")
    if not context.startswith(("cowest-test", "kind-")):
        pytest.skip(f"the current context {context!r} is no test cluster's: wanted cowest-test* or kind-*")


def operator_values() -> list[str]:
    """The images under test, for helm."""
    images = [f"jobImages.{name}.{part}" for name in ("serving", "training") for part in ("registry", "tag")]
    images.append("jobImages.servingRay.registry")  # its tag is that of serving with -ray
    values = [f"{path}={REGISTRY if path.endswith('registry') else TAG}" for path in images]
    return [x for v in (f"image.registry={REGISTRY}", f"image.tag={TAG}", *values) for x in ("--set", v)]


@pytest.fixture(scope="session")
def operator(cluster: None, request: pytest.FixtureRequest) -> Iterator[None]:
    run("helm", "upgrade", "--install", "cowest-operator", str(ROOT / "charts" / "cowest-operator"), "--namespace",
        SYSTEM, "--create-namespace", "--wait", "--timeout", "3m", *operator_values())  # fmt: skip
    # The same tag may be a newer image.
    run("kubectl", "--namespace", SYSTEM, "rollout", "restart", "deployment/cowest-operator")
    run("kubectl", "--namespace", SYSTEM, "rollout", "status", "deployment/cowest-operator", "--timeout=180s")
    begun = datetime.now(UTC)
    is_faults = any(item.get_closest_marker("faults") for item in request.session.items)
    log = os.environ.get("COWEST_CLUSTER_AUDIT_LOG")
    left = audit.begin(is_faults, ANEW) if log else None
    yield
    if log and left:
        audit.leave(Path(log), begun, left)


@pytest.fixture(scope="session")
def desk(operator: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Namespace, object store, strong stand-in and data; the job itself is the test's."""
    new_namespace(NAMESPACE)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(_store()))
    bring_strong(NAMESPACE)
    with reached(tmp_path_factory.mktemp("desk")) as built:
        _bucket(built.store)
        for name in ("train.jsonl", "held_out.jsonl", "base"):
            run(*COWEST, "upload", str(built.folder / "data" / name), f"s3://cowest/data/{name}", **built.store)
        yield built
    if not os.environ.get("COWEST_E2E_KEEP"):
        run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false", check=False)


def freight_spec(bucket: str, namespace: str) -> dict[str, Any]:
    """The freight desk's own manifest; only addresses differ from the one for one machine."""
    spec: dict[str, Any] = yaml.safe_load((EXAMPLE / "job.yaml").read_text("utf-8"))["spec"]
    spec["weak"]["model"] = f"s3://{bucket}/data/base"
    spec["data"] = {"train": f"s3://{bucket}/data/train.jsonl", "heldOut": f"s3://{bucket}/data/held_out.jsonl"}
    spec["strong"]["endpoint"] = f"http://strong.{namespace}.svc:9190/v1"
    spec["strong"]["apiKeySecretRefs"] = [{"name": "strong", "key": "api-key"}]
    return spec


def new_namespace(name: str) -> None:
    """Made anew, with the strictest Pod Security."""
    run("kubectl", "delete", "namespace", name, "--ignore-not-found", "--wait", "--timeout=180s")
    run("kubectl", "create", "namespace", name)
    run("kubectl", "label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")


def bring_strong(namespace: str) -> None:
    """The strong stand-in and the Secret with its key."""
    kubectl("create", "configmap", "strong-code", f"--from-file={EXAMPLE / 'strong.py'}",
            f"--from-file={EXAMPLE.parent / 'stand_in.py'}", namespace=namespace)  # fmt: skip
    kubectl("create", "secret", "generic", "strong", "--from-literal=api-key=e2e-key", namespace=namespace)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(_strong()), namespace=namespace)


def rolled_out(name: str) -> None:
    """Waits for a Deployment; fails with what its pods, their claims and the cluster's volumes say."""
    ready = ["kubectl", "--namespace", NAMESPACE, "rollout", "status", f"deployment/{name}", "--timeout=180s"]
    done = subprocess.run(ready, capture_output=True, text=True, check=False)
    if done.returncode:
        pods = kubectl("describe", "pods", "--selector", f"app={name}", check=False)[-4000:]
        rooms = kubectl("get", "persistentvolumeclaims,persistentvolumes", check=False)
        log = kubectl("logs", f"deployment/{name}", "--tail=20", check=False)
        pytest.fail(f"deployment/{name}: {done.stdout}{done.stderr}\n{pods}\n{rooms}\n{log}")


@contextmanager
def reached(folder: Path) -> Iterator[Desk]:
    """The desk whose namespace is there: its data made again here, its store behind a port-forward."""
    run(
        sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(folder / "data"), "--seed", "0", OMP_NUM_THREADS="1"
    )
    for name in ("minio", "strong"):
        rolled_out(name)
    with forwarded("minio", 9000) as port:
        yield Desk(folder, {**KEYS, "COWEST_S3_ENDPOINT": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"})


def _minio(store: dict[str, str]) -> Any:
    from minio import Minio

    address = store["COWEST_S3_ENDPOINT"].removeprefix("http://")
    return Minio(address, KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], secure=False)


def _bucket(store: dict[str, str]) -> None:
    client = _minio(store)
    if not client.bucket_exists(bucket_name="cowest"):
        client.make_bucket(bucket_name="cowest")


@contextmanager
def forwarded(service: str, port: int, namespace: str = NAMESPACE) -> Iterator[int]:
    """A local port that leads to a Service, for as long as the block lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        local = int(probe.getsockname()[1])
    command = ["kubectl", "--namespace", namespace, "port-forward", f"service/{service}", f"{local}:{port}"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(local), f"the port-forward to {service}", 30)
        yield local
    finally:
        child.terminate()
        child.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---------------------------------------------------------------- what is there before CoWest
SAFE = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


PATIENT = {"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 6}  # a busy machine is no fault of theirs


def _store() -> list[dict[str, Any]]:
    container = {
        "name": "minio",
        "image": "quay.io/minio/minio:latest",
        "imagePullPolicy": "IfNotPresent",
        "command": ["minio", "server", "/data"],
        "env": [
            {"name": "MINIO_ROOT_USER", "value": KEYS["AWS_ACCESS_KEY_ID"]},
            {"name": "MINIO_ROOT_PASSWORD", "value": KEYS["AWS_SECRET_ACCESS_KEY"]},
            {"name": "HOME", "value": "/data"},
        ],
        "ports": [{"name": "http", "containerPort": 9000}],
        # A folder of this run: a volume that is not made anew for each claim still holds what the last run left.
        "volumeMounts": [{"name": "data", "mountPath": "/data", "subPath": f"{datetime.now(UTC):%Y%m%dT%H%M%S}"}],
        "readinessProbe": {"httpGet": {"path": "/minio/health/ready", "port": 9000}, **PATIENT},
        "securityContext": SAFE,
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": KEYS}
    # A volume, so that what it keeps outlives a pod of it.
    room = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "minio"}, "spec": room}
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "minio"}}
    return [secret, claim, *_served("minio", container, [volume], 9000)]


def _strong() -> list[dict[str, Any]]:
    """The stand-in for a paid strong model, a program behind the OpenAI protocol."""
    container = {
        "name": "strong",
        "image": f"{REGISTRY}/cowest/serving:{TAG}",
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "/code/freight/strong.py", "--port", "9190", "--host", "0.0.0.0"],
        "ports": [{"name": "http", "containerPort": 9190}],
        "volumeMounts": [{"name": "code", "mountPath": "/code"}],
        "readinessProbe": {"httpGet": {"path": "/v1/models", "port": 9190}, **PATIENT},
        "securityContext": SAFE,
    }
    items = [{"key": "strong.py", "path": "freight/strong.py"}, {"key": "stand_in.py", "path": "stand_in.py"}]
    volume = {"name": "code", "configMap": {"name": "strong-code", "items": items}}
    return _served("strong", container, [volume], 9190)


def _served(name: str, container: dict[str, Any], volumes: list[dict[str, Any]], port: int) -> list[dict[str, Any]]:
    labels = {"app": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": volumes}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": labels}, "template": pod},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": labels, "ports": [{"port": port, "targetPort": "http"}]},
    }
    return [deployment, service]
