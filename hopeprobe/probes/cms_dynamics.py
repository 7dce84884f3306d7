"""Movement of the CMS levels over training, and their writes while they read: norms, drift, writes against periods.

For each layer and level, all of the level's parameters as one vector θ (its two matrices, biases, LayerNorm):

    weight_norm         ‖θ_n‖                                                 range [0, ∞)
    checkpoint_drift    ‖θ_i − θ_{i−1}‖ / ‖θ_{i−1}‖ from each checkpoint of the run to the next
    and distance_from_init, displacement, settled_step, moved_by_step_200, as `movement.py` defines them

For each layer and level, on a sample of windows (`sample.py`) that the live model reads from a fresh state, with p the
level's period and Δ = θ_fast − θ_meta of its two matrices:

    writes              writes that took place / writes that were due                            range [0, 1]
    write_size          mean_w ‖Δ‖ / ‖θ_meta‖ after the last write of window w                   range [0, ∞)

A window of n tokens is due ⌊n/p⌋ writes, at multiples of p. A write took place when it changed the fast weights by more
than a rounding of θ_meta: an open gate is no evidence, as a level with learning rate 0, or one that no gradient
reaches, has an open gate and writes nothing. The notes count writes, open gates, and changes where none was due.
Smallest effects: 0.05 of the writes, 0.001 of the norm.

Nulls: of norms own-init and fresh-init; of `checkpoint_drift` fresh-init, the distance of two initialisations; of
writes and their size own-init and fresh-init, and of `writes` `analytic`, 1.

Verdicts. `no-signal`: a level that is never written, whose fast weights are its meta weights to the last bit, or whose
weights are the same at two checkpoints; `collapsed`: weights that are all zero. The rule decides on writes and their
size, and on weights as `movement.py` says, on the norm with a smallest effect of 0.01 ‖θ_0‖; `checkpoint_drift` is a
descriptor.

Reading. Set `weight_norm` and distances beside own-init: a norm that training did not change is the initialiser's,
however round it looks. `writes` below 1 with open gates is a level that no gradient reaches or whose learning rate is
0.

Fails. How much a level moves says nothing of what it is worth: `cms-contribution` ablates it, `adaptation` stops its
writes. Checkpoints far apart hide movement there and back.

Cost: 6 initial models, each earlier checkpoint of the run read once, and some 6,000 tokens read (half of them by the
initial model and fresh ones; 1 min for `small` on one core); memory is that of all fast weights for 4 windows, twice.

Source: "Dissecting HOPE", section 4.2: norms of 26.15 and drift of 29.2 for both levels. At d = 256 these are the norm
of any level that was never trained and the distance between two of them, √(d + h/3 + d/3 + h/(3d) + d/(3h)) and
√(2 (h/3 + d/3 + h/(3d) + d/(3h))) with h = 4d.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hopeprobe.conditions import as_tensors
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import Verdict
from hopeprobe.subject import MissingCapability

from .base import Finding, Measurement, NullValue, Place, Probe
from .cms_similarity import levels_of
from .movement import (
    DISTANCES,
    TIMES,
    UNDECIDED,
    Part,
    Weights,
    alike,
    fresh_null,
    gathered,
    judged_row,
    left_out,
    located,
    movement_rows,
    not_applicable,
    row_of,
    verdict_of,
)
from .readings import clock_of
from .sample import Kind, Reading, findings, sampled
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.hooks import HookPoint
    from hopeprobe.stats.arrays import BoolArray, FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows
    from hopeprobe.tokens.windows import EvalBatch

MECHANISM = "cms"
WRITES_EFFECT = 0.05
SIZE_EFFECT = 0.001
NORM_EFFECT = 0.01  # of the norm of the initial weights
KINDS = {
    "writes": Kind("1", WRITES_EFFECT, (0.0, 1.0)),
    "write_size": Kind("1", SIZE_EFFECT, (0.0, math.inf)),
}
OF_WEIGHTS = ("weight_norm", "checkpoint_drift", *DISTANCES, *TIMES)

_BATCH = 4
_FAST = ("hook_fast_in", "hook_fast_out")


def parts_of(names: Iterable[str]) -> list[Part]:
    """The parameters of each layer's levels, and of what mixes them.

    >>> [part[:2] for part in parts_of(["blocks.0.cms.levels.fast.w_in", "blocks.0.cms.levels.fast.b_in"])]
    [(0, 'fast')]
    """
    places = ((name, *located(name, MECHANISM)) for name in names)
    return gathered((layer, component.split(".")[0], name) for name, layer, component in places)


@dataclass
class LevelWrites:
    """What one level of one layer did in each window of a sample.

    length: scored tokens. due, done: writes that were due, that took place. opened: periods with an open gate. stray:
    changes where no write was due. size: ‖Δ‖ / ‖θ_meta‖ in the end, NaN where θ_meta is 0.
    """

    period: int
    length: list[int] = field(default_factory=list)
    due: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    stray: list[int] = field(default_factory=list)
    size: list[float] = field(default_factory=list)


class _Clock:
    """Tokens read so far, those of the tick included."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        """Take a tick in, before it writes."""
        self.read += tensor.shape[hook.spec.dims.index("pos")]


class _Watch:
    """One level during one run of R windows: its gate tick by tick, its two matrices write by write."""

    def __init__(self, clock: _Clock, metas: Sequence[Tensor]) -> None:
        self.clock, self.metas = clock, metas
        self.held: list[Tensor] = list(metas)
        # By position: [R], whether the tick's gate was open at any token; [R, 2], of the two matrices, squared norms of
        # Δ and of what the write changed.
        self.open: dict[int, BoolArray] = {}
        self.size: dict[int, FloatArray] = {}
        self.change: dict[int, FloatArray] = {}

    def gate(self, tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG002
        """Take a tick's write gate in."""
        self.open[self.clock.read] = tensor.detach().any(dim=1).cpu().numpy()

    def fast(self, which: int, tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG002
        """Take one of the two matrices in, after a write."""
        now = tensor.detach().clone()
        for rows, other in ((self.size, self.metas[which]), (self.change, self.held[which])):
            row = rows.setdefault(self.clock.read, np.full((len(now), 2), math.nan))
            row[:, which] = _squared_norms(now - other)
        self.held[which] = now

    def finish(self, writes: LevelWrites, lengths: Sequence[int], name: str) -> None:
        """Count, window by window."""
        import torch

        period, norm = (
            writes.period,
            math.sqrt(sum(float(_squared_norms(meta[None])[0]) for meta in self.metas)),
        )
        # Of a window that is not written, others in its batch may change the last bits.
        rounding = torch.finfo(self.metas[0].dtype).eps * norm
        for r, length in enumerate(lengths):
            positions = [p for p in self.size if p <= length]
            sizes = [math.sqrt(self.size[p][r].sum()) for p in positions]
            if not np.isfinite(sizes).all():
                raise MeasurementError(f"the fast weights of {name} are not finite: the model diverged")
            changed = [p for p in positions if math.sqrt(self.change[p][r].sum()) > rounding]
            ends = range(period, length + 1, period)
            writes.length.append(length)
            writes.due.append(len(ends))
            writes.done.append(sum(p in ends for p in changed))
            writes.stray.append(sum(p not in ends for p in changed))
            opened = {-(-p // period) for p, gate in self.open.items() if gate[r]}
            writes.opened.append(sum(end // period in opened for end in ends))
            size = sizes[-1] if sizes else 0.0
            writes.size.append(size / norm if norm else math.nan)


def _squared_norms(matrices: Tensor) -> FloatArray:
    """[R, m, n] to float64 [R]."""
    import torch

    norms: FloatArray = (
        torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64).square().cpu().numpy()
    )
    return norms


def count_writes(subject: Subject, batches: Sequence[EvalBatch]) -> dict[tuple[int, str], LevelWrites]:
    """Run the live model over the windows and count what each level of each layer writes.

    Raises MissingCapability for a model whose levels' gates, fast or meta weights cannot be seen, MeasurementError for
    fast weights that are not finite.
    """
    import torch

    names, ticks = _level_names(subject), clock_of(subject.module.hook_dict)
    periods, metas = subject.write_periods(), subject.meta_weights()
    found = {where: LevelWrites(periods[f"{MECHANISM}.{where[1]}"]) for where in names}

    def run(worker: Subject, batch: EvalBatch) -> dict[tuple[int, str], _Watch]:
        clock = _Clock()
        watches = {w: _Watch(clock, [metas[f"{name}.{hook}"] for hook in _FAST]) for w, name in names.items()}
        hooks: list[tuple[str, Callable[[Tensor, HookPoint], None]]] = [(ticks, clock)]
        for where, name in names.items():
            hooks.append((f"{name}.hook_write_gate", watches[where].gate))
            hooks += [(f"{name}.{hook}", partial(watches[where].fast, i)) for i, hook in enumerate(_FAST)]
        # Points that never fire are what is looked for: a level that is never written.
        with torch.no_grad(), worker.module.hooks(hooks, allow_unfired=True):
            worker.run(*as_tensors(batch))
        return watches

    for batch, watches in side_by_side(run, replicas(subject, len(batches)), batches):
        for where, watch in watches.items():
            watch.finish(found[where], batch.lengths.tolist(), names[where])
    return found


def read_writes(subject: Subject, batches: Sequence[EvalBatch]) -> dict[Place, list[Reading]]:
    """Rows of `writes` and `write_size` in every window."""
    return _readings(count_writes(subject, batches))


class CMSDynamics(Probe):
    """Norms, drift and writes of CMS levels; definitions at the top of this file."""

    name: ClassVar[str] = "cms-dynamics"
    question: ClassVar[str] = (
        "How do the levels of the CMS move in training, and are they written when they are due?"
    )
    statistics: ClassVar[tuple[str, ...]] = (*OF_WEIGHTS, *KINDS)

    def applies(self, subject: Subject) -> str | None:
        """None, or that the model has no CMS."""
        return None if levels_of(subject.module.hook_dict) else "this model has no CMS levels"

    def conditions(self, subject: Subject) -> Sequence[Condition]:  # noqa: ARG002
        """No pass over all tokens: a sample is enough."""
        return ()

    def of_model(
        self, subject: Subject, initial: Subject | None, windows: EvalWindows
    ) -> Sequence[Measurement | Finding]:
        """All rows."""
        return [*_weight_rows(subject, initial), *_write_rows(subject, initial, windows)]


def _level_names(subject: Subject) -> dict[tuple[int, str], str]:
    """Prefix of the hook points of each level; MissingCapability where its writes cannot be seen."""
    points, metas, periods = subject.module.hook_dict, subject.meta_weights(), subject.write_periods()
    names = {}
    for layer, levels in levels_of(points).items():
        for level in levels:
            names[layer, level] = name = f"blocks.{layer}.{MECHANISM}.{level}"
            fast = {f"{name}.{hook}" for hook in _FAST}
            seen = {f"{name}.hook_write_gate", *fast} <= points.keys() and fast <= metas.keys()
            if not seen or f"{MECHANISM}.{level}" not in periods:
                raise MissingCapability(f"{subject.name}: nothing shows when {name} is written")
    return names


def _weight_rows(subject: Subject, initial: Subject | None) -> list[Measurement | Finding]:
    # Without initial weights the norm has its fresh-init null all the same, and nothing else can be said.
    weights = Weights(subject, subject if initial is None else initial)
    named = subject.parameter_groups().get(MECHANISM)
    if not named:
        return list(
            not_applicable(OF_WEIGHTS, "the model does not say which weights are those of its levels")
        )
    parts = parts_of(named)
    known = {(i, level) for i, found in levels_of(subject.module.hook_dict).items() for level in found}
    levels = [part for part in parts if part[:2] in known] or parts  # what mixes levels starts at 0
    rows: list[Measurement | Finding] = [_norm_row(weights, part, own=initial is not None) for part in levels]
    if initial is None:
        rest = (statistic for statistic in OF_WEIGHTS if statistic != "weight_norm")
        return [*rows, *not_applicable(rest, "the run's own initial weights are not known")]
    return [*rows, *_drift_rows(weights, levels), *movement_rows(weights, parts)]


def _norm_row(weights: Weights, part: Part, own: bool) -> Finding:
    distance = weights.distance(part.names)
    fresh = fresh_null(distance.other_norms)
    verdict, note = verdict_of(weights, part.names) if own else (None, "")
    for null in fresh:
        where = "within" if null.low <= distance.norm <= null.high else "outside"
        note = "; ".join(filter(None, (note, f"{where} the range of fresh initialisations")))
    if distance.norm == 0 and fresh and fresh[0].value > 0:
        verdict, note = Verdict.COLLAPSED, "all its weights are zero"
    start = distance.start if own else None
    nulls = (*((NullValue("own-init", distance.start),) if own else ()), *fresh)
    effect = NORM_EFFECT * distance.start
    others = distance.other_norms
    return judged_row(part, "weight_norm", distance.norm, effect, verdict, note, start, others, nulls)


def _drift_rows(weights: Weights, parts: Sequence[Part]) -> list[Measurement]:
    try:
        series = weights.series
    except MissingCapability as error:
        return not_applicable(["checkpoint_drift"], str(error))
    if len(series.steps) < 2:
        return not_applicable(["checkpoint_drift"], "the checkpoint is of step 0: none lies before it")
    rows = []
    for part in parts:
        distance = weights.distance(part.names)
        nulls = fresh_null(distance.others / distance.start) if distance.start else ()
        for start, end, drift in series.movement(part.names).drifts():
            verdict, note = Verdict.INCONCLUSIVE, UNDECIDED
            if math.isnan(drift):
                verdict, note = Verdict.NOT_APPLICABLE, f"its weights are all zero at step {start}"
            elif drift == 0:
                verdict, note = Verdict.NO_SIGNAL, "the same weights at both checkpoints"
            elif distance.start and alike(drift, distance.others / distance.start):
                note += "; as far apart as two initialisations: are both checkpoints of this run?"
            note = "; ".join(filter(None, (note, left_out(series))))
            row = row_of(part, "checkpoint_drift", drift, verdict, note, nulls)
            place = row.place._replace(position=f"step {start} to {end}")
            rows.append(dataclasses.replace(row, place=place))
    return rows


def _write_rows(
    subject: Subject, initial: Subject | None, windows: EvalWindows
) -> list[Measurement] | list[Finding]:
    try:
        longest = max(subject.write_periods()[f"{MECHANISM}.{level}"] for _, level in _level_names(subject))
        batches = sampled(windows, longest, _BATCH)
        counts = count_writes(subject, batches)
    except MissingCapability as error:
        return not_applicable(KINDS, str(error))
    found = findings(_readings(counts), KINDS, subject, initial, batches, read_writes)
    return [_judged(finding, counts) for finding in found]


def _readings(counts: Mapping[tuple[int, str], LevelWrites]) -> dict[Place, list[Reading]]:
    """Windows weigh by the tokens of their complete periods for writes, by all of theirs for the size."""
    rows: dict[Place, list[Reading]] = {}
    for (layer, level), writes in counts.items():
        rows[Place("writes", layer, level)] = [
            Reading(done / due if due else 0.0, due * writes.period)
            for done, due in zip(writes.done, writes.due, strict=True)
        ]
        rows[Place("write_size", layer, level)] = [
            Reading(size, length if due and math.isfinite(size) else 0)
            for size, length, due in zip(writes.size, writes.length, writes.due, strict=True)
        ]
    return rows


def _judged(finding: Finding, counts: Mapping[tuple[int, str], LevelWrites]) -> Finding:
    """Say what was counted, and what the rule should not decide."""
    row = finding.measurement
    assert row.place.layer is not None
    writes = counts[row.place.layer, row.place.component]
    due, done, opened, stray = map(sum, (writes.due, writes.done, writes.opened, writes.stray))
    if not due:
        note = f"no window is as long as its period of {writes.period} tokens"
        return dataclasses.replace(finding, override=Verdict.NOT_APPLICABLE, note=note)
    verdict, notes = finding.override, [finding.note]
    if row.place.statistic == "writes":
        notes.insert(
            0, f"{done} of {due} writes due every {writes.period} tokens, {opened} with an open gate"
        )
        if stray:
            notes.insert(1, f"{stray} where none was due")
        if not done:
            verdict = Verdict.NO_SIGNAL
        finding = dataclasses.replace(
            finding, nulls=(*finding.nulls, NullValue("analytic", 1.0, n=row.estimate.n))
        )
    elif math.isnan(row.estimate.value):
        return dataclasses.replace(finding, override=Verdict.NOT_APPLICABLE, note="its meta weights are zero")
    elif not any(writes.size):
        verdict = Verdict.NO_SIGNAL
        notes.insert(0, "its fast weights are its meta weights to the last bit")
    return dataclasses.replace(finding, override=verdict, note="; ".join(filter(None, notes)))
