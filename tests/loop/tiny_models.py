"""Tiny weak models made on the spot: a Llama of some ten thousand parameters over a vocabulary of words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>", "<end>"]


def make_model(folder: Path, texts: Iterable[str], *, seed: int = 0, chat: bool = True, **config: Any) -> Path:
    """A saved model and tokenizer that know the words of `texts`. Every seed gives other weights."""
    logging.disable_progress_bar()  # what a test reads is what our own code says
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(seed)
    options = {**shape, **ids, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **{**options, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
