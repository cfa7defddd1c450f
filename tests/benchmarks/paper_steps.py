"""The paper's baselines that the loop itself has no step for. `paper.py` runs them; each writes one folder.

    supericl     SuperICL (Xu et al., arXiv 2305.08848): the strong model sees solved examples and the question, each
                 with the tuned small model's own answer and how sure it was
    self-scored  pairs of drafts by the score of the drafts themselves: no strong model, the labelled part for RLWF
    weak-ranked  RLWF (Tao and Li, arXiv 2409.08813, section 3): a weak model tuned on the labelled part is the judge of
                 the rest; the draft with the larger log(pi_judge / pi_start) is preferred

The last two cost no call of the strong model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cowest_serving.collaborate import draft_messages
from cowest_serving.contract import Pair
from cowest_training import steps
from cowest_training.asking import (
    Draft,
    Drafts,
    Recipe,
    drafts_folder,
    load_generator,
    open_asking,
    prompt_ids,
    read_pair,
)
from cowest_training.contract import Row, StepSettings
from cowest_training.data import read_rows
from cowest_training.evaluator import build_evaluator
from cowest_training.feedback import choose_queries
from cowest_training.statistics import mean_interval

BATCH = 64
LABELLED_SHARE = 0.5  # RLWF: of the queries, whose references the judge learns from
DEMONSTRATIONS = 4
ROUND = 1


# ---------------------------------------------------------------- SuperICL
@dataclass(frozen=True)
class Prediction:
    """What the small model says of a question, and its mean probability per token; "" where it cannot be asked."""

    text: str
    confidence: float

    def __str__(self) -> str:
        return f"{self.text.strip()} (confidence {self.confidence:.2f})" if self.text else "none"


def superior_prompt(
    query: str, prediction: Prediction, demonstrations: Sequence[tuple[Row, Prediction]], final: str = "Answer: "
) -> str:
    """The question as SuperICL asks it. Right answers of the examples stand in the form that is asked for."""
    solved = [
        f"{row.query}\nA small model that was tuned for such questions says: {said}\n{final}{shown_reference(row)}"
        for row, said in demonstrations
    ]
    asked = (
        f"{query}\nA small model that was tuned for such questions says: {prediction}\n"
        "Where you do not follow it, say why. Then end in the form that the question asks for."
    )
    return "\n\n---\n\n".join([*solved, asked])


def shown_reference(row: Row) -> str:
    """The first right answer."""
    try:
        values = json.loads(row.reference) if row.reference.startswith("[") else None
    except ValueError:
        values = None
    return str(values[0]) if isinstance(values, list) and values else row.reference


def predict(pair: Pair, rows: Sequence[Row], max_tokens: int) -> list[Prediction]:
    """Greedy, in batches. Blocks."""
    from cowest_serving.generate import Ask

    generator = load_generator(pair)
    found: dict[str, Prediction] = {}
    for start in range(0, len(rows), BATCH):
        asked = [(row.id, ids) for row in rows[start : start + BATCH] if (ids := prompt_ids(generator, row, pair))]
        drawn = generator.run([Ask(ids, max_tokens, 0.0, 0, top_logprobs=0) for _, ids in asked])
        for (id_, _), said in zip(asked, drawn, strict=True):
            found[id_] = Prediction(said.text, confidence_of([token.logprob for token in said.logprobs or ()]))
    return [found.get(row.id, Prediction("", 0.0)) for row in rows]


def confidence_of(logprobs: Sequence[float]) -> float:
    """Geometric mean of the tokens' probabilities; 0 for none."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


def supericl(options: argparse.Namespace) -> None:
    settings, pair = steps.load_settings(options.job), read_pair(options.pair)
    held_out = read_rows(options.held_out)
    solved = choose_queries(read_rows(options.train), DEMONSTRATIONS, settings.training.seed, 0)
    said = predict(pair, [*solved, *held_out], settings.collaboration.draft_max_tokens)
    shown = list(zip(solved, said, strict=False))
    asked = [
        _asked(row, superior_prompt(row.query, prediction, shown))
        for row, prediction in zip(held_out, said[len(solved) :], strict=True)
    ]
    answers = asyncio.run(_ask(settings, pair, held_out, asked, options.calls))
    write_answers(options.out, held_out, answers, settings.training.seed)


def _asked(row: Row, text: str) -> Row:
    return replace(row, query=text, messages=({"role": "user", "content": text},))


@dataclass(frozen=True)
class Answers:
    """What the strong model said to each row, and when it was alone."""

    texts: Sequence[str]
    scores: Sequence[float]
    solo_scores: Sequence[float]
    calls: int  # paid for `texts`


async def _ask(settings: StepSettings, pair: Pair, rows: Sequence[Row], asked: Sequence[Row], calls: str) -> Answers:
    purpose = "supericl"
    async with open_asking(settings.strong, settings.feedback.evaluator, calls, purpose=purpose) as asking:

        async def one(row: Row, question: Row) -> tuple[str, float, float]:
            reply = await asking.solo(question, pair, "answer")
            alone = await asking.solo(row, pair, "solo")
            return reply.text, await asking.score(row, reply), await asking.score(row, alone)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(row, question)) for row, question in zip(rows, asked, strict=True)]
        texts, scores, alone = zip(*(task.result() for task in tasks), strict=True)
        return Answers(texts, scores, alone, asking.calls.spent(purpose=f"{purpose}:answer").calls)


def write_answers(out: Path, rows: Sequence[Row], answers: Answers, seed: int) -> None:
    """items.parquet and figures.json; the latter last: without it the step is not done."""
    out.mkdir(parents=True, exist_ok=True)
    columns = {
        "id": [row.id for row in rows],
        "reference": [row.reference for row in rows],
        "candidate_answer": list(answers.texts),
        "candidate_score": list(answers.scores),
    }
    pq.write_table(pa.table(columns), out / "items.parquet")
    mean, low, high = mean_interval(answers.scores, None, seed)
    hurt = sum(alone > score for alone, score in zip(answers.solo_scores, answers.scores, strict=True))
    figures = {"n": len(rows), "score": mean, "low": low, "high": high, "hurt_rate": hurt / len(rows),
               "strong_calls": answers.calls}  # fmt: skip
    (out / "figures.json").write_text(json.dumps(figures, indent=1), "utf-8")


# ---------------------------------------------------------------- RLWF
def labelled(rows: Sequence[Row], share: float = LABELLED_SHARE) -> tuple[list[Row], list[Row]]:
    """The part that the judge learns from, and the rest, which it judges."""
    cut = round(len(rows) * share)
    return list(rows[:cut]), list(rows[cut:])


def preference(drafts: Sequence[Draft], worth: Sequence[float]) -> tuple[Draft, Draft] | None:
    """The draft that is worth most and the one that is worth least; None where nothing tells them apart."""
    in_order = sorted(zip(worth, drafts, strict=True), key=lambda pair: (-pair[0], pair[1].index))
    if not in_order or in_order[0][0] <= in_order[-1][0]:
        return None
    least = min(value for value, _ in in_order)
    return in_order[0][1], next(draft for value, draft in in_order if value == least)


def self_scored(options: argparse.Namespace) -> None:
    settings, pair, rows = _open(options)
    part, _ = labelled(rows)
    asyncio.run(_score_drafts(options, settings, pair, part))


async def _score_drafts(options: argparse.Namespace, settings: StepSettings, pair: Pair, rows: Sequence[Row]) -> None:
    evaluator = build_evaluator(settings.feedback.evaluator)
    try:
        pairs = []
        for row, found in draw(options, settings, pair, rows):
            worth = [await evaluator(row, draft.text) for draft in found]
            pairs.append((row, preference(found, worth)))
    finally:
        await evaluator.aclose()
    write_pairs(options.out, pairs, pair)


def weak_ranked(options: argparse.Namespace) -> None:
    settings, pair, rows = _open(options)
    _, rest = labelled(rows)
    drawn = list(draw(options, settings, pair, rest))
    judge = replace(pair, weak_uri=options.judge, weak_digest="")
    before, after = (log_probabilities(settings, each, drawn) for each in (pair, judge))
    pairs = [
        (row, preference(found, [after[draft.query_id, draft.index] - before[draft.query_id, draft.index]
                                 for draft in found]))
        for row, found in drawn
    ]  # fmt: skip
    write_pairs(options.out, pairs, pair)


def log_probabilities(
    settings: StepSettings, pair: Pair, drawn: Iterable[tuple[Row, Sequence[Draft]]]
) -> dict[tuple[str, int], float]:
    """log pi(draft | question) by query and index of the draft. One model in memory at a time."""
    import torch

    from cowest_serving.generate import prompt_ids as ids_of
    from cowest_serving.generate import render_prompt
    from cowest_training import dpo, tuning
    from cowest_training.weak_folders import weak_folder

    training = settings.training
    weak = tuning.load_weak(
        weak_folder(pair.weak_uri), tuning="LoRA", max_length=training.max_length, seed=training.seed
    )
    model = weak.model.to(weak.device)
    found = {}
    with torch.no_grad():
        for row, drafts in drawn:
            text = render_prompt(weak.tokenizer, draft_messages(row.messages, pair.prompts))
            prompt = ids_of(weak.tokenizer, text)
            for draft in drafts:
                ids = tuning.completion_ids(weak.tokenizer, text, draft.text)
                found[draft.query_id, draft.index] = dpo.completion_logp(model, prompt, ids)
    return found


def draw(
    options: argparse.Namespace, settings: StepSettings, pair: Pair, rows: Sequence[Row]
) -> Iterator[tuple[Row, list[Draft]]]:
    """K drafts a query, by the recipe of the feedback step."""
    wanted = settings.feedback
    recipe = Recipe(pair, wanted.drafts_per_query, wanted.temperature, settings.collaboration.draft_max_tokens,
                    f"{settings.training.seed}/{ROUND}")  # fmt: skip
    drafts = Drafts(recipe, rows, drafts_folder(options.calls))
    for number, batch in enumerate(drafts.batches):
        found = drafts.draw(number)
        yield from ((row, found[row.id]) for row in batch if found[row.id])


def _open(options: argparse.Namespace) -> tuple[StepSettings, Pair, list[Row]]:
    settings = steps.load_settings(options.job)
    rows = read_rows(steps.dataset_file(options.dataset))
    return settings, read_pair(options.pair), choose_queries(
        rows, settings.feedback.max_queries, settings.training.seed, ROUND
    )  # fmt: skip


def write_pairs(out: Path, pairs: Iterable[tuple[Row, tuple[Draft, Draft] | None]], pair: Pair) -> None:
    """pairs.jsonl as the feedback step writes it, with what DPO reads."""
    out.mkdir(parents=True, exist_ok=True)
    records = (_record(row, *found, pair) for row, found in pairs if found)
    temporary = out / ".pairs.jsonl"
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    temporary.replace(out / "pairs.jsonl")


def _record(row: Row, chosen: Draft, rejected: Draft, pair: Pair) -> Mapping[str, Any]:
    prompt = draft_messages(row.messages, pair.prompts)
    return {"query_id": row.id, "prompt": prompt, "chosen": chosen.text, "rejected": rejected.text}


# ---------------------------------------------------------------- command line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, verb in (("supericl", supericl), ("self-scored", self_scored), ("weak-ranked", weak_ranked)):
        flags = verbs.add_parser(name)
        flags.set_defaults(verb=verb)
        for flag in ("job", "pair", "calls"):
            flags.add_argument(f"--{flag}", required=True)
        flags.add_argument("--out", type=Path, required=True)
        if name == "supericl":
            flags.add_argument("--train", required=True)
            flags.add_argument("--held-out", required=True)
        else:
            flags.add_argument("--dataset", required=True)
        if name == "weak-ranked":
            flags.add_argument(
                "--judge", required=True, help="URI of the weak model that was tuned on the labelled part"
            )
    options = parser.parse_args(argv)
    options.verb(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
