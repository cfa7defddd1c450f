"""50 flips of the weights under load: does any call fail, does any go to an arm that the weights no longer say?

    python -m tests.benchmarks.gateway.flip [--flips 50] [--rate 2000]

The routing file is replaced atomically, as the embedded engine does it, while each call is of a user of its own. Both
arms are `StrongAlone` (one upstream call, so that two cores give a high rate), with records on the disk. The arm of an
answer must be the one that the user's hash and the weights in force when it was sent demand; calls under way at a flip
or sent within 50 ms after it are excepted. `flip_ms` of a flip is how long after it the last call was sent that the
old weights still decided, `first_answer_ms` how long until the first answer that only the new ones explain. The rate
is the one asked for, or half of what the gateway can do where that is less. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cowest_serving.contract import Arm, Routing
from cowest_serving.routing import choose_arm
from tests.benchmarks.gateway import targets
from tests.benchmarks.gateway.bench import GATEWAY, LOAD, quantile, stopping, warm
from tests.benchmarks.gateway.load import Stubs, Window, measure

CONNECTIONS = 64
WEIGHTS = (0, 5, 10, 25, 50, 75, 90, 95, 100)
EXCEPTED_NS = 50_000_000
Z = 3.2905  # of the 99.9 % interval, both sides


@dataclass(frozen=True)
class Flip:
    """A replacement of the routing file, and when it began and was done (ns)."""

    routing: Routing
    begun: int
    done: int


@dataclass(frozen=True)
class Call:
    user: str
    sent: int
    answered: int
    arm: str
    fault: str


def routing_of(stubs: Stubs, version: int, candidate_percent: int) -> Routing:
    arms = (("candidate", candidate_percent, "b"), ("stable", 100 - candidate_percent, "a"))
    strong = stubs.v1("plain")
    return Routing(
        version,
        "bench",
        tuple(Arm(name, weight, "StrongAlone", targets.pair_of(strong, digit)) for name, weight, digit in arms),
    )


def flip_now(path: Path, routing: Routing) -> Flip:
    begun = time.time_ns()
    targets.write_routing(path, routing)
    return Flip(routing, begun, time.time_ns())


def flips(path: Path, first: Routing, count: int, between: float, seed: int) -> list[Flip]:
    """The first one is the routing that the gateway began with."""
    chance, found = random.Random(seed), [Flip(first, 0, 0)]
    for _ in range(count):
        time.sleep(between * chance.uniform(0.8, 1.2))
        before = found[-1].routing
        weight = chance.choice([w for w in WEIGHTS if w != before.arms[0].weight_percent])
        candidate, stable = before.arms
        arms = (replace(candidate, weight_percent=weight), replace(stable, weight_percent=100 - weight))
        found.append(flip_now(path, replace(before, version=before.version + 1, arms=arms)))
    return found


def read_calls(path: Path) -> list[Call]:
    found = []
    for line in path.read_text("utf-8").splitlines():
        number, _, sent, answered, arm, fault = line.split("\t")
        found.append(Call(f"user-{number}", int(sent), int(answered), arm, fault))
    return sorted(found, key=lambda call: call.sent)


def arm_of(routing: Routing, user: str) -> str:
    return choose_arm(routing, user).name


def judge(calls: list[Call], made: list[Flip]) -> dict[str, Any]:
    """Pure: what the calls say of the flips."""
    failed = [call for call in calls if call.fault]
    judged = wrong = candidates = 0
    expected = variance = 0.0
    late = [0.0] * len(made)
    first: dict[int, float] = {}
    at = 0
    for call in calls:
        while at + 1 < len(made) and made[at + 1].done <= call.sent:
            at += 1
        if call.fault:
            continue
        now = made[at]
        if at + 1 < len(made) and call.answered >= made[at + 1].begun:
            continue  # the next weights may have decided it
        if at and call.arm != arm_of(now.routing, call.user) and call.arm == arm_of(made[at - 1].routing, call.user):
            late[at] = max(late[at], (call.sent - now.done) / 1e6)
        if at and at not in first and call.arm != arm_of(made[at - 1].routing, call.user):
            first[at] = (call.answered - now.done) / 1e6
        if call.sent - now.done < EXCEPTED_NS:
            continue
        judged += 1
        wrong += call.arm != arm_of(now.routing, call.user)
        share = now.routing.arms[0].weight_percent / 100
        candidates += call.arm == "candidate"
        expected, variance = expected + share, variance + share * (1 - share)
    width = Z * math.sqrt(variance)
    return {
        "calls": len(calls),
        "failed": len(failed),
        "split_error": round(wrong / judged, 6) if judged else None,
        "flip_ms_p99": round(quantile(late[1:], 0.99), 2) if len(made) > 1 else None,
        "flip_ms_p50": round(quantile(late[1:], 0.5), 2) if len(made) > 1 else None,
        "first_answer_ms_p50": round(quantile(list(first.values()), 0.5), 2) if first else None,
        "judged": judged,
        "flips": len(made) - 1,
        "candidate_share": round(candidates / judged, 5) if judged else None,
        "share_interval": [round((expected + side * width) / max(1, judged), 5) for side in (-1, 1)],
        "share_inside": abs(candidates - expected) <= width,
    }


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--flips", type=int, default=50)
    flags.add_argument("--rate", type=float, default=2000, help="calls a second")
    flags.add_argument("--between", type=float, default=0.6, help="seconds between two flips, about")
    flags.add_argument("--workers", type=int, default=1, help="of the gateway, all on one core here")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--folder", type=Path, help="on the disk to be used; default: a temporary one")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="flip-bench-") as name:
        work = Path(name)
        stubs = Stubs(work / "stubs.log", LOAD, plain="")
        try:
            found = run(work, stubs, options)
        finally:
            stubs.tree.stop()
    print(json.dumps(found))
    return 1 if found["failed"] or not found["share_inside"] or found["split_error"] > 0.001 else 0


def run(work: Path, stubs: Stubs, options: argparse.Namespace) -> dict[str, Any]:
    place, first = targets.Place(work, stubs, GATEWAY), routing_of(stubs, 1, 50)
    made: list[Flip] = []
    with stopping(targets.cowest(place, first, "spool", "--workers", str(options.workers))) as target:
        warm(target)
        able = measure(target.plain, LOAD, ["-seconds", "3", "-users"], CONNECTIONS)
        ceiling = able["calls"] / able["seconds"]
        rate = min(options.rate, 0.5 * ceiling)
        path = next(work.glob("cowest-*")) / "routing.json"
        seconds = options.between * (options.flips + 2) * 1.05
        log = work / "calls.tsv"
        load = ["-rate", str(rate), "-seconds", str(seconds), "-users", "-log", str(log)]
        with Window(target.plain, LOAD, *load, connections=CONNECTIONS) as window:
            more = (path, first, options.flips, options.between, options.seed)
            flipping = threading.Thread(target=lambda: made.extend(flips(*more)))
            flipping.start()
            seen = window.run()
            flipping.join()
    found = judge(read_calls(log), made)
    speed = {"rate_asked": options.rate, "ceiling": round(ceiling), "rate": round(seen["calls"] / seen["seconds"])}
    return found | speed | {"p99_ms": round(seen["p99_us"] / 1000, 1), "failures": seen["kinds"]}


if __name__ == "__main__":
    sys.exit(main())
