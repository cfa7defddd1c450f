"""The fault tests' notes of what is broken: a run that was cut off is mended by the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import faults


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that were run, none of which does anything."""
    commands: list[tuple[str, ...]] = []

    def run(*command: str, **_: Any) -> str:
        commands.append(command)
        return '{"spec": {"selector": {"matchLabels": {"app": "minio"}}}}'

    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(faults, "UNDO", tmp_path / "undo.jsonl")
    return commands


def test_what_a_run_left_broken_is_put_back_the_last_first(ran: list[tuple[str, ...]]) -> None:
    cut_off = [faults.scaled_away("store", "minio"), faults.edited({"gate": {}}, {"gate": {"minHeldOut": 9}})]
    for block in cut_off:
        block.__enter__()  # and never left: the process was killed
    ran.clear()
    faults.mend()
    assert [command[3] for command in ran] == ["patch", "scale"]
    assert '{"spec": {"gate": {"minHeldOut": 9}}}' in ran[0] and "--replicas=1" in ran[1]
    ran.clear()
    faults.mend()
    assert ran == [], "once"
    cut_off.clear()


def test_what_was_put_back_in_its_time_is_not_put_back_again(ran: list[tuple[str, ...]]) -> None:
    with faults.there({"kind": "ConfigMap"}), faults.edited({"a": 1}, {"a": 2}):
        assert faults.UNDO.read_text().count("\n") == 2
    ran.clear()
    faults.mend()
    assert ran == []
