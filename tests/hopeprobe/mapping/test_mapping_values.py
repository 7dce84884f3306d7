"""Values: where they lead, what an edit leaves alone, and what is said where they lead nowhere."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from hopeprobe.errors import BadInputError
from hopeprobe.mapping.values import Call, parse


class State(NamedTuple):
    weights: dict
    step: int


A, B, C = (torch.full((2,), float(n)) for n in (1, 2, 3))


def call():
    output = (A, State({"w.0": B, "inner": {"x": C}}, 7), [A, B], SimpleNamespace(logits=C))
    return Call(torch.nn.Linear(2, 2), (A, {"k": B}), {"mask": C}, output)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output.0", A),
        ("output.1.weights.w.0", B),
        ("output.1.weights.inner.x", C),
        ("output.2.1", B),
        ("output.3.logits", C),
        ("input.0", A),
        ("input.1.k", B),
        ("input.mask", C),
        ("output.0 + input.1.k", torch.tensor([3.0, 3.0])),
        ("input.mask - output.0", torch.tensor([2.0, 2.0])),
    ],
)
def test_a_value_is_found_and_replaced_where_it_is(text, expected):
    here, value = call(), parse(text)
    assert torch.equal(value.get(here), expected)
    before = here.output
    value.set(here, torch.tensor([10.0, 20.0]))
    assert torch.equal(value.get(here), torch.tensor([10.0, 20.0]))
    own = (before[0], before[1].weights["w.0"], before[2][1])
    assert all(now is was for now, was in zip(own, (A, B, B), strict=True)), "the model's own was changed"
    assert isinstance(here.output[1], State)
    assert here.output[1].step == 7
    assert str(parse(str(value))) == str(value)


def test_attributes_of_the_module_are_seen_and_not_edited():
    here, value = call(), parse("module.weight")
    assert value.get(here) is here.module.weight
    assert not value.replaceable
    assert not value.before
    assert parse("input.0 - input.1").before
    assert not parse("input.0 - output").before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "outputs.0",
        "input",
        "output.",
        "output..1",
        "a.b",
        "output + ",
        "output+input.0",
        "input.0 - input.1 - output",
    ],
)
def test_what_is_no_value(text):
    with pytest.raises(BadInputError, match="is not where a tensor is"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output", "output is a tuple of 4, not a tensor; say where in it, for instance 'output.0'"),
        ("output.1.step", "output.1.step is a int, not a tensor"),
        ("output.9", "there is no '9' in a tuple of 4"),
        ("output.1.states", "there is no 'states' in a State; it has weights, step"),
        ("output.1.weights.w.1", "there is no 'w.1' in a dict; it has w.0, inner"),
        ("input.2", "called with input 0, 1, mask; no 2"),
        ("input.q", "called with input 0, 1, mask; no q"),
        ("module.bias.x", "there is no 'x' in a Parameter"),
    ],
)
def test_a_value_that_leads_nowhere_says_what_is_there(text, message):
    with pytest.raises(BadInputError, match=message):
        parse(text).get(call())


def test_tensors_of_other_shapes_are_not_added():
    here = Call(torch.nn.Identity(), (torch.ones(1),), {}, torch.ones(2))
    with pytest.raises(BadInputError, match=r"the one is \[2\], the other \[1\]"):
        parse("output - input.0").get(here)
