"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

File = Annotated[Path, typer.Option("--file", "-f", help="The CollaborationJob manifest.")]
FileOrNone = Annotated[Path | None, typer.Option("--file", "-f", help="The CollaborationJob manifest.")]
HomeFolder = Annotated[
    Path | None, typer.Option("--home", help="State folder (default: .cowest/NAME beside the manifest).")
]
Output = Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="text or json.")]
Why = Annotated[str, typer.Option("--why", help="Your reason; it is recorded.")]
By = Annotated[str | None, typer.Option("--by", help="Who says it (default: you).")]
