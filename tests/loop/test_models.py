"""`HttpChatModel` against a real server on loopback that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest

from cowest_serving.models import (
    BadAnswer,
    BadRequest,
    DeadlineExceeded,
    EndpointUnreachable,
    HttpChatModel,
    ModelError,
    RateLimited,
    ServerFault,
    Unauthorized,
    limit_reset,
    next_wait,
    retry_after,
)
from tests.fakes import ONLY_DEFAULT, OTHER_LIMIT, Fault, ScriptedModel, unused_port
from tests.patience import IN_TIME

ASKED = [{"role": "user", "content": "why?"}]


def model_of(server: ScriptedModel, **changes: Any) -> HttpChatModel:
    options: dict[str, Any] = {"timeout_seconds": 5, "max_retries": 3, "backoff_seconds": 0.01}
    return HttpChatModel(server.url, "big", **(options | changes))


async def test_an_answer_comes_with_its_usage_model_version_and_headers() -> None:
    async with (
        ScriptedModel("forty two", headers={"x-cowest-model-digest": "sha256:1"}) as server,
        model_of(server) as model,
    ):
        result = await model(ASKED, max_tokens=7, temperature=0, seed=3, stop=["."], extra={"top_p": 0.5})
    assert (result.text, result.finish_reason) == ("forty two", "stop")
    assert (result.input_tokens, result.output_tokens) == (1, 2)
    assert (result.model, result.version) == ("scripted", "fp_1")
    assert result.headers["x-cowest-model-digest"] == "sha256:1"
    assert server.calls[0].body == {
        "model": "big",
        "messages": ASKED,
        "max_tokens": 7,
        "temperature": 0,
        "seed": 3,
        "stop": ["."],
        "top_p": 0.5,
    }


async def test_what_is_not_given_is_not_sent() -> None:
    async with ScriptedModel() as server, model_of(server) as model:
        await model(ASKED)
    assert set(server.calls[0].body) == {"model", "messages"}
    assert "authorization" not in server.calls[0].headers


@pytest.mark.parametrize("fault", [500, 502, 503, 408, 409, 429, "drop", "garbage", "lost"])
async def test_a_passing_fault_is_tried_again_with_the_same_key(fault: int | str) -> None:
    async with ScriptedModel("fine", faults=[fault, fault]) as server, model_of(server) as model:
        result = await model(ASKED, idempotency_key="k1")
    assert result.text == "fine"
    assert [call.key for call in server.calls] == ["k1", "k1", "k1"]
    assert len(server.paid) == 1


async def test_without_a_key_each_call_gets_one_of_its_own() -> None:
    async with ScriptedModel("fine", faults=[500]) as server, model_of(server) as model:
        await model(ASKED)
        await model(ASKED)
    first, again, second = (call.key for call in server.calls)
    assert first == again != second


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        pytest.param(500, ServerFault, "scripted 500", id="500 that stays"),
        pytest.param(429, RateLimited, "too many requests", id="429 that stays"),
        pytest.param("drop", EndpointUnreachable, "cannot be reached", id="connections that break"),
    ],
)
async def test_a_lasting_fault_ends_after_the_retries(fault: int | str, kind: type[ModelError], words: str) -> None:
    async with ScriptedModel(faults=[fault] * 9) as server, model_of(server) as model:
        with pytest.raises(kind, match=words) as caught:
            await model(ASKED)
    assert len(server.calls) == 4
    assert caught.value.retryable
    assert server.url in str(caught.value)


async def test_garbage_is_not_asked_for_more_than_three_times() -> None:
    async with ScriptedModel(faults=["garbage"] * 9) as server, model_of(server, max_retries=6) as model:
        with pytest.raises(BadAnswer, match="OpenAI-compatible"):
            await model(ASKED)
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 3}}]}',
        '{"choices": [{"message": {"content": "x"}}], "usage": 3}',
        '{"choices": [{"mess',
    ],
)
async def test_a_body_that_is_no_completion_is_garbage(body: str) -> None:
    async with (
        ScriptedModel(faults=[Fault(200, body=body)]) as server,
        model_of(server, max_retries=0) as model,
    ):
        with pytest.raises(BadAnswer):
            await model(ASKED)


async def test_text_that_comes_in_parts_is_joined() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "forty "},
        {"type": "text", "text": "two"},
    ]
    body = json.dumps({"choices": [{"message": {"content": parts}}]})
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server, max_retries=0) as model:
        assert (await model(ASKED)).text == "forty two"


async def test_an_error_that_comes_with_200_is_told_in_the_endpoints_words() -> None:
    fault = Fault(200, body=json.dumps({"error": {"message": "the provider is asleep", "code": 502}}))
    async with ScriptedModel(faults=[fault]) as server, model_of(server, max_retries=0) as model:
        with pytest.raises(BadAnswer, match="the provider is asleep"):
            await model(ASKED)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        pytest.param(401, Unauthorized, "API key", id="401"),
        pytest.param(403, Unauthorized, "API key", id="403"),
        pytest.param(400, BadRequest, "parameters", id="400"),
        pytest.param(404, BadRequest, "ends in /v1", id="404"),
        pytest.param(Fault(307, {"location": "http://elsewhere/"}), BadRequest, "final address", id="a redirect"),
    ],
)
async def test_a_fault_that_a_retry_cannot_mend_ends_at_once(
    fault: int | Fault, kind: type[ModelError], words: str
) -> None:
    async with ScriptedModel(faults=[fault]) as server, model_of(server) as model:
        with pytest.raises(kind, match=words) as caught:
            await model(ASKED)
    assert len(server.calls) == 1
    assert not caught.value.retryable


async def test_a_refused_key_gives_way_to_the_next_and_stays_away() -> None:
    async with (
        ScriptedModel("fine", keys=["good"]) as server,
        model_of(server, api_keys=["bad", "good"]) as model,
    ):
        await model(ASKED)
        await model(ASKED)
    sent = [call.headers["authorization"] for call in server.calls]
    assert sent == ["Bearer bad", "Bearer good", "Bearer good"]


async def test_when_no_key_is_taken_the_call_ends() -> None:
    async with ScriptedModel(keys=["good"]) as server, model_of(server, api_keys=["a", "b"]) as model:
        with pytest.raises(Unauthorized):
            await model(ASKED)
    assert len(server.calls) == 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("keys", [[], ["a", "b"]], ids=["no key", "two keys"])
async def test_retry_after_is_waited_for(status: int, keys: list[str]) -> None:
    faults = [Fault(status, {"retry-after-ms": "150"})] * (2 if status == 429 and keys else 1)
    async with ScriptedModel(faults=faults) as server, model_of(server, api_keys=keys) as model:
        started = time.monotonic()
        await model(ASKED)
    assert time.monotonic() - started >= 0.15


async def test_a_retry_after_beyond_the_deadline_ends_at_once_and_is_told() -> None:
    fault = Fault(429, {"retry-after": "120"})
    async with ScriptedModel(faults=[fault]) as server, model_of(server) as model:
        with pytest.raises(RateLimited, match="Wait 120 s") as caught:
            await model(ASKED)
    assert caught.value.retry_after == 120


LIMITED = Fault(429, {"retry-after": "120"})


async def test_a_key_that_is_limited_gives_way_and_rests_while_the_other_serves() -> None:
    async with (
        ScriptedModel("fine", faults=[LIMITED]) as server,
        model_of(server, api_keys=["a", "b"]) as model,
    ):
        await asyncio.gather(*(model(ASKED) for _ in range(3)))
        await model(ASKED)
    sent = [call.headers["authorization"] for call in server.calls]
    assert sent.count("Bearer a") <= 3 and sent[-1] == "Bearer b", "those that began together met the same limit"


async def test_with_all_keys_at_rest_the_shortest_rest_is_waited_for() -> None:
    faults = [Fault(429, {"retry-after": "120"}), Fault(429, {"retry-after-ms": "150"})]
    async with (
        ScriptedModel("fine", faults=faults) as server,
        model_of(server, api_keys=["a", "b"]) as model,
    ):
        started = time.monotonic()
        await model(ASKED)
    assert 0.15 <= time.monotonic() - started < 60
    assert [call.headers["authorization"] for call in server.calls] == [f"Bearer {key}" for key in "abb"]


async def test_a_call_that_begins_while_all_keys_rest_ends_at_once_where_the_rest_is_too_long() -> None:
    async with ScriptedModel(faults=[LIMITED]) as server, model_of(server) as model:
        for _ in range(3):
            with pytest.raises(RateLimited, match=r"Wait 1[12]\d s") as caught:
                await model(ASKED)
    assert len(server.calls) == 1, "the endpoint said to leave it alone"
    assert 110 < (caught.value.retry_after or 0) <= 120


async def test_a_call_that_begins_while_all_keys_rest_waits_where_there_is_time() -> None:
    fault = Fault(429, {"retry-after-ms": "300"})
    async with ScriptedModel(faults=[fault]) as server, model_of(server, max_retries=0) as model:
        started = time.monotonic()
        with pytest.raises(RateLimited):
            await model(ASKED)
        await model(ASKED)
        assert time.monotonic() - started >= 0.3


async def test_an_account_without_quota_is_not_asked_again_but_by_another_key() -> None:
    error = json.dumps({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    empty = Fault(429, {}, error)
    async with ScriptedModel("fine", faults=[empty]) as server, model_of(server, api_keys=["a", "b"]) as model:
        assert (await model(ASKED)).text == "fine"
    async with ScriptedModel("fine", faults=[empty] * 9) as server, model_of(server) as model:
        with pytest.raises(RateLimited, match="no money or quota left: top it up") as caught:
            await model(ASKED)
    assert len(server.calls) == 1 and not caught.value.retryable


async def test_the_reset_of_a_limit_that_is_used_up_is_waited_for_where_there_is_no_retry_after() -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "150ms"}
    async with ScriptedModel("fine", faults=[Fault(429, headers)]) as server, model_of(server) as model:
        started = time.monotonic()
        await model(ASKED)
    assert time.monotonic() - started >= 0.15


async def test_an_endpoint_that_hangs_ends_at_the_deadline() -> None:
    async with ScriptedModel(faults=["hang"] * 9) as server, model_of(server, timeout_seconds=0.2) as model:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="timeout"):
            await model(ASKED)
    assert time.monotonic() - started < 2


async def test_a_longer_deadline_leaves_time_for_a_second_attempt() -> None:
    async with (
        ScriptedModel("fine", faults=["hang"]) as server,
        model_of(server, timeout_seconds=0.2, deadline_seconds=5) as model,
    ):
        assert (await model(ASKED)).text == "fine"


async def test_nobody_listening_is_told_with_the_address() -> None:
    async with (
        unused_port() as port,
        HttpChatModel(f"http://127.0.0.1:{port}/v1", "m", max_retries=0) as model,
    ):
        with pytest.raises(EndpointUnreachable, match=f"127.0.0.1:{port}.*Check that it runs"):
            await model(ASKED)


async def test_an_address_that_is_none_is_told() -> None:
    async with HttpChatModel("nonsense", "m") as model:
        with pytest.raises(BadRequest, match="is not an address"):
            await model(ASKED)


async def test_no_more_than_max_concurrency_calls_are_under_way() -> None:
    async with ScriptedModel() as server, model_of(server, max_concurrency=2) as model:
        server.gate.clear()
        calls = [asyncio.create_task(model(ASKED)) for _ in range(5)]
        async with asyncio.timeout(IN_TIME):
            while len(server.calls) < 2:
                server.arrived.clear()
                await server.arrived.wait()
        server.arrived.clear()
        with pytest.raises(TimeoutError):  # a third one would arrive within this time
            await asyncio.wait_for(server.arrived.wait(), 0.1)
        server.gate.set()
        await asyncio.gather(*calls)
    assert len(server.calls) == 5


async def test_after_a_429_fewer_calls_are_under_way() -> None:
    async with ScriptedModel(faults=[429] * 8) as server, model_of(server, max_concurrency=8, max_retries=0) as model:
        await asyncio.gather(*(model(ASKED) for _ in range(8)), return_exceptions=True)
        server.gate.clear()
        calls = [asyncio.create_task(model(ASKED)) for _ in range(8)]
        async with asyncio.timeout(IN_TIME):
            while len(server.calls) < 8 + 4:
                server.arrived.clear()
                await server.arrived.wait()
        server.arrived.clear()
        with pytest.raises(TimeoutError):  # a fifth one would arrive within this time
            await asyncio.wait_for(server.arrived.wait(), 0.1)
        server.gate.set()
        await asyncio.gather(*calls)
    assert len(server.calls) == 16


async def test_the_internet_is_reached_through_the_proxy_and_this_machine_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedModel("by proxy") as proxy, ScriptedModel("direct") as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "internal.test")
        async with HttpChatModel("http://strong.test/v1", "m", max_retries=0) as far, model_of(server) as near:
            assert (await far(ASKED)).text == "by proxy"
            assert (await near(ASKED)).text == "direct"


# ---------------------------------------------------------------- parameters that a model does not take
async def test_a_parameter_that_a_model_does_not_take_is_left_out_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = {"temperature": ONLY_DEFAULT, "seed": "unknown field"}
    async with ScriptedModel("fine", refuses=refused) as server, model_of(server) as model:
        first = await asyncio.gather(*(model(ASKED, temperature=0, seed=3) for _ in range(4)))
        calls = len(server.calls)
        await model(ASKED, temperature=0, seed=4, max_tokens=5)
    assert {result.text for result in first} == {"fine"}
    assert len(server.calls) == calls + 1, "what was learned is not asked again"
    assert server.calls[-1].body == {"model": "big", "messages": ASKED, "max_tokens": 5}
    assert [record.message for record in caplog.records] == [
        f"{server.url} does not take `{name}` for big: from now on it is left out, which may change its answers."
        for name in refused
    ]


async def test_a_limit_is_called_by_its_other_name_and_never_left_out() -> None:
    async with ScriptedModel("fine", refuses={"max_tokens": OTHER_LIMIT}) as server, model_of(server) as model:
        await model(ASKED, max_tokens=5)
        assert server.calls[-1].body == {"model": "big", "messages": ASKED, "max_completion_tokens": 5}
        server.refuses["max_completion_tokens"] = "unknown parameter"
        with pytest.raises(BadRequest, match="unknown parameter"):
            await model(ASKED, max_tokens=5)


async def test_a_stream_too_goes_on_without_what_the_model_does_not_take() -> None:
    refused = {"stream_options": "stream_options is not supported"}
    async with ScriptedModel("one", refuses=refused) as server, model_of(server) as model:
        assert len(await chunks_of(model, extra={"stream_options": {"include_usage": True}})) == 3


async def test_what_is_refused_beside_another_parameter_is_left_out_of_that_call_alone() -> None:
    async with ScriptedModel("fine", refuses={"temperature": ONLY_DEFAULT}) as server, model_of(server) as model:
        await model(ASKED, temperature=0, extra={"reasoning_effort": "high"})
        assert "temperature" not in server.calls[-1].body
        del server.refuses["temperature"]
        await model(ASKED, temperature=0)
    assert server.calls[-1].body["temperature"] == 0


# ---------------------------------------------------------------- streams
async def chunks_of(model: HttpChatModel, **options: Any) -> list[bytes]:
    return [chunk async for chunk in model.stream(ASKED, **options)]


async def test_a_stream_gives_each_chunk_and_no_done() -> None:
    async with ScriptedModel("one two") as server, model_of(server) as model:
        chunks = await chunks_of(model)
    assert [b'"one"' in chunk for chunk in chunks] == [False, True, False, False]
    assert not any(b"DONE" in chunk for chunk in chunks)
    assert server.calls[0].body["stream"] is True


async def test_a_stream_is_tried_again_until_it_begins() -> None:
    async with ScriptedModel("one", faults=[500, "drop"]) as server, model_of(server) as model:
        assert len(await chunks_of(model, idempotency_key="k")) == 3
    assert [call.key for call in server.calls] == ["k", "k", "k"]


async def test_a_stream_that_breaks_off_is_not_taken_for_a_short_answer() -> None:
    async with ScriptedModel("one two three", faults=["truncate"]) as server, model_of(server) as model:
        with pytest.raises(EndpointUnreachable):
            await chunks_of(model)
    assert len(server.calls) == 1


@pytest.mark.parametrize("fault", ["stall", "comments"])
async def test_a_stream_that_stalls_ends_also_where_a_proxy_keeps_it_open_by_comments(fault: str) -> None:
    async with (
        ScriptedModel("one two", faults=[fault]) as server,
        model_of(server, timeout_seconds=2) as model,
    ):
        with pytest.raises(DeadlineExceeded, match="in the middle"):
            async with asyncio.timeout(IN_TIME):
                await chunks_of(model)


@pytest.mark.parametrize("fault", ["hang", "mute", "filters"])
async def test_a_stream_begins_by_the_moment_that_is_given_however_patient_the_model_is(fault: str) -> None:
    async with ScriptedModel(faults=[fault] * 9) as server, model_of(server, timeout_seconds=30) as model:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await chunks_of(model, until=began + 0.5)
        assert 0.4 < time.monotonic() - began < 5


async def test_a_call_for_which_no_time_is_left_is_not_made() -> None:
    async with ScriptedModel() as server, model_of(server) as model:
        await model(ASKED)  # leaves a connection on which it could be sent
        with pytest.raises(DeadlineExceeded) as late:
            await model(ASKED, until=time.monotonic())
    assert len(server.calls) == 1 and not late.value.may_be_billed


async def test_the_time_that_a_reader_takes_for_a_chunk_is_none_of_the_endpoints() -> None:
    async with ScriptedModel("one two three") as server, model_of(server, timeout_seconds=2) as model:
        stream = model.stream(ASKED)
        await anext(stream)
        await asyncio.sleep(2.5)
        assert len([chunk async for chunk in stream]) == 4


async def test_a_stream_of_something_else_is_garbage() -> None:
    async with ScriptedModel(faults=["garbage"] * 9) as server, model_of(server) as model:
        with pytest.raises(BadAnswer):
            await chunks_of(model)


ERROR = json.dumps({"error": {"message": "the provider is asleep"}})
OLD_ERROR = json.dumps({"object": "error", "message": "the provider is asleep", "type": "ServerError", "code": 500})
FILTERED = json.dumps({"choices": [], "prompt_filter_results": []})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"data: {ERROR}\n\n", id="in the first event"),
        pytest.param(f"data: {FILTERED}\n\ndata: {ERROR}\n\ndata: [DONE]\n\n", id="behind an event without choices"),
        pytest.param(ERROR, id="as a body that is no stream"),
        pytest.param(f"data: {OLD_ERROR}\n\ndata: [DONE]\n\n", id="as older vLLMs say it"),
        pytest.param(OLD_ERROR, id="as older vLLMs say it, as a body that is no stream"),
    ],
)
async def test_an_error_in_place_of_a_stream_is_tried_again_and_told_in_the_endpoints_words(body: str) -> None:
    async with ScriptedModel("one two", faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        assert len(await chunks_of(model)) == 4
    async with ScriptedModel(faults=[Fault(200, body=body)] * 9) as server, model_of(server) as model:
        with pytest.raises(BadAnswer, match="the provider is asleep"):
            await chunks_of(model)
        assert len(server.calls) == 3


async def test_what_comes_before_the_first_choice_is_passed_on() -> None:
    body = f'data: {FILTERED}\n\ndata: {{"choices": [{{"delta": {{}}, "finish_reason": "stop"}}], "error": null}}\n\n'
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        assert [b"filter" in chunk for chunk in await chunks_of(model)] == [True, False]


async def test_a_body_that_is_no_stream_is_told_by_its_beginning() -> None:
    async with ScriptedModel(faults=[Fault(200, body='{"id": 1}')]) as server, model_of(server, max_retries=0) as model:
        with pytest.raises(BadAnswer, match="9 bytes that start with"):
            await chunks_of(model)


async def test_an_empty_finish_reason_ends_no_stream() -> None:
    """As some servers say it in each chunk until the last one."""
    body = 'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": ""}]}\n\n'
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server, max_retries=0) as model:
        with pytest.raises(EndpointUnreachable, match="broke off in the middle"):
            await chunks_of(model)


async def test_a_stream_without_done_is_whole_if_it_gave_a_finish_reason() -> None:
    body = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        assert len(await chunks_of(model)) == 1


def events_of(*chunks: Mapping[str, Any], is_done: bool = True) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if is_done else "")


def choice(index: int, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": "a"}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize("is_done", [True, False], ids=["with [DONE]", "cut off"])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([choice(0), choice(1), choice(0, "stop"), choice(1)], id="in the middle of its second choice"),
        pytest.param([choice(0), choice(1), choice(1, "stop")], id="in the middle of its first choice"),
        pytest.param([choice(0)], id="in the middle of its only choice"),
    ],
)
async def test_a_stream_that_ends_before_each_choice_has_is_no_whole_answer(
    chunks: list[dict[str, Any]], is_done: bool
) -> None:
    body = events_of(*chunks, is_done=is_done)
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        with pytest.raises(EndpointUnreachable, match="broke off in the middle"):
            await chunks_of(model, extra={"n": 2})
    assert len(server.calls) == 1


async def test_a_stream_of_one_choice_that_ends_before_it_has_is_no_whole_answer() -> None:
    async with ScriptedModel(faults=[Fault(200, body=events_of(choice(0)))]) as server, model_of(server) as model:
        with pytest.raises(EndpointUnreachable, match="broke off in the middle"):
            await chunks_of(model)


async def test_a_stream_is_whole_when_each_choice_that_came_has_its_end() -> None:
    """Some endpoints give one, however many are asked for."""
    both = {"choices": [*choice(0, "stop")["choices"], *choice(1, "length")["choices"]]}
    for chunks in ([choice(1), choice(0), both], [choice(0), choice(0, "stop"), {"choices": [], "usage": {}}]):
        body = events_of(*chunks)
        async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
            assert len(await chunks_of(model, extra={"n": 2})) == 3


@pytest.mark.parametrize("body", [events_of(), events_of(json.loads(FILTERED))], ids=["nothing", "no choice"])
async def test_a_stream_without_an_answer_in_it_is_asked_for_again(body: str) -> None:
    async with ScriptedModel("one two", faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        assert len([chunk for chunk in await chunks_of(model) if b"delta" in chunk]) == 4
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(events_of(choice(0), choice(0, "stop")).replace("\n", "\r"), id="lines that end with CR"),
        pytest.param(events_of(choice(0), choice(0, "stop")).replace("\n", "\r\n"), id="lines that end with CRLF"),
        pytest.param("data:\n\ndata: \n\n" + events_of(choice(0), choice(0, "stop")), id="events without data"),
        pytest.param(events_of(choice(0), choice(0, "stop")).replace('"a"', r'"\ud83d"'), id="half a character"),
        pytest.param(events_of(choice(0) | {"logprobs": float("nan")}, choice(0, "stop")), id="no number"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_common_clients_read_is_read(body: str, n: int) -> None:
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        assert len(await chunks_of(model, extra={"n": n})) == 2
    assert len(server.calls) == 1


async def test_an_answer_that_common_clients_read_is_read_and_can_be_written_again() -> None:
    body = r'{"choices": [{"message": {"content": "a\ud83d"}, "logprobs": [NaN, -Infinity, 1e999, 0.5]}]}'
    async with ScriptedModel(faults=[Fault(200, body=body)]) as server, model_of(server) as model:
        result = await model(ASKED)
    assert (result.text, len(server.calls)) == ("a\ufffd", 1)
    assert json.loads(orjson.dumps(result.raw))["choices"][0]["logprobs"] == [None, None, None, 0.5]


async def test_an_endpoint_that_does_not_stream_is_paid_once_and_its_answer_comes_in_chunks() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "forty two", "tool_calls": [call]}
    whole = {
        "object": "chat.completion",
        "model": "big-2026",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    fault = Fault(200, {"content-type": "application/json; charset=utf-8"}, json.dumps(whole))
    async with ScriptedModel(faults=[fault]) as server, model_of(server) as model:
        first, last, usage = [json.loads(chunk) for chunk in await chunks_of(model)]
    assert {each["object"] for each in (first, last, usage)} == {"chat.completion.chunk"}
    assert first["choices"][0]["delta"] == message | {"tool_calls": [{"index": 0, **call}]}
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    assert len(server.calls) == 1


async def test_leaving_a_stream_frees_its_place() -> None:
    async with ScriptedModel("one two") as server, model_of(server, max_concurrency=1) as model:
        stream = model.stream(ASKED)
        await anext(stream)
        await stream.aclose()
        assert (await asyncio.wait_for(model(ASKED), IN_TIME)).text == "one two"


# ---------------------------------------------------------------- when to try again
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param({"retry-after": "3"}, 3.0, id="seconds"),
        pytest.param({"retry-after": "1.5"}, 1.5, id="parts of seconds"),
        pytest.param({"retry-after-ms": "250", "retry-after": "1"}, 0.25, id="milliseconds come first"),
        pytest.param({"retry-after": format_datetime(NOW + timedelta(seconds=9), usegmt=True)}, 9.0, id="a date"),
        pytest.param({"retry-after": format_datetime(NOW - timedelta(days=1), usegmt=True)}, 0.0, id="a date gone by"),
        pytest.param({"retry-after": "9" * 400}, 86_400.0, id="more than a number can be"),
        pytest.param({"retry-after-ms": "9" * 400}, 86_400.0, id="more milliseconds than a number can be"),
        pytest.param({"retry-after": format_datetime(NOW + timedelta(days=400))}, 86_400.0, id="a date a year ahead"),
        pytest.param({"retry-after": "Thu, 01 Jan 2026 12:00:00 +99999999999999"}, None, id="a zone beyond all time"),
        pytest.param({"retry-after": "soon"}, None, id="words"),
        pytest.param({"retry-after": "-1"}, None, id="less than nothing"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_retry_after_is_read_in_each_form(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after(headers, NOW.timestamp()) == expected


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("17.2s", 17.2),
        ("12", 12.0),
        ("9" * 400, 86_400.0),
        ("", None),
        ("soon", None),
        ("2026-11-26T00:00:00Z", None),
    ],
)
def test_the_reset_of_a_limit_is_read_as_openai_writes_it(reset: str, expected: float | None) -> None:
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": reset}
    assert limit_reset(headers) == expected


@pytest.mark.parametrize(
    ("requests", "tokens", "expected"),
    [
        pytest.param("0", "5", 1.0, id="requests are used up"),
        pytest.param("0", "0", 60.0, id="both are: the longer one"),
        pytest.param("5", "5", None, id="neither: the resets say when all is there again, which is no wait"),
    ],
)
def test_only_the_reset_of_what_is_used_up_is_a_wait(requests: str, tokens: str, expected: float | None) -> None:
    headers = {"x-ratelimit-remaining-requests": requests, "x-ratelimit-remaining-tokens": tokens}
    assert limit_reset(headers | {"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "1m0s"}) == expected


def test_waits_grow_up_to_a_limit() -> None:
    waits = [next_wait(ServerFault("x"), attempt, 9, 0.5) or 0 for attempt in range(8)]
    limits = [min(8.0, 0.5 * 2**attempt) for attempt in range(8)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert next_wait(ServerFault("x"), 9, 9) is None
