"""A server process that is told to stop before it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def told_at_the_start(command: Sequence[str]) -> int:
    """The exit code of a process that gets SIGTERM once it takes it. It cannot write to its log until then, so it
    comes no further than its first line, if it has one. One that does not end is killed."""
    log, end = os.pipe()
    os.set_blocking(end, False)
    try:
        while True:
            os.write(end, b"\n")
    except BlockingIOError:
        os.set_blocking(end, True)
    process = subprocess.Popen(command, stderr=end)
    os.close(end)
    killer = threading.Timer(60, process.kill)
    try:
        deadline = time.monotonic() + 60
        while not _takes_sigterm(process.pid):
            assert process.poll() is None and time.monotonic() < deadline, "it never came so far"
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        killer.start()
        with os.fdopen(log, "rb") as said:
            said.read()
        return process.wait()
    finally:
        killer.cancel()
        process.kill()


def _takes_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
