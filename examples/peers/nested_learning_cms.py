"""CMS levels of the package: a chain, each out = in + W_out gelu(W_in LayerNorm(in) + b_in) + b_out.

In `hope_selfmod`, `hope_attention` and `hope_hybrid` alike. What follows from the package's code:

- A level is written when its `update_period` of tokens is there, within a call or over several; all of its
  parameters are, the biases and its LayerNorm too, though hook points show the two matrices alone.
- A write moves the level's output against the teach signal: the gradient of the call's mean loss to what the *head*
  reads, the same for every block, or with `train.per_layer_teach_signal` to the block's own output. What that gives
  for the parameters goes through the level's optimiser, which remembers earlier writes.
- The surprise gate holds a write back by the call, not the token: it asks the surprise of the call in which the
  level's period is full. What earlier calls left pending is written or dropped with it, whatever their own surprise.
- Where a tick is a whole window, a level of a longer period is never written, or with `cms_flush_partial_at_end`
  written at the end of each.
- Fast weights are what is added to the level's own weights, and do not decay.
- In training a level's output is scaled down to norm 1 where it is larger; a model in evaluation mode does not, and
  neither does this.
- `train.algorithm_mode: boundary_state_grad_through_write` changes the writes of `hope_attention` alone: there they
  are plain gradient steps without momentum, and training's gradient goes through them, as that of `loss` here does.
  Fused attention has no second derivative, so the package can train so with PyTorch's plain kernel only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from nested_learning_parts import OF_TOKENS, Opening, Part, Recorder
from torch import Tensor, nn

from hopeprobe.hooks import HookRegistry, HookSpec

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState

CMS_WEIGHTS = {"in": "net.1.weight", "out": "net.3.weight"}


class CMSPart(Part):
    """The levels of one block, each with a gate of its own."""

    name = "cms"

    def __init__(self, layer: int, block: nn.Module) -> None:
        super().__init__(layer, block)
        self.levels = {spec.name: spec.update_period for spec in block.config.cms_levels}

    def add_points(self, registry: HookRegistry, recorder: Recorder, rule: str) -> None:
        """What each level reads, adds and gives, its gate, and its two matrices."""
        for level in self.levels:
            prefix, module = f"{self.prefix}.{level}", self.block.cms.blocks[level]
            for name, equation in (
                ("in", "out of the level before"),
                ("delta", "W_out gelu(W_in LayerNorm(in) + b_in) + b_out"),
                ("out", "in + delta"),
            ):
                registry.add(f"{prefix}.hook_{name}", HookSpec(OF_TOKENS, "tick", False, equation))
            recorder.takes(module, f"{prefix}.hook_in")
            recorder.gives(module.net, f"{prefix}.hook_delta")
            recorder.gives(module, f"{prefix}.hook_out")
            self._add_gate(registry, prefix, rule)
            parameters = dict(module.named_parameters())
            for name, key in CMS_WEIGHTS.items():
                written = f"W_{name} + what was written"
                self._add_fast(registry, f"{prefix}.hook_fast_{name}", parameters[key], written)

    def periods(self, tick: int, whole: bool) -> Mapping[str, int]:
        """Its own, and a call's at least, as a call reads before it writes; of a window that is flushed no more."""
        flushed = whole and self.block.config.cms_flush_partial_at_end
        return {f"cms.{v}": tick if flushed else max(period, tick) for v, period in self.levels.items()}

    def allow(self, openings: Mapping[str, Opening]) -> set[str]:
        """Levels by name."""
        return {level for level in self.levels if openings[f"{self.prefix}.{level}.hook_write_gate"].open}

    def holds(self, point: str) -> Callable[[BlockFastState], Tensor]:
        """The meta weights and what was added to them."""
        *_, level, name = point.split(".")
        return partial(_weight, self.fast[point], level, CMS_WEIGHTS[name.removeprefix("hook_fast_")])


def _weight(meta: nn.Parameter, level: str, key: str, state: BlockFastState) -> Tensor:
    return meta + state.cms_params[level][key]
