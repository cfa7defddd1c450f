"""Which model folders may be loaded, and what names them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cowest_serving.model_files import (
    ModelFolderError,
    base_of_adapter,
    check_model_folder,
    make_readable,
    model_digest,
    resolve_model,
)


def weights(values: bytes = b"\0\0\0\0") -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights())
    return folder


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model), "r": 4}))
    (folder / "adapter_model.safetensors").write_bytes(weights())
    return folder


def test_a_model_and_an_adapter_are_fine(model: Path, adapter: Path) -> None:
    (model / "training_args.bin").write_bytes(b"left by a trainer, never loaded")
    check_model_folder(model)
    check_model_folder(str(adapter))


def test_a_tokenizer_may_come_with_the_adapter_alone(model: Path, adapter: Path) -> None:
    (model / "tokenizer.json").rename(adapter / "tokenizer.json")
    check_model_folder(adapter)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "wanted config.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: wanted JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "wanted a JSON object, saw list"),
        (lambda f: (f / "tokenizer.json").unlink(), "wanted a tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), r"wanted weights as \*.safetensors, saw none"),
        (lambda f: (f / "model.safetensors").write_bytes(weights()[:-1]), "cut short"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
            "saw a Git LFS",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"12 bytes of."), "cut short|safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "wanted a safetensors file, saw an empty one"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"w": "part-2.safetensors"}}'),
            "wants part-2.safetensors, saw no such file",
        ),
        *[
            (lambda f, name=name: (f / name).write_bytes(b"x"), f"pickle file {name}")
            for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt")
        ],
    ],
)
def test_a_folder_that_must_not_be_loaded_is_refused(
    model: Path, adapter: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(model)
    for folder in (model, adapter):  # an adapter is as good as its base
        with pytest.raises(ModelFolderError, match=says):
            check_model_folder(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    for use in (check_model_folder, model_digest, resolve_model):
        with pytest.raises(ModelFolderError, match="saw no"):
            use(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("config.json", True),
        ("generation_config.json", True),
        ("model.safetensors", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("README.md", False),
        ("training_args.bin", False),
        ("manifest.json", False),
    ],
)
def test_the_digest_is_of_what_decides_the_output(model: Path, name: str, counts: bool) -> None:
    before = model_digest(model)
    assert before.startswith("sha256:") and len(before) == 71
    (model / name).write_bytes(weights(b"\1\0\0\0"))
    assert (model_digest(model) != before) is counts


def test_an_adapters_digest_holds_its_base_by_content_not_by_place(model: Path, adapter: Path) -> None:
    before = model_digest(adapter)
    moved = model.rename(model.with_name("moved"))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "../moved", "r": 4}))
    assert base_of_adapter(adapter).resolve() == moved
    assert model_digest(adapter) == before
    (moved / "model.safetensors").write_bytes(weights(b"\1\0\0\0"))
    assert model_digest(adapter) != before


@pytest.mark.parametrize(
    ("base", "says"),
    [(None, "wanted base_model_name_or_path"), ("/nowhere/at/all", "saw nothing there"), (".", "saw another adapter")],
    ids=["none named", "not there", "an adapter itself"],
)
def test_an_adapter_needs_its_base(adapter: Path, base: str | None, says: str) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ModelFolderError, match=says):
        check_model_folder(adapter)


def test_a_model_is_found_by_path_and_by_uri(model: Path) -> None:
    assert resolve_model(str(model)) == resolve_model(model.as_uri()) == model


def test_everybody_may_read_what_was_made_readable(model: Path) -> None:
    (model / "model.safetensors").chmod(0o600)
    model.chmod(0o700)
    make_readable(model)
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert model.stat().st_mode & 0o777 == 0o755
