"""How many cores are worth using."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowest_serving import cores
from cowest_serving.cores import Cores


@pytest.mark.parametrize(
    ("seen", "free", "for_long"),
    [
        pytest.param(Cores(2, 2, 0.0), 2, 2, id="idle"),
        pytest.param(Cores(64, 2, 0.3), 2, 2, id="a container on an idle host"),
        pytest.param(Cores(64, 2, 60.0), 2, 2, id="a container on a host with room left"),
        pytest.param(Cores(8, 8, 2.2), 6, 6, id="others keep some busy"),
        pytest.param(Cores(8, 8, 7.6), 1, 4, id="a build that may have just ended"),
        pytest.param(Cores(8, 5, 90.0), 1, 3, id="half, rounded up"),
        pytest.param(Cores(2, 2, 1.6), 1, 2, id="two, of which a set-up kept one"),
        pytest.param(Cores(1, 1, 9.0), 1, 1, id="one core that is busy"),
    ],
)
def test_cores_that_are_worth_using_now_and_for_hours(seen: Cores, free: int, for_long: int) -> None:
    assert (seen.free, seen.for_long) == (free, for_long)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        pytest.param({"cpu.max": "150000 100000\n"}, 1.5, id="version 2"),
        pytest.param({"cpu.max": "max 100000\n"}, None, id="version 2 without a limit"),
        pytest.param({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0, id="version 1"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1\n"}, None, id="version 1 without a limit"),
        pytest.param({}, None, id="no cgroup"),
    ],
)
def test_the_containers_quota_is_read(tmp_path: Path, files: dict[str, str], most: float | None) -> None:
    write(tmp_path, files)
    assert cores.quota(tmp_path) == most


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        pytest.param("max 100000", 16, id="affinity alone"),
        pytest.param("200000 100000", 2, id="a quota below it"),
        pytest.param("290000 100000", 2, id="whole cores only"),
        pytest.param("6400000 100000", 16, id="a quota above it"),
        pytest.param("50000 100000", 1, id="half a core"),
    ],
)
def test_the_smaller_of_affinity_and_quota_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, allowed: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 60.0, 60.0))
    write(tmp_path, {"cpu.max": limit})
    assert cores.look(tmp_path) == Cores(64, allowed, 3.5)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("said", "threads"),
    [
        pytest.param("3", 3, id="a person's word"),
        pytest.param("0", None, id="no number of threads"),
        pytest.param("many", None, id="no number"),
        pytest.param(None, None, id="nothing said"),
    ],
)
def test_threads_are_what_a_person_says_or_the_free_cores(
    monkeypatch: pytest.MonkeyPatch, said: str | None, threads: int | None
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert cores.free_threads() == (threads or cores.look().allowed)


@pytest.fixture
def busy_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores, all of which others keep busy."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "getloadavg", lambda: (63.0, 60.0, 60.0))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "0")  # is put back
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.usefixtures("busy_node")
@pytest.mark.parametrize(
    ("limit", "in_pod", "threads"),
    [
        pytest.param("400000 100000", True, 4, id="a pod has its limit, whatever others do"),
        pytest.param("50000 100000", True, 1, id="half a core"),
        pytest.param("max 100000", True, None, id="a pod without one"),
        pytest.param("25600000 100000", True, None, id="a pod whose limit no node has"),
        pytest.param("400000 100000", False, None, id="another container may share its quota among many processes"),
    ],
)
def test_a_pod_with_a_cpu_limit_uses_just_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, in_pod: bool, threads: int | None
) -> None:
    if not in_pod:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    write(tmp_path, {"cpu.max": limit})
    assert cores.free_threads(tmp_path) == (threads or 1)
    cores.keep_to_limit(tmp_path)
    assert os.environ.get("OMP_NUM_THREADS") == (str(threads) if threads else None)


@pytest.mark.usefixtures("busy_node")
def test_a_persons_word_on_threads_is_stronger_than_a_pods_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"cpu.max": "400000 100000"})
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    cores.keep_to_limit(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "9" and cores.free_threads(tmp_path) == 9
