"""Learn which queries need no draft, and which no strong model, from what the round's drafts were worth.

For spec.collaboration.shortcuts.strongAlone and weakAlone: run between `feedback` and `dpo` where one is declared.

    strongAlone   was the answer with the draft better than the strong model's alone? (share of the query's drafts)
    weakAlone     was the answer better than the greedy draft taken as the answer?

The training queries alone are looked at. The threshold is the highest at which, on queries that were held back while
fitting (five folds), the loss in score stays below `maxLoss`. Whether it is gone by is decided elsewhere: `evaluate`
measures the loss on the held-out queries.

Writes predictor.json (cowest_serving/predictor.py reads it), README.md (the card) and manifest.json.

    python -m cowest_training.predictor --job job.yaml --feedback s3://b/j/r3/feedback --dataset s3://b/j/r3/collect \\
        --calls calls.sqlite --round 3 --out s3://b/j/r3/predictor
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from cowest_serving import store
from cowest_serving.contract import PREDICTOR_FILE, RouteLimits, digest_of
from cowest_serving.predictor import BUCKETS, Head, Predictor, dump_predictor, features
from cowest_serving.predictor import scale as scale_of

from . import steps
from .asking import open_asking
from .cards import predictor_card
from .contract import EXIT_OK, LEDGER, Manifest, Row, StepError, StepSettings, evaluator_digest
from .data import read_rows

STEP = "predictor"
FEWEST = 50  # queries: fewer say nothing
FOLDS = 5
STRENGTH = 1.0  # of the pull of all weights towards 0
ONE_SIDED = 1.645
Floats = NDArray[np.float64]


def main(argv: Sequence[str] | None = None) -> int:
    args = _flags(argv)
    settings = steps.load_settings(args.job)
    limits = declared(settings)
    if not limits:
        raise StepError("spec.collaboration.shortcuts: wanted strongAlone or weakAlone, saw neither. Declare one.")
    ledger = steps.need_manifest(args.feedback, what="--feedback")
    inputs = {
        "feedback": ledger.digest,
        "evaluator": evaluator_digest(settings.feedback.evaluator),
        "limits": {name: limit.max_loss for name, limit in limits.items()},
        "seed": settings.training.seed,
    }
    output = steps.open_output(args.out, step=STEP, inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    rows = {row.id: row for row in read_rows(steps.dataset_file(args.dataset))}
    records = pq.ParquetFile(BytesIO(store.get(store.join(args.feedback, LEDGER)))).read().to_pylist()
    queries = by_query(records, rows)
    weak = asyncio.run(_weak_scores(settings, args, queries, digest_of(inputs))) if "weakAlone" in limits else []
    seed = settings.training.seed
    learnt = {name: learn(examples(name, queries, weak), limits[name].max_loss, seed) for name in limits}
    data = dump_predictor(Predictor({name: found.head for name, found in learnt.items() if found.head}))
    metrics = {"queries": len(queries), **{name: found.metrics for name, found in learnt.items()}}
    for name, found in learnt.items():
        if found.head is None:
            steps.say(f"{name}: no query is seen to do without; nothing will be routed by it.")
    (output.folder / PREDICTOR_FILE).write_bytes(data)
    card = predictor_card(digest_of(data), inputs, metrics, steps.code_version())
    (output.folder / "README.md").write_text(card, encoding="utf-8")
    output.finish(kind="Predictor", metrics=metrics, digest=digest_of(data))
    return EXIT_OK


def _flags(argv: Sequence[str] | None) -> Any:
    flags = steps.parser(__doc__)
    flags.add_argument("--feedback", required=True, metavar="URI", help="output of the round's `feedback`")
    flags.add_argument("--dataset", required=True, metavar="URI", help="the data set that it asked")
    flags.add_argument("--calls", required=True, metavar="FILE", help="book of paid calls (SQLite, local)")
    flags.add_argument("--round", required=True, type=int, metavar="N", help="whose budget pays a judge")
    return flags.parse_args(argv)


def declared(settings: StepSettings) -> dict[str, RouteLimits]:
    """The shortcuts that need a predictor, by their names in the manifest."""
    shortcuts = settings.collaboration.shortcuts
    return shortcuts.routed if shortcuts else {}


# ---------------------------------------------------------------- what is learnt from
@dataclass(frozen=True)
class Query:
    """One query of the ledger and its drafts, the greedy one first."""

    row: Row
    drafts: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Examples:
    """For each query its features, whether the longer way was better (0 to 1), and by how much."""

    features: Sequence[Sequence[int]]
    better: Floats
    gain: Floats


def by_query(records: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]) -> list[Query]:
    """Those of which all was asked: which drafts were not hangs on the scores of those before."""
    found = ((id_, list(drafts)) for id_, drafts in groupby(records, key=lambda record: record["query_id"]))
    groups = ((id_, drafts) for id_, drafts in found if all(draft["gain"] is not None for draft in drafts))
    return [Query(rows[id_], sorted(drafts, key=lambda draft: draft["draft_index"])) for id_, drafts in groups]


async def _weak_scores(settings: StepSettings, args: Any, queries: Sequence[Query], inputs: str) -> list[float]:
    """Of each greedy draft taken as the answer. Free of calls, but for a judge."""
    purpose = f"predictor:{inputs[7:19]}"
    async with open_asking(
        settings.strong, settings.feedback.evaluator, args.calls, purpose=purpose, round_number=args.round,
        redaction=settings.collaboration.redaction,
    ) as asking:  # fmt: skip
        return await asyncio.gather(*(asking.score_text(query.row, query.drafts[0]["draft"]) for query in queries))


def examples(name: str, queries: Sequence[Query], weak: Sequence[float]) -> Examples:
    found = [features(query.row.query) for query in queries]
    if name == "weakAlone":
        gains = [[query.drafts[0]["answer_score"] - score] for query, score in zip(queries, weak, strict=True)]
    else:
        gains = [[draft["gain"] for draft in query.drafts] for query in queries]
    better = np.array([np.mean([gain > 0 for gain in each]) for each in gains])
    return Examples(found, better, np.array([np.mean(each) for each in gains]))


# ---------------------------------------------------------------- learning (pure)
@dataclass(frozen=True)
class Learnt:
    head: Head | None  # None: no threshold keeps the loss small enough
    metrics: Mapping[str, Any]


def learn(seen: Examples, max_loss: float, seed: int) -> Learnt:
    n = len(seen.features)
    if n < FEWEST:
        return Learnt(None, {"routed": 0.0, "loss": 0.0, "queries_wanted": FEWEST})
    table = as_table(seen.features)
    chances = held_back_chances(table, seen.better, seed)
    threshold, routed, loss = choose_threshold(chances, seen.gain, max_loss)
    metrics = {"routed": routed, "loss": loss, "better": float(seen.better.mean())}
    if threshold is None:
        return Learnt(None, metrics)
    weights = fit(table, seen.better)
    return Learnt(Head(weights[:-1].tolist(), float(weights[-1]), threshold), metrics)


def as_table(found: Sequence[Sequence[int]]) -> csr_matrix:
    """A row a query, as `Head.chance` weighs it; the last column is the bias."""
    values = [value for each in found for value in (*[scale_of(each)] * len(each), 1.0)]
    columns = [column for each in found for column in (*each, BUCKETS)]
    starts = np.cumsum([0, *(len(each) + 1 for each in found)])
    return csr_matrix((values, columns, starts), shape=(len(found), BUCKETS + 1))


def fit(table: csr_matrix, better: Floats) -> Floats:
    """Weights and bias of a logistic regression whose weights are drawn towards 0."""
    pulled = np.append(np.full(BUCKETS, STRENGTH), 0.0)

    def loss(weights: Floats) -> tuple[float, Floats]:
        totals = table @ weights
        chances = 1 / (1 + np.exp(-totals))
        value = float((np.logaddexp(0, totals) - better * totals).sum() + 0.5 * (pulled * weights**2).sum())
        return value, table.T @ (chances - better) + pulled * weights

    return np.asarray(minimize(loss, np.zeros(BUCKETS + 1), jac=True, method="L-BFGS-B").x)


def held_back_chances(table: csr_matrix, better: Floats, seed: int) -> Floats:
    """Of each query by weights that were fitted without it."""
    n = len(better)
    folds = np.random.default_rng(seed).permutation(n) % FOLDS
    chances = np.empty(n)
    for fold in range(FOLDS):
        inside = folds == fold
        weights = fit(table[~inside], better[~inside])
        chances[inside] = 1 / (1 + np.exp(-(table[inside] @ weights)))
    return chances


def choose_threshold(chances: Floats, gain: Floats, max_loss: float) -> tuple[float | None, float, float]:
    """(threshold, share that is routed, loss of the mean score): the most that can be routed within the limit.

    The loss over all queries must be within it with 95 % confidence, and that of those routed by itself: a few queries
    at which all is lost would be within the first alone.
    """
    n = len(gain)
    order = np.argsort(chances, kind="stable")
    in_order, gains = chances[order], gain[order]
    mean, square = np.cumsum(gains) / n, np.cumsum(gains**2) / n
    high = mean + ONE_SIDED * np.sqrt(np.maximum(square - mean**2, 0.0) / n)
    apart = np.append(in_order[:-1] < in_order[1:], True)  # equal chances go the same way
    of_routed = np.cumsum(gains) / np.arange(1, n + 1)
    fitting = np.flatnonzero((high <= max_loss) & (of_routed <= max_loss) & apart)
    if not len(fitting):
        return None, 0.0, 0.0
    last = int(fitting[-1])
    above = float(in_order[last + 1]) if last + 1 < n else 1.0
    return (float(in_order[last]) + above) / 2, (last + 1) / n, float(mean[last])


if __name__ == "__main__":
    steps.run(main)
