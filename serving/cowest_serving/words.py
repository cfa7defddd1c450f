"""What users say of answers: `POST /v1/feedback`, from a request to the row that is kept, and from rows to what counts.

Pure but for `Repeats`. A word is kept whatever it is of: the record of its answer may still be on its way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from cowest_serving.answering import Refusal, bad_field, optional, own_key, parse_object, user_hash
from cowest_serving.contract import KEY_MARK, reference_text
from cowest_serving.ids import new_id

TEXTS = ("reference", "correction", "accepted", "comment")  # columns with what users wrote
_THUMBS = {"up": 1.0, "down": 0.0}


def feedback_row(data: bytes, session: str | None, key: str | None = None) -> tuple[dict[str, Any], str]:
    """By FEEDBACK_COLUMNS, and the key of its record's placeholders, which is not stored; "" where none came.

    Raises `Refusal` 400 that names the field. `key`: the same makes the same word. A thumb is a score, and the
    corrected or the accepted text is a reference, where none is given itself.
    """
    body = parse_object(data)
    thumb = optional(body, "thumb", str, '"up" or "down"')
    if thumb is not None and thumb not in _THUMBS:
        raise bad_field("thumb", '"up" or "down"', thumb)
    score, reference = _score(body), _reference(body)
    said = {name: optional(body, name, str, "text") for name in ("correction", "accepted", "comment")}
    if score is None and thumb is None and not reference and not any(said.values()):
        wanted = "thumb, score, reference, correction, accepted and comment"
        raise Refusal(400, f"Wanted at least one of {wanted}, saw none.", code="no_feedback")
    trace_id, _, records_key = _request_id(body).partition(KEY_MARK)
    row = {
        "feedback_id": key or new_id(),
        "trace_id": trace_id,
        "time": datetime.now(UTC),
        "thumb": thumb,
        "score": _THUMBS.get(thumb or "") if score is None else score,
        "reference": reference or said["correction"] or said["accepted"] or None,
        **said,
        "source": user_hash(optional(body, "user", str, "text") or session),
    }
    return row, records_key


def _request_id(body: Mapping[str, Any]) -> str:
    given = body.get("request_id")
    if not isinstance(given, str) or not given.partition(KEY_MARK)[0].strip() or len(given) > 200:
        raise bad_field("request_id", "the x-request-id of an answer", given)
    return given.strip()


def _score(body: Mapping[str, Any]) -> float | None:
    score = body.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and 0 <= score <= 1):
        raise bad_field("score", "a number from 0 to 1", score)
    return None if score is None else float(score)


def _reference(body: Mapping[str, Any]) -> str:
    reference = reference_text(body.get("reference"))
    if reference is None:
        raise bad_field("reference", "text, a number or a list of texts, as in data files", body["reference"])
    return reference


# ---------------------------------------------------------------- the same word again
def word_key(given: str, client_key: str) -> str | None:
    """The id of a word that came with an Idempotency-Key: the same from every gateway, another for every client."""
    key = own_key(given, client_key)
    return hashlib.sha256(f"word\n{key}".encode()).hexdigest()[:32] if key else None


class Repeats:
    """The last words that came with an Idempotency-Key: a repeated request gets the same answer, and is not kept anew.

    What another gateway or an earlier process has kept has the same id, and readers count it once.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._seen: OrderedDict[str, tuple[bytes, bool]] = OrderedDict()  # id -> digest of its body, whether durable

    def again(self, key: str | None, data: bytes) -> bool | None:
        """Whether that word is durable; None: it is new. Raises `Refusal` 409 where the key was of another word."""
        if key is None or key not in self._seen:
            return None
        digest, is_durable = self._seen[key]
        if digest != hashlib.sha256(data).digest():
            message = "Idempotency-Key: this key came with another body before; take a new one for a new word."
            code = "idempotency_key_reused"
            raise Refusal(409, message, param="Idempotency-Key", code=code, is_in_vain=True)
        return is_durable

    def remember(self, key: str | None, data: bytes, is_durable: bool) -> None:
        if key is None:
            return
        self._seen[key] = hashlib.sha256(data).digest(), is_durable
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)


# ---------------------------------------------------------------- what counts
def counted(words: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each word once, oldest first: of those with the same id the first."""
    found: dict[Any, Mapping[str, Any]] = {}
    for number, word in enumerate(sorted(words, key=lambda word: (word["time"], word["feedback_id"] or ""))):
        found.setdefault(word["feedback_id"] or number, word)
    return list(found.values())


def scores_of(words: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Trace id -> its score: of each source the last one, and of several sources their mean."""
    latest: dict[str, dict[str, float]] = {}
    for word in words:
        if word["score"] is not None:
            latest.setdefault(word["trace_id"], {})[word["source"] or ""] = float(word["score"])
    return {trace_id: sum(said.values()) / len(said) for trace_id, said in latest.items()}
