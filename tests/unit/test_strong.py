"""What pods say of the strong endpoint, word by word, and what the status says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cowest_operator import api, strong
from cowest_serving.contract import Budget, Fallback, SecretRef
from tests import world as w

HERE = "https://s/v1"
WELL: Mapping[str, Any] = {"failing": False, "since": None, "error": None, "last_failure": None, "last_answer": None}


def bad(error: str = "ServerFault", since: float = 100.0, last: float = 200.0) -> Mapping[str, Any]:
    return {**WELL, "failing": True, "since": since, "error": error, "last_failure": last}


def after(*words: Mapping[str, Any] | None) -> strong.Failing | None:
    known = None
    for word in words:
        known = strong.seen(HERE, word, known)
    return known


FAILING = strong.Failing(HERE, 100.0, 200.0, "ServerFault")


@pytest.mark.parametrize(
    ("words", "known"),
    [
        pytest.param([None, WELL], None, id="nothing was seen yet"),
        pytest.param([bad()], FAILING, id="it fails"),
        pytest.param([bad(), None, WELL], FAILING, id="a replica that knows nothing changes nothing"),
        pytest.param([bad(), {**WELL, "last_answer": 150.0}], FAILING, id="nor does an answer before the failures"),
        pytest.param([bad(), {**WELL, "last_answer": 201.0}], None, id="an answer after them ends it"),
        pytest.param([bad(), bad("DeadlineExceeded", 150.0, 300.0)], replace(FAILING, last=300.0),
                     id="faults of one kind that come in turn are one"),
        pytest.param([bad(), bad("Unauthorized", 250.0, 300.0)],
                     replace(FAILING, last=300.0, error="Unauthorized"), id="a refused key is another fault"),
    ],
)  # fmt: skip
def test_a_trouble_comes_once_and_goes_with_an_answer(words: list[Any], known: strong.Failing | None) -> None:
    assert after(*words) == known


def test_an_endpoint_that_was_edited_starts_anew() -> None:
    assert strong.seen("https://other/v1", None, after(bad())) is None


def job(**changes: Any) -> api.Job:
    asked = replace(w.JOB.spec.strong, api_key_secret_refs=(SecretRef("openai", "key"),), **changes)
    return replace(w.JOB, spec=replace(w.JOB.spec, strong=asked))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("EndpointUnreachable", "network policies"),
        ("DeadlineExceeded", "strong.timeoutSeconds"),
        ("ServerFault", "5xx"),
        ("BadAnswer", "base address"),
        ("RateLimited", "lower strong.maxConcurrency"),
        ("Unauthorized", "put a valid one into Secret openai."),
        ("BadRequest", "strong.model"),
    ],
)
def test_the_sentence_says_what_to_do(error: str, says: str) -> None:
    told = strong.trouble(job(), {strong.STEPS: replace(FAILING, error=error)})
    assert told is not None and told.reason == api.REASON_STRONG_FAILS
    assert "https://s/v1 has failed for steps since 1970-01-01 00:01:40 UTC: " in told.message
    assert says in told.message and "Meanwhile" not in told.message


def test_the_sentence_says_what_users_get_meanwhile() -> None:
    both = {strong.USERS: replace(FAILING, since=50.0), strong.STEPS: FAILING}
    told = strong.trouble(job(), both)
    assert told is not None and "for users and steps since 1970-01-01 00:00:50 UTC" in told.message
    assert told.of_all_answers
    assert f"whenStrongFails: {w.JOB.spec.collaboration.when_strong_fails}" in told.message
    told = strong.trouble(job(fallbacks=(Fallback("https://b/v1", "b"),)), both)
    assert told is not None and told.message.endswith("Meanwhile strong.fallbacks answer.")
    assert not told.of_all_answers
    assert strong.trouble(job(), {}) is None


@pytest.mark.parametrize(
    ("error", "says"),
    [("EndpointUnreachable", "may this machine reach it"), ("Unauthorized", "strong.apiKeySecretRefs")],
)
def test_on_one_machine_there_are_no_pods_and_no_secrets(error: str, says: str) -> None:
    told = strong.trouble(job(), {strong.USERS: replace(FAILING, error=error)}, here=True)
    assert told is not None and says in told.message
    assert "pods" not in told.message and "Secret openai" not in told.message


LIMITS = Budget(money_per_day=1.0)
NO_ROOM = strong.NoRoom(LIMITS, "1970-01-01", "NoBudget")
REFUSES: Mapping[str, Any] = {"day": "1970-01-01", "left_tokens": None, "left_money": 0.2, "refuses": "NoBudget"}
HAS_ROOM: Mapping[str, Any] = {**REFUSES, "refuses": None}


@pytest.mark.parametrize(
    ("word", "budget", "now", "known"),
    [
        pytest.param(REFUSES, LIMITS, 9.0, NO_ROOM, id="it refuses calls"),
        pytest.param(HAS_ROOM, LIMITS, 9.0, None, id="it has room again"),
        pytest.param({**HAS_ROOM, "day": None}, LIMITS, 9.0, NO_ROOM, id="a gateway that met no call changes nothing"),
        pytest.param(
            {**HAS_ROOM, "left_money": -0.1}, LIMITS, 9.0, NO_ROOM, id="nor does one that rests while it is spent"
        ),
        pytest.param(None, LIMITS, 9.0, NO_ROOM, id="nor one that does not answer"),
        pytest.param({**HAS_ROOM, "day": None}, Budget(money_per_day=2.0), 9.0, None, id="the limit was edited"),
        pytest.param({**HAS_ROOM, "day": None}, LIMITS, 90_000.0, None, id="another day begins"),
        pytest.param({"day": None, "left_tokens": None, "left_money": None}, None, 9.0, None, id="an older gateway"),
    ],
)
def test_a_spent_budget_is_said_until_there_is_room(
    word: Mapping[str, Any] | None, budget: Budget, now: float, known: strong.NoRoom | None
) -> None:
    assert strong.room(budget, word, now, NO_ROOM) == known
