"""A weak model as a folder, before anything is loaded: whether it may be loaded, its tokenizer files, its licence.

Apart from `tuning`, because a step that loads no model must not wait for torch, transformers and PEFT.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cowest_serving.model_files import (
    CARD,
    TOKENIZER_FILES,
    base_of_adapter,
    check_model_folder,
    has_tokenizer,
    resolve_model,
)
from cowest_training.cards import UNKNOWN_LICENSE, license_of


def weak_folder(uri: str) -> Path:
    """The model at `uri` as a folder that may be loaded: no pickles, nothing missing. Raises `ModelFolderError`."""
    folder = resolve_model(uri)
    check_model_folder(folder)
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """Where a model's tokenizer lies: an adapter may leave it to its base."""
    return folder if has_tokenizer(folder) else base_of_adapter(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Byte for byte: a tokenizer that was saved again may be spelled so that older versions cannot read it."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                place = target / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


def inherited_license(folder: Path) -> str:
    """What the base model's own card says."""
    card = folder / CARD
    return license_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else UNKNOWN_LICENSE
