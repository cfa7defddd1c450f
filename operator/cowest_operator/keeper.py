"""One asyncio task a job: observe, decide, apply; then sleep until woken or until the plan says so."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from cowest_operator import api, farewell, reconcile, story
from cowest_operator.apply import Applier, JobGoneError, OvertakenError
from cowest_operator.kube import PLURALS, KubeError
from cowest_operator.metrics import Metrics
from cowest_operator.objects.common import JOB_LABEL, Context
from cowest_operator.observe import HoldError, Memory, Observer
from cowest_operator.watched import Family, Key, Watched

log = logging.getLogger("cowest.keeper")

AT_ONCE = 16  # looks side by side, those that wait for a slow answer among them
SWIFT, SLOW = 2, 0.5  # looks that do not wait; seconds after which one does, and another may begin
BUSY, LIVE, IDLE = 15.0, 2.0, 60.0  # seconds until a look that nothing has asked for
UNTIL_IDLE = 4  # looks in a row that find nothing new, before the next ones may wait longer
OVERTAKEN = 0.5  # seconds until a look at what somebody wrote meanwhile
LONGEST_BACKOFF = 60.0
LIST_AGAIN = 600.0  # seconds between two looks for what is gone without a word
SETTLE = 0.05  # seconds: events that come together are one look


class Turns:
    """Who may look. More looks at once make none of them faster where the API server has too much to do: each write
    waits for the others. But a door or a webhook that hangs must hold up no other job."""

    def __init__(self) -> None:
        self._all, self._swift = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(SWIFT)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self._all:
            await self._swift.acquire()
            is_swift = True

            def wait() -> None:
                nonlocal is_swift
                is_swift = False
                self._swift.release()

            timer = asyncio.get_running_loop().call_later(SLOW, wait)
            try:
                yield
            finally:
                timer.cancel()
                if is_swift:
                    self._swift.release()


class Keeper:
    """All jobs of one operator."""

    def __init__(self, watched: Watched, observer: Observer, applier: Applier, metrics: Metrics) -> None:
        self.watched, self.observer, self.applier, self.metrics = watched, observer, applier, metrics
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._wakes: dict[Key, asyncio.Event] = {}
        self._turns = Turns()
        self._closed = False
        self._looking: dict[str, asyncio.Lock] = {}  # by namespace, "" for all
        self._looked_at: set[tuple[str, str]] = set()  # (kind, namespace)

    def wake(self, key: Key) -> None:
        """Something of this job has changed. Starts its task with its first event, ends it with its last."""
        family = self.watched.families.get(key)
        if self._closed or family is None or family.job is None:
            return
        self._wakes.setdefault(key, asyncio.Event()).set()
        task = self._tasks.get(key)
        if task is None or task.done():
            # In a context of its own: kopf's would keep the whole body of this event for as long as the job lives.
            self._tasks[key] = asyncio.create_task(self._keep(key), context=contextvars.Context())

    def forget(self, key: Key) -> None:
        """The job is gone; its children go with it by their owner references."""
        if task := self._tasks.pop(key, None):
            task.cancel()
        self._wakes.pop(key, None)
        self.metrics.forget(key)

    async def close(self) -> None:
        """No write follows."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, key: Key) -> None:
        memory, failures = Memory(), 0
        while (family := self.watched.families.get(key)) is not None and family.job is not None:
            if memory.uid != (uid := family.job["metadata"]["uid"]):
                # A job that was made again under its name knows nothing of the one before.
                memory = Memory(uid, wake=partial(self.wake, key))
            wake = self._wakes.setdefault(key, asyncio.Event())
            wake.clear()
            try:
                async with self._turns.turn():
                    again = await self.turn(key, memory)
                failures = 0
            except JobGoneError:
                if self.watched.families.get(key) is family and family.job["metadata"]["uid"] == uid:
                    self.watched.job("DELETED", family.job)
                again = 0.0
            except KubeError as error:
                failures += 1
                again = min(2.0 ** min(failures, 10), LONGEST_BACKOFF)
                self.metrics.failed("api_server")
                log.warning("%s/%s: %s; again in %.0f s", *key, error, again, extra=_of(key))
            except Exception as error:  # a bug in one job must not end the others
                failures += 1
                again = min(2.0 ** min(failures, 10), LONGEST_BACKOFF)
                self.metrics.failed("bug")
                log.exception("%s/%s: reconciling failed; again in %.0f s", *key, again, extra=_of(key))
                await self._confess(key, memory, error)
            if again:
                try:
                    await asyncio.wait_for(wake.wait(), again * random.uniform(0.9, 1.1))
                    memory.quiet = 0
                    await asyncio.sleep(SETTLE)
                except TimeoutError:
                    memory.quiet += 1
        self._wakes.pop(key, None)
        self.metrics.forget(key)

    async def turn(self, key: Key, memory: Memory) -> float:
        """One look and what it asks for; seconds until the next one."""
        try:
            return await self._turn(key, memory)
        except OvertakenError as error:
            if key in self.watched.families:
                self.watched.job("MODIFIED", error.job)
            return OVERTAKEN

    async def _turn(self, key: Key, memory: Memory) -> float:
        await self._look_around(key[0] if self.observer.settings.namespaces else "")
        if (family := self.watched.families.get(key)) is None:
            return 0.0
        assert family.job is not None
        if "deletionTimestamp" in family.job["metadata"]:
            return await self._goodbye(family, memory)
        begun = time.monotonic()
        await farewell.hold(self.applier.kube, family.job)
        try:
            seen = await self.observer.world(family, memory)
        except HoldError as hold:
            await self._hold(key, memory, hold.trouble)
            return BUSY
        plan = reconcile.plan(seen.world)
        await self.applier.apply(seen, plan, family, memory)
        self.metrics.reconciled(key, time.monotonic() - begun, plan.status)
        for event in plan.events:
            said = _of(key, reason=event.reason, round=_round(plan.status))
            log.info("%s/%s: %s", *key, event.message, extra=said)
        traces, memory.traces = memory.traces, seen.world.traces
        if seen.world.troubles or (plan.status, memory.traces) != (seen.world.status, traces):
            memory.quiet = 0
        return _pace(plan, memory.quiet)

    async def _look_around(self, namespace: str) -> None:
        """Once, before anything is decided: watches begin one by one, and a job may be shown before its children.

        Where that fails the jobs of this namespace wait, and no others.
        """
        async with self._looking.setdefault(namespace, asyncio.Lock()):
            for kind in sorted(self._kinds()):
                if (kind, namespace) not in self._looked_at:
                    await self._look_at_all(kind, namespace)
                    self._looked_at.add((kind, namespace))

    async def follow(self, every: float = LIST_AGAIN) -> None:
        """For ever: looks for what is gone without a word."""
        while True:
            await asyncio.sleep(every * random.uniform(0.9, 1.1))
            try:
                await self.look_for_the_gone()
            except KubeError as error:
                log.warning("what is there cannot be listed: %s", error)
            except Exception:  # one answer that nobody can read must not end all looks to come
                log.exception("what is there cannot be listed")

    async def look_for_the_gone(self) -> None:
        """After a gap in a watch kopf lists anew, and is told of no delete. Names only: it is cheap at 1,000 jobs."""
        for namespace in self.observer.settings.namespaces or ("",):
            if (jobs := await self._names(api.KIND, namespace)) is not None:
                for key in self.watched.jobs_gone(namespace, *jobs):
                    log.info("%s/%s is gone", *key, extra=_of(key))
                    self.forget(key)
            for kind in self._kinds():
                if (found := await self._names(kind, namespace, labelSelector=JOB_LABEL)) is not None:
                    for key in self.watched.gone(kind, namespace, *found):
                        self.wake(key)

    async def _names(self, kind: str, namespace: str, **query: str) -> tuple[int, set[tuple[str, str]]] | None:
        """None where the kind is not there, or the namespace and our rights with it."""
        try:
            return await self.applier.kube.names(kind, namespace, **query)
        except KubeError as error:
            if error.code not in (403, 404):
                raise
            if error.code == 403:
                log.warning("%s: %s", namespace or "all namespaces", error)
            return None

    def _kinds(self) -> set[str]:
        return PLURALS.keys() - {api.KIND, "Event"} - (set() if self.observer.discovery.rayservices else {"RayService"})

    async def _look_at_all(self, kind: str, namespace: str) -> None:
        try:
            async for body in self.applier.kube.list(kind, namespace, labelSelector=JOB_LABEL):
                self._look_at(kind, body)
        except KubeError as error:
            if error.code != 404:  # KServe, Argo Workflows or KubeRay is not there
                raise

    def _look_at(self, kind: str, body: Mapping[str, Any]) -> None:
        """What one job's child says that nobody can read must not stop the others."""
        try:
            self.watched.child(None, kind, body)
        except Exception:
            metadata = body["metadata"]
            log.exception("%s %s/%s cannot be read", kind, metadata.get("namespace"), metadata.get("name"))

    async def _goodbye(self, family: Family, memory: Memory) -> float:
        """Nothing is decided any more, and no pod that may be gone is asked."""

        async def context() -> Context | None:
            try:
                return await self.observer.context(family, memory)
            except HoldError:
                return None

        gone = await farewell.goodbye(self.applier, context, family)
        return IDLE if gone else LIVE

    async def _confess(self, key: Key, memory: Memory, error: Exception) -> None:
        """Whoever looks at the job sees that a look at it has failed, not only who reads the log."""
        words = f"{type(error).__name__}: {error}"[:600].rstrip(". ")
        message = (
            f"the operator's look at this job ended early: {words}. What is served stays served, and nothing is"
            " decided. It looks again by itself; its log has the whole of it."
        )
        try:
            await self._hold(key, memory, api.Trouble(api.REASON_OPERATOR_FAILS, " ".join(message.split())))
        except Exception as second:
            log.warning("%s/%s: nor can its status say so: %s", *key, second, extra=_of(key))

    async def _hold(self, key: Key, memory: Memory, trouble: api.Trouble) -> None:
        """Nothing can be decided, and no manifest before this one is known; say so and leave everything as it is."""
        family = self.watched.families[key]
        assert family.job is not None
        said = story.said(family.job.get("status"))
        generation = int(family.job["metadata"]["generation"])
        kept = tuple(c for c in said if c.type not in (api.DEGRADED, api.ROUND_PROGRESSING))
        known = {c.type: c for c in said}

        def condition(kind: str, value: str) -> api.Condition:
            old = known.get(kind)
            since = old.last_transition if old and old.status == value else time.time()
            as_status = "True" if value == "True" else "False"
            return api.Condition(kind, as_status, trouble.reason, trouble.message, generation, since)  # type: ignore[arg-type]

        conditions = (*kept, condition(api.ROUND_PROGRESSING, "False"), condition(api.DEGRADED, "True"))
        self.metrics.held(key, conditions)
        new = dict(family.job.get("status") or {})
        new |= {"conditions": story.conditions(conditions), "observedGeneration": generation}
        if story.transition(new) == story.transition(memory.written or family.job.get("status") or {}):
            return
        await self.applier.put_status(*key, new, memory.uid, int(family.job["metadata"]["resourceVersion"]))
        memory.written = new


def _of(key: Key, **more: Any) -> dict[str, Any]:
    """What a line of the log carries, to be found by."""
    return {"job": "/".join(key), **more}


def _round(status: api.Status) -> int:
    """The trial that runs, else the last one."""
    return status.candidate.number if status.candidate else max(0, status.trials - 1)


def _pace(plan: api.Plan, quiet: int) -> float:
    """`quiet`: looks in a row that nothing had asked for and that found nothing new, as of a job without traffic. Not
    the first ones: where the strong endpoint fails all users, no trace comes either."""
    if plan.again_after == 0.0:
        return 0.0
    trial = plan.status.candidate
    if trial is None:
        return IDLE if quiet > UNTIL_IDLE else BUSY
    return LIVE if trial.stage != "Preparing" else BUSY
