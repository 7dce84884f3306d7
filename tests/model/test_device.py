"""On a device the host never waits inside a step, and values are a CPU's: on a device that only says it is one."""

import dataclasses

import pytest
import torch
from model_toys import CONFIGS, TOY
from pretend import DEVICE, here, looks

from hopeprobe.model.config import GateConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.state import map_state

GATES = {
    "ranked": GateConfig("quantile", 0.5),
    "by-assoc": GateConfig("assoc", 0.5),
    "by-excess": GateConfig("excess", 0.25),
    "straight-through": GateConfig("zscore", 0.5, straight_through=True),
    "at-random": GateConfig("random", 0.2),
    "by-entropy": GateConfig("entropy-gap", 0.5),
}
ALL = CONFIGS | {name: dataclasses.replace(TOY, gate=gate) for name, gate in GATES.items()}
# Between them every path of the model; the rest is tested in the slow part.
FEW = ("default", "long-chunks", "titans-window", "by-excess", "transformer")
TOKENS = torch.randint(0, 37, (2, 34), generator=torch.Generator().manual_seed(0))
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in ALL]
)


def pair(name, seed=1, activations=None):
    """The same model on the CPU and on the device."""
    found = []
    for where in (torch.device("cpu"), DEVICE):
        model = HopeModel(ALL[name], seed=seed)
        if model.unigram is not None:
            model.set_frequencies(torch.linspace(2.0, 5.0, 37))
        model.activations = activations
        found.append(model.to(where))
    return found


def near(one, other, within=1e-5):
    assert torch.allclose(here(other), one.detach(), rtol=within, atol=within), (
        (here(other) - one).abs().max()
    )


@each
def test_a_training_step_is_the_cpus_and_looks_at_no_value(name):
    model, there = pair(name)
    model(TOKENS[:, :18]).losses.mean().backward()
    inputs = TOKENS[:, :18].to(DEVICE)
    there.check_tokens(inputs)
    there._prepared()  # the one look at frequencies that were just set
    with looks() as seen, torch.autograd.set_multithreading_enabled(False):
        out = there(inputs)
        out.losses.mean().backward()
        assert not seen
    for (parameter_name, p), q in zip(model.named_parameters(), there.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), parameter_name
        if p.grad is not None:
            near(p.grad, q.grad)
    devices = set()
    map_state(lambda t: devices.add(t.device) or t, out.state)
    assert devices == {DEVICE}


@each
def test_nor_does_a_stream(name):
    model, there = pair(name)
    with torch.no_grad():
        expected, _ = model.feed(model.init_state(2), TOKENS)
        rest = model.finalize(_)
        there._prepared()
        inputs = TOKENS.to(DEVICE)
        with looks() as seen:
            losses, state = there.feed(there.init_state(2), inputs[:, :19])
            more, state = there.feed(state, inputs[:, 19:])
            last = there.finalize(state)
            assert not seen
    near(expected, torch.cat([losses, more], 1))
    near(rest, last)


def test_frequencies_are_looked_at_once_and_missing_ones_still_refused():
    _, there = pair("by-excess")
    inputs = TOKENS.to(DEVICE)
    with torch.no_grad(), looks() as seen:
        there(inputs)
        there(inputs)
        assert sum(seen.values()) == 1
        there.unigram.fill_(float("nan"))
        with pytest.raises(Exception, match="needs token frequencies"):
            there(inputs)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda gate, hook: gate * float(gate.any()),
        lambda gate, hook: gate * (1.0 if gate.sum() > 0 else 0.0),
        lambda gate, hook: gate.index_fill(1, gate[0].nonzero()[:1, 0], 1.0),
    ],
)
def test_a_look_would_be_seen(spoil):
    _, there = pair("default")
    with torch.no_grad(), looks() as seen:
        there.run_with_hooks(TOKENS.to(DEVICE), fwd_hooks=[("hook_gate", spoil)])
        assert sum(seen.values()) == 5  # ticks: 33 tokens


def test_a_tensor_of_another_device_would_be_seen():
    _, there = pair("default")
    with torch.no_grad(), pytest.raises(RuntimeError, match="mixes devices"):
        there.run_with_hooks(
            TOKENS.to(DEVICE), fwd_hooks=[("hook_gate", lambda gate, hook: gate * torch.ones(2, 8))]
        )
