"""Child processes and the engine's patience with them."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cowest_cli import jobs, processes
from cowest_cli.engine import MAX_RESTARTS, PATIENCE, Engine, Order, _Server, _Step
from cowest_cli.preflight import Facts
from cowest_operator import api, reconcile, rounds
from cowest_serving.cores import Cores
from cowest_training.contract import StepError
from tests import world as w
from tests.manifests import edited
from tests.patience import IN_TIME
from tests.ports import free_port


def test_last_words_for_a_collector_are_said_as_a_sentence(tmp_path):
    line = '{"level": "error", "message": "the disk is full"}'
    child = processes.Child("step", ["echo", line], os.environ, tmp_path / "log")
    while child.code() is None:
        time.sleep(0.01)
    assert child.last_words() == "the disk is full"


@contextmanager
def served(body, length=None):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "length", "seen"),
    [
        pytest.param(b'{"a": 1}', None, {"a": 1}, id="JSON"),
        pytest.param(b"", None, {}, id="an empty 200 is healthy"),
        pytest.param(b"{", 99, None, id="cut off"),
    ],
)
def test_health_checks(body, length, seen, monkeypatch):
    with served(body, length) as url:
        assert processes.get_json(url) == seen


def test_health_checks_take_no_proxy():
    ask = "import sys; from cowest_cli.processes import get_json; print(get_json(sys.argv[1]))"
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    with served(b"{}") as url:
        command = [sys.executable, "-P", "-c", ask, url]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "{}"


def test_what_a_child_started_does_not_outlive_a_child_that_had_to_be_killed(tmp_path):
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    )
    child = processes.Child("stubborn", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    deadline = time.monotonic() + IN_TIME
    while child.last_words() == "it said nothing":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    grandchild = int(child.last_words())
    child.stop(0.1)
    assert child.code() == -signal.SIGKILL
    words = Path(f"/proc/{grandchild}/cmdline")  # empty for one that ended and was not waited for
    while words.exists() and words.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_port_that_somebody_listens_on_is_not_free():
    with served(b"{}") as url:
        assert not processes.port_is_free(int(url.rpartition(":")[2].strip("/")))
    assert processes.port_is_free(processes.free_port())


def test_a_port_that_cannot_be_had_is_not_called_busy():
    with pytest.raises(StepError, match=r"port 80: the gateway cannot listen there: Cannot assign .* --port"):
        processes.port_is_free(80, "203.0.113.1")  # nobody's address


# ---------------------------------------------------------------- the engine
class Ended:
    """A child that ended at once."""

    log = "weak.log"

    def __init__(self, code=1):
        self._code = code

    def code(self):
        return self._code

    def last_words(self):
        return "no memory"

    def stop(self, _patience):
        pass

    ask_to_stop = code


class Starts:
    """Remembers what an engine starts, and starts nothing."""

    def __init__(self):
        self.names, self.commands, self.environments = [], [], []

    def __call__(self, name, command, environment, _log, nice=0):
        self.names.append(name)
        self.commands.append(command)
        self.environments.append(environment)
        return Ended()


@pytest.fixture
def starts():
    return Starts()


@pytest.fixture
def engine(tmp_path, starts):
    return make(tmp_path, starts)


def make(folder, starts, cores=None, **edits):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(edited({"gateway.port": free_port(), **edits})))
    home = jobs.Home(folder / "home")
    keys = {"COWEST_STRONG_API_KEYS": "strong", "COWEST_EVALUATOR_API_KEY": "judge", "COWEST_JURY_API_KEY_1": "juror"}
    return Engine(Order(jobs.load(path), Facts(1, 1, False, 1.0), keys), home, start=starts, cores=cores)


def test_a_server_that_dies_while_it_starts_is_started_again_with_patience(engine, starts, monkeypatch):
    begun = time.monotonic()
    server = _Server(Ended(), 1)
    server.look_at = begun + 0.25  # it was just asked whether it is ready

    def look_after(seconds):
        monkeypatch.setattr(time, "monotonic", lambda: begun + seconds)
        engine._look_at(server, "weak-model server", lambda: starts("weak", [], {}, ""))

    for seconds in (0, 0.1, 0.25, 0.5, 0.99):
        look_after(seconds)
    assert not starts.names, "the first start comes after a second"
    look_after(1.01)
    assert starts.names == ["weak"]
    assert "no memory" in server.message


@pytest.mark.parametrize("code", [pytest.param(1, id="crashes"), pytest.param(2, id="refuses its model")])
def test_a_weak_server_that_never_runs_is_a_trouble_and_no_end_of_the_run(engine, starts, code):
    """The canary waits with the server's own words, and its deadline decides."""
    engine.status = w.on_trial(stage="Canary", step_since=time.time())
    engine.servers[w.CANDIDATE.weak_digest] = server = _Server(Ended(code), 1)
    for _ in range(2 * MAX_RESTARTS):
        server.again_at = time.monotonic() - 1  # its time has come
        server.child = Ended(code)
        engine._look_at_servers()
    server.child = Ended(code)
    seen = engine.observe()
    assert not seen.servers[w.CANDIDATE.weak_digest].ready
    assert [trouble.reason for trouble in seen.troubles] == [api.REASON_SERVER_FAILS]
    assert f"ended with code {code}: no memory" in seen.troubles[0].message
    plan = reconcile.plan(seen)
    assert plan.status.candidate is not None and plan.failure is None
    assert "no memory" in next(c for c in plan.status.conditions if c.type == api.ROUND_PROGRESSING).message
    late = replace(seen, now=seen.now + seen.job.spec.canary.deadline_seconds + 1)
    assert reconcile.plan(late).status.rounds[-1].decision == "RolledBack"


def test_a_gateway_that_never_runs_ends_the_run(engine):
    engine.gateway = _Server(Ended(2), 1)
    with pytest.raises(StepError, match="no memory") as raised:
        engine._look_at_servers()
    assert raised.value.code == 2


def test_a_gateway_that_did_run_is_started_again_whatever_it_said(engine):
    engine.gateway = _Server(Ended(2), 1, ready=True, since=time.monotonic())
    engine._look_at_servers()
    assert engine.gateway.again_at is not None


def test_a_full_disk_keeps_no_child_from_draining(engine):
    stopped = []

    class Draining(Ended):
        def __init__(self, name):
            self.name = name

        def stop(self, _patience):
            stopped.append(self.name)

        def ask_to_stop(self):
            pass

    engine.gateway = _Server(Draining("gateway"), 1)
    engine.servers["sha256:a"] = _Server(Draining("weak"), 2)
    engine.home.status.mkdir(parents=True)  # the last status cannot be written
    with pytest.raises(OSError):
        engine.close()
    assert stopped == ["gateway", "weak"]


def test_the_time_without_an_engine_is_no_part_of_a_canary(engine):
    engine.status = w.on_trial(stage="Canary", step_since=time.time() - 9000)
    jobs.write_json(engine.home.run, {})
    os.utime(engine.home.run, (time.time() - 3600,) * 2)
    engine._leave_out_the_time_away()
    assert engine.status.candidate.away == pytest.approx(3600, abs=5)
    assert jobs.read_status(engine.home) == engine.status
    preparing = engine.status = replace(w.SERVED, candidate=w.trial())
    engine._leave_out_the_time_away()
    assert engine.status == preparing


def hangs(engine, ignores="pass", allowed=60, **spec):
    """The first step of a trial, a real process that does nothing for a minute."""
    step = api.StepSpec("r1-collect", "x", "file:///x", **spec)
    script = f"import signal, time; {ignores}; print('up', flush=True); time.sleep(60)"
    child = processes.Child(step.name, [sys.executable, "-c", script], os.environ, engine.home.logs / "r1-collect.log")
    wait_until(lambda: child.last_words() == "up")
    engine.steps[step.name] = running = _Step(step, child, allowed)
    return running


def wait_until(condition):
    deadline = time.monotonic() + IN_TIME
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ignores", "code"),
    [
        pytest.param("pass", -signal.SIGTERM, id="when it is asked"),
        pytest.param("signal.signal(signal.SIGTERM, signal.SIG_IGN)", -signal.SIGKILL, id="by force"),
    ],
)
def test_a_step_that_runs_for_too_long_is_ended_and_fails_in_the_words_of_a_cluster(engine, ignores, code):
    engine.status = w.on_trial(number=1)
    step = hangs(engine, ignores)
    step.began -= 59
    assert engine.observe().steps["r1-collect"].phase == "Running"
    assert not step.overran, "it may still run"
    step.began -= 2
    engine.observe()
    if code == -signal.SIGKILL:
        assert "is asked to end" in engine.observe().steps["r1-collect"].message
        step.began -= PATIENCE
        engine.observe()
    wait_until(lambda: step.child.code() is not None)
    assert step.child.code() == code
    plan = reconcile.plan(engine.observe())
    assert next(c for c in plan.status.conditions if c.type == api.ROUND_PROGRESSING).reason == "StepDeadlineExceeded"
    assert plan.failure.code == 1, "as a fault of its own, so it is not tried again here"
    assert plan.failure.message == f"step r1-collect: {rounds.overran(60, str(step.child.log))}"


def test_a_step_that_is_done_as_its_time_ends_is_done(engine):
    engine.status = w.on_trial(number=1)
    step = hangs(engine, "import sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))")
    jobs.write_json(engine.home.store / "manifest.json", {"metrics": {}, "digest": "sha256:d"})
    step.spec = replace(step.spec, out=engine.home.store.as_uri())
    step.began -= 61
    engine.observe()
    wait_until(lambda: step.child.code() is not None)
    assert engine.observe().steps["r1-collect"].phase == "Succeeded"


def test_what_watches_a_canary_has_no_deadline(engine):
    engine.status = w.on_trial(stage="Canary", step_since=time.time())
    step = hangs(engine, keeps_running=True)
    step.began -= 999
    engine.observe()
    assert step.child.code() is None and not step.overran
    step.child.stop(1)


def test_each_attempt_has_the_deadline_that_the_manifest_says_as_it_begins(tmp_path, starts):
    engine = make(tmp_path, starts, **{"training.stepDeadlineSeconds": 77})
    engine.apply(reconcile.plan(replace(engine.observe(), status=w.on_trial(number=1))))
    (step,) = engine.steps.values()
    assert step.allowed == 77
    step.overran, step.again_at, step.began = True, 1.0, 0.0
    engine._retry(step)
    assert (step.attempts, step.overran, step.late() <= 0) == (2, False, True)


def test_each_child_gets_the_keys_that_it_needs_and_no_other(engine, starts, monkeypatch):
    for name in ("COWEST_CLIENT_API_KEYS", "COWEST_STRONG_API_KEYS", "COWEST_EVALUATOR_API_KEY",
                 "COWEST_JURY_API_KEY_1"):  # fmt: skip
        monkeypatch.setenv(name, "secret")
    engine._start_gateway()
    engine._start_weak(api.ServerSpec("sha256:a", "file:///m"), 1, 1)
    for asks in (True, False):
        engine._start_step(api.StepSpec("r0-x", "x", "file:///x", calls_strong=asks))
    keys = [{v for v in seen.values() if v in ("secret", "strong", "judge", "juror")} for seen in starts.environments]
    assert keys == [{"secret", "strong"}, set(), {"strong", "judge", "juror"}, set()]


def test_only_where_the_budget_limits_a_day_does_the_gateway_get_the_book(tmp_path, starts):
    for budget in ({"callsPerRound": 7}, {"tokensPerDay": 7}):
        make(tmp_path, starts, **{"strong.budget": budget})._start_gateway()
    without, with_book = starts.commands
    assert "--book" not in without
    assert with_book[with_book.index("--book") + 1].endswith("/calls.sqlite")


# ---------------------------------------------------------------- threads
STEP = api.StepSpec("r0-x", "x", "file:///x")


def threads_of(engine, starts):
    """Of a step beside no server, of two servers, and of a step beside them."""
    starts.environments.clear()
    engine._start_step(STEP)
    wanted = tuple(api.ServerSpec(digest, "file:///m") for digest in ("sha256:a", "sha256:b"))
    engine._apply_servers(replace(reconcile.plan(w.world()), servers=wanted))
    engine._start_step(STEP)
    return [seen["OMP_NUM_THREADS"] for seen in starts.environments]


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        pytest.param(Cores(2, 2, 0.0), ["2", "1", "1", "1"], id="two idle cores"),
        pytest.param(Cores(8, 8, 0.2), ["8", "2", "2", "4"], id="eight idle cores"),
        pytest.param(Cores(64, 2, 9.0), ["2", "1", "1", "1"], id="a container's quota on a large host"),
        pytest.param(Cores(8, 8, 4.1), ["4", "1", "1", "2"], id="others keep four of eight busy"),
        pytest.param(Cores(1, 1, 3.0), ["1", "1", "1", "1"], id="one busy core"),
    ],
)
def test_servers_and_steps_share_the_cores_that_are_allowed_and_free(tmp_path, starts, monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of(make(tmp_path, starts, cores), starts) == threads


@pytest.mark.parametrize(
    ("later", "threads"),
    [
        pytest.param(Cores(8, 8, 7.0), ["8", "2", "2", "4"], id="others are at work"),
        pytest.param(Cores(64, 64, 0.0), ["8", "2", "2", "4"], id="a larger machine"),
        pytest.param(Cores(64, 4, 0.0), ["4", "1", "1", "2"], id="a smaller quota"),
    ],
)
def test_a_rerun_has_the_threads_of_the_first_run_unless_fewer_cores_are_allowed(
    tmp_path, starts, monkeypatch, later, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = Cores(8, 8, 0.0)
    make(tmp_path, starts, first)
    assert threads_of(make(tmp_path, starts, later), starts) == threads
    assert threads_of(make(tmp_path, starts, first), starts) == ["8", "2", "2", "4"], "once they are allowed again"


def test_a_persons_own_number_of_threads_holds_for_each_process(tmp_path, starts, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(make(tmp_path, starts, Cores(8, 8, 0.0)), starts) == ["3"] * 4


def test_a_server_that_is_about_to_end_takes_no_threads_from_a_step(tmp_path, starts, monkeypatch):
    """Else a step that began just after a promotion had other threads than when it is run again."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = make(tmp_path, starts, Cores(8, 8, 0.0))
    threads_of(engine, starts)
    engine._apply_servers(replace(reconcile.plan(w.world()), servers=(api.ServerSpec("sha256:b", "file:///m"),)))
    assert len(engine.servers) == 2, "it finishes its answers"
    engine._start_step(STEP)
    assert starts.environments[-1]["OMP_NUM_THREADS"] == "6"


def test_vllm_samples_as_it_is_told_and_not_as_the_model_folder_says(tmp_path, starts):
    engine = make(tmp_path, starts, **{"weak.engine": "vLLM"})
    engine._start_weak(api.ServerSpec("sha256:a", "file:///my%20model"), 7, 1)
    assert starts.commands[0][:3] == ["vllm", "serve", "/my model"]
    assert starts.commands[0][-4:-1] == ["--generation-config", "vllm", "--default-chat-template-kwargs"]
    assert json.loads(starts.commands[0][-1]) == {"enable_thinking": False}
