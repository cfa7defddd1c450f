"""What a call may take, before the endpoint has counted it."""

from __future__ import annotations

from typing import Any

import pytest

from cowest_serving.estimates import IMAGE_TOKENS, likely_input_tokens, most_output_tokens


def asked(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        pytest.param("x" * 300, 104, id="three letters a token"),
        pytest.param("\u6f22" * 300, 304, id="a token a character where a character has three bytes"),
        pytest.param("", 4, id="nothing, and the frame of a message"),
        pytest.param("\ud800", 5, id="half a character"),
        pytest.param(None, 5, id="a call of a tool"),
        pytest.param([{"type": "text", "text": "x" * 300}], 113, id="text in parts"),
        pytest.param([{"type": "image_url", "image_url": {"url": "data:" + "x" * 9000}}], 4 + IMAGE_TOKENS,
                     id="a picture by its number, not by its bytes"),
    ],
)  # fmt: skip
def test_input_is_guessed_generously(content: Any, tokens: int) -> None:
    assert likely_input_tokens(asked(content), None) == tokens


def test_what_a_model_reads_beside_the_messages_counts() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 300}}]
    assert likely_input_tokens(asked(""), {"tools": tools, "seed": 7}) > 104 + likely_input_tokens(asked(""), None)


@pytest.mark.parametrize(
    ("limit", "extra", "most"),
    [
        (None, None, None),
        (5, None, 5),
        (None, {"max_tokens": 5}, 5),
        (None, {"max_completion_tokens": 7, "n": 3}, 21),
        (5, {"n": 2}, 10),
        (None, {"max_tokens": "many", "n": None}, None),
        (None, {"n": 4}, None),
    ],
)
def test_output_is_bounded_by_what_is_asked_for(limit: int | None, extra: Any, most: int | None) -> None:
    assert most_output_tokens(limit, extra) == most
