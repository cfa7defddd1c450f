"""The gateway's own process without any record, to see what records cost. Flags as of `cowest_serving.app`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from cowest_serving import app


class NoTraces:
    is_full, spool_bytes = False, 0

    def keep(self, row: Any, others: int = 0) -> asyncio.Future[bool] | None:
        return None

    keep_feedback = keep

    def counts(self) -> Mapping[str, int]:
        return {}

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...


if __name__ == "__main__":
    app._sink = lambda *_: NoTraces()  # all else is the very process that is compared
    sys.exit(app.main())
