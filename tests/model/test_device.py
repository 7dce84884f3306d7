"""On a device the host never waits inside a step: on torch's `meta` device, where no value exists to be looked at."""

import pytest
import torch
from model_toys import CONFIGS

from hopeprobe.model.hope import HopeModel


def on_meta(name):
    with torch.device("meta"):
        return HopeModel(CONFIGS[name], seed=None, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_looks_at_no_value(name):
    model = on_meta(name)
    tokens = torch.empty(2, 33, dtype=torch.int64, device="meta")
    out = model(tokens)
    assert out.losses.shape == (2, 32)
    out.losses.mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    here = HopeModel(CONFIGS[name], seed=1)
    here(torch.randint(0, 37, (2, 33))).losses.mean().backward()
    assert reached >= {n for n, p in here.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["default", "titans-window", "long-chunks"])
def test_nor_does_streaming(name):
    model = on_meta(name)
    with torch.no_grad():
        state = model.init_state(2)
        losses, state = model.feed(state, torch.empty(2, 41, dtype=torch.int64, device="meta"))
        assert losses.shape == (2, 40 // model.config.tick * model.config.tick)
        assert model.finalize(state).device.type == "meta"


def test_a_look_would_be_seen():
    model = on_meta("default")
    with pytest.raises(RuntimeError, match="meta"), torch.no_grad():
        model.run_with_hooks(
            torch.empty(2, 17, dtype=torch.int64, device="meta"),
            fwd_hooks=[("hook_gate", lambda gate, hook: gate * float(gate.any()))],
        )
