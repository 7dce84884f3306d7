"""What memories answer, against NumPy memory by memory, and weights that are never written."""

import numpy as np
import torch
from model_toys import TOY
from scipy.special import erf

from hopeprobe.model.config import MEMORIES
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.memories import answer, attached, l2norm, read_group, repeated


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def test_a_group_answers_as_its_memories_do():
    selfmod = HopeModel(TOY, seed=1, dtype=torch.float64).blocks[0].selfmod
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (meta,) = selfmod.stacked()
    with torch.no_grad():
        found = read_group(x, repeated(meta, 3))
    for i, name in enumerate(MEMORIES):
        memory = selfmod.memories[name]
        w1, w2 = (w.detach().numpy() for w in (memory.w1, memory.w2))
        hidden = gelu(x.numpy() @ w2.T)
        np.testing.assert_allclose(found.hidden[:, :, i], hidden, atol=1e-14)
        if memory.skip is None:
            np.testing.assert_allclose(found.vector[:, i], x.numpy() + hidden @ w1.T, atol=1e-14)
            still = repeated(meta, 3)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    alone = answer(x, still.w2, still.w1, i).detach()
                np.testing.assert_allclose(alone, found.vector[:, i], atol=1e-14)
        else:
            expected = x.numpy() @ memory.skip.detach().numpy().T + hidden @ w1.T
            np.testing.assert_allclose(found.scalar[..., i - 4], expected[..., 0], atol=1e-14)


def test_weights_that_are_never_written_are_those_of_a_fresh_state_without_a_copy():
    model = HopeModel(TOY, seed=1)
    selfmod = model.blocks[0].selfmod
    for meta, group in zip(selfmod.stacked(), selfmod.init_state(4).groups, strict=True):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                still = repeated(meta, 4)
            assert all(torch.equal(a, b) for a, b in zip(still, group, strict=True))
            assert all(t.requires_grad == gradients for t in still)
            assert still.w2.data_ptr() == meta.w2.data_ptr()
            assert still.w1.data_ptr() == meta.w1.data_ptr()


def test_a_state_outside_the_graph_is_meta_weights_plus_a_constant():
    selfmod = HopeModel(TOY, seed=1, dtype=torch.float64).blocks[0].selfmod
    (meta,), (held,) = selfmod.stacked(), selfmod.init_state(2).groups
    moved = type(held)(*(t + 1.5 for t in held))
    found = attached(meta, moved)
    assert all(torch.equal(a, b) for a, b in zip(found, moved, strict=True))
    found.w2.sum().backward()
    assert (selfmod.memories["k"].w2.grad == 2.0).all()  # once a row
    again = attached(meta, type(held)(*found))
    assert all(a is b for a, b in zip(again, found, strict=True))
    with torch.no_grad():
        still = type(meta)(*(w.detach() for w in meta))
    assert all(a is b for a, b in zip(attached(still, moved), moved, strict=True))


def test_l2norm_of_nothing_is_nothing():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(l2norm(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
