"""From probes to rows: one model, all conditions of all probes, each pass made once.

A probe's rows are read off as soon as its pass is over and its accumulator is let go, unless it has contrasts:
then they stay until the last of its conditions was run.

Of several ranks all take part in each pass; rank 0, which then holds the accumulators, reads off the rows for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.subject import MissingCapability

from .base import (
    Accumulator,
    Measurement,
    Probe,
    Quantity,
    RowKey,
    check_paired,
    measured,
    plug_ins,
)
from .left_out import check_live
from .passes import run_pass

if TYPE_CHECKING:
    from hopeprobe.conditions import Condition
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows

CONTRASTS = "contrasts"
"""Stands for a condition where a reason is given for contrasts."""

Told: TypeAlias = "Callable[[str], Callable[[int, int], None] | None]"
"""From a condition's name to what is called with the batches done and in all."""

_T = TypeVar("_T")
_S = TypeVar("_S")


def silent(condition: str) -> None:
    """Tell nobody how far a pass is."""


@dataclass(frozen=True)
class Reader(Generic[_T]):
    """What is read off an accumulator, and off contrasts: rows by their keys."""

    rows: Callable[[Accumulator], Mapping[RowKey, _T]]
    contrasts: Callable[[Sequence[Quantity]], Mapping[RowKey, _T]]


ESTIMATES: Reader[Measurement] = Reader(
    lambda accumulator: {row.key: row for row in accumulator.measurements()},
    lambda quantities: {row.key: row for row in measured(quantities)},
)
"""Every row with its interval and the nulls of the same pass."""

VALUES: Reader[float] = Reader(lambda accumulator: accumulator.plug_ins(), plug_ins)
"""Every row's plain value."""


@dataclass
class Rows(Generic[_T]):
    """What one model gave, by probe.

    found: rows by condition and place. failed: reasons by condition, `CONTRASTS` for contrasts. lacking: the
    same, for conditions under which the model cannot be run at all.
    """

    found: dict[str, dict[RowKey, _T]] = field(default_factory=lambda: defaultdict(dict))
    failed: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    lacking: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def of(self, part: Callable[[_T], _S]) -> Rows[_S]:
        """The same with a part of every row."""
        found = {name: {key: part(row) for key, row in rows.items()} for name, rows in self.found.items()}
        return Rows(found, self.failed, self.lacking)


def conditions_of(subject: Subject, probes: Sequence[Probe]) -> dict[str, tuple[Condition, ...]]:
    """Conditions by probe. Raises BadInputError where two different ones have one name."""
    known: dict[str, tuple[Condition, str]] = {}
    asked = {}
    for probe in probes:
        asked[probe.name] = tuple(dict.fromkeys(probe.conditions(subject)))
        for condition in asked[probe.name]:
            other, first = known.setdefault(condition.name, (condition, probe.name))
            if other is not condition:
                raise BadInputError(
                    f"two different conditions are called {condition.name!r}, one by the probe {first}, one by "
                    f"{probe.name}: give them two names, or share one object"
                )
    return asked


def measure(
    subject: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    reader: Reader[_T],
    told: Told = silent,
    leave_out: bool = False,
) -> Rows[_T]:
    """Run every condition that a probe asks for, once, and read off all rows.

    Raises BadInputError where two conditions have one name, and with `leave_out` WindowsNotFiniteError where a few
    windows are not finite; what cannot be measured is in the result.
    """
    asked = conditions_of(subject, probes)
    order = list(dict.fromkeys(condition for conditions in asked.values() for condition in conditions))
    rows: Rows[_T] = Rows()
    prepared: dict[Callable[..., Any], Any] = {}
    kept: dict[str, dict[str, Accumulator]] = {probe.name: {} for probe in probes if has_contrasts(probe)}
    waiting = {probe.name: len(asked[probe.name]) for probe in probes}
    for condition in order:
        wanting = [probe for probe in probes if condition in asked[probe.name]]
        for name, accumulator in _pass(subject, windows, wanting, condition, prepared, rows, told, leave_out):
            try:
                rows.found[name].update(ranks.on_first(partial(reader.rows, accumulator)))
            except MeasurementError as error:
                rows.failed[name][condition.name] = str(error)
            else:
                if name in kept:
                    kept[name][condition.name] = accumulator
            del accumulator  # may be a gigabyte, and the next pass is about to be made
        for probe in wanting:
            waiting[probe.name] -= 1
            if probe.name in kept and not waiting[probe.name]:
                _contrast(probe, kept.pop(probe.name), rows, reader)
    return rows


def _pass(
    subject: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    condition: Condition,
    prepared: dict[Callable[..., Any], Any],
    rows: Rows[_T],
    told: Told,
    leave_out: bool,
) -> Iterator[tuple[str, Accumulator]]:
    """Run one condition: what each probe has gathered, one after the other, each held by nobody else."""
    try:
        if condition.prepare is not None and condition.prepare not in prepared:
            prepared[condition.prepare] = condition.prepare(subject, windows)
        given = prepared[condition.prepare] if condition.prepare is not None else None
        found = run_pass(subject, windows, probes, condition, given, told(condition.name), leave_out)
    except MissingCapability as error:
        for probe in probes:
            rows.lacking[probe.name][condition.name] = str(error)
        return
    except HopeprobeError as error:
        if leave_out and isinstance(error, MeasurementError):  # of what comes before the pass, as a rule
            check_live(subject, windows)
        for probe in probes:
            rows.failed[probe.name][condition.name] = str(error)
        return
    for name, reason in found.failed.items():
        rows.failed[name][condition.name] = reason
    for name in list(found.accumulators):
        yield name, found.accumulators.pop(name)


def has_contrasts(probe: Probe) -> bool:
    """Whether the probe compares conditions."""
    return type(probe).contrasts is not Probe.contrasts


def _contrast(
    probe: Probe, accumulators: Mapping[str, Accumulator], rows: Rows[_T], reader: Reader[_T]
) -> None:
    """Add the contrasts; where a condition is missing, that is the reason why they are."""
    name = probe.name
    if rows.failed[name]:
        condition, reason = next(iter(rows.failed[name].items()))
        rows.failed[name][CONTRASTS] = f"{condition} was not measured: {reason}"
        return
    if rows.lacking[name] and not probe.partial:
        return  # said for the condition

    def read() -> Mapping[RowKey, _T]:
        return reader.contrasts([check_paired(quantity) for quantity in probe.contrasts(accumulators)])

    try:
        rows.found[name].update(ranks.on_first(read))
    except MeasurementError as error:
        rows.failed[name][CONTRASTS] = str(error)
