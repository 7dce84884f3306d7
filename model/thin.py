"""Products with fast weights whose gradient stays thin.

A tick multiplies each stack of fast weights W (B, m, out, in) by a few rows, several times, and writes it once. Left to
autograd, every product returns the gradient of all of W as a tensor of its own: more than all arithmetic of a training
step. That gradient is a product of two thin factors. Here each product leaves its factors with whoever made W
(`decay_and_write`, `attach`), which adds them up when its own turn comes: autograd runs it after all of them, in the
same backward pass. Weights made in any other way (edited, selected, averaged) get their gradient as usual.

So autograd itself sees no gradient of what these two return: it is `sealed` before others may ask for one. First
derivatives only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopeprobe.model.state import on_host


class _Factors(NamedTuple):
    """A gradient left^T right of the memories `part`: shared right (B, n, in) and left (B, n, k out), or one each."""

    part: slice
    left: Tensor
    right: Tensor


class _Slot:
    """Where whatever uses one stack of weights leaves its gradient, by backward pass."""

    def __init__(self) -> None:
        self.factors: dict[int, list[_Factors]] = {}
        self.whole: dict[int, Tensor] = {}  # (B, m, out, in), nobody else's

    def add(self, factors: _Factors) -> None:
        if keeps_weights():
            self.factors.setdefault(torch._C._current_graph_task_id(), []).append(factors)

    def add_whole(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        self.whole[task] = grad if task not in self.whole else self.whole[task].add_(grad)

    def take(self, grad: Tensor | None) -> tuple[Tensor | None, list[_Factors]]:
        """What was left in this pass, the whole part with `grad` added; then it is left no more."""
        task = torch._C._current_graph_task_id()
        whole, factors = self.whole.pop(task, None), self.factors.pop(task, [])
        if grad is not None:
            whole = grad.clone() if whole is None else whole.add_(grad)
        return whole, factors


_local = threading.local()


@contextmanager
def rows_only() -> Iterator[None]:
    """A gradient taken inside, in the thread that takes it, is never one of weights: products keep nothing for those.

    Without it they would, for as long as the graph lives; it would count nowhere.
    """
    _local.rows_only = True
    try:
        yield
    finally:
        _local.rows_only = False


def keeps_weights() -> bool:
    """May a gradient that is being taken be one of weights."""
    return not getattr(_local, "rows_only", False)


def _slot(w: Tensor) -> _Slot | None:
    return getattr(w.grad_fn, "slot", None)


def _matrices(w: Tensor, part: slice, shared: bool) -> Tensor:
    """Those of `part` for a batched product, a view: (B, k out, in) for shared rows, else (B k, out, in)."""
    if shared:
        return w[:, part].flatten(1, 2)
    chosen = w[:, part]
    return chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.flatten(0, 1)


def _add_factors(grad: Tensor, factors: _Factors, shared: bool) -> None:
    into = _matrices(grad, factors.part, shared)
    into.baddbmm_(factors.left.mT, factors.right)
    if into.data_ptr() != grad[:, factors.part].data_ptr():
        raise RuntimeError("the gradient of fast weights was added to a copy")


class _Product(torch.autograd.Function):
    """x W^T, or x W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, part: slice, shared: bool, mirrored: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = part, shared, mirrored, _slot(w)
        matrices = _matrices(w, part, shared)
        return x @ (matrices if mirrored else matrices.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        part, shared, mirrored, slot = ctx.how
        matrices = _matrices(w, part, shared)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (matrices.mT if mirrored else matrices)
        if ctx.needs_input_grad[1]:
            factors = _Factors(part, x, grad) if mirrored else _Factors(part, grad, x)
            if slot is not None:
                slot.add(factors)
            else:
                grad_w = torch.zeros_like(w)
                _add_factors(grad_w, factors, shared)
        return grad_x, grad_w, None, None, None


class _Write(torch.autograd.Function):
    """end W + (1 - end) W' - left^T right."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, meta: Tensor | None, end: Tensor, left: Tensor, right: Tensor, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(w, meta, end, left, right)
        ctx.set_materialize_grads(False)
        ctx.slot, ctx.before, ctx.shared = _Slot(), _slot(w), shared
        return _written(w, meta, end, left, right, shared, donated=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        w, meta, end, left, right = ctx.saved_tensors
        total, factors = ctx.slot.take(grad)
        if total is None and not factors:
            return (None,) * 6
        total = torch.zeros_like(w) if total is None else total
        for one in factors:
            _add_factors(total, one, ctx.shared)
        matrices = _matrices(total, _ALL, ctx.shared)
        grad_left = -(right @ matrices.mT)
        grad_right = -(left @ matrices)
        flat = total.flatten(1)
        grad_end = _dots(flat, w.flatten(1))
        grad_meta = None
        if meta is not None:
            grad_end = grad_end - flat @ meta.flatten()
            grad_meta = ((1.0 - end) @ flat).view_as(meta)
        total.mul_(_per_row(end, w))
        if ctx.before is not None:
            ctx.before.add_whole(total)
        return None if ctx.before is not None else total, grad_meta, grad_end, grad_left, grad_right, None


class _Attach(torch.autograd.Function):
    """W as it is, its difference to the meta weights a constant."""

    @staticmethod
    def forward(ctx: Any, meta: Tensor, w: Tensor, shared: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.slot, ctx.shared = _Slot(), shared
        ctx.shape = meta.shape
        return w.view_as(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, factors = ctx.slot.take(grad)
        if whole is None and not factors:
            return None, None, None
        total = factors[0].left.new_zeros(ctx.shape) if whole is None else whole.sum(0)
        for part, left, right in factors:
            if ctx.shared:
                total[part].flatten(0, 1).addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
            else:
                k = len(total[part])
                by_memory = [t.unflatten(0, (-1, k)).transpose(0, 1).flatten(1, 2) for t in (left, right)]
                total[part].baddbmm_(by_memory[0].mT, by_memory[1])
        return total, None, None


_ALL = slice(None)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, (B,); on a CPU without a tensor of all their products."""
    return torch.stack([x @ y for x, y in zip(a, b, strict=True)]) if on_host(a) else (a * b).sum(1)


def _per_row(x: Tensor, w: Tensor) -> Tensor:
    return x.view(-1, *(1,) * (w.ndim - 1))


def _written(
    w: Tensor, meta: Tensor | None, end: Tensor, left: Tensor, right: Tensor, shared: bool, donated: bool
) -> Tensor:
    per_row = _per_row(end, w)
    if meta is None:
        new = w.mul_(per_row) if donated else w * per_row
    else:
        new = torch.lerp(meta, w, per_row, out=w) if donated else torch.lerp(meta, w, per_row)
    # In place, as `new` is ours: subtracting a product of thin factors is one pass over the weights.
    _matrices(new, _ALL, shared).baddbmm_(left.mT, right, alpha=-1)
    return new


def times(x: Tensor, w: Tensor, part: slice = _ALL) -> Tensor:
    """The same rows x (B, n, in) times W^T of each memory of `part`, of (B, m, out, in): (B, n, k, out)."""
    out = (
        _Product.apply(x, w, part, True, False)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled() and w.requires_grad
        else x @ _matrices(w, part, True).mT
    )
    return out.unflatten(-1, (-1, w.shape[2]))  # type: ignore[no-any-return]


def times_each(x: Tensor, w: Tensor, part: slice = _ALL) -> Tensor:
    """Rows x (B k, n, in) of each memory times its own W^T: (B k, n, out); `part` is one memory, or all of them."""
    if torch.is_grad_enabled() and w.requires_grad:
        return _Product.apply(x, w, part, False, False)  # type: ignore[no-any-return, no-untyped-call]
    return x @ _matrices(w, part, False).mT


def back_each(x: Tensor, w: Tensor) -> Tensor:
    """Rows x (B m, n, out) of each memory times its own W: (B m, n, in)."""
    if torch.is_grad_enabled() and w.requires_grad:
        return _Product.apply(x, w, _ALL, False, True)  # type: ignore[no-any-return, no-untyped-call]
    return x @ _matrices(w, _ALL, False)


def decay_and_write(
    w: Tensor,
    meta: Tensor | None,
    end: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    shared: bool,
    donated: bool = False,
) -> Tensor:
    """W decayed and written: end W + (1 - end) W' - left^T right.

    Args:
        w: (B, m, out, in).
        meta: (m, out, in), W'; None decays to zero.
        end: (B,), range [0, 1], what is kept.
        left: (B, n, m out) where `shared`, else (B m, n, out).
        right: (B, n, in) or (B m, n, in).
        shared: all memories are written along the same rows.
        donated: nobody needs `w` any more, and no graph does: it is overwritten.
    """
    needed = (w, end, left, right) if meta is None else (w, meta, end, left, right)
    if torch.is_grad_enabled() and any(t.requires_grad for t in needed):
        return _Write.apply(w, meta, end, left, right, shared)  # type: ignore[no-any-return, no-untyped-call]
    return _written(w, meta, end, left, right, shared, donated)


def attach(meta: Tensor, w: Tensor, *, shared: bool) -> Tensor:
    """W (B, m, out, in) in the graph of its meta weights (m, out, in), its difference to them a constant."""
    return _Attach.apply(meta, w, shared)  # type: ignore[no-any-return, no-untyped-call]


def sealed(w: Tensor) -> Tensor:
    """The same weights for others to use and to ask gradients of."""
    return w.view_as(w) if _slot(w) is not None else w
