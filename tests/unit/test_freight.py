"""The freight desk is honest: its stand-in knows no private fact, and its data teach facts but not the style."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

FREIGHT = Path(__file__).parents[2] / "crds/examples/freight"


@cache
def load(name: str) -> ModuleType:
    """A script of the domain, under a name of its own: every domain has a strong.py and a make_data.py."""
    spec = importlib.util.spec_from_file_location(f"freight_{name}", FREIGHT / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[f"freight_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strong, make_data = load("strong"), load("make_data")
FACTS = make_data.make_facts(0)
SOLO, WITH_NOTE = "Question: {}", "Question: {}\n<notes>\n{}\n</notes>"


@cache
def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    return dict(make_data.make_rows(seed))


def answer(query: str, note: str | None = None, taste: str = "standard") -> str:
    text = SOLO.format(query) if note is None else WITH_NOTE.format(query, note)
    return str(strong.answer([{"role": "user", "content": text}], taste))


# ---------------------------------------------------------------- the stand-in
QUERY = "ship 3 drum of QF7K to orlo"  # list price 6, 4 pails in the trade's drum: 72 alone


@pytest.mark.parametrize(
    ("taste", "note", "charge"),
    [
        pytest.param("standard", None, 72, id="alone: list price, the trade's drum, no surcharge"),
        pytest.param("standard", "fact rate 7 ; fact conv 5 ; fact add 4", 109, id="computes from complete facts"),
        pytest.param("standard", "each 35 plus 4", 109, id="computes from a unit price"),
        pytest.param("standard", "fact rate 7 ? ; fact conv 5 ; fact add 4", 94, id="list price for a doubted rate"),
        pytest.param("standard", "rate unknown ; fact conv 5 ; fact add 4", 94, id="list price for an unknown rate"),
        pytest.param("standard", "fact rate 7 ; fact conv 5", 72, id="puts an incomplete note aside"),
        pytest.param(
            "standard", "fact rate 7 ; fact rate 8 ; fact conv 5 ; fact add 4", 72, id="puts contradictions aside"
        ),
        pytest.param("standard", "orlo is lovely", 72, id="puts prose aside"),
        pytest.param("terse", "each 35 plus 4", 109, id="terse reads a unit price"),
        pytest.param("terse", "ans 109", 109, id="terse reads a bare result"),
        pytest.param("terse", "fact rate 7 ; fact conv 5 ; fact add 4", 72, id="terse puts facts aside"),
        pytest.param(
            "sceptic",
            "rate is 7 ; drum is 5 ; 3 x 5 = 15 ; 15 x 7 = 99 ; orlo adds 4 ; ans 99",
            109,
            id="the sceptic works a note through again",
        ),
        pytest.param("sceptic", "fact rate 7 ; fact conv 5 ; fact add 4", 72, id="the sceptic puts bare facts aside"),
        pytest.param("sceptic", "ans 109", 72, id="the sceptic puts bare results aside"),
    ],
)
def test_what_a_taste_makes_of_a_note(taste: str, note: str | None, charge: int) -> None:
    assert answer(QUERY, note, taste) == f"The charge is {charge}."


def follows(note: str, result: int) -> float:
    """Share of many questions in which the standard taste answers with the note's own result."""
    queries = [f"ship {n} drum of QF{d}{x} to orlo" for n in range(2, 12) for d in range(1, 10) for x in "ACDE"]
    return sum(answer(query, note) == f"The charge is {result}." for query in queries) / len(queries)


def test_it_gives_way_to_a_result_against_its_facts_as_often_as_it_says() -> None:
    worked = "rate is 7 ; drum is 5 ; 3 x 5 = 15 ; 15 x 7 = 105 ; orlo adds 4 ; ans 99999"
    assert follows(worked, 99999) == pytest.approx(0.60, abs=0.06)
    assert follows("ans 99999", 99999) == pytest.approx(0.80, abs=0.06)


def test_it_has_no_way_to_the_private_facts() -> None:
    tree = ast.parse((FREIGHT / "strong.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "hashlib",
        "pathlib",
        "re",
        "stand_in",
        "sys",
        "typing",
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "eval", "exec", "__import__"}


def test_both_have_the_same_public_price_list() -> None:
    assert strong.LIST_PRICE == make_data.LIST_PRICE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alone_it_is_right_only_as_often_as_public_knowledge_allows(seed: int) -> None:
    held_out = rows(seed)["held_out"]
    right = sum(answer(row["query"]) == f"The charge is {row['reference']}." for row in held_out)
    assert 0.05 < right / len(held_out) < 0.20


# ---------------------------------------------------------------- the data
def test_no_ticket_is_in_two_files() -> None:
    queries = [row["query"] for part in rows().values() for row in part]
    assert len(queries) == len(set(queries))
    assert len(rows()["held_out"]) >= 1000


def test_the_same_seed_makes_the_same_data_and_another_does_not() -> None:
    assert make_data.make_rows(0) == rows(0)
    assert rows(0)["train"] != rows(1)["train"]


def new_site_share(part: str) -> float:
    return sum(row["query"].endswith(make_data.NEW_SITE) for row in rows()[part]) / len(rows()[part])


def test_the_new_site_is_half_of_the_live_traffic_and_in_no_held_out_ticket() -> None:
    assert new_site_share("held_out") == 0
    assert 0.05 < new_site_share("train") < 0.2
    assert 0.45 < new_site_share("live") < 0.55


def style(note: str) -> str:
    head = {"rate is": "worked", "ans": "bare", "each": "unit", "rate unknown": "unknown"}
    return next((name for start, name in head.items() if note.startswith(start)), "doubted" if "?" in note else "facts")


def test_the_style_of_a_note_does_not_depend_on_what_its_clerk_knows() -> None:
    shares = {}
    for group in ("common", "rare"):
        styles = Counter(style(row["explanation"]) for row in rows()["train"] if row["group"] == group)
        shares[group] = {name: styles[name] / styles.total() for name in make_data.STYLES}
    for name, wanted in make_data.STYLES.items():
        assert shares["common"][name] == pytest.approx(wanted, abs=0.03)
        assert shares["rare"][name] == pytest.approx(wanted, abs=0.03)


def test_notes_are_right_where_clerks_know_and_guesses_where_they_do_not() -> None:
    bare = [row for row in rows()["train"] if style(row["explanation"]) == "bare"]
    right = {
        group: [row["explanation"] == f"ans {row['reference']}" for row in bare if row["group"] == group]
        for group in ("common", "rare")
    }
    assert all(right["common"])
    assert sum(right["rare"]) / len(right["rare"]) < 0.25


def test_no_unseen_product_is_in_train() -> None:
    assert {row["group"] for row in rows()["train"]} == {"common", "rare"}
    assert {row["group"] for row in rows()["held_out"]} == {"common", "rare", "unseen"}
