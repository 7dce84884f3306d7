"""What probes share and their docstrings name by its file, `sample.py` for instance: told where one probe is told."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hopeprobe.probes.base import Probe


def shared_definitions(probe: Probe) -> dict[str, str]:
    """Docstrings of this package's files that a probe's own docstring names, in that order, by file."""
    here = Path(__file__).parent
    named = dict.fromkeys(re.findall(r"`(\w+\.py)`", probe.describe()))
    found = {}
    for file in named:
        if (here / file).exists():
            module = importlib.import_module(f"{__package__}.{file.removesuffix('.py')}")
            found[file] = inspect.cleandoc(module.__doc__ or "")
    return found
