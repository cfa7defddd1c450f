"""Kill writers of durable traces with SIGKILL at random moments: nothing acknowledged is lost, nothing is there twice.

    python tests/benchmarks/torture_spool.py --kills 200 [--seed 0] [--folder FOLDER]

Each writer adds rows as fast as they become durable, and tells on a pipe which are. Its files are small and are
shipped at once, so that a kill also falls between a put and the end of its file. One writer in four finds the store
away and one in four the disk full now and then. The last line is one JSON object:
{"kills", "acknowledged", "lost", "duplicated", "stored"}.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cowest_serving.spool import LogFile, Pace
from cowest_serving.traces import SpooledTraces, read_traces

PACE = Pace(max_rows=50, soon=0.02, late=0.05)
LIFE = (0.0, 0.4)  # seconds from the first durable row to the kill


@dataclass(frozen=True)
class Seen:
    kills: int
    acknowledged: int
    lost: int
    duplicated: int
    stored: int


def torture(folder: Path, kills: int, seed: int) -> Seen:
    """Writers one after the other on one spool and one store; a last one ships what they left."""
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # forks are cheap, and have no threads of the parent's
    context.set_forkserver_preload([__name__, "cowest_serving.traces"])
    acknowledged: list[str] = []
    for number in range(kills):
        store = folder / ("away" if number % 4 == 1 else "store")
        acknowledged += _one_life(context, folder, store, number, chance, is_full=number % 4 == 3)
    asyncio.run(_ship_the_rest(folder))
    stored = Counter(read_traces(str(folder / "store"))["trace_id"].to_pylist())
    return Seen(
        kills,
        len(acknowledged),
        sum(trace_id not in stored for trace_id in acknowledged),
        sum(times > 1 for times in stored.values()),
        len(stored),
    )


def _one_life(context: Any, folder: Path, store: Path, number: int, chance: random.Random, is_full: bool) -> list[str]:
    if store.name == "away":
        store.write_text("a file where the folder should be")
    told, tell = context.Pipe(duplex=False)
    writer = context.Process(target=_write, args=(folder, store, number, tell, is_full))
    writer.start()
    tell.close()
    found: list[str] = [told.recv()]
    end = time.monotonic() + chance.uniform(*LIFE)
    while (rest := end - time.monotonic()) > 0:
        if told.poll(rest):
            found.append(told.recv())
    writer.kill()
    try:
        while True:  # what it told before the kill
            found.append(told.recv())
    except (EOFError, OSError):  # the end, or half a word
        pass
    writer.join()
    return found


def _write(folder: Path, store: Path, number: int, tell: Any, is_full: bool) -> None:
    asyncio.run(_keep_writing(folder, store, number, tell, is_full))


async def _keep_writing(folder: Path, store: Path, number: int, tell: Any, is_full: bool) -> None:
    open_file = FillingUp if is_full else LogFile
    sink = SpooledTraces(str(store), f"w{number}", folder / "spool", pace=PACE, open_file=open_file)
    await sink.start()

    async def users(user: int) -> None:
        for i in range(1_000_000):
            trace_id = f"{number}-{user}-{i}"
            kept = sink.keep({"trace_id": trace_id, "time": datetime.now(UTC), "answer": "a" * random.randrange(2000)})
            if kept is not None and await kept:
                tell.send(trace_id)

    await asyncio.gather(*(users(user) for user in range(8)))


class FillingUp(LogFile):
    """A disk on which now and then only half of a write finds room."""

    def write(self, data: bytes) -> None:
        if random.random() < 0.1:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(data)


async def _ship_the_rest(folder: Path) -> None:
    sink = SpooledTraces(str(folder / "store"), "last", folder / "spool")
    await sink.start()
    await sink.aclose()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--folder", type=Path, help="on the disk to be tried; default: a temporary one")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(asdict(torture(Path(folder), options.kills, options.seed))))


if __name__ == "__main__":
    main()
