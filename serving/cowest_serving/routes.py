"""Which request asks one of the two models alone: spec.collaboration.shortcuts.strongAlone and weakAlone.

Of what the predictor would route, `explorePercent` goes the usual way all the same. The record keeps the chance with
which its way was taken (`propensity`), so that what is seen of the usual way can be reckoned for all queries.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cowest_serving import store
from cowest_serving.contract import Mode, PredictorRef, SettingsError, Shortcuts, digest_of
from cowest_serving.predictor import Predictor, Route, load_predictor

log = logging.getLogger(__name__)
AGAIN_SECONDS = 30.0  # after a predictor could not be read
MODES: Mapping[Route, Mode] = {"weakAlone": "WeakAlone", "strongAlone": "StrongAlone"}
# A draft can do without these; whoever asks for a form, several answers or a limit gets the strong model's answer.
WITHOUT_STRONG = frozenset(
    {
        *("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"),
        *("metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    }
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # other parameters that ask for nothing with one of these values
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),  # says something of tools alone
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}


@dataclass(frozen=True)
class Way:
    """How a request is answered. `found`: the shortcut that it could take, taken or not."""

    found: Route | None = None
    taken: Route | None = None
    propensity: float = 1.0


USUAL = Way()


class Routes:
    """For one process. Until its predictor is there every request goes the usual way."""

    def __init__(
        self,
        shortcuts: Shortcuts,
        draw: Callable[[], float] = random.random,
        read: Callable[[str], bytes] = store.get,
    ) -> None:
        self._explore = {name: limits.explore_percent / 100 for name, limits in shortcuts.routed.items()}
        self._draw, self._read = draw, read
        self._loaded: dict[str, Predictor] = {}  # by digest
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}

    def way(self, ref: PredictorRef | None, query: str, parameters: Mapping[str, Any]) -> Way:
        predictor = self._predictor(ref) if ref else None
        if ref is None or predictor is None:
            return USUAL
        among = [name for name in ref.shortcuts if name in self._explore and _may(name, parameters)]
        found = predictor.route(query, among) if among else None
        if found is None:
            return USUAL
        explored = self._explore[found]
        if self._draw() < explored:
            return Way(found, None, explored)
        return Way(found, found, 1 - explored)

    def _predictor(self, ref: PredictorRef) -> Predictor | None:
        """The one that holds. It is read beside the requests, not before one."""
        found = self._loaded.get(ref.digest)
        is_due = time.monotonic() >= self._not_before.get(ref.digest, 0.0)
        if found is None and is_due and ref.digest not in self._loading:
            self._loading[ref.digest] = asyncio.create_task(self.load(ref))
        return found

    async def load(self, ref: PredictorRef) -> None:
        try:
            data = await asyncio.to_thread(self._read, ref.uri)
            if (digest := digest_of(data)) != ref.digest:
                raise SettingsError(f"{ref.uri}: wanted the predictor {ref.digest}, saw {digest}")
            self._loaded = {ref.digest: load_predictor(data)}
        except (store.StoreError, SettingsError) as error:
            log.warning("%s; every request goes the usual way, and it is read again in %.0f s.", error, AGAIN_SECONDS)
            self._not_before = {ref.digest: time.monotonic() + AGAIN_SECONDS}
        finally:
            self._loading.pop(ref.digest, None)


def _may(name: str, parameters: Mapping[str, Any]) -> bool:
    return name != "weakAlone" or is_for_a_draft(parameters)


def is_for_a_draft(parameters: Mapping[str, Any]) -> bool:
    """Whether a draft may be the answer to a request with these parameters."""
    return all(
        name in WITHOUT_STRONG or value is None or value in _NEUTRAL.get(name, ()) for name, value in parameters.items()
    )
