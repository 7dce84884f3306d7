"""The nulls that take a run of another model: own-init and fresh-init, cached on disk.

own-init: every row on the run's own step-0 weights, all tokens, with the influences that a paired difference
needs. fresh-init: the plain values on K re-initialisations, on a prefix of the tokens.

A cache file is named by the SHA-256 of what it depends on, the code included, written whole, and carries a
digest of its content: one that is damaged is computed again, never trusted. Files may be deleted at any time. Of
several ranks rank 0 alone looks there and keeps something: all must compute the same ones together.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import warnings
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from hopeprobe import ranks
from hopeprobe.documents import parse_json, read_document
from hopeprobe.errors import MeasurementError
from hopeprobe.probes.base import Finding, NullValue, Place, Probe
from hopeprobe.probes.measure import ESTIMATES, VALUES, Rows, measure, silent
from hopeprobe.replacing import replacing
from hopeprobe.results import SCHEMA_VERSION
from hopeprobe.stats import GROUPS, Estimate, FreshInit, Verdict, paired_difference
from hopeprobe.subject import MissingCapability, Subject
from hopeprobe.tokens.cache import default_cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hopeprobe.probes.base import Measurement, RowKey
    from hopeprobe.probes.measure import Told
    from hopeprobe.tokens import EvalWindows

FRESH_TOKENS = 4096
"""Most tokens that a fresh re-initialisation is measured on, unless asked otherwise."""

_PACKAGE = Path(__file__).parent


class NullCache:
    """Plain data on disk under `folder`/nulls, found again by a key of plain data; None keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder).expanduser() / "nulls" if folder is not None else None

    @classmethod
    def default(cls, folder: str | os.PathLike[str] | None = None) -> NullCache:
        """Open the cache in `folder`, by default where tokens are kept too."""
        return cls(default_cache_dir() if folder is None else folder)

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """Name the file of a key."""
        return None if self.folder is None else self.folder / f"{_digest(key)}.json"

    def load(self, key: Mapping[str, Any]) -> Any | None:
        """Return what was saved under this key; None when there is nothing, or it is damaged."""
        path = self.path(key)
        if path is None:
            return None
        try:
            document = parse_json(read_document(path), special=True)
            payload = document["payload"]
            sound = document["sha256"] == _digest({"key": key, "payload": payload})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return payload if sound else None

    def save(self, key: Mapping[str, Any], payload: Any) -> None:
        """Keep plain data under this key; where the disk refuses, a warning is all that happens."""
        path = self.path(key)
        if path is None:
            return
        content = _canonical({"payload": payload, "sha256": _digest({"key": key, "payload": payload})})
        try:
            # Not waiting for the disk: what a cut of power leaves is found by its digest, and these are many.
            with replacing(path, sync=False) as file:
                file.write(content.encode())
        except OSError as error:
            warnings.warn(
                f"nulls cannot be cached in {path.parent} ({error.strerror or error}); they are computed anew "
                "each time",
                RuntimeWarning,
                stacklevel=2,
            )
            self.folder = None


@dataclass
class Nulls:
    """Per probe, a number or an estimate for each row; reasons, by condition, for what could not be measured."""

    values: dict[str, dict[RowKey, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def why(self, probe: str, condition: str) -> str | None:
        """Why a row is not there: the reason for its condition, else for any other of its probe."""
        reasons = self.failed.get(probe, {})
        return reasons.get(condition, next(iter(reasons.values()), None))

    def add(self, other: Nulls) -> None:
        """Take over what another has of other probes."""
        self.values |= other.values
        self.failed |= other.failed


def most_fresh_tokens(probe: Probe, asked: int) -> int:
    """Tokens that a fresh re-initialisation is measured on at most: what was asked, or what the probe can bear."""
    return asked if probe.fresh_tokens is None else min(asked, probe.fresh_tokens)


@dataclass(frozen=True)
class Beside:
    """Everything that the measurements of one checkpoint are set beside.

    has_own_init: whether the run's own initial model is known; own: its estimates, or why there are none.
    asked: how many fresh re-initialisations were asked for, on fresh_tokens at most; prefix: the checkpoint
    on the tokens that they are measured on.
    """

    subject: Subject
    windows: EvalWindows
    has_own_init: bool
    own: Nulls
    asked: int
    fresh_tokens: int
    prefix: Nulls
    fresh: Sequence[Nulls]

    def finding(self, probe: Probe, row: Measurement) -> Finding:
        """Set a measurement beside its nulls; one that is missing is said to be, and is never made up."""
        notes: list[str] = []
        nulls: list[NullValue] = []
        difference, comparable = self._own(probe.name, row, notes, nulls)
        fresh = self._fresh(probe, row.key, notes, nulls)
        nulls += [*row.nulls, *probe.reference_nulls(row.place, self.subject, self.windows)]
        notes += [null.note for null in nulls if null.note]
        # A null that failed has rejected nothing: the other must not decide alone. (NaN is n/a all the same.)
        failed = not comparable or (self.asked > 0 and fresh is None)
        override = Verdict.INCONCLUSIVE if failed and math.isfinite(row.estimate.value) else None
        return Finding(row, difference, fresh, tuple(nulls), override, "; ".join(notes))

    def _own(
        self, name: str, row: Measurement, notes: list[str], nulls: list[NullValue]
    ) -> tuple[Estimate | None, bool]:
        start = self.own.values.get(name, {}).get(row.key)
        if start is None:
            reason = self.own.why(name, row.condition) or "it has no such row"
            notes.append(f"own-init {f'not measured: {reason}' if self.has_own_init else reason}")
            return None, not self.has_own_init
        nulls.append(NullValue("own-init", start.value, start.ci_low, start.ci_high, start.n))
        try:
            return paired_difference(row.estimate, start), True
        except MeasurementError as error:
            notes.append(f"not comparable with own-init: {error}")
            return None, False

    def _fresh(self, probe: Probe, row: RowKey, notes: list[str], nulls: list[NullValue]) -> FreshInit | None:
        if not self.asked:
            return None
        name, limit = probe.name, most_fresh_tokens(probe, self.fresh_tokens)
        values = [one.values.get(name, {}).get(row, math.nan) for one in self.fresh]
        here = self.prefix.values.get(name, {}).get(row, math.nan)
        if not (values and all(map(math.isfinite, (*values, here)))):
            reasons = [one.why(name, row[0]) for one in (self.prefix, *self.fresh)]
            reason = next(filter(None, reasons), "the statistic is not defined on every re-initialisation")
            notes.append(f"fresh-init not measured: {reason}")
            return None
        null = FreshInit(tuple(values), here)
        half = float(stdtrit(null.df, 0.975)) * null.prediction_se
        nulls.append(NullValue("fresh-init", null.mean, null.mean - half, null.mean + half, len(values)))
        if self.windows.n_tokens > limit:
            notes.append(f"fresh-init on the first {limit} tokens, where this is {here:.4g}")
        return null


def fresh_seeds(k: int, run_seed: int | None) -> list[int]:
    """K fixed seeds, none of them the run's own."""
    return list(itertools.islice((s for s in itertools.count(1_000_003) if s != run_seed), k))


def own_init_estimates(
    initial: Subject,
    windows: EvalWindows,
    probes: Sequence[Probe],
    cache: NullCache,
    told: Told = silent,
) -> Nulls:
    """Estimate every row on the run's own initial model; taken from the cache where it has them.

    The key holds a digest of the initial weights, so that a null is never that of another run.
    """
    return _measure(
        lambda: initial, initial, _weights(initial), probes, _Where(windows, cache, told), _estimates
    )


def fresh_init_values(
    subject: Subject,
    seed: int,
    windows: EvalWindows,
    probes: Sequence[Probe],
    cache: NullCache,
    told: Told = silent,
) -> Nulls:
    """Evaluate every row on one fresh re-initialisation; taken from the cache where it has them.

    Raises MissingCapability for a model that cannot be initialised again.
    """
    where = _Where(windows, cache, told)
    return _measure(lambda: subject.reinitialised(seed), subject, {"seed": seed}, probes, where, _values)


def plain_values(
    subject: Subject, windows: EvalWindows, probes: Sequence[Probe], cache: NullCache, told: Told = silent
) -> Nulls:
    """Evaluate every row on the checkpoint itself, to compare with fresh re-initialisations; cached as own-init is."""
    return _measure(
        lambda: subject, subject, _weights(subject), probes, _Where(windows, cache, told), _values
    )


def weights_digest(subject: Subject) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all weights, in the order of their names.

    Raises MissingCapability for a model that does not name its weights.
    """
    import torch

    named = {f"{g}.{name}": t for g, group in subject.parameter_groups().items() for name, t in group.items()}
    total = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _weights(subject: Subject) -> dict[str, str]:
    """What tells these weights from others; empty, and nothing is cached, for a model that does not name its own."""
    try:
        return {"weights": weights_digest(subject)}
    except MissingCapability:
        return {}


class _Where(NamedTuple):
    windows: EvalWindows
    cache: NullCache
    told: Told


def _measure(
    make: Callable[[], Subject],
    subject: Subject,
    origin: Mapping[str, Any],
    probes: Sequence[Probe],
    where: _Where,
    read: Callable[[Subject, Sequence[Probe], _Where], Rows[Any]],
) -> Nulls:
    """Look each probe up, and run `make()` once for those that are not in the cache."""
    nulls = Nulls()
    todo: dict[str, dict[str, Any]] = {}
    for probe in probes:
        key, kept = ranks.on_first(functools.partial(_kept, subject, origin, probe, where))
        if kept is None:
            todo[probe.name] = key
        else:
            nulls.values[probe.name] = kept
    if todo:
        rows = read(make(), [probe for probe in probes if probe.name in todo], where)
        for name, key in todo.items():
            nulls.values[name] = rows.found.get(name, {})
            nulls.failed[name] = {**rows.lacking.get(name, {}), **rows.failed.get(name, {})}
            if key and not nulls.failed[name] and ranks.first():
                where.cache.save(key, _encode(nulls.values[name]))
    return nulls


def _kept(
    subject: Subject, origin: Mapping[str, Any], probe: Probe, where: _Where
) -> tuple[dict[str, Any], dict[RowKey, Any] | None]:
    key = _key(subject, origin, probe, where)
    return key, _decode(where.cache.load(key)) if key else None


def _estimates(model: Subject, probes: Sequence[Probe], where: _Where) -> Rows[Estimate]:
    return measure(model, where.windows, probes, ESTIMATES, where.told).of(lambda row: row.estimate)


def _values(model: Subject, probes: Sequence[Probe], where: _Where) -> Rows[float]:
    return measure(model, where.windows, probes, VALUES, where.told)


def _key(subject: Subject, origin: Mapping[str, Any], probe: Probe, where: _Where) -> dict[str, Any]:
    """All that the numbers depend on; empty, and nothing is cached, for a model that cannot be identified.

    That is one without an identity, and one whose code is in no file (a class typed into a notebook).
    """
    try:
        identity = dict(subject.identity())
    except MissingCapability:
        return {}
    if not origin:
        return {}
    parts: tuple[type, type, type] = (type(subject), type(subject.module), type(probe))
    code = code_digest(parts)
    if code is None:
        return {}
    return {
        "schema": SCHEMA_VERSION,
        "versions": {name: metadata.version(name) for name in ("hopeprobe", "torch")},
        "model": identity,
        "origin": dict(origin),
        # Another device sums in another order; of the CPU nothing is said, as in keys from before there were others.
        **({} if str(subject.device) == "cpu" else {"device": str(subject.device)}),
        "windows": where.windows.fingerprint,
        "data": where.windows.data.fingerprint,  # a probe may read the training split too
        "carry": where.windows.carry,
        "probe": probe.name,
        "probe_version": probe.version,
        "probe_source": _source_of(type(probe)),
        "code": code,
        "settings": {name: repr(value) for name, value in sorted(vars(probe).items())},
        "conditions": [[one.name, one.batch] for one in probe.conditions(subject)],
    }


@functools.lru_cache(maxsize=256)
def code_digest(parts: tuple[type, type, type]) -> str | None:
    """SHA-256 (hex) over the code that numbers come from, as it is on disk; None where a model's is in no file.

    All of hopeprobe, and the folders (where they are packages, else the files) of the classes that make up
    the subject, its module's class and the probe's, given in this order. Read once a process.
    """
    subject, module, probe = parts
    files = set(_PACKAGE.rglob("*.py"))
    try:
        for part in (*(c for c in subject.__mro__ if issubclass(c, Subject)), module):
            files |= _files_of(part)
        for part in probe.__mro__:
            if issubclass(part, Probe):
                with contextlib.suppress(TypeError, OSError):  # `_source_of` or the version stands for it
                    files |= _files_of(part)
        contents = sorted((file.name, file.read_bytes()) for file in files)  # names only: folders may move
    except (TypeError, OSError):
        return None
    total = hashlib.sha256()
    for name, content in contents:
        total.update(f"{name}:{len(content)};".encode())
        total.update(content)
    return total.hexdigest()


def _files_of(part: type) -> set[Path]:
    file = Path(inspect.getsourcefile(part) or inspect.getfile(part))
    folder = file.parent
    return set(folder.glob("*.py")) if (folder / "__init__.py").is_file() else {file}


@functools.lru_cache(maxsize=256)
def _source_of(probe: type[Probe]) -> str:
    """SHA-256 (hex) of the probe's own source, its version where Python cannot find that."""
    try:
        return hashlib.sha256(inspect.getsource(probe).encode()).hexdigest()
    except (TypeError, OSError):
        return f"version {probe.version}"


def _encode(values: Mapping[RowKey, float | Estimate]) -> list[Any]:
    return [[condition, list(place), _plain(value)] for (condition, place), value in values.items()]


def _plain(value: float | Estimate) -> Any:
    if not isinstance(value, Estimate):
        return value
    arrays = {"influence": value.influence.tolist(), "weights": value.weights.tolist()}
    return {**{f.name: getattr(value, f.name) for f in fields(Estimate)}, **arrays}


def _decode(payload: Any) -> dict[RowKey, Any] | None:
    if payload is None:
        return None
    try:
        return {(condition, Place(*place)): _restored(value) for condition, place, value in payload}
    except (TypeError, ValueError, AttributeError):
        return None  # of another shape than is written: computed again


def _restored(value: Any) -> float | Estimate:
    if not isinstance(value, dict):
        return float(value)
    plain: dict[str, Any] = {
        k: np.array(v, dtype=np.float64) if isinstance(v, list) else v for k, v in value.items()
    }
    found = Estimate(**plain)
    if not found.influence.shape == found.weights.shape == (GROUPS,):
        raise ValueError("the influences are not those of the groups")
    return found


def _canonical(value: Any) -> str:
    # NaN is kept as Python writes it: these files are read by nothing else.
    return json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
