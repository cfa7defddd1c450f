"""All objects of a job, in the order in which they are needed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cowest_operator import api
from cowest_operator.objects import common, servers, steps, weak
from cowest_operator.objects.common import Child, Context
from cowest_serving.contract import Routing, dump


def desired(context: Context, plan: api.Plan, frozen: Mapping[str, Any] | None = None) -> tuple[Child, ...]:
    """What is kept as it is said here. Workflows and frozen manifests come apart: they are made once.

    `frozen` is the manifest of the trial that runs; its watcher goes by it.
    """
    return (
        common.job_map(context),
        *servers.observer(context),
        *servers.proxy(context, plan.status),
        *servers.gateway(context),
        *(weak.inference_service(context, server) for server in plan.servers),
        *steps.accounts(context),
        steps.workflow_template(context),
        *(child for step in plan.steps if step.keeps_running for child in servers.live_score(context, step, frozen)),
    )


def routing_map(context: Context, routing: Routing) -> Child:
    """Kept apart: it goes before all else, and its version grows with its content."""
    data = {"routing.json": common.canonical(dump(routing))}
    return common.config_map(context, context.name("routing"), "gateway", data, immutable=False)


def frozen_name(context: Context, trial: api.Trial) -> str:
    return context.name(f"r{trial.number}")


def frozen_manifest(context: Context, trial: api.Trial) -> Child:
    """The manifest as it was when the trial began: its steps go by this one."""
    data = {"job.json": common.canonical(context.document)}
    return common.config_map(context, frozen_name(context, trial), "manifest", data)


FROZEN = ("weak", "collaboration", "data", "feedback", "training", "gate", "canary")


def followed(frozen: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that a running trial goes by: what it learns from, how, and what it must show is frozen.

    What may not leave is as declared, at once.
    """
    kept = {name: frozen["spec"][name] for name in FROZEN if name in frozen["spec"]}
    hidden = {n: v for n, v in declared["spec"].get("collaboration", {}).items() if n == "redaction"}
    if "collaboration" in kept:
        kept["collaboration"] = {n: v for n, v in kept["collaboration"].items() if n != "redaction"} | hidden
    return {**declared, "spec": {**declared["spec"], **kept}}


# Parts of which an edit neither acts at once nor makes a candidate while a trial runs on the older values.
_WAITING = ("data", "feedback", "training", "gate", "canary")
_AT_ONCE = ("canary.approval", "training.stepDeadlineSeconds")  # or with the next attempt of a step


def waiting(frozen: Mapping[str, Any], declared: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that were edited since the running trial began and hold from the next one on, by their paths."""
    parts = (_edited(frozen["spec"].get(name), declared["spec"].get(name), name) for name in _WAITING)
    return tuple(path for found in parts for path in found if path not in _AT_ONCE)


def _edited(before: Any, after: Any, path: str) -> Iterator[str]:
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        if before != after:
            yield path
        return
    for name in dict.fromkeys((*before, *after)):
        yield from _edited(before.get(name), after.get(name), f"{path}.{name}")
