"""What a person says, before it is recorded: is there anything to act on?"""

from dataclasses import replace

import pytest

from cowest_operator import api, people
from tests import world as w

BARE = w.on_trial(pair=None)


@pytest.mark.parametrize(
    ("status", "verb", "words"),
    [
        pytest.param(w.SERVED, "approve", "no candidate to approve", id="nothing to approve"),
        pytest.param(BARE, "approve", "no candidate to approve", id="no model to approve yet"),
        pytest.param(w.SERVED, "promote", "no candidate", id="nothing to promote"),
        pytest.param(api.Status(), "rollback", "no earlier pair", id="nothing to go back to"),
        pytest.param(BARE, "promote", "no model yet", id="no model to promote yet"),
        pytest.param(w.on_trial(origin="Revalidation"), "promote", "measured again", id="the stable pair itself"),
        pytest.param(
            replace(w.SERVED, going_back=api.Word("bob", "")), "rollback", "bob has rolled back", id="on its way back"
        ),
        pytest.param(w.on_trial(), "promote", None, id="a candidate that is not judged yet"),
        pytest.param(replace(w.SERVED, refused_trial=w.trial()), "promote", None, id="a refused edit"),
        pytest.param(w.on_trial(stage="Canary"), "approve", None, id="a candidate to approve"),
        pytest.param(w.on_trial(stage="Canary"), "promote", None, id="a candidate to promote"),
        pytest.param(BARE, "rollback", None, id="a trial to end"),
        pytest.param(w.SERVED, "rollback", None, id="a pair to take back"),
        pytest.param(api.Status(), "pause", None, id="a pause"),
        pytest.param(api.Status(), "propose", None, id="a proposal"),
    ],
)
def test_a_verb_with_nothing_to_act_on_is_refused_beforehand(status, verb, words):
    no = people.refusal(status, verb)
    assert no is None if words is None else words in no


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        pytest.param([""], 1000, id="nothing was said: the clock"),
        pytest.param([f"{5000:020d}-pause"], 5001, id="the last one came from a clock ahead"),
        pytest.param(["", f"{7000:020d}-pause"], 7001, id="one not yet taken in came from a clock ahead"),
        pytest.param([f"{5000:020d}-pause", f"{400:020d}-pause"], 5001, id="an old one is still there"),
        pytest.param(["by hand"], 1000, id="one written by hand"),
        pytest.param(["by hand", f"{5000:020d}-pause"], 5001, id="one written by hand beside others"),
    ],
)
def test_a_new_action_sorts_after_all_others(known, wanted):
    assert people.next_id(known, "approve", 1000) == f"{wanted:020d}-approve"
