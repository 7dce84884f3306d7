"""Quantiles of a stream of values ≥ 0, in memory that does not grow with it.

Counts in bins of one relative width (Masson, Rim & Lee 2019, DDSketch): a value x > 0 falls into bin
i = ⌈ln x / ln γ⌉, whose bounds are γ^(i−1) and γ^i, with γ = (1 + a)/(1 − a). Any x of the bin is within a · x of
its middle 2γ^i/(γ + 1). Counts are whole numbers, so that neither the order of updates nor merging changes anything.

Quantiles are descriptors: they come without an interval (no jackknife; it fails for quantiles).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from hopeprobe.errors import MeasurementError

from .arrays import as_float64

RESOLUTION = 1e-3
"""a: a quantile is off by at most this much, relative to the observed value it stands for."""

SMALLEST = 1e-9
"""Values up to this are counted as 0."""

_LOG_GAMMA = math.log1p(RESOLUTION) - math.log1p(-RESOLUTION)
_ZERO = -(2**62)  # the bin of values up to SMALLEST


class Histogram:
    """Counts of values; `n` of them, the smallest and the largest are exact (NaN for none).

    Memory: one integer for each bin that was met, 500 for each factor e between the smallest value and the largest.
    """

    def __init__(self) -> None:
        self.n = 0
        self.smallest = self.largest = math.nan
        self._counts: Counter[int] = Counter()

    def update(self, values: Any) -> None:
        """Add values of any shape. Raises MeasurementError, and adds nothing, where one is not finite."""
        x = as_float64(values).ravel()
        if not np.isfinite(x).all():
            raise MeasurementError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are not finite")
        if not x.size:
            return
        bins = np.full(x.shape, _ZERO, dtype=np.int64)
        above = x > SMALLEST
        bins[above] = np.ceil(np.log(x[above]) / _LOG_GAMMA)
        index, count = np.unique(bins, return_counts=True)
        self._counts.update(dict(zip(index.tolist(), count.tolist(), strict=True)))
        self._extend(x.size, float(x.min()), float(x.max()))

    def merge(self, other: Histogram) -> None:
        """Add all of `other`'s values, in place."""
        self._counts.update(other._counts)
        self._extend(other.n, other.smallest, other.largest)

    def quantile(self, q: float) -> float:
        """Find the ⌈q n⌉-th smallest value (the first for q = 0), within `RESOLUTION`; NaN without values.

        The first and the last are exact.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q is {q}; it must lie in [0, 1]")
        rank = max(1, math.ceil(q * self.n - 1e-9))  # 0.1 · 30 is a little over 3
        if rank in (1, self.n):
            return self.smallest if rank == 1 else self.largest
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= rank:
                return min(max(_middle(index), self.smallest), self.largest)
        raise AssertionError(f"{seen} values were counted, {self.n} came in")

    def _extend(self, n: int, smallest: float, largest: float) -> None:
        self.n += n
        # fmin and fmax pass over NaN: the ends of a histogram without values
        self.smallest = float(np.fmin(self.smallest, smallest))
        self.largest = float(np.fmax(self.largest, largest))


def _middle(index: int) -> float:
    return 0.0 if index == _ZERO else math.exp(index * _LOG_GAMMA) * (1 - RESOLUTION)
