"""What the steps, the engines and the operator agree on: settings, artifact layouts and reports. Pure values, no I/O.

Every step writes its files under its output URI and `manifest.json` last: an output without a manifest does not exist.
A step that finds its manifest with the same inputs digest has nothing to do and exits 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeVar

from cowest_serving.contract import Collaboration, Pair, SecretRef, Strong, digest_of

MANIFEST = "manifest.json"
# Raise a type's when its rule in evaluator.py changes: scores of different rules must not be compared. The stable
# pair is then measured anew, as by another evaluator.
EVALUATOR_RULES = {"ExactMatch": 3, "TokenF1": 3, "Choice": 4, "Numeric": 5, "Judge": 2, "HTTP": 2}

# Exit codes of every step and of `cowest`: retry is worth it only for EXIT_RETRY.
EXIT_OK = 0
EXIT_FAILED = 1  # a bug or an unforeseen fault: stack trace on stderr
EXIT_BAD_INPUT = 2  # the person must change something: the message says what
EXIT_MISSING = 66  # (EX_NOINPUT) what the manifest names is not in the store yet: somebody will bring it
EXIT_RETRY = 75  # (EX_TEMPFAIL) an endpoint or the store is away, disk full: run it again later
EXIT_BUDGET = 76  # the budget is spent: state is kept, resumable
EXIT_INTERRUPTED = 130
# What a step's log calls its ends, in the words of the operator's conditions and events.
REASONS = {
    EXIT_OK: "StepDone",
    EXIT_FAILED: "StepFailed",
    EXIT_BAD_INPUT: "StepFailed",
    EXIT_MISSING: "DataMissing",
    EXIT_RETRY: "StepWillBeRetried",
    EXIT_BUDGET: "BudgetSpent",
    EXIT_INTERRUPTED: "StepInterrupted",
}
REASON_PROGRESS, REASON_NOTE = "StepProgress", "StepNote"


class StepError(Exception):
    """Ends a step with one message (wanted, seen, remedy) and an exit code."""

    def __init__(self, message: str, code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


SHOWN = 5  # problems that one message lists


class ProblemsError(StepError):
    """What is wrong with rows. Its message lists the first few; who wants all has them in `problems`."""

    def __init__(self, what: str, problems: Sequence[str], remedy: str) -> None:
        self.what, self.problems, self.remedy = what, tuple(problems), remedy
        super().__init__(self.listed(SHOWN))

    def listed(self, shown: int | None = None) -> str:
        count = len(self.problems)
        more = f"\n  ... and {count - shown} more" if shown is not None and count > shown else ""
        lines = "".join(f"\n  {problem}" for problem in self.problems[:shown])
        return f"{self.what}: {count} problem{'s'[: count > 1]}:{lines}{more}\n{self.remedy}"


# ---------------------------------------------------------------- settings
@dataclass(frozen=True)
class Calibration:
    """Answers that people labelled: an evaluator that does not agree with them well enough promotes nothing."""

    labels: str  # URI
    min_kappa: float  # that the lower end of the interval has to reach


@dataclass(frozen=True)
class Juror:
    """One more judge: asked as the first one, with its rubric and time-out."""

    endpoint: str
    model: str
    api_key_secret_ref: SecretRef | None = None


@dataclass(frozen=True)
class Evaluator:
    """E(answer, query) -> [0, 1]. Of the answer the first group (or the whole match) of `extract` is compared."""

    type: Literal["ExactMatch", "TokenF1", "Choice", "Numeric", "Judge", "HTTP"]
    extract: str | None = None
    choices: tuple[str, ...] | None = None  # Choice: the label set
    absolute_tolerance: float | None = None  # Numeric
    relative_tolerance: float | None = None  # Numeric
    endpoint: str | None = None  # Judge (an OpenAI /v1) and HTTP (the scorer's URL)
    model: str | None = None  # Judge
    api_key_secret_ref: SecretRef | None = None
    rubric: str | None = None  # Judge: what a good answer is
    timeout_seconds: int | None = None
    calibration: Calibration | None = None
    jury: tuple[Juror, ...] | None = None  # Judge: beside the first
    jury_rule: Literal["Majority", "Mean"] | None = None

    @property
    def judges(self) -> tuple[Evaluator, ...]:
        """Each as an evaluator of its own, the first one first; none where nobody judges."""
        if self.type != "Judge":
            return ()
        alone = replace(self, jury=None, jury_rule=None)
        more = (
            replace(alone, endpoint=juror.endpoint, model=juror.model, api_key_secret_ref=juror.api_key_secret_ref)
            for juror in self.jury or ()
        )
        return (alone, *more)

    @property
    def asked(self) -> tuple[Evaluator, ...]:
        """Each with an endpoint and a key of its own: the judges, else the evaluator itself."""
        return self.judges or (self,)


def evaluator_digest(settings: Evaluator) -> str:
    """Of what decides the score. Keys, time-outs, the judge's address and people's labels do not."""
    address = settings.endpoint if settings.type == "HTTP" else None
    return digest_of(
        [
            EVALUATOR_RULES[settings.type],
            settings.type,
            settings.extract,
            settings.choices,
            settings.absolute_tolerance,
            settings.relative_tolerance,
            address,
            settings.model,
            settings.rubric,
            *([[juror.model for juror in settings.jury], settings.jury_rule] if settings.jury else ()),
        ]
    )


@dataclass(frozen=True)
class Feedback:
    evaluator: Evaluator
    drafts_per_query: int  # K; the first is greedy, the others sampled
    temperature: float
    rule: Literal["BestVersusWorst", "SignOfGain"]
    min_margin: float  # BestVersusWorst: best score - worst score must reach it
    max_queries: int  # per round
    min_pairs: int  # fewer: the round ends with TooFewPairs
    calls: Literal["All", "Deciding", "Fewest"] = "All"  # that are paid; in what was frozen before this key: All
    explore_percent: int = 0  # of the queries, of which all is paid whatever `calls` says
    judging: Literal["Pointwise", "Listwise"] = "Pointwise"  # of a Judge's calls here


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class Stage:
    """Hyper-parameters of one kind of tuning. Those with a default are of preferences (`cowest_training.methods`)."""

    tuning: Literal["LoRA", "Full"]
    epochs: int
    learning_rate: float
    batch_size: int
    beta: float | None = None
    nll_weight: float | None = None
    gamma: float | None = None
    label_flip_rate: float | None = None
    validation_percent: int | None = None
    replay_percent: int | None = None


@dataclass(frozen=True)
class Training:
    sft: Literal["Auto", "Always", "Never"]
    method: Literal["DPO", "IPO", "SimPO", "KTO", "GRPO"]
    seed: int
    max_length: int  # tokens of prompt + draft
    lora: Lora
    supervised: Stage
    preference: Stage


@dataclass(frozen=True)
class Data:
    train: str
    held_out: str


@dataclass(frozen=True)
class LiveSignal:
    """The part of `canary` that `score_live` reads: by what live answers are scored."""

    signal: Literal["LateReference", "Feedback", "Judge", "ShadowReplay"]


@dataclass(frozen=True)
class Retention:
    retention_days: int


@dataclass(frozen=True)
class Trust:
    """How far the traces are trusted that a round learns from (`cowest_training.screen`)."""

    max_user_percent: int  # of the usable traces; 100: whatever one user gives
    max_source_percent: int  # of one application's key, or of one who says references
    max_near_copies: int
    trigger_phrases: Literal["Quarantine", "Ignore"]


@dataclass(frozen=True)
class StepSettings:
    """The sections of a (defaulted) spec that steps read: `cowest_serving.contract.parse(StepSettings, spec)`."""

    strong: Strong
    collaboration: Collaboration
    data: Data
    feedback: Feedback
    training: Training
    canary: LiveSignal | None = None
    traces: Retention | None = None
    trust: Trust | None = None  # None in what was frozen before there was one: nothing is screened


OF_DRAFTS = ("KTO", "GRPO")  # methods of tuning that learn from every draft, and not from pairs


class Asks(Protocol):
    """A spec, or the part of it that steps read."""

    @property
    def collaboration(self) -> Collaboration: ...
    @property
    def feedback(self) -> Feedback: ...
    @property
    def training(self) -> Training: ...


def calls_of(spec: Asks) -> str:
    """`feedback.calls`, but All where the gains of all drafts are learnt from: by shortcuts, or by a method."""
    shortcuts = spec.collaboration.shortcuts
    learns_from_all = spec.training.method in OF_DRAFTS or (shortcuts and shortcuts.routed)
    return "All" if learns_from_all else spec.feedback.calls


# ---------------------------------------------------------------- artifacts
@dataclass(frozen=True)
class Row:
    """One example. `messages` is always set (a bare `query` becomes one user message)."""

    id: str
    query: str
    messages: tuple[Mapping[str, Any], ...]
    reference: str
    explanation: str | None = None
    group: str | None = None
    source: str = "train"  # train | trace
    where: str = field(default="", compare=False)  # file:line it was read from, for messages; no part of the data


# Files of artifacts: the rows of a data set; of the feedback step.
DATASET, LEDGER, PAIRS = "dataset.jsonl", "ledger.parquet", "pairs.jsonl"

# LEDGER: one row a draft (the gain ledger). What was not asked is null (`feedback.calls`).
LEDGER_COLUMNS: dict[str, str] = {
    "query_id": "string",
    "query": "string",
    "reference": "string",
    "group": "string",
    "draft_index": "int32",
    "seed": "int64",
    "draft": "string",
    "draft_tokens": "int32",
    "draft_finish_reason": "string",  # stop | length; "" where a draft of older days does not say
    "answer": "string",
    "answer_score": "double",
    "solo": "string",
    "solo_score": "double",
    "gain": "double",  # answer_score - solo_score
    "answer_call": "string",  # key of the paid call in the call cache
    "solo_call": "string",
    "weak_digest": "string",
    "prompts_digest": "string",
    "strong_model": "string",
    "strong_version": "string",
    "evaluator_digest": "string",
    "answer_input_tokens": "int64",  # of the call, whoever paid it; equal drafts share it
    "answer_output_tokens": "int64",
    "answer_money": "double",  # by `strong.prices`, 0 where there are none
    "solo_input_tokens": "int64",
    "solo_output_tokens": "int64",
    "solo_money": "double",
    "propensity": "double",  # chance with which all of the query was asked; null where only what decides was
}
# PAIRS: {"query_id", "prompt": [messages], "chosen": str, "rejected": str,
#   "chosen_score", "rejected_score", "solo_score", "chosen_finish_reason", "rejected_finish_reason"}; `prompt` is what
#   the weak model saw.


@dataclass(frozen=True)
class Manifest:
    """manifest.json of every artifact, written last."""

    kind: str  # Model | Dataset | Feedback | Predictor | Evaluation | LiveScore
    digest: str  # of the outputs' content
    inputs_digest: str  # of everything that went in: settings, input digests, seed, code version
    inputs: Mapping[str, Any]
    outputs: Mapping[str, str]  # file -> sha256
    metrics: Mapping[str, Any]
    step: str
    version: str  # of cowest
    started: str  # RFC 3339
    seconds: float


# ---------------------------------------------------------------- reports: what the gates read
@dataclass(frozen=True)
class ArmReport:
    """One arm over the held-out set (or over the live answers). Fractions in [0, 1], 95 % intervals."""

    name: str  # candidate | control | solo | weak
    n: int
    score: float  # mean of the evaluator's score
    low: float
    high: float
    hurt_rate: float  # share of queries where solo scores higher than this arm (0 for solo itself)
    errors: int = 0  # queries that got no answer (score 0)
    strong_calls: int = 0  # paid calls made for this arm (cached ones not counted again)
    macro_f1: float | None = None  # Choice only


@dataclass(frozen=True)
class SliceReport:
    group: str
    n: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Candidate against control. Offline: paired by query. Live: two samples, or paired with ShadowReplay."""

    n: int  # pairs (or the smaller arm)
    difference: float  # mean score of candidate - control, in [-1, 1]
    low: float  # 95 % clustered bootstrap
    high: float
    p_better: float  # one-sided p of "candidate is not better"
    p_worse: float  # one-sided p of "candidate is not worse"
    better: int
    worse: int
    test: str  # McNemar | PairedPermutation | FisherExact | Permutation | ClusterPermutation


@dataclass(frozen=True)
class RouteReport:
    """What going by a predictor would cost one arm on the held-out queries, against the usual way for all of them."""

    arm: str  # candidate | control
    shortcut: str  # strongAlone | weakAlone
    n: int
    routed: int  # queries; each saves a draft (strongAlone) or a call of the strong model (weakAlone)
    loss: float  # of the mean score over all n
    low: float  # 95 %
    high: float


LEAST_LABELS = 50  # fewer say too little of an evaluator, however well they agree with it


@dataclass(frozen=True)
class CalibrationReport:
    """How far an evaluator agrees with people (decision 16). Fractions, 95 % intervals."""

    labels: int  # that count: drawn by chance
    agreement: float  # share of them where both say the same
    low: float
    high: float
    kappa: float  # agreement beyond chance: 0 is chance, 1 is always
    kappa_low: float
    kappa_high: float
    opposite: int  # of the labels: one calls right, or better, what the other calls wrong, or worse
    picked: int  # labels of answers that were shown for a disagreement: no sample, so they do not count
    picked_agreement: float
    labels_digest: str


@dataclass(frozen=True)
class EvaluationReport:
    """report.json of the evaluate step."""

    candidate: str  # pair digest
    control: str  # pair digest, or "solo" while the strong model alone is served
    held_out_digest: str
    evaluator_digest: str
    strong_model: str
    strong_version: str
    arms: tuple[ArmReport, ...]
    against_control: Comparison
    against_solo: Comparison
    slices: tuple[SliceReport, ...] = ()
    # arm (candidate, control, solo) -> version of the strong model -> answers; "" where the endpoint named none
    strong_versions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    routes: tuple[RouteReport, ...] = ()  # where a predictor was measured
    predictor: str = ""  # digest of its file
    calibration: CalibrationReport | None = None  # where people's labels are declared

    def arm(self, name: str) -> ArmReport:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class LiveReport:
    """One per canary step, rewritten by `score_live` as answers get scored: the gate is a pure function of it."""

    candidate: str
    control: str
    step: int
    answers: Mapping[str, int]  # arm -> answers given in this step
    scored: Mapping[str, int]  # arm -> of these, scored
    errors: Mapping[str, int]  # arm -> answers that failed
    arms: tuple[ArmReport, ...] = ()
    comparison: Comparison | None = None  # None until both arms have a scored answer
    unscored_reason: str = ""  # why answers are not usable, as a sentence
    updated: float = 0.0  # epoch seconds
    # Exactly what this report was made of, for replaying it: the last segment of each writer by lane (traces,
    # feedback), the answers that were to be scored but were not yet, and where scores cost money all answers whose
    # scoring was begun, in that order.
    seen: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    pending: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    # ShadowReplay: candidate minus control on what was begun first of a user, and how many users had it.
    differences: tuple[tuple[float, int], ...] = ()
    # arm -> requests that the strong model refused, in neither `answers` nor `errors`: what the client sent or what the
    # draft added is to blame. With the one-sided p of "no more of the candidate's users see that than the control's".
    refused: Mapping[str, int] = field(default_factory=dict)
    p_refused: float = 1.0


T = TypeVar("T")


def _known(kind: type[T], data: Mapping[str, Any]) -> T:
    """Without what `kind` has no field for: a step that is newer than its reader may say more, as after a rollback."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    return kind(**{name: value for name, value in data.items() if name in names})


def load_report(data: Mapping[str, Any]) -> EvaluationReport:
    """The inverse of `dataclasses.asdict`, as report.json holds it."""
    calibration = data.get("calibration")
    nested = {
        "calibration": _known(CalibrationReport, calibration) if calibration else None,
        "arms": tuple(_known(ArmReport, arm) for arm in data["arms"]),
        "against_control": _known(Comparison, data["against_control"]),
        "against_solo": _known(Comparison, data["against_solo"]),
        "slices": tuple(_known(SliceReport, part) for part in data.get("slices", ())),
        "routes": tuple(_known(RouteReport, part) for part in data.get("routes", ())),
    }
    return _known(EvaluationReport, {**data, **nested})


def load_live_report(data: Mapping[str, Any]) -> LiveReport:
    """The inverse of `dataclasses.asdict`, as `score_live` writes it."""
    comparison = data.get("comparison")
    nested = {
        "arms": tuple(_known(ArmReport, arm) for arm in data.get("arms", ())),
        "comparison": _known(Comparison, comparison) if comparison else None,
        "differences": tuple((float(value), int(users)) for value, users in data.get("differences", ())),
        "pending": tuple(data.get("pending", ())),
        "begun": tuple(data.get("begun", ())),
    }
    return _known(LiveReport, {**data, **nested})


@dataclass(frozen=True)
class PairFile:
    """pair.json: how `evaluate` and `feedback` are told which pair to run."""

    pair: Pair
    extras: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- progress
def how_far(state: Mapping[str, Any]) -> str:
    """A step's progress file in words: done of total, rate, time left, and what the step says besides."""
    of_total = f" of {state['total']:g}" if state["total"] is not None else ""
    message = f"; {state['message']}" if state["message"] else ""
    done = f"{state['done']:g}{of_total} {state['unit']}"
    return f"{done}{pace(state['rate'], state['unit'], state['eta_seconds'])}{message}"


def pace(rate: float | None, unit: str, seconds_left: float | None) -> str:
    """What stands behind a count of what is done: ", 2.5 rows/s, 40 s left", or less of it."""
    each = f", {rate:{'.3g' if rate < 999.5 else '.0f'}} {unit}/s" if rate else ""
    left = f", {seconds_left:.0f} s left" if seconds_left else ""
    return f"{each}{left}"
