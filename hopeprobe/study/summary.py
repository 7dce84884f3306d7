"""One row a variant: losses over seeds, paired differences to `full`, and what becomes of the published claim.

difference  Δ_s = loss of the variant − loss of `full`, same seed s: same order of data and, where shapes agree, same
            initial weights; mean, interval and test over seeds (`stats.seeds`), q over the variants, or over the
            thresholds, that are computations of their own
finding     `worse` or `better` where q ≤ 0.05; `same` where every seed's run is the computation of `full`; else
            `not resolved`
claim       about a published difference δ, read as a direction:
            holds           the finding has δ's sign
            does not hold   the finding has the other sign, or the computation is the same, or the interval lies
                            within the study's own noise of 0 and δ does not
            not resolved    anything else; and everything about a |δ| under the resolution, unless the interval lies
                            beyond the resolution on the other side
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopeprobe.stats import OverSeeds, benjamini_hochberg, over_seeds
from hopeprobe.stats.verdict import FALSE_DISCOVERY_RATE

from .grid import REFERENCE, Cell, Grid
from .published import NOISE, column, published_delta, published_loss

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved"
WORSE, BETTER, SAME = "worse", "better", "same"


@dataclass(frozen=True)
class Row:
    """One variant over seeds; `delta` and `delta_frozen` are None for `full` itself."""

    name: str
    parameters: int
    seeds: int
    diverged: int
    live: OverSeeds
    frozen: OverSeeds
    delta: OverSeeds | None
    delta_frozen: OverSeeds | None
    q: float
    finding: str
    published: float | None
    published_delta: float | None
    claim: str
    same_as: str  # "full", or "full (2 of 3 seeds)"
    gate_rate: float  # mean over seeds; NaN where nothing is written
    surprise_min: float  # lowest over seeds


def summarise(grid: Grid) -> list[Row]:
    """All rows of a grid, in its order."""
    reference = grid.of(REFERENCE)
    found = [(name, grid.of(name)) for name in grid.names]
    deltas = [None if name == REFERENCE else _paired(cells, reference, "live") for name, cells in found]
    frozen = [None if name == REFERENCE else _paired(cells, reference, "frozen") for name, cells in found]
    q = _adjusted([name for name, _ in found], [cells for _, cells in found], deltas)
    return [
        _row(grid, name, cells, delta, delta_frozen, float(each))
        for (name, cells), delta, delta_frozen, each in zip(found, deltas, frozen, q, strict=True)
    ]


def _adjusted(
    names: Sequence[str], cells: Sequence[dict[int, Cell]], deltas: Sequence[OverSeeds | None]
) -> list[float]:
    """The q of each row, over variants and over thresholds by themselves; rows that test nothing are in neither."""
    q = [math.nan] * len(names)
    for of_thresholds in (False, True):
        family = [
            i
            for i, (name, delta) in enumerate(zip(names, deltas, strict=True))
            if is_threshold(name) == of_thresholds and delta is not None and not _all_same(cells[i])
        ]
        p = [delta.p for i in family if (delta := deltas[i]) is not None]
        for i, each in zip(family, benjamini_hochberg(p), strict=True):
            q[i] = float(each)
    return q


def is_threshold(name: str) -> bool:
    """Is a row `full` at another threshold, `full-tau-3`."""
    return "-tau-" in name


def _all_same(cells: dict[int, Cell]) -> bool:
    """Is every seed's run a computation of `full`'s."""
    done = [cell for cell in cells.values() if cell.done]
    return bool(done) and all(cell.same_as == REFERENCE for cell in done)


def _row(
    grid: Grid,
    name: str,
    cells: dict[int, Cell],
    delta: OverSeeds | None,
    delta_frozen: OverSeeds | None,
    q: float,
) -> Row:
    done = [cell for cell in cells.values() if cell.done]
    any_cell = next(iter(cells.values()))
    beside = column(grid.model["dim"])
    claimed = published_delta(beside, any_cell.variant, any_cell.threshold)
    twins = [cell.same_as for cell in done if cell.same_as is not None]
    same_as = ""
    if twins:
        same_as = twins[0] + ("" if len(twins) == len(done) else f" ({len(twins)} of {len(done)} seeds)")
    finding = _finding(delta, q, _all_same(cells))
    return Row(
        name,
        max(cell.parameters for cell in cells.values()),
        len(done),
        len(cells) - len(done),
        over_seeds([cell.live for cell in done]),
        over_seeds([cell.frozen for cell in done]),
        delta,
        delta_frozen,
        q,
        finding,
        published_loss(beside, any_cell.variant, any_cell.threshold),
        claimed,
        "" if claimed is None or delta is None else answer(claimed, delta, finding),
        same_as,
        _mean([cell.gate_rate for cell in done]),
        min((c.surprise_min for c in done if not math.isnan(c.surprise_min)), default=math.nan),
    )


def _paired(cells: dict[int, Cell], reference: dict[int, Cell], key: str) -> OverSeeds:
    both = [s for s in sorted(cells) if s in reference and cells[s].done and reference[s].done]
    return over_seeds([getattr(cells[s], key) - getattr(reference[s], key) for s in both])


def _finding(delta: OverSeeds | None, q: float, same: bool) -> str:
    if delta is None:
        return ""
    if same:
        return SAME
    if not q <= FALSE_DISCOVERY_RATE:
        return OPEN
    return WORSE if delta.mean > 0 else BETTER


def answer(claimed: float, measured: OverSeeds, finding: str) -> str:
    """What a measurement says of a published difference; see the module for the rule."""
    if finding == SAME:
        return FAILS
    if measured.n < 2:
        return OPEN
    sign = math.copysign(1.0, claimed)
    against = (
        -measured.ci_high if sign > 0 else measured.ci_low
    )  # how far the interval lies on the other side
    if abs(claimed) < measured.resolution:
        return FAILS if against > measured.resolution else OPEN
    if finding == (WORSE if claimed > 0 else BETTER):
        return HOLDS
    if finding != OPEN:
        return FAILS
    nothing = max(-measured.ci_low, measured.ci_high) <= NOISE < abs(claimed)
    return FAILS if nothing else OPEN


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
