"""The baseline that knows only how often each token occurs: a model no better than it uses no context."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hopeprobe.errors import BadInputError

_ALPHAS = np.logspace(-6, 3, 181)
_BLOCK = 1 << 20  # tokens counted at a time: bincount copies its input to int64


@dataclass(frozen=True, eq=False)
class Unigram:
    """p(w) = (c_w + α) / (N + α V), with the counts c_w of N training tokens over a vocabulary of V.

    alpha: the α that was chosen, > 0. surprisal: float64 [V], -log p(w) in nats, finite and > 0 (V ≥ 2).
    """

    alpha: float
    surprisal: npt.NDArray[np.float64] = field(repr=False)

    @classmethod
    def fit(cls, tokens: npt.NDArray[np.integer], vocab_size: int) -> Unigram:
        """Count `tokens` (integers [N], N ≥ 1, values 0 … vocab_size - 1) and choose α.

        α maximises the leave-one-out log-likelihood Σ_w c_w log((c_w - 1 + α) / (N - 1 + α V)) on a
        logarithmic grid from 1e-6 to 1e3: each token is predicted from all others, so no text is set aside
        and unseen tokens keep a fair share. Raises BadInputError for no tokens or one out of range.
        """
        counts = _counts(tokens, vocab_size)
        n = int(counts.sum())
        # Tokens that occur equally often have equal terms; there are far fewer counts than tokens.
        seen, how_many = np.unique(counts[counts > 0], return_counts=True)
        leave_one_out = [
            float(how_many @ (seen * np.log((seen - 1 + alpha) / (n - 1 + alpha * vocab_size))))
            for alpha in _ALPHAS
        ]
        alpha = float(_ALPHAS[int(np.argmax(leave_one_out))])
        surprisal = np.log(n + alpha * vocab_size) - np.log(counts + alpha)
        return cls(alpha=alpha, surprisal=surprisal)

    def loss(self, tokens: npt.NDArray[np.integer]) -> float:
        """Mean surprisal of `tokens` (integers [M], M ≥ 1, values 0 … V-1) in nats. Errors as `fit`."""
        counts = _counts(tokens, len(self.surprisal))
        return float(counts @ self.surprisal / counts.sum())


def _counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs: int64 [V]."""
    flat = np.asarray(tokens).ravel()
    if flat.size == 0:
        raise BadInputError("a unigram model needs at least one token")
    if flat.min() < 0 or flat.max() >= vocab_size:
        raise BadInputError(f"tokens reach from {flat.min()} to {flat.max()}, outside 0 … {vocab_size - 1}")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, flat.size, _BLOCK):
        counts += np.bincount(flat[start : start + _BLOCK], minlength=vocab_size)
    return counts
