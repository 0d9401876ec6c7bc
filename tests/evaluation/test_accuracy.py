"""Statistics against values worked out by hand, and intervals against their own promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_sgopd.evaluation.accuracy import (
    avg_at_k,
    bootstrap_ci95,
    greedy_accuracy,
    greedy_marks,
    paired_difference,
    pass_at_k,
    problem_pass_rates,
    summarize,
    summarize_benchmarks,
)


def records(counts: list[int], n: int = 4, greedy: bool | None = None) -> list[dict]:
    return [
        {"id": f"p{i}", "num_samples": n, "num_correct": c, "greedy_is_correct": greedy}
        for i, c in enumerate(counts)
    ]


def test_avg_at_k_is_the_mean_of_the_problems_shares():
    assert avg_at_k(records([0, 1, 4])) == pytest.approx((0 + 0.25 + 1) / 3)


@pytest.mark.parametrize(
    ("c", "k", "expected"),
    [
        (0, 1, 0.0),
        (1, 1, 0.25),  # one sample of four
        (1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (2, 2, 5 / 6),  # 1 - 1/6
        (3, 2, 1.0),  # no two wrong ones
        (1, 4, 1.0),
        (4, 3, 1.0),
    ],
)
def test_pass_at_k_by_hand(c: int, k: int, expected: float):
    assert pass_at_k(records([c]), k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k: int):
    outcomes = [1, 0, 0, 1, 0, 0, 0]
    subsets = list(combinations(outcomes, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert pass_at_k(records([2], n=7), k) == pytest.approx(expected)


def test_pass_at_1_is_avg_at_k():
    some = records([0, 1, 3, 8], n=8)
    assert pass_at_k(some, 1) == pytest.approx(avg_at_k(some))


def test_pass_at_k_stays_exact_for_large_n():
    # 1 - C(900, 100) / C(1000, 100): binomials beyond float64.
    expected = 1.0 - np.exp(np.sum(np.log1p(-100 / np.arange(1000, 900, -1))))
    assert pass_at_k(records([100], n=1000), 100) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_than_was_sampled(k: int):
    with pytest.raises(ValueError, match=f"k = {k}: there are 4 samples"):
        pass_at_k(records([1, 2]), k)


@pytest.mark.parametrize(("c", "n"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_named(c: int, n: int):
    with pytest.raises(ValueError, match="'p0'"):
        avg_at_k(records([c], n=n))


def test_no_records_is_an_error():
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_bootstrap_is_seeded():
    values = np.random.default_rng(3).random(30)
    first, again = bootstrap_ci95(values, seed=1), bootstrap_ci95(values, seed=1)
    assert first == again
    assert first != bootstrap_ci95(values, seed=2)


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_ci95([0.5] * 10) == pytest.approx((0.5, 0.5))


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=2000)
    low, high = bootstrap_ci95(values, bootstrap_samples=4000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_in_slices_draws_what_one_slice_draws(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_ci95(values, bootstrap_samples=300)
    monkeypatch.setattr("megatron_sgopd.evaluation.accuracy._CHUNK", 1000)
    assert bootstrap_ci95(values, bootstrap_samples=300) == whole


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(11)
    truth, hits, trials = 0.3, 0, 300
    for trial in range(trials):
        values = rng.binomial(8, rng.beta(1.5, 3.5, size=100)) / 8  # mean 0.3
        low, high = bootstrap_ci95(values, bootstrap_samples=400, seed=trial)
        hits += low <= truth <= high
    assert 0.90 <= hits / trials <= 0.985


@pytest.mark.parametrize("values", [[], [[0.1, 0.2]]])
def test_bootstrap_wants_one_number_per_problem(values: list):
    with pytest.raises(ValueError, match="one number per problem"):
        bootstrap_ci95(values)


def test_paired_difference_by_hand_whatever_the_order():
    arm, baseline = records([4, 2, 1]), records([2, 2, 0])
    difference = paired_difference(arm, list(reversed(baseline)))
    assert difference.mean == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert difference.ci95 == pytest.approx(bootstrap_ci95([0.5, 0, 0.25]))


def test_pairing_takes_the_problems_difficulty_out():
    hard_and_easy = [0, 1, 2, 4, 5, 7] * 20
    arm, baseline = records([c + 1 for c in hard_and_easy], n=8), records(hard_and_easy, n=8)
    difference = paired_difference(arm, baseline)
    assert difference.ci95 == pytest.approx((0.125, 0.125))
    assert difference.separated
    low, high = bootstrap_ci95([c / 8 for c in hard_and_easy])
    assert high - low > 0.05  # which is what unpaired intervals would carry


@pytest.mark.parametrize(
    ("ci95", "separated"),
    [((0.01, 0.2), True), ((-0.2, -0.01), True), ((-0.01, 0.2), False), ((0.0, 0.2), False)],
)
def test_separated_leaves_zero_out(ci95: tuple[float, float], separated: bool):
    from megatron_sgopd.evaluation.accuracy import Difference

    assert Difference(0.1, ci95).separated is separated


def test_paired_difference_refuses_other_problems():
    with pytest.raises(ValueError, match="'p2' is in one alone"):
        paired_difference(records([1, 2, 3]), records([1, 2]))


def test_paired_difference_refuses_same_ids_of_other_problems():
    arm, baseline = records([1]), records([1])
    arm[0]["problem"], baseline[0]["problem"] = "1+1=", "1+2="
    with pytest.raises(ValueError, match=r"'1\+1=' in one evaluation and '1\+2='"):
        paired_difference(arm, baseline)


def test_paired_difference_refuses_repeated_ids():
    with pytest.raises(ValueError, match="occur more than once"):
        paired_difference(records([1]) * 2, records([1]))


@pytest.mark.parametrize(
    ("marks", "expected"), [([True, False, False, False], 0.25), ([True, None], None), ([], None)]
)
def test_greedy_accuracy(marks: list, expected: float | None):
    some = [{"id": str(i), "greedy_is_correct": m} for i, m in enumerate(marks)]
    assert greedy_accuracy(some) == expected


def test_summarize():
    summary = summarize(records([0, 2, 4, 1], greedy=True), seed=5)
    assert summary["avg_at_k"] == pytest.approx(7 / 16)
    assert summary["pass_at_k"] == pytest.approx(0.75)
    assert (summary["k"], summary["greedy"], summary["num_problems"]) == (4, 1.0, 4)
    assert summary["ci95"] == list(bootstrap_ci95([0, 0.5, 1, 0.25], seed=5))


def two_sets() -> list[dict]:
    """Shares 0 and 1/2 of a set of two problems, 3/4 of a set of one."""
    found = records([0, 2, 3])
    for record, name in zip(found, "xxy", strict=True):
        record |= {"benchmark": name, "lengths": [1, 2, 3, 4], "truncated": int(name == "x")}
    return found


def test_benchmarks_have_one_weight_each():
    whole = summarize_benchmarks(two_sets(), 2)
    assert whole["avg_at_k"] == pytest.approx((0.25 + 0.75) / 2)  # 1.25 / 3 over problems
    assert whole["pass_at_k"] == pytest.approx(((0 + 5 / 6) / 2 + 1) / 2)
    assert (whole["k"], whole["num_samples"], whole["num_problems"]) == (2, 4, 3)
    assert whole["mean_length"] == 2.5
    assert whole["truncated"] == pytest.approx((0.25 + 0) / 2)
    assert {n: b["avg_at_k"] for n, b in whole["benchmarks"].items()} == {"x": 0.25, "y": 0.75}
    # A set of one problem resamples to itself: half of the interval of the other is left.
    x = whole["benchmarks"]["x"]
    assert x["ci95"] == [0.0, 0.5] and whole["ci95"] == [0.375, 0.625]
    assert summarize(records([1]))["mean_length"] is None, "where nothing is known of it"


def test_pairs_of_several_benchmarks_and_measures():
    arm, baseline = two_sets(), two_sets()
    arm[0]["num_correct"], baseline[2]["num_correct"] = 1, 0
    told = paired_difference(arm, baseline[::-1])
    assert told.mean == pytest.approx((0.25 / 2 + 0.75) / 2)
    told = paired_difference(arm, baseline, of=lambda r: problem_pass_rates(r, 2))
    assert told.mean == pytest.approx((0.5 / 2 + 1) / 2)
    for record in arm:
        record["greedy_is_correct"] = True
    for record in baseline:
        record["greedy_is_correct"] = False
    assert paired_difference(arm, baseline, of=greedy_marks).ci95 == (1.0, 1.0)
    baseline[0]["benchmark"] = "y"
    with pytest.raises(ValueError, match="in one alone"):
        paired_difference(arm, baseline)


def test_sets_are_resampled_each_within_itself_and_independently():
    rng = np.random.default_rng(1)
    sets = [rng.random(7), rng.random(7)]
    draw = np.random.default_rng(5)
    means = [each[draw.integers(0, 7, size=(500, 7))].mean(1) for each in sets]
    expected = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    assert bootstrap_ci95(*sets, bootstrap_samples=500, seed=5) == pytest.approx(expected)
