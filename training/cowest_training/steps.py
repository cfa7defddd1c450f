"""What every step shares: flags, settings, outputs that exist only when finished, progress, how a step ends.

def main() -> None:
    args = steps.parser(__doc__).parse_args()
    output = steps.open_output(args.out, step="sft", inputs={...})
    if isinstance(output, Manifest):
        return  # this very work is done already
    ...  # write files below output.folder
    output.finish(kind="Model", metrics={...})

if __name__ == "__main__":
    steps.run(main)
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import errno
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import yaml

from cowest_serving import logs, store
from cowest_serving.contract import SettingsError, canonical_json, digest_of, dump, parse
from cowest_serving.model_files import ModelFolderError
from cowest_serving.models import ModelError
from cowest_training.contract import (
    DATASET,
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RETRY,
    MANIFEST,
    REASON_NOTE,
    REASON_PROGRESS,
    REASONS,
    Manifest,
    StepError,
    StepSettings,
    how_far,
)

FILE_SECONDS = 0.2  # the progress file is rewritten at most this often
LINE_SECONDS = 3.0  # and a line goes to stderr at most this often
RATE_AFTER = 2.0  # seconds: before that a rate is a guess


# ---------------------------------------------------------------- flags and settings
def parser(doc: str | None, *, needs_job: bool = True) -> argparse.ArgumentParser:
    """The flags that all steps have; `doc` is the module's docstring."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--job", required=needs_job, metavar="FILE", help="defaulted CollaborationJob or its spec")
    flags.add_argument("--out", required=True, metavar="URI", help="the output; its manifest.json comes last")
    flags.add_argument("--progress", metavar="FILE", help="JSON file kept up to date while running")
    return flags


def add_generation(flags: argparse.ArgumentParser) -> None:
    """Of the steps that compare answers of the strong model."""
    flags.add_argument(
        "--generation", type=int, default=0, metavar="N",
        help="how often the strong model became another one: what it answered before is paid for anew",
    )  # fmt: skip


def load_settings(path: str | Path) -> StepSettings:
    """The sections that steps read. Raises `StepError` (the file) or `SettingsError` (a field)."""
    return parse(StepSettings, load_spec(path))


def load_spec(path: str | Path) -> Mapping[str, Any]:
    """The spec of the one CollaborationJob in a YAML or JSON file; without `kind` the file is the spec."""
    try:
        documents = [d for d in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if d is not None]
    except OSError as error:
        raise StepError(f"--job {path}: wanted a readable file, saw: {error.strerror}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StepError(f"--job {path}: wanted YAML or JSON, saw: {error}") from None
    jobs = [d for d in documents if isinstance(d, Mapping) and d.get("kind", "CollaborationJob") == "CollaborationJob"]
    if len(jobs) != 1:
        raise StepError(f"--job {path}: wanted one CollaborationJob, saw {len(jobs)}. Leave one in the file.")
    spec = jobs[0].get("spec", jobs[0])
    if not isinstance(spec, Mapping):
        raise StepError(f"--job {path}: wanted an object under `spec`, saw {type(spec).__name__}.")
    return spec


# ---------------------------------------------------------------- outputs
@dataclasses.dataclass(frozen=True)
class Output:
    """An output in the making: files go below `folder`, and nothing shows at `uri` before `finish`."""

    uri: str
    folder: Path
    step: str
    inputs: Mapping[str, Any]
    started: float  # epoch seconds
    clock: float  # of time.monotonic
    parts: str = ""  # names of outputs of their own below `uri` that this one is made of; gone once it is finished

    def finish(self, *, kind: str, metrics: Mapping[str, Any], digest: str | None = None) -> Manifest:
        """Publish the files, the manifest last. `digest` names the content where a kind has its own."""
        outputs = {
            path.relative_to(self.folder).as_posix(): file_sha256(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            kind=kind,
            digest=digest or digest_of(outputs),
            inputs_digest=inputs_digest(self.step, self.inputs),
            inputs=self.inputs,
            outputs=outputs,
            metrics=metrics,
            step=self.step,
            version=code_version(),
            started=datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.clock, 3),
        )
        if (target := local_path(self.uri)) is not None:
            write_atomically(self.folder / MANIFEST, manifest_json(manifest))
            _swap(self.folder, target)
        else:
            _clear(self.uri, but=self.parts)
            store.upload(self.folder, self.uri)
            store.put(store.join(self.uri, MANIFEST), manifest_json(manifest))
            for file in _below(self.uri, self.parts):
                store.delete(file)
            shutil.rmtree(self.folder, ignore_errors=True)
        return manifest


def open_output(uri: str, *, step: str, inputs: Mapping[str, Any], parts: str = "") -> Output | Manifest:
    """The manifest when this very work (step, inputs, version) is finished, else a cleared place to do it.

    `parts` is a pattern of names below `uri` (`shard-*`) that a kill must not take before the whole is there.
    """
    done = read_manifest(uri)
    if done and is_of(done, uri, step=step, inputs=inputs):
        return done
    target = local_path(uri)
    if target is None:
        if done is None:
            _clear(uri, but=parts)
        folder = Path(tempfile.mkdtemp(prefix=f"cowest-{step}-"))
    else:
        # Beside the target: on the same file system, so that finishing is one rename. A fixed name, so that
        # what a killed run left behind is found and cleared here.
        folder = target.parent / f".{target.name}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    output = Output(uri, folder, step, json.loads(canonical_json(inputs)), time.time(), time.monotonic(), parts)
    # A failed step leaves nothing half-written; one that begins anew in this process keeps its folder of the same name.
    if (earlier := _CLEARED_LATER.pop(folder, None)) is not None:
        earlier.detach()
    _CLEARED_LATER[folder] = weakref.finalize(output, shutil.rmtree, folder, ignore_errors=True)
    return output


_CLEARED_LATER: dict[Path, weakref.finalize[..., Output]] = {}  # what a step writes into, until its end is collected


def is_of(manifest: Manifest, uri: str, *, step: str, inputs: Mapping[str, Any]) -> bool:
    """Whether the artifact at `uri` is this very work and all its files are there."""
    return manifest.inputs_digest == inputs_digest(step, inputs) and _is_whole(uri, manifest)


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of the artifact at `uri`; `None` when there is none, which means: no such artifact."""
    place = store.join(uri, MANIFEST)
    if not store.exists(place):
        return None
    try:
        return parse(Manifest, json.loads(store.get(place)), place)
    except (ValueError, TypeError) as error:
        raise StepError(f"{place}: wanted the manifest of a step, saw: {error}. Delete it and rerun.") from None


def dataset_file(uri: str) -> str:
    """The rows of a collected data set; any other URI is read as the file that it names."""
    return store.join(uri, DATASET) if read_manifest(uri) else uri


def need_manifest(uri: str, *, what: str) -> Manifest:
    """The manifest of an input that has to be there."""
    if (manifest := read_manifest(uri)) is None:
        raise StepError(f"{what} {uri}: wanted a finished artifact, saw no {MANIFEST}. Make it first.")
    return manifest


def manifest_json(manifest: Manifest) -> bytes:
    """Fields as `contract.dump` writes them, while inputs and metrics keep their numbers."""
    fields = {**dump(manifest), "inputs": manifest.inputs, "metrics": manifest.metrics}
    return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False).encode()


def inputs_digest(step: str, inputs: Mapping[str, Any]) -> str:
    """Of everything that went in. Another version of the code is another input."""
    return digest_of({"step": step, "inputs": inputs, "version": code_version()})


def code_version() -> str:
    try:
        return metadata.version("cowest")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def local_path(uri: str) -> Path | None:
    """The path behind `file://...` or a plain path, `None` for any other store."""
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://"))).absolute()
    return None if "://" in uri else Path(uri).absolute()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old bytes or the new ones, also after a crash; what a full disk cut short does not stay."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _swap(folder: Path, target: Path) -> None:
    """Put the finished folder at its place. A crash between the renames leaves none, never half of one."""
    for path in folder.rglob("*"):
        if path.is_file():
            store.sync(path)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    store.sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_whole(uri: str, manifest: Manifest) -> bool:
    return all(store.exists(store.join(uri, name)) for name in manifest.outputs)


def _clear(uri: str, but: str = "") -> None:
    """The manifest goes first: without it the rest does not exist."""
    kept = set(_below(uri, but))
    for file in sorted(store.list_files(uri), key=lambda name: not name.endswith("/" + MANIFEST)):
        if file not in kept:
            store.delete(file)


def _below(uri: str, parts: str) -> list[str]:
    """The files in the folders below `uri` whose name is of the pattern `parts`."""
    root = uri.rstrip("/") + "/"
    files = store.list_files(uri) if parts else []
    return [file for file in files if fnmatch(file.removeprefix(root), f"{parts}/*")]


# ---------------------------------------------------------------- progress
@dataclasses.dataclass
class _Pace:
    """How fast one phase goes."""

    unit: str
    begun: float  # time of its first update
    begun_with: float  # done by then
    changed: float  # when something was last done
    done: float
    longest: float = 0.0  # seconds between two changes so far

    def see(self, now: float, done: float) -> None:
        if done != self.done:
            self.longest = max(self.longest, now - self.changed)
            self.changed, self.done = now, done

    def estimate(self, now: float, total: float | None) -> tuple[float | None, float | None]:
        """Units a second and seconds left.

        What comes in batches is no slower in the middle of one; only a wait longer than any before slows it down.
        """
        until = self.changed if now - self.changed <= self.longest else now
        rate = (self.done - self.begun_with) / (until - self.begun) if until - self.begun >= RATE_AFTER else None
        if not rate or total is None:
            return rate, None
        return rate, max(0.0, (total - self.done) / rate - (now - until))


class Progress:
    """How far a step is: a JSON file for the engine, a line on stderr for people. `path` may be `None`."""

    def __init__(self, path: str | Path | None, step: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path) if path else None
        self._step = step
        self._clock = clock
        self._pace: _Pace | None = None
        self._file_due = self._line_due = 0.0

    def update(self, done: float, total: float | None, unit: str, message: str = "") -> None:
        """Say that `done` of `total` units are done. The last update (done = total) is always written.

        Another unit is another phase, with a rate and a time left of its own.
        """
        now = self._clock()
        if self._pace is None or unit != self._pace.unit or done < self._pace.begun_with:
            self._pace = _Pace(unit, now, done, now, done)
        self._pace.see(now, done)
        last = total is not None and done >= total
        if last or now >= self._file_due or message:
            self._file_due = now + FILE_SECONDS
            state = self._state(now, done, total, unit, message)
            if self._path:
                write_progress(self._path, state)
            if last or now >= self._line_due:
                self._line_due = now + LINE_SECONDS
                logs.say(progress_line(state), REASON_PROGRESS)

    def _state(self, now: float, done: float, total: float | None, unit: str, message: str) -> dict[str, Any]:
        rate, eta = self._pace.estimate(now, total) if self._pace else (None, None)
        return {
            "step": self._step,
            "done": done,
            "total": total,
            "unit": unit,
            "rate": rate,
            "eta_seconds": eta,
            "message": message,
            "updated": now,
        }


def write_progress(path: Path, state: Mapping[str, Any]) -> None:
    """Atomic but not synced: it is rewritten many times a second and worth nothing after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(state), encoding="utf-8")
    temporary.replace(path)


def progress_line(state: Mapping[str, Any]) -> str:
    return f"{state['step']}: {how_far(state)}"


# ---------------------------------------------------------------- how a step ends
def say(message: str) -> None:
    logs.say(message, REASON_NOTE)


def run(
    main: Callable[[], int | None], *, tell: Callable[[str], None] = lambda _: None, interrupted: int = EXIT_INTERRUPTED
) -> NoReturn:
    """Run a step and exit: one message, which `tell` hears too, and the code that says whether a rerun is worth it."""
    if logs.is_json():
        logs.log_to_stderr("warning")  # what libraries say
        logging.captureWarnings(True)
    # A background process may inherit "ignore" for SIGINT; SIGTERM takes the same way out, so that finalizers
    # run and a running event loop cancels its tasks first.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = main() or EXIT_OK
    except (KeyboardInterrupt, asyncio.CancelledError):
        # The second is what `asyncio.run` makes of a signal that comes just after it has taken the handler over.
        # What the signal cut short (a task, a coroutine) complains when it is collected: no word of ours.
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        logging.getLogger("asyncio").disabled = True
        code = interrupted
        message = "interrupted: nothing half-written is left, run the same command again to go on."
        logs.say(message, REASONS[EXIT_INTERRUPTED], logging.WARNING)
        tell(message)
    except Exception as error:
        message, code = _of(error)
        is_bug = code == EXIT_FAILED
        if is_bug and not logs.is_json():
            traceback.print_exception(error)
        logs.say(message, REASONS.get(code, REASONS[EXIT_FAILED]), logging.ERROR, error if is_bug else None)
        tell(message)
    else:
        if logs.is_json():  # people see it from the prompt
            logs.say("done", REASONS.get(code, REASONS[EXIT_FAILED]))
    gc.collect()
    sys.exit(code)


def _of(error: Exception) -> tuple[str, int]:
    """(message, exit code) of whatever ended a step."""
    told = next((told for one in leaves(error) if (told := explain(one))), None)
    return told or (f"failed: {type(error).__name__}: {error}", EXIT_FAILED)


def explain(error: BaseException) -> tuple[str, int] | None:
    """(message, exit code) of a fault that a person or a retry can mend; `None` for a bug."""
    if isinstance(error, StepError):
        return str(error), error.code
    if isinstance(error, ModelFolderError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, SettingsError):
        return f"the job's settings are not usable: {error}", EXIT_BAD_INPUT
    if isinstance(error, ModelError | store.StoreError):
        return str(error), EXIT_RETRY if error.retryable else EXIT_BAD_INPUT
    if is_disk_full(error):
        return f"the disk is full ({error}): free some space and run the same command again.", EXIT_RETRY
    return None


def is_disk_full(error: BaseException) -> bool:
    """Also as SQLite and the safetensors writer report it, which give no errno."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return (isinstance(error, sqlite3.Error) and "disk is full" in text) or "No space left on device" in text


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The error itself, or the members of a group (task groups raise those), interruptions left out."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves(member)
    else:
        yield error
