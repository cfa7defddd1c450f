"""Measure a candidate pair against its control on the held-out queries: the same queries, strong model and evaluator.

    candidate  the strong model's answer given the candidate's greedy draft
    control    the same with the pair that is served now, or the strong model alone (`--control solo`)
    solo       the strong model alone: where it scores higher than an arm, that arm's draft hurt
    weak       the candidate's greedy draft taken as the answer: shown, never a gate

Where `evaluator.calibration` names answers that people labelled, these are scored too: how far the evaluator agrees
with people stands in the report, and the gate goes by it.

Writes report.json (an EvaluationReport) and items.parquet. A query without an answer from a strong model that is away
ends the step (run it again); a query that the strong model refuses as wrong scores 0 and counts as an error.

    python -m cowest_training.evaluate --job job.yaml --candidate pair.json --control solo \\
        --held-out s3://b/held_out.jsonl --calls calls.sqlite --out s3://b/j/r3/evaluate
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.contract import PREDICTOR_FILE, Pair, digest_of, message_text
from cowest_serving.predictor import Predictor, features, load_predictor

from . import steps
from .asking import (
    ALL_ZERO,
    JUDGE,
    Asking,
    Draft,
    Drafts,
    Recipe,
    Reply,
    change_note,
    check_pair,
    drafts_folder,
    each_batch,
    open_asking,
    read_pair,
    refused_words,
    unusual_words,
    version_counts,
    versions,
)
from .calibration import Label, calibrate, labels_digest, read_labels
from .contract import (
    EXIT_OK,
    ArmReport,
    CalibrationReport,
    Comparison,
    EvaluationReport,
    Evaluator,
    Manifest,
    RouteReport,
    Row,
    SliceReport,
    StepSettings,
    evaluator_digest,
)
from .data import folded, read_rows, rows_digest, tokens
from .evaluator import check_references, conversation, extracted, find_label, needs_reference
from .paid_calls import Spent
from .statistics import compare_paired, macro_f1, mean_interval

SOLO = "solo"
REPORT, ITEMS = "report.json", "items.parquet"
SHOWN_EVERY = 5.0  # seconds, while a batch of drafts is drawn
GREEDY_SEED = "greedy"  # nothing is sampled: drafts of a pair are the same in every evaluation, and drawn once


def main(argv: Sequence[str] | None = None) -> int:
    args = _flags(argv)
    settings = steps.load_settings(args.job)
    candidate = read_pair(args.candidate)
    control = None if args.control == SOLO else read_pair(args.control)
    rows = read_rows(args.held_out)
    check_references(rows, settings.feedback.evaluator)
    found = read_predictor(args.predictor) if args.predictor else None
    labels = labels_of(settings.feedback.evaluator)
    inputs = _inputs(settings, candidate, control, rows) | ({"predictor": found[1]} if found else {})
    inputs |= {"labels": labels_digest(labels)} if labels else {}
    if args.generation:
        inputs["generation"] = args.generation
    output = steps.open_output(args.out, step="evaluate", inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    purpose = f"evaluate:{digest_of(inputs)[7:19]}"
    job = _Job(settings, candidate, control, args.calls, args.round, purpose, labels, args.generation)
    run = asyncio.run(_ask_all(job, rows, steps.Progress(args.progress, "evaluate")))
    report = make_report(run, job, rows)
    if found:
        predictor, digest = found
        report = replace(report, predictor=digest, routes=routes(run, job, rows, predictor))
    report_json = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    (output.folder / REPORT).write_text(report_json, encoding="utf-8")
    write_items(output.folder / ITEMS, rows, run.arms, not needs_reference(settings.feedback.evaluator))
    for words in notes(report, run):
        steps.say(words)
    output.finish(kind="Evaluation", metrics=measured(report, run))
    return EXIT_OK


def _flags(argv: Sequence[str] | None) -> Any:
    flags = steps.parser(__doc__)
    flags.add_argument("--candidate", required=True, metavar="FILE", help="pair.json of the candidate")
    flags.add_argument(
        "--control", required=True, metavar="FILE|solo", help="pair.json of what is served now, or `solo`"
    )
    flags.add_argument("--held-out", required=True, metavar="URI", help="held-out rows, JSONL or Parquet")
    flags.add_argument("--calls", required=True, metavar="FILE", help="book of paid calls (SQLite, local)")
    flags.add_argument("--round", type=int, metavar="N", help="whose budget pays; default: the book's latest round")
    steps.add_generation(flags)
    flags.add_argument("--predictor", metavar="URI", help="output of `predictor`: what going by it would cost")
    return flags.parse_args(argv)


def labels_of(evaluator: Evaluator) -> list[Label]:
    """What people said, where the manifest names it. Raises `StepError`."""
    return read_labels(evaluator.calibration.labels, evaluator) if evaluator.calibration else []


def read_predictor(uri: str) -> tuple[Predictor, str]:
    """And the digest of its file. Raises `StepError` where there is none."""
    steps.need_manifest(uri, what="--predictor")
    data = store.get(store.join(uri, PREDICTOR_FILE))
    return load_predictor(data), digest_of(data)


def _inputs(settings: StepSettings, candidate: Pair, control: Pair | None, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "candidate": candidate.digest,
        "control": control.digest if control else SOLO,
        "held_out": rows_digest(rows),
        "evaluator": evaluator_digest(settings.feedback.evaluator),
        "draft_max_tokens": settings.collaboration.draft_max_tokens,
        "strong_max_tokens": settings.strong.max_tokens,
    }


# ---------------------------------------------------------------- drafts, answers, scores
@dataclass(frozen=True)
class Item:
    """One query through one arm."""

    draft: str | None
    reply: Reply
    score: float
    doubt: str = ""  # why the judge's word on it is worth a person's look


@dataclass(frozen=True)
class Run:
    """All arms over all rows, in the order of the rows, with what was paid for each arm."""

    arms: Mapping[str, Sequence[Item]]
    spent: Mapping[str, Spent]  # by arm; what a judge cost besides
    unusual: Mapping[str, int]  # answers that were cut off, filtered or empty
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by arm and query: why it has no draft
    calibration: CalibrationReport | None = None
    strong: Mapping[str, Any] = field(default_factory=dict)  # who answered, see `Asking.strong_seen`


@dataclass(frozen=True)
class _Job:
    settings: StepSettings
    candidate: Pair
    control: Pair | None
    calls: str
    round: int | None
    purpose: str
    labels: Sequence[Label] = ()
    generation: int = 0  # of the strong model

    @property
    def arms_with_drafts(self) -> dict[str, Pair]:
        return {"candidate": self.candidate} | ({"control": self.control} if self.control else {})

    def drafts(self, pair: Pair, rows: Sequence[Row]) -> Drafts:
        recipe = Recipe(pair, 1, 0.0, self.settings.collaboration.draft_max_tokens, GREEDY_SEED)
        return Drafts(recipe, rows, drafts_folder(self.calls))


async def _ask_all(job: _Job, rows: Sequence[Row], progress: steps.Progress) -> Run:
    strong, evaluator = job.settings.strong, job.settings.feedback.evaluator
    # Before the first paid call. One weak model at a time in memory: that of the control is loaded when its turn comes.
    drawn = {"candidate": job.drafts(job.candidate, rows)}
    if job.control and not (job.drafts(job.control, rows).are_on_disk or shares_drafts(job.candidate, job.control)):
        await asyncio.to_thread(check_pair, job.control)
    await asyncio.to_thread(drawn["candidate"].load)
    async with open_asking(
        strong, evaluator, job.calls, purpose=job.purpose, round_number=job.round,
        redaction=job.settings.collaboration.redaction, generation=job.generation,
    ) as asking:  # fmt: skip
        tasks: dict[str, list[asyncio.Task[Item]]] = {name: [] for name in (*job.arms_with_drafts, SOLO, "weak")}
        shown = _Shown(progress, asking, len(rows) * (len(job.arms_with_drafts) + 1))

        def start(group: asyncio.TaskGroup, name: str, item: Coroutine[Any, Any, Item]) -> None:
            task = group.create_task(item)
            if name != "weak":
                task.add_done_callback(shown.answered)
            tasks[name].append(task)

        # In a task group the first failure ends the others, the drawing of drafts included.
        async with asyncio.TaskGroup() as group:
            for row in rows:
                start(group, SOLO, _solo(asking, row, job.candidate))
            for name, pair in job.arms_with_drafts.items():

                def ask(row: Row, drafts: list[Draft], name: str = name, pair: Pair = pair) -> None:
                    shown.drafted()
                    draft = drafts[0].text if drafts else None
                    start(group, name, _answer(asking, row, draft, pair, name))
                    if name == "candidate":
                        start(group, "weak", _weak_alone(asking, row, draft or ""))

                # One weak model at a time in memory. The same one twice is drawn once: its drafts are on disk.
                drafts = drawn[name] = drawn.get(name) or job.drafts(pair, rows)
                async with shown.drawing(name, drafts):
                    await each_batch(drafts, ask)
                drafts.unload()
            shown.show()
        arms = {name: [task.result() for task in found] for name, found in tasks.items()}
        asking.refuse_nothing_but_errors(sum(bool(item.reply.error) for item in arms["candidate"]), len(rows))
        seed = job.settings.training.seed
        calibration = await calibrate(asking.score_text, job.labels, seed) if job.labels else None
        spent = {name: asking.calls.spent(purpose=f"{job.purpose}:{name}") for name in arms} | {JUDGE: asking.judged}
        # Alone in control, the strong model's answers are the solo ones, paid for once.
        refused = {name: drafts.refused for name, drafts in drawn.items()}
        arms, spent = {"control": arms[SOLO]} | arms, {"control": Spent()} | spent
        return Run(arms, spent, asking.unusual, refused, calibration, asking.strong_seen)


def shares_drafts(one: Pair, other: Pair) -> bool:
    return (one.weak_digest, one.prompts.draft) == (other.weak_digest, other.prompts.draft)


class _Shown:
    """How far it is, by phases: the drafts of each arm, then the answers that are still to come.

    Answers of the strong model alone come meanwhile, and fast: in one sum with drafts they would say that all is soon
    done, and then nothing for minutes.
    """

    def __init__(self, progress: steps.Progress, asking: Asking, answers: int) -> None:
        self._progress, self._asking = progress, asking
        self._answers, self._answered = answers, 0  # of the strong model: a draft taken as the answer is none
        self._arm, self._rows, self._known, self._drawn = "", 0, 0, 0

    @asynccontextmanager
    async def drawing(self, arm: str, drafts: Drafts) -> AsyncIterator[None]:
        """The phase of one arm's drafts: shown now and then too while a batch is drawn."""
        self._arm, self._rows, self._known, self._drawn = arm, drafts.rows, drafts.rows_on_disk, 0
        self.show()
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            self._arm = ""
            beating.cancel()

    def drafted(self) -> None:
        self._drawn += 1
        self.show()

    def answered(self, task: asyncio.Task[Item]) -> None:
        if task.cancelled():  # with the failure of another
            return
        self._answered += 1
        self.show()

    def show(self) -> None:
        paid = sum(self._asking.calls.asked.paid.values())
        if not self._arm:
            self._progress.update(self._answered, self._answers, "answers", f"{paid} calls paid now")
        elif self._drawn >= self._known:  # those on disk come at once and say nothing of how fast others are drawn
            said = f"{self._answered} of {self._answers} answers, {paid} calls paid now"
            self._progress.update(self._drawn, self._rows, f"drafts of the {self._arm}", said)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(SHOWN_EVERY)
            self.show()


async def _solo(asking: Asking, row: Row, pair: Pair) -> Item:
    return await _item(asking, row, None, await asking.solo(row, pair, SOLO))


async def _answer(asking: Asking, row: Row, draft: str | None, pair: Pair, arm: str) -> Item:
    """Without a draft the strong model answers alone, as it does in service."""
    reply = await (asking.solo(row, pair, arm) if draft is None else asking.answer(row, draft, pair, arm))
    return await _item(asking, row, draft, reply)


async def _weak_alone(asking: Asking, row: Row, draft: str) -> Item:
    reply = Reply(draft, "", "")
    return Item(draft, reply, await asking.score(row, reply))


async def _item(asking: Asking, row: Row, draft: str | None, reply: Reply) -> Item:
    score = await asking.score(row, reply)
    return Item(draft, reply, score, "" if reply.error else asking.doubt(row, reply.text))


# ---------------------------------------------------------------- the report
def make_report(run: Run, job: _Job, rows: Sequence[Row]) -> EvaluationReport:
    evaluator = job.settings.feedback.evaluator
    seed = job.settings.training.seed
    replies = {name: [item.reply for item in run.arms[name]] for name in ("candidate", "control", SOLO)}
    together = clusters(rows)
    return EvaluationReport(
        candidate=job.candidate.digest,
        control=job.control.digest if job.control else SOLO,
        held_out_digest=rows_digest(rows),
        evaluator_digest=evaluator_digest(evaluator),
        strong_model=job.candidate.strong_model,
        strong_version=versions([reply for arm in replies.values() for reply in arm]),
        strong_versions={name: dict(version_counts(arm)) for name, arm in replies.items()},
        arms=tuple(
            arm_report(name, run, rows, evaluator, seed, together) for name in ("candidate", "control", SOLO, "weak")
        ),
        against_control=_compare(run, "control", seed, together),
        against_solo=_compare(run, SOLO, seed, together),
        slices=slices(rows, _scores(run, "candidate"), _scores(run, "control"), seed, together),
        calibration=run.calibration,
    )


def clusters(rows: Sequence[Row]) -> list[str] | None:
    """For each row what it has in common with others, so that their scores are no independent evidence.

    Turns of one conversation share its first exchange; of single questions only the same one counts. `None` where every
    row stands alone. A `group` is a slice, not a cluster.
    """
    found = []
    for row in rows:
        first = next((i for i, message in enumerate(row.messages) if message.get("role") == "assistant"), None)
        opening = row.messages if first is None else row.messages[: first + 1]
        found.append(" ".join(tokens(folded(" ".join(message_text(message) for message in opening)))))
    return found if len(set(found)) < len(found) else None


def arm_report(
    name: str, run: Run, rows: Sequence[Row], evaluator: Evaluator, seed: int, together: Sequence[str] | None
) -> ArmReport:
    scores, solo = _scores(run, name), _scores(run, SOLO)
    mean, low, high = mean_interval(scores, together, seed)
    return ArmReport(
        name=name,
        n=len(scores),
        score=mean,
        low=low,
        high=high,
        hurt_rate=sum(alone > score for alone, score in zip(solo, scores, strict=True)) / len(scores),
        errors=sum(bool(item.reply.error) for item in run.arms[name]),
        strong_calls=run.spent[name].calls,
        macro_f1=_macro_f1(run.arms[name], rows, evaluator),
    )


def slices(
    rows: Sequence[Row],
    candidate: Sequence[float],
    control: Sequence[float],
    seed: int,
    together: Sequence[str] | None = None,
) -> tuple[SliceReport, ...]:
    """Candidate against control within each `group`; rows without one are in no slice."""
    reports = []
    for group in sorted({row.group for row in rows if row.group is not None}):
        inside = [i for i, row in enumerate(rows) if row.group == group]
        of_slice = [together[i] for i in inside] if together else None
        seen = compare_paired([candidate[i] for i in inside], [control[i] for i in inside], of_slice, seed)
        reports.append(SliceReport(group, seen.n, seen.difference, seen.low, seen.high))
    return tuple(reports)


def routes(run: Run, job: _Job, rows: Sequence[Row], predictor: Predictor) -> tuple[RouteReport, ...]:
    """Each shortcut by itself, for each arm that drafts."""
    found = [features(row.query) for row in rows]
    together = clusters(rows)
    reports = []
    for arm in job.arms_with_drafts:
        usual = _scores(run, arm)
        for name, head in predictor.heads.items():
            if name == "weakAlone" and arm != "candidate":
                continue  # what the control's drafts score as answers is not asked
            instead = _scores(run, SOLO if name == "strongAlone" else "weak")
            is_routed = [head.routes(each) for each in found]
            scores = [b if routed else a for a, b, routed in zip(usual, instead, is_routed, strict=True)]
            seen = compare_paired(scores, usual, together, job.settings.training.seed)
            # Nothing lost in n queries leaves a loss of 3 in n possible (95 %), which no resampling shows.
            high = max(-seen.low, 3 / len(rows))
            reports.append(RouteReport(arm, name, len(rows), sum(is_routed), -seen.difference, -seen.high, high))
    return tuple(reports)


def _compare(run: Run, control: str, seed: int, together: Sequence[str] | None) -> Comparison:
    return compare_paired(_scores(run, "candidate"), _scores(run, control), together, seed)


def _scores(run: Run, name: str) -> list[float]:
    return [item.score for item in run.arms[name]]


def _macro_f1(items: Sequence[Item], rows: Sequence[Row], evaluator: Evaluator) -> float | None:
    if evaluator.type != "Choice":
        return None
    choices = evaluator.choices or ()
    predicted = [find_label(extracted(evaluator.extract, item.reply.text), choices) for item in items]
    gold = [find_label(row.reference, choices) or row.reference for row in rows]
    return macro_f1(predicted, gold, choices)


# ---------------------------------------------------------------- what is written
def write_items(path: Path, rows: Sequence[Row], arms: Mapping[str, Sequence[Item]], is_judged: bool = False) -> None:
    """One row a query: id, group, query, reference, then draft, answer, error and score of each arm.

    Of a judge or a scorer also why its word is worth a person's look, and the messages of each query: `cowest review`.
    `query` is the last message; `conversation` holds all of them where there are more.
    """
    text = pa.string()
    columns: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], text),
        "group": pa.array([row.group for row in rows], text),
        "query": pa.array([row.query for row in rows], text),
        "conversation": pa.array([conversation(row) if len(row.messages) > 1 else None for row in rows], text),
        "reference": pa.array([row.reference for row in rows], text),
    }
    if is_judged:
        columns["messages"] = pa.array([json.dumps([*row.messages], ensure_ascii=False) for row in rows], text)
    for name in ("candidate", "control", SOLO, "weak"):
        items = arms[name]
        columns[f"{name}_draft"] = pa.array([item.draft for item in items], text)
        columns[f"{name}_answer"] = pa.array([item.reply.text for item in items], text)
        columns[f"{name}_error"] = pa.array([item.reply.error for item in items], text)
        columns[f"{name}_score"] = pa.array([item.score for item in items], pa.float64())
        if is_judged and name != "weak":
            columns[f"{name}_doubt"] = pa.array([item.doubt for item in items], text)
    pq.write_table(pa.table(columns), path, compression="zstd")


def measured(report: EvaluationReport, run: Run) -> dict[str, Any]:
    total = Spent(
        sum(spent.calls for spent in run.spent.values()),
        sum(spent.input_tokens for spent in run.spent.values()),
        sum(spent.output_tokens for spent in run.spent.values()),
        sum(spent.money for spent in run.spent.values()),
    )
    return {
        "queries": report.against_control.n,
        **{f"{arm.name}_score": arm.score for arm in report.arms},
        "hurt_rate": report.arm("candidate").hurt_rate,
        "difference": report.against_control.difference,
        "p_better": report.against_control.p_better,
        "strong_version": report.strong_version,
        "strong_calls": total.calls,
        "judge_calls": run.spent[JUDGE].calls,
        "input_tokens": total.input_tokens,
        "output_tokens": total.output_tokens,
        "money": total.money,
        "strong": dict(run.strong),
        **run.unusual,
        **({"kappa": run.calibration.kappa, "labels": run.calibration.labels} if run.calibration else {}),
    }


def notes(report: EvaluationReport, run: Run) -> list[str]:
    """What a person should look at, a sentence each."""
    found = [*unusual_words(run.unusual), *change_note(run.strong)]
    for name, refused in run.refused.items():
        found += refused_words(refused, report.arms[0].n, f"the weak model of the {name}")
    if not any(arm.score for arm in report.arms):
        found.append(ALL_ZERO)
    return found


if __name__ == "__main__":
    steps.run(main)
