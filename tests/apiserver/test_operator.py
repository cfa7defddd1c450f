"""The operator against a real API server: one manifest through the loop, faults, and what is written when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from cowest_operator import settings
from cowest_operator.apply import JobGoneError, OvertakenError
from cowest_operator.doors import Doors
from cowest_operator.kube import Kube
from cowest_operator.main import Operator
from tests.apiserver.conftest import JOBS, wait_until
from tests.apiserver.playground import (
    DEPLOYMENTS,
    EVENTS,
    MAPS,
    NAMESPACE,
    OPERATORS,
    SERVING,
    WORKFLOWS,
    Playground,
    Wire,
    apply,
    decisions,
    manifest_of,
    through_kube,
)

T = TypeVar("T")

ONE_ROUND_LATER = {"rounds": {"max": 1, "trigger": {"newTraces": 5}}}


def writes(playground: Playground, name: str) -> int:
    return int(playground.job(name)["metadata"]["resourceVersion"])


def test_one_manifest_goes_through_baseline_round_and_canary(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 2, "two rounds", 120)
        playground.wait(lambda: playground.condition("claims", "RoundProgressing")["reason"] == "MaxRoundsReached",
                        "the end of the loop")  # fmt: skip
    assert decisions(playground, "claims") == [(0, "Promoted", "BetterOfflineAndLive"),
                                               (1, "Promoted", "BetterOfflineAndLive")]  # fmt: skip
    assert playground.condition("claims", "Ready")["status"] == "True"
    assert playground.condition("claims", "DraftsHelp")["status"] == "True"
    assert playground.condition("claims", "Degraded")["status"] == "False"
    names = {w["metadata"]["name"] for w in playground.items(WORKFLOWS)}
    assert names >= {"claims-r0-check", "claims-r0-sft", "claims-r0-evaluate", "claims-r1-collect",
                     "claims-r1-feedback", "claims-r1-dpo", "claims-r1-evaluate"}  # fmt: skip
    reasons = [e["reason"] for e in playground.items(EVENTS)]
    assert reasons.count("RoundStarted") == 2
    assert reasons.count("BetterOfflineAndLive") == 2
    made = playground.script.predictors
    assert len(made) == len(set(made)) == 2, (
        "what KServe makes of an InferenceService is KServe's, whatever it is labelled"
    )
    lines = [json.loads(line) for line in playground.log().splitlines() if line.startswith("{")]
    begun = [(line["job"], line["round"]) for line in lines if line.get("reason") == "RoundStarted"]
    assert begun == [("default/claims", 0), ("default/claims", 1)], "a log can be asked for a job and a round"


def test_a_candidate_that_is_worse_on_live_traffic_is_rolled_back_and_stable_stays(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
        playground.script.live_better_by = -0.3
        stable = playground.status("claims")["stable"]["digest"]
        playground.wait(lambda: len(decisions(playground, "claims")) == 2, "the round", 120)
    assert decisions(playground, "claims")[1] == (1, "RolledBack", "WorseOnLiveTraffic")
    assert playground.status("claims")["stable"]["digest"] == stable
    assert playground.status("claims")["traffic"]["candidatePercent"] == 0


@pytest.mark.timeout(900)
def test_a_killed_operator_goes_on_where_it_was_and_starts_no_step_twice(playground: Playground) -> None:
    apply(playground, manifest_of("claims"))
    end = time.monotonic() + 700
    number = 0
    while len(decisions(playground, "claims")) < 2 and time.monotonic() < end:
        number += 1
        process = playground.start_operator()
        before = playground.status("claims").get("state")
        wait_until(
            lambda before=before: (
                playground.status("claims").get("state") != before  # type: ignore[misc]
                or len(decisions(playground, "claims")) == 2
            ),
            f"a transition in life {number}: {playground.log()[-2000:]}",
            60,
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [d for _, d, _ in decisions(playground, "claims")] == ["Promoted", "Promoted"]
    assert number > 5
    attempts = [w["metadata"]["labels"]["cowest.dev/attempt"] for w in playground.items(WORKFLOWS)]
    assert set(attempts) == {"1"}
    assert len(attempts) == 7


def test_nothing_is_written_while_nothing_changes(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}}))
        playground.wait(
            lambda: playground.condition("claims", "RoundProgressing").get("reason") == "WaitingForTraces", "rest", 120
        )

        def versions() -> dict[str, str]:
            paths = (JOBS, DEPLOYMENTS, SERVING, MAPS, WORKFLOWS)
            return {i["metadata"]["uid"]: i["metadata"]["resourceVersion"] for p in paths for i in playground.items(p)}

        def stands() -> bool:
            seen = versions()
            time.sleep(3.0)
            return versions() == seen

        playground.wait(stands, "the end of what is in flight")
        before = versions()
        time.sleep(20.0)
        assert versions() == before


def test_a_child_edited_or_deleted_by_hand_comes_back(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}}))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        path = f"{DEPLOYMENTS}/claims-gateway"
        container = {"name": "gateway", "image": "evil:1"}
        playground.server.request("PATCH", path, {"spec": {"template": {"spec": {"containers": [container]}}}})
        image = lambda: playground.get(path)["spec"]["template"]["spec"]["containers"][0]["image"]  # noqa: E731
        playground.wait(lambda: image() == "serving:test", "the image to be ours again", 30)
        playground.server.request("DELETE", f"{DEPLOYMENTS}/claims-proxy")
        playground.wait(lambda: playground.get(f"{DEPLOYMENTS}/claims-proxy") is not None, "the proxy to be back", 30)


def test_a_step_that_must_be_run_again_is_another_workflow_and_bad_input_is_said(playground: Playground) -> None:
    playground.script.exit_codes = {"sft": [75, 75]}
    with playground.operator():
        apply(playground, manifest_of("claims", rounds={"max": 1}))
        playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-r0-sft-3") is not None, "the third attempt", 120)
        assert playground.condition("claims", "Ready")["status"] == "True"


def test_what_one_machine_allows_and_a_cluster_does_not_is_named(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **{"weak.model": "file:///models/weak"}))
        playground.wait(lambda: playground.condition("claims", "Degraded").get("status") == "True", "the sentence")
    seen = playground.condition("claims", "Degraded")
    assert seen["reason"] == "NotOnKubernetes"
    assert "spec.weak.model: wanted an s3:// address, saw file:///models/weak" in seen["message"]
    assert "cowest upload" in seen["message"]


def test_an_edit_of_the_prompts_ends_the_round_and_is_tried_next(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
        playground.script.argo_works = False
        playground.wait(lambda: "candidate" in playground.status("claims"), "the round")
        edit = {"spec": {"collaboration": {"prompts": {"draft": "Explain: {query}"}}}}
        playground.server.request("PATCH", f"{JOBS}/claims", edit)
        playground.wait(lambda: len(decisions(playground, "claims")) == 2, "the end of the round")
        assert decisions(playground, "claims")[1] == (1, "Refused", "SpecChanged")
        playground.script.argo_works = True
        playground.wait(lambda: len(decisions(playground, "claims")) >= 3, "the edit's trial", 120)
        assert playground.status("claims")["rounds"][2]["origin"] == "Edit"


def test_with_two_operators_one_writes_and_the_other_takes_over(playground: Playground) -> None:
    playground.told["COWEST_LEASE"] = "of-a-death"  # who comes after may have another patience, and another name
    first = playground.start_operator("one")
    try:
        apply(playground, manifest_of("claims", **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}}))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        with playground.operator("two", as_shipped=True):
            assert lease_of(playground, "of-a-death") == "one"
            first.kill()
            first.wait()
            playground.wait(lambda: lease_of(playground, "of-a-death") == "two", "the lease", 60)
            playground.server.request("DELETE", f"{DEPLOYMENTS}/claims-gateway")
            playground.wait(lambda: playground.get(f"{DEPLOYMENTS}/claims-gateway") is not None, "its work", 60)
    finally:
        first.kill()
        first.wait()


def lease_of(playground: Playground, name: str = "cowest-operator") -> str:
    found = playground.get(f"/apis/coordination.k8s.io/v1/namespaces/{OPERATORS}/leases/{name}")
    return str(found["spec"]["holderIdentity"]) if found else ""


def over_a_wire(playground: Playground) -> Wire:
    wire = Wire(playground.server)
    playground.lead(wire.kubeconfig())
    return wire


def ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def test_an_api_server_that_restarts_ends_neither_the_writer_nor_the_standby(playground: Playground) -> None:
    wire = over_a_wire(playground)
    playground.told["COWEST_LEASE"] = "of-a-restart"
    with playground.operator("one") as writer:
        playground.wait(lambda: lease_of(playground, "of-a-restart") == "one", "the lease")
        with playground.operator("two") as standby:
            playground.wait(
                lambda: "wants the lease" in playground.log("two"), "the standby: its start is no part of the cut"
            )
            wire.cut()
            for name in ("one", "two"):
                playground.wait(lambda name=name: "cannot be" in playground.log(name), f"{name} to try")  # type: ignore[misc]
            wire.mend()
            apply(playground, manifest_of("claims", **ONE_ROUND_LATER))
            playground.wait(lambda: playground.get(f"{DEPLOYMENTS}/claims-gateway") is not None, "its work")
            assert not ended(writer) and not ended(standby)
            assert lease_of(playground, "of-a-restart") == "one"
    assert writer.returncode == 0, "it was told to end"


@pytest.mark.parametrize("silent", [pytest.param(False, id="that refuses"), pytest.param(True, id="that is silent")])
def test_before_an_api_server_the_writer_ends_with_an_error(playground: Playground, silent: bool) -> None:
    """Before a standby may begin: tests/unit/test_election.py, on a clock that no machine can stop."""
    wire = over_a_wire(playground)
    playground.told["COWEST_LEASE"] = lease = f"of-silence-{silent}".lower()
    with playground.operator("one", as_shipped=True) as writer:
        playground.wait(lambda: lease_of(playground, lease) == "one", "the lease")
        wire.silent = silent
        if not silent:
            wire.cut()
        wait_until(lambda: ended(writer), "the writer to end")
        assert writer.returncode == 1
        assert f"the lease {OPERATORS}/{lease} is lost: this replica ends." in playground.log()


def test_a_replica_that_finds_no_api_server_tries_on(playground: Playground) -> None:
    wire = over_a_wire(playground)
    playground.told["COWEST_LEASE"] = "of-a-start"
    wire.cut()
    with playground.operator("one") as process:
        playground.wait(lambda: playground.log().count("cannot be read") > 1, "a second try")
        wire.mend()
        playground.wait(lambda: lease_of(playground, "of-a-start") == "one", "the lease")
        assert not ended(process)


def test_while_the_object_store_is_away_the_status_says_so_and_the_job_stays_ready(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **{"rounds": {"max": 1, "trigger": {"newTraces": 5}}}))
        playground.wait(
            lambda: playground.condition("claims", "RoundProgressing").get("reason") == "WaitingForTraces", "rest", 120
        )
        playground.script.store_away = True
        playground.wait(lambda: playground.condition("claims", "Degraded")["status"] == "True", "the trouble", 90)
        assert playground.condition("claims", "Degraded")["reason"] == "ObjectStoreUnavailable"
        assert playground.condition("claims", "Ready")["status"] == "True"
        playground.script.store_away = False
        playground.wait(lambda: playground.condition("claims", "Degraded")["status"] == "False", "healing", 120)


def test_without_a_deletion_policy_a_job_goes_at_once_and_no_finalizer_was_ever_there(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        assert "finalizers" not in playground.job("claims")["metadata"]
    playground.server.request("DELETE", f"{JOBS}/claims")
    assert playground.get(f"{JOBS}/claims") is None


def test_with_delete_the_artifacts_are_erased_before_the_job_goes(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", deletionPolicy={"models": "Delete", "traces": "Delete"}))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        assert playground.job("claims")["metadata"]["finalizers"] == ["cowest.dev/artifacts"]
        playground.server.request("DELETE", f"{JOBS}/claims")
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)
        orders = playground.get(f"{MAPS}/claims-erase")["data"]["step.json"]
    assert '["--what","all"]' in orders and "cowest_training.erase" in orders


DELETED = {"models": "Delete", "traces": "Delete"}


def test_what_writes_ends_before_its_artifacts_are_erased_and_no_step_is_waited_for(playground: Playground) -> None:
    playground.script.endings = {"check": [{"phase": "Running"}], "erase": [{"phase": "Running"}]}
    with playground.operator():
        apply(playground, manifest_of("claims", deletionPolicy=DELETED))
        playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-r0-check") is not None, "a step that runs")
        playground.wait(lambda: playground.get(f"{DEPLOYMENTS}/claims-gateway") is not None, "the gateway")
        playground.server.request("DELETE", f"{JOBS}/claims")
        playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-erase") is not None, "the erasing", 60)
        assert playground.get(f"{WORKFLOWS}/claims-r0-check") is None
        assert playground.get(f"{DEPLOYMENTS}/claims-gateway") is None
        spec = playground.get(f"{WORKFLOWS}/claims-erase")["spec"]
        assert "synchronization" not in spec and spec["entrypoint"] == "light" and "workflowTemplateRef" not in spec
        playground.script.endings = {}
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)


def test_the_account_that_a_foreground_delete_took_first_is_made_again_for_the_erasing(playground: Playground) -> None:
    """The garbage collector deletes children before the job that waits for its finalizer."""
    account = "/api/v1/namespaces/default/serviceaccounts/claims-steps"
    role = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles/claims-steps"
    playground.script.endings = {"erase": [{"phase": "Running"}]}
    with playground.operator():
        apply(playground, manifest_of("claims", deletionPolicy=DELETED))
        playground.wait(lambda: bool(playground.job("claims")["metadata"].get("finalizers")), "the finalizer")
        playground.wait(lambda: playground.get(role) is not None, "the steps' role")
        playground.server.request("DELETE", f"{JOBS}/claims")
        for path in (account, role):
            playground.server.request("DELETE", path)
        playground.wait(lambda: playground.get(account) is not None, "the account")
        playground.wait(lambda: playground.get(role) is not None, "the role")
        playground.script.endings = {}
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)


def erasings(playground: Playground) -> list[Any]:
    """The phase of each."""
    found = (w for w in playground.items(WORKFLOWS) if w["metadata"]["labels"]["cowest.dev/step"] == "erase")
    return [(each.get("status") or {}).get("phase") for each in found]


def delete(playground: Playground) -> None:
    status, answer = playground.server.request("DELETE", f"{JOBS}/claims")
    assert status == 200, answer


@pytest.mark.parametrize("begun", [False, True], ids=["before the delete", "in the middle of the erasing"])
def test_with_delete_a_job_stays_while_no_operator_runs_and_goes_when_one_is_back(
    playground: Playground, begun: bool
) -> None:
    """Until then it serves on, but for what the erasing has ended; what was begun is not begun again."""
    playground.script.endings = {"erase": [{"phase": "Running"}]}
    with playground.operator() as process:
        apply(playground, manifest_of("claims", **ONE_ROUND_LATER, deletionPolicy=DELETED))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        playground.wait(lambda: playground.get(f"{DEPLOYMENTS}/claims-gateway") is not None, "the gateway")
        if begun:
            delete(playground)
            playground.wait(lambda: len(erasings(playground)) == 1, "the erasing")
        process.kill()
        process.wait()
    if not begun:
        delete(playground)
    playground.script.endings = {}
    playground.wait(lambda: erasings(playground) == ["Succeeded"] * begun, "what Argo does meanwhile")
    left = playground.job("claims")["metadata"]
    assert left["finalizers"] == ["cowest.dev/artifacts"] and "deletionTimestamp" in left
    assert (playground.get(f"{DEPLOYMENTS}/claims-gateway") is None) is begun
    with playground.operator():
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)
    assert erasings(playground) == ["Succeeded"]


def test_an_operator_that_is_back_after_the_time_limit_lets_the_job_go_with_its_artifacts(
    playground: Playground,
) -> None:
    playground.script.endings = {"erase": [{"phase": "Running"}]}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONE_ROUND_LATER, deletionPolicy=DELETED))
        playground.wait(lambda: bool(playground.job("claims")["metadata"].get("finalizers")), "the finalizer")
        delete(playground)
        playground.wait(lambda: len(erasings(playground)) == 1, "the erasing")
    assert playground.job("claims")["metadata"]["finalizers"] == ["cowest.dev/artifacts"], "ten minutes are not over"
    playground.swaps = "from cowest_operator import farewell\nfarewell.LIMIT = 1.0\n"
    with playground.operator():
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)
    assert "its artifacts were not erased: not within 1 s" in playground.log()
    assert erasings(playground) == ["Running"]


def test_an_erasing_that_failed_is_tried_again(playground: Playground) -> None:
    playground.script.exit_codes = {"erase": [1]}
    with playground.operator():
        apply(playground, manifest_of("claims", deletionPolicy=DELETED))
        playground.wait(lambda: bool(playground.job("claims")["metadata"].get("finalizers")), "the finalizer")
        playground.server.request("DELETE", f"{JOBS}/claims")
        playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the job to go", 60)
        assert playground.get(f"{WORKFLOWS}/claims-erase-2") is not None


def test_in_a_namespace_that_is_being_deleted_a_job_goes_at_once(playground: Playground) -> None:
    space, jobs = "/api/v1/namespaces/going", JOBS.replace("/default/", "/going/")
    assert playground.server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "going"}})[0] == 201
    with playground.operator():
        job = manifest_of("claims", deletionPolicy=DELETED)
        job["metadata"]["namespace"] = "going"
        assert playground.server.request("POST", jobs, job)[0] == 201
        finalizers = lambda: (playground.get(f"{jobs}/claims") or {"metadata": {}})["metadata"].get("finalizers")  # noqa: E731
        playground.wait(lambda: bool(finalizers()), "the finalizer")
        playground.server.request("DELETE", space)
        playground.wait(lambda: playground.get(space)["status"]["phase"] == "Terminating", "the namespace to go")
        playground.server.request("DELETE", f"{jobs}/claims")
        playground.wait(lambda: playground.get(f"{jobs}/claims") is None, "the job to go", 30)
        assert "its namespace is being deleted" in playground.log()


def test_a_delete_policy_that_is_taken_back_takes_the_finalizer_with_it(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", deletionPolicy={"models": "Delete"}))
        playground.wait(lambda: bool(playground.job("claims")["metadata"].get("finalizers")), "the finalizer")
        edit = {"spec": {"deletionPolicy": {"models": "Keep"}}}
        playground.server.request("PATCH", f"{JOBS}/claims", edit)
        playground.wait(lambda: not playground.job("claims")["metadata"].get("finalizers"), "no finalizer", 30)


# ---------------------------------------------------------------- what no watch has shown
def with_an_operator(playground: Playground, ask: Callable[[Operator], Awaitable[T]]) -> T:
    """One whose watches show nothing."""
    told = settings.read(playground.environment())

    async def asked(kube: Kube) -> T:
        doors = Doors()
        operator = Operator(told, kube, doors)
        try:
            return await ask(operator)
        finally:
            await operator.keeper.close()
            await doors.close()

    return through_kube(playground.server, playground.folder, asked)


def test_a_child_or_a_job_that_went_in_a_gap_of_a_watch_is_noticed(playground: Playground) -> None:
    apply(playground, manifest_of("claims"))
    job = playground.job("claims")
    owner = {"apiVersion": "cowest.dev/v1alpha1", "kind": "CollaborationJob", "name": "claims", "controller": True,
             "uid": job["metadata"]["uid"]}  # fmt: skip
    for name in ("stays", "goes"):
        metadata = {"name": name, "labels": {"cowest.dev/job": "claims"}, "ownerReferences": [owner]}
        assert playground.server.request("POST", MAPS, {"metadata": metadata})[0] == 201
    maps = [{**each, "kind": "ConfigMap"} for each in playground.items(MAPS)]
    playground.server.request("DELETE", f"{MAPS}/goes")

    async def looked(operator: Operator) -> tuple[set[str], set[str]]:
        await operator.keeper.close()  # it shall look, and write nothing
        operator.watched.job(None, job)
        for each in maps:
            operator.watched.child(None, "ConfigMap", each)
        await operator.keeper.look_for_the_gone()
        left = {seen.name for seen in operator.watched.families[NAMESPACE, "claims"].of("ConfigMap")}
        playground.server.request("DELETE", f"{JOBS}/claims")
        await operator.keeper.look_for_the_gone()
        return left, {name for _, name in operator.watched.families}

    assert with_an_operator(playground, looked) == ({"stays"}, set())


def test_a_status_is_never_written_to_another_job_of_the_same_name(playground: Playground) -> None:
    async def written(operator: Operator) -> None:
        write = operator.keeper.applier.put_status
        apply(playground, manifest_of("claims"))
        uid, version = playground.job("claims")["metadata"]["uid"], writes(playground, "claims")
        version = await write(NAMESPACE, "claims", {"observedGeneration": 7}, uid, version)
        assert playground.status("claims")["observedGeneration"] == 7
        for again in (True, False):
            playground.server.request("DELETE", f"{JOBS}/claims")
            if again:
                apply(playground, manifest_of("claims"))
            with pytest.raises(JobGoneError):
                await write(NAMESPACE, "claims", {"observedGeneration": 8}, uid, version)
            assert not again or playground.status("claims") == {}

    with_an_operator(playground, written)


def test_a_status_decided_from_what_somebody_wrote_over_is_not_written(playground: Playground) -> None:
    async def written(operator: Operator) -> None:
        apply(playground, manifest_of("claims"))
        uid, version = playground.job("claims")["metadata"]["uid"], writes(playground, "claims")
        said = {"metadata": {"annotations": {"cowest.dev/note": "hello"}}}
        playground.server.request("PATCH", f"{JOBS}/claims", said)
        with pytest.raises(OvertakenError) as caught:
            await operator.keeper.applier.put_status(NAMESPACE, "claims", {"observedGeneration": 7}, uid, version)
        assert caught.value.job["metadata"]["annotations"]["cowest.dev/note"] == "hello"
        assert playground.status("claims") == {}

    with_an_operator(playground, written)


def test_two_operators_by_mistake_decide_as_one(playground: Playground) -> None:
    """Each has a lease of its own. What one has decided the other goes on from: no transition is taken back."""
    seen: list[tuple[int, int]] = []

    def over() -> bool:
        state = playground.status("claims").get("state") or {}
        seen.append((int(state.get("trials", 0)), len(state.get("rounds", ()))))
        return seen[-1][1] == 2

    with playground.operator("one"):
        playground.wait(lambda: bool(lease_of(playground)), "the lease of one")
        playground.told["COWEST_LEASE"] = "of-another"
        with playground.operator("two"):
            playground.wait(lambda: bool(lease_of(playground, "of-another")), "the lease of the other")
            apply(playground, manifest_of("claims"))
            playground.wait(over, "two rounds", 120)
    assert seen == sorted(seen), "a decision was taken back"
    assert [decision for _, decision, _ in decisions(playground, "claims")] == ["Promoted", "Promoted"]
