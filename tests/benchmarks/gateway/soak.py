"""Half of what the gateway can do, for a long while: does its memory grow, does it keep sockets or tasks?

    python -m tests.benchmarks.gateway.soak [--minutes 30]

The pair with durable records, c = 32, every tenth of the load as streams. Memory (the process's resident set) is looked
at every 5 s; its slope is that of a straight line through what was seen after minute 5 (a sixth of shorter runs).
Sockets and tasks are counted at rest, before and after the load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.gateway import targets
from tests.benchmarks.gateway.bench import CONNECTIONS, GATEWAY, LOAD, stopping, warm
from tests.benchmarks.gateway.load import Ask, Stubs, measure
from tests.benchmarks.gateway.targets import Target

EVERY = 5.0
REST = 25.0  # seconds until kept connections of both sides are closed for want of use


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def by_minute(memory: Sequence[tuple[float, float]]) -> list[float]:
    whole = {int(seconds // 60): mb for seconds, mb in memory}
    return [round(mb, 1) for _, mb in sorted(whole.items())]


def tasks(port: int) -> int | None:
    """Of the event loop, as the gateway's own metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(r"^cowest_tasks (\d+)", answer.read().decode(), re.M)
    return int(found[1]) if found else None


def at_rest(target: Target) -> dict[str, int | None]:
    time.sleep(REST)
    return {"sockets": target.tree.sockets(), "tasks": tasks(port_of(target.plain))}


def port_of(ask: Ask) -> int:
    return int(ask.targets[0].split(":")[2].split("/")[0])


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=30)
    flags.add_argument("--folder", type=Path, help="on the disk to be used; default: a temporary one")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="soak-") as name:
        work = Path(name)
        stubs = Stubs(work / "stubs.log", LOAD, paced="delay=10ms")
        try:
            found = soak(targets.Place(work, stubs, GATEWAY), options.minutes * 60)
        finally:
            stubs.tree.stop()
    print(json.dumps(found))
    return 1 if found["failed"] else 0


def soak(place: targets.Place, seconds: float) -> dict[str, Any]:
    with stopping(targets.cowest(place, targets.pair_routing(place.stubs, "paced", "paced"))) as target:
        warm(target)
        able = measure(target.plain, LOAD, ["-seconds", "4"], CONNECTIONS)
        rate = able["calls"] / able["seconds"] / 2
        before = at_rest(target)
        seen, memory = under_load(target, rate, seconds)
        after = at_rest(target)
        from_second = min(300.0, seconds / 6)
        late = [point for point in memory if point[0] >= from_second]
        return {
            "minutes": seconds / 60,
            "calls": sum(part["calls"] for part in seen),
            "failed": sum(part["failures"] for part in seen),
            "rss_mb_per_10_minutes": round(slope(late) * 600, 3),
            "before": before,
            "after": after,
            "ceiling": round(rate * 2),
            "rate": round(rate),
            "rss_mb_by_minute": by_minute(memory),
            "p99_ms": [round(part["p99_us"] / 1000, 1) for part in seen],
        }


def under_load(target: Target, rate: float, seconds: float) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """Calls and streams side by side, and (seconds, MB) all the while."""
    found: list[dict[str, Any]] = []
    plain = (["-rate", str(rate * 0.9), "-seconds", str(seconds)], CONNECTIONS)
    streams = (["-rate", str(rate * 0.1), "-seconds", str(seconds), "-stream"], 8)
    runs = [
        threading.Thread(target=lambda o=o, c=c: found.append(measure(target.plain, LOAD, o, c)))
        for o, c in (plain, streams)
    ]
    begun, memory = time.monotonic(), []
    for run in runs:
        run.start()
    while any(run.is_alive() for run in runs):
        memory.append((time.monotonic() - begun, target.tree.resident_bytes() / 1e6))
        runs[0].join(EVERY)
    return found, memory


if __name__ == "__main__":
    sys.exit(main())
