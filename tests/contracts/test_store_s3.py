"""Store, step outputs and traces against real S3 servers, each a process: MinIO and SeaweedFS.

MinIO's binary is `minio` on PATH, or COWEST_TEST_MINIO; SeaweedFS comes with the development packages. Without a binary
its tests are reported as not run.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import ClassVar
from urllib.request import urlopen

import pytest
from minio import Minio

from cowest_serving import store
from cowest_serving.contract import TRACE_COLUMNS
from cowest_serving.model_files import resolve_model
from cowest_serving.store import StoreError
from cowest_serving.traces import TraceWriter, read_traces
from cowest_training import steps
from cowest_training.contract import Manifest
from cowest_training.data import read_rows
from tests.ports import free_port
from tests.unit.test_store import rotate

ACCESS, SECRET = "cowest-test", "cowest-test-secret"
MINIO = os.environ.get("COWEST_TEST_MINIO") or shutil.which("minio")
WEED = os.environ.get("COWEST_TEST_SEAWEEDFS") or shutil.which("weed", path=str(Path(sys.executable).parent))


@dataclass(frozen=True)
class Server:
    """A command, where it says that it is ready, and what it is told by its environment."""

    command: list[str]
    ready: str
    environment: dict[str, str]


def minio(folder: Path, address: str) -> Server:
    keys = {"MINIO_ROOT_USER": ACCESS, "MINIO_ROOT_PASSWORD": SECRET}
    command = [str(MINIO), "server", "--quiet", "--address", address, str(folder / "data")]
    return Server(command, "/minio/health/ready", keys)


def seaweedfs(folder: Path, address: str) -> Server:
    """Master, volumes, filer and S3 in one process."""
    (folder / "data").mkdir()
    person = {"name": "test", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [person]}))
    parts = ("master.port", "volume.port", "filer.port")
    ports = [f"-{part}={free_port()}" for name in parts for part in (name, f"{name}.grpc")]
    command = [str(WEED), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
               f"-s3.config={folder / 's3.json'}", f"-s3.port={address.rpartition(':')[2]}",
               f"-s3.port.grpc={free_port()}", *ports, f"-filer.localSocket={folder / 'filer'}",
               "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=20"]  # fmt: skip
    return Server(command, "/healthz", {"HOME": str(folder)})


def needs(binary: str | None, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not binary, reason=f"no {what}")


SERVERS = [
    pytest.param(minio, id="MinIO", marks=needs(MINIO, "minio binary: put it on PATH or name it in COWEST_TEST_MINIO")),
    pytest.param(seaweedfs, id="SeaweedFS", marks=needs(WEED, "weed binary: `make setup` brings it")),
]


@pytest.fixture(scope="module", params=SERVERS)
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address, folder = f"127.0.0.1:{free_port()}", tmp_path_factory.mktemp("store")
    server = request.param(folder, address)
    log = (folder / "log").open("wb")
    with subprocess.Popen(server.command, env={**os.environ, **server.environment}, stdout=log, stderr=log) as running:
        try:
            end = time.monotonic() + 60
            while not is_up(f"http://{address}{server.ready}"):
                assert running.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)
            Minio(address, ACCESS, SECRET, secure=False).make_bucket("models")
            yield f"http://{address}"
        finally:
            running.kill()
            log.close()


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(autouse=True)
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_S3_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "cowest-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "cowest-test-secret")
    monkeypatch.setenv("COWEST_S3_PATH_STYLE", "true")


def test_what_was_put_is_there_listed_and_gone_after_delete() -> None:
    uri = "s3://models/a job/round 1/x.bin"
    assert not store.exists(uri)
    assert store.list_files("s3://models/a job") == []
    store.put(uri, b"one")
    store.put(uri, b"two")
    store.put("s3://models/a job-not/y", b"")
    assert store.get(uri) == b"two"
    assert store.exists(uri) and store.exists("s3://models/a job/") and not store.exists("s3://models/a jo")
    assert store.list_files("s3://models/a job") == store.list_files(uri) == [uri]
    store.delete("s3://models/a job")
    store.delete("s3://models/a job")
    assert store.list_files("s3://models/a job") == []
    assert store.exists("s3://models/a job-not/y")


def test_a_folder_goes_up_and_comes_down_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(os.urandom(12_000_000))  # more than one part
    (source / "manifest.json").write_text("{}")
    store.upload(source, "s3://models/up")
    assert store.list_files("s3://models/up") == ["s3://models/up/manifest.json", "s3://models/up/sub/weights"]
    folder = store.download("s3://models/up", tmp_path / "down")
    assert (folder / "sub" / "weights").read_bytes() == (source / "sub" / "weights").read_bytes()
    assert sorted(path.name for path in folder.rglob("*")) == ["manifest.json", "sub", "weights"]
    alone = store.download("s3://models/up/manifest.json", tmp_path / "alone")
    assert alone.read_text() == "{}"


def test_a_model_in_s3_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_CACHE", str(tmp_path / "cache"))
    store.put("s3://models/weak/config.json", b"{}")
    first = resolve_model("s3://models/weak")
    assert resolve_model("s3://models/weak") == first
    store.put("s3://models/weak/config.json", b'{"changed": true}')
    second = resolve_model("s3://models/weak")
    assert second != first
    assert (second / "config.json").read_bytes() == b'{"changed": true}'
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2


@pytest.mark.parametrize("uri", ["s3://models/none", "s3://no-such-bucket/key"], ids=["no key", "no bucket"])
def test_what_is_not_there_is_not_worth_a_retry(uri: str, tmp_path: Path) -> None:
    for use in (store.get, lambda u: store.download(u, tmp_path)):
        with pytest.raises(StoreError, match="check bucket") as caught:
            use(uri)
        assert not caught.value.retryable


def test_a_wrong_key_is_said_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY") as caught:
        store.get("s3://models/weak/config.json")
    assert not caught.value.retryable and "wrong-secret" not in str(caught.value)


def test_rotated_keys_are_taken_up_by_a_process_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("s3://models/rotated", b"here")
    monkeypatch.setenv("COWEST_S3_KEYS_FOLDER", str(tmp_path))
    rotate(tmp_path, "1", AWS_ACCESS_KEY_ID="cowest-test", AWS_SECRET_ACCESS_KEY="of yesterday")
    with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY") as caught:
        store.get("s3://models/rotated")
    assert caught.value.retryable, "the new ones are on their way"
    rotate(tmp_path, "2", AWS_ACCESS_KEY_ID="cowest-test", AWS_SECRET_ACCESS_KEY="cowest-test-secret")
    assert store.get("s3://models/rotated") == b"here"


class ForwardProxy(http.server.BaseHTTPRequestHandler):
    """Knows one host, `store.test`, and notes what it was asked for."""

    asked: ClassVar[list[tuple[str, str, str | None]]] = []
    upstream: ClassVar[str]

    def do_CONNECT(self) -> None:
        self.asked.append((self.command, self.path, self.headers["Proxy-Authorization"]))
        self.send_error(502)

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers["Proxy-Authorization"]))
        connection = HTTPConnection(self.upstream, timeout=10)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        kept = {name: value for name, value in self.headers.items() if not name.startswith("Proxy-")}
        connection.request(self.command, self.path.removeprefix("http://store.test:9000"), body, kept)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name in ("Content-Type", "ETag", "Last-Modified"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", answer.headers["Content-Length"] or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    ForwardProxy.upstream, ForwardProxy.asked = endpoint.removeprefix("http://"), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ForwardProxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        for name, value in {"http": address, "https": f"http://us%40er:word@{address}", "no": ".svc"}.items():
            monkeypatch.setenv(f"{name}_proxy", value)
        yield address
        server.shutdown()


def test_a_store_outside_is_reached_through_the_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_S3_ENDPOINT", "http://store.test:9000")
    store.put("s3://models/by proxy", b"out and in")
    assert store.get("s3://models/by proxy") == b"out and in"
    assert ("PUT", "http://store.test:9000/models/by%20proxy", None) in ForwardProxy.asked


def test_over_tls_the_proxy_only_passes_on_and_is_told_who_asks(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_S3_ENDPOINT", "https://store.test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StoreError, match="COWEST_S3_ENDPOINT") as caught:
        store.get("s3://models/x")
    assert caught.value.retryable
    assert set(ForwardProxy.asked) == {("CONNECT", "store.test:443", f"Basic {b64encode(b'us@er:word').decode()}")}


def test_a_store_on_this_machine_is_reached_without_the_proxy(proxy: str) -> None:
    store.put("s3://models/direct", b"")
    assert ForwardProxy.asked == []


def test_a_key_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="leads out of it"):
        store._inside(tmp_path, "../evil")


def test_a_steps_output_exists_only_with_its_manifest_and_is_made_once() -> None:
    uri = "s3://models/job/runs/r1/collect"
    output = steps.open_output(uri, step="collect", inputs={"seed": 1})
    assert not isinstance(output, Manifest)
    (output.folder / "dataset.jsonl").write_text("{}\n")
    assert steps.read_manifest(uri) is None
    written = output.finish(kind="Dataset", metrics={"rows": 1})
    assert steps.read_manifest(uri) == written
    assert isinstance(steps.open_output(uri, step="collect", inputs={"seed": 1}), Manifest)
    assert not isinstance(steps.open_output(uri, step="collect", inputs={"seed": 2}), Manifest)


async def test_traces_are_written_in_segments_and_read_back() -> None:
    writer = TraceWriter("s3://models/desk", "test")
    await writer.start()
    row = dict.fromkeys(TRACE_COLUMNS) | {"trace_id": "t1", "time": datetime.now(UTC), "query": "q", "status": "ok"}
    assert writer.add(row)
    await writer.aclose()
    assert read_traces("s3://models/desk")["trace_id"].to_pylist() == ["t1"]


def test_upload_is_checked_resumed_and_readable_by_the_steps(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"id": "{i}", "query": "q {i}", "reference": "r"}}\n' for i in range(3)))
    command = [
        sys.executable,
        "-P",
        "-m",
        "cowest_cli",
        "upload",
        str(data),
        "s3://models/data/train.jsonl",
        "-o",
        "json",
    ]
    first, second = (json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(2))
    assert (first["sent"], second["sent"]) == (1, 0)
    assert [row.id for row in read_rows("s3://models/data/train.jsonl")] == ["0", "1", "2"]
    data.write_text("no row\n")
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "train.jsonl:1" in refused.stderr
