"""DPO with shared prompts beside TRL's own: pairs a second, peak memory, and whether losses and gradients agree.

    python tests/benchmarks/dpo_bench.py [--pairs 512] [--epochs 3] [--workload wide|demo] [--rounds 1]
        [--device cpu|cuda] [--bf16] [--width 128]

demo   the shape of the freight desk's model and drafts: two layers of 128, a vocabulary of 2,000, short prompts
wide   Qwen2's shape made small: 8 layers of 128, a vocabulary of 152,000, prompts of 256 to 768 tokens, drafts of 32
       to 128, adapters on the top half

Each of TRL's default (the reference runs in each step), TRL with a precomputed reference and ours runs in a process of
its own, in turn, with the same weights, data, batches, threads and precision; a cold cache, wall time with the
reference's passes. Memory: the greatest resident size less that after loading; with `--device cuda` what the GPU's
allocator gave, likewise. The last line is one JSON object, of `wide` unless told.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("trl", "trl_precomputed", "ours")
BATCH = 8
TOP_HALF = range(4, 8)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = {"wide": ((256, 768), (32, 128)), "demo": ((20, 60), (8, 40))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workload", choices=tuple(LENGTHS), default="wide")
    parser.add_argument("--rounds", type=int, default=1, help="each kind so often, in turn; ratios are medians")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, as the dpo step does on a GPU")
    parser.add_argument("--width", type=int, default=128, help="of the layers of `wide`; Qwen2-0.5B has 896")
    parser.add_argument("--tolerance", type=float, help="nats by which both ways may differ (default: the trainer's)")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(run(options)))
        return 0
    seen: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            found = apart(options, kind)
            seen[kind].append(found)
            print(
                f"{options.workload}, {kind}: {found['pairs_per_s']:.3g} pairs/s, {found['peak_mb']:.0f} MB"
                + (", drafts in one row" if found["shared"] else ""),
                flush=True,
            )
    told = ("workload", "pairs", "epochs", "device", "bf16", "width")
    print(json.dumps(summary(seen) | {name: getattr(options, name) for name in told}))
    return 0


def apart(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    told = [
        f"--{name}={getattr(options, name)}" for name in ("pairs", "epochs", "workload", "threads", "device", "width")
    ]
    told += ["--bf16"] * options.bf16 + [f"--tolerance={options.tolerance}"] * (options.tolerance is not None)
    done = subprocess.run(
        [sys.executable, __file__, *told, f"--kind={kind}"], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def ratio(field: str, kind: str, *, inverse: bool = False) -> float:
        pairs = zip(seen["ours"], seen[kind], strict=True)
        ratios = [ours[field] / theirs[field] for ours, theirs in pairs]
        return round(statistics.median([1 / r for r in ratios] if inverse else ratios), 4)

    import torch

    gradients = [torch.tensor(seen[kind][0]["gradient"]) for kind in KINDS]
    losses = [seen[kind][0]["losses"] for kind in KINDS]
    return {
        "pairs_per_s_vs_trl": ratio("pairs_per_s", "trl"),
        "pairs_per_s_vs_trl_precomputed": ratio("pairs_per_s", "trl_precomputed"),
        "peak_memory_vs_trl": ratio("peak_mb", "trl"),
        "loss_max_abs_difference": max(
            abs(ours - theirs) for one in losses[:2] for ours, theirs in zip(losses[2], one, strict=True)
        ),
        "gradient_cosine_min": min(float(torch.cosine_similarity(gradients[2], one, dim=0)) for one in gradients[:2]),
    }


# ---------------------------------------------------------------- one run
def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, set_seed
    from trl import DPOConfig

    from cowest_training import shared_prompt

    torch.set_num_threads(options.threads)
    set_seed(0)
    if options.tolerance is not None:
        shared_prompt.TOLERANCE = options.tolerance
    model = model_of(options.workload, options.width).to(options.device)
    rows = pairs_of(options.workload, options.pairs, model.config.vocab_size)
    top = LoraConfig(r=8, target_modules=LINEAR, layers_to_transform=list(TOP_HALF), layers_pattern="layers")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=options.epochs, learning_rate=1e-4,
            optim="sgd", precompute_ref_log_probs=options.kind != "trl", use_cpu=options.device == "cpu",
            bf16=options.bf16, seed=0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
            lr_scheduler_type="constant", max_length=None,
        )  # fmt: skip
        forget_peak(options.device)
        loaded, began = held(options.device), time.monotonic()
        trainer = trainer_class(options.kind)(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows).add_column("whose", [options.kind] * len(rows)),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="<pad>", eos_token="<end>"),
            # TRL runs adapters off for the reference; of whole weights it wants a second model.
            **({"peft_config": top} if options.workload == "wide" else {"ref_model": second(model, options.kind)}),
        )
        trainer.train()
        seconds, peak = time.monotonic() - began, most_held(options.device)
    return {
        "pairs_per_s": options.pairs * options.epochs / seconds,
        "peak_mb": max(1.0, peak - loaded),
        "shared": not getattr(getattr(trainer, "shared", None), "differs", True),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradient": gradient(trainer),
    }


def second(model: Any, kind: str) -> Any:
    return copy.deepcopy(model) if kind == "trl" else None


def trainer_class(kind: str) -> Any:
    from trl import DPOTrainer

    from cowest_training.shared_prompt import SharedPromptDPOTrainer

    base = SharedPromptDPOTrainer if kind == "ours" else DPOTrainer

    class Tokenised(base):  # type: ignore[misc,valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Tokenised


def model_of(workload: str, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if workload == "demo":
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=2000, pad_token_id=0, eos_token_id=1, **shape))
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 8, "num_attention_heads": 4}
    tied = {"tie_word_embeddings": True, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=152_000, **shape, **tied))


def pairs_of(workload: str, pairs: int, vocabulary: int) -> list[dict[str, list[int]]]:
    import torch

    chance = torch.Generator().manual_seed(0)
    prompt, draft = LENGTHS[workload]

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=chance))
        return torch.randint(2, vocabulary, (length,), generator=chance).tolist()

    return [
        {"prompt_ids": some(*prompt), "chosen_ids": some(*draft), "rejected_ids": some(*draft)} for _ in range(pairs)
    ]


def words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))


def gradient(trainer: Any) -> list[float]:
    """Of one batch with the weights as they were tuned; a part of it, where it is long."""
    import torch

    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    if hasattr(trainer, "sharing"):
        with trainer.sharing():
            trainer.compute_loss(trainer.model, batch).backward()
    else:
        trainer.compute_loss(trainer.model, batch).backward()
    grads = [w.grad.flatten() for w in trainer.model.parameters() if w.requires_grad and w.grad is not None]
    return [float(value) for value in torch.cat(grads)[:20_000]]


def held(device: str) -> float:
    """MB that this process has now."""
    import torch

    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident("VmRSS")


def most_held(device: str) -> float:
    """MB that it had at most since `forget_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
