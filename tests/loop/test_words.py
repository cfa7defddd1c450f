"""What users say of answers, from the gateway's address to what a round and the live gate make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from cowest_serving.traces import FEEDBACK_SCHEMA, TraceWriter, read_feedback, segment, table_of
from cowest_serving.words import Repeats, counted, scores_of
from cowest_training.collect import usable_traces
from cowest_training.contract import Evaluator
from cowest_training.data import Known
from cowest_training.score_live import verdicts
from tests.loop.test_gateway import Gateway, world

EXACT = Evaluator("ExactMatch")


async def say(door: Gateway, key: str = "", **body: Any) -> tuple[int, Any, Mapping[str, str]]:
    return await door.post("/v1/feedback", body, headers={"Idempotency-Key": key} if key else {})


# ---------------------------------------------------------------- of each kind
@pytest.mark.parametrize(
    ("said", "score", "reference"),
    [
        pytest.param({"thumb": "up"}, 1.0, None, id="a thumb up"),
        pytest.param({"thumb": "down"}, 0.0, None, id="a thumb down"),
        pytest.param({"thumb": "down", "score": 0.4}, 0.4, None, id="a score beside a thumb"),
        pytest.param({"correction": "42"}, None, "42", id="a correction"),
        pytest.param({"accepted": "42"}, None, "42", id="accepted text"),
        pytest.param({"correction": "41", "accepted": "42"}, None, "41", id="a correction beside accepted text"),
        pytest.param({"correction": "41", "reference": 42}, None, "42", id="a reference beside a correction"),
        pytest.param({"comment": "hm"}, None, None, id="a comment alone"),
    ],
)
async def test_a_thumb_is_a_score_and_a_corrected_or_accepted_text_a_reference(
    tmp_path: Path, said: dict[str, Any], score: float | None, reference: str | None
) -> None:
    async with world(tmp_path) as (_, _, door):
        status, _, _ = await say(door, request_id="r", **said)
    (kept,) = read_feedback(str(tmp_path)).to_pylist()
    assert status == 200
    assert (kept["score"], kept["reference"]) == (score, reference)
    assert {name: kept[name] for name in said if name != "reference"} == {
        name: value for name, value in said.items() if name != "reference"
    }


# ---------------------------------------------------------------- late, repeated, replaced
async def test_a_correction_days_later_makes_its_answer_one_that_a_round_learns_from(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        await door.writer.flush()
        before = usable_traces(str(tmp_path), EXACT, Known(()))
        await say(door, request_id=headers["x-request-id"], correction="because of Rayleigh")
    after = usable_traces(str(tmp_path), EXACT, Known(()))
    assert (len(before.rows), before.excluded) == (0, {"NoReference": 1})
    assert [row.reference for row in after.rows] == ["because of Rayleigh"]


async def test_a_word_that_comes_before_its_answers_record_is_joined_to_it_all_the_same(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        await say(door, request_id=headers["x-request-id"], reference="early")  # both wait in memory still
    assert [row.reference for row in usable_traces(str(tmp_path), EXACT, Known(())).rows] == ["early"]


async def test_the_same_word_twice_counts_once(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        for _ in range(2):
            await say(door, request_id=headers["x-request-id"], thumb="up", correction="42", user="ann")
    words = read_feedback(str(tmp_path)).to_pylist()
    assert scores_of(words) == {headers["x-request-id"]: 1.0}
    assert [row.reference for row in usable_traces(str(tmp_path), EXACT, Known(())).rows] == ["42"]


async def test_a_newer_word_of_the_same_source_replaces_the_older(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        _, headers = await door.ask()
        asked = {"request_id": headers["x-request-id"], "user": "ann"}
        for thumb, correction in (("up", "41"), ("down", "42")):
            await say(door, **asked, thumb=thumb, correction=correction)
    said = verdicts(read_feedback(str(tmp_path)).to_pylist())[headers["x-request-id"]]
    assert (said.score, said.reference) == (0.0, "42")
    assert [row.reference for row in usable_traces(str(tmp_path), EXACT, Known(())).rows] == ["42"]


async def test_scores_of_several_sources_are_averaged(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        for user, score in (("ann", 0), ("bob", 1), ("cem", 1), ("ann", 0.4)):
            await say(door, request_id="r", user=user, score=score)
    said = verdicts(read_feedback(str(tmp_path)).to_pylist())["r"]
    assert said.score == pytest.approx(2.4 / 3)


def test_a_later_word_without_a_score_or_reference_takes_neither_back() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    base = {"trace_id": "t", "source": "ann", "score": None, "reference": None}
    words = [base | {"score": 0.5, "reference": "x"}, base | {"comment": "hm"}]
    words = [word | {"feedback_id": str(n), "time": at + timedelta(seconds=n)} for n, word in enumerate(words)]
    assert (verdicts(words)["t"].score, verdicts(words)["t"].reference) == (0.5, "x")


# ---------------------------------------------------------------- idempotency keys
async def test_a_request_sent_again_with_its_key_is_answered_again_and_kept_once(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        first = await say(door, "k1", request_id="r", thumb="up", user="ann")
        await say(door, "k2", request_id="r", thumb="down", user="ann")
        again = await say(door, "k1", request_id="r", thumb="up", user="ann")
        counts = door.writer.counts()
    words = read_feedback(str(tmp_path)).to_pylist()
    assert first[:2] == again[:2] and first[0] == 200
    assert counts["waiting"] + counts["written"] == len(words) == 2
    assert scores_of(words) == {"r": 0.0}, "the repetition is older than the second word"


async def test_a_key_that_comes_with_another_word_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        await say(door, "k1", request_id="r", thumb="up")
        status, answer, headers = await say(door, "k1", request_id="r", thumb="down")
    assert (status, answer["error"]["code"]) == (409, "idempotency_key_reused")
    assert headers["x-should-retry"] == "false"
    assert read_feedback(str(tmp_path))["thumb"].to_pylist() == ["up"]


async def test_bad_words_do_not_use_up_their_key(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, _, door):
        assert (await say(door, "k1", request_id="r"))[0] == 400
        assert (await say(door, "k1", request_id="r", thumb="up"))[0] == 200


async def test_the_same_key_of_two_clients_makes_two_words(tmp_path: Path) -> None:
    async with world(tmp_path, client_keys=["k", "other"]) as (_, _, door):
        for key in ("k", "other"):
            headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "1"}
            await door.post("/v1/feedback", {"request_id": "r", "thumb": "up", "user": key}, headers=headers)
    assert read_feedback(str(tmp_path)).num_rows == 2


async def test_a_word_repeated_at_another_gateway_is_read_once_as_it_came_first(tmp_path: Path) -> None:
    for thumb in ("up", "down"):  # the other gateway cannot know that the key was of another word
        async with world(tmp_path, traces=TraceWriter(str(tmp_path), f"gateway.{thumb}")) as (_, _, door):
            assert (await say(door, "k1", request_id="r", thumb=thumb))[0] == 200
    words = read_feedback(str(tmp_path)).to_pylist()
    assert [word["thumb"] for word in words] == ["up"]


def test_words_count_once_whatever_order_they_are_read_in() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    words = [{"feedback_id": id_, "time": at + timedelta(seconds=n)} for n, id_ in enumerate(("a", "b", "a", "", ""))]
    assert [word["time"].second for word in counted(reversed(words))] == [0, 1, 3, 4]


def test_only_the_last_keys_are_remembered() -> None:
    repeats = Repeats(most=2)
    for key in "abc":
        repeats.remember(key, json.dumps(key).encode(), True)
    assert [repeats.again(key, json.dumps(key).encode()) for key in "abc"] == [None, True, True]


def test_segments_of_before_have_no_thumbs(tmp_path: Path) -> None:
    kept = ("feedback_id", "trace_id", "time", "score", "reference", "comment", "source")
    schema = FEEDBACK_SCHEMA.empty_table().select(list(kept)).schema
    row = {"feedback_id": "f", "trace_id": "t", "time": datetime(2026, 1, 1, tzinfo=UTC), "score": 1.0}
    folder = tmp_path / "feedback" / "2026-01-01"
    folder.mkdir(parents=True)
    (folder / "120000-gw-0.parquet").write_bytes(segment(table_of([orjson.dumps(row)], schema)))
    (word,) = read_feedback(str(tmp_path)).to_pylist()
    assert (word["score"], word["thumb"]) == (1.0, None)
