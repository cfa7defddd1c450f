"""How `make bench-gateway` comes from its rounds to its figures."""

from __future__ import annotations

import pytest

from tests.benchmarks.gateway.bench import Findings, direct_of, quantile, result, there_and_back
from tests.benchmarks.gateway.soak import slope


def test_a_figure_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    found = Findings()
    found.rounds["theirs"], found.rounds["ours"] = [10.0, 40.0, 9.0], [1.0, 8.0, 3.0]
    found.ratio("theirs_over_ours", "theirs", "ours")
    assert found.facts["theirs_over_ours"] == 5.0
    assert found.facts["iqr"]["theirs_over_ours"] == [4.0, 7.5]


def test_what_could_not_be_measured_is_null_with_its_reason_and_never_left_out() -> None:
    found = Findings(reasons={"nginx": "it needs nginx, saw none on PATH"})
    found.rounds["ours"] = [1.0]
    found.ratio("cpu_vs_nginx", "theirs", "ours")
    told = result(found)
    assert told["cpu_vs_nginx"] is None and told["cpu_vs_portkey"] is None
    assert told["reasons"] == {"nginx": "it needs nginx, saw none on PATH"}


def test_a_round_goes_there_and_back() -> None:
    assert there_and_back(["a", "b", "c"]) == ["a", "b", "c", "c", "b", "a"]


@pytest.mark.parametrize(
    ("name", "direct"), [("cowest", "direct_twice"), ("nginx", "direct"), ("direct", ""), ("direct_twice", "")]
)
def test_the_pair_is_compared_with_two_direct_calls_and_a_peer_with_one(name: str, direct: str) -> None:
    assert direct_of(name) == direct


def test_a_quantile_is_a_value_that_was_seen() -> None:
    assert [quantile([5, 1, 4, 2, 3], q) for q in (0.0, 0.5, 0.99)] == [1, 3, 5]


def test_the_slope_of_a_line_with_noise_on_both_sides_is_the_lines() -> None:
    assert slope([(x, 3 + 2 * x + (0.5 if x % 2 else -0.5)) for x in range(101)]) == pytest.approx(2, abs=0.01)
