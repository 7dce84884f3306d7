"""What training watches: means and norms against NumPy, and freezing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from model_toys import CONFIGS, TOY

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import WRITE_GATES, Watch, close, freeze_hooks, norm_ratio

TOKENS = torch.randint(0, 37, (3, 65), generator=torch.Generator().manual_seed(0))
TRANSFORMER = HopeModel(dataclasses.replace(TOY, variant="transformer"), seed=1)


@pytest.mark.parametrize("name", ["default", "selective-gate"])
def test_the_means_of_a_watch(name):
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    watch = Watch(model)
    with torch.no_grad():
        with watch.on():
            model(TOKENS)
        _, cache = model.run_with_cache(TOKENS, names_filter=["hook_gate", "*.hook_alpha"])
    assert math.isclose(watch.mean("gate"), cache["hook_gate"].numpy().mean(), rel_tol=1e-12)
    alphas = np.stack([cache[f"blocks.{i}.selfmod.hook_alpha"].numpy() for i in range(2)])
    assert math.isclose(watch.mean("alpha"), alphas.mean(), rel_tol=1e-12)
    if name == "selective-gate":
        assert 0.05 < watch.mean("gate") < 0.95
    assert not any(p.active for p in model.hook_dict.values())


def test_a_second_watch_forgets_the_first(toy):
    watch = Watch(toy)
    with torch.no_grad():
        with watch.on(), toy.hooks(fwd_hooks=[("*.hook_alpha", lambda a, hook: 0 * a)]):
            toy(TOKENS)
        with watch.on():
            toy(TOKENS)
    assert len(watch.sums["gate"]) == 8
    assert len(watch.sums["alpha"]) == 16


def test_a_watch_keeps_no_graph(toy):
    watch = Watch(toy)
    with watch.on():
        toy(TOKENS)
    assert not any(t.requires_grad for part in watch.sums.values() for t in part)


def test_a_model_without_writes_has_nothing_to_watch():
    watch = Watch(TRANSFORMER)
    with torch.no_grad(), watch.on():
        out = TRANSFORMER(TOKENS)
    assert math.isnan(watch.mean("gate"))
    assert math.isnan(watch.mean("alpha"))
    assert math.isnan(norm_ratio(TRANSFORMER, out.state))
    assert freeze_hooks(TRANSFORMER) == []


@pytest.mark.parametrize("name", ["default", "long-chunks", "static-query", "published"])
def test_the_norm_ratio(name):
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    with torch.no_grad():
        out, cache = model.run_with_cache(TOKENS, names_filter="*.selfmod.*.hook_fast_*")
    ratios = []
    for i in range(2):
        fast, meta = np.zeros(3), 0.0
        for memory, module in model.blocks[i].selfmod.memories.items():
            for weight, parameter in module.named_parameters():
                last = cache[f"blocks.{i}.selfmod.{memory}.hook_fast_{weight}"][:, -1].numpy()
                fast += (last**2).reshape(3, -1).sum(1)
                meta += (parameter.detach().numpy() ** 2).sum()
        ratios.append(np.sqrt(fast / meta).mean())
    assert math.isclose(norm_ratio(model, out.state), np.mean(ratios), rel_tol=1e-10)
    assert math.isclose(norm_ratio(model, model.init_state(2)), 1.0, rel_tol=1e-12)


def test_freezing_stops_every_write(toy):
    assert freeze_hooks(toy) == [(WRITE_GATES, close)]
    with torch.no_grad():
        frozen = toy.run_with_hooks(TOKENS, fwd_hooks=freeze_hooks(toy))
        fresh = toy(TOKENS[:, :9])
    assert norm_ratio(toy, frozen.state) == 1.0
    assert all(not lv.w_in.any() and not lv.w_out.any() for layer in frozen.state.layers for lv in layer.cms)
    assert torch.equal(frozen.losses[:, :8], fresh.losses)  # before anything could be written
    with torch.no_grad():
        assert not torch.allclose(frozen.losses, toy(TOKENS).losses)


def test_freezing_reaches_every_gate(toy):
    gates = [n for n in toy.hook_dict if n.endswith("hook_write_gate")]
    with torch.no_grad(), toy.hooks(fwd_hooks=freeze_hooks(toy)) as handle:
        toy(TOKENS)
    assert sorted(handle.fired) == sorted(gates)
    assert len(gates) == 2 * 3
