"""The coding desk is honest: its codes are real, its splits disjoint, and its stand-in knows grammar, not the list."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ICD10 = Path(__file__).parents[2] / "crds/examples/icd10"
pytest.importorskip("simple_icd_10_cm")


@cache
def load(name: str) -> ModuleType:
    """A script of the domain, under a name of its own: every domain has a strong.py and a make_data.py."""
    spec = importlib.util.spec_from_file_location(f"icd10_{name}", ICD10 / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[f"icd10_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strong, make_data = load("strong"), load("make_data")


@cache
def rows() -> dict[str, list[dict[str, str]]]:
    return dict(make_data.make_rows(0, (2000, 600, 700, 300)))


@cache
def stems() -> dict[str, str]:
    """Code -> stem, for the codes of the desk."""
    return {case.code: family.stem for family in make_data.families(0) for case in make_data.cases_of(family)}


def answer(note: str, draft: str | None = None, taste: str = "standard") -> str:
    text = note if draft is None else f"{note}\n---\nNotes.\n<draft>\n{draft}\n</draft>"
    return str(strong.TASTES[taste]([{"role": "user", "content": text}])).removeprefix("Code: ")


# ---------------------------------------------------------------- the stand-in
DOUBTING = next(n for age in range(3, 90) if not strong.trusts(n := f"{age} f : boil of limb , rt", 0.7))
TRUSTING = next(n for age in range(3, 90) if strong.trusts(n := f"{age} f : boil of limb , rt", 0.6))
KNOWN = "9 f : abrasion of elbow , left is fine, it is the other side , dressing change"


@pytest.mark.parametrize(
    ("taste", "note", "draft", "code"),
    [
        pytest.param("standard", KNOWN, None, "S50.311D", id="alone: what it remembers, in the grammar of codes"),
        pytest.param("standard", TRUSTING, None, "R69", id="alone: does not know the category"),
        pytest.param("standard", TRUSTING, "category L02.42", "L02.421", id="completes a stem"),
        pytest.param(
            "standard", TRUSTING, "category L02.42 ?", "L02.421", id="takes a doubted stem for want of better"
        ),
        pytest.param("standard", KNOWN, "category S40.81 ?", "S50.311D", id="prefers what it knows to a doubted stem"),
        pytest.param("standard", KNOWN, "category S40.81", "S40.811D", id="a confident wrong stem misleads it"),
        pytest.param("standard", KNOWN, "category unknown", "S50.311D", id="falls back when nothing is claimed"),
        pytest.param("standard", TRUSTING, "so the code is L02.422", "L02.422", id="trusting: adopts a wrong code"),
        pytest.param("standard", DOUBTING, "so the code is L02.421", "R69", id="doubting: leaves a right code aside"),
        pytest.param("terse", TRUSTING, "code L02.421", "L02.421", id="terse takes over a bare code"),
        pytest.param("terse", TRUSTING, "this is boil ; so the code is L02.421", "R69", id="terse gets lost in prose"),
        pytest.param("terse", TRUSTING, "right ; so category L02.42", "R69", id="terse gets lost in a stem with words"),
        pytest.param("sceptic", TRUSTING, "so the code is L02.422", "L02.421", id="sceptic rebuilds a code's end"),
        pytest.param("sceptic", TRUSTING, "category L02.42", "L02.421", id="sceptic: a stem is as good"),
        pytest.param("sceptic", TRUSTING, "category L02.42 ?", "L02.421", id="sceptic: doubt changes nothing"),
        pytest.param("sceptic", KNOWN, "category S40.81", "S50.311D", id="sceptic goes by what it knows"),
    ],
)
def test_each_taste_answers_by_its_rule(taste: str, note: str, draft: str | None, code: str) -> None:
    assert answer(note, draft, taste) == code


@pytest.mark.parametrize(
    ("stem", "note", "code"),
    [
        pytest.param("S50.0", "contusion , on the l , follow-up", "S50.02XD", id="X holds an empty place"),
        pytest.param("T46.1", "poisoning , mixed up the bottles , years ago, consequences", "T46.1X1S", id="intent"),
        pytest.param("T63.03", "venom , an attack , happened today", "T63.033A", id="intent after a long stem"),
        pytest.param("H60.1", "ear , both sides , follow-up", "H60.13", id="no visit character outside injuries"),
        pytest.param("S52.21", "greenstick , rt , cast check, in two pieces", "S52.211K", id="nonunion"),
        pytest.param("O22.0", "last period 2026-01-01 , seen 2026-04-08", "O22.01", id="13 weeks 6 days: first"),
        pytest.param("O22.0", "last period 2026-01-01 , seen 2026-04-09", "O22.02", id="14 weeks 0 days: second"),
        pytest.param("O22.0", "last period 2026-01-01 , seen 2026-07-16", "O22.03", id="28 weeks 0 days: third"),
    ],
)
def test_the_stand_in_knows_the_grammar_of_codes(stem: str, note: str, code: str) -> None:
    reading = strong.read(note)
    assert strong.assemble(stem, reading) == code
    assert strong.stem_of(code, reading) == stem


def test_with_the_right_stem_the_stand_in_codes_every_note_right() -> None:
    wrong = [
        row
        for row in rows()["held_out"]
        if answer(row["query"], f"category {stems()[row['reference']]}") != row["reference"]
    ]
    assert len(wrong) <= 0.01 * len(rows()["held_out"]), wrong[:3]


def test_the_stand_in_alone_knows_a_minor_part() -> None:
    held_out = rows()["held_out"]
    assert 0.1 <= sum(answer(row["query"]) == row["reference"] for row in held_out) / len(held_out) <= 0.32


def test_the_stand_in_reads_neither_the_list_nor_the_data() -> None:
    tree = ast.parse((ICD10 / "strong.py").read_text("utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert modules == {
        "__future__",
        "collections",
        "dataclasses",
        "datetime",
        "hashlib",
        "pathlib",
        "re",
        "stand_in",
        "sys",
        "typing",
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "exec", "eval", "__import__"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"read_text", "read_bytes", "open", "import_module"}


# ---------------------------------------------------------------- the data
def test_every_reference_is_a_billable_code_of_the_real_list() -> None:
    for row in [row for part in rows().values() for row in part]:
        assert make_data.icd.is_leaf(row["reference"]) and make_data.icd.is_valid_item(row["reference"])


def test_the_same_seed_makes_the_same_rows_and_another_seed_others() -> None:
    again = make_data.make_rows(0, (50, 20, 20, 20))
    assert again == make_data.make_rows(0, (50, 20, 20, 20))
    assert again != make_data.make_rows(1, (50, 20, 20, 20))


def test_no_query_and_no_combination_of_condition_and_attributes_is_in_two_files() -> None:
    queries = [row["query"] for part in rows().values() for row in part]
    assert len(set(queries)) == len(queries)
    parts = {name: {(term_of(row["query"]), row["reference"]) for row in part} for name, part in rows().items()}
    assert not parts["train"] & parts["held_out"] and not parts["train"] & parts["live"]
    assert not parts["held_out"] & parts["live"]


def term_of(note: str) -> str:
    return re.split(r" [:,] ", note)[1]


def test_the_style_of_an_explanation_says_nothing_of_the_family() -> None:
    """Each style has its share among common and among rare families, within four standard errors."""
    taught = [row for row in rows()["train"] if "explanation" in row]
    shares = {
        group: Counter(style_of(row["explanation"]) for row in taught if row["group"] == group)
        for group in ("common", "rare")
    }
    total = {group: sum(count.values()) for group, count in shares.items()}
    for style, (share, _) in make_data.STYLES.items():
        for group in total:
            spread = 4 * (share * (1 - share) / total[group]) ** 0.5
            assert abs(shares[group][style] / total[group] - share) <= spread, (style, group)


def style_of(text: str) -> str:
    if text.startswith("code "):
        return "bare"
    if "the code is" in text:
        return "verbose"
    return "unknown" if "unknown" in text else "hedged" if text.endswith("?") else "stem"


def test_an_unseen_family_is_in_no_supervised_row_and_a_rare_one_in_a_few() -> None:
    taught = Counter(stems()[row["reference"]] for row in rows()["train"] if "explanation" in row)
    by_tier = {tier: [f.stem for f in make_data.families(0) if f.tier == tier] for tier in ("common", "rare", "unseen")}
    assert by_tier["unseen"] and not any(taught[stem] for stem in by_tier["unseen"])
    assert by_tier["rare"] and max(taught[stem] for stem in by_tier["rare"]) <= make_data.RARE_ROWS


def test_users_are_warned_wherever_they_meet_the_domain() -> None:
    for name in ("README.md", "make_data.py", "strong.py", "job.yaml"):
        assert "never for clinical use" in (ICD10 / name).read_text("utf-8").casefold(), name
