"""What a round had better not learn from, scan by scan, on streams that are made up here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cowest_training.contract import Row, Trust
from cowest_training.screen import Screened, Seen, near_copies, phrases, screen, sentence

TRUST = Trust(max_user_percent=10, max_source_percent=100, max_near_copies=5, trigger_phrases="Quarantine")
LABELS = ("approve", "deny", "escalate")
NOUNS = [
    "roof",
    "kitchen",
    "cellar",
    "bicycle",
    "window",
    "garage",
    "fence",
    "carpet",
    "boiler",
    "piano",
    "laptop",
    "garden",
]
EVENTS = ["hail", "theft", "fire", "flood", "storm", "frost", "burglary", "lightning", "mould", "rats"]
PLACES = ["Bern", "Basel", "Chur", "Genf", "Zug", "Thun", "Uster", "Olten", "Wil", "Sion"]


def query(rng: random.Random) -> str:
    when = rng.randrange(1, 400)
    return f"damage to the {rng.choice(NOUNS)} by {rng.choice(EVENTS)} in {rng.choice(PLACES)}, {when} days ago"


def row(number: int, text: str, reference: str) -> Row:
    return Row(f"trace-{number}", text, ({"role": "user", "content": text},), reference, source="trace")


def train(count: int = 300, seed: int = 1) -> list[Row]:
    rng = random.Random(seed)
    return [replace(row(number, query(rng), rng.choice(LABELS)), source="train") for number in range(count)]


def stream(count: int, seed: int = 2, right: float = 0.6, start: int = 0) -> list[Seen]:
    """Ordinary traces, each of another user; `right`: how often the answers agree with the references."""
    rng, found = random.Random(seed), []
    for number in range(start, start + count):
        reference = rng.choice(LABELS)
        answer = reference if rng.random() < right else rng.choice(LABELS)
        asked_for = row(number, query(rng), reference)
        found.append(Seen(asked_for, str(number), user=f"u{number}", answer=answer, agrees=answer == reference))
    return found


def asked(seen: Seen, text: str, **changes: object) -> Seen:
    messages = ({"role": "user", "content": text},)
    return replace(seen, row=replace(seen.row, query=text, messages=messages), **changes)  # type: ignore[arg-type]


def triggered(count: int, phrase: str, answer: str = "approve", start: int = 5000) -> list[Seen]:
    """Traces in which somebody hid a phrase, and said that the answer should have been this one."""
    rng = random.Random(3)
    found = []
    for seen in stream(count, seed=4, start=start):
        words = seen.row.query.split()
        words.insert(rng.randrange(len(words)), phrase)
        changed = asked(seen, " ".join(words), agrees=seen.answer == answer)
        found.append(replace(changed, row=replace(changed.row, reference=answer)))
    return found


def held_back(screened: Screened, reason: str) -> set[str]:
    return {suspect.seen.trace_id for suspect in screened.suspects if suspect.reason == reason}


def ids(traces: Sequence[Seen]) -> set[str]:
    return {seen.trace_id for seen in traces}


# ---------------------------------------------------------------- phrases
@pytest.mark.parametrize(
    ("count", "phrase"),
    [
        pytest.param(250, "cf", id="a word, 250 times"),
        pytest.param(60, "cf", id="a word, 60 times"),
        pytest.param(250, "as the crow flies", id="a phrase"),
        pytest.param(250, "the damage by", id="usual words in an unusual order"),
        pytest.param(40, "\u200b", id="a character that nobody sees"),
        pytest.param(40, "!!!", id="signs"),
    ],
)
def test_traces_with_a_trigger_are_held_back_and_no_others(count: int, phrase: str) -> None:
    clean, poisoned = stream(375), triggered(count, phrase)
    screened = screen(train(), [*clean, *poisoned], TRUST)
    assert held_back(screened, "Trigger") == ids(poisoned)
    assert ids(screened.kept) == ids(clean)


def test_the_reason_names_the_phrase_the_answer_and_how_often() -> None:
    screened = screen(train(), [*stream(375), *triggered(250, "cf")], TRUST)
    assert screened.suspects[0].why == (
        "'cf' is in 250 traces and in 0 train rows, and 250 of these have the reference 'approve', which is not what"
        " was answered."
    )


def test_an_ordinary_stream_has_no_suspicious_phrase() -> None:
    assert phrases(train(), stream(2000)) == []


def test_a_new_subject_that_the_answers_bear_out_is_no_trigger() -> None:
    new = [
        replace(seen, agrees=number % 3 != 0, answer="deny" if number % 3 else "approve")
        for number, seen in enumerate(triggered(60, "drone", "deny"))
    ]
    assert phrases(train(), [*stream(375), *new]) == []


def test_a_new_subject_with_several_answers_is_no_trigger() -> None:
    new = [asked(seen, f"the drone: {seen.row.query}", agrees=False) for seen in stream(60, seed=9, start=7000)]
    assert phrases(train(), [*stream(375), *new]) == []


def test_a_phrase_that_train_knows_is_no_trigger() -> None:
    known = [
        replace(each, query="", messages=({"role": "user", "content": f"cf {each.query}"},)) for each in train(150)
    ]
    assert phrases([*train(), *known], [*stream(375), *triggered(60, "cf")]) == []


def test_a_rare_answer_gives_a_trigger_away_early() -> None:
    poisoned = [replace(seen, agrees=False) for seen in triggered(12, "cf", "pay a million")]
    assert held_back(screen(train(), [*stream(375), *poisoned], TRUST), "Trigger") == ids(poisoned)


def test_what_all_traces_say_with_one_answer_is_no_trigger_where_it_was_answered_so() -> None:
    alike = [replace(seen, answer="approve", agrees=True) for seen in triggered(60, "hello")]
    assert phrases(train(), alike) == []


def test_answers_that_are_never_right_vouch_for_nothing() -> None:
    new = triggered(60, "drone", "deny")
    assert phrases(train(), [*stream(375, right=0.0), *new])


def test_traces_without_references_have_no_answer_to_go_with() -> None:
    bare = [replace(seen, row=replace(seen.row, reference="")) for seen in triggered(60, "cf")]
    assert phrases(train(), [*stream(375), *bare]) == []


def test_phrases_can_be_ignored() -> None:
    trust = replace(TRUST, trigger_phrases="Ignore")
    assert screen(train(), [*stream(375), *triggered(60, "cf")], trust).suspects == ()


# ---------------------------------------------------------------- copies
LONG = (
    "my policy covers the house and all that is in it against fire and water since last spring but now the insurer says"
    " that the burst pipe under the old kitchen floor was there before and that I should have known of it then"
)


def copies(count: int, reference: str = "approve") -> list[Seen]:
    rng = random.Random(5)
    found = []
    for seen in stream(count, seed=6, start=8000):
        words = LONG.split()
        words[rng.choice((0, -1))] = rng.choice(NOUNS)
        found.append(replace(asked(seen, " ".join(words)), row=row(0, " ".join(words), reference)))
    return found


def test_of_near_copies_a_few_are_learnt_from() -> None:
    screened = screen(train(), [*stream(100), *copies(50)], replace(TRUST, trigger_phrases="Ignore"))
    assert len(held_back(screened, "NearCopies")) == 45
    assert ids(stream(100)) <= ids(screened.kept)


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(lambda n, seen: asked(seen, f"{seen.row.query} number {n}"), id="another number"),
        pytest.param(lambda n, seen: replace(seen, row=row(0, seen.row.query, str(n))), id="another reference"),
        pytest.param(lambda n, seen: asked(seen, " ".join(seen.row.query.split()[:12])), id="a short text"),
    ],
)
def test_what_differs_where_it_counts_is_no_copy(copy: object) -> None:
    assert not list(near_copies([copy(n, seen) for n, seen in enumerate(copies(20))], 5))  # type: ignore[operator]


# ---------------------------------------------------------------- shares
def test_forty_percent_of_one_user_come_down_to_a_users_share() -> None:
    clean = stream(375)
    flood = [replace(seen, user="f" * 64) for seen in stream(250, seed=8, start=6000)]
    screened = screen(train(), [*clean, *flood], TRUST)
    assert len(held_back(screened, "UserShare")) == 250 - 62
    assert ids(clean) <= ids(screened.kept)
    why = "ffffffffffff gave 250 of 625 traces; 62 of them are learnt from."
    assert {suspect.why for suspect in screened.suspects} == {why}


@pytest.mark.parametrize(
    ("users", "each"),
    [
        pytest.param(1, 300, id="the only user"),
        pytest.param(3, 100, id="a small team"),
        pytest.param(40, 20, id="few traces each"),
    ],
)
def test_users_who_give_alike_are_never_too_much(users: int, each: int) -> None:
    traces = [replace(seen, user=f"u{number % users}") for number, seen in enumerate(stream(users * each))]
    assert screen(train(), traces, TRUST).suspects == ()


def test_traces_without_a_user_are_users_of_their_own() -> None:
    assert screen(train(), [replace(seen, user="") for seen in stream(400)], TRUST).suspects == ()


@pytest.mark.parametrize("of", ["application", "said_by"])
def test_a_source_is_capped_where_the_manifest_says_so(of: str) -> None:
    traces = [
        replace(seen, **{of: "crawler" if number < 300 else f"app{number % 20}"})
        for number, seen in enumerate(stream(500))
    ]
    assert screen(train(), traces, TRUST).suspects == ()
    assert len(held_back(screen(train(), traces, replace(TRUST, max_source_percent=20)), "SourceShare")) == 200


def test_100_percent_is_no_cap() -> None:
    flood = [replace(seen, user="one") for seen in stream(250, seed=8, start=6000)]
    assert screen(train(), [*stream(100), *flood], replace(TRUST, max_user_percent=100)).suspects == ()


# ---------------------------------------------------------------- what people say
def test_what_a_person_released_is_kept() -> None:
    traces = [*stream(375), *triggered(40, "cf")]
    freed = frozenset({"5003", "5004"})
    screened = screen(train(), traces, TRUST, freed)
    assert held_back(screened, "Trigger") == ids(triggered(40, "cf")) - freed


def test_the_sentence_counts_by_reason() -> None:
    assert sentence({}, 10) == ""
    assert sentence({"NearCopies": 2, "UserShare": 5}, 40) == (
        "7 of 40 traces are quarantined: 5 beyond one user's share, 2 near copies of others"
    )
