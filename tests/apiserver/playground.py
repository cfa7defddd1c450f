"""A cluster in small for the operator's tests: a real API server, and stand-ins for what would act on its objects.

The Deployment controller, KServe, Argo and the job's own pods are played by one thread and one HTTP server, slowly
enough that the operator sees each state. The operator itself is the real process.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from kubernetes.aio import client, config

from cowest_operator.kube import Kube
from tests import world
from tests.apiserver.conftest import CRDS, JOBS, ApiServer, wait_until
from tests.manifests import edited, smallest
from tests.ports import free_port

T = TypeVar("T")
log = logging.getLogger(__name__)
NAMESPACE = "default"
OPERATORS = "cowest-operators"  # where the operators' account and lease are
SERVING = "/apis/serving.kserve.io/v1beta1/namespaces/default/inferenceservices"
WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/default/workflows"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
MAPS = "/api/v1/namespaces/default/configmaps"
EVENTS = "/api/v1/namespaces/default/events"
TEMPLATES = "/apis/argoproj.io/v1alpha1/namespaces/default/workflowtemplates"
PODS = "/api/v1/namespaces/default/pods"
CHILDREN = (  # all that a job may have, Events and Pods apart
    MAPS, DEPLOYMENTS, SERVING, WORKFLOWS, TEMPLATES,
    "/api/v1/namespaces/default/services",
    "/api/v1/namespaces/default/serviceaccounts",
    "/api/v1/namespaces/default/persistentvolumeclaims",
    "/apis/policy/v1/namespaces/default/poddisruptionbudgets",
    "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers",
    "/apis/networking.k8s.io/v1/namespaces/default/ingresses",
    "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles",
    "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
)  # fmt: skip
KSERVE = ("serving.kserve.io", "v1beta1", "InferenceService", "inferenceservices", True)
FOREIGN = (
    KSERVE,
    ("argoproj.io", "v1alpha1", "Workflow", "workflows", False),
    ("argoproj.io", "v1alpha1", "WorkflowTemplate", "workflowtemplates", False),
)
# Said before an operator's `main`: a machine that stands still for half a minute is no API server that is away.
PATIENT = """
import aiohttp
from cowest_operator import doors, main
main.HELD, main.FREE, main.LEASE_TIMEOUT = 120, 180, 60
doors.TIMEOUT = aiohttp.ClientTimeout(total=120)
"""
STEPS = [{"weightPercent": 20, "minAnswers": 10}, {"weightPercent": 50, "minAnswers": 20}]
ON_KUBERNETES: Mapping[str, Any] = {
    "weak.model": "s3://models/base",
    "data.train": "s3://data/train.jsonl",
    "data.heldOut": "s3://data/held_out.jsonl",
    "objectStore": {"bucket": "cowest", "endpoint": "http://minio:9000", "credentialsSecretRef": {"name": "s3"}},
    "strong.apiKeySecretRefs": [{"name": "strong", "key": "api-key"}],
    "rounds": {"max": 1},
    "gate": {"minHeldOut": 100},
    "canary": {"steps": STEPS, "deadlineSeconds": 600},
}


def manifest_of(name: str, **edits: Any) -> dict[str, Any]:
    return edited({"/metadata.name": name, **ON_KUBERNETES, **edits}, smallest())


def apply(playground: Playground, job: Mapping[str, Any]) -> None:
    status, answer = playground.server.request("POST", JOBS, job)
    assert status == 201, answer


def decisions(playground: Playground, name: str) -> list[tuple[int, str, str]]:
    return [(r["number"], r["decision"], r["reason"]) for r in playground.status(name).get("rounds", ())]


def install(server: ApiServer, kind: tuple[str, str, str, str, bool]) -> None:
    """The CRD of a kind that is not ours, and the wait until it is served."""
    status, answer = server.request("POST", CRDS, foreign_crd(*kind))
    assert status == 201, answer
    group, version, name, plural, _ = kind
    path = f"/apis/{group}/{version}/namespaces/{NAMESPACE}/{plural}"
    wait_until(lambda: server.request("GET", path)[0] == 200, f"the API server to serve {name}")


def foreign_crd(group: str, version: str, kind: str, plural: str, status: bool) -> dict[str, Any]:
    """A CRD that takes anything, as Argo's minimal ones do."""
    served: dict[str, Any] = {
        "name": version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    }
    if status:
        served["subresources"] = {"status": {}}
    names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [served]},
    }


@dataclass
class Script:
    """What the stand-ins do. A test changes it while it runs."""

    exit_codes: dict[str, list[int]] = field(default_factory=dict)  # step -> codes of its first attempts
    endings: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)  # step -> the same as Argo's whole status
    better_by: float = 0.2  # of the candidate over the control, offline
    live_better_by: float = 0.1
    argo_works: bool = True
    kserve_works: bool = True
    rolls_out: bool = True  # else the pods of an edited Deployment are made beside those of before, and do not answer
    quota: str = ""  # what the Deployment controller says of each weak model's pods, which it cannot make
    left_nothing: set[str] = field(default_factory=set)  # steps of which no manifest is in the store
    metrics: dict[str, Any] = field(
        default_factory=lambda: {"has_explanations": True, "pairs": 200, "rows": 500, "held_out": 500}
    )
    live_works: bool = True  # score_live leaves its reports
    live_steps: int = 99  # of the first so many steps of a canary and its watch
    store_away: bool = False
    traces: dict[str, Any] = field(default_factory=lambda: {"all": 0, "usable": 0, "reason": ""})
    strong_version: str = "v1"
    strong: dict[str, Any] | None = None  # what the gateway says of the strong endpoint
    predictors: list[str] = field(default_factory=list)  # what KServe made a Deployment for, each time


class Playground:
    """One API server, the stand-ins, and any number of operators."""

    def __init__(self, server: ApiServer, folder: Path, token: str | None = None) -> None:
        self.server, self.folder, self.script = server, folder, Script()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._doors = ThreadingHTTPServer(("127.0.0.1", 0), self._door_handler())
        self.told: dict[str, str] = {}  # the operator's environment, where a test wants another one
        self.swaps = ""  # said before an operator's `main` too, where a test wants another limit
        self.kubeconfig = folder / "kubeconfig.json"  # the tester's
        self.kubeconfig.write_text(json.dumps(server.kubeconfig()))
        self.token = token  # of the operators' account; without one they are the tester too
        self.of_operators = folder / "kubeconfig-of-operators.json"
        self.lead(server.kubeconfig())

    def __enter__(self) -> Playground:
        self._thread.start()
        threading.Thread(target=self._doors.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        self._doors.shutdown()

    # ------------------------------------------------------------ the operator
    def lead(self, config: dict[str, Any]) -> None:
        """By this kubeconfig the operators reach the API server, each as their account."""
        if self.token:
            config["users"][0]["user"]["token"] = self.token
        self.of_operators.write_text(json.dumps(config))

    @contextmanager
    def operator(self, name: str = "one", *, as_shipped: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        process = self.start_operator(name, as_shipped=as_shipped)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_operator(self, name: str = "one", *, as_shipped: bool = False) -> subprocess.Popen[bytes]:
        """`as_shipped`: with the product's own limits of time, which are those of a cluster."""
        patient = ["-c", f"{PATIENT}{self.swaps}raise SystemExit(main.main())"]
        command = [sys.executable, "-P", *(["-m", "cowest_operator.main"] if as_shipped else patient)]
        said = (self.folder / f"operator-{name}.log").open("ab")
        return subprocess.Popen(command, env={**os.environ, **self.environment(name)}, stdout=said, stderr=said)

    def environment(self, name: str = "one") -> dict[str, str]:
        """What the chart would tell an operator, and what a test wants said otherwise."""
        return {
            "KUBECONFIG": str(self.of_operators),
            "COWEST_IMAGE_SERVING": "serving:test",
            "COWEST_IMAGE_TRAINING": "training:test",
            "POD_NAMESPACE": OPERATORS,
            "POD_NAME": name,
            "COWEST_METRICS_PORT": "0",
            "COWEST_HEALTH_PORT": "0",
            "COWEST_SERVICE_URL": f"http://127.0.0.1:{self._doors.server_address[1]}/{{namespace}}/{{service}}",
            **self.told,
        }

    def log(self, name: str = "one") -> str:
        return (self.folder / f"operator-{name}.log").read_text(errors="replace")

    # ------------------------------------------------------------ what the world does
    def collect_garbage(self, uid: str) -> None:
        """What Kubernetes does with the children of an owner that is gone."""
        for path in (*CHILDREN, PODS):
            for item in self.items(path):
                if uid in [owner["uid"] for owner in item["metadata"].get("ownerReferences", ())]:
                    self._remove(path, item)

    def empty(self) -> None:
        for path in (JOBS, *CHILDREN, PODS, EVENTS):
            for item in self.items(path):
                self._remove(path, item)

    def _remove(self, path: str, item: Mapping[str, Any]) -> None:
        address = f"{path}/{item['metadata']['name']}"
        if item["metadata"].get("finalizers"):
            self.server.request("PATCH", address, {"metadata": {"finalizers": None}})
        self.server.request("DELETE", address, {"gracePeriodSeconds": 0} if path == PODS else None)

    # ------------------------------------------------------------ what tests ask
    def get(self, path: str) -> Any:
        status, body = self.server.request("GET", path)
        return body if status == 200 else None

    def items(self, path: str) -> list[dict[str, Any]]:
        found = self.get(path)
        return list(found["items"]) if found else []

    def job(self, name: str) -> dict[str, Any]:
        found = self.get(f"/apis/cowest.dev/v1alpha1/namespaces/{NAMESPACE}/collaborationjobs/{name}")
        assert found is not None, f"there is no job {name}"
        return dict(found)

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((c for c in self.status(name).get("conditions", ()) if c["type"] == kind), {})

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        wait_until(condition, f"{what}\n{self.log()[-3000:]}" if (self.folder / "operator-one.log").exists() else what,
                   seconds)  # fmt: skip

    # ------------------------------------------------------------ stand-ins
    def _play(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self._turn()
            except (OSError, http.client.HTTPException) as error:  # the API server stands still; the next one finds it
                log.warning("the stand-ins did not end a turn: %r", error)

    def _turn(self) -> None:
        for deployment in self.items(DEPLOYMENTS):
            self._deployment(deployment)
        if self.script.kserve_works:
            for service in self.items(SERVING):
                self._inference_service(service)
        if self.script.argo_works:
            for workflow in self.items(WORKFLOWS):
                self._workflow(workflow)

    def _deployment(self, body: Mapping[str, Any]) -> None:
        generation, status = body["metadata"]["generation"], body.get("status") or {}
        replicas = body["spec"].get("replicas", 1)
        stuck = not self.script.rolls_out and status.get("replicas", 0) and generation > 1
        refused = self.script.quota and body["metadata"]["name"].endswith("-predictor")
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": self.script.quota}
        wanted = {
            "observedGeneration": generation, "replicas": replicas + bool(stuck),
            "updatedReplicas": 1 if stuck else replicas, "readyReplicas": replicas, "availableReplicas": replicas,
            **({"conditions": [failure], "unavailableReplicas": replicas} if refused else {"conditions": []}),
        }  # fmt: skip
        if status.get("observedGeneration") == generation and _counts(status) == _counts(wanted):
            return
        self._patch_status(f"{DEPLOYMENTS}/{body['metadata']['name']}", wanted)

    def _inference_service(self, body: Mapping[str, Any]) -> None:
        """As KServe does it, its Deployment bears the labels of the InferenceService; without it nothing is ready."""
        name = body["metadata"]["name"]
        if self.get(f"{DEPLOYMENTS}/{name}-predictor") is None:
            self.server.request("POST", DEPLOYMENTS, predictor(body))
            self.script.predictors.append(name)
        known = next(iter((body.get("status") or {}).get("conditions") or []), {})
        wanted = "False" if self.script.quota else "True"
        if known.get("status") == wanted:
            return
        ready = {"type": "Ready", "status": wanted, "lastTransitionTime": _now()}
        self._patch_status(f"{SERVING}/{body['metadata']['name']}", {"conditions": [ready]})

    def _workflow(self, body: Mapping[str, Any]) -> None:
        """Runs for a moment; ends as the script says."""
        phase = (body.get("status") or {}).get("phase")
        path = f"{WORKFLOWS}/{body['metadata']['name']}"
        if phase in ("Succeeded", "Failed", "Error"):
            return
        if phase is None:
            self.server.request("PATCH", path, {"status": {"phase": "Running", "startedAt": _now()}})
            return
        labels = body["metadata"]["labels"]
        step, attempt = labels["cowest.dev/step"].split("-", 1)[-1], int(labels["cowest.dev/attempt"])
        if len(endings := self.script.endings.get(step, [])) >= attempt:
            told = {"finishedAt": _now(), **endings[attempt - 1]}
            self.server.request("PATCH", path, {"status": told})
            return
        codes = self.script.exit_codes.get(step, [])
        code = codes[attempt - 1] if attempt <= len(codes) else 0
        node = {"type": "Pod", "finishedAt": _now(), "outputs": {"exitCode": str(code)}, "message": f"code {code}"}
        ended = {"phase": "Failed" if code else "Succeeded", "finishedAt": _now(), "nodes": {"a": node}}
        self.server.request("PATCH", path, {"status": ended})

    def _patch_status(self, path: str, status: Mapping[str, Any]) -> None:
        self.server.request("PATCH", f"{path}/status", {"status": dict(status)})

    def end_pod_of(self, workflow: str, seconds_ago: float) -> None:
        """A pod of the Workflow that did its work and ended so long ago."""
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))
        metadata = {"name": "over", "labels": {"workflows.argoproj.io/workflow": workflow, "cowest.dev/job": "claims",
                                               "app.kubernetes.io/component": "step"}}  # fmt: skip
        body = {"metadata": metadata, "spec": {"containers": [{"name": "main", "image": "x"}]}}
        assert self.server.request("POST", PODS, body)[0] == 201
        state = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": finished}}
        main = {"name": "main", "state": state, "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        told = {"status": {"phase": "Succeeded", "containerStatuses": [main]}}
        status, answer = self.server.request("PATCH", f"{PODS}/over/status", told)
        assert status == 200, answer

    # ------------------------------------------------------------ the job's pods
    def answer(self, service: str, path: str, query: Mapping[str, list[str]]) -> tuple[int, Any]:
        """What observer, proxy and weak-model servers say."""
        if service.endswith("-observer"):
            if self.script.store_away:
                return 503, {"error": {"message": "the object store at http://minio does not answer."}}
            if path == "/v1/traces":
                return 200, self.script.traces
            return self._artifact(service.removesuffix("-observer"), query["uri"][0])
        if service.endswith("-gateway"):
            return 200, {"ready": True, "routing_version": 1, "strong": self.script.strong}
        if service.endswith("-proxy"):
            return 200, {
                "calls": 10,
                "tokens": 100,
                "money": "0.5",
                "round": {"calls": 1, "tokens": 10, "money": "0.1"},
            }
        for each in self.items(SERVING):
            if service == f"{each['metadata']['name']}-predictor":
                digest = each["metadata"]["annotations"]["cowest.dev/model-digest"]
                return 200, {"data": [{"id": "weak", "digest": digest}]}
        return 404, {}

    def _artifact(self, job: str, uri: str) -> tuple[int, Any]:
        if uri.endswith("manifest.json"):
            made_by = uri.split("/")[-3] + "-" + uri.split("/")[-2]
            if made_by in self.script.left_nothing:
                return 404, {}
            return 200, {
                "metrics": self.script.metrics, "digest": f"sha256:{_hex(job + made_by)}", "started": _now(),
            }  # fmt: skip
        trial = self.status(job)["state"].get("candidate")
        pair = self.status(job).get("candidate", {}).get("digest")
        stable = self.status(job).get("stable", {})
        control = stable["digest"] if stable.get("serving") == "Pair" else "solo"
        if uri.endswith("report.json"):
            return 200, self._report(str(pair), control)
        if trial is None or "-" not in uri or not self.script.live_works:
            return 404, {}
        step = int(uri.rsplit("-", 1)[1].removesuffix(".json"))
        if step >= self.script.live_steps:
            return 404, {}
        better = self.script.live_better_by
        seen = world.comparison(better, 0.01 if better > 0 else 0.9999, 0.99 if better > 0 else 1e-9, n=1000)
        live = replace(
            world.live(1000, 1000, step=step), candidate=str(pair), control=control, comparison=seen,
            updated=time.time(),
        )  # fmt: skip
        return 200, asdict(live)

    def _report(self, pair: str, control: str) -> dict[str, Any]:
        better = self.script.better_by
        seen = world.comparison(better, 1e-9 if better > 0 else 0.9999, 0.9999 if better > 0 else 1e-9)
        return asdict(
            world.report(pair, control, against_control=seen, against_solo=seen,
                         strong_version=self.script.strong_version)
        )  # fmt: skip

    def _door_handler(self) -> type[BaseHTTPRequestHandler]:
        playground = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                _, _, service, *rest = parts.path.split("/")
                status, body = playground.answer(service, "/" + "/".join(rest), parse_qs(parts.query))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # an operator that was killed
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def through_kube(server: ApiServer, folder: Path, question: Callable[[Kube], Awaitable[T]]) -> T:
    """What a client of the operator's own kind finds."""
    path = folder / "kubeconfig-of-a-client.json"
    path.write_text(json.dumps(server.kubeconfig()))

    async def ask() -> T:
        configuration = client.Configuration()
        await config.load_kube_config(str(path), client_configuration=configuration)  # type: ignore[no-untyped-call]
        kube = Kube(client.ApiClient(configuration))
        try:
            return await question(kube)
        finally:
            await kube.close()

    return asyncio.run(ask())


class Wire:
    """A way to the API server that can be cut, as when it restarts, or fall silent, as when a node is lost."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.silent, self.port = server, False, free_port()
        self._ends: list[socket.socket] = []
        self.mend()

    def kubeconfig(self) -> dict[str, Any]:
        """By this way, and by the certificate of the server itself."""
        config = self.server.kubeconfig()
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self.port}"
        return config

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """From now on the port refuses."""
        for each in (self._listener, *self._ends):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._ends.clear()

    def _take(self, listener: socket.socket) -> None:
        to = urlsplit(self.server.url)
        with suppress(OSError):  # it was cut
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((str(to.hostname), to.port))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.silent:
                    to.sendall(data)
            to.shutdown(socket.SHUT_WR)


def predictor(service: Mapping[str, Any]) -> dict[str, Any]:
    """The Deployment that KServe makes of an InferenceService."""
    metadata, labels = service["metadata"], {"app": f"isvc.{service['metadata']['name']}-predictor"}
    owner = {"apiVersion": service["apiVersion"], "kind": service["kind"], "name": metadata["name"],
             "uid": metadata["uid"], "controller": True, "blockOwnerDeletion": True}  # fmt: skip
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "kserve-container", "image": "x"}]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": f"{metadata['name']}-predictor",
            "namespace": metadata["namespace"],
            "labels": {**(metadata.get("labels") or {}), **labels},
            "ownerReferences": [owner],
        },
        "spec": {"selector": {"matchLabels": labels}, "template": pod},
    }


def _counts(status: Mapping[str, Any]) -> tuple[Any, ...]:
    """What may change of a Deployment that is as it was."""
    return status.get("replicas"), status.get("updatedReplicas"), bool(status.get("conditions"))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
