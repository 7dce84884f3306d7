"""Our model as a `Subject`: what the probe library sees of it, registered like any other model's loader."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.model.block import Block
from hopeprobe.model.checkpoint import FORMAT, VERSION, Checkpoint, initial_model, read, run_checkpoints
from hopeprobe.model.config import GATE_RULES, GateConfig, ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.init import FREQUENCIES, digest
from hopeprobe.model.measure import close, freeze_hooks, write_gates
from hopeprobe.model.memories import Memory
from hopeprobe.model.selfmod import SelfMod
from hopeprobe.model.state import Change, MemoryState, State, average_rows, select_rows
from hopeprobe.model.titans import Titans
from hopeprobe.subject import GateRule, MissingCapability, Subject, WindowLosses


def gated_config(config: ModelConfig, gate: GateRule) -> ModelConfig:
    """The configuration with another gate; what the rule does not say (decay, history, seed) stays.

    Raises `BadInputError` for a gate that does not fit.
    """
    if gate.rule == "absolute":
        if gate.budget is not None:
            GateConfig("absolute", gate.budget)  # which says what to take instead
        tau = config.surprise_threshold if gate.threshold is None else gate.threshold
        of_gate = dataclasses.replace(
            config.gate,
            rule="absolute",
            budget=None,
            threshold=None,
            writes=gate.writes,
            straight_through=False,
        )
        return dataclasses.replace(config, surprise_threshold=tau, gate=of_gate)
    of_gate = dataclasses.replace(
        config.gate, rule=gate.rule, budget=gate.budget, threshold=gate.threshold, writes=gate.writes,
        straight_through=False,
    )  # fmt: skip
    return dataclasses.replace(config, gate=of_gate)


class HopeSubject(Subject):
    """A HOPE model at one checkpoint, or one just made (`checkpoint` None: these are its initial weights)."""

    module: HopeModel

    def __init__(
        self, model: HopeModel, checkpoint: Checkpoint | None = None, path: Path | None = None
    ) -> None:
        self.module = model
        self.checkpoint = checkpoint
        self.path = path
        self.name = path.name if path else f"{model.config.variant} (initial weights, seed {model.seed})"
        self.tokenizer = checkpoint.tokenizer if checkpoint else "gpt2"
        self.vocab_size = model.config.vocab_size
        self.context = model.config.context
        self.tick = model.config.tick
        self.trained_steps = checkpoint.step if checkpoint else 0
        self.seed = model.seed
        self.dtype = str(model.embed.dtype).removeprefix("torch.")
        self.device = model.embed.device

    def to(self, device: torch.device) -> HopeSubject:
        """Move the model to a device."""
        self.module.to(device)
        self.device = device
        return self

    def _there(self, tokens: Tensor) -> Tensor:
        """Tokens where the model is, looked at before they leave the host."""
        return self.module.check_tokens(tokens).to(self.device)

    @torch.no_grad()
    def run(self, tokens: Tensor, lengths: Tensor | None = None, state: State | None = None) -> WindowLosses:
        """Score windows (B, T + 1) from a fresh state or on from `state`, hooks firing, without an outer gradient."""
        lengths = None if lengths is None else lengths.to(self.device)
        return WindowLosses(*self.module(self._there(tokens), lengths, state))

    def init_state(self, batch: int) -> State:
        """A fresh state of `batch` streams."""
        return self.module.init_state(batch)

    def step(self, state: State, tokens: Tensor, next_token: Tensor) -> tuple[Tensor, State]:
        """One tick."""
        return self.module.step(state, self._there(tokens), next_token.to(self.device))

    @torch.no_grad()
    def logits(self, state: State, tokens: Tensor) -> Tensor:
        """Logits (B, n, V) after each of at most a tick of tokens, read without writing, hooks firing."""
        if state.pending.shape[1]:
            raise BadInputError("the state holds tokens of an unfinished tick: peek() reads on from those")
        if tokens.shape[1] > self.tick:
            raise BadInputError(
                f"logits are read a tick at a time, {self.tick} tokens, not {tokens.shape[1]}: run() writes in between"
            )
        return self.module.peek(state._replace(pending=self._there(tokens)))

    def loss(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of windows, differentiable."""
        out = self.module(self._there(tokens), None if lengths is None else lengths.to(self.device))
        return cast(Tensor, out.losses.sum() / out.scored.sum())

    def replica(self) -> HopeSubject:
        """The same weights, with hook points of their own."""
        other = copy.copy(self)
        shared: dict[int, Any] = {id(p): p for p in self.module.parameters()}
        other.module = copy.deepcopy(self.module, shared)
        return other

    def exact(self) -> HopeSubject:
        """A copy in float64; itself where it is one already, or rounds activations on purpose."""
        if self.module.embed.dtype == torch.float64 or self.module.activations is not None:
            return self
        other = copy.copy(self)
        model = HopeModel(self.module.config, None, torch.float64)
        model.load_state_dict(self.module.state_dict())
        model.seed = self.seed
        other.module, other.dtype = self._alike(model), "float64"
        return other

    def doubts(self) -> str | None:
        """Where its gate says what was close."""
        return "hook_gate_doubt" if self.module.config.writes else None

    def select_rows(self, state: State, rows: Sequence[int]) -> State:
        """Rows of a state, in this order."""
        return select_rows(state, list(rows))

    def reset_rows(self, state: State, rows: Sequence[int]) -> State:
        """Fast weights of the given rows back at their meta weights; what was read (tails, tokens) stays."""
        index = torch.tensor(list(rows), dtype=torch.int64).to(state.pending.device)
        return self._fast_mapped(
            state, lambda now, start: now.index_copy(0, index, start.expand(len(index), *now.shape[1:]))
        )

    def average_rows(self, state: State, weights: Tensor) -> State:
        """Fast weights averaged over rows; what was read stays with its row."""
        return self._fast_mapped(state, lambda now, _: average_rows(now, weights))

    @torch.no_grad()
    def _fast_mapped(self, state: State, fn: Callable[[Tensor, Tensor], Tensor]) -> State:
        """A state with `fn` applied to its fast weights and where these started from, and nothing else."""
        nothing = self.module.embed.new_zeros(())  # where a difference to the meta weights starts from
        layers = []
        for i, layer in enumerate(state.layers):
            selfmod, module = layer.selfmod, self._block(i).selfmod
            if selfmod is not None and module is not None:
                groups = tuple(
                    None if group is None else MemoryState(*map(fn, group, meta))
                    for group, meta in zip(selfmod.groups, module.stacked(), strict=True)
                )
                selfmod = selfmod._replace(groups=groups)
            cms = tuple(
                lv._replace(
                    change_in=Change.of(fn(lv.w_in, nothing)), change_out=Change.of(fn(lv.w_out, nothing))
                )
                for lv in layer.cms
            )
            titans = layer.titans
            if titans is not None:
                memory = cast(Titans, self._block(i).titans).memory
                titans = titans._replace(
                    w2=fn(titans.w2, memory.w2), w1=fn(titans.w1, memory.w1),
                    s2=fn(titans.s2, nothing), s1=fn(titans.s1, nothing),
                )  # fmt: skip
            layers.append(layer._replace(selfmod=selfmod, cms=cms, titans=titans))
        return state._replace(layers=tuple(layers))

    def write_periods(self) -> Mapping[str, int]:
        """Tokens between two writes, by mechanism."""
        return self.module.config.periods

    def decay_target(self) -> Mapping[str, Literal["init", "zero"]]:
        """What the memories decay towards; CMS levels do not decay."""
        memories = [name for name in self.write_periods() if not name.startswith("cms.")]
        return dict.fromkeys(memories, self.module.config.decay_target)

    def _block(self, index: int) -> Block:
        return cast(Block, self.module.blocks[index])

    def meta_weights(self) -> Mapping[str, Tensor]:
        """Meta weights by the hook point of their fast weights."""
        out: dict[str, Tensor] = {}
        for i in range(self.module.config.layers):
            block = self._block(i)
            for name in block.selfmod.written if block.selfmod else ():
                memory = cast(Memory, cast(SelfMod, block.selfmod).memories[name])
                weights = {"w1": memory.w1, "w2": memory.w2, "skip": memory.skip}
                prefix = f"blocks.{i}.selfmod.{name}.hook_fast_"
                out |= {prefix + k: w.detach() for k, w in weights.items() if w is not None}
            if block.titans is not None:
                prefix, memory = f"blocks.{i}.titans.memory.hook_fast_", block.titans.memory
                out |= {prefix + "w1": memory.w1.detach(), prefix + "w2": memory.w2.detach()}
            for level in block.written_levels():
                prefix = f"blocks.{i}.cms.{level.spec.name}.hook_fast_"
                out |= {prefix + "in": level.w_in.detach(), prefix + "out": level.w_out.detach()}
        if not out:
            raise self._missing("fast weights")
        return out

    def parameter_groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights by mechanism: embedding, selfmod, cms, attention, mlp, norm."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.module.named_parameters():
            parts = name.split(".")
            group = "embed" if parts[0] == "embed" else parts[2] if parts[0] == "blocks" else "norm"
            groups.setdefault("norm" if "norm" in group else group, {})[name] = parameter
        return groups

    def freeze_hooks(self, mechanism: str | None = None) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Hooks that close the write gates of `selfmod`, `cms` or one of its levels (`cms.fast`), or every gate."""
        if mechanism is None:
            return freeze_hooks(self.module)
        gates = write_gates(self.module)
        if mechanism not in gates:
            raise self._missing(f"write gate for {mechanism!r} alone{near_names(mechanism, gates)}")
        return [(gates[mechanism], close)]

    def gate_rules(self) -> Mapping[str, Sequence[str]]:
        """Every rule, for all that writes and for each mechanism alone; `assoc` for memories only."""
        config = self.module.config
        if not config.writes or config.parts.no_threshold:
            raise self._missing("gate that could follow another rule")
        alone = config.mechanisms if len(config.mechanisms) > 1 else ()
        memories = [name for name in config.mechanisms if name != "cms"]
        of_assoc = (
            [*(name for name in memories if alone), *(["all"] if not alone else [])] if memories else []
        )
        found = {rule: [*alone, "all"] for rule in GATE_RULES}
        return {**found, "assoc": of_assoc} if of_assoc else {k: v for k, v in found.items() if k != "assoc"}

    def gated(self, gate: GateRule, surprisal: Tensor | None = None) -> AbstractContextManager[None]:
        """While the context lasts, follow this gate."""
        return self.module.gated(gated_config(self.module.config, gate), surprisal)

    def with_gate(self, gate: GateRule, surprisal: Tensor | None = None) -> HopeSubject:
        """The same weights in a model with this gate."""
        config = gated_config(self.module.config, gate)
        model = HopeModel(config, None, self.module.embed.dtype)
        model.seed = self.seed
        weights = {k: v for k, v in self.module.state_dict().items() if k != FREQUENCIES}
        if model.unigram is not None:
            if surprisal is None:
                raise BadInputError(
                    "the gate rule 'excess' needs token frequencies: there is no text to count them in"
                )
            weights[FREQUENCIES] = surprisal.to(model.unigram)
        model.load_state_dict(weights)
        model = self._alike(model)
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = dataclasses.replace(checkpoint, config=config, weights=weights)
        return HopeSubject(model, checkpoint, self.path)

    def identity(self) -> Mapping[str, Any]:
        """The configuration, as far as it changes what is computed."""
        rounded = self.module.activations
        also = {} if rounded is None else {"activations": str(rounded)}
        return {"model": "hope", "dtype": self.dtype, "config": self.module.config.to_dict()} | also

    def _alike(self, model: HopeModel) -> HopeModel:
        """Another model of this run where this one is, and with its activations."""
        model = model.to(self.device)
        model.activations = self.module.activations
        return model

    def reinitialised(self, seed: int) -> HopeSubject:
        """The same configuration with fresh weights."""
        model = HopeModel(self.module.config, seed, self.module.embed.dtype)
        if model.unigram is not None and self.module.unigram is not None:
            model.set_frequencies(self.module.unigram.cpu())
        return HopeSubject(self._alike(model))

    def own_init(self) -> Subject:
        """Step-0 weights: rebuilt from config and seed and checked against the stored digest, else the step-0 file."""
        if self.checkpoint is None:
            return self
        model = initial_model(self.checkpoint)
        if model is not None:
            return HopeSubject(self._alike(model))
        for path in self.siblings():
            try:
                first = read(path)
            except BadInputError:
                continue  # a damaged sibling is no reason to fail: it is as good as absent
            if first is not None and first.step == 0:
                if digest(first.weights.items()) == self.checkpoint.init_digest:
                    found = HopeSubject(self._alike(first.to_model()), first, path)
                    same = first.config == self.checkpoint.config
                    return found if same else self._regated(found)
                break
        raise MissingCapability(
            f"{self.name}: its initial weights cannot be rebuilt from seed {self.seed} (the digest differs) "
            "and no step-0 checkpoint with the stored digest lies beside it: put the run's step-000000.pt there"
        )

    def _regated(self, other: HopeSubject) -> HopeSubject:
        """Another checkpoint of this run, as it is on disk, with the gate that this one was given."""
        gate, config = self.module.config.gate, self.module.config
        threshold = config.surprise_threshold if gate.rule == "absolute" else gate.threshold
        return other.with_gate(GateRule(gate.rule, gate.budget, threshold, gate.writes), self.module.unigram)

    def siblings(self) -> Sequence[Path]:
        """Checkpoints of the same run, by step."""
        if self.path is None:
            raise self._missing("run")
        return run_checkpoints(self.path.parent)

    def training(self) -> Mapping[str, Any]:
        """How it was trained; `keys` counts the weights, all of which were found in the file."""
        if self.checkpoint is None:
            return {"steps": 0, "keys": len(self.module.state_dict())}
        train = self.checkpoint.train
        return {
            **train,
            "steps": self.checkpoint.step,
            "keys": len(self.checkpoint.weights),
            "data": self.checkpoint.data,
            "init_digest": self.checkpoint.init_digest,
        }

    def portable(self) -> Mapping[str, Any]:
        """All fields of a checkpoint but the weights and what training goes on from."""
        if self.seed is None:
            raise self._missing("seed")
        known = self.checkpoint
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": self.module.config.to_dict(),
            "seed": self.seed,
            "step": known.step if known else 0,
            "init_digest": known.init_digest if known else digest(self.module.state_dict().items()),
            "tokenizer": self.tokenizer,
            "data": known.data if known else {},
            "train": known.train if known else {},
        }


def load_subject(path: Path) -> HopeSubject | None:
    """Loader for the entry-point group `hopeprobe.subjects`: None when the file is of another kind."""
    checkpoint = read(path)
    if checkpoint is None:
        return None
    return HopeSubject(checkpoint.to_model(), dataclasses.replace(checkpoint, optimizer=None), path)
