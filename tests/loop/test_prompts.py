"""Whether a weak model can be asked the rows: its chat template takes them and its context has room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.loadable import Reader, check_loadable
from cowest_training.contract import EXIT_BAD_INPUT, Row, StepError
from cowest_training.prompts import HELD_OUT, TRAIN, Asked, check_prompts
from tests.loop.tiny_models import make_model

ALONE = DEFAULT_PROMPTS["Answer"]  # the query and nothing else
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def rows(*queries: str, system: bool = False) -> list[Row]:
    head = ({"role": "system", "content": "be brief"},) if system else ()
    return [
        Row(f"q{i}", query, (*head, {"role": "user", "content": query}), "x", where=f"rows.jsonl:{i + 1}")
        for i, query in enumerate(queries)
    ]


def asked(**values: Any) -> Asked:
    return Asked(**{"prompts": ALONE, "draft_max_tokens": 4, "max_length": 1000, **values})


@pytest.fixture
def weak(tmp_path: Path) -> Path:
    return make_model(tmp_path / "weak", ["what is alpha beta"])


def reader_of(folder: Path, template: str = "") -> Reader:
    if template:
        (folder / "chat_template.jinja").write_text(template)
    reader = check_loadable(folder)
    assert reader is not None
    return reader


def test_rows_that_the_template_takes_are_no_matter(weak: Path) -> None:
    found = {TRAIN: rows("what is alpha", "what is beta"), HELD_OUT: rows("alpha", system=True)}
    assert check_prompts(str(weak), found, asked(), reader_of(weak)) == []


def test_a_template_that_refuses_some_rows_is_said_with_its_reason(weak: Path) -> None:
    held_out = [*rows("alpha", "beta"), *rows("what is alpha", system=True)]
    (note,) = check_prompts(str(weak), {TRAIN: rows("is"), HELD_OUT: held_out}, asked(), reader_of(weak, NO_SYSTEM))
    assert note.startswith("1 of 3 held-out rows that were looked at are refused by the weak model's chat template")
    assert "no system role here" in note


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_a_template_that_refuses_all_rows_of_a_file_is_an_error(weak: Path, name: str) -> None:
    with pytest.raises(StepError, match=f"takes the {name} rows, saw one that refuses all 2 .*no system role") as error:
        check_prompts(str(weak), {name: rows("alpha", "beta", system=True)}, asked(), reader_of(weak, NO_SYSTEM))
    assert error.value.code == EXIT_BAD_INPUT and str(weak) in str(error.value)


def test_a_template_that_leaves_the_question_out_is_an_error(weak: Path) -> None:
    with pytest.raises(
        StepError, match=r"same prompt for 'alpha' \(rows.jsonl:1\) and 'beta' \(rows.jsonl:2\): 'user'"
    ):
        check_prompts(str(weak), {TRAIN: rows("alpha", "beta")}, asked(), reader_of(weak, "{{ messages[0].role }}"))


def test_questions_that_differ_in_white_space_alone_may_render_alike(weak: Path) -> None:
    trims = reader_of(weak, "{{ messages[-1].content | trim }}")
    assert check_prompts(str(weak), {TRAIN: rows("alpha", " alpha  ")}, asked(), trims) == []


def test_rows_that_are_no_text_are_not_rendered(weak: Path) -> None:
    image = Row(
        "i", "see", ({"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "see"}]},), ""
    )
    assert check_prompts(str(weak), {TRAIN: [image]}, asked(), reader_of(weak, "{{ raise_exception('no') }}")) == []


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_prompts_beyond_the_context_are_counted_with_the_words_of_prompt_and_template(
    tmp_path: Path, name: str
) -> None:
    weak = make_model(tmp_path / "weak", ["alpha"], max_position_embeddings=12)
    found = {name: rows("alpha", "alpha " * 7)}  # 7 words, 4 of the template: 1 token is left
    assert check_prompts(str(weak), found, asked(), reader_of(weak)) == []
    found = {name: rows("alpha", "alpha " * 8)}
    (note,) = check_prompts(str(weak), found, asked(), reader_of(weak))
    assert note.startswith(
        f"1 of 2 {name} rows that were looked at have prompts as long as the weak model's context of"
    )
    assert "12 tokens (the longest has 12) or longer" in note
    with pytest.raises(StepError, match="or longer in all 2 that were looked at: the weak model can draft nothing"):
        longer = asked(prompts=DEFAULT_PROMPTS["Explanation"])
        check_prompts(str(weak), found, longer, reader_of(weak))


def test_a_limit_of_tuning_that_leaves_rows_out_is_said_and_one_that_leaves_none_is_refused(weak: Path) -> None:
    found = {TRAIN: rows("alpha", "alpha beta alpha"), HELD_OUT: rows("what is alpha beta alpha beta")}
    (note,) = check_prompts(str(weak), found, asked(max_length=7), reader_of(weak))
    assert note.startswith("1 of 2 training rows that were looked at have prompts as long as training.maxLength = 7")
    with pytest.raises(StepError, match=r"Raise training\.maxLength"):
        check_prompts(str(weak), found, asked(max_length=5), reader_of(weak))
    assert check_prompts(str(weak), found, asked(max_length=5, is_tuned=False), reader_of(weak)) == []


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_without_the_library_the_small_files_say_what_has_no_room(weak: Path, name: str) -> None:
    (weak / "config.json").write_text(json.dumps({name: 4}))
    found = {HELD_OUT: rows("alpha", "what is alpha beta")}
    bound, beyond = check_prompts(weak.as_uri(), found, asked(), None)
    assert bound.startswith("collaboration.draftMaxTokens = 4 leaves a prompt no room")
    assert "(the longest has 4, without the chat template's own words)" in beyond
    with pytest.raises(StepError, match="held-out rows that leave a draft room"):
        check_prompts(weak.as_uri(), {HELD_OUT: rows("what is alpha beta")}, asked(), None)
    (weak / "config.json").unlink()
    assert check_prompts(weak.as_uri(), found, asked(), None) == [], "for the step that loads it to say"
