"""Align the weak model with what helps the strong one: DPO on pairs of drafts (CoWest, section 3.2).

    loss = -log sigmoid(beta * (log pi(y+|x)/ref(y+|x) - log pi(y-|x)/ref(y-|x))) - nllWeight * log pi(y+|x) per token

or that of another method (`training.method`, see `methods`): the step has the name of the paper's. The reference is the
model that the round started from: its log-probabilities are computed before the first step, from the very weights that
are then tuned (with LoRA: with the fresh adapters off).

Differs from the paper: the NLL term, which keeps the chosen drafts likely (nllWeight: "0" turns it off). Dropout is off
(so lora.dropout acts in `sft` alone): otherwise policy and reference differ by chance.

    python -m cowest_training.dpo --job job.yaml --model s3://b/j/r0/sft --feedback s3://b/j/r1/feedback --out s3://b/j/r1/dpo
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cowest_serving import store
from cowest_serving.contract import digest_of
from cowest_serving.model_files import model_digest
from cowest_training import methods, rated, tuning
from cowest_training.contract import EXIT_OK, OF_DRAFTS, PAIRS, Manifest, StepError, Training
from cowest_training.steps import (
    Progress,
    load_settings,
    need_manifest,
    open_output,
    parser,
    read_manifest,
    run,
    say,
)
from cowest_training.weak_folders import weak_folder

MEASURED_PAIRS = 64  # whose log-probabilities are measured before and after
CHOSEN_DROP_ALARM = 0.2
LENGTH_RATIO_ALARM = (0.8, 1.25)
SAME = "with two equal drafts"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    settings = load_settings(args.job)
    pairs = read_learnt(args.feedback, settings.training)
    folder = weak_folder(args.model)
    again, rounds = replayed(args, settings.training, len(pairs))
    pairs = [*pairs, *again]
    inputs = {**_inputs(settings.training, pairs, model_digest(folder)), **made_by(args.feedback), **rounds}
    output = open_output(args.out, step="dpo", inputs=inputs)
    if isinstance(output, Manifest):
        return EXIT_OK
    with tuning.checkpoint_folder(args.out, "dpo", inputs) as checkpoints:
        work = tuning.Work(output.folder, checkpoints, Progress(args.progress, "dpo"))
        metrics = align(folder, pairs, settings.training, work)
        tuning.finish(output, folder, base=args.model, data_digest=inputs["pairs"], metrics=metrics)
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> Any:
    flags = parser(__doc__)
    flags.add_argument("--model", required=True, metavar="URI", help="the model of the round's start: the reference")
    flags.add_argument("--feedback", required=True, metavar="URI", help="output of `feedback`, or a pairs.jsonl")
    again = "output of an earlier round's `feedback`, for training.preference.replayPercent"
    flags.add_argument("--replay", action="append", default=[], metavar="URI", help=again)
    return flags.parse_args(argv)


def read_learnt(uri: str, training: Training) -> Sequence[Pair | rated.Group]:
    return rated.read_groups(uri) if training.method in OF_DRAFTS else read_pairs(pairs_file(uri))


def replayed(args: Any, training: Training, count: int) -> tuple[Sequence[Pair | rated.Group], dict[str, list[str]]]:
    """What is learnt from again beside `count` new pairs, by chance, and the digests of the feedback it is from."""
    most = count * (training.preference.replay_percent or 0) // 100
    found: list[Pair | rated.Group] = []
    digests = []
    earlier = args.replay if most else ()
    now = rated.judged_by(args.feedback) if earlier else set()
    for uri in earlier:
        manifest = read_manifest(uri)
        if manifest and rated.judged_by(uri) == now:
            found.extend(read_learnt(uri, training))
            digests.append(manifest.digest)
    chosen = random.Random(training.seed).sample(found, min(most, len(found)))
    return chosen, {"replayed": digests} if chosen else {}


def pairs_file(uri: str) -> str:
    if uri.endswith(".jsonl"):
        return uri
    need_manifest(uri, what="--feedback")
    return store.join(uri, PAIRS)


def made_by(uri: str) -> dict[str, str]:
    """The step that made the pairs, by its digest: from there the lineage leads on to data and answers."""
    return {} if uri.endswith(".jsonl") else {"feedback": need_manifest(uri, what="--feedback").digest}


def _inputs(training: Training, pairs: Sequence[Pair | rated.Group], model: str) -> dict[str, Any]:
    stage = methods.hyper_parameters(training)
    return {
        "model": model,
        "pairs": digest_of([pair.record() for pair in pairs]),
        "training": {
            "method": training.method,
            **{name: value for name, value in dataclasses.asdict(stage).items() if value is not None},
            "lora": dataclasses.asdict(training.lora),
            "max_length": training.max_length,
            "seed": training.seed,
        },
    }


# ---------------------------------------------------------------- pairs
@dataclasses.dataclass(frozen=True)
class Pair:
    """Two drafts for one prompt; `prompt` is what the weak model was asked. One that was cut off has no end."""

    prompt: tuple[Mapping[str, Any], ...]
    chosen: str
    rejected: str
    chosen_ends: bool = True
    rejected_ends: bool = True

    def record(self) -> dict[str, Any]:
        """For the digest of what went in, which is that of older days for pairs of whole drafts."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not True}


def read_pairs(uri: str) -> list[Pair]:
    """The pairs of a pairs.jsonl; a line that is no pair is named by its number."""
    lines = store.get(uri).split(b"\n")  # splitlines would break texts at U+2028 too
    return [_pair(line, f"{uri}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _pair(line: bytes, where: str) -> Pair:
    try:
        data = json.loads(line)
        ends = (data.get(f"{side}_finish_reason") != "length" for side in ("chosen", "rejected"))
        pair = Pair(tuple(data["prompt"]), data["chosen"], data["rejected"], *ends)
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(
            f"{where}: wanted prompt, chosen and rejected as JSON, saw {error!r}; run the feedback step again"
        ) from None
    if not isinstance(pair.chosen, str) or not isinstance(pair.rejected, str):
        raise StepError(f"{where}: wanted two drafts as text, saw other types; run the feedback step again")
    return pair


def encode(weak: tuning.Weak, pairs: Iterable[Pair]) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Token ids of the pairs, and what was dropped by reason.

    A pair of which one side does not fit is dropped whole: cut drafts would be compared by their beginnings.
    """
    examples: list[dict[str, list[int]]] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        if (asked := tuning.encode_prompt(weak, pair.prompt)) is None:
            dropped[tuning.REFUSED] += 1
            continue
        text, prompt = asked
        chosen = tuning.completion_ids(weak.tokenizer, text, pair.chosen, ends=pair.chosen_ends)
        rejected = tuning.completion_ids(weak.tokenizer, text, pair.rejected, ends=pair.rejected_ends)
        if chosen == rejected:
            dropped[SAME] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > weak.limit:
            dropped[tuning.TOO_LONG] += 1
        else:
            examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return examples, dropped


# ---------------------------------------------------------------- tuning
def align(
    folder: Path,
    pairs: Sequence[Pair | rated.Group],
    training: Training,
    work: tuning.Work,
) -> dict[str, Any]:
    """Tune the model in `folder` and write it whole. Returns metrics.

    Of a group the best and the worst draft are measured, as the pair that it is for the other methods.
    """
    stage = training.preference
    weak = tuning.load_weak(folder, tuning=stage.tuning, max_length=training.max_length, seed=training.seed)
    encoded = rated.encode if training.method in OF_DRAFTS else encode
    examples, dropped = encoded(weak, pairs)  # type: ignore[arg-type]  # each its own
    tuning.require_rows(
        len(examples),
        len(pairs),
        dropped,
        "pairs of different drafts that fit into training.maxLength",
        "raise feedback.draftsPerQuery or maxQueries, lower minMargin, or raise training.maxLength",
    )
    learnt, looked_at = methods.apart(examples, stage.validation_percent or 0, training.seed)
    sides = [[(e["prompt_ids"], e[ids]) for e in learnt[:MEASURED_PAIRS]] for ids in ("chosen_ids", "rejected_ids")]
    before = [[completion_logp(weak.model.to(weak.device), *draft) for draft in side] for side in sides]
    trainer = methods.build_trainer(weak, learnt, training, work, looked_at)
    log = tuning.train(trainer, work)
    model = tuning.plain(trainer)
    after = [[completion_logp(model, *draft) for draft in side] for side in sides]
    tuning.save_whole(model, weak, work.target)
    margins = [now - then for now, then in zip(_margins(after), _margins(before), strict=True)]
    measured = {
        "pairs": len(examples),
        "dropped": dict(dropped),
        "steps": trainer.state.global_step,
        **_seen(trainer, looked_at),
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "accuracy_last": _mean(margin > 0 for margin in margins),
        "margin_last": _mean(margins),
        "logp_chosen_before": _mean(before[0]),
        "logp_chosen_after": _mean(after[0]),
        "length_ratio": _mean(len(e["chosen_ids"]) for e in examples) / _mean(len(e["rejected_ids"]) for e in examples),
    }
    found = alarms(measured)
    tuning.say_left_out(len(pairs), dropped, "pairs")
    for sentence in found:
        say(f"Note: {sentence}")
    return {**measured, "alarms": found}


@torch.no_grad()
def completion_logp(model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """log pi(completion | prompt), summed over the completion's tokens (nats)."""
    model.eval()
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    start = len(prompt_ids) - 1
    return float(logps[start:].gather(-1, ids[0, start + 1 :, None]).sum())


def _seen(trainer: Any, looked_at: Sequence[Any]) -> dict[str, Any]:
    """What the rows said that were looked at on the way; nothing where there are none."""
    if not looked_at:
        return {}
    state = trainer.state
    return {"looked_at": len(looked_at), "validation_loss": state.best_metric, "best_step": state.best_global_step}


def _margins(logps: Sequence[Sequence[float]]) -> list[float]:
    """By how much each chosen draft is likelier than its rejected one (nats)."""
    return [chosen - rejected for chosen, rejected in zip(*logps, strict=True)]


def alarms(metrics: Mapping[str, Any]) -> list[str]:
    """Signs that the tuning went astray, as sentences. They end nothing: the gate judges the pair's answers."""
    before, after = metrics["logp_chosen_before"], metrics["logp_chosen_after"]
    drop = (before - after) / max(abs(before), 1e-9)
    low, high = LENGTH_RATIO_ALARM
    ratio = metrics["length_ratio"]
    found = (
        (
            drop > CHOSEN_DROP_ALARM,
            f"The log-probability of the chosen drafts fell by {drop:.0%} (more than {CHOSEN_DROP_ALARM:.0%}): "
            "raise nllWeight or lower learningRate.",
        ),
        (
            not low <= ratio <= high,
            f"Chosen drafts are {ratio:.2f} times as long as rejected ones (outside {low} to {high}): "
            "the model may learn length instead of help.",
        ),
        (
            metrics["margin_last"] <= 0,
            "Chosen drafts are no likelier against rejected ones than at the start: raise learningRate or epochs.",
        ),
    )
    return [sentence for rings, sentence in found if rings]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    run(main)
