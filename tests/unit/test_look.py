"""One look at a job: what becomes a world, what is a trouble, and by which manifest it goes. No cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from cowest_operator import api, manifest, reconcile, story
from cowest_operator.doors import DoorError, Doors, Part
from cowest_operator.kube import Kube
from cowest_operator.objects import common, servers, steps
from cowest_operator.observe import HoldError, Memory, Observed, Observer
from cowest_operator.platform import Discovery, Platform
from cowest_operator.settings import Images, Settings
from cowest_operator.watched import PREDICTOR, Family, see
from tests import world as w
from tests.manifests import REMOVED, edited, smallest

STORE = {"bucket": "cowest", "credentialsSecretRef": {"name": "s3"}}
ON_KUBERNETES: Mapping[str, Any] = {
    "weak.model": "s3://models/base",
    "data.train": "s3://data/train.jsonl",
    "data.heldOut": "s3://data/held_out.jsonl",
    "objectStore": STORE,
}
SETTINGS = Settings(Images("serving:1", "training:1", "vllm:1"), "here", "one")
NOW = 10_000.0


class ScriptedDoors(Doors):
    """Answers as it is told; counts what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.shut: set[str] = set()
        self.ready: Mapping[str, Any] | None = None  # the gateway's word
        self.models: list[Mapping[str, str]] = []  # what weak-model servers serve
        self.words, self.reason, self.answers = "answers 503: it is away.", "", True
        self.asked: list[str] = []
        self.together = 0

    async def _get(self, url: str, part: Part) -> Any:
        self.asked.append(url)
        before = len(self.asked)
        for _ in range(5):
            await asyncio.sleep(0)
        self.together = max(self.together, len(self.asked) - before + 1)
        if part in self.shut:
            raise DoorError(part, self.words, answered=self.answers, reason=self.reason)
        if part == "proxy":
            return {"calls": 3, "tokens": 4, "money": "0.5"}
        if part == "gateway":
            return self.ready
        if part == "weak-model":
            return {"data": self.models}
        return {"all": 7, "usable": 5} if url.endswith("/traces") else None


class Maps:
    """The person's ConfigMaps."""

    def __init__(self, data: dict[str, Mapping[str, str]]) -> None:
        self.data = data

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return {"data": self.data[name]} if name in self.data else None


class Desk:
    """A job, its children and an observer that sees them."""

    def __init__(self, status: api.Status | None = None, **edits: Any) -> None:
        self.doors, self.maps, self.memory = ScriptedDoors(), Maps({}), Memory()
        self.family = Family()
        self.declare(**edits)
        if status is not None:
            plan = replace(reconcile.plan(w.world()), status=status)
            written = story.written(status, plan, api.TraceCounts(), 1)
            assert self.family.job is not None
            self.family.job["status"] = written
        self.has("Deployment", "observer", status={"availableReplicas": 1})
        self.has("Deployment", "proxy", status={"availableReplicas": 1})

    def declare(self, **edits: Any) -> None:
        text = json.dumps(edited(edits, edited(ON_KUBERNETES, smallest())))
        document = manifest.loads(text).job
        metadata = {"name": "claims", "namespace": "desks", "uid": "u", "generation": 1, "resourceVersion": "5"}
        before = (self.family.job or {}).get("status")
        self.family.job = {**document, "metadata": metadata, **({"status": before} if before else {})}

    def has(self, kind: str, part: str, **more: Any) -> None:
        name = f"claims-{part}"
        metadata = {"name": name, "namespace": "desks", "uid": name, "resourceVersion": "1", **more.pop("metadata", {})}
        self.family.children[kind, name] = see(kind, {"metadata": metadata, **more})

    def freeze(self, number: int) -> None:
        """The manifest as it is declared now, prompts resolved."""
        self.has("ConfigMap", f"r{number}", data={"job.json": json.dumps(self.look().context.document)})

    def observer(self) -> Observer:
        discovery = Discovery(cast(Kube, self.maps))
        discovery.now = Platform(has_kserve=True, has_argo=True)
        return Observer(cast(Kube, self.maps), self.doors, SETTINGS, discovery)

    def look(self, now: float = NOW) -> Observed:
        return asyncio.run(self.observer().world(self.family, self.memory, now))

    def troubles(self) -> list[str]:
        return [trouble.reason for trouble in self.look().world.troubles or ()]


# ---------------------------------------------------------------- doors
@pytest.mark.parametrize(
    ("part", "reason"), [("observer", api.REASON_STORE_AWAY), ("proxy", api.REASON_PROXY_AWAY)], ids=["store", "proxy"]
)
def test_what_is_away_is_said_in_every_look_not_only_in_those_that_ask(part: str, reason: str) -> None:
    desk = Desk(w.SERVED)
    desk.doors.shut = {part}
    assert desk.troubles() == [reason]
    asked = len(desk.doors.asked)
    assert desk.troubles() == [reason]
    assert len(desk.doors.asked) == asked, "an answer that fails is one too, for as long as another is believed"


@pytest.mark.parametrize(("available", "asked"), [(1, 1), (0, 2)], ids=["ready", "not ready"])
def test_an_observer_that_is_not_ready_is_asked_again_soon_why(available: int, asked: int) -> None:
    desk = Desk(w.on_trial())
    desk.has("Deployment", "observer", status={"availableReplicas": available})
    desk.look()
    desk.memory.asked = {what: (when - 15, answer) for what, (when, answer) in desk.memory.asked.items()}
    desk.look()
    assert sum("/v1/traces" in url for url in desk.doors.asked) == asked


@pytest.mark.parametrize(
    ("answers", "told", "reason"),
    [
        pytest.param(False, "", api.REASON_OBSERVER_AWAY, id="it does not answer"),
        pytest.param(True, "", api.REASON_STORE_AWAY, id="the store is away"),
        pytest.param(True, "DataMissing", api.REASON_DATA_MISSING, id="the rows are not there"),
        pytest.param(True, "DataInvalid", api.REASON_DATA_INVALID, id="the rows are none"),
        pytest.param(True, "Sunday", api.REASON_STORE_AWAY, id="a word of another version"),
    ],
)
def test_what_the_observer_says_is_wrong_is_not_all_laid_on_the_store(answers: bool, told: str, reason: str) -> None:
    desk = Desk(w.SERVED)
    desk.doors.shut, desk.doors.answers, desk.doors.reason = {"observer"}, answers, told
    assert desk.troubles() == [reason]


@pytest.mark.parametrize("available", [0, 1], ids=["not ready", "ready a moment ago"])
@pytest.mark.parametrize(("ago", "said"), [(30.0, []), (300.0, [api.REASON_OBSERVER_AWAY])], ids=["starts", "hangs"])
def test_an_observer_whose_pod_is_new_is_given_time_however_old_its_deployment(
    ago: float, said: list[str], available: int
) -> None:
    desk = Desk(w.SERVED)
    desk.doors.shut, desk.doors.answers = {"observer"}, False
    desk.has("Deployment", "observer", status={"availableReplicas": available})
    made = datetime.fromtimestamp(NOW - ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = {"app.kubernetes.io/component": "observer"}
    desk.has("Pod", "observer-x", metadata={"labels": labels, "creationTimestamp": made}, status={"phase": "Running"})
    assert desk.troubles() == said


def test_a_door_that_was_shut_is_asked_again_soon_whether_it_is_open() -> None:
    desk = Desk(w.on_trial())
    desk.doors.shut = {"observer"}
    assert desk.troubles() == [api.REASON_STORE_AWAY]
    desk.doors.shut = set()
    desk.memory.asked = {what: (when - 15, answer) for what, (when, answer) in desk.memory.asked.items()}
    assert desk.troubles() == []


def test_when_the_door_opens_the_trouble_is_over() -> None:
    desk = Desk(w.SERVED)
    desk.doors.shut = {"proxy"}
    assert desk.troubles() == [api.REASON_PROXY_AWAY]
    desk.doors.shut, desk.memory.asked = set(), {}
    assert desk.troubles() == []


def test_a_gateway_that_is_made_and_does_not_answer_ends_no_look() -> None:
    desk = Desk(w.SERVED)
    desk.has("Deployment", "gateway", status={"availableReplicas": 1})
    desk.doors.shut = {"gateway"}
    assert desk.look().world.gateway.ready
    assert any(url.endswith("/readyz") for url in desk.doors.asked)


@pytest.mark.parametrize("error", ["NoBudget", "BudgetUnknown"])
@pytest.mark.parametrize(("when_strong_fails", "ready"), [("Fail", "False"), ("WeakAlone", "True")])
def test_a_job_whose_users_are_refused_for_want_of_budget_is_not_ready(
    when_strong_fails: str, ready: str, error: str
) -> None:
    desk = Desk(w.SERVED, **{"collaboration.whenStrongFails": when_strong_fails})
    desk.has("Deployment", "gateway", status={"availableReplicas": 1})
    desk.doors.ready = {"budget": {"day": "1970-01-01", "left_tokens": 5, "left_money": None, "refuses": error}}
    conditions = {each.type: each for each in reconcile.plan(desk.look().world).status.conditions}
    assert conditions[api.READY].status == ready
    assert conditions[api.DEGRADED].reason == api.REASON_BUDGET
    assert f"whenStrongFails: {when_strong_fails}" in conditions[api.DEGRADED].message
    desk.memory.asked.clear()
    desk.doors.ready = {"budget": {"day": "1970-01-01", "left_tokens": 5, "left_money": None, "refuses": None}}
    assert desk.troubles() == []


def test_an_observer_that_speaks_of_a_proxy_is_the_observer_all_the_same() -> None:
    desk = Desk(w.SERVED)
    desk.doors.shut = {"observer"}
    desk.doors.words = "answers 503: s3://cowest/desks/proxy-x is not to be had"
    assert desk.troubles() == [api.REASON_STORE_AWAY]


def test_the_doors_of_a_look_are_asked_side_by_side() -> None:
    desk = Desk(w.SERVED)
    desk.look()
    assert len(desk.doors.asked) == desk.doors.together == 2


# ---------------------------------------------------------------- what was decided so far
@pytest.mark.parametrize(("version", "trials"), [pytest.param("6", 7, id="later"), pytest.param("4", 1, id="earlier")])
def test_what_somebody_decided_after_our_own_write_counts_and_what_is_older_does_not(version: str, trials: int) -> None:
    desk = Desk(replace(w.SERVED, trials=1))
    assert desk.look().world.status.trials == 1
    job = Desk(replace(w.SERVED, trials=7)).family.job
    assert job is not None
    desk.family.job = {**job, "metadata": {**job["metadata"], "resourceVersion": version}}
    assert desk.look().world.status.trials == trials


# ---------------------------------------------------------------- a manifest that cannot be followed
PROMPTS_ELSEWHERE = {"collaboration.promptsConfigMapRef": {"name": "words"}}
BROKEN = [
    pytest.param({"data.train": "file:///rows.jsonl"}, api.REASON_NOT_ON_KUBERNETES, id="a file of one machine"),
    pytest.param(
        {"feedback.evaluator.calibration.labels": "file:///labels.jsonl"},
        api.REASON_NOT_ON_KUBERNETES,
        id="labels of one machine",
    ),
    pytest.param({"objectStore": REMOVED}, api.REASON_NOT_ON_KUBERNETES, id="the store was taken out"),
    pytest.param(PROMPTS_ELSEWHERE, api.REASON_CONFIG_MAP_MISSING, id="the prompts were deleted"),
]


@pytest.mark.parametrize(("edits", "reason"), BROKEN)
def test_a_trial_that_runs_goes_on_by_the_manifest_that_it_began_with(edits: Mapping[str, Any], reason: str) -> None:
    desk = Desk(w.on_trial(stage="Canary", number=1))
    desk.freeze(1)
    before = desk.look()
    desk.declare(**edits)
    seen = desk.look()
    assert not seen.stopped and seen.world.blocked is None
    assert desk.troubles() == [reason]
    assert seen.context.store == before.context.store and seen.world.job.spec.data == before.world.job.spec.data
    assert reconcile.plan(seen.world).routing == reconcile.plan(before.world).routing


@pytest.mark.parametrize(("edits", "reason"), BROKEN)
def test_no_trial_begins_and_what_is_served_stays_in_sight(edits: Mapping[str, Any], reason: str) -> None:
    desk = Desk(w.SERVED)
    desk.freeze(0)
    desk.declare(**edits)
    seen = desk.look()
    assert not seen.stopped and seen.world.blocked is not None
    plan = reconcile.plan(seen.world)
    assert plan.steps == () and plan.status.candidate is None
    assert [server.digest for server in plan.servers] == [w.STABLE.weak_digest]


def test_the_edit_of_what_no_trial_is_frozen_with_applies_at_once() -> None:
    desk = Desk(w.SERVED)
    desk.freeze(0)
    desk.declare(**{"data.train": "file:///rows.jsonl", "gateway": {"replicas": 7}})
    assert desk.look().world.job.spec.gateway.replicas == 7


def test_of_several_frozen_manifests_the_last_one_counts() -> None:
    desk = Desk(w.SERVED)
    for number, train in ((2, "s3://data/old.jsonl"), (11, "s3://data/new.jsonl")):
        desk.declare(**{"data.train": train})
        desk.freeze(number)
    desk.declare(**{"data.train": "file:///rows.jsonl"})
    assert desk.look().world.job.spec.data.train == "s3://data/new.jsonl"


def test_a_job_of_which_no_manifest_is_known_is_stopped_and_says_why() -> None:
    desk = Desk(**{"weak.model": "file:///models/weak"})
    seen = desk.look()
    assert seen.stopped and seen.world.blocked is not None
    assert "spec.weak.model: wanted an s3:// address" in seen.world.blocked.message
    with pytest.raises(HoldError, match="there is no ConfigMap 'words'"):
        Desk(**PROMPTS_ELSEWHERE).look()


def test_what_the_api_server_takes_and_validate_refuses_is_said_at_once_and_lets_no_round_begin() -> None:
    desk = Desk()
    assert desk.look().world.blocked is None and desk.family.job is not None
    desk.family.job["spec"]["training"]["podTemplate"] = {"spec": {"nodeSelectr": {"a": "b"}}}
    desk.family.job["spec"]["rounds"]["trigger"]["schedule"] = "61 3 * * *"
    desk.family.job["metadata"]["namespace"] = "n" * 41
    seen = desk.look()
    assert not seen.stopped, "the gateway answers meanwhile"
    assert seen.world.blocked is not None and seen.world.blocked.reason == api.REASON_MANIFEST_INVALID
    for path in (
        "spec.training.podTemplate.spec.nodeSelectr: ",
        "spec.rounds.trigger.schedule: ",
        "metadata.namespace: ",
    ):
        assert path in seen.world.blocked.message
    assert api.REASON_MANIFEST_INVALID in desk.troubles()


def test_prompts_that_are_there_and_of_no_use_are_not_called_missing() -> None:
    desk = Desk(**PROMPTS_ELSEWHERE)
    desk.maps.data["words"] = {"draft": "no place for the query"}
    with pytest.raises(HoldError) as caught:
        desk.look()
    assert caught.value.trouble.reason == api.REASON_MANIFEST_INVALID


# ---------------------------------------------------------------- steps that do not go on
def waiting(desk: Desk, generation: str = "0", **node: Any) -> None:
    """The first step of round 1, submitted as of an earlier manifest."""
    labels = {"cowest.dev/step": "r1-collect", "cowest.dev/attempt": "1", "cowest.dev/generation": generation}
    status = {"phase": "Running", "nodes": {"a": {"type": "Pod", "phase": "Pending", **node}}}
    spec = {"workflowTemplateRef": {"name": "claims-steps-of-before"}}
    desk.has("Workflow", "r1-collect", metadata={"labels": labels}, spec=spec, status=status)


def pod_of(desk: Desk, phase: str, ended: float | None = None, reason: str = "Error", name: str = "x") -> None:
    labels = {"workflows.argoproj.io/workflow": "claims-r1-collect", "app.kubernetes.io/component": "step"}
    states = []
    if ended is not None:
        finished = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        states = [{"name": "main", "state": {"terminated": {"finishedAt": finished, "reason": reason}}}]
    created = {"creationTimestamp": "1970-01-01T02:46:39Z"}
    desk.has("Pod", name, metadata={"labels": labels, **created}, status={"phase": phase, "containerStatuses": states})


def died(desk: Desk, name: str = "x") -> None:
    """A pod of the step that the kubelet killed."""
    pod_of(desk, "Failed", NOW - 1, "OOMKilled", name)


def test_a_step_that_never_started_is_submitted_again_when_an_edit_may_let_it() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk)
    pod_of(desk, "Pending")
    seen = desk.look()
    assert seen.submit == {"r1-collect": 2} and seen.instead == {"r1-collect": "claims-r1-collect"}
    assert [step.name for step in reconcile.plan(seen.world).steps] == ["r1-collect"]


@pytest.mark.parametrize(
    ("generation", "node", "phase"),
    [
        pytest.param("1", {}, "Pending", id="of this very manifest"),
        pytest.param("0", {"phase": "Running"}, "Running", id="it runs"),
        pytest.param("0", {}, "Running", id="it runs, and Argo has not said so yet"),
        pytest.param("0", {"phase": "Failed"}, "Pending", id="a second try after one that ran"),
    ],
)
def test_what_has_started_or_is_of_this_manifest_is_left_alone(generation: str, node: Any, phase: str) -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, generation, **node)
    pod_of(desk, phase)
    seen = desk.look()
    assert not seen.submit and not seen.instead
    assert seen.world.steps["r1-collect"].phase == "Running"


def test_a_step_that_dies_for_want_of_memory_is_submitted_again_when_an_edit_may_give_it_more() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, phase="Failed")
    died(desk)
    pod_of(desk, "Pending", name="y")
    seen = desk.look()
    assert seen.submit == {"r1-collect": 2} and seen.instead == {"r1-collect": "claims-r1-collect"}


def test_a_step_that_died_and_runs_again_is_left_alone() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, phase="Failed")
    died(desk)
    pod_of(desk, "Running", name="y")
    assert not desk.look().submit


def test_that_a_step_dies_is_said_while_argo_tries_it_again() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1", phase="Failed")
    died(desk)
    (trouble,) = desk.look().world.troubles or ()
    assert trouble.reason == api.REASON_PODS_FAIL
    assert "OOMKilled" in trouble.message and "raise training.resources" in trouble.message
    pod_of(desk, "Running", name="y")
    assert desk.troubles() == [], "the first death may be an accident"
    died(desk, "z")
    assert desk.troubles() == [api.REASON_PODS_FAIL], "the second is none"


@pytest.mark.parametrize(
    ("phase", "ago", "said"),
    [
        pytest.param("Succeeded", 61.0, True, id="a minute ago"),
        pytest.param("Succeeded", 30.0, False, id="just now"),
        pytest.param("Failed", 61.0, False, id="it failed: Argo waits before it tries again"),
        pytest.param("Failed", 300.0, True, id="it failed, and Argo tries no more"),
        pytest.param("Running", None, False, id="it runs"),
    ],
)
def test_a_workflow_whose_pod_has_ended_long_ago_waits_for_argo(phase: str, ago: float | None, said: bool) -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1")
    pod_of(desk, phase, None if ago is None else NOW - ago)
    assert desk.troubles() == ([api.REASON_CONTROLLER_AWAY] if said else [])


class Holds(ScriptedDoors):
    """The store has these manifests."""

    def __init__(self, *steps: str, started: float = NOW - 100) -> None:
        super().__init__()
        self.steps, self.started = steps, datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")

    async def _get(self, url: str, part: Part) -> Any:
        answer = await super()._get(url, part)
        is_there = any(url.endswith(f"runs%2F{step}%2Fmanifest.json") for step in self.steps)
        return {"metrics": {"rows": 5}, "digest": "sha256:d", "started": self.started} if is_there else answer


@pytest.mark.parametrize(
    ("manifest", "pod", "ago", "done"),
    [
        pytest.param("r1%2Fcollect", "Succeeded", 61.0, True, id="done"),
        pytest.param("r1%2Fcollect", "Failed", 300.0, True, id="done, though its executor failed"),
        pytest.param("r1%2Fcollect", "Succeeded", 30.0, False, id="Argo may be about to end it"),
        pytest.param("r1%2Fcollect", "Running", None, False, id="a pod runs"),
        pytest.param("r1%2Fdpo", "Succeeded", 61.0, False, id="another step is done"),
    ],
)
def test_a_step_is_done_when_its_manifest_is_there_and_its_pods_are_over(
    manifest: str, pod: str, ago: float | None, done: bool
) -> None:
    desk = Desk(w.on_trial(number=1))
    desk.doors = Holds(manifest)
    waiting(desk, "1", phase="Succeeded")
    pod_of(desk, pod, None if ago is None else NOW - ago)
    seen = desk.look()
    state = seen.world.steps["r1-collect"]
    assert state.phase == ("Succeeded" if done else "Running")
    assert [note.reason for note in seen.notes] == ([api.REASON_WORKFLOW_STUCK] if done else [])
    if done:
        assert (state.digest, state.metrics, seen.world.troubles) == ("sha256:d", {"rows": 5}, ())
        plan = reconcile.plan(seen.world)
        assert plan.status.candidate is not None and "collect" in plan.status.candidate.done


def test_while_the_store_is_away_nobody_knows_whether_a_step_is_done() -> None:
    desk = Desk(w.on_trial(number=1))
    desk.doors = Holds("r1%2Fcollect")
    desk.doors.shut = {"observer"}
    waiting(desk, "1")
    pod_of(desk, "Succeeded", NOW - 61)
    seen = desk.look()
    assert seen.world.steps["r1-collect"].phase == "Running" and not seen.notes
    assert set(desk.troubles()) == {api.REASON_CONTROLLER_AWAY, api.REASON_STORE_AWAY}


def test_a_manifest_of_before_the_trial_says_nothing_of_its_step() -> None:
    for since, phase in ((NOW - 100, "Succeeded"), (NOW - 99, "Running")):
        desk = Desk(w.on_trial(number=1, started_at=since))
        desk.doors = Holds("r1%2Fcollect")
        waiting(desk, "1", phase="Succeeded")
        pod_of(desk, "Succeeded", NOW - 61)
        assert desk.look().world.steps["r1-collect"].phase == phase


@pytest.mark.parametrize(
    ("phase", "reason", "words"),
    [
        pytest.param("Succeeded", api.REASON_WORKFLOW_STUCK, "has noted it: it is stuck", id="Argo has noted its end"),
        pytest.param("Running", api.REASON_CONTROLLER_AWAY, "does the controller of Argo", id="Argo has seen nothing"),
    ],
)
def test_a_workflow_that_does_not_end_is_said_with_what_cures_it(phase: str, reason: str, words: str) -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1", phase=phase)
    pod_of(desk, "Succeeded", NOW - 61)
    (trouble,) = desk.look().world.troubles or ()
    assert trouble.reason == reason and words in trouble.message
    assert "`kubectl cowest pause claims -n desks --now`, then `resume`" in trouble.message
    assert "`kubectl delete workflow claims-r1-collect -n desks`" in trouble.message


def test_pods_of_a_workflow_of_this_name_that_was_deleted_say_nothing_of_the_next_one() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1")
    pod_of(desk, "Succeeded", NOW - 61)
    known = desk.family.children["Workflow", "claims-r1-collect"]
    desk.family.children["Workflow", known.name] = replace(known, created=NOW)
    assert desk.troubles() == []


# ---------------------------------------------------------------- steps that failed
ENDED = datetime.fromtimestamp(NOW, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
BAD_INPUT, FAILED, BUDGET, AWAY = "2", "1", "76", "75"


def failed(
    desk: Desk, code: str, step: str = "r1-dpo", attempt: int = 1, generation: str = "1", words: str = "no good"
) -> None:
    """An attempt that ended at `NOW`."""
    labels = {"cowest.dev/step": step, "cowest.dev/attempt": str(attempt), "cowest.dev/generation": generation}
    node = {"type": "Pod", "phase": "Failed", "outputs": {"exitCode": code}, "message": words}
    status = {"phase": "Failed", "finishedAt": ENDED, "nodes": {"a": node}}
    name = f"{step}-{attempt}"
    desk.has("Workflow", name, metadata={"labels": labels}, status=status)


def says_resume(desk: Desk, at: float) -> None:
    assert desk.family.job is not None
    said = {"verb": "resume", "by": "ann", "why": "", "at": at}
    desk.family.job["metadata"]["annotations"] = {f"cowest.dev/action.{int(at * 1e9):020d}-resume": json.dumps(said)}


def tuning(**changes: Any) -> Desk:
    """At the step `dpo` of round 1."""
    done = {name: {} for name in ("collect", "feedback")}
    return Desk(w.on_trial(number=1, done=done, **changes))


@pytest.mark.parametrize(
    ("code", "attempts", "again"),
    [
        pytest.param(BAD_INPUT, 1, False, id="bad input"),
        pytest.param(FAILED, 1, True, id="a fault of its own"),
        pytest.param(FAILED, 2, True, id="the second one"),
        pytest.param(FAILED, 3, False, id="the third one"),
        pytest.param("139", 3, False, id="it died thrice by itself"),
        pytest.param(AWAY, 9, True, id="what it asks is away"),
        pytest.param(BUDGET, 9, True, id="the budget is spent"),
    ],
)
def test_a_step_that_fails_by_what_it_is_given_or_again_and_again_waits_for_a_person(
    code: str, attempts: int, again: bool
) -> None:
    desk = tuning()
    for attempt in range(1, attempts + 1):
        failed(desk, code, attempt=attempt)
    for late in (1.0, 11.0, 601.0, 3590.0, 86_400.0, 1e7):
        seen = desk.look(NOW + late)
        is_due = late > 3600 if code == BAD_INPUT else again and late > min(10 * 2 ** (attempts - 1), 600)
        assert seen.submit == ({"r1-dpo": attempts + 1} if is_due else {})
        if not again and not is_due:
            plan, said = reconcile.plan(seen.world), story_of(seen, api.ROUND_PROGRESSING)
            assert plan.steps == () and plan.failure is not None
            assert said.startswith("step r1-dpo: no good. ") and "`kubectl cowest resume`" in said


@pytest.mark.parametrize("code", [BAD_INPUT, FAILED], ids=["bad input", "faults"])
def test_a_step_that_waits_for_a_person_is_begun_again_by_resume_and_by_an_edit(code: str) -> None:
    desk = tuning()
    for attempt in (1, 2, 3):
        failed(desk, code, attempt=attempt)
    says_resume(desk, NOW - 5)
    desk.memory.state, desk.memory.version = replace(desk.look().world.status, last_action="9" * 20 + "-resume"), 5
    assert desk.look(NOW + 10).submit == {}, "that was said before it failed"
    says_resume(desk, NOW + 5)
    seen = desk.look(NOW + 10)
    assert seen.submit == {"r1-dpo": 4}
    assert [step.name for step in reconcile.plan(seen.world).steps] == ["r1-dpo"]
    assert desk.family.job is not None
    desk.family.job["metadata"] |= {"annotations": {}, "generation": 2}
    assert desk.look(NOW + 10).submit == {"r1-dpo": 4}


@pytest.mark.parametrize(
    ("limit", "due_after", "says"),
    [
        pytest.param("50 calls in round 1", None, "`kubectl cowest resume`", id="of the round: no time helps"),
        pytest.param("2 EUR on 1970-01-01", 86_400.0 - NOW, "after midnight UTC", id="of the day"),
    ],
)
def test_a_step_whose_budget_is_spent_is_begun_again_when_there_may_be_some(
    limit: str, due_after: float | None, says: str
) -> None:
    desk = tuning()
    spent = (
        f"The budget of the strong model is spent: wanted at most {limit}, saw 50 used and a call that needs about 1"
    )
    failed(desk, BUDGET, words=spent)
    for late in (11.0, 601.0, 86_399.0 - NOW, 86_401.0 - NOW, 1e7):
        seen = desk.look(NOW + late)
        is_due = due_after is not None and late > due_after
        assert seen.submit == ({"r1-dpo": 2} if is_due else {})
        if not is_due:
            assert story_reason(seen) == api.REASON_BUDGET and says in story_of(seen, api.ROUND_PROGRESSING)
    assert desk.family.job is not None
    desk.family.job["metadata"]["generation"] = 2
    assert desk.look(NOW + 11).submit == {"r1-dpo": 2}, "an edit may have raised it"


def test_a_resume_by_a_clock_that_is_behind_is_heard_when_it_is_taken_in() -> None:
    desk = tuning()
    failed(desk, BAD_INPUT)
    says_resume(desk, NOW - 60)
    seen = desk.look(NOW + 10)
    assert seen.submit == {"r1-dpo": 2}
    assert [step.name for step in reconcile.plan(seen.world).steps] == ["r1-dpo"]


def test_after_a_resume_faults_are_counted_anew() -> None:
    desk = tuning()
    for attempt in (1, 2, 3):
        failed(desk, FAILED, attempt=attempt)
    says_resume(desk, NOW + 5)
    later = datetime.fromtimestamp(NOW + 60, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    failed(desk, FAILED, attempt=4)
    fourth = desk.family.children["Workflow", "claims-r1-dpo-4"]
    desk.family.children["Workflow", "claims-r1-dpo-4"] = replace(
        fourth, facts={**fourth.facts, "finished": datetime.fromisoformat(later).timestamp()}
    )
    desk.memory.state, desk.memory.version = replace(desk.look().world.status, last_action="9" * 20 + "-resume"), 5
    assert reconcile.plan(desk.look(NOW + 61).world).failure is None
    assert desk.look(NOW + 60 + 600).submit == {"r1-dpo": 5}


@pytest.mark.parametrize("code", [BAD_INPUT, FAILED], ids=["bad input", "a fault"])
def test_the_step_that_reads_live_traces_is_tried_again_since_they_change_by_themselves(code: str) -> None:
    desk = Desk(w.on_trial(number=1))
    for attempt in (1, 2, 3, 4):
        failed(desk, code, "r1-collect", attempt)
    seen = desk.look(NOW + 1)
    assert not seen.submit and story_reason(seen) == api.REASON_STEP_RETRY
    assert desk.look(NOW + 601).submit == {"r1-collect": 5}


# ---------------------------------------------------------------- what is not there yet
NOT_THERE = "66"


def looks_again(desk: Desk, attempt: int, generation: str = "1") -> None:
    labels = {"cowest.dev/step": "r1-dpo", "cowest.dev/attempt": str(attempt), "cowest.dev/generation": generation}
    waits = {"phase": "Running", "message": "Waiting for a node"}
    desk.has("Workflow", f"r1-dpo-{attempt}", metadata={"labels": labels}, status=waits)


def progressing(seen: Observed) -> tuple[str, str, str]:
    (found,) = (c for c in reconcile.plan(seen.world).status.conditions if c.type == api.ROUND_PROGRESSING)
    return found.status, found.reason, found.message


def test_what_is_not_there_yet_is_looked_for_by_itself_at_most_each_two_minutes() -> None:
    desk = tuning()
    for attempt in range(1, 9):
        failed(desk, NOT_THERE, attempt=attempt)
        wait = min(10 * 2 ** (attempt - 1), 120)
        assert desk.look(NOW + wait - 1).submit == {}
        due = desk.look(NOW + wait)
        assert due.submit == {"r1-dpo": attempt + 1}
        assert [step.name for step in reconcile.plan(due.world).steps] == ["r1-dpo"]


def test_looks_for_what_is_missing_are_no_faults_of_the_step() -> None:
    desk = tuning()
    for attempt in (1, 2):
        failed(desk, NOT_THERE, attempt=attempt)
    failed(desk, FAILED, attempt=3)
    assert desk.look(NOW + 700).submit == {"r1-dpo": 4}


def test_what_is_not_there_yet_is_said_in_the_same_words_while_it_is_looked_for_again() -> None:
    desk, said = tuning(), ("True", api.REASON_DATA_MISSING, "step r1-dpo: no good.")
    failed(desk, NOT_THERE)
    assert progressing(desk.look(NOW + 1)) == progressing(desk.look(NOW + 10)) == said
    looks_again(desk, 2)
    assert progressing(desk.look(NOW + 11)) == said
    assert reconcile.plan(desk.look(NOW + 11).world).failure is None


@pytest.mark.parametrize("code", [AWAY, BAD_INPUT], ids=["something was away", "bad input"])
def test_another_attempt_after_any_other_failure_says_that_it_runs(code: str) -> None:
    desk = tuning()
    failed(desk, code)
    looks_again(desk, 2)
    assert progressing(desk.look(NOW + 11))[1:] == ("PreferenceTuning", "step r1-dpo runs: Waiting for a node.")


def test_what_was_missing_before_an_edit_or_a_resume_is_said_no_more() -> None:
    desk = tuning()
    failed(desk, NOT_THERE, generation="0")
    assert desk.look(NOW + 1).submit == {"r1-dpo": 2}
    looks_again(desk, 2)
    assert progressing(desk.look(NOW + 2))[1] == "PreferenceTuning"
    failed(desk, NOT_THERE)
    says_resume(desk, NOW + 1)
    assert desk.look(NOW + 2).world.steps["r1-dpo"].reason == ""


def test_a_look_that_gets_no_pod_says_that() -> None:
    desk = tuning()
    failed(desk, NOT_THERE)
    looks_again(desk, 2)
    labels = {"cowest.dev/step": "r1-dpo", "cowest.dev/attempt": "2", "cowest.dev/generation": "1"}
    node = {"type": "Pod", "phase": "Pending", "message": "exceeded quota"}
    desk.has("Workflow", "r1-dpo-2", metadata={"labels": labels}, status={"phase": "Running", "nodes": {"a": node}})
    assert progressing(desk.look(NOW + 60))[2] == "step r1-dpo runs: its pod is not made: exceeded quota."


@pytest.mark.parametrize("held", [{"paused_by": "ann"}, None], ids=["paused", "suspended"])
def test_nothing_is_looked_for_while_the_job_is_held(held: Mapping[str, Any] | None) -> None:
    desk = tuning()
    failed(desk, NOT_THERE)
    if held is None:
        desk.declare(suspend=True)
    else:
        desk.memory.state, desk.memory.version = replace(desk.look().world.status, **held), 5
    seen = desk.look(NOW + 10)
    assert reconcile.plan(seen.world).steps == ()
    assert progressing(seen)[1] == (api.REASON_PAUSED if held else api.REASON_SUSPENDED)


# ---------------------------------------------------------------- steps that run for too long
def ran_too_long(desk: Desk, attempt: int = 1, generation: str = "1") -> None:
    """An attempt of r1-dpo that the kubelet ended at `NOW`, by a deadline of an hour."""
    failed(desk, "143", attempt=attempt, generation=generation)
    words = "Pod was active on the node longer than the specified deadline"
    known = desk.family.children["Workflow", f"claims-r1-dpo-{attempt}"]
    node = {"type": "Pod", "phase": "Failed", "outputs": {"exitCode": "143"}, "message": words}
    labels = {"cowest.dev/step": "r1-dpo", "cowest.dev/attempt": str(attempt), "cowest.dev/generation": generation}
    status = {"phase": "Failed", "finishedAt": ENDED, "nodes": {"a": node}}
    desk.has("Workflow", f"r1-dpo-{attempt}", metadata={"labels": labels}, status=status)
    pod = {"labels": {"workflows.argoproj.io/workflow": known.name, "app.kubernetes.io/component": "step"}}
    told = {"phase": "Failed", "reason": "DeadlineExceeded", "message": words}
    desk.has("Pod", f"x-{attempt}", metadata=pod, spec={"activeDeadlineSeconds": 3600}, status=told)


TOO_LONG = (
    "step r1-dpo: it ran for 3600 seconds, the longest that training.stepDeadlineSeconds allows, and was ended. See"
    " where it hangs (`kubectl logs -n desks claims-x-{} -c main`); if it only needs longer, raise"
    " training.stepDeadlineSeconds."
)


def test_a_step_that_ran_for_too_long_is_said_with_what_to_do_and_tried_again_like_a_fault_of_its_own() -> None:
    desk = tuning()
    for attempt in (1, 2, 3):
        ran_too_long(desk, attempt)
        seen = desk.look(NOW + 1)
        assert not seen.submit
        assert story_reason(seen) == api.REASON_STEP_DEADLINE
        assert story_of(seen, api.ROUND_PROGRESSING).startswith(TOO_LONG.format(attempt))
        assert [(t.reason, t.message) for t in seen.world.troubles or ()] == [
            (api.REASON_STEP_DEADLINE, TOO_LONG.format(attempt))
        ]
        assert desk.look(NOW + 601).submit == ({"r1-dpo": attempt + 1} if attempt < 3 else {})
    plan = reconcile.plan(desk.look(NOW + 601).world)
    assert plan.failure is not None and plan.failure.message.endswith("or by an edit of the manifest.")


def test_that_a_step_ran_for_too_long_is_said_while_another_attempt_runs_and_until_a_person_knows() -> None:
    desk = tuning()
    ran_too_long(desk)
    labels = {"cowest.dev/step": "r1-dpo", "cowest.dev/attempt": "2", "cowest.dev/generation": "1"}
    desk.has("Workflow", "r1-dpo-2", metadata={"labels": labels}, status={"phase": "Running"})
    seen = desk.look(NOW + 60)
    assert seen.world.steps["r1-dpo"].phase == "Running"
    assert [trouble.reason for trouble in seen.world.troubles or ()] == [api.REASON_STEP_DEADLINE]
    says_resume(desk, NOW + 50)
    assert desk.troubles() == []


@pytest.mark.parametrize(
    ("generation", "done"),
    [pytest.param("0", (), id="edited since"), pytest.param("1", ("dpo",), id="another attempt did it")],
)
def test_what_is_mended_or_done_is_said_no_more(generation: str, done: tuple[str, ...]) -> None:
    desk = Desk(w.on_trial(number=1, done={name: {} for name in ("collect", "feedback", *done)}))
    ran_too_long(desk, generation=generation)
    assert desk.troubles() == []


def test_without_its_pod_the_manifests_deadline_is_said_and_where_a_log_would_be() -> None:
    desk = tuning()
    desk.declare(**{"training.stepDeadlineSeconds": 7200})
    ran_too_long(desk)
    del desk.family.children["Pod", "claims-x-1"]
    (trouble,) = desk.look(NOW + 1).world.troubles or ()
    assert "it ran for 7200 seconds" in trouble.message
    assert "`kubectl logs -n desks -l workflows.argoproj.io/workflow=claims-r1-dpo-1 -c main`" in trouble.message


@pytest.mark.parametrize(
    ("phase", "ran", "said"),
    [
        pytest.param("Running", 4000.0, False, id="the kubelet may need minutes"),
        pytest.param("Running", 4300.0, True, id="it cannot"),
        pytest.param("Failed", 4300.0, False, id="it is over"),
    ],
)
def test_a_pod_that_its_kubelet_cannot_end_is_said(phase: str, ran: float, said: bool) -> None:
    desk = Desk(w.on_trial(number=1))
    started = datetime.fromtimestamp(NOW - ran, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {"phase": phase, "startTime": started}
    labels = {"workflows.argoproj.io/workflow": "claims-r1-collect", "app.kubernetes.io/component": "step"}
    desk.has("Pod", "x", metadata={"labels": labels}, spec={"activeDeadlineSeconds": 3600}, status=told)
    assert desk.troubles() == ([api.REASON_PODS_FAIL] if said else [])


# ---------------------------------------------------------------- pods that are never made
QUOTA = 'pods "x" is forbidden: exceeded quota: desk, requested: limits.cpu=4, used: 2, limited: 4'


def refused(desk: Desk, part: str, available: int = 0) -> None:
    condition = {"type": "ReplicaFailure", "status": "True", "message": QUOTA}
    desk.has("Deployment", part, status={"availableReplicas": available, "conditions": [condition]})


def test_a_step_whose_pod_a_quota_refuses_is_said_in_the_api_servers_words() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1", message=QUOTA)
    seen = desk.look()
    (trouble,) = seen.world.troubles or ()
    assert trouble.reason == api.REASON_PODS_FAIL
    assert trouble.message == f"Workflow claims-r1-collect: its pod is not made: {QUOTA}."
    assert seen.world.steps["r1-collect"].message == f"its pod is not made: {QUOTA}"
    assert QUOTA in story_of(seen, api.ROUND_PROGRESSING)


FORBIDDEN = 'pods "x" is forbidden: no PriorityClass with name batch-low was found'


@pytest.mark.parametrize(
    ("node", "said"),
    [
        pytest.param({}, [api.REASON_PODS_FAIL], id="the API server refuses it"),
        pytest.param({"hostNodeName": "n1", "message": "pod lost"}, [], id="it was on a node"),
        pytest.param({"message": "pod deleted"}, [], id="somebody deleted it"),
        pytest.param({"outputs": {"exitCode": "1"}}, [], id="it ended by itself"),
    ],
)
def test_a_pod_that_is_refused_is_said_while_argo_waits_to_ask_again(node: Mapping[str, Any], said: list[str]) -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1", **{"phase": "Error", "message": FORBIDDEN, **node})
    seen = desk.look()
    troubles = seen.world.troubles or ()
    assert [trouble.reason for trouble in troubles] == said
    assert all(FORBIDDEN in trouble.message for trouble in troubles)


def test_a_step_whose_pods_are_refused_is_submitted_again_when_an_edit_may_let_them() -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "0", phase="Error", message=FORBIDDEN)
    assert desk.look().submit == {"r1-collect": 2}


def story_of(seen: Observed, kind: str) -> str:
    conditions = reconcile.plan(seen.world).status.conditions
    return next(condition.message for condition in conditions if condition.type == kind)


def story_reason(seen: Observed) -> str:
    conditions = reconcile.plan(seen.world).status.conditions
    return next(condition.reason for condition in conditions if condition.type == api.ROUND_PROGRESSING)


@pytest.mark.parametrize(
    ("pod", "words", "said"),
    [
        pytest.param(None, "", [], id="Argo has said nothing yet"),
        pytest.param("Pending", "ContainerCreating", [], id="its pod is there"),
        pytest.param("Failed", QUOTA, [api.REASON_PODS_FAIL], id="the pod before it ended"),
    ],
)
def test_a_pod_that_is_there_speaks_for_itself(pod: str | None, words: str, said: list[str]) -> None:
    desk = Desk(w.on_trial(number=1))
    waiting(desk, "1", message=words)
    if pod is not None:
        pod_of(desk, pod, NOW - 300 if pod == "Failed" else None)
    assert desk.troubles() == said


@pytest.mark.parametrize("part", ["gateway", "proxy", "observer", "live"])
def test_a_server_whose_pods_a_quota_refuses_is_said(part: str) -> None:
    desk = Desk(w.SERVED)
    refused(desk, part)
    troubles = [trouble for trouble in desk.look().world.troubles or () if trouble.reason == api.REASON_PODS_FAIL]
    assert [trouble.message for trouble in troubles] == [f"Deployment claims-{part}: its pods are not made: {QUOTA}."]


def test_a_weak_model_whose_pods_a_quota_refuses_is_said_in_the_words_that_kserve_keeps_to_its_deployment() -> None:
    desk = Desk(w.SERVED)
    digest = w.STABLE.weak_digest
    not_ready = {
        "type": "PredictorReady",
        "status": "False",
        "message": "Deployment does not have minimum availability",
    }
    server = {"annotations": {"cowest.dev/model-digest": digest}}
    desk.has("InferenceService", "96884fe", metadata=server, status={"conditions": [not_ready]})
    condition = {"type": "ReplicaFailure", "status": "True", "message": QUOTA}
    desk.has(PREDICTOR, "96884fe-predictor", status={"conditions": [condition]})
    seen = desk.look()
    troubles = [trouble for trouble in seen.world.troubles or () if trouble.reason == api.REASON_PODS_FAIL]
    words = f"its pods are not made: {QUOTA}"
    assert [trouble.message for trouble in troubles] == [f"Deployment claims-96884fe-predictor: {words}."]
    assert seen.world.servers[digest].message == words


DELETED = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("metadata", "ready", "answers", "says"),
    [
        pytest.param({}, "True", True, None, id="as it should be"),
        pytest.param(DELETED, "True", True, None, id="deleted, and its pods still answer"),
        pytest.param(DELETED, "True", False, "it is deleted, and made anew once", id="deleted, and its pods are gone"),
        pytest.param({}, None, False, "the controller of KServe has not looked at it", id="no controller looks at it"),
    ],
)
def test_a_server_is_there_while_it_answers_and_is_not_said_to_start_where_it_cannot(
    metadata: Mapping[str, Any], ready: str | None, answers: bool, says: str | None
) -> None:
    desk = Desk(w.SERVED)
    digest = w.STABLE.weak_digest
    server = {"annotations": {"cowest.dev/model-digest": digest}, **metadata}
    status = {"conditions": [{"type": "Ready", "status": ready}]} if ready else {}
    desk.doors.models = [{"id": digest}]
    for _ in range(2):
        desk.has("InferenceService", "a", metadata=server, status=status)
        seen = desk.look().world.servers[digest]
        if not answers:
            desk.doors.shut = {"weak-model"}
            seen = desk.look().world.servers[digest]
        assert seen.ready == (says is None) and (says or "") in seen.message


def test_live_scores_that_a_quota_refuses_are_no_step_that_runs() -> None:
    desk = Desk(w.on_trial(stage="Canary", number=1, step=1, done=w.PREPARED))
    assert desk.look().world.steps["r1-live-1"].phase == "Running"
    refused(desk, "live")
    state = desk.look().world.steps["r1-live-1"]
    assert (state.phase, state.message) == ("Failed", QUOTA)


# ---------------------------------------------------------------- what a pod waits for
HELD = {"phase": "Pending", "conditions": [{"type": "PodReadyToStartContainers", "status": "False"}]}
JUDGE = {"type": "Judge", "endpoint": "https://judge.example.com/v1", "model": "judge",
         "apiKeySecretRef": {"name": "judge", "key": "token"}}  # fmt: skip
MOUNTING: Mapping[str, Any] = {
    "strong.apiKeySecretRefs": [{"name": "strong", "key": "api-key"}, {"name": "spare", "key": "k"}],
    "strong.caBundleRef": {"name": "strong-ca", "key": "root.pem"},
    "strong.proxyKeysSecretRef": {"name": "tools", "ownKey": "cowest"},
    "objectStore": {**STORE, "caBundleRef": {"name": "store-ca", "key": "ca.crt"}},
    "gateway.clientKeysSecretRef": {"name": "clients"},
    "feedback.evaluator": JUDGE,
}
S3 = "Secret s3 with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
KEYS = "Secret strong with api-key or Secret spare with k"
HELD_UP = {
    "gateway": f"ConfigMap store-ca with ca.crt or {S3} or ConfigMap strong-ca with root.pem or {KEYS}"
    " or Secret clients",
    "proxy": f"PersistentVolumeClaim claims-proxy or ConfigMap strong-ca with root.pem or {KEYS}"
    " or Secret judge with token or Secret tools",
    "observer": f"ConfigMap store-ca with ca.crt or {S3}",
    "step": f"ConfigMap claims-r1-collect or ConfigMap store-ca with ca.crt or {S3}"
    " or ConfigMap strong-ca with root.pem or Secret tools with cowest",
}  # fmt: skip


def specs(seen: Observed) -> dict[str, Any]:
    """Of the pods of the job's parts."""
    children = [
        *servers.gateway(seen.context),
        *servers.proxy(seen.context, api.Status()),
        *servers.observer(seen.context),
    ]
    found = {
        child["metadata"]["name"].removeprefix("claims-"): child["spec"]["template"]["spec"]
        for child in children
        if child["kind"] == "Deployment"
    }
    template = json.dumps(steps.workflow_template(seen.context)["spec"]["templates"][0])
    return {**found, "step": json.loads(template.replace("{{workflow.parameters.step}}", "claims-r1-collect"))}


def pod_waits(desk: Desk, part: str, spec: Mapping[str, Any], status: Mapping[str, Any]) -> list[str]:
    """What is said of it a minute after it was made."""
    made = datetime.fromtimestamp(NOW - 60, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata = {"labels": {"app.kubernetes.io/component": part}, "creationTimestamp": made}
    desk.has("Pod", f"{part}-x", metadata=metadata, spec=spec, status=status)
    return [t.message for t in desk.look().world.troubles or () if t.reason == api.REASON_PODS_FAIL]


@pytest.mark.parametrize("part", HELD_UP)
def test_what_a_stuck_pod_mounts_is_asked_for_by_kind_name_and_key_and_nothing_else(part: str) -> None:
    desk = Desk(w.SERVED, **MOUNTING)
    seen = desk.look()
    desk.has("ConfigMap", common.job_map(seen.context)["metadata"]["name"].removeprefix("claims-"))  # it is there
    (said,) = pod_waits(desk, part, specs(seen)[part], HELD)
    assert said == f"pod claims-{part}-x ({part}) waits for its volumes: is {HELD_UP[part]} there?"


def test_a_stuck_pod_of_before_an_edit_is_asked_for_what_it_mounts_itself() -> None:
    desk = Desk(w.SERVED, **{"strong.apiKeySecretRefs": [{"name": "older", "key": "k"}]})
    spec = specs(desk.look())["gateway"]
    desk.declare(**{"strong.apiKeySecretRefs": [{"name": "newer", "key": "k"}]})
    (said,) = pod_waits(desk, "gateway", spec, HELD)
    assert "Secret older with k" in said and "newer" not in said


def test_where_the_kubelet_names_what_is_missing_that_alone_is_said() -> None:
    desk = Desk(w.SERVED, **MOUNTING)
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "judge" not found'}
    status = {**HELD, "containerStatuses": [{"name": "main", "state": {"waiting": waiting}}]}
    (said,) = pod_waits(desk, "step", specs(desk.look())["step"], status)
    assert said == 'pod claims-step-x (step) container main: CreateContainerConfigError: secret "judge" not found.'
