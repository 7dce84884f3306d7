"""Quantiles of a stream: within the stated resolution of a sorted copy, whatever the order and the split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import Histogram
from hopeprobe.stats.histogram import RESOLUTION, SMALLEST

LOSSES = st.lists(st.floats(1e-8, 1e30), min_size=1, max_size=60)
QUANTILES = (0.0, 0.05, 0.1, 0.5, 0.9, 1.0)


def filled(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


@given(LOSSES, st.floats(0, 1))
def test_a_quantile_is_within_the_resolution_of_the_sorted_value(values, q):
    rank = max(math.ceil(q * len(values) - 1e-9), 1)
    assert filled(values).quantile(q) == pytest.approx(sorted(values)[rank - 1], rel=RESOLUTION * (1 + 1e-9))


@given(LOSSES, st.randoms(), st.integers(0, 60))
def test_neither_order_nor_merging_changes_anything(values, shuffler, cut):
    whole = filled(values)
    shuffled = shuffler.sample(values, len(values))
    merged = filled(shuffled[:cut])
    merged.merge(filled(shuffled[cut:]))
    assert merged.n == whole.n
    assert (merged.smallest, merged.largest) == (min(values), max(values))
    assert [merged.quantile(q) for q in QUANTILES] == [whole.quantile(q) for q in QUANTILES]


def test_agrees_with_numpy_on_a_skewed_sample():
    values = np.random.default_rng(0).lognormal(1, 2, (300, 401))
    histogram = filled(*values)
    for q in QUANTILES:
        reference = np.quantile(values, q, method="inverted_cdf")
        assert histogram.quantile(q) == pytest.approx(reference, rel=RESOLUTION)
    assert histogram.quantile(0) == values.min()
    assert histogram.quantile(1) == values.max()


def test_memory_does_not_grow_with_values():
    rng, histogram = np.random.default_rng(0), Histogram()
    for _ in range(10):
        histogram.update(rng.uniform(0.01, 100, 200_000))
    assert histogram.n == 2_000_000
    assert len(histogram._counts) <= 500 * math.log(100 / 0.01) + 2


def test_no_loss_at_all_is_zero_and_a_constant_is_itself():
    histogram = filled([0.0, 0.0, SMALLEST / 2, 3.0])
    assert [histogram.quantile(q) for q in (0, 0.5, 0.75, 1)] == [0, 0, 0, 3.0]
    assert filled([2.5] * 7).quantile(0.5) == 2.5
    assert filled([-1e-6, -1e-7, 1.0]).quantile(0.5) == 0, "what rounding leaves of a loss of 0"
    assert filled([-1e-6, 1.0]).quantile(0) == -1e-6


def test_half_precision_is_upcast_before_anything_is_computed():
    values = torch.linspace(0.1, 30, 5000).to(torch.bfloat16)
    reference = np.quantile(values.double().numpy(), 0.3, method="inverted_cdf")
    assert filled(values).quantile(0.3) == pytest.approx(reference, rel=RESOLUTION)


def test_what_is_not_finite_is_refused_whole():
    histogram = filled([1.0])
    with pytest.raises(MeasurementError, match="1 of 3 values are not finite"):
        histogram.update([2.0, math.nan, 5.0])
    assert (histogram.n, histogram.largest) == (1, 1.0)


def test_no_values_no_quantile():
    empty = filled([])
    assert empty.n == 0
    assert all(map(math.isnan, (empty.quantile(0.5), empty.smallest, empty.largest)))
    empty.merge(Histogram())
    assert math.isnan(empty.quantile(0))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        empty.quantile(1.5)
