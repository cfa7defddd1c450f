"""What the cluster has besides Kubernetes: KServe, Argo Workflows, KubeRay, Kueue. Read by observe.py.

The API server's own discovery is asked, at `/apis` and below the groups in question: a few kilobytes that every
account may read, and no watch of CRDs, of which KServe's alone are many megabytes.

KServe's deployment mode without Knative is called `RawDeployment` in 0.15 and `Standard` since 0.16. The name stands
in no schema, so it is told by what came with 0.16: the kind LLMInferenceService, else the field
`spec.predictor.storageUris` of the InferenceService's CRD. Where neither is seen (KServe's minimal CRDs without its
LLM part show no fields) it is RawDeployment, which 0.16 and later take as an alias: see `weak.inference_service`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from cowest_operator import api
from cowest_operator.kube import PLURALS, Kube, KubeError
from cowest_operator.objects.steps import QUEUE_LABEL

log = logging.getLogger("cowest.platform")

EVERY = 10.0  # seconds between two looks; a look that changes nothing wakes nobody
SERVING, RAY, KUEUE = "serving.kserve.io", "ray.io", "kueue.x-k8s.io"
RAY_VERBS = ("list", "watch", "patch", "delete")
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.serving.kserve.io"

NO_KSERVE = api.Trouble(api.REASON_NO_KSERVE, "KServe is not installed: no InferenceService can be made. Install it.")
NO_RIGHT_TO_RAY = api.Trouble(
    api.REASON_NO_RIGHT,
    "spec.gateway.engine: wanted a RayService, since KubeRay is installed, but the operator's roles give it no right to"
    " ray.io RayServices: Ray runs in a Deployment. Upgrade the chart cowest-operator, whose roles have it, or set"
    " rayservice.enabled: false there.",
)
NO_ARGO = api.Trouble(api.REASON_NO_ARGO, "Argo Workflows is not installed: no step can run. Install it.")


@dataclass(frozen=True)
class Platform:
    """`kserve_mode` is what a new InferenceService says."""

    has_kserve: bool = False
    has_argo: bool = False
    has_kuberay: bool = False  # and the operator may make RayServices
    has_kueue: bool = False
    kserve_mode: str = "RawDeployment"
    ray_is_forbidden: bool = False  # KubeRay is there, and the operator has no right that it was told to have

    def lacks(self, other: Platform) -> bool:
        """Has the other something that this one has not?"""
        mine, theirs = astuple(self)[:4], astuple(other)[:4]
        return any(there and not here for here, there in zip(mine, theirs, strict=True))


def troubles(platform: Platform, job: api.Job, training: Mapping[str, Any]) -> Iterator[api.Trouble]:
    """What the job will need and cannot have, said before the hours of work that come first."""
    if not platform.has_kserve:
        yield NO_KSERVE
    if not platform.has_argo:
        yield NO_ARGO
    pods = api.parse_pods(training).pod_template
    queue = pods.metadata.labels.get(QUEUE_LABEL) if pods else None
    if queue and not platform.has_kueue:
        yield api.Trouble(
            api.REASON_NO_KUEUE,
            f"spec.training.podTemplate: the label {QUEUE_LABEL} names the queue {queue}, but Kueue is not installed:"
            " steps run without a quota. Install it, or remove the label.",
        )
    gateway = job.spec.gateway
    on_ray = gateway.engine == "RayServe" and platform.has_kuberay
    if gateway.engine == "RayServe" and platform.ray_is_forbidden:
        yield NO_RIGHT_TO_RAY
    if gateway.max_replicas is not None and not on_ray and not _asks_for_cpu(gateway.resources):
        yield api.Trouble(
            api.REASON_CANNOT_SCALE,
            "spec.gateway.maxReplicas: wanted a gateway that grows with its load, but its autoscaler measures CPU"
            " against what was requested, and spec.gateway.resources requests none. Add requests.cpu.",
        )
    if on_ray and gateway.max_replicas is not None:
        yield api.Trouble(
            api.REASON_NOT_ON_RAY,
            "spec.gateway.maxReplicas: wanted a gateway that grows with its load, but a RayService keeps to"
            f" gateway.replicas, {gateway.replicas}. Raise replicas and remove maxReplicas, or set engine: ASGI.",
        )


def _asks_for_cpu(resources: api.Resources | None) -> bool:
    """Without resources of its own the gateway has ours; a limit is a request too where no other is said."""
    if resources is None or not (resources.requests or resources.limits):
        return True
    return "cpu" in resources.requests or "cpu" in resources.limits


class Discovery:
    """The platform as it was last seen. `mode` overrides what KServe's mode is found to be."""

    def __init__(
        self, kube: Kube, mode: str | None = None, rayservices: bool = True, namespaces: tuple[str, ...] = ()
    ) -> None:
        self.kube, self._mode, self._namespaces = kube, mode, namespaces
        self.rayservices, self._told = rayservices, rayservices  # may they be watched and made; were we told so
        self.now = Platform()
        self._doubted: Platform | None = None

    async def begin(self) -> None:
        """The first look, however long it takes: nothing is to be built for a platform that nobody has seen."""
        pause = 1.0
        while True:
            try:
                self.rayservices = self._told and await self._has_right_to_ray()
                self.now = await self.look()
                break
            except KubeError as error:
                log.warning("the API server does not say what is installed: %s; again in %.0f s", error, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, EVERY)
        log.info("installed: %s", self.now)

    async def _has_right_to_ray(self) -> bool:
        """An older chart's roles do not name RayServices. Watched without a right, they would hold up every job."""
        for namespace in self._namespaces or ("",):
            if namespace and not await self._may("list", "CollaborationJob", namespace):
                log.warning("no right to list jobs in namespace %s: is it gone? The others are kept", namespace)
                continue
            for verb in RAY_VERBS:
                if not await self._may(verb, "RayService", namespace):
                    where = f"in namespace {namespace}" if namespace else "in all namespaces"
                    log.warning(
                        "no right to %s rayservices.ray.io %s: gateways with engine RayServe run in Deployments."
                        " Upgrade the chart cowest-operator, or begin this operator anew once its roles have the right",
                        verb, where,
                    )  # fmt: skip
                    return False
        return True

    async def _may(self, verb: str, kind: str, namespace: str) -> bool:
        try:
            return await self.kube.may(verb, kind, namespace)
        except KubeError as error:
            if error.code not in (403, 404):
                raise
            return True  # a cluster that does not let us ask: as we were told

    async def follow(self, changed: Callable[[], None], every: float = EVERY) -> None:
        """Looks for ever; calls `changed` when something has come or gone."""
        while True:
            await asyncio.sleep(every)
            try:
                seen = await self.look()
            except KubeError as error:
                log.warning("the API server does not say what is installed: %s", error)
                continue
            except Exception:  # one answer that nobody can read must not end all looks to come
                log.exception("what the API server says is installed cannot be read")
                continue
            if self.take(seen):
                log.info("installed: %s", seen)
                changed()

    def take(self, seen: Platform) -> bool:
        """Whether `seen` is news. What has gone is believed when it is seen twice: an API server that starts says less
        than there is, and a gateway is not to be rebuilt for that."""
        if seen.lacks(self.now) and seen != self._doubted:
            self._doubted = seen
            return False
        self._doubted = None
        if seen == self.now:
            return False
        self.now = seen
        return True

    async def look(self) -> Platform:
        """Raises `KubeError`."""
        found = (await self.kube.read("/apis") or {}).get("groups")
        if found is None:
            raise KubeError(0, "GET /apis: wanted the API server's groups, saw none")
        groups = {group["name"]: group for group in found}
        serving = [await self._kinds(each["groupVersion"]) for each in groups.get(SERVING, {}).get("versions", ())]
        has_kserve = any("InferenceService" in kinds for kinds in serving)
        has_kuberay = self._told and await self._has(groups, "RayService")
        return Platform(
            has_kserve,
            await self._has(groups, "Workflow"),
            has_kuberay and self.rayservices,
            KUEUE in groups,
            self._mode or (await self._kserve_mode(serving) if has_kserve else Platform.kserve_mode),
            has_kuberay and not self.rayservices,
        )

    async def _has(self, groups: Mapping[str, Any], kind: str) -> bool:
        """In the very version that is made here."""
        version, _ = PLURALS[kind]
        return version.partition("/")[0] in groups and kind in await self._kinds(version)

    async def _kinds(self, version: str) -> set[str]:
        found = await self.kube.read(f"/apis/{version}") or {}
        return {resource["kind"] for resource in found.get("resources", ())}

    async def _kserve_mode(self, serving: list[set[str]]) -> str:
        """The CRD is a megabyte: it is read only when nothing else tells."""
        if any("LLMInferenceService" in kinds for kinds in serving):
            return "Standard"
        if self.now.has_kserve:
            return self.now.kserve_mode
        try:
            return mode_of(await self.kube.read(CRD) or {})
        except KubeError as error:
            if error.code != 403:  # roles of one's own, without the right to read CRDs
                raise
            return Platform.kserve_mode


def mode_of(crd: Mapping[str, Any]) -> str:
    """What an InferenceService's CRD tells of the name of the mode."""
    for version in (crd.get("spec") or {}).get("versions", ()):
        spec = version["schema"]["openAPIV3Schema"].get("properties", {}).get("spec", {})
        if "storageUris" in spec.get("properties", {}).get("predictor", {}).get("properties", {}):
            return "Standard"
    return "RawDeployment"
