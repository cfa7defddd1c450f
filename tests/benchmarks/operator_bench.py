"""What the operator costs an API server: writes, reconcile time and memory with many jobs, a naive operator beside it.

    python tests/benchmarks/operator_bench.py [--jobs 1000] [--rest-seconds 600] [--change-seconds N]

A real kube-apiserver and etcd run on loopback ports. The operator and the naive one (naive_operator.py) are real
processes, one after the other. Deployment controller, KServe, Argo and the job's pods are played by this process, which
is driven by watches. Each party is a user of its own, and writes are counted from the API server's audit log.

The jobs go through a baseline with a canary of two steps until they wait for traces; then nothing happens; then their
manifests are edited. A transition is one new version of a job in which a condition (status or reason), the number of
rounds, the candidate's round or stage, or the canary step differs; `..._or_step` counts a finished step of the round
as one too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
from aiohttp import web  # noqa: E402

from cowest_cli.processes import free_port  # noqa: E402
from cowest_operator import api, kube, manifest  # noqa: E402
from tests import world  # noqa: E402
from tests.apiserver import conftest  # noqa: E402
from tests.apiserver.playground import FOREIGN, foreign_crd, predictor  # noqa: E402
from tests.manifests import edited, smallest  # noqa: E402

OPERATOR, NAIVE, STAGE, PERSON = "cowest-operator", "naive-operator", "stand-ins", "person"
WRITES = ("create", "update", "patch", "delete", "deletecollection")
STUCK = 180.0  # seconds without a change of any job, after which those not at rest are given up
SETTLE = 75.0  # seconds: a status that only says something else is written after a minute
AT_ONCE = 16  # requests of the stand-ins, and of the person who makes the jobs
STEPS = [{"weightPercent": 20, "minAnswers": 10}, {"weightPercent": 50, "minAnswers": 20}]
MANIFEST: Mapping[str, Any] = {
    "weak.model": "s3://models/base",
    "data.train": "s3://data/train.jsonl",
    "data.heldOut": "s3://data/held_out.jsonl",
    "objectStore": {"bucket": "cowest", "endpoint": "http://minio:9000", "credentialsSecretRef": {"name": "s3"}},
    "strong.apiKeySecretRefs": [{"name": "strong", "key": "api-key"}],
    "rounds": {"max": 1, "trigger": {"newTraces": 100}},
    "gate": {"minHeldOut": 100},
    "canary": {"steps": STEPS, "deadlineSeconds": 36000},
    "gateway": {"replicas": 2},
    "weak.replicas": 1,
}
METRICS = {"has_explanations": True, "pairs": 200, "rows": 500, "held_out": 500}
AUDIT = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
- {level: None, verbs: [get, list, watch]}
- {level: Metadata}
"""
# What a spec change is, and the child that shows it.
CHANGES: Mapping[str, tuple[str, str]] = {
    "gateway.replicas": ("Deployment", "-gateway"),
    "weak.replicas": ("InferenceService", ""),
}
WATCHED = tuple(kind for kind in kube.PLURALS if kind not in ("Pod", "Event"))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# ---------------------------------------------------------------- the API server
@dataclass(frozen=True)
class Cluster:
    """One API server, its users and its audit log."""

    url: str
    ca_file: Path
    tokens: Mapping[str, str]
    audit: Path
    pid: int = 0

    def seconds_of_cpu(self) -> float:
        return seconds_of_cpu(self.pid)

    def seen_by(self, user: str) -> conftest.ApiServer:
        return conftest.ApiServer(self.url, self.tokens[user], self.ca_file, self.audit)

    def kubeconfig(self, folder: Path, user: str) -> Path:
        path = folder / f"{user}.kubeconfig"
        path.write_text(json.dumps(self.seen_by(user).kubeconfig()))
        return path


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """As in tests/apiserver, with room for thousands of Services, a user for each party, and an audit log."""
    etcd, server = (conftest.find_binary(name) for name in ("etcd", "kube-apiserver"))
    if etcd is None or server is None:
        missing = "etcd" if etcd is None else "kube-apiserver"
        raise SystemExit(
            f"{missing}: wanted an executable in KUBEBUILDER_ASSETS, on PATH or in {conftest.CACHE}, saw none; "
            "`setup-envtest use` fetches it."
        )
    port, certs = free_port(), folder / "certs"
    certs.mkdir()
    tokens = {user: secrets.token_hex(16) for user in (OPERATOR, NAIVE, STAGE, PERSON)}
    (folder / "tokens.csv").write_text("".join(f'{t},{u},{u},"system:masters"\n' for u, t in tokens.items()))
    (folder / "audit.yaml").write_text(AUDIT)
    conftest._write_key(folder / "service-account.key")
    cluster = Cluster(f"https://127.0.0.1:{port}", certs / "apiserver.crt", tokens, folder / "audit.log")
    known = cluster.seen_by(PERSON)
    with conftest._etcd(etcd, folder) as etcd_url:
        command = [
            str(server), "--etcd-servers", etcd_url, "--cert-dir", str(certs), "--bind-address", "127.0.0.1",
            "--advertise-address", "127.0.0.1", "--secure-port", str(port),
            "--token-auth-file", str(folder / "tokens.csv"),
            "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.0.0.0/16", "--allow-privileged",
            "--disable-admission-plugins", "ServiceAccount",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", str(folder / "service-account.key"),
            "--service-account-signing-key-file", str(folder / "service-account.key"),
            "--audit-policy-file", str(folder / "audit.yaml"), "--audit-log-path", str(cluster.audit),
        ]  # fmt: skip
        log = folder / "kube-apiserver.log"
        with conftest._process(command, log) as process:
            conftest.wait_until(lambda: conftest._alive(process, log) and conftest._ready(known), "kube-apiserver")
            for crd in (manifest.crd(), *(foreign_crd(*each) for each in FOREIGN)):
                status, answer = known.request("POST", conftest.CRDS, crd)
                assert status == 201, answer
            for kind in (api.KIND, *(each[2] for each in FOREIGN)):
                path = path_of(kind, "default")
                conftest.wait_until(lambda path=path: known.request("GET", path)[0] == 200, f"the API server: {kind}")  # type: ignore[misc]
            yield replace(cluster, pid=process.pid)


def seconds_of_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def path_of(kind: str, namespace: str, name: str = "") -> str:
    version, plural = kube.PLURALS[kind]
    root = "/api/v1" if version == "v1" else f"/apis/{version}"
    return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


class Audit:
    """The log, read on from where it was read last."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.took: list[tuple[str, float]] = []  # (user, seconds of the API server), of the last call's writes

    def news(self) -> Counter[tuple[str, str, str]]:
        """(user, verb, resource) -> requests since the last call. Refused ones count: the API server had to answer."""
        found: Counter[tuple[str, str, str]] = Counter()
        self.took = []
        with self.path.open("rb") as log:
            log.seek(self.at)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self.at += len(line)
                entry = json.loads(line)
                if entry["verb"] in WRITES and (thing := entry.get("objectRef")):
                    found[entry["user"]["username"], entry["verb"], thing["resource"]] += 1
                    began, ended = (
                        datetime.fromisoformat(entry[name]) for name in ("requestReceivedTimestamp", "stageTimestamp")
                    )
                    self.took.append((entry["user"]["username"], (ended - began).total_seconds()))
        return found


class Client:
    """One user of the API server."""

    def __init__(self, cluster: Cluster, user: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = cluster.url, session
        self.headers = {"Authorization": f"Bearer {cluster.tokens[user]}", "User-Agent": user}

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body)
        headers = {**self.headers, "Content-Type": kind}
        async with self.session.request(method, self.url + path, data=data, headers=headers) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    async def watch(self, path: str, slim: bool) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(type, object) of each change; `slim`: metadata only. Goes on where a watch ended; no kind, no changes."""
        status, listed = await self.ask("GET", path)
        if status == 404:
            return
        version = listed["metadata"]["resourceVersion"]
        for item in listed["items"]:
            yield "ADDED", item
        metadata = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
        headers = {**self.headers, "Accept": metadata if slim else "application/json"}
        while True:
            query = f"?watch=true&resourceVersion={version}&timeoutSeconds=3600"
            async with self.session.get(self.url + path + query, headers=headers) as answer:
                rest = b""
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(f"the watch of {path} broke: {event['object'].get('message')}")
                        version = event["object"]["metadata"]["resourceVersion"]
                        yield event["type"], event["object"]


# ---------------------------------------------------------------- what is seen
@dataclass
class Seen:
    """The jobs of one namespace, and what changed, told by watches: what a no-op write leaves out."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    transitions: int = 0
    progress: int = 0  # the same, the steps that a round has done counted too
    versions: int = 0
    children: Counter[str] = field(default_factory=Counter)  # kind -> changes of content
    at: dict[tuple[str, str], float] = field(default_factory=dict)  # (kind, name) -> when its content changed last
    _generations: dict[tuple[str, str], int] = field(default_factory=dict)

    def job(self, event: str, body: dict[str, Any]) -> None:
        name = body["metadata"]["name"]
        before = self.jobs.get(name)
        if event == "DELETED":
            self.jobs.pop(name, None)
            return
        self.jobs[name] = body
        if before is None:
            return
        self.versions += 1
        self.transitions += story(before) != story(body)
        self.progress += (story(before), done(before)) != (story(body), done(body))

    def child(self, event: str, kind: str, body: Mapping[str, Any]) -> None:
        """Status is no content: where there is a generation, that tells."""
        metadata = body["metadata"]
        key = kind, metadata["name"]
        if kind == "Workflow" and event == "MODIFIED":
            return  # Argo's doing: its status is no subresource
        generation = metadata.get("generation")
        if event == "MODIFIED" and generation is not None and self._generations.get(key) == generation:
            return
        self._generations[key] = generation or 0
        self.children[kind] += 1
        self.at[key] = time.monotonic()


def story(job: Mapping[str, Any]) -> Any:
    """What makes a transition when it differs."""
    status = job.get("status") or {}
    conditions = sorted((c["type"], c["status"], c["reason"]) for c in status.get("conditions", ()))
    rounds, candidate = status.get("rounds") or [], status.get("candidate") or {}
    last = rounds[-1]["number"] if rounds else None
    return conditions, last, candidate.get("round"), candidate.get("stage"), (status.get("traffic") or {}).get("step")


def done(job: Mapping[str, Any]) -> Any:
    candidate = ((job.get("status") or {}).get("state") or {}).get("candidate") or {}
    return sorted(candidate.get("done") or ())


def condition(job: Mapping[str, Any], kind: str) -> tuple[str, str]:
    conditions = (job.get("status") or {}).get("conditions", ())
    return next(((c["status"], c["reason"]) for c in conditions if c["type"] == kind), ("", ""))


# ---------------------------------------------------------------- the stand-ins
class Stage:
    """Deployment controller, KServe, Argo and the pods' doors for one namespace; each event is answered once."""

    def __init__(self, client: Client, namespace: str, seen: Seen) -> None:
        self.client, self.namespace, self.seen = client, namespace, seen
        self.digests: dict[str, str] = {}  # InferenceService -> digest
        self._work: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._pods: set[str] = set()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._worker())
            for kind in WATCHED:
                group.create_task(self._watch(kind))

    async def _worker(self) -> None:
        while True:
            await (await self._work.get())()

    async def _watch(self, kind: str) -> None:
        act = {"Deployment": self._deployment, "InferenceService": self._server, "Workflow": self._workflow}.get(kind)
        slim = act is None and kind != api.KIND
        async for event, body in self.client.watch(path_of(kind, self.namespace), slim):
            if kind == api.KIND:
                self.seen.job(event, body)
                continue
            if not body["metadata"]["name"].endswith("-predictor"):  # that one is KServe's
                self.seen.child(event, kind, body)
            if act is not None:
                self._work.put_nowait(lambda act=act, event=event, body=body: act(event, body))  # type: ignore[misc]

    async def _deployment(self, event: str, body: Mapping[str, Any]) -> None:
        name, generation = body["metadata"]["name"], body["metadata"]["generation"]
        if event == "DELETED":
            self._pods.discard(name)
            await self.client.ask("DELETE", path_of("Pod", self.namespace, f"{name}-0"))
            return
        if (body.get("status") or {}).get("observedGeneration") == generation:
            return
        if name not in self._pods:
            self._pods.add(name)
            await self._pod(name, body["spec"]["template"]["metadata"]["labels"])
        count = body["spec"].get("replicas", 1)
        status = {
            "observedGeneration": generation, "replicas": count, "updatedReplicas": count, "readyReplicas": count,
            "availableReplicas": count,
        }  # fmt: skip
        await self._status("Deployment", name, status)

    async def _pod(self, deployment: str, labels: Mapping[str, str]) -> None:
        """One for each Deployment: operators watch pods for their words."""
        name, container = f"{deployment}-0", {"name": "main", "image": "bench:1"}
        body = {"metadata": {"name": name, "labels": dict(labels)}, "spec": {"containers": [container]}}
        await self.client.ask("POST", path_of("Pod", self.namespace), body)
        await self._status("Pod", name, {"phase": "Running"})

    async def _server(self, event: str, body: Mapping[str, Any]) -> None:
        name = body["metadata"]["name"]
        if event == "DELETED" or name in self.digests:
            return
        self.digests[name] = body["metadata"]["annotations"]["cowest.dev/model-digest"]
        made = predictor(body)
        made["spec"]["template"]["metadata"]["labels"] |= body["metadata"]["labels"]
        await self.client.ask("POST", path_of("Deployment", self.namespace), made)
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": _now()}
        await self._status("InferenceService", name, {"conditions": [ready]})

    async def _workflow(self, event: str, body: Mapping[str, Any]) -> None:
        path = path_of("Workflow", self.namespace, body["metadata"]["name"])
        phase = (body.get("status") or {}).get("phase")
        if event == "DELETED" or phase not in (None, "Running"):
            return
        status: dict[str, Any] = {"phase": "Running", "startedAt": _now()}
        if phase == "Running":
            node = {"type": "Pod", "finishedAt": _now(), "outputs": {"exitCode": "0"}}
            status = {"phase": "Succeeded", "finishedAt": _now(), "nodes": {"a": node}}
        await self.client.ask("PATCH", path, {"status": status})

    async def _status(self, kind: str, name: str, status: Mapping[str, Any]) -> None:
        await self.client.ask("PATCH", path_of(kind, self.namespace, name) + "/status", {"status": dict(status)})

    # ------------------------------------------------------------ doors
    @contextlib.asynccontextmanager
    async def doors(self) -> AsyncIterator[str]:
        """Observers, proxies and weak-model servers of all jobs behind one port; their address as a template."""
        app = web.Application()
        app.router.add_get("/{namespace}/{service}/{path:.*}", self._answer)
        runner, port = web.AppRunner(app, access_log=None), free_port()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            yield f"http://127.0.0.1:{port}/{{namespace}}/{{service}}"
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        service, path = request.match_info["service"], request.match_info["path"]
        if service.endswith("-proxy"):
            part = {"calls": 1, "tokens": 10, "money": "0.1"}
            return web.json_response({"calls": 10, "tokens": 100, "money": "0.5", "round": part})
        if service.endswith("-predictor"):
            digest = self.digests.get(service.removesuffix("-predictor"))
            return web.json_response({"data": [{"id": "weak", "digest": digest}]})
        if service.endswith("-gateway"):
            return web.json_response({"ready": True, "routing_version": 1, "strong": {}})
        if path == "v1/traces":
            return web.json_response({"all": 0, "usable": 0, "reason": ""})
        found = self._artifact(service.removesuffix("-observer"), request.query["uri"])
        return web.json_response(found, status=404 if found is None else 200)

    def _artifact(self, job: str, uri: str) -> Any:
        """Each candidate is better, offline and live."""
        *_, run, name = uri.split("/")
        if name == "manifest.json":
            return {"metrics": METRICS, "digest": f"sha256:{hashlib.sha256((job + run).encode()).hexdigest()}"}
        pair = ((self.seen.jobs[job].get("status") or {}).get("candidate") or {}).get("digest", "")
        better = world.comparison(0.2, 1e-9, 0.9999)
        if name == "report.json":
            return asdict(world.report(pair, "solo", against_control=better, against_solo=better, strong_version="v1"))
        step = int(name.rsplit("-", 1)[1].removesuffix(".json"))
        live = world.live(1000, 1000, step=step)
        return asdict(replace(live, candidate=pair, control="solo", comparison=better, updated=time.time()))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---------------------------------------------------------------- the operators
@dataclass(frozen=True)
class Process:
    """An operator under measurement."""

    user: str
    child: subprocess.Popen[bytes]
    metrics: str = ""

    def memory(self) -> tuple[float, float]:
        """(now, peak) of its resident memory in MB of a million bytes."""
        if self.child.poll() is not None:
            raise SystemExit(f"{self.user} ended with {self.child.returncode}; --work keeps its log.")
        lines = Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
        found = {name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
                 if name in ("VmRSS", "VmHWM")}  # fmt: skip
        return found["VmRSS"] * 1.024e-3, found["VmHWM"] * 1.024e-3

    def seconds_of_cpu(self) -> float:
        return seconds_of_cpu(self.child.pid)

    def buckets(self) -> dict[float, int]:
        """Of the histogram of reconcile times: upper bound -> looks that took no longer."""
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        head = 'cowest_operator_reconcile_seconds_bucket{le="'
        pairs = (line.removeprefix(head).split('"} ') for line in lines if line.startswith(head))
        return {float(bound.replace("+Inf", "inf")): int(count) for bound, count in pairs}


@contextlib.contextmanager
def running(
    user: str, command: list[str], environment: Mapping[str, str], log: Path, metrics: str = ""
) -> Iterator[Process]:
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield Process(user, child, metrics)
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def quantile(before: Mapping[float, int], after: Mapping[float, int], share: float) -> float:
    """Milliseconds; linear inside a bucket, as Prometheus' histogram_quantile."""
    grown = {bound: after[bound] - before[bound] for bound in sorted(after)}
    wanted, low, below = share * max(grown.values()), 0.0, 0
    for bound, count in grown.items():
        if count >= wanted:
            if bound == float("inf"):
                return low * 1000.0
            return 1000.0 * (low + (bound - low) * (wanted - below) / max(1, count - below))
        low, below = bound, count
    return low * 1000.0


def rank(values: list[float], share: float) -> float:
    """Milliseconds."""
    return 1000.0 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


# ---------------------------------------------------------------- the phases
class Run:
    """One operator and its namespace of jobs, phase by phase."""

    def __init__(
        self, cluster: Cluster, stage: Stage, person: Client, audit: Audit, options: argparse.Namespace
    ) -> None:
        self.cluster, self.stage, self.person, self.audit, self.options = cluster, stage, person, audit, options
        self.seen, self.namespace = stage.seen, stage.namespace
        self.stuck: list[str] = []  # jobs that never came to rest
        self.edits: Counter[str] = Counter()  # of each job
        self.refused = 0  # edits that the API server had no time for, asked again

    async def load(self, process: Process, jobs: int, at_rest: Callable[[Mapping[str, Any]], bool]) -> Counter[str]:
        """Jobs are made and followed until all of them rest; the operator's writes until then, by resource."""
        self.audit.news()
        begun, slots = time.monotonic(), asyncio.Semaphore(AT_ONCE)

        async def make(number: int) -> None:
            async with slots:
                job = edited(
                    {"/metadata.name": f"job-{number:04d}", "/metadata.namespace": self.namespace, **MANIFEST},
                    smallest(),
                )
                status, answer = await self.person.ask("POST", path_of(api.KIND, self.namespace), job)
                assert status == 201, answer

        await asyncio.gather(*(make(number) for number in range(jobs)))
        said, moved, versions = 0.0, begun, 0
        while (resting := sum(at_rest(job) for job in self.seen.jobs.values())) < jobs:
            await asyncio.sleep(0.5)
            now, (rss, _) = time.monotonic(), process.memory()
            if versions != self.seen.versions:
                moved, versions = now, self.seen.versions
            if now - moved > STUCK:
                self.stuck = sorted(name for name, job in self.seen.jobs.items() if not at_rest(job))
                say(f"{process.user}: no job has moved for {STUCK:.0f} s; not at rest: {', '.join(self.stuck[:10])}")
                break
            if now - said > 20.0:
                said = now
                say(f"{process.user}: {resting} of {jobs} jobs rest after {now - begun:.0f} s, {rss:.0f} MB")
        say(
            f"{process.user}: {resting} of {jobs} jobs rest after {time.monotonic() - begun:.0f} s and "
            f"{process.seconds_of_cpu():.0f} s of CPU; {SETTLE:.0f} s to settle"
        )
        await asyncio.sleep(SETTLE)
        return self.writes(process.user)

    async def rest(self, process: Process, seconds: float) -> Counter[str]:
        cpu, begun = process.seconds_of_cpu(), time.monotonic()
        while (left := seconds - (time.monotonic() - begun)) > 0:
            say(f"{process.user}: nothing changes, {left:.0f} s left, {process.memory()[0]:.0f} MB")
            await asyncio.sleep(min(60.0, left))
        found = self.writes(process.user)
        used = (process.seconds_of_cpu() - cpu) / max(1.0, seconds)
        say(f"{process.user}: {dict(found)} written in {seconds:.0f} s at rest; {100 * used:.0f} % of a core")
        return found

    async def change(self, seconds: float, rate: float, field_name: str) -> list[float]:
        """Edits at an even pace, job after job; seconds from the answer to each until its child is another."""
        kind, suffix = CHANGES[field_name]
        section, name = field_name.split(".")
        value, jobs = MANIFEST[section][name] if section in MANIFEST else MANIFEST[field_name], sorted(self.seen.jobs)
        begun, tasks = time.monotonic(), []
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            job = jobs[number % len(jobs)]
            self.edits[job] += 1
            spec = {section: {name: value + self.edits[job] % 2}}  # another value than it has
            children = [key for key in self.seen.at if key[0] == kind and key[1].startswith(f"{job}-")
                        and key[1].endswith(suffix)]  # fmt: skip
            tasks.append(asyncio.create_task(self._changed(job, spec, children[0])))
        say(f"{len(tasks)} edits of spec.{field_name} in {time.monotonic() - begun:.1f} s")
        return [late for late in await asyncio.gather(*tasks) if late is not None]

    async def _changed(self, job: str, spec: Mapping[str, Any], child: tuple[str, str]) -> float | None:
        asked, status = time.monotonic(), 0
        while status != 200:
            status, answer = await self.person.ask(
                "PATCH", path_of(api.KIND, self.namespace, job), {"spec": dict(spec)}
            )
            assert status == 200 or status == 429 or status >= 500, answer
            self.refused += status != 200  # an API server out of breath: a person asks again
        answered = time.monotonic()
        while self.seen.at[child] < asked:
            if time.monotonic() - answered > 60.0:
                return None
            await asyncio.sleep(0.005)
        return max(0.0, self.seen.at[child] - answered)

    def writes(self, user: str) -> Counter[str]:
        """Since they were asked for last; Leases, which are renewed whatever happens, left out."""
        found: Counter[str] = Counter()
        for (who, _, resource), count in self.audit.news().items():
            if who == user and resource != "leases":
                found[resource] += count
        return found


@dataclass(frozen=True)
class Load:
    """What the way to rest has cost."""

    jobs: int  # writes to jobs and their status
    events: int
    children: int
    transitions: int
    progress: int
    changed: int

    @classmethod
    def of(cls, writes: Counter[str], seen: Seen) -> Load:
        jobs, events = writes[api.PLURAL], writes["events"]
        children = sum(writes.values()) - jobs - events
        return cls(jobs, events, children, seen.transitions, seen.progress, sum(seen.children.values()))

    def said(self, user: str) -> str:
        each = max(1, self.transitions)
        return (
            f"{user}: {self.jobs} writes to jobs, {self.transitions} transitions: {self.jobs / each:.2f} each "
            f"({self.jobs / max(1, self.progress):.2f} when a step of a round that is done counts as one); "
            f"{self.children} writes to children, {self.changed} changes of them: "
            f"{self.children / max(1, self.changed):.2f} each; events: {self.events / each:.2f} a transition"
        )


async def measure_ours(run: Run, address: str, work: Path) -> dict[str, Any]:
    options, port = run.options, free_port()
    environment = {
        "KUBECONFIG": str(run.cluster.kubeconfig(work, OPERATOR)),
        "COWEST_IMAGE_SERVING": "serving:bench",
        "COWEST_IMAGE_TRAINING": "training:bench",
        "COWEST_NAMESPACES": run.namespace,
        "POD_NAMESPACE": run.namespace,
        "POD_NAME": "bench",
        "COWEST_METRICS_PORT": str(port),
        "COWEST_HEALTH_PORT": "0",
        "COWEST_SERVICE_URL": address,
    }
    profiled = ["-m", "cProfile", "-o", str(options.profile)] if options.profile else []
    command = [sys.executable, "-P", *profiled, "-m", "cowest_operator.main"]
    with running(OPERATOR, command, environment, work / "operator.log", f"http://127.0.0.1:{port}/metrics") as process:
        writes = await run.load(process, options.jobs, waits_for_traces)
        load = Load.of(writes, run.seen)
        say(load.said(OPERATOR))
        rest = await run.rest(process, options.rest_seconds)
        rss, peak = process.memory()
        seconds = options.change_seconds or min(20.0, options.jobs / options.rate)
        fast = await edits_seen(run, process, seconds, options.rate)
        say(
            f"{OPERATOR}: {rss:.0f} MB at rest, {process.memory()[0]:.0f} MB after the edits, "
            f"peak {process.memory()[1]:.0f} MB"
        )
        slow = await edits_seen(run, process, min(20.0, options.jobs / options.slow_rate), options.slow_rate)
    return {
        "jobs": options.jobs,
        "jobs_stuck": len(run.stuck),
        "writes_per_transition": round(load.jobs / max(1, load.transitions), 2),
        "writes_at_rest": sum(rest.values()),
        **fast,
        **{f"slow_{name}": value for name, value in slow.items()},
        "rss_mb": round(rss, 1),
        "rss_peak_mb": round(peak, 1),
        "child_writes_per_change": round(load.children / max(1, load.changed), 2),
        "events_per_transition": round(load.events / max(1, load.transitions), 2),
        "writes_per_transition_or_step": round(load.jobs / max(1, load.progress), 2),
        "events_per_transition_or_step": round(load.events / max(1, load.progress), 2),
    }


async def edits_seen(run: Run, process: Process, seconds: float, rate: float) -> dict[str, float]:
    """So many edits a second, until what they lead to is over."""
    run.writes(OPERATOR)
    run.refused = 0
    before, children = await asyncio.to_thread(process.buckets), run.seen.children.copy()
    cpu, server, begun = process.seconds_of_cpu(), run.cluster.seconds_of_cpu(), time.monotonic()
    late = await run.change(seconds, rate, run.options.change)
    until_done = time.monotonic() - begun
    used, servers = process.seconds_of_cpu() - cpu, run.cluster.seconds_of_cpu() - server
    await asyncio.sleep(10.0)  # the last looks
    after = await asyncio.to_thread(process.buckets)
    changed, edits = run.writes(OPERATOR), max(1, int(seconds * rate))
    answers = [took for who, took in run.audit.took if who == OPERATOR]
    say(f"the API server had no time for {run.refused} requests of the person who edits")
    say(f"{OPERATOR}: {dict(changed)} written for {edits} edits, children changed: "
        f"{dict(run.seen.children - children)}; until the last was done {until_done:.1f} s, an edit "
        f"{1000 * used / edits:.0f} ms of CPU, of the API server {1000 * servers / edits:.0f} ms")  # fmt: skip
    say(
        f"{OPERATOR}: a look took {quantile(before, after, 0.5):.0f} ms (p50), "
        f"{quantile(before, after, 0.99):.0f} ms (p99); from the answer to an edit until its child was another, "
        f"{len(late)} of {edits} seen: {rank(late, 0.5):.0f} ms, {rank(late, 0.99):.0f} ms"
    )
    say(
        f"{OPERATOR}: of that the API server took, a write: {rank(answers, 0.5):.0f} ms (p50), "
        f"{rank(answers, 0.99):.0f} ms (p99)"
    )
    return {
        "reconcile_p50_ms": round(quantile(before, after, 0.5), 1),
        "reconcile_p99_ms": round(quantile(before, after, 0.99), 1),
        "api_write_p50_ms": round(rank(answers, 0.5), 1),
        "api_write_p99_ms": round(rank(answers, 0.99), 1),
        "edit_to_child_p50_ms": round(rank(late, 0.5), 1),
        "edit_to_child_p99_ms": round(rank(late, 0.99), 1),
        "api_server_cpu_ms_per_edit": round(1000 * servers / edits, 1),
    }


async def measure_naive(run: Run, work: Path) -> dict[str, Any]:
    options = run.options
    environment = {"KUBECONFIG": str(run.cluster.kubeconfig(work, NAIVE))}
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "naive_operator.py"), "--namespace", run.namespace]
    with running(NAIVE, command, environment, work / "naive.log") as process:
        writes = await run.load(process, options.naive_jobs or options.jobs, is_ready)
        load = Load.of(writes, run.seen)
        say(load.said(NAIVE))
        await run.rest(process, options.naive_rest_seconds)
        rss, peak = process.memory()
        say(f"{NAIVE}: {rss:.0f} MB, peak {peak:.0f} MB")
    return {
        "naive_writes_per_transition": round(load.jobs / max(1, load.transitions), 2),
        "naive_rss_mb": round(rss, 1),
    }


def waits_for_traces(job: Mapping[str, Any]) -> bool:
    return condition(job, "RoundProgressing")[1] == api.REASON_WAITING_FOR_TRACES and is_ready(job)


def is_ready(job: Mapping[str, Any]) -> bool:
    return condition(job, "Ready")[0] == "True"


async def measured(options: argparse.Namespace, cluster: Cluster, work: Path) -> dict[str, Any]:
    """Ours first, then the naive one; each is gone before the other starts."""
    context = ssl.create_default_context(cafile=str(cluster.ca_file))
    connector = aiohttp.TCPConnector(limit=0, ssl=context)
    audit, result = Audit(cluster.audit), dict[str, Any]()
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        person, actor = (Client(cluster, user, session) for user in (PERSON, STAGE))
        for namespace in ("ours", "naive"):
            await person.ask("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            stage = Stage(actor, namespace, Seen())
            run, acting = Run(cluster, stage, person, audit, options), asyncio.create_task(stage.run())
            try:
                async with stage.doors() as address:
                    work_on = measure_ours(run, address, work) if namespace == "ours" else measure_naive(run, work)
                    result |= await unless_ended(work_on, acting)
            finally:
                acting.cancel()
                await asyncio.gather(acting, return_exceptions=True)
    return result


async def unless_ended(work: Any, acting: asyncio.Task[None]) -> dict[str, Any]:
    """A stand-in that fell over would leave everybody waiting."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, acting), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        acting.result()
    return dict(task.result())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rest-seconds", type=float, default=600.0)
    parser.add_argument(
        "--change-seconds", type=float,
        help="[default: 20, or less, so that each job is edited once: edits of one object wait for each other]",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=50.0, help="spec changes a second")
    parser.add_argument("--slow-rate", type=float, default=10.0, help="the same of a second pass")
    parser.add_argument(
        "--change", choices=sorted(CHANGES), default="gateway.replicas", help="the field that is edited"
    )
    parser.add_argument("--naive-jobs", type=int, help="jobs of the naive operator [default: as many]")
    parser.add_argument("--naive-rest-seconds", type=float, default=120.0)
    parser.add_argument("--profile", type=Path, help="write cProfile's figures of the operator here; slows it down")
    parser.add_argument("--work", type=Path, help="work folder, empty or new [default: a new one, removed at the end]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no child is left behind
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        with started(work) as cluster:
            result = asyncio.run(measured(options, cluster, work))
    print(json.dumps(result))
    return 1 if result["jobs_stuck"] else 0


if __name__ == "__main__":
    sys.exit(main())
