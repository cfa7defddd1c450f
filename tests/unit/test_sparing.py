"""Which drafts of a query are still to be asked for its pair to be known."""

from __future__ import annotations

import itertools

import pytest

from cowest_training.feedback import best_versus_worst
from cowest_training.sparing import AT_ONCE, Sayings, is_decided
from tests.unit.test_pairs import drafts, entries


@pytest.mark.parametrize(
    ("scores", "left", "margin", "wanted"),
    [
        pytest.param([1.0, 0.0], 3, 0.5, True, id="no score is better or worse than these"),
        pytest.param([1.0, 0.5], 3, 0.5, False, id="a worse one may come, though the margin is reached"),
        pytest.param([0.0, 0.0], 2, 0.5, False, id="a tie so far"),
        pytest.param([0.0, 0.0], 0, 0.5, True, id="none is left"),
        pytest.param([0.5, 0.5], 1, 0.75, True, id="the last one cannot reach the margin"),
        pytest.param([0.5, 0.5], 1, 0.5, False, id="the last one can just reach it"),
        pytest.param([0.5, 0.5], 2, 0.75, False, id="two that are left may be the pair"),
    ],
)
def test_a_query_is_asked_until_its_pair_is_known(scores: list[float], left: int, margin: float, wanted: bool) -> None:
    assert is_decided(scores, left, margin) is wanted


@pytest.mark.parametrize("margin", [0.25, 0.5, 0.75, 1.0])
def test_the_pair_of_those_asked_is_that_of_all(margin: float) -> None:
    spared = 0
    for scores in itertools.product((0.0, 0.5, 1.0), repeat=4):
        asked = AT_ONCE
        while not is_decided(scores[:asked], len(scores) - asked, margin):
            asked += 1
        spared += len(scores) - asked
        some, every = (best_versus_worst(entries(each), margin) for each in (scores[:asked], scores))
        assert drafts(some) == drafts(every), scores
    assert spared


def test_what_most_drafts_say_is_common_and_the_first_stands_for_those_that_say_the_same() -> None:
    said = Sayings(["a 1", "b 2", "c 2", "d 3", "b 2"], lambda text: text[2:])
    assert [said.take(common=True), said.take(common=False), said.left] == ["b 2", "a 1", 1]
    assert said.take(common=False) == "d 3"


def test_of_sayings_that_are_as_common_the_earlier_is_taken() -> None:
    said = Sayings(["x", "y", "z"], lambda text: text)
    assert [said.take(common=True), said.take(common=False), said.take(common=True)] == ["x", "y", "z"]


def test_drafts_that_leave_it_open_count_together_and_are_asked_each() -> None:
    said = Sayings(["x 1", "y", "z", "w 1", "v"], lambda text: text[2:])
    assert [said.take(common=True), said.take(common=False), said.take(common=True)] == ["y", "x 1", "z"]
    assert said.left == 1
