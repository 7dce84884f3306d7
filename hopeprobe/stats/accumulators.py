"""Streaming moments per group: what probes hold instead of activations.

Three accumulators with one contract:

    update(batch, mask, group)   add tokens: mask bool [R, T], group int [R], the group of each row's document
    merge(other)                 add another accumulator's tokens (another rank, another split)
    compute() -> Moments         float64 moments with a leading axis of `GROUPS`; pure, nothing is cached
    state_dict(), load_state_dict(state)

Counts are int64, moments float64, inputs upcast. A value under the mask that is not finite raises
MeasurementError before anything is added; values outside the mask are never looked at. Memory does not grow
with tokens. The arrays are allocated, zeroed, at the first update, and an operating system backs zeroed pages
only once they are written: groups not seen cost nothing. A comoment of D×D costs 64·8·D² bytes at most (34 MB
at D = 256, 134 MB at D = 512).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.errors import MeasurementError

from .arrays import FloatArray, IntArray, as_bool, as_float64, as_int64
from .groups import GROUPS
from .moments import Moments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class GroupedMoments:
    """The common core: named values of fixed shape, and the comoments of the pairs asked for.

    Merging is Chan's pairwise update on the whole state, with δ = mean_b − mean_a:

        n = n_a + n_b,   mean = mean_a + δ n_b/n,   C_xy = C_xy,a + C_xy,b + δ_x δ_yᵀ n_a n_b/n
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], pairs: Sequence[str]) -> None:
        if any(width < 1 for shape in shapes.values() for width in shape):
            raise ValueError(f"every dimension must be at least 1, got {dict(shapes)}")
        self._shapes = dict(shapes)
        self._pairs = tuple(pairs)
        self.n: IntArray = np.zeros(GROUPS, dtype=np.int64)
        self._parts: dict[str, FloatArray] = {}

    @property
    def n_tokens(self) -> int:
        """Tokens seen, all groups together."""
        return int(self.n.sum())

    @property
    def n_groups(self) -> int:
        """Groups that hold at least one token."""
        return int(np.count_nonzero(self.n))

    def merge(self, other: GroupedMoments) -> None:
        """Add all of `other`'s tokens, in place. Raises ValueError when kind or shape differ."""
        if type(other) is not type(self) or other._shapes != self._shapes:
            raise ValueError(f"cannot merge {other!r} into {self!r}")
        for g in np.flatnonzero(other.n):
            self._fold(int(g), int(other.n[g]), {name: part[g] for name, part in other._parts.items()})

    def compute(self) -> Moments:
        """Return a copy of the moments so far, leading axis `GROUPS`; an empty group has n = 0, moments 0."""
        parts = {name: part.copy() for name, part in (self._parts or self._zeros()).items()}
        return Moments(
            self.n.copy(),
            {name: parts[name] for name in self._shapes},
            {pair: parts[pair] for pair in self._pairs},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as NumPy arrays, non-empty groups alone: small to save and to send."""
        groups = np.flatnonzero(self.n)
        parts = self._parts or self._zeros()
        return {"groups": groups, "n": self.n[groups], **{name: part[groups] for name, part in parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state. Raises ValueError when parts are missing, unknown or of another shape."""
        expected = {"groups", "n", *self._shapes, *self._pairs}
        if set(state) != expected:
            raise ValueError(f"state has the parts {sorted(state)}, {self!r} needs {sorted(expected)}")
        groups, n = as_int64(state["groups"]), as_int64(state["n"])
        if len(np.unique(groups)) != len(groups) or ((groups < 0) | (groups >= GROUPS)).any():
            raise ValueError(f"groups must be distinct and in [0, {GROUPS})")
        if n.shape != groups.shape or (n < 1).any():
            raise ValueError("n must hold one positive count for each group")
        zeros = self._zeros()
        parts = {name: as_float64(state[name]) for name in zeros}
        for name, part in parts.items():
            if part.shape != (len(groups), *zeros[name].shape[1:]):
                raise ValueError(
                    f"state part {name!r} has the shape {part.shape}, which does not fit {self!r}"
                )
        self.n = np.zeros(GROUPS, dtype=np.int64)
        self._parts = zeros if len(groups) else {}
        self.n[groups] = n
        for name in self._parts:
            self._parts[name][groups] = parts[name]

    def __getstate__(self) -> dict[str, Any]:
        """Copied and sent to another process as `state_dict` has it: no groups that hold nothing."""
        rest = {name: value for name, value in vars(self).items() if name not in ("n", "_parts")}
        return {"rest": rest, "state": self.state_dict()}

    def __setstate__(self, kept: Mapping[str, Any]) -> None:
        vars(self).update(kept["rest"])
        self.load_state_dict(kept["state"])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self._shapes.items())
        return f"{type(self).__name__}({shapes}; {self.n_tokens} tokens in {self.n_groups} groups)"

    def _zeros(self) -> dict[str, FloatArray]:
        shapes = self._shapes | {
            pair: (self._shapes[pair[0]][0], self._shapes[pair[1]][0]) for pair in self._pairs
        }
        return {name: np.zeros((GROUPS, *shape)) for name, shape in shapes.items()}

    def _update(self, values: Mapping[str, Any], mask: Any, group: Any) -> None:
        mask, group = as_bool(mask), as_int64(group)
        if mask.ndim != 2 or group.shape != mask.shape[:1]:
            raise ValueError(f"mask must be [R, T] and group [R], got {mask.shape} and {group.shape}")
        if ((group < 0) | (group >= GROUPS)).any():
            raise ValueError(f"groups must be in [0, {GROUPS}), got {group.min()} to {group.max()}")
        arrays = {name: as_float64(value) for name, value in values.items()}
        for name, array in arrays.items():
            if array.shape != (*mask.shape, *self._shapes[name]):
                raise ValueError(
                    f"{name} must be [R, T, *S] = {[*mask.shape, *self._shapes[name]]}, "
                    f"got {list(array.shape)}"
                )
            _require_finite(name, array, mask)
        for row in np.flatnonzero(mask.any(axis=1)):
            tokens = {name: array[row][mask[row]] for name, array in arrays.items()}
            self._fold(int(group[row]), int(mask[row].sum()), self._row_moments(tokens))

    def _row_moments(self, tokens: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        parts: dict[str, FloatArray] = {}
        centred: dict[str, FloatArray] = {}
        for name, x in tokens.items():
            # Less the first token before averaging: a constant then has its exact mean and exactly no
            # variance.
            deviation = x - x[0]
            shift = deviation.mean(axis=0)
            parts[name] = x[0] + shift
            if self._pairs:
                centred[name] = deviation - shift
        for pair in self._pairs:
            parts[pair] = centred[pair[0]].T @ centred[pair[1]]
        return parts

    def _fold(self, g: int, n_b: int, parts_b: Mapping[str, FloatArray]) -> None:
        if not self._parts:
            self._parts = self._zeros()
        n_a = int(self.n[g])
        n = n_a + n_b
        if n_a == 0:
            for name, part in self._parts.items():
                part[g] = parts_b[name]
        else:
            delta = {name: parts_b[name] - self._parts[name][g] for name in self._shapes}
            for pair in self._pairs:
                between = np.outer(delta[pair[0]], delta[pair[1]]) * (n_a * n_b / n)
                self._parts[pair][g] += parts_b[pair] + between
            for name in self._shapes:
                self._parts[name][g] += delta[name] * (n_b / n)
        self.n[g] = n


class GroupedMean(GroupedMoments):
    """Per group the mean of a statistic of shape S: `compute().means["x"]` is float64 [64, *S].

    `update(batch [R, T, *S], mask bool [R, T], group int [R])`.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__({"x": tuple(shape)}, ())

    def update(self, batch: Any, mask: Any, group: Any) -> None:
        """Add the tokens under `mask`; raises MeasurementError (not finite), ValueError, TypeError."""
        self._update({"x": batch}, mask, group)


class GroupedCovariance(GroupedMoments):
    """Per group the mean [64, D] and comoment "xx" [64, D, D]: `update(batch [R, T, D], mask, group)`.

    Cost: one float64 matrix product, 2·T·D² flops, for each row.
    """

    def __init__(self, dim: int) -> None:
        super().__init__({"x": (dim,)}, ("xx",))

    def update(self, batch: Any, mask: Any, group: Any) -> None:
        """Add the tokens under `mask`; raises MeasurementError (not finite), ValueError, TypeError."""
        self._update({"x": batch}, mask, group)


class GroupedCrossCovariance(GroupedMoments):
    """Per group the means "x" and "y" and the comoments "xx", "yy", "xy" of pairs of vectors.

    `update((x [R, T, D_x], y [R, T, D_y]), mask, group)`. Cost: three float64 matrix products for each row.
    """

    def __init__(self, dim_x: int, dim_y: int) -> None:
        super().__init__({"x": (dim_x,), "y": (dim_y,)}, ("xx", "yy", "xy"))

    def update(self, batch: tuple[Any, Any], mask: Any, group: Any) -> None:
        """Add the tokens under `mask`; raises MeasurementError (not finite), ValueError, TypeError."""
        x, y = batch
        self._update({"x": x, "y": y}, mask, group)


def _require_finite(name: str, array: FloatArray, mask: Any) -> None:
    finite = np.isfinite(array).reshape(*mask.shape, -1).all(axis=-1)
    bad = mask & ~finite
    if bad.any():
        row, token = np.argwhere(bad)[0]
        raise MeasurementError(
            f"{name} is not finite at {int(bad.sum())} of {int(mask.sum())} tokens, "
            f"first at row {row}, token {token} of the batch; nothing of this batch was counted"
        )
