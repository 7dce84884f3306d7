"""AdamW as a run uses it, and what a checkpoint keeps of it: the same wherever it was, so that a run may move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import on_host
from hopeprobe.model.train_config import TrainConfig

#: What says how torch computes an update, not which: a checkpoint has it as on a CPU.
HOW = ("fused", "capturable")


def make_optimizer(model: HopeModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay on matrices only: vectors and scalars (norms, gate biases, biases) are left alone.

    On a device it is the fused one, of which an update can be held there, and recorded.
    """
    named = list(model.named_parameters())
    decayed = [p for _, p in named if p.ndim >= 2]
    plain = [p for _, p in named if p.ndim < 2]
    how: dict[str, Any] = {} if on_host(model.embed) else dict.fromkeys(HOW, True)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        **how,
    )


def recorded(optimizer: torch.optim.Optimizer, rate: float) -> dict[str, Any]:
    """Plain data of an optimiser, on the CPU, and as one on a CPU has it; `rate` is that of its last update."""
    content = optimizer.state_dict()
    usual = torch.optim.AdamW([torch.zeros(())]).param_groups[0]
    for group in content["param_groups"]:
        group |= {name: usual[name] for name in HOW}
        group["lr"] = rate
    content["state"] = {
        at: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in held.items()}
        for at, held in content["state"].items()
    }
    return content


def restore(optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Go on from a record, in the way that this optimiser computes."""
    groups = [
        {**group, **{name: ours[name] for name in HOW}}
        for group, ours in zip(record["param_groups"], optimizer.param_groups, strict=True)
    ]
    # With the flags in place torch puts the counts of steps where the weights are.
    optimizer.load_state_dict({**record, "param_groups": groups})
