"""Where a forward pass first gives a value that is not finite, in the words of the model: layer, memory, level."""

from __future__ import annotations

import torch
from torch import Tensor

from hopeprobe.hooks import HookPoint
from hopeprobe.model.config import MEMORIES
from hopeprobe.model.hope import HopeModel


@torch.no_grad()
def first_not_finite(model: HopeModel, tokens: Tensor) -> str | None:
    """Run a batch again and name the first hook point whose value is not finite, with its layer and memory, if any."""
    found: list[str] = []

    def look(tensor: Tensor, hook: HookPoint) -> None:
        if not found and not bool(tensor.isfinite().all()):
            found.append(hook.name)

    with model.hooks(fwd_hooks=[(lambda _: True, look)], allow_unfired=True):
        model(tokens.to(model.embed.device))
    if not found:
        return None
    parts = found[0].split(".")
    place = f"layer {parts[1]}" if parts[0] == "blocks" else "outside the layers"
    owner = ""
    if len(parts) == 5:
        owner = f", {parts[2]} level {parts[3]}" if parts[2] == "cms" else f", memory {parts[3]}"
    elif len(parts) == 4:
        memory = {"out": "memory"}.get(parts[3].removeprefix("hook_"), parts[3].removeprefix("hook_"))
        owner = f", memory {memory}" if parts[2] == "selfmod" and memory in MEMORIES else f", {parts[2]}"
    return f"{place}{owner} ({found[0]})"
