"""What goes wrong around the operator: the world before, the event, what is said meanwhile, the exact end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest

from cowest_operator import api
from tests.apiserver.conftest import CRDS, JOBS, ApiServer, wait_until
from tests.apiserver.playground import (
    CHILDREN,
    DEPLOYMENTS,
    EVENTS,
    KSERVE,
    MAPS,
    PODS,
    SERVING,
    TEMPLATES,
    WORKFLOWS,
    Playground,
    apply,
    decisions,
    install,
    manifest_of,
)

ADMISSION = "/apis/admissionregistration.k8s.io/v1"
PROMOTED = [(0, "Promoted", api.REASON_PROMOTED), (1, "Promoted", api.REASON_PROMOTED)]
ONLY_BASELINE: Mapping[str, Any] = {"rounds": {"max": 1, "trigger": {"newTraces": 5}}}


def reason(playground: Playground, name: str, kind: str) -> str:
    return str(playground.condition(name, kind).get("reason"))


def wait_for_reason(playground: Playground, name: str, kind: str, wanted: str, seconds: float = 60.0) -> None:
    playground.wait(lambda: reason(playground, name, kind) == wanted, f"{kind} for {wanted}", seconds)


def wait_for_end(playground: Playground, name: str = "claims") -> None:
    wait_for_reason(playground, name, api.ROUND_PROGRESSING, api.REASON_MAX_ROUNDS, 120)


def wake(playground: Playground, name: str = "claims") -> None:
    """Any change of a job makes the operator look."""
    note = {"metadata": {"annotations": {"looked-at": str(time.monotonic())}}}
    playground.server.request("PATCH", f"{JOBS}/{name}", note)


def attempts(playground: Playground, step: str, name: str = "claims") -> list[str]:
    """Names of a step's Workflows."""
    wanted = {"cowest.dev/job": name, "cowest.dev/step": step}
    found = [w["metadata"] for w in playground.items(WORKFLOWS)]
    return sorted(m["name"] for m in found if wanted.items() <= m["labels"].items())


def in_canary(playground: Playground) -> bool:
    return playground.status("claims").get("candidate", {}).get("round") == 1 and "step" in playground.status(
        "claims"
    ).get("traffic", {})


def hold_in_canary(playground: Playground, **edits: Any) -> None:
    """The job in the first canary step of its first tuned round, where no live report lets it go on."""
    apply(playground, manifest_of("claims", **edits))
    playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
    playground.script.live_works = False
    playground.wait(lambda: in_canary(playground), "the canary", 120)
    playground.wait(lambda: routing(playground)["arms"][-1]["name"] == "candidate", "traffic for the candidate")


def routing(playground: Playground) -> dict[str, Any]:
    found = playground.get(f"{MAPS}/claims-routing")
    return dict(json.loads(found["data"]["routing.json"])) if found else {"version": 0, "arms": [{"name": ""}]}


# ---------------------------------------------------------------- the API server refuses
@contextmanager
def policy(server: ApiServer) -> Iterator[None]:
    """Each new InferenceService is refused, with words."""
    rule = {"apiGroups": ["serving.kserve.io"], "apiVersions": ["*"], "operations": ["CREATE"],
            "resources": ["inferenceservices"]}  # fmt: skip
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "false", "message": "no more models on Fridays"}],
    }
    binding = {"policyName": "no-models", "validationActions": ["Deny"]}
    paths = [f"{ADMISSION}/validatingadmissionpolicies", f"{ADMISSION}/validatingadmissionpolicybindings"]
    with existing(server, {paths[0]: {"spec": spec}, paths[1]: {"spec": binding}}, "no-models"):
        yield


@contextmanager
def webhook(
    server: ApiServer, group: str = "serving.kserve.io", resource: str = "inferenceservices", path: str = SERVING
) -> Iterator[None]:
    """Somebody's own check of new objects, while they are away: KServe's of InferenceServices."""
    rule = {"apiGroups": [group], "apiVersions": ["*"], "operations": ["CREATE"], "resources": [resource]}
    hook = {
        "name": "inferenceservice.kserve.io",
        "clientConfig": {"url": "https://127.0.0.1:9/validate"},  # nobody listens there
        "rules": [rule],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 2,
    }
    hooks = f"{ADMISSION}/validatingwebhookconfigurations"
    with existing(server, {hooks: {"webhooks": [hook]}}, "kserve", path):
        yield


@contextmanager
def existing(
    server: ApiServer, bodies: Mapping[str, Mapping[str, Any]], name: str, tried: str = SERVING
) -> Iterator[None]:
    """From when it works until it works no more."""
    for path, body in bodies.items():
        status, answer = server.request("POST", path, {"metadata": {"name": name}, **body})
        assert status == 201, answer
    try:
        wait_until(lambda: _try(server, tried) >= 400, f"{name} to refuse", 60)
        yield
    finally:
        for path in reversed(list(bodies)):
            server.request("DELETE", f"{path}/{name}")
    wait_until(lambda: _try(server, tried) == 201, f"{name} to be gone", 60)


def _try(server: ApiServer, path: str) -> int:
    body: dict[str, Any] = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    if path == WORKFLOWS:
        body = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    if path == DEPLOYMENTS:
        pod = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "main", "image": "x"}]}}
        body = {"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": pod}}
    return server.request("POST", f"{path}?dryRun=All", {**body, "metadata": {"name": "try"}})[0]


@pytest.mark.parametrize(
    ("refusing", "words"),
    [
        pytest.param(policy, "no more models on Fridays", id="a policy refuses"),
        pytest.param(webhook, "failed calling webhook", id="the webhook is away"),
    ],
)
def test_a_model_server_that_is_refused_is_said_stable_goes_on_and_it_heals(
    playground: Playground, refusing: Any, words: str
) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
        stable = playground.status("claims")["stable"]["digest"]
        playground.script.live_works = False  # nobody asks a model that is not served
        with refusing(playground.server):
            wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_API_REFUSED, 90)
            assert words in playground.condition("claims", api.DEGRADED)["message"]
            assert playground.condition("claims", api.READY)["status"] == "True"
            time.sleep(3)  # some more looks
            assert playground.status("claims")["stable"]["digest"] == stable
            (arm,) = routing(playground)["arms"]
            assert (arm["name"], arm["weightPercent"], arm["mode"]) == ("stable", 100, "Pair")
        playground.script.live_works = True
        wait_for_end(playground)
        assert decisions(playground, "claims") == PROMOTED
        assert playground.condition("claims", api.DEGRADED)["status"] == "False"


def test_while_deployments_are_refused_the_status_says_so_the_rest_is_made_and_it_heals(playground: Playground) -> None:
    with playground.operator(), webhook(playground.server, "apps", "deployments", DEPLOYMENTS):
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_API_REFUSED, 90)
        assert "failed calling webhook" in playground.condition("claims", api.DEGRADED)["message"]
        assert playground.status("claims")["observedGeneration"] == 1
        playground.wait(lambda: playground.get(f"{TEMPLATES}/{steps_template(playground)}") is not None, "the rest")
        playground.server.request("DELETE", f"{ADMISSION}/validatingwebhookconfigurations/kserve")
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED, 90)


def steps_template(playground: Playground) -> str:
    return next((each["metadata"]["name"] for each in playground.items(TEMPLATES)), "")


def test_a_routing_that_somebody_made_immutable_is_made_anew(playground: Playground) -> None:
    with playground.operator():
        hold_in_canary(playground)
        before = routing(playground)
        playground.server.request("PATCH", f"{MAPS}/claims-routing", {"immutable": True})
        said = {"verb": "rollback", "by": "ann", "why": "complaints", "at": time.time()}
        note = {f"cowest.dev/action.{time.time_ns():020d}-rollback": json.dumps(said)}
        playground.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": note}})
        playground.wait(lambda: [arm["name"] for arm in routing(playground)["arms"]] == ["stable"], "the rollback")
        assert routing(playground)["version"] > before["version"]


def test_a_rollback_is_heard_while_the_manifest_cannot_be_followed(playground: Playground) -> None:
    with playground.operator():
        hold_in_canary(playground)
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"data": {"train": "file:///rows.jsonl"}}})
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_NOT_ON_KUBERNETES)
        said = {"verb": "rollback", "by": "ann", "why": "complaints", "at": time.time()}
        note = {f"cowest.dev/action.{time.time_ns():020d}-rollback": json.dumps(said)}
        playground.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": note}})
        playground.wait(lambda: [arm["name"] for arm in routing(playground)["arms"]] == ["stable"], "the rollback")
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_NOT_ON_KUBERNETES)
        assert decisions(playground, "claims")[1] == (1, "RolledBack", api.REASON_ROLLED_BACK_BY_PERSON)


def test_without_kserve_the_status_says_so_and_it_heals_when_kserve_comes(playground: Playground) -> None:
    crd = f"{CRDS}/inferenceservices.serving.kserve.io"
    playground.server.request("DELETE", crd)
    wait_until(lambda: playground.server.request("GET", crd)[0] == 404, "the kind to go")
    try:
        with playground.operator():
            apply(playground, manifest_of("claims", **ONLY_BASELINE))
            wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_NO_KSERVE, 90)
            # The strong model answers alone.
            playground.wait(lambda: playground.condition("claims", api.READY)["status"] == "True", "Ready")
            assert routing(playground)["arms"][0]["mode"] == "StrongAlone"
            install(playground.server, KSERVE)
            playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 90)
            wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)
    finally:
        if playground.server.request("GET", crd)[0] == 404:
            install(playground.server, KSERVE)


def test_a_webhook_that_is_away_for_workflows_in_the_middle_of_a_trial_is_said_and_it_heals(
    playground: Playground,
) -> None:
    playground.script.argo_works = False
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: attempts(playground, "r0-check") != [], "the first step", 60)
        with webhook(playground.server, "argoproj.io", "workflows", WORKFLOWS):
            playground.script.argo_works = True
            wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_API_REFUSED, 90)
            assert "Workflow: the API server refuses" in playground.condition("claims", api.DEGRADED)["message"]
        wake(playground)
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED, 90)


def test_a_quota_that_refuses_a_weak_models_pods_is_said_in_its_words_and_it_heals(playground: Playground) -> None:
    playground.script.quota = 'pods "x" is forbidden: exceeded quota: desk'
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_PODS_FAIL, 90)
        message = playground.condition("claims", api.DEGRADED)["message"]
        assert f"-predictor: its pods are not made: {playground.script.quota}" in message
        playground.script.quota = ""
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)
        assert len(playground.script.predictors) == 1, "what KServe makes is left alone"


def test_while_a_rollout_is_stuck_the_manifest_that_old_pods_mount_stays(playground: Playground) -> None:
    def mounted() -> set[str]:
        names = (each["metadata"]["name"] for each in playground.items(MAPS))
        return {name for name in names if name.startswith("claims-job-")}

    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        before = mounted()
        playground.script.rolls_out = False
        edit = {"spec": {"strong": {"timeoutSeconds": 77}}}
        playground.server.request("PATCH", f"{JOBS}/claims", edit)
        playground.wait(lambda: playground.status("claims")["observedGeneration"] == 2, "the edit to be seen")
        for _ in range(3):
            time.sleep(1)
            wake(playground)
        assert before < mounted()
        playground.script.rolls_out = True
        playground.wait(lambda: len(mounted()) == 1 and not before & mounted(), "the old one to go")


# ---------------------------------------------------------------- steps
def test_while_argo_is_away_a_step_waits_and_is_not_submitted_again(playground: Playground) -> None:
    playground.script.argo_works = False
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: attempts(playground, "r0-check") == ["claims-r0-check"], "the first step")
        playground.wait(lambda: playground.condition("claims", api.READY).get("status") == "True", "Ready")
        for _ in range(5):
            time.sleep(1)
            wake(playground)
        assert [w["metadata"]["name"] for w in playground.items(WORKFLOWS)] == ["claims-r0-check"]
        seen = playground.condition("claims", api.ROUND_PROGRESSING)
        assert seen["status"] == "True" and "r0-check" in seen["message"]
        playground.script.argo_works = True
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
    assert len(attempts(playground, "r0-check")) == 1


def ended(phase: str, message: str, code: str | None = None) -> dict[str, Any]:
    """Argo's status of a Workflow whose one pod ended so."""
    node: dict[str, Any] = {"type": "Pod", "phase": phase, "message": message}
    if code is not None:
        node["outputs"] = {"exitCode": code}
    return {"phase": phase, "message": message, "nodes": {"a": node}}


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(ended("Failed", "OOMKilled (exit code 137)", "137"), id="out of memory"),
        pytest.param(ended("Error", "The node was low on resource: memory. Pod was evicted."), id="evicted"),
        pytest.param(ended("Error", "pod deleted"), id="its node went away"),
    ],
)
def test_a_step_whose_pod_was_taken_away_is_said_and_runs_again(
    playground: Playground, ending: Mapping[str, Any]
) -> None:
    playground.script.endings = {"check": [ending]}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_STEP_RETRY)
        assert ending["message"].rstrip(".") in playground.condition("claims", api.ROUND_PROGRESSING)["message"]
        time.sleep(10)  # of patience before a second attempt
        wake(playground)
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
    assert attempts(playground, "r0-check") == ["claims-r0-check", "claims-r0-check-2"]
    assert attempts(playground, "r0-sft") == ["claims-r0-sft"]


def test_data_that_are_not_there_yet_are_said_once_looked_for_without_a_write_and_begin_the_job_when_they_come(
    playground: Playground,
) -> None:
    words = "Not in the store yet: spec.data.train (s3://desk/train.jsonl)."
    missing = ended("Failed", words, "66")
    playground.script.endings = {"check": [missing] * 9}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_DATA_MISSING)
        playground.wait(lambda: playground.condition("claims", api.READY).get("status") == "True", "Ready")
        said = playground.condition("claims", api.ROUND_PROGRESSING)
        assert (said["status"], said["message"]) == ("True", f"step r0-check: {words}")
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)
        playground.wait(lambda: playground.status("claims")["budget"]["calls"] == 10, "what its pods say", 90)
        before, looks = playground.job("claims")["metadata"]["resourceVersion"], attempts(playground, "r0-check")
        next_one = f"claims-r0-check-{len(looks) + 1}"
        playground.wait(lambda: over(playground, next_one), "the end of another look", 120)
        time.sleep(1)
        assert playground.job("claims")["metadata"]["resourceVersion"] == before, "nothing has changed"
        playground.script.endings = {}
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 180)


def over(playground: Playground, workflow: str) -> bool:
    found = playground.get(f"{WORKFLOWS}/{workflow}") or {}
    return (found.get("status") or {}).get("phase") == "Failed"


def test_a_step_that_ran_for_too_long_is_said_also_while_it_runs_again(playground: Playground) -> None:
    words = "Pod was active on the node longer than the specified deadline"
    again = {"phase": "Running", "nodes": {"a": {"type": "Pod", "phase": "Running"}}}
    playground.script.endings = {"check": [ended("Failed", words, "143"), again]}
    with playground.operator():
        apply(playground, manifest_of("claims", **{**ONLY_BASELINE, "training.stepDeadlineSeconds": 7200}))
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_STEP_DEADLINE)
        (template,) = playground.items(TEMPLATES)
        assert {each["activeDeadlineSeconds"] for each in template["spec"]["templates"]} == {7200}
        time.sleep(10)  # of patience before a second attempt
        wake(playground)
        playground.wait(lambda: len(attempts(playground, "r0-check")) == 2, "the second attempt")
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, "CheckingData")
        told = playground.condition("claims", api.DEGRADED)
        assert told["reason"] == api.REASON_STEP_DEADLINE
        assert told["message"].startswith("step r0-check: it ran for 7200 seconds")
        playground.script.endings = {}
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        playground.wait(lambda: reason(playground, "claims", api.DEGRADED) == api.REASON_AS_EXPECTED, "rest")


def says(playground: Playground, verb: str, **more: Any) -> None:
    said = {"verb": verb, "by": "ann", "why": "", "at": time.time(), **more}
    note = {f"cowest.dev/action.{time.time_ns():020d}-{verb}": json.dumps(said)}
    playground.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": note}})


@pytest.mark.parametrize("cure", ["its manifest is there", "pause --now and resume", "the Workflow is deleted"])
def test_a_workflow_that_argo_does_not_end_is_said_and_heals(playground: Playground, cure: str) -> None:
    """Argo has noted that the pod succeeded, and goes no further."""
    stuck = {**ended("Succeeded", "", "0"), "phase": "Running"}
    playground.script.endings, playground.script.left_nothing = {"check": [stuck]}, {"r0-check"}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: attempts(playground, "r0-check") == ["claims-r0-check"], "the first step")
        (before,) = playground.items(WORKFLOWS)
        playground.end_pod_of("claims-r0-check", 90)
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_WORKFLOW_STUCK)
        message = playground.condition("claims", api.DEGRADED)["message"]
        assert "`kubectl cowest pause claims -n default --now`, then `resume`" in message
        assert "`kubectl delete workflow claims-r0-check -n default`" in message
        if cure == "pause --now and resume":
            says(playground, "pause", now=True)
            playground.wait(lambda: attempts(playground, "r0-check") == [], "the Workflow to go")
            says(playground, "resume")
        elif cure == "the Workflow is deleted":
            playground.server.request("DELETE", f"{WORKFLOWS}/claims-r0-check")
        if cure != "its manifest is there":
            playground.script.endings = {}
        playground.script.left_nothing = set()
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        playground.wait(lambda: reason(playground, "claims", api.DEGRADED) == api.REASON_AS_EXPECTED, "rest")
        said = [e["message"] for e in playground.items(EVENTS) if e["reason"] == api.REASON_WORKFLOW_STUCK]
    anew = [w["metadata"]["uid"] for w in playground.items(WORKFLOWS) if w["metadata"]["name"] == "claims-r0-check"]
    assert before["metadata"]["uid"] not in anew
    if cure == "its manifest is there":
        assert anew == [] and any("step r0-check is done" in words for words in said)
    else:
        assert len(anew) == 1


def test_a_step_with_bad_input_is_not_run_again_until_the_manifest_changes(playground: Playground) -> None:
    words = "s3://data/train.jsonl: wanted rows with query and answer, saw none. Give the rows an answer."
    playground.script.endings = {"check": [ended("Failed", words, "2")]}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_STEP_FAILED)
        assert words in playground.condition("claims", api.ROUND_PROGRESSING)["message"]
        assert playground.condition("claims", api.ROUND_PROGRESSING)["status"] == "False"
        assert len(playground.items(WORKFLOWS)) == 1
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"data": {"train": "s3://data/better.jsonl"}}})
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)


def test_a_step_with_bad_input_waits_for_a_person_in_steady_words_and_resume_begins_it_again(
    playground: Playground,
) -> None:
    """It ended before the longest wait between two attempts, and less than an hour ago, when it is looked at again."""
    words = "s3://data/train.jsonl: wanted rows, saw none. Upload them."
    long_ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 1800))
    playground.script.endings = {"check": [{**ended("Failed", words, "2"), "finishedAt": long_ago}]}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_STEP_FAILED)
        playground.wait(lambda: playground.condition("claims", api.READY).get("status") == "True", "Ready")
        playground.wait(lambda: reason(playground, "claims", api.DEGRADED) == api.REASON_STEP_FAILED, "rest")
        told = playground.condition("claims", api.ROUND_PROGRESSING)
        assert words in told["message"] and "`kubectl cowest resume`" in told["message"]
        for _ in range(5):
            time.sleep(1)
            wake(playground)
        assert playground.condition("claims", api.ROUND_PROGRESSING) == told
        assert attempts(playground, "r0-check") == ["claims-r0-check"]
        said = {"verb": "resume", "by": "ann", "why": "the rows are there", "at": time.time()}
        note = {f"cowest.dev/action.{time.time_ns():020d}-resume": json.dumps(said)}
        playground.server.request("PATCH", f"{JOBS}/claims", {"metadata": {"annotations": note}})
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        assert attempts(playground, "r0-check") == ["claims-r0-check", "claims-r0-check-2"]


def test_a_step_that_no_node_can_take_is_healed_by_an_edit(playground: Playground) -> None:
    waits = {"phase": "Running", "nodes": {"a": {"type": "Pod", "phase": "Pending", "message": "Unschedulable"}}}
    playground.script.endings = {"check": [waits]}
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: attempts(playground, "r0-check") == ["claims-r0-check"], "the first step")
        orders = playground.get(f"{MAPS}/claims-r0-check")["data"]
        edit = {"spec": {"training": {"resources": {"requests": {"cpu": "1"}}}}}
        playground.server.request("PATCH", f"{JOBS}/claims", edit)
        playground.wait(lambda: attempts(playground, "r0-check") == ["claims-r0-check-2"], "another one instead")
        assert playground.get(f"{MAPS}/claims-r0-check")["data"]["step.json"] == orders["step.json"]
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)


# ---------------------------------------------------------------- pods
def pod(playground: Playground, job: str, part: str, status: Mapping[str, Any], **more: Any) -> str:
    """A pod as the kubelet reports it; when it was made."""
    name = f"{job}-{part}-x"
    labels = {"cowest.dev/job": job, "app.kubernetes.io/component": part}
    spec = {"containers": [{"name": "main", "image": "x"}], **more}
    body = {"metadata": {"name": name, "labels": labels}, "spec": spec}
    code, answer = playground.server.request("POST", PODS, body)
    assert code == 201, answer
    code, answer = playground.server.request("PATCH", f"{PODS}/{name}/status", {"status": status})
    assert code == 200, answer
    return str(answer["metadata"]["creationTimestamp"])


def at(said: str) -> datetime:
    return datetime.strptime(said, "%Y-%m-%dT%H:%M:%SZ")


def test_the_kubelets_words_for_a_missing_secret_or_image_stand_in_the_status_until_it_is_there(
    playground: Playground,
) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: playground.condition("claims", api.READY).get("status") == "True", "Ready")
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)
        not_started = {"type": "PodReadyToStartContainers", "status": "False"}
        held = {"phase": "Pending", "conditions": [not_started]}
        spec = playground.get(f"{DEPLOYMENTS}/claims-gateway")["spec"]["template"]["spec"]
        mounts = {name: spec[name] for name in ("volumes", "serviceAccountName")}
        made = pod(playground, "claims", "gateway", held, **mounts)
        back_off = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "training:test"'}
        container = {"name": "main", "image": "x", "imageID": "", "ready": False, "restartCount": 0,
                     "state": {"waiting": back_off}}  # fmt: skip
        pod(playground, "claims", "step", {"phase": "Pending", "containerStatuses": [container]})
        time.sleep(21)
        wake(playground)
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_PODS_FAIL)
        degraded = playground.condition("claims", api.DEGRADED)
        patience = at(degraded["lastTransitionTime"]) - at(made)
        assert patience >= timedelta(seconds=20), "pods take a moment to start"
        message = degraded["message"]
        keys = "Secret s3 with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or Secret strong with api-key"
        assert f"claims-gateway-x (gateway) waits for its volumes: is {keys} there?" in message
        assert (
            'claims-step-x (step) container main: ImagePullBackOff: Back-off pulling image "training:test"' in message
        )
        started = {"type": "PodReadyToStartContainers", "status": "True"}
        healed = {"status": {"phase": "Running", "conditions": [started]}}
        playground.server.request("PATCH", f"{PODS}/claims-gateway-x/status", healed)
        playground.server.request("DELETE", f"{PODS}/claims-step-x", {"gracePeriodSeconds": 0})
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)


# ---------------------------------------------------------------- the strong model is away
def word(failing: bool, answered: float | None, **more: Any) -> dict[str, Any]:
    """Of a gateway's readiness."""
    now = time.time()
    seen = {"failures": 9, "since": now - 60, "last_failure": now, "error": "EndpointUnreachable"} if failing else {
        "failures": 0, "since": None, "last_failure": None, "error": None}  # fmt: skip
    return {"failing": failing, "last_answer": answered, **seen, **more}


def test_a_strong_endpoint_that_fails_is_said_once_with_what_to_do_and_heals_with_an_answer(
    playground: Playground,
) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        playground.wait(lambda: reason(playground, "claims", api.DEGRADED) == api.REASON_AS_EXPECTED, "rest")
        playground.script.strong = word(True, None)

        def wait_for(wanted: str) -> None:
            def said() -> bool:
                wake(playground)
                return reason(playground, "claims", api.DEGRADED) == wanted

            playground.wait(said, wanted, 60)

        wait_for(api.REASON_STRONG_FAILS)
        told = playground.condition("claims", api.DEGRADED)
        assert "cannot be reached: does it run" in told["message"]
        assert "whenStrongFails: Fail" in told["message"]
        assert playground.condition("claims", api.READY)["reason"] == api.REASON_STRONG_FAILS, (
            "every answer is an error"
        )

        # Other failures, more of them, and a replica that knows of none: nothing is written.
        version = playground.job("claims")["status"]
        for seen in (word(True, None, error="ServerFault", failures=99), None, word(False, None)):
            playground.script.strong = seen
            for _ in range(6):
                time.sleep(2)
                wake(playground)
        assert playground.job("claims")["status"] == version
        playground.script.strong = word(False, time.time())
        wait_for(api.REASON_AS_EXPECTED)
        assert playground.condition("claims", api.READY)["status"] == "True"


# ---------------------------------------------------------------- jobs beside and after each other
def versions(playground: Playground, uid: str) -> dict[tuple[str, str], str]:
    """(kind, name) -> resourceVersion of all that is owned by a job."""
    return {
        (path.rsplit("/", 1)[1], item["metadata"]["name"]): item["metadata"]["resourceVersion"]
        for path in CHILDREN
        for item in playground.items(path)
        if uid in [owner["uid"] for owner in item["metadata"].get("ownerReferences", ())]
    }


def test_two_jobs_whose_names_begin_alike_leave_each_others_children_alone(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        apply(playground, manifest_of("claims-r1"))
        wait_for_end(playground, "claims-r1")
        wait_for_reason(playground, "claims", api.ROUND_PROGRESSING, api.REASON_WAITING_FOR_TRACES, 120)
        assert decisions(playground, "claims") == PROMOTED[:1]
        assert decisions(playground, "claims-r1") == PROMOTED
        for name in ("claims", "claims-r1"):
            uid = playground.job(name)["metadata"]["uid"]
            for path in CHILDREN:
                for item in playground.items(path):
                    metadata = item["metadata"]
                    if uid in [owner["uid"] for owner in metadata.get("ownerReferences", ())]:
                        assert metadata["labels"]["cowest.dev/job"] == name
                        assert len(metadata["ownerReferences"]) == 1
        other, gone = (playground.job(name)["metadata"]["uid"] for name in ("claims", "claims-r1"))
        before = versions(playground, other)
        playground.server.request("DELETE", f"{JOBS}/claims-r1")
        playground.collect_garbage(gone)
        time.sleep(5)
        assert versions(playground, other) == before
        assert versions(playground, gone) == {}


SERVICES = "/api/v1/namespaces/default/services"


def test_what_is_somebody_elses_under_a_name_of_the_job_stays_as_it_is_is_said_and_heals(
    playground: Playground,
) -> None:
    pods = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "main", "image": "x"}]}}
    bodies: dict[str, Any] = {
        f"{DEPLOYMENTS}/claims-gateway": {"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": pods}},
        f"{SERVICES}/claims-proxy": {"spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}},
        f"{MAPS}/claims-r0": {"data": {"job.json": "mine"}},
    }
    for path, body in bodies.items():
        place, _, name = path.rpartition("/")
        assert playground.server.request("POST", place, {"metadata": {"name": name}, **body})[0] == 201

    def owned() -> dict[str, tuple[str, Any]]:
        """What may not change: only the Deployment's status does."""
        found = {path: playground.get(path) for path in bodies}
        return {
            path: (each["metadata"]["uid"], each["metadata"].get("ownerReferences")) for path, each in found.items()
        }

    before = owned()
    with playground.operator():
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_NAME_TAKEN)
        wake(playground)
        message = playground.condition("claims", api.DEGRADED)["message"]
        for kind in ("Deployment claims-gateway", "Service claims-proxy", "ConfigMap claims-r0"):
            assert f"{kind} exists and is not this job's" in message
        assert owned() == before
        assert playground.get(f"{MAPS}/claims-r0")["data"] == {"job.json": "mine"}
        for path in bodies:
            playground.server.request("DELETE", path)
        wake(playground)
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "the baseline", 120)
        wait_for_reason(playground, "claims", api.DEGRADED, api.REASON_AS_EXPECTED)


def test_a_job_deleted_in_the_middle_of_a_round_is_let_go_and_one_of_its_name_starts_anew(
    playground: Playground,
) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
        playground.script.argo_works = False
        playground.wait(lambda: attempts(playground, "r1-collect") != [], "the round", 60)
        first = playground.job("claims")["metadata"]["uid"]
        playground.server.request("DELETE", f"{JOBS}/claims")
        assert playground.get(f"{JOBS}/claims") is None
        time.sleep(2)
        before = versions(playground, first)
        playground.server.request("DELETE", f"{DEPLOYMENTS}/claims-proxy")
        time.sleep(3)
        del before["deployments", "claims-proxy"]
        assert versions(playground, first) == before, "nobody keeps the children of a job that is gone"
        # Made again before the garbage collector has come: what is there is not its own.
        apply(playground, manifest_of("claims", **ONLY_BASELINE))
        second = playground.job("claims")["metadata"]["uid"]
        playground.wait(lambda: playground.condition("claims", api.READY).get("status") == "True", "Ready")
        time.sleep(3)
        state = playground.status("claims")["state"]
        assert state["candidate"]["done"] == {}, "the steps of another job of this name are no steps of this one"
        playground.script.argo_works = True
        playground.collect_garbage(first)
        wake(playground)
        playground.wait(lambda: decisions(playground, "claims") == PROMOTED[:1], "its own baseline", 120)
    assert versions(playground, first) == {}
    owners = {owner["uid"] for each in playground.items(WORKFLOWS) for owner in each["metadata"]["ownerReferences"]}
    assert owners == {second}
    assert [e["involvedObject"]["uid"] for e in playground.items(EVENTS) if e["reason"] == "RoundStarted"].count(
        second
    ) == 1


# ---------------------------------------------------------------- edits and hands in a canary
def test_an_edit_beside_the_pair_lets_the_canary_go_on_with_its_frozen_manifest(playground: Playground) -> None:
    with playground.operator():
        hold_in_canary(playground)
        frozen = playground.get(f"{MAPS}/claims-r1")
        edit = {"spec": {"training": {"seed": 77}, "feedback": {"minPairs": 9}}}
        playground.server.request("PATCH", f"{JOBS}/claims", edit)
        playground.wait(lambda: playground.status("claims")["observedGeneration"] == 2, "the edit to be seen")
        time.sleep(3)
        assert in_canary(playground)
        assert playground.get(f"{MAPS}/claims-r1") == frozen
        playground.script.live_works = True
        wait_for_end(playground)
    assert decisions(playground, "claims") == PROMOTED


def test_the_watcher_of_a_canary_goes_by_the_frozen_manifest_too(playground: Playground) -> None:
    with playground.operator():
        hold_in_canary(playground)
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"feedback": {"minPairs": 9}}})
        playground.wait(lambda: playground.status("claims")["observedGeneration"] == 2, "the edit to be seen")
        time.sleep(3)
        orders = playground.get(f"{MAPS}/claims-r1-live-0")["data"]
        assert json.loads(orders["job.json"])["spec"]["feedback"]["minPairs"] != 9


def test_an_edit_of_the_pair_ends_the_canary_and_is_the_next_candidate(playground: Playground) -> None:
    with playground.operator():
        hold_in_canary(playground)
        stable = playground.status("claims")["stable"]["digest"]
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"strong": {"model": "stronger"}}})
        playground.wait(lambda: len(decisions(playground, "claims")) == 2, "the end of the canary")
        assert decisions(playground, "claims")[1] == (1, "RolledBack", api.REASON_SPEC_CHANGED)
        assert playground.status("claims")["stable"]["digest"] == stable
        served = playground.status("claims")["stable"]["strongModel"]
        assert other_models(playground) == [f"--other-model={served}"], "steps ask what is served through the proxy"
        playground.script.live_works = True
        playground.wait(lambda: len(decisions(playground, "claims")) >= 3, "the edit's trial", 120)
        third = playground.status("claims")["rounds"][2]
        assert (third["origin"], third["decision"]) == ("Edit", "Promoted")
        assert playground.status("claims")["stable"]["strongModel"] == "stronger"
        assert other_models(playground) == [f"--other-model={served}"], "a rollback goes back to it"


def other_models(playground: Playground) -> list[str]:
    proxy = playground.get(f"{DEPLOYMENTS}/claims-proxy") or {}
    arguments = proxy["spec"]["template"]["spec"]["containers"][0]["args"]
    return [each for each in arguments if each.startswith("--other-model")]


@pytest.mark.parametrize("restarted", [False, True], ids=["by a running operator", "while the operator is away"])
def test_a_routing_deleted_in_a_canary_comes_back_and_is_newer_than_it_was(
    playground: Playground, restarted: bool
) -> None:
    """The same split, and a version that tells gateways and traces apart which is the later one."""
    with playground.operator() as process:
        hold_in_canary(playground)
        before = routing(playground)
        assert before["version"] > 1
        if not restarted:
            playground.server.request("DELETE", f"{MAPS}/claims-routing")
            playground.wait(lambda: routing(playground)["version"] > 0, "the routing", 30)
            assert routing(playground)["arms"] == before["arms"]
            assert routing(playground)["version"] > before["version"]
            return
        process.terminate()
        process.wait(60)
    playground.server.request("DELETE", f"{MAPS}/claims-routing")
    with playground.operator():
        playground.wait(lambda: len(routing(playground)["arms"]) == 2, "the routing", 30)
        assert routing(playground)["arms"] == before["arms"]
        assert routing(playground)["version"] > before["version"]


def test_a_restart_leaves_routing_and_orders_as_they_are(playground: Playground) -> None:
    """Nothing is decided before all that is there was seen: else a version would begin again at one."""
    with playground.operator():
        hold_in_canary(playground)
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"training": {"seed": 77}}})
        playground.wait(lambda: playground.status("claims")["observedGeneration"] == 2, "the edit to be seen")
        time.sleep(2)
    names = ("claims-routing", "claims-r1", "claims-r1-live-0")
    before = {name: playground.get(f"{MAPS}/{name}") for name in names}
    for _ in range(3):
        with playground.operator():
            time.sleep(5)
    assert {name: playground.get(f"{MAPS}/{name}") for name in names} == before
