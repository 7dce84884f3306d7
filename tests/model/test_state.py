"""States: every operation on rows reaches every tensor, and nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import average_rows, detach_state, map_state, select_rows

MODEL = HopeModel(CONFIGS["long-chunks"], seed=1, dtype=torch.float64)
TOKENS = torch.randint(0, 37, (3, 29), generator=torch.Generator().manual_seed(0))


def a_state():
    """Of three streams in the middle of everything: tokens pending, a chunk pending, gradients accumulated."""
    with torch.no_grad():
        return MODEL.feed(MODEL.init_state(3), TOKENS)[1]


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for part in state for t in tensors(part)] if isinstance(state, tuple) else []


STATE = a_state()


def test_the_state_has_everything_in_it():
    assert STATE.pending.shape == (3, 5)
    assert STATE.position == 24
    layer = STATE.layers[0]
    assert layer.selfmod.pending[0].k.shape == (3, 8, 8)
    assert layer.selfmod.pending[1].k.shape == (3, 24, 8)
    assert layer.cms[1].grad_delta.shape == (3, 24, 8)
    assert all(t.shape[0] == 3 for t in tensors(STATE))
    assert len(tensors(STATE)) == 2 * (2 * 4 + 2 * 4 + 1 + 2 * 6) + 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_selecting_rows(rows):
    for mine, theirs in zip(tensors(select_rows(STATE, rows)), tensors(STATE), strict=True):
        assert torch.equal(mine, theirs[rows])
    assert select_rows(STATE, rows).position == STATE.position


def test_a_swapped_stream_goes_on_as_the_other():
    rest = TOKENS[[2, 0, 1]] * 0 + 3
    with torch.no_grad():
        plain, _ = MODEL.feed(STATE, rest)
        swapped, _ = MODEL.feed(select_rows(STATE, torch.tensor([2, 0, 1])), rest)
    assert torch.allclose(swapped, plain[[2, 0, 1]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(swapped, plain)


def test_averaging_rows():
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0]])
    averaged = average_rows(STATE, weights)
    for mine, theirs in zip(tensors(averaged), tensors(STATE), strict=True):
        if not theirs.is_floating_point():
            assert torch.equal(mine, theirs)
            continue
        assert torch.allclose(mine[0], (theirs[0] + theirs[1]) / 2, rtol=1e-14)
        assert torch.allclose(mine[1], 0.25 * theirs[1] + 0.75 * theirs[2], rtol=1e-14)
        assert torch.equal(mine[2], theirs[2])
    assert not torch.equal(averaged.layers[0].cms[0].w_in, STATE.layers[0].cms[0].w_in)


def test_mapping_keeps_the_shape_of_the_state():
    doubled = map_state(torch.add, STATE, STATE)
    assert type(doubled) is type(STATE)
    assert type(doubled.layers[0].selfmod.pending[0]) is type(STATE.layers[0].selfmod.pending[0])
    assert doubled.position == STATE.position
    assert doubled.layers[0].attention is None
    for mine, theirs in zip(tensors(doubled), tensors(STATE), strict=True):
        assert torch.equal(mine, 2 * theirs)


def test_detaching_cuts_every_tensor():
    state = MODEL(TOKENS[:, :25]).state
    assert any(t.requires_grad for t in tensors(state))
    cut = detach_state(state)
    assert not any(t.requires_grad for t in tensors(cut))
    assert all(torch.equal(a, b) for a, b in zip(tensors(cut), tensors(state), strict=True))
