"""Similarity and dimensionality of representations: pure float64 functions, batched over leading axes.

A statistic that its input does not define (no variance, a vector of length zero) is NaN, never 0: a probe
turns such a row into `no-signal` or `n/a`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hopeprobe.errors import MeasurementError

from .arrays import BoolArray, FloatArray, as_float64

if TYPE_CHECKING:
    from .moments import Moments

CCA_BOUNDS = (0.0, 1.0)
CKA_BOUNDS = (0.0, 1.0)
COSINE_BOUNDS = (-1.0, 1.0)

_ROUNDING = (
    1e-12  # a ratio this close to 1 is 1: what float64 sums of a few hundred terms leave of an exact 1
)
_TOKENS_PER_DIMENSION = 5
_FLOAT32_NOISE = 4 * float(np.finfo(np.float32).eps)


def linear_cka(c_xx: Any, c_yy: Any, c_xy: Any) -> FloatArray:
    """Linear centred kernel alignment of two sets of features, in [0, 1].

        CKA = ‖C_xy‖²_F / (‖C_xx‖_F ‖C_yy‖_F)

    Shapes [..., D_x, D_x], [..., D_y, D_y], [..., D_x, D_y] → float64 [...]. Covariances or comoments: the
    ratio is scale-free. NaN where C_xx or C_yy is all zero, or NaN itself (an empty set). Raises
    MeasurementError on infinite entries. Source: Kornblith et al. 2019, Similarity of Neural Network
    Representations Revisited, section 3.
    """
    xx, yy, xy = (_frobenius(c) for c in (c_xx, c_yy, c_xy))
    undefined = np.full(np.broadcast_shapes(xx.shape, yy.shape, xy.shape), np.nan)
    defined = (xx > 0) & (yy > 0)
    # Two ratios rather than one: their product neither overflows nor underflows where the squares would.
    left = np.divide(xy, xx, out=undefined.copy(), where=defined)
    right = np.divide(xy, yy, out=undefined, where=defined)
    cka: FloatArray = left * right
    return np.where(np.abs(cka - 1.0) <= _ROUNDING, 1.0, cka)


class Spectrum(NamedTuple):
    """Covariances taken apart once, for all that is asked of them; [..., D, D].

    Attributes:
        norm: ‖C‖_F, [...]; not positive where there is no spectrum: no variance, or NaN.
        scaled: C / ‖C‖_F, so that the smallest representable variances keep theirs; 0 without a spectrum.
        eigenvalues: of `scaled`, float64 [..., D], none negative.

    """

    norm: FloatArray
    scaled: FloatArray
    eigenvalues: FloatArray

    @classmethod
    def of(cls, c_xx: Any) -> Spectrum:
        """Decompose covariances. Raises MeasurementError on infinite entries."""
        c = as_float64(c_xx)
        norm = _frobenius(c)
        there = (norm > 0)[..., None, None]
        scaled = np.divide(c, norm[..., None, None], out=np.zeros_like(c), where=there)
        # Rounding leaves a zero eigenvalue slightly negative.
        return cls(norm, scaled, np.maximum(np.linalg.eigvalsh(scaled), 0.0))

    def effective_rank(self) -> FloatArray:
        """`effective_rank`, [...]."""
        total = self.eigenvalues.sum(axis=-1, keepdims=True)
        p = np.divide(self.eigenvalues, total, out=np.zeros_like(self.eigenvalues), where=total > 0)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
        rank = np.clip(np.exp(entropy), 1.0, self.eigenvalues.shape[-1])
        return np.where(self.norm > 0, rank, np.nan)

    def ridge(self, floor: Any = 0.0) -> FloatArray:
        """κ of `cca`, for `scaled`, [...]; 1 where there is no spectrum."""
        there = self.norm > 0
        total = np.trace(self.scaled, axis1=-2, axis2=-1)
        floor = np.divide(as_float64(floor), self.norm, out=np.zeros_like(self.norm), where=there)
        return np.where(there, _FLOAT32_NOISE**2 * total + floor, 1.0)


def effective_rank(c_xx: Any) -> FloatArray:
    """Effective rank of a set of features: exp of the entropy of its covariance spectrum, in [1, D].

        p_i = λ_i / Σ_k λ_k,   erank = exp(−Σ_i p_i ln p_i),   λ the eigenvalues of C_xx

    Shape [..., D, D] → float64 [...]. The spectrum is that of the covariance: variances along principal axes,
    the squares of the centred data's singular values. Roy & Vetterli 2007 (The effective rank: a measure of
    effective dimensionality, section 2) define it on the singular values of a matrix; here the matrix is the
    covariance. NaN where C_xx is all zero or NaN. Raises MeasurementError on infinite entries.
    """
    return Spectrum.of(c_xx).effective_rank()


def cca(c_xx: Any, c_yy: Any, c_xy: Any) -> FloatArray:
    """Mean squared canonical correlation of two sets of features, in [0, 1].

        W = (C_xx + κ_x)^(−1/2) C_xy (C_yy + κ_y)^(−1/2),   r = Σ_i (λ_i / (λ_i + κ))²,   λ those of C
        CCA = ‖W‖²_F / √(r_x r_y)

    Shapes [..., D_x, D_x], [..., D_y, D_y], [..., D_x, D_y] → float64 [...]; covariances or comoments. Linear
    CKA of the features after whitening: every direction counts alike, however little it varies, so that no
    invertible linear map of either set changes it (Kornblith et al. 2019, section 3: R²_CCA, where r_x = r_y).
    κ = (4 ε₃₂)² tr C is what float32 rounds: directions below it fade out, r counts those that are left. NaN
    where C_xx or C_yy is all zero or NaN. Raises MeasurementError on infinite entries.

    Squared, and over all directions, because that is a smooth function of the moments, which the jackknife
    needs. Cutting at 99 % of the variance first (SVCCA) is not: where leaving out a group moves the cut by one
    direction, the jackknife takes the jump for bias. On trained CMS levels that gave 1.11 [1.02, 1.20] where
    the plain value was 0.87.

    The plain value of n tokens is too high: for independent features by D/n times the number of tokens that act
    like one (those of a document are alike). What the jackknife leaves of that is still larger than the interval
    where tokens are few, so `second_order` has to follow it.
    """
    return canonical(Spectrum.of(c_xx), Spectrum.of(c_yy), c_xy)


def canonical(
    x: Spectrum, y: Spectrum, c_xy: Any, floors: tuple[Any, Any] = (0.0, 0.0), n: Any = np.inf
) -> FloatArray:
    """`cca` of what is taken apart already.

    floors: variances, [...], added to κ_x and κ_y. n: tokens, [...]; the value is NaN where they are fewer than
    five for each of r_x + r_y dimensions. With no more than those, correlations of exactly 1 are certain.
    """
    ridges = x.ridge(floors[0]), y.ridge(floors[1])
    counts = [
        np.square(side.eigenvalues / (side.eigenvalues + ridge[..., None])).sum(axis=-1)
        for side, ridge in zip((x, y), ridges, strict=True)
    ]
    defined = (x.norm > 0) & (y.norm > 0)
    scale = np.sqrt(np.where(defined, x.norm, np.inf)) * np.sqrt(np.where(defined, y.norm, np.inf))
    w = as_float64(c_xy) / scale[..., None, None]
    for side, ridge in zip((x, y), ridges, strict=True):
        ridged = side.scaled + ridge[..., None, None] * np.eye(side.scaled.shape[-1])
        w = np.swapaxes(_solve_lower(as_float64(np.linalg.cholesky(ridged)), w), -2, -1)
    size = np.where(defined, np.sqrt(counts[0] * counts[1]), 1.0)
    value = np.square(w).sum(axis=(-2, -1)) / size
    decided = defined & (_TOKENS_PER_DIMENSION * (counts[0] + counts[1]) <= as_float64(n))
    return np.where(decided, np.minimum(value, 1.0), np.nan)


class TokenCosine(NamedTuple):
    """Cosines, and the tokens that have none: take those out of the mask, and report their number."""

    value: FloatArray
    zero_norm: BoolArray

    @property
    def n_undefined(self) -> int:
        """How many pairs hold a vector of length zero."""
        return int(self.zero_norm.sum())


def token_cosine(x: Any, y: Any) -> TokenCosine:
    """Cosine of each pair of vectors: ⟨x, y⟩ / (‖x‖ ‖y‖), in [−1, 1]; [..., D] → `value` float64 [...].

    A pair with a vector of length zero has no cosine: `value` is NaN and `zero_norm` is True there. Vectors
    that are not finite give NaN. Raises ValueError when the shapes differ.
    """
    x, y = as_float64(x), as_float64(y)
    if x.shape != y.shape or x.ndim < 1:
        raise ValueError(f"x and y must have one shape [..., D], got {x.shape} and {y.shape}")
    scale_x, scale_y = (np.abs(v).max(axis=-1, keepdims=True) for v in (x, y))
    zero_norm = (scale_x == 0) | (scale_y == 0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # Largest entry 1: no square overflows or underflows, and a vector's cosine with itself is exactly 1.
        x, y = x / scale_x, y / scale_y
        value = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return TokenCosine(np.clip(value, *COSINE_BOUNDS), zero_norm[..., 0])


def mean_of(moments: Moments) -> FloatArray:
    """Return the mean "x", [B, *S]: the statistic to give to the jackknife with a `GroupedMean`."""
    return moments.mean()


def cka_of(moments: Moments) -> FloatArray:
    """`linear_cka` of moments that hold "xx", "yy", "xy", [B]; NaN where x or y does not vary (`varies`)."""
    cka = linear_cka(*(moments.covariance(pair) for pair in ("xx", "yy", "xy")))
    return np.where(varies(moments, "x") & varies(moments, "y"), cka, np.nan)


def cca_of(moments: Moments) -> FloatArray:
    """`cca` of moments that hold "xx", "yy", "xy", [B]; NaN where x or y does not vary, or n is too small."""
    x, y = (Spectrum.of(moments.covariance(pair)) for pair in ("xx", "yy"))
    floors = rounding(moments, "x"), rounding(moments, "y")
    value = canonical(x, y, moments.covariance("xy"), floors, moments.n)
    return np.where(varies(moments, "x") & varies(moments, "y"), value, np.nan)


def effective_rank_of(moments: Moments) -> FloatArray:
    """`effective_rank` of moments that hold "xx", [B]; NaN where x does not vary (`varies`)."""
    return np.where(varies(moments), effective_rank(moments.covariance()), np.nan)


def varies(moments: Moments, name: str = "x") -> BoolArray:
    """Whether a vector varies by more than float32 rounds its mean: tr C > (4 ε₃₂)² ‖mean‖², bool [B].

    Activations carry at most float32 precision; the spectrum of what rounding leaves of a constant is not a
    measurement.
    """
    trace = np.trace(moments.covariance(name * 2), axis1=-2, axis2=-1)
    above: BoolArray = trace > rounding(moments, name)
    return above


def rounding(moments: Moments, name: str = "x") -> FloatArray:
    """Variance that float32 may leave of a constant: (4 ε₃₂)² ‖mean‖², [B]."""
    noise: FloatArray = _FLOAT32_NOISE**2 * np.square(moments.mean(name)).sum(axis=-1)
    return noise


def _solve_lower(root: FloatArray, right: FloatArray) -> FloatArray:
    """root⁻¹ right, [..., D, D] and [..., D, E], `root` lower triangular."""
    from scipy.linalg import solve_triangular

    solved = np.empty_like(right)
    for at in np.ndindex(right.shape[:-2]):
        solved[at] = solve_triangular(root[at], right[at], lower=True, check_finite=False)
    return solved


def _frobenius(c: Any) -> FloatArray:
    c = as_float64(c)
    if np.isinf(c).any():
        raise MeasurementError("a covariance overflowed: the activations are too large to be measured")
    return np.asarray(np.linalg.norm(c, axis=(-2, -1)))
