"""`compare`: grids of runs side by side, every table and figure that `hopeprobe compare` makes, without files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, overload

from hopeprobe.errors import BadInputError, MeasurementError

from .claims import Claim, claims
from .grid import REFERENCE, Grid, read_grid
from .probed import Probed, read_probed
from .scaling import Growth, by_size, scaling
from .summary import is_threshold, summarise
from .table import Table
from .writing import (
    CLAIMS_HEADER,
    SCALING_HEADER,
    SWEEP_HEADER,
    TABLE_HEADER,
    scaling_frame,
    scaling_lines,
    setting_lines,
    sweep_lines,
    sweep_rows,
    table_frame,
    table_lines,
)

if TYPE_CHECKING:
    from hopeprobe.plots import Figures
    from hopeprobe.plots.canvas import Canvas

#: The study's figures.
FIGURES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What grids of several sizes say of the study; in a notebook all of its tables.

    Attributes:
        grids: smaller ones first.
        inside: the grid whose `full` was probed.
        probed: rows of those probes, over seeds; empty where no grid has any.

    """

    grids: tuple[Grid, ...]
    inside: Grid
    probed: tuple[Probed, ...] = ()

    @property
    def variants(self) -> dict[str, Table]:
        """Table 1 of each size, by its preset: losses, differences to `full`, what becomes of the published claim."""
        return {grid.preset: _variants(grid) for grid in self.grids}

    @property
    def thresholds(self) -> dict[str, Table]:
        """Table 2 of each size that has one: `full` at other surprise thresholds."""
        return {grid.preset: _thresholds(grid) for grid in self.grids if any(map(is_threshold, grid.names))}

    @property
    def growths(self) -> list[Growth]:
        """Differences at neighbouring sizes; nothing where there is one size."""
        return scaling(self.grids) if len(self.grids) > 1 else []

    @property
    def sizes(self) -> Table:
        """Section 4.5: the same differences at several sizes."""
        growths = self.growths
        return Table(SCALING_HEADER, scaling_lines(growths), numbers=lambda: scaling_frame(growths))

    @property
    def answers(self) -> list[Claim]:
        """Every published claim that these grids say something of."""
        return claims(self.grids, self.probed, self.inside)

    @property
    def claims(self) -> Table:
        """The same as a table."""
        return Table(CLAIMS_HEADER, [dataclasses.astuple(claim) for claim in self.answers])

    @overload
    def plot(self, number: int) -> Canvas: ...

    @overload
    def plot(self, number: None = None) -> Figures: ...

    def plot(self, number: int | None = None) -> Canvas | Figures:
        """Draw the study's figure of that number, 1 to 5; without a number all that can be drawn.

        Raises BadInputError for another number, and for sizes that cannot be compared; MeasurementError where nothing
        was measured that could be drawn.
        """
        from hopeprobe.plots import Figures
        from hopeprobe.plots.study_losses import draw_curves, draw_importance
        from hopeprobe.plots.study_probes import draw_cms, draw_gate, draw_memories

        drawings: tuple[Callable[[], Canvas], ...] = (
            lambda: draw_cms(self.probed),
            lambda: draw_memories(self.probed),
            lambda: draw_gate(self.probed),
            lambda: draw_importance(self.grids),
            lambda: draw_curves(self.grids[-1]),
        )
        if number is not None:
            if number not in FIGURES:
                raise BadInputError(f"the study has figures 1 to {len(FIGURES)}, and no figure {number!r}")
            return drawings[number - 1]()
        figures = Figures()
        for each, draw in zip(FIGURES, drawings, strict=True):
            try:
                figures[f"figure-{each}"] = draw()
            except (MeasurementError, BadInputError):  # nothing to draw, or nothing to compare with
                continue
        return figures

    def _tables(self) -> dict[str, Table]:
        """Every table that has lines, by its title."""
        found = {f"variants, {name}": table for name, table in self.variants.items()}
        found |= {f"surprise thresholds, {name}": table for name, table in self.thresholds.items()}
        found |= {"sizes": self.sizes, "the study's claims": self.claims}
        return {title: table for title, table in found.items() if len(table)}

    def __repr__(self) -> str:
        return "\n\n".join(f"{title}\n\n{table}" for title, table in self._tables().items())

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{escape(title)}</p>{table._repr_html_()}" for title, table in self._tables().items()
        )


def compare(*folders: str | os.PathLike[str]) -> Comparison:
    """Read the records of one or several grids, folders that `hopeprobe ablate` wrote, in any order.

    Raises BadInputError for what is no record, and for grids that cannot be set side by side.
    """
    if not folders:
        raise BadInputError("there is nothing to compare: name the folder of at least one grid")
    paths = [path.parent if path.is_file() else path for path in map(Path, folders)]
    read = [read_grid(folder) for folder in folders]
    grids = by_size(read)
    found = {grid.preset: path for path, grid in zip(paths, read, strict=True)}
    for grid in reversed(grids):
        probed = probed_in(found[grid.preset])
        if probed:
            return Comparison(tuple(grids), grid, probed)
    return Comparison(tuple(grids), grids[-1])


def probed_in(folder: Path) -> tuple[Probed, ...]:
    """Rows of probes of `full` in the folder of a grid; nothing where none were run."""
    return tuple(row for row in read_probed(folder) if row.name == REFERENCE)


def _variants(grid: Grid) -> Table:
    rows = [row for row in summarise(grid) if not is_threshold(row.name)]
    return Table(TABLE_HEADER, table_lines(rows), setting_lines(grid), lambda: table_frame(rows))


def _thresholds(grid: Grid) -> Table:
    rows = summarise(grid)
    return Table(SWEEP_HEADER, sweep_lines(rows), numbers=lambda: table_frame(sweep_rows(rows)))
