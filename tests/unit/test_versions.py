"""A strong model that is another one from some answer on, and services that rotate between versions."""

from __future__ import annotations

import pytest

from cowest_training.versions import Change, Named, change, edges


def named(*versions: str, model: str = "strong") -> list[Named]:
    return [Named(model, version) for version in versions]


def test_a_version_that_never_comes_again_is_another_model() -> None:
    assert change(named(*["a"] * 30, *["b"] * 12), in_flight=4) == Change(("a",), ("b",), 30)


def test_answers_that_overtake_each_other_hide_no_change() -> None:
    assert change(named(*["a"] * 30, *["b", "a"] * 2, *["b"] * 30), in_flight=4) == Change(("a",), ("b",), 30)


def test_another_model_under_no_version_is_seen_by_its_name() -> None:
    answers = [*named(*[""] * 20, model="strong-1"), *named(*[""] * 20, model="strong-2")]
    assert str(change(answers, in_flight=4)) == "strong-1 for 20 answers, then strong-2"


def test_a_rotation_may_change_as_a_whole() -> None:
    assert change(named(*["a", "b"] * 10, *["c", "d"] * 10), in_flight=4) == Change(("a", "b"), ("c", "d"), 20)


@pytest.mark.parametrize(
    "versions",
    [
        pytest.param([], id="no answers"),
        pytest.param(["a"] * 50, id="one version"),
        pytest.param([""] * 50, id="no names"),
        pytest.param(["a", "b"] * 30, id="two in turn"),
        pytest.param([*["a"] * 30, *["b"] * 30, "a"], id="the first comes again"),
        pytest.param([*["a"] * 30, *["b"] * 9], id="too few answers since"),
        pytest.param([*["a"] * 9, *["b"] * 30], id="too few answers before"),
        pytest.param([*["a"] * 20, *[""] * 20], id="left out from some answer on"),
    ],
)
def test_nothing_else_is_a_change(versions: list[str]) -> None:
    assert change(named(*versions), in_flight=16) is None


def test_the_edges_are_what_the_first_and_the_last_answers_name() -> None:
    assert edges(named(*["a"] * 10, *["b"] * 5, *["c"] * 10)) == {"first": ["a"], "last": ["c"]}
    assert edges(named("", "")) == {"first": ["strong"], "last": ["strong"]}
    assert edges([]) == {"first": [], "last": []}
