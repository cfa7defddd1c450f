"""What people are asked by `cowest review`, in which order, and the labels that they give. Pure but for the file.

A question is blind: it has neither arm, draft, score nor doubt, and which of two answers stands left is chance.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cowest_serving.contract import Messages
from cowest_training.calibration import ONE, SAMPLE, SKIP, TWO, question_id, said_by
from cowest_training.contract import StepError

USER_DISAGREES = "userDisagrees"
LEFT, TIE, RIGHT = "left", "tie", "right"  # what a person says: of one answer bad, partly good, good
SAID = (LEFT, TIE, RIGHT, SKIP)
_OF_ONE = {LEFT: "reject", TIE: "partial", RIGHT: "accept", SKIP: SKIP}
ANSWERS = 2


@dataclass(frozen=True)
class Question:
    """One answer, or two to compare."""

    messages: Messages
    reference: str
    answers: tuple[str, ...]  # as they are shown
    why: str  # it is asked; nobody is shown this

    @property
    def id(self) -> str:
        return question_id(self.messages, self.answers)

    def shown(self) -> dict[str, Any]:
        """All that a person sees."""
        asked = [{"role": str(m.get("role")), "text": text_of(m.get("content"))} for m in self.messages]
        return {"id": self.id, "messages": asked, "reference": self.reference, "answers": list(self.answers)}

    def label(self, said: str, by: str) -> dict[str, Any]:
        """A line of the file of labels, as `cowest_training.calibration` reads it."""
        bare = len(self.messages) == 1 and isinstance(self.messages[0].get("content"), str)
        asked = {"query": self.messages[0]["content"]} if bare else {"messages": [dict(m) for m in self.messages]}
        two = len(self.answers) == ANSWERS
        answers = {"answers": list(self.answers)} if two else {"answer": self.answers[0]}
        reference = {"reference": self.reference} if self.reference else {}
        return {**asked, **reference, **answers, "label": said if two else _OF_ONE[said], "by": by, "why": self.why}


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, Mapping))


# ---------------------------------------------------------------- from what is known
def of_evaluation(items: Iterable[Mapping[str, Any]], seed: str) -> Iterator[tuple[Question, str]]:
    """The candidate's answer beside the control's, where they differ, and why a judge's word on them is doubted."""
    for item in items:
        texts = [str(item[f"{arm}_answer"] or "") for arm in ("candidate", "control")]
        if any(item.get(f"{arm}_error") for arm in ("candidate", "control")) or texts[0].strip() == texts[1].strip():
            continue
        if (messages := messages_of(item)) is None:
            continue
        if chance(seed, "side", question_id(messages, texts)) % 2:
            texts.reverse()
        doubts = (str(item.get(f"{arm}_doubt") or "") for arm in ("candidate", "control"))
        yield Question(messages, str(item["reference"] or ""), tuple(texts), SAMPLE), next(filter(None, doubts), "")


def messages_of(item: Mapping[str, Any]) -> Messages | None:
    """None of a chat of which an older evaluation, or one without a judge, kept the text alone."""
    if item.get("messages"):
        return tuple(json.loads(item["messages"]))
    return None if item.get("conversation") else ({"role": "user", "content": str(item["query"])},)


def disagrees(user: float, evaluator: float) -> bool:
    """The one calls right what the other calls wrong."""
    return abs(said_by([user]) - said_by([evaluator])) == len(ONE) - 1


def queue(
    asked: Iterable[tuple[Question, str]], of_users: Iterable[Question], sample: int, seed: str
) -> list[Question]:
    """At most `sample` that are drawn by chance, and by turns with them what is doubted. The same seed, the same queue.

    Drawn is by the digest of each question alone, so that the first so many are a sample whenever a person stops.
    """
    every = {question.id: (question, doubt) for question, doubt in asked}
    drawn = sorted(every, key=lambda id_: chance(seed, "draw", id_))
    by_chance = [every[id_][0] for id_ in drawn[:sample]]
    picked = {
        **{id_: replace(every[id_][0], why=every[id_][1]) for id_ in drawn[sample:] if every[id_][1]},
        **{question.id: question for question in of_users},
    }
    doubted = [picked[id_] for id_ in sorted(picked, key=lambda id_: chance(seed, "pick", id_))]
    return [question for both in zip_longest(by_chance, doubted) for question in both if question]


def chance(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


# ---------------------------------------------------------------- the file of labels
class Labels:
    """The file, and what one person has labelled in it so far. Appended to; never rewritten."""

    def __init__(self, path: Path, by: str) -> None:
        self.path, self.by = path, by
        self._done = dict(_labelled(path, by))  # id -> why it was asked

    def has(self, question: Question) -> bool:
        """Drawn by chance it is asked again where it was labelled for another reason: the sample would lack it."""
        why = self._done.get(question.id)
        return why is not None and (question.why != SAMPLE or why == SAMPLE)

    def forget(self, id_: str) -> None:
        """It is to be asked again. The file keeps what was said until another word comes."""
        self._done.pop(id_, None)

    def add(self, question: Question, said: str) -> None:
        """One line, whole or not at all after a crash, whoever writes beside us. Raises `StepError`."""
        line = json.dumps(question.label(said, self.by), ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # after one that was cut off
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StepError(f"{self.path}: the label cannot be kept there: {error.strerror}. Make room.") from None
        self._done[question.id] = question.why


def _labelled(path: Path, by: str) -> Iterator[tuple[str, str]]:
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that was cut off, or is no label
            record = json.loads(line)
            if record.get("by", "") == by and record["label"] in (*ONE, *TWO, SKIP):
                messages = record.get("messages") or ({"role": "user", "content": record["query"]},)
                answers = record.get("answers") or [record["answer"]]
                yield question_id(messages, answers), str(record.get("why") or SAMPLE)


class Session:
    """One person at the queue: what is asked next, what was said, one step back at a time."""

    def __init__(self, questions: Sequence[Question], labels: Labels) -> None:
        self._questions, self._labels = {question.id: question for question in questions}, labels
        self._said: list[str] = []  # in this session, for going back

    @property
    def by(self) -> str:
        return self._labels.by

    @property
    def left(self) -> int:
        return sum(not self._labels.has(question) for question in self._questions.values())

    def next(self) -> Question | None:
        return next((question for question in self._questions.values() if not self._labels.has(question)), None)

    def say(self, id_: str, said: str) -> bool:
        """False where there is no such question. Raises `StepError` where it cannot be kept."""
        if id_ not in self._questions:
            return False
        self._labels.add(self._questions[id_], said)
        self._said.append(id_)
        return True

    def back(self) -> None:
        """The last question is asked again; the last word on it counts."""
        if self._said:
            self._labels.forget(self._said.pop())
