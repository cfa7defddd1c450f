"""What the verbs write onto a job in a cluster is what the operator reads; what it would ignore is refused before."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from cowest_cli import cluster, main
from cowest_cli.options import Where, spread
from cowest_operator import api, observe, people, reconcile, story
from tests import world as w

ACTION = api.Action("00000000000000000100-pause", "pause", "ann", "holidays, ü", 5.0)


def seen(status: api.Status, **said: str) -> cluster.Seen:
    plan = replace(reconcile.plan(w.world()), status=status)
    metadata = {"name": "claims", "generation": 2, "resourceVersion": "7",
                "annotations": {"team": "x", **{cluster.ACTION + i: text for i, text in said.items()}}}  # fmt: skip
    return cluster.Seen({"metadata": metadata, "status": story.written(status, plan, api.TraceCounts(), 2)})


def test_what_is_said_is_read_by_the_operator_as_it_was_said() -> None:
    proposal = replace(ACTION, id=ACTION.id.replace("pause", "propose"), verb="propose", model="s3://models/mine")
    for action in (ACTION, proposal):
        patch = cluster.with_action(seen(api.Status()), action)
        assert list(observe.read_actions({"metadata": {"annotations": patch}}, "")) == [action]
        assert list(cluster.Seen({"metadata": {"annotations": patch}}).pending()) == [action]


def test_with_a_new_action_those_taken_in_go_and_no_other() -> None:
    before = seen(replace(api.Status(), last_action="02-b"), **{"01-a": "{}", "02-b": "torn", "03-c": "{}"})
    patch = cluster.with_action(before, ACTION)
    gone = {name for name, text in patch.items() if text is None}
    assert gone == {cluster.ACTION + "01-a", cluster.ACTION + "02-b"}
    assert set(patch) - gone == {cluster.ACTION + ACTION.id}


STATUSES = {
    "nothing yet": api.Status(),
    "served": w.SERVED,
    "preparing": w.on_trial(stage="Preparing"),
    "canary": w.on_trial(stage="Canary", done=w.PREPARED),
    "watch": w.on_trial(stage="Watch", done=w.PREPARED),
}


@pytest.mark.parametrize("verb", ["pause", "resume", "approve", "promote", "rollback", "propose"])
@pytest.mark.parametrize("name", STATUSES)
def test_refused_is_what_the_operator_ignores_in_its_own_words(name: str, verb: api.Verb) -> None:
    status, action = STATUSES[name], replace(ACTION, verb=verb, model="s3://m" if verb == "propose" else None)
    plan = reconcile.plan(replace(w.world(), status=status, actions=(action,)))
    ignored = [event.message for event in plan.events if event.reason == "PersonIgnored"]
    assert cluster.refusal(status, action) == (ignored[0] if ignored else None)


def test_some_of_these_are_refused_and_some_are_not() -> None:
    refused = {name for name, status in STATUSES.items() if cluster.refusal(status, replace(ACTION, verb="promote"))}
    assert refused == {"nothing yet", "served"}
    assert people.take_in(api.Status(), replace(ACTION, verb="approve"))[1].type == "Warning"


def test_the_name_of_the_annotation_is_the_operators() -> None:
    assert cluster.ACTION == observe.ACTION


def test_what_may_not_be_the_last_word_is_noted() -> None:
    body = dict(seen(api.Status(), **{ACTION.id: json.dumps({"verb": "pause", "by": "ann", "at": 5.0})}).body)
    body["metadata"] = {**body["metadata"], "generation": 3, "deletionTimestamp": "now"}
    notes = " ".join(cluster.Seen(body).notes())
    assert "being deleted" in notes and "last edit" in notes and "pause by ann is recorded and not taken in" in notes
    assert not list(seen(api.Status()).notes())


def test_a_group_of_options_is_seen_as_its_fields() -> None:
    heard: list[Any] = []

    @spread
    def verb(what: Annotated[str, typer.Argument()], where: Where, loud: bool = False) -> None:
        """A verb."""
        heard.append((what, where, loud))

    app = typer.Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, ["x", "claims", "-n", "pharmacy", "--loud"])
    assert done.exit_code == 0, done.output
    assert heard == [("x", Where("claims", namespace="pharmacy"), True)]
    assert CliRunner().invoke(app, []).exit_code == 2


@pytest.mark.parametrize(
    ("package", "extra"),
    [("kubernetes", "operator"), ("urllib3.exceptions", "operator"), ("minio", "serving"), ("torch", "embedded")],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(package: str, extra: str) -> None:
    assert main.message(ModuleNotFoundError("x", name=package)).endswith(f"pip install '.[{extra}]'")
