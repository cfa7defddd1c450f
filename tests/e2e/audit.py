"""What a suite leaves of the cluster's audit log, for `make rbac`: a file a suite, begun anew with it.

A suite that is interrupted and goes on adds to its file. Where the cluster's log rotates, its earlier parts count too.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO

FOLDER = Path(__file__).resolve().parents[2] / "build" / "audit"


def begin(is_faults: bool, anew: bool, folder: Path = FOLDER) -> Path:
    """The file of the suite, of `make e2e` or `make e2e-faults`, without what it left before unless it goes on."""
    left = folder / ("faults.log" if is_faults else "e2e.log")
    if anew or not is_faults:
        left.unlink(missing_ok=True)
    return left


def leave(log: Path, since: datetime, left: Path) -> None:
    """Adds what service accounts have asked of this cluster's API server since then."""
    left.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened, left.open("a", encoding="utf-8") as out:
        for lines in _parts(log, since, opened):
            for line in lines:
                if '"system:serviceaccount:' not in line or not line.endswith("\n"):
                    continue
                event = json.loads(line)
                if datetime.fromisoformat(event["requestReceivedTimestamp"]) >= since:
                    out.write(line)


def _parts(log: Path, since: datetime, opened: ExitStack) -> Iterator[IO[str]]:
    """The log's earlier parts that may reach so far, oldest first, then itself.

    kube-apiserver names them `audit-2026-11-27T11-52-54.123.log`, with `.gz` where it packs them. What rotates while
    they are read is read: the current part is opened before they are listed.
    """
    current = opened.enter_context(log.open(encoding="utf-8"))
    for part in sorted(log.parent.glob(f"{log.stem}-*{log.suffix}*")):
        stat = part.stat()
        if stat.st_mtime < since.timestamp() or os.path.samestat(stat, os.fstat(current.fileno())):
            continue
        text = io.BytesIO(gzip.decompress(part.read_bytes())) if part.suffix == ".gz" else part.open("rb")
        yield opened.enter_context(io.TextIOWrapper(text, encoding="utf-8"))
    yield current
