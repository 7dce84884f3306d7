"""The one statistical core that every probe uses: grouped moments, similarity, jackknife intervals, verdicts.

groups         the 64 fixed groups of documents
accumulators   streaming moments per group
moments        what accumulators compute, and how it is pooled
histogram      quantiles of a stream: descriptors, without an interval
similarity     canonical correlations, linear CKA, effective rank, cosine
jackknife      estimates with intervals, paired differences
seeds          means over training runs, and what so many of them can resolve
verdict        the one rule: learned, at-init or inconclusive
"""

from .accumulators import GroupedCovariance, GroupedCrossCovariance, GroupedMean, GroupedMoments
from .arrays import as_float64
from .groups import GROUPS, MIN_GROUPS
from .histogram import Histogram
from .jackknife import Estimate, exactly, jackknife, jackknife_each, p_value, paired_difference, second_order
from .moments import Moments
from .seeds import Contrast, OverSeeds, between, over_seeds, resolution
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
from .verdict import CLAIMS, Evidence, FreshInit, Judgement, Verdict, benjamini_hochberg, judge

__all__ = [
    "CCA_BOUNDS",
    "CKA_BOUNDS",
    "CLAIMS",
    "COSINE_BOUNDS",
    "GROUPS",
    "MIN_GROUPS",
    "Contrast",
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
    "OverSeeds",
    "Spectrum",
    "TokenCosine",
    "Verdict",
    "as_float64",
    "benjamini_hochberg",
    "between",
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
    "over_seeds",
    "p_value",
    "paired_difference",
    "resolution",
    "rounding",
    "second_order",
    "token_cosine",
    "varies",
]
