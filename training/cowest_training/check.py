"""Look at all that a job names before anything is started or paid for: its rows, their split, the weak model.

    python -m cowest_training.check --job job.json --out s3://b/j/runs/r0/check

Writes manifest.json alone; its metrics say what the loop has to know of the data. Unchanged files are not read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cowest_serving import store
from cowest_serving.contract import DraftForm, digest_of
from cowest_serving.loadable import Reader, check_loadable
from cowest_serving.model_files import ModelFolderError, check_model_folder
from cowest_training.awaited import is_in_a_store, look_for
from cowest_training.calibration import FIELD, few_note, read_labels
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_MISSING,
    EXIT_OK,
    Evaluator,
    Manifest,
    Row,
    StepError,
    evaluator_digest,
)
from cowest_training.data import case_note, check_split, read_rows, rows_digest, unread_note
from cowest_training.enough import bounds, lacks_of_held_out, lacks_of_train, pairs_notes
from cowest_training.evaluator import check_references, check_settings, decimal_note, extract_note, family_notes
from cowest_training.prompts import HELD_OUT, TRAIN, Asked, check_prompts, prompts_of
from cowest_training.round_trip import CONFIGURATIONS, check_ids, check_tokenizer, small_files
from cowest_training.steps import Progress, load_settings, load_spec, local_path, open_output, parser, run, say


def main(argv: Sequence[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    settings = load_settings(args.job)
    spec = load_spec(args.job)
    data, evaluator, model = settings.data, settings.feedback.evaluator, weak_model(spec)
    check_settings(evaluator)
    asked = Asked(
        prompts_of(settings.collaboration),
        settings.collaboration.draft_max_tokens,
        settings.training.max_length,
        is_tuned=spec.get("rounds", {}).get("max", 1) > 0,
    )
    named = {"spec.data.train": data.train, "spec.data.heldOut": data.held_out, "spec.weak.model": model}
    if evaluator.calibration:
        named[f"{FIELD}.labels"] = evaluator.calibration.labels
    look_for(named, folders=["spec.weak.model"], out=args.out)
    inputs = {
        "train": store.fingerprint(data.train),
        "held_out": store.fingerprint(data.held_out),
        "evaluator": evaluator_digest(evaluator),
        "model": model if is_of_the_hub(model) else store.fingerprint(model),
        "asked": asdict(asked),
        "bounds": bounds(spec),
        **({"labels": store.fingerprint(evaluator.calibration.labels)} if evaluator.calibration else {}),
    }
    output = open_output(args.out, step="check", inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    progress = Progress(args.progress, "check")
    progress.update(0, 2, "checks", "reading rows")
    unread = [(uri, Counter[str]()) for uri in (data.train, data.held_out)]
    train, held_out = (read_rows(uri, keys) for uri, keys in unread)
    check_rows(train, held_out, evaluator)
    if lacks := [*lacks_of_held_out(spec, len(held_out)), *lacks_of_train(spec, train)]:
        raise StepError("\n".join(map(str, lacks)))
    of_rows = notes_of_rows(train, held_out, unread, evaluator, settings.collaboration.draft)
    of_judges = family_notes(evaluator, settings.strong.endpoint, settings.strong.model, model)
    for note in (*of_judges, *of_rows, *pairs_notes(spec, len(train))):
        say(f"note: {note}")
    if evaluator.calibration and (note := few_note(read_labels(evaluator.calibration.labels, evaluator))):
        say(f"note: {note}")
    progress.update(1, 2, "checks", "looking at the weak model")
    check_weak_model(model)
    if not is_of_the_hub(model):
        reader = check_loaded(model)
        check_tokenizer(model, train)
        for note in check_prompts(model, {TRAIN: train, HELD_OUT: held_out}, asked, reader):
            say(f"note: {note}")
    digest = digest_of([rows_digest(train), rows_digest(held_out)])
    output.finish(kind="Check", metrics=facts(train, held_out), digest=digest)
    progress.update(2, 2, "checks")
    return EXIT_OK


def weak_model(spec: Mapping[str, Any]) -> str:
    weak = spec.get("weak")
    model = weak.get("model") if isinstance(weak, Mapping) else None
    if not isinstance(model, str) or not model:
        raise StepError(f"spec.weak.model: wanted a URI, saw {model!r}.")
    return model


def is_of_the_hub(model: str) -> bool:
    return model.startswith("hf://")


def check_rows(train: Sequence[Row], held_out: Sequence[Row], evaluator: Evaluator) -> None:
    """Raises `StepError`."""
    check_split(train, held_out)
    for rows in (train, held_out):
        check_references(rows, evaluator)


def notes_of_rows(
    train: Sequence[Row],
    held_out: Sequence[Row],
    unread: Sequence[tuple[str, Mapping[str, int]]],
    evaluator: Evaluator,
    draft: DraftForm,
) -> list[str]:
    """What is no fault, and a person should look at. `unread`: by file the keys that nothing reads, as counted."""
    notes = (
        *(unread_note(uri, keys) for uri, keys in unread),
        extract_note(evaluator, train, draft),
        decimal_note(evaluator, [*train, *held_out]),
        case_note(train),
        case_note(held_out),
    )
    return [note for note in notes if note]


def facts(train: Sequence[Row], held_out: Sequence[Row]) -> dict[str, Any]:
    """What is known of the data before anything runs; characters of queries are a mean, as estimates use it."""
    return {
        "rows": len(train),
        "held_out": len(held_out),
        "has_explanations": any(row.explanation for row in train),
        "query_chars": sum(len(row.query) for row in held_out) / max(1, len(held_out)),
        "max_reference_chars": max((len(row.reference) for row in (*train, *held_out)), default=0),
    }


def check_weak_model(uri: str) -> None:
    """By the names of its files: weights may be many gigabytes. A model of the Hub is left to the step that takes it.

    Raises `StepError`.
    """
    if is_of_the_hub(uri):
        return
    root = uri.rstrip("/") + "/"
    names = {file.removeprefix(root) for file in store.list_files(uri)}
    if not names:
        raise StepError(f"spec.weak.model: wanted a model folder at {uri}, saw nothing there. Check bucket and prefix.")
    missing = [
        wanted
        for wanted, found in (
            ("weights as *.safetensors", any("/" not in name and name.endswith(".safetensors") for name in names)),
            (" or ".join(CONFIGURATIONS), not names.isdisjoint(CONFIGURATIONS)),
        )
        if not found
    ]
    if missing:
        brought = is_in_a_store(uri)  # perhaps just now, file by file
        raise StepError(
            f"spec.weak.model: wanted {' and '.join(missing)} in {uri}, saw {', '.join(sorted(names)[:5])}. "
            f"Name the folder that `model.save_pretrained` wrote{', or wait for the end of its upload' * brought}.",
            EXIT_MISSING if brought else EXIT_BAD_INPUT,
        )


def check_loaded(uri: str) -> Reader | None:
    """Of a folder here all but its weights is read, of one in a store what is quick to read.

    What of it reads prompts, where that can be asked here. Raises `StepError`.
    """
    folder = local_path(uri)
    try:
        if folder is not None:
            check_model_folder(folder)
            reader = check_loadable(folder)
        elif store.exists(store.join(uri, "config.json")):
            with TemporaryDirectory() as copy:
                small_files(uri, Path(copy))
                reader = check_loadable(copy, named=uri, has_weights=False)
        else:
            reader = None  # an adapter: its base may lie anywhere
    except ModelFolderError as error:
        raise StepError(f"spec.weak.model: {error}.") from error
    if reader is None:
        check_ids(uri)
    return reader


if __name__ == "__main__":
    run(main)
