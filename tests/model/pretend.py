"""A device that is not there: its tensors say `pretend:0` and hold a CPU's, which every operation is done with.

So values are real, and can be compared with those of a CPU; an operation that mixes devices raises, as on a real one;
and every time that the host would wait for a value is counted. It stands in for an accelerator in all that is not
speed: kernels of its own it has none.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

#: How often the host waited, by why.
LOOKS = Counter()

# What gives a tensor of a size that only its values tell, or a plain value.
_TELLING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip


class PretendTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"PretendTensor({self.held})"

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        made = PretendTensor(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _done(operation, *args, **(kwargs or {}))


def _held(x):
    return x.held if isinstance(x, PretendTensor) else x


def _made(x):
    return x if isinstance(x, PretendTensor) else PretendTensor(x)


def _tensors(arguments):
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _done(operation, *args, **kwargs):
    if operation is aten.is_pinned.default:
        return False
    given = list(_tensors([*args, *kwargs.values()]))
    copies = operation in (aten.copy_.default, aten._copy_from.default)
    foreign = [x for x in given if not isinstance(x, PretendTensor) and x.ndim]
    if foreign and not copies:
        raise RuntimeError(
            f"{operation} mixes devices: {[tuple(x.shape) for x in foreign]} lie on the CPU, others on {DEVICE}"
        )
    asked = kwargs.get("device")
    leaves = asked is not None and torch.device(asked).type == "cpu"
    if leaves or (copies and not isinstance(args[0], PretendTensor)):
        LOOKS["to the host"] += 1
    elif operation in _TELLING:
        LOOKS[str(operation)] += 1
    elif operation is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
        LOOKS["an index of what is true"] += 1
    if asked is not None:
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    out = operation(
        *(tree_map_only(PretendTensor, _held, x) if isinstance(x, list | tuple) else _held(x) for x in args),
        **{key: _held(x) for key, x in kwargs.items()},
    )
    if operation._schema.is_mutable:
        changed = [
            x
            for schema, x in zip(operation._schema.arguments, args, strict=False)
            if schema.is_write and isinstance(x, torch.Tensor)
        ] + [x for x in (kwargs.get("out"),) if x is not None]
        for x in changed:
            if _held(x) is out:
                return x
        if out is None:
            return None
    if leaves:
        return out
    return tree_map_only(torch.Tensor, _made, out)


class _Backend:
    @staticmethod
    def is_initialized():
        return True

    is_available = is_initialized

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def device_count():
        return 1


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
_FACTORIES = torch.library.Library("_", "IMPL")
_FACTORIES.fallback(_done, "PrivateUse1")
DEVICE = torch.device("pretend", 0)


@contextmanager
def looks():
    """Yields what is counted inside."""
    LOOKS.clear()
    yield LOOKS


def here(x):
    """The CPU's tensor behind one of the device, without a look."""
    return _held(x.detach())
