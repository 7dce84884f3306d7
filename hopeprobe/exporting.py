"""Weights and activations for other tools: safetensors, NumPy's `.npz`, tables of pandas.

A `.npz` has an array a hook point, under its name, and `dims`, a JSON text with the names of each array's dimensions;
NumPy has no bfloat16, which is written as float32, exactly. All files are written whole or not at all.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hopeprobe.errors import BadInputError
from hopeprobe.files import write_atomically

if TYPE_CHECKING:
    import os

    import pandas as pd
    from torch import Tensor

    from hopeprobe.hooks import ActivationCache
    from hopeprobe.subject import Subject

_MOST_ROWS = 20_000_000


def export_weights(subject: Subject, path: str | os.PathLike[str]) -> Path:
    """Write all weights as safetensors, bit for bit; its metadata tell step, seed, tokenizer and configuration.

    Of a model of ours they tell all that a checkpoint does but what training goes on from: `hopeprobe.load` reads it.
    Raises BadInputError for a name that is another format's and where the file cannot be written, MissingCapability
    for a model that names no weights.
    """
    if Path(path).suffix not in ("", ".safetensors"):
        raise BadInputError(
            f"{path} is named as {Path(path).suffix} and weights are written as safetensors: name it "
            f"{Path(path).with_suffix('.safetensors')}"
        )
    import torch

    from hopeprobe.safetensors_files import as_bytes
    from hopeprobe.subject import MissingCapability

    module: Any = subject.module
    if isinstance(module, torch.nn.Module):
        named = dict(module.state_dict())
    else:
        named = {n: t for group in subject.parameter_groups().values() for n, t in group.items()}
    try:
        identity = json.dumps(subject.identity(), sort_keys=True, default=str)
    except MissingCapability:
        identity = ""
    try:
        checkpoint = json.dumps(subject.portable(), sort_keys=True)
    except MissingCapability:
        checkpoint = ""
    told = {
        "format": "pt",
        "name": subject.name,
        "tokenizer": subject.tokenizer,
        "step": "" if subject.trained_steps is None else str(subject.trained_steps),
        "seed": "" if subject.seed is None else str(subject.seed),
        "identity": identity,
        "checkpoint": checkpoint,
    }
    # Each its own copy: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    return write_atomically(path, as_bytes(tensors, told))


def export_activations(cache: ActivationCache, path: str | os.PathLike[str]) -> Path:
    """Write a cache as compressed `.npz`. Raises BadInputError for an empty one, and where it cannot be written."""
    if not len(cache):
        raise BadInputError(f"there are no activations to write to {path}: the cache is empty")
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: _array(cache[name]) for name in cache}
    arrays["dims"] = np.array(json.dumps({name: list(cache.dims(name)) for name in cache}))
    np.savez_compressed(file, **arrays)
    return write_atomically(path, file.getvalue())


def as_frame(cache: ActivationCache, name: str) -> pd.DataFrame:
    """One hook point as a table, a line a number: a column a dimension, and `value`.

    Raises KeyError for a point that is not in the cache, BadInputError for more than 20 million numbers.
    """
    import pandas as pd

    array, dims = _array(cache[name]), cache.dims(name)
    if array.size > _MOST_ROWS:
        raise BadInputError(
            f"{name} has {array.size:,} numbers, more than a table should have lines: take a part of the tensor, or "
            "export_activations"
        )
    columns = {dim: index.ravel() for dim, index in zip(dims, np.indices(array.shape), strict=True)}
    frame: pd.DataFrame = pd.DataFrame({**columns, "value": array.ravel()})
    return frame


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    import torch

    here = tensor.detach().cpu()
    return np.asarray((here.float() if here.dtype == torch.bfloat16 else here).numpy())
