"""The predictor: what it sees of a query, what it learns, and that what it does keeps feedback unbiased."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cowest_serving.contract import PredictorRef, RouteLimits, SettingsError, Shortcuts, digest_of
from cowest_serving.predictor import (
    BUCKETS,
    MOST_WORDS,
    Head,
    Predictor,
    dump_predictor,
    features,
    load_predictor,
)
from cowest_serving.routes import USUAL, Routes, Way
from cowest_serving.store import StoreError
from cowest_training.predictor import FEWEST, Examples, choose_threshold, learn
from tests.patience import IN_TIME

SHORTCUTS = Shortcuts(strong_alone=RouteLimits(0.02, 10), weak_alone=RouteLimits(0.02, 25))
NEVER, ALWAYS = Head([0.0] * BUCKETS, 9.0, 0.5), Head([0.0] * BUCKETS, -9.0, 0.5)


def by_word(word: str) -> Head:
    """Routes the queries that have this word."""
    weights = [0.0] * BUCKETS
    for bucket in features(word):
        weights[bucket] = -30.0
    return Head(weights, 2.0, 0.5)


# ---------------------------------------------------------------- features and form
def test_case_punctuation_and_repetition_do_not_count_but_the_order_of_words_does() -> None:
    assert features("What is ALPHA?") == features("what is, alpha")
    assert set(features("alpha alpha alpha")) > set(features("alpha"))
    assert set(features("alpha beta")) != set(features("beta alpha"))
    assert features("") == features("?!") == ()


def test_of_a_long_query_head_and_tail_are_looked_at() -> None:
    long = " ".join(["head", *(f"w{i}" for i in range(5000)), "tail"])
    found = features(long)
    assert len(found) <= 2 * MOST_WORDS
    assert set(features("head")) <= set(found) and features("tail")[0] in found


def test_a_predictor_is_read_as_it_was_written() -> None:
    written = Predictor({"strongAlone": by_word("alpha")})
    read = load_predictor(dump_predictor(written))
    assert read == written
    assert [read.route(query) for query in ("about alpha", "about beta")] == ["strongAlone", None]


@pytest.mark.parametrize("data", [b"", b"{}", b'{"form": 2, "buckets": 4096, "heads": {}}', b"[]"])
def test_what_is_no_predictor_of_this_form_is_refused(data: bytes) -> None:
    with pytest.raises(SettingsError, match="predictor: wanted"):
        load_predictor(data)


def test_where_both_shortcuts_fit_the_one_that_saves_the_paid_call_is_taken() -> None:
    assert Predictor({"strongAlone": ALWAYS, "weakAlone": ALWAYS}).route("x") == "weakAlone"
    assert Predictor({"strongAlone": ALWAYS, "weakAlone": ALWAYS}).route("x", ["strongAlone"]) == "strongAlone"


# ---------------------------------------------------------------- learning
def queries(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Drafts help one query in two of those about freight, and never those that are small talk."""
    draw = random.Random(seed)
    texts, gains = [], []
    for i in range(n):
        is_talk = i % 2 == 0
        words = ("thanks", "hello", "bye") if is_talk else ("freight", "customs", "tariff")
        texts.append(f"{draw.choice(words)} number {draw.randrange(50)} please {draw.choice(words)}")
        gains.append(0.0 if is_talk else float(draw.random() < 0.5))
    return texts, np.array(gains)


def seen(texts: Sequence[str], gains: np.ndarray) -> Examples:
    return Examples([features(text) for text in texts], (gains > 0).astype(float), gains)


def test_what_never_gains_is_found_by_its_words_and_on_queries_it_has_not_seen() -> None:
    texts, gains = queries(400)
    found = learn(seen(texts, gains), 0.02, seed=3)
    assert found.head is not None
    assert 0.4 < found.metrics["routed"] < 0.6 and found.metrics["loss"] <= 0.02
    fresh, worth = queries(400, seed=9)
    routed = np.array([found.head.routes(features(text)) for text in fresh])
    assert routed.mean() > 0.4
    assert worth[routed].sum() / len(fresh) <= 0.02


def test_the_same_examples_and_seed_give_the_same_predictor() -> None:
    texts, gains = queries(100)
    assert learn(seen(texts, gains), 0.05, 3) == learn(seen(texts, gains), 0.05, 3)


def test_where_every_draft_helps_not_even_the_few_that_the_limit_had_room_for_are_routed() -> None:
    texts, gains = queries(300)
    assert learn(seen(texts, gains * 0 + 1.0), 0.02, 3).head is None


def test_where_gains_have_nothing_to_do_with_the_words_the_loss_is_small_all_the_same() -> None:
    texts, _ = queries(400)
    lots = np.random.default_rng(1).permutation([1.0, 0.0] * 200)
    found = learn(seen(texts, lots), 0.02, 3)
    fresh, _ = queries(400, seed=9)
    routed = np.array([found.head is not None and found.head.routes(features(text)) for text in fresh])
    assert routed.mean() < 0.04, "each second one that is routed loses"


def test_too_few_queries_say_nothing() -> None:
    texts, gains = queries(FEWEST - 1)
    assert learn(seen(texts, gains * 0), 1.0, 3).head is None


def test_the_threshold_lies_between_chances_and_equal_ones_go_the_same_way() -> None:
    chances = np.array([0.1, 0.1, 0.2, 0.9, 0.9])  # of whose drafts the last one helped
    threshold, routed, loss = choose_threshold(chances, np.array([0.0, 0.0, 0.0, 0.0, 1.0]), 0.1)
    assert threshold == pytest.approx(0.55) and routed == 0.6 and loss == 0.0
    assert choose_threshold(chances[:2], np.array([0.0, 1.0]), 0.1) == (None, 0.0, 0.0)


# ---------------------------------------------------------------- the way of a request
def routes(predictor: Predictor, draw: float, **changes: object) -> tuple[Routes, PredictorRef]:
    data = dump_predictor(predictor)
    ref = PredictorRef("s3://b/p", digest_of(data), ("strongAlone", "weakAlone"))
    built = Routes(replace(SHORTCUTS, **changes), lambda: draw, lambda _: data)
    asyncio.run(built.load(ref))
    return built, ref


@pytest.mark.parametrize(
    ("draw", "way"),
    [
        pytest.param(0.10, Way("strongAlone", "strongAlone", 0.9), id="routed"),
        pytest.param(0.09, Way("strongAlone", None, 0.1), id="explored"),
    ],
)
def test_the_chance_of_the_way_that_was_taken_is_known(draw: float, way: Way) -> None:
    built, ref = routes(Predictor({"strongAlone": ALWAYS, "weakAlone": NEVER}), draw)
    assert built.way(ref, "x", {}) == way


def test_what_the_predictor_does_not_route_goes_the_usual_way_for_certain() -> None:
    built, ref = routes(Predictor({"strongAlone": NEVER, "weakAlone": NEVER}), 0.5)
    assert built.way(ref, "x", {}) == USUAL == Way(None, None, 1.0)


@pytest.mark.parametrize("parameters", [{"n": 2}, {"response_format": {"type": "json_object"}}, {"max_tokens": 5}])
def test_a_draft_is_no_answer_to_who_asks_for_more_than_text(parameters: dict[str, object]) -> None:
    built, ref = routes(Predictor({"weakAlone": ALWAYS}), 0.9)
    assert built.way(ref, "x", parameters) == USUAL
    assert built.way(ref, "x", {"temperature": 0.5}).taken == "weakAlone"


def test_only_what_is_declared_and_was_measured_well_is_taken() -> None:
    built, ref = routes(Predictor({"weakAlone": ALWAYS, "strongAlone": ALWAYS}), 0.9, weak_alone=None)
    assert built.way(ref, "x", {}).taken == "strongAlone"
    built, ref = routes(Predictor({"weakAlone": ALWAYS, "strongAlone": ALWAYS}), 0.9)
    assert built.way(replace(ref, shortcuts=("strongAlone",)), "x", {}).taken == "strongAlone"
    assert built.way(None, "x", {}) == USUAL


async def test_until_the_predictor_is_there_requests_go_the_usual_way() -> None:
    data = dump_predictor(Predictor({"strongAlone": ALWAYS}))
    ref = PredictorRef("s3://b/p", digest_of(data), ("strongAlone",))
    built = Routes(SHORTCUTS, lambda: 0.9, lambda _: data)
    assert built.way(ref, "x", {}) == USUAL
    async with asyncio.timeout(IN_TIME):
        while built.way(ref, "x", {}) == USUAL:
            await asyncio.sleep(0.001)
    assert built.way(ref, "x", {}).taken == "strongAlone"


@pytest.mark.parametrize("fault", ["another file", "no file"])
async def test_a_predictor_that_is_not_the_measured_one_is_not_gone_by(fault: str) -> None:
    reads = 0

    def read(_: str) -> bytes:
        nonlocal reads
        reads += 1
        if fault == "no file":
            raise StoreError("it is not there", retryable=False)
        return dump_predictor(Predictor({"strongAlone": ALWAYS}))

    built, ref = Routes(SHORTCUTS, lambda: 0.9, read), PredictorRef("s3://b/p", "sha256:measured", ("strongAlone",))
    await built.load(ref)
    assert [built.way(ref, "x", {}) for _ in range(3)] == [USUAL] * 3
    assert reads == 1, "it is not read again at once"


# ---------------------------------------------------------------- what is seen stays true
def test_weighed_by_their_chance_the_answers_of_the_usual_way_speak_for_all_queries() -> None:
    """The pair's mean score over all traffic, from those rows alone that it answered, as feedback has them."""
    draw = random.Random(4)
    built, ref = routes(Predictor({"strongAlone": by_word("talk")}), 0.0)
    built._draw = draw.random
    scores = {"talk": 0.9, "freight": 0.3}  # of the pair
    asked = [draw.choice(["talk", "talk", "freight"]) for _ in range(20_000)]
    rows = [(scores[query], built.way(ref, f"about {query}", {})) for query in asked]
    truth = sum(scores[query] for query in asked) / len(asked)
    usual = [(score, 1 / way.propensity) for score, way in rows if way.taken is None]
    plain = sum(score for score, _ in usual) / len(usual)
    weighed = sum(score * weight for score, weight in usual) / sum(weight for _, weight in usual)
    assert plain < truth - 0.2, "unweighed, the queries that are routed are hardly seen"
    assert weighed == pytest.approx(truth, abs=0.01)
    routed = [way for _, way in rows if way.taken is not None]
    assert len(routed) / len(rows) == pytest.approx(2 / 3 * 0.9, abs=0.02)
