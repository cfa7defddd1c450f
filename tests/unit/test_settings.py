"""What the operator is told by its environment, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cowest_operator import settings

IMAGES = {"COWEST_IMAGE_SERVING": "serving:1", "COWEST_IMAGE_TRAINING": "training:1"}


def told(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(each) for each in settings.read({**IMAGES, "COWEST_JOB_ENV": json.dumps(entries)}).job_env]


HTTPS = {"name": "HTTPS_PROXY", "value": "http://proxy:3128"}
INSIDE = ".svc,.cluster.local,localhost,127.0.0.1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([{"name": "A", "value": "b"}], [{"name": "A", "value": "b"}], id="no proxy"),
        pytest.param([HTTPS], [HTTPS, {"name": "NO_PROXY", "value": INSIDE}], id="a proxy"),
        pytest.param(
            [HTTPS, {"name": "no_proxy", "value": "store.lan, .svc"}],
            [HTTPS, {"name": "no_proxy", "value": "store.lan,.svc,.cluster.local,localhost,127.0.0.1"}],
            id="a proxy and what it is not for",
        ),
        pytest.param(
            [HTTPS, {"name": "NO_PROXY", "valueFrom": {"configMapKeyRef": {"name": "net", "key": "no"}}}],
            [HTTPS, {"name": "NO_PROXY", "valueFrom": {"configMapKeyRef": {"name": "net", "key": "no"}}}],
            id="what it is not for stands elsewhere",
        ),
    ],
)
def test_no_proxy_is_asked_for_what_is_in_the_cluster(given: list[Any], expected: list[Any]) -> None:
    assert told(*given) == expected


@pytest.mark.parametrize("text", ["HTTPS_PROXY=x", "{}", '["A"]', '[{"value": "b"}]', '[{"name": "A"}, {"name": "A"}]'])
def test_an_environment_that_pods_could_not_have_is_refused(text: str) -> None:
    with pytest.raises(settings.OperatorSettingsError, match="COWEST_JOB_ENV: wanted a JSON list"):
        settings.read({**IMAGES, "COWEST_JOB_ENV": text})
