"""What closed gates leave undone where no outer gradient is taken, on a CPU; the mathematics does not change.

A row (sequence) without an open token is left alone. Of the others open tokens come first, and as many are kept as the
fullest row has: what fills the rest is closed, an exact no-op.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers of a row's weights from which leaving out a closed row saves more than the second call costs.
_HEAVY = 2**18


def runs(rows: Tensor, size: int) -> list[slice]:
    """Slices that cover the true rows of (B,): those alone, or one slice where a row has few numbers (`size`)."""
    at: list[int] = rows.nonzero()[:, 0].tolist()
    if not at:
        return []
    if size < _HEAVY:
        return [slice(at[0], at[-1] + 1)]
    ends = [i for i, row in enumerate(at) if i + 1 == len(at) or at[i + 1] != row + 1]
    starts = [0, *(i + 1 for i in ends[:-1])]
    return [slice(at[a], at[b] + 1) for a, b in zip(starts, ends, strict=True)]


def packed(live: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, n, ...) with each row's live tokens (B, n) first, in their order, cut to the most that a row has."""
    most = int(live.sum(1).max())
    if most == live.shape[1]:
        return tensors
    order = live.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return tuple(torch.take_along_dim(t, order.view(*order.shape, *(1,) * (t.ndim - 2)), 1) for t in tensors)
