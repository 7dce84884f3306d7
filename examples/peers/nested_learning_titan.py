"""The package's Titans memory, in block `hope_hybrid` and in the model `type: titan`: y + M(y), y from attention.

    M(y) = LayerNorm(W1 gelu(W2 y + b2) + b1)

What follows from the package's code, none of which is Titans' rule:

- It has no retention and no gate on its output: fast weights are what is added to its own weights, biases and
  LayerNorm included, and nothing makes them less. Hook points show the two matrices.
- A write is one step of the level's optimiser, with momentum, on the mean of |M(y) - target|^2 over the tokens of the
  call. target = S(y, M(y), e) - e in `hope_hybrid`, and S(y, M(y), e) + e, of the other sign, in `type: titan`; e is
  the teach signal (see `nested_learning_cms`), S the `self_modifier`.
- `self_modifier` makes targets alone, which no gradient passes: nothing ever changes it, and it is shown as
  `titans.self_modifier` among the weights.
- It is written by calls and not by tokens: `titan_level.update_period` counts passes of the block, of which a call has
  two, as it reads before it writes. The first call always writes, `warmup_steps` apart, and then every
  ceil(update_period / 2)-th. `hook_fast_*` fires where a period ends, with what the weights then are.
- The surprise gate asks the call, and with the metric `l2` each token too: those under the threshold are left out of a
  write's mean, and `titans.hook_write_gate` shows that. A hook may close the gate of a call or open it for all tokens.
  Where clipped signals leave every token of an open call out (`per_layer_teach_signal` with `teach_clip` under the
  threshold) the gate shows none, and the call still writes: by momentum alone.
- `type: titan` is read window by window, whatever `train.online_updates` says, and with one teach signal for all
  layers, whatever `train.per_layer_teach_signal` says. So its reads never see a write of their own window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from nested_learning_parts import OF_TOKENS, Opening, Part, Recorder
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookRegistry, HookSpec

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState

TITAN_WEIGHTS = {"w1": "net.2.weight", "w2": "net.0.weight"}
LEVEL = "titan"
"""What the package calls the memory where writes are allowed or not, whatever its level's name."""


class TitanPart(Part):
    """The memory of one block."""

    name = "titans"

    def __init__(self, layer: int, block: nn.Module) -> None:
        super().__init__(layer, block)
        self.spec = block.config.titan_level
        self.threshold, self.metric = block.surprise_threshold, block.surprise_metric
        same = [s.name for s in getattr(block.config, "cms_levels", ()) if s.name.startswith(LEVEL)]
        if same:
            raise BadInputError(
                f"the CMS level {same[0]!r} begins with {LEVEL!r}, so the package cannot write it apart from the memory"
            )

    def add_points(self, registry: HookRegistry, recorder: Recorder, rule: str) -> None:
        """What the memory is asked and gives, its gate, and its two matrices."""
        for name, equation in (("q", "y = LayerNorm(x + attention(x))"), ("out", "M(y)")):
            registry.add(f"{self.prefix}.hook_{name}", HookSpec(OF_TOKENS, "tick", False, equation))
        recorder.takes(self.block.titan_memory, f"{self.prefix}.hook_q")
        recorder.gives(self.block.titan_memory, f"{self.prefix}.hook_out")
        by_token = f", at tokens with |e_t| >= {self.threshold:g}" if self._by_token else ""
        self._add_gate(registry, self.prefix, rule + by_token)
        parameters = dict(self.block.titan_memory.named_parameters())
        calls = self._calls
        when = "after the call" + (f", which is written every {calls} calls" if calls > 1 else "")
        for name, key in TITAN_WEIGHTS.items():
            point = f"{self.prefix}.memory.hook_fast_{name}"
            self._add_fast(registry, point, parameters[key], f"{name.upper()} + what was written, {when}")

    @property
    def _by_token(self) -> bool:
        return self.threshold is not None and self.metric == "l2"

    @property
    def _calls(self) -> int:
        """Calls from one write to the next, at most; a call is two passes."""
        return math.ceil((self.spec.update_period + self.spec.jitter) / 2)

    def periods(self, tick: int, whole: bool) -> Mapping[str, int]:
        """Calls from one write to the next, in tokens."""
        return {"titans.memory": self._calls * tick}

    def gate(self, call: Tensor, active: Tensor) -> Tensor:
        """The call's, and with `l2` the tokens'."""
        return call * active if self._by_token else call

    def allow(self, openings: Mapping[str, Opening]) -> set[str]:
        """Without a threshold the package leaves no token out."""
        opening = openings[self.gates[0]]
        self.block.surprise_threshold = None if opening.every else self.threshold
        return {LEVEL} if opening.open else set()

    def release(self) -> None:
        """The model's own threshold."""
        self.block.surprise_threshold = self.threshold

    def holds(self, point: str) -> Callable[[BlockFastState], Tensor]:
        """The meta weights and what was added to them."""
        return partial(_weight, self.fast[point], TITAN_WEIGHTS[point.rpartition("_")[2]])


def _weight(meta: nn.Parameter, key: str, state: BlockFastState) -> Tensor:
    return meta + state.titan_params[key]
