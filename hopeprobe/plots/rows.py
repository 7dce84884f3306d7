"""Any probe's rows: each value with its interval beside its nulls, coloured by verdict.

Statistics measured at the same places stand side by side, a line of dots a place. A statistic measured along
positions has small panels instead, one for each component, the layers side by side at each position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .marks import LEGEND_COLUMNS, SIZE, Nulls, legend, mark

if TYPE_CHECKING:
    from hopeprobe.results import ResultRow

    from .canvas import Canvas

# All in inches.
WIDTH = 10.5
_HEAD, _MARGIN, _RIGHT, _GAP = 0.4, 0.12, 0.28, 0.35
_TITLE, _BELOW, _HEADING = 0.28, 0.32, 0.26  # above and below a panel, and for the name above several
_LINE, _THIN_LINE = 0.24, 0.16  # for a place; thin where there are more than _MANY
_LETTER = 0.075
_PANEL = 1.9  # wide, at least
_MARK = 0.08  # for a value among those at one position
_TICKS = 0.5  # for the numbers left of a panel
_LEGEND_LINE = 0.22

_MANY = 30
_DECADES = 3  # positive values that span more are drawn on a logarithmic axis


class _Panel(NamedTuple):
    """Rows of one statistic on one pair of axes."""

    title: str
    rows: tuple[ResultRow, ...]


class _Band(NamedTuple):
    """Panels side by side, and what they share: labels of lines, or of positions along which they are drawn.

    `columns` is for how many panels there is room, `heading` what stands above all of them.
    """

    panels: tuple[_Panel, ...]
    labels: tuple[str, ...]
    columns: int
    along: bool = False
    heading: str = ""

    @property
    def line(self) -> float:
        return _LINE if len(self.labels) <= _MANY else _THIN_LINE

    @property
    def tall(self) -> float:
        """A panel's height."""
        return 1.3 if self.along else self.line * max(len(self.labels), 1.5)

    @property
    def is_crowded(self) -> bool:
        """Whether the labels of positions are too long to stand side by side."""
        return sum(map(len, self.labels)) > 24

    @property
    def above(self) -> float:
        return _TITLE + _HEADING * bool(self.heading)

    @property
    def height(self) -> float:
        turned = 0.6 * _LETTER * max(map(len, self.labels)) if self.along and self.is_crowded else 0.0
        return self.above + self.tall + _BELOW + turned

    @property
    def left(self) -> float:
        """What stands left of the panels."""
        return _MARGIN + (_TICKS if self.along else 0.12 + _LETTER * max(map(len, self.labels)))

    @property
    def gap(self) -> float:
        return _GAP + (_TICKS if self.along else 0.0)

    @property
    def width(self) -> float:
        """What it takes at least."""
        marks = len(self.labels) * len({r.layer for r in self.panels[0].rows}) if self.along else 0
        return self.left + self.columns * (max(_PANEL, _MARK * marks) + self.gap)


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
    from .canvas import blank

    missing = [name for name in statistics if name not in drawn]
    handles = legend([r for of in drawn.values() for r in of], nulls)
    foot = _MARGIN + _LEGEND_LINE * (-(-len(handles) // LEGEND_COLUMNS) + bool(missing) + 0.5)
    shelves = _shelves([*_across(drawn), *_along(drawn)])
    heights = [max(band.height for band in shelf) for shelf in shelves]
    top = _HEAD
    with blank(WIDTH, _HEAD + sum(heights) + foot, scale=0.75, arranged=False) as figure:
        for shelf, height in zip(shelves, heights, strict=True):
            for i, band in enumerate(shelf):
                _draw_band(figure, band, nulls, i * WIDTH / len(shelf), top, WIDTH / len(shelf))
            top += height
        figure.suptitle(
            f"{rows[0].probe}: {title}",
            x=_MARGIN / WIDTH,
            y=1 - _MARGIN / figure.get_figheight(),
            weight="bold",
            ha="left",
            va="top",
        )
        if missing:
            lowest = (foot - _MARGIN) / figure.get_figheight()
            figure.text(
                _MARGIN / WIDTH, lowest, f"nothing measured: {', '.join(missing)}", va="top", wrap=True
            )
        columns = min(LEGEND_COLUMNS, len(handles))
        figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
        return figure


def _across(statistics: Mapping[str, Sequence[ResultRow]]) -> list[_Band]:
    """Bands of dots: statistics with the same places side by side."""
    together: dict[tuple[str, ...], list[_Panel]] = {}
    for name, rows in statistics.items():
        if not _has_positions(rows):
            together.setdefault(_labels(rows), []).append(_Panel(_with_unit(name, rows), tuple(rows)))
    return [band for labels, panels in together.items() for band in _filled(panels, labels)]


def _along(statistics: Mapping[str, Sequence[ResultRow]]) -> list[_Band]:
    """Bands along positions: of each statistic, a panel for each component and condition."""
    bands = []
    for name, rows in statistics.items():
        if not _has_positions(rows):
            continue
        parts: dict[tuple[str, str], list[ResultRow]] = {}
        for row in rows:
            parts.setdefault((row.component, row.condition), []).append(row)
        repeated = len({component for component, _ in parts}) < len(parts)
        panels = [
            _Panel(_join(component, condition if repeated else ""), tuple(of))
            for (component, condition), of in parts.items()
        ]
        found = _filled(panels, tuple(dict.fromkeys(r.position for r in rows)), along=True)
        bands += [found[0]._replace(heading=_with_unit(name, rows)), *found[1:]]
    return bands


def _filled(panels: Sequence[_Panel], labels: tuple[str, ...], *, along: bool = False) -> list[_Band]:
    """As many panels to a band as the width allows, spread evenly."""
    one = _Band(tuple(panels[:1]), labels, 1, along)
    widest = max(one.width - one.left, one.gap + _LETTER * max(len(panel.title) for panel in panels))
    bands = -(-len(panels) // max(1, int((WIDTH - one.left) / widest)))
    columns = -(-len(panels) // bands)
    return [
        _Band(tuple(panels[i : i + columns]), labels, columns, along) for i in range(0, len(panels), columns)
    ]


def _shelves(bands: Sequence[_Band]) -> list[list[_Band]]:
    """Put two narrow bands that follow each other beside each other."""
    shelves: list[list[_Band]] = []
    for band in bands:
        last = shelves[-1] if shelves else []
        if len(last) == 1 and all(one.width <= WIDTH / 2 for one in (*last, band)):
            last.append(band)
        else:
            shelves.append([band])
    return shelves


def _has_positions(rows: Sequence[ResultRow]) -> bool:
    return len({r.position for r in rows}) > 1


def _labels(rows: Sequence[ResultRow]) -> tuple[str, ...]:
    """Name each row by its layer and component, and by its condition where that is not enough."""
    short = [_join(f"layer {r.layer}" if r.layer is not None else "", r.component) for r in rows]
    if len(set(short)) == len(short):
        return tuple(short)
    return tuple(_join(label, r.condition) for label, r in zip(short, rows, strict=True))


def _with_unit(statistic: str, rows: Sequence[ResultRow]) -> str:
    return statistic if rows[0].unit == "1" else f"{statistic}, {rows[0].unit}"


def _join(*words: str) -> str:
    return " · ".join(filter(None, words))


def _draw_band(figure: Canvas, band: _Band, nulls: Nulls, left: float, top: float, width: float) -> None:
    """Draw panels side by side in a box given in inches from the figure's left and top."""
    height = figure.get_figheight()
    wide = (width - band.left - (band.columns - 1) * band.gap - _RIGHT) / band.columns
    if band.heading:
        figure.text(
            (left + _MARGIN) / WIDTH,
            1 - (top + 0.06) / height,
            band.heading,
            ha="left",
            va="top",
            fontsize="large",
        )
    first = None
    for i, panel in enumerate(band.panels):
        x, y = left + band.left + i * (wide + band.gap), height - top - band.above - band.tall
        place = (x / WIDTH, y / height, wide / WIDTH, band.tall / height)
        axes = figure.add_axes(place, sharey=None if band.along else first)
        first = first or axes
        axes.set_title(panel.title, loc="left", fontsize="medium", pad=4)
        axes.tick_params(pad=2)
        axes.use_sticky_edges = False  # the range of a null is no edge of the panel
        (_draw_along if band.along else _draw_across)(axes, panel, band, nulls)
        if _is_logarithmic(panel, nulls):
            (axes.set_yscale if band.along else axes.set_xscale)("log")
        if not band.along and axes is not first:
            axes.tick_params(labelleft=False)


def _draw_across(axes: Any, panel: _Panel, band: _Band, nulls: Nulls) -> None:
    """Draw values from left to right, a line a place, the first on top."""
    from matplotlib.ticker import MaxNLocator

    mark(axes, [(float(at), row) for at, row in enumerate(panel.rows)], nulls, 0.64, upright=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))
    lines = len(band.labels)
    axes.set_yticks(range(lines), band.labels, fontsize="medium" if band.line == _LINE else "small")
    beyond = 0.5 if lines > 1 else 0.75
    axes.set_ylim(lines - 1 + beyond, -beyond)
    axes.grid(axis="y", color="0.95")
    axes.margins(x=0.08)


def _draw_along(axes: Any, panel: _Panel, band: _Band, nulls: Nulls) -> None:
    """Draw values upwards, positions from left to right, the layers side by side at each and joined by a line."""
    layers = list(dict.fromkeys(r.layer for r in panel.rows))
    spread = 0.8 / len(layers)
    size = SIZE if len(layers) * len(band.labels) * band.columns <= _MANY else 0.7 * SIZE
    for i, layer in enumerate(layers):
        offset = (i - (len(layers) - 1) / 2) * spread
        points = [(band.labels.index(r.position) + offset, r) for r in panel.rows if r.layer == layer]
        axes.plot([x for x, _ in points], [r.value for _, r in points], color="0.6", linewidth=0.8, zorder=3)
        mark(axes, points, nulls, 0.8 * spread, upright=True, size=size)
        measured = [(x, r.value) for x, r in points if not math.isnan(r.value)]
        if len(layers) > 1 and measured:
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
            axes.annotate(str(layer), measured[-1], **beside)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if band.is_crowded else {}
    axes.set_xticks(range(len(band.labels)), band.labels, **turned)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, len(band.labels) - 0.3)
    axes.margins(y=0.1)


def _is_logarithmic(panel: _Panel, nulls: Nulls) -> bool:
    values = [r.value for r in panel.rows] + [
        n.value for r in panel.rows for n in nulls.get(r.key, {}).values()
    ]
    values = [v for v in values if not math.isnan(v)]
    return bool(values) and min(values) > 0 and math.log10(max(values) / min(values)) > _DECADES
