"""What a mechanism changes in the loss, as a difference between conditions, and when that may be called help.

    Δ = Σ_i σ_i mean_t CE_t(condition i), σ_i = ±1        nats a token, over the same tokens t; negative: it helps

The rule in `hopeprobe.stats.verdict` asks whether Δ differs from Δ of the initial weights, in either direction. A
mechanism that died or that hurts differs too. So `learned` is left to the rule only where the mechanism lowers the
loss, and by more than it does at initialisation:

    no-signal     Δ is 0 in every group of documents, but for rounding: it changes no loss at all
    diverged      the live model is worse than guessing (ln V), and 0.05 nats worse than its own initial weights
    collapsed     the interval of Δ lies within the smallest effect, at initialisation it helped by more
    inconclusive  it helps less than at initialisation, raises the loss, or is not shown to help at all

Smallest effect: 0.01 nats, one per cent of perplexity; on 32,768 tokens paired differences are known to some 0.003.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hopeprobe.stats import GroupedMean, GroupedMoments, Verdict, mean_of
from hopeprobe.stats.arrays import as_bool

from .base import Accumulator, Finding, Place, Quantity, finite_losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats import Estimate, Moments
    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch

EFFECT = 0.01  # nats
WORSE = 0.05  # nats
WHOLE = "whole"
LOSS = "loss"
LEVEL_NOTE = "a level, not a comparison: decides nothing"

_ROUNDING = {"float64": 1e-12}  # nats; what rounding alone makes of no difference, in the mean of a group
_ROUNDING_ELSE = 1e-6


class PartLosses(Accumulator):
    """Mean loss under one condition, over all scored tokens and over parts of them."""

    def parts(self, batch: EvalBatch, scored: BoolArray) -> Mapping[str, BoolArray]:  # noqa: ARG002
        """Masks [R, T] by the name of the part; the part `whole` is shown as the condition's loss."""
        return {WHOLE: scored}

    def update(
        self,
        cache: Mapping[str, Tensor],  # noqa: ARG002
        losses: Tensor,
        scored: Tensor,
        batch: EvalBatch,
    ) -> None:
        """Add one batch; raises MeasurementError for a loss that is not finite."""
        for name, mask in self.parts(batch, as_bool(scored)).items():
            mean = self.moments.setdefault(name, GroupedMean())
            assert isinstance(mean, GroupedMean)
            mean.update(finite_losses(losses, mask), mask, batch.group)

    def quantities(self) -> list[Quantity]:
        """The loss over all scored tokens, where that part is kept."""
        if WHOLE not in self.moments:
            return []
        return [
            Quantity(Place(LOSS), "nats", mean_of, lambda: (self.moments[WHOLE],), smallest_effect=EFFECT)
        ]

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """A loss is there to be read beside the differences."""
        return {Place(LOSS): (Verdict.INCONCLUSIVE, LEVEL_NOTE)}


def contrast(place: Place, part: str, terms: Sequence[tuple[int, Accumulator]]) -> list[Quantity]:
    """The row Σ σ_i mean_i of one part, σ_i = ±1, the first +1; none where the part has no tokens."""
    sources = tuple(one.moments[part] for _, one in terms if part in one.moments)
    if len(sources) < len(terms) or not any(source.n_tokens for source in sources):
        return []
    signs = tuple(sign for sign, _ in terms)
    first, *others = terms
    label = first[1].condition + "".join(f" {'+' if s > 0 else '-'} {one.condition}" for s, one in others)
    function = partial(_combined, signs)
    return [
        Quantity(place, "nats", function, partial(_all, sources), smallest_effect=EFFECT, condition=label)
    ]


def _combined(signs: Sequence[int], *moments: Moments) -> FloatArray:
    total: FloatArray = np.sum([s * mean_of(m) for s, m in zip(signs, moments, strict=True)], axis=0)
    return total


def _all(sources: tuple[GroupedMoments, ...]) -> tuple[GroupedMoments, ...]:
    return sources


def overridden(finding: Finding, verdict: Verdict, why: str) -> Finding:
    """The finding with a verdict of the probe's own, and the reason."""
    note = "; ".join(filter(None, (finding.note, why)))
    return dataclasses.replace(finding, override=verdict, note=note)


def group_values(estimate: Estimate) -> FloatArray:
    """What a difference of means is in each group that has tokens: its pseudo-values, float64 [groups]."""
    used = estimate.weights > 0
    away = np.divide(estimate.influence[used], estimate.weights[used])
    return estimate.plug_in + np.nan_to_num(away)  # NaN where there is one group only


def unchanged(finding: Finding, subject: Subject) -> bool:
    """Whether the two sides of a difference are the same in every group, but for rounding."""
    values = group_values(finding.measurement.estimate)
    slack = _ROUNDING.get(subject.dtype, _ROUNDING_ELSE)
    return bool(len(values)) and bool((np.abs(values) <= slack).all())


class _Change(NamedTuple):
    value: float
    low: float


def _from_start(finding: Finding) -> _Change | None:
    """Difference to the own initial weights, without them to fresh ones, and its lower bound."""
    estimate = finding.measurement.estimate
    if finding.difference is not None:
        return _Change(finding.difference.value, finding.difference.ci_low)
    if finding.fresh is not None:
        value = finding.fresh.difference
        return _Change(value, value + (estimate.ci_low - estimate.value))
    return None


def diverged(subject: Subject, findings: Sequence[Finding]) -> str:
    """Say so when the live model is surely worse than guessing and than its own start; "" otherwise."""
    for finding in findings:
        row = finding.measurement
        if (row.condition, row.place) != ("live", Place(LOSS)):
            continue
        start, guess = _from_start(finding), math.log(subject.vocab_size)
        if row.estimate.value > guess and start is not None and start.value > WORSE and not start.low <= 0:
            return (
                f"the live loss is {row.estimate.value:.3g} nats, {start.value:+.3g} from initialisation and "
                f"above that of guessing, {guess:.3g}"
            )
    return ""


def directed(finding: Finding, *, may_collapse: bool) -> Finding:
    """Keep the rule from calling something learned that does not help, or not more than at initialisation.

    may_collapse: whether an effect that is gone means that the mechanism died.
    """
    if finding.override is not None:
        return finding
    row, start = finding.measurement, _from_start(finding)
    value, low, high = row.estimate.value, row.estimate.ci_low, row.estimate.ci_high
    effect = row.smallest_effect
    if start is None or not math.isfinite(low):
        return finding  # nothing to call learned
    if start.value > effect:
        before = value - start.value
        gone = -effect <= low and high <= effect and start.low > effect and before < -effect
        if gone and may_collapse:
            return overridden(
                finding, Verdict.COLLAPSED, f"{before:+.3f} nats at initialisation, now nothing"
            )
        what = "helps less than" if value < 0 else "does not help, and is worse than"
        return overridden(
            finding, Verdict.INCONCLUSIVE, f"{what} at initialisation ({before:+.3f} nats there)"
        )
    if start.value < -effect and not high < 0:
        return overridden(
            finding, Verdict.INCONCLUSIVE, "lower than at initialisation, but not shown to lower the loss"
        )
    return finding


def joint(finding: Finding, both: Finding, parts: Sequence[Finding]) -> Finding:
    """How two depend on each other is as undecided as what both change, and has collapsed where one of them has.

    One that changes nothing alone decides nothing: the other may stand in for it.
    """
    if finding.override is None:
        for one in (both, *(part for part in parts if part.override == Verdict.COLLAPSED)):
            if one.override is not None:
                name, why = one.measurement.place.component, one.note.rpartition("; ")[2]
                return overridden(finding, one.override, f"{name}: {why}")
    return finding
