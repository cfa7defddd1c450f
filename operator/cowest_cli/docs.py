"""Writes docs/cli.md from the command line's own help: `python -m cowest_cli.docs [--check] [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from cowest_cli.main import VERBS, app, load
from cowest_operator.docs import write_or_check

HEAD = """# The command line

Generated from the help texts by `python -m cowest_cli.docs`; do not edit.

Errors are one message on stderr. Exit codes: 0 done; 1 a bug (stack trace); 2 something must be changed, the message
says what; 75 an endpoint, the store or the disk is not available now, the same command goes on later; 76 the budget is
spent, state is kept; 130 interrupted, the same command goes on.

A verb with `[job]` is for a job on this machine (`-f` or `--home`) and, with the job's name, for one in a cluster:
`cowest VERB JOB -n NAMESPACE`, or `kubectl cowest VERB JOB -n NAMESPACE`, which is the same command. That needs
`pip install '.[operator]'`.
"""


def cli_markdown() -> str:
    """The page: every verb in the order of `cowest --help`, with its arguments and options."""
    group = typer.main.get_command(app)
    return "\n".join((HEAD, *_verbs(group))) + "\n"


def _verbs(group: Any) -> Iterator[str]:
    panel = ""
    for verb in VERBS:
        if verb.panel != panel:
            panel = verb.panel
            yield f"## {panel}\n"
        command = load(verb)
        context = typer.Context(command, info_name=f"cowest {verb.name}")
        yield f"### `cowest {verb.name}`\n"
        yield f"{(command.help or '').strip()}\n"
        yield f"```console\n$ cowest {verb.name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        yield from _parameters(command, context)


def _parameters(command: Any, context: Any) -> Iterator[str]:
    records = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
    if records:
        yield "| | |\n|---|---|"
        for names, text in records:
            cells = (each.strip().replace("|", "\\|") for each in (f"`{names}`", text))
            yield f"| {' | '.join(cells)} |"
        yield ""


def main(arguments: list[str] | None = None) -> int:
    return write_or_check(cli_markdown, "docs/cli.md", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
