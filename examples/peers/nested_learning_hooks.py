"""The package's model with hook points: its own forward pass, run a call at a time, a row at a time.

What a call is, and what follows from the package's code, stands at the top of `nested_learning_subject`; what each
mechanism does, at the top of its part.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from nested_learning_parts import (
    OF_GATE,
    OF_TOKENS,
    Opening,
    Part,
    Recorder,
    Row,
    add_stream,
    openings,
    parts_of,
)
from nested_learning_surprise import Surprise, rule_of, surprise_of
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import Hooked, HookPoint, HookRegistry, HookSpec
from hopeprobe.subject import WindowLosses

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState, ModelAttentionCache
    from nested_learning.model import HOPEModel
    from nested_learning.titan.model import TitanOnlyModel


@dataclasses.dataclass(frozen=True)
class Calls:
    """How the package calls its model in training.

    tick: tokens of a call. whole: a call is a window, with its last token, which is only a target, and nothing is left
    pending. per_layer: a teach signal for each block. carry: attention's keys and values go from one call to the next.
    differentiable: writes are steps that a gradient passes.
    """

    tick: int
    whole: bool = False
    per_layer: bool = False
    carry: bool = False
    differentiable: bool = False


class _Read(NamedTuple):
    """What reading a tick of one row leaves for its write."""

    inputs: Tensor  # (1, n), or (1, n + 1) of a whole window
    losses: Tensor  # (n,) nats
    seen: dict[str, Tensor]  # (1, n, d) by hook point
    signal: dict[str, Any]  # the teach signal, as the package's forward takes it
    surprise: Surprise
    attention: ModelAttentionCache | None


class HookedPeer(Hooked, nn.Module):
    """The package's model, run by its own forward pass, with hook points. Only gates can be edited.

    A gate is of a whole call: an edit opens or closes all tokens of a row's tick, else it raises BadInputError.
    """

    def __init__(self, model: HOPEModel | TitanOnlyModel, calls: Calls) -> None:
        super().__init__()
        self.peer = model.eval()
        self.calls = calls
        self._recorder = Recorder()
        self.parts: list[list[Part]] = [parts_of(i, block) for i, block in enumerate(model.blocks)]
        registry = HookRegistry()
        self.hook_surprise = registry.add(
            "hook_surprise", HookSpec(("batch", "pos"), "tick", False, "s_t = CE_t")
        )
        registry.add("hook_embed", HookSpec(OF_TOKENS, "tick", False, "e = E[token]"))
        self._recorder.gives(model.embed, "hook_embed")
        rule, one_gate = rule_of(model, calls.per_layer)
        for i, block in enumerate(model.blocks):
            add_stream(registry, self._recorder, i, block)
            for part in self.parts[i]:
                part.add_points(registry, self._recorder, rule)
        held = any(part.gated and part.gates for parts in self.parts for part in parts)
        self.hook_gate = None
        if held and one_gate:
            self.hook_gate = registry.add("hook_gate", HookSpec(OF_GATE, "tick", True, rule))
        self._register_hooks(registry)

    # -- running ------------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> list[Row]:
        """A fresh state: fast weights of each row, apart."""
        return [
            Row(self.peer.init_fast_state(), self.peer.init_attention_cache() if self.calls.carry else None)
            for _ in range(batch)
        ]

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        state: Sequence[Row] | None = None,
        through: bool = False,
    ) -> WindowLosses:
        """Score windows (B, T + 1); the losses have a gradient of the reads, and of the writes where `through`."""
        batch, n = tokens.shape[0], tokens.shape[1] - 1
        if n < 1:
            raise BadInputError("a window needs at least two tokens: the last is only a target")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.peer.config.vocab_size:
            raise BadInputError(f"token ids are outside the vocabulary of {self.peer.config.vocab_size}")
        lengths = torch.full((batch,), n) if lengths is None else lengths
        rows = self.init_state(batch) if state is None else copy.deepcopy(list(state))
        tick = self.calls.tick
        losses = [
            self._tick(tokens[:, at : at + tick + 1], (lengths - at).clamp(0, tick), rows, through)
            for at in range(0, n, tick)
        ]
        return WindowLosses(torch.cat(losses, dim=1), torch.arange(n) < lengths[:, None], rows)

    def _tick(self, tokens: Tensor, lengths: Tensor, rows: list[Row], through: bool) -> Tensor:
        """One call of the package for each row that has tokens left: losses (B, n); `rows` move on."""
        n = tokens.shape[1] - 1
        inside = (torch.arange(n) < lengths[:, None]).to(self.peer.embed.weight.dtype)
        reads = {
            r: self._read(tokens[r : r + 1, : length + 1], rows[r], through)
            for r, length in enumerate(lengths.tolist())
            if length
        }
        if not reads:
            return inside
        losses = self.hook_surprise(_stacked({r: x.losses for r, x in reads.items()}, inside.shape))
        self._show({r: x.seen for r, x in reads.items()}, inside.shape)
        opened = self._openings(reads, inside)
        with torch.set_grad_enabled(through), self._released():
            self._write(rows, reads, opened)
        for r, read in reads.items():
            rows[r].attention = read.attention
        return losses

    @torch.no_grad()
    def logits(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor:
        """Logits (B, n, V) after each of the tokens (B, n) that come next; nothing is written."""
        reads = {r: self._forward(tokens[r : r + 1], _aside(row)) for r, row in enumerate(rows)}
        self._show({r: seen for r, (_, _, seen, _) in reads.items()}, tokens.shape)
        return torch.cat([logits for logits, *_ in reads.values()])

    def _forward(
        self, tokens: Tensor, row: Row
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor], ModelAttentionCache | None]:
        """Read one row (1, n): logits, the blocks' outputs, what hook points show, keys and values to carry on."""
        with self._recorder.reading() as seen:
            if not hasattr(self.peer, "forward_with_block_outputs"):
                return self.peer(tokens, fast_state=row.fast), [], seen, None
            if not self.calls.carry:
                logits, _, outputs = self.peer.forward_with_block_outputs(tokens, fast_state=row.fast)
                return logits, outputs, seen, None
            logits, _, outputs, cache = self.peer.forward_with_block_outputs(
                tokens, fast_state=row.fast, attention_cache=row.attention, return_attention_cache=True
            )
            return logits, outputs, seen, cache

    def _show(self, seen: Mapping[int, Mapping[str, Tensor]], shape: Sequence[int]) -> None:
        """Fire the points of what was read, rows side by side."""
        for name, like in next(iter(seen.values())).items():
            if (point := self.hook_dict[name]).active:
                point(_stacked({r: shown[name][0] for r, shown in seen.items()}, (*shape, like.shape[-1])))

    def _read(self, tokens: Tensor, row: Row, through: bool) -> _Read:
        from nested_learning.training import _compute_layer_teach_signals, compute_teach_signal

        targets, n = tokens[:, 1:], tokens.shape[1] - 1
        inputs = tokens if self.calls.whole else tokens[:, :-1]
        boundary = {} if self.calls.whole else {"next_tokens": targets[:, -1]}
        with torch.set_grad_enabled(torch.is_grad_enabled() or (self.calls.per_layer and any(self.parts))):
            logits, outputs, seen, attention = self._forward(inputs, row)
            seen = {name: shown[:, :n] for name, shown in seen.items()}
            losses = F.cross_entropy(logits[0, :n], targets[0], reduction="none")
            loss = losses.mean()
            if not any(self.parts):  # nothing that a signal could write
                return _Read(inputs, losses, seen, {}, Surprise([], []), attention)
            if self.calls.per_layer:
                signals = _compute_layer_teach_signals(
                    loss, outputs, detach=not through, create_graph=through
                )
                signal: dict[str, Any] = {"teach_signals": signals}
        if not self.calls.per_layer:
            signals = [compute_teach_signal(self.peer, logits, inputs, **boundary)]
            signal = {"teach_signal": signals[0]}
        shown = {"logits": logits, "tokens": inputs, "loss": loss, **boundary}
        with torch.no_grad():
            surprise = surprise_of(self.peer, signals, shown, self.calls.per_layer)
        losses = losses if torch.is_grad_enabled() else losses.detach()
        return _Read(inputs, losses, seen, signal, surprise, attention)

    # -- writing ------------------------------------------------------------------------------------------------

    def _openings(self, reads: Mapping[int, _Read], inside: Tensor) -> dict[str, list[Opening]]:
        """What each write gate lets through, row by row, after the hooks."""
        rows = range(len(inside))

        def of_block(i: int) -> list[bool]:
            return [r in reads and reads[r].surprise.passes[i] for r in rows]

        def as_gate(passes: Sequence[bool]) -> Tensor:
            return inside * inside.new_tensor(passes)[:, None]

        shared: tuple[Tensor, list[bool]] | None = None
        if self.hook_gate is not None:
            before = as_gate(of_block(0))
            after = self.hook_gate(before)
            opened = openings(self.hook_gate, before, after, inside, of_block(0))
            shared = after, [one.open for one in opened]
        found = {}
        for i, parts in enumerate(self.parts):
            if not parts:
                continue
            call, passes = shared or (as_gate(of_block(i)), of_block(i))
            tokens = {r: read.surprise.active[i][: len(read.losses)] for r, read in reads.items()}
            active = _stacked(tokens, inside.shape)
            for part in parts:
                for name in part.gates:
                    before = part.gate(call, active.to(call)) if part.gated else inside
                    own = passes if part.gated else [True] * len(inside)
                    point: HookPoint = self.hook_dict[name]
                    found[name] = openings(point, before, point(before), inside, own)
        return found

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Whatever is switched off for a call is on again after it, as somebody may run the package's model himself."""
        try:
            yield
        finally:
            for block, parts in zip(self.peer.blocks, self.parts, strict=True):
                _allow(block, None)
                for part in parts:
                    part.release()

    def _write(
        self, rows: Sequence[Row], reads: Mapping[int, _Read], opened: Mapping[str, list[Opening]]
    ) -> None:
        every = [(i, part) for i, parts in enumerate(self.parts) for part in parts]
        if not every:
            return
        for r, read in reads.items():
            for i, block in enumerate(self.peer.blocks):
                allowed = [part.allow({g: opened[g][r] for g in part.gates}) for part in self.parts[i]]
                _allow(block, set[str]().union(*allowed))
            self._call(read.inputs, rows[r], read.signal)
            rows[r].tokens += len(read.losses)
        tokens = max(rows[r].tokens for r in reads)
        for i, part in every:
            states = [row.fast.blocks[i] for row in rows]
            for point in part.due(tokens, self.calls.tick, self.calls.whole):
                _fire(self.hook_dict[point], states, part.holds(point))

    def _call(self, tokens: Tensor, row: Row, signal: Mapping[str, Any]) -> None:
        """The package's update pass of one row, with its gate decided: this surprise passes any threshold."""
        given: dict[str, Any] = {"fast_state": row.fast, "surprise_value": math.inf, **signal}
        if hasattr(self.peer, "forward_with_block_outputs"):
            given |= {
                "finalize_updates": self.calls.whole,
                "differentiable_updates": self.calls.differentiable,
            }
            given |= {"attention_cache": row.attention} if self.calls.carry else {}
        self.peer(tokens, **given)


def _allow(block: nn.Module, levels: set[str] | None) -> None:
    """What a block may write; None: all."""
    if hasattr(block, "set_allowed_levels"):
        block.set_allowed_levels(levels)
    else:
        block.set_enabled(levels is None or bool(levels))


def _aside(row: Row) -> Row:
    """The same row for a read that must leave no trace: the package counts passes, which decide when it writes."""
    blocks = []
    for block in row.fast.blocks:
        manager = copy.copy(block.level_manager)
        manager.clock = copy.deepcopy(manager.clock)
        blocks.append(dataclasses.replace(block, level_manager=manager))
    return Row(dataclasses.replace(row.fast, blocks=blocks), row.attention, row.tokens)


def _stacked(parts: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Rows (n_r, ...) side by side as `shape`, zeros where a row has nothing; keeps the graph."""
    first = next(iter(parts.values()))
    empty = first.new_zeros(shape[1:])
    return torch.stack(
        [torch.cat([parts[r], empty[len(parts[r]) :]]) if r in parts else empty for r in range(shape[0])]
    )


def _fire(
    point: HookPoint, blocks: Sequence[BlockFastState], weights: Callable[[BlockFastState], Tensor]
) -> None:
    if point.active:
        point(torch.stack([weights(block) for block in blocks]))
