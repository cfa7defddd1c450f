"""Ids: none comes twice, in whatever process it is made."""

from __future__ import annotations

import os

from cowest_serving.ids import new_id


def test_ids_of_forked_processes_are_their_own() -> None:
    def ids_of_a_fork() -> list[str]:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.write(writer, " ".join(new_id() for _ in range(3)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            ids = told.read().split()
        os.waitpid(child, 0)
        return ids

    ids = [*ids_of_a_fork(), *ids_of_a_fork(), new_id(), new_id()]
    assert len(set(ids)) == 8


def test_ids_are_all_different_and_of_one_form() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)
