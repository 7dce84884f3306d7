"""The loss curve of a training run, from its record."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from hopeprobe.documents import read_records
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.files import write_atomically

if TYPE_CHECKING:
    from .canvas import Canvas

_MOST_DRAWN = 1e30  # nats: axes cannot be divided up to the largest number there is


def plot_loss_curve(
    metrics: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    unigram: float | None = None,
    ln_vocab: float | None = None,
) -> Path:
    """Write the PNG of `draw_loss_curve`. Errors as that, and BadInputError for a file that cannot be written."""
    return write_atomically(path, draw_loss_curve(metrics, unigram, ln_vocab).png())


def draw_loss_curve(
    metrics: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    unigram: float | None = None,
    ln_vocab: float | None = None,
) -> Canvas:
    """Draw training loss and held-out loss, live and frozen, in nats a token against optimiser steps.

    metrics: a `metrics.jsonl`, or its records: `step`, `loss`, and `held_out_live`, `held_out_frozen` where
    they were measured. unigram, ln_vocab: losses drawn as horizontal lines. Raises BadInputError for a file
    that cannot be read, MeasurementError when no record has a finite loss.
    """
    records = _records(metrics) if isinstance(metrics, str | os.PathLike) else list(metrics)
    from matplotlib.ticker import MaxNLocator

    from .canvas import PALETTE, blank

    curves = (
        ("loss", "training, live", 0, "-", "", 0),
        ("held_out_live", "held-out, live", 1, "-", "o", 4),
        # Open and larger: it may lie on the point before.
        ("held_out_frozen", "held-out, frozen (no writes)", 2, "--", "s", 8),
    )
    with blank(8.5, 5.2, scale=0.9) as figure:
        axes = figure.subplots()
        for key, label, colour, style, marker, size in curves:
            points = _points(records, key)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=label,
                    color=PALETTE[colour],
                    linestyle=style,
                    marker=marker,
                    markersize=size,
                    markerfacecolor="none" if marker == "s" else PALETTE[colour],
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
                axes.axhline(value, label=f"{label} ({value:.2f})", color=PALETTE[colour], linestyle=style)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("cross-entropy, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Loss during training")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return figure


def _records(path: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    try:
        return [record for _, record in read_records(path)]
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not a record of training: {error}") from error


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """What can be drawn: a step and a finite number, whatever else a record says."""
    found = ((record.get("step"), record.get(key)) for record in records)
    return [
        (int(step), float(y))
        for step, y in found
        if _is_number(step) and _is_number(y) and abs(y) <= _MOST_DRAWN
    ]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
