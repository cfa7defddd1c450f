"""I/O: what `spec.deletionPolicy: Delete` asks for when a job goes: its artifacts are erased, within a time limit.

With Keep, the default, there is no finalizer, and a delete never waits for the operator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from cowest_operator import api
from cowest_operator.kube import Kube
from cowest_operator.objects import steps
from cowest_operator.objects.common import Context
from cowest_operator.watched import Family, epoch

log = logging.getLogger("cowest.farewell")

FINALIZER, MANAGER = "cowest.dev/artifacts", "cowest-finalizer"
LIMIT = 600.0  # seconds after the delete; then the job goes and its artifacts stay, and the log says so


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


async def goodbye(kube: Kube, context: Context | None, family: Family, now: float | None = None) -> bool:
    """One look at a job that is being deleted; True when it is let go. `context` is `None` when it cannot be read."""
    body = family.job
    assert body is not None
    if FINALIZER not in (body["metadata"].get("finalizers") or []):
        return True
    what = wanted(body["spec"])
    late = (time.time() if now is None else now) - epoch(body["metadata"]["deletionTimestamp"]) > LIMIT
    if what is None or context is None or context.job.spec.object_store is None or late:
        if what is not None:
            log.warning("%s: its artifacts were not erased", body["metadata"]["name"])
        await _finalizer(kube, body, False)
        return True
    step = api.StepSpec("erase", "cowest_training.erase", "", (("--store", context.store), ("--what", what)))
    known = family.children.get(("Workflow", steps.workflow_name(context, step, 1)))
    if known is None:
        await kube.apply(steps.step_map(context, step))
        await kube.create(steps.workflow(context, step))
    elif known.facts["phase"] == "Succeeded":
        await _finalizer(kube, body, False)
        return True
    return False


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
