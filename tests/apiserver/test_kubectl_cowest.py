"""`cowest VERB JOB` and `kubectl cowest`: what people ask and say of a job in a cluster, against a real API server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cowest_cli import main as cli
from cowest_cli.cluster import ACTION, Job, Seen
from cowest_cli.options import Where
from cowest_serving import store
from cowest_serving.traces import TraceWriter
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK, EXIT_RETRY, Manifest
from cowest_training.steps import manifest_json
from tests import world as w
from tests.apiserver.conftest import JOBS
from tests.apiserver.playground import NAMESPACE, Playground, apply, decisions, manifest_of
from tests.contracts.test_store_s3 import endpoint  # noqa: F401  (a fixture)
from tests.loop.ledger_world import write_round
from tests.ports import free_port

RESTING = {"rounds": {"max": 1, "trigger": {"newTraces": 5}}}  # after its baseline the job waits for traces
RBAC = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cowest(playground: Playground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the entry point in this process, by the test server's kubeconfig."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments: str, kubeconfig: Path | None = None) -> Said:
        where = ("--kubeconfig", str(kubeconfig or playground.kubeconfig))
        monkeypatch.setattr(sys, "argv", ["kubectl-cowest", *arguments, *where])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = Said(int(ended.value.code or 0), *capsys.readouterr())
        assert "Traceback" not in said.err
        return said

    return call


def said_of(playground: Playground, name: str = "claims") -> dict[str, Any]:
    """What lies at the job, by verb."""
    noted = playground.job(name)["metadata"].get("annotations") or {}
    return {key.rpartition("-")[2]: json.loads(text) for key, text in noted.items() if key.startswith(ACTION)}


def taken_in(playground: Playground, name: str = "claims") -> str:
    return str(playground.status(name)["state"].get("lastAction"))


def progress(playground: Playground) -> str:
    return str(playground.condition("claims", "RoundProgressing").get("reason"))


def account(playground: Playground, name: str, *verbs: str) -> Path:
    """Kubeconfig of somebody who may do just this with jobs."""
    request = playground.server.request
    accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    request("POST", accounts, {"metadata": {"name": name}})
    rules = [{"apiGroups": ["cowest.dev"], "resources": ["collaborationjobs"], "verbs": list(verbs)}] if verbs else []
    request("POST", f"{RBAC}/roles", {"metadata": {"name": name}, "rules": rules})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}
    request("POST", f"{RBAC}/rolebindings", {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})
    status, answer = request("POST", f"{accounts}/{name}/token", {"spec": {"expirationSeconds": 3600}})
    assert status == 201, answer
    return kubeconfig_of(playground, name, lambda config: config["users"][0]["user"].update(token=_token(answer)))


def _token(answer: Mapping[str, Any]) -> str:
    return str(answer["status"]["token"])


def kubeconfig_of(playground: Playground, name: str, edit: Any) -> Path:
    config = json.loads(json.dumps(playground.server.kubeconfig()))
    edit(config)
    path = playground.folder / f"kubeconfig-{name}.json"
    path.write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------- with an operator
def test_a_person_pauses_resumes_proposes_and_rolls_back_and_that_stays(playground: Playground, cowest: Any) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **RESTING))
        playground.wait(lambda: progress(playground) == "WaitingForTraces", "rest after the baseline", 120)

        said = cowest("pause", "claims", "--why", "holidays")
        assert said == (EXIT_OK, "tester: paused; no round starts and no canary step is taken (holidays)\n", "")
        said = cowest("pause", "claims", "--now")
        assert "the step that runs is stopped" in said.out and playground.status("claims")["state"]["pausedNow"] is True
        assert taken_in(playground).endswith("-pause")
        playground.wait(lambda: progress(playground) == "PausedByPerson", "the pause")
        said = cowest("resume", "claims", "--by", "ann", "-o", "json")
        heard = json.loads(said.out)
        assert heard["by"] == "ann (as tester)" and heard["outcome"] == "ann (as tester): resumed"
        assert heard["id"] == taken_in(playground) and heard["takenIn"] is True
        assert set(said_of(playground)) == {"resume"}, "the pause was taken in, so it went with the next thing said"

        stable = playground.status("claims")["stable"]["digest"]
        said = cowest("propose", "claims", "--model", "s3://models/mine", "--why", "mine is better")
        assert said.code == EXIT_OK and "tester: proposed s3://models/mine (mine is better)" in said.out
        playground.wait(lambda: len(decisions(playground, "claims")) == 2, "the proposal's trial", 120)
        assert decisions(playground, "claims")[1][:2] == (1, "Promoted")
        assert playground.status("claims")["stable"]["digest"] != stable

        said = cowest("rollback", "claims")
        assert said.code == EXIT_OK
        assert re.match("tester: roll(ed|s) the stable pair back to the one before", said.out), "now or in a moment"
        playground.wait(lambda: progress(playground) == "WaitingForTraces", "rest after the rollback")
        assert playground.status("claims")["stable"]["digest"] == stable
        assert len(playground.status("claims")["state"]["vetoed"]) == 1

        explained = cowest("explain", "claims")
        lines = explained.out.splitlines()
        assert any(line.startswith("Ready is True (Answering): the pair of round 0 answers.") for line in lines)
        row = "Round 1 (Proposal by tester, 'mine is better'): RolledBack by tester, RolledBackByPerson"
        assert any(line.startswith(row) for line in lines)
        assert "1 pair(s) rolled back by a person are never promoted automatically." in lines
        assert any(re.search("tester: roll(ed|s) the stable pair back", line) for line in lines[-10:])
        events = json.loads(cowest("explain", "claims", "-o", "json").out)["events"]
        assert "PersonPropose" in [event["reason"] for event in events]

        table = cowest("status", "claims")
        rows = [line.split()[:3] for line in table.out.splitlines()]
        assert ["0", "Baseline", "Promoted"] in rows and ["1", "Proposal", "RolledBack"] in rows
        assert table.code == EXIT_OK and table.err == ""
        told = json.loads(cowest("status", "claims", "-o", "json").out)["status"]
        assert told["rounds"] == playground.status("claims")["rounds"] and "state" not in told

        said = cowest("rollback", "claims", "-o", "json")
        assert "rolled the only pair back: the strong model answers alone" in json.loads(said.out)["outcome"]
        version = playground.job("claims")["metadata"]["annotations"]
        for verb, words in (
            ("rollback", "there is no earlier pair to go back to"),
            ("promote", "there is no candidate and no refused edit"),
            ("approve", "there is no candidate to approve"),
        ):
            said = cowest(verb, "claims")
            assert said.code == EXIT_BAD_INPUT and said.err.startswith(f"{verb} by tester: {words}"), said
        assert playground.job("claims")["metadata"]["annotations"] == version, "what is refused is not recorded"


def test_a_candidate_that_waits_for_approval_is_promoted_by_a_person(playground: Playground, cowest: Any) -> None:
    canary = {"steps": [{"weightPercent": 20, "minAnswers": 10}], "deadlineSeconds": 600, "approval": "Manual"}
    looker = account(playground, "approver", "get", "patch")  # and no watch: the verb looks from time to time
    with playground.operator():
        apply(playground, manifest_of("claims", canary=canary, **RESTING))
        playground.wait(lambda: progress(playground) == "AwaitingApproval", "the hold", 120)
        assert decisions(playground, "claims") == []
        assert "AwaitingApproval" in cowest("status", "claims").out
        said = cowest("approve", "claims", "--why", "looks good", kubeconfig=looker)
        assert said.code == EXIT_OK, said.err
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the promotion", 60)
        assert decisions(playground, "claims")[0][:2] == (0, "Promoted")
    (said_then,) = said_of(playground).values()
    assert said_then["by"] == f"system:serviceaccount:{NAMESPACE}:approver" and said_then["why"] == "looks good"


def test_a_person_ends_a_trial_in_canary_and_the_pair_is_vetoed(playground: Playground, cowest: Any) -> None:
    playground.script.live_better_by = 0.0
    canary = {"steps": [{"weightPercent": 20, "minAnswers": 5000}], "deadlineSeconds": 600}
    with playground.operator():
        apply(playground, manifest_of("claims", canary=canary, **RESTING))
        playground.wait(
            lambda: playground.status("claims").get("candidate", {}).get("stage") == "Canary", "the canary", 120
        )
        said = cowest("rollback", "claims", "--why", "not today")
        assert said.code == EXIT_OK and "round 0 RolledBack: not today" in said.out
    row = playground.status("claims")["rounds"][0]
    assert (row["decision"], row["reason"], row["by"]) == ("RolledBack", "RolledBackByPerson", "tester")
    assert row["pair"] in playground.status("claims")["state"]["vetoed"]


# ---------------------------------------------------------------- without one
def test_while_no_operator_is_there_it_is_recorded_once_and_said_so(playground: Playground, cowest: Any) -> None:
    apply(playground, manifest_of("claims"))
    begun = time.monotonic()
    said = cowest("pause", "claims", "--timeout", "1")
    assert said.code == EXIT_RETRY and "no operator has taken it in" in said.err and time.monotonic() - begun < 15
    version = playground.job("claims")["metadata"]["resourceVersion"]
    assert cowest("pause", "claims", "--timeout", "0").code == EXIT_RETRY
    assert playground.job("claims")["metadata"]["resourceVersion"] == version
    said = cowest("resume", "claims", "--no-wait")
    assert said.code == EXIT_OK and "is recorded; the operator takes it in" in said.out
    assert set(said_of(playground)) == {"pause", "resume"}, "what is not taken in stays"
    said = cowest("status", "claims")
    assert said.code == EXIT_BAD_INPUT and "wanted the state of a job, saw none" in said.err


def test_what_was_said_meanwhile_is_told_in_its_order_and_of_this_job_alone(
    playground: Playground, cowest: Any
) -> None:
    """Events carry whole seconds, and those of a job outlive it."""
    apply(playground, manifest_of("claims", **RESTING))
    words = [("pause", "one"), ("resume", "two"), ("pause", "three"), ("resume", "four"), ("pause", "five")]
    for verb, why in words:
        assert cowest(verb, "claims", "--why", why, "--no-wait").code == EXIT_OK

    def told() -> list[str]:
        events = json.loads(cowest("explain", "claims", "-o", "json").out)["events"]
        return [why for event in events for _, why in words if f"({why})" in event["message"]]

    with playground.operator():
        playground.wait(lambda: "state" in playground.status("claims"), "the operator", 30)
        playground.wait(lambda: len(told()) == len(words), "the events of what was said", 30)
        assert told() == [why for _, why in words]
        playground.server.request("DELETE", f"{JOBS}/claims")
        apply(playground, manifest_of("claims", **RESTING))
        playground.wait(lambda: "state" in playground.status("claims"), "the new job to be seen", 30)
        assert told() == []


def test_of_two_who_speak_at_once_neither_is_overheard(playground: Playground) -> None:
    """What sorts before an action that was taken in is never looked at: the second one looks again and comes after."""
    ahead = ACTION + f"{time.time_ns() + 10**12:020d}-pause"
    heard = {ahead: json.dumps({"verb": "pause", "by": "ann", "why": "", "at": time.time()})}

    class Interrupted(Job):
        def see(self) -> Seen:
            seen = super().see()
            if ahead not in seen.body["metadata"].get("annotations", {}):
                playground.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": heard}})
            return seen

    apply(playground, manifest_of("claims"))
    _, action = Interrupted(Where("claims", kubeconfig=playground.kubeconfig)).say("resume", "", "bob", None)
    assert ACTION + action.id > ahead
    assert set(said_of(playground)) == {"pause", "resume"}


def test_what_makes_no_sense_now_is_refused_and_not_recorded(playground: Playground, cowest: Any) -> None:
    apply(playground, manifest_of("claims"))
    said = cowest("approve", "claims")
    assert said.code == EXIT_BAD_INPUT and "there is no candidate to approve" in said.err
    for model in ("file:///models/mine", "models/mine"):
        said = cowest("propose", "claims", "--model", model)
        assert said.code == EXIT_BAD_INPUT and "cowest upload" in said.err and "s3://" in said.err
    assert said_of(playground) == {}


def test_a_job_that_is_not_there_is_named_beside_those_that_are(playground: Playground, cowest: Any) -> None:
    apply(playground, manifest_of("claims"))
    for verb in ("status", "explain", "pause"):
        said = cowest(verb, "clams")
        assert said.code == EXIT_BAD_INPUT
        assert said.err.startswith("default/clams: there is no such job; in namespace default: claims.")
    assert "in namespace elsewhere: none" in cowest("status", "claims", "-n", "elsewhere").err
    assert cowest("lineage", "x", "clams").code == EXIT_BAD_INPUT


def test_each_way_not_to_get_there_is_one_sentence(playground: Playground, cowest: Any) -> None:
    apply(playground, manifest_of("claims"))
    away = f"https://127.0.0.1:{free_port()}"

    def leading(name: str, url: str) -> Path:
        return kubeconfig_of(playground, name, lambda config: config["clusters"][0]["cluster"].update(server=url))

    unknown = kubeconfig_of(playground, "unknown", lambda config: config["users"][0]["user"].update(token="wrong"))
    (playground.folder / "torn.json").write_text("{")
    for kubeconfig, more, code, words in (
        (unknown, (), EXIT_BAD_INPUT, "wanted a login that the API server knows, saw: Unauthorized"),
        (account(playground, "nobody"), (), EXIT_BAD_INPUT, 'nobody" cannot get resource "collaborationjobs"'),
        (leading("away", away), (), EXIT_RETRY, "wanted an answer of the API server"),
        (leading("bare", f"{playground.server.url}/nothing"), (), EXIT_BAD_INPUT, "cowest crd | kubectl apply -f -"),
        (playground.kubeconfig, ("--context", "other"), EXIT_BAD_INPUT, "other"),
        (playground.folder / "none.json", (), EXIT_BAD_INPUT, "saw no such file"),
        (playground.folder / "torn.json", (), EXIT_BAD_INPUT, "wanted a kubeconfig that leads to its cluster"),
    ):
        said = cowest("pause", "claims", *more, kubeconfig=kubeconfig)
        assert said.code == code and words in said.err, said
        assert len(said.err.splitlines()) == 1 and said.out == "", said
    reader = account(playground, "reader", "get")
    said = cowest("pause", "claims", kubeconfig=reader)
    assert said.code == EXIT_BAD_INPUT and 'reader" cannot patch resource' in said.err
    assert said_of(playground) == {}


# ---------------------------------------------------------------- what lies in the store
def with_store(playground: Playground, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:  # noqa: F811
    """The job `claims` with an object store: where it keeps its things, and what a person's shell says."""
    place = {"bucket": "models", "prefix": "a/b", "endpoint": endpoint, "pathStyle": True}
    apply(playground, manifest_of("claims", **{"objectStore": place}))
    keys = {"AWS_ACCESS_KEY_ID": "cowest-test", "AWS_SECRET_ACCESS_KEY": "cowest-test-secret"}
    environment = {**os.environ, **keys, "KUBECONFIG": str(playground.kubeconfig)}
    for name, value in {**keys, "COWEST_S3_ENDPOINT": endpoint, "COWEST_S3_PATH_STYLE": "true"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://models/a/b/{NAMESPACE}/claims", environment


def test_the_ledger_of_a_job_is_read_from_its_store(
    playground: Playground,
    endpoint: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, environment = with_store(playground, endpoint, monkeypatch)

    def ledger() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cowest_cli", "ledger", "claims", "-n", NAMESPACE, "--usable", "-o", "json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    said = ledger()
    assert said.returncode == EXIT_BAD_INPUT and f"{root}: wanted the ledger of a round, saw none yet" in said.stderr
    write_round(root)
    seen = json.loads(ledger().stdout)
    assert [query["query_id"] for query in seen["queries"]] == ["q1", "q2"]
    assert seen["rounds"][0]["price"]["unknown"] == seen["rounds"][0]["price"]["calls"], "the book is the proxy's own"


def test_lineage_is_read_from_the_jobs_store_with_keys_of_ones_own(
    playground: Playground,
    endpoint: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, environment = with_store(playground, endpoint, monkeypatch)
    for name, digest, inputs in (("r0/sft", "sha256:first", {}), ("r1/dpo", "sha256:tuned", {"model": "sha256:first"})):
        made = Manifest("Model", digest, "sha256:in", inputs, {}, {}, name[3:], "0", "2026-01-01", 1.0)
        store.put(f"{root}/runs/{name}/manifest.json", manifest_json(made))
    store.put(f"{root}/runs/r1/evaluate/report.json", json.dumps(asdict(w.report("sha256:pair"))).encode())
    store.put(f"{root}/runs/r1/live-0.json", json.dumps(asdict(w.live(candidate=60))).encode())

    async def write() -> None:
        writer = TraceWriter(root, "gw")
        told = {"weak_digest": "sha256:tuned", "pair_digest": "sha256:pair", "draft": "d"}
        writer.add({"trace_id": "answer-1", "time": datetime.now(UTC), **told})
        await writer.aclose()

    asyncio.run(write())

    def lineage(what: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cowest_cli", "lineage", what, "claims", "-n", NAMESPACE, "-o", "json"]
        told = {**environment, **more}
        return subprocess.run(command, capture_output=True, text=True, env=told, check=False)

    seen = json.loads(lineage("answer-1").stdout)
    assert seen["answer"]["draft"] == "d"
    assert [part["step"] for part in seen["models"]] == ["dpo", "sft"]
    assert [by["evaluator_digest"] for by in seen["measured"]["evaluations"]] == ["sha256:evaluator"]
    assert seen["measured"]["live"] == [], "that of another pair"
    assert [part["step"] for part in json.loads(lineage("sha256:first").stdout)["models"]] == ["sft"]
    said = lineage("answer-1", COWEST_S3_ENDPOINT="http://127.0.0.1:1")
    assert said.returncode == EXIT_RETRY and "port=1)" in said.stderr, "one's own address goes before the pods'"


# ---------------------------------------------------------------- as it is installed
def test_kubectl_finds_it_and_nothing_heavy_is_loaded(playground: Playground) -> None:
    apply(playground, manifest_of("claims"))
    environment = {**os.environ, "KUBECONFIG": str(playground.kubeconfig)}
    program = (
        "import sys\nfrom cowest_cli import main\nsys.argv = ['cowest', 'pause', 'claims', '--no-wait']\n"
        "try:\n    main.main()\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'aiohttp', 'kopf', 'minio'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on PATH")
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["kubectl", "cowest", "resume", "claims", "-n", NAMESPACE, "--no-wait", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["by"] == "tester"
    assert playground.get(f"{JOBS}/claims") and set(said_of(playground)) == {"pause", "resume"}
