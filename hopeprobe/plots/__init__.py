"""Figures of results and of training records.

loss           the loss curve of a training run
similarity     the levels of the CMS, layer by layer
gates          loss against write budget, a line a rule
rows           any probe: every value with its interval beside its nulls, coloured by verdict
marks          what a value, a verdict and a null look like there
canvas         a blank figure, and how it becomes a PNG

`draw` gives a probe's figure: its own where `FIGURES` has one, else that of `rows`. seaborn and matplotlib load
when a figure is first drawn.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hopeprobe.errors import BadInputError, MeasurementError, near_names
from hopeprobe.files import write_atomically

from .gates import draw_budgets
from .loss import draw_loss_curve, plot_loss_curve
from .rows import draw_rows
from .similarity import draw_similarity

if TYPE_CHECKING:
    from hopeprobe.results import NullRow, ResultRow, Results

    from .canvas import Canvas

Draw: TypeAlias = (
    "Callable[[Sequence[ResultRow], Mapping[tuple[Any, ...], Mapping[str, NullRow]], str], Canvas | None]"
)
"""From rows of one probe and checkpoint, all nulls by the keys of rows, and a title; None for nothing to draw."""

FIGURES: dict[str, Draw] = {"cms-similarity": draw_similarity, "relative-surprise": draw_budgets}
"""Figures made for one probe, by its name."""


class Figures(dict[str, "Canvas"]):
    """Figures by name; a notebook shows them one below the other."""

    def _repr_html_(self) -> str:
        return "".join(
            f'<p>{html.escape(name)}</p><img style="max-width:100%" alt="{html.escape(name)}" '
            f'src="data:image/png;base64,{base64.b64encode(figure.png()).decode()}">'
            for name, figure in self.items()
        )


def draw(results: Results, probe: str, checkpoint: str | None = None) -> Canvas:
    """Draw one probe's figure of one checkpoint.

    Raises BadInputError for a probe or checkpoint that the results do not hold, and where they hold several
    checkpoints and none is named; MeasurementError where nothing was measured that could be drawn.
    """
    of_probe = [row for row in results.rows if row.probe == probe]
    known = list(dict.fromkeys(row.probe for row in results.rows))
    if not of_probe:
        there = ", ".join(known) or "nothing"
        raise BadInputError(
            f"nothing was measured by {probe!r}{near_names(probe, known)} (there is: {there})"
        )
    names = list(dict.fromkeys(row.checkpoint for row in of_probe))
    if checkpoint is None and len(names) > 1:
        raise BadInputError(f"the results hold several checkpoints, name one: {', '.join(names)}")
    chosen = names[0] if checkpoint is None else checkpoint
    rows = [row for row in of_probe if row.checkpoint == chosen]
    if not rows:
        raise BadInputError(f"{probe} was not measured of {chosen!r} (it was of: {', '.join(names)})")
    step = f", step {rows[0].step}" if rows[0].step is not None else ""
    figure = FIGURES.get(probe, draw_rows)(rows, results.nulls_by_row(), f"{chosen}{step}")
    if figure is None:
        raise MeasurementError(f"{probe} measured nothing of {chosen} that could be drawn")
    return figure


def draw_all(results: Results, checkpoint: str | None = None) -> Figures:
    """Draw a figure for each probe; for each checkpoint too where there are several and none is named.

    Named by the probe, or "probe, checkpoint". What measured nothing has no figure.
    """
    pairs = list(dict.fromkeys((row.probe, row.checkpoint) for row in results.rows))
    if checkpoint is not None:
        pairs = [pair for pair in pairs if pair[1] == checkpoint]
        if not pairs:
            raise BadInputError(f"nothing was measured of {checkpoint!r}")
    several = len({name for _, name in pairs}) > 1
    figures = Figures()
    for probe, name in pairs:
        try:
            figures[f"{probe}, {name}" if several else probe] = draw(results, probe, name)
        except MeasurementError:
            continue
    return figures


def save(figure: Canvas, path: str | os.PathLike[str]) -> Path:
    """Write a PNG, whole or not at all. Raises BadInputError when it cannot be written."""
    return write_atomically(path, figure.png())


__all__ = [
    "FIGURES",
    "Figures",
    "draw",
    "draw_all",
    "draw_budgets",
    "draw_loss_curve",
    "draw_rows",
    "draw_similarity",
    "plot_loss_curve",
    "save",
]
