"""One memory's meta weights, weights of several at once, and how they answer.

A memory is M(x) = skip(x) + W1 gelu(W2 x); skip is the identity where in = out and a projection where out = 1 (eta,
alpha). Source: "Nested Learning" (arXiv 2512.24695, section 8).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.model.state import MemoryState
from hopeprobe.model.thin import attach, times, times_each

#: Guards the division in l2norm; the public reproduction uses the same value.
NORM_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """X / max(|x|, 1e-6) over the last dimension."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(NORM_EPS)  # as F.normalize, with less around it


def convolved(window: Tensor, kernel: Tensor) -> Tensor:
    """Causal depthwise convolution of (B, width - 1 + n, d) with a kernel (d, width), now its last tap: (B, n, d)."""
    width = kernel.shape[1]
    n = window.shape[1] - width + 1
    out = window[:, width - 1 :] * kernel[:, -1]
    for i in range(width - 1):
        out.addcmul_(window[:, i : i + n], kernel[:, i])
    return out


class Memory(nn.Module):
    """Meta weights of one memory: what its fast weights start from and, by default, decay towards."""

    def __init__(self, dim: int, scalar: bool) -> None:
        super().__init__()
        out = 1 if scalar else dim
        self.w2 = nn.Parameter(torch.empty(dim, dim))  # (h, d), h = d
        self.w1 = nn.Parameter(torch.empty(out, dim))  # (out, h)
        self.skip = nn.Parameter(torch.empty(1, dim)) if scalar else None  # (1, d); None: the identity


class Weights(NamedTuple):
    """Weights of a group of m memories, mv of them with vector output; with a leading batch when they are fast."""

    w2: Tensor  # (m, h, d)
    w1: Tensor  # (mv, d, h)
    w1_scalar: Tensor  # (m - mv, h)
    skip: Tensor  # (m - mv, d)


class Reading(NamedTuple):
    """What a group of memories answers to n inputs."""

    pre: Tensor  # (B, n, m, h): W2 x
    hidden: Tensor  # (B, n, m, h): gelu of it
    vector: Tensor  # (B, mv, n, d)
    scalar: Tensor  # (B, n, m - mv)


class Generated(NamedTuple):
    """What reading a tick leaves for its write: k, v, eta, alpha before any gate, and the weights it read with."""

    k: Tensor  # (B, C, d), unit norm
    v: Tensor  # (B, C, d), unit norm where `normalise_value`
    eta: Tensor  # (B, C), > 0
    alpha: Tensor  # (B, C), range (0, 1): retention
    tail: Tensor  # (B, width - 1, d): the convolution's next tail
    fast: tuple[Weights, ...]  # of each group, (B, ...)
    late: Tensor | None = (
        None  # (B, C, d): what the write generates k, v, eta and alpha from, where `read` did not
    )


def answer(x: Tensor, w2: Tensor, w1: Tensor, i: int) -> Tensor:
    """M_i(x) of one vector memory, (B, n, d); stacks of weights (B, m, h, d) and (B, mv, d, h)."""
    one = slice(i, i + 1)
    return answered(x, F.gelu(times(x, w2, one).squeeze(2)), w1, i)


def answered(x: Tensor, hidden: Tensor, w1: Tensor, i: int) -> Tensor:
    """The second half of that: x + W1_i hidden."""
    if torch.is_grad_enabled() and w1.requires_grad:
        return x + times_each(hidden, w1, slice(i, i + 1))
    return torch.baddbmm(x, hidden, w1[:, i].mT)


def read_group(x: Tensor, w: Weights) -> Reading:
    """Every memory of a group at n inputs (B, n, d); its weights with a leading batch."""
    n_vector, n_scalar = w.w1.shape[1], w.w1_scalar.shape[1]
    pre = times(x, w.w2)
    hidden = F.gelu(pre)
    of_vectors, of_scalars = hidden.split_with_sizes([n_vector, n_scalar], dim=2)
    rows = of_vectors.transpose(1, 2).flatten(0, 1)
    vector = times_each(rows, w.w1).view(len(x), n_vector, *x.shape[1:]).add_(x[:, None])
    scalar = (of_scalars * w.w1_scalar[:, None]).sum(-1) + x @ w.skip.mT
    return Reading(pre, hidden, vector, scalar)


def reattached(meta: Tensor, fast: Tensor) -> Tensor:
    """Fast weights (B, ...) as they are, in the graph of their meta weights (...): the difference is a constant."""
    return fast if fast.requires_grad or not meta.requires_grad else fast + (meta - meta.detach())


def attached(meta: Weights, state: MemoryState) -> Weights:
    """The fast weights themselves, (B, ...) each, in the graph of the meta weights.

    Where a state is outside the graph (fresh, cut, or written under `stop`) its difference to the meta weights counts
    as a constant, so that the outer gradient still reaches them.
    """
    if not meta.w2.requires_grad:
        return Weights(*state)
    return Weights(
        state.w2 if state.w2.requires_grad else attach(meta.w2, state.w2, shared=True),
        state.w1 if state.w1.requires_grad else attach(meta.w1, state.w1, shared=False),
        reattached(meta.w1_scalar, state.w1_scalar),
        reattached(meta.skip, state.skip),
    )


def repeated(meta: Weights, batch: int) -> Weights:
    """The same for memories that are never written: meta weights, for each of the batch, without a copy."""
    still = MemoryState(*(base.detach().expand(batch, *base.shape) for base in meta))
    return attached(meta, still) if torch.is_grad_enabled() else Weights(*still)
