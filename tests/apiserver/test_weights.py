"""The whole way of the weights, by the real processes: the operator writes, the sidecar watches, the gateway answers.

The sidecar acts as the account that the operator makes for it; HTTP_PROXY leads to what stands in for the weak models.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cowest_serving.contract import HEADER_ARM, HEADER_MODE, Routing
from cowest_serving.routing import choose_arm, parse_routing
from tests.apiserver.playground import MAPS, NAMESPACE, Playground
from tests.apiserver.rights import asked, of_operators
from tests.apiserver.test_faults import hold_in_canary, says
from tests.apiserver.test_routing_sync import sidecar
from tests.contracts.openai_world import started, stub_model, wait_until_ready
from tests.contracts.test_charts import needs_helm
from tests.ports import free_port

# The audit log says when the operator wrote, for it acts as an account of its own.
pytestmark = [needs_helm, pytest.mark.timeout(600)]
LONGEST = 5.0  # seconds; one is aimed at, on a machine that has nothing else to do
PAUSE = 0.02  # seconds between two questions


@dataclass(frozen=True)
class Answer:
    user: str
    answered: float
    status: int
    arm: str
    mode: str


def ask(url: str, user: str) -> Answer:
    body = json.dumps({"model": "pair", "user": user, "messages": [{"role": "user", "content": "why?"}]}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            status, arm, mode = answer.status, answer.headers[HEADER_ARM], answer.headers[HEADER_MODE]
    except urllib.error.HTTPError as error:
        status, arm, mode = error.code, "", ""
    except OSError:
        status, arm, mode = 0, "", ""
    return Answer(user, time.time(), status, arm, mode)


class Users(threading.Thread):
    """One asks after the other for as long as the block lasts, each only once."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.answers, self._over = url, list[Answer](), threading.Event()

    def __enter__(self) -> Users:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(60)

    def run(self) -> None:
        for number in itertools.count():
            if self._over.wait(PAUSE):
                return
            self.answers.append(ask(self.url, f"user-{number}"))


@contextmanager
def gateway(playground: Playground, folder: Path, weak: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The two containers of the gateway's pod, and its address."""
    folder.mkdir()
    (served,) = (each for each in playground.items(MAPS) if each["metadata"]["name"].startswith("claims-job-"))
    (folder / "job.json").write_text(served["data"]["job.json"])
    port = free_port()
    with (
        sidecar(playground.server, NAMESPACE, folder, "claims-gateway", "claims-routing"),
        started(folder, port, (), (), http_proxy=weak, no_proxy="") as process,
    ):
        wait_until_ready(f"http://127.0.0.1:{port}", process, folder / "gateway.log")
        yield f"http://127.0.0.1:{port}", process


def routing(playground: Playground) -> Routing:
    return parse_routing(playground.get(f"{MAPS}/claims-routing")["data"]["routing.json"].encode())


def weights(of: Routing) -> dict[str, int]:
    return {arm.name: arm.weight_percent for arm in of.arms}


def writes(playground: Playground, since: int) -> list[float]:
    """When the API server was asked by operators to write the routing, in epoch seconds."""
    asked_for = of_operators(asked(playground.server.audit_log, since))
    routings = [r for r in asked_for if r.right[1:] == ("configmaps", "patch") and is_of_routing(r.path)]
    return [datetime.fromisoformat(each.received).timestamp() for each in routings if each.code < 300]


def is_of_routing(path: str) -> bool:
    return urlsplit(path).path.endswith("/claims-routing")


def flip(playground: Playground, users: Users, decide: Callable[[], None], wanted: dict[str, int]) -> float:
    """Seconds from the operator's write to the first answer that only the new weights explain."""
    before, since = routing(playground), playground.server.audit_log.stat().st_size
    known = len(users.answers)
    decide()
    playground.wait(lambda: weights(routing(playground)) == wanted, f"the weights {wanted}", 120)
    after = routing(playground)

    def by_the_new() -> list[Answer]:
        """From the first of them on."""
        seen = users.answers[known:]
        return list(itertools.dropwhile(lambda a: a.arm in ("", choose_arm(before, a.user).name), seen))

    playground.wait(lambda: len(by_the_new()) > 50, "answers by the new weights")
    assert all(answer.arm == choose_arm(after, answer.user).name for answer in by_the_new()), "none by the old ones"
    playground.wait(lambda: len(writes(playground, since)) > 0, "the audit log")
    return by_the_new()[0].answered - writes(playground, since)[0]


def test_new_weights_reach_the_gateway_soon_without_a_restart_and_without_a_failed_request(
    playground: Playground, tmp_path: Path
) -> None:
    with stub_model() as weak, stub_model() as strong, playground.operator():
        hold_in_canary(playground, **{"strong.endpoint": f"{strong.url}/v1"})
        with gateway(playground, tmp_path / "pod", weak.url) as (url, process), Users(url) as users:
            playground.wait(lambda: len(users.answers) > 50, "answers")

            def next_step() -> None:
                playground.script.live_steps, playground.script.live_works = 1, True

            grows = flip(playground, users, next_step, {"stable": 50, "candidate": 50})
            ends = flip(playground, users, lambda: says(playground, "rollback"), {"stable": 100})
            assert process.poll() is None
    print(f"from the write to the first answer: {1000 * grows:.0f} ms at 50 %, {1000 * ends:.0f} ms at the rollback")
    assert {(answer.status, answer.mode) for answer in users.answers} == {(200, "Pair")}
    assert max(grows, ends) < LONGEST
