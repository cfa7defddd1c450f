"""The embedded engine: the same decisions as on Kubernetes, over processes and a folder.

observe -> reconcile.plan -> apply, until nothing is left to do. All state is in the job's home folder, so that a kill
at any moment costs at most the work of the running step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cowest_cli import jobs
from cowest_cli.counting import Counting
from cowest_cli.following import Following
from cowest_cli.preflight import Facts, facts_of
from cowest_cli.processes import Child, free_port, get_json, port_is_free
from cowest_cli.replay import decision_of
from cowest_operator import api, reconcile, rounds, story, strong
from cowest_operator.manifest import local_path
from cowest_operator.objects.desired import followed, waiting
from cowest_operator.objects.weak import NO_THOUGHTS
from cowest_operator.promotion import answers_of_look, step_of
from cowest_serving.contract import Routing, dump, is_evaluator_key
from cowest_serving.cores import THREADS, Cores, look
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_RETRY,
    MANIFEST,
    EvaluationReport,
    LiveReport,
    StepError,
    evaluator_digest,
    how_far,
    load_live_report,
    load_report,
    pace,
)

TICK = 0.1  # seconds between looks at the world
PATIENCE = 10.0  # seconds that a child has to end by itself
GATEWAY_PATIENCE = 40.0  # it finishes its answers (30 s at most), then writes their records
STATUS_EVERY = 1.0  # seconds between writes of a status that only says something else
READINESS_EVERY = 5.0  # seconds between questions to a gateway that is ready
COUNT_OFTEN, COUNT_SELDOM = 2.0, 60.0  # seconds between counts of the traces
DRAIN = 3.0  # seconds that a weak model outlives its last traffic
CLIENT_KEYS = "COWEST_CLIENT_API_KEYS"  # who may ask the gateway: for no other child
CLIENT_NAMES = "COWEST_CLIENT_APPLICATIONS"  # whose keys those are
FALLBACK_KEYS = "COWEST_STRONG_FALLBACK_API_KEYS"  # of the strong model's fallbacks: for the gateway only
STRONG_KEYS = "COWEST_STRONG_API_KEYS"  # one a line
MAX_RESTARTS = 4  # of a gateway that never became ready
LONGEST_WAIT = 60.0  # seconds before a server that ended is started again
FIRST_HOLD, LONGEST_HOLD = 30.0, 600.0  # seconds before what failed for good is tried again, with --serve
STEADY = 60.0  # seconds that a server has to run for its earlier ends to be forgotten

Start = Callable[..., Child]


@dataclass
class _Step:
    spec: api.StepSpec
    child: Child
    allowed: int | None  # seconds that this attempt may run, as the manifest said when it began
    attempts: int = 1
    again_at: float | None = None
    began: float = field(default_factory=time.monotonic)
    overran: bool = False  # it was asked to end

    def late(self) -> float:
        """Seconds by which it runs too long; below 0 before that, and where it is over."""
        if self.allowed is None or self.spec.keeps_running or self.child.code() is not None:
            return -1.0
        return time.monotonic() - self.began - self.allowed


@dataclass
class _Server:
    child: Child
    port: int
    ready: bool = False
    digest: str = ""
    message: str = "it starts"
    trouble: str = ""  # why it ended, until it is ready again
    threads: int = 1
    restarts: int = 0
    again_at: float | None = None  # the next start of one that ended
    look_at: float = 0.0  # the next question whether it is ready
    since: float = 0.0  # when it became ready
    replaced: bool = False  # it is to end, and another starts in its place


@dataclass
class _Hold:
    """A step failed for good while the gateway serves on: it is begun anew after a wait that grows."""

    steps: tuple[str, ...]
    until: float  # epoch seconds
    times: int = 0
    begun_anew: bool = False


@dataclass(frozen=True)
class Order:
    """What a person wants run: the manifest, what is known of its data, and all keys that it names."""

    declared: jobs.Declared
    facts: Facts
    keys: Mapping[str, str] = field(default_factory=dict)
    client_keys: str | None = None
    fallback_keys: str | None = None
    client_names: str | None = None
    file: Path | None = None  # of the manifest

    @property
    def of_gateway(self) -> tuple[Any, ...]:
        """All that the gateway reads as it starts."""
        spec = self.declared.document["spec"]
        read = tuple(spec.get(name) for name in ("strong", "collaboration", "traces", "gateway"))
        return (*read, self.keys, self.client_keys, self.client_names, self.fallback_keys)


def read_order(file: Path, secrets: Path | None, known: Path | None = None) -> Order:
    """Raises `ManifestError` or `StepError` with all that is wrong."""
    declared = jobs.load(file)
    jobs.reach(declared.job.spec.object_store)
    return Order(
        declared,
        facts_of(declared.document, str(file), known),
        jobs.keys_environment(declared.job, secrets),
        jobs.client_keys(declared.job, secrets),
        jobs.fallback_keys(declared.job, secrets),
        jobs.client_names(declared.job, secrets),
        file,
    )


class Engine:
    """One job on one machine."""

    def __init__(
        self,
        order: Order,
        home: jobs.Home,
        port: int | None = None,
        start: Start = Child,
        following: Following[Order] | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.home = home
        self._start, self._following, self._port_given = start, following, port
        self._order = order
        self.port = port or self.job.spec.gateway.port
        self.status = jobs.read_status(home)
        self._cores = jobs.cores(home, cores or look())
        self.steps: dict[str, _Step] = {}
        self.servers: dict[str, _Server] = {}
        self.gateway: _Server | None = None
        self._unwanted: dict[str, float] = {}  # servers without traffic, and since when
        self.counting = self._new_counting()
        self._written, self._written_at = self.status, 0.0
        self.budget = self.status.budget
        self._spent_at = 0.0
        self._routing: Any = None
        self._counts: api.TraceCounts | None = None  # as written down
        self._serves = False  # for ever, whatever fails
        self._held: _Hold | None = None
        self._anew = False  # a person said resume, or the manifest changed: no wait
        self._strong: strong.Failing | None = None  # the strong endpoint, as the gateway meets it
        self._strong_at = 0.0  # when the gateway was asked last
        self._told: Mapping[str, api.Trouble] = {}  # troubles that an event has said, by their sentence
        self._edited = False  # the manifest, since the last look
        self._frozen: tuple[int, Path, Mapping[str, Any], api.Job] | None = None  # what the running trial goes by

    @property
    def document(self) -> Mapping[str, Any]:
        return self._order.declared.document

    @property
    def job(self) -> api.Job:
        return self._order.declared.job

    # ------------------------------------------------------------ the loop
    def run(self, on_look: Callable[[Engine, api.Plan], None], serve: bool, stop: Callable[[], bool]) -> api.Plan:
        """Until the loop is over or a step fails for good (with `serve` for ever), or `stop` says so."""
        self._serves = serve
        self._leave_out_the_time_away()
        jobs.write_json(self.home.job, self.document)
        self._say_where()
        try:
            while True:
                os.utime(self.home.run)
                self._follow()
                world = self.observe()
                plan = self._with_news(world, reconcile.plan(world))
                self._keep_decision(world, plan)
                self.apply(plan)
                on_look(self, plan)
                if stop() or (not serve and (plan.failure or (plan.finished and self._quiet()))):
                    return plan
                if plan.again_after:
                    time.sleep(TICK)
        finally:
            self.close()

    def _say_where(self) -> None:
        where = {"pid": os.getpid(), "gateway": f"http://127.0.0.1:{self.port}/v1"}
        file = self._order.file
        jobs.write_json(self.home.run, where | ({"manifest": str(file.resolve())} if file else {}))

    def _follow(self) -> None:
        """Take up an edit of the manifest: what runs goes on as a job in a cluster does."""
        order = self._following.look() if self._following else None
        if order is None or order.declared.document["spec"] == self.document["spec"]:
            return
        before, self._order = self._order, replace(order, declared=jobs.with_generation(order.declared, self.home))
        jobs.write_json(self.home.job, self.document)
        self._anew = True
        self._edited = True
        if self._frozen and self.status.candidate:
            self._follow_frozen(*self._frozen[:3])
        if order.of_gateway != before.of_gateway:
            self.port = self._port_given or self.job.spec.gateway.port
            self._say_where()
            if self.gateway is not None:
                self._replace(self.gateway)
        if self.job.spec.weak.engine != before.declared.job.spec.weak.engine:
            for server in self.servers.values():
                self._replace(server)
        if self._new_counting().what != self.counting.what:
            self.counting = self._new_counting()

    def _follow_frozen(self, number: int, path: Path, kept: Mapping[str, Any]) -> None:
        """The running trial goes by its own manifest; a watcher that reads another part of it begins anew."""
        document = followed(kept, self.document)
        if document["spec"] != kept["spec"]:
            for name in [name for name, step in self.steps.items() if step.spec.keeps_running]:
                self.steps.pop(name).child.stop(PATIENCE)
        jobs.write_json(path, document)
        self._frozen = (number, path, document, api.parse_job(document))

    def _replace(self, server: _Server) -> None:
        """By one that reads the manifest anew; it finishes its answers first."""
        server.child.ask_to_stop()
        server.ready, server.replaced, server.message = False, True, "it starts anew after an edit of the manifest."

    def _with_news(self, world: api.World, plan: api.Plan) -> api.Plan:
        """Each trouble is said once, when it comes, and once when it is over; a failure that is waited out is one."""
        troubles = {trouble.message: trouble for trouble in world.troubles or ()}
        came = [api.Event("Warning", t.reason, t.message) for t in troubles.values() if t.message not in self._told]
        reasons = {t.reason for t in troubles.values()}
        over = [
            api.Event("Normal", api.REASON_AS_EXPECTED, f"over: {t.message}")
            for t in self._told.values()
            if t.reason not in reasons
        ]
        self._told, events = troubles, (*self._edits(world), *plan.events, *came, *over, *self._failure(plan))
        self._edited = False
        self._anew = self._anew or any(action.verb == "resume" for action in world.actions)
        return replace(plan, events=events)

    def _edits(self, world: api.World) -> Iterator[api.Event]:
        if self._edited:
            message = f"the manifest was edited; generation {self.job.generation} holds."
            yield api.Event("Normal", "ManifestChanged", f"{message} {reconcile.edits_that_wait(world)}".rstrip())

    def _failure(self, plan: api.Plan) -> Iterator[api.Event]:
        """What ends the run is told as it ends; what is waited out is a trouble of the next look."""
        if plan.failure and not self._serves:
            reason = next(c.reason for c in plan.status.conditions if c.type == api.ROUND_PROGRESSING)
            yield api.Event("Warning", reason, plan.failure.message)

    def _leave_out_the_time_away(self) -> None:
        """While no engine ran nobody was answered: no part of the deadline of a canary step, nor of the watch."""
        trial = self.status.candidate
        if trial is None or trial.stage == "Preparing" or not self.home.run.exists():
            return
        last_look = max(self.home.run.stat().st_mtime, trial.step_since)
        away = trial.away + max(0.0, time.time() - last_look)
        self.status = replace(self.status, candidate=replace(trial, away=away))
        jobs.write_status(self.home, self.status)

    def _quiet(self) -> bool:
        return self.gateway is not None and self.gateway.ready

    # ------------------------------------------------------------ observe
    def observe(self) -> api.World:
        self._look_at_servers()
        self._look_at_strong()
        self._end_late_steps()
        trial = self.status.candidate
        self._freeze(trial)
        return api.World(
            now=time.time(),
            job=self.job,
            status=self.status,
            store=self.home.store.as_uri(),
            calls=str(self.home.calls),
            has_explanations=self._order.facts.has_explanations,
            evaluator=evaluator_digest(self.job.spec.feedback.evaluator),
            steps={name: self._step_state(step) for name, step in self.steps.items()},
            servers={digest: self._server_state(server) for digest, server in self.servers.items()},
            gateway=self._server_state(self.gateway) if self.gateway else api.ServerState(False),
            report=self._report(trial),
            live=self._live(trial),
            traces=self._traces(trial),
            budget=self._budget(),
            actions=jobs.read_actions(self.home, self.status.last_action),
            frozen=self._frozen[3] if trial and self._frozen else None,
            waiting=waiting(self._frozen[2], self.document) if trial and self._frozen else (),
            troubles=tuple(self._troubles()),
        )

    def _troubles(self) -> Iterator[api.Trouble]:
        for server in self.servers.values():
            if server.trouble:
                yield api.Trouble(api.REASON_SERVER_FAILS, server.trouble)
        if fails := strong.trouble(self.job, {strong.USERS: self._strong} if self._strong else {}, here=True):
            yield fails
        if self._following and self._following.problem:
            message = f"the edited manifest cannot be followed, the one before it holds: {self._following.problem}"
            yield api.Trouble(api.REASON_MANIFEST_INVALID, message)
        if self._held and not self._held.begun_anew:
            states = [self._step_state(self.steps[name]) for name in self._held.steps if name in self.steps]
            reason = next((state.reason for state in states if state.reason), api.REASON_STEP_FAILED)
            yield api.Trouble(reason, self._held_message(self._held))

    def _freeze(self, trial: api.Trial | None) -> None:
        """The manifest of a trial that begins is kept; one that runs goes by its own after an edit and a restart."""
        if trial is None or (self._frozen and self._frozen[0] == trial.number):
            return
        path = self.home.files / f"r{trial.number}-job.json"
        begins = self.status.candidate is None or self.status.candidate.number != trial.number
        kept = None if begins else jobs.read_json(path)
        document = followed(kept, self.document) if kept else self.document
        jobs.write_json(path, document)
        self._frozen = (trial.number, path, document, api.parse_job(document))

    def _end_late_steps(self) -> None:
        """As the kubelet ends a pod: asked first, then killed. What cannot be killed holds up no look."""
        for step in self.steps.values():
            if (late := step.late()) >= 0 and not step.overran:
                step.overran = True
                step.child.ask_to_stop()
            elif late > PATIENCE:
                step.child.kill()

    def _step_state(self, step: _Step) -> api.StepState:
        code = step.child.code()
        if code is None and step.overran:
            message = "it ran for as long as training.stepDeadlineSeconds allows and is asked to end"
            return api.StepState("Running", attempts=step.attempts, message=message)
        if step.overran and code:
            message = rounds.overran(step.allowed or 0, f"{step.child.log}")
            return api.StepState("Failed", EXIT_FAILED, step.attempts, message, reason=api.REASON_STEP_DEADLINE)
        if code is None:
            said = self._pace_of_live(step.spec.name) if step.spec.keeps_running else self.progress(step.spec.name)
            return api.StepState("Running", attempts=step.attempts, message=said)
        if code == 0 and not step.spec.keeps_running:
            manifest = jobs.read_json(self._artifact(step.spec) / MANIFEST)
            if manifest is None:
                return api.StepState("Failed", EXIT_FAILED, step.attempts, f"it left no {MANIFEST} at {step.spec.out}")
            return api.StepState("Succeeded", 0, step.attempts, "", manifest["metrics"], manifest["digest"])
        if code < 0:
            message = f"it was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}"
            return api.StepState("Failed", EXIT_RETRY, step.attempts, message)
        return api.StepState("Failed", code, step.attempts, step.child.last_words())

    def _artifact(self, spec: api.StepSpec) -> Path:
        return local_path(spec.out)

    def progress(self, name: str) -> str:
        seen = jobs.read_json(self.home.progress / f"{name}.json")
        return how_far(seen) if seen and seen["total"] else ""

    def _pace_of_live(self, name: str) -> str:
        """A watcher of live answers has no end of its own: time left is that until the next look of the gate."""
        seen, trial = jobs.read_json(self.home.progress / f"{name}.json"), self.status.candidate
        if not seen or not seen["rate"] or trial is None or trial.stage != "Canary" or self._frozen is None:
            return ""
        step = step_of(self._frozen[3].spec.canary, trial)
        missing = max(0, answers_of_look(step, trial) - seen["done"]) if step else 0
        return pace(seen["rate"], "answers", missing / seen["rate"])

    def _server_state(self, server: _Server) -> api.ServerState:
        return api.ServerState(server.ready, f"http://127.0.0.1:{server.port}/v1", server.digest, server.message)

    def _report(self, trial: api.Trial | None) -> EvaluationReport | None:
        if trial is None or trial.stage != "Preparing" or "evaluate" not in trial.done:
            return None
        data = jobs.read_json(self.home.store / "runs" / f"r{trial.number}" / "evaluate" / "report.json")
        return load_report(data) if data else None

    def _live(self, trial: api.Trial | None) -> LiveReport | None:
        if trial is None or trial.stage == "Preparing":
            return None
        data = jobs.read_json(self.home.store / "runs" / f"r{trial.number}" / f"live-{trial.step}.json")
        return load_live_report(data) if data else None

    def _traces(self, trial: api.Trial | None) -> api.TraceCounts:
        """Often only while a round may wait for them."""
        waiting = trial is None and self.job.spec.rounds.trigger.new_traces > 0
        return self.counting.look(COUNT_OFTEN if waiting else COUNT_SELDOM, self.status.traces_since)

    def _new_counting(self) -> Counting:
        spec = self.job.spec
        return Counting(
            self.home.store.as_uri(), spec.traces.retention_days, spec.feedback.evaluator, spec.data.held_out,
            redaction=spec.collaboration.redaction,
        )  # fmt: skip

    def _budget(self) -> api.Budget:
        """From the book of paid calls, read every other second."""
        if time.monotonic() - self._spent_at < 2.0 and self._spent_at:
            return self.budget
        with suppress(StepError):  # another process writes it just now: the next look sees it
            self.budget = jobs.read_budget(self.home, self.status)
        self._spent_at = time.monotonic()
        return self.budget

    # ------------------------------------------------------------ apply
    def apply(self, plan: api.Plan) -> None:
        """Routing before servers end, status before events: each order is safe to be cut anywhere."""
        self._apply_routing(plan.routing)
        self._apply_gateway()
        self._apply_servers(plan)
        self._freeze(plan.status.candidate)
        self._apply_status(plan.status)
        self._apply_counts()
        for event in plan.events:
            jobs.append_event(self.home, event, time.time())
        self._apply_steps(plan)

    def _keep_decision(self, world: api.World, plan: api.Plan) -> None:
        """Before the status says it: a kill in between decides, and writes, anew."""
        if decision := decision_of(world, plan, (self._frozen[2] if self._frozen else self.document)["spec"]):
            name, content = decision
            jobs.write_json(self.home.store / "runs" / name, content)

    def _apply_status(self, status: api.Status) -> None:
        """A transition is written at once; a condition that only says something else may wait a second."""
        moved = replace(status, conditions=()) != replace(self._written, conditions=())
        waited = time.monotonic() - self._written_at > STATUS_EVERY
        self.status = status
        if moved or (waited and status != self._written):
            jobs.write_status(self.home, status)
            self._written, self._written_at = status, time.monotonic()

    def _apply_counts(self) -> None:
        """For `cowest status`, as the status of a job in a cluster has them; nothing before the first count."""
        counts = self.counting.counts
        if counts != self._counts and (self.counting.counted or counts.reason):
            jobs.write_json(self.home.traces, story.trace_counts(counts))
            self._counts = counts

    def _apply_routing(self, routing: Routing) -> None:
        content = dump(routing)
        if content == self._routing:
            return
        before = jobs.read_json(self.home.routing) or {"version": 0}
        if {**before, "version": 0} != content:
            jobs.write_json(self.home.routing, dump(replace(routing, version=int(before["version"]) + 1)))
        self._routing = content

    def _apply_gateway(self) -> None:
        if self.gateway is not None:
            return
        wait_for_port(self.port)
        self.gateway = _Server(self._start_gateway(), self.port)

    def _start_gateway(self) -> Child:
        command = self._python(
            "cowest_serving.app", "--routing", self.home.routing, "--job", self.home.job,
            "--store", self.home.store.as_uri(), "--spool", self.home.spool, "--port", self.port,
            *(("--workers", workers) if (workers := self.job.spec.gateway.workers) > 1 else ()),
            *(("--book", self.home.calls) if self.job.spec.strong.limits_live_answers else ()),
        )  # fmt: skip
        keys = self._order.client_keys or os.environ.get(CLIENT_KEYS)
        names = self._order.client_names or os.environ.get(CLIENT_NAMES)
        more = {CLIENT_KEYS: keys, CLIENT_NAMES: names, FALLBACK_KEYS: self._order.fallback_keys}
        of_strong = {name: key for name, key in self._order.keys.items() if not is_evaluator_key(name)}
        environment = {**self._environment(), **of_strong, **{name: value for name, value in more.items() if value}}
        return self._start("gateway", command, environment, self.home.logs / "gateway.log")

    def _apply_servers(self, plan: api.Plan) -> None:
        wanted = {server.digest: server for server in plan.servers}
        for digest in [d for d in self.servers if d not in wanted and self._drained(d)]:
            self.servers.pop(digest).child.stop(PATIENCE)
            self._unwanted.pop(digest)
        for digest, spec in wanted.items():
            self._unwanted.pop(digest, None)
            if digest not in self.servers:
                port, threads = free_port(), self._server_threads()
                self.servers[digest] = _Server(self._start_weak(spec, port, threads), port, threads=threads)

    def _drained(self, digest: str) -> bool:
        """No traffic for long enough: the gateway has taken up the routing and its drafts are done."""
        return time.monotonic() - self._unwanted.setdefault(digest, time.monotonic()) > DRAIN

    def _start_weak(self, spec: api.ServerSpec, port: int, threads: int) -> Child:
        log = self.home.logs / f"weak-{spec.digest.removeprefix('sha256:')[:12]}.log"
        return self._start("weak", self._weak_command(spec, port), self._environment(threads), log)

    def _weak_command(self, spec: api.ServerSpec, port: int) -> list[str]:
        if self.job.spec.weak.engine != "vLLM":
            return self._python("cowest_serving.weak_server", "--model", spec.model, "--port", port, "--name", "weak")
        # As in training: no sampling defaults of the model's folder, and no thinking aloud.
        return ["vllm", "serve", str(local_path(spec.model)), "--port", str(port), "--host", "127.0.0.1",
                "--served-model-name", "weak", "--generation-config", "vllm",
                "--default-chat-template-kwargs", NO_THOUGHTS]  # fmt: skip

    def _apply_steps(self, plan: api.Plan) -> None:
        if plan.failure and self._serves:
            self._hold_on()
            return
        if self._held and self._held.steps != tuple(spec.name for spec in plan.steps):
            self._held = None  # it went well, or its trial is over
        wanted = {spec.name: spec for spec in plan.steps}
        for name in [n for n, step in self.steps.items() if wanted.get(n) != step.spec]:
            self.steps.pop(name).child.stop(PATIENCE)
            self._spent_at = 0.0
        for name, spec in wanted.items():
            known = self.steps.get(name)
            if known is None:
                self.steps[name] = _Step(spec, self._start_step(spec), self._allowed())
            elif known.child.code() is not None and (spec.keeps_running or self._worth_another(known)):
                self._retry(known)

    def _hold_on(self) -> None:
        """What has failed stays as it is, so that each look says why nothing goes on; then it is begun anew."""
        now, names = time.time(), tuple(self.steps)
        if self._held is None or self._held.steps != names:
            self._held = _Hold(names, now + FIRST_HOLD)
            self._anew = False
        elif self._held.begun_anew:
            times = self._held.times + 1
            self._held = _Hold(names, now + min(FIRST_HOLD * 2.0**times, LONGEST_HOLD), times)
            self._anew = False
        elif now >= self._held.until or self._anew:
            self._held.begun_anew, self._anew = True, False
            for name in names:
                self.steps.pop(name).child.stop(PATIENCE)

    def _held_message(self, held: _Hold) -> str:
        said = "; ".join(
            f"step {name}: {self._step_state(self.steps[name]).message}" for name in held.steps if name in self.steps
        )
        when = time.strftime("%H:%M:%S", time.localtime(held.until))
        return f"{said.rstrip('.')}. Again at {when}, after an edit of the manifest, or with `cowest resume`."

    def _worth_another(self, step: _Step) -> bool:
        state = self._step_state(step)
        return state.phase == "Failed" and state.code == EXIT_RETRY and step.attempts < reconcile.RETRIES

    def _retry(self, step: _Step) -> None:
        if step.again_at is None:
            step.again_at = time.monotonic() + 2.0 ** min(step.attempts, 6)
        elif time.monotonic() >= step.again_at:
            step.child, step.allowed, step.began = self._start_step(step.spec), self._allowed(), time.monotonic()
            step.attempts += 1
            step.again_at, step.overran = None, False

    def _allowed(self) -> int | None:
        """As declared now, like what else is said of where steps run: no matter by which manifest the trial goes."""
        return api.parse_pods(self.document["spec"]["training"]).step_deadline_seconds

    def _start_step(self, spec: api.StepSpec) -> Child:
        job = self._frozen[1] if self._frozen else self.home.job
        command = self._python(spec.module, "--job", job, "--out", spec.out)
        for flag, value in spec.args:
            command += [flag, value]
        for flag, content in spec.files:
            path = self.home.files / f"{spec.name}{flag}.json"
            jobs.write_json(path, content)
            command += [flag, str(path)]
        progress = self.home.progress / f"{spec.name}.json"
        progress.unlink(missing_ok=True)  # that of a start before: this one begins, or goes on, further back
        command += ["--progress", str(progress)]
        log = self.home.logs / f"{spec.name}.log"
        environment = {**self._environment(self._free_threads()), **(self._order.keys if spec.calls_strong else {})}
        return self._start(spec.name, command, {**environment, "COWEST_STEP": spec.name}, log, nice=5)

    # ------------------------------------------------------------ servers
    def _look_at_servers(self) -> None:
        if self.gateway is not None:
            self._look_at(self.gateway, "gateway", self._start_gateway)
        specs = {s.digest: s for s in self._known_models()}
        for digest, server in self.servers.items():
            spec = specs.get(digest)
            if spec is not None:
                again = partial(self._start_weak, spec, server.port, server.threads)
                self._look_at(server, "weak-model server", again)
                if server.ready and server.digest and server.digest != digest:
                    server.ready, server.message = False, f"it serves {server.digest}, wanted {digest}"

    def _look_at_strong(self) -> None:
        """How the strong endpoint does for users, in the gateway's own word; a step that it fails ends with its own."""
        if self.gateway is None or not self.gateway.ready or time.monotonic() - self._strong_at < READINESS_EVERY:
            return
        answer = get_json(f"http://127.0.0.1:{self.gateway.port}/readyz") or {}
        self._strong = strong.seen(self.job.spec.strong.endpoint, answer.get("strong"), self._strong)
        self._strong_at = time.monotonic()

    def _known_models(self) -> tuple[api.ServerSpec, ...]:
        trial = self.status.candidate
        pairs = [self.status.stable, trial.pair if trial else None, self.status.previous]
        return tuple(api.ServerSpec(p.weak_digest, p.weak_uri) for p in pairs if p)

    def _look_at(self, server: _Server, what: str, start: Callable[[], Child]) -> None:
        code = server.child.code()
        if code is not None and server.replaced:
            server.port = self.port if what == "gateway" else server.port
            server.child, server.replaced = start(), False
        elif server.replaced:
            return
        elif code is not None:
            self._restart(server, what, code, start)
        elif not server.ready and time.monotonic() >= server.look_at:
            server.look_at = time.monotonic() + 0.25
            base = f"http://127.0.0.1:{server.port}"
            vllm = what != "gateway" and self.job.spec.weak.engine == "vLLM"
            if get_json(base + ("/health" if vllm else "/readyz")) is not None:
                models = get_json(base + "/v1/models") or {}
                server.digest = str((models.get("data") or [{}])[0].get("digest", "")) if what != "gateway" else ""
                server.ready, server.message, server.trouble, server.since = True, "", "", time.monotonic()

    def _restart(self, server: _Server, what: str, code: int, start: Callable[[], Child]) -> None:
        """Nothing goes without the gateway; a weak model that will not run is for the canary's deadline to judge."""
        if server.ready and time.monotonic() - server.since > STEADY:
            server.restarts = 0
        server.ready = False
        server.message = f"the {what} ended with code {code}: {server.child.last_words()}"
        server.trouble = f"{server.message} (log: {server.child.log})"
        never_ready = not server.since and (code == EXIT_BAD_INPUT or server.restarts >= MAX_RESTARTS)
        if what == "gateway" and never_ready:
            raise StepError(server.trouble, EXIT_BAD_INPUT if code == EXIT_BAD_INPUT else EXIT_FAILED)
        if server.again_at is None:
            server.again_at = time.monotonic() + min(2.0**server.restarts, LONGEST_WAIT)
        elif time.monotonic() >= server.again_at:
            server.child = start()
            server.restarts += 1
            server.again_at = None

    # ------------------------------------------------------------ helpers
    def _python(self, module: str, *arguments: object) -> list[str]:
        return [sys.executable, "-P", "-m", module, *(str(a) for a in arguments)]

    def _environment(self, threads: int = 1) -> dict[str, str]:
        """Of the person's own environment all but the keys: each child is given those that it needs."""
        kept = (k for k in os.environ if not k.startswith("COWEST_SECRET_") and not is_evaluator_key(k))
        own = {name: os.environ[name] for name in kept}
        for key in (STRONG_KEYS, CLIENT_KEYS, FALLBACK_KEYS):
            own.pop(key, None)
        own.setdefault(THREADS, str(threads))
        own.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        own.setdefault("TOKENIZERS_PARALLELISM", "false")
        own["PYTHONUNBUFFERED"] = "1"
        own["COWEST_JOB"] = self.job.name  # in log lines
        return own

    def _server_threads(self) -> int:
        """A quarter each: stable and candidate together leave half to the step that runs beside them."""
        return max(1, self._cores // 4)

    def _free_threads(self) -> int:
        """What the servers leave to a step; one about to end does not count, since a rerun would not find it."""
        wanted = [server for digest, server in self.servers.items() if digest not in self._unwanted]
        return max(1, self._cores - sum(server.threads for server in wanted))

    def close(self) -> None:
        """End the children in order: steps, the gateway (it drains), the models it asks; then the last status.

        A disk that is full keeps nobody from draining: the gateway still has records to write, and room may come.
        """
        with ExitStack() as last:
            last.callback(jobs.write_status, self.home, self.status)
            children = [s.child for s in self.steps.values()]
            for child in children:
                child.ask_to_stop()
            for child in children:
                child.stop(PATIENCE)
            if self.gateway is not None:
                self.gateway.child.stop(GATEWAY_PATIENCE)
            for server in self.servers.values():
                server.child.ask_to_stop()
            for server in self.servers.values():
                server.child.stop(PATIENCE)


def wait_for_port(port: int) -> None:
    """The gateway of a run that was just killed may still be draining. Raises `StepError` when nobody gives it up."""
    deadline = time.monotonic() + PATIENCE
    while not port_is_free(port):
        if time.monotonic() > deadline:
            raise StepError(
                f"port {port} is in use: the gateway cannot listen there. Stop what uses it, or give another"
                " port with --port or gateway.port.",
                EXIT_BAD_INPUT,
            )
        time.sleep(TICK)


def estimates(job: api.Job, facts: Facts) -> tuple[rounds.Estimate, ...]:
    """What the baseline and one tuned round may cost at most."""
    sizes: Mapping[str, Any] = {
        "rows": facts.rows, "held_out": facts.held_out, "query_chars": facts.query_chars, "labelled": facts.labelled,
    }  # fmt: skip
    return rounds.estimate(job, **sizes, baseline=True), rounds.estimate(job, **sizes, baseline=False)
