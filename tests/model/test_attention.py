"""Attention against a loop over positions in NumPy that shares no code with it, and its cache against one pass."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import TOY

from hopeprobe.model.attention import MLP, Attention, rotate
from hopeprobe.model.init import initialise

CONFIG = dataclasses.replace(TOY, variant="transformer", context=12)


def made(kind):
    part = kind(CONFIG).double()
    initialise(part, CONFIG, 4)
    return part


ATTENTION = made(lambda config: Attention(config, config.context))


def turned(vector, position):
    """One head's vector as complex pairs (i, i + e/2), each turned by position * 10000^(-2i/e)."""
    half = len(vector) // 2
    pairs = (vector[:half] + 1j * vector[half:]) * np.exp(
        1j * position * 10000.0 ** (-np.arange(half) / half)
    )
    return np.concatenate([pairs.real, pairs.imag])


def loop(x, start, context):
    """Softmax attention of one sequence (n, d) whose first token stands at `start`."""
    w_qkv, w_out = (w.detach().numpy() for w in (ATTENTION.w_qkv, ATTENTION.w_out))
    d, heads = CONFIG.dim, CONFIG.heads
    e, out = d // heads, []
    qkv = [(w_qkv @ row).reshape(3, heads, e) for row in x]
    for t in range(len(x)):
        mixed = []
        for h in range(heads):
            seen = range(max(0, t - context + 1), t + 1)
            q = turned(qkv[t][0, h], start + t)
            scores = np.array([q @ turned(qkv[s][1, h], start + s) for s in seen]) / np.sqrt(e)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(w * qkv[s][2, h] for w, s in zip(weights, seen, strict=True)))
        out.append(w_out @ np.concatenate(mixed))
    return np.array(out)


def read(x, cuts=()):
    """The same in pieces that end at `cuts`, through the cache."""
    state, out = ATTENTION.init_state(x.shape[0]), []
    with torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
            piece, state = ATTENTION.read(x[:, start:stop], state, start)
            out.append(piece)
    return torch.cat(out, 1), state


def inputs(n, seed=0):
    return torch.randn(2, n, CONFIG.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 12])
def test_one_pass_equals_the_loop(n):
    x = inputs(n)
    got, _ = read(x)
    for row, expected in zip(got, x, strict=True):
        assert np.allclose(row.numpy(), loop(expected.numpy(), 0, CONFIG.context), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=4, unique=True).map(sorted), st.integers(0, 99))
def test_streaming_equals_one_pass(cuts, seed):
    x = inputs(12, seed)
    assert torch.allclose(read(x, cuts)[0], read(x)[0], rtol=0, atol=1e-13)


def test_beyond_the_context_the_oldest_are_forgotten():
    x = inputs(30)
    got, state = read(x, range(1, 30))
    assert state.k.shape == (2, CONFIG.heads, CONFIG.context, CONFIG.dim // CONFIG.heads)
    assert np.allclose(got[0].numpy(), loop(x[0].numpy(), 0, CONFIG.context), rtol=0, atol=1e-12)
    assert not np.allclose(got[0].numpy(), loop(x[0].numpy(), 0, 99), atol=1e-6)


def test_a_later_token_changes_nothing_before_it():
    x = inputs(12)
    changed = x.clone()
    changed[:, 7] += 1
    before, after = read(x)[0], read(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_only_distances_count_in_a_rotation(position, shift):
    q, k = (inputs(1, s)[:, None] for s in (1, 2))
    near = (rotate(q, position + 3) * rotate(k, position)).sum()
    far = (rotate(q, position + shift + 3) * rotate(k, position + shift)).sum()
    assert torch.isclose(near, far, rtol=1e-10, atol=1e-10)
    assert torch.allclose(rotate(q, position).norm(dim=-1), q.norm(dim=-1))


def test_position_matters_and_the_reference_would_see_it():
    x = inputs(5)
    assert np.allclose(loop(x[0].numpy(), 0, 12), loop(x[0].numpy(), 17, 12), rtol=0, atol=1e-12)
    q = inputs(1)[:, None]
    assert torch.equal(rotate(q, 0), q)
    assert not torch.allclose(rotate(q, 1), q)


def test_the_mlp():
    mlp = made(MLP)
    x = inputs(3)
    w_in, b_in, w_out, b_out = (p.detach().numpy() for p in (mlp.w_in, mlp.b_in, mlp.w_out, mlp.b_out))
    z = x.numpy() @ w_in.T + b_in
    from scipy.special import erf

    expected = (z * 0.5 * (1 + erf(z / np.sqrt(2)))) @ w_out.T + b_out
    assert np.allclose(mlp(x).detach().numpy(), expected, rtol=0, atol=1e-13)
