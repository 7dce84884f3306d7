"""Our self-modifying layer under `published()` is the package's, given the same weights."""

import pytest

pytestmark = pytest.mark.peers

NAMES = {"w1": "w1", "w2": "w2", "skip": "w_skip"}


def layers(dim, chunk, chunk_memory, seed):
    """Both layers in float64, with the same weights, larger than initial ones so that nothing is near zero."""
    import torch
    from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig

    from hopeprobe.hooks import HookRegistry
    from hopeprobe.model.config import ModelConfig, published
    from hopeprobe.model.selfmod import SelfMod

    torch.manual_seed(seed)
    settings = SelfModifyingTitansConfig(
        dim=dim, eta_scale=1e-3, chunk_size_other=chunk, chunk_size_memory=chunk_memory
    )
    theirs = SelfModifyingTitans(settings).double()
    config = published(ModelConfig(vocab_size=37, dim=dim, layers=1, heads=2))
    assert (config.chunk, config.chunk_memory) == (8, 64)
    ours = SelfMod(config, HookRegistry(), "blocks.0.selfmod").double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
        for name, memory in ours.memories.items():
            module = getattr(theirs, f"m_{name}")
            for mine, other in NAMES.items():
                if getattr(memory, mine) is not None:
                    getattr(memory, mine).copy_(getattr(module, other).weight)
        ours.w_q.copy_(theirs.w_q.weight)
        ours.conv.copy_(theirs.local_conv.weight[:, 0])
    return ours, theirs


def stream(ours, x):
    """Read and write in ticks of 8: the outputs, and the fast weights by memory."""
    import torch

    weights, state, outputs = ours.stacked(), ours.init_state(len(x)), []
    for at in range(0, x.shape[1], 8):
        out, made = ours.read(x[:, at : at + 8], weights, state)
        outputs.append(out)
        state = ours.write(weights, state, made, torch.ones(len(x), 8, dtype=x.dtype))
    fast = {}
    for names, now in zip(ours.group_names, state.groups, strict=True):
        vectors = now.w1.shape[1]
        for i, name in enumerate(names):
            w1 = now.w1[:, i] if i < vectors else now.w1_scalar[:, i - vectors, None]
            fast[name] = {"w2": now.w2[:, i], "w1": w1}
            if i >= vectors:
                fast[name]["skip"] = now.skip[:, i - vectors, None]
    return torch.cat(outputs, dim=1), fast


@pytest.mark.parametrize("length", [8, 64, 128])
def test_outputs_and_fast_weights_are_theirs(length):
    import torch

    ours, theirs = layers(16, 8, 64, seed=length)
    x = torch.randn(3, length, 16, dtype=torch.float64)
    with torch.no_grad():
        out, fast = stream(ours, x)
        expected, state = theirs.forward_with_updates(x, theirs.init_fast_state())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert set(fast) == {"k", "v", "eta", "alpha", "memory"}
    for name, weights in fast.items():
        # Theirs writes what is pending when a call ends; ours keeps it for the chunk to be complete.
        pending = name == "memory" and length < 64
        for mine, tensor in weights.items():
            after = getattr(getattr(state, name), NAMES[mine])
            wanted = getattr(theirs.m_memory, NAMES[mine]).weight.expand_as(after) if pending else after
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-10, msg=f"{name}.{mine}")
    # After 8 tokens weights are far from zero and from their start, so that agreeing on them says something.
    if length == 8:
        k, start = fast["k"]["w2"], theirs.m_k.w2.weight.detach()
        assert 1e-4 < float(k.norm(dim=(1, 2)).mean() / start.norm()) < 0.1


def test_another_chunk_is_seen():
    """The comparison fails where the rule differs in one number."""
    import torch

    ours, theirs = layers(16, 8, 32, seed=0)
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    with torch.no_grad():
        out, _ = stream(ours, x)
        expected, _ = theirs.forward_with_updates(x, theirs.init_fast_state())
    torch.testing.assert_close(out[:, :32], expected[:, :32], rtol=0, atol=1e-10)
    assert float((out - expected)[:, 32:].abs().max()) > 1e-3
