"""Which hook points a person means: by name, glob, predicate, or several of these; never none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase

from hopeprobe.errors import BadInputError, near_names
from hopeprobe.hooks.points import HookPoint

Selector = str | Callable[[str], bool] | Sequence["Selector"] | AbstractSet["Selector"]


def resolve(names: Iterable[str], selector: Selector) -> list[str]:
    """Return the names that `selector` means, each once, in the order of `names`.

    A selector is a name; a glob as in `fnmatch`, case-sensitive, whose `*` also crosses dots; a predicate on
    the name; or a list, tuple or set of selectors, meaning their union.

    Raises `BadInputError` when the selector, or any one element of a sequence, matches nothing (with the
    nearest names), and `TypeError` when it is none of the above.

    >>> names = ["blocks.0.hook_k", "blocks.0.hook_v", "blocks.1.hook_k"]
    >>> resolve(names, "blocks.*.hook_k")
    ['blocks.0.hook_k', 'blocks.1.hook_k']
    >>> resolve(names, [lambda name: name.startswith("blocks.1"), "blocks.0.hook_v"])
    ['blocks.0.hook_v', 'blocks.1.hook_k']
    """
    known = list(dict.fromkeys(names))
    wanted = _matches(known, selector)
    return [name for name in known if name in wanted]


def _matches(known: list[str], selector: Selector) -> set[str]:
    if isinstance(selector, str):
        found = {selector} if selector in known else {name for name in known if fnmatchcase(name, selector)}
        if not found:
            raise BadInputError(
                f"no hook point matches {selector!r}{near_names(selector, known) or _how_many(known)}"
            )
        return found
    # A hook point is callable: as a predicate it would silently match every name.
    if callable(selector) and not isinstance(selector, (HookPoint, type)):
        found = {name for name in known if selector(name)}
        if not found:
            raise BadInputError(f"no hook point satisfies {_called(selector)}{_how_many(known)}")
        return found
    if isinstance(selector, (Sequence, AbstractSet)):
        if not selector:
            raise BadInputError("an empty sequence selects no hook point")
        return set().union(*(_matches(known, element) for element in selector))
    raise TypeError(
        "hook points are selected by a name, a glob, a predicate on the name, or a sequence of these, "
        f"not by {type(selector).__name__}"
    )


def _how_many(known: list[str]) -> str:
    if not known:
        return "; the model declares no hook points"
    return f"; {len(known)} points were asked: list_hooks() shows them, as does `hopeprobe hooks CKPT`"


def _called(predicate: Callable[[str], bool]) -> str:
    return getattr(predicate, "__qualname__", None) or repr(predicate)
