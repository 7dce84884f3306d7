"""Rows about a gate of zeros and ones: pass rate, its entropy, what is kept less what is dropped, and their intervals.

x[column] of a row's moments is the gate. Documents without the rarer kind of token say nothing about it, however many
they are: with too few that have it no interval is claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import xlogy

from hopeprobe.stats import GROUPS, GroupedMoments, Moments, Verdict, as_float64, jackknife

from .base import Quantity

if TYPE_CHECKING:
    from hopeprobe.stats import Estimate
    from hopeprobe.stats.arrays import FloatArray

IN_USE = "in use"
AT = "tau="  # and a threshold: what a gate would be that has it
RATE_EFFECT = 0.05  # of all tokens
SHARE = (0.0, 1.0)

MIN_RARE_GROUPS = 16
"""Fewest groups of documents with a token dropped, and with one kept, for which an interval is claimed."""


def binary_entropy(p: FloatArray) -> FloatArray:
    """−p log2 p − (1 − p) log2(1 − p), bits, in [0, 1]; p in [0, 1], NaN stays NaN."""
    p = np.clip(p, 0.0, 1.0)  # a mean of zeros and ones may round to a little more than 1
    return as_float64(0.0 - (xlogy(p, p) + xlogy(1.0 - p, 1.0 - p)) / math.log(2))  # no −0


def pass_rate(moments: Moments, column: int) -> FloatArray:
    """Mean of x[column], the share of tokens that pass: float64 [B]."""
    return moments.mean()[:, column]


def gate_entropy(moments: Moments, column: int) -> FloatArray:
    """`binary_entropy` of `pass_rate`: float64 [B]."""
    return binary_entropy(pass_rate(moments, column))


def kept_less_dropped(moments: Moments, of: int) -> FloatArray:
    """Mean of x[of] over tokens with gate x[0] = 1, less that over tokens with 0: float64 [B].

    For a gate of zeros and ones this is cov(g, x) / (p (1 − p)). NaN where nothing is kept, or nothing dropped.
    """
    kept = kept_tokens(moments, 0)
    defined = (kept > 0) & (kept < moments.n)
    p = kept / np.maximum(moments.n, 1)
    covariance, nothing = moments.covariance("xx")[:, 0, of], np.full(p.shape, np.nan)
    difference: FloatArray = np.divide(covariance, p * (1 - p), out=nothing, where=defined)
    return difference


@dataclass(frozen=True)
class OfGate(Quantity):
    """A row about a gate of zeros and ones, which is x[column] of its only source."""

    column: int = 0

    def estimate(self) -> Estimate:
        """As any quantity's, without an interval where the rarer kind of token is in too few groups.

        Leaving out groups says nothing of tokens that no group holds: the interval of a gate that was never seen to
        close would have no width. For its rate there is a bound that does not need to have seen one.
        """
        found = super().estimate()
        if self.groups_of_rarer() >= MIN_RARE_GROUPS:
            return found
        nan = math.nan
        if self.place.statistic == "pass_rate" and found.plug_in == 1.0:
            return replace(found, value=1.0, ci_low=never_closed(found.n_groups), ci_high=1.0)
        return replace(found, value=found.plug_in, ci_low=nan, ci_high=nan, se=nan, df=nan)

    def groups_of_rarer(self) -> int:
        """Count the groups of documents in which a token passes, or those in which one does not: the fewer."""
        moments = self._moments()
        kept = kept_tokens(moments, self.column)
        return min(int(np.count_nonzero(kept)), int(np.count_nonzero(moments.n - kept)))

    def indecision(self) -> tuple[Verdict | None, str]:
        """Say what leaves the rule nothing to decide."""
        moments = self._moments()
        kept, n = int(kept_tokens(moments, self.column).sum()), int(moments.n.sum())
        which = "a gate at this threshold" if self.place.component.startswith(AT) else "the gate"
        if kept == n:
            why = f"{which} never closes: it selects nothing"
            if self.place.statistic != "pass_rate":
                return Verdict.NO_SIGNAL, why
            groups = int(np.count_nonzero(moments.n))
            enough = never_closed(groups) >= 1 - RATE_EFFECT
            return None if enough else Verdict.INCONCLUSIVE, f"{why}, in {groups} groups of documents"
        if kept == 0:
            return Verdict.NO_SIGNAL, f"{which} never opens: it selects nothing, and nothing would be written"
        if (groups := self.groups_of_rarer()) < MIN_RARE_GROUPS:
            rarer = (
                f"{n - kept} of {n} tokens are dropped" if n - kept < kept else f"{kept} of {n} tokens pass"
            )
            return Verdict.INCONCLUSIVE, (
                f"{rarer}, in {groups} of {GROUPS} groups of documents: an interval needs {MIN_RARE_GROUPS}"
            )
        return None, ""

    def _moments(self) -> Moments:
        (source,) = self.sources()
        return source.compute() if isinstance(source, GroupedMoments) else source


@dataclass(frozen=True)
class OfEntropy(OfGate):
    """The entropy of a gate."""

    def estimate(self) -> Estimate:
        """Its interval is what entropies the pass rates in the interval of the rate have.

        Where the gate passes about half of the tokens, entropy is at its top and hardly moves with the rate: the
        jackknife's own interval covers 80 % there.
        """
        found = super().estimate()
        if math.isnan(found.ci_low):
            return found
        rate = jackknife(partial(pass_rate, column=self.column), *self.sources(), bounds=SHARE)
        ends = [found.value, *binary_entropy(np.array([rate.ci_low, rate.ci_high])).tolist()]
        top = 1.0 if rate.ci_low <= 0.5 <= rate.ci_high else max(ends)
        return replace(found, ci_low=min(ends), ci_high=top)


def never_closed(groups: int) -> float:
    """Lower bound of a rate of 1, 95 %: of the share of groups without a dropped token, seen in all of `groups`."""
    return float(0.05 ** (1 / groups))


def kept_tokens(moments: Moments, column: int) -> FloatArray:
    """Tokens that pass, float64 [B]: a whole number."""
    kept: FloatArray = np.rint(moments.n * moments.means["x"][:, column])
    return kept
