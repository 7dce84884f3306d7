"""The adapter: what runs is the package's own streaming training, a row at a time, and what it says of itself holds."""

import copy

import pytest
from peer_streams import MEMORIES, assert_same, make, package_stream, package_window, tensors

from hopeprobe.errors import BadInputError
from hopeprobe.subject import MissingCapability

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("metric", "threshold", "per_layer", "scale", "clip"),
    [
        ("l2", None, False, 1.0, 0.0),
        ("l2", None, True, 1.0, 0.0),
        ("l2", 0.66, False, 1.0, 0.0),
        ("l2", 0.32, False, 0.5, 0.4),
        ("l2", 1.7, True, 1.0, 0.0),
        ("l2", 0.85, True, 0.5, 0.6),
        ("loss", 10.2, False, 1.0, 0.0),
        ("loss", 10.2, True, 1.0, 0.0),
        ("logit_entropy", 1.4, False, 1.0, 0.0),
    ],
)
def test_windows_run_as_the_package_streams_them(tokens, metric, threshold, per_layer, scale, clip):
    """Losses, fast weights and gates of three rows; thresholds lie where some ticks pass and some do not."""
    import torch

    of_gate = {
        "surprise_metric": metric,
        "surprise_threshold": threshold,
        "teach_scale": scale,
        "teach_clip": clip,
    }
    subject = make(model=of_gate, train={"per_layer_teach_signal": per_layer})
    gates = [f"blocks.{i}.cms.fast.hook_write_gate" for i in range(2)]
    with subject.module.caching([*gates, "hook_surprise"]) as cache:
        out = subject.run(tokens)
    assert bool(out.scored.all())
    assert torch.equal(cache["hook_surprise"], out.losses)
    one_gate = "hook_gate" in subject.module.hook_dict
    assert one_gate == (threshold is None or metric != "l2" or not per_layer)
    opened = torch.stack([cache[gate] for gate in gates])[:, :, ::8]  # (block, row, tick)
    if threshold is not None:
        assert 0.1 < float(opened.mean()) < 0.9
    for r in range(3):
        # The package's own model decides about its gate by itself here.
        model = make(model=of_gate).module.peer
        losses, state, *_ = package_stream(model, tokens[r : r + 1], 8, per_layer, metric)
        torch.testing.assert_close(out.losses[r], losses, rtol=0, atol=1e-5)
        assert_same(out.state[r], state)
        for i, block in enumerate(state.blocks):
            assert block.level_manager.clock.stats()["fast"].updates == int(opened[i, r].sum())


def test_a_window_at_once_where_training_was_not_online(tokens):
    """Then no read sees a write of its window: losses are those of the plain forward pass, and the writes are there."""
    import torch

    subject = make(train={"online_updates": False}, data={"seq_len": 40})
    assert subject.tick == 40
    out = subject.run(tokens)
    with torch.no_grad():
        logits = subject.module.peer(tokens[:, :-1])
    plain = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.losses, plain, rtol=0, atol=1e-5)
    assert set(subject.write_periods().values()) == {40}
    state = package_window(make().module.peer, tokens[:1]).state
    assert_same(out.state[0], state)
    # The token that is only a target is written too, which half of what is left of the memories does not survive.
    short = subject.run(tokens[:1, :9]).state[0]
    streamed = package_stream(make().module.peer, tokens[:1, :9], 8).state
    left = [float(tensors(state)["0.k.w2"].norm()) for state in (short, streamed)]
    assert 0.3 < left[0] / left[1] < 0.7


def test_rows_do_not_touch_each_other(tokens):
    """A batch of rows of different lengths gives what each gives alone; what is beyond a row has no effect."""
    import torch

    subject = make()
    lengths = torch.tensor([40, 13, 0])
    out = subject.run(tokens, lengths)
    assert out.scored.sum(dim=1).tolist() == [40, 13, 0]
    assert not out.losses[~out.scored].any()
    for r in (0, 1):
        alone = subject.run(tokens[r : r + 1, : lengths[r] + 1])
        torch.testing.assert_close(out.losses[r, : lengths[r]], alone.losses[0], rtol=0, atol=1e-6)
        assert_same(out.state[r], alone.state[0])
    assert_same(out.state[2], subject.init_state(1)[0])


def test_a_state_is_continued_and_left_as_it_is(tokens):
    import torch

    subject = make()
    whole = subject.run(tokens)
    first = subject.run(tokens[:, :17])
    kept = copy.deepcopy(first.state)
    rest = subject.run(tokens[:, 16:], state=first.state)
    torch.testing.assert_close(torch.cat([first.losses, rest.losses], 1), whole.losses, rtol=0, atol=1e-6)
    for a, b in zip(first.state, kept, strict=True):
        assert_same(a, b)
    losses, stepped = subject.step(first.state, tokens[:, 16:24], tokens[:, 24])
    torch.testing.assert_close(losses.detach(), whole.losses[:, 16:24], rtol=0, atol=1e-6)
    assert_same(subject.select_rows(stepped, [2, 0])[1], stepped[0])
    with subject.module.caching("blocks.1.cms.slow.hook_out") as cache:
        logits = subject.logits(first.state, tokens[:, 16:24])
    read = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 17:25], reduction="none")
    torch.testing.assert_close(read, whole.losses[:, 16:24], rtol=0, atol=1e-6)
    assert cache["blocks.1.cms.slow.hook_out"].shape == (3, 8, 16)
    for a, b in zip(first.state, kept, strict=True):
        assert_same(a, b)
    with pytest.raises(BadInputError, match="8 tokens, not 9"):
        subject.logits(first.state, tokens[:, :9])
    with pytest.raises(BadInputError, match="a step takes 8 tokens, not 7"):
        subject.step(first.state, tokens[:, 16:23], tokens[:, 24])


def test_frozen_by_mechanism(tokens):
    """Every gate closed: nothing moves, and that is shown. One mechanism closed: only the other moves."""
    import torch

    subject = make()
    start = subject.init_state(1)[0]
    fast = [name for name in subject.module.hook_dict if ".hook_fast_" in name]
    with (
        subject.module.hooks(subject.freeze_hooks()),
        subject.module.caching(fast) as cache,
    ):
        out = subject.run(tokens)
    assert_same(out.state[0], start)
    for name, meta in subject.meta_weights().items():
        writes = 40 // subject.write_periods()[name.split(".", 2)[2].rpartition(".")[0]]
        assert torch.equal(cache[name], meta.expand(3, writes, *meta.shape)), name
    with torch.no_grad():
        alone = torch.cat([subject.module.peer(tokens[:, t : t + 8]) for t in range(0, 40, 8)], dim=1)
    plain = torch.nn.functional.cross_entropy(alone.mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.losses, plain, rtol=0, atol=1e-5)

    def moved(mechanism):
        with subject.module.hooks(subject.freeze_hooks(mechanism)):
            after = tensors(subject.run(tokens).state[0])
        same = tensors(start)
        return {name.split(".")[1] for name, t in after.items() if not torch.equal(t, same[name])}

    memories = set(MEMORIES) - {"q"}  # static
    assert moved("cms") == memories
    assert moved("cms.slow") == {*memories, "fast"}
    assert moved("selfmod") == {"fast", "slow"}
    with pytest.raises(MissingCapability, match=r"no write gate for 'selfmod\.k' alone"):
        subject.freeze_hooks("selfmod.k")


def test_a_gate_is_of_a_whole_call(tokens):
    import torch

    subject = make()

    def half(gate, hook):
        return gate * (torch.arange(gate.shape[1]) % 2)

    with (
        pytest.raises(BadInputError, match="a whole call or nothing"),
        subject.module.hooks([("hook_gate", half)]),
    ):
        subject.run(tokens)
    with pytest.raises(BadInputError, match="cannot be edited"):
        subject.module.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.cms.fast.hook_delta", lambda d, hook: d * 0)]
        )


def test_what_the_points_show(tokens):
    """Levels chain and add; fast weights are those of the state; every one has its meta weights."""
    import torch

    subject = make()
    out, cache = subject.module.run_with_cache(tokens)
    model = subject.module.peer
    for i in range(2):
        prefix = f"blocks.{i}"
        fast, slow = (
            {k: cache[f"{prefix}.cms.{level}.hook_{k}"] for k in ("in", "delta", "out")}
            for level in ("fast", "slow")
        )
        assert torch.equal(fast["in"], cache[f"{prefix}.selfmod.hook_out"])
        assert torch.equal(slow["in"], fast["out"])
        for level in (fast, slow):
            assert torch.equal(level["out"], level["in"] + level["delta"])
        # In the first tick levels are as they were made.
        with torch.no_grad():
            added = model.blocks[i].cms.blocks["fast"].net(fast["in"][:, :8])
        torch.testing.assert_close(fast["delta"][:, :8], added, rtol=0, atol=1e-6)
        assert cache[f"{prefix}.cms.fast.hook_fast_in"].shape == (3, 5, 64, 16)  # (row, write, h, d)
        assert cache[f"{prefix}.cms.slow.hook_fast_out"].shape == (3, 2, 16, 64)
    meta = subject.meta_weights()
    assert set(meta) == {name for name in subject.module.hook_dict if ".hook_fast_" in name}
    for name, weights in meta.items():
        assert cache[name][0, 0].shape == weights.shape, name
        assert not torch.equal(cache[name][0, 0], weights), name
    end = out.state[1].fast.blocks[1].selfmod_state.eta
    assert torch.equal(cache["blocks.1.selfmod.eta.hook_fast_skip"][1, -1], end.w_skip[0])
    assert torch.equal(cache["blocks.1.selfmod.eta.hook_fast_w1"][1, -1], end.w1[0])
    delta = out.state[1].fast.blocks[0].cms_params["slow"]["net.1.weight"]
    assert torch.equal(
        cache["blocks.0.cms.slow.hook_fast_in"][1, -1], meta["blocks.0.cms.slow.hook_fast_in"] + delta
    )
    # The published rule's collapse: a ratio of one half a token.
    assert subject.decay_target() == {f"selfmod.{m}": "zero" for m in MEMORIES if m != "q"}
    ratio = (
        cache["blocks.0.selfmod.k.hook_fast_w2"][0, 1].norm() / meta["blocks.0.selfmod.k.hook_fast_w2"].norm()
    )
    assert 1e-6 < float(ratio) < 1e-3
    periods = subject.write_periods()
    assert periods == {
        **dict.fromkeys([f"selfmod.{m}" for m in MEMORIES if m != "q"], 8),
        "cms.fast": 8,
        "cms.slow": 16,
    }  # fmt: skip


def test_the_loss_reaches_what_training_reaches(tokens):
    """The docstring's claim: no gradient for the memories that only write, none for the static query's memory."""
    subject = make()
    subject.loss(tokens).backward()
    reached = {
        name
        for name, p in subject.module.peer.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    memories = {
        m for m in ("k", "v", "q", "eta", "alpha", "memory") if f"blocks.0.selfmod.m_{m}.w1.weight" in reached
    }
    assert memories == {"memory"}
    assert {"embed.weight", "blocks.0.selfmod.w_q.weight", "blocks.1.cms.blocks.slow.net.1.weight"} <= reached
