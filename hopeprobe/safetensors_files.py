"""Weights as safetensors: the format to exchange them in, as nothing in it can be executed.

The format has no checksum, and its metadata are text that anybody can edit; files that are written here carry a digest
of both, and a file that does is refused where it no longer holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hopeprobe.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = "hopeprobe_sha256"
_LENGTH = 8  # bytes that say how long the header is


def as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file with these weights and metadata, and the digest of both."""
    from safetensors.torch import save

    return save(dict(tensors), metadata={**metadata, DIGEST: _digest(tensors, metadata)})


def is_safetensors(path: Path) -> bool:
    """Whether a file is called one, or begins like one. Raises BadInputError for one that cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH + 1)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    if path.suffix == ".safetensors":
        return True
    return start[_LENGTH:] == b"{" and int.from_bytes(start[:_LENGTH], "little") <= size - _LENGTH


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a file. Raises BadInputError for a damaged one, and where its digest does not hold."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadInputError(f"{path} is damaged: it is no whole file of safetensors ({first})") from None
    if DIGEST in metadata and metadata[DIGEST] != _digest(tensors, metadata):
        raise BadInputError(
            f"{path} is damaged: its weights or metadata are not those that its digest was made of; export it again"
        )
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 (hex) over metadata, and names, types, shapes and bytes of weights, each in the order of its names."""
    import torch

    told = {name: text for name, text in metadata.items() if name != DIGEST}
    total = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
