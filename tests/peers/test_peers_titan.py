"""The package's Titans memory: by which calls and tokens it is written, and what its gate does to that."""

import itertools

import pytest
from peer_streams import (
    assert_same,
    make,
    middle_surprise,
    of_variant,
    package_stream,
    package_window,
    tensors,
    updates,
)

from hopeprobe.errors import BadInputError

pytestmark = pytest.mark.peers

# The memory is written in every call.
TITAN = {"titan_level": {"name": "t", "update_period": 2}}


@pytest.mark.parametrize(
    ("period", "jitter", "calls"),
    [(1, 0, 1), (2, 0, 1), (3, 0, 2), (4, 0, 2), (7, 0, 4), (8, 0, 4), (4, 3, 4)],
)
def test_the_memory_is_written_by_calls(period, jitter, calls):
    """What is declared is what the package's own clock did: exactly, but for jitter, where it is the longest wait."""
    import torch
    from peer_toys import chain

    level = {"name": "titan", "update_period": period, "jitter": jitter}
    subject = make(model={**of_variant("hope_hybrid"), "titan_level": level})
    row = torch.from_numpy(chain(1, 8 * 14 + 1, seed=3))
    clock = package_stream(subject.module.peer, row, 8).state.blocks[0].level_manager.clock
    at = [
        entry["step"] // 2 for entry in clock.timeline() if entry["level"] == "titan"
    ]  # a call is two steps
    waits = {b - a for a, b in itertools.pairwise(at)}
    assert subject.write_periods()["titans.memory"] == calls * 8
    assert at[0] == 0
    assert max(waits) == calls
    assert jitter or waits == {calls}
    ours = subject.run(row).state[0].fast.blocks[0].level_manager.clock
    assert ours.timeline() == clock.timeline()


def test_looking_ahead_does_not_count_as_a_call(tokens):
    """The package counts every pass of a block; one that reads logits must not make the next write come sooner."""
    import torch

    model = {**of_variant("hope_hybrid"), "titan_level": {"name": "titan", "update_period": 4}}
    subject = make(model=model)
    state = subject.run(tokens[:, :9]).state
    steps = [row.fast.blocks[1].level_manager.clock.step for row in state]
    alone = subject.run(tokens[:, 8:], state=state)
    subject.logits(state, tokens[:, 8:16])
    assert [row.fast.blocks[1].level_manager.clock.step for row in state] == steps == [2, 2, 2]
    again = subject.run(tokens[:, 8:], state=state)
    assert torch.equal(again.losses, alone.losses)
    for a, b in zip(again.state, alone.state, strict=True):
        assert_same(a, b, atol=0)


@pytest.mark.parametrize("variant", ["hope_hybrid", "titan"])
def test_the_gate_of_a_memory_is_by_token_and_can_be_opened(tokens, variant):
    import torch

    model, window = {**of_variant(variant), **TITAN}, tokens[:, :17]
    stream = package_stream if variant == "hope_hybrid" else package_window
    calls = [
        stream(make(model=model).module.peer, row[None], *([8] * (variant == "hope_hybrid")))
        for row in window
    ]
    gated = make(model={**model, "surprise_threshold": middle_surprise(calls)})
    gates = "blocks.*.titans.hook_write_gate"
    with gated.module.caching(gates) as cache:
        own = gated.run(window)
    shown = cache["blocks.0.titans.hook_write_gate"]
    assert 0 < float(shown.mean()) < 1

    def run(edit):
        names = [gates] + (["blocks.*.cms.*.hook_write_gate"] if variant == "hope_hybrid" else [])
        with gated.module.hooks([(names, edit)]):
            return gated.run(window)

    same = run(lambda gate, hook: gate * 1)
    everything = run(lambda gate, hook: torch.ones_like(gate))
    ungated = make(model=model).run(window)
    for r in range(3):
        assert_same(same.state[r], own.state[r], atol=0)
        assert_same(everything.state[r], ungated.state[r])
    assert any(
        not torch.equal(tensors(a)[name], tensors(b)[name])
        for a, b in zip(own.state, ungated.state, strict=True)
        for name in tensors(a)
    )
    with pytest.raises(BadInputError, match="a whole call or nothing"):
        run(lambda gate, hook: gate * (torch.arange(gate.shape[1]) % 2))


def test_an_open_call_may_write_by_momentum_alone(tokens):
    """The corner that the docstring tells of; closing the gate stops that too."""
    import torch

    model = {**of_variant("hope_hybrid"), **TITAN, "surprise_threshold": 0.1, "teach_clip": 0.05}
    model["optimizers"] = {"default": {"type": "deep_momentum", "params": {"beta": 0.9}}}
    subject = make(model=model, train={"per_layer_teach_signal": True})
    with subject.module.caching("blocks.0.*.hook_write_gate") as cache:
        out = subject.run(tokens)
    assert not cache["blocks.0.titans.hook_write_gate"].any()
    assert bool(torch.cat([cache["blocks.0.cms.fast.hook_write_gate"]]).all())
    assert updates(out.state[0], "t") == [5, 5]
    with subject.module.hooks(subject.freeze_hooks("titans")):
        out = subject.run(tokens)
    assert updates(out.state[0], "t") == [0, 0]


def test_a_level_that_cannot_be_told_from_the_memory():
    levels = [{"name": "titan_fast", "update_period": 8}]
    with pytest.raises(BadInputError, match="'titan_fast' begins with 'titan'"):
        make(model={**of_variant("hope_hybrid"), "cms_levels": levels})
    assert make(model={**of_variant("hope_attention"), "cms_levels": levels}).module.hook_dict
