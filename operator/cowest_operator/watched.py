"""What the watches have shown, kept slim: of each child only what a decision or a sentence needs. No I/O."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cowest_operator.api import KIND
from cowest_operator.kube import CHILDREN
from cowest_operator.objects.common import JOB_LABEL, hex_of
from cowest_operator.objects.steps import ATTEMPT_LABEL, GENERATION_LABEL, OVERRAN, RETRY_CODES, STEP_LABEL
from cowest_operator.objects.weak import DIGEST_ANNOTATION
from cowest_serving.contract import digest_of
from cowest_training.contract import EXIT_FAILED

Key = tuple[str, str]  # (namespace, job)
ACTIVE = ("Pending", "Running")  # phases of a Workflow that may still write
WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # on its pods
PREDICTOR = "Predictor"  # kind of what KServe's Deployment of a weak model is seen as, while it makes no pods


@dataclass(frozen=True, slots=True)  # 30 of them a job
class Seen:
    """A child as it is. `stamp` changes when its intent does: generation, else a digest or the resourceVersion."""

    kind: str
    name: str
    uid: str
    stamp: str
    created: float
    deleting: bool
    version: int  # resourceVersion: an event that was overtaken by our own write is not taken for news
    facts: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""  # uid of the job that it was made for; "" for pods


@dataclass
class Family:
    """A job and its children."""

    job: dict[str, Any] | None = None
    children: dict[tuple[str, str], Seen] = field(default_factory=dict)

    def of(self, kind: str) -> Iterator[Seen]:
        """As they are now: whoever walks through them may wait in between, and watches go on."""
        return iter([seen for seen in self.children.values() if seen.kind == kind])

    def pods_of(self, workflow: Seen) -> list[Seen]:
        """Not those of a Workflow of this name that was deleted: they go a little later."""
        pods = (pod for pod in self.of("Pod") if pod.facts["workflow"] == workflow.name)
        return [pod for pod in pods if pod.created >= workflow.created]

    def last_of(self, workflow: Seen) -> Seen | None:
        """Its pod that ended last, once all of them are over."""
        pods = self.pods_of(workflow)
        if not pods or not all(pod.facts["ended"] for pod in pods):
            return None
        return max(pods, key=lambda pod: pod.facts["ended"])


class Watched:
    """All families. Filled by watch events only."""

    def __init__(self) -> None:
        self.families: dict[Key, Family] = {}

    def job(self, event: str | None, body: Mapping[str, Any]) -> Key:
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        if event == "DELETED":
            self.families.pop(key, None)
        else:
            family = self.families.setdefault(key, Family())
            family.job = _job(body)
            uid = body["metadata"]["uid"]
            for name, child in list(family.children.items()):
                if child.owner not in ("", uid):
                    del family.children[name]  # of a job of this name that is gone
        return key

    def gone(self, kind: str, namespace: str, version: int, names: set[tuple[str, str]]) -> list[Key]:
        """Forgets the children that a list of all (or of one namespace) does not have; the jobs that lost some.

        Whoever lists again after a gap in a watch is told of no delete. What is newer than the list stays.
        """
        lost = []
        for key, family in self.families.items():
            if namespace in ("", key[0]):
                missing = [
                    (seen.kind, seen.name)
                    for each in ((kind, PREDICTOR) if kind == "Deployment" else (kind,))
                    for seen in family.of(each)
                    if seen.version <= version and (key[0], seen.name) not in names
                ]
                for name in missing:
                    del family.children[name]
                lost += [key] if missing else []
        return lost

    def jobs_gone(self, namespace: str, version: int, names: set[tuple[str, str]]) -> list[Key]:
        """The same of jobs."""
        lost = [
            key
            for key, family in self.families.items()
            if namespace in ("", key[0])
            and key not in names
            and family.job is not None
            and int(family.job["metadata"]["resourceVersion"]) <= version
        ]
        for key in lost:
            del self.families[key]
        return lost

    def child(self, event: str | None, kind: str, body: Mapping[str, Any]) -> Key | None:
        """The job it belongs to; `None` when nothing that counts has changed."""
        metadata = body["metadata"]
        owner = (metadata.get("labels") or {}).get(JOB_LABEL)
        if kind != "Pod" and (made_for := (_owner(metadata) or {}).get("name", owner)) != owner:
            family = self.families.get((metadata["namespace"], made_for))
            if family is not None and (kind, metadata["name"]) in family.children:
                owner, event = made_for, "DELETED"  # somebody took its label away: it is applied anew
        if not owner:
            return None
        key = (metadata["namespace"], owner)
        family = self.families.setdefault(key, Family())
        children = family.children
        before = children.get((kind, metadata["name"]))
        if before is None and kind == "Deployment" and _controller(metadata).get("kind") == "InferenceService":
            return key if _refused_pods(children, event, body) else None
        if kind != "Pod" and not _owned(metadata, family.job, owner):
            if before is None:
                return None
            event = "DELETED"  # somebody took its owner away: it is applied anew
        if event == "DELETED":
            children.pop((kind, metadata["name"]), None)
            return key
        now = see(kind, body)
        if before is not None and before.uid == now.uid and now.version < before.version:
            return None
        children[(kind, metadata["name"])] = now
        return key if before is None or (before.stamp, before.facts, before.deleting) != (
            now.stamp, now.facts, now.deleting) else None  # fmt: skip


def _refused_pods(children: dict[tuple[str, str], Seen], event: str | None, body: Mapping[str, Any]) -> bool:
    """Keeps what KServe's Deployment says of pods that it cannot make: no InferenceService passes it on. Is it news?"""
    now = see(PREDICTOR, body)
    before = children.pop((PREDICTOR, now.name), None)
    if event == "DELETED" or not now.facts["message"]:
        return before is not None
    children[PREDICTOR, now.name] = now
    return before is None or before.facts != now.facts


def _owned(metadata: Mapping[str, Any], job: Mapping[str, Any] | None, name: str) -> bool:
    """Is it the job's own? Controllers copy labels of our objects to theirs.

    Nor is it that of a job of the same name that is gone, whose children the garbage collector has not reached yet.
    """
    owner = _owner(metadata)
    if owner is None or owner.get("name") != name:
        return False
    return job is None or owner.get("uid") == job["metadata"]["uid"]


def _owner(metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    owners = metadata.get("ownerReferences") or []
    return next((o for o in owners if o.get("controller") and o.get("kind") == KIND), None)


def _controller(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The owner that makes it what it is; empty where it has none."""
    return next((o for o in metadata.get("ownerReferences") or [] if o.get("controller")), {})


def is_of(metadata: Mapping[str, Any], name: str) -> bool:
    """May a job of this name write it? Its controller is one of this name, perhaps one that is gone and whose children
    the garbage collector has not reached yet; or it has none, and our label, as when somebody took its owner away."""
    controller = _controller(metadata)
    if not controller:
        return (metadata.get("labels") or {}).get(JOB_LABEL) == name
    return bool(controller.get("kind") == KIND and controller.get("name") == name)


def _job(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without the record of who set what: half of its size."""
    metadata = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
    return dict(shared({**body, "metadata": metadata}))


def shared(value: Any) -> Any:
    """The same value, its texts held once for all jobs, whose manifests say mostly the same."""
    if isinstance(value, Mapping):
        return {sys.intern(name): shared(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shared(each) for each in value]
    return sys.intern(value) if type(value) is str else value


def see(kind: str, body: Mapping[str, Any]) -> Seen:
    metadata = body["metadata"]
    look = _FACTS.get(kind)
    return Seen(
        kind,
        sys.intern(metadata["name"]),
        metadata["uid"],
        _stamp(kind, body),
        epoch(metadata.get("creationTimestamp")),
        "deletionTimestamp" in metadata,
        int(metadata["resourceVersion"]),
        shared(look(body)) if look else _NOTHING,
        sys.intern((_owner(metadata) or {}).get("uid", "")) if kind != "Pod" else "",
    )  # fmt: skip


_NOTHING: Mapping[str, Any] = {}
_BY_VERSION = ("ConfigMap", "Service", "ServiceAccount", "Role", "RoleBinding")
_BY_CONTENT = ("HorizontalPodAutoscaler", "PersistentVolumeClaim")  # a status of their own, and mostly no generation


def _stamp(kind: str, body: Mapping[str, Any]) -> str:
    metadata = body["metadata"]
    if kind in _BY_VERSION or not (metadata.get("generation") or kind in _BY_CONTENT):
        return str(metadata["resourceVersion"])
    if kind in _BY_CONTENT:
        return digest_of([metadata.get("labels"), metadata.get("ownerReferences"), body.get("spec")])
    return sys.intern(f"{metadata['generation']}{_held(metadata)}")  # alike for most children


def _held(metadata: Mapping[str, Any]) -> str:
    """Changes when somebody else takes over a label or an annotation that our apply set: no generation tells of it."""
    for entry in metadata.get("managedFields") or []:
        if entry.get("manager") == CHILDREN and entry.get("operation") == "Apply":
            said = (entry.get("fieldsV1") or {}).get("f:metadata") or {}
            names = [sorted(said.get(field) or {}) for field in ("f:labels", "f:annotations")]
            return f" {hex_of(digest_of(names))}"
    return ""


def _deployment(body: Mapping[str, Any]) -> dict[str, Any]:
    """`updated`: no pod of an earlier template is left, and those of this one answer."""
    status = body.get("status") or {}
    available, updated = (int(status.get(f"{name}Replicas") or 0) for name in ("available", "updated"))
    return {
        "available": available,
        "updated": 0 < updated <= available and updated == int(status.get("replicas") or 0),
        "current": int(status.get("observedGeneration") or 0) >= int(body["metadata"].get("generation") or 0),
        "message": _failing(status, ("ReplicaFailure",)),
        "replicas": _our_replicas(body),
    }


def _our_replicas(body: Mapping[str, Any]) -> int | None:
    """None once somebody else has set their number: an autoscaler, by its update."""
    for entry in body["metadata"].get("managedFields") or []:
        said = ((entry.get("fieldsV1") or {}).get("f:spec")) or {}
        if entry.get("manager") == CHILDREN and entry.get("operation") == "Apply" and "f:replicas" in said:
            return int(body["spec"]["replicas"])
    return None


def _predictor(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"message": _failing(body.get("status") or {}, ("ReplicaFailure",))}


def _ray_service(body: Mapping[str, Any]) -> dict[str, Any]:
    """As a Deployment: `available` are endpoints that answer, `updated` says that no second cluster is on its way."""
    status = body.get("status") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or []}
    ready: Mapping[str, Any] = conditions.get("Ready", {})
    answers = ready.get("status") == "True"
    return {
        "available": int(status.get("numServeEndpoints") or 0) if answers else 0,
        "updated": bool(answers and conditions.get("UpgradeInProgress", {}).get("status") != "True"),
        "current": int(status.get("observedGeneration") or 0) >= int(body["metadata"].get("generation") or 0),
        "message": "" if answers else str(ready.get("message", "")),
    }


def _failing(status: Mapping[str, Any], types: tuple[str, ...]) -> str:
    for condition in status.get("conditions") or []:
        if condition.get("type") in types and condition.get("status") == "True":
            return str(condition.get("message", ""))
    return ""


def _inference_service(body: Mapping[str, Any]) -> dict[str, Any]:
    status = body.get("status") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    failure = ((status.get("modelStatus") or {}).get("lastFailureInfo") or {}).get("message", "")
    worst: Mapping[str, Any] = next(
        (c for c in conditions.values() if c.get("status") == "False" and c.get("message")), {}
    )
    return {
        "ready": ready.get("status") == "True",
        "message": str(failure or worst.get("message", "")),
        "digest": (body["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION, ""),
        "taken": bool(conditions),
        "mode": str(status.get("deploymentMode") or ""),
    }


def _workflow(body: Mapping[str, Any]) -> dict[str, Any]:
    status, labels = body.get("status") or {}, body["metadata"].get("labels") or {}
    code, words = _exit(status)
    return {
        "phase": str(status.get("phase") or "Pending"),
        "taken": bool(status),
        "message": str(status.get("message") or ""),
        "finished": epoch(status.get("finishedAt")),
        "code": code,
        "words": words,
        "overran": OVERRAN in words,
        "step": labels.get(STEP_LABEL, ""),
        "attempt": _number(labels.get(ATTEMPT_LABEL), 1),
        "generation": _number(labels.get(GENERATION_LABEL), 0),
        "template": ((body.get("spec") or {}).get("workflowTemplateRef") or {}).get("name", ""),
        "waits": _waits(status),
        "pending": _pending(status),
        "noted": _noted(status),
    }


def _number(text: Any, default: int) -> int:
    """Of a label, which anybody may write: what is no number is as if it were not there."""
    digits = str(text)
    return int(digits) if digits.isascii() and digits.isdigit() else default


_CODE = re.compile("-?[0-9]{1,9}")


def _exit(status: Mapping[str, Any]) -> tuple[int | None, str]:
    """Exit code and last words of the pod that ended last; of several side by side, of one that will not be retried,
    else of one that failed. (A Workflow of one step never compresses its nodes.)"""
    pods = [node for node in (status.get("nodes") or {}).values() if node.get("type") == "Pod"]
    pods.sort(key=lambda node: (_weight(node), node.get("finishedAt") or ""))
    for node in reversed(pods):
        code, words = _code(node), str(node.get("message", ""))
        if OVERRAN in words:
            return EXIT_FAILED, words
        if _CODE.fullmatch(code) and (code != "0" or status.get("phase") == "Succeeded"):
            return int(code), words
    return None, str(pods[-1].get("message", "")) if pods else ""


def _waits(status: Mapping[str, Any]) -> bool:
    """No pod of it has run a single command so far."""
    pods = [node for node in (status.get("nodes") or {}).values() if node.get("type") == "Pod"]
    packed = status.get("compressedNodes") or status.get("offloadNodeStatusVersion")
    return not packed and all(node.get("phase", "Pending") == "Pending" or _is_refused(node) for node in pods)


def _noted(status: Mapping[str, Any]) -> bool:
    """Argo has seen each pod of it end: whatever it waits for is none of them."""
    pods = [node for node in (status.get("nodes") or {}).values() if node.get("type") == "Pod"]
    return bool(pods) and all(node.get("phase") in ("Succeeded", "Failed", "Error") for node in pods)


def _pending(status: Mapping[str, Any]) -> str:
    """Argo's words of a pod that it makes, or cannot make: it waits for a quota, and to try again after a refusal."""
    pods = [node for node in (status.get("nodes") or {}).values() if node.get("type") == "Pod"]
    words = [str(n["message"]) for n in pods if n.get("phase", "Pending") == "Pending" and n.get("message")]
    last: Mapping[str, Any] = max(pods, key=lambda node: str(node.get("startedAt") or ""), default={})
    return next(iter(words), "") or (str(last["message"]) if _is_refused(last) else "")


def _is_refused(node: Mapping[str, Any]) -> bool:
    """There was never a pod of it: it has no place, no exit code, and was not deleted."""
    words = str(node.get("message", ""))
    seen = node.get("hostNodeName") or _code(node) or words.startswith("pod deleted")
    return node.get("phase") == "Error" and bool(words) and not seen


def _weight(node: Mapping[str, Any]) -> int:
    if OVERRAN in str(node.get("message", "")):
        return 3
    return {"0": 0, "": 1}.get(_code(node), 2 if _code(node) in RETRY_CODES else 3)


def _code(node: Mapping[str, Any]) -> str:
    return str((node.get("outputs") or {}).get("exitCode", ""))


def _config_map(body: Mapping[str, Any]) -> dict[str, Any]:
    """Texts only of the two kinds that are read back: the routing and a trial's frozen manifest."""
    data = body.get("data") or {}
    if "routing.json" in data:
        return {"routing": data["routing.json"]}
    if set(data) == {"job.json"} and body["metadata"]["name"].rsplit("-", 1)[-1].removeprefix("r").isdigit():
        return {"frozen": data["job.json"]}
    return {}


def _pod(body: Mapping[str, Any]) -> dict[str, Any]:
    """Why a pod does not run, as the kubelet or the scheduler says it."""
    status, labels = body.get("status") or {}, body["metadata"].get("labels") or {}
    waits = _waits_for_volumes(status)
    return {
        "part": labels.get("app.kubernetes.io/component", ""),
        "phase": status.get("phase", ""),
        "trouble": _pod_trouble(status),
        "waits_for_volumes": waits,
        "mounts": _mounts(body.get("spec") or {}) if waits else (),
        "workflow": labels.get(WORKFLOW_LABEL, ""),
        "ended": _ended(status),
        "died": _died(status),
        "allowed": int((body.get("spec") or {}).get("activeDeadlineSeconds") or 0),
        "started": epoch(status.get("startTime")),
        "overran": status.get("reason") == "DeadlineExceeded",
    }


_FINE = ("ContainerCreating", "PodInitializing", "Completed")


def _pod_trouble(status: Mapping[str, Any]) -> str:
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            if condition.get("reason") == "SchedulingGated":
                return ""  # it waits in a queue, as it was told to
            return f"cannot be scheduled: {condition.get('message', '')}"
    for each in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (each.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in _FINE:
            last = ((each.get("lastState") or {}).get("terminated")) or {}
            words = last.get("message") or waiting.get("message") or last.get("reason") or ""
            return f"container {each.get('name')}: {waiting['reason']}: {str(words).strip()[-500:]}"
    return ""


def _died(status: Mapping[str, Any]) -> str:
    """What ended a pod that did not end by itself, where somebody has to give it more: memory, or room on a disk."""
    if status.get("reason") == "Evicted":
        return f"was evicted: {status.get('message', '')}"
    for each in status.get("containerStatuses") or []:
        if ((each.get("state") or {}).get("terminated") or {}).get("reason") == "OOMKilled":
            return f"was killed for want of memory: container {each.get('name')}: OOMKilled"
    return ""


def _ended(status: Mapping[str, Any]) -> float:
    """When the last container of a pod that is over ended; 0 while one runs."""
    if status.get("phase") not in ("Succeeded", "Failed"):
        return 0.0
    states = [(each.get("state") or {}).get("terminated") or {} for each in status.get("containerStatuses") or []]
    return max((epoch(state.get("finishedAt")) for state in states), default=0.0)


def _waits_for_volumes(status: Mapping[str, Any]) -> bool:
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodReadyToStartContainers":
            return bool(condition.get("status") == "False" and status.get("phase") == "Pending")
    return False


OF_EVERY_NAMESPACE = "kube-root-ca.crt"  # Kubernetes makes it itself
Mount = tuple[str, str, tuple[str, ...]]  # (kind, name, the keys that are asked for)


def _mounts(spec: Mapping[str, Any]) -> tuple[Mount, ...]:
    """What must be there before a pod of this spec starts, as its volumes name it."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for volume in spec.get("volumes") or []:
        if not _KNOWN & volume.keys():
            found["volume", volume["name"]] = {}
        for source in [volume, *((volume.get("projected") or {}).get("sources") or [])]:
            for field_name, kind, name_field in _SOURCES:
                told = source.get(field_name) or {}
                name = told.get(name_field)
                if name and name != OF_EVERY_NAMESPACE and not told.get("optional"):
                    keys = found.setdefault((kind, name), {})
                    keys.update({item["key"]: None for item in told.get("items") or []})
    return tuple((kind, name, tuple(keys)) for (kind, name), keys in found.items())


_SOURCES = (
    ("secret", "Secret", "secretName"),  # of a volume
    ("secret", "Secret", "name"),  # of a part of a projected one
    ("configMap", "ConfigMap", "name"),
    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
)
_KNOWN = {"secret", "configMap", "persistentVolumeClaim", "projected", "downwardAPI", "emptyDir"}


_FACTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "Deployment": _deployment,
    PREDICTOR: _predictor,
    "RayService": _ray_service,
    "InferenceService": _inference_service,
    "Workflow": _workflow,
    "ConfigMap": _config_map,
    "Pod": _pod,
}


def epoch(text: Any) -> float:
    """Seconds since 1970 of a Kubernetes time; 0 when there is none, or it is none."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def retry_after(attempt: int, longest: float) -> float:
    """Seconds between the end of an attempt and the next one."""
    return min(5.0 * 2.0 ** min(max(attempt, 1), 10), longest)
