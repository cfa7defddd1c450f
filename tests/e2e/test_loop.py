"""The freight desk on a real cluster: one Helm release, live traffic all the time, promoted and rolled back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from tests.e2e.conftest import (
    COWEST,
    EXAMPLE,
    JOB,
    LAST_WORDS,
    NAMESPACE,
    REGISTRY,
    ROOT,
    TAG,
    Desk,
    forwarded,
    freight_spec,
    kubectl,
    run,
    wait_for,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
RATE = 5  # questions a second, from Ready to the end


def values() -> dict[str, Any]:
    """For the chart; tests bring the object store."""
    spec = freight_spec("cowest", NAMESPACE)
    spec["objectStore"] = {"endpoint": f"http://minio.{NAMESPACE}.svc:9000", "bucket": "cowest", "prefix": "desks",
                           "region": "us-east-1", "credentialsSecretRef": {"name": "store"}}  # fmt: skip
    return {
        "name": JOB,
        "job": spec,
        "image": {"registry": REGISTRY, "tag": TAG},
        "networkPolicy": {"enabled": False},  # tests reach MinIO and the stand-in from outside of the job
    }


@contextmanager
def traffic(desk: Desk, url: str) -> Iterator[subprocess.Popen[str]]:
    data = desk.folder / "data" / "live.jsonl"
    command = [*COWEST, "send", "--data", str(data), "--url", url, "--rate", str(RATE), "--repeat", "-o", "json",
               "--seconds", "1500"]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()


def gateway_address(job: str = JOB) -> str:
    """From the node itself a Service's own address is there; from elsewhere a port-forward does."""
    return kubectl("get", "service", f"{job}-gateway", "-o", "jsonpath={.spec.clusterIP}").strip()


def answers(url: str) -> bool:
    return bool(mode_of_answer(url))


def mode_of_answer(url: str, question: str = "hello") -> str:
    """What made the answer to a question, as its header says; "" where there is no answer."""
    import urllib.error
    import urllib.request

    body = json.dumps({"model": "pair", "messages": [{"role": "user", "content": question}]}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.headers["x-cowest-mode"]) if answer.status == 200 else ""
    except (urllib.error.URLError, OSError):
        return ""


def bad_model(desk: Desk) -> str:
    """A model that is right on every held-out question and wrong on live ones."""
    stable = desk.status()["stable"]["weakUri"]
    folder = desk.folder / "stable"
    code = "import sys; from cowest_serving import store; store.download(sys.argv[1], sys.argv[2])"
    run(sys.executable, "-P", "-c", code, stable, str(folder), **desk.store)
    model = desk.folder / "live-bad"
    run(sys.executable, str(EXAMPLE / "bad_candidates.py"), "--kind", "live-bad", "--stable", str(folder), "--data",
        str(desk.folder / "data"), "--out", str(model), "--seed", "0", OMP_NUM_THREADS="1")  # fmt: skip
    run(*COWEST, "upload", str(model), "s3://cowest/proposed/live-bad", **desk.store)
    return "s3://cowest/proposed/live-bad"


def propose(desk: Desk, model: str) -> None:
    say(desk, "propose", model=model)


def say(desk: Desk, verb: str, **more: str) -> None:
    said = {"verb": verb, "by": "colleague", "why": "it may be better", "at": time.time(), **more}
    name = f"cowest.dev/action.{time.time_ns():020d}-{verb}"
    patch = {"metadata": {"annotations": {name: json.dumps(said)}}}
    kubectl("patch", "collaborationjob", JOB, "--type=merge", "-p", json.dumps(patch))


def trial_reaches_its_end(desk: Desk, number: int, seconds: float) -> float:
    """Marks its server's and its canary's steps on the way."""
    marked: set[str] = set()

    def over() -> bool:
        status = desk.status()
        trial, percent = status.get("candidate") or {}, (status.get("traffic") or {}).get("candidatePercent", 0)
        if trial.get("stage") == "Canary" and percent and f"{percent} %" not in marked:
            if not marked:
                desk.mark(f"round {number}: candidate Ready", seconds_since_ready(trial["weakDigest"]))
            marked.add(f"{percent} %")
            desk.mark(f"round {number}: canary at {percent} %")
        return ended(desk, number) is not None

    wait_for(over, f"the end of round {number}", seconds)
    return desk.mark(f"round {number}: {ended(desk, number)['decision']}")  # type: ignore[index]


def seconds_since_ready(weak_digest: str) -> float:
    """Since the InferenceService of this weak model says that it is."""
    found = json.loads(kubectl("get", "inferenceservices", "-o", "json"))["items"]
    served = [each for each in found if weak_digest in json.dumps(each["spec"]) + json.dumps(each["metadata"])]
    ready = [
        c for each in served for c in each["status"]["conditions"] if c["type"] == "Ready" and c["status"] == "True"
    ]
    since = max(datetime.fromisoformat(c["lastTransitionTime"]) for c in ready)
    return (datetime.now(UTC) - since).total_seconds()


@contextmanager
def weights_shown() -> Iterator[dict[int, float]]:
    """When each version of the routing was shown here, in epoch seconds; the first one is older than that."""
    watch = ["kubectl", "--namespace", NAMESPACE, "get", "configmap", f"{JOB}-routing", "--watch", "-o",
             r'jsonpath={.data.routing\.json}{"\n"}']  # fmt: skip
    child = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True)
    shown: dict[int, float] = {}

    def follow(lines: IO[str]) -> None:
        for line in lines:
            shown.setdefault(json.loads(line)["version"], time.time())

    assert child.stdout is not None
    following = threading.Thread(target=follow, args=(child.stdout,), daemon=True)
    following.start()
    try:
        yield shown
    finally:
        child.terminate()
        following.join(10)


FIRST_ANSWERS = """
import json, sys
from cowest_serving.traces import read_columns
first = {}
for row in read_columns(sys.argv[1], ("routing_version", "draft_ms", "answer_ms")).to_pylist():
    answered = row["time"].timestamp() + ((row["draft_ms"] or 0) + (row["answer_ms"] or 0)) / 1000
    first[row["routing_version"]] = min(answered, first.get(row["routing_version"], answered))
print(json.dumps(first))
"""


def weights_ms(desk: Desk, shown: Mapping[int, float]) -> int | None:
    """The longest time from weights in the API server to the first answer by them, by the records of the gateway.

    With 5 questions a second: a fifth of a second, and an answer's own time, are in it.
    """
    told = run(sys.executable, "-P", "-c", FIRST_ANSWERS, f"s3://cowest/desks/{NAMESPACE}/{JOB}", **desk.store)
    answered = {int(version): at for version, at in json.loads(told).items()}
    took = {version: answered[version] - at for version, at in list(shown.items())[1:] if version in answered}
    print({version: f"{1000 * seconds:.0f} ms" for version, seconds in took.items()}, flush=True)
    return round(1000 * max(took.values())) if took else None


def ended(desk: Desk, number: int) -> dict[str, Any] | None:
    return next((r for r in desk.rounds() if r["number"] == number), None)


def test_one_release_is_served_tuned_promoted_and_a_bad_candidate_rolled_back(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values()))
    desk.begun = time.monotonic()
    run("helm", "upgrade", "--install", "freight", str(ROOT / "charts" / "cowest-domain"), "--namespace", NAMESPACE,
        "-f", str(tmp_path / "values.yaml"))  # fmt: skip
    desk.mark("applied")
    wait_for(lambda: desk.condition("Ready").get("status") == "True", "Ready", 240)
    ready = desk.mark("Ready")
    url = f"http://{gateway_address()}/v1"
    with forwarded(f"{JOB}-gateway", 80) as port:
        url = url if answers(url) else f"http://127.0.0.1:{port}/v1"
        wait_for(lambda: answers(url), "the first answer", 30)
        first_answer = desk.mark("first answer")
        with traffic(desk, url) as sending, weights_shown() as shown:
            wait_for(desk.has_traces, "traces in the object store", 120)
            desk.mark("traces in MinIO")
            trial_reaches_its_end(desk, 0, 600)
            wait_for(lambda: desk.status().get("candidate", {}).get("origin") == "Round", "a round", 60)
            begun = desk.mark("round 1 started")
            promoted = trial_reaches_its_end(desk, 1, 900)
            assert ended(desk, 1)["decision"] == "Promoted", ended(desk, 1)  # type: ignore[index]
            propose(desk, bad_model(desk))
            desk.mark("bad candidate proposed")
            rolled_back = trial_reaches_its_end(desk, 2, 600)
            assert ended(desk, 2)["decision"] == "RolledBack", ended(desk, 2)  # type: ignore[index]
            events = kubectl("get", "events", "--field-selector", "involvedObject.kind=CollaborationJob",
                             "--sort-by", ".lastTimestamp")  # fmt: skip
            print(kubectl("get", "cwj", "-o", "wide"), kubectl("describe", "cwj"), events, sep="\n")
            sending.terminate()
            said = sending.communicate(timeout=60)[0]
        in_time = weights_ms(desk, shown)
    counts = json.loads(said.strip().splitlines()[-1])
    requests = sum(n for name, n in counts.items() if not name.startswith("feedback"))
    failed = sum(n for name, n in counts.items() if name.startswith(("status", "failed")))
    result = {
        "ready_s": round(ready, 1), "first_answer_s": round(first_answer, 1), "round_s": round(promoted - begun, 1),
        "promoted_s": round(promoted, 1), "rolled_back_s": round(rolled_back, 1), "failed_requests": failed,
        "requests": requests, "weights_ms": in_time,
    }  # fmt: skip
    LAST_WORDS.append(json.dumps(result))
    assert failed == 0, counts
    assert in_time is not None, "no answer came by any of the weights that were written meanwhile"
