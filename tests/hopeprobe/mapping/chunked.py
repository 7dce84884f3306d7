"""A model that hopeprobe knows nothing of: two layers, each an MLP and a linear memory written by the delta rule."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 4


class Memory(nn.Module):
    """W <- (1 - a) W + lr sum (v - W k) k^T after each chunk of CHUNK tokens; reads with W as it stood before it."""

    def __init__(self, dim):
        super().__init__()
        self.start = nn.Parameter(torch.randn(dim, dim) * 0.3)
        self.to_key, self.to_value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_step, self.to_forget = nn.Linear(dim, 1), nn.Linear(dim, 1)

    def forward(self, x):
        weights, out, all_weights = self.start.expand(len(x), -1, -1), [], []
        for part in x.split(CHUNK, dim=1):
            key, value = F.normalize(self.to_key(part), dim=-1), self.to_value(part)
            out.append(torch.einsum("bij,btj->bti", weights, key))
            if part.shape[1] < CHUNK:
                break
            step = self.to_step(part).sigmoid() * 0.5
            forget = self.to_forget(part).mean(1, keepdim=True).sigmoid() * 0.1
            error = value - out[-1]
            weights = (1 - forget) * weights + torch.einsum("bti,btj->bij", step * error, key)
            all_weights.append(weights)
        states = torch.stack([self.start.expand(len(x), -1, -1), *all_weights], dim=1)
        return torch.cat(out, dim=1), {"all.weights": states}


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.memory = Memory(dim)
        self.level = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x):
        read, _ = self.memory.forward(x)  # past __call__, where torch's own hooks do not look
        x = x + read
        return x + self.level(x)


class Model(nn.Module):
    def __init__(self, vocab=23, dim=8, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(self.dropout(x))}


def lying(**_: object) -> nn.Module:
    """Says what it does not give."""
    return {}  # type: ignore[return-value]


def failing(**_: object) -> nn.Module:
    """Is a builder, and cannot be called."""
    raise TypeError("no model today")


def document():
    """What a map of it says, as plain data."""
    memory = "layers.{layer}.memory"
    return {
        "model": {"tokenizer": "toy", "context": 16, "logits": "output.logits"},
        "points": {
            "blocks.{layer}.hook_resid_post": "layers.{layer}",
            "blocks.{layer}.memory.hook_out": {"module": memory, "value": "output.0"},
            "blocks.{layer}.memory.hook_step": {"module": f"{memory}.to_step", "dims": "batch pos one"},
            "blocks.{layer}.memory.hook_forget": {"module": f"{memory}.to_forget", "dims": "batch pos one"},
            "blocks.{layer}.cms.fast.hook_in": {"module": "layers.{layer}.level", "value": "input.0"},
            "blocks.{layer}.cms.fast.hook_delta": "layers.{layer}.level",
            "blocks.{layer}.cms.fast.hook_out": {
                "module": "layers.{layer}.level",
                "value": "output + input.0",
            },
        },
        "memory": {
            "memory": {
                "period": CHUNK,
                "decay": "zero",
                "freeze": {
                    "blocks.{layer}.memory.hook_step": float("-inf"),
                    "blocks.{layer}.memory.hook_forget": float("-inf"),
                },
                "fast": {
                    "w": {
                        "module": memory,
                        "value": "output.1.all.weights",
                        "dims": "batch write out in",
                        "meta": f"{memory}.start",
                        "initial": True,
                    }
                },
            }
        },
        "groups": {
            "blocks.{layer}.memory": "layers.{layer}.memory",
            "blocks.{layer}.cms.fast": "layers.{layer}.level",
            "embed": ["embed"],
        },
    }
