"""One pass over the data, under one condition, that feeds all probes at once.

Hook points are cached a batch at a time and let go once every probe has read them: memory is that of one
batch, whatever the number of tokens. A probe that cannot be measured falls out alone, with the reason; the
others go on. A condition whose hooks did not fire was not in force, and takes all its probes along.

Several ranks share out the batches that one process would run, and rank 0 folds what they gathered (`hopeprobe.ranks`).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe import ranks
from hopeprobe.conditions import as_tensors
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.hooks import ActivationCache, resolve
from hopeprobe.stats import as_float64
from hopeprobe.subject import MissingCapability

from .base import Accumulator
from .left_out import (
    Suspects,
    WindowsNotFiniteError,
    bad_losses,
    bad_readings,
    bad_reduced,
    check_live,
    rows_of,
)
from .readings import Readings, Reducing, check_positions
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.probes.base import Probe
    from hopeprobe.stats.arrays import IntArray
    from hopeprobe.subject import Subject, WindowLosses
    from hopeprobe.tokens import EvalBatch, EvalWindows


@dataclass
class Pass:
    """What one pass gave: an accumulator for each probe that ran through, a reason for each that did not."""

    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        """Take a probe out."""
        self.accumulators.pop(name, None)
        self.failed[name] = reason

    def drop_all(self, reason: str) -> None:
        """Take every probe out that is still there."""
        for name in list(self.accumulators):
            self.drop(name, reason)


def run_pass(
    subject: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    condition: Condition,
    prepared: Any = None,
    on_batch: Callable[[int, int], None] | None = None,
    leave_out: bool = False,
) -> Pass:
    """Run the model over `windows` once, under a condition, and feed every probe.

    Batches are run side by side where the subject has replicas (`hopeprobe.probes.workers`), windows of like length
    together unless the condition fixes the batches, and read one after the other.

    prepared: what `condition.prepare` gave. on_batch: called with the batches done and in all. leave_out: raise
    WindowsNotFiniteError where a few windows are not finite (`left_out.py`), rather than drop the probes. Raises
    MissingCapability when the model cannot be run so at all (no write gates to close).
    """
    if leave_out:
        found = _run_pass(subject, windows, probes, condition, prepared, on_batch, Suspects(windows))
        if found is not None:
            return found
        if condition.batch is not None:  # where rows act on each other, the live pass tells who is to blame
            check_live(subject, windows)
    found = _run_pass(subject, windows, probes, condition, prepared, on_batch)
    assert found is not None
    return found


def _run_pass(
    subject: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    condition: Condition,
    prepared: Any,
    on_batch: Callable[[int, int], None] | None,
    suspects: Suspects | None = None,
) -> Pass | None:
    """Do that; None where windows are not finite and are not to be left out."""
    result, running = Pass(), []
    windows = condition.windows(windows)
    for probe in probes:
        try:
            reader = _reader(probe, subject, windows)
            if condition.exact and not _can_be_run_again(reader, subject):
                raise BadInputError(
                    f"{probe.name} reads writes, or points reduced: under {condition.name} a few windows are run "
                    "again, and these fire as the rows beside them do"
                )
            result.accumulators[probe.name] = probe.accumulator(subject, condition.name, windows)
            running.append(probe)
        except HopeprobeError as error:
            result.drop(probe.name, str(error))
    if not running:
        return result
    found = replicas(subject, windows.n_windows)
    if condition.batch is None:
        windows = windows.shared_by(ranks.on_first(lambda: len(found)))  # whatever threads others have
    workers = [_Worker(one, windows, running, condition, prepared) for one in found]

    def run(worker: _Worker, batch: EvalBatch) -> _Ran | HopeprobeError:
        return worker.run(batch, list(result.accumulators))

    seen = _Seen()
    for done, (batch, ran) in enumerate(side_by_side(run, workers, ranks.shared(windows))):
        ordinal = done * ranks.size() + ranks.rank()
        if isinstance(ran, HopeprobeError):
            seen.error = ordinal, ran
            break
        seen.in_force.update(ran.fired)
        if suspects is not None:
            suspects.add(batch, ran.suspicious())
            if suspects.too_many:
                break
            if suspects.rows:  # what was gathered is of no use; the rest is looked through
                continue
        for name in list(result.accumulators):
            try:
                readings = ran.seen(name)
                seen.fired |= {(name, hook) for hook in readings}
                result.accumulators[name].update(readings, ran.out.losses, ran.out.scored, batch)
            except MeasurementError as error:
                if suspects is not None and len(rows := ran.unreadable(name)):
                    suspects.add(batch, rows)
                    break
                seen.dropped.append((ordinal, name, str(error)))
                del result.accumulators[name]
        if on_batch is not None:
            on_batch(min(len(windows), (done + 1) * ranks.size()), len(windows))
        if not result.accumulators:
            break
    if suspects is not None:
        suspects.rows = [row for rows in ranks.gathered(suspects.rows) for row in rows]
        if suspects.rows:
            if suspects.too_many or condition.batch:
                return None
            bad = ranks.on_first(lambda: suspects.named(subject, condition, prepared))
            if bad:
                raise WindowsNotFiniteError(bad)
            return None
    all_seen = ranks.gathered(seen)
    _drop_first(result, all_seen)
    _fold(result)
    silent = ranks.on_first(lambda: _silence(subject, condition, workers[0], result.accumulators, all_seen))
    for name, reason in silent.items():
        result.drop(name, reason)
    return result


@dataclass
class _Seen:
    """What a rank has seen in its share of the batches, but for what it accumulated.

    fired: probe and hook point. in_force: firings of the condition's hooks. dropped: at which batch of all, which probe
    and why. error: at which batch the pass ended, and with what.
    """

    fired: set[tuple[str, str]] = field(default_factory=set)
    in_force: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    error: tuple[int, HopeprobeError] | None = None


def _drop_first(result: Pass, all_seen: Sequence[_Seen]) -> None:
    """Take out what fell out on any rank, for the reason that one process would have met first.

    Raises MissingCapability where that is what the pass ended with.
    """
    ends = [seen.error for seen in all_seen if seen.error is not None]
    at, error = min(ends, key=lambda end: end[0]) if ends else (None, None)
    drops = sorted((drop for seen in all_seen for drop in seen.dropped), key=lambda drop: drop[0])
    for batch, name, reason in drops:
        if name not in result.failed and (at is None or batch < at):
            result.drop(name, reason)
    if isinstance(error, MissingCapability):
        raise error
    if error is not None:
        for _, name, _ in drops:
            if name not in result.failed:  # one process would have ended before
                result.drop(name, str(error))
        result.drop_all(str(error))


def _fold(result: Pass) -> None:
    """Add up on rank 0 what every rank has of the probes that are left, in rank order, one probe at a time."""
    if ranks.size() == 1:
        return
    for name, mine in list(result.accumulators.items()):
        kind = type(mine)
        if kind.merge is not Accumulator.merge and kind.state_dict is Accumulator.state_dict:
            reason = f"{kind.__name__} merges more than moments, and has no `state_dict` to send it by to other ranks"
            result.drop(name, reason)
            continue
        for state in ranks.gathered_on_first(mine.state_dict())[1:]:
            other = copy.copy(mine)
            other.load_state_dict(state)
            mine.merge(other)


def _silence(
    subject: Subject,
    condition: Condition,
    worker: _Worker,
    accumulators: Mapping[str, Accumulator],
    all_seen: Sequence[_Seen],
) -> dict[str, str]:
    """Of probes that are left, why they have measured nothing: a point that never fired, a condition not in force."""
    failed: dict[str, str] = {}
    points = subject.module.hook_dict
    fired = set[tuple[str, str]]().union(*(seen.fired for seen in all_seen))
    in_force: Counter[str] = Counter()
    for seen in all_seen:
        in_force.update(seen.in_force)
    for name, accumulator in accumulators.items():
        unseen = [n for n in worker.readers[name].names if (name, n) not in fired]
        if silent := [n for n in unseen if not accumulator.rightly_silent(n)]:
            failed[name] = _never_fired(silent)
    if unfired := [
        name for name, count in in_force.items() if not count and points[name].spec.cadence == "write"
    ]:
        failed |= {name: _not_in_force(condition, unfired) for name in accumulators if name not in failed}
    return failed


@dataclass
class _Reader:
    """One probe in the pass: the hook points it reads whole, and those it reads reduced."""

    cached: list[str]
    reduced: list[str]
    reducing: Reducing | None

    @property
    def names(self) -> list[str]:
        return [*self.cached, *self.reduced]


@dataclass
class _Ran:
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


class _Worker:
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
        self.readers = {probe.name: _reader(probe, subject, windows) for probe in probes}

    def run(self, batch: EvalBatch, names: Sequence[str]) -> _Ran | HopeprobeError:
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
        return _Ran(out, fired, read)

    def _without_doubts(
        self, batch: EvalBatch, out: WindowLosses, cache: Mapping[str, Tensor], doubts: str, wanted: set[str]
    ) -> tuple[WindowLosses, Mapping[str, Tensor]]:
        """The same, with windows in which a gate is in doubt run again in float64.

        Raises MeasurementError where nothing said what is in doubt.
        """
        if doubts not in cache:
            raise MeasurementError(_never_fired([doubts]))
        rows = np.flatnonzero((as_float64(cache[doubts]) != 0).any(axis=1))
        if not len(rows):
            return out, cache
        again, _, seen = self._once(self.subject.exact(), rows_of(batch, rows), wanted, {})
        fresh = {name: _put(cache[name], rows, seen[name]) for name in wanted if name in cache}
        return out._replace(losses=_put(out.losses, rows, again.losses)), fresh

    def _once(
        self, subject: Subject, batch: EvalBatch, wanted: set[str], readers: Mapping[str, _Reader]
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


def _can_be_run_again(reader: _Reader, subject: Subject) -> bool:
    """Whether all that is read has a place for each token: how often writes fire hangs on the rows beside."""
    points = subject.module.hook_dict
    return reader.reducing is None and all(points[name].spec.cadence == "tick" for name in reader.cached)


def _put(into: Tensor, rows: IntArray, fresh: Tensor) -> Tensor:
    """The tensor with other rows, as precise as they are."""
    import torch

    return into.to(fresh.dtype).index_copy(0, torch.from_numpy(rows).to(into.device), fresh)


def _reader(probe: Probe, subject: Subject, windows: EvalWindows) -> _Reader:
    points, whole, reducers = subject.module.hook_dict, list(probe.hooks(subject)), probe.reducers(subject)
    cached = resolve(points, whole) if whole else []
    if not reducers:
        return _Reader(cached, [], None)
    reduced = {name: reducer for selector, reducer in reducers.items() for name in resolve(points, selector)}
    if both := sorted(set(cached) & set(reduced)):
        raise BadInputError(f"{probe.name} reads {', '.join(both)} both whole and reduced")
    wanted = check_positions(subject, probe.positions(subject, windows))
    return _Reader(cached, list(reduced), Reducing(subject, reduced, wanted))


def _seen(subject: Subject, reader: _Reader, cache: Mapping[str, Tensor], batch: EvalBatch) -> Readings:
    """What a probe reads of one batch. Raises MeasurementError for points that every tick passes and did not fire."""
    seen = reader.reducing.readings(batch, cache) if reader.reducing else Readings(cache, {})
    points = subject.module.hook_dict
    # A reducer may have had no position in this batch.
    ticking = [name for name in reader.cached if points[name].spec.cadence == "tick"]
    if silent := _silent(subject, [name for name in ticking if name not in seen], batch):
        raise MeasurementError(_never_fired(silent))
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
        raise MeasurementError(_not_in_force(condition, silent))


def _silent(subject: Subject, names: Sequence[str], batch: EvalBatch) -> list[str]:
    """Of points that did not fire, those that should have: write gates rest where a batch is too short to write."""
    if names and batch.tokens.shape[1] - 1 < subject.tick:
        with contextlib.suppress(MissingCapability):
            selectors = [selector for selector, _ in subject.freeze_hooks()]
            gates = resolve(subject.module.hook_dict, selectors) if selectors else []
            return [name for name in names if name not in gates]
    return list(names)


def _not_in_force(condition: Condition, names: Sequence[str]) -> str:
    return f"the model was not {condition.name}: {_never_fired(names)}"


def _never_fired(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"hooks never fired, so nothing was measured there: {shown}"
