"""The whole loop as a stranger uses it: a domain, a family of models and a strong endpoint that the demo has not.

A hotline for mushrooms. Each chat names a mushroom in its first turn, and its answer is one of three baskets; which
mushroom belongs in which is made up here, and only the weak model is ever taught it. The strong model goes by drafts
that are `surely` of one basket, and leaves those that say `perhaps`. Who writes of calls on the phone mostly hedges:
that is what a round of preferences has to mend.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.loop.runs import COWEST, running
from tests.ports import free_port

BASKETS = ("edible", "toxic", "deadly")
MUSHROOMS = ("bolavis", "coretus", "lepimma", "rusolus", "triulina", "amydon", "panavis", "galetus", "inimma")
TREES = ("oak", "fern", "birch", "larch", "beech", "alder", "hazel", "maple", "willow", "poplar")
PLACES = tuple(f"{side} {tree}" for side in ("old", "young") for tree in TREES)
OTHER_PLACES = tuple(f"{side} {tree}" for side in ("fallen", "hollow") for tree in TREES)
HELD_OUT, OF_USERS = OTHER_PLACES[:17], OTHER_PLACES[17:]
GROUPS = ("counter", "phone")
LEARNT_HEDGE = {"counter": 0.1, "phone": 0.8}
API_KEY = "sk-foreign-5f1c0de5ecret"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
pytestmark = pytest.mark.timeout(1800)  # of the first test, which waits for the whole story
PATIENCE = 1200.0  # seconds that a busy machine may take for one stage


# ---------------------------------------------------------------- what a stranger brings
def basket(mushroom: str) -> str:
    return BASKETS[MUSHROOMS.index(mushroom) % len(BASKETS)]


def chat(mushroom: str, place: str, group: str) -> list[dict[str, str]]:
    """The mushroom stands in the first turn: who looks at the last one alone cannot know."""
    opening = {"role": "user", "content": f"I found a {mushroom} by the {place} ."}
    if group == "counter":
        return [opening, {"role": "assistant", "content": "I see it."}, {"role": "user", "content": "Which basket?"}]
    return [
        {"role": "system", "content": "You answer a hotline for mushrooms."},
        opening,
        {"role": "assistant", "content": "What shall I look up?"},
        {"role": "user", "content": "Which basket is it for?"},
    ]


def make_rows(places: Sequence[str], chance: random.Random | None = None) -> list[dict[str, Any]]:
    """`chance` decides how the explanations hedge; without it there are none."""
    rows: list[dict[str, Any]] = []
    for number, (mushroom, place) in enumerate(itertools.product(MUSHROOMS, places)):
        group = GROUPS[(number + number // len(places)) % 2]
        row = {"id": number, "messages": chat(mushroom, place, group), "reference": basket(mushroom), "group": group}
        if chance:
            word = "perhaps" if chance.random() < LEARNT_HEDGE[group] else "surely"
            row["explanation"] = f"{word} {basket(mushroom)}"
        rows.append(row)
    return rows


def train_tokenizer(rows: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    texts = [message["content"] for row in rows for message in row["messages"]]
    texts += ["\n\nExplain step by step what matters here, then give your answer."] * 20
    texts += [f"{word} {name}" for word in ("surely", "perhaps") for name in BASKETS] * 20
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """With more embeddings than tokens, as published ones have: their families' loaders add tokens of their own."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
        eos_token_id=0, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_job(folder: Path, endpoint: str, port: int) -> Path:
    train = make_rows(PLACES, random.Random(0))
    pq.write_table(pa.Table.from_pylist(train), folder / "chats.parquet")
    held_out = [json.dumps(row) for row in make_rows(HELD_OUT)]
    (folder / "held_out.jsonl").write_text("\n".join(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(train)
    make_model(folder / "base", tokenizer, seed=0)
    make_model(folder / "colleague", tokenizer, seed=1)
    stage = {"tuning": "Full", "batchSize": 16}
    spec = {
        "weak": {"model": "file://base"},
        "strong": {
            "endpoint": endpoint,
            "model": "mycologist",
            "apiKeySecretRefs": [{"name": "desk", "key": "token"}],
            "prices": {"inputPerMillionTokens": "2", "outputPerMillionTokens": "6", "currency": "EUR"},
        },
        "collaboration": {"draftMaxTokens": 8},
        "data": {"train": "file://chats.parquet", "heldOut": "file://held_out.jsonl"},
        "feedback": {"evaluator": {"type": "Choice", "choices": list(BASKETS)}, "minPairs": 10},
        "training": {
            "maxLength": 96,
            "supervised": {**stage, "epochs": 6, "learningRate": "0.005"},
            "preference": {**stage, "epochs": 3, "learningRate": "0.0003", "nllWeight": "1"},
        },
        "rounds": {"max": 1},
        "gate": {"minHeldOut": 60},
        "canary": {"steps": [{"weightPercent": 50, "minAnswers": 20}]},
        "gateway": {"port": port},
    }
    document = {"apiVersion": "cowest.dev/v1alpha1", "kind": "CollaborationJob", "metadata": {"name": "hotline"},
                "spec": spec}  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


# ---------------------------------------------------------------- who takes part
@contextmanager
def strong_endpoint(calls: Path) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("foreign_strong.py")), str(calls)]
    environment = {**os.environ, "FOREIGN_KEY": API_KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(child.stdout.readline())}/v1"
        finally:
            child.kill()


def cowest(job: Path, verb: str, *arguments: str) -> str:
    said = subprocess.run([*COWEST, verb, *arguments, "-f", str(job)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return said.stdout


def live_chat(number: int) -> tuple[list[dict[str, str]], str]:
    """What the n-th user asks, and what turns out to be right."""
    mushroom = MUSHROOMS[number % len(MUSHROOMS)]
    return chat(mushroom, OF_USERS[number % len(OF_USERS)], GROUPS[number % 2]), basket(mushroom)


class Users(threading.Thread):
    """They ask from time to time, and an application tells much later which basket was right."""

    LATER = 6  # answers until the reference of one is known
    SELDOM, OFTEN = 0.5, 0.05  # seconds between questions; often in a canary, for the sake of the test's time

    def __init__(self, gateway: str) -> None:
        super().__init__(daemon=True)
        self.gateway, self.over = gateway, threading.Event()
        self.answered: list[str] = []  # request ids
        self.durable = 0  # of these
        self.trouble = ""
        self.pause = self.SELDOM

    def run(self) -> None:
        waiting: deque[tuple[str, str]] = deque()
        with openai.OpenAI(base_url=self.gateway, api_key="any", max_retries=0) as client:
            for number in itertools.count():
                if self.over.is_set():
                    break
                try:
                    waiting.append(self._ask(client, number))
                    if len(waiting) > self.LATER:
                        self._tell(*waiting.popleft())
                except (openai.OpenAIError, OSError, AssertionError) as error:
                    self.trouble = f"question {number}: {error!r}"
                    break
                self.over.wait(self.pause)

    def _ask(self, client: openai.OpenAI, number: int) -> tuple[str, str]:
        asked: Any
        asked, reference = live_chat(number)
        raw = client.chat.completions.with_raw_response.create(model="pair", messages=asked, user=f"guest-{number}")
        assert str(raw.parse().choices[0].message.content).startswith("Into the basket: ")
        self.durable += raw.headers.get("x-cowest-trace") == "durable"  # not while the disk is slow
        self.answered.append(raw.headers["x-request-id"])
        return self.answered[-1], reference

    def _tell(self, request_id: str, reference: str) -> None:
        data = json.dumps({"request_id": request_id, "reference": reference}).encode()
        headers = {"content-type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.gateway}/feedback", data, headers), timeout=30
        ) as said:
            assert said.status == 200


# ---------------------------------------------------------------- the story
@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything once; the tests below look at what it left."""
    folder = tmp_path_factory.mktemp("hotline")
    work = folder / "work"
    work.mkdir()
    port = free_port()
    with strong_endpoint(folder / "calls.jsonl") as endpoint:
        job = write_job(work, endpoint, port)
        cowest(job, "validate")
        with running(job, "--serve", COWEST_SECRET_DESK_TOKEN=API_KEY) as child:
            users = Users(f"http://127.0.0.1:{port}/v1")
            until(job, child, lambda s: answers(s), users)
            users.start()
            until(job, child, lambda s: over(s) and len(s["rounds"]) == 2, users)
            cowest(job, "propose", "--model", str(work / "colleague"), "--by", "ann", "--why", "it looks good to me")
            until(job, child, lambda s: over(s) and len(s["rounds"]) == 3, users)
            users.over.set()
            users.join(60)
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
    assert not users.trouble
    return Story(job, users, [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()])


class Story:
    def __init__(self, job: Path, users: Users, calls: list[dict[str, Any]]) -> None:
        self.job, self.work, self.users, self.calls = job, job.parent, users, calls
        self.home = self.work / ".cowest" / "hotline"
        self.seen = json.loads(cowest(job, "status", "-o", "json"))["status"]
        self.paid = [call for call in calls if call["status"] == 200]

    def traces(self) -> list[dict[str, Any]]:
        return self.rows_of("traces")

    def rows_of(self, records: str) -> list[dict[str, Any]]:
        """As a stranger reads them: plain Parquet."""
        files = sorted((self.home / "store" / records).rglob("*.parquet"))
        return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def until(job: Path, child: subprocess.Popen[bytes], wanted: Callable[[dict[str, Any]], Any], users: Users) -> None:
    path, deadline = job.parent / ".cowest" / "hotline" / "status.json", time.monotonic() + PATIENCE
    while not wanted(status := json.loads(path.read_text("utf-8")) if path.exists() else {}):
        said = (job.parent / "run.log").read_text("utf-8")
        assert child.poll() is None and condition(status, "Degraded").get("status") != "True", said
        assert not users.trouble, users.trouble
        assert time.monotonic() < deadline, f"it took too long: {said}"
        users.pause = users.OFTEN if status.get("candidate", {}).get("stage") == "Canary" else users.SELDOM
        time.sleep(0.1)


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def answers(status: dict[str, Any]) -> bool:
    return condition(status, "Ready").get("status") == "True"


def over(status: dict[str, Any]) -> bool:
    return "candidate" not in status and condition(status, "RoundProgressing").get("reason") == "MaxRoundsReached"


# ---------------------------------------------------------------- what it must have come to
def test_each_candidate_is_decided_by_what_it_brings(story: Story) -> None:
    decided = [(r["origin"], r["decision"], r["reason"]) for r in story.seen["rounds"]]
    assert decided == [
        ("Baseline", "Promoted", "BetterOfflineAndLive"),
        ("Round", "Promoted", "BetterOfflineAndLive"),
        ("Proposal", "Refused", "NoMeasurableGain"),
    ]
    baseline, tuned, _ = story.seen["rounds"]
    assert tuned["pairs"] >= 10
    assert int(baseline["liveAnswers"]) >= 20 and int(tuned["liveAnswers"]) >= 20
    assert float(baseline["score"]) < float(tuned["score"]), "drafts that hedge were what the round had to mend"
    assert story.seen["stable"]["weakUri"].endswith("/runs/r1/dpo")


def test_the_steps_spent_what_the_endpoint_gave_them(story: Story) -> None:
    usage = [call["said"]["usage"]["total_tokens"] for call in story.paid]
    live = story.traces()
    first = story.paid[0]
    assert first["asked"]["max_tokens"] == 1, "one token, to see whether somebody is there"
    budget = story.seen["budget"]
    assert budget["calls"] == len(story.paid) - len(live) - 1
    tokens = sum(t["strong_input_tokens"] + t["strong_output_tokens"] for t in live)
    assert budget["tokens"] == sum(usage) - tokens - first["said"]["usage"]["total_tokens"]
    assert f"{budget['calls']} calls, {budget['tokens']} tokens, " in cowest(story.job, "status")


def test_no_call_is_paid_twice_and_a_busy_endpoint_is_waited_for(story: Story) -> None:
    assert all(call["key"] for call in story.calls)
    assert max(Counter(call["key"] for call in story.paid).values()) == 1
    faults = [call for call in story.calls if call["status"] != 200]
    assert {call["status"] for call in faults} == {429, 500}, "else this says nothing"
    paid_at = {call["key"]: call["at"] for call in story.paid}
    assert all(paid_at[call["key"]] > call["at"] for call in faults), "each was asked again"
    assert all(paid_at[call["key"]] >= call["at"] + 1 for call in faults if call["status"] == 429), "Retry-After: 1"


def test_the_strong_model_is_asked_the_whole_chat_and_told_no_answer(story: Story) -> None:
    for call in story.paid[1:]:
        asked = call["asked"]
        *before, last = asked["messages"]
        assert any("I found a" in message["content"] for message in before)
        question, _, draft = last["content"].partition("<draft>\n")
        said = " ".join([*(message["content"] for message in before), question, draft.partition("\n</draft>")[2]])
        assert not any(name in said for name in BASKETS), "only a draft may name a basket"
        assert asked["model"] == "mycologist" and not {"reference", "metadata"} & set(asked)
    assert any(call["asked"]["messages"][0]["role"] == "system" for call in story.paid[1:])


def test_the_key_is_in_no_file_and_no_log(story: Story) -> None:
    files = [path for path in story.work.rglob("*") if path.is_file()]
    assert [path for path in files if API_KEY.encode() in path.read_bytes()] == []
    tables = [pq.ParquetFile(path).read() for path in files if path.suffix == ".parquet"]  # compressed
    assert tables and not any(API_KEY in str(table.to_pylist()) for table in tables)


def test_traces_hold_what_was_asked_drafted_and_answered_and_the_late_reference(story: Story) -> None:
    traces = {trace["trace_id"]: trace for trace in story.traces()}
    assert set(traces) == set(story.users.answered) and story.users.durable
    for number, request_id in enumerate(story.users.answered):
        trace = traces[request_id]
        assert json.loads(trace["messages"]) == live_chat(number)[0]
        assert trace["status"] == "ok" and trace["answer"].startswith("Into the basket: ")
        assert bool(trace["draft"]) is (trace["mode"] == "Pair")
    told = {row["trace_id"]: row["reference"] for row in story.rows_of("feedback")}
    wanted = {id_: live_chat(n)[1] for n, id_ in enumerate(story.users.answered)}
    assert told and told == {id_: wanted[id_] for id_ in told}
    assert len(told) >= len(wanted) - Users.LATER


def test_models_and_data_have_cards_and_weights_are_safetensors_alone(story: Story) -> None:
    runs = story.home / "store" / "runs"
    models = sorted(str(file.parent.relative_to(runs)) for file in runs.rglob("*.safetensors"))
    assert models == ["r0/sft", "r1/dpo", "r2/publish"]
    for name in (*models, "r1/collect", "r1/feedback"):
        card, made = (
            (runs / name / "README.md").read_text("utf-8"),
            json.loads((runs / name / "manifest.json").read_text()),
        )
        assert made["digest"] in card
    pickles = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
    assert [path for path in story.work.rglob("*") if path.suffix in pickles] == []


def test_an_answer_leads_back_to_its_draft_its_models_and_their_data(story: Story) -> None:
    digest = story.seen["stable"]["weakDigest"]
    asked = next(t for t in reversed(story.traces()) if t["weak_digest"] == digest and t["mode"] == "Pair")
    found = json.loads(cowest(story.job, "lineage", asked["trace_id"], "-o", "json"))
    assert found["answer"]["draft"] == asked["draft"] and found["answer"]["answer"] == asked["answer"]
    assert {"dpo", "feedback", "collect", "sft"} <= {part["step"] for part in found["models"]}


def test_the_report_tells_the_same_story(story: Story) -> None:
    page = story.work / "report.html"
    told = json.loads(cowest(story.job, "report", "--html", str(page), "-o", "json"))
    assert [r["decision"] for r in told["rounds"]] == ["Promoted", "Promoted", "Refused"]
    assert told["arms"]["solo"]["accuracy"] < told["arms"]["sft"]["accuracy"] < told["arms"]["final"]["accuracy"]
    assert told["spent"]["calls"] == story.seen["budget"]["calls"]
    text = page.read_text("utf-8")
    assert "hotline" in text and "mycologist" in text
