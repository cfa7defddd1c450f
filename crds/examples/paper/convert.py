"""Turn IfQA, MedMCQA or Prosocial-Dialog, the paper's three data sets, into rows that CoWest reads.

The files are yours to bring (JSON array, JSON Lines or Parquet, in the columns of the published sets), or `--hub`
fetches them through the library `datasets`. Four files are written: train.jsonl, whose drafts are explanations;
train-knowledge.jsonl and train-answer.jsonl, the same rows for the two other draft forms; held_out.jsonl.

    python convert.py ifqa --train full_split/train.json --held-out full_split/test.json --out desk/data/ifqa
    python convert.py medmcqa --hub --out desk/data/medmcqa

Rows without a label, repeated questions and training rows that nearly repeat a held-out one are left out and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cowest_training.contract import Row
from cowest_training.data import Known, conversation_key, folded, parse_row, tokens

Record = Mapping[str, Any]

FORMS = {"Explanation": "train.jsonl", "Knowledge": "train-knowledge.jsonl", "Answer": "train-answer.jsonl"}
HELD_OUT = "held_out.jsonl"
OPTIONS = "ABCD"
SAFETY_LABELS = (
    "casual",
    "possibly needs caution",
    "probably needs caution",
    "needs caution",
    "needs intervention",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
NO_LABEL, REPEATED, HELD_OUT_AGAIN = "without a label", "repeated question", "nearly a held-out question"


class ConversionError(Exception):
    """Ends the conversion with one sentence: wanted, seen, remedy."""


@dataclass(frozen=True)
class Example:
    """One question of a data set, before it is known which draft form is learnt from it."""

    id: str
    query: str
    answer: str  # what stands after "Answer:"; "" where the data have no label
    reference: str
    rationale: str = ""  # why; with the answer it is an explanation
    facts: str = ""  # what one has to know, without the answer
    group: str | None = None

    def draft(self, form: str) -> str:
        """What the weak model is taught to write; "" where the data have nothing to make it of."""
        answer = f"Answer: {self.answer}"
        if form == "Answer":
            return answer
        if form == "Knowledge":
            return self.facts
        return f"{self.rationale}\n{answer}" if self.rationale else ""

    def row(self, form: str | None) -> dict[str, str]:
        row = {"id": self.id, "query": self.query, "reference": self.reference}
        if form and (draft := self.draft(form)):
            row["explanation"] = draft
        return row | ({"group": self.group} if self.group else {})


@dataclass(frozen=True)
class Settings:
    """What a person may choose besides the files."""

    passages: bool = True  # IfQA: the passages stand in the question
    first_option: int | None = None  # MedMCQA: what `cop` calls the first option; None: told from the data


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and how it is read."""

    columns: tuple[str, ...]
    splits: tuple[str, str]  # train, held-out
    hub: str | None
    convert: Callable[[Sequence[Record], str, Settings], Iterator[Example]]


# ---------------------------------------------------------------- IfQA
def ifqa(records: Sequence[Record], prefix: str, settings: Settings) -> Iterator[Example]:
    """{idx, question, answers, context}: a question under a counterfactual "if", with passages that bear on it.

    The set has no reasoning. The sentence of the passages that shares most words with question and answer stands in.
    """
    for record in records:
        answers = [str(answer) for answer in record["answers"] if str(answer).strip()]
        evidence = evidence_of(record["question"], answers, record["context"])
        shown = [f"[{number}] {passage}" for number, passage in enumerate(record["context"], 1)]
        passages = "Passages:\n" + "\n".join(shown) + "\n\n" if settings.passages and shown else ""
        yield Example(
            id=f"{prefix}-{record['idx']}",
            query=f"{passages}{record['question']}\nAnswer in a few words. End with one line: Answer: ...",
            answer=answers[0] if answers else "",
            reference=references(answers),
            rationale=evidence,
            facts=evidence,
        )


def evidence_of(question: str, answers: Sequence[str], passages: Sequence[str]) -> str:
    """The sentence with most words of question and answers; the first of several, "" where there is none."""
    wanted = {word for text in (question, *answers) for word in tokens(folded(text))}
    sentences = [sentence.strip() for passage in passages for sentence in SENTENCE_END.split(passage)]
    return max(sentences, key=lambda sentence: len(wanted.intersection(tokens(folded(sentence)))), default="")


def references(answers: Sequence[str]) -> str:
    """One right answer as it is, several (or one that would be taken for several) as a JSON list."""
    if len(answers) == 1 and not answers[0].lstrip().startswith("["):
        return answers[0]
    return json.dumps(answers, ensure_ascii=False) if answers else ""


# ---------------------------------------------------------------- MedMCQA
def medmcqa(records: Sequence[Record], prefix: str, settings: Settings) -> Iterator[Example]:
    """{id, question, opa..opd, cop, exp, subject_name}: a medical entrance question with four options."""
    first = settings.first_option if settings.first_option is not None else first_option(records)
    for record in records:
        options = [f"{letter}. {record['op' + letter.lower()]}" for letter in OPTIONS]
        letter = _letter(record["cop"], first)
        explained = (record["exp"] or "").strip()
        yield Example(
            id=f"{prefix}-{record['id']}",
            query="\n".join([record["question"].strip(), *options, "End with one line: Answer: A, B, C or D."]),
            answer=letter,
            reference=letter,
            rationale=explained,
            facts=explained,
            group=record["subject_name"],
        )


def first_option(records: Iterable[Record]) -> int:
    """The Hub's files count the right option from 0, those of the authors' archive from 1."""
    seen = {record["cop"] for record in records} - {None, -1}
    if 0 in seen and 4 not in seen:
        return 0
    if 4 in seen and 0 not in seen:
        return 1
    raise ConversionError(
        f"cop: wanted to tell whether options count from 0 or from 1, saw {sorted(map(str, seen))}. Say --first-option."
    )


def _letter(cop: int | None, first: int) -> str:
    if cop is None or cop == -1:
        return ""
    if not 0 <= cop - first < len(OPTIONS):
        raise ConversionError(f"cop: wanted {first} to {first + len(OPTIONS) - 1}, saw {cop}. Say --first-option.")
    return OPTIONS[cop - first]


# ---------------------------------------------------------------- Prosocial-Dialog
def prosocial(records: Sequence[Record], prefix: str, _: Settings) -> Iterator[Example]:
    """{dialogue_id, response_id, context, response, safety_label, rots, ...}: how unsafe is the last utterance?

    One row a turn; the turns before it, with the answers that they got, stand above it.
    """
    by_turn = sorted(records, key=lambda record: (record["dialogue_id"], record["response_id"]))
    for _, turns in groupby(by_turn, key=lambda record: record["dialogue_id"]):
        before: list[str] = []
        for record in turns:
            label = safety_label(record["safety_label"])
            yield Example(
                id=f"{prefix}-{record['dialogue_id']}-{record['response_id']}",
                query=_ask_for_label([*before, f"A: {record['context']}"]),
                answer=label,
                reference=label,
                rationale=" ".join(_sentences([*record["safety_annotation_reasons"], *record["rots"]])),
                facts=" ".join(_sentences(record["rots"])),
                group=label or None,
            )
            before += [f"A: {record['context']}", f"B: {record['response']}"]


def safety_label(label: str | None) -> str:
    """`__needs_caution__` in words."""
    words = (label or "").strip("_").replace("_", " ")
    if words and words not in SAFETY_LABELS:
        raise ConversionError(f"safety_label: wanted one of {', '.join(SAFETY_LABELS)}, saw {label!r}.")
    return words


def _ask_for_label(dialogue: Sequence[str]) -> str:
    return "\n".join([
        "How safe is it to go along with the last utterance of this dialogue?",
        *dialogue,
        f"Choose one of: {', '.join(SAFETY_LABELS)}. End with one line: Answer: ...",
    ])  # fmt: skip


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Each once, with a full stop."""
    for text in dict.fromkeys(text.strip() for text in texts):
        if text:
            yield text if text.endswith((".", "!", "?")) else f"{text}."


SOURCES: Mapping[str, Source] = {
    "ifqa": Source(("idx", "question", "answers", "context"), ("train", "test"), None, ifqa),
    "medmcqa": Source(
        ("id", "question", "opa", "opb", "opc", "opd", "cop", "exp", "subject_name"),
        ("train", "validation"),  # the test split has no labels
        "openlifescienceai/medmcqa",
        medmcqa,
    ),
    "prosocial": Source(
        ("dialogue_id", "response_id", "context", "response", "safety_label", "safety_annotation_reasons", "rots"),
        ("train", "test"),
        "allenai/prosocial-dialog",
        prosocial,
    ),
}


# ---------------------------------------------------------------- reading
def read_records(paths: Sequence[Path], columns: Sequence[str]) -> list[Record]:
    """All records of one split. Raises `ConversionError` where a column is missing."""
    records = [record for path in paths for record in _read(path)]
    check_columns(records, columns, ", ".join(map(str, paths)))
    return records


def _read(path: Path) -> list[Record]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}. Check the path.") from None
    if data[:4] == b"PAR1":
        return list(pq.ParquetFile(path).read().to_pylist())
    try:
        if data.lstrip().startswith(b"["):
            return list(json.loads(data))
        return [json.loads(line) for line in data.split(b"\n") if line.strip()]
    except ValueError as error:
        raise ConversionError(f"{path}: wanted a JSON array, JSON Lines or Parquet, saw: {error}.") from None


def check_columns(records: Sequence[Record], columns: Sequence[str], where: str) -> None:
    if not records:
        raise ConversionError(f"{where}: wanted records, saw none.")
    for number, record in enumerate(records, 1):
        # MedMCQA leaves out what it does not know in its JSON files, and writes null in Parquet.
        if missing := [name for name in columns if name not in record and name not in ("cop", "exp")]:
            raise ConversionError(
                f"{where}, record {number}: wanted the columns {', '.join(columns)}, saw {', '.join(record)}"
                f" without {', '.join(missing)}. Is it another data set?"
            )


def complete(records: Iterable[Record], columns: Sequence[str]) -> list[Record]:
    """The wanted columns alone, absent ones as null."""
    return [{name: record.get(name) for name in columns} for record in records]


def from_hub(name: str, split: str) -> list[Record]:
    """`ORG/NAME[@REVISION]` through `datasets`, which is part of the extra `training`."""
    from datasets import load_dataset

    path, _, revision = name.partition("@")
    return list(load_dataset(path, split=split, revision=revision or None))


# ---------------------------------------------------------------- cleaning, sampling
@dataclass(frozen=True)
class Split:
    """What is written, and what was left out by reason."""

    examples: list[Example]
    left_out: Counter[str]


def take(examples: Iterable[Example], at_most: int, seed: int, known: Known | None = None) -> Split:
    """At most so many usable examples, drawn by the seed and their ids alone: the order of the files does not count."""
    kept: list[Example] = []
    left_out: Counter[str] = Counter()
    asked: set[tuple[str, ...]] = set()
    for example in sorted(examples, key=lambda e: hashlib.sha256(f"{seed}/{e.id}".encode()).digest()):
        if len(kept) == at_most:
            break
        messages = ({"role": "user", "content": example.query},)
        key = conversation_key(messages)
        if not example.answer:
            left_out[NO_LABEL] += 1
        elif key in asked:
            left_out[REPEATED] += 1
        elif known and known.find(messages):
            left_out[HELD_OUT_AGAIN] += 1
        else:
            asked.add(key)
            kept.append(example)
    return Split(sorted(kept, key=lambda example: example.id), left_out)


def rows_of(examples: Iterable[Example]) -> tuple[Row, ...]:
    return tuple(parse_row(example.row(None), example.id) for example in examples)


def write(out: Path, train: Split, held_out: Split) -> dict[str, Any]:
    """All files; returns what was written, for the person at the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    drafts = {}
    for form, name in FORMS.items():
        rows = [example.row(form) for example in train.examples]
        drafts[form] = sum("explanation" in row for row in rows)
        _write_rows(out / name, rows)
    _write_rows(out / HELD_OUT, [example.row(None) for example in held_out.examples])
    return {
        "out": str(out),
        "train": len(train.examples),
        "heldOut": len(held_out.examples),
        "withDraft": drafts,
        "leftOut": {"train": dict(train.left_out), "heldOut": dict(held_out.left_out)},
    }


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


# ---------------------------------------------------------------- command line
def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    source = SOURCES[options.dataset]
    settings = Settings(not options.without_passages, options.first_option)
    try:
        train, held_out = (
            source.convert(complete(records, source.columns), prefix, settings)
            for records, prefix in zip(_records(options, source), ("train", "held-out"), strict=True)
        )
        judged = take(held_out, options.max_held_out, options.seed)
        learnt = take(train, options.max_train, options.seed, Known(rows_of(judged.examples)))
        print(json.dumps(write(options.out, learnt, judged)))
    except ConversionError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


def _records(options: argparse.Namespace, source: Source) -> tuple[list[Record], list[Record]]:
    if options.hub is None:
        if not options.train or not options.held_out:
            raise ConversionError("wanted --train and --held-out with files, or --hub; saw neither.")
        return read_records(options.train, source.columns), read_records(options.held_out, source.columns)
    if not (name := options.hub or source.hub):
        raise ConversionError(
            f"--hub: wanted the id of a repository with the columns {', '.join(source.columns)}, saw none: this set is"
            " published as files. Bring them with --train and --held-out."
        )
    train, held_out = (from_hub(name, split) for split in source.splits)
    for records, split in ((train, source.splits[0]), (held_out, source.splits[1])):
        check_columns(records, source.columns, f"{name}, split {split}")
    return train, held_out


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=tuple(SOURCES))
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE", help="files of the training split")
    parser.add_argument("--held-out", type=Path, nargs="+", metavar="FILE", help="files of the split to judge on")
    parser.add_argument("--hub", nargs="?", const="", metavar="ORG/NAME[@REVISION]", help="fetch both splits instead")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--max-train", type=int, default=10_000, metavar="N")
    parser.add_argument("--max-held-out", type=int, default=1_000, metavar="N", help="each one is paid for")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--without-passages", action="store_true", help="ifqa: ask without the passages")
    parser.add_argument("--first-option", type=int, choices=(0, 1), help="medmcqa: what `cop` calls the first option")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
