"""DPO with shared prompts against TRL's own way: the same losses, gradients and weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import DPOConfig, DPOTrainer

from cowest_training.shared_prompt import SharedPromptDPOTrainer, groups_of, row_of
from tests.loop.tiny_models import make_model

WORDS = 97
WINDOW = 16


def llama() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **shape))


def qwen2() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=WORDS, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    return Qwen2ForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=128, n_embd=32, n_layer=3, n_head=4))


def mistral() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=WORDS, num_key_value_heads=2, sliding_window=WINDOW, **shape)
    return MistralForCausalLM(config)


def gpt_neo() -> Any:
    """Its window has a name of its own."""
    shape = {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=WORDS, max_position_embeddings=128, window_size=WINDOW, **shape))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP_HALF = LoraConfig(r=4, target_modules=LINEAR, layers_to_transform=[2, 3], layers_pattern="layers")
CASES = [
    pytest.param(llama, None, 0, id="Llama, all weights"),
    pytest.param(qwen2, TOP_HALF, 2, id="Qwen2, adapters on the top half"),
    pytest.param(qwen2, LoraConfig(r=4, target_modules="all-linear"), 0, id="Qwen2, adapters on all layers"),
    pytest.param(gpt2, None, 0, id="GPT-2, learnt positions"),
]


Examples = list[dict[str, list[int]]]


def examples(pairs: int = 12, prompts: tuple[int, int] = (1, 40), drafts: tuple[int, int] = (1, 12)) -> Examples:
    chance = torch.Generator().manual_seed(1)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=chance))
        return torch.randint(3, WORDS, (length,), generator=chance).tolist()

    return [
        {"prompt_ids": some(*prompts), "chosen_ids": some(*drafts), "rejected_ids": some(*drafts)} for _ in range(pairs)
    ]


SHORT = examples(8, prompts=(1, 5), drafts=(1, 5))  # also as rows they fit into the window
LONG = examples(4, prompts=(30, 40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("tokens"), ["a b"]))


class Tokenised:
    """The data are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class Theirs(Tokenised, DPOTrainer):
    pass


class Ours(Tokenised, SharedPromptDPOTrainer):
    pass


def trainer_of(
    kind: Any, make: Any, peft: Any, folder: Path, tokenizer: Any, data: Dataset | None = None, **options: Any
) -> Any:
    """`options`: of DPOConfig; on the processor and in float32 unless told."""
    options = {"use_cpu": True, "bf16": False, **options}
    torch.manual_seed(0)
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=0.05, optim="sgd",
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], precompute_ref_log_probs=True, seed=0, **options,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = data or Dataset.from_list(examples())
    # TRL keeps the reference's log-probabilities by data and weights: each kind must make its own.
    data = data.add_column("whose", [f"{kind.__name__} {options}"] * len(data))
    return kind(model=make(), args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft)


@pytest.mark.parametrize(("make", "peft", "frozen"), CASES)
def test_three_epochs_give_the_same_losses_and_weights_either_way(
    make: Any, peft: Any, frozen: int, tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for kind in (Theirs, Ours):
        trainer = trainer_of(kind, make, peft, tmp_path, tokenizer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
        reference = trainer.train_dataset["ref_chosen_logps"][:]
        found.append((losses, weights, reference))
    (theirs, their_weights, their_reference), (ours, our_weights, our_reference) = found
    assert not trainer.shared.differs
    assert (trainer.shared.kept.hits > 24) is bool(frozen), "each pair once in the reference's pass, once an epoch"
    assert our_reference == pytest.approx(their_reference, abs=1e-4)
    assert len(theirs) == 9 and ours == pytest.approx(theirs, abs=1e-4)
    for name, weight in their_weights.items():
        assert torch.allclose(our_weights[name], weight, atol=2e-4), name


@pytest.mark.parametrize(("make", "peft", "frozen"), CASES)
def test_gradients_point_the_same_way(make: Any, peft: Any, frozen: int, tmp_path: Path, tokenizer: Any) -> None:
    trainer = trainer_of(Ours, make, peft, tmp_path, tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.model.train()
    found = []
    for share in (False, True):
        trainer.model.zero_grad()
        with trainer.sharing() if share else nullcontext():
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
        grads = [w.grad.flatten() for w in trainer.model.parameters() if w.requires_grad and w.grad is not None]
        found.append((float(loss), torch.cat(grads)))
    (loss, theirs), (same, ours) = found
    assert same == pytest.approx(loss, abs=1e-5)
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.99999


def test_a_model_that_gives_something_else_in_one_row_is_run_in_trls_way(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Any:
        model = gpt2()
        backbone = model.transformer.forward
        model.transformer.forward = lambda *args, position_ids=None, **kwargs: backbone(*args, **kwargs)
        return model

    trainer = trainer_of(Ours, make, None, tmp_path, tokenizer)
    trainer.train()
    assert trainer.shared.differs and trainer.shared.checked == (0, 0)
    assert "TRL's own way is kept" in caplog.text


@pytest.mark.parametrize(
    ("make", "pairs", "shares"),
    [
        pytest.param(mistral, SHORT + LONG, True, id="Mistral, short batches first"),
        pytest.param(mistral, LONG + SHORT, True, id="Mistral, a long batch first"),
        pytest.param(gpt_neo, SHORT + LONG, True, id="GPT-Neo, short batches first"),
        pytest.param(gpt_neo, LONG + SHORT, False, id="GPT-Neo, a long batch first"),
    ],
)
def test_what_does_not_fit_into_a_window_is_run_in_trls_way_whatever_came_before(
    make: Any, pairs: Examples, shares: bool, tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for kind in (Theirs, Ours):
        trainer = trainer_of(kind, make, None, tmp_path, tokenizer, Dataset.from_list(pairs))
        reference = [trainer.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((reference, losses))
    (their_reference, theirs), (our_reference, ours) = found
    assert our_reference == [pytest.approx(side, abs=1e-4) for side in their_reference]
    assert len(theirs) == 9 and ours == pytest.approx(theirs, abs=1e-4)
    longest, _ = trainer.shared.checked
    assert longest <= WINDOW and (longest > 0) is shares
    assert trainer.shared.differs is (make is gpt_neo)


@pytest.mark.parametrize("make", [mistral, gpt_neo])
def test_a_reference_from_the_cache_of_an_earlier_run_is_that_of_the_policy(
    make: Any, tmp_path: Path, tokenizer: Any
) -> None:
    Dataset.from_list(SHORT + LONG).save_to_disk(tmp_path / "pairs")
    trainers = [
        trainer_of(Ours, make, None, tmp_path, tokenizer, Dataset.load_from_disk(tmp_path / "pairs")) for _ in range(2)
    ]
    assert [trainer.shared.checked > (0, 0) for trainer in trainers] == [True, False], "the second finds it"
    trainers[1].train()
    margins = [entry["rewards/margins"] for entry in trainers[1].state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5), "nothing is learnt yet"


# ---------------------------------------------------------------- rows
def test_the_second_draft_sees_the_prompt_and_not_the_first_draft() -> None:
    row = row_of(torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9]), prompt=2)
    assert row.ids.tolist() == [5, 6, 7, 8, 6, 9]
    assert row.positions.tolist() == [0, 1, 2, 3, 1, 2]
    assert [index.tolist() for index in row.scored()] == [[1, 2], [4]]
    assert [line.nonzero().flatten().tolist() for line in row.may_see()][-2:] == [[0, 4], [0, 4, 5]]


def test_groups_have_little_padding_and_each_row_once() -> None:
    sizes = [100, 10, 98, 11, 99, 9, 5000, 4900]
    groups = groups_of(sizes)
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert groups == [[6], [7], [0, 4, 2], [3, 1, 5]] or groups == [[6], [7], [0, 4, 2], [3, 1], [5]]
