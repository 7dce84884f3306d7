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
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from hopeprobe.stats import GROUPS, Estimate, FreshInit, GroupedMoments, Moments, Verdict, jackknife
from hopeprobe.stats.jackknife import UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

CONDITIONS = ("live", "frozen")
"""Passes that a probe may ask for: writes as they are, or every write gate closed."""


class Place(NamedTuple):
    """What is measured and where, within one probe, checkpoint and condition."""

    statistic: str
    layer: int | None = None
    component: str = ""
    position: str = ""


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

    """

    place: Place
    unit: str
    function: Callable[..., FloatArray]
    sources: Callable[[], tuple[GroupedMoments | Moments, ...]]
    bounds: tuple[float, float] = UNBOUNDED
    smallest_effect: float = 0.0
    null_kind: str = ""

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


class Accumulator(ABC):
    """Moments of one probe in one pass. Subclasses fill `moments` in `update` and list `quantities`."""

    def __init__(self, condition: str) -> None:
        self.condition = condition
        self.moments: dict[str, GroupedMoments] = {}

    @abstractmethod
    def update(self, cache: Mapping[str, Tensor], losses: Tensor, scored: Tensor, batch: EvalBatch) -> None:
        """Add one batch.

        cache: the probe's hook points, each [R, T, ...]. losses: [R, T] nats. scored: bool [R, T], the tokens
        that count. Raises MeasurementError for a value that is not finite.
        """

    @abstractmethod
    def quantities(self) -> list[Quantity]:
        """List every row, and the nulls that the pass itself gives."""

    def remarks(self) -> Mapping[Place, tuple[Verdict | None, str]]:
        """Say, where there is something to say, what the rule should not decide, and a note."""
        return {}

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator's tokens, those of another rank or split. Raises ValueError as moments do."""
        for name, theirs in other.moments.items():
            if name in self.moments:
                self.moments[name].merge(theirs)
            else:
                self.moments[name] = copy.deepcopy(theirs)

    def plug_ins(self) -> dict[Place, float]:
        """Every row's value on all tokens, without an interval: what a fresh re-initialisation is asked for."""
        return {q.place: q.plug_in() for q in self.quantities() if not q.null_kind}

    def measurements(self) -> list[Measurement]:
        """Every row with its interval and the nulls of the same pass."""
        quantities, remarks = self.quantities(), self.remarks()
        nulls: dict[Place, list[NullValue]] = {}
        for quantity in quantities:
            if quantity.null_kind:
                found = quantity.estimate()
                null = NullValue(quantity.null_kind, found.value, found.ci_low, found.ci_high, found.n)
                nulls.setdefault(quantity.place, []).append(null)
        return [
            Measurement(
                place=quantity.place,
                condition=self.condition,
                unit=quantity.unit,
                estimate=quantity.estimate(),
                smallest_effect=quantity.smallest_effect,
                override=remarks.get(quantity.place, (None, ""))[0],
                note=remarks.get(quantity.place, (None, ""))[1],
                nulls=tuple(nulls.get(quantity.place, ())),
            )
            for quantity in quantities
            if not quantity.null_kind
        ]


class Probe(ABC):
    """One question about a model.

    Attributes:
        name: how it is asked for.
        question: what it answers, one line.
        version: part of the key under which nulls are cached, beside the code that Python can find; raise it
            when the numbers change for another reason.
        statistics: names of what it measures on tokens.
        conditions: passes it needs, of `CONDITIONS`.

    """

    name: ClassVar[str]
    question: ClassVar[str]
    version: ClassVar[int] = 1
    statistics: ClassVar[tuple[str, ...]]
    conditions: ClassVar[tuple[str, ...]] = ("live",)

    def describe(self) -> str:
        """Definition, range, nulls, cost and source: the docstring of the probe's file."""
        return inspect.cleandoc(sys.modules[type(self).__module__].__doc__ or self.question)

    @abstractmethod
    def applies(self, subject: Subject) -> str | None:
        """None, or the reason why this model has nothing of what is asked: the rows are then `n/a`."""

    @abstractmethod
    def hooks(self, subject: Subject) -> list[str]:
        """Names of the hook points that `Accumulator.update` reads."""

    @abstractmethod
    def accumulator(self, subject: Subject, condition: str) -> Accumulator:
        """Make an empty accumulator for one pass."""

    def of_weights(
        self,
        subject: Subject,  # noqa: ARG002 - for those that override it
        initial: Subject | None,  # noqa: ARG002
    ) -> list[Measurement]:
        """Rows that need no tokens; `initial` is the run's own initial model, None where it is not to be had.

        Each needs an override, as the rule decides nothing without an interval.
        """
        return []

    def reference_nulls(
        self,
        place: Place,  # noqa: ARG002 - for those that override it
        subject: Subject,  # noqa: ARG002
        windows: EvalWindows,  # noqa: ARG002
    ) -> tuple[NullValue, ...]:
        """Nulls in closed form, or from the data alone."""
        return ()

    def review(self, subject: Subject, findings: Sequence[Finding]) -> Sequence[Finding]:  # noqa: ARG002
        """Set overrides and notes with all nulls at hand; called once a checkpoint, before the rule."""
        return findings
