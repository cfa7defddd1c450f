"""`cowest upload` of a folder: what lies there afterwards is what was sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cowest_cli.upload import in_order, upload
from cowest_serving.model_files import model_digest
from cowest_training.contract import StepError


def write_model(folder: Path, shards: int = 1) -> Path:
    folder.mkdir()
    names = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        header = json.dumps({f"w{i}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    if shards > 1:
        index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_of_a_model_that_was_there_before_nothing_stays(tmp_path: Path) -> None:
    place = tmp_path / "my store"
    first, second = write_model(tmp_path / "v1"), write_model(tmp_path / "v2", shards=2)
    upload(first, place.as_uri())
    upload(second, place.as_uri())
    assert {path.name for path in place.iterdir()} == {path.name for path in second.iterdir()} | {"SHA256SUMS"}
    assert "model.safetensors\n" not in (place / "SHA256SUMS").read_text()
    assert model_digest(place) == model_digest(second)


def test_the_configuration_of_a_model_is_sent_last_so_that_who_finds_it_finds_the_whole_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "v1", shards=2)
    (model / "more").mkdir()
    (model / "more" / "config.json").touch()
    names = [path.relative_to(model).as_posix() for path in in_order(model)]
    assert names[-1] == "config.json" and sorted(names) == sorted(
        path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()
    )
    assert names[:-1] == sorted(names[:-1])


def test_nothing_is_sent_beside_what_no_upload_has_left(tmp_path: Path) -> None:
    place = write_model(tmp_path / "place")
    (place / "notes.txt").write_text("mine")
    with pytest.raises(StepError, match=r"wanted an empty place or an earlier upload, saw notes\.txt"):
        upload(write_model(tmp_path / "v1"), place.as_uri())
    assert not (place / "SHA256SUMS").exists() and (place / "notes.txt").read_text() == "mine"
