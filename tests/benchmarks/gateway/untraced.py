"""The gateway without any record, to see what records cost. Flags as of `cowest_serving.app`; --store is unused."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import uvicorn

from cowest_serving import app
from cowest_serving.contract import KEEP_ALIVE_SECONDS
from cowest_serving.logs import log_to_stderr
from cowest_serving.routing import FileRouting


class NoTraces:
    is_full, spool_bytes = False, 0

    def keep(self, row: Any, others: int = 0) -> asyncio.Future[bool] | None:
        return None

    keep_feedback = keep

    def counts(self) -> Mapping[str, int]:
        return {}

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...


def main() -> None:
    options = app.parser().parse_args()
    log_to_stderr(options.log_level)
    settings, stop = app.load_settings(options.job), app.Stop()
    keys = app.Keys(["sk-bench"])
    gateway = app.build_app(settings, FileRouting(options.routing), NoTraces(), strong_keys=keys, stop=stop)
    config = uvicorn.Config(
        gateway,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    app.DrainingServer(config, stop, 0).run(sockets=[app.listen(options.host, options.port)])


if __name__ == "__main__":
    sys.exit(main())
