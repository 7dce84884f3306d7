"""hopeprobe: mechanistic analysis of self-modifying memories, with a null beside every number.

`hopeprobe.load(path)` opens a checkpoint as a `Subject`; `hopeprobe.analyze(subject, probes=[...])` measures
it and gives `Results`: `.table`, `.nulls`, `.verdicts`, `.plot()`. `hopeprobe.make_baseline` keeps a checkpoint's
numbers, and `hopeprobe.check` sets others against them. `Probe`, `Accumulator`, `Quantity` and `Place` are what a probe
of your own is written with. Names load when first used: `import hopeprobe` alone imports neither torch
nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopeprobe.analysis import analyze
    from hopeprobe.monitor import Monitor
    from hopeprobe.probes import PROBES
    from hopeprobe.probes.base import Accumulator, Place, Probe, Quantity
    from hopeprobe.regression import Baseline, check, make_baseline
    from hopeprobe.results import Results
    from hopeprobe.subject import Subject, load

    __version__: str

_WHERE = {
    "PROBES": "hopeprobe.probes",
    "Accumulator": "hopeprobe.probes.base",
    "Baseline": "hopeprobe.regression",
    "Monitor": "hopeprobe.monitor",
    "Place": "hopeprobe.probes.base",
    "Probe": "hopeprobe.probes.base",
    "Quantity": "hopeprobe.probes.base",
    "Results": "hopeprobe.results",
    "Subject": "hopeprobe.subject",
    "analyze": "hopeprobe.analysis",
    "check": "hopeprobe.regression",
    "load": "hopeprobe.subject",
    "make_baseline": "hopeprobe.regression",
}

__all__ = [
    "PROBES",
    "Accumulator",
    "Baseline",
    "Monitor",
    "Place",
    "Probe",
    "Quantity",
    "Results",
    "Subject",
    "__version__",
    "analyze",
    "check",
    "load",
    "make_baseline",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hopeprobe' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import (
        PackageNotFoundError,
        version,
    )  # as long to import as the command line takes to start

    try:
        return version("hopeprobe")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def __dir__() -> list[str]:
    return __all__
