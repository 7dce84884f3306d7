"""Any probe's rows: each value with its interval beside its nulls, coloured by verdict.

Statistics measured at the same places stand side by side, a line of dots a place. A statistic measured along
positions has small panels instead, one for each component, the layers side by side at each position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from hopeprobe.stats.verdict import Verdict

if TYPE_CHECKING:
    from hopeprobe.results import NullRow, ResultRow

    from .canvas import Canvas

Nulls: TypeAlias = "Mapping[tuple[Any, ...], Mapping[str, NullRow]]"
Place: TypeAlias = "tuple[int | None, str, str, str]"

WIDTH = 10.5  # inches
_COLUMNS = 4  # panels side by side
_LINE = 0.24  # inches for a place
_LETTER = 0.075  # inches
_DECADES = 3  # positive values that span more are drawn on a logarithmic axis

_LOOKS = {
    # verdict: colour of seaborn's colourblind palette, marker
    Verdict.LEARNED: (2, "o"),
    Verdict.AT_INIT: (0, "s"),
    Verdict.INCONCLUSIVE: (7, "o"),
    Verdict.NOT_APPLICABLE: (7, "o"),
}
_FAILED = (3, "X")
_BAND = "0.84"
_NULL_MARKS = {
    # kind: marker, what the legend says
    "own-init": ("D", "own initial weights"),
    "fresh-init": ("", "fresh initial weights, 95 % range"),
    "shuffled": ("x", "shuffled"),
    "analytic": ("+", "analytic"),
    "unigram": ("1", "unigram"),
    "random-gate": ("*", "random gate"),
    "optimiser": (">", "as far as the optimiser can have moved"),
}


@dataclass(frozen=True)
class _Panel:
    """Rows of one statistic on one pair of axes: places across, or positions along."""

    title: str
    unit: str
    rows: tuple[ResultRow, ...]


class _Band(NamedTuple):
    """Panels side by side, and what they share: labels of lines, or of positions."""

    panels: tuple[_Panel, ...]
    labels: tuple[str, ...]
    along: bool
    height: float


def draw_rows(rows: Sequence[ResultRow], nulls: Nulls, title: str) -> Canvas | None:
    """Draw the rows of one probe and checkpoint; None where none of them has a value.

    Rows without a value are named by their verdict where the value would be; statistics that have none at all
    are named below.
    """
    statistics = {
        name: [r for r in rows if r.statistic == name] for name in dict.fromkeys(r.statistic for r in rows)
    }
    drawn = {name: of for name, of in statistics.items() if any(not math.isnan(r.value) for r in of)}
    if not drawn:
        return None
    bands = [*_lines(drawn), *_positions(drawn)]
    heights = [band.height for band in bands]
    from .canvas import blank

    missing = [name for name in statistics if name not in drawn]
    with blank(WIDTH, sum(heights) + 1.1 + 0.2 * bool(missing), scale=0.75) as figure:
        parts = figure.subfigures(len(bands), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, band in zip(parts, bands, strict=True):
            _draw_band(part, band, nulls)
        figure.suptitle(f"{rows[0].probe}: {title}", x=0.01, ha="left", weight="bold")
        handles = _legend([r for of in drawn.values() for r in of], nulls)
        note = f"nothing measured: {', '.join(missing)}" if missing else None
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, title=note
        )
        return figure


def _lines(statistics: Mapping[str, Sequence[ResultRow]]) -> list[_Band]:
    """Bands of dots: statistics with the same places together, up to four side by side."""
    together: dict[tuple[Place, ...], list[str]] = {}
    for name, rows in statistics.items():
        if not _is_along(rows):
            together.setdefault(tuple(dict.fromkeys(_place(r) for r in rows)), []).append(name)
    bands = []
    for places, names in together.items():
        labels = _labels(places)
        longest = max(map(len, labels))
        columns = _COLUMNS if longest * _LETTER < 0.2 * WIDTH else _COLUMNS - 1
        for start in range(0, len(names), columns):
            panels = [
                _Panel(n, statistics[n][0].unit, tuple(statistics[n])) for n in names[start : start + columns]
            ]
            bands.append(_Band(tuple(panels), labels, along=False, height=0.75 + _LINE * max(len(labels), 2)))
    return bands


def _positions(statistics: Mapping[str, Sequence[ResultRow]]) -> list[_Band]:
    """Bands along positions: of each statistic, a panel for each component and condition."""
    bands = []
    for name, rows in statistics.items():
        if not _is_along(rows):
            continue
        positions = tuple(dict.fromkeys(r.position for r in rows))
        parts: dict[str, list[ResultRow]] = {}
        for row in rows:
            parts.setdefault(
                _join(row.component, row.condition if _vary(rows, "condition") else ""), []
            ).append(row)
        panels = [_Panel(_join(name, part), of[0].unit, tuple(of)) for part, of in parts.items()]
        layers = len({r.layer for r in rows})
        columns = _COLUMNS if len(positions) * layers <= 16 else 2
        starts = range(0, len(panels), columns)
        bands += [_Band(tuple(panels[i : i + columns]), positions, along=True, height=2.2) for i in starts]
    return bands


def _is_along(rows: Sequence[ResultRow]) -> bool:
    return len({r.position for r in rows}) > 1


def _vary(rows: Sequence[ResultRow], column: str) -> bool:
    return len({getattr(r, column) for r in rows}) > 1


def _place(row: ResultRow) -> Place:
    return row.layer, row.component, row.condition, row.position


def _labels(places: Sequence[Place]) -> tuple[str, ...]:
    """What tells places apart, in words: layer, component, and condition and position where they differ."""
    conditions, positions = ({place[i] for place in places} for i in (2, 3))
    return tuple(
        _join(
            f"layer {layer}" if layer is not None else "",
            component,
            condition if len(conditions) > 1 else "",
            position if len(positions) > 1 else "",
        )
        for layer, component, condition, position in places
    )


def _join(*words: str) -> str:
    return " · ".join(filter(None, words))


def _draw_band(part: Any, band: _Band, nulls: Nulls) -> None:
    columns = max(len(band.panels), 2)
    grid = part.subplots(1, columns, sharey=not band.along, squeeze=False)[0]
    for axes in grid[len(band.panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, band.panels, strict=False):
        axes.set_title(panel.title, loc="left", fontsize="medium")
        (_draw_along if band.along else _draw_lines)(axes, panel, band.labels, nulls)
        if _is_logarithmic(panel, nulls):
            (axes.set_yscale if band.along else axes.set_xscale)("log")
    if not band.along:
        first = grid[0]
        first.set_yticks(range(len(band.labels)), band.labels)
        first.set_ylim(len(band.labels) - 0.4, -0.6)


def _draw_lines(axes: Any, panel: _Panel, labels: Sequence[str], nulls: Nulls) -> None:
    """Draw values from left to right, a line a place, the first on top."""
    for at, row in enumerate(panel.rows):
        _mark(axes, row, nulls.get(row.key, {}), at, 0.32, upright=False)
    axes.grid(visible=False, axis="y")
    for at in range(len(labels)):
        axes.axhline(at, color="0.93", linewidth=0.8, zorder=0)
    axes.set_xlabel("" if panel.unit == "1" else panel.unit)
    axes.margins(x=0.08)
    _few_ticks(axes.xaxis)


def _draw_along(axes: Any, panel: _Panel, positions: Sequence[str], nulls: Nulls) -> None:
    """Draw values upwards, positions from left to right, the layers side by side at each and joined by a line."""
    layers = list(dict.fromkeys(r.layer for r in panel.rows))
    spread = 0.8 / len(layers)
    for i, layer in enumerate(layers):
        rows = [r for r in panel.rows if r.layer == layer]
        offset = (i - (len(layers) - 1) / 2) * spread
        points = [(positions.index(r.position) + offset, r) for r in rows]
        axes.plot([x for x, _ in points], [r.value for _, r in points], color="0.6", linewidth=0.8, zorder=3)
        for x, row in points:
            _mark(axes, row, nulls.get(row.key, {}), x, 0.4 * spread, upright=True)
        measured = [(x, r.value) for x, r in points if not math.isnan(r.value)]
        if len(layers) > 1 and measured:
            axes.annotate(
                f" {layer}",
                measured[-1],
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
    many = sum(map(len, positions)) > 24
    axes.set_xticks(
        range(len(positions)), positions, rotation=40 if many else 0, ha="right" if many else "center"
    )
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("" if panel.unit == "1" else panel.unit)
    axes.margins(x=0.06, y=0.1)


def _mark(
    axes: Any, row: ResultRow, nulls: Mapping[str, NullRow], at: float, half: float, *, upright: bool
) -> None:
    """Draw one value with its interval, in front of its nulls; the verdict in words where there is no value."""
    from .canvas import PALETTE

    def dots(value: float, **style: Any) -> None:
        axes.plot(*((at, value) if upright else (value, at)), linestyle="none", **style)

    for kind, null in nulls.items():
        if math.isnan(null.value):
            continue
        if kind == "fresh-init":
            if not math.isnan(null.low):
                fill = axes.fill_between if upright else axes.fill_betweenx
                fill([at - half, at + half], null.low, null.high, color=_BAND, linewidth=0, zorder=1)
            dots(null.value, marker="_" if upright else "|", color="0.55", markersize=6, zorder=2)
            continue
        dots(null.value, **_null_style(kind))
    colour, marker = _LOOKS.get(row.verdict, _FAILED)
    if math.isnan(row.value):
        where = (
            {"transform": axes.get_yaxis_transform()}
            if not upright
            else {"transform": axes.get_xaxis_transform()}
        )
        x, y = (at, 0.03) if upright else (0.02, at)
        axes.text(
            x, y, row.verdict, color=PALETTE[colour], va="bottom" if upright else "center",
            ha="center" if upright else "left", fontsize="small", **where
        )  # fmt: skip
        return
    below, above = row.error
    axes.errorbar(
        *((at, row.value) if upright else (row.value, at)),
        **{"yerr" if upright else "xerr": [[below], [above]]},
        fmt=marker,
        color=PALETTE[colour],
        markersize=5,
        capsize=2,
        elinewidth=1.4,
        zorder=5,
    )


def _null_style(kind: str) -> dict[str, Any]:
    marker = _NULL_MARKS.get(kind, (".", kind))[0]
    hollow = {"markerfacecolor": "white"} if marker == "D" else {}
    return {
        "marker": marker,
        "color": "black",
        "markersize": 5,
        "markeredgewidth": 1.1,
        "zorder": 4,
        **hollow,
    }


def _is_logarithmic(panel: _Panel, nulls: Nulls) -> bool:
    values = [r.value for r in panel.rows] + [
        n.value for r in panel.rows for n in nulls.get(r.key, {}).values()
    ]
    values = [v for v in values if not math.isnan(v)]
    return min(values) > 0 and math.log10(max(values) / min(values)) > _DECADES


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))


def _legend(rows: Sequence[ResultRow], nulls: Nulls) -> list[Any]:
    """One sign for each verdict and each null that is drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from .canvas import PALETTE

    handles: list[Any] = []
    found = {r.verdict for r in rows if not math.isnan(r.value)}
    for verdict in Verdict:
        if verdict in found:
            colour, marker = _LOOKS.get(verdict, _FAILED)
            handles.append(
                Line2D(
                    [],
                    [],
                    color=PALETTE[colour],
                    marker=marker,
                    linestyle="-",
                    markersize=5,
                    label=str(verdict),
                )
            )
    kinds = {kind for r in rows for kind, null in nulls.get(r.key, {}).items() if not math.isnan(null.value)}
    for kind in [*(k for k in _NULL_MARKS if k in kinds), *sorted(kinds - set(_NULL_MARKS))]:
        label = _NULL_MARKS.get(kind, ("", kind))[1]
        if kind == "fresh-init":
            handles.append(Patch(facecolor=_BAND, label=label))
        else:
            handles.append(Line2D([], [], linestyle="none", label=label, **_null_style(kind)))
    return handles
