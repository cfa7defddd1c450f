"""`cowest send`: ask the gateway the questions of a file, and give their references as late feedback.

For trying a job before real users do, and for replaying a day of questions through a canary.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cowest_cli.options import Output, spread
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, StepError

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Pace:
    """How fast, and how long."""

    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.01)] = 10.0
    limit: Annotated[int | None, typer.Option(help="Stop after this many requests.", min=1)] = None
    seconds: Annotated[float | None, typer.Option(help="Stop after this time.", min=0.0)] = None
    repeat: Annotated[bool, typer.Option("--repeat", help="Start again when the file is through.")] = False


@spread
def send(
    data: Annotated[str, typer.Option(help="JSONL or Parquet with id, query or messages, and reference.")],
    url: Annotated[str, typer.Option(help="The gateway's /v1 URL.")] = "http://127.0.0.1:8080/v1",
    *,
    pace: Pace,
    feedback: Annotated[
        Literal["reference", "none"], typer.Option(help="reference: send it after each answer; none.")
    ] = "reference",
    key_env: Annotated[
        str,
        typer.Option("--key-env", help="The environment variable with the client key, where the gateway asks for one."),
    ] = KEY_VARIABLE,
    output: Output = "text",
) -> None:
    """Send questions through the gateway at a steady rate; each row is a user of its own."""
    from cowest_training.data import read_rows

    gateway = _Gateway(url.rstrip("/"), read_key(key_env), feedback == "reference")
    rows = read_rows(data if "://" in data else Path(data).resolve().as_uri())
    asyncio.run(_send(rows, gateway, pace))
    seen = gateway.seen
    if output == "json":
        typer.echo(json.dumps(dict(seen)))
    else:
        typer.echo(", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    if gateway.refused:
        raise StepError(f"{url}: {gateway.refused} {_what_to_set(key_env)}", EXIT_BAD_INPUT)
    if not any(name.startswith("answered") for name in seen):
        counts = ", ".join(f"{name} {count}" for name, count in sorted(seen.items())) or "nothing sent"
        raise StepError(
            f"{url}: wanted answers, saw {counts}. Is it the /v1 address that `cowest status -o json` names, and does"
            " `cowest run` run?",
            EXIT_RETRY,
        )


def read_key(variable: str) -> str:
    """The client key; "" where none is set, which most gateways take. Never an argument: those show in `ps`."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise StepError(f"--key-env {variable}: wanted a client key in this environment variable, saw none. Export it.")
    return key


def _what_to_set(variable: str) -> str:
    given = (
        f"The key came from {variable}"
        if os.environ.get(variable, "").strip()
        else f"No key was sent: {variable} is not set"
    )
    return (
        f"{given}. Set {variable}, or another variable that --key-env names, to one of the keys in"
        " spec.gateway.clientKeysSecretRef."
    )


@dataclass
class _Gateway:
    """Whom to ask, with which key, and what came of it so far."""

    url: str
    key: str
    with_references: bool  # sent as feedback after each answer
    seen: Counter[str] = field(default_factory=Counter)
    refused: str = ""  # what it said of the key; nothing more is sent then

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


async def _send(rows: Sequence[Any], gateway: _Gateway, pace: Pace) -> None:
    import aiohttp

    limit = pace.limit if pace.limit or pace.repeat else len(rows)
    begun = time.monotonic()
    stop = asyncio.Event()  # Ctrl-C ends the sending; what was asked is still answered and counted
    for number_of in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number_of, stop.set)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, headers=gateway.headers) as session:
        tasks: set[asyncio.Task[None]] = set()
        number = 0
        while (
            not stop.is_set()
            and not gateway.refused
            and (limit is None or number < limit)
            and (pace.seconds is None or time.monotonic() - begun < pace.seconds)
        ):
            row = rows[number % len(rows)]
            user = f"{row.id}-{number // len(rows)}"
            task = asyncio.create_task(_one(session, gateway, row, user))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, begun + number / pace.rate - time.monotonic()))
        if tasks:
            await asyncio.gather(*tasks)


async def _one(session: Any, gateway: _Gateway, row: Any, user: str) -> None:
    import aiohttp

    seen = gateway.seen
    body = {"model": "pair", "messages": [dict(m) for m in row.messages], "user": user, "temperature": 0}
    try:
        async with session.post(f"{gateway.url}/chat/completions", json=body) as answer:
            said = await answer.text()
            request_id = answer.headers.get("x-request-id", "")
            arm = answer.headers.get("x-cowest-arm", "")
        seen[f"answered {arm}".strip() if answer.status == 200 else f"status {answer.status}"] += 1
        if answer.status in (401, 403):
            gateway.refused = gateway.refused or f"wanted answers, saw {answer.status}: {_words_of(said)}"
        if gateway.with_references and answer.status == 200:
            async with session.post(
                f"{gateway.url}/feedback", json={"request_id": request_id, "reference": row.reference}
            ) as kept:
                seen["feedback" if kept.status == 200 else f"feedback status {kept.status}"] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        seen[f"failed {type(error).__name__}"] += 1


def _words_of(body: str) -> str:
    """What an error in OpenAI's form says; of any other its first characters."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())[:200] or "(no words)"
