"""Regression checks: numbers of a checkpoint kept in a file, and later ones set against them.

`make_baseline` measures one checkpoint, or one of each of several seeds, and `check` measures others on the same tokens
with the same probes. With one checkpoint the question is whether these very weights and this code still give these
numbers; with several seeds, whether another training run differs from them by more than they do from each other.
"""

from .baseline import Baseline, Settings, Tracked
from .comparing import Check, Compared, check
from .measuring import DEFAULT_PROBES, changed, make_baseline, renewed

__all__ = [
    "DEFAULT_PROBES",
    "Baseline",
    "Check",
    "Compared",
    "Settings",
    "Tracked",
    "changed",
    "check",
    "make_baseline",
    "renewed",
]
