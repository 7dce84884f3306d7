"""A model under another gate: conditions, what is gathered of them, and losses at equal write budgets.

    written(b) = mean_t mean_gates g_t          the realised budget: gates as writes see them, over all scored tokens
    D = loss(rule) − L(written(rule))           L: the loss of `random` against what it realises

L is linear between the points at which `random` was run: none written (frozen), 5, 10, 25, 50 and 100 % (everything).
So a rule that misses its budget is compared with a random gate that missed it by as much. As `random` meets its budget
by the same control as every rule does, the score is all they differ in.

Gates compare scores, and a rounding can turn which of two is the higher, so that another batch size would write other
tokens: windows in which it could have are run again in float64 (`Condition.exact`), and so is what sets the threshold.

The rule `absolute` has one threshold for all sequences: the quantile of the loss, when everything is written, that
leaves the budget, of the same tokens. The other rules know only the past of their own sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hopeprobe import ranks
from hopeprobe.conditions import Condition, as_tensors, frozen
from hopeprobe.errors import BadInputError, MeasurementError, near_names
from hopeprobe.hooks import resolve
from hopeprobe.stats import GroupedCovariance, GroupedMean, Histogram, as_float64
from hopeprobe.stats.arrays import as_bool
from hopeprobe.subject import GateRule, MissingCapability

from .base import Accumulator, Place, Quantity, finite_losses
from .effects import EFFECT, LOSS
from .gate_rates import SHARE, OfEntropy, OfGate, gate_entropy, kept_less_dropped
from .gate_selectivity import DIFFERENCES, ENTROPY_EFFECT, earlier_in_window
from .surprise import surprisal_of, token_surprisal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats import GroupedMoments, Moments, Verdict
    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject, WindowLosses
    from hopeprobe.tokens import EvalBatch, EvalWindows, Unigram

BUDGETS = (0.5, 0.25, 0.1, 0.05)
RANDOM, EVERYTHING = "random", "everything"
WRITTEN = "written"
WRITTEN_EFFECT = 0.01  # of all tokens


class Cell(NamedTuple):
    """One way to gate: a rule, the mechanism whose writes it gates, and the share that it may write."""

    rule: str
    writes: str
    budget: float

    @property
    def label(self) -> str:
        """The budget as results show it."""
        return f"{self.budget:.3g}"

    def place(self, statistic: str) -> Place:
        """Where its rows belong."""
        return Place(statistic, component=self.rule, position=self.label)

    @property
    def name(self) -> str:
        """Name of its condition."""
        return f"{self.writes}: {self.rule} {self.label}"


def cells_of(
    subject: Subject, budgets: Sequence[float] = BUDGETS, wanted: Sequence[str] | None = None
) -> list[Cell]:
    """Every rule for every mechanism that it can be for, at every budget; everything written comes first.

    wanted: rules beside `random`; None for all that the model has. Raises BadInputError for one it does not have.
    """
    rules = subject.gate_rules()
    for rule in wanted or ():
        if rule not in rules:
            raise BadInputError(f"{subject.name} has no gate rule {rule!r}{near_names(rule, rules)}")
    if RANDOM not in rules:
        raise MissingCapability(f"{subject.name}: this model has no random gate to compare with")
    mechanisms = dict.fromkeys(writes for known in rules.values() for writes in known)
    cells = [Cell(EVERYTHING, writes, 1.0) for writes in list(mechanisms)[-1:]]
    return cells + [
        Cell(rule, writes, budget)
        for writes in mechanisms
        for rule, known in rules.items()
        if writes in known and (wanted is None or rule in (*wanted, RANDOM))
        for budget in budgets
    ]


@functools.cache
def condition(cell: Cell) -> Condition:
    """The model gated so; the same object every time, so that probes share its pass."""
    return Condition(cell.name, run=functools.partial(_run, cell), prepare=prepare, exact=True)


@functools.cache
def still(writes: str) -> Condition:
    """The mechanism written by no token, the others as in the cells that it is compared with."""
    closed = frozen(None if writes == "all" else writes)
    everything = condition(Cell(EVERYTHING, writes, 1.0))  # not the model's own gate, which may write less
    return dataclasses.replace(everything, name=f"{writes}: nothing", hooks=closed.hooks)


class Prepared(NamedTuple):
    """What gates need of the text: token frequencies, and the losses when everything is written."""

    surprisal: Tensor | None
    losses: Histogram


def prepare(subject: Subject, windows: EvalWindows) -> Prepared:
    """Score the windows once with everything written."""
    precise = subject.exact()
    own = ranks.shared(windows)

    def gather() -> Histogram:
        losses = Histogram()
        with precise.gated(GateRule(RANDOM, 1.0)):
            for batch in own:
                out = precise.run(*as_tensors(batch))
                scored = as_bool(out.scored)
                values = finite_losses(out.losses, scored)[scored]
                losses.update(np.maximum(values, 0.0))
        return losses

    return Prepared(token_surprisal(subject, windows), ranks.folded(gather, _together))


def _together(losses: Histogram, others: Histogram) -> Histogram:
    losses.merge(others)
    return losses


def gate_of(cell: Cell, prepared: Prepared) -> GateRule:
    """The gate of a cell. Raises MissingCapability where the text does not have what it needs."""
    if cell.rule == EVERYTHING:
        return GateRule(RANDOM, 1.0)
    if cell.rule == "excess" and prepared.surprisal is None:
        raise MissingCapability("the text has no training split, from which token frequencies would come")
    if cell.rule == "absolute":
        return GateRule("absolute", threshold=prepared.losses.quantile(1.0 - cell.budget), writes=cell.writes)
    return GateRule(cell.rule, cell.budget, writes=cell.writes)


def _run(cell: Cell, subject: Subject, prepared: Prepared, batch: EvalBatch) -> WindowLosses:
    with subject.gated(gate_of(cell, prepared), prepared.surprisal):
        return subject.run(*as_tensors(batch))


def write_gates(subject: Subject, writes: str) -> list[str]:
    """Hook points of the gates that a mechanism's writes pass."""
    wanted = [selector for selector, _ in subject.freeze_hooks(None if writes == "all" else writes)]
    return resolve(subject.module.hook_dict, wanted)


class GatedLosses(Accumulator):
    """Loss and what was written under one condition; where the rule gates all there is, what it keeps and drops."""

    def __init__(self, cell: Cell, gates: Sequence[str], unigram: Unigram | None, *, describes: bool) -> None:
        """gates: of its mechanism. describes: whether rows about what is kept are wanted."""
        super().__init__(cell.name)
        self.cell, self.gates, self.unigram, self.describes = cell, tuple(gates), unigram, describes

    def update(self, cache: Mapping[str, Tensor], losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch; gates that did not fire, in a batch too short to write, wrote nothing."""
        mask = as_bool(scored)
        values = finite_losses(losses, mask)
        shown = {name: as_float64(cache[name]) for name in self.gates if name in cache}
        gates = [np.where(mask, _fitting(gate, values), 0.0) for gate in shown.values()]
        if any(((gate != 0) & (gate != 1)).any() for gate in gates):
            raise MeasurementError(f"{self.condition}: a write gate is neither 0 nor 1")
        written = np.mean(gates, axis=0) if gates else np.zeros(values.shape)
        mean = self.moments.setdefault("loss", GroupedMean((2,)))
        assert isinstance(mean, GroupedMean)
        mean.update(np.stack([values, written], axis=-1), mask, batch.group)
        if self.describes:
            self._describe(gates or [written], mask, batch)

    def _describe(self, gates: list[FloatArray], mask: BoolArray, batch: EvalBatch) -> None:
        kept = self.moments.setdefault("kept", GroupedCovariance(1 + len(DIFFERENCES)))
        assert isinstance(kept, GroupedCovariance)
        position = (np.arange(mask.shape[1]) + 0.5) / np.maximum(batch.lengths, 1)[:, None]
        selects_by = surprisal_of(batch, self.unigram), position, earlier_in_window(batch.tokens)
        # The gates of all memories of a layer are one; those of layers may differ.
        for gate in {gate.tobytes(): gate for gate in gates}.values():
            kept.update(np.stack([gate, *selects_by], axis=-1), mask, batch.group)

    def quantities(self) -> list[Quantity]:
        """The loss, what was written, and of a rule what it keeps."""
        if not self.moments:
            return []
        where, cell = self.cell.writes, self.cell
        rows = [
            Quantity(
                cell.place(LOSS), "nats", loss_of, self._of("loss"), smallest_effect=EFFECT, condition=where
            ),
            Quantity(
                cell.place(WRITTEN), "1", written_of, self._of("loss"), SHARE, WRITTEN_EFFECT, condition=where
            ),
        ]
        if "kept" not in self.moments:
            return rows
        entropy = functools.partial(gate_entropy, column=0)
        place, kept = cell.place("gate_entropy"), self._of("kept")
        rows.append(OfEntropy(place, "bits", entropy, kept, SHARE, ENTROPY_EFFECT, condition=where))
        for k, (statistic, (unit, effect, bounds)) in enumerate(DIFFERENCES.items(), start=1):
            if statistic == "surprisal_difference" and self.unigram is None:
                continue
            compared = functools.partial(kept_less_dropped, of=k)
            rows.append(OfGate(cell.place(statistic), unit, compared, kept, bounds, effect, condition=where))
        return rows

    def remarks(self) -> dict[Place, tuple[Verdict | None, str]]:
        """`no-signal` of what is kept where all or no tokens are written, and where too few are for an interval."""
        return {row.place: row.indecision() for row in self.quantities() if isinstance(row, OfGate)}

    def _of(self, name: str) -> functools.partial[tuple[GroupedMoments, ...]]:
        return functools.partial(all_of, (self.moments[name],))


def all_of(sources: tuple[GroupedMoments, ...]) -> tuple[GroupedMoments, ...]:
    """The sources of a quantity."""
    return sources


def _fitting(gate: FloatArray, losses: FloatArray) -> FloatArray:
    """A gate [R, C] as long as the losses [R, T]: a last tick that is not complete is not written."""
    missing = losses.shape[1] - gate.shape[1]
    return np.pad(gate, ((0, 0), (0, missing))) if missing > 0 else gate[:, : losses.shape[1]]


def loss_of(moments: Moments) -> FloatArray:
    """Mean loss, nats: float64 [B]."""
    return moments.mean()[:, 0]


def written_of(moments: Moments) -> FloatArray:
    """Realised budget: float64 [B]."""
    return moments.mean()[:, 1]


def less_random(weights: Sequence[float], n_rules: int, *moments: Moments) -> FloatArray:
    """Σ weights · D of some conditions; after them the moments of `random`, by rising budget: float64 [B]."""
    rules, curve = moments[:n_rules], moments[n_rules:]
    shares, losses = [written_of(m) for m in curve], [loss_of(m) for m in curve]
    total: FloatArray = np.zeros(len(shares[0]))
    for weight, rule in zip(weights, rules, strict=True):
        total = total + weight * (loss_of(rule) - _interpolated(written_of(rule), shares, losses))
    return total


def _interpolated(at: FloatArray, x: Sequence[FloatArray], y: Sequence[FloatArray]) -> FloatArray:
    """Lines through the points (x_j, y_j), x rising; beyond the ends as at the ends."""
    found = y[0]
    for j in range(len(x) - 1):
        width = x[j + 1] - x[j]
        if (width <= 0).any():
            raise MeasurementError(
                "the random gate did not write more with a larger budget: nothing to compare with"
            )
        found = found + (y[j + 1] - y[j]) * np.clip((at - x[j]) / width, 0.0, 1.0)
    return found


def area_weights(budgets: Sequence[float]) -> list[float]:
    """Weights of D at these budgets, falling from under 1, in the mean of D over the budgets from the last up to 1.

    The trapezoidal rule; at 1 everything is written and D is 0.
    """
    points = [1.0, *budgets]
    span = points[0] - points[-1]
    weights = [0.0] * len(points)
    for j in range(len(points) - 1):
        for k in (j, j + 1):
            weights[k] += (points[j] - points[j + 1]) / 2 / span
    return weights[1:]


def close_to(value: float, budget: float) -> bool:
    """Within a tenth of the budget."""
    return math.isclose(value, budget, rel_tol=0.1)
