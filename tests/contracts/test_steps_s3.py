"""The steps with S3 in and out, against real server processes: nothing of a step may need a shared disk.

SeaweedFS comes with `make setup`; MinIO is `minio` on PATH, or COWEST_TEST_MINIO, and reported as not run without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from cowest_serving import store, traces
from cowest_serving.contract import dump
from cowest_training import steps
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_MISSING,
    EXIT_OK,
    EXIT_RETRY,
    Manifest,
    StepSettings,
    load_live_report,
)
from cowest_training.data import read_rows
from tests import world
from tests.contracts.test_store_s3 import endpoint, s3
from tests.loop.tiny_models import make_model

__all__ = ["endpoint", "s3"]  # fixtures

NOW = datetime.now(UTC)


class Desk:
    """A job whose data, model, records and artifacts lie in the object store; only the manifest is a local file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.root = folder, f"s3://models/{name}"
        self.put("data/train.jsonl", *({"id": f"t{i}", "query": f"train {i}?", "reference": "1"} for i in range(3)))
        self.put(
            "data/held_out.jsonl", *({"id": f"h{i}", "query": f"held out {i}?", "reference": "1"} for i in range(2))
        )
        known = [f"{name} {i}?" for name in ("train", "held out", "question") for i in range(4)]
        store.upload(make_model(folder / "weak", known, max_position_embeddings=2048), self.uri("weak"))
        spec = dump(
            StepSettings(
                world.SPEC.strong, world.SPEC.collaboration, world.SPEC.data, world.SPEC.feedback, world.SPEC.training
            )
        )
        spec["data"] = {"train": self.uri("data/train.jsonl"), "heldOut": self.uri("data/held_out.jsonl")}
        spec["weak"] = {"model": self.uri("weak")}
        (folder / "job.json").write_text(json.dumps({"kind": "CollaborationJob", "spec": spec}))

    def uri(self, name: str) -> str:
        return store.join(self.root, name)

    def put(self, name: str, *rows: Mapping[str, Any]) -> None:
        store.put(self.uri(name), "\n".join(map(json.dumps, rows)).encode())

    def record(self, lane: str, schema: Any, *rows: Mapping[str, Any]) -> None:
        name = f"{NOW:%Y-%m-%d}/{NOW:%H%M%S}-gateway-0.parquet"
        table = traces.table_of([orjson.dumps(row) for row in rows], schema)
        store.put(self.uri(f"{lane}/{name}"), traces.segment(table))

    def run(self, step: str, out: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        """In an empty folder, as in a pod whose file system is read-only."""
        command = [sys.executable, "-P", "-m", f"cowest_training.{step}", "--job", str(self.folder / "job.json")]
        command += ["--out", self.uri(out), *more]
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=scratch, timeout=120, env={**os.environ, **env}
        )

    def manifest(self, out: str) -> Manifest:
        manifest = steps.read_manifest(self.uri(out))
        assert manifest is not None
        return manifest


@pytest.fixture
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Desk:
    return Desk(tmp_path, f"steps/{request.node.name}")


def trace(number: int, query: str, **more: Any) -> dict[str, Any]:
    messages = json.dumps([{"role": "user", "content": query}])
    asked = {"query": query, "messages": messages, "answer": "1", "user_hash": f"u{number}"}
    return {"trace_id": f"a{number}", "time": NOW, "status": "ok", "shadow": False, **asked, **more}


def word(number: int, reference: str) -> dict[str, Any]:
    return {"feedback_id": f"f{number}", "trace_id": f"a{number}", "time": NOW, "reference": reference}


def collected(desk: Desk) -> subprocess.CompletedProcess[str]:
    data = ("--train", desk.uri("data/train.jsonl"), "--held-out", desk.uri("data/held_out.jsonl"))
    return desk.run("collect", "runs/r1/collect", *data, "--store", desk.root, "--round", "1")


def test_check_reads_and_writes_s3_and_sees_every_change(desk: Desk) -> None:
    first = desk.run("check", "runs/r0/check")
    assert first.returncode == EXIT_OK, first.stderr
    manifest = desk.manifest("runs/r0/check")
    assert (manifest.kind, manifest.metrics["rows"], manifest.metrics["held_out"]) == ("Check", 3, 2)
    assert desk.run("check", "runs/r0/check").stderr == "", "nothing is done again"
    desk.put("weak/model.safetensors", {"other": 1})
    assert desk.run("check", "runs/r0/check").returncode == EXIT_OK
    assert desk.manifest("runs/r0/check").inputs_digest != manifest.inputs_digest
    assert not list((desk.folder / "scratch").iterdir())


def test_check_refuses_what_the_small_files_of_a_model_say_by_its_address(desk: Desk) -> None:
    desk.put("weak/config.json", {"model_type": "strange"})
    ended = desk.run("check", "runs/r0/check")
    assert ended.returncode == EXIT_BAD_INPUT and "Traceback" not in ended.stderr
    assert f"spec.weak.model: {desk.uri('weak')}: wanted a causal LM" in ended.stderr
    assert not list((desk.folder / "scratch").iterdir())


def test_check_says_all_that_is_not_there_yet_and_what_brings_it_and_is_done_once_it_came(desk: Desk) -> None:
    rows, held_out, weak = (desk.uri(name) for name in ("data/train.jsonl", "data/held_out.jsonl", "weak"))
    kept = {uri: store.get(uri) for uri in (rows, held_out, *store.list_files(weak))}
    for uri in kept:
        store.delete(uri)
    ended = desk.run("check", "runs/r0/check")
    assert ended.returncode == EXIT_MISSING
    assert ended.stderr == (
        f"Not in the store yet: spec.data.train ({rows}); spec.data.heldOut ({held_out}); spec.weak.model ({weak})."
        f" Bring them with `cowest upload FILE {rows}` and `cowest upload FILE {held_out}` and"
        f" `cowest upload FOLDER {weak}`. It is looked at again by itself.\n"
    )
    for uri, data in kept.items():
        store.put(uri, data)
    assert desk.run("check", "runs/r0/check").returncode == EXIT_OK


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_a_model_of_which_a_part_is_there_is_still_being_brought(desk: Desk, gone: str) -> None:
    store.delete(desk.uri(f"weak/{gone}"))
    ended = desk.run("check", "runs/r0/check")
    assert ended.returncode == EXIT_MISSING
    assert f"in {desk.uri('weak')}, saw " in ended.stderr and "wait for the end of its upload." in ended.stderr


def test_check_asks_for_a_bucket_that_is_not_there_yet(desk: Desk) -> None:
    desk.root = "s3://not-made-yet/desk"
    ended = desk.run("check", "runs/r0/check")
    assert ended.returncode == EXIT_MISSING
    assert ended.stderr == ("The store has no bucket not-made-yet yet: make it. It is looked at again by itself.\n"), (
        "its data are in another one"
    )


def test_collect_joins_rows_and_traces_of_s3(desk: Desk) -> None:
    desk.record("traces", traces.TRACE_SCHEMA, trace(1, "a new question"), trace(2, "held out 1?"))
    desk.record("feedback", traces.FEEDBACK_SCHEMA, word(1, "42"), word(2, "42"))
    ended = collected(desk)
    assert ended.returncode == EXIT_OK, ended.stderr
    rows = read_rows(desk.uri("runs/r1/collect/dataset.jsonl"))
    assert [row.reference for row in rows] == ["1", "1", "1", "42"]
    assert desk.manifest("runs/r1/collect").metrics["excluded"] == {"HeldOut": 1}
    assert collected(desk).stderr == "", "nothing is done again"


def test_a_store_that_is_away_asks_for_another_run(desk: Desk) -> None:
    ended = desk.run("check", "runs/r0/check", COWEST_S3_ENDPOINT="http://127.0.0.1:9")
    assert ended.returncode == EXIT_RETRY
    assert "check COWEST_S3_ENDPOINT and that the store is up" in ended.stderr.splitlines()[-1]


def test_score_live_writes_its_report_to_s3(desk: Desk) -> None:
    candidate = world.pair("candidate")
    (desk.folder / "pair.json").write_text(json.dumps(dump(candidate)))
    arms = {"arm": "candidate", "pair_digest": candidate.digest}, {"arm": "control"}
    desk.record("traces", traces.TRACE_SCHEMA, *(trace(i, f"question {i}", **arm) for i, arm in enumerate(arms)))
    desk.record("feedback", traces.FEEDBACK_SCHEMA, word(0, "1"), word(1, "2"))
    since = (NOW - timedelta(minutes=1)).timestamp()
    ended = desk.run(
        "score_live", "runs/r1/live-0.json", "--store", desk.root, "--candidate", str(desk.folder / "pair.json"),
        "--control", "solo", "--step", "0", "--since", repr(since), "--calls", str(desk.folder / "calls"), "--once",
    )  # fmt: skip
    assert ended.returncode == EXIT_OK, ended.stderr
    report = load_live_report(json.loads(store.get(desk.uri("runs/r1/live-0.json"))))
    assert {arm.name: arm.score for arm in report.arms} == {"candidate": 1.0, "control": 0.0}


def test_erase_takes_the_job_and_leaves_its_neighbour(desk: Desk) -> None:
    desk.record("traces", traces.TRACE_SCHEMA, trace(1, "a question"))
    assert collected(desk).returncode == EXIT_OK
    store.put(desk.root + "-2/runs/r0/x", b"")
    for _ in range(2):
        ended = desk.run("erase", "", "--store", desk.root, "--what", "all")
        assert ended.returncode == EXIT_OK, ended.stderr
    left = store.list_files(desk.root)
    assert {file.removeprefix(desk.root + "/").partition("/")[0] for file in left} == {"data", "weak"}
    assert store.exists(desk.root + "-2/runs/r0/x")
    store.put("s3://models/runs/r0/x", b"")
    ended = desk.run("erase", "", "--store", "s3://models", "--what", "all")
    assert ended.returncode == EXIT_BAD_INPUT and "saw a whole store" in ended.stderr
    assert store.exists("s3://models/runs/r0/x")


def begin(uri: str, parts: str = "", **inputs: Any) -> steps.Output:
    output = steps.open_output(uri, step="feedback", inputs=inputs, parts=parts)
    assert isinstance(output, steps.Output)
    return output


def test_parts_stay_until_the_whole_is_there_and_then_go(desk: Desk) -> None:
    """A kill while merging must not take the shards."""
    whole, part = desk.uri("runs/r1/feedback"), desk.uri("runs/r1/feedback/shard-0-of-1")
    store.put(desk.uri("runs/r1/feedback/of-a-kill.json"), b"")
    shard = begin(part, shard="0/1")
    (shard.folder / "ledger").write_text("x")
    shard.finish(kind="FeedbackShard", metrics={})
    output = begin(whole, parts="shard-*")
    assert steps.read_manifest(part) is not None
    assert not store.exists(desk.uri("runs/r1/feedback/of-a-kill.json"))
    (output.folder / "ledger").write_text("x")
    output.finish(kind="Feedback", metrics={})
    assert store.list_files(whole) == [f"{whole}/ledger", f"{whole}/manifest.json"]
