"""The CMS: MLP levels written at different periods by the task's own gradient, combined by gates or in a chain.

Level l: out = in + delta, delta = W_out gelu(W_in LayerNorm(in) + b_in) + b_out. Every p_l tokens Delta_l <- Delta_l
- (lr_l / p_l) sum_t g_t dCE_t/dtheta_l over the period, theta_l its two matrices; with a `max_change` c, which neither
paper has, then Delta_l <- Delta_l min(1, c ||theta_l|| / ||Delta_l||). `gated` mixes the levels' outputs
with learned per-token weights (the study's description); `chain` feeds level after level ("Nested Learning", arXiv
2512.24695, Eq. 70).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookPoint, HookRegistry, HookSpec
from hopeprobe.hooks.points import Cadence
from hopeprobe.model.config import CMSLevel, ModelConfig
from hopeprobe.model.precision import Rounded, linear
from hopeprobe.model.state import Change, LevelState, on_host


@dataclass
class Tap:
    """Where a level's inner gradient is taken, and the factors that turn it into gradients of its matrices."""

    layer: int
    level: int
    pre: Tensor  # (B, C, h): W_in LayerNorm(in) + b_in, in the graph
    delta: Tensor  # (B, C, d): before its hook, in the graph
    input: Tensor  # (B, C, d): LayerNorm(in), detached
    hidden: Tensor  # (B, C, h): gelu(pre), detached


def _tappable(x: Tensor) -> Tensor:
    """A tensor whose gradient can be asked for: where nothing upstream needs one, it becomes a leaf that does."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _shown(point: HookPoint, meta: Tensor, change: Change) -> Change:
    """Show meta + change to a hook; only an edit may move the change, by so much as a rounding."""
    if not point.active:
        return change
    full = meta + change.matrix()
    edited = point(full)
    return change if edited is full else Change.of(edited - meta)


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    """Their sum, rounded as x is."""
    return x if y is None else (x + y).to(x.dtype)


class Level(nn.Module):
    """One level's meta weights, and how it reads and writes."""

    def __init__(self, config: ModelConfig, spec: CMSLevel, registry: HookRegistry, prefix: str) -> None:
        super().__init__()
        self.spec = spec
        self.written = config.parts.levels
        d, h = config.dim, config.dim * config.cms_multiplier
        self.norm = nn.LayerNorm(d)
        self.w_in = nn.Parameter(torch.empty(h, d))
        self.b_in = nn.Parameter(torch.empty(h))
        self.w_out = nn.Parameter(torch.empty(d, h))
        self.b_out = nn.Parameter(torch.empty(d))

        def point(name: str, dims: str, equation: str, cadence: Cadence = "tick") -> HookPoint:
            return registry.add(f"{prefix}.{name}", HookSpec(tuple(dims.split()), cadence, True, equation))

        self.hook_in = point(
            "hook_in", "batch pos d_model", "in: the residual stream (gated) or the level before (chain)"
        )
        self.hook_delta = point(
            "hook_delta", "batch pos d_model", "delta = W_out gelu(W_in LayerNorm(in) + b_in) + b_out"
        )
        self.hook_out = point("hook_out", "batch pos d_model", "out = in + delta")
        if not self.written:
            return
        rule = f"every {spec.period} tokens: Delta <- Delta - (lr/{spec.period}) sum_t g_t dCE_t/dW"
        if spec.max_change is not None:
            rule += f", ||Delta|| <= {spec.max_change:g} ||W||"
        self.hook_write_gate = point("hook_write_gate", "batch pos", "g: 0 drops the token's own dCE_t")
        self.hook_fast_in = point(
            "hook_fast_in", "batch d_hidden d_model", f"W_in + Delta_in; {rule}", "write"
        )
        self.hook_fast_out = point(
            "hook_fast_out", "batch d_model d_hidden", f"W_out + Delta_out; {rule}", "write"
        )

    def init_state(self, batch: int) -> LevelState:
        """Fresh state: no difference to the meta weights, nothing accumulated."""
        h, d = self.w_in.shape
        empty = (self.w_in.new_zeros(batch, 0, width) for width in (h, d, d, h))
        return LevelState(Change.nothing(self.w_in, batch), Change.nothing(self.w_out, batch), *empty)

    def read(
        self, x: Tensor, state: LevelState, of: Rounded | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Read (B, C, d): the level's output, and pre-activation, delta, normalised input, activation for its tap."""
        x = self.hook_in(x)
        normed = self.norm(x)
        tappable = _tappable if self.written else _as_it_is
        pre = tappable(_plus(linear(normed, self.w_in, self.b_in, of), state.change_in.times(normed)))
        hidden = F.gelu(pre)
        written = state.change_out.times(hidden.to(normed.dtype))
        delta = tappable(_plus(linear(hidden, self.w_out, self.b_out, of), written))
        return self.hook_out(x + self.hook_delta(delta)), pre, delta, normed, hidden

    def write(
        self,
        state: LevelState,
        tap: Tap,
        grad_pre: Tensor,
        grad_delta: Tensor,
        end: int,
        donated: bool = False,
        skips: bool = False,
    ) -> LevelState:
        """Accumulate a tick's gated gradients; apply them when the position `end` completes a period.

        Hooks at fast weights fire whenever a period is complete, whether or not a gate was open.

        `donated` says that nobody needs `state` any more: it may be overwritten; `skips` that no outer gradient will be
        taken: then only tokens that a gradient reached are applied, those before an open token and itself.
        """
        fresh = tuple(t.to(self.w_in.dtype) for t in (grad_pre, tap.input, grad_delta, tap.hidden))
        held = (state.grad_hidden, state.input, state.grad_delta, state.hidden)
        factors = (
            fresh if held[0].shape[1] == 0 else tuple(torch.cat(p, 1) for p in zip(held, fresh, strict=True))
        )
        if end % self.spec.period:
            return LevelState(state.change_in, state.change_out, *factors)
        change_in, change_out = state.change_in, state.change_out
        # On a device the question would stall it; there what closed gates leave is added, which is zero.
        if not on_host(tap.pre) or bool(factors[0].any()) or bool(factors[2].any()):
            change_in, change_out = self._written(change_in, change_out, factors, donated, skips)
        change_in = _shown(self.hook_fast_in, self.w_in.detach(), change_in)
        change_out = _shown(self.hook_fast_out, self.w_out.detach(), change_out)
        return LevelState(change_in, change_out, *(f[:, :0] for f in factors))

    def _written(
        self,
        change_in: Change,
        change_out: Change,
        factors: tuple[Tensor, ...],
        donated: bool,
        skips: bool,
    ) -> tuple[Change, Change]:
        """What both matrices differ by after a period, of which `factors` are the gradients and what they meet."""
        step = -self.spec.learning_rate / self.spec.period
        live = None
        if skips:
            reached = (factors[2] != 0).any(
                -1
            )  # without a gradient to delta there is none to what it is made of
            live = reached if 2 * int(reached.sum()) <= reached.numel() else None  # of most, all cost less
        change_in = change_in.plus(step * factors[0], factors[1], donated, live)
        change_out = change_out.plus(step * factors[2], factors[3], donated, live)
        if self.spec.max_change is not None:
            change_in = change_in.within(self.spec.max_change * self.w_in.detach().norm())
            change_out = change_out.within(self.spec.max_change * self.w_out.detach().norm())
        return change_in, change_out


class CMS(nn.Module):
    """All levels of one block and their combination."""

    def __init__(self, config: ModelConfig, layer: int, registry: HookRegistry) -> None:
        super().__init__()
        self.layer = layer
        self.chain = config.cms_mode == "chain"
        prefix = f"blocks.{layer}.cms"
        for taken in (lv.name for lv in config.levels if hasattr(nn.ModuleDict, lv.name)):
            raise BadInputError(
                f"a CMS level cannot be called {taken!r}: torch uses the name; choose another"
            )
        self.levels = nn.ModuleDict(
            {spec.name: Level(config, spec, registry, f"{prefix}.{spec.name}") for spec in config.levels}
        )
        n = len(self.levels)
        self.mix_weight = None if self.chain else nn.Parameter(torch.empty(n, config.dim))
        self.mix_bias = None if self.chain else nn.Parameter(torch.empty(n))
        self.hook_mix: HookPoint | None = None
        if not self.chain:
            mix = HookSpec(
                ("batch", "pos", "level"),
                "tick",
                True,
                "mix = softmax(W_mix LayerNorm(in) + b_mix), sums to 1",
            )
            self.hook_mix = registry.add(f"{prefix}.hook_mix", mix)
        rule = "out of the last level" if self.chain else "sum_l mix_l out_l"
        self.hook_out = registry.add(
            f"{prefix}.hook_out", HookSpec(("batch", "pos", "d_model"), "tick", True, rule)
        )

    def level_list(self) -> list[Level]:
        """Levels in the order of the configuration."""
        return [level for level in self.levels.values() if isinstance(level, Level)]

    def read(
        self, x: Tensor, states: tuple[LevelState, ...], of: Rounded | None = None
    ) -> tuple[Tensor, list[Tap]]:
        """Read a tick (B, C, d): the output, and one tap a level."""
        taps, outs = [], []
        current = x
        for i, (level, state) in enumerate(zip(self.level_list(), states, strict=True)):
            out, pre, delta, normed, hidden = level.read(current, state, of)
            if level.written:
                taps.append(Tap(self.layer, i, pre, delta, normed.detach(), hidden.detach()))
            outs.append(out)
            if self.chain:
                current = out
        if self.mix_weight is None or self.hook_mix is None:
            return self.hook_out(outs[-1]), taps
        plain = F.layer_norm(x, x.shape[-1:])
        mix = self.hook_mix(torch.softmax(F.linear(plain, self.mix_weight, self.mix_bias), dim=-1))
        mixed = outs[0] * mix[..., :1]
        for i, out in enumerate(outs[1:], start=1):
            mixed = mixed + out * mix[..., i : i + 1]
        return self.hook_out(mixed), taps
