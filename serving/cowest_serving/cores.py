"""How many cores are worth using: those that affinity and container allow, less what other work keeps busy.

Model code asks for its threads, the embedded engine for what it shares out among its processes; no torch here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

THREADS = "OMP_NUM_THREADS"  # a person's own word on it
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cores:
    """In a container `machine` and `load` are its host's."""

    machine: int
    allowed: int
    load: float  # processes that ran or waited to, a mean over the last minute

    @property
    def free(self) -> int:
        """Allowed cores that nobody keeps busy; at least one."""
        return max(1, min(self.allowed, round(self.machine - self.load)))

    @property
    def for_long(self) -> int:
        """Cores to plan hours of work with: the free ones, but no fewer than half of those allowed, nor than two.

        The load of a minute may still count a build that has just ended; a job that keeps this number would be slow
        for good.
        """
        return max(self.free, -(-self.allowed // 2), min(2, self.allowed))


def look(cgroup: Path = CGROUP) -> Cores:
    """Whole cores that this process may keep busy at once, by its affinity and its container's quota."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    allowed = max(1, min(affinity, int(quota(cgroup) or affinity)))
    return Cores(machine, allowed, os.getloadavg()[0])


def free_threads() -> int:
    """Threads worth using now: OMP_NUM_THREADS, else the free cores.

    Two torch threads on one free core are several times slower than one.
    """
    if (wanted := os.environ.get(THREADS, "")).isdigit() and int(wanted):
        return int(wanted)
    return look().free


def quota(cgroup: Path = CGROUP) -> float | None:
    """The CPU quota of the container in cores, None without one."""
    for read in (_quota_v2, _quota_v1):
        try:
            return read(cgroup)
        except (OSError, ValueError):
            continue
    return None


def _quota_v2(cgroup: Path) -> float | None:
    most, period = (cgroup / "cpu.max").read_text().split()
    return None if most == "max" else int(most) / int(period)


def _quota_v1(cgroup: Path) -> float | None:
    most = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
    return None if most < 0 else most / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
