"""What the embedded engine goes on with: after an edit of the manifest, and while a step fails for good."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import yaml

from cowest_cli import engine as engines
from cowest_cli import jobs
from cowest_cli.following import Following
from cowest_cli.preflight import Facts
from cowest_operator import api, reconcile
from tests.manifests import edited


class Failed:
    """A child that ended with a code at once; every start of it is counted."""

    log = "x.log"

    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def last_words(self):
        return "no luck."

    def stop(self, _patience):
        pass

    def ask_to_stop(self):
        self._code = 0


class Desk:
    """A job whose children all end with `code`."""

    def __init__(self, folder, code=2):
        self.code, self.started, self.events = code, [], []
        self.path = folder / "job.yaml"
        self.write()
        self.following = Following(self.path, self.read, clock=lambda: self.now)
        self.now = 1.0
        home = jobs.Home(folder / "home")
        self.engine = engines.Engine(self.read(), home, start=self.start, following=self.following)
        self.engine._order = replace(self.engine._order, declared=jobs.with_generation(self.read().declared, home))
        jobs.write_json(home.job, self.engine.document)
        self.engine.gateway = engines._Server(Failed(None), 1, ready=True, since=1.0)
        self.engine._serves = True

    def write(self, **edits):
        self.path.write_text(yaml.safe_dump(edited(edits)))

    def read(self):
        return engines.Order(jobs.load(self.path), Facts(5, 100, False, 1.0))

    def start(self, name, *_, **__):
        self.started.append(name)
        return Failed(None if name == "gateway" else self.code)

    def look(self):
        """One turn of the loop."""
        self.engine._follow()
        world = self.engine.observe()
        plan = self.engine._with_news(world, reconcile.plan(world))
        self.engine.apply(plan)
        self.events += plan.events
        return world, plan

    def edit(self, wanted, **edits):
        """Write it, and look until it was read."""
        self.write(**edits)
        deadline = time.monotonic() + 20
        while not wanted():
            self.now += 2
            assert time.monotonic() < deadline
            self.look()

    def steps_started(self):
        return [name for name in self.started if name.startswith("r0-")]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def held(desk):
    while desk.engine._held is None:
        _, plan = desk.look()
    return plan


def reasons(world):
    return [trouble.reason for trouble in world.troubles]


def test_a_step_that_fails_for_good_is_held_and_said_once_while_the_gateway_serves(desk):
    assert held(desk).failure is not None
    assert len(desk.steps_started()) == 1
    for _ in range(4):
        world, plan = desk.look()
        assert reasons(world) == [api.REASON_STEP_FAILED]
        assert {c.type: c.reason for c in plan.status.conditions}["RoundProgressing"] == api.REASON_STEP_FAILED
    assert len(desk.steps_started()) == 1, "nothing is tried before its time"
    (event,) = [event for event in desk.events if event.reason == api.REASON_STEP_FAILED]
    assert event.message.startswith("step r0-publish: no luck. Again at ")


def test_a_step_that_ran_for_too_long_is_held_under_that_name(desk):
    while not desk.engine.steps:
        desk.look()
    (step,) = desk.engine.steps.values()
    step.overran = True
    held(desk)
    world, _ = desk.look()
    assert reasons(world) == [api.REASON_STEP_DEADLINE]
    assert "raise training.stepDeadlineSeconds. Again at " in world.troubles[0].message


def test_the_wait_doubles_up_to_ten_minutes(desk):
    waits = []
    for times in range(8):
        while desk.engine._held is None or desk.engine._held.times < times:
            desk.look()
        waits.append(round(desk.engine._held.until - time.time()))
        desk.engine._held.until = 0.0  # its time has come
    assert waits == [30, 60, 120, 240, 480, 600, 600, 600]


def test_a_person_who_says_resume_ends_the_wait(desk):
    held(desk)
    jobs.record_action(desk.engine.home, "resume", "the key is paid", "ann")
    for _ in range(4):
        desk.look()
    assert len(desk.steps_started()) == 2


def test_an_edit_of_the_manifest_ends_the_wait_and_the_next_step_goes_by_it(desk):
    held(desk)
    desk.edit(lambda: len(desk.steps_started()) == 2, **{"strong.budget": {"callsPerRound": 7}})
    engine = desk.engine
    assert engine.job.generation == 2 and engine.job.spec.strong.budget.calls_per_round == 7
    assert jobs.read_json(engine.home.job)["metadata"]["generation"] == 2


def test_a_trial_goes_on_with_what_it_began_with_and_the_rest_holds_at_once(desk):
    desk.look()
    desk.edit(
        lambda: desk.engine.job.generation == 2, **{"feedback.minPairs": 7, "strong.budget": {"callsPerRound": 8}}
    )
    world, plan = desk.look()
    assert world.job.spec.feedback.min_pairs == 7
    assert world.frozen.spec.feedback.min_pairs == 50
    said = "in force from the next trial on: feedback.minPairs"
    assert said in {c.type: c.message for c in plan.status.conditions}[api.ROUND_PROGRESSING]
    (edited,) = [event.message for event in desk.events if event.reason == "ManifestChanged"]
    assert (
        edited.startswith("the manifest was edited; generation 2 holds. Edited since round 0 began") and said in edited
    )
    number, path, document, _ = desk.engine._frozen
    assert number == 0 and document["spec"]["strong"]["budget"]["callsPerRound"] == 8
    assert jobs.read_json(path) == document, "its steps read this"


def test_an_edit_that_is_wrong_is_said_once_and_the_manifest_before_it_holds(desk):
    desk.look()
    desk.write(**{"weak.modle": "x"})
    deadline = time.monotonic() + 20
    while not desk.following.problem:
        desk.now += 2
        assert time.monotonic() < deadline
        desk.look()
    for _ in range(3):
        assert api.REASON_MANIFEST_INVALID in reasons(desk.look()[0])
    assert desk.engine.job.generation == 1
    (message,) = [event.message for event in desk.events if event.reason == api.REASON_MANIFEST_INVALID]
    assert "Did you mean model?" in message and "the one before it holds" in message
    desk.edit(lambda: not desk.following.problem)
    assert api.REASON_MANIFEST_INVALID not in reasons(desk.look()[0])
    assert desk.engine.job.generation == 1, "it is the manifest that holds already"


def test_the_gateway_begins_anew_only_for_an_edit_that_it_reads(desk):
    desk.look()
    desk.edit(lambda: desk.engine.job.generation == 2, **{"rounds.max": 7})
    assert desk.engine.gateway.ready and "gateway" not in desk.started
    desk.edit(lambda: desk.engine.job.generation == 3, **{"rounds.max": 7, "strong.maxTokens": 77})
    for _ in range(2):
        desk.look()
    assert desk.started.count("gateway") == 1


def test_without_serve_a_step_that_fails_for_good_ends_the_run(desk):
    desk.engine._serves = False
    plan = desk.look()[1]
    while not plan.failure:
        plan = desk.look()[1]
    assert plan.failure.code == 2 and desk.engine._held is None
    (event,) = [event for event in desk.events if event.reason == api.REASON_STEP_FAILED]
    assert (event.type, event.message) == ("Warning", "step r0-publish: no luck.")
    assert jobs.read_events(desk.engine.home)[-1]["message"] == event.message, "explain and report read these"
