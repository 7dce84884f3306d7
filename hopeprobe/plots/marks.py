"""The marks of a value and of its nulls: colour and shape say the verdict, and which null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from hopeprobe.stats.verdict import Verdict

if TYPE_CHECKING:
    from hopeprobe.results import NullRow, ResultRow

Nulls: TypeAlias = "Mapping[tuple[Any, ...], Mapping[str, NullRow]]"
"""Nulls of rows by the keys of these, and by their kind."""

LEGEND_COLUMNS = 4
SIZE = 5.0  # points

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


def mark(
    axes: Any,
    rows: Sequence[tuple[float, ResultRow]],
    nulls: Nulls,
    wide: float,
    *,
    upright: bool,
    size: float = SIZE,
) -> None:
    """Draw values with their intervals in front of their nulls, each at its place.

    The verdict in words where there is no value. wide: how much of a place the range of a null takes; size: of
    marks, in points.
    """
    from .canvas import PALETTE

    def ordered(at: Any, value: Any) -> tuple[Any, Any]:
        return (at, value) if upright else (value, at)

    beside: dict[str, list[tuple[float, NullRow]]] = {}
    for at, row in rows:
        for kind, null in nulls.get(row.key, {}).items():
            if not math.isnan(null.value):
                beside.setdefault(kind, []).append((at, null))
    for kind, found in beside.items():
        style = _null_style(kind, size)
        if kind == "fresh-init":
            style = {
                "marker": "_" if upright else "|",
                "color": "0.55",
                "markersize": 1.2 * size,
                "zorder": 2,
            }
            ranges = [
                (at, null.high - null.low, wide, null.low) for at, null in found if not math.isnan(null.low)
            ]
            if ranges:
                bars = axes.bar if upright else axes.barh
                bars(*map(list, zip(*ranges, strict=True)), color=_BAND, linewidth=0, zorder=1)
        places, values = [at for at, _ in found], [null.value for _, null in found]
        axes.plot(*ordered(places, values), linestyle="none", **style)

    for verdict in dict.fromkeys(row.verdict for _, row in rows):
        valued = [(at, r) for at, r in rows if r.verdict is verdict and not math.isnan(r.value)]
        if valued:
            colour, marker = _LOOKS.get(verdict, _FAILED)
            axes.errorbar(
                *ordered([at for at, _ in valued], [r.value for _, r in valued]),
                **{"yerr" if upright else "xerr": list(zip(*(r.error for _, r in valued), strict=True))},
                fmt=marker,
                color=PALETTE[colour],
                markersize=size,
                capsize=0.4 * size,
                elinewidth=0.28 * size,
                zorder=5,
            )
    for at, row in rows:
        if math.isnan(row.value):
            axes.text(
                *ordered(at, 0.02),
                str(row.verdict),
                color=PALETTE[_LOOKS.get(row.verdict, _FAILED)[0]],
                fontsize="small",
                ha="center" if upright else "left",
                va="bottom" if upright else "center",
                transform=axes.get_xaxis_transform() if upright else axes.get_yaxis_transform(),
            )


def _null_style(kind: str, size: float = SIZE) -> dict[str, Any]:
    marker = _NULL_MARKS.get(kind, (".", kind))[0]
    # The hollow one is a ring around the value where the two are the same.
    hollow = {"markerfacecolor": "white", "markersize": 1.2 * size} if marker == "D" else {}
    line = {"color": "black", "markersize": size, "markeredgewidth": 0.22 * size, "zorder": 4}
    return {"marker": marker, **line, **hollow}


def legend(rows: Sequence[ResultRow], nulls: Nulls) -> list[Any]:
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
                    markersize=SIZE,
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
