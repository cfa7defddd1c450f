"""`cowest send`: ask the gateway the questions of a file, and give their references as late feedback.

For trying a job before real users do, and for replaying a day of questions through a canary.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cowest_cli.options import Output
from cowest_training.contract import EXIT_RETRY, StepError


def send(
    data: Annotated[str, typer.Option(help="JSONL or Parquet with id, query or messages, and reference.")],
    url: Annotated[str, typer.Option(help="The gateway's /v1 URL.")] = "http://127.0.0.1:8080/v1",
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.01)] = 10.0,
    limit: Annotated[int | None, typer.Option(help="Stop after this many requests.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after this time.", min=0.0)] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="Start again when the file is through.")] = False,
    feedback: Annotated[
        Literal["reference", "none"], typer.Option(help="reference: send it after each answer; none.")
    ] = "reference",
    output: Output = "text",
) -> None:
    """Send questions through the gateway at a steady rate; each row is a user of its own."""
    from cowest_training.data import read_rows

    rows = read_rows(data if "://" in data else Path(data).resolve().as_uri())
    seen = asyncio.run(_send(rows, url.rstrip("/"), rate, limit if limit or repeat else len(rows), seconds, feedback))
    if output == "json":
        typer.echo(json.dumps(dict(seen)))
    else:
        typer.echo(", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    if not any(name.startswith("answered") for name in seen):
        counts = ", ".join(f"{name} {count}" for name, count in sorted(seen.items())) or "nothing sent"
        raise StepError(
            f"{url}: wanted answers, saw {counts}. Is it the /v1 address that `cowest status -o json` names, and does"
            " `cowest run` run?",
            EXIT_RETRY,
        )


async def _send(
    rows: Sequence[Any], url: str, rate: float, limit: int | None, seconds: float | None, feedback: str
) -> Counter[str]:
    import aiohttp

    seen: Counter[str] = Counter()
    begun = time.monotonic()
    stop = asyncio.Event()  # Ctrl-C ends the sending; what was asked is still answered and counted
    for number_of in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number_of, stop.set)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks: set[asyncio.Task[None]] = set()
        number = 0
        while (
            not stop.is_set()
            and (limit is None or number < limit)
            and (seconds is None or time.monotonic() - begun < seconds)
        ):
            row = rows[number % len(rows)]
            user = f"{row.id}-{number // len(rows)}"
            task = asyncio.create_task(_one(session, url, row, user, feedback, seen))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        if tasks:
            await asyncio.gather(*tasks)
    return seen


async def _one(session: Any, url: str, row: Any, user: str, feedback: str, seen: Counter[str]) -> None:
    import aiohttp

    body = {"model": "pair", "messages": [dict(m) for m in row.messages], "user": user, "temperature": 0}
    try:
        async with session.post(f"{url}/chat/completions", json=body) as answer:
            await answer.read()
            request_id = answer.headers.get("x-request-id", "")
            arm = answer.headers.get("x-cowest-arm", "")
        seen[f"answered {arm}".strip() if answer.status == 200 else f"status {answer.status}"] += 1
        if feedback == "reference" and answer.status == 200:
            async with session.post(
                f"{url}/feedback", json={"request_id": request_id, "reference": row.reference}
            ) as said:
                seen["feedback" if said.status == 200 else f"feedback status {said.status}"] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        seen[f"failed {type(error).__name__}"] += 1
