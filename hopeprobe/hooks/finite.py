"""Where values stop being finite: of each row of a batch the hook point that showed it first, and the first token.

Rows never act on each other, so that each has an origin of its own. What fires first is what was computed first: later
points, and attention, spread it over tokens. Writes come after the tick that they are of: what only they show is said
of the tick's last token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hopeprobe.hooks.hooked import Hooked
    from hopeprobe.hooks.points import HookPoint

#: Points of a self-modifying layer that belong to one of its memories.
_OF_MEMORY = {f"hook_{name}": name for name in ("q", "k", "v", "eta", "alpha")} | {"hook_out": "memory"}


class Origin(NamedTuple):
    """Where a row's first value that is not finite is."""

    token: int  # counted from the first token read, 0 that one
    point: str  # of the hook; empty where none showed it

    def __str__(self) -> str:
        where = f"{place_of(self.point)} ({self.point})" if self.point else "in no hook point"
        return f"token {self.token}, {where}"


def place_of(point: str) -> str:
    """A hook point's place in the words of a model: `layer 0, memory k`, `layer 1, cms level fast`.

    >>> place_of("blocks.0.selfmod.k.hook_fast_w1"), place_of("hook_embed")
    ('layer 0, memory k', 'outside the layers')
    """
    parts = point.split(".")
    if parts[0] != "blocks" or len(parts) < 3:
        return "outside the layers"
    layer, last = f"layer {parts[1]}", parts[-1]
    if len(parts) == 5:
        return f"{layer}, {'cms level' if parts[2] == 'cms' else 'memory'} {parts[3]}"
    if len(parts) == 4:
        memory = _OF_MEMORY.get(last) if parts[2] == "selfmod" else None
        return f"{layer}, memory {memory}" if memory else f"{layer}, {parts[2]}"
    return layer


class Origins(Mapping[int, Origin]):
    """Origins by row, filled while a model runs; a row that is finite throughout has none.

    lengths: tokens that count in each row, None for all: what follows is padding.
    """

    def __init__(self, lengths: Sequence[int] | None = None) -> None:
        self._lengths = lengths
        self._read: Counter[str] = Counter()  # tokens that each point has shown
        self._found: dict[int, Origin] = {}

    def __getitem__(self, row: int) -> Origin:
        return self._found[row]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._found))

    def __len__(self) -> int:
        return len(self._found)

    def look(self, tensor: Tensor, hook: HookPoint) -> None:
        """Look at what a point shows; a forward hook."""
        dims, start = hook.spec.dims, self._read[hook.name]
        has_pos = "pos" in dims
        if has_pos:
            self._read[hook.name] = start + tensor.shape[dims.index("pos")]
        if "batch" not in dims or bool(tensor.isfinite().all()):
            return
        bad = ~tensor.detach().isfinite().movedim(dims.index("batch"), 0)
        if has_pos:
            at = dims.index("pos") + (dims.index("pos") < dims.index("batch"))
            bad = bad.movedim(at, 1).flatten(2).any(2) if bad.ndim > 2 else bad
        else:
            bad, start = bad.flatten(1).any(1, keepdim=True), max(self._read.values(), default=1) - 1
        here: dict[int, Origin] = {}
        for row, offset in np.argwhere(bad.cpu().numpy()).tolist():
            token = start + offset
            end = None if self._lengths is None else int(self._lengths[row])
            if end is not None and token >= end:
                if has_pos:
                    continue
                token = end - 1
            here.setdefault(row, Origin(token, hook.name))  # the first: they come in order
        self._found = here | self._found


@contextmanager
def watching_finite(model: Hooked, lengths: Sequence[int] | None = None) -> Iterator[Origins]:
    """Watch every hook point of what runs inside, and fill the origins.

    `with watching_finite(model) as origins: model(tokens)`; then origins[row] is there for each row that is not finite.
    It costs a look at every tensor, the fast weights after each write among them.
    """
    origins = Origins(lengths)
    with torch.no_grad(), model.hooks(fwd_hooks=[(lambda _: True, origins.look)], allow_unfired=True):
        yield origins
