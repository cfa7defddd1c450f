"""Whether the weak model can be loaded and asked the rows of a job, before anything is paid.

What loads models takes seconds to import and hundreds of megabytes, and `cowest run` lives as long as its job: a
process of its own looks, and not again at what has not changed.

    python -m cowest_cli.weak_model     a pickled `Look` comes in, JSON goes out: for `notes_of` alone
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cowest_cli import jobs
from cowest_operator.manifest import local_path
from cowest_serving import store
from cowest_serving.contract import digest_of
from cowest_serving.loadable import can_be_asked, check_loadable
from cowest_serving.model_files import ModelFolderError
from cowest_training.contract import EXIT_BAD_INPUT, Row, StepError
from cowest_training.data import rows_digest
from cowest_training.prompts import Asked, check_prompts


@dataclass(frozen=True)
class Look:
    model: str  # a local folder, as file://
    what: str  # the field that names it
    asked: Asked
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)  # by TRAIN and HELD_OUT

    @property
    def key(self) -> str:
        rows = {name: rows_digest(found) for name, found in self.rows.items()}
        versions = {package: metadata.version(package) for package in ("transformers", "torch")}
        return digest_of([store.fingerprint(self.model), asdict(self.asked), rows, versions])


def notes_of(look: Look, known: Path | None = None) -> list[str]:
    """For a person. `known`: where it is kept that this was looked at. Raises `StepError`."""
    if not can_be_asked():
        return check_prompts(look.model, look.rows, look.asked, None)
    key = look.key
    before = jobs.read_json(known) if known else None
    if before and before["key"] == key:
        return list(before["notes"])
    command = [sys.executable, "-P", "-m", "cowest_cli.weak_model"]
    done = subprocess.run(command, input=pickle.dumps(look), capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word of it"])[-1]
        return [
            f"{look.what} could not be looked at closely (the look ended with code {done.returncode}: {last[:200]}):"
            " the first step that loads it says what is wrong with it, if anything is."
        ]
    said = json.loads(done.stdout)
    if "error" in said:
        raise StepError(said["error"], said["code"])
    if known:
        jobs.write_json(known, {"key": key, "notes": said["notes"]})
    return list(said["notes"])


def looked_at(look: Look) -> dict[str, Any]:
    """`notes`, or `error` with the `code` to end with."""
    try:
        reader = check_loadable(local_path(look.model))
        return {"notes": check_prompts(look.model, look.rows, look.asked, reader)}
    except ModelFolderError as error:
        return {"error": f"{look.what}: {error}", "code": EXIT_BAD_INPUT}
    except StepError as error:
        return {"error": str(error), "code": error.code}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # whatever libraries say
        told = looked_at(pickle.load(sys.stdin.buffer))
    sys.stdout.write(json.dumps(told))
