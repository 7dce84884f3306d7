"""The package's model with hook points: its own forward pass, run a call at a time, a row at a time.

What a call is, and what follows from the package's code, stands at the top of `nested_learning_subject`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import Hooked, HookPoint, HookRegistry, HookSpec
from hopeprobe.subject import WindowLosses

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState, ModelFastState
    from nested_learning.model import HOPEModel

MEMORY_WEIGHTS = {"w1": "w1", "w2": "w2", "skip": "w_skip"}
"""A memory's weights by the name of their hook point, as the package calls them."""
CMS_WEIGHTS = {"in": "net.1.weight", "out": "net.3.weight"}


class _Read(NamedTuple):
    """What reading a tick of one row leaves for its write."""

    losses: Tensor  # (n,) nats
    seen: dict[str, Tensor]  # (1, n, d) by hook point
    signal: dict[str, Any]  # the teach signal, as the package's forward takes it
    passes: list[bool]  # the surprise gate of each block


class HookedPeer(Hooked, nn.Module):
    """The package's model, run by its own forward pass, with hook points. Only gates can be edited.

    A gate is of a whole call: an edit opens or closes all tokens of a row's tick, else it raises BadInputError.
    """

    def __init__(self, model: HOPEModel, tick: int, per_layer_teach: bool) -> None:
        super().__init__()
        self.peer = model.eval()
        self.tick = tick
        self.per_layer_teach = per_layer_teach
        self._seen: dict[str, Tensor] | None = None  # filled while a tick is read, not while it is written
        registry = HookRegistry()
        self.hook_surprise = registry.add(
            "hook_surprise", HookSpec(("batch", "pos"), "tick", False, "s_t = CE_t")
        )
        metric, threshold = model.get_surprise_metric(), model.get_surprise_threshold()
        rule = "g = 1" if threshold is None else f"g = [{metric} surprise of the tick >= {threshold:g}]"
        # With teach signals of their own, blocks have gates of their own: there is no one gate to show.
        one_gate = threshold is None or metric != "l2" or not per_layer_teach
        gate = HookSpec(("batch", "pos"), "tick", True, rule)
        self.hook_gate = registry.add("hook_gate", gate) if one_gate else None
        for i, block in enumerate(model.blocks):
            block.config = dataclasses.replace(block.config)  # all blocks share one
            self._add_selfmod(registry, f"blocks.{i}.selfmod")
            for level in self.levels:
                self._add_level(registry, f"blocks.{i}.cms.{level}", block.cms.blocks[level], rule)
        self._register_hooks(registry)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the CMS levels, in their order."""
        return tuple(spec.name for spec in self.peer.config.cms_levels)

    @property
    def memories(self) -> tuple[str, ...]:
        """Names of the memories that are written."""
        config = self.peer.config
        optional = {"q": config.self_mod_adaptive_q, "alpha": config.self_mod_use_alpha}
        return tuple(m for m in ("k", "v", "q", "eta", "alpha", "memory") if optional.get(m, True))

    def _add_selfmod(self, registry: HookRegistry, prefix: str) -> None:
        of_tokens, of_gate = ("batch", "pos", "d_model"), ("batch", "pos")
        registry.add(f"{prefix}.hook_out", HookSpec(of_tokens, "tick", False, "y = M_memory(q)"))
        registry.add(f"{prefix}.hook_write_gate", HookSpec(of_gate, "tick", True, "g = 1"))
        for memory in self.memories:
            for name in self._weights_of(memory):
                spec = HookSpec(("batch", "out", "in"), "write", False, "after the writes of the tick")
                registry.add(f"{prefix}.{memory}.hook_fast_{name}", spec)

    def _weights_of(self, memory: str) -> list[str]:
        module = getattr(self.peer.blocks[0].selfmod, f"m_{memory}")
        return [name for name, theirs in MEMORY_WEIGHTS.items() if getattr(module, theirs) is not None]

    def _add_level(self, registry: HookRegistry, prefix: str, module: nn.Module, rule: str) -> None:
        dims = ("batch", "pos", "d_model")
        for name, equation in (
            ("in", "out of the level before"),
            ("delta", "W_out gelu(W_in LayerNorm(in) + b_in) + b_out"),
            ("out", "in + delta"),
        ):
            registry.add(f"{prefix}.hook_{name}", HookSpec(dims, "tick", False, equation))
        registry.add(f"{prefix}.hook_write_gate", HookSpec(("batch", "pos"), "tick", True, rule))
        for name in CMS_WEIGHTS:
            spec = HookSpec(("batch", "out", "in"), "write", False, f"W_{name} + what was written")
            registry.add(f"{prefix}.hook_fast_{name}", spec)

        def whole(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            if self._seen is not None:
                self._seen[f"{prefix}.hook_in"], self._seen[f"{prefix}.hook_out"] = args[0], out

        def added(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            if self._seen is not None:
                self._seen[f"{prefix}.hook_delta"] = out

        module.register_forward_hook(whole)
        module.net.register_forward_hook(added)

    # -- running ------------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> list[ModelFastState]:
        """A fresh state: fast weights of each row, apart."""
        return [self.peer.init_fast_state() for _ in range(batch)]

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, state: Sequence[ModelFastState] | None = None
    ) -> WindowLosses:
        """Score windows (B, T + 1); the losses have a gradient of the reads, never of the writes."""
        batch, n = tokens.shape[0], tokens.shape[1] - 1
        if n < 1:
            raise BadInputError("a window needs at least two tokens: the last is only a target")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.peer.config.vocab_size:
            raise BadInputError(f"token ids are outside the vocabulary of {self.peer.config.vocab_size}")
        lengths = torch.full((batch,), n) if lengths is None else lengths
        rows = self.init_state(batch) if state is None else copy.deepcopy(list(state))
        losses = [
            self._tick(tokens[:, at : at + self.tick + 1], (lengths - at).clamp(0, self.tick), rows)
            for at in range(0, n, self.tick)
        ]
        return WindowLosses(torch.cat(losses, dim=1), torch.arange(n) < lengths[:, None], rows)

    def _tick(self, tokens: Tensor, lengths: Tensor, rows: list[ModelFastState]) -> Tensor:
        """One call of the package for each row that has tokens left: losses (B, n); `rows` move on."""
        n = tokens.shape[1] - 1
        inside = (torch.arange(n) < lengths[:, None]).to(self.peer.embed.weight.dtype)
        reads = {
            r: self._read(tokens[r : r + 1, : length + 1], rows[r])
            for r, length in enumerate(lengths.tolist())
            if length
        }
        if not reads:
            return inside
        losses = self.hook_surprise(_stacked({r: x.losses for r, x in reads.items()}, inside.shape))
        self._show({r: x.seen for r, x in reads.items()}, inside.shape)
        self._write(tokens, rows, reads, self._gates(reads, inside))
        return losses

    @torch.no_grad()
    def logits(self, tokens: Tensor, rows: Sequence[ModelFastState]) -> Tensor:
        """Logits (B, n, V) after each of the tokens (B, n) that come next; nothing is written."""
        reads = {r: self._forward(tokens[r : r + 1], row) for r, row in enumerate(rows)}
        self._show({r: seen for r, (_, _, seen) in reads.items()}, tokens.shape)
        return torch.cat([logits for logits, _, _ in reads.values()])

    def _forward(self, tokens: Tensor, row: ModelFastState) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Read one row (1, n): logits, the blocks' outputs, and what hook points show."""
        self._seen = seen = {}
        try:
            logits, _, outputs = self.peer.forward_with_block_outputs(tokens, fast_state=row)
        finally:
            self._seen = None
        for i in range(len(outputs)):
            seen[f"blocks.{i}.selfmod.hook_out"] = seen[f"blocks.{i}.cms.{self.levels[0]}.hook_in"]
        return logits, outputs, seen

    def _show(self, seen: Mapping[int, Mapping[str, Tensor]], shape: Sequence[int]) -> None:
        """Fire the points of what was read, rows side by side."""
        for name, like in next(iter(seen.values())).items():
            if (point := self.hook_dict[name]).active:
                point(_stacked({r: shown[name][0] for r, shown in seen.items()}, (*shape, like.shape[-1])))

    def _read(self, tokens: Tensor, row: ModelFastState) -> _Read:
        from nested_learning.training import _compute_layer_teach_signals, compute_teach_signal

        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.per_layer_teach):
            logits, outputs, seen = self._forward(inputs, row)
            losses = F.cross_entropy(logits[0], targets[0], reduction="none")
            loss = losses.mean()
        if self.per_layer_teach:
            signals = _compute_layer_teach_signals(loss, outputs)
            signal: dict[str, Any] = {"teach_signals": signals}
        else:
            signals = [compute_teach_signal(self.peer, logits, inputs, next_tokens=targets[:, -1])]
            signal = {"teach_signal": signals[0]}
        passes = self._passes(logits, inputs, targets, loss, signals)
        return _Read(losses if torch.is_grad_enabled() else losses.detach(), seen, signal, passes)

    def _passes(
        self, logits: Tensor, inputs: Tensor, targets: Tensor, loss: Tensor, signals: Sequence[Tensor]
    ) -> list[bool]:
        """The package's surprise gate of each block, for this call."""
        from nested_learning.training import _compute_surprise_override

        threshold, blocks = self.peer.get_surprise_threshold(), len(self.peer.blocks)
        if threshold is None:
            return [True] * blocks
        metric = self.peer.get_surprise_metric()
        if metric != "l2":
            shown = {"logits": logits, "tokens": inputs, "loss": loss, "next_tokens": targets[:, -1]}
            surprise = _compute_surprise_override(metric, **shown)
            return [surprise is not None and surprise >= threshold] * blocks
        config, found = self.peer.config, []
        for signal in signals:
            norm = (signal * config.teach_scale).norm(dim=-1)
            if (
                config.teach_clip > 0 and not self.per_layer_teach
            ):  # the package clips later for signals per layer
                norm = norm.clamp(max=config.teach_clip)
            found.append(float(norm.mean()) >= threshold)
        return found if self.per_layer_teach else found * blocks

    def _gates(self, reads: Mapping[int, _Read], inside: Tensor) -> dict[str, list[bool]]:
        """Which rows write, by the name of the write gate, after the hooks."""

        def of_block(i: int) -> Tensor:
            passes = [float(r in reads and reads[r].passes[i]) for r in range(len(inside))]
            return inside * inside.new_tensor(passes)[:, None]

        shared = self.hook_gate(of_block(0)) if self.hook_gate is not None else None
        found = {}
        for name, point in self._write_gates():
            i = int(name.split(".")[1])
            before = inside if ".selfmod." in name else of_block(i) if shared is None else shared
            found[name] = _all_or_nothing(point, point(before), inside)
        return found

    def _write_gates(self) -> Iterator[tuple[str, HookPoint]]:
        return ((name, p) for name, p in self.hook_dict.items() if name.endswith(".hook_write_gate"))

    @torch.no_grad()
    def _write(
        self,
        tokens: Tensor,
        rows: Sequence[ModelFastState],
        reads: Mapping[int, _Read],
        gates: Mapping[str, list[bool]],
    ) -> None:
        before = [self._written(row) for row in rows]
        for r, read in reads.items():
            for i, block in enumerate(self.peer.blocks):
                block.config.selfmod_online_updates = gates[f"blocks.{i}.selfmod.hook_write_gate"][r]
                levels = {v for v in self.levels if gates[f"blocks.{i}.cms.{v}.hook_write_gate"][r]}
                block.set_allowed_levels(levels)
            # The gate is decided: this surprise passes any threshold.
            passing = {"surprise_value": math.inf, "finalize_updates": False}
            self.peer(tokens[r : r + 1, : len(read.losses)], fast_state=rows[r], **read.signal, **passing)
        for i in range(len(self.peer.blocks)):
            blocks = [row.blocks[i] for row in rows]
            if any(gates[f"blocks.{i}.selfmod.hook_write_gate"]):
                for memory in self.memories:
                    for name in self._weights_of(memory):
                        point = self.hook_dict[f"blocks.{i}.selfmod.{memory}.hook_fast_{name}"]
                        _fire(
                            point, blocks, lambda b, m=memory, w=MEMORY_WEIGHTS[name]: _fast_memory(b, m, w)
                        )
            for level in self.levels:
                if all(
                    self._written(row)[i][level] == was[i][level]
                    for row, was in zip(rows, before, strict=True)
                ):
                    continue
                parameters = dict(self.peer.blocks[i].cms.blocks[level].named_parameters())
                for name, key in CMS_WEIGHTS.items():
                    point = self.hook_dict[f"blocks.{i}.cms.{level}.hook_fast_{name}"]
                    meta = parameters[key]
                    _fire(point, blocks, lambda b, v=level, k=key, w=meta: w + b.cms_params[v][k])

    def _written(self, row: ModelFastState) -> list[dict[str, int]]:
        """How often each CMS level of each block was written."""
        return [{k: s.updates for k, s in b.level_manager.clock.stats().items()} for b in row.blocks]


def _stacked(parts: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Rows (n_r, ...) side by side as `shape`, zeros where a row has nothing; keeps the graph."""
    first = next(iter(parts.values()))
    empty = first.new_zeros(shape[1:])
    return torch.stack(
        [torch.cat([parts[r], empty[len(parts[r]) :]]) if r in parts else empty for r in range(shape[0])]
    )


def _all_or_nothing(point: HookPoint, gate: Tensor, inside: Tensor) -> list[bool]:
    """Whether each row writes: its gate (B, n) is 0 or 1 for all of its tokens. A row without tokens does not."""
    opened = ((gate == 1) | (inside == 0)).all(dim=1) & inside.any(dim=1)
    closed = ((gate == 0) | (inside == 0)).all(dim=1)
    if not bool((opened | closed).all()):
        raise BadInputError(
            f"{point.name}: the package writes a whole call or nothing, so a row's gate is 0 or 1 for all its tokens"
        )
    return opened.tolist()


def _fire(
    point: HookPoint, blocks: Sequence[BlockFastState], weights: Callable[[BlockFastState], Tensor]
) -> None:
    if point.active:
        point(torch.stack([weights(block) for block in blocks]))


def _fast_memory(block: BlockFastState, memory: str, weight: str) -> Tensor:
    tensor = getattr(getattr(block.selfmod_state, memory), weight)
    return tensor if tensor.ndim == 2 else tensor[0]  # without a batch until it is first written
