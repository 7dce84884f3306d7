"""Do the levels of the CMS repeat each other? Cosine, CKA, canonical correlation, effective rank, by layer and pair.

A level ℓ reads h_ℓ and adds Δ_ℓ to it: o_ℓ = h_ℓ + Δ_ℓ, all [B, T, d]. Over the scored tokens t, for each
pair of levels a|b (written in the model's order, "fast|slow"):

    output_cosine          mean_t ⟨o_a,t, o_b,t⟩ / (‖o_a,t‖ ‖o_b,t‖)            in [−1, 1]
    delta_cosine           mean_t ⟨Δ_a,t, Δ_b,t⟩ / (‖Δ_a,t‖ ‖Δ_b,t‖)            in [−1, 1]
    output_cka, delta_cka  ‖C_ab‖²_F / (‖C_aa‖_F ‖C_bb‖_F), C covariances over t   in [0, 1]
    output_cca, delta_cca  ‖C_aa^(−1/2) C_ab C_bb^(−1/2)‖²_F / d: squared canonical correlations, their mean   in [0, 1]

and for each level

    output_effective_rank, delta_effective_rank   exp(−Σ_i p_i ln p_i), p_i = λ_i / Σ λ of C_ℓℓ   in [1, d]

CKA weighs directions by their variance, canonical correlations all alike (what float32 rounds aside, see
`hopeprobe.stats.similarity.cca`). Units: "1" for ratios, "dimensions" for ranks. Smallest effects: 0.05 for
ratios, 5 % of d for ranks.

Nulls: own-init and fresh-init for all; for cosines `shuffled`, the pairing of tokens broken (a's vector
against b's half a window away, among the scored tokens of its row); analytic 0 for the cosine of deltas, as
independent levels add nearly orthogonal vectors. The cosine of outputs has no such value: levels that read
one input share it, so their outputs are alike before anything is learned.

A token where one of the two vectors has length zero has no cosine and is left out, and the note counts it. A
level whose delta is exactly zero, or does not vary, gives `no-signal` for all rows it takes part in. One level
alone makes pairs `n/a`. Under five tokens for each dimension of both levels canonical correlations are `n/a`
too: with as few as dimensions some are 1 whatever the levels do. Their plain value is too high by about d/n times the
number of tokens that act like one (of a document they are alike): 0.004 for a trained model of d = 64 on
32,768 tokens. The jackknife of second order takes that off; where it cannot, as under 80 tokens a dimension, the
row has the plain value, no interval, and is `inconclusive`. Fresh initialisations are compared by the plain value.

Reading. Read differences to own-init, never the cosine alone: outputs share their input, so they are alike before any
training; `delta_*` is what the levels themselves add. Redundant in use is another question: the redundancy of
`cms-contribution`.

Fails. A high cosine or CKA can be one direction that all tokens share, which an effective rank near 1 gives away; and
two levels can be alike in what they add and still be needed both, as what they add is a sum.

Cost: for L levels, L(L + 1)/2 products of [T, d] matrices a window, layer and kind; 64·8·d² bytes for each
(34 MB at d = 256, so 1.2 GB for six layers of two levels); then 73 times, a layer and kind, the eigenvalues
[d, d] of each level and two triangular solves a pair.

Source: "Dissecting HOPE", section 4.2, which reports a cosine of outputs of 0.77 and takes it for redundancy.
Two levels that were never trained give the same 0.77.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    CCA_BOUNDS,
    CKA_BOUNDS,
    COSINE_BOUNDS,
    MIN_GROUPS,
    Estimate,
    GroupedMean,
    GroupedMoments,
    Moments,
    Spectrum,
    Verdict,
    as_float64,
    canonical,
    jackknife_each,
    linear_cka,
    mean_of,
    rounding,
    second_order,
    token_cosine,
    varies,
)
from hopeprobe.stats.arrays import as_bool

from .base import Accumulator, Measurement, NullValue, Place, Probe, Quantity, measured, value_without_tokens
from .workers import n_workers, side_by_side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import BoolArray, FloatArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

KINDS = ("output", "delta")
RATIO_EFFECT = 0.05
RANK_EFFECT = 0.05  # of the width
HALF_TOKENS = (
    40  # for each dimension, in half of the text: intervals of canonical correlations hold from there on
)

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
        "output_cca",
        "delta_cca",
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
            vectors = [finite_vectors(cache, _hook(layer, level, kind), mask) for level in levels]
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
            found += _Together(joint, levels).quantities(kind, layer)
        return found

    def _remarks(self, quantities: Sequence[Quantity]) -> dict[Place, tuple[Verdict | None, str]]:
        """`no-signal` for what a silent level takes part in; tokens without a cosine, CCA without an interval."""
        silent = {(layer, level): why for layer in self.levels for level, why in self._silent(layer)}
        found: dict[Place, tuple[Verdict | None, str]] = {}
        for quantity in (q for q in quantities if not q.null_kind):
            place, verdict, notes = quantity.place, None, []
            for level in place.component.split("|"):
                if place.layer is not None and (place.layer, level) in silent:
                    verdict = Verdict.NO_SIGNAL
                    notes.append(silent[place.layer, level])
            kind, _, statistic = place.statistic.partition("_")
            total = self.moments[f"{kind}.{place.layer}"]
            if statistic == "cosine":
                defined = self.moments[f"{kind}.{place.layer}.{place.component}"].n_tokens
                if defined < total.n_tokens:
                    missing = total.n_tokens - defined
                    notes.append(f"{missing} of {total.n_tokens} tokens have no cosine: a {kind} of length 0")
            elif statistic == "cca" and not verdict and total.n_groups >= MIN_GROUPS:
                estimate = quantity.estimate()
                if np.isfinite(estimate.value) and np.isnan(estimate.se):
                    verdict = Verdict.INCONCLUSIVE
                    notes.append(
                        "no interval: too few tokens for so many dimensions, the bias cannot be taken off"
                    )
            found[place] = (verdict, "; ".join(notes))
        return found

    def _silent(self, layer: int) -> list[tuple[str, str]]:
        joint = self.moments.get(f"delta.{layer}")
        if not isinstance(joint, _JointMoments) or not joint.n_tokens:
            return []
        found = []
        whole = joint.compute().pooled()
        for name, level in zip(_NAMES, self.levels[layer], strict=False):
            if not varies(whole, name)[0]:
                what = "is the same at every token" if whole.mean(name).any() else "is exactly zero"
                found.append((level, f"what {level} adds {what}"))
        return found

    def measurements(self) -> list[Measurement]:
        """All rows; where a layer has one level only, its pairs are there as `n/a`."""
        quantities = self.quantities()
        together = dict.fromkeys(q.together for q in quantities if isinstance(q, _Column))
        for _ in side_by_side(_estimated, [None] * n_workers(len(together)), together):
            pass  # kept by each: two layers take no longer than one
        rows = measured(quantities, self.condition, self._remarks(quantities))
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
                    for kind, statistic in itertools.product(KINDS, ("cosine", "cka", "cca"))
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


class _Together:
    """CKA, CCA and effective ranks of one layer and kind: what leaves a group out is pooled once for all of them.

    Called with moments, [B], it gives all of them, [B, S]: each pair's CKA, each pair's CCA, each level's rank.
    """

    def __init__(self, joint: _JointMoments, levels: Sequence[str]) -> None:
        self.joint, self.levels = joint, levels
        self.pairs = list(itertools.combinations(range(len(levels)), 2))
        self.correlations = slice(len(self.pairs), 2 * len(self.pairs))
        self._estimates: list[Estimate] | None = None

    def quantities(self, kind: str, layer: int) -> list[Quantity]:
        """All rows."""
        dim = float(self.joint.dim)
        pairs = [f"{self.levels[a]}|{self.levels[b]}" for a, b in self.pairs]
        named = [
            *((f"{kind}_cka", pair, "1", CKA_BOUNDS, RATIO_EFFECT) for pair in pairs),
            *((f"{kind}_cca", pair, "1", CCA_BOUNDS, RATIO_EFFECT) for pair in pairs),
            *(
                (f"{kind}_effective_rank", level, "dimensions", (1.0, dim), RANK_EFFECT * dim)
                for level in self.levels
            ),
        ]
        return [
            _Column(
                Place(statistic, layer, component),
                unit,
                partial(self.column, column),
                partial(_one, self.joint),
                bounds,
                effect,
                together=self,
                index=column,
            )
            for column, (statistic, component, unit, bounds, effect) in enumerate(named)
        ]

    def estimates(self) -> list[Estimate]:
        """Values and intervals; of CCA with the second-order correction, for its bias is large."""
        if self._estimates is None:  # not a cached_property: until Python 3.12 those lock all instances
            self._estimates = self._estimated()
        return self._estimates

    def _estimated(self) -> list[Estimate]:
        low, high = np.zeros(self.width), np.ones(self.width)
        low[self.correlations.stop :], high[self.correlations.stop :] = 1.0, self.joint.dim
        moments = self.joint.compute()
        found = jackknife_each(self, moments, bounds=(low, high))
        cut = self.correlations
        found[cut] = second_order(self.correlations_of_half, moments, found[cut], CCA_BOUNDS)
        return list(found)

    def correlations_of_half(self, moments: Moments) -> FloatArray:
        """Each pair's CCA, [B, pairs], of half of the tokens; NaN where the whole is too little for an interval."""
        enough = moments.n >= HALF_TOKENS * self.joint.dim
        return np.where(enough[:, None], self(moments)[:, self.correlations], np.nan)

    @cached_property
    def plug_ins(self) -> list[float]:
        """Values on all tokens."""
        values: list[float] = self(self.joint.compute().pooled())[0].tolist()
        return values

    @property
    def width(self) -> int:
        """How many numbers there are."""
        return 2 * len(self.pairs) + len(self.levels)

    def column(self, index: int, moments: Moments) -> FloatArray:
        """One of them, [B]."""
        value: FloatArray = self(moments)[:, index]
        return value

    def __call__(self, moments: Moments) -> FloatArray:
        names = _NAMES[: len(self.levels)]
        covariances = [moments.covariance(name * 2) for name in names]
        spectra = [Spectrum.of(covariance) for covariance in covariances]
        floors = [rounding(moments, name) for name in names]
        vary = [varies(moments, name) for name in names]
        cka, cca = [], []
        for a, b in self.pairs:
            between = moments.covariance(names[a] + names[b])
            both = vary[a] & vary[b]
            cka.append(np.where(both, linear_cka(covariances[a], covariances[b], between), np.nan))
            pair = canonical(spectra[a], spectra[b], between, (floors[a], floors[b]), moments.n)
            cca.append(np.where(both, pair, np.nan))
        ranks = [np.where(v, s.effective_rank(), np.nan) for v, s in zip(vary, spectra, strict=True)]
        return np.stack([*cka, *cca, *ranks], axis=-1)


@dataclass(frozen=True, kw_only=True)
class _Column(Quantity):
    """One of the numbers of `_Together`, which computes all of them when the first is asked for."""

    together: _Together
    index: int

    def estimate(self) -> Estimate:
        return self.together.estimates()[self.index]

    def plug_in(self) -> float:
        return self.together.plug_ins[self.index]


def _estimated(_worker: None, together: _Together) -> list[Estimate]:
    return together.estimates()


def _one(source: GroupedMoments) -> tuple[GroupedMoments]:
    return (source,)


def _hook(layer: int, level: str, kind: str) -> str:
    return f"blocks.{layer}.cms.{level}.{_HOOK[kind]}"


def finite_vectors(cache: Mapping[str, Tensor], name: str, mask: BoolArray) -> FloatArray:
    """What a point shows, float64 [R, T, d]. Raises MeasurementError where one under the mask is not finite."""
    vectors = as_float64(cache[name])
    bad = int((mask & ~np.isfinite(vectors).all(axis=-1)).sum())
    if bad:
        raise MeasurementError(
            f"{name} is not finite at {bad} of {int(mask.sum())} tokens: the model diverged"
        )
    return vectors
