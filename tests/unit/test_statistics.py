"""Intervals and tests against values counted by hand or by scipy."""

import numpy as np
import pytest
from scipy import stats

from cowest_training import statistics as st


def scores(*counts: tuple[float, int]) -> list[float]:
    return [value for value, n in counts for _ in range(n)]


# ---------------------------------------------------------------- McNemar
def test_six_wins_and_one_loss_is_eight_of_128() -> None:
    """P(X >= 6 | 7 fair coins) = (7 + 1) / 128."""
    candidate = scores((1, 6), (0, 1), (1, 3), (0, 2))
    control = scores((0, 6), (1, 1), (1, 3), (0, 2))
    result = st.compare_paired(candidate, control)
    assert (result.test, result.n, result.better, result.worse) == ("McNemar", 12, 6, 1)
    assert result.p_better == pytest.approx(8 / 128)
    assert result.p_worse == pytest.approx(127 / 128)
    assert result.difference == pytest.approx(5 / 12)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 9), (9, 0), (40, 25), (700, 640)])
def test_mcnemar_is_the_exact_binomial_tail(better: int, worse: int) -> None:
    expected = stats.binom.sf(better - 1, better + worse, 0.5)
    assert st.mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_equal_arms_are_never_better() -> None:
    result = st.compare_paired([1, 0, 1], [1, 0, 1])
    assert result.p_better == result.p_worse == 1.0


def test_swapping_the_arms_swaps_the_verdict() -> None:
    rng = np.random.default_rng(1)
    for draw in (lambda: rng.integers(0, 2, 200), lambda: rng.random(12), lambda: rng.random(60)):
        one, other = draw().tolist(), draw().tolist()
        there, back = st.compare_paired(one, other), st.compare_paired(other, one)
        assert there.difference == pytest.approx(-back.difference)
        assert there.p_better == pytest.approx(back.p_worse, abs=0.02)
        assert (there.better, there.worse) == (back.worse, back.better)


# ---------------------------------------------------------------- paired, graded
def test_three_graded_wins_are_one_of_eight_flips() -> None:
    result = st.compare_paired([0.9, 0.8, 0.7, 0.5], [0.5, 0.5, 0.6, 0.5])
    assert result.test == "PairedPermutation"
    assert result.p_better == pytest.approx(1 / 8)
    assert result.p_worse == 1.0


def test_graded_flips_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    candidate, control = rng.random(12), rng.random(12)
    expected = stats.permutation_test(
        (candidate, control),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=np.inf,
    )
    result = st.compare_paired(candidate.tolist(), control.tolist())
    assert result.p_better == pytest.approx(expected.pvalue)


def test_sampled_flips_come_near_the_exact_value_of_the_binomial() -> None:
    """With equal steps the sign-flip test is the sign test."""
    result = st.compare_paired(scores((0.5, 30), (0, 18)), scores((0, 30), (0.5, 18)))
    assert result.test == "PairedPermutation"
    assert result.p_better == pytest.approx(stats.binom.sf(29, 48, 0.5), abs=0.005)


def test_a_sampled_p_value_is_never_zero() -> None:
    result = st.compare_paired([0.7] * 100, [0.1] * 100)
    assert 0.5**100 < result.p_better == pytest.approx(np.exp(-50)), "Hoeffding's bound, above the exact value"
    assert result.p_worse == 1.0


def test_a_sampled_p_value_is_bounded_only_where_no_sample_reaches_what_was_seen() -> None:
    """With equal steps the exact value is the binomial's. At 36 of 50 a few of 20,000 samples reach it, at 46 none."""
    for better in (36, 46):
        result = st.compare_paired(scores((0.5, better), (0, 50 - better)), scores((0, better), (0.5, 50 - better)))
        exact = stats.binom.sf(better - 1, 50, 0.5)
        assert result.p_better >= exact
        assert (result.p_better < 1 / 20_001) == (better == 46)


# ---------------------------------------------------------------- two samples
def test_fisher_agrees_with_scipy() -> None:
    result = st.compare_independent(scores((1, 18), (0, 5)), scores((1, 9), (0, 11)))
    table = [[18, 5], [9, 11]]
    assert result.test == "FisherExact"
    assert result.n == 20
    assert result.p_better == pytest.approx(stats.fisher_exact(table, "greater").pvalue)
    assert result.p_worse == pytest.approx(stats.fisher_exact(table, "less").pvalue)
    assert result.difference == pytest.approx(18 / 23 - 9 / 20)


def test_two_graded_samples_are_split_exactly_when_few() -> None:
    """Of the C(5, 2) = 10 splits one has a sum as large as the observed one."""
    result = st.compare_independent([0.9, 0.8], [0.1, 0.2, 0.3])
    assert result.test == "Permutation"
    assert result.p_better == pytest.approx(0.1)
    assert result.p_worse == 1.0


def test_two_large_graded_samples_agree_with_the_t_test() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.beta(5, 4, 300), rng.beta(5, 4.5, 280)
    expected = stats.ttest_ind(ours, theirs, alternative="greater").pvalue
    result = st.compare_independent(ours.tolist(), theirs.tolist())
    assert result.p_better == pytest.approx(expected, abs=0.01)


def test_users_with_several_answers_are_permuted_whole() -> None:
    """Three users against three, ten answers each: of the C(6, 3) = 20 splits one is as good as the observed one."""
    users = ("a", "b", "c"), ("d", "e", "f")
    ours, theirs = ([user for user in names for _ in range(10)] for names in users)
    result = st.compare_independent([1.0] * 30, [0.0] * 30, (ours, theirs))
    assert result.test == "ClusterPermutation"
    assert (result.p_better, result.p_worse) == (pytest.approx(0.05), 1.0)
    alone = st.compare_independent([1.0] * 30, [0.0] * 30, (range(30), range(30)))
    assert alone.test == "FisherExact" and alone.p_better < 1e-15


def test_answers_that_are_alike_by_user_raise_no_false_alarm() -> None:
    """Both arms are the same and users differ. Fisher's test, blind to them, cries wolf in every fifth canary."""
    rng = np.random.default_rng(3)
    blind = seen = 0
    for _ in range(200):
        answers = [rng.random(12) for _ in range(2)]  # how often each user's answers are right
        ours, theirs = ((rng.random((12, 15)) < rates[:, None]).astype(float).ravel().tolist() for rates in answers)
        users = [user for user in range(12) for _ in range(15)]
        seen += st.compare_independent(ours, theirs, (users, users)).p_worse < 0.05
        blind += st.compare_independent(ours, theirs).p_worse < 0.05
    assert blind > 40
    assert seen <= 18  # 10 are expected; more than 18 come once in a hundred times


# ---------------------------------------------------------------- intervals
def test_wilson_agrees_with_scipy() -> None:
    for successes, n in ((0, 10), (3, 10), (10, 10), (512, 1000)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert st.wilson(successes, n) == pytest.approx((expected.low, expected.high))


def test_graded_scores_get_a_bootstrap_interval() -> None:
    values = np.random.default_rng(7).beta(2, 2, 400)
    mean, low, high = st.mean_interval(values.tolist())
    error = 1.96 * values.std() / 20
    assert (mean, low, high) == pytest.approx((values.mean(), mean - error, mean + error), abs=0.004)


def test_the_paired_interval_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(11)
    control = rng.integers(0, 2, 500)
    candidate = np.where(rng.random(500) < 0.2, 1 - control, control)
    result = st.compare_paired(candidate.tolist(), control.tolist())
    differences = candidate - control
    error = 1.96 * differences.std() / np.sqrt(500)
    assert result.low == pytest.approx(differences.mean() - error, abs=0.006)
    assert result.high == pytest.approx(differences.mean() + error, abs=0.006)


def test_clusters_widen_the_interval() -> None:
    """Ten answers a user, all alike: the data are 30 users, not 300 answers."""
    users = [user for user in range(30) for _ in range(10)]
    candidate = [float(user % 3 != 0) for user in users]
    control = [0.5] * 300
    alone = st.compare_paired(candidate, control)
    clustered = st.compare_paired(candidate, control, clusters=users)
    ratio = (clustered.high - clustered.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.1)
    assert clustered.p_better == pytest.approx(stats.binom.sf(19, 30, 0.5), abs=0.01), "20 users against 10"
    assert alone.p_better < 0.001


def test_clusters_of_one_query_each_leave_the_exact_test() -> None:
    candidate, control = scores((1, 6), (0, 1)), scores((0, 6), (1, 1))
    result = st.compare_paired(candidate, control, clusters=list(range(7)))
    assert (result.test, result.p_better) == ("McNemar", pytest.approx(8 / 128))


@pytest.mark.parametrize("values", [[1.0, 0.0, 1.0, 1.0], [0.2, 0.9, 0.4, 1.0]])
def test_clusters_of_one_score_each_leave_the_interval(values: list[float]) -> None:
    assert st.mean_interval(values, list("abcd")) == st.mean_interval(values)
    assert st.mean_interval(values, list("aabb")) != st.mean_interval(values)


def test_conversations_are_flipped_whole_also_where_scores_are_0_or_1() -> None:
    """Three conversations, of 4, 2 and 1 queries, all won: one of the eight flips of their signs is as good."""
    result = st.compare_paired([1] * 7, [0] * 7, clusters=["a"] * 4 + ["b"] * 2 + ["c"])
    assert (result.test, result.better) == ("PairedPermutation", 7)
    assert (result.p_better, result.p_worse) == (pytest.approx(1 / 8), 1.0)


def test_one_cluster_says_nothing() -> None:
    result = st.compare_paired([1, 1, 1], [0, 0, 0], clusters=["a", "a", "a"])
    assert (result.low, result.high) == (-1.0, 1.0)


def test_no_data_is_never_a_pass() -> None:
    for nothing in (st.compare_paired([], []), st.compare_independent([], [1.0, 1.0])):
        assert (nothing.n, nothing.p_better, nothing.low, nothing.high) == (0, 1.0, -1.0, 1.0)
    assert st.mean_interval([]) == (0.0, 0.0, 1.0)


def test_the_same_seed_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(13)
    one, other = rng.random(80).tolist(), rng.random(80).tolist()
    assert st.compare_paired(one, other, seed=4) == st.compare_paired(one, other, seed=4)
    assert st.compare_paired(one, other, seed=4) != st.compare_paired(one, other, seed=5)
    assert st.compare_independent(one, other, seed=4) == st.compare_independent(one, other, seed=4)


def test_unpaired_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        st.compare_paired([1, 1, 1], [0, 0])


# ---------------------------------------------------------------- macro-F1
def test_macro_f1_of_a_hand_counted_table() -> None:
    gold = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", None, "a"]
    # a: 2 hits of 3 said, 3 gold -> 2/3; b: 1 hit of 2 said, 2 gold -> 1/2; c: 0
    assert st.macro_f1(said, gold) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_label_that_never_occurs_does_not_count() -> None:
    assert st.macro_f1(["a"], ["a"], labels=["a", "b"]) == 1.0
    assert st.macro_f1([], []) == 0.0


# ---------------------------------------------------------------- agreement
def tables(*cells: tuple[int, int, int], kind: int = 0) -> np.ndarray:
    """One cluster a label: (said by people, said by the judge, how often)."""
    found = []
    for ours, theirs, n in cells:
        table = np.zeros((2, 3, 3))
        table[kind, ours, theirs] = 1
        found += [table] * n
    return np.array(found)


def test_kappa_is_the_textbooks() -> None:
    """Cohen 1960: 20 and 15 of 50 alike, .7 observed, .5 by chance, so .4."""
    kappa, low, high = st.kappa_interval(tables((2, 2, 20), (2, 0, 5), (0, 2, 10), (0, 0, 15)))
    assert kappa == pytest.approx(0.4)
    assert low < 0.18 < 0.62 < high, "the textbook's interval of 1.96 standard errors is .15 to .65"


def test_labels_of_two_kinds_have_a_chance_each() -> None:
    """One that always says "accept" of one answer, and "left" of two, agrees by chance alone."""
    both = np.concatenate([tables((2, 2, 30), (0, 2, 0)), tables((0, 0, 30), kind=1)])
    assert st.kappa_interval(both) == (0.0, -1.0, 1.0)
    assert st.kappa_interval(tables((2, 2, 30), (0, 0, 30)))[0] == 1.0


def test_agreement_on_a_few_labels_leaves_room_for_doubt() -> None:
    few, many = (st.kappa_interval(tables((2, 2, n), (0, 0, n)))[1] for n in (5, 100))
    assert few < 0.5 < 0.95 < many < 1


def test_labels_of_one_question_are_no_independent_evidence() -> None:
    alone = tables((2, 2, 40), (0, 0, 40), (0, 2, 20))
    together = alone.reshape(10, 10, 2, 3, 3).sum(axis=1)
    assert st.kappa_interval(together)[0] == pytest.approx(st.kappa_interval(alone)[0])
    assert st.kappa_interval(together)[1] < st.kappa_interval(alone)[1] - 0.1


def test_no_labels_say_nothing_of_agreement() -> None:
    assert st.kappa_interval(np.zeros((0, 2, 3, 3))) == (0.0, -1.0, 1.0)


def test_the_lower_end_holds_as_often_as_it_says() -> None:
    """A judge that agrees on 85 % of even labels has kappa .7."""
    rng, above = np.random.default_rng(3), 0
    for seed in range(60):
        people = rng.integers(0, 2, 60) * 2
        judge = np.where(rng.random(60) < 0.85, people, 2 - people)
        above += st.kappa_interval(tables(*((a, b, 1) for a, b in zip(people, judge, strict=True))), seed)[1] > 0.7
    assert above <= 5
