"""`cowest run` end to end: real processes, a tiny weak model, a strong model behind HTTP."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import Call, ScriptedModel
from tests.loop.runs import COWEST, running
from tests.loop.tiny_models import make_model
from tests.ports import free_port

WORDS = [f"w{i}" for i in range(40)]
MAX_CONCURRENCY = 16  # strong.maxConcurrency where a manifest has none
pytestmark = pytest.mark.timeout(1000)  # a run takes a minute on two idle cores, and much longer beside other work


def strong(call: Call) -> str:
    """Right when the draft names the word of the question, else wrong: a draft can only help."""
    word = call.last.split()[1]
    return f"it is {word}" if f"note {word}" in call.last else "it is unknown"


def write_job(folder: Path, endpoint: str, **sections: Any) -> Path:
    rows = [
        {"id": f"q{i}", "query": f"name {word}", "reference": f"it is {word}", "explanation": f"note {word}"}
        for i, word in enumerate(WORDS)
    ]
    held_out = [{"id": f"h{i}", "query": f"name {w} again", "reference": f"it is {w}"} for i, w in enumerate(WORDS)]
    for name, part in (("train", rows), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    make_model(folder / "base", [f"name {w} again note {w} it is unknown" for w in WORDS])
    spec: dict[str, Any] = {
        "weak": {"model": "file://base"},
        "strong": {"endpoint": endpoint, "model": "strong-1", "maxRetries": 1, "timeoutSeconds": 60},
        "collaboration": {
            "draftMaxTokens": 8,
            "prompts": {"draft": "{query}", "refine": "{query} | {draft}", "solo": "{query}"},
        },
        "data": {"train": "file://train.jsonl", "heldOut": "file://held_out.jsonl"},
        "feedback": {"evaluator": {"type": "ExactMatch"}, "draftsPerQuery": 2, "minPairs": 1},
        "training": {
            "maxLength": 32,
            "supervised": {"tuning": "Full", "epochs": 1, "learningRate": "0.01", "batchSize": 8},
            "preference": {"tuning": "Full", "epochs": 1, "learningRate": "0.0001", "batchSize": 8},
        },
        "rounds": {"max": 0},
        "gate": {"minHeldOut": 10},
        "canary": {"steps": []},
        "gateway": {"port": free_port()},
    }
    for name, changes in sections.items():
        spec[name] = {**spec.get(name, {}), **changes}
    document = {
        "apiVersion": "cowest.dev/v1alpha1",
        "kind": "CollaborationJob",
        "metadata": {"name": "desk"},
        "spec": spec,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(job: Path, seconds: float = 400) -> tuple[int, str]:
    with running(job, OMP_NUM_THREADS="1") as child:
        code = child.wait(seconds)
    return code, (job.parent / "run.log").read_text()


def status(job: Path) -> dict[str, Any]:
    path = job.parent / ".cowest" / "desk" / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def until(wanted: Any, child: subprocess.Popen[bytes], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        assert child.poll() is None, "cowest run ended"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def paid(endpoint: ScriptedModel) -> int:
    """Without the one token that a first run asks for, to see whether somebody is there."""
    return sum(call.body.get("max_tokens") != 1 for call in endpoint.calls)


@pytest.fixture
def endpoint() -> Iterator[ScriptedModel]:
    with ScriptedModel(answers=strong).in_thread() as server:
        yield server


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ScriptedModel]]:
    """A job whose strong endpoint was down at first, and that has run to its end since."""
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder, "http://127.0.0.1:9/v1")
    code, log = run(job)
    assert code == 75, log
    assert "127.0.0.1:9" in log
    with ScriptedModel(answers=strong).in_thread() as server:
        write_job(folder, server.url, gateway={"port": free_port()})
        code, log = run(job)
        assert code == 0, log
        yield job, server


def test_the_baseline_runs_to_a_decision_after_an_endpoint_that_was_down(finished):
    job, endpoint = finished
    first = status(job)
    assert [r["number"] for r in first["rounds"]] == [0]
    assert {c["type"]: c["reason"] for c in first["conditions"]}["RoundProgressing"] == "MaxRoundsReached"
    assert first["stable"]["weakDigest"].startswith("sha256:")
    assert first["budget"]["calls"] == first["budget"]["round"]["calls"] == paid(endpoint)


def test_a_rerun_repeats_nothing(finished):
    job, endpoint = finished
    first, calls = status(job), paid(endpoint)
    code, log = run(job)
    assert code == 0, log
    assert status(job)["rounds"] == first["rounds"]
    assert paid(endpoint) == calls, "a rerun asks nothing that was answered"


def test_while_one_runs_a_second_is_refused_and_after_an_interruption_it_goes_on(tmp_path, endpoint):
    job = write_job(tmp_path, endpoint.url)
    with running(job, OMP_NUM_THREADS="1") as child:
        until(lambda: status(job).get("candidate"), child)
        second = subprocess.run([*COWEST, "run", "-f", str(job)], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another `cowest run`" in second.stderr
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    assert "run the same command again" in (tmp_path / "run.log").read_text()
    code, log = run(job)
    assert code == 0, log


def test_killed_with_calls_under_way_it_goes_on_and_no_answer_is_paid_for_twice(tmp_path, endpoint):
    """`make bench-kill` does the same at 20 random moments of a job with rounds and a canary."""

    def then_hold(call: Call) -> str:
        if len(endpoint.paid) == 20:
            endpoint.gate.clear()
        return strong(call)

    endpoint.answers = then_hold
    job = write_job(tmp_path, endpoint.url, training={"sft": "Never"})
    with running(job, OMP_NUM_THREADS="1") as child:
        until(lambda: not endpoint.gate.is_set() and len(endpoint.calls) > len(endpoint.paid), child)
        child.kill()
        child.wait(60)
    received = {call.key for call in endpoint.paid}
    endpoint.answers = strong
    endpoint.gate.set()
    code, log = run(job)
    assert code == 0, log
    assert [r["number"] for r in status(job)["rounds"]] == [0]
    paid_for = [call for call in endpoint.paid if call.body.get("max_tokens") != 1]
    asked_for = Counter(json.dumps(call.body["messages"]) for call in paid_for)
    assert max(asked_for.values()) == 1, "the same question under another key would be charged anew"
    again = Counter(call.key for call in endpoint.calls)
    assert sum(count - 1 for count in again.values()) <= MAX_CONCURRENCY, "those under way at the kill, with their keys"
    assert sum(again[key] for key in received) - len(received) <= MAX_CONCURRENCY


def test_a_port_in_use_is_one_clear_sentence(tmp_path, endpoint):
    taken = int(endpoint.url.rsplit(":", 1)[1].split("/")[0])
    job = write_job(tmp_path, endpoint.url, gateway={"port": taken})
    code, log = run(job)
    assert code == 2
    assert f"port {taken} is in use" in log
    assert not endpoint.calls, "nothing is asked before"


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        pytest.param(401, 2, "No API key was sent.", id="it wants a key"),
        pytest.param("garbage", 75, "instead of a chat completion", id="something else answers"),
    ],
)
def test_a_strong_endpoint_that_fails_half_way_ends_the_run_and_a_rerun_goes_on(tmp_path, endpoint, fault, code, says):
    job = write_job(tmp_path, endpoint.url, training={"sft": "Never"}, strong={"maxRetries": 0})
    endpoint.faults += [None] * 21 + [fault] * 1000
    seen, log = run(job)
    assert seen == code and says in log, log
    assert status(job)["candidate"]["done"]["publish"], "what was done is kept"
    endpoint.faults.clear()
    before = paid(endpoint)
    seen, log = run(job)
    assert seen == 0, log
    assert status(job)["budget"]["calls"] < before + paid(endpoint), "the 20 answers are not paid again"
    assert status(job)["budget"]["calls"] == 20 + paid(endpoint) - before
