"""The package's other blocks: each runs and writes as the package does, and its points show what the package holds."""

import pytest
from peer_streams import (
    assert_same,
    make,
    middle_surprise,
    of_variant,
    package_stream,
    package_window,
    plain,
    tensors,
    updates,
)

from hopeprobe.subject import MissingCapability

pytestmark = pytest.mark.peers

# The memory is written in every call, as a window has five.
TITAN = {"titan_level": {"name": "t", "update_period": 2}}


@pytest.mark.parametrize("variant", ["hope_attention", "hope_hybrid"])
@pytest.mark.parametrize(
    ("metric", "gated", "per_layer", "scale", "clip", "carry"),
    [
        ("l2", False, False, 1.0, 0.0, False),
        ("l2", False, True, 1.0, 0.0, True),
        ("l2", True, False, 1.0, 0.0, False),
        ("l2", True, False, 0.5, 0.3, True),
        ("l2", True, True, 1.0, 0.0, False),
        ("l2", True, True, 1.0, 0.5, False),
        ("loss", True, True, 1.0, 0.0, False),
        ("logit_entropy", True, False, 1.0, 0.0, True),
    ],
)
def test_windows_run_as_the_package_streams_them(
    tokens, variant, metric, gated, per_layer, scale, clip, carry
):
    """Losses, every fast weight, the writes that were let through, and the tokens that a memory's gate shows."""
    import torch

    model = {
        "surprise_metric": metric,
        "teach_scale": scale,
        "teach_clip": clip,
        **of_variant(variant),
    } | TITAN
    train = {"per_layer_teach_signal": per_layer, "online_carry_attention_cache": carry}

    def package(row):
        return package_stream(make(model=model).module.peer, row[None], 8, per_layer, metric, carry)

    threshold = middle_surprise(map(package, tokens), scale, clip, not per_layer) if gated else None
    model["surprise_threshold"] = threshold
    subject = make(model=model, train=train)
    ends = ("fast.hook_write_gate", "titans.hook_write_gate")
    gates = [name for name in subject.module.hook_dict if name.endswith(ends)]
    with subject.module.caching([*gates, "hook_surprise"]) as cache:
        out = subject.run(tokens)
    assert torch.equal(cache["hook_surprise"], out.losses)
    by_token = gated and metric == "l2"
    assert ("hook_gate" in subject.module.hook_dict) != (by_token and per_layer)
    shares, tokens_left_out = [], 0
    for r in range(3):
        theirs = package(tokens[r])
        torch.testing.assert_close(out.losses[r], theirs.losses, rtol=0, atol=1e-5)
        assert_same(out.state[r], theirs.state)
        for i in range(2):
            opened = cache[f"blocks.{i}.cms.fast.hook_write_gate"][r]
            assert updates(theirs.state, "fast")[i] == int(opened[::8].sum())
            shares.append(float(opened.mean()))
            if variant == "hope_hybrid":
                norms = torch.cat([signal[i].norm(dim=-1) * scale for signal in theirs.signals])
                norms = norms.clamp(max=clip) if clip else norms
                expected = opened * (norms >= threshold) if by_token else opened
                assert torch.equal(cache[f"blocks.{i}.titans.hook_write_gate"][r], expected)
                assert updates(theirs.state, "t")[i] == int(opened[::8].sum())
                tokens_left_out += int((opened - expected).sum())
    if gated:
        assert 0.1 < sum(shares) / len(shares) < 0.9
    assert bool(tokens_left_out) == (by_token and variant == "hope_hybrid")


@pytest.mark.parametrize(
    ("metric", "gated"), [("l2", False), ("l2", True), ("loss", True), ("logit_entropy", True)]
)
@pytest.mark.parametrize("variant", ["hope_attention", "hope_hybrid", "titan"])
def test_a_window_at_once(tokens, variant, metric, gated):
    """Not online, and `type: titan` whatever is said: the losses are the plain ones, and the writes are there."""
    import torch

    levels = [{"name": "fast", "update_period": 8}, {"name": "slow", "update_period": 12}]
    model = {"surprise_metric": metric, "cms_levels": levels, "cms_flush_partial_at_end": gated}
    model |= of_variant(variant) | TITAN

    def package(row):
        return package_window(make(model=model).module.peer, row[None], metric)

    model["surprise_threshold"] = middle_surprise(map(package, tokens)) if gated else None
    online = variant == "titan"
    train = {"online_updates": online, "per_layer_teach_signal": online}
    subject = make(model=model, data={"seq_len": 40}, train=train)
    assert subject.tick == 40
    out = subject.run(tokens)
    torch.testing.assert_close(out.losses, plain(subject, tokens), rtol=0, atol=1e-5)
    written = set()
    for r in range(3):
        theirs = package(tokens[r])
        torch.testing.assert_close(out.losses[r], theirs.losses, rtol=0, atol=1e-5)
        assert_same(out.state[r], theirs.state)
        written |= set(updates(theirs.state, "fast" if variant == "hope_attention" else "t"))
        # What no period was full for is not left to the next window: it is dropped, or flushed by one write more.
        left = [
            buffer.count for block in out.state[r].fast.blocks for buffer in block.cms_online_buffers.values()
        ]
        assert not any(left)
    assert set(subject.write_periods().values()) == {40}
    assert bool(0 in written) == gated
    assert max(written) == (5 if variant == "hope_attention" else 1)


def test_a_transformer_is_never_written(tokens):
    """Every tick is a plain one, attention in it or carried on; what writes is missing, and nothing is frozen."""
    import torch

    for train in (
        {},
        {"online_chunk_size": 4},
        {"online_chunk_size": 4, "online_carry_attention_cache": True},
    ):
        subject = make(model=of_variant("transformer"), train=train)
        assert subject.tick == (4 if train else 16)
        out, cache = subject.module.run_with_cache(tokens)
        if len(train) < 2:
            torch.testing.assert_close(out.losses, plain(subject, tokens), rtol=0, atol=1e-5)
        else:
            with torch.no_grad():
                logits = subject.module.peer(tokens[:, :-1])
            whole = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
            torch.testing.assert_close(out.losses, whole, rtol=0, atol=1e-5)
    assert not [name for name in cache if "gate" in name or "fast" in name]
    assert subject.write_periods() == {}
    assert subject.freeze_hooks() == []
    with pytest.raises(MissingCapability, match="no fast weights"):
        subject.meta_weights()
    with pytest.raises(MissingCapability, match="no write gate for 'cms' alone"):
        subject.freeze_hooks("cms")


@pytest.mark.parametrize(
    ("variant", "mechanisms"),
    [
        ("hope_attention", {"cms": {"fast", "slow"}, "cms.slow": {"slow"}}),
        ("hope_hybrid", {"titans": {"titan"}, "cms": {"fast", "slow"}, "cms.fast": {"fast"}}),
        ("titan", {"titans": {"titan"}}),
    ],
)
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_closed_gates_freeze_the_package(tokens, variant, mechanisms, threshold):
    import torch

    subject = make(model={**of_variant(variant), **TITAN, "surprise_threshold": threshold})
    start = tensors(subject.init_state(1)[0])
    fast = [name for name in subject.module.hook_dict if ".hook_fast_" in name]

    def moved(mechanism):
        with subject.module.hooks(subject.freeze_hooks(mechanism)):
            out = subject.run(tokens)
        after = tensors(out.state[0])
        return out, {name.split(".")[1] for name, t in after.items() if not torch.equal(t, start[name])}

    with subject.module.caching(fast) as cache:
        out, written = moved(None)
    assert not written
    for name, meta in subject.meta_weights().items():
        assert torch.equal(cache[name], meta.expand_as(cache[name])), name
    torch.testing.assert_close(out.losses, plain(subject, tokens), rtol=0, atol=1e-5)
    everything = {name.split(".")[1] for name in start}
    for mechanism, parts in mechanisms.items():
        assert moved(mechanism)[1] == everything - parts, mechanism
    # Switches that a frozen run used are back as the package had them.
    with torch.no_grad():
        state = package_window(subject.module.peer, tokens[:1]).state
    assert {
        name.split(".")[1] for name, t in tensors(state).items() if not torch.equal(t, start[name])
    } == everything


@pytest.mark.parametrize("variant", ["hope_hybrid", "hope_attention"])
def test_when_weights_are_shown_does_not_hang_on_the_rows_beside(tokens, variant):
    import torch

    subject = make(model={**of_variant(variant), "titan_level": {"name": "t", "update_period": 4}})
    fast = [name for name in subject.module.hook_dict if ".hook_fast_" in name]

    def shown(rows, opened):
        seen, read = {}, [0]

        def count(t, hook):
            read[0] += t.shape[1]

        def gate(t, hook):
            return torch.ones_like(t) * t.new_tensor(opened)[:, None]

        hooks = [("hook_surprise", count), ("*.hook_write_gate", gate)]
        hooks.append((fast, lambda t, hook: seen.setdefault(hook.name, []).append(read[0])))
        with subject.module.hooks(hooks):
            subject.run(rows)
        return seen

    alone, beside = shown(tokens[:1], [0.0]), shown(tokens[:2], [0.0, 1.0])
    periods = {name: subject.write_periods()[name.split(".", 2)[2].rpartition(".")[0]] for name in fast}
    assert alone == beside == {name: list(range(period, 41, period)) for name, period in periods.items()}
    assert len(set(periods.values())) == 2


def held(variant, tokens, **model):
    """Largest difference between what points show after the last write and what the package holds then."""
    import torch

    subject = make(model={**of_variant(variant), **TITAN, **model})
    points = [name for name in subject.module.hook_dict if ".hook_fast_" in name]
    with subject.module.caching(points) as cache:
        subject.run(tokens)
    model, weights = make(model={**of_variant(variant), **TITAN, **model}).module.peer, {}
    row = tokens[1:2]
    state = (package_window(model, row) if variant == "titan" else package_stream(model, row, 8)).state
    for i, (block, fast) in enumerate(zip(model.blocks, state.blocks, strict=True)):
        prefix = f"blocks.{i}"
        if fast.titan_params:
            for name, key in (("w2", "net.0.weight"), ("w1", "net.2.weight")):
                start = block.titan_memory.get_parameter(key).detach()
                weights[f"{prefix}.titans.memory.hook_fast_{name}"] = start, fast.titan_params[key]
        for level, deltas in fast.cms_params.items():
            for name, key in (("in", "net.1.weight"), ("out", "net.3.weight")):
                start = block.cms.blocks[level].get_parameter(key).detach()
                weights[f"{prefix}.cms.{level}.hook_fast_{name}"] = start, deltas[key]
    assert weights.keys() == set(points) == set(subject.meta_weights())
    for name, (start, delta) in weights.items():
        assert torch.equal(subject.meta_weights()[name], start)
        assert float(delta.abs().max()) > 1e-4, name
    shown = [(cache[name][1, -1] - start - delta).abs().max() for name, (start, delta) in weights.items()]
    return float(torch.stack(shown).max())


WRITTEN = ("hope_attention", "hope_hybrid", "titan")


@pytest.mark.parametrize("variant", WRITTEN)
def test_points_show_the_weights_that_the_package_holds(tokens, variant):
    assert held(variant, tokens if variant != "titan" else tokens[:, :17]) < 1e-6


@pytest.mark.parametrize(
    ("module", "name"), [("nested_learning_cms", "CMSPart"), ("nested_learning_titan", "TitanPart")]
)
def test_weights_from_before_the_write_are_seen(tokens, monkeypatch, module, name):
    """The planted defect: points show what the weights were when the tick was read."""
    import copy
    import importlib

    from nested_learning_hooks import HookedPeer

    kind = getattr(importlib.import_module(module), name)
    holds, call, was = kind.holds, HookedPeer._call, {}

    def marking(self, inputs, row, signal):
        before = copy.deepcopy(row.fast.blocks)
        call(self, inputs, row, signal)
        was.update({id(now): then for now, then in zip(row.fast.blocks, before, strict=True)})

    def late(self, point):
        weights = holds(self, point)
        return lambda state: weights(was[id(state)])

    monkeypatch.setattr(HookedPeer, "_call", marking)
    monkeypatch.setattr(kind, "holds", late)
    assert held("hope_hybrid", tokens) > 1e-4


def test_what_the_points_show(tokens):
    """The stream through a block, the memory that adds to it, and what each of them is by the package's modules."""
    import torch

    for variant in ("hope_hybrid", "titan", "transformer", "hope_attention"):
        subject = make(model={**of_variant(variant), **TITAN})
        cache = subject.module.run_with_cache(tokens)[1]
        first = {name: cache[name][:, :8] for name in cache if "hook_fast" not in name}
        model = subject.module.peer
        with torch.no_grad():
            x = model.embed(tokens[:, :8])
            assert torch.equal(first["hook_embed"], x)
            assert torch.equal(first["blocks.0.hook_resid_pre"], x)
            block = model.blocks[0]
            y = block.attn(x)
            if variant in ("hope_hybrid", "titan"):
                torch.testing.assert_close(first["blocks.0.titans.hook_q"], y, rtol=0, atol=1e-6)
                y = y + block.titan_memory(y)
                mixed = first["blocks.0.titans.hook_q"] + first["blocks.0.titans.hook_out"]
                torch.testing.assert_close(mixed, y, rtol=0, atol=1e-6)
            assert ("blocks.0.hook_resid_mid" in first) == (variant != "titan")
            if variant != "titan":
                torch.testing.assert_close(first["blocks.0.hook_resid_mid"], y, rtol=0, atol=1e-6)
            for second in ("cms", "mlp", "norm"):
                if hasattr(block, second):
                    y = getattr(block, second)(y)
        torch.testing.assert_close(first["blocks.0.hook_resid_post"], y, rtol=0, atol=1e-6)
        assert torch.equal(cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"])


# -- what has a gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "unreached"),
    [
        ("hope_attention", set()),
        ("hope_hybrid", {"self_modifier"}),
        ("transformer", set()),
        ("titan", {"self_modifier"}),
    ],
)
def test_what_the_loss_reaches(tokens, variant, unreached):
    subject = make(model=of_variant(variant))
    subject.loss(tokens).backward()
    left = [n for n, p in subject.module.peer.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.split(".")[2] for name in left} == unreached
    assert len(left) == 12 * len(unreached)
    groups = subject.parameter_groups()
    named = [name for group in groups.values() for name in group]
    assert len(named) == len(set(named)) == len(list(subject.module.peer.parameters()))
    assert sum(".titans.self_modifier." in name for name in groups.get("titans", {})) == len(left)


@pytest.mark.parametrize("variant", ["hope_attention", "hope_hybrid", "hope_selfmod"])
def test_one_mode_of_training_has_a_gradient_through_writes(tokens, variant):
    """`boundary_state_grad_through_write`: writes and gradient are those of the package's loop in that mode.

    In blocks of one kind, that is: others are trained in it as without.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, train = of_variant(variant), {"per_layer_teach_signal": True}
    through = make(model=model, train=train | {"algorithm_mode": "boundary_state_grad_through_write"})
    peer = make(model=model, train=train).module.peer
    with sdpa_kernel(SDPBackend.MATH):  # the package cannot train so on fused attention
        theirs = package_stream(peer, tokens[:1], 8, per_layer=True, through=True)
    out = through.run(tokens[:1])
    torch.testing.assert_close(out.losses[0], theirs.losses, rtol=0, atol=1e-5)
    assert_same(out.state[0], theirs.state)
    assert not any(t.requires_grad for t in tensors(out.state[0]).values())

    def gradients(subject):
        subject.module.zero_grad()
        (5 * subject.loss(tokens[:1])).backward()  # of five calls the package adds the means
        named = subject.module.peer.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    expected = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    found, cut = gradients(through), gradients(make(model=model, train=train))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    differs = max(float((cut[name] - expected[name]).abs().max()) for name in cut)
    assert (differs > 1e-3) == (variant == "hope_attention")


# -- without a CMS, and copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["hope_selfmod", "hope_attention", "hope_hybrid"])
def test_without_cms_levels(tokens, variant):
    """As in the package's own ablation: calls are whole windows, and what is left runs as it does there."""
    import torch

    model = {**of_variant(variant), **TITAN, "cms_levels": []}
    subject = make(model=model, data={"seq_len": 40})
    assert subject.tick == 40
    out, cache = subject.module.run_with_cache(tokens)
    state = package_stream(make(model=model).module.peer, tokens[:1], 40).state
    assert_same(out.state[0], state)
    torch.testing.assert_close(out.losses, plain(subject, tokens), rtol=0, atol=1e-5)
    assert torch.equal(cache["blocks.0.hook_resid_mid"], cache["blocks.0.hook_resid_post"])
    mechanisms = {name.partition(".")[0] for name in subject.write_periods()}
    assert (
        mechanisms
        == {"hope_selfmod": {"selfmod"}, "hope_attention": set(), "hope_hybrid": {"titans"}}[variant]
    )
    assert ("hook_gate" in subject.module.hook_dict) == (
        variant == "hope_hybrid"
    )  # nothing else would listen to it


def test_a_copy_shows_what_it_runs_itself(tokens):
    import copy

    import torch

    subject = make(model={**of_variant("hope_hybrid"), **TITAN})
    other = copy.deepcopy(subject)
    with torch.no_grad():
        other.module.peer.embed.weight.mul_(2)
    with subject.module.caching("*") as untouched, other.module.caching("hook_embed") as cache:
        subject.run(tokens)
        other.run(tokens)
    assert torch.equal(cache["hook_embed"], 2 * untouched["hook_embed"])
