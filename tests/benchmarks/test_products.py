"""The products of a work, made again: all of them, and nothing else."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def products_of(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("products", None)
    return __import__("products").products_of


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_step_s_products_are_made_again_forward_and_backward(products_of):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x = torch.randn(3, 8)

    def step():
        model.zero_grad()
        model(x).square().sum().backward()

    again = products_of(step)
    before = [p.detach().clone() for p in model.parameters()]
    assert counted(again) == counted(step) == 2 * 3 * (2 * 8 * 16 + 3 * 16 * 4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "its own buffers"


def test_views_and_products_in_place_have_their_places(products_of):
    w, x = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    seen = []

    def work():
        w[:, 1:4].baddbmm_(x.mT[:, :3], x)
        seen.append(w @ x.mT)

    again = products_of(work)
    kept = w.clone()
    again()
    assert torch.equal(w, kept)
    assert len(seen) == 1, "only its products"


def test_products_of_several_formats_are_refused(products_of):
    def work():
        return torch.ones(2, 2) @ torch.ones(2, 2), torch.ones(2, 2).double() @ torch.ones(2, 2).double()

    with pytest.raises(ValueError, match="one number format"):
        products_of(work)
