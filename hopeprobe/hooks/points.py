"""Hook points: named places in a forward pass where a function may look at a tensor or replace it.

A model owns its points and calls each where the tensor exists, `x = hp(x) if hp.active else x` (or
`x = hp(x)`); an idle point costs one attribute lookup. A point is a plain object, not a module: it has no
parameters, no place in a state dict, and its hooks are neither pickled nor copied with the model.

Under `torch.compile` an idle point leaves nothing in the graph but a guard on `active`. A hook added later
fails that guard, the function is compiled again with a graph break at the point, and the hook runs as
ordinary Python between two graphs. With `fullgraph=True` the break is refused and torch raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from hopeprobe.errors import BadInputError, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Cadence = Literal["tick", "write"]
Direction = Literal["fwd", "bwd"]
# fn(tensor, hook): None observes, a tensor of the same shape, dtype and device replaces
HookFn = Callable[[Tensor, "HookPoint"], Tensor | None]


@dataclass(frozen=True)
class HookSpec:
    """What a point declares about its tensor; `hopeprobe hooks` and the documentation are printed from it.

    `dims` names the dimensions in order, for instance `("batch", "pos", "d_model")`; every firing is checked
    against their number. `cadence` is `"tick"` for a point that fires once per tick of the forward pass and
    `"write"` for one that fires at the end of every write period of its memory, also where all gates were closed
    and nothing was written: what fires must not hang on the windows beside. At a point that is not `editable`
    hooks may only observe. `equation` is one line, for instance `"k = l2norm(M_k(u))"`. Raises `ValueError` when
    a field is none of that.
    """

    dims: tuple[str, ...]
    cadence: Cadence
    editable: bool
    equation: str

    def __post_init__(self) -> None:
        if self.cadence not in ("tick", "write"):
            raise ValueError(f"cadence is 'tick' or 'write', not {self.cadence!r}")
        dims: object = self.dims  # ("batch") is a string, whatever the annotation says
        if not isinstance(dims, tuple) or len(set(dims)) != len(dims):
            raise ValueError(f"dims is a tuple of distinct names, not {dims!r}")
        if not self.equation or "\n" in self.equation:
            raise ValueError(f"equation is one line of text, not {self.equation!r}")


class InstalledHook:
    """One function at one point, with the counts that tell whether, and if not why, it never fired."""

    __slots__ = ("attached", "direction", "fired", "fn", "point", "reached", "removed")

    def __init__(self, point: HookPoint, fn: HookFn, direction: Direction) -> None:
        if not callable(fn):
            raise TypeError(f"hook point {point.name!r}: a hook is a function fn(tensor, hook), not {fn!r}")
        if direction not in ("fwd", "bwd"):
            raise BadInputError(f"hook point {point.name!r}: dir is 'fwd' or 'bwd', not {direction!r}")
        self.point = point
        self.fn = fn
        self.direction: Direction = direction
        self.reached = 0  # the forward pass came by
        self.attached = 0  # bwd: to a tensor that requires grad
        self.fired = 0  # fn was called
        self.removed = False

    def install(self) -> None:
        """Start firing, after the hooks already there."""
        self.point._install(self)

    def remove(self) -> None:
        """Stop firing, also in the backward of a forward pass already made; a second call does nothing."""
        self.removed = True
        self.point._uninstall(self)


class HookHandle:
    """What `add_hook` returns: takes its hooks off again, and counts how often each fired."""

    __slots__ = ("_hooks",)

    def __init__(self, hooks: Sequence[InstalledHook]) -> None:
        self._hooks = tuple(hooks)

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()

    @property
    def fired(self) -> dict[str, int]:
        """How many calls these hooks have had so far, by the name of the point."""
        counts = dict.fromkeys((hook.point.name for hook in self._hooks), 0)
        for hook in self._hooks:
            counts[hook.point.name] += hook.fired
        return counts


class HookPoint:
    """A named place in the forward pass; call it with the tensor and go on with what it returns.

    `active` is true while at least one hook is there, `awaited` while somebody may add one before the run is over, for
    models that keep nothing of what is not looked at. Forward hooks run in the order they were added.
    Backward hooks receive the gradient with respect to what the point returned, along all paths after the
    point and none around it.

    Raises, at the moment of firing: `MeasurementError` when the tensor does not have the declared dimensions;
    `BadInputError` when a hook replaces at a point that is not editable, or with another shape, dtype or
    device, or edits the tensor in place, which other points may share; `TypeError` when a hook returns
    something that is not a tensor.

    >>> point = HookPoint("hook_x", HookSpec(("pos",), "tick", True, "x"))
    >>> handle = point.add_hook(lambda tensor, hook: tensor * 2)
    >>> point(torch.ones(2))
    tensor([2., 2.])
    >>> handle.remove()
    >>> point.active, point(torch.ones(2))
    (False, tensor([1., 1.]))
    """

    __slots__ = ("_bwd", "_fwd", "active", "awaited", "name", "spec")

    def __init__(self, name: str, spec: HookSpec) -> None:
        self.name = name
        self.spec = spec
        self.active = False
        self.awaited = False
        # Tuples, replaced as a whole: a hook that adds or removes hooks leaves the firing under way alone.
        self._fwd: tuple[InstalledHook, ...] = ()
        self._bwd: tuple[InstalledHook, ...] = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Give the tensor, any shape, to the hooks; the tensor to go on with comes back."""
        if not self.active:
            return tensor
        return self._fire(tensor)

    def add_hook(self, fn: HookFn, dir: Direction = "fwd") -> HookHandle:  # noqa: A002 - TransformerLens's word
        """Add one hook after those already here; it stays until its handle is removed."""
        hook = InstalledHook(self, fn, dir)
        hook.install()
        return HookHandle([hook])

    def remove_hooks(self) -> None:
        """Remove every hook of this point."""
        for hook in (*self._fwd, *self._bwd):
            hook.remove()

    def __reduce__(self) -> tuple[type[HookPoint], tuple[str, HookSpec]]:
        # Hooks are closures over somebody's session: a pickle or a copy of the model starts without them.
        return HookPoint, (self.name, self.spec)

    def __repr__(self) -> str:
        return (
            f"HookPoint({self.name!r}, [{' '.join(self.spec.dims)}], hooks={len(self._fwd) + len(self._bwd)})"
        )

    def _install(self, hook: InstalledHook) -> None:
        if hook.direction == "fwd":
            self._fwd = (*self._fwd, hook)
        else:
            self._bwd = (*self._bwd, hook)
        self.active = True

    def _uninstall(self, hook: InstalledHook) -> None:
        self._fwd = tuple(h for h in self._fwd if h is not hook)
        self._bwd = tuple(h for h in self._bwd if h is not hook)
        self.active = bool(self._fwd or self._bwd)

    def _fire(self, tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _fire_between_graphs(self, tensor)
        return self._run_hooks(tensor)

    def _run_hooks(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"hook point {self.name!r} was called with {type(tensor).__name__}, not a tensor")
        if tensor.ndim != len(self.spec.dims):
            raise MeasurementError(
                f"hook point {self.name!r} declares [{' '.join(self.spec.dims)}] but fired with shape "
                f"{tuple(tensor.shape)}; the model and its hook registry disagree"
            )
        for hook in self._fwd:
            hook.reached += 1
            hook.fired += 1
            before = None if tensor.is_inference() else tensor._version
            returned = hook.fn(tensor, self)
            if before is not None and tensor._version != before:
                raise BadInputError(
                    f"hook point {self.name!r}: the hook changed its tensor in place, and other parts of the model "
                    "share it; return a new tensor instead, for instance an edited tensor.clone()"
                )
            tensor = self._outcome(returned, tensor)
        if self._bwd:
            tensor = self._attach_backward(tensor)
        return tensor

    def _attach_backward(self, tensor: Tensor) -> Tensor:
        hooks = self._bwd
        for hook in hooks:
            hook.reached += 1
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        # A tensor hook sees every use of the tensor, also those around the point (a residual branch); a view
        # of it has only the uses after the point.
        tensor = tensor.view_as(tensor)

        def on_grad(grad: Tensor) -> Tensor | None:
            if _inner_passes:
                return None
            incoming = grad
            for hook in hooks:
                if not hook.removed:
                    hook.fired += 1
                    grad = self._outcome(hook.fn(grad, self), grad)
            return None if grad is incoming else grad

        tensor.register_hook(on_grad)  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.attached += 1
        return tensor

    def _outcome(self, returned: object, tensor: Tensor) -> Tensor:
        if returned is None:
            return tensor
        if not isinstance(returned, Tensor):
            raise TypeError(
                f"hook point {self.name!r}: a hook returns None or a tensor, not {type(returned).__name__}"
            )
        if not self.spec.editable:
            raise BadInputError(
                f"hook point {self.name!r} cannot be edited: its hooks may only observe, and return None"
            )
        got = (tuple(returned.shape), returned.dtype, returned.device)
        want = (tuple(tensor.shape), tensor.dtype, tensor.device)
        if got != want:
            raise BadInputError(
                f"hook point {self.name!r}: a replacement has the shape, dtype and device of the tensor, "
                f"{_show(want)}, not {_show(got)}"
            )
        return returned


def _show(layout: tuple[object, ...]) -> str:
    return ", ".join(str(part) for part in layout)


# torch.compiler.disable does the same, but imports the compiler (two seconds) along with this module.
@_disable_dynamo
def _fire_between_graphs(point: HookPoint, tensor: Tensor) -> Tensor:
    return point._run_hooks(tensor)


# One list for the process, not one per thread: on a GPU, backward hooks run in a thread of autograd's own.
_inner_passes: list[None] = []


@contextmanager
def inner_backward() -> Iterator[None]:
    """Keep backward hooks silent while a model takes gradients of its own during the forward pass.

    A CMS write differentiates an inner loss through the tensors of the outer pass; without this, a backward
    hook would take that gradient for the outer loss's.
    """
    _inner_passes.append(None)
    try:
        yield
    finally:
        _inner_passes.pop()
