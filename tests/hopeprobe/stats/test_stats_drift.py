"""Changes from a baseline: intervals against SciPy's, rates of alarms and finds in simulations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hopeprobe.stats.drift import ALARMS, HEAVY, apart, between_seeds, critical, on_same_tokens, spread

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))


@given(
    st.lists(NUMBERS, min_size=2, max_size=8), st.lists(NUMBERS, min_size=1, max_size=4), st.integers(1, 500)
)
def test_the_interval_is_that_of_a_two_sample_t_test(baseline, values, together):
    drift = between_seeds(baseline, values, together)
    df = len(baseline) + len(values) - 2
    pooled = np.concatenate([np.array(baseline) - np.mean(baseline), np.array(values) - np.mean(values)])
    se = math.sqrt((pooled**2).sum() / df * (1 / len(baseline) + 1 / len(values)))
    level = 1 - 0.01 / (2 * together)
    expected = np.mean(values) - np.mean(baseline)
    half = stats.t.ppf(level, df) * se
    np.testing.assert_allclose(
        [drift.difference, drift.low, drift.high],
        [expected, expected - half, expected + half],
        rtol=1e-6,
        atol=1e-6 * (1 + half),
    )
    np.testing.assert_allclose(
        drift.resolution, half + stats.t.ppf(0.95, df) * se, rtol=1e-6, atol=1e-6 * (1 + half)
    )


def test_equal_seeds_have_a_spread_of_exactly_nothing():
    assert spread([0.1] * 7) == 0.0
    drift = between_seeds([0.1] * 7, [0.1], 5)
    assert (drift.difference, drift.low, drift.high, drift.resolution) == (0, 0, 0, 0)
    assert between_seeds([1.0, 1.0], [1.25], 5).beyond(0.2)


@given(st.lists(NUMBERS, min_size=2, max_size=6), NUMBERS, st.floats(1e-6, 10))
def test_noise_is_a_spread_that_every_number_has(baseline, value, noise):
    plain, noisy = (between_seeds(baseline, [value], 5, noise=f) for f in (0.0, noise))
    floor = between_seeds([0.0] * len(baseline), [0.0], 5, noise=noise)
    np.testing.assert_allclose(
        noisy.high - noisy.difference,
        math.hypot(plain.high - plain.difference, floor.high),
        rtol=1e-9,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        floor.high, stats.t.ppf(0.999, len(baseline) - 1) * noise * math.sqrt(1 + 1 / len(baseline))
    )


def rounded(step):
    """Numbers that come in steps, as quantiles by a histogram do: seeds often agree."""
    return lambda rng, shape: np.round(rng.normal(scale=0.4 * step, size=shape) / step) * step


@pytest.mark.parametrize("n", [2, 3, 5])
def test_numbers_that_seeds_agree_on_raise_no_alarm_where_their_steps_are_known(n):
    alarms, _ = simulate(rounded(1.0), n, together=12, runs=500, tolerance=0.0)
    assert alarms > 0.2, "without noise a spread of nothing calls any other value a change"
    alarms, _ = simulate(rounded(1.0), n, together=12, runs=1500, tolerance=0.0, noise=1.0)
    assert alarms <= ALARMS + 3 * 0.0026


@given(
    st.integers(3, 8).flatmap(
        lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.sampled_from([0.0, 0.5]),
)
def test_apart_is_each_seed_against_the_others(values, noise):
    """The same by the plain rule, at 20 % of baselines, wherever that is not a matter of rounding."""
    found = set(apart(values, [noise] * len(values)))
    together = len(values) * len(values[0])
    for which, row in enumerate(values):
        for seed, value in enumerate(row):
            drift = between_seeds(row[:seed] + row[seed + 1 :], [value], together, noise)
            df = len(row) - 2
            half = (drift.high - drift.difference) * critical(df, together, 0.2) / critical(df, together)
            if abs(abs(drift.difference) - half) > 1e-6 * (1 + half):
                assert ((which, seed) in found) == (abs(drift.difference) > half)


def test_a_seed_that_went_another_way_is_named():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(20, 6))
    assert apart(values, [0.0] * 20) == []
    values[7, 2] += 60
    assert apart(values, [0.0] * 20) == [(7, 2)]
    assert apart(values, [30.0] * 20) == [], "within its noise"
    assert apart([[1.0, 5.0]], [0.0]) == [], "of two seeds nothing can be told"
    assert apart([[1.0, 1.0, 1.0]], [0.0]) == []


def test_heavy_tails_take_wider_intervals():
    baseline = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0]
    plain, heavy = (between_seeds(baseline, [2.0], 60, heavy=heavy) for heavy in (False, True))
    ratio = critical(HEAVY, 60) / critical(5, 60)
    np.testing.assert_allclose(heavy.high - heavy.difference, ratio * (plain.high - plain.difference))
    assert heavy.resolution > 1.5 * plain.resolution
    few = [between_seeds(baseline[:3], [2.0], 60, heavy=heavy) for heavy in (False, True)]
    assert few[0] == few[1], "of few seeds t has fewer degrees of freedom already"


def test_on_the_same_tokens_nothing_is_drawn():
    drift = on_same_tokens(2.0, 2.5, 0.125)
    assert (drift.difference, drift.low, drift.high, drift.resolution) == (0.5, 0.375, 0.625, 0.25)
    assert drift.beyond(0.37)
    assert not drift.beyond(0.375), "at the tolerance is within it"
    assert on_same_tokens(2.5, 2.0, 0.125).beyond(0.37)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: between_seeds([1.0], [2.0], 1), "takes two"),
        (lambda: between_seeds([1.0, 2.0], [], 1), "takes two"),
        (lambda: between_seeds([1.0, math.nan], [2.0], 1), "finite"),
        (lambda: between_seeds([1.0, 2.0], [math.inf], 1), "finite"),
        (lambda: between_seeds([1.0, 2.0], [1.0], 0), "cannot be looked at"),
        (lambda: on_same_tokens(1.0, math.nan, 0.1), "compare"),
        (lambda: on_same_tokens(1.0, 1.0, -0.1), "compare"),
    ],
)
def test_what_cannot_be_compared(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def simulate(draw, n, together, runs, shift=0.0, tolerance=2.0, seed=0, noise=0.0):
    """Whole checks of `together` numbers: the share of alarms, and how often a shift of the stated size is found.

    tolerance: in standard deviations of the baseline. shift: added to the first number, in the stated size.
    """
    rng = np.random.default_rng(seed)
    alarms = found = 0
    for _ in range(runs):
        values = draw(rng, (together, n + 1))
        heavy, moved = bool(apart(values[:, :n], [noise] * together)), []
        for i, row in enumerate(values):
            allowed = tolerance * spread(row[:n])
            new = row[n]
            if shift and i == 0:
                stated = allowed + between_seeds(row[:n], row[:1], together, noise, heavy).resolution
                new += shift * max(stated, 2 * allowed)
            moved.append(between_seeds(row[:n], [new], together, noise, heavy).beyond(allowed))
        alarms += any(moved)
        found += moved[0]
    return alarms / runs, found / runs


def normal(rng, shape):
    return rng.normal(size=shape)


def alike(rng, shape):
    """Numbers that move together, as those of one model's layers do."""
    return 0.9 * rng.normal(size=shape[1]) + 0.4 * rng.normal(size=shape)


@pytest.mark.parametrize("draw", [normal, alike])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_one_check_in_a_hundred_raises_a_false_alarm_at_most(draw, n):
    """Without any tolerance, so that the intervals alone are tried; 1,500 checks, where 1 % has an error of 0.26 %."""
    alarms, _ = simulate(draw, n, together=12, runs=1500, tolerance=0.0)
    assert alarms <= ALARMS + 3 * 0.0026


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("tolerance", [0.0, 2.0, 30.0])
def test_a_change_of_the_stated_size_is_found(n, tolerance):
    """At least 95 times in a hundred; of 1,000 runs, where 95 % has an error of 0.7 %."""
    _, found = simulate(normal, n, together=4, runs=1000, shift=1.0, tolerance=tolerance, seed=1)
    assert found >= 0.95 - 3 * 0.007


def test_a_change_of_half_the_stated_size_often_is_not():
    """The check can fail: what is stated is no exaggeration."""
    _, found = simulate(normal, 5, together=4, runs=500, shift=0.5, tolerance=2.0, seed=2)
    assert found < 0.9


def test_looking_at_more_numbers_takes_more():
    assert critical(4, 1) < critical(4, 10) < critical(4, 300)
    np.testing.assert_allclose(critical(4, 1), stats.t.ppf(0.995, 4))
