"""Child processes and the engine's patience with them."""

import http.server
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

from cowest_cli import jobs, processes
from cowest_cli.engine import Engine, Facts, _Server
from tests import world as w


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
    deadline = time.monotonic() + 10
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


# ---------------------------------------------------------------- the engine
class Ended:
    """A child that ended at once."""

    log = "weak.log"

    def code(self):
        return 1

    def last_words(self):
        return "no memory"


@pytest.fixture
def engine(tmp_path):
    home = jobs.Home(tmp_path)
    return Engine(jobs.Declared({"spec": {}}, w.JOB, tmp_path), home, Facts(1, 1, False, 1.0), None)


def test_a_server_that_dies_while_it_starts_is_started_again_with_patience(engine):
    started = []
    server = _Server(Ended(), 1)
    server.look_at = time.monotonic() + 0.25  # it was just asked whether it is ready
    for _ in range(5):
        engine._look_at(server, "weak-model server", lambda: started.append(1) or Ended())
        time.sleep(0.1)
    assert not started, "the first start comes after a second"
    assert "no memory" in server.message


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


def test_the_keys_of_clients_go_to_the_gateway_alone(engine, monkeypatch):
    monkeypatch.setenv("COWEST_CLIENT_API_KEYS", "secret")
    seen = []
    monkeypatch.setattr("cowest_cli.engine.Child", lambda _name, _command, environment, _log: seen.append(environment))
    engine._start_gateway()
    assert seen[0]["COWEST_CLIENT_API_KEYS"] == "secret"
    assert not any("secret" in engine._environment(strong).values() for strong in (True, False))
