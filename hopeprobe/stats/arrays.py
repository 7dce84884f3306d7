"""Inputs as NumPy arrays: a torch tensor is known by what it can do, so that torch need not be imported."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]


def as_float64(values: Any) -> FloatArray:
    """Return a torch tensor (any device, bfloat16 included) or anything `np.asarray` takes as float64.

    Raises TypeError for complex numbers, strings and objects: only bool, int and float are upcast.
    """
    if hasattr(values, "detach"):
        # To the CPU first: some devices have no float64. NumPy has no bfloat16, so torch does the upcast.
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"expected real numbers, got an array of {array.dtype}")
    return array.astype(np.float64, copy=False)


def as_bool(values: Any) -> BoolArray:
    """Return a mask as a NumPy array; TypeError unless it is bool: 0/1 integers are often an index."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.dtype != np.bool_:
        raise TypeError(f"expected a bool mask, got {array.dtype}")
    return array


def as_int64(values: Any) -> IntArray:
    """Integers as int64. Raises TypeError for anything else, floats that happen to be whole included."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"expected integers, got {array.dtype}")
    return array.astype(np.int64)
