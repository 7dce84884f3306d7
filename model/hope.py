"""The model: one primitive, `step`, that training, streaming evaluation, probing and generation all call.

A tick reads all layers with fast weights frozen as they stand, scores its tokens, derives the gate, and writes (design,
section 3). `reference.py` holds the same mathematics token by token; parity tests tie the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import Hooked, HookRegistry, HookSpec
from hopeprobe.model.block import Block, Ready, ToWrite
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.gate import DOUBT, Decision, Gate
from hopeprobe.model.init import initialise
from hopeprobe.model.inner import inner_gradients
from hopeprobe.model.loss import (
    FEW_ELEMENTS,
    KEPT_ELEMENTS,
    NO_TARGET,
    Kept,
    differentiable,
    gradients,
    score,
)
from hopeprobe.model.scores import Seen
from hopeprobe.model.state import LayerState, State, detach_state, map_state, on_host
from hopeprobe.model.thin import sealed

#: Budgets at which what only serves a write is generated when a row is written.
_RARE = 0.2


class Output(NamedTuple):
    """What a window gives."""

    losses: Tensor  # (B, T) nats, 0 where not scored
    scored: Tensor  # (B, T) bool: the token has a target
    state: State


class _Tick(NamedTuple):
    """What a tick leaves for the window's loss: not its state, of which a window would keep one a tick."""

    final: Tensor  # (B, C, d): what the head reads
    losses: Tensor  # (B, C), outside the graph
    grads: Tensor  # (B, C, d): dCE_t/d final_t, outside the graph; (0, d) where none is asked for


class _Gates(NamedTuple):
    """Write gates of a tick, (B, C): of the memories of each layer, and of all CMS levels."""

    memories: list[Tensor]
    levels: Tensor


_Prepared = tuple[Ready, ...]


def _ours(state: State) -> State:
    """A state that may be overwritten: a copy, unless an outer gradient forbids overwriting anyway."""
    return state if torch.is_grad_enabled() else map_state(Tensor.clone, state)


def _sealed(state: State) -> State:
    """What a caller gets: gradients of its tensors are autograd's own (`thin.py`)."""
    return map_state(sealed, state) if torch.is_grad_enabled() else state


class HopeModel(Hooked, nn.Module):
    """A HOPE model, or another variant of `variants.py`, with named hook points.

    `model(tokens)` scores windows; `step`, `feed` and `finalize` stream. Weights follow from `config` and `seed` alone.

    Args:
        config: what to build.
        seed: of the initial weights; None leaves them empty, for a caller that brings its own.
        dtype: of weights, state and activations; float64 for exactness.
    """

    unigram: Tensor | None

    def __init__(self, config: ModelConfig, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.activations: torch.dtype | None = None  # as the weights are; `precision.py` says what else
        # Of a device's frequencies: whether they were there at this version, so that a window need not ask.
        self._frequencies: tuple[Tensor, int, bool] | None = None
        registry = HookRegistry()
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))  # (V, d), tied to the head
        self.hook_embed = registry.add(
            "hook_embed", HookSpec(("batch", "pos", "d_model"), "tick", True, "x_t = E[token_t]")
        )
        self.blocks = nn.ModuleList([Block(config, i, registry) for i in range(config.layers)])
        self.norm = nn.LayerNorm(config.dim)
        surprise = HookSpec(("batch", "pos"), "tick", False, "s_t = CE_t = -log p(token_{t+1}), nats")
        self.hook_surprise = registry.add("hook_surprise", surprise)
        self.gate = Gate(config.gate, config.threshold, config.layers)
        if config.writes:
            score = HookSpec(
                ("batch", "pos"), "tick", False, "score_t that the gate decides by; of `assoc` their mean"
            )
            self.hook_score = registry.add("hook_gate_score", score)
            doubt = HookSpec(("batch", "pos"), "tick", False, f"[scores moved by {DOUBT:g} turn the gate]")
            self.hook_doubt = registry.add("hook_gate_doubt", doubt)
            gate = HookSpec(("batch", "pos"), "tick", True, self.gate.equation())
            self.hook_gate = registry.add("hook_gate", gate)
        asked = config.gate.rule == "excess"
        self.register_buffer(
            "unigram", torch.full((config.vocab_size,), torch.nan) if asked else None
        )  # nats
        self._register_hooks(registry)
        if dtype != self.embed.dtype:
            self.to(dtype)
        if seed is not None:
            initialise(self, config, seed)

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, Tensor]:
        """Names and shapes of all weights, as tensors without memory."""
        with torch.device("meta"):
            return cls(config, seed=None).state_dict()

    # -- state ---------------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> State:
        """A fresh state for `batch` streams at position 0."""
        layers = tuple(self._block(i).init_state(batch) for i in range(self.config.layers))
        pending = torch.empty(batch, 0, dtype=torch.int64, device=self.embed.device)
        return State(layers, pending, 0, self.gate.init_state(batch, self.embed))

    def _block(self, index: int) -> Block:
        return cast(Block, self.blocks[index])

    def set_frequencies(self, surprisal: Tensor) -> None:
        """Give the gate rule `excess` what it needs: -log p (V,) of every token by its frequency, nats."""
        if self.unigram is None:
            raise BadInputError(f"the gate rule {self.config.gate.rule!r} does not ask for token frequencies")
        if tuple(surprisal.shape) != tuple(self.unigram.shape) or not bool(surprisal.isfinite().all()):
            raise BadInputError(
                f"token frequencies must be {tuple(self.unigram.shape)} finite numbers, not {tuple(surprisal.shape)}"
            )
        self.unigram.copy_(surprisal)

    @contextmanager
    def gated(self, config: ModelConfig, surprisal: Tensor | None = None) -> Iterator[None]:
        """Follow the gate of another configuration, the same but for that, while the context lasts."""
        before = self.config, self.gate, self.unigram
        self.config, self.gate = config, Gate(config.gate, config.threshold, config.layers)
        self.unigram = None
        try:
            if config.gate.rule == "excess":
                self.unigram = self.embed.new_full((config.vocab_size,), torch.nan)
                if surprisal is not None:
                    self.set_frequencies(surprisal)
            yield
        finally:
            self.config, self.gate, self.unigram = before

    def _prepared(self) -> _Prepared:
        if self.unigram is not None and not self._frequencies_known(self.unigram):
            raise BadInputError(
                "the gate rule 'excess' needs token frequencies, which this model was not given: set_frequencies()"
            )
        return tuple(self._block(i).ready(self.activations) for i in range(self.config.layers))

    def _frequencies_known(self, unigram: Tensor) -> bool:
        if on_host(unigram):
            return bool(unigram[:1].isfinite().all())
        held = self._frequencies
        if held is None or held[0] is not unigram or held[1] != unigram._version:
            held = self._frequencies = unigram, unigram._version, bool(unigram[:1].isfinite().all())
        return held[2]

    # -- the primitive -------------------------------------------------------------------------------------------

    def step(self, state: State, tokens: Tensor, next_token: Tensor) -> tuple[Tensor, State]:
        """One tick: read, score, gate, write.

        Args:
            state: of B streams.
            tokens: (B, C) int64, C = `config.tick`.
            next_token: (B,) int64, the token after the tick; -1 where there is none.

        Returns:
            (B, C) losses in nats, differentiable, and the state after the writes.
        """
        self.check_tokens(tokens)
        if tokens.shape[1] != self.config.tick:
            raise BadInputError(
                f"step takes a tick of {self.config.tick} tokens, not {tokens.shape[1]}; see feed()"
            )
        targets = torch.cat([tokens[:, 1:], next_token[:, None]], dim=1)
        kept = self._keeping(targets)
        tick, after = self._tick(self._prepared(), state, F.embedding(tokens, self.embed), targets, kept)
        return self._differentiable([tick], [targets], kept), _sealed(after)

    def _tick(
        self,
        prepared: _Prepared,
        state: State,
        x: Tensor,
        targets: Tensor,
        kept: list[Kept] | None,
        donated: bool = False,
    ) -> tuple[_Tick, State]:
        """The primitive on embedded tokens (B, n <= C, d); a tick that is not complete is scored and not written.

        `donated` says that the caller made `state` itself and needs it no more: without an outer gradient it
        is overwritten.
        """
        config = self.config
        outer = torch.is_grad_enabled()
        skips = not outer and on_host(x)  # what closed gates make nothing of
        n = x.shape[1]
        writing = config.writes and n == config.tick
        inner = writing and config.parts.levels  # CMS writes take a gradient of their own
        if inner and torch.is_inference_mode_enabled():
            raise BadInputError(
                "CMS writes need a gradient of their own, which torch.inference_mode() forbids: use torch.no_grad()"
            )
        if config.truncate_ticks and (state.position // config.tick) % config.truncate_ticks == 0:
            state = detach_state(state)
        reading: AbstractContextManager[object] = torch.enable_grad() if inner else nullcontext()
        with reading:
            x = self.hook_embed(x)
            made, layers = [], []
            # Where most rows are written anyway, memories are better asked while they are in the cache.
            rare = (config.gate.budget or 1.0) <= _RARE and config.gate.rule != "assoc"
            late = skips and rare
            for i in range(config.layers):
                x, left, layer = self._block(i).read(
                    x, prepared[i], state.layers[i], state.position, outer, late
                )
                made.append(left)
                layers.append(layer)
            final = self.norm(x)
        entropy: list[Tensor] | None = [] if self.gate.config.rule == "entropy-gap" else None
        most = KEPT_ELEMENTS if late else FEW_ELEMENTS
        few = skips and entropy is None and not (inner and targets.numel() * self.config.vocab_size > most)
        kept = [] if few and inner else kept
        flat, grads = score(
            final.detach().flatten(0, 1), self.embed, targets.flatten(), kept, entropy, gradient=not few
        )
        losses, grads = flat.view_as(targets), grads if few else grads.view_as(final)

        def slopes(wanted: Tensor) -> Tensor:
            if not few:
                return grads
            return gradients(self.embed, targets.flatten(), kept or [], wanted.flatten()).view_as(final)

        losses = self.hook_surprise(losses)
        remembered = state.gate
        if config.writes:
            decided = self._decide(state, made, losses, targets, entropy, final, grads)
            remembered = decided.state
            gates = self._gates(decided, targets)
            if writing:
                layers = self._write(
                    prepared, state, made, final, slopes, gates, layers, donated and not outer, skips
                )
        if not outer:
            layers, final = list(detach_state(tuple(layers))), final.detach()
        after = State(tuple(layers), state.pending, state.position + n, remembered)
        return _Tick(final, losses, grads), after

    def _decide(
        self,
        state: State,
        made: list[ToWrite],
        losses: Tensor,
        targets: Tensor,
        entropy: list[Tensor] | None,
        final: Tensor,
        grads: Tensor,
    ) -> Decision:
        """What the gate says of a tick's tokens."""
        rule = self.gate.config
        assoc = unigram = in_graph = None
        with torch.no_grad():
            if rule.rule == "assoc":
                assoc = torch.stack([self._block(i).assoc_surprise(one) for i, one in enumerate(made)], 1)
            if self.unigram is not None:
                unigram = self.unigram[targets.clamp_min(0)]
        if rule.straight_through and torch.is_grad_enabled():
            # The loss as a function of what the head reads, to first order; of the head's table it is a constant.
            in_graph = losses + ((final - final.detach()) * grads).sum(-1)
        told = torch.cat(entropy).view_as(losses) if entropy else None
        seen = Seen(losses, targets, unigram, told, assoc)
        return self.gate.decide(seen, state.gate, state.position, in_graph, self.hook_doubt.active)

    def _gates(self, decided: Decision, targets: Tensor) -> _Gates:
        """Write gates by mechanism, 0 where a row has ended."""
        scored = targets >= 0
        per_layer = self.gate.config.rule == "assoc"
        self.hook_score(decided.score.mean(1))
        if decided.doubt is not None:
            self.hook_doubt(decided.doubt.to(decided.score.dtype))
        shared = self.hook_gate(scored.to(decided.gate.dtype) if per_layer else decided.gate[:, 0])
        # A row whose tick lacks a target has ended inside it: like a stream cut there, it writes nothing more.
        complete = scored.all(dim=1, keepdim=True)
        shared, still_open = shared * complete, (scored & complete).to(shared.dtype)
        writes = self.gate.config.writes
        memories = [shared if writes in ("all", "selfmod", "titans") else still_open] * self.config.layers
        if per_layer:
            memories = [shared * decided.gate[:, i] for i in range(self.config.layers)]
        return _Gates(memories, shared if writes in ("all", "cms") else still_open)

    def _write(
        self,
        prepared: _Prepared,
        state: State,
        made: list[ToWrite],
        final: Tensor,
        slopes: Callable[[Tensor], Tensor],
        gates: _Gates,
        layers: list[LayerState],
        donated: bool,
        skips: bool,
    ) -> list[LayerState]:
        """All writes of a tick; they change nothing that this tick still reads.

        `slopes` gives dCE_t/d final_t (B, C, d), of the tokens (B, C) that it is asked for at least.
        """
        through = torch.is_grad_enabled() and self.config.write_grad == "through"
        end = state.position + gates.levels.shape[1]
        levels = [self._block(i).written_levels() for i in range(len(layers))]
        of_levels = [[level.hook_write_gate(gates.levels) for level in of_block] for of_block in levels]
        distinct = {id(gate): gate for of_block in of_levels for gate in of_block}
        wanted = torch.stack([gate != 0 for gate in distinct.values()] or [gates.levels != 0]).any(0)
        inner = inner_gradients(final, slopes(wanted), [m.taps for m in made], of_levels)
        out = []
        for i, layer in enumerate(layers):
            selfmod, weights, generated = self._block(i).selfmod, prepared[i].memories, made[i].generated
            if (
                selfmod is not None
                and layer.selfmod is not None
                and weights is not None
                and generated is not None
            ):
                with torch.set_grad_enabled(through):
                    fast = selfmod.write(weights, layer.selfmod, generated, gates.memories[i], donated, skips)
                layer = layer._replace(selfmod=fast)
            titans, left = self._block(i).titans, made[i].titans
            if titans is not None and layer.titans is not None and left is not None:
                with torch.set_grad_enabled(through):
                    layer = layer._replace(
                        titans=titans.write(layer.titans, left, gates.memories[i], donated, skips)
                    )
            if levels[i]:
                with torch.no_grad():
                    cms = tuple(
                        level.write(held, tap, *inner[i][tap.level], end, donated, skips)
                        for level, held, tap in zip(levels[i], layer.cms, made[i].taps, strict=True)
                    )
                layer = layer._replace(cms=cms)
            out.append(layer)
        return out

    def _keeping(self, targets: Tensor) -> list[Kept] | None:
        """Where `score` may leave its probabilities: only for an outer gradient, and only while they are small."""
        wanted = torch.is_grad_enabled() and self.embed.requires_grad
        return [] if wanted and targets.numel() * self.config.vocab_size <= KEPT_ELEMENTS else None

    def _differentiable(self, ticks: list[_Tick], targets: list[Tensor], kept: list[Kept] | None) -> Tensor:
        losses = [t.losses for t in ticks]
        if torch.is_grad_enabled():
            # Tick after tick, as `score` saw the rows, so that the kept probabilities match.
            rows = [torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(
                *((t.final, t.losses, t.grads, y) for t, y in zip(ticks, targets, strict=True)), strict=True
            )]  # fmt: skip
            final, flat, grads, target = rows
            flat = differentiable(final, self.embed, flat, grads, target, kept or [])
            sizes = [t.losses.numel() for t in ticks]
            losses = [f.view_as(t.losses) for f, t in zip(torch.split(flat, sizes), ticks, strict=True)]
        return torch.cat(losses, dim=1)

    # -- windows -------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, state: State | None = None) -> Output:
        """Score windows from a fresh state (or from `state`).

        Args:
            tokens: (B, T + 1) int64: the last is a target only.
            lengths: (B,) int64, scored targets of each row, range 0..T; what follows is padding: it has no loss, no
                write, no effect. None: all T.
            state: of B streams at a multiple of the tick, nothing pending.

        Returns:
            losses (B, T), differentiable; which are scored; the state after them.
        """
        self.check_tokens(tokens)
        if tokens.shape[1] < 2:
            raise BadInputError("a window needs at least two tokens: the last is only a target")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if lengths is not None:
            beyond = torch.arange(inputs.shape[1], device=tokens.device) >= lengths[:, None]
            targets = targets.masked_fill(beyond, NO_TARGET)
        if state is None:
            state = self.init_state(tokens.shape[0])
        elif state.pending.shape[1]:
            raise BadInputError("the state holds tokens of an unfinished tick: continue it with feed()")
        else:
            state = _ours(state)
        prepared = self._prepared()
        embedded = F.embedding(inputs, self.embed)
        kept = self._keeping(targets)
        ticks, tick_targets = [], []
        for start in range(0, inputs.shape[1], self.config.tick):
            stop = start + self.config.tick
            tick_targets.append(targets[:, start:stop])
            x = embedded[:, start:stop]
            tick, state = self._tick(prepared, state, x, tick_targets[-1], kept, donated=True)
            ticks.append(tick)
        return Output(self._differentiable(ticks, tick_targets, kept), targets >= 0, _sealed(state))

    # -- streams -------------------------------------------------------------------------------------------------

    def feed(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """Continue streams by any number of tokens (B, n).

        Losses (B, m * C) appear for ticks that are complete and followed by a known token; the rest waits in
        `state.pending`. Any split of a stream into calls gives the same losses.
        """
        self.check_tokens(tokens, minimum=0)
        waiting = torch.cat([state.pending, tokens], dim=1)
        size = self.config.tick
        prepared, kept = self._prepared(), self._keeping(waiting)
        ticks, targets = [], []
        several = waiting.shape[1] > 2 * size
        state = _ours(state) if several else state
        while waiting.shape[1] > size:
            targets.append(waiting[:, 1 : size + 1])
            embedded = F.embedding(waiting[:, :size], self.embed)
            tick, state = self._tick(prepared, state, embedded, targets[-1], kept, donated=several)
            ticks.append(tick)
            waiting = waiting[:, size:]
        state = state._replace(pending=waiting)
        if not ticks:
            return self.embed.new_empty(tokens.shape[0], 0), state
        return self._differentiable(ticks, targets, kept), _sealed(state)

    def finalize(self, state: State) -> Tensor:
        """Losses (B, n - 1) of the n tokens still pending; the last token has no target and no loss."""
        if state.pending.shape[1] < 2:
            return self.embed.new_empty(state.pending.shape[0], 0)
        targets = state.pending[:, 1:]
        x = F.embedding(state.pending[:, :-1], self.embed)
        kept = self._keeping(targets)
        tick, _ = self._tick(self._prepared(), state, x, targets, kept)
        return self._differentiable([tick], [targets], kept)

    def peek(self, state: State) -> Tensor:
        """Logits (B, n, V) after each pending token, read without writing: what generation samples from."""
        pending = state.pending
        if not pending.shape[1]:
            raise BadInputError("nothing is pending: feed() at least one token first")
        x = self.hook_embed(F.embedding(pending, self.embed))
        prepared = self._prepared()
        for i in range(self.config.layers):
            x = self._block(i).read(x, prepared[i], state.layers[i], state.position)[0]
        return F.linear(self.norm(x), self.embed)

    def check_tokens(self, tokens: Tensor, minimum: int = 1) -> Tensor:
        """The same tokens. Raises BadInputError for what are none; at values on a device the host does not look."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < minimum:
            raise BadInputError(
                f"tokens must be (batch, positions) integers, not {tuple(tokens.shape)} {tokens.dtype}"
            )
        if not on_host(tokens) or not tokens.numel():
            return tokens  # on a device the embedding itself refuses what it does not have
        if not (int(tokens.min()) >= 0 and int(tokens.max()) < self.config.vocab_size):
            raise BadInputError(
                f"token ids range over {int(tokens.min())}..{int(tokens.max())}, the vocabulary over "
                f"0..{self.config.vocab_size - 1}: is this another tokenizer's text?"
            )
        return tokens
