"""The activations of one run, joined over its ticks and writes.

A point fires once per tick, or once per write, so a run gives several tensors per point; none is lost:

- a tick point with a `pos` dimension is joined along it, [batch, pos, ...] as if the run had been one tick;
- any other point is stacked along a new dimension after the batch, [batch, tick, ...] or [batch, write, ...].

Every firing is cloned, at either cadence: models overwrite fast weights in place, and a later hook may edit
what this one saw. The cost is memory for all that was asked for, and for a moment twice that of the point
being read, so name the points you need; probes stream through accumulators instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hopeprobe.errors import MeasurementError, near_names

if TYPE_CHECKING:
    from hopeprobe.hooks.points import HookPoint


class ActivationCache(Mapping[str, Tensor]):
    """A mapping from names of hook points to their tensors; it holds only points that fired.

    `requested` are the names that will be recorded, `detach=False` keeps the autograd graph. A wrong key
    raises a `KeyError` that offers the nearest names, or says that the point was asked for and never fired.
    """

    def __init__(self, requested: Iterable[str], *, detach: bool = True) -> None:
        self._requested = tuple(requested)
        self._detach = detach
        self._parts: dict[str, list[Tensor]] = {}
        self._layout: dict[
            str, tuple[tuple[str, ...], int]
        ] = {}  # joined dimension names, and the joined one

    def record(self, tensor: Tensor, hook: HookPoint) -> None:
        """Take one firing in; this is the hook function that fills the cache.

        Raises `MeasurementError` when a firing cannot be joined to the earlier ones: another dtype or device,
        or another size in a dimension that is not joined.
        """
        part = (tensor.detach() if self._detach else tensor).clone()
        dims, joined = self._layout.setdefault(hook.name, _layout(hook))
        if part.ndim < len(dims):
            part = part.unsqueeze(joined)
        parts = self._parts.setdefault(hook.name, [])
        if parts and _rest(part, joined) != _rest(parts[0], joined):
            raise MeasurementError(
                f"hook point {hook.name!r} fired with {_show(part)}, which cannot be joined along "
                f"{dims[joined]!r} to the earlier {_show(parts[0])}; cache the two runs apart"
            )
        parts.append(part)

    def dims(self, name: str) -> tuple[str, ...]:
        """Name the dimensions of `cache[name]`, the one added by stacking included."""
        self[name]
        return self._layout[name][0]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            if name in self._requested:
                raise KeyError(f"the hook point {name!r} was asked for, but never fired in this run")
            raise KeyError(f"{name!r} is not in this cache{near_names(str(name), self._requested)}")
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts, dim=self._layout[name][1])]
        return parts[0]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._requested if name in self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name} {list(self[name].shape)}" for name in self)
        return f"ActivationCache({listed})"


def _layout(hook: HookPoint) -> tuple[tuple[str, ...], int]:
    dims, cadence = hook.spec.dims, hook.spec.cadence
    if cadence == "tick" and "pos" in dims:
        return dims, dims.index("pos")
    at = 1 if dims[:1] == ("batch",) else 0
    return (*dims[:at], cadence, *dims[at:]), at


def _rest(part: Tensor, joined: int) -> tuple[object, ...]:
    return (*part.shape[:joined], *part.shape[joined + 1 :], part.ndim, part.dtype, part.device)


def _show(part: Tensor) -> str:
    return f"shape {tuple(part.shape)} ({part.dtype}, {part.device})"
