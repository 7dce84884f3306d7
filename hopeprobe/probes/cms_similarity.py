"""Do the levels of the CMS repeat each other? Cosine, linear CKA and effective rank, per layer and pair.

A level ℓ reads h_ℓ and adds Δ_ℓ to it: o_ℓ = h_ℓ + Δ_ℓ, all [B, T, d]. Over the scored tokens t, for each
pair of levels a|b (written in the model's order, "fast|slow"):

    output_cosine          mean_t ⟨o_a,t, o_b,t⟩ / (‖o_a,t‖ ‖o_b,t‖)            in [−1, 1]
    delta_cosine           mean_t ⟨Δ_a,t, Δ_b,t⟩ / (‖Δ_a,t‖ ‖Δ_b,t‖)            in [−1, 1]
    output_cka, delta_cka  ‖C_ab‖²_F / (‖C_aa‖_F ‖C_bb‖_F), C covariances over t   in [0, 1]

and for each level

    output_effective_rank, delta_effective_rank   exp(−Σ_i p_i ln p_i), p_i = λ_i / Σ λ of C_ℓℓ   in [1, d]

Units: "1" for ratios, "dimensions" for ranks. Smallest effects: 0.05 for ratios, 5 % of d for ranks.

Nulls: own-init and fresh-init for all; for cosines `shuffled`, the pairing of tokens broken (a's vector
against b's half a window away, among the scored tokens of its row); analytic 0 for the cosine of deltas, as
independent levels add nearly orthogonal vectors. The cosine of outputs has no such value: levels that read
one input share it, so their outputs are alike before anything is learned.

A token where one of the two vectors has length zero has no cosine and is left out, and the note counts it. A
level whose delta is exactly zero, or does not vary, gives `no-signal` for all rows it takes part in. One level
alone makes pairs `n/a`.

Cost: for L levels, L(L + 1)/2 products of [T, d] matrices a window, layer and kind; 64·8·d² bytes for each
(34 MB at d = 256, so 1.2 GB for six layers of two levels); then 65 eigenvalue decompositions [d, d] a rank.

Source: "Dissecting HOPE", section 4.2, which reports a cosine of outputs of 0.77 and takes it for redundancy.
Two levels that were never trained give the same 0.77.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    CKA_BOUNDS,
    COSINE_BOUNDS,
    GroupedMean,
    GroupedMoments,
    Moments,
    Verdict,
    as_float64,
    cka_of,
    effective_rank_of,
    mean_of,
    token_cosine,
    varies,
)
from hopeprobe.stats.arrays import as_bool

from .base import Accumulator, Measurement, NullValue, Place, Probe, Quantity, value_without_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import BoolArray, FloatArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

KINDS = ("output", "delta")
RATIO_EFFECT = 0.05
RANK_EFFECT = 0.05  # of the width

_HOOK = {"output": "hook_out", "delta": "hook_delta"}
_DELTA = re.compile(r"blocks\.(\d+)\.cms\.(\w+)\.hook_delta")
_NAMES = "abcdefghijklmnopqrstuvwxyz"  # moments name their vectors with one letter


def levels_of(hook_names: Mapping[str, object]) -> dict[int, tuple[str, ...]]:
    """Find the CMS levels of each layer, in the model's order, from the names of its hook points."""
    found: dict[int, tuple[str, ...]] = {}
    for name in hook_names:
        if match := _DELTA.fullmatch(name):
            layer = int(match[1])
            found[layer] = (*found.get(layer, ()), match[2])
    return found


def half_window_away(mask: BoolArray) -> tuple[IntArray, BoolArray]:
    """Pair each scored token with another of its row: bool [R, T] → index int64 [R, T], bool [R, T].

    The k-th of n scored tokens gets the ((k + n//2) mod n)-th; a row with fewer than two has no pair.
    """
    index = np.zeros(mask.shape, dtype=np.int64)
    paired = mask & (mask.sum(axis=1, keepdims=True) >= 2)
    for row in range(len(mask)):
        scored = np.flatnonzero(paired[row])
        index[row, scored] = np.roll(scored, -(len(scored) // 2))
    return index, paired


class CMSSimilarity(Probe):
    """Similarity of the levels of the continuum memory; definitions at the top of this file."""

    name: ClassVar[str] = "cms-similarity"
    question: ClassVar[str] = "Do the levels of the CMS repeat each other?"
    statistics: ClassVar[tuple[str, ...]] = (
        "output_cosine",
        "delta_cosine",
        "output_cka",
        "delta_cka",
        "output_effective_rank",
        "delta_effective_rank",
    )

    def applies(self, subject: Subject) -> str | None:
        """None, or that the model has no CMS."""
        return None if levels_of(subject.module.hook_dict) else "this model has no CMS levels"

    def hooks(self, subject: Subject) -> list[str]:
        """Outputs and deltas of every level."""
        levels = levels_of(subject.module.hook_dict)
        return [
            _hook(layer, level, kind) for layer, names in levels.items() for level in names for kind in KINDS
        ]

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:  # noqa: ARG002
        """Make an empty accumulator for the levels that this model has."""
        return LevelSimilarity(condition, levels_of(subject.module.hook_dict))

    def reference_nulls(self, place: Place, subject: Subject, windows: EvalWindows) -> tuple[NullValue, ...]:  # noqa: ARG002
        """Independent levels add orthogonal vectors: analytic 0 for the cosine of deltas."""
        return (NullValue("analytic", 0.0),) if place.statistic == "delta_cosine" else ()


class LevelSimilarity(Accumulator):
    """Moments of outputs and deltas of all levels, per layer: joint comoments, and cosines as means."""

    def __init__(self, condition: str, levels: Mapping[int, Sequence[str]]) -> None:
        super().__init__(condition)
        self.levels = {layer: tuple(names) for layer, names in levels.items()}

    def update(
        self,
        cache: Mapping[str, Tensor],
        losses: Tensor,  # noqa: ARG002
        scored: Tensor,
        batch: EvalBatch,
    ) -> None:
        """Add one batch; reads `hook_out` and `hook_delta` of every level, [R, T, d]."""
        mask = as_bool(scored)
        other, paired = half_window_away(mask)
        rows = np.arange(len(mask))[:, None]
        for (layer, levels), kind in itertools.product(self.levels.items(), KINDS):
            vectors = [_finite(cache, _hook(layer, level, kind), mask) for level in levels]
            joint = self.moments.setdefault(
                f"{kind}.{layer}", _JointMoments(len(levels), vectors[0].shape[-1])
            )
            assert isinstance(joint, _JointMoments)
            joint.update(vectors, mask, batch.group)
            for a, b in itertools.combinations(range(len(levels)), 2):
                pair = f"{kind}.{layer}.{levels[a]}|{levels[b]}"
                self._add_cosine(pair, vectors[a], vectors[b], mask, batch.group)
                self._add_cosine(f"shuffled.{pair}", vectors[a], vectors[b][rows, other], paired, batch.group)

    def _add_cosine(self, name: str, x: FloatArray, y: FloatArray, mask: BoolArray, group: IntArray) -> None:
        cosine = token_cosine(x, y)
        mean = self.moments.setdefault(name, GroupedMean())
        assert isinstance(mean, GroupedMean)
        mean.update(cosine.value, mask & ~cosine.zero_norm, group)

    def quantities(self) -> list[Quantity]:
        """Rows for every layer, pair and level that was seen; shuffled cosines are nulls."""
        found: list[Quantity] = []
        for (layer, levels), kind in itertools.product(self.levels.items(), KINDS):
            joint = self.moments.get(f"{kind}.{layer}")
            if not isinstance(joint, _JointMoments):
                continue
            for a, b in itertools.combinations(range(len(levels)), 2):
                pair = f"{levels[a]}|{levels[b]}"
                for null in ("", "shuffled"):
                    mean = self.moments[".".join(filter(None, (null, kind, str(layer), pair)))]
                    place = Place(f"{kind}_cosine", layer, pair)
                    sources = partial(_one, mean)
                    found.append(Quantity(place, "1", mean_of, sources, COSINE_BOUNDS, RATIO_EFFECT, null))
                place = Place(f"{kind}_cka", layer, pair)
                found.append(
                    Quantity(place, "1", cka_of, partial(joint.pair, a, b), CKA_BOUNDS, RATIO_EFFECT)
                )
            for a, level in enumerate(levels):
                place = Place(f"{kind}_effective_rank", layer, level)
                bounds, effect = (1.0, float(joint.dim)), RANK_EFFECT * joint.dim
                spectrum = partial(joint.single, a)
                found.append(Quantity(place, "dimensions", effective_rank_of, spectrum, bounds, effect))
        return found

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """`no-signal` for what a silent level takes part in, and how many tokens have no cosine."""
        silent = {(layer, level): why for layer in self.levels for level, why in self._silent(layer)}
        found: dict[Place, tuple[Verdict | None, str]] = {}
        for place in (q.place for q in self.quantities() if not q.null_kind):
            notes = []
            verdict = None
            for level in place.component.split("|"):
                if place.layer is not None and (place.layer, level) in silent:
                    verdict = Verdict.NO_SIGNAL
                    notes.append(silent[place.layer, level])
            kind, _, statistic = place.statistic.partition("_")
            if statistic == "cosine":
                total = self.moments[f"{kind}.{place.layer}"].n_tokens
                defined = self.moments[f"{kind}.{place.layer}.{place.component}"].n_tokens
                if defined < total:
                    notes.append(f"{total - defined} of {total} tokens have no cosine: a {kind} of length 0")
            found[place] = (verdict, "; ".join(notes))
        return found

    def _silent(self, layer: int) -> list[tuple[str, str]]:
        joint = self.moments.get(f"delta.{layer}")
        if not isinstance(joint, _JointMoments) or not joint.n_tokens:
            return []
        found = []
        for a, level in enumerate(self.levels[layer]):
            moments = joint.single(a)[0].pooled()
            if not varies(moments)[0]:
                what = "is the same at every token" if moments.mean().any() else "is exactly zero"
                found.append((level, f"what {level} adds {what}"))
        return found

    def measurements(self) -> list[Measurement]:
        """All rows; where a layer has one level only, its pairs are there as `n/a`."""
        rows = super().measurements()
        for layer, levels in self.levels.items():
            if len(levels) == 1:
                note = f"one level only ({levels[0]}): there is no pair"
                rows += [
                    Measurement(
                        Place(f"{kind}_{statistic}", layer),
                        self.condition,
                        "1",
                        value_without_tokens(float("nan")),
                        RATIO_EFFECT,
                        Verdict.NOT_APPLICABLE,
                        note,
                    )
                    for kind, statistic in itertools.product(KINDS, ("cosine", "cka"))
                ]
        return rows


class _JointMoments(GroupedMoments):
    """Means and all comoments of L vectors [d] a token: each level's covariance is held once, not per pair."""

    def __init__(self, levels: int, dim: int) -> None:
        self.dim = dim
        names = _NAMES[:levels]
        pairs = ["".join(pair) for pair in itertools.combinations_with_replacement(names, 2)]
        super().__init__(dict.fromkeys(names, (dim,)), pairs)

    def update(self, vectors: Sequence[FloatArray], mask: BoolArray, group: IntArray) -> None:
        """Add the tokens under `mask`: one array [R, T, d] for each level."""
        self._update(dict(zip(_NAMES, vectors, strict=False)), mask, group)

    def single(self, a: int) -> tuple[Moments]:
        """Moments of level a, called x."""
        whole, x = self.compute(), _NAMES[a]
        return (Moments(whole.n, {"x": whole.means[x]}, {"xx": whole.comoments[x + x]}),)

    def pair(self, a: int, b: int) -> tuple[Moments]:
        """Moments of the levels a < b, called x and y."""
        whole, x, y = self.compute(), _NAMES[a], _NAMES[b]
        comoments = {"xx": x + x, "yy": y + y, "xy": x + y}
        return (
            Moments(
                whole.n,
                {"x": whole.means[x], "y": whole.means[y]},
                {name: whole.comoments[part] for name, part in comoments.items()},
            ),
        )


def _one(source: GroupedMoments) -> tuple[GroupedMoments]:
    return (source,)


def _hook(layer: int, level: str, kind: str) -> str:
    return f"blocks.{layer}.cms.{level}.{_HOOK[kind]}"


def _finite(cache: Mapping[str, Tensor], name: str, mask: BoolArray) -> FloatArray:
    vectors = as_float64(cache[name])
    bad = int((mask & ~np.isfinite(vectors).all(axis=-1)).sum())
    if bad:
        raise MeasurementError(
            f"{name} is not finite at {bad} of {int(mask.sum())} tokens: the model diverged"
        )
    return vectors
