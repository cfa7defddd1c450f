"""How many tokens a call may take, before the endpoint has counted them. For reservations. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from cowest_serving.contract import Messages

IMAGE_TOKENS = 2048  # of a part that is no text, generously: its bytes say nothing of its tokens
_READ = ("tools", "functions", "response_format")  # parameters that a model reads like text


def likely_input_tokens(messages: Messages, extra: Mapping[str, Any] | None) -> int:
    """A generous guess: three bytes a token, so that scripts with a token a character are not taken too lightly."""
    given = extra or {}
    read = [
        *(_text_of(message.get("content")) for message in messages),
        *(given[name] for name in _READ if name in given),
    ]
    pictures = sum(_pictures(message.get("content")) for message in messages)
    return sum(4 + _bytes(value) // 3 for value in read) + pictures * IMAGE_TOKENS


def most_output_tokens(max_tokens: int | None, extra: Mapping[str, Any] | None) -> int | None:
    """By what a call asks for; None where nothing bounds it."""
    given = extra or {}
    limit = max_tokens or given.get("max_tokens") or given.get("max_completion_tokens")
    return _number(limit, 0) * max(1, _number(given.get("n"), 1)) or None


def likely_tokens(characters: int) -> int:
    return -(-characters // 3)


def _bytes(value: Any) -> int:
    """Of it as JSON, or nearly: escapes do not count."""
    return len(value.encode("utf-8", "replace")) + 2 if isinstance(value, str) else len(orjson.dumps(value))


def _text_of(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [part for part in content if not _is_picture(part)]


def _pictures(content: Any) -> int:
    return sum(map(_is_picture, content)) if isinstance(content, list) else 0


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and "text" not in part


def _number(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value > 0 else otherwise
