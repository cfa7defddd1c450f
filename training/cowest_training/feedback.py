"""Turn queries into preference pairs of drafts (CoWest, section 3.2).

gain = E(y*, x) - E(z, x): the evaluator's score of the answer given the draft, less that of the strong model alone.

    BestVersusWorst  the best-scoring draft of a query against its worst, where they differ by `minMargin` (z cancels)
    SignOfGain       the paper's: a draft with gain > 0 is chosen, any other rejected; a query with one kind yields none

Writes ledger.parquet (one row a draft), pairs.jsonl and README.md (the card). Differs from the paper: K drafts per
query; the evaluator need not be the strong model; solo answers are paid once per strong model, prompts and query, in
whatever round; with `calls: Deciding` only what the pairs hang on is asked, and the pairs are the same (decision 17).

    python -m cowest_training.feedback --job job.yaml --pair pair.json --dataset s3://b/j/r3/data \\
        --calls calls.sqlite --round 3 --out s3://b/j/r3/feedback

Several machines share the work: `--shard I/N` (0 <= I < N) does one part of it below --out, and `--merge N` makes of
all N the very output that one machine would have written.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.collaborate import draft_messages
from cowest_serving.contract import Pair, digest_of
from cowest_serving.store import join

from . import steps
from .asking import (
    ALL_ZERO,
    UNUSUAL,
    Asking,
    Draft,
    Drafts,
    Paid,
    Recipe,
    Reply,
    change_note,
    drafts_folder,
    each_batch,
    judges_of,
    open_asking,
    read_pair,
    refused_words,
    unusual_words,
)
from .cards import DatasetCard, dataset_card
from .contract import (
    EXIT_OK,
    LEDGER,
    LEDGER_COLUMNS,
    PAIRS,
    Feedback,
    Manifest,
    Row,
    StepError,
    StepSettings,
    calls_of,
    evaluator_digest,
)
from .data import read_rows, rows_digest
from .evaluator import check_references, exact_match, extracted
from .paid_calls import Spent
from .sparing import AT_ONCE, NOISE, Sayings, is_decided, reaches

STEP = "feedback"
SHARDS = "shard-*"


def main(argv: Sequence[str] | None = None) -> int:
    args = _flags(argv)
    settings = steps.load_settings(args.job)
    pair = read_pair(args.pair)
    rows = read_rows(steps.dataset_file(args.dataset))
    check_references(rows, settings.feedback.evaluator)
    chosen = choose_queries(rows, settings.feedback.max_queries, settings.training.seed, args.round)
    inputs = _inputs(settings, pair, rows, args.round)
    if args.generation:
        inputs["generation"] = args.generation
    recipe = Recipe(
        pair=pair,
        drafts_per_query=settings.feedback.drafts_per_query,
        temperature=settings.feedback.temperature,
        max_tokens=settings.collaboration.draft_max_tokens,
        seed=f"{settings.training.seed}/{args.round}",
    )
    out, shard = args.out, args.shard
    if shard:
        if (whole := steps.read_manifest(out)) and steps.is_of(whole, out, step=STEP, inputs=inputs):
            return EXIT_OK  # merged already
        out, inputs, chosen = shard.uri(out), shard.inputs(inputs), shard.queries(chosen, recipe.batch_rows)
    output = steps.open_output(out, step=STEP, inputs=inputs, parts=SHARDS if args.merge else "")
    if isinstance(output, Manifest):
        return EXIT_OK
    progress = steps.Progress(args.progress, STEP)
    drafts = Drafts(recipe, chosen, drafts_folder(args.calls))
    if args.merge:
        asked = read_shards(output, args.merge, chosen, progress)
    else:
        job = _Job(settings, args.calls, args.round, f"feedback:{digest_of(inputs)[7:19]}", len(chosen),
                   args.generation)  # fmt: skip
        asked = asyncio.run(_ask_all(job, drafts, progress))
    if asked.refusal and not shard:  # of one shard alone it is no verdict yet
        raise StepError(asked.refusal)
    pairs = make_pairs(asked.ledger, settings.feedback)
    write_ledger(output.folder / LEDGER, asked.ledger, pair, evaluator_digest(settings.feedback.evaluator))
    write_pairs(output.folder / PAIRS, pairs, pair)
    metrics = measured(asked, pairs, len(chosen), settings.feedback.min_margin)
    for words in notes(metrics):
        steps.say(words)
    for words in refused_words(drafts.refused, len(chosen), "the weak model"):
        steps.say(words)
    if shard:
        output.finish(kind="FeedbackShard", metrics={**metrics, "refusal": asked.refusal})
    else:
        digest = digest_of({name: steps.file_sha256(output.folder / name) for name in (LEDGER, PAIRS)})
        card = dataset_card(card_of(output.inputs, metrics, digest, settings.feedback.rule))
        (output.folder / "README.md").write_text(card, encoding="utf-8")
        output.finish(kind="Feedback", metrics=metrics, digest=digest)
    drafts.forget()
    return EXIT_OK


def _flags(argv: Sequence[str] | None) -> Any:
    flags = steps.parser(__doc__)
    flags.add_argument("--pair", required=True, metavar="FILE", help="pair.json: the pair that drafts and answers")
    flags.add_argument("--dataset", required=True, metavar="URI", help="collected data set, or a JSONL or Parquet file")
    flags.add_argument("--calls", required=True, metavar="FILE", help="book of paid calls (SQLite, local)")
    flags.add_argument("--round", required=True, type=int, metavar="N", help="number of the round")
    steps.add_generation(flags)
    parts = flags.add_mutually_exclusive_group()
    parts.add_argument("--shard", type=Shard.parse, metavar="I/N", help="do part I of N, into OUT/shard-I-of-N")
    parts.add_argument("--merge", type=int, metavar="N", help="make the output of its N finished shards")
    args = flags.parse_args(argv)
    if args.merge is not None and args.merge < 1:
        flags.error(f"--merge: wanted the number of shards, saw {args.merge}")
    return args


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 0) of `of`: whole batches of drafts, so that they are the same as in one piece."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise argparse.ArgumentTypeError(f"wanted I/N with 0 <= I < N, saw {text!r}")
        return cls(int(number), int(of))

    def uri(self, out: str) -> str:
        return join(out, f"shard-{self.number}-of-{self.of}")

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "shard": f"{self.number}/{self.of}"}

    def queries(self, chosen: Sequence[Row], batch_rows: int) -> list[Row]:
        """None where there are fewer batches than shards."""
        batches = -(-len(chosen) // batch_rows)
        first, end = (number * batches // self.of for number in (self.number, self.number + 1))
        return list(chosen[first * batch_rows : end * batch_rows])


def _inputs(settings: StepSettings, pair: Pair, rows: Sequence[Row], round_number: int) -> dict[str, Any]:
    wanted = settings.feedback
    return {
        "pair": pair.digest,
        "data": rows_digest(rows),
        "round": round_number,
        "seed": settings.training.seed,
        "evaluator": evaluator_digest(wanted.evaluator),
        "feedback": {
            "drafts_per_query": wanted.drafts_per_query,
            "temperature": wanted.temperature,
            "rule": wanted.rule,
            "min_margin": wanted.min_margin,
            "max_queries": wanted.max_queries,
            **({} if (calls := calls_of(settings)) == "All" else {"calls": calls, "explore": wanted.explore_percent}),
            **({} if wanted.judging == "Pointwise" else {"judging": wanted.judging}),
        },
        "draft_max_tokens": settings.collaboration.draft_max_tokens,
        "strong_max_tokens": settings.strong.max_tokens,
    }


def choose_queries(rows: Sequence[Row], at_most: int, seed: int, round_number: int) -> list[Row]:
    """A sample that depends on seed, round and ids alone; the order of the file does not count."""
    order = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{round_number}/{row.id}".encode()).digest())
    return order[:at_most]


# ---------------------------------------------------------------- drafts, answers, scores
@dataclass(frozen=True)
class Entry:
    """One line of the gain ledger: a draft and what it was worth."""

    row: Row
    draft: Draft
    answer: Reply | None  # None: not asked, since the pair did not hang on it
    answer_score: float | None
    solo: Reply | None
    solo_score: float | None
    propensity: float | None = 1.0  # chance with which all of the query was asked; None: only what decides was

    @property
    def gain(self) -> float | None:
        if self.answer_score is None or self.solo_score is None:
            return None
        return self.answer_score - self.solo_score


@dataclass(frozen=True)
class _Job:
    settings: StepSettings
    calls: str
    round: int
    purpose: str
    queries: int
    generation: int = 0  # of the strong model


@dataclass(frozen=True)
class Asked:
    """The ledger in the order of the queries, and what it took."""

    ledger: Sequence[Entry]
    spent: Spent
    cached: int  # calls that cost nothing
    judge_calls: int  # of those spent
    unusual: Mapping[str, int]  # answers that were cut off, filtered or empty
    refusal: str = ""  # why there is no entry at all, "" when there is one
    strong: Mapping[str, Any] = field(default_factory=dict)  # who answered, see `Asking.strong_seen`


async def _ask_all(job: _Job, drafts: Drafts, progress: steps.Progress) -> Asked:
    pair, strong = drafts.recipe.pair, job.settings.strong
    async with open_asking(
        strong, job.settings.feedback.evaluator, job.calls, purpose=job.purpose, round_number=job.round,
        redaction=job.settings.collaboration.redaction, generation=job.generation,
    ) as asking:  # fmt: skip
        tasks: list[asyncio.Task[list[Entry]]] = []
        done = 0

        def tick(task: asyncio.Task[list[Entry]]) -> None:
            nonlocal done
            if task.cancelled():  # with the failure of another
                return
            done += 1
            progress.update(done, job.queries, "queries", f"{asking.replies} answers of the strong model")

        # In a task group the first failure ends the others, the drawing of drafts included.
        async with asyncio.TaskGroup() as group:

            def judge(row: Row, found: list[Draft]) -> None:
                query = _Query(asking, row, found, job, pair)
                task = group.create_task(_judge_query(query, job.settings.feedback))
                task.add_done_callback(tick)
                tasks.append(task)

            await each_batch(drafts, judge)
        ledger = [task.result() for task in tasks]
        refusal = ""
        try:
            silent = sum(bool(found) and not _is_asked(found) for found in ledger)
            asking.refuse_nothing_but_errors(len(ledger) - sum(map(bool, ledger)), len(ledger) - silent, drafts.refused)
        except StepError as error:
            refusal = str(error)
        entries = [entry for found in ledger for entry in found]
        cached = sum(asking.calls.asked.cached.values())
        return Asked(
            entries, asking.calls.spent(purpose=job.purpose), cached, asking.judged.calls, asking.unusual, refusal,
            asking.strong_seen,
        )  # fmt: skip


class _Query:
    """One query while it is asked: what came back so far. Its drafts are those of different text, the greedy first."""

    def __init__(self, asking: Asking, row: Row, drafts: Sequence[Draft], job: _Job, pair: Pair) -> None:
        self._asking, self._row, self._drawn, self._pair = asking, row, drafts, pair
        wanted = job.settings.feedback
        self.is_judged = bool(judges_of(asking.evaluator))
        self._listwise, self._extract = wanted.judging == "Listwise" and self.is_judged, wanted.evaluator.extract
        self.is_closed = self._extract is not None  # answers may be compared with the reference
        self.propensity = chance_of_all(row.id, job.settings, job.round)
        self.drafts = [draft.text for draft in drafts]
        self.texts = list(dict.fromkeys(self.drafts))
        self.answers: dict[str, Reply] = {}  # by draft
        self.alone: Reply | None = None
        self._scores: dict[str, float] = {}  # by what counts of an answer

    async def answer(self, texts: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = {text: group.create_task(self._asking.answer(self._row, text, self._pair)) for text in texts}
        self.answers |= {text: task.result() for text, task in tasks.items()}

    async def solo(self) -> None:
        self.alone = await self._asking.solo(self._row, self._pair)

    async def score(self) -> None:
        """What was answered, each text once."""
        new = {part: reply.text for reply in self._replies if (part := self._part(reply)) not in self._scores}
        if new and self._listwise:
            found = await self._asking.grades(self._row, list(new.values()))
        else:
            found = await asyncio.gather(*(self._asking.score_text(self._row, text) for text in new.values()))
        self._scores |= zip(new, found, strict=True)

    def accept(self) -> bool:
        """An answer that is the reference needs no judge. Whether some are, and others are not graded."""
        parts = {self._part(reply) for reply in self._replies}
        self._scores |= {part: 1.0 for part in parts if self._row.reference and exact_match(part, self._row.reference)}
        return 1.0 in self._scores.values() and not parts <= self._scores.keys()

    def says(self, text: str) -> str:
        """What counts of an answer or a draft."""
        return extracted(self._extract, text)

    def _part(self, reply: Reply) -> str:
        return self.says(reply.text)

    def _score(self, reply: Reply | None) -> float | None:
        return self._scores.get(self._part(reply)) if reply else None

    @property
    def _replies(self) -> list[Reply]:
        """Those that are answers."""
        return [reply for reply in (*self.answers.values(), self.alone) if reply and not reply.error]

    @property
    def are_alike(self) -> bool:
        """Whether all answers so far say the same."""
        return len({self._part(reply) for reply in self.answers.values()}) == 1

    @property
    def scores(self) -> list[float]:
        return [score for reply in self.answers.values() if (score := self._score(reply)) is not None]

    @property
    def solo_score(self) -> float | None:
        return self._score(self.alone)

    @property
    def is_refused(self) -> bool:
        return any(reply and reply.error for reply in (*self.answers.values(), self.alone))

    @property
    def entries(self) -> list[Entry]:
        """Nothing where a call was refused."""
        return [self._entry(draft) for draft in ([] if self.is_refused else self._drawn)]

    def _entry(self, draft: Draft) -> Entry:
        answer = self.answers.get(draft.text)
        return Entry(self._row, draft, answer, self._score(answer), self.alone, self.solo_score, self.propensity)


def chance_of_all(query_id: str, settings: StepSettings, round_number: int) -> float | None:
    """That of asking all of a query, where that fell to it: a share of them stands for the rest. None where not."""
    if calls_of(settings) == "All":
        return 1.0
    share = settings.feedback.explore_percent / 100
    seed = f"{settings.training.seed}/{round_number}/{query_id}/explored"
    return share if int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") / 2**64 < share else None


async def _judge_query(query: _Query, wanted: Feedback) -> list[Entry]:
    """Its drafts with what was asked of them. Nothing where there is no draft or a call is refused."""
    if query.propensity is not None:
        if query.texts:
            async with asyncio.TaskGroup() as group:
                group.create_task(query.solo())
                group.create_task(query.answer(query.texts))
            await query.score()
    elif len(query.texts) > 1:  # of one text there is no pair
        if wanted.rule == "SignOfGain":
            await _ask_for_sign(query)
        else:
            await (_ask_for_any if wanted.calls == "Fewest" else _ask_for_extremes)(query, wanted.min_margin)
    return query.entries


async def _ask_for_sign(query: _Query) -> None:
    """Nothing is better than a solo answer that scores 1."""
    await query.solo()
    await query.score()
    if query.solo_score is not None and query.solo_score < 1:
        await query.answer(query.texts)
        await query.score()


async def _ask_for_extremes(query: _Query, min_margin: float) -> None:
    """In the order of the drafts until the pair is known; solo cancels in it. A judge is not asked of answers alike."""
    left, at_once = query.texts, AT_ONCE
    while left and not query.is_refused:
        asked, left = left[:at_once], left[at_once:]
        await query.answer(asked)
        at_once = 1
        if not (query.is_judged and query.are_alike):
            await query.score()
            if is_decided(query.scores, len(left), min_margin):
                return


async def _ask_for_any(query: _Query, min_margin: float) -> None:
    """Until there is a pair, one draft of those that say the same: what most say until an answer is right, then what
    few say. Where answers can be compared with the reference, a judge is asked once one is it and another is not, or of
    all at the end."""
    sayings = Sayings(query.drafts, query.says)
    if sayings.left < AT_ONCE:
        return
    while sayings.left and not query.is_refused:
        await query.answer([sayings.take(common=max(query.scores, default=0.0) < 1)])
        waits = query.is_judged and query.is_closed and not query.accept() and bool(sayings.left)
        if not waits and not (query.is_judged and query.are_alike):
            await query.score()
            if reaches(max(query.scores) - min(query.scores), min_margin):
                return


# ---------------------------------------------------------------- pairs (pure)
@dataclass(frozen=True)
class Preference:
    """Two drafts of one query, the first worth more than the second."""

    chosen: Entry
    rejected: Entry


def best_versus_worst(entries: Sequence[Entry], min_margin: float) -> list[Preference]:
    """The best draft of one query against its worst; none below the margin. Equal scores: the earlier draft."""
    scored = [(entry.answer_score, entry) for entry in entries if entry.answer_score is not None]
    if not scored:
        return []
    best_score, best = min(scored, key=lambda each: (-each[0], each[1].draft.index))
    worst_score, worst = min(scored, key=lambda each: (each[0], each[1].draft.index))
    return [Preference(best, worst)] if reaches(best_score - worst_score, min_margin) else []


def sign_of_gain(entries: Sequence[Entry], min_margin: float = 0.0) -> list[Preference]:
    """The paper's rule within one query: gain > 0 against the rest, in order of index, each draft used once."""
    in_order = sorted(entries, key=lambda entry: entry.draft.index)
    positive = [entry for entry in in_order if entry.gain is not None and entry.gain > 0]
    others = [entry for entry in in_order if entry.gain is not None and entry.gain <= 0]
    return [Preference(chosen, rejected) for chosen, rejected in zip(positive, others, strict=False)]


RULES: Mapping[str, Callable[[Sequence[Entry], float], list[Preference]]] = {
    "BestVersusWorst": best_versus_worst,
    "SignOfGain": sign_of_gain,
}


def make_pairs(ledger: Sequence[Entry], settings: Feedback) -> list[Preference]:
    """All pairs of a ledger whose drafts stand query by query."""
    rule = RULES[settings.rule]
    return [pair for entries in _by_query(ledger) for pair in rule(entries, settings.min_margin)]


def _is_asked(entries: Sequence[Entry]) -> bool:
    return any(entry.answer or entry.solo for entry in entries)


def _by_query(ledger: Iterable[Entry]) -> list[list[Entry]]:
    return [list(entries) for _, entries in groupby(ledger, key=lambda entry: entry.row.id)]


# ---------------------------------------------------------------- shards
def read_shards(output: steps.Output, of: int, chosen: Sequence[Row], progress: steps.Progress) -> Asked:
    """What all shards wrote, as one machine would have asked it."""
    rows = {row.id: row for row in chosen}
    parts = []
    for number in range(of):
        parts.append(read_shard(Shard(number, of), output, rows))
        progress.update(number + 1, of, "shards")
    ledger = [entry for part in parts for entry in part.ledger]
    spent = Spent(
        sum(part.spent.calls for part in parts),
        sum(part.spent.input_tokens for part in parts),
        sum(part.spent.output_tokens for part in parts),
        sum(part.spent.money for part in parts),
    )
    refusals = [part.refusal for part in parts if part.refusal]
    unusual = {name: sum(part.unusual[name] for part in parts) for name in UNUSUAL}
    refusal = refusals[0] if refusals and not _is_asked(ledger) else ""
    cached, judged = sum(part.cached for part in parts), sum(part.judge_calls for part in parts)
    return Asked(ledger, spent, cached, judged, unusual, refusal, _strong_of([part.strong for part in parts]))


def _strong_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Who answered in any of the shards: they run side by side."""
    names = {at: sorted({name for part in parts for name in part.get(at, ())}) for at in ("first", "last")}
    return {**names, "change": next((part["change"] for part in parts if part.get("change")), "")}


def read_shard(shard: Shard, output: steps.Output, rows: Mapping[str, Row]) -> Asked:
    """Raises `StepError` where it is not finished, or is of other inputs."""
    uri = shard.uri(output.uri)
    manifest = steps.need_manifest(uri, what=f"shard {shard.number} of {shard.of}")
    if not steps.is_of(manifest, uri, step=STEP, inputs=shard.inputs(output.inputs)):
        raise StepError(f"{uri}: wanted the shard of these inputs, saw one of others. Run --shard again, then --merge.")
    paid = manifest.metrics
    spent = Spent(paid["strong_calls"], paid["input_tokens"], paid["output_tokens"], paid["money"])
    records = pq.ParquetFile(BytesIO(store.get(join(uri, LEDGER)))).read().to_pylist()
    ledger = [_entry(record, rows[record["query_id"]]) for record in records]
    unusual = {name: paid[name] for name in UNUSUAL}
    return Asked(ledger, spent, paid["strong_calls_cached"], paid["judge_calls"], unusual, paid["refusal"],
                 paid.get("strong", {}))  # fmt: skip


def _entry(record: Mapping[str, Any], row: Row) -> Entry:
    """The inverse of `_record`."""
    return Entry(
        row=row,
        draft=Draft(
            row.id,
            record["draft_index"],
            record["seed"],
            record["draft"],
            record["draft_tokens"],
            record.get("draft_finish_reason") or "",
        ),
        answer=_reply(record, "answer"),
        answer_score=record["answer_score"],
        solo=_reply(record, "solo"),
        solo_score=record["solo_score"],
        propensity=record.get("propensity", 1.0),
    )


def _reply(record: Mapping[str, Any], side: str) -> Reply | None:
    if record[f"{side}_call"] is None:
        return None
    version, model = record["strong_version"], record["strong_model"]
    return Reply(record[side], record[f"{side}_call"], version, model, paid=_paid(record, side))


def _paid(record: Mapping[str, Any], side: str) -> Paid | None:
    values: list[Any] = [record.get(f"{side}_{field.name}") for field in fields(Paid)]
    return None if None in values else Paid(*values)


# ---------------------------------------------------------------- what is written
def write_ledger(path: Path, ledger: Sequence[Entry], pair: Pair, evaluator: str) -> None:
    kinds = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "double": pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in LEDGER_COLUMNS.items()])
    records = [_record(entry, pair, evaluator) for entry in ledger]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path, compression="zstd")


def _record(entry: Entry, pair: Pair, evaluator: str) -> dict[str, Any]:
    row, draft, named = entry.row, entry.draft, entry.answer or entry.solo
    return {
        "query_id": row.id,
        "query": row.query,
        "reference": row.reference,
        "group": row.group,
        "draft_index": draft.index,
        "seed": draft.seed,
        "draft": draft.text,
        "draft_tokens": draft.tokens,
        "draft_finish_reason": draft.finish_reason,
        "answer": entry.answer.text if entry.answer else None,
        "answer_score": entry.answer_score,
        "solo": entry.solo.text if entry.solo else None,
        "solo_score": entry.solo_score,
        "gain": entry.gain,
        "answer_call": entry.answer.call if entry.answer else None,
        "solo_call": entry.solo.call if entry.solo else None,
        "weak_digest": pair.weak_digest,
        "prompts_digest": pair.prompts.digest,
        "strong_model": (named.model or pair.strong_model) if named else None,
        "strong_version": named.version if named else None,
        "evaluator_digest": evaluator,
        **_price_columns("answer", entry.answer),
        **_price_columns("solo", entry.solo),
        "propensity": entry.propensity,
    }


def _price_columns(side: str, reply: Reply | None) -> dict[str, Any]:
    paid = reply.paid if reply else None
    return {f"{side}_{field.name}": getattr(paid, field.name, None) for field in fields(Paid)}


def write_pairs(path: Path, pairs: Sequence[Preference], pair: Pair) -> None:
    """One JSON object a line; `prompt` is what the weak model saw."""
    with path.open("w", encoding="utf-8") as file:
        for preference in pairs:
            chosen, rejected = preference.chosen, preference.rejected
            record = {
                "query_id": chosen.row.id,
                "prompt": draft_messages(chosen.row.messages, pair.prompts),
                "chosen": chosen.draft.text,
                "rejected": rejected.draft.text,
                "chosen_score": chosen.answer_score,
                "rejected_score": rejected.answer_score,
                "solo_score": chosen.solo_score,
                "chosen_finish_reason": chosen.draft.finish_reason,
                "rejected_finish_reason": rejected.draft.finish_reason,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def card_of(inputs: Mapping[str, Any], metrics: Mapping[str, Any], digest: str, rule: str) -> DatasetCard:
    """What a person must know about the pairs; a query yields none for one of the reasons that are left out."""
    return DatasetCard(
        step=STEP,
        digest=digest,
        rows=metrics["pairs"],
        files=(PAIRS, LEDGER),
        description=f"Preference pairs of drafts that round {inputs['round']} is tuned on, and the ledger of what each"
        " draft was worth: the score of the strong model's answer with it, less that of the strong model alone."
        " Drafts and answers are of models, not of people.",
        sources={name: inputs[name] for name in ("data", "pair", "evaluator")} | {"rule of the pairs": rule},
        left_out={
            "queries that could not be drafted or that the strong model refused": metrics["skipped"],
            "queries that drew the same draft each time": metrics["equal_drafts"],
            "queries with different drafts whose answers score alike": metrics["ties"] - metrics["equal_drafts"],
            **({} if rule == "SignOfGain" else {"queries that differ by too little": metrics["below_margin"]}),
        },
        columns={
            "query_id": "of the row in the round's data set",
            "prompt": "messages that the weak model saw",
            "chosen": "the draft that was worth more",
            "rejected": "the draft that was worth less",
            "chosen_score": "of the strong model's answer with the chosen draft, 0 to 1",
            "rejected_score": "of its answer with the rejected draft",
            "solo_score": "of its answer without a draft",
            "chosen_finish_reason": "`length` where the chosen draft was cut off",
            "rejected_finish_reason": "`length` where the rejected draft was cut off",
        },
        version=steps.code_version(),
    )


def measured(asked: Asked, pairs: Sequence[Preference], queries: int, min_margin: float) -> dict[str, Any]:
    """The step's metrics. Rates are over drafts, and scores over queries of which all was asked: of others, which draft
    was asked hangs on how those before it scored.

    Why queries yield no pair: `equal_drafts` (all drafts the same text), `ties` (their answers score alike, those of
    equal drafts included), `below_margin` (they differ, but by less than `minMargin`).
    """
    ledger, spent = asked.ledger, asked.spent
    by_query = _by_query(ledger)
    n = max(1, len(ledger))
    spreads = [_spread(entries) for entries in by_query]
    whole = [entries for entries in by_query if entries[0].propensity is not None]
    each = [entry for entries in whole for entry in entries]
    gains = [entry.gain for entry in each if entry.gain is not None]
    return {
        "queries": len(by_query),
        "skipped": queries - len(by_query),
        "drafts": len(ledger),
        "distinct_drafts": sum(len({entry.draft.text for entry in entries}) for entries in by_query),
        "asked_drafts": sum(len({entry.draft.text for entry in e if entry.answer}) for e in by_query),
        "pairs": len(pairs),
        "queries_with_pairs": len({pair.chosen.row.id for pair in pairs}),
        "equal_drafts": sum(len({entry.draft.text for entry in entries}) == 1 for entries in by_query),
        "ties": sum(spread == 0 for spread in spreads),
        "below_margin": sum(0 < spread < min_margin - NOISE for spread in spreads),
        "explored": len(whole),
        "answer_score": _mean(entry.answer_score for entry in each),
        "greedy_score": _mean(entries[0].answer_score for entries in whole),
        "solo_score": _mean(entries[0].solo_score for entries in whole),
        "mean_gain": _mean(gains),
        "hurt_rate": _mean(float(gain < 0) for gain in gains),
        "draft_tokens": sum(entry.draft.tokens for entry in ledger) / n,
        "cut_drafts": sum(entry.draft.finish_reason == "length" for entry in ledger),
        "strong_calls": spent.calls,
        "strong_calls_cached": asked.cached,
        "judge_calls": asked.judge_calls,
        "input_tokens": spent.input_tokens,
        "output_tokens": spent.output_tokens,
        "money": spent.money,
        "strong_versions": sorted({entry.answer.version for entry in ledger if entry.answer}),
        "strong": dict(asked.strong),
        "best_score": max((score for entry in ledger for score in _scores(entry)), default=None),
        **asked.unusual,
    }


def _spread(entries: Sequence[Entry]) -> float:
    scores = [entry.answer_score for entry in entries if entry.answer_score is not None]
    return max(scores) - min(scores) if scores else 0.0


def _scores(entry: Entry) -> list[float]:
    return [score for score in (entry.answer_score, entry.solo_score) if score is not None]


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """What a person should look at, a sentence each."""
    found = [*unusual_words(metrics), *change_note(metrics.get("strong", {}))]
    if cut := metrics["cut_drafts"]:
        found.append(f"Note: {cut} of {metrics['drafts']} drafts were cut off: raise collaboration.draftMaxTokens.")
    if metrics["best_score"] == 0:
        found.append(ALL_ZERO)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    """None where none is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    steps.run(main)
