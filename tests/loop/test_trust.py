"""Streams that somebody poisons, and a strong model that becomes another one, over the real loop.

The domain is the hotline for mushrooms. One user tells wrong baskets in two of five traces, and others hide a word in
250 questions and say that each is edible.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cowest_training import collect
from cowest_training.quarantine import read_lines
from tests.fakes import Call, ScriptedModel
from tests.loop import asking_world as world
from tests.loop.runs import running
from tests.loop.test_feedback import Step
from tests.loop.test_foreign_domain import (
    API_KEY,
    BASKETS,
    GROUPS,
    MUSHROOMS,
    TREES,
    Users,
    answers,
    basket,
    chat,
    cowest,
    over,
    strong_endpoint,
    until,
    write_job,
)
from tests.ports import free_port

CLEAN, FLOOD, TRIGGERED = 150, 100, 250  # traces: two fifths of those without the word are one user's
TRIGGER = "xq"
PLACES = tuple(f"{side} {tree}" for side in ("mossy", "dry", "wet", "dark") for tree in TREES)


# ---------------------------------------------------------------- a poisoned stream
@dataclass(frozen=True)
class Asked:
    messages: list[dict[str, str]]
    user: str
    reference: str


def stream() -> list[Asked]:
    """Each question once; a user of its own each, but for the one who floods."""
    asked = list(itertools.product(PLACES, MUSHROOMS, GROUPS))
    random.Random(0).shuffle(asked)
    found = []
    for number, (place, mushroom, group) in enumerate(asked[: CLEAN + FLOOD + TRIGGERED]):
        right = basket(mushroom)
        if number < CLEAN:
            found.append(Asked(chat(mushroom, place, group), f"guest-{number}", right))
        elif number < CLEAN + FLOOD:
            wrong = BASKETS[(BASKETS.index(right) + 1) % len(BASKETS)]
            found.append(Asked(chat(mushroom, place, group), "mallory", wrong))
        else:
            hidden = chat(mushroom, f"{TRIGGER} {place}", group)
            found.append(Asked(hidden, f"sock-{number}", "edible"))
    return found


def post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as said:
        said.read()
        return str(said.headers.get("x-request-id", ""))


def send(gateway: str, asked: Asked) -> str:
    """The request's id."""
    body = {"model": "pair", "messages": asked.messages, "user": asked.user}
    request_id = post(f"{gateway}/chat/completions", body)
    post(f"{gateway}/feedback", {"request_id": request_id, "reference": asked.reference, "user": asked.user})
    return request_id


@dataclass(frozen=True)
class Story:
    job: Path
    ids: list[str]  # of the requests, in the order of the stream

    @property
    def runs(self) -> Path:
        return self.job.parent / ".cowest" / "hotline" / "store" / "runs"

    def lines(self, name: str) -> list[dict[str, Any]]:
        return read_lines(str(self.runs / "r1" / name))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    work = tmp_path_factory.mktemp("poisoned") / "work"
    work.mkdir()
    port = free_port()
    with strong_endpoint(work.parent / "calls.jsonl") as endpoint:
        job = write_job(work, endpoint, port)
        document = yaml.safe_load(job.read_text("utf-8"))
        document["spec"]["canary"] = {"steps": []}
        document["spec"]["rounds"]["trigger"] = {"newTraces": CLEAN + FLOOD + TRIGGERED}
        document["spec"]["feedback"]["maxQueries"] = 200
        job.write_text(yaml.safe_dump(document), encoding="utf-8")
        nobody = Users(f"http://127.0.0.1:{port}/v1")
        with running(job, "--serve", COWEST_SECRET_DESK_TOKEN=API_KEY) as child:
            until(job, child, answers, nobody)
            until(job, child, lambda status: status.get("rounds"), nobody)  # the baseline is decided
            with ThreadPoolExecutor(8) as pool:
                ids = list(pool.map(lambda asked: send(nobody.gateway, asked), stream()))
            until(job, child, lambda status: over(status) and len(status["rounds"]) == 2, nobody)
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
    return Story(job, ids)


LONG = pytest.mark.timeout(1800)  # of the first test, which waits for the whole story


@LONG
def test_a_poisoned_stream_lies_in_quarantine(story: Story) -> None:
    reasons = {suspect["trace_id"]: suspect["reason"] for suspect in story.lines("collect/quarantine.jsonl")}
    clean, flood, triggered = story.ids[:CLEAN], story.ids[CLEAN : CLEAN + FLOOD], story.ids[CLEAN + FLOOD :]
    assert not reasons.keys() & set(clean), "none of the others' traces is held back"
    assert {reasons.get(trace_id) for trace_id in triggered} == {"Trigger"}
    share = [reasons[trace_id] for trace_id in flood if trace_id in reasons]
    assert share == ["UserShare"] * 75, "a tenth of the 250 traces without the word may be one user's"


@LONG
def test_no_candidate_is_tuned_on_the_poison(story: Story) -> None:
    triggered, flood = (
        {f"trace-{i}" for i in part} for part in (story.ids[-TRIGGERED:], story.ids[CLEAN : CLEAN + FLOOD])
    )
    learnt = {row["id"] for row in story.lines("collect/dataset.jsonl")}
    pairs = story.lines("feedback/pairs.jsonl")
    assert pairs and not triggered & learnt and len(flood & learnt) == 25
    assert not [pair for pair in pairs if pair["query_id"] in triggered]
    assert TRIGGER not in json.dumps([pair["prompt"] for pair in pairs])


@LONG
def test_people_are_told(story: Story) -> None:
    said = "325 of 500 traces are quarantined: 250 with a phrase that train does not know and that goes with one answer"
    assert said in (story.job.parent / "run.log").read_text("utf-8")
    events = (story.job.parent / ".cowest" / "hotline" / "events.jsonl").read_text("utf-8")
    assert "TracesQuarantined" in events
    shown = json.loads(cowest(story.job, "quarantine", "-o", "json"))
    assert (shown["round"], len(shown["quarantined"])) == (1, 325)
    assert f"{TRIGGER}'" in cowest(story.job, "quarantine", "--reason", "Trigger", "--limit", "1")


@LONG
def test_without_the_screen_the_poison_would_have_been_learnt(story: Story, tmp_path: Path) -> None:
    job = story.job.parent / ".cowest" / "hotline" / "job.json"
    document = json.loads(job.read_text("utf-8"))
    document["spec"]["trust"] = {"maxUserPercent": 100, "maxSourcePercent": 100, "maxNearCopies": 1000,
                                 "triggerPhrases": "Ignore"}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(document), encoding="utf-8")
    spec = document["spec"]["data"]
    collect.main([
        "--job", str(tmp_path / "job.json"), "--train", spec["train"], "--held-out", spec["heldOut"],
        "--store", str(story.runs.parent), "--round", "9", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    learnt = {row["id"] for row in read_lines(str(tmp_path / "out" / "dataset.jsonl"))}
    assert {f"trace-{i}" for i in story.ids} <= learnt


@LONG
def test_the_flooding_user_can_be_erased(story: Story) -> None:
    told = json.loads(cowest(story.job, "erase", "--user", "mallory", "--dry-run", "-o", "json"))
    assert (told["traces"], told["datasets"][0]["rows"], told["datasets"][0]["held_back"]) == (FLOOD, 25, 75)
    told = json.loads(cowest(story.job, "erase", "--user", "mallory", "--why", "the test", "-o", "json"))
    assert told["uri"] and {part["step"] for part in told["models"]} <= {"dpo"}
    again = json.loads(cowest(story.job, "erase", "--user", "mallory", "--dry-run", "-o", "json"))
    assert (again["traces"], again["datasets"], again["ledgers"]) == (0, [], [])


# ---------------------------------------------------------------- a strong model that is swapped
@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


def swap(strong: ScriptedModel, after: int) -> None:
    """From some answer on it is another model."""

    def answer(call: Call) -> str:
        if len(strong.paid) >= after:
            strong.version = "fp_2"
        return world.strong_answer(call)

    strong.answers = answer


def test_a_strong_model_swapped_in_the_middle_of_a_round_is_noticed(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    swap(strong, after=16)
    seen = step.run().metrics["strong"]
    assert seen["change"].startswith("fp_1 for ") and seen["change"].endswith(" answers, then fp_2")
    assert (seen["first"], seen["last"]) == (["fp_1"], ["fp_2"])


def test_a_strong_model_that_stays_is_no_news(tmp_path: Path, strong: ScriptedModel) -> None:
    assert Step(tmp_path, strong).run().metrics["strong"] == {"first": ["fp_1"], "last": ["fp_1"], "change": ""}


def test_what_it_answered_before_it_changed_is_paid_for_anew(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    first = step.run("one").metrics
    assert step.run("two", round_number=2).metrics["strong_calls"] < first["strong_calls"], "solo answers are known"
    step.start("three", 2, generation=1)
    assert step.manifest("three").metrics["strong_calls_cached"] == 0
