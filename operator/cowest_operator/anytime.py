"""A paired test that may be looked at after every answer: is the candidate better, and is it worth asking on? Pure.

The same queries go through both arms. Pairs that score alike say nothing of which arm is better; of the others a
candidate without a gain wins half. Wealth begins at 1 and bets a fixed share of itself on the candidate at each of
these: it is the likelihood ratio of the least gain worth seeing against no gain. Without a gain it is a martingale, so
it is rarely ever large (Ville 1939; Wald 1945 for the two bounds; Waudby-Smith & Ramdas 2024, section 4, for betting).
It depends on the counts alone: nothing has to be remembered between looks, however often they are made.

    wealth >= promote    Better   P(ever | no gain) <= alpha, whatever the discordance and whenever one looks
    wealth <= stop       Futile   P(ever | the least gain, at the assumed discordance) <= beta

Of graded scores the same wealth, with Ville's bound; and a second one that bets against the least gain says Futile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Counts = Sequence[tuple[float, int]]  # difference of a pair -> how many pairs had it
ASSUMED = 0.2  # of the pairs discordant, where nothing was measured yet
MOST = 0.9  # of the wealth is bet at once: a single loss must not end a trial
SMALL_STEP = 0.15  # of the walk: below it a bound is Ville's, hardly higher then and not to be computed
NEGLIGIBLE = 1e-7  # chances below it are not followed any further, and counted at the most they could come to


@dataclass(frozen=True)
class Design:
    """What is to be seen and how sure; fixed before the first pair, since only then the bounds hold."""

    effect: float  # least mean gain worth seeing, in (0, 1]
    discordant: float  # share of pairs with a winner, as far as is known
    alpha: float = 0.05
    beta: float = 0.2

    def __post_init__(self) -> None:
        if not (0 < self.effect <= 1 and 0 < self.discordant <= 1 and 0 < self.alpha < 1 and 0 < self.beta < 1):
            raise ValueError(f"wanted effect and discordant in (0, 1], alpha and beta in (0, 1), saw {self}")

    @property
    def bet(self) -> float:
        """2p - 1, where p is the candidate's share of the pairs with a winner if it has the least gain."""
        return min(MOST, self.effect / self.discordant)

    @property
    def promote(self) -> float:
        """Log of the wealth that no candidate without a gain reaches but with chance alpha."""
        win, loss = math.log1p(self.bet), math.log1p(-self.bet)
        return bound(self.alpha, win, loss, (1 + self.bet) / 2)

    @property
    def stop(self) -> float:
        """Log of the wealth that no candidate with the least gain falls to but with chance beta."""
        win, loss = math.log1p(self.bet), math.log1p(-self.bet)
        return -bound(self.beta, -loss, -win, 0.5)


@dataclass(frozen=True)
class Evidence:
    """One look: the log of the wealth, and what it is compared with (graded scores are given up by another wealth)."""

    said: Literal["Better", "Futile", "Open"]
    log_wealth: float
    promote: float
    stop: float


def look(design: Design, differences: Counts) -> Evidence:
    """At the candidate's score less the control's, each in [-1, 1], and how many pairs had it.

    Pairs must not belong together: of a user's many count one.
    """
    if all(difference in (-1, 0, 1) for difference, _ in differences):
        wealth, promote, stop = log_wealth(differences, design.bet), design.promote, design.stop
        return Evidence(_said(wealth >= promote, wealth <= stop), wealth, promote, stop)
    wealth, promote = log_wealth(differences, design.bet), math.log(1 / design.alpha)
    # The other way round: with the least gain or more no difference from it is a gain.
    against = log_wealth([(design.effect - difference, n) for difference, n in differences], design.bet)
    stop = math.log(design.beta)
    return Evidence(_said(wealth >= promote, -against <= stop), wealth, promote, stop)


def log_wealth(differences: Counts, bet: float) -> float:
    """Of differences above -1 / bet. Where their mean is 0 or less P(ever >= log(1 / alpha)) <= alpha."""
    return sum(n * math.log1p(bet * difference) for difference, n in differences)


def _said(is_better: bool, is_futile: bool) -> Literal["Better", "Futile", "Open"]:
    return "Better" if is_better else "Futile" if is_futile else "Open"


def share_of(discordant: float, pairs: int) -> float:
    """Of pairs with a winner, by so many that were seen: none in n leaves 3 in n possible (95 %)."""
    return max(discordant, 3 / max(3, pairs))


# ---------------------------------------------------------------- bounds
@lru_cache(maxsize=256)
def bound(level: float, up: float, down: float, p: float) -> float:
    """A height that the walk reaches with chance `level` at most, once its drift is turned round.

    The walk goes `up` with chance p, else `down` (< 0), and drifts upwards: it reaches every height. Both are logs of a
    likelihood ratio, so under the other law it gets there with chance E[exp(-height when first at h or above)].
    That is exp(-h) at most (Ville); as steps overshoot it is less, and large steps save answers by that.
    """
    surely = math.log(1 / level)
    if up < SMALL_STEP:
        return surely
    low, high = surely - up, surely
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if _reached(middle, up, down, p) <= level else (middle, high)
    return high


def _reached(h: float, up: float, down: float, p: float) -> float:
    """An upper limit of E[exp(-height when first at h or above)]: what is left out counts as exp(-h)."""
    reached, left = 0.0, 0.0
    lowest, below = 0, [1.0]  # chances of being below h after n steps, `lowest`, lowest + 1, ... of them up
    n = 0
    while below:
        n += 1
        below = [a * (1 - p) + b * p for a, b in zip((*below, 0.0), (0.0, *below), strict=True)]
        while below and (lowest + len(below) - 1) * up + (n - lowest - len(below) + 1) * down >= h:
            top = lowest + len(below) - 1
            reached += below.pop() * math.exp(-(top * up + (n - top) * down))
        while below and below[0] < NEGLIGIBLE:
            left += below.pop(0)
            lowest += 1
        while below and below[-1] < NEGLIGIBLE:
            left += below.pop()
    return reached + left * math.exp(-h)
