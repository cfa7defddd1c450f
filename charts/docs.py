"""Keeps the charts in step with what they are made from: `python charts/docs.py [--check]` (`make helm-docs`).

The operator's chart carries a copy of the CRD; the domain's values schema knows the CollaborationJob's spec, so that a
typo is refused before anything is installed; both READMEs list the values with the comments above them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).parent
CRD = CHARTS.parent / "crds" / "collaborationjob.yaml"
BEGIN, END = "<!-- values: written by `make helm-docs` -->", "<!-- end of values -->"
KEPT = ("type", "enum", "anyOf", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def main(arguments: list[str]) -> int:
    stale = [path for path, text in written().items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(CHARTS.parent)}: wanted what its sources say; run `make helm-docs`.\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(written()[path])
    return 0


def written() -> dict[Path, str]:
    """Every file that is made here, with its content."""
    operator, domain = CHARTS / "cowest-operator", CHARTS / "cowest-domain"
    return {
        operator / "files" / "collaborationjob.yaml": CRD.read_text(),
        domain / "values.schema.json": domain_schema(domain / "values.schema.json"),
        operator / "README.md": readme(operator),
        domain / "README.md": readme(domain),
    }


def domain_schema(path: Path) -> str:
    """The hand-written schema, with `job` as the CRD has it."""
    schema = json.loads(path.read_text())
    spec = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    job = strict(spec)
    del job["required"]  # the chart's own message says what is missing, and `helm lint` needs no job
    schema["properties"]["job"] = job
    return json.dumps(schema, indent=1) + "\n"


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema as JSON Schema in which a field that nobody knows is an error."""
    built = {key: schema[key] for key in KEPT if key in schema}
    if "items" in schema:
        built["items"] = strict(schema["items"])
    if "additionalProperties" in schema:
        built["additionalProperties"] = strict(schema["additionalProperties"])
    elif "properties" in schema:
        built["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
        built["required"] = schema.get("required", [])
        built["additionalProperties"] = False
    return built


def readme(chart: Path) -> str:
    """The hand-written page, with the table of values between the markers."""
    text = (chart / "README.md").read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{chart.name}/README.md: wanted the lines {BEGIN!r} and {END!r}; put them back.")
    rows = [f"| `{path}` | {_default(value)} | {comment} |" for path, value, comment in values(chart / "values.yaml")]
    return "\n".join((head + BEGIN, "| value | default | what it is |", "|---|---|---|", *rows, END + tail))


def values(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(path, default, comment) of every value. One without a comment is refused: nobody would know what it is."""
    text = path.read_text()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    yield from _walk(root, text.splitlines(), "", path)


def _walk(node: yaml.MappingNode, lines: list[str], prefix: str, path: Path) -> Iterator[tuple[str, Any, str]]:
    for key, value in node.value:
        at, line = prefix + key.value, key.start_mark.line
        comment = _comment_above(lines, line)
        is_section = isinstance(value, yaml.MappingNode) and bool(value.value)
        parts = list(_walk(value, lines, f"{at}.", path)) if is_section and _has_comments(value, lines) else []
        if comment:
            yield at, None if parts else yaml.safe_load(yaml.serialize(value)), comment
        elif not parts:
            raise SystemExit(f"{path}:{line + 1}: wanted a comment above {at}, saw none. Say what it is for.")
        yield from parts


def _has_comments(node: yaml.MappingNode, lines: list[str]) -> bool:
    """Whether the mapping is a section of values, and not one value such as `resources`."""
    return any(
        _comment_above(lines, key.start_mark.line)
        or (isinstance(value, yaml.MappingNode) and value.value and _has_comments(value, lines))
        for key, value in node.value
    )


def _comment_above(lines: list[str], line: int) -> str:
    indent = len(lines[line]) - len(lines[line].lstrip())
    found: list[str] = []
    for text in reversed(lines[:line]):
        if not text.startswith(" " * indent + "#"):
            break
        found.insert(0, text.strip().lstrip("# "))
    return " ".join(found)


def _default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
