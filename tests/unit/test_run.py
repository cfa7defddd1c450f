"""What `cowest run` says before it begins: here of rows that changed in their file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_cli.preflight import Facts
from cowest_cli.run import _ask, _is_its_state, fewer_cores, last_steps, other_manifest, other_rows, what_next
from cowest_operator import api
from cowest_serving.cores import Cores
from cowest_training.contract import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_RETRY,
    StepError,
)
from tests import world as w

TRAIN = w.JOB.spec.data.train
LEARNT = replace(w.SERVED, train=TRAIN, tuned_rounds=1)


def left_by(folder: Path, learnt: dict[str, dict[str, str]], status=LEARNT) -> jobs.Home:
    """A home whose steps `r1/collect`, ... have seen these inputs."""
    home = jobs.Home(folder)
    for name, inputs in learnt.items():
        jobs.write_json(home.store / "runs" / name / "manifest.json", {"inputs": inputs})
    jobs.write_status(home, status)
    return home


def order(digest: str, rounds_max: int = 3) -> engines.Order:
    rounds = replace(w.JOB.spec.rounds, max=rounds_max)
    job = replace(w.JOB, spec=replace(w.JOB.spec, rounds=rounds))
    return engines.Order(jobs.Declared({}, job, Path()), Facts(1, 1, False, 1.0, train_digest=digest))


ROUNDS = {"r0/sft": {"data": "sha256:a"}, "r1/collect": {"train": "sha256:b"}}


def test_other_rows_in_the_same_file_are_said_with_what_comes_of_them(tmp_path):
    note = other_rows(left_by(tmp_path, ROUNDS), order("sha256:c"))
    assert "other rows than round 1 learnt from. The next round learns from them" in note
    assert note.endswith("give the file another name.")


def test_where_all_rounds_are_over_more_of_them_are_named_too(tmp_path):
    assert other_rows(left_by(tmp_path, ROUNDS), order("sha256:c", 1)).endswith("another name and raise rounds.max.")


@pytest.mark.parametrize(
    ("learnt", "status", "digest"),
    [
        pytest.param(ROUNDS, LEARNT, "sha256:b", id="the rows of the last round"),
        pytest.param({}, LEARNT, "sha256:c", id="nothing was learnt yet"),
        pytest.param({"r0/publish": {"model": "m"}}, LEARNT, "sha256:c", id="the base model as it is"),
        pytest.param(ROUNDS, replace(LEARNT, train="file:///other"), "sha256:c", id="another file: a round is due"),
    ],
)
def test_nothing_is_said_of(tmp_path, learnt, status, digest):
    assert other_rows(left_by(tmp_path, learnt, status), order(digest)) == ""


# ---------------------------------------------------------------- what the last round took
def took(folder: Path, **steps: float) -> jobs.Home:
    """A home with these steps (`r1_dpo=65.0`), in the order in which they were begun."""
    home = jobs.Home(folder)
    for minute, (name, seconds) in enumerate(steps.items()):
        number, step = name.split("_")
        made = {"step": step, "started": f"2026-01-01T00:{minute:02}:00+00:00", "seconds": seconds}
        jobs.write_json(home.store / "runs" / number / step / "manifest.json", made)
    return home


BASELINE = {"r0_sft": 9.0, "r0_evaluate": 8.0}
TUNED = {"r10_collect": 2.0, "r10_feedback": 140.4, "r10_dpo": 65.0, "r10_evaluate": 80.0}


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        pytest.param({}, None, id="nothing was run yet"),
        pytest.param(BASELINE, (0, {"sft": 9.0, "evaluate": 8.0}), id="only the baseline"),
        pytest.param(
            {**BASELINE, "r9_collect": 1.0, "r9_evaluate": 1.0, **TUNED},
            (10, {"collect": 2.0, "feedback": 140.4, "dpo": 65.0, "evaluate": 80.0}),
            id="the last by its number, its steps in their order",
        ),
        pytest.param(
            {**TUNED, "r11_publish": 1.0, "r11_evaluate": 9.0},
            (10, {"collect": 2.0, "feedback": 140.4, "dpo": 65.0, "evaluate": 80.0}),
            id="a proposed model tells nothing of a tuned round",
        ),
        pytest.param({**BASELINE, "r1_collect": 2.0}, (1, {"collect": 2.0}), id="the first tuned one is under way"),
    ],
)
def test_what_the_last_round_took(tmp_path, steps, seen):
    found = last_steps(took(tmp_path, **steps))
    assert found == seen and (seen is None or list(found[1]) == list(seen[1]))


# ---------------------------------------------------------------- what comes next
def test_after_bad_input_something_has_to_change_before_the_same_command():
    assert what_next(api.Failure(EXIT_BAD_INPUT, "x")).startswith("Change that first, then run the same command again")


def test_after_bad_input_in_the_trial_of_a_proposal_the_way_out_is_named():
    said = what_next(api.Failure(EXIT_BAD_INPUT, "x", is_of_proposal=True))
    assert "`cowest rollback` takes the proposal back" in said and "run the same command again" in said


@pytest.mark.parametrize("code", [EXIT_FAILED, EXIT_RETRY, EXIT_BUDGET])
def test_after_another_failure_the_same_command_goes_on(code):
    assert what_next(api.Failure(code, "x")) == "Run the same command again to go on from here."


@pytest.mark.parametrize(
    ("answer", "code"),
    [pytest.param("n\n", EXIT_BAD_INPUT, id="no"), pytest.param("", EXIT_INTERRUPTED, id="no answer")],
)
def test_who_does_not_say_yes_has_met_no_bug(monkeypatch, answer, code):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    order_of_much = replace(order("sha256:a", 1000), facts=Facts(1000, 1000, False, 1.0))
    with pytest.raises(StepError, match="nothing was started or paid") as said:
        _ask(order_of_much, Console(file=io.StringIO(), force_terminal=True))
    assert said.value.code == code
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    _ask(order_of_much, Console(file=io.StringIO(), force_terminal=True))


# ---------------------------------------------------------------- whose state it is
def served_from(folder: Path, home: jobs.Home) -> None:
    pair = replace(w.STABLE, weak_uri=f"{jobs.Home(folder).store.as_uri()}/runs/r0/sft")
    jobs.write_status(home, replace(w.SERVED, stable=pair))


def test_a_state_that_was_moved_is_refused_with_the_place_where_it_was_written(tmp_path):
    home = jobs.Home(tmp_path / "here")
    served_from(tmp_path / "there", home)
    with pytest.raises(StepError, match=rf"this state was written in {tmp_path}/there, .* Move it back there"):
        _is_its_state(order("sha256:a"), home)
    served_from(home.root, home)
    _is_its_state(order("sha256:a"), home)


def test_the_state_of_another_job_is_refused(tmp_path):
    home = jobs.Home(tmp_path)
    _is_its_state(order("sha256:a"), home)
    jobs.write_json(home.job, {"metadata": {"name": "other"}})
    with pytest.raises(StepError, match=r"wanted the job other, whose state is in .*, saw desk"):
        _is_its_state(order("sha256:a"), home)


def test_a_job_of_the_same_name_from_another_file_is_noted(tmp_path):
    home, here = jobs.Home(tmp_path), replace(order("sha256:a"), file=tmp_path / "b.yaml")
    assert other_manifest(home, here) == ""
    jobs.write_json(home.run, {"pid": 1, "manifest": str(tmp_path / "a.yaml")})
    assert f"is the state of {tmp_path}/a.yaml so far" in other_manifest(home, here)
    jobs.write_json(home.run, {"pid": 1, "manifest": str(tmp_path / "b.yaml")})
    assert other_manifest(home, here) == ""


def test_a_job_that_may_use_fewer_cores_than_it_was_begun_with_says_so_unless_a_person_chose_the_threads(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    home, fewer = jobs.Home(tmp_path), Cores(64, 2, 0.0)
    assert fewer_cores(home, fewer) == "", "it was never run"
    jobs.cores(home, Cores(8, 8, 0.0))
    assert "begun with 8 cores, now 2 are allowed" in fewer_cores(home, fewer)
    assert fewer_cores(home, Cores(8, 8, 7.0)) == "", "that others are at work takes nothing away"
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert fewer_cores(home, fewer) == ""
