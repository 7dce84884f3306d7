"""The memories whose fast weights `meta_fast.py` measures, where along the context, and what it sees of them.

At each position a reducer turns the fast weights of one matrix into ‖θ_fast‖², ⟨θ_fast, θ_meta⟩ and ‖θ_fast − θ_meta‖²
for each window, in float64. The third would follow from the first two, but would have lost the digits of small drift.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hopeprobe.errors import MeasurementError
from hopeprobe.subject import MissingCapability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from hopeprobe.subject import Subject

MOST_POSITIONS = 8
GATE = "hook_write_gate"

_FAST = re.compile(r"((?:blocks\.(\d+)\.)?(.+))\.hook_fast_\w+")


@dataclass(frozen=True)
class Memory:
    """One memory, or one CMS level, of one layer.

    Attributes:
        layer, component: where, the component by the names of `Subject.write_periods`: "selfmod.k", "cms.fast".
        metas: meta weights by the hook point of their fast weights.
        target: what it decays towards, "init" for the meta weights or "zero"; "" for one that does not decay, None
            where the model does not say.
        mechanism: what shows its retention and its gate ("blocks.0.selfmod"), "" for nothing.
        gate: the hook point of its write gate, "" where the model shows none.

    """

    layer: int | None
    component: str
    metas: Mapping[str, Tensor]
    target: str | None
    mechanism: str
    gate: str

    @property
    def key(self) -> str:
        """What messages call it."""
        return self.component if self.layer is None else f"{self.component} of layer {self.layer}"

    def squared(self) -> float:
        """‖θ_meta‖² of all its matrices."""
        return sum(float(products(meta, meta[None])[0, 0]) for meta in self.metas.values())


def positions_of(subject: Subject) -> list[int]:
    """Up to `MOST_POSITIONS` equally spaced multiples of the common write period, within the context; maybe none."""
    period = math.lcm(*subject.write_periods().values())
    multiples = subject.context // period
    step = period * -(-multiples // MOST_POSITIONS)
    return list(range(step, subject.context + 1, step)) if multiples else []


def memories_of(subject: Subject) -> list[Memory]:
    """All memories and levels, in the model's order.

    Raises MissingCapability without fast weights, MeasurementError for names and decay that are not as the contract
    has them.
    """
    points = subject.module.hook_dict
    try:
        targets: Mapping[str, str] | None = subject.decay_target()
    except MissingCapability:
        targets = None
    found: dict[str, tuple[int | None, str, dict[str, Tensor]]] = {}
    for name, meta in subject.meta_weights().items():
        match = _FAST.fullmatch(name)
        if not match:
            raise MeasurementError(f"{name} is not the name of a hook point of fast weights")
        layer = None if match[2] is None else int(match[2])
        found.setdefault(match[1], (layer, match[3], {}))[2][name] = meta
    memories = []
    for prefix, (layer, component, metas) in found.items():
        # Retention is shown by the memory itself, or for all memories of its layer by what they are part of.
        above = (prefix, prefix.rpartition(".")[0])
        mechanism = next((one for one in above if f"{one}.hook_alpha" in points), "")
        target = (None if mechanism else "") if targets is None else targets.get(component, "")
        if target not in ("init", "zero", "", None):
            raise MeasurementError(f"{component} is said to decay towards {target!r}, not 'init' or 'zero'")
        shown = mechanism if f"{mechanism}.{GATE}" in points else ""
        gate = next((f"{one}.{GATE}" for one in above if f"{one}.{GATE}" in points), "")
        memories.append(Memory(layer, component, metas, target, shown, gate))
    return memories


def products(meta: Tensor, fast: Tensor) -> Tensor:
    """‖θ_fast‖², ⟨θ_fast, θ_meta⟩, ‖θ_fast − θ_meta‖² of one matrix: fast [R, ...], meta [...] to float64 [R, 3].

    Raises MeasurementError when the shapes differ.
    """
    import torch

    if fast.shape[1:] != meta.shape:
        raise MeasurementError(
            f"fast weights {list(fast.shape[1:])} of meta weights {list(meta.shape)}: not the same matrix"
        )
    whole, base = fast.flatten(1).double(), meta.flatten().double()
    inner, size = whole @ base, torch.linalg.vector_norm(whole, dim=1)
    if whole.data_ptr() == fast.data_ptr():
        whole = whole.clone()  # of a float64 model: those are its weights
    moved = torch.linalg.vector_norm(whole.sub_(base), dim=1)
    return torch.stack([size.square(), inner, moved.square()], dim=1)


def reducers_of(memories: Sequence[Memory]) -> dict[str, Callable[[Tensor], Tensor]]:
    """`products` for every hook point of fast weights."""
    return {name: partial(products, meta) for memory in memories for name, meta in memory.metas.items()}
