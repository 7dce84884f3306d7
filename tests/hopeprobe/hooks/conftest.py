"""A small model with ticks, writes and every kind of hook point, for the tests of the hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hopeprobe.hooks import Hooked, HookRegistry, HookSpec, inner_backward

STREAM = ("batch", "pos", "d_model")


class Toy(Hooked, nn.Module):
    """Reads `tick` tokens at a time; `writing` overwrites its fast weights in place every second tick."""

    def __init__(self, tick: int = 4, d: int = 3) -> None:
        super().__init__()
        self.tick, self.writing, self.inner = tick, True, False
        self.mix = nn.Linear(d, d)
        registry = HookRegistry()
        self.hook_in = registry.add("hook_in", HookSpec(STREAM, "tick", True, "x"))
        self.hook_mix = registry.add("blocks.0.hook_mix", HookSpec(STREAM, "tick", True, "m = |W x|"))
        self.hook_loss = registry.add("blocks.0.hook_loss", HookSpec(("batch", "pos"), "tick", False, "l"))
        self.hook_norm = registry.add("blocks.0.hook_norm", HookSpec(("batch",), "tick", True, "n"))
        self.hook_fast = registry.add(
            "blocks.0.hook_fast", HookSpec(("batch", "out", "in"), "write", True, "F_t")
        )
        self._register_hooks(registry)

    def forward(self, x: Tensor) -> Tensor:
        fast = torch.zeros(x.shape[0], x.shape[2], x.shape[2])
        outs = []
        for i, part in enumerate(x.split(self.tick, dim=1)):
            part = self.hook_in(part) if self.hook_in.active else part
            mixed = self.hook_mix(self.mix(part))
            if self.inner:  # an inner gradient through the outer graph, as a CMS write takes it
                with inner_backward():
                    torch.autograd.grad(mixed.sum(), self.mix.weight, retain_graph=True)
            out = part + mixed  # the residual branch goes around the point
            self.hook_norm(part.norm(dim=(1, 2)))
            self.hook_loss(out.square().mean(2))
            outs.append(out)
            if self.writing and i % 2:
                with torch.no_grad():
                    fast += part.mT @ part
                    fast = self.hook_fast(fast)
        return torch.cat(outs, 1)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1))
