"""The demo: the whole loop of the freight desk on one machine, with two bad candidates that must not get through.

    python crds/examples/freight/demo.py --out demo

It only uses what any user has: the manifest beside this file, `cowest run`, `cowest send`, `cowest propose` and
`cowest report`. What is particular to the demo is the data maker, the strong stand-in and the maker of bad candidates.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COWEST = [sys.executable, "-P", "-m", "cowest_cli"]  # -P: no module of the current folder
LIVE_RATE = "12"  # questions a second
PROPOSALS = {
    "offline-bad": "a colleague's model that nobody measured",
    "live-bad": "better on every held-out question",
}
LIMIT_SECONDS = 1500.0  # after this the demo has failed
# One thread for the makers: the other cores belong to the servers, and two threads on one free core crawl.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def free_port(wanted: int) -> int:
    """`wanted` when nobody listens there, otherwise any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise SystemExit("demo: no free port on 127.0.0.1")


@contextlib.contextmanager
def running(command: list[str], log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is ended with the block, and with this process."""
    out = log.open("wb") if log else None
    child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT if out else None)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT if out is None else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(40)
        if child.poll() is None:
            child.kill()
        if out:
            out.close()


def prepare(out: Path, seed: int) -> tuple[Path, int]:
    """A fresh folder with data, base model and the manifest; returns the manifest and the strong stand-in's port."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    maker = [sys.executable, HERE / "make_data.py", "--out", out / "data", "--seed", str(seed)]
    subprocess.run(maker, check=True, env=ONE_THREAD)
    strong, gateway = free_port(9190), free_port(8080)
    text = (HERE / "job.yaml").read_text("utf-8")
    text = text.replace("127.0.0.1:9190", f"127.0.0.1:{strong}").replace("port: 8080", f"port: {gateway}")
    manifest = out / "job.yaml"
    manifest.write_text(text, "utf-8")
    return manifest, strong


class Making:
    """A maker at work in the background; it is ended with this process."""

    def __init__(self, command: list[Any], log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ONE_THREAD)
        atexit.register(self.child.kill)

    def wait(self) -> None:
        if code := self.child.wait():
            raise RuntimeError(f"{self.log.stem} could not be made (code {code}); see {self.log}")


class Driver(threading.Thread):
    """What the people around the loop do: users ask, and two colleagues propose models that look good to them."""

    def __init__(self, manifest: Path, home: Path, out: Path, seed: int, run: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.manifest, self.home, self.out, self.seed, self.job = manifest, home, out, seed, run
        self.trouble: str | None = None

    def run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
        finally:
            if self.job.poll() is None:
                self.job.send_signal(signal.SIGINT)

    def _act(self) -> None:
        self._until(lambda s: self._gateway_is_ready(s), "the gateway to be ready")
        gateway = json.loads((self.home / "run.json").read_text("utf-8"))["gateway"]
        send = [*COWEST, "send", "--data", str(self.out / "data" / "live.jsonl"), "--url", gateway,
                "--rate", LIVE_RATE, "--repeat"]  # fmt: skip
        with running(send, self.out / "traffic.log"):
            status = self._until(
                lambda s: self._ends(s) > 0 and "candidate" not in s and self._loop_is_over(s), "rounds"
            )
            stable = status["stable"]["weakUri"].removeprefix("file://")
            first, second = PROPOSALS
            self._make(first, stable).wait()
            making = self._make(second, stable)  # while the first one is judged: the served model stays the same
            status = self._propose(first, status)
            making.wait()
            self._propose(second, status)

    def _make(self, kind: str, stable: str) -> Making:
        target = self.out / "proposed" / kind
        maker = [sys.executable, HERE / "bad_candidates.py", "--kind", kind, "--stable", stable,
                 "--data", self.out / "data", "--out", target, "--seed", str(self.seed)]  # fmt: skip
        return Making(maker, self.out / f"{kind}.log")

    def _propose(self, kind: str, status: dict[str, Any]) -> dict[str, Any]:
        """Propose the model of that kind; the status once it has been judged."""
        propose = [*COWEST, "propose", "-f", self.manifest, "--model", self.out / "proposed" / kind,
                   "--by", "colleague", "--why", PROPOSALS[kind]]  # fmt: skip
        subprocess.run(propose, check=True, stdout=subprocess.DEVNULL)
        before = self._ends(status)
        return self._until(lambda s: self._ends(s) > before, f"the end of {kind}")

    def _status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.home / "status.json").read_text("utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _until(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        begun = time.monotonic()
        while not wanted(status := self._status()):
            if self.job.poll() is not None:
                raise RuntimeError(f"`cowest run` ended with code {self.job.returncode} while waiting for {what}")
            if time.monotonic() - begun > LIMIT_SECONDS:
                raise RuntimeError(f"waited {LIMIT_SECONDS:.0f} s for {what}")
            time.sleep(0.3)
        return status

    @staticmethod
    def _ends(status: dict[str, Any]) -> int:
        return len(status.get("rounds", []))

    @staticmethod
    def _condition(status: dict[str, Any], name: str) -> dict[str, Any]:
        return next((c for c in status.get("conditions", []) if c["type"] == name), {})

    def _gateway_is_ready(self, status: dict[str, Any]) -> bool:
        return self._condition(status, "Ready").get("status") == "True"

    def _loop_is_over(self, status: dict[str, Any]) -> bool:
        return self._condition(status, "RoundProgressing").get("reason") in (
            "MaxRoundsReached",
            "RoundsWithoutGain",
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    out = options.out.resolve()
    manifest, strong = prepare(out, options.seed)
    home = out / ".cowest" / "freight"
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    with running([sys.executable, str(HERE / "strong.py"), "--port", str(strong)], out / "strong.log"):
        with running([*COWEST, "run", "-f", str(manifest), "--serve", "--yes"]) as run:
            driver = Driver(manifest, home, out, options.seed, run)
            driver.start()
            try:
                run.wait()
            except KeyboardInterrupt:
                return 130
        driver.join(10)
    if driver.trouble or driver.is_alive():
        print(
            f"demo: failed: {driver.trouble or 'the driver did not end'}; see the logs under {out}",
            file=sys.stderr,
        )
        return 1
    seconds = time.monotonic() - begun
    report = [*COWEST, "report", "-f", str(manifest), "--html", str(out / "report.html"), "--json",
              str(out / "report.json"), "--domain", "freight", "--seed", str(options.seed), "--seconds",
              f"{seconds:.0f}"]  # fmt: skip
    subprocess.run(report, check=True)
    return shows(out / "report.json")


def shows(path: Path) -> int:
    """What the demo must show; anything else is a failure of the demo, said plainly."""
    report = json.loads(path.read_text("utf-8"))
    arms, decisions = report["arms"], [r["decision"] for r in report["rounds"]]
    wanted = {
        "final >= sft + 0.08": arms["final"]["accuracy"] >= arms["sft"]["accuracy"] + 0.08,
        "final.low > sft.high - 0.02": arms["final"]["low"] > arms["sft"]["high"] - 0.02,
        "final above solo and weak": arms["final"]["accuracy"]
        > max(arms["solo"]["accuracy"], arms["weak"]["accuracy"]),
        "all three decisions": {"Promoted", "Refused", "RolledBack"} <= set(decisions),
    }
    for name, seen in wanted.items():
        print(f"{'yes' if seen else 'NO '}  {name}")
    print(f"{report['seconds']} s, {path.with_suffix('.html')}")
    return 0 if all(wanted.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
