"""Score live answers while a canary runs and keep one report of them up to date: all that the live gate looks at.

    LateReference  the reference that came by feedback, compared by the evaluator
    Feedback       the score that came by feedback
    Judge          the judge's verdict on each answer
    ShadowReplay   each live query through both arms again, in this process, compared pair by pair

Only records decide: the same traces, feedback and book of calls give the same report. Runs until SIGTERM (or one pass
with --once) and rewrites the report atomically about once a second. An endpoint or store that is away for a while is
named in `unscored_reason`, and scoring goes on when it is back.

A report says which records it was made of. `--once --until REPORT` makes the same report again from the kept records,
which is how a decision is replayed; `--until EPOCH` takes what was recorded by then.

    python -m cowest_training.score_live --job job.yaml --store s3://b/j --candidate pair.json --control solo \\
        --step 0 --since 1764000000 --calls calls.sqlite --out live-0.json
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowest_serving import store
from cowest_serving.contract import Pair
from cowest_serving.models import ModelError
from cowest_serving.redaction import digests_of, joined_reference
from cowest_serving.traces import Lane, Mark, read_new
from cowest_serving.words import counted, scores_of

from . import steps
from .asking import Asking, GreedyDrafts, drafts_folder, load_generator, open_asking, read_pair
from .contract import (
    EXIT_BUDGET,
    EXIT_OK,
    EXIT_RETRY,
    ArmReport,
    Comparison,
    Evaluator,
    LiveReport,
    Row,
    StepError,
    StepSettings,
    load_live_report,
)
from .evaluator import needs_reference, reference_problem
from .statistics import compare_independent, compare_paired, mean_interval

if TYPE_CHECKING:
    from cowest_serving.generate import Generator

SOLO, CANDIDATE, CONTROL = "solo", "candidate", "control"
PASS_SECONDS = 1.0
FAILED = ("weak_failed", "strong_failed")
# The user left, asked what no model answers, or a fallback of the strong model answered: says nothing about an arm.
NOT_OURS = ("client_gone", "refused", "fell_back", "over_budget")


def main(argv: Sequence[str] | None = None) -> int:
    args = _flags(argv)
    settings = steps.load_settings(args.job)
    control = None if args.control == SOLO else read_pair(args.control)
    until = read_until(args.until) if args.until else Until()
    canary = Canary(settings, read_pair(args.candidate), control, args.step, args.since, until)
    asyncio.run(_watch(canary, args, steps.Progress(args.progress, "score_live")))
    return EXIT_OK


def _flags(argv: Sequence[str] | None) -> Any:
    flags = steps.parser(__doc__)
    flags.add_argument("--store", required=True, metavar="URI", help="where traces and feedback lie")
    flags.add_argument("--candidate", required=True, metavar="FILE", help="pair.json of the candidate")
    flags.add_argument(
        "--control", required=True, metavar="FILE|solo", help="pair.json of what is served now, or `solo`"
    )
    flags.add_argument("--step", required=True, type=int, metavar="K", help="the canary step that the report is of")
    flags.add_argument("--since", required=True, type=float, metavar="EPOCH", help="when the step began")
    flags.add_argument("--calls", required=True, metavar="FILE", help="book of paid calls (SQLite, local)")
    flags.add_argument("--round", type=int, metavar="N", help="whose budget pays; default: the book's latest round")
    flags.add_argument("--once", action="store_true", help="one pass over what is recorded, then end")
    flags.add_argument("--until", metavar="EPOCH|REPORT", help="count only what was recorded by then (with --once)")
    args = flags.parse_args(argv)
    if args.until and not args.once:
        flags.error("--until looks back: it needs --once")
    return args


@dataclass(frozen=True)
class Until:
    """Where the records end: nowhere, at a time, or exactly where those of an earlier report ended."""

    at: float | None = None
    seen: Mapping[str, Mark] | None = None
    pending: frozenset[str] = frozenset()

    def of(self, lane: Lane) -> Mark | float | None:
        return self.at if self.seen is None else self.seen.get(lane, {})


def read_until(value: str) -> Until:
    """Epoch seconds, or the path of a report. Raises `StepError`."""
    with suppress(ValueError):
        return Until(at=float(value))
    try:
        report = load_live_report(json.loads(Path(value).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StepError(f"--until {value}: wanted epoch seconds or a report of this step, saw: {error}.") from None
    return Until(seen=report.seen, pending=frozenset(report.pending))


# ---------------------------------------------------------------- records (pure)
@dataclass(frozen=True)
class Canary:
    """What is compared, and by what."""

    settings: StepSettings
    candidate: Pair
    control: Pair | None  # None: the strong model alone
    step: int
    since: float
    until: Until = field(default_factory=Until)

    @property
    def signal(self) -> str:
        return self.settings.canary.signal if self.settings.canary else "LateReference"

    @property
    def evaluator(self) -> Evaluator:
        return self.settings.feedback.evaluator

    @property
    def needs_reference(self) -> bool:
        return self.signal == "LateReference" or (self.signal == "ShadowReplay" and needs_reference(self.evaluator))


@dataclass(frozen=True)
class LiveAnswer:
    """One answer that a user got from one of the arms."""

    id: str
    arm: str
    user: str  # cluster: a user's answers are not independent
    at: datetime
    row: Row  # without a reference
    answer: str | None  # None: its content was not sampled, or there was none
    failed: bool
    placeholders: Mapping[str, str] = field(default_factory=dict)  # with the digests of what they hide


@dataclass(frozen=True)
class Verdict:
    """What feedback says of one answer."""

    score: float | None = None
    reference: str | None = None
    placeholders: str | None = None  # of the reference, with their digests, as JSON

    def reference_to(self, answer: LiveAnswer) -> str | None:
        """In the placeholders of that answer. None: it names somebody, and nobody can tell whom."""
        return joined_reference({"reference": self.reference, "placeholders": self.placeholders}, answer.placeholders)


def arm_of(trace: Mapping[str, Any], candidate: Pair, control: Pair | None) -> str | None:
    """Whose answer it is; None for neither's, a replay, or one that says nothing about an arm."""
    if trace["shadow"] or trace["status"] in NOT_OURS or is_routed(trace):
        return None
    if trace["arm"] == "candidate":
        return CANDIDATE if trace["pair_digest"] == candidate.digest else None
    return CONTROL if control is None or trace["pair_digest"] == control.digest else None


def is_routed(trace: Mapping[str, Any]) -> bool:
    """A predictor could choose its way. Arms are compared while none does; some such answers may still come then."""
    return (trace.get("propensity") or 1.0) < 1.0


def live_answer(trace: Mapping[str, Any], arm: str) -> LiveAnswer:
    messages = (
        json.loads(trace["messages"]) if trace["messages"] else [{"role": "user", "content": trace["query"] or ""}]
    )
    failed = trace["status"] in FAILED
    return LiveAnswer(
        id=trace["trace_id"],
        arm=arm,
        user=trace["user_hash"] or trace["trace_id"],
        at=trace["time"],
        row=Row(trace["trace_id"], trace["query"] or "", tuple(messages), reference="", source="trace"),
        # A failure with an answer (of whoever stood in) is what the user got, and is scored as that.
        answer=None if failed and not trace["answer"] else trace["answer"],
        failed=failed,
        placeholders=digests_of(trace),
    )


def verdicts(feedback: Sequence[Mapping[str, Any]]) -> dict[str, Verdict]:
    """By trace id. `feedback` in order of time: a source's later score replaces its earlier one, the mean of several
    sources counts; the last reference counts, whoever gave it."""
    found = {trace_id: Verdict(score=score) for trace_id, score in scores_of(feedback).items()}
    for word in feedback:
        said = found.setdefault(word["trace_id"], Verdict())
        if word["reference"] is not None:
            found[word["trace_id"]] = replace(said, reference=word["reference"], placeholders=word.get("placeholders"))
    return found


def why_unscorable(answer: LiveAnswer, said: Verdict, canary: Canary) -> str:
    """Why an answer cannot be scored (yet), as what is amiss; "" when it can."""
    if canary.signal == "ShadowReplay":
        if not answer.row.query:
            return "have no content in their trace (traces.contentSamplePercent)"
    elif answer.answer is None and canary.signal != "Feedback":
        return "have no answer in their trace (it failed, or traces.contentSamplePercent left it out)"
    if canary.signal == "Feedback":
        return "" if said.score is not None else "have no score by feedback yet"
    if not canary.needs_reference:
        return ""
    if said.reference is None:
        return "have no late reference yet"
    if (reference := said.reference_to(answer)) is None:
        return "have a reference with identifiers that came without the key of its x-request-id"
    problem = reference_problem(canary.evaluator, reference)
    return f"have a reference that the evaluator cannot use ({problem})" if problem else ""


# ---------------------------------------------------------------- reading
@dataclass
class Records:
    """Traces and feedback of this canary step, read a little at a time."""

    canary: Canary
    store_uri: str
    answers: dict[str, LiveAnswer] = field(default_factory=dict)
    seen: dict[str, Mark] = field(default_factory=dict)  # by lane
    _words: list[Mapping[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        """Take up what was recorded since the last pass. Blocks; raises StoreError."""
        for trace in self._new("traces"):
            if (arm := arm_of(trace, self.canary.candidate, self.canary.control)) and trace[
                "trace_id"
            ] not in self.answers:
                self.answers[trace["trace_id"]] = live_answer(trace, arm)
        self._words.extend(self._new("feedback"))

    def _new(self, lane: Lane) -> list[dict[str, Any]]:
        until = self.canary.until.of(lane)
        table, mark = read_new(self.store_uri, lane, self.seen.get(lane, {}), since=self.canary.since, until=until)
        rows: list[dict[str, Any]] = table.to_pylist()
        self.seen[lane] = mark
        return rows

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return verdicts(counted(self._words))


# ---------------------------------------------------------------- scoring
Scores = tuple[float, ...]  # of the answer; with ShadowReplay of (candidate's, control's) answer to the query
Key = tuple[str, Verdict]


class Scorer:
    """Scores each answer once for each word said about it. What fails for now is tried again in the next pass."""

    def __init__(self, canary: Canary, asking: Asking, drafts: Path) -> None:
        self._canary, self._asking, self._folder = canary, asking, drafts
        self._tasks: dict[Key, asyncio.Task[Scores]] = {}
        self._weak: dict[str, Generator] = {}
        self._drafts: dict[tuple[str, str], GreedyDrafts] = {}  # by weak model and its prompt
        self._drawing = asyncio.Lock()  # the weak models run in one thread at a time
        self.trouble = ""  # what stands in the way now

    def begin(self, answers: Mapping[str, LiveAnswer], said: Mapping[str, Verdict]) -> None:
        """Start on what can be scored and is not."""
        for answer in answers.values():
            key = self._key(answer.id, said)
            if key in self._tasks or answer.id in self._canary.until.pending:
                continue
            if not why_unscorable(answer, key[1], self._canary):
                self._tasks[key] = asyncio.create_task(self._score(answer, key[1]))

    async def settle(self, seconds: float | None) -> None:
        """Wait for the scores under way, at most so long. Raises what no waiting mends."""
        if open_tasks := [task for task in self._tasks.values() if not task.done()]:
            await asyncio.wait(open_tasks, timeout=seconds)
        self.trouble = ""
        for key, task in list(self._tasks.items()):
            if task.done() and (error := task.exception()) is not None:
                if not may_pass(error):
                    raise error
                self.trouble = str(error)
                del self._tasks[key]

    def scores(self, said: Mapping[str, Verdict]) -> dict[str, Scores]:
        """By trace id, by the latest word."""
        return {
            id_: task.result()
            for (id_, word), task in self._tasks.items()
            if task.done() and (id_, word) == self._key(id_, said)
        }

    async def aclose(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _key(self, id_: str, said: Mapping[str, Verdict]) -> Key:
        """With the part of the word that the signal goes by: no other makes a score anew."""
        word = said.get(id_, Verdict())
        score = word.score if self._canary.signal == "Feedback" else None
        return id_, Verdict(score, word.reference if self._canary.needs_reference else None)

    async def _score(self, answer: LiveAnswer, said: Verdict) -> Scores:
        if self._canary.signal == "Feedback":
            assert said.score is not None
            return (said.score,)
        row = (
            replace(answer.row, reference=said.reference_to(answer) or "")
            if self._canary.needs_reference
            else answer.row
        )
        if self._canary.signal == "ShadowReplay":
            return await self._replay(row)
        return (await self._asking.score_text(row, answer.answer or ""),)

    async def _replay(self, row: Row) -> Scores:
        return await self._through(row, self._canary.candidate), await self._through(row, self._canary.control)

    async def _through(self, row: Row, pair: Pair | None) -> float:
        draft = await self._draft(row, pair) if pair else None
        if pair is None or draft is None:
            reply = await self._asking.solo(row, pair or self._canary.candidate, "shadow")
        else:
            reply = await self._asking.answer(row, draft, pair, "shadow")
        return await self._asking.score(row, reply)

    async def _draft(self, row: Row, pair: Pair) -> str | None:
        async with self._drawing:
            how = (pair.weak_digest, pair.prompts.draft)
            if how not in self._drafts:
                limit = self._canary.settings.collaboration.draft_max_tokens
                self._drafts[how] = GreedyDrafts(pair, limit, self._folder, lambda: self._generator(pair))
            return await asyncio.to_thread(self._drafts[how].draw, row)

    def _generator(self, pair: Pair) -> Generator:
        """Loaded for the first draft that is not on disk. Blocks."""
        if pair.weak_digest not in self._weak:
            self._weak[pair.weak_digest] = load_generator(pair)
        return self._weak[pair.weak_digest]


def may_pass(error: BaseException) -> bool:
    """Whether a watcher should wait for better times rather than end."""
    if isinstance(error, ModelError | store.StoreError):
        return error.retryable
    return isinstance(error, StepError) and error.code in (EXIT_RETRY, EXIT_BUDGET)


# ---------------------------------------------------------------- the report (pure)
def make_report(
    canary: Canary,
    answers: Mapping[str, LiveAnswer],
    said: Mapping[str, Verdict],
    scores: Mapping[str, Scores],
    now: float,
    trouble: str = "",
    seen: Mapping[str, Mark] | None = None,
) -> LiveReport:
    by_arm = {arm: [answer for answer in answers.values() if answer.arm == arm] for arm in (CANDIDATE, CONTROL)}
    samples, seed = _samples(canary, answers, scores), canary.settings.training.seed
    paired = canary.signal == "ShadowReplay"
    alone = samples[CONTROL] if paired and canary.control is None else None
    return LiveReport(
        candidate=canary.candidate.digest,
        control=canary.control.digest if canary.control else SOLO,
        step=canary.step,
        answers={arm: len(found) for arm, found in by_arm.items()},
        scored={arm: len(samples[arm][0]) for arm in by_arm},
        errors={arm: sum(answer.failed for answer in found) for arm, found in by_arm.items()},
        arms=tuple(_arm_report(arm, samples[arm], alone, seed) for arm in by_arm if samples[arm][0]),
        comparison=_compare(paired, samples[CANDIDATE], samples[CONTROL], seed),
        differences=first_differences(answers, scores) if paired else (),
        unscored_reason=unscored_reason(canary, answers, said, scores, trouble),
        updated=now,
        seen={lane: dict(mark) for lane, mark in (seen or {}).items()},
        pending=tuple(
            sorted(
                id_
                for id_, answer in answers.items()
                if id_ not in scores and not why_unscorable(answer, said.get(id_, Verdict()), canary)
            )
        ),
    )


Sample = tuple[tuple[float, ...], tuple[str, ...]]  # scores and the users that they come from


def _samples(canary: Canary, answers: Mapping[str, LiveAnswer], scores: Mapping[str, Scores]) -> dict[str, Sample]:
    """Ordered by trace id: the order of arrival must not change a resampled interval."""
    found: dict[str, list[tuple[float, str]]] = {CANDIDATE: [], CONTROL: []}
    for id_ in sorted(scores.keys() & answers.keys()):
        answer = answers[id_]
        arms = (CANDIDATE, CONTROL) if canary.signal == "ShadowReplay" else (answer.arm,)
        for arm, score in zip(arms, scores[id_], strict=True):
            found[arm].append((score, answer.user))
    return {arm: (tuple(s for s, _ in sample), tuple(u for _, u in sample)) for arm, sample in found.items()}


def first_differences(answers: Mapping[str, LiveAnswer], scores: Mapping[str, Scores]) -> tuple[tuple[float, int], ...]:
    """Of each user the one that came first: a test that is looked at all the time needs pairs that do not belong
    together, and one that is not another at the next look."""
    first: dict[str, LiveAnswer] = {}
    for answer in (answers[id_] for id_ in scores.keys() & answers.keys()):
        known = first.get(answer.user)
        if known is None or (answer.at, answer.id) < (known.at, known.id):
            first[answer.user] = answer
    gains = Counter(round(scores[a.id][0] - scores[a.id][1], 6) for a in first.values())
    return tuple(sorted(gains.items()))


# Remembered, as most passes see no new score and the bootstrap takes its time.
@lru_cache(maxsize=2)
def _compare(paired: bool, candidate: Sample, control: Sample, seed: int) -> Comparison | None:
    if not candidate[0] or not control[0]:
        return None
    if paired:
        return compare_paired(candidate[0], control[0], candidate[1], seed)
    return compare_independent(candidate[0], control[0], (candidate[1], control[1]), seed)


@lru_cache(maxsize=4)
def _arm_report(arm: str, sample: Sample, alone: Sample | None, seed: int) -> ArmReport:
    """`alone`: what the strong model alone scored on the same queries, where that is known."""
    scores, users = sample
    clusters = users if len(set(users)) < len(users) else None
    mean, low, high = mean_interval(scores, clusters, seed)
    hurt = sum(a > s for a, s in zip((alone or sample)[0], scores, strict=True)) / len(scores)
    return ArmReport(name=arm, n=len(scores), score=mean, low=low, high=high, hurt_rate=hurt)


def unscored_reason(
    canary: Canary,
    answers: Mapping[str, LiveAnswer],
    said: Mapping[str, Verdict],
    scores: Mapping[str, Scores],
    trouble: str,
) -> str:
    """A sentence on why some answers do not count (yet); "" when all do."""
    waiting = [answer for id_, answer in answers.items() if id_ not in scores]
    whys = Counter(
        why_unscorable(answer, said.get(answer.id, Verdict()), canary) or "are being scored" for answer in waiting
    )
    parts = [f"{count} {why}" for why, count in whys.most_common()]
    counted = f"Of {len(answers)} answers {', '.join(parts)}." if parts else ""
    return " ".join(part for part in (counted, trouble) if part)


# ---------------------------------------------------------------- the watch
async def _watch(canary: Canary, args: Any, progress: steps.Progress) -> None:
    if canary.signal == "Judge" and needs_reference(canary.evaluator):
        raise StepError(
            f"spec.canary.signal: Judge wanted an evaluator that needs no reference, saw {canary.evaluator.type}; "
            "set spec.feedback.evaluator.type to Judge, or choose another signal."
        )
    stop = _stop_on_signals() if not args.once else asyncio.Event()
    records = Records(canary, args.store)
    purpose = f"score_live:{canary.candidate.digest[7:19]}"
    strong = canary.settings.strong
    async with open_asking(
        strong, canary.evaluator, args.calls, purpose=purpose, round_number=args.round,
        redaction=canary.settings.collaboration.redaction,
    ) as asking:  # fmt: skip
        scorer = Scorer(canary, asking, drafts_folder(args.calls))
        try:
            while True:
                last = args.once or stop.is_set()
                began = time.monotonic()
                report = await _one_pass(canary, records, scorer, None if args.once else PASS_SECONDS)
                await asyncio.to_thread(write_report, args.out, report)
                progress.update(report.scored[CANDIDATE], None, "scored answers of the candidate")
                if last:
                    return
                # A pass over much data takes its time; it gets at most half of it.
                pause = max(PASS_SECONDS - (time.monotonic() - began), time.monotonic() - began)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause)
        finally:
            await scorer.aclose()


async def _one_pass(canary: Canary, records: Records, scorer: Scorer, seconds: float | None) -> LiveReport:
    trouble = ""
    try:
        await asyncio.to_thread(records.read)
    except store.StoreError as error:
        if not error.retryable:
            raise
        trouble = str(error)
    said = records.verdicts
    scorer.begin(records.answers, said)
    await scorer.settle(seconds)
    scores = scorer.scores(said)
    return await asyncio.to_thread(
        make_report, canary, records.answers, said, scores, time.time(), trouble or scorer.trouble, records.seen
    )


def write_report(uri: str, report: LiveReport) -> None:
    """Atomically. A store that is away for now gets the next one."""
    try:
        store.put(uri, json.dumps(asdict(report), indent=1, ensure_ascii=False).encode())
    except store.StoreError as error:
        if not error.retryable:
            raise


def _stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C: the watch ends with one last report."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


if __name__ == "__main__":
    steps.run(main)
