"""What a model computes, as far as its files and settings tell: the part of its identity that a map does not hold.

Nulls are kept under it, so that it must change with anything that changes what the model does but its weights: the
code of its modules and of what that code imports from beside it, what it was built by, and the plain attributes of its
modules.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(model: nn.Module, build: Callable[..., Any] | None) -> str | None:
    """SHA-256 (hex) over the files of the code; None where some of it is in no file, as what was typed in a session."""
    owners = [type(module) for module in model.modules()]
    pending: dict[str, ModuleType | None] = {}
    for owner in [*owners, *([build] if build is not None else [])]:
        name = getattr(owner, "__module__", None)
        if name is None or _root(name) == "torch":
            continue
        pending[name] = sys.modules.get(name)
    files: dict[str, str] = {}
    while pending:
        name, module = pending.popitem()
        content = None if module is None else _content(module)
        if content is None:
            return None
        files[name] = hashlib.sha256(content).hexdigest()
        for other in _imported(module):  # type: ignore[arg-type]
            if other.__name__ not in files:
                pending[other.__name__] = other
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def settings_of(model: nn.Module) -> str:
    """SHA-256 (hex) over the modules' names, classes and plain attributes: sizes, periods, rates, switches."""
    total = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {k: v for k, v in sorted(vars(module).items()) if k != "training" and _is_plain(v)}
        total.update(repr((name, type(module).__qualname__, plain, module.extra_repr())).encode())
    return total.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, _PLAIN)


def _content(module: ModuleType) -> bytes | None:
    try:
        return Path(inspect.getfile(module)).read_bytes()
    except (OSError, TypeError):
        return None


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """Modules that a module's names come from, of its own package or out of its own folder."""
    folder = Path(inspect.getfile(module)).parent
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        other = sys.modules.get(name) if isinstance(name, str) else None
        file = getattr(other, "__file__", None)
        if other is None or file is None:
            continue
        packaged = "site-packages" in folder.parts
        beside = not packaged and folder in Path(file).parents and "site-packages" not in Path(file).parts
        if _root(other.__name__) == _root(module.__name__) or beside:
            yield other


def _root(name: str) -> str:
    return name.partition(".")[0]
