"""`cowest` and `kubectl cowest`: the table of contents of the command line.

A verb's module is imported only when the verb is called, so that `--help` answers at once and needs no extra.
"""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from typing import Annotated, Any, Literal, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from cowest_training.contract import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_RETRY

# Which has a package that is missing; any other: embedded.
EXTRAS = {"kubernetes": "operator", "urllib3": "operator", "minio": "serving", "pyarrow": "serving"}
MARKUP: Literal["markdown"] = "markdown"  # so that [brackets] in help texts are text


class Verb(NamedTuple):
    name: str
    function: str  # module:function
    help: str  # first line of the function's docstring (a test compares)
    panel: str


VERBS = (
    Verb("init", "manifest_verbs:init", "Write a first manifest with comments, and say what data is needed.", "Begin"),
    Verb(
        "validate",
        "manifest_verbs:validate",
        "Check a manifest, and the data it names, without starting anything.",
        "Begin",
    ),
    Verb("crd", "manifest_verbs:crd", "Print the CustomResourceDefinition, for `kubectl apply -f -`.", "Begin"),
    Verb("plan", "run:plan", "Say what the job may cost at most: strong-model calls, tokens and money.", "Run"),
    Verb("run", "run:run", "Run the whole loop of one job on this machine.", "Run"),
    Verb("upload", "upload:upload", "Copy a data file or a model folder into an object store.", "Run"),
    Verb(
        "send",
        "send:send",
        "Send questions through the gateway at a steady rate; each row is a user of its own.",
        "Run",
    ),
    Verb("status", "actions:status", "One table of rounds, what answers now and what is awaited.", "Look"),
    Verb("explain", "actions:explain", "What holds the loop now and how each round was decided.", "Look"),
    Verb(
        "report", "report:report", "Write what the loop did as a page that opens in any browser, and as JSON.", "Look"
    ),
    Verb("lineage", "actions:lineage", "From an answer to its draft, pair, models and data.", "Look"),
    Verb(
        "ledger",
        "ledger:ledger",
        "What each draft of a round was worth and cost: shown, filtered, or exported for training elsewhere.",
        "Look",
    ),
    Verb(
        "quarantine",
        "quarantine:quarantine",
        "What a round did not learn from, and why; --release lets traces through.",
        "Look",
    ),
    Verb(
        "replay",
        "replay:replay",
        "Compute every live decision again from recorded traces and feedback; exit code 1 when one differs.",
        "Look",
    ),
    Verb(
        "review",
        "review:review",
        "Ask a person which answers are better, blind, on a page of this machine; the labels calibrate a judge.",
        "Decide",
    ),
    Verb("pause", "actions:pause", "Start no round and take no canary step until `resume`; answers go on.", "Decide"),
    Verb("resume", "actions:resume", "Take a pause back.", "Decide"),
    Verb(
        "approve",
        "actions:approve",
        "Let a candidate that waits for approval (canary.approval: Manual) be promoted.",
        "Decide",
    ),
    Verb("promote", "actions:promote", "Promote the candidate in canary now.", "Decide"),
    Verb("rollback", "actions:rollback", "End the running trial, or undo the last promotion.", "Decide"),
    Verb("erase", "erase:erase", "Take what a user gave out of a job, and say which models saw it.", "Decide"),
    Verb(
        "propose", "actions:propose", "Gate any model as a candidate: same gate, same canary as a tuned one.", "Decide"
    ),
)


def load(verb: Verb) -> Any:
    """The command of a verb, with its options: imports the verb's module."""
    module, _, function = verb.function.partition(":")
    one = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
    one.command(verb.name)(getattr(importlib.import_module(f"cowest_cli.{module}"), function))
    return typer.main.get_command(one)


class LazyGroup(TyperGroup):
    """Knows verbs by name and help alone, which is enough to list them; the one that is called is loaded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for verb in VERBS:
            self.add_command(TyperCommand(verb.name, help=verb.help, rich_help_panel=verb.panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        found = next((verb for verb in VERBS if verb.name == name), None)
        return name, load(found) if found else command, rest


app = typer.Typer(
    cls=LazyGroup,
    name="cowest",
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("cowest"))
        raise typer.Exit


@app.callback()
def cowest(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A small weak model drafts, a strong model answers, and the pair keeps improving from its own feedback.

    Begin with `cowest init`, then `cowest validate -f job.yaml`, `cowest plan -f job.yaml` and
    `cowest run -f job.yaml`. A job in a cluster goes by its name: `cowest status JOB -n NAMESPACE`, or
    `kubectl cowest status JOB`.
    """


def main() -> None:
    """Entry point: an error is one message on stderr and an exit code of `cowest_training.contract`."""
    try:
        app()
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_FAILED:
            traceback.print_exc()
        # It may quote what an endpoint or a model said, and nothing of that may steer the terminal.
        for line in message(error).rstrip().splitlines():
            sys.stderr.write("".join(c if c.isprintable() else " " for c in line) + "\n")
        sys.exit(code)


def exit_code(error: Exception) -> int:
    """By what the error says of itself: its `code`, or whether it is worth a retry; a ValueError is bad input."""
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code
    retryable = getattr(error, "retryable", None)
    if retryable is not None:
        return EXIT_RETRY if retryable else EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_RETRY
    if type(error).__name__ in ("ManifestError", "SettingsError", "ModelFolderError"):
        return EXIT_BAD_INPUT
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("cowest"):
        return EXIT_BAD_INPUT
    return EXIT_BAD_INPUT if isinstance(error, PermissionError | FileNotFoundError) else EXIT_FAILED


def message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("cowest"):
        extra = EXTRAS.get(str(error.name).partition(".")[0], "embedded")
        return (
            f"this needs the package {error.name}, which is not installed. Install it, in a checkout of CoWest:"
            f" pip install '.[{extra}]'"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"wanted room on the disk{where}, saw none. Free some, then run the same command again; it goes on."
    return str(error)


if __name__ == "__main__":
    main()
