"""A job on one machine: where its state lies, and how manifest, status, actions and events are read and written."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cowest_operator import api, manifest, people, story
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Routing, dump, evaluator_key, parse
from cowest_serving.cores import Cores
from cowest_training.contract import EXIT_BAD_INPUT, StepError


@dataclass(frozen=True)
class Home:
    """The folder of one job's state. Everything in it is written atomically or appended to."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        """`home.status` is `<root>/status.json`; see `_PLACES`."""
        try:
            return self.root / _PLACES[name]
        except KeyError:
            raise AttributeError(name) from None


_PLACES = {
    "lock": "lock",
    "job": "job.json",
    "status": "status.json",
    "actions": "actions",
    "events": "events.jsonl",
    "routing": "routing.json",
    "run": "run.json",
    "cores": "cores.json",
    "looked_at": "looked_at.json",
    "traces": "traces.json",
    "files": "files",
    "logs": "logs",
    "progress": "progress",
    "store": "store",
    "spool": "spool",
    "calls": "calls.sqlite",
}


def write_json(path: Path, value: Any) -> None:
    """Atomic, also against a power cut: temporary file, fsync, rename. What a full disk cut short does not stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content, or None where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- manifest
@dataclass(frozen=True)
class Declared:
    """A manifest that passed the schema: the resolved document, and the same as values."""

    document: Mapping[str, Any]
    job: api.Job
    folder: Path


def load(path: Path) -> Declared:
    """Read, validate, default and resolve a manifest file. Raises `ManifestError`."""
    loaded = manifest.load(path)
    document = manifest.resolve_files(loaded.job, path.resolve().parent)
    form = document["spec"]["collaboration"]["draft"]
    document = manifest.resolve_prompts(document, loaded.config_maps, asdict(DEFAULT_PROMPTS[form]))
    return Declared(document, api.parse_job(document), path.resolve().parent)


def reach(place: api.ObjectStore | None) -> None:
    """What the environment says of the store goes before the manifest."""
    if place is None:
        return
    for name, value in (
        ("COWEST_S3_ENDPOINT", place.endpoint),
        ("AWS_REGION", place.region),
        ("COWEST_S3_PATH_STYLE", None if place.path_style is None else str(place.path_style).lower()),
    ):
        if value:
            os.environ.setdefault(name, value)


def home_of(file: Path | None, home: Path | None) -> Home:
    """`--home`, or `.cowest/<name>` beside the manifest."""
    if home is not None:
        return Home(home.resolve())
    if file is None:
        raise StepError("wanted -f MANIFEST or --home FOLDER, saw neither.")
    try:
        documents = list(yaml.safe_load_all(file.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StepError(f"{file}: cannot be read as YAML in UTF-8: {error}") from error
    found = [d.get("metadata") for d in documents if isinstance(d, dict) and d.get("kind") == api.KIND]
    names = [metadata["name"] for metadata in found if isinstance(metadata, dict) and metadata.get("name")]
    if not names:
        raise StepError(f"{file}: wanted a document of kind {api.KIND} with metadata.name, saw none.")
    return Home(file.resolve().parent / ".cowest" / str(names[0]))


# ---------------------------------------------------------------- status
def read_status(home: Home) -> api.Status:
    data = read_json(home.status)
    return parse(api.Status, data, "status") if data else api.Status()


def write_status(home: Home, status: api.Status) -> None:
    write_json(home.status, dump(status))


def written(home: Home, status: api.Status) -> dict[str, Any]:
    """The status as docs/api.md has it, for `-o json`: the same fields and forms as in a cluster."""
    seen = read_json(home.routing)
    routing = parse(Routing, seen, "routing") if seen else Routing(0, "", ())
    counted, job = read_json(home.traces), read_json(home.job)
    generation = int(((job or {}).get("metadata") or {}).get("generation", 0))
    told = story.written(status, api.Plan((), (), routing, status), api.TraceCounts(**(counted or {})), generation)
    return {name: value for name, value in for_people(told).items() if counted or name != "traces"}


def for_people(told: Mapping[str, Any]) -> dict[str, Any]:
    """Without `state`, which is in the loop's own form."""
    return {name: value for name, value in told.items() if name != "state"}


def read_budget(home: Home, status: api.Status) -> api.Budget:
    """What the book of paid calls says now; the status is a little older, more so after a kill.

    Raises `StepError` where another process writes the book just now.
    """
    if not home.calls.exists():
        return status.budget
    from cowest_training.paid_calls import read_live_spent, read_spent

    number = status.candidate.number if status.candidate else max(0, status.trials - 1)
    whole, part = read_spent(home.calls), read_spent(home.calls, round_number=number)
    day, seen = read_live_spent(home.calls)
    # Without a limit of a day nobody tells the book of live answers.
    live = api.Live(day, seen.calls, seen.tokens, seen.money) if seen.calls else None
    return api.Budget(whole.calls, whole.tokens, whole.money, api.Spent(part.calls, part.tokens, part.money), live)


def append_event(home: Home, event: api.Event, now: float) -> None:
    """On a line of its own, also after one that a full disk cut off."""
    home.root.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": now, **asdict(event)}, ensure_ascii=False).encode() + b"\n"
    with home.events.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read_events(home: Home) -> list[dict[str, Any]]:
    """Oldest first. A line that a full disk cut off, perhaps within a character, is left out."""
    events: list[dict[str, Any]] = []
    for line in home.events.read_bytes().split(b"\n") if home.events.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line.decode()))
    return events


# ---------------------------------------------------------------- what people say
def record_action(
    home: Home, verb: api.Verb, why: str, by: str | None = None, model: str | None = None, now: bool = False
) -> api.Action:
    """One file an action, whether or not an engine runs: the next look at the job takes it in."""
    known = (read_status(home).last_action, *(path.stem for path in _actions(home)))
    action = api.Action(people.next_id(known, verb, time.time_ns()), verb, who(by), why, time.time(), model, now)
    write_json(home.actions / f"{action.id}.json", said(action))
    return action


def said(action: api.Action) -> dict[str, Any]:
    """What is written of an action: without what was not given."""
    return {name: value for name, value in asdict(action).items() if value is not None and value is not False}


def who(by: str | None) -> str:
    """Who sits at this machine, or says to."""
    return by or os.environ.get("COWEST_USER") or _user()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run as a user without a name
        return f"user {os.getuid()}"


def read_actions(home: Home, after: str) -> tuple[api.Action, ...]:
    return tuple(api.Action(**read_json(path)) for path in _actions(home) if path.stem > after)


def _actions(home: Home) -> list[Path]:
    """Oldest first."""
    return sorted(home.actions.glob("[0-9]*.json")) if home.actions.is_dir() else []


# ---------------------------------------------------------------- cores
def cores(home: Home, now: Cores) -> int:
    """How many cores the job shares out: what was found when it was first run, or the fewer that are allowed now.

    It is kept since the number of threads decides how sums round: a rerun with another one draws other drafts, and
    pays for the answers to them.
    """
    kept = kept_cores(home)
    if kept is None:
        kept = now.for_long
        write_json(home.cores, {"cores": kept})
    return min(kept, now.allowed)


def kept_cores(home: Home) -> int | None:
    """None before the first run."""
    kept = read_json(home.cores)
    return int(kept["cores"]) if kept else None


# ---------------------------------------------------------------- one engine at a time
@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Only one `cowest run` of a job at a time; the lock dies with its process. Raises `StepError`."""
    home.root.mkdir(parents=True, exist_ok=True)
    with home.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StepError(
                f"another `cowest run` (process {file.read().strip() or 'unknown'}) already runs this job in"
                f" {home.root}. Wait for it, stop it, or use another --home.",
                EXIT_BAD_INPUT,
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def runs(home: Home) -> bool:
    """Whether a `cowest run` of the job is alive: what it wrote last may be old."""
    if not home.lock.exists():
        return False
    with home.lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ---------------------------------------------------------------- secrets
def secret(name: str, key: str, folder: Path | None) -> str:
    """Value of a Secret's key on one machine: an environment variable or a file. Raises `StepError`."""
    variable = "COWEST_SECRET_" + "".join(c if c.isalnum() else "_" for c in f"{name}_{key}").upper()
    if value := os.environ.get(variable):
        return value.strip()
    if folder is not None and (path := folder / name / key).is_file():
        return _text_of(path, f"secret {name}/{key}").strip()
    where = f" or the file {folder / name / key}" if folder else " or --secrets FOLDER with a file"
    raise StepError(
        f"secret {name}/{key}: wanted its value in the environment variable {variable}{where}"
        f"{'' if folder else f' {name}/{key}'}, saw neither."
    )


def _text_of(path: Path, what: str) -> str:
    """Without the mark that editors on Windows put before UTF-8. Raises `StepError`."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise StepError(f"{what}: wanted UTF-8 text in {path}, saw another encoding. Save it as UTF-8.") from None


def keys_environment(job: api.Job, folder: Path | None) -> dict[str, str]:
    """What only the gateway and the steps that ask the strong model get."""
    keys = [secret(ref.name, ref.key, folder) for ref in job.spec.strong.api_key_secret_refs]
    environment = {"COWEST_STRONG_API_KEYS": "\n".join(keys)} if keys else {}
    for number, each in enumerate(job.spec.feedback.evaluator.asked):
        if reference := each.api_key_secret_ref:
            environment[evaluator_key(number)] = secret(reference.name, reference.key, folder)
    return environment


def fallback_keys(job: api.Job, folder: Path | None) -> str | None:
    """A line for each of strong.fallbacks, empty for one without a key; for the gateway only. Raises `StepError`."""
    references = [fallback.api_key_secret_ref for fallback in job.spec.strong.fallbacks]
    lines = [secret(ref.name, ref.key, folder) if ref else "" for ref in references]
    return "\n".join(lines) if any(lines) else None


def client_keys(job: api.Job, folder: Path | None) -> str | None:
    """All values of gateway.clientKeysSecretRef, one a line; None when no key is asked for. Raises `StepError`."""
    named = _named_client_keys(job, folder)
    return None if named is None else "\n".join(key for _, key in named)


def client_names(job: api.Job, folder: Path | None) -> str | None:
    """The application of each of those keys, a line each: its file's name, "" for one of the environment."""
    named = _named_client_keys(job, folder)
    return "\n".join(name for name, _ in named) if named else None


def _named_client_keys(job: api.Job, folder: Path | None) -> list[tuple[str, str]] | None:
    reference = job.spec.gateway.client_keys_secret_ref
    if reference is None:
        return None
    variable = "COWEST_SECRET_" + "".join(c if c.isalnum() else "_" for c in reference.name).upper()
    files = sorted(p for p in (folder / reference.name).glob("*") if p.is_file()) if folder else []
    of_files = ((path.name, _text_of(path, f"secret {reference.name}/{path.name}")) for path in files)
    texts = [("", os.environ.get(variable, "")), *of_files]
    named = [(name, line.strip()) for name, text in texts for line in text.splitlines() if line.strip()]
    if not named:
        raise StepError(
            f"gateway.clientKeysSecretRef {reference.name}: wanted client keys, one a line, in the environment variable"
            f" {variable} or as files in --secrets FOLDER/{reference.name}/, saw none."
        )
    return named


# Fields that only a cluster can follow, by dotted path; where they are set, a run on one machine says so.
CLUSTER_ONLY = (
    "weak.resources",
    "weak.podTemplate",
    "strong.caBundleRef",
    "strong.proxyKeysSecretRef",
    "training.resources",
    "training.podTemplate",
    "gateway.resources",
    "gateway.ingress",
    "objectStore.bucket",
)


def without_effect_here(document: Mapping[str, Any]) -> list[str]:
    """Fields of the manifest that are declared and that the embedded engine does not follow."""
    spec = document["spec"]
    declared = []
    for path in CLUSTER_ONLY:
        value: Any = spec
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value:
            declared.append(f"spec.{path}")
    if spec["weak"]["replicas"] > 1:
        declared.append("spec.weak.replicas")
    if spec["gateway"]["replicas"] > 1 or spec["gateway"]["engine"] != "ASGI":
        declared.append("spec.gateway.replicas and engine")
    return declared


def with_generation(declared: Declared, home: Home) -> Declared:
    """Count edits of the spec like an API server does: the generation grows when the spec changed."""
    before = read_json(home.job) or {}
    generation = int(before.get("metadata", {}).get("generation", 0))
    if before.get("spec") != declared.document["spec"]:
        generation += 1
    metadata = {**declared.document["metadata"], "generation": generation}
    document = {**declared.document, "metadata": metadata}
    return replace(declared, document=document, job=replace(declared.job, generation=generation))
