"""What a probe reads of one batch: cached hook points, and those too large to cache, reduced as they fire.

Fast weights are [B, out, in] for each of many writes. A reducer turns every firing into a few numbers a row;
where a probe names the positions that it wants, hooks at write points are on only while the tick that ends
there is run, as a model assembles its fast weights for whoever watches. The run itself is the same with and
without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from hopeprobe.errors import MeasurementError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from hopeprobe.hooks import HookHandle, HookPoint
    from hopeprobe.stats.arrays import BoolArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch


class Readings(Mapping[str, "Tensor"]):
    """Tensors of one batch by hook point: cached ones whole, reduced ones [R, firings, k].

    Attributes:
        positions: for each reduced point, int64 [firings]: tokens read so far in the window, the tick that
            fired included.
        reached: for each reduced point, bool [R, firings]: the row is as long as that. Its values are NaN
            where it is not.

    """

    def __init__(self, cached: Mapping[str, Tensor], reduced: Mapping[str, Reduced]) -> None:
        self._tensors: dict[str, Tensor] = {name: one.values for name, one in reduced.items()}
        self._cached = cached
        self.positions: Mapping[str, IntArray] = {name: one.positions for name, one in reduced.items()}
        self.reached: Mapping[str, BoolArray] = {name: one.reached for name, one in reduced.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self._cached[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from (name for name in self._cached if name not in self._tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Reduced:
    """All firings of one point in one batch."""

    def __init__(self, values: Sequence[Tensor], positions: Sequence[int], lengths: IntArray) -> None:
        import torch

        self.positions: IntArray = np.array(positions, dtype=np.int64)
        self.reached: BoolArray = lengths[:, None] >= self.positions
        stacked = torch.stack(list(values), dim=1)
        beyond = torch.from_numpy(~self.reached).to(stacked.device)
        self.values = stacked.masked_fill(beyond[..., None], math.nan)


def check_positions(subject: Subject, positions: Sequence[int] | None) -> frozenset[int] | None:
    """Positions as a set. Raises MeasurementError unless everything was just written at each."""
    if positions is None:
        return None
    period = math.lcm(*subject.write_periods().values())
    wrong = sorted(p for p in positions if p < 1 or p % period)
    if wrong or not positions:
        shown = f"not {', '.join(map(str, wrong[:5]))}" if wrong else "and there is none"
        raise MeasurementError(
            f"positions are multiples of {period}, the model's common write period, {shown}"
        )
    return frozenset(positions)


class Reducing:
    """The reducers of one probe in one pass."""

    def __init__(
        self,
        subject: Subject,
        reducers: Mapping[str, Callable[[Tensor], Tensor]],
        positions: frozenset[int] | None,
    ) -> None:
        self._points = subject.module.hook_dict
        self._reducers = {name: _checked(name, fn) for name, fn in reducers.items()}
        self._wanted = positions
        self._clock = clock_of(self._points)
        self._reset()

    def _reset(self) -> None:
        self._read = 0
        self._error: MeasurementError | None = None
        self._handles: list[HookHandle] = []
        self._values: dict[str, list[Tensor]] = {}
        self._positions: dict[str, list[int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Reduce what fires while one batch is run."""
        self._reset()
        clock = self._points[self._clock].add_hook(self._count)
        always = [n for n in self._reducers if self._wanted is None or self._points[n].spec.cadence == "tick"]
        handles = [self._points[name].add_hook(self._take) for name in always]
        for name in self._reducers:
            self._points[name].awaited = True
        try:
            yield
        finally:
            for name in self._reducers:
                self._points[name].awaited = False
            for handle in (clock, *handles, *self._handles):
                handle.remove()

    def readings(self, batch: EvalBatch, cached: Mapping[str, Tensor]) -> Readings:
        """Everything of the batch just run.

        Raises MeasurementError for what a reducer gave that does not fit, and for a run that did not read
        every token once: its positions are not those of the window.
        """
        rows, width = len(batch.lengths), batch.tokens.shape[1] - 1
        if self._error is not None:
            raise self._error
        if self._values and self._read != width:
            raise MeasurementError(
                f"{self._read} positions were read of windows of {width}: they cannot be told"
            )
        reduced = {}
        for name, values in self._values.items():
            shapes = {tuple(v.shape) for v in values}
            if len(shapes) > 1 or values[0].shape[0] != rows:
                raise MeasurementError(
                    f"the reducer of {name} gave {sorted(shapes)} for {rows} windows: it must give one row each"
                )
            reduced[name] = Reduced(values, self._positions[name], batch.lengths)
        self._reset()
        return Readings(cached, reduced)

    def _count(self, tensor: Tensor, hook: HookPoint) -> None:
        self._read += tensor.shape[hook.spec.dims.index("pos")]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._wanted is not None and self._read in self._wanted:
            here = [name for name in self._reducers if self._points[name].spec.cadence == "write"]
            self._handles = [self._points[name].add_hook(self._take) for name in here]

    def _take(self, tensor: Tensor, hook: HookPoint) -> None:
        if self._wanted is not None and self._read not in self._wanted:
            return
        try:
            made = self._reducers[hook.name](tensor)
        except MeasurementError as error:  # that of one probe, and the run is everybody's
            self._error = error
            return
        self._values.setdefault(hook.name, []).append(made)
        self._positions.setdefault(hook.name, []).append(self._read)


def _checked(name: str, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def reduced(tensor: Tensor) -> Tensor:
        # Cut out of the graph, and not a view of weights that the model goes on to overwrite.
        made = reduce(tensor.detach()).clone()
        if made.ndim != 2 or not made.is_floating_point():
            raise MeasurementError(
                f"the reducer of {name} gave {made.dtype} {list(made.shape)}, not floats [R, k]"
            )
        return made

    return reduced


def clock_of(points: Mapping[str, HookPoint]) -> str:
    """Name a point that fires at each tick, before its writes, with the tokens that it reads."""
    for name, point in points.items():
        if point.spec.cadence == "tick" and "pos" in point.spec.dims:
            return name
    raise MeasurementError("the model has no hook point that fires with the tokens it reads")
