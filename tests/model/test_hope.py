"""What must hold of the model (design, section 3), each as a test, in float64 where exactness is claimed."""

import dataclasses
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_toys import CONFIGS, TOY

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import ModelConfig, published
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import freeze_hooks, norm_ratio

TRANSFORMER = dataclasses.replace(TOY, variant="transformer", context=16)


def stream(model, tokens, cuts):
    """Feed a stream in pieces that end at `cuts`, then finalize: all its losses, in order."""
    state, pieces = model.init_state(tokens.shape[0]), []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        losses, state = model.feed(state, tokens[:, start:stop])
        pieces.append(losses)
    return torch.cat([*pieces, model.finalize(state)], dim=1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 70), max_size=6).map(sorted),
    st.sampled_from(["default", "long-chunks", "three-levels"]),
)
def test_any_split_of_a_stream_gives_the_same_losses(cuts, name):
    model = HopeModel(CONFIGS[name], seed=1, dtype=torch.float64)
    tokens = torch.randint(0, TOY.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens).losses
        assert torch.equal(stream(model, tokens, cuts), whole)


def test_a_transformer_stream_too(tokens):
    model = HopeModel(TRANSFORMER, seed=1, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(
            stream(model, tokens, [3, 4, 40]), stream(model, tokens, []), rtol=0, atol=1e-12
        )
        assert torch.allclose(stream(model, tokens, [1]), model(tokens).losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", [0, 7, 8, 31, 33, 69])
def test_a_token_changes_nothing_before_it(model, tokens, at):
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % TOY.vocab_size
    with torch.no_grad():
        before, after = model(tokens).losses, model(changed).losses
    first = max(at - 1, 0)  # the loss at t - 1 has token t as its target
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.allclose(before[:, first:], after[:, first:])


def test_each_row_equals_its_own_run(model, tokens):
    with torch.no_grad():
        together = model(tokens).losses
        for i in range(len(tokens)):
            alone = model(tokens[i : i + 1]).losses[0]
            assert torch.allclose(together[i], alone, rtol=1e-13, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 69), min_size=3, max_size=3))
def test_padding_has_no_effect(lengths):
    model = HopeModel(TOY, seed=1, dtype=torch.float64)
    tokens = torch.randint(0, TOY.vocab_size, (3, 70), generator=torch.Generator().manual_seed(2))
    garbage = tokens.clone()
    for i, n in enumerate(lengths):
        garbage[i, n + 1 :] = 5
    with torch.no_grad():
        out = model(garbage, torch.tensor(lengths))
        for i, n in enumerate(lengths):
            assert int(out.scored[i].sum()) == n
            assert (out.losses[i, n:] == 0).all()
            if n:
                alone = model(tokens[i : i + 1, : n + 1])
                assert torch.allclose(out.losses[i, :n], alone.losses[0], rtol=1e-13, atol=1e-13)
                for mine, theirs in zip(out.state.layers, alone.state.layers, strict=True):
                    assert torch.allclose(
                        mine.selfmod.groups[0].w2[i], theirs.selfmod.groups[0].w2[0], atol=1e-13
                    )
                    assert torch.allclose(mine.cms[0].w_in[i], theirs.cms[0].w_in[0], atol=1e-13)


def test_every_memory_gets_a_gradient_through_writes(toy, tokens):
    toy(tokens).losses.mean().backward()
    for name, parameter in toy.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name


def test_no_gradient_reaches_the_generators_when_it_is_stopped(tokens):
    model = HopeModel(CONFIGS["stop"], seed=1, dtype=torch.float64)
    model(tokens).losses.mean().backward()
    for memory in ("k", "v", "eta", "alpha"):
        assert not model.blocks[0].selfmod.memories[memory].w2.grad.any()
    assert model.blocks[0].selfmod.memories["memory"].w2.grad.any()


def test_truncation_cuts_the_gradient_and_not_the_loss(toy, tokens):
    cut = HopeModel(dataclasses.replace(TOY, truncate_ticks=2), seed=1, dtype=torch.float64)
    assert torch.equal(cut(tokens).losses, toy(tokens).losses)
    last = 8 * 6 + 1
    (through,) = torch.autograd.grad(
        toy(tokens).losses[:, last:].sum(), toy.blocks[0].selfmod.memories["eta"].w2
    )
    (short,) = torch.autograd.grad(
        cut(tokens).losses[:, last:].sum(), cut.blocks[0].selfmod.memories["eta"].w2
    )
    assert float((through - short).norm()) > 0


def test_closed_gates_write_exactly_nothing(model, tokens):
    with torch.no_grad(), model.hooks(fwd_hooks=freeze_hooks(model)):
        state = model(tokens).state
    fresh = model.init_state(len(tokens))
    for layer, start in zip(state.layers, fresh.layers, strict=True):
        if layer.selfmod is not None:
            for group, zero in zip(layer.selfmod.groups, start.selfmod.groups, strict=True):
                assert (group is None) == (zero is None)
                assert all(torch.equal(a, b) for a, b in zip(group or (), zero or (), strict=True))
        assert all(torch.equal(lv.w_in, z.w_in) for lv, z in zip(layer.cms, start.cms, strict=True))


def test_one_closed_token_adds_only_what_others_see_of_it(toy, tokens):
    """Closing single tokens must differ from closing none and from closing all."""

    def run(gate):
        with torch.no_grad(), toy.hooks(fwd_hooks=[("hook_gate", gate)]):
            return toy(tokens).losses

    def drop_first(gate, hook):
        gate = gate.clone()
        gate[:, 0] = 0
        return gate

    none, one, every = (run(f) for f in (lambda g, hook: None, drop_first, lambda g, hook: g * 0))
    assert not torch.allclose(none, one)
    assert not torch.allclose(one, every)


def test_an_untrained_model_scores_ln_v():
    """Tied embeddings of std 0.02 under a final norm: logits have a variance of d 0.02^2, nearly nothing."""
    config = ModelConfig(dim=64, layers=2, context=64, heads=2)
    tokens = torch.randint(0, config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        model = HopeModel(config, seed=seed)
        with torch.no_grad(), model.hooks(fwd_hooks=freeze_hooks(model)):
            loss = float(model(tokens).losses.mean())
        assert abs(loss / math.log(config.vocab_size) - 1) < 0.02


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_fast_weights_keep_their_size_over_a_context_at_initialisation(dim):
    config = ModelConfig(vocab_size=512, dim=dim, layers=2, context=256, heads=2)
    tokens = torch.randint(0, 512, (2, 257), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        model = HopeModel(config, seed=seed)
        with torch.no_grad():
            state = model(tokens).state
        assert 0.5 < norm_ratio(model, state) < 2


def test_the_published_rule_collapses():
    """Retention of about a half leaves 0.4 % of the weights after 8 tokens: relative drift 1.0, and no adaptation."""
    config = published(ModelConfig(vocab_size=512, dim=64, layers=2, context=64, heads=2))
    model = HopeModel(config, seed=0)
    tokens = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.*.selfmod.k.hook_fast_w2")
    fast = cache["blocks.0.selfmod.k.hook_fast_w2"]  # (B, writes, out, in)
    meta = model.blocks[0].selfmod.memories["k"].w2.detach()
    share = (fast.flatten(2).norm(dim=2) / meta.norm()).mean(0)
    assert share[0] < 0.02
    assert share[1] < 1e-3
    drift = ((fast - meta).flatten(2).norm(dim=2) / meta.norm()).mean(0)
    assert abs(float(drift[-1]) - 1) < 1e-3


def test_peek_reads_without_writing(toy, tokens):
    with torch.no_grad():
        _, state = toy.feed(toy.init_state(3), tokens[:, :13])
        logits = toy.peek(state)
        assert logits.shape == (3, 5, TOY.vocab_size)
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 9:13].flatten(), reduction="none"
        )
        assert torch.allclose(toy.finalize(state).flatten(), expected)


def test_step_is_the_same_primitive(toy, tokens):
    state, losses = toy.init_state(3), []
    for start in range(0, 64, 8):
        part, state = toy.step(state, tokens[:, start : start + 8], tokens[:, start + 8])
        losses.append(part)
    assert torch.equal(torch.cat(losses, 1), toy(tokens[:, :65]).losses)


def test_a_state_given_by_the_caller_is_never_overwritten(toy, tokens):
    with torch.no_grad():
        state = toy(tokens[:, :33]).state
        copies = [layer.selfmod.groups[0].w2.clone() for layer in state.layers]
        first = toy(tokens[:, 32:65], state=state).losses
        assert all(
            torch.equal(c, layer.selfmod.groups[0].w2) for c, layer in zip(copies, state.layers, strict=True)
        )
        assert torch.equal(toy(tokens[:, 32:65], state=state).losses, first)


def test_evaluation_without_gradients_gives_the_same_numbers(model, tokens):
    """Without an outer gradient states are written in place; the losses must not notice.

    Closed tokens are left out of sums then, so that a selective gate moves the last bits.
    """
    with torch.no_grad():
        quiet = model(tokens).losses
    expected = model(tokens).losses.detach()
    if model.config.surprise_threshold < 1.0:
        assert torch.equal(quiet, expected)
    torch.testing.assert_close(quiet, expected, rtol=0, atol=1e-12)


def test_a_window_keeps_one_state_not_one_a_tick(toy, tokens, monkeypatch):
    """A state holds fast weights of every row: 64 of them were 1.6 GB of `small`."""
    held = []

    def watched(*args, **kwargs):
        tick, state = primitive(*args, **kwargs)
        held.append(weakref.ref(state.layers[0].cms[0].change_in.left))
        return tick, state

    primitive = toy._tick
    monkeypatch.setattr(toy, "_tick", watched)
    with torch.no_grad():
        out = toy(tokens)
        assert len(held) > 4
        assert [ref() is not None for ref in held] == [False] * (len(held) - 1) + [True]
        del out
        held.clear()
        _, state = toy.feed(toy.init_state(len(tokens)), tokens)
    assert len(held) > 4
    assert [ref() is not None for ref in held] == [False] * (len(held) - 1) + [True]
    assert state.position


def test_inference_mode_is_refused_with_the_reason(toy, tokens):
    with torch.inference_mode(), pytest.raises(BadInputError, match="no_grad"):
        toy(tokens)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 9), 99), "range over 99..99"),
        (torch.zeros(1, 9), "integers"),
        (torch.zeros(9, dtype=torch.int64), "integers"),
        (torch.zeros(1, 1, dtype=torch.int64), "at least two"),
    ],
)
def test_tokens_that_cannot_be(toy, bad, message):
    with pytest.raises(BadInputError, match=message):
        toy(bad)


def test_a_frozen_model_needs_no_gradient_anywhere(toy, tokens):
    expected = toy(tokens).losses.detach()
    for parameter in toy.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(toy(tokens).losses, expected)
