"""What mapped points show and change, against a loop over tokens in NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chunked import CHUNK
from scipy.special import erf, expit, logsumexp

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.mapping import subject_of
from hopeprobe.probes.readings import Reducing
from hopeprobe.subject import MissingCapability

FAST = "blocks.{}.memory.hook_fast_w"


def loop(model, tokens, keep=lambda layer, delta: delta):
    """Of one window, token by token: losses [T], fast weights after each chunk, each layer's level input and delta."""
    p = {name: t.detach().double().numpy() for name, t in model.named_parameters()}
    inputs, targets = tokens[:-1], tokens[1:]
    x, fast, levels = p["embed.weight"][inputs], [], []
    for i in range(2):
        q = {name.removeprefix(f"layers.{i}."): t for name, t in p.items() if name.startswith(f"layers.{i}.")}
        weights, states, read = q["memory.start"], [], np.zeros_like(x)
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            change, forget = np.zeros_like(weights), []
            for t, row in enumerate(part):
                key = q["memory.to_key.weight"] @ row
                key = key / max(np.linalg.norm(key), 1e-12)
                read[start + t] = weights @ key
                step = 0.5 * expit(q["memory.to_step.weight"][0] @ row + q["memory.to_step.bias"][0])
                change += np.outer(step * (q["memory.to_value.weight"] @ row - read[start + t]), key)
                forget.append(q["memory.to_forget.weight"][0] @ row + q["memory.to_forget.bias"][0])
            if len(part) == CHUNK:
                weights = (1 - 0.1 * expit(np.mean(forget))) * weights + change
                states.append(weights)
        x = x + read
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        h = (normal * q["level.0.weight"] + q["level.0.bias"]) @ q["level.1.weight"].T + q["level.1.bias"]
        delta = keep(i, (h * (1 + erf(h / np.sqrt(2))) / 2) @ q["level.3.weight"].T + q["level.3.bias"])
        levels.append((x, delta))
        x = x + delta
        fast.append(states)
    logits = x @ p["head.weight"].T + p["head.bias"]
    return logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets], fast, levels


@pytest.fixture
def subject(model, edited):
    return subject_of(model.double(), edited("model", "context", 16))


@pytest.fixture
def tokens():
    return torch.randint(23, (3, 17), generator=torch.Generator().manual_seed(1))


def test_losses_and_every_point_are_those_of_the_loop(subject, model, tokens):
    out, cache = subject.module.run_with_cache(tokens, torch.tensor([16, 11, 0]))
    assert out.scored.sum(1).tolist() == [16, 11, 0]
    for row, length in ((0, 16), (1, 11)):
        losses, fast, levels = loop(model, tokens[row].numpy())
        np.testing.assert_allclose(out.losses[row, :length].numpy(force=True), losses[:length], rtol=1e-10)
        for i in range(2):
            shown = cache[FAST.format(i)]
            assert shown.shape == (3, 4, 8, 8)
            np.testing.assert_allclose(shown[row], np.stack(fast[i]), rtol=1e-11, atol=1e-12)
            level = f"blocks.{i}.cms.fast"
            for name, expected in (("in", levels[i][0]), ("delta", levels[i][1]), ("out", sum(levels[i]))):
                np.testing.assert_allclose(
                    cache[f"{level}.hook_{name}"][row], expected, rtol=1e-10, atol=1e-11
                )
    assert not out.losses[1, 11:].any()
    assert not out.losses[2].any()


def test_fast_weights_are_told_at_their_positions(subject, model, tokens):
    """As probes read them: hooks on only while the wanted position's tick is told."""
    reducing = Reducing(subject, {FAST.format(1): lambda fast: fast.flatten(1)}, frozenset([8, 16]))
    batch = SimpleNamespace(lengths=np.array([16, 9, 16]), tokens=tokens.numpy())
    with reducing.watching():
        subject.run(tokens)
    read = reducing.readings(batch, {})
    assert read.positions[FAST.format(1)].tolist() == [8, 16]
    _, fast, _ = loop(model, tokens[0].numpy())
    values = read[FAST.format(1)]
    for at, chunk in ((0, 1), (1, 3)):
        np.testing.assert_allclose(values[0, at], fast[1][chunk].ravel(), rtol=1e-11, atol=1e-12)
    assert values[1, 1].isnan().all()


@pytest.mark.parametrize("name", ["hook_delta", "hook_out", "hook_in"])
def test_an_edit_goes_on_from_where_it_is_made(subject, model, tokens, name):
    """An edit of `hook_out`, a sum, changes what the module gives; one of `hook_in` what goes in, for the MLP alone."""
    point = f"blocks.0.cms.fast.{name}"
    edited = subject.module.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: x * 2)])
    _, _, levels = loop(model, tokens[0].numpy())
    x, delta = levels[0]
    new = {"hook_delta": 2 * delta, "hook_out": 2 * (x + delta) - x}.get(name)
    if new is None:  # a LayerNorm comes first: twice the input is the same input, but for its epsilon
        new = delta
    losses, _, _ = loop(model, tokens[0].numpy(), lambda i, d: new if i == 0 else d)
    rtol = 1e-3 if name == "hook_in" else 1e-10
    np.testing.assert_allclose(edited.losses[0].numpy(force=True), losses, rtol=rtol)
    plain = subject.run(tokens).losses
    if name != "hook_in":
        assert (edited.losses - plain).abs().max() > 1e-3


def test_frozen_is_reading_with_the_meta_weights(subject, model, tokens):
    frozen = subject.module.run_with_hooks(tokens, fwd_hooks=subject.freeze_hooks())
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.to_step.bias.fill_(-1e9)
            layer.memory.to_forget.bias.fill_(-1e9)
    losses, fast, _ = loop(model, tokens[0].numpy())
    np.testing.assert_allclose(frozen.losses[0].numpy(force=True), losses, rtol=1e-10)
    np.testing.assert_array_equal(fast[0][-1], model.layers[0].memory.start.detach().numpy())


def test_the_module_is_as_it_was_whatever_happens(subject, model, tokens):
    methods = {name: vars(module).get("forward") for name, module in model.named_modules()}

    def fail(tensor, hook):
        assert "forward" in vars(model.layers[1]), "nothing was wrapped while it ran"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.module.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", fail)])
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == methods
    model.layers[0].forward = own = model.layers[0].forward  # somebody's own wrapping stays
    subject.module.run_with_cache(tokens)
    assert vars(model.layers[0])["forward"] == own


def test_idle_points_wrap_nothing(subject, model, tokens, monkeypatch):
    monkeypatch.setattr(type(subject.module), "_watched", lambda *_: pytest.fail("a method was wrapped"))
    subject.run(tokens)


def test_nothing_goes_on_from_the_end_of_a_window(subject, tokens):
    with pytest.raises(MissingCapability, match="windows begin afresh"):
        subject.run(tokens, None, subject.run(tokens).state)


def test_writes_of_another_number_are_no_measurement(subject, tokens, monkeypatch, model):
    whole = type(model.layers[0].memory).forward

    def one_less(self, x):
        read, states = whole(self, x)
        return read, {"all.weights": states["all.weights"][:, :-1]}

    monkeypatch.setattr(type(model.layers[0].memory), "forward", one_less)
    with pytest.raises(MeasurementError, match="3 writes of 16 tokens, and a period of 4 makes 4"):
        subject.module.run_with_cache(tokens)


def test_windows_and_hooks_that_do_not_fit_are_named(subject, tokens):
    with pytest.raises(BadInputError, match="at least two tokens"):
        subject.run(tokens[:, :1])
    with pytest.raises(BadInputError, match=r"blocks.0.hook_resid_post: .*a replacement has the shape"):
        subject.module.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x[:, :3])]
        )


def test_fast_weights_are_kept_only_where_somebody_awaits_them(subject, tokens, monkeypatch):
    """They are large, and a probe of losses listens to the same clock."""
    watched = []
    whole = type(subject.module)._watched

    def watching(self, module, *rest):
        watched.append(module)
        return whole(self, module, *rest)

    monkeypatch.setattr(type(subject.module), "_watched", watching)
    subject.module.run_with_cache(tokens, names_filter="hook_surprise")
    assert watched == []
    reducing = Reducing(subject, {FAST.format(1): lambda fast: fast.flatten(1)}, frozenset([8]))
    with reducing.watching():
        subject.run(tokens)
    assert len(watched) == 1
    assert not any(point.awaited or point.active for point in subject.module.hook_dict.values())
