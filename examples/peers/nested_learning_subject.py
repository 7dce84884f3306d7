"""Checkpoints of the public package `nested-learning` 0.2.0 as hopeprobe subjects: all its blocks, and `type: titan`.

It runs inside an environment that has the package (`make peers`) and imports it, rather than reading its files alone:
what is measured is then the package's own forward pass and writes, not our idea of them. `hopeprobe analyze
step_000200.pt --all` works there, as this module is registered under `hopeprobe.subjects`.

| `model.block_variant` | a block is | what is written |
|---|---|---|
| `hope_selfmod` | self-modifying memories, CMS | both |
| `hope_attention` | attention, CMS | the CMS |
| `hope_hybrid` (the package's default) | attention, Titans memory, CMS | memory and CMS |
| `transformer` | attention, MLP | nothing |
| none, with `model.type: titan` | attention, Titans memory | the memory |

What each of these does, and what the package's code makes of it, stands at the top of `nested_learning_parts`
(attention), `nested_learning_selfmod`, `nested_learning_cms`, `nested_learning_titan` and `nested_learning_surprise`
(the gate). A probe of something that a variant does not have answers `n/a`.

How windows run is the package's streaming training. A tick is one of its calls: it reads with the fast weights
as they stand, scores, computes its teach signal and its gate, and reads again to write. Ticks have
`train.online_chunk_size` tokens (0: the shortest CMS period) where the run was trained with `train.online_updates`.
Where it was not, or has no CMS levels to say how many, or is of `type: titan`, a tick is a whole window, its last
token too, which is only a target, and what a write leaves pending is flushed or dropped: no read of such a model ever
sees a write of its own window. What follows from the package's code and is shown as it is:

- Writes have no gradient: `loss` reaches what is read (but see `nested_learning_cms` for one mode of training).
- Without `train.use_fast_state` training writes into the weights themselves, beside the optimiser's steps.
- `train.seed` is set after the model is built, so it does not fix the initial weights, and no step-0 file is
  saved. `own_init` wants a `step_000000.pt` beside the file (save one before training), or initial weights that
  `train.seed` does give; either must agree with the weights that nothing ever changes, where a variant has some:
  static queries' `m_q`, the `self_modifier`, what `freeze_backbone` froze.

Where this differs from the package: rows are run one at a time, as its fast weights are shared by a batch; ticks do
not overlap, as with its `online_boundary_targets` (without, a call begins with the token that ended the one before,
and its own last has no signal: less surprise in `l2`'s mean, and a write the sooner by a token a call); the last of
several calls in a window, whose write no read sees, neither flushes nor drops what is pending; the model is in
evaluation mode and in its weights' own dtype, without `train.mixed_precision`. A file does not say whether it comes
of distributed training, which switches online updates and per-layer signals off whatever its configuration says.
Missing: resetting and averaging of states.

Cost: at dim 256 and 6 layers a token that self-modification writes takes some 50 ms of one core, a row's state
100 MB: pass a small `batch`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from nested_learning_files import PACKAGE, build, calls_of, grouped, load_weights, read_content, untouched
from nested_learning_hooks import HookedPeer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.subject import MissingCapability, Subject, WindowLosses

if TYPE_CHECKING:
    from nested_learning_parts import Part

    from hopeprobe.hooks import HookPoint

_STEP = re.compile(r"step_(\d+)\.pt")


class NestedLearningSubject(Subject):
    """A model of the package at one checkpoint, or one just made (`content` None)."""

    module: HookedPeer

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int | None = None,
        content: Mapping[str, Any] | None = None,
        path: Path | None = None,
        initial: NestedLearningSubject | None = None,
    ) -> None:
        """Build the package's model from its own configuration (`model`, `data`, `train`, `optim`).

        seed: draws fresh weights. content: a file's, whose weights are loaded instead. initial: the run's own
        initial model, where the caller knows it.

        Raises BadInputError for a configuration that the package cannot build, or that does not fit the weights.
        """
        self.config = dict(config)
        train, data = self.config.get("train") or {}, self.config.get("data") or {}
        model = build(self.config, seed)
        self.context = int(data.get("seq_len") or 512)
        calls = calls_of(self.config, model, self.context)
        self.tick = calls.tick
        self.module = HookedPeer(model, calls)
        self.path, self._initial = path, initial
        self.seed = seed
        self.trained_steps = 0
        self._keys = 0
        if content is not None:
            self._keys = load_weights(model, content["model"])
            self.trained_steps = int(content["step"]) + int(train.get("step_offset") or 0)
        self.name = path.name if path else f"{PACKAGE} (initial weights, seed {seed})"
        tokenizer = data.get("tokenizer_path")
        self.tokenizer = Path(tokenizer).name if tokenizer else "gpt2"
        self.vocab_size = model.config.vocab_size
        self.dtype = str(model.embed.weight.dtype).removeprefix("torch.")

    @torch.no_grad()
    def run(self, tokens: Tensor, lengths: Tensor | None = None, state: Any = None) -> WindowLosses:
        """Score windows (B, T + 1), hooks firing, without an outer gradient."""
        return self.module(tokens, lengths, state)

    def init_state(self, batch: int) -> Any:
        """A fresh state of `batch` rows."""
        return self.module.init_state(batch)

    def step(self, state: Any, tokens: Tensor, next_token: Tensor) -> tuple[Tensor, Any]:
        """One call of the package."""
        if tokens.shape[1] != self.tick:
            raise BadInputError(f"a step takes {self.tick} tokens, not {tokens.shape[1]}")
        out = self.module(torch.cat([tokens, next_token[:, None]], dim=1), None, state)
        return out.losses, out.state

    def logits(self, state: Any, tokens: Tensor) -> Tensor:
        """Logits (B, n, V) after each of at most a tick of tokens, read without writing, hooks firing."""
        if tokens.shape[1] > self.tick:
            raise BadInputError(
                f"logits are read a call at a time, {self.tick} tokens, not {tokens.shape[1]}"
            )
        return self.module.logits(tokens, state)

    def loss(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, differentiable as in the package's training: reads are, writes in one mode only."""
        through = self.module.calls.differentiable
        # A gradient through writes takes second derivatives, which fused attention has none of.
        with sdpa_kernel(SDPBackend.MATH) if through else nullcontext():
            out = self.module(tokens, lengths, through=through)
        return out.losses.sum() / out.scored.sum()

    def select_rows(self, state: Any, rows: Sequence[int]) -> Any:
        """Rows of a state, in this order."""
        return [copy.deepcopy(state[r]) for r in rows]

    def write_periods(self) -> Mapping[str, int]:
        """Tokens until a read can see the next write: a call's at least, as a call reads before it writes."""
        whole = self.module.calls.whole
        return {name: n for part in self._parts() for name, n in part.periods(self.tick, whole).items()}

    def decay_target(self) -> Mapping[str, Literal["init", "zero"]]:
        """Memories of self-modification decay towards zero; CMS levels and the Titans memory do not decay."""
        return {name: target for part in self._parts() for name, target in part.decays().items()}

    def meta_weights(self) -> Mapping[str, Tensor]:
        """Meta weights by the hook point of their fast weights."""
        found = {point: meta.detach() for part in self._parts() for point, meta in part.fast.items()}
        if not found:
            raise self._missing("fast weights")
        return found

    def _parts(self) -> list[Part]:
        return [part for parts in self.module.parts for part in parts]

    def parameter_groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights by mechanism: embed (and head, they are one tensor), selfmod, attention, titans, cms, mlp, norm."""
        return grouped(self.module.peer)

    def freeze_hooks(self, mechanism: str | None = None) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Hooks that close the write gates of `selfmod`, `titans`, `cms`, one of its levels (`cms.fast`), or all."""
        named = dict.fromkeys(
            re.sub(r"blocks\.\d+\.(.+)\.hook_write_gate", r"\1", g) for p in self._parts() for g in p.gates
        )
        if mechanism is None:
            return [("blocks.*.hook_write_gate", _close)] if named else []
        gates = {name: f"blocks.*.{name}.hook_write_gate" for name in named}
        if any(name.startswith("cms.") for name in named):
            gates["cms"] = "blocks.*.cms.*.hook_write_gate"
        if mechanism not in gates:
            raise self._missing(f"write gate for {mechanism!r} alone{near_names(mechanism, gates)}")
        return [(gates[mechanism], _close)]

    # -- where it comes from -------------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        """The package's version and what of the configuration changes the computation."""
        return {
            "model": PACKAGE,
            "version": metadata.version(PACKAGE),
            "dtype": self.dtype,
            "type": type(self.module.peer).__name__,
            "calls": dataclasses.asdict(self.module.calls),
            "config": dataclasses.asdict(self.module.peer.config),
        }

    def reinitialised(self, seed: int) -> NestedLearningSubject:
        """The same configuration with fresh weights."""
        return NestedLearningSubject(self.config, seed=seed)

    def own_init(self) -> Subject:
        """Step-0 weights: those the caller gave, the step-0 file's, or what `train.seed` gives; see the top."""
        if self._initial is not None:
            return self._initial
        if self.trained_steps == 0:
            return self
        reasons = []
        for what, make in self._beginnings():
            try:
                found = make()
                wrong = "is no checkpoint that can be read" if found is None else self._not_ours(found)
            except BadInputError as error:
                found, wrong = None, f"cannot be used: {error}"
            if found is not None and not wrong:
                return found
            reasons.append(f"{what} {wrong}")
        reasons = reasons or ["no step_000000.pt lies beside it, and train.seed is not set"]
        raise MissingCapability(f"{self.name}: its initial weights cannot be had: {'; '.join(reasons)}")

    def _beginnings(self) -> Iterator[tuple[str, Callable[[], NestedLearningSubject | None]]]:
        """Where the initial weights may be had from, and how."""
        first = self.path.with_name("step_000000.pt") if self.path else None
        if first and first.is_file():
            yield "step_000000.pt beside it", partial(load_subject, first)
        seed = (self.config.get("train") or {}).get("seed")
        if seed is not None:
            yield f"what train.seed {seed} gives", lambda: self.reinitialised(int(seed))

    def _not_ours(self, initial: NestedLearningSubject) -> str:
        """Why these are not this run's initial weights; empty when they may be."""
        if initial.trained_steps != 0:
            return f"says step {initial.trained_steps}"
        if initial.identity() != self.identity():
            return "has another configuration"
        ours, theirs = untouched(self.module.peer), untouched(initial.module.peer)
        if not ours:
            # Without a witness a file's word is taken, a guess is not.
            return "" if initial.path else "may be others: nothing here stays as it was initialised"
        other = next((name for name in ours if not torch.equal(ours[name], theirs[name])), "")
        return f"is of another run: {other} differs, which nothing in this package changes" if other else ""

    def siblings(self) -> Sequence[Path]:
        """Checkpoints of the same run, by step."""
        if self.path is None:
            raise self._missing("run")
        found = [p for p in self.path.parent.glob("step_*.pt") if _STEP.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.stem.removeprefix("step_")))

    def training(self) -> Mapping[str, Any]:
        """How it was trained. `learning_rate` only where AdamW alone moved the weights."""
        train, optim = self.config.get("train") or {}, self.config.get("optim") or {}
        kind = str(optim.get("type", "adamw")).lower()
        told: dict[str, Any] = {"steps": self.trained_steps, "keys": self._keys, "optimizer": kind}
        told |= {
            "data": self.config.get("data") or {},
            "batch": (self.config.get("data") or {}).get("batch_size"),
        }
        rate = float(optim.get("lr", 1e-3))
        if kind != "adamw" or not (train.get("use_fast_state") or not any(self.module.parts)):
            return told | {"outer_learning_rate": rate}
        beta1, beta2 = optim.get("betas", (0.9, 0.999))
        decay = float(optim.get("weight_decay", 0.0))
        return told | {"learning_rate": rate, "beta1": beta1, "beta2": beta2, "weight_decay": decay}


def _close(gate: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(gate)


def load_subject(path: Path) -> NestedLearningSubject | None:
    """Loader for the entry-point group `hopeprobe.subjects`: None for other files.

    Raises BadInputError for one of the package's that cannot be read, or not without the package.
    """
    content = read_content(path)
    if content is None:
        return None
    try:
        return NestedLearningSubject(content["config"], content=content, path=path)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: what it says of its run cannot be read: {error}") from None
