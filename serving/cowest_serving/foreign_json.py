"""JSON as some endpoints write it and common clients read it all the same: NaN, infinities, and halves of characters.

orjson takes none of these, and what it does not take would be one more call that is paid for. Where it does, it reads.
"""

from __future__ import annotations

import json
from typing import Any

import orjson


def read_json(data: bytes) -> Any:
    """So that it can be written again: no number is null, half a character U+FFFD. Raises `ValueError`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _read(data, is_part=False)


def read_part(data: bytes) -> Any:
    """Of a text that comes in parts: the other half of a character may be in the next. Raises `ValueError`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _read(data, is_part=True)


def whole_characters(text: str) -> str:
    """Halves that have met are a character; a lone one is U+FFFD, as it could not be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _read(data: bytes, is_part: bool) -> Any:
    try:
        value = json.loads(data.decode(), parse_constant=lambda _: None, parse_float=_finite, parse_int=_writable)
        return value if is_part else _mended(value)
    except RecursionError:
        raise ValueError("too many levels") from None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if abs(number) < float("inf") else None


def _writable(text: str) -> int | float | None:
    return int(text) if len(text) < 19 else _finite(text)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_mended(each) for each in value]
    if isinstance(value, dict):
        return {whole_characters(name): _mended(each) for name, each in value.items()}
    return value
