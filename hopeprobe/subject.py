"""The contract between probes and models, and how a checkpoint file becomes something that can be probed.

A loader is registered under the entry-point group `hopeprobe.subjects`; it gets a path and returns a `Subject`, or
None when the file is not of its kind. Our own model registers there like any other. What a model cannot do it leaves
alone: the default raises `MissingCapability`, and a probe that needs it answers `n/a`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hopeprobe.devices import find_device
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.foreign import what_reads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hopeprobe.hooks import Hooked

LOADER_GROUP = "hopeprobe.subjects"
OTHERS = (
    "other models join by a map (`--map`, or load(path, map=...); `python -m pydoc hopeprobe.mapping.spec` describes "
    f"it), or by a loader in the entry-point group {LOADER_GROUP!r}"
)


class MissingCapability(MeasurementError):  # noqa: N818 - not a failure: the model simply has no such thing
    """The model cannot do what a probe needs; the probe answers `n/a` with this message."""


class WindowLosses(NamedTuple):
    """Scored windows."""

    losses: Tensor  # (B, T) nats; 0 where not scored
    scored: Tensor  # (B, T) bool
    state: Any  # the streams' state after the windows


@dataclass(frozen=True)
class GateRule:
    """A gate in place of a model's own; rules and mechanisms as `Subject.gate_rules` names them.

    rule: what a token is judged by. budget: share of the tokens to write, (0, 1]; threshold: of the score, for rules
    that take one instead; `absolute` without either keeps the model's own. writes: the mechanism whose writes it is
    for, the others writing every token, or `all`.
    """

    rule: str
    budget: float | None = None
    threshold: float | None = None
    writes: str = "all"

    def __post_init__(self) -> None:
        """Raise BadInputError for a threshold that is not finite."""
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise BadInputError(f"the gate's threshold is {self.threshold!r}, must be finite")


class Subject:
    """A model at one checkpoint. Adapters for foreign models subclass this and define what they can.

    Attributes:
        module: the model, with its hook points (`module.hook_dict`).
        name: how the checkpoint is called in tables: the file's name, as a rule.
        path: the file, None for a model that never was one.
        tokenizer: name of the tokenizer its vocabulary belongs to.
        vocab_size: number of tokens the model scores.
        context: tokens of one window in training.
        tick: tokens of one step.
        trained_steps: optimiser steps behind these weights, None where the file does not say.
        seed: of the initial weights, None where the file does not say.
        dtype: of the weights, for instance "float32".
        device: where the model computes; tokens come from the host, and what `run` gives may lie there.
    """

    module: Hooked
    name: str
    path: Path | None = None
    tokenizer: str = "gpt2"
    vocab_size: int
    context: int
    tick: int
    trained_steps: int | None = None
    seed: int | None = None
    dtype: str = "float32"
    device: torch.device | str = "cpu"

    def _missing(self, what: str) -> MissingCapability:
        return MissingCapability(f"{self.name}: this model has no {what}")

    def to(self, device: torch.device) -> Subject:
        """Move the model to a device, with whatever will be made of it: itself, which computes there from now on."""
        raise self._missing("way to another device")

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, tokens: Tensor, lengths: Tensor | None = None, state: Any = None) -> WindowLosses:
        """Score windows (B, T + 1) from a fresh state or on from `state`, hooks firing, without an outer gradient.

        `state` stands at a multiple of the tick, nothing pending; it is left as it is. lengths (B,): 0..T.
        """
        raise self._missing("windows to score")

    def init_state(self, batch: int) -> Any:
        """A fresh state of `batch` streams."""
        raise self._missing("state")

    def step(self, state: Any, tokens: Tensor, next_token: Tensor) -> tuple[Tensor, Any]:
        """One tick: tokens (B, C), next_token (B,) to losses (B, C) and the next state."""
        raise self._missing("tick")

    def logits(self, state: Any, tokens: Tensor) -> Tensor:
        """Logits (B, n, V) after each of the n <= tick tokens (B, n) that come next, hooks firing; nothing is written.

        `state` as in `run`; it is left as it is.
        """
        raise self._missing("logits")

    def loss(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of windows, a differentiable scalar."""
        raise self._missing("differentiable loss")

    def replica(self) -> Subject | None:
        """Another subject on the same weights that may be run at the same time, in another thread; None: not so.

        Hook points must be its own.
        """
        return None

    def exact(self) -> Subject:
        """The same weights in a model of its own, with hook points of its own, that computes in float64; else itself.

        For what hangs on an order of numbers, which a rounding of float32 can turn: ranks, and gates that go by them.
        """
        return self

    def doubts(self) -> str | None:
        """Hook point [R, T] that is not 0 where a rounding could have turned a gate; None where no point says."""
        return None

    # -- rows of a state ----------------------------------------------------------------------------------------

    def select_rows(self, state: Any, rows: Sequence[int]) -> Any:
        """The given rows of a state, in this order; a permutation swaps sequences."""
        raise self._missing("rows of a state")

    def reset_rows(self, state: Any, rows: Sequence[int]) -> Any:
        """The state with the fast weights of the given rows back at their meta weights."""
        raise self._missing("resetting of a state")

    def average_rows(self, state: Any, weights: Tensor) -> Any:
        """The state with fast weights averaged over rows: new row r is sum_s weights[r, s] of row s."""
        raise self._missing("averaging of states")

    # -- what the model is made of -------------------------------------------------------------------------------

    def write_periods(self) -> Mapping[str, int]:
        """Tokens between two writes, by mechanism (`cms.fast`, `selfmod.memory`); empty: the model never writes."""
        raise self._missing("write periods")

    def decay_target(self) -> Mapping[str, Literal["init", "zero"]]:
        """What fast weights decay towards, their meta weights or zero, by names of `write_periods`.

        One that is not there does not decay.
        """
        raise self._missing("declared decay")

    def meta_weights(self) -> Mapping[str, Tensor]:
        """For every fast-weight hook point, the meta weights its tensor started from, without the batch.

        These points fire at the end of every write period, also where nothing was written: what is shown of a window
        must not hang on those beside it.
        """
        raise self._missing("fast weights")

    def parameter_groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights by mechanism, then by name."""
        raise self._missing("named parameters")

    def freeze_hooks(self, mechanism: str | None = None) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Forward hooks (selector, fn) that close the write gates of a mechanism, None for all: the frozen model.

        mechanism: a name of `write_periods`, or what comes before its dot (`cms` for all of its levels). Raises
        `MissingCapability` for one that the model does not have, or that shares its gate with others.
        """
        raise self._missing("write gates")

    # -- which tokens are written ---------------------------------------------------------------------------------

    def gate_rules(self) -> Mapping[str, Sequence[str]]:
        """Rules that this model can be gated by, each with the mechanisms that it can be for, `all` among them."""
        raise self._missing("gate that could follow another rule")

    def gated(self, gate: GateRule, surprisal: Tensor | None = None) -> AbstractContextManager[None]:
        """While the context lasts, `run` and `step` follow this gate, on the same hook points.

        surprisal: of every token by its frequency, (V,) nats, for the rule `excess`. Raises `BadInputError` for a rule,
        or a mechanism, that the model does not have.
        """
        raise self._missing("gate that could follow another rule")

    def with_gate(self, gate: GateRule, surprisal: Tensor | None = None) -> Subject:
        """The same checkpoint with this gate as its own, and its initial weights with it too."""
        raise self._missing("gate that could follow another rule")

    # -- where it comes from -------------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        """Plain data that fixes the model's computation up to its weights: the key under which nulls are cached."""
        raise self._missing("configuration")

    def reinitialised(self, seed: int) -> Subject:
        """The same model with fresh initial weights."""
        raise self._missing("way to be initialised again")

    def own_init(self) -> Subject:
        """This run's own step-0 weights; raises `MissingCapability` with the reason where they cannot be had."""
        raise self._missing("initial weights")

    def siblings(self) -> Sequence[Path]:
        """Checkpoints of the same run, by step, this one among them."""
        raise self._missing("run")

    def sibling(self, path: Path) -> Subject:
        """Open another checkpoint of the same run, where this one is; errors as `load`."""
        return load(path, device=self.device)

    def training(self) -> Mapping[str, Any]:
        """How it was trained, as far as known: optimiser, learning rates, data identity, loaded and expected keys.

        `init_digest`, any text that two runs share only if they began from the same weights, spares those who walk a
        run the making of its initial weights for every checkpoint.
        """
        raise self._missing("training record")

    def portable(self) -> Mapping[str, Any]:
        """Plain data from which, with the weights, its loader makes this subject again: what an exported file says."""
        raise self._missing("description that a loader could make it from")


def placed(subject: Subject, device: torch.device | str | None) -> Subject:
    """A subject on a device, as `find_device` names them; None, and `auto` for one that stays, leave it where it is.

    Raises BadInputError for a device that is not there, or not for this subject.
    """
    if device is None:
        return subject
    where = find_device(device)
    if str(where) == str(subject.device):
        return subject
    try:
        return subject.to(where)
    except MissingCapability as error:
        if device == "auto":
            return subject
        raise BadInputError(f"device {where}: {error}") from None


def load(
    path: str | Path,
    map: str | Path | Mapping[str, Any] | None = None,  # noqa: A002
    device: torch.device | str = "cpu",
) -> Subject:
    """Open a checkpoint: through a map if there is one, else with the first registered loader that knows its kind.

    Args:
        path: the file.
        map: how a file of any model becomes one, and which of its modules are which hook points: a map's file, the name
            of a registered one, or its plain data (`hopeprobe.mapping`).
        device: where it shall compute: cpu, cuda, cuda:N, or auto, which takes an accelerator where there is one.

    Raises:
        BadInputError: there is no such file, or device, it is damaged, no loader knows it (of a kind that an adapter
            of ours would know, it says what to install), or the map cannot be used.

    """
    file = Path(path)
    try:
        file.stat()
    except FileNotFoundError:
        pass  # said below, with what there is instead
    except (OSError, ValueError) as error:  # too long a name, no permission, a null byte
        shown = str(file) if len(str(file)) < 200 else f"{str(file)[:200]}…"
        raise BadInputError(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from None
    if file.is_dir():
        inside = sorted(file.glob("*.pt")) or sorted(file.glob("*/*.pt"))
        hint = (
            f"name a checkpoint in it, for instance {inside[-1]}" if inside else "there is no .pt file in it"
        )
        raise BadInputError(f"{file} is a folder; {hint}")
    if not file.exists():
        there = sorted(p.name for p in file.parent.glob(f"*{file.suffix}")) if file.parent.is_dir() else []
        nearest = sorted(difflib.get_close_matches(file.name, there, n=5, cutoff=0.5)) or there[:5]
        hint = f"; in {file.parent} there are: {', '.join(nearest)}" if nearest else ""
        raise BadInputError(f"{file} does not exist{hint}")
    if map is not None:
        from hopeprobe.mapping import load_mapped

        return placed(load_mapped(file, map), device)
    tried, broken = list[str](), list[str]()
    for entry in entry_points(group=LOADER_GROUP):
        try:
            loader: Callable[[Path], Subject | None] = entry.load()
        except ImportError as error:  # an adapter without what it needs: no reason for the others to fail
            broken.append(f"{entry.name} ({error})")
            continue
        subject = loader(file)
        if subject is not None:
            return placed(subject, device)
        tried.append(entry.name)
    known = f"known kinds: {', '.join(tried)}" if tried else "no loader is installed"
    known += f"; not usable: {', '.join(broken)}" if broken else ""
    hint = what_reads(file) or OTHERS
    raise BadInputError(f"{file} is not a checkpoint that can be read ({known}): {hint}")
