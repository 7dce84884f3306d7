"""One pass over the data, under one condition, that feeds all probes at once.

Hook points are cached a batch at a time and let go once every probe has read them: memory is that of one
batch, whatever the number of tokens. A probe that cannot be measured falls out alone, with the reason; the
others go on. A condition whose hooks did not fire was not in force, and takes all its probes along.

Several ranks share out the batches that one process would run, and rank 0 folds what they gathered (`hopeprobe.ranks`).
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.subject import MissingCapability

from .base import Accumulator
from .left_out import Suspects, WindowsNotFiniteError, check_live
from .one_batch import Ran, Worker, can_be_run_again, never_fired, not_in_force, reader_of
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hopeprobe.conditions import Condition
    from hopeprobe.probes.base import Probe
    from hopeprobe.subject import Subject
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
            reader = reader_of(probe, subject, windows)
            if condition.exact and not can_be_run_again(reader, subject):
                raise BadInputError(
                    f"{probe.name} reads writes, or points reduced: under {condition.name} a few windows are run "
                    "again, and there is no place for each token to put them in"
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
    workers = [Worker(one, windows, running, condition, prepared) for one in found]

    def run(worker: Worker, batch: EvalBatch) -> Ran | HopeprobeError:
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
    silent = ranks.on_first(
        lambda: _silence(subject, condition, workers[0], list(result.accumulators), all_seen)
    )
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
    worker: Worker,
    left: Sequence[str],
    all_seen: Sequence[_Seen],
) -> dict[str, str]:
    """Of probes that are left, why they have measured nothing: a point that never fired, a condition not in force."""
    failed: dict[str, str] = {}
    points = subject.module.hook_dict
    fired = set[tuple[str, str]]().union(*(seen.fired for seen in all_seen))
    in_force: Counter[str] = Counter()
    for seen in all_seen:
        in_force.update(seen.in_force)
    for name in left:
        if silent := [hook for hook in worker.readers[name].names if (name, hook) not in fired]:
            failed[name] = never_fired(silent)
    if unfired := [
        name for name, count in in_force.items() if not count and points[name].spec.cadence == "write"
    ]:
        failed |= {name: not_in_force(condition, unfired) for name in left if name not in failed}
    return failed
