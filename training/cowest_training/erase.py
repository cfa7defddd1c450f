"""Delete what a job left in the object store: all that `deletionPolicy` gives up when the job is deleted.

    models   runs/: models, data sets, ledgers, reports
    traces   traces/, feedback/ and trust/: recorded answers, what was said of them, and which of them were let through

    python -m cowest_training.erase --store s3://bucket/desk --what all

Safe to run again after a kill. Only these folders are touched, and only below a prefix of a job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from cowest_serving import store
from cowest_serving.contract import FEEDBACK_PREFIX, TRACES_PREFIX
from cowest_training.contract import EXIT_OK, StepError
from cowest_training.quarantine import TRUST_PREFIX
from cowest_training.steps import Progress, local_path, parser, run, say

RUNS_PREFIX = "runs"
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "models": (RUNS_PREFIX,),
    "traces": (TRACES_PREFIX, FEEDBACK_PREFIX, TRUST_PREFIX),
    "all": (RUNS_PREFIX, TRACES_PREFIX, FEEDBACK_PREFIX, TRUST_PREFIX),
}
AT_ONCE = 8  # deletes on the wire; no more than connections in the store's pool
BATCH = 256  # files between two looks at signals
SHOWN = 3


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    need_prefix(args.store)
    root = args.store.rstrip("/")
    if said := without_job(root):
        say(said)
        return EXIT_OK
    progress = Progress(args.progress, "erase")
    folders = [store.join(root, name) for name in FOLDERS[args.what]]
    files = [file for folder in folders for file in store.list_files(folder)]
    progress.update(0, len(files), "files")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            list(pool.map(store.delete, batch))
            progress.update(start + len(batch), len(files), "files")
    for folder in folders:  # what was written meanwhile, and the emptied folders of a disk
        store.delete(folder)
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> Any:
    flags = parser(__doc__, needs_job=False)
    for action in flags._actions:  # there is no output; taken, as by every step, and not looked at
        if action.dest == "out":
            action.required = False
    flags.add_argument("--store", required=True, metavar="URI", help="the job's prefix in the object store")
    flags.add_argument("--what", required=True, choices=list(FOLDERS))
    return flags.parse_args(argv)


def need_prefix(uri: str) -> None:
    """A bucket, or a whole disk, belongs to more than one job. Raises `StepError`."""
    prefix = urlsplit(uri).path if local_path(uri) is None else uri.removeprefix("file://")
    if not prefix.strip("/"):
        raise StepError(f"--store {uri}: wanted the prefix of one job, saw a whole store. Nothing was deleted.")


def without_job(uri: str) -> str:
    """A sentence where something lies at `uri`, but nothing of a job. No error: once erased, it looks the same."""
    names = sorted({file.removeprefix(uri + "/").partition("/")[0] for file in store.list_files(uri)})
    if not names or set(names) & set(FOLDERS["all"]):
        return ""
    return f"{uri}: wanted {', '.join(FOLDERS['all'])} of a job, saw {', '.join(names[:SHOWN])}. Nothing was deleted."


if __name__ == "__main__":
    run(main)
