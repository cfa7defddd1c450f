"""The routing sidecar against a real API server, with the rights that its Role gives it and no others."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import Arm, Pair, Prompts, Routing, dump
from tests.apiserver.conftest import ApiServer, wait_until

PAIR = Pair("sha256:w", "file:///w", Prompts("{query}", "{query} {draft}", "{query}"), "Answer", "http://s/v1", "s")
NAME = "desk-routing"
OF_A_WATCH = 30  # seconds, and far more than it takes: without a watch ten changes are seen 50 s after each other
RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces"


def config_map(version: int) -> dict[str, Any]:
    routing = Routing(version, "salt", (Arm("stable", 100, "Pair", PAIR, "http://w/v1"),))
    return {"metadata": {"name": NAME}, "data": {"routing.json": json.dumps(dump(routing))}}


def version_in(file: Path) -> int | None:
    return json.loads(file.read_bytes())["version"] if file.exists() else None


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """With a service account `gateway` that may do nothing yet."""
    name = f"sync-{uuid.uuid4().hex[:8]}"
    created(api_server, "/api/v1/namespaces", {"metadata": {"name": name}})
    created(api_server, f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "gateway"}})
    return name


def created(server: ApiServer, path: str, body: Any) -> Any:
    status, answer = server.request("POST", path, body)
    assert status == 201, answer
    return answer


def allow(server: ApiServer, namespace: str, *verbs: str) -> None:
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NAME], "verbs": verbs}
    created(server, f"{RBAC}/{namespace}/roles", {"metadata": {"name": "gateway"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "gateway"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "gateway"},
        "subjects": [{"kind": "ServiceAccount", "name": "gateway", "namespace": namespace}],
    }
    created(server, f"{RBAC}/{namespace}/rolebindings", binding)


@contextlib.contextmanager
def sidecar(
    server: ApiServer, namespace: str, folder: Path, account: str = "gateway", name: str = NAME
) -> Iterator[tuple[Path, Path]]:
    """The running process as the service account: the file that it keeps and its log."""
    asked = {"spec": {"expirationSeconds": 3600}}
    token = created(server, f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", asked)
    (folder / "token").write_text(token["status"]["token"])
    out, log = folder / "routing.json", folder / "log"
    flags = ["--namespace", namespace, "--configmap", name, "--out", out, "--server", server.url]
    flags += ["--token-file", folder / "token", "--ca-file", server.ca_file]
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "cowest_serving.routing_sync", *map(str, flags)]
        process = subprocess.Popen(command, stderr=stderr)
    try:
        yield out, log
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_role_for_the_one_config_map_is_enough_and_each_change_arrives_by_the_watch(
    api_server: ApiServer, namespace: str, tmp_path: Path
) -> None:
    allow(api_server, namespace, "get", "list", "watch")
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    created(api_server, maps, config_map(1))
    with sidecar(api_server, namespace, tmp_path) as (out, log):
        wait_until(lambda: version_in(out) == 1, "the first routing", 60)
        for version in range(2, 12):
            assert api_server.request("PATCH", f"{maps}/{NAME}", config_map(version))[0] == 200
            wait_until(lambda version=version: version_in(out) == version, f"routing {version}", OF_A_WATCH)
        assert api_server.request("DELETE", f"{maps}/{NAME}")[0] == 200
        wait_until(
            lambda: "is not there" in log.read_text(), "the sidecar to see that the ConfigMap is gone", OF_A_WATCH
        )
        assert version_in(out) == 11
        created(api_server, maps, config_map(12))
        wait_until(lambda: version_in(out) == 12, "the new ConfigMap", OF_A_WATCH)


def test_without_the_role_it_says_which_rights_are_missing_and_waits_for_them(
    api_server: ApiServer, namespace: str, tmp_path: Path
) -> None:
    created(api_server, f"/api/v1/namespaces/{namespace}/configmaps", config_map(1))
    with sidecar(api_server, namespace, tmp_path) as (out, log):
        wanted = f"a Role with get, list and watch on configmaps {NAME}"
        wait_until(lambda: wanted in log.read_text(), "the sidecar to name the missing rights", 60)
        assert not out.exists()
        allow(api_server, namespace, "get", "list", "watch")
        wait_until(lambda: version_in(out) == 1, "the routing after the rights are given", 60)


def test_another_config_map_of_the_namespace_can_not_be_read_with_that_role(
    api_server: ApiServer, namespace: str
) -> None:
    allow(api_server, namespace, "get", "list", "watch")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{namespace}:gateway",
            "resourceAttributes": {"namespace": namespace, "verb": "get", "resource": "configmaps"},
        },
    }
    may = {}
    for name in (NAME, "other"):
        review["spec"]["resourceAttributes"]["name"] = name  # type: ignore[index]
        answer = created(api_server, "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        may[name] = answer["status"]["allowed"]
    assert may == {NAME: True, "other": False}
