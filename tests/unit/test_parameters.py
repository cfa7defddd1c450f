"""What an endpoint's refusal says of a parameter, and for how long and for whom it is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from cowest_serving.parameters import KNOWN_SECONDS, NotTaken, refused_parameter
from tests.fakes import ONLY_DEFAULT, OTHER_LIMIT


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        pytest.param(
            400, {"message": ONLY_DEFAULT, "param": "temperature"}, "temperature", id="named as the parameter"
        ),
        pytest.param(400, {"message": OTHER_LIMIT, "param": None}, "max_tokens", id="named first in the message"),
        pytest.param(400, {"message": "Unknown parameter: 'foo'. Did you mean 'seed'?", "param": "foo"}, ""),
        pytest.param(422, {"message": "[{'loc': ['body', 'seed'], 'msg': 'Extra inputs are not permitted'}]"}, "seed"),
        pytest.param(400, {"message": "wanted a temperature of at most 2, saw 5", "param": "temperature"}, ""),
        pytest.param(400, {"message": "max_tokens is too large: 9000", "param": "max_tokens"}, ""),
        pytest.param(400, {"message": "model: unknown"}, ""),
        pytest.param(400, {"message": "Unsupported value: 'messages[0].role'", "param": "messages"}, ""),
        pytest.param(404, {"message": "temperature is not supported"}, ""),
    ],
)
def test_only_a_parameter_that_a_model_never_takes_is_one_to_do_without(
    status: int, error: dict[str, Any], expected: str
) -> None:
    """A value out of its range is its caller's fault: it must not cost all others the parameter."""
    assert refused_parameter(status, error) == expected


class World:
    """What is known of a model, on a clock of the test's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.not_taken = NotTaken(lambda: self.now)


def test_a_parameter_is_news_once_and_known_for_some_minutes() -> None:
    world = World()
    assert world.not_taken.learn("seed", {}) == ("", True)
    assert world.not_taken.known() == {"seed": ""}
    world.now += KNOWN_SECONDS
    assert world.not_taken.known() == {}
    assert world.not_taken.learn("seed", {}) == ("", False)
    assert world.not_taken.known() == {"seed": ""}


@pytest.mark.parametrize("beside", ["reasoning_effort", "tools", "response_format"])
def test_a_refusal_beside_what_may_be_why_is_not_remembered_but_another_name_is(beside: str) -> None:
    world = World()
    assert world.not_taken.learn("temperature", {beside: 1}) == ("", False)
    assert world.not_taken.learn("max_tokens", {beside: 1}) == ("max_completion_tokens", True)
    assert world.not_taken.known() == {"max_tokens": "max_completion_tokens"}
