"""Causal attention, of the Transformer baseline and others: rotary positions, scaled dot products by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopeprobe.model.config import ModelConfig
from hopeprobe.model.precision import Rounded, linear
from hopeprobe.model.state import AttentionState


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of (B, heads, n, e) at positions start .. start + n - 1."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (
        torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)[:, None] * frequency
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head causal self-attention over this tick and what the state still holds of earlier ones."""

    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        self.config = config
        self.window = window  # tokens that each position sees, itself included
        d = config.dim
        self.w_qkv = nn.Parameter(torch.empty(3 * d, d))
        self.w_out = nn.Parameter(torch.empty(d, d))

    def init_state(self, batch: int) -> AttentionState:
        """Nothing seen yet."""
        heads = self.config.heads
        empty = self.w_out.new_zeros(batch, heads, 0, self.config.dim // heads)
        return AttentionState(empty, empty)

    def read(
        self, x: Tensor, state: AttentionState, position: int, of: Rounded | None = None
    ) -> tuple[Tensor, AttentionState]:
        """(B, n, d) at positions position .. position + n - 1: the output, and the last `window` keys and values.

        The state, and what turns its keys, is as wide as the weights are, whatever products are rounded `of`.
        """
        batch, n, d = x.shape
        heads = self.config.heads
        near = linear(x, self.w_qkv, None, of)
        q, k, v = near.to(x.dtype).view(batch, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, position), rotate(k, position)
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        past = k.shape[2] - n
        mask = None
        if past or n > self.window:
            ages = torch.arange(n, device=x.device)[:, None] + past - torch.arange(past + n, device=x.device)
            mask = (ages >= 0) & (ages < self.window)
        asked, shown, held = (t.to(near.dtype) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(asked, shown, held, attn_mask=mask, is_causal=mask is None)
        out = linear(mixed.transpose(1, 2).reshape(batch, n, d), self.w_out, None, of)
        keep = max(0, k.shape[2] - self.window)
        return out, AttentionState(k[:, :, keep:], v[:, :, keep:])


class MLP(nn.Module):
    """W_out gelu(W_in x + b_in) + b_out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, h = config.dim, config.dim * config.mlp_multiplier
        self.w_in = nn.Parameter(torch.empty(h, d))
        self.b_in = nn.Parameter(torch.empty(h))
        self.w_out = nn.Parameter(torch.empty(d, h))
        self.b_out = nn.Parameter(torch.empty(d))

    def forward(self, x: Tensor, of: Rounded | None = None) -> Tensor:
        """(B, n, d) to (B, n, d)."""
        return linear(F.gelu(linear(x, self.w_in, self.b_in, of)), self.w_out, self.b_out, of)
