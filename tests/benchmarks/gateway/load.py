"""Stub endpoints and windows of load, both by the load generator, on a core of their own."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.benchmarks.gateway.processes import Tree, Unavailable
from tests.benchmarks.gateway.tools import loadgen
from tests.ports import free_port

# One processor in use, as there is one core: without it Go's scheduler spins on a second.
_ONE = {"GOMAXPROCS": "1"}


class Stubs:
    """Endpoints by name, each with its delay, and an S3 that counts its puts; on one core."""

    def __init__(self, log: Path, core: int, **delays: str) -> None:
        self.ports = {name: free_port() for name in delays}
        self.s3 = free_port()
        listen = [f"{port},{delays[name]}".rstrip(",") for name, port in self.ports.items()]
        flags = [part for value in listen for part in ("-listen", value)]
        self.tree = Tree([loadgen(), "stub", "-s3", str(self.s3), *flags], log, core, _ONE)
        for port in self.ports.values():
            self.tree.ready(f"http://127.0.0.1:{port}/stats", 10)
        self.tree.pin()

    def base(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def v1(self, name: str) -> str:
        return self.base(name) + "/v1"

    def puts(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.s3}/stats", timeout=5) as answer:
            return int(json.loads(answer.read())["puts"])

    def calls(self, name: str) -> int:
        with urllib.request.urlopen(f"{self.base(name)}/stats", timeout=5) as answer:
            return int(json.loads(answer.read())["calls"])


@dataclass(frozen=True)
class Ask:
    """What one measured call is: one address, or several asked one after the other."""

    targets: tuple[str, ...]  # URL, or URL|model
    headers: Mapping[str, str] = field(default_factory=dict)


def chat(base: str, model: str = "") -> str:
    """`base` ends in /v1."""
    return f"{base}/chat/completions" + (f"|{model}" if model else "")


class Window:
    """One run of the load generator: connections open and warm on entry, and until the exit."""

    def __init__(self, ask: Ask, core: int, *options: str, connections: int = 1) -> None:
        flags = [part for target in ask.targets for part in ("-target", target)]
        flags += [part for name, value in ask.headers.items() for part in ("-header", f"{name}: {value}")]
        command = [loadgen(), "load", "-wait", "-connections", str(connections), *flags, *options]
        self._child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ONE},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )

    def __enter__(self) -> Self:
        self._line()
        return self

    def run(self) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(b"\n")
        self._child.stdin.flush()
        return self._line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(60)
        self._child.stdout.close()

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise Unavailable("the load generator ended early")
        return dict(json.loads(line))


def measure(ask: Ask, core: int, options: Sequence[str], connections: int = 1) -> dict[str, Any]:
    with Window(ask, core, *options, connections=connections) as window:
        return window.run()
