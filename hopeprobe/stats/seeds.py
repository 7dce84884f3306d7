"""Means over training runs that differ in their seed alone, and what so many runs can resolve.

    interval    mean ± t_{0.975, n−1} · s/√n of n values, one a seed; of paired values, of their differences
    p           two-sided t-test of a mean against 0
    resolution  the smallest |mean| whose t-test at 5 % is significant with probability 0.8, if s is right: δ with
                P(|T'| > t_{0.975, n−1}) = 0.8, T' noncentral t with n−1 df and noncentrality δ√n/s

Values are taken for normal between seeds. The interval says what another seed would give on the same tokens; of other
tokens it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from .verdict import POWER

LEVEL = 0.95


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds. NaN for the interval, p and resolution of fewer than two."""

    mean: float
    ci_low: float
    ci_high: float
    sd: float
    n: int
    p: float
    resolution: float

    @property
    def excludes_zero(self) -> bool:
        """Does the interval lie on one side of 0."""
        return self.ci_low > 0 or self.ci_high < 0


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean, interval, test against 0 and resolution of one value a seed; ValueError for a value that is not finite."""
    given = np.asarray(values, dtype=np.float64)
    if not np.isfinite(given).all():
        raise ValueError(f"a value is not finite: {list(values)}")
    n = len(given)
    if n < 2:
        nan = math.nan
        return OverSeeds(float(given[0]) if n else nan, nan, nan, nan, n, nan, nan)
    # Of the differences to the first, so that equal values have a spread of exactly 0.
    mean = float(given[0] + np.mean(given - given[0]))
    sd = float(np.std(given - given[0], ddof=1))
    se = sd / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * se
    p = 2 * float(stdtr(n - 1, -abs(mean) / se)) if se > 0 else float(mean == 0)
    return OverSeeds(mean, mean - half, mean + half, sd, n, p, resolution(sd, n))


def resolution(sd: float, n: int, power: float = POWER) -> float:
    """The smallest mean of n ≥ 2 values with standard deviation `sd` that a two-sided t-test at 5 % finds so often."""
    if sd == 0:
        return 0.0
    from scipy.optimize import brentq
    from scipy.special import ncfdtr

    df, critical = n - 1, float(stdtrit(n - 1, (1 + LEVEL) / 2))

    def missed(noncentrality: float) -> float:  # the square of a noncentral t is a noncentral F
        return float(ncfdtr(1, df, noncentrality**2, critical**2)) - (1 - power)

    high = critical + 1.0
    while missed(high) > 0:
        high *= 2
    return float(brentq(missed, 0.0, high)) * sd / math.sqrt(n)


@dataclass(frozen=True)
class Contrast:
    """The difference of two means over unrelated seeds, by Welch's t-test; NaN where either has fewer than two."""

    difference: float
    ci_low: float
    ci_high: float
    p: float
    resolution: float  # (t_0.975 + t_0.8) standard errors


def between(one: OverSeeds, other: OverSeeds) -> Contrast:
    """`one` less `other`, whose seeds have nothing to do with each other."""
    difference = one.mean - other.mean
    if one.n < 2 or other.n < 2:
        return Contrast(difference, math.nan, math.nan, math.nan, math.nan)
    parts = [one.sd**2 / one.n, other.sd**2 / other.n]
    se = math.sqrt(sum(parts))
    if se == 0:
        return Contrast(difference, difference, difference, float(difference == 0), 0.0)
    df = se**4 / sum(part**2 / (group.n - 1) for part, group in zip(parts, (one, other), strict=True))
    t = float(stdtrit(df, (1 + LEVEL) / 2))
    return Contrast(
        difference,
        difference - t * se,
        difference + t * se,
        2 * float(stdtr(df, -abs(difference) / se)),
        (t + float(stdtrit(df, POWER))) * se,
    )
