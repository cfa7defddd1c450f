"""The weak-model server over real HTTP with a real tiny transformer: in this process, and as its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import openai
import pytest
import uvicorn

from cowest_serving.contract import HEADER_MODEL_DIGEST
from cowest_serving.generate import Generation, Generator
from cowest_serving.model_files import model_digest
from cowest_serving.weak_server import MAX_BODY, build_app
from cowest_serving.weak_worker import Worker
from tests.loop.stopping import told_at_the_start
from tests.loop.tiny_models import make_model
from tests.ports import free_port

WORDS = [f"w{i}" for i in range(60)]
ASKED: Any = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("weak"), WORDS, initializer_range=0.2)


# ---------------------------------------------------------------- in this process, with a gate before every batch
class Gated(Generator):
    """A generator whose batches wait until the test lets them through."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = threading.Semaphore(1)  # the answer that proves readiness
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []

    def run(self, asks: Any, *args: Any, **kwargs: Any) -> list[Generation]:
        self.batches.append(len(asks))
        self.entered.release()
        assert self.gate.acquire(timeout=60)
        return super().run(asks, *args, **kwargs)


@dataclass
class Weak:
    worker: Worker
    generator: Gated
    url: str
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession

    def let_through(self, batches: int = 1000) -> None:
        self.generator.gate.release(batches)

    async def batch_begun(self) -> None:
        assert await asyncio.to_thread(self.generator.entered.acquire, timeout=60)

    async def chat(self, **options: Any) -> Any:
        return await self.client.chat.completions.create(model="weak", messages=ASKED, **{"max_tokens": 4} | options)

    async def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        async with self.http.post(self.url + path, json={"model": "weak"} | body) as response:
            assert response.headers[HEADER_MODEL_DIGEST] == self.generator.digest
            return response.status, await response.json()


@asynccontextmanager
async def weak_server(folder: Path, **options: Any) -> AsyncIterator[Weak]:
    failures: list[Exception] = []
    limits = {"max_batch": 32, "max_waiting": 1000} | options
    worker = Worker(lambda: Gated.load(folder, "cpu", 1), failures.append, **limits)
    server = uvicorn.Server(uvicorn.Config(build_app(worker, "weak"), log_config=None, lifespan="off"))
    worker.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))  # without its signal handlers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0)
        async with client, aiohttp.ClientSession() as http:
            await until(lambda: worker.ready or bool(failures))
            assert not failures
            assert isinstance(worker.generator, Gated)
            weak = Weak(worker, worker.generator, url, client, http)
            await weak.batch_begun()  # the one that proved readiness
            weak.generator.batches.clear()
            yield weak
            weak.let_through()
        server.should_exit = True
        await serving
    assert await asyncio.to_thread(worker.close, 30)


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_what_arrives_while_a_batch_runs_joins_the_next_one(folder: Path) -> None:
    async with weak_server(folder, max_batch=4) as weak:
        first = asyncio.create_task(weak.chat(temperature=0))
        await weak.batch_begun()
        others = [asyncio.create_task(weak.chat(temperature=n, seed=n, max_tokens=2 + n)) for n in (0, 1, 2)]
        others.append(asyncio.create_task(weak.chat(n=2)))
        await until(lambda: weak.worker.waiting == 5)
        weak.let_through()
        await asyncio.gather(first, *others)
        assert weak.generator.batches == [1, 4, 1]


async def test_answers_do_not_depend_on_the_batch_they_were_in(folder: Path) -> None:
    async with weak_server(folder) as weak:
        weak.let_through()
        alone = await weak.chat(temperature=1, seed=5, max_tokens=10)
        again = await asyncio.gather(*(weak.chat(temperature=1, seed=5, max_tokens=10) for _ in range(5)))
        assert {answer.choices[0].message.content for answer in again} == {alone.choices[0].message.content}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_takes_its_rows_out_of_the_queue(folder: Path, stream: bool) -> None:
    async with weak_server(folder) as weak:
        running = asyncio.create_task(weak.chat())
        await weak.batch_begun()
        body = {"model": "weak", "messages": ASKED, "n": 3, "stream": stream}
        leaver = asyncio.create_task(weak.http.post(weak.url + "/v1/chat/completions", json=body))
        await until(lambda: weak.worker.waiting == 3)
        if stream:
            (await leaver).close()
        leaver.cancel()
        with suppress(asyncio.CancelledError):
            await leaver
        job = weak.worker._rows[0][0]
        await until(lambda: job.cancelled)
        weak.let_through()
        await running
        await weak.chat()
        assert weak.generator.batches == [1, 1]
        assert weak.worker.counts.cancelled_rows == 3


async def test_a_full_queue_refuses_with_a_time_to_come_back(folder: Path) -> None:
    async with weak_server(folder, max_waiting=2) as weak:
        running = [asyncio.create_task(weak.chat())]
        await weak.batch_begun()
        running.append(asyncio.create_task(weak.chat(n=2)))
        await until(lambda: weak.worker.waiting == 2)
        with pytest.raises(openai.RateLimitError, match="2 answers wait already") as caught:
            await weak.chat()
        assert caught.value.response.headers["retry-after"] == "1"
        weak.let_through()
        await asyncio.gather(*running)


async def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(folder: Path) -> None:
    async with weak_server(folder) as weak:
        weak.let_through()
        norm = weak.generator.model.model.norm.weight
        good = norm.data.clone()
        norm.data.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError, match="NaN") as caught:
            await weak.chat()
        assert caught.value.response.headers[HEADER_MODEL_DIGEST] == weak.generator.digest
        async with weak.http.get(weak.url + "/metrics") as response:
            assert 'requests_total{path="/v1/chat/completions",status="500"} 1\n' in await response.text()
        with pytest.raises(openai.APIError, match="NaN"):
            async for _ in await weak.chat(stream=True):
                pass
        norm.data.copy_(good)
        assert (await weak.chat()).choices[0].finish_reason


async def test_bad_requests_are_refused_in_openais_form(folder: Path) -> None:
    async with weak_server(folder) as weak:
        chat = "/v1/chat/completions"
        assert await refusal(weak, chat, messages=ASKED, temperature="hot") == (400, "temperature", "invalid_type")
        assert await refusal(weak, chat, messages=ASKED, model="gpt") == (404, "model", "model_not_found")
        long: Any = [{"role": "user", "content": "w1 " * 64}]
        assert await refusal(weak, chat, messages=long) == (400, "messages", "context_length_exceeded")
        assert await refusal(weak, "/v1/completions", prompt=[99999]) == (400, "prompt", "invalid_value")
        assert await refusal(weak, "/v1/embeddings") == (404, None, "unknown_url")
        async with weak.http.post(weak.url + chat, data=b"{") as response:
            assert response.status == 400 and "not JSON" in (await response.json())["error"]["message"]
        async with weak.http.post(weak.url + chat, data=b" " * (MAX_BODY + 1)) as response:
            assert response.status == 413
        async with weak.http.get(weak.url + chat) as response:
            assert response.status == 405 and (await response.json())["error"]


async def refusal(weak: Weak, path: str, **body: Any) -> tuple[int, str | None, str | None]:
    status, answer = await weak.post(path, **body)
    return status, answer["error"]["param"], answer["error"]["code"]


# ---------------------------------------------------------------- as a process
@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "cowest_serving.weak_server", "--device", "cpu", "--threads", "1", *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def status_of(url: str) -> int:
    try:
        with urlopen(url, timeout=5) as response:
            return int(response.status)
    except OSError as error:
        return int(getattr(error, "code", 0))


def wait_ready(child: subprocess.Popen[str], url: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while status_of(url + "/readyz") != 200:
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < end, "the server never became ready"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    with process("--model", folder.as_uri(), "--port", str(port), "--die-with-parent", str(os.getpid())) as child:
        url = f"http://127.0.0.1:{port}"
        wait_ready(child, url)
        yield child, url


@pytest.fixture
def sdk(served: tuple[subprocess.Popen[str], str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served[1] + "/v1", api_key="k", max_retries=0) as client:
        yield client


def test_the_sdk_gets_answers_usage_and_the_digest(sdk: openai.OpenAI, folder: Path) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model="weak",
        messages=ASKED,
        n=2,
        seed=1,
        max_completion_tokens=6,
        temperature=1.5,
        logprobs=True,
        top_logprobs=2,
    )
    answer = raw.parse()
    assert raw.headers[HEADER_MODEL_DIGEST] == model_digest(folder)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage and answer.usage.prompt_tokens == 6  # <s> <user> w1 w2 <end> <assistant>
    written = [choice.logprobs.content for choice in answer.choices if choice.logprobs and choice.logprobs.content]
    assert answer.usage.completion_tokens == sum(map(len, written))
    for choice, tokens in zip(answer.choices, written, strict=True):
        assert choice.message.content is not None
        assert choice.message.content.split() == [t.token for t in tokens if t.token not in ("<s>", "<pad>", "<unk>")]
        assert all(len(token.top_logprobs) == 2 and token.logprob <= token.top_logprobs[0].logprob for token in tokens)
    again = sdk.chat.completions.create(
        model="weak", messages=ASKED, n=2, seed=1, max_completion_tokens=6, temperature=1.5
    )
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_a_stream_says_what_the_whole_answer_says(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "weak", "messages": ASKED, "n": 2, "seed": 4, "max_tokens": 8, "stop": ["w7"]}
    whole = sdk.chat.completions.create(**options)
    chunks = list(sdk.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(whole.choices):
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
        assert [d.finish_reason for d in deltas if d.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_plain_completions_whole_and_streamed(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "weak", "prompt": ["w1", "w2 w3"], "seed": 2, "max_tokens": 5, "logprobs": 1}
    whole = sdk.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage and whole.usage.prompt_tokens == 3
    first = whole.choices[0].logprobs
    assert first and first.tokens and len(first.tokens) == len(first.token_logprobs or [])
    streamed = ["", ""]
    for chunk in sdk.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    by_ids = sdk.completions.create(model="weak", prompt=[[8], [9]], max_tokens=1)
    assert len(by_ids.choices) == 2


def test_models_name_the_digest_and_metrics_count(sdk: openai.OpenAI, served: Any, folder: Path) -> None:
    with urlopen(served[1] + "/v1/models") as response:
        card = json.load(response)["data"][0]
    assert card["id"] == "weak" and card["digest"] == model_digest(folder) and card["max_model_len"] == 64
    assert sdk.models.retrieve("weak").id == "weak"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")
    sdk.completions.create(model=model_digest(folder), prompt="w1", max_tokens=1)
    with urlopen(served[1] + "/metrics") as response:
        text = response.read().decode()
    assert 'cowest_weak_requests_total{path="/v1/completions",status="200"}' in text
    assert "cowest_weak_ready 1" in text


def test_a_port_in_use_is_one_sentence_and_exit_2(served: Any, folder: Path) -> None:
    port = served[1].rpartition(":")[2]
    with process("--model", str(folder), "--port", port) as second:
        _, said = second.communicate(timeout=120)
    assert second.returncode == 2
    assert said.count("\n") == 1 and f"127.0.0.1:{port}" in said and "another --port" in said


def test_a_bad_model_folder_is_one_sentence_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with process("--model", str(tmp_path), "--port", str(free_port())) as child:
        _, said = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "Traceback" not in said and "pickle file pytorch_model.bin" in said.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_it_dies_with_its_parent(folder: Path) -> None:
    """The parent is killed so hard that it can tell nobody."""
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'cowest_serving.weak_server', *sys.argv[1:], '--die-with-parent']\n"
        "child = subprocess.Popen(command)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    port = free_port()
    command = [sys.executable, "-c", script, "--model", str(folder), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        end = time.monotonic() + 120
        while status_of(f"http://127.0.0.1:{port}/healthz") == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        parent.kill()
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_told_to_stop_before_it_serves_it_does_not_stay(folder: Path) -> None:
    command = [sys.executable, "-m", "cowest_serving.weak_server", "--device", "cpu", "--threads", "1"]
    assert told_at_the_start([*command, "--model", str(folder), "--port", str(free_port())]) == 0


def test_sigterm_finishes_the_answer_that_was_begun_and_exits_0(sdk: openai.OpenAI, served: Any) -> None:
    """Stays last: it ends the process that the others share."""
    options: Any = {"model": "weak", "messages": ASKED, "temperature": 2, "n": 64, "max_tokens": 50}
    stream = sdk.chat.completions.create(**options, stream=True)
    chunks = [next(stream)]
    served[0].send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert sum(choice.finish_reason is not None for chunk in chunks for choice in chunk.choices) == 64
    assert served[0].wait(60) == 0
