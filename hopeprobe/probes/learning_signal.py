"""Which parameters does the loss reach at all? The norm of the loss's gradient, parameter by parameter.

For one window w of one document with losses CE_t at its n_w tokens, and θ one parameter, all parameters of one
group (`embed`, `selfmod`, `cms`, …), or all of them as one vector:

    g_w = ∂/∂θ (1/n_w) Σ_t CE_t                      through every write, as training takes it
    gradient_norm = log10 mean_w ‖g_w‖              mean weighted by n_w, decades; range (−∞, ∞)

so −3 says that the mean norm is 0.001 nats for a change of θ by 1. Norms of different parameters lie decades
apart, and only a ratio says how much one changed: hence the log. Smallest effect: 0.1 decades, 26 %.

Nulls: own-init and fresh-init, as `sample.py` says.

Verdicts. `no-signal`, without a value, where the gradient is exactly zero in every window: nothing in training moves
this parameter but weight decay. That takes a window longer than every write period, or as long as the context: in a
shorter one a write is not read, and no gradient comes back through it. Otherwise the rule decides whether the signal
differs from that of an untrained model; where that has none, there is no ratio, and the row is `inconclusive`.

Reading. `no-signal` is a cut graph, as a rule: a defect of the training code, and no property of the mechanism. A
norm that is small and not zero does not mean that little is learned: Adam divides by it.

Fails. The gradient is that of the weights as they are: a parameter that was reached earlier and no longer is has
none, and one of a clipped or frozen group has one that training never applied.

Cost: one backward for each of 32 windows of 64 tokens or so (`sample.py`), for the initial model as well, and 32 for
fresh ones; 40 s for `tiny`, 4 min for `small` on one core. Checkpoints of one run share the last two. Gradients that
parameters hold (`.grad`), `requires_grad` and the training mode stay as they are.

Source: the public reproduction writes under `no_grad`, which cuts M_k, M_v, M_η and M_α off from the language
model's loss: they are never trained, and nothing said so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hopeprobe.conditions import as_tensors
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import Verdict, mean_of
from hopeprobe.subject import MissingCapability

from .base import Finding, Place, Probe
from .sample import Kind, Reading, findings, sampled
from .workers import replicas, side_by_side

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.conditions import Condition
    from hopeprobe.stats import Moments
    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens import EvalWindows
    from hopeprobe.tokens.windows import EvalBatch

EFFECT = 0.1  # decades
STATISTIC = "gradient_norm"
ALL = "all"


def log_mean_of(moments: Moments) -> FloatArray:
    """log10 of the mean norm, float64 [B]; NaN where every gradient is zero."""
    mean = mean_of(moments)
    return np.log10(mean, out=np.full_like(mean, math.nan), where=mean > 0)


KINDS = {STATISTIC: Kind("log10 nats", EFFECT, function=log_mean_of)}


def gradients(subject: Subject, tokens: Tensor, lengths: Tensor) -> dict[str, float]:
    """‖∂ loss / ∂θ‖² of every parameter, by name, in float64; 0 where the loss does not reach it.

    tokens: [R, T + 1], lengths: [R]. Nothing of the model is changed, its `.grad` included. Raises
    MeasurementError for a loss or a gradient that is not finite.
    """
    import torch

    named = _named(subject)
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    with torch.enable_grad():
        loss = subject.loss(tokens, lengths)
        if not math.isfinite(value := float(loss.detach())):
            raise MeasurementError(f"the loss is {value}: the model diverged")
        found: Sequence[Tensor | None] = (None,) * len(wanted)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    squares = dict.fromkeys(named, 0.0)
    for name, gradient in zip(wanted, found, strict=True):
        squares[name] = 0.0 if gradient is None else float(gradient.detach().double().square().sum())
    bad = [name for name, square in squares.items() if not math.isfinite(square)]
    if bad:
        raise MeasurementError(f"the gradient is not finite in {', '.join(bad[:3])}: the model diverged")
    return squares


def read_gradients(subject: Subject, batches: Sequence[EvalBatch]) -> dict[Place, list[Reading]]:
    """Norms of the gradient in every window, by parameter, by group, and of all; one window a batch."""
    rows = _rows(subject)
    found: dict[Place, list[Reading]] = {place: [] for place in rows}

    def run(worker: Subject, batch: EvalBatch) -> dict[str, float]:
        try:
            return gradients(worker, *as_tensors(batch))
        except MissingCapability:
            raise
        except MeasurementError as error:
            where = f"document {int(batch.document[0])}, window from token {int(batch.start[0])}"
            raise MeasurementError(f"{where}: {error}") from None

    for batch, squares in side_by_side(run, replicas(subject, len(batches)), batches):
        for place, names in rows.items():
            norm = math.sqrt(sum(squares[name] for name in names))
            found[place].append(Reading(norm, int(batch.lengths[0])))
    return found


class LearningSignal(Probe):
    """Gradients of the loss, parameter by parameter; definitions at the top of this file."""

    name: ClassVar[str] = "learning-signal"
    question: ClassVar[str] = "Which parameters does the loss reach at all?"
    statistics: ClassVar[tuple[str, ...]] = (STATISTIC,)

    def applies(self, subject: Subject) -> str | None:  # noqa: ARG002
        """None: every model that can be trained has a gradient."""
        return None

    def conditions(self, subject: Subject) -> Sequence[Condition]:  # noqa: ARG002
        """No pass over all tokens: gradients cost too much for that."""
        return ()

    def of_model(self, subject: Subject, initial: Subject | None, windows: EvalWindows) -> Sequence[Finding]:
        """All rows."""
        period = _longest_period(subject)
        batches = sampled(windows, period + subject.tick if period else 0)
        here = read_gradients(subject, batches)
        rows, named = _rows(subject), _named(subject)
        seen = max(int(batch.lengths[0]) for batch in batches)
        written = seen > period or seen >= subject.context
        found = []
        for finding in findings(here, KINDS, subject, initial, batches, read_gradients):
            place = finding.measurement.place
            names = rows[place]
            if not any(reading.value for reading in here[place]):
                verdict, note = (
                    Verdict.NO_SIGNAL,
                    f"the gradient is exactly zero in all {len(batches)} windows",
                )
                if not any(named[name].requires_grad for name in names):
                    note = "requires_grad is off: training does not move it"
                elif not written:
                    verdict = Verdict.INCONCLUSIVE
                    note += f", of at most {seen} tokens, but what is written every {period} tokens is not read there"
                finding = dataclasses.replace(finding, override=verdict, note=note)
            found.append(finding)
        return found


def _named(subject: Subject) -> dict[str, Tensor]:
    return {name: t for group in subject.parameter_groups().values() for name, t in group.items()}


def _rows(subject: Subject) -> dict[Place, tuple[str, ...]]:
    """Parameters by row: every parameter, every group, all."""
    groups: Mapping[str, Iterable[str]] = subject.parameter_groups()
    rows: dict[Place, tuple[str, ...]] = {}
    for group, names in groups.items():
        for name in names:
            layer, component = _located(name)
            rows[Place(STATISTIC, layer, component)] = (name,)
        rows[Place(STATISTIC, component=group)] = tuple(names)
    rows[Place(STATISTIC, component=ALL)] = tuple(name for names in groups.values() for name in names)
    return rows


def _located(name: str) -> tuple[int | None, str]:
    """Layer and component: "blocks.0.cms.levels.fast.w_in" is cms.fast.w_in of layer 0."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not match:
        return None, name
    return int(match[1]), re.sub(r"\b(memories|levels)\.", "", match[2])


def _longest_period(subject: Subject) -> int:
    """Tokens after which every mechanism has written once; 0 where nothing writes."""
    try:
        return max(subject.write_periods().values(), default=0)
    except MissingCapability:
        return 0
