"""resolve: what a selector means, and that it never means nothing."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookPoint, HookSpec, resolve

NAMES = [
    "hook_embed",
    *(
        f"blocks.{i}.cms.{level}.hook_{x}"
        for i in (0, 1)
        for level in ("fast", "slow")
        for x in ("in", "delta")
    ),
    *(f"blocks.{i}.selfmod.hook_{x}" for i in (0, 1) for x in "kqv"),
]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("hook_embed", ["hook_embed"]),
        ("blocks.*.cms.fast.hook_delta", ["blocks.0.cms.fast.hook_delta", "blocks.1.cms.fast.hook_delta"]),
        ("*hook_q", ["blocks.0.selfmod.hook_q", "blocks.1.selfmod.hook_q"]),  # * crosses dots
        ("blocks.1.selfmod.hook_[kq]", ["blocks.1.selfmod.hook_k", "blocks.1.selfmod.hook_q"]),
        (
            ["*hook_q", "hook_embed", "*hook_q"],
            ["hook_embed", "blocks.0.selfmod.hook_q", "blocks.1.selfmod.hook_q"],
        ),
        ((["hook_embed"],), ["hook_embed"]),
        ({"hook_embed"}, ["hook_embed"]),
        (lambda name: name.endswith("_v"), ["blocks.0.selfmod.hook_v", "blocks.1.selfmod.hook_v"]),
        (re.compile("hook_e").match, ["hook_embed"]),  # truthy is enough
        ("*", NAMES),
    ],
)
def test_what_a_selector_means(selector, expected):
    assert resolve(NAMES, selector) == expected


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("hook_embd", "'hook_embd'; did you mean 'hook_embed'"),
        ("blocks.*.cms.fats.hook_delta", "'blocks.0.cms.fast.hook_delta'"),
        (["hook_embed", "hook_embd"], "'hook_embd'; did you mean"),
        (["hook_embed", lambda name: False], "<lambda>; 15 points were asked: list_hooks() shows them"),
        (lambda name: False, "no hook point satisfies"),
        ("", "no hook point matches ''"),
        ([], "empty"),
        (["hook_embed", []], "empty"),
        ("HOOK_EMBED", "matches 'HOOK_EMBED'"),
    ],
)
def test_zero_matches_raise_with_near_names(selector, message):
    with pytest.raises(BadInputError, match=re.escape(message)):
        resolve(NAMES, selector)


def test_a_model_without_points_says_so():
    with pytest.raises(BadInputError, match="declares no hook points"):
        resolve([], "*")


POINT = HookPoint("hook_embed", HookSpec(("batch",), "tick", True, "x"))


@pytest.mark.parametrize(
    "selector", [None, 1, b"hook_embed", {"hook_embed": 1}, POINT, str, ["hook_embed", 2]]
)
def test_a_selector_of_the_wrong_type_is_a_type_error(selector):
    with pytest.raises(TypeError, match="not by"):
        resolve(NAMES, selector)


names = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, unique=True)
globs = st.text("ab.*?", min_size=1, max_size=4)


@given(names, globs)
def test_a_glob_means_what_fnmatch_says_or_raises(known, glob):
    expected = [name for name in known if fnmatchcase(name, glob)]
    if expected:
        assert resolve(known, glob) == expected
    else:
        with pytest.raises(BadInputError):
            resolve(known, glob)


@given(st.data(), names)
def test_a_sequence_is_the_union_in_registry_order_however_it_is_nested(data, known):
    chosen = data.draw(st.lists(st.sampled_from(known), min_size=1))
    at = data.draw(st.integers(0, len(chosen)))
    nested = [*chosen[:at], chosen[at:]] if chosen[at:] else chosen
    assert resolve(known, nested) == [name for name in known if name in chosen]
    assert resolve(known, lambda name: name in chosen) == resolve(known, nested)


@given(st.data(), names)
def test_one_element_that_matches_nothing_spoils_the_sequence(data, known):
    chosen = data.draw(st.lists(st.sampled_from(known)))
    chosen.insert(data.draw(st.integers(0, len(chosen))), "typo")
    with pytest.raises(BadInputError, match="typo"):
        resolve(known, chosen)
