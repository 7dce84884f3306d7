"""bf16 activations: what they change is their rounding; what is kept stays float32; a run says which it is.

bf16 has 8 significant bits: to round a number moves it by up to u = 2^-8 of itself. A layer rounds the factors and the
answers of some five products, and independent roundings add up like a walk: over the two layers of a toy to about
sqrt(2 * 5 * 3) u, 2 %. That bounds losses, as a mean square, and the gradient as a whole; without residual stream, as
published, an error is not diluted by what passes a layer unchanged: there the bound is 4 times that.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_toys import CONFIGS, TOY

from hopeprobe.errors import BadInputError
from hopeprobe.model.checkpoint import read, save, step_path
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.measure import norm_ratio
from hopeprobe.model.precision import linear, rounded
from hopeprobe.model.state import map_state
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import TokenData

FEW = ("default", "no-cms", "titans-window", "transformer")
U = 2.0**-8
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in CONFIGS]
)
TOKENS = torch.randint(0, 37, (4, 65), generator=torch.Generator().manual_seed(0))
#: Here all products are memories' own, or with their meta weights.
SAME = ("no-cms",)


def scored(name, activations=None):
    model = HopeModel(CONFIGS[name], seed=1)
    model.activations = activations
    out = model(TOKENS)
    out.losses.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return model, out, gradient


@each
def test_losses_and_gradients_are_off_by_a_rounding(name):
    (_, wide, expected), (model, near, gradient) = scored(name), scored(name, torch.bfloat16)
    loose = 4 if name == "published" else 1
    assert near.losses.dtype == gradient.dtype == torch.float32
    off = (near.losses - wide.losses).square().mean().sqrt() / wide.losses.mean()
    assert off < loose * 0.02
    assert (gradient - expected).norm() / expected.norm() < loose * 0.02
    assert (off == 0) == (name in SAME)  # it does do something
    assert torch.isclose(
        norm_ratio(model, near.state), norm_ratio(model, wide.state), rtol=loose * 0.01, equal_nan=True
    )


@each
def test_whatever_is_kept_is_float32(name):
    model, out, _ = scored(name, torch.bfloat16)
    kept = set()
    map_state(lambda t: kept.add(t.dtype) or t, out.state)
    assert kept <= {torch.float32, torch.int64}
    with torch.no_grad():
        _, state = model.feed(model.init_state(4), TOKENS[:, :45])  # an unfinished tick, pending chunks
        map_state(lambda t: kept.add(t.dtype) or t, state)
        assert model.peek(state).dtype == torch.float32
    assert kept <= {torch.float32, torch.int64}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_stream_is_its_windows_in_bf16_too():
    model, out, _ = scored("default", torch.bfloat16)
    with torch.no_grad():
        parts, state = [], model.init_state(4)
        for piece in torch.split(TOKENS, 13, dim=1):
            losses, state = model.feed(state, piece)
            parts.append(losses)
        parts.append(model.finalize(state))
    assert torch.allclose(torch.cat(parts, 1), out.losses, atol=1e-5)


def test_the_product():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 5, 16), (7, 16), (7,))
    )
    of = rounded([w, b], torch.bfloat16)
    out = linear(x, w, b, of)
    assert out.dtype == torch.bfloat16
    near_x, near_w, near_b = (t.detach().bfloat16().double() for t in (x, w, b))
    exact = near_x @ near_w.mT + near_b
    assert (out.double() - exact).abs().max() <= U * 1.01 * exact.abs().max()
    grad = torch.randn(out.shape, generator=generator).bfloat16()
    out.backward(grad)
    wanted = (
        grad.double() @ near_w,
        torch.einsum("bno,bni->oi", grad.double(), near_x),
        grad.double().sum((0, 1)),
    )
    for found, want in zip((x.grad, w.grad, b.grad), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - want).abs().max() <= U * 1.01 * want.abs().max()


def test_gradients_of_ticks_are_summed_in_float32():
    """300 equal ones in bf16 would come to a stop at 256 of them."""
    x, w = torch.ones(1, 1, 1), torch.ones(1, 1, requires_grad=True)
    of = rounded([w], torch.bfloat16)
    sum(linear(x, w, None, of) for _ in range(300)).sum().backward()
    assert w.grad.item() == 300


def test_without_rounding_it_is_torchs_own():
    x, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    assert rounded([], None) is None
    assert torch.equal(linear(x, w, b, None), F.linear(x, w, b))


# -- in a run -----------------------------------------------------------------------------------------------------

MODEL = dataclasses.replace(TOY, vocab_size=11, context=16, embed_std=0.1)
CONFIG = TrainConfig(
    steps=50, batch=4, learning_rate=1e-2, warmup=2, checkpoint_every=50, eval_every=50, eval_tokens=64,
    precision="bf16",
)  # fmt: skip


def counting():
    """The next token is known: there is something to learn."""
    rng = np.random.default_rng(0)
    text = [(rng.integers(0, 10) + np.arange(n)) % 10 for n in range(20, 80)]
    return TokenData.from_documents(text, name="counting", vocab_size=11, end_of_text=10)


DATA = counting()


def curve(folder, variant, precision):
    config = dataclasses.replace(CONFIG, precision=precision)
    run = train(dataclasses.replace(MODEL, variant=variant), config, DATA, folder, device="cpu")
    found = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return run, np.array(found).reshape(10, 5).mean(1)


@pytest.mark.parametrize(
    "variant",
    ["transformer", *(pytest.param(v, marks=pytest.mark.slow) for v in ("full", "titans", "hope-attention"))],
)
def test_fifty_steps_learn_the_same(tmp_path, variant):
    run, wide = curve(tmp_path / "float32", variant, "float32")
    other, near = curve(tmp_path / "bf16", variant, "bf16")
    assert wide[-1] < 0.8 * wide[0]
    assert np.abs(near / wide - 1).max() < 0.05
    assert (near != wide).any()
    assert run.model.activations is None
    assert other.model.activations == torch.bfloat16
    held = read(step_path(tmp_path / "bf16", 50))
    assert {w.dtype for w in held.weights.values()} == {torch.float32}
    assert {t.dtype for s in held.optimizer["state"].values() for t in s.values()} == {torch.float32}
    assert held.train["precision"] == "bf16"
    assert other.subject().module.activations is None  # measured as a checkpoint that is opened is


SHORT = dataclasses.replace(CONFIG, steps=2, checkpoint_every=1)


def test_a_run_is_resumed_in_its_own_precision(tmp_path):
    train(MODEL, dataclasses.replace(SHORT, steps=1), DATA, tmp_path, device="cpu")
    with pytest.raises(BadInputError, match="precision was 'bf16', is 'float32'"):
        train(
            MODEL, dataclasses.replace(SHORT, precision="float32"), DATA, tmp_path, resume=True, device="cpu"
        )
    run = train(MODEL, SHORT, DATA, tmp_path, resume=True, device="cpu")
    assert run.step == 2
    assert run.model.activations == torch.bfloat16
    whole = train(MODEL, SHORT, DATA, tmp_path / "whole", device="cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True)
    )


def test_a_checkpoint_from_before_there_was_a_choice_is_float32(tmp_path):
    config = dataclasses.replace(SHORT, precision="float32")
    train(MODEL, dataclasses.replace(config, steps=1), DATA, tmp_path, device="cpu")
    path = step_path(tmp_path, 1)
    old = read(path)
    del old.train["precision"]
    save(path, old)
    with pytest.raises(BadInputError, match="precision was 'float32', is 'bf16'"):
        train(MODEL, SHORT, DATA, tmp_path, resume=True, device="cpu")
    assert train(MODEL, config, DATA, tmp_path, resume=True, device="cpu").step == 2


def test_a_precision_that_there_is_not():
    with pytest.raises(BadInputError, match="precision is 'fp8', must be float32 or bf16"):
        TrainConfig(precision="fp8")
