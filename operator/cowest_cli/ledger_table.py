"""The gain ledger as a table: its columns, the queries of a round, filters, sums, forms for export. Pure.

A row is a draft of one query in one round. `cowest ledger` (`ledger.py`) reads and shows it; why it is so stands in
docs/decisions/0012.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa

from cowest_serving.contract import message_text
from cowest_serving.leases import Spent
from cowest_training.contract import LEDGER_COLUMNS, Manifest, StepError

Record = Mapping[str, Any]


# ---------------------------------------------------------------- the schema
@dataclass(frozen=True)
class Column:
    kind: str
    meaning: str


# What the feedback step writes, in words.
_MEANINGS = {
    "query_id": "of the row in the round's data set",
    "query": "text of the last user message",
    "reference": "the right answer as the data has it",
    "group": "slice that the query belongs to",
    "draft_index": "0 is the greedy draft, the others are sampled",
    "seed": "that the draft was sampled with",
    "draft": "what the weak model wrote",
    "draft_tokens": "its length",
    "draft_finish_reason": "`stop`, or `length` where it was cut off; empty in ledgers of older versions",
    "answer": "of the strong model with this draft; null where it was not asked (`feedback.calls`)",
    "answer_score": "of that answer by the evaluator, 0 to 1",
    "solo": "answer of the strong model without a draft; null where it was not asked",
    "solo_score": "of that answer",
    "gain": "`answer_score` - `solo_score`; null where one of them was not asked for",
    "answer_call": "key of the paid call; equal drafts share it",
    "solo_call": "key of the paid call; shared by all drafts of the query, and by rounds",
    "weak_digest": "of the weak model that drafted",
    "prompts_digest": "of the three prompts",
    "strong_model": "that answered, by its own word",
    "strong_version": "of it, empty where the endpoint names none",
    "evaluator_digest": "of the evaluator's settings and of the rules that it scores by: its version",
    "answer_input_tokens": "that the call of the answer took",
    "answer_output_tokens": "that it gave",
    "answer_money": "that it cost, by `strong.prices` of its time",
    "solo_input_tokens": "that the call of the solo answer took",
    "solo_output_tokens": "that it gave",
    "solo_money": "that it cost",
    "propensity": "chance with which all of the query was asked; null where only what decides was",
}
_BESIDE = {
    "round": Column("int32", "number of the round"),
    "pair_digest": Column("string", "of weak model, prompts, draft form and strong model together"),
    "rule": Column("string", "by which the round made pairs"),
    "role": Column("string", "`chosen` or `rejected` in a pair of the round, else null"),
    "currency": Column("string", "of the money, by `strong.prices` of today"),
    "made": Column("string", "when the feedback step began, RFC 3339"),
    "cowest_version": Column("string", "of the code that wrote the ledger"),
}
COLUMNS: Mapping[str, Column] = {
    **{name: Column(kind, _MEANINGS[name]) for name, kind in LEDGER_COLUMNS.items()},
    **_BESIDE,
}
# Without these a row says nothing; any other column that an older ledger lacks is null.
NEEDED = (
    "query_id", "query", "draft_index", "draft", "answer_score", "solo_score", "gain", "answer_call", "solo_call",
)  # fmt: skip
# The preference form of TRL: lists of messages; what follows `rejected` says where the pair is from.
PAIR_COLUMNS: Mapping[str, str] = {
    "prompt": "messages that the weak model saw",
    "chosen": "the draft that was worth more, as one message of the assistant",
    "rejected": "the draft that was worth less",
    "chosen_score": "of the strong model's answer with the chosen draft, 0 to 1",
    "rejected_score": "of its answer with the rejected draft",
    "solo_score": "of its answer without a draft",
    "round": "number of the round",
    "query_id": "of the row in the round's data set",
    "group": "slice that the query belongs to",
    "weak_digest": "of the weak model that drafted",
    "prompts_digest": "of the three prompts",
    "pair_digest": "of weak model, prompts, draft form and strong model together",
    "strong_model": "that answered, by its own word",
    "strong_version": "of it, empty where the endpoint names none",
    "evaluator_digest": "the evaluator's version",
}
_KINDS = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "double": pa.float64()}
_TALK = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PAIR_KINDS = {
    "prompt": _TALK, "chosen": _TALK, "rejected": _TALK, "round": pa.int32(),
    "chosen_score": pa.float64(), "rejected_score": pa.float64(), "solo_score": pa.float64(),
}  # fmt: skip


def table(queries: Iterable[Query]) -> pa.Table:
    """All rows, typed as `COLUMNS` says."""
    schema = pa.schema([(name, _KINDS[column.kind]) for name, column in COLUMNS.items()])
    return pa.Table.from_pylist([dict(row) for query in queries for row in query.rows], schema=schema)


def preferences(queries: Iterable[Query]) -> pa.Table:
    """The rounds' pairs in TRL's conversational preference form."""
    schema = pa.schema([(name, _PAIR_KINDS.get(name, pa.string())) for name in PAIR_COLUMNS])
    return pa.Table.from_pylist([pair for query in queries for pair in _preferences(query)], schema=schema)


def _preferences(query: Query) -> Iterator[dict[str, Any]]:
    for pair in query.pairs:
        scores = {name: pair[name] for name in ("chosen_score", "rejected_score", "solo_score")}
        talk = {
            # Parts and tool calls are no draft's business: a prompt of the weak model is text alone.
            "prompt": [{"role": message["role"], "content": message_text(message)} for message in pair["prompt"]],
            **{side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")},
        }
        yield {**{name: query.best.get(name) for name in PAIR_COLUMNS}, **scores, **talk}


# ---------------------------------------------------------------- one round
def rows_of(
    records: Sequence[Record],
    pairs: Sequence[Record],
    manifest: Manifest,
    prices: Mapping[str, Spent],
    currency: str | None,
) -> list[Query]:
    """The queries of one round: what the step wrote and what is known of it beside; a column that it lacks is null."""
    inputs = manifest.inputs
    beside = {
        "round": inputs.get("round"),
        "pair_digest": inputs.get("pair"),
        "rule": (inputs.get("feedback") or {}).get("rule"),
        "made": manifest.started,
        "cowest_version": manifest.version,
        "currency": currency,
    }
    pairs_by_query: dict[str, list[Record]] = {}
    for pair in pairs:
        pairs_by_query.setdefault(pair["query_id"], []).append(pair)
    found = []
    for query_id, drafts in groupby(records, key=lambda record: record["query_id"]):
        mine = pairs_by_query.get(query_id, [])
        rows = [dict.fromkeys(COLUMNS) | dict(draft) | beside for draft in drafts]
        for row in rows:
            for side in ("answer", "solo"):
                row.update(_price_columns(side, prices.get(row[f"{side}_call"])))
        _note_roles(rows, mine)
        found.append(Query(tuple(rows), tuple(mine)))
    return found


def _price_columns(side: str, paid: Spent | None) -> dict[str, Any]:
    """Nothing where the price is not known: what the step wrote of it stays."""
    if paid is None:
        return {}
    return {
        f"{side}_input_tokens": paid.input_tokens,
        f"{side}_output_tokens": paid.output_tokens,
        f"{side}_money": paid.money,
    }


def _note_roles(rows: Sequence[dict[str, Any]], pairs: Sequence[Record]) -> None:
    """A pair names drafts by their text: of equal ones that score alike the first that is free has the role."""
    for pair in pairs:
        for role in ("chosen", "rejected"):
            wanted = (pair[role], pair[f"{role}_score"])
            row = next((r for r in rows if r["role"] is None and (r["draft"], r["answer_score"]) == wanted), None)
            if row is not None:
                row["role"] = role


@dataclass(frozen=True)
class Query:
    """One query in one round: its drafts in order of index, and the pairs that the round made of them."""

    rows: tuple[Record, ...]
    pairs: tuple[Record, ...] = ()

    @property
    def id(self) -> str:
        return str(self.rows[0]["query_id"])

    @property
    def round(self) -> int:
        return int(self.rows[0]["round"])

    @property
    def scored(self) -> tuple[Record, ...]:
        """The drafts that were asked."""
        return tuple(row for row in self.rows if row["answer_score"] is not None)

    @property
    def best(self) -> Record:
        """Of equal scores the earlier draft, as the rounds' rule has it; the first where none was asked."""
        return min(self.scored or self.rows[:1], key=lambda row: (-(row["answer_score"] or 0), row["draft_index"]))

    @property
    def worst(self) -> Record:
        return min(self.scored or self.rows[:1], key=lambda row: (row["answer_score"] or 0, row["draft_index"]))

    @property
    def gain(self) -> float | None:
        """Of the best draft; None where it is not known."""
        return None if self.best["gain"] is None else float(self.best["gain"])

    @property
    def is_usable(self) -> bool:
        """Whether the round could learn from it."""
        return bool(self.pairs)

    @property
    def is_hurt(self) -> bool:
        """Whether a draft made the answer worse than that of the strong model alone."""
        return (self.worst["gain"] or 0) < 0


# ---------------------------------------------------------------- filters
@dataclass(frozen=True)
class Filters:
    """Which queries are meant; one that is empty takes all."""

    queries: tuple[str, ...] = ()  # an id, or words of the text
    groups: tuple[str, ...] = ()
    usable: bool = False
    hurt: bool = False
    min_gain: float | None = None

    def takes(self, query: Query) -> bool:
        return (
            (not self.queries or any(_is_meant(query, words) for words in self.queries))
            and (not self.groups or query.rows[0]["group"] in self.groups)
            and (query.is_usable or not self.usable)
            and (query.is_hurt or not self.hurt)
            and (self.min_gain is None or (query.gain is not None and query.gain >= self.min_gain - 1e-9))
        )


def chosen(queries: Sequence[Query], filters: Filters) -> list[Query]:
    """What the filters leave. Raises `StepError` for a query or a group that no round knows: a slip of the pen."""
    for words in filters.queries:
        if not any(_is_meant(query, words) for query in queries):
            raise StepError(f"--query {words!r}: wanted the id of a query or words of its text, saw none that fits.")
    known = sorted({query.rows[0]["group"] for query in queries} - {None})
    for group in filters.groups:
        if group not in known:
            raise StepError(f"--group {group!r}: wanted a group of the data, saw {', '.join(known) or 'none at all'}.")
    return [query for query in queries if filters.takes(query)]


def _is_meant(query: Query, words: str) -> bool:
    return words == query.id or words.casefold() in str(query.rows[0]["query"]).casefold()


# ---------------------------------------------------------------- sums
@dataclass(frozen=True)
class Price:
    """What the answers cost, each call counted once. A judge's calls are not among them."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0
    unknown: int = 0  # calls whose price is not at hand


def price_of(queries: Iterable[Query]) -> Price:
    calls: dict[str, tuple[Any, Any, Any]] = {}
    for row in (row for query in queries for row in query.rows):
        for side in ("answer", "solo"):
            if (call := row[f"{side}_call"]) is not None:
                calls[call] = (row[f"{side}_input_tokens"], row[f"{side}_output_tokens"], row[f"{side}_money"])
    known = [paid for paid in calls.values() if None not in paid]
    taken, given, money = (sum(paid[i] for paid in known) for i in range(3))
    return Price(len(calls), taken, given, money, len(calls) - len(known))


@dataclass(frozen=True)
class Summary:
    """One round, over the queries that the filters leave. Means and rates are over drafts."""

    round: int
    rule: str
    of_queries: int  # that the round has
    queries: int
    usable: int
    pairs: int
    drafts: int
    distinct_drafts: int
    asked: int  # of the drafts
    gains: int  # of the drafts, that are known
    mean_gain: float | None  # of these, which are no sample of all where not all was asked
    hurt_rate: float | None
    weak_digest: str
    prompts_digest: str
    pair_digest: str
    evaluator_digest: str
    strong_versions: Mapping[str, int]  # version -> drafts
    price: Price = field(default_factory=Price)


def summaries(all_queries: Sequence[Query], left: Sequence[Query]) -> list[Summary]:
    """A line a round, those of which nothing is left included."""
    return [
        summary(list(queries), [query for query in left if query.round == number])
        for number, queries in groupby(all_queries, key=lambda query: query.round)
    ]


def summary(queries: Sequence[Query], left: Sequence[Query]) -> Summary:
    rows = [row for query in left for row in query.rows]
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    first = queries[0].rows[0]
    return Summary(
        round=queries[0].round,
        rule=str(first["rule"]),
        of_queries=len(queries),
        queries=len(left),
        usable=sum(query.is_usable for query in left),
        pairs=sum(len(query.pairs) for query in left),
        drafts=len(rows),
        distinct_drafts=sum(len({row["draft"] for row in query.rows}) for query in left),
        asked=sum(row["answer_score"] is not None for row in rows),
        gains=len(gains),
        mean_gain=sum(gains) / len(gains) if gains else None,
        hurt_rate=sum(gain < 0 for gain in gains) / len(gains) if gains else None,
        **{name: str(first[name]) for name in ("weak_digest", "prompts_digest", "pair_digest", "evaluator_digest")},
        strong_versions=dict(Counter(str(row["strong_version"]) for row in rows if row["answer_score"] is not None)),
        price=price_of(left),
    )


def as_json(query: Query) -> dict[str, Any]:
    """One query as `-o json` has it: `best` and `worst` are draft indices, the rows are those of the table."""
    first = query.rows[0]
    return {
        **{name: first[name] for name in ("round", "query_id", "query", "reference", "group", "solo", "solo_score")},
        "gain": query.gain,
        "usable": query.is_usable,
        "hurt": query.is_hurt,
        "best": query.best["draft_index"],
        "worst": query.worst["draft_index"],
        "price": asdict(price_of([query])),
        "drafts": [dict(row) for row in query.rows],
    }
