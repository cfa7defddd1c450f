"""What `make bench-feedback` counts: the full protocol by hand, ours by what the step paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cowest_training.contract import Row
from tests.benchmarks import feedback_bench as bench

QUERIES = {"a": ("1", "1", "2", "1"), "b": ("2", "2", "2", "2"), "c": ("3", "1", "2", "1")}  # what the drafts say


def answers(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the draft says; alone it knows nothing."""
    text = messages[-1]["content"]
    return f"The charge is {text.split('draft')[1].split()[0]}." if "draft" in text else "I do not know."


@pytest.fixture
def desk() -> bench.Domain:
    rows = [Row(id_, f"price {id_}", ({"role": "user", "content": f"price {id_}"},), "1") for id_ in QUERIES]
    drafts = {id_: ["greedy", *(f"draft {said} for {id_}" for said in found)] for id_, found in QUERIES.items()}
    return replace(bench.domain("freight", 1), rows=rows, drafts=drafts, answers=answers)


def test_the_full_protocol_asks_and_judges_each_draft_however_many_are_equal(desk: bench.Domain) -> None:
    whole = bench.full(desk, 4, bench.Strong(desk), True)
    assert whole.calls == 3 * (4 + 1 + 5)
    assert bench.full(desk, 4, bench.Strong(desk), False).calls == 3 * 5
    assert set(whole.pairs) == {"a", "c"} and whole.pairs["a"] == ("draft 1 for a", "draft 2 for a")


def test_ours_is_what_the_step_paid_and_agrees_with_a_judge_that_does_not_err(desk: bench.Domain) -> None:
    strong = bench.Strong(desk)
    whole, some = bench.full(desk, 4, strong, True), bench.ours(desk, 4, strong, True)
    seen = bench.compare([(whole, some)])
    assert (seen.kept, seen.usable, seen.agreeing, seen.pairs) == (2, 2, 2, 2)
    assert some.calls < whole.calls / 2 and seen.ratio == pytest.approx(some.calls / whole.calls)


def test_a_pair_in_another_order_does_not_agree(desk: bench.Domain) -> None:
    whole = bench.full(desk, 4, bench.Strong(desk), True)
    turned = replace(whole, pairs={"a": whole.pairs["a"][::-1], "c": whole.pairs["c"]})
    assert bench.compare([(whole, turned)]).agreeing == 1


def test_the_stand_in_errs_as_often_as_it_is_told(desk: bench.Domain) -> None:
    erring = bench.Strong(desk, 0.25)
    wrong = sum(erring.verdict(str(n), "0", "listwise") == 1.0 for n in range(1, 2001))
    assert wrong / 2000 == pytest.approx(0.25, abs=0.04)
