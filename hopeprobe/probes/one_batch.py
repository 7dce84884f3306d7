"""One batch, run for all probes of a pass: hooks on, what each probe reads, and windows in doubt run again.

A worker runs batches on one replica of the model, with hook points, caches and reducers of its own. What did not fire,
and should have, is an error of whoever reads it.
"""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.conditions import as_tensors
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.hooks import ActivationCache, resolve
from hopeprobe.stats import as_float64
from hopeprobe.subject import MissingCapability

from .left_out import bad_losses, bad_readings, bad_reduced, rows_of
from .readings import Readings, Reducing, check_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.probes.base import Probe
    from hopeprobe.stats.arrays import IntArray
    from hopeprobe.subject import Subject, WindowLosses
    from hopeprobe.tokens import EvalBatch, EvalWindows


@dataclass
class BatchReader:
    """One probe in the pass: the hook points it reads whole, and those it reads reduced."""

    cached: list[str]
    reduced: list[str]
    reducing: Reducing | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.cached, *self.reduced]


@dataclass
class Ran:
    """One batch: losses, how often the condition's hooks fired, and for each probe its readings or why it has none."""

    out: WindowLosses
    fired: Mapping[str, int]
    read: Mapping[str, Readings | MeasurementError]

    def seen(self, name: str) -> Readings:
        """What a probe reads. Raises MeasurementError where that failed."""
        found = self.read[name]
        if isinstance(found, MeasurementError):
            raise found
        return found

    def suspicious(self) -> IntArray:
        """Rows whose losses, or what reducers made of fast weights, are not finite."""
        reduced = [bad_reduced(read) for read in self.read.values() if isinstance(read, Readings)]
        return np.unique(np.concatenate([bad_losses(self.out), *reduced]))

    def unreadable(self, name: str) -> IntArray:
        """Rows in which a probe, which could not be measured, reads what is not finite."""
        found = self.read[name]
        return bad_readings(found, self.out) if isinstance(found, Readings) else np.zeros(0, dtype=np.int64)


class Worker:
    """Runs batches on one replica of the model; hooks, caches and reducers are its own."""

    def __init__(
        self,
        subject: Subject,
        windows: EvalWindows,
        probes: Sequence[Probe],
        condition: Condition,
        prepared: Any,
    ) -> None:
        self.subject, self.condition, self.prepared = subject, condition, prepared
        self.readers = {probe.name: reader_of(probe, subject, windows) for probe in probes}

    def run(self, batch: EvalBatch, names: Sequence[str]) -> Ran | HopeprobeError:
        """Run one batch for the probes named; an error that concerns them all is returned."""
        readers = {name: self.readers[name] for name in names}
        wanted = {hook for reader in readers.values() for hook in reader.cached}
        doubts = self.subject.doubts() if self.condition.exact else None
        try:
            out, fired, cache = self._once(
                self.subject, batch, wanted | ({doubts} if doubts else set()), readers
            )
            if doubts is not None:
                out, cache = self._without_doubts(batch, out, cache, doubts, wanted)
        except HopeprobeError as error:
            return error
        read: dict[str, Readings | MeasurementError] = {}
        for name, reader in readers.items():
            try:
                read[name] = _seen(self.subject, reader, cache, batch)
            except MeasurementError as error:
                read[name] = error
        return Ran(out, fired, read)

    def _without_doubts(
        self, batch: EvalBatch, out: WindowLosses, cache: Mapping[str, Tensor], doubts: str, wanted: set[str]
    ) -> tuple[WindowLosses, Mapping[str, Tensor]]:
        """The same, with windows in which a gate is in doubt run again in float64.

        Raises MeasurementError where nothing said what is in doubt.
        """
        if doubts not in cache:
            raise MeasurementError(never_fired([doubts]))
        rows = np.flatnonzero((as_float64(cache[doubts]) != 0).any(axis=1))
        if not len(rows):
            return out, cache
        again, _, seen = self._once(self.subject.exact(), rows_of(batch, rows), wanted, {})
        fresh = {name: _put(cache[name], rows, seen[name]) for name in wanted if name in cache}
        return out._replace(losses=_put(out.losses, rows, again.losses)), fresh

    def _once(
        self, subject: Subject, batch: EvalBatch, wanted: set[str], readers: Mapping[str, BatchReader]
    ) -> tuple[WindowLosses, Mapping[str, int], Mapping[str, Tensor]]:
        """Run a batch: what it gave, how often the condition's hooks fired, and the points wanted.

        Whether a point fired is checked for each probe after it: one that did not must not take others along.
        """
        condition = self.condition
        with ExitStack() as stack:
            hooks = condition.hooks(subject, self.prepared, batch) if condition.hooks else ()
            handle = stack.enter_context(subject.module.hooks(hooks, allow_unfired=True))
            cache: ActivationCache = ActivationCache(())
            if wanted:
                cache = stack.enter_context(subject.module.caching(sorted(wanted), allow_unfired=True))
            for reader in readers.values():
                if reader.reducing is not None:
                    stack.enter_context(reader.reducing.watching())
            out = _scored(subject, condition, self.prepared, batch)
        _check_fired(subject, condition, handle.fired, batch)
        return out, handle.fired, cache


def can_be_run_again(reader: BatchReader, subject: Subject) -> bool:
    """Whether all that is read has a place for each token, so that a window run again can be put in its place."""
    points = subject.module.hook_dict
    return reader.reducing is None and all(points[name].spec.cadence == "tick" for name in reader.cached)


def _put(into: Tensor, rows: IntArray, fresh: Tensor) -> Tensor:
    """The tensor with other rows, as precise as they are."""
    import torch

    return into.to(fresh.dtype).index_copy(0, torch.from_numpy(rows).to(into.device), fresh)


def reader_of(probe: Probe, subject: Subject, windows: EvalWindows) -> BatchReader:
    """Find what a probe reads. Raises BadInputError for unknown points, and for those read both whole and reduced."""
    points, whole, reducers = subject.module.hook_dict, list(probe.hooks(subject)), probe.reducers(subject)
    cached = resolve(points, whole) if whole else []
    if not reducers:
        return BatchReader(cached, [], None)
    reduced = {name: reducer for selector, reducer in reducers.items() for name in resolve(points, selector)}
    if both := sorted(set(cached) & set(reduced)):
        raise BadInputError(f"{probe.name} reads {', '.join(both)} both whole and reduced")
    wanted = check_positions(subject, probe.positions(subject, windows))
    return BatchReader(cached, list(reduced), Reducing(subject, reduced, wanted))


def _seen(subject: Subject, reader: BatchReader, cache: Mapping[str, Tensor], batch: EvalBatch) -> Readings:
    """What a probe reads of one batch. Raises MeasurementError for points that every tick passes and did not fire."""
    seen = reader.reducing.readings(batch, cache) if reader.reducing else Readings(cache, {})
    points = subject.module.hook_dict
    # A reducer may have had no position in this batch.
    ticking = [name for name in reader.cached if points[name].spec.cadence == "tick"]
    if silent := _silent(subject, [name for name in ticking if name not in seen], batch):
        raise MeasurementError(never_fired(silent))
    return seen


def _scored(subject: Subject, condition: Condition, prepared: Any, batch: EvalBatch) -> WindowLosses:
    """Run one batch. Raises MeasurementError for losses of another shape, or of padding."""
    out = condition.run(subject, prepared, batch) if condition.run else subject.run(*as_tensors(batch))
    shape = (len(batch.lengths), batch.tokens.shape[1] - 1)
    if tuple(out.losses.shape) != shape or tuple(out.scored.shape) != shape:
        raise MeasurementError(
            f"{condition.name}: losses {list(out.losses.shape)} and scored {list(out.scored.shape)} of a batch "
            f"of {list(shape)}"
        )
    if (out.scored.cpu().numpy() & (np.arange(shape[1]) >= batch.lengths[:, None])).any():
        raise MeasurementError(f"{condition.name}: tokens behind a window's end were scored")
    return out


def _check_fired(subject: Subject, condition: Condition, fired: Mapping[str, int], batch: EvalBatch) -> None:
    """Raise MeasurementError where a hook of the condition did not fire in this batch; writes may rest for a batch."""
    points = subject.module.hook_dict
    silent = [name for name, count in fired.items() if not count and points[name].spec.cadence == "tick"]
    if silent := _silent(subject, silent, batch):
        raise MeasurementError(not_in_force(condition, silent))


def _silent(subject: Subject, names: Sequence[str], batch: EvalBatch) -> list[str]:
    """Of points that did not fire, those that should have: write gates rest where a batch is too short to write."""
    if names and batch.tokens.shape[1] - 1 < subject.tick:
        with contextlib.suppress(MissingCapability):
            selectors = [selector for selector, _ in subject.freeze_hooks()]
            gates = resolve(subject.module.hook_dict, selectors) if selectors else []
            return [name for name in names if name not in gates]
    return list(names)


def not_in_force(condition: Condition, names: Sequence[str]) -> str:
    """Say that a condition's hooks never fired."""
    return f"the model was not {condition.name}: {never_fired(names)}"


def never_fired(names: Sequence[str]) -> str:
    """Say that points never fired."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"hooks never fired, so nothing was measured there: {shown}"
