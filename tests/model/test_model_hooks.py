"""Every hook point of the design's table: there, with its shape and cadence, editable as declared, free to observe."""

import dataclasses
import re

import pytest
import torch
from model_toys import CONFIGS, TOY, differences

from hopeprobe.errors import BadInputError
from hopeprobe.hooks import HookNeverFiredError, markdown_table
from hopeprobe.model.config import CMSLevel
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import close
from hopeprobe.model.subject import HopeSubject

# Levels that write every tick and every fourth; two rows, 32 tokens: 4 ticks.
B, T, D, H, TICKS = 2, 32, 8, 32, 4
TOKENS = torch.randint(0, 37, (B, T + 1), generator=torch.Generator().manual_seed(0))
VECTOR, SCALAR = ("memory", "q", "k", "v"), ("eta", "alpha")


def table():
    """The design's table for two blocks: name -> (shape joined over the run, cadence, editable)."""
    tick, write = "tick", "write"
    rows = {"hook_embed": ((B, T, D), tick, True), "hook_gate": ((B, T), tick, True)}
    rows |= dict.fromkeys(("hook_surprise", "hook_gate_score", "hook_gate_doubt"), ((B, T), tick, False))
    for i in range(2):
        block, selfmod, cms = f"blocks.{i}", f"blocks.{i}.selfmod", f"blocks.{i}.cms"
        rows |= {f"{block}.hook_resid_{n}": ((B, T, D), tick, True) for n in ("pre", "mid", "post")}
        rows |= {f"{selfmod}.hook_{n}": ((B, T, D), tick, True) for n in ("q", "k", "v", "out")}
        rows |= {f"{selfmod}.hook_{n}": ((B, T), tick, True) for n in ("eta", "alpha", "write_gate")}
        for memory in VECTOR + SCALAR:
            out = D if memory in VECTOR else 1
            rows[f"{selfmod}.{memory}.hook_assoc_loss"] = ((B, T), tick, False)
            rows[f"{selfmod}.{memory}.hook_fast_w1"] = ((B, TICKS, out, D), write, True)
            rows[f"{selfmod}.{memory}.hook_fast_w2"] = ((B, TICKS, D, D), write, True)
            if memory in SCALAR:
                rows[f"{selfmod}.{memory}.hook_fast_skip"] = ((B, TICKS, 1, D), write, True)
        for level, writes in (("fast", 4), ("slow", 1)):
            rows |= {f"{cms}.{level}.hook_{n}": ((B, T, D), tick, True) for n in ("in", "delta", "out")}
            rows[f"{cms}.{level}.hook_write_gate"] = ((B, T), tick, True)
            rows[f"{cms}.{level}.hook_fast_in"] = ((B, writes, H, D), write, True)
            rows[f"{cms}.{level}.hook_fast_out"] = ((B, writes, D, H), write, True)
        rows[f"{cms}.hook_mix"] = ((B, T, 2), tick, True)
        rows[f"{cms}.hook_out"] = ((B, T, D), tick, True)
    return rows


TABLE = table()


@pytest.fixture(scope="module")
def cache():
    model = HopeModel(TOY, seed=1, dtype=torch.float64)
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1]


@pytest.fixture(scope="module")
def unedited():
    with torch.no_grad():
        return HopeModel(TOY, seed=1, dtype=torch.float64)(TOKENS)


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for part in state for t in tensors(part)] if isinstance(state, tuple) else []


def same(one, other):
    assert torch.equal(one.losses, other.losses)
    for a, b in zip(tensors(one.state), tensors(other.state), strict=True):
        assert torch.equal(a, b)


def test_the_points_are_those_of_the_table(toy):
    assert set(toy.hook_dict) == set(TABLE)
    for row in toy.list_hooks():
        _, cadence, editable = TABLE[row.name]
        assert (row.cadence, row.editable) == (cadence, editable), row.name
    assert markdown_table(toy.hook_dict).count("\n") == len(TABLE) + 1


@pytest.mark.parametrize("name", TABLE)
def test_it_fires_with_its_shape_and_cadence(cache, name):
    assert tuple(cache[name].shape) == TABLE[name][0]
    assert cache[name].isfinite().all()
    assert "pos" in cache.dims(name) or "write" in cache.dims(name)
    assert len(cache.dims(name)) == cache[name].ndim


def test_every_point_fires_once_a_tick_or_once_a_write(toy):
    with torch.no_grad(), toy.hooks(fwd_hooks=[("*", lambda t, hook: None)]) as handle:
        toy(TOKENS)
    for name, count in handle.fired.items():
        shape, cadence, _ = TABLE[name]
        assert count == (TICKS if cadence == "tick" else shape[1]), name


@pytest.mark.parametrize("name", TABLE)
def test_it_can_be_edited_where_it_says_so(toy, unedited, name):
    """A small edit from the first firing on moves losses or state; a point to observe refuses one."""
    with torch.no_grad():
        edit = [(name, lambda t, hook: t * 1.01)]
        if not TABLE[name][2]:
            with pytest.raises(BadInputError, match="cannot be edited"):
                toy.run_with_hooks(TOKENS, fwd_hooks=edit)
            return
        edited = toy.run_with_hooks(TOKENS, fwd_hooks=edit)
    assert not toy.hook_dict[name].active
    pairs = zip(
        [edited.losses, *tensors(edited.state)], [unedited.losses, *tensors(unedited.state)], strict=True
    )
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["default", "published", "long-chunks", "chain"])
@pytest.mark.parametrize("grad", [False, True])
def test_observing_changes_nothing(name, grad):
    model = HopeModel(CONFIGS[name], seed=1)  # float32: roundings show
    tokens = torch.cat([TOKENS, TOKENS[:, 1:]], 1)
    with torch.set_grad_enabled(grad):
        plain = model(tokens)
        same(model.run_with_hooks(tokens, fwd_hooks=[("*", lambda t, hook: None)]), plain)
        assert model.run_with_cache(tokens)[0].losses.equal(plain.losses)


@pytest.mark.parametrize("name", ["default", "published", "long-chunks", "chain"])
def test_observing_backward(name):
    """Fast weights to the bit; elsewhere a gradient met on the way is summed in another order, by a rounding."""
    model = HopeModel(CONFIGS[name], seed=1)
    plain = model(TOKENS)
    with model.hooks(bwd_hooks=[("*.hook_fast_*", lambda g, hook: None)], allow_unfired=True):
        same(model(TOKENS), plain)
    with model.hooks(bwd_hooks=[("*", lambda g, hook: None)], allow_unfired=True):
        watched = model(TOKENS)
        watched.losses.sum().backward()
    assert torch.allclose(watched.losses, plain.losses, rtol=1e-5)
    seen = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    plain.losses.sum().backward()
    for n, p in model.named_parameters():
        assert (seen[n] is None) == (p.grad is None)
        if p.grad is not None:
            assert (seen[n] - p.grad).norm() <= 1e-4 * p.grad.norm().clamp_min(1e-3), n


def test_the_other_variants_points(tokens):
    chain = HopeModel(CONFIGS["chain"], seed=1)
    assert not any("hook_mix" in n for n in chain.hook_dict)
    static = HopeModel(CONFIGS["static-query"], seed=1)
    assert "blocks.0.selfmod.hook_q" in static.hook_dict
    assert not any(".selfmod.q." in n for n in static.hook_dict)
    transformer = HopeModel(dataclasses.replace(TOY, variant="transformer"), seed=1)
    assert set(transformer.hook_dict) == {
        "hook_embed", "hook_surprise", *(f"blocks.{i}.hook_resid_{n}" for i in (0, 1) for n in ("pre", "mid", "post"))
    }  # fmt: skip
    for model in (chain, static, transformer):
        with torch.no_grad():
            assert len(model.run_with_cache(TOKENS)[1]) == len(model.hook_dict)


def test_out_is_in_plus_delta_and_the_mix_sums_to_one(cache):
    for i in range(2):
        outs = []
        for level in ("fast", "slow"):
            point = f"blocks.{i}.cms.{level}.hook_"
            assert torch.equal(cache[point + "out"], cache[point + "in"] + cache[point + "delta"])
            assert torch.equal(cache[point + "in"], cache[f"blocks.{i}.hook_resid_mid"])
            outs.append(cache[point + "out"])
        mix = cache[f"blocks.{i}.cms.hook_mix"]
        assert (mix >= 0).all()
        assert torch.allclose(mix.sum(-1), torch.ones(B, T, dtype=torch.float64), rtol=0, atol=1e-15)
        mixed = (torch.stack(outs, -1) * mix[:, :, None]).sum(-1)
        assert torch.allclose(cache[f"blocks.{i}.cms.hook_out"], mixed, rtol=0, atol=1e-14)
        assert torch.equal(cache[f"blocks.{i}.cms.hook_out"], cache[f"blocks.{i}.hook_resid_post"])
    assert torch.equal(cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"])


def test_what_the_points_hold_of_one_another(cache, toy):
    with torch.no_grad():
        losses = toy(TOKENS).losses
    assert torch.equal(cache["hook_surprise"], losses)
    assert torch.equal(cache["hook_gate"], (losses > 0.02).double())
    assert torch.equal(cache["hook_embed"], toy.embed[TOKENS[:, :-1]].detach())
    for i in range(2):
        for n in ("k", "v", "q"):
            assert torch.allclose(
                cache[f"blocks.{i}.selfmod.hook_{n}"].norm(dim=-1), torch.ones(B, T).double()
            )
        for n in ("eta", "alpha"):
            assert (
                (cache[f"blocks.{i}.selfmod.hook_{n}"] > 0) & (cache[f"blocks.{i}.selfmod.hook_{n}"] < 1)
            ).all()
        residual = cache[f"blocks.{i}.hook_resid_pre"] + cache[f"blocks.{i}.selfmod.hook_out"]
        assert torch.equal(cache[f"blocks.{i}.hook_resid_mid"], residual)
        assert torch.equal(cache[f"blocks.{i}.selfmod.hook_write_gate"], cache["hook_gate"])
        assert torch.equal(cache[f"blocks.{i}.cms.slow.hook_write_gate"], cache["hook_gate"])


# -- freezing -----------------------------------------------------------------------------------------------------


def moved(model, state):
    """Which mechanisms' fast weights differ from their meta weights."""
    names = set()
    for i, layer in enumerate(state.layers):
        groups = differences(model.blocks[i].selfmod, layer.selfmod)
        if any(t.any() for group in groups for t in group):
            names.add(f"blocks.{i}.selfmod")
        for level, held in zip(("fast", "slow"), layer.cms, strict=True):
            if held.w_in.any() or held.w_out.any():
                names.add(f"blocks.{i}.cms.{level}")
    return names


MECHANISMS = [f"blocks.{i}.{m}" for i in range(2) for m in ("selfmod", "cms.fast", "cms.slow")]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_closed_write_gate_freezes_that_mechanism_alone(toy, mechanism, grad):
    with torch.set_grad_enabled(grad):
        assert moved(toy, toy(TOKENS).state) == set(MECHANISMS)
        frozen = toy.run_with_hooks(TOKENS, fwd_hooks=[(f"{mechanism}.hook_write_gate", close)])
    assert moved(toy, frozen.state) == set(MECHANISMS) - {mechanism}


def test_the_common_gate_freezes_all(toy):
    with torch.no_grad():
        assert moved(toy, toy.run_with_hooks(TOKENS, fwd_hooks=[("hook_gate", close)]).state) == set()
        frozen = toy.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.hook_write_gate", close)])
    assert moved(toy, frozen.state) == set()


@pytest.mark.parametrize("variant", ["full", "titans"])
def test_fast_weights_are_shown_at_the_end_of_every_period_whatever_the_gates_of_others(variant):
    """What fires must not hang on the rows beside; and where nothing was written, what is shown has not moved."""
    model = HopeModel(dataclasses.replace(TOY, variant=variant), dtype=torch.float64)
    row, beside = TOKENS[:1], TOKENS[1:]

    def close_first(gate, hook):
        return torch.cat([gate[:1] * (torch.arange(gate.shape[1]) < 0), gate[1:]])

    def seen(tokens, fn):
        with torch.no_grad(), model.hooks([("hook_gate", fn)]):
            return model.run_with_cache(tokens, names_filter="*.hook_fast_*")[1]

    closed, among = seen(row, close), seen(torch.cat([row, beside]), close_first)
    assert set(closed) == set(among) == {n for n in model.hook_dict if "hook_fast" in n}
    for name, tensor in closed.items():
        writes = (TOKENS.shape[1] - 1) // model.config.periods[
            re.sub(r"^blocks\.\d+\.|\.hook_\w+$", "", name)
        ]
        assert tensor.shape[1] == among[name].shape[1] == writes > 0
        meta = HopeSubject(model).meta_weights()[name].expand_as(tensor)
        assert torch.equal(tensor, meta), name
        assert torch.equal(among[name][:1], tensor), name
        assert not torch.equal(among[name][1:], meta.expand_as(among[name][1:])), name


def test_no_write_period_that_ended_is_not_reported_as_one(toy):
    with torch.no_grad(), pytest.raises(HookNeverFiredError, match="no write period ended"):
        toy.run_with_hooks(
            TOKENS[:, :6], fwd_hooks=[("blocks.0.selfmod.k.hook_fast_w2", lambda t, hook: None)]
        )


# -- edits of fast weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory", VECTOR + SCALAR)
def test_an_edit_of_fast_weights_is_the_state(toy, memory, grad):
    for weight in ("w1", "w2", "skip") if memory in SCALAR else ("w1", "w2"):
        name = f"blocks.1.selfmod.{memory}.hook_fast_{weight}"
        goal = torch.randn(TABLE[name][0][0], *TABLE[name][0][2:], dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            plain = toy(TOKENS[:, :9]).state.layers[1].selfmod.groups[0]
            out = toy.run_with_hooks(TOKENS[:, :9], fwd_hooks=[(name, lambda t, hook, goal=goal: goal)])
            got = out.state.layers[1].selfmod.groups[0]
            after = toy(TOKENS[:, 8:17], state=out.state)
            cached = toy.run_with_cache(TOKENS[:, 8:17], state=out.state, names_filter=name)[1]
        index = toy.blocks[1].selfmod.group_names[0].index(memory)
        j = index - 4
        meta = getattr(toy.blocks[1].selfmod.memories[memory], weight).detach()
        field = {"w2": "w2", "skip": "skip", "w1": "w1_scalar" if memory in SCALAR else "w1"}[weight]
        row = index if weight == "w2" or memory in VECTOR else j
        assert torch.equal(getattr(got, field)[:, row].reshape(B, *meta.shape), goal)
        for f in got._fields:  # and nothing else is touched, by so much as a bit
            keep = [r for r in range(getattr(got, f).shape[1]) if (f, r) != (field, row)]
            assert torch.equal(getattr(got, f)[:, keep], getattr(plain, f)[:, keep])
        assert not torch.equal(cached[name][:, 0], goal)  # the next write starts from the edit
        assert after.losses.isfinite().all()


@pytest.mark.parametrize("memory", ["k", "alpha"])
def test_what_an_observer_keeps_is_not_overwritten_by_later_writes(toy, memory):
    """Without an outer gradient the state is written in place."""
    kept = []
    name = f"blocks.0.selfmod.{memory}.hook_fast_w2"
    with torch.no_grad():
        toy.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: kept.append((t, t.clone())))])
    assert len(kept) == T // 8
    assert all(torch.equal(seen, at_the_time) for seen, at_the_time in kept)
    assert not torch.equal(kept[0][0], kept[1][0])


def test_an_edit_of_a_level_is_the_state(toy):
    goal = torch.randn(B, H, D, dtype=torch.float64)
    with torch.no_grad():
        out = toy.run_with_hooks(
            TOKENS[:, :9], fwd_hooks=[("blocks.0.cms.fast.hook_fast_in", lambda t, hook: goal)]
        )
        plain = toy(TOKENS[:, :9])
    held, before = out.state.layers[0].cms, plain.state.layers[0].cms
    meta = toy.blocks[0].cms.levels["fast"].w_in.detach()
    assert torch.allclose(meta + held[0].w_in, goal, rtol=0, atol=1e-14)
    assert torch.equal(held[0].w_out, before[0].w_out)
    assert torch.equal(held[1].grad_hidden, before[1].grad_hidden)


def test_restoring_the_meta_weights_by_an_edit_is_exact(toy):
    meta = toy.blocks[0].selfmod.memories["k"].w2
    edit = ("blocks.0.selfmod.k.hook_fast_w2", lambda t, hook: meta.expand_as(t))
    with torch.no_grad():
        state = toy.run_with_hooks(TOKENS, fwd_hooks=[edit]).state
    assert not differences(toy.blocks[0].selfmod, state.layers[0].selfmod)[0].w2[:, 2].any()


# -- the graph ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "cut"),
    [("blocks.1.hook_resid_post", MECHANISMS), ("blocks.1.cms.fast.hook_delta", ["blocks.1.cms.fast"]),
     ("blocks.1.hook_resid_pre", ["blocks.0.cms.fast", "blocks.0.cms.slow"]),
     ("blocks.0.cms.slow.hook_delta", ["blocks.0.cms.slow"])],
)  # fmt: skip
def test_what_an_edit_cuts_out_is_a_constant(toy, name, cut, grad):
    """Replaced by numbers: nothing raises, and no inner gradient crosses."""
    numbers = torch.randn(B, 8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.set_grad_enabled(grad):
        out = toy.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: numbers)])
    if grad:
        out.losses.mean().backward()
    expected = {m for m in MECHANISMS if "cms" not in m or m not in cut}
    if name.endswith("resid_post"):
        expected = {m for m in MECHANISMS if "selfmod" in m}
    assert moved(toy, out.state) == expected


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_whose_last_output_is_zero_runs_and_learns_nothing_inside(toy, grad):
    with torch.set_grad_enabled(grad):
        out = toy.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", lambda t, hook: torch.zeros_like(t))]
        )
    assert not any("cms" in m for m in moved(toy, out.state))
    assert torch.allclose(out.losses, torch.full((B, T), 37.0).double().log())


OUTER = [
    "hook_embed", "blocks.0.hook_resid_mid", "blocks.0.selfmod.hook_k", "blocks.1.cms.fast.hook_delta",
    "blocks.0.cms.hook_mix", "blocks.1.selfmod.hook_alpha", "blocks.0.selfmod.v.hook_fast_w1",
    "blocks.0.selfmod.eta.hook_fast_skip", "blocks.1.hook_resid_post",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTER)
def test_backward_hooks_see_the_outer_loss_alone(toy, name):
    """With CMS writes on: the gradient seen is that of the same tensors, firing by firing, and comes once each."""
    seen, held = [], []
    with toy.hooks(
        fwd_hooks=[(name, lambda t, hook: held.append(t + 0.0) or held[-1])],
        bwd_hooks=[(name, lambda g, hook: seen.append(g.clone()) and None)],
        allow_unfired=True,
    ):
        out = toy(TOKENS)
        assert not seen  # the inner gradients have been taken by now
        expected = torch.autograd.grad(out.losses.sum(), held, retain_graph=True, allow_unused=True)
        seen.clear()
        out.losses.sum().backward()
    reached = [g for g in expected if g is not None]
    assert len(seen) == len(reached) > 0
    assert any(g.any() for g in reached)
    for mine, theirs in zip(seen, reversed(reached), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_a_backward_edit_changes_the_outer_gradient_alone(toy):
    plain = toy(TOKENS)
    plain.losses.sum().backward()
    before = toy.embed.grad.clone()
    toy.zero_grad()
    with toy.hooks(bwd_hooks=[("blocks.0.cms.hook_out", lambda g, hook: 0 * g)]):
        out = toy(TOKENS)
        out.losses.sum().backward()
    same(out, plain)
    assert not torch.allclose(toy.embed.grad, before)
    assert toy.blocks[0].cms.levels["fast"].b_in.grad.abs().max() < 1e-12


def test_periods_that_do_not_fit_the_tokens(tokens):
    """A level whose period is longer than the text never writes, and asking for it says so."""
    config = dataclasses.replace(TOY, cms_levels=(CMSLevel("fast", 8), CMSLevel("never", 64)))
    model = HopeModel(config, seed=1)
    with torch.no_grad(), pytest.raises(HookNeverFiredError, match="never"):
        model.run_with_cache(TOKENS, names_filter="blocks.0.cms.never.hook_fast_in")


@pytest.mark.parametrize(
    "name", ["blocks.0.cms.fast.hook_write_gate", "blocks.0.selfmod.k.hook_fast_w2", "hook_gate"]
)
def test_an_edit_in_place_is_refused(toy, tokens, name):
    """Levels share their gate's tensor: closing one in place would silently close them all."""
    with torch.no_grad(), pytest.raises(BadInputError, match="in place"):
        toy.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t.zero_())])


@pytest.mark.parametrize("name", ["keys", "type", "half"])
def test_a_level_cannot_take_a_name_that_torch_uses(name):
    with pytest.raises(BadInputError, match=name):
        HopeModel(dataclasses.replace(TOY, cms_levels=(CMSLevel(name, 8),)))
