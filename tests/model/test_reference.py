"""The fast path against the executable reference, which goes token by token and differentiates by autograd."""

import pytest
import torch
from model_toys import CONFIGS

from hopeprobe.model.reference import reference_losses

# The worst relative error seen over these configurations is 3e-14, in a gradient through 8 writes.
TOLERANCE = 1e-12


def test_losses_gradients_and_state(model, tokens):
    # Of most one row: that rows do not meet is `test_isolation.py`'s.
    tokens = tokens[: 2 if model.config in (CONFIGS["default"], CONFIGS["published"]) else 1]
    out = model(tokens)
    out.losses.sum().backward()
    fast = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    found = [reference_losses(model, row) for row in tokens]
    expected = torch.stack([losses for losses, _ in found])
    expected.sum().backward()
    assert (out.losses - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if fast[name] is None else fast[name]
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max().clamp_min(1e-9), name
    with torch.no_grad():
        state = model(tokens[:1]).state
    check_state(model, state, found[0][1])


def check_state(model, state, traces):
    for block, layer, trace in zip(model.blocks, state.layers, traces, strict=True):
        selfmod = block.selfmod
        groups = (selfmod.group_names, layer.selfmod.groups) if selfmod else ((), ())
        for names, group in zip(*groups, strict=True):
            if group is None:
                assert all(trace.fast[n][w] is trace.meta[n][w] for n in names for w in trace.meta[n])
                continue
            vectors = [n for n in names if n not in ("eta", "alpha")]
            for i, name in enumerate(names):
                full = group.w2[0, i]
                assert torch.allclose(full, trace.fast[name]["w2"], rtol=0, atol=1e-12), name
                j = i - len(vectors)
                w1 = group.w1[0, i] if j < 0 else group.w1_scalar[0, j][None]
                assert torch.allclose(w1, trace.fast[name]["w1"], rtol=0, atol=1e-12), name
        levels = block.cms.level_list() if block.cms else []
        for level, held, fast in zip(levels, layer.cms, trace.cms_fast, strict=True):
            assert torch.allclose(level.w_in + held.w_in[0], fast["w_in"], rtol=0, atol=1e-12)
            assert torch.allclose(level.w_out + held.w_out[0], fast["w_out"], rtol=0, atol=1e-12)


def test_something_was_written(toy, tokens):
    """Parity of two models that never write would be worth nothing."""
    _, traces = reference_losses(toy, tokens[0])
    for trace in traces:
        for name, fast in trace.fast.items():
            assert not torch.allclose(fast["w2"], trace.meta[name]["w2"], rtol=1e-4), name


@pytest.mark.parametrize("what", ["alpha", "eta", "gate"])
def test_a_planted_defect_is_caught(toy, tokens, what, monkeypatch):
    """Each mechanism is seen by the parity test: change it in the fast path alone, and the losses move."""
    hook = {"alpha": "blocks.0.selfmod.hook_alpha", "eta": "blocks.1.selfmod.hook_eta", "gate": "hook_gate"}[
        what
    ]
    factor = 0.0 if what == "gate" else 1 - 1e-6
    with torch.no_grad(), toy.hooks(fwd_hooks=[(hook, lambda t, hook: t * factor)]):
        losses = toy(tokens[:1]).losses[0]
    expected = reference_losses(toy, tokens[0])[0].detach()
    assert (losses - expected).abs().max() > TOLERANCE * expected.abs().max()
