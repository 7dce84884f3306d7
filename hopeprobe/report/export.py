"""Figures as SVG and PNG, tables as CSV and LaTeX: what a paper takes from a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hopeprobe.cells import COLUMNS, by_probe, lines
from hopeprobe.files import write_atomically
from hopeprobe.printable import printable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from hopeprobe.plots.canvas import Canvas
    from hopeprobe.results import Results


def export(
    results: Results, folder: str | os.PathLike[str], curves: Mapping[str, Canvas] | None = None
) -> list[Path]:
    """Write every figure and table into a folder, each whole or not at all; the paths, in the order of the report.

    `results.csv` and `results.nulls.csv` hold all rows; PROBE.tex, with the checkpoint's name where there are several,
    a table for `booktabs`, labelled `tab:` and the file's name. Raises BadInputError where one cannot be written.
    """
    from hopeprobe.plots import draw_all

    target = Path(folder)
    written = list(results.write_csv(target / "results.csv"))
    figures = {**{f"training, {name}": one for name, one in (curves or {}).items()}, **draw_all(results)}
    names = file_names(figures)
    for name, figure in figures.items():
        for kind, content in (("svg", figure.svg()), ("png", figure.png())):
            written.append(write_atomically(target / f"{names[name]}.{kind}", content))
    for (checkpoint, probe), name in _table_names(results).items():
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
        label=f"tab:{_table_names(results)[checkpoint, probe]}", column_format="lrlrrrrll",
    )  # fmt: skip
    return text


_MOST_BYTES = 150  # of a name: file systems take 255, and partial files and suffixes are longer


def file_name(name: str) -> str:
    """A name without what a file system, or LaTeX, could take for something else."""
    plain = re.sub(r"[^\w.-]+", "-", name.removesuffix(".pt")).strip("-.")
    while len(plain.encode()) > _MOST_BYTES:
        plain = plain[:-1]
    return plain or "unnamed"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """`file_name` of each, none twice even where case does not count: the second of one name ends in -2."""
    wanted = {name: file_name(name) for name in names}
    first = {name.casefold() for name in wanted.values()}
    taken: set[str] = set()
    found = {}
    for name, chosen in wanted.items():
        number = 2
        while chosen.casefold() in taken or (number > 2 and chosen.casefold() in first):
            chosen = f"{wanted[name]}-{number}"
            number += 1
        taken.add(chosen.casefold())
        found[name] = chosen
    return found


def _table_names(results: Results) -> dict[tuple[str, str], str]:
    """What each table's file and label are called: by its probe, and its checkpoint where there are several."""
    tables = list(by_probe(results))
    several = len({checkpoint for checkpoint, _ in tables}) > 1
    named = {(c, probe): f"{probe}, {c}" if several else probe for c, probe in tables}
    files = file_names(named.values())
    return {table: files[name] for table, name in named.items()}


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "…": r"\ldots{}", "−": "$-$", "·": r"$\cdot$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in printable(text))
