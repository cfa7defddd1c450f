"""A process with all that it started: on one core, its CPU and memory as one number, stopped as one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "COWEST_BENCH_TREE"  # in the environment of all of a tree: also what has left its parent is found
CORES = os.sched_getaffinity(0)  # of this machine, before anything is pinned


class Unavailable(Exception):
    """A peer that cannot be measured here; says why."""


class Tree:
    def __init__(
        self, command: Sequence[str | Path], log: Path, core: int | None, env: Mapping[str, str] | None = None
    ) -> None:
        self.log, self.core = log, core
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with log.open("ab") as out:
            self.root = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {}), name: value},
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, CORES),  # starts are no part of what is measured
            )

    def pids(self) -> list[int]:
        return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and self._has(folder)]

    def _has(self, folder: Path) -> bool:
        """By its session, or by the environment: some leave the one, some write over the other."""
        try:
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
            is_ours = int(fields[2]) == self.root.pid or self._mark.encode() in (folder / "environ").read_bytes()
        except OSError:
            return False
        return is_ours and state != "Z"

    def pin(self) -> None:
        """All its threads to its core: those to come inherit it. After the start, which may use all cores."""
        if self.core is not None:
            for pid in self.pids():
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(OSError):
                        os.sched_setaffinity(int(task.name), {self.core})

    def cpu_us(self) -> float:
        """User and system time of all processes, of threads and children that have ended too."""
        total = 0.0
        for pid in self.pids():
            with suppress(OSError):
                total += time.clock_gettime((~pid << 3) | 2) * 1e6  # the process's CPU clock, by the kernel's own count
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK") * 1e6
        return total

    def rss_bytes(self) -> int:
        """What the processes have of memory for themselves, and their part of what they share."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                pss = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
                total += int(pss[1]) * 1024 if pss else 0
        return total

    def resident_bytes(self) -> int:
        """What is resident, shared or not: unlike the above it does not move with what other programs share."""
        pages = 0
        for pid in self.pids():
            with suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def sockets(self) -> int:
        count = 0
        for pid in self.pids():
            with suppress(OSError):
                for entry in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        count += os.readlink(entry).startswith("socket:")
        return count

    def pause(self) -> None:
        """What is not measured must not take CPU from what is."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def ready(self, url: str, within: float = 240, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Wait until it answers 200. Raises `Unavailable` with the end of its log."""
        request = urllib.request.Request(url, body or None, {"content-type": "application/json", **(headers or {})})
        until, seen = time.monotonic() + within, "nothing"
        while time.monotonic() < until:
            if self.root.poll() is not None:
                raise Unavailable(f"it ended with {self.root.returncode}: {self._said()}")
            try:
                with urllib.request.urlopen(request, timeout=10):
                    return
            except urllib.error.HTTPError as error:
                seen = f"{error.code} {error.read(300).decode(errors='replace')}"
            except OSError as error:
                seen = str(error)
            time.sleep(0.2)
        raise Unavailable(f"no answer within {within:.0f} s; last seen: {seen}; its log: {self._said()}")

    def _said(self) -> str:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-3:])[-500:]

    def stop(self, patience: float = 8) -> None:
        self.go_on()
        self._signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            self.root.poll()  # else it stays a zombie
            if not self.pids():
                return
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.root.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
