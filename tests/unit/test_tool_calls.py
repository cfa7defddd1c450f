"""Calls of tools as the chunks of a stream bring them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cowest_serving.tool_calls import ToolCalls


def chunk(*pieces: Any, index: int = 0) -> bytes:
    return json.dumps({"choices": [{"index": index, "delta": {"tool_calls": list(pieces)}}]}).encode()


def text_of(*chunks: bytes) -> str | None:
    calls = ToolCalls()
    for payload in chunks:
        calls.note(payload)
    return calls.text


def test_calls_side_by_side_are_put_together_as_a_whole_answer_has_them() -> None:
    begin: dict[str, Any] = {"index": 0, "id": "a", "type": "function", "function": {"name": "w", "arguments": ""}}
    other = begin | {"index": 1, "id": "b"}
    text = text_of(
        chunk(begin),
        chunk({"index": 0, "function": {"arguments": '{"city"'}}, other),
        chunk({"index": 1, "function": {"arguments": "{}"}}, {"index": 0, "function": {"arguments": ':"x"}'}}),
    )
    assert text is not None and json.loads(text) == [
        {"id": "a", "type": "function", "function": {"name": "w", "arguments": '{"city":"x"}'}},
        {"id": "b", "type": "function", "function": {"name": "w", "arguments": "{}"}},
    ]


def test_the_input_of_a_custom_tool_is_put_together_too() -> None:
    begin = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "sql", "input": "select "}}
    text = text_of(chunk(begin), chunk({"index": 0, "custom": {"input": "1"}}))
    assert text == '[{"id":"a","type":"custom","custom":{"name":"sql","input":"select 1"}}]'


def test_halves_of_a_character_meet() -> None:
    def piece(arguments: str) -> bytes:
        return chunk({"index": 0, "function": {"arguments": arguments}})

    assert text_of(piece("\ud83e"), piece("\udd9c")) == '[{"function":{"arguments":"🦜"}}]'
    assert text_of(piece("\ud83e")) == '[{"function":{"arguments":"\ufffd"}}]'


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b'{"choices":[{"index":0,"delta":{"content":"no tool_calls"}}]}', id="none"),
        pytest.param(chunk({"index": 0, "id": "a"}, index=1), id="of another choice"),
        pytest.param(b'{"choices":[{"delta":{"tool_calls":null}}]}', id="null"),
        pytest.param(b'{"choices":[{"delta":{"tool_calls":3}}]}', id="a number"),
        pytest.param(b'{"choices":[{"delta":{"tool_calls":["x"]}}]}', id="no objects"),
        pytest.param(b'{"choices":{"tool_calls":[]}}', id="choices that are none"),
        pytest.param(b'{"tool_calls"', id="no JSON"),
    ],
)
def test_what_is_no_call_is_none(payload: bytes) -> None:
    assert text_of(payload) is None
