"""A small sample of windows, and rows measured on it: for what costs too much to measure on all tokens.

One window for each group of documents: of its documents the first that fills a window of L = 64 tokens, or else the
longest. There are as many as 32 full windows have tokens, at most 64: with documents long enough that is 32, the
fewest groups for which an interval is claimed. Where a write period wants a longer window L is longer, but all windows
together hold 4,096 tokens at most, and fewer than 32 of them give no interval.

Each row is a mean over windows, weighted by tokens, or a function of it, with the nulls that passes over all tokens
have too: own-init on the same windows (paired), fresh-init (K = 4 re-initialisations) on the first 8 of them. Nulls are
kept while Python runs, so that the checkpoints of one run share them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from hopeprobe.errors import MeasurementError
from hopeprobe.stats import MIN_GROUPS, FreshInit, GroupedMean, Verdict, jackknife, mean_of, paired_difference
from hopeprobe.stats.jackknife import UNBOUNDED
from hopeprobe.subject import MissingCapability
from hopeprobe.tokens.windows import EvalBatch

from .base import Finding, Measurement, NullValue, Place
from .movement import fresh_null

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hopeprobe.stats import Estimate, Moments
    from hopeprobe.stats.arrays import FloatArray, IntArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows

LONGEST = 64
MOST_TOKENS = 4096
FRESH_WINDOWS = 8
_SEEDS = (4_000_037, 4_000_043, 4_000_051, 4_000_057, 4_000_063)
_FRESH = 4
_MOST_KEPT = 16
_COLUMNS = ("lengths", "document", "group", "start", "index")


class Reading(NamedTuple):
    """A statistic in one window, and how many tokens that stands for; with none it is not defined there."""

    value: float
    tokens: int


Read: TypeAlias = Mapping[Place, Sequence[Reading]]
"""What one model gave: a reading of each row in each window, in their order."""

ReadModel: TypeAlias = "Callable[[Subject, Sequence[EvalBatch]], Read]"


@dataclass(frozen=True)
class Kind:
    """What rows of one statistic have in common; the columns are those of `base.Quantity`."""

    unit: str
    smallest_effect: float
    bounds: tuple[float, float] = UNBOUNDED
    function: Callable[[Moments], FloatArray] = mean_of


def sampled(
    windows: EvalWindows, wanted: int, batch: int = 1, most_tokens: int | None = None
) -> list[EvalBatch]:
    """Draw the sample in the order of groups, `batch` windows at a time.

    wanted: tokens that a window should have at least, if its context and its document have as many. most_tokens: of
    all windows together, None for what is said above.
    """
    longest = min(windows.context, max(LONGEST, wanted))
    best: dict[int, EvalBatch] = {}
    for row in _first_windows(windows, longest):
        group = int(row.group[0])
        if group not in best or best[group].lengths[0] < row.lengths[0]:
            best[group] = row
    chosen: list[EvalBatch] = []
    left = min(MIN_GROUPS * longest, MOST_TOKENS) if most_tokens is None else most_tokens
    for group in sorted(best):
        left -= int(best[group].lengths[0])
        if left < 0 and chosen:
            break
        chosen.append(best[group])
    return [_joined(chosen[i : i + batch]) for i in range(0, len(chosen), batch)]


def findings(
    here: Read,
    kinds: Mapping[str, Kind],
    subject: Subject,
    initial: Subject | None,
    batches: Sequence[EvalBatch],
    read: ReadModel,
) -> list[Finding]:
    """Set what `read` gave of the checkpoint, on all `batches`, beside what it gives of untrained models.

    kinds: by statistic. read: a function of a module, under which its nulls are kept.
    """
    group = np.concatenate([batch.group for batch in batches])
    few = batches[: max(1, FRESH_WINDOWS // len(batches[0].lengths))]
    n_few = sum(len(batch.lengths) for batch in few)
    # A model just made is its own initial one: what was read of it is not looked up under its weights.
    own = _Untrained(here) if initial is subject else _untrained(lambda: initial, batches, read)
    seeds = [seed for seed in _SEEDS if seed != subject.seed][:_FRESH]
    others = [_untrained(partial(subject.reinitialised, seed), few, read) for seed in seeds]
    found = []
    for place, readings in here.items():
        kind = kinds[place.statistic]
        estimate = _estimate(readings, group, kind)
        row = Measurement(place, "live", kind.unit, estimate, kind.smallest_effect)
        notes, nulls = list[str](), list[NullValue]()
        difference = fresh = None
        start = _estimate(own.read[place], group, kind) if place in own.read else None
        if start is None or not math.isfinite(start.value):
            notes.append(f"own-init: {own.absent or 'it is not defined there'}")
        else:
            nulls.append(NullValue("own-init", start.value, start.ci_low, start.ci_high, start.n))
            try:
                difference = paired_difference(estimate, start) if math.isfinite(estimate.value) else None
            except MeasurementError as error:  # a window in which one of the two is not defined
                notes.append(f"not comparable with own-init: {error}")
        values = [_value(one.read.get(place, ()), group, kind) for one in others]
        value = _value(readings[:n_few], group, kind)
        if values and np.isfinite([*values, value]).all():
            fresh = FreshInit(tuple(values), value)
            nulls += fresh_null(np.array(values))
            notes.append(f"fresh-init on the first {n_few} windows, where this is {value:.4g}")
        else:
            absent = next(filter(None, (one.absent for one in others)), "it is not defined there")
            notes.append(f"fresh-init: {absent}")
        # A null that failed has rejected nothing: the other must not decide alone.
        failed = fresh is None or (initial is not None and difference is None)
        override = Verdict.INCONCLUSIVE if failed and math.isfinite(estimate.value) else None
        found.append(Finding(row, difference, fresh, tuple(nulls), override, "; ".join(notes)))
    return found


class _Untrained(NamedTuple):
    """What an untrained model gave, or why it is not there."""

    read: Read
    absent: str = ""


_kept: dict[tuple[object, ...], Read] = {}


def _untrained(
    make: Callable[[], Subject | None], batches: Sequence[EvalBatch], read: ReadModel
) -> _Untrained:
    """Read an untrained model, once for each that is told apart by its weights."""
    from hopeprobe.nulls import weights_digest  # which imports the probes

    try:
        model = make()
        if model is None:
            return _Untrained({}, "the run's own initial weights are not known")
        tokens = hashlib.sha256(
            b"".join(b.tokens.tobytes() + b.lengths.tobytes() for b in batches)
        ).hexdigest()
        try:
            identity = json.dumps(dict(model.identity()), sort_keys=True, default=str)
        except MissingCapability:  # and so it is not kept
            return _Untrained(read(model, batches))
        key = (read, tokens, identity, weights_digest(model), type(model), type(model.module))
        if key not in _kept:
            while len(_kept) >= _MOST_KEPT:
                del _kept[next(iter(_kept))]
            _kept[key] = read(model, batches)
        return _Untrained(_kept[key])
    except MeasurementError as error:
        return _Untrained({}, f"not measured: {error}")


def _mean(readings: Sequence[Reading], group: IntArray) -> GroupedMean:
    mean = GroupedMean()
    if readings:
        values, tokens = (np.array(column) for column in zip(*readings, strict=True))
        mask = np.arange(max(1, int(tokens.max()))) < tokens[:, None]
        mean.update(np.broadcast_to(values[:, None], mask.shape), mask, group[: len(readings)])
    return mean


def _estimate(readings: Sequence[Reading], group: IntArray, kind: Kind) -> Estimate:
    return jackknife(kind.function, _mean(readings, group), bounds=kind.bounds)


def _value(readings: Sequence[Reading], group: IntArray, kind: Kind) -> float:
    return float(kind.function(_mean(readings, group).compute().pooled())[0])


def _first_windows(windows: EvalWindows, longest: int) -> Iterator[EvalBatch]:
    """The first window of each document, cut to `longest` tokens, one at a time."""
    for several in windows:
        for r in np.flatnonzero(several.start == 0):
            length = min(int(several.lengths[r]), longest)
            row = {name: getattr(several, name)[r : r + 1] for name in _COLUMNS}
            row["lengths"] = np.array([length], dtype=np.int64)
            yield EvalBatch(tokens=several.tokens[r : r + 1, : length + 1], **row)


def _joined(rows: Sequence[EvalBatch]) -> EvalBatch:
    width = max(row.tokens.shape[1] for row in rows)
    tokens = [np.pad(row.tokens, ((0, 0), (0, width - row.tokens.shape[1]))) for row in rows]
    columns = {name: np.concatenate([getattr(row, name) for row in rows]) for name in _COLUMNS}
    return EvalBatch(tokens=np.concatenate(tokens), **columns)
