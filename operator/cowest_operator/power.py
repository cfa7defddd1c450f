"""What a held-out set can show: the smallest gain that the gate sees, and the slices that are too small to lose. Pure.

A paired comparison has the variance d - gain² a query, where d is the share of queries that the arms score differently
(the discordance): only they say which is better. A gain is seen with POWER when it is (z of the level + z of the power)
standard errors from nothing (Lachin 1992 for McNemar's test; Miller 2024, arXiv 2411.00640, for evaluations of models).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from cowest_operator import api
from cowest_operator.anytime import ASSUMED, share_of
from cowest_operator.promotion import MIN_SLICE, significance

POWER = 0.8
SLICE_LEVEL = 0.025  # a slice loses when its 95 % interval ends below 0
SHOWN = 5  # slices by name


@dataclass(frozen=True)
class Power:
    """What the gate can see with these held-out queries; `discordant` None: nothing was measured yet."""

    queries: int
    gate: api.Gate
    discordant: float | None = None
    slices: Mapping[str, int] | None = None  # group -> queries

    @property
    def share(self) -> float:
        return ASSUMED if self.discordant is None else share_of(self.discordant, self.queries)

    def smallest_gain(self, look: int) -> float:
        """In points, for the `look`-th (from 1) candidate on this set; at least what the gate asks for."""
        seen = 100 * smallest_difference(self.queries, self.share, significance(self.gate.significance, look))
        return max(seen, self.gate.minimum_effect_points)

    def small_slices(self) -> dict[str, int]:
        """Those, smallest first, in which a loss of `maxSliceLossPoints` is most likely not seen."""
        found = sorted((self.slices or {}).items(), key=lambda part: (part[1], part[0]))
        return {group: n for group, n in found if n < self.wanted_of_a_slice()}

    def wanted_of_a_slice(self) -> int:
        """Queries with which a loss of `maxSliceLossPoints` is seen to be one."""
        loss = self.gate.max_slice_loss_points / 100
        if loss <= 0:
            return MIN_SLICE
        z = _z(1 - SLICE_LEVEL) + _z(POWER)
        return max(MIN_SLICE, math.ceil(z * z * (self.share - min(loss * loss, self.share)) / (loss * loss)))


def smallest_difference(queries: int, discordant: float, level: float) -> float:
    """The gain that a one-sided paired test at `level` sees with POWER; none where that is above `discordant`."""
    z = _z(1 - level) + _z(POWER)
    return z * math.sqrt(discordant / (queries + z * z))


def sentences(power: Power, look: int, last: int | None = None) -> list[str]:
    """For people: of the next look, where it is another of the last that there can be, and of slices."""
    level = significance(power.gate.significance, look)
    share = f"{100 * power.share:.0f} %"
    basis = f"{share} assumed" if power.discordant is None else f"{share} in the last evaluation"
    later = f", at look {last} one under {power.smallest_gain(last):.1f}" if last and last > look else ""
    found = [
        f"With {power.queries} held-out queries a gain under {power.smallest_gain(look):.1f} points will most likely"
        f" not be seen (look {look} wants p < {level:.2g}; {100 * POWER:.0f} % power; queries that the arms score"
        f" differently: {basis}){later}."
    ]
    if small := power.small_slices():
        named = ", ".join(f"{group!r} ({n})" for group, n in list(small.items())[:SHOWN])
        more = f" and {len(small) - SHOWN} more" if len(small) > SHOWN else ""
        found.append(
            f"Slices too small to show a loss of gate.maxSliceLossPoints = {power.gate.max_slice_loss_points:g}:"
            f" {named}{more}; {power.wanted_of_a_slice()} queries each would do, and under {MIN_SLICE} a slice never"
            " decides."
        )
    return found


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)
