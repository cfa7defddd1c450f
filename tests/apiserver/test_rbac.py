"""The operator lives with exactly the rights that its chart gives it, and uses each of them.

It runs as the chart's ServiceAccount, here as in all tests of this folder, none of which may end with a refusal; the
API server's audit log says what was asked. With COWEST_AUDIT_LOGS (files of real clusters, apart by colons; `make e2e`
and `make e2e-faults` leave one each) what their operators did counts too, and the rights that only a real cluster uses
must be used there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cowest_operator.objects.steps import ENDED_ANNOTATION
from tests.apiserver.conftest import JOBS
from tests.apiserver.playground import (
    CHILDREN,
    DEPLOYMENTS,
    MAPS,
    NAMESPACE,
    SERVING,
    WORKFLOWS,
    Playground,
    apply,
    decisions,
    manifest_of,
)
from tests.apiserver.rights import Chart, Right, of_clusters, of_operators, refused, rights, used
from tests.apiserver.test_platform import RAY, RAY_SERVICES, engine, installed
from tests.contracts.test_charts import OPERATOR, ROOT, needs_helm

SYSTEM = "cowest-system"
FIRST = ROOT / "tests" / "charts-first" / "cowest-operator-0.1.0.tgz"
# Of a job's own accounts, beside the operator's: who uses it where no kubelet runs pods?
ONLY_ON_A_CLUSTER: Mapping[Right, str] = {
    ("argoproj.io", "workflowtaskresults", "create"): "Argo's executor reports from within a step's pod",
    ("argoproj.io", "workflowtaskresults", "patch"): "Argo's executor reports from within a step's pod",
}


@pytest.fixture
def as_operator(playground: Playground, request: pytest.FixtureRequest) -> Iterator[Chart]:
    """A chart of its own values, or an older one: operators of this playground are its account, told what it says."""
    told = getattr(request, "param", ())
    sets, path = ((), told) if isinstance(told, Path) else (told, OPERATOR)
    chart = Chart.rendered(playground.server, SYSTEM, *sets, chart=path)
    playground.token = chart.install()
    playground.lead(playground.server.kubeconfig())
    playground.told = chart.environment()
    yield chart
    chart.remove()


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


def go_by_ray(playground: Playground) -> None:
    """The gateway becomes a RayService, and a Deployment again before that one has answered."""
    service = f"{RAY_SERVICES}/claims-ray"
    engine(playground, "RayServe")
    playground.wait(lambda: playground.get(service) is not None, "the RayService")
    engine(playground, "ASGI")
    wait_waking(playground, "the RayService to go", service)


def live(playground: Playground) -> None:
    """Baseline, an edit in the middle of a round, a tuned round, edits of everything optional, Ray, and a farewell."""
    playground.server.request("POST", MAPS, {"metadata": {"name": "prompts"}, "data": PROMPTS})
    apply(playground, manifest_of("claims", **BUSY_LIFE))
    playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
    (old,) = (each["metadata"]["name"] for each in playground.items(SERVING))
    playground.script.argo_works = False
    step = f"{WORKFLOWS}/claims-r1-collect"
    playground.wait(lambda: playground.get(step) is not None, "the round")
    playground.server.request("PATCH", step, {"status": {"phase": "Running"}})
    playground.end_pod_of("claims-r1-collect", 0)
    playground.wait(
        lambda: ENDED_ANNOTATION in annotations_of(playground.get(step)), "Argo to be told of its pods' end"
    )
    edit = {
        "strong": {"model": "stronger"},
        "training": {"resources": {"requests": {"cpu": "1"}}},
        "gateway": {"replicas": 1, "maxReplicas": None, "ingress": None},
    }
    playground.server.request("PATCH", f"{JOBS}/claims", {"spec": edit})
    playground.wait(lambda: playground.get(step) is None, "the round's step to be ended")
    playground.script.argo_works = True
    playground.wait(lambda: len(decisions(playground, "claims")) == 4, "the edit and a tuned round", 120)
    for path in leftovers(playground):
        wait_waking(playground, f"{path} to go", path)
    wait_waking(playground, "the old model to go", f"{SERVING}/{old}")
    go_by_ray(playground)
    playground.server.request("DELETE", f"{JOBS}/claims")
    playground.wait(lambda: playground.get(f"{JOBS}/claims") is None, "the farewell", 60)


def annotations_of(found: Mapping[str, Any] | None) -> Mapping[str, str]:
    return (found or {"metadata": {}})["metadata"].get("annotations") or {}


@needs_helm
def test_each_right_of_the_chart_is_used_and_none_is_missing(playground: Playground, as_operator: Chart) -> None:
    with installed(playground.server, RAY), playground.operator():
        live(playground)
        granted_on = set().union(*(rights(each["rules"]) for each in playground.items(children("roles"))))
    here, elsewhere = as_operator.asked(), of_operators(of_clusters())
    assert here
    assert refused([*here, *elsewhere]) == []
    # A Role for a job's own accounts may hold nothing that its maker has not.
    unused = as_operator.granted - used(here) - used(elsewhere) - granted_on
    assert not unused, f"granted, and not needed: {sorted(unused)}"


def children(plural: str) -> str:
    return next(path for path in CHILDREN if path.endswith(f"/{plural}"))


@needs_helm
@pytest.mark.parametrize(
    "as_operator",
    [(f"watchNamespaces={{{NAMESPACE}}}", "rayservice.enabled=false")],
    indirect=True,
    ids=["one namespace, without KubeRay"],
)
def test_with_named_namespaces_nothing_is_missing(playground: Playground, as_operator: Chart) -> None:
    assert {each["metadata"].get("namespace") for each in as_operator.objects if each["kind"] == "Role"} == {
        SYSTEM,
        NAMESPACE,
    }
    with playground.operator():
        apply(playground, manifest_of("claims"))
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
    here = as_operator.asked()
    assert here
    assert refused(here) == []
    assert {("", "namespaces", "list"), ("", "namespaces", "watch")} <= used(here), "granted, and not needed"


@needs_helm
@pytest.mark.parametrize("as_operator", [FIRST], indirect=True, ids=["of the first chart"])
def test_roles_that_know_no_rayservices_hold_up_no_job_and_one_that_wants_them_is_told(
    playground: Playground, as_operator: Chart
) -> None:
    """Today's operator as an older chart starts it: with its roles, and without a word of RayServices."""
    assert not any(resource == "rayservices" for _, resource, _ in as_operator.granted)
    with installed(playground.server, RAY), playground.operator():
        apply(playground, manifest_of("claims", gateway={"engine": "RayServe"}))
        playground.wait(lambda: playground.condition("claims", "Degraded").get("reason") == "RightMissing", "a word")
        assert "Upgrade the chart cowest-operator" in playground.condition("claims", "Degraded")["message"]
        playground.wait(lambda: len(decisions(playground, "claims")) == 1, "the baseline", 120)
        assert playground.condition("claims", "Ready")["status"] == "True"
        assert playground.get(f"{DEPLOYMENTS}/claims-gateway") is not None
        assert playground.items(RAY_SERVICES) == []
    assert refused(as_operator.asked()) == []
    assert "no right to list rayservices.ray.io in all namespaces" in playground.log()


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
        assert refused(by_steps) == []
    assert roles["claims-gateway"] == {("", "configmaps", verb) for verb in ("get", "list", "watch")}
