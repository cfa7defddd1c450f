"""Import any model as a candidate: checked, adapters merged, copied to where the job keeps its models, with a card.

    python -m cowest_training.publish --model hf://org/name@rev --models s3://b/j/models
    {"digest": "sha256:...", "uri": "s3://b/j/models/<digest>"}

`--models ROOT` appends the digest; `--out URI` names the very place. The JSON goes to stdout.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_serving import store
from cowest_serving.loadable import check_loadable
from cowest_serving.model_files import CARD, check_model_folder, is_adapter, model_digest
from cowest_training.cards import ModelCard, model_card
from cowest_training.contract import EXIT_OK, Manifest
from cowest_training.steps import Progress, code_version, open_output, parser, run
from cowest_training.weak_folders import copy_tokenizer, inherited_license, tokenizer_folder, weak_folder

# What a published folder holds besides the tokenizer. Everything else (code, logs, optimizer states) stays behind.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    progress = Progress(args.progress, "publish")
    source = weak_folder(args.model)
    check_loadable(source, named=args.model)  # before it is copied, and before anything is paid for its drafts
    progress.update(1, 3, "stages", "checked")
    with tempfile.TemporaryDirectory(prefix="cowest-publish-") as scratch:
        whole = self_contained(source, Path(scratch))
        digest = model_digest(whole)
        progress.update(2, 3, "stages", "adapters merged" if whole != source else "whole already")
        uri = args.out or store.join(args.models, digest.removeprefix("sha256:"))
        publish(whole, source, uri, base=args.model, base_digest=model_digest(source))
    progress.update(3, 3, "stages", f"published {digest}")
    sys.stdout.write(json.dumps({"digest": digest, "uri": uri}) + "\n")
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> Any:
    flags = parser(__doc__, needs_job=False)
    for action in flags._actions:  # --models stands in for it
        if action.dest == "out":
            action.required = False
    flags.add_argument("--model", required=True, metavar="URI", help="the model to import: file://, s3:// or hf://")
    flags.add_argument("--models", metavar="URI", help="root of the job's models: the output is ROOT/<digest>")
    args = flags.parse_args(argv)
    if (args.out is None) == (args.models is None):
        flags.error("wanted one of --out and --models")
    return args


def self_contained(source: Path, scratch: Path) -> Path:
    """`source` itself, or for an adapter a folder below `scratch` where it is merged into its base."""
    if not is_adapter(source):
        return source
    from cowest_training import tuning  # takes ten seconds to import, which a whole model need not wait for

    merged = scratch / "merged"
    tuning.quiet()
    model = tuning.load_merged(source, "auto")
    tuning.save_model(model, source, merged)
    copy_tokenizer(tokenizer_folder(source), merged)
    check_model_folder(merged)
    return merged


def publish(whole: Path, source: Path, uri: str, *, base: str, base_digest: str) -> Manifest:
    """Copy the files of a whole model to `uri`, with a card; nothing to do when they are there already."""
    digest = model_digest(whole)
    output = open_output(uri, step="publish", inputs={"model": digest})
    if isinstance(output, Manifest):
        return output
    copy_model(whole, output.folder)
    card = ModelCard(
        step="publish",
        digest=digest,
        base=base,
        base_digest=base_digest,
        license=inherited_license(source),
        version=code_version(),
    )
    (output.folder / CARD).write_text(_card(card, whole), encoding="utf-8")
    return output.finish(kind="Model", metrics=_size(output.folder), digest=digest)


def copy_model(source: Path, target: Path) -> None:
    for pattern in MODEL_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)  # not copy2: the mode may be too narrow for other users
    copy_tokenizer(source, target)


def _card(card: ModelCard, source: Path) -> str:
    """Our card, then the one that the model brought along."""
    own = source / CARD
    if not own.is_file():
        return model_card(card)
    text = own.read_text(encoding="utf-8", errors="replace")
    return f"{model_card(card)}\n---\n\n## The card that came with it\n\n{text}"


def _size(folder: Path) -> Mapping[str, int]:
    return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


if __name__ == "__main__":
    run(main)
