"""What `make bench-gate` simulates: tests whose figures are known, and exact tails against counting."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cowest_operator import api, promotion
from cowest_training.contract import Comparison
from cowest_training.statistics import fisher, mcnemar
from tests import world as w
from tests.benchmarks import gate_bench as bench

BARS = bench.WORLDS[0]


def test_the_fixed_test_is_sized_for_the_minimum_effect() -> None:
    assert bench.fixed_size(BARS) == 1818
    seen = bench.measured(bench.fixed_z, BARS, 4000, 0)
    assert seen["null"] == pytest.approx(0.05, abs=0.012)
    assert seen["mde"] == pytest.approx(0.80, abs=0.025)


def test_peeking_at_a_fixed_test_promotes_far_more_than_its_level_and_ours_does_not() -> None:
    assert bench.measured(bench.peeked_z, BARS, 2000, 0)["null"] > 0.15
    ours = bench.measured(bench.anytime, BARS, 2000, 0)
    assert ours["null"] <= 0.05 and ours["harm"] < 0.01
    assert ours["mde_answers"] < 0.35 and ours["2mde_answers"] < 0.16


def test_a_discordance_that_is_misjudged_costs_power_and_never_the_level() -> None:
    few, many = (bench.measured(bench.anytime_assumed, world, 2000, 0) for world in bench.WORLDS[1:3])
    assert max(few["null"], many["null"]) <= 0.05
    assert many["mde"] < 0.5 < few["mde"]


@pytest.mark.parametrize("name", sorted(bench.TESTS))
def test_each_test_promotes_more_the_larger_the_gain(name: str) -> None:
    seen = bench.measured(bench.TESTS[name], BARS, 200, 0)
    assert seen["harm"] <= seen["null"] <= seen["mde"] <= seen["2mde"]
    assert all(0 < seen[f"{effect}_answers"] <= 2.2 for effect in bench.EFFECTS)


def test_the_tails_are_those_of_the_gates_own_tests() -> None:
    assert bench._binomial_tail(6, 7) == pytest.approx(mcnemar(6, 1))
    assert bench._fisher_tail(9, 10, 30, 50) == pytest.approx(fisher(9, 10, 30, 50))
    counted = bench._by_pair(np.array([1, 2, 1]), np.array([0, 1, 0]), lambda a, b: math.hypot(a, b))
    assert counted.tolist() == [1.0, math.hypot(2, 1), 1.0]


@pytest.mark.parametrize("seed", range(6))
def test_todays_gate_is_simulated_as_it_decides(seed: int) -> None:
    """The same counts through `_today` and through `promotion.judge_live`, look by look."""
    rng = np.random.default_rng(seed)
    shares = bench._pair_shares(bench.WORLDS[2], (-0.12, -0.04, 0.0)[seed % 3])
    drawn: list[tuple[int, int, int]] = []

    def more(_: int, pairs: int) -> tuple[np.ndarray, np.ndarray, int]:
        better, worse, _same = rng.multinomial(pairs, shares)
        drawn.append((int(better), int(worse), pairs))
        return np.array([better]), np.array([worse]), 2 * pairs

    def losing(better: np.ndarray, worse: np.ndarray, pairs: int, _: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([mcnemar(int(worse[0]), int(better[0])) < bench._level()]), (better - worse) / pairs

    promoted = bool(bench._today(1, more, losing).promoted[0])
    assert decided(drawn) is promoted


def decided(drawn: list[tuple[int, int, int]]) -> bool:
    canary = replace(w.SPEC.canary, steps=tuple(api.CanaryStep(*step) for step in bench.STEPS))
    gate = replace(w.SPEC.gate, significance=bench.ALPHA)
    for step in range(len(bench.STEPS)):
        better = worse = n = 0
        for looks, added in enumerate(drawn[step * bench.LOOKS : (step + 1) * bench.LOOKS]):
            better, worse, n = better + added[0], worse + added[1], n + added[2]
            tails = mcnemar(better, worse), mcnemar(worse, better)
            seen = Comparison(n, (better - worse) / n, -1.0, 1.0, *tails, better, worse, "McNemar")
            trial = w.trial("Canary", step=step, looks=looks)
            verdict = promotion.judge_live(canary, gate, trial, w.live(n, n, step=step, comparison=seen), w.NOW)
            if verdict.action == "RollBack":
                return False
            if verdict.action == "Advance":
                break
    return True
