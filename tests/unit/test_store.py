"""The object store on a disk. S3 is tested against a real server in tests/contracts/test_store_s3.py."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cowest_serving import store
from cowest_serving.outward import proxy_of
from cowest_serving.store import StoreError


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://b", ("k",), "s3://b/k"),
        ("s3://b/k/", ("a/b", "c"), "s3://b/k/a/b/c"),
        ("/", ("x",), "/x"),
        ("folder", ("x",), "folder/x"),
        ("file:///a", ("b c",), "file:///a/b%20c"),
        ("s3://b/k", (), "s3://b/k"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert store.join(uri, *parts) == joined


@pytest.fixture(params=["path", "file://"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "a folder with 100 % spaces"
    return folder.as_uri() if request.param == "file://" else str(folder)


def test_what_was_put_is_there_listed_and_gone_after_delete(base: str) -> None:
    uri = store.join(base, "deep/er", "x y.txt")
    assert not store.exists(uri)
    assert store.list_files(base) == []
    store.put(uri, b"one")
    store.put(uri, b"two")
    store.put(store.join(base, "a"), b"")
    assert store.get(uri) == b"two"
    assert store.exists(uri) and store.exists(store.join(base, "deep"))
    assert store.list_files(base) == [store.join(base, "a"), uri]
    assert store.list_files(uri) == [uri]
    store.delete(store.join(base, "deep"))
    store.delete(store.join(base, "deep"))
    assert store.list_files(base) == [store.join(base, "a")]
    store.delete(store.join(base, "a"))
    assert not store.exists(base)


def test_an_upload_arrives_whole_and_a_download_of_what_is_local_copies_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "w").write_bytes(b"\0" * 3_000_000)
    (source / "manifest.json").write_text("{}")
    target = (tmp_path / "target").as_uri()
    store.upload(source, target)
    assert store.list_files(target) == [store.join(target, "manifest.json"), store.join(target, "sub/w")]
    assert store.download(target, tmp_path / "unused") == tmp_path / "target"
    assert not (tmp_path / "unused").exists()
    assert (tmp_path / "target" / "sub" / "w").read_bytes() == (source / "sub" / "w").read_bytes()
    store.upload(source / "manifest.json", str(tmp_path / "alone.json"))
    assert store.get(str(tmp_path / "alone.json")) == b"{}"
    store.upload(source, str(source))
    assert (source / "manifest.json").read_text() == "{}"


def test_the_manifest_is_uploaded_last(tmp_path: Path) -> None:
    for name in ("zeta", "manifest.json", "sub/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    order = [path.relative_to(tmp_path).as_posix() for path in store._upload_order(tmp_path)]
    assert order[-1] == "manifest.json" and len(order) == 3


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    whole = [bytes([n]) * 200_000 for n in range(2)]
    store.put(uri, whole[0])
    done = threading.Event()

    def write() -> None:
        for n in range(60):
            store.put(uri, whole[n % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert store.get(uri) in whole
        assert store.list_files(str(tmp_path)) == [uri]
    writer.join()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: store.get(str(p / "none")), "No such file"),
        (lambda p: store.get(str(p)), "Is a directory"),
        (lambda p: store.download(str(p / "none"), p), "saw nothing there"),
        (lambda p: store.upload(p / "none", str(p / "x")), "saw nothing there"),
        (lambda p: store.get("gs://bucket/key"), r"wanted a path, file:// or s3://, saw gs://"),
        (lambda p: store.get("s3:///key"), "saw no bucket"),
    ],
    ids=["no file", "a folder", "no download", "no upload", "foreign scheme", "no bucket"],
)
def test_an_error_says_what_was_wanted_and_is_not_worth_a_retry(make: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=says) as caught:
        make(tmp_path)  # type: ignore[operator]
    assert not caught.value.retryable


def test_a_full_disk_is_worth_a_retry_and_leaves_nothing_behind(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StoreError, match=r"No space left.*free some space") as caught, store._disk_errors("write x"):
        full.write_bytes(b"x")
    assert caught.value.retryable

    with pytest.raises(ZeroDivisionError):
        store._Disk(str(tmp_path / "x"))._write(lambda file: (file.write(b"half"), 1 / 0))
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    store.put(str(tmp_path / "a"), b"1")
    before = store.fingerprint(str(tmp_path))
    assert store.fingerprint(str(tmp_path)) == before
    store.put(str(tmp_path / "a"), b"22")
    assert store.fingerprint(str(tmp_path)) != before


def test_an_s3_endpoint_that_is_down_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StoreError, match="COWEST_S3_ENDPOINT") as caught:
        store.get("s3://bucket/key")
    assert caught.value.retryable


class Starting(http.server.BaseHTTPRequestHandler):
    """What MinIO answers until it has begun."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Retry-After", "60")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def test_a_store_that_asks_for_a_minute_does_not_hold_the_caller_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Starting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("COWEST_S3_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setattr(time, "sleep", slept.append)
        with pytest.raises(StoreError, match="503") as caught:
            store.put("s3://bucket/key", b"x")
        server.shutdown()
    assert caught.value.retryable and slept == [store.MAX_WAIT] * 3


@pytest.mark.parametrize(
    ("url", "through"),
    [
        ("https://s3.example.com", "http://proxy:3128"),
        ("http://store.desks.svc:9000", None),
        ("http://127.0.0.1:9000", None),
        ("http://plain.example.com", None),
    ],
    ids=["outside", "in the cluster", "this machine", "no proxy for http"],
)
def test_the_environment_says_what_goes_through_a_proxy(
    url: str, through: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"https_proxy": "http://proxy:3128", "http_proxy": "", "no_proxy": ".svc"}.items():
        monkeypatch.setenv(name, value)
    assert (proxy_of(url) or None) == through


def rotate(folder: Path, moment: str, **files: str) -> None:
    """As the kubelet does it: all files of a moment in one folder, and a link to it that is replaced."""
    (folder / f"..{moment}").mkdir(parents=True)
    for name, text in files.items():
        (folder / f"..{moment}" / name).write_text(text + "\n")
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    (folder / "..new").symlink_to(f"..{moment}")
    (folder / "..new").rename(folder / "..data")


def test_keys_in_files_are_those_of_one_moment(tmp_path: Path) -> None:
    rotate(tmp_path, "1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    assert store._keys_in(tmp_path) == ("a", "b", "")
    rotate(tmp_path, "2", AWS_ACCESS_KEY_ID="c", AWS_SECRET_ACCESS_KEY="d", AWS_SESSION_TOKEN="e")
    assert store._keys_in(tmp_path) == ("c", "d", "e")


def test_a_key_that_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate(tmp_path, "1", AWS_ACCESS_KEY_ID="a")
    monkeypatch.setenv("COWEST_S3_KEYS_FOLDER", str(tmp_path))
    with pytest.raises(StoreError, match=r"saw no AWS_SECRET_ACCESS_KEY; add the key to the Secret"):
        store.get("s3://bucket/key")


def test_what_reaches_s3_is_loaded_in_advance_and_what_is_wrong_is_said_when_it_is_used() -> None:
    code = (
        "import sys; from cowest_serving import store;"
        " store.prepare('/tmp'); before = 'minio' in sys.modules;"
        " store.prepare('s3://bucket/key'); store.prepare('s3:///no-bucket'); print(before, 'minio' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "True"]
