"""Figures 4 and 5 of the study from one's own runs: what each component matters, and how the losses fell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.stats import over_seeds
from hopeprobe.study.grid import REFERENCE, Grid, layers_of
from hopeprobe.study.published import NOISE
from hopeprobe.study.scaling import by_size
from hopeprobe.study.summary import BETTER, WORSE, Row, is_threshold, summarise

if TYPE_CHECKING:
    from .canvas import Canvas

_FOUND, _UNRESOLVED, _STUDY = 0, 7, 3  # of seaborn's colourblind palette
_OTHERS = ("-", "--", ":", "-.")


def draw_importance(grids: Sequence[Grid]) -> Canvas:
    """Δ to `full` of every variant, a panel a size; where there are several sizes, one against the other too.

    Grey where the direction is not resolved. The band is what so many seeds cannot resolve, of the widest row; crosses
    are the study's single runs, another setting.
    """
    from .canvas import PALETTE, blank

    ordered = by_size(grids)
    tables = [
        [
            row
            for row in summarise(grid)
            if row.delta is not None and row.delta.n and not is_threshold(row.name)
        ]
        for grid in ordered
    ]
    names = list(dict.fromkeys(row.name for rows in tables for row in rows))
    if not names:
        from hopeprobe.errors import MeasurementError

        raise MeasurementError("no variant has a difference to full: there is nothing to draw")
    panels = len(ordered) + (len(ordered) > 1)
    with blank(1.6 + 3.9 * panels, 1.9 + 0.36 * len(names)) as figure:
        axes = np.atleast_1d(figure.subplots(1, panels, sharey=True))
        for axis, grid, rows in zip(axes, ordered, tables, strict=False):
            _importance(axis, names, rows, PALETTE)
            axis.set_title(f"{grid.preset}: width {grid.model['dim']}, {layers_of(grid)}", fontsize="medium")
            axis.set_xlabel("Δ loss to full, live, nats a token")
        if len(ordered) > 1:
            _sizes(axes[-1], names, ordered, tables, PALETTE)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle(
            f"What each component matters ({_runs(ordered)}; 95 % intervals over seeds)", fontsize="large"
        )
        _legend(figure, PALETTE)
        return figure


def _importance(axis: Any, names: Sequence[str], rows: Sequence[Row], palette: Sequence[Any]) -> None:
    widest = max((row.delta.resolution for row in rows if row.delta and row.delta.n > 1), default=math.nan)
    if not math.isnan(widest):
        axis.axvspan(-widest, widest, color="0.9", zorder=0, linewidth=0)
    axis.axvline(0, color="0.4", linewidth=1)
    for row in rows:
        assert row.delta is not None
        at = names.index(row.name)
        known = row.finding in (WORSE, BETTER)
        error = None
        if row.delta.n > 1:
            error = [[row.delta.mean - row.delta.ci_low], [row.delta.ci_high - row.delta.mean]]
        axis.errorbar(
            row.delta.mean,
            at,
            xerr=error,
            fmt="o",
            color=palette[_FOUND if known else _UNRESOLVED],
            capsize=3,
            zorder=4,
        )
        if row.published_delta is not None:
            axis.plot(row.published_delta, at, "x", color=palette[_STUDY], zorder=3)


def _sizes(
    axis: Any, names: Sequence[str], grids: Sequence[Grid], tables: Sequence[Sequence[Row]], palette: Any
) -> None:
    axis.axvline(0, color="0.4", linewidth=1)
    step = 0.5 / len(grids)
    for i, (grid, rows) in enumerate(zip(grids, tables, strict=True)):
        for row in rows:
            assert row.delta is not None
            at = names.index(row.name) + (i - (len(grids) - 1) / 2) * step
            error = None
            if row.delta.n > 1:
                error = [[row.delta.mean - row.delta.ci_low], [row.delta.ci_high - row.delta.mean]]
            axis.errorbar(
                row.delta.mean, at, xerr=error, fmt="os^Dv"[i % 5], color=palette[i], capsize=2, markersize=4
            )
        axis.plot(
            [], [], "os^Dv"[i % 5], color=palette[i], label=f"{grid.preset} (width {grid.model['dim']})"
        )
    axis.set_title("by size", fontsize="medium")
    axis.set_xlabel("Δ loss to full, live, nats a token")
    axis.legend(fontsize="small")


def _legend(figure: Any, palette: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], color=palette[_FOUND], marker="o", label="direction resolved"),
            Line2D([], [], color=palette[_UNRESOLVED], marker="o", label="not resolved"),
            Patch(facecolor="0.9", label="too small for so many seeds (widest row)"),
            Line2D(
                [], [], color=palette[_STUDY], marker="x", linestyle="none",
                label=f"the study: one run, other setting, noise {NOISE}",
            ),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
    )  # fmt: skip


def draw_curves(grid: Grid) -> Canvas:
    """Training loss over steps, mean and interval over seeds; beside it, the last quarter less that of `full`."""
    from .canvas import PALETTE, blank

    names = [name for name in grid.names if any(c.done and not c.same_as for c in grid.of(name).values())]
    with blank(12.5, 5.4) as figure:
        whole, last = figure.subplots(1, 2)
        curves = {name: _curve(grid, name) for name in names}
        for i, name in enumerate(names):
            style = {
                "color": PALETTE[i % len(PALETTE)],
                "linestyle": _OTHERS[i // len(PALETTE) % len(_OTHERS)],
            }
            steps, losses = curves[name]
            _band(whole, steps, losses, name, style)
            if name != REFERENCE and REFERENCE in curves:
                paired = _paired(grid, name)
                if paired is not None:
                    late = paired[0] > 0.75 * grid.train["steps"]
                    _band(last, paired[0][late], paired[1][:, late], name, style)
        whole.set_xlabel("optimiser step")
        whole.set_ylabel("training loss, nats a token")
        whole.set_title("all of training", fontsize="medium")
        last.axhline(0, color="0.4", linewidth=1)
        last.set_xlabel("optimiser step")
        last.set_ylabel("training loss less that of full, same batches")
        last.set_title("last quarter", fontsize="medium")
        figure.suptitle(
            f"{grid.preset}: losses in training ({_runs([grid])}; band: 95 % over seeds)", fontsize="large"
        )
        figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return figure


def _curve(grid: Grid, name: str) -> tuple[Any, Any]:
    """Steps (P,) and losses (seeds, P)."""
    curves = [cell.curve for cell in grid.of(name).values() if cell.done and cell.curve]
    return np.array(curves[0]["step"]), np.array([curve["loss"] for curve in curves])


def _paired(grid: Grid, name: str) -> tuple[Any, Any] | None:
    reference, cells = grid.of(REFERENCE), grid.of(name)
    done = {s: cell for s, cell in reference.items() if cell.done and cell.curve}
    both = [
        s for s in cells if s in done and cells[s].done and cells[s].curve
    ]  # one that diverged ends early
    if not both:
        return None
    losses = [np.subtract(cells[s].curve["loss"], done[s].curve["loss"]) for s in both]
    return np.array(cells[both[0]].curve["step"]), np.array(losses)


def _band(axis: Any, steps: Any, losses: Any, name: str, style: dict[str, Any]) -> None:
    spreads = [over_seeds(at_step) for at_step in losses.T]
    axis.plot(steps, [spread.mean for spread in spreads], label=name, linewidth=1.6, **style)
    if len(losses) > 1:
        low, high = [s.ci_low for s in spreads], [s.ci_high for s in spreads]
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _runs(grids: Sequence[Grid]) -> str:
    said = [f"{grid.preset} {len(grid.seeds)} seeds, {grid.train['steps']:,} steps" for grid in grids]
    return "; ".join(said)
