"""A step recorded once on a device and done again without Python: forward, backward, clipping and update.

A recording repeats what the device was told, with the same memory: the batch and the learning rate are put where it
reads them (`update.py`). Whatever else it was made with, the weights' and the optimiser's memory, configuration and
hooks, must be as it was, or it is made anew; while somebody's hooks wait for Python, steps are made without it.

It is not trusted: the first steps are made both ways from the same weights, and it is kept only if loss, gradient and
update agree. Where they do not, or it cannot be made, the run goes on without, and says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hopeprobe.model.run import Run
from hopeprobe.model.state import on_host
from hopeprobe.model.update import DeviceStep, HostStep, Look, Step

#: Steps made both ways: of one alone, input that was recorded along with the work would not be told from input.
PROOFS = 2
#: How far the two ways may differ, as a share. Sums may come in another order (1e-6 of them, in bf16 4e-3), and an
#: update divides by the gradient's own size, so that where that is a rounding it may turn around. A stale batch or
#: rate, or gradients that are added to the last ones, differ by tens of percent.
LOSS_APART, GRADIENT_APART, UPDATE_APART = 1e-3, 2e-2, 0.1


class Recorder(Protocol):
    """How a kind of device records work."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work a few times as it will be recorded: libraries set themselves up, and caches fill."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Do it once more, recording: its result, and what does it again, into the same memory."""


class CudaRecorder:
    """CUDA graphs, as PyTorch's notes on them say: warmed up on a side stream, with memory of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, work: Callable[[], object]) -> None:
        """Three times, on a stream beside the current one."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    work()
            torch.cuda.current_stream().wait_stream(side)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """A graph of the work."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()  # what the warm-up needed the graph needs again, as memory of its own
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                seen = work()
        return seen, graph.replay


def recorder_of(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CapturedStep(DeviceStep):
    """A step on a device that is recorded and done again; without, where that fails."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        super().__init__(run)
        self.recorder: Recorder | None = recorder
        self.made_with: tuple[Any, ...] | None = None
        self.proven = 0
        self.seen = self.held
        self.replay: Callable[[], None] = lambda: None
        self.gradients: list[Tensor | None] = []

    def __call__(self, tokens: Tensor, rate: float) -> Look:
        """Change the weights by a batch, one way or the other."""
        self.fill(tokens, rate)
        return self.looked(self._done(), tokens)

    def _done(self) -> Tensor:
        if self.recorder is None or self._awaited():
            return self.work()
        if not self._ready(self.recorder):
            return self.work()
        if self.proven < PROOFS:
            return self._both_ways()
        self._again()
        return self.seen

    def _awaited(self) -> bool:
        """Does anybody's Python wait in the middle of a step."""
        model = self.run.model
        return any(point.active or point.awaited for point in model.hook_dict.values()) or any(
            p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()
        )

    def _ready(self, recorder: Recorder) -> bool:
        """Is there a recording of what a step is now; made where there is none."""
        if self.made_with is not None and self.made_with == self._with():
            return True
        self._forget()
        why = ""
        try:
            with self._holding():
                recorder.warm_up(self.work)  # the optimiser's state comes to be here
                self.seen, self.replay = recorder.record(self.work)
        except RuntimeError as error:
            why = f"the step could not be recorded ({type(error).__name__}: {error})"
        if why:
            self._give_up(why)
            return False
        self.gradients = [p.grad for p in self.run.model.parameters()]
        self.made_with, self.proven = self._with(), 0
        return True

    def _with(self) -> tuple[Any, ...]:
        """All that a recording was made with: tensors by where they lie, the rest by what it is."""
        model, optimizer = self.run.model, self.run.optimizer
        settings = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups
        ]
        rates = [id(group["lr"]) for group in optimizer.param_groups]
        assert self.tokens is not None
        tensors = [self.tokens, self.rate, self.held, *model.parameters(), *model.buffers(), *self._moments()]
        return (
            tuple(self.tokens.shape), model.config, model.activations, model.gate, self.run.config.clip,
            tuple(p.requires_grad for p in model.parameters()), tuple(t.data_ptr() for t in tensors), settings, rates,
        )  # fmt: skip

    def _moments(self) -> Iterator[Tensor]:
        for state in self.run.optimizer.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor))

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Nothing that is done inside changes a weight."""
        self.held.fill_(1.0)
        try:
            yield
        finally:
            self.held.fill_(0.0)

    def _again(self) -> None:
        self.replay()
        for parameter, gradient in zip(self.run.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient  # where a step without recording may have put another

    @torch.no_grad()
    def _kept(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.run.model.parameters(), *self._moments())]

    @torch.no_grad()
    def _restore(self, kept: list[Tensor]) -> None:
        for t, before in zip((*self.run.model.parameters(), *self._moments()), kept, strict=True):
            t.copy_(before)

    def _both_ways(self) -> Tensor:
        """A step without recording, and from the same weights by it: kept if they agree."""
        before: list[Tensor] = []
        try:
            before = self._kept()
            seen = self.work().clone()
            look = Look.at(seen)
            if not (math.isfinite(look.loss) and math.isfinite(look.norm)):
                return seen  # nothing was changed, and nothing would be proved
            after = self._kept()
            self._restore(before)
            self._again()
            apart = _apart(look, Look.at(self.seen), before, after, list(self.run.model.parameters()))
        except RuntimeError as error:  # no memory for it, as a rule
            if before:
                self._restore(before)
            why = f"the recorded step could not be tried ({type(error).__name__}: {error})"
        else:
            if apart is None:
                self.proven += 1
                return self.seen
            self._restore(after)
            self._give_up(f"the recorded step is another one: {apart}")
            return seen
        self._give_up(why)  # here, where nothing that failed is held any more
        return self.work()

    def _forget(self) -> None:
        self.made_with, self.gradients, self.replay, self.seen = None, [], lambda: None, self.held
        self.run.model.zero_grad(set_to_none=True)

    def _give_up(self, why: str) -> None:
        self._forget()
        self.recorder = None
        warnings.warn(
            f"{why}; training goes on without recording, to the same result and slower. To keep it from trying: "
            "train(..., capture=False), or --no-capture",
            RuntimeWarning,
            stacklevel=2,
        )


@torch.no_grad()
def _apart(
    one: Look, other: Look, before: list[Tensor], after: list[Tensor], now: list[nn.Parameter]
) -> str | None:
    """How the other way to make a step differs by more than a rounding; None where it does not.

    The weights come first in `before` and `after`, the step without recording; `now` they are as the other made them.
    """
    for what, a, b, limit in (
        ("loss", one.loss, other.loss, LOSS_APART),
        ("norm of the gradient", one.norm, other.norm, GRADIENT_APART),
    ):
        if not abs(a - b) <= limit * abs(a):
            return f"the {what} is {b:.6g}, and {a:.6g} without"
    weights = after[: len(now)]
    size, off = (
        sum(float((x - y).double().square().sum()) for x, y in zip(made, weights, strict=True)) ** 0.5
        for made in (before[: len(now)], now)
    )
    return None if off <= UPDATE_APART * size else f"the update is off by {off:.3g}, of {size:.3g}"


def step_of(run: Run, capture: bool = True) -> Step:
    """How a run makes its steps where its weights are; `capture`: recorded, where something records."""
    device = run.model.embed.device
    if on_host(run.model.embed):
        return HostStep(run)
    recorder = recorder_of(device) if capture else None
    return DeviceStep(run) if recorder is None else CapturedStep(run, recorder)
