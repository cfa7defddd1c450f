"""The paired test that may be looked at after every pair: what it promises, computed exactly or simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cowest_operator.anytime import Design, log_wealth, look

DESIGNS = [
    pytest.param(Design(0.04, 0.2), id="the default: 4 points, 20 % discordant"),
    pytest.param(Design(0.08, 0.2, alpha=0.01), id="a large gain at a strict level"),
    pytest.param(Design(0.04, 0.1, alpha=0.025, beta=0.1), id="few pairs with a winner"),
    pytest.param(Design(0.02, 0.4), id="steps so small that the bound is Ville's"),
    pytest.param(Design(0.1, 0.05), id="a gain that the discordance does not allow"),
]


def crossing(design: Design, p: float, pairs: int = 3000) -> tuple[float, float]:
    """Chances of (ever Better, ever Futile) looking after each pair with a winner, where neither ends it; exact."""
    up, down = math.log1p(design.bet), math.log1p(-design.bet)
    found = []
    for hits in (lambda w: w >= design.promote, lambda w: w <= design.stop):
        chances, reached = np.zeros(pairs + 1), 0.0
        chances[0] = 1.0
        for n in range(1, pairs + 1):
            chances[1 : n + 1] = chances[1 : n + 1] * (1 - p) + chances[:n] * p
            chances[0] *= 1 - p
            wins = np.arange(n + 1)
            there = hits(wins * up + (n - wins) * down)
            reached += chances[: n + 1][there].sum()
            chances[: n + 1][there] = 0.0
        found.append(reached)
    return found[0], found[1]


@pytest.mark.parametrize("design", DESIGNS)
def test_no_peeking_promotes_a_candidate_without_a_gain_more_often_than_alpha(design: Design) -> None:
    better, _ = crossing(design, 0.5)
    assert 0.5 * design.alpha < better <= design.alpha
    assert crossing(design, 0.48)[0] < better, "one that loses is promoted less often still"


@pytest.mark.parametrize("design", DESIGNS)
def test_a_candidate_with_the_least_gain_is_given_up_no_more_often_than_beta(design: Design) -> None:
    _, futile = crossing(design, (1 + design.bet) / 2)
    assert futile <= design.beta
    assert crossing(design, min(0.99, (1 + design.bet) / 2 + 0.05))[1] < futile, "a larger gain less often still"


def test_the_bounds_are_finer_than_villes_where_steps_are_large() -> None:
    design = Design(0.04, 0.1)
    assert math.log(1 / design.alpha) - math.log1p(design.bet) < design.promote < math.log(1 / design.alpha) - 0.1
    assert design.stop > math.log(design.beta)
    assert Design(0.005, 0.2).promote == math.log(1 / 0.05)


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        pytest.param(0, 0, "Open", id="no pair yet: no data is never a pass"),
        pytest.param(60, 40, "Open", id="ahead, and not sure"),
        pytest.param(100, 50, "Better", id="twice as many won"),
        pytest.param(20, 30, "Futile", id="behind"),
        pytest.param(150, 150, "Futile", id="as often won as lost, for long"),
    ],
)
def test_a_look_says_where_the_evidence_stands(better: int, worse: int, said: str) -> None:
    seen = look(Design(0.04, 0.2), [(1, better), (-1, worse), (0, 1000)])
    assert seen.said == said
    assert seen.stop < 0 < seen.promote


def test_the_wealth_is_that_of_the_pairs_in_any_order() -> None:
    design = Design(0.04, 0.2)
    pairs = [(1.0, 9), (-1.0, 4), (0.0, 50)]
    for counts in (pairs, pairs[::-1], [(value, 1) for value, n in pairs for _ in range(n)]):
        assert look(design, counts).log_wealth == pytest.approx(9 * math.log1p(0.2) + 4 * math.log1p(-0.2))


def test_graded_differences_without_a_gain_stay_below_alpha_too() -> None:
    rng = np.random.default_rng(0)
    canaries, pairs = 4000, 600
    # Often a little better and seldom much worse: the mean is 0, the sign is not.
    differences = np.where(rng.random((canaries, pairs)) < 0.75, 0.25, -0.75)
    differences *= rng.random((canaries, pairs)) < 0.5
    wealth = np.cumsum(np.log1p(0.4 * differences), axis=1)
    assert log_wealth([(value, 1) for value in differences[0].tolist()], 0.4) == pytest.approx(wealth[0, -1])
    assert (wealth.max(axis=1) >= math.log(20)).mean() <= 0.05


def test_graded_differences_with_the_least_gain_are_rarely_given_up_and_without_one_mostly() -> None:
    rng = np.random.default_rng(1)
    design = Design(0.05, 0.5)
    for shift, wanted in ((0.05, lambda share: share <= design.beta), (0.0, lambda share: share > 0.7)):
        differences = np.clip(shift + rng.choice([0.25, -0.25], (500, 3000)), -1, 1)
        against = np.cumsum(np.log1p(design.bet * (design.effect - differences)), axis=1)
        assert wanted((against.max(axis=1) >= math.log(1 / design.beta)).mean()), shift
    behind = look(design, [(-0.25, 200), (0.25, 150)])
    assert behind.said == "Futile" and look(design, [(0.25, 300), (-0.25, 100)]).said == "Better"
    assert look(design, [(0.25, 3), (-0.25, 3)]).said == "Open"


@pytest.mark.parametrize("values", [(0.0, 0.2), (0.04, 0.0), (1.2, 0.2), (0.04, 0.2, 1.0), (0.04, 0.2, 0.05, 0.0)])
def test_a_design_that_can_show_nothing_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="wanted effect and discordant"):
        Design(*values)
