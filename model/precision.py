"""Two precisions of a model's activations: float32, and bf16 with everything that is kept in float32.

In bf16 the products with weights that no tick writes (attention, MLPs, CMS levels, static projections) take and give
bf16. Everything else stays float32: the weights themselves, sums (the residual stream, norms, softmax), all that a
memory computes with its fast weights, chunk solves, gates, scores and losses, and whatever a tick leaves in the state.
So do the gradients of weights, which are summed over ticks.

A memory's own products are float32 because they would not be faster otherwise: eight rows against a matrix that was
just written wait for the matrix, and to round it first would be a pass more over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.model.thin import keeps_weights

#: By the name that a training configuration gives: what such activations are, None for as the weights are.
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}

#: Weights as a window's products take them, by the weights they were rounded from.
Rounded: TypeAlias = Mapping[Tensor, Tensor]


def activation_dtype(precision: str) -> torch.dtype | None:
    """What activations are; None for as the weights are. Raises BadInputError for a precision that there is not."""
    if precision not in PRECISIONS:
        raise BadInputError(f"precision is {precision!r}, must be {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


@torch.no_grad()
def rounded(weights: Iterable[nn.Parameter | None], dtype: torch.dtype | None) -> Rounded | None:
    """Round weights once for all ticks of a window; None where activations are as the weights are."""
    return None if dtype is None else {w: w.to(dtype) for w in weights if w is not None}


def linear(x: Tensor, w: Tensor, b: Tensor | None, of: Rounded | None) -> Tensor:
    """X W^T + b for x (B, n, in), w (out, in), b (out,); rounded, and so is the answer, where `of` holds `w`."""
    if of is None:
        return F.linear(x, w, b)
    return cast(Tensor, _Linear.apply(x, w, b, of[w], None if b is None else of[b]))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """A product of rounded factors whose gradients of weights are those weights' own: summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, _b: Tensor | None, w_rounded: Tensor, b_rounded: Tensor | None
    ) -> Tensor:
        near = x.to(w_rounded.dtype)
        ctx.save_for_backward(near, w_rounded)
        ctx.wide = x.dtype, w.dtype
        return F.linear(near, w_rounded, b_rounded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x, of_w = ctx.wide
        grad_x = (grad @ w).to(of_x) if ctx.needs_input_grad[0] else None
        grad_w = grad_b = None
        if keeps_weights():
            rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                grad_w = (rows.mT @ x.flatten(0, -2)).to(of_w)
            if ctx.needs_input_grad[2]:
                grad_b = rows.sum(0, dtype=of_w)
        return grad_x, grad_w, grad_b, None, None
