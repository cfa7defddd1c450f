"""The init container of a weak model, as a process and as a function, from a folder and from a real MinIO."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.request import urlopen

import pytest
from minio import Minio

from cowest_serving import fetch as fetching
from cowest_serving import store
from cowest_serving.fetch import fetch, main, target_of
from cowest_serving.model_files import ModelFolderError, model_digest
from cowest_serving.store import StoreError
from tests.ports import free_port

MINIO = os.environ.get("COWEST_TEST_MINIO") or shutil.which("minio")
needs_minio = pytest.mark.skipif(not MINIO, reason="no minio binary: put it on PATH or name it in COWEST_TEST_MINIO")
KEYS = ("cowest-test", "cowest-test-secret")


def s3_environment(address: str) -> Mapping[str, str]:
    return {
        "COWEST_S3_ENDPOINT": f"http://{address}",
        "COWEST_S3_PATH_STYLE": "true",
        "AWS_ACCESS_KEY_ID": KEYS[0],
        "AWS_SECRET_ACCESS_KEY": KEYS[1],
    }


@contextlib.contextmanager
def minio_server(address: str, folder: Path) -> Iterator[Minio]:
    """MinIO with the bucket `models`; it starts again on the same folder with all that it had."""
    environment = {**os.environ, "MINIO_ROOT_USER": KEYS[0], "MINIO_ROOT_PASSWORD": KEYS[1]}
    command = [str(MINIO), "server", "--quiet", "--address", address, str(folder)]
    with (
        open(f"{folder}.log", "ab") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            end = time.monotonic() + 60
            while not is_up(f"http://{address}/minio/health/ready"):
                assert server.poll() is None and time.monotonic() < end, Path(f"{folder}.log").read_text()
                time.sleep(0.05)
            client = Minio(address, *KEYS, secure=False)
            if not client.bucket_exists("models"):
                client.make_bucket("models")
            yield client
        finally:
            server.kill()


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def make_model(folder: Path, value: bytes = b"\0\0\0\0") -> str:
    """A model folder without torch; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(value) // 4], "data_offsets": [0, len(value)]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + value)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    return model_digest(folder)


def arguments(model: str | Path, digest: str, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--digest", digest, "--out", str(out), *more]


# ---------------------------------------------------------------- from a folder
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_model_is_copied_and_has_its_digest(tmp_path: Path, scheme: str) -> None:
    digest = make_model(tmp_path / "source")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "a tool.jinja").write_text("{{ x }}")
    digest = model_digest(tmp_path / "source")
    assert main(arguments(f"{scheme}{tmp_path / 'source'}", digest, tmp_path / "out")) == 0
    assert model_digest(tmp_path / "out") == digest
    assert (tmp_path / "out" / "README.md").is_file()


def test_another_model_than_the_digest_says_ends_with_2_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, wanted = make_model(tmp_path / "source"), "sha256:" + "0" * 64
    assert main(arguments(tmp_path / "source", wanted, tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"fetch: wanted {wanted} at") and f"saw {seen}; publish" in last


def test_a_pickle_is_refused_though_the_digest_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = make_model(tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert main(arguments(tmp_path / "source", digest, tmp_path / "out")) == 2
    assert "saw the pickle file pytorch_model.bin" in capsys.readouterr().err


def test_a_whole_folder_is_not_fetched_again(tmp_path: Path) -> None:
    digest = make_model(tmp_path / "source")
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)
    shutil.rmtree(tmp_path / "source")
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)


def test_after_an_interrupted_run_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    digest = make_model(tmp_path / "source")
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)
    (tmp_path / "out" / "config.json").unlink()
    weights = tmp_path / "out" / "model.safetensors"
    inode = weights.stat().st_ino
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)
    assert model_digest(tmp_path / "out") == digest
    assert weights.stat().st_ino == inode


def test_the_files_of_another_model_are_replaced(tmp_path: Path) -> None:
    make_model(tmp_path / "out", b"\1\1\1\1")
    digest = make_model(tmp_path / "source")
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)
    assert model_digest(tmp_path / "out") == digest


def test_the_rest_of_a_try_that_broke_off_takes_no_room(tmp_path: Path) -> None:
    digest = make_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    rest = tmp_path / "out" / "model.safetensors.ab12.part"
    rest.write_bytes(b"half a model")
    fetch(str(tmp_path / "source"), digest, tmp_path / "out", patience=0)
    assert not rest.exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        pytest.param("{}/nothing", "wanted a model at", id="nothing there"),
        pytest.param("{}/source/config.json", "name the model's folder", id="a single file"),
        pytest.param("hf://org/name", "wanted a path, file:// or s3://", id="a scheme that no store has"),
    ],
)
def test_what_is_no_model_folder_ends_with_2(
    tmp_path: Path, model: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = make_model(tmp_path / "source")
    assert main(arguments(model.format(tmp_path), digest, tmp_path / "out")) == 2
    assert says in capsys.readouterr().err


def test_a_digest_that_is_none_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(tmp_path, "sha256:abc", tmp_path / "out"))
    assert ended.value.code == 2


# ---------------------------------------------------------------- from S3
@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store that is not there yet."""
    address = f"127.0.0.1:{free_port()}"
    for name, value in s3_environment(address).items():
        monkeypatch.setenv(name, value)
    return address


def test_a_store_that_stays_away_ends_with_75(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("s3://models/a", "sha256:" + "0" * 64, tmp_path / "out", "--patience", "0.2")) == 75
    assert "fetch: wanted to list s3://models/a" in capsys.readouterr().err


@needs_minio
def test_a_store_that_comes_back_is_waited_for_and_siblings_are_left_alone(s3: str, tmp_path: Path) -> None:
    digest = make_model(tmp_path / "source", os.urandom(12_000_000))
    with minio_server(s3, tmp_path / "data"):
        store.upload(tmp_path / "source", "s3://models/job/models/v1")
        store.put("s3://models/job/models/v10/vocab.txt", b"of another model, with the same prefix")
    command = [sys.executable, "-m", "cowest_serving.fetch"]
    flags = arguments("s3://models/job/models/v1", digest, tmp_path / "out", "--patience", "60")
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "COWEST_S3_ENDPOINT" in process.stderr.readline()  # it has seen that the store is away
            with minio_server(s3, tmp_path / "data"):
                _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert model_digest(tmp_path / "out") == digest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@needs_minio
def test_nothing_at_the_key_is_not_waited_for(s3: str, tmp_path: Path) -> None:
    with minio_server(s3, tmp_path / "data"), pytest.raises(StoreError, match="saw no files") as caught:
        fetch("s3://models/none", "sha256:" + "0" * 64, tmp_path / "out", patience=60)
    assert not caught.value.retryable


def test_an_object_that_would_lie_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    assert target_of("s3://models/m", "s3://models/m/a/b", tmp_path) == tmp_path / "a" / "b"
    with pytest.raises(ModelFolderError, match="wanted the files of a folder"):
        target_of("s3://models/m", "s3://models/m/../evil", tmp_path)


def test_progress_is_said_while_files_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path / "source")
    monkeypatch.setattr(fetching, "PROGRESS_SECONDS", 0.02)
    caplog.set_level("INFO", "cowest_serving.fetch")
    copy = fetching._Copy(str(tmp_path / "source"), tmp_path / "out", 0)
    with copy._progress():
        until(lambda: "0 of 4 files" in caplog.text)
        shutil.copytree(tmp_path / "source", tmp_path / "out")
        until(lambda: "4 of 4 files" in caplog.text)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
