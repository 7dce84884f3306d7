"""States: every operation on rows reaches every tensor, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import Change, average_rows, detach_state, map_state, select_rows

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
    assert [ticks.k.shape for ticks in layer.selfmod.pending[0]] == [(3, 8, 8)]
    assert [ticks.k.shape for ticks in layer.selfmod.pending[1]] == 3 * [(3, 8, 8)]
    assert layer.cms[1].grad_delta.shape == (3, 24, 8)
    assert all(t.shape[0] == 3 for t in tensors(STATE))
    assert len(tensors(STATE)) == 2 * (2 * 4 + (1 + 3) * 4 + 1 + 2 * (2 * 3 + 4)) + 1


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
    theirs = STATE.layers[0].cms[0].w_in
    mine = average_rows(theirs, weights)
    assert torch.allclose(mine[0], (theirs[0] + theirs[1]) / 2, rtol=1e-14)
    assert torch.allclose(mine[1], 0.25 * theirs[1] + 0.75 * theirs[2], rtol=1e-14)
    assert torch.equal(mine[2], theirs[2])
    assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("donated", [False, True])
def test_a_change_is_the_sum_of_what_was_added_whichever_way_it_is_kept(donated):
    torch.manual_seed(0)
    rows, columns = 12, 4  # a matrix of 48 numbers: products of up to 3 tokens are kept as factors
    change, total = (
        Change.nothing(torch.zeros(rows, columns, dtype=torch.float64), 2),
        torch.zeros(2, rows, columns),
    )
    x = torch.randn(2, 5, columns, dtype=torch.float64)
    assert change.times(x) is None
    assert change.matrix().shape == (2, rows, columns)
    kept = []
    for n in (1, 2, 1, 3):
        left = torch.randn(2, n, rows, dtype=torch.float64)
        right = torch.randn(2, n, columns, dtype=torch.float64)
        total = total + torch.einsum("bto,bti->boi", left, right)
        change = change.plus(left, right, donated)
        assert torch.allclose(change.matrix(), total, rtol=1e-13, atol=1e-13)
        assert torch.allclose(change.times(x), torch.einsum("boi,bni->bno", total, x), rtol=1e-12, atol=1e-12)
        kept.append("dense" if change.dense.shape[1] else "factors")
    assert kept == ["factors", "factors", "dense", "dense"]
    assert torch.equal(Change.of(total).matrix(), total)


def test_mapping_keeps_the_shape_of_the_state():
    doubled = map_state(torch.add, STATE, STATE)
    assert type(doubled) is type(STATE)
    assert type(doubled.layers[0].selfmod.pending[0][0]) is type(STATE.layers[0].selfmod.pending[0][0])
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
