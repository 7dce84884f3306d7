"""A self-modifying layer on its own, over a whole text: what need not wait for a tick is done for many at once.

In a model a tick's output goes into the next layer before the tick writes. A layer alone owes its output to nobody
until the text ends: the convolution takes the text whole, and what `memory` is asked between two of its writes it is
asked and answers at once. The same numbers, in products of more rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hopeprobe.model.state import on_host

if TYPE_CHECKING:
    from hopeprobe.model.memories import Weights
    from hopeprobe.model.selfmod import SelfMod

#: Tokens of all rows that are worked on together: at 64 tokens a chunk, four rows at once take three quarters of the
#: time of eight, as their intermediates, and the weights, then stay in the cache.
TOKENS_AT_ONCE = 256


def alone(layer: SelfMod, x: Tensor) -> Tensor:
    """Read x (B, T, d) from a fresh state and write every token: the layer's output (B, T, d).

    A tick that T does not complete is read and not written. While anybody watches, hooks fire as they do in a model.
    """
    chunks = [chunk for chunk in layer.group_chunks if chunk is not None]
    tick = math.gcd(*chunks) or max(1, x.shape[1])
    watched = any(point.active for point in layer.points)
    rows = max(1, TOKENS_AT_ONCE // tick) if on_host(x) and not watched else max(1, len(x))
    weights = layer.stacked()
    return torch.cat([_rows(layer, some, tick, weights, watched) for some in torch.split(x, rows)])


def _rows(layer: SelfMod, x: Tensor, tick: int, weights: tuple[Weights, ...], by_tick: bool) -> Tensor:
    outer, length = torch.is_grad_enabled(), x.shape[1]
    state, outputs = layer.init_state(len(x)), list[Tensor]()
    u, _ = layer.mixed(x, state.conv_tail)
    static = layer.w_q is not None
    asked, since = list[Tensor](), 0
    for start in range(0, length, tick):
        end = min(start + tick, length)
        part, fast = u[:, start:end], layer.attached(weights, state, outer)
        if not static or by_tick:
            asked.append(layer.asked(part, fast))
        chunk = layer.group_chunks[-1]
        if by_tick or end == length or (chunk is not None and end % chunk == 0):
            q = torch.cat(asked, 1) if asked else layer.asked(u[:, since:end], fast)
            outputs.append(layer.answered(q, fast))
            asked, since = [], end
        made = layer.made(part, state.conv_tail, fast, outer, late=False)
        if end - start == tick:
            state = layer.write(weights, state, made, part.new_ones(part.shape[:2]), donated=not outer)
    return torch.cat(outputs, 1) if outputs else x
