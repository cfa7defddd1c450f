"""Which queries need no draft, and which no strong model: a small model of the words of a query. Pure, no numpy.

The step `predictor` trains it on what drafts were worth (the gain ledger), `evaluate` measures what going by it costs
on the held-out queries, and the gateway goes by it where that is little enough
(spec.collaboration.shortcuts.strongAlone and weakAlone). Logistic regression over hashed words and pairs of words:
some 40 microseconds for a query of 50 words.

    strongAlone   chance that a draft helps the strong model; below the threshold it answers without one
    weakAlone     chance that the strong model's answer is better than the draft; below it the draft is the answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import orjson

from cowest_serving.contract import SettingsError

Route = Literal["strongAlone", "weakAlone"]
ROUTES: tuple[Route, ...] = ("weakAlone", "strongAlone")  # in this order: the first saves the call that is paid
FORM = 1  # raise it when `features` changes: old weights then mean nothing
BUCKETS = 4096
MOST_CHARACTERS, MOST_WORDS = 2000, 100  # of a query that are looked at: as many of its head as of its tail
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Head:
    """One question about a query. Only what is below the threshold is routed."""

    weights: Sequence[float]
    bias: float
    threshold: float

    def chance(self, found: Sequence[int]) -> float:
        total = self.bias + math.fsum(map(self.weights.__getitem__, found)) * scale(found)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))

    def routes(self, found: Sequence[int]) -> bool:
        return self.chance(found) < self.threshold


@dataclass(frozen=True)
class Predictor:
    """Its heads by the shortcut that they decide. One that nothing was learnt for is not there."""

    heads: Mapping[str, Head]

    def route(self, query: str, among: Sequence[str] = ROUTES) -> Route | None:
        """The shortcut that this query may take, of those that may be taken."""
        found = features(query)
        for name in ROUTES:
            if name in among and name in self.heads and self.heads[name].routes(found):
                return name
        return None


def features(query: str) -> tuple[int, ...]:
    """The buckets of its words and pairs of words, each once."""
    half = MOST_CHARACTERS // 2
    text = query if len(query) <= MOST_CHARACTERS else f"{query[:half]} {query[-half:]}"
    words = [word.encode() for word in _WORD.findall(text.casefold())]
    if len(words) > MOST_WORDS:
        words = words[: MOST_WORDS // 2] + words[-MOST_WORDS // 2 :]
    found: set[int] = set()
    before = 0
    for word in words:
        found.add(crc32(word) % BUCKETS)
        found.add(crc32(word, before) % BUCKETS)
        before = crc32(b" ", crc32(word))
    return tuple(found)


def scale(found: Sequence[int]) -> float:
    """Of what a query's buckets say together: a long one says no more than a short one."""
    return 1 / math.sqrt(len(found)) if found else 0.0


def dump_predictor(predictor: Predictor) -> bytes:
    heads = {
        name: {"weights": [float(f"{w:.5g}") for w in head.weights], "bias": head.bias, "threshold": head.threshold}
        for name, head in predictor.heads.items()
    }
    return orjson.dumps({"form": FORM, "buckets": BUCKETS, "heads": heads})


def load_predictor(data: bytes) -> Predictor:
    """Raises `SettingsError`."""
    try:
        value = orjson.loads(data)
        if (value["form"], value["buckets"]) != (FORM, BUCKETS):
            raise SettingsError(
                f"predictor: wanted form {FORM} with {BUCKETS} buckets, saw {value['form']} with {value['buckets']}"
            )
        return Predictor({name: _head(head) for name, head in value["heads"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"predictor: wanted the heads of a predictor, saw: {error}") from None


def _head(value: Mapping[str, Any]) -> Head:
    weights = [float(weight) for weight in value["weights"]]
    if len(weights) != BUCKETS:
        raise ValueError(f"{len(weights)} weights")
    return Head(weights, float(value["bias"]), float(value["threshold"]))
