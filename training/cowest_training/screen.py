"""Which traces a round had better not learn from: too much of one user, near copies, phrases that buy one answer. Pure.

`collect` asks it once, when it freezes a round's data. Train rows are the owner's word: they are never screened, and
they say what is usual. What is found is no proof of malice; a person may release it (`cowest quarantine --release`).

    Trigger       a phrase that train hardly knows, that always goes with one answer, and that answer is not what was
                  answered: what the strong model says of its own accord vouches for a new subject, never for a trigger
    NearCopies    one long query again and again, but for a few words, with the same reference
    UserShare     more than one user's share of the traces
    SourceShare   more than one source's: of an application's key, or of who gave the late references

What it cannot see: a phrase in fewer than `LEAST` traces, one of words that train has too, answers that are reworded
each time, short copies, and one person under many names.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cowest_serving.contract import Messages, query_text
from cowest_training.contract import Row, Trust
from cowest_training.data import MIN_OWN_SHINGLES, codes_of, folded, folded_words, phrases_of, shingles

TRIGGER, NEAR_COPIES, USER_SHARE, SOURCE_SHARE = "Trigger", "NearCopies", "UserShare", "SourceShare"
MEANING: Mapping[str, str] = {
    TRIGGER: "with a phrase that train does not know and that goes with one answer",
    NEAR_COPIES: "near copies of others",
    USER_SHARE: "beyond one user's share",
    SOURCE_SHARE: "beyond one source's share",
}

# Phrases.
LONGEST = 3  # words; a longer one shows by its parts
LEAST = 10  # traces with it
TIMES = 10  # as frequent in the traces as in train
ONE_ANSWER = 0.9  # of the traces with it have the same reference
CHANCE = 1e-3  # at most, of any phrase among all that were looked at
CHANCE_OF_ANSWERS = 0.01  # that so few of the answers agree with the references
ABOVE = 0.1  # of the answers agree beyond what that very answer would do by being given often

# Copies.
ALIKE = 0.9  # of the shingles of both

FEW = 20  # traces of a user or a source that are never too many
USUAL = 2  # times what the median user gives


@dataclass(frozen=True)
class Seen:
    """A trace that could be learnt from, and where it came from."""

    row: Row
    trace_id: str
    user: str = ""  # hash; "": not known, then each is a user of its own
    application: str = ""
    said_by: str = ""  # hash of who gave the reference
    answer: str = ""  # what was answered; "": it was not kept
    agrees: bool | None = None  # the answer with the reference; None: nobody can tell


@dataclass(frozen=True)
class Suspect:
    """A trace that is not learnt from, and why, in a sentence."""

    seen: Seen
    reason: str
    why: str


@dataclass(frozen=True)
class Screened:
    kept: tuple[Seen, ...]
    suspects: tuple[Suspect, ...]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(suspect.reason for suspect in self.suspects))


def screen(
    train: Sequence[Row], traces: Sequence[Seen], trust: Trust, released: frozenset[str] = frozenset()
) -> Screened:
    """One scan after the other, each on what is left. `released`: ids of traces that a person lets through."""
    suspects: dict[str, Suspect] = {}
    scans: tuple[Callable[[Sequence[Seen]], Iterator[Suspect]], ...] = (
        *((lambda left: triggers(train, left),) if trust.trigger_phrases == "Quarantine" else ()),
        lambda left: near_copies(left, trust.max_near_copies),
        lambda left: beyond_share(left, trust.max_user_percent, USER_SHARE, lambda seen: seen.user),
        lambda left: beyond_share(left, trust.max_source_percent, SOURCE_SHARE, lambda seen: seen.application),
        lambda left: beyond_share(left, trust.max_source_percent, SOURCE_SHARE, lambda seen: seen.said_by),
    )
    for scan in scans:
        left = [seen for seen in traces if seen.trace_id not in suspects]
        for suspect in scan(left):
            if suspect.seen.trace_id not in released:
                suspects.setdefault(suspect.seen.trace_id, suspect)
    kept = tuple(seen for seen in traces if seen.trace_id not in suspects)
    return Screened(kept, tuple(suspects[seen.trace_id] for seen in traces if seen.trace_id in suspects))


def sentence(counts: Mapping[str, int], traces: int) -> str:
    """`62 of 400 traces are quarantined: ...`; "" for none."""
    if not counts:
        return ""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {MEANING.get(reason, reason)}" for reason, count in most_first)
    return f"{sum(counts.values())} of {traces} traces are quarantined: {listed}"


# ---------------------------------------------------------------- phrases
@dataclass(frozen=True)
class Phrase:
    words: tuple[str, ...]
    answer: str
    rows: frozenset[int]  # with the phrase and the answer
    of: int  # rows with the phrase
    in_train: int


def triggers(train: Sequence[Row], traces: Sequence[Seen]) -> Iterator[Suspect]:
    found: dict[int, Phrase] = {}
    for phrase in phrases(train, traces):  # the one that is in most rows comes first
        for number in phrase.rows:
            found.setdefault(number, phrase)
    for number, phrase in sorted(found.items()):
        why = (
            f"{' '.join(phrase.words)!r} is in {phrase.of} traces and in {phrase.in_train} train rows, and"
            f" {len(phrase.rows)} of these have the reference {_cut(phrase.answer)!r}, which is not what was answered."
        )
        yield Suspect(traces[number], TRIGGER, why)


def phrases(train: Sequence[Row], traces: Sequence[Seen]) -> list[Phrase]:
    """Those that are suspicious, the most frequent and longest first."""
    with_answer = [number for number, seen in enumerate(traces) if seen.row.reference.strip()]
    texts = {number: _pieces(traces[number].row.messages) for number in with_answer}
    frequent = _frequent(texts)
    in_train = _counted([_pieces(row.messages) for row in train], frequent)
    unknown = {
        gram: rows
        for gram, rows in frequent.items()
        if len(rows) * len(train) >= TIMES * in_train[gram] * max(1, len(texts))
    }
    answers = {number: _plain(traces[number].row.reference) for number in with_answer}
    said = _Answers(traces)
    everywhere = Counter(answers.values()) + Counter(_plain(row.reference) for row in train)
    found = []
    for gram, rows in unknown.items():
        answer, count = Counter(answers[number] for number in rows).most_common(1)[0]
        elsewhere = (everywhere[answer] - count + 1) / (everywhere.total() - len(rows) + 2)
        if count < ONE_ANSWER * len(rows) or _tail(count, len(rows), elsewhere) * len(unknown) > CHANCE:
            continue
        mine = frozenset(number for number in rows if answers[number] == answer)
        if not said.vouch_for(mine, answer):
            found.append(Phrase(gram, answer, mine, len(rows), in_train[gram]))
    return sorted(found, key=lambda phrase: (-len(phrase.rows), -len(phrase.words), phrase.words))


class _Answers:
    """What was answered, and whether it agrees with what was said later."""

    def __init__(self, traces: Sequence[Seen]) -> None:
        self._known = {number: seen.agrees for number, seen in enumerate(traces) if seen.agrees is not None}
        self._said = {number: _plain(traces[number].answer) for number in self._known}
        self._how_often = Counter(self._said.values())
        self._agreed = sum(self._known.values())
        self._wordings: dict[str, set[str]] = defaultdict(set)  # of answers that agreed, by reference
        for number, agreed in self._known.items():
            if agreed:
                self._wordings[_plain(traces[number].row.reference)].add(self._said[number])

    def vouch_for(self, rows: frozenset[int], reference: str) -> bool:
        """Whether the answers agree with these references as they do with others, and not only as often as that very
        answer is given anyway. Where they agree with no reference beyond that, they vouch for none."""
        here = [number for number in rows if number in self._known]
        others = len(self._known) - len(here)
        agreed = sum(self._known[number] for number in here)
        if not here or not others:
            return 2 * agreed > len(here)
        wordings = self._wordings[reference]
        such = sum(self._how_often[words] for words in wordings) - sum(self._said[n] in wordings for n in here)
        usual, anyway = (self._agreed - agreed) / others, such / others
        if usual < anyway + ABOVE:
            return False
        as_often = _tail(len(here) - agreed, len(here), 1 - usual) > CHANCE_OF_ANSWERS
        return as_often or agreed / len(here) >= (usual + anyway) / 2


def _tail(count: int, of: int, share: float) -> float:
    """Upper bound (Chernoff) of the chance of `count` or more `of` draws, each with the chance `share`."""
    seen = count / of
    if seen <= share:
        return 1.0
    if share <= 0:
        return 0.0
    distance = seen * math.log(seen / share)
    if seen < 1:
        distance += (1 - seen) * math.log((1 - seen) / (1 - share))
    return math.exp(-of * distance)


_PIECE = re.compile(r"\w+|[^\w\s]+")


def _pieces(messages: Messages) -> list[str]:
    """Words and all signs between them, those that are not seen included, of what the user and the assistant said."""
    said = (query_text([{**m, "role": "user"}]) for m in messages if m.get("role") in ("user", "assistant"))
    return [piece for text in said for piece in _PIECE.findall(folded(text))]


def _frequent(texts: Mapping[int, Sequence[str]]) -> dict[tuple[str, ...], list[int]]:
    """Phrases in `LEAST` texts or more -> these. A longer one is frequent only where its parts are."""
    result: dict[tuple[str, ...], list[int]] = {}
    for length in range(1, LONGEST + 1):
        rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, words in texts.items():
            for gram in phrases_of(words, length):
                if length == 1 or (gram[:-1] in result and gram[1:] in result):
                    rows[gram].append(number)
        result |= {gram: numbers for gram, numbers in rows.items() if len(numbers) >= LEAST}
    return result


def _counted(texts: Iterable[Sequence[str]], wanted: Mapping[tuple[str, ...], object]) -> Counter[tuple[str, ...]]:
    lengths = range(1, LONGEST + 1)
    return Counter(
        gram for words in texts for length in lengths for gram in phrases_of(words, length) if gram in wanted
    )


def _plain(answer: str) -> str:
    return " ".join(folded(answer).split())


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- copies
def near_copies(traces: Sequence[Seen], most: int) -> Iterator[Suspect]:
    """Of texts that are nearly one, with the same numbers and codes and the same reference, those after the first
    `most`."""
    words = [folded_words(seen.row.query) for seen in traces]
    parts = [shingles(each) for each in words]
    rarity = Counter(shingle for each in parts for shingle in each)
    leaders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # by their rarest shingles
    copies: Counter[int] = Counter()
    for number, own in enumerate(parts):
        if len(own) < MIN_OWN_SHINGLES:
            continue
        ordered = sorted(own, key=lambda shingle: (rarity[shingle], shingle))
        # Two sets that share nine tenths share one of the first tenth of each, in an order that is one for all.
        rarest = ordered[: len(ordered) - math.ceil(ALIKE * len(ordered)) + 1]
        candidates = dict.fromkeys(leader for shingle in rarest for leader in leaders[shingle])
        leader = next((each for each in candidates if _is_copy(traces, words, parts, number, each)), None)
        if leader is None:
            for shingle in rarest:
                leaders[shingle].append(number)
            continue
        copies[leader] += 1
        if copies[leader] >= most:  # the first of them counts too
            why = f"its query is nearly that of {traces[leader].trace_id}, as those of {most - 1} others are already."
            yield Suspect(traces[number], NEAR_COPIES, why)


def _is_copy(
    traces: Sequence[Seen],
    words: Sequence[Sequence[str]],
    parts: Sequence[frozenset[tuple[str, ...]]],
    one: int,
    other: int,
) -> bool:
    shared = len(parts[one] & parts[other])
    return (
        shared >= ALIKE * len(parts[one] | parts[other])
        and codes_of(words[one]) == codes_of(words[other])
        and _plain(traces[one].row.reference) == _plain(traces[other].row.reference)
    )


# ---------------------------------------------------------------- shares
def beyond_share(traces: Sequence[Seen], percent: int, reason: str, whose: Callable[[Seen], str]) -> Iterator[Suspect]:
    """What one has given beyond `percent` of all, beyond `FEW`, and beyond `USUAL` times what the median one gives.

    Which of them stay goes by their ids alone: neither early nor late ones are easier to get in.
    """
    by: dict[str, list[Seen]] = defaultdict(list)
    unnamed = 0
    for seen in traces:
        if name := whose(seen):
            by[name].append(seen)
        else:
            unnamed += 1
    if percent >= 100 or not by:
        return
    usual = median([*map(len, by.values()), *[1] * unnamed])
    limit = int(max(FEW, percent * len(traces) / 100, USUAL * usual))
    for name, given in by.items():
        for seen in sorted(given, key=lambda seen: hashlib.sha256(seen.trace_id.encode()).digest())[limit:]:
            yield Suspect(
                seen,
                reason,
                f"{_short(name)} gave {len(given)} of {len(traces)} traces; {limit} of them are learnt from.",
            )


def _short(name: str) -> str:
    """Of a hash, which is long, its beginning."""
    return name[:12] if re.fullmatch(r"[0-9a-f]{64}", name) else name
