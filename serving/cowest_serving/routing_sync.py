"""The sidecar that keeps the gateway's routing file equal to a ConfigMap, within a second of each change.

    python -m cowest_serving.routing_sync --namespace shop --configmap desk-routing --out /routing/routing.json

It lists and watches that one ConfigMap with the pod's service account (a Role with get, list and watch on it is enough)
and replaces the file atomically. What is not a routing is never written; while the API server or the ConfigMap is away
the last file stays. Exit code 2: the flags or the service account are no good.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from cowest_serving import store
from cowest_serving.contract import Routing
from cowest_serving.logs import REASON_BAD_START, complain, log_to_stderr
from cowest_serving.routing import parse_routing
from cowest_serving.store import StoreError

log = logging.getLogger(__name__)
KEY = "routing.json"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 50  # then the API server ends a watch, and the next one brings the token of that time
SILENT_SECONDS = 60  # without even that end the connection is dead: its other side went away without a word


class SyncError(Exception):
    """The API server could not be followed just now: what was wanted, what was seen, what to change."""


class Expired(Exception):
    """410: the changes since that resourceVersion are no longer known; list anew."""


# ---------------------------------------------------------------- the file
class RoutingFile:
    """The file that the gateway follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version: int | None = None  # of the routing in the file
        self._written = b""
        self._complaint = ""
        with contextlib.suppress(OSError, ValueError, TypeError):  # what an earlier run of this container left
            data = path.read_bytes()
            self.version, self._written = parse_routing(data).version, data

    def take(self, config_map: Mapping[str, Any] | None) -> None:
        """Write the routing of a ConfigMap (`None`: there is none) if it is another. Raises `StoreError`."""
        if config_map is None:
            self._complain("the ConfigMap is not there")
            return
        data = str((config_map.get("data") or {}).get(KEY) or "").encode()
        if not data:
            self._complain(f"the ConfigMap has no {KEY}")
        elif data == self._written:
            self._complaint = ""
        elif routing := self._parsed(data):
            store.put(str(self.path), data)
            self.version, self._written, self._complaint = routing.version, data, ""
            log.info("Routing %d is written to %s", routing.version, self.path, extra={"reason": "RoutingWritten"})

    def _parsed(self, data: bytes) -> Routing | None:
        try:
            return parse_routing(data)
        except (ValueError, TypeError) as error:
            self._complain(f"its {KEY} is no routing ({error})")
            return None

    def _complain(self, complaint: str) -> None:
        """Once for each complaint: every new watch begins by looking again."""
        if complaint != self._complaint:
            log.warning("%s is left as it is: %s.", self.path, complaint, extra={"reason": "RoutingNotUsable"})
        self._complaint = complaint


# ---------------------------------------------------------------- the API server
@dataclass(frozen=True)
class Source:
    """One ConfigMap of an API server, and with whose token it is read."""

    server: str
    namespace: str
    name: str
    token_file: Path
    ca_file: Path | None  # None: the certificates that this machine trusts
    silent_seconds: float = SILENT_SECONDS

    def __str__(self) -> str:
        return f"ConfigMap {self.namespace}/{self.name}"

    @property
    def url(self) -> str:
        return f"{self.server.rstrip('/')}/api/v1/namespaces/{self.namespace}/configmaps"

    @property
    def only_it(self) -> dict[str, str]:
        """Makes list and watch of many a request for this one, which RBAC's resourceNames can allow."""
        return {"fieldSelector": f"metadata.name={self.name}"}

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A connection with the token and CA of now, since both rotate. Raises `SyncError`."""
        try:
            headers = {"authorization": f"Bearer {self.token_file.read_text('utf-8').strip()}"}
            context = ssl.create_default_context(cafile=self.ca_file) if self.server.startswith("https:") else False
        except (OSError, UnicodeDecodeError) as error:
            files = f"a token in {self.token_file} and certificates in {self.ca_file}"
            raise SyncError(
                f"wanted {files}, saw: {error}; let the pod mount its service account's token, or give --token-file "
                "and --ca-file"
            ) from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self.silent_seconds)
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            yield session


async def follow(source: Source, file: RoutingFile) -> None:
    """Keep the file equal to the ConfigMap until cancelled."""
    follower = _Follower(source, file)
    while True:
        await follower.once()


class _Follower:
    def __init__(self, source: Source, file: RoutingFile) -> None:
        self._source, self._file = source, file
        self._seen = ""  # resourceVersion up to which the file is what it should be; "": list first
        self._failures = 0
        self._trouble = ""

    async def once(self) -> None:
        """One connection: list where needed, then watch to its end; trouble is said once and waited out."""
        try:
            async with self._source.connected() as session:
                if not self._seen:
                    await self._list(session)
                await self._watch(session)
                return
        except Expired:
            self._seen = ""
            trouble = ""
        except (SyncError, StoreError) as error:
            trouble = str(error)
        except aiohttp.SocketTimeoutError:
            trouble = f"{self._source.server} was silent for {self._source.silent_seconds:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"{self._source.server} cannot be reached or broke off ({str(error) or type(error).__name__})"
        except (ValueError, KeyError, TypeError) as error:
            trouble = (
                f"wanted the Kubernetes API at {self._source.server}, saw another answer ({error}); check --server"
            )
        if trouble and trouble != self._trouble:
            away = {"reason": "RoutingNotFollowed"}
            log.warning("%s cannot be followed: %s. It is tried again.", self._source, trouble, extra=away)
        self._trouble = trouble or self._trouble
        await asyncio.sleep(wait_after(self._failures))
        self._failures += 1

    async def _list(self, session: aiohttp.ClientSession) -> None:
        async with session.get(self._source.url, params=self._source.only_it) as response:
            await self._refuse_faults(response)
            found = orjson.loads(await response.read())
        items = found.get("items") or []
        self._file.take(items[0] if items else None)
        self._seen = found["metadata"]["resourceVersion"]

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        more = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        params = {**self._source.only_it, **more, "resourceVersion": self._seen}
        async with session.get(self._source.url, params=params) as response:
            await self._refuse_faults(response)
            if self._trouble:
                log.warning("%s is followed again.", self._source, extra={"reason": "RoutingFollowed"})
            self._trouble = ""
            events = 0
            async for line in _lines(response.content):
                self._take(orjson.loads(line))
                events += 1
        self._failures = 0
        if not events:  # a proxy that ends every watch at once must not make this spin
            await asyncio.sleep(wait_after(0))

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, body = event["type"], event["object"]
        if kind == "ERROR":
            raise Expired if body.get("code") == 410 else SyncError(f"the watch ended with {body.get('message')}")
        if kind != "BOOKMARK":
            self._file.take(None if kind == "DELETED" else body)
        self._seen, self._failures = body["metadata"]["resourceVersion"], 0

    async def _refuse_faults(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        if response.status == 410:
            raise Expired
        said = _message(await response.content.read(8192))
        remedy = {
            401: "check the token of the pod's service account",
            403: f"give the pod's service account a Role with get, list and watch on configmaps {self._source.name}",
        }.get(response.status, "check --server and that the API server is well")
        raise SyncError(f"wanted 200 from {self._source.url}, saw {response.status} ({said}); {remedy}")


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of any length: StreamReader's own have a limit, and an event may be a MiB."""
    begun = b""
    async for data in content.iter_any():
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield line


def _message(data: bytes) -> str:
    try:
        return str(orjson.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace")[:200]


def wait_after(failures: int) -> float:
    """Seconds; with jitter, since all gateways lose the same API server at the same time."""
    return min(10.0, 0.2 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)


# ---------------------------------------------------------------- the process
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_stderr(options.log_level)
    try:
        return asyncio.run(_run(_source(options), RoutingFile(options.out), options.health_port))
    except (SyncError, OSError) as error:
        complain(f"routing_sync: {error}", REASON_BAD_START)
        return 2


def _source(options: argparse.Namespace) -> Source:
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
    if not options.server and not (host and port):
        raise SyncError(
            "wanted the API server's address, saw neither --server nor KUBERNETES_SERVICE_HOST and "
            "KUBERNETES_SERVICE_PORT; give --server https://host:port outside of a pod"
        )
    server = options.server or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    return Source(server, options.namespace, options.configmap, options.token_file, options.ca_file)


async def _run(source: Source, file: RoutingFile, health_port: int) -> int:
    async with source.connected():  # a service account that is not mounted is no passing trouble
        pass
    stop = asyncio.Event()
    for told in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(told, stop.set)
    async with _health(file, health_port):
        following = asyncio.create_task(follow(source, file))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # a fault of ours: Kubernetes starts the container again
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    return 0


@asynccontextmanager
async def _health(file: RoutingFile, port: int) -> AsyncIterator[None]:
    """/healthz for the kubelet: 200 once there is a routing in the file."""
    if not port:
        yield
        return

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"routing_version": file.version}, status=503 if file.version is None else 200)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cowest_serving.routing_sync",
        description="Keep a routing file equal to a ConfigMap.",
    )
    add = parser.add_argument
    add("--namespace", required=True)
    add("--configmap", required=True, metavar="NAME", help=f"the ConfigMap whose {KEY} is followed")
    add("--out", required=True, type=Path, metavar="FILE", help="the file to keep, on a volume shared with the gateway")
    add("--health-port", type=int, default=0, help="serve /healthz there; 0: nowhere (default: %(default)s)")
    add("--server", metavar="URL", help="of the API server (default: that of the pod's cluster)")
    add("--token-file", type=Path, default=ACCOUNT / "token", help="read for every new connection")
    add("--ca-file", type=Path, default=ACCOUNT / "ca.crt")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
