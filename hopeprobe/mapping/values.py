"""Where in a call of a module a tensor is: `output`, `output.1.updates.w1`, `input.0`, `output - input.0`.

A value begins with `output` (what the module gave), `input` (its positional arguments by number, its keywords by
name) or `module` (its attributes afterwards). Steps go into tuples and lists by number, into mappings by key (one with
dots in it too), into anything else by attribute. Two values may be added or subtracted; an edit of the sum then edits
the first.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hopeprobe.errors import BadInputError

ROOTS = ("output", "input", "module")
_STEP = r"[A-Za-z0-9_]+"
_TERM = re.compile(rf"({'|'.join(ROOTS)})((?:\.{_STEP})*)")


@dataclass
class Call:
    """One call of a module: what went in, and what came out once it has."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass(frozen=True)
class Term:
    """A place: its root and the steps from there."""

    root: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((self.root, *self.steps))

    def get(self, call: Call) -> Any:
        """What is there. Raises BadInputError where nothing is."""
        if self.root == "input":
            return self._of_input(call)
        return _walk(call.output if self.root == "output" else call.module, self.steps, str(self))

    def set(self, call: Call, value: Tensor) -> None:
        """Put another tensor there: containers on the way are copied, the call holds the new ones."""
        if self.root == "output":
            call.output = _replaced(call.output, self.steps, value, str(self))
            return
        first, rest = self.steps[0], self.steps[1:]
        if first.isdigit():
            new = _replaced(call.args[int(first)], rest, value, str(self))
            call.args = (*call.args[: int(first)], new, *call.args[int(first) + 1 :])
        else:
            call.kwargs = call.kwargs | {first: _replaced(call.kwargs[first], rest, value, str(self))}

    def _of_input(self, call: Call) -> Any:
        first, rest = self.steps[0], self.steps[1:]
        there = dict(enumerate(call.args)) if first.isdigit() else call.kwargs
        key: Any = int(first) if first.isdigit() else first
        if key not in there:
            known = [str(i) for i in range(len(call.args))] + list(call.kwargs)
            raise BadInputError(
                f"{self}: the module was called with input {', '.join(known) or 'nothing'}; no {first}"
            )
        return _walk(there[key], rest, str(self))


@dataclass(frozen=True)
class Value:
    """A term, or the sum or difference of two."""

    first: Term
    sign: int = 0
    second: Term | None = None

    def __str__(self) -> str:
        return str(self.first) if self.second is None else f"{self.first} {' +-'[self.sign]} {self.second}"

    @property
    def replaceable(self) -> bool:
        """Whether another tensor can be put in its place: a module's attributes are its own."""
        return self.first.root != "module"

    @property
    def before(self) -> bool:
        """Whether it is there, and must be replaced, before the module runs."""
        return all(term.root == "input" for term in (self.first, self.second) if term)

    def get(self, call: Call) -> Tensor:
        """The tensor. Raises BadInputError where there is none."""
        found = self.first.get(call)
        _check_tensor(found, self.first)
        if self.second is None:
            return found  # type: ignore[no-any-return]
        other = self.second.get(call)
        _check_tensor(other, self.second)
        if found.shape != other.shape:
            raise BadInputError(f"{self}: the one is {list(found.shape)}, the other {list(other.shape)}")
        return found + self.sign * other  # type: ignore[no-any-return]

    def set(self, call: Call, value: Tensor) -> None:
        """Make this value `value`, by changing its first term."""
        second = 0 if self.second is None else self.second.get(call)
        self.first.set(call, value - self.sign * second)


def parse(text: str) -> Value:
    """A value from its text. Raises BadInputError with what it must look like."""
    parts = re.split(r"\s+([+-])\s+", text.strip())
    matches = [_TERM.fullmatch(part) for part in parts[::2]]
    terms = [Term(m[1], tuple(m[2].split(".")[1:])) for m in matches if m]
    if len(parts) > 3 or len(terms) < len(matches) or any(t.root == "input" and not t.steps for t in terms):
        raise BadInputError(
            f"{text!r} is not where a tensor is: it is like 'output', 'output.1.state', 'input.0', "
            "'module.fast_weight' or 'output - input.0'"
        )
    if len(terms) == 1:
        return Value(terms[0])
    return Value(terms[0], 1 if parts[1] == "+" else -1, terms[1])


def _check_tensor(found: Any, term: Term) -> None:
    if not isinstance(found, Tensor):
        parts = _inside(found)
        which = f"; say where in it, for instance '{term}.{_first(found)}'" if parts else ""
        raise BadInputError(f"{term} is {_what(found)}{parts}, not a tensor{which}")


def _walk(there: Any, steps: Sequence[str], told: str) -> Any:
    while steps:
        step, steps = _step(there, steps)
        if step is None:
            raise BadInputError(f"{told}: there is no {'.'.join(steps)!r} in {_what(there)}{_inside(there)}")
        there = _into(there, step)
    return there


def _step(there: Any, steps: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The next step as a key, and the steps after it; None and all of them where it leads nowhere."""
    if _is_mapping(there):
        for n in range(len(steps), 0, -1):  # a key may have dots in it, as names of parameters do
            key = ".".join(steps[:n])
            if key in there.keys():  # noqa: SIM118 - a TensorDict has no `in`
                return key, steps[n:]
        return None, steps
    if isinstance(there, tuple | list) and steps[0].isdigit():
        return (int(steps[0]), steps[1:]) if int(steps[0]) < len(there) else (None, steps)
    return (steps[0], steps[1:]) if hasattr(there, steps[0]) else (None, steps)


def _into(there: Any, step: Any) -> Any:
    if _is_mapping(there) or isinstance(step, int):
        return there[step]
    return getattr(there, step)


def _replaced(there: Any, steps: Sequence[str], value: Tensor, told: str) -> Any:
    """A copy of `there` with `value` at the end of the steps."""
    if not steps:
        return value
    step, rest = _step(there, steps)
    if step is None:
        raise BadInputError(f"{told}: there is no {'.'.join(steps)!r} in {_what(there)}{_inside(there)}")
    new = _replaced(_into(there, step), rest, value, told)
    if isinstance(there, tuple):
        if isinstance(step, str):
            return there._replace(**{step: new})  # type: ignore[attr-defined]
        parts = (*there[:step], new, *there[step + 1 :])
        return type(there)(*parts) if hasattr(there, "_fields") else parts
    copied = copy.copy(there)
    if _is_mapping(there) or isinstance(there, list):
        copied[step] = new
    else:
        setattr(copied, step, new)
    return copied


def _is_mapping(there: Any) -> bool:
    return isinstance(there, Mapping) or (hasattr(there, "keys") and hasattr(there, "__getitem__"))


def _what(there: Any) -> str:
    return f"a {type(there).__name__}"


def _inside(there: Any) -> str:
    """What there is instead, to choose from."""
    if _is_mapping(there):
        return f"; it has {', '.join(map(str, there.keys()))}"
    if isinstance(there, tuple) and hasattr(there, "_fields"):
        return f"; it has {', '.join(there._fields)}"
    return f" of {len(there)}" if isinstance(there, tuple | list) else ""


def _first(there: Any) -> Any:
    if _is_mapping(there):
        return next(iter(there.keys()), "key")
    return there._fields[0] if hasattr(there, "_fields") else 0
