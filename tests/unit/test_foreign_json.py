"""What orjson does not read and common clients do."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from cowest_serving.foreign_json import read_json, read_part, whole_characters

HALF, OTHER = "\ud83d", "\ude00"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b'{"a": [1, "b", null]}', {"a": [1, "b", None]}, id="plain JSON"),
        pytest.param(b"[NaN, Infinity, -Infinity, 1e999, -0.5]", [None, None, None, None, -0.5], id="no numbers"),
        pytest.param(rb'{"\ud83d": ["a\ud83db"]}', {"\ufffd": ["a\ufffdb"]}, id="half a character"),
        pytest.param(rb'["\ud83d\ude00", NaN]', ["\U0001f600", None], id="a whole one beside no number"),
        pytest.param(rb'["\\ud83d", NaN]', [r"\ud83d", None], id="a backslash"),
        pytest.param(b"[" + b"1" * 40 + b", NaN, 12]", [1.1111111111111112e39, None, 12], id="a number beyond 64 bits"),
    ],
)
def test_what_is_read_can_be_written_again(data: bytes, expected: Any) -> None:
    assert read_json(data) == expected
    assert orjson.loads(orjson.dumps(read_json(data))) == expected


@pytest.mark.parametrize("data", [b"", b"{", b"<html>", b"[1,]", b'"\xff"', b"[" * 5000 + b"NaN" + b"]" * 5000])
def test_what_is_no_json_is_refused_as_are_levels_beyond_count(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_json(data)


def test_halves_that_come_in_two_parts_are_one_character() -> None:
    parts = [read_part(rb'"a\ud83d"'), read_part(rb'"\ude00b"')]
    assert whole_characters("".join(parts)) == "a\U0001f600b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\U0001f600b", "a\U0001f600b"),
        (HALF + "b", "\ufffdb"),
        ("a" + HALF, "a\ufffd"),
        (OTHER + HALF, "\ufffd\ufffd"),
    ],
    ids=["whole", "at the start", "at the end", "in the wrong order"],
)
def test_a_half_without_its_other_is_marked(text: str, expected: str) -> None:
    assert whole_characters(text) == expected
