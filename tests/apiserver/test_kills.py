"""SIGKILL after any write of the operator: the same end, nothing made twice, no step run a second time.

Between operator and API server stands a proxy that sees each write answered. It kills the operator before the answer
reaches it, or right after. A write that changes nothing is let through: a new operator says all it wants once again.

COWEST_KILL_SWEEP=100 adds a life with one kill after each of its first 100 writes; what is more than it has is skipped.
That takes half an hour.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from tests.apiserver.conftest import JOBS, ApiServer, wait_until
from tests.apiserver.playground import (
    CHILDREN,
    EVENTS,
    PATIENT,
    SERVING,
    WORKFLOWS,
    Playground,
    apply,
    decisions,
    manifest_of,
)

SWEEP = int(os.environ.get("COWEST_KILL_SWEEP", "0"))
When = Literal["before the answer", "after the answer"]
# Starts operators by fork: a fresh interpreter takes longer than the life between two kills.
FORKER = f"""{PATIENT}
import json, os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
for line in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = json.loads(line)
    log = os.open(told.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, number)
    os.environ |= told
    sys.exit(main.main())
"""

pytestmark = pytest.mark.timeout(1800)  # against what never ends: a slow machine may take its time
STILL = 180.0  # seconds in which nothing is changed: then nothing will be


# ---------------------------------------------------------------- between operator and API server
@dataclass(frozen=True)
class Write:
    method: str
    path: str
    code: int
    changes: bool  # something in the cluster
    name: str  # of what was written

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.code}"


@dataclass
class Tap:
    """Passes everything on, watches as they come. `deadly` says of each write whether the operator dies of it."""

    server: ApiServer
    deadly: Callable[[Write], bool] = lambda write: False
    when: When = "before the answer"
    victim: int | None = None  # process id
    writes: list[Write] = field(default_factory=list)
    kills: list[Write] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of `victim` and both lists

    def changes(self) -> int:
        return sum(write.changes for write in self.writes)

    def saw(self, write: Write) -> bool:
        """Does the operator die now?"""
        with self.lock:
            self.writes.append(write)
            if self.victim is None or not self.deadly(write):
                return False
            self.kills.append(write)
            return True

    def kill(self) -> None:
        if self.victim is not None:
            with suppress(ProcessLookupError):
                os.kill(self.victim, signal.SIGKILL)

    @contextmanager
    def open(self) -> Iterator[str]:
        with ThreadingHTTPServer(("127.0.0.1", 0), type("_Door", (_Handler,), {"tap": self})) as door:
            door.daemon_threads = True
            threading.Thread(target=door.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{door.server_address[1]}"
            door.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """One connection of the operator, and one to the API server."""

    protocol_version = "HTTP/1.1"
    tap: Tap
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        address = urlsplit(self.tap.server.url)
        context = ssl.create_default_context(cafile=str(self.tap.server.ca_file))
        self.upstream = http.client.HTTPSConnection(str(address.hostname), address.port, context=context, timeout=400)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the operator is dead
            super().handle()

    def finish(self) -> None:
        self.upstream.close()
        with suppress(OSError):
            super().finish()

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
        try:
            if self.command == "GET":
                self.upstream.request("GET", self.path, headers=headers)
                self._stream(self.upstream.getresponse())
            else:
                self._write(self.upstream, headers, body)
        except (OSError, http.client.HTTPException):  # the operator is dead, or the API server ends
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _stream(self, answer: http.client.HTTPResponse) -> None:
        self._head(answer, "Transfer-Encoding", "chunked")
        while data := answer.read1(65536):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        answer.close()  # `read1` leaves it open, and a connection takes no question before the last answer is closed

    def _write(self, upstream: http.client.HTTPSConnection, headers: dict[str, str], body: bytes) -> None:
        path = urlsplit(self.path).path
        before = self._version(path) if self.command == "PATCH" else ""
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        dies = "/leases" not in path and self.tap.saw(_seen(self.command, path, answer.status, data, before))
        if dies and self.tap.when == "before the answer":
            self.tap.kill()
            self.close_connection = True
            return
        self._head(answer, "Content-Length", str(len(data)))
        self.wfile.write(data)
        self.wfile.flush()
        if dies:
            self.tap.kill()

    def _version(self, path: str) -> str:
        """Of an object before it is written; "" when it is not there. The tester asks: the operator may not."""
        self.upstream.request("GET", path, headers={"Authorization": f"Bearer {self.tap.server.token}"})
        answer = self.upstream.getresponse()
        data = answer.read()
        return str(json.loads(data)["metadata"]["resourceVersion"]) if answer.status == 200 else ""

    def _head(self, answer: http.client.HTTPResponse, length: str, value: str) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header(length, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _seen(method: str, path: str, code: int, data: bytes, before: str) -> Write:
    metadata = json.loads(data).get("metadata") or {}
    return Write(
        method, path, code, code < 300 and metadata.get("resourceVersion", "") != before, metadata.get("name", "")
    )


# ---------------------------------------------------------------- lives of an operator
@dataclass
class Lives:
    """One job's life, kept by as many operators as are needed."""

    playground: Playground
    tap: Tap
    forker: subprocess.Popen[str]
    number: int = 0

    def next(self) -> int:
        assert self.forker.stdin is not None and self.forker.stdout is not None
        told = {**self.playground.environment(), "log": str(self.playground.folder / "operator-one.log")}
        with self.tap.lock:  # a write of the next one is seen when it is known who dies of it
            self.forker.stdin.write(json.dumps(told) + "\n")
            self.forker.stdin.flush()
            self.number += 1
            self.tap.victim = int(self.forker.stdout.readline())
        return self.tap.victim

    def go_on(self) -> None:
        """An operator that was killed is followed by the next one; the first one comes by this too."""
        if self.tap.victim is None or not is_alive(self.tap.victim):
            if len(self.tap.kills) < self.number:
                pytest.fail(f"the operator ended by itself: {self._log()}")
            self.next()

    def until(self, over: Callable[[], bool]) -> None:
        """Each operator lives until it is killed. It may take as long as it takes, but something must be changed."""
        seen, since = -1, time.monotonic()
        while not over():
            if (changes := self.tap.changes()) != seen:
                seen, since = changes, time.monotonic()
            if time.monotonic() - since > STILL:
                last = "\n".join(map(str, self.tap.kills[-5:]))
                pytest.fail(f"not over after {self.number} lives; the last kills:\n{last}\n{self._log()}")
            self.go_on()
            time.sleep(0.02)

    def _log(self) -> str:
        return self.playground.log()[-3000:]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def lives(playground: Playground, deadly: Callable[[Write], bool], when: When) -> Iterator[Lives]:
    tap = Tap(playground.server, deadly, when)
    command = [sys.executable, "-P", "-c", FORKER]
    environment = {**os.environ, **playground.environment()}  # the client library reads KUBECONFIG as it is imported
    with (
        tap.open() as url,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as forker,
    ):
        playground.lead(playground.server.kubeconfig(url))
        try:
            yield Lives(playground, tap, forker)
        finally:
            tap.kill()
            forker.kill()


# ---------------------------------------------------------------- what is compared
def is_over(playground: Playground) -> bool:
    return playground.condition("claims", "RoundProgressing").get("reason") == "MaxRoundsReached"


def settle(run: Lives) -> None:
    """Until the model that nobody asks any more is gone; a word of somebody wakes the operator to look.

    The write that was the last one wanted may have been the operator's last one too.
    """
    playground = run.playground

    def is_settled() -> bool:
        run.go_on()
        note = {"metadata": {"annotations": {"looked-at": str(time.monotonic())}}}
        playground.server.request("PATCH", f"{JOBS}/claims", note)
        time.sleep(0.5)
        return len(playground.items(SERVING)) == 1

    wait_until(is_settled, "the model without traffic to go", 240)


TIMES = ("startedAt", "endedAt")


def final_state(playground: Playground) -> dict[str, Any]:
    """All that must not depend on who was killed when."""
    status = playground.status("claims")
    return {
        "decisions": decisions(playground, "claims"),
        "stable": status["stable"],
        "rounds": [{k: v for k, v in each.items() if k not in TIMES} for each in status["rounds"]],
        "traffic": status["traffic"],
        "conditions": {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]},
        "children": {p.rsplit("/", 1)[1]: sorted(i["metadata"]["name"] for i in playground.items(p)) for p in CHILDREN},
    }


def submitted(tap: Tap) -> dict[str, int]:
    """How often each Workflow was made."""
    return dict(Counter(write.name for write in tap.writes if write.path.endswith("/workflows") and write.code == 201))


def said(playground: Playground) -> list[tuple[str, str]]:
    """By the operator: the API server says things of its own, of addresses that it looks after."""
    ours = (event for event in playground.items(EVENTS) if event["source"].get("component") == "cowest-operator")
    return sorted((event["reason"], event["message"]) for event in ours)


def steps_run(playground: Playground) -> list[tuple[str, str]]:
    """(step, attempt) of each Workflow."""
    labels = [each["metadata"]["labels"] for each in playground.items(WORKFLOWS)]
    return sorted((each["cowest.dev/step"], each["cowest.dev/attempt"]) for each in labels)


@dataclass(frozen=True)
class Undisturbed:
    state: dict[str, Any]
    steps: list[tuple[str, str]]
    submitted: dict[str, int]
    said: list[tuple[str, str]]
    writes: int


@pytest.fixture(scope="module")
def undisturbed(cluster: ApiServer, account: str | None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same life without a kill."""
    with (
        Playground(cluster, tmp_path_factory.mktemp("undisturbed"), account) as playground,
        lives(playground, lambda write: False, "before the answer") as run,
    ):
        apply(playground, manifest_of("claims"))
        run.until(lambda: is_over(playground))
        settle(run)
        wait_until(lambda: is_still(run), "an operator that changes nothing", 240)
        found = Undisturbed(
            final_state(playground), steps_run(playground), submitted(run.tap), said(playground), run.tap.changes()
        )
    playground.empty()
    return found


def is_still(run: Lives) -> bool:
    before = run.tap.changes()
    time.sleep(5)
    return run.tap.changes() == before


def assert_the_same(playground: Playground, run: Lives, undisturbed: Undisturbed) -> None:
    """The last operator may still be at it."""
    with suppress(pytest.fail.Exception):  # what differs says more
        wait_until(lambda: final_state(playground) == undisturbed.state, "the same state", 60)
    assert final_state(playground) == undisturbed.state
    assert steps_run(playground) == undisturbed.steps
    assert submitted(run.tap) == undisturbed.submitted, "a Workflow too many is a training run too many"
    events = said(playground)
    assert len(events) == len(set(events)), "an event twice"
    assert set(events) <= set(undisturbed.said)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("when", ["before the answer", "after the answer"])
def test_killed_after_every_single_write_of_its_life(
    playground: Playground, undisturbed: Undisturbed, when: When
) -> None:
    with lives(playground, lambda write: False, when) as run:
        run.tap.deadly = each(run.tap)
        apply(playground, manifest_of("claims"))
        run.until(lambda: is_over(playground))
        run.tap.deadly = lambda write: False
        settle(run)
        assert_the_same(playground, run, undisturbed)
        print(f"{len(run.tap.kills)} kills, {run.number} lives; {undisturbed.writes} writes undisturbed")
        assert len(run.tap.kills) > 0.5 * undisturbed.writes


def each(tap: Tap) -> Callable[[Write], bool]:
    """Dies of every write that changes something.

    Of orders that carry the time, new in each life, and of the live scorer that follows them, only once.
    """

    def deadly(write: Write) -> bool:
        lately = {kill.path for kill in tap.kills[-2:]}
        again = write.path in lately and ("/configmaps/" in write.path or write.path.endswith("-live"))
        return write.changes and not again

    return deadly


def nth(number: int, method: str, path: str) -> Callable[[Write], bool]:
    """Dies of the `number`-th write of this kind that changes something, and of no other."""
    left = [number]

    def deadly(write: Write) -> bool:
        if write.changes and re.fullmatch(method, write.method) and re.search(path, write.path):
            left[0] -= 1
            return left[0] == 0
        return False

    return deadly


ANY = (".*", "")
ONE_KILL = [
    pytest.param((1, "PATCH", "claims-routing$"), id="the first routing"),
    pytest.param((1, "POST", "/workflows$"), id="the first Workflow"),
    pytest.param((3, "PATCH", "/claims/status$"), id="the third status"),
    *(pytest.param((number, *ANY), id=f"write {number}") for number in range(1, SWEEP + 1)),
]


@pytest.mark.parametrize("kill", ONE_KILL)
def test_killed_once(playground: Playground, undisturbed: Undisturbed, kill: tuple[int, str, str]) -> None:
    with lives(playground, nth(*kill), "before the answer") as run:
        apply(playground, manifest_of("claims"))
        run.until(lambda: is_over(playground))
        settle(run)
        assert_the_same(playground, run, undisturbed)
        if kill[1:] == ANY and run.tap.changes() < kill[0]:
            pytest.skip(f"a life of {run.tap.changes()} writes, of {undisturbed.writes} without a kill")
        assert len(run.tap.kills) == 1
