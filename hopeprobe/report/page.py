"""Results as one HTML page: no network, no other file, every text escaped.

Verdicts come first, what could not be measured among them; then for each probe and checkpoint its figure, its table
with the nulls, what rows note, and the probe's own definition; last what was measured on which text with which
versions. `page.html.j2` is how that looks.
"""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from hopeprobe.cells import COLUMNS, by_probe, lines, notes
from hopeprobe.errors import MeasurementError
from hopeprobe.files import write_atomically
from hopeprobe.probes import PROBES, get_probe
from hopeprobe.stats.verdict import Verdict

from .export import file_names

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import jinja2

    from hopeprobe.plots.canvas import Canvas
    from hopeprobe.results import ResultRow, Results

OPEN = 40  # rows of one table that are shown unfolded
_TEXTS = ("statistic", "component", "other nulls", "verdict")


@dataclass(frozen=True)
class Section:
    """One probe of one checkpoint, as the template reads it."""

    anchor: str
    probe: str
    checkpoint: str
    question: str
    definition: str
    counts: Mapping[str, int]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    figure: str  # a data URI, empty where there is nothing to draw


def as_page(results: Results, title: str = "hopeprobe", curves: Mapping[str, Canvas] | None = None) -> str:
    """Make the page.

    curves: figures of training by the name of the run. Raises MeasurementError where there is nothing to report.
    """
    if not results.rows:
        raise MeasurementError("there is nothing to report: no probe gave a row")
    sections = _sections(results)
    found = {str(row.verdict) for row in results.rows}
    template = _environment().get_template("page.html.j2")
    return template.render(
        title=title,
        sections=sections,
        columns=[(name, name in _TEXTS) for name in COLUMNS],
        verdicts=[str(verdict) for verdict in Verdict if str(verdict) in found],
        several=len({section.checkpoint for section in sections}) > 1,
        untrained=sorted({row.checkpoint for row in results.rows if row.verdict is Verdict.UNTRAINED}),
        missing=results.missing,
        curves={name: _data_uri(figure) for name, figure in (curves or {}).items()},
        checkpoints=[_flat(one) for one in results.checkpoints],
        data=_flat(results.data),
        versions=results.versions,
        open_rows=OPEN,
    )


def write_page(
    results: Results,
    path: str | os.PathLike[str],
    title: str = "hopeprobe",
    curves: Mapping[str, Canvas] | None = None,
) -> Path:
    """Write `as_page`, whole or not at all. Raises BadInputError where that cannot be."""
    return write_atomically(path, as_page(results, title, curves).encode())


def _sections(results: Results) -> list[Section]:
    nulls = results.nulls_by_row()
    sections = []
    groups = by_probe(results)
    anchors = file_names(f"{probe}, {checkpoint}" for checkpoint, probe in groups)
    for (checkpoint, probe), rows in groups.items():
        known = get_probe(probe) if probe in PROBES else None
        sections.append(
            Section(
                anchors[f"{probe}, {checkpoint}"],
                probe,
                checkpoint,
                known.question if known else "",
                known.describe() if known else "",
                _counts(rows),
                list(lines(rows, nulls)),
                notes(rows),
                _figure(results, probe, checkpoint),
            )
        )
    return sections


def _counts(rows: Sequence[ResultRow]) -> dict[str, int]:
    return {str(v): n for v in Verdict if (n := sum(row.verdict is v for row in rows))}


def _figure(results: Results, probe: str, checkpoint: str) -> str:
    from hopeprobe.plots import draw

    try:
        return _data_uri(draw(results, probe, checkpoint))
    except MeasurementError:
        return ""


def _data_uri(figure: Canvas) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.png()).decode()}"


def _flat(value: Mapping[str, Any], within: str = "") -> dict[str, str]:
    """Plain data as lines of a table: nested names with dots, lists in one line, what is empty left out."""
    found: dict[str, str] = {}
    for name, one in value.items():
        if isinstance(one, dict):
            found |= _flat(one, f"{within}{name}.")
        elif isinstance(one, list | tuple):
            found[f"{within}{name}"] = ", ".join(map(str, one))
        elif one is not None:
            found[f"{within}{name}"] = str(one)
    return {name: text for name, text in found.items() if text}


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    def template(name: str) -> str | None:
        file = resources.files(__package__).joinpath(name)
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
