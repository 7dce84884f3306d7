"""The Titans layer: its closed form against a loop in NumPy, closed tokens, edits, the size of its weights."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_toys import TOY
from scipy.special import erf

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import preset
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import norm_ratio
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.titans import momentum_chunk

CONFIG = dataclasses.replace(TOY, variant="titans")
SHARES = st.floats(0.0, 1.0)


def make(**changes):
    return HopeModel(dataclasses.replace(CONFIG, **changes), seed=1, dtype=torch.float64)


def tensors(*columns):
    return (torch.tensor([column], dtype=torch.float64) for column in columns)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0.0, 2.0), SHARES, SHARES, st.floats(-3, 3)),
        min_size=1,
        max_size=12,
    ),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_a_chunk_is_its_recurrence_for_numbers(rows, weight, momentum):
    """W, S and gradients of one entry: token by token in float64."""
    gate, eta, mu, alpha, gradient = (list(column) for column in zip(*rows, strict=True))
    w, s = weight, momentum
    for g, e, m, a, dl in rows:
        s = (1 - g * (1 - m)) * s - g * e * dl
        w = (1 - g * (1 - a)) * w + g * s
    sums = momentum_chunk(*tensors(gate, eta, mu, alpha))
    (of_row,) = tensors(gradient)
    found_w = sums.kept * weight + sums.carried * momentum - (sums.weight * of_row).sum()
    found_s = sums.left * momentum - (sums.weight_s * of_row).sum()
    assert float(found_w) == pytest.approx(w, abs=1e-12, rel=1e-12)
    assert float(found_s) == pytest.approx(s, abs=1e-12, rel=1e-12)


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def slope_of_gelu(x):
    return 0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def test_two_writes_agree_with_a_loop_in_numpy(tokens):
    """Gradients by hand, at each chunk's start; k, v and the three rates are what the hooks show."""
    model = make(layers=1)
    names = [
        "hook_k",
        "hook_v",
        "hook_eta",
        "hook_momentum",
        "hook_alpha",
        "memory.hook_fast_w1",
        "memory.hook_fast_w2",
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens[:1, :17], names_filter=[f"blocks.0.titans.{name}" for name in names]
        )
        state = model(tokens[:1, :17]).state.layers[0].titans
    k, v, eta, mu, alpha, shown_w1, shown_w2 = (
        cache[f"blocks.0.titans.{name}"].numpy().reshape(-1, *cache[f"blocks.0.titans.{name}"].shape[2:])
        for name in names
    )
    memory = model.blocks[0].titans.memory
    meta_1, meta_2 = (w.detach().numpy() for w in (memory.w1, memory.w2))
    w1, w2, s1, s2 = meta_1.copy(), meta_2.copy(), np.zeros_like(meta_1), np.zeros_like(meta_2)
    for chunk in (range(8), range(8, 16)):
        start_1, start_2 = w1.copy(), w2.copy()
        for t in chunk:
            pre = start_2 @ k[t]
            error = k[t] + start_1 @ gelu(pre) - v[t]
            s1 = mu[t] * s1 - eta[t] * np.outer(error, gelu(pre))
            s2 = mu[t] * s2 - eta[t] * np.outer((start_1.T @ error) * slope_of_gelu(pre), k[t])
            w1 = meta_1 + alpha[t] * (w1 - meta_1) + s1
            w2 = meta_2 + alpha[t] * (w2 - meta_2) + s2
    np.testing.assert_allclose(shown_w1.reshape(-1, *w1.shape)[-1], w1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(shown_w2.reshape(-1, *w2.shape)[-1], w2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.s1[0], s1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.s2[0], s2, rtol=0, atol=1e-12)
    assert np.abs(w1 - meta_1).max() > 1e-3


def test_closed_gates_leave_momentum_as_it_is(tokens):
    model = make()
    with torch.no_grad():
        state = model(tokens[:, :17]).state
        close = [("blocks.*.titans.hook_write_gate", lambda gate, hook: gate * 0)]
        with model.hooks(close):
            after = model(tokens[:, 16:41], state=state).state
    for before, now in zip(state.layers, after.layers, strict=True):
        for name in ("w1", "w2", "s1", "s2"):
            assert torch.equal(getattr(before.titans, name), getattr(now.titans, name)), name
        assert not torch.equal(before.titans.conv_tail, now.titans.conv_tail), "it went on reading"


def test_an_edit_of_fast_weights_is_the_state(tokens):
    model = make()
    with (
        torch.no_grad(),
        model.hooks([("blocks.1.titans.memory.hook_fast_w1", lambda w, hook: torch.zeros_like(w))]),
    ):
        state = model(tokens[:, :17]).state
    assert not state.layers[1].titans.w1.any()
    with torch.no_grad():
        plain = model(tokens[:, :17]).state
        with model.hooks([("blocks.*.titans.memory.hook_fast_*", lambda w, hook: None)]):
            watched = model(tokens[:, :17]).state
    assert torch.equal(plain.layers[0].titans.w1, watched.layers[0].titans.w1)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_hook_puts_in_stays_the_callers(tokens, rows):
    """Later writes are in place: neither a tensor that the caller keeps nor the meta weights may change."""
    model = make()
    memory = model.blocks[1].titans.memory
    before = memory.w1.detach().clone()
    goal = torch.randn(rows, *memory.w2.shape, dtype=torch.float64)
    kept = goal.clone()
    edits = [
        ("blocks.1.titans.memory.hook_fast_w1", lambda w, hook: memory.w1.expand_as(w)),
        ("blocks.1.titans.memory.hook_fast_w2", lambda w, hook: goal),
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens[:rows, :41], fwd_hooks=edits)
    assert torch.equal(memory.w1, before)
    assert torch.equal(goal, kept)


def test_attention_sees_no_more_than_its_window(tokens):
    """With one layer and closed writes a token reaches as far as window and convolution do."""
    model = make(layers=1, window=5, conv_width=2)
    other = tokens[:1, :41].clone()
    other[0, 10] = (other[0, 10] + 1) % 37
    with torch.no_grad(), model.hooks([("blocks.*.titans.hook_write_gate", lambda gate, hook: gate * 0)]):
        changed = (model(tokens[:1, :41]).losses != model(other).losses)[0].nonzero().flatten().tolist()
    assert changed == [9, 10, 11, 12, 13, 14], "as a target, then as long as it is seen"


def test_projections_learn_through_writes_only_where_the_gradient_goes_through(tokens):
    for write_grad, reached in (("through", True), ("stop", False)):
        model = make(write_grad=write_grad)
        model(tokens).losses.sum().backward()
        titans = model.blocks[0].titans
        for parameter in (titans.w_k, titans.w_v, titans.w_scalar, titans.momentum_bias):
            assert (parameter.grad is not None and bool(parameter.grad.any())) == reached
        assert titans.memory.w1.grad.any()


@pytest.mark.parametrize("form", ["gate", "layer"])
def test_fast_weights_keep_their_size_over_a_context_at_initialisation(form):
    config = dataclasses.replace(preset("tiny", "titans"), vocab_size=97, titans_form=form)
    model = HopeModel(config, seed=0)
    text = torch.randint(0, 97, (4, config.context + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.5 < norm_ratio(model, model(text).state) < 2.0


def test_resetting_takes_momentum_along_and_not_what_was_read(tokens):
    subject = HopeSubject(make())
    state = subject.run(tokens[:, :17]).state
    reset = subject.reset_rows(state, [1]).layers[0].titans
    held = state.layers[0].titans
    memory = subject.module.blocks[0].titans.memory
    start = {"w1": memory.w1, "w2": memory.w2, "s1": torch.zeros(()), "s2": torch.zeros(())}
    for name, fresh in start.items():
        assert (getattr(reset, name)[1] == fresh).all()
        assert not (getattr(held, name)[1] == fresh).all()
        assert torch.equal(getattr(reset, name)[[0, 2]], getattr(held, name)[[0, 2]])
    assert torch.equal(reset.conv_tail, held.conv_tail)
    assert dict(subject.decay_target()) == {"titans.memory": "init"}
    assert list(subject.write_periods()) == ["titans.memory"]


def test_a_state_of_another_variant_is_refused(tokens):
    with pytest.raises(BadInputError, match="no Titans memory"):
        make()(tokens, state=HopeModel(TOY, seed=1, dtype=torch.float64)(tokens[:, :9]).state)
    with pytest.raises(BadInputError, match="titans_form is 'both'"):
        make(titans_form="both")


@pytest.mark.parametrize("chunk", [8, 64])
def test_a_window_of_one_token_does_not_overflow(chunk):
    """Gradients of a chunk add up where its keys are the same; the largest step a gate can ask for is bounded."""
    config = dataclasses.replace(
        TOY, variant="titans", dim=32, context=512, chunk_memory=chunk, surprise_threshold=0.0
    )
    model = HopeModel(config, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.titans.eta_bias.fill_(8.0)  # eta at its largest
        out = model(torch.full((1, 513), 3))
    for block, layer in zip(model.blocks, out.state.layers, strict=True):
        fast, meta = layer.titans.w1.norm(), block.titans.memory.w1.norm()
        assert 0.5 < fast / meta < 2
