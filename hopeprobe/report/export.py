"""Figures as SVG and PNG, tables as CSV and LaTeX: what a paper takes from a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hopeprobe.cells import COLUMNS, by_probe, lines
from hopeprobe.files import write_atomically

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from hopeprobe.plots.canvas import Canvas
    from hopeprobe.results import Results


def export(
    results: Results, folder: str | os.PathLike[str], curves: Mapping[str, Canvas] | None = None
) -> list[Path]:
    """Write every figure and table into a folder, each whole or not at all; the paths, in the order of the report.

    `results.csv` and `results.nulls.csv` hold all rows; PROBE.tex, with the checkpoint's name where there are several,
    a table for `booktabs`. Raises BadInputError where one cannot be written.
    """
    from hopeprobe.plots import draw_all

    target = Path(folder)
    written = list(results.write_csv(target / "results.csv"))
    figures = {**{f"training, {name}": one for name, one in (curves or {}).items()}, **draw_all(results)}
    for name, figure in figures.items():
        for kind, content in (("svg", figure.svg()), ("png", figure.png())):
            written.append(write_atomically(target / f"{file_name(name)}.{kind}", content))
    probes = by_probe(results)
    several = len({checkpoint for checkpoint, _ in probes}) > 1
    for checkpoint, probe in probes:
        name = file_name(f"{probe}, {checkpoint}" if several else probe)
        text = as_latex(results, checkpoint, probe)
        written.append(write_atomically(target / f"{name}.tex", text.encode()))
    return written


def as_latex(results: Results, checkpoint: str, probe: str) -> str:
    """One probe's table of one checkpoint as LaTeX, for the packages `booktabs` and `longtable`."""
    import pandas as pd

    rows = by_probe(results)[checkpoint, probe]
    frame = pd.DataFrame(list(lines(rows, results.nulls_by_row())), columns=list(COLUMNS))
    frame = frame.apply(lambda column: column.map(_latex))
    frame.columns = [_latex(name) for name in COLUMNS]
    text: str = frame.to_latex(
        index=False, escape=False, longtable=True, caption=_latex(f"{probe}, {checkpoint}"),
        label=f"tab:{file_name(probe)}", column_format="lrlrrrrll",
    )  # fmt: skip
    return text


def file_name(name: str) -> str:
    """A name without what a file system, or LaTeX, could take for something else."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".pt")).strip("-.") or "unnamed"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "…": r"\ldots{}", "−": "$-$", "·": r"$\cdot$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
