"""The strong model as live answers ask it: the pair's own endpoint, and while that fails its fallbacks in order.

Only the gateway comes through here. What a fallback answers is no answer of the pair: its record says `fell_back`, and
neither gate nor training goes by it. Steps and the proxy ask the pair's own endpoint, or wait.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from cowest_serving.allowance import Allowance
from cowest_serving.contract import Messages
from cowest_serving.health import Guarded
from cowest_serving.models import ChatResult, ModelError, Unauthorized

log = logging.getLogger(__name__)
FellBack = Callable[[ModelError], None]  # told why the pair's own endpoint did not answer, once another one does


class StrongDoor:
    """Raises the error of the pair's own endpoint when no fallback answers either.

    `allowance`: what may be spent on live answers, whichever endpoint gives them; None where nothing limits a day.
    Its `NoBudget` is raised before any endpoint is asked.
    """

    def __init__(self, models: Sequence[Guarded], allowance: Allowance | None = None) -> None:
        self.own, *self._fallbacks = models
        self._allowance = allowance

    async def __call__(self, messages: Messages, *, fell_back: FellBack, **options: Any) -> ChatResult:
        if self._allowance is None:
            return await self._answer(messages, fell_back, options)
        async with self._allowance.paid(messages, options.get("extra"), options.get("max_tokens")) as bill:
            result = await self._answer(messages, fell_back, options)
            bill.read_result(result)
            return result

    async def _answer(self, messages: Messages, fell_back: FellBack, options: Mapping[str, Any]) -> ChatResult:
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

    def stream(self, messages: Messages, *, fell_back: FellBack, **options: Any) -> AsyncGenerator[bytes, None]:
        """Another endpoint is asked only until the first chunk: text has gone out then."""
        chunks = self._chunks(messages, fell_back, options)
        return chunks if self._allowance is None else _billed(chunks, self._allowance, messages, options)

    async def _chunks(
        self, messages: Messages, fell_back: FellBack, options: Mapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
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


async def _billed(
    chunks: AsyncGenerator[bytes, None], allowance: Allowance, messages: Messages, options: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    async with allowance.paid(messages, options.get("extra"), options.get("max_tokens")) as bill, aclosing(chunks):
        async for chunk in chunks:
            bill.read_chunk(chunk)
            yield chunk


def _note(model: Guarded, error: ModelError) -> None:
    # Not the message: it may quote content.
    log.warning("The fallback %s (%s) failed too: %s", model.endpoint, model.model, type(error).__name__)
