"""Weak model and tuning on an accelerator: `make test-gpu`. Other tests hide it, to be the same anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from cowest_serving.contract import Prompts
from cowest_serving.generate import Generator
from cowest_training import dpo, methods, sft, tuning
from tests.loop import tuning_world as world
from tests.loop.test_shared_prompt import Ours, Theirs, qwen2, trainer_of
from tests.loop.test_weak_server import wait_ready
from tests.loop.tiny_models import make_model
from tests.ports import free_port

pytestmark = pytest.mark.gpu

KINDS = pytest.mark.parametrize(("kind", "dtype"), [("Full", torch.float32), ("LoRA", torch.bfloat16)])


@pytest.fixture(scope="module", autouse=True)
def accelerator() -> None:
    assert torch.cuda.is_available(), "these tests want a GPU that torch sees"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), world.TEXTS, initializer_range=0.2)


def saved_as(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  # no mapping


# ---------------------------------------------------------------- drafts
def test_drafts_are_those_of_the_processor(base: Path) -> None:
    found = []
    for device in ("cpu", "auto"):
        weak = Generator.load(base, device)
        prompts = [[{"role": "user", "content": query}] for query in world.QUERIES]
        for temperature in (0.0, 1.0):
            seeds = range(len(prompts))
            found.append(weak.generate(prompts, max_tokens=16, temperature=temperature, seeds=seeds, logprobs=True))
    assert weak.model.device.type == "cuda"
    for of_cpu, of_gpu in zip(found[:2], found[2:], strict=True):
        assert [row.token_ids for row in of_gpu] == [row.token_ids for row in of_cpu]
        for one, other in zip(of_gpu, of_cpu, strict=True):
            assert [each.logprob for each in one.logprobs or ()] == pytest.approx(
                [each.logprob for each in other.logprobs or ()], abs=1e-3
            )


def test_the_server_takes_the_gpu_and_answers_many_at_once(base: Path, tmp_path: Path) -> None:
    folder, port = saved_as(base, tmp_path / "half", torch.bfloat16), free_port()
    command = [sys.executable, "-m", "cowest_serving.weak_server", "--model", str(folder), "--port", str(port)]
    free, _ = torch.cuda.mem_get_info()
    with subprocess.Popen(command, text=True) as child:
        try:
            url = f"http://127.0.0.1:{port}"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            wait_ready(child, url)
            assert torch.cuda.mem_get_info()[0] < free, "the model is somewhere else"
            asked: Any = {"model": "weak", "messages": [{"role": "user", "content": world.QUERIES[0]}]}
            answer = client.chat.completions.create(**asked, n=64, max_tokens=12, temperature=1)
            assert len(answer.choices) == 64 and len({choice.message.content for choice in answer.choices}) > 8
            chunks = list(client.chat.completions.create(**asked, max_tokens=8, temperature=0, stream=True))
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        finally:
            child.terminate()
    assert child.returncode == 0


# ---------------------------------------------------------------- tuning
@KINDS
def test_a_tuned_model_writes_the_explanations(base: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    start = saved_as(base, tmp_path / "start", dtype)
    rate, lora = {"Full": "0.003", "LoRA": "0.01"}[kind], {"rank": 16, "alpha": 32, "dropout": "0"}
    settings = world.training(supervised={"tuning": kind, "epochs": 100, "learningRate": rate}, lora=lora)
    metrics = sft.fine_tune(start, world.rows(), Prompts(**world.PROMPTS), settings, world.work(tmp_path))
    assert metrics["loss_last"] < 0.2 < metrics["loss_first"]
    assert dtypes(tmp_path / "model") == dtypes(start), "a model keeps the precision that it came with"
    made = Generator.load(tmp_path / "model").generate(
        [row.messages for row in world.rows()], max_tokens=16, temperature=0, seeds=[0] * len(world.QUERIES)
    )
    assert tuple(one.text.strip() for one in made) == world.GOOD


@KINDS
def test_the_chosen_drafts_get_likelier(base: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    start = saved_as(base, tmp_path / "start", dtype)
    rate = {"Full": "0.001", "LoRA": "0.01"}[kind]
    settings = world.training(preference={"tuning": kind, "epochs": 6, "learningRate": rate})
    metrics = dpo.align(start, world.PAIRS, settings, world.work(tmp_path))
    assert metrics["accuracy_last"] == 1.0 and metrics["margin_last"] > 0
    world.assert_chosen_got_likelier(start, tmp_path / "model")


@KINDS
def test_the_reference_is_the_model_of_the_rounds_start(
    base: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    start = saved_as(base, tmp_path / "start", dtype)
    settings = world.training(preference={"tuning": kind})
    weak = tuning.load_weak(start, tuning=kind, max_length=48, seed=settings.seed)
    pairs, _ = dpo.encode(weak, world.PAIRS)
    rows = methods.build_trainer(weak, pairs, settings, world.work(tmp_path)).train_dataset.with_format(None)
    model = world.load(start)
    expected = [world.logp(model, row["prompt_ids"], row["chosen_ids"]) for row in rows]
    assert rows["ref_chosen_logps"] == pytest.approx(expected, rel=0.02), "but for the roundings of bfloat16"


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_pair_in_one_row_gives_what_trl_gives(base: Path, tmp_path: Path, bf16: bool) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for kind in (Theirs, Ours):
        trainer = trainer_of(kind, qwen2, None, tmp_path, tokenizer, use_cpu=False, bf16=bf16)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    theirs, ours = found
    assert len(theirs) == 9 and ours == pytest.approx(theirs, abs=0.02 if bf16 else 1e-4)
