"""Kill the gateway with SIGKILL under load and break what it stands on: no trace that a client was promised is lost.

    python -m tests.benchmarks.torture_gateway [--kills 200] [--rate 500] [--seed 0] [--without-litellm]

A real gateway process on a spool, with stubs of the weak and the strong model, is asked by whole answers and streams in
turn, and killed again and again. Meanwhile the object store is gone for a minute, and the spool's disk of some lives is
a small one that fills up; in others `fdatasync` fails now and then, or is slow. Behind the last frame of some logs lies
what a write cut off by a power cut leaves. At the end the public reader looks through the whole store:

  acknowledged   answers of which the client heard `x-cowest-trace: durable`, or `: trace durable` in a stream
  lost           of these, not in the store
  duplicated     traces that are there twice, whoever heard of them
  broken_answers wrong, cut or failed while the process lived

Then the same kills and the same outage for the S3 logger of a LiteLLM proxy, at half of its own ceiling: `litellm_lost`
are answers given whose log object never comes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from cowest_serving import app as gateway_app
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Arm, Collaboration, Pair, Routing, Strong, dump
from cowest_serving.spool import read_frames
from cowest_serving.traces import read_traces
from tests.benchmarks.gateway import tools
from tests.benchmarks.gateway.processes import Unavailable
from tests.benchmarks.plain_http import Client, Reply, answer_to, question, text_of
from tests.ports import free_port

LIFE = (0.3, 1.7)  # seconds under load from ready to the kill
PATIENCE = 20.0  # seconds for an answer
MAX_IN_FLIGHT = 100  # a machine that is too slow for the rate is asked less, and the figures say so
SMALL_DISK = 1024 * 1024  # bytes: a second's records
DELAYS = {"weak": 0.01, "strong": 0.04}
DIGEST = "sha256:weak"
WORD = "durable"
KEYS = ("cowest-torture", "cowest-torture-secret")
BUCKET = "torture"
FAULTS = ("", "", "sync fails", "", "sync is slow", "", "write is short", "")  # of the disk, by life in turn


# ---------------------------------------------------------------- what is counted
@dataclass(frozen=True)
class Options:
    kills: int = 200
    rate: float = 500.0
    outage: float = 60.0
    seed: int = 0
    beside_litellm: bool = False


@dataclass
class Seen:
    """Of all lives together."""

    asked: int = 0
    not_asked: int = 0  # the schedule said so, but too many were under way
    given: list[str] = field(default_factory=list)  # the calls that were answered
    not_durable: int = 0  # of these
    cut_by_kills: int = 0
    acknowledged: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0  # under load


@dataclass
class Life:
    """One process, from ready to its kill. An answer that its kill cut off is nobody's fault."""

    port: int
    is_killed: bool = False


class Users:
    """Ask at a fixed rate whatever comes back, whole answers and streams in turn."""

    def __init__(self, rate: float, model: str = "pair") -> None:
        self.seen = Seen()
        self._rate, self._model = rate, model
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, life: Life, seconds: float) -> None:
        client = Client(life.port)
        begun = time.monotonic()
        number = 0
        while (at := time.monotonic() - begun) < seconds:
            while number < at * self._rate:
                number += 1
                if len(self._tasks) >= MAX_IN_FLIGHT:
                    self.seen.not_asked += 1
                    continue
                task = asyncio.create_task(self.one(client, life, f"{self.seen.asked:x}"))
                self.seen.asked += 1
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(1 / self._rate)
        self.seen.seconds += time.monotonic() - begun

    async def ceiling(self, life: Life, seconds: float) -> float:
        """Calls a second of 32 users who ask as soon as they are answered."""
        client = Client(life.port)

        async def user(number: int) -> None:
            for turn in range(1_000_000):
                await self.one(client, life, f"{(number + 1 << 40) + turn:x}")

        everybody = asyncio.gather(*(user(number) for number in range(32)))
        await asyncio.sleep(seconds / 3)
        before = len(self.seen.given)
        await asyncio.sleep(seconds * 2 / 3)
        found = (len(self.seen.given) - before) / (seconds * 2 / 3)
        everybody.cancel()
        await asyncio.gather(everybody, return_exceptions=True)
        return found

    async def settled(self) -> None:
        """Each answer has come, or its connection is broken."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def one(self, client: Client, life: Life, call: str) -> None:
        is_stream = int(call, 16) % 2 == 1
        messages = [{"role": "user", "content": question(call, size=1000)}]
        body = json.dumps({"model": self._model, "messages": messages, "stream": is_stream}).encode()
        self._judge(await client.post("/v1/chat/completions", body, PATIENCE), call, life)

    def _judge(self, reply: Reply, call: str, life: Life) -> None:
        if name := promised(reply):
            self.seen.acknowledged.append(name)
        if reply.is_whole and reply.status == 200 and is_right(reply, call):
            self.seen.given.append(call)
            self.seen.not_durable += not name
        elif life.is_killed and not reply.is_whole:
            self.seen.cut_by_kills += 1
        else:
            self.seen.broken.append(f"{call}: status {reply.status}, whole {reply.is_whole}, {reply.body[:300]!r}")


def promised(reply: Reply) -> str | None:
    """The id of the trace that the client was told to be durable, though the connection broke right after."""
    is_said = reply.headers.get("x-cowest-trace") == WORD or f": trace {WORD}\n\n".encode() in reply.body
    return reply.headers["x-request-id"] if is_said else None


def is_right(reply: Reply, call: str) -> bool:
    try:
        return text_of(reply) == answer_to(call)
    except (ValueError, KeyError, IndexError, TypeError):
        return False


# ---------------------------------------------------------------- processes
def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end:
            raise SystemExit(f"Wanted {what} within {seconds:.0f} s, saw none.")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def stub(name: str) -> AsyncIterator[int]:
    port = free_port()
    more = ["--digest", DIGEST] if name == "weak" else []
    script = str(Path(__file__).with_name("plain_http.py"))
    process = subprocess.Popen([sys.executable, script, "--port", str(port), "--delay", str(DELAYS[name]), *more])
    try:
        await until(lambda: _listens(port), 30, f"a stub of the {name} model")
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class ObjectStore:
    """MinIO where it is found on PATH; else a folder. Both can be gone for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._binary = folder, shutil.which("minio")
        self._address = f"127.0.0.1:{free_port()}"
        self._server: subprocess.Popen[bytes] | None = None
        self.is_gone = False
        self.kind = "MinIO" if self._binary else "a folder"
        self.uri = f"s3://{BUCKET}/desk" if self._binary else str(folder / "store")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COWEST_S3_ENDPOINT": f"http://{self._address}",
            "COWEST_S3_PATH_STYLE": "true",
            "AWS_ACCESS_KEY_ID": KEYS[0],
            "AWS_SECRET_ACCESS_KEY": KEYS[1],
        }

    async def __aenter__(self) -> ObjectStore:
        await self.come()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.go()

    async def be_gone(self, seconds: float) -> None:
        self.go()
        self.is_gone = True
        await asyncio.sleep(seconds)
        await self.come()

    async def come(self) -> None:
        self.is_gone = False
        if not self._binary:
            Path(self.uri).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (self._folder / "away").rename(self.uri)
            return
        environment = {**os.environ, "MINIO_ROOT_USER": KEYS[0], "MINIO_ROOT_PASSWORD": KEYS[1]}
        command = [self._binary, "server", "--quiet", "--address", self._address, str(self._folder / "minio")]
        with (self._folder / "minio.log").open("ab") as log:
            self._server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        await until(lambda: is_up(f"http://{self._address}/minio/health/ready"), 60, "MinIO")
        await asyncio.to_thread(self._make_bucket)

    def _make_bucket(self) -> None:
        from minio import Minio

        client = Minio(self._address, *KEYS, secure=False)
        if not client.bucket_exists(BUCKET):
            client.make_bucket(BUCKET)

    def go(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        elif not self._binary:
            with contextlib.suppress(FileNotFoundError):
                Path(self.uri).rename(self._folder / "away")
            Path(self.uri).write_text("a file where the folder should be")

    def names(self) -> list[str]:
        """Of all objects in the bucket, whoever put them."""
        from minio import Minio

        client = Minio(self._address, *KEYS, secure=False)
        return [item.object_name or "" for item in client.list_objects(BUCKET, recursive=True)]


# ---------------------------------------------------------------- the gateway
def serve(arguments: list[str], environment: Mapping[str, str], log: Path, fault: str, seed: int) -> None:
    """In a process of its own, forked from one that has imported the gateway: that takes a second each time."""
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    break_disk(fault, random.Random(seed))
    sys.exit(gateway_app.main(arguments))


def break_disk(fault: str, chance: random.Random) -> None:
    """As the kernel would: below the gateway's own code."""
    real_sync, real_write = os.fdatasync, os.pwrite

    def sync(handle: Any) -> None:
        if fault == "sync fails" and chance.random() < 0.1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "sync is slow" and chance.random() < 0.1:
            time.sleep(chance.uniform(0.05, 0.4))
        real_sync(handle)

    def write(handle: int, data: Any, offset: int) -> int:
        if chance.random() < 0.1:
            real_write(handle, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(handle, data, offset)

    os.fdatasync = sync  # type: ignore[assignment]
    if fault == "write is short":
        os.pwrite = write


class Gateways:
    """One after the other, on a spool that takes all and on one that is soon full."""

    def __init__(self, folder: Path, store: ObjectStore, weak: int, strong: int, has_small_disk: bool) -> None:
        self._folder, self._store, self._lives = folder, store, 0
        self._context = multiprocessing.get_context("forkserver")  # its forks have no threads of the parent's
        self._context.set_forkserver_preload(["cowest_serving.app", "pyarrow.parquet", "minio"])
        url = f"http://127.0.0.1:{strong}/v1"
        (folder / "job.json").write_text(json.dumps({"spec": _spec(url, 1 << 30)}))
        (folder / "small.json").write_text(json.dumps({"spec": _spec(url, 1 << 30 if has_small_disk else SMALL_DISK)}))
        pair = Pair(DIGEST, "file:///m", DEFAULT_PROMPTS["Explanation"], "Explanation", url, "stub")
        arm = Arm("stable", 100, "Pair", pair, f"http://127.0.0.1:{weak}/v1")
        (folder / "routing.json").write_text(json.dumps(dump(Routing(1, "salt", (arm,)))))

    def spool(self, is_small: bool) -> Path:
        return self._folder / "small" / "spool" if is_small else self._folder / "spool"

    @asynccontextmanager
    async def one(self, is_small: bool = False, fault: str = "") -> AsyncIterator[Life]:
        """A gateway that is ready. It is killed at the end."""
        life = Life(free_port())
        self._lives += 1
        log = self._folder / "gateway.log"
        arguments = (self._arguments(life.port, is_small), self._store.environment, log, fault, self._lives)
        process = self._context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        try:
            await until(
                lambda: is_up(f"http://127.0.0.1:{life.port}/readyz"), 60, f"a gateway that is ready; see {log}"
            )
            yield life
        finally:
            life.is_killed = True  # before the kill: what breaks from now on is its doing
            process.kill()
            await asyncio.to_thread(process.join)

    def _arguments(self, port: int, is_small: bool) -> list[str]:
        job = self._folder / ("small.json" if is_small else "job.json")
        files = ["--routing", self._folder / "routing.json", "--job", job, "--spool", self.spool(is_small)]
        return [*map(str, files), "--store", self._store.uri, "--port", str(port), "--log-level", "error"]

    async def ship_the_rest(self) -> None:
        for is_small in (False, True):
            spool = self.spool(is_small)
            async with self.one(is_small):
                await until(lambda spool=spool: not list(spool.glob("*/*.log")), 120, f"an end of the logs in {spool}")


def _spec(strong_url: str, spool_bytes: int) -> dict[str, Any]:
    strong = Strong(strong_url, "stub", (), timeout_seconds=15, max_concurrency=1000, max_retries=0)
    collaboration = Collaboration("Explanation", "StrongAlone", "Fail", "StrongAlone", draft_max_tokens=99)
    return {
        "strong": dump(strong),
        "collaboration": dump(collaboration),
        "traces": {"contentSamplePercent": 100, "spoolBytes": spool_bytes, "whenSpoolFull": "Answer"},
    }


# ---------------------------------------------------------------- faults around it
@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Whether there is one: it takes the right to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(folder)]
    is_there = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class LiteLLM:
    """Its proxy with its S3 logger, flushed each second; one model call an answer."""

    def __init__(self, folder: Path, store: ObjectStore, strong: int) -> None:
        python = tools.venv(f"litellm-{tools.LITELLM}", f"litellm[proxy]=={tools.LITELLM}") / "python"
        model = {"model": "openai/stub", "api_base": f"http://127.0.0.1:{strong}/v1", "api_key": "any"}
        logger = {
            "s3_bucket_name": BUCKET,
            "s3_path": "litellm",
            "s3_region_name": "us-east-1",
            "s3_endpoint_url": store.environment["COWEST_S3_ENDPOINT"],
            "s3_aws_access_key_id": KEYS[0],
            "s3_aws_secret_access_key": KEYS[1],
        }
        config = {
            "model_list": [{"model_name": "pair", "litellm_params": model}],
            "litellm_settings": {"callbacks": ["s3_v2"], "s3_callback_params": logger, "telemetry": False},
        }
        (folder / "litellm.yaml").write_text(json.dumps(config))
        said = {
            "CONFIG_FILE_PATH": str(folder / "litellm.yaml"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "DEFAULT_S3_FLUSH_INTERVAL_SECONDS": "1",  # 10 by default: hardly a life lasts as long
            "DISABLE_ADMIN_UI": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        script = str(Path(__file__).with_name("torture_litellm.py"))
        with (folder / "litellm.log").open("wb") as log:
            self._launcher = subprocess.Popen(
                [python, script], stdin=-1, stdout=-1, stderr=log, text=True, env=os.environ | said
            )
        self.log = folder / "litellm.log"

    @asynccontextmanager
    async def one(self, *_: Any) -> AsyncIterator[Life]:
        life = Life(free_port())
        child = await asyncio.to_thread(self._start, life.port)
        try:
            await until(lambda: _listens(life.port), 120, f"a LiteLLM that is ready; see {self.log}")
            for call in ("fffffff0", "fffffff1"):  # its first answers take a second each
                await Users(0).one(Client(life.port), life, call)
            yield life
        finally:
            life.is_killed = True
            os.kill(child, signal.SIGKILL)
            await until(lambda: not _listens(life.port), 30, "an end of LiteLLM")

    def _start(self, port: int) -> int:
        assert self._launcher.stdin is not None and self._launcher.stdout is not None
        self._launcher.stdin.write(f"{port}\n")
        self._launcher.stdin.flush()
        while (said := self._launcher.stdout.readline()) and not said.strip().isdigit():
            pass
        if not said:
            raise Unavailable(f"its launcher ended: {self.log.read_text()[-400:]}")
        return int(said)

    def close(self) -> None:
        self._launcher.kill()
        self._launcher.communicate()


async def torture_litellm(
    folder: Path, store: ObjectStore, strong: int, options: Options, chance: random.Random
) -> dict[str, Any]:
    """The same kills and the same outage, at half of its own ceiling. Lost: its log object never comes."""
    litellm = LiteLLM(folder, store, strong)
    try:
        async with litellm.one() as life:
            ceiling = await Users(0).ceiling(life, seconds=6)
        users = Users(ceiling / 2)
        await kill_again_and_again(litellm, users, Faults(), store, options, chance)
        async with litellm.one():
            await asyncio.sleep(15)  # whatever a start may bring up
        names = await asyncio.to_thread(store.names)
    finally:
        litellm.close()
    logged = {name.rpartition("chatcmpl-")[2].removesuffix(".json") for name in names if name.startswith("litellm/")}
    return {
        "litellm_lost": sum(call not in logged for call in users.seen.given),
        "litellm_answers": len(users.seen.given),
        "litellm_logged": len(logged),
        "litellm_calls_per_second": round(ceiling / 2, 1),
        "litellm_version": tools.LITELLM,
    }


def tear(spool: Path, chance: random.Random) -> bool:
    """Leave behind the last whole frame of a log what a write leaves that a power cut stopped."""
    logs = [path for path in spool.glob("*/*.log") if path.stat().st_size]
    if not logs:
        return False
    path = chance.choice(logs)
    data = path.read_bytes()
    whole = len(data) - read_frames(data).torn_bytes
    half = data[: chance.randrange(10, 200)]  # the first frame's head promises more than follows
    with path.open("r+b") as file:
        file.seek(whole)
        file.write(chance.choice([half[:10], half, bytes(300), chance.randbytes(300)]))
    return True


@dataclass
class Faults:
    """How many lives had a disk that failed or was full, and how many logs a torn end."""

    disk: int = 0
    full_disk: int = 0
    torn_frames: int = 0


# ---------------------------------------------------------------- the torture
async def torture(folder: Path, options: Options) -> dict[str, Any]:
    chance = random.Random(options.seed)
    store, users, faults = ObjectStore(folder), Users(options.rate), Faults()
    async with stub("weak") as weak, stub("strong") as strong, store:
        with small_disk(folder / "small") as is_mounted:
            gateways = Gateways(folder, store, weak, strong, is_mounted)
            await kill_again_and_again(gateways, users, faults, store, options, chance)
            await gateways.ship_the_rest()
        found = await asyncio.to_thread(look, store, users.seen)
        try:
            peer = await torture_litellm(folder, store, strong, options, chance) if options.beside_litellm else {}
        except Unavailable as error:
            peer = {"litellm_lost": None, "reason": str(error)}
    return (
        found
        | peer
        | {
            "store": store.kind,
            "store_gone_s": options.outage,
            "small_disk": "a mount of its own" if is_mounted else "traces.spoolBytes",
            **asdict(faults),
        }
    )


async def kill_again_and_again(
    gateways: Gateways | LiteLLM,
    users: Users,
    faults: Faults,
    store: ObjectStore,
    options: Options,
    chance: random.Random,
) -> None:
    outage = None
    for number in range(options.kills):
        if number == options.kills // 3:
            outage = asyncio.create_task(store.be_gone(options.outage))
        is_full = store.is_gone and number % 2 == 1
        fault = FAULTS[number % len(FAULTS)]
        async with gateways.one(is_full, fault) as life:
            await users.ask(life, chance.uniform(*LIFE))
        await users.settled()
        faults.full_disk += is_full
        faults.disk += bool(fault)
        if isinstance(gateways, Gateways):
            faults.torn_frames += chance.random() < 0.5 and tear(gateways.spool(is_full), chance)
        if number % 20 == 19:
            print(f"{number + 1} kills, {len(users.seen.given)} answers, {len(users.seen.broken)} broken", flush=True)
    if outage is not None:
        await outage


def look(store: ObjectStore, seen: Seen) -> dict[str, Any]:
    """What the public reader says of the whole store, against what clients were told."""
    with environment(store.environment):
        stored = Counter(read_traces(store.uri)["trace_id"].to_pylist())
    lost = [name for name in seen.acknowledged if name not in stored]
    for line in (*seen.broken[:10], *(f"lost: {name}" for name in lost[:10])):
        print(line)
    return {
        "acknowledged": len(seen.acknowledged),
        "lost": len(lost),
        "duplicated": sum(times > 1 for times in stored.values()),
        "broken_answers": len(seen.broken),
        "stored": len(stored),
        "asked": seen.asked,
        "answered": len(seen.given),
        "not_durable": seen.not_durable,
        "cut_by_kills": seen.cut_by_kills,
        "calls_per_second": round(seen.asked / seen.seconds, 1),
        "not_asked": seen.not_asked,
    }


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=Options.kills)
    flags.add_argument("--rate", type=float, default=Options.rate, help="calls per second")
    flags.add_argument("--outage", type=float, default=Options.outage, help="seconds for which the store is gone")
    flags.add_argument("--seed", type=int, default=Options.seed)
    flags.add_argument("--folder", type=Path, help="on the disk to be tried; default: a temporary one")
    flags.add_argument("--without-litellm", action="store_true")
    given = flags.parse_args()
    options = Options(given.kills, given.rate, given.outage, given.seed, not given.without_litellm)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = uvloop.run(torture(Path(folder), options))
    print(json.dumps({"kills": options.kills, **found}))


if __name__ == "__main__":
    main()
