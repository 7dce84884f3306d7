"""Results as tables: a row a number, its nulls in the same row."""

from __future__ import annotations

from rich.table import Table

from hopeprobe.cells import COLUMNS, by_probe, lines, notes
from hopeprobe.cli.terminal import shown
from hopeprobe.printable import printable
from hopeprobe.results import Results

_STYLES = {
    "learned": "green",
    "at-init": "yellow",
    "untrained": "red",
    "collapsed": "red",
    "diverged": "red",
    "no-signal": "red",
}
_FOLDED = ("statistic", "layer", "component", "other nulls")


def result_tables(results: Results) -> list[Table]:
    """One table a checkpoint and probe."""
    nulls = results.nulls_by_row()
    tables = []
    for (checkpoint, probe), rows in by_probe(results).items():
        said = notes(rows)
        table = Table(
            title=shown(f"{probe}  ·  {checkpoint}"),
            title_justify="left",
            caption=shown("\n".join(map(printable, said)), lines=True) if said else None,
            caption_justify="left",
        )
        for name in COLUMNS:
            if name in _FOLDED:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
        for *cells, verdict in lines(rows, nulls):
            table.add_row(*map(shown, cells), shown(verdict, style=_STYLES.get(verdict, "default")))
        tables.append(table)
    return tables
