"""What the operator itself is told by its environment: images, namespaces, ports. Read once at the start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IN_CLUSTER = (".svc", ".cluster.local", "localhost", "127.0.0.1")  # never behind a proxy


class OperatorSettingsError(ValueError):
    """An environment variable of the operator cannot be used. Says what was wanted and seen."""


@dataclass(frozen=True)
class Images:
    """Of the children. `pull_secrets` are names of Secrets in each job's namespace."""

    serving: str
    training: str
    vllm: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    ray: str = ""  # serving with Ray in it; empty: the serving image's tag with `-ray`

    @property
    def with_ray(self) -> str:
        return self.ray or f"{self.serving}-ray"


@dataclass(frozen=True)
class Book:
    """The volume of a job's book of paid calls. What is there already stays as it is."""

    size: str = "1Gi"
    storage_class: str = ""  # empty: the cluster's default


@dataclass(frozen=True)
class Settings:
    images: Images
    namespace: str  # the operator's own: where its lease lies
    identity: str  # its name as holder of the lease
    lease: str = "cowest-operator"  # replicas of one release share it; another release has another
    namespaces: tuple[str, ...] = ()  # watched; empty: all
    metrics_port: int = 9090
    health_port: int = 8081
    kserve_mode: str | None = None  # else what is found
    rayservices: bool = True  # may it make them?
    job_env: tuple[Mapping[str, Any], ...] = ()  # environment of all containers of jobs, as Kubernetes writes it
    book: Book = Book()
    service_url: str = "http://{service}.{namespace}.svc"  # how the operator reaches a Service: else for outside of it


def read(environment: Mapping[str, str]) -> Settings:
    """Raises `OperatorSettingsError`."""
    return Settings(
        Images(
            _wanted(environment, "COWEST_IMAGE_SERVING", "the image of gateway and proxy"),
            _wanted(environment, "COWEST_IMAGE_TRAINING", "the image of steps and weak-model servers"),
            environment.get("COWEST_VLLM_IMAGE", "docker.io/vllm/vllm-openai:latest"),
            environment.get("COWEST_IMAGE_PULL_POLICY") or "IfNotPresent",
            _names(environment.get("COWEST_IMAGE_PULL_SECRETS") or "[]"),
            environment.get("COWEST_IMAGE_SERVING_RAY", ""),
        ),
        environment.get("POD_NAMESPACE") or "default",
        environment.get("POD_NAME") or environment.get("HOSTNAME") or "cowest-operator",
        environment.get("COWEST_LEASE") or Settings.lease,
        tuple(name.strip() for name in environment.get("COWEST_NAMESPACES", "").split(",") if name.strip()),
        _port(environment, "COWEST_METRICS_PORT", 9090),
        _port(environment, "COWEST_HEALTH_PORT", 8081),
        _one_of(environment, "COWEST_KSERVE_MODE", ("RawDeployment", "Standard")),
        _one_of(environment, "COWEST_RAYSERVICES", ("true", "false")) != "false",
        in_cluster(_env(environment.get("COWEST_JOB_ENV") or "[]")),
        Book(environment.get("COWEST_BOOK_SIZE") or Book.size, environment.get("COWEST_BOOK_STORAGE_CLASS", "")),
        environment.get("COWEST_SERVICE_URL") or Settings.service_url,
    )


def _wanted(environment: Mapping[str, str], name: str, what: str) -> str:
    if value := environment.get(name):
        return value
    raise OperatorSettingsError(f"{name}: wanted {what}, saw nothing; the chart sets it from its values.")


def _one_of(environment: Mapping[str, str], name: str, known: tuple[str, ...]) -> str | None:
    value = environment.get(name) or None
    if value is None or value in known:
        return value
    raise OperatorSettingsError(f"{name}: wanted {' or '.join(known)}, saw {value!r}")


def _names(text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OperatorSettingsError(f'COWEST_IMAGE_PULL_SECRETS: wanted a JSON list such as ["a"], saw {text!r}')
    return tuple(names)


def _env(text: str) -> tuple[Mapping[str, Any], ...]:
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    named = isinstance(entries, list) and all(isinstance(each, dict) and each.get("name") for each in entries)
    if not named or len({each["name"] for each in entries}) < len(entries):
        raise OperatorSettingsError(
            'COWEST_JOB_ENV: wanted a JSON list of variables with different names such as [{"name": "HTTPS_PROXY",'
            f' "value": "http://proxy:3128"}}], saw {text!r}'
        )
    return tuple(entries)


def in_cluster(env: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """Where a proxy leads out, what is inside the cluster is not asked of it."""
    if not {each["name"].lower() for each in env} & {"http_proxy", "https_proxy", "all_proxy"}:
        return env
    names = {each["name"] for each in env}
    added = () if names & {"NO_PROXY", "no_proxy"} else ({"name": "NO_PROXY", "value": ""},)
    return tuple(_without_proxy(each) if each["name"].lower() == "no_proxy" else each for each in (*env, *added))


def _without_proxy(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    if "value" not in entry:  # of a Secret or ConfigMap: nothing can be added to it here
        return entry
    said = [name.strip() for name in str(entry["value"]).split(",") if name.strip()]
    return {**entry, "value": ",".join([*said, *(name for name in IN_CLUSTER if name not in said)])}


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit() or not 0 <= int(text) < 65536:
        raise OperatorSettingsError(f"{name}: wanted a port, 0 for none, saw {text!r}")
    return int(text)
