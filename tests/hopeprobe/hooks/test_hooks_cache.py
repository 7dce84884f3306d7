"""ActivationCache: joined over ticks and writes, cloned, detached, and never empty in silence."""

from __future__ import annotations

import pytest
import torch

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.hooks import ActivationCache, HookNeverFiredError, HookPoint, HookSpec


def test_ticks_join_along_time_and_the_rest_is_stacked(toy, x):
    out, cache = toy.run_with_cache(x)
    assert list(cache) == list(toy.hook_dict)
    assert torch.equal(cache["hook_in"], x)
    torch.testing.assert_close(cache["blocks.0.hook_mix"], toy.mix(x))
    assert cache["blocks.0.hook_loss"].shape == (2, 16)
    torch.testing.assert_close(out, x + cache["blocks.0.hook_mix"])
    parts = x.split(4, dim=1)
    assert torch.equal(cache["blocks.0.hook_norm"], torch.stack([p.norm(dim=(1, 2)) for p in parts], 1))
    assert cache.dims("blocks.0.hook_norm") == ("batch", "tick")
    assert cache.dims("hook_in") == ("batch", "pos", "d_model")


def test_each_write_is_kept_though_the_model_overwrites_it_in_place(toy, x):
    _, cache = toy.run_with_cache(x, names_filter="*hook_fast")
    first, second = (p.mT @ p for p in x.split(4, dim=1)[1::2])
    assert cache.dims("blocks.0.hook_fast") == ("batch", "write", "out", "in")
    torch.testing.assert_close(cache["blocks.0.hook_fast"], torch.stack([first, first + second], 1))


def zero_in_place(tensor, hook):
    tensor.zero_()


def test_an_edit_in_place_is_refused_and_does_not_reach_the_cache(toy, x):
    before = x[:, : toy.tick].clone()
    with toy.caching("hook_in", allow_unfired=True) as cache:
        toy.add_hook("hook_in", zero_in_place)
        with pytest.raises(BadInputError, match=r"hook_in.*in place.*clone"):
            toy(x)
    assert torch.equal(cache["hook_in"], before)


def test_a_single_firing_is_cloned_too(toy, x):
    toy.tick = 16
    _, cache = toy.run_with_cache(x, names_filter="hook_in")
    x.zero_()
    assert cache["hook_in"].abs().sum() > 0


def test_the_cache_shows_the_edits_of_hooks_added_before(toy, x):
    with toy.hooks(fwd_hooks=[("hook_in", lambda t, hook: t * 0)]):
        _, cache = toy.run_with_cache(x, names_filter="hook_in")
    assert torch.equal(cache["hook_in"], torch.zeros_like(x))


def test_it_is_detached_unless_the_graph_is_asked_for(toy, x):
    _, cache = toy.run_with_cache(x, names_filter="*hook_mix")
    assert not cache["blocks.0.hook_mix"].requires_grad
    _, cache = toy.run_with_cache(x, names_filter="*hook_mix", detach=False)
    cache["blocks.0.hook_mix"].sum().backward()
    torch.testing.assert_close(toy.mix.bias.grad, torch.full((3,), 32.0))


def test_it_can_be_read_between_firings_and_over_several_calls(toy, x):
    with toy.caching(["hook_in", "*hook_fast"]) as cache:
        assert len(cache) == 0
        assert "hook_in" not in cache
        toy(x)
        assert torch.equal(cache["hook_in"], x)
        toy(x)
    assert torch.equal(cache["hook_in"], torch.cat([x, x], 1))
    assert cache["blocks.0.hook_fast"].shape == (2, 4, 3, 3)


def test_it_is_a_mapping_with_near_names_and_a_repr(toy, x):
    _, cache = toy.run_with_cache(x, names_filter=["hook_in", "*hook_norm"])
    assert isinstance(cache, ActivationCache)
    assert "hook_in" in cache
    assert "blocks.0.hook_mix" not in cache
    assert [tuple(t.shape) for _, t in cache.items()] == [(2, 16, 3), (2, 4)]
    assert cache.get("hook_nothing") is None
    with pytest.raises(KeyError, match="did you mean 'hook_in'"):
        cache["hook_im"]
    assert repr(cache) == "ActivationCache(hook_in [2, 16, 3], blocks.0.hook_norm [2, 4])"


def test_without_a_filter_silent_points_are_missing_and_say_so(toy, x):
    toy.writing = False
    _, cache = toy.run_with_cache(x)
    assert "blocks.0.hook_fast" not in cache
    with pytest.raises(KeyError, match=r"hook_fast.*never fired"):
        cache["blocks.0.hook_fast"]
    with pytest.raises(HookNeverFiredError), toy.caching():
        pass  # nothing at all was run
    with toy.caching(allow_unfired=True) as cache:
        pass
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.ones(2, 4, 3), torch.ones(1, 4, 3)),
        (torch.ones(2, 4, 3), torch.ones(2, 4, 5)),
        (torch.ones(2, 4, 3), torch.ones(2, 4, 3).double()),
    ],
)
def test_firings_that_do_not_join_raise_and_name_the_point(toy, first, second):
    with toy.caching("hook_in"):
        toy.hook_in(first)
        with pytest.raises(MeasurementError, match=r"hook_in.*cannot be joined along 'pos'"):
            toy.hook_in(second)


def test_writes_of_different_size_do_not_stack():
    point = HookPoint("hook_w", HookSpec(("batch", "out"), "write", True, "W"))
    cache = ActivationCache(["hook_w"])
    point.add_hook(cache.record)
    point(torch.ones(2, 3))
    with pytest.raises(MeasurementError, match=r"hook_w.*'write'"):
        point(torch.ones(2, 4))


def test_without_a_batch_dimension_the_new_one_comes_first():
    point = HookPoint("hook_total", HookSpec((), "tick", True, "sum"))
    cache = ActivationCache(["hook_total"])
    point.add_hook(cache.record)
    point(torch.tensor(1.0))
    point(torch.tensor(2.0))
    assert torch.equal(cache["hook_total"], torch.tensor([1.0, 2.0]))
    assert cache.dims("hook_total") == ("tick",)


def test_it_works_under_inference_mode(toy, x):
    with torch.inference_mode():
        _, cache = toy.run_with_cache(x)
    assert torch.equal(cache["hook_in"], x)
