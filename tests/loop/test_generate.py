"""The batch generator, on a real tiny transformer."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from cowest_serving import generate
from cowest_serving.contract import Messages
from cowest_serving.generate import Ask, Generator, Piece, PromptError, prompt_ids, render_prompt
from cowest_serving.model_files import ModelFolderError, model_digest
from tests.loop.tiny_models import make_model

WORDS = [f"w{i}" for i in range(60)]


def make_folder(folder: Path) -> Path:
    # Scores far enough apart that the rounding of another batch changes no choice.
    return make_model(folder, WORDS, chat=False, initializer_range=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("weak"))


@pytest.fixture(scope="module")
def weak(folder: Path) -> Generator:
    return Generator.load(folder, device="cpu", threads=1)


def ask(weak: Generator, prompt: str = "w1 w2 w3", **changes: Any) -> Ask:
    return replace(Ask(weak.encode(prompt), max_tokens=12, temperature=1.0, seed=7), **changes)


def test_greedy_is_what_the_bare_model_finds_likeliest(weak: Generator) -> None:
    (row,) = weak.generate(["w1 w2 w3"], max_tokens=8, temperature=0, seeds=[0])

    ids = weak.encode("w1 w2 w3")
    expected: list[int] = []
    for _ in range(8):
        with torch.inference_mode():
            token = int(weak.model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax())
        if token == 3:
            break
        expected.append(token)
    assert list(row.token_ids) == expected
    assert row.text == weak.tokenizer.decode(expected, skip_special_tokens=True)
    assert row.prompt_tokens == 3


def test_the_same_batch_and_seeds_give_the_same_text_and_other_seeds_do_not(weak: Generator) -> None:
    prompts = ["w1 w2", "w3 w4 w5 w6 w7", "w8"]
    once = weak.generate(prompts, max_tokens=10, temperature=1, seeds=[1, 2, 3])
    again = weak.generate(prompts, max_tokens=10, temperature=1, seeds=[1, 2, 3])
    other = weak.generate(prompts, max_tokens=10, temperature=1, seeds=[4, 5, 6])
    assert once == again
    assert [row.text for row in once] != [row.text for row in other]


def test_a_row_does_not_depend_on_its_neighbours_length_or_settings(weak: Generator) -> None:
    row = ask(weak)
    alone = weak.run([row])[0]
    other = ask(weak, "w9 w10 w11 w12 w13 w14", temperature=0.0, max_tokens=3)
    crowd = weak.run([other, row, ask(weak, "w5", top_p=0.3, seed=1)])[1]
    assert crowd == alone


def test_samples_follow_the_models_own_distribution(weak: Generator) -> None:
    ids = weak.encode("w1 w2 w3")
    with torch.inference_mode():
        wanted = torch.softmax(weak.model(torch.tensor([ids])).logits[0, -1].double() / 0.7, -1)
    rows = weak.run([Ask(ids, 1, 0.7, seed, top_logprobs=0) for seed in range(2000)])
    seen = Counter(row.token_ids[0] if row.token_ids else 3 for row in rows)
    for token, probability in enumerate(wanted.tolist()):
        spread = math.sqrt(2000 * probability * (1 - probability))
        assert abs(seen[token] - 2000 * probability) < 5 * spread + 1, f"token {token}"


def test_top_p_draws_from_the_nucleus_alone(weak: Generator) -> None:
    ids = weak.encode("w1 w2 w3")
    with torch.inference_mode():
        probabilities = torch.softmax(weak.model(torch.tensor([ids])).logits[0, -1].double(), -1)
    ordered = probabilities.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    rows = weak.run([Ask(ids, 1, 1.0, seed, top_p=0.5) for seed in range(300)])
    seen = {row.token_ids[0] if row.token_ids else 3 for row in rows}
    assert seen <= set(ordered.indices[:size].tolist())
    assert len(seen) == size


def test_a_top_p_of_zero_is_greedy(weak: Generator) -> None:
    greedy, narrow = weak.run([ask(weak, temperature=0.0), ask(weak, top_p=0.0)])
    assert narrow.text == greedy.text


def test_each_row_ends_by_its_own_limit(weak: Generator) -> None:
    rows = weak.run([ask(weak, max_tokens=n, temperature=0.0) for n in (1, 4, 9)])
    assert [len(row.token_ids) for row in rows] == [1, 4, 9]
    assert {row.finish_reason for row in rows} == {"length"}


def test_an_end_of_sequence_token_stops_the_row_and_is_no_text(weak: Generator) -> None:
    free = weak.run([ask(weak, temperature=0.0)])[0]
    cut = free.token_ids[4]
    enders, weak.eos_ids = weak.eos_ids, frozenset([cut])
    try:
        row = weak.run([ask(weak, temperature=0.0)])[0]
    finally:
        weak.eos_ids = enders
    assert row.finish_reason == "stop"
    assert row.token_ids == free.token_ids[: free.token_ids.index(cut)]


def test_a_stop_string_ends_before_itself_also_across_tokens(weak: Generator) -> None:
    free = weak.run([ask(weak, temperature=0.0)])[0]
    words = free.text.split()
    stop = f"{words[3]} {words[4]}"
    row = weak.run([ask(weak, temperature=0.0, stop=("never written", stop))])[0]
    assert row.finish_reason == "stop"
    assert row.text == free.text[: free.text.index(stop)]


@pytest.mark.parametrize("stop", [(), ("w1",)], ids=["no stop string", "a stop string that may begin anywhere"])
def test_the_pieces_add_up_to_the_text(weak: Generator, stop: tuple[str, ...]) -> None:
    pieces: dict[int, list[Piece]] = {0: [], 1: []}
    asks = [ask(weak, seed=s, stop=stop, top_logprobs=2, max_tokens=20) for s in (1, 2)]
    rows = weak.run(asks, lambda row, piece: pieces[row].append(piece))
    assert rows == weak.run(asks)
    for index, row in enumerate(rows):
        assert "".join(piece.text for piece in pieces[index]) == row.text
        assert tuple(p for piece in pieces[index] for p in piece.logprobs) == row.logprobs
        assert [piece.finish_reason for piece in pieces[index]][-1] == row.finish_reason
        assert not any(word in row.text for word in stop)


def test_characters_of_several_tokens_are_handed_out_whole(weak: Generator) -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return bytes(tokens).decode(errors="replace")

    row = generate._Row(ask(weak), limit=100, tokenizer=Bytes(), watched=True)
    seen = []
    for token in "aé€b".encode():
        row.take(token, None, frozenset())
        seen.append(row.piece().text)
    assert [text for text in seen if text] == ["a", "é", "€", "b"]


def test_a_listener_that_says_no_gives_up_its_row_only(weak: Generator) -> None:
    rows = weak.run([ask(weak, temperature=0.0), ask(weak, temperature=0.0)], lambda row, _: row == 1)
    assert [row.finish_reason for row in rows] == ["cancelled", "length"]
    assert len(rows[0].token_ids) == 1


def test_logprobs_are_the_models_own_before_temperature(weak: Generator) -> None:
    row = weak.run([ask(weak, temperature=0.3, top_logprobs=3)])[0]
    assert row.logprobs is not None and len(row.logprobs) == len(row.token_ids)
    with torch.inference_mode():
        scores = weak.model(torch.tensor([weak.encode("w1 w2 w3")])).logits[0, -1]
    expected = torch.log_softmax(scores.double(), -1)
    assert row.logprobs[0].logprob == pytest.approx(float(expected[row.token_ids[0]]), abs=1e-4)
    assert [token for token, _ in row.logprobs[0].top] == expected.topk(3).indices.tolist()


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_answer_is_cut(weak: Generator) -> None:
    with pytest.raises(PromptError, match="context is 64 tokens, saw a prompt of 64"):
        weak.generate(["w1 " * 64], max_tokens=1, temperature=0, seeds=[0])
    (row,) = weak.run([ask(weak, "w1 " * 60, max_tokens=50, temperature=0.0)])
    assert len(row.token_ids) <= 4


def test_token_ids_outside_the_vocabulary_are_refused(weak: Generator) -> None:
    with pytest.raises(PromptError, match="token ids from 0"):
        weak.run([Ask([10_000], 1, 0, 0)])


def test_the_folders_own_sampling_defaults_do_not_change_a_draft(tmp_path: Path, weak: Generator) -> None:
    folder = make_folder(tmp_path / "m")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(config))
    changed = Generator.load(folder, device="cpu")
    assert changed.run([ask(weak)]) == weak.run([ask(weak)])


# ---------------------------------------------------------------- prompts
def test_without_a_template_contents_are_joined_by_blank_lines(weak: Generator) -> None:
    messages: Messages = [
        {"role": "system", "content": "a {b}"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    assert render_prompt(weak.tokenizer, messages) == "a {b}\n\nc\n"


def test_a_model_that_can_think_aloud_is_told_not_to(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "chat", WORDS))
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    assert render_prompt(tokenizer, [{"role": "user", "content": "w1"}]) == "<s><user> w1 <end> <assistant> "


def test_a_template_is_used_and_its_special_tokens_are_not_doubled(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "chat", WORDS))
    text = render_prompt(tokenizer, [{"role": "user", "content": "w1"}])
    assert text == "<s><user> w1 <end> <assistant> "
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, text)) == [
        "<s>",
        "<user>",
        "w1",
        "<end>",
        "<assistant>",
    ]


def test_a_template_that_refuses_is_a_prompt_error(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(PromptError, match="no such role"):
        render_prompt(tokenizer, [{"role": "tool", "content": "x"}])


def test_an_empty_prompt_starts_from_the_beginning_of_sequence_token(weak: Generator) -> None:
    assert prompt_ids(weak.tokenizer, "") == [weak.tokenizer.bos_token_id]


# ---------------------------------------------------------------- loading
def test_an_adapter_folder_is_merged_into_its_base(tmp_path: Path, folder: Path, weak: Generator) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    tuned.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(folder)}))

    loaded = Generator.load(tmp_path / "adapter", device="cpu")

    ids = torch.tensor([loaded.encode("w1 w2 w3")])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, tuned.eval()(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(loaded.model(ids).logits, weak.model(ids).logits, atol=1e-2)
    assert loaded.digest == model_digest(tmp_path / "adapter") != weak.digest


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"1 missing .*up_proj"):
        Generator.load(folder, device="cpu")


def test_a_folder_that_wants_code_run_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "code.Strange", "AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(ModelFolderError, match=r"needs code of its own .* is never run") as error:
        Generator.load(folder, device="cpu")
    assert len(str(error.value).splitlines()) == 1


def test_an_architecture_that_nobody_knows_is_named_in_one_sentence(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="the unknown architecture strange") as error:
        Generator.load(folder, device="cpu")
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelFolderError, match="wanted embeddings for all ids"):
        Generator.load(folder, device="cpu")


def test_weights_that_are_not_numbers_are_an_error_not_a_draft(tmp_path: Path) -> None:
    broken = Generator.load(make_folder(tmp_path / "m"), device="cpu")
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        broken.generate(["w1"], max_tokens=1, temperature=0, seeds=[0])
