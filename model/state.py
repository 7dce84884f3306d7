"""The state a stream carries: explicit, per sequence, never shared across a batch, never kept in module attributes.

Every tensor has the batch first, so that rows can be selected, swapped, reset and averaged. Memories hold their fast
weights themselves, which start from the meta weights; a CMS level what was written to it, thin while that pays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hopeprobe.model.skip import packed, runs

_S = TypeVar("_S")

#: Tokens that factors make room for at a time: else each new one would copy them all.
_GROWTH = 8


class Pending(NamedTuple):
    """Generated quantities of n tokens of a chunk that is not complete yet."""

    k: Tensor  # (B, n, d), unit norm
    v: Tensor  # (B, n, d)
    eta: Tensor  # (B, n), after the write gate
    log_alpha: Tensor  # (B, n), after the write gate, <= 0


class MemoryState(NamedTuple):
    """Fast weights of m memories that write together, mv of them with vector output."""

    w2: Tensor  # (B, m, h, d)
    w1: Tensor  # (B, mv, d, h)
    w1_scalar: Tensor  # (B, m - mv, h)
    skip: Tensor  # (B, m - mv, d)


class SelfModState(NamedTuple):
    """State of one self-modifying layer."""

    groups: tuple[MemoryState | None, ...]  # None for one that is never written
    pending: tuple[tuple[Pending, ...], ...]  # of each group tick by tick: the write joins them
    conv_tail: Tensor  # (B, width - 1, d)


class Change(NamedTuple):
    """What was written to one matrix (B, out, in): left^T right, or the matrix once that is fewer numbers.

    The gradient of a matrix summed over n tokens is a product of an (n, out) and an (n, in) factor. Kept as that it is
    exact, and smaller and faster to read and to write than the matrix while n is below out in / (out + in).
    """

    dense: Tensor  # (B, out, in), or (B, 0, in) while there is no such part
    left: Tensor  # (B, n, out)
    right: Tensor  # (B, n, in)

    @classmethod
    def nothing(cls, like: Tensor, batch: int) -> Change:
        """No change of a matrix (out, in)."""
        rows, columns = like.shape
        return cls(*(like.new_zeros(batch, 0, width) for width in (columns, rows, columns)))

    def matrix(self) -> Tensor:
        """The change in full, (B, out, in)."""
        product = self.left.mT @ self.right
        return self.dense + product if self.dense.shape[1] else product

    def times(self, x: Tensor) -> Tensor | None:
        """X Change^T of (B, n, in) as (B, n, out); None for no change, which costs nothing."""
        y = x @ self.dense.mT if self.dense.shape[1] else None
        if not self.left.shape[1]:
            return y
        product = (x @ self.right.mT) @ self.left
        return product if y is None else y + product

    def plus(self, left: Tensor, right: Tensor, donated: bool, live: Tensor | None = None) -> Change:
        """This change and left^T right; `donated` says that it may be overwritten, `live` which tokens (B, n) count.

        Without the others a row may have fewer tokens than another: the next ones then take the place of the zeros that
        fill it up.
        """
        rows, columns = left.shape[2], right.shape[2]
        if self.dense.shape[1]:
            if live is not None:
                return self._replace(dense=_added(self.dense, left, right, live, donated))
            add = torch.Tensor.baddbmm_ if donated else torch.baddbmm
            return self._replace(dense=add(self.dense, left.mT, right))
        if live is None:
            left, right = torch.cat([self.left, left], 1), torch.cat([self.right, right], 1)
        else:
            left, right = _appended(self.left, self.right, left, right, live, donated)
        if left.shape[1] * (rows + columns) > rows * columns:
            return self.of(left.mT @ right)
        return self._replace(left=left, right=right)

    def norm(self) -> Tensor:
        """Frobenius norm (B,) of the change in full, from its factors where it is thin."""
        if self.dense.shape[1]:
            norm: Tensor = torch.linalg.vector_norm(self.matrix(), dim=(1, 2))
            return norm
        # ||L^T R||^2 = sum of (L L^T) * (R R^T)
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2)).clamp_min(0.0).sqrt()

    def within(self, limit: Tensor) -> Change:
        """This change, in each row scaled back to a Frobenius norm of at most `limit`; a smaller one as it is."""
        share = (limit / self.norm().clamp_min(torch.finfo(limit.dtype).tiny)).clamp_max(1.0)[:, None, None]
        return Change(self.dense * share, self.left * share, self.right)

    @classmethod
    def of(cls, matrix: Tensor) -> Change:
        """A change (B, out, in) given in full."""
        batch, rows, columns = matrix.shape
        return cls(matrix, matrix.new_zeros(batch, 0, rows), matrix.new_zeros(batch, 0, columns))


def _added(dense: Tensor, left: Tensor, right: Tensor, live: Tensor, donated: bool) -> Tensor:
    """The sum of `dense` and left^T right, in rows with a live token alone."""
    dense = dense if donated else dense.clone()
    for part in runs(live.any(1), dense[0].numel()):
        some = packed(live[part], left[part], right[part])
        dense[part].baddbmm_(some[0].mT, some[1])
    return dense


def _appended(
    held_left: Tensor, held_right: Tensor, left: Tensor, right: Tensor, live: Tensor, donated: bool
) -> tuple[Tensor, Tensor]:
    """Factors with the live tokens of each row after the last one that it holds, then zeros."""
    n = held_left.shape[1]
    number = torch.arange(1, n + 1, device=left.device)
    narrow = min(
        held_left, held_right, key=lambda held: held.shape[2]
    )  # what it lacks is nothing in the product
    used = (number * (narrow != 0).any(-1)).amax(1) if n else number.new_zeros(len(left))
    place = used[:, None] + live.cumsum(1) - 1
    more = int((used + live.sum(1)).max()) - n
    more = -(-more // _GROWTH) * _GROWTH
    row, token = live.nonzero(as_tuple=True)
    found = []
    for held, fresh in ((held_left, left), (held_right, right)):
        into = F.pad(held, (0, 0, 0, more)) if more > 0 else held if donated else held.clone()
        into[row, place[row, token]] = fresh[row, token]
        found.append(into)
    return found[0], found[1]


class LevelState(NamedTuple):
    """State of one CMS level: what was written, and the accumulated gradient of the current period as its factors."""

    change_in: Change  # of W_in (h, d)
    change_out: Change  # of W_out (d, h)
    grad_hidden: Tensor  # (B, n, h): g_t dCE/d(pre-activation)
    input: Tensor  # (B, n, d): the normalised input of the level
    grad_delta: Tensor  # (B, n, d): g_t dCE/d(delta)
    hidden: Tensor  # (B, n, h): the activation

    @property
    def w_in(self) -> Tensor:
        """Fast minus meta W_in, (B, h, d), assembled."""
        return self.change_in.matrix()

    @property
    def w_out(self) -> Tensor:
        """Fast minus meta W_out, (B, d, h), assembled."""
        return self.change_out.matrix()


class AttentionState(NamedTuple):
    """Keys and values of the last positions attention can still see."""

    k: Tensor  # (B, heads, n, d / heads), rotated
    v: Tensor  # (B, heads, n, d / heads)


class TitansState(NamedTuple):
    """Fast weights of a Titans memory, and their momentum."""

    w2: Tensor  # (B, h, d)
    w1: Tensor  # (B, d, h)
    s2: Tensor  # (B, h, d)
    s1: Tensor  # (B, d, h)
    conv_tail: Tensor  # (B, width - 1, d)


class LayerState(NamedTuple):
    """State of one block; a mechanism that the variant lacks has none."""

    selfmod: SelfModState | None
    cms: tuple[LevelState, ...]
    attention: AttentionState | None
    titans: TitansState | None = None


class GateState(NamedTuple):
    """What a gate remembers of a stream, for each of its G scores: one, or one a layer. Zero wide where not needed."""

    scores: Tensor  # (B, G, W): those of the last W tokens, the latest last; NaN before there were any
    owed: Tensor  # (B, G): tokens that the budget allows so far, less those that passed
    mean: Tensor  # (B, G): running sum of the score's signal, decayed
    square: Tensor  # (B, G): of its square
    chain: Tensor  # (B,) int64: hash of all tokens so far


class State(NamedTuple):
    """State of a batch of streams that stand at the same position."""

    layers: tuple[LayerState, ...]
    pending: Tensor  # (B, n) int64: tokens read but not yet written, 0 <= n <= tick
    position: int  # tokens written so far, the same for every row
    gate: GateState | None = None  # None for a threshold, which remembers nothing


def on_host(x: Tensor) -> bool:
    """May the host look at a value: a CPU's tensor alone; on a device it would wait for all work under way."""
    return x.device.type == "cpu"


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


def average_rows(x: Tensor, weights: Tensor) -> Tensor:
    """Rows of (B, ...) replaced by weighted averages of rows: `weights` is (B, B), row r holds those of new row r.

    A row that is not finite reaches only those that give it a weight.
    """
    weights = weights.to(x)
    averaged = cast(Tensor, torch.tensordot(weights, x, dims=1))
    bad = ~x.flatten(1).isfinite().all(1)
    if not bool(bad.any()):
        return averaged
    apart = (weights[:, bad] == 0).all(1)  # nothing times what is not finite is not a number
    averaged[apart] = torch.tensordot(weights[apart][:, ~bad], x[~bad], dims=1)
    return averaged
