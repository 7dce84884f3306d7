"""What training watches of the model's own mechanisms, read through the same hook points that everybody has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hopeprobe import ranks
from hopeprobe.hooks import HookPoint, watching_finite
from hopeprobe.model.block import Block
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import State
from hopeprobe.tokens import EvalBatch, EvalWindows

HookRequest = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]

#: Every write gate of every mechanism.
WRITE_GATES = "blocks.*.hook_write_gate"


def write_gates(model: HopeModel) -> dict[str, str]:
    """Patterns of hook points by mechanism: `selfmod`, whose memories share a gate, `titans`, `cms` and its levels."""
    periods = model.config.periods
    found = {}
    for mechanism in ("selfmod", "titans"):
        if any(name.startswith(f"{mechanism}.") for name in periods):
            found[mechanism] = f"blocks.*.{mechanism}.hook_write_gate"
    levels = [name for name in periods if name.startswith("cms.")]
    if levels:
        found["cms"] = "blocks.*.cms.*.hook_write_gate"
    return found | {name: f"blocks.*.{name}.hook_write_gate" for name in levels}


def close(gate: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001 - the signature of a hook
    """A hook that closes a write gate: the token is read and not written."""
    return torch.zeros_like(gate)


def freeze_hooks(model: HopeModel) -> list[HookRequest]:
    """Hooks that stop all writes of a model; none where the model has no writes."""
    return [(WRITE_GATES, close)] if model.config.writes else []


class HeldOut(NamedTuple):
    """What a model gives on windows it was not trained on."""

    loss: float  # mean cross-entropy, nats a token
    lowest: float  # the lowest of any token
    share_written: float  # of tokens that the gate lets through; NaN where nothing writes
    not_finite: tuple[
        str, ...
    ] = ()  # windows with a loss that is not: each with its first token, layer and memory


def gate_points(model: HopeModel) -> list[str]:
    """Hook points that show which tokens the gate lets through: of `assoc` one a layer."""
    if not model.config.writes:
        return []
    if model.config.gate.rule != "assoc":
        return ["hook_gate"]
    suffixes = (".selfmod.hook_write_gate", ".titans.hook_write_gate")
    return [name for name in model.hook_dict if name.endswith(suffixes)]


@torch.no_grad()
def held_out(model: HopeModel, windows: EvalWindows, frozen: bool = False) -> HeldOut:
    """Score windows, each from a fresh state; `frozen` closes every write gate. Ranks share the windows out.

    A loss that is not finite makes the mean NaN: no window is left out, those that are to blame are named.
    """
    total, lowest, count = 0.0, math.inf, 0
    suspects: list[tuple[EvalBatch, int]] = []
    points, passed = gate_points(model), list[Tensor]()
    device = model.embed.device

    def gather(gate: Tensor, hook: HookPoint) -> None:  # noqa: ARG001 - the signature of a hook
        passed.append(gate.sum())

    hooks: list[Any] = [(points, gather)] if points else []
    hooks += freeze_hooks(model) if frozen else []
    with model.hooks(fwd_hooks=hooks, allow_unfired=True):
        for batch in ranks.shared(windows):
            tokens = model.check_tokens(torch.from_numpy(batch.tokens)).to(device)
            out = model(tokens, torch.from_numpy(batch.lengths).to(device))
            scored = out.scored.cpu()
            losses = out.losses.cpu()[scored]
            bad = (scored & ~out.losses.cpu().isfinite()).any(1)
            suspects += [(batch, row) for row in bad.nonzero()[:, 0].tolist()]
            total += float(losses.double().sum())
            lowest = min(lowest, float(losses.min()))
            count += len(losses)
    open_gates = math.fsum(torch.stack(passed).cpu().tolist()) if passed else 0.0
    named = tuple(_named(model, batch, row, frozen) for batch, row in suspects)
    gathered = ranks.gathered((total, lowest, count, open_gates, named))
    totals, lows, counts, opened, names = zip(*gathered, strict=True)
    share = math.fsum(opened) / (sum(counts) * len(points)) if points else math.nan
    not_finite = tuple(name for of_rank in names for name in of_rank)
    mean = math.nan if not_finite else math.fsum(totals) / sum(counts)
    return HeldOut(mean, min(lows), share, not_finite)


def _named(model: HopeModel, batch: EvalBatch, row: int, frozen: bool) -> str:
    """A window, and where its first value that is not finite is: it is run once more, by itself."""
    length = int(batch.lengths[row])
    tokens = torch.from_numpy(batch.tokens[row : row + 1, : length + 1]).to(model.embed.device)
    hooks: list[Any] = list(freeze_hooks(model)) if frozen else []
    with model.hooks(hooks, allow_unfired=True), watching_finite(model, [length]) as origins:
        model(tokens)
    start = int(batch.start[row])
    where = f"first {origins[0]}" if 0 in origins else "finite by itself"
    return f"document {int(batch.document[row])}, window from token {start}: {where}"


class Watch:
    """Means of the gate and of retention over the tokens of a forward pass; NaN where the model has none."""

    def __init__(self, model: HopeModel) -> None:
        self.model = model
        self.sums: dict[str, list[Tensor]] = {"gate": [], "alpha": []}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch what runs inside."""
        self.sums = {key: [] for key in self.sums}
        if not self.model.config.writes:
            yield
            return

        def gather(tensor: Tensor, hook: HookPoint) -> None:
            self.sums["alpha" if hook.name.endswith("hook_alpha") else "gate"].append(tensor.detach().mean())

        names = [name for name in self.model.hook_dict if name.endswith(".hook_alpha")]
        with self.model.hooks(fwd_hooks=[([*names, *gate_points(self.model)], gather)]):
            yield

    def mean(self, key: str) -> Tensor:
        """Mean over ticks and layers, a scalar where the model is."""
        return torch.stack(self.sums[key]).mean() if self.sums[key] else _none(self.model)


def _none(model: HopeModel) -> Tensor:
    return model.embed.detach().new_full((), math.nan)


@torch.no_grad()
def norm_ratio(model: HopeModel, state: State) -> Tensor:
    """Mean over layers and sequences of |theta_fast| / |theta_meta| of all memories' weights, a scalar; NaN without."""
    ratios = []
    for i, layer in enumerate(state.layers):
        titans = cast(Block, model.blocks[i]).titans
        if titans is not None and layer.titans is not None:
            pairs = ((titans.memory.w2, layer.titans.w2), (titans.memory.w1, layer.titans.w1))
            size = torch.stack([now.square().sum((1, 2)) for _, now in pairs]).sum(0)
            ratios.append((size / sum(base.square().sum() for base, _ in pairs)).sqrt().mean())
        selfmod = cast(Block, model.blocks[i]).selfmod
        if selfmod is None or layer.selfmod is None:
            continue
        fast, meta = model.embed.new_zeros(state.pending.shape[0]), model.embed.new_zeros(())
        for weights, group in zip(selfmod.stacked(), layer.selfmod.groups, strict=True):
            if group is None:
                continue
            for base, now in zip(weights, group, strict=True):
                fast = fast + now.square().flatten(1).sum(1)
                meta = meta + base.square().sum()
        if any(group is not None for group in layer.selfmod.groups):
            ratios.append((fast / meta).sqrt().mean())
    return torch.stack(ratios).mean() if ratios else _none(model)
