"""The package's surprise gate: which calls it lets write, which tokens of them, and what it asks.

With the metric `l2` the surprise is the mean norm of the teach signal over the call, after `teach_scale` and
`teach_clip`; with a signal for each block it is each block's own, and the clip comes after the gate. The signal is the
gradient of a *mean*: a call of twice the tokens has half the surprise. Of a whole window the last token counts too,
with none. With `loss` and `logit_entropy` it is the mean of the call's targets. `teach_schedule` changes the scale
while the package trains; a model that is loaded has `teach_scale` itself, here as in the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from nested_learning.model import HOPEModel
    from nested_learning.titan.model import TitanOnlyModel


class Surprise(NamedTuple):
    """What the gate says of one call of one row, by block."""

    passes: list[bool]
    active: list[
        Tensor
    ]  # (n,) bool: tokens whose own signal is at the threshold or above, with `l2`; else with any


def rule_of(model: HOPEModel | TitanOnlyModel, per_layer: bool) -> tuple[str, bool]:
    """What the gate asks, as hook points declare it, and whether there is one gate for all blocks."""
    metric, threshold = model.get_surprise_metric(), model.get_surprise_threshold()
    if threshold is None:
        return "g = 1", True
    # With teach signals of their own, blocks have gates of their own.
    return f"g = [{metric} surprise of the tick >= {threshold:g}]", metric != "l2" or not per_layer


def surprise_of(
    model: HOPEModel | TitanOnlyModel, signals: Sequence[Tensor], shown: Mapping[str, Any], per_layer: bool
) -> Surprise:
    """The package's gate for one call.

    signals: one teach signal (1, n, d), or one for each block. shown: what `_compute_surprise_override` takes.
    """
    from nested_learning.training import _compute_surprise_override

    threshold, metric, blocks = model.get_surprise_threshold(), model.get_surprise_metric(), len(model.blocks)
    passes, active = [], []
    for signal in signals:
        whole = signal * model.config.teach_scale
        sent = _clipped(whole, model.config.teach_clip)
        asked = (whole if per_layer else sent).norm(dim=-1)
        some = sent[0].abs().sum(dim=-1) > 0
        if threshold is None:
            passes.append(True)
        elif metric == "l2":
            passes.append(float(asked.mean()) >= threshold)
            some &= sent[0].norm(dim=-1) >= threshold
        else:
            surprise = _compute_surprise_override(metric, **shown)
            passes.append(surprise is not None and surprise >= threshold)
        active.append(some)
    return Surprise(passes, active) if per_layer else Surprise(passes * blocks, active * blocks)


def _clipped(signal: Tensor, clip: float) -> Tensor:
    if clip <= 0:
        return signal
    return signal / (signal.norm(dim=-1, keepdim=True) / clip).clamp(min=1.0)
