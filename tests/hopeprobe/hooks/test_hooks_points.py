"""HookPoint: what a hook may see and return, backward hooks, pickling."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.hooks import HookPoint, HookSpec, inner_backward

SPEC = HookSpec(("batch", "pos"), "tick", True, "x")


@pytest.fixture
def point() -> HookPoint:
    return HookPoint("hook_x", SPEC)


def test_an_idle_point_returns_its_very_argument(point):
    tensor = torch.ones(2, 3)
    assert not point.active
    assert point(tensor) is tensor


def test_observing_leaves_the_tensor_and_replacing_replaces_it_in_order(point):
    seen = []
    tensor = torch.ones(2, 3)
    point.add_hook(lambda t, hook: seen.append((hook.name, hook.spec, t.sum().item())))
    assert point(tensor) is tensor
    point.add_hook(lambda t, hook: t * 2)
    point.add_hook(lambda t, hook: t + 1)
    assert torch.equal(point(tensor), torch.full((2, 3), 3.0))
    assert seen == [("hook_x", SPEC, 6.0)] * 2


def test_handles_come_off_once_and_keep_active_true_to_the_hooks(point):
    forward, backward = point.add_hook(lambda t, hook: None), point.add_hook(lambda t, hook: None, "bwd")
    point(torch.ones(2, 3))
    assert forward.fired == {"hook_x": 1}
    assert backward.fired == {"hook_x": 0}
    forward.remove()
    forward.remove()
    assert point.active
    backward.remove()
    assert not point.active


def test_a_hook_that_removes_itself_leaves_the_others_running(point):
    calls = []
    first = point.add_hook(lambda t, hook: first.remove())
    point.add_hook(lambda t, hook: calls.append(1))
    point(torch.ones(1, 1))
    point(torch.ones(1, 1))
    assert calls == [1, 1]
    assert first.fired == {"hook_x": 1}


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (1.0, TypeError),
        ([torch.ones(2, 3)], TypeError),
        (False, TypeError),
        (torch.ones(2, 4), BadInputError),
        (torch.ones(2, 3).double(), BadInputError),
        (torch.ones(2, 3, device="meta"), BadInputError),
    ],
)
def test_a_wrong_return_value_raises_and_names_the_point(point, returned, error):
    point.add_hook(lambda t, hook: returned)
    with pytest.raises(error, match="hook_x"):
        point(torch.ones(2, 3))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_point_that_is_not_editable_can_only_be_observed(direction):
    point = HookPoint("hook_loss", HookSpec(("batch",), "tick", False, "l"))
    handle = point.add_hook(lambda t, hook: None, direction)
    tensor = torch.ones(2, requires_grad=True)
    point(tensor).sum().backward()
    assert handle.fired == {"hook_loss": 1}
    point.add_hook(lambda t, hook: t, direction)
    with pytest.raises(BadInputError, match=r"hook_loss.*cannot be edited"):
        point(tensor).sum().backward()


def test_the_number_of_dimensions_is_checked_while_hooks_are_on(point):
    point(torch.ones(2, 3, 4))
    point.add_hook(lambda t, hook: None)
    with pytest.raises(MeasurementError, match=r"hook_x.*\[batch pos\].*\(2, 3, 4\)"):
        point(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"hook_x.*NoneType"):
        point(None)


def test_backward_hooks_see_and_replace_the_gradient(point):
    seen = []
    x = torch.ones(1, 2, requires_grad=True)
    point.add_hook(lambda g, hook: seen.append((hook.name, g.clone())), "bwd")
    point.add_hook(lambda g, hook: g * 10, "bwd")
    point.add_hook(lambda g, hook: g + 1, "bwd")
    (point(x) * 3).sum().backward()
    assert seen[0][0] == "hook_x"
    assert torch.equal(seen[0][1], torch.full((1, 2), 3.0))
    assert torch.equal(x.grad, torch.full((1, 2), 31.0))


def test_a_backward_hook_sees_the_paths_through_the_point_alone(point):
    grads = []
    x = torch.ones(1, 2, requires_grad=True)
    point.add_hook(lambda g, hook: grads.append(g.clone()), "bwd")
    (5 * x + 3 * point(x)).sum().backward()  # 5 goes around the point
    assert torch.equal(grads[0], torch.full((1, 2), 3.0))
    assert torch.equal(x.grad, torch.full((1, 2), 8.0))


def test_a_backward_hook_sees_what_the_forward_hooks_left(point):
    grads = []
    x = torch.ones(1, 2, requires_grad=True)
    point.add_hook(lambda g, hook: grads.append(g.clone()), "bwd")
    point.add_hook(lambda t, hook: t * 7)
    (3 * point(x)).sum().backward()
    assert torch.equal(grads[0], torch.full((1, 2), 3.0))
    assert torch.equal(x.grad, torch.full((1, 2), 21.0))


def test_a_removed_backward_hook_is_silent_in_a_graph_made_before(point):
    calls = []
    handle = point.add_hook(lambda g, hook: calls.append(1), "bwd")
    loss = point(torch.ones(1, 2, requires_grad=True)).sum()
    handle.remove()
    loss.backward()
    assert calls == []


def test_inner_gradients_are_hidden_from_backward_hooks(point):
    handle = point.add_hook(lambda g, hook: g * 0, "bwd")
    x = torch.ones(1, 2, requires_grad=True)
    y = point(x)
    with inner_backward():
        (inner,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(ZeroDivisionError), inner_backward():
        raise ZeroDivisionError  # must not leave the hooks silent
    assert torch.equal(inner, torch.ones(1, 2))
    assert handle.fired == {"hook_x": 0}
    y.sum().backward()
    assert handle.fired == {"hook_x": 1}
    assert torch.equal(x.grad, torch.zeros(1, 2))


def test_hooks_fire_under_inference_mode_and_no_grad(point):
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            handle = point.add_hook(lambda t, hook: t * 2)
            assert torch.equal(point(torch.ones(1, 1)), torch.full((1, 1), 2.0))
            handle.remove()


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_independent_and_have_no_hooks(point, clone):
    point.add_hook(lambda t, hook: t * 2)  # a lambda does not pickle: it must not be tried
    other = clone(point)
    assert (other.name, other.spec, other.active) == (point.name, point.spec, False)
    other.add_hook(lambda t, hook: t * 5)
    assert torch.equal(point(torch.ones(1, 1)), torch.full((1, 1), 2.0))
    assert torch.equal(other(torch.ones(1, 1)), torch.full((1, 1), 5.0))


def test_what_is_not_a_hook_is_refused_at_once(point):
    with pytest.raises(TypeError, match="hook_x"):
        point.add_hook("print")
    with pytest.raises(BadInputError, match="'fwd' or 'bwd'"):
        point.add_hook(print, "backward")
    assert not point.active


@pytest.mark.parametrize(
    "fields",
    [
        (("batch",), "token", True, "x"),
        (("batch", "batch"), "tick", True, "x"),
        ("batch", "tick", True, "x"),
        (["batch"], "tick", True, "x"),
        (("batch",), "tick", True, ""),
        (("batch",), "tick", True, "x\ny"),
    ],
)
def test_a_malformed_spec_is_refused(fields):
    with pytest.raises(ValueError, match=r"cadence|dims|equation"):
        HookSpec(*fields)


def test_repr_names_the_point(point):
    assert repr(point) == "HookPoint('hook_x', [batch pos], hooks=0)"
