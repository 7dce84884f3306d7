"""What the hooks of every mechanism of a block have in common, and the mechanisms that are never written.

A block of the package is made of parts: what mixes positions (`selfmod`, or attention), a Titans memory behind it in
some, and what follows (`cms`, or an MLP). Each part knows its own hook points, how to tell the package which of its
writes are let through, and where its fast weights lie. `parts_of` names them by the kind of block.

The package's attention, in `hope_attention`, `hope_hybrid`, `transformer` and `type: titan`:

    y = LayerNorm(x + W_o softmax(q k^T) v)        causal, post-norm

It has no positions: but for `local_conv_window`, a token sees what came before it as a set. It sees its own call
alone, as in training, unless `train.online_carry_attention_cache` keeps keys and values, without a gradient, from
one call of a window to the next. It is never written, and neither is the `transformer`'s y + MLP(LayerNorm(y)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookPoint, HookRegistry, HookSpec

if TYPE_CHECKING:
    from nested_learning.fast_state import BlockFastState, ModelAttentionCache, ModelFastState

OF_TOKENS, OF_GATE, OF_WEIGHTS = ("batch", "pos", "d_model"), ("batch", "pos"), ("batch", "out", "in")


@dataclass
class Row:
    """The state of one row: fast weights of its own, keys and values where attention carries them, tokens read."""

    fast: ModelFastState
    attention: ModelAttentionCache | None = None
    tokens: int = 0


class Recorder:
    """Gathers what the package's modules compute while a tick is read, and nothing while it is written.

    Its hooks are methods, so that a copy of the model has copies that gather for it.
    """

    def __init__(self) -> None:
        self._found: dict[str, Tensor] | None = None

    @contextmanager
    def reading(self) -> Iterator[dict[str, Tensor]]:
        """While it lasts, tensors (1, n, d) by hook point come in."""
        self._found = found = {}
        try:
            yield found
        finally:
            self._found = None

    def takes(self, module: nn.Module, name: str) -> None:
        """Record what the module is given."""
        module.register_forward_pre_hook(partial(self._taken, name))

    def gives(self, module: nn.Module, name: str) -> None:
        """Record what the module returns."""
        module.register_forward_hook(partial(self._given, name))

    def _taken(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._found is not None:
            self._found[name] = args[0]

    def _given(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        if self._found is not None:
            self._found[name] = out[0] if isinstance(out, tuple) else out  # beside it: attention's cache


class Opening(NamedTuple):
    """What a write gate lets through for one row of one call, after the hooks."""

    open: bool
    every: bool = False  # a hook opened it for every token, whatever the package would leave out itself


CLOSED = Opening(False)


class Part:
    """One mechanism of one block: its hook points, its write gates, its fast weights. This one is never written.

    Attributes:
        name: as in hook points, `blocks.{layer}.{name}`.
        block: the package's.
        gates: hook points of its write gates.
        gated: whether the surprise gate holds its writes back.
        fast: for every hook point of fast weights, the meta weights.
    """

    name = ""
    gated = True

    def __init__(self, layer: int, block: nn.Module) -> None:
        self.block = block
        self.prefix = f"blocks.{layer}.{self.name}"
        self.gates: list[str] = []
        self.fast: dict[str, nn.Parameter] = {}

    def add_points(self, registry: HookRegistry, recorder: Recorder, rule: str) -> None:
        """Register hook points; rule: what the surprise gate asks."""

    def periods(self, tick: int, whole: bool) -> Mapping[str, int]:
        """Tokens until a read can see the next write; whole: a tick is a window."""
        return {}

    def decays(self) -> Mapping[str, Literal["init", "zero"]]:
        """What fast weights decay towards."""
        return {}

    def gate(self, call: Tensor, active: Tensor) -> Tensor:
        """The write gate (B, n) before hooks, of the call's and of the tokens that the package takes by itself."""
        return call

    def allow(self, openings: Mapping[str, Opening]) -> set[str]:
        """Set the block up for the write of one row; the names of what it may write, as the package has them."""
        return set()

    def release(self) -> None:
        """Leave the block as the package made it."""

    def holds(self, point: str) -> Callable[[BlockFastState], Tensor]:
        """Where to find the fast weights of a hook point."""
        raise KeyError(point)

    def due(self, read: int, tick: int, whole: bool) -> list[str]:
        """Hook points whose period ends with `read` tokens: shown there whatever was written, and nowhere else.

        So what is shown of a row does not hang on the rows beside it.
        """
        periods = self.periods(tick, whole)
        return [
            point for point in self.fast if read % periods[point.split(".", 2)[2].rpartition(".")[0]] == 0
        ]

    def _add_gate(self, registry: HookRegistry, prefix: str, rule: str) -> None:
        name = f"{prefix}.hook_write_gate"
        registry.add(name, HookSpec(OF_GATE, "tick", True, rule))
        self.gates.append(name)

    def _add_fast(self, registry: HookRegistry, name: str, meta: nn.Parameter, equation: str) -> None:
        registry.add(name, HookSpec(OF_WEIGHTS, "write", False, equation))
        self.fast[name] = meta


def parts_of(layer: int, block: nn.Module) -> list[Part]:
    """The parts of a block that can be written, by what it is made of."""
    from nested_learning_cms import CMSPart
    from nested_learning_selfmod import SelfModPart
    from nested_learning_titan import TitanPart

    kinds = {"selfmod": SelfModPart, "titan_memory": TitanPart, "cms": CMSPart}
    return [kind(layer, block) for module, kind in kinds.items() if hasattr(block, module)]


def after_mixing(block: nn.Module) -> nn.Module | None:
    """The module that takes what the mixing of positions gave: the first CMS level, or the MLP; None without."""
    if hasattr(block, "cms"):
        return next(iter(block.cms.blocks.values()), None)
    return getattr(block, "mlp", None)


def add_stream(registry: HookRegistry, recorder: Recorder, layer: int, block: nn.Module) -> None:
    """Points of what enters and leaves a block, and of what lies between its two halves."""
    prefix = f"blocks.{layer}.hook_resid"
    registry.add(f"{prefix}_pre", HookSpec(OF_TOKENS, "tick", False, "x: what enters the block"))
    recorder.takes(block, f"{prefix}_pre")
    if hasattr(block, "cms") or hasattr(block, "mlp"):
        mid = "y = M_memory(q)" if hasattr(block, "selfmod") else "y = LayerNorm(x + attention(x))"
        mid += " + M(y)" if hasattr(block, "titan_memory") else ""
        registry.add(f"{prefix}_mid", HookSpec(OF_TOKENS, "tick", False, mid))
        record_mixed(recorder, block, f"{prefix}_mid")
        post = "cms(resid_mid)" if hasattr(block, "cms") else "resid_mid + mlp(LayerNorm(resid_mid))"
    else:
        post = "LayerNorm(y + M(y)), y = LayerNorm(x + attention(x))"
    registry.add(f"{prefix}_post", HookSpec(OF_TOKENS, "tick", False, post))
    recorder.gives(block, f"{prefix}_post")


def record_mixed(recorder: Recorder, block: nn.Module, name: str) -> None:
    """Record what lies between a block's two halves; without a second half that is what the block gives."""
    second = after_mixing(block)
    if second is None:
        recorder.gives(block, name)
    else:
        recorder.takes(second, name)


def openings(
    point: HookPoint, before: Tensor, after: Tensor, inside: Tensor, passes: Sequence[bool]
) -> list[Opening]:
    """What a gate (B, n) lets through, row by row: what the package would where no hook edited it.

    An edit closes a row's call, opens it for every token, or leaves it as it was; raises BadInputError for any other,
    as that is all that the package can do. inside: 1 where a row has a token. passes: the package's own choice.
    """
    found = []
    for gate, was, here, own in zip(after, before, inside.bool(), passes, strict=True):
        gate, was = gate[here], was[here]
        if not len(gate):
            found.append(CLOSED)
        elif after is before:
            found.append(Opening(own))
        elif bool((gate == 0).all()):
            found.append(CLOSED)
        elif bool((gate == 1).all()):
            found.append(Opening(True, every=True))
        elif bool((gate == was).all()):
            found.append(Opening(True))
        else:
            raise BadInputError(
                f"{point.name}: the package writes a whole call or nothing, so a row's gate is 0 or 1 for all its "
                "tokens, or what it was"
            )
    return found
