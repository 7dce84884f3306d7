"""A mapped module as a subject; what a module alone cannot say is a missing capability.

Windows run whole, from a fresh state: streams (`carry`), resetting and averaging of states, and logits beside a state
are missing. `freeze` closes all writes of a memory at once, so there is no gate a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hopeprobe.errors import BadInputError, MeasurementError, near_names
from hopeprobe.subject import Subject, WindowLosses, placed

from .checks import check_subject, sample_length
from .code import code_of, settings_of
from .files import Build, built, read_content, stated
from .modelled import ENDED, MappedModel
from .spec import LAYER, Map, matching, near_patterns, read_map

if TYPE_CHECKING:
    from hopeprobe.hooks import HookPoint

REST = "other"
UNSAID = "[memory] in its map, nor does the map say `writes = false`: whether it writes is not known"


class MappedSubject(Subject):
    """A module at one checkpoint, seen through a map; made by `subject_of` and `load_mapped`."""

    module: MappedModel

    def __init__(
        self,
        inner: nn.Module,
        spec: Map,
        *,
        name: str,
        path: Path | None = None,
        content: Mapping[str, Any] | None = None,
        initial: Subject | None = None,
        build: Build | None = None,
    ) -> None:
        """See `subject_of`; content: of the file. Raises BadInputError where the map does not fit the module."""
        told, model = spec.told, spec.model
        for needed in ("context", "tokenizer"):
            if needed not in model:
                raise BadInputError(f"{told}, [model]: {needed} is missing")
        self.context, self.tokenizer = model["context"], model["tokenizer"]
        self.module = MappedModel(inner, spec, self.context)
        self.tick = self.module.tick
        self.name, self.path = name, path
        self._content, self._initial, self._build = content or {}, initial, build
        self._builds_vary = False  # seen that another seed builds other weights
        self.trained_steps = stated(self._content, model.get("steps"), told, "steps")
        self.seed = stated(self._content, model.get("seed"), told, "seed")
        first = next(inner.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = "float32" if first is None else str(first.dtype).removeprefix("torch.")
        shown = self._logits_of(sample_length(self))
        self.vocab_size = model.get("vocab_size", shown)
        if self.vocab_size > shown:
            raise BadInputError(
                f"{told}, [model]: vocab_size is {self.vocab_size}, and there are {shown} logits"
            )

    def _logits_of(self, length: int) -> int:
        """How many logits there are, of a window as long as those that the map is tried on."""
        try:
            return self.read(torch.zeros(1, length, dtype=torch.int64, device=self.device)).shape[-1]
        except MeasurementError as error:
            raise BadInputError(str(error)) from error

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of a window's tokens, without an outer gradient."""
        with torch.set_grad_enabled(bool(self.module.spec.model.get("grad"))):
            return self.module.read(tokens).detach()

    def run(self, tokens: Tensor, lengths: Tensor | None = None, state: Any = None) -> WindowLosses:
        """Score windows (B, T + 1) from a fresh state, hooks firing."""
        if state is not None:
            raise self._missing("state: its windows begin afresh")
        with torch.set_grad_enabled(bool(self.module.spec.model.get("grad"))):
            losses, scored, _ = self.module(tokens.to(self.device), lengths)
        return WindowLosses(losses.detach(), scored, ENDED)

    def loss(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, with the gradient that the module's own forward pass has."""
        losses, scored, _ = self.module(tokens.to(self.device), lengths)
        return losses.sum() / scored.sum()  # type: ignore[no-any-return]

    # -- what it is made of --------------------------------------------------------------------------------------

    def write_periods(self) -> Mapping[str, int]:
        """Of each `[memory]`; MissingCapability where there is none and the map does not say that nothing writes."""
        if self._unsaid:
            raise self._missing(UNSAID)
        return {memory.name: memory.period for memory in self.module.spec.memories}

    @property
    def _unsaid(self) -> bool:
        return not self.module.spec.memories and self.module.spec.model.get("writes", True)

    def decay_target(self) -> Mapping[str, Literal["init", "zero"]]:
        """As the map says."""
        return {m.name: m.decay for m in self.module.spec.memories if m.decay}  # type: ignore[misc]

    def meta_weights(self) -> Mapping[str, Tensor]:
        """Parameters by the points of the fast weights that start from them."""
        named = dict(self.module.inner.named_parameters()) | dict(self.module.inner.named_buffers())
        found = {}
        for point, name in self.module.metas.items():
            if name not in named:
                raise BadInputError(
                    f"{self.module.spec.told}, {point}: meta is {name!r}, no parameter{near_names(name, named)}"
                )
            found[point] = named[name].detach()
        return found

    def parameter_groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The map's groups and `other`; weights under `blocks.{layer}.cms.fast` are of the group `cms`, by such names.

        Raises BadInputError for a module that is not there, or one without weights.
        """
        rest = dict(self.module.inner.named_parameters())
        groups: dict[str, dict[str, Tensor]] = {}
        for place, holders in self.module.spec.groups.items():
            for holder in holders:
                for layer, name in self._holding(place, holder):
                    filled = place.replace(LAYER, layer)
                    group = filled.split(".")[2] if filled.startswith(f"blocks.{layer}.") else filled
                    for key in [k for k in rest if k == name or k.startswith(f"{name}.")]:
                        ours = key if LAYER not in place else filled + key.removeprefix(name)
                        groups.setdefault(group, {})[ours] = rest.pop(key)
        return groups | ({REST: groups.get(REST, {}) | rest} if rest else {})

    def _holding(self, place: str, holder: str) -> list[tuple[str, str]]:
        names = {
            key.rsplit(".", n)[0]
            for key, _ in self.module.inner.named_parameters()
            for n in range(key.count(".") + 1)
        }
        found = matching(holder, sorted(names))
        if not found:
            near = near_patterns(holder, sorted(names))
            raise BadInputError(
                f"{self.module.spec.told}, [groups], {place}: there are no weights in {holder!r}{near}"
            )
        return found

    def freeze_hooks(self, mechanism: str | None = None) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Hooks that put in, at the points of `freeze`, the numbers under which nothing is written."""
        memories = self.module.spec.memories
        if self._unsaid:
            raise self._missing(UNSAID)
        if mechanism is None and not memories:
            return []
        meant = [
            m
            for m in memories
            if mechanism is None or m.name == mechanism or m.name.startswith(f"{mechanism}.")
        ]
        without = [m.name for m in meant if not m.freeze]
        if not meant or without:
            what = f"way to freeze {without[0] if without else mechanism}"
            raise self._missing(
                f"{what}{near_names(str(mechanism), self.write_periods()) if not meant else ''}"
            )
        found = []
        for memory in meant:
            for point, number in memory.freeze.items():
                names = [n for n, placed in self.module.placed.items() if placed.spec.name == point]
                found.append((names, partial(_set_to, number)))
        return found

    # -- where it comes from -------------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        """The map, what the model was built with, and digests of its code and of its modules' settings.

        Raises MissingCapability where some of the code is in no file, and of a `build` that is no map's: nothing would
        tell another version from it, or what it was given (a partial's arguments, a closure's, a script's).
        """
        if self._build is not None and not self._build.known:
            raise self._missing("`build` of a map: what else a callable makes models of is not known")
        code = code_of(self.module.inner, self._build.make if self._build else None)
        if code is None:
            raise self._missing("code in files: some of its modules were defined in memory")
        told = {
            "map": _plain(self.module.spec.document),
            "arguments": _plain(self._build.arguments if self._build else {}),
        }
        return told | {"code": code, "settings": settings_of(self.module.inner)}

    def to(self, device: torch.device) -> MappedSubject:
        """Move the module, and initial weights that it was given, to a device."""
        self.module.inner.to(device)
        self.device = device
        if self._initial is not None and self._initial is not self:
            self._initial = placed(self._initial, device)
        return self

    def reinitialised(self, seed: int) -> MappedSubject:
        """A model built anew.

        Raises MissingCapability where the map has no `build`, or one that gives the same weights whatever the seed.
        """
        if self._build is None:
            raise self._missing("way to be built again: the map has no `build`")
        inner = _built_with(self._build, seed)
        if not self._builds_vary:  # seen once: a model takes time to build
            other = _built_with(self._build, seed + 1)
            if inner is other or _same_weights(inner, other):
                raise self._missing(
                    "fresh weights: `build` gives the same ones whatever torch's seed, or seeds itself"
                )
            self._builds_vary = True
        told = f"{self.module.spec.told} (initial weights, seed {seed})"
        fresh = MappedSubject(inner.to(self.device), self.module.spec, name=told, build=self._build)
        fresh.trained_steps, fresh.seed = 0, seed
        return fresh

    def own_init(self) -> Subject:
        """The run's own initial weights: those given, or the file that `initial` names."""
        if self._initial is not None:
            return self._initial
        if self.trained_steps == 0:
            return self
        name = self.module.spec.model.get("initial")
        if name is None or self.path is None:
            raise self._missing("initial weights: the map names no file with them (`initial`)")
        file = self.path.with_name(name)
        if not file.is_file():
            raise self._missing(f"initial weights: {file} is not there")
        found = self.sibling(file)
        # Of a map that says the number itself, each file would have it.
        if isinstance(self.module.spec.model.get("steps"), str) and found.trained_steps:
            raise self._missing(f"initial weights: {file} says step {found.trained_steps}")
        if (
            found._build is not None
            and self._build is not None
            and found._build.arguments != self._build.arguments
        ):
            raise self._missing(f"initial weights: the model of {file} was built with other arguments")
        found.trained_steps = 0
        return found

    def sibling(self, path: Path) -> MappedSubject:
        """Another file of the run, through the same map, which has been tried."""
        return _opened(path, self.module.spec)

    def siblings(self) -> Sequence[Path]:
        """Files of the run, in the order of the numbers in their names."""
        pattern = self.module.spec.model.get("checkpoints")
        if pattern is None or self.path is None:
            raise self._missing("run: the map does not say what its files are called (`checkpoints`)")
        return sorted(self.path.parent.glob(pattern), key=_by_number)

    def training(self) -> Mapping[str, Any]:
        """How many weights were loaded."""
        if self.path is None:
            raise self._missing("training record")
        return {"steps": self.trained_steps, "keys": len(self.module.inner.state_dict())}


def _built_with(build: Build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _set_to(number: float, tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
    return torch.full_like(tensor, number)


def _by_number(path: Path) -> tuple[list[int], str]:
    return [int(n) for n in re.findall(r"\d+", path.name)], path.name


def subject_of(
    module: nn.Module,
    spec: Map | Mapping[str, Any] | str | Path,
    *,
    name: str = "model",
    initial: nn.Module | None = None,
    build: Callable[[], nn.Module] | None = None,
) -> MappedSubject:
    """A module in memory as a subject.

    Args:
        module: gives logits (B, T, V) of tokens (B, T); it is measured in evaluation mode and left in its own.
        spec: a map, its plain data, or its file; `context` and `tokenizer` are needed of `[model]`.
        name: how tables call it.
        initial: the same model with the weights that training began from, for the null `own-init`.
        build: makes the model with fresh weights from torch's seed, for the null `fresh-init`.

    Raises:
        BadInputError: the map cannot be used, or does not hold of the model (`hopeprobe.mapping.checks`).

    """
    made = _map(spec)
    make = None if build is None else Build(build)
    first = None if initial is None else MappedSubject(initial, made, name=f"{name} (initial)", build=make)
    if first is not None:
        first.trained_steps = 0
    subject = MappedSubject(module, made, name=name, initial=first, build=make)
    check_subject(subject)
    return subject


def load_mapped(path: str | Path, spec: Map | Mapping[str, Any] | str | Path) -> MappedSubject:
    """A checkpoint file as a subject: `[model]` says how the model is built. Its code is run: use maps you trust.

    Raises BadInputError for a file, a map or a model that cannot be used, or that do not belong together.
    """
    subject = _opened(Path(path), _map(spec))
    check_subject(subject)
    return subject


def _opened(file: Path, spec: Map) -> MappedSubject:
    content = read_content(file)
    inner, build = built(spec, content, file)
    return MappedSubject(inner, spec, name=file.name, path=file, content=content, build=build)


def _map(spec: Map | Mapping[str, Any] | str | Path) -> Map:
    if isinstance(spec, Map):
        return spec
    return Map.of(spec) if isinstance(spec, Mapping) else read_map(spec)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | str | bool) else str(value)
