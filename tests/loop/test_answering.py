"""Answers without a gateway around them: what becomes of a weak server that hangs."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from cowest_serving.answering import Answering, Models, Record, Refusal, draft_seconds, parse_chat
from cowest_serving.contract import Collaboration
from cowest_serving.health import MANY_FAILURES, CircuitOpen, Guarded
from cowest_serving.models import EndpointUnreachable
from tests.fakes import ScriptedModel
from tests.loop.test_gateway import arm_of, strong_settings


@pytest.mark.parametrize("when_weak_fails", ["StrongAlone", "Fail"])
async def test_a_weak_server_that_hangs_is_not_waited_for_after_some_failures(when_weak_fails: str) -> None:
    async with ScriptedModel(faults=["hang"] * 9) as weak, ScriptedModel("the answer") as strong:
        settings = strong_settings(strong.url, timeout_seconds=1)
        collaboration = Collaboration("Explanation", when_weak_fails, "Fail", "StrongAlone", draft_max_tokens=9)
        models, arm = Models(settings, (), draft_max_tokens=9), arm_of(weak, strong)
        answering = Answering(settings, collaboration, models)
        health = models.weak(arm).health
        health.failures, health.since = MANY_FAILURES - 1, time.time() - 60

        async def record_of_answer() -> Record:
            asked = parse_chat(b'{"messages": [{"role": "user", "content": "why?"}]}', "r1")
            record = Record(asked, arm, 1, arm.mode)
            try:
                await answering.answer(record)
            except Refusal:
                assert when_weak_fails == "Fail"
            return record

        last = await record_of_answer()
        first = await asyncio.gather(*(record_of_answer() for _ in range(3)))
        await models.aclose()
    assert len(weak.calls) == 1 and last.errors[0].startswith("DeadlineExceeded")
    assert all(record.errors[0].startswith("CircuitOpen") and record.draft_ms < 500 for record in first)
    assert {record.status for record in first} == {"weak_failed"}


@pytest.mark.parametrize("leaves", [False, True], ids=["to its end", "until its client leaves"])
async def test_a_stream_that_breaks_off_counts_for_the_circuit_and_one_that_goes_well_clears_it(leaves: bool) -> None:
    faults = [None, "truncate", "truncate"]
    async with ScriptedModel("one two three", faults=faults) as server, Guarded(server.url, "big") as model:

        def has_failed_for_long() -> None:
            model.health.failures, model.health.since = MANY_FAILURES - 1, time.time() - 60

        has_failed_for_long()
        async with aclosing(model.stream([])) as chunks:
            async for _ in chunks:
                assert model.health.failures, "it has not come to its end yet"
                if leaves:
                    break
        assert not model.health.failures
        has_failed_for_long()
        with pytest.raises(EndpointUnreachable):
            await anext(chunk async for chunk in model.stream([]) if b"three" in chunk)
        with pytest.raises(CircuitOpen):
            await anext(model.stream([]))
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("timeout", "tokens", "seconds"),
    [
        pytest.param(60, 64, 15, id="short drafts"),
        pytest.param(60, 256, 25.6, id="ten tokens a second"),
        pytest.param(60, 4096, 30, id="no longer than half of an answer"),
        pytest.param(5, 64, 2.5, id="nor than half of a quick one"),
    ],
)
def test_a_draft_is_waited_for_as_long_as_it_is(timeout: float, tokens: int, seconds: float) -> None:
    assert draft_seconds(timeout, tokens) == seconds
