"""What closed gates leave undone without an outer gradient: the work, and nothing of the result."""

import dataclasses

import pytest
import torch
from model_toys import CONFIGS, TOY

import hopeprobe.model.hope as hope
from hopeprobe.model.config import GateConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.loss import gradients, score
from hopeprobe.model.selfmod import SelfMod
from hopeprobe.model.skip import packed, runs
from hopeprobe.model.titans import Titans

ROWS = 8
WRITING = [name for name in CONFIGS if HopeModel(CONFIGS[name]).config.writes and name != "no-surprise"]


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (ROWS, 71), generator=torch.Generator().manual_seed(0))


def chance(share, seed=0):
    """A hook that lets that share of the tokens pass; it begins again with every window."""
    drawn = torch.Generator().manual_seed(seed)
    return lambda gate, _: (torch.rand(gate.shape, generator=drawn) < share).to(gate) * gate


def only(row, at):
    """A hook that lets one token of a tick pass."""

    def fn(gate, _):
        opened = torch.zeros_like(gate)
        opened[row, at] = 1.0
        return opened

    return fn


def tensors(state):
    """Every tensor of a state, what CMS levels were written assembled: how it is held depends on what was left out."""
    for layer in state.layers:
        for level in layer.cms:
            yield from (level.w_in, level.w_out)
        for held in (layer.selfmod.groups if layer.selfmod else (), [layer.titans]):
            for memory in held:
                yield from (memory or ())[:4]  # not the convolution's tail, which reading moves


def assert_same(one, other):
    torch.testing.assert_close(one.losses, other.losses.detach(), rtol=0, atol=1e-12)
    for a, b in zip(tensors(one.state), tensors(other.state), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rule", "budget"), [("quantile", 0.05), ("quantile", 0.4), ("random", 0.1)])
@pytest.mark.parametrize("name", WRITING)
def test_a_budget_gives_what_it_gives_with_all_work_done(name, rule, budget, tokens):
    config = dataclasses.replace(CONFIGS[name], gate=GateConfig(rule, budget=budget))
    model = HopeModel(config, dtype=torch.float64)
    with torch.no_grad():
        quiet = model(tokens)
    assert_same(quiet, model(tokens))


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("name", ["default", "long-chunks", "three-levels", "titans-window", "static-mlp"])
def test_gates_that_a_hook_closes(name, share, heavy, tokens, monkeypatch):
    """Row by row, as large models write, and in one go; from a fresh state and from one that a caller holds."""
    monkeypatch.setattr("hopeprobe.model.skip._HEAVY", 0 if heavy else 2**40)
    model = HopeModel(CONFIGS[name], dtype=torch.float64)
    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_gate", chance(share))]):
        quiet = model(tokens[:, :33])
        after = model(tokens[:, 32:], state=quiet.state)
    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_gate", chance(share))]):
        monkeypatch.setattr(hope, "on_host", lambda _: False)
        assert_same(quiet, full := model(tokens[:, :33]))
        assert_same(after, model(tokens[:, 32:], state=full.state))


def test_gates_of_single_mechanisms(tokens):
    """The head's gradient is asked for wherever any level lets a token pass, whatever the model's gate says."""
    model = HopeModel(CONFIGS["three-levels"], dtype=torch.float64)
    points = ["blocks.0.cms.fast.hook_write_gate", "blocks.1.cms.slow.hook_write_gate"]
    points.append("blocks.1.selfmod.hook_write_gate")

    def hooks():
        return [(name, chance(0.2, i)) for i, name in enumerate(points)]

    with torch.no_grad(), model.hooks(fwd_hooks=hooks()):
        quiet = model(tokens)
    with model.hooks(fwd_hooks=hooks()):
        assert_same(quiet, model(tokens))


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("name", ["default", "published", "titans-layer"])
def test_a_closed_row_keeps_its_state_bit_for_bit(name, heavy, tokens, monkeypatch):
    monkeypatch.setattr("hopeprobe.model.skip._HEAVY", 0 if heavy else 2**40)
    model = HopeModel(CONFIGS[name], dtype=torch.float64)
    with torch.no_grad():
        before = model(tokens[:, :65]).state

        def close(gate, _):
            gate = gate.clone()
            gate[[0, 3, 4]] = 0.0
            return gate

        with model.hooks(fwd_hooks=[("hook_gate", close)]):
            after = model(torch.cat([tokens[:, :1], tokens], 1)[:, :65], state=before).state
    for a, b in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(a[[0, 3, 4]], b[[0, 3, 4]])
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(tensors(before), tensors(after), strict=True))


def spied(monkeypatch, owner, name, see):
    real = getattr(owner, name)

    def spy(*args, **named):
        see(*args, **named)
        return real(*args, **named)

    monkeypatch.setattr(owner, name, spy)


def test_one_open_token_is_the_work_of_one_token(tokens, monkeypatch):
    config = dataclasses.replace(TOY, dim=16, gate=GateConfig("quantile", budget=0.1))
    model = HopeModel(config, dtype=torch.float64)
    written, generated, asked = [], [], []
    spied(
        monkeypatch, SelfMod, "_write_group", lambda _, m, f, some, *a, **k: written.append(some.k.shape[:2])
    )
    spied(monkeypatch, SelfMod, "_generate", lambda _, u, w: generated.append(len(u)))
    spied(monkeypatch, hope, "gradients", lambda e, t, kept, wanted: asked.append(int(wanted.sum())))
    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_gate", only(5, 3))]):
        state = model(tokens[:, :9]).state
    assert written == [(1, 1)] * config.layers
    assert generated == [1] * config.layers
    assert asked == [1]
    tokens_held = [layer.cms[0].change_in.left.any(-1).sum(1) for layer in state.layers]
    assert [held.tolist() for held in tokens_held] == [[0] * 5 + [n] + [0] * 2 for n in (4, 1)]


def test_a_titans_write_of_one_row(tokens, monkeypatch):
    model = HopeModel(CONFIGS["titans-layer"], dtype=torch.float64)
    written = []
    spied(monkeypatch, Titans, "_write", lambda _, made, *a, **k: written.append(made.k.shape[:2]))
    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_gate", only(2, 1))]):
        model(tokens[:, : model.config.tick + 1])
    assert written == [(1, 1)] * model.config.layers


def test_watched_memories_generate_for_all(tokens):
    config = dataclasses.replace(TOY, gate=GateConfig("quantile", budget=0.1))
    model = HopeModel(config, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        quiet = model(tokens)
        with model.hooks(fwd_hooks=[("blocks.0.selfmod.hook_eta", lambda x, _: seen.append(x.shape))]):
            assert_same(model(tokens), quiet)
    assert set(seen) == {(ROWS, 8), (ROWS, 6)}


def test_gradients_from_what_was_kept():
    hidden, table = torch.randn(9, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, -1, 5, 10, 2, 2, -1, 7])
    kept = []
    losses, none = score(hidden, table, target, kept, gradient=False)
    expected_losses, expected = score(hidden, table, target)
    assert torch.equal(losses, expected_losses)
    assert none.shape == (0, 4)
    for wanted in (torch.ones(9), torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0]), torch.zeros(9)):
        got = gradients(table, target, kept, wanted.bool())
        torch.testing.assert_close(got, expected * wanted[:, None], rtol=0, atol=1e-14)


def test_rows_and_tokens_that_are_left():
    live = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]).bool()
    assert runs(live.any(1), 2**30) == [slice(1, 3), slice(4, 5)]
    assert runs(live.any(1), 1) == [slice(1, 5)]
    assert runs(live[:1].any(1), 1) == []
    (got,) = packed(live[1:3], torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert got.tolist() == [[2, 1], [4, 6]]
