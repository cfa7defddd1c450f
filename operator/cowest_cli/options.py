"""Options that several verbs share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

File = Annotated[Path, typer.Option("--file", "-f", help="The CollaborationJob manifest.")]
FileOrNone = Annotated[Path | None, typer.Option("--file", "-f", help="The CollaborationJob manifest.")]
HomeFolder = Annotated[
    Path | None, typer.Option("--home", help="State folder (default: .cowest/NAME beside the manifest).")
]
Output = Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="text or json.")]
Why = Annotated[str, typer.Option("--why", help="Your reason; it is recorded.")]
By = Annotated[str | None, typer.Option("--by", help="Who says it (default: you).")]


@dataclass(frozen=True)
class Where:
    """The job that is meant: in a cluster by its name, on this machine by its manifest or its state folder."""

    job: Annotated[str | None, typer.Argument(help="A job in a cluster. One on this machine: -f or --home.")] = None
    file: FileOrNone = None
    home: HomeFolder = None
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of JOB (default: that of the context).")
    ] = None
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig (default: the current one).")] = None
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Default: KUBECONFIG, ~/.kube/config; in a pod its own account.")
    ] = None


@dataclass(frozen=True)
class Saying:
    """Who says something, why, and whether to wait for what comes of it."""

    why: Why = ""
    by: By = None
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="In a cluster: wait until the operator has taken it in.")
    ] = True
    timeout: Annotated[float, typer.Option(min=0.0, help="How many seconds to wait at most.")] = 60.0


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """A parameter that is a dataclass of options becomes its fields: typer sees each as an option of the verb."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}

    @functools.wraps(verb)
    def gathered(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        verb(**given)

    wanted: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        of = groups.get(parameter.name, verb)
        own = get_type_hints(of, include_extras=True)
        parts = inspect.signature(of).parameters.values() if of is not verb else (parameter,)
        wanted += [p.replace(annotation=own[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parts]
    gathered.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
    return gathered
