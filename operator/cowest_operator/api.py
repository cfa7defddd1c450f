"""The manifest as frozen values, and what passes between the shells and the pure heart: World in, Plan out.

Reasons are API: the same constant stands in conditions, events, logs, reports and tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cowest_serving.contract import Collaboration, Mode, Pair, Prompts, Routing, Strong, digest_of, parse
from cowest_training.contract import (
    Data,
    EvaluationReport,
    Feedback,
    LiveReport,
    RouteReport,
    Training,
    evaluator_digest,
)

GROUP, VERSION, KIND, PLURAL = "cowest.dev", "v1alpha1", "CollaborationJob", "collaborationjobs"

# ---------------------------------------------------------------- condition types
READY = "Ready"  # the gateway answers, by the pair or by what the manifest declares instead
DRAFTS_HELP = "DraftsHelp"  # the stable pair was measured against the strong model alone
ROUND_PROGRESSING = "RoundProgressing"
DEGRADED = "Degraded"  # Kubernetes: something that the job needs is missing or fails; what is served stays served

# ---------------------------------------------------------------- reasons
REASON_ANSWERING = "Answering"
REASON_STRONG_ALONE = "StrongAnswersAlone"
REASON_STARTING = "Starting"
REASON_MEASURED_BETTER = "MeasuredBetter"
REASON_NOT_MEASURED = "NotMeasured"
REASON_NOT_BETTER_THAN_SOLO = "NotBetterThanSolo"

REASON_PROGRESSING = "Progressing"
REASONS_OF_STEPS: Mapping[str, str] = {
    "check": "CheckingData",
    "sft": "SupervisedTuning",
    "publish": "ImportingModel",
    "collect": "CollectingData",
    "feedback": "CollectingFeedback",
    "predictor": "LearningShortcuts",
    "dpo": "PreferenceTuning",
    "evaluate": "Evaluating",
}
REASON_JUDGING = "Judging"  # all steps are done, the gate reads their report
REASON_SUSPENDED = "Suspended"
REASON_ERASING = "ErasingArtifacts"  # deletionPolicy, before the job goes
REASON_PAUSED = "PausedByPerson"
REASON_WAITING_FOR_TRACES = "WaitingForTraces"
REASON_WAITING_FOR_SCHEDULE = "WaitingForSchedule"
REASON_COOLDOWN = "Cooldown"
REASON_MAX_ROUNDS = "MaxRoundsReached"
REASON_NO_GAIN = "RoundsWithoutGain"
REASON_STEP_FAILED = "StepFailed"
REASON_STEP_RETRY = "StepWillBeRetried"
REASON_STEP_DEADLINE = "StepDeadlineExceeded"
REASON_DATA_MISSING = "DataMissing"
REASON_BUDGET = "BudgetSpent"
REASON_AWAITING_APPROVAL = "AwaitingApproval"
REASON_WAITING_FOR_ANSWERS = "WaitingForAnswers"
REASON_WAITING_FOR_SERVER = "WaitingForServer"

REASON_PROMOTED = "BetterOfflineAndLive"
REASON_PROMOTED_NOT_WORSE = "BetterOfflineNotWorseLive"
REASON_PROMOTED_OFFLINE = "BetterOffline"
REASON_PROMOTED_BY_PERSON = "PromotedByPerson"
REASON_ROLLED_BACK_BY_PERSON = "RolledBackByPerson"
REASON_VETOED = "VetoedByPerson"
REASON_TOO_FEW_PAIRS = "TooFewPairs"
REASON_QUARANTINED = "TracesQuarantined"
REASON_FOREIGN_REPORT = "ReportOfAnotherPair"
REASON_TOO_FEW_HELD_OUT = "TooFewHeldOut"
REASON_STRONG_CHANGED = "StrongModelChanged"
REASON_TOO_MANY_ERRORS = "TooManyErrors"
REASON_NOT_CALIBRATED = "EvaluatorNotCalibrated"
REASON_NO_GAIN_OFFLINE = "NoMeasurableGain"
REASON_EFFECT_TOO_SMALL = "EffectTooSmall"
REASON_WORSE_THAN_SOLO = "WorseThanSolo"
REASON_HURTS = "HurtsTooOften"
REASON_SLICE_LOSS = "SliceLoss"
REASON_WORSE_LIVE = "WorseOnLiveTraffic"
REASON_LOSS_NOT_EXCLUDED = "LossNotExcluded"
REASON_GAIN_NOT_SHOWN = "GainNotShownLive"
REASON_TOO_FEW_ANSWERS = "TooFewAnswers"
REASON_SERVER_NOT_READY = "ServerNotReady"
REASON_REVALIDATED = "Revalidated"
REASON_STRONG_FOLLOWS = "StrongModelFollows"
REASON_EDIT_WITHDRAWN = "EditWithdrawn"
REASON_SPEC_CHANGED = "SpecChanged"

REASON_AS_EXPECTED = "AsExpected"
REASON_NOT_ON_KUBERNETES = "NotOnKubernetes"
REASON_MANIFEST_INVALID = "ManifestInvalid"
REASON_NO_KSERVE = "KServeMissing"
REASON_NO_ARGO = "ArgoWorkflowsMissing"
REASON_CONTROLLER_AWAY = "ControllerAway"
REASON_WORKFLOW_STUCK = "WorkflowStuck"
REASON_ACTION_NOT_UNDERSTOOD = "ActionNotUnderstood"
REASON_NO_KUEUE = "KueueMissing"
REASON_NOT_ON_RAY = "NotOnRay"
REASON_NO_RIGHT = "RightMissing"
REASON_CANNOT_SCALE = "CannotScale"
REASON_SECRET_MISSING = "SecretMissing"
REASON_CONFIG_MAP_MISSING = "ConfigMapMissing"
REASON_STORE_AWAY = "ObjectStoreUnavailable"
REASON_OBSERVER_AWAY = "ObserverUnavailable"
REASON_DATA_INVALID = "DataInvalid"
REASON_PROXY_AWAY = "StrongProxyUnavailable"
REASON_STRONG_FAILS = "StrongEndpointFails"
REASON_PODS_FAIL = "PodsFail"
REASON_SERVER_FAILS = "WeakServerFails"
REASON_API_REFUSED = "ApiServerRefused"
REASON_NAME_TAKEN = "NameTaken"
REASON_STATE_UNREADABLE = "StateUnreadable"
REASON_OPERATOR_FAILS = "OperatorFails"  # a fault of ours; its log has more

Standing = Literal["Passed", "Chosen", "NotPassed"]  # of a stable pair: by the gates, by a person, or not at all
Decision = Literal["Promoted", "Refused", "RolledBack"]
Origin = Literal["Baseline", "Round", "Proposal", "Edit", "Revalidation"]
Stage = Literal["Preparing", "Canary", "Watch"]
Verb = Literal["pause", "resume", "approve", "promote", "rollback", "propose"]


# ---------------------------------------------------------------- the manifest
@dataclass(frozen=True)
class NameRef:
    name: str


@dataclass(frozen=True)
class KeyRef:
    name: str
    key: str


@dataclass(frozen=True)
class Resources:
    """As Kubernetes has them: resource name -> quantity."""

    requests: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PodMeta:
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PodTemplate:
    """Laid over the pods that CoWest makes; `spec` holds fields of a PodSpec."""

    metadata: PodMeta = field(default_factory=PodMeta)
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weak:
    model: str
    engine: Literal["Transformers", "vLLM"]
    replicas: int
    resources: Resources | None = None
    pod_template: PodTemplate | None = None


@dataclass(frozen=True)
class Trigger:
    new_traces: int
    schedule: str | None = None


@dataclass(frozen=True)
class Rounds:
    max: int
    trigger: Trigger
    cooldown_seconds: int
    stop_after_rounds_without_gain: int


@dataclass(frozen=True)
class Gate:
    min_held_out: int
    significance: float
    minimum_effect_points: float
    max_hurt_percent: float
    max_slice_loss_points: float


@dataclass(frozen=True)
class CanaryStep:
    weight_percent: int
    min_answers: int


@dataclass(frozen=True)
class Canary:
    steps: tuple[CanaryStep, ...]
    deadline_seconds: int
    max_error_percent: float
    max_loss_points: float
    approval: Literal["Automatic", "Manual"]
    signal: Literal["LateReference", "Feedback", "Judge", "ShadowReplay"]
    watch_seconds: int
    test: Literal["FixedLooks", "AnytimeValid"] = "FixedLooks"


@dataclass(frozen=True)
class Ingress:
    host: str
    class_name: str | None = None
    tls_secret_name: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gateway:
    engine: Literal["ASGI", "RayServe"]
    port: int
    replicas: int
    max_replicas: int | None = None
    resources: Resources | None = None
    client_keys_secret_ref: NameRef | None = None
    ingress: Ingress | None = None
    workers: int = 1
    max_body_bytes: int = 4 * 1024 * 1024


@dataclass(frozen=True)
class ObjectStore:
    bucket: str
    endpoint: str | None = None
    prefix: str | None = None
    region: str | None = None
    path_style: bool | None = None
    ca_bundle_ref: KeyRef | None = None
    credentials_secret_ref: NameRef | None = None


@dataclass(frozen=True)
class Pods:
    """The part of `training` that says where its steps run, and for how long at most."""

    resources: Resources | None = None
    pod_template: PodTemplate | None = None
    step_deadline_seconds: int | None = None  # None in what was frozen before there was one


@dataclass(frozen=True)
class DeletionPolicy:
    models: Literal["Keep", "Delete"] = "Keep"
    traces: Literal["Keep", "Delete"] = "Keep"


@dataclass(frozen=True)
class Retention:
    retention_days: int = 30
    content_sample_percent: int = 100


@dataclass(frozen=True)
class Spec:
    suspend: bool
    weak: Weak
    strong: Strong
    collaboration: Collaboration
    data: Data
    feedback: Feedback
    training: Training
    rounds: Rounds
    gate: Gate
    canary: Canary
    gateway: Gateway
    object_store: ObjectStore | None = None
    deletion_policy: DeletionPolicy = field(default_factory=DeletionPolicy)
    traces: Retention = field(default_factory=Retention)


@dataclass(frozen=True)
class Job:
    name: str
    generation: int
    spec: Spec

    @property
    def prompts(self) -> Prompts:
        """The resolved templates; `parse_job` refuses a manifest in which they are not resolved."""
        assert self.spec.collaboration.prompts is not None
        return self.spec.collaboration.prompts


def parse_job(manifest: Mapping[str, Any]) -> Job:
    """A validated, defaulted manifest with resolved prompts, as values. Raises `SettingsError`."""
    spec = parse(Spec, manifest["spec"])
    metadata = manifest["metadata"]
    if spec.collaboration.prompts is None:
        raise ValueError(
            "collaboration.prompts: wanted resolved templates, saw none; call manifest.resolve_prompts first"
        )
    return Job(metadata["name"], int(metadata.get("generation", 1)), spec)


def parse_pods(training: Mapping[str, Any]) -> Pods:
    """Where the steps run, and for how long at most: of the manifest's `training`."""
    return parse(Pods, training, "spec.training")


# ---------------------------------------------------------------- status
@dataclass(frozen=True)
class Condition:
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    observed_generation: int
    last_transition: float


@dataclass(frozen=True)
class Outcome:
    """How one trial of a candidate ended: a row of `status.rounds`."""

    number: int
    origin: Origin
    decision: Decision
    reason: str
    message: str
    pair: str  # digest
    started_at: float
    ended_at: float
    by: str | None = None  # the person, when a person decided
    pairs: int | None = None
    difference: float | None = None
    p_value: float | None = None
    score: float | None = None
    live_difference: float | None = None
    live_answers: int | None = None
    dataset: str | None = None  # digest of the frozen data set
    note: str = ""  # what the evaluation showed besides, as a sentence
    proposed_by: str | None = None  # the person, when a person proposed it
    proposed_why: str | None = None


@dataclass(frozen=True)
class Word:
    """What a person decided and the loop has still to carry out."""

    by: str
    why: str


@dataclass(frozen=True)
class Routes:
    """What going by a predictor was measured to cost one pair on the held-out queries."""

    pair: str  # digest
    uri: str  # of the predictor's file
    digest: str
    reports: tuple[RouteReport, ...] = ()


@dataclass(frozen=True)
class Trial:
    """The candidate on its way: prepared by steps, gated, canaried, watched. `number` 0 is the baseline."""

    number: int
    origin: Origin
    stage: Stage
    started_at: float
    stage_since: float
    model: str | None = None  # URI that was proposed or newly declared
    pair: Pair | None = None  # known once the weak model is there
    done: Mapping[str, Any] = field(default_factory=dict)  # step name -> what later decisions need of its metrics
    step: int = 0  # of the canary
    step_since: float = 0.0
    looks: int = 0  # at the live answers, within this step
    away: float = 0.0  # seconds of this step without an engine or paused by a person: no part of its deadline
    ran: float | None = None  # seconds of this step that count, from when a person paused it
    since: float = 0.0  # of the watch: begin of its live report, which is that of the last canary step
    entered: Mapping[str, int] = field(default_factory=dict)  # the candidate's live counts when the watch began
    approved_by: str | None = None
    promoted: Word | None = None  # a person's: it is promoted as soon as its server answers
    difference: float | None = None
    p_value: float | None = None
    discordant: float | None = None  # share of held-out queries that it and the control score differently
    score: float | None = None
    note: str = ""  # what the evaluation showed besides, as a sentence
    evaluator: str | None = None  # digest of the evaluator that the evaluation went by
    routes: Routes | None = None  # where a predictor was measured with its pair
    live_difference: float | None = None
    live_answers: int | None = None
    by: str | None = None  # who proposed it
    why: str | None = None
    declared: str | None = None  # `edit_digest` of the manifest when the trial began


def edit_digest(base: str | None, pair: Pair) -> str:
    """Of what a manifest says of a pair: the base model and the settings, the tuned weights left aside."""
    return digest_of([base, pair.prompts.digest, pair.draft, pair.strong_model])


@dataclass(frozen=True)
class Proposal:
    model: str
    by: str
    why: str


@dataclass(frozen=True)
class Spent:
    calls: int = 0
    tokens: int = 0
    money: float = 0.0


@dataclass(frozen=True)
class Live:
    """What live answers have cost on a day, as gateways told the book."""

    day: str  # UTC
    calls: int = 0
    tokens: int = 0
    money: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What the steps have paid for so far, in all and in the current round. Live answers are in the traces."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0
    round: Spent = field(default_factory=Spent)
    live: Live | None = None  # where strong.budget limits a day


@dataclass(frozen=True)
class Sight:
    """What the last evaluation on a held-out set says of how small a gain it can show."""

    queries: int
    discordant: float  # share of them that candidate and control scored differently
    slices: Mapping[str, int] = field(default_factory=dict)  # group -> queries, of the smallest


@dataclass(frozen=True)
class Looked:
    """How many candidates were judged on one held-out set."""

    held_out: str  # digest of the rows
    looks: int


@dataclass(frozen=True)
class Status:
    conditions: tuple[Condition, ...] = ()
    stable: Pair | None = None
    stable_round: int | None = None
    serving: Mode = "StrongAlone"  # what the stable arm answers with: Pair, or StrongAlone while drafts hurt
    standing: Standing | None = None  # what is known of the stable pair; `serving` follows from it and the manifest
    routes: Routes | None = None  # of the stable pair, where a predictor was measured with it
    previous: Pair | None = None  # what a rollback by a person goes back to
    previous_serving: Mode = "StrongAlone"
    previous_standing: Standing | None = None
    previous_round: int | None = None
    previous_base: str | None = None
    going_back: Word | None = None  # a person's rollback to `previous`, as soon as its server answers
    base: str | None = None  # weak.model of the manifest that the stable model descends from
    evaluator: str | None = None  # digest that the stable pair was last measured with
    strong_generation: int = 0  # how often the strong model was found to be another one than it had been
    candidate: Trial | None = None
    trials: int = 0  # started so far; the next one's number
    looks: int = 0  # offline gates on this held-out set so far
    held_out: str | None = None  # its URI
    looked: tuple[Looked, ...] = ()  # at each held-out set, whatever its address; the newest last
    sight: Sight | None = None  # of that held-out set, once it was gone through
    rounds: tuple[Outcome, ...] = ()  # the last ten
    tuned_rounds: int = 0
    without_gain: int = 0  # tuned rounds in a row that were not promoted
    last_round_ended: float = 0.0
    traces_seen: int = 0  # usable traces when the last round froze its data
    traces_since: float = 0.0  # when that was; shells count `TraceCounts.since_last` from here
    train: str | None = None  # data.train that the last round, or the baseline, learnt from
    paused_by: str | None = None
    paused_now: bool = False  # the step that ran is stopped too
    vetoed: tuple[str, ...] = ()  # pair digests that a person rolled back: never promoted by the automatic actor
    refused_edit: str | None = None  # digest of the declared pair settings that did not pass
    refused_trial: Trial | None = None  # of that edit, for a person who promotes it all the same
    proposals: tuple[Proposal, ...] = ()
    last_action: str = ""  # id of the last action of a person that was taken in
    last_transition: str = ""  # the last event, as a sentence
    budget: Budget = field(default_factory=Budget)


KEEP_ROUNDS = 10
KEEP_SLICES = 20
KEEP_LOOKED = 36


# ---------------------------------------------------------------- world
@dataclass(frozen=True)
class StepState:
    phase: Literal["Running", "Succeeded", "Failed"]
    code: int = 0
    attempts: int = 1
    message: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""  # of the artifact; a model's is the digest that its server reports
    again: str = ""  # of a step that failed for good: what begins it again, as a sentence
    reason: str = ""  # of a step that failed, or looks again after it did, where that has a name of its own


@dataclass(frozen=True)
class ServerState:
    ready: bool
    endpoint: str = ""  # http://host:port/v1
    digest: str = ""  # what it says it serves
    message: str = ""


@dataclass(frozen=True)
class TraceCounts:
    all: int = 0
    usable: int = 0
    reason: str = ""  # why the others are not usable
    since_last: int | None = None  # usable and given since `Status.traces_since`; None: nobody counted them apart


@dataclass(frozen=True)
class Action:
    """What a person said: recorded with who and why, taken in once."""

    id: str  # sorts by time
    verb: Verb
    by: str
    why: str
    at: float
    model: str | None = None
    now: bool = False  # of a pause: what runs is stopped too


@dataclass(frozen=True)
class Trouble:
    """Something that a person may have to mend, said in one sentence."""

    reason: str
    message: str
    of_all_answers: bool = False  # users meet it, and no other endpoint stands in


@dataclass(frozen=True)
class World:
    """All that a decision needs, gathered before it. `now` in epoch seconds."""

    now: float
    job: Job
    status: Status
    store: str  # URI under which artifacts of this job lie
    calls: str  # the book of paid calls
    has_explanations: bool | None  # the training rows carry an `explanation`; None: a `check` step has to look
    evaluator: str  # digest of the declared evaluator
    steps: Mapping[str, StepState] = field(default_factory=dict)
    servers: Mapping[str, ServerState] = field(default_factory=dict)  # by weak digest
    gateway: ServerState = field(default_factory=lambda: ServerState(False))
    report: EvaluationReport | None = None  # of the running trial
    live: LiveReport | None = None  # of the running canary step
    traces: TraceCounts = field(default_factory=TraceCounts)
    budget: Budget = field(default_factory=Budget)
    actions: tuple[Action, ...] = ()
    frozen: Job | None = None  # what the running trial goes by (`objects.desired.followed`); None: what is declared
    waiting: tuple[str, ...] = ()  # fields edited since that trial began, which hold from the next one on
    blocked: Trouble | None = None  # the manifest cannot be followed here: nothing of the loop goes on
    troubles: tuple[Trouble, ...] | None = None  # what is missing or fails; None: an engine that ends instead

    @property
    def trial_job(self) -> Job:
        """What the running trial goes by."""
        return self.frozen or self.job

    @property
    def trial_evaluator(self) -> str:
        """Digest of the evaluator that the running trial is measured with."""
        return evaluator_digest(self.frozen.spec.feedback.evaluator) if self.frozen else self.evaluator


# ---------------------------------------------------------------- plan
@dataclass(frozen=True)
class StepSpec:
    """A command with URIs in and out. Engines add the keys, threads and the place to run."""

    name: str  # deterministic: r<trial>-<step>
    module: str
    out: str
    args: tuple[tuple[str, str], ...] = ()  # (--flag, value)
    files: tuple[tuple[str, Any], ...] = ()  # (--flag, JSON value that the engine puts into a file)
    calls_strong: bool = False
    keeps_running: bool = False  # a watcher: ended when no plan wants it any more


@dataclass(frozen=True)
class ServerSpec:
    """A weak model to serve. Its identity is the digest, not the role: promotion moves traffic, never a process."""

    digest: str
    model: str  # URI


@dataclass(frozen=True)
class Event:
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Failure:
    """Ends the embedded run; on Kubernetes it is a condition and is retried."""

    code: int
    message: str
    is_of_proposal: bool = False  # its trial was begun by a person, who can take it back


@dataclass(frozen=True)
class Plan:
    servers: tuple[ServerSpec, ...]
    steps: tuple[StepSpec, ...]
    routing: Routing
    status: Status
    events: tuple[Event, ...] = ()
    again_after: float = 60.0  # seconds
    finished: str | None = None  # a sentence: no round will come by itself any more
    failure: Failure | None = None
