"""Kill the run with SIGKILL at random moments; the decisions must be the same and no received answer paid again.

    python tests/benchmarks/kill.py --kills 20 [--seed 0] [--ignore-idempotency]

A small job of the freight desk with a canary on live traffic runs once undisturbed and then with kills. The last line
is one JSON object: {"kills", "same_decisions", "same_stable", "repeated_paid_calls", "resent_in_flight", "bound"}.
Fails where a decision differs, a received answer was paid for again, or more than `bound` calls were sent twice.
`same_stable` is told alone: a round learns from live traces too, and when users ask what hangs on the kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cowest_cli.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "crds" / "examples" / "freight"
COWEST = [sys.executable, "-P", "-m", "cowest_cli"]  # -P: no module of the current folder
LIMIT = 3600.0  # seconds for one start of a run, on a machine that does other work too
BETWEEN_KILLS = (3.0, 45.0)  # seconds; a step of this job takes 10 to 40 with its imports ...
LIVES = 6  # ... where the undisturbed run takes so many times the longer: on a slower machine lives are longer too


def prepare(folder: Path, seed: int, port: int) -> Path:
    """The freight desk, made small: fewer rows, a shorter canary."""
    folder.mkdir(parents=True)
    maker = [sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(folder / "data"), "--seed", str(seed)]
    subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
    for name, rows in (("train", 3000), ("held_out", 250)):
        path = folder / "data" / f"{name}.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:rows]), "utf-8")
        if name == "train":  # what is not trained on is asked by users: on a slow machine a run takes half an hour
            with (folder / "data" / "live.jsonl").open("a", encoding="utf-8") as live:
                live.writelines(lines[rows:])
    document = yaml.safe_load((EXAMPLE / "job.yaml").read_text("utf-8"))
    spec = document["spec"]
    spec["strong"]["endpoint"] = f"http://127.0.0.1:{port}/v1"
    spec["gateway"] = {**spec.get("gateway", {}), "port": free_port()}
    spec["feedback"] = {**spec["feedback"], "maxQueries": 200, "minPairs": 10}
    spec["rounds"] = {"max": 1}
    spec["gate"] = {"minHeldOut": 100, "significance": "0.05"}
    spec["canary"] = {"steps": [{"weightPercent": 50, "minAnswers": 30}], "maxLossPoints": "15"}
    spec["training"]["supervised"]["epochs"] = 2
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document), "utf-8")
    return path


class Job:
    """`cowest run` with users: traffic goes on while the run comes and goes."""

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self.home = manifest.parent / ".cowest" / "freight"
        self.gateway = f"http://127.0.0.1:{yaml.safe_load(manifest.read_text())['spec']['gateway']['port']}/v1"

    def start(self) -> subprocess.Popen[bytes]:
        with (self.manifest.parent / "run.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([*COWEST, "run", "-f", str(self.manifest), "--yes"], stdout=log, stderr=log,
                                    env=environment)  # fmt: skip

    def traffic(self) -> subprocess.Popen[bytes]:
        data = self.manifest.parent / "data" / "live.jsonl"
        with (self.manifest.parent / "traffic.log").open("ab") as log:
            command = [*COWEST, "send", "--data", str(data), "--url", self.gateway, "--rate", "3"]
            return subprocess.Popen(command, stdout=log, stderr=log)  # each question once: no content twice by users

    def decisions(self) -> list[tuple[int, str, str]]:
        status = json.loads((self.home / "status.json").read_text("utf-8"))
        return [(r["number"], r["decision"], r["reason"]) for r in status["rounds"]]

    def stable(self) -> str:
        return str(json.loads((self.home / "status.json").read_text("utf-8"))["stable"]["weakDigest"])

    def paid(self) -> int:
        """Calls in the book of paid calls: each content once."""
        with sqlite3.connect(self.home / "calls.sqlite") as db:
            return int(db.execute("SELECT count(*) FROM calls").fetchone()[0])

    def finish(self) -> None:
        child = self.start()
        if child.wait(LIMIT):
            raise SystemExit(f"cowest run ended with {child.returncode}; see {self.manifest.parent / 'run.log'}")


def with_kills(job: Job, kills: int, seed: int, undisturbed: float) -> int:
    """Kill the run at random moments, wherever it is; returns how many kills met a running run.

    `undisturbed`: seconds of a run without kills. A step that is killed begins anew, so that lives much shorter than
    a step would all end in the same one.
    """
    chance, met = random.Random(seed), 0
    shortest, longest = BETWEEN_KILLS
    longest = max(longest, undisturbed / LIVES)
    for _ in range(kills):
        child = job.start()
        try:
            child.wait(chance.uniform(shortest, longest))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            met += 1
            continue
        if child.returncode:
            raise SystemExit(f"cowest run ended with {child.returncode}; see {job.manifest.parent / 'run.log'}")
        break  # the loop was over before the last kill
    return met


def stats(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=5) as answer:
        return dict(json.loads(answer.read()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-idempotency", action="store_true", help="a strong endpoint that ignores the key")
    parser.add_argument("--work", type=Path, help="work folder [default: a new one, removed at the end]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(options, (options.work or Path(temporary)).resolve())
    print(json.dumps(result))
    bounded = result["repeated_paid_calls"] == 0 and result["resent_in_flight"] <= result["bound"]
    return 0 if result["same_decisions"] and bounded else 1


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One undisturbed run, then killed ones until there were enough kills: a run may end before the last of them."""
    undisturbed = one_run(options, work / "undisturbed", 0)
    killed: list[Run] = []
    while (left := options.kills - sum(run.kills for run in killed)) > 0:
        name, seed = f"killed-{len(killed) + 1}", options.seed + len(killed)
        killed.append(one_run(options, work / name, left, seed, undisturbed.seconds))
    kills = sum(run.kills for run in killed)
    concurrency = int(yaml.safe_load(undisturbed.job.manifest.read_text())["spec"]["strong"].get("maxConcurrency", 16))
    return {
        "kills": kills,
        "seconds": [round(run.seconds) for run in (undisturbed, *killed)],
        "same_decisions": all(run.job.decisions() == undisturbed.job.decisions() for run in killed),
        "same_stable": all(run.job.stable() == undisturbed.job.stable() for run in killed),
        "paid_calls": [run.job.paid() for run in killed],
        "repeated_paid_calls": sum(run.stats["repeated_paid_calls"] for run in killed),  # charged under another key
        "resent_in_flight": sum(run.stats["repeated_idempotent"] for run in killed),  # same key again
        "bound": kills * concurrency,
    }


@dataclass
class Run:
    """A job that went to its end, and what its strong endpoint counted."""

    job: Job
    seconds: float
    kills: int
    stats: dict[str, Any]


def one_run(options: argparse.Namespace, work: Path, kills: int, seed: int = 0, undisturbed: float = 0.0) -> Run:
    port = free_port()
    flags = ["--ignore-idempotency"] if options.ignore_idempotency else []
    strong = subprocess.Popen([sys.executable, str(EXAMPLE / "strong.py"), "--port", str(port), *flags],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    job = Job(prepare(work, options.seed, port))
    traffic = job.traffic()
    try:
        begun = time.monotonic()
        met = with_kills(job, kills, seed, undisturbed)
        job.finish()
        done = Run(job, time.monotonic() - begun, met, stats(port))
    finally:
        for child in (traffic, strong):
            child.terminate()
            child.wait(10)
    print(f"{work.name}: {done.seconds:.0f} s, {done.kills} kills, {job.decisions()}", flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())
