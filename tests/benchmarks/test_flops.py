"""The operations that benchmarks count, against a count of the products that torch runs."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hopeprobe.hooks import HookRegistry
from hopeprobe.model.config import GateConfig, ModelConfig, preset, published
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.selfmod import SelfMod
from hopeprobe.model.titans import Titans

TICK = 64


@pytest.fixture
def flops(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("flops", None)
    return __import__("flops")


def in_place(into, left, right, **_):
    """Of left (b, n, k) times right (b, k, m), which torch does not count when it adds in place."""
    b, n, k = left
    return 2 * b * n * k * right[-1]


def counted(work):
    uncounted = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_a_layer_under_the_published_rule_takes_72_d_squared(flops):
    config = published(ModelConfig(vocab_size=37, dim=256, layers=1, heads=2))
    assert flops.layer(config) == 72 * 256**2


@pytest.mark.parametrize("rule", [published, lambda config: config])
def test_a_layer_runs_the_products_that_are_counted(flops, rule):
    config = rule(ModelConfig(vocab_size=37, dim=256, layers=1, heads=2))
    config = dataclasses.replace(config, chunk=TICK, chunk_memory=TICK)
    layer = SelfMod(config, HookRegistry(), "blocks.0.selfmod")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, TICK, 256)
    # Scalar memories' own rows, and the chunk's system, are left out of the count: 2 % and 1 %.
    assert counted(lambda: layer(x)) == pytest.approx(flops.layer(config) * x[..., 0].numel(), rel=0.05)


def test_a_titans_memory(flops):
    config = ModelConfig(
        variant="titans", titans_form="layer", vocab_size=37, dim=256, layers=1, heads=2, chunk_memory=8
    )
    layer = Titans(config, HookRegistry(), "blocks.0.titans")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, gate = torch.randn(2, 8, 256), torch.ones(2, 8)

    def work():
        state = layer.init_state(2)
        layer.write(state, layer.read(x, state, None, 0)[1], gate)

    assert counted(work) == pytest.approx(flops.titans_memory(256) * 16, rel=0.05)


def long_written(length):
    """A model, its state once its levels have been written until they are full matrices, and tokens to go on with."""
    config = dataclasses.replace(preset("tiny"), vocab_size=997)
    model = HopeModel(config)
    tokens = torch.randint(0, 997, (2, 513 + length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model(tokens[:, :513]).state
    return config, model, state, tokens[:, 513:]


def test_a_model_that_streams(flops):
    config, model, state, tokens = long_written(8)
    following = torch.zeros(2, dtype=torch.int64)
    assert counted(lambda: model.step(state, tokens, following)) == pytest.approx(
        flops.streaming(config) * tokens.numel(), rel=0.1
    )


def test_a_model_that_streams_with_its_gates_closed(flops):
    config = dataclasses.replace(preset("tiny"), vocab_size=997, gate=GateConfig("quantile", budget=0.1))
    _, _, state, tokens = long_written(8)
    model = HopeModel(config)
    state = state._replace(gate=model.init_state(2).gate)
    model.add_hook("hook_gate", lambda gate, _: torch.zeros_like(gate))
    following = torch.zeros(2, dtype=torch.int64)
    assert counted(lambda: model.step(state, tokens, following)) == pytest.approx(
        flops.streaming(config, share=0.0) * tokens.numel(), rel=0.1
    )


def test_a_training_step(flops):
    """Sixteen ticks: the last writes of a window, which no loss reads, need no gradient."""
    config, model, state, tokens = long_written(129)

    def step():
        with torch.enable_grad():
            model(tokens, state=state).losses.mean().backward()

    assert counted(step) == pytest.approx(flops.training(config) * 256, rel=0.1)
