"""The API server, over `kubernetes.aio`: plain dictionaries in and out, server-side apply, one error type."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from cowest_operator import api

log = logging.getLogger("cowest.kube")

CHILDREN, STATUS = "cowest-operator", "cowest-status"  # field managers
TIMEOUT = 30.0  # seconds of one request
WRITES_AT_ONCE = 16
ONLY_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
UNDECLARED = 600.0  # seconds that the CRD of the cluster is believed to lack a field: it may be upgraded meanwhile
AUTHORIZATION = "authorization.k8s.io/v1"
CHUNK = 250  # objects of one answer to a list: a thousand jobs' pods at once would be hundreds of megabytes

PLURALS: Final[Mapping[str, tuple[str, str]]] = {
    "CollaborationJob": (f"{api.GROUP}/{api.VERSION}", api.PLURAL),
    "ConfigMap": ("v1", "configmaps"),
    "Service": ("v1", "services"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims"),
    "Pod": ("v1", "pods"),
    "Event": ("v1", "events"),
    "Deployment": ("apps/v1", "deployments"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": ("autoscaling/v2", "horizontalpodautoscalers"),
    "Ingress": ("networking.k8s.io/v1", "ingresses"),
    "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"),
    "InferenceService": ("serving.kserve.io/v1beta1", "inferenceservices"),
    "RayService": ("ray.io/v1", "rayservices"),
    "Workflow": ("argoproj.io/v1alpha1", "workflows"),
    "WorkflowTemplate": ("argoproj.io/v1alpha1", "workflowtemplates"),
}


class KubeError(Exception):
    """The API server refused (`code`) or could not be reached (`code` 0)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def retryable(self) -> bool:
        """A webhook that is away answers 500; throttling 429; a conflict is settled by looking again."""
        return self.code in (0, 409, 429) or self.code >= 500


class Kube:
    """A thin client. Raises `KubeError`; an object that is not there is `None`."""

    def __init__(self, api_client: client.ApiClient, undeclared_for: float = UNDECLARED) -> None:
        self._client, self._undeclared_for = api_client, undeclared_for
        self._slots = asyncio.Semaphore(WRITES_AT_ONCE)
        self._undeclared: frozenset[Field] = frozenset()  # fields of the status that the cluster's CRD does not know
        self._asked_at = 0.0  # when it last said so
        self._said: frozenset[Field] = frozenset()  # in the log

    @classmethod
    async def connect(cls) -> Kube:
        """From inside a pod, else by the current kubeconfig."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.connection_pool_maxsize = 2 * WRITES_AT_ONCE
        # Else each request looks at ~/.netrc and for a proxy, in two threads. kopf's watches go without both too.
        configuration.client_session_kwargs = {"trust_env": False}
        return cls(client.ApiClient(configuration))

    @property
    def client(self) -> client.ApiClient:
        return self._client

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------ verbs
    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        try:
            return await self._call("GET", self._path(kind, namespace, name))
        except KubeError as error:
            if error.code == 404:
                return None
            raise

    async def read(self, path: str) -> dict[str, Any] | None:
        """What the API server says at an address of its own, such as /apis."""
        try:
            return await self._call("GET", path)
        except KubeError as error:
            if error.code == 404:
                return None
            raise

    async def may(self, verb: str, kind: str, namespace: str) -> bool:
        """Whether our own account has this right; in all namespaces where none is named. Every account may ask that."""
        version, plural = PLURALS[kind]
        right = {"verb": verb, "group": version.rpartition("/")[0], "resource": plural, "namespace": namespace}
        body = {"apiVersion": AUTHORIZATION, "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": right}}
        answer = await self._call("POST", f"/apis/{AUTHORIZATION}/selfsubjectaccessreviews", None, body)
        return bool(answer["status"]["allowed"])

    async def list(self, kind: str, namespace: str, chunk: int = CHUNK, **query: str) -> AsyncIterator[dict[str, Any]]:
        """All of a kind, held a chunk at a time."""
        following: dict[str, str] = {"limit": str(chunk)}
        while following:
            answer = await self._call("GET", self._path(kind, namespace), {**query, **following})
            for item in answer["items"]:
                yield item
            token = answer["metadata"].get("continue")
            following = {**following, "continue": token} if token else {}

    async def names(self, kind: str, namespace: str, **query: str) -> tuple[int, set[tuple[str, str]]]:
        """(resourceVersion, namespace and name of all that there were then): what is older and not there is gone."""
        following: dict[str, str] = {"limit": str(2 * CHUNK)}
        version, found = 0, set()
        while following:
            path = self._path(kind, namespace)
            answer = await self._call("GET", path, {**query, **following}, accept=ONLY_METADATA)
            found |= {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in answer["items"] or ()}
            version = version or int(answer["metadata"]["resourceVersion"])
            token = answer["metadata"].get("continue")
            following = {**following, "continue": token} if token else {}
        return version, found

    async def apply(self, child: Mapping[str, Any], manager: str = CHILDREN) -> dict[str, Any]:
        """Server-side apply of the whole intent."""
        path = self._path(child["kind"], child["metadata"]["namespace"], child["metadata"]["name"])
        query = {"fieldManager": manager, "force": "true"}
        return await self._call("PATCH", path, query, dict(child), "application/apply-patch+yaml")

    async def create(self, child: Mapping[str, Any]) -> bool:
        """False: it is there already."""
        path = self._path(child["kind"], child["metadata"]["namespace"])
        try:
            await self._call("POST", path, {"fieldManager": CHILDREN}, dict(child))
        except KubeError as error:
            if error.code == 409:
                return False
            raise
        return True

    async def delete(self, kind: str, namespace: str, name: str, uid: str | None = None) -> None:
        """Only the one of this uid, where that is given; 409: it is another by now."""
        body = {"propagationPolicy": "Background", **({"preconditions": {"uid": uid}} if uid else {})}
        try:
            await self._call("DELETE", self._path(kind, namespace, name), None, body)
        except KubeError as error:
            if error.code != 404:
                raise

    async def apply_status(self, namespace: str, name: str, status: Mapping[str, Any], version: int) -> dict[str, Any]:
        """The whole status, by its own field manager; nothing of spec or metadata. 409: the job is not of `version`.

        Fields that the cluster's CRD does not declare, as it is older than this operator, are left out and said once.
        Every few minutes it is asked again, for it may be upgraded.
        """
        if time.monotonic() - self._asked_at > self._undeclared_for:
            self._undeclared = frozenset()
        left_out = self._undeclared
        body = {
            "apiVersion": f"{api.GROUP}/{api.VERSION}",
            "kind": api.KIND,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": str(version)},
            "status": _without(status, left_out),
        }
        path = self._path(api.KIND, namespace, name) + "/status"
        query = {"fieldManager": STATUS, "force": "true"}
        try:
            return await self._call("PATCH", path, query, body, "application/apply-patch+yaml")
        except KubeError as error:
            more = undeclared(str(error)) - left_out  # by now another job's write may know them too
            if not more:
                raise
            if new := more - self._said:
                names = ", ".join(sorted(".".join(("status", *path)) for path in new))
                log.warning("The CRD of this cluster is older than this operator: it lacks %s. Upgrade the CRD.", names)
            self._undeclared, self._said, self._asked_at = self._undeclared | more, self._said | more, time.monotonic()
            body["status"] = _without(status, left_out | more)
            return await self._call("PATCH", path, query, body, "application/apply-patch+yaml")

    async def patch(self, kind: str, namespace: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(kind, namespace, name)
        return await self._call("PATCH", path, {"fieldManager": CHILDREN}, dict(body), "application/merge-patch+json")

    # ------------------------------------------------------------ the wire
    def _path(self, kind: str, namespace: str, name: str = "") -> str:
        version, plural = PLURALS[kind]
        root = "/api/v1" if version == "v1" else f"/apis/{version}"
        if not namespace:  # all of them
            return f"{root}/{plural}"
        return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": accept, "Content-Type": content_type}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        async with self._slots:
            try:
                answer = await self._client.call_api(method, url, headers, body, _request_timeout=TIMEOUT)
                text = (await answer.read()).decode(errors="replace")  # type: ignore[no-untyped-call]
            except ApiException as error:
                raise KubeError(error.status or 0, f"{method} {path}: {error.reason}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise KubeError(0, f"{method} {path}: {error or type(error).__name__}") from error
        if answer.status >= 400:
            raise KubeError(answer.status, f"{method} {path}: {_words(text)}")
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):  # as of a load balancer in between
            raise KubeError(0, f"{method} {path}: wanted an object of JSON, saw {text[:200]!r}")
        return parsed


def _words(text: str) -> str:
    """The API server's own sentence."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]


# ---------------------------------------------------------------- a CRD that is older than this operator
Field = tuple[str, ...]  # names below `status`, without the places in lists
_UNDECLARED = re.compile(r"\.status((?:\.\w+|\[[^\]]*\])+): field not declared in schema")


def undeclared(message: str) -> frozenset[Field]:
    """The fields that the API server says its schema lacks; it refuses the whole apply for them."""
    return frozenset(tuple(re.findall(r"\.(\w+)", path)) for path in _UNDECLARED.findall(message))


def _without(value: Any, fields: frozenset[Field]) -> Any:
    if isinstance(value, list):
        return [_without(each, fields) for each in value]
    if not fields or not isinstance(value, Mapping):
        return value
    below = {name: frozenset(path[1:] for path in fields if path[0] == name) for name in value}
    return {name: _without(part, below[name]) for name, part in value.items() if () not in below[name]}
