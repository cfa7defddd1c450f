"""One task a job: what it remembers, and when it ends. No cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cowest_operator import api, reconcile
from cowest_operator.apply import Applier, JobGoneError
from cowest_operator.keeper import AT_ONCE, SWIFT, Keeper, Turns
from cowest_operator.kube import PLURALS, Kube, KubeError
from cowest_operator.metrics import Metrics
from cowest_operator.observe import Memory, Observer
from cowest_operator.watched import Key, Watched
from tests import world as w
from tests.kube_in_memory import KubeInMemory
from tests.patience import IN_TIME
from tests.unit.test_look import Desk

KEY = ("desks", "claims")


def job(uid: str, version: str) -> dict[str, Any]:
    metadata = {"namespace": KEY[0], "name": KEY[1], "uid": uid, "resourceVersion": version}
    return {"metadata": metadata, "spec": {}}


class Noting(Keeper):
    """Notes with which memory it looks; leaves a state in it."""

    def __init__(self, gone: bool = False) -> None:
        super().__init__(Watched(), cast(Any, None), cast(Any, None), Metrics())
        self.gone, self.looks = gone, list[tuple[str, bool]]()

    async def turn(self, key: Key, memory: Memory) -> float:
        self.looks.append((memory.uid, memory.state is None))
        memory.state = api.Status(trials=7)
        if self.gone:
            raise JobGoneError("desks/claims")
        return 60.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(IN_TIME):
        while not condition():
            await asyncio.sleep(0.01)


def kept(keeper: Noting, story: Callable[[Noting], Awaitable[None]]) -> list[tuple[str, bool]]:
    async def told() -> None:
        keeper.watched.job(None, job("first", "1"))
        keeper.wake(KEY)
        await until(lambda: len(keeper.looks) == 1)
        await story(keeper)
        await keeper.close()

    asyncio.run(told())
    return keeper.looks


def test_a_job_that_is_made_again_under_its_name_knows_nothing_of_the_one_before() -> None:
    async def made_again(keeper: Noting) -> None:
        for looks, (uid, version) in ((2, ("first", "2")), (3, ("second", "3"))):  # no watch has shown a delete
            keeper.watched.job("MODIFIED", job(uid, version))
            keeper.wake(KEY)
            await until(lambda looks=looks: len(keeper.looks) == looks)  # type: ignore[misc]

    assert kept(Noting(), made_again) == [("first", True), ("first", False), ("second", True)]


def test_a_job_that_its_own_status_write_does_not_find_is_forgotten_until_it_is_made_again() -> None:
    async def gone(keeper: Noting) -> None:
        await until(lambda: KEY not in keeper.watched.families)
        keeper.wake(KEY)
        keeper.watched.job("ADDED", job("second", "9"))
        keeper.wake(KEY)
        await until(lambda: len(keeper.looks) == 2)

    assert kept(Noting(gone=True), gone) == [("first", True), ("second", True)]


def test_after_its_end_a_keeper_looks_at_nothing() -> None:
    async def closed(keeper: Noting) -> None:
        await keeper.close()
        keeper.wake(KEY)
        await asyncio.sleep(0)

    assert len(kept(Noting(), closed)) == 1


# ---------------------------------------------------------------- what ends a look
def keeper_of(desk: Desk, server: KubeInMemory) -> Keeper:
    keeper = Keeper(Watched(), desk.observer(), Applier(cast(Kube, server)), Metrics())
    keeper.watched.families[KEY] = desk.family
    return keeper


async def one_look(keeper: Keeper, server: KubeInMemory) -> dict[str, Any]:
    """The job's conditions after it, by their types."""
    keeper.wake(KEY)
    await until(lambda: any(verb == "status" for verb, _, _ in server.writes))
    await keeper.close()
    status = server.objects["CollaborationJob", *KEY]["status"]
    return {condition["type"]: condition for condition in status["conditions"]}


def desk_and_server(**edits: Any) -> tuple[Desk, KubeInMemory]:
    desk = Desk(w.SERVED, **edits)
    assert desk.family.job is not None
    return desk, KubeInMemory(desk.family.job)


class Broken(Observer):
    async def world(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("float division by zero")


async def test_a_fault_of_ours_stands_in_the_status_and_not_in_the_log_alone() -> None:
    desk, server = desk_and_server()

    keeper = keeper_of(desk, server)
    keeper.observer = Broken(keeper.observer.kube, desk.doors, keeper.observer.settings, keeper.observer.discovery)
    degraded = (await one_look(keeper, server))[api.DEGRADED]
    assert (degraded["status"], degraded["reason"]) == ("True", api.REASON_OPERATOR_FAILS)
    assert "ZeroDivisionError: float division by zero" in degraded["message"]


async def test_a_state_that_cannot_be_read_holds_the_job_and_says_so() -> None:
    desk, server = desk_and_server()
    assert desk.family.job is not None
    desk.family.job["status"]["state"]["trials"] = "two"
    keeper = keeper_of(desk, server)
    degraded = (await one_look(keeper, server))[api.DEGRADED]
    assert (degraded["status"], degraded["reason"]) == ("True", api.REASON_STATE_UNREADABLE)
    assert "wanted a whole number, saw 'two'" in degraded["message"]
    assert server.objects["CollaborationJob", *KEY]["status"]["state"]["trials"] == "two", "it is left as it is"
    said = 'cowest_job_condition{namespace="desks",job="claims",type="Degraded",reason="StateUnreadable"} 1'
    assert said in keeper.metrics.text().splitlines()


async def test_a_job_that_is_held_is_in_the_metrics_though_its_status_says_so_already() -> None:
    desk, server = desk_and_server(**{"collaboration.promptsConfigMapRef": {"name": "words"}})
    await one_look(keeper_of(desk, server), server)
    desk.family.job = server.objects["CollaborationJob", *KEY]
    anew = keeper_of(desk, server)
    await anew.turn(KEY, Memory("u"))
    assert 'type="Degraded",reason="ConfigMapMissing"} 1' in anew.metrics.text()
    assert "cowest_job_rounds_total{" not in anew.metrics.text(), "nobody has counted them yet"


# ---------------------------------------------------------------- what one namespace or object must not do to others
async def test_a_namespace_that_is_gone_holds_up_the_jobs_of_no_other() -> None:
    desk, server = desk_and_server()
    server.refuses["list", "ConfigMap", "gone"] = server.refuses["list", api.KIND, "gone"] = KubeError(403, "forbidden")
    keeper = keeper_of(desk, server)
    keeper.observer.settings = replace(keeper.observer.settings, namespaces=("desks", "gone"))
    await keeper.turn(KEY, Memory("u"))
    assert ("status", api.KIND, "claims") in server.writes
    with pytest.raises(KubeError, match="forbidden"):
        await keeper.turn(("gone", "other"), Memory("u"))
    del desk.family.children["Deployment", "claims-proxy"]
    desk.has("Deployment", "left", metadata={"resourceVersion": "1"})
    await keeper.look_for_the_gone()
    assert ("Deployment", "claims-left") not in desk.family.children, "those that can be listed are looked for"
    await keeper.close()


async def test_an_object_that_cannot_be_read_holds_up_no_job() -> None:
    desk, server = desk_and_server()
    owner = {"kind": api.KIND, "name": "others", "uid": "x", "controller": True}
    metadata = {"name": "others-r0-sft", "namespace": "desks", "labels": {"cowest.dev/job": "others"},
                "ownerReferences": [owner]}  # fmt: skip
    server.keep({"kind": "Workflow", "metadata": metadata, "status": {"nodes": ["none"]}})
    keeper = keeper_of(desk, server)
    await keeper.turn(KEY, Memory("u"))
    assert ("status", api.KIND, "claims") in server.writes
    await keeper.close()


class Stranger(Keeper):
    """Finds what nobody can read at its first look for what is gone."""

    looks = 0

    async def look_for_the_gone(self) -> None:
        self.looks += 1
        if self.looks == 1:
            raise KeyError("items")


async def test_an_answer_that_nobody_can_read_ends_no_looks_for_what_is_gone() -> None:
    keeper = Stranger(Watched(), cast(Any, None), cast(Any, None), Metrics())
    looking = asyncio.create_task(keeper.follow(0.001))
    try:
        await until(lambda: keeper.looks > 1)
    finally:
        looking.cancel()


# ---------------------------------------------------------------- when it looks again
def at_rest(world: api.World) -> api.World:
    while (plan := reconcile.plan(world)).status != world.status:
        world = replace(world, status=plan.status)
    return world


class Scripted(Observer):
    """Sees what it is told."""

    def __init__(self, world: api.World) -> None:
        self.world_now = world

    async def world(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(world=self.world_now)


class Nothing:
    """An applier that writes nothing."""

    kube = SimpleNamespace()

    async def apply(self, *_: Any) -> None: ...


async def test_a_job_without_traffic_is_looked_at_less_often_until_something_is_new() -> None:
    desk, _ = desk_and_server()
    seen = Scripted(at_rest(w.world(job=w.job(rounds={"trigger": api.Trigger(100)}), traces=api.TraceCounts(7, 5))))
    keeper, memory = Keeper(Watched(), seen, cast(Any, Nothing()), Metrics()), Memory("u")
    keeper.watched.families[KEY] = desk.family
    keeper._looked_at = {(kind, "") for kind in PLURALS}
    seen.settings = SimpleNamespace(namespaces=())  # type: ignore[assignment]
    seen.discovery = SimpleNamespace(rayservices=False)  # type: ignore[assignment]

    async def unasked(looks: int) -> list[float]:
        """Seconds until the next look, after each of so many that nothing has asked for."""
        paces = []
        for _ in range(looks):
            memory.quiet += 1
            paces.append(await keeper.turn(KEY, memory))
        return paces

    assert await unasked(7) == [15.0] * 5 + [60.0] * 2
    seen.world_now = at_rest(replace(seen.world_now, traces=api.TraceCounts(8, 6)))
    assert await unasked(6) == [15.0] * 5 + [60.0]
    seen.world_now = replace(seen.world_now, troubles=(api.Trouble("StoreAway", "the store is away."),))
    assert await unasked(7) == [15.0] * 7, "what is wrong may be mended where no watch sees it"


def test_what_the_watches_show_ends_the_long_wait() -> None:
    quiet = []

    class Waiting(Noting):
        async def turn(self, key: Key, memory: Memory) -> float:
            quiet.append(memory.quiet)
            await super().turn(key, memory)
            return 0.02

    async def story(keeper: Noting) -> None:
        await until(lambda: len(quiet) >= 4)
        keeper.wake(KEY)
        await until(lambda: 0 in quiet[1:])

    kept(Waiting(), story)
    assert quiet[:4] == [0, 1, 2, 3]


# ---------------------------------------------------------------- how many look at once
async def looking(turns: Turns, goes_on: asyncio.Event, seen: list[str], name: str) -> None:
    async with turns.turn():
        seen.append(name)
        await goes_on.wait()


async def test_looks_that_do_not_wait_are_few() -> None:
    turns, goes_on, seen = Turns(), asyncio.Event(), list[str]()
    looks = [asyncio.create_task(looking(turns, goes_on, seen, str(number))) for number in range(10)]
    await asyncio.sleep(0.02)
    assert len(seen) == SWIFT
    goes_on.set()
    await asyncio.gather(*looks)
    assert len(seen) == 10


async def test_looks_that_hang_hold_up_no_others_and_leave_no_more_room_than_there_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cowest_operator.keeper.SLOW", 0.01)
    turns, goes_on, seen = Turns(), asyncio.Event(), list[str]()
    looks = [asyncio.create_task(looking(turns, goes_on, seen, str(number))) for number in range(40)]
    await until(lambda: len(seen) >= AT_ONCE)
    await asyncio.sleep(0.05)
    assert len(seen) == AT_ONCE, "those that wait have a bound too"
    goes_on.set()
    await asyncio.gather(*looks)

    monkeypatch.setattr("cowest_operator.keeper.SLOW", 60.0)
    goes_on.clear()
    seen.clear()
    looks = [asyncio.create_task(looking(turns, goes_on, seen, str(number))) for number in range(10)]
    await asyncio.sleep(0.02)
    assert len(seen) == SWIFT
    goes_on.set()
    await asyncio.gather(*looks)
