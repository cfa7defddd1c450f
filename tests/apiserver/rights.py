"""The account that the chart gives an operator, and what an API server's audit log says of it.

Every operator of these tests acts as that account, and each test ends with a look whether it was refused something.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.apiserver.conftest import ApiServer
from tests.contracts.test_charts import HELM, OPERATOR

Right = tuple[str, str, str]  # (API group, resource, verb)
ACCOUNT = "cowest-operator"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PLACES = {
    "ClusterRole": f"{RBAC}/clusterroles",
    "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
    "Role": f"{RBAC}/namespaces/{{namespace}}/roles",
    "RoleBinding": f"{RBAC}/namespaces/{{namespace}}/rolebindings",
}


# ---------------------------------------------------------------- the chart's rights
def rights(rules: list[dict[str, Any]]) -> set[Right]:
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


@dataclass
class Chart:
    """The operator's account on an API server, installed in a namespace."""

    server: ApiServer
    namespace: str
    objects: list[dict[str, Any]]
    since: int = 0  # where the audit log ended when the account was installed

    @classmethod
    def rendered(cls, server: ApiServer, namespace: str, *sets: str, chart: Path = OPERATOR) -> Chart:
        more = [word for text in sets for word in ("--set", text)]
        command = [str(HELM), "template", ACCOUNT, str(chart), "--namespace", namespace, "--kube-version", "1.34.0"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return cls(server, namespace, [each for each in yaml.safe_load_all(done.stdout) if each])

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{ACCOUNT}"

    @property
    def granted(self) -> set[Right]:
        return set().union(*(rights(each["rules"]) for each in self.objects if each["kind"] in ("Role", "ClusterRole")))

    def install(self) -> str:
        """A token of the account."""
        self.since = log.stat().st_size if (log := self.server.audit_log).exists() else 0
        place = f"/api/v1/namespaces/{self.namespace}/serviceaccounts"
        for path, name in (("/api/v1/namespaces", self.namespace), (place, ACCOUNT)):
            status, answer = self.server.request("POST", path, {"metadata": {"name": name}})
            assert status in (201, 409), answer
        for each in self.objects:
            if each["kind"] in PLACES:
                status, answer = self.server.request("POST", self._place(each), each)
                assert status == 201, answer
        status, answer = self.server.request("POST", f"{place}/{ACCOUNT}/token", {"spec": {"expirationSeconds": 36000}})
        assert status == 201, answer
        return str(answer["status"]["token"])

    def remove(self) -> None:
        for each in self.objects:
            if each["kind"] in PLACES:
                self.server.request("DELETE", f"{self._place(each)}/{each['metadata']['name']}")

    def _place(self, each: Mapping[str, Any]) -> str:
        return PLACES[each["kind"]].format(namespace=each["metadata"].get("namespace"))

    def asked(self) -> list[Asked]:
        return [each for each in asked(self.server.audit_log, self.since) if each.user == self.user]

    def environment(self) -> dict[str, str]:
        """What the Deployment tells the operator."""
        (deployment,) = (each for each in self.objects if each["kind"] == "Deployment")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        told = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        return {**told, "POD_NAMESPACE": self.namespace, "COWEST_METRICS_PORT": "0", "COWEST_HEALTH_PORT": "0"}


# ---------------------------------------------------------------- the audit log
@dataclass(frozen=True)
class Asked:
    """One request of the audit log."""

    user: str
    right: Right
    code: int
    allowed: bool  # by the roles: a 403 may be an admission's too, as in a namespace that is being deleted
    path: str
    received: str  # when the API server had it: a time of RFC 3339


def asked(log: Path, since: int = 0) -> Iterator[Asked]:
    """What stands in the log from byte `since` on, in lines that were begun after that and are whole by now."""
    if not log.exists():
        return
    with log.open("rb") as file:
        if since:
            file.seek(since - 1)
            file.readline()
        for line in file:
            if not line.endswith(b"\n"):
                return
            event = json.loads(line)
            target, code = event.get("objectRef"), int((event.get("responseStatus") or {}).get("code") or 0)
            if target is None or event.get("stage") not in ("ResponseComplete", "ResponseStarted"):
                continue
            resource = "/".join(part for part in (target.get("resource"), target.get("subresource")) if part)
            right = (target.get("apiGroup", ""), resource, event["verb"])
            allowed = (event.get("annotations") or {}).get("authorization.k8s.io/decision") != "forbid"
            received = event.get("requestReceivedTimestamp", "")
            yield Asked(event["user"]["username"], right, code, allowed, event["requestURI"], received)


def of_operators(requests: Iterable[Asked]) -> list[Asked]:
    return [each for each in requests if each.user.endswith(f":{ACCOUNT}")]


def used(requests: Iterable[Asked]) -> set[Right]:
    """An apply that makes an object is asked of the log as `patch`, and of the roles as `create` too."""
    allowed = [each for each in requests if each.allowed]
    return {each.right for each in allowed} | {(*each.right[:2], "create") for each in allowed if each.code == 201}


def refused(requests: Iterable[Asked]) -> list[tuple[str, str, str, str]]:
    return sorted({(*each.right, each.path) for each in requests if not each.allowed})


def of_clusters() -> list[Asked]:
    logs = [Path(name) for name in os.environ.get("COWEST_AUDIT_LOGS", "").split(":") if name]
    if gone := [str(log) for log in logs if not log.is_file()]:
        raise FileNotFoundError(f"COWEST_AUDIT_LOGS: wanted audit logs apart by colons, saw no file {', '.join(gone)}")
    return [each for log in logs for each in asked(log)]
