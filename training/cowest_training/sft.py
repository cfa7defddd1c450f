"""Teach the weak model the domain: supervised fine-tuning on explanations (CoWest, section 3.1).

Loss on the draft alone (`explanation` and the end-of-sequence token), given the very prompt that the weak model gets at
request time. The output is a whole model folder: LoRA adapters are merged.

    python -m cowest_training.sft --job job.yaml --data s3://b/j/r0/data --model hf://org/name --out s3://b/j/r0/sft
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from cowest_serving.collaborate import draft_messages
from cowest_serving.contract import Prompts
from cowest_serving.model_files import model_digest
from cowest_training import tuning
from cowest_training.contract import EXIT_OK, Manifest, Row, Training
from cowest_training.data import read_rows, rows_digest
from cowest_training.round_trip import refuse_lost_text
from cowest_training.steps import Progress, dataset_file, load_settings, open_output, parser, run
from cowest_training.weak_folders import weak_folder

WARMUP = 0.03
NO_EXPLANATION = "without explanation"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    settings = load_settings(args.job)
    prompts = tuning.resolved_prompts(settings.collaboration)
    rows = read_rows(dataset_file(args.data))
    folder = weak_folder(args.model)
    inputs = _inputs(settings.training, prompts, rows, model_digest(folder))
    output = open_output(args.out, step="sft", inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    with tuning.checkpoint_folder(args.out, "sft", inputs) as checkpoints:
        work = tuning.Work(output.folder, checkpoints, Progress(args.progress, "sft"))
        metrics = fine_tune(folder, rows, prompts, settings.training, work)
        tuning.finish(output, folder, base=args.model, data_digest=inputs["data"], metrics=metrics)
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> Any:
    flags = parser(__doc__ or "")
    flags.add_argument("--data", required=True, metavar="URI", help="collected data set, or a JSONL or Parquet file")
    flags.add_argument("--model", required=True, metavar="URI", help="the weak model: file://, s3:// or hf://")
    return flags.parse_args(argv)


def _inputs(training: Training, prompts: Prompts, rows: Sequence[Row], model: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": rows_digest(rows),
        "prompts": prompts.digest,
        "training": {
            **dataclasses.asdict(training.supervised),
            "lora": dataclasses.asdict(training.lora),
            "max_length": training.max_length,
            "seed": training.seed,
        },
    }


def fine_tune(
    folder: Path,
    rows: Sequence[Row],
    prompts: Prompts,
    training: Training,
    work: tuning.Work,
) -> dict[str, Any]:
    """Tune the model in `folder` and write it whole. Returns metrics."""
    stage = training.supervised
    weak = tuning.load_weak(folder, tuning=stage.tuning, max_length=training.max_length, seed=training.seed)
    refuse_lost_text([row for row in rows if row.explanation], tuning.round_trip(weak.tokenizer), str(folder))
    examples, dropped = encode(weak, rows, prompts)
    tuning.require_rows(
        len(examples),
        len(rows),
        dropped,
        "rows with an `explanation` that fit into training.maxLength",
        "give rows an `explanation`, raise training.maxLength, or set training.sft: Never",
    )
    arguments = tuning.common_arguments(
        stage,
        work,
        lengths=[len(example["input_ids"]) for example in examples],
        sequences=1,
        warmup=WARMUP,
        seed=training.seed,
        device=weak.device,
    )
    trainer = SFTTrainer(
        model=weak.model,
        args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(examples),
        processing_class=weak.tokenizer,
        peft_config=tuning.lora_config(training.lora, stage.tuning),
        callbacks=[tuning.Watch(work)],
    )
    log = tuning.train(trainer, work)
    tuning.save_whole(tuning.plain(trainer), weak, work.target)
    tuning.say_left_out(len(rows), dropped, "rows")
    return {
        "rows": len(examples),
        "dropped": dict(dropped),
        "steps": trainer.state.global_step,
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "token_accuracy_last": log[-1].get("mean_token_accuracy"),
    }


def encode(weak: tuning.Weak, rows: Sequence[Row], prompts: Prompts) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Token ids and labels (-100 on the prompt), and what was dropped by reason.

    A row that does not fit is dropped whole: a cut draft would teach drafts without an end.
    """
    examples: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not row.explanation:
            dropped[NO_EXPLANATION] += 1
            continue
        if (asked := tuning.encode_prompt(weak, draft_messages(row.messages, prompts))) is None:
            dropped[tuning.REFUSED] += 1
            continue
        text, prompt = asked
        draft = tuning.completion_ids(weak.tokenizer, text, row.explanation)
        if len(prompt) + len(draft) > weak.limit:
            dropped[tuning.TOO_LONG] += 1
            continue
        examples.append({"input_ids": [*prompt, *draft], "labels": [-100] * len(prompt) + draft})
    return examples, dropped


if __name__ == "__main__":
    run(main)
