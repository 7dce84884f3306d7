"""Has a number moved from a baseline: the interval of its difference, and the smallest change that it can show.

Between seeds, x_1..x_n the baseline's values and y_1..y_m those of other seeds, normal with one spread:

    d = mean(y) − mean(x)
    se = √(s² + f²) √(1/n + 1/m)            s² pooled over both, n + m − 2 degrees of freedom; f: noise, below
    interval: d ± t_{1 − α/2M, df} se       all M of one check hold together with probability 1 − α (Bonferroni)
    resolution = (t_{1 − α/2M, df} + t_{0.95, df}) se

A number has moved when its interval lies wholly outside plus or minus the tolerance. For m = 1 a change of tolerance
+ resolution, as it was stated with the baseline's own s, is then found with probability 0.95 at least, whatever the
spread: the distance that is left to the line, over s, has Student's t distribution. For m > 1 that is so of s as the
check has it, pooled over both, and so of no size that the baseline could state. That is a mean over baselines. One
whose few seeds happened to lie close states a small resolution, and raises more false alarms than others.

The far tails that this takes are the normal's. Whether they are right shows in the baseline itself: each seed is set
against the others as a check would set it, and where one of all n M values lies further out than normal ones do in one
baseline of five (`apart`), t has `HEAVY` degrees of freedom at most, in interval and resolution. Of normal values that
choice is independent of mean and s, so that both rates stay what they are.

False alarms of 5,000 whole checks of 60 numbers, at a tolerance of 0 and of 2 s, with 3, 5, 7 and 10 seeds; of normal
values and of those of Student's t, changes of the stated size were found in 94.3 to 96.9 %:

    normal                                      1.1, 1.1 %    1.0, 0.7 %    0.7, 0.3 %    0.6, 0.0 %
    Laplace                                     1.5, 1.4 %    2.9, 1.9 %    3.4, 1.4 %    1.7, 0.6 %
    lognormal, σ = 0.5                          2.0, 1.9 %    4.6, 2.8 %    3.1, 1.4 %    0.6, 0.2 %
    Student's t of 3 degrees of freedom         1.6, 1.5 %    5.6, 3.9 %    3.4, 2.2 %    1.1, 0.7 %

With n − 1 degrees of freedom throughout it was up to 9 and 6 % of 5 seeds, 29 and 14 % of 10. Lognormal values of σ = 1
are too much for either: 7 to 16 %.

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
HEAVY = 3
"""Degrees of freedom of t, at most, where seeds lie further apart than normal values do."""
_SUSPECTED = 0.2  # share of baselines of normal values that are taken for such


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
    baseline: Sequence[float],
    values: Sequence[float],
    together: int,
    noise: float = 0.0,
    heavy: bool = False,
) -> Drift:
    """Set `values` of other seeds against those of a baseline, one of `together` numbers that one check looks at.

    heavy: whether tails are taken for heavier than the normal's.

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
    tails = min(df, HEAVY) if heavy else df
    half = critical(tails, together) * se
    difference = float(y_mean - x_mean)
    return Drift(difference, difference - half, difference + half, half + float(stdtrit(tails, FOUND)) * se)


def apart(values: Sequence[Sequence[float]], noise: Sequence[float]) -> list[tuple[int, int]]:
    """Find what lies further from the other seeds than normal values do: (which number, which seed).

    values: of a baseline, a row a number and a column a seed; under three nothing can be told. noise: one a number.
    """
    x, f = np.asarray(values, dtype=np.float64), np.asarray(noise, dtype=np.float64)[:, None]
    n = x.shape[1]
    if n < 3:
        return []
    r = x - x[:, :1]
    r -= r.mean(axis=1, keepdims=True)
    # Each less the mean of the others, and their variance, from those of all.
    difference = r * n / (n - 1)
    variance = np.maximum((np.sum(r**2, axis=1, keepdims=True) - r * difference) / (n - 2), 0.0)
    se = np.sqrt((variance + f**2) * n / (n - 1))
    far = np.abs(difference) > critical(n - 2, x.size, _SUSPECTED) * se
    return [(int(which), int(seed)) for which, seed in np.argwhere(far)]


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


def critical(df: int, together: int, alarms: float = ALARMS) -> float:
    """t_{1 − α/2M, df}, of M numbers that are looked at together."""
    if together < 1:
        raise ValueError(f"{together} numbers cannot be looked at")
    return float(-stdtrit(df, alarms / (2 * together)))
