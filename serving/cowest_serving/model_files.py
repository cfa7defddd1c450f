"""Model folders: where they come from, whether they may be loaded, and the digest that names them. Needs no torch.

A model folder is what `save_pretrained` writes: a causal LM, or a LoRA adapter (`adapter_config.json`) with its base.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from cowest_serving import store
from cowest_serving.contract import digest_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken",
)  # fmt: skip
_CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json")
# What decides the output: everything else in the folder (cards, logs, optimizer states) does not count.
_DIGESTED = (*_CONFIGURATIONS, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
CARD = "README.md"  # no part of the digest, but it says the licence
_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# What trainers leave behind and nothing ever loads.
_LEFTOVERS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")


class ModelFolderError(ValueError):
    """A folder cannot be served or tuned: what was wanted, what was seen, what to change."""


# ---------------------------------------------------------------- check
def check_model_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be loaded, or only by running somebody's code. An adapter's base is checked too."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"wanted a model folder at {folder}, saw {'a file' if folder.exists() else 'nothing'}")
    parts = [folder, base_of_adapter(folder)] if is_adapter(folder) else [folder]
    for part in parts:
        _refuse_pickles(part)
        _check_safetensors(part)
    if not (parts[-1] / "config.json").is_file():
        raise ModelFolderError(
            f"{parts[-1]}: wanted config.json (or adapter_config.json), saw none; "
            "name the folder that `model.save_pretrained` wrote"
        )
    read_json(parts[-1] / "config.json")
    if not any(has_tokenizer(part) for part in parts):
        raise ModelFolderError(
            f"{folder}: wanted a tokenizer ({', '.join(_VOCABULARIES[:4])}), saw none; "
            "save it beside the weights with `tokenizer.save_pretrained(folder)`"
        )


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def has_tokenizer(folder: Path) -> bool:
    """An adapter may bring its own or leave it to its base."""
    return bool(_matching(folder, _VOCABULARIES))


def refuse_ids_beyond(folder: object, vocabulary: Mapping[str, int], known: int) -> None:
    """Tokens whose ids are not among the `known` embeddings of the model: the first text with one would break it."""
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= known)
    if not beyond:
        return
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:5])
    more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
    raise ModelFolderError(
        f"{folder}: wanted embeddings for all ids of the tokenizer, saw {known} for ids up to {beyond[-1][0]}."
        f" Too many: {named}{more}. Take them out of the tokenizer's files, or save the model after"
        " `resize_token_embeddings`. What is in none of these files transformers adds as it loads them, for a role that"
        " no token has: name one of the others for it (unk_token, pad_token, ...) in tokenizer_config.json"
    )


def _refuse_pickles(folder: Path) -> None:
    pickles = [name for name in _matching(folder, _PICKLES) if not any(fnmatch(name, left) for left in _LEFTOVERS)]
    if pickles:
        raise ModelFolderError(
            f"{folder}: wanted weights as safetensors only, saw the pickle file {pickles[0]}, which can run code when "
            "loaded; convert it with `model.save_pretrained(folder)` where you trust it, then delete it here"
        )


def _check_safetensors(folder: Path) -> None:
    files = _matching(folder, ("*.safetensors",))
    if not files:
        raise ModelFolderError(
            f"{folder}: wanted weights as *.safetensors, saw none; save them with `model.save_pretrained(folder)`"
        )
    for name in files:
        _check_length(folder / name)
    for index in _matching(folder, ("*.safetensors.index.json",)):
        missing = set(read_json(folder / index).get("weight_map", {}).values()) - set(files)
        if missing:
            raise ModelFolderError(f"{folder}: {index} wants {min(missing)}, saw no such file; copy the folder again")


def _check_length(path: Path) -> None:
    """A copy that was cut short is found by the header, before anything is loaded."""
    size = path.stat().st_size
    if not size:
        raise ModelFolderError(f"{path}: wanted a safetensors file, saw an empty one; copy or save it again")
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ModelFolderError(
                    f"{path}: wanted the weights, saw a Git LFS pointer that only names them; run `git lfs pull` in"
                    " that repository, or download the file itself"
                )
            file.seek(0)
            (header_size,) = struct.unpack("<Q", file.read(8))
            header: Mapping[str, Any] = json.loads(file.read(header_size)) if header_size < size else {}
    except ModelFolderError:
        raise
    except (struct.error, ValueError, OSError) as error:
        raise ModelFolderError(f"{path}: wanted a safetensors file, saw: {error}; copy or save it again") from error
    ends = (item["data_offsets"][1] for name, item in header.items() if name != "__metadata__")
    wanted = 8 + header_size + max(ends, default=0)
    if size != wanted:
        raise ModelFolderError(f"{path}: wanted {wanted} bytes, saw {size}; the copy was cut short, make it again")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: wanted JSON, saw: {error}; save the model again") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: wanted a JSON object, saw {type(value).__name__}; save the model again")
    return value


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


# ---------------------------------------------------------------- digest
def model_digest(folder: str | Path) -> str:
    """`sha256:...` of all that decides what the model writes: configuration, weights, tokenizer, chat template.

    Of an adapter also its base, by content: where the base lies does not count.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"wanted a model folder at {folder}, saw none")
    files = {name: _file_digest(folder / name) for name in _matching(folder, _DIGESTED)}
    if not is_adapter(folder):
        return digest_of(files)
    adapter = {**read_json(folder / "adapter_config.json"), "base_model_name_or_path": None}
    return digest_of({**files, "adapter_config.json": adapter, "base": model_digest(base_of_adapter(folder))})


def _file_digest(path: Path) -> str:
    """Those of large files are remembered: the digest of a model is asked for several times in a step."""
    seen = path.stat()
    read = _digest_at if seen.st_size > 1 << 22 else _digest_at.__wrapped__
    return read(path.resolve(), seen.st_ino, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_at(path: Path, _inode: int, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- where models come from
def resolve_model(uri: str | Path) -> Path:
    """The local folder of a model at `file://...`, a path, `s3://...` or `hf://org/name[@revision]`.

    S3 and Hub models are kept in a cache (COWEST_CACHE, default ~/.cache/cowest); an S3 folder that changed is fetched
    again. Raises `ModelFolderError`, or `StoreError` when a later try may succeed.
    """
    uri = str(uri)
    if uri.startswith("hf://"):
        return _from_hub(uri)
    if uri.startswith("s3://"):
        return _from_s3(uri)
    try:
        return store.download(uri, _cache()).absolute()
    except store.StoreError as error:
        raise ModelFolderError(f"wanted a model folder at {uri}: {error}") from error


def base_of_adapter(folder: str | Path) -> Path:
    """The folder of the model that an adapter goes on: a path (also relative to the adapter), a URI or a Hub name."""
    folder = Path(folder)
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    if not name:
        raise ModelFolderError(
            f"{folder}/adapter_config.json: wanted base_model_name_or_path, saw none; name the adapter's base model"
        )
    if (folder / name).is_dir():  # relative to the adapter, or absolute
        base = folder / name
    elif "://" in name:
        base = resolve_model(name)
    elif name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists():
        base = resolve_model(f"hf://{name}")
    else:
        base = Path(name)
    if not base.is_dir() or is_adapter(base):
        seen = "another adapter" if base.is_dir() else "nothing there"
        raise ModelFolderError(f"{folder}: wanted its base model at {name}, saw {seen}; merge the adapter into a base")
    return base


def _cache() -> Path:
    return Path(os.environ.get("COWEST_CACHE") or Path.home() / ".cache" / "cowest")


def _from_s3(uri: str) -> Path:
    target = _cache() / "models" / store.fingerprint(uri)
    if target.is_dir():
        return target
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        store.download(uri, part)
        part.rename(target)
    except OSError as error:
        if not target.is_dir():  # otherwise another process was faster
            raise ModelFolderError(f"wanted to keep {uri} at {target}, saw: {error}; set COWEST_CACHE") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _from_hub(uri: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*_DIGESTED, CARD]))
    except GatedRepoError as error:
        raise ModelFolderError(f"{uri}: the Hub wants its terms accepted; accept them and set HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelFolderError(
            f"{uri}: wanted hf://org/name[@revision], the Hub knows none such; check it, or set HF_TOKEN"
        ) from error
    except Exception as error:  # whatever HTTP library the Hub client uses, and its own offline errors
        message = f"{uri}: wanted to fetch the model from the Hub, saw {type(error).__name__}: {str(error)[:300]}; "
        raise store.StoreError(message + "check the network (HF_ENDPOINT) and run it again", retryable=True) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelFolderError(
            f"{uri}: wanted weights as *.safetensors, the Hub has none of it; name a revision that has, or load it "
            "where you trust it, save it with `model.save_pretrained(folder)` and give that folder"
        )
    return folder


# ---------------------------------------------------------------- permissions
def make_readable(folder: str | Path) -> None:
    """`save_pretrained` writes weights that only their owner can read: no good on a volume that pods share."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
