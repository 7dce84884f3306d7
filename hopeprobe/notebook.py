"""What notebooks show: results with their verdicts first, then every number beside its nulls, and a bar on long work.

Pieces of HTML that need nothing else: no script, no style sheet, nothing from the network. Every text is escaped.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from html import escape
from typing import TYPE_CHECKING, Any

from hopeprobe.cells import COLUMNS, by_probe, lines, notes
from hopeprobe.stats.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from hopeprobe.results import Results

_COLOURS = {
    Verdict.LEARNED: "#02805c",
    Verdict.AT_INIT: "#0173b2",
    Verdict.INCONCLUSIVE: "#707070",
    Verdict.NOT_APPLICABLE: "#707070",
}
_FAILED = "#c04a00"
_CELL = "padding:2px 10px 2px 0;vertical-align:top"
_RESULT_TEXTS = ("checkpoint", "probe", "statistic", "layer", "component", "other nulls", "verdict")
_WORDS = {str(verdict): _COLOURS.get(verdict, _FAILED) for verdict in Verdict} | {
    "holds": "#02805c",
    "does not hold": _FAILED,
    "not resolved": "#707070",
}
_NUMBER = re.compile(
    r"$|–$|[-+−≈]?\[?\d"
)  # what a cell of a column of numbers begins with, if it is not empty
_OPEN = 40  # rows of one probe that are shown unfolded
_SECONDS = 0.2  # between two changes of a bar


def as_html(results: Results) -> str:
    """What `Results` shows in a notebook."""
    probes = by_probe(results)
    nulls = results.nulls_by_row()
    several = len({checkpoint for checkpoint, _ in probes}) > 1
    parts = [_verdicts(results, several=several)]
    if results.missing:
        items = "".join(f"<li>{escape(message)}</li>" for message in results.missing)
        parts.append(f'<div style="color:{_FAILED}">not measured:<ul style="margin:0">{items}</ul></div>')
    for (checkpoint, probe), rows in probes.items():
        title = f"{probe} · {checkpoint}, {len(rows)} rows"
        body = _table(
            COLUMNS, ([*map(escape, cells), _coloured(verdict)] for *cells, verdict in lines(rows, nulls))
        )
        said = "".join(f"<div>{escape(note)}</div>" for note in notes(rows))
        unfolded = " open" if len(rows) <= _OPEN else ""
        parts.append(
            f'<details{unfolded} style="margin-top:8px"><summary>{escape(title)}</summary>{body}'
            f'<div style="font-size:smaller">{said}</div></details>'
        )
    return f'<div class="hopeprobe-results">{"".join(parts)}</div>'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table of texts with notes above it; without rows the notes alone.

    Columns of numbers are right-aligned, but for the first, which names a line. Verdicts, also counted ("untrained 7,
    at-init 2"), and answers have their colour.
    """
    said = "".join(f"<div>{escape(note)}</div>" for note in notes)
    given = [list(cells) for cells in rows]
    columns = zip(head, *given, strict=True)
    texts = [name for i, (name, *cells) in enumerate(columns) if i == 0 or not all(map(_NUMBER.match, cells))]
    body = [[_in_colour(cell) for cell in cells] for cells in given]
    return f'<div class="hopeprobe-results">{said}{_table(head, body, texts) if body else ""}</div>'


def _in_colour(cell: str) -> str:
    """A cell's text as HTML, each counted verdict or answer in its colour if it is a list of nothing else."""
    parts = [(part, _WORDS.get(re.sub(r" \d+$", "", part))) for part in cell.split(", ")]
    if not all(colour for _, colour in parts):
        return escape(cell)
    return ", ".join(f'<span style="color:{colour}">{escape(part)}</span>' for part, colour in parts)


def _verdicts(results: Results, *, several: bool) -> str:
    """Count rows by verdict, a line a statistic."""
    counts = results.verdicts
    head = [*(counts.index.names if several else counts.index.names[1:]), *counts.columns]
    body = [
        [
            *(escape(str(name)) for name in (names if several else names[1:])),
            *(
                _coloured(verdict, str(n)) if n else ""
                for verdict, n in zip(counts.columns, line, strict=True)
            ),
        ]
        for names, line in zip(counts.index, counts.to_numpy().tolist(), strict=True)
    ]
    return _table(head, body) if body else "<p>no results</p>"


def _table(head: Sequence[str], body: Iterable[Sequence[str]], texts: Collection[str] = _RESULT_TEXTS) -> str:
    """Put cells that are HTML already under headings that are not; columns named in `texts` are left-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        aligned = (
            f'<{tag} style="{_CELL};text-align:{"left" if name in texts else "right"}">{cell}</{tag}>'
            for name, cell in zip(head, cells, strict=True)
        )
        return f"<tr>{''.join(aligned)}</tr>"

    rows = "".join(line(cells, "td") for cells in body)
    return f"<table><thead>{line([escape(name) for name in head], 'th')}</thead><tbody>{rows}</tbody></table>"


def _coloured(verdict: str, text: str | None = None) -> str:
    colour = _COLOURS.get(Verdict(verdict), _FAILED)
    return f'<span style="color:{colour}">{escape(verdict if text is None else text)}</span>'


@contextlib.contextmanager
def progress_of(
    given: Callable[[str, int, int], None] | None,
) -> Iterator[Callable[[str, int, int], None] | None]:
    """What is told of progress: what was given, else a bar in a notebook, which goes when all is done, else nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if given is not None or not hasattr(shell, "kernel"):
        yield given
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    """A progress bar in the output of a cell, drawn once there is something to tell."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < _SECONDS and done != total:
            return
        self.last = now
        import IPython.display

        far = f'value="{int(done)}" max="{int(total)}"' if total else ""
        count = f"{done}/{total}" if total else str(done)
        page = {
            "text/html": f"<div><progress {far}></progress> {escape(what)} {count}</div>",
            "text/plain": "",
        }
        if self.handle is None:
            show: Any = IPython.display.display  # not typed
            self.handle = show(page, raw=True, display_id=True)
        else:
            self.handle.update(page, raw=True)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)
