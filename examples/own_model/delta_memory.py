"""A language model that hopeprobe has never heard of: a linear memory written by the delta rule, and an MLP.

`python delta_memory.py` trains it on the text that ships with Python and saves step-0.pt and step-60.pt; then
`hopeprobe analyze step-60.pt --map map.toml --probe meta-fast --probe adaptation` measures it as any other.
"""

import torch
from torch import nn
from torch.nn import functional as F

CHUNK, CONTEXT, STEPS = 16, 64, 60


class DeltaMemory(nn.Module):
    """Reads W k; after each chunk W becomes (1 - forget) W + sum_t step_t (v_t - W k_t) k_t^T."""

    def __init__(self, dim):
        super().__init__()
        self.start = nn.Parameter(torch.eye(dim))
        self.to_key, self.to_value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_step, self.to_forget = nn.Linear(dim, 1), nn.Linear(dim, 1)

    def forward(self, x):
        weights = self.start.expand(len(x), -1, -1)
        read, written = [], []
        for part in x.split(CHUNK, dim=1):
            key, value = F.normalize(self.to_key(part), dim=-1), self.to_value(part)
            read.append(key @ weights.mT)
            if part.shape[1] == CHUNK:
                step = 0.2 * self.to_step(part).sigmoid()
                forget = self.to_forget(part).sigmoid().mean(1, keepdim=True)
                weights = (1 - 0.1 * forget) * weights + (step * (value - read[-1])).mT @ key
                written.append(weights)
        # As the weights stood at first and after each chunk: what a map can show.
        return torch.cat(read, dim=1), torch.stack([self.start.expand(len(x), -1, -1), *written], dim=1)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.memory = nn.LayerNorm(dim), DeltaMemory(dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x):
        x = x + self.memory(self.norm(x))[0]
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    def __init__(self, vocab=50257, dim=32, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main():
    from hopeprobe.tokens import load_tokens

    torch.manual_seed(0)
    config = {"dim": 32, "depth": 2}
    model, text = LanguageModel(**config), load_tokens("builtin")
    stream = torch.from_numpy(text.split_tokens("train").astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS + 1):
        if step in (0, STEPS):
            torch.save({"model": model.state_dict(), "config": config, "step": step}, f"step-{step}.pt")
        at = torch.randint(len(stream) - CONTEXT - 1, (4, 1)) + torch.arange(CONTEXT + 1)
        window = stream[at]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.2f} nats")


if __name__ == "__main__":
    main()
