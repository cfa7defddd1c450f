"""A real API server takes the CRD and the examples, and agrees with our own validator about what is wrong.

Our validator is what people meet without a cluster; where the two differ, a manifest that ran on one machine would be
refused by a cluster, or the other way round.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cowest_operator import manifest
from cowest_operator.manifest import ManifestError
from cowest_operator.schema import UNKNOWN, Schema
from tests.apiserver.conftest import CRDS, JOBS, ApiServer, wait_until
from tests.manifests import BROKEN, VALID, Broken, edited, smallest

DRY = "?fieldValidation=Strict&dryRun=All"
EXAMPLES = sorted((Path(__file__).parents[2] / "crds" / "examples").rglob("*.yaml"))


def ours(job: Mapping[str, Any]) -> manifest.Loaded | ManifestError:
    try:
        return manifest.loads(yaml.safe_dump(dict(job)))
    except ManifestError as error:
        return error


def dotted(field: str) -> str:
    """As we write it: of an entry of a map the API server says `requests[cpu]`."""
    return re.sub(r"\[(\D[^]]*)\]", r".\1", field.removeprefix("<nil>"))


def test_the_crd_is_accepted_without_warnings_or_conditions_against_it(server: ApiServer) -> None:
    def conditions_of() -> dict[str, str]:
        _, crd = server.request("GET", f"{CRDS}/collaborationjobs.cowest.dev")
        return {each["type"]: each["status"] for each in crd["status"]["conditions"]}

    wait_until(lambda: conditions_of().get("Established") == "True", "the CRD to be established")  # served before that
    conditions = conditions_of()
    assert conditions["NamesAccepted"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("edits", VALID.values(), ids=VALID.keys())
def test_a_valid_manifest_gets_the_same_defaults_from_both(server: ApiServer, edits: Mapping[str, Any]) -> None:
    job = edited(edits)
    loaded = ours(job)
    assert isinstance(loaded, manifest.Loaded), loaded
    status, answer = server.request("POST", JOBS + DRY, job)
    assert status == 201, answer
    assert answer["spec"] == loaded.job["spec"]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_broken_manifest_is_refused_by_both_at_the_same_field(server: ApiServer, case: Broken) -> None:
    error = ours(edited(case.edits))
    assert isinstance(error, ManifestError)
    (problem,) = error.problems
    status, answer = server.request("POST", JOBS + DRY, edited(case.edits))
    if status == 400:  # the strict decoder comes before the schema
        assert f'unknown field "{problem.field}' in answer["message"]
        return
    assert problem.reason != UNKNOWN
    assert status == 422, answer
    causes = [(dotted(cause["field"]), cause["message"]) for cause in answer["details"]["causes"]]
    assert problem.field in [field for field, _ in causes], causes
    if not problem.remedy and problem.reason.split()[0] in ("must", "type", "prompts", "choices", "model", "heldOut"):
        assert any(problem.reason in message for field, message in causes if field == problem.field), causes
    if problem.reason.startswith(("must be a Kubernetes quantity", "must be the value of a label")):
        assert any(f"; saw {problem.seen.strip(chr(39))}" in message for _, message in causes), causes


def test_the_place_of_an_object_store_cannot_change(server: ApiServer) -> None:
    job = edited({"objectStore.bucket": "models", "/metadata.name": "moving"})
    status, created = server.request("POST", JOBS, job)
    assert status == 201, created
    created["spec"]["objectStore"]["bucket"] = "other"
    status, answer = server.request("PUT", f"{JOBS}/moving", created)
    assert status == 422 and "bucket and prefix cannot change" in answer["message"]
    note = {"spec": {"objectStore": None}}
    status, answer = server.request("PATCH", f"{JOBS}/moving", note)
    assert status == 422 and "cannot be taken out" in answer["message"], "and then put in again for another place"
    created["spec"]["objectStore"]["bucket"] = "models"
    created["spec"]["rounds"]["max"] = 9
    status, answer = server.request("PUT", f"{JOBS}/moving", created)
    assert status == 200 and answer["metadata"]["generation"] == 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_an_example_is_taken(server: ApiServer, path: Path) -> None:
    jobs = [each for each in yaml.safe_load_all(path.read_text("utf-8")) if each and each["kind"] == manifest.KIND]
    assert jobs and manifest.load(path)
    for job in jobs:
        status, answer = server.request("POST", JOBS + DRY, job)
        assert status == 201, answer


STATUS: Mapping[str, Any] = {
    "observedGeneration": 1,
    "conditions": [
        {
            "type": "Ready",
            "status": "True",
            "reason": "Answering",
            "message": "The gateway answers by the strong model alone.",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-11-23T10:00:00Z",
        }
    ],
    "stable": {"digest": "sha256:" + "0" * 64, "round": 1, "serving": "Pair", "strongModel": "m"},
    "candidate": {"digest": "sha256:" + "1" * 64, "origin": "Round", "stage": "Canary", "round": 2},
    "traffic": {"candidatePercent": 10, "step": 0},
    "rounds": [{"number": 1, "decision": "Promoted", "reason": "BetterOfflineAndLive", "pValue": "0.003", "pairs": 80}],
    "traces": {"all": 10, "usable": 8, "reason": "2 have no reference."},
    "budget": {"calls": 100, "tokens": 20000, "money": "0.31"},
}


def test_status_is_kept_beside_the_spec_and_shown_in_columns(server: ApiServer) -> None:
    status, created = server.request("POST", JOBS, edited({"/metadata.name": "shown"}))
    assert status == 201, created
    status, answer = server.request("PUT", f"{JOBS}/shown/status", {**created, "status": STATUS})
    assert status == 200 and answer["status"] == STATUS
    assert answer["metadata"]["generation"] == 1, "a status write is no new generation"
    table = server.request("GET", f"{JOBS}/shown", accept="application/json;as=Table;v=v1;g=meta.k8s.io")[1]
    shown = dict(zip((each["name"] for each in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
    assert (shown["Ready"], shown["Candidate %"], shown["Round"]) == ("True", 10, 1)


def test_a_status_of_a_wrong_shape_is_refused(server: ApiServer) -> None:
    created = server.request("POST", JOBS, edited({"/metadata.name": "wrong"}))[1]
    twice = {"conditions": [STATUS["conditions"][0]] * 2}
    status, answer = server.request("PUT", f"{JOBS}/wrong/status", {**created, "status": twice})
    assert status == 422 and "Duplicate value" in answer["message"]


# ---------------------------------------------------------------- any edit at all
ODD: tuple[Any, ...] = (None, True, 0, -1, 1, 2, 99, 10**7, 0.5, "", "0", "0.5", "1.5", "100", "x", "Auto", "Judge", "http://a.b/v1",
       "https://a.b/v1", "file://x", "s3://bucket/x", "{query}", "{query}{draft}", [], {},
       ["a", "b"], {"name": "a"})  # fmt: skip


def _fields(schema: Schema, path: str) -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}{name}"
        yield from _fields(inner, f"{path}{name}.")


def test_both_agree_about_edits_drawn_at_random(server: ApiServer) -> None:
    """300 manifests with one to three fields set to odd values (seeded): accepted by both or refused by both."""
    draw = random.Random(20261123)
    fields = [path for path in _fields(manifest.field_schema("spec"), "") if "podTemplate" not in path]
    base = edited({"objectStore.bucket": "models"}, smallest())
    verdicts = set()
    for _ in range(300):
        try:
            job = edited({draw.choice(fields): draw.choice(ODD) for _ in range(draw.randint(1, 3))}, base)
        except (TypeError, AttributeError):  # one edit put a scalar where another goes deeper
            continue
        loaded = ours(job)
        status, answer = server.request("POST", JOBS + DRY, job)
        taken = isinstance(loaded, manifest.Loaded)
        assert taken == (status == 201), f"{job['spec']}\nours: {loaded}\nthe server's: {answer}"
        if isinstance(loaded, manifest.Loaded):
            assert answer["spec"] == loaded.job["spec"]
        verdicts.add(taken)
    assert verdicts == {True, False}, "the draw must hold both kinds"
