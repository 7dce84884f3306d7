"""Rows about how far weights moved from their own initialisation, and when: what the probes of weights share.

For a part of the model, one parameter or several taken as one vector, θ_0 its initial and θ_n its present value:

    distance_from_init  ‖θ_n − θ_0‖ / ‖θ_0‖                            range [0, ∞)
    displacement        ‖θ_n − θ_0‖                                    range [0, ∞)
    settled_step        the first checkpoint from which on none is further than 5 % of the displacement away
    moved_by_step_200   1 − ‖θ_n − θ_200‖ / ‖θ_n − θ_0‖                  range (−∞, 1]

The last two need the run's other checkpoints (`series.py`). Nulls of the first two: `fresh-init`, how far K = 5
other initialisations lie from the own one (√2 of the norm for weights of mean 0), and `optimiser`, the furthest
that AdamW can have gone (`integrity.py`). Null of the last two: `analytic`, the value of weights that move evenly
from start to end.

All are exact: no other text would give other numbers, and there is no interval over documents. Verdicts. `no-signal`
for what never moved, or did nothing but shrink, as weight decay does without any gradient:

    0 < c = ⟨θ_n, θ_0⟩ / ‖θ_0‖² < 1   and   ‖θ_n − c θ_0‖ ≤ n u ‖θ_0‖       n steps, u the rounding of one

The rule decides on the first two, with a smallest effect of 0.05 ‖θ_0‖: `learned` is what moved by more, and lies
elsewhere than another initialisation does; `at-init` what hardly moved. `inconclusive` where these are hardly the
run's own initial weights: of this part, or of all parts together, distance and norm are those of another
initialisation (their range, or 5 %), or the distance is more than the optimiser can go. The last two are descriptors:
`inconclusive`, or `no-signal`.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import stdtrit

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import FreshInit, Verdict, exactly
from hopeprobe.subject import MissingCapability

from .base import Finding, Measurement, NullValue, Place, value_without_tokens
from .integrity import ALIKE, adamw_reach
from .series import Series, check_fits, follow, followed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject

DISTANCES = ("distance_from_init", "displacement")
TIMES = ("settled_step", "moved_by_step_200")
STUDY_STEP = 200  # the study's first checkpoint, from which on it found drift to be flat
DISTANCE_EFFECT = 0.05  # of the norm of the initial weights
UNDECIDED = "a descriptor: this alone decides nothing"
STILL = "it never moved: the loss does not reach it, or it was not trained"

_OTHER_SEEDS = (3_000_017, 3_000_029, 3_000_047, 3_000_061, 3_000_073, 3_000_077)
_OTHERS = 5
_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24}


class Part(NamedTuple):
    """Parameters that are measured as one vector."""

    layer: int | None
    component: str
    names: tuple[str, ...]


def located(name: str, mechanism: str) -> tuple[int | None, str]:
    """Layer and component of a parameter; a name that does not say is its own component.

    >>> located("blocks.0.selfmod.memories.k.w1", "selfmod")
    (0, 'k.w1')
    """
    match = re.fullmatch(rf"blocks\.(\d+)\.{mechanism}\.(?:memories\.|levels\.)?(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def gathered(places: Iterable[tuple[int | None, str, str]]) -> list[Part]:
    """Parts from (layer, component, name), in the order in which they first appear."""
    names: dict[tuple[int | None, str], list[str]] = {}
    for layer, component, name in places:
        names.setdefault((layer, component), []).append(name)
    return [Part(*where, tuple(found)) for where, found in names.items()]


@dataclass(frozen=True)
class Distance:
    """How far one part moved: ‖θ_n‖, ‖θ_0‖, ‖θ_n − θ_0‖; of K other initialisations θ', ‖θ'‖ and ‖θ' − θ_0‖."""

    norm: float
    start: float
    moved: float
    other_norms: FloatArray
    others: FloatArray
    reach: float  # of the optimiser, NaN where it is not known

    def nulls(self, scale: float) -> tuple[NullValue, ...]:
        """How far others lie and how far the optimiser goes, in units of `scale`."""
        optimiser = () if math.isnan(self.reach) else (NullValue("optimiser", self.reach / scale),)
        return (*fresh_null(self.others / scale), *optimiser)

    def strange(self) -> str:
        """Say so when these are hardly the run's own initial weights.

        Trained weights may have gone as far as another initialisation lies, but hardly with its norm as well:
        together that makes them orthogonal to where they started.
        """
        if self.moved > self.reach:
            return "further than the optimiser can go: are these this run's initial weights?"
        if alike(self.moved, self.others) and alike(self.norm, self.other_norms):
            return (
                "another initialisation, as its distance and norm look: are these this run's initial weights?"
            )
        return ""


def alike(value: float, others: FloatArray) -> bool:
    """Whether a number could be one more of K other initialisations': within their range, or 5 % of their mean."""
    return any(
        null.value > 0 and abs(value - null.value) <= max(null.high - null.value, ALIKE * null.value)
        for null in fresh_null(others)
    )


def fresh_null(values: FloatArray) -> tuple[NullValue, ...]:
    """The mean of K values, and where one more would lie in 95 of 100 cases; nothing under two values."""
    if len(values) < 2:
        return ()
    null = FreshInit(tuple(values.tolist()), float(values[0]))
    half = float(stdtrit(null.df, 0.975)) * null.prediction_se
    return (NullValue("fresh-init", null.mean, null.mean - half, null.mean + half, len(values)),)


class Weights:
    """A checkpoint's parameters beside the run's initial ones and those of other initialisations.

    Raises MeasurementError when names or shapes differ, or a weight is not finite.
    """

    def __init__(self, subject: Subject, initial: Subject) -> None:
        self.subject, self.initial = subject, initial
        self.now, self.start = followed(subject), followed(initial)
        check_fits(self.now, self.start)
        self.squares = {name: _squares(self.now[name], start) for name, start in self.start.items()}
        bad = [name for name, square in self.squares.items() if not np.isfinite(square).all()]
        if bad:
            raise MeasurementError(f"{_some(bad)} not finite: the model diverged")
        self.reach = _reach(subject)
        self._silence: dict[str, str] = {}

    @cached_property
    def strange(self) -> str:
        """Say so when these are hardly the run's own initial weights, by all parameters as one vector."""
        return self.distance(list(self.start)).strange()

    @cached_property
    def others(self) -> dict[str, FloatArray]:
        """By parameter [K, 3], squares as `_squares` gives them, of K other initialisations; K = 0 where none is.

        One model is in memory at a time.
        """
        # Not the run's own seed: that would be no other initialisation, but the same.
        seeds = [seed for seed in _OTHER_SEEDS if seed != self.subject.seed][:_OTHERS]
        found: dict[str, list[FloatArray]] = {name: [] for name in self.start}
        with contextlib.suppress(MissingCapability):
            for seed in seeds:
                for name, tensor in followed(self.initial.reinitialised(seed)).items():
                    found[name].append(_squares(tensor, self.start[name]))
        return {name: np.reshape(squares, (-1, 3)) for name, squares in found.items()}

    @cached_property
    def series(self) -> Series:
        """The run's checkpoints; raises MissingCapability where there are none."""
        return follow(self.subject, self.initial)

    def distance(self, names: Sequence[str]) -> Distance:
        """How far a part moved."""
        norm, start, moved = np.sqrt(sum(self.squares[name] for name in names))
        others = np.sqrt(sum(self.others[name] for name in names))
        reach = math.nan
        if self.reach is not None:
            n = sum(self.start[name].numel() for name in names)
            reach = float(self.reach[0] * math.sqrt(n) + self.reach[1] * start)
        return Distance(float(norm), float(start), float(moved), others[:, 0], others[:, 2], reach)

    def silent(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the parameters that no signal reached, and how that shows."""
        for name in names:
            if name not in self._silence:
                self._silence[name] = self._silence_of(name)
        return {name: self._silence[name] for name in names if self._silence[name]}

    def _silence_of(self, name: str) -> str:
        _, size, moved = np.sqrt(self.squares[name])
        if moved == 0:
            return STILL
        now, start = _double(self.now[name]), _double(self.start[name])
        if start.numel() < 2 or not size:
            return ""  # a number alone has one direction only: nothing follows from keeping it
        left = float((now * start).sum()) / size**2
        rounding = max(1, self.subject.trained_steps or 1) * _ROUNDING.get(self.subject.dtype, 2.0**-8)
        decayed = self.reach is None or 1.0 - left <= self.reach[1]
        if 0.0 < left < 1.0 and decayed and float((now - left * start).norm()) <= rounding * size:
            return f"it only shrank, to {left:.4f} of its size, as weight decay does without any gradient"
        return ""


def movement_rows(weights: Weights, parts: Sequence[Part]) -> list[Measurement | Finding]:
    """Rows of `DISTANCES` and `TIMES` for every part."""
    rows: list[Measurement | Finding] = []
    for part in parts:
        distance, (verdict, note) = weights.distance(part.names), verdict_of(weights, part.names)
        if distance.start:
            for statistic, scale in zip(DISTANCES, (distance.start, 1.0), strict=True):
                rows.append(_distance_row(part, statistic, distance, scale, verdict, note))
        else:
            why = "; ".join(filter(None, (note, "its initial value is 0: no scale to judge by")))
            undefined = verdict if verdict is Verdict.NO_SIGNAL else Verdict.NOT_APPLICABLE
            undecided, nulls = verdict or Verdict.INCONCLUSIVE, distance.nulls(1.0)
            rows.append(row_of(part, "distance_from_init", math.nan, undefined, why))
            rows.append(row_of(part, "displacement", distance.moved, undecided, why, nulls))
    return [*rows, *_time_rows(weights, parts)]


def verdict_of(weights: Weights, names: Sequence[str]) -> tuple[Verdict | None, str]:
    """What the rule has not to decide of how a part moved, and a note."""
    if weights.subject.trained_steps == 0:
        return None, "the checkpoint is of step 0: nothing could move yet"
    silent = weights.silent(names)
    if len(silent) == len(names):
        return Verdict.NO_SIGNAL, "; ".join(dict.fromkeys(silent.values()))
    some = f"no signal in {len(silent)} of {len(names)} parameters: {_some(list(silent))}" if silent else ""
    if strange := weights.distance(names).strange():
        return Verdict.INCONCLUSIVE, "; ".join(filter(None, (strange, some)))
    if strange := weights.strange:
        return Verdict.INCONCLUSIVE, "; ".join(filter(None, (f"all weights together: {strange}", some)))
    return None, some


def judged_row(
    part: Part,
    statistic: str,
    value: float,
    smallest_effect: float,
    verdict: Verdict | None,
    note: str,
    own: float | None,
    others: FloatArray,
    nulls: tuple[NullValue, ...],
) -> Finding:
    """Make the row of an exact number that the rule decides on, unless there is a verdict.

    own: its value on the run's own initial weights, None where these are not known. others: on K other
    initialisations.
    """
    place = Place(statistic, part.layer, part.component)
    row = Measurement(place, "", "1", exactly(value), smallest_effect, verdict, note, nulls)
    difference = None if own is None else exactly(value - own)
    return Finding(row, difference, FreshInit(tuple(others.tolist()), value) if len(others) > 1 else None)


def _distance_row(
    part: Part, statistic: str, distance: Distance, scale: float, verdict: Verdict | None, note: str
) -> Finding:
    """A distance in units of `scale`; that of the initial weights themselves is 0."""
    effect, others = DISTANCE_EFFECT * distance.start / scale, distance.others / scale
    value, nulls = distance.moved / scale, distance.nulls(scale)
    return judged_row(part, statistic, value, effect, verdict, note, 0.0, others, nulls)


def not_applicable(statistics: Iterable[str], reason: str) -> list[Measurement]:
    """One row for each statistic that cannot be measured, which says why."""
    part = Part(None, "", ())
    return [row_of(part, statistic, math.nan, Verdict.NOT_APPLICABLE, reason) for statistic in statistics]


def _time_rows(weights: Weights, parts: Sequence[Part]) -> list[Measurement]:
    """Rows of `TIMES`; in none has the rule anything to decide."""
    try:
        series = weights.series
    except MissingCapability as error:
        return not_applicable(TIMES, str(error))
    steps = series.steps
    if len(steps) < 3:
        why = f"no checkpoint of this run lies between steps 0 and {steps[-1]}"
        return not_applicable(TIMES, "; ".join(filter(None, (why, left_out(series)))))
    rows = []
    even = next(step for step in steps if step >= 0.95 * steps[-1])
    share = STUDY_STEP / steps[-1]
    for part in parts:
        movement, (silent, note) = series.movement(part.names), verdict_of(weights, part.names)
        verdict = silent or Verdict.INCONCLUSIVE
        settled, value = math.nan, math.nan
        if movement.displacement:
            settled, value = movement.settled_step(), movement.moved_by(STUDY_STEP)
            before = steps[max(0, steps.index(settled) - 1)]
            when = "still on its way" if settled == steps[-1] else "settled"
            note = "; ".join(filter(None, (note, f"{when} after step {before}", left_out(series))))
            if silent is None:
                note += f"; {UNDECIDED}"
        rows.append(
            row_of(part, "settled_step", settled, verdict, note, (NullValue("analytic", even),), "steps")
        )
        if STUDY_STEP in steps[:-1]:
            rows.append(
                row_of(part, "moved_by_step_200", value, verdict, note, (NullValue("analytic", share),))
            )
    if STUDY_STEP not in steps[:-1]:
        rows += not_applicable(
            ["moved_by_step_200"],
            f"no checkpoint of step {STUDY_STEP} lies before this one, of step {steps[-1]}",
        )
    return rows


def row_of(
    part: Part,
    statistic: str,
    value: float,
    verdict: Verdict,
    note: str,
    nulls: tuple[NullValue, ...] = (),
    unit: str = "1",
) -> Measurement:
    """Make a row that the rule does not decide on."""
    place = Place(statistic, part.layer, part.component)
    return Measurement(place, "", unit, value_without_tokens(value), override=verdict, note=note, nulls=nulls)


def left_out(series: Series) -> str:
    """Which files beside the checkpoint could not be used."""
    return _some(series.skipped)


def _reach(subject: Subject) -> tuple[float, float] | None:
    try:
        told = subject.training()
    except MissingCapability:
        return None
    steps = subject.trained_steps
    return None if steps is None else adamw_reach(told, steps, 2.0 * _ROUNDING.get(subject.dtype, 2.0**-8))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _squares(tensor: Tensor, start: Tensor) -> FloatArray:
    """‖θ‖², ‖θ_0‖², ‖θ − θ_0‖²."""
    now, start = _double(tensor), _double(start)
    return np.array([float(x.square().sum()) for x in (now, start, now - start)])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
