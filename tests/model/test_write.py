"""The closed-form chunk against a per-token loop in NumPy that shares no code with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from hopeprobe.model.write import errors, gelu_backward, prepare


def loop(w, meta, k, eta, alpha, push):
    """W_t = W' + alpha (W_{t-1} - W') - eta (W_{t-1} k) k^T - eta U_t k^T, one token at a time, float64."""
    for t in range(len(k)):
        w = (
            meta
            + alpha[t] * (w - meta)
            - eta[t] * np.outer(w @ k[t], k[t])
            - eta[t] * np.outer(push[t], k[t])
        )
    return w


def closed(w, meta, k, eta, alpha, push, towards_meta):
    k, eta, push = torch.tensor(k)[None], torch.tensor(eta)[None], torch.tensor(push)[None]
    chunk = prepare(k, eta, torch.tensor(alpha)[None].log())
    w, meta = torch.tensor(w)[None], torch.tensor(meta)[None]
    found = errors(chunk, push, k @ w.mT, k @ meta.mT if towards_meta else None)
    moving = w - meta if towards_meta else w
    new = chunk.end[:, None, None] * moving - found.mT @ chunk.keys
    return (new + meta if towards_meta else new)[0].numpy()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.3, 0.9, 0.9975, 1.0]),
    st.floats(0.0, 1.5),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_chunk_equals_the_loop(n, d, least_alpha, top_eta, towards_meta, seed):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(n, d))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    eta = rng.uniform(0, top_eta, n)
    alpha = rng.uniform(max(least_alpha, 1e-3), 1.0, n)
    push, w, meta = rng.normal(size=(n, 5)), rng.normal(size=(5, d)), rng.normal(size=(5, d))
    expected = loop(w, meta if towards_meta else 0 * meta, k, eta, alpha, push)
    got = closed(w, meta, k, eta, alpha, push, towards_meta)
    assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)


def test_a_closed_gate_is_exactly_nothing():
    rng = np.random.default_rng(0)
    k, push, w, meta = (rng.normal(size=s) for s in ((8, 4), (8, 5), (5, 4), (5, 4)))
    got = closed(w, meta, k, np.zeros(8), np.ones(8), push, towards_meta=False)
    assert (got == w).all()


def test_a_strong_decay_over_a_long_chunk_stays_finite():
    """0.01^512 underflows: only differences of log gamma may be exponentiated."""
    k = torch.nn.functional.normalize(torch.randn(1, 512, 4, dtype=torch.float64), dim=-1)
    eta, log_alpha = (
        torch.full((1, 512), 0.5, dtype=torch.float64),
        torch.full((1, 512), -4.6, dtype=torch.float64),
    )
    chunk = prepare(k, eta, log_alpha)
    found = errors(chunk, torch.ones(1, 512, 3).double(), torch.ones(1, 512, 3).double(), None)
    assert found.isfinite().all()
    assert chunk.keys.isfinite().all()
    assert (chunk.to_end <= 1).all()


def test_gradients_of_the_closed_form():
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 5, 3, dtype=torch.float64), dim=-1).requires_grad_()
    eta = torch.rand(1, 5, dtype=torch.float64).requires_grad_()
    log_alpha = (-torch.rand(1, 5, dtype=torch.float64)).requires_grad_()
    push = torch.randn(1, 5, 2, dtype=torch.float64).requires_grad_()

    def write(k, eta, log_alpha, push):
        chunk = prepare(k, eta, log_alpha)
        return errors(chunk, push, k[..., :2], None).mT @ chunk.keys

    assert torch.autograd.gradcheck(write, (k, eta, log_alpha, push))


def test_the_gradient_of_gelu_and_its_own():
    z = torch.linspace(-6, 6, 201, dtype=torch.float64, requires_grad=True)
    grad = torch.linspace(-1, 2, 201, dtype=torch.float64, requires_grad=True)
    at = z.detach().numpy()
    density = np.exp(-0.5 * at**2) / np.sqrt(2 * np.pi)
    expected = grad.detach().numpy() * (ndtr(at) + at * density)
    assert np.allclose(gelu_backward(grad, z).detach(), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(gelu_backward, (grad[::20], z[::20]))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_single_precision_keeps_its_digits(dtype):
    rng = np.random.default_rng(3)
    k = rng.normal(size=(64, 16))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    eta, alpha = rng.uniform(0, 0.1, 64), rng.uniform(0.99, 1, 64)
    push, w = rng.normal(size=(64, 16)), rng.normal(size=(16, 16))
    expected = loop(w, 0 * w, k, eta, alpha, push)
    single = [torch.tensor(x, dtype=dtype)[None] for x in (k, eta, alpha, push, w)]
    chunk = prepare(single[0], single[1], single[2].log())
    found = errors(chunk, single[3], single[0] @ single[4].mT, None)
    got = chunk.end[:, None, None] * single[4] - found.mT @ chunk.keys
    assert np.linalg.norm(got[0].numpy() - expected) <= 2e-6 * np.linalg.norm(expected)
