"""Parameters that a model does not take: how its endpoint says so, and what is known of it for a while.

Some take no temperature, some only `max_completion_tokens`; some take no temperature beside `reasoning_effort`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

KNOWN_SECONDS = 600.0  # an endpoint may be changed, and one caller's mistake must not last
_OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_OPTIONAL = (
    *("temperature", "top_p", "seed", "logprobs", "top_logprobs", "stream_options"),
    *("presence_penalty", "frequency_penalty", *_OTHER_NAMES),
)
_WITH_CONDITIONS = ("reasoning_effort", "reasoning", "tools", "functions", "response_format")
# Never a value out of its range, which is its caller's fault and no other's.
_NOT_TAKEN = re.compile(
    "unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|deprecated|only the default",
    re.IGNORECASE,
)


def refused_parameter(status: int, error: Mapping[str, Any]) -> str:
    """The parameter that an error object says this model does not take, "" where it says something else."""
    said = f"{error.get('message')} {error.get('code')}"
    if status not in (400, 422) or not _NOT_TAKEN.search(said):
        return ""
    # Where none is named as `param`, the message may name others too: those that it would take instead.
    named = [str(error["param"])] if error.get("param") else re.findall(r"\w+", said)
    return next((name for name in named if name in _OPTIONAL), "")


def without(body: Mapping[str, Any], not_taken: Mapping[str, str]) -> dict[str, Any]:
    """`not_taken`: parameter -> its other name, "" where it has none."""
    sent = {name: value for name, value in body.items() if name not in not_taken}
    renamed = {other: body[name] for name, other in not_taken.items() if other and name in body}
    if "logprobs" in not_taken:
        sent.pop("top_logprobs", None)
    return {**renamed, **sent}


class NotTaken:
    """What one model has refused lately, whoever asked."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def known(self) -> dict[str, str]:
        """Parameter -> its other name, "" where it has none."""
        return {name: _OTHER_NAMES.get(name, "") for name, until in self._until.items() if self._clock() < until}

    def learn(self, name: str, body: Mapping[str, Any]) -> tuple[str, bool]:
        """Its other name, and whether this is news for all calls. What is refused beside a parameter that may be why
        is left out of this call alone; another name loses nobody anything."""
        other = _OTHER_NAMES.get(name, "")
        if not other and any(each in body for each in _WITH_CONDITIONS):
            return other, False
        is_news = name not in self._until
        self._until[name] = self._clock() + KNOWN_SECONDS
        return other, is_news
