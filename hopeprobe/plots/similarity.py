"""The similarity of CMS levels by layer, beside what initialisation alone gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hopeprobe.results import NullRow, ResultRow

    from .canvas import Canvas

_CHECKPOINT = "checkpoint"
_MEASURES = (("cosine", "cosine"), ("cka", "linear CKA"), ("cca", "CCA"))
_KINDS = (("output", "Outputs"), ("delta", "What each level adds"))
_NULLS = {
    # kind: label, colour of seaborn's colourblind palette, line style
    "own-init": ("own initial weights", 1, "--"),
    "fresh-init": ("fresh initial weights, 95 % range", 7, "-"),
    "shuffled": ("tokens shuffled", 2, ":"),
    "analytic": ("independent levels", 3, "-."),
}


def draw_similarity(
    rows: Sequence[ResultRow], nulls: Mapping[tuple[Any, ...], Mapping[str, NullRow]], title: str
) -> Canvas | None:
    """Draw cosine, CKA and canonical correlation, of outputs and of what each level adds, with 95 % intervals.

    None where no similarity was measured.
    """
    statistics = {f"{kind}_{measure}" for kind, _ in _KINDS for measure, _ in _MEASURES}
    rows = [r for r in rows if r.statistic in statistics and not math.isnan(r.value)]
    if not rows:
        return None
    from .canvas import blank

    measures = [(name, label) for name, label in _MEASURES if any(r.statistic.endswith(name) for r in rows)]
    with blank(10.5, 1.0 + 2.9 * len(measures)) as figure:
        grid = figure.subplots(len(measures), 2, sharex=True, sharey="row", squeeze=False)
        for axes_row, (measure, label) in zip(grid, measures, strict=True):
            axes_row[0].set_ylabel(label)
            for axes, (kind, _) in zip(axes_row, _KINDS, strict=True):
                _draw_panel(axes, [r for r in rows if r.statistic == f"{kind}_{measure}"], nulls)
        for column, (_, heading) in enumerate(_KINDS):
            grid[0][column].set_title(heading)
            grid[-1][column].set_xlabel("layer")
        figure.suptitle(f"Similarity of CMS levels: {title}")
        # The measurement first, then its nulls, each once.
        labelled = [
            pair for axes in grid.flat for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        ]
        labelled.sort(key=lambda pair: not pair[1].startswith(_CHECKPOINT))
        handles = {label: handle for handle, label in labelled}
        columns = min(3, len(handles))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        return figure


def _draw_panel(
    axes: Any, rows: Sequence[ResultRow], nulls: Mapping[tuple[Any, ...], Mapping[str, NullRow]]
) -> None:
    """Pairs stand side by side at each layer; each null is a mark across its pair's place."""
    from .canvas import PALETTE

    pairs = list(dict.fromkeys(r.component for r in rows))
    spread = 0.8 / max(len(pairs), 1)
    for i, pair in enumerate(pairs):
        offset = (i - (len(pairs) - 1) / 2) * spread
        measured = [(r, r.layer + offset) for r in rows if r.component == pair and r.layer is not None]
        for row, x in measured:
            for kind, (label, colour, style) in _NULLS.items():
                null = nulls.get(row.key, {}).get(kind)
                if null is None or math.isnan(null.value):
                    continue
                left, right = x - 0.45 * spread, x + 0.45 * spread
                if kind == "fresh-init" and not math.isnan(null.low):
                    axes.fill_between(
                        [left, right],
                        null.low,
                        null.high,
                        color=PALETTE[colour],
                        alpha=0.3,
                        linewidth=0,
                        label=label,
                    )
                axes.hlines(
                    null.value,
                    left,
                    right,
                    colors=[PALETTE[colour]],
                    linestyles=style,
                    linewidth=1.6,
                    label="_" if kind == "fresh-init" else label,
                )
        axes.errorbar(
            [x for _, x in measured],
            [r.value for r, _ in measured],
            yerr=list(zip(*(r.error for r, _ in measured), strict=True)),
            fmt="osD^v<>"[i % 7],
            color=PALETTE[0],
            markersize=6,
            capsize=4,
            zorder=5,
            label=f"{_CHECKPOINT}, {pair.replace('|', ' – ')}, 95 % interval",
        )
    axes.set_xticks(sorted({r.layer for r in rows if r.layer is not None}))
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.1)
