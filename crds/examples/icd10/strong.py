"""A strong stand-in for the ICD-10-CM coding desk: it reads any note and knows how codes are built, but few of them.

Never for clinical use. It stands for a large model that reads any wording (sides, visits, intents, dates) and knows the
grammar of ICD-10-CM, but of the categories only what a well-read person remembers (`PUBLIC`, right for a minor part of
the desk's notes, wrong for some). It reads neither the tabular list nor any data made from it. Its trust in a confident
wrong draft follows what is reported of large models (ClashEval, arXiv 2404.10198: wrong context overrides what they
know in more than 60 % of cases, more often where they are unsure).

Tastes, that is: which kind of draft helps it.
  standard  completes a stem by itself (`category S40.01 ; right ; ...`); a stem in doubt (`?`) only where it knows
            nothing better; a code that is claimed is taken over as it stands in 6 (verbose) or 7 (bare) of 10 notes
  terse     takes over a bare code and gets lost in anything longer
  sceptic   goes by what it knows; else takes any code in the draft, whatever the form, and rebuilds its end by itself

    python strong.py --taste standard --port 8100
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

MODEL = "icd10-stand-in"
UNKNOWN = "R69"  # illness, unspecified
TRUST_VERBOSE, TRUST_BARE = 0.6, 0.7


# ---------------------------------------------------------------- reading the note
@dataclass(frozen=True)
class Reading:
    """The code characters that the note's words call for; "" where it says nothing."""

    side: str = ""
    intent: str = ""
    trimester: str = ""
    visit: str = ""


# Tried in order: the first pattern found decides.
SIDES = (
    (r"left is fine|left is well|not the left", "1"),
    (r"right is fine|right is well|not the right", "2"),
    (r"bilat|both|left and right|right and left", "3"),
    (r"\bright\b|\brt\b|\bon the r\b|\bdextral\b", "1"),
    (r"\bleft\b|\blt\b|\bon the l\b|\bsinistral\b", "2"),
)
INTENTS = (
    (r"undetermined|nobody knows|intent unclear|cannot tell", "4"),
    (r"assault|attack|meant harm|enemy|somebody else gave", "3"),
    (r"self-harm|suicid|on purpose|hurt (her|him)self|farewell", "2"),
    (r"accident|mistake|mixed up|unintention", "1"),
)
VISITS = (
    (r"sequela|late effect|consequences|old injury|years ago", "S"),
    (r"nonunion|not joined|two pieces", "K"),
    (r"malunion|crooked|at an angle", "P"),
    (r"delayed healing|slow", "G"),
    (r"subsequent|follow-up|\bcheck\b|aftercare|dressing change|routine healing", "D"),
    (r"open fracture|through the skin|open wound", "B"),
    (r"initial|first visit|today|straight in|active treatment", "A"),
)
DATES = re.compile(r"last period (\d{4}-\d\d-\d\d)\b.*\bseen (\d{4}-\d\d-\d\d)")


def read(note: str) -> Reading:
    """What the note says of side, intent, stage of pregnancy and visit."""
    return Reading(first(SIDES, note), first(INTENTS, note), trimester(note), first(VISITS, note))


def first(patterns: Sequence[tuple[str, str]], note: str) -> str:
    return next((value for pattern, value in patterns if re.search(pattern, note)), "")


def trimester(note: str) -> str:
    """1 before 14 weeks 0 days from the last period, 2 before 28, then 3."""
    for i, name in enumerate(("first", "second", "third"), start=1):
        if f"{name} trimester" in note:
            return str(i)
    if named := re.search(r"\bweek (\d+)", note):
        weeks = int(named[1])
    elif dates := DATES.search(note):
        weeks = (date.fromisoformat(dates[2]) - date.fromisoformat(dates[1])).days // 7
    else:
        return ""
    return "1" if weeks < 14 else "2" if weeks < 28 else "3"


# ---------------------------------------------------------------- the grammar of codes
def takes_visit(body: str) -> bool:
    """Injuries, and fractures by disease, end in a visit character."""
    return body[0] in "ST" or body[:4] in ("M843", "M844", "M845", "M846") or body[:3] in ("M80", "M97")


def is_poisoning(body: str) -> bool:
    return body[0] == "T" and body[1:3].isdigit() and 36 <= int(body[1:3]) <= 65


def assemble(stem: str, reading: Reading) -> str:
    """The code of a stem: what the note says in its place, X where a place would stay empty, the visit last."""
    body = stem.replace(".", "")
    if body[0] == "O":
        body += reading.trimester
    elif is_poisoning(body):
        body = body.ljust(5, "X") + reading.intent
    else:
        body += reading.side
    if takes_visit(body):
        body = body.ljust(6, "X") + reading.visit
    return dotted(body)


def stem_of(code: str, reading: Reading) -> str:
    """A code without what `assemble` would put at its end."""
    body = code.replace(".", "")
    if takes_visit(body) and len(body) == 7:
        body = body[:6].rstrip("X")
    if reading.side or reading.trimester or is_poisoning(body):
        body = body[:-1].rstrip("X")
    return dotted(body)


def dotted(body: str) -> str:
    return body[:3] + "." + body[3:] if len(body) > 3 else body


# ---------------------------------------------------------------- what a well-read person remembers
SUPERFICIAL = {"abrasion": "1", "blister": "2", "external constriction": "4", "foreign body": "5", "insect bite": "6"}
SUPERFICIAL_SITES = {
    "shoulder": "S40.2", "upper arm": "S40.8", "elbow": "S50.3", "forearm": "S50.8", "wrist": "S60.8", "hand": "S60.5",
    "hip": "S70.2", "thigh": "S70.3", "knee": "S80.2", "lower leg": "S80.8", "ankle": "S90.5", "foot": "S90.8",
}  # fmt: skip
JOINTS = {"shoulder": "1", "elbow": "2", "wrist": "3", "hand": "4", "hip": "5", "knee": "6", "ankle": "7"}
JOINT_DISEASES = {"primary osteoarthritis": "M19.0", "effusion": "M25.4", "pain in": "M25.5", "stiffness": "M25.6"}
BURN_SITES = {
    "forearm": "T22.?1", "elbow": "T22.?2", "upper arm": "T22.?3", "shoulder": "T22.?5", "palm": "T23.?5",
    "back of hand": "T23.?6", "wrist": "T23.?7", "thigh": "T24.?1", "knee": "T24.?2", "lower leg": "T24.?3",
    "ankle": "T25.?1", "foot": "T25.?2", "toe": "T25.?3",
}  # fmt: skip
DEGREES = ("first degree", "second degree", "third degree")
# The first entry of which every word stands in the note decides. Broad ones name the code that is seen most.
PUBLIC = (
    ("contusion shoulder", "S40.01"), ("contusion elbow", "S50.0"), ("contusion wrist", "S60.21"),
    ("contusion hip", "S70.0"), ("contusion knee", "S80.0"), ("contusion ankle", "S90.0"),
    ("contusion foot", "S90.3"), ("carpal tunnel", "G56.0"), ("sciatic nerve", "G57.0"),
    ("sciatica", "M54.3"), ("osteoarthritis of hip", "M16.1"), ("osteoarthritis of knee", "M17.1"),
    ("hallux valgus", "M20.1"), ("bunion", "M21.61"), ("frozen shoulder", "M75.0"),
    ("adhesive capsulitis", "M75.0"), ("bursitis of shoulder", "M75.5"), ("tennis elbow", "M77.1"),
    ("lateral epicondylitis", "M77.1"), ("achilles tendinitis", "M76.6"), ("olecranon bursitis", "M70.2"),
    ("prepatellar", "M70.4"), ("trigger finger", "M65.3"), ("conjunctivitis", "H10.1"),
    ("corneal ulcer", "H16.00"), ("nuclear cataract", "H25.1"), ("cataract", "H25.1"),
    ("pterygium", "H11.00"), ("myopia", "H52.1"), ("retinal detachment", "H33.0"),
    ("otitis externa", "H60.33"), ("external ear", "H60.1"), ("serous otitis media", "H65.0"),
    ("otitis media", "H65.2"), ("central perforation", "H72.0"), ("otosclerosis", "H80.0"),
    ("vertigo", "H81.1"), ("meniere's", "H81.0"), ("presbycusis", "H91.1"), ("hearing loss", "H91.9"),
    ("otalgia", "H92.0"), ("tinnitus", "H93.1"), ("varicose veins pregnancy", "O22.0"),
    ("varicose veins", "I83.9"), ("embolism femoral vein", "I82.41"), ("femoral vein", "I80.1"),
    ("melanoma upper limb", "C43.6"), ("melanoma lower limb", "C43.7"), ("nevi upper limb", "D22.6"),
    ("cellulitis", "L03.11"), ("ovarian cyst", "N83.20"), ("cyst of ovary", "N83.0"),
    ("cystic breast", "N60.1"), ("breast cancer", "C50.91"), ("neoplasm of breast", "C50.91"),
    ("swelling upper limb", "R22.3"), ("webbed toes", "Q70.3"), ("foreign body cornea", "T15.0"),
    ("ear drum", "S09.2"), ("strain achilles", "S86.01"), ("salicylates", "T39.09"), ("aspirin", "T39.01"),
    ("fentanyl", "T40.41"), ("cocaine", "T40.5"), ("benzene", "T52.1"), ("ethanol", "T51.0"),
    ("mercury", "T56.1"), ("carbon monoxide", "T58.9"), ("anticoagulants", "T45.51"),
    ("type 2 diabetes pregnancy", "O24.11"), ("obesity pregnancy", "O99.21"), ("artificial knee", "Z96.65"),
    ("artificial hip", "Z96.64"), ("sprain", "S93.40"), ("gout", "M10.0"), ("torus fracture", "S52.52"),
    ("osteoarthritis", "M19.0"), ("strain", "S76.1"), ("insecticides", "T60.0"), ("pregnancy", "O99.89"),
)  # fmt: skip


def remembered(note: str) -> str:
    """The stem that comes to mind, right or wrong; "" where none does."""
    for kind, digit in SUPERFICIAL.items():
        for site, stem in SUPERFICIAL_SITES.items():
            if kind in note and re.search(rf"\bof {site}\b", note):
                return stem + digit
    for burn, extra in (("burn of", 1), ("corrosion of", 5)):
        degree = next((i for i, name in enumerate(DEGREES) if f"{burn} {name}" in note), None)
        stem = next((stem for site, stem in BURN_SITES.items() if f"of {site}" in note), "")
        if degree is not None and stem:
            return stem.replace("?", str(degree + extra))
    for disease, stem in JOINT_DISEASES.items():
        for joint, digit in JOINTS.items():
            if re.search(rf"{disease}\W+{joint}\b", note):
                return stem + digit
    return next((stem for words, stem in PUBLIC if all(word in note for word in words.split())), "")


# ---------------------------------------------------------------- reading the draft
CODE = r"[A-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?"
CLAIM = re.compile(rf"\bcode(?: is)?:? ({CODE})(?![0-9A-Z.])")
STEM = re.compile(rf"\bcategory ({CODE})(?![0-9A-Z.])(\s*\?)?")
ANY_CODE = re.compile(rf"\b({CODE})(?![0-9A-Z.])")
DRAFT = re.compile(r"<draft>(.*?)</draft>", re.DOTALL)


def split(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(note, draft): the note stands first in the last user message, a draft between its delimiters."""
    text = next((str(m.get("content") or "") for m in reversed(messages) if m.get("role") == "user"), "")
    found = DRAFT.search(text)
    note = text.split("\n---")[0] if found else text
    return " ".join(note.casefold().split()), found[1].strip() if found else None


def alone(note: str) -> str:
    """What it answers without a draft."""
    stem = remembered(note)
    return assemble(stem, read(note)) if stem else UNKNOWN


def trusts(note: str, share: float) -> bool:
    """The same for every draft of a note: a reader's mood, drawn from the note's digest."""
    return int(hashlib.sha256(note.encode()).hexdigest()[:8], 16) / 0x100000000 < share


def standard(note: str, draft: str) -> str:
    if claim := CLAIM.search(draft):
        is_bare = len(draft.split()) <= 3
        return claim[1] if trusts(note, TRUST_BARE if is_bare else TRUST_VERBOSE) else alone(note)
    stem = STEM.search(draft)
    if not stem or (stem[2] and remembered(note)):
        return alone(note)
    return assemble(stem[1], read(note))


def terse(note: str, draft: str) -> str:
    claim = ANY_CODE.search(draft)
    return claim[1] if claim and len(draft.split()) <= 3 else alone(note)


def sceptic(note: str, draft: str) -> str:
    found = STEM.search(draft) or ANY_CODE.search(draft)
    if remembered(note) or not found:
        return alone(note)
    is_stem = found.re is STEM
    reading = read(note)
    return assemble(found[1] if is_stem else stem_of(found[1], reading), reading)


def answer_as(taste: Callable[[str, str], str]) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """`answer(messages) -> str` of a taste, which is told the note and the draft."""

    def answer(messages: Sequence[Mapping[str, Any]]) -> str:
        note, draft = split(messages)
        return f"Code: {alone(note) if draft is None else taste(note, draft)}"

    return answer


TASTES = {taste.__name__: answer_as(taste) for taste in (standard, terse, sceptic)}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import stand_in

    sys.exit(stand_in.main(TASTES, model=MODEL, sources=(__file__,)))
