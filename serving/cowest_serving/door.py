"""The strong model as live answers ask it: the pair's own endpoint, and while that fails its fallbacks in order.

Only the gateway comes through here. What a fallback answers is no answer of the pair: its record says `fell_back`, and
neither gate nor training goes by it. Steps and the proxy ask the pair's own endpoint, or wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

from cowest_serving.allowance import Allowance, Bill
from cowest_serving.contract import Messages
from cowest_serving.health import Guarded
from cowest_serving.hedging import Hedging
from cowest_serving.models import BadAnswer, ChatResult, ModelError, is_clients_fault, new_key

log = logging.getLogger(__name__)
Hedged = Callable[[], None]  # told that a second call is made
FellBack = Callable[[ModelError], None]  # told why the pair's own endpoint did not answer, once another one does


def _unheard() -> None:
    pass


class StrongDoor:
    """Raises the error of the pair's own endpoint when no fallback answers either.

    `until`, by the monotonic clock, is when all of them together have to be done, a stream has to have begun.

    `allowance`: what may be spent on live answers, whichever endpoint gives them; None where nothing limits a day.
    Its `NoBudget` is raised before any endpoint is asked.
    `hedging`: when the pair's own endpoint is asked a second time beside the first; a second call is taken from the
    allowance too.
    """

    def __init__(
        self, models: Sequence[Guarded], allowance: Allowance | None = None, hedging: Hedging | None = None
    ) -> None:
        self.own, *self._fallbacks = models
        self._allowance, self._hedging = allowance, hedging

    def expect_call(self) -> None:
        """One comes as soon as there is a draft."""
        self.own.expect_call()

    async def __call__(
        self, messages: Messages, *, fell_back: FellBack, hedged: Hedged = _unheard, **options: Any
    ) -> ChatResult:
        if self._allowance is None:
            return await self._answer(messages, fell_back, hedged, options)
        async with self._paid(self._allowance, messages, options) as bill:
            result = await self._answer(messages, fell_back, hedged, {**options, "payer": bill})
            bill.read_result(result)
            return result

    async def _answer(
        self, messages: Messages, fell_back: FellBack, hedged: Hedged, options: Mapping[str, Any]
    ) -> ChatResult:
        others = len(self._fallbacks)
        try:
            given = _turn(options, others)
            if self._hedging is None:
                return await self.own(messages, **given)
            return await self._hedging.first(self.own, partial(self._one, messages, hedged, given))
        except ModelError as error:
            why = self._why(error)
        for number, model in enumerate(self._fallbacks, 1):
            try:
                result = await model(messages, **_turn(options, others - number))
            except ModelError as error:
                _note(model, error)
                continue
            fell_back(why)
            return result
        raise why

    def stream(
        self, messages: Messages, *, fell_back: FellBack, hedged: Hedged = _unheard, **options: Any
    ) -> AsyncGenerator[bytes, None]:
        """Another endpoint is asked only until the first chunk: text has gone out then."""
        if self._allowance is None:
            return self._chunks(messages, fell_back, hedged, options)
        return self._billed(self._allowance, messages, fell_back, hedged, options)

    async def _billed(
        self, allowance: Allowance, messages: Messages, fell_back: FellBack, hedged: Hedged, options: Mapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        async with (
            self._paid(allowance, messages, options) as bill,
            aclosing(self._chunks(messages, fell_back, hedged, {**options, "payer": bill})) as chunks,
        ):
            async for chunk in chunks:
                bill.read_chunk(chunk)
                yield chunk

    async def _chunks(
        self, messages: Messages, fell_back: FellBack, hedged: Hedged, options: Mapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        why: ModelError | None = None
        others = len(self._fallbacks)
        for number, model in enumerate((self.own, *self._fallbacks)):
            has_begun = False
            try:
                given = _turn(options, others - number)
                async with aclosing(self._streamed(model, messages, hedged, given)) as chunks:
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

    def _streamed(
        self, model: Guarded, messages: Messages, hedged: Hedged, options: Mapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        if self._hedging is None or model is not self.own:
            return model.stream(messages, **options)
        return self._hedging.stream(model, partial(self._one_stream, messages, hedged, options))

    async def _one(self, messages: Messages, hedged: Hedged, options: Mapping[str, Any], is_second: bool) -> ChatResult:
        if not is_second:
            return await self.own(messages, **options)
        async with self._second(messages, hedged, options) as changed:
            return await self.own(messages, **changed)

    async def _one_stream(
        self, messages: Messages, hedged: Hedged, options: Mapping[str, Any], is_second: bool
    ) -> AsyncGenerator[bytes, None]:
        around = self._second(messages, hedged, options) if is_second else nullcontext(options)
        async with around as given, aclosing(self.own.stream(messages, **given)) as chunks:
            async for chunk in chunks:
                yield chunk

    @asynccontextmanager
    async def _second(
        self, messages: Messages, hedged: Hedged, options: Mapping[str, Any]
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Room for it, as for a call of which nothing is known: what the answer cost stands on the first one's bill."""
        room = self._paid(self._allowance, messages, options) if self._allowance else nullcontext()
        async with room as bill:
            hedged()
            yield {**options, **({"payer": bill} if bill else {}), "idempotency_key": new_key()}

    def _paid(
        self, allowance: Allowance, messages: Messages, options: Mapping[str, Any]
    ) -> AbstractAsyncContextManager[Bill]:
        return allowance.paid(messages, options.get("extra"), options.get("max_tokens"), options.get("until"))

    def _why(self, error: ModelError) -> ModelError:
        """The fault of this endpoint, passing or not, that another one may not have; any other one is raised."""
        is_too_long = isinstance(error, BadAnswer) and not error.retryable
        if not self._fallbacks or is_clients_fault(error) or is_too_long:
            raise error
        return error

    @property
    def models(self) -> tuple[Guarded, ...]:
        """In the order in which they are asked."""
        return (self.own, *self._fallbacks)

    async def aclose(self) -> None:
        for model in (self.own, *self._fallbacks):
            await model.aclose()


def _turn(options: Mapping[str, Any], others: int) -> Mapping[str, Any]:
    """For the next endpoint: half of the time that is left stays for the others behind it."""
    until = options.get("until")
    if until is None or not others:
        return options
    return {**options, "until": until - (until - time.monotonic()) / 2}


def _note(model: Guarded, error: ModelError) -> None:
    # Not the message: it may quote content.
    log.warning("The fallback %s (%s) failed too: %s", model.endpoint, model.model, type(error).__name__)
