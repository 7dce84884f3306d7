"""Windows that give a value that is not finite: found, named with their first token and place, and left out loudly.

One sequence that blows up must not take the others' numbers along, nor leave any of them on other tokens than the rest.
So nothing is skipped inside a pass: a pass that meets such a window says which (`WindowsNotFiniteError`), and whoever
measures begins again without it, all conditions and nulls alike. Where more than `MOST` of the windows are bad, the
model has diverged; then none is left out, and what cannot be measured is said as ever.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.conditions import LIVE, as_tensors
from hopeprobe.errors import HopeprobeError
from hopeprobe.hooks import Origin, watching_finite
from hopeprobe.stats import as_float64
from hopeprobe.stats.arrays import as_bool
from hopeprobe.tokens import EvalBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hopeprobe.conditions import Condition
    from hopeprobe.probes.readings import Readings
    from hopeprobe.stats.arrays import IntArray
    from hopeprobe.subject import Subject, WindowLosses
    from hopeprobe.tokens import EvalWindows

MOST = 0.25
"""Share of the windows that may be left out; beyond it numbers would be of what happened to survive."""


@dataclass(frozen=True)
class LeftOut:
    """A window that was left out.

    document: its ordinal in the evaluated split. start: position of the window in it. token: position in the document
    of the first token at which something is not finite. where: layer, memory or level, and hook point. condition:
    under which it was met.
    """

    document: int
    start: int
    token: int
    where: str
    condition: str

    def __str__(self) -> str:
        return (
            f"document {self.document}, window from token {self.start}: first at token {self.token}, {self.where} "
            f"({self.condition})"
        )


class WindowsNotFiniteError(Exception):
    """A pass met windows that are not finite, `found`: whoever measures begins again without. Reaches nobody else."""

    def __init__(self, found: Sequence[LeftOut]) -> None:
        super().__init__(f"values are not finite in {len(found)} windows: {'; '.join(map(str, found[:3]))}")
        self.found = tuple(found)


def said(found: Sequence[LeftOut], n_windows: int) -> str:
    """Say of all `found` of `n_windows`, for `missing`: what is not in the numbers, and why."""
    shown = "; ".join(map(str, found[:5])) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    return f"{noted(found, n_windows)}: {shown}"


def noted(found: Sequence[LeftOut], n_windows: int) -> str:
    """Say it in a row's note."""
    return f"{len(found)} of {n_windows} windows left out, not finite"


def bad_losses(out: WindowLosses) -> IntArray:
    """Rows with a loss that counts and is not finite."""
    bad = as_bool(out.scored) & ~np.isfinite(as_float64(out.losses))
    return np.flatnonzero(bad.any(axis=1))


def bad_readings(seen: Readings, out: WindowLosses) -> IntArray:
    """Rows in which a probe reads something that is not finite, at tokens that count or after writes in reach."""
    scored = as_bool(out.scored)
    found = np.zeros(len(scored), dtype=np.bool_)
    for name, tensor in seen.items():
        if tensor.ndim < 2 or tensor.shape[0] != len(scored):
            continue
        counts = seen.reached.get(name, scored if tensor.shape[1] == scored.shape[1] else None)
        if counts is None:
            continue
        bad = (
            (~tensor.detach().isfinite()).flatten(2).any(2)
            if tensor.ndim > 2
            else ~tensor.detach().isfinite()
        )
        found |= (as_bool(bad) & counts).any(axis=1)
    return np.flatnonzero(found)


def bad_reduced(seen: Readings) -> IntArray:
    """The same of what reducers gave alone: few numbers a window."""
    found: set[int] = set()
    for name, reached in seen.reached.items():
        bad = as_bool((~seen[name].isfinite()).any(2)) & reached
        found.update(np.flatnonzero(bad.any(axis=1)).tolist())
    return np.array(sorted(found), dtype=np.int64)


class Suspects:
    """Windows of one pass that seem bad, and what becomes of them."""

    def __init__(self, windows: EvalWindows) -> None:
        self.most = int(MOST * windows.n_windows)
        self.rows: list[tuple[EvalBatch, int]] = []

    def add(self, batch: EvalBatch, rows: IntArray) -> None:
        """Add rows of a batch."""
        self.rows += [(batch, row) for row in rows.tolist()]

    @property
    def too_many(self) -> bool:
        """Whether the model diverged rather than a few windows."""
        return len(self.rows) > self.most

    def named(self, subject: Subject, condition: Condition, prepared: Any) -> list[LeftOut]:
        """Run each by itself and name its origin; those that are finite then are none."""
        found = []
        for batch, row in self.rows:
            alone = one_row(batch, row)
            origin = origin_of(subject, condition, prepared, alone)
            if origin is not None:
                document, start = int(alone.document[0]), int(alone.start[0])
                _, _, where = str(origin).partition(", ")
                found.append(LeftOut(document, start, start + origin.token, where, condition.name))
        return found


def one_row(batch: EvalBatch, row: int) -> EvalBatch:
    """One window of a batch by itself."""
    alone = rows_of(batch, slice(row, row + 1))
    return dataclasses.replace(alone, tokens=alone.tokens[:, : int(batch.lengths[row]) + 1])


def rows_of(batch: EvalBatch, rows: IntArray | slice) -> EvalBatch:
    """Some windows of a batch, as wide as they were."""
    return EvalBatch(
        batch.tokens[rows], batch.lengths[rows], batch.document[rows], batch.group[rows], batch.start[rows],
        batch.index[rows],
    )  # fmt: skip


def origin_of(subject: Subject, condition: Condition, prepared: Any, batch: EvalBatch) -> Origin | None:
    """Run a batch of one window under a condition and name its first value that is not finite; None without any."""
    hooks = condition.hooks(subject, prepared, batch) if condition.hooks else ()
    with (
        subject.module.hooks(hooks, allow_unfired=True),
        watching_finite(subject.module, batch.lengths.tolist()) as origins,
    ):
        out = condition.run(subject, prepared, batch) if condition.run else subject.run(*as_tensors(batch))
    if 0 in origins:
        return origins[0]
    bad = as_bool(out.scored)[0] & ~np.isfinite(as_float64(out.losses)[0])
    return Origin(int(np.argmax(bad)), "") if bad.any() else None


def check_live(subject: Subject, windows: EvalWindows) -> None:
    """Raise WindowsNotFiniteError for windows whose live losses are not finite, unless they are too many."""
    suspects = Suspects(windows)
    for batch in _batches(subject, windows):
        suspects.add(*batch)
        if suspects.too_many:
            return
    if found := suspects.named(subject, LIVE, None):
        raise WindowsNotFiniteError(found)


def _batches(subject: Subject, windows: EvalWindows) -> Iterator[tuple[EvalBatch, IntArray]]:
    for batch in windows:
        try:
            out = subject.run(*as_tensors(batch))
        except HopeprobeError:  # the pass itself says so
            return
        yield batch, bad_losses(out)
