"""The CMS: what its levels compute, and that each writes sum_t g_t dCE_t/dW of its own gate, by autograd alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS, TOY
from scipy.special import erf

from hopeprobe.model.config import CMSLevel
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import close

B = 2
TOKENS = torch.randint(0, 37, (B, 33), generator=torch.Generator().manual_seed(0))
EQUAL = dataclasses.replace(TOY, cms_levels=(CMSLevel("one", 8, 0.1), CMSLevel("two", 8, 0.3)))


def made(config=TOY):
    return HopeModel(config, seed=1, dtype=torch.float64)


def levels(model):
    return [(i, j, level) for i, b in enumerate(model.blocks) for j, level in enumerate(b.cms.level_list())]


def putting(gate):
    """A hook that puts in the gates of the tick at hand, tick after tick."""
    position = {}

    def put(g, hook):
        start = position.get(hook.name, 0)
        position[hook.name] = start + g.shape[1]
        return gate[:, start : start + g.shape[1]].clone()

    return put


def gates(seed, n=8):
    return torch.rand(B, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["gated", "chain"])
@pytest.mark.parametrize("grad", [False, True])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_every_level_writes_its_own_gates_sum_of_gradients(mode, grad, seed):
    """One tick, all gates different, against autograd over the plain parameters, row by row."""
    model = made(dataclasses.replace(EQUAL, cms_mode=mode))
    which = {(i, j): gates(100 * seed + 10 * i + j) for i, j, _ in levels(model)}
    which[0, 1] = which[0, 0] * 0.5  # one level gated by half of another's
    which[1, 0] = which[1, 1].round()
    which[1, 0][:, 3] = 1.0  # something is written
    hooks = [
        (f"blocks.{i}.cms.{level.spec.name}.hook_write_gate", putting(which[i, j]))
        for i, j, level in levels(model)
    ]
    with torch.set_grad_enabled(grad):
        state = model.run_with_hooks(TOKENS[:, :9], fwd_hooks=hooks).state
    for row in range(B):
        losses = model(TOKENS[row : row + 1, :9]).losses[0]
        for i, j, level in levels(model):
            want = torch.autograd.grad(
                (which[i, j][row] * losses).sum(), (level.w_in, level.w_out), retain_graph=True
            )
            held = state.layers[i].cms[j]
            for got, g in zip((held.w_in[row], held.w_out[row]), want, strict=True):
                step = -level.spec.learning_rate / 8 * g
                assert (got - step).norm() <= 1e-12 * step.norm()
                assert step.any()


def test_gates_that_are_swapped_are_seen_by_that_comparison():
    model = made(EQUAL)
    one, two = gates(1), gates(2)
    names = [f"blocks.1.cms.{n}.hook_write_gate" for n in ("one", "two")]
    with torch.no_grad():
        a = model.run_with_hooks(
            TOKENS[:, :9], fwd_hooks=[(names[0], putting(one)), (names[1], putting(two))]
        )
        b = model.run_with_hooks(
            TOKENS[:, :9], fwd_hooks=[(names[0], putting(two)), (names[1], putting(one))]
        )
    for x, y in zip(a.state.layers[1].cms, b.state.layers[1].cms, strict=True):
        assert (x.w_in - y.w_in).norm() > 0.01 * x.w_in.norm()


def test_a_slow_level_accumulates_over_its_whole_period():
    """All else frozen, the last layer's gradient over 4 ticks is that of one graph; the mean is over 32 tokens."""
    model = made()
    gate = gates(3, 32)
    frozen = [
        (n, close)
        for n in ("*.selfmod.hook_write_gate", "*.fast.hook_write_gate", "blocks.0.cms.slow.hook_write_gate")
    ]
    hooks = [*frozen, ("blocks.1.cms.slow.hook_write_gate", putting(gate))]
    with torch.no_grad():
        state = model.run_with_hooks(TOKENS, fwd_hooks=hooks).state
    losses = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.hook_write_gate", close)]).losses
    for row in range(B):
        level = model.blocks[1].cms.levels["slow"]
        want = torch.autograd.grad(
            (gate[row] * losses[row]).sum(), (level.w_in, level.w_out), retain_graph=True
        )
        held = state.layers[1].cms[1]
        for got, g in zip((held.w_in[row], held.w_out[row]), want, strict=True):
            assert (got + 0.1 / 32 * g).norm() <= 1e-12 * (0.1 / 32 * g).norm()


def test_nothing_is_applied_before_the_period_is_over():
    model = made()
    with torch.no_grad():
        state = model(TOKENS[:, :25]).state
        held = state.layers[0].cms
        assert held[0].w_in.any()
        assert held[0].grad_hidden.shape[1] == 0
        assert not held[1].w_in.any()
        assert held[1].grad_hidden.shape == (B, 24, 32)
        after = model(TOKENS[:, 24:33], state=state).state.layers[0].cms[1]
    assert after.w_in.any()
    assert after.grad_hidden.shape[1] == 0


def test_a_rate_of_zero_writes_nothing_and_moves_no_other_level():
    zero = dataclasses.replace(EQUAL, cms_levels=(CMSLevel("one", 8, 0.1), CMSLevel("two", 8, 0.0)))
    with torch.no_grad():
        state = made(zero)(TOKENS[:, :9]).state
        other = made(EQUAL)(TOKENS[:, :9]).state
    for layer, expected in zip(state.layers, other.layers, strict=True):
        assert not layer.cms[1].w_in.any()
        assert not layer.cms[1].w_out.any()
        assert torch.equal(layer.cms[0].w_in, expected.cms[0].w_in)


def held_to(bound):
    return dataclasses.replace(
        TOY, cms_levels=(CMSLevel("one", 8, 0.1, bound), CMSLevel("two", 16, 0.3, bound))
    )


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_written_is_held_to_a_share_of_the_meta_weights(grad):
    """However long the stream; without a bound it is past that, and a bound that nothing meets changes no bit."""
    free, held, loose = (made(held_to(bound)) for bound in (None, 0.002, 50.0))
    with torch.set_grad_enabled(grad):
        now, bounded, untouched = (model(TOKENS).state for model in (free, held, loose))
    met = 0
    for i, j, level in levels(held):
        for name in ("w_in", "w_out"):
            most = 0.002 * float(getattr(level, name).detach().norm())
            sizes = getattr(bounded.layers[i].cms[j], name).flatten(1).norm(dim=1)
            unbounded = getattr(now.layers[i].cms[j], name)
            assert (sizes <= most * (1 + 1e-9)).all()
            met += int(((sizes > most * (1 - 1e-9)) & (unbounded.flatten(1).norm(dim=1) > most)).sum())
            assert torch.equal(getattr(untouched.layers[i].cms[j], name), unbounded)
    assert met >= 4


def test_a_first_write_that_is_held_keeps_its_direction():
    with torch.no_grad():
        free, held = (made(held_to(bound))(TOKENS[:, :9]).state.layers[0].cms[0] for bound in (None, 1e-4))
    for name in ("w_in", "w_out"):
        a, b = getattr(free, name).flatten(1), getattr(held, name).flatten(1)
        assert torch.allclose(torch.cosine_similarity(a, b), torch.ones(B, dtype=torch.float64), atol=1e-12)
        assert (b.norm(dim=1) < a.norm(dim=1)).all()


def test_a_write_goes_downhill():
    """The same tokens again, after a small write of one level alone, cost less."""
    model = made(dataclasses.replace(TOY, cms_levels=(CMSLevel("one", 8, 0.01),)))
    with torch.no_grad(), model.hooks(fwd_hooks=[("*.selfmod.hook_write_gate", close)]):
        first = model(TOKENS[:, :9])
        state = model.init_state(B)
        layers = tuple(
            fresh._replace(cms=left.cms) for fresh, left in zip(state.layers, first.state.layers, strict=True)
        )
        again = model(TOKENS[:, :9], state=state._replace(layers=layers))
    assert (again.losses.sum(1) < first.losses.sum(1)).all()


@pytest.mark.parametrize("mode", ["gated", "chain"])
def test_what_a_level_computes(mode):
    model = made(dataclasses.replace(TOY, cms_mode=mode))
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter="*.cms.*")
    for i, j, level in levels(model):
        point = f"blocks.{i}.cms.{level.spec.name}.hook_"
        x = cache[point + "in"].numpy()
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        for tick in range(4):
            rows, writes = slice(8 * tick, 8 * tick + 8), 8 * tick // level.spec.period
            w_in, w_out = (w.detach().numpy()[None] for w in (level.w_in, level.w_out))
            if writes:
                w_in, w_out = (cache[point + n][:, writes - 1].numpy() for n in ("fast_in", "fast_out"))
            z = normed[:, rows] @ w_in.transpose(0, 2, 1) + level.b_in.detach().numpy()
            hidden = z * 0.5 * (1 + erf(z / np.sqrt(2)))
            delta = hidden @ w_out.transpose(0, 2, 1) + level.b_out.detach().numpy()
            assert np.allclose(cache[point + "delta"][:, rows].numpy(), delta, rtol=0, atol=1e-12)
        if mode == "chain" and j:
            assert torch.equal(cache[point + "in"], cache[f"blocks.{i}.cms.fast.hook_out"])


@pytest.mark.parametrize("frozen", [False, True])
def test_levels_of_identical_weights_have_identical_deltas(frozen):
    """Also while they write, where period and rate are the same: nothing in a level depends on its name or place."""
    same = dataclasses.replace(TOY, cms_levels=(CMSLevel("one", 8), CMSLevel("two", 8 if not frozen else 32)))
    model = made(same)
    for block in model.blocks:
        block.cms.levels["two"].load_state_dict(block.cms.levels["one"].state_dict())
    hooks = [("blocks.*.hook_write_gate", close)] if frozen else []
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(TOKENS, names_filter="*.cms.*.hook_delta")
    for i in range(2):
        one, two = (cache[f"blocks.{i}.cms.{n}.hook_delta"] for n in ("one", "two"))
        assert torch.equal(one, two) if frozen else torch.allclose(one, two, rtol=1e-12, atol=1e-14)
        assert one.any()


def test_levels_that_differ_have_other_deltas():
    with torch.no_grad():
        _, cache = made(EQUAL).run_with_cache(TOKENS, names_filter="*.hook_delta")
    assert not torch.allclose(
        cache["blocks.0.cms.one.hook_delta"], cache["blocks.0.cms.two.hook_delta"], rtol=0.1
    )


def test_the_mix_is_edited_as_it_is_read():
    """All weight on one level is that level alone."""
    model = made()
    only = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with torch.no_grad(), model.hooks(fwd_hooks=[("*.hook_mix", lambda m, hook: only.expand_as(m).clone())]):
        _, cache = model.run_with_cache(TOKENS, names_filter=["*.cms.hook_out", "*.slow.hook_out"])
    for i in range(2):
        assert torch.equal(cache[f"blocks.{i}.cms.hook_out"], cache[f"blocks.{i}.cms.slow.hook_out"])


def test_a_level_without_weight_in_the_mix_learns_nothing():
    model = made()
    only = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        state = model.run_with_hooks(
            TOKENS, fwd_hooks=[("*.hook_mix", lambda m, hook: only.expand_as(m).clone())]
        ).state
    for layer in state.layers:
        assert not layer.cms[0].w_in.any()
        assert layer.cms[1].w_in.any()


@pytest.mark.parametrize("name", ["default", "three-levels", "chain"])
def test_the_inner_gradient_is_first_order_and_leaves_no_graph(name):
    state = made(CONFIGS[name])(TOKENS).state
    for layer in state.layers:
        for level in layer.cms:
            parts = (*level.change_in, *level.change_out, *level[2:])
            assert not any(t.requires_grad for t in parts)


def test_a_frozen_parameter_still_lets_its_level_write():
    """Fine-tuning with some weights held: the inner gradient is of the fast weights, whoever asks for an outer one."""
    model = made()
    expected = model(TOKENS[:, :9]).state.layers[0].cms[0]
    for p in model.blocks[0].cms.parameters():
        p.requires_grad_(False)
    got = model(TOKENS[:, :9]).state.layers[0].cms[0]
    assert torch.allclose(got.w_in, expected.w_in, rtol=1e-12, atol=0)
    assert torch.allclose(got.w_out, expected.w_out, rtol=1e-12, atol=0)
