"""Hook points: where a model lets its tensors be read and edited, and how a person asks for it.

- `points`: `HookPoint`, the place itself, and `HookSpec`, what it declares
- `registry`: `HookRegistry`, which a model fills, and tables of it
- `resolve`: from a name, a glob, a sequence or a predicate to the points meant
- `cache`: `ActivationCache`, one run's tensors joined over ticks and writes
- `hooked`: `Hooked`, the mixin with `hooks`, `run_with_hooks`, `run_with_cache`
- `finite`: `watching_finite`, which names the first value that is not finite
- `modules`: `PointModules`, points as torch modules, for nnsight and others

The words and signatures are TransformerLens's.
"""

from hopeprobe.hooks.cache import ActivationCache
from hopeprobe.hooks.finite import Origin, Origins, place_of, watching_finite
from hopeprobe.hooks.hooked import HookContext, Hooked, HookNeverFiredError
from hopeprobe.hooks.modules import PointModules
from hopeprobe.hooks.points import HookFn, HookHandle, HookPoint, HookSpec, inner_backward
from hopeprobe.hooks.registry import HookRegistry, HookRow, describe, markdown_table
from hopeprobe.hooks.resolve import Selector, resolve

__all__ = [
    "ActivationCache",
    "HookContext",
    "HookFn",
    "HookHandle",
    "HookNeverFiredError",
    "HookPoint",
    "HookRegistry",
    "HookRow",
    "HookSpec",
    "Hooked",
    "Origin",
    "Origins",
    "PointModules",
    "Selector",
    "describe",
    "inner_backward",
    "markdown_table",
    "place_of",
    "resolve",
    "watching_finite",
]
