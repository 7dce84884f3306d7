"""A map: a TOML file that says which modules of a model are which hook points, and how its file becomes a model.

    [model]                              # a module in memory needs of it `context` and `tokenizer` alone
    build = "my_package.models:build"    # package.module:callable, a class of modules, or a function `-> nn.Module`
    arguments = { dim = 64 }             # its keyword arguments, or the key of the file that holds them: "config"
    weights = "model"                    # key of the weights in the file (dots descend); none: the file is the weights
    strip = "_orig_mod."                 # prefix of their names
    steps = "step"                       # key of the optimiser steps, or a number
    seed = "config.seed"                 # likewise, of the seed of the initial weights
    initial = "step-000000.pt"           # file with the run's initial weights, beside the checkpoint
    checkpoints = "step-*.pt"            # files of the run
    tokenizer = "gpt2"
    vocab_size = 50257                   # none: as many as there are logits
    context = 256                        # tokens of a window
    tokens = "input_ids"                 # keyword of the tokens; none: the first argument
    logits = "output.logits"             # where they are in what the model gives; none: "output"
    grad = true                          # the forward pass needs gradients of its own
    writes = false                       # nothing in it writes while it reads: without [memory], nothing else says so

    [points]                             # hook point = module, or module and where in its call the tensor is
    "blocks.{layer}.hook_resid_post" = "layers.{layer}"
    "blocks.{layer}.cms.fast.hook_delta" = { module = "layers.{layer}.fast", value = "output - input.0" }

    [memory.titans]                      # fast weights: the part of their points' names between layer and hook
    period = 16                          # tokens between two writes
    decay = "zero"                       # what they decay towards, "init" or "zero"; none: they do not
    place = "blocks.{layer}.titans"      # what their points' names begin with; this is the default
    [memory.titans.freeze]               # points, and what they must be for nothing to be written, not even decay
    "blocks.{layer}.titans.hook_step" = -inf
    [memory.titans.fast]                 # hook_fast_NAME; meta: the parameter that it starts from
    w1 = { module = "layers.{layer}.memory", value = "output.1.weights.w1", meta = "layers.{layer}.memory.w1" }

    [groups]                             # what weights belong to, and the modules that hold them; the rest is "other"
    "blocks.{layer}.titans" = "layers.{layer}.memory"
    embed = ["token_embedding", "positions"]

A map is code: what it names as `build` is imported and run. Take one from a stranger as you would take a script.

`{layer}` is a number in a module's name. Points are further told `dims` (default "batch pos d_model"; "batch out in" of
fast weights, with "write" among them where one call gives all writes, and "head" where heads lie in the batch),
`editable` (default true), `equation`, `method` (default "forward"); fast weights also `initial = true` where the first
write that is given is the state before any. Values are explained in `values.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hopeprobe.errors import BadInputError, near_names

from .values import Value, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAYER = "{layer}"
MAP_GROUP = "hopeprobe.maps"
_MODEL = {
    "build": str, "arguments": (dict, str), "weights": str, "strip": str, "steps": (str, int), "seed": (str, int),
    "initial": str, "checkpoints": str, "tokenizer": str, "vocab_size": int, "context": int, "tokens": str,
    "logits": str, "grad": bool, "writes": bool,
}  # fmt: skip
_KINDS = {str: "text", int: "a whole number", dict: "a table", bool: "true or false"}
_POINT = {"module": str, "value": str, "dims": str, "editable": bool, "equation": str, "method": str}
_FAST = {
    "module": str,
    "value": str,
    "dims": str,
    "equation": str,
    "method": str,
    "meta": str,
    "initial": bool,
}
_MEMORY = {"period": int, "decay": str, "freeze": dict, "fast": dict, "place": str}


@dataclass(frozen=True)
class PointSpec:
    """One line of `[points]`, or of a memory's `fast`: names may hold `{layer}`."""

    name: str
    module: str
    value: Value
    dims: tuple[str, ...]
    editable: bool
    equation: str
    method: str = "forward"
    meta: str = ""  # of fast weights
    initial: bool = False


@dataclass(frozen=True)
class MemorySpec:
    """One `[memory.NAME]`."""

    name: str
    period: int
    decay: str
    freeze: Mapping[str, float]
    fast: tuple[PointSpec, ...]


@dataclass(frozen=True)
class Map:
    """What a map says; see the top of this file."""

    told: str  # what messages call it
    model: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[PointSpec, ...] = ()
    memories: tuple[MemorySpec, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any], told: str = "the map") -> Map:
        """From a document's plain data. Raises BadInputError, naming the place, for what is not as it must be."""
        _check(document, {"model": dict, "points": dict, "memory": dict, "groups": dict}, told)
        model = dict(document.get("model", {}))
        _check(model, _MODEL, f"{told}, [model]")
        for name in ("vocab_size", "context"):
            if model.get(name, 1) < 1:
                raise BadInputError(f"{told}, [model]: {name} is {model[name]}, not a number of tokens")
        where = f"{told}, [points]"
        points = tuple(_point(name, line, where) for name, line in document.get("points", {}).items())
        memories = tuple(_memory(name, part, told) for name, part in document.get("memory", {}).items())
        _check_names(told, points, memories)
        if memories and not model.get("writes", True):
            raise BadInputError(f"{told}, [model]: writes is false, and there is [memory.{memories[0].name}]")
        groups = {name: _holders(name, given, told) for name, given in document.get("groups", {}).items()}
        return cls(told, model, points, memories, groups, dict(document))


def read_map(path: str | Path) -> Map:
    """Read a map: a file, or one registered by that name under the entry-point group `hopeprobe.maps`.

    Raises BadInputError, naming file and place, for one that cannot be used.
    """
    file = Path(path)
    if not file.suffix and not file.exists():
        registered = {entry.name: entry for entry in entry_points(group=MAP_GROUP)}
        if str(path) not in registered:
            near = near_names(str(path), registered) or f"; registered are {', '.join(sorted(registered))}"
            raise BadInputError(f"no map is called {str(path)!r}, and there is no such file{near}")
        file = Path(registered[str(path)].load())
    try:
        document = tomllib.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadInputError(
            f"cannot read the map {file}: {error.strerror or type(error).__name__}"
        ) from error
    except (ValueError, RecursionError) as error:  # of which what is not TOML, or no text, is one
        raise BadInputError(f"the map {file} is not TOML: {error}") from error
    if not document:
        raise BadInputError(f"the map {file} is empty: it needs [model] and [points]")
    return Map.of(document, str(file))


def _check(part: Any, fields: Mapping[str, Any], where: str) -> None:
    """Raise BadInputError unless `part` is a table of these fields, each of its kind."""
    if not isinstance(part, Mapping):
        raise BadInputError(f"{where}: {part!r} is not a table")
    for name, value in part.items():
        if name not in fields:
            known = near_names(name, fields) or f"; there are {', '.join(fields)}"
            raise BadInputError(f"{where}: {name!r} is not known{known}")
        kinds = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            raise BadInputError(f"{where}: {name} is {value!r}, not {wanted}")


def _point(name: str, line: Any, where: str) -> PointSpec:
    where = f"{where}, {name}"
    part: dict[str, Any] = {"module": line} if isinstance(line, str) else line
    _check(part, _POINT, where)
    if "module" not in part:
        raise BadInputError(f"{where}: it names no module")
    value = _value(part.get("value", "output"), where)
    editable: bool = part.get("editable", value.replaceable)
    if editable and not value.replaceable:
        raise BadInputError(
            f"{where}: {value} cannot be edited, only what goes into or comes out of a module"
        )
    dims = tuple(part.get("dims", "batch pos d_model").split())
    if dims[:1] != ("batch",) or "write" in dims:
        raise BadInputError(f"{where}: dims begin with 'batch' and have no 'write', not {' '.join(dims)!r}")
    equation = part.get("equation", f"{value} of {part['module']}")
    return PointSpec(name, part["module"], value, dims, editable, equation, part.get("method", "forward"))


def _memory(name: str, part: Any, told: str) -> MemorySpec:
    where = f"{told}, [memory.{name}]"
    _check(part, _MEMORY, where)
    period, decay = part.get("period", 0), part.get("decay", "")
    if period < 1:
        raise BadInputError(f"{where}: period, the tokens between two writes, is missing or under 1")
    if decay not in ("", "init", "zero"):
        raise BadInputError(f"{where}: decay is {decay!r}, not 'init' or 'zero'")
    freeze = dict(part.get("freeze", {}))
    for point, number in freeze.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadInputError(f"{where}, freeze: {point} is {number!r}, not a number")
    if not part.get("fast"):
        raise BadInputError(
            f"{where}: it shows no fast weights, and without them nothing tells whether it writes"
        )
    place = part.get("place", f"blocks.{LAYER}.{name}")
    fast = tuple(_fast(place, weight, line, f"{where}, fast") for weight, line in part["fast"].items())
    return MemorySpec(name, period, decay, {k: float(v) for k, v in freeze.items()}, fast)


def _fast(place: str, weight: str, line: Any, where: str) -> PointSpec:
    where = f"{where}, {weight}"
    _check(line, _FAST, where)
    missing = [name for name in ("module", "value", "meta") if name not in line]
    if missing:
        raise BadInputError(f"{where}: it does not say its {' and '.join(missing)}")
    dims = tuple(line.get("dims", "batch out in").split())
    if dims[:1] != ("batch",) or "pos" in dims:
        raise BadInputError(f"{where}: dims begin with 'batch' and have no 'pos', not {' '.join(dims)!r}")
    if "head" in dims and dims[1] != "head":
        raise BadInputError(f"{where}: 'head' comes right after 'batch', as heads lie in the batch")
    initial = line.get("initial", False)
    if initial and "write" not in dims:
        raise BadInputError(
            f"{where}: 'initial' is for what one call gives of all writes, with 'write' in dims"
        )
    equation = line.get("equation", f"{line['value']} of {line['module']}")
    value = _value(line["value"], where)
    name = f"{place}.hook_fast_{weight}"
    return PointSpec(
        name,
        line["module"],
        value,
        dims,
        False,
        equation,
        line.get("method", "forward"),
        line["meta"],
        initial,
    )


def _value(text: str, where: str) -> Value:
    try:
        return parse(text)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error


def _holders(name: str, given: Any, told: str) -> tuple[str, ...]:
    holders = [given] if isinstance(given, str) else given
    if not isinstance(holders, list) or not holders or not all(isinstance(one, str) for one in holders):
        raise BadInputError(f"{told}, [groups]: {name} is {given!r}, not names of modules")
    if any((LAYER in one) != (LAYER in name) for one in holders):
        raise BadInputError(
            f"{told}, [groups], {name}: {LAYER} must stand in its name and its modules', or in neither"
        )
    return tuple(holders)


def matching(pattern: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """The layer ("" where the pattern has none) and the name, of each name that a pattern with `{layer}` means."""
    first, *rest = (re.escape(part) for part in pattern.split(LAYER))
    expression = re.compile(first + "".join((r"\1" if i else r"(\d+)") + part for i, part in enumerate(rest)))
    found = [(expression.fullmatch(name), name) for name in names]
    return [(match[1] if rest else "", name) for match, name in found if match]


def near_patterns(pattern: str, names: Iterable[str]) -> str:
    """`near_names`, with `{layer}` for the first number in each name."""
    known = list(names)
    layered = [re.sub(r"(?<=\.)\d+(?=\.|$)", LAYER, name, count=1) for name in known]
    return near_names(pattern, dict.fromkeys([*layered, *known]))


def _check_names(told: str, points: tuple[PointSpec, ...], memories: tuple[MemorySpec, ...]) -> None:
    names = [p.name for p in points]
    for memory in memories:
        names += [p.name for p in memory.fast]
        for point in memory.freeze:
            known = {p.name: p for p in points}
            if point not in known:
                near = near_names(point, known) or "; write it under [points] too"
                raise BadInputError(f"{told}, [memory.{memory.name}.freeze]: {point!r} is no point{near}")
            if not known[point].editable:
                raise BadInputError(f"{told}, [memory.{memory.name}.freeze]: {point!r} cannot be edited")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInputError(f"{told}: {twice[0]} is said twice")
