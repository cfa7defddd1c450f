"""Whether transformers can load a model folder: by its small files and the headers of its weights, no weight is read.

`cowest validate`, `plan`, `run` and `propose` and the `check` step ask before anything is paid; `generate.load_model`
says in the same words what it meets. What cannot be told beforehand (quantised weights, another layout) is let pass.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cowest_serving.model_files import (
    ModelFolderError,
    base_of_adapter,
    has_tokenizer,
    is_adapter,
    read_json,
    refuse_ids_beyond,
)

PACKAGES = ("torch", "transformers", "accelerate")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Reader:
    """What of a model reads prompts."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    context: int | None  # tokens of prompt and draft together; None without a limit


def can_be_asked() -> bool:
    """Whether what loads models is installed here."""
    return all(importlib.util.find_spec(package) for package in PACKAGES)


def check_loadable(folder: str | Path, *, named: str = "", has_weights: bool = True) -> Reader | None:
    """Raises `ModelFolderError` where loading would fail; None where it cannot be asked here.

    `named`: what a person calls the folder. `has_weights`: False for a copy of the small files alone.
    """
    if not can_be_asked():
        return None
    folder = Path(folder)
    base = base_of_adapter(folder) if is_adapter(folder) else folder
    with _silent():
        try:
            return _check(folder, base, has_weights)
        except ModelFolderError as error:
            raise ModelFolderError(str(error).replace(str(folder), named or str(folder))) from error


def _check(folder: Path, base: Path, has_weights: bool) -> Reader:
    from transformers import AutoConfig, AutoTokenizer

    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        config, kind = _causal_lm(AutoConfig.from_pretrained(base, **safe), base)
        text = config.get_text_config()
    except ModelFolderError:
        raise
    except Exception as error:  # whatever the library makes of a broken folder
        raise unloadable(base, error) from error
    tokenizer_folder = folder if has_tokenizer(folder) else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **safe)
    except Exception as error:
        raise _unreadable_tokenizer(tokenizer_folder, error) from error
    is_plain = has_weights and getattr(config, "quantization_config", None) is None
    known = (_check_weights(base, config, kind) if is_plain else None) or getattr(text, "vocab_size", None)
    if known:
        refuse_ids_beyond(folder, tokenizer.get_vocab(), known)
    return Reader(tokenizer, getattr(text, "max_position_embeddings", None))


def _causal_lm(config: Any, base: Path) -> tuple[Any, Any]:
    """Configuration and class that `AutoModelForCausalLM` takes. Raises `ModelFolderError` where it takes none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_causal_lm(base, config.model_type)
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kinds = list(found) if isinstance(found, list | tuple) else [found]
    named = getattr(config, "architectures", None) or ()
    kind = next((kind for name in named for kind in kinds if kind.__name__ == name), kinds[0])
    text = getattr(config, "sub_configs", {}).get("text_config")
    is_of_text = text is not None and getattr(kind, "config_class", None) == text
    return (config.get_text_config() if is_of_text else config), kind


def _check_weights(base: Path, config: Any, kind: Any) -> int | None:
    """Embeddings of the model. None where that cannot be told. Raises `ModelFolderError`.

    transformers itself loads tensors without content, so that tied weights, prefixes and conversions are as it has
    them.
    """
    import torch

    if (shapes := _shapes(base)) is None:
        return None
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (RuntimeError, ImportError, OSError):  # perhaps for the want of content: the load itself will say
        return None
    except Exception as error:  # as it was built
        raise unloadable(base, error) from error
    refuse_unfit(base, type(model).__name__, info)
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def _shapes(base: Path) -> dict[str, list[int]] | None:
    """Of the tensors in the files that transformers reads; None where it might read others."""
    if (base / WEIGHTS).is_file():
        files = {WEIGHTS}
    elif (base / INDEX).is_file():
        files = set(read_json(base / INDEX).get("weight_map", {}).values())
    elif "transformers_weights" in read_json(base / "config.json"):  # a name of its own
        return None
    else:
        seen = ", ".join(sorted(path.name for path in base.glob("*.safetensors"))[:3])
        raise ModelFolderError(
            f"{base}: wanted weights in {WEIGHTS}, or in parts that {INDEX} names, saw {seen}; rename the file, or save"
            " the model with `model.save_pretrained(folder)`"
        )
    return {
        name: tensor["shape"]
        for file in sorted(files)
        for name, tensor in header_of(base / file).items()
        if name != "__metadata__"
    }


def header_of(path: Path) -> dict[str, Any]:
    """The names, types, shapes and places of the tensors in a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return header


# ---------------------------------------------------------------- what is said
def refuse_unfit(base: Path, kind: str, info: Any) -> None:
    """By transformers' own account of a load: weights that are not there, or of other shapes, would be random."""
    if mismatched := sorted(info["mismatched_keys"], key=lambda found: str(found[0])):
        name, seen, wanted = mismatched[0]
        raise ModelFolderError(
            f"{base}: wanted weights of the shapes that its config.json gives a {kind}, saw {len(mismatched)} of other"
            f" shapes ({name}: {list(seen)} in the weights, {list(wanted)} by config.json{_more(mismatched)});"
            " take the config.json that was saved with these weights, or save the whole model again"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelFolderError(
            f"{base}: wanted all weights of {kind}, saw {len(missing)} missing ({missing[0]}{_more(missing)}), which"
            " would be random; take the config.json that was saved with these weights (model_type, num_hidden_layers,"
            " tie_word_embeddings), or save the whole model again"
        )


def _more(found: Collection[object]) -> str:
    return ", ..." if len(found) > 1 else ""


def unloadable(folder: Path, error: Exception) -> ModelFolderError:
    """In one sentence what transformers says in a paragraph."""
    said = " ".join(str(error).split())
    wanted = f"{folder}: wanted a causal LM that transformers {metadata.version('transformers')} can load, saw"
    if "trust_remote_code" in said or "contains custom code" in said:
        return ModelFolderError(
            f"{wanted} one that needs code of its own (auto_map), which is never run; choose another model"
        )
    kind = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if "does not recognize this architecture" in said:
        return ModelFolderError(
            f"{wanted} the unknown architecture {kind} (model_type in config.json); choose another model"
        )
    if "Unrecognized configuration class" in said:
        return _no_causal_lm(folder, kind)
    return ModelFolderError(
        f"{wanted} {type(error).__name__}: {said[:300].rstrip('.')}. Look at its config.json, or save the model again"
    )


def _no_causal_lm(folder: Path, kind: object) -> ModelFolderError:
    return ModelFolderError(
        f"{folder}: wanted a causal LM that transformers {metadata.version('transformers')} can load, saw the"
        f" architecture {kind} (model_type in config.json), which is none; choose another model"
    )


def _unreadable_tokenizer(folder: Path, error: Exception) -> ModelFolderError:
    said = " ".join(str(error).split())
    return ModelFolderError(
        f"{folder}: wanted a tokenizer that transformers {metadata.version('transformers')} can load, saw"
        f" {type(error).__name__}: {said[:300].rstrip('.')}. Save it again with `tokenizer.save_pretrained(folder)`"
    )


@contextmanager
def _silent() -> Iterator[None]:
    """No report of the library between our own lines: what counts of it is said."""
    from transformers.utils import logging

    from cowest_serving.generate import quiet_transformers

    before = logging.get_verbosity()
    quiet_transformers()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
