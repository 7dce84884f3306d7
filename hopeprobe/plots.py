"""Figures from results and training records, written as PNG files.

seaborn and matplotlib load when a figure is first drawn. Figures are made without pyplot: no window, no global
state, and the backend does not matter.
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hopeprobe.results import NullRow, ResultRow, Results

DPI = 150

_CHECKPOINT = "checkpoint"
_PANELS = (
    ("output_cosine", "Outputs: cosine"),
    ("delta_cosine", "What each level adds: cosine"),
    ("output_cka", "Outputs: linear CKA"),
    ("delta_cka", "What each level adds: linear CKA"),
)
_NULLS = {
    # kind: label, colour of seaborn's colourblind palette, line style
    "own-init": ("own initial weights", 1, "--"),
    "fresh-init": ("fresh initial weights, 95 % range", 7, "-"),
    "shuffled": ("tokens shuffled", 2, ":"),
    "analytic": ("independent levels", 3, "-."),
}


def plot_similarity(results: Results, path: str | os.PathLike[str], checkpoint: str | None = None) -> Path:
    """Draw the similarity of CMS levels by layer, with 95 % intervals, beside its nulls.

    Four panels: cosine and CKA, of outputs and of what each level adds. checkpoint: which one, when the
    results hold several. Raises MeasurementError when there is no such measurement to draw, BadInputError
    for an unknown checkpoint or a file that cannot be written.
    """
    rows = [r for r in results.rows if r.probe == "cms-similarity" and not math.isnan(r.value)]
    known = list(dict.fromkeys(r.checkpoint for r in rows))
    if checkpoint is None and len(known) > 1:
        raise BadInputError(f"the results hold several checkpoints, name one: {', '.join(known)}")
    if checkpoint is not None and checkpoint not in known:
        raise BadInputError(f"no similarity was measured of {checkpoint!r} (there is: {', '.join(known)})")
    statistics = [statistic for statistic, _ in _PANELS]
    chosen = checkpoint or next(iter(known), "")
    rows = [r for r in rows if r.checkpoint == chosen and r.statistic in statistics]
    if not rows:
        raise MeasurementError("these results hold no similarity of CMS levels to draw")
    import seaborn as sns
    from matplotlib.figure import Figure

    nulls = {
        (n.statistic, n.layer, n.component, n.null_kind): n
        for n in results.null_rows
        if n.checkpoint == chosen
    }
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.85):
        figure = Figure(figsize=(10.5, 7.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).T.ravel()
        for axes, (statistic, title) in zip(
            (panels[0], panels[2], panels[1], panels[3]), _PANELS, strict=True
        ):
            drawn = [r for r in rows if r.statistic == statistic]
            _draw_panel(axes, drawn, nulls, sns.color_palette("colorblind"))
            axes.set_title(title)
            axes.set_ylabel("CKA" if statistic.endswith("cka") else "cosine")
        for axes in (panels[1], panels[3]):
            axes.set_xlabel("layer")
        step = f", step {rows[0].step}" if rows[0].step is not None else ""
        figure.suptitle(f"Similarity of CMS levels: {chosen}{step}")
        # The measurement first, then its nulls, each once.
        labelled = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        labelled.sort(key=lambda pair: not pair[1].startswith(_CHECKPOINT))
        handles = {label: handle for handle, label in labelled}
        columns = min(3, len(handles))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        return _save(figure, path)


def plot_loss_curve(
    metrics: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    unigram: float | None = None,
    ln_vocab: float | None = None,
) -> Path:
    """Draw training loss and held-out loss, live and frozen, in nats a token against optimiser steps.

    metrics: a `metrics.jsonl`, or its records: `step`, `loss`, and `held_out_live`, `held_out_frozen` where
    they were measured. unigram, ln_vocab: losses drawn as horizontal lines. Raises BadInputError for a file
    that cannot be read or written, MeasurementError when no record has a finite loss.
    """
    records = _records(metrics) if isinstance(metrics, str | os.PathLike) else list(metrics)
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = (
        ("loss", "training, live", 0, "-", ""),
        ("held_out_live", "held-out, live", 1, "-", "o"),
        ("held_out_frozen", "held-out, frozen (no writes)", 2, "--", "s"),
    )
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        palette = sns.color_palette("colorblind")
        for key, label, colour, style, marker in curves:
            points = _points(records, key)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=label,
                    color=palette[colour],
                    linestyle=style,
                    marker=marker,
                    markersize=4,
                    linewidth=1.0 if key == "loss" else 1.8,
                    alpha=0.6 if key == "loss" else 1.0,
                )
        if not axes.lines:
            raise MeasurementError("no record of this run has a finite loss: there is nothing to draw")
        for value, label, colour, style in (
            (ln_vocab, "ln V: every token equally likely", 7, ":"),
            (unigram, "unigram: token frequencies alone", 3, "-."),
        ):
            if value is not None:
                axes.axhline(value, label=f"{label} ({value:.2f})", color=palette[colour], linestyle=style)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("cross-entropy, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Loss during training")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return _save(figure, path)


def _draw_panel(
    axes: Any,
    rows: Sequence[ResultRow],
    nulls: Mapping[tuple[str, int | None, str, str], NullRow],
    palette: Sequence[Any],
) -> None:
    """Pairs stand side by side at each layer; each null is a mark across its pair's place."""
    pairs = list(dict.fromkeys(r.component for r in rows))
    layers = sorted({r.layer for r in rows if r.layer is not None})
    spread = 0.8 / max(len(pairs), 1)
    markers = "osD^v<>"
    for i, pair in enumerate(pairs):
        offset = (i - (len(pairs) - 1) / 2) * spread
        for kind, (label, colour, style) in _NULLS.items():
            found = [
                (r, nulls[key]) for r in rows if r.component == pair and (key := (*_at(r), kind)) in nulls
            ]
            for row, null in found:
                if math.isnan(null.value) or row.layer is None:
                    continue
                left, right = row.layer + offset - 0.45 * spread, row.layer + offset + 0.45 * spread
                if kind == "fresh-init" and not math.isnan(null.low):
                    axes.fill_between(
                        [left, right],
                        null.low,
                        null.high,
                        color=palette[colour],
                        alpha=0.3,
                        linewidth=0,
                        label=label,
                    )
                axes.hlines(
                    null.value,
                    left,
                    right,
                    colors=[palette[colour]],
                    linestyles=style,
                    linewidth=1.6,
                    label="_" if kind == "fresh-init" else label,
                )
        measured = [r for r in rows if r.component == pair and r.layer is not None]
        error = [
            [max(0.0, r.value - r.ci_low) if not math.isnan(r.ci_low) else 0.0 for r in measured],
            [max(0.0, r.ci_high - r.value) if not math.isnan(r.ci_high) else 0.0 for r in measured],
        ]
        axes.errorbar(
            [r.layer + offset for r in measured if r.layer is not None],
            [r.value for r in measured],
            yerr=error,
            fmt=markers[i % len(markers)],
            color=palette[0],
            markersize=6,
            capsize=4,
            zorder=5,
            label=f"{_CHECKPOINT}, {pair.replace('|', ' – ')}, 95 % interval",
        )
    axes.set_xticks(layers)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.1)


def _at(row: ResultRow) -> tuple[str, int | None, str]:
    return row.statistic, row.layer, row.component


def _records(path: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        # The last line may be cut off where a run was killed.
        return [json.loads(line) for line in lines if line.endswith("}")]
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not a record of training: {error}") from error


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = ((record.get("step"), record.get(key)) for record in records)
    return [
        (int(step), float(y)) for step, y in found if step is not None and y is not None and math.isfinite(y)
    ]


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write the PNG whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, dpi=DPI, format="png")
    return write_atomically(path, image.getvalue())
