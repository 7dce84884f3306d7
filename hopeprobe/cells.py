"""Rows in words: what a table of results says, in a terminal and in a notebook."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopeprobe.results import NullRow, ResultRow, Results

COLUMNS = (
    *(
        "statistic",
        "layer",
        "component",
        "value",
        "95 % interval",
        "own-init",
        "fresh-init",
        "other nulls",
        "verdict",
    ),
)
NONE = "–"
_NOTES = 6


def number(value: float | None) -> str:
    """Four significant digits; a dash where nothing was measured."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.4g}"


def interval(row: ResultRow) -> str:
    """[low, high], a dash where none is claimed, or that no tokens would change the number."""
    if math.isnan(row.ci_low):
        return NONE
    return f"[{number(row.ci_low)}, {number(row.ci_high)}]" if row.n_tokens else "exact"


def by_probe(results: Results) -> dict[tuple[str, str], list[ResultRow]]:
    """Rows of each checkpoint and probe, in their order."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in results.rows:
        groups.setdefault((row.checkpoint, row.probe), []).append(row)
    return groups


def lines(
    rows: Sequence[ResultRow], nulls: Mapping[tuple[Any, ...], Mapping[str, NullRow]]
) -> Iterator[tuple[str, ...]]:
    """The cells of each row, under `COLUMNS`; the condition where nothing else tells two rows apart."""
    places = Counter(map(_place, rows))
    for row in rows:
        others = dict(nulls.get(row.key, {}))
        own, fresh = others.pop("own-init", None), others.pop("fresh-init", None)
        condition = row.condition if places[_place(row)] > 1 else ""
        yield (
            row.statistic,
            NONE if row.layer is None else str(row.layer),
            " ".join(filter(None, (row.component, row.position, condition))) or NONE,
            number(row.value) + ("" if row.unit == "1" or math.isnan(row.value) else f" {row.unit}"),
            interval(row),
            NONE if own is None else number(own.value),
            NONE if fresh is None else _range(fresh),
            ", ".join(f"{kind} {number(null.value)}" for kind, null in others.items()) or NONE,
            str(row.verdict),
        )


def notes(rows: Sequence[ResultRow]) -> list[str]:
    """What rows note, each once, with how many do; those that most rows share first."""
    found: Counter[str] = Counter()
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            # The value on the first tokens differs by row: it is in the row's own note.
            found[re.sub(r"^(fresh-init on the first \d+ tokens), .*", r"\1", note)] += 1
    said = [f"{note} ({n} rows)" if 1 < n < len(rows) else note for note, n in found.most_common()]
    return said if len(said) <= _NOTES else [*said[:_NOTES], f"and {len(said) - _NOTES} more notes"]


def _place(row: ResultRow) -> tuple[str, int | None, str, str]:
    return row.statistic, row.layer, row.component, row.position


def _range(null: NullRow) -> str:
    if math.isnan(null.low):
        return number(null.value)
    return f"{number(null.low)} … {number(null.high)}"
