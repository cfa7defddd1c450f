"""What is measured and how sure it is: intervals, one-sided tests and macro-F1 over the evaluator's scores.

Scores lie in [0, 1]. Everything random is drawn from a seed, so the same scores give the same report. Used by
`evaluate` (paired by query) and `score_live` (two samples, or paired with shadow replay).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cowest_training.contract import Comparison

Floats = NDArray[np.float64]
Clusters = tuple[Floats, Floats]  # sums and counts of the scores of each

RESAMPLES = 10_000  # of the bootstrap
PERMUTATIONS = 20_000  # of a sampled permutation test
LEAST = 1 / (PERMUTATIONS + 1)  # its p where no permutation reaches what was seen
EXACT_PAIRS = 14  # up to 2^14 sign flips are enumerated
EXACT_SPLITS = 20_000  # up to so many splits of two samples are enumerated
CELLS = 4_000_000  # of one block of random numbers: 32 MB
CONFIDENCE = 0.95
TINY = 1e-9  # sums of scores closer than this are equal: float addition is not associative


# ---------------------------------------------------------------- intervals
def mean_interval(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) at 95 %: Wilson for 0/1 scores none of which belong together, bootstrap otherwise. No score:
    (0, 0, 1)."""
    if not len(scores):
        return 0.0, 0.0, 1.0
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    sums, _ = _by_cluster(values, clusters)
    if len(sums) == len(values) and is_binary(values):
        return (mean, *wilson(int(values.sum()), len(values)))
    low, high = _percentiles(_resampled_means(values, clusters, np.random.default_rng(seed)), (0.0, 1.0))
    return mean, low, high


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a share; honest also at 0, at 1 and for few answers."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


# ---------------------------------------------------------------- comparisons
def compare_paired(
    candidate: Sequence[float],
    control: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Comparison:
    """The same queries through both arms: exact McNemar for 0/1 scores, else a sign-flip permutation test.

    `clusters` names what queries have in common (a document, a user): the interval resamples these whole, and where one
    has several queries the test flips these whole. A slice is no cluster.
    """
    if len(candidate) != len(control):
        raise ValueError(f"wanted paired scores, saw {len(candidate)} and {len(control)}")
    if not len(candidate):
        return _nothing_known("McNemar")
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    better, worse = int((differences > TINY).sum()), int((differences < -TINY).sum())
    rng = np.random.default_rng(seed)
    sums, _ = _by_cluster(differences, clusters)
    if len(sums) == len(differences) and is_binary(candidate) and is_binary(control):
        test, p_better, p_worse = "McNemar", mcnemar(better, worse), mcnemar(worse, better)
    else:
        test = "PairedPermutation"
        p_better, p_worse = sign_flip(sums, rng)
    low, high = _percentiles(_resampled_means(differences, clusters, rng), (-1.0, 1.0))
    return Comparison(
        n=len(differences),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_better=p_better,
        p_worse=p_worse,
        better=better,
        worse=worse,
        test=test,
    )


def compare_independent(
    candidate: Sequence[float],
    control: Sequence[float],
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Two samples of different queries: Fisher's exact test for 0/1 scores, else a permutation test.

    `clusters`: (of the candidate's, of the control's answers), e.g. users: where one has several answers, the test
    permutes whole clusters, as the split of the traffic drew them. `better` and `worse` are 0 here.
    """
    n = min(len(candidate), len(control))
    if n == 0:
        return _nothing_known("FisherExact")
    ours, theirs = np.asarray(candidate, dtype=np.float64), np.asarray(control, dtype=np.float64)
    rng = np.random.default_rng(seed)
    our_clusters, their_clusters = clusters or (None, None)
    drawn, others = _by_cluster(ours, our_clusters), _by_cluster(theirs, their_clusters)
    clustered = len(drawn[0]) < len(ours) or len(others[0]) < len(theirs)
    if not clustered and is_binary(ours) and is_binary(theirs):
        test = "FisherExact"
        wins, losses = int(ours.sum()), int(theirs.sum())
        p_better = fisher(wins, len(ours), losses, len(theirs))
        p_worse = fisher(losses, len(theirs), wins, len(ours))
    else:
        test = "ClusterPermutation" if clustered else "Permutation"
        p_better, p_worse = permutation(drawn, others, rng)
    our_means, their_means = (
        _resampled_means(ours, our_clusters, rng),
        _resampled_means(theirs, their_clusters, rng),
    )
    draws = None if our_means is None or their_means is None else our_means - their_means
    low, high = _percentiles(draws, (-1.0, 1.0))
    return Comparison(
        n=n,
        difference=float(ours.mean() - theirs.mean()),
        low=low,
        high=high,
        p_better=p_better,
        p_worse=p_worse,
        better=0,
        worse=0,
        test=test,
    )


def _nothing_known(test: str) -> Comparison:
    return Comparison(n=0, difference=0.0, low=-1.0, high=1.0, p_better=1.0, p_worse=1.0, better=0, worse=0, test=test)


# ---------------------------------------------------------------- tests
def mcnemar(better: int, worse: int) -> float:
    """P(at least `better` of the `better + worse` discordant pairs | a fair coin), exact."""
    n = better + worse
    term, tail = 1, 0  # term = C(n, k)
    for k in range(n + 1):
        if k >= better:
            tail += term
        term = term * (n - k) // (k + 1)
    return tail / (1 << n)


def fisher(wins: int, n: int, other_wins: int, other_n: int) -> float:
    """P(at least `wins` of the pooled wins fall on the first sample | no difference), exact."""
    pooled = wins + other_wins
    most = min(n, pooled)
    ways = sum(math.comb(n, k) * math.comb(other_n, pooled - k) for k in range(wins, most + 1) if pooled - k >= 0)
    return ways / math.comb(n + other_n, pooled)


def sign_flip(differences: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """One-sided (p_better, p_worse) of paired differences (or of sums of those that belong together).

    All sign flips for few, sampled ones otherwise; where none of these reaches what was seen, Hoeffding's bound, which
    no exact p exceeds. (With it in the other cases too, the smaller of two p would be too small.)
    Ties carry no information on the sign and are left out.
    """
    moved = differences[np.abs(differences) > TINY]
    observed = float(moved.sum())
    if len(moved) <= EXACT_PAIRS:
        flips = (np.arange(1 << len(moved))[:, None] >> np.arange(len(moved))) & 1
        return _tails(observed, (1 - 2 * flips) @ moved, exact=True)
    sums = np.concatenate(
        [
            (1 - 2 * rng.integers(0, 2, size=(rows, len(moved)), dtype=np.int8)) @ moved
            for rows in _blocks(PERMUTATIONS, len(moved))
        ]
    )
    bound = math.exp(-(max(0.0, abs(observed) - TINY) ** 2) / (2 * float(moved @ moved)))
    p_better, p_worse = (min(p, bound) if p <= LEAST else p for p in _tails(observed, sums, exact=False))
    return p_better, p_worse


def permutation(ours: Clusters, theirs: Clusters, rng: np.random.Generator) -> tuple[float, float]:
    """One-sided (p_better, p_worse) of two means of scores in clusters of one or more: whose each is, is permuted.

    All splits for few clusters, sampled ones otherwise. Answers to one user are alike: from few users they say less
    than as many from many.
    """
    pooled = np.stack([np.concatenate(each) for each in zip(ours, theirs, strict=True)])  # (sums, counts) x clusters
    whole, size, n = pooled.sum(axis=1, keepdims=True), len(ours[0]), pooled.shape[1]

    def differences(chosen: NDArray[np.int64]) -> Floats:
        """Of the means, by rows of the clusters that are ours."""
        mine = pooled[:, chosen].sum(axis=2)
        rest = whole - mine
        means: Floats = mine[0] / mine[1] - rest[0] / rest[1]
        return means

    observed = float(differences(np.arange(size)[None, :])[0])
    if math.comb(n, size) <= EXACT_SPLITS:
        return _tails(observed, differences(np.asarray(list(combinations(range(n), size)))), exact=True)
    order = np.arange(n)
    sampled = np.concatenate(
        [
            differences(rng.permuted(np.broadcast_to(order, (rows, n)), axis=1)[:, :size])
            for rows in _blocks(PERMUTATIONS, 4 * n)
        ]
    )
    return _tails(observed, sampled, exact=False)


def _tails(observed: float, sums: Floats, *, exact: bool) -> tuple[float, float]:
    """Share of sums at least, at most as large as observed; a sampled test counts the observed one in."""
    extra = 0 if exact else 1
    above = int((sums >= observed - TINY).sum()) + extra
    below = int((sums <= observed + TINY).sum()) + extra
    return above / (len(sums) + extra), below / (len(sums) + extra)


# ---------------------------------------------------------------- labels
def macro_f1(predicted: Sequence[str | None], gold: Sequence[str], labels: Sequence[str] | None = None) -> float:
    """Mean F1 over the labels (those seen, if not given). `None` is an answer without a label: a miss.

    Given labels that occur neither in `predicted` nor in `gold` are left out: nothing was asked about them.
    """
    seen = {*gold, *(label for label in predicted if label is not None)}
    wanted = sorted(seen if labels is None else seen & set(labels))
    pairs = list(zip(predicted, gold, strict=True))
    scores = []
    for label in wanted:
        hits = sum(p == label == g for p, g in pairs)
        named = sum(p == label for p, _ in pairs) + sum(g == label for _, g in pairs)
        scores.append(2 * hits / named)
    return sum(scores) / len(scores) if scores else 0.0


# ---------------------------------------------------------------- agreement
def cohen_kappa(tables: Floats) -> Floats:
    """Agreement beyond chance, of counts (..., kinds of label, said by the one, said by the other).

    Where chance alone agrees always, nothing is beyond it: 0.
    """
    observed, chance = _agreement(tables)
    room = 1.0 - chance
    kappa: Floats = np.where(room > TINY, (observed - chance) / np.where(room > TINY, room, 1.0), 0.0)
    return kappa


def kappa_interval(tables: Floats, seed: int = 0) -> tuple[float, float, float]:
    """(kappa, low, high) at 95 % of tables (clusters, kinds, said by the one, said by the other). Nothing: (0, -1, 1).

    At either end the wider of two: the bootstrap of whole clusters, which knows how the labels spread, and Wilson's
    interval of the agreement at the chance that was seen, which is honest where all agree.
    """
    n, whole = len(tables), tables.sum(axis=0)
    observed, chance = (float(share) for share in _agreement(whole))
    if n == 0 or chance > 1.0 - TINY:
        return 0.0, -1.0, 1.0
    ends = wilson(math.floor(observed * n + TINY), n)[0], wilson(math.ceil(observed * n - TINY), n)[1]
    low, high = ((end - chance) / (1.0 - chance) for end in ends)
    rng = np.random.default_rng(seed)
    draws = [
        cohen_kappa(np.tensordot(rng.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64), tables, axes=1))
        for rows in _blocks(RESAMPLES, n)
    ]
    least, most = _percentiles(np.concatenate(draws), (-1.0, 1.0))
    return (observed - chance) / (1.0 - chance), min(low, least), max(high, most)


def _agreement(tables: Floats) -> tuple[Floats, Floats]:
    """(observed, by chance). Chance is that of each kind by itself: "left" and "accept" answer different questions."""
    of_kind = tables.sum(axis=(-2, -1))
    counts = np.maximum(of_kind.sum(axis=-1), TINY)
    observed = np.trace(tables, axis1=-2, axis2=-1).sum(axis=-1) / counts
    products = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1)
    return observed, (products / np.maximum(of_kind, TINY)).sum(axis=-1) / counts


# ---------------------------------------------------------------- resampling
def is_binary(scores: Sequence[float] | Floats) -> bool:
    values = np.asarray(scores, dtype=np.float64)
    return bool(((values == 0) | (values == 1)).all())


def _resampled_means(values: Floats, clusters: Sequence[Hashable] | None, rng: np.random.Generator) -> Floats | None:
    """Means of `RESAMPLES` draws of whole clusters with replacement; `None` for one: it has no spread."""
    sums, counts = _by_cluster(values, clusters)
    if len(sums) < 2:
        return None
    means = []
    for rows in _blocks(RESAMPLES, len(sums)):
        chosen = rng.integers(0, len(sums), size=(rows, len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    return np.concatenate(means)


def _by_cluster(values: Floats, clusters: Sequence[Hashable] | None) -> Clusters:
    """Sums and counts of the values of each cluster, in the order in which the clusters come."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"wanted a cluster for each score, saw {len(clusters)} for {len(values)}")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.asarray([number[cluster] for cluster in clusters])
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _percentiles(means: Floats | None, bounds: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of the draws; without draws, all that is possible."""
    if means is None:
        return bounds
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _blocks(rows: int, columns: int) -> list[int]:
    """Row counts of the blocks in which `rows` x `columns` random numbers are drawn, to bound the memory."""
    size = max(1, CELLS // max(1, columns))
    return [min(size, rows - start) for start in range(0, rows, size)]
