"""How a server process hears that it is to stop."""

from __future__ import annotations

import signal

import uvicorn


def heed_signals(server: uvicorn.Server) -> None:
    """From here on, so that one that comes before uvicorn runs is not lost.

    uvicorn raises it again after its shutdown, where it means nothing more: asked to stop and stopped is a success.
    """
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, server.handle_exit)
