"""Whether a tokenizer keeps what it reads, and the model has an embedding for each of its ids.

One of another language, or without a vocabulary, turns text into nothing: such a model is tuned, served and judged
without an error, and never drafts anything of use. One with more ids than embeddings is refused once it is loaded.
Asked before anything runs (`cowest validate`, the `check` step), and by steps of whatever tokenizer they have loaded.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cowest_serving import store
from cowest_serving.contract import message_text
from cowest_serving.model_files import TOKENIZER_FILES, ModelFolderError, refuse_ids_beyond
from cowest_training.contract import Row, StepError

CONFIGURATIONS = ("config.json", "adapter_config.json")
SAMPLE = 200  # rows that are looked at, spread over all
CHARACTERS = 2000  # of each text
MAX_LOST = 0.5  # of the characters of one text
SPARE = 64  # ids: more than transformers ever gives by itself, to roles that no token has
MAX_ROWS = 0.1  # of the rows: a few in another script are no fault of the model

RoundTrip = Callable[[str], str]  # text -> what is left of it after encoding and decoding


def check_tokenizer(uri: str, rows: Sequence[Row]) -> None:
    """Of a model here or in a store, where its tokenizer is the one file that is quick to read. Raises `StepError`.

    Another is looked at by the step that loads it.
    """
    file = store.join(uri, "tokenizer.json")
    if store.exists(file) and (there_and_back := round_trip_of(store.get(file).decode(errors="replace"))):
        refuse_lost_text(rows, there_and_back, uri)


def length_notes(uri: str, rows: Sequence[Row], max_length: int, draft_max_tokens: int) -> list[str]:
    """How many explained rows `sft` leaves out, and how many drafts are longer than one may become when it serves."""
    file = store.join(uri, "tokenizer.json")
    count = token_counter_of(store.get(file).decode(errors="replace")) if store.exists(file) else None
    explained = [(row, row.explanation) for row in rows if row.explanation]
    if count is None or not explained:
        return []
    drafts = [count(text) for _, text in explained]
    whole = [
        draft + sum(count(message_text(m)) for m in row.messages)
        for (row, _), draft in zip(explained, drafts, strict=True)
    ]
    left_out, cut = sum(n > max_length for n in whole), sum(n > draft_max_tokens for n in drafts)
    found = []
    if left_out:
        found.append(
            f"at least {left_out} of {len(explained)} rows with an explanation are longer than training.maxLength ="
            f" {max_length} tokens (the longest has {max(whole)}, without the prompt's own words): sft leaves them out."
        )
    if cut:
        found.append(
            f"{cut} of {len(explained)} explanations are longer than collaboration.draftMaxTokens = {draft_max_tokens}"
            f" tokens (the longest has {max(drafts)}): drafts like them are cut off there when they are made."
        )
    return found


def token_counter_of(tokenizer_json: str) -> Callable[[str], int] | None:
    """By the `tokenizer.json` of a model; None where it cannot be read here."""
    tokenizer = _tokenizer(tokenizer_json)
    if tokenizer is None:
        return None
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def check_ids(uri: str) -> None:
    """Of a model here or in a store, by the files that are quick to read. Raises `StepError`.

    An adapter, and what has no `tokenizer.json`, is looked at by the step that loads it.
    """
    vocabulary, known = _vocabulary(uri), _embeddings(uri)
    if not vocabulary or known is None or known - max(vocabulary.values()) > SPARE:
        return  # transformers is not waited for where all that it may add has room
    try:
        refuse_ids_beyond(uri, vocabulary, known)
        refuse_ids_beyond(uri, _as_loaded(uri), known)
    except ModelFolderError as error:
        raise StepError(f"weak model {error}.") from error


def _vocabulary(uri: str) -> dict[str, int]:
    """By `tokenizer.json`; empty where it cannot be read here."""
    file = store.join(uri, "tokenizer.json")
    tokenizer = _tokenizer(store.get(file).decode(errors="replace")) if store.exists(file) else None
    return dict(tokenizer.get_vocab(with_added_tokens=True)) if tokenizer else {}


def _embeddings(uri: str) -> int | None:
    """How many the model has: transformers makes as many as `config.json` says."""
    return _number(uri, "vocab_size")


def context_of(uri: str) -> int | None:
    """Tokens of prompt and draft together, by `config.json`; None where it does not say."""
    return _number(uri, "max_position_embeddings", "n_positions")  # the second in files of GPT-2 and its kin


def small_files(uri: str, folder: Path) -> None:
    """Copy configuration and tokenizer of a model in a store: all of it that is quick to read."""
    root = uri.rstrip("/") + "/"
    for file in store.list_files(uri):
        name = file.removeprefix(root)
        if name in CONFIGURATIONS or any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(file))


def _number(uri: str, *names: str) -> int | None:
    """The first of these that `config.json` has; None where it cannot be read here: the step that loads it says why."""
    file = store.join(uri, "config.json")
    try:
        config = json.loads(store.get(file)) if store.exists(file) else {}
        text = config.get("text_config") or config
        return next((int(text[name]) for name in names if text.get(name) is not None), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_loaded(uri: str) -> dict[str, int]:
    """With the tokens that transformers gives it by the kind of model; empty where it cannot be loaded here."""
    try:
        from transformers import AutoTokenizer

        from cowest_serving.generate import quiet_transformers
    except ImportError:
        return {}
    quiet_transformers()
    with TemporaryDirectory() as folder:
        small_files(uri, Path(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception:  # whatever the library makes of a broken folder: the step that loads it says what
            return {}
        return dict(tokenizer.get_vocab())


def refuse_lost_text(rows: Sequence[Row], there_and_back: RoundTrip, model: str) -> None:
    """Raises `StepError` where too many rows come back without most of their characters."""
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    pairs = [(row, text, there_and_back(text)) for row in sample if (text := _text(row)).strip()]
    losing = [(row, text, back) for row, text, back in pairs if lost(text, back) > MAX_LOST]
    if len(losing) <= MAX_ROWS * len(pairs):
        return
    row, text, back = losing[0]
    raise StepError(
        f"weak model {model}: wanted a tokenizer that keeps the text of the training rows, saw one that loses most"
        f" characters of {len(losing)} of {len(pairs)} rows: {text[:60]!r} ({row.where or 'row ' + row.id}) comes back"
        f" as {back[:60]!r}. Name a model that was made for the language and script of your data, or correct its"
        " tokenizer files."
    )


def lost(text: str, back: str) -> float:
    """Share of the characters that did not come back. Case, accents and white space do not count."""
    before, after = _characters(text), _characters(back)
    return (before - after).total() / max(1, before.total())


def round_trip_of(tokenizer_json: str) -> RoundTrip | None:
    """By the `tokenizer.json` of a model; None where it cannot be read here, which is for the step that loads it."""
    tokenizer = _tokenizer(tokenizer_json)
    if tokenizer is None:
        return None

    def there_and_back(text: str) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return there_and_back


def _tokenizer(tokenizer_json: str) -> Any:
    """`tokenizers.Tokenizer`, or None where it cannot be read here."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception:  # the library has no other; it may also be of a newer version
        return None


def _text(row: Row) -> str:
    return " ".join([*(message_text(m) for m in row.messages), row.explanation or ""])[:CHARACTERS]


def _characters(text: str) -> Counter[str]:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(c for c in plain if not c.isspace() and not unicodedata.combining(c))
