"""What a run goes on from, put back only where it fits: the optimiser's moments and the state of the generator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hopeprobe.errors import BadInputError
from hopeprobe.model import optimizer as optimizers
from hopeprobe.model.checkpoint import Checkpoint

_MOMENTS = ("exp_avg", "exp_avg_sq")


def restore(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser of the checkpoint's model its state, and torch's generator its own.

    Raises `BadInputError` for what is not the state of this optimiser: it would train another model, or none.
    """
    given, fresh = checkpoint.optimizer or {}, optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, state = given.get("param_groups"), given.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise _unfit("it has no param_groups or no state")
    ours = [_told({**group, "lr": 0.0}) for group in fresh["param_groups"]]
    if [_told(group) for group in groups] != ours:
        raise _unfit("its groups of parameters, or what they are set to, are others")
    if checkpoint.step and not state:  # parameters without a gradient have no moments, but never all of them
        raise _unfit("it holds no moments")
    for index, moments in state.items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise _unfit(f"there is no parameter {index!r:.40}")
        _check_moments(moments, parameters[index], checkpoint.step)
    try:
        optimizers.restore(optimizer, given)
        if checkpoint.generators:
            torch.set_rng_state(checkpoint.generators["torch"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _unfit(str(error)) from None


def _unfit(why: str) -> BadInputError:
    return BadInputError(f"its optimiser or generator is not that of its model: {why}")


def _told(group: Any) -> object:
    """What a group says, but for the rate, which each step sets, and how a device computes updates."""
    if not isinstance(group, Mapping) or not isinstance(group.get("lr"), int | float):
        return None
    try:
        told = json.dumps({k: v for k, v in group.items() if k not in ("lr", *optimizers.HOW)})
        return json.loads(told)  # a tuple as a list; unlike texts, 0 is 0.0
    except (TypeError, ValueError, RecursionError):  # a tensor, or keys of several kinds
        return None


def _check_moments(moments: Any, parameter: Tensor, steps: int) -> None:
    if not isinstance(moments, Mapping) or set(moments) != {"step", *_MOMENTS}:
        raise _unfit("it does not hold the steps and moments of AdamW")
    step = moments["step"]
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        raise _unfit("a number of steps is none")
    if not bool(step.isfinite().all() and step >= 0):
        raise _unfit("a number of steps is none")
    if step > steps:
        raise _unfit(f"a parameter had {float(step):g} updates, in a run of {steps} steps")
    for name in _MOMENTS:
        moment = moments[name]
        if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
            raise _unfit(f"{name} has not the shape of its parameter, {tuple(parameter.shape)}")
        if moment.dtype != parameter.dtype:
            raise _unfit(f"{name} is not in {parameter.dtype}, as its parameter is")
        if not bool(moment.isfinite().all()):
            raise _unfit(f"{name} is not finite")
    if not bool((moments["exp_avg_sq"] >= 0).all()):
        raise _unfit("exp_avg_sq, a mean of squares, is below zero")
