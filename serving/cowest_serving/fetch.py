"""Fetch a model and prove that it is the one wanted, before its server starts: the init container of a weak model.

    python -m cowest_serving.fetch --model s3://b/j/models/ab12 --digest sha256:ab12... --out /models/weak

A folder that is whole is not fetched again. Exit codes: 0 the model is there, 2 it is another one or cannot be served,
75 the store was away for longer than --patience.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from cowest_serving import store
from cowest_serving.logs import REASON_MODEL_REFUSED, REASON_STORE_AWAY, complain, log_to_stderr
from cowest_serving.model_files import ModelFolderError, check_model_folder, model_digest
from cowest_serving.store import StoreError

log = logging.getLogger(__name__)
EXIT_BAD_INPUT = 2
EXIT_RETRY = 75
PROGRESS_SECONDS = 5.0
FETCHED = {"reason": "ModelFetched"}
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_stderr("info")
    try:
        fetch(options.model, options.digest, options.out, patience=options.patience)
    except ModelFolderError as error:
        return _complain(error, EXIT_BAD_INPUT)
    except StoreError as error:
        return _complain(error, EXIT_RETRY if error.retryable else EXIT_BAD_INPUT)
    return 0


def _complain(error: Exception, code: int) -> int:
    complain(f"fetch: {error}", REASON_STORE_AWAY if code == EXIT_RETRY else REASON_MODEL_REFUSED)
    return code


def fetch(model: str, digest: str, folder: Path, *, patience: float) -> None:
    """Bring the model with that digest into `folder`. Raises `ModelFolderError` or `StoreError`."""
    if _holds(folder, digest):
        log.info("%s holds %s already", folder, digest, extra=FETCHED)
        return
    copy = _Copy(model, folder, patience)
    found_there = copy.files_there()
    copy.fetch(copy.files.keys() - found_there)
    # What an interrupted run left may also be of another model: then it is fetched after all.
    if found_there and not _holds(folder, digest):
        copy.fetch(found_there)
    check_model_folder(folder)
    seen = model_digest(folder)
    if seen != digest:
        raise ModelFolderError(
            f"wanted {digest} at {model}, saw {seen}; publish the model again, name the digest of what lies there, "
            f"or empty {folder} if it held another model before"
        )
    log.info("%s holds %s", folder, digest, extra=FETCHED)


def _holds(folder: Path, digest: str) -> bool:
    try:
        check_model_folder(folder)
        return model_digest(folder) == digest
    except (ModelFolderError, StoreError):
        return False


class _Copy:
    """The files of a model and where they go."""

    def __init__(self, model: str, folder: Path, patience: float) -> None:
        self.folder, self.patience = folder, patience
        found = self._patiently(partial(store.list_files, model))
        self.files = {target_of(model, uri, folder): uri for uri in found}  # path -> URI
        if not self.files:
            raise StoreError(f"wanted a model at {model}, saw no files; check bucket, key and COWEST_S3_ENDPOINT")

    def files_there(self) -> set[Path]:
        """Each is whole, since the store shows a name only when its last byte is there."""
        return {path for path in self.files if path.is_file()}

    def fetch(self, wanted: set[Path]) -> None:
        with self._progress():
            for path in sorted(wanted):
                self._patiently(partial(_fetch_file, self.files[path], path))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Tried again while that may help, for `patience` seconds since the last file that came."""
        started, failures = time.monotonic(), 0
        while True:
            try:
                return action()
            except StoreError as error:
                wait = min(15.0, 0.5 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                left = started + self.patience - time.monotonic()
                if not error.retryable or left <= 0:
                    raise
                log.warning("%s (given up in %.0f s)", error, left, extra={"reason": REASON_STORE_AWAY})
                time.sleep(min(wait, left))
            failures += 1

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """Says every few seconds how far it is: a large file takes minutes."""
        finished = threading.Event()

        def say() -> None:
            before = _bytes_in(self.folder)
            while not finished.wait(PROGRESS_SECONDS):
                there, now = len(self.files_there()), _bytes_in(self.folder)
                speed = (now - before) / PROGRESS_SECONDS
                log.info("%d of %d files, %.0f MB (%.1f MB/s)", there, len(self.files), now / 1e6, speed / 1e6)
                before = now

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        try:
            yield
        finally:
            finished.set()
            saying.join()


def target_of(model: str, uri: str, folder: Path) -> Path:
    """Where the file `uri` of a model goes. Raises `ModelFolderError` for one that would lie elsewhere."""
    name = uri.removeprefix(store.join(model, ""))
    target = folder / (unquote(name) if model.startswith("file://") else name)
    if name == uri or not target.resolve().is_relative_to(folder.resolve()):
        raise ModelFolderError(f"wanted the files of a folder at {model}, saw {uri}; name the model's folder")
    return target


def _fetch_file(uri: str, target: Path) -> None:
    for part in target.parent.glob(f"{escape(target.name)}.*.part"):  # of a try that broke off
        part.unlink()
    got = store.download(uri, target.parent)
    if got != target:  # local already: what serves must not depend on where it came from
        store.upload(got, str(target))


def _bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a part that has just got its name
            continue
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cowest_serving.fetch", description="Fetch a weak model and check it against its digest."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="URI", help="the model's folder: s3://, file:// or a path")
    add("--digest", required=True, type=_digest, help="sha256:<64 hex>, as the model's card and manifest say it")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the model is to lie")
    add(
        "--patience",
        type=float,
        default=300,
        metavar="SECONDS",
        help="wait so long for the store (default: %(default)s)",
    )
    return parser


def _digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"wanted sha256: and 64 hex digits, saw {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
