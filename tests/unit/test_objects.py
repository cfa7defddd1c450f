"""What a plan becomes on a cluster: names, rights, secrets and the restricted profile. No cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowest_operator import api, reconcile
from cowest_operator.manifest import load, resolve_prompts
from cowest_operator.objects import common, servers, steps, weak
from cowest_operator.objects.common import Child, Context
from cowest_operator.objects.desired import desired, followed, frozen_manifest, waiting
from cowest_operator.platform import Platform, troubles
from cowest_operator.settings import Book, Images
from cowest_operator.watched import see
from cowest_serving.app import MAX_BODY, GatewayLimits, GatewaySettings, WeakSettings
from cowest_serving.client_limits import ClientLimits
from cowest_serving.contract import Budget, Fallback, SecretRef, parse
from cowest_serving.proxy import ProxySettings, _parser
from cowest_serving.ray_app import PROXY, ray_settings
from cowest_training.contract import Evaluator, Feedback, Juror
from cowest_training.observer import ObserverSettings
from tests import world
from tests.world import CANDIDATE, PREPARED, STABLE, on_trial

STORE = api.ObjectStore("cowest", "http://minio:9000", "desks", "us-east-1", True, None, api.NameRef("store"))
LONGEST = "a" * 40
ROOT = Path(__file__).parents[2]
PROMPTS = {"draft": "{query}", "refine": "{query} {draft}", "solo": "{query}"}


def context(name: str = "claims", **sections: Any) -> Context:
    job = world.job(object_store=STORE, **sections)
    strong = replace(job.spec.strong, api_key_secret_refs=(SecretRef("strong", "api-key"),))
    job = replace(job, name=name, spec=replace(job.spec, strong=strong))
    document = {
        "apiVersion": "cowest.dev/v1alpha1",
        "kind": "CollaborationJob",
        "metadata": {"name": name},
        "spec": {name: {} for name in ("weak", "strong", "collaboration", "data", "feedback", "training", "rounds")}
        | {"traces": {"spoolBytes": 1 << 30}},
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
        elif child["kind"] == "RayService":
            cluster = child["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield f"{name} {group.get('groupName', 'head')}", group["template"]["spec"]
        elif child["kind"] == "InferenceService":
            yield name, child["spec"]["predictor"]
        elif child["kind"] == "WorkflowTemplate":
            for template in child["spec"]["templates"]:
                if "container" in template:
                    pod = {**child["spec"], "containers": [template["container"]], "volumes": template["volumes"]}
                    yield f"{name} {template['name']}", pod


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
    assert seen == 11


def test_strong_keys_are_mounted_in_gateway_and_proxy_alone() -> None:
    with_keys = {name for name, pod in pods(everything(context())) if '"strong"' in json.dumps(pod["volumes"])}
    assert with_keys == {"Deployment claims-gateway", "Deployment claims-proxy"}


OLDER = replace(STABLE, strong_model="older")
SERVED_ELSEWHERE = replace(STABLE, strong_model="older", strong_endpoint="http://elsewhere/v1")


@pytest.mark.parametrize(
    ("status", "others"),
    [
        pytest.param(world.SERVED, [], id="what is served is what is declared"),
        pytest.param(replace(world.SERVED, stable=OLDER), ["older"], id="an edit, or an edit that was refused"),
        pytest.param(replace(world.SERVED, previous=OLDER), ["older"], id="the edit was promoted, and may be undone"),
        pytest.param(replace(on_trial(stage="Watch"), candidate=world.trial("Watch", pair=OLDER)), ["older"],
                     id="the manifest was edited in the watch"),
        pytest.param(replace(world.SERVED, stable=SERVED_ELSEWHERE), [], id="at another endpoint: asked there"),
    ],
)  # fmt: skip
def test_the_proxy_is_told_of_the_strong_models_of_the_jobs_pairs(status: api.Status, others: list[str]) -> None:
    seen = context()
    children = {common.key_of(c): c for c in desired(seen, replace(plan(seen), status=status))}
    (container,) = children["Deployment", "claims-proxy"]["spec"]["template"]["spec"]["containers"]
    options = _parser().parse_args(container["args"])
    assert options.other_model == others


@pytest.mark.parametrize("kuberay", [False, True], ids=["a Deployment", "KubeRay"])
def test_the_stores_keys_are_files_wherever_the_store_is_reached(kuberay: bool) -> None:
    """A rotated Secret reaches files in a running pod, and its environment never."""
    seen = context(gateway={"engine": "RayServe" if kuberay else "ASGI"})
    found = [(name, each) for name, pod in pods(everything(replace(seen, has_kuberay=kuberay)))
             for each in containers(pod)]  # fmt: skip
    with_store = {f"{name} {each.get('name', 'main')}" for name, each in found
                  if {"name": "COWEST_S3_KEYS_FOLDER", "value": common.STORE_KEYS} in each.get("env", [])}  # fmt: skip
    with_files = {f"{name} {each.get('name', 'main')}" for name, each in found
                  if common.STORE_KEYS in {mount["mountPath"] for mount in each["volumeMounts"]}}  # fmt: skip
    assert with_store == with_files
    assert {each.rpartition(" ")[2] for each in with_store} == {"gateway", "observer", "fetch", "main", "score-live"}
    assert not [name for name, each in found for e in each.get("env", []) if e["name"].startswith("AWS_ACCESS")]


def test_a_session_token_may_be_missing_and_a_key_may_not() -> None:
    (volume,), _ = common.store_volumes(context())
    optional = {source["secret"]["items"][0]["key"]: source["secret"].get("optional", False)
                for source in volume["projected"]["sources"]}  # fmt: skip
    assert optional == {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}


def test_the_environment_of_all_jobs_is_in_every_container_and_ours_is_stronger() -> None:
    given = (
        {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
        {"name": "COWEST_CACHE", "value": "/nowhere"},
        {"name": "COWEST_JOB", "value": "another"},
    )
    for name, pod in pods(everything(replace(context(), job_env=given))):
        for each in containers(pod):
            env = {e["name"]: e.get("value") for e in each["env"]}
            assert len(env) == len(each["env"]), f"{name}: a name that stands twice is refused by the API server"
            assert env["HTTPS_PROXY"] == "http://proxy:3128", name
            assert env["COWEST_CACHE"] == "/tmp/cache" or "COWEST_S3_KEYS_FOLDER" not in env, name


def test_every_log_line_can_say_which_job_and_which_step_it_is_about() -> None:
    built = everything(context())
    for name, pod in pods(built):
        for each in containers(pod):
            assert {"name": "COWEST_JOB", "value": "desks/claims"} in each["env"], (name, each["name"])
    told = {
        name: next((e["value"] for each in containers(pod) for e in each["env"] if e["name"] == "COWEST_STEP"), None)
        for name, pod in pods(built)
    }
    assert told["Deployment claims-live"] == "claims-r1-live-0"
    by_argo = {value for name, value in told.items() if name.startswith("WorkflowTemplate")}
    assert by_argo == {"{{workflow.parameters.step}}"}
    assert told["Deployment claims-gateway"] is None


@pytest.mark.parametrize(
    ("given", "form"),
    [
        pytest.param((), "json", id="as it comes"),
        pytest.param(({"name": "COWEST_LOG_FORMAT", "value": "plain"},), "plain", id="as the operator is told"),
    ],
)
def test_every_container_logs_for_a_collector_unless_the_operator_is_told_otherwise(given: Any, form: str) -> None:
    for name, pod in pods(everything(replace(context(), job_env=given))):
        for each in containers(pod):
            told = [e["value"] for e in each["env"] if e["name"] == "COWEST_LOG_FORMAT"]
            assert told == [form], (name, each["name"])


def test_a_steps_own_environment_is_stronger_than_what_it_logs_by_default() -> None:
    main = {"name": "main", "env": [{"name": "COWEST_LOG_FORMAT", "value": "plain"}]}
    seen = edited(context(), "training", podTemplate={"spec": {"containers": [main]}})
    laid_over = json.loads(templates_of(seen)["step"]["podSpecPatch"])["containers"]
    assert [each for each in laid_over if each["name"] == "main"] == [main]


def test_keys_of_fallbacks_are_mounted_in_the_gateway_alone_each_by_its_place() -> None:
    built = context()
    fallbacks = (Fallback("https://a/v1", "a"), Fallback("https://b/v1", "b", SecretRef("spare", "token")))
    strong = replace(built.job.spec.strong, fallbacks=fallbacks)
    built = replace(built, job=replace(built.job, spec=replace(built.job.spec, strong=strong)))
    mounted = {name: pod for name, pod in pods(everything(built)) if '"spare"' in json.dumps(pod)}
    assert list(mounted) == ["Deployment claims-gateway"]
    pod = mounted["Deployment claims-gateway"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "fallback-keys"]
    (source,) = volume["projected"]["sources"]
    assert source["secret"] == {"name": "spare", "items": [{"key": "token", "path": "01/key"}]}
    answering, routing = pod["containers"]
    folder = {each["name"]: each.get("value") for each in answering["env"]}["COWEST_STRONG_FALLBACK_API_KEYS_FOLDER"]
    assert folder == {each["name"]: each["mountPath"] for each in answering["volumeMounts"]}["fallback-keys"]
    assert "fallback-keys" not in json.dumps(routing)


def with_proxy_keys(seen: common.Context) -> common.Context:
    return edited(seen, "strong", proxyKeysSecretRef={"name": "tools", "ownKey": "cowest"})


def test_all_keys_of_the_proxys_clients_are_in_the_proxy_and_the_jobs_own_with_whoever_asks_it() -> None:
    budget = Budget(tokens_per_day=9)
    mounted: dict[str, Any] = {}
    for _, pod in pods(everything(with_proxy_keys(with_budget(context(), budget)))):
        sources = {each["name"]: each["secret"] for each in pod["volumes"] if "tools" in json.dumps(each)}
        for each in containers(pod):
            folders = {mount["mountPath"]: sources.get(mount["name"]) for mount in each["volumeMounts"]}
            told = {entry["name"]: entry.get("value") for entry in each.get("env", [])}
            for name in ("COWEST_CLIENT_API_KEYS_FOLDER", "COWEST_PROXY_KEYS_FOLDER"):
                if name in told:
                    mounted[each.get("name", "step"), name] = folders[told[name]]
    whole = {"secretName": "tools", "defaultMode": 0o440}
    own = {**whole, "items": [{"key": "cowest", "path": "cowest"}]}
    assert mounted == {
        ("proxy", "COWEST_CLIENT_API_KEYS_FOLDER"): whole,
        **{(who, "COWEST_PROXY_KEYS_FOLDER"): own for who in ("gateway", "step", "score-live")},
    }


def test_a_gateway_that_takes_no_slices_of_a_budget_has_no_key_for_the_proxy() -> None:
    found = [name for name, pod in pods(everything(with_proxy_keys(context()))) if "tools" in json.dumps(pod)]
    assert found and "Deployment claims-gateway" not in found


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
        assert len(child["metadata"]["name"]) <= 63, child["kind"]
    last = replace(world.trial(), number=9999)
    step = api.StepSpec(f"r{last.number}-feedback", "cowest_training.feedback", "s3://b/x")
    assert len(steps.workflow_name(seen, step, 99)) <= 63


def test_a_weak_model_is_named_by_its_digest_and_not_by_its_role() -> None:
    seen = context()
    as_candidate = weak.inference_service(seen, api.ServerSpec(CANDIDATE.weak_digest, CANDIDATE.weak_uri))
    assert as_candidate["metadata"]["name"] == weak.server_name(seen, CANDIDATE.weak_digest)
    assert as_candidate["metadata"]["name"] != weak.server_name(seen, STABLE.weak_digest)
    assert as_candidate["metadata"]["annotations"][weak.DIGEST_ANNOTATION] == CANDIDATE.weak_digest


@pytest.mark.parametrize("namespace", ["n", "desks", "n" * 20, "n" * 40])
def test_a_weak_models_name_leaves_room_for_the_host_and_the_label_that_kserve_makes_of_it(namespace: str) -> None:
    """<name>-predictor-<namespace> in the host, isvc.<name>-predictor in the label."""
    names = set()
    for job in ("claims", LONGEST, LONGEST[:-1] + "b", LONGEST[:-2]):
        seen = replace(context(job), namespace=namespace)
        for digest in (STABLE.weak_digest, CANDIDATE.weak_digest):
            name = weak.server_name(seen, digest)
            assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
            assert len(f"{name}-predictor-{namespace}") <= 63 and len(f"isvc.{name}-predictor") <= 63
            names.add(name)
    assert len(names) == 8
    assert weak.server_name(context(), "sha256:0123456789ab") == "claims-0123456", "as it was before"


@pytest.mark.parametrize(
    ("said", "requests", "limits"),
    [
        pytest.param(None, weak.ASKED, weak.NO_LIMIT, id="nothing"),
        pytest.param(
            api.Resources({"cpu": "2", "memory": "4Gi"}), {"cpu": "2", "memory": "4Gi"}, weak.NO_LIMIT, id="requests"
        ),
        pytest.param(
            api.Resources({}, {"cpu": "50m", "nvidia.com/gpu": "1"}),
            {"cpu": "50m", "memory": "512Mi"},
            {"cpu": "50m", "memory": "4Ti", "nvidia.com/gpu": "1"},
            id="a limit is a request too",
        ),
    ],
)
@pytest.mark.parametrize("engine", ["Transformers", "vLLM"])
def test_kserve_finds_no_request_and_no_limit_of_a_weak_model_to_fill_in(
    said: api.Resources | None, requests: dict[str, str], limits: dict[str, str], engine: str
) -> None:
    """Its own limits, 1 CPU and 2Gi as it comes, are refused below a request and too little for a model."""
    seen = context(weak={"engine": engine, "resources": said})
    (server,) = weak.inference_service(seen, api.ServerSpec("sha256:abc", "s3://b/m"))["spec"]["predictor"][
        "containers"
    ]
    assert server["resources"] == {"requests": requests, "limits": limits}


def test_what_kserve_calls_its_mode_is_said_back_to_it() -> None:
    seen = replace(context(), kserve_mode="RawDeployment")
    server = api.ServerSpec("sha256:abc", "s3://b/m")
    name, key = weak.server_name(seen, server.digest), "serving.kserve.io/deploymentMode"
    assert weak.inference_service(seen, server)["metadata"]["annotations"][key] == "RawDeployment"
    rewritten = replace(seen, kserve_modes={name: "Standard", "another": "RawDeployment"})
    assert weak.inference_service(rewritten, server)["metadata"]["annotations"][key] == "Standard"


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
    assert json.loads(server["args"][server["args"].index("--default-chat-template-kwargs") + 1]) == {
        "enable_thinking": False
    }


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


@pytest.mark.parametrize(
    ("name", "over"),
    [
        pytest.param("env", ["HF_HOME=/tmp"], id="a variable as a word"),
        pytest.param("imagePullSecrets", ["regcred"], id="a Secret as a word"),
        pytest.param("volumes", [{"emptyDir": {}}], id="a volume without a name"),
        pytest.param("containers", None, id="nothing at all"),
    ],
)
def test_a_named_list_without_names_stands_as_the_manifest_has_it(name: str, over: Any) -> None:
    """The API server then says what is wrong with it."""
    assert common.laid_over({name: [{"name": "a"}]}, {name: over}) == {name: over}


def test_an_edit_that_no_server_reads_rolls_no_server() -> None:
    one, other = context(), context()
    edited = {**other.document, "spec": {**other.document["spec"], "rounds": {"max": 7}}}
    assert common.job_volume(one) == common.job_volume(replace(other, document=edited))


def edited(seen: Context, section: str, **fields: Any) -> Context:
    spec = seen.document["spec"]
    return replace(seen, document={**seen.document, "spec": {**spec, section: {**spec.get(section, {}), **fields}}})


@pytest.mark.parametrize(
    ("section", "field", "rolls"),
    [
        pytest.param("gateway", "replicas", False, id="more gateways"),
        pytest.param("gateway", "resources", False, id="room for gateways"),
        pytest.param("gateway", "limits", True, id="other limits of a key"),
        pytest.param("training", "seed", False, id="another seed"),
        pytest.param("data", "train", False, id="other rows to learn from"),
        pytest.param("feedback", "minPairs", False, id="more pairs wanted"),
        pytest.param("data", "heldOut", True, id="other held-out rows: the observer counts past them"),
        pytest.param("feedback", "evaluator", True, id="another evaluator"),
        pytest.param("strong", "model", True, id="another strong model"),
    ],
)
def test_servers_begin_anew_only_for_what_they_read(section: str, field: str, rolls: bool) -> None:
    before = context()
    after = edited(before, section, **{field: "changed"})
    assert (common.job_volume(before) != common.job_volume(after)) is rolls


def rolled(before: Context, after: Context) -> list[str]:
    """Names of pods that the edit begins anew."""
    old, new = (dict(pods(everything(each))) for each in (before, after))
    return [name for name in old if old[name] != new[name]]


@pytest.mark.parametrize("kuberay", [False, True], ids=["a Deployment", "KubeRay"])
def test_a_gateway_more_begins_no_server_anew(kuberay: bool) -> None:
    def scaled(replicas: int) -> Context:
        engine = "RayServe" if kuberay else "ASGI"
        seen = replace(context(gateway={"replicas": replicas, "engine": engine}), has_kuberay=kuberay)
        return edited(seen, "gateway", replicas=replicas)

    assert rolled(scaled(2), scaled(3)) == []


@pytest.mark.parametrize(
    ("section", "edit", "begins"),
    [
        pytest.param("collaboration", {"redaction": {"identifiers": ["Email"]}}, True, id="what may not leave"),
        pytest.param("strong", {"prices": {}}, True, id="of the strong model"),
        pytest.param("feedback", {"minPairs": 9}, False, id="what is frozen"),
        pytest.param("rounds", {"max": 9}, False, id="what it does not read"),
    ],
)
def test_a_watcher_that_runs_begins_anew_where_an_edit_of_what_it_reads_acts_at_once(
    section: str, edit: dict[str, Any], begins: bool
) -> None:
    def live(seen: Context, frozen: Mapping[str, Any]) -> list[Child]:
        canary = plan(seen, status=on_trial(stage="Canary", done=PREPARED))
        return [c for c in desired(seen, canary, frozen) if common.key_of(c) == ("Deployment", "claims-live")]

    before = context()
    after = edited(before, section, **edit)
    assert (live(before, before.document) != live(after, followed(before.document, after.document))) is begins
    assert live(before, before.document) == live(before, before.document)


def test_servers_can_read_what_is_left_of_the_manifest() -> None:
    job = load(ROOT / "crds" / "examples" / "minimal.yaml").job
    job["spec"]["weak"]["maxConcurrency"] = 200
    job["spec"]["gateway"] |= {"limits": {"requestsPerMinute": 7}, "maxBodyBytes": 9_999, "maxConcurrency": 99}
    spec = common.servers_manifest(replace(context(), document=resolve_prompts(job, {}, PROMPTS)))["spec"]
    settings = parse(GatewaySettings, spec)
    assert settings.traces is not None and settings.weak == WeakSettings(max_concurrency=200)
    assert settings.gateway == GatewayLimits(ClientLimits(requests_per_minute=7), 9_999, 99)
    assert parse(ProxySettings, spec).strong.model == job["spec"]["strong"]["model"]
    assert parse(ObserverSettings, spec).data.held_out == job["spec"]["data"]["heldOut"]


def test_a_running_trial_keeps_its_data_and_takes_a_new_budget() -> None:
    before = {"spec": {"data": {"train": "old"}, "strong": {"budget": 1}, "training": {"seed": 1}}}
    after = {"spec": {"data": {"train": "new"}, "strong": {"budget": 2}, "training": {"seed": 2}}}
    assert followed(before, after)["spec"] == {
        "data": {"train": "old"},
        "strong": {"budget": 2},
        "training": {"seed": 1},
    }


@pytest.mark.parametrize(
    ("before", "after", "paths"),
    [
        pytest.param({"training": {"seed": 1}}, {"training": {"seed": 1}}, (), id="nothing"),
        pytest.param(
            {"training": {"dpo": {"beta": 1}, "seed": 1}, "gate": {}},
            {"training": {"dpo": {"beta": 2}, "seed": 1}, "gate": {"significance": 0.1}},
            ("training.dpo.beta", "gate.significance"),
            id="fields of two parts, one of them new",
        ),
        pytest.param({"canary": {"steps": [1]}}, {"canary": {"steps": [1, 2]}}, ("canary.steps",), id="a list as one"),
        pytest.param(
            {"canary": {"approval": "Auto"}}, {"canary": {"approval": "Manual"}}, (), id="who is asked at once"
        ),
        pytest.param({"training": {}}, {"training": {"stepDeadlineSeconds": 60}}, (), id="what the next attempt takes"),
        pytest.param({"weak": {"model": "a"}}, {"weak": {"model": "b"}}, (), id="what makes a candidate"),
        pytest.param({"rounds": {"max": 1}}, {"rounds": {"max": 2}}, (), id="what acts at once"),
    ],
)
def test_which_edits_a_running_trial_does_not_go_by(before: Any, after: Any, paths: tuple[str, ...]) -> None:
    assert waiting({"spec": before}, {"spec": after}) == paths


def test_steps_are_retried_by_exit_code_and_never_two_at_a_time() -> None:
    spec = steps.workflow_template(context())["spec"]
    expression = spec["templates"][0]["retryStrategy"]["expression"]
    assert "'75'" in expression and "'2'" not in expression and "'76'" not in expression
    assert spec["synchronization"] == {"mutexes": [{"name": "claims-steps"}]}


def with_deadline(seen: Context) -> Context:
    spec = {**seen.document["spec"], "training": {"stepDeadlineSeconds": 7200}}
    return replace(seen, document={**seen.document, "spec": spec})


def test_each_pod_of_a_step_has_its_own_deadline_and_argo_makes_no_other_after_it() -> None:
    spec = steps.workflow_template(with_deadline(with_shards(2)))["spec"]
    pods = [template for template in spec["templates"] if "container" in template]
    assert {pod["name"]: pod["activeDeadlineSeconds"] for pod in pods} == dict.fromkeys(
        ("step", "light", "shard", "merge"), 7200
    )
    assert "activeDeadlineSeconds" not in spec, "it would run while a pod waits in a queue"
    (retry,) = {common.canonical(pod["retryStrategy"]) for pod in pods}
    assert f"&& !(lastRetry.message contains '{steps.OVERRAN}')" in json.loads(retry)["expression"]
    assert "maxDuration" not in retry, "Argo ends a second pod by it, however long the pod may run"


def test_what_was_frozen_before_there_was_a_deadline_has_none() -> None:
    (light,) = steps.unshared(context(), api.StepSpec("erase", "cowest_training.erase", ""))["spec"]["templates"]
    assert "activeDeadlineSeconds" not in light
    (light,) = steps.unshared(with_deadline(context()), api.StepSpec("erase", "x", ""))["spec"]["templates"]
    assert light["activeDeadlineSeconds"] == 7200


def on_ray(**gateway: Any) -> Context:
    return replace(context(gateway={"engine": "RayServe", **gateway}), has_kuberay=True)


def test_a_gateway_on_ray_is_one_ray_service_behind_the_same_service() -> None:
    children = {common.key_of(child): child for child in everything(on_ray(replicas=3, max_replicas=5))}
    assert ("Deployment", "claims-gateway") not in children
    assert ("HorizontalPodAutoscaler", "claims-gateway") not in children
    assert children["Service", "claims-gateway"] == common.service(context(), "gateway")
    spec = children["RayService", "claims-ray"]["spec"]
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["replicas"] == 3
    (application,) = json.loads(spec["serveConfigV2"])["applications"]
    assert ray_settings(application["args"]).spool == common.SPOOL
    assert ray_settings(application["args"]).replicas == 4, "one on each node: a node without one has no proxy"
    assert application["import_path"] == "cowest_serving.ray_app:app"


def test_without_kuberay_ray_runs_in_a_deployment_with_an_image_that_has_it() -> None:
    seen = replace(on_ray(), has_kuberay=False)
    children = {common.key_of(child): child for child in everything(seen)}
    (gateway, routing) = children["Deployment", "claims-gateway"]["spec"]["template"]["spec"]["containers"]
    assert gateway["command"][-1] == "cowest_serving.ray_app"
    assert (gateway["image"], routing["image"]) == ("serving:1-ray", "serving:1")
    named = replace(seen, images=replace(seen.images, ray="mirror/serving@sha256:1"))
    assert named.images.with_ray == "mirror/serving@sha256:1"


def test_on_ray_only_pods_that_answer_are_in_the_service() -> None:
    """The head is ready before anything answers there, or KubeRay would never start the gateway."""
    children = {common.key_of(child): child for child in everything(on_ray())}
    cluster = children["RayService", "claims-ray"]["spec"]["rayClusterConfig"]
    wanted = children["Service", "claims-gateway"]["spec"]
    (workers,) = cluster["workerGroupSpecs"]
    head, worker = cluster["headGroupSpec"]["template"], workers["template"]
    assert wanted["selector"].items() <= worker["metadata"]["labels"].items()
    assert not wanted["selector"].items() <= head["metadata"]["labels"].items()
    ready = worker["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    assert (ready["path"], ready["port"]) == ("/readyz", common.PORT)
    assert head["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] != "/readyz"
    port = wanted["ports"][0]["targetPort"]
    named = [p for c in worker["spec"]["containers"] for p in c.get("ports", []) if p["name"] == port]
    assert named == [{"name": "http", "containerPort": common.PORT}]


def test_on_ray_each_port_is_one_things_alone() -> None:
    """KubeRay makes a Service of the head's ports, with 8080 for `metrics` where none is named. One with two 8080 is
    refused, and no head is made; one without a dashboard is asked in vain."""
    cluster = {common.key_of(c): c for c in everything(on_ray())}["RayService", "claims-ray"]["spec"][
        "rayClusterConfig"
    ]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        node = group["template"]["spec"]["containers"][0]
        ports = {each["name"]: each["containerPort"] for each in node["ports"]}
        assert {"serve", "metrics"} <= set(ports) and len(set(ports.values())) == len(ports)
        assert group["rayStartParams"]["metrics-export-port"] == str(ports["metrics"]), "Ray itself listens there"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"dashboard", "gcs-server", "client"} <= {each["name"] for each in head["ports"]}


def test_on_ray_the_rules_of_a_gateways_pod_are_kept() -> None:
    seen = on_ray()
    found = {name: pod for name, pod in pods(everything(seen)) if name.startswith("RayService")}
    assert set(found) == {"RayService claims-ray head", "RayService claims-ray gateway"}
    for name, pod in found.items():
        for each in containers(pod):
            assert each["securityContext"] == common.restricted(), name
        node, routing = pod["containers"]
        mounts = {each["name"]: {m["name"] for m in each["volumeMounts"]} for each in (node, routing)}
        assert "token" in mounts["routing"] and "strong-keys" not in mounts["routing"], name
        assert "strong-keys" in mounts["gateway"] and "token" not in mounts["gateway"], name
        assert {"name": "HOME", "value": "/tmp"} in node["env"] and node["image"] == "serving:1-ray", name
        assert all({"name": key, "value": value} in node["env"] for key, value in PROXY.items()), name
        assert "command" not in node and "args" not in node, "KubeRay writes them"
        waits = int("".join(filter(str.isdigit, node["lifecycle"]["preStop"]["exec"]["command"][-1])))
        answer = seen.job.spec.strong.timeout_seconds
        assert answer < waits < pod["terminationGracePeriodSeconds"], f"{name}: answers under way are waited for"
    names = [child["metadata"]["name"] for child in everything(replace(on_ray(), job=replace(
        on_ray().job, name=LONGEST))) if child["kind"] == "RayService"]  # fmt: skip
    assert len(names[0]) <= 47, "KubeRay refuses longer ones"


FEEDBACK = api.StepSpec("r1-feedback", "cowest_training.feedback", "s3://b/feedback")


def with_shards(number: int) -> Context:
    seen = context()
    spec = {**seen.document["spec"], "feedback": {"evaluator": {"type": "ExactMatch"}, "shards": number}}
    return replace(seen, document={**seen.document, "spec": spec})


def test_shards_run_side_by_side_and_are_merged_by_one_pod_more() -> None:
    seen = with_shards(4)
    templates = {each["name"]: each for each in steps.workflow_template(seen)["spec"]["templates"]}
    (side_by_side,), (merge,) = templates["sharded"]["steps"]
    assert side_by_side["withSequence"] == {"count": "4"}, "from 0, as --shard counts"
    assert (side_by_side["template"], merge["template"]) == ("shard", "merge")
    assert templates["shard"]["container"]["args"][-2:] == ["--shard", "{{inputs.parameters.shard}}/4"]
    assert templates["merge"]["container"]["args"][-2:] == ["--merge", "4"]
    for name in ("shard", "merge"):
        assert templates[name]["retryStrategy"] == templates["step"]["retryStrategy"], name
        assert templates[name]["podSpecPatch"] == templates["step"]["podSpecPatch"], name


@pytest.mark.parametrize(
    ("shards", "module", "entrypoint"),
    [
        pytest.param(4, FEEDBACK.module, "sharded", id="feedback in shards"),
        pytest.param(1, FEEDBACK.module, None, id="feedback in one piece"),
        pytest.param(4, "cowest_training.dpo", None, id="a step that knows no shards"),
    ],
)
def test_only_feedback_is_sharded_and_its_name_stays(shards: int, module: str, entrypoint: str | None) -> None:
    workflow = steps.workflow(with_shards(shards), replace(FEEDBACK, module=module))
    assert workflow["spec"].get("entrypoint") == entrypoint
    assert workflow["metadata"]["name"] == "claims-r1-feedback"


def test_the_number_of_shards_changes_neither_orders_nor_servers_nor_what_feedback_reads() -> None:
    two, four = with_shards(2), with_shards(4)
    assert json.loads(steps.step_map(two, FEEDBACK)["data"]["step.json"]) == json.loads(
        steps.step_map(four, FEEDBACK)["data"]["step.json"]
    )
    assert common.job_volume(two) == common.job_volume(four)
    evaluator = {"evaluator": {"type": "ExactMatch"}, "draftsPerQuery": 4, "temperature": "1", "rule": "SignOfGain",
                 "minMargin": "0.5", "maxQueries": 9, "minPairs": 5}  # fmt: skip
    assert parse(Feedback, {**evaluator, "shards": 2}) == parse(Feedback, evaluator)


@pytest.mark.parametrize(
    ("pods", "code"),
    [
        pytest.param([("1", "2"), ("9", "0")], 2, id="a shard failed before the others ended"),
        pytest.param([("1", "2"), ("9", "75")], 2, id="one will not be retried, whatever befell the others"),
        pytest.param([("1", "75"), ("2", "0"), ("9", "76")], 76, id="the merge refused after a shard was retried"),
        pytest.param([("1", None), ("9", "0")], None, id="a shard that never ran"),
    ],
)
def test_of_several_pods_the_one_that_failed_for_good_speaks(pods: list[tuple[str, str | None]], code: int) -> None:
    nodes = {
        at: {"type": "Pod", "finishedAt": f"2026-01-01T00:00:0{at}Z",
             "outputs": {"exitCode": exit_code} if exit_code else {}}
        for at, exit_code in pods
    }  # fmt: skip
    workflow = steps.workflow(with_shards(2), FEEDBACK)
    workflow["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    assert see("Workflow", {**workflow, "status": {"phase": "Failed", "nodes": nodes}}).facts["code"] == code


KUBELET = "Pod was active on the node longer than the specified deadline"


@pytest.mark.parametrize("code", ["143", "137", "0", None], ids=["ended", "killed", "it ended by itself", "unknown"])
@pytest.mark.parametrize("other", ["0", "75"], ids=["the other is done", "the other was retried"])
def test_a_pod_that_ran_for_too_long_failed_by_itself_whatever_its_exit_code(code: str | None, other: str) -> None:
    late = {"type": "Pod", "finishedAt": "2026-01-01T00:00:01Z", "message": KUBELET,
            "outputs": {"exitCode": code} if code else {}}  # fmt: skip
    done = {"type": "Pod", "finishedAt": "2026-01-01T00:00:09Z", "outputs": {"exitCode": other}}
    workflow = steps.workflow(with_shards(2), FEEDBACK)
    workflow["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    facts = see("Workflow", {**workflow, "status": {"phase": "Failed", "nodes": {"a": late, "b": done}}}).facts
    assert (facts["code"], facts["overran"], facts["words"]) == (1, True, KUBELET)


def test_a_queue_of_the_pod_template_is_on_every_pod_of_the_steps() -> None:
    seen = with_shards(2)
    label = {steps.QUEUE_LABEL: "gpus"}
    training = {"podTemplate": {"metadata": {"labels": label}}}
    queued = replace(seen, document={**seen.document, "spec": {**seen.document["spec"], "training": training}})
    templates = {each["name"]: each for each in steps.workflow_template(queued)["spec"]["templates"]}
    for name in ("step", "shard", "merge"):
        assert label.items() <= templates[name]["metadata"]["labels"].items(), name
    assert "metadata" not in templates["sharded"]


@pytest.mark.parametrize(
    ("reason", "trouble"),
    [
        pytest.param("SchedulingGated", "", id="Kueue holds it: that is no trouble"),
        pytest.param("Unschedulable", "cannot be scheduled: no room", id="no node has room"),
    ],
)
def test_a_pod_that_waits_in_a_queue_is_no_trouble(reason: str, trouble: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": "no room"}
    metadata = {"name": "claims-r1-dpo", "uid": "u", "resourceVersion": "1", "labels": {}}
    assert see("Pod", {"metadata": metadata, "status": {"conditions": [condition]}}).facts["trouble"] == trouble


def test_two_jobs_in_one_bucket_do_not_share_a_folder() -> None:
    assert context("a").store == "s3://cowest/desks/desks/a"
    assert context("b").store != context("a").store


def test_a_gateways_spool_outlives_its_container_and_is_full_before_its_volume_is() -> None:
    """A pod whose volume goes over its limit is evicted."""
    pod = next(pod for name, pod in pods(everything(context())) if name == "Deployment claims-gateway")
    (volume,) = [each for each in pod["volumes"] if each["name"] == "spool"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "spool"]
    arguments = pod["containers"][0]["args"]
    assert arguments[arguments.index("--spool") + 1] == mount["mountPath"]
    assert int(volume["emptyDir"]["sizeLimit"]) > 1 << 30
    assert "medium" not in volume["emptyDir"], "a disk: memory does not outlive a kill for want of memory"


@pytest.mark.parametrize(("workers", "given"), [(1, False), (4, True)])
def test_a_gateways_workers_are_given_to_its_process_and_one_rolls_no_gateway_of_before(
    workers: int, given: bool
) -> None:
    seen = context(gateway={"workers": workers})
    pod = next(pod for name, pod in pods(everything(seen)) if name == "Deployment claims-gateway")
    arguments = pod["containers"][0]["args"]
    assert ("--workers" in arguments) is given
    if given:
        assert arguments[arguments.index("--workers") + 1] == str(workers)
    else:
        assert pod == next(pod for name, pod in pods(everything(context())) if name == "Deployment claims-gateway")


@pytest.mark.parametrize(
    ("budget", "asks"),
    [
        pytest.param(None, False, id="no budget"),
        pytest.param(Budget(calls_per_round=7), False, id="a round's, which is for steps alone"),
        pytest.param(Budget(tokens_per_day=7), True, id="a day's"),
    ],
)
def test_a_gateway_takes_slices_of_a_days_budget_from_the_proxy(budget: Budget | None, asks: bool) -> None:
    seen = with_budget(context(), budget)
    pod = next(pod for name, pod in pods(everything(seen)) if name == "Deployment claims-gateway")
    arguments = pod["containers"][0]["args"]
    assert ("--book" in arguments) is asks
    if asks:
        assert arguments[arguments.index("--book") + 1] == "http://claims-proxy.desks.svc"
    (service,) = [child for child in everything(with_budget(on_ray(), budget)) if child["kind"] == "RayService"]
    served = json.loads(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert ray_settings(served).book == ("http://claims-proxy.desks.svc" if asks else None)


def with_budget(seen: Context, budget: Budget | None) -> Context:
    spec = seen.job.spec
    return replace(seen, job=replace(seen.job, spec=replace(spec, strong=replace(spec.strong, budget=budget))))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        pytest.param(0, 2, id="a new gateway"),
        pytest.param(3, 3, id="it was three before maxReplicas came: it stays three"),
        pytest.param(1, 2, id="fewer than replicas"),
        pytest.param(9, 5, id="more than maxReplicas"),
        pytest.param(None, None, id="the autoscaler has said how many"),
    ],
)
def test_their_number_is_said_until_the_autoscaler_says_it(there: int | None, said: int | None) -> None:
    seen = replace(context(gateway={"replicas": 2, "max_replicas": 5}), gateways=there)
    children = {common.key_of(c): c for c in everything(seen)}
    assert children["Deployment", "claims-gateway"]["spec"].get("replicas") == said


@pytest.mark.parametrize(
    ("entries", "ours"),
    [
        pytest.param([("cowest-operator", "Apply", {"f:replicas": {}})], 3, id="ours"),
        pytest.param([("kube-controller-manager", "Update", {"f:replicas": {}})], None, id="the autoscaler's"),
        pytest.param([("cowest-operator", "Apply", {"f:template": {}})], None, id="nobody's"),
        pytest.param([], None, id="nothing known"),
    ],
)
def test_whose_number_of_gateways_it_is_stands_in_the_record_of_who_set_what(entries: Any, ours: int | None) -> None:
    fields = [{"manager": m, "operation": o, "fieldsV1": {"f:spec": spec}} for m, o, spec in entries]
    metadata = {"name": "claims-gateway", "uid": "u", "resourceVersion": "1", "generation": 1, "managedFields": fields}
    assert see("Deployment", {"metadata": metadata, "spec": {"replicas": 3}}).facts["replicas"] == ours


def test_an_autoscaled_gateway_leaves_its_replicas_to_the_autoscaler() -> None:
    seen = replace(context(gateway={"replicas": 2, "max_replicas": 5}), gateways=None)
    children = {common.key_of(c): c for c in everything(seen)}
    assert "replicas" not in children["Deployment", "claims-gateway"]["spec"]
    scaler = children["HorizontalPodAutoscaler", "claims-gateway"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert ("PodDisruptionBudget", "claims-gateway") in children


# ---------------------------------------------------------------- quotas, accelerators, certificates
def templates_of(seen: Context) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in steps.workflow_template(seen)["spec"]["templates"]}


def test_a_quota_finds_what_it_asks_for_in_every_container_of_a_step() -> None:
    for name, template in templates_of(with_shards(2)).items():
        if "container" not in template:
            continue
        patch = json.loads(template["podSpecPatch"])
        assert template["container"]["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        for each in (*patch["initContainers"], *patch["containers"]):
            for kind in ("requests", "limits"):
                assert each["resources"][kind].keys() == {"cpu", "memory"}, f"{name} {each['name']}"


def test_a_step_has_no_token_where_argos_executor_has_one() -> None:
    for name, template in templates_of(with_shards(2)).items():
        if "container" in template:
            (mount,) = [m for m in template["container"]["volumeMounts"] if m["mountPath"] == steps.TOKEN_FOLDER]
            (volume,) = [v for v in template["volumes"] if v["name"] == mount["name"]]
            assert "emptyDir" in volume and mount["readOnly"], name


GPU = {"requests": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "1"}}


@pytest.mark.parametrize(
    ("module", "has_gpu"),
    [("check", False), ("collect", False), ("publish", False), ("erase", False),
     ("sft", True), ("feedback", True), ("dpo", True), ("evaluate", True)],
)  # fmt: skip
def test_an_accelerator_is_held_only_by_steps_that_load_a_model(module: str, has_gpu: bool) -> None:
    seen = edited(context(), "training", resources=GPU)
    workflow = steps.workflow(seen, replace(FEEDBACK, module=f"cowest_training.{module}"))
    entrypoint = workflow["spec"].get("entrypoint", steps.workflow_template(seen)["spec"]["entrypoint"])
    resources = templates_of(seen)[entrypoint]["container"]["resources"]
    assert resources == (GPU if has_gpu else {"requests": {"cpu": "4", "memory": "16Gi"}})


def test_erasing_asks_for_no_accelerator_waits_in_no_queue_and_has_no_keys_of_models() -> None:
    evaluator = Evaluator("Judge", endpoint="http://judge/v1", model="m", api_key_secret_ref=SecretRef("judge", "key"))
    seen = with_proxy_keys(context(feedback={"evaluator": evaluator}))
    seen = edited(seen, "strong", caBundleRef={"name": "own-ca", "key": "ca.crt"})
    labels = {"metadata": {"labels": {steps.QUEUE_LABEL: "gpus", "team": "a"}}}
    seen = edited(seen, "training", resources=GPU, podTemplate=labels)
    built = steps.unshared(seen, api.StepSpec("erase", "cowest_training.erase", "", (("--what", "all"),)))
    (light,) = built["spec"]["templates"]
    assert built["spec"]["entrypoint"] == light["name"]
    assert "synchronization" not in built["spec"] and "workflowTemplateRef" not in built["spec"]
    assert light["container"]["resources"] == {"requests": {"cpu": "4", "memory": "16Gi"}}
    assert light["metadata"]["labels"]["team"] == "a" and steps.QUEUE_LABEL not in light["metadata"]["labels"]
    for secret in ("judge", "tools", "own-ca"):
        assert f'"{secret}"' not in json.dumps(built), secret
    assert common.STORE_KEYS in {mount["mountPath"] for mount in light["container"]["volumeMounts"]}


@pytest.mark.parametrize("signal", ["LateReference", "ShadowReplay"])
def test_a_watcher_that_replays_both_pairs_has_the_room_of_a_step_that_loads_models(signal: str) -> None:
    over = {
        "metadata": {"labels": {"team": "a"}},
        "spec": {
            "nodeSelector": {"gpu": "yes"},
            "containers": [{"name": "main", "env": [{"name": "A", "value": "b"}]}, {"name": "wait", "env": []}],
            "initContainers": [{"name": "init", "env": []}],
        },
    }
    seen = edited(edited(context(), "training", resources=GPU, podTemplate=over), "canary", signal=signal)
    (live,) = [c for c in everything(seen) if common.key_of(c) == ("Deployment", "claims-live")]
    template = live["spec"]["template"]
    (container,), replays = template["spec"]["containers"], signal == "ShadowReplay"
    small = {"requests": {"cpu": "50m", "memory": "256Mi"}}
    assert container["resources"] == (GPU if replays else small)
    assert ({"name": "A", "value": "b"} in container["env"]) is replays
    assert ("nodeSelector" in template["spec"]) is ("team" in template["metadata"]["labels"]) is replays
    assert not template["spec"].get("initContainers"), "Argo's own are in no other pod"
    assert live["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_shards_draft_and_their_merge_does_not() -> None:
    templates = templates_of(edited(with_shards(2), "training", resources=GPU))
    assert "nvidia.com/gpu" in templates["shard"]["container"]["resources"]["limits"]
    assert "limits" not in templates["merge"]["container"]["resources"]


def test_a_step_of_which_only_an_accelerator_is_said_still_asks_for_room() -> None:
    light = templates_of(edited(context(), "training", resources={"limits": {"nvidia.com/gpu": "1"}}))["light"]
    assert light["container"]["resources"] == {"requests": {"cpu": "250m", "memory": "1Gi"}}
    assert light["container"]["resources"] == templates_of(context())["step"]["container"]["resources"]


def test_certificates_of_ones_own_reach_whatever_asks_a_model_or_a_judge() -> None:
    seen = edited(context(), "strong", caBundleRef={"name": "authority", "key": "ca.crt"})
    found: dict[str, set[str]] = {}
    for _, pod in pods(everything(seen)):
        for each in containers(pod):
            told = {e["name"] for e in each.get("env", []) if e.get("value") == "/etc/cowest/strong-ca/ca.crt"}
            if told:
                assert "strong-ca" in {mount["name"] for mount in each["volumeMounts"]}
                found[each.get("name", "step")] = told
    own, more = {"SSL_CERT_FILE"}, {"COWEST_MORE_CA"}
    assert found == {"gateway": own, "proxy": own, "step": more, "score-live": more}


def test_certificates_are_mounted_by_their_key_so_that_one_that_is_missing_holds_the_pod() -> None:
    seen = edited(context(), "strong", caBundleRef={"name": "authority", "key": "root.pem"})
    items = [{"key": "root.pem", "path": "root.pem"}]
    found = [v["configMap"] for _, pod in pods(everything(seen)) for v in pod["volumes"] if v["name"] == "strong-ca"]
    assert found and all(each == {"name": "authority", "items": items} for each in found)


@pytest.mark.parametrize("kind", ["Judge", "HTTP"])
def test_the_proxy_has_the_key_of_a_judge_as_a_file_and_of_a_scorer_none(kind: str) -> None:
    evaluator = Evaluator(kind, endpoint="http://judge/v1", model="m", api_key_secret_ref=SecretRef("judge", "key"))
    built = context(feedback={"evaluator": evaluator})
    built.document["spec"]["strong"]["caBundleRef"] = {"name": "own-ca", "key": "ca.crt"}
    (pod,) = (pod for name, pod in pods(everything(built)) if name == "Deployment claims-proxy")
    (proxy,) = pod["containers"]
    told = {each["name"]: each.get("value") for each in proxy["env"]}
    mounted = {each["mountPath"] for each in proxy["volumeMounts"]}
    asks = kind == "Judge"
    assert (told.get("COWEST_EVALUATOR_API_KEY_FOLDER") == "/etc/cowest/evaluator") is asks
    assert ("/etc/cowest/evaluator" in mounted) is asks
    assert ("COWEST_MORE_CA" in told, "SSL_CERT_FILE" in told) == (asks, not asks), "a judge may have another authority"
    assert mounted >= {common.STRONG_KEYS, "/etc/cowest/strong-ca"}


def test_the_keys_of_a_jury_are_files_of_the_proxy_and_variables_of_what_may_ask_by_itself() -> None:
    jury = (Juror("http://b/v1", "b", SecretRef("second", "key")), Juror("http://c/v1", "c"),
            Juror("http://d/v1", "d", SecretRef("fourth", "k")))  # fmt: skip
    evaluator = Evaluator("Judge", endpoint="http://judge/v1", model="m", jury=jury)
    built = context(feedback={"evaluator": evaluator})
    (pod,) = (pod for name, pod in pods(everything(built)) if name == "Deployment claims-proxy")
    told = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    folders = {name: folder for name, folder in told.items() if "JURY" in name}
    assert folders == {
        "COWEST_JURY_API_KEY_1_FOLDER": "/etc/cowest/jury-1", "COWEST_JURY_API_KEY_3_FOLDER": "/etc/cowest/jury-3",
    }  # fmt: skip
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if v["name"].startswith("jury")}
    assert secrets == {"jury-1": "second", "jury-3": "fourth"}
    assert set(folders.values()) <= {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    _, _, environment = servers.asking_access(built)
    assert [(each["name"], each["valueFrom"]["secretKeyRef"]["name"]) for each in environment] == [
        ("COWEST_JURY_API_KEY_1", "second"), ("COWEST_JURY_API_KEY_3", "fourth"),
    ]  # fmt: skip


def test_vllm_needs_no_entry_in_the_images_passwd() -> None:
    seen = context(weak={"engine": "vLLM"})
    (server,) = weak.inference_service(seen, api.ServerSpec("sha256:abc", "s3://b/m"))["spec"]["predictor"][
        "containers"
    ]
    env = {each["name"]: each["value"] for each in server["env"]}
    assert env["USER"], "getpass asks for it before it looks into passwd"
    written = [env[name] for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")]
    assert all(path == "/tmp" or path.startswith("/tmp/") for path in written), "the rest is read-only"


def test_the_book_lies_where_the_operator_was_told() -> None:
    told = replace(context(), book=Book("5Gi", "fast"))
    for seen, size, storage_class in ((context(), "1Gi", None), (told, "5Gi", "fast")):
        (claim,) = [c for c in everything(seen) if c["kind"] == "PersistentVolumeClaim"]
        assert claim["spec"]["resources"]["requests"]["storage"] == size
        assert claim["spec"].get("storageClassName") == storage_class


@pytest.mark.parametrize(
    ("gateway", "reasons"),
    [
        pytest.param({"max_replicas": 5}, [], id="our own request"),
        pytest.param({"max_replicas": 5, "resources": api.Resources({"cpu": "1"})}, [], id="a request"),
        pytest.param({"max_replicas": 5, "resources": api.Resources({}, {"cpu": "1"})}, [], id="a limit is a request"),
        pytest.param(
            {"max_replicas": 5, "resources": api.Resources({"memory": "1Gi"})}, [api.REASON_CANNOT_SCALE], id="none"
        ),
        pytest.param({"resources": api.Resources({"memory": "1Gi"})}, [], id="nothing is to be scaled"),
    ],
)
def test_an_autoscaler_that_has_nothing_to_measure_is_a_trouble(gateway: dict[str, Any], reasons: list[str]) -> None:
    platform = Platform(has_kserve=True, has_argo=True)
    assert [trouble.reason for trouble in troubles(platform, context(gateway=gateway).job, {})] == reasons


@pytest.mark.parametrize(
    ("limit", "size"), [pytest.param({}, MAX_BODY, id="default"), ({"max_body_bytes": 9_000_000}, 9_000_000)]
)
def test_an_ingress_lets_through_what_the_gateway_takes(limit: dict[str, int], size: int) -> None:
    seen = context(gateway={"ingress": api.Ingress("answers.example.com"), **limit})
    (ingress,) = [child for child in everything(seen) if child["kind"] == "Ingress"]
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == str(size)


def test_an_ingress_leads_to_what_clients_ask_and_is_told_more_by_annotations() -> None:
    read, idle = "nginx.ingress.kubernetes.io/proxy-read-timeout", "alb.ingress.kubernetes.io/target-type"
    spec = api.Ingress("answers.example.com", annotations={read: "60", idle: "ip"})
    (ingress,) = [child for child in everything(context(gateway={"ingress": spec})) if child["kind"] == "Ingress"]
    (rule,) = ingress["spec"]["rules"]
    assert {each["path"]: each["pathType"] for each in rule["http"]["paths"]} == {
        "/v1": "Prefix",
        "/openapi.json": "Exact",
    }
    assert {"60", "ip"} <= set(ingress["metadata"]["annotations"].values())
