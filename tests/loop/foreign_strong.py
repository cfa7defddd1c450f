"""A strong model that none of our code made: a program of its own, of the standard library alone.

It wants an API key, answers some calls by 429 with Retry-After and some by 500, and writes down each call that it saw,
without the key. It has no table of right answers: it guesses the first basket, and says what a draft is sure of.

    FOREIGN_KEY=... python tests/loop/foreign_strong.py calls.jsonl      # prints its port
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GUESS = "edible"
DRAFT = re.compile(r"<draft>\n(.*)\n</draft>", re.DOTALL)
SURE = re.compile(r"\bsurely (\w+)")
BUSY_EVERY, BROKEN_EVERY = 97, 89  # calls


def answer(messages: Sequence[Mapping[str, str]]) -> str:
    draft = DRAFT.search(messages[-1]["content"])
    sure = set(SURE.findall(draft[1])) if draft else set()
    return f"Into the basket: {sure.pop() if len(sure) == 1 else GUESS}."


class Desk(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    numbers = itertools.count(1)
    calls: Path
    lock = threading.Lock()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = next(self.numbers)
        if self.path != "/v1/chat/completions":
            self._say(asked, 404, {"error": {"message": "no such path"}})
        elif self.headers.get("authorization") != f"Bearer {os.environ['FOREIGN_KEY']}":
            self._say(asked, 401, {"error": {"message": "wrong key"}})
        elif number % BUSY_EVERY == 5:
            self._say(asked, 429, {"error": {"message": "too many calls"}}, {"retry-after": "1"})
        elif number % BROKEN_EVERY == 7:
            self._say(asked, 500, {"error": {"message": "out of order"}})
        else:
            self._say(asked, 200, _completion(number, asked))

    def _say(self, asked: Any, status: int, said: Any, headers: Mapping[str, str] | None = None) -> None:
        record = {
            "at": time.monotonic(),
            "key": self.headers.get("idempotency-key"),
            "status": status,
            "asked": asked,
            "said": said,
        }
        with self.lock, self.calls.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        data = json.dumps(said).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _completion(number: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    text = answer(asked["messages"])
    taken_in, given_out = sum(len(m["content"].split()) for m in asked["messages"]), len(text.split())
    return {
        "id": f"c-{number}",
        "object": "chat.completion",
        "created": 1,
        "model": "mycologist-2",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": taken_in,
            "completion_tokens": given_out,
            "total_tokens": taken_in + given_out,
        },
    }


if __name__ == "__main__":
    Desk.calls = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Desk)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
