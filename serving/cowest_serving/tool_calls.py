"""The calls of tools that a streamed answer consists of, put together from its chunks for the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cowest_serving.foreign_json import read_part, whole_characters

_IN_PIECES = ("arguments", "input")  # of a function, of a custom tool


class ToolCalls:
    """Of the first choice."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, Any]] = {}

    def note(self, payload: bytes) -> None:
        """What a chunk says of them. Who reads the chunk itself says what is wrong with it."""
        if b'"tool_calls"' not in payload:
            return
        with suppress(ValueError, AttributeError, TypeError, KeyError):
            for choice in read_part(payload)["choices"]:
                if choice.get("index", 0) == 0:
                    for piece in choice["delta"].get("tool_calls") or ():
                        _add(self._calls.setdefault(piece.get("index", 0), {}), piece)

    @property
    def text(self) -> str | None:
        """As JSON, as a whole answer has them; None where there is none."""
        if not self._calls:
            return None
        calls = [_joined(call) for call in self._calls.values()]
        return whole_characters(json.dumps(calls, ensure_ascii=False, separators=(",", ":")))


def _add(call: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for name, value in piece.items():
        if isinstance(value, dict):
            _add(call.setdefault(name, {}), value)
        elif name in _IN_PIECES and isinstance(value, str):
            call.setdefault(name, []).append(value)
        elif value is not None and name != "index":
            call[name] = value


def _joined(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _joined(value) if isinstance(value, dict) else "".join(value) if name in _IN_PIECES else value
        for name, value in call.items()
    }
