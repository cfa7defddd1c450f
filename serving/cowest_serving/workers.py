"""Several gateways on one port: `python -m cowest_serving.app --workers N`.

The process that was started only keeps N others, each with an event loop, connections, records and a listening socket
of its own (SO_REUSEPORT: the kernel spreads new connections over them). It holds all the sockets, so that what arrives
while a worker is replaced waits for the next one. Told to stop, it tells all of them, and ends with the last.

Each worker also listens on a port of this machine alone, where the others fetch its counters: /metrics of any of them
has those of all, with a label `worker`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cowest_serving.metrics import merged
from cowest_serving.shared_counts import shared_memory
from cowest_serving.wire import Wire, WireError

log = logging.getLogger(__name__)
OWN_METRICS = "own"  # query of /metrics: of this worker alone
SIBLING_SECONDS = 1.0
LOOK_EVERY = 0.1
LIVED_SECONDS = 10.0  # a worker that ends earlier is started again after a wait that grows
LONGEST_WAIT = 30.0
BAD_START = 2  # exit code of a worker that cannot start as it was told


# ---------------------------------------------------------------- a worker's view
@dataclass(frozen=True)
class Siblings:
    """Which of how many this worker is, and where the counters of each are."""

    number: int
    ports: tuple[int, ...]

    async def metrics(self, own: str) -> str:
        """Of all workers that answer. One that is being replaced has none."""
        texts = await asyncio.gather(*(self._of(number, own) for number in range(len(self.ports))))
        return merged({str(number): text for number, text in enumerate(texts) if text})

    async def _of(self, number: int, own: str) -> str:
        if number == self.number:
            return own
        wire = Wire(f"http://127.0.0.1:{self.ports[number]}")
        try:
            response = await wire.ask("GET", f"/metrics?{OWN_METRICS}", {}, b"", SIBLING_SECONDS)
        except (WireError, TimeoutError):
            return ""
        finally:
            await wire.aclose()
        return response.body.decode() if response.status == 200 else ""


@dataclass(frozen=True)
class Place:
    """What the process that keeps the workers has given this one."""

    siblings: Siblings
    sockets: tuple[socket.socket, ...]
    keeper: int  # its process
    counts: int  # the file in memory in which all workers count what clients use


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes that answer on the port, about as many as cores (default: %(default)s)",
    )  # fmt: skip
    flags.add_argument("--worker", type=_place, help=argparse.SUPPRESS)  # from `supervise` alone


def _place(text: str) -> Place:
    number, handles, ports, keeper, counts = text.split("/")
    sockets = tuple(socket.socket(fileno=int(handle)) for handle in handles.split(","))
    siblings = Siblings(int(number), tuple(int(port) for port in ports.split(",")))
    return Place(siblings, sockets, int(keeper), int(counts))


# ---------------------------------------------------------------- the process that keeps them
@dataclass
class _Worker:
    number: int
    sockets: tuple[socket.socket, ...]  # for everybody, and for its siblings
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = 0.0  # before it is started again
    ended: float = 0.0


@dataclass
class Supervisor:
    """Keeps its workers running until it is told to stop."""

    command: Sequence[str]
    workers: Sequence[_Worker]
    drain_seconds: float
    counts: int  # given to each worker
    told: int = 0  # how often to stop
    told_at: float = 0.0
    _news: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda *_: self._tell())
        code = 0
        while not self.told or any(worker.process for worker in self.workers):
            for worker in self.workers:
                code = self._look_after(worker) or code
            self._close_in_time()
            self._news.wait(LOOK_EVERY)
            self._news.clear()
        return code

    def _tell(self) -> None:
        self.told += 1
        self.told_at = self.told_at or time.monotonic()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.send_signal(signal.SIGTERM)
        self._news.set()

    def _look_after(self, worker: _Worker) -> int:
        """Start it where it does not run. The exit code of one that cannot be started: then all end."""
        if worker.process is None:
            if not self.told and time.monotonic() >= worker.ended + worker.wait:
                self._start(worker)
            return 0
        code = worker.process.poll()
        if code is None:
            return 0
        worker.process, worker.ended = None, time.monotonic()
        if self.told:
            return 0
        if code == BAD_START:
            self._tell()
            return code
        lived = worker.ended - worker.started
        worker.wait = 0.0 if lived >= LIVED_SECONDS else min(LONGEST_WAIT, worker.wait * 2 or 0.5)
        log.warning("Worker %d ended with %d after %.0f s; it is replaced.", worker.number, code, lived)
        return 0

    def _start(self, worker: _Worker) -> None:
        handles = [each.fileno() for each in worker.sockets]
        ports = [str(each.sockets[1].getsockname()[1]) for each in self.workers]
        place = f"{worker.number}/{','.join(map(str, handles))}/{','.join(ports)}/{os.getpid()}/{self.counts}"
        command = [*self.command, "--worker", place]
        worker.started = time.monotonic()
        # In a group of its own: Ctrl-C at a terminal is for this process, which tells the workers.
        worker.process = subprocess.Popen(command, pass_fds=[*handles, self.counts], process_group=0)
        if self.told:  # meanwhile, when there was no process to tell
            worker.process.send_signal(signal.SIGTERM)

    def _close_in_time(self) -> None:
        """After the drain nobody takes connections any more: they are refused, and do not wait in vain."""
        if self.told > 1 or (self.told and time.monotonic() >= self.told_at + self.drain_seconds):
            for worker in self.workers:
                for each in worker.sockets:
                    each.close()


def supervise(listeners: Sequence[socket.socket], arguments: Sequence[str], drain_seconds: float) -> int:
    command = [sys.executable, "-m", "cowest_serving.app", *arguments]
    workers = [
        _Worker(number, (listener, socket.create_server(("127.0.0.1", 0)))) for number, listener in enumerate(listeners)
    ]
    host, port = listeners[0].getsockname()[:2]
    log.info("%d workers listen on http://%s:%d (process %d keeps them)", len(workers), host, port, os.getpid())
    return Supervisor(command, workers, drain_seconds, shared_memory(len(workers))).run()


def listeners_beside(first: socket.socket, count: int) -> list[socket.socket]:
    """Sockets that share the port of `first`, which is closed: it has shown that nobody else has the port."""
    family, address = first.family, first.getsockname()
    is_dual = family == socket.AF_INET6 and not first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    first.close()
    return [
        socket.create_server(address, family=family, backlog=2048, reuse_port=True, dualstack_ipv6=is_dual)
        for _ in range(count)
    ]
