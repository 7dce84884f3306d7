"""The registry of a model's hook points: the model's, the command line's and the docs'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hopeprobe.errors import BadInputError
from hopeprobe.hooks.points import Cadence, HookPoint, HookSpec


class HookRegistry(Mapping[str, HookPoint]):
    """Hook points by name, in the order the model added them.

    >>> registry = HookRegistry()
    >>> point = registry.add("hook_gate", HookSpec(("batch", "pos"), "tick", True, "g = [s > tau]"))
    >>> registry["hook_gate"] is point
    True
    """

    def __init__(self) -> None:
        self._points: dict[str, HookPoint] = {}

    def add(self, name: str, spec: HookSpec) -> HookPoint:
        """Make the point `name`; the model keeps it and calls it.

        Raises `BadInputError` when the name is taken, empty, or has a space or a character special to globs.
        """
        if not name or any(c in "*?[]" or c.isspace() for c in name):
            raise BadInputError(
                f"{name!r} cannot name a hook point: it is empty, or has a space or one of *?[]"
            )
        if name in self._points:
            raise BadInputError(f"the hook point {name!r} is there already")
        point = HookPoint(name, spec)
        self._points[name] = point
        return point

    def __getitem__(self, name: str) -> HookPoint:
        return self._points[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        return f"HookRegistry({len(self)} points)"


class HookRow(NamedTuple):
    """One line about one point: its name, dimensions joined by spaces, cadence, editability and equation."""

    name: str
    dims: str
    cadence: Cadence
    editable: bool
    equation: str


def describe(hook_dict: Mapping[str, HookPoint]) -> list[HookRow]:
    """Say what every point declares, in registry order."""
    return [
        HookRow(name, " ".join(p.spec.dims), p.spec.cadence, p.spec.editable, p.spec.equation)
        for name, p in hook_dict.items()
    ]


def markdown_table(hook_dict: Mapping[str, HookPoint]) -> str:
    """Format the same as a Markdown table, for documentation."""
    lines = ["| name | shape | fires | editable | equation |", "|---|---|---|---|---|"]
    for row in describe(hook_dict):
        equation = row.equation.replace("|", "\\|")  # a norm's bars would end the cell
        lines.append(
            f"| `{row.name}` | {row.dims} | {row.cadence} | {'yes' if row.editable else 'no'} | {equation} |"
        )
    return "\n".join(lines)
