"""What a write is worth, and who knew: utilities of single tokens, their oracle, and what rules have in common.

On a sample of windows (`sample.py`), everything written but what is named:

    utility_t            Σ_{s>t} [CE_s without the write of token t − CE_s]   nats; positive: the write helped
    utility_correlation  Spearman's rank correlation of score_t and utility_t within a window, its mean over windows
    oracle_difference    loss − loss at random: of each window's tokens the b L of highest utility are written, and as
                         many drawn at random
    overlap              mean_t r_t q_t / b for two rules that gate all writes: of the budget, what both write

Tokens of a window's last tick have no later token and are left out. The oracle takes each token by itself, with
all others written: what is best at a budget may be another set, so that it is a guide to what can be had, not the
largest that can. Its choice knows the losses that it is then measured by, which no gate can.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.conditions import as_tensors
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import as_float64
from hopeprobe.stats.arrays import as_bool
from hopeprobe.subject import GateRule

from .base import Finding, Measurement, NullValue, Place, value_without_tokens
from .effects import EFFECT
from .gated import RANDOM, Cell, Prepared, gate_of, prepare, write_gates
from .sample import Kind, Reading, findings, sampled
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.hooks import HookPoint
    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalBatch, EvalWindows

CORRELATION, ORACLE, OVERLAP = "utility_correlation", "oracle_difference", "overlap"
SCORE = "hook_gate_score"
CORRELATION_EFFECT = 0.05
OVERLAP_EFFECT = 0.05

_KINDS = {
    CORRELATION: Kind("1", CORRELATION_EFFECT, (-1.0, 1.0)),
    ORACLE: Kind("nats", EFFECT),
    OVERLAP: Kind("1", OVERLAP_EFFECT, (0.0, math.inf)),
}
_ROWS = 64  # copies of a window at a time, each without another token
_OPEN = GateRule(RANDOM, 1.0)
_SEPARATOR = ": "  # between mechanism and rule, where one place has to hold both


def utilities(subject: Subject, batch: EvalBatch, writes: str) -> FloatArray:
    """Utility of every token of one window: float64 [L], NaN in its last tick."""
    tokens, lengths = as_tensors(batch)
    length = int(lengths[0])
    last = (
        (length - 1) // subject.tick * subject.tick
    )  # the last tick, complete or not, has nothing behind it
    with subject.gated(_OPEN):
        whole = _losses(subject.run(tokens, lengths).losses, length)[0]
        found = np.full(length, math.nan)
        for start in range(0, last, _ROWS):
            left_out = np.arange(start, min(start + _ROWS, last))
            kept = np.ones((len(left_out), length))
            kept[np.arange(len(left_out)), left_out] = 0.0
            without = _losses(written_only(subject, tokens, lengths, kept, writes), length)
            later = np.arange(length) > left_out[:, None]
            found[left_out] = ((without - whole) * later).sum(axis=1)
    return found


def written_only(subject: Subject, tokens: Tensor, lengths: Tensor, kept: FloatArray, writes: str) -> Tensor:
    """Losses [K, L] of copies of one window [1, L + 1] in which only tokens with kept [K, L] = 1 are written."""
    import torch

    mask = torch.from_numpy(kept)
    at: dict[str, int] = defaultdict(int)

    def close(gate: Tensor, hook: HookPoint) -> Tensor:
        start = at[hook.name]
        at[hook.name] = start + gate.shape[1]
        return gate * mask[:, start : at[hook.name]].to(gate)

    copies = len(kept)
    with subject.module.hooks([(write_gates(subject, writes), close)], allow_unfired=True):
        return subject.run(tokens.expand(copies, -1).contiguous(), lengths.expand(copies).contiguous()).losses


def _losses(losses: Tensor, length: int) -> FloatArray:
    found = as_float64(losses)[:, :length]
    if not np.isfinite(found).all():
        raise MeasurementError("a loss is not finite with some tokens unwritten: the model diverged")
    return found


def of_sample(
    subject: Subject, initial: Subject | None, windows: EvalWindows, budgets: Sequence[float]
) -> list[Finding]:
    """All rows of this file, beside their nulls."""
    if SCORE not in subject.module.hook_dict:
        return [
            Finding(
                Measurement(
                    Place(statistic), "", "", value_without_tokens(math.nan), note="it shows no score"
                )
            )
            for statistic in _KINDS
        ]
    batches = sampled(windows, 0)
    read = _reader(tuple(budgets), windows)
    here = read(subject, batches)
    return [_unpacked(one) for one in findings(here, _KINDS, subject, initial, batches, read)]


def _unpacked(finding: Finding) -> Finding:
    row = finding.measurement
    writes, _, component = row.place.component.partition(_SEPARATOR)
    row = dataclasses.replace(row, condition=writes, place=row.place._replace(component=component))
    chance = float(row.place.position) if row.place.statistic == OVERLAP else 0.0
    nulls = (*finding.nulls, NullValue("random-gate", chance))
    return dataclasses.replace(finding, measurement=row, nulls=nulls)


_readers: dict[
    tuple[Any, ...], Callable[[Subject, Sequence[EvalBatch]], Mapping[Place, Sequence[Reading]]]
] = {}


def _reader(
    budgets: tuple[float, ...], windows: EvalWindows
) -> Callable[[Subject, Sequence[EvalBatch]], Mapping[Place, Sequence[Reading]]]:
    """One object for the same budgets and text: what is kept of untrained models is kept under it."""
    key = (budgets, windows.data.fingerprint)
    while len(_readers) > 8:
        del _readers[next(iter(_readers))]
    return _readers.setdefault(key, partial(_read, budgets, windows))


def _read(
    budgets: tuple[float, ...], windows: EvalWindows, subject: Subject, batches: Sequence[EvalBatch]
) -> dict[Place, list[Reading]]:
    """Readings of every row in every window."""
    prepared = prepare(subject, windows.take(sum(int(b.lengths.sum()) for b in batches)))
    found: dict[Place, list[Reading]] = defaultdict(list)

    def run(worker: Subject, batch: EvalBatch) -> dict[Place, Reading]:
        return dict(_of_window(worker, batch, budgets, prepared))

    for batch, rows in side_by_side(run, replicas(subject, len(batches)), batches):
        del batch
        for place, reading in rows.items():
            found[place].append(reading)
    return dict(found)


def _of_window(
    subject: Subject, batch: EvalBatch, budgets: tuple[float, ...], prepared: Prepared
) -> Iterator[tuple[Place, Reading]]:
    rules = {
        rule: known
        for rule, known in subject.gate_rules().items()
        if rule != "absolute" and (rule != "excess" or prepared.surprisal is not None)
    }
    scores = {
        rule: _score(subject, batch, Cell(rule, known[-1], 1.0), prepared) for rule, known in rules.items()
    }
    mechanisms = dict.fromkeys(writes for known in rules.values() for writes in known)
    for writes in mechanisms:
        utility = utilities(subject, batch, writes)
        valid = np.isfinite(utility)
        for rule, known in rules.items():
            if writes in known and rule != RANDOM:
                place = Place(CORRELATION, component=f"{writes}{_SEPARATOR}{rule}")
                yield place, _correlated(scores[rule][valid], utility[valid])
        for budget, difference in _oracle(subject, batch, utility, valid, budgets, writes):
            place = Place(ORACLE, component=f"{writes}{_SEPARATOR}oracle", position=f"{budget:.3g}")
            yield place, difference
    yield from _overlaps(subject, batch, rules, budgets, prepared)


def _score(subject: Subject, batch: EvalBatch, cell: Cell, prepared: Prepared) -> FloatArray:
    """Score of each token [L] while everything is written."""
    with subject.gated(gate_of(cell, prepared), prepared.surprisal), subject.module.caching([SCORE]) as cache:
        subject.run(*as_tensors(batch))
    return as_float64(cache[SCORE])[0, : int(batch.lengths[0])]


def _correlated(score: FloatArray, utility: FloatArray) -> Reading:
    """Spearman's correlation; of no tokens where one of the two does not vary."""
    from scipy.stats import rankdata

    if not len(score):  # a window of one tick: no token has a later one
        return Reading(0.0, 0)
    x, y = rankdata(score), rankdata(utility)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return Reading(float((x * y).sum()) / size, len(score)) if size > 0 else Reading(0.0, 0)


def _oracle(
    subject: Subject,
    batch: EvalBatch,
    utility: FloatArray,
    valid: BoolArray,
    budgets: tuple[float, ...],
    writes: str,
) -> Iterator[tuple[float, Reading]]:
    """By budget, the loss with the best tokens written less that with as many at random."""
    tokens, lengths = as_tensors(batch)
    length = int(lengths[0])
    candidates = np.flatnonzero(valid)
    if not candidates.size:  # a window of one tick: it has readings too, of no tokens
        for budget in budgets:
            yield budget, Reading(0.0, 0)
        return
    # Of the window alone, so that the same tokens draw the same lot in any batch and on any model.
    drawn = np.random.default_rng(batch.tokens[0, : length + 1]).permutation(candidates)
    best = candidates[np.argsort(-utility[candidates], kind="stable")]
    counts = [max(1, round(budget * len(candidates))) for budget in budgets]
    kept = np.zeros((2 * len(budgets), length))
    for i, count in enumerate(counts):
        kept[2 * i, best[:count]] = 1.0
        kept[2 * i + 1, drawn[:count]] = 1.0
    with subject.gated(_OPEN):
        losses = _losses(written_only(subject, tokens, lengths, kept, writes), length).mean(axis=1)
    for i, budget in enumerate(budgets):
        yield budget, Reading(float(losses[2 * i] - losses[2 * i + 1]), length)


def _overlaps(
    subject: Subject,
    batch: EvalBatch,
    rules: Mapping[str, Sequence[str]],
    budgets: tuple[float, ...],
    prepared: Prepared,
) -> Iterator[tuple[Place, Reading]]:
    """What two rules both write, each under its own gate."""
    length = int(batch.lengths[0])
    for budget in budgets:
        gates = {
            rule: _gate(subject, batch, Cell(rule, known[-1], budget), prepared, length)
            for rule, known in rules.items()
            if rule != RANDOM
        }
        for one, other in combinations(gates, 2):
            both = float((gates[one] * gates[other]).mean()) / budget
            component = f"all{_SEPARATOR}{one} & {other}"
            yield Place(OVERLAP, component=component, position=f"{budget:.3g}"), Reading(both, length)


def _gate(subject: Subject, batch: EvalBatch, cell: Cell, prepared: Prepared, length: int) -> FloatArray:
    """The write gate [length] of a cell, the mean over layers, 0 in a tick that is not complete."""
    names = write_gates(subject, cell.writes)
    with ExitStack() as stack:
        stack.enter_context(subject.gated(gate_of(cell, prepared), prepared.surprisal))
        cache = stack.enter_context(subject.module.caching(names, allow_unfired=True))
        out = subject.run(*as_tensors(batch))
    gate = np.zeros(length)
    shown = [as_float64(cache[name])[0, :length] for name in names if name in cache]
    if shown:
        mean = np.mean(shown, axis=0)
        gate[: len(mean)] = mean
    return np.where(as_bool(out.scored)[0, :length], gate, 0.0)
