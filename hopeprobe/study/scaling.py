"""How the importance of a component changes with size: the same paired difference in grids of several sizes.

Between two sizes, Δ_large − Δ_small with Welch's interval: runs of different sizes have nothing in common but the order
of their data. Sizes go by the parameters of `full`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hopeprobe.errors import BadInputError
from hopeprobe.stats import Contrast, benjamini_hochberg, between
from hopeprobe.stats.verdict import FALSE_DISCOVERY_RATE

from .grid import REFERENCE, Grid
from .published import NOISE, published_delta
from .summary import BETTER, FAILS, HOLDS, OPEN, SAME, WORSE, Row, summarise


@dataclass(frozen=True)
class Growth:
    """One component at two neighbouring sizes.

    `ratio` is Δ_large / Δ_small where both are findings of one sign, else NaN; it has no interval. `published` is the
    study's pair of differences, (small, scaled), and `claim` what becomes of the change between them.
    """

    name: str
    small: str
    large: str
    delta_small: Row
    delta_large: Row
    change: Contrast
    q: float  # of the change, over all rows
    ratio: float
    published: tuple[float, float] | None
    claim: str


def by_size(grids: Sequence[Grid]) -> list[Grid]:
    """Grids by the size of `full`. BadInputError where two are of one preset or size, or one has no `full`."""
    for grid in grids:
        if REFERENCE not in grid.names:
            raise BadInputError(
                f"the grid {grid.preset!r} has no {REFERENCE!r} to compare with: add it with hopeprobe ablate "
                f"--variants {REFERENCE}"
            )
    ordered = sorted(grids, key=size)
    for one, other in itertools.pairwise(ordered):
        if size(one) == size(other) or one.preset == other.preset:
            raise BadInputError(f"two grids are of one size: {one.preset!r} and {other.preset!r}")
    return ordered


def size(grid: Grid) -> int:
    """Parameters of `full`."""
    return max(cell.parameters for cell in grid.of(REFERENCE).values())


def scaling(grids: Sequence[Grid]) -> list[Growth]:
    """Every component that two neighbouring sizes have, smaller sizes first."""
    ordered = by_size(grids)
    found = []
    for small, large in itertools.pairwise(ordered):
        rows = {row.name: row for row in summarise(large) if row.delta is not None}
        both = [row for row in summarise(small) if row.delta is not None and row.name in rows]
        found += [_growth(small, large, row, rows[row.name]) for row in both]
    q = benjamini_hochberg([math.nan if _untested(growth) else growth.change.p for growth in found])
    return [
        dataclasses.replace(g, q=float(each), claim=_claim(g, float(each)))
        for g, each in zip(found, q, strict=True)
    ]


def _untested(growth: Growth) -> bool:
    """At neither size a computation of its own: there is nothing to test, and no other row to weigh on."""
    return growth.delta_small.finding == growth.delta_large.finding == SAME


def _growth(small: Grid, large: Grid, one: Row, other: Row) -> Growth:
    assert one.delta is not None
    assert other.delta is not None
    change = between(other.delta, one.delta)
    known = one.finding == other.finding and one.finding in (WORSE, BETTER)
    ratio = other.delta.mean / one.delta.mean if known else math.nan
    pair = (published_delta("small", one.name, None), published_delta("scaled", one.name, None))
    published = None if pair[0] is None or pair[1] is None else (pair[0], pair[1])
    return Growth(one.name, small.preset, large.preset, one, other, change, math.nan, ratio, published, "")


def _claim(growth: Growth, q: float) -> str:
    """Does the difference change with size in the direction that the study printed."""
    if growth.published is None:
        return ""
    change, claimed = growth.change, growth.published[1] - growth.published[0]
    if math.isnan(q) or abs(claimed) < change.resolution:
        return OPEN
    if q > FALSE_DISCOVERY_RATE:
        nothing = max(-change.ci_low, change.ci_high) <= NOISE < abs(claimed)
        return FAILS if nothing else OPEN
    return HOLDS if math.copysign(1.0, claimed) == math.copysign(1.0, change.difference) else FAILS


def other_differences(grids: Sequence[Grid]) -> list[str]:
    """What differs between grids beside their size: a change of Δ between them may be of that."""
    found = []
    for name, values in (
        ("context", [grid.model["context"] for grid in grids]),
        ("steps", [grid.train["steps"] for grid in grids]),
        ("batch", [grid.train["batch"] for grid in grids]),
        ("learning rate", [grid.train["learning_rate"] for grid in grids]),
        ("data", [grid.data["name"] for grid in grids]),
        ("held-out tokens", [grid.evaluation["tokens"] for grid in grids]),
        ("decay target", [grid.model.get("decay_target") for grid in grids]),
        ("truncation in ticks", [grid.model.get("truncate_ticks") for grid in grids]),
    ):
        if len(set(values)) > 1:
            found.append(f"{name} ({', '.join(map(str, values))})")
    return found
