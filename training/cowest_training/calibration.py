"""How far an evaluator agrees with people: answers that they labelled, scored and compared (decision 16).

One JSON object a line, as `cowest review` writes them:

    {"query": "...", "answer": "...", "label": "accept"}              one answer: accept, partial or reject
    {"query": "...", "answers": ["...", "..."], "label": "left"}      two: left (the first is better), tie or right

`messages` may stand for `query`, as in data files. Also read: `reference`, `by` (who labelled: the last word of each
counts) and `why` (how it was chosen: what was not drawn by chance is no sample, and is told apart). `skip` is no label.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cowest_serving.contract import Messages, digest_of

from .contract import LEAST_LABELS, CalibrationReport, Evaluator, Row, StepError
from .data import parse_row, read_records, refuse
from .evaluator import reference_problem
from .statistics import TINY, kappa_interval, mean_interval

FIELD = "spec.feedback.evaluator.calibration"
SAMPLE = "sample"  # `why` of what was drawn by chance
ONE = {"reject": 0, "partial": 1, "accept": 2}
TWO = {"right": 0, "tie": 1, "left": 2}
SKIP = "skip"
RIGHT_FROM, WRONG_TO = 0.75, 0.25  # a score between these is partial

Score = Callable[[Row, str], Awaitable[float]]


@dataclass(frozen=True)
class Label:
    """What one person said of one answer, or of two."""

    row: Row
    answers: tuple[str, ...]
    label: int  # 0, 1, 2: reject, partial, accept of one; right, tie, left of two
    by: str = ""
    why: str = SAMPLE

    @property
    def is_sample(self) -> bool:
        return self.why == SAMPLE

    @property
    def what(self) -> tuple[str, str]:
        """Of what it is, and whose it is."""
        return question_id(self.row.messages, self.answers), self.by


def question_id(messages: Messages, answers: Sequence[str]) -> str:
    """In whatever order the answers stand."""
    return digest_of([list(messages), sorted(answers)])


def read_labels(uri: str, settings: Evaluator) -> list[Label]:
    """Raises one `StepError` that lists what is wrong, by line."""
    found: dict[tuple[str, str], Label | None] = {}
    problems = []
    for where, record in read_records(uri, f"{FIELD}.labels"):
        try:
            label, what = parse_label(record, where)
            if label is not None and (problem := reference_problem(settings, label.row.reference)):
                raise ValueError(f"reference: {problem}")
            found.pop(what, None)  # the last word counts, and stands where it was said
            found[what] = label
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
    refuse(f"labels of {uri}", problems, "Correct the file and run again.")
    labels = [label for label in found.values() if label is not None]
    if not labels:
        raise StepError(f"{uri}: wanted labels of answers, saw none. `cowest review` writes them.")
    return labels


def parse_label(record: Any, where: str) -> tuple[Label | None, tuple[str, str]]:
    """The label, None where it was skipped, and what it is of. Raises `ValueError` (wanted, saw)."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"wanted a JSON object, saw {type(record).__name__}")
    row = parse_row({"id": where, **{name: record.get(name) for name in ("query", "messages", "reference")}}, where)
    answer, answers = record.get("answer"), record.get("answers")
    if (answer is None) == (answers is None):
        raise ValueError("wanted `answer`, or `answers` with two of them")
    texts = [answer] if answers is None else answers
    if not isinstance(texts, list) or len(texts) != (2 if answer is None else 1):
        raise ValueError(f"answers: wanted a list of two texts, saw {str(answers)[:60]!r}")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("wanted answers that are text")
    labels, said = (ONE if answers is None else TWO), record.get("label")
    if said not in (*labels, SKIP):
        raise ValueError(f"label: wanted one of {', '.join((*labels, SKIP))}, saw {said!r}")
    label = Label(row, tuple(texts), labels.get(said, 1), str(record.get("by") or ""), str(record.get("why") or SAMPLE))
    return (None if said == SKIP else label), label.what


def few_note(labels: Sequence[Label]) -> str:
    """Said where there are too few labels for any evaluator to be found good enough; else ""."""
    counted = sum(label.is_sample for label in labels)
    if counted >= LEAST_LABELS:
        return ""
    return (
        f"{FIELD}.labels has {counted} labels of answers drawn by chance, and {LEAST_LABELS} are the least that can"
        " show agreement: until then the evaluator informs, and promotes nothing. `cowest review` asks for more."
    )


def answers_to_score(labels: Sequence[Label]) -> int:
    """Each once."""
    return len({(digest_of(list(label.row.messages)), text) for label in labels for text in label.answers})


def labels_digest(labels: Sequence[Label]) -> str:
    return digest_of(
        [[list(la.row.messages), la.row.reference, list(la.answers), la.label, la.by, la.why] for la in labels]
    )


# ---------------------------------------------------------------- agreement
async def calibrate(score: Score, labels: Sequence[Label], seed: int = 0) -> CalibrationReport:
    """Scores each answer as any other, and compares."""
    async with asyncio.TaskGroup() as group:  # in which the first failure ends the others
        tasks = [group.create_task(_scores(score, label)) for label in labels]
    return make_report(labels, [said_by(task.result()) for task in tasks], seed)


async def _scores(score: Score, label: Label) -> list[float]:
    return [await score(label.row, text) for text in label.answers]


def said_by(scores: Sequence[float]) -> int:
    """The label that scores stand for: of two answers the better one, of one its grade."""
    if len(scores) == 2:
        left, right = scores
        return 1 if abs(left - right) <= TINY else 2 if left > right else 0
    return 2 if scores[0] >= RIGHT_FROM else 0 if scores[0] <= WRONG_TO else 1


def make_report(labels: Sequence[Label], said: Sequence[int], seed: int) -> CalibrationReport:
    """`said`: what the evaluator's scores stand for, label by label."""
    pairs = list(zip(labels, said, strict=True))
    sample = [(label, verdict) for label, verdict in pairs if label.is_sample]
    picked = [float(label.label == verdict) for label, verdict in pairs if not label.is_sample]
    together = [query_of(label.row.messages) for label, _ in sample]
    agreed = [float(label.label == verdict) for label, verdict in sample]
    agreement, low, high = mean_interval(agreed, together, seed)
    kappa, kappa_low, kappa_high = kappa_interval(_tables(sample, together), seed)
    return CalibrationReport(
        labels=len(sample),
        agreement=agreement,
        low=low,
        high=high,
        kappa=kappa,
        kappa_low=kappa_low,
        kappa_high=kappa_high,
        opposite=sum(abs(label.label - verdict) == 2 for label, verdict in sample),
        picked=len(picked),
        picked_agreement=sum(picked) / len(picked) if picked else 0.0,
        labels_digest=labels_digest(labels),
    )


def query_of(messages: Messages) -> str:
    """Labels of one question are no independent evidence."""
    return digest_of(list(messages))


def _tables(sample: Sequence[tuple[Label, int]], together: Sequence[str]) -> Any:
    """(questions, one answer or two, what people said, what the evaluator said)."""
    number = {query: i for i, query in enumerate(dict.fromkeys(together))}
    seen = Counter(
        (number[query], len(label.answers) - 1, label.label, verdict)
        for query, (label, verdict) in zip(together, sample, strict=True)
    )
    tables = np.zeros((len(number), 2, 3, 3))
    for place, count in seen.items():
        tables[place] = count
    return tables
