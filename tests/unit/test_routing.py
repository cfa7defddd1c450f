"""Which arm answers, and which routing holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.contract import Arm, Pair, Prompts, Routing, dump
from cowest_serving.routing import BUCKETS, FileRouting, bucket_of, choose_arm, parse_routing

PAIR = Pair("sha256:w", "file:///w", Prompts("{query}", "{query} {draft}", "{query}"), "Answer", "http://s/v1", "s")
STABLE = Arm("stable", 90, "Pair", PAIR, "http://w/v1")
CANDIDATE = replace(STABLE, name="candidate", weight_percent=10)
ROUTING = Routing(3, "salt", (STABLE, CANDIDATE))


@pytest.mark.parametrize(
    ("bucket", "arm"), [(0, "candidate"), (999, "candidate"), (1000, "stable"), (BUCKETS - 1, "stable")]
)
def test_the_candidate_has_the_low_buckets_up_to_its_weight(bucket: int, arm: str) -> None:
    assert choose_arm(ROUTING, None, draw=lambda _: bucket).name == arm


@pytest.mark.parametrize(("weights", "arm"), [((100, 0), "stable"), ((0, 100), "candidate"), ((0, 0), "stable")])
def test_a_weight_of_nothing_and_all_is_exact(weights: tuple[int, int], arm: str) -> None:
    stable, candidate = replace(STABLE, weight_percent=weights[0]), replace(CANDIDATE, weight_percent=weights[1])
    routing = Routing(1, "s", (stable, candidate))
    assert {choose_arm(routing, f"u{i}").name for i in range(300)} == {arm}
    assert choose_arm(routing, None, draw=lambda _: BUCKETS - 1).name == arm


def test_buckets_are_even_stable_and_drawn_anew_with_another_salt() -> None:
    buckets = [bucket_of("a", f"u{i}") for i in range(4000)]
    assert 0.08 < sum(bucket < 1000 for bucket in buckets) / 4000 < 0.12
    assert bucket_of("a", "u1") == 7519  # sha256sum of "au1", modulo 10000
    again = [bucket_of("b", f"u{i}") for i in range(4000)]
    both = sum(x < 1000 and y < 1000 for x, y in zip(buckets, again, strict=True)) / 4000
    assert 0.003 < both < 0.02


def test_the_routing_file_gives_back_what_was_dumped() -> None:
    assert parse_routing(json.dumps(dump(ROUTING)).encode()) == ROUTING


def changed(**arm: Any) -> bytes:
    routing = dump(ROUTING)
    routing["arms"][0] |= arm
    return json.dumps(routing).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"{", "JSON|EOF|unexpected", id="no JSON"),
        pytest.param(b"[]", "routing: wanted an object", id="a list"),
        pytest.param(b'{"version": 1, "salt": "s", "arms": []}', "at least one arm", id="no arms"),
        pytest.param(changed(weakEndpoint=None), r"arms\[0\].weakEndpoint", id="a pair without its weak model"),
        pytest.param(changed(weightPercent=101), r"arms\[0\].weightPercent", id="a weight above 100"),
        pytest.param(changed(mode="Both"), r"arms\[0\].mode", id="an unknown mode"),
    ],
)
def test_a_routing_that_cannot_hold_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_routing(data)


@pytest.mark.parametrize("bad", [b"", b"{", b"null", b'{"arms": 3, "version": 1, "salt": "s"}'])
def test_a_bad_file_leaves_the_last_good_routing(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "routing.json"
    source = FileRouting(file)
    assert (source.current, source.errors) == (None, 0)
    file.write_text(json.dumps(dump(ROUTING)))
    source.load()
    file.write_bytes(bad)
    source.load()
    source.load()
    assert (source.current, source.errors) == (ROUTING, 1)
    file.write_text(json.dumps(dump(replace(ROUTING, version=4))))
    source.load()
    assert source.current is not None and source.current.version == 4


def test_a_file_that_goes_away_leaves_the_last_good_routing(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text(json.dumps(dump(ROUTING)))
    source = FileRouting(file)
    file.unlink()
    source.load()
    assert source.current == ROUTING


@contextlib.asynccontextmanager
async def followed(file: Path, every_seconds: float) -> AsyncIterator[FileRouting]:
    source = FileRouting(file, every_seconds=every_seconds)
    watching = asyncio.create_task(source.watch())
    yield source
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def until_version(source: FileRouting, version: int) -> None:
    async with asyncio.timeout(20):
        while source.current is None or source.current.version != version:
            await asyncio.sleep(0.001)


async def test_a_file_that_is_replaced_is_taken_up_long_before_it_is_looked_at_again(tmp_path: Path) -> None:
    file, part = tmp_path / "routing.json", tmp_path / "part"
    async with followed(file, every_seconds=3600) as source:
        for version in range(1, 6):
            part.write_text(json.dumps(dump(replace(ROUTING, version=version))))
            part.replace(file)
            await until_version(source, version)
        assert source.errors == 0


async def test_a_mounted_config_map_that_turns_to_its_next_version_is_taken_up(tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / f"..v{version}").mkdir()
        (tmp_path / f"..v{version}" / "routing.json").write_text(json.dumps(dump(replace(ROUTING, version=version))))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "routing.json").symlink_to("..data/routing.json")
    async with followed(tmp_path / "routing.json", every_seconds=3600) as source:
        await until_version(source, 1)
        (tmp_path / "..next").symlink_to("..v2")
        (tmp_path / "..next").rename(tmp_path / "..data")
        await until_version(source, 2)


async def test_a_file_in_a_folder_that_comes_later_is_found_by_looking(tmp_path: Path) -> None:
    file = tmp_path / "later" / "routing.json"
    async with followed(file, every_seconds=0.01) as source:
        file.parent.mkdir()
        file.write_text(json.dumps(dump(ROUTING)))
        await until_version(source, ROUTING.version)


async def test_following_leaves_no_open_handle(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with followed(tmp_path / "routing.json", every_seconds=3600):
        await asyncio.sleep(0)  # it begins to watch
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
