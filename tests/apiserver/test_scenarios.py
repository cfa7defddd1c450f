"""Scenarios of one job at rest: the world before, an event, exactly what the operator writes then, the world after.

What it writes stands in the API server's audit log, since it acts as an account of its own.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.apiserver.conftest import JOBS, ApiServer, wait_until
from tests.apiserver.playground import DEPLOYMENTS, EVENTS, MAPS, PODS, SERVING, Playground, apply, manifest_of
from tests.apiserver.rights import asked, of_operators
from tests.contracts.test_charts import needs_helm

pytestmark = needs_helm
STATUS = "patch collaborationjobs/status claims"
QUIET_SECONDS = 2.0  # after the last write that is wanted: is there one too many?


@pytest.fixture(scope="module")
def resting(cluster: ApiServer, account: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """A job that waits for traces after its baseline, and its operator."""
    with Playground(cluster, tmp_path_factory.mktemp("scenarios"), account) as built, built.operator():
        apply(built, manifest_of("claims", **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}}))
        built.wait(
            lambda: built.condition("claims", "RoundProgressing").get("reason") == "WaitingForTraces", "rest", 120
        )
        yield built
    built.empty()


def writes(playground: Playground, since: int) -> list[str]:
    """Verb, kind and name of each write; what is created by a POST has no name in its address.

    Without what was refused: a status decided from what somebody wrote over is decided and written anew.
    """
    found = []
    for each in of_operators(asked(playground.server.audit_log, since)):
        _, kind, verb = each.right
        if verb not in ("get", "list", "watch") and kind != "leases" and each.code < 300:
            path = urlsplit(each.path).path.removesuffix("/status")
            found.append(f"{verb} {kind}" + ("" if verb == "create" else f" {path.rpartition('/')[2]}"))
    return found


@contextmanager
def only(playground: Playground, *wanted: str) -> Iterator[int]:
    """What happens in the block makes the operator write this, and nothing else. The log's length before it."""
    since = playground.server.audit_log.stat().st_size
    yield since
    with suppress(pytest.fail.Exception):  # what was written instead says more
        wait_until(lambda: not Counter(wanted) - Counter(writes(playground, since)), "all that is wanted", 60)
    time.sleep(QUIET_SECONDS)
    assert sorted(writes(playground, since)) == sorted(wanted)


def edit(playground: Playground, spec: Any) -> None:
    status, answer = playground.server.request("PATCH", f"{JOBS}/claims", {"spec": spec})
    assert status == 200, answer


def test_more_gateways_are_one_deployment_and_a_budget_for_drains_and_no_server_rolls(resting: Playground) -> None:
    budget = "poddisruptionbudgets claims-gateway"
    template = resting.get(f"{DEPLOYMENTS}/claims-gateway")["spec"]["template"]
    with only(resting, "patch deployments claims-gateway", f"patch {budget}", STATUS):
        edit(resting, {"gateway": {"replicas": 2}})
    assert resting.get(f"{DEPLOYMENTS}/claims-gateway")["spec"]["template"] == template
    with only(resting, "patch deployments claims-gateway", f"delete {budget}", STATUS):
        edit(resting, {"gateway": {"replicas": 1}})


def test_an_edit_that_only_the_next_round_reads_is_noted_and_touches_no_server(resting: Playground) -> None:
    with only(resting, STATUS):
        edit(resting, {"feedback": {"minPairs": 77}})
    assert resting.status("claims")["observedGeneration"] == resting.job("claims")["metadata"]["generation"]


def test_a_child_edited_by_hand_is_written_again_and_nothing_else(resting: Playground) -> None:
    path = f"{DEPLOYMENTS}/claims-observer"
    before = resting.get(path)["spec"]
    with only(resting, "patch deployments claims-observer"):
        resting.server.request("PATCH", path, {"spec": {"replicas": 3}})
    assert resting.get(path)["spec"] == before


def test_a_label_of_ours_edited_by_hand_is_written_again_and_what_is_anothers_stays(resting: Playground) -> None:
    path = f"{DEPLOYMENTS}/claims-gateway"
    theirs = {"app.kubernetes.io/component": "mine", "team": "depot"}
    with only(resting, "patch deployments claims-gateway"):
        resting.server.request("PATCH", path, {"metadata": {"labels": theirs}})
    labels = resting.get(path)["metadata"]["labels"]
    assert (labels["app.kubernetes.io/component"], labels["team"]) == ("gateway", "depot")


def test_a_config_map_deleted_by_hand_is_made_again_and_nothing_else(resting: Playground) -> None:
    (name,) = (
        volume["configMap"]["name"]
        for volume in resting.get(f"{DEPLOYMENTS}/claims-gateway")["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "job"
    )
    before = resting.get(f"{MAPS}/{name}")["data"]
    with only(resting, f"patch configmaps {name}"):
        resting.server.request("DELETE", f"{MAPS}/{name}")
    assert resting.get(f"{MAPS}/{name}")["data"] == before


def test_a_word_of_a_person_is_one_event_one_status_that_it_is_heard_and_one_of_the_hold(resting: Playground) -> None:
    def say(verb: str) -> None:
        heard = json.dumps({"verb": verb, "by": "ann", "why": "holidays", "at": time.time()})
        note = {f"cowest.dev/action.{time.time_ns():020d}-{verb}": heard}
        resting.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": note}})

    for times in (1, 2):  # in the same words
        with only(resting, STATUS, STATUS, "create events"):
            say("pause")
        assert resting.condition("claims", "RoundProgressing")["reason"] == "PausedByPerson"
        with only(resting, STATUS, STATUS, "create events"):
            say("resume")
        assert resting.condition("claims", "RoundProgressing")["reason"] == "WaitingForTraces"
        reasons = Counter(event["reason"] for event in resting.items(EVENTS))
        assert (reasons["PersonPause"], reasons["PersonResume"]) == (times, times)


# ---------------------------------------------------------------- Secrets
SECRETS = "/api/v1/namespaces/default/secrets"


def kubelet(playground: Playground, phase: str, started: bool) -> None:
    """What it says of the gateway's pod."""
    condition = {"type": "PodReadyToStartContainers", "status": str(started)}
    status = {"phase": phase, "conditions": [condition]}
    code, answer = playground.server.request("PATCH", f"{PODS}/claims-gateway-x/status", {"status": status})
    assert code == 200, answer


def secret(playground: Playground, method: str, path: str, value: str) -> None:
    code, answer = playground.server.request(
        method, path, {"metadata": {"name": "strong"}, "stringData": {"api-key": value}}
    )
    assert code in (200, 201), answer


def test_a_secret_that_is_missing_comes_and_is_rotated_costs_one_status_each_way_and_an_event(
    resting: Playground,
) -> None:
    labels = {"cowest.dev/job": "claims", "app.kubernetes.io/component": "gateway"}
    keys = {"secretName": "strong", "items": [{"key": "api-key", "path": "00"}]}
    volumes = [{"name": "strong-keys", "secret": keys}]
    spec = {"containers": [{"name": "main", "image": "x"}], "volumes": volumes}
    with only(resting, STATUS, "create events"):
        resting.server.request("POST", PODS, {"metadata": {"name": "claims-gateway-x", "labels": labels}, "spec": spec})
        kubelet(resting, "Pending", started=False)
    told = resting.condition("claims", "Degraded")
    assert (told["status"], told["reason"]) == ("True", "PodsFail")
    assert "is Secret strong with api-key there?" in told["message"]
    with only(resting, STATUS):
        secret(resting, "POST", SECRETS, "first")
        kubelet(resting, "Running", started=True)
    assert resting.condition("claims", "Degraded")["status"] == "False"
    with only(resting):
        secret(resting, "PATCH", f"{SECRETS}/strong", "second")
    resting.server.request("DELETE", f"{SECRETS}/strong")
    resting.server.request("DELETE", f"{PODS}/claims-gateway-x", {"gracePeriodSeconds": 0})


# ---------------------------------------------------------------- a canary
def arms(playground: Playground, name: str) -> list[tuple[str, int]]:
    found = playground.get(f"{MAPS}/{name}-routing")
    return [(a["name"], a["weightPercent"]) for a in json.loads(found["data"]["routing.json"])["arms"]] if found else []


@pytest.fixture
def in_canary(resting: Playground) -> Iterator[str]:
    """A job in the first step of its tuned round's canary; the name of the model server that answers beside it."""
    apply(resting, manifest_of("trial"))
    try:
        resting.wait(lambda: len(resting.status("trial").get("rounds", ())) == 1, "the baseline", 120)
        resting.script.live_steps = 0
        (old,) = served(resting, "trial")
        resting.wait(lambda: arms(resting, "trial") == [("stable", 80), ("candidate", 20)], "the canary", 120)
        resting.wait(lambda: waits_for_answers(resting), "the canary to wait for answers")
        yield old
    finally:
        resting.script.live_steps = 99


def waits_for_answers(playground: Playground) -> bool:
    return bool(playground.condition("trial", "RoundProgressing").get("reason") == "WaitingForAnswers")


def served(playground: Playground, job: str) -> list[str]:
    owned = (each["metadata"] for each in playground.items(SERVING))
    return [each["name"] for each in owned if each["labels"]["cowest.dev/job"] == job]


def is_gone(playground: Playground, server: str) -> bool:
    """The operator is woken to look: a model server outlives its last traffic for a while."""
    note = {"metadata": {"annotations": {"looked-at": str(time.monotonic())}}}
    playground.server.request("PATCH", f"{JOBS}/trial", note)
    time.sleep(1)
    return server not in served(playground, "trial")


def test_a_step_of_a_canary_and_its_promotion_are_each_one_status_of_the_end_and_one_of_what_follows(
    resting: Playground, in_canary: str
) -> None:
    status = "patch collaborationjobs/status trial"
    moves = ("patch configmaps trial-routing", "create events", status, status)
    with only(resting, *moves, "patch configmaps trial-r1-live-1", "patch deployments trial-live"):
        resting.script.live_steps = 1
    assert arms(resting, "trial") == [("stable", 50), ("candidate", 50)] and waits_for_answers(resting)
    ends = ("create events", "delete deployments trial-live", f"delete inferenceservices {in_canary}")
    with only(resting, *moves, *ends) as since:
        resting.script.live_steps = 2
        resting.wait(lambda: not Counter(moves) - Counter(writes(resting, since)), "the promotion to be written")
        resting.wait(lambda: is_gone(resting, in_canary), "the old model to go")
    assert arms(resting, "trial") == [("stable", 100)]
    assert len(served(resting, "trial")) == 1


# ---------------------------------------------------------------- a delete
def at_rest(playground: Playground, name: str, **edits: Any) -> str:
    """The uid of another job that waits for traces."""
    apply(playground, manifest_of(name, **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}, **edits}))
    playground.wait(
        lambda: playground.condition(name, "RoundProgressing").get("reason") == "WaitingForTraces", "rest", 120
    )
    return str(playground.job(name)["metadata"]["uid"])


def test_a_delete_that_keeps_what_the_job_made_makes_the_operator_write_nothing(resting: Playground) -> None:
    uid = at_rest(resting, "kept")
    with only(resting):
        resting.server.request("DELETE", f"{JOBS}/kept")
        resting.collect_garbage(uid)
    assert resting.get(f"{JOBS}/kept") is None
    assert resting.get(f"{DEPLOYMENTS}/kept-gateway") is None


def test_a_delete_that_erases_says_so_ends_what_writes_runs_one_step_and_lets_go(resting: Playground) -> None:
    uid = at_rest(resting, "erased", deletionPolicy={"models": "Delete", "traces": "Delete"})
    with only(
        resting,
        "patch collaborationjobs/status erased",
        "patch configmaps erased-erase",
        "delete deployments erased-gateway",
        "create workflows",
        "patch collaborationjobs erased",
    ):
        resting.server.request("DELETE", f"{JOBS}/erased")
    assert resting.get(f"{JOBS}/erased") is None
    assert resting.get(f"{DEPLOYMENTS}/erased-proxy") is not None, "the rest is the garbage collector's"
    resting.collect_garbage(uid)


def test_a_note_that_means_nothing_to_the_operator_makes_it_write_nothing(resting: Playground) -> None:
    with only(resting):
        resting.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": {"owner": "claims desk"}}})
