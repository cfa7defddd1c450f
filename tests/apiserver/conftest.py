"""A real API server for tests: etcd and kube-apiserver as child processes on free loopback ports, gone afterwards.

The binaries are looked for in KUBEBUILDER_ASSETS, on PATH and in ~/.cache/cowest-cluster/bin; without them the tests
are skipped and say so. Nothing outside a temporary folder is touched, and no kubeconfig of the person is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cowest_operator import manifest
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.apiserver.playground import Playground  # at run time it imports this module

START_SECONDS = 90.0
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
JOBS = "/apis/cowest.dev/v1alpha1/namespaces/default/collaborationjobs"
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}
MOST_WORKERS = 6  # each has an etcd and a kube-apiserver: half a gigabyte
CACHE = Path.home() / ".cache" / "cowest-cluster" / "bin"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than there are processors, because these tests wait for most of their time."""
    return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)


@dataclass(frozen=True)
class ApiServer:
    """Address and credentials of the running API server."""

    url: str
    token: str
    ca_file: Path
    audit_log: Path  # one JSON line for each request of a service account

    def request(self, method: str, path: str, body: Any = None, *, accept: str = "application/json") -> tuple[int, Any]:
        """(HTTP status, decoded answer); an API error is an answer, not an exception."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind, "Accept": accept},
        )
        context = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with urllib.request.urlopen(request, context=context, timeout=60) as answer:
                return answer.status, _decoded(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error.read())

    def kubeconfig(self, url: str | None = None, token: str | None = None) -> dict[str, Any]:
        """For clients that want a kubeconfig; its context is named so that no test can take it for a real cluster.

        `url` leads to the server by a way of the test's own, `token` is somebody else's than the tester's.
        """
        name = "cowest-test"
        cluster = {"server": url} if url else {"server": self.url, "certificate-authority": str(self.ca_file)}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token or self.token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Until `condition` holds; fails with `what` when it was asked after the deadline and does not."""
    deadline = time.monotonic() + seconds
    while True:
        is_late = time.monotonic() > deadline
        if condition():
            return
        if is_late:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def find_binary(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folders = ([Path(assets)] if assets else []) + [CACHE]
    on_path = shutil.which(name)
    found = [folder / name for folder in folders if os.access(folder / name, os.X_OK)]
    return found[0] if found else Path(on_path) if on_path else None


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One API server for the whole test run; where workers share the run, one for each of them."""
    etcd, kube_apiserver = find_binary("etcd"), find_binary("kube-apiserver")
    if etcd is None or kube_apiserver is None:
        missing = "etcd" if etcd is None else "kube-apiserver"
        pytest.skip(f"no {missing} in KUBEBUILDER_ASSETS, on PATH or in {CACHE}: the API server's view is not tested")
    folder = tmp_path_factory.mktemp("apiserver")
    with contextlib.ExitStack() as stack:
        etcd_url = stack.enter_context(_etcd(etcd, folder))
        yield stack.enter_context(_kube_apiserver(kube_apiserver, etcd_url, folder))


@pytest.fixture(scope="session")
def server(api_server: ApiServer) -> ApiServer:
    """The API server once it serves our CRD."""
    status, answer = api_server.request("POST", CRDS, manifest.crd())
    assert status == 201, answer
    wait_until(lambda: api_server.request("GET", JOBS)[0] == 200, "the API server to serve CollaborationJobs")
    return api_server


@pytest.fixture(scope="session")
def cluster(server: ApiServer) -> ApiServer:
    """The API server with the kinds of KServe and Argo, and a place for operators."""
    from tests.apiserver import playground

    for each in playground.FOREIGN:
        playground.install(server, each)
    status, answer = server.request("POST", "/api/v1/namespaces", {"metadata": {"name": playground.OPERATORS}})
    assert status == 201, answer
    return server


@pytest.fixture(scope="session")
def account(cluster: ApiServer) -> str | None:
    """A token of the account that the chart makes for the operator; without Helm operators are the tester."""
    from tests.apiserver import playground, rights

    return rights.Chart.rendered(cluster, playground.OPERATORS).install() if rights.HELM else None


@pytest.fixture
def playground(cluster: ApiServer, account: str | None, tmp_path: Path) -> Iterator[Playground]:
    """Emptied after each test: no garbage collector runs beside this API server. No operator is refused anything."""
    from tests.apiserver import playground, rights

    log = cluster.audit_log
    seen = log.stat().st_size if log.exists() else 0
    with playground.Playground(cluster, tmp_path, account) as built:
        yield built
    built.empty()
    refused = rights.refused(rights.of_operators(rights.asked(log, seen)))
    assert refused == [], "the chart does not grant what the operator asked for"


@contextlib.contextmanager
def _etcd(binary: Path, folder: Path) -> Iterator[str]:
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = [
        str(binary), "--data-dir", str(folder / "etcd"), "--listen-client-urls", client,
        "--advertise-client-urls", client,
        "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        "--unsafe-no-fsync", "--log-level", "warn",
    ]  # fmt: skip
    with _process(command, folder / "etcd.log") as process:
        wait_until(lambda: _alive(process, folder / "etcd.log") and _answers(client + "/health"), "etcd to be healthy")
        yield client


@contextlib.contextmanager
def _kube_apiserver(binary: Path, etcd_url: str, folder: Path) -> Iterator[ApiServer]:
    port, certs, token = free_port(), folder / "certs", secrets.token_hex(16)
    certs.mkdir()
    (folder / "tokens.csv").write_text(f'{token},tester,tester,"system:masters"\n')
    _write_key(folder / "service-account.key")
    (folder / "audit-policy.json").write_text(json.dumps(AUDIT_POLICY))
    command = [
        str(binary), "--etcd-servers", etcd_url, "--cert-dir", str(certs), "--bind-address", "127.0.0.1",
        "--advertise-address", "127.0.0.1", "--secure-port", str(port), "--token-auth-file", str(folder / "tokens.csv"),
        "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.0.0.0/24", "--allow-privileged",
        "--disable-admission-plugins", "ServiceAccount",
        "--service-account-issuer", "https://kubernetes.default.svc",
        "--service-account-key-file", str(folder / "service-account.key"),
        "--service-account-signing-key-file", str(folder / "service-account.key"),
        "--audit-policy-file", str(folder / "audit-policy.json"), "--audit-log-path", str(folder / "audit.log"),
    ]  # fmt: skip
    log = folder / "kube-apiserver.log"
    server = ApiServer(f"https://127.0.0.1:{port}", token, certs / "apiserver.crt", folder / "audit.log")
    with _process(command, log) as process:
        wait_until(lambda: _alive(process, log) and _ready(server), "kube-apiserver to be ready")
        yield server


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is stopped whatever happens; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _alive(process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        pytest.fail(f"{process.args!r} ended with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    return True


def _ready(server: ApiServer) -> bool:
    if not server.ca_file.exists():  # the server makes its certificate as it starts
        return False
    try:
        return (
            server.request("GET", "/readyz")[0] == 200 and server.request("GET", "/api/v1/namespaces/default")[0] == 200
        )
    except (OSError, ssl.SSLError):
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _write_key(path: Path) -> None:
    """The private key that service-account tokens would be signed with; the server does not start without one."""
    subprocess.run(["openssl", "genrsa", "-out", str(path), "2048"], check=True, capture_output=True)


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
