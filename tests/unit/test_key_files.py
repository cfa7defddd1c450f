"""Keys in files: what is read of a mounted Secret, also while it is rotated."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowest_serving.key_files import Keys, keys_of, texts_in


def mount(folder: Path, number: int) -> None:
    """As the kubelet does it: the files of a moment in a hidden folder, and a link to it that is turned."""
    moment = folder / f"..{number}"
    moment.mkdir()
    for name in ("a", "b"):
        (moment / name).write_text(str(number))
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(moment.name)
    (folder / "..new").rename(folder / "..data")


@contextmanager
def rotated_all_the_time(folder: Path) -> Iterator[None]:
    """As the kubelet does it, a moment is gone some time after the next one has come."""
    stop = threading.Event()

    def rotate() -> None:
        number = 1
        while not stop.is_set():
            mount(folder, number)
            shutil.rmtree(folder / f"..{number - 50}", ignore_errors=True)
            number += 1

    thread = threading.Thread(target=rotate)
    mount(folder, 0)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_what_is_read_while_a_secret_is_rotated_is_of_one_moment(tmp_path: Path) -> None:
    seen = set()
    with rotated_all_the_time(tmp_path):
        while len(seen) < 20:
            texts = texts_in(tmp_path)
            assert texts.keys() == {"a", "b"} and texts["a"] == texts["b"]
            seen.add(texts["a"])


def test_folders_below_are_read_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("b", "a", "old/c"):
        (tmp_path / name).write_text(name)
    assert list(texts_in(tmp_path).items()) == [("a", "a"), ("b", "b")]
    assert list(texts_in(tmp_path, below=True)) == ["a", "b", "old/c"]
    with pytest.raises(FileNotFoundError):
        texts_in(tmp_path / "nowhere")


def test_keys_come_from_a_variable_and_from_the_folder_that_another_one_names(tmp_path: Path) -> None:
    (tmp_path / "desk").write_text("three\n\n four \n")
    keys = keys_of({"KEYS": "one\ntwo\n", "KEYS_FOLDER": str(tmp_path)}, "KEYS", "first\nsecond")
    assert keys.names == {"one": "first", "two": "second", "three": "desk", "four": "desk"}
    assert keys.are_wanted and keys_of({"KEYS_FOLDER": str(tmp_path / "empty")}, "KEYS").are_wanted
    assert not keys_of(os.environ, "COWEST_NOBODYS_KEYS").are_wanted


@pytest.mark.parametrize(
    ("authorization", "shown"),
    [
        pytest.param("Bearer k", "k", id="a bearer"),
        pytest.param("bearer other", "other", id="in small letters"),
        pytest.param("k", "k", id="bare"),
        pytest.param("Bearer K", None, id="nearly"),
        pytest.param("Bearer ", None, id="nothing"),
        pytest.param("", None, id="no header"),
        pytest.param("Bearer \xe9", None, id="no ASCII"),
    ],
)
def test_only_a_key_that_is_known_is_one(authorization: str, shown: str | None) -> None:
    assert Keys(["k", "other"]).shown(authorization) == shown
