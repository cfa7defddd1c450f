"""What people say and ask, of a job on this machine or in a cluster: status, explain, pause, ..., propose, lineage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cowest_cli import jobs
from cowest_cli.measured import Measured, measured
from cowest_cli.options import Output, Saying, Where, spread
from cowest_cli.preflight import check_proposed
from cowest_cli.view import held_out, printable, rounds_table, spent, traces
from cowest_operator import api, people
from cowest_operator.manifest import FILE, absolute_uri, local_path
from cowest_serving import store
from cowest_serving.contract import KEY_MARK
from cowest_training.contract import StepError

if TYPE_CHECKING:
    from cowest_cli import cluster

SHOWN_EVENTS = 10


@dataclass(frozen=True)
class Story:
    """How far a job has come, wherever it runs."""

    status: api.Status
    written: Mapping[str, Any]  # the same as docs/api.md has it
    document: Mapping[str, Any] | None  # the manifest, which names the currency
    shown: Mapping[str, Any]  # what `status -o json` has beside the status
    notes: tuple[str, ...]  # why it may not be the last word
    events: Callable[[], list[dict[str, Any]]]


def _story(where: Where) -> Story:
    if job := in_cluster(where):
        seen = job.known()
        return Story(
            seen.status,
            jobs.for_people(seen.body["status"]),
            seen.body,
            job.shown(seen),
            tuple(seen.notes()),
            lambda: job.events(seen),
        )
    place = known(where)
    running = jobs.runs(place)
    shown = {
        "gateway": (jobs.read_json(place.run) or {}).get("gateway"),
        "routing": jobs.read_json(place.routing) or {},
        "traces": jobs.read_json(place.traces),
        "running": running,
    }
    status = _with_what_was_paid(place)
    notes = [] if running else ["Nothing runs now, so nothing answers: this is how the last `cowest run` left it."]
    for action in jobs.read_actions(place, status.last_action):
        notes.append(f"{action.verb} by {action.by} is recorded and not taken in yet.")
    return Story(
        status, jobs.written(place, status), jobs.read_json(place.job), shown, tuple(notes),
        lambda: jobs.read_events(place),
    )  # fmt: skip


def _with_what_was_paid(place: jobs.Home) -> api.Status:
    """The status with the spending of the book itself: a kill leaves the one that was written a little behind."""
    status = jobs.read_status(place)
    try:
        return replace(status, budget=jobs.read_budget(place, status))
    except StepError:  # it is written just now, or is not ours to open
        return status


def in_cluster(where: Where) -> cluster.Job | None:
    """`None`: it is on this machine. The Kubernetes client is loaded only where it is needed."""
    if where.job is None:
        if told := next((n for n in ("namespace", "context", "kubeconfig") if getattr(where, n) is not None), None):
            raise StepError(f"--{told}: wanted the name of a job in a cluster with it, saw none.")
        return None
    if where.file or where.home:
        raise StepError(f"wanted {where.job} in a cluster or -f/--home on this machine, saw both.")
    from cowest_cli import cluster

    return cluster.Job(where)


def _home(where: Where) -> jobs.Home:
    if where.file is None and where.home is None:
        raise StepError(
            "wanted -f MANIFEST or --home FOLDER of a job on this machine, or the name of a job in a cluster, saw none."
        )
    return jobs.home_of(where.file, where.home)


def known(where: Where) -> jobs.Home:
    place = _home(where)
    if not place.status.exists():
        raise StepError(f"{place.root}: wanted the state of a job, saw none. Start it with `cowest run -f ...`.")
    return place


# ---------------------------------------------------------------- asking
@spread
def status(where: Where, output: Output = "text") -> None:
    """One table of rounds, what answers now and what is awaited."""
    story = _story(where)
    if output == "json":
        typer.echo(json.dumps({"status": story.written, **story.shown}))
        return
    for note in story.notes:
        typer.echo(printable(note))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=max(console.width, 120))  # a pipe has no edge
    for condition in story.status.conditions:
        line = f"{condition.type:18} {condition.status:8} {condition.reason}: {_message(condition, story.status)}"
        console.print(printable(line), soft_wrap=True)
    console.print(f"{'Spent':18} {spent(story.status, story.document)}", soft_wrap=True)
    if counts := story.shown.get("traces"):
        console.print(f"{'Traces':18} {printable(traces(api.TraceCounts(**counts)))}", soft_wrap=True)
    for sentence in held_out(story.status, story.document):
        console.print(f"{'Held out':18} {printable(sentence)}", soft_wrap=True)
    console.print(rounds_table(story.status))


@spread
def explain(where: Where, output: Output = "text") -> None:
    """What holds the loop now and how each round was decided, in sentences, with the last events."""
    story = _story(where)
    seen, events = story.status, story.events()
    if output == "json":
        told = {name: story.written[name] for name in ("conditions", "rounds")}
        typer.echo(json.dumps({**told, "events": events[-50:]}))
        return
    for condition in seen.conditions:
        message = _message(condition, seen)
        typer.echo(printable(f"{condition.type} is {condition.status} ({condition.reason}): {message}"))
    for outcome in seen.rounds:
        by = f" by {outcome.by}" if outcome.by else ""
        whose = f" by {outcome.proposed_by}, {outcome.proposed_why!r}" if outcome.proposed_by else ""
        head = f"Round {outcome.number} ({outcome.origin}{whose}): {outcome.decision}{by}, {outcome.reason}"
        typer.echo(printable(f"{head}: {outcome.message} {outcome.note}".rstrip()))
    if seen.vetoed:
        typer.echo(f"{len(seen.vetoed)} pair(s) rolled back by a person are never promoted automatically.")
    for event in events[-SHOWN_EVENTS:]:
        typer.echo(printable(f"{time.strftime('%m-%d %H:%M:%S', time.localtime(event['time']))}  {event['message']}"))
    for note in story.notes:
        typer.echo(printable(note), err=True)


def _message(condition: api.Condition, status: api.Status) -> str:
    """With the pause, where the loop has not come to it yet: a step that runs goes on, and so does what it pays."""
    holds = condition.reason == api.REASON_PAUSED
    if condition.type != api.ROUND_PROGRESSING or status.paused_by is None or holds:
        return condition.message
    then = "nothing runs" if status.paused_now else "what runs goes on to its end, then nothing begins"
    return f"{condition.message} Paused by {status.paused_by}: {then}."


# ---------------------------------------------------------------- saying
def _say(
    verb: api.Verb, where: Where, saying: Saying, output: str, model: str | None = None, now: bool = False
) -> None:
    if job := in_cluster(where):
        _say_in_cluster(job, verb, saying, output, model, now)
        return
    place = _addressed(where)
    first = _refuse_what_changes_nothing(place, verb)
    action = jobs.record_action(place, verb, saying.why, saying.by, model, now)
    if output == "json":
        typer.echo(json.dumps(asdict(action)))
        return
    hit = f" It {_what_it_ends(jobs.read_status(place))}." if verb == "rollback" and first else ""
    typer.echo(
        f"{verb} by {printable(action.by)} is recorded; the running or next `cowest run` of this job takes it in.{hit}"
    )


def _what_it_ends(status: api.Status) -> str:
    """What a rollback acts on: the trial under way goes before the last promotion."""
    if trial := status.candidate:
        return f"ends the trial of round {trial.number} ({trial.origin}), which {_DOING[trial.stage]}"
    if status.previous:
        return f"undoes the promotion of round {status.stable_round}"
    return f"takes back the only pair, of round {status.stable_round}: the strong model answers alone"


_DOING: Mapping[api.Stage, str] = {
    "Preparing": "is being prepared and evaluated",
    "Canary": "is in canary",
    "Watch": "is watched after its canary",
}


def _addressed(where: Where) -> jobs.Home:
    """Of a manifest the folder may still have to be made; one that is named has to be there."""
    place = _home(where)
    if where.home is not None and not place.status.exists():
        raise StepError(f"--home {where.home}: wanted the state of a job, saw none. Check the path.")
    return place


def _refuse_what_changes_nothing(place: jobs.Home, verb: api.Verb) -> bool:
    """Whether nothing waits to be taken in before it: only then the status says what it will act on."""
    seen = jobs.read_status(place)
    waiting = jobs.read_actions(place, seen.last_action)
    if not waiting and (no := people.refusal(seen, verb)):
        raise StepError(f"{verb}: {no} Nothing was recorded.")
    return not waiting


def _say_in_cluster(
    job: cluster.Job, verb: api.Verb, saying: Saying, output: str, model: str | None, stop: bool
) -> None:
    seen, action = job.say(verb, saying.why, job.caller(saying.by), model, stop)
    outcome = job.outcome(seen, action, saying.timeout) if saying.wait else None
    if output == "json":
        more = {"job": job.name, "namespace": job.namespace, "takenIn": saying.wait, "outcome": outcome}
        typer.echo(json.dumps({**asdict(action), **more}))
        return
    typer.echo(printable(outcome or f"{verb} by {action.by} is recorded; the operator takes it in."))


@spread
def pause(
    where: Where,
    saying: Saying,
    now: Annotated[
        bool, typer.Option("--now", help="Stop the step that runs too; resumed, it pays for no call twice.")
    ] = False,
    output: Output = "text",
) -> None:
    """Start no round and take no canary step until `resume`; answers go on.

    What goes on spending: live answers ask the strong model as before, and a step that runs already (collecting
    feedback, an evaluation) goes on to its end, with all its calls. With --now it is stopped at once, and begun anew by
    `resume`: the answers that it has paid for are kept, a training begins from its start.
    """
    _say("pause", where, saying, output, now=now)


@spread
def resume(where: Where, saying: Saying, output: Output = "text") -> None:
    """Take a pause back."""
    _say("resume", where, saying, output)


@spread
def approve(where: Where, saying: Saying, output: Output = "text") -> None:
    """Let a candidate that waits for approval (canary.approval: Manual) be promoted."""
    _say("approve", where, saying, output)


@spread
def promote(where: Where, saying: Saying, output: Output = "text") -> None:
    """Promote the candidate in canary now, whatever the live gate would say."""
    _say("promote", where, saying, output)


@spread
def rollback(where: Where, saying: Saying, output: Output = "text") -> None:
    """End the running trial, or undo the last promotion; the pair is never promoted automatically again.

    A trial under way goes first, whatever its stage (prepared, in canary, watched): it ends and the stable pair stays.
    Only where there is none, the last promotion is undone: to undo it during a trial, say it twice. Of a job on this
    machine the verb says which it is.
    """
    _say("rollback", where, saying, output)


@spread
def propose(
    model: Annotated[
        str,
        typer.Option(help="Model to gate as a candidate: s3:// or hf://, on this machine also a folder or file://."),
    ],
    where: Where,
    saying: Saying,
    output: Output = "text",
) -> None:
    """Gate any model as a candidate: same gate, same canary as a tuned one.

    A folder on this machine is looked at first, as `cowest validate` looks at a base; what could not be tuned or served
    is refused, and nothing recorded. A model elsewhere is looked at when its round begins: one that cannot be loaded is
    refused then, before anything is paid for it. `cowest rollback` takes a proposal back whose trial goes on failing.
    """
    if where.job is not None:
        if model.startswith(FILE) or "://" not in model:
            raise StepError(
                f"--model {model}: wanted an s3:// or hf:// address, saw a folder; pods see no files of yours. Bring it"
                " in with `cowest upload` and name what it prints."
            )
        _say("propose", where, saying, output, model)
        return
    uri = absolute_uri(model if "://" in model else Path(model).resolve().as_uri(), Path.cwd())
    if uri.startswith(FILE) and not local_path(uri).is_dir():
        raise StepError(f"--model {model}: wanted a model folder, saw none there.")
    check_proposed(uri, jobs.read_json(_addressed(where).job))
    _say("propose", where, saying, output, uri)


# ---------------------------------------------------------------- lineage
@spread
def lineage(
    what: Annotated[str, typer.Argument(help="Request id of an answer, or (the start of) a model digest.")],
    where: Where,
    output: Output = "text",
) -> None:
    """From an answer to its draft, pair, models and data; from a model to all that went into it.

    With an answer comes by what its pair was measured (evaluator, held-out rows, strong model and its version, and the
    live answers of its canary), what its users said of it (`POST /v1/feedback`), oldest first, and what learnt from it:
    frozen data sets or their quarantine, pairs, models.

    Of a job in a cluster it is read from the object store with your own keys: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, and COWEST_S3_ENDPOINT where this machine reaches the store at another address than the pods.
    """
    job = in_cluster(where)
    root = job.open_store(job.see()) if job else known(where).store.as_uri()
    request_id = what.partition(KEY_MARK)[0]
    answer = None if what.startswith("sha256:") else _trace(root, request_id)
    feedback = _feedback(root, request_id) if answer else []
    by = measured(root, answer["pair_digest"]) if answer else Measured()
    learnt = list(_learnt(root, request_id)) if answer else []
    digest = answer["weak_digest"] if answer else what
    chain = list(_ancestry(root, digest)) if digest else []
    if answer is None and not chain:
        raise StepError(f"{what}: wanted a request id from x-request-id or a model digest of this job, saw neither.")
    if output == "json":
        told = {
            "answer": answer,
            "measured": by.for_programs(),
            "feedback": feedback,
            "models": chain,
            "learnt": learnt,
        }
        typer.echo(json.dumps(told, default=str))
        return
    if answer:
        _show_answer(answer, by, feedback)
        for part in learnt:
            typer.echo(
                printable(f"{'learnt':15} round {part['round']}: {part['step']} {part['digest']}: {part['what']}")
            )
    for depth, part in enumerate(chain):
        typer.echo(f"{'  ' * depth}{part['step']} {part['digest']} <- {json.dumps(part['inputs'], default=str)}")


def _show_answer(answer: Mapping[str, Any], by: Measured, feedback: Iterable[Mapping[str, Any]]) -> None:
    """What is empty is left out."""
    for name in ("trace_id", "time", "arm", "mode", "pair_digest", "weak_digest", "prompts_digest", "draft_form",
                 "strong_model", "strong_version", "query", "draft", "answer", "tool_calls"):  # fmt: skip
        if answer[name] not in (None, ""):
            typer.echo(f"{name:15} {printable(answer[name])}")
        elif name == "draft" and answer["mode"] == "StrongAlone":
            typer.echo(f"{name:15} none: the strong model answered alone")
    for name, words in by.lines():
        typer.echo(printable(f"{name:15} {words}"))
    for said in feedback:
        names = ("thumb", "score", "reference", "correction", "accepted", "comment")
        parts = (f"{name} {said[name]}" for name in names if said[name] not in (None, ""))
        typer.echo(printable(f"{'feedback':15} {said['time']} {', '.join(parts)}"))


def _trace(root: str, trace_id: str) -> dict[str, Any] | None:
    from cowest_serving.traces import read_traces

    return next(iter(_of(read_traces(root), trace_id)), None)


def _feedback(root: str, trace_id: str) -> list[dict[str, Any]]:
    """What users said of an answer, oldest first."""
    from cowest_serving.traces import read_feedback

    return _of(read_feedback(root), trace_id)


def _learnt(root: str, trace_id: str) -> Iterator[dict[str, Any]]:
    """What saw the trace since: data sets, ledgers, models."""
    from cowest_training.forget import trail

    seen = trail(root, trace_id)
    for part in (*seen.datasets, *seen.ledgers, *seen.models):
        what = {
            "collect": "held back in its quarantine" if part.held_back else "a row of the data set",
            "feedback": f"{part.drafts} drafts, {part.pairs} pairs",
        }.get(part.step, part.why)
        yield {"round": part.round, "step": part.step, "uri": part.uri, "digest": part.digest, "what": what}


def _of(table: Any, trace_id: str) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    rows: list[dict[str, Any]] = table.filter(pc.equal(table["trace_id"], trace_id)).to_pylist()
    return rows


def _manifests(root: str) -> list[dict[str, Any]]:
    """Of all artifacts: each lies in `runs/r<N>/<step>/`."""
    runs = store.join(root, "runs")
    files = [uri for uri in store.list_files(runs) if uri.endswith(f"/{store.LAST}")]
    found = [uri for uri in files if uri.removeprefix(runs).count("/") == 3]
    return [{**json.loads(store.get(uri)), "uri": uri.removesuffix(f"/{store.LAST}")} for uri in found]


def _ancestry(root: str, digest: str) -> Iterator[dict[str, Any]]:
    """Artifacts back from a model, nearest first: each artifact names the digests of its inputs."""
    manifests = _manifests(root)
    wanted = [digest if digest.startswith("sha256:") else f"sha256:{digest}"]
    seen: set[str] = set()
    while wanted:
        looked = wanted.pop(0)
        for manifest in manifests:
            if manifest["uri"] in seen or not manifest["digest"].startswith(looked):
                continue
            seen.add(manifest["uri"])
            yield manifest
            wanted += [v for v in _strings(manifest["inputs"]) if v.startswith("sha256:")]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
