"""A connection that nobody asked on for a while: who holds it expects an answer, and not that it closes just then."""

from __future__ import annotations

import http.client
import select
from pathlib import Path
from urllib.parse import urlsplit

from tests.loop.test_gateway import started
from tests.loop.test_weak_server import WORDS, process, wait_ready
from tests.loop.tiny_models import make_model
from tests.ports import free_port

UVICORNS_OWN_SECONDS = 5.0


def connected(url: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    assert is_answered(connection)
    return connection


def is_answered(connection: http.client.HTTPConnection) -> bool:
    """On this very connection: it is not opened anew."""
    connection.auto_open = 0 if connection.sock else 1
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    return answer.status == 200


async def test_gateway_and_weak_server_keep_an_idle_connection(tmp_path: Path) -> None:
    model = make_model(tmp_path / "weak", WORDS)
    port = free_port()
    async with started(tmp_path) as (gateway, _):
        with process("--model", model.as_uri(), "--port", str(port)) as child:
            weak = f"http://127.0.0.1:{port}"
            wait_ready(child, weak)
            idle = [connected(url) for url in (gateway, weak)]
            closed, _, _ = select.select([each.sock for each in idle], [], [], UVICORNS_OWN_SECONDS + 1)
            assert not closed
            assert all(is_answered(each) for each in idle)
            for each in idle:
                each.close()
