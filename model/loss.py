"""Cross-entropy under a tied embedding, with the gradient of every token's own loss at hand.

The inner CMS gradient needs dCE_t/dh_t before the outer backward exists, and the outer backward needs the same
vector: it is computed once, in the forward. The table's gradient needs all probabilities: a small batch keeps them, a
larger one computes them again in blocks of rows, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hopeprobe.model.state import on_host

#: Logits held at once: 2^24 float32 numbers are 64 MiB.
_BLOCK_ELEMENTS = 2**24
#: Of logits that nobody keeps: as many at once as stay in a core's cache, of so many tokens.
_CACHED_ELEMENTS = 2**18
_CACHED_ROWS = 512
#: Probabilities kept for the backward: up to 2^26 float32 numbers, 256 MiB; beyond, computed again.
KEPT_ELEMENTS = 2**26
#: Probabilities kept until the gates are known, for the gradients of open tokens alone: beyond that many, writing them
#: to memory and reading them again costs more than the gradients of all tokens.
FEW_ELEMENTS = 2**23

#: Of a block of n rows: unnormalised probabilities (V, n) and their sums (n,).
Kept = tuple[Tensor, Tensor]

#: A target that is not there: padding, or the last token of a stream.
NO_TARGET = -1


def _blocks(n: int, vocabulary: int, cached: bool = False) -> list[slice]:
    size = _CACHED_ROWS if cached else max(1, _BLOCK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _exponentials(hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(E h - max) as (V, n), its sums (n,), and the maxima (n,); softmax is the first over the second.

    The vocabulary comes first: that product is twice as fast here as its transpose, and is not normalised in a pass of
    its own.
    """
    logits = table @ hidden.mT
    top = logits.amax(0)
    weights = logits.sub_(top).exp_()
    return weights, weights.sum(0), top


def _through_cache(hidden: Tensor, table: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and maxima (n,) as of `_exponentials`, and softmax(E h) E (n, d) where `wanted`, else (0, d).

    The vocabulary comes in blocks: each is used up while it is in the cache, and what was summed is scaled to a new
    maximum. Of 512 tokens, d = 64, that takes 0.4 of the time of passes over all logits; of 64 tokens about the same.
    """
    n, vocabulary = len(hidden), len(table)
    size = max(1, _CACHED_ELEMENTS // n)
    top = hidden.new_full((n,), torch.finfo(hidden.dtype).min)
    norm = torch.zeros_like(top)
    mean = hidden.new_zeros(hidden.shape[1], n if wanted else 0)
    room = hidden.new_empty(min(size, vocabulary), n)
    for start in range(0, vocabulary, size):
        block = table[start : start + size]
        logits = torch.mm(block, hidden.mT, out=room[: len(block)])
        higher = torch.maximum(top, logits.amax(0))
        shrink = (top - higher).exp_()
        weights = logits.sub_(higher).exp_()
        norm.mul_(shrink).add_(weights.sum(0))
        if wanted:
            mean.mul_(shrink).addmm_(block.mT, weights)
        top = higher
    return norm, top, mean.mT / (norm if wanted else norm[:0])[:, None]


@torch.no_grad()
def score(
    hidden: Tensor,
    table: Tensor,
    target: Tensor,
    kept: list[Kept] | None = None,
    entropy: list[Tensor] | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, and its gradient with respect to each token's own hidden vector.

    CE_t = logsumexp(E h_t) - E_{y_t} h_t;  dCE_t/dh_t = E^T softmax(E h_t) - E_{y_t}.

    Args:
        hidden: (N, d).
        table: (V, d), the tied embedding E.
        target: (N,) int64; `NO_TARGET` gives loss 0 and gradient 0.
        kept: takes what `differentiable` needs to know the probabilities.
        entropy: takes -sum_v p_v log p_v of each prediction, nats, in parts of rows.
        gradient: False leaves it out; `gradients` takes it from what was kept.

    Returns:
        (N,) losses and (N, d) gradients, or (0, d), both outside any graph.
    """
    losses = hidden.new_empty(hidden.shape[0])
    grads = torch.empty_like(hidden if gradient else hidden[:0])
    asked = gradient or entropy is not None
    cached = kept is None and on_host(hidden)
    for rows in _blocks(hidden.shape[0], table.shape[0], cached):
        scored = target[rows] >= 0
        index = target[rows].clamp_min(0)
        if cached:
            norm, top, expected = _through_cache(hidden[rows], table, asked)
        else:
            weights, norm, top = _exponentials(hidden[rows], table)
            expected = (table.mT @ weights).mT / norm[:, None] if asked else hidden[:0]
            if kept is not None:
                kept.append((weights, norm))
        picked = (hidden[rows] * table[index]).sum(-1)
        losses[rows] = torch.where(scored, norm.log() + top - picked, 0.0)
        if gradient:
            grads[rows] = torch.where(scored[:, None], expected - table[index], 0.0)
        if entropy is not None:
            # -sum_v p_v (E_v h - log Z) = log Z - h sum_v p_v E_v: from the mean embedding.
            entropy.append(norm.log() + top - (hidden[rows] * expected).sum(-1))
    return losses, grads


@torch.no_grad()
def gradients(table: Tensor, target: Tensor, kept: list[Kept], wanted: Tensor) -> Tensor:
    """The gradients (N, d) of `score` for the tokens `wanted` (N,) alone, from what it kept; 0 for all others."""
    grads = table.new_zeros(len(target), table.shape[1])
    start = 0
    for weights, norm in kept:
        rows = slice(start, start + len(norm))
        start = rows.stop
        few = (wanted[rows] & (target[rows] >= 0)).nonzero()[:, 0]
        if not len(few):
            continue
        # Of a few rows the second product is the faster one.
        every = len(few) == len(norm)
        expected = (table.mT @ weights).mT if every else weights.index_select(1, few).mT @ table
        grads[rows].index_copy_(0, few, expected / norm[few, None] - table[target[rows][few]])
    return grads


class _Losses(torch.autograd.Function):
    """Losses already computed by `score`, put into the graph of `hidden` and `table`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        losses: Tensor,
        grads: Tensor,
        target: Tensor,
        kept: list[Kept],
    ) -> Tensor:
        ctx.save_for_backward(hidden, table, grads, target)
        ctx.kept = kept
        return losses.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, grads, target = ctx.saved_tensors
        grad_hidden = upstream[:, None] * grads if ctx.needs_input_grad[0] else None
        grad_table = None
        if ctx.needs_input_grad[1]:
            weighted = torch.where(target >= 0, upstream, 0.0)[:, None] * hidden
            start = 0
            for weights, norm in ctx.kept or _again(hidden, table):
                stop = start + norm.shape[0]
                rows = weighted[start:stop] / norm[:, None]
                grad_table = weights @ rows if grad_table is None else grad_table.addmm_(weights, rows)
                start = stop
            grad_table = torch.zeros_like(table) if grad_table is None else grad_table  # no rows at all
            grad_table.index_add_(0, target.clamp_min(0), weighted, alpha=-1)
        return grad_hidden, grad_table, None, None, None, None


def _again(hidden: Tensor, table: Tensor) -> Iterator[Kept]:
    for rows in _blocks(hidden.shape[0], table.shape[0]):
        yield _exponentials(hidden[rows], table)[:2]


def differentiable(
    hidden: Tensor, table: Tensor, losses: Tensor, grads: Tensor, target: Tensor, kept: list[Kept]
) -> Tensor:
    """The losses of `score` as a function of `hidden` and `table`; same values, first derivatives only.

    `kept` holds what `score` kept, in the order of the rows, or nothing.
    """
    return _Losses.apply(hidden, table, losses, grads, target, kept)  # type: ignore[no-any-return, no-untyped-call]
