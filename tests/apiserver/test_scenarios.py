"""Scenarios of one job at rest: the world before, an event, exactly what the operator writes then, the world after.

What it writes stands in the API server's audit log, since it acts as an account of its own.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.apiserver.conftest import JOBS, ApiServer, wait_until
from tests.apiserver.playground import DEPLOYMENTS, MAPS, Playground, apply, manifest_of
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
    """Verb, kind and name of each write; an event's name says nothing."""
    found = []
    for each in of_operators(asked(playground.server.audit_log, since)):
        _, kind, verb = each.right
        if verb not in ("get", "list", "watch") and kind != "leases":
            path = urlsplit(each.path).path.removesuffix("/status")
            found.append(f"{verb} {kind}" + ("" if kind == "events" else f" {path.rpartition('/')[2]}"))
    return found


@contextmanager
def only(playground: Playground, *wanted: str) -> Iterator[None]:
    """What happens in the block makes the operator write this, and nothing else."""
    since = playground.server.audit_log.stat().st_size
    yield
    wait_until(lambda: not Counter(wanted) - Counter(writes(playground, since)), f"the operator to write {wanted}", 60)
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

    with only(resting, STATUS, STATUS, "create events"):
        say("pause")
    assert resting.condition("claims", "RoundProgressing")["reason"] == "PausedByPerson"
    with only(resting, STATUS, STATUS, "create events"):
        say("resume")
    assert resting.condition("claims", "RoundProgressing")["reason"] == "WaitingForTraces"


def test_a_note_that_means_nothing_to_the_operator_makes_it_write_nothing(resting: Playground) -> None:
    with only(resting):
        resting.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": {"owner": "claims desk"}}})
