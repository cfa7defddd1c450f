"""What a step's container runs: one step, described by the files of a mounted ConfigMap.

FOLDER holds job.json (the manifest that the step goes by) and step.json:

    {"module": "cowest_training.feedback", "out": "s3://b/j/runs/r1/feedback",
     "args": [["--dataset", "s3://b/j/runs/r1/collect"], ...], "files": {"--pair": {...}, ...}}

The step runs in this process, so that SIGTERM reaches it. Exit codes are those of `cowest_training.contract`, but an
interrupted step asks to be run again: in a cluster it is the node that goes, not the person. The last words go to the
termination log too, from where they reach the job's status.

    python -m cowest_training.pod --step /etc/cowest/step --shard 0/4
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_serving.certificates import trust
from cowest_serving.cores import CGROUP, keep_to_limit
from cowest_training import steps
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, StepError

PACKAGE = "cowest_training."
LAST_WORDS = 2000  # bytes; Kubernetes keeps 4096 of a container, and all containers of a pod share 12 KiB
_FLAG = re.compile(r"--[a-z][a-z-]*")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)

    def tell(message: str) -> None:
        write_last_words(args.termination_log, message)

    steps.run(lambda: run_step(args), tell=tell, interrupted=EXIT_RETRY)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--step", required=True, type=Path, metavar="FOLDER", help="with job.json and step.json")
    flags.add_argument("--work", default="/tmp/cowest", type=Path, metavar="FOLDER", help="where files may be written")
    flags.add_argument("--termination-log", default="/dev/termination-log", type=Path, metavar="FILE")
    flags.add_argument("--shard", metavar="I/N", help="handed on to the step")
    flags.add_argument("--merge", metavar="N", help="handed on to the step")
    return flags.parse_args(argv)


def run_step(args: argparse.Namespace, cgroup: Path = CGROUP) -> int:
    keep_to_limit(cgroup)
    step = read_step(args.step / "step.json")
    module = load(step.module)
    argv = command_line(step, args.step / "job.json", args.work)
    argv += [f"--{name}={value}" for name in ("shard", "merge") if (value := getattr(args, name))]
    if more := os.environ.get("COWEST_MORE_CA"):
        trust(Path(more), args.work)
    # The root file system is read-only and the user may have no home.
    os.environ.setdefault("COWEST_CACHE", str(args.work / "cache"))
    os.environ.setdefault("HF_HOME", str(args.work / "huggingface"))
    try:
        return module.main(argv) or 0
    except SystemExit as end:
        if end.code != EXIT_BAD_INPUT:
            raise
        shown = " ".join(argv)
        raise StepError(
            f"{step.module} does not know these arguments: {shown}. Are operator and image of one version?"
        ) from None


# ---------------------------------------------------------------- the step
@dataclass(frozen=True)
class Step:
    module: str
    out: str | None
    args: tuple[tuple[str, str], ...]
    files: Mapping[str, Any]


def read_step(path: Path) -> Step:
    """Raises `StepError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        args = tuple((str(flag), str(value)) for flag, value in data.get("args", ()))
        step = Step(data["module"], data.get("out"), args, dict(data.get("files", {})))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StepError(f"{path}: wanted module, out, args and files as JSON, saw {error!r}.") from None
    for flag in (*step.files, *(flag for flag, _ in step.args)):
        if not _FLAG.fullmatch(flag):
            raise StepError(f"{path}: wanted flags such as --pair, saw {flag!r}.")
    return step


def load(name: Any) -> Any:
    """The module of a step, and nothing else that this image could run. Raises `StepError`."""
    if not isinstance(name, str) or not name.startswith(PACKAGE) or name == __name__:
        raise StepError(f"step.json: wanted a module of {PACKAGE.rstrip('.')}, saw {name!r}.")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise StepError(f"step.json: this image has no {name}. Are operator and image of one version?") from None
    if not callable(getattr(module, "main", None)):
        raise StepError(f"step.json: wanted a step, saw {name}, which has no `main`.")
    return module


def command_line(step: Step, job: Path, work: Path) -> list[str]:
    """The step's arguments, its files written below `work`. `--flag=value`, as a value may begin with a dash."""
    argv = [f"--job={job}", *([f"--out={step.out}"] if step.out else [])]
    for flag, value in step.args:
        if flag == "--calls":
            Path(value).parent.mkdir(parents=True, exist_ok=True)
        argv.append(f"{flag}={value}")
    work.mkdir(parents=True, exist_ok=True)
    for flag, content in step.files.items():
        path = work / f"{flag.removeprefix('--')}.json"
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        argv.append(f"{flag}={path}")
    return [*argv, f"--progress={work / 'progress.json'}"]


def write_last_words(path: Path, message: str) -> None:
    """As much of the message as there is room for, whole characters only."""
    words = message.strip().encode()[:LAST_WORDS].decode(errors="ignore")
    with contextlib.suppress(OSError):
        path.write_text(words, encoding="utf-8")


if __name__ == "__main__":
    main()
