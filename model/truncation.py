"""How far the outer gradient reaches back, and what that costs in memory.

Cut every N ticks, a window is several graphs: each is backpropagated and freed by itself, so memory follows N.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import ModelConfig

#: Share of the machine's memory that a graph may take; the rest is logits, gradients and everybody else's.
_SHARE = 0.8
#: Runs at once of which memory is no concern.
_MANY = 1024


def segments(config: ModelConfig, tokens: Tensor) -> Iterator[Tensor]:
    """Parts of windows (B, T + 1) between which no gradient flows; each begins with the last token of the previous."""
    size = config.truncate_ticks * config.tick or tokens.shape[1]
    for start in range(0, tokens.shape[1] - 1, size):
        yield tokens[:, start : start + size + 1]


def graph_bytes(config: ModelConfig, batch: int) -> int:
    """Roughly what the graph of one segment holds, float32: each tick keeps the fast weights it read.

    Of six memories a layer (ten d x d matrices), of a Titans memory what it wrote and its momentum too; of a CMS level
    its differences, as often as it is written. And what a layer keeps of a token, some 160 vectors (measured: `small`
    at batch 8 holds 4.2 GiB at 128 tokens and 18.0 at 512).
    """
    if not config.writes:
        return 0
    d = config.dim
    written = {"all": 6 + 4, "memory": 2, "none": 0}[config.parts.memories]
    memories = (written + (8 if config.parts.mixer == "titans" else 0)) * d * d
    levels = config.levels if config.parts.levels else ()
    cms = sum(2 * config.cms_multiplier * d * d * config.tick / level.period for level in levels)
    return int(4 * batch * config.layers * _ticks(config) * (memories + cms + 160 * d * config.tick))


def _machine_bytes(device: torch.device | None = None) -> int | None:
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return None


def fitting(config: ModelConfig, batch: int) -> int:
    """How many such runs the machine can hold at once, 0 included."""
    available, needed = _machine_bytes(), graph_bytes(config, batch)
    if available is None:
        return 1 if needed else _MANY
    return min(_MANY, int(_SHARE * available / needed)) if needed else _MANY


def check_memory(config: ModelConfig, batch: int, device: torch.device | None = None) -> None:
    """Raise `BadInputError` for what the machine cannot hold, with what it can: the system would kill it silently."""
    available = _machine_bytes(device)
    if available is None:
        return
    needed = graph_bytes(config, batch)
    if needed <= _SHARE * available:
        return
    machine = "this device" if device is not None and device.type == "cuda" else "this machine"
    fitting = max(1, int(_ticks(config) * 0.5 * available / needed))
    raise BadInputError(
        f"a gradient through {_ticks(config)} ticks of {batch} windows keeps about {needed / 2**30:.0f} GiB of fast "
        f"weights, {machine} has {available / 2**30:.0f} GiB: cut it with --truncate-ticks {fitting}, or take a "
        "smaller --batch"
    )


def _ticks(config: ModelConfig) -> int:
    return config.truncate_ticks or math.ceil(config.context / config.tick)
