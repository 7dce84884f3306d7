"""The state a stream carries: explicit, per sequence, never shared across a batch, never kept in module attributes.

Every tensor has the batch first, so that rows can be selected, swapped, reset and averaged by one function each. Fast
weights are held as their difference to the meta weights: a fresh state is zero, and drift is the state itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

_S = TypeVar("_S")


class Pending(NamedTuple):
    """Generated quantities of a chunk that is not complete yet, for n tokens."""

    k: Tensor  # (B, n, d), unit norm
    v: Tensor  # (B, n, d)
    eta: Tensor  # (B, n), after the write gate
    log_alpha: Tensor  # (B, n), after the write gate, <= 0


class MemoryState(NamedTuple):
    """Fast weights minus meta weights of m memories that write together, mv of them with vector output."""

    w2: Tensor  # (B, m, h, d)
    w1: Tensor  # (B, mv, d, h)
    w1_scalar: Tensor  # (B, m - mv, h)
    skip: Tensor  # (B, m - mv, d)


class SelfModState(NamedTuple):
    """State of one self-modifying layer."""

    groups: tuple[MemoryState, ...]
    pending: tuple[Pending | None, ...]  # a group that writes every tick has none
    conv_tail: Tensor  # (B, width - 1, d)


class LevelState(NamedTuple):
    """State of one CMS level: deltas, and the accumulated gradient of the current period as its factors.

    The gradient of a matrix summed over n tokens is a product of an (n, out) and an (n, in) factor; keeping the factors
    is exact and far smaller than a dense accumulator while n is below the widths.
    """

    w_in: Tensor  # (B, h, d)
    w_out: Tensor  # (B, d, h)
    grad_hidden: Tensor  # (B, n, h): g_t dCE/d(pre-activation)
    input: Tensor  # (B, n, d): the normalised input of the level
    grad_delta: Tensor  # (B, n, d): g_t dCE/d(delta)
    hidden: Tensor  # (B, n, h): the activation


class AttentionState(NamedTuple):
    """Keys and values of the last positions attention can still see."""

    k: Tensor  # (B, heads, n, d / heads), rotated
    v: Tensor  # (B, heads, n, d / heads)


class LayerState(NamedTuple):
    """State of one block; a mechanism that the variant lacks has none."""

    selfmod: SelfModState | None
    cms: tuple[LevelState, ...]
    attention: AttentionState | None


class State(NamedTuple):
    """State of a batch of streams that stand at the same position."""

    layers: tuple[LayerState, ...]
    pending: Tensor  # (B, n) int64: tokens read but not yet written, 0 <= n <= tick
    position: int  # tokens written so far, the same for every row


def map_state(fn: Callable[..., Tensor], state: _S, *others: _S) -> _S:
    """Apply `fn` to every tensor of a state (and the tensors at the same place in `others`); the rest is kept."""
    if isinstance(state, Tensor):
        return cast(_S, fn(state, *others))
    if isinstance(state, tuple):
        mapped = [map_state(fn, *parts) for parts in zip(state, *others, strict=True)]
        return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)  # type: ignore[return-value]
    return state


def detach_state(state: _S) -> _S:
    """The same state cut out of the graph: the outer gradient ends here."""
    return map_state(torch.Tensor.detach, state)


def select_rows(state: State, rows: Tensor | list[int]) -> State:
    """Rows of a state in the given order (repeats allowed): selecting, and swapping by a permutation."""
    index = torch.as_tensor(rows)
    return map_state(lambda t: t.index_select(0, index.to(t.device)), state)


def average_rows(state: _S, weights: Tensor) -> _S:
    """Each row replaced by a weighted average of rows: `weights` is (B, B), row r holds the weights of new row r.

    Tokens (integers) cannot be averaged and stay as they are.
    """

    def mean(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return cast(Tensor, torch.tensordot(weights.to(t), t, dims=1))

    return map_state(mean, state)
