"""`cowest review`: a person labels answers, and a judge is held against the labels (decision 16)."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from cowest_cli import jobs
from cowest_cli.actions import in_cluster, known
from cowest_cli.options import By, Where, spread
from cowest_cli.review_page import Server
from cowest_cli.review_queue import USER_DISAGREES, Labels, Question, Session, disagrees, of_evaluation, queue
from cowest_cli.view import printable
from cowest_serving import store
from cowest_serving.contract import parse
from cowest_serving.traces import read_feedback, read_traces
from cowest_serving.words import scores_of
from cowest_training.asking import score_key
from cowest_training.contract import Evaluator, StepError, evaluator_digest
from cowest_training.evaluator import verdict_of
from cowest_training.paid_calls import read_scores
from cowest_training.score_live import live_answer

SAMPLE = 200  # questions that are drawn by chance
_ITEMS = re.compile(r"/runs/r(\d+)/evaluate/items\.parquet$")


@dataclass(frozen=True)
class Review:
    """What is asked, and where the labels go."""

    labels: Annotated[Path, typer.Option(help="The file of labels; more are appended.")] = Path("labels.jsonl")
    by: By = None
    round: Annotated[int | None, typer.Option(min=0, help="Of which round (default: the last evaluated one).")] = None
    sample: Annotated[
        int, typer.Option(min=0, help="How many questions are drawn by chance: those that count for calibration.")
    ] = SAMPLE
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page on 127.0.0.1 (default: a free one).")
    ] = 0


@dataclass(frozen=True)
class Source:
    """A job's store, and what its manifest says now. The book of paid calls is on one machine only."""

    root: str
    document: Mapping[str, Any]
    calls: Path | None

    @property
    def evaluator(self) -> Evaluator:
        return parse(Evaluator, self.document["spec"]["feedback"]["evaluator"])


@spread
def review(where: Where, choice: Review) -> None:
    """Ask a person which answers are better, blind, on a page of this machine; the labels calibrate a judge.

    Asked is about answers of an evaluation's candidate and control that differ: some drawn by chance, and by turns with
    them those that a judge doubts itself (its two orders, or the judges of a jury, disagree), and single answers of
    which users said the opposite (`POST /v1/feedback`; of a job on this machine). The page shows question, reference
    and answers; neither whose they are nor why they are asked about. Keys: left, right, T (tie), S (skip), Backspace.

    Each label is a line of --labels, and a later run goes on where this one ended. In the manifest
    `feedback.evaluator.calibration.labels` names the file; docs/judges.md has its form.

    Of a job in a cluster it is read from the object store with your own keys, as by `lineage`.
    """
    source, by = _source(where), jobs.who(choice.by)
    number, items = _evaluation(source.root, choice.round)
    questions = queue(of_evaluation(items, _seed(source)), _of_users(source), choice.sample, _seed(source))
    labels = Labels(choice.labels, by)
    session = Session(questions, labels)
    if not questions:
        raise StepError(
            f"round {number}: wanted queries that candidate and control answer differently, saw none in {len(items)}."
        )
    if not session.left:
        typer.echo(f"all {len(questions)} questions of round {number} have a label of {by} in {choice.labels}.")
        return
    _ask(session, Server(session, choice.port), f"{session.left} of {len(questions)} questions of round {number}")
    uri = choice.labels.resolve().as_uri()
    typer.echo(f"{session.left} questions are left. The labels: feedback.evaluator.calibration.labels: {uri}")


def _ask(session: Session, server: Server, what: str) -> None:
    """Until a signal: one that was begun in the background may have inherited to ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with server:
        typer.echo(f"{what}; {printable(session.by)} answers at {server.url} (Ctrl-C ends)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


# ---------------------------------------------------------------- reading
def _source(where: Where) -> Source:
    if job := in_cluster(where):
        seen = job.see()
        return Source(job.open_store(seen), seen.body, None)
    place = known(where)
    return Source(place.store.as_uri(), jobs.read_json(place.job), place.calls)


def _seed(source: Source) -> str:
    """The same for all reviewers and runs: they are shown the same draw."""
    return str(source.document["metadata"]["name"])


def _evaluation(root: str, wanted: int | None) -> tuple[int, list[dict[str, Any]]]:
    files = {int(found[1]): uri for uri in store.list_files(store.join(root, "runs")) if (found := _ITEMS.search(uri))}
    if not files or (wanted is not None and wanted not in files):
        which = "an evaluated round" if wanted is None else f"the evaluation of round {wanted}"
        seen = ", ".join(map(str, sorted(files))) or "none"
        raise StepError(f"{root}: wanted {which}, saw {seen}. An evaluation is the last step of a round.")
    number = max(files) if wanted is None else wanted
    items: list[dict[str, Any]] = pq.read_table(BytesIO(store.get(files[number]))).to_pylist()
    return number, items


def _of_users(source: Source) -> Iterator[Question]:
    """Live answers that a judge or a scorer has scored, of which users said the opposite."""
    if source.calls is None or not (said := scores_of(read_feedback(source.root).to_pylist())):
        return
    evaluator = source.evaluator
    digests = [evaluator_digest(each) for each in evaluator.asked]
    table = read_traces(source.root)
    told = table.filter(pc.is_in(table["trace_id"], value_set=pa.array(sorted(said), pa.string())))
    traces = [trace for trace in told.to_pylist() if trace["answer"]]
    answers = {trace["trace_id"]: live_answer(trace, "candidate") for trace in traces}
    keys = {id_: [score_key(by, each.row, each.answer or "") for by in digests] for id_, each in answers.items()}
    known = read_scores(source.calls, (key for found in keys.values() for key in found))
    for id_, each in answers.items():
        scores = [known[key] for key in keys[id_] if key in known]
        if len(scores) == len(digests) and disagrees(said[id_], verdict_of(scores, evaluator.jury_rule)):
            yield Question(each.row.messages, "", (each.answer or "",), USER_DISAGREES)
