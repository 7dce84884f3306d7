"""The one statistical core that every probe uses: grouped moments, similarity, jackknife intervals, verdicts.

groups         the 64 fixed groups of documents
accumulators   streaming moments per group
moments        what accumulators compute, and how it is pooled
histogram      quantiles of a stream: descriptors, without an interval
similarity     canonical correlations, linear CKA, effective rank, cosine
jackknife      estimates with intervals, paired differences
verdict        the one rule: learned, at-init or inconclusive
"""

from .accumulators import GroupedCovariance, GroupedCrossCovariance, GroupedMean, GroupedMoments
from .arrays import as_float64
from .groups import GROUPS, MIN_GROUPS
from .histogram import Histogram
from .jackknife import Estimate, exactly, jackknife, jackknife_each, p_value, paired_difference, second_order
from .moments import Moments
from .similarity import (
    CCA_BOUNDS,
    CKA_BOUNDS,
    COSINE_BOUNDS,
    Spectrum,
    TokenCosine,
    canonical,
    cca,
    cca_of,
    cka_of,
    effective_rank,
    effective_rank_of,
    linear_cka,
    mean_of,
    rounding,
    token_cosine,
    varies,
)
from .verdict import CLAIMS, Evidence, FreshInit, Judgement, Verdict, judge

__all__ = [
    "CCA_BOUNDS",
    "CKA_BOUNDS",
    "CLAIMS",
    "COSINE_BOUNDS",
    "GROUPS",
    "MIN_GROUPS",
    "Estimate",
    "Evidence",
    "FreshInit",
    "GroupedCovariance",
    "GroupedCrossCovariance",
    "GroupedMean",
    "GroupedMoments",
    "Histogram",
    "Judgement",
    "Moments",
    "Spectrum",
    "TokenCosine",
    "Verdict",
    "as_float64",
    "canonical",
    "cca",
    "cca_of",
    "cka_of",
    "effective_rank",
    "effective_rank_of",
    "exactly",
    "jackknife",
    "jackknife_each",
    "judge",
    "linear_cka",
    "mean_of",
    "p_value",
    "paired_difference",
    "rounding",
    "second_order",
    "token_cosine",
    "varies",
]
