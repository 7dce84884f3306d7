"""Checkpoints of the public package `nested-learning` 0.2.0 (block `hope_selfmod`) as hopeprobe subjects.

A worked example of reading other people's checkpoints. It runs inside an environment that has the package
(`make peers`) and imports it, rather than reading its files alone: what is measured is then the package's own
forward pass and writes, not our idea of them. `hopeprobe analyze step_000200.pt --all` works there, as this
module is registered under `hopeprobe.subjects`; without the package `load_subject` gives None.

How windows run is the package's streaming training. A tick is one of its calls: it reads with the fast weights
as they stand, scores, computes its teach signal and its gate, and reads again to write. Ticks have
`train.online_chunk_size` tokens (0: the shortest CMS period) where the run was trained with
`train.online_updates`, and the whole window where it was not: no read of such a model ever sees a write of its
own window. What follows from the package's code and is shown as it is:

- A call writes all that is pending when it ends, so a memory's chunk is never longer than a tick, and fast
  weights are shown as they stand then. The convolution sees zeros before a call.
- The surprise gate holds CMS writes back, a call at a time, and never self-modification.
- `m_k`, `m_v`, `m_eta` and `m_alpha` get no gradient from the loss, and `m_q` none and no write either unless
  `self_mod_adaptive_q`. So `m_q` is a witness: two files of one run have the same, bit for bit.
- Without `train.use_fast_state` training writes into the weights themselves, beside the optimiser's steps.
- `train.seed` is set after the model is built, so it does not fix the initial weights, and no step-0 file is
  saved. `own_init` wants a `step_000000.pt` beside the file (save one before training), or initial weights that
  `train.seed` does give; either must agree with the witness.

Where this differs from the package: rows are run one at a time, as its fast weights are shared by a batch; ticks
do not overlap (its `online_boundary_targets`); the model is in evaluation mode, where CMS deltas are not clipped.
Missing: resetting and averaging of states.

Cost: at dim 256 and 6 layers a token that is written takes some 50 ms of one core, a row's state 100 MB: pass a small
`batch`.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from nested_learning_hooks import CMS_WEIGHTS, MEMORY_WEIGHTS, HookedPeer
from torch import Tensor

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.subject import MissingCapability, Subject, WindowLosses

if TYPE_CHECKING:
    from nested_learning.model import HOPEModel

    from hopeprobe.hooks import HookPoint

PACKAGE = "nested-learning"
VARIANT = "hope_selfmod"
_FIELDS = {"model", "optimizer", "step", "config"}  # of a file that the package saves
_STEP = re.compile(r"step_(\d+)\.pt")


class NestedLearningSubject(Subject):
    """A `hope_selfmod` model of the package at one checkpoint, or one just made (`content` None)."""

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

        Raises BadInputError for another block, or weights that do not fit the configuration.
        """
        self.config = dict(config)
        train, data = self.config.get("train") or {}, self.config.get("data") or {}
        model = _build(self.config, seed)
        online = int(train.get("online_chunk_size") or 0) or min(
            s.update_period for s in model.config.cms_levels
        )
        self.context = int(data.get("seq_len") or 512)
        self.tick = online if train.get("online_updates") else self.context
        self.module = HookedPeer(model, self.tick, bool(train.get("per_layer_teach_signal")))
        self.path, self._initial = path, initial
        self.seed = seed
        self.trained_steps = 0
        self._keys = 0
        if content is not None:
            self._keys = _load_weights(model, content["model"])
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
        """Mean cross-entropy, differentiable as in the package's training: reads are, writes are not."""
        out = self.module(tokens, lengths)
        return out.losses.sum() / out.scored.sum()

    def select_rows(self, state: Any, rows: Sequence[int]) -> Any:
        """Rows of a state, in this order."""
        return [copy.deepcopy(state[r]) for r in rows]

    def write_periods(self) -> Mapping[str, int]:
        """Tokens until a read can see the next write: a call's at least, as a call reads before it writes."""
        levels = {
            f"cms.{s.name}": max(s.update_period, self.tick) for s in self.module.peer.config.cms_levels
        }
        return {f"selfmod.{memory}": self.tick for memory in self.module.memories} | levels

    def decay_target(self) -> Mapping[str, Literal["init", "zero"]]:
        """Memories decay towards zero; CMS levels do not decay."""
        if not self.module.peer.config.self_mod_use_alpha:
            return {}
        return {f"selfmod.{memory}": "zero" for memory in self.module.memories}

    def meta_weights(self) -> Mapping[str, Tensor]:
        """Meta weights by the hook point of their fast weights."""
        named = dict(self.module.peer.named_parameters())
        found = {}
        for point in self.module.hook_dict:
            place, fast, weight = point.partition(".hook_fast_")
            if not fast:
                continue
            block, index, mechanism, part = place.split(".")
            inside = (
                f"m_{part}.{MEMORY_WEIGHTS[weight]}.weight"
                if mechanism == "selfmod"
                else (f"blocks.{part}.{CMS_WEIGHTS[weight]}")
            )
            found[point] = named[f"{block}.{index}.{mechanism}.{inside}"].detach()
        return found

    def parameter_groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights by mechanism: embed (and head, they are one tensor), selfmod, cms, norm.

        Probes find layer and component in names like `blocks.0.cms.fast.net.1.weight`, `blocks.0.selfmod.k.w1`.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for theirs, parameter in self.module.peer.named_parameters():
            name = theirs.replace(".cms.blocks.", ".cms.")
            if ".selfmod.m_" in name:
                name = name.replace(".selfmod.m_", ".selfmod.").removesuffix(".weight")
            parts = name.split(".")
            groups.setdefault(parts[2] if parts[0] == "blocks" else parts[0], {})[name] = parameter
        return groups

    def freeze_hooks(self, mechanism: str | None = None) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Hooks that close the write gates of `selfmod`, `cms`, one of its levels (`cms.fast`), or all."""
        gates = {"selfmod": "blocks.*.selfmod.hook_write_gate", "cms": "blocks.*.cms.*.hook_write_gate"}
        gates |= {f"cms.{level}": f"blocks.*.cms.{level}.hook_write_gate" for level in self.module.levels}
        if mechanism is None:
            return [("blocks.*.hook_write_gate", _close)]
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
            "tick": self.tick,
            "per_layer_teach": self.module.per_layer_teach,
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
        first = self.path.with_name("step_000000.pt") if self.path else None
        seed = (self.config.get("train") or {}).get("seed")
        for what, found in (
            ("step_000000.pt beside it", load_subject(first) if first and first.is_file() else None),
            (f"what train.seed {seed} gives", self.reinitialised(int(seed)) if seed is not None else None),
        ):
            if found is None:
                continue
            wrong = self._not_ours(found)
            if not wrong:
                return found
            reasons.append(f"{what} {wrong}")
        reasons = reasons or ["no step_000000.pt lies beside it, and train.seed is not set"]
        raise MissingCapability(f"{self.name}: its initial weights cannot be had: {'; '.join(reasons)}")

    def _not_ours(self, initial: NestedLearningSubject) -> str:
        """Why these are not this run's initial weights; empty when they may be."""
        if initial.trained_steps != 0:
            return f"says step {initial.trained_steps}"
        if initial.identity() != self.identity():
            return "has another configuration"
        if self.module.peer.config.self_mod_adaptive_q:
            # Without a witness a file's word is taken, a guess is not.
            return "" if initial.path else "may be others: nothing here stays as it was initialised"
        ours, theirs = self._witness(), initial._witness()
        same = all(torch.equal(ours[name], theirs[name]) for name in ours)
        return "" if same else "is of another run: m_q differs, which nothing in this package changes"

    def _witness(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.parameter_groups()["selfmod"].items() if ".selfmod.q." in n}

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
        if kind != "adamw" or not train.get("use_fast_state"):
            return told | {"outer_learning_rate": rate}
        beta1, beta2 = optim.get("betas", (0.9, 0.999))
        decay = float(optim.get("weight_decay", 0.0))
        return told | {"learning_rate": rate, "beta1": beta1, "beta2": beta2, "weight_decay": decay}


def _close(gate: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(gate)


def _build(config: Mapping[str, Any], seed: int | None) -> HOPEModel:
    from nested_learning.training import build_model_from_cfg
    from omegaconf import OmegaConf

    model = OmegaConf.create({"model": config["model"]}).model
    variant = str(model.get("block_variant", "hope_hybrid"))
    if model.get("type", "hope") != "hope" or variant != VARIANT:
        raise BadInputError(f"block_variant is {variant!r}; this adapter reads {VARIANT!r} alone")
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return build_model_from_cfg(model)


def _load_weights(model: HOPEModel, weights: Mapping[str, Tensor]) -> int:
    """Load a file's weights, all of them; how many. Compiled models have a prefix before every key."""
    prefix = "_orig_mod."
    named = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    expected = model.state_dict()
    wrong = sorted(named.keys() ^ expected.keys())
    wrong = wrong or [n for n, t in named.items() if t.shape != expected[n].shape]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise BadInputError(f"weights do not fit the file's own configuration: {shown}")
    model.load_state_dict(named)
    return len(named)


def load_subject(path: Path) -> NestedLearningSubject | None:
    """Loader for the entry-point group `hopeprobe.subjects`: None for other files, or without the package."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None  # damaged, or somebody else's
    if not isinstance(content, Mapping) or not content.keys() >= _FIELDS:
        return None
    try:
        return NestedLearningSubject(content["config"], content=content, path=path)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
