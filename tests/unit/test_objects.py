"""What a plan becomes on a cluster: names, rights, secrets and the restricted profile. No cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cowest_operator import api, reconcile
from cowest_operator.objects import common, steps, weak
from cowest_operator.objects.common import Child, Context
from cowest_operator.objects.desired import desired, followed, frozen_manifest
from cowest_operator.settings import Images
from cowest_serving.contract import SecretRef
from tests import world
from tests.world import CANDIDATE, PREPARED, STABLE, on_trial

STORE = api.ObjectStore("cowest", "http://minio:9000", "desks", "us-east-1", True, None, api.NameRef("store"))
LONGEST = "a" * 40


def context(name: str = "claims", **sections: Any) -> Context:
    job = world.job(object_store=STORE, **sections)
    strong = replace(job.spec.strong, api_key_secret_refs=(SecretRef("strong", "api-key"),))
    job = replace(job, name=name, spec=replace(job.spec, strong=strong))
    document = {
        "apiVersion": "cowest.dev/v1alpha1",
        "kind": "CollaborationJob",
        "metadata": {"name": name},
        "spec": {name: {} for name in ("weak", "strong", "collaboration", "data", "feedback", "training", "rounds")},
    }
    return Context(job, "desks", "uid-1", document, Images("serving:1", "training:1", "vllm:1"))


def plan(seen: Context, **changes: Any) -> api.Plan:
    return reconcile.plan(world.world(job=seen.job, store=seen.store, **changes))


def everything(seen: Context) -> tuple[Child, ...]:
    """All kinds of children: a canary runs, a step is submitted."""
    canary = plan(seen, status=on_trial(stage="Canary", done=PREPARED))
    step = plan(seen, status=world.on_trial()).steps[0]
    return (*desired(seen, canary), steps.step_map(seen, step), steps.workflow(seen, step), frozen_manifest(
        seen, world.trial()))  # fmt: skip


def pods(children: tuple[Child, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for child in children:
        name = f"{child['kind']} {child['metadata']['name']}"
        if child["kind"] == "Deployment":
            yield name, child["spec"]["template"]["spec"]
        elif child["kind"] == "InferenceService":
            yield name, child["spec"]["predictor"]
        elif child["kind"] == "WorkflowTemplate":
            template = child["spec"]["templates"][0]
            yield name, {**child["spec"], "containers": [template["container"]], "volumes": template["volumes"]}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_every_container_passes_the_restricted_profile_with_a_read_only_root() -> None:
    seen = 0
    for name, pod in pods(everything(context())):
        assert pod["securityContext"]["runAsNonRoot"], name
        for each in containers(pod):
            safe = each["securityContext"]
            assert safe["readOnlyRootFilesystem"] and safe["runAsNonRoot"], name
            assert not safe["allowPrivilegeEscalation"] and safe["capabilities"] == {"drop": ["ALL"]}, name
            assert safe["seccompProfile"] == {"type": "RuntimeDefault"}, name
            seen += 1
    assert seen == 10


def test_strong_keys_are_mounted_in_gateway_and_proxy_alone() -> None:
    with_keys = {name for name, pod in pods(everything(context())) if '"strong"' in json.dumps(pod["volumes"])}
    assert with_keys == {"Deployment claims-gateway", "Deployment claims-proxy"}


def test_the_token_is_mounted_where_no_key_is() -> None:
    gateway = next(pod for name, pod in pods(everything(context())) if name == "Deployment claims-gateway")
    mounts = {each["name"]: {m["name"] for m in each["volumeMounts"]} for each in gateway["containers"]}
    assert "token" in mounts["routing"] and "strong-keys" not in mounts["routing"]
    assert "strong-keys" in mounts["gateway"] and "token" not in mounts["gateway"]
    assert gateway["automountServiceAccountToken"] is False


def test_the_same_plan_gives_the_same_objects() -> None:
    assert everything(context()) == everything(context())


def test_names_stay_within_their_limits_for_the_longest_job() -> None:
    seen = context(LONGEST)
    for child in everything(seen):
        name = child["metadata"]["name"]
        assert len(name) <= (48 if child["kind"] == "InferenceService" else 63), child["kind"]
    last = replace(world.trial(), number=9999)
    step = api.StepSpec(f"r{last.number}-feedback", "cowest_training.feedback", "s3://b/x")
    assert len(steps.workflow_name(seen, step, 99)) <= 63


def test_a_weak_model_is_named_by_its_digest_and_not_by_its_role() -> None:
    seen = context()
    as_candidate = weak.inference_service(seen, api.ServerSpec(CANDIDATE.weak_digest, CANDIDATE.weak_uri))
    assert as_candidate["metadata"]["name"] == weak.server_name(seen, CANDIDATE.weak_digest)
    assert as_candidate["metadata"]["name"] != weak.server_name(seen, STABLE.weak_digest)
    assert as_candidate["metadata"]["annotations"][weak.DIGEST_ANNOTATION] == CANDIDATE.weak_digest


def test_the_weak_model_is_fetched_by_digest_before_it_is_served() -> None:
    pod = weak.inference_service(context(), api.ServerSpec("sha256:abc", "s3://b/m"))["spec"]["predictor"]
    (fetch,) = pod["initContainers"]
    assert fetch["args"] == ["--model", "s3://b/m", "--digest", "sha256:abc", "--out", weak.MODEL_FOLDER]


def test_vllm_serves_under_the_digest_too_so_that_readiness_can_be_proven() -> None:
    seen = context(weak={"engine": "vLLM"})
    pod = weak.inference_service(seen, api.ServerSpec("sha256:abc", "s3://b/m"))["spec"]["predictor"]
    (server,) = pod["containers"]
    names = server["args"][server["args"].index("--served-model-name") + 1 :]
    assert server["image"] == "vllm:1" and names[:2] == ["weak", "sha256:abc"]


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        pytest.param({"nodeSelector": {"gpu": "yes"}}, {"gpu": "yes"}, id="a selector is added"),
        pytest.param({"nodeSelector": {}}, {}, id="an empty one changes nothing"),
    ],
)
def test_the_pod_template_of_the_manifest_is_laid_over_ours(over: dict[str, Any], expected: dict[str, Any]) -> None:
    seen = context(weak={"pod_template": api.PodTemplate(spec=over)})
    pod = weak.inference_service(seen, api.ServerSpec("sha256:abc", "s3://b/m"))["spec"]["predictor"]
    assert pod.get("nodeSelector", {}) == expected
    assert pod["containers"][0]["name"] == "kserve-container"


def test_named_lists_are_merged_by_name_and_others_replaced() -> None:
    base = {"containers": [{"name": "a", "image": "x", "args": ["1"]}], "tolerations": [{"key": "old"}]}
    over = {"containers": [{"name": "a", "args": ["2"]}, {"name": "b"}], "tolerations": [{"key": "new"}]}
    assert common.laid_over(base, over) == {
        "containers": [{"name": "a", "image": "x", "args": ["2"]}, {"name": "b"}],
        "tolerations": [{"key": "old"}, {"key": "new"}],
    }


def test_an_edit_that_no_server_reads_rolls_no_server() -> None:
    one, other = context(), context()
    edited = {**other.document, "spec": {**other.document["spec"], "rounds": {"max": 7}}}
    assert common.job_volume(one) == common.job_volume(replace(other, document=edited))


def test_a_running_trial_keeps_its_data_and_takes_a_new_budget() -> None:
    before = {"spec": {"data": {"train": "old"}, "strong": {"budget": 1}, "training": {"seed": 1}}}
    after = {"spec": {"data": {"train": "new"}, "strong": {"budget": 2}, "training": {"seed": 2}}}
    assert followed(before, after)["spec"] == {
        "data": {"train": "old"},
        "strong": {"budget": 2},
        "training": {"seed": 1},
    }


def test_steps_are_retried_by_exit_code_and_never_two_at_a_time() -> None:
    spec = steps.workflow_template(context())["spec"]
    expression = spec["templates"][0]["retryStrategy"]["expression"]
    assert "'75'" in expression and "'2'" not in expression and "'76'" not in expression
    assert spec["synchronization"] == {"mutexes": [{"name": "claims-steps"}]}


def test_two_jobs_in_one_bucket_do_not_share_a_folder() -> None:
    assert context("a").store == "s3://cowest/desks/desks/a"
    assert context("b").store != context("a").store


def test_an_autoscaled_gateway_leaves_its_replicas_to_the_autoscaler() -> None:
    children = {common.key_of(c): c for c in everything(context(gateway={"replicas": 2, "max_replicas": 5}))}
    assert "replicas" not in children["Deployment", "claims-gateway"]["spec"]
    scaler = children["HorizontalPodAutoscaler", "claims-gateway"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert ("PodDisruptionBudget", "claims-gateway") in children
