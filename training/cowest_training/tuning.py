"""What `sft` and `dpo` share: loading a weak model, token ids as the server sees them, checkpoints, saving it whole.

Every model that leaves here is self-contained: adapters merged, safetensors only, tokenizer files copied byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import EarlyStoppingCallback, GenerationConfig, PrinterCallback, Trainer, TrainerCallback, set_seed

from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Collaboration, Messages, Prompts, digest_of
from cowest_serving.cores import free_threads
from cowest_serving.generate import PromptError, load_model, prompt_ids, quiet_transformers, render_prompt
from cowest_serving.model_files import CARD, base_of_adapter, is_adapter, make_readable, model_digest
from cowest_training.cards import ModelCard, model_card
from cowest_training.contract import Lora, Stage, StepError
from cowest_training.round_trip import RoundTrip
from cowest_training.steps import Output, Progress, code_version, inputs_digest, local_path, say
from cowest_training.weak_folders import copy_tokenizer, inherited_license, tokenizer_folder

GENERATION = "generation_config.json"
CHECKPOINT_SECONDS = 60.0
LOOKS, PATIENCE = 10, 3  # at rows that are not learnt from; how often their loss may fail to fall
# Why a row is left out.
TOO_LONG = "longer than maxLength"
REFUSED = "refused by the chat template"
# Tokens of one forward and backward pass; a batch of more is split (gradient accumulation): memory stays bounded.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}


# ---------------------------------------------------------------- models
@dataclass(frozen=True)
class Weak:
    """A weak model ready to be tuned. `limit` is the most tokens of prompt and draft."""

    folder: Path
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    device: str  # cpu | cuda
    limit: int
    pad_id: int | None  # of the configuration, as it came


def load_weak(folder: Path, *, tuning: str, max_length: int, seed: int) -> Weak:
    """The model, adapters merged into it, and its tokenizer. Raises `StepError` when it cannot be tuned."""
    quiet()
    torch.set_num_threads(free_threads())
    set_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A frozen base may keep its own precision; weights that are tuned need the small steps of float32.
    dtype = "auto" if device == "cuda" and tuning == "LoRA" else torch.float32
    tokenizer, model = load_model(folder, dtype)
    model.generation_config = GenerationConfig()  # a checkpoint must not fail by one that cannot be written
    if tokenizer.eos_token_id is None:
        raise StepError(
            f"wanted a tokenizer with an end-of-sequence token in {folder}, saw none; "
            "set eos_token in tokenizer_config.json, or drafts never end"
        )
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
    pad_id = model.config.get_text_config().pad_token_id
    return Weak(folder, model, tokenizer, device, min(max_length, places), pad_id)


def load_merged(folder: Path, dtype: Any) -> Any:
    """A plain causal LM; an adapter folder is loaded on its base and merged."""
    return load_model(folder, dtype)[1]


def save_whole(model: Any, weak: Weak, target: Path) -> None:
    """Write `model` and the tokenizer that `weak` came with.

    Raises `StepError` (nothing written) when a weight is not a finite number.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise not_finite(f"weight {name}", "the end")
    model.config.get_text_config().pad_token_id = weak.pad_id  # the trainer had set its own
    save_model(model, weak.folder, target)
    copy_tokenizer(tokenizer_folder(weak.folder), target)
    make_readable(target)


def save_model(model: Any, source: Path, target: Path) -> None:
    """Weights and configuration, with the generation configuration of the folder that the model was loaded from.

    That one goes byte for byte: transformers reads some that it then refuses to write (`temperature` without
    `do_sample`).
    """
    model.generation_config = GenerationConfig()
    model.save_pretrained(target)
    (target / GENERATION).unlink(missing_ok=True)
    own = (base_of_adapter(source) if is_adapter(source) else source) / GENERATION
    if own.is_file():
        shutil.copyfile(own, target / GENERATION)


def resolved_prompts(collaboration: Collaboration) -> Prompts:
    """The prompts of a job, or the built-in ones of its draft form."""
    return collaboration.prompts or DEFAULT_PROMPTS[collaboration.draft]


def finish(output: Output, source: Path, *, base: str, data_digest: str, metrics: Mapping[str, Any]) -> None:
    """Publish the model that was tuned into `output`, with its card. `source`: the folder of what it was tuned from."""
    digest, training = model_digest(output.folder), output.inputs["training"]
    card = ModelCard(
        step=output.step,
        digest=digest,
        base=base,
        base_digest=output.inputs["model"],
        data_digest=data_digest,
        seed=training["seed"],
        parameters=training,
        metrics=metrics,
        license=inherited_license(source),
        version=code_version(),
    )
    (output.folder / CARD).write_text(model_card(card), encoding="utf-8")
    output.finish(kind="Model", metrics=metrics, digest=digest)


# ---------------------------------------------------------------- token ids
def completion_ids(tokenizer: Any, prompt: str, draft: str, *, ends: bool = True) -> list[int]:
    """Ids of a draft as they follow the ids of `prompt`, with the end-of-sequence token where the draft has an end.

    Both together are tokenised where that leaves the prompt's ids as they are (a word piece may depend on its
    neighbour); otherwise the draft alone.
    """
    bare = _bare_ids(tokenizer, prompt)
    joint = _bare_ids(tokenizer, prompt + draft)
    ids = joint[len(bare) :] if joint[: len(bare)] == bare else _bare_ids(tokenizer, draft)
    return [*ids, tokenizer.eos_token_id] if ends else ids


def _bare_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def round_trip(tokenizer: Any) -> RoundTrip:
    """Text as it is after encoding and decoding."""
    return lambda text: str(tokenizer.decode(_bare_ids(tokenizer, text), skip_special_tokens=True))


def encode_prompt(weak: Weak, messages: Messages) -> tuple[str, list[int]] | None:
    """What the model is asked, as its chat template writes it and as token ids; None where the template refuses it."""
    try:
        text = render_prompt(weak.tokenizer, messages)
        return text, prompt_ids(weak.tokenizer, text)
    except PromptError:
        return None


def split_batch(batch_size: int, longest: int, device: str, sequences: int = 1, least: int = 1) -> tuple[int, int]:
    """(rows at once, accumulation steps) with rows * steps = batch_size and a bounded number of tokens at once.

    `sequences` a row: 1 for SFT, 2 for DPO. Only divisors, so that every optimizer step sees exactly `batch_size` rows.
    `least` rows at once there are in any case.
    """
    most = TOKENS_AT_ONCE[device] // max(1, longest * sequences)
    divisors = [n for n in range(least, batch_size + 1) if batch_size % n == 0]
    rows = max((n for n in divisors if n <= most), default=divisors[0])
    return rows, batch_size // rows


# ---------------------------------------------------------------- trainers
@dataclass(frozen=True)
class Work:
    """Where a tuning writes: the model into `target`, checkpoints into a folder that outlives a kill, its progress."""

    target: Path
    checkpoints: Path
    progress: Progress
    checkpoint_seconds: float = CHECKPOINT_SECONDS


def lora_config(lora: Lora, tuning: str) -> LoraConfig | None:
    """Adapters on every linear layer but the head; `None` for full tuning."""
    if tuning == "Full":
        return None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def common_arguments(
    stage: Stage,
    work: Work,
    *,
    lengths: Sequence[int],
    sequences: int,
    warmup: float,
    seed: int,
    device: str,
    least: int = 1,
) -> dict[str, Any]:
    """Arguments of all trainers. Everything that depends on chance has the one seed.

    `lengths`: tokens of each row, prompt and draft.
    `warmup` is a share of the steps, rounded down: the first step of a warm-up has a learning rate of 0 and is lost,
    which is much for a round of a few steps.
    """
    at_once, accumulation = split_batch(stage.batch_size, max(lengths), device, sequences, least)
    cpu = device == "cpu"
    return {
        "output_dir": str(work.checkpoints),
        "num_train_epochs": stage.epochs,
        "learning_rate": stage.learning_rate,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(warmup * stage.epochs * math.ceil(len(lengths) / stage.batch_size)),
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "bf16": not cpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": not cpu,
        "logging_steps": 1,  # a round has few steps: anything coarser blinds the alarms
        "logging_nan_inf_filter": False,  # otherwise the trainer reports a NaN loss as a good one
        "save_strategy": "no",  # `Watch` asks for checkpoints by the clock
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "max_length": None,  # what is too long was dropped and counted before
    }


def early_stop_arguments(arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Of a trainer that looks at rows it does not learn from, and ends with the weights that had the least loss there.

    `steps`: of the whole tuning.
    """
    return {
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // LOOKS),
        "per_device_eval_batch_size": arguments["per_device_train_batch_size"],
        "prediction_loss_only": True,
        "save_strategy": "best",  # beside the checkpoints that `Watch` asks for
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # how often the loss has not fallen
    }


def early_stop() -> list[TrainerCallback]:
    return [EarlyStoppingCallback(PATIENCE)]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Shows progress, asks for a checkpoint now and then, and ends the step when the loss is not a number."""

    def __init__(self, work: Work) -> None:
        self.progress = work.progress
        self.seconds = work.checkpoint_seconds
        self.saved = time.monotonic()
        self.loss = math.nan

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}"
        self.progress.update(state.global_step, state.max_steps, "steps", shown)
        if time.monotonic() - self.saved >= self.seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise not_finite(name, f"step {state.global_step}")
        self.loss = (logs or {}).get("loss", self.loss)


def not_finite(what: str, where: str) -> StepError:
    return StepError(
        f"wanted finite numbers, saw {what} that is NaN or infinite at {where}; nothing was written: "
        "lower learningRate, or look for broken rows and weights"
    )


def train(trainer: Trainer, work: Work) -> list[dict[str, Any]]:
    """Run `trainer` from its newest whole checkpoint, or from the start. Returns one log entry a step."""
    trainer.remove_callback(PrinterCallback)  # stdout is not ours to fill; `Watch` shows how far it is
    trainer.train(resume_from_checkpoint=last_checkpoint(work.checkpoints))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json comes last); broken ones are removed."""
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            whole[int(json.loads((path / "trainer_state.json").read_text())["global_step"])] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[max(whole)]) if whole else None


@contextmanager
def checkpoint_folder(out: str, step: str, inputs: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for checkpoints that outlives a kill and belongs to these inputs alone; removed when the work is done.

    Beside a local output (`<parent>/.checkpoints/<name>/<digest>`), otherwise among the machine's temporary files.
    """
    local = local_path(out)
    root = local.parent / ".checkpoints" if local else Path(tempfile.gettempdir()) / "cowest-checkpoints"
    name = local.name if local else digest_of(out).removeprefix("sha256:")[:16]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    digest = inputs_digest(step, {**inputs, "versions": versions})
    folder = root / name / digest.removeprefix("sha256:")[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():  # of inputs that have changed since
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # not empty: checkpoints of this work, or of others
            for empty in (folder, folder.parent, root):
                if empty.exists():
                    empty.rmdir()


def plain(trainer: Trainer) -> Any:
    """The tuned model without adapters and without what the trainer put around it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def quiet() -> None:
    """No progress bars of libraries between our own lines, and no word to anybody about who tunes what."""
    datasets.disable_progress_bars()
    quiet_transformers()
    os.environ["TQDM_DISABLE"] = "1"
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


def say_left_out(total: int, dropped: Mapping[str, int], what: str) -> None:
    """What the step did not learn from, a note for each reason."""
    for reason, count in dropped.items():
        if count:
            say(f"Note: {count} of {total} {what} were left out: {reason}.")


def require_rows(kept: int, total: int, dropped: Mapping[str, int], what: str, remedy: str) -> None:
    """End the step when nothing is left to learn from."""
    if kept:
        return
    seen = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    raise StepError(f"wanted {what}, saw none among {total}{f' ({seen})' if seen else ''}; {remedy}")
