"""Log lines for a collector."""

from __future__ import annotations

import json
import logging
import sys

from cowest_serving.logs import JsonLines


def test_a_line_is_one_object_with_what_was_said_beside_the_message() -> None:
    record = logging.makeLogRecord(
        {"name": "a.b", "levelname": "WARNING", "msg": "%s\nlost", "args": ("two",), "created": 0.5, "round": 3}
    )
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonLines().format(record)
    line = json.loads(text)
    assert "\n" not in text and line.pop("error").endswith("ValueError: why")
    assert line == {
        "time": "1970-01-01T00:00:00.500+00:00", "level": "warning", "logger": "a.b", "message": "two\nlost", "round": 3
    }  # fmt: skip
