"""The Transformer baseline against one written in plain PyTorch: same data, same order, 500 steps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_toys import TOY
from torch import nn

from hopeprobe.model.hope import HopeModel
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import TokenData
from hopeprobe.tokens.windows import TrainWindows

CONFIG = dataclasses.replace(
    TOY, variant="transformer", vocab_size=211, dim=32, layers=2, context=32, heads=2, embed_std=0.02
)


class PlainBlock(nn.Module):
    """Pre-norm: x + attention(LN x), then x + MLP(LN x); rotary positions as complex numbers."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            part.reshape(b, n, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        half = q.shape[-1] // 2
        turn = torch.polar(
            torch.ones(n, half), torch.outer(torch.arange(n).float(), 1e4 ** (-torch.arange(half) / half))
        )
        q, k = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
        q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm_2(x))


class Plain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList([PlainBlock(config.dim, config.heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def begin_as(self, model):
        """Take over initial weights: another initialisation would differ by chance."""
        ours = dict(model.named_parameters())
        self.embed.weight.copy_(ours["embed"])
        for i, block in enumerate(self.blocks):
            block.qkv.weight.copy_(ours[f"blocks.{i}.attention.w_qkv"])
            block.project.weight.copy_(ours[f"blocks.{i}.attention.w_out"])
            for layer, name in ((block.mlp[0], "in"), (block.mlp[2], "out")):
                layer.weight.copy_(ours[f"blocks.{i}.mlp.w_{name}"])
                layer.bias.copy_(ours[f"blocks.{i}.mlp.b_{name}"])


@pytest.fixture(scope="module")
def text():
    """A Markov chain of 211 words, so that there is something to learn, and something that cannot be."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(211, 0.03), size=211).cumsum(axis=1)
    documents = []
    for _ in range(400):
        tokens = [int(rng.integers(211))]
        for _ in range(60):
            tokens.append(min(int(np.searchsorted(table[tokens[-1]], rng.random())), 210))
        documents.append(tokens)
    return TokenData.from_documents(documents, name="chain", vocab_size=211, end_of_text=0)


def trained_plainly(model, data, config):
    """Losses of every step."""
    windows = TrainWindows(data, CONFIG.context, config.batch, config.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup)
        loss = model(torch.from_numpy(windows.batch_at(step)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


@pytest.mark.parametrize("steps", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_it_learns_as_a_plain_one_does(text, tmp_path, steps):
    config = TrainConfig(steps=steps, batch=8, learning_rate=3e-3, warmup=10, eval_tokens=500)
    plain = Plain(CONFIG)
    with torch.no_grad():
        plain.begin_as(HopeModel(CONFIG, config.seed))
    expected = trained_plainly(plain, text, config)
    train(CONFIG, config, text, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(losses[:5], expected[:5], rtol=1e-5)
    last = slice(-min(50, steps // 2), None)
    assert losses[last].mean() == pytest.approx(expected[last].mean(), rel=0.01)
    print(f"last {-last.start} steps: {losses[last].mean():.4f} here, {expected[last].mean():.4f} plainly")
    assert losses[last].mean() < losses[0] - (0.02 if steps < 100 else 1.5), "else nothing was compared"
