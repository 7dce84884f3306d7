"""Losses and both their gradients against PyTorch's own cross-entropy, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hopeprobe.model import loss as module
from hopeprobe.model.loss import NO_TARGET, differentiable, score

V, D = 53, 7


def drawn(n, seed=0, missing=()):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g, dtype=torch.float64) * 2
    table = torch.randn(V, D, generator=g, dtype=torch.float64)
    target = torch.randint(0, V, (n,), generator=g)
    target[list(missing)] = NO_TARGET
    return hidden.requires_grad_(), table.requires_grad_(), target, torch.randn(n, generator=g).double()


def expected_of(hidden, table, target, upstream):
    losses = F.cross_entropy(hidden @ table.mT, target, reduction="none", ignore_index=NO_TARGET)
    own = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)[0]
    return losses.detach(), own, *torch.autograd.grad((losses * upstream).sum(), (hidden, table))


def got_of(hidden, table, target, upstream, keep):
    kept = [] if keep else None
    losses, own = score(hidden.detach(), table, target, kept)
    assert not losses.requires_grad
    assert not own.requires_grad
    out = differentiable(hidden, table, losses, own, target, kept or [])
    return out.detach(), own, *torch.autograd.grad((out * upstream).sum(), (hidden, table))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([1, V - 1, V, 3 * V, 7 * V, 2**24]),
    st.data(),
)
def test_against_torch_across_blocks_of_rows(n, seed, keep, elements, data):
    missing = data.draw(st.sets(st.integers(0, n - 1)))
    inputs = drawn(n, seed, missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ELEMENTS", elements)
        patch.setattr(
            module, "_CACHED_ELEMENTS", data.draw(st.sampled_from([1, 3 * n, 10 * n, V * n, 2**18]))
        )
        patch.setattr(module, "_CACHED_ROWS", data.draw(st.sampled_from([1, 3, 512])))
        got = got_of(*inputs, keep)
    for mine, theirs in zip(got, expected_of(*inputs), strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))
    assert not got[0][list(missing)].any()
    assert not got[1][list(missing)].any()


def test_blocks_are_what_the_patch_makes_them(monkeypatch):
    """Else the test above would cross no boundary."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 3 * V)
    kept = []
    score(*(t.detach() for t in drawn(8)[:3]), kept)
    assert len(kept) == 3


def test_several_scores_make_one_backward(monkeypatch):
    """As a window does it: scored tick after tick, differentiated once."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * V)
    hidden, table, target, upstream = drawn(15, missing=(4, 5, 14))
    kept = []
    parts = [score(hidden[a : a + 5].detach(), table, target[a : a + 5], kept) for a in (0, 5, 10)]
    losses, own = (torch.cat(p) for p in zip(*parts, strict=True))
    out = differentiable(hidden, table, losses, own, target, kept)
    got = torch.autograd.grad((out * upstream).sum(), (hidden, table))
    for mine, theirs in zip(got, expected_of(hidden, table, target, upstream)[2:], strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_large_logits_do_not_overflow():
    hidden, table, target, upstream = drawn(6)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    got, expected = (
        got_of(hidden, table, target, upstream, True),
        expected_of(hidden, table, target, upstream),
    )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.isfinite().all()
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    hidden, table, target, _ = drawn(4)
    losses, own = score(hidden.detach(), table, target)
    (grad,) = torch.autograd.grad(
        differentiable(hidden, table.detach(), losses, own, target, []).sum(), hidden
    )
    assert torch.equal(grad, own)
    differentiable(hidden.detach(), table, losses, own, target, []).sum().backward()
    assert hidden.grad is None
    assert table.grad.any()


def test_the_gradient_cannot_be_differentiated_again():
    """First derivatives only: better an error than a second derivative that is silently zero."""
    hidden, table, target, _ = drawn(4)
    losses, own = score(hidden.detach(), table, target)
    out = differentiable(hidden, table, losses, own, target, [])
    (grad,) = torch.autograd.grad((out**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_non_finite_input_gives_a_non_finite_loss():
    hidden, table, target, _ = drawn(4)
    spoiled = hidden.detach().clone()
    spoiled[2, 0] = float("nan")
    losses, own = score(spoiled, table, target)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert own.isnan().any(1).tolist() == [False, False, True, False]
