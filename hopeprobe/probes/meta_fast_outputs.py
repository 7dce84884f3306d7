"""What fast weights change in what a model says: the functional part of `meta_fast.py`.

A window is read live up to a position p, and the tick that comes next is read three times from the state left there,
writing nothing: with the fast weights as they are; with all of them back at their meta weights and every input of a
mechanism replaced by that of the first reading, so that outputs differ by the weights alone; and with meta weights and
inputs as they then come, for the logits.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hopeprobe.conditions import as_tensors
from hopeprobe.errors import MeasurementError
from hopeprobe.stats import as_float64

from .base import Place
from .meta_fast_memories import positions_of
from .sample import Kind, Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hopeprobe.hooks import HookPoint
    from hopeprobe.stats.arrays import FloatArray
    from hopeprobe.subject import Subject
    from hopeprobe.tokens.windows import EvalBatch

_LAYERS = ("selfmod", "titans")  # memories that read the residual stream as it enters the block

OUTPUT_EFFECT = 0.05
KL_EFFECT = 0.01  # nats
KINDS = {
    "output_divergence": Kind("1", OUTPUT_EFFECT, (0.0, math.inf)),
    "logit_kl": Kind("nats", KL_EFFECT, (0.0, math.inf)),
}


class Mechanism(NamedTuple):
    """What has fast weights, an input and an output: the names of their hook points."""

    layer: int | None
    component: str
    reads: str
    gives: str


def mechanisms_of(subject: Subject) -> list[Mechanism]:
    """Levels, which read `hook_in` and give `hook_delta`; the memories of a layer as one, which read the stream.

    What does not show both is left out.
    """
    points, found = subject.module.hook_dict, dict[str, Mechanism]()
    for name in subject.meta_weights():
        own = name.rpartition(".")[0]
        for prefix in (own, own.rpartition(".")[0]):
            match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", prefix)
            if match is None:
                continue
            layer = None if match[1] is None else int(match[1])
            reads = f"blocks.{layer}.hook_resid_pre" if match[2] in _LAYERS else f"{prefix}.hook_in"
            gives = next((n for n in (f"{prefix}.hook_delta", f"{prefix}.hook_out") if n in points), "")
            if gives and reads in points:
                found[prefix] = Mechanism(layer, match[2], reads, gives)
                break
    return list(found.values())


def read_outputs(subject: Subject, batches: Sequence[EvalBatch]) -> dict[Place, list[Reading]]:
    """Every row in every window, in their order; with no tokens where a window ends before the tick does.

    Raises MissingCapability for a model without states or logits, MeasurementError for what is not finite.
    """
    mechanisms, tick = mechanisms_of(subject), subject.tick
    n_windows = sum(len(batch.lengths) for batch in batches)
    found: dict[Place, FloatArray] = {}
    first = 0
    for batch in batches:
        tokens, _ = as_tensors(batch)
        rows, read = np.arange(len(tokens)), 0
        state: Any = None
        for position in positions_of(subject):
            staying = np.flatnonzero(batch.lengths[rows] >= position + tick)
            if not len(staying):
                break
            rows = rows[staying]
            state = None if state is None else subject.select_rows(state, staying.tolist())
            state = subject.run(tokens[rows, read : position + 1], None, state).state
            read = position
            window = tokens[rows, position : position + tick]
            for place, values in _compared(subject, mechanisms, state, window):
                place = place._replace(position=str(position))
                found.setdefault(place, np.full(n_windows, np.nan))[first + rows] = values
        first += len(tokens)
    return {
        place: [Reading(0.0, 0) if math.isnan(value) else Reading(value, tick) for value in values.tolist()]
        for place, values in found.items()
    }


def _compared(
    subject: Subject, mechanisms: Sequence[Mechanism], state: Any, tokens: Tensor
) -> list[tuple[Place, FloatArray]]:
    """All rows of one tick [R, C], one value a window; NaN where the output with meta weights is zero throughout."""
    inputs = sorted({mechanism.reads for mechanism in mechanisms})
    outputs = sorted({mechanism.gives for mechanism in mechanisms})
    meta = subject.reset_rows(state, range(len(tokens)))
    with subject.module.caching([*inputs, *outputs]) as live:
        logits = subject.logits(state, tokens)
    edits = [(name, partial(_replaced, live[name])) for name in inputs]
    with subject.module.hooks(edits), subject.module.caching(outputs) as same_inputs:
        subject.logits(meta, tokens)
    rows = [(Place("logit_kl"), _finite("the logits", kl(logits, subject.logits(meta, tokens))))]
    for mechanism in mechanisms:
        values = _finite(
            mechanism.gives, relative_distance(live[mechanism.gives], same_inputs[mechanism.gives])
        )
        rows.append((Place("output_divergence", mechanism.layer, mechanism.component), values))
    return rows


def _replaced(value: Tensor, tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001 - the signature of a hook
    return value


def _finite(what: str, values: FloatArray) -> FloatArray:
    if bad := int(np.isinf(values).sum()):
        raise MeasurementError(f"{what}: not finite in {bad} of {len(values)} windows: the model diverged")
    return values


def relative_distance(fast: Tensor, meta: Tensor) -> FloatArray:
    """Mean over tokens of ‖y_fast − y_meta‖ / ‖y_meta‖, [R, C, d] to float64 [R].

    Tokens with ‖y_meta‖ = 0 are left out, NaN where that is all; infinite where a value is not finite.
    """
    y_fast, y_meta = as_float64(fast), as_float64(meta)
    finite = np.isfinite(np.concatenate([y_fast, y_meta], axis=2)).all(axis=(1, 2), keepdims=True)
    y_fast, y_meta = np.where(finite, y_fast, 0.0), np.where(finite, y_meta, 0.0)
    away, length = np.linalg.norm(y_fast - y_meta, axis=2), np.linalg.norm(y_meta, axis=2)
    ratio = np.divide(away, length, out=np.zeros_like(away), where=length > 0)
    n = (length > 0).sum(axis=1)
    mean = np.divide(ratio.sum(axis=1), n, out=np.full(len(n), np.nan), where=n > 0)
    return np.where(finite[:, 0, 0], mean, np.inf)


def kl(live: Tensor, reset: Tensor) -> FloatArray:
    """Mean over tokens of KL(p ‖ q) = Σ p (ln p − ln q), nats: logits [R, C, V] each to float64 [R].

    Infinite where a logit is not finite. A window at a time: float64 logits are twice as large.
    """
    import torch

    found = np.empty(len(live))
    for row, (of_p, of_q) in enumerate(zip(live, reset, strict=True)):
        log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (of_p, of_q))
        value = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
        found[row] = max(value, 0.0) if math.isfinite(value) else np.inf
    return found
