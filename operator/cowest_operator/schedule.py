"""Cron expressions in UTC: is it one, and when is it next? Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

from cronsim import CronSim, CronSimError


@cache
def problem(expression: str) -> str:
    """What is wrong with it, in words; "" when it has a time to come."""
    try:
        return "" if next_after(expression, 0.0) else "it never comes"
    except ValueError as error:
        return str(error)


def next_after(expression: str, moment: float) -> float | None:
    """The first time after `moment` (both in epoch seconds), None when there is none. Raises `ValueError`."""
    if len(expression.split()) != 5:
        raise ValueError(f"wanted five fields, saw {len(expression.split())}")
    try:
        following = next(CronSim(expression, datetime.fromtimestamp(moment, UTC)), None)
    except CronSimError as error:
        text = str(error)
        raise ValueError(text[:1].lower() + text[1:]) from None
    return following.timestamp() if following else None
