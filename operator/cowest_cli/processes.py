"""Child processes of the embedded engine: they die with it, log to files, and are restarted with patience."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cowest_training.contract import EXIT_BAD_INPUT, StepError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: after a fork only the call is safe
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for our own children


def _die_with_parent(parent: int) -> None:
    """In the child, before exec: Linux kills it when the engine is gone, however that went."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we could ask for that
        os._exit(1)
    os.setpgid(0, 0)  # Ctrl-C in the terminal reaches the engine alone, which ends its children in order


def _message(line: str) -> str:
    """The sentence in a line that is for a collector (COWEST_LOG_FORMAT=json)."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, TypeError, KeyError):
        return line


class Child:
    """One process with a log of its own."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, nice: int = 0):
        self.name = name
        self.log = log
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._start_of_log = out.tell()
            self._process = subprocess.Popen(
                ["nice", "-n", str(nice), *command] if nice else command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                preexec_fn=partial(_die_with_parent, os.getpid()),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def code(self) -> int | None:
        return self._process.poll()

    def last_words(self) -> str:
        """The last line that it logged: steps and servers end with one sentence."""
        with self.log.open("rb") as file:
            file.seek(self._start_of_log)
            lines = file.read()[-8000:].decode("utf-8", "replace").strip().splitlines()
        return _message(lines[-1].strip()) if lines else "it said nothing"

    def ask_to_stop(self) -> None:
        if self.code() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """With what it has started itself. It may take its time, or for ever where a mount does not answer."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, patience: float) -> None:
        """SIGTERM, then SIGKILL after `patience` seconds."""
        self.ask_to_stop()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Raises `StepError` where it cannot be had though nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            why = f"port {port}: the gateway cannot listen there: {error.strerror}. Give another"
            raise StepError(f"{why} with --port or gateway.port.", EXIT_BAD_INPUT) from None
    return True


def get_json(url: str, timeout: float = 2.0) -> Any | None:
    """The JSON body of a 200, or None: used for health checks of our own children on loopback."""
    try:
        with _LOOPBACK.open(url, timeout=timeout) as answer:
            body = answer.read()
    except (OSError, http.client.HTTPException, ValueError):
        return None
    try:
        return json.loads(body)
    except ValueError:
        return {}
