"""What a weak-model server takes and refuses, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from cowest_serving.answering import Refusal
from cowest_serving.weak_api import COMPLETION_TOKENS, parse_chat, parse_completion

CHAT: dict[str, Any] = {"model": "weak", "messages": [{"role": "user", "content": "why?"}]}
COMPLETION: dict[str, Any] = {"model": "weak", "prompt": "why?"}


def test_a_bare_chat_request_gets_openais_defaults() -> None:
    asked = parse_chat(CHAT)
    assert (asked.n, asked.temperature, asked.top_p, asked.stop, asked.top_logprobs) == (1, 1.0, 1.0, (), None)
    assert asked.max_tokens is None and not asked.stream and len(asked.seeds) == 1
    assert parse_completion(COMPLETION).max_tokens == COMPLETION_TOKENS


def test_every_field_arrives() -> None:
    asked = parse_chat(
        CHAT
        | {"max_tokens": 5, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3, "n": 2, "stop": "x"}
        | {"logprobs": True, "top_logprobs": 4, "stream": True, "stream_options": {"include_usage": True}}
        | {"user": "u", "store": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "tools": []}
    )
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.stop) == (7, 0, 0.5, ("x",))
    assert (asked.top_logprobs, asked.stream, asked.include_usage) == (4, True, True)
    assert asked.seeds[0] == 3


def test_rows_of_near_seeds_share_no_seed() -> None:
    one, two = (parse_chat({**CHAT, "n": 8, "seed": seed}).seeds for seed in (1, 2))
    assert len({*one, *two}) == 16
    assert parse_chat({**CHAT, "n": 8, "seed": 1}).seeds == one
    assert parse_chat(CHAT).seeds != parse_chat(CHAT).seeds


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
    ids=["text", "texts", "token ids", "lists of token ids"],
)
def test_a_completion_takes_all_of_openais_prompts(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parse_completion({**COMPLETION, "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 129}, "n"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_a_bad_chat_field_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_chat({**CHAT, **change})
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_a_bad_completion_field_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_completion({**COMPLETION, **change})
    assert (caught.value.status, caught.value.param) == (400, field)
