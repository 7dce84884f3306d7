"""A chunk of delta-rule writes in closed form: no per-token d x d tensor, no per-token loop.

Per token t of a chunk, gradients taken at the chunk's start (paper "Nested Learning", section 8):

    W_t = W_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t U_t k_t^T          matrices that read k
    W_t = alpha_t W_{t-1} - eta_t (dL/dout_t) a_t^T                        W1, which reads the activation a

The first is a gated delta rule; with gamma_t = prod_{s<=t} alpha_s its chunk solves one unit-triangular system

    (I + tril(diag(eta)(Gamma * K K^T), -1)) E = diag(eta)(U + diag(gamma_{t-1}) K W0^T)
    Gamma_ti = gamma_{t-1} / gamma_i
    W_C = gamma_C W0 - E^T diag(gamma_C/gamma_i) K

(the WY form: Yang et al. 2024, arXiv 2412.06464). Cost O(C^2 d + C d^2) a chunk. Ratios are exponentials of differences
of log gamma, all at most 1, so nothing overflows however long the chunk or strong the decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkDecay(NamedTuple):
    """What a chunk does to every matrix, whatever it holds; shared by all memories that read the same k."""

    system: Tensor  # (B, C, C), unit lower triangular
    before: Tensor  # (B, C): gamma_{t-1}
    to_end: Tensor  # (B, C): gamma_C / gamma_t
    end: Tensor  # (B,): gamma_C


def chunk_decay(k: Tensor, eta: Tensor, log_alpha: Tensor) -> ChunkDecay:
    """Prepare a chunk from k (B, C, d), eta (B, C) >= 0 and log alpha (B, C) <= 0, both after the write gate."""
    log_gamma = log_alpha.cumsum(-1)
    log_before = log_gamma - log_alpha
    # The upper triangle would overflow: it is zeroed before the exponential, and again after.
    ratio = (log_before[:, :, None] - log_gamma[:, None, :]).tril(-1).exp()
    coupling = (eta[:, :, None] * ratio * (k @ k.mT)).tril(-1)
    system = coupling + torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    end = log_gamma[:, -1:]
    return ChunkDecay(system, log_before.exp(), (end - log_gamma).exp(), end[:, 0].exp())


def solve_errors(
    decay: ChunkDecay, eta: Tensor, push: Tensor, read_meta: Tensor | None, read: Tensor
) -> Tensor:
    """E of the equation above, (B, C, out): W_C = gamma_C W0 - E^T diag(gamma_C/gamma_i) K.

    Args:
        decay: of this chunk.
        eta: (B, C).
        push: (B, C, out), U_t = dL/d(W k_t) at the chunk's start.
        read_meta: (B, C, out), W_meta k_t where decay goes towards the meta weights, else None.
        read: (B, C, out), the decaying part read at k_t: (W - W_meta) k_t or W k_t.
    """
    target = push + decay.before[..., None] * read
    if read_meta is not None:
        target = target + read_meta
    scaled = eta[..., None] * target
    errors: Tensor = torch.linalg.solve_triangular(decay.system, scaled, upper=False, unitriangular=True)
    return errors


def gelu_slope(z: Tensor) -> Tensor:
    """Derivative of the exact GELU, z Phi(z): Phi(z) + z phi(z)."""
    cdf = 0.5 * (1.0 + torch.erf(z * 0.7071067811865476))
    return cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
