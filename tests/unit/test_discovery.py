"""What the operator may do where, as it asks when it starts. No cluster."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cowest_operator.kube import Kube, KubeError
from cowest_operator.platform import Discovery, Platform


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


class Strange:
    """Answers that no API server gives; then those of one with Kueue."""

    def __init__(self) -> None:
        self.answers: list[Any] = [
            None,
            {},
            {"groups": [{}]},
            {"groups": "x"},
            ValueError("no JSON"),
            KubeError(0, "x"),
        ]

    async def read(self, path: str) -> dict[str, Any] | None:
        answer = self.answers.pop(0) if self.answers else {"groups": [{"name": "kueue.x-k8s.io"}]}
        if isinstance(answer, Exception):
            raise answer
        return cast(dict[str, Any] | None, answer)


async def test_answers_that_nobody_can_read_end_no_looks_to_come() -> None:
    discovery, seen = Discovery(cast(Kube, Strange())), asyncio.Event()
    looking = asyncio.create_task(discovery.follow(seen.set, 0.001))
    try:
        await asyncio.wait_for(seen.wait(), 10)
    finally:
        looking.cancel()
    assert discovery.now == Platform(has_kueue=True)


@pytest.mark.parametrize("answer", [None, {}], ids=["not found", "no groups"])
async def test_an_answer_without_groups_is_no_cluster_without_them(answer: dict[str, Any] | None) -> None:
    strange = Strange()
    strange.answers = [answer]
    with pytest.raises(KubeError, match="saw none"):
        await Discovery(cast(Kube, strange)).look()
