"""Results as tables: a row a number, its nulls in the same row."""

from __future__ import annotations

import math

from rich.table import Table

from hopeprobe.cli.terminal import interval, number
from hopeprobe.results import NullRow, ResultRow, Results

_STYLES = {
    "learned": "green",
    "at-init": "yellow",
    "untrained": "red",
    "collapsed": "red",
    "diverged": "red",
    "no-signal": "red",
}


def result_tables(results: Results) -> list[Table]:
    """One table a checkpoint and probe."""
    nulls: dict[tuple[object, ...], list[NullRow]] = {}
    for null in results.nulls:
        nulls.setdefault(null.key[:-1], []).append(null)
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in results.rows:
        groups.setdefault((row.checkpoint, row.probe), []).append(row)
    return [_table(f"{probe}  ·  {checkpoint}", rows, nulls) for (checkpoint, probe), rows in groups.items()]


def _table(title: str, rows: list[ResultRow], nulls: dict[tuple[object, ...], list[NullRow]]) -> Table:
    kinds = list(dict.fromkeys(n.null_kind for row in rows for n in nulls.get(row.key, [])))
    table = Table(title=title, title_justify="left", caption=_notes(rows), caption_justify="left")
    for name in ("statistic", "layer", "component"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "95 % interval", *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        by_kind = {n.null_kind: n for n in nulls.get(row.key, [])}
        verdict = str(row.verdict)
        where = " ".join(part for part in (row.component, row.condition, row.position) if part)
        table.add_row(
            row.statistic,
            "–" if row.layer is None else str(row.layer),
            where or "–",
            number(row.value) + (" nats" if row.unit == "nats" else ""),
            interval(row.ci_low, row.ci_high),
            *(_null(by_kind.get(kind)) for kind in kinds),
            f"[{_STYLES.get(verdict, 'default')}]{verdict}[/]",
        )
    return table


def _null(null: NullRow | None) -> str:
    if null is None:
        return "–"
    if math.isnan(null.low) or null.null_kind == "analytic":
        return number(null.value)
    return f"{number(null.value)} {interval(null.low, null.high)}"


def _notes(rows: list[ResultRow]) -> str | None:
    notes: dict[str, int] = {}
    for row in rows:
        if row.note:
            notes[row.note] = notes.get(row.note, 0) + 1
    lines = [f"{note} ({count} rows)" if count > 1 else note for note, count in notes.items()]
    return "\n".join(lines[:6]) or None
