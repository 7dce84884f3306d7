"""The gradient that CMS writes follow: of a tick's own gated losses, with respect to what its levels computed.

Only this tick's graph is walked, so state is a constant. The gradient of a level's matrices is the product of what is
found here with the level's input and activation (`cms.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hopeprobe.hooks import inner_backward
from hopeprobe.model.cms import Tap
from hopeprobe.model.state import on_host
from hopeprobe.model.thin import rows_only

TapGradients = tuple[Tensor, Tensor]  # (B, C, h) for the pre-activation, (B, C, d) for delta


def inner_gradients(
    final: Tensor, grads: Tensor, taps: Sequence[Sequence[Tap]], gates: Sequence[Sequence[Tensor]]
) -> list[list[TapGradients]]:
    """Gradients of sum_t g_t CE_t with respect to every level's pre-activation and delta.

    One backward for each distinct gate.

    Args:
        final: (B, C, d), what the head read, in the graph.
        grads: (B, C, d), dCE_t / d final_t.
        taps: by layer, then level.
        gates: (B, C) write gates, by layer, then level; levels that share a gate share its tensor.

    Returns:
        By layer, then level. A tensor that an edit cut out of the graph counts as a constant: its gradient is zero.
    """
    out = [
        [(torch.zeros_like(tap.hidden), torch.zeros_like(tap.input)) for tap in of_layer] for of_layer in taps
    ]
    sharing: dict[int, tuple[Tensor, list[Tap]]] = {}
    for tap in (tap for of_layer in taps for tap in of_layer):
        gate = gates[tap.layer][tap.level]
        sharing.setdefault(id(gate), (gate, []))[1].append(tap)
    # On a device the question would stall it; there a closed gate costs its zero gradient.
    open_gates = [pair for pair in sharing.values() if not on_host(final) or bool(pair[0].any())]
    if not final.requires_grad:
        return out
    keep_graph = torch.is_grad_enabled()
    for i, (gate, sharers) in enumerate(open_gates):
        # In this thread on a device too, whose backward would otherwise run in one that knows nothing of `rows_only`.
        with inner_backward(), rows_only(), torch.autograd.set_multithreading_enabled(False):
            grads_found = torch.autograd.grad(
                final,
                [tensor for tap in sharers for tensor in (tap.pre, tap.delta)],
                (gate.detach()[..., None] * grads).to(final.dtype),
                retain_graph=keep_graph or i < len(open_gates) - 1,
                allow_unused=True,
            )
        found = cast("tuple[Tensor | None, ...]", grads_found)  # None where an edit cut the tensor out
        for tap, pre, delta in zip(sharers, found[::2], found[1::2], strict=True):
            nothing = out[tap.layer][tap.level]
            out[tap.layer][tap.level] = (
                nothing[0] if pre is None else pre,
                nothing[1] if delta is None else delta,
            )
    return out
