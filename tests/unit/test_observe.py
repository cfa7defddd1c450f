"""What the operator makes of what it sees. No cluster, no doors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cowest_operator import api, observe
from cowest_operator.observe import ACTION, not_understood, read_actions

WHEN = f"{100:020d}"


def said(identity: str, **values: Any) -> dict[str, str]:
    told = {"verb": identity.partition("-")[2], "by": "ann", "why": "", "at": 5.0, **values}
    return {ACTION + identity: json.dumps(told)}


def body(*annotations: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"annotations": {name: text for each in annotations for name, text in each.items()}}}


def test_what_people_said_is_read_in_the_order_in_which_they_said_it() -> None:
    job = body(said(f"{200:020d}-resume"), said(f"{100:020d}-pause"))
    assert [action.verb for action in read_actions(job, "")] == ["pause", "resume"]
    assert [action.verb for action in read_actions(job, f"{100:020d}-pause")] == ["resume"]


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        pytest.param(said("zzz", verb="pause"), "wanted 20 digits", id="an id that sorts after all others"),
        pytest.param(said("100-pause"), "wanted 20 digits", id="an id of too few digits"),
        pytest.param(said(f"{WHEN}-explode"), "propose for its name", id="a verb that nobody knows"),
        pytest.param(said(f"{WHEN}-pause", verb="rollback"), "wanted the verb of its name", id="two verbs"),
        pytest.param(said(f"{WHEN}-propose"), 'wanted the "model"', id="a proposal of nothing"),
        pytest.param({f"{ACTION}{WHEN}-pause": "please"}, "as JSON, saw 'please'", id="no JSON"),
        pytest.param({f"{ACTION}{WHEN}-pause": '{"verb": "pause"}'}, "as JSON", id="nobody said it"),
        pytest.param({f"{ACTION}{WHEN}-pause": "[]"}, "as JSON", id="a list"),
    ],
)
def test_what_cannot_be_understood_is_left_out_said_and_silences_nobody(annotation: dict[str, str], why: str) -> None:
    job = body(annotation, said(f"{200:020d}-resume"))
    assert [action.verb for action in read_actions(job, "")] == ["resume"]
    (sentence,) = not_understood(job)
    assert why in sentence and next(iter(annotation)) in sentence


def test_all_that_can_be_said_is_understood() -> None:
    verbs = ("pause", "resume", "approve", "promote", "rollback")
    job = body(*(said(f"{WHEN}-{verb}") for verb in verbs), said(f"{WHEN}-propose", model="s3://models/mine"))
    assert {action.verb for action in read_actions(job, "")} == {*verbs, "propose"}
    assert not list(not_understood(job))


def test_an_id_that_was_taken_in_and_sorts_after_all_others_silences_nobody() -> None:
    status = observe.api.Status(last_action="zzz")
    healed = observe._with_a_known_action(status, now=1.0)
    later, earlier = f"{2 * 10**9:020d}-pause", f"{10**8:020d}-pause"
    assert earlier < healed.last_action < later
    assert observe._with_a_known_action(healed, now=9.0) == healed


def test_answers_that_nobody_asks_for_any_more_are_forgotten() -> None:
    memory = observe.Memory(asked={"report r1": (10.0, {"arms": []}), "spent 2": (90.0, {"calls": 1})})
    memory.shut = {what: observe.DoorError("observer", "is away") for what in memory.asked}
    memory.forget_answers(before=50.0)
    assert set(memory.asked) == set(memory.shut) == {"spent 2"}


# ---------------------------------------------------------------- doors that take their time
class Door:
    """Answers each question when it is let to."""

    def __init__(self) -> None:
        self.asked = 0
        self.opens = asyncio.Event()

    async def says(self, answer: Any) -> Any:
        self.asked += 1
        await self.opens.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def heard(answer: Any, first: Any = "old") -> tuple[observe.Memory, Door, list[str]]:
    """What is remembered once a door gives a second answer long after a look has asked for it."""
    woken: list[str] = []
    memory, door = observe.Memory(wake=lambda: woken.append("look")), Door()
    door.opens.set()
    await memory.ask("spent", door.says(first))
    assert memory.answer("spent") == first and not woken, "the first answer is waited for, and no news to the look"
    door.opens.clear()
    await memory.ask("spent", door.says(answer))
    await memory.ask("spent", door.says(answer))
    assert (memory.answer("spent"), door.asked) == (first, 2), "one question under way is enough"
    door.opens.set()
    await asyncio.gather(*memory.asking.values(), return_exceptions=True)
    await asyncio.sleep(0)
    return memory, door, woken


async def test_a_look_does_not_wait_for_a_newer_answer_than_it_has() -> None:
    memory, _, woken = await heard("new")
    assert memory.answer("spent") == "new" and woken and not memory.asking


async def test_an_answer_that_is_the_same_wakes_nobody() -> None:
    assert (await heard("old"))[2] == []


async def test_a_door_that_is_found_shut_late_is_said_by_the_look_that_follows() -> None:
    memory, door, woken = await heard(observe.DoorError("proxy", "does not answer."))
    assert memory.answer("spent") == "old" and "spent" in memory.shut and woken
    await memory.ask("spent", door.says("new"))
    assert memory.answer("spent") == "new" and memory.shut == {}


async def test_a_fault_of_ours_in_an_answer_that_came_late_is_met_by_the_look_that_follows() -> None:
    memory, door, woken = await heard(KeyError("spent"))
    assert memory.answer("spent") == "old" and woken
    with pytest.raises(KeyError):
        await memory.ask("spent", door.says(KeyError("spent")))


@pytest.mark.parametrize(
    ("told", "live"),
    [
        pytest.param(None, None, id="no limit of a day"),
        pytest.param({"day": "2026-11-26", "calls": 2, "tokens": 30, "money": "0.5", "left": {"tokens": 7}},
                     api.Live("2026-11-26", 2, 30, 0.5), id="a day's live answers"),
    ],
)  # fmt: skip
def test_the_proxy_says_what_live_answers_have_spent(told: Any, live: api.Live | None) -> None:
    assert observe.live_of(told) == live


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no stop", "no stop."),
        ("is it there?", "is it there?"),
        (
            "rows of t.jsonl: 2 problems:\n  t:1: no query\n  t:2: no answer\nCorrect the file and run again.",
            "rows of t.jsonl: 2 problems: t:1: no query; t:2: no answer. Correct the file and run again.",
        ),
        ("a  b\n\nc.", "a b. c."),
        ("", "."),
    ],
    ids=["a stop is added", "a stop is there", "a list", "two lines", "nothing"],
)
def test_words_become_one_line_that_keeps_what_was_apart(text: str, line: str) -> None:
    assert observe.sentence(text) == line
