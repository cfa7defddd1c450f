"""Identifiers on their way through gateway and steps: who sees them, and who does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import Redaction, RedactionPattern
from cowest_serving.redaction import Redacted
from cowest_serving.traces import CONTENT_COLUMNS, read_feedback
from cowest_training.asking import open_asking
from cowest_training.collect import usable_traces
from cowest_training.contract import Evaluator, Row
from cowest_training.data import Known
from cowest_training.observer import TraceCounter
from cowest_training.score_live import live_answer, verdicts
from tests.fakes import Fault, ScriptedModel
from tests.loop.test_gateway import arm_of, strong_settings, world

HIDDEN = Redaction(("Email", "CreditCard"), (RedactionPattern("Policy", r"\bPL-\d{6}\b"),))
ANN, CARD, POLICY = "ann@example.org", "4111 1111 1111 1111", "PL-123456"
ASKED: Any = [
    {"role": "system", "content": f"The client is {ANN}."},
    {"role": "user", "content": f"Is {POLICY} of {ANN} paid by {CARD}?"},
]
SECRETS = (ANN, CARD, "4111", POLICY)


def has_none(value: Any) -> bool:
    return not any(secret in str(value) for secret in SECRETS)


def pair(**changes: Any) -> dict[str, Any]:
    """The weak model repeats what it read; the strong one answers in placeholders."""
    return {
        "weak": {"answers": f"{POLICY} is paid, write to {ANN}"},
        "strong": {"answers": "[Policy_1] is paid, [Email_1] knows."},
        "redaction": HIDDEN,
        **changes,
    }


async def test_the_weak_model_sees_the_values_and_the_strong_one_placeholders(tmp_path: Path) -> None:
    async with world(tmp_path, **pair()) as (weak, strong, door):
        completion, _ = await door.ask(messages=ASKED, extra_body={"metadata": {"about": ANN}})
    assert POLICY in weak.calls[0].last and ANN in weak.calls[0].last
    assert has_none(strong.calls[0].body)
    assert strong.calls[0].last == (
        "Is [Policy_1] of [Email_1] paid by [CreditCard_1]? | [Policy_1] is paid, write to [Email_1]"
    )
    assert completion.choices[0].message.content == f"{POLICY} is paid, {ANN} knows."


async def test_a_stream_gives_the_values_back(tmp_path: Path) -> None:
    async with world(tmp_path, **pair()) as (_, strong, door):
        stream = await door.client.chat.completions.create(
            model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert has_none(strong.calls[0].body)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == f"{POLICY} is paid, {ANN} knows."
    assert chunks[-1].usage is not None


@pytest.mark.parametrize("where", ["draft", "metadata"])
async def test_a_stream_restores_what_only_the_draft_or_the_metadata_held(tmp_path: Path, where: str) -> None:
    metadata = {"metadata": {"about": ANN}} if where == "metadata" else None
    weak = {"answers": f"Write to {ANN}." if where == "draft" else "Write."}
    async with world(tmp_path, **pair(weak=weak, strong={"answers": "Ask [Email_1]."})) as (_, strong, door):
        stream = await door.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Whom do I ask?"}], stream=True, extra_body=metadata
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert has_none(strong.calls[0].body) and "[Email_1]" in str(strong.calls[0].body)
    assert text == f"Ask {ANN}."


async def test_a_client_gets_the_placeholders_where_the_manifest_keeps_them(tmp_path: Path) -> None:
    kept = Redaction(HIDDEN.identifiers, HIDDEN.patterns, "Keep")
    async with world(tmp_path, **pair(redaction=kept)) as (_, _, door):
        completion, _ = await door.ask(messages=ASKED)
    assert completion.choices[0].message.content == "[Policy_1] is paid, [Email_1] knows."


async def test_nothing_that_is_stored_has_a_value(tmp_path: Path) -> None:
    strong = {"answers": f"Write to bob@example.org or {ANN}."}  # which it made up
    async with world(tmp_path, **pair(strong=strong)) as (_, _, door):
        _, headers = await door.ask(messages=ASKED)
        said = {"request_id": headers["x-request-id"], "reference": f"paid by {CARD}", "comment": f"ask {ANN}"}
        said |= {"correction": f"{ANN} paid", "accepted": f"{POLICY} is paid"}
        assert (await door.post("/v1/feedback", said))[0] == 200
        row = await door.row()
        (told,) = read_feedback(str(tmp_path)).to_pylist()
    assert has_none(row) and "bob@example.org" not in str(row)
    assert row["query"] == "Is [Policy_1] of [Email_1] paid by [CreditCard_1]?"
    assert row["draft"] == "[Policy_1] is paid, write to [Email_1]"
    assert row["answer"] == "Write to [Email_2] or [Email_1]."
    assert (told["reference"], told["comment"]) == ("paid by [CreditCard_1]", "ask [Email_1]")
    assert (told["correction"], told["accepted"]) == ("[Email_1] paid", "[Policy_1] is paid")
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.rglob("*.*") for secret in SECRETS)


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_are_stored_without_a_value_and_are_json_all_the_same(
    tmp_path: Path, stream: bool
) -> None:
    arguments = json.dumps({"to": ANN, "about": "žluťoučký"})  # which it made up
    call = {"id": "c1", "type": "function", "function": {"name": "write", "arguments": arguments}}
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [call]}, "finish_reason": "tool_calls"}
    body = json.dumps({"object": "chat.completion", "choices": [choice]})
    asked = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}], "stream": stream}
    whole = Fault(200, {"content-type": "application/json"}, body)
    async with world(tmp_path, **pair(strong={"faults": [whole]})) as (_, _, door):
        async with door.http.post(door.url + "/v1/chat/completions", json=asked) as response:
            assert response.status == 200 and "c1" in await response.text()
        row = await door.row()
    (kept,) = json.loads(row["tool_calls"])
    assert has_none(row) and json.loads(kept["function"]["arguments"]) == {"to": "[Email_1]", "about": "žluťoučký"}


async def test_a_draft_that_stands_in_is_the_clients_and_not_stored(tmp_path: Path) -> None:
    down = {"faults": [500] * 9}
    async with world(tmp_path, **pair(strong=down, when_strong_fails="WeakAlone")) as (_, _, door):
        completion, _ = await door.ask(messages=ASKED)
        row = await door.row()
    assert completion.choices[0].message.content == f"{POLICY} is paid, write to {ANN}"
    assert has_none(row) and row["answer"] == "[Policy_1] is paid, write to [Email_1]"


class BrokenRedacted(Redacted):
    def messages(self, messages: Any) -> list[dict[str, Any]]:
        raise MemoryError("no room for the automaton")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_redactor_that_fails_closes_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("cowest_serving.redaction.Redacted", BrokenRedacted)
    async with world(tmp_path, **pair()) as (weak, strong, door):
        asked = {"model": "m", "messages": ASKED, "stream": stream}
        status, body, _ = await door.post("/v1/chat/completions", asked)
        row = await door.row()
    assert (status, body["error"]["code"]) == (503, "redaction_failed")
    assert not weak.calls and not strong.calls
    assert has_none(row) and has_none(body) and row["status"] == "refused"


class NoAnswers(Redacted):
    def text(self, text: str) -> str:
        if text.startswith("Write"):
            raise ValueError(f"no number: {text}")
        return super().text(text)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_whose_record_cannot_be_hidden_goes_out_and_its_record_has_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    monkeypatch.setattr("cowest_serving.redaction.Redacted", NoAnswers)
    made_up = {"weak": {"answers": "see"}, "strong": {"answers": "Write to eve@example.org."}}
    async with world(tmp_path, **pair(**made_up)) as (_, _, door):
        asked = {"model": "m", "messages": ASKED, "stream": stream}
        async with door.http.post(door.url + "/v1/chat/completions", json=asked) as response:
            status, body = response.status, await response.text()
        row, metrics = await door.row(), await door.metrics()
    assert status == 200 and "eve@example.org" in body
    assert (row["status"], row["error"], row["strong_output_tokens"] > 0) == ("ok", "record: ValueError", True)
    assert not any(row[name] for name in CONTENT_COLUMNS)
    assert 'cowest_answers_total{arm="stable",mode="Pair",status="ok"} 1' in metrics
    assert "ValueError" in caplog.text and "eve@" not in caplog.text


async def test_a_word_that_cannot_be_hidden_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cowest_serving.redaction.Redacted", NoAnswers)
    async with world(tmp_path, **pair()) as (_, _, door):
        status, body, _ = await door.post("/v1/feedback", {"request_id": "r", "comment": f"Write to {ANN}"})
    assert (status, body["error"]["code"]) == (503, "redaction_failed")
    assert has_none(body) and has_none(caplog.text) and not read_feedback(str(tmp_path)).num_rows


async def test_a_large_request_is_searched_beside_the_event_loop(tmp_path: Path) -> None:
    long = [{"role": "user", "content": f"{'x ' * 40_000}{ANN}"}]
    async with world(tmp_path, **pair()) as (_, strong, door):
        await door.ask(messages=long)
    assert has_none(strong.calls[0].body) and "[Email_1]" in strong.calls[0].last


# ---------------------------------------------------------------- late words
ANN_AND_BOB: Any = [{"role": "user", "content": f"Whom do I write to, {ANN} or bob@example.org?"}]
EXACT = Evaluator("ExactMatch")


async def told(tmp_path: Path, reference: str | list[str], cut: bool = False) -> Mapping[str, Any]:
    """The word on an answer that is right: bob, who is the second of the question."""
    async with world(tmp_path, **pair(strong={"answers": "[Email_2]"})) as (_, _, door):
        _, headers = await door.ask(messages=ANN_AND_BOB)
        request_id = headers["x-request-id"]
        given = request_id.partition(".")[0] if cut else request_id
        assert (await door.post("/v1/feedback", {"request_id": given, "reference": reference}))[0] == 200
        trace = await door.row()
    stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*.parquet"))
    assert request_id.partition(".")[2].encode() not in stored, "the key is the client's alone"
    assert trace["trace_id"] == request_id.partition(".")[0]
    return trace


@pytest.mark.parametrize("reference", ["bob@example.org", "[Email_2]"])
async def test_a_late_reference_names_whom_its_record_names(tmp_path: Path, reference: str) -> None:
    trace = await told(tmp_path, reference)
    (word,) = read_feedback(str(tmp_path)).to_pylist()
    (row,) = usable_traces(str(tmp_path), EXACT, Known(())).rows
    (said,) = verdicts([word]).values()
    assert trace["answer"] == row.reference == said.reference_to(live_answer(trace, "stable")) == "[Email_2]"
    assert "bob@" not in str(word)


async def test_a_reference_in_a_list_names_whom_its_record_names(tmp_path: Path) -> None:
    trace = await told(tmp_path, ["Write to:\nbob@example.org"])
    (word,) = read_feedback(str(tmp_path)).to_pylist()
    (said,) = verdicts([word]).values()
    assert said.reference_to(live_answer(trace, "stable")) == r'["Write to:\n[Email_2]"]'


async def test_a_late_reference_that_is_wrong_stays_wrong(tmp_path: Path) -> None:
    await told(tmp_path, f"{ANN}, eve@example.org")
    (row,) = usable_traces(str(tmp_path), EXACT, Known(())).rows
    assert row.reference == "[Email_1], [Email_0]", "whom the record does not have is nobody of it"


async def test_a_reference_without_the_key_is_not_gone_by(tmp_path: Path) -> None:
    trace = await told(tmp_path, "bob@example.org", cut=True)
    (word,) = read_feedback(str(tmp_path)).to_pylist()
    usable = usable_traces(str(tmp_path), EXACT, Known(()))
    (said,) = verdicts([word]).values()
    rows = [{"id": id_, "query": f"another {id_}", "reference": "1"} for id_ in "hi"]
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    counted = TraceCounter(str(tmp_path), EXACT, str(tmp_path / "held_out.jsonl")).count()
    assert (usable.rows, usable.excluded) == ((), {"WrongReference": 1})
    assert (counted.all, counted.usable) == (1, 0)
    assert said.reference_to(live_answer(trace, "stable")) is None


async def test_all_texts_of_a_word_have_the_same_placeholders(tmp_path: Path) -> None:
    async with world(tmp_path, **pair()) as (_, _, door):
        said = {
            "request_id": "r",
            "reference": "bob@example.org",
            "comment": f"[Email_1] is not {ANN} nor bob@example.org",
        }
        await door.post("/v1/feedback", said)
    (word,) = read_feedback(str(tmp_path)).to_pylist()
    assert (word["reference"], word["comment"]) == ("[Email_2]", "[Email_1] is not [Email_3] nor [Email_2]")


async def test_without_a_redaction_the_request_id_is_the_records_id(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        row = await door.row()
    assert headers["x-request-id"] == row["trace_id"] and row["placeholders"] is None


# ---------------------------------------------------------------- the steps
@pytest.fixture
def row() -> Row:
    return Row("q", ASKED[-1]["content"], tuple(ASKED), reference="paid")


async def test_what_is_measured_is_what_is_served(tmp_path: Path, row: Row) -> None:
    """A step asks the strong model, and scores, what the gateway would have sent and given."""
    async with world(tmp_path, **pair()) as (weak, strong, door):
        completion, _ = await door.ask(messages=ASKED)
        asked_live = strong.calls[-1].body["messages"]
        settings, served = strong_settings(strong.url), arm_of(weak, strong).pair
        async with open_asking(
            settings, Evaluator("ExactMatch"), str(tmp_path / "calls.sqlite"), purpose="evaluate:1", redaction=HIDDEN
        ) as asking:
            reply = await asking.answer(row, f"{POLICY} is paid, write to {ANN}", served)
            await asking.solo(row, served)
    assert strong.calls[1].body["messages"] == asked_live
    assert reply.text == completion.choices[0].message.content
    assert has_none([call.body for call in strong.calls])
    assert has_none((tmp_path / "calls.sqlite").read_bytes().decode("latin-1"))


async def test_a_judge_sees_no_value_either(tmp_path: Path, row: Row) -> None:
    async with ScriptedModel("VERDICT: yes") as judge, ScriptedModel() as strong:
        settings = strong_settings(strong.url)
        evaluator = Evaluator("Judge", endpoint=judge.url, model="judge")
        async with open_asking(
            settings, evaluator, str(tmp_path / "calls.sqlite"), purpose="evaluate:1", redaction=HIDDEN
        ) as asking:
            try:
                await asking.score_text(row, f"{POLICY} is paid by {CARD}, {ANN}")
            except Exception as error:  # what it says is no verdict: this is about what it was asked
                assert has_none(error)
    assert judge.calls and has_none([call.body for call in judge.calls])


async def test_without_a_redaction_messages_pass_as_they_are(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, strong, door):
        await door.ask(messages=ASKED)
    seen: Mapping[str, Any] = strong.calls[0].body
    assert ANN in str(seen["messages"]) and CARD in str(seen["messages"])
