"""A strong model that takes so many calls at once and answers 429 to more: a stand-in for `feedback_bench`.

    python tests/benchmarks/busy_strong.py --port 9195 --at-once 64 --seconds 0.8

How long an answer takes is log-normal and hangs on what is asked alone, so the work of a list of calls is the same
whoever makes them. POST /killed notes that the client was killed now; GET /stats tells the counts. `repeated`: answers
that were given more than a second before a kill and are asked for again. It honours no Idempotency-Key.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web

SIGMA = 0.5
RECEIVED_SECONDS = 1.0  # after so long a client has what was sent to it


@dataclass
class Counts:
    answered: int = 0
    refused: int = 0  # by 429
    repeated: int = 0
    resent: int = 0  # that were in flight, or just answered, when the client was killed
    most_at_once: int = 0
    work_seconds: float = 0.0  # of distinct calls
    first: float = 0.0
    last: float = 0.0


@dataclass
class Strong:
    at_once: int
    seconds: float
    counts: Counts = field(default_factory=Counts)
    running: int = 0
    begun: set[str] = field(default_factory=set)
    given: dict[str, float] = field(default_factory=dict)  # content -> when its answer was sent
    killed: float = 0.0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self.running >= self.at_once:
            self.counts.refused += 1
            said = {"error": {"message": "too many at once", "code": "rate_limit_exceeded"}}
            return web.json_response(said, status=429, headers={"retry-after": "1"})
        body = await request.json()
        content = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()
        self._note(content)
        self.running += 1
        self.counts.most_at_once = max(self.counts.most_at_once, self.running)
        try:
            await asyncio.sleep(self.length(content))
            response = web.json_response(_completion(body, content))
            await response.prepare(request)
            await response.write_eof()
        except ConnectionResetError:  # the client is gone
            return response
        finally:
            self.running -= 1
        self.given[content] = self.counts.last = time.time()
        self.counts.answered += 1
        return response

    def _note(self, content: str) -> None:
        self.counts.first = self.counts.first or time.time()
        if content in self.begun:
            was_received = self.given.get(content, float("inf")) < self.killed - RECEIVED_SECONDS
            self.counts.repeated += was_received
            self.counts.resent += not was_received
        else:
            self.begun.add(content)
            self.counts.work_seconds += self.length(content)

    def length(self, content: str) -> float:
        drawn = random.Random(content).lognormvariate(0.0, SIGMA)
        return self.seconds * drawn / 2.718281828 ** (SIGMA**2 / 2)

    async def note_kill(self, _: web.Request) -> web.Response:
        self.killed = time.time()
        return web.Response()

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(asdict(self.counts))


def _completion(body: dict[str, Any], content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"answer {content[:8]}"}
    return {
        "id": content[:12], "object": "chat.completion", "created": 1, "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--at-once", type=int, default=64)
    flags.add_argument("--seconds", type=float, default=0.8)
    args = flags.parse_args()
    strong = Strong(args.at_once, args.seconds)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", strong.chat)
    app.router.add_post("/killed", strong.note_kill)
    app.router.add_get("/stats", strong.stats)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
