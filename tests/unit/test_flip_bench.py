"""What `make bench-flip` calls a failure: a benchmark that cannot fail shows nothing."""

from __future__ import annotations

from collections.abc import Sequence

from cowest_serving.contract import Arm, Pair, Prompts, Routing
from cowest_serving.routing import choose_arm
from tests.benchmarks.gateway.flip import Call, Flip, judge

PAIR = Pair("sha256:w", "file:///w", Prompts("{query}", "{query} {draft}", "{query}"), "Answer", "http://s/v1", "s")
MS = 1_000_000
FLIP_AT = 10_000 * MS


def routing(version: int, candidate: int) -> Routing:
    arms = (
        Arm("candidate", candidate, "StrongAlone", PAIR),
        Arm("stable", 100 - candidate, "StrongAlone", PAIR),
    )
    return Routing(version, "salt", arms)


BEFORE, AFTER = routing(1, 0), routing(2, 100)
FLIPS = [Flip(BEFORE, 0, 0), Flip(AFTER, FLIP_AT - MS, FLIP_AT)]


def calls(at_ms: Sequence[float], weights: Routing, took_ms: float = 1) -> list[Call]:
    found = []
    for number, ms in enumerate(at_ms):
        sent, user = int(ms * MS), f"{ms}-{number}"
        found.append(Call(user, sent, sent + int(took_ms * MS), choose_arm(weights, user).name, ""))
    return found


def test_answers_by_the_weights_in_force_are_no_error() -> None:
    found = judge([*calls(range(100, 9000, 10), BEFORE), *calls(range(10_100, 12_000, 10), AFTER)], FLIPS)
    assert (found["failed"], found["split_error"], found["flip_ms_p99"]) == (0, 0.0, 0.0)
    assert found["share_inside"]


def test_old_weights_after_a_flip_are_its_delay_and_beyond_50_ms_an_error() -> None:
    found = judge([*calls([10_003, 10_020], BEFORE), *calls([10_060], BEFORE), *calls([10_100], AFTER)], FLIPS)
    assert found["flip_ms_p99"] == 60.0
    assert (found["judged"], found["split_error"]) == (2, 0.5)


def test_a_call_under_way_at_a_flip_may_go_either_way() -> None:
    under_way = calls([9_990], AFTER, took_ms=15)
    found = judge([*calls([9_000], BEFORE), *under_way], FLIPS)
    assert (found["judged"], found["split_error"]) == (1, 0.0)


def test_a_share_beyond_chance_is_told() -> None:
    half = routing(1, 50)
    all_stable = [Call(f"u{i}", i * MS + 60 * MS, i * MS + 61 * MS, "stable", "") for i in range(100)]
    found = judge(all_stable, [Flip(half, 0, 0)])
    assert not found["share_inside"] and found["split_error"] > 0.3


def test_a_call_without_an_answer_is_a_failure() -> None:
    found = judge([Call("u", MS * 100, MS * 101, "", "status 503")], [Flip(BEFORE, 0, 0)])
    assert (found["calls"], found["failed"], found["judged"]) == (1, 1, 0)
