"""What all children share: names, labels, owner, restricted pods, the object store's environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from cowest_operator import api
from cowest_operator.settings import Book, Images
from cowest_serving.contract import canonical_json, digest_of

Child = dict[str, Any]

JOB_LABEL = "cowest.dev/job"
PART_LABEL = "app.kubernetes.io/component"
USER = 65532  # of all our images
PORT = 8080  # every server of ours listens there
ROUTING_FILE = "/run/cowest/routing.json"  # of the gateway and its sidecar
SPOOL = "/var/lib/cowest/spool"  # of the gateway's records
JOB_FOLDER, STEP_FOLDER = "/etc/cowest/job", "/etc/cowest/step"
STRONG_KEYS, CLIENT_KEYS = "/etc/cowest/strong-keys", "/etc/cowest/client-keys"
PROXY_KEYS, STORE_KEYS = "/etc/cowest/proxy-keys", "/etc/cowest/s3-keys"
STORE_KEY_NAMES: Mapping[str, Mapping[str, bool]] = {
    "AWS_ACCESS_KEY_ID": {},
    "AWS_SECRET_ACCESS_KEY": {},
    "AWS_SESSION_TOKEN": {"optional": True},
}
FALLBACK_KEYS = "/etc/cowest/fallback-keys"
LOG_FORMAT = "COWEST_LOG_FORMAT"  # as `cowest_serving.logs` reads it


def judge_key(number: int) -> tuple[str, str]:
    """Of a judge's key, the first one's by 0: the volume, and where it is mounted."""
    name = f"jury-{number}" if number else "evaluator"
    return name, f"/etc/cowest/{name}"


@dataclass(frozen=True)
class Context:
    """One job on one cluster: all that builders need beside the plan."""

    job: api.Job
    namespace: str
    uid: str
    document: Mapping[str, Any]  # the declared manifest: defaulted, prompts resolved
    images: Images
    kserve_mode: str = "Standard"  # of a new InferenceService; RawDeployment before KServe 0.16
    kserve_modes: Mapping[str, str] = field(default_factory=dict)  # of those that are there, by name
    has_kuberay: bool = False
    job_env: tuple[Mapping[str, Any], ...] = ()  # of every container, as the operator was told
    book: Book = field(default_factory=Book)  # of a new job
    gateways: int | None = 0  # how many there are; None: their number is an autoscaler's

    @property
    def store(self) -> str:
        """URI of the job's part of the bucket."""
        return store_of(self.job, self.namespace)

    def name(self, part: str) -> str:
        return f"{self.job.name}-{part}"

    def host(self, part: str) -> str:
        """Works in every cluster domain."""
        return f"{self.name(part)}.{self.namespace}.svc"


def store_of(job: api.Job, namespace: str) -> str:
    place = job.spec.object_store
    if place is None:
        raise ValueError("spec.objectStore: wanted a bucket, saw none")
    parts = (place.bucket, *(p for p in (place.prefix or "").strip("/").split("/") if p), namespace, job.name)
    return "s3://" + "/".join(parts)


def key_of(child: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, name): unique among the children of one namespace."""
    return child["kind"], child["metadata"]["name"]


def hex_of(digest: str, length: int = 8) -> str:
    return digest.removeprefix("sha256:")[:length]


def content_name(context: Context, part: str, content: Any) -> str:
    """The name of an object that never changes: another content is another object."""
    return context.name(f"{part}-{hex_of(digest_of(content))}")


def labels(context: Context, part: str) -> dict[str, str]:
    return {
        JOB_LABEL: context.job.name,
        PART_LABEL: part,
        "app.kubernetes.io/name": "cowest",
        "app.kubernetes.io/instance": context.job.name,
        "app.kubernetes.io/managed-by": "cowest-operator",
    }


def child(context: Context, api_version: str, kind: str, name: str, part: str, **content: Any) -> Child:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": context.namespace,
            "labels": labels(context, part),
            "ownerReferences": [
                {
                    "apiVersion": f"{api.GROUP}/{api.VERSION}",
                    "kind": api.KIND,
                    "name": context.job.name,
                    "uid": context.uid,
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        **content,
    }


def config_map(context: Context, name: str, part: str, data: Mapping[str, str], immutable: bool = True) -> Child:
    built = child(context, "v1", "ConfigMap", name, part, data=dict(data))
    return {**built, "immutable": True} if immutable else built


def service(context: Context, part: str, **more: Any) -> Child:
    return child(
        context, "v1", "Service", context.name(part), part,
        spec={"selector": selector(context, part),
              "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}], **more},
    )  # fmt: skip


def selector(context: Context, part: str) -> dict[str, str]:
    return {JOB_LABEL: context.job.name, PART_LABEL: part}


# ---------------------------------------------------------------- pods
def container(
    context: Context, name: str, image: str, module: str, arguments: Sequence[str], **more: Any
) -> dict[str, Any]:
    """A container under the `restricted` Pod Security profile. `python -P`: the working folder is no source of code."""
    own = [*_about(context), *more.pop("env", [])]
    named = {each["name"] for each in own}
    built = {
        "name": name,
        "image": image,
        "imagePullPolicy": context.images.pull_policy,
        "command": ["python", "-P", "-m", module],
        "args": list(arguments),
        "env": [*(dict(each) for each in context.job_env if each["name"] not in named), *own],
        "securityContext": restricted(),
        **more,
    }
    return {key: value for key, value in built.items() if value not in (None, [], {})}


def _about(context: Context) -> list[dict[str, Any]]:
    """What log lines say, and that they are for a collector, unless whoever runs the operator wants them otherwise."""
    told = [env("COWEST_JOB", f"{context.namespace}/{context.job.name}")]
    has_form = any(each["name"] == LOG_FORMAT for each in context.job_env)
    return told if has_form else [*told, env(LOG_FORMAT, "json")]


def restricted() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": USER,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod(context: Context, **spec: Any) -> dict[str, Any]:
    """The PodSpec that all servers start from; no token unless a container asks for one."""
    built: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **spec,
    }
    if context.images.pull_secrets:
        built["imagePullSecrets"] = [{"name": name} for name in context.images.pull_secrets]
    return built


def template(context: Context, part: str, spec: Mapping[str, Any], over: api.PodTemplate | None = None) -> Child:
    """A pod template; what the manifest's podTemplate says is laid over it."""
    metadata: dict[str, Any] = {"labels": labels(context, part)}
    if over is not None:
        metadata["labels"] = {**over.metadata.labels, **metadata["labels"]}
        if over.metadata.annotations:
            metadata["annotations"] = dict(over.metadata.annotations)
    return {"metadata": metadata, "spec": laid_over(spec, over.spec) if over and over.spec else dict(spec)}


_BY_NAME = ("containers", "initContainers", "volumes", "env", "volumeMounts", "imagePullSecrets")


def laid_over(base: Any, over: Any, name: str = "") -> Any:
    """Merged as `kubectl patch --type=strategic` does: objects deep, named lists by name, other values whole."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        merged = {key: deepcopy(value) for key, value in base.items()}
        for key, value in over.items():
            merged[key] = laid_over(merged[key], value, key) if key in merged else deepcopy(value)
        return merged
    index = "mountPath" if name == "volumeMounts" else "name"
    if name in _BY_NAME and are_named(base, index) and are_named(over, index):
        given = {item[index]: item for item in over}
        kept = [laid_over(item, given.pop(item[index], item)) for item in base]
        return [*kept, *deepcopy(list(given.values()))]
    if isinstance(base, list) and isinstance(over, list) and name == "tolerations":
        return [*base, *deepcopy(over)]
    return deepcopy(over)


def are_named(items: Any, index: str = "name") -> bool:
    """Else what the manifest says stands as it is, and the API server says what is wrong with it."""
    return isinstance(items, list) and all(isinstance(item, Mapping) and index in item for item in items)


def resources(wanted: api.Resources | None, cpu: str, memory: str) -> dict[str, Any]:
    """What the manifest says, else a request that fits a small node and no limit."""
    if wanted is None or not (wanted.requests or wanted.limits):
        return {"requests": {"cpu": cpu, "memory": memory}}
    return {k: dict(v) for k, v in (("requests", wanted.requests), ("limits", wanted.limits)) if v}


def probe(path: str, **more: Any) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, **more}


def tmp() -> tuple[dict[str, Any], dict[str, Any]]:
    return {"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}


# ---------------------------------------------------------------- environment
def env(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def store_env(context: Context) -> list[dict[str, Any]]:
    """How `cowest_serving.store` reaches the bucket, beside `store_volumes`."""
    place = context.job.spec.object_store
    assert place is not None
    found = [env("COWEST_CACHE", "/tmp/cache")]
    for name, value in (
        ("COWEST_S3_ENDPOINT", place.endpoint),
        ("AWS_REGION", place.region),
        ("COWEST_S3_PATH_STYLE", None if place.path_style is None else str(place.path_style).lower()),
        ("COWEST_S3_CA", f"/etc/cowest/s3-ca/{place.ca_bundle_ref.key}" if place.ca_bundle_ref else None),
    ):
        if value:
            found.append(env(name, value))
    if place.credentials_secret_ref:
        found.append(env("COWEST_S3_KEYS_FOLDER", STORE_KEYS))
    return found


def store_volumes(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts) of the object store's own certificates and of its keys: files, so that a rotation arrives."""
    place = context.job.spec.object_store
    assert place is not None
    volumes: list[dict[str, Any]] = []
    if place.ca_bundle_ref:
        volumes.append(certificates("s3-ca", place.ca_bundle_ref.name, place.ca_bundle_ref.key))
    if place.credentials_secret_ref:
        sources = [
            {"secret": {"name": place.credentials_secret_ref.name, "items": [{"key": key, "path": key}], **optional}}
            for key, optional in STORE_KEY_NAMES.items()
        ]
        volumes.append({"name": "s3-keys", "projected": {"sources": sources, "defaultMode": 0o440}})
    return volumes, [
        {"name": each["name"], "mountPath": f"/etc/cowest/{each['name']}", "readOnly": True} for each in volumes
    ]


def certificates(volume: str, config_map: str, key: str) -> dict[str, Any]:
    """By its key, so that the kubelet holds a pod of which it is missing, and says so."""
    return {"name": volume, "configMap": {"name": config_map, "items": [{"key": key, "path": key}]}}


SERVERS_READ: Mapping[str, tuple[str, ...]] = {  # section -> its fields; none named: all of them
    "strong": (),
    "collaboration": (),
    "data": ("heldOut",),
    "feedback": ("evaluator",),
    "gateway": ("limits", "maxBodyBytes", "maxConcurrency"),
    "traces": (),
    "weak": ("maxConcurrency",),
}


def servers_manifest(context: Context) -> Mapping[str, Any]:
    """What long-running servers read: an edit of anything else, such as the number of gateways, must not roll them."""
    document = context.document
    spec = {
        section: read
        for section, fields in SERVERS_READ.items()
        if (read := {k: v for k, v in document["spec"].get(section, {}).items() if not fields or k in fields})
    }
    head = {"apiVersion": document["apiVersion"], "kind": document["kind"]}
    return {**head, "metadata": {"name": context.job.name}, "spec": spec}


def job_map(context: Context) -> Child:
    """What servers read of the manifest; an edit makes another object, and with it a rollout."""
    content = servers_manifest(context)
    return config_map(context, content_name(context, "job", content), "manifest", {"job.json": canonical(content)})


def job_volume(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    name = content_name(context, "job", servers_manifest(context))
    mount = {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}
    return {"name": "job", "configMap": {"name": name}}, mount


def book_of(context: Context) -> str | None:
    """Where a gateway has slices of the day's budget from; None where no day is limited: it needs no proxy then."""
    return f"http://{context.host('proxy')}" if context.job.spec.strong.limits_live_answers else None


def canonical(value: Any) -> str:
    return canonical_json(value).decode()
