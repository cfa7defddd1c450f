"""What a manifest says of pods, held against what Kubernetes knows of them, before anything is made or paid for.

Argo drops a field that it does not know, and an API server refuses a pod long after its job was declared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from cowest_operator import schema as structural
from cowest_operator.schema import Problem, Schema

SECTIONS = ("weak", "training", "gateway")
QUANTITIES = ("limits", "requests", "overhead", "sizeLimit", "divisor")  # plain text to the client of Kubernetes
ENUMS = {"imagePullPolicy": ("Always", "IfNotPresent", "Never")}
PLAIN = {"str": "string", "int": "integer", "bool": "boolean"}
UNITS = {
    unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), -3)
}
UNITS |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)}


def limits_too_low(spec: Mapping[str, Any]) -> Iterator[Problem]:
    for section in SECTIONS:
        resources = spec.get(section, {}).get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in requests:
            if name in limits and amount(limits[name]) < amount(requests[name]):
                path = f"spec.{section}.resources"
                reason = f"wanted no less than {path}.requests.{name} ({requests[name]}), saw {limits[name]}"
                yield Problem(f"{path}.limits.{name}", reason, "Raise the limit or lower the request")


def amount(quantity: str | int) -> Decimal:
    """What a well-formed quantity comes to."""
    number = str(quantity).rstrip("numkMGTPEi")
    return Decimal(number) * UNITS[str(quantity)[len(number) :]]


def over(spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is laid over pods, by its path."""
    for section in SECTIONS:
        if pod := (spec.get(section, {}).get("podTemplate") or {}).get("spec"):
            yield f"spec.{section}.podTemplate.spec", pod


def wrong_fields(spec: Mapping[str, Any], known: Schema) -> Iterator[Problem]:
    for path, pod in over(spec):
        found = structural.check(known, structural.default(known, pod), path)
        yield from (each for each in found if ".$" not in each.field)  # `$patch`: a word to Argo's merge, no field


def can_look() -> bool:
    """Whether the package that knows all fields of a pod is at hand."""
    return importlib.util.find_spec("kubernetes") is not None


def schema_of(model: str, quantity: Schema) -> Schema:
    """The schema of an object, by the model that the client of Kubernetes has of it."""
    from kubernetes.client import models

    kind = getattr(models, model)
    fields = ((field, kind.openapi_types[name]) for name, field in kind.attribute_map.items())
    return {"type": "object", "properties": {field: _field(field, told, quantity) for field, told in fields}}


def _field(name: str, told: str, quantity: Schema) -> Schema:
    """`told`: the client's word for its type, such as `Dict[str, str]`, `List[V1Container]` or `object`."""
    if told.startswith("List["):
        return {"type": "array", "items": _field("", told[5:-1], quantity)}
    if told.startswith("Dict[str, "):
        return {"type": "object", "additionalProperties": _field(name, told[10:-1], quantity)}
    if name in QUANTITIES:
        return quantity
    if told in PLAIN:
        return {"type": PLAIN[told], **({"enum": ENUMS[name]} if name in ENUMS else {})}
    return schema_of(told, quantity) if "V1" in told else {"x-kubernetes-preserve-unknown-fields": True}
