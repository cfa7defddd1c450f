"""`cowest ledger` of a job whose store is an object store, by its address alone, against real S3 servers."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import pyarrow.parquet as pq

from cowest_serving import store
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK
from tests.contracts.test_store_s3 import endpoint, s3
from tests.loop import ledger_world as world
from tests.loop.test_cli_verbs import cowest

__all__ = ["cowest", "endpoint", "s3"]  # fixtures

ROOT = "s3://models/desks/claims"


def test_a_store_in_s3_is_read_and_written_by_its_address(cowest: Any) -> None:
    world.write_round(ROOT)
    targets = ("--dataset", "s3://models/out/pairs", "--parquet", "s3://models/out/ledger.parquet")
    said = cowest("ledger", "--store", ROOT, "-o", "json", *targets)
    assert said.code == EXIT_OK, said.err
    seen = json.loads(said.out)
    assert [query["query_id"] for query in seen["queries"]] == ["q1", "q3", "q2"]
    assert [(each["uri"], each["rows"]) for each in seen["written"]] == [(targets[3], 7), (targets[1], 2)]
    pairs = pq.read_table(BytesIO(store.get(store.join(targets[1], "data/train-00000-of-00001.parquet"))))
    assert pairs["query_id"].to_pylist() == ["q1", "q2"]
    assert store.exists(store.join(targets[1], "README.md"))
    said = cowest("ledger", "--store", ROOT, *targets)
    assert said.code == EXIT_BAD_INPUT and "wanted a place with nothing there" in said.err


def test_a_store_without_a_ledger_says_so(cowest: Any) -> None:
    said = cowest("ledger", "--store", "s3://models/desks/other")
    assert said.code == EXIT_BAD_INPUT and "saw none yet" in said.err
