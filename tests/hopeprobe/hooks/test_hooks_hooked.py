"""Hooked: hooks come on together, come off always, and raise when they measured nothing."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.hooks import Hooked, HookNeverFiredError, HookPoint, HookRegistry, HookSpec


def active(model):
    return [name for name, point in model.hook_dict.items() if point.active]


def ignore(tensor, hook):
    return None


def test_hooks_edit_the_run_and_come_off(toy, x):
    plain = toy(x)
    ablated = toy.run_with_hooks(x, fwd_hooks=[("*hook_mix", lambda t, hook: t * 0)])
    assert torch.equal(ablated, x)
    assert active(toy) == []
    assert torch.equal(toy(x), plain)


def test_the_handle_of_a_context_counts(toy, x):
    with toy.hooks(fwd_hooks=[("hook_in", ignore), ("*hook_fast", ignore)]) as handle:
        toy(x)
    assert handle.fired == {"hook_in": 4, "blocks.0.hook_fast": 2}


def test_forward_and_backward_hooks_in_one_context(toy, x):
    grads = []
    with toy.hooks(
        fwd_hooks=[("*hook_mix", lambda t, hook: t * 2)],
        bwd_hooks=[("*hook_mix", lambda g, hook: grads.append(g.clone()))],
    ):
        toy(x).sum().backward()
    assert torch.equal(torch.cat(grads, 1), torch.ones(2, 16, 3))
    torch.testing.assert_close(toy.mix.bias.grad, torch.full((3,), 64.0))


def test_backward_hooks_do_not_see_the_inner_gradient(toy, x):
    toy.inner = True
    with toy.hooks(bwd_hooks=[("*hook_mix", ignore)]) as handle:
        loss = toy(x).sum()
        assert handle.fired == {"blocks.0.hook_mix": 0}
        loss.backward()
    assert handle.fired == {"blocks.0.hook_mix": 4}


@pytest.mark.parametrize(
    "fwd_hooks",
    [
        [("hook_in", ignore), ("hook_inn", ignore)],
        [(["hook_in", "hook_inn"], ignore)],
        [("hook_in", ignore), (3, ignore)],
        [("hook_in", ignore), ("*hook_mix", "print")],
        [("hook_in", ignore), ("*hook_mix",)],
        ("hook_in", ignore),
        (request for request in [("hook_in", ignore), ("hook_inn", ignore)]),
    ],
)
def test_a_typo_anywhere_registers_nothing(toy, x, fwd_hooks):
    with pytest.raises((BadInputError, TypeError)):
        toy.run_with_hooks(x, fwd_hooks=fwd_hooks)
    assert active(toy) == []


def test_a_typo_in_the_backward_hooks_registers_nothing(toy):
    with pytest.raises(BadInputError, match="did you mean 'hook_in'"):
        toy.hooks(fwd_hooks=[("hook_in", ignore)], bwd_hooks=[("hook_inn", ignore)])
    with pytest.raises(BadInputError), toy.caching(["hook_in", "hook_inn"]):
        pass
    with pytest.raises(BadInputError):
        toy.add_hook(["hook_in", "hook_inn"], ignore)
    with pytest.raises(BadInputError):
        toy.add_hook("*", ignore, dir="sideways")
    assert active(toy) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["body", "hook"])
def test_hooks_come_off_after_an_exception_which_is_not_masked(toy, x, error, where):
    def fail(tensor, hook):
        raise error

    # the write point never fires either, and must not hide the original
    hooks = [("hook_in", fail if where == "hook" else ignore), ("*hook_fast", ignore)]
    with pytest.raises(error), toy.hooks(fwd_hooks=hooks):
        raise error if where == "body" else AssertionError(toy(x))
    with pytest.raises(error), toy.caching():
        raise error
    assert active(toy) == []


def test_an_interrupt_while_hooks_are_registered_leaves_none(toy, monkeypatch):
    install = HookPoint._install

    def interrupted(point, hook):
        install(point, hook)
        if point.name == "blocks.0.hook_mix":
            raise KeyboardInterrupt

    context = toy.hooks(fwd_hooks=[("*", ignore)])
    monkeypatch.setattr(HookPoint, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        context.__enter__()
    assert active(toy) == []


def test_an_inner_context_leaves_the_outer_ones_hooks_and_the_users_own(toy, x):
    order = []
    own = toy.add_hook("hook_in", lambda t, hook: order.append("own"))
    module_hook = toy.mix.register_forward_hook(lambda *_: order.append("torch"))
    with toy.hooks(fwd_hooks=[("hook_in", lambda t, hook: order.append("outer"))]):
        with toy.hooks(fwd_hooks=[("hook_in", lambda t, hook: order.append("inner"))]):
            toy(x[:, :4])
        assert order == ["own", "outer", "inner", "torch"]
        with pytest.raises(ZeroDivisionError), toy.hooks(fwd_hooks=[("*", ignore)]):
            raise ZeroDivisionError
        order.clear()
        toy(x[:, :4])
        assert order == ["own", "outer", "torch"]
    order.clear()
    toy(x[:, :4])
    assert order == ["own", "torch"]
    assert own.fired == {"hook_in": 3}
    toy.reset_hooks()
    own.remove()
    order.clear()
    toy(x[:, :4])
    assert order == ["torch"]
    module_hook.remove()


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans()), max_size=6))
def test_any_nesting_restores_what_was_there_before(levels):
    registry = HookRegistry()
    for name in "abc":
        registry.add(name, HookSpec(("batch",), "tick", True, name))

    class Small(Hooked):
        hook_dict = registry

        def __call__(self, x):
            for point in self.hook_dict.values():
                x = point(x)
            return x

    model = Small()
    counts = []

    def count(tensor, hook):
        counts.append(hook.name)

    def descend(depth):
        counts.clear()
        model(torch.ones(1))
        expected = sorted(name for name, _ in levels[:depth])
        assert sorted(counts) == expected
        if depth == len(levels):
            return
        name, fails = levels[depth]
        with contextlib.suppress(ZeroDivisionError), model.hooks(fwd_hooks=[(name, count)]):
            descend(depth + 1)
            if fails:
                raise ZeroDivisionError
        counts.clear()
        model(torch.ones(1))
        assert sorted(counts) == expected

    descend(0)
    assert active(model) == []


def test_a_context_may_be_entered_again_but_not_twice_at_once(toy, x):
    context = toy.hooks(fwd_hooks=[("hook_in", ignore)])
    for _ in range(2):
        with context as handle:
            with pytest.raises(RuntimeError, match="entered already"), context:
                pass
            toy(x)
        assert handle.fired == {"hook_in": 4}
    assert active(toy) == []


def test_a_context_checks_anew_each_time_it_is_entered(toy, x):
    context = toy.hooks(fwd_hooks=[("hook_in", ignore)])
    with context:
        toy(x)
    with pytest.raises(HookNeverFiredError), context:
        pass


def test_points_that_never_fired_raise_and_say_why(toy, x):
    toy.writing = False
    with pytest.raises(
        HookNeverFiredError, match=r"blocks\.0\.hook_fast \(fwd: no write period ended"
    ) as caught:
        toy.run_with_hooks(x, fwd_hooks=[("*", ignore)])
    assert caught.value.names == ("blocks.0.hook_fast",)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, MeasurementError)
    with (
        pytest.raises(HookNeverFiredError, match=r"hook_in.*did not come by"),
        toy.hooks([("hook_in", ignore)]),
    ):
        pass
    with pytest.raises(HookNeverFiredError, match="hook_fast"):
        toy.run_with_cache(x, names_filter="*hook_fast")
    assert active(toy) == []
    toy.run_with_hooks(x, fwd_hooks=[("*", ignore)], allow_unfired=True)
    _, cache = toy.run_with_cache(x, names_filter="*hook_fast", allow_unfired=True)
    assert len(cache) == 0


def test_too_few_tokens_for_a_write_raise(toy, x):
    with pytest.raises(HookNeverFiredError, match="fewer tokens than one write period"):
        toy.run_with_cache(x[:, :4], names_filter="*hook_fast")


def test_backward_hooks_that_never_fired_say_why(toy, x):
    bwd_hooks = [("*hook_mix", ignore)]
    with pytest.raises(HookNeverFiredError, match=r"bwd: nothing was backpropagated"):
        toy.run_with_hooks(x, bwd_hooks=bwd_hooks)
    with pytest.raises(HookNeverFiredError, match=r"bwd: its tensor does not require grad"), torch.no_grad():
        toy.run_with_hooks(x, bwd_hooks=bwd_hooks)
    leaf = toy.hooks(bwd_hooks=[("hook_in", ignore)])
    with pytest.raises(HookNeverFiredError, match=r"bwd: its tensor does not require grad"), leaf:
        toy(x).sum().backward()
    idle = toy.hooks(bwd_hooks=bwd_hooks)
    with pytest.raises(HookNeverFiredError, match=r"bwd: the forward pass did not come by"), idle:
        pass


def test_a_hook_removed_by_somebody_else_counts_as_never_fired(toy):
    with pytest.raises(HookNeverFiredError, match="removed before"), toy.hooks([("hook_in", ignore)]):
        toy.reset_hooks()


def test_add_hook_takes_any_selector_and_directions(toy, x):
    handle = toy.add_hook("blocks.*", ignore)
    backward = toy.add_hook("*hook_mix", ignore, dir="bwd")
    toy(x).sum().backward()
    assert handle.fired == {
        "blocks.0.hook_mix": 4,
        "blocks.0.hook_loss": 4,
        "blocks.0.hook_norm": 4,
        "blocks.0.hook_fast": 2,
    }
    assert backward.fired == {"blocks.0.hook_mix": 4}
    handle.remove()
    handle.remove()
    assert active(toy) == ["blocks.0.hook_mix"]
    backward.remove()
    assert active(toy) == []


def test_list_hooks_shows_all_or_those_selected(toy):
    assert [row.name for row in toy.list_hooks()] == list(toy.hook_dict)
    (row,) = toy.list_hooks("*hook_fast")
    assert row == ("blocks.0.hook_fast", "batch out in", "write", True, "F_t")
    with pytest.raises(BadInputError, match="did you mean"):
        toy.list_hooks("hook_inn")


def test_points_registered_under_another_name_are_refused(toy):
    with pytest.raises(BadInputError, match="'hook_in' is registered under another name, 'hook_out'"):
        toy._register_hooks({"hook_out": toy.hook_in})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_points_of_its_own_and_no_hooks(toy, x, clone):
    toy.add_hook("hook_in", lambda t, hook: t * 0)
    other = clone(toy)
    assert active(other) == []
    assert other.hook_in is other.hook_dict["hook_in"]
    assert other.hook_in is not toy.hook_in
    _, cache = other.run_with_cache(x)
    assert torch.equal(cache["hook_in"], x)
    assert list(other.state_dict()) == ["mix.weight", "mix.bias"]  # points are no part of the weights


def test_arguments_pass_through_to_the_model(toy, x):
    assert torch.equal(toy.run_with_hooks(x=x), toy(x))
    out, _ = toy.run_with_cache(x=x)
    assert torch.equal(out, toy(x))
