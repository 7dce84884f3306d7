"""Counts, means and comoments, and the exact ways to pool them.

    n_b = number of tokens      mean_b = (1/n_b) Σ_t x_t      C_xy,b = Σ_t (x_t − mean_x,b)(y_t − mean_y,b)ᵀ

with one leading axis b: the groups of an accumulator, or the leave-out replicates made from them. Pooling
follows Chan, Golub & LeVeque 1983 (updating formulae and a pairwise algorithm for computing sample
variances): it is exact, and all parts of the state are pooled together, so that coupled moments stay
consistent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .arrays import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of `B` sets of tokens.

    Attributes:
        n: int64 [B], tokens in each set; 0 means empty, and then means and comoments are 0.
        means: name → float64 [B, *S].
        comoments: two names joined ("xx", "xy") → float64 [B, D_x, D_y], sums about the means, not divided by
            n.

    """

    n: IntArray
    means: Mapping[str, FloatArray]
    comoments: Mapping[str, FloatArray]

    def mean(self, name: str = "x") -> FloatArray:
        """Σ_t x_t / n, float64 [B, *S]; NaN where n = 0."""
        mean = self.means[name]
        return np.where(_column(self.n, mean) > 0, mean, np.nan)

    def covariance(self, pair: str = "xx") -> FloatArray:
        """C / n, float64 [B, D_x, D_y]; NaN where n = 0. By n, not n − 1: our statistics are scale-free."""
        comoment = self.comoments[pair]
        n = _column(self.n, comoment)
        return np.divide(comoment, n, out=np.full_like(comoment, np.nan), where=n > 0)

    def pooled(self) -> Moments:
        """All sets as one: the same parts with a leading axis of 1."""
        return self.pool(np.ones((1, self.n.size)))

    def leave_out(self, left_out: IntArray) -> Moments:
        """Pool, for each index in `left_out`, all other sets: the same parts, axis `len(left_out)`.

        Sums over the sets kept are formed directly, as one product of a 0/1 matrix with the stacked moments,
        not as the total less one set: nothing cancels when one set outweighs the rest. Cost:
        2·len(left_out)·B·D² flops.
        """
        keep = np.ones((len(left_out), self.n.size))
        keep[np.arange(len(left_out)), left_out] = 0.0
        return self.pool(keep)

    def pool(self, keep: FloatArray) -> Moments:
        """Pool, for each row of a 0/1 matrix [P, B], the sets with a 1: the same parts, axis P."""
        n = self.n.astype(np.float64)
        total = keep @ n
        share = 1.0 / np.maximum(total, 1.0)  # an empty pool keeps moments of 0
        deviations: dict[str, FloatArray] = {}
        shifts: dict[str, FloatArray] = {}
        means: dict[str, FloatArray] = {}
        for name, mean in self.means.items():
            centre = self._centre(mean)
            flat = np.where(n[:, None] > 0, mean.reshape(n.size, -1) - centre, 0.0)
            deviations[name] = flat
            shifts[name] = (keep @ (n[:, None] * flat)) * share[:, None]
            pooled = np.where(total[:, None] > 0, centre + shifts[name], 0.0)
            means[name] = pooled.reshape(len(keep), *mean.shape[1:])
        comoments: dict[str, FloatArray] = {}
        for pair, comoment in self.comoments.items():
            x, y = pair[0], pair[1]
            summed = (keep @ comoment.reshape(n.size, -1)).reshape(len(keep), *comoment.shape[1:])
            # Between the sets: one small product a pool, where [B, D_x, D_y] outer products would not fit a cache.
            weighted = (keep * n)[:, :, None] * deviations[x]
            summed += np.swapaxes(weighted, 1, 2) @ deviations[y]
            summed -= (total[:, None] * shifts[x])[:, :, None] * shifts[y][:, None, :]
            comoments[pair] = summed
        return Moments(np.rint(total).astype(np.int64), means, comoments)

    def _centre(self, mean: FloatArray) -> FloatArray:
        """Return the pooled mean, [prod S]: deviations from it are small, and 0 when all means are equal."""
        flat = mean.reshape(self.n.size, -1)
        used = self.n > 0
        if not used.any():
            return np.zeros(flat.shape[1])
        first = flat[np.argmax(used)]
        weights = self.n[used] / self.n.sum()
        centre: FloatArray = first + weights @ (flat[used] - first)
        return centre


def _column(n: IntArray, like: FloatArray) -> IntArray:
    return n.reshape(n.shape + (1,) * (like.ndim - 1))
