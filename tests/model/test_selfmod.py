"""The self-modifying layer: what it generates, observes and writes, recomputed in NumPy from what its points show."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS, TOY, differences
from scipy.special import erf, expit

from hopeprobe.model.config import MEMORIES, SCALAR_MEMORIES
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.memories import l2norm
from hopeprobe.model.reference import write_chunk

B, T = 2, 32
TOKENS = torch.randint(0, 37, (B, T + 1), generator=torch.Generator().manual_seed(0))
NAMES = ["default", "published", "long-chunks", "static-query", "dot", "decay-to-zero"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


class Seen:
    """One run of a model, with the fast weights that each tick read."""

    def __init__(self, name, tokens=TOKENS):
        self.config = CONFIGS[name]
        self.model = HopeModel(self.config, seed=1, dtype=torch.float64)
        with torch.no_grad():
            self.out, cache = self.model.run_with_cache(tokens)
        self.cache = {k: v.numpy() for k, v in cache.items()}

    def __getitem__(self, name):
        return self.cache[name]

    def weights(self, layer, memory, position):
        """W1, W2 and skip of one memory as the tick at a position reads them, (B, ...) each."""
        chunk = self.config.chunk_memory if memory == "memory" else self.config.chunk
        written = position // chunk
        out = {}
        for weight, meta in self.model.blocks[layer].selfmod.memories[memory].named_parameters():
            name = f"blocks.{layer}.selfmod.{memory}.hook_fast_{weight}"
            meta = np.broadcast_to(meta.detach().numpy(), (B, *meta.shape))
            out[weight] = self[name][:, written - 1] if written else meta
        return out

    def answer(self, layer, memory, x, position):
        """M(x), x (B, n, d)."""
        w = self.weights(layer, memory, position)
        skip = x @ w["skip"].transpose(0, 2, 1) if "skip" in w else x
        return skip + gelu(x @ w["w2"].transpose(0, 2, 1)) @ w["w1"].transpose(0, 2, 1)


RUNS = {}


def seen(name):
    if name not in RUNS:
        RUNS[name] = Seen(name)
    return RUNS[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_a_tick_generates(name, layer):
    """u, k, v, q, eta, alpha and the output, from what enters the block."""
    run, config = seen(name), CONFIGS[name]
    selfmod = run.model.blocks[layer].selfmod
    x = run[f"blocks.{layer}.hook_resid_pre"]
    if config.residual:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    conv = selfmod.conv.detach().numpy()
    padded = np.concatenate([np.zeros((B, 3, 8)), x], 1)
    u = sum(padded[:, i : i + T] * conv[:, i] for i in range(4))
    for start in range(0, T, 8):
        rows = slice(start, start + 8)

        def shown(point, rows=rows):
            return run[f"blocks.{layer}.selfmod.hook_{point}"][:, rows]

        def m(memory, x, start=start):
            return run.answer(layer, memory, x, start)

        here = u[:, rows]
        v = m("v", here)
        eta = m("eta", here)[..., 0] + (selfmod.eta_bias.item() if selfmod.eta_bias is not None else 0)
        alpha = m("alpha", here)[..., 0] + (
            selfmod.alpha_bias.item() if selfmod.alpha_bias is not None else 0
        )
        eta = expit(eta) if config.eta_squash == "sigmoid" else np.logaddexp(0, eta)
        q = here @ selfmod.w_q.detach().numpy().T if config.query == "static" else m("q", here)
        close = {"rtol": 0, "atol": 1e-10}
        assert np.allclose(shown("k"), unit(m("k", here)), **close)
        assert np.allclose(shown("v"), unit(v) if config.normalise_value else v, **close)
        assert np.allclose(shown("q"), unit(q), **close)
        assert np.allclose(shown("eta"), config.eta_max * eta, **close)
        assert np.allclose(shown("alpha"), expit(alpha), **close)
        assert np.allclose(shown("out"), m("memory", shown("q")), **close)


@pytest.mark.parametrize("name", NAMES)
def test_the_associative_loss_is_that_of_the_weights_a_tick_reads(name):
    run, config = seen(name), CONFIGS[name]
    for layer in (0, 1):
        for memory in run.model.blocks[layer].selfmod.memories:
            for start in range(0, T, 8):
                k, v = (run[f"blocks.{layer}.selfmod.hook_{n}"][:, start : start + 8] for n in "kv")
                got, want = run.answer(layer, memory, k, start), run.answer(layer, memory, v, start)
                if config.normalise_value and memory not in SCALAR_MEMORIES:
                    want = unit(want)
                if config.objective == "dot":
                    expected = -(got * want).sum(-1)
                else:
                    scale = 0.5 if config.objective == "half-l2" else 1.0
                    expected = scale * ((got - want) ** 2).sum(-1)
                shown = run[f"blocks.{layer}.selfmod.{memory}.hook_assoc_loss"][:, start : start + 8]
                assert np.allclose(shown, expected, rtol=1e-10, atol=1e-12), (layer, memory, start)


def test_the_loss_would_differ_at_other_weights():
    """Else the test above could not tell the tick's start from its end."""
    run = seen("default")
    k, v = (run[f"blocks.0.selfmod.hook_{n}"][:, 8:16] for n in "kv")
    expected = 0.5 * ((run.answer(0, "memory", k, 16) - unit(run.answer(0, "memory", v, 16))) ** 2).sum(-1)
    assert not np.allclose(run["blocks.0.selfmod.memory.hook_assoc_loss"][:, 8:16], expected, rtol=1e-3)


def written(name, gate, tokens=TOKENS[:, :33]):
    """Fast weights of every memory of layer 0 after gates (B, T) were put in, with what was cached on the way."""
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    position = [0]

    def put(g, hook):
        start, position[0] = position[0], position[0] + g.shape[1]
        return gate[:, start : position[0]]

    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.selfmod.hook_write_gate", put)]):
        _, cache = model.run_with_cache(tokens, names_filter="blocks.0.selfmod.*", allow_unfired=True)
    return model, cache


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["default", "published", "long-chunks", "decay-to-zero"]),
    st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 0.123]), min_size=16, max_size=16),
)
def test_any_gate_is_the_delta_rule_over_what_it_lets_through(name, gates):
    """Closed tokens are left out of the loop altogether; half-open ones have eta g and 1 - g (1 - alpha)."""
    gate = torch.tensor(gates, dtype=torch.float64).repeat(B, 2)
    gate[:, 15] = 1.0  # something is written
    model, cache = written(name, gate)
    config, selfmod = model.config, model.blocks[0].selfmod
    for memory in ("memory", "v", "alpha"):
        chunk = config.chunk_memory if memory == "memory" else config.chunk
        if chunk > T:
            continue
        meta = {n: p.detach() for n, p in selfmod.memories[memory].named_parameters()}
        current = meta
        for start in range(0, T, chunk):
            tokens = [
                (
                    cache["blocks.0.selfmod.hook_k"][0, t],
                    cache["blocks.0.selfmod.hook_v"][0, t],
                    gate[0, t] * cache["blocks.0.selfmod.hook_eta"][0, t],
                    1 - gate[0, t] * (1 - cache["blocks.0.selfmod.hook_alpha"][0, t]),
                )
                for t in range(start, start + chunk)
                if gate[0, t] > 0
            ]
            current = {n: w.requires_grad_() for n, w in current.items()}
            current = {n: w.detach() for n, w in write_chunk(config, meta, current, tokens).items()}
        for weight, expected in current.items():
            got = cache[f"blocks.0.selfmod.{memory}.hook_fast_{weight}"][0, -1]
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12), (memory, weight)


@pytest.mark.parametrize("name", ["default", "published"])
def test_a_row_whose_gate_is_closed_does_not_move(name):
    gate = torch.ones(B, T, dtype=torch.float64)
    gate[1] = 0
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    with torch.no_grad():
        out = model.run_with_hooks(
            TOKENS, fwd_hooks=[("*.selfmod.hook_write_gate", lambda g, hook: gate[:, : g.shape[1]])]
        )
    for block, layer in zip(model.blocks, out.state.layers, strict=True):
        groups = differences(block.selfmod, layer.selfmod)
        for group in groups:
            for t in group:
                assert not t[1].any()
        assert groups[0].w2[0].any()


def test_a_chunk_longer_than_the_tick_is_read_at_its_last_write():
    config = CONFIGS["long-chunks"]
    model = HopeModel(config, seed=1, dtype=torch.float64)
    with torch.no_grad():
        state = model.feed(model.init_state(B), TOKENS[:, :25])[1]
        held = state.layers[0].selfmod
        assert [ticks.k.shape[1] for ticks in held.pending[0]] == [8]
        assert [ticks.k.shape[1] for ticks in held.pending[1]] == [8, 8, 8]
        others, memory = differences(model.blocks[0].selfmod, held)
        assert others.w2.any()
        assert not memory.w2.any()  # `memory` writes at 32
        _, after = model.feed(state, TOKENS[:, 25:33])
        assert after.layers[0].selfmod.pending == ((), ())
        assert differences(model.blocks[0].selfmod, after.layers[0].selfmod)[1].w2.any()


def test_a_key_that_is_zero_writes_no_association_and_no_nan():
    """l2norm of zero is zero: such a token decays and writes nothing else."""
    assert torch.equal(l2norm(torch.zeros(1, 3)), torch.zeros(1, 3))
    model = HopeModel(TOY, seed=1, dtype=torch.float64)
    with torch.no_grad():
        out = model.run_with_hooks(TOKENS, fwd_hooks=[("*.selfmod.hook_k", lambda k, hook: 0 * k)])
    assert out.losses.isfinite().all()
    assert not differences(model.blocks[0].selfmod, out.state.layers[0].selfmod)[0].w2.any()


@pytest.mark.parametrize("name", ["default", "long-chunks", "static-query"])
def test_stacking_keeps_every_memory_where_it_belongs(name):
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    selfmod = model.blocks[0].selfmod
    names = [n for group in selfmod.group_names for n in group]
    assert sorted(names) == sorted(n for n in MEMORIES if n in selfmod.memories)
    for group, w in zip(selfmod.group_names, selfmod.stacked(), strict=True):
        vectors = [n for n in group if n not in SCALAR_MEMORIES]
        for i, n in enumerate(group):
            memory = selfmod.memories[n]
            assert torch.equal(w.w2[i], memory.w2)
            if n in vectors:
                assert torch.equal(w.w1[i], memory.w1)
            else:
                assert torch.equal(w.w1_scalar[i - len(vectors)][None], memory.w1)
                assert torch.equal(w.skip[i - len(vectors)][None], memory.skip)
    fresh = selfmod.init_state(3)
    for w, group in zip(selfmod.stacked(), fresh.groups, strict=True):
        for meta, full in zip(w, group, strict=True):
            assert torch.equal(full, meta.expand(3, *meta.shape))


def test_the_proximal_step_is_the_smaller_one():
    """eta / (1 + eta |a|^2): W1 moves less than by the plain step, and W2 as much."""
    near = HopeModel(TOY, seed=1, dtype=torch.float64)
    far = HopeModel(dataclasses.replace(TOY, proximal=False), seed=1, dtype=torch.float64)
    with torch.no_grad():
        a, b = (
            differences(m.blocks[0].selfmod, m(TOKENS[:, :9]).state.layers[0].selfmod)[0] for m in (near, far)
        )
    assert torch.equal(a.w2, b.w2)
    assert (a.w1.flatten(2).norm(dim=2) < b.w1.flatten(2).norm(dim=2)).all()


@pytest.mark.parametrize("name", [*NAMES, "frozen-memory"])
def test_a_layer_on_its_own_is_the_layer_in_the_model(name):
    """What the first layer gives in a model whose gate is open, out of the graph and in it."""
    run = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    points = ["blocks.0.hook_resid_pre", "blocks.0.selfmod.hook_out"]
    with torch.no_grad():
        _, cache = run.run_with_cache(TOKENS, names_filter=points)
    block = run.blocks[0]
    x = cache["blocks.0.hook_resid_pre"]
    x = (x if block.norm is None else block.norm(x)).detach()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            out = block.selfmod(x)
        assert out.requires_grad == gradients
        torch.testing.assert_close(out.detach(), cache["blocks.0.selfmod.hook_out"], rtol=1e-12, atol=1e-12)


def test_a_tick_that_is_not_complete_is_read_and_not_written():
    model = HopeModel(TOY, seed=1, dtype=torch.float64)
    writes = []
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[("blocks.0.selfmod.hook_write_gate", lambda g, hook: writes.append(g.shape))]),
    ):
        out = model.blocks[0].selfmod(torch.randn(3, 20, 8, dtype=torch.float64))
    assert out.shape == (3, 20, 8)
    assert writes == [(3, 8), (3, 8)]
