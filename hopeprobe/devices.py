"""Where a model computes: the CPU, or a CUDA device (ROCm's are called that too) where there is one.

`auto` takes a device only of this kind: what others lack (float64 on Apple's) would end a run in its middle. A
`torch.device` is taken as it is, for those who know theirs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hopeprobe.errors import BadInputError

if TYPE_CHECKING:
    import torch


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N. Raises BadInputError for one that is not there."""
    import torch

    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if _cuda_devices() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise BadInputError(f"the device is {name!r}, must be auto, cpu, cuda or cuda:N")
    count = _cuda_devices()
    if not count:
        built = "finds none" if torch.version.cuda or torch.version.hip else "is built without CUDA"
        raise BadInputError(
            f"there is no {name} here: this torch ({torch.__version__}) {built}. Take --device cpu, or auto"
        )
    index = int(match[1]) if match[1] else torch.cuda.current_device()
    if index >= count:
        raise BadInputError(f"there is no {name} here: the last of {count} is cuda:{count - 1}")
    return torch.device("cuda", index)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def default_precision(device: torch.device) -> str:
    """What a model is trained in unless asked otherwise: bf16 where a device multiplies that fast, else float32."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "float32"


def device_name(device: torch.device) -> str:
    """What to call a device in a record: its model where torch knows it, else its kind."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
