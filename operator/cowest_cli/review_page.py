"""The page of `cowest review`: one question at a time, on this machine alone, answered by keys."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cowest_cli.review_queue import SAID, Session
from cowest_training.contract import StepError

HOST = "127.0.0.1"
MOST_BYTES = 4096  # of what a page sends


class Server(ThreadingHTTPServer):
    """Listens on loopback only; each request has to show the token that stands in the address."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.token, self.lock = session, secrets.token_urlsafe(24), threading.Lock()
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "cowest", ""

    def do_GET(self) -> None:
        if self._is_let_in():
            path = urlsplit(self.path).path
            if path == "/":
                self._page()
            elif path == "/next":
                with self.server.lock:
                    self._json(self._next())
            else:
                self._json({"error": "there is no such page"}, HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_let_in():
            return
        path, said = urlsplit(self.path).path, self._body()
        with self.server.lock:
            if path == "/back":
                self.server.session.back()
                self._json(self._next())
            elif path == "/label" and said is not None and said.get("said") in SAID:
                self._say(str(said.get("id")), str(said["said"]))
            else:
                wanted = f'wanted /label {{"id", "said": one of {", ".join(SAID)}}} or /back'
                self._json({"error": wanted}, HTTPStatus.BAD_REQUEST)

    def _say(self, id_: str, said: str) -> None:
        try:
            known = self.server.session.say(id_, said)
        except StepError as error:
            self._json({"error": str(error)}, HTTPStatus.INSUFFICIENT_STORAGE)
            return
        if known:
            self._json(self._next())
        else:
            self._json({"error": "there is no such question"}, HTTPStatus.NOT_FOUND)

    def _next(self) -> Mapping[str, Any]:
        session = self.server.session
        question = session.next()
        return {"left": session.left, "question": question.shown() if question else None}

    def _is_let_in(self) -> bool:
        """By the token, and by the name of this machine: another name may be somebody else's page."""
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        own = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if hmac.compare_digest(given.encode(), self.server.token.encode()) and self.headers.get("host") in own:
            return True
        self._json({"error": "wanted the address that `cowest review` printed, with its token"}, HTTPStatus.FORBIDDEN)
        return False

    def _body(self) -> Any:
        length = self.headers.get("content-length", "")
        data = self.rfile.read(min(int(length), 2 * MOST_BYTES)) if length.isdecimal() else b""
        try:
            said = json.loads(data) if len(data) <= MOST_BYTES else None
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    def _json(self, value: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, "default-src 'none'")

    def _page(self) -> None:
        once = secrets.token_urlsafe(16)
        rules = f"default-src 'none'; script-src 'nonce-{once}'; style-src 'nonce-{once}'; connect-src 'self'"
        page = _PAGE.replace("NONCE", once).encode()
        self._send(page, "text/html; charset=utf-8", HTTPStatus.OK, f"{rules}; base-uri 'none'; form-action 'none'")

    def _send(self, data: bytes, kind: str, status: HTTPStatus, rules: str) -> None:
        self.send_response(status)
        for name, value in (
            ("content-type", kind),
            ("content-length", str(len(data))),
            ("content-security-policy", f"{rules}; frame-ancestors 'none'"),
            ("cache-control", "no-store"),
            ("referrer-policy", "no-referrer"),
            ("x-content-type-options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address has the token in it."""


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>CoWest review</title><style nonce="NONCE">
:root{--ink:#1b1f24;--soft:#5b6570;--line:#d7dce1;--page:#fff;--key:#eef1f4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#39424c;--page:#14181d;--key:#232a31}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:76rem;margin:1.5rem auto;
padding:0 1rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}
.soft{color:var(--soft)}.part{border:1px solid var(--line);border-radius:.4rem;padding:.7rem .9rem;margin:.6rem 0}
#answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:.8rem}
button{font:inherit;color:inherit;background:var(--key);border:1px solid var(--line);border-radius:.4rem;
padding:.35rem .8rem;margin:0 .3rem .3rem 0;cursor:pointer}
h2{font-size:.85rem;font-weight:600;color:var(--soft);margin:0 0 .2rem}
</style><body><p class="soft" id="left" role="status"></p><main id="asked"></main><div id="answers"></div>
<p id="keys"></p><p class="soft" id="said" role="alert"></p>
<script nonce="NONCE">
"use strict";
const token = new URLSearchParams(location.search).get("token");
const $ = (id) => document.getElementById(id);
const WORDS = {
  2: {left: "\\u2190 left is better", tie: "T equally good", right: "\\u2192 right is better"},
  1: {left: "\\u2190 wrong", tie: "T right in part", right: "\\u2192 right"},
};
const KEYS = {arrowleft: "left", arrowright: "right", t: "tie", s: "skip"};  // up and down scroll
let question = null, busy = false;

function part(title, text) {
  const [box, head, body] = ["section", "h2", "pre"].map((name) => document.createElement(name));
  box.className = "part"; head.textContent = title; body.textContent = text; box.append(head, body);
  return box;
}
function button(text, act) {
  const made = document.createElement("button");
  made.textContent = text; made.addEventListener("click", act);
  return made;
}
function show(state) {
  question = state.question;
  $("left").textContent = state.left + " left";
  for (const id of ["asked", "answers", "keys"]) $(id).replaceChildren();
  if (!question) {
    $("asked").append(part("done", "All questions are answered. Ctrl-C in the terminal ends the review."));
    $("keys").append(button("\\u232b back", () => send("/back")));
    return;
  }
  for (const message of question.messages) $("asked").append(part(message.role, message.text));
  if (question.reference) $("asked").append(part("the right answer", question.reference));
  question.answers.forEach((text, i) => $("answers").append(
    part(question.answers.length > 1 ? ["left", "right"][i] : "answer", text)));
  const words = WORDS[question.answers.length];
  for (const said of ["left", "tie", "right"]) $("keys").append(button(words[said], () => say(said)));
  $("keys").append(button("S skip", () => say("skip")), button("\\u232b back", () => send("/back")));
  scrollTo(0, 0);
}
async function send(path, body) {
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch(path + "?token=" + encodeURIComponent(token),
      body === undefined && path === "/next" ? {} : {method: "POST", body: JSON.stringify(body ?? {})});
    const state = await answer.json();
    $("said").textContent = state.error ?? "";
    if (answer.ok) show(state);
  } catch (error) {
    $("said").textContent = "The review does not answer: is `cowest review` still running?";
  } finally { busy = false; }
}
const say = (said) => question && send("/label", {id: question.id, said});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "Backspace") { event.preventDefault(); send("/back"); return; }
  const said = KEYS[event.key.toLowerCase()];
  if (said) { event.preventDefault(); say(said); }
});
send("/next");
</script></body></html>
"""
