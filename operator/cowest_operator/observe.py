"""I/O: what the watches have shown, and what the job's own pods say, as the World of one decision."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, get_args

from cowest_operator import api, manifest, rounds, story, strong
from cowest_operator.doors import DoorError, Doors
from cowest_operator.kube import Kube, KubeError
from cowest_operator.objects import ray, steps, weak
from cowest_operator.objects.common import Context
from cowest_operator.objects.desired import followed, frozen_name, waiting
from cowest_operator.platform import Discovery, troubles
from cowest_operator.settings import Settings
from cowest_operator.watched import ACTIVE, PREDICTOR, WORKFLOW_LABEL, Family, Seen, epoch, retry_after
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import SettingsError
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_MISSING,
    EXIT_RETRY,
    EvaluationReport,
    LiveReport,
    evaluator_digest,
    load_live_report,
    load_report,
)

ACTION = "cowest.dev/action."  # annotation: what a person said
ACTION_ID = re.compile(r"(\d{20})-([a-z]+)")  # nanoseconds, so that ids sort by time, and the verb
LIVE_EVERY, COUNT_EVERY, SPENT_EVERY, PROBE_EVERY, PROMPTS_EVERY = 2.0, 10.0, 10.0, 20.0, 30.0
KUBELET_SLOW = 600.0  # seconds until the kubelet must have ended a pod that ran for as long as it may
ARGO_SLOW, ARGO_RETRIES = 60.0, 240.0  # seconds until Argo must have seen a pod end; until it must have made another
READINESS_EVERY = 10.0
MOMENT = 0.2  # seconds that a look waits for a newer answer than the one it has
ANSWERS_KEPT = 600.0  # seconds, longer than any of the above
PATIENCE = 20.0  # seconds before a pod that is not there yet is called a trouble
LONGEST_RETRY = 600.0
MISSING_RETRY = 120.0  # what is not there yet is often brought within minutes, and a look for it costs seconds
NO_FAULT = (EXIT_RETRY, EXIT_BUDGET, EXIT_MISSING)  # of the step that ends so
FAILURES = 3  # of a step by faults of its own, before it waits for a person
BAD_INPUT_RETRY = 3600.0  # what a step refuses costs seconds, and a key or a file may be mended where nobody sees it
SPENT = re.compile(r"wanted at most \S+ \S+ (in (?P<round>round) \d+|on (?P<day>\d{4}-\d\d-\d\d)), saw")  # a book's
BY_MIDNIGHT = "It is begun again by itself after midnight UTC, or by an edit of the manifest."
BY_A_PERSON = "It is begun again by `kubectl cowest resume` once that is mended, or by an edit of the manifest."


class HoldError(Exception):
    """Nothing is decided: the manifest cannot be read as one, and none before it is known; nor can a foreign state."""

    def __init__(self, trouble: api.Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


@dataclass
class Memory:
    """What the operator remembers of a job between two looks. Nothing here is needed after a restart."""

    uid: str = ""  # of the job
    applied: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)  # child -> (intent, stamp)
    apply_troubles: tuple[api.Trouble, ...] = ()
    unwanted: dict[str, float] = field(default_factory=dict)  # servers without traffic, since when
    written: Mapping[str, Any] | None = None  # the status as it was last written
    written_at: float = 0.0
    asked: dict[str, tuple[float, Any]] = field(default_factory=dict)  # answers of doors, and when
    shut: dict[str, DoorError] = field(default_factory=dict)  # why the last answer is an older one
    state: api.Status | None = None  # what was decided so far, as it is at `version`: our own last write or a later one
    version: int = 0  # resourceVersion of the job
    said: set[str] = field(default_factory=set)  # notes that were made known
    failing: dict[str, strong.Failing] = field(default_factory=dict)  # the strong endpoint, by who asks it
    no_room: strong.NoRoom | None = None  # for live answers
    hastened: dict[str, float] = field(default_factory=dict)  # Workflow's uid -> the end of pods that Argo was told of
    asking: dict[str, asyncio.Task[bool]] = field(default_factory=dict)  # questions under way
    quiet: int = 0  # looks in a row that nothing had asked for and that found nothing new
    traces: api.TraceCounts | None = None  # of the last look
    wake: Callable[[], None] = lambda: None  # a look, for an answer that came after the one that asked

    def age(self, what: str) -> float:
        """Seconds since the last answer, or since its door was found shut."""
        return time.monotonic() - self.asked[what][0] if what in self.asked else float("inf")

    def answer(self, what: str) -> Any:
        return self.asked[what][1] if what in self.asked else None

    async def ask(self, what: str, question: Coroutine[Any, Any, Any]) -> None:
        """Until it is answered; where an older answer is at hand for a moment only, and a look follows the new one.

        Where packets are dropped a door takes seconds to be found shut, and other jobs wait for this look.
        """
        known = what in self.asked
        if what in self.asking:
            question.close()
        else:
            self.asking[what] = asyncio.create_task(self._ask(what, question))
            self.asking[what].add_done_callback(lambda _: self.asking.pop(what, None))
        task = self.asking[what]
        done, _ = await asyncio.wait({task}, timeout=MOMENT if known else None)
        if done:
            task.result()
        else:
            task.add_done_callback(self._came_late)

    async def _ask(self, what: str, question: Coroutine[Any, Any, Any]) -> bool:
        """Whether it is another answer than the one before."""
        before = (self.answer(what), what in self.shut)
        answer = before[0]
        try:
            answer = await question
            self.shut.pop(what, None)
        except DoorError as error:
            self.shut[what] = error
        self.asked[what] = (time.monotonic(), answer)
        return (answer, what in self.shut) != before

    def _came_late(self, task: asyncio.Task[bool]) -> None:
        if not task.cancelled() and (task.exception() is not None or task.result()):
            self.wake()

    def forget_answers(self, before: float) -> None:
        """Reports of trials that are over, counts since a time that has passed: nobody asks for them again."""
        for what in [what for what, (when, _) in self.asked.items() if when < before]:
            del self.asked[what]
            self.shut.pop(what, None)


@dataclass(frozen=True)
class Observed:
    """A world, and what only the shell needs of it."""

    context: Context
    world: api.World
    submit: Mapping[str, int]  # steps that may be submitted now, and as which attempt
    frozen_document: Mapping[str, Any]  # what the running trial's steps go by
    notes: tuple[api.Event, ...] = ()  # of no decision; each is said once
    instead: Mapping[str, str] = field(default_factory=dict)  # step -> the Workflow that goes before it is submitted
    stopped: bool = False  # the manifest cannot be followed here, and none before it is known


class Observer:
    """Gathers worlds. One for all jobs."""

    def __init__(self, kube: Kube, doors: Doors, settings: Settings, discovery: Discovery) -> None:
        self.kube, self.doors, self.settings = kube, doors, settings
        self.discovery = discovery

    def base(self, context: Context, part: str) -> str:
        """Address of a server of the job."""
        return self._service(context, context.name(part))

    def weak_base(self, context: Context, digest: str) -> str:
        return self._service(context, f"{weak.server_name(context, digest)}-predictor") + "/v1"

    def _service(self, context: Context, name: str) -> str:
        return self.settings.service_url.format(service=name, namespace=context.namespace)

    async def world(self, family: Family, memory: Memory, now: float | None = None) -> Observed:
        """Raises `HoldError` when the manifest cannot be followed, `KubeError` when the API server is away."""
        assert family.job is not None
        now = time.time() if now is None else now
        if memory.written is not None and memory.written == family.job.get("status"):
            family.job["status"] = memory.written  # held once
        context, trouble, stopped = await self._context(family, memory)
        status = _with_a_known_action(_status(family.job, memory), now)
        looked = _Look(self, context, family, memory, status, now)
        return await looked.world(trouble, stopped)

    async def context(self, family: Family, memory: Memory) -> Context:
        """The job as it is followed; none of its pods is asked. Raises as `world` does."""
        context, _, _ = await self._context(family, memory)
        return context

    async def _context(self, family: Family, memory: Memory) -> tuple[Context, api.Trouble | None, bool]:
        """The job as it is followed, what is wrong with its manifest, and whether that stops it altogether."""
        assert family.job is not None
        body, platform = family.job, self.discovery.now
        metadata = body["metadata"]
        document = {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "metadata": {"name": metadata["name"], "generation": metadata["generation"]},
            "spec": body["spec"],
        }
        job: api.Job | None = None
        maps = await self._prompts(body, memory)
        try:
            form = body["spec"]["collaboration"]["draft"]
            document = manifest.resolve_prompts(document, maps, asdict(DEFAULT_PROMPTS[form]))
            job = api.parse_job(document)
            trouble = blocked_by(job) or _beyond_cel(body)
        except (manifest.ManifestError, SettingsError, ValueError) as error:
            trouble = api.Trouble(_reason_of(body, maps), sentence(str(error)))
        known = _last_followed(family) if trouble else None
        if known is not None:
            with suppress(SettingsError, ValueError):
                document, job = (as_before := _as_before(known, document)), api.parse_job(as_before)
        if job is None:
            assert trouble is not None
            raise HoldError(trouble)
        context = Context(
            job,
            metadata["namespace"],
            metadata["uid"],
            document,
            self.settings.images,
            platform.kserve_mode,
            {seen.name: seen.facts["mode"] for seen in family.of("InferenceService") if seen.facts["mode"]},
            platform.has_kuberay,
            self.settings.job_env,
            self.settings.book,
            _gateways(family.children.get(("Deployment", f"{metadata['name']}-gateway"))),
        )
        return context, trouble, blocked_by(job) is not None

    async def _prompts(self, body: Mapping[str, Any], memory: Memory) -> dict[str, Mapping[str, str]]:
        """The ConfigMap of prompts belongs to the person: it is asked for, not watched."""
        reference = body["spec"]["collaboration"].get("promptsConfigMapRef")
        if not reference:
            return {}
        namespace, name = body["metadata"]["namespace"], reference["name"]
        what = f"prompts {name}"
        if memory.age(what) >= PROMPTS_EVERY:
            found = await self.kube.get("ConfigMap", namespace, name)
            memory.asked[what] = (time.monotonic(), found)
        found = memory.answer(what)
        return {name: found.get("data") or {}} if found else {}


class _Look:
    """One look at one job."""

    def __init__(
        self, observer: Observer, context: Context, family: Family, memory: Memory, status: api.Status, now: float
    ) -> None:
        self.observer, self.context, self.family, self.memory = observer, context, family, memory
        self.status, self.now = status, now
        self.troubles: list[api.Trouble] = []
        self.submit: dict[str, int] = {}
        self.instead: dict[str, str] = {}
        self.accepted: dict[str, str] = {}  # Workflows whose steps are done whatever they say -> a sentence on it
        self.observer_base, self.proxy_base = observer.base(context, "observer"), observer.base(context, "proxy")

    async def world(self, trouble: api.Trouble | None, stopped: bool) -> Observed:
        """A trial that runs goes on by the manifest that it began with; `trouble` lets no other begin."""
        job, trial = self.context.job, self.status.candidate
        blocked = trouble if stopped or trial is None else None
        frozen_document, frozen = self._frozen(trial)
        # Side by side: where packets are dropped each of them takes seconds, and other jobs wait for this look.
        gateway = self._gateway()
        asking = asyncio.ensure_future(self._ask_gateway(gateway))
        found = (
            await asyncio.gather(
                self._steps(trial),
                self._servers(),
                self._report(trial),
                self._live(trial),
                self._traces(trial),
                self._budget(trial),
            )
            if not stopped
            else ({}, {}, None, None, api.TraceCounts(), self.status.budget)
        )
        await asking
        self.troubles.sort(key=lambda trouble: (trouble.reason, trouble.message))  # not by who answered first
        world = api.World(
            now=self.now,
            job=job,
            status=self.status,
            store="" if stopped else self.context.store,
            calls=steps.CALLS,
            has_explanations=None,
            evaluator=evaluator_digest(job.spec.feedback.evaluator),
            steps=found[0],
            servers=found[1],
            gateway=gateway,
            report=found[2],
            live=found[3],
            traces=found[4],
            budget=found[5],
            actions=tuple(read_actions(self.family.job or {}, self.status.last_action)),
            frozen=frozen,
            waiting=waiting(frozen_document, self.context.document) if frozen else (),
            blocked=blocked,
        )
        if strong_fails := strong.trouble(job, self.memory.failing):
            self.troubles.append(strong_fails)
        if self.memory.no_room is not None:
            self.troubles.append(strong.without_room(job, self.memory.no_room))
        self._look_at_pods()
        self._look_at_steps()
        self._look_at_deadlines()
        self._look_at_controllers()
        self.troubles += troubles(self.observer.discovery.now, job, self.context.document["spec"].get("training", {}))
        known = {t.message: t for t in (*([trouble] if trouble else []), *self.memory.apply_troubles, *self.troubles)}
        notes = tuple(
            api.Event("Warning", api.REASON_ACTION_NOT_UNDERSTOOD, sentence)
            for sentence in not_understood(self.family.job or {})
        ) + tuple(api.Event("Warning", api.REASON_WORKFLOW_STUCK, said) for said in self.accepted.values())
        world = replace(world, troubles=tuple(known.values()))
        return Observed(self.context, world, self.submit, frozen_document, notes, self.instead, stopped)

    # ------------------------------------------------------------ the trial
    def _frozen(self, trial: api.Trial | None) -> tuple[Mapping[str, Any], api.Job | None]:
        if trial is None:
            return self.context.document, None
        seen = self.family.children.get(("ConfigMap", frozen_name(self.context, trial)))
        text = seen.facts.get("frozen") if seen else None
        if not text:
            return self.context.document, None
        document = followed(json.loads(text), self.context.document)
        return document, api.parse_job(document)

    async def _steps(self, trial: api.Trial | None) -> dict[str, api.StepState]:
        if trial is None:
            return {}
        latest: dict[str, Seen] = {}
        for seen in self.family.of("Workflow"):
            name = seen.facts["step"]
            belongs = name.startswith(f"r{trial.number}-")
            if belongs and (name not in latest or seen.facts["attempt"] > latest[name].facts["attempt"]):
                latest[name] = seen
        found: dict[str, api.StepState] = {}
        for name, seen in latest.items():
            if state := await self._step(trial, name, seen):
                found[name] = state
        if trial.stage != "Preparing":
            found |= self._watcher(trial)
        return found

    async def _step(self, trial: api.Trial, name: str, seen: Seen) -> api.StepState | None:
        """`None` when it is due to be submitted again."""
        facts = seen.facts
        if facts["phase"] in ACTIVE:
            if self._waits_for_what_was_edited(seen):
                self.submit[name], self.instead[name] = facts["attempt"] + 1, seen.name
                return None
            return await self._left(trial, name, seen) or self._running(seen)
        if name.removeprefix(f"r{trial.number}-") in trial.done:
            return None
        if facts["phase"] == "Succeeded":
            return await self._succeeded(trial, name)
        code, words = _code(seen), _words(seen)
        words, reason = (self._overran(seen), api.REASON_STEP_DEADLINE) if facts["overran"] else (words, "")
        asked_for = facts["generation"] != self.context.job.generation or self._resumed_since(seen)
        if code == EXIT_MISSING and not asked_for:  # nobody has to say so once it is there
            if self.now >= facts["finished"] + retry_after(facts["attempt"], MISSING_RETRY):
                self.submit[name] = facts["attempt"] + 1
            return api.StepState("Failed", EXIT_RETRY, 1, words, reason=api.REASON_DATA_MISSING)
        for_good = not asked_for and self._failed_for_good(trial, seen)
        if for_good and (code != EXIT_BAD_INPUT or self.now < facts["finished"] + BAD_INPUT_RETRY):
            return api.StepState("Failed", code, 1, words, again=BY_A_PERSON, reason=reason)
        if code == EXIT_BUDGET and not asked_for and (again := self._no_budget(words)):
            return api.StepState("Failed", code, 1, words, again=again, reason=reason)
        if asked_for or self.now >= facts["finished"] + retry_after(facts["attempt"], LONGEST_RETRY):
            self.submit[name] = facts["attempt"] + 1
            return None
        return api.StepState("Failed", code if code == EXIT_BUDGET else EXIT_RETRY, 1, words, reason=reason)

    def _no_budget(self, words: str) -> str:
        """What begins it again, where another attempt cannot succeed before; "" where one may."""
        limit = SPENT.search(words)
        if limit is None:
            return ""
        if limit["round"]:
            return BY_A_PERSON
        is_over = datetime.fromtimestamp(self.now, UTC).date().isoformat() > limit["day"]
        return "" if is_over else BY_MIDNIGHT

    def _running(self, workflow: Seen) -> api.StepState:
        """A look for what was missing says so until it is over: nothing is written while nothing changes."""
        step, attempt, generation = (workflow.facts[name] for name in ("step", "attempt", "generation"))
        before = max(
            (w for w in self.family.of("Workflow") if w.facts["step"] == step and w.facts["attempt"] < attempt),
            key=lambda each: int(each.facts["attempt"]),
            default=None,
        )
        is_look = before is not None and _code(before) == EXIT_MISSING and before.facts["generation"] == generation
        if not_made := self._not_made(workflow):
            return api.StepState("Running", message=not_made)
        if before is None or not is_look or self._resumed_since(before):
            return api.StepState("Running", message=workflow.facts["message"])
        return api.StepState("Running", message=_words(before), reason=api.REASON_DATA_MISSING)

    def _overran(self, workflow: Seen) -> str:
        pod = next((pod for pod in self.family.pods_of(workflow) if pod.facts["overran"]), None)
        allowed = api.parse_pods(self.context.document["spec"].get("training", {})).step_deadline_seconds or 0
        which = f"{pod.name} -c {steps.MAIN}" if pod else f"-l {WORKFLOW_LABEL}={workflow.name} -c {steps.MAIN}"
        look = f"`kubectl logs -n {self.context.namespace} {which}`"
        return rounds.overran(pod.facts["allowed"] if pod else allowed, look)

    def _failed_for_good(self, trial: api.Trial, seen: Seen) -> bool:
        """Another attempt would cost hours of a GPU, or money, and end alike. Not so where traces come in meanwhile."""
        code, facts = _code(seen), seen.facts
        if code in NO_FAULT or facts["step"] == f"r{trial.number}-collect":
            return False
        alike = (
            each
            for each in self.family.of("Workflow")
            if (each.facts["step"], each.facts["generation"]) == (facts["step"], facts["generation"])
            and each.facts["phase"] not in (*ACTIVE, "Succeeded")
            and _code(each) not in NO_FAULT
            and not self._resumed_since(each)
        )
        return code == EXIT_BAD_INPUT or sum(1 for _ in alike) >= FAILURES

    def _resumed_since(self, workflow: Seen) -> bool:
        """Has a person said `resume` since it ended, or just now by a clock that is behind?"""
        ended = 1e9 * (workflow.facts["finished"] or workflow.created)
        return any(
            action.verb == "resume" and (action.id > self.status.last_action or int(action.id[:20]) > ended)
            for action in read_actions(self.family.job or {}, "")
        )

    def _waits_for_what_was_edited(self, seen: Seen) -> bool:
        """A pod that wants a node, an image or a Secret in vain waits for ever, and one that gets too little memory
        dies again and again: no edit reaches its Workflow."""
        facts, pods = seen.facts, self.family.pods_of(seen)
        if facts["generation"] == self.context.job.generation:
            return False
        if not facts["waits"] and not any(pod.facts["died"] for pod in pods):
            return False
        if any(pod.facts["phase"] != "Pending" and not pod.facts["died"] for pod in pods):
            return False
        return bool(facts["template"] != steps.workflow_template(self.context)["metadata"]["name"])

    def _not_made(self, workflow: Seen) -> str:
        """Why there is no pod of it, as where a quota refuses one: Argo says so of the node, and waits."""
        is_late = self.now - workflow.created > PATIENCE
        if workflow.facts["phase"] not in ACTIVE or not is_late or not workflow.facts["pending"]:
            return ""
        lives = any(not pod.facts["ended"] for pod in self.family.pods_of(workflow))
        return "" if lives else f"its pod is not made: {workflow.facts['pending']}"

    async def _left(self, trial: api.Trial, name: str, workflow: Seen) -> api.StepState | None:
        """Done is a step whose manifest is there, which it writes last, also where Argo does not end its Workflow.

        One that was made before the trial began is of a job of this name that is gone.
        """
        ended = self._ended(workflow) if workflow.facts["phase"] == "Running" and _is_due(trial, name) else 0.0
        if not ended:
            return None
        out = self._out(trial, name)
        found = await self._asked(f"left {out}", COUNT_EVERY, self.observer.doors.artifact(self.observer_base, out))
        if not found or epoch(found.get("started")) < int(trial.started_at):
            return None
        self.accepted[workflow.name] = (
            f"step {name} is done: its pods are over since {_clock(ended)} and its manifest is in the store, though"
            f" Workflow {workflow.name} is still Running; that is deleted."
        )
        return api.StepState("Succeeded", 0, 1, "", found["metrics"], found["digest"])

    def _out(self, trial: api.Trial, name: str) -> str:
        return f"{self.context.store}/runs/r{trial.number}/{name.removeprefix(f'r{trial.number}-')}/manifest.json"

    async def _succeeded(self, trial: api.Trial, name: str) -> api.StepState:
        out = self._out(trial, name)
        try:
            found = await self.observer.doors.artifact(self.observer_base, out)
        except DoorError as error:
            self._door_trouble(error)
            return api.StepState("Running", message=f"its result is not to be had yet: {error}")
        if found is None:
            return api.StepState("Failed", EXIT_FAILED, 1, f"it left no {out}")
        return api.StepState("Succeeded", 0, 1, "", found["metrics"], found["digest"])

    def _watcher(self, trial: api.Trial) -> dict[str, api.StepState]:
        name = f"r{trial.number}-live-{trial.step}"
        seen = self.family.children.get(("Deployment", self.context.name("live")))
        trouble = next((pod.facts["trouble"] for pod in self._pods("score-live") if pod.facts["trouble"]), "")
        if trouble := trouble or (seen.facts["message"] if seen else ""):
            return {name: api.StepState("Failed", EXIT_RETRY, 1, trouble)}
        return {name: api.StepState("Running")}

    async def _report(self, trial: api.Trial | None) -> EvaluationReport | None:
        if trial is None or trial.stage != "Preparing" or "evaluate" not in trial.done:
            return None
        uri = f"{self.context.store}/runs/r{trial.number}/evaluate/report.json"
        data = await self._asked(f"report {uri}", 2.0, self.observer.doors.artifact(self.observer_base, uri))
        return load_report(data) if data else None

    async def _live(self, trial: api.Trial | None) -> LiveReport | None:
        if trial is None or trial.stage == "Preparing":
            return None
        uri = f"{self.context.store}/runs/r{trial.number}/live-{trial.step}.json"
        data = await self._asked(f"live {uri}", LIVE_EVERY, self.observer.doors.artifact(self.observer_base, uri))
        return load_live_report(data) if data else None

    async def _traces(self, trial: api.Trial | None) -> api.TraceCounts:
        waiting = trial is None and self.status.stable is not None and self.context.job.spec.rounds.trigger.new_traces
        seen = self.family.children.get(("Deployment", self.context.name("observer")))
        troubled = seen is not None and not seen.facts["available"]  # mostly by a store that is away: it has the words
        every = COUNT_EVERY if waiting or troubled else 6 * COUNT_EVERY
        since = self.status.traces_since
        data = await self._asked(f"traces {since}", every, self.observer.doors.traces(self.observer_base, since))
        if not data:
            return api.TraceCounts()
        counts = api.TraceCounts(int(data["all"]), int(data["usable"]), str(data.get("reason") or ""))
        return replace(counts, since_last=data.get("since_last"))

    async def _budget(self, trial: api.Trial | None) -> api.Budget:
        number = trial.number if trial else max(0, self.status.trials - 1)
        every = SPENT_EVERY if trial or strong.STEPS in self.memory.failing else 30 * SPENT_EVERY
        data = await self._asked(f"spent {number}", every, self.observer.doors.spent(self.proxy_base, number))
        if not data:
            return self.status.budget
        self._note_strong(strong.STEPS, data.get("strong"))
        part = data.get("round") or {}
        current = api.Spent(int(part.get("calls", 0)), int(part.get("tokens", 0)), float(part.get("money", 0)))
        live = live_of(data.get("live"))
        return api.Budget(int(data["calls"]), int(data["tokens"]), float(data["money"]), current, live)

    async def _asked(self, what: str, every: float, question: Coroutine[Any, Any, Any]) -> Any:
        """The answer of a door, about `every` seconds old at most; while the door is shut, the last one, and why."""
        if what in self.memory.shut:  # so that it is not said for a minute more than it lasts
            every = min(every, COUNT_EVERY)
        if self.memory.age(what) < every:
            question.close()
        else:
            await self.memory.ask(what, question)
            self.memory.forget_answers(time.monotonic() - ANSWERS_KEPT)
        if what in self.memory.shut:
            self._door_trouble(self.memory.shut[what])
        return self.memory.answer(what)

    def _door_trouble(self, error: DoorError) -> None:
        """While the pods start nobody answers, or not with good news: that is no trouble yet."""
        seen = self.family.children.get(("Deployment", self.context.name(error.part)))
        since = max((each.created for each in (seen, *self._pods(error.part)) if each), default=0.0)
        starts = self.now - since < 6 * PATIENCE and not (seen and seen.facts["available"] and error.answered)
        if seen is None or starts:
            return
        if error.part == "proxy":
            reason = api.REASON_PROXY_AWAY
        elif not error.answered:
            reason = api.REASON_OBSERVER_AWAY
        else:
            known = (api.REASON_DATA_MISSING, api.REASON_DATA_INVALID)
            reason = error.reason if error.reason in known else api.REASON_STORE_AWAY
        self.troubles.append(api.Trouble(reason, sentence(str(error))))

    # ------------------------------------------------------------ the strong endpoint
    async def _ask_gateway(self, gateway: api.ServerState) -> None:
        """How the strong endpoint does for users, and whether the day's budget has room for them."""
        if not gateway.ready:
            return
        if self.memory.age("readiness") >= READINESS_EVERY:
            base = self.observer.base(self.context, "gateway")
            await self.memory.ask("readiness", self.observer.doors.readiness(base))
        # A gateway that does not answer is what Ready tells; what it said before says nothing of now.
        answer = (None if "readiness" in self.memory.shut else self.memory.answer("readiness")) or {}
        self._note_strong(strong.USERS, answer.get("strong"))
        budget = self.context.job.spec.strong.budget
        self.memory.no_room = strong.room(budget, answer.get("budget"), self.now, self.memory.no_room)

    def _note_strong(self, who: str, word: Mapping[str, Any] | None) -> None:
        endpoint, failing = self.context.job.spec.strong.endpoint, self.memory.failing
        now = strong.seen(endpoint, word, failing.get(who))
        if now is not None:
            failing[who] = now
        else:
            failing.pop(who, None)

    # ------------------------------------------------------------ servers
    def _gateway(self) -> api.ServerState:
        """While its engine is switched there are two, and it is ready while either answers."""
        wanted = self.family.children.get(ray.kept_in(self.context))
        other = self.family.children.get(ray.kept_in(self.context, other=True))
        seen = wanted or other
        if seen is None:
            return api.ServerState(False, message="the gateway is not made yet.")
        ready = any(each.facts["available"] > 0 for each in (wanted, other) if each)
        pods = (pod for part in ("gateway", ray.HEAD) for pod in self._pods(part))
        trouble = next((p.facts["trouble"] for p in pods if p.facts["trouble"]), "")
        message = "" if ready else trouble or seen.facts["message"] or "the gateway starts."
        return api.ServerState(ready, f"http://{self.context.host('gateway')}/v1", message=message)

    async def _servers(self) -> dict[str, api.ServerState]:
        served = [s for s in self.family.of("InferenceService") if s.facts["digest"]]
        states = await asyncio.gather(*(self._server(seen) for seen in served))
        return {seen.facts["digest"]: state for seen, state in zip(served, states, strict=True)}

    async def _server(self, seen: Seen) -> api.ServerState:
        """Ready is what answered with the digest; KServe's condition only says when to ask.

        One that is deleted serves until its pods go: with KServe's controller away, as if nothing had been said.
        """
        digest = seen.facts["digest"]
        endpoint = weak.endpoint(self.context, digest)
        if not seen.facts["ready"]:
            trouble = next((p.facts["trouble"] for p in self._pods("weak-model") if p.facts["trouble"]
                            and p.name.startswith(seen.name)), "")  # fmt: skip
            refused = self.family.children.get((PREDICTOR, f"{seen.name}-predictor"))
            trouble = trouble or (f"its pods are not made: {refused.facts['message']}" if refused else "")
            return api.ServerState(False, endpoint, message=trouble or seen.facts["message"] or self._starts(seen))
        what = f"served {seen.name}"
        is_right = digest in (self.memory.answer(what) or ()) and what not in self.memory.shut and not seen.deleting
        if not is_right or self.memory.age(what) >= PROBE_EVERY:
            question = self.observer.doors.served(self.observer.weak_base(self.context, digest))
            await self.memory.ask(what, question)
        if what in self.memory.shut:
            words = self._starts(seen) if seen.deleting else str(self.memory.shut[what])
            return api.ServerState(False, endpoint, message=words)
        served = self.memory.answer(what) or []
        if digest in served:
            return api.ServerState(True, endpoint, digest)
        return api.ServerState(False, endpoint, "", f"it serves {', '.join(served) or 'nothing'}, wanted {digest}")

    def _starts(self, server: Seen) -> str:
        if server.deleting:
            return "it is deleted, and made anew once the controller of KServe has let it go"
        is_late = not server.facts["taken"] and self.now - server.created > PATIENCE
        return "the controller of KServe has not looked at it" if is_late else "it starts"

    # ------------------------------------------------------------ pods
    def _pods(self, part: str) -> Iterator[Seen]:
        return (seen for seen in self.family.of("Pod") if seen.facts["part"] == part and not seen.deleting)

    def _look_at_pods(self) -> None:
        """Each kind of pod once, the kubelet's own words."""
        said: set[str] = set()
        for pod in self.family.of("Pod"):
            part, trouble = pod.facts["part"], pod.facts["trouble"]
            late = self.now - pod.created > PATIENCE
            if not trouble and late and pod.facts["waits_for_volumes"]:
                trouble = f"waits for its volumes: is {self._asked_of(pod)} there?"
            if trouble and late and part not in said and not pod.deleting:
                said.add(part)
                message = f"pod {pod.name} ({part}) {trouble}"
                self.troubles.append(api.Trouble(api.REASON_PODS_FAIL, sentence(message)))
        for seen in (*self.family.of("Deployment"), *self.family.of(PREDICTOR)):
            if words := seen.facts["message"]:
                message = f"Deployment {seen.name}: its pods are not made: {words}"
                self.troubles.append(api.Trouble(api.REASON_PODS_FAIL, sentence(message)))

    def _look_at_steps(self) -> None:
        """Argo tries what died again for minutes before the Workflow fails; the first death may be an accident."""
        for workflow in self.family.of("Workflow"):
            if words := self._not_made(workflow):
                self.troubles.append(api.Trouble(api.REASON_PODS_FAIL, sentence(f"Workflow {workflow.name}: {words}")))
            pods = self.family.pods_of(workflow) if workflow.facts["phase"] == "Running" else []
            died = [pod for pod in pods if pod.facts["died"]]
            if died and (len(died) > 1 or not any(pod.facts["phase"] == "Running" for pod in pods)):
                pod = max(died, key=lambda each: each.created)
                message = f"pod {pod.name} (step) {pod.facts['died'].rstrip('. ')}. It is tried again; if it needs"
                message += " more, raise training.resources: that applies at once."
                self.troubles.append(api.Trouble(api.REASON_PODS_FAIL, sentence(message)))

    def _look_at_deadlines(self) -> None:
        """That a step ran into its deadline is said until it is done: between two attempts there are only seconds."""
        trial = self.status.candidate
        late: dict[str, Seen] = {}
        for workflow in sorted(self.family.of("Workflow"), key=lambda each: int(each.facts["attempt"])):
            facts = workflow.facts
            is_now = facts["generation"] == self.context.job.generation and not self._resumed_since(workflow)
            if facts["overran"] and facts["phase"] not in ACTIVE and is_now and _is_due(trial, facts["step"]):
                late[facts["step"]] = workflow
        for name, workflow in late.items():
            message = f"step {name}: {self._overran(workflow)}"
            self.troubles.append(api.Trouble(api.REASON_STEP_DEADLINE, message))
        for pod in self.family.of("Pod"):
            until = pod.facts["started"] + pod.facts["allowed"]
            is_over = pod.facts["phase"] in ("Succeeded", "Failed")
            if pod.facts["allowed"] and pod.facts["started"] and not is_over and self.now > until + KUBELET_SLOW:
                message = (
                    f"pod {pod.name} (step) may run until {_clock(until)} and is not over: the kubelet of its node"
                    " cannot end it, as where a mount does not answer. Mend that node, or delete the pod with --force."
                )
                self.troubles.append(api.Trouble(api.REASON_PODS_FAIL, message))

    def _look_at_controllers(self) -> None:
        """What no controller has taken up, or has left where it was, is nobody's fault but its own."""
        for workflow in self.family.of("Workflow"):
            is_over = workflow.facts["phase"] == "Running" and not self._not_made(workflow)
            if is_over and workflow.name not in self.accepted and (ended := self._ended(workflow)):
                self.troubles.append(self._not_ended(workflow, ended))
        for kind, controller in (("InferenceService", "KServe"), ("Workflow", "Argo Workflows")):
            for seen in self.family.of(kind):
                if not seen.facts["taken"] and not seen.deleting and self.now - seen.created > PATIENCE:
                    message = (
                        f"{kind} {seen.name} waits for the controller of {controller}, which has not looked at it since"
                        f" {_clock(seen.created)}: does it run, and may it watch this namespace?"
                    )
                    self.troubles.append(api.Trouble(api.REASON_CONTROLLER_AWAY, message))
                    break

    def _not_ended(self, workflow: Seen, ended: float) -> api.Trouble:
        """Argo ends no Workflow that it does not see, nor one of whose pods the executor could not report."""
        job, namespace = self.context.job.name, self.context.namespace
        cure = (
            f"`kubectl cowest pause {job} -n {namespace} --now`, then `resume`, begins the step anew; so does"
            f" `kubectl delete workflow {workflow.name} -n {namespace}`"
        )
        if workflow.facts["noted"]:
            message = (
                f"Workflow {workflow.name} is Running, though its pods are over since {_clock(ended)} and the"
                f" controller of Argo Workflows has noted it: it is stuck. {cure}. If that comes again: may"
                f" ServiceAccount {self.context.name('steps')} create and patch workflowtaskresults?"
            )
            return api.Trouble(api.REASON_WORKFLOW_STUCK, message)
        message = (
            f"Workflow {workflow.name} is Running, but its pod ended at {_clock(ended)}: does the controller of Argo"
            f" Workflows run, and may it watch this namespace? If it does, this Workflow is stuck: {cure}."
        )
        return api.Trouble(api.REASON_CONTROLLER_AWAY, message)

    def _ended(self, workflow: Seen) -> float:
        """When its last pod ended, if that is so long ago that Argo must have noticed; else 0."""
        if (last := self.family.last_of(workflow)) is None:
            return 0.0
        patience = ARGO_SLOW if last.facts["phase"] == "Succeeded" else ARGO_RETRIES
        return float(last.facts["ended"]) if self.now - last.facts["ended"] > patience else 0.0

    def _asked_of(self, pod: Seen) -> str:
        """What the pod mounts, the job's own children apart, which are there. We may read no Secret."""
        names = [
            f"{kind} {name}{f' with {_listed(keys)}' if keys else ''}"
            for kind, name, keys in pod.facts["mounts"]
            if kind == "PersistentVolumeClaim" or (kind, name) not in self.family.children
        ]
        return " or ".join(names) or "each of its ConfigMaps, Secrets and volumes"


def _status(body: Mapping[str, Any], memory: Memory) -> api.Status:
    """What was decided so far: by our own last write, or by whoever wrote after it."""
    version = int(body["metadata"]["resourceVersion"])
    if memory.state is None or version > memory.version:
        try:
            memory.state, memory.version = story.read(body.get("status")), version
        except SettingsError as error:
            raise HoldError(api.Trouble(api.REASON_STATE_UNREADABLE, sentence(str(error)))) from error
        memory.written = body.get("status") or {}
    return memory.state


def _reason_of(body: Mapping[str, Any], maps: Mapping[str, Any]) -> str:
    """Of a manifest that cannot be read as one."""
    reference = body["spec"].get("collaboration", {}).get("promptsConfigMapRef")
    missing = reference is not None and reference["name"] not in maps
    return api.REASON_CONFIG_MAP_MISSING if missing else api.REASON_MANIFEST_INVALID


def _last_followed(family: Family) -> Mapping[str, Any] | None:
    """The manifest of the last trial, as it was frozen when that began."""
    assert family.job is not None
    head = f"{family.job['metadata']['name']}-r"
    frozen = {
        int(number): seen.facts["frozen"]
        for seen in family.of("ConfigMap")
        if seen.name.startswith(head) and (number := seen.name.removeprefix(head)).isdigit() and "frozen" in seen.facts
    }
    return json.loads(frozen[max(frozen)]) if frozen else None


def _as_before(known: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial goes by, and the store, as they were; the rest as it is declared."""
    document = followed(known, declared)
    return {**document, "spec": {**document["spec"], "objectStore": known["spec"].get("objectStore")}}


def _beyond_cel(body: Mapping[str, Any]) -> api.Trouble | None:
    """What `cowest validate` refuses, and the API server has taken."""
    problems = " ".join(map(str, manifest.beyond_cel(body)))
    return api.Trouble(api.REASON_MANIFEST_INVALID, problems) if problems else None


def blocked_by(job: api.Job) -> api.Trouble | None:
    """What a manifest may say on one machine but not here."""
    spec = job.spec
    if spec.object_store is None:
        return api.Trouble(
            api.REASON_NOT_ON_KUBERNETES,
            "spec.objectStore: wanted a bucket for models and traces, saw none; only `cowest run` on one machine can do"
            " without.",
        )
    calibration = spec.feedback.evaluator.calibration
    for field_name, uri in (
        ("spec.weak.model", spec.weak.model),
        ("spec.data.train", spec.data.train),
        ("spec.data.heldOut", spec.data.held_out),
        ("spec.feedback.evaluator.calibration.labels", calibration.labels if calibration else ""),
    ):
        if uri.startswith("file://"):
            return api.Trouble(
                api.REASON_NOT_ON_KUBERNETES,
                f"{field_name}: wanted an s3:// address, saw {uri}; pods see no files of yours. Bring it in with"
                " `cowest upload` and name what it prints.",
            )
    return None


def read_actions(body: Mapping[str, Any], after: str) -> Iterator[api.Action]:
    """What people said, by annotation, in the order in which they said it; `not_understood` has the rest."""
    for identity, text in _said(body):
        if identity > after:
            with suppress(ValueError):
                yield _action(identity, text)


def not_understood(body: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each annotation that will never be taken in."""
    for identity, text in _said(body):
        try:
            _action(identity, text)
        except ValueError as error:
            yield sentence(f"annotation {ACTION}{identity} has no effect: {error}. `kubectl cowest` writes them well")


def _said(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    annotations = (body.get("metadata") or {}).get("annotations") or {}
    return ((n.removeprefix(ACTION), text) for n, text in sorted(annotations.items()) if n.startswith(ACTION))


def _action(identity: str, text: str) -> api.Action:
    """Raises `ValueError` with what was wanted."""
    verbs, form = get_args(api.Verb), ACTION_ID.fullmatch(identity)
    if form is None or form[2] not in verbs:
        raise ValueError(f"wanted 20 digits, a dash and {', '.join(verbs[:-1])} or {verbs[-1]} for its name")
    try:
        said = json.loads(text)
        verb, by, why, at = said["verb"], str(said["by"]), str(said.get("why", "")), float(said["at"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'wanted {{"verb", "by", "why", "at"}} as JSON, saw {text[:200]!r}') from error
    model = said.get("model")
    if verb != form[2]:
        raise ValueError(f"wanted the verb of its name, {form[2]}, saw {str(verb)[:40]!r}")
    if verb == "propose" and not (isinstance(model, str) and model):
        raise ValueError(f'wanted the "model" that is proposed, saw {str(model)[:200]!r}')
    stops = verb == "pause" and said.get("now") is True
    return api.Action(identity, verb, by, why, at, model if verb == "propose" else None, stops)


def _with_a_known_action(status: api.Status, now: float) -> api.Status:
    """What sorts after every word still to come would silence them all: such an id was taken in once."""
    if not status.last_action or ACTION_ID.fullmatch(status.last_action):
        return status
    return replace(status, last_action=f"{int(now * 1e9):020d}-resume")


def _code(workflow: Seen) -> int:
    """Of a step that failed, as `cowest_training.contract` has them; a pod that was taken away may be tried again."""
    code = workflow.facts["code"]
    return EXIT_RETRY if code is None or str(code) in steps.RETRY_CODES else int(code)


def _words(workflow: Seen) -> str:
    """Why it failed."""
    return sentence(workflow.facts["words"] or workflow.facts["message"] or "it failed")


def _is_due(trial: api.Trial | None, step: str) -> bool:
    """Is it a step of this trial that is not done?"""
    head = f"r{trial.number}-" if trial else ""
    return trial is not None and step.startswith(head) and step.removeprefix(head) not in trial.done


def _gateways(seen: Seen | None) -> int | None:
    """None once an autoscaler has said how many there should be."""
    return seen.facts["replicas"] if seen is not None else 0


def _clock(epoch: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(epoch))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def sentence(text: str) -> str:
    """One line that ends with a full stop. What stood in lines of its own, as rows of a list, stays apart."""
    line = ""
    for each in filter(str.strip, text.splitlines()):
        ends = line.endswith((":", ";", ",", *_STOPS)) or not line
        line += ("" if ends else ";" if each[0].isspace() else ".") + " " + " ".join(each.split())
    line = line[1:1001].rstrip()
    return line if line.endswith(_STOPS) else line + "."


_STOPS = (".", "?", "!")


__all__ = [
    "HoldError",
    "KubeError",
    "Memory",
    "Observed",
    "Observer",
    "blocked_by",
    "not_understood",
    "read_actions",
    "sentence",
]


def live_of(told: Mapping[str, Any] | None) -> api.Live | None:
    """What the proxy says of live answers; nothing where no day is limited, or the proxy is an older one."""
    if not told:
        return None
    return api.Live(str(told["day"]), int(told["calls"]), int(told["tokens"]), float(told["money"]))
