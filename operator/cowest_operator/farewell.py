"""I/O: what `spec.deletionPolicy: Delete` asks for when a job goes: its artifacts are erased, within a time limit.

With Keep, the default, there is no finalizer, and a delete never waits for the operator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from cowest_operator import api, story
from cowest_operator.apply import Applier, TakenError
from cowest_operator.kube import Kube, KubeError
from cowest_operator.objects import ray, servers, steps
from cowest_operator.objects.common import Context, key_of
from cowest_operator.watched import ACTIVE, Family, Seen, epoch, retry_after

log = logging.getLogger("cowest.farewell")

FINALIZER, MANAGER = "cowest.dev/artifacts", "cowest-finalizer"
LIMIT = 600.0  # seconds after the delete; then the job goes and its artifacts stay, and the log says so
ERASING = 180.0  # seconds of these that are kept for the erasing itself
PODS_LIMIT, LONGEST_WAIT = 120.0, 60.0  # seconds for writers to end, see `patience`; between two attempts
ERASE, WRITE = "erase", ("gateway", ray.HEAD, "score-live", "step")  # the step; parts whose pods write


def wanted(spec: Mapping[str, Any]) -> str | None:
    """What to erase: models, traces or all; `None` for nothing."""
    policy = spec.get("deletionPolicy") or {}
    models, traces = policy.get("models") == "Delete", policy.get("traces") == "Delete"
    return "all" if models and traces else "models" if models else "traces" if traces else None


async def hold(kube: Kube, body: Mapping[str, Any]) -> None:
    """The finalizer is there exactly while there is something to erase."""
    there = FINALIZER in (body["metadata"].get("finalizers") or [])
    if there != (wanted(body["spec"]) is not None):
        await _finalizer(kube, body, not there)


async def goodbye(
    applier: Applier, read: Callable[[], Awaitable[Context | None]], family: Family, now: float | None = None
) -> bool:
    """One look at a job that is being deleted; True when it is let go. `read` finds `None` where no manifest is known.

    The limit comes before all that may fail: no delete waits for ever.
    """
    kube, body, now = applier.kube, family.job, time.time() if now is None else now
    assert body is not None
    if FINALIZER not in (body["metadata"].get("finalizers") or []):
        return True
    what, since = wanted(body["spec"]), now - epoch(body["metadata"]["deletionTimestamp"])
    if what is None:
        return await _let_go(kube, body)
    if since > LIMIT:
        return await _let_go(kube, body, f"not within {LIMIT:.0f} s")
    context = await read()
    if context is None or context.job.spec.object_store is None:
        return await _let_go(kube, body, "its manifest does not say where they are")
    with suppress(KubeError):  # whoever waits for the delete looks there; nothing waits for the words
        await _say(applier, body, what, now)
    step = api.StepSpec(ERASE, "cowest_training.erase", "", (("--store", context.store), ("--what", what)))
    needed = (*steps.accounts(context), steps.step_map(context, step))  # a foreground delete takes children first
    try:
        for each in needed:
            if key_of(each) not in family.children:
                await applier.put(each, family)
        if await _stopped(kube, context, family, since) and await _erased(applier, context, step, family, now):
            return await _let_go(kube, body)
    except KubeError as error:
        if not (why := _hopeless(error)):
            raise
        return await _let_go(kube, body, why)
    return False


async def _say(applier: Applier, body: Mapping[str, Any], what: str, now: float) -> None:
    """Once, in place of what the round waited for. Raises as `Applier.put_status` does."""
    status, metadata = body.get("status") or {}, body["metadata"]
    said = story.said(status)
    if any(each.reason == api.REASON_ERASING for each in said):
        return
    named = "models and traces" if what == "all" else what
    message = f"the job is deleted and goes once its {named} are erased, as deletionPolicy says, {LIMIT:.0f} s at most."
    generation = int(metadata["generation"])
    erasing = api.Condition(api.ROUND_PROGRESSING, "False", api.REASON_ERASING, message, generation, now)
    conditions = (*(each for each in said if each.type != api.ROUND_PROGRESSING), erasing)
    new = {**status, "conditions": story.conditions(conditions)}
    version = int(metadata["resourceVersion"])
    await applier.put_status(metadata["namespace"], metadata["name"], new, metadata["uid"], version)


def _hopeless(error: KubeError) -> str:
    """Why no later look can erase; empty for what may pass."""
    if isinstance(error, TakenError):
        return str(error)
    if error.code == 403 and "being terminated" in str(error):
        return "its namespace is being deleted, and nothing can be started there"
    return ""


def patience(context: Context) -> float:
    """Seconds for writers to end: as long as a gateway may need for its last answer and record, so that none is
    written after the erasing, unless that would leave no time for it."""
    return min(max(PODS_LIMIT, servers.grace_seconds(context.job)), LIMIT - ERASING)


async def _stopped(kube: Kube, context: Context, family: Family, since: float) -> bool:
    """What writes goes before what it wrote: steps, gateway, live scores. No pod is waited for without end."""
    writers = {("Deployment", context.name(part)) for part in ("gateway", "live")}
    for (kind, name), seen in list(family.children.items()):
        is_step = kind == "Workflow" and seen.facts["step"] != ERASE and seen.facts["phase"] in ACTIVE
        if not seen.deleting and (is_step or kind == "RayService" or (kind, name) in writers):
            await kube.delete(kind, context.namespace, name)
            family.children.pop((kind, name), None)
    erasing = {workflow.name for workflow in _erasing(family)}
    pods = [p for p in family.of("Pod") if p.facts["part"] in WRITE and p.facts["workflow"] not in erasing]
    return since > patience(context) or all(pod.facts["ended"] for pod in pods)


async def _erased(applier: Applier, context: Context, step: api.StepSpec, family: Family, now: float) -> bool:
    """One attempt after the other, until one succeeds."""
    attempts = _erasing(family)
    if not attempts:
        await applier.create(steps.unshared(context, step), family)
        return False
    last = attempts[-1].facts
    if last["phase"] in ("Failed", "Error") and now > last["finished"] + retry_after(last["attempt"], LONGEST_WAIT):
        log.warning("%s: erasing failed: %s; again", context.job.name, last["words"] or last["message"])
        await applier.create(steps.unshared(context, step, last["attempt"] + 1), family)
    return bool(last["phase"] == "Succeeded")


def _erasing(family: Family) -> list[Seen]:
    return sorted((w for w in family.of("Workflow") if w.facts["step"] == ERASE), key=lambda w: w.facts["attempt"])


async def _let_go(kube: Kube, body: Mapping[str, Any], why: str = "") -> bool:
    if why:
        metadata = body["metadata"]
        job = f"{metadata['namespace']}/{metadata['name']}"
        log.warning("%s: its artifacts were not erased: %s", job, why, extra={"job": job})
    await _finalizer(kube, body, False)
    return True


async def _finalizer(kube: Kube, body: Mapping[str, Any], there: bool) -> None:
    """By a field manager of its own: an apply that does not name it takes away this one and no other."""
    metadata = body["metadata"]
    await kube.apply(
        {
            "apiVersion": f"{api.GROUP}/{api.VERSION}",
            "kind": api.KIND,
            "metadata": {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                **({"finalizers": [FINALIZER]} if there else {}),
            },
        },
        MANAGER,
    )
