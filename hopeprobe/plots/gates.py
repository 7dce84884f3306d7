"""Loss against what was written: a line a rule, and the band in which a rule is not told from a random gate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hopeprobe.results import NullRow, ResultRow

    from .canvas import Canvas

_RANDOM = "random"
_TITLES = {"all": "all writes gated"}
_MARKERS = "osD^v<>P"


def draw_budgets(
    rows: Sequence[ResultRow],
    nulls: Mapping[tuple[Any, ...], Mapping[str, NullRow]],  # noqa: ARG001 - the signature of a figure
    title: str,
) -> Canvas | None:
    """Draw, for each mechanism whose writes are gated, losses above and their differences to `random` below.

    The band above is as wide on either side of `random` as the 95 % intervals of the differences at that budget are on
    average.
    None where no rule was measured.
    """
    differences = [r for r in rows if r.statistic == "loss_difference" and not math.isnan(r.value)]
    if not differences:
        return None
    from .canvas import blank

    mechanisms = list(dict.fromkeys(r.condition for r in differences))
    rules = list(dict.fromkeys(r.component for r in differences))
    with blank(1.5 + 3.6 * len(mechanisms), 6.4) as figure:
        grid = figure.subplots(2, len(mechanisms), sharex=True, squeeze=False)
        for column, mechanism in enumerate(mechanisms):
            above, below = grid[0][column], grid[1][column]
            of = [r for r in differences if r.condition == mechanism]
            _draw_losses(above, rows, of, mechanism, rules)
            _draw_differences(below, of, rules)
            above.set_title(_TITLES.get(mechanism, f"writes of {mechanism} gated"))
            below.set_xlabel("budget: share of tokens written")
        grid[0][0].set_ylabel("loss, nats")
        grid[1][0].set_ylabel("loss − random, nats")
        figure.suptitle(f"Writing fewer tokens: {title}")
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(1 + 2 * len(mechanisms), len(handles)),
            frameon=False,
        )
        return figure


def _draw_losses(
    axes: Any,
    rows: Sequence[ResultRow],
    differences: Sequence[ResultRow],
    mechanism: str,
    rules: Sequence[str],
) -> None:
    """Losses over realised budgets, ending where everything is written; nothing written is a line across."""
    shares = {_cell(r): r.value for r in rows if r.statistic == "written"}
    losses = {_cell(r): r.value for r in rows if r.statistic == "loss" and r.position}
    ends = {rule: value for (_, rule, _), value in losses.items() if rule == "everything"}
    curves = {
        rule: sorted(
            (shares[cell], loss) for cell, loss in losses.items() if cell[0] == mechanism and cell[1] == rule
        )
        for rule in (_RANDOM, *rules)
    }
    full = [(1.0, value) for value in ends.values()]
    x, y = zip(*curves[_RANDOM], *full, strict=True)
    wide = [*_half_widths(differences), *(0.0 for _ in full)]
    if len(wide) == len(x):
        low, high = ([v + sign * w for v, w in zip(y, wide, strict=True)] for sign in (-1, 1))
        axes.fill_between(
            x, low, high, color="0.85", linewidth=0, label="not told from random, 95 %", zorder=1
        )
    axes.plot(x, y, color="0.35", linewidth=1.6, label=_RANDOM, zorder=2)
    for rule in rules:
        if curves[rule]:
            axes.plot(*zip(*curves[rule], *full, strict=True), **_look(rules, rule), label=rule)
    nothing = [v for (writes, rule, _), v in losses.items() if rule == "nothing" and writes == mechanism]
    for value in nothing:
        axes.axhline(value, color="0.35", linestyle=":", linewidth=1.2, label="nothing written")
    _budget_axis(axes, differences)


def _half_widths(differences: Sequence[ResultRow]) -> list[float]:
    """Half of the mean width of the intervals at each budget, by rising budget; none where there are no intervals."""
    wide: dict[float, list[float]] = {}
    for row in differences:
        wide.setdefault(float(row.position), []).append((row.ci_high - row.ci_low) / 2)
    means = [sum(found) / len(found) for _, found in sorted(wide.items())]
    return means if all(map(math.isfinite, means)) else []


def _draw_differences(axes: Any, rows: Sequence[ResultRow], rules: Sequence[str]) -> None:
    """Differences with 95 % intervals, rules side by side at each budget."""
    from .canvas import PALETTE

    axes.axhline(0.0, color="0.35", linewidth=1.2, zorder=1)
    here = [rule for rule in rules if any(r.component == rule for r in rows)]
    for rule in here:
        of = [r for r in rows if r.component == rule]
        beside = 1.04 ** (2 * here.index(rule) - len(here) + 1)
        look = _look(rules, rule)
        axes.errorbar(
            [float(r.position) * beside for r in of],
            [r.value for r in of],
            yerr=list(zip(*(r.error for r in of), strict=True)),
            fmt=look["marker"],
            color=PALETTE[rules.index(rule) % len(PALETTE)],
            markersize=4.5,
            elinewidth=1.3,
            zorder=3,
        )
    _budget_axis(axes, rows)


def _look(rules: Sequence[str], rule: str) -> dict[str, Any]:
    from .canvas import PALETTE

    at = rules.index(rule)
    return {
        "color": PALETTE[at % len(PALETTE)],
        "marker": _MARKERS[at % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.2,
        "zorder": 3,
    }


def _budget_axis(axes: Any, rows: Sequence[ResultRow]) -> None:
    """Budgets on a logarithmic axis, each named."""
    budgets = sorted({float(r.position) for r in rows} | {1.0})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{b:.0%}" if b * 100 == round(b * 100) else f"{b:.1%}" for b in budgets])
    axes.minorticks_off()
    axes.grid(visible=False, axis="x")


def _cell(row: ResultRow) -> tuple[str, str, str]:
    return row.condition, row.component, row.position
