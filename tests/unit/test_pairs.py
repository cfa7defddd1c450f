"""From the gain ledger to preference pairs: the two rules, and which queries are asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cowest_training.asking import Draft, Reply, draft_seed
from cowest_training.contract import Evaluator, Feedback, Row
from cowest_training.feedback import (
    Asked,
    Entry,
    best_versus_worst,
    choose_queries,
    make_pairs,
    measured,
    notes,
    sign_of_gain,
    write_pairs,
)
from cowest_training.paid_calls import Spent
from tests.world import STABLE as PAIR


def row(id_: str) -> Row:
    return Row(id_, f"query {id_}", ({"role": "user", "content": f"query {id_}"},), "reference")


def entries(scores: Sequence[float], solo: float = 0.0, query: str = "q") -> list[Entry]:
    """Drafts d0, d1, ... of one query whose answers score so."""
    return [
        Entry(row(query), Draft(query, i, i, f"d{i}", 1), Reply(f"a{i}", "", ""), score, Reply("z", "", ""), solo)
        for i, score in enumerate(scores)
    ]


def drafts(pairs: Sequence[object]) -> list[tuple[str, str]]:
    return [(pair.chosen.draft.text, pair.rejected.draft.text) for pair in pairs]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("scores", "margin", "wanted"),
    [
        pytest.param([0.0, 1.0, 0.5], 0.5, [("d1", "d0")], id="the best against the worst, the middle left out"),
        pytest.param([1.0, 0.0, 1.0, 0.0], 0.5, [("d0", "d1")], id="of equal scores the earlier draft"),
        pytest.param([1.0, 1.0, 1.0], 0.0, [], id="a tie is no pair, whatever the margin"),
        pytest.param([0.7, 0.2], 0.5, [("d0", "d1")], id="exactly the margin counts, rounding apart"),
        pytest.param([0.69, 0.2], 0.5, [], id="below the margin no pair"),
        pytest.param([1.0], 0.5, [], id="one draft has no opponent"),
    ],
)
def test_best_versus_worst(scores: list[float], margin: float, wanted: list[tuple[str, str]]) -> None:
    assert drafts(best_versus_worst(entries(scores), margin)) == wanted


@pytest.mark.parametrize(
    ("scores", "solo", "wanted"),
    [
        pytest.param([0.0, 1.0], 0.0, [("d1", "d0")], id="better than solo against as good as solo"),
        pytest.param([1.0, 1.0], 0.0, [], id="only gains yield no pair"),
        pytest.param([1.0, 0.0], 1.0, [], id="where solo is right no draft can gain"),
        pytest.param([1.0, 0.0, 1.0, 0.0, 0.0], 0.5, [("d0", "d1"), ("d2", "d3")], id="min(n+, n-) pairs in order"),
        pytest.param([0.5, 1.0, 0.2], 0.4, [("d0", "d2")], id="a small gain is a gain"),
    ],
)
def test_sign_of_gain(scores: list[float], solo: float, wanted: list[tuple[str, str]]) -> None:
    assert drafts(sign_of_gain(entries(scores, solo))) == wanted


def settings(rule: str) -> Feedback:
    return Feedback(Evaluator("ExactMatch"), 4, 1.0, rule, 0.5, 100, 1)  # type: ignore[arg-type]


def test_pairs_never_mix_queries() -> None:
    ledger = entries([1.0, 1.0], query="a") + entries([0.0, 0.0], query="b") + entries([0.0, 1.0], query="c")
    for rule in ("BestVersusWorst", "SignOfGain"):
        pairs = make_pairs(ledger, settings(rule))
        assert [(pair.chosen.row.id, pair.rejected.row.id) for pair in pairs] == [("c", "c")]


def test_the_rules_differ_where_solo_is_right() -> None:
    ledger = entries([1.0, 0.0], solo=1.0)
    assert drafts(make_pairs(ledger, settings("BestVersusWorst"))) == [("d0", "d1")]
    assert make_pairs(ledger, settings("SignOfGain")) == []


def test_metrics_count_hurt_drafts_ties_and_skipped_queries() -> None:
    ledger = entries([1.0, 0.0], solo=0.5, query="a") + entries([0.0, 0.0], solo=0.0, query="b")
    asked = Asked(ledger, Spent(5, 10, 4, 0.25), 1, 2, {"cut_answers": 1})
    seen = measured(asked, make_pairs(ledger, settings("BestVersusWorst")), 3, 0.5)
    assert (seen["queries"], seen["skipped"], seen["drafts"], seen["pairs"], seen["ties"]) == (2, 1, 4, 1, 1)
    assert seen["hurt_rate"] == 0.25
    assert seen["mean_gain"] == pytest.approx(0.0)
    assert (seen["strong_calls"], seen["strong_calls_cached"], seen["money"]) == (5, 1, 0.25)
    assert (seen["judge_calls"], seen["cut_answers"]) == (2, 1)


def test_drafts_that_were_cut_off_are_counted_and_noted_and_so_marked_in_their_pair(tmp_path: Path) -> None:
    cut, whole = entries([1.0, 0.0])
    ledger = [replace(cut, draft=replace(cut.draft, finish_reason="length")), whole]
    pairs = make_pairs(ledger, settings("BestVersusWorst"))
    metrics = measured(Asked(ledger, Spent(), 0, 0, {}), pairs, 1, 0.5)
    assert metrics["cut_drafts"] == 1
    assert "1 of 2 drafts were cut off" in notes(metrics)[0] and "draftMaxTokens" in notes(metrics)[0]
    write_pairs(tmp_path / "pairs.jsonl", pairs, PAIR)
    said = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert (said["chosen_finish_reason"], said["rejected_finish_reason"]) == ("length", "")


def test_the_queries_of_a_round_depend_on_seed_and_round_alone() -> None:
    rows = [row(str(i)) for i in range(50)]
    chosen = choose_queries(rows, 10, seed=3, round_number=1)
    assert choose_queries(rows[::-1], 10, seed=3, round_number=1) == chosen
    assert choose_queries(rows, 10, seed=3, round_number=2) != chosen
    assert choose_queries(rows, 10, seed=4, round_number=1) != chosen
    assert len(choose_queries(rows, 99, seed=3, round_number=1)) == 50


def test_every_draft_has_a_seed_of_its_own_that_fits_a_signed_column() -> None:
    seeds = {draft_seed("0/1", query, index) for query in "abc" for index in range(4)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draft_seed("0/1", "a", 0) == draft_seed("0/1", "a", 0) != draft_seed("0/2", "a", 0)
