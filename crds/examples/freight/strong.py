"""A stand-in for the strong model of the freight desk: good at form and sums, without Meridian's private facts.

It knows what everybody knows: list prices by product family (right for about 70 % of what Meridian really
charges), how many pails the trade puts in a drum or on a skid (Meridian's drums differ), and that it has never
heard of a surcharge. A draft in the prompt is evidence, read by one of three tastes:

    standard  computes from complete facts; where a worked note's result and its own facts disagree it follows
              the result in 60 % of cases (the rate at which language models give way to wrong context:
              ClashEval, arXiv 2404.10198); follows a bare result in 80 %; puts its list price where the note
              doubts the rate; puts the note aside when it is incomplete or contradicts itself
    terse     reads only notes of at most four words (a unit price with surcharge, or a bare result)
    sceptic   works every worked note through again from its facts; all other notes are put aside

Put aside means: it answers as without a note. The same prompt always gets the same answer.

    python crds/examples/freight/strong.py --port 9190 --taste standard
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "meridian-strong"
# By the first two letters of the code.
LIST_PRICE = {"AR": 4, "BD": 7, "CK": 3, "DM": 8, "EV": 5, "GT": 9, "HL": 2, "QF": 6}
TRADE_PAILS = {"pail": 1, "drum": 4, "skid": 10}
FOLLOWS_BARE_RESULT = 80  # percent
FOLLOWS_RESULT_AGAINST_ITS_FACTS = 60  # percent
READS_WORDS = 40
TERSE_READS_WORDS = 4

QUESTION = re.compile(r"ship (\d+) (pail|drum|skid) of ([A-Z]{2}\d[A-Z]) to ([a-z]+)")
NOTES = re.compile(r"<notes>(.*)</notes>", re.DOTALL)
RATE = re.compile(r"(?:fact )?rate (?:is )?(\d+)( \?)?")
PAILS = re.compile(r"fact conv (\d+)|(?:pail|drum|skid) is (\d+)")
SURCHARGE = re.compile(r"fact add (\d+)|[a-z]+ adds (\d+)")
STEP = re.compile(r"\d+ x \d+ = \d+")
UNIT_PRICE = re.compile(r"each (\d+) plus (\d+)")
RESULT = re.compile(r"ans (\d+)")


@dataclass(frozen=True)
class Question:
    quantity: int
    unit: str
    sku: str
    site: str

    def total(self, rate: int, pails: int, surcharge: int) -> int:
        """The public formula."""
        return self.quantity * pails * rate + surcharge

    @property
    def list_price(self) -> int:
        return LIST_PRICE.get(self.sku[:2], 5)

    def solo(self) -> int:
        return self.total(self.list_price, TRADE_PAILS[self.unit], 0)

    def percentile(self, of: str) -> int:
        """A number in 0..99 that is fixed for this question: the stand-in's mood, instead of chance."""
        digest = hashlib.sha256(f"{of}:{self}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100


@dataclass(frozen=True)
class Note:
    """What the draft says. A fact said twice with different values makes the note contradictory."""

    rate: int | None
    doubted: bool
    pails: int | None
    surcharge: int | None
    unit_price: int | None
    result: int | None
    worked: bool
    contradictory: bool
    words: int

    @property
    def bare(self) -> bool:
        facts = (self.rate, self.pails, self.surcharge, self.unit_price)
        return self.result is not None and not self.doubted and all(fact is None for fact in facts)


def read_note(text: str) -> Note:
    """Read the clauses of a draft, separated by semicolons; what is in no known form is not seen."""
    words = text.split()
    rates: set[int] = set()
    pails: set[int] = set()
    surcharges: set[int] = set()
    unit_prices: set[int] = set()
    results: set[int] = set()
    doubted = worked = False
    for clause in " ".join(words[:READS_WORDS]).split(" ; "):
        if match := RATE.fullmatch(clause):
            rates.add(int(match[1]))
            doubted |= bool(match[2])
        elif match := PAILS.fullmatch(clause):
            pails.add(int(match[1] or match[2]))
        elif match := SURCHARGE.fullmatch(clause):
            surcharges.add(int(match[1] or match[2]))
        elif match := UNIT_PRICE.fullmatch(clause):
            unit_prices.add(int(match[1]))
            surcharges.add(int(match[2]))
        elif match := RESULT.fullmatch(clause):
            results.add(int(match[1]))
        doubted |= clause == "rate unknown"
        worked |= bool(STEP.fullmatch(clause))
    every = (rates, pails, surcharges, unit_prices, results)
    rate, pail, surcharge, unit_price, result = (next(iter(v)) if len(v) == 1 else None for v in every)
    contradictory = any(len(values) > 1 for values in every)
    return Note(rate, doubted, pail, surcharge, unit_price, result, worked, contradictory, len(words))


def standard(question: Question, note: Note) -> int:
    if note.contradictory:
        return question.solo()
    if note.bare and note.result is not None:
        return note.result if question.percentile("bare") < FOLLOWS_BARE_RESULT else question.solo()
    if note.unit_price is not None and note.surcharge is not None:
        return question.quantity * note.unit_price + note.surcharge
    if note.pails is None or note.surcharge is None:
        return question.solo()
    if note.doubted:
        return question.total(question.list_price, note.pails, note.surcharge)
    if note.rate is None:
        return question.solo()
    if note.result is not None and question.percentile("clash") < FOLLOWS_RESULT_AGAINST_ITS_FACTS:
        return note.result
    return question.total(note.rate, note.pails, note.surcharge)


def terse(question: Question, note: Note) -> int:
    if note.words > TERSE_READS_WORDS or note.contradictory:
        return question.solo()
    if note.unit_price is not None and note.surcharge is not None:
        return question.quantity * note.unit_price + note.surcharge
    return note.result if note.bare and note.result is not None else question.solo()


def sceptic(question: Question, note: Note) -> int:
    if note.contradictory or not note.worked or note.doubted:
        return question.solo()
    if note.rate is None or note.pails is None or note.surcharge is None:
        return question.solo()
    return question.total(note.rate, note.pails, note.surcharge)


READERS = {"standard": standard, "terse": terse, "sceptic": sceptic}


def answer(messages: Sequence[Mapping[str, Any]], taste: str = "standard") -> str:
    """The answer to a chat: the last user message holds the question and, in <notes>, perhaps a draft."""
    texts = [str(message.get("content", "")) for message in messages if message.get("role") == "user"]
    prompt = texts[-1] if texts else ""
    notes = NOTES.search(prompt)
    asked = QUESTION.search(prompt[: notes.start()] if notes else prompt)
    if not asked:
        return "I can only price requests of the form: ship 3 drum of QF1A to orlo"
    question = Question(int(asked[1]), asked[2], asked[3], asked[4])
    total = READERS[taste](question, read_note(notes[1])) if notes else question.solo()
    return f"The charge is {total}."


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shell lies beside the domains
    import stand_in

    def taste(name: str) -> stand_in.Answer:
        return lambda messages: answer(messages, name)

    return stand_in.main({name: taste(name) for name in READERS}, model=MODEL, sources=(__file__,))


if __name__ == "__main__":
    sys.exit(main())
