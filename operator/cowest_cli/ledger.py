"""`cowest ledger`: the gain ledgers of a job's rounds, read from its store; shown, filtered, exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from cowest_cli import ledger_table as ledgers
from cowest_cli.actions import in_cluster, known
from cowest_cli.jobs import read_json
from cowest_cli.ledger_table import Price, Query, Record, Summary
from cowest_cli.options import Output, Where, spread
from cowest_cli.view import printable
from cowest_serving import store
from cowest_serving.book import BookError, read_prices
from cowest_serving.contract import digest_of
from cowest_training.cards import DatasetCard, dataset_card
from cowest_training.contract import EXIT_RETRY, LEDGER, PAIRS, Manifest, StepError
from cowest_training.steps import code_version, read_manifest

TRAIN = "data/train-00000-of-00001.parquet"  # where `datasets` looks for the split `train`
SHOWN = 20  # queries
WIDTH = 160  # of a table that goes into a file or a pipe
_ROUND = re.compile(r"/r(\d+)/feedback/manifest\.json$")


# ---------------------------------------------------------------- the verb
@dataclass(frozen=True)
class Choice:
    """Which queries are meant."""

    round: Annotated[
        list[int] | None, typer.Option("--round", min=0, help="Number of a round; may be repeated (default: all).")
    ] = None
    query: Annotated[
        list[str] | None, typer.Option("--query", help="Id of a query, or words of its text; may be repeated.")
    ] = None
    group: Annotated[list[str] | None, typer.Option("--group", help="Group (slice) of the data; may be repeated.")] = (
        None
    )
    usable: Annotated[bool, typer.Option("--usable", help="Only queries that gave the round a pair.")] = False
    hurt: Annotated[
        bool, typer.Option("--hurt", help="Only queries where a draft made the answer worse than solo.")
    ] = False
    min_gain: Annotated[
        float | None,
        typer.Option("--min-gain", min=-1.0, max=1.0, help="Only queries whose best draft gains at least this."),
    ] = None

    @property
    def filters(self) -> ledgers.Filters:
        return ledgers.Filters(tuple(self.query or ()), tuple(self.group or ()), self.usable, self.hurt, self.min_gain)


@dataclass(frozen=True)
class Export:
    """Where it goes."""

    parquet: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the rows of these queries there: a path, file:// or s3://."),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Write their pairs there, as a Hugging Face data set in TRL's form."),
    ] = None


@spread
def ledger(
    where: Where,
    choice: Choice,
    export: Export,
    store_uri: Annotated[
        str | None,
        typer.Option("--store", metavar="URI", help="Read this store of a job (s3://bucket/prefix), without the job."),
    ] = None,
    drafts: Annotated[bool, typer.Option("--drafts", help="Show a line a draft, with the answers.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=0, help=f"Queries to show, 0: all (default: {SHOWN}; with -o json all).")
    ] = None,
    output: Output = "text",
) -> None:
    """What each draft of a round was worth and cost: shown, filtered, or exported for training elsewhere.

    A line a query: the draft that was worth most and the one that was worth least, the scores of the strong model's
    answers with them and alone (solo), the gain of the best (its score less solo's), the pairs that the round made of
    it, and what its answers cost. The best gains come first. Filters choose queries, and all of them must hold.

    --parquet writes the table, a row a draft; --dataset writes the rounds' pairs as `prompt`, `chosen` and `rejected`
    in messages, for TRL and `datasets.load_dataset`. Neither overwrites what is there. docs/ledger.md has the columns.

    Of a job in a cluster, and with --store, it is read with your own keys as by `lineage`. The prices are those that
    the ledger notes; where the book of paid calls is at hand (a job on this machine), those that it paid.
    """
    source = _source(where, store_uri)
    everything = read(source, choice.round or ())
    left = ledgers.chosen(everything, choice.filters)
    rounds = ledgers.summaries(everything, left)
    written = list(write(export, left))
    ordered = sorted(left, key=lambda query: (query.round, query.gain is None, -(query.gain or 0)))
    most = limit if limit is not None else 0 if output == "json" else SHOWN
    shown = ordered[:most] if most else ordered
    if output == "json":
        told = {"rounds": [asdict(each) for each in rounds], "queries": [ledgers.as_json(each) for each in shown]}
        typer.echo(json.dumps({**told, "written": written}))
        return
    for each in rounds:
        typer.echo(printable(_in_words(each, source.currency)))
    for file in written:
        typer.echo(printable(f"{file['uri']}: {file['rows']} {file['of']} written."))
    if shown and not written:
        _show(_table_of_drafts(shown) if drafts else _table_of_queries(shown, source.currency))
    if len(shown) < len(ordered) and not written:
        typer.echo(f"{len(shown)} of {len(ordered)} queries are shown; --limit 0 shows all.")


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class Source:
    """Where a job's ledgers lie, and what says their price."""

    root: str  # URI of the job's store
    book: Path | None  # of paid calls
    currency: str | None


def store_of(where: Where, uri: str | None) -> str:
    """URI of the store of a job, wherever it runs; of `uri` where that is given."""
    return _source(where, uri).root


def _source(where: Where, uri: str | None) -> Source:
    if uri is not None:
        if where.job is not None or where.file is not None or where.home is not None:
            raise StepError(f"wanted --store {uri} or a job, saw both.")
        return Source(uri, None, None)
    if job := in_cluster(where):
        seen = job.see()
        return Source(job.open_store(seen), None, _currency(seen.body))
    place = known(where)
    return Source(place.store.as_uri(), place.calls, _currency(read_json(place.job)))


def _currency(document: Mapping[str, Any] | None) -> str | None:
    prices = ((document or {}).get("spec") or {}).get("strong", {}).get("prices") or {}
    return prices.get("currency")


def read(source: Source, numbers: Sequence[int]) -> list[Query]:
    """The queries of these rounds; of all that have a ledger where none is named. Raises `StepError`: there is none."""
    there = ledger_rounds(source.root)
    if not there:
        raise StepError(
            f"{source.root}: wanted the ledger of a round, saw none yet. A tuned round writes one when its feedback"
            " step ends; `cowest status` shows how far it is."
        )
    for number in numbers:
        if number not in there:
            raise StepError(
                f"--round {number}: wanted a round with a ledger, saw {', '.join(map(str, there))}. Only tuned rounds"
                " have one, once their feedback step has ended."
            )
    return [query for number in sorted(set(numbers) or there) for query in _round(source, there[number])]


def ledger_rounds(root: str) -> dict[int, str]:
    """Number of each round whose feedback step has ended -> its output, in order."""
    files = store.list_files(store.join(root, "runs"))
    found = {int(match[1]): uri for uri in files if (match := _ROUND.search(uri))}
    return {number: found[number].removesuffix(f"/{store.LAST}") for number in sorted(found)}


def _round(source: Source, uri: str) -> list[Query]:
    manifest = read_manifest(uri)
    if manifest is None:  # it is being written anew
        raise StepError(
            f"{uri}: wanted a finished ledger, saw one that is being made anew. Look again later.", EXIT_RETRY
        )
    records, pairs = _records(uri, manifest), _pairs(uri, manifest)
    keys = {key for record in records for side in ("answer_call", "solo_call") if (key := record[side]) is not None}
    return ledgers.rows_of(records, pairs, manifest, _prices(source.book, keys), source.currency)


def _records(uri: str, manifest: Manifest) -> list[Record]:
    try:
        table: pa.Table = pq.ParquetFile(BytesIO(_file(uri, LEDGER, manifest))).read()
    except pa.ArrowException as error:
        raise StepError(f"{store.join(uri, LEDGER)}: wanted Parquet, saw: {error}.") from None
    if missing := [name for name in ledgers.NEEDED if name not in table.column_names]:
        raise StepError(f"{store.join(uri, LEDGER)}: wanted the columns of a ledger, saw no {', '.join(missing)}.")
    records: list[Record] = table.to_pylist()
    return records


def _pairs(uri: str, manifest: Manifest) -> list[Record]:
    lines = _file(uri, PAIRS, manifest).decode("utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _file(uri: str, name: str, manifest: Manifest) -> bytes:
    """A file of the step, as it was when the step ended: a ledger that was changed since proves nothing."""
    place, wanted = store.join(uri, name), manifest.outputs.get(name)
    if wanted is None:
        raise StepError(
            f"{uri}: wanted {name} among the outputs of its manifest, saw {', '.join(manifest.outputs) or 'none'}."
        )
    data = store.get(place)
    if (seen := sha256(data).hexdigest()) != wanted:
        raise StepError(
            f"{place}: wanted the file that its manifest names (sha256 {wanted}), saw {seen}. It was changed after the"
            " step had ended: bring it back."
        )
    return data


def _prices(book: Path | None, keys: Iterable[str]) -> Mapping[str, Any]:
    if book is None:
        return {}
    try:
        return read_prices(book, keys)
    except BookError as error:
        raise StepError(str(error), EXIT_RETRY) from None


# ---------------------------------------------------------------- writing
def write(export: Export, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
    """Each target is looked at before anything is written."""
    pairs = sum(len(query.pairs) for query in queries)
    for option, target, rows, of in (
        ("--parquet", export.parquet, len(queries), "query"), ("--dataset", export.dataset, pairs, "pair"),
    ):  # fmt: skip
        if target is None:
            continue
        if not rows:
            raise StepError(
                f"{option} {target}: wanted at least one {of}, saw none. Ask for more rounds or fewer filters."
            )
        if store.exists(target):
            raise StepError(f"{option} {target}: wanted a place with nothing there, saw something; it stays as it is.")
    if export.parquet is not None:
        table = ledgers.table(queries)
        store.put(export.parquet, _parquet(table))
        yield {"uri": export.parquet, "rows": table.num_rows, "of": "drafts"}
    if export.dataset is not None:
        table = ledgers.preferences(queries)
        data = _parquet(table)
        store.put(store.join(export.dataset, TRAIN), data)
        store.put(store.join(export.dataset, "README.md"), dataset_card(_card(queries, table, data)).encode())
        yield {"uri": export.dataset, "rows": table.num_rows, "of": "pairs"}


def _parquet(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _card(queries: Sequence[Query], table: pa.Table, data: bytes) -> DatasetCard:
    def named(column: str) -> str:
        return ", ".join(sorted({str(query.rows[0][column]) for query in queries if query.pairs}))

    return DatasetCard(
        step="ledger",
        digest=digest_of(data),
        rows=table.num_rows,
        files=(TRAIN,),
        description="Preference pairs of drafts, in TRL's conversational form: with the chosen draft the strong model's"
        " answer was worth more than with the rejected one. Drafts are of models, not of people.",
        sources={
            "rounds": named("round"),
            "rule of the pairs": named("rule"),
            **{name.replace("_", " "): named(name) for name in ("weak_digest", "prompts_digest", "evaluator_digest")},
            "strong model": named("strong_model"),
        },
        left_out={"queries that were chosen and gave no pair": sum(not query.pairs for query in queries)},
        columns=ledgers.PAIR_COLUMNS,
        version=code_version(),
    )


# ---------------------------------------------------------------- showing
def _in_words(seen: Summary, currency: str | None) -> str:
    head = f"Round {seen.round} ({seen.rule}): {_of(seen.queries, seen.of_queries)} queries"
    if not seen.queries:
        return f"{head}."
    asked = "" if seen.asked == seen.drafts else f", {seen.asked} asked"
    return (
        f"{head}, {seen.usable} of them usable ({seen.pairs} pairs); {seen.drafts} drafts,"
        f" {seen.distinct_drafts} distinct{asked}; {_gains(seen)}; {_cost(seen.price, currency)}."
    )


def _gains(seen: Summary) -> str:
    if seen.mean_gain is None:
        return "gains not asked for"
    known = "" if seen.gains == seen.drafts else f" of the {seen.gains} that are known"
    return f"mean gain{known} {seen.mean_gain:+.3f}, {100 * (seen.hurt_rate or 0):.1f} % hurt"


def _of(part: int, whole: int) -> str:
    return str(whole) if part == whole else f"{part} of {whole}"


def _cost(price: Price, currency: str | None) -> str:
    calls = f"{price.calls} call{'' if price.calls == 1 else 's'}"
    if price.unknown == price.calls:
        return f"{calls}, price not at hand"
    money = f", {price.money:.2f} {currency}" if currency else ""
    unknown = f" ({price.unknown} of unknown price)" if price.unknown else ""
    return f"{calls}{unknown}, {price.input_tokens + price.output_tokens} tokens{money}"


def _table_of_queries(queries: Sequence[Query], currency: str | None) -> Table:
    table = _empty(
        ("round", 0), ("query id", 20), ("query", 32), ("best draft", 32), ("worst draft", 32), ("best", 0),
        ("worst", 0), ("solo", 0), ("gain", 0), ("pairs", 0), (currency or "tokens", 0),
    )  # fmt: skip
    for query in queries:
        best, worst, price = query.best, query.worst, ledgers.price_of([query])
        spent = f"{price.money:.4f}" if currency else str(price.input_tokens + price.output_tokens)
        table.add_row(
            *map(printable, (query.round, query.id, best["query"], best["draft"])),
            "" if len({row["draft"] for row in query.rows}) == 1 else printable(worst["draft"]),
            *map(_score, (best["answer_score"], worst["answer_score"], best["solo_score"])),
            _gain(query.gain),
            str(len(query.pairs)),
            "" if price.unknown else spent,
        )
    return table


def _table_of_drafts(queries: Sequence[Query]) -> Table:
    table = _empty(
        ("round", 0), ("query id", 20), ("draft", 0), ("text", 48), ("answer", 32), ("solo answer", 32), ("score", 0),
        ("gain", 0), ("role", 0),
    )  # fmt: skip
    for row in (row for query in queries for row in query.rows):
        table.add_row(
            *(printable(row[name]) for name in ("round", "query_id", "draft_index", "draft")),
            *("" if row[name] is None else printable(row[name]) for name in ("answer", "solo")),
            _score(row["answer_score"]),
            _gain(row["gain"]),
            row["role"] or "",
        )
    return table


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gain(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


_TEXTS = ("query id", "query", "best draft", "worst draft", "text", "answer", "solo answer", "role")


def _empty(*columns: tuple[str, int]) -> Table:
    """Numbers stand to the right; a text has one line and is cut at its width."""
    table = Table(expand=False, pad_edge=False, box=None, header_style="bold", collapse_padding=True)
    for name, width in columns:
        table.add_column(
            name,
            justify="left" if name in _TEXTS else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=width or None,
        )
    return table


def _show(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=max(console.width, WIDTH))  # a pipe has no edge
    console.print(table)
