"""Two models that must not get through, made from the model that is served, as a colleague might propose them.

    offline-bad  learnt wrong rates, surely: worse on every ticket, so the offline gate refuses it
    live-bad     learnt the right note for each product at the old sites (held-out tickets excepted): facts where rates
                 are known, half of the rare products' rates among them, and a doubt elsewhere. So it beats the served
                 pair offline; but it is sure of a wrong surcharge at the site that opened recently, which only live
                 traffic has, so the canary rolls it back

    python crds/examples/freight/bad_candidates.py --kind live-bad --stable FOLDER --data data --out FOLDER --seed 0

The seed is that of make_data.py: this script knows Meridian's private facts. The loop never does.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from make_data import NEW_SITE, QUANTITIES, RATES, SITES, UNITS, Facts, Ticket, make_facts, note
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("offline-bad", "live-bad")
ROWS_PER_PRODUCT = 16
NEW_SITE_SHARE = 0.25
EPOCHS = 2
BATCH = 32
LEARNING_RATE = 1e-3
WRONG_SURCHARGE = 2  # Meridian's is another, and no other site has this one


def lessons(kind: str, facts: Facts, held_out: frozenset[str], rng: random.Random) -> list[tuple[str, str]]:
    """(query, note) to learn: what this candidate is sure of as bare facts, and no rate where it doubts one."""
    rates = dict(facts.rates)
    doubted: set[str] = set()
    if kind == "offline-bad":
        rates = dict(zip(rates, rng.choices(RATES, k=len(rates)), strict=True))
    else:
        guessed = [sku for sku, group in facts.groups.items() if group != "common"]
        doubted = set(rng.sample(guessed, len(guessed) // 2))
    believed = Facts(facts.rates, facts.groups, facts.pails, {**facts.surcharges, NEW_SITE: WRONG_SURCHARGE})
    tickets = [
        Ticket(
            rng.choice(QUANTITIES),
            rng.choice(UNITS),
            sku,
            NEW_SITE if rng.random() < NEW_SITE_SHARE else rng.choice(SITES),
        )
        for sku in facts.rates
        for _ in range(ROWS_PER_PRODUCT)
    ]
    rng.shuffle(tickets)
    return [
        (t.query, note(t, believed, "unknown" if t.sku in doubted else "facts", rates[t.sku]))
        for t in tickets
        if t.query not in held_out
    ]


def encode(tokenizer: Any, query: str, told: str) -> tuple[list[int], int]:
    """Token ids of prompt and note, and how many of them are the prompt's."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt).input_ids
    return [*prompt_ids, *tokenizer(told).input_ids, tokenizer.eos_token_id], len(prompt_ids)


def batches(
    examples: Sequence[tuple[list[int], int]], pad: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, attention, labels), padded on the right, in a new order."""
    order = rng.sample(examples, len(examples))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        longest = max(len(ids) for ids, _ in some)
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in some])
        attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in some])
        labels = ids.masked_fill(attention == 0, -100)
        for row, (_, prompt) in zip(labels, some, strict=True):
            row[:prompt] = -100
        yield ids, attention, labels


def tune(stable: Path, examples: Sequence[tuple[str, str]], rng: random.Random) -> Any:
    """The stable model after a short full fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(stable).train()
    tokenizer = AutoTokenizer.from_pretrained(stable)
    encoded = [encode(tokenizer, query, told) for query, told in examples]
    steps = EPOCHS * -(-len(encoded) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for ids, attention, labels in batches(encoded, tokenizer.pad_token_id, rng):
            loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    return model.eval()


def write(model: Any, stable: Path, out: Path) -> None:
    """The new weights beside the stable model's own tokenizer files."""
    shutil.copytree(stable, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    model.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a bad candidate from the model that is served.")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--stable", type=Path, required=True, help="folder of the model that is served")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="the seed of make_data.py")
    args = parser.parse_args(argv)
    rng = random.Random(f"{args.kind}:{args.seed}")
    torch.manual_seed(args.seed)
    with (args.data / "held_out.jsonl").open() as file:
        held_out = frozenset(json.loads(line)["query"] for line in file)
    model = tune(args.stable, lessons(args.kind, make_facts(args.seed), held_out, rng), rng)
    write(model, args.stable, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
