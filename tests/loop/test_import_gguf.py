"""A GGUF file becomes a folder that can be tuned: a tiny Llama made on the spot, as llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cowest_serving.generate import render_prompt
from cowest_serving.model_files import check_model_folder, model_digest
from cowest_training import tuning
from cowest_training.contract import EXIT_OK, StepError
from cowest_training.import_gguf import answer, import_gguf, main

# Where the file names no unknown token, transformers takes <|endoftext|> for it.
CONTROL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
TOKENS = (*bytes_to_unicode().values(), "an", *CONTROL)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=len(TOKENS) - 1,
)
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


class Written(NamedTuple):
    file: Path
    model: LlamaForCausalLM


def write_gguf(file: Path, kind: gguf.GGMLQuantizationType = Q8_0) -> Written:
    """Norms stay floats, as they always do."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(SHAPE)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(SHAPE.max_position_embeddings)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_block_count(SHAPE.num_hidden_layers)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.num_attention_heads)
    writer.add_head_count_kv(SHAPE.num_key_value_heads)
    writer.add_rope_dimension_count(SHAPE.hidden_size // SHAPE.num_attention_heads)
    writer.add_layer_norm_rms_eps(SHAPE.rms_norm_eps)
    writer.add_vocab_size(SHAPE.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in TOKENS])
    writer.add_token_merges(["a n"])
    writer.add_eos_token_id(SHAPE.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weights = permuted(name, tensor.numpy())
        as_written = kind if weights.ndim == 2 else F32
        data = gguf.quantize(weights, as_written)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=as_written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(file, model)


def permuted(name: str, weights: Any) -> Any:
    """llama.cpp rotates neighbours, where transformers rotates halves."""
    heads = {"q_proj": SHAPE.num_attention_heads, "k_proj": SHAPE.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weights
    rows, columns = weights.shape
    return np.ascontiguousarray(weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


@pytest.mark.parametrize(("kind", "loss"), [pytest.param(F32, 0.0, id="floats"), pytest.param(Q8_0, 0.01, id="Q8_0")])
def test_a_gguf_becomes_a_folder_of_floats_with_the_same_weights(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, loss: float
) -> None:
    written, out = write_gguf(tmp_path / "model.gguf", kind), tmp_path / "models" / "base"
    assert import_gguf(written.file, out) == model_digest(out)
    check_model_folder(out)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (out, *out.iterdir())), "by the pods that share it too"
    config = (out / "config.json").read_text()
    assert "quantization_config" not in json.loads(config) and str(tmp_path) not in config
    found = tuning.load_merged(out, torch.float32).state_dict()
    assert found.keys() == written.model.state_dict().keys()
    for name, weights in written.model.state_dict().items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], weights, rtol=0.0, atol=loss * float(weights.abs().max()))


def test_its_tokenizer_keeps_control_tokens_whole_and_has_the_chat_template(tmp_path: Path) -> None:
    out = tmp_path / "base"
    import_gguf(write_gguf(tmp_path / "model.gguf").file, out)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    text = render_prompt(tokenizer, [{"role": "user", "content": "an égal"}])
    assert text == "<|user|>an égal<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [TOKENS[i] for i in ids] == ["<|user|>", "an", "Ġ", "Ã", "©", "g", "a", "l", "<|end|>", "<|assistant|>"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token == "<|end|>"


def test_the_imported_model_is_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, out = write_gguf(tmp_path / "model.gguf"), tmp_path / "base"
    assert main(["--gguf", str(written.file), "--out", str(out), "--probe", "an?"]) == EXIT_OK
    said = capsys.readouterr().out
    assert said == f"{model_digest(out)}\nan?\n{answer(out, 'an?')}\n"


@pytest.mark.parametrize("content", [None, b"", b"GGML and more"], ids=["no file", "an empty file", "another format"])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StepError, match=f"wanted a GGUF file, saw none at {file}"):
        import_gguf(file, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").touch()
    with pytest.raises(StepError, match="wanted a folder that is not there yet"):
        import_gguf(write_gguf(tmp_path / "model.gguf").file, tmp_path / "base")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["mine"]


def test_a_file_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf").file
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(Exception):  # noqa: B017  (what the reader of the file says)
        import_gguf(file, tmp_path / "models" / "base")
    assert list((tmp_path / "models").iterdir()) == []
