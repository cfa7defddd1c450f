"""The book of paid calls against a strong model on loopback: nothing received is paid for again, also after a kill."""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from cowest_operator.observe import SPENT
from cowest_serving.contract import Budget, Pair, Prices, Prompts, Strong
from cowest_serving.models import BadRequest, ChatResult, HttpChatModel, ServerFault
from cowest_training.asking import Asking, open_asking, score_key
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_BUDGET, EXIT_RETRY, Evaluator, Row, StepError
from cowest_training.evaluator import TRIES
from cowest_training.paid_calls import PaidCalls, read_spent
from tests.fakes import Call, Fault, ScriptedModel
from tests.patience import IN_TIME

PRICES = Prices(input_per_million_tokens=1e6, output_per_million_tokens=2e6, currency="USD")  # 1 and 2 USD a token


async def ask(book: PaidCalls, server: ScriptedModel, text: str, **changes: Any) -> tuple[ChatResult, str, bool]:
    async with HttpChatModel(server.url, "m", timeout_seconds=5, max_retries=2, backoff_seconds=0.01) as model:
        return await book.ask(
            model,
            [{"role": "user", "content": text}],
            **{"endpoint": server.url, "name": "m", "purpose": "test", "params": {"temperature": 0.0}, **changes},
        )


async def test_an_answer_is_paid_for_once_also_by_the_next_process(tmp_path: Path) -> None:
    async with ScriptedModel("forty two") as server:
        async with PaidCalls(tmp_path / "calls") as book:
            first, key, was_cached = await ask(book, server, "x")
            assert (first.text, was_cached) == ("forty two", False)
            assert server.calls[0].key == key
        async with PaidCalls(tmp_path / "calls") as book:
            again, same_key, was_cached = await ask(book, server, "x")
            assert (again.text, again.version, again.output_tokens) == ("forty two", "fp_1", 2)
            assert (same_key, was_cached) == (key, True)
            assert dict(book.asked.cached) == {"test": 1}
        assert len(server.calls) == 1


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"name": "other"}, id="another model"),
        pytest.param({"params": {"temperature": 1.0}}, id="other parameters"),
        pytest.param({"sample": 1}, id="another sample"),
        pytest.param({"endpoint": "http://elsewhere/v1"}, id="another endpoint"),
    ],
)
async def test_what_decides_an_answer_is_part_of_the_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    async with ScriptedModel() as server, PaidCalls(tmp_path / "calls") as book:
        _, key, _ = await ask(book, server, "x")
        _, other, was_cached = await ask(book, server, "x", **changes)
        assert key != other
        assert not was_cached


async def test_parameters_that_are_absent_do_not_change_the_key() -> None:
    message = [{"role": "user", "content": "x"}]
    bare = PaidCalls.key("http://a/v1", "m", message, {"temperature": 0.0})
    assert bare == PaidCalls.key("http://a/v1/", "m", message, {"temperature": 0.0, "max_tokens": None})


async def test_callers_who_ask_the_same_at_once_share_one_call(tmp_path: Path) -> None:
    async with ScriptedModel() as server, PaidCalls(tmp_path / "calls") as book:
        results = await asyncio.gather(*(ask(book, server, "x") for _ in range(5)))
        assert len(server.calls) == 1
        assert sorted(was_cached for _, _, was_cached in results) == [False, True, True, True, True]


async def test_a_retry_carries_the_same_key_and_a_refusal_is_not_remembered(tmp_path: Path) -> None:
    async with ScriptedModel("ok", faults=[500, None, 400]) as server, PaidCalls(tmp_path / "calls") as book:
        _, key, _ = await ask(book, server, "x")
        assert [call.key for call in server.calls] == [key, key]
        with pytest.raises(BadRequest):
            await ask(book, server, "y")
        result, _, was_cached = await ask(book, server, "y")
        assert (result.text, was_cached) == ("ok", False)


async def test_an_answer_whose_caller_has_gone_is_kept_all_the_same(tmp_path: Path) -> None:
    async with ScriptedModel("late") as server:
        server.gate.clear()
        async with HttpChatModel(server.url, "m") as model, PaidCalls(tmp_path / "calls") as book:
            message = [{"role": "user", "content": "x"}]
            call = book.ask(model, message, endpoint=server.url, name="m", purpose="test", params={"temperature": 0.0})
            task = asyncio.create_task(call)
            await server.arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.gate.set()
        async with PaidCalls(tmp_path / "calls") as book:
            result, _, was_cached = await ask(book, server, "x")
        assert (result.text, was_cached, len(server.calls)) == ("late", True, 1)


# ---------------------------------------------------------------- budget
async def outcomes(book: PaidCalls, server: ScriptedModel, n: int, **changes: Any) -> tuple[int, list[StepError]]:
    """(answers, refusals) of n different calls at once."""
    found = await asyncio.gather(*(ask(book, server, f"q{i}", **changes) for i in range(n)), return_exceptions=True)
    refusals = [error for error in found if isinstance(error, StepError)]
    return sum(isinstance(result, tuple) for result in found), refusals


@pytest.mark.parametrize("usage", ["", ', "usage": null', ', "usage": {}'])
async def test_an_answer_without_usage_is_booked_by_an_estimate(tmp_path: Path, usage: str) -> None:
    body = '{"choices": [{"message": {"content": "twelve chars"}, "finish_reason": "stop"}]' + usage + "}"
    async with (
        ScriptedModel(faults=[Fault(200, body=body)] * 10) as server,
        PaidCalls(tmp_path / "calls", budget=Budget(tokens_per_day=30)) as book,
    ):
        limit = {"params": {"max_tokens": 5}}
        await ask(book, server, "x", **limit)
        spent = book.spent()
        assert (spent.input_tokens, spent.output_tokens) == (5, 4)
        answered, refusals = await outcomes(book, server, 9, **limit)
    assert (answered, len(refusals)) == (2, 7)
    assert (of := SPENT.search(str(refusals[0]))) is not None and of["day"], "as the operator reads it"


async def test_calls_beyond_the_budget_of_a_round_are_not_made(tmp_path: Path) -> None:
    async with ScriptedModel() as server:
        async with PaidCalls(tmp_path / "calls", round_number=1, budget=Budget(calls_per_round=3)) as book:
            answers, refusals = await outcomes(book, server, 5)
            assert (answers, len(refusals), len(server.calls)) == (3, 2, 3)
            assert refusals[0].code == EXIT_BUDGET
            assert "at most 3 calls in round 1" in str(refusals[0]) and " or wait" not in str(refusals[0])
            assert (of := SPENT.search(str(refusals[0]))) is not None and of["round"], "as the operator reads it"
        async with PaidCalls(tmp_path / "calls", round_number=2, budget=Budget(calls_per_round=3)) as book:
            answers, refusals = await outcomes(book, server, 5)
            assert (answers, refusals) == (5, [])
            assert book.spent(round_number=2).calls == 2
        assert len(server.paid) == 5


async def test_a_reservation_that_is_too_large_waits_for_room_instead_of_failing(tmp_path: Path) -> None:
    budget = Budget(tokens_per_day=1100)  # room for one answer of unknown length at a time; each takes a few tokens
    async with ScriptedModel() as server, PaidCalls(tmp_path / "calls", budget=budget) as book:
        answers, refusals = await outcomes(book, server, 4)
        assert (answers, refusals) == (4, [])


async def test_money_is_counted_with_what_the_endpoint_says_it_used(tmp_path: Path) -> None:
    params = {"temperature": 0.0, "max_tokens": 2}
    async with ScriptedModel("two words") as server:
        book = PaidCalls(tmp_path / "calls", budget=Budget(money_per_round=16.0), prices=PRICES)
        async with book:
            await ask(book, server, "three words here", params=params)
            assert book.spent().money == 3 * 1 + 2 * 2
            with pytest.raises(StepError) as refusal:
                await ask(book, server, "more", params=params)
        assert refusal.value.code == EXIT_BUDGET
        assert read_spent(tmp_path / "calls").calls == 1


async def test_a_failed_call_gives_its_reservation_back(tmp_path: Path) -> None:
    book = PaidCalls(tmp_path / "calls", budget=Budget(calls_per_round=1))
    async with ScriptedModel(faults=[500, 500, 500]) as server, book:
        with pytest.raises(ServerFault):
            await ask(book, server, "x")
        result, _, _ = await ask(book, server, "y")
        assert result.text == "an answer"


async def test_a_budget_in_money_without_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"spec\.strong\.prices") as error:
        PaidCalls(tmp_path / "calls", budget=Budget(money_per_day=1.0))
    assert error.value.code == EXIT_BAD_INPUT


async def test_a_book_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="book of paid calls") as error:
        PaidCalls(tmp_path)
    assert error.value.code == EXIT_RETRY


async def test_what_the_file_cannot_hold_fails_alone_and_the_book_goes_on(tmp_path: Path) -> None:
    async def model(messages: Any, **options: Any) -> ChatResult:
        return ChatResult("hi", "stop", 1, 2**64 if messages[0]["content"] == "odd" else 1, "m", "", {})

    about = {"endpoint": "http://s/v1", "name": "m", "purpose": "test", "params": {"max_tokens": 5}}
    async with PaidCalls(tmp_path / "calls", budget=Budget(tokens_per_day=1_000)) as book, asyncio.timeout(IN_TIME):
        asks = [book.ask(model, [{"role": "user", "content": text}], **about) for text in ("odd", "plain", "other")]
        odd, *others = await asyncio.gather(*asks, return_exceptions=True)
        assert isinstance(odd, OverflowError)
        assert all(isinstance(other, tuple) for other in others)
        assert (book.spent().calls, book.spent().tokens) == (2, 4)


@pytest.mark.parametrize("usage", ["-1", "18446744073709551615", "1e300", "true", '"7"'])
async def test_an_odd_count_of_an_endpoint_is_none(tmp_path: Path, usage: str) -> None:
    counts = f'"usage": {{"prompt_tokens": {usage}, "completion_tokens": {usage}}}'
    body = '{"choices": [{"message": {"content": "twelve chars"}, "finish_reason": "stop"}], ' + counts + "}"
    async with (
        ScriptedModel(faults=[Fault(200, body=body)]) as server,
        PaidCalls(tmp_path / "calls", budget=Budget(tokens_per_day=30)) as book,
        asyncio.timeout(IN_TIME),
    ):
        await ask(book, server, "x", params={"max_tokens": 5})
        assert (book.spent().input_tokens, book.spent().output_tokens) == (5, 4)


async def test_purposes_and_rounds_are_counted_apart(tmp_path: Path) -> None:
    async with ScriptedModel() as server, PaidCalls(tmp_path / "calls", round_number=4) as book:
        await ask(book, server, "x", purpose="evaluate:1:solo")
        await ask(book, server, "y", purpose="feedback:2:answer")
        assert book.spent(purpose="evaluate:1").calls == 1
        assert book.spent(round_number=4).calls == 2
        assert book.spent(round_number=3).calls == 0
    async with PaidCalls(tmp_path / "calls") as book, ScriptedModel() as server:
        await ask(book, server, "z")
        assert book.spent(round_number=4).calls == 3  # without a number: the round that the book saw last


async def test_a_score_that_costs_is_remembered(tmp_path: Path) -> None:
    asked = []

    async def judge() -> float:
        asked.append(1)
        await asyncio.sleep(0)
        return 0.5

    for _ in range(2):
        async with PaidCalls(tmp_path / "calls") as book:
            scores = await asyncio.gather(*(book.remember_score("k", judge) for _ in range(3)))
            assert scores == [0.5, 0.5, 0.5]
    assert len(asked) == 1


def judged_by(judge: ScriptedModel, book: Path) -> AbstractAsyncContextManager[Asking]:
    strong = Strong(judge.url, "big", (), timeout_seconds=5, max_concurrency=8, max_retries=0)
    return open_asking(strong, Evaluator("Judge", endpoint=judge.url, model="judge"), str(book), purpose="evaluate:1")


async def score_until_refused(book: Path, judge: ScriptedModel) -> list[float]:
    """The scores of ten answers by a judge, one after the other, in a step of their own; shorter where it ended it."""
    scores = []
    async with judged_by(judge, book) as asking:
        for n in range(10):
            row = Row(f"r{n}", f"q{n}", ({"role": "user", "content": f"q{n}"},), "1")
            try:
                scores.append(await asking.score_text(row, "an answer"))
            except StepError:
                break
    return scores


async def test_a_judge_that_never_decides_is_refused_as_soon_by_each_rerun(tmp_path: Path) -> None:
    async with ScriptedModel("I cannot say") as judge:
        for _ in range(3):
            assert await score_until_refused(tmp_path / "calls", judge) == [0.5, 0.5]
        assert len(judge.calls) == 3 * 2 * TRIES, "what it said is paid for once"


async def test_a_judge_that_refused_is_asked_again_once_it_is_mended(tmp_path: Path) -> None:
    async with ScriptedModel("ACCEPT", faults=[None, 400] + [400] * 2) as judge:
        assert await score_until_refused(tmp_path / "calls", judge) == [0.5, 0.5] + [1.0] * 8
        asked = len(judge.calls)
        assert await score_until_refused(tmp_path / "calls", judge) == [1.0] * 10
        assert len(judge.calls) == asked + 3, "what it refused, and nothing else"


async def test_asking_for_a_doubt_keeps_nobody_from_the_judge(tmp_path: Path) -> None:
    async with ScriptedModel("ACCEPT") as judge, judged_by(judge, tmp_path / "calls") as asking:
        row = Row("r", "q", ({"role": "user", "content": "q"},), "1")
        key = score_key(asking.evaluator.digest, row, "an answer")
        assert (asking.doubt(row, "an answer"), asking.calls.known_score(key), asking.calls._judging) == ("", None, {})
        assert await asking.score_text(row, "an answer") == asking.calls.known_score(key) == 1.0


async def test_two_models_that_are_asked_at_once_are_no_strong_model_that_became_another(tmp_path: Path) -> None:
    async with ScriptedModel("ACCEPT") as server, judged_by(server, tmp_path / "calls") as asking:

        async def asked(model: str, version: str, questions: range) -> dict[str, Any]:
            server.version = version
            pair = Pair(
                "sha256:w", "file:///w", Prompts("{query}", "{draft}", "{query}"), "Explanation", server.url, model
            )
            for n in questions:
                await asking.solo(Row(f"r{n}", f"q{n}", ({"role": "user", "content": f"q{n}"},), "1"), pair)
            return asking.strong_seen

        assert await asked("old", "fp_1", range(12)) == {"first": ["fp_1"], "last": ["fp_1"], "change": ""}
        assert await asked("new", "fp_2", range(14)) == {"first": ["fp_2"], "last": ["fp_2"], "change": ""}
        changed = await asked("old", "fp_3", range(20, 32))
        assert changed == {"first": ["fp_1"], "last": ["fp_3"], "change": "fp_1 for 12 answers, then fp_3"}


async def test_one_text_that_was_refused_is_a_tie_for_all_who_wait_for_it(tmp_path: Path) -> None:
    async with ScriptedModel("ACCEPT", faults=[400]) as judge:
        async with judged_by(judge, tmp_path / "calls") as asking:
            row = Row("r", "q", ({"role": "user", "content": "q"},), "1")
            assert await asyncio.gather(*(asking.score_text(row, "an answer") for _ in range(3))) == [0.5] * 3
        assert len(judge.calls) == 2


async def test_a_score_that_fails_after_its_caller_has_gone_says_no_more(tmp_path: Path) -> None:
    """The step has ended with one message by then; a trace of each other score in flight buried it."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    asked, over = asyncio.Event(), asyncio.Event()

    async def judge() -> float:
        asked.set()
        await over.wait()
        raise StepError("no verdict")

    async with PaidCalls(tmp_path / "calls") as book:
        waiting = asyncio.create_task(book.remember_score("k", judge))
        await asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        over.set()
        while book._judging:
            await asyncio.sleep(0)
    gc.collect()
    assert complaints == []


# ---------------------------------------------------------------- kill -9
CHILD = """
import asyncio, sys
from cowest_serving.models import HttpChatModel
from cowest_training.paid_calls import PaidCalls

async def main(url, path):
    async with HttpChatModel(url, "m") as model, PaidCalls(path, max_concurrency=3) as book:
        async def one(i):
            message = [{"role": "user", "content": f"q{i}"}]
            _, key, _ = await book.ask(
                model, message, endpoint=url, name="m", purpose="t", params={"temperature": 0.0}
            )
            print(key, flush=True)
        await asyncio.gather(*(one(i) for i in range(9)))

asyncio.run(main(*sys.argv[1:]))
"""


async def start(server: ScriptedModel, book: Path) -> asyncio.subprocess.Process:
    command = [sys.executable, "-c", CHILD, server.url, str(book)]
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)


async def test_after_a_kill_no_received_answer_is_asked_again_and_calls_in_flight_keep_their_key(
    tmp_path: Path,
) -> None:
    def answer(call: Call) -> str:
        if len(server.paid) == 3:  # the fourth answer is the last; the calls after it stay in flight
            server.gate.clear()
        return f"answer to {call.last}"

    server = ScriptedModel(answer)
    async with server, asyncio.timeout(60):
        child = await start(server, tmp_path / "calls")
        assert child.stdout
        received = {(await child.stdout.readline()).decode().strip() for _ in range(4)}
        while len(server.calls) < 4 + 3:
            server.arrived.clear()
            await server.arrived.wait()
        child.kill()
        await child.wait()
        before = list(server.calls)
        in_flight = {call.key for call in before} - received
        assert (len(received), len(in_flight)) == (4, 3)

        server.answers = lambda call: f"answer to {call.last}"
        server.gate.set()
        child = await start(server, tmp_path / "calls")
        output, _ = await child.communicate()
        assert child.returncode == 0
        after = [call.key for call in server.calls[len(before) :]]
        assert len(output.split()) == 9
        assert received.isdisjoint(after)
        assert in_flight <= set(after)
        assert len(after) == 5
        assert len({call.key for call in server.calls}) == 9
