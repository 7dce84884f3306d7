"""The jackknife against brute-force recomputation and classical formulas; what it refuses to claim."""

import numpy as np
import pytest
from scipy import stats

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    CKA_BOUNDS,
    GROUPS,
    GroupedCovariance,
    GroupedCrossCovariance,
    GroupedMean,
    Moments,
    cka_of,
    effective_rank,
    effective_rank_of,
    exactly,
    jackknife,
    jackknife_each,
    linear_cka,
    mean_of,
    p_value,
    paired_difference,
    second_order,
)


def grouped_mean(values, group):
    accumulator = GroupedMean(values.shape[2:])
    accumulator.update(values, np.ones(values.shape[:2], bool), group)
    return accumulator


def cross(x, y, group):
    accumulator = GroupedCrossCovariance(x.shape[-1], y.shape[-1])
    accumulator.update((x, y), np.ones(x.shape[:2], bool), group)
    return accumulator


def test_equal_groups_give_the_t_interval_of_group_means():
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=(GROUPS, 10))
    estimate = jackknife(mean_of, grouped_mean(values, np.arange(GROUPS)))
    means = values.mean(axis=1)
    # Leaving a group out moves a mean by G/(G−1) times its influence, hence the wider error.
    se = stats.sem(means) * np.sqrt(GROUPS / (GROUPS - 1))
    low, high = stats.t.interval(0.95, GROUPS - 1, means.mean(), se)
    np.testing.assert_allclose([estimate.value, estimate.df], [values.mean(), GROUPS - 1])
    np.testing.assert_allclose([estimate.ci_low, estimate.ci_high, estimate.se], [low, high, se])
    np.testing.assert_allclose(p_value(estimate), 2 * stats.t.sf(estimate.value / estimate.se, estimate.df))


def test_a_mean_over_unequal_groups_stays_the_token_mean():
    rng = np.random.default_rng(1)
    values, group = rng.normal(3, 1, (300, 5)), rng.choice(GROUPS, 300, p=rng.dirichlet(np.ones(GROUPS)))
    estimate = jackknife(mean_of, grouped_mean(values, group))
    np.testing.assert_allclose([estimate.value, estimate.plug_in], values.mean(), rtol=1e-12)
    assert estimate.n == values.size
    assert estimate.df < estimate.n_groups - 1


@pytest.mark.parametrize("kind", ["cka", "rank"])
def test_matches_brute_force_recomputation(kind):
    rng = np.random.default_rng(2)
    group = rng.integers(0, 50, 200)
    x = rng.standard_normal((200, 6, 4)) + rng.standard_normal((200, 1, 4))
    y = x[..., :3] + rng.standard_normal((200, 6, 3))

    def statistic(keep):
        joint = np.cov(np.concatenate([x, y], axis=-1)[keep].reshape(-1, 7).T)
        return float(
            linear_cka(joint[:4, :4], joint[4:, 4:], joint[:4, 4:])
            if kind == "cka"
            else effective_rank(joint[:4, :4])
        )

    accumulator = cross(x, y, group)
    estimate = jackknife(cka_of if kind == "cka" else effective_rank_of, accumulator)
    theta = statistic(np.ones(200, bool))
    weights = np.array([(group == g).mean() for g in range(50)])
    without = np.array([statistic(group != g) for g in range(50)])
    influence = (1 - weights) * (theta - without)
    bias = influence.sum()
    np.testing.assert_allclose(estimate.plug_in, theta)
    np.testing.assert_allclose(estimate.value, theta + bias)
    np.testing.assert_allclose(estimate.influence[:50], influence, atol=1e-12)
    np.testing.assert_allclose(estimate.se**2, (((influence - weights * bias) / (1 - weights)) ** 2).sum())
    # Busing's delete-m_j estimate, written as they write it.
    busing = 50 * theta - ((1 - weights) * without).sum()
    np.testing.assert_allclose(estimate.value, busing)


def test_identical_inputs_give_exactly_1_with_no_width():
    x = np.random.default_rng(3).standard_normal((GROUPS, 20, 9))
    estimate = jackknife(cka_of, cross(x, x, np.arange(GROUPS)), bounds=CKA_BOUNDS)
    assert (estimate.value, estimate.ci_low, estimate.ci_high, estimate.se) == (1.0, 1.0, 1.0, 0.0)


def test_intervals_stay_within_bounds():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, GROUPS, 8, 12))
    estimate = jackknife(cka_of, cross(x, y, np.arange(GROUPS)), bounds=CKA_BOUNDS)
    assert 0 == estimate.ci_low <= estimate.value <= estimate.ci_high < 0.05
    white = GroupedCovariance(6)
    white.update(rng.standard_normal((GROUPS, 50, 6)), np.ones((GROUPS, 50), bool), np.arange(GROUPS))
    estimate = jackknife(effective_rank_of, white, bounds=(1, 6))
    assert 5.5 < estimate.ci_low <= estimate.value <= estimate.ci_high <= 6


@pytest.mark.parametrize(("n_groups", "claimed"), [(31, False), (32, True)])
def test_under_32_groups_no_interval_is_claimed(n_groups, claimed):
    values = np.random.default_rng(5).standard_normal((n_groups, 4))
    estimate = jackknife(mean_of, grouped_mean(values, np.arange(n_groups)))
    assert estimate.n_groups == n_groups
    np.testing.assert_allclose(estimate.value, values.mean())
    assert np.isfinite([estimate.ci_low, estimate.ci_high, estimate.se]).all() == claimed
    assert np.isfinite(p_value(estimate)) == claimed


def test_an_empty_accumulator_gives_nan_and_zero_tokens():
    estimate = jackknife(mean_of, GroupedMean())
    assert np.isnan(estimate.value)
    assert (estimate.n, estimate.n_groups) == (0, 0)


def test_one_group_that_alone_varies_gives_no_interval():
    x = np.full((GROUPS, 5, 3), 2.0)
    x[7] = np.random.default_rng(6).standard_normal((5, 3))
    accumulator = GroupedCovariance(3)
    accumulator.update(x, np.ones((GROUPS, 5), bool), np.arange(GROUPS))
    estimate = jackknife(effective_rank_of, accumulator, bounds=(1, 3))
    assert np.isfinite(estimate.value)
    assert np.isnan([estimate.ci_low, estimate.ci_high, estimate.se]).all()


def test_each_element_is_its_own_estimate():
    values = np.random.default_rng(7).standard_normal((GROUPS, 4, 2, 3))
    each = jackknife_each(mean_of, grouped_mean(values, np.arange(GROUPS)))
    assert each.shape == (2, 3)
    alone = jackknife(mean_of, grouped_mean(values[..., 1, 2], np.arange(GROUPS)))
    np.testing.assert_allclose(
        [each[1, 2].value, each[1, 2].se, each[1, 2].ci_low], [alone.value, alone.se, alone.ci_low]
    )
    with pytest.raises(ValueError, match="jackknife_each"):
        jackknife(mean_of, grouped_mean(values, np.arange(GROUPS)))


def test_each_element_keeps_to_its_own_bounds():
    values = np.array([1.0, 6.0]) + np.random.default_rng(8).standard_normal((GROUPS, 5, 2))
    mean = grouped_mean(values, np.arange(GROUPS))
    high = mean.compute().pooled().mean()[0] + 0.06  # no leave-out comes as high, both intervals would
    one, six = jackknife_each(mean_of, mean, bounds=(np.array([-9.0, -9.0]), high))
    assert (one.ci_high, six.ci_high) == tuple(high)
    with pytest.raises(ValueError, match="leaves its range"):
        jackknife_each(mean_of, mean, bounds=(high - 9, high - [0.0, 0.5]))


def biased(b1, b2):
    """A mean with a bias of known orders in the number of tokens."""
    return lambda moments: moments.mean() + (b1 / moments.n + b2 / moments.n**2)[:, None]


def test_the_second_order_takes_off_what_the_jackknife_leaves():
    values = np.random.default_rng(9).standard_normal((GROUPS, 5, 1))
    source, n = grouped_mean(values, np.arange(GROUPS)), 5 * GROUPS
    (mean,) = jackknife_each(mean_of, source)
    b2 = 0.2 * mean.se
    statistic = biased(30.0, b2 * n**2)
    (first,) = found = jackknife_each(statistic, source)
    (second,) = second_order(statistic, source, found)
    np.testing.assert_allclose(first.plug_in - mean.value, 30 / n + b2)
    np.testing.assert_allclose(first.value - mean.value, -b2, rtol=0.02)
    assert abs(second.value - mean.value) < 0.04 * b2
    np.testing.assert_allclose(second.se, first.se, rtol=1e-9)
    assert (second.df, second.n, second.plug_in) == (first.df, n, first.plug_in)
    assert second.ci_low < mean.value < second.ci_high
    # A paired difference is corrected too: here to a model that differs by the bias alone.
    assert abs(paired_difference(second, mean).value) < 0.04 * b2


def test_a_bias_of_second_order_that_is_large_leaves_no_interval():
    source = grouped_mean(np.random.default_rng(9).standard_normal((GROUPS, 5, 1)), np.arange(GROUPS))
    statistic = biased(30.0, 0.3 * jackknife_each(mean_of, source)[0].se * (5 * GROUPS) ** 2)
    (first,) = found = jackknife_each(statistic, source)
    (second,) = second_order(statistic, source, found)
    assert np.isfinite(first.se)
    assert np.isnan([second.ci_low, second.ci_high, second.se]).all()
    assert second.value == second.plug_in == first.plug_in
    assert np.isnan(paired_difference(second, first).se)


def test_the_second_order_leaves_alone_what_has_no_bias_or_no_interval():
    rng = np.random.default_rng(10)
    values = rng.standard_normal((GROUPS, 7, 3))
    mean = grouped_mean(values, np.arange(GROUPS))
    first = jackknife_each(mean_of, mean)
    for before, after in zip(first, second_order(mean_of, mean, first), strict=True):
        assert after.value == pytest.approx(before.value, abs=1e-12)
        assert after.ci_low == pytest.approx(before.ci_low, abs=1e-12)
    few = grouped_mean(values[:31], np.arange(31))
    first = jackknife_each(mean_of, few)
    assert second_order(mean_of, few, first) is first

    def needs_half_of_them_and_more(moments):
        return np.where(moments.n[:, None] > 0.6 * values.shape[0] * 7, moments.mean(), np.nan)

    first = jackknife_each(needs_half_of_them_and_more, mean)
    assert np.isfinite(first[0].se)
    (after, *_) = second_order(needs_half_of_them_and_more, mean, first)
    assert np.isnan([after.ci_low, after.ci_high, after.se]).all()
    assert after.value == first[0].plug_in


def test_pooling_by_a_matrix_is_pooling_of_those_sets():
    rng = np.random.default_rng(11)
    x = rng.standard_normal((GROUPS, 6, 3)) + 100
    moments = cross(x, x[..., :2], np.arange(GROUPS)).compute()
    keep = (rng.random((4, GROUPS)) < 0.5).astype(float)
    pooled = moments.pool(keep)
    for row, kept in enumerate(keep > 0):
        part = Moments(
            moments.n[kept],
            {name: mean[kept] for name, mean in moments.means.items()},
            {pair: c[kept] for pair, c in moments.comoments.items()},
        ).pooled()
        tokens = x[kept].reshape(-1, 3)
        np.testing.assert_allclose(pooled.means["x"][row], tokens.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(
            pooled.covariance("xx")[row], np.cov(tokens.T, bias=True), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            pooled.comoments["xy"][row], part.comoments["xy"][0], rtol=1e-10, atol=1e-10
        )


def test_several_sources_count_what_they_share():
    rng = np.random.default_rng(8)
    kept = grouped_mean(rng.normal(2, 1, (40, 6)), np.arange(40))
    every = grouped_mean(rng.normal(1, 1, (GROUPS, 6)), np.arange(GROUPS))
    estimate = jackknife(lambda a, b: a.mean() - b.mean(), every, kept)
    assert (estimate.n_groups, estimate.n) == (40, 240)
    np.testing.assert_allclose(
        estimate.value, every.compute().pooled().mean() - kept.compute().pooled().mean()
    )


def test_paired_difference_is_the_jackknife_of_the_difference():
    rng = np.random.default_rng(9)
    group = rng.integers(0, GROUPS, 200)
    a = rng.standard_normal((200, 5))
    b = a + 0.1 + 0.1 * rng.standard_normal((200, 5))
    first, second = (jackknife(mean_of, grouped_mean(v, group)) for v in (a, b))
    difference = paired_difference(second, first)
    direct = jackknife(mean_of, grouped_mean(b - a, group))
    for name in ("value", "se", "df", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(difference, name), getattr(direct, name), rtol=1e-9)
    assert difference.se < 0.2 * first.se  # what both share cancels
    same = paired_difference(first, first)
    assert (same.value, same.se, p_value(same)) == (0.0, 0.0, 1.0)


def test_paired_difference_refuses_other_tokens_or_groups():
    values = np.random.default_rng(10).standard_normal((GROUPS, 5))
    estimate = jackknife(mean_of, grouped_mean(values, np.arange(GROUPS)))
    fewer = jackknife(mean_of, grouped_mean(values[:, :4], np.arange(GROUPS)))
    with pytest.raises(MeasurementError, match="320 tokens in 64 groups and 256 tokens in 64 groups"):
        paired_difference(estimate, fewer)
    uneven = GroupedMean()
    mask = np.ones((GROUPS, 6), bool)
    mask[:32, 4:] = False
    uneven.update(np.zeros((GROUPS, 6)), mask, np.arange(GROUPS))
    with pytest.raises(MeasurementError, match="dealt differently"):
        paired_difference(estimate, jackknife(mean_of, uneven))


def test_statistics_that_break_their_promise_raise():
    accumulator = grouped_mean(np.ones((GROUPS, 2)), np.arange(GROUPS))
    with pytest.raises(ValueError, match="leaves its range"):
        jackknife(lambda m: m.mean() + 1, accumulator, bounds=CKA_BOUNDS)
    with pytest.raises(ValueError, match="must return"):
        jackknife(lambda m: np.ones(3), accumulator)
    with pytest.raises(MeasurementError, match="infinite"):
        jackknife(lambda m: np.full(len(m.n), np.inf), accumulator)
    with pytest.raises(ValueError, match="at least one"):
        jackknife(mean_of)


def test_what_no_text_changes_is_exact():
    found = exactly(-3.0)
    assert (found.value, found.plug_in, found.ci_low, found.ci_high) == (-3.0,) * 4
    assert (found.se, found.n, found.n_groups, found.exact) == (0.0, 0, 0, True)
    assert (p_value(found), p_value(exactly(0.0))) == (0.0, 1.0)
    assert not jackknife(mean_of, grouped_mean(np.ones((GROUPS, 1)), np.arange(GROUPS))).exact
    for unknown in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not known"):
            exactly(unknown)
