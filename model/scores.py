"""What a gate decides by: the score of each token, from what the tick gave and what the stream gave before.

With s_t the surprise (cross-entropy of the token predicted at t, nats), of one sequence and causal:

    absolute, quantile   s_t                                                   nats
    zscore               (s_t - m_t) / (sqrt(v_t) + 0.1)                       1
    ratio                s_t / m_t                                             1
    excess               s_t - u_t, u_t the unigram surprisal                  nats
    entropy-gap          s_t - H_t, H_t the entropy of the prediction          nats
    assoc                |dL_t/dM| of a layer's memories, L the associative loss: Titans' momentary surprise
    momentum             sum_i decay^(t-i) s_i / sum_i decay^(t-i), i <= t     nats: Titans' past surprise, s in it
    random               uniform on [0, 1), from a hash of the sequence

m_t and v_t are mean and variance of s before t, each token weighted by decay to the power of its age; before there is
a token z is 0 and the ratio 1. Sources: "Dissecting HOPE", section 6, for the wish that surprise be relative; "Titans"
(arXiv 2501.00663, section 3.1) for `assoc` and `momentum`, there gradients.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

#: Added to a deviation, nats: where the loss hardly varies, a rounding is no surprise.
_FLOOR = 0.1
_TINY = 1e-6

# Of the hash, 64 bits with wraparound: a polynomial of the tokens, then splitmix64's finaliser.
_FACTOR = 0x5851F42D4C957F2D
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Seen(NamedTuple):
    """What a tick shows a gate; (B, n) each, and all outside the graph."""

    surprise: Tensor  # nats
    targets: Tensor  # int64: the tokens predicted, -1 where there is none
    unigram: Tensor | None  # surprisal of those tokens, for `excess`
    entropy: Tensor | None  # nats, for `entropy-gap`
    assoc: Tensor | None  # (B, layers, n), for `assoc`


class Scored(NamedTuple):
    """Scores, and how the statistics behind them move on."""

    score: Tensor  # (B, G, n)
    slope: Tensor  # dscore_t/ds_t, of a shape that fits
    mean: Tensor  # (B, G)
    square: Tensor  # (B, G)


def scored(rule: str, decay: float, seen: Seen, mean: Tensor, square: Tensor, position: int) -> Scored:
    """Scores of a tick after `position` tokens; mean and square as `GateState` has them."""
    s = seen.surprise[:, None]
    one = s.new_ones(())
    if rule == "excess" and seen.unigram is not None:
        return Scored(s - seen.unigram[:, None], one, mean, square)
    if rule == "entropy-gap" and seen.entropy is not None:
        return Scored(s - seen.entropy[:, None], one, mean, square)
    if rule == "assoc" and seen.assoc is not None:
        return Scored(seen.assoc, one, mean, square)
    if rule in ("absolute", "quantile"):
        return Scored(s, one, mean, square)
    n, given = s.shape[2], s.dtype
    if (
        rule == "zscore"
    ):  # a variance is a small difference of large squares, and the root of a rounding is large
        s, mean, square = s.double(), mean.double(), square.double()
    fade, mix = _decays(decay, n, s.dtype, s.device)
    finite = torch.where(s.isfinite(), s, 0.0)  # one that is not would be everywhere at once
    means = mean[..., None] * fade + finite @ mix  # (B, G, n + 1): before each token, and after the last
    steps = torch.arange(position, position + n + 1, dtype=s.dtype, device=s.device)
    weight = 1.0 - decay**steps
    if rule == "momentum":
        return Scored(means[..., 1:] / weight[1:], (1.0 - decay) / weight[1:], means[..., -1], square)
    known = steps[:-1] > 0
    before = torch.where(known, weight[:-1], 1.0)
    m = means[..., :-1] / before
    if rule == "ratio":
        slope = torch.where(known, 1.0 / m.clamp_min(_TINY), 0.0)
        return Scored(torch.where(known, s * slope, 1.0), slope, means[..., -1], square)
    if rule != "zscore":
        raise ValueError(f"the tick does not show what {rule!r} needs")
    squares = square[..., None] * fade + finite.square() @ mix
    deviation = (squares[..., :-1] / before - m.square()).clamp_min(0.0).sqrt()
    slope = torch.where(known, 1.0 / (deviation + _FLOOR), 0.0)
    made = slope * (s - m), slope, means[..., -1], squares[..., -1]
    return Scored(*(x.to(given) for x in made))


# Kept for good, here and below: a recorded step (`captured.py`) reads them where they lie.
@functools.cache
def _decays(decay: float, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """decay^j for j = 0..n, and (n, n + 1): what s_i adds to the running sum ahead of token j."""
    steps = torch.arange(n + 1, dtype=dtype, device=device)
    age = steps[None, :] - 1 - steps[:-1, None]
    return decay**steps, torch.where(age >= 0, (1.0 - decay) * decay ** age.clamp_min(0), 0.0)


def hash_start(seed: int) -> int:
    """The chain of a stream that has no token yet."""
    return _signed((seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) % 2**64)


def hash_tick(chain: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Go on with the chains (B,) by tokens (B, n): the chain at each token (B, n), and after the last (B,).

    h_t = a h_{t-1} + token_t + 1, modulo 2^64: the same for the same stream, in any batch and any pieces.
    """
    n = targets.shape[1]
    lead, mix = _powers(n, targets.device)
    chains = chain[:, None] * lead + ((targets + 1)[:, :, None] * mix).sum(1)
    return chains, chains[:, -1]


@functools.cache
def _powers(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """a^(j + 1), (n,), and (n, n): the power that token i comes with in the chain at token j."""
    powers = [_signed(pow(_FACTOR, j, 2**64)) for j in range(n + 1)]
    mix = [[powers[j - i] if j >= i else 0 for j in range(n)] for i in range(n)]
    return torch.tensor(powers[1:]).to(device), torch.tensor(mix).to(device)


def uniform(chains: Tensor, salt: int, dtype: torch.dtype) -> Tensor:
    """Numbers on [0, 1), multiples of 2^-24, from chains; independent for another salt."""
    z = chains + _signed((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in _MIXES:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 40).to(dtype) * 2.0**-24


def _shifted(z: Tensor, by: int) -> Tensor:
    """The bits of an int64 moved right, zeros coming in."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
