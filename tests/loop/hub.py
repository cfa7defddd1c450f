"""A stand-in for a model hub: a process of its own that gives out folders by the Hub's HTTP interface.

    python tests/loop/hub.py ROOT --port 0        # ROOT/org/name/<files>; prints its port

`gated.txt` in a repository's folder: terms that nobody has accepted. Every revision but `main` and the commit itself is
unknown. Requests are printed, a line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = re.compile(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/?]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


class Hub(BaseHTTPRequestHandler):
    """`root` is set by `main`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        found = LISTING.match(self.path) or FILE.match(self.path)
        if found is None:
            return self._send(404, b"{}", {}, with_body)
        folder = self.root / found[1]
        if not folder.is_dir():
            return self._send(
                401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body
            )  # as the Hub says it to strangers
        if found[2] not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        if found.re is LISTING:
            return self._send(
                200, json.dumps(_listing(folder, found[1], "/tree/" in self.path)).encode(), {}, with_body
            )
        if (folder / "gated.txt").exists():
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        path = folder / found[3]
        if not path.is_file():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, data, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        print(self.command, self.path, status, flush=True)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `_send` says it."""


def _listing(folder: Path, name: str, as_tree: bool) -> object:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if as_tree:
        return [{"type": "file", "path": each, "size": (folder / each).stat().st_size, "oid": COMMIT} for each in files]
    return {"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [],
            "downloads": 0, "likes": 0, "siblings": [{"rfilename": each} for each in files]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    Hub.root = options.root
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
