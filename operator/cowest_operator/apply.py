"""I/O: makes the cluster what a plan says. Routing first, then children, one status write, events, Workflows, prune.

Each order is safe to be cut anywhere: what is written twice is the same, and what was not written is decided anew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cowest_operator import api, story, watched
from cowest_operator.kube import Kube, KubeError
from cowest_operator.objects import common, ray, steps
from cowest_operator.objects import desired as builders
from cowest_operator.objects.common import Child, Context, key_of
from cowest_operator.observe import Memory, Observed, sentence
from cowest_operator.platform import NO_ARGO, NO_KSERVE
from cowest_operator.watched import ACTIVE, Family, Seen, is_of, see, shared
from cowest_serving.contract import Routing, digest_of, dump

log = logging.getLogger("cowest.apply")

COMPONENT = "cowest-operator"  # who says an event

DRAIN = 10.0  # seconds that a weak model outlives its last traffic
STATUS_EVERY = 60.0  # seconds between writes of a status that only says something else
KEPT_TRIALS = 2  # whose frozen manifests and steps are kept for a look
KEPT_ATTEMPTS = 5  # of a step that failed, for the same


class JobGoneError(Exception):
    """There is no such job any more, or another of its name."""


class OvertakenError(Exception):
    """Somebody wrote the job after it was looked at: what was decided is decided anew from what is there now.

    Mostly a person. It may be a second operator too: a leader that hung for longer than its lease, or one that was
    installed by mistake. The lease alone would let both write for a while.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__(f"{job['metadata']['namespace']}/{job['metadata']['name']}")
        self.job = job  # as it is now


class TakenError(KubeError):
    """There is an object of the wanted name that is not this job's. No look soon helps, a person does."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(
            422,
            f"{kind} {name} exists and is not this job's: it is left as it is, and the job lacks its own. Rename one of"
            " the two: make the job anew under another name, or the other object.",
        )


@dataclass
class Refused:
    """What the API server refuses in one look; `error` asks for another look soon."""

    troubles: list[api.Trouble] = field(default_factory=list)
    error: KubeError | None = None

    @contextmanager
    def by(self, kind: str, soon: bool = True) -> Iterator[None]:
        """Goes on after a refusal; `soon`: an error that may pass is a reason to look again soon."""
        try:
            yield
        except KubeError as error:
            if error.code == 0:
                raise  # nobody is there
            self.troubles.append(_refused({"kind": kind}, error))
            if soon and (error.retryable or kind == "ConfigMap"):
                self.error = self.error or error


class Applier:
    """One for all jobs."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube

    async def apply(self, seen: Observed, plan: api.Plan, family: Family, memory: Memory) -> None:
        """Raises `KubeError` when the API server is away or is to be asked again soon.

        What it refuses becomes a trouble of the next look. No transition is written before its routing and its frozen
        manifest; a child that is refused holds up no other, and none of them what the status says.
        """
        context, refused = seen.context, Refused()
        if not seen.stopped:
            with refused.by("ConfigMap"):
                await self._routing(context, plan.routing, family)
                await self._freeze(seen, plan.status.candidate, family)
            if refused.error is not None:
                plan = _standing_still(plan, seen)
            await self._children(seen, plan, family, memory, refused)
        memory.apply_troubles = tuple(refused.troubles)
        transition = _transition(seen, plan, memory)
        await self.write_status(context, plan, seen.world.traces, family, memory)
        for event in (*plan.events, *story.warnings(seen.world.status.conditions, plan.status.conditions)):
            await self._event(context, event, transition)
        for note in seen.notes:
            if note.message not in memory.said:
                await self._event(context, note)
                memory.said.add(note.message)
        if refused.error is not None:
            raise refused.error
        if not seen.stopped:
            await self._submit(seen, plan, family, memory)
            await self._hasten(context, family, memory)
            await self._prune(seen, plan, family, memory)

    # ------------------------------------------------------------ children
    async def _routing(self, context: Context, routing: Routing, family: Family) -> None:
        """Its version grows with its content, so that two gateways can say which is newer."""
        known = family.children.get(("ConfigMap", context.name("routing")))
        before = _routing_of(known)
        if before is not None and {**before, "version": 0} == {**dump(routing), "version": 0}:
            return
        version = before["version"] if before is not None else await self._version_before(context, family)
        child = builders.routing_map(context, replace(routing, version=version + 1))
        await self.put(child, family)

    async def _version_before(self, context: Context, family: Family) -> int:
        """Of the routing where the job has none of its own: pods of a job of this name may still follow an older one.

        One that was deleted, or edited into something else, had a version that nobody knows any more. It counted from
        1, so the clock is ahead of it.
        """
        found = await self.kube.get("ConfigMap", context.namespace, context.name("routing"))
        left = see("ConfigMap", found) if found else None
        if (before := _routing_of(left)) is not None:
            return int(before["version"])
        is_new = "state" not in ((family.job or {}).get("status") or {})
        return 0 if is_new and left is None else int(time.time())

    async def _freeze(self, seen: Observed, trial: api.Trial | None, family: Family) -> None:
        """Before the status that begins the trial: with an edit between the two it begins anew, by what is edited."""
        if trial is None:
            return
        child, begun = builders.frozen_manifest(seen.context, trial), seen.world.status.candidate
        known = family.children.get(key_of(child))
        is_new = begun is None or begun.number != trial.number
        if known is not None and is_new and known.facts.get("frozen") != child["data"]["job.json"]:
            await self.kube.delete(known.kind, seen.context.namespace, known.name, known.uid)
            del family.children[key_of(child)]
            known = None
        if known is None:
            await self.create(child, family)

    async def _children(self, seen: Observed, plan: api.Plan, family: Family, memory: Memory, refused: Refused) -> None:
        for child in builders.desired(seen.context, plan, seen.frozen_document):
            with refused.by(child["kind"], soon=child["kind"] not in ("InferenceService", "WorkflowTemplate")):
                await self._child(child, family, memory)

    async def _child(self, child: Child, family: Family, memory: Memory) -> None:
        key, intent = key_of(child), bytes.fromhex(common.hex_of(digest_of(child), 64))
        known = family.children.get(key)
        if known is not None and memory.applied.get(key) == (intent, known.stamp):
            return
        if known is not None and child["kind"] == "PersistentVolumeClaim":
            return  # a claim cannot be changed, but for its size by a person
        now = await self.put(child, family)
        memory.applied[key] = (intent, now)

    async def put(self, child: Child, family: Family) -> str:
        """The stamp that it leaves. Raises `TakenError` too: an apply by force would take over what is another's."""
        return self._note(family, await self._put(child, family))

    async def _put(self, child: Child, family: Family) -> dict[str, Any]:
        known = family.children.get(key_of(child))
        uid = known.uid if known is not None else await self._uid_of_ours(child)
        try:
            return await self.kube.apply(child)
        except KubeError as error:
            if error.code != 422 or "immutable" not in str(error) or child["kind"] == "PersistentVolumeClaim":
                raise
            kind, name = key_of(child)
            await self.kube.delete(kind, child["metadata"]["namespace"], name, uid)  # a selector or roleRef was edited
            return await self.kube.apply(child)

    async def _uid_of_ours(self, child: Child) -> str | None:
        """None: there is none of its name. By a list of one, as of jobs: children are watched and so listed anyway."""
        kind, name = key_of(child)
        listed = self.kube.list(kind, child["metadata"]["namespace"], fieldSelector=f"metadata.name={name}")
        found = await anext(listed, None)
        return str(_of_the_job(child, found)["metadata"]["uid"]) if found else None

    async def create(self, child: Child, family: Family) -> None:
        """Once: what is there already stays as it is. Raises `TakenError` too."""
        await self.kube.create(child)
        kind, name = key_of(child)
        if found := await self.kube.get(kind, child["metadata"]["namespace"], name):
            self._note(family, _of_the_job(child, found))

    def _note(self, family: Family, answer: Mapping[str, Any]) -> str:
        """What the API server answered is newer than what the watch has shown, unless the answer was overtaken."""
        seen = see(answer["kind"], answer)
        known = family.children.get((seen.kind, seen.name))
        if known is not None and known.uid == seen.uid and known.version > seen.version:
            return seen.stamp
        if family.job is None or seen.owner == family.job["metadata"]["uid"]:  # else of a job of this name before
            family.children[(seen.kind, seen.name)] = seen
        return seen.stamp

    # ------------------------------------------------------------ status and events
    async def write_status(
        self, context: Context, plan: api.Plan, traces: api.TraceCounts, family: Family, memory: Memory
    ) -> None:
        """One write a transition; what only says something else waits for a minute; nothing new is not written."""
        assert family.job is not None
        new = story.written(plan.status, plan, traces, context.job.generation)
        old = memory.written if memory.written is not None else family.job.get("status") or {}
        moved = story.transition(new) != story.transition(old)
        waited = time.monotonic() - memory.written_at > STATUS_EVERY
        if not moved and not (waited and new != old):
            return
        memory.version = await self.put_status(context.namespace, context.job.name, new, context.uid, memory.version)
        memory.written, memory.written_at = shared(new), time.monotonic()
        memory.state = story.read(new)

    async def put_status(self, namespace: str, name: str, status: Mapping[str, Any], uid: str, version: int) -> int:
        """The version that it leaves. Raises `OvertakenError` when the job is not of `version` any more, and
        `JobGoneError` after a delete that no watch has shown yet, also when another of its name is there."""
        try:
            answer = await self.kube.apply_status(namespace, name, status, version)
        except KubeError as error:
            if error.code not in (404, 409):
                raise
            found = await self._job(namespace, name)
            if found is None or found["metadata"]["uid"] != uid:
                raise JobGoneError(f"{namespace}/{name}") from error
            if error.code == 409:
                raise OvertakenError(found) from error
            raise
        return int(answer["metadata"]["resourceVersion"])

    async def _job(self, namespace: str, name: str) -> dict[str, Any] | None:
        """By a list of one: jobs are watched and so listed anyway, and a right to get them would serve this alone."""
        return await anext(self.kube.list(api.KIND, namespace, fieldSelector=f"metadata.name={name}"), None)

    async def _event(self, context: Context, event: api.Event, transition: str = "") -> None:
        """Named by its content and its transition: a restart that decides the same says it once, and what happens
        again in the same words is said again."""
        content = [context.uid, event.reason, event.message, transition]
        name = f"{context.job.name}.{common.hex_of(digest_of(content), 16)}"
        now = datetime.now(UTC)
        second = story.rfc3339(now.timestamp())
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": context.namespace},
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:1024],
            "involvedObject": {
                "apiVersion": f"{api.GROUP}/{api.VERSION}",
                "kind": api.KIND,
                "name": context.job.name,
                "namespace": context.namespace,
                "uid": context.uid,
            },
            "source": {"component": COMPONENT},
            "firstTimestamp": second,
            "lastTimestamp": second,
            # What is said within a second is told in its order; with a time of its own an event needs the rest too.
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "action": event.reason,
            "reportingComponent": COMPONENT,
            "reportingInstance": COMPONENT,
            "count": 1,
        }
        try:
            await self.kube.create(body)
        except KubeError as error:  # an event is never worth a decision
            log.warning("event not written: %s", error, extra=_of(context))

    # ------------------------------------------------------------ steps
    async def _submit(self, seen: Observed, plan: api.Plan, family: Family, memory: Memory) -> None:
        context = seen.context
        for step in plan.steps:
            if step.keeps_running:
                continue
            attempt = seen.submit.get(step.name) or (1 if self._unknown(step, family) else 0)
            kind = "ConfigMap"
            if not attempt and _is_as_it_was_put((kind, steps.step_name(context, step)), family, memory):
                continue
            orders = steps.step_map(context, step, dict(seen.frozen_document))
            try:
                await self._child(orders, family, memory)
                if not attempt:
                    continue
                kind = "Workflow"
                if step.name in seen.instead:
                    await self._give_up(context, seen.instead[step.name], family)
                await self.create(steps.workflow(context, step, attempt), family)
            except KubeError as error:
                if error.code == 0:
                    raise  # nobody is there
                memory.apply_troubles = (*memory.apply_troubles, _refused({"kind": kind}, error))
                if error.retryable:
                    raise

    async def _give_up(self, context: Context, name: str, family: Family) -> None:
        """It has not begun, and holds the mutex that the next attempt needs."""
        log.info(
            "Workflow %s has not started; the edited manifest may let another", name, extra={"job": context.job.name}
        )
        await self.kube.delete("Workflow", context.namespace, name)
        family.children.pop(("Workflow", name), None)

    def _unknown(self, step: api.StepSpec, family: Family) -> bool:
        return not any(seen.facts["step"] == step.name for seen in family.of("Workflow"))

    async def _hasten(self, context: Context, family: Family, memory: Memory) -> None:
        """Argo looks at a Workflow 10 seconds after its pod ended, at worst twice; at once when it is written."""
        before, memory.hastened = memory.hastened, {}
        for workflow in family.of("Workflow"):
            last = family.last_of(workflow) if workflow.facts["phase"] == "Running" else None
            if last is None:
                continue
            ended = memory.hastened[workflow.uid] = last.facts["ended"]
            if before.get(workflow.uid) != ended:
                told = {"metadata": {"annotations": {steps.ENDED_ANNOTATION: story.rfc3339(ended)}}}
                try:
                    await self.kube.patch("Workflow", context.namespace, workflow.name, told)
                except KubeError as error:  # Argo comes to it by itself
                    log.info("Workflow %s was not told of its pods' end: %s", workflow.name, error, extra=_of(context))

    # ------------------------------------------------------------ prune
    async def _prune(self, seen: Observed, plan: api.Plan, family: Family, memory: Memory) -> None:
        context = seen.context
        for kind, name in list(self._not_wanted(seen, plan, family, memory)):
            if (child := family.children.get((kind, name))) is not None:
                await self.kube.delete(kind, context.namespace, name, child.uid)
            memory.applied.pop((kind, name), None)
            family.children.pop((kind, name), None)

    def _not_wanted(self, seen: Observed, plan: api.Plan, family: Family, memory: Memory) -> Iterator[tuple[str, str]]:
        wanted = {key_of(child) for child in builders.desired(seen.context, plan, seen.frozen_document)}
        wanted.add(("ConfigMap", seen.context.name("routing")))
        for key, child in list(family.children.items()):
            if key in wanted:
                memory.unwanted.pop(child.name, None)
            elif not child.deleting and self._is_over(child, seen.context, plan, family, memory):
                yield key

    def _is_over(self, child: Seen, context: Context, plan: api.Plan, family: Family, memory: Memory) -> bool:
        """Of a child that no plan names: may it go now?"""
        running = {step.name for step in plan.steps}
        if (child.kind, child.name) == ray.kept_in(context, other=True):  # another engine was chosen
            return self._gateway_answers(context, family)
        match child.kind:
            case "Pod" | "PersistentVolumeClaim" | watched.PREDICTOR:
                return False
            case "InferenceService":
                since = memory.unwanted.setdefault(child.name, time.monotonic())
                return time.monotonic() - since > DRAIN
            case "Workflow":
                if _active(child):
                    return child.facts["step"] not in running
                return child.facts["phase"] != "Succeeded" and (
                    _is_past(context, child.name, plan)
                    or _is_outdone(child, family)
                    or _is_forgotten(context, child, plan)
                )
            case "WorkflowTemplate":
                return not any(_active(workflow) for workflow in family.of("Workflow"))
            case "ConfigMap":
                of_no_trial = _trial_of(context, child.name) is None
                return self._rolled_out(context, family) if of_no_trial else _is_past(context, child.name, plan)
        return True

    def _gateway_answers(self, context: Context, family: Family) -> bool:
        """The old one may go only when the new one can take its requests."""
        seen, wanted = family.children.get(ray.kept_in(context)), context.job.spec.gateway.replicas
        return seen is not None and bool(seen.facts["current"] and seen.facts["available"] >= wanted)

    def _rolled_out(self, context: Context, family: Family) -> bool:
        """Pods of before the last edit still mount the manifest of before it, and so does each that takes the place of
        one while a rollout is stuck."""
        keys = (ray.kept_in(context), *(("Deployment", context.name(part)) for part in ("proxy", "observer")))
        parts = (family.children.get(key) for key in keys)
        switching = ray.kept_in(context, other=True) in family.children
        return not switching and all(seen and seen.facts["current"] and seen.facts["updated"] for seen in parts)


def _is_as_it_was_put(key: tuple[str, str], family: Family, memory: Memory) -> bool:
    """And nobody else wrote it since, as far as is known: what runs goes on by what it began with."""
    known, put = family.children.get(key), memory.applied.get(key)
    return known is not None and (put is None or put[1] == known.stamp)


def _transition(seen: Observed, plan: api.Plan, memory: Memory) -> str:
    """What sets it apart from every other: the word of a person that it takes in, else the version of the job that it
    was decided from, over which nothing but its own status is written."""
    taken_in = plan.status.last_action
    return taken_in if taken_in != seen.world.status.last_action else str(memory.version)


def _standing_still(plan: api.Plan, seen: Observed) -> api.Plan:
    """Without its transition, which the next look decides again; what is said of the job is said."""
    return replace(plan, status=replace(seen.world.status, conditions=plan.status.conditions), events=())


def _of(context: Context) -> dict[str, str]:
    """What a line of the log carries, to be found by."""
    return {"job": f"{context.namespace}/{context.job.name}"}


def _of_the_job(child: Child, found: dict[str, Any]) -> dict[str, Any]:
    """What is there under the name of `child`. Raises `TakenError` where it is somebody else's."""
    if not is_of(found["metadata"], child["metadata"]["labels"][common.JOB_LABEL]):
        raise TakenError(*key_of(child))
    return found


def _routing_of(seen: Seen | None) -> dict[str, Any] | None:
    """None where there is none, or a hand made it something else."""
    try:
        told = json.loads(seen.facts["routing"]) if seen is not None else None
    except (KeyError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) and type(told.get("version")) is int else None


def _is_past(context: Context, name: str, plan: api.Plan) -> bool:
    """Is it of a trial that nobody looks at any more?"""
    number = _trial_of(context, name)
    return number is not None and number < plan.status.trials - KEPT_TRIALS


def _is_forgotten(context: Context, failed: Seen, plan: api.Plan) -> bool:
    """Once its trial is over it has the time of what succeeded: its pod, with the log that says why, goes with it."""
    trial = plan.status.candidate
    of_now = trial is not None and _trial_of(context, failed.name) == trial.number
    return not of_now and time.time() > (failed.facts["finished"] or failed.created) + steps.KEPT_SECONDS


def _is_outdone(failed: Seen, family: Family) -> bool:
    """Argo deletes what succeeded; that a step failed is known by its Workflow alone, and the last ones are kept."""
    later = (
        each
        for each in family.of("Workflow")
        if each.facts["step"] == failed.facts["step"] and each.facts["attempt"] > failed.facts["attempt"]
    )
    return sum(1 for _ in later) >= KEPT_ATTEMPTS


def _active(workflow: Seen) -> bool:
    return workflow.facts["phase"] in ACTIVE


def _trial_of(context: Context, name: str) -> int | None:
    """3 for `J-r3` and `J-r3-feedback`; None for what belongs to no trial."""
    head = name.removeprefix(context.name("r")).split("-")[0]
    return int(head) if name.startswith(context.name("r")) and head.isdigit() else None


def _refused(child: Mapping[str, Any], error: KubeError) -> api.Trouble:
    kind = child["kind"]
    if isinstance(error, TakenError):
        return api.Trouble(api.REASON_NAME_TAKEN, str(error))
    if error.code == 404 and kind == "InferenceService":
        return NO_KSERVE
    if error.code == 404 and kind in ("Workflow", "WorkflowTemplate"):
        return NO_ARGO
    return api.Trouble(api.REASON_API_REFUSED, sentence(f"{kind}: the API server refuses: {str(error)[:600]}"))
