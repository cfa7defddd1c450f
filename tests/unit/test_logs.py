"""Log lines for a collector."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from cowest_operator import api
from cowest_serving import logs
from cowest_serving.logs import JsonLines
from cowest_training import contract


def test_a_line_is_one_object_with_what_was_said_beside_the_message() -> None:
    record = logging.makeLogRecord(
        {"name": "a.b", "levelname": "WARNING", "msg": "%s\nlost", "args": ("two",), "created": 0.5, "round": 3}
    )
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonLines().format(record)
    line = json.loads(text)
    assert "\n" not in text and line.pop("error").endswith("ValueError: why")
    assert line == {
        "time": "1970-01-01T00:00:00.500+00:00", "level": "warning", "logger": "a.b", "message": "two\nlost", "round": 3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        pytest.param({}, {}, id="nothing is said"),
        pytest.param({"COWEST_JOB": "law/claims"}, {"job": "law/claims"}, id="a server of a job"),
        pytest.param(
            {"COWEST_JOB": "law/claims-r9", "COWEST_STEP": "claims-r9-r1-dpo"},
            {"job": "law/claims-r9", "step": "r1-dpo", "round": 1},
            id="a step of a round",
        ),
        pytest.param(
            {"COWEST_JOB": "law/claims", "COWEST_STEP": "claims-erase"},
            {"job": "law/claims", "step": "erase"},
            id="a step of no round",
        ),
        pytest.param({"COWEST_STEP": "r0-check"}, {"step": "r0-check", "round": 0}, id="a step on one machine"),
    ],
)
def test_the_environment_says_what_a_process_logs_about(environment: dict[str, str], told: dict[str, Any]) -> None:
    assert logs.about(environment) == told


def test_a_sentence_is_plain_for_people_and_a_line_for_a_collector(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.complain("no room", "Full")
    assert capsys.readouterr().err == "no room\n"
    monkeypatch.setenv("COWEST_LOG_FORMAT", "json")
    monkeypatch.setenv("COWEST_JOB", "law/claims")
    logs.complain("no room\n", "Full")
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time")
    assert line == {"level": "error", "logger": "cowest", "message": "no room", "job": "law/claims", "reason": "Full"}


def test_steps_end_in_the_words_of_the_operator() -> None:
    said = contract.REASONS
    assert said[contract.EXIT_BAD_INPUT] == said[contract.EXIT_FAILED] == api.REASON_STEP_FAILED
    assert said[contract.EXIT_RETRY] == api.REASON_STEP_RETRY
    assert said[contract.EXIT_MISSING] == api.REASON_DATA_MISSING
    assert said[contract.EXIT_BUDGET] == api.REASON_BUDGET
    assert logs.REASON_STORE_AWAY == api.REASON_STORE_AWAY
