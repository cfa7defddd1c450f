"""The routing sidecar against an API server that can fail in every way that real ones do, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cowest_serving.contract import Arm, Pair, Prompts, Routing, dump
from cowest_serving.routing_sync import RoutingFile, Source, follow, main, wait_after
from tests.patience import IN_TIME

PAIR = Pair("sha256:w", "file:///w", Prompts("{query}", "{query} {draft}", "{query}"), "Answer", "http://s/v1", "s")
NAME = "desk-routing"


def routing(version: int, **changes: Any) -> str:
    arm = replace(Arm("stable", 100, "Pair", PAIR, "http://w/v1"), **changes)
    return json.dumps(dump(Routing(version, "salt", (arm,))))


def version_in(file: Path) -> int | None:
    return json.loads(file.read_bytes())["version"] if file.exists() else None


async def until(condition: Callable[[], bool], seconds: float = IN_TIME) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class ApiServer:
    """One ConfigMap as the Kubernetes API shows it. `faults` are used up by one request each, in order:

    a status, "drop" (the connection is closed), "html", for a watch also "expired" (410 as an event), "silent".
    """

    faults: list[int | str] = field(default_factory=list)
    token: str = "first-token"
    config_map: dict[str, Any] | None = None
    version: int = 100
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # list | watch, its parameters
    ends_watches: bool = False
    url: str = ""
    _history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _broken: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, text: str | None, *, key: str = "routing.json", padding: int = 0) -> None:
        kind = "MODIFIED" if self.config_map else "ADDED"
        data = {} if text is None else {key: text}
        self._event(kind, {"metadata": {"name": NAME, "annotations": {"x": "y" * padding}}, "data": data})

    def delete(self) -> None:
        self._event("DELETED", {"metadata": {"name": NAME}})
        self.config_map = None

    def bookmark(self) -> None:
        before = self.config_map
        self._event("BOOKMARK", {"metadata": {"name": NAME}})
        self.config_map = before

    def _event(self, kind: str, body: dict[str, Any]) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.config_map = body
        self._history.append((self.version, {"type": kind, "object": body}))
        self._wake()

    def break_watches(self) -> None:
        self._broken.set()
        self._broken = asyncio.Event()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind = "watch" if "watch" in request.query else "list"
        self.requests.append((kind, dict(request.query)))
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "message": "Unauthorized"}, status=401)
        assert request.query["fieldSelector"] == f"metadata.name={NAME}"
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return web.json_response({"kind": "Status", "message": f"scripted {fault}"}, status=fault)
        if fault == "html":
            return web.Response(text="<html>", content_type="text/html")
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if kind == "list":
            items = [self.config_map] if self.config_map else []
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})
        return await self._watch(request, fault)

    async def _watch(self, request: web.Request, fault: str | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        if fault == "expired":
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        seen, broken = int(request.query["resourceVersion"]), self._broken
        while not broken.is_set():
            changed = self._changed
            for number, event in self._history:
                if number > seen and fault != "silent":
                    await response.write(json.dumps(event).encode() + b"\n")
                    seen = number
            if self.ends_watches:
                return response
            await changed.wait()
        assert request.transport is not None
        request.transport.abort()
        return response


@asynccontextmanager
async def api_server() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/shop/configmaps", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.break_watches()
        await runner.cleanup()


@dataclass
class World:
    server: ApiServer
    source: Source
    out: Path
    file: RoutingFile
    stop: Callable[[], Awaitable[None]]


@asynccontextmanager
async def world(tmp_path: Path, *faults: int | str, text: str | None = None, **changes: Any) -> AsyncIterator[World]:
    """A sidecar that follows, and the API server with (or without) its ConfigMap."""
    (tmp_path / "token").write_text("first-token\n")
    out = tmp_path / "routing.json"
    async with api_server() as server:
        server.faults = list(faults)
        if text is not None:
            server.put(text)
        source = replace(Source(server.url, "shop", NAME, tmp_path / "token", None), **changes)
        file = RoutingFile(out)
        following = asyncio.create_task(follow(source, file))

        async def stop() -> None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

        try:
            yield World(server, source, out, file, stop)
            assert not following.done() or following.cancelled(), following.exception()
        finally:
            await stop()


# ---------------------------------------------------------------- what is followed
async def test_what_is_there_is_written_and_each_change_as_it_comes(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
        await until(lambda: len(w.server.requests) == 2)
        for version in range(2, 6):
            w.server.put(routing(version))
            await until(lambda version=version: version_in(w.out) == version, seconds=30)
        kinds = [kind for kind, _ in w.server.requests]
    assert kinds == ["list", "watch"]
    assert w.server.requests[1][1]["allowWatchBookmarks"] == "true"
    assert w.server.requests[1][1]["resourceVersion"] == "101"


async def test_a_config_map_that_comes_later_goes_and_comes_back(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await until(lambda: len(w.server.requests) == 2)
        assert not w.out.exists()
        w.server.put(routing(1))
        await until(lambda: version_in(w.out) == 1)
        w.server.delete()
        w.server.bookmark()
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)


async def test_a_deleted_config_map_leaves_the_file_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
        w.server.delete()
        await until(lambda: "the ConfigMap is not there" in caplog.text)
        assert version_in(w.out) == 1


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        pytest.param("{ half", "routing.json", "is no routing", id="no JSON"),
        pytest.param(routing(9, weight_percent=101), "routing.json", "weightPercent: wanted 0 to 100", id="no routing"),
        pytest.param('{"version": 9, "salt": "s", "arms": 3}', "routing.json", "is no routing", id="a wrong type"),
        pytest.param(routing(9), "other.json", "has no routing.json", id="another key"),
        pytest.param(None, "routing.json", "has no routing.json", id="no data"),
    ],
)
async def test_what_is_no_routing_is_never_written_and_said_once(
    tmp_path: Path, text: str | None, key: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
        w.server.put(text, key=key)
        w.server.put(text, key=key)
        await until(lambda: says in caplog.text)
        assert version_in(w.out) == 1
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)
    assert caplog.text.count("is left as it is") == 1


async def test_the_file_is_not_touched_when_only_something_else_changed(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
        await until(lambda: len(w.server.requests) == 2)
        inode = w.out.stat().st_ino
        w.server.put(routing(1))  # a label, say
        w.server.ends_watches = True
        w.server.put(routing(1))
        await until(lambda: w.server.requests[-1][1].get("resourceVersion") == "103")
        assert w.out.stat().st_ino == inode


async def test_an_event_of_half_a_mebibyte_is_read(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.put(routing(2), padding=1 << 19)
        await until(lambda: version_in(w.out) == 2)


def test_the_file_of_an_earlier_run_counts_as_written(tmp_path: Path) -> None:
    (tmp_path / "routing.json").write_text(routing(4))
    assert RoutingFile(tmp_path / "routing.json").version == 4
    (tmp_path / "routing.json").write_text("{ half")
    assert RoutingFile(tmp_path / "routing.json").version is None


# ---------------------------------------------------------------- trouble
async def test_after_an_expired_watch_it_lists_anew(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.faults = ["expired", 410]
        w.server.break_watches()
        await until(lambda: len(w.server.requests) == 6)
        assert [kind for kind, _ in w.server.requests] == ["list", "watch", "watch", "list", "list", "watch"]
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)


async def test_a_broken_watch_goes_on_where_it_was_and_misses_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.bookmark()
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)
        w.server.break_watches()
        w.server.put(routing(3))
        await until(lambda: version_in(w.out) == 3)
        assert [kind for kind, _ in w.server.requests] == ["list", "watch", "watch"]
        assert w.server.requests[2][1]["resourceVersion"] == "103"


async def test_a_bookmark_moves_the_place_to_go_on_from(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.bookmark()
        w.server.ends_watches = True
        w.server.put(routing(1))
        await until(lambda: len(w.server.requests) > 2)
        assert w.server.requests[2][1]["resourceVersion"] == "103"


async def test_a_silent_watch_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path, text=routing(1), silent_seconds=0.2) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.faults = ["silent"]
        w.server.break_watches()
        await until(lambda: len(w.server.requests) == 3)
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)
    assert "was silent for" in caplog.text


@pytest.mark.parametrize("fault", [500, 429, "drop", "html"])
async def test_trouble_is_waited_out_and_said_once_with_its_end(
    tmp_path: Path, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, fault, fault, fault, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
        await until(lambda: "is followed again" in caplog.text)
    assert caplog.text.count("cannot be followed") == 1


async def test_a_role_that_lacks_something_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path, 403, text=routing(1)) as w:
        await until(lambda: version_in(w.out) == 1)
    assert f"a Role with get, list and watch on configmaps {NAME}" in caplog.text


async def test_the_token_is_read_anew_for_every_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.server.token = "second-token"
        w.server.break_watches()
        await until(lambda: "check the token" in caplog.text)
        (tmp_path / "token").write_text("second-token")
        w.server.put(routing(2))
        await until(lambda: version_in(w.out) == 2)
    assert "first-token" not in caplog.text and "second-token" not in caplog.text


async def test_a_file_that_cannot_be_written_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        await until(lambda: len(w.server.requests) == 2)
        w.out.unlink()
        w.out.mkdir()
        w.server.put(routing(2))
        await until(lambda: "wanted to write" in caplog.text)
        w.out.rmdir()
        await until(lambda: version_in(w.out) == 2)


async def test_watches_that_end_at_once_do_not_make_it_spin(tmp_path: Path) -> None:
    async with world(tmp_path, text=routing(1)) as w:
        w.server.ends_watches = True
        started = time.monotonic()
        await until(lambda: len(w.server.requests) >= 6)
        assert time.monotonic() - started > 0.3  # four waits of at least 0.1 s each, less what was under way


def test_waits_grow_differ_and_have_an_end() -> None:
    assert all(0.1 <= wait_after(0) <= 0.2 for _ in range(100))
    assert all(5 <= wait_after(n) <= 10 for n in (6, 100, 10_000))
    assert len({wait_after(3) for _ in range(20)}) > 10


# ---------------------------------------------------------------- the process
def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "cowest_serving.routing_sync", "--namespace", "shop", "--configmap", NAME, *flags]


async def test_the_process_is_healthy_once_there_is_a_routing_and_stops_when_told(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    (tmp_path / "token").write_text("first-token")
    out, port = tmp_path / "volume" / "routing.json", unused_tcp_port
    async with api_server() as server, aiohttp.ClientSession() as http:
        flags = ["--out", out, "--server", server.url, "--token-file", tmp_path / "token", "--health-port", port]
        process = subprocess.Popen(command(*map(str, flags)))

        async def health() -> int:
            try:
                async with http.get(f"http://127.0.0.1:{port}/healthz") as response:
                    return response.status
            except aiohttp.ClientConnectionError:
                return 0

        try:
            async with asyncio.timeout(30):
                while await health() != 503:
                    await asyncio.sleep(0.02)
                server.put(routing(1))
                while await health() != 200:
                    await asyncio.sleep(0.02)
            assert version_in(out) == 1
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 10) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param([], "neither --server nor KUBERNETES_SERVICE_HOST", id="outside of a pod"),
        pytest.param(["--server", "https://x:1"], "let the pod mount its service account's token", id="no token"),
    ],
)
def test_a_bad_start_ends_with_2_and_one_sentence(
    tmp_path: Path, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    token = ["--token-file", str(tmp_path / "none")]
    assert main([*command("--out", str(tmp_path / "r.json"), *token, *flags)[3:]]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("routing_sync: ") and says in line
