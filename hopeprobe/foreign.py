"""Files of other people's packages that an adapter of ours reads: what to install where it is not there.

Loaders are found by entry points, so nobody has to be listed here. But an adapter that no extra can bring, as its
package and hopeprobe ask for different versions of a third, is one that people cannot guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_NESTED_LEARNING = {"model", "optimizer", "step", "config"}


def is_nested_learning(content: object) -> bool:
    """Whether a checkpoint file's content is as the package nested-learning saves it.

    Other people's trainers have the same four fields; every model of this package has a `titan_level`.
    """
    if not isinstance(content, Mapping) or not content.keys() >= _NESTED_LEARNING:
        return False
    config = content["config"]
    model = config.get("model") if isinstance(config, Mapping) else None
    return isinstance(model, Mapping) and "titan_level" in model


def content_of(path: Path) -> object:
    """What a torch file of plain tensors and data holds; None where it is damaged, holds code, or is no such file."""
    from hopeprobe.errors import BadInputError
    from hopeprobe.torch_files import read_torch

    try:
        return read_torch(path, mapped=True)
    except BadInputError:
        return None


def what_reads(path: Path) -> str:
    """A sentence on what the file is and what to install to read it; empty where we know no adapter for it."""
    if not is_nested_learning(content_of(path)):
        return ""
    return (
        "it is a checkpoint of the package nested-learning, which the adapter hopeprobe-nested-learning reads, in "
        "hopeprobe's folder examples/peers. `make peers` in hopeprobe's folder makes an environment with all three: "
        "run .venv-peers/bin/hopeprobe. Or, where hopeprobe and nested-learning 0.2.0 are installed together: "
        "pip install --no-deps examples/peers"
    )
