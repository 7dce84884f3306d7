"""A chunk of delta-rule writes in closed form: no per-token d x d tensor, no per-token loop.

Per token t of a chunk, gradients taken at the chunk's start (paper "Nested Learning", section 8):

    W_t = W_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t U_t k_t^T          matrices that read k
    W_t = alpha_t W_{t-1} - eta_t (dL/dout_t) a_t^T                        W1, which reads the activation a

The first is a gated delta rule; with gamma_t = prod_{s<=t} alpha_s its chunk solves one unit-triangular system

    A = I + tril(diag(eta)(Gamma * K K^T), -1),  Gamma_ti = gamma_{t-1} / gamma_i
    A E = S,  S = diag(eta)(U + diag(gamma_{t-1}) K W0^T)
    W_C = gamma_C W0 - E^T diag(gamma_C/gamma_i) K

(the WY form: Yang et al. 2024, arXiv 2412.06464). With S = diag(eta) R the system is solved on the other side:
E^T diag(gamma_C/gamma_i) K = R^T X, X = diag(eta) A^-T diag(gamma_C/gamma_i) K, which serves every matrix that reads k.
Cost O(C^2 d + C d^2) a chunk. Ratios are exponentials of differences of log gamma, all at most 1: nothing overflows,
however long the chunk or strong the decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """What a chunk does to every matrix, whatever it holds; shared by all memories that read the same k."""

    keys: Tensor  # (B, C, d): X
    before: Tensor  # (B, C): gamma_{t-1}
    to_end: Tensor  # (B, C): gamma_C / gamma_t
    end: Tensor  # (B,): gamma_C


def prepare(k: Tensor, eta: Tensor, log_alpha: Tensor) -> Chunk:
    """Prepare a chunk from k (B, C, d), eta (B, C) >= 0 and log alpha (B, C) <= 0, both after the write gate."""
    log_gamma = log_alpha.cumsum(-1)
    log_before = log_gamma - log_alpha
    # The upper triangle would overflow; of the system only what is below its diagonal is ever looked at.
    ratio = (log_before[:, :, None] - log_gamma[:, None, :]).tril(-1).exp()
    below = eta[:, :, None] * ratio * (k @ k.mT)
    last = log_gamma[:, -1:]
    to_end = (last - log_gamma).exp()
    # Inverted and multiplied: solved for the keys themselves, which have more columns, it takes twice the time.
    eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device).expand_as(below)
    inverse = torch.linalg.solve_triangular(below.mT, eye, upper=True, unitriangular=True)
    keys = eta[..., None] * (inverse @ (to_end[..., None] * k))
    return Chunk(keys, log_before.exp(), to_end, last[:, 0].exp())


def errors(chunk: Chunk, push: Tensor, read: Tensor, read_meta: Tensor | None) -> Tensor:
    """R = U + diag(gamma_{t-1}) K W0^T, (B, C, out): W_C = gamma_C W0 - R^T X, W the part that decays.

    Args:
        chunk: of `prepare`.
        push: (B, C, out), U_t = dL/d(W k_t) at the chunk's start.
        read: (B, C, out), W k_t at the chunk's start.
        read_meta: (B, C, out), W_meta k_t where decay goes towards the meta weights: it is W - W_meta that decays.
    """
    before = chunk.before[..., None]
    if read_meta is None:
        return torch.addcmul(push, before, read)
    return push + torch.lerp(read_meta, read, before)


def gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of the exact GELU, z Phi(z), at z: grad (Phi(z) + z phi(z)). One pass, differentiable itself."""
    return torch.ops.aten.gelu_backward(grad, z)  # type: ignore[no-any-return]
