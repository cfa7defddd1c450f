"""The load generator of the gateway's benchmarks sees what a careless gateway would do to an answer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.gateway.load import Ask, Stubs, chat, measure

pytestmark = pytest.mark.skipif(not shutil.which("go"), reason="builds the load generator with Go")
CORE = 0


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    running = Stubs(tmp_path_factory.mktemp("stubs") / "log", CORE, plain="frames=3,pace=1ms", slow="delay=30ms")
    yield running
    running.tree.stop()


@contextmanager
def answering(kind: str, body: Callable[[int], bytes], status: int = 200) -> Iterator[Ask]:
    """A server that answers its n-th call (from 0) with a body of its own."""
    count = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            data = body(next(count))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Ask((chat(f"http://127.0.0.1:{server.server_port}/v1"),))
    server.shutdown()
    thread.join()
    server.server_close()


def frames(*numbers: int, done: bool = True) -> bytes:
    lines = [f'data: {{"choices":[{{"delta":{{"content":"{n}@1 x "}}}}]}}\n\n' for n in numbers]
    return ("".join(lines) + ("data: [DONE]\n\n" if done else "")).encode()


def test_an_untouched_answer_is_told_by_its_bytes(stubs: Stubs) -> None:
    seen = measure(Ask((chat(stubs.v1("plain")),)), CORE, ["-seconds", "2"], 2)
    assert seen["calls"] > 0 and seen["failures"] == 0
    assert seen["same_bytes"] == seen["same_text"] == seen["calls"]


def test_calls_begin_when_they_are_due_and_not_when_the_answer_before_has_come(stubs: Stubs) -> None:
    seen = measure(Ask((chat(stubs.v1("slow")),)), CORE, ["-seconds", "2", "-rate", "100"], 1)
    assert seen["calls"] == 200  # one connection of 30 ms a call gives 67
    assert seen["p99_us"] > 500_000, "a call that waited for the connection has waited"


def test_a_chain_takes_as_long_as_its_calls_together(stubs: Stubs) -> None:
    twice = measure(Ask((chat(stubs.v1("slow")), chat(stubs.v1("slow")))), CORE, ["-seconds", "2"])
    assert twice["failures"] == 0 and twice["p50_us"] >= 60_000


def test_a_whole_stream_has_all_frames_in_their_order(stubs: Stubs) -> None:
    ask = Ask((chat(stubs.v1("plain")),))
    seen = measure(ask, CORE, ["-seconds", "2", "-stream", "-frames", "3"])
    assert seen["failures"] == 0 and len(seen["frame_us"]) == 3 * seen["calls"]
    assert min(seen["frame_us"]) > 0 and len(seen["ttft_us"]) == seen["calls"]


def wrong(number: int) -> bytes:
    return json.dumps({"choices": [{"message": {"content": f"another answer {number}"}}]}).encode()


@pytest.mark.parametrize(
    ("kind", "body", "options", "fault"),
    [
        pytest.param("application/json", wrong, [], "wrong text", id="another text"),
        pytest.param("application/json", lambda _: b"{", [], "wrong text", id="no JSON"),
        pytest.param("text/event-stream", lambda _: frames(1, 0), ["-stream"], "frames out of order", id="order"),
        pytest.param(
            "text/event-stream", lambda _: frames(0), ["-stream"], "stream not whole", id="a frame is missing"
        ),
        pytest.param(
            "text/event-stream", lambda _: frames(0, 1, done=False), ["-stream"], "stream not whole", id="no end"
        ),
    ],
)
def test_a_spoilt_answer_is_a_failure(kind: str, body: Any, options: list[str], fault: str) -> None:
    with answering(kind, body) as ask:
        seen = measure(ask, CORE, ["-seconds", "2", "-frames", "2", *options])
    assert seen["calls"] > 0 and seen["kinds"] == {fault: seen["calls"]}


def test_an_error_is_a_failure_with_its_status() -> None:
    with answering("application/json", wrong, status=503) as ask:
        seen = measure(ask, CORE, ["-seconds", "2"])
    assert seen["kinds"] == {"status 503": seen["calls"]}


def test_the_log_has_a_line_for_each_call(stubs: Stubs, tmp_path: Path) -> None:
    log = tmp_path / "calls.tsv"
    seen = measure(Ask((chat(stubs.v1("plain")),)), CORE, ["-seconds", "2", "-users", "-log", str(log)])
    numbers = [int(line.split("\t")[0]) for line in log.read_text().splitlines()]
    assert sorted(numbers) == list(range(seen["calls"]))
