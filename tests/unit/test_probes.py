"""Who is asked once before anything is started: what each answer comes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from cowest_cli import probes
from cowest_serving.contract import SecretRef
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, Evaluator, Juror, Row, StepError
from tests.fakes import Fault, ScriptedModel

ROW = Row("q1", "what?", ({"role": "user", "content": "what?"},), "42", where="train.jsonl:1")


@contextmanager
def scorer(status: int, text: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


def refusal(settings: Evaluator, **keys: str) -> StepError:
    with pytest.raises(StepError) as raised:
        probes.evaluator_answers(settings, keys, ROW)
    assert "before anything is started" in str(raised.value)
    return raised.value


def test_a_scorer_that_takes_no_such_key_is_found_before_the_first_draft() -> None:
    with scorer(401, "who are you?") as url:
        error = refusal(Evaluator("HTTP", endpoint=url))
    assert error.code == EXIT_BAD_INPUT and "apiKeySecretRef" in str(error) and "401" in str(error)


def test_a_scorer_that_is_overloaded_is_worth_another_try() -> None:
    with scorer(503, "") as url:
        assert refusal(Evaluator("HTTP", endpoint=url)).code == EXIT_RETRY


@pytest.mark.parametrize(("score", "says"), [("0", "gives 0 to the reference of train.jsonl:1"), ("0.5", "")])
def test_a_scorer_that_thinks_nothing_of_the_right_answer_is_told(score: str, says: str) -> None:
    with scorer(200, f'{{"score": {score}}}') as url:
        said = probes.evaluator_answers(Evaluator("HTTP", endpoint=url), {}, ROW)
    assert says in said and bool(said) == bool(says)


def test_a_judge_is_asked_for_one_token_by_its_key() -> None:
    with ScriptedModel("ACCEPT", keys=("right",)).in_thread() as judge:
        settings = Evaluator("Judge", endpoint=judge.url, model="scripted", api_key_secret_ref=SecretRef("s", "k"))
        assert probes.evaluator_answers(settings, {"COWEST_EVALUATOR_API_KEY": "right"}, ROW) == ""
        assert [call.body["max_tokens"] for call in judge.paid] == [1]
        wrong = refusal(settings, COWEST_EVALUATOR_API_KEY="wrong")
        assert wrong.code == EXIT_BAD_INPUT and "Check that the API key given" in str(wrong)
        missing = str(refusal(Evaluator("Judge", endpoint=judge.url, model="scripted")))
        assert "No API key was sent. Declare feedback.evaluator.apiKeySecretRef." in missing
        assert "is right" not in missing, "there is no key to check"


def test_each_juror_is_asked_by_its_own_key_and_named_where_it_fails() -> None:
    with ScriptedModel("ACCEPT").in_thread() as judge, ScriptedModel("ACCEPT", keys=("right",)).in_thread() as other:
        jury = (Juror(other.url, "other"),)
        settings = Evaluator("Judge", endpoint=judge.url, model="scripted", jury=jury)
        assert probes.evaluator_answers(settings, {"COWEST_JURY_API_KEY_1": "right"}, ROW) == ""
        assert (len(judge.paid), len(other.paid)) == (1, 1)
        missing = str(refusal(settings))
        assert "spec.feedback.evaluator.jury[0] was asked" in missing
        assert "Declare feedback.evaluator.jury[0].apiKeySecretRef." in missing


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        pytest.param("<html>welcome</html>", EXIT_BAD_INPUT, "normally ends in /v1", id="a page"),
        pytest.param("{}", EXIT_BAD_INPUT, "normally ends in /v1", id="an empty object"),
        pytest.param('{"choices": []}', EXIT_BAD_INPUT, "normally ends in /v1", id="no choice"),
        pytest.param('{"error": {"message": "asleep"}}', EXIT_RETRY, "asleep", id="an error of its own"),
    ],
)
def test_what_is_no_chat_endpoint_is_not_worth_a_retry(body: str, code: int, says: str) -> None:
    with ScriptedModel(faults=[Fault(200, body=body)] * 9).in_thread() as judge:
        error = refusal(Evaluator("Judge", endpoint=judge.url, model="scripted"))
    assert error.code == code and says in str(error)


@pytest.mark.parametrize("kind", ["ExactMatch", "TokenF1", "Numeric"])
def test_rules_ask_nobody(kind: str) -> None:
    assert probes.evaluator_answers(Evaluator(kind), {}, ROW) == ""  # type: ignore[arg-type]
