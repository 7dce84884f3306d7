"""Results as tables: a row a number, its nulls in the same row."""

from __future__ import annotations

import math
import re

from rich.table import Table
from rich.text import Text

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
    for null in results.null_rows:
        nulls.setdefault(null.key[:-1], []).append(null)
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in results.rows:
        groups.setdefault((row.checkpoint, row.probe), []).append(row)
    return [_table(f"{probe}  ·  {checkpoint}", rows, nulls) for (checkpoint, probe), rows in groups.items()]


def _table(title: str, rows: list[ResultRow], nulls: dict[tuple[object, ...], list[NullRow]]) -> Table:
    table = Table(title=Text(title), title_justify="left", caption=_notes(rows), caption_justify="left")
    for name in ("statistic", "layer", "component"):
        table.add_column(name, overflow="fold")
    for name in ("value", "95 % interval", "own-init", "fresh-init"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("other nulls", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        by_kind = {n.null_kind: n for n in nulls.get(row.key, [])}
        fresh = by_kind.pop("fresh-init", None)
        own = by_kind.pop("own-init", None)
        verdict = str(row.verdict)
        table.add_row(
            row.statistic,
            "–" if row.layer is None else str(row.layer),
            " ".join(part for part in (row.component, row.position) if part) or "–",
            number(row.value) + (" nats" if row.unit == "nats" else ""),
            interval(row.ci_low, row.ci_high),
            "–" if own is None else number(own.value),
            "–" if fresh is None else _range(fresh),
            ", ".join(f"{kind} {number(null.value)}" for kind, null in by_kind.items()) or "–",
            f"[{_STYLES.get(verdict, 'default')}]{verdict}[/]",
        )
    return table


def _range(null: NullRow) -> str:
    if math.isnan(null.low):
        return number(null.value)
    return f"{number(null.low)} … {number(null.high)}"


def _notes(rows: list[ResultRow]) -> Text | None:
    notes: dict[str, int] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            note = re.sub(
                r"^(fresh-init on the first \d+ tokens), .*", r"\1", note
            )  # the value there: in the JSON
            notes[note] = notes.get(note, 0) + 1
    lines = [f"{note} ({count} rows)" if 1 < count < len(rows) else note for note, count in notes.items()]
    return Text("\n".join(lines[:6])) if lines else None
