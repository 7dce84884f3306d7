"""Results: tidy rows with their nulls, and how they are read and written.

One `ResultRow` per (probe, statistic, checkpoint, step, layer, component, condition, position), one `NullRow`
per null of such a row. Files are written whole or not at all. JSON is strict: what was not measured (NaN) is
null.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import write_atomically
from hopeprobe.printable import no_formula
from hopeprobe.stats.verdict import CLAIMS, Verdict

if TYPE_CHECKING:
    import pandas as pd

    from hopeprobe.plots import Figures
    from hopeprobe.plots.canvas import Canvas

SCHEMA_VERSION = 2
_READABLE = (1, 2)  # version 1 has no `smallest_effect`
KEY = ("probe", "statistic", "checkpoint", "step", "layer", "component", "condition", "position")
"""The columns that together name a row, in both tables."""
_WHICH = ("path", "step", "seed", "identity")  # which checkpoint a name stands for

_RESULT_COLUMNS = (
    *("value", "unit", "ci_low", "ci_high", "n_tokens", "n_groups", "dtype"),
    *("smallest_effect", "min_detectable", "p", "q", "verdict", "note"),
)
_NULL_COLUMNS = ("null_kind", "value", "low", "high", "n")

_NAN = float("nan")
_TEXTS = (
    *("probe", "statistic", "checkpoint", "component", "condition", "position"),
    *("unit", "dtype", "note", "null_kind"),
)
_INTEGERS = ("step", "layer", "n_tokens", "n_groups", "n")
_FLOATS = ("value", "ci_low", "ci_high", "smallest_effect", "min_detectable", "p", "q", "low", "high")


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What was measured and where; None and "" mean that the column does not apply."""

    probe: str
    statistic: str
    checkpoint: str
    step: int | None = None
    layer: int | None = None
    component: str = ""
    condition: str = ""
    position: str = ""

    def __post_init__(self) -> None:
        # NumPy scalars become plain numbers, so that every row can be written as JSON.
        for name in _INTEGERS:
            if getattr(self, name, None) is not None:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        for name in _FLOATS:
            if hasattr(self, name):
                object.__setattr__(self, name, float(getattr(self, name)))
            if math.isinf(getattr(self, name, 0.0)):
                raise ValueError(f"{self}: {name} is infinite; what could not be measured is NaN")

    @property
    def key(self) -> tuple[Any, ...]:
        """The values of `KEY`."""
        return tuple(getattr(self, name) for name in KEY)


@dataclass(frozen=True, kw_only=True)
class ResultRow(_Key):
    """One number with its interval and verdict.

    `value` in `unit`, a 95 % interval over `n_groups` groups of documents (NaN where none is claimed), the
    smallest difference that is of interest, in `unit`, and the smallest found with 80 % power, p and q of the rule in
    `hopeprobe.stats.verdict`. Raises
    ValueError for a row that claims more than it measured: `learned` or `at-init` without a value, without an
    interval, or without tokens, unless it needs none: an exact number's interval is its value.
    """

    value: float
    unit: str
    n_tokens: int
    n_groups: int
    dtype: str
    verdict: Verdict
    ci_low: float = _NAN
    ci_high: float = _NAN
    smallest_effect: float = _NAN
    min_detectable: float = _NAN
    p: float = _NAN
    q: float = _NAN
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "verdict", Verdict(self.verdict))
        if self.n_tokens < 0 or self.n_groups < 0:
            raise ValueError(f"{self}: counts cannot be negative")
        if math.isnan(self.ci_low) != math.isnan(self.ci_high) or self.ci_low > self.ci_high:
            raise ValueError(f"{self}: [{self.ci_low}, {self.ci_high}] is not an interval")
        exact = self.ci_low == self.value == self.ci_high  # of weights, which no tokens would change
        nothing = math.isnan(self.value) or (self.n_tokens == 0 and not exact)
        if self.verdict in CLAIMS and (nothing or math.isnan(self.ci_low)):
            raise ValueError(f"{self}: a row that measured nothing cannot be {self.verdict}")

    def __str__(self) -> str:
        return "/".join(str(part) for part in self.key if part not in (None, ""))

    @property
    def error(self) -> tuple[float, float]:
        """How far the interval reaches below and above the value; 0 where none is claimed."""
        if math.isnan(self.ci_low):
            return 0.0, 0.0
        return max(0.0, self.value - self.ci_low), max(0.0, self.ci_high - self.value)


@dataclass(frozen=True, kw_only=True)
class NullRow(_Key):
    """One null beside a result.

    `null_kind` is own-init, fresh-init, analytic, shuffled, random-gate, unigram (the loss of token
    frequencies alone) or optimiser (the furthest that the optimiser can have moved the weights). `low` and
    `high` are its 95 % range or interval, NaN where there is none; `n` counts what it rests on: tokens, or
    re-initialisations.
    """

    null_kind: str
    value: float
    low: float = _NAN
    high: float = _NAN
    n: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The values of `KEY`, then the kind of null."""
        return (*super().key, self.null_kind)


class Address(NamedTuple):
    """What is measured and where: the key of a row, less the checkpoint and its step."""

    probe: str
    statistic: str
    layer: int | None = None
    component: str = ""
    condition: str = ""
    position: str = ""

    @classmethod
    def of(cls, row: ResultRow) -> Address:
        """Address of a result."""
        return cls(row.probe, row.statistic, row.layer, row.component, row.condition, row.position)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}"
        named = (self.probe, self.statistic, layer, self.component, self.condition, self.position)
        return "/".join(filter(None, named))


_Row = TypeVar("_Row", ResultRow, NullRow)


class Results:
    """Rows, nulls, and what they were measured on.

    `checkpoint` and `data` describe the subject and the tokens (`data` holds the token fingerprint);
    `versions` says what measured them. Raises ValueError when two rows have one key.
    """

    def __init__(
        self,
        rows: Iterable[ResultRow] = (),
        nulls: Iterable[NullRow] = (),
        *,
        checkpoint: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self._rows: dict[tuple[Any, ...], ResultRow] = {}
        self._nulls: dict[tuple[Any, ...], NullRow] = {}
        self.checkpoint = dict(checkpoint or {})
        self.data = dict(data or {})
        self.versions = dict(versions or {name: metadata.version(name) for name in ("hopeprobe", "torch")})
        self.extend(rows, nulls)

    @property
    def rows(self) -> tuple[ResultRow, ...]:
        """All results, in the order they were added."""
        return tuple(self._rows.values())

    @property
    def null_rows(self) -> tuple[NullRow, ...]:
        """All nulls, in the order they were added."""
        return tuple(self._nulls.values())

    def nulls_by_row(self) -> dict[tuple[Any, ...], dict[str, NullRow]]:
        """From the key of each row that has nulls to these, by their kind."""
        found: dict[tuple[Any, ...], dict[str, NullRow]] = {}
        for null in self.null_rows:
            found.setdefault(null.key[:-1], {})[null.null_kind] = null
        return found

    @property
    def meta(self) -> dict[str, Any]:
        """What the rows were measured on: the checkpoint and the data."""
        return {"checkpoint": self.checkpoint, "data": self.data}

    def extend(self, rows: Iterable[ResultRow] | Results, nulls: Iterable[NullRow] = ()) -> None:
        """Add rows and nulls, or all those of other results; nothing is added when a key is already taken."""
        if isinstance(rows, Results):
            new_rows: Iterable[ResultRow] = rows.rows
            nulls = (*rows.null_rows, *nulls)
        else:
            new_rows = rows
        self._rows, self._nulls = (
            _with_unique_keys(self._rows, new_rows),
            _with_unique_keys(self._nulls, nulls),
        )

    @property
    def table(self) -> pd.DataFrame:
        """The results, one row a number, one column for each field; verdicts are plain strings."""
        return _frame(ResultRow, self.rows)

    @property
    def nulls(self) -> pd.DataFrame:
        """The nulls, keyed by the same columns as the results, and `null_kind`."""
        return _frame(NullRow, self.null_rows)

    @property
    def verdicts(self) -> pd.DataFrame:
        """How many rows of each checkpoint, probe and statistic have which verdict; a column for each that occurs."""
        import pandas as pd

        counts: dict[tuple[str, str, str], Counter[Verdict]] = {}
        for row in self.rows:
            counts.setdefault((row.checkpoint, row.probe, row.statistic), Counter())[row.verdict] += 1
        found = [verdict for verdict in Verdict if any(verdict in count for count in counts.values())]
        frame: pd.DataFrame = pd.DataFrame(
            [[count[verdict] for verdict in found] for count in counts.values()],
            index=pd.MultiIndex.from_tuples(list(counts), names=["checkpoint", "probe", "statistic"]),
            columns=[str(verdict) for verdict in found],
            dtype="int64",
        )
        return frame

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """What is recorded of each checkpoint."""
        return list(self.checkpoint.get("checkpoints", [self.checkpoint]))

    @property
    def missing(self) -> list[str]:
        """What could not be measured, one sentence each."""
        return [message for one in self.checkpoints for message in one.get("missing", ())]

    @overload
    def plot(self, probe: str, checkpoint: str | None = None) -> Canvas: ...

    @overload
    def plot(self, probe: None = None, checkpoint: str | None = None) -> Figures: ...

    def plot(self, probe: str | None = None, checkpoint: str | None = None) -> Canvas | Figures:
        """Draw a probe's figure (a matplotlib figure); without a probe a dictionary with all of them.

        Errors as `hopeprobe.plots.draw`.
        """
        from hopeprobe.plots import draw, draw_all

        return draw_all(self, checkpoint) if probe is None else draw(self, probe, checkpoint)

    def __repr__(self) -> str:
        probes = ", ".join(dict.fromkeys(row.probe for row in self.rows)) or "nothing"
        missing = f"; {len(self.missing)} not measured" if self.missing else ""
        return f"<Results: {len(self.rows)} rows, {len(self.null_rows)} nulls, of {probes}{missing}>"

    def _repr_html_(self) -> str:
        from hopeprobe.notebook import as_html

        return as_html(self)

    def to_json(self) -> str:
        """One strict JSON document; raises ValueError when checkpoint or data hold an infinite number."""
        document = {
            "schema_version": SCHEMA_VERSION,
            **self.versions,
            **self.meta,
            "results": [_record(row) for row in self.rows],
            "nulls": [_record(row) for row in self.null_rows],
        }
        return json.dumps(nan_to_null(document), allow_nan=False, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `to_json` wrote. Raises BadInputError for anything else, an unknown column included."""
        try:
            document = parse_json(text)
        except ValueError as error:
            raise BadInputError(f"not a results document: {error}") from error
        if not isinstance(document, dict) or document.get("schema_version") not in _READABLE:
            known = " or ".join(map(str, _READABLE))
            raise BadInputError(f"not a results document of schema version {known}")
        try:
            made = cls(
                [_row(ResultRow, record) for record in document["results"]],
                [_row(NullRow, record) for record in document["nulls"]],
                checkpoint=document["checkpoint"],
                data=document["data"],
                versions={name: document[name] for name in ("hopeprobe", "torch")},
            )
            _check_missing(made.checkpoints)
        except KeyError as error:
            raise BadInputError(f"a results document without {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise BadInputError(f"a results document that cannot be used: {error}") from error
        return made

    @classmethod
    def read_json(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `write_json` or `hopeprobe analyze --format json` wrote. Raises BadInputError naming the file."""
        try:
            return cls.from_json(read_document(path))
        except OSError as error:
            raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise BadInputError(f"{path} is no text, and so no results") from None
        except ValueError as error:
            raise BadInputError(f"{path} is no results document: {error}") from None
        except BadInputError as error:
            raise BadInputError(f"{path}: {error}; `hopeprobe analyze --format json` writes one") from None

    def write_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json` to `path`. Raises BadInputError when that cannot be written."""
        return write_atomically(path, self.to_json().encode())

    def write_csv(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the results to `path` and the nulls beside it (`x.nulls.csv`); return both paths.

        A text that a spreadsheet would take for a formula has an apostrophe before it.
        """
        path, nulls = csv_files(path)
        for frame, file in ((self.nulls, nulls), (self.table, path)):
            texts = frame.select_dtypes("object").columns
            frame[texts] = frame[texts].map(no_formula)
            write_atomically(file, frame.to_csv(index=False, lineterminator="\n").encode())
        return path, nulls


def csv_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where `write_csv` writes the results, and the nulls."""
    results = Path(path)
    return results, results.with_name(results.name.removesuffix(".csv") + ".nulls.csv")


def joined(several: Sequence[Results]) -> Results:
    """Results of several analyses as one; data and versions are what all have in common.

    Raises BadInputError where there is none, where two of them hold a row of one checkpoint, and as `check_names`.
    """
    if not several:
        raise BadInputError("there are no results to join")
    first, *others = several
    if not others:
        return first
    each = (checkpoint for one in several for checkpoint in one.checkpoints)
    checkpoints = list({json.dumps(one, sort_keys=True, default=str): one for one in each}.values())
    check_names(checkpoints)
    data = {k: v for k, v in first.data.items() if all(other.data.get(k) == v for other in others)}
    versions = {
        k: v if all(other.versions.get(k) == v for other in others) else "several"
        for k, v in first.versions.items()
    }
    described = checkpoints[0] if len(checkpoints) == 1 else {"checkpoints": checkpoints}
    made = Results(checkpoint=described, data=data, versions=versions)
    for one in several:
        try:
            made.extend(one)
        except ValueError as error:
            raise BadInputError(f"results that cannot be one: {error}") from None
    return made


def check_names(described: Iterable[Mapping[str, Any]]) -> None:
    """Raise BadInputError where one name stands for two checkpoints: rows of both would be told as those of one.

    described: what results record of checkpoints; what a description leaves out is not compared.
    """
    named: dict[str, list[Mapping[str, Any]]] = {}
    for one in described:
        for other in named.get(str(one.get("name")), ()):
            if any(one[key] != other[key] for key in _WHICH if key in one and key in other):
                raise BadInputError(
                    f"{one['name']} is the name of two checkpoints, {_told(other)} and {_told(one)}: give both "
                    "checkpoints to one `hopeprobe analyze` or `report`, which tells their names apart, or report each "
                    "by itself"
                )
        if one.get("name") is not None:
            named.setdefault(str(one["name"]), []).append(one)


def _told(described: Mapping[str, Any]) -> str:
    what = [str(described.get("path") or "one in memory")]
    what += [f"{key} {described[key]}" for key in ("step", "seed") if described.get(key) is not None]
    what += [f"configuration {str(described['identity'])[:8]}"] if described.get("identity") else []
    return f"{what[0]} ({', '.join(what[1:])})" if what[1:] else what[0]


def _with_unique_keys(
    known: Mapping[tuple[Any, ...], _Row], rows: Iterable[_Row]
) -> dict[tuple[Any, ...], _Row]:
    merged = dict(known)
    for row in rows:
        if row.key in merged:
            raise ValueError(f"two rows have the key {row.key}")
        merged[row.key] = row
    return merged


def _columns(kind: type[_Key]) -> list[str]:
    return [*KEY, *(_NULL_COLUMNS if kind is NullRow else _RESULT_COLUMNS)]


def _record(row: _Key) -> dict[str, Any]:
    return {name: _plain(getattr(row, name)) for name in _columns(type(row))}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Verdict) else value


def _row(kind: type[_Row], record: Mapping[str, Any]) -> _Row:
    columns = _columns(kind)
    for name in record:
        if name not in columns:
            raise BadInputError(f"unknown column {name!r}{near_names(name, columns)}")
    values: dict[str, Any] = {
        name: _NAN if value is None and name in _FLOATS else value for name, value in record.items()
    }
    for name in _TEXTS:
        if not isinstance(values.get(name, ""), str):
            raise BadInputError(f"column {name!r} holds {values[name]!r:.60}, which is no text")
    for name in (*_INTEGERS, *_FLOATS):
        if isinstance(values.get(name), str | bool):
            raise BadInputError(f"column {name!r} holds {values[name]!r:.60}, which is no number")
    return kind(**values)


def _check_missing(described: Iterable[Mapping[str, Any]]) -> None:
    """Raise TypeError unless each checkpoint says what is missing, if anything, in a list of sentences."""
    for one in described:
        said = one.get("missing", [])
        if not (isinstance(said, list) and all(isinstance(sentence, str) for sentence in said)):
            raise TypeError(f"what is missing of a checkpoint is {said!r}, must be a list of sentences")


def _frame(kind: type[_Key], rows: Sequence[_Key]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame([_record(row) for row in rows], columns=_columns(kind))
    # Nullable integers, so that an absent step or layer does not turn the others into 3.0.
    types = dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_FLOATS, "float64")
    typed: pd.DataFrame = frame.astype({name: types.get(name, "object") for name in _columns(kind)})
    return typed


def nan_to_null(value: Any) -> Any:
    """Plain data for strict JSON: NaN, wherever it is, as null."""
    if isinstance(value, Mapping):
        return {str(name): nan_to_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
