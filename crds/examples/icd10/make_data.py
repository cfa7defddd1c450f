"""Make the ICD-10-CM coding desk: train, held-out and live rows and a tiny base model. Never for clinical use.

The codes and their descriptions are real: the public ICD-10-CM tabular list as packed in `simple_icd_10_cm`. The notes
are made: a condition in the list's own words (description or inclusion term), and the side, visit, intent or stage of
pregnancy in a coder's words or in a desk's. Everything follows from the seed.

A *family* is a stem whose codes differ only by regular characters: `S40.01` + side 1/2 + visit A/D/S. Families are
common, rare (a handful of supervised rows) or unseen (none). Rows with an `explanation` teach the families; in which of
five house styles one is written is drawn independently of the family, so that the rows teach the facts and not which
style helps a reader. The desk rows (no explanation, as the held-out and live ones) use words that those rows lack.

    python make_data.py --out demo/icd10 --seed 0
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import simple_icd_10_cm as icd

WARNING = "Made-up notes over public code descriptions. Never for clinical use, billing or teaching of coding."

# Three-character categories of the desk, and how many families at most are taken of each.
SIDED = (
    "C50 D22 G56 H10 H11 H25 H60 H65 H72 H81 H91 H92 I82 I83 L02 M00 M10 M16 M17 M19 M22 M25 M54 M65 M70 M75 "
    "M77 M79 N60 N83 Q66 Q70 R22 S00 S09 S40 S42 S43 S50 S52 S53 S57 S60 S62 S63 S67 S70 S72 S80 S82 S83 S86 "
    "S87 S90 S93 S99 T15 T22 T23 T24 T26 T33 Z96"
)
PER_CATEGORY = 2
POISONINGS, PREGNANCIES = 24, 12
VAGUE = re.compile(r"other|unspecified|elsewhere|[\[\]]|multiple|male|without|level|due to|\bNOS\b|with\b|\band$", re.I)
MAX_WORDS = 8
ACCENTS = str.maketrans("éèô", "eeo")

# What the desk must read. value -> (a coder's words, the desk's words); the value is the code character.
SIDES = {
    "1": (["right"], ["rt", "right-hand side", "left is fine, it is the other side", "on the r"]),
    "2": (["left"], ["lt", "left-hand side", "right is fine, it is the other side", "on the l"]),
    "3": (["bilateral"], ["both sides", "bilat", "left and right alike"]),
}
VISITS = {
    "A": (["initial encounter"], ["first visit", "happened today", "came straight in", "still under active treatment"]),
    "D": (["subsequent encounter"], ["follow-up", "dressing change", "check-up, treatment over", "aftercare"]),
    "S": (["sequela"], ["late effect", "old injury, trouble since", "years ago, consequences now"]),
}
FRACTURE_VISITS = {
    "A": (["initial encounter for closed fracture"], ["first visit, skin intact", "happened today, closed"]),
    "B": (["initial encounter for open fracture"], ["first visit, bone through the skin", "today, open wound over it"]),
    "D": (["subsequent encounter with routine healing"], ["follow-up, heals well", "cast check, all as expected"]),
    "G": (["subsequent encounter with delayed healing"], ["follow-up, knits slowly", "cast check, slower than hoped"]),
    "K": (["subsequent encounter with nonunion"], ["follow-up, ends have not joined", "cast check, in two pieces"]),
    "P": (["subsequent encounter with malunion"], ["follow-up, joined crooked", "cast check, set at an angle"]),
    "S": (["sequela"], ["late effect", "years ago, consequences now"]),
}
INTENTS = {
    "1": (["accidental"], ["took it by mistake", "mixed up the bottles", "an accident at home"]),
    "2": (["intentional self-harm"], ["meant to hurt herself", "took it on purpose", "left a farewell note"]),
    "3": (["assault"], ["given by somebody who meant harm", "an attack", "was slipped it by an enemy"]),
    "4": (["undetermined"], ["nobody knows how it came about", "intent unclear", "cannot tell whether on purpose"]),
}
TRIMESTERS = {"1": "first trimester", "2": "second trimester", "3": "third trimester"}
FIRST_WEEK = {"1": (5, 13), "2": (14, 27), "3": (28, 39)}  # ends before 14 weeks 0 days, 28 weeks 0 days

# House styles of the explanations: share, template. None names a family's tier.
STYLES = {
    "verbose": (0.44, "this is {condition} ; {words} ; so the code is {code}"),
    "bare": (0.18, "code {code}"),
    "stem": (0.24, "this is {condition} ; {words} ; category {stem}"),
    "hedged": (0.10, "this is {condition} ; {words} ; category {stem} ?"),
    "unknown": (0.04, "this is {condition} ; {words} ; category unknown"),
}
RARE_SHARE, UNSEEN_SHARE = 0.18, 0.025  # of the families
RARE_ROWS = 10  # supervised rows of a rare family
DESK_WORDS_IN_SUPERVISED = 0.06  # share of attributes that supervised rows write in the desk's words


@dataclass(frozen=True)
class Family:
    """A stem and what its codes add: side, intent or trimester, then a visit character."""

    stem: str
    terms: tuple[str, ...]  # the condition in the words of the tabular list
    axis: str  # side | intent | trimester
    values: tuple[str, ...]  # of the axis
    visits: str  # "" | ADS | ADGKPS | ABDGKPS
    tier: str = "common"  # | rare | unseen


@dataclass(frozen=True)
class Case:
    """One thing to code: a family, one of its terms and its attributes."""

    family: Family
    term: str
    value: str
    visit: str

    @property
    def code(self) -> str:
        return find_code(self.family, self.value, self.visit)


# ---------------------------------------------------------------- the tabular list
def find_code(family: Family, value: str, visit: str) -> str:
    """The billable code, checked against the list. Raises `ValueError` where the list has no such code."""
    body = family.stem.replace(".", "")
    body = (body.ljust(5, "X") if family.axis == "intent" else body) + value
    body = body.ljust(6, "X") + visit if visit else body
    code = body[:3] + "." + body[3:]
    if not (icd.is_valid_item(code) and icd.is_leaf(code)):
        raise ValueError(f"wanted a billable code of {family.stem}, saw {code}, which the list lacks")
    return code


def plain(text: str) -> str:
    """Lower case, no brackets and no commas: a condition as one phrase of the note."""
    text = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", text.casefold()).translate(ACCENTS)
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", text).split())


def terms_of(node: str, description: str) -> tuple[str, ...]:
    """The description and up to two inclusion terms, without doubles."""
    included = [t for t in icd.get_inclusion_term(node) if not VAGUE.search(t) and len(t.split()) <= MAX_WORDS]
    return tuple(dict.fromkeys(plain(term) for term in [description, *included[:2]]))


def sided_families() -> Iterator[Family]:
    """Stems whose children 1 and 2 differ only by the words right and left."""
    for category in SIDED.split():
        for node in icd.get_descendants(category):
            if icd.is_extended_subcategory(node) or VAGUE.search(icd.get_description(node)):
                continue
            children = icd.get_children(node)
            right, left = (node + side if node + side in children else None for side in "12")
            if not right or not left or len(icd.get_description(node).split()) > MAX_WORDS:
                continue
            words = icd.get_description(right)
            visits = "".join(child[-1] for child in icd.get_children(right))
            regular = "right" in words and words.replace("right", "left") == icd.get_description(left)
            if regular and not words.startswith("Displaced") and visits in ("", "ADS", "ADGKPS", "ABDGKPS"):
                both = node + "3" in children and "ilateral" in icd.get_description(node + "3")
                values = ("1", "2", "3") if both else ("1", "2")
                yield Family(node, terms_of(node, icd.get_description(node)), "side", values, visits)


def tailed_families(first: str, last: str, tail: str, axis: str, visits: str) -> Iterator[Family]:
    """Stems told by the end of a description: `..., first trimester`, `..., accidental (unintentional), ...`."""
    for code in icd.get_all_codes(with_dots=True):
        description = icd.get_description(code)
        if not (first <= code[:3] <= last and icd.is_leaf(code) and description.endswith(tail)):
            continue
        condition = description.removesuffix(tail)
        body = code.removesuffix(visits[:1]) if visits else code
        stem = body[:-1].rstrip("X.")
        if not VAGUE.search(condition) and len(condition.split()) <= MAX_WORDS and body[-1] == "1":
            values = ("1", "2", "3", "4") if axis == "intent" else ("1", "2", "3")
            yield Family(stem, (plain(condition),), axis, values, visits)


def is_complete(family: Family) -> bool:
    """Whether the list has every code that the family's regular characters spell."""
    try:
        for value in family.values:
            for visit in family.visits or [""]:
                find_code(family, value, visit)
    except ValueError:
        return False
    return True


@cache
def families(seed: int) -> tuple[Family, ...]:
    """The desk's families with their tiers, the same for the same seed."""
    chance = random.Random(f"families {seed}")
    groups: dict[str, list[Family]] = {}
    for family in sided_families():
        groups.setdefault(family.stem[:3], []).append(family)
    poisonings = tailed_families("T36", "T65", ", accidental (unintentional), initial encounter", "intent", "ADS")
    pregnancies = tailed_families("O09", "O99", ", first trimester", "trimester", "")
    chosen = [family for group in groups.values() for family in sample(group, PER_CATEGORY, chance)]
    chosen += sample(list(poisonings), POISONINGS, chance) + sample(list(pregnancies), PREGNANCIES, chance)
    chance.shuffle(chosen)
    rare, unseen = round(RARE_SHARE * len(chosen)), round(UNSEEN_SHARE * len(chosen))
    tiers = ["rare"] * rare + ["unseen"] * unseen + ["common"] * (len(chosen) - rare - unseen)
    return tuple(replace(family, tier=tier) for family, tier in zip(chosen, tiers, strict=True))


def sample(group: list[Family], count: int, chance: random.Random) -> list[Family]:
    """Up to `count` complete families with terms that no other one of the group has."""
    complete = [family for family in group if is_complete(family)]
    return chance.sample(complete, min(count, len(complete)))


# ---------------------------------------------------------------- notes
def cases_of(family: Family) -> list[Case]:
    return [
        Case(family, term, value, visit)
        for term in family.terms
        for value in family.values
        for visit in family.visits or [""]
    ]


def part_of(case: Case, seed: int) -> str:
    """train, held_out or live: a combination of condition words and attributes lies in one of them only."""
    name = f"{seed}|{case.family.stem}|{case.term}|{case.value}|{case.visit}"
    draw = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 0x100000000
    return "held_out" if draw < 0.17 else "live" if draw < 0.37 else "train"


def wording(values: tuple[list[str], list[str]], desk_share: float, chance: random.Random) -> str:
    return chance.choice(values[1] if chance.random() < desk_share else values[0])


def attributes(case: Case, desk_share: float, chance: random.Random) -> list[str]:
    """The side, intent or stage of pregnancy and the visit, in words."""
    family = case.family
    if family.axis == "trimester":
        return [pregnancy(case.value, desk_share, chance)]
    words = [wording((SIDES if family.axis == "side" else INTENTS)[case.value], desk_share, chance)]
    if family.visits:
        table = VISITS if family.visits == "ADS" else FRACTURE_VISITS
        words.append(wording(table[case.visit], desk_share, chance))
    return words


def pregnancy(trimester: str, desk_share: float, chance: random.Random) -> str:
    """A trimester by name, by week, or by the dates from which the week follows."""
    if chance.random() >= desk_share:
        return TRIMESTERS[trimester]
    week = chance.randint(*FIRST_WEEK[trimester])
    if chance.random() < 0.3:
        return f"week {week}"
    seen = datetime.date(2026, 1, 1) + datetime.timedelta(days=chance.randrange(365))
    period = seen - datetime.timedelta(days=7 * week + chance.randrange(7))
    return f"last period {period.isoformat()} , seen {seen.isoformat()}"


def note(case: Case, desk_share: float, chance: random.Random) -> str:
    """What the desk is asked. Age and sex bear on nothing here; they are what real notes have as well."""
    sex = "f" if case.family.axis == "trimester" else chance.choice("mf")
    age = chance.randint(18, 44) if case.family.axis == "trimester" else chance.randint(3, 93)
    words = [case.term, *attributes(case, desk_share, chance)]
    return f"{age} {sex} : " + " , ".join(words)


def explanation(case: Case, chance: random.Random) -> str:
    """A coder's note in a style that is drawn independently of everything else."""
    shares = [share for share, _ in STYLES.values()]
    _, template = chance.choices(list(STYLES.values()), weights=shares)[0]
    words = " ; ".join(attributes(case, 0.0, chance))
    return template.format(condition=case.term, words=words, code=case.code, stem=case.family.stem)


def supervised(known: Sequence[Family], count: int, seed: int, chance: random.Random) -> Iterator[tuple[Case, str]]:
    """Cases with notes mostly in a coder's words: common families alike, rare ones a few times, unseen ones never."""
    pools = {f.stem: [c for c in cases_of(f) if part_of(c, seed) == "train"] for f in known if f.tier != "unseen"}
    rare = [f for f in known if f.tier == "rare" and pools[f.stem]]
    common = [f for f in known if f.tier == "common" and pools[f.stem]]
    for family in rare * RARE_ROWS:
        case = chance.choice(pools[family.stem])
        yield case, note(case, DESK_WORDS_IN_SUPERVISED, chance)
    for i in range(count - RARE_ROWS * len(rare)):
        case = chance.choice(pools[common[i % len(common)].stem])
        yield case, note(case, DESK_WORDS_IN_SUPERVISED, chance)


def desk(
    known: Sequence[Family], part: str, count: int, seed: int, chance: random.Random
) -> Iterator[tuple[Case, str]]:
    """Cases as they come in: every family alike, in the desk's words."""
    pools = [pool for f in known if (pool := [c for c in cases_of(f) if part_of(c, seed) == part])]
    for _ in range(count):
        case = chance.choice(chance.choice(pools))
        yield case, note(case, 0.75, chance)


def unique(cases: Iterator[tuple[Case, str]], seen: set[str]) -> Iterator[tuple[Case, str]]:
    """Leave out notes that are there already: between the files, none may be."""
    for case, text in cases:
        if (key := " ".join(re.findall(r"\w+", text))) not in seen:
            seen.add(key)
            yield case, text


def row(name: str, case: Case, text: str, draft: str | None = None) -> dict[str, str]:
    line = {"id": name, "query": text, "reference": case.code, "group": case.family.tier}
    return line if draft is None else {**line, "explanation": draft}


def make_rows(seed: int, counts: Sequence[int]) -> dict[str, list[dict[str, str]]]:
    """train, held_out and live. `counts`: supervised and desk (both in train), held-out and live; doubles drop out."""
    known, seen = families(seed), set[str]()
    chance = random.Random(f"rows {seed}")
    n_supervised, n_desk, n_held_out, n_live = counts
    taught = list(unique(supervised(known, n_supervised, seed, chance), seen))
    asked = list(unique(desk(known, "train", n_desk, seed, chance), seen))
    train = [row(f"s{i}", case, text, explanation(case, chance)) for i, (case, text) in enumerate(taught)]
    train += [row(f"d{i}", case, text) for i, (case, text) in enumerate(asked)]
    chance.shuffle(train)
    rest = {
        part: [
            row(f"{part[0]}{i}", case, text)
            for i, (case, text) in enumerate(unique(desk(known, part, count, seed, chance), seen))
        ]
        for part, count in (("held_out", n_held_out), ("live", n_live))
    }
    return {"train": train, **rest}


# ---------------------------------------------------------------- the base model
# One token a word; a code is its category, then character by character. `▁` stands for the space before. The line break
# that ends a prompt is a token of its own, so that a draft's tokens are the same with and without its prompt.
PIECES = r"▁?[A-Z][0-9][0-9A-Z](?=[.])|▁?[a-z'-]+|▁?[0-9]|▁?[^\s▁]"
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"


def make_base(texts: Sequence[str], folder: Path, seed: int, width: int, layers: int) -> None:
    """A Llama of random weights that knows nothing, with a tokenizer of the words in `texts`."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(PIECES), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, min_frequency=2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    fast.save_pretrained(folder)


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder; files of the same names are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--supervised", type=int, default=6000, help="train rows with an explanation")
    parser.add_argument("--desk", type=int, default=1500, help="train rows without one")
    parser.add_argument("--held-out", type=int, default=800)
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--width", type=int, default=128, help="of the base model")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(args.seed, (args.supervised, args.desk, args.held_out, args.live))
    for name, lines in rows.items():
        write(args.out / f"{name}.jsonl", lines)
    texts = [line["query"] + "\n" + line.get("explanation", "") for line in rows["train"]]
    make_base(texts, args.out / "base", args.seed, args.width, args.layers)
    made = ", ".join(f"{len(lines)} {name} rows" for name, lines in rows.items())
    sys.stdout.write(f"{made} in {args.out}. {WARNING}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
