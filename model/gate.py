"""Surprise gates: which tokens may be written.

The absolute threshold is the study's and the public reproduction's; neither paper defines one.
"""

from __future__ import annotations

from torch import Tensor


def surprise_gate(surprise: Tensor, scored: Tensor, threshold: float) -> Tensor:
    """g_t = 1[s_t > tau], 0 where the token has no loss.

    Args:
        surprise: (B, T), nats.
        scored: (B, T) bool.
        threshold: tau, nats.

    Returns:
        (B, T) of surprise's dtype, values 0 and 1.
    """
    return ((surprise > threshold) & scored).to(surprise.dtype)
