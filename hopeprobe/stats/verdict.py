"""The one rule that turns evidence into verdicts, for all rows of one statistic.

    p = max(p_fresh, p_own)                      both nulls must be rejected; none without fresh-init
    p_fresh: t = (x − m) / (s √(1 + 1/K)), K − 1 df, two-sided: a prediction test of the checkpoint's value x
             against the mean m and standard deviation s of K fresh re-initialisations, on the same tokens
    p_own:   jackknife-t of the paired difference to the run's own initial weights; of an exact number, as a
             norm of weights is, 0 for any difference
    q:       Benjamini & Hochberg 1995 over all rows that have a p

`learned` when q ≤ 0.05 and the difference exceeds the smallest effect of interest; `at-init` when the
difference's 95 % interval lies within plus or minus that effect; else `inconclusive`. A row that was not
measured is never either, and without fresh-init nothing is `learned`: own-init alone cannot tell training
from what any seed does.

Measured by simulation, all models alike but for their seed, K = 10: with normal seed-to-seed values 5 % of
single rows and of families of ten rows hold a false `learned`. The prediction test takes those values for
normal: with lognormal ones (σ = 0.5) it is 6.5 % of single rows and 21 % of families of ten. Where values
are known to be skewed between seeds, judge them on a scale on which they are symmetric, such as the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from hopeprobe.errors import MeasurementError

from .groups import MIN_GROUPS
from .jackknife import Estimate, p_value, t_test

if TYPE_CHECKING:
    from collections.abc import Sequence

FALSE_DISCOVERY_RATE = 0.05
POWER = 0.8


class Verdict(str, Enum):
    """What a row says about one mechanism.

    `untrained` is integrity's own, and that of every row beside it which the rule left open (`analysis.py`).
    """

    LEARNED = "learned"
    AT_INIT = "at-init"
    COLLAPSED = "collapsed"
    DIVERGED = "diverged"
    NO_SIGNAL = "no-signal"
    UNTRAINED = "untrained"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "n/a"

    def __str__(self) -> str:
        return self.value


CLAIMS = frozenset({Verdict.LEARNED, Verdict.AT_INIT})
"""Verdicts that claim a measurement; only the rule may give them."""


@dataclass(frozen=True)
class FreshInit:
    """A statistic on K ≥ 2 fresh re-initialisations, and the checkpoint's own value on the same tokens.

    Raises ValueError under two values, MeasurementError when one is not finite.
    """

    values: tuple[float, ...]
    checkpoint: float

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(
                f"the fresh-init null needs at least two re-initialisations, got {len(self.values)}"
            )
        if not np.isfinite([*self.values, self.checkpoint]).all():
            raise MeasurementError("a value of the fresh-init null, or the checkpoint's own, is not finite")

    @property
    def mean(self) -> float:
        """Mean of the K values; exact when all are the same."""
        return self.values[0] + float(np.mean(np.subtract(self.values, self.values[0])))

    @property
    def difference(self) -> float:
        """The checkpoint's value less the mean of the fresh ones."""
        return self.checkpoint - self.mean

    @property
    def prediction_se(self) -> float:
        """Spread of one more draw about the mean of K, s √(1 + 1/K); exactly 0 when all values are equal."""
        return float(np.std(np.subtract(self.values, self.values[0]), ddof=1)) * math.sqrt(
            1 + 1 / len(self.values)
        )

    @property
    def df(self) -> int:
        """K − 1."""
        return len(self.values) - 1


@dataclass(frozen=True)
class Evidence:
    """All that the rule may use for one row.

    Attributes:
        estimate: the statistic on the checkpoint, all tokens.
        own_init: the paired difference checkpoint − own initial weights, or None without them.
        fresh: the fresh-init null, or None when it was not asked for. One that was asked for and could not be
            measured takes an override: it has rejected nothing.
        override: a verdict the probe must give itself because there is nothing to test (collapsed, diverged,
            no-signal, untrained, n/a, inconclusive). Raises ValueError for `learned` and `at-init`.
        note: what the probe wants the row to say.

    """

    estimate: Estimate
    own_init: Estimate | None = None
    fresh: FreshInit | None = None
    override: Verdict | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.override in CLAIMS:
            raise ValueError(f"a probe cannot decide {self.override} itself: that takes the rule")


@dataclass(frozen=True)
class Judgement:
    """Verdict, p and q of one row, and the smallest difference found with 80 % power; NaN where none."""

    verdict: Verdict
    p: float
    q: float
    min_detectable: float
    note: str


def judge(evidence: Sequence[Evidence], smallest_effect: float | Sequence[float]) -> list[Judgement]:
    """Judge all rows of one statistic together, in order.

    `smallest_effect` is in the statistic's unit, one for all rows or one for each. Without own-init the
    fresh-init null decides alone: the effect is the difference to its mean on the tokens of that null, and its
    interval, for `at-init`, is as wide about that difference as the estimate's about its value. Without
    fresh-init a row has no p and is `at-init` or `inconclusive`. Either way the note says so. Neither null,
    under `MIN_GROUPS` groups (unless it is exact), no interval: `inconclusive`. A value that is NaN: `n/a`.

    min_detectable = (t_{0.975} + t_{0.8}) · se of the difference to the null; with two nulls the larger one,
    as both must be rejected. Raises ValueError unless every smallest effect is finite and not negative.
    """
    given = np.asarray(smallest_effect, dtype=np.float64)
    for effect in given.ravel().tolist():
        if not (math.isfinite(effect) and effect >= 0):
            raise ValueError(f"the smallest effect must be finite and not negative, got {effect}")
    effects = np.broadcast_to(given, len(evidence)).tolist()
    p = np.array([_p(row) for row in evidence], dtype=np.float64)
    q = benjamini_hochberg(p)
    return [
        _judge_row(row, float(p_row), float(q_row), effect)
        for row, p_row, q_row, effect in zip(evidence, p, q, effects, strict=True)
    ]


def _undecidable(row: Evidence) -> tuple[Verdict, str] | None:
    """Return the verdict of a row in which the rule has nothing to test, and why."""
    estimate, own = row.estimate, row.own_init
    if row.override is not None:
        return row.override, ""
    if not math.isfinite(estimate.value) or (estimate.n == 0 and not estimate.exact):
        return Verdict.NOT_APPLICABLE, "not measured: the statistic is not defined on these tokens"
    n_groups = min(estimate.n_groups, own.n_groups if own else estimate.n_groups)
    if n_groups < MIN_GROUPS and not estimate.exact:
        return Verdict.INCONCLUSIVE, f"only {n_groups} groups of documents, an interval needs {MIN_GROUPS}"
    if own is None and row.fresh is None:
        return Verdict.INCONCLUSIVE, "no null: neither own-init weights nor fresh re-initialisations"
    if not (math.isfinite((own or estimate).se) and math.isfinite(estimate.ci_low)):
        return Verdict.INCONCLUSIVE, "no interval: the statistic is not defined without one of the groups"
    return None


def _p(row: Evidence) -> float:
    if _undecidable(row) or row.fresh is None:
        return math.nan
    p_fresh = t_test(row.fresh.difference, row.fresh.prediction_se, row.fresh.df)
    p_own = p_value(row.own_init) if row.own_init else 0.0
    return max(p_fresh, p_own)


def benjamini_hochberg(
    p: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Q of each p over all that are not NaN; NaN for the others."""
    from scipy.stats import false_discovery_control  # slow to import, and needed only here

    given = np.asarray(p, dtype=np.float64)
    q = np.full_like(given, np.nan)
    tested = np.isfinite(given)
    if tested.any():
        q[tested] = false_discovery_control(given[tested], method="bh")
    return q


def _judge_row(row: Evidence, p: float, q: float, smallest_effect: float) -> Judgement:
    notes = [row.note] if row.note else []
    decided = _undecidable(row)
    if decided:
        verdict, why = decided
        notes += [why] if why else []
        return Judgement(verdict, p, q, _min_detectable(row), "; ".join(notes))
    if row.own_init is not None:
        difference, low, high = row.own_init.value, row.own_init.ci_low, row.own_init.ci_high
        if row.fresh is None:
            notes.append("own-init alone cannot show learning: fresh-init was not asked for")
    else:
        assert row.fresh is not None
        difference = row.fresh.difference
        # The estimate is of all tokens, the null of their first few: only the width carries over.
        low = difference + (row.estimate.ci_low - row.estimate.value)
        high = difference + (row.estimate.ci_high - row.estimate.value)
        notes.append("fresh-init alone decides: no own-init weights")
    if q <= FALSE_DISCOVERY_RATE and abs(difference) > smallest_effect:
        verdict = Verdict.LEARNED
    elif -smallest_effect <= low and high <= smallest_effect:
        verdict = Verdict.AT_INIT
    else:
        verdict = Verdict.INCONCLUSIVE
    return Judgement(verdict, p, q, _min_detectable(row), "; ".join(notes))


def _min_detectable(row: Evidence) -> float:
    spreads = []
    if row.own_init is not None:
        spreads.append((row.own_init.se, row.own_init.df))
    if row.fresh is not None:
        spreads.append((row.fresh.prediction_se, float(row.fresh.df)))
    sizes = [float(stdtrit(df, 0.975) + stdtrit(df, POWER)) * se for se, df in spreads]
    return math.nan if not sizes or any(math.isnan(size) for size in sizes) else max(sizes)
