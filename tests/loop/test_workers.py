"""Several gateways on one port, as processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from cowest_serving.app import GatewayLimits, GatewaySettings, TraceSettings, shared_by
from cowest_serving.client_limits import ClientLimits
from cowest_serving.shared_counts import shared_memory
from cowest_serving.traces import read_traces
from cowest_serving.workers import Supervisor, _Worker
from tests.fakes import ScriptedModel
from tests.loop.test_gateway import ASKED, command, settings_of, spec_of, started
from tests.patience import IN_TIME

BODY = {"messages": ASKED}


def workers_of(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Process ids by the number of the worker."""
    found = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if match := re.search(r"--worker\0(\d+)/", Path(f"/proc/{pid}/cmdline").read_text()):
                found[match[1]] = int(pid)
    return found


async def asked(url: str, times: int) -> list[str]:
    """Each on a connection of its own; the ids of the answers whose records are durable.

    A slow disk leaves an answer without the word: it is asked for again.
    """

    async def ask(http: aiohttp.ClientSession) -> str:
        while True:
            async with http.post(url + "/v1/chat/completions", json=BODY, timeout=aiohttp.ClientTimeout(120)) as answer:
                assert answer.status == 200
                if answer.headers.get("x-cowest-trace") == "durable":
                    return answer.headers["x-request-id"]
            await asyncio.sleep(0.1)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        return await asyncio.gather(*(ask(http) for _ in range(times)))


async def answers_by_worker(url: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        text = await response.text()
    assert text.count("# TYPE cowest_requests_in_flight gauge") == 1
    counts = re.findall(r'^cowest_answers_total\{worker="(\d+)",.*status="ok"\} (\d+)$', text, re.MULTILINE)
    return {worker: int(count) for worker, count in counts}


async def test_workers_share_a_port_one_that_dies_is_replaced_and_all_records_are_kept(tmp_path: Path) -> None:
    async with started(tmp_path, "--workers", "2", "--spool", str(tmp_path / "spool")) as (url, process):
        first = workers_of(process)
        assert set(first) == {"0", "1"}
        ids = await asked(url, 40)
        counts = await answers_by_worker(url)
        assert sum(counts.values()) >= 40 and set(counts) == {"0", "1"}, "the kernel spreads connections"
        os.kill(first["1"], signal.SIGKILL)
        ids += await asked(url, 40)  # what falls to the dead one's socket waits for the next
        second = workers_of(process)
        assert second["0"] == first["0"] and second["1"] != first["1"]
        assert set(await answers_by_worker(url)) == {"0", "1"}
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 120) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in second.values())
        kept = read_traces(str(tmp_path / "store"))["trace_id"].to_pylist()
    assert set(ids) <= set(kept) and len(kept) == len(set(kept)), "one that died left its records to the others"


async def test_told_to_stop_all_workers_finish_what_they_began(tmp_path: Path) -> None:
    async with started(tmp_path, "--workers", "2", "--spool", str(tmp_path / "spool")) as (url, process):
        asking = asyncio.create_task(asked(url, 20))
        async with asyncio.timeout(IN_TIME):
            while not (await answers_by_worker(url)):
                await asyncio.sleep(0.01)
        await asking
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 120) == 0
        with pytest.raises(aiohttp.ClientConnectionError):
            await asked(url, 1)


async def test_when_its_keeper_is_killed_no_worker_stays(tmp_path: Path) -> None:
    async with started(tmp_path, "--workers", "2") as (_, process):
        workers = workers_of(process).values()
        process.kill()
        await asyncio.to_thread(process.wait, 120)
        async with asyncio.timeout(IN_TIME):
            while any(Path(f"/proc/{pid}/cmdline").exists() and is_alive(pid) for pid in workers):
                await asyncio.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_a_clients_limits_hold_for_all_workers_together_whichever_it_comes_to(tmp_path: Path) -> None:
    limits = {"requestsPerMinute": 6}
    took = 60.0
    while took > 5:  # in so long another request would be allowed
        async with started(tmp_path, "--workers", "2", gateway={"limits": limits}) as (url, _):
            began = time.monotonic()
            async with aiohttp.ClientSession() as http:  # one connection, so one worker
                alone = [await limited(http, url) for _ in range(5)]
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
                spread = [await limited(http, url) for _ in range(12)]
            took = time.monotonic() - began
    assert [status for status, _ in alone] == [200] * 5
    assert [left for _, left in alone] == [f"{left} of 6" for left in (5, 4, 3, 2, 1)]
    assert 1 <= [status for status, _ in spread].count(200) <= 2, "one was left, and one comes in ten seconds"
    assert {left for status, left in spread if status == 429} == {"0 of 6"}


async def limited(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with http.post(url + "/v1/chat/completions", json=BODY) as response:
        left, limit = (response.headers[f"x-ratelimit-{what}-requests"] for what in ("remaining", "limit"))
        return response.status, f"{left} of {limit}"


@pytest.mark.parametrize("wrong", ["port", "job"])
def test_a_bad_start_is_said_once(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "job.yaml").write_text("{}" if wrong == "job" else str(spec_of(ScriptedModel())))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if wrong == "job":
            taken.close()
        words = command(tmp_path, port, "--workers", "2")
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ("give another with --port" if wrong == "port" else "spec.strong") in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


class ToldMeanwhile(list[str]):
    """A command that is read when a worker is started, and meanwhile tells this process to stop."""

    def __iter__(self) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__iter__()


def test_a_worker_that_is_being_started_when_its_keeper_is_told_to_stop_is_told_too() -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        worker = _Worker(0, (first, second))
        keeper = Supervisor(ToldMeanwhile(["sh", "-c", "exec sleep 20"]), [worker], 0.0, shared_memory(1))
        started = time.monotonic()
        try:
            assert keeper.run() == 0
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
    assert time.monotonic() - started < 10


def test_what_is_limited_for_a_gateway_is_divided_among_its_workers() -> None:
    settings = settings_of(ScriptedModel())
    limits = GatewayLimits(ClientLimits(requests_per_minute=60, max_concurrency=2))
    settings = GatewaySettings(settings.strong, settings.collaboration, TraceSettings(100, 10_001, "Answer"), limits)
    shared = shared_by(4, settings)
    assert shared.gateway == limits, "those of a client hold for all workers together"
    assert settings.strong.max_concurrency == 16
    assert (shared.strong.max_concurrency, shared.traces and shared.traces.spool_bytes) == (4, 2500)
    assert shared_by(1, settings) == settings
    assert shared_by(99, settings).strong.max_concurrency == 1
