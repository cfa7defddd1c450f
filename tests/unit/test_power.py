"""What a held-out set can show, against hand-computed figures and simulated gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cowest_operator import power
from cowest_operator.power import Power
from cowest_operator.promotion import significance
from cowest_training.statistics import mcnemar
from tests import world as w

GATE = w.SPEC.gate


@pytest.mark.parametrize(
    ("queries", "discordant", "points"),
    [(500, 0.1, 4.0), (500, 0.2, 5.6), (1000, 0.2, 4.0), (2000, 0.1, 2.0), (2000, 0.3, 3.4)],
)
def test_the_smallest_gain_is_2_8_standard_errors_at_the_first_look(
    queries: int, discordant: float, points: float
) -> None:
    assert Power(queries, GATE, discordant).smallest_gain(1) == pytest.approx(points, abs=0.07)


def test_a_gain_of_that_size_passes_four_gates_of_five() -> None:
    rng, queries, share = np.random.default_rng(0), 1000, 0.2
    gain = Power(queries, GATE, share).smallest_gain(1) / 100
    drawn = rng.multinomial(queries, [(share + gain) / 2, (share - gain) / 2, 1 - share], 2000)
    passed = [mcnemar(int(better), int(worse)) < significance(GATE.significance, 1) for better, worse, _ in drawn]
    assert np.mean(passed) == pytest.approx(power.POWER, abs=0.04)


def test_later_looks_see_less_and_the_declared_minimum_is_never_undercut() -> None:
    seen = Power(1000, GATE, 0.2)
    assert seen.smallest_gain(1) < seen.smallest_gain(2) < seen.smallest_gain(5)
    assert Power(1000, replace(GATE, minimum_effect_points=9.0), 0.2).smallest_gain(1) == 9.0


def test_it_is_said_whether_the_discordance_was_measured_or_assumed() -> None:
    (assumed,), (measured,) = power.sentences(Power(500, GATE), 1), power.sentences(Power(500, GATE, 0.1), 3)
    assert "a gain under 5.6 points will most likely not be seen" in assumed and "20 % assumed" in assumed
    assert "look 1 wants p < 0.025" in assumed
    assert "10 % in the last evaluation" in measured and "look 3 wants p < 0.0042" in measured
    assert ", at look 4 one under " in power.sentences(Power(500, GATE), 1, last=4)[0]


def test_slices_with_too_few_queries_are_named_smallest_first() -> None:
    seen = Power(500, GATE, None, {"bulk": 400, "odd": 12, "rare": 88})
    assert seen.wanted_of_a_slice() == 150
    assert list(seen.small_slices()) == ["odd", "rare"]
    said = power.sentences(seen, 1)[1]
    assert "'odd' (12), 'rare' (88); 150 queries each would do" in said and "maxSliceLossPoints = 10" in said
    many = power.sentences(replace(seen, slices={f"g{n}": n for n in range(1, 8)}), 1)[1]
    assert many.count("'g") == 5 and "and 2 more" in many


@pytest.mark.parametrize("slices", [None, {}, {"bulk": 150}])
def test_nothing_is_said_of_slices_that_are_large_enough(slices: dict[str, int] | None) -> None:
    assert len(power.sentences(Power(500, GATE, None, slices), 1)) == 1


def test_a_limit_of_no_loss_leaves_the_least_size_of_a_slice() -> None:
    assert Power(500, replace(GATE, max_slice_loss_points=0.0)).wanted_of_a_slice() == 30
