"""The products of a work, alone: what it would take if all else were free, in the shapes that it has them in.

Operations over the matrix rate are a floor that thin products do not reach: those of a tick of eight tokens read each
weight for sixteen operations. So a work is watched once, and its products are made again, one behind the other, at the
same places of as many buffers as it used: what they read from memory is what they read in the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
PRODUCTS = (
    _ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.addmm_, _ATEN.baddbmm_, _ATEN.mv, _ATEN.addmv,
    _ATEN.addmv_, _ATEN.dot,
)  # fmt: skip


class _Watching(TorchDispatchMode):
    """Keeps the products that are made and where; of a backward on the CPU too, which is in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, tuple(map(self._place, args)), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _place(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        at = arg.untyped_storage().data_ptr()
        self.sizes[at] = max(self.sizes.get(at, 0), arg.untyped_storage().nbytes() // arg.element_size())
        return at, arg.dtype, tuple(arg.shape), arg.stride(), arg.storage_offset()


def products_of(work: Callable[[], object]) -> Callable[[], object]:
    """Run a work, and make a work of nothing but its products (no `out=`), of one number format."""
    with _Watching() as seen:
        work()
    dtypes = {arg[1] for _, args, _ in seen.calls for arg in args if isinstance(arg, tuple)}
    if len(dtypes) != 1:
        raise ValueError(f"products of one number format are made again, not of {sorted(map(str, dtypes))}")
    (dtype,) = dtypes
    # Written to, as memory that was only asked for is no memory yet.
    buffers = {at: torch.randn(size, dtype=dtype).mul_(1e-3) for at, size in seen.sizes.items()}

    def there(arg: Any) -> Any:
        if not isinstance(arg, tuple):
            return arg
        at, _, shape, stride, offset = arg
        return buffers[at].as_strided(shape, stride, offset)

    calls = [(func, tuple(map(there, args)), kwargs) for func, args, kwargs in seen.calls]

    @torch.no_grad()
    def again() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return again
