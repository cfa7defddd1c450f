"""The operator: what wakes it (kopf), who may write (a Lease), and its own health. `python -m cowest_operator.main`

kopf's daemons, timers and change handlers would add a finalizer to each job, and with it a delete that waits while the
operator is away. So only `on.event` is used: it wakes the job's own task (keeper.py), which looks at everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import kopf
from aiohttp import web
from kopf._core.reactor import inventory
from kubernetes.aio import client
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from cowest_operator import api, kube, settings
from cowest_operator.apply import Applier
from cowest_operator.doors import Doors
from cowest_operator.keeper import Keeper
from cowest_operator.kube import Kube
from cowest_operator.metrics import Metrics
from cowest_operator.objects.common import JOB_LABEL
from cowest_operator.observe import Observer
from cowest_operator.platform import Discovery
from cowest_operator.watched import Watched

log = logging.getLogger("cowest.operator")

# Seconds. The writer stops HELD after its last renewal began, a standby begins FREE after it saw that renewal.
FREE, HELD, EVERY, LEASE_TIMEOUT = 15, 10, 2, 5
CHILDREN = tuple(kind for kind in kube.PLURALS if kind not in (api.KIND, "Event"))


def login(**told: Any) -> kopf.ConnectionInfo | None:
    """In a pod its own account, else the current kubeconfig: as `Kube.connect`."""
    return kopf.login_with_service_account(**told) or kopf.login_with_kubeconfig(**told)


def children(rayservices: bool) -> tuple[str, ...]:
    """The kinds that are watched: what the operator has no right to is not."""
    return tuple(kind for kind in CHILDREN if rayservices or kind != "RayService")


def registry(watched: Watched, keeper: Keeper, kinds: tuple[str, ...] = CHILDREN) -> kopf.OperatorRegistry:
    """Every event does the same: note what was seen, wake the job."""
    built = kopf.OperatorRegistry()
    kopf.on.login(registry=built, id="login")(login)

    async def job_seen(type: str | None, body: Any, **_: Any) -> None:
        key = watched.job(type, body)
        if type == "DELETED":
            keeper.forget(key)
        else:
            keeper.wake(key)

    def child_seen(kind: str) -> Any:
        async def seen(type: str | None, body: Any, **_: Any) -> None:
            if key := watched.child(type, kind, body):
                keeper.wake(key)

        return seen

    kopf.on.event(api.GROUP, api.VERSION, api.PLURAL, registry=built)(job_seen)
    for kind in kinds:
        version, plural = kube.PLURALS[kind]
        group, _, number = version.rpartition("/")
        kopf.on.event(group, number, plural, registry=built, id=f"{plural}-seen")(child_seen(kind))
    return built


class Patience:
    """Seconds between kopf's tries of one request; a watch of objects goes on with the last pause for ever.

    A watch that gives up ends the whole operator, and one of many namespaces may have lost its Role. What kopf asks
    of the cluster has an end: refused the list of namespaces, it takes those that it was told.
    """

    def __init__(self, *pauses: float) -> None:
        self.pauses = pauses

    def __iter__(self) -> Iterator[float]:
        yield from self.pauses
        task = asyncio.current_task()
        if task is not None and task.get_name().startswith("watcher for "):  # kopf's name of it
            yield from itertools.repeat(self.pauses[-1])


def kopf_settings() -> kopf.OperatorSettings:
    built = kopf.OperatorSettings()
    built.peering.standalone = True
    built.posting.enabled = False
    built.watching.server_timeout, built.watching.client_timeout = 300, 330
    built.watching.chunk_size = kube.CHUNK
    built.queueing.idle_timeout = 0.5  # seconds that the task of an object outlives its last event
    built.networking.request_timeout, built.networking.connect_timeout = 30, 5
    built.networking.error_backoffs = Patience(1, 1, 2, 3, 5, 8, 13, 21)
    built.persistence.diffbase_storage = NothingKept()
    for kind in CHILDREN:
        version, plural = kube.PLURALS[kind]
        built.watching.label_selectors[version.rpartition("/")[0], plural] = JOB_LABEL
    return built


class NothingKept(kopf.AnnotationsDiffBaseStorage):
    """kopf copies each object twice to tell what has changed, for handlers that we do not have: a sixth of our CPU."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})


class Forgetful(inventory.ResourceMemories):
    """kopf keeps a kilobyte of every object that it ever saw, for handlers that we do not have: 30 MB at 1,000 jobs."""

    async def recall(self, raw_body: Any, **told: Any) -> inventory.ResourceMemory:
        return await super().recall(raw_body, **{**told, "ephemeral": True})


class Operator:
    """Everything that one process is."""

    def __init__(self, told: settings.Settings, api_server: Kube, doors: Doors) -> None:
        self.told, self.kube, self.doors = told, api_server, doors
        self.metrics = Metrics()
        self.watched = Watched()
        self.discovery = Discovery(api_server, told.kserve_mode, told.rayservices, told.namespaces)
        self.keeper = Keeper(
            self.watched, Observer(api_server, doors, told, self.discovery), Applier(api_server), self.metrics
        )
        self.watching = asyncio.Event()

    async def lead(self) -> None:
        """Watch and keep, for as long as the lease is held."""
        self.metrics.leader = True
        log.info("this replica writes")
        await self.discovery.begin()
        looking = [asyncio.create_task(each) for each in (self.discovery.follow(self.wake_all), self.keeper.follow())]
        try:
            await kopf.operator(
                registry=registry(self.watched, self.keeper, children(self.discovery.rayservices)),
                settings=kopf_settings(),
                memories=Forgetful(),
                clusterwide=not self.told.namespaces,
                namespaces=self.told.namespaces,
                ready_flag=self.watching,
            )
        finally:
            self.metrics.leader = False
            for task in looking:
                task.cancel()
            await self.keeper.close()

    def wake_all(self) -> None:
        for key in list(self.watched.families):
            self.keeper.wake(key)

    async def serve(self) -> web.AppRunner:
        """Health and metrics. A standby is ready: it waits for the lease as it should."""
        app = web.Application()
        app.router.add_get("/healthz", self._fine)
        app.router.add_get("/readyz", self._fine)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for port in {self.told.health_port, self.told.metrics_port} - {0}:
            await web.TCPSite(runner, "0.0.0.0", port).start()
        return runner

    async def _fine(self, _: web.Request) -> web.Response:
        return web.json_response({"leader": self.metrics.leader, "jobs": len(self.watched.families)})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics.text(), content_type="text/plain")


async def run(told: settings.Settings) -> None:
    api_server = await Kube.connect()
    doors = Doors()
    operator = Operator(told, api_server, doors)
    runner = await operator.serve()
    try:
        await _while_leading(operator)
    finally:
        await runner.cleanup()
        await doors.close()
        await api_server.close()


AWAY = (client.ApiException, aiohttp.ClientError, OSError)  # OSError: a time limit too


class LeaseLostError(Exception):
    """Another replica may write by now."""


class Lock(LeaseLock):
    """An API server that is away is a try that failed, not the end of the process: kubernetes 37 knows only refusals.

    Nor could it ever make a lease: it sends `pretty=True` where its own validation wants text.
    """

    async def get(self, name: str, namespace: str) -> Any:
        try:
            async with asyncio.timeout(LEASE_TIMEOUT):
                return await super().get(name, namespace)
        except AWAY as error:
            return False, client.ApiException(status=0, reason=_failed("read", name, namespace, error))

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        spec = self.update_lease(election_record)
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=spec)
        try:
            async with asyncio.timeout(LEASE_TIMEOUT):
                await self.api_instance.create_namespaced_lease(namespace, body)
        except AWAY as error:
            _failed("made", name, namespace, error)
            return False
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        try:
            async with asyncio.timeout(LEASE_TIMEOUT):
                return bool(await super().update(name, namespace, updated_record))
        except AWAY as error:
            _failed("renewed", name, namespace, error)
            return False


def _failed(what: str, name: str, namespace: str, error: BaseException) -> str:
    reason = str(getattr(error, "reason", "") or error or type(error).__name__)
    log.warning("the lease %s/%s cannot be %s: %s", namespace, name, what, reason)
    return reason


class Election(LeaderElection):
    """Ends `HELD` seconds after the last renewal that succeeded *began*, however long a request hangs.

    kubernetes 37 asks for the time between two tries only, and a try that hangs outlives the lease.
    """

    renewed = 0.0

    async def try_acquire_or_renew(self) -> bool:
        begun = time.monotonic()
        succeeded = bool(await super().try_acquire_or_renew())
        if succeeded:
            self.renewed = begun
        return succeeded

    async def renew_loop(self) -> None:
        while (left := self.renewed + HELD - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):  # Python 3.11's `wait_for` loses a cancel that comes with the answer
                    await self.try_acquire_or_renew()
            await asyncio.sleep(EVERY)


async def _while_leading(operator: Operator) -> None:
    """Until SIGTERM. Raises at any other end: this process ends, and another replica, or its own restart, goes on."""
    told = operator.told
    lock = Lock(told.lease, told.namespace, told.identity, operator.kube.client)
    over: asyncio.Future[None] = (
        asyncio.get_running_loop().create_future()
    )  # kopf has ended: it takes SIGTERM for itself

    async def lead() -> None:
        try:
            await operator.lead()
        except Exception as error:
            over.set_exception(error)
        else:
            over.set_result(None)

    async def stopped() -> None:
        await operator.keeper.close()  # before kopf, which takes its time

    log.info("%s wants the lease %s/%s; whoever holds it writes", told.identity, told.namespace, told.lease)
    election = asyncio.create_task(Election(Config(lock, FREE, HELD, EVERY, lead, stopped)).run())
    try:
        await asyncio.wait((election, over), return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            return over.result()
        election.result()
        raise LeaseLostError(f"the lease {told.namespace}/{told.lease} is lost: this replica ends.")
    finally:
        election.cancel()
        await asyncio.gather(election, return_exceptions=True)


class JsonLines(logging.Formatter):
    """One JSON object a line, with what a record carries of job, round and reason."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name,
                "message": record.getMessage()}  # fmt: skip
        line |= {name: getattr(record, name) for name in ("job", "round", "reason") if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def main() -> int:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=os.environ.get("COWEST_LOG_LEVEL", "INFO"), handlers=[handler])
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        told = settings.read(os.environ)
    except settings.OperatorSettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2

    async def whole() -> None:
        task = asyncio.create_task(run(told))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        asyncio.run(whole())
    except LeaseLostError as error:
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("the operator ends")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
