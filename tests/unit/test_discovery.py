"""What the operator may do where, as it asks when it starts. No cluster."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cowest_operator.kube import Kube
from cowest_operator.platform import Discovery


class Rights:
    """Of an account: (kind, namespace)."""

    def __init__(self, *granted: tuple[str, str]) -> None:
        self.granted = granted

    async def may(self, verb: str, kind: str, namespace: str) -> bool:
        return (kind, namespace) in self.granted

    async def read(self, path: str) -> dict[str, Any]:
        return {"groups": []}


@pytest.mark.parametrize(
    ("granted", "may"),
    [
        pytest.param((("CollaborationJob", "a"), ("RayService", "a")), True, id="the other namespace is gone"),
        pytest.param((("CollaborationJob", "a"), ("CollaborationJob", "b"), ("RayService", "a")), False,
                     id="an older role in the other"),
    ],
)  # fmt: skip
async def test_a_namespace_that_is_gone_takes_no_right_from_the_others(
    granted: tuple[tuple[str, str], ...], may: bool
) -> None:
    discovery = Discovery(cast(Kube, Rights(*granted)), namespaces=("a", "b"))
    await discovery.begin()
    assert discovery.rayservices is may
