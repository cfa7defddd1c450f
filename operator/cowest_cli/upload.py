"""`cowest upload`: bring data files and model folders into an object store, checked before and after."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer

from cowest_cli.options import Output
from cowest_training.contract import StepError

SUMS = "SHA256SUMS"


def upload(
    source: Annotated[Path, typer.Argument(help="A data file (JSONL, Parquet) or a model folder.")],
    target: Annotated[str, typer.Argument(help="Where it goes: s3://bucket/key or file:///path.")],
    output: Output = "text",
) -> None:
    """Copy a data file or a model folder into an object store.

    It is checked first; what is there already is not sent again. What an earlier upload of another model left in the
    same place is deleted; where anything else lies there, nothing is sent.
    """
    from cowest_serving import store
    from cowest_training.steps import file_sha256

    if "://" not in target:
        raise StepError(f"{target}: wanted a target such as s3://bucket/key, saw a plain path.")
    digest = _checked(source)
    noted = source / SUMS  # of an upload that this folder was a copy of
    files = [path for path in in_order(source) if path != noted]
    sums_uri = store.join(target, SUMS) if source.is_dir() else f"{target}.sha256"
    there = _read_sums(sums_uri)
    if source.is_dir():
        there = _without_others(target, {p.relative_to(source).as_posix() for p in files}, there)
    sent = 0
    for path in files:
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        uri = store.join(target, name) if source.is_dir() else target
        checksum = file_sha256(path)
        if there.get(name) == checksum and store.exists(uri):
            continue
        store.upload(path, uri)
        there[name] = checksum  # noted after each file, so that an interrupted upload goes on
        store.put(sums_uri, "".join(f"{value}  {key}\n" for key, value in sorted(there.items())).encode())
        sent += 1
    if output == "json":
        typer.echo(json.dumps({"uri": target, "digest": digest, "files": len(files), "sent": sent}))
        return
    typer.echo(f"{target}  {digest}  {len(files)} file(s), {sent} sent now")


def in_order(source: Path) -> list[Path]:
    """Of a model the configuration last: who finds that finds the whole model."""
    from cowest_training.round_trip import CONFIGURATIONS

    if not source.is_dir():
        return [source]
    files = (path for path in source.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: (path.parent == source and path.name in CONFIGURATIONS, path))


def _without_others(target: str, names: Collection[str], sums: Mapping[str, str]) -> dict[str, str]:
    """The sums of these names. What an earlier upload left besides is deleted: a model is read as all that is there.

    Raises `StepError` where something else lies there.
    """
    from cowest_serving import store

    begin = target.rstrip("/") + "/"
    uris = {uri.removeprefix(begin): uri for uri in store.list_files(target) if uri.startswith(begin)}
    there = {unquote(name) if target.startswith("file://") else name: uri for name, uri in uris.items()}
    others = [name for name in there if name not in names and name != SUMS]
    if foreign := [name for name in others if name not in sums]:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        seen = ", ".join(foreign[:3])
        raise StepError(f"{target}: wanted an empty place or an earlier upload, saw {seen}{more}. Name another place.")
    for name in others:
        store.delete(there[name])
    return {name: value for name, value in sums.items() if name in names}


def _read_sums(uri: str) -> dict[str, str]:
    """File name -> sha256, in the format of sha256sum."""
    from cowest_serving import store

    if not store.exists(uri):
        return {}
    lines = (line.partition("  ") for line in store.get(uri).decode().splitlines())
    return {name: checksum for checksum, _, name in lines}


def _checked(source: Path) -> str:
    """Digest of the model or of the rows; what no step could read is refused here."""
    if source.is_dir():
        from cowest_serving.model_files import check_model_folder, model_digest

        check_model_folder(source)
        return model_digest(source)
    if not source.is_file():
        raise StepError(f"{source}: wanted a data file or a model folder, saw nothing there.")
    from cowest_training.data import read_rows, rows_digest

    return rows_digest(read_rows(source.resolve().as_uri()))
