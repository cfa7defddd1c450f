"""The operator lives with exactly the rights that its chart gives it, and uses each of them.

It runs as the chart's ServiceAccount; the API server's audit log says what was asked and what was refused. With
COWEST_AUDIT_LOGS (files of real clusters, apart by colons) what their operators did counts too, and the rights that
only a real cluster uses must then be used there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apiserver.conftest import JOBS, ApiServer
from tests.apiserver.playground import (
    CHILDREN,
    MAPS,
    NAMESPACE,
    SERVING,
    WORKFLOWS,
    Playground,
    apply,
    decisions,
    manifest_of,
)
from tests.contracts.test_charts import HELM, OPERATOR, needs_helm

Right = tuple[str, str, str]  # (API group, resource, verb)
SYSTEM, ACCOUNT = "cowest-system", "cowest-operator"
USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PLACES = {
    "ClusterRole": f"{RBAC}/clusterroles",
    "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
    "Role": f"{RBAC}/namespaces/{{namespace}}/roles",
    "RoleBinding": f"{RBAC}/namespaces/{{namespace}}/rolebindings",
}
# Of a job's own accounts, beside the operator's: who uses it where no kubelet runs pods?
ONLY_ON_A_CLUSTER: Mapping[Right, str] = {
    ("argoproj.io", "workflowtaskresults", "create"): "Argo's executor reports from within a step's pod",
    ("argoproj.io", "workflowtaskresults", "patch"): "Argo's executor reports from within a step's pod",
}


# ---------------------------------------------------------------- the chart's rights
def rendered(*sets: str) -> list[dict[str, Any]]:
    more = [word for text in sets for word in ("--set", text)]
    command = [str(HELM), "template", ACCOUNT, str(OPERATOR), "--namespace", SYSTEM, "--kube-version", "1.34.0", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def rights(rules: list[dict[str, Any]]) -> set[Right]:
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


@dataclass
class Chart:
    """The operator's account on an API server."""

    server: ApiServer
    objects: list[dict[str, Any]]

    @property
    def granted(self) -> set[Right]:
        return set().union(*(rights(each["rules"]) for each in self.objects if each["kind"] in ("Role", "ClusterRole")))

    def install(self) -> None:
        for each in self.objects:
            if each["kind"] in PLACES:
                status, answer = self.server.request("POST", self._place(each), each)
                assert status == 201, answer

    def remove(self) -> None:
        for each in self.objects:
            if each["kind"] in PLACES:
                self.server.request("DELETE", f"{self._place(each)}/{each['metadata']['name']}")

    def _place(self, each: Mapping[str, Any]) -> str:
        return PLACES[each["kind"]].format(namespace=each["metadata"].get("namespace"))

    def environment(self) -> dict[str, str]:
        """What the Deployment tells the operator."""
        (deployment,) = (each for each in self.objects if each["kind"] == "Deployment")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        told = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        return {**told, "POD_NAMESPACE": SYSTEM, "COWEST_METRICS_PORT": "0", "COWEST_HEALTH_PORT": "0"}


@pytest.fixture(scope="module")
def token(cluster: ApiServer) -> str:
    for path, name in (("/api/v1/namespaces", SYSTEM), (f"/api/v1/namespaces/{SYSTEM}/serviceaccounts", ACCOUNT)):
        status, answer = cluster.request("POST", path, {"metadata": {"name": name}})
        assert status == 201, answer
    return token_of(cluster, SYSTEM, ACCOUNT)


def token_of(server: ApiServer, namespace: str, account: str) -> str:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    status, answer = server.request("POST", path, {"spec": {"expirationSeconds": 3600}})
    assert status == 201, answer
    return str(answer["status"]["token"])


@pytest.fixture
def as_operator(playground: Playground, token: str, request: pytest.FixtureRequest) -> Iterator[Chart]:
    """The chart's account; operators of this playground run as it, told what the chart tells them."""
    chart = Chart(playground.server, rendered(*getattr(request, "param", ())))
    chart.install()
    playground.kubeconfig.write_text(json.dumps(playground.server.kubeconfig(token=token)))
    playground.told = chart.environment()
    yield chart
    chart.remove()


# ---------------------------------------------------------------- the audit log
@dataclass(frozen=True)
class Asked:
    """One request of the audit log."""

    user: str
    right: Right
    code: int
    path: str


def asked(log: Path) -> Iterator[Asked]:
    for line in log.read_text("utf-8").splitlines():
        event = json.loads(line)
        target, code = event.get("objectRef"), int((event.get("responseStatus") or {}).get("code") or 0)
        if target is None or event.get("stage") not in ("ResponseComplete", "ResponseStarted"):
            continue
        resource = "/".join(part for part in (target.get("resource"), target.get("subresource")) if part)
        yield Asked(
            event["user"]["username"], (target.get("apiGroup", ""), resource, event["verb"]), code, event["requestURI"]
        )


def used(requests: list[Asked]) -> set[Right]:
    """An apply that makes an object is asked of the log as `patch`, and of the roles as `create` too."""
    made = {(each.right[0], each.right[1], "create") for each in requests if each.code == 201}
    return {each.right for each in requests if each.code != 403} | made


def refused(requests: list[Asked]) -> list[tuple[str, str, str, str]]:
    return sorted({(*each.right, each.path) for each in requests if each.code == 403})


def of_clusters() -> list[Asked]:
    logs = [Path(name) for name in os.environ.get("COWEST_AUDIT_LOGS", "").split(":") if name]
    return [each for log in logs for each in asked(log)]


# ---------------------------------------------------------------- a life in which everything happens
BUSY_LIFE: Mapping[str, Any] = {
    "collaboration.promptsConfigMapRef": {"name": "prompts"},
    "gateway": {"replicas": 2, "maxReplicas": 3, "ingress": {"host": "answers.example.com"}},
    "deletionPolicy": {"models": "Delete"},
}
PROMPTS = {"draft": "Explain: {query}", "refine": "{query} {draft}", "solo": "{query}"}


def wake(playground: Playground) -> None:
    note = {"metadata": {"annotations": {"looked-at": os.urandom(4).hex()}}}
    playground.server.request("PATCH", f"{JOBS}/claims", note)


def wait_waking(playground: Playground, gone: str, path: str) -> None:
    def is_gone() -> bool:
        wake(playground)
        return playground.get(path) is None

    playground.wait(is_gone, gone, 60)


def leftovers(playground: Playground) -> list[str]:
    """Paths of children that an older operator made and that this one does not want."""
    job = playground.job("claims")
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": "claims", "uid": job["metadata"]["uid"],
             "controller": True}  # fmt: skip
    metadata = {"name": "claims-old", "labels": {"cowest.dev/job": "claims"}, "ownerReferences": [owner]}
    group = "rbac.authorization.k8s.io"
    bodies: dict[str, Any] = {
        "services": {"spec": {"ports": [{"port": 80}]}},
        "serviceaccounts": {},
        "roles": {"rules": []},
        "rolebindings": {"roleRef": {"apiGroup": group, "kind": "Role", "name": "claims-old"}},
    }
    paths = {path.rsplit("/", 1)[1]: path for path in CHILDREN}
    for plural, body in bodies.items():
        status, answer = playground.server.request("POST", paths[plural], {"metadata": metadata, **body})
        assert status == 201, answer
    return [f"{paths[plural]}/claims-old" for plural in bodies]


def live(playground: Playground) -> None:
    """Baseline, an edit in the middle of a round, a tuned round, edits of everything optional, and a farewell."""
    playground.server.request("POST", MAPS, {"metadata": {"name": "prompts"}, "data": PROMPTS})
    apply(playground, manifest_of("claims", **BUSY_LIFE))
    playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
    (old,) = (each["metadata"]["name"] for each in playground.items(SERVING))
    playground.script.argo_works = False
    playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-r1-collect") is not None, "the round")
    edit = {
        "strong": {"model": "stronger"},
        "training": {"resources": {"requests": {"cpu": "1"}}},
        "gateway": {"replicas": 1, "maxReplicas": None, "ingress": None},
    }
    playground.server.request("PATCH", f"{JOBS}/claims", {"spec": edit})
    playground.wait(lambda: playground.get(f"{WORKFLOWS}/claims-r1-collect") is None, "the round's step to be ended")
    playground.script.argo_works = True
    playground.wait(lambda: len(decisions(playground, "claims")) == 4, "the edit and a tuned round", 120)
    for path in leftovers(playground):
        wait_waking(playground, f"{path} to go", path)
    wait_waking(playground, "the old model to go", f"{SERVING}/{old}")
    playground.server.request("DELETE", f"{JOBS}/claims")
    playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the farewell", 60)


@needs_helm
@pytest.mark.parametrize("as_operator", [("rayservice.enabled=false",)], indirect=True, ids=["without KubeRay"])
def test_each_right_of_the_chart_is_used_and_none_is_missing(playground: Playground, as_operator: Chart) -> None:
    with playground.operator():
        live(playground)
        granted_on = set().union(*(rights(each["rules"]) for each in playground.items(children("roles"))))
    here = [each for each in asked(playground.server.audit_log) if each.user == USER]
    elsewhere = [each for each in of_clusters() if each.user.endswith(f":{ACCOUNT}")]
    assert refused([*here, *elsewhere]) == []
    # A Role for a job's own accounts may hold nothing that its maker has not.
    unused = as_operator.granted - used(here) - used(elsewhere) - granted_on
    assert not unused, f"granted, and not needed: {sorted(unused)}"


def children(plural: str) -> str:
    return next(path for path in CHILDREN if path.endswith(f"/{plural}"))


@needs_helm
@pytest.mark.parametrize("as_operator", [(f"watchNamespaces={{{NAMESPACE}}}",)], indirect=True, ids=["one namespace"])
def test_with_named_namespaces_nothing_is_missing(playground: Playground, as_operator: Chart) -> None:
    assert {each["metadata"].get("namespace") for each in as_operator.objects if each["kind"] == "Role"} == {
        SYSTEM,
        NAMESPACE,
    }
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
    here = [each for each in asked(playground.server.audit_log) if each.user == USER]
    assert here
    assert refused(here) == []
    assert {("", "namespaces", "list"), ("", "namespaces", "watch")} <= used(here), "granted, and not needed"


def test_what_a_jobs_own_accounts_may_do_is_used(playground: Playground) -> None:
    """The gateway's sidecar here, Argo's executor on a cluster."""
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: playground.condition("claims", "Ready").get("status") == "True", "Ready")
        roles = {each["metadata"]["name"]: rights(each["rules"]) for each in playground.items(children("roles"))}
    assert set(roles) == {"claims-gateway", "claims-steps"}
    assert roles["claims-steps"] == set(ONLY_ON_A_CLUSTER)
    if clusters := of_clusters():
        by_steps = [each for each in clusters if each.user.endswith("-steps")]
        assert set(ONLY_ON_A_CLUSTER) <= used(by_steps), "what only a cluster uses was not used there either"
        assert [each for each in by_steps if each.code == 403] == []
    assert roles["claims-gateway"] == {("", "configmaps", verb) for verb in ("get", "list", "watch")}
