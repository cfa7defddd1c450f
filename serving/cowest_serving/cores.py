"""How many cores are worth using: those that affinity and container allow, less what other work keeps busy.

Model code asks for its threads, the embedded engine for what it shares out among its processes; no torch here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

THREADS = "OMP_NUM_THREADS"  # a person's own word on it
IN_POD = "KUBERNETES_SERVICE_HOST"  # is set in each
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
    allowed = max(1, min(affinity(), int(quota(cgroup) or affinity())))
    return Cores(machine, allowed, os.getloadavg()[0])


def affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_threads(cgroup: Path = CGROUP) -> int:
    """Threads worth using now: OMP_NUM_THREADS, else the limit of a pod that has one, else the free cores.

    Two torch threads on one free core are several times slower than one.
    """
    if (wanted := os.environ.get(THREADS, "")).isdigit() and int(wanted):
        return int(wanted)
    return limit_of_pod(cgroup) or look(cgroup).free


def limit_of_pod(cgroup: Path = CGROUP) -> int | None:
    """Whole cores of a pod's CPU limit; None where none is below what its node has.

    The load of the node is mostly others', who have their own part of it.
    """
    most = quota(cgroup) if IN_POD in os.environ else None
    return look(cgroup).allowed if most is not None and most < affinity() else None


def keep_to_limit(cgroup: Path = CGROUP) -> None:
    """Before torch is imported, which would start a thread for each core of the node: for all in this process."""
    if THREADS not in os.environ and (limit := limit_of_pod(cgroup)):
        os.environ[THREADS] = str(limit)


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
