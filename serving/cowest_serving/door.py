"""The strong model as live answers ask it: the pair's own endpoint, and while that fails its fallbacks in order.

Only the gateway comes through here. What a fallback answers is no answer of the pair: its record says `fell_back`, and
neither gate nor training goes by it. Steps and the proxy ask the pair's own endpoint, or wait.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from cowest_serving.contract import Messages
from cowest_serving.health import Guarded
from cowest_serving.models import ChatResult, ModelError, Unauthorized

log = logging.getLogger(__name__)
FellBack = Callable[[ModelError], None]  # told why the pair's own endpoint did not answer, once another one does


class StrongDoor:
    """Raises the error of the pair's own endpoint when no fallback answers either."""

    def __init__(self, models: Sequence[Guarded]) -> None:
        self.own, *self._fallbacks = models

    async def __call__(self, messages: Messages, *, fell_back: FellBack, **options: Any) -> ChatResult:
        try:
            return await self.own(messages, **options)
        except ModelError as error:
            why = self._why(error)
        for model in self._fallbacks:
            try:
                result = await model(messages, **options)
            except ModelError as error:
                _note(model, error)
                continue
            fell_back(why)
            return result
        raise why

    async def stream(self, messages: Messages, *, fell_back: FellBack, **options: Any) -> AsyncGenerator[bytes, None]:
        """Another endpoint is asked only until the first chunk: text has gone out then."""
        why: ModelError | None = None
        for model in (self.own, *self._fallbacks):
            has_begun = False
            try:
                async with aclosing(model.stream(messages, **options)) as chunks:
                    async for chunk in chunks:
                        if not has_begun and why is not None:
                            fell_back(why)
                        has_begun = True
                        yield chunk
                return
            except ModelError as error:
                if has_begun:
                    raise
                if why is None:
                    why = self._why(error)
                else:
                    _note(model, error)
        assert why is not None
        raise why

    def _why(self, error: ModelError) -> ModelError:
        """The fault that another endpoint may mend; any other one is raised."""
        if not self._fallbacks or not (error.retryable or isinstance(error, Unauthorized)):
            raise error
        return error

    async def aclose(self) -> None:
        for model in (self.own, *self._fallbacks):
            await model.aclose()


def _note(model: Guarded, error: ModelError) -> None:
    # Not the message: it may quote content.
    log.warning("The fallback %s (%s) failed too: %s", model.endpoint, model.model, type(error).__name__)
