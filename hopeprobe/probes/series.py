"""A run's checkpoints, walked once in the order of their steps: how far weights moved, and when they stopped.

For one tensor, or several taken as one vector, θ_i at the checkpoints of steps 0 = s_0 < s_1 < … < s_n; s_n is
the checkpoint that is measured, θ_0 the run's own initial weights:

    displacement   D = ‖θ_n − θ_0‖
    drift_i        ‖θ_i − θ_{i−1}‖ / ‖θ_{i−1}‖, from one checkpoint to the next
    settled        the first s_i with ‖θ_j − θ_n‖ ≤ 0.05 D for all j ≥ i; s_n where it was still on its way
    moved by s     1 − ‖θ_n − θ_s‖ / D: 1 where it was there already, 0 as far off as the start

All in float64. None of the last three changes with how densely checkpoints lie, as the length of the path does.
A file that is damaged, or of another run, is left out with the reason, never mixed in. Cost: each checkpoint up
to this one is read once, by whichever probe asks first; three models are in memory at a time.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.errors import HopeprobeError, MeasurementError
from hopeprobe.subject import MissingCapability

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject

GROUPS_FOLLOWED = ("selfmod", "cms")
"""Parameter groups whose movement is kept; the embedding, most of the weights, belongs to no mechanism."""
SETTLED = 0.05  # of the displacement

_SAME_RUN = ("seed", "batch", "learning_rate", "warmup", "beta1", "beta2", "weight_decay", "clip")
"""What two training records of one run agree in, as far as both say."""


@dataclass(frozen=True)
class Movement:
    """The path of one set of weights over n + 1 checkpoints, float64 [n + 1] each.

    steps: of the checkpoints. norm: ‖θ_i‖. from_start: ‖θ_i − θ_0‖. to_end: ‖θ_i − θ_n‖. since: ‖θ_i − θ_{i−1}‖,
    0 for the first.
    """

    steps: tuple[int, ...]
    norm: FloatArray
    from_start: FloatArray
    to_end: FloatArray
    since: FloatArray

    @property
    def displacement(self) -> float:
        """‖θ_n − θ_0‖."""
        return float(self.from_start[-1])

    def drifts(self) -> list[tuple[int, int, float]]:
        """From step, to step, ‖θ_i − θ_{i−1}‖ / ‖θ_{i−1}‖ of each pair; NaN from weights that are all zero."""
        before = np.where(self.norm[:-1] > 0, self.norm[:-1], math.nan)
        pairs = zip(self.steps[:-1], self.steps[1:], self.since[1:] / before, strict=True)
        return [(a, b, float(drift)) for a, b, drift in pairs]

    def settled_step(self) -> int:
        """Step of the first checkpoint from which on none is further than 5 % of D from the last."""
        away = np.flatnonzero(self.to_end > SETTLED * self.displacement)
        return self.steps[int(away[-1]) + 1] if len(away) else self.steps[0]

    def moved_by(self, step: int) -> float:
        """1 − ‖θ_n − θ_s‖ / D, range (−∞, 1]; NaN without a checkpoint of step s, or where D is 0."""
        if step not in self.steps or not self.displacement:
            return math.nan
        return 1.0 - float(self.to_end[self.steps.index(step)]) / self.displacement


class Series:
    """Squared distances of every parameter at every checkpoint that could be used.

    steps: of the checkpoints, 0 and this one's included. skipped: why others were left out, a sentence each.
    """

    def __init__(
        self, steps: Sequence[int], squares: Mapping[str, FloatArray], skipped: Sequence[str]
    ) -> None:
        self.steps, self.skipped = tuple(steps), tuple(skipped)
        self._squares = dict(squares)  # by parameter: [4, n + 1], in the order of Movement's fields

    def movement(self, names: Iterable[str]) -> Movement:
        """The path of these parameters taken as one vector: their squares add up."""
        return Movement(self.steps, *np.sqrt(np.sum([self._squares[name] for name in names], axis=0)))


def follow(subject: Subject, initial: Subject) -> Series:
    """Walk the checkpoints of the subject's run up to its own step, over the parameters of `GROUPS_FOLLOWED`.

    Raises MissingCapability where the model is of no run or does not say its step, MeasurementError where a
    weight of `subject` or `initial` is not finite.
    """
    global _last  # noqa: PLW0603 - two probes ask for the same walk, one after the other
    if subject.trained_steps is None:
        raise MissingCapability(f"{subject.name}: the file does not say after how many steps it was written")
    paths = list(subject.siblings())
    key = _digest(subject), _digest(initial), tuple((p, p.exists() and p.stat().st_mtime_ns) for p in paths)
    if _last is None or _last[0] != key:
        _last = key, _walk(subject, subject.trained_steps, initial, paths)
    return _last[1]


_last: tuple[tuple[object, ...], Series] | None = None


def followed(subject: Subject) -> dict[str, Tensor]:
    """Parameters of `GROUPS_FOLLOWED`, by name."""
    groups = subject.parameter_groups()
    return {name: t for group in GROUPS_FOLLOWED for name, t in groups.get(group, {}).items()}


def _walk(subject: Subject, last: int, initial: Subject, paths: Sequence[Path]) -> Series:
    start, end = followed(initial), followed(subject)
    check_fits(end, start)
    steps, columns, skipped = [0], [_column(start, start, start, end)], list[str]()
    before: Mapping[str, Tensor] = start
    for path, step, weights in _between(subject, initial, last, paths, skipped):
        column = _column(weights, start, before, end)
        if not _finite(column):
            skipped.append(f"{path.name} is left out: a weight is not finite")
            continue
        columns.append(column)
        steps.append(step)
        before = weights
    if last:
        columns.append(_column(end, start, before, end))
        steps.append(last)
    if not all(map(_finite, columns)):
        raise MeasurementError("a weight is not finite: the model diverged")
    squares = {name: np.stack([column[name] for column in columns], axis=1) for name in end}
    return Series(steps, squares, skipped)


def _between(
    subject: Subject, initial: Subject, last: int, paths: Sequence[Path], skipped: list[str]
) -> Iterator[tuple[Path, int, Mapping[str, Tensor]]]:
    """Weights of the run's checkpoints after step 0 and before `last`; what is left out goes to `skipped`."""
    run, previous, beyond = _run_of(subject, initial), 0, 0
    for path in paths:
        if subject.path is not None and path.resolve() == subject.path.resolve():
            continue
        try:
            sibling = subject.sibling(path)
            step, weights = sibling.trained_steps, followed(sibling)
            wrong = _differs(_run_of(sibling), run)
            if not wrong and step == 0:
                wrong = "" if _digest(sibling) == _digest(initial) else "its weights are not the initial ones"
            check_fits(weights, followed(initial))
        except HopeprobeError as error:
            skipped.append(f"{path.name} is left out: {error}")
            continue
        if wrong or step is None:
            skipped.append(f"{path.name} is left out: {wrong or 'it does not say its step'}")
        elif step > last:
            beyond += 1
            if beyond == 2:  # siblings come by step, but one file may bear another's name
                break
        elif step and not previous < step < last:
            skipped.append(f"{path.name} is left out: it says step {step}, which another file had")
        elif step:
            previous = step
            yield path, step, weights


def _run_of(subject: Subject, initial: Subject | None = None) -> dict[str, Any]:
    """What tells one run from another: configuration, initial weights, training as far as it is told."""
    try:
        told = dict(subject.training())
    except MissingCapability:
        told = {}
    run: dict[str, Any] = {key: told[key] for key in _SAME_RUN if key in told}
    data = told.get("data")
    if isinstance(data, dict) and "fingerprint" in data:
        run["data"] = data["fingerprint"]
    run["initial weights"] = told.get("init_digest") or _digest(initial or subject.own_init())
    with contextlib.suppress(MissingCapability):
        run["configuration"] = subject.identity()
    return run


def _differs(run: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what makes these two runs; empty when nothing does."""
    different = [key for key in run if key in other and run[key] != other[key]]
    return f"it is of another run ({', '.join(different)})" if different else ""


def _column(
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
) -> dict[str, FloatArray]:
    """Squares of the distances in `Movement`, [4] for each parameter."""
    found = {}
    for name, tensor in weights.items():
        here = tensor.detach().cpu().double()
        others = (other[name].detach().cpu().double() for other in (start, end, before))
        squares = [here.square().sum(), *((here - other).square().sum() for other in others)]
        found[name] = np.array([float(s) for s in squares])
    return found


def _finite(column: Mapping[str, FloatArray]) -> bool:
    return all(np.isfinite(squares).all() for squares in column.values())


def check_fits(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> None:
    """Raise MeasurementError when names or shapes differ."""
    if weights.keys() != initial.keys() or any(weights[k].shape != initial[k].shape for k in weights):
        raise MeasurementError("the initial weights have other names or shapes than the checkpoint's")


def _digest(subject: Subject) -> str:
    from hopeprobe.nulls import weights_digest  # which imports the probes

    return weights_digest(subject)
