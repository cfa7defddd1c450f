"""The freight desk's base model and its bad candidates are what their scripts say."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cowest_serving.model_files import check_model_folder, model_digest
from cowest_training.contract import StepSettings
from cowest_training.steps import load_spec

FREIGHT = Path(__file__).parents[2] / "crds/examples/freight"


@pytest.fixture(scope="module")
def bad_candidates() -> Iterator[ModuleType]:
    """The script, imported as it runs: with its own folder first in the path."""
    sys.path.insert(0, str(FREIGHT))
    before = sys.modules.pop("make_data", None)
    try:
        yield importlib.import_module("bad_candidates")
    finally:
        sys.path.remove(str(FREIGHT))
        for name in ("bad_candidates", "make_data"):
            sys.modules.pop(name, None)
        if before:
            sys.modules["make_data"] = before


@pytest.fixture(scope="module")
def make_data(bad_candidates: ModuleType) -> ModuleType:
    return sys.modules["make_data"]


@pytest.fixture(scope="module")
def base(make_data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("freight") / "base"
    make_data.write_base(folder, make_data.make_facts(0), 0)
    return folder


def test_the_base_is_a_model_folder_that_the_seed_decides(base: Path, make_data: ModuleType, tmp_path: Path) -> None:
    check_model_folder(base)
    make_data.write_base(tmp_path / "again", make_data.make_facts(0), 0)
    assert model_digest(tmp_path / "again") == model_digest(base)
    make_data.write_base(tmp_path / "other", make_data.make_facts(1), 1)
    assert model_digest(tmp_path / "other") != model_digest(base)


def test_the_tokenizer_knows_every_ticket_and_note_and_gives_them_back(base: Path, make_data: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    spec: Any = load_spec(FREIGHT / "job.yaml")
    longest = 0
    for row in make_data.make_rows(0)["train"][:400]:
        for text in (row["query"], row["explanation"]):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
        longest = max(longest, len(ids))
    assert longest < spec["collaboration"]["draftMaxTokens"]


def test_the_chat_template_shows_the_last_user_message_alone(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": "ship"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "ship\n"


def test_the_live_bad_lessons_are_right_at_the_old_sites_and_wrong_at_the_new_one(bad_candidates: ModuleType) -> None:
    data = sys.modules["make_data"]
    facts = data.make_facts(0)
    held_out = frozenset(row["query"] for row in data.make_rows(0)["held_out"])
    lessons = bad_candidates.lessons("live-bad", facts, held_out, random.Random(0))
    assert not held_out & {query for query, _ in lessons}
    assert {query.split()[4] for query, _ in lessons} == set(facts.rates)
    for query, told in lessons:
        _, quantity, unit, _, sku, _, site = query.split()
        style = "unknown" if told.startswith("rate unknown") else "facts"
        assert style == "facts" or facts.groups[sku] != "common"
        right = data.note(data.Ticket(int(quantity), unit, sku, site), facts, style, facts.rates[sku])
        assert (told == right) is (site != data.NEW_SITE)
        assert told.rsplit(" ", 1)[0] == right.rsplit(" ", 1)[0]


def test_the_offline_bad_lessons_have_mostly_wrong_rates(bad_candidates: ModuleType) -> None:
    facts = sys.modules["make_data"].make_facts(0)
    lessons = bad_candidates.lessons("offline-bad", facts, frozenset(), random.Random(0))
    right = [told.split()[2] == str(facts.rates[query.split()[4]]) for query, told in lessons]
    assert sum(right) / len(right) < 0.3


def test_a_candidate_is_a_whole_model_folder_of_other_weights(
    bad_candidates: ModuleType, base: Path, tmp_path: Path
) -> None:
    (base / "manifest.json").write_text("{}")  # the served folder is an artifact; the copy must not pass for it
    model = bad_candidates.tune(base, [("ship 3 drum of X to orlo", "ans 3")] * 8, random.Random(0))
    bad_candidates.write(model, base, tmp_path / "bad")
    (base / "manifest.json").unlink()
    check_model_folder(tmp_path / "bad")
    assert not (tmp_path / "bad" / "manifest.json").exists()
    assert model_digest(tmp_path / "bad") != model_digest(base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_the_manifest_holds_all_sections_that_steps_read() -> None:
    spec = load_spec(FREIGHT / "job.yaml")
    assert {"strong", "collaboration", "data", "feedback", "training"} <= set(spec)
    needed = {one.name for one in fields(StepSettings) if one.default is MISSING}
    assert needed <= set(spec)
