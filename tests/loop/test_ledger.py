"""`cowest ledger` over rounds as the feedback step leaves them, and what other tools read of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cowest_cli import jobs
from cowest_cli.ledger_table import COLUMNS
from cowest_operator import api
from cowest_serving.book import read_prices
from cowest_serving.models import HttpChatModel
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_OK
from cowest_training.paid_calls import PaidCalls
from cowest_training.steps import file_sha256
from tests.fakes import ScriptedModel
from tests.loop import ledger_world as world
from tests.loop.test_cli_verbs import NASTY, Said, cowest

__all__ = ["cowest"]  # a fixture

DRUM = ("explain what is a drum?", "draft 1 of q1", "draft 0 of q1")


@pytest.fixture
def place(tmp_path: Path) -> jobs.Home:
    """A job of two rounds, whose second drew one query more."""
    home = jobs.Home(tmp_path / "home")
    jobs.write_status(home, api.Status())
    prices = {"inputPerMillionTokens": "1000", "outputPerMillionTokens": "0", "currency": "EUR"}
    jobs.write_json(home.job, {"spec": {"strong": {"prices": prices}}})
    world.write_round(home.store.as_uri(), 1)
    world.write_round(home.store.as_uri(), 2, [*world.entries("q9", 0.0, 1.0, 0.0), *world.ROUND])
    return home


def told(cowest: Any, place: jobs.Home, *flags: object) -> Any:
    said = cowest("ledger", "--home", place.root, "-o", "json", *flags)
    assert said.code == EXIT_OK, said.err
    return json.loads(said.out)


def refused(said: Said) -> str:
    assert said.code == EXIT_BAD_INPUT and not said.out
    return said.err


# ---------------------------------------------------------------- shown
def test_each_round_has_a_line_and_each_query_its_best_and_worst_draft(cowest: Any, place: jobs.Home) -> None:
    said = cowest("ledger", "--home", place.root, "--round", 1)
    assert said.code == EXIT_OK, said.err
    head, names, *lines = said.out.splitlines()
    assert head.startswith("Round 1 (BestVersusWorst): 3 queries, 2 of them usable (2 pairs); 7 drafts, 6 distinct;")
    assert "mean gain +0.100, 14.3 % hurt; 9 calls, price not at hand." in head
    assert names.split()[:4] == ["round", "query", "id", "query"]
    assert [line.split()[1] for line in lines] == ["q1", "q3", "q2"], "the best gain first"
    assert "draft 1 of q1" in lines[0] and "draft 0 of q1" in lines[0] and "+1.00" in lines[0]
    assert lines[1].count("same") == 1, "equal drafts have no worst"


def test_the_drafts_of_a_query_are_shown_with_what_was_answered_and_their_role(cowest: Any, place: jobs.Home) -> None:
    lines = cowest("ledger", "--home", place.root, "--round", 1, "--query", "q1", "--drafts").out.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["rejected", "chosen", "+0.20"]
    assert all("answer to draft" in line and "solo q1" in line for line in lines[2:])


def test_only_so_many_queries_are_shown_and_the_rest_is_said(cowest: Any, place: jobs.Home) -> None:
    said = cowest("ledger", "--home", place.root, "--limit", 2)
    assert said.out.splitlines()[-1] == "2 of 7 queries are shown; --limit 0 shows all."
    assert len(told(cowest, place)["queries"]) == 7, "a program gets all"


def test_what_a_model_wrote_does_not_steer_a_terminal(cowest: Any, tmp_path: Path) -> None:
    home = jobs.Home(tmp_path / "home")
    jobs.write_status(home, api.Status())
    world.write_round(home.store.as_uri(), 1, world.entries("q1", 0.0, 1.0, 0.0, drafts=(NASTY, "x"), query=NASTY))
    assert "gone [/red]" in cowest("ledger", "--home", home.root).out


def test_the_filters_are_told_apart_as_json(cowest: Any, place: jobs.Home) -> None:
    seen = told(cowest, place, "--usable", "--min-gain", "0.5")
    assert [(query["round"], query["query_id"]) for query in seen["queries"]] == [(1, "q1"), (2, "q9"), (2, "q1")]
    first = seen["queries"][0]
    assert (first["best"], first["worst"], first["gain"], first["usable"]) == (1, 0, 1.0, True)
    assert [list(draft) for draft in first["drafts"]] == [list(COLUMNS)] * 3
    assert [(line["round"], line["of_queries"], line["queries"]) for line in seen["rounds"]] == [(1, 3, 1), (2, 4, 2)]
    assert told(cowest, place, "--hurt", "--round", 2)["queries"][0]["query_id"] == "q2"


def test_a_round_that_asked_only_what_decides_shows_what_it_knows(cowest: Any, tmp_path: Path) -> None:
    home = jobs.Home(tmp_path / "home")
    jobs.write_status(home, api.Status())
    world.write_round(home.store.as_uri(), 1, world.SPARED)
    head, _, *lines = cowest("ledger", "--home", home.root).out.splitlines()
    assert "8 drafts, 7 distinct, 4 asked; mean gain of the 2 that are known +0.500, 0.0 % hurt; 5 calls" in head
    assert [line.split()[1] for line in lines] == ["q1", "q2", "q3"], "a gain that is not known comes last"
    drafts = cowest("ledger", "--home", home.root, "--query", "q3", "--drafts").out
    assert drafts.count("same") == 2 and "None" not in drafts
    seen = told(cowest, home, "--parquet", tmp_path / "all.parquet", "--dataset", tmp_path / "pairs")
    assert [query["gain"] for query in seen["queries"]] == [1.0, None, None]
    assert pq.read_table(tmp_path / "all.parquet")["answer_score"].null_count == 4
    (pair,) = pq.read_table(tmp_path / "pairs" / "data").to_pylist()
    assert (pair["solo_score"], pair["strong_model"]) == (0.0, "strong-1")


def test_filters_that_leave_nothing_are_an_answer(cowest: Any, place: jobs.Home) -> None:
    said = cowest("ledger", "--home", place.root, "--group", "rare", "--min-gain", "1", "--round", 1)
    assert (said.code, said.out) == (EXIT_OK, "Round 1 (BestVersusWorst): 0 of 3 queries.\n")


def test_the_book_of_paid_calls_says_the_price_and_a_shared_call_is_paid_once(cowest: Any, place: jobs.Home) -> None:
    async def pay() -> str:
        async with (
            ScriptedModel("7") as strong,
            HttpChatModel(strong.url, "m") as model,
            PaidCalls(place.calls, round_number=3) as calls,
        ):
            asked = [{"role": "user", "content": "?"}]
            return (await calls.ask(model, asked, endpoint=strong.url, name="m", purpose="p", params={}))[1]

    key = asyncio.run(pay())
    (entry,) = world.entries("q5", 0.0, 1.0)
    paid = type(entry.answer)("7", key, "fp_1", "strong-1")
    world.write_round(place.store.as_uri(), 3, [type(entry)(entry.row, entry.draft, paid, 1.0, paid, 1.0)])
    assert list(read_prices(place.calls, [key, *(f"unknown {i}" for i in range(1200))])) == [key]
    (query,) = told(cowest, place, "--round", 3)["queries"]
    price = query["price"]
    assert (price["calls"], price["unknown"]) == (1, 0)
    assert price["input_tokens"] == query["drafts"][0]["answer_input_tokens"] > 0
    assert query["drafts"][0]["currency"] == "EUR"
    assert f"; 1 call, {price['input_tokens'] + price['output_tokens']} tokens, 0.00 EUR." in cowest(
        "ledger", "--home", place.root, "--round", 3
    ).out  # fmt: skip


# ---------------------------------------------------------------- refused
def test_a_job_without_a_ledger_yet_says_when_there_will_be_one(cowest: Any, tmp_path: Path) -> None:
    home = jobs.Home(tmp_path / "home")
    assert "wanted the state of a job" in refused(cowest("ledger", "--home", home.root))
    jobs.write_status(home, api.Status())
    assert "saw none yet. A tuned round writes one" in refused(cowest("ledger", "--home", home.root))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--round", "7"], "--round 7: wanted a round with a ledger, saw 1, 2.", id="no such round"),
        pytest.param(["--query", "zebra"], "--query 'zebra': wanted the id", id="no such query"),
        pytest.param(["--group", "z"], "--group 'z': wanted a group of the data, saw g, rare.", id="no such group"),
        pytest.param(["--max-gain", "1"], "No such option", id="no such filter"),
        pytest.param(["--min-gain", "12"], "should be less than or equal to 1", id="a gain that no draft can have"),
        pytest.param(["--store", "s3://b/p"], "wanted --store s3://b/p or a job, saw both", id="two places"),
        pytest.param(["--group", "rare", "--min-gain", "1", "--dataset", "x"], "saw none", id="nothing to export"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(
    cowest: Any, place: jobs.Home, flags: list[str], says: str
) -> None:
    assert says in refused(cowest("ledger", "--home", place.root, *flags))


def test_a_ledger_that_was_changed_after_its_step_is_not_read(cowest: Any, place: jobs.Home) -> None:
    file = place.store / "runs" / "r1" / "feedback" / "pairs.jsonl"
    file.write_text(file.read_text().replace("draft 1", "draft 9"))
    assert "pairs.jsonl: wanted the file that its manifest names" in refused(cowest("ledger", "--home", place.root))
    assert told(cowest, place, "--round", 2)["queries"]


def test_a_ledger_without_a_column_of_today_is_read_and_one_without_scores_is_not(
    cowest: Any, place: jobs.Home
) -> None:
    def rewrite(name: str) -> None:
        folder = place.store / "runs" / "r1" / "feedback"
        pq.write_table(pq.read_table(folder / "ledger.parquet").drop_columns([name]), folder / "ledger.parquet")
        made = json.loads((folder / "manifest.json").read_text())
        made["outputs"]["ledger.parquet"] = file_sha256(folder / "ledger.parquet")
        (folder / "manifest.json").write_text(json.dumps(made))

    rewrite("seed")
    assert told(cowest, place, "--round", 1)["queries"][0]["drafts"][0]["seed"] is None
    rewrite("gain")
    assert "wanted the columns of a ledger, saw no gain." in refused(cowest("ledger", "--home", place.root))


# ---------------------------------------------------------------- exported
def test_the_table_leaves_as_typed_parquet_with_the_drafts_of_whole_queries(
    cowest: Any, place: jobs.Home, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "ledger.parquet"
    seen = told(cowest, place, "--usable", "--parquet", target)
    assert seen["written"] == [{"uri": str(target), "rows": 12, "of": "drafts"}]
    table = pq.read_table(target)
    assert {field.name: str(field.type) for field in table.schema} == {n: c.kind for n, c in COLUMNS.items()}
    assert set(table["round"].to_pylist()) == {1, 2} and table["role"].to_pylist().count("chosen") == 5


def test_an_export_overwrites_nothing_and_looks_before_it_writes(cowest: Any, place: jobs.Home, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "mine").write_text("mine")
    flags = ("--parquet", tmp_path / "ledger.parquet", "--dataset", tmp_path / "pairs")
    assert "wanted a place with nothing there" in refused(cowest("ledger", "--home", place.root, *flags))
    assert not (tmp_path / "ledger.parquet").exists()


def test_the_pairs_load_as_a_data_set_in_the_form_that_trl_trains_on(
    cowest: Any, place: jobs.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    target = tmp_path / "pairs"
    said = cowest("ledger", "--home", place.root, "--round", 1, "--dataset", target)
    assert said.code == EXIT_OK and f"{target}: 2 pairs written." in said.out
    cache = str(tmp_path / "cache")
    files = load_dataset("parquet", data_files=str(target / "data" / "*.parquet"), split="train", cache_dir=cache)
    folder = load_dataset(str(target), split="train", cache_dir=cache)
    assert folder.to_list() == files.to_list() and all(map(is_conversational, folder))
    query, best, worst = DRUM
    first = folder[0]
    assert first["prompt"] == [world.SYSTEM, {"role": "user", "content": query}]
    assert first["chosen"] == [{"role": "assistant", "content": best}]
    assert first["rejected"] == [{"role": "assistant", "content": worst}]
    assert (first["chosen_score"], first["solo_score"], first["round"]) == (1.0, 0.0, 1)
    assert first["weak_digest"] == "sha256:weak" and first["pair_digest"] == world.PAIR.digest
    card = (target / "README.md").read_text()
    assert "| queries that were chosen and gave no pair | 1 |" in card and "sha256:evaluator" in card


def test_trl_tokenises_the_pairs_as_they_are(
    cowest: Any, place: jobs.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.loop.tiny_models import make_model

    cowest("ledger", "--home", place.root, "--round", 1, "--dataset", tmp_path / "pairs")
    pairs = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    weak = make_model(tmp_path / "weak", [" ".join(DRUM), "You are brief."])
    settings = DPOConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none"
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(weak),
        args=settings,
        train_dataset=pairs,
        processing_class=(tokenizer := AutoTokenizer.from_pretrained(weak)),
    )
    assert len(trainer.train_dataset) == 2
    assert "draft 1 of q1" in tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
