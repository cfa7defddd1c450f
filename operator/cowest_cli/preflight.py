"""What `validate`, `plan` and `run` look at before anything is started or paid: the data and the weak model.

The manifest itself was checked when it was read (`jobs.load`).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cowest_operator import manifest
from cowest_operator.schema import Problem
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Prompts, parse
from cowest_training.contract import EXIT_BAD_INPUT, Evaluator, Row, StepError
from cowest_training.enough import Lack, lacks_of_held_out, lacks_of_train, pairs_notes

DATA = ("train", "heldOut")  # the fields of spec.data
LABELS = "labels"  # of spec.feedback.evaluator.calibration
FILLED = ("query", "draft")  # in templates
PACKAGES = ("pyarrow", "numpy", "aiohttp")  # that read them


@dataclass(frozen=True)
class Facts:
    """What is known of the data before anything runs."""

    rows: int
    held_out: int
    has_explanations: bool
    query_chars: float
    explained: int = 0  # training rows with an explanation
    train_digest: str = ""  # of the rows, not of the file
    held_out_digest: str = ""
    notes: tuple[str, ...] = ()  # what is no fault, and a person should look at
    labelled: int = 0  # answers that people labelled, for the evaluator to score
    groups: Mapping[str, int] = field(default_factory=dict)  # held-out rows by `group`
    first: Row | None = field(default=None, repr=False)  # of training, to ask a scorer about

    def figures(self) -> dict[str, Any]:
        """All but the row, which is nobody's business."""
        return {name: value for name, value in asdict(replace(self, first=None)).items() if name != "first"}


def facts_of(document: Mapping[str, Any], source: str, known: Path | None = None) -> Facts:
    """Read both data sets strictly, wherever they lie. Raises `ManifestError` or `StepError`.

    `known`: where it is kept at which weak model and rows one looked.
    """
    spec = document["spec"]
    check_files(spec, source)
    if spec["weak"]["engine"] == "vLLM" and shutil.which("vllm") is None:
        raise StepError("spec.weak.engine vLLM: wanted the program `vllm` on PATH, saw none: pip install vllm")
    facts = check_data(spec, source, known=known)
    return replace(facts, notes=(*facts.notes, *prompt_notes(spec["collaboration"]["prompts"])))


def check_files(spec: Mapping[str, Any], source: str) -> None:
    """What is named must be there, and the weak model must be a folder of the right files."""
    if problems := list(_missing(spec)):
        raise manifest.ManifestError(source, problems)
    check_weak_model(spec["weak"]["model"], "spec.weak.model")


def check_data(
    spec: Mapping[str, Any], source: str, names: Collection[str] = (*DATA, LABELS), *, known: Path | None = None
) -> Facts:
    """The fields of `spec.data` that are named are read, and held beside each other where both are.

    The weak model is looked at too: whether it can be loaded, and asked these rows.
    """
    from cowest_training.calibration import answers_to_score, few_note, read_labels
    from cowest_training.check import check_rows, notes_of_rows
    from cowest_training.data import read_rows, rows_digest
    from cowest_training.evaluator import family_notes
    from cowest_training.round_trip import check_tokenizer

    unread = [(spec["data"][name], Counter[str]()) for name in DATA]
    train, held_out = (read_rows(*each) if name in names else [] for name, each in zip(DATA, unread, strict=True))
    evaluator = parse(Evaluator, spec["feedback"]["evaluator"])
    check_rows(train, held_out, evaluator)
    if "heldOut" in names:
        _refuse(lacks_of_held_out(spec, len(held_out)), source)
    if train:
        _refuse(lacks_of_train(spec, train), source)
    model, of_prompts = spec["weak"]["model"], list[str]()
    if model.startswith(manifest.FILE):
        of_prompts = look_at(spec, model, "spec.weak.model", train, held_out, known)
        if train:
            check_tokenizer(model, train)
    explained = sum(row.explanation is not None for row in train)
    characters = sum(len(row.query) for row in held_out) / max(1, len(held_out))
    calibration = evaluator.calibration if LABELS in names else None
    labels = read_labels(calibration.labels, evaluator) if calibration else []
    of_rows = notes_of_rows(train, held_out, unread, evaluator, spec["collaboration"]["draft"])
    of_judges = family_notes(evaluator, spec["strong"]["endpoint"], spec["strong"]["model"], spec["weak"]["model"])
    notes = [
        *of_judges,
        *of_rows,
        *([note] if labels and (note := few_note(labels)) else ()),
        *(_tuning_notes(spec, train) if train else ()),
        *of_prompts,
    ]
    return Facts(
        len(train),
        len(held_out),
        explained > 0,
        characters,
        explained,
        train_digest=rows_digest(train),
        held_out_digest=rows_digest(held_out),
        notes=tuple(notes),
        first=train[0] if train else None,
        labelled=answers_to_score(labels),
        groups=dict(Counter(row.group for row in held_out if row.group is not None)),  # asdict breaks a Counter
    )


def _refuse(lacks: Iterable[Lack], source: str) -> None:
    if problems := [Problem(each.field, each.reason, each.remedy) for each in lacks]:
        raise manifest.ManifestError(source, problems)


def _tuning_notes(spec: Mapping[str, Any], train: Sequence[Row]) -> Iterator[str]:
    """What tuning will not learn from."""
    from cowest_training.round_trip import length_notes

    sft, model = spec["training"]["sft"], spec["weak"]["model"]
    yield from pairs_notes(spec, len(train))
    if sft != "Never" and model.startswith(manifest.FILE):
        limits = spec["training"]["maxLength"], spec["collaboration"]["draftMaxTokens"]
        yield from length_notes(model, train, *limits)


def look_at(
    spec: Mapping[str, Any],
    model: str,
    what: str,
    train: Sequence[Row] = (),
    held_out: Sequence[Row] = (),
    known: Path | None = None,
) -> list[str]:
    """Notes. Raises `StepError` where a local model cannot be loaded, or can be asked none of the rows."""
    from cowest_cli.weak_model import Look, notes_of
    from cowest_training.prompts import HELD_OUT, TRAIN, Asked

    collaboration = spec["collaboration"]
    given = {**asdict(DEFAULT_PROMPTS[collaboration["draft"]]), **(collaboration.get("prompts") or {})}
    is_tuned = spec["rounds"]["max"] > 0
    asked = Asked(Prompts(**given), collaboration["draftMaxTokens"], spec["training"]["maxLength"], is_tuned)
    return notes_of(Look(model, what, asked, {TRAIN: train, HELD_OUT: held_out}), known)


_UNFILLED, _DOUBLE = re.compile(r"\{([A-Za-z_]\w*)\}"), re.compile(r"\{\{(query|draft)\}\}")


def prompt_notes(prompts: Mapping[str, str]) -> Iterator[str]:
    """Braces that look as if something filled them. They stay as they are, for JSON and code hold braces too."""
    for name, template in prompts.items():
        for word in dict.fromkeys(_UNFILLED.findall(template)):
            if word not in FILLED:
                near = next((each for each in FILLED if each == word.casefold()), "")
                meant = f" Is {{{near}}} meant?" if near else ""
                yield f"the template {name} has {{{word}}}, which nothing fills: the model sees it as it is.{meant}"
        if found := _DOUBLE.search(template):
            yield f"the template {name} has {found[0]}, of which a pair of braces stays: write {{{found[1]}}}."


def readable_here(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What of `DATA` and `LABELS` names local files, where these can be read."""
    if not can_read():
        return ()
    found = {name: spec["data"][name] for name in DATA} | _labels(spec)
    return tuple(name for name, uri in found.items() if uri.startswith(manifest.FILE))


def _labels(spec: Mapping[str, Any]) -> dict[str, str]:
    calibration = spec["feedback"]["evaluator"].get("calibration")
    return {LABELS: calibration["labels"]} if calibration else {}


def can_read() -> bool:
    """Whether the packages that read data are at hand."""
    return not _missing_package()


def not_read_here(spec: Mapping[str, Any]) -> Iterator[str]:
    """Of what the manifest names, what was not looked at, why, and what does it."""
    if package := _missing_package():
        yield f"the data were not read here: the package {package} is not installed. `cowest plan` reads them."
    else:
        for name in DATA:
            if name not in readable_here(spec):
                yield f"spec.data.{name} was not read here ({spec['data'][name]}): `cowest plan` reads it."
        for name, uri in _labels(spec).items():
            if name not in readable_here(spec):
                yield f"spec.feedback.evaluator.calibration.{name} was not read here ({uri}): `cowest plan` reads it."
    if not (model := spec["weak"]["model"]).startswith(manifest.FILE):
        yield f"spec.weak.model was not looked at here ({model}): the first step of `cowest run` reads it."


def _missing_package() -> str:
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), "")


def _missing(spec: Mapping[str, Any]) -> Iterator[Problem]:
    for name, uri in (
        ("weak.model", spec["weak"]["model"]),
        ("data.train", spec["data"]["train"]),
        ("data.heldOut", spec["data"]["heldOut"]),
        *((f"feedback.evaluator.calibration.{name}", uri) for name, uri in _labels(spec).items()),
    ):
        if uri.startswith(manifest.FILE) and not manifest.local_path(uri).exists():
            yield Problem(
                f"spec.{name}",
                f"there is nothing at {uri}",
                "Put it there, or change the path; a relative one starts at the manifest's folder",
            )
        elif uri.startswith(manifest.FILE) and name != "weak.model" and manifest.local_path(uri).is_dir():
            yield Problem(f"spec.{name}", f"wanted a JSONL or Parquet file, saw the folder {uri}", "Name a file in it")


def check_weak_model(uri: str, what: str) -> None:
    """A local folder must hold safetensors, configuration and tokenizer, and nobody's code. Raises `StepError`."""
    if not uri.startswith(manifest.FILE):
        return
    from cowest_serving.loadable import can_be_asked
    from cowest_serving.model_files import ModelFolderError, check_model_folder
    from cowest_training.round_trip import check_ids

    try:
        check_model_folder(manifest.local_path(uri))
    except ModelFolderError as error:
        raise StepError(f"{what}: {error}", EXIT_BAD_INPUT) from error
    if not can_be_asked():
        check_ids(uri)


def check_proposed(uri: str, document: Mapping[str, Any] | None) -> None:
    """The same of a model that is proposed, and whether it loads and reads the rows, where these can be read here.

    Raises `StepError`.
    """
    check_weak_model(uri, "--model")
    if not uri.startswith(manifest.FILE) or not can_read():
        return
    from cowest_training.data import read_rows
    from cowest_training.round_trip import check_tokenizer

    if document is None:
        look_at(_BEFORE_ANY_JOB, uri, "--model")
        return
    spec, names = document["spec"], readable_here(document["spec"])
    try:
        train, held_out = (read_rows(spec["data"][name]) if name in names else [] for name in DATA)
    except StepError:  # the data are no fault of the model, and for the loop to say
        train = held_out = []
    look_at(spec, uri, "--model", train, held_out)
    if train:
        check_tokenizer(uri, train)


_BEFORE_ANY_JOB: Mapping[str, Any] = {
    "collaboration": {"draft": "Explanation", "draftMaxTokens": 0},
    "training": {"maxLength": 1},
    "rounds": {"max": 0},
}
