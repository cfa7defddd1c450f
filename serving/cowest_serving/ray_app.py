"""The same gateway on Ray Serve, for those who run their models there.

    python -m cowest_serving.ray_app --routing routing.json --job job.json --store s3://b/desk --port 8080 --replicas 2

The command starts a Ray of its own, of one node, in this pod. A RayService names the builder instead:

    applications: [{name: gateway, route_prefix: /, import_path: "cowest_serving.ray_app:app",
                    args: {routing: /routing/routing.json, job: /job/job.json, store: "s3://b/desk", replicas: 2}}]

Ray itself takes replicas out of its traffic; /readyz is the word of one replica. Its proxy appends a request id of its
own to ours unless it runs with PROXY in its environment. Needs the extra cowest[ray].
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from cowest_serving import app as gateway
from cowest_serving.app import Receive, Scope, Send
from cowest_serving.contract import HEADER_REQUEST_ID, SettingsError
from cowest_serving.logs import log_to_stderr

OBJECT_STORE_BYTES = 100 * 1024 * 1024  # near Ray's least: nothing is kept there
MAX_ONGOING = 1000  # answers of one replica: they wait for models. Ray's own 5 would make requests queue
PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cowest_serving.ray_app:middlewares"}
WANTED, NUMBERS = ("routing", "job", "store"), ("replicas", "finish_seconds")


@dataclass(frozen=True)
class RaySettings:
    routing: str
    job: str
    store: str
    spool: str | None = None
    book: str | None = None
    replicas: int = 1
    finish_seconds: int = 30
    log_level: str = "info"


def app(args: Mapping[str, Any]) -> Any:
    """A Ray Serve application. Raises `SettingsError` for arguments that are missing or unknown."""
    serve = _module("ray.serve")
    settings = ray_settings(args)

    def build() -> gateway.App:  # in each replica
        log_to_stderr(settings.log_level)
        spool = Path(settings.spool) if settings.spool else None
        return gateway.app_of(
            Path(settings.routing), Path(settings.job), settings.store, spool=spool, book=settings.book
        )

    deployment = serve.deployment(serve.ingress(build)()).options(
        name="gateway",
        num_replicas=settings.replicas,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=settings.finish_seconds,
        ray_actor_options={"num_cpus": 0},  # it waits for models: no CPU is to be reserved for that
    )
    return deployment.bind()


def middlewares() -> list[Middleware]:
    """For Ray's HTTP proxy."""
    return [Middleware(OneRequestId)]


class OneRequestId:
    """Takes out the request id that Ray appends to ours: SDKs would join the two, and no record has such an id."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once(event: gateway.Event) -> None:
            if event["type"] == "http.response.start":
                ids = [at for at, header in enumerate(event["headers"]) if header[0] == HEADER_REQUEST_ID.encode()]
                kept = [header for at, header in enumerate(event["headers"]) if at not in ids[1:]]
                event = {**event, "headers": kept}
            await send(event)

        await self._app(scope, receive, once)


def ray_settings(args: Mapping[str, Any]) -> RaySettings:
    """Raises `SettingsError` that names the argument."""
    known = RaySettings.__dataclass_fields__
    if unknown := sorted(set(args) - set(known)):
        raise SettingsError(f"args: wanted some of {', '.join(known)}, saw {', '.join(unknown)}")
    if missing := [name for name in WANTED if not args.get(name)]:
        raise SettingsError(f"args.{missing[0]}: wanted a value, saw none")
    for name in NUMBERS:
        if name in args and (not isinstance(args[name], int) or args[name] < 1):
            raise SettingsError(f"args.{name}: wanted a whole number of at least 1, saw {args[name]!r}")
    return RaySettings(**args)


def _module(name: str) -> Any:
    """Ray is imported only here, when it is asked for: nothing else of ours needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(
            f"wanted Ray Serve, saw that it cannot be imported ({error}); install the extra cowest[ray], "
            "or run the gateway without Ray: python -m cowest_serving.app"
        ) from error


# ---------------------------------------------------------------- the process
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_stderr(options.log_level)
    try:
        gateway.load_settings(options.job)  # Ray would start the replicas again and again
        gateway.listen(options.host, options.port).close()
        application = app({name: str(getattr(options, name)) for name in WANTED} | _more(options))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{gateway.port_trouble(options, error)}\n")
        return 2
    if options.die_with_parent:
        threading.Thread(target=gateway.follow_parent, args=(os.getppid(),), daemon=True).start()
    _run(options, application)
    return 0


def _more(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: str(getattr(options, name)) for name in ("spool", "book") if getattr(options, name)}
    return given | {name: getattr(options, name) for name in ("replicas", "finish_seconds", "log_level")}


def _run(options: argparse.Namespace, application: Any) -> None:
    """Until a signal; then for as long as the drain takes, and until the answers under way are finished."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **PROXY}.items():
        os.environ.setdefault(name, value)
    ray, serve = _module("ray"), _module("ray.serve")
    ray.init(
        include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, configure_logging=False, log_to_driver=True
    )
    told = threading.Event()
    for stop in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        signal.signal(stop, lambda *_: told.set())
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(application, name="gateway", route_prefix="/")
        told.wait()
        told.clear()
        told.wait(options.drain_seconds)  # a second signal ends it
        serve.delete("gateway")  # lets answers finish, which shutdown does not: that ends the proxy before the replicas
    finally:
        serve.shutdown()
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    flags = gateway.parser()
    flags.prog, flags.description = "python -m cowest_serving.ray_app", "The collaboration gateway on Ray Serve."
    flags.add_argument("--replicas", type=int, default=1, metavar="N", help="of the gateway (default: %(default)s)")
    return flags


if __name__ == "__main__":
    sys.exit(main())
