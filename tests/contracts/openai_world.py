"""The pair as its clients see it: the gateway's process, and a weak and a strong model that are processes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Arm, Collaboration, Pair, Routing, Strong, dump
from cowest_serving.traces import read_feedback, read_traces
from tests.ports import free_port

STUB = Path(__file__).with_name("openai_stub.py")
KEYS = ("alpha-key", "beta-key")  # of the gateway's clients
RUN = (sys.executable, "-m", "cowest_serving.app")


@dataclass(frozen=True)
class StubModel:
    """A model's process; `calls` are those since the last `forget`."""

    url: str

    def calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = get_json(f"{self.url}/calls")["calls"]
        return calls

    def bodies(self) -> list[dict[str, Any]]:
        return [call["body"] for call in self.calls()]

    def forget(self) -> None:
        request = urllib.request.Request(f"{self.url}/calls", method="DELETE")
        urllib.request.urlopen(request, timeout=10).close()


@dataclass(frozen=True)
class OpenAIWorld:
    url: str
    port: int
    weak: StubModel
    strong: StubModel
    store: Path
    log: Path
    process: subprocess.Popen[bytes]

    def strong_broken_off(self) -> int:
        """Calls that the gateway left before their end."""
        return int(get_json(f"{self.strong.url}/calls")["broken_off"])

    def traces(self, least: int = 1) -> list[dict[str, Any]]:
        """The records in the store, once there are so many."""
        return waited(lambda: read_traces(str(self.store)).to_pylist(), least)

    def feedback(self, least: int = 1) -> list[dict[str, Any]]:
        return waited(lambda: read_feedback(str(self.store)).to_pylist(), least)

    def trace_of(self, request_id: str) -> dict[str, Any]:
        return waited(lambda: [row for row in self.traces() if row["trace_id"] == request_id], 1)[0]


def waited(look: Any, least: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(rows := look()) < least:
        assert time.monotonic() < deadline, f"wanted {least} records, saw {len(rows)}"
        time.sleep(0.05)
    found: list[dict[str, Any]] = rows
    return found


@contextmanager
def openai_world(
    folder: Path,
    *,
    keys: Sequence[str] = KEYS,
    strong: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    run: Sequence[str] = RUN,
    **collaboration: Any,
) -> Iterator[OpenAIWorld]:
    """`strong` changes single settings of the strong model; `keys`: none lets everybody in."""
    with ExitStack() as stack:
        weak, big = (stack.enter_context(stub_model()) for _ in range(2))
        settings = Strong(f"{big.url}/v1", "big", (), timeout_seconds=240, max_concurrency=256, max_retries=0)
        settings = replace(settings, **(strong or {}))
        how = Collaboration("Explanation", "StrongAlone", "Fail", "StrongAlone", draft_max_tokens=64)
        spec = {"strong": dump(settings), "collaboration": dump(replace(how, **collaboration))}
        pair = Pair("sha256:weak", "file:///m", DEFAULT_PROMPTS["Explanation"], "Explanation", settings.endpoint, "big")
        arm = Arm("stable", 100, "Pair", pair, f"{weak.url}/v1")
        (folder / "job.json").write_text(json.dumps(spec | {"traces": {"contentSamplePercent": 100}}))
        (folder / "routing.json").write_text(json.dumps(dump(Routing(1, "salt", (arm,)))))
        port = free_port()
        process = stack.enter_context(started(folder, port, keys, flags, run))
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, folder / "gateway.log")
        yield OpenAIWorld(url, port, weak, big, folder / "store", folder / "gateway.log", process)


@contextmanager
def stub_model() -> Iterator[StubModel]:
    with ended(subprocess.Popen([sys.executable, str(STUB)], stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        yield StubModel(f"http://127.0.0.1:{int(process.stdout.readline())}")


@contextmanager
def started(
    folder: Path, port: int, keys: Sequence[str], flags: Sequence[str], run: Sequence[str] = RUN, **told: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`told`: more of its environment."""
    files = {"--routing": "routing.json", "--job": "job.json", "--store": "store", "--spool": "spool"}
    places = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    command = [*run, *places, "--port", str(port), *flags]
    environment = (
        os.environ | {"COWEST_CLIENT_API_KEYS": "\n".join(keys), "COWEST_STRONG_API_KEYS": "strong-key"} | told
    )
    with (folder / "gateway.log").open("wb") as log, ended(subprocess.Popen(command, env=environment, stderr=log)) as p:
        yield p


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, f"the gateway has ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"the gateway is not ready: {log.read_text()}"
        try:
            if get_json(f"{url}/readyz")["ready"]:
                return
        except OSError:  # not listening yet, or 503
            time.sleep(0.05)


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)
