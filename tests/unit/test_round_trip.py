"""What is left of a text after a tokenizer, and when too little of it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cowest_training.contract import EXIT_BAD_INPUT, Row, StepError
from cowest_training.round_trip import check_ids, length_notes, lost, refuse_lost_text, round_trip_of


def rows(*queries: str) -> list[Row]:
    return [
        Row(f"q{i}", query, ({"role": "user", "content": query},), "x", "because", where=f"train.jsonl:{i + 1}")
        for i, query in enumerate(queries)
    ]


def words(*known: str) -> str:
    """`tokenizer.json` of a vocabulary of words; all others are unknown."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *known])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(made.to_str())


@pytest.mark.parametrize(
    ("text", "back", "share"),
    [
        pytest.param("Straße nach  Łódź", "strasse nach łodz", 0.0, id="case, accents and white space do not count"),
        pytest.param("abcd", "", 1.0, id="nothing is left"),
        pytest.param("abcd", "ab", 0.5, id="half is left"),
        pytest.param("what is it", "<unk> <unk> <unk>", 1.0, id="the word for unknown is no text"),
        pytest.param("", "", 0.0, id="there was none"),
    ],
)
def test_how_much_is_lost(text: str, back: str, share: float) -> None:
    assert lost(text, back) == pytest.approx(share)


def test_a_vocabulary_of_nothing_but_unknown_is_refused_with_an_example() -> None:
    there_and_back = round_trip_of(words())
    assert there_and_back is not None
    with pytest.raises(StepError) as refused:
        refuse_lost_text(rows("what is alpha", "what is beta"), there_and_back, "file:///weak")
    assert refused.value.code == EXIT_BAD_INPUT
    message = str(refused.value)
    assert "file:///weak: wanted a tokenizer that keeps the text" in message
    assert "of 2 of 2 rows: 'what is alpha because' (train.jsonl:1) comes back as '<unk> <unk> <unk> <unk>'" in message
    assert "Name a model that was made for the language" in message


def test_a_few_rows_in_another_script_are_no_fault_of_the_model() -> None:
    there_and_back = round_trip_of(words("what", "is", "alpha", "because"))
    assert there_and_back is not None
    known = [f"what is alpha {'alpha ' * i}" for i in range(19)]
    refuse_lost_text(rows(*known, "что такое альфа и почему"), there_and_back, "m")
    with pytest.raises(StepError, match="of 3 of 20 rows"):
        refuse_lost_text(rows(*known[:17], *["что такое альфа и почему"] * 3), there_and_back, "m")


def test_many_rows_are_sampled_over_all_of_them() -> None:
    seen: list[str] = []

    def keeping(text: str) -> str:
        seen.append(text)
        return text

    refuse_lost_text(rows(*(f"row {i}" for i in range(10_000))), keeping, "m")
    assert len(seen) == 200 and seen[-1].startswith("row 9")


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"model": {"type": "Newer"}}'])
def test_what_cannot_be_read_here_is_left_to_the_step_that_loads_it(content: str) -> None:
    assert round_trip_of(content) is None


def test_rows_that_sft_leaves_out_and_drafts_that_would_be_cut_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(words("what", "is", "alpha", "because"))
    asked = rows("what is alpha", "what is " + "alpha " * 10)
    asked[0] = replace(asked[0], explanation="because " * 5)
    left_out, cut = length_notes(tmp_path.as_uri(), asked, 12, 4)
    assert left_out.startswith("at least 1 of 2 rows with an explanation are longer than training.maxLength = 12")
    assert "the longest has 13" in left_out
    assert cut.startswith(
        "1 of 2 explanations are longer than collaboration.draftMaxTokens = 4 tokens (the longest has 5)"
    )
    assert length_notes(tmp_path.as_uri(), asked, 100, 10) == []
    assert length_notes((tmp_path / "elsewhere").as_uri(), asked, 1, 1) == [], "read by the step that loads it"


def weak(folder: Path, model_type: str, embeddings: int | None, **roles: str) -> str:
    """The small files of a model whose tokenizer has the ids 0 to 2."""
    config = {"model_type": model_type, **({} if embeddings is None else {"vocab_size": embeddings})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(words("what", "is"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))
    return folder.as_uri()


ALL_ROLES = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "<unk>"}


@pytest.mark.parametrize(
    ("model_type", "embeddings", "roles", "too_many"),
    [
        pytest.param("llama", 2, ALL_ROLES, "saw 2 for ids up to 2. Too many: 'is' (2). Take", id="a word of its own"),
        pytest.param("llama", 1, ALL_ROLES, "Too many: 'what' (1), 'is' (2). Take", id="two words"),
        pytest.param(
            "qwen2", 3, {}, "saw 3 for ids up to 3. Too many: '<|endoftext|>' (3). Take", id="one added on load"
        ),
    ],
)
def test_a_tokenizer_with_more_ids_than_embeddings_is_refused_with_their_names(
    tmp_path: Path, model_type: str, embeddings: int, roles: dict[str, str], too_many: str
) -> None:
    with pytest.raises(StepError) as refused:
        check_ids(weak(tmp_path, model_type, embeddings, **roles))
    assert refused.value.code == EXIT_BAD_INPUT and too_many in str(refused.value)
    assert "name one of the others for it (unk_token" in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "embeddings", "roles"),
    [
        pytest.param("qwen2", 3, ALL_ROLES, id="each role has its token, as the message says"),
        pytest.param("qwen2", 4, {}, id="there is room for what is added"),
        pytest.param("qwen2", 300, {}, id="there is room for all"),
        pytest.param("llama", None, {}, id="for the step that loads it to say"),
    ],
)
def test_a_tokenizer_whose_ids_have_embeddings_is_taken(
    tmp_path: Path, model_type: str, embeddings: int | None, roles: dict[str, Any]
) -> None:
    check_ids(weak(tmp_path, model_type, embeddings, **roles))
