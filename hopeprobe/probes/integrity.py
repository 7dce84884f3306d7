"""Are these the trained weights? Frozen loss, distance from the own initialisation, keys loaded.

    frozen_loss         mean_t CE_t with every write gate closed, nats a token (what the slow weights know)
    distance_from_init  ‖θ − θ0‖ / ‖θ0‖ over the parameters of one group, θ0 the run's own initial weights
    keys_loaded         weights found in the checkpoint's file

Nulls of frozen_loss: own-init and fresh-init, ln V (`analytic`: every token equally likely) and `unigram`
(token frequencies of the training split, scored on the same tokens; the row says so where these are among
those it was fit on). Smallest effect: 0.05 nats.

Nulls of the distance: `fresh-init`, the distance between the own and two other initialisations, √2 for weights
of mean 0; and `optimiser`, the furthest that AdamW can have gone. With rate r_s, decay w and λ_s = r_s w,

    c_s = (1 − β1)/√(1 − β2) · √(Σ_{j<s} (β1²/β2)^j) · √(1 − β2^s)/(1 − β1^s)   largest |m̂_s|/√v̂_s (Cauchy–Schwarz)
    D_s = (1 − λ_s) D_{s−1} + λ_s ‖θ0‖ + r_s c_s √n + u (‖θ0‖ + D_{s−1})     n parameters, D_0 = 0, u rounding

D = a √n + b ‖θ0‖ with a and b the larger of those with decay w and with none, as vectors are not decayed.

Verdicts. `untrained`, for every row, when the file says step 0, nothing moved, or no weight was loaded; and
for weights that lie further away than the optimiser can go, or as far as another initialisation in every
group, unless the loss fell, also below where other initialisations lie: then the initial weights are not this
run's and nothing is decided. A frozen loss that is not 0.05 nats below its value at initialisation (the whole
interval of the difference lies above that) says `untrained` only where it is not known how far the weights
moved. Where they did move, as far as training can, every row is `inconclusive`: a first step, training that
failed, or a text of another kind. Otherwise the rule decides on the loss; a distance or a count alone decides
nothing.

Reading. Look here first. `untrained` says that every other number is the initialiser's, whatever the file is called.
`learned` says that training lowered the loss of the slow weights; how far it lies below `unigram` says whether they
use context.

Fails. It asks of these weights and this text: a run that started from other weights than its seed gives (a model
fine-tuned from another) is set against the wrong start, which the distances then show; and on a text that the model
cannot read a trained one looks untrained.

Cost: one pass, and three initial models. Source: "Dissecting HOPE", sections 4.2–4.4, whose figures are those
of a model whose trained weights were never loaded, set against another initialisation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from scipy.special import stdtrit

from hopeprobe.conditions import FROZEN
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import GroupedMean, Verdict, mean_of
from hopeprobe.stats.arrays import as_bool
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens import Unigram

from .base import (
    Accumulator,
    Finding,
    Measurement,
    NullValue,
    Place,
    Probe,
    Quantity,
    finite_losses,
    value_without_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

LOSS_EFFECT = 0.05  # nats
ALIKE = 0.05  # a distance this close, relatively, to that of another initialisation looks like one
_OTHER_SEEDS = (2_000_003, 2_000_029, 2_000_039)
_ALL = "all"


def relative_distance(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> float:
    """‖θ − θ0‖ / ‖θ0‖ over all tensors, in float64; range [0, ∞), NaN where ‖θ0‖ is 0.

    Raises MeasurementError when names or shapes differ, or a weight is not finite.
    """
    if weights.keys() != initial.keys() or any(weights[k].shape != initial[k].shape for k in weights):
        raise MeasurementError("the initial weights have other names or shapes than the checkpoint's")
    moved = norm = 0.0
    for name, tensor in weights.items():
        start = initial[name].detach().cpu().double()
        moved += float((tensor.detach().cpu().double() - start).square().sum())
        norm += float(start.square().sum())
    if not (math.isfinite(moved) and math.isfinite(norm)):
        raise MeasurementError("a weight is not finite: the model diverged")
    return math.sqrt(moved / norm) if norm else math.nan


def adamw_reach(training: Mapping[str, Any], steps: int, rounding: float = 0.0) -> tuple[float, float] | None:
    """How far AdamW can go in `steps`: (a, b) with ‖θ − θ0‖ ≤ a √n + b ‖θ0‖; None without a learning rate.

    training: `learning_rate`, and if known `warmup` (steps, linear), `beta1`, `beta2` (default 0.9, 0.999),
    `weight_decay` (default 0; it may be that of some parameters only). A rate that falls later only goes less
    far. rounding: u, relative, of the weights' number format.
    """
    if not isinstance(training.get("learning_rate"), int | float):
        return None
    beta1, beta2 = float(training.get("beta1", 0.9)), float(training.get("beta2", 0.999))
    decay, warmup = float(training.get("weight_decay", 0.0)), max(1, int(training.get("warmup", 0)))
    ab = dict.fromkeys((0.0, decay), (0.0, 0.0))
    series = 0.0
    for step in range(1, steps + 1):
        rate = float(training["learning_rate"]) * min(1.0, step / warmup)
        series = 1.0 + series * beta1**2 / beta2
        unbias = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        largest = (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(series) * unbias
        for w, (a, b) in ab.items():
            keep, pull = 1 - rate * w + rounding, rate * w + rounding
            ab[w] = keep * a + rate * largest, keep * b + pull
    # Each the larger of the two: only so the bound holds for a mixture of decayed and other parameters.
    return max(a for a, _ in ab.values()), max(b for _, b in ab.values())


class Integrity(Probe):
    """Whether a checkpoint holds trained weights; definitions at the top of this file."""

    name: ClassVar[str] = "integrity"
    question: ClassVar[str] = "Are these the trained weights?"
    statistics: ClassVar[tuple[str, ...]] = ("frozen_loss",)

    def applies(self, subject: Subject) -> str | None:  # noqa: ARG002
        """None: the question makes sense for every model."""
        return None

    def conditions(self, subject: Subject) -> Sequence[Condition]:  # noqa: ARG002
        """Frozen alone: what the slow weights know."""
        return (FROZEN,)

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:  # noqa: ARG002
        """Make an empty accumulator of the loss."""
        return MeanLoss(condition)

    def reference_nulls(self, place: Place, subject: Subject, windows: EvalWindows) -> tuple[NullValue, ...]:
        """Compute ln V, and the loss of training-split token frequencies on the same targets."""
        if place.statistic != "frozen_loss":
            return ()
        nulls = [NullValue("analytic", math.log(subject.vocab_size))]
        if windows.data.n_tokens("train"):
            targets = np.concatenate(
                [
                    row[1 : length + 1]
                    for batch in windows
                    for row, length in zip(batch.tokens, batch.lengths, strict=True)
                ]
            )
            unigram = Unigram.fit(windows.data.split_tokens("train"), subject.vocab_size)
            note = (
                ""
                if windows.split == "heldout"
                else f"the unigram model was fit on tokens that it is scored on (split {windows.split}), so its "
                "loss is too low"
            )
            nulls.append(NullValue("unigram", unigram.loss(targets), n=len(targets), note=note))
        return tuple(nulls)

    def of_model(
        self,
        subject: Subject,
        initial: Subject | None,
        windows: EvalWindows,  # noqa: ARG002
    ) -> list[Measurement]:
        """Distances by parameter group, and the count of keys."""
        return [*_distances(subject, initial), _keys_loaded(subject)]

    def review(self, subject: Subject, findings: Sequence[Finding]) -> Sequence[Finding]:
        """Set `untrained`, or what else keeps the rule from deciding; see the top of this file."""
        loss = next((f for f in findings if f.measurement.place.statistic == "frozen_loss"), None)
        distances = [f for f in findings if f.measurement.place.statistic == "distance_from_init"]
        untrained = _surely_untrained(subject, findings, distances)
        not_below = _not_below_initial(loss)
        foreign = _looks_foreign(distances)
        moved = _moved(distances)
        if not_below and (untrained or foreign or not moved):
            untrained.append(not_below)
        if foreign and not _fell(loss):
            untrained.append(foreign)
        verdict, why = None, ""
        if untrained:
            verdict, why = Verdict.UNTRAINED, "; ".join(untrained)
        elif foreign:
            verdict = Verdict.INCONCLUSIVE
            why = f"{foreign}, yet the loss fell: the initial weights are not this run's"
        elif not_below:
            verdict, why = Verdict.INCONCLUSIVE, f"{moved}, but on this text {not_below}"
        return [_decided(finding, verdict, why) for finding in findings]


class MeanLoss(Accumulator):
    """Mean loss over scored tokens, nats."""

    def update(
        self,
        cache: Mapping[str, Tensor],  # noqa: ARG002
        losses: Tensor,
        scored: Tensor,
        batch: EvalBatch,
    ) -> None:
        """Add one batch; raises MeasurementError for a loss that is not finite."""
        mean = self.moments.setdefault("loss", GroupedMean())
        assert isinstance(mean, GroupedMean)
        mask = as_bool(scored)
        mean.update(finite_losses(losses, mask), mask, batch.group)

    def quantities(self) -> list[Quantity]:
        """One row."""
        if "loss" not in self.moments:
            return []
        place = Place(f"{self.condition}_loss")
        return [
            Quantity(place, "nats", mean_of, lambda: (self.moments["loss"],), smallest_effect=LOSS_EFFECT)
        ]


def _row(statistic: str, component: str, unit: str, value: float, note: str = "") -> Measurement:
    verdict = Verdict.NOT_APPLICABLE if math.isnan(value) else None
    place = Place(statistic, component=component)
    return Measurement(place, "", unit, value_without_tokens(value), override=verdict, note=note)


def _distances(subject: Subject, initial: Subject | None) -> list[Measurement]:
    if initial is None:
        return [
            _row("distance_from_init", _ALL, "1", math.nan, "the run's own initial weights are not known")
        ]
    try:
        groups, start = _with_all(subject), _with_all(initial)
    except MissingCapability as error:
        return [_row("distance_from_init", _ALL, "1", math.nan, str(error))]
    # Not the run's own seed: that would be no other initialisation, but the same.
    seeds = [seed for seed in _OTHER_SEEDS if seed != subject.seed][:2]
    try:
        others = [_with_all(initial.reinitialised(seed)) for seed in seeds]
    except MissingCapability:
        others = []
    try:
        rounding = {"float64": 2.0**-52, "float32": 2.0**-23}.get(subject.dtype, 2.0**-7)
        reach = (
            None
            if subject.trained_steps is None
            else adamw_reach(subject.training(), subject.trained_steps, rounding)
        )
    except MissingCapability:
        reach = None
    rows = []
    for group, weights in groups.items():
        between = [relative_distance(other[group], start[group]) for other in others]
        nulls = [NullValue("fresh-init", float(np.mean(between)), n=len(between))] if between else []
        norm = math.sqrt(sum(float(t.detach().cpu().double().square().sum()) for t in start[group].values()))
        if reach is not None and norm:
            n = sum(t.numel() for t in weights.values())
            nulls.append(NullValue("optimiser", (reach[0] * math.sqrt(n) + reach[1] * norm) / norm))
        row = _row("distance_from_init", group, "1", relative_distance(weights, start[group]))
        rows.append(dataclasses.replace(row, nulls=tuple(nulls)))
    return rows


def _with_all(subject: Subject) -> dict[str, Mapping[str, Tensor]]:
    groups = dict(subject.parameter_groups())
    return {**groups, _ALL: {f"{g}.{name}": t for g, named in groups.items() for name, t in named.items()}}


def _keys_loaded(subject: Subject) -> Measurement:
    expected = len(getattr(subject.module, "state_dict", dict)())
    try:
        loaded = subject.training().get("keys")
    except MissingCapability as error:
        return _row("keys_loaded", "", "weights", math.nan, str(error))
    if not isinstance(loaded, int) or not expected:
        return _row(
            "keys_loaded", "", "weights", math.nan, "the loader does not say how many weights it found"
        )
    note = "" if loaded == expected else f"{loaded} weights were loaded, the model has {expected}"
    row = _row("keys_loaded", "", "weights", float(loaded), note)
    return dataclasses.replace(row, nulls=(NullValue("analytic", float(expected)),))


def _null(finding: Finding, kind: str) -> float:
    nulls = (*finding.measurement.nulls, *finding.nulls)
    return next((null.value for null in nulls if null.kind == kind), math.nan)


def _surely_untrained(
    subject: Subject, findings: Sequence[Finding], distances: Sequence[Finding]
) -> list[str]:
    reasons = []
    if subject.trained_steps == 0:
        reasons.append("the checkpoint is of step 0")
    if any(f.measurement.place.component == _ALL and f.measurement.estimate.value == 0 for f in distances):
        reasons.append("every weight is that of the initialisation")
    keys = [f for f in findings if f.measurement.place.statistic == "keys_loaded"]
    if any(f.measurement.estimate.value == 0 for f in keys):
        reasons.append("no weight was loaded")
    return reasons


class _Change(NamedTuple):
    """How far the frozen loss is from its value at initialisation, nats, with its 95 % interval."""

    value: float
    low: float
    high: float
    against: str


def _change(loss: Finding | None) -> _Change | None:
    """Difference to the own initial weights, without them to fresh ones; None where no interval is claimed."""
    if loss is None:
        return None
    estimate, difference = loss.measurement.estimate, loss.difference
    if difference is not None:
        change = _Change(
            difference.value, difference.ci_low, difference.ci_high, "its value at initialisation"
        )
    elif loss.fresh is not None:
        x = loss.fresh.difference  # on the tokens of that null; the width is that on all tokens
        low, high = x + (estimate.ci_low - estimate.value), x + (estimate.ci_high - estimate.value)
        change = _Change(x, low, high, "that of fresh initialisations")
    else:
        return None
    # Under MIN_GROUPS groups there is no interval.
    return change if math.isfinite(change.low) and math.isfinite(change.high) else None


def _not_below_initial(loss: Finding | None) -> str:
    """Say so when the loss is surely not lower than at initialisation by the smallest effect."""
    change = _change(loss)
    if change is None or change.low <= -LOSS_EFFECT:
        return ""
    return f"the frozen loss is {change.value:+.3f} nats from {change.against}"


def _fell(loss: Finding | None) -> bool:
    """Whether the loss is surely below that of untrained models, own and fresh.

    Weights that look foreign may be a better initialisation by chance: with N(0, 1) embeddings seeds differ by more
    than the smallest effect. So the loss must also lie below where one more initialisation would, in 95 of 100 cases.
    """
    change = _change(loss)
    if loss is None or change is None or change.high >= -LOSS_EFFECT:
        return False
    fresh = loss.fresh
    spread = float(stdtrit(fresh.df, 0.975)) * fresh.prediction_se if fresh is not None else 0.0
    return fresh is None or fresh.difference + spread < -LOSS_EFFECT


def _moved(distances: Sequence[Finding]) -> str:
    """Say how far the weights moved; empty when they did not, or that is not known."""
    for finding in distances:
        value = finding.measurement.estimate.value
        if finding.measurement.place.component == _ALL and value > 0:
            return f"the weights moved by {value:.3g} of their norm"
    return ""


def _looks_foreign(distances: Sequence[Finding]) -> str:
    for finding in distances:
        value, reach = finding.measurement.estimate.value, _null(finding, "optimiser")
        if value > reach:
            where = finding.measurement.place.component
            return (
                f"{where} weights are {value:.3g} from the initialisation, the optimiser reaches {reach:.3g}"
            )
    ratios = [f.measurement.estimate.value / null for f in distances if (null := _null(f, "fresh-init")) > 0]
    if ratios and all(abs(ratio - 1.0) <= ALIKE for ratio in ratios):
        return "the weights are as far from the initialisation as another initialisation is"
    return ""


def _decided(finding: Finding, verdict: Verdict | None, why: str) -> Finding:
    measurement = finding.measurement
    notes = [finding.note] if finding.note else []
    if measurement.place.statistic == "frozen_loss":
        notes += [
            f"{measurement.estimate.value - null:+.3f} nats against {name}"
            for kind, name in (("analytic", "ln V"), ("unigram", "the unigram model"))
            if math.isfinite(null := _null(finding, kind)) and math.isfinite(measurement.estimate.value)
        ]
    elif measurement.override is None and verdict is None:
        verdict, why = Verdict.INCONCLUSIVE, "no interval: this alone decides nothing"
    if measurement.override is None and verdict is not None:
        notes.append(why)
        return dataclasses.replace(finding, override=verdict, note="; ".join(notes))
    return dataclasses.replace(finding, note="; ".join(notes))
