"""Means over seeds against SciPy's tests and against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hopeprobe.stats import between, over_seeds, resolution

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=2, max_size=12).filter(lambda x: max(x) - min(x) > 0.1))
def test_mean_interval_and_p_are_those_of_a_t_test(values):
    ours, theirs = over_seeds(values), stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    np.testing.assert_allclose(
        [ours.mean, ours.sd], [np.mean(values), np.std(values, ddof=1)], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose([ours.ci_low, ours.ci_high], [low, high], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-8, atol=1e-12)
    assert ours.excludes_zero == (ours.p < 0.05)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    one, none = over_seeds([2.5]), over_seeds([])
    assert (one.mean, one.n) == (2.5, 1)
    assert all(math.isnan(x) for x in (one.ci_low, one.ci_high, one.p, one.resolution, none.mean))
    assert not one.excludes_zero


def test_equal_values_have_an_interval_without_width():
    same = over_seeds([0.1] * 3)
    assert (same.mean, same.ci_low, same.ci_high, same.sd, same.p, same.resolution) == (
        0.1,
        0.1,
        0.1,
        0.0,
        0.0,
        0.0,
    )
    assert over_seeds([0.0, 0.0]).p == 1.0


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        over_seeds([1.0, math.nan])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_resolution_is_found_in_four_of_five_cases(n):
    rng = np.random.default_rng(n)
    values = rng.normal(resolution(1.7, n), 1.7, (20_000, n))
    found = stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05
    assert abs(found.mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 20_000)


def test_the_resolution_of_another_power():
    assert resolution(1.0, 5, power=0.95) > resolution(1.0, 5) > resolution(1.0, 5, power=0.5)


@given(
    st.lists(NUMBERS, min_size=2, max_size=9).filter(lambda x: max(x) - min(x) > 0.1),
    st.lists(NUMBERS, min_size=2, max_size=9).filter(lambda x: max(x) - min(x) > 0.1),
)
def test_between_unrelated_seeds_is_welchs_test(one, other):
    ours = between(over_seeds(one), over_seeds(other))
    theirs = stats.ttest_ind(one, other, equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours.ci_low, ours.ci_high], [low, high], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-7, atol=1e-12)


def test_between_single_runs_there_is_a_difference_and_no_interval():
    alone = between(over_seeds([1.0]), over_seeds([3.0, 4.0]))
    assert alone.difference == -2.5
    assert math.isnan(alone.p)
    exact = between(over_seeds([1.0, 1.0]), over_seeds([3.0, 3.0]))
    assert (exact.ci_low, exact.ci_high, exact.p, exact.resolution) == (-2.0, -2.0, 0.0, 0.0)
