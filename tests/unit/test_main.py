"""What the operator asks of kopf. A small API server over HTTP; no cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import kopf
import pytest
from aiohttp import web

from cowest_operator import api, main
from cowest_operator.keeper import Keeper
from cowest_operator.watched import Key, Watched

JOBS = f"/apis/{api.GROUP}/{api.VERSION}"
GROUPS = [
    {
        "name": api.GROUP,
        "versions": [{"version": api.VERSION, "groupVersion": f"{api.GROUP}/{api.VERSION}"}],
        "preferredVersion": {"version": api.VERSION},
    },
    {"name": "apiextensions.k8s.io", "versions": [{"version": "v1"}], "preferredVersion": {"version": "v1"}},
]


def resource(kind: str, plural: str, namespaced: bool) -> dict[str, Any]:
    return {"kind": kind, "name": plural, "singularName": kind.lower(), "namespaced": namespaced,
            "verbs": ["list", "watch"]}  # fmt: skip


def job(namespace: str, version: str) -> dict[str, Any]:
    return {"metadata": {"name": "claims", "namespace": namespace, "uid": namespace, "resourceVersion": version},
            "spec": {}}  # fmt: skip


RESOURCES = {
    "/api/v1": [resource("Namespace", "namespaces", False)],
    JOBS: [resource("CollaborationJob", api.PLURAL, True)],
    "/apis/apiextensions.k8s.io/v1": [resource("CustomResourceDefinition", "customresourcedefinitions", False)],
}


class ApiServer:
    """A job in each namespace where the operator has its Role; of the cluster it may see nothing."""

    def __init__(self, *granted: str) -> None:
        self.granted, self.refused = set(granted), 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path == "/api":
            return web.json_response({"versions": ["v1"]})
        if path == "/apis":
            return web.json_response({"groups": GROUPS})
        if path in RESOURCES:
            return web.json_response({"resources": RESOURCES[path]})
        namespace = path.removeprefix(f"{JOBS}/namespaces/").removesuffix(f"/{api.PLURAL}")
        if namespace not in self.granted:
            self.refused += namespace == "b"
            status = {"kind": "Status", "code": 403, "message": f"forbidden: {path}"}
            return web.json_response(status, status=403)
        if "watch" in request.query:
            stream = web.StreamResponse()
            await stream.prepare(request)
            if namespace == "b" and self.refused:  # what has changed meanwhile
                await stream.write(json.dumps({"type": "MODIFIED", "object": job(namespace, "2")}).encode() + b"\n")
            while namespace in self.granted:
                await asyncio.sleep(0.01)
            return stream
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": [job(namespace, "1")]})

    @contextlib.asynccontextmanager
    async def at_work(self, kubeconfig: Path) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        kubeconfig.write_text(json.dumps({
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://{host}:{port}"}}],
            "users": [{"name": "me", "user": {}}],
        }))  # fmt: skip
        try:
            yield
        finally:
            await runner.cleanup()


class Noting:
    """A keeper that notes who is woken."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, key: Key) -> None:
        self.woken.append(key[0])

    forget = wake


async def test_a_namespace_without_its_role_holds_up_no_other_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    server, keeper = ApiServer("a", "b"), Noting()
    settings = main.kopf_settings()
    assert isinstance(settings.networking.error_backoffs, main.Patience)
    settings.networking.error_backoffs = main.Patience(0.01, 0.01)  # the same, sooner
    settings.watching.reconnect_backoff = 0.01

    async def until(condition: Any) -> None:
        while not condition():
            assert not operator.done(), operator
            await asyncio.sleep(0.01)

    async with asyncio.timeout(20), server.at_work(tmp_path / "kubeconfig"):
        operator = asyncio.create_task(
            kopf.operator(
                registry=main.registry(Watched(), cast(Keeper, keeper), ()),
                settings=settings,
                namespaces=("a", "b"),
            )
        )
        try:
            await until(lambda: sorted(keeper.woken) == ["a", "b"])  # though nobody may list namespaces
            server.granted = {"a"}
            await until(lambda: server.refused > 10)
            server.granted = {"a", "b"}
            await until(lambda: keeper.woken[2:] == ["b"])
        finally:
            operator.cancel()
            await asyncio.gather(operator, return_exceptions=True)
