"""A layer on its own: the numbers of a loop that reads and writes tick by tick, and what hooks see of it."""

import dataclasses

import pytest
import torch
from model_toys import CONFIGS, TOY

from hopeprobe.hooks import HookRegistry
from hopeprobe.model import alone
from hopeprobe.model.selfmod import SelfMod

LAYERS = {
    "default": TOY,
    "published": CONFIGS["published"],
    "memory-waits": dataclasses.replace(TOY, chunk=8, chunk_memory=32),
    "published-memory-waits": dataclasses.replace(CONFIGS["published"], chunk=8, chunk_memory=32),
    "static-memory-waits": dataclasses.replace(CONFIGS["static-query"], chunk=8, chunk_memory=24),
    "others-wait": dataclasses.replace(TOY, chunk=16, chunk_memory=8),
    "only-memory": dataclasses.replace(TOY, variant="no-self-mod"),
    "frozen": dataclasses.replace(TOY, variant="frozen-memory"),
}


def made(name):
    torch.manual_seed(0)
    layer = SelfMod(LAYERS[name], HookRegistry(), "blocks.0.selfmod").double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def by_tick(layer, x):
    """What a model does: a tick is read, then written; the rest that is no tick is read."""
    ticks = [chunk for chunk in layer.group_chunks if chunk is not None]
    tick = min(ticks) if ticks else x.shape[1]
    weights, state, outputs = layer.stacked(), layer.init_state(len(x)), []
    for part in x.split(tick, 1):
        out, left = layer.read(part, weights, state)
        outputs.append(out)
        if part.shape[1] == tick:
            state = layer.write(weights, state, left, part.new_ones(part.shape[:2]))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [1, 8, 52, 96])
def test_a_layer_alone_is_a_loop_over_ticks(name, length):
    layer, x = made(name), torch.randn(3, length, TOY.dim, dtype=torch.float64)
    with torch.no_grad():
        expected = by_tick(layer, x)
        assert not torch.allclose(expected, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["default", "published-memory-waits"])
def test_so_is_its_gradient(name):
    layer, x = made(name), torch.randn(2, 40, TOY.dim, dtype=torch.float64)
    found = []
    for run in (layer, lambda x: by_tick(layer, x)):
        layer.zero_grad()
        run(x).square().sum().backward()
        found.append({n: p.grad for n, p in layer.named_parameters()})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found[1].values())
    for n, grad in found[1].items():
        torch.testing.assert_close(found[0][n], grad, rtol=1e-9, atol=1e-9, msg=n)


@pytest.mark.parametrize("name", LAYERS)
def test_whoever_watches_sees_what_a_model_would_show(name, monkeypatch):
    monkeypatch.setattr(alone, "TOKENS_AT_ONCE", 8)  # rows one after another, but not before somebody's eyes
    layer, x = made(name), torch.randn(3, 76, TOY.dim, dtype=torch.float64)

    def seen(run):
        shown = []
        handles = [p.add_hook(lambda t, hook: shown.append((hook.name, t.clone()))) for p in layer.points]
        with torch.no_grad():
            run(x)
        for handle in handles:
            handle.remove()
        return shown

    mine, theirs = seen(layer), seen(lambda x: by_tick(layer, x))
    assert {n for n, _ in theirs} == {point.name for point in layer.points}
    assert [n for n, _ in mine] == [n for n, _ in theirs]
    for (n, a), (_, b) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=n)


def test_rows_that_take_turns_are_those_that_do_not(monkeypatch):
    layer, x = made("published-memory-waits"), torch.randn(5, 40, TOY.dim, dtype=torch.float64)
    with torch.no_grad():
        together = layer(x)
        monkeypatch.setattr(alone, "TOKENS_AT_ONCE", 16)
        torch.testing.assert_close(layer(x), together, rtol=1e-12, atol=1e-12)
        assert layer(x[:0]).shape == (0, 40, TOY.dim)
        assert layer(x[:, :0]).shape == (5, 0, TOY.dim)
