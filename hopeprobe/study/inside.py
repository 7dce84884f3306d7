"""`inside`: what the study printed of sections 4.2 to 4.4, and the same quantities of any model, beside their nulls.

A line is one printed figure of one source: the mean over its rows (layers and weights) with their range, or a single
row's value with its interval. `own-init` and `fresh-init` are ranges of the same rows' nulls, verdicts are counted. Of
several positions and steps the last speaks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hopeprobe.cells import NONE, number
from hopeprobe.errors import BadInputError
from hopeprobe.results import Results
from hopeprobe.stats.verdict import Verdict

from .probed import Probed
from .published import INSIDE, Published
from .table import Table

if TYPE_CHECKING:
    import pandas as pd

    from hopeprobe.results import NullRow, ResultRow

HEADER = (
    "study", "quantity", "printed", "measured by", "of", "here", "own-init", "fresh-init", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """What `ResultRow` and `Probed` have in common, with the nulls as (lowest, highest)."""

    probe: str
    statistic: str
    component: str
    condition: str
    position: str
    value: float
    interval: tuple[float, float]
    own: tuple[float, float]
    fresh: tuple[float, float]
    verdicts: Counter[str]


def inside(sources: Mapping[str, Results | Sequence[Probed]], section: str = "") -> Table:
    """Set results, or probes over seeds, beside what the study printed of a section, "4.2"; of all without one.

    A source of several checkpoints has a line for each. Raises BadInputError for a section of which nothing is known,
    and for no source.
    """
    figures = [figure for figure in INSIDE if figure.where.partition(",")[0].startswith(section)]
    if not figures:
        known = ", ".join(dict.fromkeys(figure.where.partition(",")[0] for figure in INSIDE))
        raise BadInputError(f"the study printed no such figure in section {section!r} (there are: {known})")
    if not sources:
        raise BadInputError("there is nothing to set beside the study: name at least one source")
    named = [(name, rows) for of, source in sources.items() for name, rows in _named(of, source)]
    lines, records = [], []
    for figure in figures:
        for i, (name, rows) in enumerate(named):
            chosen = _last([row for row in rows if _is_of(row, figure)])
            first = (figure.where, figure.quantity, figure.printed, f"{figure.probe}: {figure.statistic}")
            lines.append((*(first if i == 0 else [""] * 4), name, *_cells(figure, chosen)))
            records.append(_record(figure, name, chosen))
    return Table(HEADER, lines, numbers=lambda: _frame(records))


def _named(of: str, source: Results | Sequence[Probed]) -> list[tuple[str, list[_Row]]]:
    if not isinstance(source, Results):
        end = max((row.step for row in source), default=0)
        return [(of, [_probed(row) for row in source if row.step == end])]
    nulls = source.nulls_by_row()
    found: dict[str, list[_Row]] = {}
    for row in source.rows:
        found.setdefault(row.checkpoint, []).append(_measured(row, nulls.get(row.key, {})))
    if len(found) == 1:
        return [(of, rows) for rows in found.values()]
    return [(f"{of}, {checkpoint}", rows) for checkpoint, rows in found.items()] or [(of, [])]


_NOTHING = (math.nan, math.nan)


def _measured(row: ResultRow, nulls: Mapping[str, NullRow]) -> _Row:
    own, fresh = nulls.get("own-init"), nulls.get("fresh-init")
    return _Row(
        row.probe, row.statistic, row.component, row.condition, row.position, row.value, (row.ci_low, row.ci_high),
        (own.value, own.value) if own else _NOTHING,
        _ends(fresh.value, fresh.low, fresh.high) if fresh else _NOTHING,
        Counter([str(row.verdict)]),
    )  # fmt: skip


def _ends(value: float, low: float, high: float) -> tuple[float, float]:
    """The range of a null, or its value where it has none."""
    return (value, value) if math.isnan(low) else (low, high)


def _probed(row: Probed) -> _Row:
    counts: Counter[str] = Counter()
    for part in row.verdicts.split(", "):
        verdict, _, n = part.rpartition(" ")
        counts[verdict] += int(n)
    return _Row(
        row.probe, row.statistic, row.component, row.condition, row.position, row.value, (row.ci_low, row.ci_high),
        (row.own_init, row.own_init), _ends(row.fresh_init, row.fresh_low, row.fresh_high), counts,
    )  # fmt: skip


def _is_of(row: _Row, figure: Published) -> bool:
    """Is a row of this figure; one that says "n/a" is of no component."""
    if (row.probe, row.statistic) != (figure.probe, figure.statistic):
        return False
    of_all = not row.component and str(Verdict.NOT_APPLICABLE) in row.verdicts
    named = of_all or re.fullmatch(figure.component, row.component) is not None
    return named and row.condition in ("", figure.condition)


def _last(rows: Sequence[_Row]) -> list[_Row]:
    """Those at the last position: "128" of tokens read, "step 100 to 200"."""
    at = [int(end.group()) if (end := re.search(r"\d+$", row.position)) else 0 for row in rows]
    return [row for row, position in zip(rows, at, strict=True) if position == max(at)]


def _cells(figure: Published, rows: Sequence[_Row]) -> tuple[str, str, str, str]:
    if not rows:
        return NONE, NONE, NONE, "not measured"
    counts: Counter[str] = sum((row.verdicts for row in rows), Counter())
    said = ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())
    known = [row for row in rows if not math.isnan(row.value)]
    if not known:
        return NONE, NONE, NONE, said
    values = [row.value for row in known]
    shown = _shown(figure, math.fsum(values) / len(values))
    low, high = (min(values), max(values)) if len(values) > 1 else known[0].interval
    if not math.isnan(low) and {_shown(figure, low), _shown(figure, high)} != {shown}:
        ends = f"{_shown(figure, low)} to {_shown(figure, high)}"
        shown += f" ({ends})" if len(values) > 1 else f" [{ends.replace(' to', ',')}]"
    return shown, _range(figure, (row.own for row in rows)), _range(figure, (row.fresh for row in rows)), said


def _range(figure: Published, ranges: Iterable[tuple[float, float]]) -> str:
    ends = _known(end for each in ranges for end in each)
    if not ends:
        return NONE
    return " … ".join(dict.fromkeys((_shown(figure, min(ends)), _shown(figure, max(ends)))))


def _shown(figure: Published, value: float) -> str:
    if figure.statistic == "pass_rate":
        return f"{100 * value:.2f} %"
    return number(value)


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _record(figure: Published, of: str, rows: Sequence[_Row]) -> dict[str, Any]:
    values = _known(row.value for row in rows)
    record: dict[str, Any] = {"key": figure.key, "study": figure.where, "printed": figure.printed, "of": of}
    record |= {"rows": len(rows), "mean": math.fsum(values) / len(values) if values else math.nan}
    for name, ends in (
        ("", values),
        ("own_init_", _known(end for row in rows for end in row.own)),
        ("fresh_init_", _known(end for row in rows for end in row.fresh)),
    ):
        record |= {f"{name}low": min(ends, default=math.nan), f"{name}high": max(ends, default=math.nan)}
    counts: Counter[str] = sum((row.verdicts for row in rows), Counter())
    return record | {"verdicts": dict(counts)}


def _frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    frame: pd.DataFrame = pd.DataFrame(list(records))
    return frame
