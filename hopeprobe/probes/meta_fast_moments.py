"""Fast weights beside meta weights, streamed: what `meta_fast.py` measures in the live pass.

A reducer turns the fast weights of one matrix into three numbers a window (`meta_fast_memories.products`); those of one
memory's matrices add up, and everything else is made of them and of the gates.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import GroupedMean, GroupedMoments, Moments, Verdict, as_float64, mean_of
from hopeprobe.stats.arrays import as_bool

from .base import Accumulator, Measurement, Place, Quantity, value_without_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import BoolArray, FloatArray, IntArray
    from hopeprobe.tokens import EvalBatch

    from .meta_fast_memories import Memory
    from .readings import Readings

RATIO_EFFECT = 0.05
HALF_LIFE_EFFECT = 0.05  # of the context

RATIOS = ("relative_drift", "fast_meta_cosine", "norm_ratio")
PARTS = ("decay_part", "write_part")
DECAY = ("retention", "half_life")

INIT_NOTE = "decay goes towards the meta weights: all of the drift is writes"

COLUMNS = (*RATIOS, *PARTS, "lost")
"""What is held of a window; in the last 1 where its fast weights, or its losses before, are not finite."""

_POSITIVE = (0.0, math.inf)
_BOUNDS = {"fast_meta_cosine": (-1.0, 1.0), "retention": (0.0, 1.0)}
_SMALLEST = float(np.finfo(np.float32).tiny)  # stands for a retention of 0 in the logarithm, as in our model
_COPIED = (
    1e-6  # a write_part over which windows of different text cannot have the same fast weights by chance
)


def half_life(moments: Moments) -> FloatArray:
    """Tokens, ln 2 / −mean ln α, float64 [B]; NaN where α is always 1: nothing decays."""
    rate = -mean_of(moments)
    return np.divide(math.log(2), rate, out=np.full_like(rate, np.nan), where=rate > 0)


class WindowMeans(GroupedMoments):
    """Means over windows of many values [*S] a window, each over the windows in which it is defined (not NaN).

    `update(values [R, *S], group int [R])`.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__({"value": shape, "defined": shape}, ())

    def update(self, values: FloatArray, group: IntArray) -> None:
        """Add R windows; raises MeasurementError for a value that is infinite."""
        defined = ~np.isnan(values)
        both = {"value": np.where(defined, values, 0.0)[:, None], "defined": defined[:, None]}
        self._update(both, np.ones((len(values), 1), dtype=bool), group)


def _at(windows: Moments, place: tuple[int, ...]) -> Moments:
    """Moments of one value of `WindowMeans`, called x; n counts the windows in which it is defined."""
    value, defined = (np.moveaxis(windows.means[name], 0, -1)[place] for name in ("value", "defined"))
    n = np.rint(windows.n * defined).astype(np.int64)
    return Moments(n, {"x": np.divide(value, defined, out=np.zeros_like(value), where=n > 0)}, {})


class FastMoments(Accumulator):
    """By memory and position, and of retention by layer and position, means over windows; by layer the mean of ln α."""

    def __init__(
        self, condition: str, memories: Sequence[Memory], positions: Sequence[int], context: int
    ) -> None:
        super().__init__(condition)
        self.positions, self.context = tuple(positions), context
        self.memories = tuple(memories)
        self.squared = [memory.squared() for memory in memories]
        self.mechanisms = {memory.mechanism: memory.layer for memory in memories if memory.mechanism}

    def update(self, cache: Readings, losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch: reduced fast weights [R, firings, 3], `hook_alpha` and `hook_write_gate` [R, T].

        Raises MeasurementError for a retention that is none, matrices of one memory that were not shown at every
        position, and windows of which different text was written that have the same fast weights.
        """
        mask, shape = as_bool(scored), (len(batch.lengths), len(self.positions))
        broken = np.cumsum(mask & ~np.isfinite(as_float64(losses)), axis=1) > 0
        reached = batch.lengths[:, None] >= np.array(self.positions)
        kept = {name: self._retention(cache, name, mask, reached, batch) for name in self.mechanisms}
        values = np.full((*shape, len(self.memories), len(COLUMNS)), np.nan)
        due = [position for j, position in enumerate(self.positions) if reached[:, j].any()]
        for i, memory in enumerate(self.memories):
            sums = _shown(cache, memory, due)
            for j, position in enumerate(due):
                rows = reached[:, j]
                if self.squared[i]:
                    retention = kept[memory.mechanism][rows, j] if memory.mechanism else None
                    found = ratios(
                        sums[rows, j], self.squared[i], memory.target, retention, broken[rows, position - 1]
                    )
                    for name, column in found.items():
                        values[rows, j, i, COLUMNS.index(name)] = column
                    _check_own(
                        memory, found, _text_written(cache, memory, batch.tokens[rows], rows, position)
                    )
        self._of("fast", values.shape[1:]).update(values, batch.group)
        if kept:
            self._of("retention", (len(self.positions), len(kept))).update(
                np.stack(list(kept.values()), axis=-1), batch.group
            )

    def _retention(
        self, cache: Readings, mechanism: str, mask: BoolArray, reached: BoolArray, batch: EvalBatch
    ) -> FloatArray:
        """Γ [R, positions], NaN where a window does not reach or is not finite; the mean of ln α on the way."""
        alpha = as_float64(cache[f"{mechanism}.hook_alpha"])
        if alpha.shape != mask.shape:
            raise MeasurementError(
                f"{mechanism}.hook_alpha is {list(alpha.shape)}, the losses {list(mask.shape)}"
            )
        alpha = np.where(np.isfinite(alpha), alpha, np.nan)
        known = mask & ~np.isnan(alpha)
        if bad := int((known & ((alpha < 0) | (alpha > 1))).sum()):
            raise MeasurementError(
                f"{mechanism}.hook_alpha is outside [0, 1] at {bad} tokens: it is no retention"
            )
        mean = self.moments.setdefault(f"alpha.{mechanism}", GroupedMean())
        assert isinstance(mean, GroupedMean)
        mean.update(np.log(np.maximum(np.where(known, alpha, 1.0), _SMALLEST)), known, batch.group)
        if not reached.any():
            return np.full(reached.shape, np.nan)
        gate = as_float64(cache[f"{mechanism}.hook_write_gate"])
        last = np.array(self.positions) - 1
        if len(gate) != len(alpha) or not last[reached.any(axis=0)].max() < gate.shape[1] <= alpha.shape[1]:
            raise MeasurementError(
                f"{mechanism}.hook_write_gate is {list(gate.shape)}, hook_alpha {list(alpha.shape)}: not a gate a token"
            )
        kept = 1.0 - gate * (1.0 - alpha[:, : gate.shape[1]])
        log_kept = np.log(np.maximum(kept, _SMALLEST)).cumsum(axis=1)
        return np.where(reached, np.exp(log_kept[:, np.minimum(last, gate.shape[1] - 1)]), np.nan)

    def _of(self, name: str, shape: tuple[int, ...]) -> WindowMeans:
        found = self.moments.setdefault(name, WindowMeans(shape))
        assert isinstance(found, WindowMeans)
        return found

    def quantities(self) -> list[Quantity]:
        """Rows by memory and position, then by layer."""
        if "fast" not in self.moments:
            return []
        found: list[Quantity] = []
        windows = self.moments["fast"].compute()
        for name, (i, memory) in itertools.product((*RATIOS, *PARTS), enumerate(self.memories)):
            if not self.squared[i] or (name in PARTS and not _splits(memory)):
                continue
            for j in self._reached(windows, i):
                place = self._place(name, memory.layer, memory.component, j)
                found.append(_row(place, _at(windows, (j, i, COLUMNS.index(name)))))
        for i, (mechanism, layer) in enumerate(self.mechanisms.items()):
            kept = self.moments["retention"].compute()
            for j in range(len(self.positions)):
                moments = _at(kept, (j, i))
                if moments.n.any():
                    found.append(_row(self._place("retention", layer, _part(mechanism), j), moments))
            place, effect = Place("half_life", layer, _part(mechanism)), HALF_LIFE_EFFECT * self.context
            sources = partial(_one, self.moments[f"alpha.{mechanism}"])
            found.append(Quantity(place, "tokens", half_life, sources, _POSITIVE, effect))
        return found

    def _place(self, name: str, layer: int | None, component: str, j: int) -> Place:
        return Place(name, layer, component, str(self.positions[j]))

    def _reached(self, windows: Moments, i: int) -> list[int]:
        """Positions, by their ordinal, at which there was a window to see memory i in."""
        return [j for j in range(len(self.positions)) if any(_counts(windows, j, i).values())]

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """`diverged` where fast weights, or losses so far, are not finite; that nothing decays."""
        found: dict[Place, tuple[Verdict | None, str]] = {}
        if "fast" not in self.moments:
            return found
        windows = self.moments["fast"].compute()
        for i, memory in enumerate(self.memories):
            for j in self._reached(windows, i):
                n, notes = _counts(windows, j, i), []
                if n["lost"]:
                    total = sum(n.values())
                    notes.append(f"fast weights, or losses, are not finite in {n['lost']} of {total} windows")
                for name in (*RATIOS, *PARTS):
                    also = [INIT_NOTE] if name == "decay_part" and memory.target == "init" else []
                    place = self._place(name, memory.layer, memory.component, j)
                    found[place] = (Verdict.DIVERGED if n["lost"] else None, "; ".join(notes + also))
        for mechanism, layer in self.mechanisms.items():
            mean = self.moments[f"alpha.{mechanism}"]
            if mean.n_tokens and not mean.compute().pooled().mean()[0]:
                why = "retention is exactly 1 at every token: nothing decays, the half-life is infinite"
                found[Place("half_life", layer, _part(mechanism))] = (Verdict.NOT_APPLICABLE, why)
        return found

    def measurements(self) -> list[Measurement]:
        """All rows, and `n/a` for what the model does not have or does not say."""
        rows = super().measurements()
        if not rows:
            return rows
        for i, memory in enumerate(self.memories):
            if not self.squared[i]:
                why = "all meta weights are zero: nothing is a share of that"
                rows += [self._nothing(Place(name, memory.layer, memory.component), why) for name in RATIOS]
        missing = "nothing decays here"
        if any(memory.target is None for memory in self.memories):
            missing = "the model does not say what its fast weights decay towards"
        elif any(memory.target for memory in self.memories):
            missing = "the model does not show both retention and write gate"
            if splitting := [i for i, memory in enumerate(self.memories) if _splits(memory)]:
                missing = "no window is finite where all is written"
                if not any(self.squared[i] for i in splitting):
                    missing = "all meta weights are zero: nothing is a share of that"
        found = {row.place.statistic for row in rows}
        return rows + [self._nothing(Place(name), missing) for name in (*PARTS, *DECAY) if name not in found]

    def _nothing(self, place: Place, why: str) -> Measurement:
        nothing, verdict = value_without_tokens(math.nan), Verdict.NOT_APPLICABLE
        return Measurement(place, self.condition, "", nothing, override=verdict, note=why)


def ratios(
    sums: FloatArray, meta: float, target: str | None, retention: FloatArray | None, broken: BoolArray
) -> dict[str, FloatArray]:
    """Everything that `products` of a memory say, by column, NaN where it is not defined: sums [R, 3] to [R] each.

    meta: ‖θ_meta‖². retention: Γ [R], None where it is not known. broken: [R], a loss so far is no number, for which no
    gate opens: fast weights may then be finite and are not those of the text.
    """
    finite = np.isfinite(sums).all(axis=1) & math.isfinite(meta) & ~broken
    fast, inner, moved = (np.where(finite, column, np.nan) for column in sums.T)
    nonzero = np.where(fast > 0, fast, np.nan)
    found = {
        "relative_drift": np.sqrt(moved / meta),
        "fast_meta_cosine": np.clip(inner / np.sqrt(nonzero * meta), -1.0, 1.0),
        "norm_ratio": np.sqrt(fast / meta),
        "lost": np.where(finite, np.nan, 1.0),
    }
    decayed = np.zeros_like(fast) if target == "init" else 1.0 - retention if retention is not None else None
    if target and decayed is not None:
        # ‖θ_fast − Γ' θ_meta‖², Γ' = 1 − decayed, about whichever of 0 and θ_meta is nearer: nothing cancels there.
        left = 1.0 - decayed
        rest = np.where(
            left < 0.5,
            fast - 2 * left * inner + left**2 * meta,
            moved + 2 * decayed * (inner - meta) + decayed**2 * meta,
        )
        found["decay_part"] = np.where(finite, decayed, np.nan)
        found["write_part"] = np.sqrt(np.maximum(rest, 0.0) / meta)
    return found


def _splits(memory: Memory) -> bool:
    return memory.target == "init" or (memory.target == "zero" and bool(memory.mechanism))


def _shown(cache: Readings, memory: Memory, due: Sequence[int]) -> FloatArray:
    """`products` [R, positions, 3] of a memory at the positions that are due in this batch.

    Raises MeasurementError where any of its matrices was not shown at one.
    """
    sums = []
    for name in memory.metas if due else ():
        at = cache.positions[name].tolist() if name in cache else []
        if missing := [position for position in due if position not in at]:
            raise MeasurementError(
                f"{name} was not shown after {missing[0]} tokens, where its write period ends: fast weights are shown "
                "there whether or not anything was written"
            )
        sums.append(as_float64(cache[name])[:, [at.index(position) for position in due]])
    total: FloatArray = np.sum(sums, axis=0)
    return total


def _text_written(
    cache: Readings, memory: Memory, tokens: IntArray, rows: BoolArray, position: int
) -> IntArray:
    """Tokens [R, position + 1] that writes can hang on, up to the last open gate and its target; −1 behind."""
    open_at = np.ones((len(tokens), position), dtype=bool)
    if memory.gate in cache:
        open_at = as_float64(cache[memory.gate])[rows, :position] != 0
    last = np.where(open_at.any(axis=1), position - 1 - np.argmax(open_at[:, ::-1], axis=1), -2)
    return np.where(np.arange(position + 1) <= last[:, None] + 1, tokens[:, : position + 1], -1)


def _check_own(memory: Memory, found: Mapping[str, FloatArray], tokens: IntArray) -> None:
    """Raise MeasurementError where windows of different text have one and the same written fast weights.

    Equal to the last bit, and not by decay alone, which may do the same to every window. tokens: those that were
    written; windows may begin alike and be written nowhere else.
    """
    written = found.get("write_part", found["relative_drift"] if memory.target == "" else None)
    if written is None or len(tokens) < 2 or not (tokens != tokens[0]).any():
        return
    if written[0] > _COPIED and all((found[name] == found[name][0]).all() for name in RATIOS):
        raise MeasurementError(
            f"{memory.key} has the same fast weights in all {len(tokens)} windows of a batch, whose texts differ: its "
            "state is shared between sequences"
        )


def _counts(windows: Moments, j: int, i: int) -> dict[str, int]:
    names = ("relative_drift", "lost")
    return {name: int(_at(windows, (j, i, COLUMNS.index(name))).n.sum()) for name in names}


def _part(mechanism: str) -> str:
    """Name what is part of a layer: "selfmod" of "blocks.0.selfmod"."""
    return re.sub(r"^blocks\.\d+\.", "", mechanism)


def _row(place: Place, moments: Moments) -> Quantity:
    bounds = _BOUNDS.get(place.statistic, _POSITIVE)
    return Quantity(place, "1", mean_of, partial(_one, moments), bounds, RATIO_EFFECT)


def _one(source: GroupedMoments | Moments) -> tuple[GroupedMoments | Moments]:
    return (source,)
