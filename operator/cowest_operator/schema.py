"""The part of Kubernetes' structural schemas and CEL that our CRD uses, for checking a manifest without a cluster.

`default` and `check` do what the API server does on create (and, given the old value, on update), with messages
that say what to change. tests/apiserver holds both against a real API server.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cel_expr_python import cel

Schema = Mapping[str, Any]

# What `check` understands. A contract test fails when the CRD uses anything else.
KEYWORDS = frozenset(
    {
        "additionalProperties", "anyOf", "default", "description", "enum", "format", "items", "maxItems", "maxLength",
        "maxProperties", "maximum", "minItems", "minLength", "minimum", "properties", "required", "type",
        "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys", "x-kubernetes-list-type",
        "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
    }
)  # fmt: skip
UNKNOWN = "is not a known field"
TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "object": (Mapping, "fields (`name: value` lines)"),
    "array": (list, "a list"),
    "string": (str, "text"),
    "integer": (int, "a whole number"),
    "boolean": (bool, "true or false"),
}
INTEGERS = {"int32": 2**31 - 1, "int64": 2**63 - 1}  # the most, by `format`


@dataclass(frozen=True)
class Problem:
    """One thing to change: `field: reason; saw seen. remedy`. Of a rule, the reason is what the API server says too."""

    field: str
    reason: str
    remedy: str = ""
    seen: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.reason}" if self.field else self.reason
        text = f"{text}; saw {self.seen}" if self.seen else text
        text = f"{text}. {self.remedy}" if self.remedy else text
        return text if text.endswith((".", "?")) else text + "."


# ---------------------------------------------------------------- defaulting
def default(schema: Schema, value: Any) -> Any:
    """A copy of `value` with the schema's defaults filled in and nulls dropped, as the API server does it."""
    if isinstance(value, list) and "items" in schema:
        return [default(schema["items"], item) for item in value]
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    fields: Mapping[str, Schema] = schema.get("properties", {})
    given = {name: item for name, item in value.items() if not (item is None and name in fields)}
    absent = {name: field["default"] for name, field in fields.items() if "default" in field and name not in given}
    filled = {**given, **absent}
    in_order = [*(name for name in fields if name in filled), *(name for name in filled if name not in fields)]
    return {name: default(fields.get(name, schema.get("additionalProperties", {})), filled[name]) for name in in_order}


# ---------------------------------------------------------------- checking
def check(schema: Schema, value: Any, path: str = "", old: Any = None) -> Iterator[Problem]:
    """All problems of a defaulted value. Rules run where it is well formed; those on `oldSelf` only with `old`."""
    seen = False
    for problem in _structure(schema, value, path, old):
        seen = True
        yield problem
    if not seen:
        yield from _rules(schema, value, path, old)


def _structure(schema: Schema, value: Any, path: str, old: Any) -> Iterator[Problem]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield _type_problem(path, "a whole number or text", value, "")
        return
    wanted = schema.get("type")
    if wanted and not _is(wanted, value):
        yield _type_problem(path, TYPES[wanted][1], value, wanted)
        return
    if "enum" in schema and value not in schema["enum"]:
        yield _enum_problem(path, schema["enum"], value)
    yield from _bounds(schema, value, path)
    if isinstance(value, Mapping):
        yield from _fields(schema, value, path, old if isinstance(old, Mapping) else {})
    if isinstance(value, list):
        yield from _items(schema, value, path)


def _is(wanted: str, value: Any) -> bool:
    kinds = TYPES[wanted][0]
    return isinstance(value, kinds) and (wanted == "boolean" or not isinstance(value, bool))


def _type_problem(path: str, words: str, value: Any, wanted: str) -> Problem:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    remedy = ""
    if wanted == "string" and isinstance(value, bool):
        remedy = "YAML reads yes, no, on and off as true or false: put the word that you wrote in quotes"
    elif wanted == "string" and isinstance(value, int | float):
        remedy = f'Put it in quotes: "{shown}"'
    elif wanted == "integer" and isinstance(value, str) and value.strip().lstrip("-").isdigit():
        remedy = f"Remove the quotes: {value.strip()}"
    elif wanted == "array":
        remedy = "Begin each entry with '- '"
    seen = "nothing" if value is None else shown if len(shown) <= 60 else shown[:57] + "..."
    return Problem(path, f"wanted {words}, saw {seen}", remedy)


def _enum_problem(path: str, allowed: Sequence[Any], value: Any) -> Problem:
    near = nearest(str(value), [str(each) for each in allowed])
    listed = ", ".join(map(str, allowed))
    wanted = f"wanted one of {listed}" if len(allowed) > 1 else f"wanted {listed}"
    return Problem(path, f"{wanted}; saw {value!r}", f"Did you mean {near}?" if near else "")


def _bounds(schema: Schema, value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, int) and not isinstance(value, bool):
        most = INTEGERS.get(schema.get("format", ""), abs(value))
        limits = {"minimum": -most - 1, "maximum": most, **schema}
        yield from _within(limits, ("minimum", "maximum"), value, path, "")
    elif isinstance(value, str):
        yield from _within(schema, ("minLength", "maxLength"), len(value), path, "character")
    elif isinstance(value, list):
        yield from _within(schema, ("minItems", "maxItems"), len(value), path, "entr(y|ies)")
    elif isinstance(value, Mapping):
        yield from _within(schema, ("minProperties", "maxProperties"), len(value), path, "field")


def _within(schema: Schema, limits: tuple[str, str], size: int, path: str, unit: str) -> Iterator[Problem]:
    low, high = schema.get(limits[0]), schema.get(limits[1])
    if low is not None and size < low:
        yield Problem(path, f"wanted at least {_counted(low, unit)}, saw {size}")
    if high is not None and size > high:
        yield Problem(path, f"wanted at most {_counted(high, unit)}, saw {size}")


def _counted(number: int, unit: str) -> str:
    if unit == "entr(y|ies)":
        return f"{number} {'entry' if number == 1 else 'entries'}"
    return f"{number} {unit}{'' if number == 1 else 's'}" if unit else str(number)


def _fields(schema: Schema, value: Mapping[str, Any], path: str, old: Mapping[str, Any]) -> Iterator[Problem]:
    fields: Mapping[str, Schema] = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield Problem(_join(path, name), "is missing", f"Add it: {_first_sentence(fields[name])}")
    for name, item in value.items():
        at = _join(path, str(name))
        if name in fields:
            yield from check(fields[name], item, at, old.get(name))
        elif others is not None:
            yield from check(others, item, at, old.get(name))
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            near = nearest(str(name), list(fields))
            known = ", ".join(fields)
            yield Problem(at, UNKNOWN, f"Did you mean {near}?" if near else f"Known here: {known}")


def _items(schema: Schema, value: list[Any], path: str) -> Iterator[Problem]:
    keys = schema.get("x-kubernetes-list-map-keys", ())
    distinct = schema.get("x-kubernetes-list-type") in ("set", "map")
    seen: set[str] = set()  # as text: 1 is not true
    for index, item in enumerate(value):
        at = f"{path}[{index}]"
        if problems := list(check(schema["items"], item, at)):
            yield from problems
            continue
        identity = repr([item.get(key) for key in keys] if keys and isinstance(item, Mapping) else item)
        if distinct and identity in seen:
            yield Problem(at, f"is the second entry {identity}", "Remove one of them")
        seen.add(identity)


def _rules(schema: Schema, value: Any, path: str, old: Any) -> Iterator[Problem]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"] and old is None:
            continue
        if not _holds(rule["rule"], value, old):
            at = path + rule.get("fieldPath", "") if path else rule.get("fieldPath", "")[1:]
            yield Problem(at, rule["message"], seen=repr(value) if _may_be_shown(rule["message"], value) else "")


_SHOWN = (
    "must be file://", "must be an address", "must use https", "must have a port", "must be a decimal number",
    "must be a Kubernetes quantity", "must be the value of a label",
)  # fmt: skip


def _may_be_shown(message: str, value: Any) -> bool:
    """Of files, numbers and addresses alone, and of an address that can carry neither a password nor a key."""
    if not isinstance(value, str) or not message.startswith(_SHOWN):
        return False
    return message.startswith("must be file://") or not {"@", "?"} & set(value)


# ---------------------------------------------------------------- CEL
def _holds(expression: str, value: Any, old: Any) -> bool:
    """Whether a rule is true of the value. An evaluation error is no pass, as at the API server."""
    return _compiled(expression).eval(data={"self": value, "oldSelf": old}).value() is True


@functools.cache
def _compiled(expression: str) -> Any:
    return _environment().compile(expression)


@functools.cache
def _environment() -> Any:
    return cel.NewEnv(variables={"self": cel.Type.DYN, "oldSelf": cel.Type.DYN})


# ---------------------------------------------------------------- words
def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that was probably meant, whatever its case."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.7)
    return by_lower[found[0]] if found else None


def _first_sentence(schema: Schema) -> str:
    text: str = schema.get("description", "")
    return text.partition(". ")[0].rstrip(".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
