"""A CRD that is older than the operator: the status that it has room for is written all the same."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from cowest_operator.kube import Kube, KubeError, undeclared

SAID = (
    "failed to create typed patch object (desks/claims; cowest.dev/v1alpha1, Kind=CollaborationJob): errors:\n"
    "  .status.rounds[0].proposedWhy: field not declared in schema\n"
    "  .status.sight: field not declared in schema"
)
STATUS = {"rounds": [{"number": 1, "proposedWhy": "x"}, {"number": 2}], "sight": {"rows": 3}, "state": {"sight": 4}}


class Older(Kube):
    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # nobody is asked
        self.asked: list[Any] = []

    async def _call(self, *args: Any, **_: Any) -> dict[str, Any]:
        status = args[3]["status"]
        self.asked.append(status)
        if "sight" in status:
            raise KubeError(500, SAID)
        return {"metadata": {"resourceVersion": "7"}}


def test_fields_that_the_clusters_crd_lacks_are_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    kube = Older()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            asyncio.run(kube.apply_status("desks", "claims", STATUS, 3))
    wanted = {"rounds": [{"number": 1}, {"number": 2}], "state": {"sight": 4}}
    assert kube.asked == [STATUS, wanted, wanted], "the second write asks for nothing that was refused"
    (record,) = caplog.records
    assert "status.rounds.proposedWhy, status.sight" in record.message and "Upgrade the CRD" in record.message


def test_any_other_refusal_is_one() -> None:
    assert undeclared("the object has been modified") == frozenset()

    class Refusing(Older):
        async def _call(self, *args: Any, **_: Any) -> dict[str, Any]:
            raise KubeError(422, "status.rounds: Too many: 11")

    with pytest.raises(KubeError, match="Too many"):
        asyncio.run(Refusing().apply_status("desks", "claims", STATUS, 3))
