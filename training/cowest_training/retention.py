"""Take traces and feedback away that are older than `traces.retentionDays`. What a round froze is a copy and stays."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from cowest_serving import store
from cowest_serving.contract import FEEDBACK_PREFIX, TRACES_PREFIX


def expire(store_uri: str, days: int, today: date | None = None) -> int:
    """Number of days of traces and feedback that were deleted. Raises `StoreError`.

    A segment lies in the folder of the day on which it was written; a folder of another name is nobody's to delete.
    """
    last = (today or datetime.now(UTC).date()) - timedelta(days=days)
    gone = 0
    for prefix in (TRACES_PREFIX, FEEDBACK_PREFIX):
        folder = store.join(store_uri, prefix)
        names = {file.removeprefix(folder + "/").partition("/")[0] for file in store.list_files(folder)}
        for name in sorted(names):
            if (day := _day(name)) is not None and day < last:
                store.delete(store.join(folder, name))
                gone += 1
    return gone


def _day(name: str) -> date | None:
    try:
        return date.fromisoformat(name)
    except ValueError:
        return None
