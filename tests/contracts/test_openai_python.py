"""What an application can do with OpenAI's SDK for Python, against the gateway and two models, processes all three."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.contracts.openai_world import KEYS, OpenAIWorld, openai_world, waited

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"
ASKED: Any = [{"role": "user", "content": "why is the sky blue?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Step(BaseModel):
    what: str
    minutes: int


class Plan(BaseModel):
    steps: list[Step]
    is_done: bool


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIWorld]:
    with openai_world(tmp_path_factory.mktemp("openai")) as world:
        yield world


@pytest.fixture
def world(running: OpenAIWorld) -> OpenAIWorld:
    running.weak.forget()
    running.strong.forget()
    return running


@pytest.fixture
def client(world: OpenAIWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0, timeout=30) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "pair", "messages": ASKED} | options
    return client.chat.completions.create(**given)


def say(text: str, **more: str) -> dict[str, str]:
    return {"say": text, **more}


def text_of(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


def streamed_text(chunks: list[Any], index: int = 0) -> str:
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(delta or "" for delta in deltas)


# ---------------------------------------------------------------- plain answers
def test_a_plain_answer_has_all_that_the_sdk_types_say(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert text_of(answer).startswith("echo: why is the sky blue?")
    assert (answer.object, answer.choices[0].message.role, answer.choices[0].finish_reason) == (
        "chat.completion", "assistant", "stop"
    )  # fmt: skip
    assert answer.id.startswith("chatcmpl-") and isinstance(answer.created, int)
    assert (answer.system_fingerprint, answer.service_tier) == ("fp_stub", "default")
    assert answer.choices[0].message.refusal is None and answer.choices[0].logprobs is None


def test_the_weak_model_drafts_and_the_strong_one_sees_the_draft(world: OpenAIWorld, client: openai.OpenAI) -> None:
    ask(client)
    assert len(world.weak.calls()) == 1
    assert "<draft>\necho: why is the sky blue?" in world.strong.bodies()[0]["messages"][0]["content"]


def test_the_model_is_named_as_it_was_asked_for(client: openai.OpenAI) -> None:
    assert ask(client, model="any name").model == "any name"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"temperature": 0.2}, id="temperature"),
        pytest.param({"top_p": 0.9}, id="top_p"),
        pytest.param({"seed": 7}, id="seed"),
        pytest.param({"presence_penalty": 0.5, "frequency_penalty": -0.5}, id="penalties"),
        pytest.param({"logit_bias": {"50256": -100}}, id="logit_bias"),
        pytest.param({"store": True}, id="store"),
        pytest.param({"metadata": {"team": "claims"}}, id="metadata"),
        pytest.param({"reasoning_effort": "low", "verbosity": "low"}, id="reasoning effort and verbosity"),
        pytest.param({"service_tier": "flex"}, id="service_tier"),
        pytest.param({"safety_identifier": "u", "prompt_cache_key": "k"}, id="identifiers"),
        pytest.param({"prediction": {"type": "content", "content": "blue"}}, id="prediction"),
        pytest.param({"web_search_options": {}}, id="web search"),
        pytest.param({"response_format": {"type": "text"}}, id="response_format text"),
        pytest.param({"max_completion_tokens": 3}, id="max_completion_tokens"),
        pytest.param({"max_tokens": 3}, id="max_tokens"),
        pytest.param({"stop": ["sky"]}, id="stop"),
        pytest.param({"extra_body": {"top_k": 5, "min_p": 0.1}}, id="what only other endpoints know"),
    ],
)
def test_parameters_reach_the_strong_model_as_they_are(
    world: OpenAIWorld, client: openai.OpenAI, given: dict[str, Any]
) -> None:
    ask(client, **given)
    sent = world.strong.bodies()[0]
    expected = given.get("extra_body", given)
    assert {name: sent.get(name) for name in expected} == expected
    assert not expected.keys() & (world.weak.bodies()[0].keys() - {"temperature", "max_tokens"})


def test_a_stop_word_ends_the_answer(client: openai.OpenAI) -> None:
    assert text_of(ask(client, stop="sky")) == "echo: why is the "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_of_at_most_so_many_tokens_ends_for_its_length(client: openai.OpenAI, name: str) -> None:
    answer = ask(client, **{name: 2})
    assert (text_of(answer), answer.choices[0].finish_reason) == ("echo: why", "length")


def test_several_answers_come_of_one_draft(world: OpenAIWorld, client: openai.OpenAI) -> None:
    answer = ask(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.choices[2].message.content.endswith("#2")
    assert (len(world.weak.calls()), len(world.strong.calls())) == (1, 1)


def test_logprobs_are_those_of_the_strong_model(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, bytes(first.bytes)) == ("echo:", -0.5, b"echo:")
    assert [top.token for top in first.top_logprobs] == ["t0", "t1"]


def test_the_user_keeps_its_arm_and_stays_unknown_to_the_strong_model(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    answer = ask(client, user="ann@example.org")
    assert "ann@example.org" not in json.dumps(world.strong.calls())
    assert len(world.trace_of(answer._request_id)["user_hash"]) == 64


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_go_to_both_models(world: OpenAIWorld, client: openai.OpenAI, role: str) -> None:
    ask(client, messages=[{"role": role, "content": "be brief"}, *ASKED])
    for model in (world.weak, world.strong):
        assert model.bodies()[0]["messages"][0] == {"role": role, "content": "be brief"}


def test_names_and_earlier_turns_stay_as_they_are(world: OpenAIWorld, client: openai.OpenAI) -> None:
    turns = [{"role": "user", "name": "ann", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ask(client, messages=[*turns, {"role": "user", "name": "bob", "content": "why?"}])
    sent = world.strong.bodies()[0]["messages"]
    assert sent[:2] == turns and sent[2]["name"] == "bob"


def test_a_thousand_turns_stay_as_they_are(world: OpenAIWorld, client: openai.OpenAI) -> None:
    turns = [{"role": "assistant" if n % 2 else "user", "content": f"turn {n}"} for n in range(1000)]
    ask(client, messages=[*turns, *ASKED])
    assert world.strong.bodies()[0]["messages"][:-1] == turns


def test_text_in_parts_is_drafted_for(world: OpenAIWorld, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "why"}, {"type": "text", "text": "is it blue?"}]
    assert text_of(ask(client, messages=[{"role": "user", "content": parts}])).startswith("echo: why\nis it blue?")
    assert len(world.weak.calls()) == 1


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("žluťoučký kůň 你好 مرحبا 🦜👩‍👩‍👧", id="many scripts"),
        pytest.param('"quotes" \\ and \n lines \t \u2028 and {query} {draft}', id="what needs escapes"),
        pytest.param("\u0000 and \ufffd", id="zero"),
        pytest.param("x" * 300_000, id="300,000 characters"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_any_text_comes_through_unharmed(client: openai.OpenAI, text: str, stream: bool) -> None:
    answer = ask(client, messages=[{"role": "user", "content": text}], stream=stream)
    seen = streamed_text(list(answer)) if stream else text_of(answer)
    assert seen.startswith("echo: " + text)


def test_empty_content_goes_to_the_strong_model_alone(world: OpenAIWorld, client: openai.OpenAI) -> None:
    assert text_of(ask(client, messages=[{"role": "user", "content": ""}])) == "echo: "
    assert not world.weak.calls()


def test_a_refusal_is_no_content(client: openai.OpenAI) -> None:
    message = ask(client, metadata={"refuse": "I will not."}).choices[0].message
    assert (message.content, message.refusal) == (None, "I will not.")


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_why_an_answer_ended_is_what_the_strong_model_says(client: openai.OpenAI, finish: str) -> None:
    assert ask(client, metadata={"finish": finish}).choices[0].finish_reason == finish


# ---------------------------------------------------------------- usage
def test_usage_is_that_of_the_answer_with_its_details(client: openai.OpenAI) -> None:
    usage = ask(client, metadata=say("three words here")).usage
    assert (usage.completion_tokens, usage.total_tokens) == (3, usage.prompt_tokens + 3)
    assert usage.prompt_tokens_details.cached_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_both_models_each_by_itself(world: OpenAIWorld, client: openai.OpenAI, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = ask(client, metadata=say("three words here"), **options)
    usage = list(answer)[-1].usage if stream else answer.usage
    strong, weak = usage.cowest["strong"], usage.cowest["weak"]
    assert strong == {name: getattr(usage, name) for name in strong}
    assert weak["completion_tokens"] > 3 and weak["prompt_tokens"] > 5
    assert usage.cowest["total_tokens"] == strong["total_tokens"] + weak["total_tokens"]
    assert usage.prompt_tokens_details.cached_tokens == 1


def test_usage_says_that_no_weak_model_was_asked(client: openai.OpenAI) -> None:
    usage = ask(client, tools=[WEATHER]).usage
    assert usage.cowest["weak"] is None and usage.cowest["total_tokens"] == usage.total_tokens


# ---------------------------------------------------------------- streams
def test_a_stream_is_the_answer_in_pieces_with_one_id(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, metadata=say("one two three")))
    assert streamed_text(chunks) == "one two three"
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(chunk.choices for chunk in chunks), "a chunk of usage that nobody asked for"


def test_a_stream_names_the_model_as_the_strong_endpoint_does(client: openai.OpenAI) -> None:
    assert {chunk.model for chunk in ask(client, stream=True)} == {"big-2026-10-01"}


def test_a_stream_tells_the_usage_in_its_last_chunk_to_who_asks(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, metadata=say("a b c")))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


def test_several_answers_are_streamed_side_by_side(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, n=2))
    assert streamed_text(chunks, 1) == streamed_text(chunks, 0) + " #1"


def test_logprobs_are_streamed_with_their_tokens(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, logprobs=True, metadata=say("a b")))
    tokens = [c.choices[0].logprobs.content[0].token for c in chunks if c.choices and c.choices[0].logprobs]
    assert tokens == ["a", "b"]


def test_a_refusal_is_streamed(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, metadata={"refuse": "I will not."}))
    assert "".join(chunk.choices[0].delta.refusal or "" for chunk in chunks) == "I will not."


def test_the_first_words_come_while_the_rest_is_made(world: OpenAIWorld, client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, metadata=say("one two", pause="60", pause_at="2"))
    assert next(text for chunk in stream if (text := chunk.choices[0].delta.content)) == "one"
    stream.close()
    wait_for(lambda: world.strong_broken_off() == 1)


def test_the_helper_for_streams_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="pair", messages=ASKED, metadata=say("one two")) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == "one two" == final.choices[0].message.content


def test_the_helper_for_streams_gives_the_usage_to_who_asks(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(
        model="pair", messages=ASKED, metadata=say("one two"), stream_options=options
    ) as stream:
        usage = stream.get_final_completion().usage
    assert usage is not None and usage.completion_tokens == 2


def test_a_stream_that_its_reader_leaves_is_left_by_the_gateway_too(world: OpenAIWorld, client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, metadata=say("word " * 500, pause="0.05"))
    next(stream)
    stream.close()
    wait_for(lambda: world.strong_broken_off() == 1)
    assert world.trace_of(stream.response.headers["x-request-id"])["status"] == "client_gone"


def test_a_stream_that_breaks_off_raises_an_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="strong model") as caught:
        list(ask(client, stream=True, metadata={"say": "one two three", "cut": "2"}))
    assert caught.value.type == "api_error" and caught.value.code == "strong_failed"


# ---------------------------------------------------------------- tools
def test_tools_go_to_the_strong_model_alone_and_their_calls_come_back(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    answer = ask(client, tools=[WEATHER], tool_choice="auto")
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "text", "days": 7}
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not world.weak.calls()
    assert world.strong.bodies()[0]["messages"] == ASKED and world.strong.bodies()[0]["tools"] == [WEATHER]
    assert json.loads(world.trace_of(answer._request_id)["tool_calls"]) == [call.model_dump()]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        pytest.param({}, ["weather", "clock"], id="side by side"),
        pytest.param({"parallel_tool_calls": False}, ["weather"], id="one after the other"),
        pytest.param({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"], id="by name"),
        pytest.param({"tool_choice": "required"}, ["weather", "clock"], id="required"),
        pytest.param({"tool_choice": "none"}, [], id="none"),
    ],
)
def test_which_tools_are_called_is_between_the_client_and_the_strong_model(
    client: openai.OpenAI, given: dict[str, Any], called: list[str]
) -> None:
    message = ask(client, tools=[WEATHER, CLOCK], **given).choices[0].message
    assert [call.function.name for call in message.tool_calls or []] == called


def test_the_whole_conversation_with_a_tool_is_left_to_the_strong_model(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    first = ask(client, tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
    turns = [*ASKED, first.model_dump(exclude_none=True), result]
    assert text_of(ask(client, messages=turns, tools=[WEATHER])) == "echo: sunny"
    assert world.strong.bodies()[1]["messages"] == turns
    assert not world.weak.calls()


def test_a_conversation_with_tool_results_stays_whole_without_its_tools(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    ask(client, messages=turns)
    assert world.strong.bodies()[0]["messages"] == turns
    assert not world.weak.calls()


def test_tool_calls_are_streamed_piece_by_piece(client: openai.OpenAI) -> None:
    arguments: dict[int, str] = {}
    names = []
    for chunk in ask(client, stream=True, tools=[WEATHER, CLOCK]):
        for call in chunk.choices[0].delta.tool_calls or []:
            names += [call.function.name] if call.function.name else []
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    assert names == ["weather", "clock"]
    assert [json.loads(text) for text in arguments.values()] == [{"city": "text", "days": 7}, {}]


def test_the_helper_for_streams_puts_tool_calls_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="pair", messages=ASKED, tools=[WEATHER]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == {"city": "text", "days": 7}


def test_the_old_functions_are_left_to_the_strong_model_too(world: OpenAIWorld, client: openai.OpenAI) -> None:
    function = WEATHER["function"]
    ask(client, functions=[function], function_call="auto")
    assert world.strong.bodies()[0]["functions"] == [function] and not world.weak.calls()


# ---------------------------------------------------------------- structured answers
def test_json_is_asked_for_with_a_draft(world: OpenAIWorld, client: openai.OpenAI) -> None:
    assert json.loads(text_of(ask(client, response_format={"type": "json_object"}))) == {"ok": True}
    assert len(world.weak.calls()) == 1


def test_parse_gives_an_object_of_the_callers_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="pair", messages=ASKED, response_format=Plan)
    assert answer.choices[0].message.parsed == Plan(steps=[Step(what="text", minutes=7)], is_done=True)


def test_parse_gives_the_arguments_of_a_tool_as_an_object(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Step)
    message = client.chat.completions.parse(model="pair", messages=ASKED, tools=[tool]).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == Step(what="text", minutes=7)


def test_parse_tells_a_refusal(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="pair", messages=ASKED, response_format=Plan, metadata={"refuse": "No."}
    )
    assert (answer.choices[0].message.parsed, answer.choices[0].message.refusal) == (None, "No.")


def test_parse_tells_that_an_answer_was_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="pair", messages=ASKED, response_format=Plan, metadata={"finish": "length"})


def test_parse_tells_that_an_answer_was_filtered(client: openai.OpenAI) -> None:
    with pytest.raises(openai.ContentFilterFinishReasonError):
        client.chat.completions.parse(
            model="pair", messages=ASKED, response_format=Plan, metadata={"finish": "content_filter"}
        )


def test_a_structured_answer_is_parsed_from_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="pair", messages=ASKED, response_format=Plan) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Plan(steps=[Step(what="text", minutes=7)], is_done=True)


# ---------------------------------------------------------------- what is not text
@pytest.mark.parametrize(
    "part",
    [
        pytest.param({"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}, id="an image"),
        pytest.param({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}, id="audio"),
        pytest.param({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:,x"}}, id="a file"),
    ],
)
def test_parts_that_are_not_text_go_to_the_strong_model_as_they_are(
    world: OpenAIWorld, client: openai.OpenAI, part: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}]
    assert text_of(ask(client, messages=messages)) == f"echo: what is it?<{part['type']}>"
    assert world.strong.bodies()[0]["messages"] == messages
    assert not world.weak.calls()


def test_a_spoken_answer_comes_back(client: openai.OpenAI) -> None:
    message = ask(client, modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}).choices[0].message
    assert (message.content, message.audio.transcript) == (None, "hi")


# ---------------------------------------------------------------- ids, raw and streaming responses
def test_each_answer_has_a_request_id_that_its_record_carries(world: OpenAIWorld, client: openai.OpenAI) -> None:
    one, other = ask(client), ask(client)
    assert one._request_id != other._request_id
    assert world.trace_of(one._request_id)["answer"] == text_of(one)


def test_raw_responses_give_headers_and_the_answer(client: openai.OpenAI) -> None:
    while True:
        raw = client.chat.completions.with_raw_response.create(model="pair", messages=ASKED)
        assert raw.headers["x-cowest-mode"] == "Pair"
        if raw.headers.get("x-cowest-trace") == "durable":  # not while the disk is slow
            break
    assert raw.headers["content-type"] == "application/json"
    assert text_of(raw.parse()).startswith("echo:") and raw.request_id == raw.headers["x-request-id"]


def test_raw_responses_of_streams_give_headers_first(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="pair", messages=ASKED, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.request_id
    assert streamed_text(list(raw.parse())).startswith("echo:")


def test_streaming_responses_give_the_lines_of_a_stream(client: openai.OpenAI) -> None:
    lines: list[str] = []
    while ": trace durable" not in lines:  # as while the disk is slow
        create = client.chat.completions.with_streaming_response.create
        with create(model="pair", messages=ASKED, stream=True) as response:
            lines = [line for line in response.iter_lines() if line]
    assert lines[-2:] == [": trace durable", "data: [DONE]"]


def test_streaming_responses_give_a_whole_answer_too(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(model="pair", messages=ASKED) as response:
        assert json.loads(response.read())["object"] == "chat.completion"


def test_headers_and_queries_of_the_client_do_no_harm(client: openai.OpenAI) -> None:
    answer = ask(client, extra_headers={"x-team": "claims"}, extra_query={"api-version": "2026-01-01"})
    assert answer.choices


# ---------------------------------------------------------------- errors
def test_a_wrong_key_is_an_authentication_error(world: OpenAIWorld) -> None:
    with (
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        ask(client)
    assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
    assert caught.value.request_id


def test_a_bad_request_names_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=[{"role": "user", "content": 3}])
    assert (caught.value.param, caught.value.type) == ("messages[0].content", "invalid_request_error")


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        pytest.param(
            400, openai.BadRequestError,
            {"message": "too long", "type": "invalid_request_error", "param": "messages",
             "code": "context_length_exceeded"},
            id="a conversation that is too long",
        ),
        pytest.param(
            400, openai.BadRequestError,
            {"message": "filtered", "type": "invalid_request_error", "param": "prompt", "code": "content_filter"},
            id="filtered",
        ),
        pytest.param(
            422, openai.UnprocessableEntityError,
            {"message": "n is too large", "type": "invalid_request_error", "param": "n", "code": "invalid_value"},
            id="a value out of range",
        ),
    ],
)  # fmt: skip
def test_what_the_strong_model_finds_wrong_is_told_with_its_code(
    client: openai.OpenAI, status: int, kind: type[openai.APIStatusError], error: dict[str, str]
) -> None:
    script = {"fail": str(status), "id": json.dumps(error)[:60], "error": json.dumps(error)}
    with pytest.raises(kind) as caught:
        ask(client, metadata=script)
    assert (caught.value.code, caught.value.param, caught.value.type) == (error["code"], error["param"], error["type"])
    assert error["message"] in caught.value.message
    assert ask(client).choices


def test_too_many_requests_are_a_rate_limit_error_that_says_when_to_come_back(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, metadata={"fail": "429", "id": "limit", "headers": '{"retry-after": "7"}'})
    assert (caught.value.response.headers["retry-after"], caught.value.type) == ("7", "rate_limit_error")


def test_a_fault_of_the_strong_model_is_an_internal_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, metadata={"fail": "500", "id": "fault"})
    assert (caught.value.status_code, caught.value.code) == (502, "strong_failed")


@pytest.mark.parametrize(
    ("fails", "kind", "status", "code"),
    [
        (401, openai.InternalServerError, 502, "strong_failed"),
        (403, openai.InternalServerError, 502, "strong_failed"),
        (404, openai.InternalServerError, 502, "strong_failed"),
        (408, openai.InternalServerError, 502, "strong_failed"),
        (409, openai.InternalServerError, 502, "strong_failed"),
        (413, openai.APIStatusError, 413, "refused_by_model"),
        (422, openai.UnprocessableEntityError, 422, "refused_by_model"),
        (429, openai.RateLimitError, 429, "rate_limited"),
        (500, openai.InternalServerError, 502, "strong_failed"),
        (503, openai.InternalServerError, 503, "strong_failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_status_of_the_strong_model_is_an_error_of_the_sdks_own_kind_with_its_request_id(
    client: openai.OpenAI, fails: int, kind: type[openai.APIStatusError], status: int, code: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        ask(client, stream=stream, metadata={"fail": str(fails), "id": f"kind-{fails}-{stream}"})
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.request_id and caught.value.type
    assert ask(client).choices


def test_a_body_that_is_too_large_is_told_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages=[{"role": "user", "content": "x" * 5 * 1024 * 1024}])
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda client: client.completions.create(model="pair", prompt="x"), id="completions"),
        pytest.param(lambda client: client.embeddings.create(model="pair", input="x"), id="embeddings"),
        pytest.param(lambda client: client.responses.create(model="pair", input="x"), id="responses"),
        pytest.param(lambda client: client.moderations.create(input="x"), id="moderations"),
        pytest.param(lambda client: client.files.list(), id="files"),
        pytest.param(lambda client: client.images.generate(prompt="x"), id="images"),
    ],
)
def test_other_endpoints_say_what_there_is(client: openai.OpenAI, call: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions") as caught:
        call(client)
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "unknown_url")
    assert caught.value.request_id


# ---------------------------------------------------------------- retries and timeouts
@pytest.mark.parametrize("fault", ["429", "500", "503"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_tries_again_when_the_strong_model_fails_once(
    world: OpenAIWorld, client: openai.OpenAI, fault: str, stream: bool
) -> None:
    script = {"fail": fault, "id": f"again-{fault}-{stream}", "headers": '{"retry-after-ms": "20"}'}
    answer = ask(client.with_options(max_retries=2), metadata=script, stream=stream)
    seen = streamed_text(list(answer)) if stream else text_of(answer)
    assert seen.startswith("echo:")
    assert len(world.strong.calls()) == 2


def test_the_sdk_waits_as_long_as_the_strong_model_asks(client: openai.OpenAI) -> None:
    began = time.monotonic()
    ask(
        client.with_options(max_retries=1),
        metadata={"fail": "429", "id": "patience", "headers": '{"retry-after": "1"}'},
    )
    assert time.monotonic() - began >= 1


def test_the_sdk_does_not_try_again_what_is_wrong_in_itself(world: OpenAIWorld, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client.with_options(max_retries=3), metadata={"fail": "400", "id": "never", "times": "9"})
    assert len(world.strong.calls()) == 1


def test_the_sdk_does_not_ask_again_where_the_gateway_knows_it_to_be_in_vain(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client.with_options(max_retries=3), metadata={"fail": "401", "id": "vain", "times": "9"})
    assert (caught.value.status_code, len(world.strong.calls())) == (502, 1)


def test_the_sdk_does_not_ask_again_an_account_without_quota(world: OpenAIWorld, client: openai.OpenAI) -> None:
    error = json.dumps({"message": "no quota", "type": "insufficient_quota", "code": "insufficient_quota"})
    with pytest.raises(openai.RateLimitError):
        ask(client.with_options(max_retries=3), metadata={"fail": "429", "id": "quota", "times": "9", "error": error})
    assert len(world.strong.calls()) == 1


def test_the_sdk_gives_up_after_its_retries_and_raises_the_last_error(
    world: OpenAIWorld, client: openai.OpenAI
) -> None:
    script = {"fail": "500", "id": "gives up", "times": "9", "headers": '{"retry-after-ms": "20"}'}
    with pytest.raises(openai.InternalServerError):
        ask(client.with_options(max_retries=2), metadata=script)
    assert len(world.strong.calls()) == 3


def test_a_client_that_waits_no_longer_raises_a_timeout(world: OpenAIWorld, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=5), metadata={"seconds": "60"})
    wait_for(lambda: world.strong_broken_off() == 1)


def test_an_idempotency_key_goes_along(world: OpenAIWorld, client: openai.OpenAI) -> None:
    ask(client, extra_headers={"Idempotency-Key": "order-1"})
    ask(client, extra_headers={"Idempotency-Key": "order-1"})
    one, other = (call["headers"]["idempotency-key"] for call in world.strong.calls())
    assert one == other


def test_an_idempotency_key_of_two_clients_is_not_the_same_key(world: OpenAIWorld, client: openai.OpenAI) -> None:
    for key in KEYS:
        ask(client.with_options(api_key=key), extra_headers={"Idempotency-Key": "order-1"})
    one, other = (call["headers"]["idempotency-key"] for call in world.strong.calls())
    assert one != other and KEYS[0] not in one + other


def test_an_idempotency_key_that_is_too_long_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_headers={"Idempotency-Key": "k" * 256})
    assert caught.value.param == "Idempotency-Key"


def test_headers_of_the_sdk_stay_here(world: OpenAIWorld, client: openai.OpenAI) -> None:
    ask(client.with_options(default_headers={"OpenAI-Organization": "org-1", "OpenAI-Project": "p"}))
    for call in (*world.strong.calls(), *world.weak.calls()):
        assert not [name for name in call["headers"] if name.startswith(("x-stainless", "openai-"))]
        assert KEYS[0] not in json.dumps(call)


# ---------------------------------------------------------------- models
def test_the_list_of_models_has_the_pair(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("cowest", "model", "cowest")


def test_a_model_is_told_by_its_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve("cowest").id == "cowest"


def test_a_model_that_is_not_listed_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# ---------------------------------------------------------------- the asynchronous client, many at once
async def test_the_asynchronous_client_gets_answers_and_streams(world: OpenAIWorld) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=KEYS[1], max_retries=0) as client:
        answer = await client.chat.completions.create(model="pair", messages=ASKED, metadata=say("one"))
        stream = await client.chat.completions.create(model="pair", messages=ASKED, metadata=say("a b"), stream=True)
        chunks = [chunk async for chunk in stream]
        async with client.chat.completions.stream(model="pair", messages=ASKED, response_format=Plan) as helper:
            parsed = (await helper.get_final_completion()).choices[0].message.parsed
    assert (text_of(answer), streamed_text(chunks)) == ("one", "a b")
    assert parsed is not None and parsed.is_done


async def test_a_cancelled_call_frees_the_strong_model(world: OpenAIWorld) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(model="pair", messages=ASKED, metadata={"seconds": "30"})
        )
        await asyncio.to_thread(wait_for, lambda: len(world.strong.calls()) == 1)
        asking.cancel()
        await asyncio.to_thread(wait_for, lambda: world.strong_broken_off() == 1)


async def test_a_thousand_calls_at_once_are_all_answered_each_with_its_own(world: OpenAIWorld) -> None:
    """Fewer where a process may have fewer open files (`ulimit -Hn`) than the three of each call in the gateway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    calls = 1000 if hard == resource.RLIM_INFINITY else min(1000, (hard - 200) // 3)
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=KEYS[0], max_retries=0, timeout=240) as client:

        async def one(number: int) -> bool:
            messages: Any = [{"role": "user", "content": f"number {number}."}]
            if number % 2:
                answer = await client.chat.completions.create(model="pair", messages=messages)
                return text_of(answer).startswith(f"echo: number {number}.")
            stream = await client.chat.completions.create(model="pair", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            return streamed_text(chunks).startswith(f"echo: number {number}.")

        seen = await asyncio.gather(*map(one, range(calls)))
    assert len(seen) == calls and all(seen)


def test_threads_share_one_client(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: text_of(ask(client, metadata=say(f"answer {n}"))), range(64)))
    assert answers == [f"answer {n}" for n in range(64)]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- limits of the gateway
def test_an_answer_that_takes_too_long_is_a_gateway_timeout(tmp_path: Path) -> None:
    with (
        openai_world(tmp_path, keys=(), strong={"timeout_seconds": 5}) as world,
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, metadata={"seconds": "60"})
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="stopped in the middle"):
            list(ask(client, stream=True, metadata=say("a b c", pause="60")))


# ---------------------------------------------------------------- docs/gateway.md
def test_the_first_answer_of_the_page_for_applications_is_had_as_it_says(
    world: OpenAIWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for said, here in (("http://127.0.0.1:8080", world.url), ('api_key="any"', f'api_key="{KEYS[0]}"')):
        assert code.count(said) == 1
        code = code.replace(said, here)
    seen: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), seen)
    whole, streamed = (world.trace_of(seen[name])["answer"] for name in ("request_id", "request_id_of_stream"))
    assert capsys.readouterr().out == f"{whole}\n{streamed}" and whole and streamed
    ids = [seen["request_id"], seen["request_id_of_stream"]]
    words = {row["trace_id"]: row for row in waited(lambda: [r for r in world.feedback(0) if r["trace_id"] in ids], 2)}
    assert words[ids[0]]["reference"] and words[ids[1]]["score"] == 1
