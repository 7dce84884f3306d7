"""From a checkpoint file to a module, as a map's `[model]` says.

Nothing in these files is executed (`torch_files.py`), nor in safetensors files. What is executed is what
the map names as `build`: a map is code. Its module is imported, from the environment or from the working folder, and
called if it is a class of torch modules or a function that is annotated to give one, and nothing else is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.safetensors_files import is_safetensors, read_safetensors
from hopeprobe.torch_files import read_torch

from .spec import Map

_SHOWN = 3


def read_content(path: Path) -> Mapping[str, Any]:
    """What a file holds. Raises BadInputError for none, a damaged one, and one that would run code to be read."""
    if not path.is_file():
        raise BadInputError(
            f"{path} is a folder, not a checkpoint" if path.is_dir() else f"{path} does not exist"
        )
    content = read_safetensors(path)[0] if is_safetensors(path) else read_torch(path)
    if not isinstance(content, Mapping):
        raise BadInputError(f"{path} holds a {type(content).__name__}, not named weights")
    return content


@dataclass(frozen=True)
class Build:
    """What makes a model: `make(**arguments)`; told: what messages call it.

    known: whether that is all there is to say of it, as of what a map names; not of a callable that somebody gave.
    """

    make: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    told: str = "build"
    known: bool = False

    def __call__(self) -> nn.Module:
        """A model with fresh weights. Raises BadInputError for what the callable raises, or gives in place of one."""
        try:
            made = self.make(**self.arguments)
        except Exception as error:
            raise BadInputError(
                f"{self.told}({', '.join(self.arguments)}) raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, nn.Module):
            raise BadInputError(f"{self.told} gave a {type(made).__name__}, not a torch module")
        return made


def built(spec: Map, content: Mapping[str, Any], path: Path) -> tuple[nn.Module, Build]:
    """The model with the file's weights, and what makes one with fresh weights."""
    model, told = spec.model, f"{spec.told}, [model]"
    if "build" not in model:
        raise BadInputError(f"{told}: build is missing: 'package.module:callable' that gives the model")
    make = _imported(model["build"], told)
    arguments = model.get("arguments", {})
    if isinstance(arguments, str):
        where, arguments = arguments, looked_up(content, arguments, f"{path}, as {told} wants its arguments")
        if not isinstance(arguments, Mapping) or not all(isinstance(k, str) for k in arguments):
            raise BadInputError(f"{path}: {where!r} is a {type(arguments).__name__}, not keyword arguments")
    build = Build(make, arguments, f"{told}: {model['build']}", known=True)
    with torch.random.fork_rng(devices=[]):
        inner = build()
    _load(inner, spec, content, path)
    return inner, build


def looked_up(content: Mapping[str, Any], key: str, where: str) -> Any:
    """What lies at a key; dots descend. Raises BadInputError with what there is instead."""
    there: Any = content
    for i, part in enumerate(key.split(".")):
        if not isinstance(there, Mapping) or part not in there:
            known = list(there) if isinstance(there, Mapping) else []
            shown = near_names(part, map(str, known)) or f"; there are {', '.join(map(str, known[:8]))}"
            raise BadInputError(
                f"{where}: there is no {'.'.join(key.split('.')[: i + 1])!r}{shown if known else ''}"
            )
        there = there[part]
    return there


def stated(content: Mapping[str, Any], said: str | int | None, told: str, what: str) -> int | None:
    """A number that the map gives or a key holds; None where neither says it."""
    if not isinstance(said, str):
        return said
    if not content:
        return None
    found = looked_up(content, said, f"the file, as {told}, [model], wants its {what}")
    found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise BadInputError(f"{told}, [model]: {said!r} of the file is {found!r}, not a number of {what}")
    return found


def _imported(name: str, told: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` would: one's own model lies where one works
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise BadInputError(
            f"{told}: build is {name!r}, and {error}; it is looked for in {here}, and among what is installed"
        ) from error
    except (AttributeError, ValueError) as error:
        raise BadInputError(f"{told}: build is {name!r}, not 'package.module:callable': {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise BadInputError(f"{told}: {name!r} cannot be called")
    if not _says_module(found):
        raise BadInputError(
            f"{told}: build is {name!r}, which does not say that it gives a torch module, and is not called: name a "
            "class of torch modules, or a function of yours annotated `-> nn.Module`"
        )
    return found  # type: ignore[no-any-return]


def _says_module(found: Any) -> bool:
    """Whether it is made to build models: a map of a stranger's would call anything, with arguments that it chooses."""
    if not isinstance(found, type):
        try:
            found = get_type_hints(found).get("return")
        except (TypeError, NameError, AttributeError):  # it has no annotations, or none that can be read
            return False
    return isinstance(found, type) and issubclass(found, nn.Module)


def _load(inner: nn.Module, spec: Map, content: Mapping[str, Any], path: Path) -> None:
    """Put all of the file's weights in, and only if they are all there is."""
    key, prefix = spec.model.get("weights"), spec.model.get("strip", "")
    weights = looked_up(content, key, str(path)) if key else content
    if not isinstance(weights, Mapping):
        raise BadInputError(f"{path}: {key!r} is a {type(weights).__name__}, not named weights")
    other = [str(name) for name, tensor in weights.items() if not isinstance(tensor, Tensor)]
    if other:
        raise BadInputError(
            f"{path}: among its weights {', '.join(other[:_SHOWN])} are no tensors; say the weights' key, as `weights` "
            f"of {spec.told}, [model]"
        )
    named = {str(name).removeprefix(prefix): tensor for name, tensor in weights.items()}
    expected = inner.state_dict()
    wrong = sorted(named.keys() ^ expected.keys())
    wrong = wrong or [name for name, tensor in named.items() if tensor.shape != expected[name].shape]
    if wrong:
        shown = ", ".join(wrong[:_SHOWN]) + (
            f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        )
        raise BadInputError(f"{path}: its weights are not those of {spec.model['build']}: {shown}")
    inner.load_state_dict(named)
