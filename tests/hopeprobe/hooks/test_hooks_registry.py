"""HookRegistry and the tables made from it; the documented examples run."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookRegistry, HookRow, HookSpec, describe, markdown_table

SPEC = HookSpec(("batch", "pos"), "tick", False, "s = |x|")


@pytest.fixture
def registry() -> HookRegistry:
    registry = HookRegistry()
    registry.add("hook_s", SPEC)
    registry.add("blocks.0.hook_w", HookSpec(("batch", "out", "in"), "write", True, "W"))
    return registry


def test_it_maps_names_to_points_in_order(registry):
    assert list(registry) == ["hook_s", "blocks.0.hook_w"]
    assert registry["hook_s"].name == "hook_s"
    assert len(registry) == 2
    assert repr(registry) == "HookRegistry(2 points)"


@pytest.mark.parametrize("name", ["hook_s", "", "hook s", "blocks.*.hook", "hook[0]", "hook?"])
def test_a_name_taken_or_ambiguous_is_refused(registry, name):
    with pytest.raises(BadInputError):
        registry.add(name, SPEC)
    assert len(registry) == 2


def test_copies_hold_points_of_their_own(registry):
    for other in (copy.deepcopy(registry), pickle.loads(pickle.dumps(registry))):
        assert list(other) == list(registry)
        assert other["hook_s"] is not registry["hook_s"]


def test_describe_and_the_markdown_table_print_every_declaration(registry):
    assert describe(registry) == [
        HookRow("hook_s", "batch pos", "tick", False, "s = |x|"),
        HookRow("blocks.0.hook_w", "batch out in", "write", True, "W"),
    ]
    assert markdown_table(registry).splitlines() == [
        "| name | shape | fires | editable | equation |",
        "|---|---|---|---|---|",
        r"| `hook_s` | batch pos | tick | no | s = \|x\| |",
        "| `blocks.0.hook_w` | batch out in | write | yes | W |",
    ]


@pytest.mark.parametrize("name", ["points", "registry", "resolve", "cache", "hooked"])
def test_the_examples_in_the_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"hopeprobe.hooks.{name}")).failed == 0
