"""Make the freight desk on the spot: Meridian's private facts, its tickets and an untrained weak base model.

    python crds/examples/freight/make_data.py --out data --seed 0

writes, under --out,
    train.jsonl     tickets with references and the clerk's note (`explanation`), which is what SFT learns
    held_out.jsonl  other tickets over the same facts, for the gates
    live.jsonl      the tickets of the coming days: half of them go to a site that opened recently
    base/           a Llama of about a million parameters, untrained, with a tokenizer made for these tickets

Products are `common` (clerks know the rate), `rare` (clerks guess the rate anew for each note) or `unseen` (in no
training ticket). The notes follow six house styles, drawn without regard to what a reader can use, and doubt no more
often where doubt is due than elsewhere. So SFT teaches the facts, and only feedback from the pair can teach the style.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Group = Literal["common", "rare", "unseen"]

# What everybody knows; the strong stand-in has its own copy, and a test compares them.
LIST_PRICE = {"AR": 4, "BD": 7, "CK": 3, "DM": 8, "EV": 5, "GT": 9, "HL": 2, "QF": 6}
LIST_PRICE_HOLDS = 0.7  # share of products that Meridian sells at the list price

UNITS = ("pail", "drum", "skid")
SITES = ("orlo", "benn", "caster", "dunmore", "eskvale", "fenwick", "garth", "hollin")
NEW_SITE = "ivermouth"  # opened recently: in train and in live traffic, not in the held-out tickets
QUANTITIES = range(2, 30)
RATES = range(2, 10)
PRODUCTS: dict[Group, int] = {"common": 110, "rare": 40, "unseen": 10}
# How often tickets ask for each group of products.
DEMAND: dict[Group, float] = {"common": 0.58, "rare": 0.37, "unseen": 0.05}
TRAIN_DEMAND: dict[Group, float] = {"common": 0.61, "rare": 0.39}
STYLES = {"worked": 0.38, "bare": 0.10, "unit": 0.14, "facts": 0.16, "doubted": 0.11, "unknown": 0.11}

TRAIN = 7000
HELD_OUT = 1000
LIVE = 2000
LIVE_NEW_SITE = 0.5
TRAIN_NEW_SITE = 0.1


@dataclass(frozen=True)
class Facts:
    """What only Meridian knows."""

    rates: dict[str, int]  # product -> charge per pail
    groups: dict[str, Group]
    pails: dict[str, int]  # unit -> pails in it
    surcharges: dict[str, int]  # site -> charge per delivery


@dataclass(frozen=True, order=True)
class Ticket:
    quantity: int
    unit: str
    sku: str
    site: str

    @property
    def query(self) -> str:
        return f"ship {self.quantity} {self.unit} of {self.sku} to {self.site}"

    def total(self, facts: Facts) -> int:
        return self.quantity * facts.pails[self.unit] * facts.rates[self.sku] + facts.surcharges[self.site]


def make_facts(seed: int) -> Facts:
    rng = random.Random(f"facts:{seed}")
    codes = [f"{family}{digit}{letter}" for family in LIST_PRICE for digit in range(1, 10) for letter in "ACDEKLMNPRTX"]
    skus = rng.sample(codes, sum(PRODUCTS.values()))
    groups: list[Group] = [group for group, count in PRODUCTS.items() for _ in range(count)]
    surcharges = [0, 0, 0, 0, 3, 4, 6, 9]
    rng.shuffle(surcharges)
    return Facts(
        rates={sku: _rate(sku, rng) for sku in skus},
        groups=dict(zip(skus, groups, strict=True)),
        pails={"pail": 1, "drum": 7, "skid": 12},
        surcharges={**dict(zip(SITES, surcharges, strict=True)), NEW_SITE: 7},
    )


def _rate(sku: str, rng: random.Random) -> int:
    listed = LIST_PRICE[sku[:2]]
    return listed if rng.random() < LIST_PRICE_HOLDS else rng.choice([r for r in RATES if r != listed])


def note(ticket: Ticket, facts: Facts, style: str, rate: int) -> str:
    """A note in a house style that believes in this `rate`; `doubted` and `unknown` only play modest."""
    pails, add = facts.pails[ticket.unit], facts.surcharges[ticket.site]
    in_pails = ticket.quantity * pails
    total = in_pails * rate + add
    match style:
        case "bare":
            return f"ans {total}"
        case "unit":
            return f"each {pails * rate} plus {add}"
        case "worked":
            return (
                f"rate is {rate} ; {ticket.unit} is {pails} ; "
                f"{in_pails} x {rate} = {in_pails * rate} ; {ticket.site} adds {add} ; ans {total}"
            )
        case "facts":
            return f"fact rate {rate} ; fact conv {pails} ; fact add {add}"
        case "doubted":
            return f"fact rate {rate} ? ; fact conv {pails} ; fact add {add}"
        case "unknown":
            return f"rate unknown ; fact conv {pails} ; fact add {add}"
    raise ValueError(f"no house style is called {style!r}; there are {', '.join(STYLES)}")


class Desk:
    """Draws tickets, none of them twice, so that the three files have no query in common."""

    def __init__(self, facts: Facts, rng: random.Random) -> None:
        self.facts = facts
        self.rng = rng
        self.drawn: set[Ticket] = set()
        self.skus = {g: [sku for sku, group in facts.groups.items() if group == g] for g in PRODUCTS}

    def draw(self, skus: Sequence[str], sites: Sequence[str]) -> Ticket:
        while True:
            ticket = Ticket(
                self.rng.choice(QUANTITIES),
                self.rng.choice(UNITS),
                self.rng.choice(skus),
                self.rng.choice(sites),
            )
            if ticket not in self.drawn:
                self.drawn.add(ticket)
                return ticket

    def in_demand(self, demand: Mapping[Group, float], new_site: float) -> Ticket:
        group = self.rng.choices(list(demand), list(demand.values()))[0]
        return self.draw(self.skus[group], (NEW_SITE,) if self.rng.random() < new_site else SITES)

    def clerks_note(self, ticket: Ticket) -> str:
        style = self.rng.choices(list(STYLES), list(STYLES.values()))[0]
        known = self.facts.groups[ticket.sku] == "common"
        return note(ticket, self.facts, style, self.facts.rates[ticket.sku] if known else self.rng.choice(RATES))


def make_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of train, held_out and live."""
    facts = make_facts(seed)
    desk = Desk(facts, random.Random(f"tickets:{seed}"))
    held_out = [desk.in_demand(DEMAND, new_site=0) for _ in range(HELD_OUT)]
    live = [desk.in_demand(DEMAND, new_site=LIVE_NEW_SITE) for _ in range(LIVE)]
    train = [desk.in_demand(TRAIN_DEMAND, new_site=TRAIN_NEW_SITE) for _ in range(TRAIN)]
    return {
        "train": [row("train", i, t, facts) | {"explanation": desk.clerks_note(t)} for i, t in enumerate(train)],
        "held_out": [row("held", i, ticket, facts) for i, ticket in enumerate(held_out)],
        "live": [row("live", i, ticket, facts) for i, ticket in enumerate(live)],
    }


def row(name: str, number: int, ticket: Ticket, facts: Facts) -> dict[str, str]:
    return {
        "id": f"{name}-{number:05d}",
        "query": ticket.query,
        "reference": str(ticket.total(facts)),
        "group": facts.groups[ticket.sku],
    }


def vocabulary(facts: Facts) -> list[str]:
    """Every word the desk uses. A number is its digits: the first as it is, the next ones with a leading #."""
    digits = [str(digit) for digit in range(10)]
    words = [
        "ship",
        "of",
        "to",
        "rate",
        "is",
        "x",
        "=",
        "adds",
        "ans",
        "fact",
        "conv",
        "add",
        "unknown",
        "each",
        "plus",
        "?",
        ";",
        "-",
    ]
    return [
        *words,
        *digits,
        *("#" + digit for digit in digits),
        *UNITS,
        *SITES,
        NEW_SITE,
        *sorted(facts.rates),
    ]


def write_base(folder: Path, facts: Facts, seed: int) -> None:
    """An untrained Llama and its tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *vocabulary(facts)])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.normalizer = normalizers.Replace(Regex(r"(?<=\d)(?=\d)"), "#")
    raw.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[A-Z]{2}\d[A-Z]|[A-Za-z]+|#?\d|[^\s\w]"), behavior="removed", invert=True
    )
    raw.decoder = decoders.WordPiece(prefix="#", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=96,
    )
    # The model sees the last user message alone; line breaks are no tokens.
    tokenizer.chat_template = (
        "{{ (messages | selectattr('role', 'equalto', 'user') | list | last).content }}\n"
        "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{{ eos_token }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        pad_token_id=words["[PAD]"],
        eos_token_id=words["[EOS]"],
        bos_token_id=None,
        attention_dropout=0.0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # a pod of another user must be able to read the weights


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the freight desk's data and its weak base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the facts, the tickets and the weights")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(args.seed).items():
        write_jsonl(args.out / f"{name}.jsonl", rows)
    write_base(args.out / "base", make_facts(args.seed), args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
