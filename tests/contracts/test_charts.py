"""The charts as Helm renders them: restricted pods, no secrets, the API's own CRD, and values that cannot be mistyped.

Helm is looked for in HELM, on PATH and in ~/.cache/cowest-cluster/bin; without it the tests that render are skipped.
"""

from __future__ import annotations

import atexit
import functools
import http.client
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest
import yaml
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from urllib3 import HTTPResponse

from cowest_operator import api, kube, manifest, settings
from cowest_operator.metrics import Metrics
from cowest_operator.objects import common, ray
from cowest_operator.schema import default
from cowest_serving import app, proxy
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "charts"
OPERATOR, DOMAIN = CHARTS / "cowest-operator", CHARTS / "cowest-domain"
CACHE = Path.home() / ".cache" / "cowest-cluster" / "bin"
Object = dict[str, Any]


def find(name: str, variable: str) -> str | None:
    cached = CACHE / name
    return os.environ.get(variable) or shutil.which(name) or (str(cached) if os.access(cached, os.X_OK) else None)


HELM, MINIO = find("helm", "HELM"), find("minio", "COWEST_TEST_MINIO")
needs_helm = pytest.mark.skipif(HELM is None, reason=f"no helm in HELM, on PATH or in {CACHE}: charts are not rendered")
needs_minio = pytest.mark.skipif(MINIO is None, reason=f"no minio in COWEST_TEST_MINIO, on PATH or in {CACHE}")

RENDERED = [
    pytest.param(OPERATOR, None, id="operator with its defaults"),
    pytest.param(OPERATOR, "full", id="operator with everything on"),
    pytest.param(DOMAIN, "minimal", id="smallest domain"),
    pytest.param(DOMAIN, "full", id="domain with everything on"),
]


# ---------------------------------------------------------------- rendering
def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, timeout=60)


@functools.cache
def rendered(chart: Path, values: str | None, *sets: str) -> tuple[Object, ...]:
    """The objects of a release `r` in namespace `here`; `values` names a file of the chart's ci folder."""
    folder = chart if chart.is_dir() else unpacked(chart)
    files = ["--values", str(folder / "ci" / f"{values}-values.yaml")] if values else []
    more = [word for text in sets for word in ("--set", text)]
    done = helm("template", "r", str(chart), "--namespace", "here", "--kube-version", "1.34.0", *files, *more)
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each)


@functools.cache
def unpacked(archive: Path) -> Path:
    """Of a packed chart, which has values of its own time in it."""
    folder = Path(tempfile.mkdtemp(prefix="cowest-chart-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (chart,) = folder.iterdir()
    return chart


def refusal(chart: Path, values: str | None, *sets: str) -> str:
    with pytest.raises(AssertionError) as caught:
        rendered(chart, values, *sets)
    return str(caught.value)


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """(kind and name, PodSpec) of everything that runs pods."""
    for each in objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield where, each["spec"]
        elif "template" in each.get("spec", {}):
            yield where, each["spec"]["template"]["spec"]


# ---------------------------------------------------------------- the restricted profile
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(pod: Mapping[str, Any]) -> list[str]:
    """What Pod Security `restricted` forbids in a PodSpec, and a root file system that can be written."""
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    found += [f"volume {v['name']}" for v in pod.get("volumes", []) if not set(v) - {"name"} <= VOLUMES]
    shared = pod.get("securityContext", {})
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        own, name = container.get("securityContext", {}), container["name"]
        both = {**shared, **own}
        capabilities = own.get("capabilities", {})
        checks = {
            "runAsNonRoot": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "capabilities": capabilities.get("drop") == ["ALL"]
            and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        }
        found += [f"{name}: {check}" for check, holds in checks.items() if not holds]
    return found


def test_the_checker_sees_what_the_restricted_profile_forbids() -> None:
    privileged = {"name": "main", "securityContext": {"privileged": True}, "ports": [{"hostPort": 80}]}
    pod = {"hostNetwork": True, "volumes": [{"name": "host", "hostPath": {"path": "/"}}], "containers": [privileged]}
    assert {each.removeprefix("main: ") for each in violations(pod)} == {
        "hostNetwork", "volume host", "runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation", "privileged",
        "capabilities", "hostPort", "readOnlyRootFilesystem",
    }  # fmt: skip


@needs_helm
@pytest.mark.parametrize(("chart", "values"), RENDERED)
def test_every_pod_is_restricted_and_has_a_read_only_root(chart: Path, values: str | None) -> None:
    assert {where: violations(pod) for where, pod in pods(rendered(chart, values)) if violations(pod)} == {}


@needs_helm
@pytest.mark.parametrize(("chart", "values"), RENDERED)
def test_only_the_operator_gets_a_token(chart: Path, values: str | None) -> None:
    with_token = {
        where for where, pod in pods(rendered(chart, values)) if pod.get("automountServiceAccountToken", True)
    }
    assert with_token == {where for where, _ in pods(rendered(chart, values)) if where.startswith("Deployment ")}
    assert chart == OPERATOR or not with_token


# ---------------------------------------------------------------- both charts
@needs_helm
@pytest.mark.parametrize("chart", [OPERATOR, DOMAIN], ids=lambda chart: chart.name)
def test_lint_finds_nothing(chart: Path) -> None:
    files = [word for path in sorted((chart / "ci").iterdir()) for word in ("--values", str(path))]
    for arguments in ([], files):
        done = helm("lint", "--strict", str(chart), "--kube-version", "1.34.0", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
@pytest.mark.parametrize(("chart", "values"), RENDERED)
def test_secrets_are_named_and_never_written(chart: Path, values: str | None) -> None:
    objects = rendered(chart, values)
    made = of_kind(objects, "Secret")
    assert {each["metadata"]["annotations"]["cowest.dev/purpose"] for each in made} <= {"test"}
    assert bool(made) == (chart == DOMAIN and values == "full")
    for where, pod in pods(objects):
        for container in pod["containers"]:
            named = [e["name"] for e in container.get("env", []) if not e["name"].endswith(("_FILE", "_FOLDER"))]
            written = [name for name in named if re.search("KEY|SECRET_|PASS|TOKEN", name)]
            assert all("value" not in e for e in container.get("env", []) if e["name"] in written), where


WITHOUT_STORE = (
    "job.weak.model=s3://a/b,job.strong.endpoint=https://strong.example.com/v1,job.strong.model=strong,"
    "job.data.train=s3://a/c,job.data.heldOut=s3://a/d,job.feedback.evaluator.type=ExactMatch"
)


@needs_helm
@pytest.mark.parametrize(
    ("chart", "values", "edit", "said"),
    [
        pytest.param(OPERATOR, None, "replcas=3", "'replcas' not allowed", id="typo at the top"),
        pytest.param(OPERATOR, None, "metrics.podMonitor.enable=true", "'enable' not allowed", id="typo below"),
        pytest.param(OPERATOR, None, "replicas=many", "want integer", id="word for a number"),
        pytest.param(OPERATOR, None, "image.digest=latest", "does not match", id="digest that is none"),
        pytest.param(DOMAIN, "minimal", "minoi.enabled=true", "'minoi' not allowed", id="typo of a section"),
        pytest.param(DOMAIN, "minimal", "job.traning.seed=1", "'traning' not allowed", id="typo in the job"),
        pytest.param(DOMAIN, "minimal", "job.canary.signal=Gut", "must be one of", id="value the API does not know"),
        pytest.param(DOMAIN, "minimal", "httpRoute.enabled=true", "httpRoute.parentRefs: wanted", id="no Gateway"),
        pytest.param(DOMAIN, "minimal", "httpRoute.hostname=a", "'hostname' not allowed", id="typo of the route"),
        pytest.param(DOMAIN, "minimal", "httpRoute.timeout=never", "does not match", id="timeout that is no time"),
        pytest.param(DOMAIN, "minimal", "name=Desk", "does not match", id="name the API refuses"),
        pytest.param(DOMAIN, "minimal", "networkPolicy.apiServer.ports=null", "at least one port", id="no ports left"),
        pytest.param(DOMAIN, None, "name=desk", "job.weak: wanted a section", id="no job at all"),
        pytest.param(DOMAIN, None, WITHOUT_STORE, "job.objectStore: wanted", id="no object store"),
        pytest.param(
            DOMAIN, None, WITHOUT_STORE + ",job.objectStore.bucket=desk,minio.enabled=true",
            "credentialsSecretRef: wanted the name of a Secret", id="own store without credentials",
        ),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(chart: Path, values: str | None, edit: str, said: str) -> None:
    assert said in refusal(chart, values, *edit.split(","))


def test_readmes_schema_and_crd_copy_are_current() -> None:
    done = subprocess.run([sys.executable, CHARTS / "docs.py", "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_documented_values_file_is_the_tested_one() -> None:
    shown = re.findall(r"```yaml\n(name: .*?)```", (DOMAIN / "README.md").read_text(), re.DOTALL)
    assert [yaml.safe_load(text) for text in shown] == [yaml.safe_load((DOMAIN / "ci/minimal-values.yaml").read_text())]


# ---------------------------------------------------------------- upgrades
IMMUTABLE = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
    "Service": ("selector",),
}


@needs_helm
@pytest.mark.parametrize(("chart", "values"), RENDERED)
def test_the_first_chart_upgrades_to_todays(chart: Path, values: str | None) -> None:
    first = next((ROOT / "tests" / "charts-first").glob(f"{chart.name}-*.tgz"))
    today = {(each["kind"], each["metadata"]["name"]): each for each in rendered(chart, values)}
    for each in rendered(first, values):
        key = each["kind"], each["metadata"]["name"]
        for field in IMMUTABLE.get(each["kind"], ()):
            assert today[key]["spec"][field] == each["spec"][field], key


# ---------------------------------------------------------------- the operator's chart
@needs_helm
def test_the_crd_is_the_apis_own_and_outlives_the_release() -> None:
    (crd,) = of_kind(rendered(OPERATOR, None), "CustomResourceDefinition")
    assert crd["spec"] == yaml.safe_load((ROOT / "crds" / "collaborationjob.yaml").read_text())["spec"]
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not of_kind(rendered(OPERATOR, None, "crds.install=false"), "CustomResourceDefinition")


@needs_helm
def test_the_operator_can_read_what_the_chart_tells_it() -> None:
    (deployment,) = of_kind(rendered(OPERATOR, "full"), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    told = settings.read({each["name"]: each.get("value", "here") for each in container["env"]})
    mirror = "registry.example.com/mirror"
    assert told.images.serving == f"{mirror}/cowest/serving:0.1.0"
    assert told.images.with_ray == f"{mirror}/cowest/serving:0.1.0-ray"
    assert told.rayservices
    assert told.images.training == f"{mirror}/cowest/training:1.2.3"
    assert told.images.vllm.startswith(f"{mirror}/vllm/vllm-openai:")
    assert told.images.pull_secrets == ("mirror", "other")
    assert told.book == settings.Book("5Gi", "fast")
    assert [each["name"] for each in told.job_env] == ["HTTPS_PROXY", "PROXY_PASSWORD", "NO_PROXY"]
    assert told.namespaces == ("pharmacy", "freight")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": told.metrics_port, "health": told.health_port}


def rights(roles: list[Object]) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of all rules."""
    rules = [rule for role in roles for rule in role["rules"]]
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


@needs_helm
def test_the_operator_may_do_what_it_does_and_read_no_secret() -> None:
    allowed = rights(of_kind(rendered(OPERATOR, None), "ClusterRole"))
    needed = {
        "Pod": ("list", "watch"),
        "Event": ("create",),
        "CollaborationJob": ("list", "watch", "patch"),
        "PersistentVolumeClaim": ("list", "watch", "create", "patch"),
        "Workflow": ("get", "list", "watch", "create", "delete"),
    }
    for kind, (version, plural) in kube.PLURALS.items():
        group = version.rpartition("/")[0]
        for verb in needed.get(kind, ("list", "watch", "create", "patch", "delete")):
            assert (group, plural, verb) in allowed, f"{kind}: {verb}"
    assert ("cowest.dev", "collaborationjobs/status", "patch") in allowed
    assert ("argoproj.io", "workflowtaskresults", "patch") in allowed, "a right that it grants to steps"
    assert not {verb for _, resource, verb in allowed if resource == "secrets"}
    assert not {right for right in allowed if "*" in right}


@needs_helm
def test_without_rayservices_it_has_no_right_to_them_and_knows_it() -> None:
    objects = rendered(OPERATOR, None, "rayservice.enabled=false")
    assert not [right for right in rights(of_kind(objects, "ClusterRole")) if right[0] == "ray.io"]
    (container,) = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert not settings.read({each["name"]: each.get("value", "here") for each in container["env"]}).rayservices


@needs_helm
def test_with_named_namespaces_it_has_no_rights_elsewhere() -> None:
    objects = rendered(OPERATOR, "full")
    assert rights(of_kind(objects, "ClusterRole")) == {
        *(("apiextensions.k8s.io", "customresourcedefinitions", verb) for verb in ("get", "list", "watch")),
        *(("", "namespaces", verb) for verb in ("list", "watch")),
    }
    keeping = {
        r["metadata"]["namespace"] for r in of_kind(objects, "Role") if ("apps", "deployments", "patch") in rights([r])
    }
    assert keeping == {"pharmacy", "freight"}


@needs_helm
def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    objects = rendered(OPERATOR, "full")
    (rule,), (board,) = of_kind(objects, "PrometheusRule"), of_kind(objects, "ConfigMap")
    asked = [r["expr"] for group in rule["spec"]["groups"] for r in group["rules"]]
    asked += [t["expr"] for panel in json.loads(board["data"]["cowest.json"])["panels"] for t in panel["targets"]]
    operators = re.findall(r"^# TYPE (\S+)", Metrics().text(), re.MULTILINE)
    known = {*app.METRICS, *proxy.METRICS, *operators}
    names = {
        re.sub("_(bucket|sum|count)$", "", name)
        for text in asked
        for name in re.findall(r"\b(?:cowest|gen_ai_client)_[a-z_]+", text)
    }
    assert names - {"cowest_dev_job"} <= known
    assert len(names) > 5


@needs_helm
def test_every_alert_and_each_metric_of_a_jobs_loop_is_told_in_the_documents() -> None:
    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (rule,) = of_kind(rendered(OPERATOR, "full"), "PrometheusRule")
    alerts = {r["alert"] for group in rule["spec"]["groups"] for r in group["rules"]}
    of_jobs = set(re.findall(r"^# TYPE (cowest_job_\S+)", Metrics().text(), re.MULTILINE))
    assert {alert for alert in alerts if f"| {alert} |" not in told} == set()
    assert {metric for metric in of_jobs if f"`{metric}`" not in told} == set()
    rows = set(re.findall(r"^\| (CoWest\w+) \|", told, re.MULTILINE))
    assert rows == alerts, "nor is one told that is not there"


@needs_helm
def test_a_trial_that_stands_still_is_an_alert_after_the_hours_of_the_values_but_for_one_that_a_person_holds() -> None:
    objects = rendered(OPERATOR, "full", "metrics.prometheusRule.maxStageHours=6")
    (rule,) = of_kind(objects, "PrometheusRule")
    (alert,) = (r for g in rule["spec"]["groups"] for r in g["rules"] if r["alert"] == "CoWestRoundStandsStill")
    assert "> 3600 * 6 unless on" in alert["expr"]
    assert f'reason=~"{api.REASON_PAUSED}|{api.REASON_SUSPENDED}"' in alert["expr"]


# ---------------------------------------------------------------- a domain's chart
@needs_helm
def test_the_job_is_what_the_values_say() -> None:
    values = yaml.safe_load((DOMAIN / "ci" / "minimal-values.yaml").read_text())
    (job,) = of_kind(rendered(DOMAIN, "minimal"), "CollaborationJob")
    assert (job["metadata"]["name"], job["spec"]) == ("desk", values["job"])


@needs_helm
@pytest.mark.parametrize("values", ["minimal", "full"])
def test_the_job_is_valid(values: str, tmp_path: Path) -> None:
    (job,) = of_kind(rendered(DOMAIN, values), "CollaborationJob")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    assert manifest.load(path)


@needs_helm
def test_with_its_own_store_the_job_is_told_where_it_is() -> None:
    (job,) = of_kind(rendered(DOMAIN, "full"), "CollaborationJob")
    store = job["spec"]["objectStore"]
    assert (store["endpoint"], store["pathStyle"], store["prefix"]) == (
        "http://desk-minio.here.svc:9000",
        True,
        "team/a",
    )


@needs_helm
def test_a_route_leads_to_the_jobs_service_and_ends_no_stream() -> None:
    parent = "httpRoute.parentRefs[0]"
    sets = ("httpRoute.enabled=true", f"{parent}.name=public", f"{parent}.namespace=gateways",
            f"{parent}.sectionName=https", "httpRoute.hostnames[0]=desk.example.com")  # fmt: skip
    (route,) = of_kind(rendered(DOMAIN, "minimal", *sets), "HTTPRoute")
    assert route["metadata"]["namespace"] == "here"
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
    assert route["spec"]["hostnames"] == ["desk.example.com"]
    for rule in route["spec"]["rules"]:
        assert rule["timeouts"] == {"request": "0s"}
        assert rule["backendRefs"] == [{"name": "desk-gateway", "port": 80}]
    assert not of_kind(rendered(DOMAIN, "minimal"), "HTTPRoute")


@needs_helm
@pytest.mark.parametrize("path", ["/", "/desk", "/desk/"])
def test_a_route_leads_to_what_clients_ask_and_takes_its_own_path_off(path: str) -> None:
    sets = ("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=public", f"httpRoute.path={path}")
    (route,) = of_kind(rendered(DOMAIN, "minimal", *sets), "HTTPRoute")
    below, found = path.rstrip("/"), {}
    for rule in route["spec"]["rules"]:
        (match,) = rule["matches"]
        rewrites = [each["urlRewrite"]["path"] for each in rule.get("filters", [])]
        found[match["path"]["value"]] = (match["path"]["type"], rewrites)
    prefix = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/v1"}
    whole = {"type": "ReplaceFullPath", "replaceFullPath": "/openapi.json"}
    assert found == {
        f"{below}/v1": ("PathPrefix", [prefix] if below else []),
        f"{below}/openapi.json": ("Exact", [whole] if below else []),
    }


@needs_helm
def test_a_domain_makes_nothing_outside_its_namespace() -> None:
    assert {each["metadata"].get("namespace") for each in rendered(DOMAIN, "full")} == {"here"}


def notes_of(folder: Path, values: str, *sets: str) -> str:
    """What an install of the domain's chart ends with; only an install renders it."""
    chart = shutil.copytree(DOMAIN, folder / "chart")
    notes = '{{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}'
    (chart / "templates" / "notes.yaml").write_text(f"kind: Notes\nsaid: {notes}\n")
    (found,) = of_kind(rendered(chart, values, *sets), "Notes")
    return str(found["said"])


@needs_helm
@pytest.mark.parametrize(("policy", "said"), [("Keep", False), ("Delete", True)])
def test_whoever_installs_is_told_to_delete_a_job_that_erases_before_its_release(
    policy: str, said: bool, tmp_path: Path
) -> None:
    """Helm deletes what it does not know last: MinIO, policies and quotas are gone before the job is."""
    notes = notes_of(tmp_path, "minimal", f"job.deletionPolicy.models={policy}")
    assert ("kubectl -n here delete cwj/desk --wait" in notes) is said


@needs_helm
@pytest.mark.parametrize("own_store", [False, True])
def test_whoever_installs_is_told_that_data_may_come_later_and_how(own_store: bool, tmp_path: Path) -> None:
    notes = notes_of(tmp_path, "minimal", f"minio.enabled={str(own_store).lower()}")
    assert "(DataMissing), and begins by itself once `cowest upload`" in notes
    command = "COWEST_S3_ENDPOINT=http://127.0.0.1:9000 cowest upload FILE s3://desk/data/train.jsonl"
    assert (command in notes) is own_store
    assert ("export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=..." in notes) is own_store


@needs_helm
@pytest.mark.parametrize(("values", "asks"), [("minimal", False), ("full", True)])
def test_the_first_question_of_the_notes_has_a_key_where_the_gateway_asks_for_one(
    values: str, asks: bool, tmp_path: Path
) -> None:
    notes = notes_of(tmp_path, values)
    header = "-H 'Content-Type: application/json' \\\n    -H \"Authorization: Bearer $KEY\" \\\n    -d"
    assert (header in notes) is asks and ("of the Secret clients" in notes) is asks


def policies(values: str, *sets: str) -> dict[str, Object]:
    found = of_kind(rendered(DOMAIN, values, *sets), "NetworkPolicy")
    return {each["metadata"]["name"].removeprefix("desk-"): each["spec"] for each in found}


@needs_helm
def test_nothing_passes_but_what_a_policy_names() -> None:
    deny = policies("minimal")["deny"]
    assert deny == {"podSelector": {"matchLabels": {"cowest.dev/job": "desk"}}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies("full").items():
        if name not in ("deny", "own-deny"):
            assert spec.get("ingress", []) + spec.get("egress", []), name


@needs_helm
def test_only_gateway_and_proxy_reach_the_strong_model() -> None:
    found = policies("full")
    strong = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "strong"}}}
    reach = {
        name for name, spec in found.items() if any(strong in rule.get("to", []) for rule in spec.get("egress", []))
    }
    assert reach == {"gateway", "proxy"}


@needs_helm
@pytest.mark.parametrize("values", ["minimal", "full"])
def test_the_operator_reaches_every_server_that_it_asks(values: str) -> None:
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "cowest-system"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "cowest-operator"}},
    }
    found = policies(values)
    for name in ("gateway", "proxy", "observer", "weak-model"):
        assert any(operator in rule.get("from", [operator]) for rule in found[name]["ingress"]), name


@needs_helm
def test_no_rule_lets_out_on_all_ports_and_the_dns_may_listen_elsewhere() -> None:
    found = policies("full", "networkPolicy.dns.ports={53,5353}")
    for name in ("dns", "own-dns"):
        ports = [(each["protocol"], each["port"]) for each in found[name]["egress"][0]["ports"]]
        assert ports == [("UDP", 53), ("TCP", 53), ("UDP", 5353), ("TCP", 5353)], name
    for name, spec in found.items():
        assert all(rule.get("ports", True) for rule in spec.get("egress", [])), name
    places = json.loads((DOMAIN / "values.schema.json").read_text())["properties"]["networkPolicy"]["properties"]
    for name in ("dns", "apiServer", "modelHub"):
        assert places[name]["properties"]["ports"]["minItems"] == 1, f"{name}: its ports are nobody else's to say"


@needs_helm
@pytest.mark.parametrize("values", ["minimal", "full"])
def test_a_gateway_reaches_the_proxy_also_for_a_days_budget_that_only_the_job_has(values: str) -> None:
    found = policies(values)
    proxy = {"podSelector": {"matchLabels": {"cowest.dev/job": "desk", "app.kubernetes.io/component": "proxy"}}}
    out, into = found["gateway"], found["proxy"]
    assert any(proxy in rule.get("to", []) for rule in out["egress"])
    assert any({"podSelector": out["podSelector"]} in rule["from"] for rule in into["ingress"])


@needs_helm
@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        pytest.param("https://strong.example.com/v1", 443, id="https"),
        pytest.param("http://strong.svc/v1", 80, id="http"),
        pytest.param("https://strong.example.com:8443/v1", 8443, id="a port of its own"),
    ],
)
def test_the_strong_models_port_is_read_from_its_address(endpoint: str, port: int) -> None:
    (rule,) = policies("minimal", f"job.strong.endpoint={endpoint}")["proxy"]["egress"]
    assert rule == {"ports": [{"protocol": "TCP", "port": port}]}


@needs_helm
def test_the_ports_of_all_judges_are_read_from_their_addresses() -> None:
    places = {"endpoint": "https://a.example.com/v1", "jury[0].endpoint": "http://b.svc:8000/v1"}
    said = {"type": "Judge", "model": "a", "jury[0].model": "b", **places}
    found = policies("minimal", ",".join(f"job.feedback.evaluator.{name}={value}" for name, value in said.items()))
    for name in ("proxy", "step"):
        ports = [[each["port"] for each in rule["ports"]] for rule in found[name]["egress"]]
        assert [443, 8000] in ports, name


@needs_helm
def test_on_ray_the_gateways_nodes_reach_each_other_and_only_kuberay_reaches_the_dashboard() -> None:
    nodes = {"matchExpressions": [
        {"key": "cowest.dev/job", "operator": "In", "values": ["desk"]},
        {"key": "app.kubernetes.io/component", "operator": "In", "values": ["gateway", ray.HEAD]},
    ]}  # fmt: skip
    gateway = policies("full")["gateway"]
    assert gateway["podSelector"] == nodes
    assert {"from": [{"podSelector": nodes}]} in gateway["ingress"]
    assert {"to": [{"podSelector": nodes}]} in gateway["egress"]
    (dashboard,) = [rule for rule in gateway["ingress"] if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])]
    kuberay = {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}
    assert dashboard["from"] == [{"namespaceSelector": kuberay}], "whoever reaches it can run code there"
    plain = policies("minimal")["gateway"]
    assert plain["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert "8265" not in json.dumps(plain)


@needs_helm
def test_the_proxy_is_asked_by_those_that_the_values_name_too() -> None:
    def asking(values: str) -> str:
        return json.dumps(policies(values)["proxy"]["ingress"])

    assert "score-live" in asking("minimal") and "notebook" not in asking("minimal")
    assert "score-live" in asking("full") and "notebook" in asking("full")


@needs_helm
def test_the_charts_own_store_is_of_a_named_release() -> None:
    (store,) = of_kind(rendered(DOMAIN, "full"), "StatefulSet")
    assert re.search(r":RELEASE\.\d{4}-", store["spec"]["template"]["spec"]["containers"][0]["image"])


@needs_helm
def test_without_policies_there_are_none() -> None:
    assert policies("full", "networkPolicy.enabled=false") == {}


@needs_helm
def test_traces_expire_after_the_apis_default_unless_said() -> None:
    days = default(manifest.job_schema(), {"spec": {"traces": {}}})["spec"]["traces"]["retentionDays"]
    assert [rule.split("=")[-1] for rule in bucket_job("minimal", "bucket.enabled=true")[1]] == [str(days)] * 2


# ---------------------------------------------------------------- what the charts run
def bucket_job(values: str, *sets: str) -> tuple[list[str], list[str]]:
    """(arguments of Python, the --expire rules) of the bucket's Job."""
    (job,) = of_kind(rendered(DOMAIN, values, *sets), "Job")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments, [each for each in arguments if each.startswith("--expire=")]


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    data = tmp_path_factory.mktemp("minio")
    environment = dict(os.environ)
    for name, value in (("USER", "tester"), ("PASSWORD", "only-for-tests")):
        (data / name).write_text(value + "\n")  # as `kubectl create secret --from-file` may bring it
        environment[f"MINIO_ROOT_{name}_FILE"] = str(data / name)
    certificates = ["--certs-dir", str(data / "none")]
    command = [str(MINIO), "server", str(data / "data"), "--quiet", "--address", address, *certificates]
    with (data / "log").open("wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            end = time.monotonic() + 60
            while not is_up(f"http://{address}/minio/health/ready"):
                assert server.poll() is None and time.monotonic() < end, (data / "log").read_text()
                time.sleep(0.05)
            yield address
        finally:
            server.kill()


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@needs_helm
@needs_minio
def test_the_bucket_job_makes_the_bucket_and_keeps_the_rules_of_others(minio: str) -> None:
    store = Minio(minio, "tester", "only-for-tests", secure=False)
    keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "only-for-tests", "AWS_REGION": "us-east-1"}

    def run(*sets: str) -> None:
        arguments, _ = bucket_job("full", *sets)
        environment = {**os.environ, **keys, "COWEST_S3_ENDPOINT": f"http://{minio}"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def rules() -> dict[str, int]:
        found = store.get_bucket_lifecycle("desk")
        return {rule.rule_filter.prefix: rule.expiration.days for rule in found.rules} if found else {}

    run()
    assert rules() == {"team/a/here/desk/traces/": 7, "team/a/here/desk/feedback/": 7}
    others = Rule(ENABLED, rule_filter=Filter(prefix="tmp/"), rule_id="theirs", expiration=Expiration(days=1))
    store.set_bucket_lifecycle("desk", LifecycleConfig([others, *store.get_bucket_lifecycle("desk").rules]))
    run("job.traces.retentionDays=3")
    assert rules() == {"tmp/": 1, "team/a/here/desk/traces/": 3, "team/a/here/desk/feedback/": 3}
    run("bucket.expireTraces=false")
    assert rules() == {"tmp/": 1}


@pytest.fixture(scope="module")
def bucket_py() -> Any:
    source = DOMAIN / "files" / "bucket.py"
    specification = importlib.util.spec_from_file_location("bucket", source)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Store:
    """A bucket's lifecycle as an object store keeps it."""

    def __init__(self, lifecycle: str = "", refused: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.lifecycle, self.refused, self.headers = lifecycle, refused, dict(headers or {})
        self.written: list[Mapping[str, str]] = []

    def _execute(
        self, method: str, bucket: str, body: bytes = b"", headers: Any = None, query_params: Any = None
    ) -> Any:
        assert query_params == {"lifecycle": ""}
        code = self.refused or ("" if self.lifecycle or method == "PUT" else "NoSuchLifecycleConfiguration")
        if code:
            raise S3Error(HTTPResponse(status=400), code, "no", bucket, "1", "1")
        if method == "PUT":
            self.lifecycle = body.decode()
            self.written.append(headers)
        return SimpleNamespace(data=self.lifecycle.encode(), headers=self.headers)

    def delete_bucket_lifecycle(self, bucket: str) -> None:
        self.lifecycle = ""


THEIRS = (
    "<Rule><ID>big</ID><Status>Enabled</Status><Filter><And><Prefix>a/</Prefix>"
    "<ObjectSizeGreaterThan>9</ObjectSizeGreaterThan></And></Filter>"
    "<Transition><Days>1</Days><StorageClass>IA</StorageClass></Transition>"
    "<Transition><Days>9</Days><StorageClass>GLACIER</StorageClass></Transition></Rule>",
    "<Rule><ID>old</ID><Prefix>tmp/</Prefix><Status>Enabled</Status><Expiration><Days>1</Days></Expiration></Rule>",
    "<Rule><ID>all</ID><Status>Enabled</Status><Filter/><AbortIncompleteMultipartUpload>"
    "<DaysAfterInitiation>1</DaysAfterInitiation></AbortIncompleteMultipartUpload></Rule>",
)
S3_NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@pytest.mark.parametrize("space", ["", S3_NAMESPACE], ids=["no namespace", "S3's namespace"])
def test_rules_of_others_are_written_back_word_for_word(bucket_py: Any, space: str) -> None:
    least = {bucket_py.SMALLEST: "varies_by_storage_class"}
    store = Store(f"<LifecycleConfiguration{space}>{''.join(THEIRS)}</LifecycleConfiguration>", headers=least)
    before, wanted = store.lifecycle, [bucket_py.rule("ours/traces=t/=7"), bucket_py.rule("ours/feedback=f/=7")]
    bucket_py.expire(store, "desk", "ours/", wanted)
    ours = "".join(
        f"<Rule><ID>{each.name}</ID><Status>Enabled</Status><Filter><Prefix>{each.prefix}</Prefix></Filter>"
        "<Expiration><Days>7</Days></Expiration></Rule>"
        for each in wanted
    )
    canonical = ElementTree.canonicalize
    assert canonical(store.lifecycle) == canonical(before.replace("</Life", f"{ours}</Life"))
    assert store.written[0].items() >= least.items()
    bucket_py.expire(store, "desk", "ours/", wanted)
    assert len(store.written) == 1, "nothing has changed"
    bucket_py.expire(store, "desk", "ours/", [])
    assert canonical(store.lifecycle) == canonical(before)


def test_the_last_rule_takes_the_lifecycle_with_it_and_an_edited_one_is_written_anew(bucket_py: Any) -> None:
    store, wanted = Store(), [bucket_py.rule("ours/traces=t/=7")]
    bucket_py.expire(store, "desk", "ours/", wanted)
    good = store.lifecycle
    store.lifecycle = good.replace("Enabled", "Disabled")
    bucket_py.expire(store, "desk", "ours/", wanted)
    assert store.lifecycle == good
    bucket_py.expire(store, "desk", "ours/", [])
    assert store.lifecycle == ""


@pytest.mark.parametrize("code", ["AccessDenied", "NotImplemented"])
def test_a_store_without_rules_is_a_trouble_only_where_traces_are_to_expire(bucket_py: Any, code: str) -> None:
    bucket_py.expire(Store(refused=code), "desk", "ours/", [])
    with pytest.raises(SystemExit, match="expireTraces"):
        bucket_py.expire(Store(refused=code), "desk", "ours/", [bucket_py.rule("ours/traces=t/=7")])


def test_keys_in_files_may_end_a_line_and_have_a_session(bucket_py: Any, tmp_path: Path) -> None:
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "me\n"),
        ("AWS_SECRET_ACCESS_KEY", "x\r\n"),
        ("AWS_SESSION_TOKEN", "t\n"),
    ):
        (tmp_path / name).write_text(value)
    found = bucket_py.keys(str(tmp_path)).retrieve()
    assert (found.access_key, found.secret_key, found.session_token) == ("me", "x", "t")


@needs_helm
def test_bucket_job_and_own_store_read_the_keys_from_files() -> None:
    wanted = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}
    for where, pod in pods(rendered(DOMAIN, "full")):
        if where.startswith(("Job", "StatefulSet")):
            (container,) = pod["containers"]
            assert {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["s3-keys"] == common.STORE_KEYS, where
            (volume,) = [each for each in pod["volumes"] if each["name"] == "s3-keys"]
            sources = [each["secret"] for each in volume["projected"]["sources"]]
            assert {s["items"][0]["key"]: s.get("optional", False) for s in sources} == wanted, where
            assert {s["name"] for s in sources} == {"store"}
            told = [e["value"] for e in container["env"] if e["name"].endswith(("KEYS_FOLDER", "USER_FILE"))]
            assert all(each.startswith(common.STORE_KEYS) for each in told) and told, where


@needs_helm
@needs_minio
def test_the_bucket_job_goes_out_by_the_proxy_that_its_environment_names(minio: str) -> None:
    """One that asks for a password and passes on what comes for a host that only it can find."""
    asked: list[tuple[str, str]] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            place = urlsplit(self.path)
            asked.append((place.netloc, self.headers.get("Proxy-Authorization", "")))
            headers = {name: value for name, value in self.headers.items() if not name.startswith("Proxy-")}
            onward = http.client.HTTPConnection(minio, timeout=20)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            onward.request(self.command, f"{place.path}?{place.query}" if place.query else place.path, body, headers)
            answer = onward.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            pass

    proxy = "bucket.env[0].name=HTTP_PROXY,bucket.env[0].value=http://me:secret@127.0.0.1"
    (job,) = of_kind(rendered(DOMAIN, "full", proxy), "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "only-for-tests", "AWS_REGION": "us-east-1"}
        told = {
            "COWEST_S3_ENDPOINT": "http://store.example",
            "HTTP_PROXY": f"{given['HTTP_PROXY']}:{server.server_port}",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", *container["args"]], env={**os.environ, **keys, **told},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert set(asked) == {("store.example", "Basic bWU6c2VjcmV0")}


class Gateway(http.server.BaseHTTPRequestHandler):
    """Ready at the second look; answers whoever has the key."""

    looks = 0

    def do_GET(self) -> None:
        Gateway.looks += 1
        self._send(200 if Gateway.looks > 1 else 503, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == "Bearer client-key"
        answer = {"choices": [{"message": {"content": f"heard {body['messages'][0]['content']}"}}]}
        self._send(200, answer) if known else self._send(401, {"error": "no key"})

    def _send(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@needs_helm
@pytest.mark.parametrize(
    ("key", "code", "said"),
    [
        pytest.param("client-key", 0, "heard Answer with the word yes.", id="answered"),
        pytest.param("another", 1, "saw 401", id="refused"),
    ],
)
def test_the_charts_test_waits_for_the_gateway_and_shows_its_answer(
    key: str, code: int, said: str, tmp_path: Path
) -> None:
    (pod,) = of_kind(rendered(DOMAIN, "full"), "Pod")
    script, address, *rest, keys = pod["spec"]["containers"][0]["args"]
    assert (address, keys) == ("http://desk-gateway", "/etc/cowest/client-keys")
    (tmp_path / "first").write_text(key + "\n")
    Gateway.looks = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-P", "-c", script, url, *rest, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert (done.returncode, Gateway.looks) == (code, 2), done.stderr
    assert said in done.stdout + done.stderr
