"""Simulated canaries that are looked at as answers come: who promotes what does not gain, and after how many answers.

    python tests/benchmarks/gate_bench.py [--canaries 20000] [--seed 0]

Each world says how often the stable arm is right and how often the arms differ on one query. In each a candidate is
worth nothing, the minimum effect (4 points), twice that, or loses that much; the tests of `TESTS` judge it. Answers are
those drawn from both arms, on average, by those of a fixed two-proportion z-test (one-sided alpha .05, power .80) that
is sized for the minimum effect. A test that has not decided after twice that many does not promote.

Our paired test is told the discordance that an offline report of 1,000 held-out queries showed, drawn anew for each
canary. Needs numpy only. The last line is one JSON object, of that test in the first world: {"false_promotion",
"power", "samples_vs_fixed_at_mde", "samples_vs_fixed_at_2mde", "missed_harm", "canaries"}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cowest_operator.anytime import Design

ALPHA, POWER, EFFECT = 0.05, 0.80, 0.04
HELD_OUT = 1_000  # queries of the offline report that a canary is planned by
STEPS = ((10, 50), (50, 100))  # today's canary by default: percent of the traffic, minAnswers
LOOKS, MAX_LOSS, CONTROL = 3, 0.05, 30  # LOOKS_PER_STEP, canary.maxLossPoints, MIN_CONTROL_ANSWERS
POINT = 20  # answers in one point of a metric, as a metrics store would give them to Kayenta
KAYENTA = 0.98, 0.25  # confidence of its Mann-Whitney interval, share of the estimate that it must exclude besides 0
Z = NormalDist().inv_cdf
Ints, Bools = NDArray[np.int64], NDArray[np.bool_]


@dataclass(frozen=True)
class World:
    base: float  # share of queries that the stable arm has right
    discordant: float  # share of queries that one arm alone has right

    def won(self, effect: float) -> float:
        """The candidate's share of the pairs with a winner."""
        return (1 + effect / self.discordant) / 2


WORLDS = (World(0.6, 0.2), World(0.6, 0.1), World(0.6, 0.4), World(0.3, 0.2), World(0.9, 0.1))
EFFECTS: Mapping[str, float] = {"null": 0.0, "mde": EFFECT, "2mde": 2 * EFFECT, "harm": -EFFECT}


@dataclass(frozen=True)
class Outcome:
    promoted: Bools
    answers: Ints


Test = Callable[[World, float, int, np.random.Generator], Outcome]


def fixed_size(world: World) -> int:
    """Answers of each arm that the fixed z-test needs for the minimum effect."""
    p, q = world.base, world.base + EFFECT
    return math.ceil((Z(1 - ALPHA) + Z(POWER)) ** 2 * (p * (1 - p) + q * (1 - q)) / EFFECT**2)


# ---------------------------------------------------------------- pairs, looked at after each
def anytime(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """Ours, planned by what the offline report of each canary showed of the discordance (to a percent)."""
    seen = np.maximum(1, np.round(100 * rng.binomial(HELD_OUT, world.discordant, n) / HELD_OUT)) / 100
    return _anytime(world, effect, seen, rng)


def anytime_assumed(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """Ours, planned by 20 % discordant, whatever it is."""
    return _anytime(world, effect, np.full(n, 0.2), rng)


def _anytime(world: World, effect: float, seen: NDArray[np.float64], rng: np.random.Generator) -> Outcome:
    """Only pairs with a winner move the wealth; how many pairs that took is drawn afterwards."""
    horizon = math.ceil(2 * fixed_size(world) * world.discordant)
    promoted, moves = np.zeros(len(seen), bool), np.full(len(seen), horizon)
    for discordant in np.unique(seen):
        of = np.flatnonzero(seen == discordant)
        design = Design(EFFECT, float(discordant), ALPHA, 1 - POWER)
        promote, stop = design.promote, design.stop
        for block in np.array_split(of, max(1, len(of) * horizon // 4_000_000)):
            wins = rng.random((len(block), horizon), np.float32) < world.won(effect)
            wealth = np.cumsum(np.where(wins, math.log1p(design.bet), math.log1p(-design.bet)), axis=1)
            ended = (wealth >= promote) | (wealth <= stop)
            first = np.where(ended.any(axis=1), ended.argmax(axis=1), horizon - 1)
            promoted[block], moves[block] = wealth[np.arange(len(block)), first] >= promote, first + 1
    return Outcome(promoted, 2 * (moves + rng.negative_binomial(moves, world.discordant)))


def learnt(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """The same bet, but by the discordance of the pairs so far (a predictable bet, Waudby-Smith & Ramdas 2024)."""
    n, horizon = max(1, n // 10), math.ceil(2 * fixed_size(world) * world.discordant)
    wins = rng.random((n, horizon), np.float32) < world.won(effect)
    pairs = np.cumsum(rng.geometric(world.discordant, (n, horizon)), axis=1)
    before = np.concatenate([np.zeros((n, 1)), pairs[:, :-1]], axis=1)
    bet = np.minimum(0.9, EFFECT * (before + 100) / (np.arange(horizon) + 20))  # begins at 20 % of 100 pairs
    wealth = np.cumsum(np.where(wins, np.log1p(bet), np.log1p(-bet)), axis=1)
    return _ended(pairs, wealth >= math.log(1 / ALPHA), wealth <= math.log(1 - POWER))


def jeffreys(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """A mixture over all shares p (Beta 1/2, 1/2): needs no discordance and knows no effect, so it has no futility."""
    n, horizon = max(1, n // 10), math.ceil(2 * fixed_size(world) * world.discordant)
    wins = np.cumsum(rng.random((n, horizon), np.float32) < world.won(effect), axis=1)
    pairs = np.cumsum(rng.geometric(world.discordant, (n, horizon)), axis=1)
    moves = np.arange(1, horizon + 1)
    half = np.concatenate([[0.0], np.cumsum(np.log(np.arange(horizon) + 0.5))])  # of Gamma(k + 1/2) / Gamma(1/2)
    wealth = moves * math.log(2) + half[wins] + half[moves - wins] - LOG[moves]
    # Two-sided: one side has half of the chance, so 1 / (2 alpha) is enough.
    better = (wealth >= math.log(1 / (2 * ALPHA))) & (2 * wins > moves)
    return _ended(pairs, better, np.zeros_like(better))


def _ended(pairs: Ints, better: Bools, futile: Bools) -> Outcome:
    """By the first pair with a winner at which one of the two holds, or else by the last."""
    ended, rows = better | futile, np.arange(len(pairs))
    first = np.where(ended.any(axis=1), ended.argmax(axis=1), pairs.shape[1] - 1)
    return Outcome(better[rows, first], 2 * pairs[rows, first])


# ---------------------------------------------------------------- today's live gate
def today_replayed(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """`promotion.judge_live` with ShadowReplay: exact McNemar against a loss at 1, 2 and 4 times minAnswers."""
    shares = _pair_shares(world, effect)

    def more(control: int, pairs: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        drawn = rng.multinomial(pairs, shares, n)
        return drawn[:, 0].astype(float), drawn[:, 1].astype(float), 2 * pairs

    def losing(better: Ints, worse: Ints, pairs: int, control: int) -> tuple[Bools, NDArray[np.float64]]:
        return _by_pair(better, worse, lambda b, w: _binomial_tail(w, b + w)) < _level(), (better - worse) / pairs

    return _today(n, more, losing)


def today_two_samples(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """The same with the answers that users got: Fisher's exact test, the control as large as the traffic makes it."""

    def more(control: int, pairs: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        ours, theirs = rng.binomial(pairs, world.base + effect, n), rng.binomial(control, world.base, n)
        return ours.astype(float), theirs.astype(float), pairs + control

    def losing(ours: Ints, theirs: Ints, pairs: int, control: int) -> tuple[Bools, NDArray[np.float64]]:
        p = _by_pair(ours, theirs, lambda a, b: _fisher_tail(b, control, a, pairs))
        return p < _level(), ours / pairs - theirs / control

    return _today(n, more, losing)


def _level() -> float:
    return ALPHA / (LOOKS * len(STEPS))


def _today(n: int, more: Callable[..., tuple], losing: Callable[..., tuple]) -> Outcome:  # type: ignore[type-arg]
    promoted, answers = np.ones(n, bool), np.zeros(n, np.int64)
    for percent, least in STEPS:
        running = promoted.copy()
        ours, theirs, have = np.zeros(n, np.int64), np.zeros(n, np.int64), 0
        for look in range(LOOKS):
            pairs = least * 2**look
            others = max(CONTROL, pairs * (100 - percent) // percent)
            added = max(CONTROL, (pairs - have) * (100 - percent) // percent)
            a, b, drawn = more(added, pairs - have)
            ours, theirs, have = ours + a.astype(np.int64), theirs + b.astype(np.int64), pairs
            answers += np.where(running, drawn, 0)
            worse, difference = losing(ours, theirs, pairs, others)
            back = running & (worse | ((difference < -MAX_LOSS) & (look == LOOKS - 1)))
            promoted &= ~back
            running &= ~back & (difference < -MAX_LOSS)
    return Outcome(promoted, answers)


# ---------------------------------------------------------------- peers, on two samples
def fixed_z(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """One look, at the planned size."""
    return _sequence(world, effect, n, rng, fixed_size(world), 1, lambda d, v, k: d > Z(1 - ALPHA) * np.sqrt(v / k))


def peeked_z(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """The same test, looked at 20 times until then."""
    return _sequence(world, effect, n, rng, fixed_size(world), 20, lambda d, v, k: d > Z(1 - ALPHA) * np.sqrt(v / k))


def msprt(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """Mixture SPRT of two samples (Johari, Koomen, Pekelis & Walsh 2022): a normal mixture as wide as the effect."""

    def beats(d: NDArray[np.float64], v: NDArray[np.float64], k: int) -> Bools:
        spread = v + k * EFFECT**2
        grown = 0.5 * np.log(v / spread) + (k * EFFECT * d) ** 2 / (2 * v * spread)
        return (grown >= math.log(1 / ALPHA)) & (d > 0)

    return _sequence(world, effect, n, rng, 2 * fixed_size(world), 200, beats)


def _sequence(
    world: World, effect: float, n: int, rng: np.random.Generator, size: int, looks: int,
    beats: Callable[[NDArray[np.float64], NDArray[np.float64], int], Bools],
) -> Outcome:  # fmt: skip
    """Equal arms that are looked at `looks` times up to `size` answers each; whoever beats the control is promoted."""
    ours, theirs, k = np.zeros(n, np.int64), np.zeros(n, np.int64), 0
    promoted, answers = np.zeros(n, bool), np.full(n, 2 * size)
    for look in range(1, looks + 1):
        more = size * look // looks - k
        k += more
        ours += rng.binomial(more, world.base + effect, n)
        theirs += rng.binomial(more, world.base, n)
        p, q = ours / k, theirs / k
        beaten = beats(p - q, np.maximum(p * (1 - p) + q * (1 - q), 1e-9), k) & ~promoted
        answers[beaten] = 2 * k
        promoted |= beaten
    return Outcome(promoted, answers)


def kayenta(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """As it is used: points of a metric, looked at 8 times; promoted at the end unless it is Low at a look."""
    n, points = max(1, n // 10), max(8, fixed_size(world) // POINT)
    lost, answers = np.zeros(n, bool), np.full(n, 2 * points * POINT)
    for at, (low, _) in _kayenta_looks(world, effect, n, points, rng):
        now = low & ~lost
        answers[now] = 2 * at * POINT
        lost |= now
    return Outcome(~lost, answers)


def kayenta_high(world: World, effect: float, n: int, rng: np.random.Generator) -> Outcome:
    """The same, promoted as soon as it is High."""
    n, points = max(1, n // 10), max(8, fixed_size(world) // POINT)
    won, lost, answers = np.zeros(n, bool), np.zeros(n, bool), np.full(n, 2 * points * POINT)
    for at, (low, high) in _kayenta_looks(world, effect, n, points, rng):
        ended = (low | high) & ~won & ~lost
        answers[ended] = 2 * at * POINT
        won, lost = won | (ended & high), lost | (ended & ~high)
    return Outcome(won, answers)


def _kayenta_looks(world: World, effect: float, n: int, points: int, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """Low and High of its Mann-Whitney classifier: the interval of the shift is beyond a quarter of its estimate."""
    ours = rng.binomial(POINT, world.base + effect, (n, points)) / POINT
    theirs = rng.binomial(POINT, world.base, (n, points)) / POINT
    confidence, share = KAYENTA
    for at in sorted({points * look // 8 for look in range(1, 9)}):
        half = Z((1 + confidence) / 2) * math.sqrt(at * at * (2 * at + 1) / 12)
        rank = max(0, math.floor(at * at / 2 - half))
        wanted = (rank, at * at // 2, at * at - 1 - rank)
        found = [
            np.partition((a[:, :at, None] - b[:, None, :at]).reshape(len(a), -1), wanted, axis=1)[:, list(wanted)]
            for a, b in zip(np.array_split(ours, -(-n // 100)), np.array_split(theirs, -(-n // 100)), strict=True)
        ]
        least, estimate, most = np.concatenate(found).T
        yield at, (most < -share * np.abs(estimate), least > share * np.abs(estimate))


# ---------------------------------------------------------------- exact tails
def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


LOG = _log_factorials(20_000)


def _by_pair(a: Ints, b: Ints, tail: Callable[[int, int], float]) -> NDArray[np.float64]:
    """`tail` of each distinct pair of counts, computed once."""
    pairs, where = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
    return np.array([tail(int(x), int(y)) for x, y in pairs.T])[where.ravel()]


def _binomial_tail(least: int, n: int) -> float:
    k = np.arange(least, n + 1)
    return float(np.exp(LOG[n] - LOG[k] - LOG[n - k] - n * math.log(2)).sum())


def _fisher_tail(wins: int, n: int, other_wins: int, other_n: int) -> float:
    pooled = wins + other_wins
    k = np.arange(wins, min(n, pooled) + 1)
    k = k[pooled - k <= other_n]
    whole = LOG[n + other_n] - LOG[pooled] - LOG[n + other_n - pooled]
    first, second = LOG[n] - LOG[k] - LOG[n - k], LOG[other_n] - LOG[pooled - k] - LOG[other_n - pooled + k]
    return float(np.exp(first + second - whole).sum())


def _pair_shares(world: World, effect: float) -> list[float]:
    """Of pairs that the candidate wins, loses and neither."""
    won = world.discordant * world.won(effect)
    return [won, world.discordant - won, 1 - world.discordant]


# ---------------------------------------------------------------- the table
TESTS: Mapping[str, Test] = {
    "anytime, pairs": anytime,
    "anytime, 20 % assumed": anytime_assumed,
    "bet learnt on the way": learnt,
    "mixture over p, pairs": jeffreys,
    "today, replayed": today_replayed,
    "today, two samples": today_two_samples,
    "mSPRT": msprt,
    "fixed z-test": fixed_z,
    "fixed z-test, 20 looks": peeked_z,
    "Kayenta, unless Low": kayenta,
    "Kayenta, if High": kayenta_high,
}


def measured(test: Test, world: World, canaries: int, seed: int) -> dict[str, float]:
    """Promoted shares and mean answers (by those of the fixed test) for each effect."""
    whole, found = 2 * fixed_size(world), {}
    for number, (name, effect) in enumerate(EFFECTS.items()):
        outcome = test(world, effect, canaries, np.random.default_rng([seed, number]))
        found[name] = float(outcome.promoted.mean())
        found[f"{name}_answers"] = float(outcome.answers.mean()) / whole
    return found


def shown(values: Mapping[str, float], suffix: str = "") -> str:
    return " ".join(f"{values[effect + suffix]:7.3f}" for effect in EFFECTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=20_000, help="of each effect; a tenth where one costs memory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ours: dict[str, float] = {}
    gains = " ".join(f"{100 * effect:+7.0f}" for effect in EFFECTS.values())
    for world in WORLDS:
        begun, rates = time.monotonic(), f"{100 * world.base:.0f} % right, {100 * world.discordant:.0f} % discordant"
        print(f"\nstable {rates}; the fixed test draws {2 * fixed_size(world)} answers")
        print(f"{'':24}  promoted at points{'':16}answers by the fixed test's\n{'':24}{gains}   {gains}")
        for name, test in TESTS.items():
            seen = measured(test, world, args.canaries, args.seed)
            print(f"{name:24}{shown(seen)}   {shown(seen, '_answers')}", flush=True)
            ours = ours or seen
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
    result = {
        "false_promotion": round(ours["null"], 4),
        "power": round(ours["mde"], 4),
        "samples_vs_fixed_at_mde": round(ours["mde_answers"], 4),
        "samples_vs_fixed_at_2mde": round(ours["2mde_answers"], 4),
        "missed_harm": round(ours["harm"], 4),
        "canaries": args.canaries,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
