"""Reads a manifest file: the CollaborationJob and the ConfigMaps beside it, checked against the CRD and defaulted.

Used by the command line and the embedded engine; on Kubernetes the API server does the same with the same CRD.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml

from cowest_operator import pods, schedule
from cowest_operator import schema as structural
from cowest_operator.schema import Problem, nearest

API_VERSION, KIND = "cowest.dev/v1alpha1", "CollaborationJob"
CRD_FILE = "collaborationjob.yaml"
MAX_BYTES = 1_000_000  # what etcd takes of one object, more or less
MAX_NODES = 100_000  # aliases can make a small file endless
FILE = "file://"
PROMPTS = ("draft", "refine", "solo")
LONGEST_NAMESPACE = 40  # of the 63 characters of `<server>-predictor-<namespace>`, which KServe makes a host of

ConfigMaps = Mapping[str, Mapping[str, str]]  # name -> data
Lines = Mapping[str, int]  # field path -> line, from 1

# ObjectMeta is no part of a CRD's schema: the API server knows it by itself.
_STRING_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA: structural.Schema = {
    "description": "Name and labels of the job",
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "description": "Name of the job", "minLength": 1},
        "namespace": {"type": "string"},
        "labels": _STRING_MAP,
        "annotations": _STRING_MAP,
        "generation": {"type": "integer"},
        "generateName": {"type": "string"},
        # What the server adds; it stands in files that come from `kubectl get -o yaml`.
        "creationTimestamp": {},
        "deletionTimestamp": {},
        "finalizers": {},
        "managedFields": {},
        "ownerReferences": {},
        "resourceVersion": {},
        "selfLink": {},
        "uid": {},
    },
}


class ManifestError(ValueError):
    """A manifest cannot be used. Says every problem with its place, one a line."""

    def __init__(self, source: str, problems: Sequence[Problem], lines: Lines | None = None) -> None:
        self.source = source
        self.lines = lines or {}
        self.problems = tuple(sorted(problems, key=lambda problem: self.line(problem.field)))
        super().__init__("\n".join(f"{self._place(problem.field)}{problem}" for problem in self.problems))

    def line(self, path: str) -> int:
        """Line of the field, or of the nearest one around it that stands in the file; 0 when unknown."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, 0)

    def _place(self, path: str) -> str:
        line = self.line(path)
        return f"{self.source}:{line}: " if line else f"{self.source}: "


@dataclass(frozen=True)
class Loaded:
    """A checked manifest. `job` is defaulted; its prompts are not filled in yet (`resolve_prompts`)."""

    job: dict[str, Any]
    config_maps: ConfigMaps = field(default_factory=dict)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it: dates stay text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# ---------------------------------------------------------------- the CRD
def crd_path() -> Path:
    """The CRD beside this module (installed), or in the repository."""
    installed = Path(__file__).with_name(CRD_FILE)
    return installed if installed.exists() else Path(__file__).parents[2] / "crds" / CRD_FILE


@functools.cache
def crd() -> Mapping[str, Any]:
    document: Mapping[str, Any] = yaml.load(crd_path().read_text(encoding="utf-8"), _Loader)
    return document


def job_schema() -> structural.Schema:
    """The structural schema of a CollaborationJob."""
    version: Mapping[str, Any] = crd()["spec"]["versions"][0]
    schema: structural.Schema = version["schema"]["openAPIV3Schema"]
    return schema


def field_schema(path: str) -> structural.Schema:
    """The schema of a field, such as `spec.collaboration.prompts`."""
    found = job_schema()
    for name in path.split("."):
        found = found["properties"][name]
    return found


# ---------------------------------------------------------------- YAML
@dataclass(frozen=True)
class Document:
    value: Any
    lines: Lines


def parse_yaml(text: str, source: str) -> Iterator[Document]:
    """The documents of a YAML (or JSON) text, with the line of every field. Raises `ManifestError`."""
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            lines: dict[str, int] = {}
            _note_lines(node, "", lines, source)
            yield Document(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = {"": mark.line + 1} if mark else None
        problem = Problem(
            "", f"is not valid YAML: {reason}", "Check indentation (spaces only), quotes and colons there"
        )
        raise ManifestError(source, [problem], where) from None
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: str, lines: dict[str, int], source: str) -> None:
    """Fill `lines`; refuse a field that stands twice and a document that is endless through its aliases."""
    if len(lines) > MAX_NODES or path.count(".") + path.count("[") > 64:
        raise ManifestError(source, [Problem("", "is too deep or too large", "Remove YAML aliases of aliases")])
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode) and (problem := _odd_number(node, path)):
        raise ManifestError(source, [problem], {path: node.start_mark.line + 1})
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, f"{path}[{index}]", lines, source)
    if isinstance(node, yaml.MappingNode):
        here: set[str] = set()
        for key, item in node.value:
            name = str(key.value)
            at = f"{path}.{name}" if path else name
            line = key.start_mark.line + 1
            if name in here:
                raise ManifestError(source, [Problem(at, "stands twice", "Remove one of the two")], {at: line})
            here.add(name)
            _note_lines(item, at, lines, source)
            lines[at] = line


_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def _odd_number(node: yaml.ScalarNode, path: str) -> Problem | None:
    """YAML 1.1 reads 064 as 52 and 1:04 as 64, which nobody means; Kubernetes reads the second one as text."""
    if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return None
    if ":" not in node.value and not _OCTAL.fullmatch(node.value):
        return None
    remedy = f'Write a number without leading zeros and colons; text stands in quotes: "{node.value}"'
    return Problem(path, f"wanted a number as people read it, saw {node.value}", remedy)


# ---------------------------------------------------------------- loading
def load(path: str | Path) -> Loaded:
    """Read, check and default a manifest file. Raises `ManifestError` with every problem found."""
    source = str(path)
    try:
        data = Path(path).read_bytes()
        if len(data) > MAX_BYTES:
            raise ManifestError(
                source, [Problem("", f"has {len(data)} bytes, wanted {MAX_BYTES} at most", "Is it the right file?")]
            )
        text = data.decode("utf-8-sig")
    except OSError as error:
        remedy = "`cowest init` writes a first manifest" if isinstance(error, FileNotFoundError) else ""
        raise ManifestError(source, [Problem("", f"cannot be read: {error.strerror}", remedy)]) from None
    except UnicodeDecodeError:
        raise ManifestError(source, [Problem("", "is not UTF-8 text", "Save it as UTF-8")]) from None
    return loads(text, source)


def loads(text: str, source: str = "manifest") -> Loaded:
    """`load` for a text that is at hand."""
    documents = [document for document in parse_yaml(text, source) if document.value is not None]
    jobs: list[Document] = []
    config_maps: dict[str, Mapping[str, str]] = {}
    for number, document in enumerate(documents, 1):
        kind = document.value.get("kind") if isinstance(document.value, Mapping) else None
        if kind == KIND:
            jobs.append(document)
        elif kind == "ConfigMap":
            name, data = _config_map(document, source)
            config_maps[name] = data
        else:
            raise ManifestError(source, [_foreign_document(document.value, number)], document.lines)
    if len(jobs) != 1:
        seen = "none" if not jobs else f"{len(jobs)}"
        remedy = (
            f"Add one with apiVersion: {API_VERSION} and kind: {KIND}"
            if not jobs
            else "Put each into a file of its own"
        )
        raise ManifestError(source, [Problem("", f"wanted one {KIND} document, saw {seen}", remedy)])
    return Loaded(_checked(jobs[0], source), config_maps)


def _checked(document: Document, source: str) -> dict[str, Any]:
    job: dict[str, Any] = structural.default(job_schema(), document.value)
    job.pop("status", None)  # a manifest declares, it does not report
    problems = validate(job)
    if problems:
        raise ManifestError(source, problems, document.lines)
    return job


def validate(job: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> list[Problem]:
    """Problems of a defaulted job; with `old`, also of the change from the old one to it."""
    problems = []
    if job.get("apiVersion") != API_VERSION:
        problems.append(Problem("apiVersion", f"wanted {API_VERSION}, saw {job.get('apiVersion')!r}"))
    schema = job_schema()
    whole = {**schema, "properties": {**schema["properties"], "metadata": _METADATA}, "required": ["metadata", "spec"]}
    problems += [_placed(problem) for problem in structural.check(whole, job, "", old)]
    return problems or [*beyond_cel(job)]


def beyond_cel(job: Mapping[str, Any]) -> Iterator[Problem]:
    """What no rule of the CRD can say of a job that is well formed; on a cluster the operator says it."""
    spec, namespace = job["spec"], job["metadata"].get("namespace") or ""
    if len(namespace) > LONGEST_NAMESPACE:
        reason = f"wanted at most {LONGEST_NAMESPACE} characters, saw {namespace} ({len(namespace)})"
        remedy = "KServe makes the names of weak models' hosts from it: choose a shorter namespace"
        yield Problem("metadata.namespace", reason, remedy)

    expression = spec["rounds"]["trigger"].get("schedule")
    if expression and (why := schedule.problem(expression)):
        remedy = 'Write minute, hour, day, month and weekday (UTC), such as "0 3 * * *"'
        yield Problem("spec.rounds.trigger.schedule", f"is no cron expression ({why}), saw {expression!r}", remedy)

    pattern = spec["feedback"]["evaluator"].get("extract")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            remedy = 'Write one that Python\'s `re` takes, such as "answer: (.*)"'
            yield Problem(
                "spec.feedback.evaluator.extract", f"is no regular expression ({error}), saw {pattern!r}", remedy
            )

    yield from pods.limits_too_low(spec)
    if any(pods.over(spec)) and pods.can_look():
        yield from pods.wrong_fields(spec, _pod())


@functools.cache
def _pod() -> structural.Schema:
    return pods.schema_of("V1PodSpec", field_schema("spec.weak.resources.requests")["additionalProperties"])


def _placed(problem: Problem) -> Problem:
    """For a field that stands in the wrong section, say the right one."""
    if problem.reason != structural.UNKNOWN or problem.remedy.startswith("Did you mean"):
        return problem
    name = problem.field.rpartition(".")[2]
    homes = [path for path in _field_paths(job_schema()["properties"]["spec"], "spec") if path.endswith(f".{name}")]
    return dataclasses.replace(problem, remedy=f"Did you mean {' or '.join(homes[:3])}?") if homes else problem


def _field_paths(schema: structural.Schema, path: str) -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from _field_paths(inner, f"{path}.{name}")


def _config_map(document: Document, source: str) -> tuple[str, Mapping[str, str]]:
    value = document.value
    schema = {
        "type": "object",
        "required": ["metadata", "data"],
        "properties": {"metadata": _METADATA, "data": {**_STRING_MAP, "description": "Keys and texts"}},
        "x-kubernetes-preserve-unknown-fields": True,
    }
    problems = list(structural.check(schema, value))
    if problems:
        raise ManifestError(source, problems, document.lines)
    return str(value["metadata"]["name"]), dict(value["data"])


def _foreign_document(value: Any, number: int) -> Problem:
    if not isinstance(value, Mapping):
        return Problem(
            "", f"document {number} is not an object", f"It begins with apiVersion: {API_VERSION} and kind: {KIND}"
        )
    kind = value.get("kind")
    if kind is None:
        return Problem("kind", f"is missing in document {number}", f"Write kind: {KIND}")
    if kind == "Secret":
        remedy = "Remove it: keys come from COWEST_SECRET_<NAME>_<KEY> in the environment or from files in --secrets"
        return Problem("kind", "a Secret in the manifest file is not read", remedy)
    near = nearest(str(kind), [KIND, "ConfigMap"])
    remedy = f"Did you mean {near}?" if near else "Remove the document"
    return Problem("kind", f"wanted {KIND} or ConfigMap, saw {kind!r}", remedy)


# ---------------------------------------------------------------- resolving
def resolve_files(job: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """A copy of the job in which relative file:// URIs start at `folder` (the manifest's own)."""
    resolved: dict[str, Any] = copy.deepcopy(dict(job))
    spec = resolved["spec"]
    for section, name in (("weak", "model"), ("data", "train"), ("data", "heldOut")):
        spec[section][name] = absolute_uri(spec[section][name], folder)
    if calibration := spec["feedback"]["evaluator"].get("calibration"):
        calibration["labels"] = absolute_uri(calibration["labels"], folder)
    return resolved


def absolute_uri(uri: str, folder: str | Path) -> str:
    """`file://data/a.jsonl` -> `file:///folder/data/a.jsonl`; other URIs and absolute paths as they are."""
    if not uri.startswith(FILE):
        return uri
    return FILE + quote(os.path.normpath(Path(folder).resolve() / local_path(uri)))


def local_path(uri: str) -> Path:
    """The path of a file:// URI; `%20` and the like are decoded, as the object store does it."""
    return Path(unquote(uri.removeprefix(FILE)))


def resolve_prompts(job: Mapping[str, Any], config_maps: ConfigMaps, built_in: Mapping[str, str]) -> dict[str, Any]:
    """A copy of the job with all three templates: from the manifest or its ConfigMap, else the `built_in` ones.

    `built_in` are the texts of the job's draft form by name (draft, refine, solo). Raises `ManifestError`.
    """
    resolved: dict[str, Any] = copy.deepcopy(dict(job))
    collaboration = resolved["spec"]["collaboration"]
    given = collaboration.get("prompts") or {}
    reference = collaboration.get("promptsConfigMapRef")
    if reference:
        given = _prompts_of(reference["name"], config_maps)
    collaboration["prompts"] = {**{name: built_in[name] for name in PROMPTS}, **given}
    return resolved


def _prompts_of(name: str, config_maps: ConfigMaps) -> Mapping[str, str]:
    source = f"ConfigMap {name}"
    if name not in config_maps:
        remedy = (
            "Add the ConfigMap as a document of the manifest file, or write the templates into collaboration.prompts"
        )
        problem = Problem("spec.collaboration.promptsConfigMapRef.name", f"there is no ConfigMap {name!r}", remedy)
        raise ManifestError("manifest", [problem])
    problems = list(structural.check(field_schema("spec.collaboration.prompts"), config_maps[name], "data"))
    if problems:
        raise ManifestError(source, problems)
    return config_maps[name]
