"""What a durable record costs: CPU of its path, and how long an answer waits for the disk.

    python tests/benchmarks/spool_bench.py [--rows 10000] [--rate 500] [--folder FOLDER]

Rows of 2 KB at a fixed rate, as a gateway adds them: through the disk and, for comparison, through memory alone.
Then the event loop's own share, without a disk's time. CPU is that of the whole process, shipping included. The last
line is one JSON object: {"durable_cpu_us", "memory_cpu_us", "loop_us", "wait_p50_ms", "wait_p99_ms",
"rows_per_commit", "puts_per_1000"}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from cowest_serving.spool import LogFile
from cowest_serving.traces import TRACE_SCHEMA, SpooledTraces, TraceSink, TraceWriter, segment, table_of

MODELS = 0.25  # seconds that the models take for an answer


class Counted(LogFile):
    commits = 0

    def sync(self) -> None:
        Counted.commits += 1
        super().sync()


def row(i: int) -> dict[str, Any]:
    text = f"question {i}: " + "why is the freight late and what does it cost? " * 8
    given = {"trace_id": f"{i:032x}", "time": datetime.now(UTC), "routing_version": 7, "arm": "stable"}
    digests = {name: "sha256:" + "0" * 64 for name in ("pair_digest", "weak_digest", "prompts_digest", "user_hash")}
    content = {"query": text, "messages": json.dumps([{"role": "user", "content": text}]), "draft": text}
    return given | digests | content | {"answer": text * 2, "draft_ms": 50.1, "answer_ms": 200.2, "status": "ok"}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def at_rate(sink: TraceSink, rows: int, rate: float) -> tuple[float, list[float]]:
    """CPU-microseconds a row above those of the clock that drives it, and the waits in ms."""
    waits: list[float] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(i: int) -> None:
        begun = time.perf_counter()
        kept = sink.keep(row(i), others=int(rate * MODELS) + len(tasks))
        if kept is not None:
            await kept
        waits.append((time.perf_counter() - begun) * 1000)

    async def drive(work: Any) -> float:
        begun, used = time.monotonic(), cpu()
        for i in range(rows):
            await asyncio.sleep(max(0.0, begun + i / rate - time.monotonic()))
            task = asyncio.create_task(work(i))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return cpu() - used

    async def nothing(i: int) -> None:
        row(i)

    idle = await drive(nothing)
    await sink.start()
    begun = cpu()
    await drive(one)
    await sink.aclose()
    return (cpu() - begun - idle) / rows * 1e6, waits


async def on_loop(sink: SpooledTraces, rows: int) -> float:
    """Microseconds of the event loop for one `keep`, best of five."""
    given = [row(i) for i in range(rows)]
    await sink.start()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        kept = [sink.keep(each) for each in given]
        best = min(best, (time.perf_counter() - begun) / rows * 1e6)
        await asyncio.gather(*(future for future in kept if future))
    await sink.aclose()
    return best


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, default=10_000)
    flags.add_argument("--rate", type=float, default=500)
    flags.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        segment(table_of([orjson.dumps(row(0))], TRACE_SCHEMA))  # the first one loads what Parquet needs
        memory, _ = asyncio.run(at_rate(TraceWriter(str(folder / "m"), "m"), options.rows, options.rate))
        sink = SpooledTraces(str(folder / "d"), "d", folder / "spool", open_file=Counted)
        durable, waits = asyncio.run(at_rate(sink, options.rows, options.rate))
        commits = Counted.commits
        puts = len(list((folder / "d").rglob("*.parquet")))
        loop = asyncio.run(on_loop(SpooledTraces(str(folder / "l"), "l", folder / "spool"), 500))
    cuts = statistics.quantiles(waits, n=100)
    found = {
        "durable_cpu_us": durable,
        "memory_cpu_us": memory,
        "loop_us": loop,
        "wait_p50_ms": cuts[49],
        "wait_p99_ms": cuts[98],
        "rows_per_commit": options.rows / commits,
        "puts_per_1000": puts / options.rows * 1000,
    }
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
