"""A baseline: numbers of one checkpoint or of several seeds', what they were measured on, and what may change.

Its file is one JSON document, `schema_version` 1, meant to be committed and read: a tolerance may be edited by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import BadInputError, near_names
from hopeprobe.files import write_atomically
from hopeprobe.results import Address, nan_to_null
from hopeprobe.stats.drift import HEAVY, Drift, apart, between_seeds, on_same_tokens
from hopeprobe.stats.verdict import Verdict
from hopeprobe.subject import GateRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

KIND = "hopeprobe-baseline"
SCHEMA_VERSION = 1
_MAKES_ONE = "`hopeprobe baseline` makes one"
DEAD = frozenset({Verdict.COLLAPSED, Verdict.DIVERGED, Verdict.NO_SIGNAL, Verdict.UNTRAINED})
"""Verdicts of what does not work: a number that keeps one is as it was, and no sign that a mechanism works."""
_TELLING = 10  # seeds, of which heavy tails show in the baseline
_FEW = (
    "tails as heavy as those of Student's t of 3 degrees of freedom, which so few may not show, make it four"
)


@dataclass(frozen=True)
class Settings:
    """How a baseline was measured, and every check of it is: arguments of `hopeprobe.analyze`."""

    probes: tuple[str, ...]
    data: tuple[str, ...]
    tokens: int | None
    split: str = "heldout"
    carry: str = "window"
    gate: GateRule | None = None


@dataclass(frozen=True)
class Tracked:
    """One number of a baseline.

    Attributes:
        address: what and where.
        unit: of values, noise and tolerance.
        values: one a checkpoint, all finite.
        verdicts: of these.
        ci_low, ci_high: 95 % intervals of the values over documents; NaN where none is claimed.
        smallest_effect: the smallest difference that its probe holds to be of interest.
        noise: what arithmetic in another order can change; between seeds, the least spread that it can have.
        tolerance: what may change without being a regression; the file may say another.

    """

    address: Address
    unit: str
    values: tuple[float, ...]
    verdicts: tuple[Verdict, ...]
    ci_low: tuple[float, ...]
    ci_high: tuple[float, ...]
    smallest_effect: float
    noise: float
    tolerance: float

    def drift(self, values: Sequence[float], together: int, heavy: bool = False) -> Drift:
        """Difference of `values` to these, one of `together` that a check looks at; heavy: as in `between_seeds`."""
        if len(self.values) > 1:
            return between_seeds(self.values, values, together, self.noise, heavy)
        return on_same_tokens(self.values[0], values[0], self.noise)


@dataclass(frozen=True)
class Baseline:
    """What `check` compares with; `write` and `read` keep it in a file.

    Attributes:
        settings: how it was measured.
        data: what the numbers were measured on, with the tokens' fingerprint.
        checkpoints: what results record of each.
        tracked: the numbers.
        unmeasured: addresses of rows that have no number in some checkpoint; they are not checked.
        versions: of hopeprobe and torch.

    """

    settings: Settings
    data: Mapping[str, Any]
    checkpoints: tuple[Mapping[str, Any], ...]
    tracked: tuple[Tracked, ...]
    unmeasured: tuple[Address, ...]
    versions: Mapping[str, str]

    @property
    def of_seeds(self) -> bool:
        """Whether noise is between seeds; else the same weights are expected."""
        return len(self.checkpoints) > 1

    @cached_property
    def apart(self) -> tuple[tuple[Tracked, Mapping[str, Any]], ...]:
        """Numbers with the checkpoint in which they lie further from the other seeds' than normal values do."""
        found = apart([one.values for one in self.tracked], [one.noise for one in self.tracked])
        return tuple((self.tracked[which], self.checkpoints[seed]) for which, seed in found)

    def drift(self, one: Tracked, values: Sequence[float]) -> Drift:
        """Difference of `values` to a number of this baseline, as one of all that a check looks at."""
        return one.drift(values, len(self.tracked), heavy=bool(self.apart))

    def found(self, one: Tracked) -> float:
        """The smallest change of a number that a check of one checkpoint finds 95 times in a hundred.

        Of several it is the tolerance and the resolution of their own `drift`, whose spread is theirs too.
        """
        return one.tolerance + self.drift(one, one.values[:1]).resolution

    @property
    def unresolved(self) -> tuple[Tracked, ...]:
        """Numbers whose tolerance is below the smallest change beyond it that can be shown."""
        return tuple(one for one in self.tracked if 2 * one.tolerance < self.found(one))

    @property
    def tails(self) -> str:
        """What false alarms rest on, in a sentence; empty for a baseline of one checkpoint."""
        if not self.of_seeds:
            return ""
        if not self.apart:
            few = "" if len(self.checkpoints) >= _TELLING else f"; {_FEW}"
            return f"one check in a hundred raises a false alarm at most where seeds are spread normally{few}"
        one, where = self.apart[0]
        rest = f" ({len(self.apart)} of {len(self.tracked) * len(self.checkpoints)} values do)"
        return (
            f"{one.address} of seed {where.get('seed')} lies further from the other seeds' than normal spread "
            f"allows{rest}: intervals take Student's t of at most {HEAVY} degrees of freedom, so that changes must be "
            "larger to be found. If that run went wrong, make the baseline without it"
        )

    @property
    def dead(self) -> str:
        """How many numbers are of what does not work, in a sentence; empty where none is."""
        counts = Counter(str(v) for one in self.tracked for v in set(one.verdicts) & DEAD)
        found = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        return f"the baseline itself has numbers of what does not work: {found}" if found else ""

    @property
    def table(self) -> pd.DataFrame:
        """A line a number: its mean over checkpoints, spread, tolerance, and the smallest change that is found."""
        import numpy as np
        import pandas as pd

        from hopeprobe.stats.drift import spread

        frame: pd.DataFrame = pd.DataFrame(
            [
                {
                    **one.address._asdict(),
                    "value": float(np.mean(one.values)),
                    "sd": spread(one.values) if self.of_seeds else math.nan,
                    "tolerance": one.tolerance,
                    "found": self.found(one),
                    "unit": one.unit,
                    "verdict": ", ".join(dict.fromkeys(map(str, one.verdicts))),
                }
                for one in self.tracked
            ]
        ).astype({"layer": "Int64"})
        return frame

    def to_json(self) -> str:
        """One strict JSON document."""
        settings = dataclasses.asdict(self.settings)
        document = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            **self.versions,
            "settings": settings,
            "data": dict(self.data),
            "checkpoints": [dict(one) for one in self.checkpoints],
            "statistics": [_record(one) for one in self.tracked],
            "unmeasured": [one._asdict() for one in self.unmeasured],
        }
        return json.dumps(nan_to_null(document), allow_nan=False, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json`, whole or not at all. Raises BadInputError where that cannot be."""
        return write_atomically(path, self.to_json().encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Baseline:
        """Read a file that `write` wrote. Raises BadInputError, with what is wrong and what to do, for any other."""
        try:
            text = read_document(path)
        except OSError as error:
            raise BadInputError(f"{path} cannot be read: {error.strerror or error}; {_MAKES_ONE}") from None
        except UnicodeDecodeError:
            raise BadInputError(f"{path} is not a baseline: it is no text; {_MAKES_ONE}") from None
        except ValueError as error:
            raise BadInputError(f"{path} is not a baseline: {error}; {_MAKES_ONE}") from None
        try:
            return cls.from_json(text)
        except BadInputError as error:
            raise BadInputError(f"{path} {error}; {_MAKES_ONE}") from None

    @classmethod
    def from_json(cls, text: str) -> Baseline:
        """Read what `to_json` gave. Raises BadInputError that says what is wrong, from "is not …"."""
        try:
            document = parse_json(text)
        except ValueError as error:
            raise BadInputError(f"is not a baseline: it is no JSON ({error})") from None
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise BadInputError(f'is not a baseline: there is no "kind": "{KIND}"')
        if document.get("schema_version") != SCHEMA_VERSION:
            raise BadInputError(
                f"is a baseline of schema version {document.get('schema_version')}, this hopeprobe reads "
                f"{SCHEMA_VERSION}"
            )
        try:
            found = _from_document(document)
            _check_kinds(found)
            _check(found)
        except KeyError as error:
            raise BadInputError(f"is not a whole baseline: it has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInputError(f"is not a baseline that can be used: {error}") from None
        return found


def with_tolerances(tracked: Sequence[Tracked], given: Mapping[str, float]) -> tuple[Tracked, ...]:
    """Set tolerances by the name of a statistic, or PROBE/STATISTIC; the longer name counts.

    Raises BadInputError for one that is negative, infinite or NaN, or that names nothing.
    """
    names = dict.fromkeys(name for one in tracked for name in _names(one.address))
    for name, tolerance in given.items():
        if name not in names:
            raise BadInputError(f"no statistic {name!r} has a tolerance to set{near_names(name, names)}")
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise BadInputError(f"the tolerance of {name} is {tolerance}, must be 0 or more")
    found = []
    for one in tracked:
        for name in _names(one.address):
            if name in given:
                one = dataclasses.replace(one, tolerance=float(given[name]))
                break
        found.append(one)
    return tuple(found)


def current_versions() -> dict[str, str]:
    """Of what measures."""
    return {name: metadata.version(name) for name in ("hopeprobe", "torch")}


def _names(address: Address) -> tuple[str, str]:
    return f"{address.probe}/{address.statistic}", address.statistic


def _record(one: Tracked) -> dict[str, Any]:
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    address: Address = fields.pop("address")
    return {**address._asdict(), **fields, "verdicts": list(map(str, one.verdicts))}


def _from_document(document: Mapping[str, Any]) -> Baseline:
    settings = dict(document["settings"])
    settings["probes"], settings["data"] = tuple(settings["probes"]), tuple(settings["data"])
    if settings.get("gate") is not None:
        settings["gate"] = GateRule(**settings["gate"])
    return Baseline(
        Settings(**settings),
        dict(document["data"]),
        tuple(dict(one) for one in document["checkpoints"]),
        tuple(_tracked(record) for record in document["statistics"]),
        tuple(Address(**record) for record in document["unmeasured"]),
        {name: str(document[name]) for name in ("hopeprobe", "torch")},
    )


def _tracked(record: Mapping[str, Any]) -> Tracked:
    fields = dict(record)
    address = Address(**{name: fields.pop(name) for name in Address._fields})
    for name in ("values", "ci_low", "ci_high"):
        fields[name] = tuple(map(_number, fields[name]))
    for name in ("smallest_effect", "noise", "tolerance"):
        fields[name] = _number(fields[name])
    fields["verdicts"] = tuple(map(Verdict, fields["verdicts"]))
    return Tracked(address, **fields)


def _number(value: Any) -> float:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r:.60} is no number")
    return math.nan if value is None else float(value)


def _check_kinds(baseline: Baseline) -> None:
    """Raise TypeError for a value of another kind than is written here, which would end in a traceback later."""
    settings, text, number = baseline.settings, str, (int, float, type(None))
    for name in (*settings.probes, *settings.data):
        _check_kind("a name in probes or data", name, text)
    _check_kind("split", settings.split, text)
    _check_kind("carry", settings.carry, text)
    _check_kind("tokens", settings.tokens, (int, type(None)))
    if settings.gate is not None:
        for name, value in dataclasses.asdict(settings.gate).items():
            _check_kind(f"the gate's {name}", value, text if name in ("rule", "writes") else number)
    for one in baseline.checkpoints:
        _check_kind("the identity of a checkpoint", one.get("identity"), (str, type(None)))
        _check_kind("the seed of a checkpoint", one.get("seed"), (int, type(None)))
    for address in (*(one.address for one in baseline.tracked), *baseline.unmeasured):
        for name, value in address._asdict().items():
            _check_kind(f"the {name} of a number", value, (int, type(None)) if name == "layer" else text)


def _check_kind(what: str, value: object, kinds: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{what} is {value!r:.60}")


def _check(baseline: Baseline) -> None:
    """Raise BadInputError for what no baseline that was written here says."""
    if not baseline.tracked:
        raise BadInputError("is a baseline without a number: there is nothing to check")
    n, seen = len(baseline.checkpoints), set[Address]()
    for one in baseline.tracked:
        lengths = {len(one.values), len(one.verdicts), len(one.ci_low), len(one.ci_high)}
        if lengths != {n}:
            raise BadInputError(f"has {n} checkpoints, and other numbers of values for {one.address}")
        if not all(map(math.isfinite, one.values)):
            raise BadInputError(f"has no number for {one.address} of some checkpoint")
        for name, value in (("tolerance", one.tolerance), ("noise", one.noise)):
            if not (math.isfinite(value) and value >= 0):
                raise BadInputError(f"has a {name} of {value} for {one.address}, must be 0 or more")
        if one.address in seen:
            raise BadInputError(f"has {one.address} twice")
        seen.add(one.address)
