"""`cowest init`, `validate` and `crd`: everything about a manifest before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from cowest_cli import preflight
from cowest_cli.options import File
from cowest_operator import manifest, pods
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_training.contract import SHOWN, ProblemsError, StepError

Format = Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="text or json.")]
TEMPLATE = "minimal.yaml"
DATA_FORMAT = """\
It names two files of questions with references, JSON Lines or Parquet, one row a question:
  {"id": "1", "query": "Which ...?", "reference": "the right answer"}
Optional in each row: "explanation" (what a good draft would say; the weak model is first tuned on the training rows
that have one), "group" (a slice that must not get worse), "messages" (a chat, instead of "query"). No question may be
in both files; 100 held-out rows are the least, 500 or more let smaller gains be seen.
"""


def init(
    file: Annotated[Path, typer.Argument(help="Where to write the manifest.")] = Path("job.yaml"),
    output: Format = "text",
) -> None:
    """Write a first manifest with comments, and say what data is needed."""
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(_template().read_text(encoding="utf-8"))
    except FileExistsError:
        raise StepError(
            f"{file}: is there already and stays as it is. Name another file: cowest init OTHER.yaml"
        ) from None
    except OSError as error:
        raise StepError(f"{file}: cannot be written: {error.strerror}.") from error
    steps = [f"edit {file}", f"cowest validate -f {file}", f"cowest plan -f {file}", f"cowest run -f {file}"]
    if output == "json":
        typer.echo(json.dumps({"file": str(file), "dataFormat": DATA_FORMAT, "next": steps}))
        return
    typer.echo(f"Wrote {file}.\n\n{DATA_FORMAT}\nNext:\n" + "\n".join(f"  {step}" for step in steps))


def validate(
    file: File,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Also look at the files it names.")] = True,
    all_problems: Annotated[
        bool, typer.Option("--all-problems", help="List all that is wrong with the rows, not the first few.")
    ] = False,
    output: Format = "text",
) -> None:
    """Check a manifest, and the data it names, without starting anything.

    Local files are read; of what lies elsewhere it notes that it was not looked at.

    With -o json it prints the manifest with all defaults, or {"valid": false} with all that is wrong as `problems`.
    """
    try:
        loaded = manifest.load(file)
        job = manifest.resolve_files(loaded.job, file.resolve().parent)
        job = _with_prompts(job, loaded)
        facts = _check_files(job, str(file)) if data else None
    except ProblemsError as error:
        _as_json(output, what=error.what, problems=error.problems, remedy=error.remedy)
        hint = "" if all_problems or len(error.problems) <= SHOWN else " `cowest validate --all-problems` lists all."
        raise StepError(error.listed(None if all_problems else SHOWN) + hint) from None
    except manifest.ManifestError as error:
        _as_json(output, problems=str(error).splitlines())
        raise
    except StepError as error:
        _as_json(output, problems=[str(error)])
        raise
    if output == "json":
        typer.echo(json.dumps(loaded.job, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{file}: valid{_sizes(facts) if facts else ''}.")
    unread = preflight.not_read_here(job["spec"]) if data else ()
    for note in (*_notes(loaded, job), *unread, *(facts.notes if facts else ())):
        typer.echo(f"note: {note}", err=True)


def _as_json(output: str, **found: Any) -> None:
    if output == "json":
        typer.echo(json.dumps({"valid": False, **found}, indent=2, ensure_ascii=False))


def crd(output: Format = "text") -> None:
    """Print the CustomResourceDefinition, for `kubectl apply -f -`."""
    if output == "json":
        typer.echo(json.dumps(manifest.crd(), indent=2, ensure_ascii=False))
    else:
        typer.echo(manifest.crd_path().read_text(encoding="utf-8"), nl=False)


# ---------------------------------------------------------------- what a manifest names
def _check_files(job: Mapping[str, Any], source: str) -> preflight.Facts | None:
    """What is known of data and weak model, where they can be read. Raises `ManifestError` or `StepError`."""
    spec = job["spec"]
    preflight.check_files(spec, source)
    return preflight.check_data(spec, source, preflight.readable_here(spec)) if preflight.can_read() else None


def _sizes(facts: preflight.Facts) -> str:
    """Number of rows by file."""
    sizes = {"training": facts.rows, "held-out": facts.held_out, "explained training": facts.explained}
    return "".join(f", {count} {name} rows" for name, count in sizes.items() if count)


def _with_prompts(job: dict[str, Any], loaded: manifest.Loaded) -> dict[str, Any]:
    """Templates of a ConfigMap document are checked as inline ones are, and go into the job."""
    reference = job["spec"]["collaboration"].get("promptsConfigMapRef")
    if not reference or reference["name"] not in loaded.config_maps:
        return job
    built_in = asdict(DEFAULT_PROMPTS[job["spec"]["collaboration"]["draft"]])
    return manifest.resolve_prompts(job, loaded.config_maps, built_in)


def _notes(loaded: manifest.Loaded, job: Mapping[str, Any]) -> Iterator[str]:
    """`job`: with its templates, where the file has them."""
    spec = job["spec"]
    reference = spec["collaboration"].get("promptsConfigMapRef")
    if reference and reference["name"] not in loaded.config_maps:
        yield (
            f"ConfigMap {reference['name']} is no document of this file; `cowest run` wants it there,"
            " a cluster may have it elsewhere."
        )
    yield from preflight.prompt_notes(spec["collaboration"].get("prompts") or {})
    if any(pods.over(spec)) and not pods.can_look():
        yield "podTemplate.spec was not looked at: the package kubernetes is not installed (pip install '.[operator]')."
    if not spec["canary"]["steps"]:
        yield "canary.steps is empty: a candidate that passes the offline gate is promoted without live traffic."
    endpoint = urlsplit(spec["strong"]["endpoint"])
    if endpoint.scheme == "http" and not _is_here(endpoint.hostname or "") and spec["strong"]["apiKeySecretRefs"]:
        yield "strong.endpoint is plain http: its API key is readable on the way."


def _is_here(host: str) -> bool:
    """What goes to loopback crosses no network."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _template() -> Path:
    """The commented manifest beside this module (installed), or in the repository."""
    installed = Path(__file__).with_name(TEMPLATE)
    return installed if installed.exists() else Path(__file__).parents[2] / "crds" / "examples" / TEMPLATE
