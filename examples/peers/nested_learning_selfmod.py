"""Self-modifying memories of the package, block `hope_selfmod`: y = M_memory(q), and no residual around it.

What follows from the package's code:

- The surprise gate never holds their writes back.
- A call writes all that is pending when it ends, so a memory's chunk is never longer than a tick, and fast
  weights are shown as they stand then. The convolution sees zeros before a call.
- They decay towards zero, by sigmoid(M_alpha(x)), where `self_mod_use_alpha` is on.
- `m_k`, `m_v`, `m_eta` and `m_alpha` get no gradient from the loss, and `m_q` none and no write either unless
  `self_mod_adaptive_q`.
- `cms_levels: []` is the block without a CMS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from nested_learning_parts import OF_TOKENS, Opening, Part, Recorder, record_mixed
from torch import Tensor, nn

from hopeprobe.hooks import HookRegistry, HookSpec

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState

MEMORY_WEIGHTS = {"w1": "w1", "w2": "w2", "skip": "w_skip"}
"""A memory's weights by the name of their hook point, as the package calls them."""


class SelfModPart(Part):
    """The memories of one block: one gate for all, open whatever the surprise."""

    name = "selfmod"
    gated = False

    def __init__(self, layer: int, block: nn.Module) -> None:
        super().__init__(layer, block)
        block.config = dataclasses.replace(block.config)  # all blocks share one, and here is the switch
        config = block.selfmod.config
        optional = {"q": config.adaptive_q, "alpha": config.use_alpha}
        self.memories = [
            m for m in ("k", "v", "q", "eta", "alpha", "memory") if optional.get(m, True)
        ]  # that are written

    def add_points(self, registry: HookRegistry, recorder: Recorder, rule: str) -> None:
        """What the memories give, their gate, and each one's weights."""
        registry.add(f"{self.prefix}.hook_out", HookSpec(OF_TOKENS, "tick", False, "y = M_memory(q)"))
        record_mixed(recorder, self.block, f"{self.prefix}.hook_out")
        self._add_gate(registry, self.prefix, "g = 1")
        for memory in self.memories:
            module = getattr(self.block.selfmod, f"m_{memory}")
            for name, theirs in MEMORY_WEIGHTS.items():
                if (linear := getattr(module, theirs)) is not None:
                    point = f"{self.prefix}.{memory}.hook_fast_{name}"
                    self._add_fast(registry, point, linear.weight, "after the writes of the tick")

    def periods(self, tick: int, whole: bool) -> Mapping[str, int]:
        """A call's tokens."""
        return {f"selfmod.{memory}": tick for memory in self.memories}

    def decays(self) -> Mapping[str, Literal["init", "zero"]]:
        """Towards zero, if at all."""
        use = self.block.selfmod.config.use_alpha
        return {f"selfmod.{memory}": "zero" for memory in self.memories} if use else {}

    def allow(self, openings: Mapping[str, Opening]) -> set[str]:
        """The package has a switch for all memories of a block."""
        self.block.config.selfmod_online_updates = openings[self.gates[0]].open
        return set()

    def release(self) -> None:
        """Switch it on."""
        self.block.config.selfmod_online_updates = True

    def holds(self, point: str) -> Callable[[BlockFastState], Tensor]:
        """In the state of the memory."""
        *_, memory, name = point.split(".")
        return partial(_weight, memory, MEMORY_WEIGHTS[name.removeprefix("hook_fast_")])


def _weight(memory: str, weight: str, state: BlockFastState) -> Tensor:
    tensor = getattr(getattr(state.selfmod_state, memory), weight)
    return tensor if tensor.ndim == 2 else tensor[0]  # without a batch until it is first written
