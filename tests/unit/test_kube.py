"""A CRD that is older than the operator: the status that it has room for is written all the same."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from cowest_operator.kube import Kube, KubeError, undeclared

SAID = (
    "failed to create typed patch object (desks/claims; cowest.dev/v1alpha1, Kind=CollaborationJob): errors:\n"
    "  .status.rounds[0].proposedWhy: field not declared in schema\n"
    "  .status.sight: field not declared in schema"
)
STATUS = {"rounds": [{"number": 1, "proposedWhy": "x"}, {"number": 2}], "sight": {"rows": 3}, "state": {"sight": 4}}


class Older(Kube):
    def __init__(self, **told: float) -> None:
        super().__init__(None, **told)  # type: ignore[arg-type]  # nobody is asked
        self.asked: list[Any] = []
        self.upgraded = False

    async def _call(self, *args: Any, **_: Any) -> dict[str, Any]:
        status = args[3]["status"]
        self.asked.append(status)
        await asyncio.sleep(0)
        if "sight" in status and not self.upgraded:
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


async def test_two_jobs_that_are_told_so_at_once_are_both_written() -> None:
    kube = Older()
    await asyncio.gather(*(kube.apply_status("desks", name, STATUS, 3) for name in ("claims", "returns")))
    assert ["sight" in status for status in kube.asked] == [True, True, False, False]


def test_when_the_crd_is_upgraded_its_new_fields_are_written_without_a_restart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kube = Older(undeclared_for=0.0)
    for upgraded in (False, False, True):
        kube.upgraded = upgraded
        asyncio.run(kube.apply_status("desks", "claims", STATUS, 3))
    less = {"rounds": [{"number": 1}, {"number": 2}], "state": {"sight": 4}}
    assert kube.asked == [STATUS, less, STATUS, less, STATUS]
    assert len(caplog.records) == 1, "what it lacks is said once all the same"


@pytest.mark.parametrize(
    "body", [b"<html>Welcome</html>", b"[]", b"", b"\xff"], ids=["html", "list", "nothing", "bytes"]
)
async def test_an_answer_that_is_none_of_an_api_server_is_as_if_it_were_away(body: bytes) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    app = web.Application()
    app.router.add_get("/apis", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    kube = Kube(client.ApiClient(client.Configuration(host=f"http://{host}:{port}")))
    try:
        with pytest.raises(KubeError, match="GET /apis: wanted an object of JSON, saw ") as refused:
            await kube.read("/apis")
        assert refused.value.retryable
    finally:
        await kube.close()
        await runner.cleanup()


def test_any_other_refusal_is_one() -> None:
    assert undeclared("the object has been modified") == frozenset()

    class Refusing(Older):
        async def _call(self, *args: Any, **_: Any) -> dict[str, Any]:
            raise KubeError(422, "status.rounds: Too many: 11")

    with pytest.raises(KubeError, match="Too many"):
        asyncio.run(Refusing().apply_status("desks", "claims", STATUS, 3))
