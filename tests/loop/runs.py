"""`cowest run` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COWEST = [sys.executable, "-P", "-m", "cowest_cli"]  # -P: no module of the current folder


@contextmanager
def running(job: Path, *flags: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """What it says goes to run.log beside the manifest. Ended with the block."""
    with (job.parent / "run.log").open("ab") as log:
        command = [*COWEST, "run", "-f", str(job), *flags]
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(30)
