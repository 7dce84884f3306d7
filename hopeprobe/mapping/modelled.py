"""A module with the hook points that a map gives it; the module itself stays as it is.

While windows run, the methods in which active points lie are wrapped, and only those: points then fire where the
tensors exist, and an edit replaces what goes in or comes out. Idle points cost nothing. `hook_surprise` fires after the
module, in slices of a tick, each followed by the fast weights as they stand after its last token, so that positions can
be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError
from hopeprobe.hooks import Hooked, HookPoint, HookRegistry, HookSpec
from hopeprobe.subject import WindowLosses

from .spec import LAYER, Map, PointSpec, matching, near_patterns
from .values import Call, parse

CLOCK = "hook_surprise"
ENDED = "the end of a window"
"""The state after windows, from which nothing goes on: not None, which would be a fresh one."""


@dataclass(frozen=True)
class Placed:
    """A point in one module: what the map says of it, with the layer filled in."""

    spec: PointSpec
    point: HookPoint
    module: nn.Module
    period: int = 0  # of fast weights


class MappedModel(Hooked, nn.Module):
    """Scores windows with somebody's module, hook points firing.

    Attributes:
        inner: the module; it runs in evaluation mode, and keeps its own.
        tick: tokens between two looks at fast weights: the greatest common divisor of all periods, or the context.
        placed: points by name, without `hook_surprise`.
        metas: for each point of fast weights the name of the parameter they start from.

    """

    def __init__(self, inner: nn.Module, spec: Map, context: int) -> None:
        """Find the map's modules. Raises BadInputError for one that is not there."""
        super().__init__()
        self.inner = inner
        self.spec = spec
        self.tick = gcd(*(memory.period for memory in spec.memories)) or context
        self._logits = parse(spec.model.get("logits", "output"))
        self._modules_by_name = dict(inner.named_modules())
        registry = HookRegistry()
        what = HookSpec(("batch", "pos"), "tick", False, "cross-entropy of the next token, nats")
        self._clock = registry.add(CLOCK, what)
        self.placed: dict[str, Placed] = {}
        self.metas: dict[str, str] = {}
        for one in spec.points:
            if one.name == CLOCK:
                raise BadInputError(f"{spec.told}, [points]: {CLOCK} is there already, from the logits")
            self._place(one, registry, 0)
        for memory in spec.memories:
            for one in memory.fast:
                self._place(one, registry, memory.period)
        self._register_hooks(registry)
        self._given: dict[str, list[Tensor]] | None = None  # writes of the windows that run

    def _place(self, spec: PointSpec, registry: HookRegistry, period: int) -> None:
        for layer, name in self._matching(spec):
            module = self._modules_by_name[name]
            if not callable(getattr(module, spec.method, None)):
                raise BadInputError(
                    f"{self.spec.told}, {spec.name}: {name} is a {type(module).__name__}, without {spec.method!r}"
                )
            filled = spec.name.replace(LAYER, layer)
            dims = tuple(d for d in spec.dims if d != "write")
            cadence = "write" if period else "tick"
            point = registry.add(filled, HookSpec(dims, cadence, spec.editable, spec.equation))  # type: ignore[arg-type]
            self.placed[filled] = Placed(spec, point, module, period)
            if period:
                self.metas[filled] = spec.meta.replace(LAYER, layer)

    def _matching(self, spec: PointSpec) -> list[tuple[str, str]]:
        """The layer and the name of each module that the map means."""
        if (LAYER in spec.module) != (LAYER in spec.name):
            raise BadInputError(
                f"{self.spec.told}, {spec.name}: {LAYER} must stand in the point's name and its module's, or in neither"
            )
        found = matching(spec.module, self._modules_by_name)
        if not found:
            near = near_patterns(spec.module, self._modules_by_name)
            raise BadInputError(
                f"{self.spec.told}, {spec.name}: the model has no module {spec.module!r}{near}"
            )
        return found

    # -- running ------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> WindowLosses:
        """Score windows (B, T + 1): losses (B, T), 0 where not scored, with a gradient where torch keeps one.

        Raises BadInputError for tokens or logits of another shape, MeasurementError for writes of another number and
        for whatever the model raises.
        """
        batch, n = tokens.shape[0], tokens.shape[1] - 1
        if n < 1:
            raise BadInputError("a window needs at least two tokens: the last is only a target")
        self._given = {}
        try:
            logits = self.read(tokens[:, :-1])
            writes = {name: self._writes(name, parts, batch, n) for name, parts in self._given.items()}
        finally:
            self._given = None
        flat = logits.flatten(0, 1)
        flat = flat.float() if flat.dtype.itemsize < 4 else flat
        losses = F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none").view(batch, n)
        lengths = torch.full((batch,), n) if lengths is None else lengths
        scored = torch.arange(n, device=losses.device) < lengths[:, None].to(losses.device)
        losses = torch.where(scored, losses, 0.0)
        self._tell(losses, writes)
        return WindowLosses(losses, scored, ENDED)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the module, points of its modules firing."""
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.inner))
            for (module, method), placed in self._active().items():
                stack.enter_context(self._watched(module, method, placed))
            keyword = self.spec.model.get("tokens")
            try:
                output = self.inner(**{keyword: tokens}) if keyword else self.inner(tokens)
            except HopeprobeError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                raise MeasurementError(
                    f"{self.spec.told}: the model raised, of tokens {list(tokens.shape)}, {why}"
                ) from error
        found = self._logits.get(Call(self.inner, (tokens,), {}, output))
        if found.ndim != 3 or found.shape[:2] != tokens.shape:
            raise BadInputError(
                f"{self.spec.told}: {self._logits} of the model is {list(found.shape)} for tokens "
                f"{list(tokens.shape)}, and logits are [batch, pos, vocabulary]"
            )
        return found

    def _active(self) -> dict[tuple[nn.Module, str], list[Placed]]:
        """What to watch. Hooks at fast weights may go on while windows are told, after the module ran."""
        found: dict[tuple[nn.Module, str], list[Placed]] = {}
        for one in self.placed.values():
            if one.point.active or one.point.awaited:
                found.setdefault((one.module, one.spec.method), []).append(one)
        return found

    @contextmanager
    def _watched(self, module: nn.Module, method: str, placed: Sequence[Placed]) -> Iterator[None]:
        """Wrap one method of one module, so that calls past `__call__` are seen too."""
        whole = getattr(module, method)
        own = method in vars(module)

        @wraps(whole)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = Call(module, args, kwargs)
            for one in placed:
                if one.spec.value.before:
                    self._fire(one, call)
            call.output = whole(*call.args, **call.kwargs)
            for one in placed:
                if not one.spec.value.before:
                    self._fire(one, call)
            return call.output

        setattr(module, method, watched)
        try:
            yield
        finally:
            if own:
                setattr(module, method, whole)
            else:
                delattr(module, method)

    def _fire(self, placed: Placed, call: Call) -> None:
        """Show a tensor to its point, and put back what that returns; fast weights wait for their position."""
        name = placed.point.name
        try:
            tensor = placed.spec.value.get(call)
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                raise BadInputError("it is inside torch.func (vmap or grad), where no tensor can be shown")
            if placed.period:
                if self._given is not None:
                    # A copy, as what comes next may be written in place.
                    self._given.setdefault(name, []).append(tensor.detach().clone())
                return
            shown = placed.point(tensor)
            if shown is not tensor:
                placed.spec.value.set(call, shown)
        except HopeprobeError as error:
            kind = BadInputError if isinstance(error, BadInputError) else MeasurementError
            raise kind(f"{self.spec.told}, {name}: {error}") from error

    def _writes(self, name: str, parts: Sequence[Tensor], batch: int, n: int) -> list[Tensor]:
        """Fast weights after each write, [B, ...]. Raises MeasurementError where their number is not the period's."""
        placed = self.placed[name]
        dims = placed.spec.dims
        if "head" in dims and parts[0].ndim == len(dims) - 1 and parts[0].shape[0] % batch == 0:
            parts = [part.reshape(batch, -1, *part.shape[1:]) for part in parts]
        if "write" in dims:
            at = dims.index("write")
            parts = [one for part in parts if part.ndim == len(dims) for one in part.unbind(at)]
            parts = parts[int(placed.spec.initial) :]
        if len(parts) != n // placed.period:
            raise MeasurementError(
                f"{self.spec.told}, {name}: {len(parts)} writes of {n} tokens, and a period of {placed.period} makes "
                f"{n // placed.period}"
            )
        if any(len(part) != batch for part in parts):
            raise MeasurementError(f"{self.spec.told}, {name}: {list(parts[0].shape)} of {batch} rows")
        return list(parts)

    def _tell(self, losses: Tensor, writes: Mapping[str, Sequence[Tensor]]) -> None:
        """Fire the surprise of each tick, and after it the fast weights written at its end."""
        if not self._clock.active and not writes:
            return
        for start in range(0, losses.shape[1], self.tick):
            self._clock(losses[:, start : start + self.tick])
            end = start + self.tick
            for name, parts in writes.items():
                period = self.placed[name].period
                if end % period == 0 and end // period <= len(parts):
                    self.placed[name].point(parts[end // period - 1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own: somebody may be training it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
