"""Rows of probes over seeds: one number a statistic, step and place, its interval over runs, its nulls beside it.

The nulls are means over the same runs: of each run's own initial weights, and of the fresh re-initialisations it was
compared with, whose range is the mean of theirs.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.documents import read_document
from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically
from hopeprobe.stats import over_seeds

if TYPE_CHECKING:
    from hopeprobe.results import Results

TABLE = "probes.csv"
_PLACE = ("probe", "statistic", "step", "layer", "component", "condition", "position")


@dataclass(frozen=True)
class Probed:
    """One number over seeds. NaN for an interval of one seed, and where no run has a null of that kind."""

    name: str  # of the cells
    probe: str
    statistic: str
    step: int
    layer: int | None
    component: str
    condition: str
    position: str
    unit: str
    seeds: int
    value: float
    ci_low: float
    ci_high: float
    verdicts: str  # "learned 2, inconclusive 1"
    own_init: float
    fresh_init: float
    fresh_low: float
    fresh_high: float


@dataclass
class _Gathered:
    unit: str = ""
    values: list[float] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    nulls: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)


def over_runs(name: str, runs: Iterable[Results]) -> list[Probed]:
    """Put the results of runs that differ in their seed together; a value that is NaN counts for nothing."""
    places: dict[tuple[Any, ...], _Gathered] = {}
    for results in runs:
        nulls = results.nulls_by_row()
        for row in results.rows:
            found = places.setdefault(tuple(getattr(row, key) for key in _PLACE), _Gathered(row.unit))
            found.verdicts[str(row.verdict)] += 1
            if math.isnan(row.value):
                continue
            found.values.append(row.value)
            for kind, null in nulls.get(row.key, {}).items():
                if not math.isnan(null.value):
                    found.nulls.setdefault(kind, []).append((null.value, null.low, null.high))
    return [_together(name, place, found) for place, found in places.items() if found.values]


def _together(name: str, place: tuple[Any, ...], found: _Gathered) -> Probed:
    spread = over_seeds(found.values)
    nothing = [math.nan] * 3
    own, fresh = (
        [_mean(c) for c in zip(*found.nulls.get(kind, []), strict=True)] or nothing for kind in _KINDS
    )
    where: dict[str, Any] = dict(zip(_PLACE, place, strict=True))
    return Probed(
        name=name,
        **where,
        unit=found.unit,
        seeds=spread.n,
        value=spread.mean,
        ci_low=spread.ci_low,
        ci_high=spread.ci_high,
        verdicts=", ".join(f"{verdict} {n}" for verdict, n in found.verdicts.most_common()),
        own_init=own[0],
        fresh_init=fresh[0],
        fresh_low=fresh[1],
        fresh_high=fresh[2],
    )


_KINDS = ("own-init", "fresh-init")


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return math.fsum(given) / len(given)


def mean_of_layers(rows: Iterable[Probed]) -> list[Probed]:
    """The mean over layers, where a statistic has layers: values and nulls; its ends are the means of theirs.

    That interval is at least as wide as one of the mean itself.
    """
    together: dict[tuple[Any, ...], list[Probed]] = {}
    for row in rows:
        if row.layer is not None:
            together.setdefault((row.step, row.component, row.position), []).append(row)
    numbers = ("value", "ci_low", "ci_high", "own_init", "fresh_init", "fresh_low", "fresh_high")
    found = []
    for layers in together.values():
        means: dict[str, Any] = {
            n: math.fsum(getattr(row, n) for row in layers) / len(layers) for n in numbers
        }
        found.append(replace(layers[0], layer=None, **means))
    return found


def write_probed(rows: Iterable[Probed], folder: Path) -> Path:
    """Write `probes.csv`; numbers with six digits."""
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=[each.name for each in fields(Probed)])
    frame["layer"] = frame["layer"].astype("Int64")
    return write_atomically(
        folder / TABLE, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    )


def read_probed(path: str | os.PathLike[str]) -> list[Probed]:
    """Read `probes.csv` in a folder, or beside a file; nothing where there is none; raises BadInputError."""
    file = Path(path)
    file = file / TABLE if file.is_dir() else file.with_name(TABLE)
    if not file.exists():
        return []
    try:
        # A table has as many columns as it names: what guesses them and their kinds is led by a row of 50,000 cells.
        lines = csv.reader(io.StringIO(read_document(file), newline=""), strict=True)
        names = _columns(next(lines, []))
        return [_probed(names, cells) for cells in lines if cells]
    except (ValueError, OSError, csv.Error) as error:
        raise BadInputError(f"{file} is not a table of probes over seeds: {error}") from None


def _columns(names: list[str]) -> list[str]:
    if sorted(names) != sorted(each.name for each in fields(Probed)):
        raise ValueError("its columns are others")
    return names


def _probed(names: list[str], row: list[str]) -> Probed:
    """A row of texts as what they say; ValueError for one that does not."""
    if len(row) != len(names):
        raise ValueError(f"a row has {len(row)} cells, not {len(names)}")
    cells = dict(zip(names, row, strict=True))
    said: dict[str, Any] = dict(cells)  # what is neither of these is text
    said |= {name: _whole(name, cells[name]) for name in _WHOLE}
    said |= {name: _number(name, cells[name]) for name in _NUMBERS}
    said["layer"] = _whole("layer", cells["layer"]) if cells["layer"] else None
    return Probed(**said)


_WHOLE = ("step", "seeds")
_NUMBERS = ("value", "ci_low", "ci_high", "own_init", "fresh_init", "fresh_low", "fresh_high")


def _whole(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"{name} is {text[:40]!r}, not a whole number of 18 digits at most")
    return int(text)


def _number(name: str, text: str) -> float:
    number = r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?"
    if text in ("", "inf", "-inf"):
        return float(text or "nan")
    if not re.fullmatch(number, text) or math.isinf(float(text)):
        raise ValueError(f"{name} is {text[:40]!r}, not a number")
    return float(text)
