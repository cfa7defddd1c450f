"""Score live answers while a canary runs and keep one report of them up to date: all that the live gate looks at.

    LateReference  the reference that came by feedback, compared by the evaluator
    Feedback       the score that came by feedback
    Judge          the judge's verdict on each answer
    ShadowReplay   each live query through both arms again, in this process, compared pair by pair

Only records decide: the same traces, feedback and book of calls, come to light in the same order, give the same
report. Runs until SIGTERM (or one pass with --once) and rewrites the report atomically about once a second. An
endpoint or store that is away for a while is named in `unscored_reason`, and scoring goes on when it is back. Where a
score costs money no more answers are scored than the gate looks at (`--most`).

A report says which records it was made of and, where scores cost money, in which order they were begun: a run that
begins again goes on in the order of the report at --out. `--once --until REPORT` makes the same report again from the
kept records, which is how a decision is replayed; `--until EPOCH` takes what was recorded by then.

    python -m cowest_training.score_live --job job.yaml --store s3://b/j --candidate pair.json --control solo \\
        --step 0 --since 1764000000 --calls calls.sqlite --out live-0.json
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from .statistics import compare_independent, compare_paired, fisher, mean_interval

if TYPE_CHECKING:
    from cowest_serving.generate import Generator

FIRST_OF_USER = "first-of-user"
SOLO, CANDIDATE, CONTROL = "solo", "candidate", "control"
PASS_SECONDS = 1.0
FAILED = ("weak_failed", "strong_failed")
# The user left, the budget had no room, or a fallback of the strong model answered: says nothing about an arm.
NOT_OURS = ("client_gone", "fell_back", "over_budget")
REFUSED = "refused"  # by the strong model, for what the client sent or for what the draft added to it
CONTROL_PER_CANDIDATE = 2  # answers of the control that are scored for one of the candidate's, where scores cost money


def main(argv: Sequence[str] | None = None) -> int:
    args = _flags(argv)
    settings = steps.load_settings(args.job)
    control = None if args.control == SOLO else read_pair(args.control)
    until = read_until(args.until) if args.until else Until()
    bound = Bound(args.most, args.watched, args.beyond == FIRST_OF_USER)
    canary = Canary(settings, read_pair(args.candidate), control, args.step, args.since, until, bound)
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
    flags.add_argument(
        "--most", type=int, metavar="N", help="score so many answers of an arm, where scores cost money; default: all"
    )
    flags.add_argument("--watched", type=float, metavar="EPOCH", help="when the watch began, which has N of its own")
    flags.add_argument(
        "--beyond", choices=("nothing", FIRST_OF_USER), default="nothing", help="what is scored beyond N all the same"
    )
    flags.add_argument("--once", action="store_true", help="one pass over what is recorded, then end")
    flags.add_argument("--until", metavar="EPOCH|REPORT", help="count only what was recorded by then (with --once)")
    steps.add_generation(flags)
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
    begun: tuple[str, ...] = ()

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
    return Until(seen=report.seen, pending=frozenset(report.pending), begun=report.begun)


@dataclass(frozen=True)
class Bound:
    """How many answers are scored where that costs money: the gate looks at no more."""

    most: int | None = None  # of each arm; of all queries with ShadowReplay. None: all
    watched: float | None = None  # epoch seconds: the watch, which has as many again, began
    every_user: bool = False  # beyond these the first of each user: what an AnytimeValid step goes by


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
    bound: Bound = field(default_factory=Bound)

    @property
    def compared(self) -> tuple[str, str, int]:
        """Candidate, control and step, as the report names them."""
        return self.candidate.digest, self.control.digest if self.control else SOLO, self.step

    @property
    def signal(self) -> str:
        return self.settings.canary.signal if self.settings.canary else "LateReference"

    @property
    def evaluator(self) -> Evaluator:
        return self.settings.feedback.evaluator

    @property
    def needs_reference(self) -> bool:
        return self.signal == "LateReference" or (self.signal == "ShadowReplay" and needs_reference(self.evaluator))

    @property
    def is_paid(self) -> bool:
        """Whether a score costs calls of the strong model, of a judge or of a user's scorer."""
        asks = self.signal != "Feedback" and self.evaluator.type in ("Judge", "HTTP")
        return self.signal == "ShadowReplay" or asks

    @property
    def most(self) -> int | None:
        """Answers that are scored of what has a bound of its own. None: all."""
        return self.bound.most if self.is_paid else None


@dataclass(frozen=True)
class LiveAnswer:
    """What a user got from one of the arms: an answer, or an error."""

    id: str
    arm: str
    user: str  # cluster: a user's answers are not independent
    at: datetime
    row: Row  # without a reference
    answer: str | None  # None: its content was not sampled, or there was none
    failed: bool
    placeholders: Mapping[str, str] = field(default_factory=dict)  # with the digests of what they hide
    refused: bool = False  # by the strong model; neither an answer nor a failure
    weight: int | None = None  # percent of the traffic that its arm had


@dataclass(frozen=True)
class Verdict:
    """What feedback says of one answer."""

    score: float | None = None
    reference: str | None = None
    placeholders: str | None = None  # of the reference, with their digests, as JSON
    heard: datetime | None = field(default=None, compare=False)  # when its first usable reference came

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
        refused=trace["status"] == REFUSED,
        weight=trace.get("weight_percent"),
    )


def verdicts(
    feedback: Sequence[Mapping[str, Any]], is_usable: Callable[[str], bool] = lambda reference: True
) -> dict[str, Verdict]:
    """By trace id. `feedback` in order of time: a source's later score replaces its earlier one, the mean of several
    sources counts; the last reference counts, whoever gave it."""
    found = {trace_id: Verdict(score=score) for trace_id, score in scores_of(feedback).items()}
    for word in feedback:
        said = found.setdefault(word["trace_id"], Verdict())
        if (reference := word["reference"]) is not None:
            heard = said.heard or (word["time"] if is_usable(reference) else None)
            placeholders = word.get("placeholders")
            found[word["trace_id"]] = replace(said, reference=reference, placeholders=placeholders, heard=heard)
    return found


def why_unscorable(answer: LiveAnswer, said: Verdict, canary: Canary) -> str:
    """Why an answer cannot be scored (yet), as what is amiss; "" when it can."""
    if canary.signal == "ShadowReplay":
        if not answer.row.query:
            return "have no content in their trace (traces.contentSamplePercent)"
    elif answer.refused:
        return "were refused by the strong model"
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


# ---------------------------------------------------------------- which are scored (pure)
def in_order(
    canary: Canary, answers: Mapping[str, LiveAnswer], said: Mapping[str, Verdict], begun: Iterable[str] = ()
) -> list[LiveAnswer]:
    """All that can be scored: what was begun in that order, then the rest by when it could be.

    Records come late, from a gateway that could not reach the store: an older one is never before what was begun.
    """
    place = {id_: number for number, id_ in enumerate(begun)}

    def since(answer: LiveAnswer) -> tuple[int, datetime, datetime, str]:
        heard = said.get(answer.id, Verdict()).heard if canary.needs_reference else None
        return place.get(answer.id, len(place)), heard or answer.at, answer.at, answer.id

    nothing = Verdict()
    ready = (each for each in answers.values() if not why_unscorable(each, said.get(each.id, nothing), canary))
    return sorted(ready, key=since)


def firsts(ready: Sequence[LiveAnswer]) -> dict[str, LiveAnswer]:
    """Of each user what comes first of what is `in_order`."""
    found: dict[str, LiveAnswer] = {}
    for answer in ready:
        found.setdefault(answer.user, answer)
    return found


def next_to_score(canary: Canary, ready: Sequence[LiveAnswer], begun: Collection[str]) -> list[LiveAnswer]:
    """Of what can be scored and is not begun what should be: all that is free of charge, of the rest the first `most`.

    What a replay must leave out as it was not scored then (`until.pending`) is left out.
    """
    left = [answer for answer in ready if answer.id not in begun and answer.id not in canary.until.pending]
    if (most := canary.most) is None:
        return left
    taken = Counter(_share(canary, answer) for answer in ready if answer.id in begun)
    first = firsts(ready) if canary.bound.every_user else {}
    chosen = []
    for answer in left:
        share = _share(canary, answer)
        if taken[share] < most and _keeps_pace(canary, answer):
            taken[share] += 1
            chosen.append(answer)
        elif first.get(answer.user) is answer:
            chosen.append(answer)
    return chosen


def not_scored_yet(
    canary: Canary, ready: Sequence[LiveAnswer], scores: Collection[str], begun: Collection[str]
) -> list[str]:
    """What is being scored or will be tried again, so that a scoring anew of the same records must leave it out."""
    is_free = canary.most is None  # all is scored then
    return [answer.id for answer in ready if answer.id not in scores and (is_free or answer.id in begun)]


def _share(canary: Canary, answer: LiveAnswer) -> tuple[str, bool]:
    """What has a bound of its own: each arm, in the last step and in the watch. A replayed query is of both arms."""
    watched = canary.bound.watched is not None and answer.at.timestamp() >= canary.bound.watched
    return "" if canary.signal == "ShadowReplay" else answer.arm, watched


def _keeps_pace(canary: Canary, answer: LiveAnswer) -> bool:
    """The control has most of the traffic in a step. The first of its answers would be of the step's first minutes
    alone: of all of them so many are taken, by id, that they are of the same hours as the candidate's."""
    if canary.signal == "ShadowReplay" or answer.arm == CANDIDATE or not answer.weight:
        return True
    share = CONTROL_PER_CANDIDATE * (100 - answer.weight) / answer.weight
    return int.from_bytes(hashlib.sha256(answer.id.encode()).digest()[:8], "big") < share * 2**64


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
        return verdicts(counted(self._words), lambda reference: not reference_problem(self.canary.evaluator, reference))


# ---------------------------------------------------------------- scoring
Scores = tuple[float, ...]  # of the answer; with ShadowReplay of (candidate's, control's) answer to the query
Key = tuple[str, Verdict]


class Scorer:
    """Scores each answer once for each word said about it. What fails for now is tried again in the next pass.

    `begun`: what a run before began, in that order. It is scored again, before anything that came to light since.
    """

    def __init__(self, canary: Canary, asking: Asking, drafts: Path, begun: Iterable[str] = ()) -> None:
        self._canary, self._asking, self._folder = canary, asking, drafts
        self.begun = dict.fromkeys(begun)  # a set that keeps its order
        self._tasks: dict[Key, asyncio.Task[Scores]] = {}
        self._weak: dict[str, Generator] = {}
        self._drafts: dict[tuple[str, str], GreedyDrafts] = {}  # by weak model and its prompt
        self._drawing = asyncio.Lock()  # the weak models run in one thread at a time
        self.trouble = ""  # what stands in the way now

    def begin(self, ready: Sequence[LiveAnswer], said: Mapping[str, Verdict]) -> None:
        """Start on what should be scored and is not, and again on what another word was said of."""
        left_out = self._canary.until.pending
        again = [
            answer
            for answer in ready
            if answer.id in self.begun and answer.id not in left_out and self._key(answer.id, said) not in self._tasks
        ]
        for answer in (*again, *next_to_score(self._canary, ready, self.begun)):
            self.begun[answer.id] = None
            self._tasks[self._key(answer.id, said)] = asyncio.create_task(
                self._score(answer, said.get(answer.id, Verdict()))
            )

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
        if not self._canary.needs_reference:
            return id_, Verdict(score)
        return id_, Verdict(score, word.reference, word.placeholders)

    async def _score(self, answer: LiveAnswer, said: Verdict) -> Scores:
        if self._canary.signal == "Feedback":
            assert said.score is not None
            return (said.score,)
        row = answer.row
        if self._canary.needs_reference:
            row = replace(row, reference=said.reference_to(answer) or "")
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
    begun: Collection[str] = (),
) -> LiveReport:
    asked = {arm: [answer for answer in answers.values() if answer.arm == arm] for arm in (CANDIDATE, CONTROL)}
    by_arm = {arm: [answer for answer in found if not answer.refused] for arm, found in asked.items()}
    ready = in_order(canary, answers, said, begun)
    pending = sorted(not_scored_yet(canary, ready, scores, begun))
    samples, seed = _samples(canary, answers, scores), canary.settings.training.seed
    paired = canary.signal == "ShadowReplay"
    alone = samples[CONTROL] if paired and canary.control is None else None
    candidate, control, step = canary.compared
    return LiveReport(
        candidate=candidate,
        control=control,
        step=step,
        answers={arm: len(found) for arm, found in by_arm.items()},
        scored={arm: len(samples[arm][0]) for arm in by_arm},
        errors={arm: sum(answer.failed for answer in found) for arm, found in by_arm.items()},
        arms=tuple(_arm_report(arm, samples[arm], alone, seed) for arm in by_arm if samples[arm][0]),
        comparison=_compare(paired, samples[CANDIDATE], samples[CONTROL], seed),
        differences=first_differences(ready, scores) if paired else (),
        unscored_reason=unscored_reason(canary, answers, said, scores, pending, trouble),
        updated=now,
        seen={lane: dict(mark) for lane, mark in (seen or {}).items()},
        pending=tuple(pending),
        begun=tuple(begun) if canary.is_paid else (),
        refused={arm: sum(answer.refused for answer in found) for arm, found in asked.items()},
        p_refused=p_refused(asked[CANDIDATE], asked[CONTROL]),
    )


def p_refused(candidate: Sequence[LiveAnswer], control: Sequence[LiveAnswer]) -> float:
    """One-sided p of "no more of the candidate's users see a refusal than of the control's".

    Of users, since one client that asks in vain again and again is in one arm with all it asks.
    """
    users = [{answer.user for answer in found} for found in (candidate, control)]
    refused = [{answer.user for answer in found if answer.refused} for found in (candidate, control)]
    if not refused[0] or not users[1]:
        return 1.0
    return fisher(len(refused[0]), len(users[0]), len(refused[1]), len(users[1]))


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


def first_differences(ready: Sequence[LiveAnswer], scores: Mapping[str, Scores]) -> tuple[tuple[float, int], ...]:
    """Of each user that of what was begun first, once it is scored: a test that is looked at all the time needs pairs
    that do not belong together, and one that is not another at the next look."""
    scored = [scores[answer.id] for answer in firsts(ready).values() if answer.id in scores]
    return tuple(sorted(Counter(round(candidate - control, 6) for candidate, control in scored).items()))


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
    mean, low, high = mean_interval(scores, users, seed)
    hurt = sum(a > s for a, s in zip((alone or sample)[0], scores, strict=True)) / len(scores)
    return ArmReport(name=arm, n=len(scores), score=mean, low=low, high=high, hurt_rate=hurt)


def unscored_reason(
    canary: Canary,
    answers: Mapping[str, LiveAnswer],
    said: Mapping[str, Verdict],
    scores: Mapping[str, Scores],
    pending: Collection[str],
    trouble: str,
) -> str:
    """A sentence on why some answers do not count (yet); "" when all do."""
    pending = frozenset(pending)
    waiting = [answer for id_, answer in answers.items() if id_ not in scores]
    whys = Counter(
        why_unscorable(answer, said.get(answer.id, Verdict()), canary)
        or ("are being scored" if answer.id in pending else "are more than the gate looks at")
        for answer in waiting
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
    begun = canary.until.begun if args.until else await _begun_before(canary, args, stop)
    records = Records(canary, args.store)
    purpose = f"score_live:{canary.candidate.digest[7:19]}"
    strong = canary.settings.strong
    async with open_asking(
        strong, canary.evaluator, args.calls, purpose=purpose, round_number=args.round,
        redaction=canary.settings.collaboration.redaction, generation=args.generation,
    ) as asking:  # fmt: skip
        scorer = Scorer(canary, asking, drafts_folder(args.calls), begun)
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
                await _pause(stop, pause)
        finally:
            await scorer.aclose()


async def _begun_before(canary: Canary, args: Any, stop: asyncio.Event) -> tuple[str, ...]:
    """Waits for a store that is away: without it the order of a run before would be overwritten by another."""
    while True:
        try:
            return await asyncio.to_thread(read_begun, args.out, canary)
        except store.StoreError as error:
            if args.once or stop.is_set() or not error.retryable:
                raise
        await _pause(stop, PASS_SECONDS)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def _one_pass(canary: Canary, records: Records, scorer: Scorer, seconds: float | None) -> LiveReport:
    trouble = ""
    try:
        await asyncio.to_thread(records.read)
    except store.StoreError as error:
        if not error.retryable:
            raise
        trouble = str(error)
    said = records.verdicts
    scorer.begin(in_order(canary, records.answers, said, scorer.begun), said)
    await scorer.settle(seconds)
    scores, trouble = scorer.scores(said), trouble or scorer.trouble
    return await asyncio.to_thread(
        make_report, canary, records.answers, said, scores, time.time(), trouble, records.seen, scorer.begun
    )


def read_begun(uri: str, canary: Canary) -> tuple[str, ...]:
    """What the run before began, by the report that it left, if that is of this step. Blocks; raises StoreError."""
    if store.exists(uri):
        data = store.get(uri)
        with suppress(ValueError, TypeError, KeyError, AttributeError):  # something else lies there
            report = load_live_report(json.loads(data))
            if (report.candidate, report.control, report.step) == canary.compared:
                return report.begun
    return ()


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
