"""One block of the model: what mixes positions, then what follows it, as the variant says."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookRegistry, HookSpec
from hopeprobe.model.attention import MLP, Attention
from hopeprobe.model.cms import CMS, Level, Tap
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.memories import Generated, Weights
from hopeprobe.model.precision import Rounded, rounded
from hopeprobe.model.selfmod import SelfMod
from hopeprobe.model.state import LayerState
from hopeprobe.model.titans import Made, Titans


class ToWrite(NamedTuple):
    """What one layer's reading leaves for its write."""

    generated: Generated | None
    taps: list[Tap]
    titans: Made | None


class Ready(NamedTuple):
    """What a window makes of a block's weights once, for all its ticks."""

    memories: tuple[Weights, ...] | None  # of self-modifying memories, stacked
    rounded: Rounded | None  # those that no tick writes, where activations are rounded


class Block(nn.Module):
    """One pre-norm residual block: self-modification then CMS, or attention then MLP."""

    def __init__(self, config: ModelConfig, index: int, registry: HookRegistry) -> None:
        super().__init__()
        self.config = config
        parts = config.parts
        self.norm = nn.LayerNorm(config.dim) if config.residual else None
        self.selfmod: SelfMod | None = None
        self.cms: CMS | None = None
        self.attention: Attention | None = None
        self.mlp: MLP | None = None
        self.titans: Titans | None = None
        dims = ("batch", "pos", "d_model")
        prefix = f"blocks.{index}"
        self.hook_pre = registry.add(
            f"{prefix}.hook_resid_pre", HookSpec(dims, "tick", True, "x: what enters the block")
        )
        if parts.mixer == "selfmod":
            self.selfmod = SelfMod(config, registry, f"{prefix}.selfmod")
        elif parts.mixer == "titans":
            self.titans = Titans(config, registry, f"{prefix}.titans")
        else:
            self.attention = Attention(config, config.context)
        mid = f"x + {parts.mixer}(LayerNorm(x))" if config.residual else f"{parts.mixer}(x)"
        self.hook_mid = registry.add(f"{prefix}.hook_resid_mid", HookSpec(dims, "tick", True, mid))
        post = "resid_mid"
        if parts.channel == "cms":
            self.cms = CMS(config, index, registry)
            post = "cms(resid_mid), whose levels each add to their input"
        elif parts.channel == "mlp":
            self.mlp_norm = nn.LayerNorm(config.dim)
            self.mlp = MLP(config)
            post = "resid_mid + mlp(LayerNorm(resid_mid))"
        self.hook_post = registry.add(f"{prefix}.hook_resid_post", HookSpec(dims, "tick", True, post))

    def written_levels(self) -> list[Level]:
        """CMS levels that are written; all of them, or none."""
        return self.cms.level_list() if self.cms is not None and self.config.parts.levels else []

    def ready(self, activations: torch.dtype | None) -> Ready:
        """Prepare the weights for a window: stacked, and rounded to what its activations are."""
        taken: list[nn.Parameter | None] = []
        if activations is not None:
            layers = [*(self.cms.level_list() if self.cms else ()), self.mlp]
            taken = [w for one in layers if one for w in (one.w_in, one.b_in, one.w_out, one.b_out)]
            attention = self.titans.attention if self.titans else self.attention
            taken += [attention.w_qkv, attention.w_out] if attention else []
            taken += [self.titans.w_q, self.titans.w_k, self.titans.w_v] if self.titans else []
            taken += [self.selfmod.w_q] if self.selfmod else []
        return Ready(self.selfmod.stacked() if self.selfmod else None, rounded(taken, activations))

    def init_state(self, batch: int) -> LayerState:
        """Fresh state of this block."""
        attention = self.titans.attention if self.titans else self.attention
        return LayerState(
            self.selfmod.init_state(batch) if self.selfmod else None,
            tuple(level.init_state(batch) for level in self.cms.level_list()) if self.cms else (),
            attention.init_state(batch) if attention else None,
            self.titans.init_state(batch) if self.titans else None,
        )

    def read(
        self,
        x: Tensor,
        ready: Ready,
        state: LayerState,
        position: int,
        outer: bool = True,
        late: bool = False,
    ) -> tuple[Tensor, ToWrite, LayerState]:
        """Read a tick; the state returned differs only in what reading itself moves (attention's cache).

        `late` leaves to a write that skips what closed gates will not need.
        """
        x = self.hook_pre(x)
        normed = x if self.norm is None else self.norm(x)
        generated, titans, taps = None, None, list[Tap]()
        weights, of = ready
        if self.selfmod is not None and weights is not None:
            if state.selfmod is None:
                raise BadInputError(
                    "the state was made by another variant: it has no self-modifying memories"
                )
            mixed, generated = self.selfmod.read(normed, weights, state.selfmod, outer, late, of)
        elif self.titans is not None:
            if state.titans is None:
                raise BadInputError("the state was made by another variant: it has no Titans memory")
            mixed, titans, seen = self.titans.read(normed, state.titans, state.attention, position, outer, of)
            state = state._replace(attention=seen)
        else:
            if state.attention is None:
                raise BadInputError("the state was made by another variant: it has no attention cache")
            mixed, cache = cast(Attention, self.attention).read(normed, state.attention, position, of)
            state = state._replace(attention=cache)
        x = self.hook_mid(x + mixed if self.config.residual else mixed.to(x.dtype))
        if self.cms is not None:
            x, taps = self.cms.read(x, state.cms, of)
        elif self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x), of)
        return self.hook_post(x), ToWrite(generated, taps, titans), state

    def assoc_surprise(self, made: ToWrite) -> Tensor:
        """|gradient of the associative loss| of each token (B, n), at the fast weights that the tick read."""
        if self.selfmod is not None and made.generated is not None:
            return self.selfmod.surprise(made.generated)
        if self.titans is not None and made.titans is not None:
            return self.titans.surprise(made.titans)
        raise BadInputError("the gate rule 'assoc' needs memories that are written")
