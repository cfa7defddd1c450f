"""Whether a tokenizer keeps what it reads: one of another language, or without a vocabulary, turns text into nothing.

Such a model is tuned, served and judged without an error, and never drafts anything of use. Asked before anything runs
(`cowest validate`, the `check` step), and by `sft` of whatever tokenizer it has loaded.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from cowest_serving import store
from cowest_serving.contract import message_text
from cowest_training.contract import Row, StepError

SAMPLE = 200  # rows that are looked at, spread over all
CHARACTERS = 2000  # of each text
MAX_LOST = 0.5  # of the characters of one text
MAX_ROWS = 0.1  # of the rows: a few in another script are no fault of the model

RoundTrip = Callable[[str], str]  # text -> what is left of it after encoding and decoding


def check_tokenizer(uri: str, rows: Sequence[Row]) -> None:
    """Of a model here or in a store, where its tokenizer is the one file that is quick to read. Raises `StepError`.

    Another is looked at by the step that loads it.
    """
    file = store.join(uri, "tokenizer.json")
    if store.exists(file) and (there_and_back := round_trip_of(store.get(file).decode(errors="replace"))):
        refuse_lost_text(rows, there_and_back, uri)


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
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception:  # the library has no other; it may also be of a newer version
        return None

    def there_and_back(text: str) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return there_and_back


def _text(row: Row) -> str:
    return " ".join([*(message_text(m) for m in row.messages), row.explanation or ""])[:CHARACTERS]


def _characters(text: str) -> Counter[str]:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(c for c in plain if not c.isspace() and not unicodedata.combining(c))
