"""Writes docs/api.md from the CRD: `python -m cowest_operator.docs [--check] [FILE]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cowest_operator import manifest
from cowest_operator.schema import Schema

HEAD = """# The CollaborationJob API (`cowest.dev/v1alpha1`)

Generated from `crds/collaborationjob.yaml` by `python -m cowest_operator.docs`; do not edit. `kubectl explain cwj.spec`
says the same. Numbers with fractions are decimal strings (`"0.05"`), durations whole seconds.
The rules below are checked by `cowest validate` and by the API server alike.
"""


def api_markdown() -> str:
    """The page: a table of fields for `spec` and `status`, then the rules."""
    schema = manifest.job_schema()
    fields = schema["properties"]
    return "\n".join(
        (
            HEAD,
            *_table("spec", fields["spec"], with_default=True),
            "\n## Rules\n\n| field | rule |\n|---|---|",
            *_rules(schema, ""),
            "",
            *_table("status", fields["status"], with_default=False),
            "",
        )
    )


def _table(name: str, schema: Schema, *, with_default: bool) -> Iterator[str]:
    yield f"## {name}\n\n{schema['description']}\n"
    columns = ("field", "type", "default", "description") if with_default else ("field", "type", "description")
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for path, field, required in _walk(schema, name):
        default = [_default(field, required)] if with_default else []
        cells = (f"`{path}`", _type(field), *default, field["description"])
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _walk(schema: Schema, path: str) -> Iterator[tuple[str, Schema, bool]]:
    """Every field under `schema`, with whether it must be given."""
    for name, field in schema.get("properties", {}).items():
        at = f"{path}.{name}"
        yield at, field, name in schema.get("required", ())
        yield from _walk(field.get("items", field), at + ("[]" if "items" in field else ""))


def _type(field: Schema) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{each}`" for each in field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "integer":
        low, high = field.get("minimum"), field.get("maximum")
        limits = f" ({low} to {high})" if high is not None else f" (at least {low})" if low is not None else ""
        return f"integer{limits}"
    if "additionalProperties" in field:
        return "map"
    return str(field.get("format") or field["type"])


def _default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    if "default" not in field or field["default"] == {}:
        return ""
    return f"`{json.dumps(field['default'])}`"


def _rules(schema: Schema, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        at = (path + rule.get("fieldPath", "")).lstrip(".")
        yield f"| `{at or 'metadata.name'}` | {_cell(rule['message'])} |"
    for name, field in schema.get("properties", {}).items():
        yield from _rules(field, f"{path}.{name}".lstrip("."))
        yield from _rules(field.get("items", {}), f"{path}.{name}[]".lstrip("."))


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("\\\\|", "\\|")


def write_or_check(page: Callable[[], str], file: str, arguments: list[str]) -> int:
    """`[--check] [FILE]`: write the page, or say (exit 1) that the file is out of date. Shared with cowest_cli.docs."""
    paths = [each for each in arguments if each != "--check"]
    path = Path(paths[0] if paths else file)
    text = page()
    if "--check" not in arguments:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{path}: is out of date. Run `make docs` and commit it.\n")
    return 1


def main(arguments: list[str] | Any = None) -> int:
    return write_or_check(api_markdown, "docs/api.md", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
