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

CKA_BOUNDS = (0.0, 1.0)
COSINE_BOUNDS = (-1.0, 1.0)

_ROUNDING = (
    1e-12  # a ratio this close to 1 is 1: what float64 sums of a few hundred terms leave of an exact 1
)
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


def effective_rank(c_xx: Any) -> FloatArray:
    """Effective rank of a set of features: exp of the entropy of its covariance spectrum, in [1, D].

        p_i = λ_i / Σ_k λ_k,   erank = exp(−Σ_i p_i ln p_i),   λ the eigenvalues of C_xx

    Shape [..., D, D] → float64 [...]. The spectrum is that of the covariance: variances along principal axes,
    the squares of the centred data's singular values. Roy & Vetterli 2007 (The effective rank: a measure of
    effective dimensionality, section 2) define it on the singular values of a matrix; here the matrix is the
    covariance. NaN where C_xx is all zero or NaN. Raises MeasurementError on infinite entries.
    """
    c = as_float64(c_xx)
    norm = _frobenius(c)
    defined = norm > 0
    # Scaled to norm 1, so that the smallest representable variances keep their spectrum.
    safe = np.divide(c, norm[..., None, None], out=np.zeros_like(c), where=defined[..., None, None])
    eigenvalues = np.maximum(
        np.linalg.eigvalsh(safe), 0.0
    )  # rounding leaves a zero eigenvalue slightly negative
    total = eigenvalues.sum(axis=-1, keepdims=True)
    p = np.divide(eigenvalues, total, out=np.zeros_like(eigenvalues), where=total > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return np.where(defined, np.clip(np.exp(entropy), 1.0, c.shape[-1]), np.nan)


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


def effective_rank_of(moments: Moments) -> FloatArray:
    """`effective_rank` of moments that hold "xx", [B]; NaN where x does not vary (`varies`)."""
    return np.where(varies(moments), effective_rank(moments.covariance()), np.nan)


def varies(moments: Moments, name: str = "x") -> BoolArray:
    """Whether a vector varies by more than float32 rounds its mean: tr C > (4 ε₃₂)² ‖mean‖², bool [B].

    Activations carry at most float32 precision; the spectrum of what rounding leaves of a constant is not a
    measurement.
    """
    trace = np.trace(moments.covariance(name * 2), axis1=-2, axis2=-1)
    floor = _FLOAT32_NOISE**2 * np.square(moments.mean(name)).sum(axis=-1)
    above: BoolArray = trace > floor
    return above


def _frobenius(c: Any) -> FloatArray:
    c = as_float64(c)
    if np.isinf(c).any():
        raise MeasurementError("a covariance overflowed: the activations are too large to be measured")
    return np.asarray(np.linalg.norm(c, axis=(-2, -1)))
