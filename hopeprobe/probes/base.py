"""What a probe is: a statistic streamed over tokens, the rows it gives, and what it knows about its own nulls.

A probe is one file: a pure function for the statistic, the accumulator that streams it, one line in
`hopeprobe.probes.PROBES`. It holds moments per group of documents, never activations. Verdicts come from the
one rule in `hopeprobe.stats.verdict`; a probe may only say why there is nothing to decide.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import (
    GROUPS,
    Estimate,
    FreshInit,
    GroupedMoments,
    Moments,
    Verdict,
    as_float64,
    jackknife,
)
from hopeprobe.stats.jackknife import UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

    from .readings import Readings


def finite_losses(losses: Tensor, scored: BoolArray) -> FloatArray:
    """Losses as float64 [R, T], 0 where not scored. Raises MeasurementError where one that counts is not finite."""
    values, n = np.where(scored, as_float64(losses), 0.0), int(scored.sum())
    if bad := int((~np.isfinite(values)).sum()):
        raise MeasurementError(f"the loss is not finite at {bad} of {n} tokens: the model diverged")
    return values


class Place(NamedTuple):
    """What is measured and where, within one probe, checkpoint and condition."""

    statistic: str
    layer: int | None = None
    component: str = ""
    position: str = ""


RowKey: TypeAlias = tuple[str, Place]
"""A row of one probe and checkpoint: its condition, and its place."""


@dataclass(frozen=True)
class NullValue:
    """One null beside a measurement; the columns are those of `hopeprobe.results.NullRow`.

    note: a caveat that goes to the measurement's own row; of a null that `Probe.reference_nulls` gives.
    """

    kind: str
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Quantity:
    """One row in the making: a function of accumulated moments.

    Attributes:
        place: where it belongs.
        unit: of its value, "1" for a ratio.
        function: moments with leading axis B, one argument for each source, to float64 [B].
        sources: gives the moments, called when they are needed.
        bounds: the statistic's range.
        smallest_effect: the smallest difference to a null that is of interest, in `unit`; one for all rows
            of a statistic.
        null_kind: not empty when this is itself a null ("shuffled") of the quantity at the same place.
        condition: of the row; empty for the condition that its accumulator was filled under. A contrast says
            what it compares, "live - frozen".

    """

    place: Place
    unit: str
    function: Callable[..., FloatArray]
    sources: Callable[[], tuple[GroupedMoments | Moments, ...]]
    bounds: tuple[float, float] = UNBOUNDED
    smallest_effect: float = 0.0
    null_kind: str = ""
    condition: str = ""

    def estimate(self) -> Estimate:
        """Value and interval; 65 evaluations of the function. Errors as `hopeprobe.stats.jackknife`."""
        return jackknife(self.function, *self.sources(), bounds=self.bounds)

    def plug_in(self) -> float:
        """Evaluate on all tokens, uncorrected; NaN where the statistic is not defined."""
        moments = [s.compute() if isinstance(s, GroupedMoments) else s for s in self.sources()]
        return float(self.function(*(m.pooled() for m in moments))[0])


@dataclass(frozen=True)
class Measurement:
    """One row before its nulls are known.

    `override` and `note` say why the rule has nothing to decide here, `nulls` are those that the same pass
    gave (shuffled, analytic).
    """

    place: Place
    condition: str
    unit: str
    estimate: Estimate
    smallest_effect: float = 0.0
    override: Verdict | None = None
    note: str = ""
    nulls: tuple[NullValue, ...] = ()

    @property
    def key(self) -> RowKey:
        """What tells this row from the probe's others."""
        return self.condition, self.place


@dataclass(frozen=True)
class Finding:
    """A measurement with its nulls, as a probe sees it in `Probe.review`.

    `difference` is the paired difference checkpoint − own-init, `fresh` the fresh-init null; None without.
    """

    measurement: Measurement
    difference: Estimate | None = None
    fresh: FreshInit | None = None
    nulls: tuple[NullValue, ...] = ()
    override: Verdict | None = None
    note: str = ""


def value_without_tokens(value: float) -> Estimate:
    """Wrap a number that rests on no tokens (a distance of weights, a count, NaN): no interval is claimed."""
    nan, zeros = math.nan, np.zeros(GROUPS)
    return Estimate(value, nan, nan, nan, nan, 0, 0, value, zeros, zeros)


def measured(
    quantities: Iterable[Quantity],
    condition: str = "",
    remarks: Mapping[Place, tuple[Verdict | None, str]] | None = None,
) -> list[Measurement]:
    """Every row with its interval; those with a `null_kind` become nulls of the row at the same place."""
    quantities = list(quantities)  # a generator gives them once
    nulls: dict[RowKey, list[NullValue]] = {}
    for quantity in quantities:
        if quantity.null_kind:
            found = quantity.estimate()
            null = NullValue(quantity.null_kind, found.value, found.ci_low, found.ci_high, found.n)
            nulls.setdefault((quantity.condition or condition, quantity.place), []).append(null)
    rows = []
    for quantity in quantities:
        if quantity.null_kind:
            continue
        where = quantity.condition or condition
        verdict, note = (remarks or {}).get(quantity.place, (None, ""))
        rows.append(
            Measurement(
                quantity.place,
                where,
                quantity.unit,
                quantity.estimate(),
                quantity.smallest_effect,
                verdict,
                note,
                tuple(nulls.get((where, quantity.place), ())),
            )
        )
    return rows


def plug_ins(quantities: Iterable[Quantity], condition: str = "") -> dict[RowKey, float]:
    """Every row's value on all tokens, without an interval: what a fresh re-initialisation is asked for."""
    return {(q.condition or condition, q.place): q.plug_in() for q in quantities if not q.null_kind}


def check_paired(quantity: Quantity) -> Quantity:
    """Refuse a contrast whose sources do not hold the same tokens in the same groups (MeasurementError)."""
    first, *others = quantity.sources()
    for other in others:
        if not np.array_equal(first.n, other.n):
            raise MeasurementError(
                f"{quantity.place.statistic} ({quantity.condition}) compares conditions that did not score the "
                f"same tokens: {int(first.n.sum())} and {int(other.n.sum())}"
                + (", in other groups" if first.n.sum() == other.n.sum() else "")
            )
    return quantity


class Accumulator(ABC):
    """Moments of one probe in one pass. Subclasses fill `moments` in `update` and list `quantities`."""

    def __init__(self, condition: str) -> None:
        self.condition = condition
        self.moments: dict[str, GroupedMoments] = {}

    @abstractmethod
    def update(self, cache: Readings, losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch.

        cache: a mapping from the probe's hook points to tensors, [R, T, ...] each; those of `Probe.reducers`
        [R, firings, k], with `cache.positions` beside them. losses: [R, T] nats. scored: bool [R, T], the
        tokens that count. Raises MeasurementError for a value that is not finite.
        """

    @abstractmethod
    def quantities(self) -> Iterable[Quantity]:
        """List every row, and the nulls that the pass itself gives."""

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """Say, where there is something to say, what the rule should not decide, and a note."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that updates have changed, and so all that `merge` takes from another: what is sent to another rank.

        Whoever keeps more than moments extends all three.
        """
        return {"moments": self.moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what updates have changed."""
        self.moments = dict(state["moments"])

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator's tokens, those of another rank or split. Raises ValueError as moments do."""
        for name, theirs in other.moments.items():
            if name in self.moments:
                self.moments[name].merge(theirs)
            else:
                self.moments[name] = copy.deepcopy(theirs)

    def plug_ins(self) -> dict[RowKey, float]:
        """Every row's value, as `plug_ins` above."""
        return plug_ins(self.quantities(), self.condition)

    def measurements(self) -> list[Measurement]:
        """Every row with its interval and the nulls of the same pass."""
        return measured(self.quantities(), self.condition, self.remarks())


class Probe(ABC):
    """One question about a model.

    Attributes:
        name: how it is asked for.
        question: what it answers, one line.
        version: part of the key under which nulls are cached, beside the code that Python can find; raise it
            when the numbers change for another reason.
        statistics: names of what it measures; each is one row, `n/a`, where the model has nothing of it.
        partial: whether contrasts are made of the conditions that the model and the text allow; else of all or none.
        fresh_tokens: most tokens that a fresh re-initialisation is measured on, where a pass is dear.
        counts: whether numbers count tokens on one side of a line, where rounding can put one on the other.

    """

    name: ClassVar[str]
    question: ClassVar[str]
    version: ClassVar[int] = 1
    statistics: ClassVar[tuple[str, ...]]
    partial: ClassVar[bool] = False
    fresh_tokens: ClassVar[int | None] = None
    counts: ClassVar[bool] = False

    def describe(self) -> str:
        """Definition, range, nulls, cost and source: the docstring of the probe's file."""
        return inspect.cleandoc(sys.modules[type(self).__module__].__doc__ or self.question)

    @abstractmethod
    def applies(self, subject: Subject) -> str | None:
        """None, or the reason why this model has nothing of what is asked: the rows are then `n/a`."""

    def conditions(self, subject: Subject) -> Sequence[Condition]:  # noqa: ARG002 - for those that override it
        """Passes that it needs, of a model to which it applies; none for a probe of weights alone."""
        return (LIVE,)

    def most_tokens(self, subject: Subject) -> int | None:  # noqa: ARG002
        """How many tokens it is measured on at most, the first ones, where it takes many passes; None for all."""
        return None

    def hooks(self, subject: Subject) -> Sequence[str]:  # noqa: ARG002
        """Names of the hook points that `Accumulator.update` reads, whole."""
        return ()

    def reducers(self, subject: Subject) -> Mapping[str, Callable[[Tensor], Tensor]]:  # noqa: ARG002
        """Hook points too large to keep, and a function applied at each firing: [R, ...] to floats [R, k]."""
        return {}

    def positions(self, subject: Subject, windows: EvalWindows) -> Sequence[int] | None:  # noqa: ARG002
        """Tokens read after which reducers are applied, None for at every firing.

        Multiples of the least common multiple of the write periods, so that everything has just been written.
        """
        return None

    def accumulator(self, subject: Subject, condition: str, windows: EvalWindows) -> Accumulator:
        """Make an empty accumulator for one pass over `windows`; `condition` is the condition's name."""
        raise NotImplementedError(f"{self.name} asks for passes and does not say what to accumulate")

    def contrasts(self, accumulators: Mapping[str, Accumulator]) -> Sequence[Quantity]:  # noqa: ARG002
        """Rows made from several conditions of one model, given an accumulator for each by its name.

        A quantity over accumulators of several conditions has a paired interval; these must hold the same
        tokens in the same groups.
        """
        return ()

    def of_model(
        self,
        subject: Subject,  # noqa: ARG002
        initial: Subject | None,  # noqa: ARG002
        windows: EvalWindows,  # noqa: ARG002
    ) -> Sequence[Measurement | Finding]:
        """Rows that no pass gives: of weights, gradients, other checkpoints of the run.

        `initial` is the run's own initial model, None where it is not to be had. A measurement has no nulls but
        those that it brings; a finding brings its own differences. Either is reviewed and judged like every
        other row, and needs an override where the rule cannot decide.
        """
        return ()

    def reference_nulls(
        self,
        place: Place,  # noqa: ARG002
        subject: Subject,  # noqa: ARG002
        windows: EvalWindows,  # noqa: ARG002
    ) -> Sequence[NullValue]:
        """Nulls of a row in closed form, or from the data alone."""
        return ()

    def review(self, subject: Subject, findings: Sequence[Finding]) -> Sequence[Finding]:  # noqa: ARG002
        """Set overrides and notes with all nulls at hand; called once a checkpoint, before the rule."""
        return findings
