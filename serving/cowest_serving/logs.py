"""How servers and steps log: plain lines, or with COWEST_LOG_FORMAT=json one JSON object a line for a log collector.

The operator tells its jobs' pods to write JSON. Each such line says the job (COWEST_JOB, as `namespace/name`), and in a
step of a round which one (COWEST_STEP, as `name-r1-dpo`); `reason` stands beside the message where a collector may
count it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

REASON_STORE_AWAY = "ObjectStoreUnavailable"  # as the operator calls it
REASON_MODEL_REFUSED, REASON_MODEL_FAILED = "ModelRefused", "ModelFailed"
REASON_BAD_START = "CannotStart"  # a setting or an address that a person must change
PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ROUND = re.compile(r"r(\d+)-")


class JsonLines(logging.Formatter):
    """`extra` of a record (round, reason, ...) are fields beside the message, as is what all lines are about."""

    def __init__(self, about: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._about = dict(about or {})

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._about,
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def is_json(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("COWEST_LOG_FORMAT") == "json"


def about(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What each line of this process is about, as its environment says."""
    job, step = environment.get("COWEST_JOB", ""), environment.get("COWEST_STEP", "")
    step = step.removeprefix(f"{job.rpartition('/')[2]}-")
    found: dict[str, Any] = {name: value for name, value in (("job", job), ("step", step)) if value}
    if number := _ROUND.match(step):
        found["round"] = int(number[1])
    return found


def log_to_stderr(level: str, environment: Mapping[str, str] = os.environ) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(about(environment)) if is_json(environment) else logging.Formatter(PLAIN))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a store that is away is told once, by the trace writer


def traced(error: BaseException) -> str:
    """What failed and where in the code, without the error's message: it may quote content."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()


def say(message: str, reason: str, level: int = logging.INFO, error: BaseException | None = None) -> None:
    """A sentence to stderr, whose reader may be gone already: for people as it is, for a collector as a line."""
    text = message.rstrip()
    if is_json():
        caught = (type(error), error, error.__traceback__) if error is not None else None
        record = logging.LogRecord("cowest", level, "", 0, text, None, caught)
        record.reason = reason
        text = JsonLines(about()).format(record)
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def complain(message: str, reason: str) -> None:
    """The last words of a process."""
    say(message, reason, logging.ERROR)
