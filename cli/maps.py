"""`--map`: checkpoints of any model, opened through a map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hopeprobe.subject import Subject


def opened(checkpoints: Sequence[Path], named: str | None) -> list[Path | Subject]:
    """Checkpoints as they were given, or where a map is named, opened through it on the CPU."""
    if named is None:
        return list(checkpoints)
    from hopeprobe.subject import load

    return [load(checkpoint, map=named) for checkpoint in checkpoints]
