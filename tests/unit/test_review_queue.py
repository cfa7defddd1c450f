"""What people are asked, in which order, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cowest_cli.review_queue import USER_DISAGREES, Labels, Question, Session, disagrees, of_evaluation, queue
from cowest_training.calibration import read_labels
from cowest_training.contract import Evaluator

JUDGE = Evaluator("Judge", endpoint="https://judge/v1", model="judge")


def item(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}", "query": f"question {number}", "reference": "", "conversation": None,
        "candidate_answer": f"mine {number}", "control_answer": f"other {number}", "candidate_error": "",
        "control_error": "", "candidate_doubt": "", "control_doubt": "", **changes,
    }  # fmt: skip


def asked(*items: dict[str, Any]) -> list[tuple[Question, str]]:
    return list(of_evaluation(items, "job"))


def of_user(text: str = "live") -> Question:
    return Question(({"role": "user", "content": text},), "", ("an answer",), USER_DISAGREES)


def test_only_what_the_arms_answer_differently_is_asked() -> None:
    same = item(2, control_answer=" mine 2\n")
    failed = item(3, control_error="400")
    (one,) = asked(item(1), same, failed)
    assert set(one[0].answers) == {"mine 1", "other 1"}


def test_left_and_right_are_chance_and_nothing_else_tells_the_arms_apart() -> None:
    questions = [question for question, _ in asked(*(item(n) for n in range(400)))]
    left = sum(question.answers[0].startswith("mine") for question in questions)
    assert 150 < left < 250
    assert questions == [question for question, _ in asked(*(item(n) for n in range(400)))], "the same each time"
    shown = json.dumps(questions[0].shown())
    assert "sample" not in shown and "candidate" not in shown and "score" not in shown


def test_a_chat_is_shown_whole_and_one_whose_messages_were_not_kept_is_left_out() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes?"}]},
            {"role": "user", "content": "why?"}]  # fmt: skip
    (one,) = asked(item(1, messages=json.dumps(chat), conversation="..."), item(2, conversation="user:\nhi"))
    assert [each["text"] for each in one[0].shown()["messages"]] == ["hi", "yes?", "why?"]


def test_what_is_drawn_is_chance_alone_and_what_is_doubted_comes_by_turns_with_it() -> None:
    items = asked(*(item(n, candidate_doubt="ordersDiffer" if n < 40 else "") for n in range(200)))
    questions = queue(items, [of_user()], 20, "job")
    drawn = [question for question in questions if question.why == "sample"]
    assert len(drawn) == 20 and len(questions) == len({question.id for question in questions})
    assert {question.why for question in questions} == {"sample", "ordersDiffer", USER_DISAGREES}
    assert [question.why == "sample" for question in questions[:10]] == [True, False] * 5
    assert drawn == [q for q in queue(asked(*(item(n) for n in range(200))), [], 20, "job")], "doubts change no draw"
    assert drawn == [q for q in queue(items, [], 60, "job") if q.why == "sample"][:20], "a larger draw begins alike"


@pytest.mark.parametrize(("user", "judge", "differ"), [(1.0, 0.0, True), (0.0, 1.0, True), (1.0, 0.5, False),
                                                       (0.5, 0.0, False), (1.0, 1.0, False)])  # fmt: skip
def test_users_and_a_judge_disagree_where_one_calls_right_what_the_other_calls_wrong(
    user: float, judge: float, differ: bool
) -> None:
    assert disagrees(user, judge) is differ


def test_what_is_said_is_what_the_evaluator_is_held_against(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.jsonl", "ann")
    two = Question(({"role": "user", "content": "which?"},), "41", ("a", "b"), "sample")
    chat = ({"role": "system", "content": "terse"}, {"role": "user", "content": "which?"})
    for question, said in ((two, "right"), (of_user(), "left"), (Question(chat, "", ("a",), "sample"), "tie")):
        labels.add(question, said)
    one, other, third = read_labels((tmp_path / "labels.jsonl").as_uri(), JUDGE)
    assert (one.answers, one.label, one.row.reference, one.by, one.is_sample) == (("a", "b"), 0, "41", "ann", True)
    assert (other.label, other.is_sample, third.label, third.row.messages) == (0, False, 1, chat)


def test_a_later_run_goes_on_where_this_one_ended_for_each_person(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    questions = queue(asked(*(item(n) for n in range(5))), [], 5, "job")
    first = Session(questions, Labels(path, "ann"))
    assert first.say(questions[0].id, "left") and first.say(questions[1].id, "skip")
    with path.open("ab") as file:
        file.write(b'{"query": "cut o')  # a crash
    again = Session(questions, Labels(path, "ann"))
    assert again.left == 3 and again.next() == questions[2]
    assert Session(questions, Labels(path, "bob")).left == 5
    again.say(questions[2].id, "tie")
    assert [json.loads(line)["label"] for line in path.read_text().splitlines() if not line.endswith("cut o")] == [
        "left", "skip", "tie",
    ]  # fmt: skip


def test_going_back_asks_again_and_the_last_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    questions = queue(asked(item(1), item(2)), [], 2, "job")
    session = Session(questions, Labels(path, "ann"))
    session.back()  # there is nothing to go back to
    session.say(questions[0].id, "left")
    session.back()
    assert session.next() == questions[0] and session.left == 2
    session.say(questions[0].id, "right")
    (label,) = read_labels(path.as_uri(), JUDGE)
    assert label.label == 0


def test_what_was_labelled_for_its_doubt_is_asked_again_once_it_is_drawn(tmp_path: Path) -> None:
    """Otherwise a sample would lack just what the judge finds hard."""
    items = asked(*(item(n, control_doubt="ordersDiffer") for n in range(10)))
    labels = Labels(tmp_path / "labels.jsonl", "ann")
    for question in queue(items, [], 2, "job"):
        labels.add(question, "left")
    again = Session(queue(items, [], 10, "job"), Labels(labels.path, "ann"))
    assert again.left == 8
    assert Session(queue(items, [], 2, "job"), Labels(labels.path, "ann")).left == 0
