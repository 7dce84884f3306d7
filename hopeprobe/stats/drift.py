"""Has a number moved from a baseline: the interval of its difference, and the smallest change that it can show.

Between seeds, x_1..x_n the baseline's values and y_1..y_m those of other seeds, normal with one spread:

    d = mean(y) − mean(x)
    se = √(s² + f²) √(1/n + 1/m)            s² pooled over both, n + m − 2 degrees of freedom; f: noise, below
    interval: d ± t_{1 − α/2M, df} se       all M of one check hold together with probability 1 − α (Bonferroni)
    resolution = (t_{1 − α/2M, df} + t_{0.95, df}) se

A number has moved when its interval lies wholly outside plus or minus the tolerance. For m = 1 a change of tolerance
+ resolution, as it was stated with the baseline's own s, is then found with probability 0.95 at least, whatever the
spread: the distance that is left to the line, over s, has Student's t distribution. That is a mean over baselines. One
whose few seeds happened to lie close states a small resolution, and raises more false alarms than others.

False alarms of whole checks of 60 numbers, 1,000 each, at a tolerance of 0 and of 2 s: normal values, independent or
alike, at most 1.1 % and 1.1 % of 3 seeds, 1.0 % and 0.9 % of 5, 0.9 % and 0 % of 10. The far tails that this takes are
the normal's: with lognormal values (σ = 0.5) 2.3 % and 2.2 %, 5.9 % and 3.8 %, 23 % and 7 %; with Student's t of 3
degrees of freedom 3.1 % and 3.1 %, 8.2 % and 5.9 %, 31 % and 14 %.

On the same tokens with the same weights nothing is drawn: the interval is d ± noise, `noise` what arithmetic in another
order can do, and a change of tolerance + 2 noise is always found. Between seeds it is the least spread that a number is
taken to have: quantiles by a histogram, and rates near 0 or 1, come out the same of several seeds without being so of
the next, and a spread of nothing would call any other value a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

if TYPE_CHECKING:
    from collections.abc import Sequence

ALARMS = 0.01
"""Share of whole checks, of nothing that changed, that may find something."""
FOUND = 0.95
"""How often a change of the stated size is found."""


@dataclass(frozen=True)
class Drift:
    """A difference to a baseline with its interval, in the statistic's unit; NaN where it cannot be told."""

    difference: float
    low: float
    high: float
    resolution: float

    def beyond(self, tolerance: float) -> bool:
        """Whether the interval lies wholly outside [−tolerance, tolerance]."""
        return self.low > tolerance or self.high < -tolerance


def between_seeds(
    baseline: Sequence[float], values: Sequence[float], together: int, noise: float = 0.0
) -> Drift:
    """Set `values` of other seeds against those of a baseline, one of `together` numbers that one check looks at.

    Raises ValueError for a value that is not finite, under two values of the baseline, none to compare, or
    `together` under 1.
    """
    x, y = np.asarray(baseline, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"a value is not finite: {list(baseline)}, {list(values)}")
    if len(x) < 2 or not len(y):
        raise ValueError(f"{len(x)} values of a baseline and {len(y)} to compare: takes two and one at least")
    df = len(x) + len(y) - 2
    # Less the first, so that equal values have a spread of exactly 0.
    x_mean, y_mean = x[0] + np.mean(x - x[0]), y[0] + np.mean(y - y[0])
    squares = float(np.sum((x - x_mean) ** 2) + np.sum((y - y_mean) ** 2))
    se = math.sqrt((squares / df + noise**2) * (1 / len(x) + 1 / len(y)))
    half = critical(df, together) * se
    difference = float(y_mean - x_mean)
    return Drift(difference, difference - half, difference + half, half + float(stdtrit(df, FOUND)) * se)


def on_same_tokens(baseline: float, value: float, noise: float) -> Drift:
    """Set a number against what it was on the same tokens; noise: what rounding can do, not negative."""
    if not (math.isfinite(baseline) and math.isfinite(value) and noise >= 0):
        raise ValueError(f"cannot compare {value} with {baseline} ± {noise}")
    difference = value - baseline
    return Drift(difference, difference - noise, difference + noise, 2 * noise)


def spread(values: Sequence[float]) -> float:
    """Standard deviation of two values or more, exactly 0 where all are equal."""
    given = np.asarray(values, dtype=np.float64)
    return float(np.std(given - given[0], ddof=1))


def critical(df: int, together: int) -> float:
    """t_{1 − α/2M, df}, of M numbers that are looked at together."""
    if together < 1:
        raise ValueError(f"{together} numbers cannot be looked at")
    return float(-stdtrit(df, ALARMS / (2 * together)))
