"""A strong model that becomes another one while it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import Call, ScriptedModel
from tests.loop import asking_world as world
from tests.loop.test_feedback import Step


# ---------------------------------------------------------------- a strong model that is swapped
@pytest.fixture
def strong() -> Iterator[ScriptedModel]:
    with ScriptedModel(world.strong_answer).in_thread() as server:
        yield server


def swap(strong: ScriptedModel, after: int) -> None:
    """From some answer on it is another model."""

    def answer(call: Call) -> str:
        if len(strong.paid) >= after:
            strong.version = "fp_2"
        return world.strong_answer(call)

    strong.answers = answer


def test_a_strong_model_swapped_in_the_middle_of_a_round_is_noticed(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    swap(strong, after=16)
    seen = step.run().metrics["strong"]
    assert seen["change"].startswith("fp_1 for ") and seen["change"].endswith(" answers, then fp_2")
    assert (seen["first"], seen["last"]) == (["fp_1"], ["fp_2"])


def test_a_strong_model_that_stays_is_no_news(tmp_path: Path, strong: ScriptedModel) -> None:
    assert Step(tmp_path, strong).run().metrics["strong"] == {"first": ["fp_1"], "last": ["fp_1"], "change": ""}


def test_what_it_answered_before_it_changed_is_paid_for_anew(tmp_path: Path, strong: ScriptedModel) -> None:
    step = Step(tmp_path, strong)
    first = step.run("one").metrics
    assert step.run("two", round_number=2).metrics["strong_calls"] < first["strong_calls"], "solo answers are known"
    step.start("three", 2, generation=1)
    assert step.manifest("three").metrics["strong_calls_cached"] == 0
