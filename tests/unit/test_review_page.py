"""The page of `cowest review` over HTTP: who is let in, what is shown, what is kept."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cowest_cli.review_page import Server
from cowest_cli.review_queue import Labels, Question, Session

NASTY = "</pre><script>alert(1)</script>"
QUESTIONS = [
    Question(({"role": "user", "content": f"which {n}? {NASTY}"},), "", (f"a{n}", f"b{n}"), "ordersDiffer")
    for n in range(3)
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(Session(QUESTIONS, Labels(tmp_path / "labels.jsonl", "ann"))) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(server: Server, path: str, body: Any = None, *, token: str | None = None, **headers: str) -> Any:
    """(status, headers, JSON or text)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    address = f"{path}?token={server.token if token is None else token}"
    method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
    connection.request(method, address, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, answer.headers, json.loads(text) if is_json else text


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def test_a_person_labels_all_questions_by_turns(server: Server, tmp_path: Path) -> None:
    _, _, state = ask(server, "/next")
    for said in ("left", "tie", "skip"):
        status, _, state = ask(server, "/label", {"id": state["question"]["id"], "said": said})
        assert status == 200
    assert state == {"left": 0, "question": None}
    assert [(each["label"], each["why"], each["by"]) for each in lines(tmp_path)] == [
        ("left", "ordersDiffer", "ann"), ("tie", "ordersDiffer", "ann"), ("skip", "ordersDiffer", "ann"),
    ]  # fmt: skip


def test_nothing_tells_why_a_question_is_asked_or_whose_an_answer_is(server: Server) -> None:
    _, _, state = ask(server, "/next")
    assert set(state["question"]) == {"id", "messages", "reference", "answers"}
    assert "ordersDiffer" not in json.dumps(state)


def test_going_back_shows_the_last_question_again(server: Server) -> None:
    first = ask(server, "/next")[2]["question"]
    ask(server, "/label", {"id": first["id"], "said": "left"})
    assert ask(server, "/back", {})[2] == {"left": 3, "question": first}


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"token": ""}, "no token"), ({"token": "guessed"}, "another token"), ({"Host": "evil.example"}, "another name")],
)
def test_nobody_else_reads_or_labels(server: Server, tmp_path: Path, changes: Any, why: str) -> None:
    id_ = ask(server, "/next")[2]["question"]["id"]
    for path, body in (("/", None), ("/next", None), ("/label", {"id": id_, "said": "left"}), ("/back", {})):
        status, _, said = ask(server, path, body, **changes)
        assert status == 403 and "which" not in json.dumps(said), why
    assert not (tmp_path / "labels.jsonl").exists()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/label", {"id": "sha256:other", "said": "left"}, 404),
        ("/label", {"id": QUESTIONS[0].id, "said": "good"}, 400),
        ("/label", ["left"], 400),
        ("/label", {"id": "x" * 5000, "said": "left"}, 400),
        ("/other", {}, 400),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_is_kept(
    server: Server, tmp_path: Path, path: str, body: Any, status: int
) -> None:
    seen, _, said = ask(server, path, body)
    assert seen == status and said["error"]
    assert not (tmp_path / "labels.jsonl").exists()


def test_a_label_that_cannot_be_kept_is_said_and_the_question_stays(tmp_path: Path, server: Server) -> None:
    (tmp_path / "labels.jsonl").mkdir()
    first = ask(server, "/next")[2]
    status, _, said = ask(server, "/label", {"id": first["question"]["id"], "said": "left"})
    assert status == 507 and "labels.jsonl" in said["error"]
    assert ask(server, "/next")[2] == first


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_but_its_own(server: Server) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200
    (once,) = set(re.findall(r'nonce="([^"]+)"', page))
    assert f"script-src 'nonce-{once}'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    assert not re.search(r"https?://|src=|href=|innerHTML", page)
    assert once not in ask(server, "/")[2], "another one each time"


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
