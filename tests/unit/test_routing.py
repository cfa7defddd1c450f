"""Which arm answers, and which routing holds."""

from __future__ import annotations

import json
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
