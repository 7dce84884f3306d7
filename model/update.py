"""One optimiser step: from a batch of windows to changed weights, with one look of the host at what it gave.

On a CPU the look comes before the update, which is not made where something is not finite. On a device to look is to
wait for all work under way, so it comes last: the update was held on the device itself then, by the flag that loss
scaling has for it (`found_inf` of the fused AdamW), and changed nothing either.

A step on a device reads its tokens and its learning rate from memory that stays where it is, so that it can be recorded
once and done again (`captured.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hopeprobe.model.finite import first_not_finite
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import Watch, norm_ratio
from hopeprobe.model.run import Run, diverged
from hopeprobe.model.state import detach_state
from hopeprobe.model.truncation import segments


class Look(NamedTuple):
    """What the host sees of a step."""

    norm: float  # of the gradient, before clipping
    lowest: float  # loss of any token, nats
    gate: float
    retention: float
    ratio: float  # of fast to meta weights
    parts: tuple[float, ...]  # mean losses of the windows' parts that a gradient flows through; they add up

    @classmethod
    def at(cls, seen: Tensor) -> Look:
        """Bring it over: the one time in a step that the host waits."""
        norm, lowest, gate, retention, ratio, *parts = seen.cpu().tolist()
        return cls(norm, lowest, gate, retention, ratio, tuple(parts))

    @property
    def loss(self) -> float:
        """The mean over the windows' tokens, or the first sum that is not finite."""
        total = 0.0
        for part in self.parts:
            total += part
            if not math.isfinite(total):
                break
        return total


def gradients(model: HopeModel, tokens: Tensor, watch: Watch) -> Tensor:
    """Leave the gradient of a batch's mean loss with the weights; what `Look` names, where it was computed."""
    model.zero_grad(set_to_none=True)
    state = model.init_state(tokens.shape[0])
    parts, lowest = [], []
    # In this thread on a device too: what is watched, and what is recorded, is so by thread.
    with watch.on(), torch.autograd.set_multithreading_enabled(False):
        for part in segments(model.config, tokens):
            out = model(part, state=state)
            mean = out.losses.sum() / tokens[:, 1:].numel()
            parts.append(mean.detach())
            lowest.append(out.losses.detach().min())  # every token of a training window is scored
            mean.backward()
            state = detach_state(out.state)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    means = [watch.mean("gate"), watch.mean("alpha"), norm_ratio(model, state)]
    return torch.stack([norm, torch.stack(lowest).amin(), *means, *parts])


class Step(Protocol):
    """How a run makes a step."""

    def __call__(self, tokens: Tensor, rate: float) -> Look:
        """Change the run's weights by a batch (B, T + 1) of the host's, or raise DivergedError and change nothing."""


class HostStep:
    """A step of a model on the CPU."""

    def __init__(self, run: Run) -> None:
        self.run, self.watch = run, Watch(run.model)

    def __call__(self, tokens: Tensor, rate: float) -> Look:
        """Look, then change the weights."""
        run = self.run
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        seen = gradients(run.model, tokens, self.watch)
        look = Look.at(seen)
        check_finite(run, look, tokens)
        torch.nn.utils.clip_grads_with_norm_(list(run.model.parameters()), run.config.clip, seen[0])
        run.optimizer.step()
        return look


class DeviceStep:
    """A step of a model on a device, of which the host looks at the end alone.

    Attributes:
        tokens: (B, T + 1), rate: (), the input of `work`, in memory that stays where it is.
        held: (), 1 where the weights shall stay as they are, whatever the gradient.

    """

    def __init__(self, run: Run) -> None:
        self.run, self.watch = run, Watch(run.model)
        like = run.model.embed.detach()
        self.tokens: Tensor | None = None
        self.held = like.new_zeros(())
        self.rate = like.new_zeros(())
        for group in run.optimizer.param_groups:
            group["lr"] = self.rate

    def __call__(self, tokens: Tensor, rate: float) -> Look:
        """Do the work, then look."""
        self.fill(tokens, rate)
        return self.looked(self.work(), tokens)

    def fill(self, tokens: Tensor, rate: float) -> None:
        """Put a step's input where `work` reads it; the host does not wait."""
        self.run.model.check_tokens(tokens)
        device = self.held.device
        if self.tokens is None or self.tokens.shape != tokens.shape:
            self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
        self.tokens.copy_(tokens.pin_memory() if device.type == "cuda" else tokens, non_blocking=True)
        self.rate.fill_(rate)

    def work(self) -> Tensor:
        """All that a step is on the device: what was seen, and the weights changed unless that was not finite."""
        run = self.run
        assert self.tokens is not None
        seen = gradients(run.model, self.tokens, self.watch)
        norm, parts = seen[0], seen[len(Look._fields) - 1 :]
        sound = norm.isfinite() & parts.isfinite().all()
        # Of a norm that is not finite nothing is clipped: it would spread over all gradients, which are searched.
        kept = torch.where(sound, norm, 0.0)
        torch.nn.utils.clip_grads_with_norm_(list(run.model.parameters()), run.config.clip, kept)
        optimizer = run.optimizer
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = torch.where(sound, self.held, 1.0)  # type: ignore[attr-defined]
        optimizer.step()
        return seen

    def looked(self, seen: Tensor, tokens: Tensor) -> Look:
        """Look at what `work` gave. Raises DivergedError where it is not finite."""
        look = Look.at(seen)
        check_finite(self.run, look, tokens)
        return look


def check_finite(run: Run, look: Look, tokens: Tensor, first: int = 0, of: int | None = None) -> None:
    """Raise DivergedError, which says where that began, for a step whose loss or gradient is not finite.

    `tokens`, `first` and `of` as `first_not_finite` takes them.
    """
    if not math.isfinite(look.loss):
        where = first_not_finite(run.model, tokens, first, of) or "in no hook point: the weights of the head"
        raise diverged(
            run, run.step + 1, f"the loss is {look.loss}; the first value that is not finite: {where}"
        )
    if not math.isfinite(look.norm):
        bad = [
            n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        hidden = first_not_finite(
            run.model, tokens, first, of
        )  # one that the loss does not see yet, as a rule
        began = f"; the first value that is not finite: {hidden}" if hidden else ""
        raise diverged(
            run,
            run.step + 1,
            f"the gradient is not finite, in {', '.join(bad[:3]) or 'its norm alone'}{began}",
        )
