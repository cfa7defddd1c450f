"""What cannot be loaded is refused by its small files and headers, and what can be loaded is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cowest_serving.generate import load_model
from cowest_serving.loadable import check_loadable
from cowest_serving.model_files import ModelFolderError
from tests.loop.tiny_models import make_model

Change = Callable[[Path], object]


def configured(**values: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def sharded(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert not (folder / "model.safetensors").exists()


def without_head(folder: Path) -> None:
    """Tied weights are saved once."""
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(without_head, id="a tied head"),
        pytest.param(sharded, id="shards"),
        pytest.param(configured(num_hidden_layers=1), id="more weights than are wanted"),
        pytest.param(configured(architectures=["OtherForCausalLM"]), id="a class that nothing goes by"),
        pytest.param(configured(eos_token_id=5000), id="an end that is never written"),
        pytest.param(configured(auto_map={"AutoModel": "own.Model"}), id="code of its own that is not needed"),
    ],
)
def test_what_loads_is_taken(tmp_path: Path, change: Change) -> None:
    folder = make_model(tmp_path / "weak", ["alpha beta"])
    change(folder)
    reader = check_loadable(folder)
    assert reader is not None and reader.context == 64
    load_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            configured(hidden_size=32),
            r"saw \d+ of other shapes \(model\.embed_tokens\.weight: \[10, 64\] in the weights, \[10, 32\] by config",
            id="another width",
        ),
        pytest.param(
            configured(num_hidden_layers=3), r"saw 9 missing \(model\.layers\.2\.input_layernorm\.weight", id="a layer"
        ),
        pytest.param(configured(model_type="bert"), "wanted all weights of BertLMHeadModel", id="another architecture"),
        pytest.param(configured(tie_word_embeddings=False), r"1 missing \(lm_head\.weight\)", id="a head"),
        pytest.param(configured(model_type="t5"), "saw the architecture t5 .*, which is none", id="no causal LM"),
        pytest.param(configured(model_type="strange"), "the unknown architecture strange", id="an unknown one"),
        pytest.param(
            configured(model_type="strange", auto_map={"AutoConfig": "own.C"}), "never run", id="code of its own"
        ),
        pytest.param(configured(hidden_act="strange"), "saw KeyError: 'strange'. Look at its config", id="a function"),
        pytest.param(configured(num_attention_heads=5), "not a multiple", id="what does not divide"),
        pytest.param(configured(pad_token_id=5000), "Padding_idx must be within", id="an id beyond"),
        pytest.param(lambda f: (f / "tokenizer.json").write_text("{}"), "wanted a tokenizer that", id="no tokenizer"),
        pytest.param(
            lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
            "saw weights.safetensors",
            id="a name",
        ),
    ],
)
def test_what_does_not_load_is_refused_by_the_folder_that_was_named(
    tmp_path: Path, change: Change, message: str
) -> None:
    folder = make_model(tmp_path / "weak", ["alpha beta"])
    change(folder)
    with pytest.raises(ModelFolderError, match=message) as refused:
        check_loadable(folder, named="s3://bucket/weak")
    assert "s3://bucket/weak: wanted" in str(refused.value) and str(tmp_path) not in str(refused.value)
    with pytest.raises(ModelFolderError) as at_load:
        load_model(folder, torch.float32)
    assert "look at the above report" not in str(at_load.value)


def test_no_weight_is_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "weak", ["alpha beta"])
    file = folder / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: 8 + size])
    assert check_loadable(folder) is not None


def test_weights_that_are_packed_are_left_to_the_load(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "weak", ["alpha beta"])
    configured(hidden_size=32, quantization_config={"quant_method": "gptq", "bits": 4})(folder)
    assert check_loadable(folder) is not None


def test_a_copy_of_the_small_files_is_looked_at_without_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "weak", ["alpha beta"])
    (folder / "model.safetensors").unlink()
    assert check_loadable(folder, has_weights=False) is not None
    configured(vocab_size=9)(folder)
    with pytest.raises(ModelFolderError, match="Too many: 'beta'"):
        check_loadable(folder, has_weights=False)


def test_an_adapter_is_as_good_as_its_base(tmp_path: Path) -> None:
    base, adapter = make_model(tmp_path / "base", ["alpha beta"]), tmp_path / "adapter"
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(adapter)
    assert check_loadable(adapter) is not None
    configured(num_hidden_layers=3)(base)
    with pytest.raises(ModelFolderError, match="9 missing"):
        check_loadable(adapter)
