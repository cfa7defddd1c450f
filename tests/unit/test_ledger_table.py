"""The gain ledger as a table: what a row says, what is summed, what the filters take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cowest_cli import ledger_table as ledgers
from cowest_cli.ledger_table import COLUMNS, PAIR_COLUMNS, Filters, Query
from cowest_serving.leases import Spent
from cowest_training.contract import LEDGER_COLUMNS, Manifest, StepError

MADE = Manifest(
    "Feedback", "sha256:f", "sha256:i", {"round": 2, "pair": "sha256:p", "feedback": {"rule": "SignOfGain"}}, {}, {},
    "feedback", "0.1.0", "2026-01-01T00:00:00+00:00", 1.0,
)  # fmt: skip


def unasked(query_id: str, index: int) -> dict[str, Any]:
    """A draft that the round did not ask, and no solo either."""
    mine = {"query_id": query_id, "query": f"What is {query_id}?", "draft_index": index, "draft": f"d{index}"}
    return {**dict.fromkeys(LEDGER_COLUMNS), **mine}


def record(query_id: str, index: int, score: float, solo: float = 0.0, **more: Any) -> dict[str, Any]:
    draft = more.pop("draft", f"d{index}")
    return {
        **dict.fromkeys(LEDGER_COLUMNS), "query_id": query_id, "query": f"What is {query_id}?", "draft_index": index,
        "draft": draft, "answer_score": score, "solo_score": solo, "gain": score - solo,
        "answer_call": f"{query_id}/{draft}", "solo_call": f"{query_id}/", "strong_version": "v1", **more,
    }  # fmt: skip


def pair(query_id: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {
        "query_id": query_id, "prompt": [{"role": "user", "content": "explain"}], "chosen": chosen,
        "rejected": rejected, "chosen_score": 1.0, "rejected_score": 0.0, "solo_score": 0.0, **more,
    }  # fmt: skip


def queries(*records: Any, pairs: Any = (), prices: Any = None) -> list[Query]:
    return ledgers.rows_of(records, pairs, MADE, prices or {}, "EUR")


TWO = (
    record("a", 0, 0.0, group="g"),
    record("a", 1, 1.0, group="g"),
    record("b", 0, 1.0, 1.0, group="h"),
    record("b", 1, 0.5, 1.0, group="h"),
)


def test_a_row_has_what_the_step_wrote_and_where_it_is_from() -> None:
    first, second = queries(*TWO, pairs=[pair("a", "d1", "d0")])[0].rows
    assert list(first) == list(COLUMNS)
    assert (first["round"], first["rule"], first["pair_digest"], first["currency"]) == (
        2,
        "SignOfGain",
        "sha256:p",
        "EUR",
    )
    assert (first["made"], first["cowest_version"]) == ("2026-01-01T00:00:00+00:00", "0.1.0")
    assert (first["role"], second["role"]) == ("rejected", "chosen")


def test_each_column_of_the_step_is_in_the_table_under_its_own_name_and_type() -> None:
    assert {name: COLUMNS[name].kind for name in LEDGER_COLUMNS} == LEDGER_COLUMNS
    assert all(column.meaning for column in COLUMNS.values())


def test_the_page_says_the_same_of_each_column_as_the_code() -> None:
    page = Path("docs/ledger.md").read_text("utf-8")
    for name, column in COLUMNS.items():
        assert f"| `{name}` | {column.kind} | {column.meaning} |" in page, name
    for name, meaning in PAIR_COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in page, name


def test_of_equal_drafts_only_one_has_the_role_of_the_pair() -> None:
    rows = [record("a", 0, 1.0, draft="x"), record("a", 1, 1.0, draft="x"), record("a", 2, 0.0, draft="y")]
    (query,) = queries(*rows, pairs=[pair("a", "x", "y")])
    assert [row["role"] for row in query.rows] == ["chosen", None, "rejected"]


def test_best_and_worst_are_the_earlier_of_equal_drafts_and_the_gain_is_that_of_the_best() -> None:
    (query,) = queries(*(record("a", index, score, 0.25) for index, score in enumerate((0.5, 1.0, 1.0, 0.0, 0.0))))
    assert (query.best["draft_index"], query.worst["draft_index"], query.gain) == (1, 3, 0.75)
    assert query.is_hurt and not query.is_usable


def test_a_call_that_drafts_or_rounds_share_is_paid_once() -> None:
    rows = [record("a", 0, 1.0, draft="x"), record("a", 1, 1.0, draft="x")]
    prices = {"a/x": Spent(1, 10, 5, 0.25), "a/": Spent(1, 8, 2, 0.125)}
    once = queries(*rows, prices=prices)
    assert asdict(ledgers.price_of(once + queries(*rows, prices=prices))) == {
        "calls": 2, "input_tokens": 18, "output_tokens": 7, "money": 0.375, "unknown": 0,
    }  # fmt: skip
    assert once[0].rows[1]["answer_money"] == 0.25 and once[0].rows[1]["solo_input_tokens"] == 8


def test_a_call_whose_price_is_not_at_hand_is_counted_as_unknown_and_not_as_free() -> None:
    found = queries(record("a", 0, 1.0), prices={"a/": Spent(1, 8, 2, 0.125)})
    assert found[0].rows[0]["answer_money"] is None
    price = ledgers.price_of(found)
    assert (price.calls, price.unknown, price.money) == (2, 1, 0.125)


def test_what_was_not_asked_is_neither_best_nor_worst_and_costs_nothing() -> None:
    decided, silent = queries(unasked("a", 0), record("a", 1, 1.0), record("a", 2, 0.0), unasked("b", 0))
    assert (decided.best["draft_index"], decided.worst["draft_index"], decided.gain) == (1, 2, 1.0)
    assert (silent.gain, silent.is_hurt, ledgers.price_of([silent]).calls) == (None, False, 0)
    assert ledgers.price_of([decided]).calls == 3
    for least, left in ((0.0, ["a"]), (None, ["a", "b"])):
        assert [query.id for query in ledgers.chosen([decided, silent], Filters(min_gain=least))] == left
    (seen,) = ledgers.summaries([decided, silent], [decided, silent])
    assert (seen.drafts, seen.asked, seen.gains, seen.mean_gain, seen.strong_versions) == (4, 2, 2, 0.5, {"v1": 2})
    assert ledgers.table([decided, silent])["gain"].to_pylist() == [None, 1.0, 0.0, None]
    assert ledgers.as_json(silent)["gain"] is None


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        pytest.param(Filters(), ["a", "b"], id="none takes all"),
        pytest.param(Filters(queries=("b",)), ["b"], id="an id"),
        pytest.param(Filters(queries=("WHAT IS A?",)), ["a"], id="words of the text, whatever the case"),
        pytest.param(Filters(queries=("b", "is a")), ["a", "b"], id="one of several"),
        pytest.param(Filters(groups=("h",)), ["b"], id="a group"),
        pytest.param(Filters(usable=True), ["a"], id="those with a pair"),
        pytest.param(Filters(hurt=True), ["b"], id="those that a draft has hurt"),
        pytest.param(Filters(min_gain=1.0), ["a"], id="a gain that is just reached"),
        pytest.param(Filters(min_gain=0.0), ["a", "b"], id="no loss"),
        pytest.param(Filters(usable=True, hurt=True), [], id="all must hold"),
    ],
)
def test_filters_take_whole_queries(filters: Filters, left: list[str]) -> None:
    found = queries(*TWO, pairs=[pair("a", "d1", "d0")])
    chosen = ledgers.chosen(found, filters)
    assert [query.id for query in chosen] == left
    assert all(len(query.rows) == 2 for query in chosen)


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        pytest.param(Filters(queries=("zebra",)), "saw none that fits", id="a query that no round knows"),
        pytest.param(Filters(groups=("z",)), "saw g, h", id="a group that the data does not have"),
    ],
)
def test_a_slip_of_the_pen_is_no_empty_answer(filters: Filters, says: str) -> None:
    with pytest.raises(StepError, match=says):
        ledgers.chosen(queries(*TWO), filters)


def test_a_summary_counts_what_the_filters_leave_and_says_of_how_many() -> None:
    found = queries(*TWO, pairs=[pair("a", "d1", "d0")])
    (seen,) = ledgers.summaries(found, ledgers.chosen(found, Filters(hurt=True)))
    assert (seen.of_queries, seen.queries, seen.usable, seen.pairs, seen.drafts) == (2, 1, 0, 0, 2)
    assert (seen.mean_gain, seen.hurt_rate, seen.strong_versions) == (-0.25, 0.5, {"v1": 2})
    (empty,) = ledgers.summaries(found, [])
    assert (empty.queries, empty.mean_gain, empty.price.calls) == (0, None, 0)


def test_a_prompt_of_parts_becomes_plain_text_in_the_form_for_trainers() -> None:
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "n"}
    ]
    found = queries(*TWO, pairs=[pair("a", "d1", "d0", prompt=prompt)])
    (row,) = ledgers.preferences(found).to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "one\ntwo"}]
    assert row["chosen"] == [{"role": "assistant", "content": "d1"}] and list(row) == list(PAIR_COLUMNS)
