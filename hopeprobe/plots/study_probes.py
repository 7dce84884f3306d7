"""Figures 1 to 3 of the study from one's own runs, each number beside what initialisation alone gives.

Values are means over seeds with their 95 % interval. The grey range is that of fresh re-initialisations (95 %), the
dotted line the runs' own initial weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from hopeprobe.errors import MeasurementError
from hopeprobe.study.probed import mean_of_layers
from hopeprobe.study.published import STUDY_PASS_RATES

if TYPE_CHECKING:
    from hopeprobe.study.probed import Probed

    from .canvas import Canvas

Rows: TypeAlias = "Sequence[Probed]"
_MARKERS = "os^Dv<>P"


def draw_cms(rows: Rows) -> Canvas:
    """Figure 1: norms of the levels, how far they move, what they share, and each layer."""
    from .canvas import blank

    norms, drift = _of(rows, "cms-dynamics", "weight_norm"), _of(rows, "cms-dynamics", "checkpoint_drift")
    shared = _of(rows, "cms-similarity", "output_cosine"), _of(rows, "cms-similarity", "delta_cosine")
    _something(norms, drift, *shared)
    with blank(11.5, 8.2) as figure:
        (a, b), (c, d) = figure.subplots(2, 2)
        _over_steps(a, mean_of_layers(norms), lambda row: row.component)
        a.set(title="(a) norm of a level's weights, mean of layers", ylabel="L2 norm")
        last = [row for row in drift if row.step == max(r.step for r in drift)]
        between = [(_end_of(row.position), row) for row in mean_of_layers(last)]
        _lines(b, between, lambda row: row.component)
        b.set(
            title="(b) drift between checkpoints, of the norm before\n(grey: between unrelated initialisations)",
            ylabel="relative to the norm",
        )
        _log(b)
        for marker, part, label in zip("os", shared, ("outputs", "what the levels add"), strict=True):
            _over_steps(c, mean_of_layers(part), lambda _, label=label: label, marker)  # type: ignore[misc]
        c.axhline(0.77, color="0.3", linewidth=1, linestyle="-.")
        c.annotate(
            "the study: 0.77",
            (0.99, 0.77),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        c.set(title="(c) cosine of fast and slow, mean of layers and tokens", ylabel="cosine")
        _by_layer(d, [row for row in norms if row.step == max(r.step for r in norms)])
        d.set(title="(d) norm of each layer's levels, last checkpoint", ylabel="L2 norm", xlabel="layer")
        for axis in (a, b, c):
            axis.set_xlabel("optimiser step")
        return _finish(figure, "CMS in training", rows)


def draw_memories(rows: Rows) -> Canvas:
    """Figure 2: how far the memories' parameters moved in training, and fast weights from meta weights in a context."""
    from .canvas import blank

    moved, drift = _of(rows, "selfmod-drift", "displacement"), _of(rows, "meta-fast", "relative_drift")
    moved = [row for row in moved if re.fullmatch(r"\w+\.w[12]", row.component)]
    end = max((int(row.position) for row in drift if row.position), default=0)
    drift = [row for row in drift if row.position == str(end) and row.component.startswith("selfmod.")]
    _something(moved, drift)
    with blank(11.5, 5.0) as figure:
        a, b = figure.subplots(1, 2)
        _over_steps(a, mean_of_layers(moved), lambda row: row.component, nulls="range")
        a.set(
            title="(a) distance of the memories' matrices from their own initial ones\n"
            "(grey: between unrelated initialisations, what the study drew)",
            ylabel="L2 distance, mean of layers",
        )
        _over_steps(b, mean_of_layers(drift), lambda row: row.component.removeprefix("selfmod."))
        b.axhline(1.0, color="0.3", linewidth=1, linestyle="-.")
        b.annotate(
            "the study: 1.0",
            (0.99, 1.0),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        b.set(
            title=f"(b) fast weights from meta weights after {end} tokens",
            ylabel="|fast − meta| / |meta|, mean of layers",
        )
        _log(b)
        for axis in (a, b):
            axis.set_xlabel("optimiser step")
        return _finish(figure, "Self-modification in training", rows)


def draw_gate(rows: Rows) -> Canvas:
    """Figure 3: the distribution of per-token loss, and how many tokens pass a gate at which threshold."""
    from .canvas import PALETTE, blank

    quantiles, passed = _of(rows, "surprise", "loss_quantile"), _of(rows, "gate-selectivity", "pass_rate")
    passed = [row for row in passed if row.component.startswith("tau=")]
    _something(quantiles, passed)
    with blank(11.5, 5.0) as figure:
        a, b = figure.subplots(1, 2)
        _over_steps(a, quantiles, lambda row: row.component)
        a.set(title="(a) quantiles of held-out per-token loss", ylabel="nats", xlabel="optimiser step")
        steps = sorted({row.step for row in passed})
        for i, step in enumerate(steps):
            of_step = sorted((_tau(row), row) for row in passed if row.step == step)
            taus, share = [tau for tau, _ in of_step], [100 * row.value for _, row in of_step]
            b.plot(
                taus,
                share,
                marker=_MARKERS[i % 8],
                markersize=4,
                color=PALETTE[i % 10],
                label=f"step {step:,}",
            )
            low, high = ([100 * getattr(row, end) for _, row in of_step] for end in ("ci_low", "ci_high"))
            b.fill_between(taus, low, high, color=PALETTE[i % 10], alpha=0.25, linewidth=0)
            if step == steps[-1]:
                own = [100 * row.own_init for _, row in of_step]
                b.plot(taus, own, ":", color="black", label="own initial weights", zorder=1)
        b.plot(list(STUDY_PASS_RATES), list(STUDY_PASS_RATES.values()), "x", color="0.3", label="the study")
        b.set_xscale("log" if passed else "linear")
        b.set(title="(b) tokens that pass the gate", ylabel="per cent", xlabel="threshold, nats")
        b.legend(fontsize="small")
        return _finish(figure, "Surprise and the gate", rows)


def _of(rows: Rows, probe: str, statistic: str) -> list[Probed]:
    return [r for r in rows if (r.probe, r.statistic) == (probe, statistic) and not math.isnan(r.value)]


def _something(*parts: Rows) -> None:
    if not any(parts):
        raise MeasurementError("no probe of this figure was run: there is nothing to draw")


def _over_steps(
    axis: Any, rows: Rows, label: Callable[[Probed], str], marker: str = "", nulls: str = "all"
) -> None:
    _lines(axis, [(row.step, row) for row in rows], label, marker, nulls)


def _lines(
    axis: Any,
    places: Sequence[tuple[int, Probed]],
    label: Callable[[Probed], str],
    marker: str = "",
    nulls: str = "all",
) -> None:
    """A line a label, each in front of its nulls."""
    from .canvas import PALETTE

    if not places:
        _nothing(axis)
        return
    labels = list(dict.fromkeys(label(row) for _, row in places))
    used = len(axis.lines)
    for i, name in enumerate(labels):
        points = sorted(((at, row) for at, row in places if label(row) == name), key=lambda point: point[0])
        at, of = [x for x, _ in points], [row for _, row in points]
        colour = PALETTE[(i + used) % len(PALETTE)]
        values = [row.value for row in of]
        errors = [[_gap(row.value, row.ci_low) for row in of], [_gap(row.ci_high, row.value) for row in of]]
        axis.errorbar(
            at, values, yerr=errors, marker=marker or _MARKERS[i % 8], markersize=4, capsize=2, color=colour,
            label=name, zorder=4,
        )  # fmt: skip
        if not any(math.isnan(row.fresh_low) for row in of):
            low, high = [row.fresh_low for row in of], [row.fresh_high for row in of]
            axis.fill_between(at, low, high, color="0.6", alpha=0.25, linewidth=0, zorder=1)
        if nulls == "all" and not any(math.isnan(row.own_init) for row in of):
            axis.plot(at, [row.own_init for row in of], ":", color=colour, zorder=2)
    axis.legend(fontsize="small", ncols=2)


def _by_layer(axis: Any, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    from .canvas import PALETTE

    if not rows:
        _nothing(axis)
        return
    for i, level in enumerate(dict.fromkeys(row.component for row in rows)):
        of = sorted(
            (row for row in rows if row.component == level and row.layer is not None),
            key=lambda r: r.layer or 0,
        )
        at = [(row.layer or 0) + 0.12 * i for row in of]
        errors = [[_gap(row.value, row.ci_low) for row in of], [_gap(row.ci_high, row.value) for row in of]]
        axis.errorbar(
            at,
            [row.value for row in of],
            yerr=errors,
            fmt=_MARKERS[i],
            capsize=3,
            color=PALETTE[i],
            label=level,
        )
        for x, row in zip(at, of, strict=True):
            if not math.isnan(row.fresh_low):
                axis.fill_between([x - 0.05, x + 0.05], row.fresh_low, row.fresh_high, color="0.6", alpha=0.4)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small")


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.5")


def _log(axis: Any) -> None:
    if axis.containers:  # an empty panel has no scale
        axis.set_yscale("log")


def _gap(high: float, low: float) -> float:
    return 0.0 if math.isnan(low) or math.isnan(high) else max(0.0, high - low)


def _end_of(position: str) -> int:
    return int(position.rsplit(" ", 1)[1])


def _tau(row: Probed) -> float:
    return float(row.component.removeprefix("tau="))


def _finish(figure: Canvas, title: str, rows: Rows) -> Canvas:
    seeds = max(row.seeds for row in rows)
    figure.suptitle(
        f"{title}: {rows[0].name}, {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals over seeds; "
        "grey: fresh initial weights; dotted: the runs' own",
        fontsize="large",
    )
    return figure
