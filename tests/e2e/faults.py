"""What breaks parts of the cluster for a while, and the book of the faults that ended well: an interrupted run goes on.

The book is a file, `.faults.json` or what `COWEST_E2E_BOOK` names. `make e2e-faults ANEW=1` begins both the book and
the desk anew. Beside it stands how what is broken just now is put back, for a run that is killed in the middle.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import COWEST, JOB, NAMESPACE, ROOT, Desk, kubectl, run, wait_for
from tests.e2e.test_loop import gateway_address

BOOK = Path(os.environ.get("COWEST_E2E_BOOK", ROOT / ".faults.json"))
UNDO = BOOK.with_suffix(".undo.jsonl")  # what is broken now, and how it is put back
AWAY = float(os.environ.get("COWEST_E2E_AWAY", "120"))  # seconds that a part stays away
RATE = 5


# ---------------------------------------------------------------- the book
@dataclass
class Fault:
    """What was seen of one: by those who ask, in the status, and how long it took to heal."""

    name: str
    says: str = ""  # the condition's message while it lasts
    said_after: float | None = None  # seconds since it began
    healed_after: float | None = None  # seconds since its cause was taken away
    answered: int = 0
    failed: int = 0
    commit: str = ""
    begun: float = field(default_factory=time.monotonic)

    def said(self, job: str, *words: str, seconds: float = 120) -> None:
        """Waits until a condition of the job says one of these."""
        wait_for(lambda: any(word in text for text in _messages(job) for word in words), f"{words} of {job}", seconds)
        self.said_after = round(time.monotonic() - self.begun, 1)
        self.says = next(text for text in _messages(job) if any(word in text for word in words))
        print(f"   {self.said_after:6.1f} s  {self.says[:300]}", flush=True)

    def begins(self) -> None:
        self.begun = time.monotonic()

    def heals(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Called as soon as the cause is gone."""
        took = round(wait_for(condition, what, seconds), 1)
        self.healed_after = max(self.healed_after or 0.0, took)
        print(f"   healed after {took:.1f} s: {what}", flush=True)

    @contextmanager
    def users(self, desk: Desk) -> Iterator[None]:
        """People who ask all through the block; what they got is counted after it. The job stays Ready."""
        before = desk.condition("Ready")
        with traffic(desk) as counted:
            yield
        after = desk.condition("Ready")
        kept = (after["status"], after["lastTransitionTime"]) == ("True", before["lastTransitionTime"])
        assert kept, f"it did not stay Ready: {before}, {after}"
        self.answered += counted.answered
        self.failed += counted.failed
        print(f"   {counted.answered} answers, {counted.failed} failed", flush=True)

    def nobody_noticed(self) -> None:
        assert self.answered and not self.failed, f"{self.failed} requests failed, {self.answered} were answered"


def _messages(job: str) -> list[str]:
    text = kubectl("get", "collaborationjob", job, "-o", "json", check=False)
    found = (json.loads(text).get("status") or {}).get("conditions", []) if text else []
    return [str(condition["message"]) for condition in found]


def book() -> dict[str, dict[str, Any]]:
    return dict(json.loads(BOOK.read_text("utf-8"))) if BOOK.exists() else {}


def note(fault: Fault) -> None:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    row = {name: value for name, value in asdict(fault).items() if name not in ("name", "begun")}
    BOOK.write_text(json.dumps({**book(), fault.name: {**row, "commit": described.stdout.strip()}}, indent=1) + "\n")


def table() -> list[str]:
    """Of all faults in the book, in Markdown."""
    rows = ["| fault | answers | failed | said after | healed after |", "|---|---|---|---|---|"]
    for name, row in book().items():
        shown = (_seconds(row[key]) for key in ("said_after", "healed_after"))
        title = name.removeprefix("test_").replace("_", " ")
        rows.append(f"| {title} | {row['answered']} | {row['failed']} | {' | '.join(shown)} |")
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"


# ---------------------------------------------------------------- those who ask
@dataclass
class Counted:
    failed: int = 0
    answered: int = 0


@contextmanager
def traffic(desk: Desk) -> Iterator[Counted]:
    """Questions all through the block; the counts are there after it."""
    data, url = desk.folder / "data" / "live.jsonl", f"http://{gateway_address()}/v1"
    command = [*COWEST, "send", "--data", str(data), "--url", url, "--rate", str(RATE), "--repeat", "-o", "json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    counted = Counted()
    try:
        yield counted
    finally:
        child.terminate()
        said = child.communicate(timeout=150)[0].strip().splitlines()
        counts: dict[str, int] = json.loads(said[-1]) if said else {}
        counted.failed = sum(n for name, n in counts.items() if name.startswith(("status", "failed")))
        counted.answered = sum(n for name, n in counts.items() if name.startswith("answered"))


# ---------------------------------------------------------------- what is broken, and mended at the end of the block
@contextmanager
def undone_by(*command: str, stdin: str | None = None) -> Iterator[None]:
    """Runs the command at the end of the block; noted before, so that the next run mends what one was cut off from."""
    note = json.dumps({"command": command, "stdin": stdin})
    UNDO.write_text(_noted() + note + "\n", "utf-8")
    try:
        yield
    finally:
        run(*command, stdin=stdin)
        UNDO.write_text(_noted().replace(note + "\n", "", 1), "utf-8")


def mend() -> None:
    """Put back what a run before was cut off from putting back, the last first; what is gone by now is no fault."""
    for line in reversed(_noted().splitlines()):
        told = json.loads(line)
        print(f"left by a run that was cut off: {' '.join(told['command'])}", flush=True)
        run(*told["command"], stdin=told["stdin"], check=False)
    UNDO.unlink(missing_ok=True)


def _noted() -> str:
    return UNDO.read_text("utf-8") if UNDO.exists() else ""


@contextmanager
def scaled_away(namespace: str, name: str, replicas: int = 1) -> Iterator[None]:
    """No pod of it is left."""
    where = ("kubectl", "-n", namespace)
    selector = json.loads(run(*where, "get", f"deployment/{name}", "-o", "json"))["spec"]["selector"]["matchLabels"]
    labels = ",".join(f"{key}={value}" for key, value in selector.items())
    try:
        with undone_by(*where, "scale", f"deployment/{name}", f"--replicas={replicas}"):
            run(*where, "scale", f"deployment/{name}", "--replicas=0")
            run(*where, "wait", "pod", "-l", labels, "--for=delete", "--timeout=90s", check=False)
            yield
    finally:
        run(*where, "rollout", "status", f"deployment/{name}", "--timeout=180s")


@contextmanager
def there(*objects: Mapping[str, Any]) -> Iterator[None]:
    """Objects of the cluster, for as long as the block lasts."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [dict(each) for each in objects]})
    with undone_by("kubectl", "delete", "--ignore-not-found", "-f", "-", stdin=text):
        run("kubectl", "apply", "-f", "-", stdin=text)
        yield


def refusing(group: str, kind: str, words: str) -> tuple[dict[str, Any], ...]:
    """A policy of the cluster that refuses new objects of a kind in the desk's namespace."""
    head, name = "admissionregistration.k8s.io/v1", f"cowest-e2e-{kind}"
    rule = {"apiGroups": [group], "apiVersions": ["*"], "resources": [kind], "operations": ["CREATE"]}
    policy = {"apiVersion": head, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name},
              "spec": {"matchConstraints": {"resourceRules": [rule]}, "failurePolicy": "Fail",
                       "validations": [{"expression": "false", "message": words}]}}  # fmt: skip
    binding = {"apiVersion": head, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name},
               "spec": {"policyName": name, "validationActions": ["Deny"],
                        "matchResources": {"namespaceSelector": _here()}}}  # fmt: skip
    return policy, binding


def asking_nobody(group: str, kind: str) -> dict[str, Any]:
    """A webhook for a kind whose server is away."""
    rule = {"apiGroups": [group], "apiVersions": ["*"], "resources": [kind], "operations": ["CREATE", "UPDATE"]}
    hook = {"name": "away.e2e.cowest.dev", "rules": [rule], "failurePolicy": "Fail", "sideEffects": "None",
            "admissionReviewVersions": ["v1"], "namespaceSelector": _here(), "timeoutSeconds": 5,
            "clientConfig": {"service": {"namespace": NAMESPACE, "name": "nobody", "path": "/"}}}  # fmt: skip
    return {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": f"cowest-e2e-{kind}"}, "webhooks": [hook]}  # fmt: skip


def _here() -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}


def edit(spec: Mapping[str, Any], job: str = JOB) -> None:
    """A merge patch of the manifest."""
    run(*_patch(spec, job))


def _patch(spec: Mapping[str, Any], job: str = JOB) -> tuple[str, ...]:
    told = json.dumps({"spec": spec})
    return "kubectl", "--namespace", NAMESPACE, "patch", "collaborationjob", job, "--type=merge", "-p", told


@contextmanager
def edited(spec: Mapping[str, Any], back: Mapping[str, Any]) -> Iterator[None]:
    with undone_by(*_patch(back)):
        edit(spec)
        yield
